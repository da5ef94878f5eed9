//! The homeserver's side for its own users: whoever shows an access token and is in the room gets a token for the
//! SFU, and nobody else.

use std::sync::Arc;

use antiphon_jwt_service::{
    DelegationConfig, HomeserverSide, ParticipantIdentity, RoomAlias, Service, Settings, store::MemoryStore,
};
use axum::{
    body::Body,
    extract::Request,
    http::{Method, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};

use crate::support::{Client, FakeSfu, Homeserver, Names, Reply, Seen, get_token, settings, userinfo};

const GET_TOKEN: [&str; 2] = [
    "/_matrix/client/v1/rtc/livekit/get_token",
    "/_matrix/client/unstable/io.element.msc4195/rtc/livekit/get_token",
];
const DELEGATE: [&str; 2] = [
    "/_matrix/client/v1/rtc/livekit/delegate_delayed_leave",
    "/_matrix/client/unstable/io.element.msc4195/rtc/livekit/delegate_delayed_leave",
];
const FEDERATION: [&str; 2] = [
    "/_matrix/federation/v1/rtc/livekit/get_token",
    "/_matrix/federation/unstable/io.element.msc4195/rtc/livekit/get_token",
];
const DELAYED_EVENTS: &str = "/_matrix/client/unstable/org.matrix.msc4140/delayed_events/";

/// A homeserver on which `alice` and `dave` are in `!room:hs`, `bob` has left it, and `carol` never was there.
/// Delayed events are `alice`'s, but for one of `bob`'s. Tokens are the users' names.
fn answer(seen: &Seen) -> Response {
    let user = seen.headers.get(header::AUTHORIZATION).and_then(|v| v.to_str().ok());
    let user = user.and_then(|v| v.strip_prefix("Bearer ")).unwrap_or_default();
    let refused = |status: StatusCode, errcode: &str, soft_logout: bool| {
        let body = json!({ "errcode": errcode, "error": "secret reason", "soft_logout": soft_logout });
        (status, body.to_string()).into_response()
    };
    if !["alice", "bob", "carol", "dave"].contains(&user) {
        return refused(StatusCode::UNAUTHORIZED, "M_UNKNOWN_TOKEN", user == "soft");
    }
    let id = format!("@{user}:{}", seen.host);
    if seen.path == "/_matrix/client/v3/account/whoami" {
        return json!({ "user_id": id, "device_id": "D", "is_guest": false }).to_string().into_response();
    }
    if seen.path == format!("/_matrix/client/v3/rooms/!room:hs/state/m.room.member/{id}") {
        match user {
            "alice" | "dave" => return json!({ "membership": "join" }).to_string().into_response(),
            "bob" => return json!({ "membership": "leave" }).to_string().into_response(),
            _ => {}
        }
    }
    if let Some(event) = seen.path.strip_prefix(DELAYED_EVENTS) {
        let mut answer = json!({ "room_id": "!room:hs", "delay_ms": 3_600_000, "content": {} });
        match (user, event) {
            ("alice", "hour") | ("bob", "bobs") => {}
            ("alice", "moment") => answer["delay_ms"] = json!(99),
            ("alice", "elsewhere") => answer["room_id"] = json!("!other:hs"),
            ("alice", "sent") => answer["finalised"] = json!({ "finalised_ts": 1 }),
            _ => return refused(StatusCode::NOT_FOUND, "M_NOT_FOUND", false),
        }
        return answer.to_string().into_response();
    }
    refused(StatusCode::FORBIDDEN, "M_FORBIDDEN", false)
}

fn side(homeserver: &Homeserver) -> Settings {
    let mut settings = settings();
    let url = format!("https://{}", homeserver.name()).parse().unwrap();
    settings.homeserver = Some(HomeserverSide::new(homeserver.name().parse().unwrap(), url));
    settings
}

fn body() -> Value {
    json!({
        "url": "ws://sfu.test:7880/path", "room_id": "!room:hs", "slot_id": "m.call#ROOM", "member_id": "m1",
    })
}

async fn post(client: &Client, path: &str, token: &str, body: &Value) -> Reply {
    let request = Request::post(path)
        .header(header::AUTHORIZATION, format!("Bearer {token}"))
        .body(Body::from(body.to_string()))
        .unwrap();
    client.request(request).await
}

fn paths(homeserver: &Homeserver) -> Vec<String> {
    homeserver.seen().into_iter().map(|seen| seen.path).collect()
}

#[tokio::test]
async fn a_member_of_the_room_gets_a_token_and_the_sfu_a_room() {
    for path in GET_TOKEN {
        let homeserver = Homeserver::start(answer).await;
        let client = Client::new(side(&homeserver));
        let reply = post(&client, path, "alice", &body()).await;
        let alice = format!("@alice:{}", homeserver.name());
        let identity = ParticipantIdentity::of_membership(&alice, "m1");
        let alias = RoomAlias::of_slot("!room:hs", "m.call#ROOM");
        let claims = reply.claims();
        assert_eq!(claims["sub"], identity.as_str());
        assert_eq!(
            claims["video"],
            json!({ "roomJoin": true, "room": alias.as_str(), "canPublish": true, "canSubscribe": true })
        );
        assert_eq!(claims["exp"].as_u64().unwrap() - claims["nbf"].as_u64().unwrap(), 3600);
        assert_eq!(reply.json().as_object().unwrap().len(), 1, "{}", reply.text);
        assert_eq!(client.sfu.rooms(), [alias.as_str()]);
        assert_eq!(
            paths(&homeserver),
            [
                "/_matrix/client/v3/account/whoami".to_owned(),
                format!("/_matrix/client/v3/rooms/!room:hs/state/m.room.member/{alice}"),
            ]
        );
        assert!(homeserver.seen().iter().all(|seen| seen.query.is_none()), "tokens stay out of URLs");
    }
}

#[tokio::test]
async fn a_member_that_names_its_device_is_who_it_is_through_get_token() {
    let homeserver = Homeserver::start(|seen| match seen.path.starts_with("/_matrix/federation") {
        true => userinfo(seen, &[("openid", "alice")]),
        false => answer(seen),
    })
    .await;
    let client = Client::new(side(&homeserver));
    let mut newest = body();
    newest.as_object_mut().unwrap().remove("member_id");
    newest["member"] = json!({ "id": "member-1", "claimed_device_id": "DEVICE" });
    newest["server_name"] = json!(homeserver.name().to_ascii_uppercase());
    let newest = post(&client, GET_TOKEN[1], "alice", &newest).await.claims();
    let older = client.post("/get_token", get_token(&homeserver.name(), "openid", "alice")).await.claims();
    assert_eq!(newest["sub"], older["sub"]);
    assert_eq!(newest["video"]["room"], older["video"]["room"]);
}

#[tokio::test]
async fn who_is_not_in_the_room_is_forbidden_with_the_same_words() {
    let homeserver = Homeserver::start(answer).await;
    let client = Client::new(side(&homeserver));
    let mut unknown = body();
    unknown["room_id"] = json!("!unknown:hs");
    let mut climbing = body();
    climbing["room_id"] = json!("!room:hs/../!room:hs");
    let mut sentences = Vec::new();
    for (user, body) in [("bob", body()), ("carol", body()), ("alice", unknown), ("alice", climbing)] {
        let reply = post(&client, GET_TOKEN[0], user, &body).await;
        assert_eq!(reply.refusal(), (403, "M_FORBIDDEN".into()), "{user}");
        sentences.push(reply.json()["error"].clone());
    }
    sentences.dedup();
    assert_eq!(sentences.len(), 1);
    assert_eq!(client.sfu.rooms(), [] as [String; 0]);
}

#[tokio::test]
async fn without_a_token_that_the_homeserver_knows_nothing_is_answered() {
    let homeserver = Homeserver::start(answer).await;
    let client = Client::new(side(&homeserver));
    for path in [GET_TOKEN[0], GET_TOKEN[1]] {
        let by_query = format!("{path}?access_token=alice");
        for path in [path, &by_query] {
            let reply = client.post(path, body()).await;
            assert_eq!(reply.refusal(), (401, "M_MISSING_TOKEN".into()), "{path}");
        }
        let long = "a".repeat(9000);
        for token in ["a b", &long] {
            let reply = post(&client, path, token, &body()).await;
            assert_eq!(reply.refusal(), (401, "M_UNKNOWN_TOKEN".into()));
        }
    }
    assert_eq!(paths(&homeserver), [] as [String; 0], "nobody was asked");

    let reply = post(&client, GET_TOKEN[0], "nobody", &body()).await;
    assert_eq!(reply.refusal(), (401, "M_UNKNOWN_TOKEN".into()));
    assert!(!reply.text.contains("secret reason"));
    let reply = post(&client, GET_TOKEN[0], "soft", &body()).await;
    assert_eq!((reply.status, &reply.json()["errcode"]), (401, &json!("M_UNKNOWN_TOKEN")));
    assert_eq!(reply.json()["soft_logout"], json!(true));
    assert_eq!(client.sfu.rooms(), [] as [String; 0]);
}

#[tokio::test]
async fn requests_that_are_none_are_refused_and_ask_nobody() {
    let homeserver = Homeserver::start(answer).await;
    let client = Client::new(side(&homeserver));
    for (member, value, errcode) in [
        ("url", json!(null), "M_MISSING_PARAM"),
        ("room_id", json!(""), "M_MISSING_PARAM"),
        ("slot_id", json!(null), "M_MISSING_PARAM"),
        ("member_id", json!(null), "M_MISSING_PARAM"),
        ("member_id", json!(1), "M_BAD_JSON"),
        ("url", json!({}), "M_BAD_JSON"),
        ("room_id", json!("#alias:hs"), "M_INVALID_PARAM"),
        ("server_name", json!("no name"), "M_INVALID_PARAM"),
    ] {
        let mut body = body();
        body[member] = value;
        let reply = post(&client, GET_TOKEN[0], "alice", &body).await;
        assert_eq!(reply.refusal(), (400, errcode.to_owned()), "{body}");
    }
    let raw = async |body: String| {
        let request = Request::post(GET_TOKEN[0]).header(header::AUTHORIZATION, "Bearer alice");
        client.request(request.body(Body::from(body)).unwrap()).await.refusal()
    };
    assert_eq!(raw("{".to_owned()).await, (400, "M_NOT_JSON".into()));
    assert_eq!(raw("[]".to_owned()).await, (400, "M_BAD_JSON".into()));
    assert_eq!(raw(" ".repeat(70_000)).await, (413, "M_TOO_LARGE".into()));
    assert_eq!(paths(&homeserver), [] as [String; 0]);
}

#[tokio::test]
async fn only_our_own_sfu_is_ours() {
    let homeserver = Homeserver::start(answer).await;
    let client = Client::new(side(&homeserver));
    let mut other = body();
    other["url"] = json!("wss://sfu.other.org");
    let reply = post(&client, GET_TOKEN[0], "alice", &other).await;
    assert_eq!(reply.refusal(), (400, "M_INVALID_PARAM".into()));
    assert_eq!(post(&client, GET_TOKEN[0], "carol", &other).await.status, 403, "membership comes first");
    // Without a signing key nobody else's either.
    let mut other = body();
    other["server_name"] = json!("other.org");
    let reply = post(&client, GET_TOKEN[0], "alice", &other).await;
    assert_eq!(reply.refusal(), (502, "M_UNKNOWN".into()));
    assert_eq!(client.sfu.rooms(), [] as [String; 0]);
}

#[tokio::test]
async fn a_homeserver_that_does_not_do_its_part_is_a_bad_gateway() {
    type Answer = fn(&Seen) -> Response;
    let cases: [(&str, Answer, (u16, &str)); 7] = [
        ("an error", |_| (StatusCode::INTERNAL_SERVER_ERROR, "{}").into_response(), (502, "M_UNKNOWN")),
        ("no JSON", |_| "<html>".into_response(), (502, "M_UNKNOWN")),
        ("too much", |_| " ".repeat(200_000).into_response(), (502, "M_UNKNOWN")),
        (
            "a redirect",
            |_| (StatusCode::FOUND, [(header::LOCATION, "/")]).into_response(),
            (502, "M_UNKNOWN"),
        ),
        (
            "another homeserver's user",
            |_| json!({ "user_id": "@alice:elsewhere.org" }).to_string().into_response(),
            (502, "M_UNKNOWN"),
        ),
        ("a limit", |_| (StatusCode::TOO_MANY_REQUESTS, "{}").into_response(), (429, "M_LIMIT_EXCEEDED")),
        ("a ban", |_| (StatusCode::FORBIDDEN, "{}").into_response(), (403, "M_FORBIDDEN")),
    ];
    for (what, answer, expected) in cases {
        let homeserver = Homeserver::start(answer).await;
        let client = Client::new(side(&homeserver));
        let reply = post(&client, GET_TOKEN[0], "alice", &body()).await;
        assert_eq!(reply.refusal(), (expected.0, expected.1.to_owned()), "{what}");
        assert_eq!(homeserver.seen().len(), 1, "{what}");
        if expected.0 == 429 {
            assert!(reply.headers.contains_key(header::RETRY_AFTER));
        }
    }
    let gone = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let mut settings = settings();
    let url = format!("http://{gone}").parse().unwrap();
    settings.homeserver = Some(HomeserverSide::new("hs.org".parse().unwrap(), url));
    let reply = post(&Client::new(settings), GET_TOKEN[0], "alice", &body()).await;
    assert_eq!(reply.refusal(), (502, "M_UNKNOWN".into()));
}

#[tokio::test]
async fn a_failing_sfu_means_no_token() {
    let homeserver = Homeserver::start(answer).await;
    let client = Client::with(side(&homeserver), FakeSfu::broken(), Names::default());
    let reply = post(&client, GET_TOKEN[0], "alice", &body()).await;
    assert_eq!(reply.refusal(), (500, "M_UNKNOWN".into()));
}

#[tokio::test]
async fn none_of_it_is_there_unless_it_is_switched_on() {
    let client = Client::new(settings());
    for path in GET_TOKEN.into_iter().chain(DELEGATE).chain(FEDERATION) {
        for method in [Method::POST, Method::OPTIONS, Method::GET] {
            let reply = client.send(method, path, "{}").await;
            assert_eq!((reply.status, reply.text.as_str()), (404, ""), "{path}");
        }
    }
    // Without an application service, nothing for other homeservers.
    let homeserver = Homeserver::start(answer).await;
    let client = Client::new(side(&homeserver));
    for path in FEDERATION {
        assert_eq!(client.post(path, "{}").await.status, 404, "{path}");
    }
}

#[tokio::test]
async fn web_pages_can_read_every_answer() {
    let homeserver = Homeserver::start(answer).await;
    let client = Client::new(side(&homeserver));
    let mut replies = vec![post(&client, GET_TOKEN[0], "alice", &body()).await];
    for path in GET_TOKEN.into_iter().chain(DELEGATE) {
        let preflight = client.send(Method::OPTIONS, path, "").await;
        assert_eq!((preflight.status, preflight.text.as_str()), (200, ""), "{path}");
        replies.extend([preflight, client.post(path, "{}").await]);
    }
    let wrong = client.send(Method::GET, GET_TOKEN[0], "").await;
    assert_eq!(wrong.refusal(), (405, "M_UNRECOGNIZED".into()));
    replies.push(wrong);
    for reply in replies {
        for (name, value) in [
            ("content-type", "application/json"),
            ("access-control-allow-origin", "*"),
            ("access-control-allow-methods", "GET, POST, PUT, DELETE, OPTIONS"),
            ("access-control-allow-headers", "X-Requested-With, Content-Type, Authorization"),
        ] {
            let values: Vec<_> = reply.headers.get_all(name).iter().collect();
            assert_eq!(values, [value], "{name} of {reply:?}");
        }
    }
}

#[tokio::test]
async fn a_leave_is_delegated_by_whose_it_is() {
    let homeserver = Homeserver::start(answer).await;
    let service = Service::with_store_and_resolver(
        side(&homeserver),
        Arc::new(FakeSfu::default()),
        Arc::new(MemoryStore::default()),
        DelegationConfig::new("test"),
        Arc::new(Names::default()),
    )
    .unwrap();
    service.restore().await;
    let client = Client::of(service.clone());
    let with = |delay_id: &str| {
        let mut body = body();
        body["delay_id"] = json!(delay_id);
        body
    };
    for delay_id in ["sent", "elsewhere", "moment", "unknown", "..", "a\u{1}b"] {
        let reply = post(&client, DELEGATE[0], "alice", &with(delay_id)).await;
        assert_eq!(reply.refusal(), (400, "M_INVALID_PARAM".into()), "{delay_id}");
    }
    let reply = post(&client, DELEGATE[0], "dave", &with("hour")).await;
    assert_eq!(reply.refusal(), (400, "M_INVALID_PARAM".into()), "it is not his");
    for (user, delay_id) in [("bob", "bobs"), ("carol", "hour"), ("carol", "unknown")] {
        let reply = post(&client, DELEGATE[0], user, &with(delay_id)).await;
        assert_eq!(reply.refusal(), (403, "M_FORBIDDEN".into()), "{user} is not in the room");
    }
    let mut other = with("hour");
    other["url"] = json!("wss://sfu.other.org");
    assert_eq!(post(&client, DELEGATE[0], "alice", &other).await.refusal(), (400, "M_INVALID_PARAM".into()));
    assert_eq!(post(&client, DELEGATE[0], "alice", &body()).await.refusal(), (400, "M_MISSING_PARAM".into()));
    assert_eq!(client.post(DELEGATE[0], with("hour")).await.refusal(), (401, "M_MISSING_TOKEN".into()));
    assert_eq!(
        post(&client, DELEGATE[0], "nobody", &with("hour")).await.refusal(),
        (401, "M_UNKNOWN_TOKEN".into())
    );
    assert_eq!(service.delegation_stats().unwrap().waiting, 0);

    for path in DELEGATE {
        let reply = post(&client, path, "alice", &with("hour")).await;
        assert_eq!((reply.status, reply.text.as_str()), (200, "{}"), "{path}");
        assert_eq!(service.delegation_stats().unwrap().waiting, 1, "one for each member");
    }
}

#[tokio::test]
async fn without_a_store_no_leave_is_taken_over() {
    let homeserver = Homeserver::start(answer).await;
    let client = Client::new(side(&homeserver));
    for path in DELEGATE {
        for method in [Method::POST, Method::GET] {
            let reply = client.send(method, path, "{}").await;
            assert_eq!(reply.refusal(), (404, "M_UNRECOGNIZED".into()), "{path}");
        }
    }
}
