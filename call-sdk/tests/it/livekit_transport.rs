//! The LiveKit transport against the real LiveKit server: frames arrive at the other member byte for byte, and
//! everything that ends or breaks is reported.
//!
//! Needs a network namespace with nothing but loopback, as WebRTC gathers every address it finds.
#![allow(clippy::disallowed_methods, reason = "a test is a shell: it starts the tasks that send")]

mod turn;

use std::{
    collections::BTreeSet,
    net::TcpListener,
    path::PathBuf,
    process::Stdio,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use antiphon_call_sdk::{
    Codec, FrameBytes, KeyIndex, ParticipantIdentity, TrackSource, TrackSpec, VideoLayer,
    frame_crypto::SealedData,
    tls::{ExtraRoots, TlsOptions, client_config},
    transport::{
        ConnectStage, DataBody, DataPacket, DisconnectReason, FrameReceiver, LocalTrackId, MediaTransport,
        Outlet, ReceivedFrame, Reliability, RemoteTrack, Subscription, TrackSid, TransportError,
        TransportEvent, UserData, WireFrame,
        livekit::{Bind, ConnectOptions, IceServer, LiveKitTransport},
    },
};
use antiphon_testkit::{peers::Peer, require};
use livekit_api::{
    access_token::{AccessToken, VideoGrants},
    services::room::RoomClient,
};
use tokio::{
    io::AsyncWriteExt as _,
    sync::mpsc,
    task::{JoinHandle, JoinSet},
    time::timeout,
};

const PATIENCE: Duration = Duration::from_secs(40);
const SECRET: &str = "secretsecretsecretsecretsecretsecret";
const MICROPHONE: LocalTrackId = LocalTrackId(1);
const CAMERA: LocalTrackId = LocalTrackId(2);

#[tokio::test(flavor = "multi_thread")]
async fn frames_arrive_unchanged_with_one_peer_connection() {
    frames_arrive_unchanged(true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn frames_arrive_unchanged_with_two_peer_connections() {
    frames_arrive_unchanged(false).await;
}

async fn frames_arrive_unchanged(single_peer_connection: bool) {
    require!(Peer::LiveKit, Peer::LoopbackOnly);
    let server = Server::start().await;
    let options = |identity| ConnectOptions {
        single_peer_connection,
        ..ConnectOptions::new(server.url(), server.token("room", identity, true))
    };
    let mut alice = Member::enter_with(options("alice")).await;
    let mut bob = Member::enter_with(options("bob")).await;
    let (alice_sends, bob_sends) = (Sending::start(&alice, true).await, Sending::start(&bob, true).await);
    for (member, other) in [(&mut alice, "bob"), (&mut bob, "alice")] {
        member.until(joined(other)).await;
        for (source, codec) in [(TrackSource::Microphone, Codec::Opus), (TrackSource::Camera, Codec::Vp8)] {
            let track = member.until(published(other, source)).await;
            assert!(track.announced_encrypted && !track.muted);
            assert_eq!(track.codec, Some(codec));
            member.receive(&track.sid, codec, 40).await;
        }
    }
    alice_sends.stop().await;
    bob_sends.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn key_frame_request_reaches_the_sender() {
    require!(Peer::LiveKit, Peer::LoopbackOnly);
    let server = Server::start().await;
    let mut alice = Member::enter(&server, "alice").await;
    let mut bob = Member::enter(&server, "bob").await;
    let sending = Sending::start(&alice, false).await;
    let camera = bob.until(published("alice", TrackSource::Camera)).await;
    bob.receive(&camera.sid, Codec::Vp8, 30).await;
    alice.forget();
    let asking = async {
        loop {
            bob.transport.request_key_frame(&camera.sid);
            tokio::time::sleep(Duration::from_millis(600)).await;
        }
    };
    let wanted = TransportEvent::KeyFrameRequested { track: CAMERA, layer: 0 };
    tokio::select! {
        () = asking => {}
        () = alice.until(|event| (*event == wanted).then_some(())) => {}
    }
    sending.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn member_is_found_to_speak_by_the_level_that_it_tells() {
    require!(Peer::LiveKit, Peer::LoopbackOnly);
    let server = Server::start().await;
    let alice = Member::enter(&server, "alice").await;
    let mut bob = Member::enter(&server, "bob").await;
    let microphone = alice.transport.publish(MICROPHONE, TrackSpec::microphone(), true).await.unwrap();
    let mut sending = Sending { stop: Arc::default(), tasks: Vec::new() };
    sending.feed(microphone, Duration::from_millis(20), |number| WireFrame {
        audio_level: Some(20),
        ..opus(number)
    });
    let speaks = |event: &TransportEvent| match event {
        TransportEvent::Speakers(speakers) => speakers.first().map(|speaker| speaker.identity.clone()),
        _ => None,
    };
    assert_eq!(bob.until(speaks).await, ParticipantIdentity("alice".to_owned()));
    sending.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn server_without_v1_is_joined_by_v0() {
    require!(Peer::LiveKit, Peer::LoopbackOnly);
    let server = Server::start().await;
    let proxy = Proxy::without_v1(server.port).await;
    let options = ConnectOptions::new(proxy.url(), server.token("room", "alice", true));
    let mut alice = Member::enter_with(options).await;
    let bob = Member::enter(&server, "bob").await;
    let sending = Sending::start(&bob, false).await;
    let track = alice.until(published("bob", TrackSource::Camera)).await;
    alice.receive(&track.sid, Codec::Vp8, 5).await;
    sending.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn mute_end_and_leave_are_reported_with_one_peer_connection() {
    mute_end_and_leave_are_reported(true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn mute_end_and_leave_are_reported_with_two_peer_connections() {
    mute_end_and_leave_are_reported(false).await;
}

async fn mute_end_and_leave_are_reported(single_peer_connection: bool) {
    require!(Peer::LiveKit, Peer::LoopbackOnly);
    let server = Server::start().await;
    let options = |identity| ConnectOptions {
        single_peer_connection,
        ..ConnectOptions::new(server.url(), server.token("room", identity, true))
    };
    let alice = Member::enter_with(options("alice")).await;
    let mut bob = Member::enter_with(options("bob")).await;
    // Encrypted tracks: the SFU then marks the silence that it plays on mute.
    let mut sending = Sending::start(&alice, true).await;
    let microphone = bob.until(published("alice", TrackSource::Microphone)).await;
    let mut camera = bob.until(published("alice", TrackSource::Camera)).await;
    let frames = bob.receive(&microphone.sid, Codec::Opus, 5).await;
    assert!(frames.trailer().is_some_and(|trailer| !trailer.is_empty()));

    alice.transport.set_muted(MICROPHONE, true);
    bob.until(muted(&microphone.sid, true)).await;
    alice.transport.set_muted(MICROPHONE, false);
    bob.until(muted(&microphone.sid, false)).await;
    bob.receive(&microphone.sid, Codec::Opus, 5).await;

    // The SFU uses the media section of an ended track again; three rounds find an engine that does not.
    for _ in 0..3 {
        bob.receive(&camera.sid, Codec::Vp8, 5).await;
        alice.transport.unpublish(CAMERA);
        let ended = bob.until(|event| match event {
            TransportEvent::TrackEnded { sid, .. } => Some(sid.clone()),
            _ => None,
        });
        assert_eq!(ended.await, camera.sid);
        sending.camera_again(&alice).await;
        camera = bob.until(published("alice", TrackSource::Camera)).await;
    }
    bob.receive(&camera.sid, Codec::Vp8, 5).await;

    sending.stop().await;
    alice.transport.close().await;
    let left = bob.until(|event| match event {
        TransportEvent::ParticipantLeft { identity } => Some(identity.0.clone()),
        _ => None,
    });
    assert_eq!(left.await, "alice");
    let last = alice.all().await.pop();
    assert_eq!(last, Some(TransportEvent::Disconnected(DisconnectReason::Closed)));
}

#[tokio::test(flavor = "multi_thread")]
async fn more_tracks_arrive_than_the_first_offer_has_room_for() {
    require!(Peer::LiveKit, Peer::LoopbackOnly);
    let server = Server::start().await;
    let alice = Member::enter(&server, "alice").await;
    let mut bob = Member::enter(&server, "bob").await;
    let mut sending = Sending { stop: Arc::default(), tasks: Vec::new() };
    for id in 10..15 {
        let outlet =
            alice.transport.publish(LocalTrackId(id), TrackSpec::camera(640, 360), true).await.unwrap();
        // At rates of their own, so that every track gets some of the key frames.
        sending.feed(outlet, Duration::from_millis(30 + 3 * id), vp8);
    }
    for _ in 10..15 {
        let camera = bob.until(published("alice", TrackSource::Camera)).await;
        bob.receive(&camera.sid, Codec::Vp8, 5).await;
    }
    sending.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn media_falls_back_to_tcp() {
    require!(Peer::LiveKit, Peer::LoopbackOnly);
    let server = Server::start_with("force_tcp: true").await;
    let alice = Member::enter(&server, "alice").await;
    let mut bob = Member::enter(&server, "bob").await;
    let sending = Sending::start(&alice, false).await;
    let camera = bob.until(published("alice", TrackSource::Camera)).await;
    bob.receive(&camera.sid, Codec::Vp8, 20).await;
    sending.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn unreachable_media_is_reported() {
    require!(Peer::LiveKit, Peer::LoopbackOnly);
    let server = Server::start_with("ips: {includes: [127.0.0.1/32]}").await;
    // An address family that the SFU does not offer.
    let options = ConnectOptions {
        bind: Bind::Addresses(vec!["[::1]:0".parse().unwrap()]),
        ..ConnectOptions::new(server.url(), server.token("room", "alice", true))
    };
    let mut alice = Member::enter_with(options).await;
    alice.until(|event| matches!(event, TransportEvent::MediaBlocked { .. }).then_some(())).await;
    assert!(!alice.seen.contains(&TransportEvent::Stage(ConnectStage::MediaUp)));
}

#[tokio::test(flavor = "multi_thread")]
async fn restarted_sfu_is_found_again_and_tracks_are_back() {
    require!(Peer::LiveKit, Peer::LoopbackOnly);
    let mut server = Server::start().await;
    let mut alice = Member::enter(&server, "alice").await;
    let mut bob = Member::enter(&server, "bob").await;
    let sending = Sending::start(&alice, true).await;
    let camera = bob.until(published("alice", TrackSource::Camera)).await;
    bob.receive(&camera.sid, Codec::Vp8, 5).await;
    server.restart().await;
    for member in [&mut alice, &mut bob] {
        member.until(|event| (*event == TransportEvent::Reconnecting).then_some(())).await;
        member.until(|event| (*event == TransportEvent::Reconnected).then_some(())).await;
    }
    let camera = bob.again(published("alice", TrackSource::Camera), |track| track.sid != camera.sid).await;
    bob.receive(&camera.sid, Codec::Vp8, 5).await;
    sending.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn interrupted_signalling_is_resumed_with_one_peer_connection() {
    interrupted_signalling_is_resumed(true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn interrupted_signalling_is_resumed_with_two_peer_connections() {
    interrupted_signalling_is_resumed(false).await;
}

async fn interrupted_signalling_is_resumed(single_peer_connection: bool) {
    require!(Peer::LiveKit, Peer::LoopbackOnly);
    let server = Server::start().await;
    let proxy = Proxy::start(server.port).await;
    let options = ConnectOptions {
        single_peer_connection,
        ..ConnectOptions::new(proxy.url(), server.token("room", "alice", true))
    };
    let mut alice = Member::enter_with(options).await;
    let mut bob = Member::enter(&server, "bob").await;
    let (alice_sends, bob_sends) = (Sending::start(&alice, true).await, Sending::start(&bob, true).await);
    let theirs = bob.until(published("alice", TrackSource::Camera)).await;
    let ours = alice.until(published("bob", TrackSource::Camera)).await;
    bob.receive(&theirs.sid, Codec::Vp8, 5).await;
    alice.receive(&ours.sid, Codec::Vp8, 5).await;
    for _ in 0..2 {
        proxy.cut().await;
        // Bob mutes while Alice cannot hear of it.
        bob.transport.set_muted(MICROPHONE, true);
        alice.until(|event| (*event == TransportEvent::Reconnecting).then_some(())).await;
        alice.until(|event| (*event == TransportEvent::Reconnected).then_some(())).await;
        bob.transport.set_muted(MICROPHONE, false);
        bob.receive(&theirs.sid, Codec::Vp8, 5).await;
        alice.receive(&ours.sid, Codec::Vp8, 5).await;
    }
    // The session is the same: nobody saw Alice leave or publish again.
    let changed = |event: &&TransportEvent| {
        matches!(event, TransportEvent::ParticipantLeft { .. } | TransportEvent::TrackEnded { .. })
    };
    bob.take();
    assert_eq!(bob.seen.iter().find(changed), None);
    alice.transport.publish(LocalTrackId(7), TrackSpec::screen_share_audio(), true).await.unwrap();
    bob.until(published("alice", TrackSource::ScreenShareAudio)).await;
    alice_sends.stop().await;
    bob_sends.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn restarted_sfu_without_the_room_asks_for_a_new_token() {
    require!(Peer::LiveKit, Peer::LoopbackOnly);
    let mut server = Server::start().await;
    let keeper = Member::enter(&server, "keeper").await;
    let token = server.token("room", "alice", false);
    let mut alice = Member::enter_with(ConnectOptions::new(server.url(), token)).await;
    keeper.transport.close().await;
    server.restart().await;
    let reason = alice.until(disconnected).await;
    assert!(matches!(reason, DisconnectReason::TokenRejected(_)), "{reason:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn removed_member_does_not_come_back() {
    require!(Peer::LiveKit, Peer::LoopbackOnly);
    let server = Server::start().await;
    let mut alice = Member::enter(&server, "alice").await;
    let admin = RoomClient::with_api_key(&server.http_url(), "devkey", SECRET);
    let sending = Sending::start(&alice, false).await;
    admin.remove_participant("room", "alice").await.unwrap();
    let reason = alice.until(disconnected).await;
    assert!(matches!(reason, DisconnectReason::Removed(_)), "{reason:?}");
    assert!(!alice.seen.contains(&TransportEvent::Reconnecting));
    let error = alice.transport.publish(LocalTrackId(9), TrackSpec::microphone(), false).await.map(drop);
    assert!(matches!(error, Err(TransportError::Closed)), "{error:?}");
    sending.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn duplicate_identity_is_typed() {
    require!(Peer::LiveKit, Peer::LoopbackOnly);
    let server = Server::start().await;
    let mut first = Member::enter(&server, "alice").await;
    let _second = Member::enter(&server, "alice").await;
    assert_eq!(first.until(disconnected).await, DisconnectReason::DuplicateIdentity);
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
async fn subscription_is_paused_and_resumed() {
    require!(Peer::LiveKit, Peer::LoopbackOnly);
    let server = Server::start().await;
    let alice = Member::enter(&server, "alice").await;
    let mut bob = Member::enter(&server, "bob").await;
    let sending = Sending::start(&alice, false).await;
    let microphone = bob.until(published("alice", TrackSource::Microphone)).await;
    for off in [
        Subscription { paused: true, ..Subscription::default() },
        Subscription { enabled: false, ..Subscription::default() },
    ] {
        let frames = bob.receive(&microphone.sid, Codec::Opus, 5).await;
        bob.transport.subscribe(&microphone.sid, off);
        frames.silence().await;
        bob.transport.subscribe(&microphone.sid, Subscription::default());
    }
    bob.receive(&microphone.sid, Codec::Opus, 5).await;
    sending.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_video_codec_arrives() {
    require!(Peer::LiveKit, Peer::LoopbackOnly);
    let server = Server::start().await;
    let alice = Member::enter(&server, "alice").await;
    let mut bob = Member::enter(&server, "bob").await;
    for (id, codec) in (10..).zip([Codec::Vp9, Codec::H264, Codec::Av1]) {
        let spec = TrackSpec::camera(640, 360).with_codec(codec).with_name(format!("{codec:?}"));
        let outlet = alice.transport.publish(LocalTrackId(id), spec, false).await.unwrap();
        let mut sending = Sending { stop: Arc::default(), tasks: Vec::new() };
        let frame = match codec {
            Codec::Vp9 => vp9,
            Codec::H264 => h264,
            _ => av1,
        };
        sending.feed(outlet, Duration::from_millis(40), frame);
        let name = format!("{codec:?}");
        let track = bob.again(published("alice", TrackSource::Camera), |track| track.name == name).await;
        assert_eq!(track.codec, Some(codec));
        let frames = Frames::new();
        bob.transport.attach(&track.sid, Some(Arc::clone(&frames) as _));
        let receiving = async {
            for _ in 0..20 {
                let (payload, of) = frames.next().await;
                let number = number_in(&payload, codec);
                assert_eq!((of, payload), (codec, frame(number).payload.to_vec()), "frame {number}");
            }
        };
        timeout(PATIENCE, receiving).await.unwrap_or_else(|_| panic!("too few frames of {codec:?}"));
        sending.stop().await;
        alice.transport.unpublish(LocalTrackId(id));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn simulcast_layer_follows_the_wanted_size() {
    require!(Peer::LiveKit, Peer::LoopbackOnly);
    let server = Server::start().await;
    let mut alice = Member::enter(&server, "alice").await;
    let mut bob = Member::enter(&server, "bob").await;
    let layer = |height, bitrate| VideoLayer { width: height * 16 / 9, height, bitrate, fps: 25.0 };
    let spec = TrackSpec::camera(1280, 720).with_layers(vec![
        layer(180, 200_000),
        layer(360, 600_000),
        layer(720, 1_700_000),
    ]);
    let outlet = alice.transport.publish(CAMERA, spec, false).await.unwrap();
    let mut sending = Sending { stop: Arc::default(), tasks: Vec::new() };
    for layer in [vp8_low as fn(u32) -> WireFrame, vp8_middle, vp8_high] {
        sending.feed(Arc::clone(&outlet), Duration::from_millis(40), layer);
    }
    let camera = bob.until(published("alice", TrackSource::Camera)).await;
    assert_eq!(camera.dimensions, (1280, 720));
    let frames = Frames::new();
    bob.transport.attach(&camera.sid, Some(Arc::clone(&frames) as _));
    for (height, width) in [(720, 1280), (180, 320), (360, 640)] {
        let dimensions = Some((width, height));
        bob.transport.subscribe(&camera.sid, Subscription { dimensions, ..Subscription::default() });
        let switching = async {
            // Key frames carry their size.
            while key_frame_width(&frames.next().await.0) != Some(width) {}
        };
        timeout(PATIENCE, switching).await.unwrap_or_else(|_| panic!("no frame of width {width}"));
        if height == 180 {
            let wanted = TransportEvent::LayersWanted { track: CAMERA, layers: vec![true, false, false] };
            alice.until(|event| (*event == wanted).then_some(())).await;
        }
    }
    let layer_two = alice.until(|event| match event {
        TransportEvent::KeyFrameRequested { track: CAMERA, layer } => (*layer > 0).then_some(()),
        _ => None,
    });
    layer_two.await;
    sending.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn target_bitrate_is_reported() {
    require!(Peer::LiveKit, Peer::LoopbackOnly);
    let server = Server::start().await;
    let mut alice = Member::enter(&server, "alice").await;
    let sending = Sending::start(&alice, false).await;
    // The path is good, so the camera gets all that it can use.
    let wanted = TransportEvent::TargetBitrate { track: CAMERA, bits_per_second: 1_700_000 };
    alice.until(|event| (*event == wanted).then_some(())).await;
    sending.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn data_packets_arrive() {
    require!(Peer::LiveKit, Peer::LoopbackOnly);
    let server = Server::start().await;
    let alice = Member::enter(&server, "alice").await;
    let mut bob = Member::enter(&server, "bob").await;
    let mut eve = Member::enter(&server, "eve").await;
    bob.until(joined("alice")).await;
    let plain = DataBody::Plain(UserData { payload: vec![7; 14_000], topic: Some("chat".into()) });
    let sealed = DataBody::Sealed(SealedData { iv: [9; 12], index: KeyIndex(3), value: vec![5; 40] });
    for (reliability, body) in [
        (Reliability::Reliable, plain.clone()),
        (Reliability::Lossy, plain.clone()),
        (Reliability::Reliable, sealed.clone()),
    ] {
        let destinations = vec![ParticipantIdentity("bob".into())];
        alice.transport.send_data(DataPacket { reliability, destinations, body: body.clone() }).unwrap();
        let received = bob.until(|event| match event {
            TransportEvent::Data { identity, reliability, body } => {
                Some((identity.0.clone(), *reliability, body.clone()))
            }
            _ => None,
        });
        assert_eq!(received.await, ("alice".to_owned(), reliability, body));
    }
    // Eve gets only what is for everybody.
    let body = DataBody::Plain(UserData { payload: b"all".to_vec(), topic: None });
    let packet =
        DataPacket { reliability: Reliability::Reliable, destinations: Vec::new(), body: body.clone() };
    alice.transport.send_data(packet).unwrap();
    let received = eve.until(|event| match event {
        TransportEvent::Data { body, .. } => Some(body.clone()),
        _ => None,
    });
    assert_eq!(received.await, body);
}

/// One member in the SFU room, and the events of its transport so far.
struct Member {
    transport: Arc<LiveKitTransport>,
    events: mpsc::Receiver<TransportEvent>,
    seen: Vec<TransportEvent>,
}

impl Member {
    async fn enter(server: &Server, identity: &str) -> Self {
        Self::enter_with(ConnectOptions::new(server.url(), server.token("room", identity, true))).await
    }

    async fn enter_with(options: ConnectOptions) -> Self {
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
        .unwrap_or_else(|_| panic!("nothing of the wanted kind among {:?}", self.seen))
    }

    async fn again<T>(
        &mut self,
        mut wanted: impl FnMut(&TransportEvent) -> Option<T>,
        fits: impl Fn(&T) -> bool,
    ) -> T {
        self.until(|event| wanted(event).filter(&fits)).await
    }

    /// Waits for `count` frames of a track and compares each with the one that was sent under its number.
    async fn receive(&self, sid: &TrackSid, codec: Codec, count: usize) -> Arc<Frames> {
        let frames = Frames::new();
        self.transport.attach(sid, Some(Arc::clone(&frames) as _));
        let mut numbers = BTreeSet::new();
        let receiving = async {
            while numbers.len() < count {
                let (payload, of) = frames.next().await;
                // The SFU's own frames, on mute and at the end of a track.
                if frames.trailer().is_some_and(|trailer| payload.ends_with(&trailer)) {
                    continue;
                }
                assert_eq!(of, codec);
                let number = number_in(&payload, codec);
                let sent = if codec.is_audio() { opus(number) } else { vp8(number) };
                assert_eq!(payload, *sent.payload, "frame {number} arrived changed");
                assert!(numbers.insert(number), "frame {number} arrived twice");
            }
        };
        timeout(PATIENCE, receiving).await.unwrap_or_else(|_| panic!("too few frames of {sid:?}"));
        frames
    }

    /// Takes the events that came already.
    fn take(&mut self) {
        while let Ok(event) = self.events.try_recv() {
            self.seen.push(event);
        }
    }

    fn forget(&mut self) {
        self.take();
        self.seen.clear();
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

/// Frames of one track as they arrived.
#[derive(Debug)]
struct Frames {
    sender: mpsc::Sender<(Vec<u8>, Codec)>,
    receiver: tokio::sync::Mutex<mpsc::Receiver<(Vec<u8>, Codec)>>,
    trailer: Mutex<Option<Vec<u8>>>,
}

impl Frames {
    fn new() -> Arc<Self> {
        let (sender, receiver) = mpsc::channel(4096);
        Arc::new(Self { sender, receiver: receiver.into(), trailer: Mutex::default() })
    }

    async fn next(&self) -> (Vec<u8>, Codec) {
        self.receiver.lock().await.recv().await.unwrap()
    }

    fn trailer(&self) -> Option<Vec<u8>> {
        self.trailer.lock().unwrap().clone()
    }

    /// Waits until no frame came for a second.
    async fn silence(&self) {
        let quiet = async { while timeout(Duration::from_secs(1), self.next()).await.is_ok() {} };
        timeout(PATIENCE, quiet).await.expect("frames went on");
    }
}

impl FrameReceiver for Frames {
    fn receive(&self, frame: ReceivedFrame<'_>) {
        drop(self.sender.try_send((frame.payload.to_vec(), frame.codec)));
    }

    fn sender_report(&self, _: u32, _: u64) {}

    fn injected_trailer(&self, trailer: &[u8]) {
        *self.trailer.lock().unwrap() = Some(trailer.to_vec());
    }
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

fn disconnected(event: &TransportEvent) -> Option<DisconnectReason> {
    match event {
        TransportEvent::Disconnected(reason) => Some(reason.clone()),
        _ => None,
    }
}

/// A member's microphone (50 frames a second) and camera (25), until stopped.
struct Sending {
    stop: Arc<AtomicBool>,
    tasks: Vec<JoinHandle<()>>,
}

impl Sending {
    async fn start(member: &Member, encrypted: bool) -> Self {
        let microphone =
            member.transport.publish(MICROPHONE, TrackSpec::microphone(), encrypted).await.unwrap();
        let camera = member.transport.publish(CAMERA, TrackSpec::camera(640, 360), encrypted).await.unwrap();
        let mut sending = Self { stop: Arc::default(), tasks: Vec::new() };
        sending.feed(microphone, Duration::from_millis(20), opus);
        sending.feed(camera, Duration::from_millis(40), vp8);
        sending
    }

    async fn camera_again(&mut self, member: &Member) {
        let camera = member.transport.publish(CAMERA, TrackSpec::camera(640, 360), true).await.unwrap();
        self.feed(camera, Duration::from_millis(40), vp8);
    }

    fn feed(&mut self, outlet: Arc<dyn Outlet>, every: Duration, frame: fn(u32) -> WireFrame) {
        let clock_rate = if every < Duration::from_millis(30) { 48_000.0 } else { 90_000.0 };
        let stop = Arc::clone(&self.stop);
        self.tasks.push(tokio::spawn(async move {
            let mut ticks = tokio::time::interval(every);
            let start = ticks.tick().await;
            let mut numbers = 0..;
            while !stop.load(Ordering::Relaxed) {
                let now = ticks.tick().await;
                // From zero for every track: the first frame is a key frame.
                let mut frame = frame(numbers.next().unwrap_or_default());
                // LiveKit reports nothing about a clock that runs at another rate than the codec's.
                frame.rtp_timestamp = ((now - start).as_secs_f64() * clock_rate) as u32;
                outlet.send(&frame);
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
    wire(payload, true)
}

/// A VP8-like frame that carries its number: every tenth a key frame with a real header (RFC 6386 §9.1) of 640×360 and
/// 20 kB, the others up to 5 kB. The rest is noise, as in a sealed frame.
fn vp8(number: u32) -> WireFrame {
    vp8_of(number, 640, 360, 0)
}

fn vp8_low(number: u32) -> WireFrame {
    vp8_of(number, 320, 180, 0)
}

fn vp8_middle(number: u32) -> WireFrame {
    vp8_of(number, 640, 360, 1)
}

fn vp8_high(number: u32) -> WireFrame {
    vp8_of(number, 1280, 720, 2)
}

fn key_frame_width(payload: &[u8]) -> Option<u32> {
    let key = payload.len() > 8 && payload[0] & 1 == 0;
    key.then(|| u32::from(u16::from_le_bytes([payload[6], payload[7]])))
}

/// A VP9-like frame, all of it noise, as in a sealed frame.
fn vp9(number: u32) -> WireFrame {
    let mut payload = number.to_be_bytes().to_vec();
    payload.extend((0..number * 613 % 5000).map(|i| (i * 31 + number) as u8));
    wire(payload, number.is_multiple_of(10))
}

/// An H.264-like access unit: parameter sets before key frames, and one slice.
fn h264(number: u32) -> WireFrame {
    let key = number.is_multiple_of(10);
    let mut payload = Vec::new();
    if key {
        payload.extend([0, 0, 0, 1, 0x67, 0x42, 0xe0, 0x1f, 0x8c, 0x8d, 0x40]);
        payload.extend([0, 0, 0, 1, 0x68, 0xce, 0x3c, 0x80]);
    }
    payload.extend([0, 0, 0, 1, if key { 0x65 } else { 0x41 }, 0x88]);
    // Without zeros, as an encoder would escape them.
    payload.extend((0..8).map(|nibble| (number >> (4 * nibble)) as u8 & 0xf | 0x80));
    payload.extend((0..number * 613 % 5000).map(|i| (i * 31 + number) as u8 | 1));
    wire(payload, key)
}

/// An AV1-like temporal unit: a sequence header before key frames, and one frame, each with a size field.
fn av1(number: u32) -> WireFrame {
    let key = number.is_multiple_of(10);
    let mut payload = Vec::new();
    if key {
        payload.extend([0x0a, 0x0b, 0, 0, 0, 0x42, 0xa7, 0xbf, 0xe4, 0x60, 0x0d, 0, 0x40]);
    }
    let mut frame = vec![if key { 0x10 } else { 0x30 }];
    frame.extend(number.to_be_bytes());
    frame.extend((0..number * 613 % 5000).map(|i| (i * 31 + number) as u8));
    payload.push(0x32);
    let mut size = frame.len();
    while size > 0x7f {
        payload.push((size & 0x7f) as u8 | 0x80);
        size >>= 7;
    }
    payload.push(size as u8);
    payload.extend(frame);
    wire(payload, key)
}

fn vp8_of(number: u32, width: u16, height: u16, layer: u8) -> WireFrame {
    let key = number.is_multiple_of(10);
    let mut payload = if key {
        let mut header = vec![0x10, 0x02, 0x00, 0x9d, 0x01, 0x2a];
        header.extend(width.to_le_bytes());
        header.extend(height.to_le_bytes());
        header
    } else {
        vec![0x11, 0x02, 0x00]
    };
    payload.extend(number.to_be_bytes());
    let size = if key { 20_000 } else { number * 613 % 5000 };
    payload.extend((0..size).map(|i| (i * 31 + number) as u8));
    WireFrame { layer, ..wire(payload, key) }
}

fn wire(payload: Vec<u8>, key_frame: bool) -> WireFrame {
    WireFrame { payload: FrameBytes::from(payload), rtp_timestamp: 0, layer: 0, key_frame, audio_level: None }
}

fn number_in(payload: &[u8], codec: Codec) -> u32 {
    let find = |start: &[u8]| {
        payload.windows(start.len()).position(|window| window == start).map(|at| at + start.len())
    };
    let at = match codec {
        Codec::Vp8 if payload[0] & 1 == 0 => 10,
        Codec::Vp8 => 3,
        Codec::H264 => {
            let at = find(&[0, 0, 0, 1, 0x65, 0x88]).or_else(|| find(&[0, 0, 0, 1, 0x41, 0x88])).unwrap();
            return (0..8).map(|nibble| u32::from(payload[at + nibble] & 0xf) << (4 * nibble)).sum();
        }
        Codec::Av1 => {
            let start = if payload[0] == 0x0a { 13 } else { 0 };
            let size = payload[start + 1..].iter().position(|byte| byte & 0x80 == 0).unwrap() + 1;
            start + 1 + size + 1
        }
        _ => 0,
    };
    u32::from_be_bytes(payload[at..at + 4].try_into().unwrap())
}

/// Passes TCP connections on to a server, and cuts them.
struct Proxy {
    port: u16,
    connections: Arc<tokio::sync::Mutex<JoinSet<()>>>,
    accepting: JoinHandle<()>,
}

impl Proxy {
    async fn start(server: u16) -> Self {
        Self::of(server, true).await
    }

    /// A proxy that answers 404 to signalling v1.
    async fn without_v1(server: u16) -> Self {
        Self::of(server, false).await
    }

    async fn of(server: u16, v1: bool) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let connections = Arc::new(tokio::sync::Mutex::new(JoinSet::new()));
        let accepted = Arc::clone(&connections);
        let accepting = tokio::spawn(async move {
            while let Ok((mut client, _)) = listener.accept().await {
                accepted.lock().await.spawn(async move {
                    let mut start = [0; 16];
                    if !v1 && client.peek(&mut start).await.is_ok() && start.starts_with(b"GET /rtc/v1") {
                        let refusal =
                            b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
                        drop(client.write_all(refusal).await);
                        return;
                    }
                    if let Ok(mut server) = tokio::net::TcpStream::connect(("127.0.0.1", server)).await {
                        drop(tokio::io::copy_bidirectional(&mut client, &mut server).await);
                    }
                });
            }
        });
        Self { port, connections, accepting }
    }

    fn url(&self) -> String {
        format!("ws://127.0.0.1:{}", self.port)
    }

    async fn cut(&self) {
        self.connections.lock().await.shutdown().await;
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.accepting.abort();
    }
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
        Self::start_with("node_ip: 127.0.0.1").await
    }

    /// A server with one more setting for its media.
    async fn start_with(rtc: &str) -> Self {
        let binary = Peer::LiveKit.find().unwrap();
        let (port, udp, tcp) = (free_port(), free_port(), free_port());
        let folder = tempfile::tempdir().unwrap();
        let config = format!(
            "port: {port}\nbind_addresses: ['127.0.0.1']\n\
             rtc: {{udp_port: {udp}, tcp_port: {tcp}, use_external_ip: false, enable_loopback_candidate: true, \
             {rtc}, interfaces: {{includes: [lo]}}}}\n\
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
