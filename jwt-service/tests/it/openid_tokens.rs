//! OpenID tokens that are expired, foreign or malformed, and homeservers that answer badly, slowly or not at
//! all: the caller gets the same refusal, after at most one request.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use antiphon_jwt_service::TlsPolicy;
use axum::{
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use serde_json::json;
use tokio::{net::TcpListener, task::JoinSet};

use crate::support::{Client, Homeserver, Seen, USERINFO, get_token, settings, sfu_get};

/// Lets a homeserver answer userinfo with `answer`, and expects a refusal after one lookup.
async fn not_accepted(what: &str, answer: impl Fn(&Seen) -> Response + Send + Sync + 'static) {
    let homeserver = Homeserver::start(answer).await;
    let client = Client::new(settings());
    let reply = client.post("/sfu/get", sfu_get(&homeserver.name(), "token")).await;
    assert_eq!(reply.refusal(), (401, "M_UNAUTHORIZED".into()), "{what}");
    assert_eq!(homeserver.lookups(), 1, "{what}");
    assert_eq!(homeserver.seen().len(), 1, "{what}");
    assert_eq!(client.sfu.rooms(), [] as [String; 0], "{what}");
}

#[tokio::test]
async fn tokens_that_the_homeserver_does_not_know_are_refused() {
    for status in [400, 401, 403, 404, 429, 500, 502] {
        let status = StatusCode::from_u16(status).unwrap();
        let body = json!({ "errcode": "M_UNKNOWN_TOKEN", "sub": "@alice:anything" }).to_string();
        not_accepted(status.as_str(), move |_| (status, body.clone()).into_response()).await;
    }
}

#[tokio::test]
async fn a_homeserver_cannot_vouch_for_anothers_users() {
    for sub in ["@alice:example.com", "@alice", "", "alice:", "@alice:127.0.0.1", "@a:b:127.0.0.1:1"] {
        not_accepted(sub, move |_| json!({ "sub": sub }).to_string().into_response()).await;
    }
}

#[tokio::test]
async fn answers_that_are_no_userinfo_are_refused() {
    for body in ["", "null", "[]", "{}", "{\"sub\":1}", "{\"sub\":null}", "<html>", "{\"sub\":\"@a:"] {
        not_accepted(body, move |_| body.into_response()).await;
    }
    not_accepted("larger than any userinfo", |seen| {
        json!({ "padding": "x".repeat(70_000), "sub": format!("@a:{}", seen.host) })
            .to_string()
            .into_response()
    })
    .await;
}

#[tokio::test]
async fn redirects_are_not_followed_with_a_token_in_hand() {
    for status in [301, 302, 303, 307, 308] {
        let status = StatusCode::from_u16(status).unwrap();
        not_accepted(status.as_str(), move |seen| match seen.path.as_str() {
            USERINFO => {
                let to = format!("https://{}/elsewhere?{}", seen.host, seen.query.as_deref().unwrap());
                (status, [(header::LOCATION, to)]).into_response()
            }
            _ => json!({ "sub": format!("@alice:{}", seen.host) }).to_string().into_response(),
        })
        .await;
    }
}

#[tokio::test]
async fn a_success_other_than_200_counts_and_what_follows_the_object_is_ignored() {
    let homeserver = Homeserver::start(|seen| {
        (StatusCode::CREATED, format!("{{\"sub\":\"@alice:{}\"}} and more", seen.host)).into_response()
    })
    .await;
    let client = Client::new(settings());
    client.post("/sfu/get", sfu_get(&homeserver.name(), "token")).await.claims();
}

#[tokio::test]
async fn a_token_is_sent_as_it_is_whatever_is_in_it() {
    let token = "a b+c&d=e%20é?#\u{0}\n/";
    let homeserver = Homeserver::with_users(&[("a b+c&d=e%20é?#\u{0}\n/", "alice")]).await;
    let client = Client::new(settings());
    client.post("/get_token", get_token(&homeserver.name(), token, "alice")).await.claims();
    let huge = "x".repeat(60_000);
    let reply = client.post("/get_token", get_token(&homeserver.name(), &huge, "alice")).await;
    assert_eq!(reply.refusal(), (401, "M_UNAUTHORIZED".into()));
}

#[tokio::test]
async fn names_that_are_no_server_names_are_refused_like_bad_tokens() {
    let client = Client::new(settings());
    for name in [
        "a b",
        "https://hs.org",
        "hs.org/path",
        "user@hs.org",
        ":8448",
        "hs.org:99999",
        "::1",
        "é.org",
        "a\r\nb",
    ] {
        let reply = client.post("/sfu/get", sfu_get(name, "token")).await;
        assert_eq!(reply.refusal(), (401, "M_UNAUTHORIZED".into()), "{name}");
    }
}

#[tokio::test]
async fn a_certificate_nobody_vouches_for_is_refused_before_any_request() {
    let homeserver = Homeserver::with_users(&[("good", "alice")]).await;
    let name = homeserver.name();
    let mut verifying = settings();
    verifying.insecure_skip_verify_tls = TlsPolicy::Verify;
    verifying.private_homeservers = [name.clone()].into();
    let reply = Client::new(verifying).post("/sfu/get", sfu_get(&name, "good")).await;
    assert_eq!(reply.refusal(), (401, "M_UNAUTHORIZED".into()));
    assert!(homeserver.connections() > 0, "it was the certificate, not the address");
    assert_eq!(homeserver.seen().len(), 0);
}

#[tokio::test]
async fn development_mode_trusts_homeservers_on_this_machine_alone() {
    let homeserver = Homeserver::with_users(&[("good", "alice")]).await;
    let mut development = settings();
    development.insecure_skip_verify_tls = TlsPolicy::SkipLoopback;
    let client = Client::on_this_machine(development);
    let by_name = format!("localhost:{}", homeserver.address.port());
    for name in [homeserver.name(), by_name] {
        client.post("/sfu/get", sfu_get(&name, "good")).await.claims();
    }
}

#[tokio::test]
async fn a_homeserver_that_never_answers_is_given_up() {
    // It accepts connections into its backlog and never says a word: not even TLS begins.
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut hasty = settings();
    hasty.limits.lookup = Duration::from_millis(300);
    let client = Client::new(hasty);
    let started = Instant::now();
    let name = silent.local_addr().unwrap().to_string();
    let reply = client.post("/sfu/get", sfu_get(&name, "token")).await;
    assert_eq!(reply.refusal(), (401, "M_UNAUTHORIZED".into()));
    assert!(started.elapsed() >= Duration::from_millis(300), "it was given its time");
}

#[tokio::test]
async fn a_homeserver_that_stops_in_the_middle_of_an_answer_is_given_up() {
    let homeserver = Homeserver::start(|_| {
        let never = hyper::body::Frame::data(bytes::Bytes::from_static(b"{\"sub\":"));
        let body = TrickleBody(Some(never));
        axum::body::Body::new(body).into_response()
    })
    .await;
    let mut hasty = settings();
    hasty.limits.lookup = Duration::from_millis(500);
    let reply = Client::new(hasty).post("/sfu/get", sfu_get(&homeserver.name(), "token")).await;
    assert_eq!(reply.refusal(), (401, "M_UNAUTHORIZED".into()));
    assert_eq!(homeserver.lookups(), 1);
}

#[tokio::test]
async fn a_slow_homeserver_holds_up_nobody_else() {
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let homeserver = Homeserver::with_users(&[("good", "alice")]).await;
    let client = Arc::new(Client::new(settings()));
    let mut stuck = JoinSet::new();
    for _ in 0..50 {
        let (client, name) = (client.clone(), silent.local_addr().unwrap().to_string());
        stuck.spawn(async move { client.post("/sfu/get", sfu_get(&name, "token")).await });
    }
    // One connection has come in: the lookups are under way.
    let _held = silent.accept().await.unwrap();
    client.post("/sfu/get", sfu_get(&homeserver.name(), "good")).await.claims();
    assert!(stuck.try_join_next().is_none(), "the others still wait");
}

/// A body that sends one frame and then nothing.
struct TrickleBody(Option<hyper::body::Frame<bytes::Bytes>>);

impl hyper::body::Body for TrickleBody {
    type Data = bytes::Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        mut self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<hyper::body::Frame<bytes::Bytes>, Self::Error>>> {
        // No waker is kept: the test's time limit ends the wait.
        self.0.take().map_or(std::task::Poll::Pending, |frame| std::task::Poll::Ready(Some(Ok(frame))))
    }
}
