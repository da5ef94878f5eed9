//! One address, or one hanging homeserver, cannot take what is everybody's.

use std::{net::SocketAddr, time::Duration};

use antiphon_jwt_service::{Rate, TrustedProxies};
use axum::{body::Body, extract::ConnectInfo, http::Request};
use tokio::{net::TcpListener, task::JoinSet};

use crate::support::{Client, Homeserver, Reply, get_token, settings, sfu_get};

/// A request from `peer` with these `X-Forwarded-For` lines.
async fn from(client: &Client, peer: &str, forwarded_for: &[&str], body: String) -> Reply {
    let peer: SocketAddr = format!("{peer}:4711").parse().unwrap();
    let mut request = Request::post("/get_token").extension(ConnectInfo(peer));
    for line in forwarded_for {
        request = request.header("x-forwarded-for", *line);
    }
    client.request(request.body(Body::from(body)).unwrap()).await
}

#[tokio::test]
async fn two_thousand_at_once_are_answered_unless_one_address_sends_them_all() {
    let homeserver = Homeserver::with_users(&[("token", "alice")]).await;
    let client = std::sync::Arc::new(Client::new(settings()));
    let body = get_token(&homeserver.name(), "token", "alice").to_string();
    let mut asked = JoinSet::new();
    for n in 0..2000u32 {
        let (client, body) = (client.clone(), body.clone());
        let address = std::net::Ipv4Addr::from(0xc612_0000 + n).to_string();
        asked.spawn(async move { from(&client, "127.0.0.1", &[&address], body).await.status });
    }
    assert!(asked.join_all().await.into_iter().all(|status| status == 200));

    let mut refused = 0;
    for _ in 0..2000 {
        let reply = from(&client, "127.0.0.1", &["203.0.113.1"], "{}".to_owned()).await;
        if reply.status == 429 {
            assert_eq!(reply.refusal(), (429, "M_LIMIT_EXCEEDED".into()));
            assert_eq!(reply.headers["access-control-allow-origin"], "*");
            assert_eq!(reply.headers["retry-after"], "1");
            refused += 1;
        } else {
            assert_eq!(reply.refusal(), (400, "M_BAD_JSON".into()));
        }
    }
    assert!(refused > 0);
    assert_eq!(from(&client, "127.0.0.1", &["203.0.113.2"], "{}".to_owned()).await.status, 400);
}

#[tokio::test]
async fn what_a_stranger_says_about_its_address_is_not_believed() {
    let mut one = settings();
    one.limits.per_address = Some(Rate { per_second: 1, burst: 1 });
    one.limits.trusted_proxies = TrustedProxies::none();
    let client = Client::new(one);
    let statuses = [
        from(&client, "198.51.100.1", &["203.0.113.1"], "{}".to_owned()).await.status,
        from(&client, "198.51.100.1", &["203.0.113.2"], "{}".to_owned()).await.status,
        from(&client, "198.51.100.2", &[], "{}".to_owned()).await.status,
    ];
    assert_eq!(statuses, [400, 429, 400]);
    // Its preflight costs nothing and passes.
    let preflight =
        Request::options("/get_token").extension(ConnectInfo(SocketAddr::from(([198, 51, 100, 1], 1))));
    assert_eq!(client.request(preflight.body(Body::empty()).unwrap()).await.status, 200);
}

#[tokio::test]
async fn where_addresses_are_not_known_none_is_limited() {
    let mut one = settings();
    one.limits.per_address = Some(Rate { per_second: 1, burst: 1 });
    let client = Client::new(one);
    for _ in 0..3 {
        assert_eq!(client.post("/get_token", "{}").await.status, 400);
    }
}

#[tokio::test]
async fn a_hanging_homeserver_does_not_take_the_places_of_others() {
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let name = silent.local_addr().unwrap().to_string();
    let homeserver = Homeserver::with_users(&[("token", "alice")]).await;
    let mut small = settings();
    (small.limits.in_flight, small.limits.server_in_flight) = (3, 2);
    small.limits.lookup = Duration::from_secs(20);
    let client = std::sync::Arc::new(Client::new(small));
    let (mut stuck, mut held) = (JoinSet::new(), Vec::new());
    for _ in 0..2 {
        let (client, name) = (client.clone(), name.clone());
        stuck.spawn(async move { client.post("/sfu/get", sfu_get(&name, "token")).await });
        held.push(silent.accept().await.unwrap());
    }
    let refused = client.post("/sfu/get", sfu_get(&name.to_uppercase(), "token")).await;
    assert_eq!(refused.refusal(), (429, "M_LIMIT_EXCEEDED".into()));
    assert_eq!(client.post("/sfu/get", sfu_get(&homeserver.name(), "token")).await.status, 200);
    stuck.shutdown().await;
}
