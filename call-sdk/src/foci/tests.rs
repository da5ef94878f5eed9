//! Token exchanges and delegation against an authorisation service in this process, and a scripted Matrix port.
#![allow(clippy::disallowed_methods, reason = "the services of the tests are tasks")]

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use axum::{
    extract::{Request, State},
    http::{StatusCode, header},
    response::{IntoResponse as _, Response},
};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use ruma_common::{OwnedRoomId, RoomId, owned_room_id, owned_user_id};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::TcpListener,
    sync::mpsc,
};

use super::*;
use crate::{
    machine::{membership::wire::MembershipMode, testing},
    matrix::{
        ApiVersion, DelayId, Delivery, Jwt, MatrixError, MatrixPort, MatrixReply, MatrixRequest,
        MatrixUpdate, OpenIdToken, OwnTrust, RequestError, RoomView, RtcTokenRequest, ToDeviceBatch,
        TrustPolicy,
    },
    member::{Device, MemberId, Slot},
    tls::{self, TlsOptions},
    transport::{LiveKitFocus, NamedBy},
};

const USER: &str = "@me:own.example";

/// A homeserver by script.
#[derive(Debug)]
struct Port {
    device: Device,
    room_id: OwnedRoomId,
    /// Answers to `RtcToken`, `DelegateLeave` and `Transports`; `Unsupported` when they run out.
    answers: Mutex<VecDeque<Result<MatrixReply, RequestError>>>,
    asked: Mutex<Vec<MatrixRequest>>,
    openid_tokens: AtomicU32,
}

impl Port {
    fn new(answers: impl IntoIterator<Item = Result<MatrixReply, RequestError>>) -> Self {
        Self {
            device: testing::device(USER, "DEV"),
            room_id: owned_room_id!("!room:own.example"),
            answers: Mutex::new(answers.into_iter().collect()),
            asked: Mutex::default(),
            openid_tokens: AtomicU32::new(0),
        }
    }

    fn rtc_tokens_asked(&self) -> Vec<RtcTokenRequest> {
        let asked = self.asked.lock().unwrap();
        let tokens = asked.iter().filter_map(|request| match request {
            MatrixRequest::RtcToken(token) => Some(token.clone()),
            _ => None,
        });
        tokens.collect()
    }
}

#[async_trait]
impl MatrixPort for Port {
    fn device(&self) -> &Device {
        &self.device
    }

    fn room_id(&self) -> &RoomId {
        &self.room_id
    }

    fn trust(&self) -> TrustPolicy {
        TrustPolicy::default()
    }

    async fn own_trust(&self) -> Result<OwnTrust, MatrixError> {
        Ok(OwnTrust::CrossSigned)
    }

    async fn room_view(&self) -> Result<RoomView, MatrixError> {
        Ok(RoomView::default())
    }

    async fn perform(&self, request: MatrixRequest, _timeout: Duration) -> Result<MatrixReply, RequestError> {
        let openid = request == MatrixRequest::OpenIdToken;
        self.asked.lock().unwrap().push(request);
        if openid {
            let n = self.openid_tokens.fetch_add(1, Ordering::Relaxed) + 1;
            return Ok(MatrixReply::OpenId(OpenIdToken {
                access_token: format!("openid-{n}"),
                token_type: "Bearer".to_owned(),
                matrix_server_name: "own.example".to_owned(),
                expires_in: 3600,
            }));
        }
        self.answers.lock().unwrap().pop_front().unwrap_or(Err(RequestError::Unsupported))
    }

    async fn send_to_device(&self, _batch: ToDeviceBatch, _outcomes: mpsc::Sender<(Device, Delivery)>) {}

    async fn updates(&self) -> mpsc::Receiver<MatrixUpdate> {
        mpsc::channel(1).1
    }
}

/// What the service does with a request.
enum Act {
    Answer(Response),
    /// Never answers.
    Hang,
}

/// An authorisation service by script.
#[derive(Clone, Default)]
struct Service(Arc<Mutex<ServiceState>>);

#[derive(Default)]
struct ServiceState {
    acts: HashMap<String, VecDeque<Act>>,
    asked: Vec<(String, Value)>,
}

impl Service {
    /// Starts it on loopback; returns its URL.
    async fn start(&self) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let router = self.router();
        tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        url
    }

    fn router(&self) -> axum::Router {
        axum::Router::new().fallback(Self::handle).with_state(self.clone())
    }

    async fn handle(State(service): State<Self>, request: Request) -> Response {
        let path = request.uri().path().to_owned();
        let body = axum::body::to_bytes(request.into_body(), 1 << 20).await.unwrap();
        let act = {
            let mut state = service.0.lock().unwrap();
            state.asked.push((path.clone(), serde_json::from_slice(&body).unwrap()));
            state.acts.get_mut(&path).and_then(VecDeque::pop_front)
        };
        match act {
            Some(Act::Answer(response)) => response,
            Some(Act::Hang) => std::future::pending().await,
            None => StatusCode::NOT_FOUND.into_response(),
        }
    }

    fn then(&self, path: &str, act: Act) -> &Self {
        self.0.lock().unwrap().acts.entry(path.to_owned()).or_default().push_back(act);
        self
    }

    fn answer(&self, path: &str, status: u16, body: Value) -> &Self {
        let status = StatusCode::from_u16(status).unwrap();
        self.then(path, Act::Answer((status, axum::Json(body)).into_response()))
    }

    fn token(&self, path: &str, identity: &str) -> &Self {
        self.answer(path, 200, json!({ "url": "wss://sfu.example/", "jwt": jwt(identity, json!({})) }))
    }

    fn asked(&self) -> Vec<(String, Value)> {
        self.0.lock().unwrap().asked.clone()
    }

    fn paths(&self) -> Vec<String> {
        self.asked().into_iter().map(|(path, _)| path).collect()
    }
}

/// A token for `identity` with more grants.
fn jwt(identity: &str, grants: Value) -> String {
    let mut video = json!({ "room": "H4SH", "roomJoin": true });
    video.as_object_mut().unwrap().extend(grants.as_object().unwrap().clone());
    let claims = json!({ "sub": identity, "iss": "key", "exp": 1_800_000_000.5, "video": video });
    format!("e30.{}.c2ln", URL_SAFE_NO_PAD.encode(claims.to_string()))
}

fn access(policy: ServicePolicy) -> Access {
    let mut access = Access::new(&tls::client_config(&TlsOptions::default()).unwrap(), policy).unwrap();
    access.timing.backoff = [Duration::ZERO; 3];
    access
}

fn focus(service: &str) -> LiveKitFocus {
    testing::focus(service)
}

fn with_sfu(service: &str) -> LiveKitFocus {
    LiveKitFocus { sfu: Some("wss://sfu.example".parse().unwrap()), ..focus(service) }
}

fn request(focus: LiveKitFocus, purpose: Purpose) -> AccessRequest {
    AccessRequest {
        focus,
        named_by: NamedBy::Homeserver,
        slot: Slot::room_call(),
        member_id: MemberId("uuid".to_owned()),
        purpose,
    }
}

fn by_member(request: AccessRequest) -> AccessRequest {
    AccessRequest { named_by: NamedBy::Members(vec![owned_user_id!("@m:other.example")]), ..request }
}

const COMPATIBLE: Purpose = Purpose::Publish(MembershipMode::Compatibility);
const WIDE: Purpose = Purpose::Publish(MembershipMode::Matrix2);
const MERGED: Purpose = Purpose::Publish(MembershipMode::Matrix2Merged);

#[track_caller]
fn attempts(result: Result<SfuAccess, FocusError>) -> Vec<(Endpoint, EndpointError)> {
    match result {
        Err(FocusError::NoToken { attempts, .. }) => {
            attempts.into_iter().map(|attempt| (attempt.endpoint, attempt.error)).collect()
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn compatibility_mode_publishes_through_sfu_get() {
    let service = Service::default();
    let url = service.token("/sfu/get", "@me:own.example:DEV").start().await;
    let port = Port::new([]);
    let got =
        access(ServicePolicy::default()).get(&port, &request(with_sfu(&url), COMPATIBLE)).await.unwrap();
    assert_eq!(got.sfu.as_str(), "wss://sfu.example");
    assert_eq!(got.url, "wss://sfu.example/");
    assert_eq!(got.identity.0, "@me:own.example:DEV");
    assert_eq!((got.room.as_deref(), got.may_publish, got.issued_by), (Some("H4SH"), true, Endpoint::SfuGet));
    let openid = json!({
        "access_token": "openid-1", "token_type": "Bearer", "matrix_server_name": "own.example", "expires_in": 3600,
    });
    let body = json!({ "room": "!room:own.example", "openid_token": openid, "device_id": "DEV" });
    assert_eq!(service.asked(), [("/sfu/get".to_owned(), body)]);
    assert!(port.rtc_tokens_asked().is_empty());
}

#[tokio::test]
async fn sticky_mode_publishes_through_get_token() {
    let service = Service::default();
    let url = service.token("/get_token", "hash").start().await;
    let got =
        access(ServicePolicy::default()).get(&Port::new([]), &request(with_sfu(&url), WIDE)).await.unwrap();
    assert_eq!(got.issued_by, Endpoint::GetToken);
    let (path, body) = service.asked().remove(0);
    assert_eq!((path.as_str(), body.as_object().unwrap().len()), ("/get_token", 4));
    assert_eq!(body["room_id"], "!room:own.example");
    assert_eq!(body["slot_id"], "m.call#ROOM");
    let member = json!({ "id": "uuid", "claimed_user_id": USER, "claimed_device_id": "DEV" });
    assert_eq!(body["member"], member);
}

#[tokio::test]
async fn merged_mode_publishes_through_the_homeserver() {
    let jwt = Jwt(jwt("h2", json!({ "canPublish": true })));
    let port = Port::new([Err(RequestError::Unsupported), Ok(MatrixReply::Jwt(jwt.clone()))]);
    let access = access(ServicePolicy::default());
    let got = access.get(&port, &request(with_sfu("https://jwt.example"), MERGED)).await.unwrap();
    assert_eq!((&got.jwt, got.url.as_str()), (&jwt, "wss://sfu.example"));
    assert_eq!(got.issued_by, Endpoint::Homeserver(ApiVersion::Unstable));
    let asked: Vec<_> =
        port.rtc_tokens_asked().into_iter().map(|token| (token.version, token.server)).collect();
    assert_eq!(asked, [(ApiVersion::Stable, None), (ApiVersion::Unstable, None)]);
    // The missing endpoint is not asked again.
    port.answers.lock().unwrap().push_back(Ok(MatrixReply::Jwt(jwt)));
    access.get(&port, &request(with_sfu("https://jwt.example"), MERGED)).await.unwrap();
    assert_eq!(port.rtc_tokens_asked().last().unwrap().version, ApiVersion::Unstable);
    assert_eq!(port.rtc_tokens_asked().len(), 3);
}

#[tokio::test]
async fn subscriber_asks_homeserver_then_service() {
    let service = Service::default();
    let url = service.token("/sfu/get", "@me:own.example:DEV").start().await;
    let port = Port::new([]);
    let request = by_member(request(with_sfu(&url), Purpose::Subscribe));
    let got = access(ServicePolicy::default()).get(&port, &request).await.unwrap();
    assert_eq!(got.issued_by, Endpoint::SfuGet);
    assert_eq!(service.paths(), ["/get_token", "/sfu/get"]);
    let servers: Vec<_> =
        port.rtc_tokens_asked().into_iter().map(|token| token.server.unwrap().to_string()).collect();
    assert_eq!(servers, ["other.example", "other.example"]);
}

#[tokio::test]
async fn every_exchange_takes_a_fresh_openid_token() {
    let service = Service::default();
    let url = service.token("/sfu/get", "a").start().await;
    let port = Port::new([]);
    access(ServicePolicy::default()).get(&port, &request(focus(&url), Purpose::Subscribe)).await.unwrap();
    let tokens: Vec<_> =
        service.asked().iter().map(|(_, body)| body["openid_token"]["access_token"].clone()).collect();
    assert_eq!(tokens, ["openid-1", "openid-2"]);
}

#[tokio::test]
async fn passing_failures_of_the_service_are_retried() {
    let service = Service::default();
    let busy = (StatusCode::TOO_MANY_REQUESTS, [(header::RETRY_AFTER, "0")], "").into_response();
    service
        .answer("/sfu/get", 502, json!({}))
        .then("/sfu/get", Act::Answer(busy))
        .answer("/sfu/get", 403, json!({ "errcode": "M_FORBIDDEN", "error": "not joined" }))
        .token("/sfu/get", "a");
    let url = service.start().await;
    access(ServicePolicy::default()).get(&Port::new([]), &request(focus(&url), COMPATIBLE)).await.unwrap();
    assert_eq!(service.asked().len(), 4);
}

#[tokio::test]
async fn failed_openid_check_names_the_cause() {
    let service = Service::default();
    service.answer("/sfu/get", 401, json!({ "errcode": "M_UNAUTHORIZED", "error": "no" }));
    let url = service.start().await;
    let error = access(ServicePolicy::default())
        .get(&Port::new([]), &request(focus(&url), COMPATIBLE))
        .await
        .unwrap_err();
    let text = error.to_string();
    assert!(text.contains(&format!("{url} (/sfu/get: it refused (401 M_UNAUTHORIZED): no")), "{text}");
    assert!(text.contains("should check that it reaches the homeserver"), "{text}");
}

#[tokio::test]
async fn unreachable_service_names_the_cause() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let got = access(ServicePolicy::default()).get(&Port::new([]), &request(focus(&url), COMPATIBLE)).await;
    let [(Endpoint::SfuGet, EndpointError::Unavailable { cause })] = &attempts(got)[..] else { panic!() };
    assert!(cause.contains("refused"), "{cause}");
}

#[tokio::test]
async fn redirect_is_not_followed() {
    let service = Service::default();
    let redirect = (StatusCode::TEMPORARY_REDIRECT, [(header::LOCATION, "/elsewhere")], "").into_response();
    let url = service.then("/sfu/get", Act::Answer(redirect)).token("/elsewhere", "a").start().await;
    let got = access(ServicePolicy::default()).get(&Port::new([]), &request(focus(&url), COMPATIBLE)).await;
    assert_eq!(attempts(got), [(Endpoint::SfuGet, EndpointError::Redirected { status: 307 })]);
    assert_eq!(service.paths(), ["/sfu/get"]);
}

#[tokio::test]
async fn unusable_answers_are_named() {
    let good = jwt("a", json!({}));
    let body = |jwt: &str| json!({ "url": "wss://sfu.example", "jwt": jwt });
    let payload = |claims: Value| format!("e30.{}.c2ln", URL_SAFE_NO_PAD.encode(claims.to_string()));
    for (body, expected) in [
        (json!({ "url": "wss://sfu.example" }), Malformed::Json),
        (json!([]), Malformed::Json),
        (json!({ "url": "ftp://sfu.example", "jwt": good }), Malformed::SfuUrl),
        (json!({ "url": "wss://u:p@sfu.example", "jwt": good }), Malformed::SfuUrl),
        (body("nonsense"), Malformed::Token),
        (body("a.b.c"), Malformed::Token),
        (body(&payload(json!({ "video": {} }))), Malformed::Token),
        (body(&payload(json!({ "sub": "" }))), Malformed::Token),
        (body(&"x".repeat(70_000)), Malformed::TooLong),
    ] {
        let service = Service::default();
        let url = service.answer("/sfu/get", 200, body.clone()).start().await;
        let got =
            access(ServicePolicy::default()).get(&Port::new([]), &request(focus(&url), COMPATIBLE)).await;
        assert_eq!(attempts(got), [(Endpoint::SfuGet, EndpointError::Malformed(expected))], "{body}");
    }
}

#[tokio::test]
async fn null_grants_read_as_absent() {
    let service = Service::default();
    let claims = json!({ "sub": "a", "nbf": null, "video": null });
    let jwt = format!("e30.{}.c2ln", URL_SAFE_NO_PAD.encode(claims.to_string()));
    let url =
        service.answer("/sfu/get", 200, json!({ "url": "wss://sfu.example", "jwt": jwt })).start().await;
    let got = access(ServicePolicy::default())
        .get(&Port::new([]), &request(focus(&url), COMPATIBLE))
        .await
        .unwrap();
    assert_eq!((got.room, got.may_publish), (None, true));
}

/// Reads one request, writes `head`, then `more` again and again; without `more` it stalls.
async fn talk(mut stream: impl AsyncRead + AsyncWrite + Unpin, head: &str, more: Option<&[u8]>) {
    let mut buffer = vec![0; 16 * 1024];
    if stream.read(&mut buffer).await.is_err() || stream.write_all(head.as_bytes()).await.is_err() {
        return;
    }
    loop {
        match more {
            Some(more) if stream.write_all(more).await.is_err() => return,
            Some(_) => {}
            None => std::future::pending().await,
        }
    }
}

async fn raw_service(head: &'static str, more: Option<&'static [u8]>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(talk(stream, head, more));
        }
    });
    url
}

#[tokio::test]
async fn endless_answer_is_cut() {
    let url = raw_service("HTTP/1.1 200 OK\r\n\r\n", Some(&[b' '; 1024])).await;
    let got = access(ServicePolicy::default()).get(&Port::new([]), &request(focus(&url), COMPATIBLE)).await;
    assert_eq!(attempts(got), [(Endpoint::SfuGet, EndpointError::Malformed(Malformed::TooLong))]);
}

#[tokio::test]
async fn silent_and_stalling_services_time_out() {
    let silent = Service::default();
    for _ in 0..4 {
        silent.then("/sfu/get", Act::Hang);
    }
    let stalling = raw_service("HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{", None).await;
    for url in [silent.start().await, stalling] {
        let mut access = access(ServicePolicy::default());
        access.timing.request = Duration::from_millis(50);
        let got = access.get(&Port::new([]), &request(focus(&url), COMPATIBLE)).await;
        let timed_out = EndpointError::TimedOut(Duration::from_millis(50));
        assert_eq!(attempts(got), [(Endpoint::SfuGet, timed_out)]);
    }
}

#[tokio::test]
async fn exchange_ends_at_its_deadline() {
    let service = Service::default();
    let url = service.then("/sfu/get", Act::Hang).start().await;
    let mut access = access(ServicePolicy::default());
    access.timing.exchange = Duration::from_millis(50);
    let got = access.get(&Port::new([]), &request(focus(&url), COMPATIBLE)).await;
    assert_eq!(attempts(got).len(), 1);
    assert_eq!(service.asked().len(), 1);
}

#[tokio::test]
async fn service_on_plain_http_gets_no_token() {
    let port = Port::new([]);
    let request = by_member(request(focus("http://jwt.other.example"), Purpose::Subscribe));
    let got = access(ServicePolicy::default()).get(&port, &request).await;
    let [(Endpoint::GetToken, EndpointError::Policy(refusal))] = &attempts(got)[..] else { panic!() };
    assert_eq!(refusal.reason, RefusalReason::NotEncrypted);
    assert!(port.asked.lock().unwrap().is_empty());
}

#[tokio::test]
async fn service_at_private_address_gets_no_request() {
    let service = Service::default();
    let url = service.token("/get_token", "a").start().await;
    let port = Port::new([]);
    let access = access(ServicePolicy::public_only());
    let ours = request(focus(&url), Purpose::Subscribe);
    let got = access.get(&port, &by_member(ours.clone())).await;
    let [(Endpoint::GetToken, EndpointError::Policy(refusal))] = &attempts(got)[..] else { panic!() };
    assert_eq!(refusal.reason, RefusalReason::PrivateAddress);
    assert!(service.asked().is_empty() && port.asked.lock().unwrap().is_empty());
    // Our own homeserver may name it all the same.
    access.get(&port, &ours).await.unwrap();
}

#[tokio::test]
async fn sfu_at_private_address_is_refused_under_public_only() {
    let sfu: LiveKitFocus = LiveKitFocus::of_sfu("wss://10.0.0.1".parse().unwrap());
    let token = || Ok(MatrixReply::Jwt(Jwt(jwt("a", json!({})))));
    let ours = request(sfu, Purpose::Subscribe);
    let access = access(ServicePolicy::public_only());
    let got = access.get(&Port::new([token()]), &by_member(ours.clone())).await;
    assert!(matches!(&attempts(got)[..], [(_, EndpointError::Policy(_))]));
    let got = access.get(&Port::new([token()]), &ours).await.unwrap();
    assert_eq!(got.addresses, AddressRule::Any);
}

#[tokio::test]
async fn one_service_more_than_the_limit_gets_no_token() {
    let policy = ServicePolicy { max_services: 1, ..ServicePolicy::default() };
    let access = access(policy);
    let (first, second) = (Service::default(), Service::default());
    let first = first.token("/get_token", "a").token("/get_token", "a").start().await;
    let second_url = second.token("/get_token", "a").start().await;
    let port = Port::new([]);
    let of = |url: &str| by_member(request(focus(url), Purpose::Subscribe));
    access.get(&port, &of(&first)).await.unwrap();
    let got = access.get(&port, &of(&second_url)).await;
    let [(_, EndpointError::Policy(refusal))] = &attempts(got)[..] else { panic!() };
    assert_eq!(refusal.reason, RefusalReason::TooMany { limit: 1 });
    assert!(second.asked().is_empty());
    access.get(&port, &of(&first)).await.unwrap();
}

#[tokio::test]
async fn publisher_gets_no_token_that_forbids_publishing() {
    let service = Service::default();
    let restricted = json!({ "url": "wss://sfu.example", "jwt": jwt("a", json!({ "canPublish": false })) });
    service.answer("/sfu/get", 200, restricted.clone()).answer("/get_token", 200, restricted);
    let url = service.start().await;
    let access = access(ServicePolicy::default());
    let got = access.get(&Port::new([]), &request(focus(&url), COMPATIBLE)).await;
    assert_eq!(attempts(got), [(Endpoint::SfuGet, EndpointError::SubscribeOnly)]);
    let got = access.get(&Port::new([]), &request(focus(&url), Purpose::Subscribe)).await.unwrap();
    assert!(!got.may_publish);
}

#[tokio::test]
async fn errors_say_whose_fault_it_is() {
    let attempt = |endpoint, error| Attempt { endpoint, error };
    let away = EndpointError::Unavailable { cause: "HTTP status 502".to_owned() };
    let missing = EndpointError::NotThere { status: 404 };
    let limited = EndpointError::RateLimited { retry_after: Some(Duration::from_secs(90)) };
    let openid = EndpointError::OpenId(RequestError::TimedOut);
    for (errors, fault) in [
        (vec![missing.clone(), missing.clone()], Fault::Refused),
        (vec![away.clone(), missing.clone()], Fault::Unreachable),
        (vec![missing.clone(), openid], Fault::Homeserver),
        (vec![missing, EndpointError::LoggedOut], Fault::LoggedOut),
        (vec![limited], Fault::Unreachable),
    ] {
        let attempts = errors.into_iter().map(|error| attempt(Endpoint::GetToken, error)).collect();
        let error = FocusError::NoToken { focus: focus("https://jwt.example"), attempts };
        assert_eq!(error.fault(), fault, "{error}");
        let wait = error.to_string().contains("limits how often").then_some(Duration::from_secs(90));
        assert_eq!(error.retry_after(), wait);
    }
}

#[tokio::test]
async fn discovery_asks_the_port_and_falls_through() {
    let port = Port::new([
        Ok(MatrixReply::Transports(Vec::new())),
        Ok(MatrixReply::Transports(vec![focus("https://jwt.example")])),
    ]);
    let found = discover(&port, &DiscoveryOptions::default(), &Default::default(), &[]).await.unwrap();
    assert_eq!(found.candidates[0].focus, focus("https://jwt.example"));
    assert_eq!(port.asked.lock().unwrap().len(), 2);
    let error =
        discover(&Port::new([]), &DiscoveryOptions::default(), &Default::default(), &[]).await.unwrap_err();
    assert_eq!(error.tried.len(), 4);
}

/// Delegates a leave as the publisher whose token `issued_by` issued.
async fn delegate(port: &Port, focus: LiveKitFocus, issued_by: Endpoint) -> Result<(), DelegationError> {
    let access = access(ServicePolicy::default());
    let granted = SfuAccess {
        request: request(focus, COMPATIBLE),
        sfu: "wss://sfu.example".parse().unwrap(),
        url: "wss://sfu.example".to_owned(),
        jwt: Jwt(String::new()),
        identity: crate::member::ParticipantIdentity("a".to_owned()),
        room: None,
        may_publish: true,
        issued_by,
        addresses: AddressRule::Any,
    };
    access.delegate(port, &granted, &DelayId("delay".to_owned()), Duration::from_hours(1)).await
}

#[tokio::test]
async fn leave_goes_to_the_generation_that_issued_the_token() {
    let service = Service::default();
    service.token("/sfu/get", "a").answer("/delegate_delayed_leave", 200, json!({}));
    let url = service.start().await;
    let port = Port::new([Ok(MatrixReply::Done)]);
    delegate(&port, with_sfu(&url), Endpoint::Homeserver(ApiVersion::Stable)).await.unwrap();
    assert!(service.asked().is_empty());
    let asked = port.asked.lock().unwrap().clone();
    assert!(matches!(&asked[..], [MatrixRequest::DelegateLeave { version: ApiVersion::Stable, .. }]));

    delegate(&port, focus(&url), Endpoint::GetToken).await.unwrap();
    delegate(&port, focus(&url), Endpoint::SfuGet).await.unwrap();
    assert_eq!(service.paths(), ["/delegate_delayed_leave", "/sfu/get"]);
    for (_, body) in service.asked() {
        assert_eq!((&body["delay_id"], &body["delay_timeout"]), (&json!("delay"), &json!(3_600_000)));
    }
}

#[tokio::test]
async fn service_without_delegation_endpoint_takes_the_leave_with_a_token_request() {
    let service = Service::default();
    let url = service.token("/get_token", "a").start().await;
    delegate(&Port::new([]), focus(&url), Endpoint::GetToken).await.unwrap();
    let (path, body) = service.asked().remove(1);
    assert_eq!((path.as_str(), &body["delay_id"]), ("/get_token", &json!("delay")));
}

#[tokio::test]
async fn delegation_errors_are_sorted() {
    for (status, errcode, expected) in [
        (400, "M_BAD_JSON", None),
        (400, "M_NOT_JSON", None),
        (403, "M_FORBIDDEN", None),
        (404, "", Some(RequestError::Unsupported)),
        (401, "M_UNAUTHORIZED", None),
        (503, "M_UNKNOWN", None),
        (
            429,
            "M_LIMIT_EXCEEDED",
            Some(RequestError::RateLimited { retry_after: Some(Duration::from_secs(7)) }),
        ),
    ] {
        let service = Service::default();
        let body = json!({ "errcode": errcode, "error": "", "retry_after_ms": 7000 });
        let url = service.answer("/sfu/get", status, body).start().await;
        let error = delegate(&Port::new([]), focus(&url), Endpoint::SfuGet).await.unwrap_err();
        let later = matches!(error, DelegationError::Later(_));
        assert_eq!(later, [401, 503, 429].contains(&status), "{error}");
        if let Some(expected) = expected {
            assert_eq!(RequestError::from(error), expected);
        }
    }
}

#[tokio::test]
async fn own_certificate_authority_is_trusted_when_named() {
    let (roots, server) = tls::testing::authority();
    let acceptor = tokio_rustls::TlsAcceptor::from(server);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://localhost:{}", listener.local_addr().unwrap().port());
    let body = json!({ "url": "wss://sfu.example", "jwt": jwt("a", json!({})) }).to_string();
    let answer =
        format!("HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            if let Ok(stream) = acceptor.accept(stream).await {
                let answer = answer.clone();
                tokio::spawn(async move { talk(stream, &answer, None).await });
            }
        }
    });

    let port = Port::new([]);
    let got = access(ServicePolicy::default()).get(&port, &request(focus(&url), COMPATIBLE)).await;
    let [(_, EndpointError::Unavailable { cause })] = &attempts(got)[..] else { panic!() };
    assert!(cause.contains("UnknownIssuer"), "{cause}");

    let options = TlsOptions { system_roots: false, extra_roots: vec![roots] };
    let tls = tls::client_config(&options).unwrap();
    let access = Access::new(&tls, ServicePolicy::default()).unwrap();
    access.get(&port, &request(focus(&url), COMPATIBLE)).await.unwrap();
}

#[tokio::test]
async fn secrets_are_wiped_and_do_not_print() {
    fn wiped<T: zeroize::ZeroizeOnDrop>() {}
    wiped::<Jwt>();
    wiped::<OpenIdToken>();
    let service = Service::default();
    service.token("/sfu/get", "a").answer("/sfu/get", 400, json!({ "errcode": "M_X" }));
    let url = service.start().await;
    let access = access(ServicePolicy::default());
    let got = access.get(&Port::new([]), &request(focus(&url), COMPATIBLE)).await.unwrap();
    let text = format!("{access:?} {got:?}");
    assert!(!text.contains(&got.jwt.0) && !text.contains("e30."), "{text}");
    let error = access.get(&Port::new([]), &request(focus(&url), COMPATIBLE)).await.unwrap_err();
    assert!(!format!("{error:?} {error}").contains("openid-"), "{error:?}");
}
