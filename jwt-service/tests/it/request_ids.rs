//! A request's id: in its answer, in the body of a refusal, and taken over only from those who may give one.

use std::net::SocketAddr;

use axum::{
    body::Body,
    extract::ConnectInfo,
    http::{Method, Request},
};

use crate::support::{Client, Reply, settings};

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
