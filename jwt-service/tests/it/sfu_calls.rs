//! `CreateRoom` as a LiveKit server sees it: Twirp, protobuf, the right grant; and what becomes of its
//! failures.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use antiphon_jwt_service::{RoomAlias, Secret, Sfu as _, SfuError, SfuParticipant, SfuRoom, TwirpSfu};
use axum::{
    Router,
    body::Bytes,
    http::{HeaderMap, StatusCode, Uri, header},
    response::{IntoResponse, Response},
};
use jsonwebtoken::{Algorithm, DecodingKey, Validation};
use livekit_protocol::{
    CreateRoomRequest, ListParticipantsRequest, ListParticipantsResponse, ParticipantInfo, Room,
    RoomParticipantIdentity,
};
use prost::Message as _;
use serde_json::{Value, json};
use tokio::net::TcpListener;

use crate::support::Homeserver;

#[derive(Clone, Debug)]
struct Call {
    path: String,
    headers: HeaderMap,
    body: Bytes,
}

/// A LiveKit server that decodes no JSON, over plain HTTP.
struct LiveKit {
    url: String,
    calls: Arc<Mutex<Vec<Call>>>,
}

impl LiveKit {
    async fn start(answer: impl Fn() -> Response + Clone + Send + Sync + 'static) -> Self {
        Self::with_paths(move |_| answer()).await
    }

    /// One whose answer depends on the method, the last segment of the path.
    async fn with_paths(answer: impl Fn(&str) -> Response + Clone + Send + Sync + 'static) -> Self {
        let calls = Arc::new(Mutex::new(Vec::new()));
        let seen = calls.clone();
        let router = Router::new().fallback(move |uri: Uri, headers: HeaderMap, body: Bytes| {
            seen.lock().unwrap().push(Call { path: uri.path().to_owned(), headers, body });
            let answer = answer(uri.path().rsplit('/').next().unwrap());
            async move { answer }
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("ws://{}", listener.local_addr().unwrap());
        tokio::spawn(async move { axum::serve(listener, router).await });
        Self { url, calls }
    }

    async fn create(&self, path: &str) -> Result<SfuRoom, SfuError> {
        let sfu = TwirpSfu::new(&format!("{}{path}", self.url), "devkey", &Secret::new("devsecret")).unwrap();
        sfu.create_room(RoomAlias::of_slot("!r:hs", "s").as_str()).await
    }

    async fn participant(&self) -> Result<Option<SfuParticipant>, SfuError> {
        let sfu = TwirpSfu::new(&self.url, "devkey", &Secret::new("devsecret")).unwrap();
        sfu.participant("room", "identity").await
    }

    /// Asks for three at once.
    async fn participants(&self) -> Result<Vec<Option<SfuParticipant>>, SfuError> {
        let sfu = TwirpSfu::new(&self.url, "devkey", &Secret::new("devsecret")).unwrap();
        sfu.participants("room", &["a", "b", "c"]).await
    }

    /// How often each method was called.
    fn methods(&self) -> [usize; 2] {
        ["ListParticipants", "GetParticipant"]
            .map(|method| self.calls().iter().filter(|call| call.path.ends_with(method)).count())
    }

    fn calls(&self) -> Vec<Call> {
        self.calls.lock().unwrap().clone()
    }
}

fn room() -> Response {
    Room { sid: "RM_x".into(), creation_time: 1, ..Default::default() }.encode_to_vec().into_response()
}

#[tokio::test]
async fn the_request_is_what_livekit_takes() {
    let livekit = LiveKit::start(room).await;
    assert_eq!(livekit.create("").await.unwrap(), SfuRoom::new("RM_x"));
    let [call] = &livekit.calls()[..] else { panic!("one call") };
    assert_eq!(call.path, "/twirp/livekit.RoomService/CreateRoom");
    assert_eq!(call.headers["content-type"], "application/protobuf");
    assert_eq!(call.headers["accept"], "application/protobuf");
    let request = CreateRoomRequest::decode(call.body.clone()).unwrap();
    let expected = CreateRoomRequest {
        name: RoomAlias::of_slot("!r:hs", "s").as_str().to_owned(),
        empty_timeout: 300,
        departure_timeout: 20,
        max_participants: 0,
        ..Default::default()
    };
    assert_eq!(request, expected);

    let token = call.headers["authorization"].to_str().unwrap().strip_prefix("Bearer ").unwrap();
    let key = DecodingKey::from_secret(b"devsecret");
    let claims =
        jsonwebtoken::decode::<Value>(token, &key, &Validation::new(Algorithm::HS256)).unwrap().claims;
    let iat = claims["iat"].as_u64().unwrap();
    assert_eq!(
        claims,
        json!({
            "iss": "devkey", "iat": iat, "nbf": iat, "exp": iat + 6 * 3600, "video": { "roomCreate": true },
        })
    );
}

#[tokio::test]
async fn a_path_in_the_url_is_kept() {
    let livekit = LiveKit::start(room).await;
    livekit.create("/livekit/sfu").await.unwrap();
    livekit.create("/livekit/sfu/").await.unwrap();
    let paths: Vec<_> = livekit.calls().into_iter().map(|c| c.path).collect();
    assert_eq!(paths, ["/livekit/sfu/twirp/livekit.RoomService/CreateRoom"; 2]);
}

#[tokio::test]
async fn a_refusal_carries_its_code() {
    let livekit = LiveKit::start(|| {
        (StatusCode::UNAUTHORIZED, json!({ "code": "unauthenticated", "msg": "secret detail" }).to_string())
            .into_response()
    })
    .await;
    let error = livekit.create("").await.unwrap_err();
    assert!(
        matches!(&error, SfuError::Refused { status: 401, code } if code == "unauthenticated"),
        "{error:?}"
    );
    assert_eq!(livekit.calls().len(), 1, "a refusal is not retried");
}

#[tokio::test]
async fn members_who_come_at_once_ask_for_their_room_once() {
    let livekit = LiveKit::start(room).await;
    let sfu = Arc::new(TwirpSfu::new(&livekit.url, "devkey", &Secret::new("devsecret")).unwrap());
    let create = |room: &'static str| {
        let sfu = sfu.clone();
        async move { sfu.create_room(room).await }
    };
    let mut members = tokio::task::JoinSet::new();
    for _ in 0..50 {
        members.spawn(create("one"));
    }
    members.spawn(create("other"));
    for made in members.join_all().await {
        assert_eq!(made.unwrap(), SfuRoom::new("RM_x"));
    }
    let asked: Vec<_> =
        livekit.calls().into_iter().map(|c| CreateRoomRequest::decode(c.body).unwrap().name).collect();
    for name in ["one", "other"] {
        assert_eq!(asked.iter().filter(|asked| *asked == name).count(), 1, "{asked:?}");
    }
}

#[tokio::test]
async fn a_failure_is_nobody_elses() {
    let livekit = LiveKit::start(|| StatusCode::SERVICE_UNAVAILABLE.into_response()).await;
    let sfu = TwirpSfu::new(&livekit.url, "devkey", &Secret::new("devsecret")).unwrap();
    for asked in 1..=3 {
        assert!(matches!(sfu.create_room("room").await, Err(SfuError::Refused { status: 503, .. })));
        assert_eq!(livekit.calls().len(), asked);
    }
}

#[tokio::test]
async fn redirects_are_not_followed() {
    let livekit =
        LiveKit::start(|| (StatusCode::FOUND, [(header::LOCATION, "/elsewhere")]).into_response()).await;
    assert!(matches!(livekit.create("").await, Err(SfuError::Refused { status: 302, .. })));
    assert_eq!(livekit.calls().len(), 1);
}

#[tokio::test]
async fn an_answer_that_is_no_room_is_an_error() {
    for body in [vec![0xff; 10], vec![0; 100_000]] {
        let livekit = LiveKit::start(move || body.clone().into_response()).await;
        assert!(matches!(livekit.create("").await, Err(SfuError::NotARoom)));
    }
}

#[tokio::test]
async fn an_sfu_that_is_down_or_silent_is_an_error_in_bounded_time() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("ws://{}", listener.local_addr().unwrap());
    let sfu = TwirpSfu::new(&url, "k", &Secret::new("s")).unwrap().with_timeout(Duration::from_millis(300));
    assert!(matches!(sfu.create_room("a").await, Err(SfuError::TimedOut(_))));
    drop(listener);
    let sfu = TwirpSfu::new(&url, "k", &Secret::new("s")).unwrap();
    assert!(matches!(sfu.create_room("a").await, Err(SfuError::Unreachable(_))));
}

#[tokio::test(start_paused = true)]
async fn only_a_failed_connect_is_tried_again() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("ws://{}", listener.local_addr().unwrap());
    drop(listener);
    // On virtual time, only the pause before the second attempt takes any.
    let began = tokio::time::Instant::now();
    let sfu = TwirpSfu::new(&url, "k", &Secret::new("s")).unwrap();
    assert!(matches!(sfu.create_room("a").await, Err(SfuError::Unreachable(_))));
    assert!(began.elapsed() >= Duration::from_millis(100));

    let livekit = LiveKit::start(|| StatusCode::SERVICE_UNAVAILABLE.into_response()).await;
    assert!(matches!(livekit.create("").await, Err(SfuError::Refused { status: 503, .. })));
    assert_eq!(livekit.calls().len(), 1);
}

#[tokio::test]
async fn the_sfus_certificate_is_always_checked() {
    // Signed by nobody, as a homeserver's may be in development; no setting lets an SFU's pass.
    let pretender = Homeserver::start(|_| room()).await;
    let url = format!("wss://{}", pretender.name());
    let sfu = TwirpSfu::new(&url, "k", &Secret::new("s")).unwrap();
    assert!(matches!(sfu.create_room("a").await, Err(SfuError::Unreachable(_))));
    assert!(pretender.connections() > 0 && pretender.seen().is_empty());
}

#[tokio::test]
async fn a_participant_is_there_or_certainly_not_or_nobody_knows() {
    let livekit = LiveKit::start(|| {
        ParticipantInfo { sid: "PA_1".into(), ..Default::default() }.encode_to_vec().into_response()
    })
    .await;
    assert_eq!(livekit.participant().await.unwrap(), Some(SfuParticipant::new("PA_1")));
    let [call] = &livekit.calls()[..] else { panic!("one call") };
    assert_eq!(call.path, "/twirp/livekit.RoomService/GetParticipant");
    let request = RoomParticipantIdentity::decode(call.body.clone()).unwrap();
    assert_eq!((request.room.as_str(), request.identity.as_str()), ("room", "identity"));
    let token = call.headers["authorization"].to_str().unwrap().strip_prefix("Bearer ").unwrap();
    let key = DecodingKey::from_secret(b"devsecret");
    let claims =
        jsonwebtoken::decode::<Value>(token, &key, &Validation::new(Algorithm::HS256)).unwrap().claims;
    assert_eq!(claims["video"], json!({ "roomAdmin": true, "room": "room" }));

    let absent =
        || (StatusCode::NOT_FOUND, json!({ "code": "not_found", "msg": "gone" }).to_string()).into_response();
    assert_eq!(LiveKit::start(absent).await.participant().await.unwrap(), None);
    for status in [StatusCode::NOT_FOUND, StatusCode::UNAUTHORIZED, StatusCode::BAD_GATEWAY] {
        let livekit = LiveKit::start(move || (status, "<html>").into_response()).await;
        assert!(livekit.participant().await.is_err(), "{status} says nothing about the participant");
    }
}

fn someone(identity: &str) -> ParticipantInfo {
    ParticipantInfo { sid: format!("PA_{identity}"), identity: identity.to_owned(), ..Default::default() }
}

fn not_found() -> Response {
    (StatusCode::NOT_FOUND, json!({ "code": "not_found", "msg": "gone" }).to_string()).into_response()
}

#[tokio::test]
async fn several_participants_of_a_room_take_one_call() {
    let livekit = LiveKit::with_paths(|method| {
        assert_eq!(method, "ListParticipants");
        let participants = vec![someone("c"), someone("stranger"), someone("a")];
        ListParticipantsResponse { participants }.encode_to_vec().into_response()
    })
    .await;
    let found = livekit.participants().await.unwrap();
    let there = |sid: &str| Some(SfuParticipant::new(sid));
    assert_eq!(found, [there("PA_a"), None, there("PA_c")]);
    let [call] = &livekit.calls()[..] else { panic!("one call") };
    assert_eq!(ListParticipantsRequest::decode(call.body.clone()).unwrap().room, "room");
    let token = call.headers["authorization"].to_str().unwrap().strip_prefix("Bearer ").unwrap();
    let key = DecodingKey::from_secret(b"devsecret");
    let claims =
        jsonwebtoken::decode::<Value>(token, &key, &Validation::new(Algorithm::HS256)).unwrap().claims;
    assert_eq!(claims["video"], json!({ "roomAdmin": true, "room": "room" }));
}

#[tokio::test]
async fn an_sfu_without_lists_is_asked_for_each() {
    let single = |method: &str| match method {
        "GetParticipant" => someone("a").encode_to_vec().into_response(),
        _ => (StatusCode::NOT_FOUND, json!({ "code": "bad_route" }).to_string()).into_response(),
    };
    let livekit = LiveKit::with_paths(single).await;
    assert_eq!(livekit.participants().await.unwrap().iter().flatten().count(), 3);
    assert_eq!(livekit.methods(), [1, 3]);

    let broken = LiveKit::start(|| StatusCode::BAD_GATEWAY.into_response()).await;
    assert!(broken.participants().await.is_err(), "nobody is taken for absent");
}

#[tokio::test]
async fn an_empty_list_must_be_borne_out() {
    let empty = |method: &str| match method {
        "ListParticipants" => ().into_response(),
        _ => not_found(),
    };
    let livekit = LiveKit::with_paths(empty).await;
    assert_eq!(livekit.participants().await.unwrap(), [None, None, None]);
    assert_eq!(livekit.methods(), [1, 1]);

    // Something that answers everything with an empty body has no list.
    let livekit = LiveKit::start(|| ().into_response()).await;
    assert_eq!(livekit.participants().await.unwrap().iter().flatten().count(), 3);
    // And one that does not say leaves it open.
    let silent = |method: &str| match method {
        "ListParticipants" => ().into_response(),
        _ => StatusCode::BAD_GATEWAY.into_response(),
    };
    assert!(LiveKit::with_paths(silent).await.participants().await.is_err());
}

#[tokio::test]
async fn an_sfu_that_lets_us_in_is_ready_and_others_are_not() {
    let check = async |status: u16, body: &'static str| {
        let status = StatusCode::from_u16(status).unwrap();
        let livekit = LiveKit::start(move || (status, body).into_response()).await;
        let sfu = TwirpSfu::new(&livekit.url, "devkey", &Secret::new("devsecret")).unwrap();
        let checked = sfu.check().await.map_err(|error| error.to_string());
        let [call] = &livekit.calls()[..] else { panic!("one call") };
        assert_eq!(call.path, "/twirp/livekit.RoomService/GetParticipant");
        checked
    };
    for (status, body) in [(200, ""), (200, "<html>"), (404, r#"{"code":"not_found"}"#), (404, "")] {
        check(status, body).await.unwrap();
    }
    for (status, code) in [(401, "unauthenticated"), (403, "permission_denied"), (500, "internal"), (502, "")]
    {
        let error = check(status, code).await.unwrap_err();
        assert!(error.contains("the API key and secret here and there differ"), "{error}");
    }
    let gone = TwirpSfu::new("ws://127.0.0.1:9", "devkey", &Secret::new("devsecret")).unwrap();
    gone.check().await.unwrap_err();
}
