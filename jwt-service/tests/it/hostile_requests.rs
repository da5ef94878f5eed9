//! Requests that are oversized, endless, too many or nonsense: a bounded, clear refusal, never a server
//! error.

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use antiphon_jwt_service::{Service, listen, serve};
use axum::{body::Body, http::Method};
use bytes::Bytes;
use proptest::prelude::*;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};

use crate::support::{Client, DEADLINE, FakeSfu, Homeserver, get_token, settings, sfu_get};

#[tokio::test]
async fn bodies_beyond_the_limit_are_too_large() {
    let client = Client::new(settings());
    for path in ["/get_token", "/sfu/get"] {
        let declared = client.send(Method::POST, path, vec![b' '; 64 * 1024 + 1]).await;
        assert_eq!(declared.refusal(), (413, "M_TOO_LARGE".into()));
        let endless = std::iter::repeat(Bytes::from(vec![b' '; 1024]));
        let undeclared = client.send(Method::POST, path, Body::new(Chunks(endless))).await;
        assert_eq!(undeclared.refusal(), (413, "M_TOO_LARGE".into()));
        let just_fits = client.send(Method::POST, path, vec![b' '; 64 * 1024]).await;
        assert_eq!(just_fits.refusal(), (400, "M_NOT_JSON".into()));
    }
}

#[tokio::test]
async fn whoever_sends_too_much_has_sent_it_all_when_the_answer_comes() {
    let service = Service::new(settings(), Arc::new(FakeSfu::default())).unwrap();
    let listener = listen(&"127.0.0.1:0".parse().unwrap()).await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = tokio::spawn(serve(listener, service.router(), std::future::pending()));
    let mut stream = TcpStream::connect(address).await.unwrap();
    let body = vec![b' '; 1024 * 1024];
    let head = format!("POST /get_token HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n", body.len());
    // Twice: the connection is good for more.
    for _ in 0..2 {
        stream.write_all(head.as_bytes()).await.unwrap();
        stream.write_all(&body).await.unwrap();
        let mut answer = vec![0; 12];
        tokio::time::timeout(DEADLINE, stream.read_exact(&mut answer)).await.expect("in time").unwrap();
        assert_eq!(answer, b"HTTP/1.1 413");
        while !answer.ends_with(b"}\n") {
            answer.push(tokio::time::timeout(DEADLINE, stream.read_u8()).await.expect("in time").unwrap());
        }
    }
    server.abort();
}

#[tokio::test(start_paused = true)]
async fn a_body_that_does_not_arrive_is_not_waited_for() {
    let client = Client::new(settings());
    let reply = client.send(Method::POST, "/get_token", Body::new(Stalled)).await;
    assert_eq!(reply.refusal(), (408, "M_UNKNOWN".into()));
}

#[tokio::test]
async fn a_whole_object_in_an_unfinished_body_is_not_acted_on() {
    let homeserver = Homeserver::with_users(&[("good", "alice")]).await;
    let mut hasty = settings();
    hasty.limits.body_time = Duration::from_millis(100);
    let service = Service::new(hasty, Arc::new(FakeSfu::default())).unwrap();
    let listener = listen(&"127.0.0.1:0".parse().unwrap()).await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = tokio::spawn(serve(listener, service.router(), std::future::pending()));
    for (path, body) in [
        ("/get_token", get_token(&homeserver.name(), "good", "alice")),
        ("/sfu/get", sfu_get(&homeserver.name(), "good")),
    ] {
        let body = body.to_string();
        for (missing, ends, expected) in [
            (0, false, "HTTP/1.1 200"),
            // The object is there, and the rest never comes: neither the bytes nor the end of the connection ...
            (1, false, "HTTP/1.1 408"),
            // ... or the client says that it has no more.
            (1, true, "HTTP/1.1 400"),
        ] {
            let lookups = homeserver.lookups();
            let length = body.len() + missing;
            let request = format!(
                "POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}"
            );
            let mut stream = TcpStream::connect(address).await.unwrap();
            stream.write_all(request.as_bytes()).await.unwrap();
            if ends {
                stream.shutdown().await.unwrap();
            }
            let mut answer = String::new();
            let read = tokio::time::timeout(DEADLINE, stream.read_to_string(&mut answer)).await;
            read.expect("answered in time").unwrap();
            assert!(answer.starts_with(expected), "{path} {missing} {ends}: {answer:?}");
            let asked = homeserver.lookups() - lookups;
            assert_eq!(asked, usize::from(missing == 0), "{path} {missing} {ends}");
        }
    }
    server.abort();
}

#[tokio::test(start_paused = true)]
async fn a_client_that_never_finishes_its_headers_is_hung_up_on() {
    let service = Service::new(settings(), Arc::new(FakeSfu::default())).unwrap();
    let listener = listen(&"127.0.0.1:0".parse().unwrap()).await.unwrap();
    let mut slow = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let server = tokio::spawn(serve(listener, service.router(), std::future::pending()));
    slow.write_all(b"POST /get_token HTTP/1.1\r\nHost: x\r\nX-Slow: ").await.unwrap();
    let mut answer = Vec::new();
    slow.read_to_end(&mut answer).await.unwrap();
    assert!(!answer.starts_with(b"HTTP/1.1 2"), "{answer:?}");
    server.abort();
}

#[tokio::test(start_paused = true)]
async fn a_client_that_says_nothing_is_hung_up_on() {
    let service = Service::new(settings(), Arc::new(FakeSfu::default())).unwrap();
    let listener = listen(&"127.0.0.1:0".parse().unwrap()).await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = tokio::spawn(serve(listener, service.router(), std::future::pending()));
    let mut answer = Vec::new();
    // From the beginning, and after an answered request.
    let mut silent = TcpStream::connect(address).await.unwrap();
    silent.read_to_end(&mut answer).await.unwrap();
    assert!(!answer.starts_with(b"HTTP/1.1 2"), "{answer:?}");
    let mut idle = TcpStream::connect(address).await.unwrap();
    idle.write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    answer.clear();
    idle.read_to_end(&mut answer).await.unwrap();
    assert!(answer.starts_with(b"HTTP/1.1 200"), "{answer:?}");
    server.abort();
}

#[tokio::test]
async fn requests_beyond_the_limit_are_told_to_come_back() {
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let name = silent.local_addr().unwrap().to_string();
    let mut small = settings();
    small.limits.in_flight = 2;
    small.limits.lookup = Duration::from_secs(20);
    let client = Arc::new(Client::new(small));
    let (mut stuck, mut held) = (JoinSet::new(), Vec::new());
    for _ in 0..2 {
        let (client, name) = (client.clone(), name.clone());
        stuck.spawn(async move { client.post("/sfu/get", sfu_get(&name, "token")).await });
        // The request has its place once its lookup connects.
        held.push(silent.accept().await.unwrap());
    }
    let reply = client.post("/get_token", "{}").await;
    assert_eq!(reply.refusal(), (429, "M_LIMIT_EXCEEDED".into()));
    assert!(reply.headers["retry-after"].to_str().unwrap().parse::<u32>().unwrap() > 0);
    assert_eq!(client.send(Method::GET, "/healthz", "").await.status, 200);

    // A client that goes away gives its place back.
    stuck.shutdown().await;
    assert_eq!(client.post("/get_token", "{}").await.refusal(), (400, "M_BAD_JSON".into()));
}

/// One runtime, service and homeserver for all cases of the property tests.
fn shared() -> &'static (tokio::runtime::Runtime, Client, Homeserver) {
    static SHARED: OnceLock<(tokio::runtime::Runtime, Client, Homeserver)> = OnceLock::new();
    SHARED.get_or_init(|| {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let homeserver = runtime.block_on(Homeserver::with_users(&[("good", "alice")]));
        let client = runtime.block_on(async { Client::new(settings()) });
        (runtime, client, homeserver)
    })
}

/// Sends `body` to both endpoints and expects an answer that is no server error.
fn answered(body: &[u8]) {
    let (runtime, client, _) = shared();
    for path in ["/get_token", "/sfu/get"] {
        let reply = runtime.block_on(client.send(Method::POST, path, body.to_vec()));
        match reply.status {
            200 => assert!(reply.json()["jwt"].is_string()),
            400 | 401 | 413 => {
                reply.refusal();
            }
            other => panic!("{other} {path} {:?}", String::from_utf8_lossy(body)),
        }
    }
}

/// Values of any shape.
fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        ".{0,20}".prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 12, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::hash_map(".{0,8}", inner, 0..4).prop_map(|m| m.into_iter().collect()),
        ]
    })
}

proptest! {
    #[test]
    fn any_bytes_are_answered(body in prop::collection::vec(any::<u8>(), 0..400)) {
        answered(&body);
    }

    #[test]
    fn any_json_is_answered(body in any_json()) {
        answered(body.to_string().as_bytes());
    }

    #[test]
    fn a_good_request_with_anything_in_one_place_is_answered(
        at in prop::sample::select(vec![
            "/room_id", "/slot_id", "/room", "/device_id", "/member", "/member/id", "/member/claimed_user_id",
            "/member/claimed_device_id", "/openid_token", "/openid_token/access_token",
            "/openid_token/expires_in", "/delay_id", "/delay_timeout", "/delay_cs_api_url", "/new",
        ]),
        value in any_json(),
        legacy in any::<bool>(),
    ) {
        let name = shared().2.name();
        let mut body = if legacy { sfu_get(&name, "good") } else { get_token(&name, "good", "alice") };
        let (parent, member) = at.rsplit_once('/').unwrap();
        if let Some(Value::Object(parent)) = body.pointer_mut(parent) {
            parent.insert(member.to_owned(), value);
        }
        answered(body.to_string().as_bytes());
    }

    #[test]
    fn any_server_name_is_answered(name in "[a-z0-9.:\\[\\]\\-]{0,20}|.{0,20}") {
        // Names resolve to nothing; addresses would be connected to.
        prop_assume!(!name.contains(|c: char| c.is_ascii_digit() || c == ':'));
        answered(json!(sfu_get(&name, "good")).to_string().as_bytes());
    }
}

/// A body of these chunks, whose length nobody has declared.
struct Chunks<I>(I);

impl<I: Iterator<Item = Bytes> + Unpin> hyper::body::Body for Chunks<I> {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        mut self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<hyper::body::Frame<Bytes>, Self::Error>>> {
        std::task::Poll::Ready(self.0.next().map(|chunk| Ok(hyper::body::Frame::data(chunk))))
    }
}

/// A body of which nothing ever comes.
pub(crate) struct Stalled;

impl hyper::body::Body for Stalled {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<hyper::body::Frame<Bytes>, Self::Error>>> {
        std::task::Poll::Pending
    }
}
