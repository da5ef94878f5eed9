//! The LiveKit transport against the real LiveKit server: what one member sends arrives at the other byte for
//! byte, and everything that ends or breaks is told.
//!
//! Needs a network namespace with nothing but loopback, as WebRTC gathers every address it finds.
#![allow(clippy::disallowed_methods, reason = "a test is a shell: it starts the tasks that send")]

use std::{
    collections::BTreeSet,
    net::TcpListener,
    path::PathBuf,
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Duration,
};

use antiphon_call_sdk::{
    media::{Codec, TrackSource, TrackSpec},
    member::ParticipantIdentity,
    transport::{
        LocalTrackId, MediaTransport, RemoteTrack, TrackSid, TransportError, TransportEvent, WireFrame,
        livekit::{ConnectOptions, LiveKitTransport},
    },
};
use antiphon_testkit::{peers::Peer, require};
use bytes::Bytes;
use livekit_api::{
    access_token::{AccessToken, VideoGrants},
    services::room::RoomClient,
};
use tokio::{sync::mpsc, task::JoinHandle, time::timeout};

const PATIENCE: Duration = Duration::from_secs(40);
const SECRET: &str = "secretsecretsecretsecretsecretsecret";

#[tokio::test(flavor = "multi_thread")]
async fn what_one_member_sends_arrives_at_the_other() {
    require!(Peer::LiveKit, Peer::LoopbackOnly);
    let server = Server::start().await;
    let mut alice = Member::enter(&server, "alice").await;
    let mut bob = Member::enter(&server, "bob").await;
    let (alice_sends, bob_sends) = (Sending::start(&alice, true).await, Sending::start(&bob, true).await);
    for (member, other) in [(&mut alice, "bob"), (&mut bob, "alice")] {
        member.until(joined(other)).await;
        for (source, codec) in [(TrackSource::Microphone, Codec::Opus), (TrackSource::Camera, Codec::Vp8)] {
            let track = member.until(published(other, source)).await;
            assert!(track.announced_encrypted && !track.muted);
            assert_eq!(track.codec, Some(codec));
            member.receive(other, &track.sid, codec, 40).await;
        }
    }
    assert_eq!(alice.transport.statistics().incoming_dropped, 0);
    alice_sends.stop().await;
    bob_sends.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_frame_request_reaches_the_sender() {
    require!(Peer::LiveKit, Peer::LoopbackOnly);
    let server = Server::start().await;
    let mut alice = Member::enter(&server, "alice").await;
    let mut bob = Member::enter(&server, "bob").await;
    let sending = Sending::start(&alice, false).await;
    let camera = bob.until(published("alice", TrackSource::Camera)).await;
    bob.receive("alice", &camera.sid, Codec::Vp8, 30).await;
    alice.forget();
    let wanted = sending.camera;
    let asking = async {
        loop {
            bob.transport.request_key_frame(&camera.sid).await;
            tokio::time::sleep(Duration::from_millis(600)).await;
        }
    };
    tokio::select! {
        () = asking => {}
        () = alice.until(|event| (*event == TransportEvent::KeyFrameRequested { track: wanted }).then_some(())) => {}
    }
    sending.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn mute_end_and_leave_are_seen() {
    require!(Peer::LiveKit, Peer::LoopbackOnly);
    let server = Server::start().await;
    let alice = Member::enter(&server, "alice").await;
    let mut bob = Member::enter(&server, "bob").await;
    // Encrypted tracks, as the SFU then marks the silence that it plays on mute, and the transport drops it.
    let mut sending = Sending::start(&alice, true).await;
    let microphone = bob.until(published("alice", TrackSource::Microphone)).await;
    let mut camera = bob.until(published("alice", TrackSource::Camera)).await;
    bob.receive("alice", &microphone.sid, Codec::Opus, 5).await;

    alice.transport.set_muted(sending.microphone, true).await;
    bob.until(muted(&microphone.sid, true)).await;
    alice.transport.set_muted(sending.microphone, false).await;
    bob.until(muted(&microphone.sid, false)).await;
    bob.forget();
    bob.receive("alice", &microphone.sid, Codec::Opus, 5).await;

    // The SFU uses the media section of an ended track again; three rounds find an engine that does not.
    for _ in 0..3 {
        bob.receive("alice", &camera.sid, Codec::Vp8, 5).await;
        alice.transport.unpublish(sending.camera).await;
        let ended = bob.until(|event| match event {
            TransportEvent::TrackEnded { sid, .. } => Some(sid.clone()),
            _ => None,
        });
        assert_eq!(ended.await, camera.sid);
        assert!(matches!(
            alice.transport.send(sending.camera, opus(0)).await,
            Err(TransportError::UnknownTrack)
        ));
        sending.camera_again(&alice).await;
        camera = bob.until(published("alice", TrackSource::Camera)).await;
    }
    bob.receive("alice", &camera.sid, Codec::Vp8, 5).await;

    sending.stop().await;
    alice.transport.close().await;
    let left = bob.until(|event| match event {
        TransportEvent::ParticipantLeft { identity } => Some(identity.0.clone()),
        _ => None,
    });
    assert_eq!(left.await, "alice");
    let last = alice.all().await.pop();
    assert!(matches!(last, Some(TransportEvent::Disconnected { .. })), "{last:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_sfu_is_found_again_and_tracks_are_back() {
    require!(Peer::LiveKit, Peer::LoopbackOnly);
    let mut server = Server::start().await;
    let mut alice = Member::enter(&server, "alice").await;
    let mut bob = Member::enter(&server, "bob").await;
    let sending = Sending::start(&alice, true).await;
    let camera = bob.until(published("alice", TrackSource::Camera)).await;
    bob.receive("alice", &camera.sid, Codec::Vp8, 5).await;
    server.restart().await;
    for member in [&mut alice, &mut bob] {
        member.until(|event| (*event == TransportEvent::Reconnecting).then_some(())).await;
        member.until(|event| (*event == TransportEvent::Reconnected).then_some(())).await;
    }
    let camera = bob.again(published("alice", TrackSource::Camera), |track| track.sid != camera.sid).await;
    bob.receive("alice", &camera.sid, Codec::Vp8, 5).await;
    sending.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removed_member_does_not_come_back() {
    require!(Peer::LiveKit, Peer::LoopbackOnly);
    let server = Server::start().await;
    let mut alice = Member::enter(&server, "alice").await;
    let admin = RoomClient::with_api_key(&server.http_url(), "devkey", SECRET);
    let sending = Sending::start(&alice, false).await;
    admin.remove_participant("room", "alice").await.unwrap();
    let reason = alice.until(|event| match event {
        TransportEvent::Disconnected { reason } => Some(reason.clone()),
        event => (*event == TransportEvent::Reconnecting).then(|| "came back".to_owned()),
    });
    assert!(reason.await.contains("PARTICIPANT_REMOVED"));
    assert!(matches!(alice.transport.send(sending.camera, opus(0)).await, Err(TransportError::Closed)));
    sending.stop().await;
}

#[tokio::test]
async fn refusals_say_why() {
    require!(Peer::LiveKit, Peer::LoopbackOnly);
    let server = Server::start().await;
    let refused = async |url: &str, token: String| {
        LiveKitTransport::connect(ConnectOptions::new(url, token)).await.map(drop).unwrap_err()
    };
    let error =
        refused(&server.url(), server.token_signed_by("room", "eve", true, "another".repeat(6).as_str()))
            .await;
    assert!(matches!(error, TransportError::Unauthorised { status: 401, .. }), "{error:?}");
    let error = refused(&server.url(), server.token("nowhere", "eve", false)).await;
    assert!(matches!(error, TransportError::RoomCreationRestricted), "{error:?}");
    let nobody = format!("ws://127.0.0.1:{}", free_port());
    let error =
        timeout(Duration::from_secs(5), refused(&nobody, server.token("room", "eve", true))).await.unwrap();
    assert!(matches!(error, TransportError::Signal(_)), "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn other_codecs_are_refused_before_the_sfu_is_asked() {
    require!(Peer::LiveKit, Peer::LoopbackOnly);
    let server = Server::start().await;
    let alice = Member::enter(&server, "alice").await;
    let spec = TrackSpec { codec: Codec::Av1, ..TrackSpec::camera(64, 64) };
    let error = alice.transport.publish(spec, false).await.unwrap_err();
    assert!(matches!(error, TransportError::UnsupportedCodec(Codec::Av1)));
}

/// One member in the SFU room, and what their transport said so far.
struct Member {
    transport: Arc<LiveKitTransport>,
    events: mpsc::Receiver<TransportEvent>,
    seen: Vec<TransportEvent>,
}

impl Member {
    async fn enter(server: &Server, identity: &str) -> Self {
        let options = ConnectOptions::new(server.url(), server.token("room", identity, true));
        let (transport, events) = LiveKitTransport::connect(options).await.unwrap();
        Self { transport, events, seen: Vec::new() }
    }

    /// The first event that `wanted` takes, from those that came already or will come; it is taken out.
    async fn until<T>(&mut self, mut wanted: impl FnMut(&TransportEvent) -> Option<T>) -> T {
        for index in 0..self.seen.len() {
            if let Some(found) = wanted(&self.seen[index]) {
                self.seen.remove(index);
                return found;
            }
        }
        timeout(PATIENCE, async {
            loop {
                let event = self.events.recv().await.expect("the transport ended");
                match wanted(&event) {
                    Some(found) => return found,
                    None => self.seen.push(event),
                }
            }
        })
        .await
        .unwrap_or_else(|_| panic!("nothing of the wanted kind among {}", summary(&self.seen)))
    }

    async fn again<T>(
        &mut self,
        mut wanted: impl FnMut(&TransportEvent) -> Option<T>,
        fits: impl Fn(&T) -> bool,
    ) -> T {
        self.until(|event| wanted(event).filter(&fits)).await
    }

    /// Waits for `count` frames of a track and compares each with what was sent under its number.
    async fn receive(&mut self, from: &str, sid: &TrackSid, codec: Codec, count: usize) {
        let mut numbers = BTreeSet::new();
        while numbers.len() < count {
            let (payload, of) = self
                .until(|event| match event {
                    TransportEvent::Frame { identity, sid: of, codec, frame } if of == sid => {
                        assert_eq!(identity.0, from);
                        Some((frame.payload.clone(), *codec))
                    }
                    _ => None,
                })
                .await;
            assert_eq!(of, codec);
            let number = number_in(&payload, codec);
            let sent = if codec.is_audio() { opus(number) } else { vp8(number) };
            assert_eq!(payload, sent.payload, "frame {number} arrived changed");
            assert!(numbers.insert(number), "frame {number} arrived twice");
        }
    }

    fn forget(&mut self) {
        self.seen.clear();
        while self.events.try_recv().is_ok() {}
    }

    /// Everything that still comes, to the end of the transport.
    async fn all(mut self) -> Vec<TransportEvent> {
        timeout(PATIENCE, async {
            while let Some(event) = self.events.recv().await {
                self.seen.push(event);
            }
        })
        .await
        .unwrap();
        self.seen
    }
}

fn summary(events: &[TransportEvent]) -> String {
    let frames = events.iter().filter(|event| matches!(event, TransportEvent::Frame { .. })).count();
    let others: Vec<_> =
        events.iter().filter(|event| !matches!(event, TransportEvent::Frame { .. })).collect();
    format!("{frames} frames and {others:?}")
}

fn joined(who: &str) -> impl FnMut(&TransportEvent) -> Option<()> {
    let event = TransportEvent::ParticipantJoined { identity: ParticipantIdentity(who.to_owned()) };
    move |present| (*present == event).then_some(())
}

fn published(who: &str, source: TrackSource) -> impl FnMut(&TransportEvent) -> Option<RemoteTrack> {
    move |event| match event {
        TransportEvent::TrackUpdated { identity, track } if identity.0 == who && track.source == source => {
            Some(track.clone())
        }
        _ => None,
    }
}

fn muted(wanted: &TrackSid, state: bool) -> impl FnMut(&TransportEvent) -> Option<()> {
    move |event| match event {
        TransportEvent::TrackUpdated { track, .. } => {
            (track.sid == *wanted && track.muted == state).then_some(())
        }
        _ => None,
    }
}

/// A member's microphone (50 frames a second) and camera (25), until stopped.
struct Sending {
    microphone: LocalTrackId,
    camera: LocalTrackId,
    stop: Arc<AtomicBool>,
    tasks: Vec<JoinHandle<()>>,
}

impl Sending {
    async fn start(member: &Member, encrypted: bool) -> Self {
        let microphone = member.transport.publish(TrackSpec::microphone(), encrypted).await.unwrap();
        let camera = member.transport.publish(TrackSpec::camera(640, 360), encrypted).await.unwrap();
        let mut sending = Self { microphone, camera, stop: Arc::default(), tasks: Vec::new() };
        sending.feed(member, microphone, Duration::from_millis(20), opus);
        sending.feed(member, camera, Duration::from_millis(40), vp8);
        sending
    }

    async fn camera_again(&mut self, member: &Member) {
        self.camera = member.transport.publish(TrackSpec::camera(640, 360), true).await.unwrap();
        self.feed(member, self.camera, Duration::from_millis(40), vp8);
    }

    fn feed(&mut self, member: &Member, track: LocalTrackId, every: Duration, frame: fn(u32) -> WireFrame) {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let (transport, stop) = (Arc::clone(&member.transport), Arc::clone(&self.stop));
        self.tasks.push(tokio::spawn(async move {
            let mut ticks = tokio::time::interval(every);
            while !stop.load(Ordering::Relaxed) {
                ticks.tick().await;
                let number = NUMBER.fetch_add(1, Ordering::Relaxed);
                if transport.send(track, frame(number)).await.is_err() {
                    return;
                }
            }
        }));
    }

    async fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        for task in self.tasks {
            task.await.unwrap();
        }
    }
}

/// An Opus-sized frame that carries its number.
fn opus(number: u32) -> WireFrame {
    let mut payload = number.to_be_bytes().to_vec();
    payload.extend((0..60 + number % 100).map(|i| (i * 7 + number) as u8));
    WireFrame { payload: payload.into(), rtp_timestamp: number.wrapping_mul(960) }
}

/// A VP8-like frame that carries its number: every tenth a key frame with a real header (RFC 6386 §9.1) of
/// 640×360 and 20 kB, the others up to 5 kB. The rest is noise, as in a sealed frame.
fn vp8(number: u32) -> WireFrame {
    let key = number.is_multiple_of(10);
    let mut payload = if key {
        vec![0x10, 0x02, 0x00, 0x9d, 0x01, 0x2a, 0x80, 0x02, 0x68, 0x01]
    } else {
        vec![0x11, 0x02, 0x00]
    };
    payload.extend(number.to_be_bytes());
    let size = if key { 20_000 } else { number * 613 % 5000 };
    payload.extend((0..size).map(|i| (i * 31 + number) as u8));
    WireFrame { payload: payload.into(), rtp_timestamp: number.wrapping_mul(3600) }
}

fn number_in(payload: &Bytes, codec: Codec) -> u32 {
    let at = if codec.is_audio() {
        0
    } else if payload[0] & 1 == 0 {
        10
    } else {
        3
    };
    u32::from_be_bytes(payload[at..at + 4].try_into().unwrap())
}

/// A LiveKit server of its own for a test: unlike the testkit's, it can be restarted on the same port.
struct Server {
    binary: PathBuf,
    port: u16,
    folder: tempfile::TempDir,
    process: tokio::process::Child,
}

impl Server {
    async fn start() -> Self {
        let binary = Peer::LiveKit.find().unwrap();
        let (port, udp, tcp) = (free_port(), free_port(), free_port());
        let folder = tempfile::tempdir().unwrap();
        let config = format!(
            "port: {port}\nbind_addresses: ['127.0.0.1']\n\
             rtc: {{udp_port: {udp}, tcp_port: {tcp}, use_external_ip: false, enable_loopback_candidate: true, \
             node_ip: 127.0.0.1, interfaces: {{includes: [lo]}}}}\n\
             keys: {{devkey: {SECRET}}}\nroom: {{auto_create: false}}\n"
        );
        std::fs::write(folder.path().join("lk.yaml"), config).unwrap();
        let process = Self::spawn(&binary, &folder);
        let mut server = Self { binary, port, folder, process };
        server.ready().await;
        server
    }

    fn spawn(binary: &PathBuf, folder: &tempfile::TempDir) -> tokio::process::Child {
        let log =
            std::fs::OpenOptions::new().create(true).append(true).open(folder.path().join("log")).unwrap();
        tokio::process::Command::new(binary)
            .args(["--config", "lk.yaml"])
            .current_dir(folder.path())
            .stdout(Stdio::from(log.try_clone().unwrap()))
            .stderr(Stdio::from(log))
            .kill_on_drop(true)
            .spawn()
            .unwrap()
    }

    async fn ready(&mut self) {
        let http = reqwest::Client::builder().no_proxy().build().unwrap();
        let answered = async {
            while !http.get(self.http_url()).send().await.is_ok_and(|answer| answer.status().is_success()) {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        timeout(PATIENCE, answered).await.unwrap();
    }

    async fn restart(&mut self) {
        self.process.kill().await.unwrap();
        self.process = Self::spawn(&self.binary, &self.folder);
        self.ready().await;
    }

    fn url(&self) -> String {
        format!("ws://127.0.0.1:{}", self.port)
    }

    fn http_url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    fn token(&self, room: &str, identity: &str, create: bool) -> String {
        self.token_signed_by(room, identity, create, SECRET)
    }

    fn token_signed_by(&self, room: &str, identity: &str, create: bool, secret: &str) -> String {
        AccessToken::with_api_key("devkey", secret)
            .with_identity(identity)
            .with_grants(VideoGrants {
                room: room.to_owned(),
                room_join: true,
                room_create: create,
                can_publish: Some(true),
                can_subscribe: Some(true),
                ..Default::default()
            })
            .to_jwt()
            .unwrap()
    }
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}
