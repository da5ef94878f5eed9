//! A Redis that answers and takes no writes: full, or the replica of another.

use std::time::Duration;

use antiphon_testkit::peers::{Peer, require};
use serde_json::json;

use crate::{
    child::Program,
    jobs_in_redis::Redis,
    support::{DEADLINE, Homeserver, get_token},
};

#[tokio::test]
async fn it_is_not_ready_and_the_log_is_not_flooded() {
    require!(Peer::Redis);
    let redis = Redis::start(&[]).await;
    let homeserver = Homeserver::with_users(&[("good", "alice")]).await;
    let name = homeserver.name();
    // An empty answer is a room, and nobody is in it.
    let sfu = axum::Router::new()
        .route("/twirp/livekit.RoomService/CreateRoom", axum::routing::post(async || ()))
        .fallback((axum::http::StatusCode::NOT_FOUND, r#"{"code":"not_found"}"#));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut service = Program::new();
    service
        .set("LIVEKIT_URL", format!("ws://{}", listener.local_addr().unwrap()))
        .set("LIVEKIT_KEY", "devkey")
        .set("LIVEKIT_SECRET", "devsecret")
        .set("LIVEKIT_FULL_ACCESS_HOMESERVERS", &name)
        .set("LIVEKIT_CS_API_URL_OVERRIDES", format!("{name}=https://{name}"))
        .set("LIVEKIT_INSECURE_SKIP_VERIFY_TLS", "YES_I_KNOW_WHAT_I_AM_DOING")
        .set("LIVEKIT_REDIS_URL", redis.url())
        .start()
        .await;
    tokio::spawn(async move { axum::serve(listener, sfu).await });
    until(&service, 200, "ok").await;

    redis.raw(&["CONFIG", "SET", "maxmemory", "1"]).await;
    let http = reqwest::Client::builder().no_proxy().timeout(DEADLINE).build().unwrap();
    for member in 0..20 {
        let mut body = get_token(&name, "good", "alice");
        body["member"]["id"] = json!(format!("member{member}"));
        body["delay_id"] = json!("syd_1");
        body["delay_timeout"] = json!(3_600_000);
        let answer = http.post(service.url("/get_token")).json(&body).send().await.unwrap();
        assert_eq!(answer.status(), 200, "no request fails because of it");
    }
    until(&service, 503, "down").await;
    assert_eq!(service.metric("up{part=\"store\"}").await, 0);
    let log = service.log().tail();
    assert!(log.contains("OOM"), "{log}");
    assert!(log.matches("the store failed").count() <= 2, "{log}");

    redis.raw(&["CONFIG", "SET", "maxmemory", "0"]).await;
    until(&service, 200, "ok").await;
    assert_eq!(redis.entries().await.len(), 20);
}

/// Waits until `/readyz` says this of the store.
async fn until(service: &Program, status: u16, store: &str) {
    let wait = async {
        loop {
            let (found, body) = service.operators("/readyz").await;
            if found == status && body.contains(&format!("\"store\":\"{store}\"")) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    if tokio::time::timeout(DEADLINE, wait).await.is_err() {
        panic!("not {status} {store}: {:?}\n{}", service.operators("/readyz").await, service.log().tail());
    }
}
