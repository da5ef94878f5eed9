//! Calls without a focus: full mesh, moves between a focus and the mesh, and calls that hold members of both kinds.

mod dark;
mod nat;
mod process;
mod race;
mod restart;

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use antiphon_call_sdk::{
    Call, CallOptions, ConnectFailure, ConnectFailureKind, Connected, Connector, LiveKitConnector,
    LiveKitFocus, Member, MeshPolicy, ParticipantIdentity, PeerOpened, TrustPolicy,
    foci::SfuAccess,
    machine::AccessWanted,
    matrix::{MatrixPort, ServerSupport},
    transport::{NamedBy, livekit::Bind},
};
use antiphon_testkit::{
    homeserver::{DevHomeserver, Options},
    peers::{Peer, Synapse, SynapseOptions, ports},
    require,
};
use async_trait::async_trait;
use matrix_sdk::ruma::OwnedRoomId;
use serde_json::json;

use crate::{
    focus_process::FocusProcess,
    network::TcpRelay,
    speakers::{Pairs, Speaker},
    support::{create_call_room, enter, log_in, turn, until},
};

const LIMIT: Duration = Duration::from_secs(60);
/// As an encoder makes them, so that silences are measured to 20 ms.
const FRAME_EVERY: Duration = Duration::from_millis(20);

/// A connector that finds no focus.
#[derive(Debug)]
struct WithoutFoci(LiveKitConnector);

#[async_trait]
impl Connector for WithoutFoci {
    async fn discover(
        &self,
        _port: &dyn MatrixPort,
        _support: &ServerSupport,
        _members: &[Member],
    ) -> Result<Vec<(LiveKitFocus, NamedBy)>, ConnectFailure> {
        Err(ConnectFailure::new(ConnectFailureKind::NoFocus, "none is looked for"))
    }

    async fn access(
        &self,
        port: &dyn MatrixPort,
        wanted: &AccessWanted,
    ) -> Result<SfuAccess, ConnectFailure> {
        self.0.access(port, wanted).await
    }

    async fn connect(&self, access: &SfuAccess) -> Result<Connected, ConnectFailure> {
        self.0.connect(access).await
    }

    async fn open_peer(
        &self,
        port: &dyn MatrixPort,
        identity: &ParticipantIdentity,
    ) -> Result<PeerOpened, ConnectFailure> {
        self.0.open_peer(port, identity).await
    }

    async fn delegate_leave(
        &self,
        port: &dyn MatrixPort,
        access: &SfuAccess,
        delay_id: &antiphon_call_sdk::matrix::DelayId,
        delay: Duration,
    ) -> Result<(), antiphon_call_sdk::matrix::RequestError> {
        self.0.delegate_leave(port, access, delay_id, delay).await
    }
}

fn options() -> CallOptions {
    CallOptions::default().with_bind(Bind::Addresses(vec![SocketAddr::from(([127, 0, 0, 1], 0))]))
}

/// Members of one call on one homeserver, each logged in and in the room.
struct Room {
    homeserver: String,
    room: Option<OwnedRoomId>,
}

impl Room {
    fn on(homeserver: impl Into<String>) -> Self {
        Self { homeserver: homeserver.into(), room: None }
    }

    async fn enter(&mut self, user: &str) -> (antiphon_call_sdk::Session, tempfile::TempDir, OwnedRoomId) {
        let (session, store) = log_in(&self.homeserver, user).await;
        let room = match &self.room {
            Some(room) => {
                enter(&session, room, &[]).await;
                room.clone()
            }
            None => self.room.insert(create_call_room(&session).await).clone(),
        };
        (session, store, room)
    }

    async fn speaker(&mut self, user: &str, options: CallOptions) -> Speaker {
        let (session, store, room) = self.enter(user).await;
        let (call, events) = session.join_call(&room, options).await.unwrap();
        Speaker::with_frames_every(FRAME_EVERY, call, events, session, store).await
    }

    async fn speaker_without_foci(&mut self, user: &str, options: CallOptions) -> Speaker {
        let (session, store, room) = self.enter(user).await;
        let connector = WithoutFoci(LiveKitConnector::new(options.livekit()).unwrap());
        let port = session.room(&room, TrustPolicy::CrossSigned).unwrap();
        let (call, events) = Call::join_through(Arc::new(port), Arc::new(connector), options).await.unwrap();
        Speaker::with_frames_every(FRAME_EVERY, call, events, session, store).await
    }
}

/// A homeserver with these users, and without a focus.
async fn with_users(users: &[&str]) -> DevHomeserver {
    let homeserver = DevHomeserver::start(Options::default()).await.unwrap();
    for user in users {
        homeserver.register_user(user, "pw").unwrap();
    }
    homeserver
}

/// A homeserver, and the focus that it names.
async fn with_focus() -> (DevHomeserver, FocusProcess) {
    let udp = SocketAddr::from(([127, 0, 0, 1], ports::free().unwrap()));
    let focus = FocusProcess::start(udp, udp).await;
    let homeserver = with_users(&[]).await;
    let service = format!("http://{}/livekit/jwt", focus.http);
    homeserver.set_rtc_transports(vec![json!({ "type": "livekit", "livekit_service_url": service })]);
    (homeserver, focus)
}

/// Median and longest silence of all voices at all members.
fn gaps(speakers: &[Speaker]) -> (Duration, Duration) {
    let mut gaps: Vec<_> = speakers.iter().flat_map(Speaker::gaps).collect();
    gaps.sort();
    (gaps[gaps.len() / 2], *gaps.last().unwrap())
}

/// What each member did since then.
async fn print_timelines(speakers: &[Speaker], since: Instant) {
    for speaker in speakers {
        let report = speaker.call.report().await.unwrap();
        let begin = report.at_ms.saturating_sub(u64::try_from(since.elapsed().as_millis()).unwrap());
        println!("{}, silences {:?}:", speaker.user(), speaker.silences());
        for entry in report.timeline.iter().filter(|entry| entry.at_ms >= begin) {
            println!("  {:6} {:?}", entry.at_ms - begin, entry.step);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn members_mesh_on_synapse_and_send_nothing_but_olm() {
    require!(Peer::Synapse, Peer::LoopbackOnly);
    let _turn = turn().await;
    let relay = TcpRelay::reserve().await;
    let url = format!("http://127.0.0.1:{}", relay.port());
    let mut options_of_synapse = SynapseOptions::default();
    options_of_synapse.clients_at = Some(url.clone());
    let synapse = Synapse::start(options_of_synapse).await.unwrap();
    let port = synapse.url().rsplit(':').next().unwrap().trim_end_matches('/').parse().unwrap();
    relay.lead_to(SocketAddr::from(([127, 0, 0, 1], port)));
    for count in [2, 3, 4, 7] {
        let mut room = Room::on(&url);
        let mut speakers = Vec::new();
        for number in 0..count {
            let user = format!("member{count}x{number}");
            synapse.register(&user, "pw").await.unwrap();
            speakers.push(room.speaker(&user, options()).await);
        }
        let mut pairs = Pairs::of(&speakers);
        pairs.until_heard(LIMIT, &format!("among {count}")).await;
        if count == 7 {
            pairs.hear_in_every_window("among 7").await;
        }
        for speaker in &mut speakers {
            speaker.show().await;
        }
        let users: Vec<_> = speakers.iter().map(Speaker::user).collect();
        let others =
            |of: &str| users.iter().map(String::as_str).filter(move |user| *user != of).collect::<Vec<_>>();
        until(&format!("all seen among {count}"), LIMIT, async || {
            speakers.iter().all(|speaker| speaker.sees(others(&speaker.user()).into_iter()))
        })
        .await;
    }
    let sent = relay.sent();
    let types: BTreeSet<_> = sent
        .split("/sendToDevice/")
        .skip(1)
        .filter_map(|rest| rest.split('/').next().map(str::to_owned))
        .collect();
    assert_eq!(types, BTreeSet::from(["m.room.encrypted".to_owned()]));
    for word in ["ice-ufrag", "a=fingerprint", "m.call.invite"] {
        assert!(!sent.contains(word), "{word} was sent in clear");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn call_moves_to_the_focus_at_the_fifth_member_and_back_when_it_is_killed() {
    require!(Peer::LoopbackOnly);
    let _turn = turn().await;
    let (homeserver, mut focus) = with_focus().await;
    let mut room = Room::on(homeserver.url());
    let options = || options().with_mesh(MeshPolicy::SmallCalls { limit: 4 });
    let mut speakers = Vec::new();
    for number in 0..4 {
        let user = format!("member{number}");
        homeserver.register_user(&user, "pw").unwrap();
        speakers.push(room.speaker(&user, options()).await);
    }
    Pairs::of(&speakers).until_heard(LIMIT, "in the mesh of four").await;
    speakers.iter().for_each(Speaker::begin_gaps);

    homeserver.register_user("member4", "pw").unwrap();
    let fifth = room.speaker("member4", options()).await;
    until("moved to the focus", LIMIT, async || {
        speakers.iter().all(|speaker| speaker.moves().iter().any(|moved| moved.starts_with("MeshEnded")))
    })
    .await;
    // Until the paths of before have ended.
    tokio::time::sleep(Duration::from_secs(8)).await;
    let (median, longest) = gaps(&speakers);
    println!("to the focus: longest silence of a voice: p50 {median:?}, max {longest:?}");
    assert!(longest < Duration::from_secs(1), "a planned move is not heard");
    for speaker in &speakers {
        let moves = speaker.moves();
        assert!(!moves.iter().any(|moved| moved.starts_with("TrackEnded")), "{moves:?}");
    }

    speakers.push(fifth);
    Pairs::of(&speakers).until_heard(LIMIT, "on the focus").await;
    speakers.iter().for_each(Speaker::begin_gaps);
    let killed = Instant::now();
    focus.kill().await;
    let mut pairs = Pairs::of(&speakers);
    tokio::time::sleep(Duration::from_secs(2)).await;
    pairs.until_heard(LIMIT, "peer to peer after the focus was killed").await;
    let (median, longest) = gaps(&speakers);
    println!(
        "focus killed: longest silence of a voice: p50 {median:?}, max {longest:?}; all heard after {:?}",
        killed.elapsed()
    );
    if longest > Duration::from_secs(6) {
        print_timelines(&speakers, killed).await;
    }

    speakers.iter().for_each(Speaker::begin_gaps);
    focus.restart().await;
    until("back on the focus", Duration::from_secs(90), async || {
        speakers.iter().all(|speaker| speaker.moves().iter().any(|moved| moved.starts_with("MeshEnded")))
    })
    .await;
    tokio::time::sleep(Duration::from_secs(8)).await;
    let (median, longest) = gaps(&speakers);
    println!("back to the focus: longest silence of a voice: p50 {median:?}, max {longest:?}");
    assert!(longest < Duration::from_secs(1), "a planned move is not heard");
    Pairs::of(&speakers).until_heard(LIMIT, "on the focus again").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn members_with_a_focus_and_members_that_only_mesh_hear_each_other() {
    require!(Peer::LoopbackOnly);
    let _turn = turn().await;
    let (homeserver, _focus) = with_focus().await;
    let mut room = Room::on(homeserver.url());
    let mut speakers = Vec::new();
    for number in 0..4 {
        let user = format!("member{number}");
        homeserver.register_user(&user, "pw").unwrap();
        speakers.push(if number % 2 == 0 {
            room.speaker(&user, options()).await
        } else {
            room.speaker_without_foci(&user, options()).await
        });
    }
    let mut pairs = Pairs::of(&speakers);
    pairs.until_heard(LIMIT, "in the mixed call").await;
    pairs.hear_in_every_window("in the mixed call").await;
}
