//! A request's id: in its answer, in the body of a refusal, and taken over only from those who may give one.

use std::net::SocketAddr;

use axum::{
    body::Body,
    extract::ConnectInfo,
    http::{Method, Request},
};

use crate::{
    child::Program,
    delegated_leave::signed,
    support::{Client, DEADLINE, Reply, settings},
};

async fn with_id(client: &Client, peer: [u8; 4], id: &str) -> Reply {
    let request = Request::post("/get_token")
        .extension(ConnectInfo(SocketAddr::from((peer, 4711))))
        .header("x-request-id", id)
        .body(Body::from("{}"));
    client.request(request.unwrap()).await
}

#[tokio::test]
async fn every_answer_has_one_and_no_two_the_same() {
    let client = Client::new(settings());
    let mut seen = std::collections::HashSet::new();
    for (method, path) in [
        (Method::POST, "/get_token"),
        (Method::POST, "/get_token"),
        (Method::OPTIONS, "/sfu/get"),
        (Method::GET, "/healthz"),
        (Method::GET, "/nowhere"),
    ] {
        let reply = client.send(method, path, "{}").await;
        let id = reply.headers["x-request-id"].to_str().unwrap().to_owned();
        assert!(id.len() == 16 && seen.insert(id), "{reply:?}");
    }
}

#[tokio::test]
async fn only_a_trusted_proxy_gives_one() {
    let client = Client::new(settings());
    let taken = with_id(&client, [127, 0, 0, 1], "proxy-7").await;
    assert_eq!(taken.json()["request_id"], "proxy-7");
    for (peer, id) in [([203, 0, 113, 1], "stranger"), ([127, 0, 0, 1], "two words"), ([127, 0, 0, 1], "")] {
        let reply = with_id(&client, peer, id).await;
        reply.refusal();
        assert_ne!(reply.json()["request_id"], id);
    }
}

#[tokio::test]
async fn a_refused_webhook_is_one_line_with_its_id_and_the_reason() {
    let mut service = Program::new();
    service
        .set("LIVEKIT_URL", "ws://127.0.0.1:9")
        .set("LIVEKIT_KEY", "devkey")
        .set("LIVEKIT_SECRET", "devsecret")
        .set("LIVEKIT_FULL_ACCESS_HOMESERVERS", "hs.org")
        .start()
        .await;
    let post = async |request: Request<Body>| {
        let (parts, body) = request.into_parts();
        let http = reqwest::Client::builder().no_proxy().timeout(DEADLINE).build().unwrap();
        let body = axum::body::to_bytes(body, 1 << 20).await.unwrap();
        let url = service.url("/sfu_webhook");
        let answer = http.post(url).headers(parts.headers).body(body).send().await.unwrap();
        assert_eq!(answer.status(), 401);
        let id = answer.json::<serde_json::Value>().await.unwrap()["request_id"].as_str().unwrap().to_owned();
        let log = service.log().tail();
        let lines: Vec<_> = log.lines().filter(|line| line.contains(&id)).map(str::to_owned).collect();
        let [line] = &lines[..] else { panic!("{lines:?}") };
        line.clone()
    };
    let plain = Request::post("/").body(Body::from("{}")).unwrap();
    assert!(post(plain).await.contains("it has no token in its Authorization header"));
    assert!(post(signed("{}", "wrong", 60, "")).await.contains("its token was signed with another secret"));
    assert!(post(signed("{}", "devsecret", -120, "")).await.contains("are both clocks right?"));
}
