//! The control for every test with Element Call: two of them in one encrypted room, on a real Synapse, through a
//! real LiveKit server, with an authorisation service that does the least that lets them in.
#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test fails by panicking, and this one owns a server and a clock"
)]

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use antiphon_testkit::peers::{
    Browser, ElementCallJoin, JsSdk, LiveKitOptions, LiveKitServer, Peer, Synapse, SynapseOptions, require,
};
use axum::extract::State;
use axum::http::{HeaderName, HeaderValue, Method, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::{Json, Router};
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(40);

#[tokio::test(flavor = "multi_thread")]
async fn two_decode_each_other_and_both_ways_to_leave_are_seen() {
    require!(Peer::LoopbackOnly, Peer::Synapse, Peer::LiveKit, Peer::Npm, Peer::Chromium);
    let listener = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let service = format!("http://localhost:{}", listener.local_addr().unwrap().port());
    let homeserver = Synapse::start(SynapseOptions::with_rtc_service(&service)).await.unwrap();
    let sfu = Arc::new(LiveKitServer::start(LiveKitOptions::auto_create()).await.unwrap());
    let least = Least { sfu: sfu.clone(), homeserver: homeserver.url(), http: reqwest::Client::new() };
    let serving = tokio::spawn(async move { axum::serve(listener, least.router()).await.unwrap() });

    let observer = homeserver.register("observer", "pw").await.unwrap();
    homeserver.register("alice", "pw").await.unwrap();
    homeserver.register("bob", "pw").await.unwrap();
    let room = homeserver.create_call_room(&observer).await.unwrap();
    let watching =
        JsSdk::connect(&homeserver.url(), &observer, &room, &homeserver.server_name()).await.unwrap();
    watching.join(&service, false, Duration::from_secs(8)).await.unwrap();

    let browser = Browser::start().await.unwrap();
    let join = |user: &str| ElementCallJoin {
        homeserver: homeserver.localhost_url(),
        server_name: homeserver.server_name(),
        user: user.to_owned(),
        password: "pw".to_owned(),
        room: room.clone(),
        encrypted: true,
    };
    let alice = browser.element_call(join("alice")).await.unwrap();
    let bob = browser.element_call(join("bob")).await.unwrap();
    let clicked = Instant::now();
    for page in [&alice, &bob] {
        let stats = page
            .until("decoding the other", LIMIT, |stats| {
                stats.frames_decoded() >= 10
                    && stats.samples_decoded() >= 24_000
                    && stats.audio_energy() > 0.0
            })
            .await
            .unwrap();
        eprintln!("decoded {} frames {:?} after the second click", stats.frames_decoded(), clicked.elapsed());
    }

    watching.until("all three", LIMIT, |state| state.members.len() == 3).await.unwrap();
    bob.close().await.unwrap();
    watching.until("bob's delayed leave", LIMIT, |state| state.members.len() == 2).await.unwrap();
    alice.leave().await.unwrap();
    watching.until("alice's leave", LIMIT, |state| state.members.len() == 1).await.unwrap();
    serving.abort();
}

/// Lets everybody in whom the homeserver vouches for. It answers 404 to what it does not know, with CORS headers:
/// that is how Element Call learns that nobody delegates delayed leaves here.
#[derive(Clone)]
struct Least {
    sfu: Arc<LiveKitServer>,
    homeserver: String,
    http: reqwest::Client,
}

impl Least {
    fn router(self) -> Router {
        Router::new()
            .route("/sfu/get", post(Self::admit).options(async || StatusCode::OK))
            .fallback(async |method: Method| match method {
                Method::OPTIONS => StatusCode::OK,
                _ => StatusCode::NOT_FOUND,
            })
            .with_state(self)
            .layer(axum::middleware::map_response(with_cors))
    }

    async fn admit(State(this): State<Self>, Json(request): Json<Value>) -> impl IntoResponse {
        let token = request["openid_token"]["access_token"].as_str().unwrap();
        let mut url =
            reqwest::Url::parse(&format!("{}/_matrix/federation/v1/openid/userinfo", this.homeserver))
                .unwrap();
        url.query_pairs_mut().append_pair("access_token", token);
        let user: Value =
            serde_json::from_str(&this.http.get(url).send().await.unwrap().text().await.unwrap()).unwrap();
        let identity =
            format!("{}:{}", user["sub"].as_str().unwrap(), request["device_id"].as_str().unwrap());
        let room = request["room"].as_str().unwrap();
        Json(
            json!({"url": this.sfu.url().replace("127.0.0.1", "localhost"), "jwt": this.sfu.token(room, &identity)}),
        )
    }
}

async fn with_cors(mut response: Response) -> Response {
    for name in
        ["access-control-allow-origin", "access-control-allow-headers", "access-control-allow-methods"]
    {
        response.headers_mut().insert(HeaderName::from_static(name), HeaderValue::from_static("*"));
    }
    response
}
