//! The homeserver's side with two real Synapses that federate: they say who is in the room, and whose keys are
//! whose.

use std::{net::SocketAddr, sync::Arc};

use antiphon_jwt_service::{
    DelegationConfig, HomeserverSide, ParticipantIdentity, Service, Settings, serve, store::MemoryStore,
};
use antiphon_testkit::peers::{Peer, Session, Synapse, SynapseOptions, require};
use axum::{body::Body, extract::Request, http::header};
use base64::{Engine as _, engine::general_purpose::STANDARD_NO_PAD};
use reqwest::Method;
use ruma_signatures::Ed25519KeyPair;
use serde_json::{Value, json};

use crate::{
    other_homeservers_users::{PKCS8, send, sign, tls_listener},
    support::{Client, DEADLINE, FakeSfu, Names, Reply, settings},
};

const GET_TOKEN: &str = "/_matrix/client/v1/rtc/livekit/get_token";
const DELEGATE: &str = "/_matrix/client/v1/rtc/livekit/delegate_delayed_leave";
const FEDERATION: &str = "/_matrix/federation/v1/rtc/livekit/get_token";
const SFU: &str = "ws://sfu.test:7880/path";

fn side(synapse: &Synapse) -> (Settings, HomeserverSide) {
    let name = synapse.server_name().parse().unwrap();
    (settings(), HomeserverSide::new(name, synapse.url().parse().unwrap()))
}

fn port(synapse: &Synapse) -> u16 {
    synapse.server_name().rsplit(':').next().unwrap().parse().unwrap()
}

fn loopback(port: u16) -> SocketAddr {
    ([127, 0, 0, 1], port).into()
}

fn body(room: &str) -> Value {
    json!({ "url": SFU, "room_id": room, "slot_id": "m.call#ROOM", "member_id": "m1" })
}

async fn post(client: &Client, path: &str, token: &str, body: &Value) -> Reply {
    let request = Request::post(path)
        .header(header::AUTHORIZATION, format!("Bearer {token}"))
        .body(Body::from(body.to_string()))
        .unwrap();
    client.request(request).await
}

/// A call of a Synapse's client-server API below `/_matrix/client`.
async fn call(synapse: &Synapse, user: &Session, method: Method, path: &[&str], query: &str) -> Value {
    let mut url: url::Url = synapse.url().parse().unwrap();
    url.path_segments_mut().unwrap().extend(["_matrix", "client"]).extend(path);
    url.set_query(Some(query));
    let http = reqwest::Client::builder().no_proxy().timeout(DEADLINE).build().unwrap();
    let request = http.request(method.clone(), url).bearer_auth(&user.access_token);
    let request = if method == Method::GET { request } else { request.body("{}") };
    let answer = request.send().await.unwrap();
    assert!(answer.status().is_success(), "{method} {path:?}: {}", answer.status());
    serde_json::from_str(&answer.text().await.unwrap()).unwrap()
}

#[tokio::test]
async fn members_on_both_sides_of_federation_get_tokens_and_others_do_not() {
    require!(Peer::Synapse);
    let options = SynapseOptions::default().and_federation();
    let (here, there) = tokio::join!(
        Synapse::start(options.clone().and_application_service("as-token")),
        Synapse::start(options)
    );
    let (here, there) = (here.unwrap(), there.unwrap());
    let alice = here.register("alice", "password").await.unwrap();
    let carol = here.register("carol", "password").await.unwrap();
    let dave = here.register("dave", "password").await.unwrap();
    let bob = there.register("bob", "password").await.unwrap();
    let eve = there.register("eve", "password").await.unwrap();
    let room = here.create_call_room(&alice).await.unwrap();
    there.join_via(&bob, &room, Some(&here.server_name())).await.unwrap();

    // Ours: it finds the other Synapse's keys where that serves them.
    let (mut settings, mut ours) = side(&here);
    ours.application_service_token = Some("as-token".into());
    settings.homeserver = Some(ours);
    let names = Names::default().address("localhost", port(&there), loopback(port(&there)));
    let sfu = Arc::new(FakeSfu::default());
    let service = Service::with_store_and_resolver(
        settings,
        sfu.clone(),
        Arc::new(MemoryStore::default()),
        DelegationConfig::new("here"),
        Arc::new(names),
    )
    .unwrap();
    service.restore().await;
    let client = Client::of(service.clone());

    // A member, and those who are not.
    let claims = post(&client, GET_TOKEN, &alice.access_token, &body(&room)).await.claims();
    assert_eq!(claims["sub"], ParticipantIdentity::of_membership(&alice.user_id, "m1").as_str());
    assert_eq!(claims["video"]["canPublish"], json!(true));
    assert_eq!(sfu.rooms().len(), 1);
    let reply = post(&client, GET_TOKEN, &carol.access_token, &body(&room)).await;
    assert_eq!(reply.refusal(), (403, "M_FORBIDDEN".into()), "never in the room");
    here.join(&dave, &room).await.unwrap();
    post(&client, GET_TOKEN, &dave.access_token, &body(&room)).await.claims();
    call(&here, &dave, Method::POST, &["v3", "rooms", &room, "leave"], "").await;
    let reply = post(&client, GET_TOKEN, &dave.access_token, &body(&room)).await;
    assert_eq!(reply.refusal(), (403, "M_FORBIDDEN".into()), "left");
    let reply = post(&client, GET_TOKEN, "nobodys", &body(&room)).await;
    assert_eq!(reply.refusal(), (401, "M_UNKNOWN_TOKEN".into()));
    let reply = client.post(GET_TOKEN, body(&room)).await;
    assert_eq!(reply.refusal(), (401, "M_MISSING_TOKEN".into()));
    let reply = post(&client, GET_TOKEN, &alice.access_token, &body("!unknown:localhost")).await;
    assert_eq!(reply.refusal(), (403, "M_FORBIDDEN".into()), "no such room");

    // Her delayed leave is hers alone.
    let query = "org.matrix.msc4140.delay=3600000";
    let path = ["v3", "rooms", &room, "send", "org.matrix.msc4143.rtc.member", "t1"];
    let scheduled = call(&here, &alice, Method::PUT, &path, query).await;
    let mut delegation = body(&room);
    delegation["delay_id"] = scheduled["delay_id"].clone();
    let reply = post(&client, DELEGATE, &carol.access_token, &delegation).await;
    assert_eq!(reply.refusal(), (403, "M_FORBIDDEN".into()), "not in the room");
    here.join(&carol, &room).await.unwrap();
    let reply = post(&client, DELEGATE, &carol.access_token, &delegation).await;
    assert_eq!(reply.refusal(), (400, "M_INVALID_PARAM".into()), "not hers");
    let reply = post(&client, DELEGATE, &alice.access_token, &delegation).await;
    assert_eq!((reply.status, reply.text.as_str()), (200, "{}"));
    assert_eq!(service.delegation_stats().unwrap().waiting, 1);

    // Theirs: its requests to our homeserver come to our service, as a reverse proxy would bring them.
    let listener = tls_listener().await;
    let names = Names::default().address("localhost", port(&here), listener.local_addr().unwrap());
    let server = tokio::spawn(serve(listener, service.router(), std::future::pending()));
    let (mut settings, mut theirs) = side(&there);
    settings.livekit_url = "wss://sfu.there.test".to_owned();
    theirs.signing_key = Some(there.signing_key().parse().unwrap());
    settings.homeserver = Some(theirs);
    let their_client = Client::with(settings, FakeSfu::default(), names);
    let mut remote = body(&room);
    remote["server_name"] = json!(here.server_name());
    let claims = post(&their_client, GET_TOKEN, &bob.access_token, &remote).await.claims();
    assert_eq!(claims["sub"], ParticipantIdentity::of_membership(&bob.user_id, "m1").as_str());
    assert_eq!(claims["video"]["canPublish"], json!(false));
    assert_eq!(sfu.rooms().len(), 3, "dave's, alice's and bob's");
    let reply = post(&their_client, GET_TOKEN, &eve.access_token, &remote).await;
    assert_eq!(reply.refusal(), (403, "M_FORBIDDEN".into()), "not in the room");
    remote["url"] = json!("wss://sfu.there.test");
    let reply = post(&their_client, GET_TOKEN, &bob.access_token, &remote).await;
    assert_eq!(reply.refusal(), (400, "M_INVALID_PARAM".into()), "not our SFU");
    assert_eq!(sfu.rooms().len(), 3);
    server.abort();

    // Our homeserver is asked whatever theirs says: these requests are signed with their key, rightly.
    let signed = async |user: &str| {
        let mut body = body(&room);
        body["user_id"] = json!(user);
        let key = key_pair(&there);
        let authorization = sign(&key, &there.server_name(), &here.server_name(), FEDERATION, &body);
        send(&client, FEDERATION, &authorization, &body).await
    };
    signed(&bob.user_id).await.claims();
    assert_eq!(signed(&eve.user_id).await.refusal(), (403, "M_FORBIDDEN".into()), "not in the room");
    assert_eq!(signed(&alice.user_id).await.refusal(), (403, "M_FORBIDDEN".into()), "not theirs");
    let since = call(&here, &alice, Method::GET, &["v3", "sync"], "timeout=0").await;
    call(&there, &bob, Method::POST, &["v3", "rooms", &room, "leave"], "").await;
    until_left(&here, &alice, &bob, since["next_batch"].as_str().unwrap()).await;
    assert_eq!(signed(&bob.user_id).await.refusal(), (403, "M_FORBIDDEN".into()), "left");
}

/// Waits until the homeserver of `watcher` knows that `user` has left.
async fn until_left(synapse: &Synapse, watcher: &Session, user: &Session, since: &str) {
    let mut since = since.to_owned();
    let watch = async {
        loop {
            let query = format!("timeout=20000&since={since}");
            let news = call(synapse, watcher, Method::GET, &["v3", "sync"], &query).await;
            since = news["next_batch"].as_str().unwrap().to_owned();
            let rooms = news["rooms"]["join"].as_object();
            let events = rooms.into_iter().flat_map(|rooms| rooms.values());
            let mut events = events.filter_map(|room| room["timeline"]["events"].as_array()).flatten();
            if events.any(|e| e["state_key"] == user.user_id && e["content"]["membership"] == "leave") {
                return;
            }
        }
    };
    tokio::time::timeout(DEADLINE, watch).await.expect("the leave arrives");
}

/// A Synapse's own signing key.
fn key_pair(synapse: &Synapse) -> Ed25519KeyPair {
    let mut words = synapse.signing_key().split_ascii_whitespace().skip(1);
    let (version, seed) = (words.next().unwrap(), STANDARD_NO_PAD.decode(words.next().unwrap()).unwrap());
    Ed25519KeyPair::from_der(&[&PKCS8[..], &seed].concat(), version.to_owned()).unwrap()
}
