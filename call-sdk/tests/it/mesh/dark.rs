//! A member whose network is away for a while.

use super::*;

/// How long the network is away.
const DARK: Duration = Duration::from_secs(15);

/// Routing rules by which no packet leaves or reaches an address. They end when dropped.
struct Blackhole {
    address: &'static str,
}

fn ip(arguments: &str) {
    let done = std::process::Command::new("ip").args(arguments.split(' ')).status().unwrap();
    assert!(done.success(), "ip {arguments}");
}

impl Blackhole {
    fn dig(address: &'static str) -> Self {
        // The kernel asks its own table first, and loopback is in it: the rules must come before.
        ip("rule add pref 2000 lookup local");
        ip("rule del pref 0 lookup local");
        for end in ["from", "to"] {
            ip(&format!("rule add pref 1000 {end} {address} blackhole"));
        }
        Self { address }
    }
}

impl Drop for Blackhole {
    fn drop(&mut self) {
        for end in ["from", "to"] {
            ip(&format!("rule del pref 1000 {end} {} blackhole", self.address));
        }
        ip("rule add pref 0 lookup local");
        ip("rule del pref 2000 lookup local");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn members_hear_each_other_again_after_a_network_was_away() {
    require!(Peer::LoopbackOnly);
    let _turn = turn().await;
    let homeserver = with_users(&["alice", "bob", "carol"]).await;
    let mut room = Room::on(homeserver.url());
    let alice = room.speaker("alice", options()).await;
    let relay = TcpRelay::start(homeserver.address()).await;
    let carol = room.speaker("carol", options()).await;
    room.homeserver = format!("http://127.0.0.1:{}", relay.port());
    let bind = Bind::Addresses(vec![SocketAddr::from(([127, 0, 0, 2], 0))]);
    let bob = room.speaker("bob", CallOptions::default().with_bind(bind)).await;
    let speakers = [alice, bob, carol];
    let mut pairs = Pairs::of(&speakers);
    pairs.until_heard(LIMIT, "at first").await;
    for (homeserver_too, when) in [(false, "media was cut"), (true, "everything was cut")] {
        let blackhole = Blackhole::dig("127.0.0.2");
        relay.cut(homeserver_too);
        let cut = Instant::now();
        tokio::time::sleep(DARK).await;
        relay.cut(false);
        drop(blackhole);
        pairs.until_heard(LIMIT, &format!("after {when}")).await;
        print_timelines(&speakers, cut).await;
    }
}
