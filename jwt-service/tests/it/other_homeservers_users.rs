//! The homeserver's side between homeservers: a request that the user's homeserver has signed gets a token to
//! subscribe with, if the user is in the room; and our own users' requests for other SFUs are signed so.

use std::{
    fs,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use antiphon_jwt_service::{
    Bind, Certificate, Config, FullAccess, HomeserverSide, Listener, ParticipantIdentity, RoomAlias, Service,
    Settings, Sources, TlsPolicy, listen, serve,
};
use axum::{
    body::{Body, Bytes},
    extract::Request,
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
};
use ruma_common::{ServerName, serde::Base64};
use ruma_federation_api::authentication::{XMatrix, XMatrixSigningInput};
use ruma_signatures::{Ed25519KeyPair, sign_json};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::support::{Client, FakeSfu, Homeserver, Names, Reply, Seen, settings};

const PATHS: [&str; 2] = [
    "/_matrix/federation/v1/rtc/livekit/get_token",
    "/_matrix/federation/unstable/io.element.msc4195/rtc/livekit/get_token",
];
const KEYS: &str = "/_matrix/key/v2/server";
const URL: &str = "ws://sfu.test:7880/path";

/// The seed of the examples in the Matrix specification.
const SEED: &str = "ed25519 1 YJDBA9Xnr2sVqXD9Vj7XVUnmFZcZrlw8Md7kMW+3XA1";
/// What is before a seed in PKCS#8.
pub(crate) const PKCS8: [u8; 16] = [48, 46, 2, 1, 0, 48, 5, 6, 3, 43, 101, 112, 4, 34, 4, 32];

/// A signing key with the version `version` and the seed `[byte; 32]`.
fn pair(version: &str, byte: u8) -> Ed25519KeyPair {
    Ed25519KeyPair::from_der(&[&PKCS8[..], &[byte; 32]].concat(), version.to_owned()).unwrap()
}

/// The document in which `server` publishes `pair`.
fn published(server: &str, pair: &Ed25519KeyPair, valid_until: u64) -> String {
    let key = Base64::<ruma_common::serde::base64::Standard, _>::new(pair.public_key()).encode();
    let document = json!({
        "server_name": server, "valid_until_ts": valid_until, "old_verify_keys": {},
        "verify_keys": { format!("ed25519:{}", pair.version()): { "key": key } },
    });
    let mut document = serde_json::from_value(document).unwrap();
    sign_json(server, pair, &mut document).unwrap();
    serde_json::to_string(&document).unwrap()
}

/// A homeserver that publishes a key.
async fn them(pair: fn() -> Ed25519KeyPair) -> Homeserver {
    Homeserver::start(move |seen| match seen.path.as_str() {
        KEYS => published(&seen.host, &pair(), 4_000_000_000_000).into_response(),
        _ => StatusCode::NOT_FOUND.into_response(),
    })
    .await
}

/// Our homeserver, which tells its application service that `members` are in `!room:hs`.
async fn us(members: impl Fn() -> Vec<String> + Send + Sync + 'static) -> Homeserver {
    Homeserver::start(move |seen| {
        let token = seen.headers.get(header::AUTHORIZATION).and_then(|v| v.to_str().ok());
        if token != Some("Bearer as-token") {
            return (StatusCode::UNAUTHORIZED, json!({ "errcode": "M_UNKNOWN_TOKEN" }).to_string())
                .into_response();
        }
        if seen.path != "/_matrix/client/v3/rooms/!room:hs/joined_members" {
            return (StatusCode::FORBIDDEN, json!({ "errcode": "M_FORBIDDEN" }).to_string()).into_response();
        }
        let joined: serde_json::Map<_, _> = members().into_iter().map(|id| (id, json!({}))).collect();
        json!({ "joined": joined }).to_string().into_response()
    })
    .await
}

fn side(homeserver: &Homeserver) -> Settings {
    let mut settings = settings();
    let url = format!("https://{}", homeserver.name()).parse().unwrap();
    let mut side = HomeserverSide::new(homeserver.name().parse().unwrap(), url);
    side.application_service_token = Some("as-token".into());
    settings.homeserver = Some(side);
    // It does not matter here: the room is made for whoever is in the Matrix room.
    settings.full_access = FullAccess::Only([].into());
    settings
}

fn body(user_id: &str) -> Value {
    json!({
        "user_id": user_id, "url": URL, "room_id": "!room:hs", "slot_id": "m.call#ROOM", "member_id": "m1",
    })
}

pub(crate) fn sign(
    pair: &Ed25519KeyPair,
    origin: &str,
    destination: &str,
    path: &str,
    body: &Value,
) -> String {
    let request = Request::post(path).body(Bytes::from(body.to_string())).unwrap();
    let name = |name| ServerName::parse(name).unwrap();
    let input = XMatrixSigningInput::new(name(origin), name(destination), pair);
    XMatrix::sign_http_request(&request, input).unwrap().to_string()
}

pub(crate) async fn send(client: &Client, path: &str, authorization: &str, body: &Value) -> Reply {
    let mut request = Request::post(path);
    if !authorization.is_empty() {
        request = request.header(header::AUTHORIZATION, authorization);
    }
    client.request(request.body(Body::from(body.to_string())).unwrap()).await
}

#[tokio::test]
async fn a_signed_request_for_a_member_gets_a_token_to_subscribe_with() {
    let them = them(|| pair("a", 1)).await;
    let bob = format!("@bob:{}", them.name());
    let us = us({
        let bob = bob.clone();
        move || vec!["@alice:hs".to_owned(), bob.clone()]
    })
    .await;
    let client = Client::new(side(&us));
    let alias = RoomAlias::of_slot("!room:hs", "m.call#ROOM");
    for path in PATHS {
        let authorization = sign(&pair("a", 1), &them.name(), &us.name(), path, &body(&bob));
        let reply = send(&client, path, &authorization, &body(&bob)).await;
        let claims = reply.claims();
        assert_eq!(claims["sub"], ParticipantIdentity::of_membership(&bob, "m1").as_str());
        assert_eq!(
            claims["video"],
            json!({
                "roomJoin": true, "room": alias.as_str(),
                "canPublish": false, "canPublishData": false, "canSubscribe": true,
            })
        );
        assert_eq!(reply.json().as_object().unwrap().len(), 1);
        assert_eq!(reply.headers["content-type"], "application/json");
        assert!(!reply.headers.contains_key("access-control-allow-origin"), "not for web pages");
    }
    assert_eq!(client.sfu.rooms(), [alias.as_str(), alias.as_str()]);
    assert_eq!(them.seen().len(), 1, "the keys are remembered");
    assert_eq!(us.seen().len(), 2, "membership is not");
}

#[tokio::test]
async fn what_is_not_signed_by_the_origin_for_us_is_unauthorized() {
    let them = them(|| pair("a", 1)).await;
    let bob = format!("@bob:{}", them.name());
    let us = us({
        let bob = bob.clone();
        move || vec![bob.clone()]
    })
    .await;
    let client = Client::new(side(&us));
    let (good, path, origin, ours) = (body(&bob), PATHS[0], them.name(), us.name());
    let mut other_member = good.clone();
    other_member["member_id"] = json!("m2");
    let signed = |body: &Value| sign(&pair("a", 1), &origin, &ours, path, body);
    let flipped = {
        let header = signed(&good);
        let (head, signature) = header.rsplit_once("sig=").unwrap();
        let first = signature.trim_start_matches('"').chars().next().unwrap();
        let other = if first == 'A' { 'B' } else { 'A' };
        format!("{head}sig={}", signature.replacen(first, &other.to_string(), 1))
    };
    for (what, authorization) in [
        ("nothing", String::new()),
        ("an access token", "Bearer as-token".to_owned()),
        ("no parameters", "X-Matrix".to_owned()),
        ("another content", signed(&other_member)),
        ("another path", sign(&pair("a", 1), &origin, &ours, PATHS[1], &good)),
        ("another destination", sign(&pair("a", 1), &origin, "other.org", path, &good)),
        ("another key", sign(&pair("a", 2), &origin, &ours, path, &good)),
        ("a key that is not published", sign(&pair("b", 1), &origin, &ours, path, &good)),
        ("another signature", flipped),
        ("in our name", sign(&pair("a", 1), &ours, &ours, path, &good)),
        ("a header of a megabyte", format!("{},x=\"{}\"", signed(&good), "a".repeat(1 << 20))),
    ] {
        let reply = send(&client, path, &authorization, &good).await;
        assert_eq!(reply.refusal(), (401, "M_UNAUTHORIZED".into()), "{what}");
    }
    let reply = send(&client, &format!("{path}?a=b"), &signed(&good), &good).await;
    assert_eq!(reply.refusal(), (401, "M_UNAUTHORIZED".into()), "a query is part of what is signed");
    assert_eq!(us.seen().len(), 0);
    assert_eq!(them.seen().len(), 1, "asked once, not for every unknown key");
    assert_eq!(client.sfu.rooms(), [] as [String; 0]);
    send(&client, path, &signed(&good), &good).await.claims();
}

#[tokio::test]
async fn keys_that_cannot_be_believed_are_not() {
    type Answer = fn(&Seen) -> Response;
    let cases: [(&str, Answer); 7] = [
        ("none", |_| StatusCode::NOT_FOUND.into_response()),
        ("no JSON", |_| "<html>".into_response()),
        ("too long", |_| " ".repeat(70_000).into_response()),
        ("expired", |seen| published(&seen.host, &pair("a", 1), 1_000_000_000_000).into_response()),
        ("another server's", |_| published("other.org", &pair("a", 1), 4_000_000_000_000).into_response()),
        ("signed by another key", |seen| {
            let document = published(&seen.host, &pair("a", 1), 4_000_000_000_000);
            let forged: Value =
                serde_json::from_str(&published(&seen.host, &pair("a", 2), 4_000_000_000_000)).unwrap();
            let mut document: Value = serde_json::from_str(&document).unwrap();
            document["signatures"] = forged["signatures"].clone();
            document.to_string().into_response()
        }),
        ("a redirect", |_| (StatusCode::FOUND, [(header::LOCATION, "/elsewhere")]).into_response()),
    ];
    for (what, answer) in cases {
        let them = Homeserver::start(answer).await;
        let bob = format!("@bob:{}", them.name());
        let us = us({
            let bob = bob.clone();
            move || vec![bob.clone()]
        })
        .await;
        let client = Client::new(side(&us));
        let authorization = sign(&pair("a", 1), &them.name(), &us.name(), PATHS[0], &body(&bob));
        for _ in 0..2 {
            let reply = send(&client, PATHS[0], &authorization, &body(&bob)).await;
            assert_eq!(reply.refusal(), (401, "M_UNAUTHORIZED".into()), "{what}");
        }
        assert_eq!(them.seen().len(), 1, "{what}: not asked again at once");
        assert_eq!(us.seen().len(), 0, "{what}");
    }
}

#[tokio::test]
async fn a_server_that_is_not_admitted_is_not_asked_for_its_keys() {
    let them = them(|| pair("a", 1)).await;
    let bob = format!("@bob:{}", them.name());
    let us = us({
        let bob = bob.clone();
        move || vec![bob.clone()]
    })
    .await;
    let mut settings = side(&us);
    settings.allowed_homeservers = Some(["elsewhere.example".to_owned()].into());
    let client = Client::new(settings);
    let authorization = sign(&pair("a", 1), &them.name(), &us.name(), PATHS[0], &body(&bob));
    let reply = send(&client, PATHS[0], &authorization, &body(&bob)).await;
    assert_eq!(reply.refusal(), (403, "M_FORBIDDEN".to_owned()));
    assert_eq!((them.seen().len(), us.seen().len()), (0, 0));
}

#[tokio::test]
async fn a_server_on_a_private_address_is_not_asked_for_its_keys() {
    let them = them(|| pair("a", 1)).await;
    let us = us(Vec::new).await;
    let mut settings = side(&us);
    settings.insecure_skip_verify_tls = TlsPolicy::Verify;
    let client = Client::new(settings);
    let bob = format!("@bob:{}", them.name());
    let authorization = sign(&pair("a", 1), &them.name(), &us.name(), PATHS[0], &body(&bob));
    let reply = send(&client, PATHS[0], &authorization, &body(&bob)).await;
    assert_eq!(reply.refusal(), (401, "M_UNAUTHORIZED".into()));
    assert_eq!(them.connections(), 0);
}

#[tokio::test]
async fn many_at_once_ask_for_the_keys_once() {
    let asked = Arc::new(AtomicUsize::new(0));
    let them = Homeserver::start({
        let asked = asked.clone();
        move |seen| {
            asked.fetch_add(1, Ordering::SeqCst);
            published(&seen.host, &pair("a", 1), 4_000_000_000_000).into_response()
        }
    })
    .await;
    let bob = format!("@bob:{}", them.name());
    let us = us({
        let bob = bob.clone();
        move || vec![bob.clone()]
    })
    .await;
    let client = Arc::new(Client::new(side(&us)));
    let authorization = sign(&pair("a", 1), &them.name(), &us.name(), PATHS[0], &body(&bob));
    let mut requests = JoinSet::new();
    for _ in 0..20 {
        let (client, authorization, body) = (client.clone(), authorization.clone(), body(&bob));
        requests.spawn(async move { send(&client, PATHS[0], &authorization, &body).await.status });
    }
    assert!(requests.join_all().await.into_iter().all(|status| status == 200));
    assert_eq!(asked.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn a_verified_server_gets_tokens_for_its_own_members_and_our_own_sfu_alone() {
    let them = them(|| pair("a", 1)).await;
    let bob = format!("@bob:{}", them.name());
    let us = us({
        let bob = bob.clone();
        move || vec!["@alice:hs".to_owned(), bob.clone()]
    })
    .await;
    let client = Client::new(side(&us));
    let changed = |member: &str, value: Value| {
        let mut body = body(&bob);
        body[member] = value;
        body
    };
    for (body, expected) in [
        (changed("user_id", json!("@alice:hs")), (403, "M_FORBIDDEN")),
        (changed("user_id", json!(format!("@eve:{}", them.name()))), (403, "M_FORBIDDEN")),
        (changed("room_id", json!("!unknown:hs")), (403, "M_FORBIDDEN")),
        (changed("url", json!("wss://other.org")), (400, "M_INVALID_PARAM")),
        (changed("user_id", json!("bob")), (400, "M_INVALID_PARAM")),
        (changed("user_id", json!(null)), (400, "M_MISSING_PARAM")),
        (changed("slot_id", json!("")), (400, "M_MISSING_PARAM")),
        (changed("member_id", json!(1)), (400, "M_BAD_JSON")),
        (json!([]), (400, "M_BAD_JSON")),
    ] {
        let authorization = sign(&pair("a", 1), &them.name(), &us.name(), PATHS[0], &body);
        let reply = send(&client, PATHS[0], &authorization, &body).await;
        assert_eq!(reply.refusal(), (expected.0, expected.1.to_owned()), "{body}");
    }
    assert_eq!(client.sfu.rooms(), [] as [String; 0]);

    let mut unknown = side(&us);
    unknown.homeserver.as_mut().unwrap().application_service_token = Some("old-token".into());
    let authorization = sign(&pair("a", 1), &them.name(), &us.name(), PATHS[0], &body(&bob));
    let reply = send(&Client::new(unknown), PATHS[0], &authorization, &body(&bob)).await;
    assert_eq!(
        reply.refusal(),
        (502, "M_UNKNOWN".into()),
        "our own set-up is at fault, not the other server"
    );
}

/// A listener on loopback with a certificate that nobody has signed but itself.
pub(crate) async fn tls_listener() -> Listener {
    let directory = tempfile::tempdir().unwrap();
    let (chain, key) = (directory.path().join("chain.pem"), directory.path().join("key.pem"));
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned(), "127.0.0.1".to_owned()]).unwrap();
    fs::write(&chain, made.cert.pem()).unwrap();
    fs::write(&key, made.signing_key.serialize_pem()).unwrap();
    let toml = format!(
        "livekit_url = 'ws://x'\nkey = 'k'\nsecret = 's'\nfull_access_homeservers = '*'\n\
         tls_cert_file = '{}'\ntls_key_file = '{}'",
        chain.display(),
        key.display()
    );
    let sources = Sources::default().with_toml("x".as_ref(), &toml.into()).unwrap();
    let certificate = Certificate::load(Config::load(&sources).unwrap().tls.unwrap()).unwrap();
    listen(&Bind::loopback(0)).await.unwrap().with_certificate(certificate)
}

/// Alice's homeserver, at which she is in `!room:hs`, and which publishes the key of the specification.
fn alices(seen: &Seen) -> Response {
    let alice = format!("@alice:{}", seen.host);
    match seen.path.as_str() {
        KEYS => {
            let seed = Base64::<ruma_common::serde::base64::Standard>::parse(
                // The same bytes, without what is left over in the last letter.
                SEED.rsplit(' ').next().unwrap().replace("XA1", "XA0"),
            )
            .unwrap();
            let document = [&PKCS8[..], seed.as_bytes()].concat();
            let pair = Ed25519KeyPair::from_der(&document, "1".to_owned()).unwrap();
            published(&seen.host, &pair, 4_000_000_000_000).into_response()
        }
        "/_matrix/client/v3/account/whoami" => json!({ "user_id": alice }).to_string().into_response(),
        path if path.ends_with(&format!("/state/m.room.member/{alice}")) => {
            json!({ "membership": "join" }).to_string().into_response()
        }
        _ => StatusCode::NOT_FOUND.into_response(),
    }
}

async fn ask_as_alice(client: &Client, server_name: &str, change: impl FnOnce(&mut Value)) -> Reply {
    let mut body = json!({
        "server_name": server_name, "url": URL, "room_id": "!room:hs", "slot_id": "m.call#ROOM",
        "member": { "id": "m1", "claimed_device_id": "D" },
    });
    change(&mut body);
    let authorization = "Bearer alice".to_owned();
    send(client, "/_matrix/client/v1/rtc/livekit/get_token", &authorization, &body).await
}

fn alices_side(homeserver: &Homeserver) -> Settings {
    let mut settings = settings();
    settings.livekit_url = "wss://sfu.alices.org".to_owned();
    let url = format!("https://{}", homeserver.name()).parse().unwrap();
    let mut side = HomeserverSide::new(homeserver.name().parse().unwrap(), url);
    side.signing_key = Some(SEED.parse().unwrap());
    settings.homeserver = Some(side);
    settings
}

#[tokio::test]
async fn two_services_give_each_others_users_tokens() {
    let alices = Homeserver::start(alices).await;
    let alice = format!("@alice:{}", alices.name());
    let us = us({
        let alice = alice.clone();
        move || vec![alice.clone()]
    })
    .await;
    // The other service answers under its homeserver's name, as behind a reverse proxy.
    let listener = tls_listener().await;
    let name = listener.local_addr().unwrap().to_string();
    let mut settings = side(&us);
    settings.homeserver.as_mut().unwrap().name = name.parse().unwrap();
    let sfu = Arc::new(FakeSfu::default());
    let service = Service::with_resolver(settings, sfu.clone(), Arc::new(Names::default())).unwrap();
    let server = tokio::spawn(serve(listener, service.router(), std::future::pending()));

    let client = Client::new(alices_side(&alices));
    let reply = ask_as_alice(&client, &name, |_| {}).await;
    let claims = reply.claims();
    assert_eq!(claims["iss"], "devkey");
    assert_eq!(claims["sub"], ParticipantIdentity::of_member(&alice, "D", "m1").as_str());
    assert_eq!(claims["video"]["canPublish"], json!(false));
    assert_eq!(sfu.rooms(), [RoomAlias::of_slot("!room:hs", "m.call#ROOM").as_str()]);
    assert_eq!(client.sfu.rooms(), [] as [String; 0], "nothing is made here");

    let reply = ask_as_alice(&client, &name, |body| body["room_id"] = json!("!unknown:hs")).await;
    assert_eq!(reply.refusal(), (403, "M_FORBIDDEN".into()), "told on");
    let reply = ask_as_alice(&client, &name, |body| body["url"] = json!("wss://sfu.alices.org")).await;
    assert_eq!(reply.refusal(), (400, "M_INVALID_PARAM".into()), "told on");
    server.abort();
}

#[tokio::test]
async fn whatever_else_another_server_answers_is_a_bad_gateway() {
    type Answer = fn(&Seen) -> Response;
    let alices = Homeserver::start(alices).await;
    let cases: [(&str, Answer, usize); 5] = [
        ("not there", |_| StatusCode::NOT_FOUND.into_response(), 2),
        ("unauthorized", |_| StatusCode::UNAUTHORIZED.into_response(), 1),
        ("no token", |_| "{}".into_response(), 1),
        ("a token with a line break", |_| json!({ "jwt": "a\nb" }).to_string().into_response(), 1),
        ("too much", |_| json!({ "jwt": "a".repeat(200_000) }).to_string().into_response(), 1),
    ];
    for (what, answer, requests) in cases {
        let them = Homeserver::start(answer).await;
        let client = Client::new(alices_side(&alices));
        let reply = ask_as_alice(&client, &them.name(), |_| {}).await;
        assert_eq!(reply.refusal(), (502, "M_UNKNOWN".into()), "{what}");
        let seen = them.seen();
        assert_eq!(seen.len(), requests, "{what}");
        assert!(seen.iter().all(|seen| is_signed(&seen.headers)), "{what}");
        assert!(seen.iter().all(|seen| !seen.headers.values().any(|v| v == "Bearer alice")), "{what}");
    }
}

fn is_signed(headers: &HeaderMap) -> bool {
    headers[header::AUTHORIZATION].to_str().unwrap().starts_with("X-Matrix ")
}
