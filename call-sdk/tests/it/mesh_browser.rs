//! A browser's plain `RTCPeerConnection` and a member of ours exchange media without a focus, as `docs/mesh.md` says.
//!
//! The page (`testkit/web/mesh.js`) knows nothing but that document. The test is its Matrix client: it writes the
//! membership, and carries the messages, Olm-encrypted.

use std::{
    net::SocketAddr,
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use antiphon_call_sdk::{
    Call, CallEvent, CallOptions, Device, Recording, Reliability, Session, TrackSource, TrackSummary,
    TrustPolicy, UserData,
    matrix::{EventTarget, EventWrite, MatrixPort, MatrixRequest, MatrixUpdate, ToDeviceBatch, sdk::SdkRoom},
    transport::livekit::Bind,
};
use antiphon_testkit::{
    homeserver::{DevHomeserver, Options},
    peers::{Browser, MeshJoin, MeshMessage, MeshPage, MeshParty, MeshStats, Peer},
    require,
};
use matrix_sdk::{
    RoomState,
    ruma::{
        OwnedRoomId, RoomId, api::client::room::create_room,
        events::room::power_levels::RoomPowerLevelsEventContent, serde::Raw,
    },
};
use serde_json::{Value, json};
use tokio::{sync::mpsc, task::JoinSet};

use crate::support::{Events, log_in, turn, until};

/// Far longer than anything takes, because software codecs run on two cores.
const LIMIT: Duration = Duration::from_secs(40);
const CARRY_EVERY: Duration = Duration::from_millis(50);
const MEMBERSHIP: &str = "org.matrix.msc3401.call.member";
const SESSION: &str = "session of the page";

#[derive(Clone, Copy, Debug)]
enum Program {
    Chromium,
    Firefox,
}

impl Program {
    async fn start(self) -> Browser {
        match self {
            Self::Chromium => Browser::start().await.unwrap(),
            Self::Firefox => Browser::start_firefox().await.unwrap(),
        }
    }
}

/// A call of a member of ours, who sends a recording, and a page.
struct Meeting {
    call: Call,
    events: Events,
    page: Arc<MeshPage>,
    /// The types of the messages that the member sent, and of those that the page sent.
    carried: Arc<Mutex<[Vec<String>; 2]>>,
    user: String,
    _tasks: JoinSet<()>,
    _sessions: [Session; 2],
    _browser: Browser,
    _homeserver: DevHomeserver,
    // Last: the folders must outlive the sessions.
    _stores: [tempfile::TempDir; 2],
}

/// How the page joins.
struct Join {
    program: Program,
    /// The page's user, which sorts before or after `member`: the greater one calls.
    user: &'static str,
    sources: &'static [&'static str],
    bidirectional: bool,
}

impl Meeting {
    async fn begin(join: Join) -> Self {
        let browser = join.program.start().await;
        println!("{:?} {}", join.program, browser.version().await.unwrap());
        let homeserver = DevHomeserver::start(Options::default()).await.unwrap();
        for user in ["member", join.user] {
            homeserver.register_user(user, "pw").unwrap();
        }
        let (ours, our_store) = log_in(homeserver.url(), "member").await;
        let (theirs, their_store) = log_in(homeserver.url(), join.user).await;
        let room = create_clear_call_room(&ours).await;
        enter(&theirs, &room).await;
        let options =
            CallOptions::default().with_bind(Bind::Addresses(vec![SocketAddr::from(([127, 0, 0, 1], 0))]));
        let (call, events) = ours.join_call(&room, options).await.unwrap();
        assert!(!call.is_encrypted());
        let mut tasks = JoinSet::new();
        for name in ["alice.ivf", "alice.ogg"] {
            play(&call, name, &mut tasks).await;
        }

        let port = theirs.room(&room, TrustPolicy::CrossSigned).unwrap();
        let member = member_of(&port, ours.client().user_id().unwrap().as_str()).await;
        let us = MeshParty {
            user_id: port.device().user_id.to_string(),
            device_id: port.device().device_id.to_string(),
            session_id: SESSION.to_owned(),
        };
        let user = us.user_id.clone();
        let page = MeshJoin {
            us,
            them: member.clone(),
            room: room.to_string(),
            slot: "m.call#ROOM".to_owned(),
            sources: join.sources.iter().map(|source| (*source).to_owned()).collect(),
            bidirectional: join.bidirectional,
        };
        let page = Arc::new(browser.mesh_page(page).await.unwrap());
        let carried = Arc::<Mutex<[Vec<String>; 2]>>::default();
        publish_membership(&port).await;
        tasks.spawn(carry(port, member, page.clone(), carried.clone()));
        Self {
            call,
            events: Events::of(events),
            page,
            carried,
            user,
            _tasks: tasks,
            _sessions: [ours, theirs],
            _browser: browser,
            _homeserver: homeserver,
            _stores: [our_store, their_store],
        }
    }

    fn tracks(&self) -> Vec<TrackSummary> {
        let tracks = self.call.tracks().into_iter();
        tracks.filter(|track| track.from.member.user_id == self.user).collect()
    }

    /// Awaits that both see and hear each other anew: so many tracks of each kind from the page, and two of the member.
    async fn exchange(&mut self, what: &str, microphones: usize, cameras: usize) {
        let fail = async |meeting: &Self, what: &str| -> ! {
            let (stats, report) = (meeting.page.stats().await, meeting.call.report().await);
            let carried = meeting.carried.lock().unwrap().clone();
            panic!("{what}: {:#?}, {stats:#?}, {carried:?}, {report:#?}", meeting.tracks());
        };
        let before = self.page.stats().await.unwrap();
        let heard = |stats: &MeshStats| {
            stats.connection == "connected"
                && stats.frames_decoded() >= before.frames_decoded() + 30
                && stats.samples_decoded() >= before.samples_decoded() + 48_000
                && stats.audio_energy() > before.audio_energy()
        };
        let stats = self.page.until(what, LIMIT, heard).await;
        let Ok(stats) = stats else { fail(self, &format!("the page does not see the member, {what}")).await };
        assert_eq!(stats.errors, Vec::<String>::new(), "{what}");
        let opened = |meeting: &Self| -> Vec<_> {
            meeting.tracks().iter().map(|t| (t.from.track.sid.clone(), t.stats.opened)).collect()
        };
        let before = opened(self);
        let new = |meeting: &Self, source: TrackSource| {
            let tracks = meeting.tracks();
            let lively = tracks.iter().filter(|track| {
                let sid = &track.from.track.sid;
                let before = before.iter().find(|(before, _)| before == sid).map_or(0, |(_, count)| *count);
                track.from.track.source == source && track.stats.opened >= before + 10
            });
            lively.count()
        };
        let waiting = async {
            while new(self, TrackSource::Microphone) < microphones || new(self, TrackSource::Camera) < cameras
            {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        if tokio::time::timeout(LIMIT, waiting).await.is_err() {
            fail(self, &format!("the member does not see the page, {what}")).await;
        }
        assert_eq!(self.tracks().len(), microphones + cameras, "{:#?}", self.tracks());
        println!("{what}: {:?} {:?}", stats.inbound, stats.outbound);
    }

    /// A message each way on both data channels.
    async fn exchange_data(&mut self) {
        for (reliable, reliability) in [(true, Reliability::Reliable), (false, Reliability::Lossy)] {
            let text = format!("from the page, {reliability:?}");
            self.page.send_data(reliable, "greeting", &text).await.unwrap();
            let is_it = |event: &CallEvent| {
                matches!(event, CallEvent::Data { reliability: by, message, .. }
                    if *by == reliability && message.payload == text.as_bytes()
                        && message.topic.as_deref() == Some("greeting"))
            };
            self.events.until("data of the page", LIMIT, is_it).await;
            let text = format!("from the member, {reliability:?}");
            let message = UserData { payload: text.clone().into_bytes(), topic: None };
            self.call.send_data(reliability, &[], message).await.unwrap();
            let has_it = |stats: &MeshStats| stats.data.iter().any(|data| data.contains(&text));
            self.page.until("data of the member", LIMIT, has_it).await.unwrap();
        }
    }

    async fn mute_and_unmute(&mut self) {
        for muted in [true, false] {
            self.page.set_muted("camera", muted).await.unwrap();
            until("told that the camera is muted or not", LIMIT, async || {
                let tracks = self.tracks();
                tracks
                    .iter()
                    .any(|t| t.from.track.source == TrackSource::Camera && t.from.track.muted == muted)
            })
            .await;
        }
    }

    /// The page publishes two cameras more: one too many for the sections of the first offer.
    async fn publish_later(&mut self, cameras: usize) {
        self.page.publish_later(&["camera", "camera"]).await.unwrap();
        self.exchange("with cameras that were added later", 1, cameras + 2).await;
    }

    fn carried(&self, by_page: usize) -> Vec<String> {
        self.carried.lock().unwrap()[by_page].clone()
    }
}

async fn page_calls(program: Program, bidirectional: bool) {
    let join = Join { program, user: "page", sources: &["microphone", "camera"], bidirectional };
    let mut meeting = Meeting::begin(join).await;
    meeting.exchange("the page called", 1, 1).await;
    assert!(meeting.page.stats().await.unwrap().caller);
    meeting.exchange_data().await;
    meeting.mute_and_unmute().await;
    meeting.publish_later(1).await;
    // The member's later track: it has to ask for a section.
    play(&meeting.call, "bob.ivf", &mut meeting._tasks).await;
    meeting.until_pictures(2).await;
    meeting.page.hang_up().await.unwrap();
    until("rid of the page's tracks", LIMIT, async || meeting.tracks().is_empty()).await;
    meeting.call.leave().await;
}

async fn page_is_called(program: Program) {
    let join = Join { program, user: "browser", sources: &["microphone"], bidirectional: false };
    let mut meeting = Meeting::begin(join).await;
    meeting.exchange("the member called", 1, 0).await;
    assert!(!meeting.page.stats().await.unwrap().caller);
    meeting.exchange_data().await;
    meeting.publish_later(0).await;
    assert!(meeting.carried(1).contains(&"m.call.sdp_stream_metadata_changed".to_owned()));
    assert!(meeting.carried(0).contains(&"m.call.negotiate".to_owned()));
    play(&meeting.call, "bob.ivf", &mut meeting._tasks).await;
    meeting.until_pictures(2).await;
    let page = meeting.page.clone();
    meeting.call.leave().await;
    let ended = page.until("the end", LIMIT, |stats| stats.ended.as_deref() == Some("user_hangup")).await;
    assert!(ended.is_ok(), "{ended:?}; {:?}", meeting.carried.lock().unwrap());
}

impl Meeting {
    /// Awaits that the page decodes so many tracks of the member's.
    async fn until_pictures(&self, count: usize) {
        let decoded = |stats: &MeshStats| {
            stats.inbound.iter().filter(|track| track.kind == "video" && track.frames_decoded >= 10).count()
                >= count
        };
        self.page.until("the member's later picture", LIMIT, decoded).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn chromium_calls_a_member() {
    require!(Peer::Chromium, Peer::Npm, Peer::LoopbackOnly);
    let _turn = turn().await;
    page_calls(Program::Chromium, false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn chromium_calls_a_member_with_sections_for_both_directions() {
    require!(Peer::Chromium, Peer::Npm, Peer::LoopbackOnly);
    let _turn = turn().await;
    page_calls(Program::Chromium, true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn chromium_is_called_by_a_member() {
    require!(Peer::Chromium, Peer::Npm, Peer::LoopbackOnly);
    let _turn = turn().await;
    page_is_called(Program::Chromium).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn firefox_calls_a_member() {
    require!(Peer::Firefox, Peer::Npm, Peer::LoopbackOnly);
    let _turn = turn().await;
    page_calls(Program::Firefox, false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn firefox_is_called_by_a_member() {
    require!(Peer::Firefox, Peer::Npm, Peer::LoopbackOnly);
    let _turn = turn().await;
    page_is_called(Program::Firefox).await;
}

async fn create_clear_call_room(creator: &Session) -> OwnedRoomId {
    let levels = json!({ "events": { MEMBERSHIP: 0 } }).to_string();
    let mut request = create_room::v3::Request::new();
    request.preset = Some(create_room::v3::RoomPreset::PublicChat);
    request.power_level_content_override =
        Some(Raw::<RoomPowerLevelsEventContent>::from_json_string(levels).unwrap().cast_unchecked());
    let id = creator.client().create_room(request).await.unwrap().room_id().to_owned();
    enter(creator, &id).await;
    id
}

async fn enter(session: &Session, id: &RoomId) {
    let client = session.client();
    client.join_room_by_id_or_alias(id.into(), &[]).await.unwrap();
    until("in the room", LIMIT, async || {
        client.get_room(id).is_some_and(|room| room.state() == RoomState::Joined)
    })
    .await;
}

/// Publishes a recording of the examples and plays it, over and over.
async fn play(call: &Call, name: &str, tasks: &mut JoinSet<()>) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/media");
    let recording = Recording::open(folder.join(name)).unwrap();
    let track = call.publish(recording.track()).await.unwrap();
    tasks.spawn(async move {
        let start = tokio::time::Instant::now();
        for frame in recording.looped() {
            tokio::time::sleep_until(start + frame.timestamp).await;
            track.write(&frame).unwrap();
        }
    });
}

/// The member as its membership names it.
async fn member_of(port: &SdkRoom, user: &str) -> MeshParty {
    let found = Mutex::new(None);
    until("a mesh membership", LIMIT, async || {
        let view = port.room_view().await.unwrap();
        let of_member = view.members.iter().find(|event| event.sender == user);
        let transports = of_member.and_then(|event| event.content["foci_preferred"].as_array());
        let mesh = transports.into_iter().flatten().find(|entry| entry["type"] == "dev.antiphon.mesh");
        let Some((event, mesh)) = of_member.zip(mesh) else { return false };
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        *found.lock().unwrap() = Some(MeshParty {
            user_id: user.to_owned(),
            device_id: text(&event.content["device_id"]),
            session_id: text(&mesh["session_id"]),
        });
        true
    })
    .await;
    found.into_inner().unwrap().unwrap()
}

async fn publish_membership(port: &SdkRoom) {
    let device = port.device();
    let content = json!({
        "application": "m.call", "call_id": "", "scope": "m.room", "device_id": device.device_id,
        "membershipID": format!("{}:{}", device.user_id, device.device_id), "expires": 14_400_000,
        "focus_active": { "type": "livekit", "focus_selection": "multi_sfu" },
        "foci_preferred": [{ "type": "dev.antiphon.mesh", "session_id": SESSION }],
    });
    let target = EventTarget::State { key: format!("_{}_{}_m.call", device.user_id, device.device_id) };
    let event = EventWrite { event_type: MEMBERSHIP.to_owned(), target, content };
    port.perform(MatrixRequest::Send(event), LIMIT).await.unwrap();
}

/// Carries messages between the page and the member's device.
async fn carry(port: SdkRoom, member: MeshParty, page: Arc<MeshPage>, carried: Arc<Mutex<[Vec<String>; 2]>>) {
    let mut updates = port.updates().await;
    let recipient = Device {
        user_id: member.user_id.as_str().try_into().unwrap(),
        device_id: member.device_id.as_str().into(),
    };
    loop {
        let mut incoming = Vec::new();
        while let Ok(update) = updates.try_recv() {
            let MatrixUpdate::ToDevice(event) = update else { continue };
            if !event.event_type.starts_with("m.call.") {
                continue;
            }
            let from = event.olm.and_then(|olm| olm.device_id);
            assert_eq!(from.as_ref(), Some(&recipient.device_id), "not encrypted by the member's device");
            carried.lock().unwrap()[0].push(event.event_type.clone());
            incoming.push(MeshMessage { event_type: event.event_type, content: event.content });
        }
        let outgoing = page.exchange(&incoming).await.unwrap();
        for MeshMessage { event_type, content } in outgoing {
            carried.lock().unwrap()[1].push(event_type.clone());
            let (outcomes, mut outcome) = mpsc::channel(1);
            let batch = ToDeviceBatch { event_type, content, recipients: vec![recipient.clone()] };
            port.send_to_device(batch, outcomes).await;
            outcome.recv().await.unwrap().1.unwrap();
        }
        tokio::time::sleep(CARRY_EVERY).await;
    }
}
