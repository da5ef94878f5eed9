//! Calls through our focus over a bad network: members keep decrypting each other under loss and jitter, and return
//! when the focus, a member's network or a member's process was away.
#![allow(clippy::disallowed_methods, reason = "a test is a shell: it starts the tasks that send")]

use std::{net::SocketAddr, sync::Arc, time::Duration};

use antiphon_call_sdk::{
    Call, CallOptions, ConnectFailure, Connected, Connector, LiveKitConnector, LiveKitFocus, Member,
    TrustPolicy,
    foci::SfuAccess,
    machine::AccessWanted,
    matrix::{DelayId, MatrixPort, RequestError, ServerSupport},
    transport::{NamedBy, livekit::Bind},
};
use antiphon_testkit::{
    homeserver::{DevHomeserver, Options},
    peers::{Peer, ports},
    require,
};
use async_trait::async_trait;
use matrix_sdk::ruma::OwnedRoomId;
use serde_json::json;

use crate::{
    focus_process::FocusProcess,
    network::{Impairment, TcpRelay, UdpRelay},
    speakers::{ENOUGH, Pairs, Speaker},
    support::{create_call_room, enter, log_in, turn, until},
};

const LIMIT: Duration = Duration::from_secs(60);
const PERFECT: Impairment = Impairment { loss_percent: 0, jitter: Duration::ZERO };
/// In each direction, so that a frame between two members passes it twice.
const BAD: Impairment = Impairment { loss_percent: 5, jitter: Duration::from_millis(80) };
/// How soon everybody must hear everybody again after the focus was restarted.
const RETURN_WITHIN: Duration = Duration::from_secs(30);

/// A homeserver, and a focus behind a relay.
struct Place {
    homeserver: DevHomeserver,
    focus: FocusProcess,
    relay: UdpRelay,
}

impl Place {
    async fn new(impairment: Impairment) -> Self {
        let udp = SocketAddr::from(([127, 0, 0, 1], ports::free().unwrap()));
        let relay = UdpRelay::start(udp, impairment).await;
        let focus = FocusProcess::start(udp, relay.address()).await;
        let homeserver = DevHomeserver::start(Options::default()).await.unwrap();
        let service = format!("http://{}/livekit/jwt", focus.http);
        homeserver.set_rtc_transports(vec![json!({ "type": "livekit", "livekit_service_url": service })]);
        Self { homeserver, focus, relay }
    }

    /// A call with so many speakers.
    async fn call_of(&self, members: usize) -> Vec<Speaker> {
        let mut speakers = Vec::new();
        let mut room: Option<OwnedRoomId> = None;
        for number in 0..members {
            let user = format!("member{number}");
            self.homeserver.register_user(&user, "pw").unwrap();
            let (session, store) = log_in(self.homeserver.url(), &user).await;
            let room = match &room {
                Some(room) => {
                    enter(&session, room, &[]).await;
                    room
                }
                None => room.insert(create_call_room(&session).await),
            };
            let (call, events) = session.join_call(room, CallOptions::default()).await.unwrap();
            speakers.push(Speaker::of(call, events, session, store).await);
        }
        speakers
    }
}

/// A [`LiveKitConnector`] whose signalling goes through a relay.
#[derive(Debug)]
struct Rewired {
    inner: LiveKitConnector,
    url: String,
}

#[async_trait]
impl Connector for Rewired {
    async fn discover(
        &self,
        port: &dyn MatrixPort,
        support: &ServerSupport,
        members: &[Member],
    ) -> Result<Vec<(LiveKitFocus, NamedBy)>, ConnectFailure> {
        self.inner.discover(port, support, members).await
    }

    async fn access(
        &self,
        port: &dyn MatrixPort,
        wanted: &AccessWanted,
    ) -> Result<SfuAccess, ConnectFailure> {
        self.inner.access(port, wanted).await
    }

    async fn connect(&self, access: &SfuAccess) -> Result<Connected, ConnectFailure> {
        self.inner.connect(&SfuAccess { url: self.url.clone(), ..access.clone() }).await
    }

    async fn delegate_leave(
        &self,
        port: &dyn MatrixPort,
        access: &SfuAccess,
        delay_id: &DelayId,
        delay: Duration,
    ) -> Result<(), RequestError> {
        self.inner.delegate_leave(port, access, delay_id, delay).await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_members_decrypt_over_bad_network_and_after_focus_was_killed() {
    require!(Peer::LoopbackOnly);
    let _turn = turn().await;
    let mut place = Place::new(BAD).await;
    let speakers = place.call_of(10).await;
    let mut pairs = Pairs::of(&speakers);
    pairs.until_heard(LIMIT, "at first").await;
    pairs.hear_in_every_window("over the bad network").await;

    place.focus.kill().await;
    // Until the members notice.
    tokio::time::sleep(Duration::from_secs(2)).await;
    place.focus.restart().await;
    pairs.until_heard(RETURN_WITHIN, "after the restart").await;
    pairs.hear_in_every_window("after the restart").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn member_whose_network_was_away_returns() {
    require!(Peer::LoopbackOnly);
    let _turn = turn().await;
    let place = Place::new(PERFECT).await;
    for user in ["alice", "bob"] {
        place.homeserver.register_user(user, "pw").unwrap();
    }
    let options = || {
        let mut options = CallOptions::default();
        options.membership.leave_delay = Duration::from_secs(8);
        options.membership.restart_interval = Duration::from_secs(2);
        options
    };
    let (session, store) = log_in(place.homeserver.url(), "alice").await;
    let room = create_call_room(&session).await;
    let (call, events) = session.join_call(&room, options()).await.unwrap();
    let alice = Speaker::of(call, events, session, store).await;

    // Everything of bob's goes through relays.
    let to_homeserver = TcpRelay::start(place.homeserver.address()).await;
    let to_focus = TcpRelay::start(place.focus.http).await;
    let bobs_address = SocketAddr::from(([127, 0, 0, 2], 0));
    let (session, store) = log_in(&format!("http://127.0.0.1:{}", to_homeserver.port()), "bob").await;
    enter(&session, &room, &[]).await;
    let mut options = options();
    options.bind = Bind::Addresses(vec![bobs_address]);
    let connector = Rewired {
        inner: LiveKitConnector::new(options.livekit()).unwrap(),
        url: format!("ws://127.0.0.1:{}", to_focus.port()),
    };
    let port = session.room(&room, TrustPolicy::CrossSigned).unwrap();
    let (call, events) = Call::join_through(Arc::new(port), Arc::new(connector), options).await.unwrap();
    let bob = Speaker::of(call, events, session, store).await;
    let speakers = [alice, bob];
    let mut pairs = Pairs::of(&speakers);
    pairs.until_heard(LIMIT, "at first").await;

    let set_dark = |dark| {
        to_homeserver.cut(dark);
        to_focus.cut(dark);
        place.relay.darken(bobs_address.ip(), dark);
    };
    set_dark(true);
    // Bob's delayed leave fires in its absence.
    until("bob gone", LIMIT, async || speakers[0].call.members().is_empty()).await;
    set_dark(false);
    until("bob back", LIMIT, async || speakers[0].call.members().len() == 1).await;
    pairs.until_heard(LIMIT, "again").await;
}

const CHILD: &str = "ANTIPHON_TEST_CHILD";

/// The other process of the test below: a member that speaks until it is killed.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "only the process of the test below"]
async fn speaking_process() {
    let Ok(place) = std::env::var(CHILD) else { return };
    let (homeserver, room) = place.split_once(' ').unwrap();
    let room: OwnedRoomId = room.try_into().unwrap();
    let (session, store) = log_in(homeserver, "bob").await;
    enter(&session, &room, &[]).await;
    let mut options = CallOptions::default();
    options.membership.leave_delay = Duration::from_secs(8);
    options.membership.restart_interval = Duration::from_secs(2);
    let (call, events) = session.join_call(&room, options).await.unwrap();
    let _speaker = Speaker::of(call, events, session, store).await;
    std::future::pending::<()>().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn stopped_process_returns_when_it_continues() {
    require!(Peer::LoopbackOnly);
    let _turn = turn().await;
    let place = Place::new(PERFECT).await;
    for user in ["alice", "bob"] {
        place.homeserver.register_user(user, "pw").unwrap();
    }
    let (session, store) = log_in(place.homeserver.url(), "alice").await;
    let room = create_call_room(&session).await;
    let (call, events) = session.join_call(&room, CallOptions::default()).await.unwrap();
    let alice = Speaker::of(call, events, session, store).await;
    let bobs_id = format!("@bob:{}", place.homeserver.server_name());

    let child = tokio::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "bad_network::speaking_process", "--ignored", "--nocapture"])
        .env(CHILD, format!("{} {room}", place.homeserver.url()))
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let signal = |name: &str| {
        let id = child.id().unwrap().to_string();
        let sent =
            std::process::Command::new("sh").args(["-c", "kill -\"$1\" \"$2\"", "sh", name, &id]).status();
        assert!(sent.unwrap().success());
    };
    let heard = |before: u64| {
        let (alice, bobs_id) = (&alice, &bobs_id);
        async move || {
            let opened = alice.opened(bobs_id);
            // A track that was published anew counts from zero.
            if opened < before { opened >= ENOUGH } else { opened - before >= ENOUGH }
        }
    };
    until("bob heard", LIMIT, heard(0)).await;
    signal("STOP");
    until("bob gone", LIMIT, async || alice.call.members().is_empty()).await;
    let before = alice.opened(&bobs_id);
    signal("CONT");
    until("bob back", LIMIT, async || alice.call.members().len() == 1).await;
    until("bob heard again", LIMIT, heard(before)).await;
}
