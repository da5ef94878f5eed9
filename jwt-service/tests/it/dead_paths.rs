//! A firewall forgets a connection that we have kept, and says nothing: no packet of it arrives any more.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use antiphon_jwt_service::{Secret, Sfu as _, TwirpSfu};
use antiphon_testkit::peers::{Peer, require};
use axum::{Router, extract::ConnectInfo};
use tokio::{net::TcpListener, process::Command, sync::Semaphore};

use crate::support::{Client, Homeserver, get_token, settings};

async fn ip(arguments: &str) {
    let done = Command::new("ip").args(arguments.split(' ')).status().await.unwrap();
    assert!(done.success(), "ip {arguments}");
}

/// Does `work` while no packet leaves or reaches the port of `kept`.
async fn cut_off<T>(kept: SocketAddr, work: impl Future<Output = T>) -> T {
    static RULES: Semaphore = Semaphore::const_new(1);
    let _rules = RULES.acquire().await.unwrap();
    // The kernel asks its own table first, and loopback is in it: the rule must come before.
    ip("rule add pref 2000 lookup local").await;
    ip("rule del pref 0 lookup local").await;
    let rules =
        ["sport", "dport"].map(|end| format!("pref 1000 ipproto tcp {end} {} blackhole", kept.port()));
    for rule in &rules {
        ip(&format!("rule add {rule}")).await;
    }
    let done = work.await;
    for rule in &rules {
        ip(&format!("rule del {rule}")).await;
    }
    ip("rule add pref 0 lookup local").await;
    ip("rule del pref 2000 lookup local").await;
    done
}

#[tokio::test]
async fn a_dead_way_to_the_homeserver_costs_seconds_and_no_token() {
    require!(Peer::LoopbackOnly);
    let homeserver = Homeserver::with_users(&[("good", "alice")]).await;
    let client = Client::new(settings());
    let body = get_token(&homeserver.name(), "good", "alice");
    for _ in 0..2 {
        assert_eq!(client.post("/get_token", body.clone()).await.status, 200);
    }
    let [kept] = homeserver.peers()[..] else { panic!("one connection is kept: {:?}", homeserver.peers()) };
    let reply = cut_off(kept, client.post("/get_token", body)).await;
    assert_eq!(reply.status, 200, "{}", reply.text);
    assert_eq!(homeserver.connections(), 2);
}

#[tokio::test]
async fn a_dead_way_to_the_sfu_costs_seconds_and_no_room() {
    require!(Peer::LoopbackOnly);
    let peers = Arc::<Mutex<Vec<SocketAddr>>>::default();
    let seen = peers.clone();
    // An empty answer is a room without a name.
    let router = Router::new().fallback(async move |ConnectInfo(peer): ConnectInfo<SocketAddr>| {
        seen.lock().unwrap().push(peer);
    });
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("ws://{}", listener.local_addr().unwrap());
    let service = router.into_make_service_with_connect_info::<SocketAddr>();
    tokio::spawn(async move { axum::serve(listener, service).await });
    let sfu = TwirpSfu::new(&url, "devkey", &Secret::new("devsecret")).unwrap();
    sfu.create_room("one").await.unwrap();
    sfu.create_room("two").await.unwrap();
    let before = peers.lock().unwrap().clone();
    assert_eq!(before[0], before[1], "the connection is kept");
    cut_off(before[0], sfu.create_room("three")).await.unwrap();
    let after = peers.lock().unwrap().clone();
    assert_ne!(after[2], before[0]);
}
