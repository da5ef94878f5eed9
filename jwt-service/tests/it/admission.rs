//! A user whom the homeserver confirms gets the SFU's URL and a token; the room exists if the server has full
//! access.

use std::time::Duration;

use antiphon_jwt_service::{FullAccess, ParticipantIdentity, RestrictedUsers, RoomAlias};
use jsonwebtoken::{Algorithm, DecodingKey, Validation};
use serde_json::{Value, json};

use crate::support::{Client, Homeserver, get_token, settings, sfu_get};

const USERS: &[(&str, &str)] = &[("good", "alice")];

#[tokio::test]
async fn a_member_gets_a_token_and_a_room() {
    let homeserver = Homeserver::with_users(USERS).await;
    let client = Client::new(settings());
    let name = homeserver.name();
    let reply = client.post("/get_token", get_token(&name, "good", "alice")).await;

    let alias = RoomAlias::of_slot("!room:hs", "m.call#ROOM");
    let identity = ParticipantIdentity::of_member(&format!("@alice:{name}"), "DEVICE", "member-1");
    let claims = reply.claims();
    let iat = claims["iat"].as_u64().unwrap();
    assert_eq!(
        claims,
        json!({
            "iss": "devkey", "sub": identity.as_str(), "identity": identity.as_str(),
            "iat": iat, "nbf": iat, "exp": iat + 3600,
            "video": {
                "roomJoin": true, "room": alias.as_str(),
                "canPublish": true, "canSubscribe": true, "canUpdateOwnMetadata": true,
            },
        })
    );
    assert_eq!(reply.json().as_object().unwrap().len(), 2);
    assert_eq!(reply.json()["url"], "ws://sfu.test:7880/path");
    assert_eq!(client.sfu.rooms(), [alias.as_str()]);

    let validation = Validation::new(Algorithm::HS256);
    let jwt = reply.json()["jwt"].as_str().unwrap().to_owned();
    jsonwebtoken::decode::<Value>(jwt, &DecodingKey::from_secret(b"devsecret"), &validation).unwrap();

    let seen = homeserver.seen();
    assert_eq!(seen.len(), 1, "one request, no discovery for an address with a port: {seen:?}");
    assert_eq!((seen[0].method.as_str(), seen[0].host.as_str()), ("GET", name.as_str()));
    assert_eq!(seen[0].query.as_deref(), Some("access_token=good"));
    assert!(!seen[0].headers.contains_key("authorization"));
}

#[tokio::test]
async fn the_older_endpoint_uses_the_readable_identity_and_the_one_slot() {
    let homeserver = Homeserver::with_users(USERS).await;
    let client = Client::new(settings());
    let name = homeserver.name();
    let claims = client.post("/sfu/get", sfu_get(&name, "good")).await.claims();
    let alias = RoomAlias::of_slot("!room:hs", "m.call#ROOM");
    assert_eq!(claims["sub"], format!("@alice:{name}:DEVICE"));
    assert_eq!(claims["video"]["room"], alias.as_str());
    assert_eq!(client.sfu.rooms(), [alias.as_str()]);

    for device in [json!(""), json!(null)] {
        let mut body = sfu_get(&name, "good");
        body["device_id"] = device;
        assert_eq!(client.post("/sfu/get", body).await.claims()["sub"], format!("@alice:{name}:"));
    }
}

#[tokio::test]
async fn restricted_users_get_the_same_token_but_no_room() {
    let homeserver = Homeserver::with_users(USERS).await;
    let name = homeserver.name();
    let mut restricted = settings();
    restricted.full_access = FullAccess::Only(["elsewhere.org".to_owned()].into());
    let (full, restricted) = (Client::new(settings()), Client::new(restricted));
    for (path, body) in
        [("/get_token", get_token(&name, "good", "alice")), ("/sfu/get", sfu_get(&name, "good"))]
    {
        let grant = |claims: Value| (claims["sub"].clone(), claims["video"].clone());
        let same = grant(full.post(path, &body).await.claims());
        assert_eq!(grant(restricted.post(path, &body).await.claims()), same);
    }
    assert_eq!(full.sfu.rooms().len(), 2, "asked on every request");
    assert_eq!(restricted.sfu.rooms(), [] as [String; 0]);
}

#[tokio::test]
async fn restricted_users_can_be_made_listeners() {
    let homeserver = Homeserver::with_users(USERS).await;
    let name = homeserver.name();
    let mut listening = settings();
    listening.restricted_users = RestrictedUsers::Listen;
    let mut restricted = listening.clone();
    restricted.full_access = FullAccess::Only(["elsewhere.org".to_owned()].into());
    for (settings, may_publish) in [(listening, true), (restricted, false)] {
        let client = Client::new(settings);
        for (path, body) in
            [("/get_token", get_token(&name, "good", "alice")), ("/sfu/get", sfu_get(&name, "good"))]
        {
            let video = client.post(path, &body).await.claims()["video"].clone();
            assert_eq!(video["canPublish"], may_publish, "written out, since absent means permitted");
            assert_eq!(video["canSubscribe"], true);
            assert_eq!(video.get("canPublishData").is_none(), may_publish);
            assert_eq!(video.get("canUpdateOwnMetadata").is_some(), may_publish);
        }
    }
}

#[tokio::test]
async fn servers_beyond_the_list_get_nothing_and_are_not_asked() {
    let homeserver = Homeserver::with_users(USERS).await;
    let name = homeserver.name();
    let mut closed = settings();
    closed.allowed_homeservers = Some(["elsewhere.org".to_owned()].into());
    let mut named = closed.clone();
    named.full_access = FullAccess::Only([name.clone()].into());
    let mut listed = closed.clone();
    listed.allowed_homeservers = Some([name.clone()].into());
    let (closed, named, listed) = (Client::new(closed), Client::new(named), Client::new(listed));
    for (path, body) in
        [("/get_token", get_token(&name, "good", "alice")), ("/sfu/get", sfu_get(&name, "good"))]
    {
        let before = homeserver.connections();
        assert_eq!(closed.post(path, &body).await.refusal(), (403, "M_FORBIDDEN".into()));
        assert_eq!(homeserver.connections(), before);
        named.post(path, &body).await.claims();
        listed.post(path, &body).await.claims();
    }
    assert_eq!(closed.sfu.rooms(), [] as [String; 0]);
}

#[tokio::test]
async fn full_access_is_for_the_servers_listed() {
    let homeserver = Homeserver::with_users(USERS).await;
    let name = homeserver.name();
    let mut listed = settings();
    listed.full_access = FullAccess::Only([name.clone(), "elsewhere.org".to_owned()].into());
    let mut loopback = settings();
    loopback.full_access = FullAccess::Loopback;
    for settings in [listed, loopback] {
        let client = Client::new(settings);
        client.post("/get_token", get_token(&name, "good", "alice")).await.claims();
        assert_eq!(client.sfu.rooms().len(), 1);
    }
}

#[tokio::test]
async fn tokens_live_as_long_as_the_operator_says() {
    let homeserver = Homeserver::with_users(USERS).await;
    let mut short = settings();
    short.token_lifetime = Duration::from_secs(90);
    let claims = Client::new(short).post("/sfu/get", sfu_get(&homeserver.name(), "good")).await.claims();
    assert_eq!(claims["exp"].as_u64().unwrap() - claims["nbf"].as_u64().unwrap(), 90);
}

#[tokio::test]
async fn objects_of_other_specifications_may_have_new_members() {
    let homeserver = Homeserver::with_users(USERS).await;
    let client = Client::new(settings());
    let mut body = get_token(&homeserver.name(), "good", "alice");
    body["openid_token"]["org.example.new"] = json!({ "a": [1] });
    body["member"]["org.example.new"] = json!(1.5);
    body["delay_timeout"] = json!(-5);
    body["delay_cs_api_url"] = json!("https://evil.example.com");
    client.post("/get_token", body).await.claims();
}

#[tokio::test]
async fn lookups_at_one_server_share_a_connection() {
    let homeserver = Homeserver::with_users(USERS).await;
    let client = Client::new(settings());
    let body = get_token(&homeserver.name(), "good", "alice");
    for _ in 0..5 {
        client.post("/get_token", &body).await.claims();
    }
    assert_eq!((homeserver.lookups(), homeserver.connections()), (5, 1));
}
