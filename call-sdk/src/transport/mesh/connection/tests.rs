use std::sync::Mutex;

use tokio::task::JoinHandle;

use super::*;
use crate::{
    media::VideoLayer,
    transport::{
        ConnectStage, DataBody, ReceivedFrame, Reliability, RemoteTrack, UserData, WireFrame,
        mesh::{Candidate, Negotiated, Sdp, Streams},
    },
};

const DEADLINE: Duration = Duration::from_secs(20);

/// One end of a pair, with all that it reported.
struct End {
    transport: Arc<dyn MeshTransport>,
    events: mpsc::Receiver<TransportEvent>,
    seen: Vec<TransportEvent>,
}

/// Two connections whose signalling takes no time.
struct Pair {
    caller: End,
    callee: End,
    /// Offers so far.
    offers: usize,
}

impl End {
    async fn open(name: &str) -> Self {
        let options = MeshOptions {
            bind: Bind::Addresses(vec!["127.0.0.1:0".parse().unwrap()]),
            ..MeshOptions::default()
        };
        Self::with(options, name).await.unwrap()
    }

    async fn with(options: MeshOptions, name: &str) -> Result<Self, TransportError> {
        let (transport, events) = MeshConnection::open(options, ParticipantIdentity(name.to_owned())).await?;
        Ok(Self { transport, events, seen: Vec::new() })
    }

    /// The next description of this end.
    async fn description(&mut self) -> (String, Streams) {
        let deadline = tokio::time::Instant::now() + DEADLINE;
        loop {
            let event = tokio::time::timeout_at(deadline, self.events.recv()).await.expect("no description");
            let event = event.expect("the connection ended");
            self.seen.push(event.clone());
            if let TransportEvent::Negotiated(
                Negotiated::Offer { sdp, streams } | Negotiated::Answer { sdp, streams },
            ) = event
            {
                return (sdp.0, streams);
            }
        }
    }

    fn publish(&self, id: u64, spec: TrackSpec) -> JoinHandle<Arc<dyn Outlet>> {
        let transport = Arc::clone(&self.transport);
        tokio::spawn(async move { transport.publish(LocalTrackId(id), spec, true).await.unwrap() })
    }

    /// The remote tracks as the events have described them.
    fn tracks(&self) -> Vec<RemoteTrack> {
        let mut tracks: Vec<RemoteTrack> = Vec::new();
        for event in &self.seen {
            match event {
                TransportEvent::TrackUpdated { track, .. } => {
                    tracks.retain(|known| known.sid != track.sid);
                    tracks.push(track.clone());
                }
                TransportEvent::TrackEnded { sid, .. } => tracks.retain(|known| known.sid != *sid),
                _ => {}
            }
        }
        tracks.sort_by(|a, b| a.sid.cmp(&b.sid));
        tracks
    }

    fn track(&self, named: &str) -> Option<RemoteTrack> {
        self.tracks().into_iter().find(|track| track.name == named)
    }

    fn is_up(&self) -> bool {
        let mut changes = self.seen.iter().filter_map(|event| match event {
            TransportEvent::Negotiated(Negotiated::Up) => Some(true),
            TransportEvent::Negotiated(Negotiated::Interrupted) => Some(false),
            _ => None,
        });
        changes.next_back() == Some(true)
    }

    fn failure(&self) -> Option<&str> {
        self.seen.iter().find_map(|event| match event {
            TransportEvent::Negotiated(Negotiated::Failed(cause)) => Some(&**cause),
            _ => None,
        })
    }
}

impl Pair {
    async fn open() -> Self {
        Self { caller: End::open("callee").await, callee: End::open("caller").await, offers: 0 }
    }

    /// Makes the caller offer, with every track whose publication has begun.
    async fn call(&mut self) {
        tokio::task::yield_now().await;
        self.caller.transport.negotiate(Negotiate::Offer { restart_ice: false });
    }

    /// Carries signalling until `done`.
    async fn until(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        let deadline = tokio::time::Instant::now() + DEADLINE;
        let mut looks = tokio::time::interval(Duration::from_millis(5));
        while !done(self) {
            tokio::select! {
                event = self.caller.events.recv() => self.of_caller(event.expect("the caller ended")),
                event = self.callee.events.recv() => self.of_callee(event.expect("the callee ended")),
                _ = looks.tick() => {}
                () = tokio::time::sleep_until(deadline) => {
                    panic!("{what}: caller {:#?}, callee {:#?}", self.caller.seen, self.callee.seen);
                }
            }
        }
    }

    fn of_caller(&mut self, event: TransportEvent) {
        let callee = &self.callee.transport;
        match event.clone() {
            TransportEvent::Negotiated(Negotiated::Offer { sdp, streams }) => {
                self.offers += 1;
                callee.negotiate(Negotiate::Answer { sdp, streams });
            }
            TransportEvent::Negotiated(Negotiated::Candidates(candidates)) => {
                callee.negotiate(Negotiate::Candidates(candidates));
            }
            TransportEvent::Negotiated(Negotiated::Streams(streams)) => {
                callee.negotiate(Negotiate::Streams(streams));
            }
            TransportEvent::Negotiated(Negotiated::Needed { .. }) => {
                self.caller.transport.negotiate(Negotiate::Offer { restart_ice: false });
            }
            _ => {}
        }
        self.caller.seen.push(event);
    }

    fn of_callee(&mut self, event: TransportEvent) {
        let caller = &self.caller.transport;
        match event.clone() {
            TransportEvent::Negotiated(Negotiated::Answer { sdp, streams }) => {
                caller.negotiate(Negotiate::TakeAnswer { sdp, streams });
            }
            TransportEvent::Negotiated(Negotiated::Candidates(candidates)) => {
                caller.negotiate(Negotiate::Candidates(candidates));
            }
            TransportEvent::Negotiated(Negotiated::Streams(streams) | Negotiated::Needed { streams }) => {
                caller.negotiate(Negotiate::Streams(streams));
            }
            _ => {}
        }
        self.callee.seen.push(event);
    }

    async fn up(&mut self) {
        self.until("up", |pair| pair.caller.is_up() && pair.callee.is_up()).await;
    }

    async fn live(&mut self, publication: JoinHandle<Arc<dyn Outlet>>) -> Arc<dyn Outlet> {
        self.until("a track is live", |_| publication.is_finished()).await;
        publication.await.unwrap()
    }

    async fn close(self) {
        self.caller.transport.close().await;
        self.callee.transport.close().await;
    }
}

/// Keeps what arrives on one track.
#[derive(Debug, Default)]
struct Inbox(Mutex<Vec<Vec<u8>>>);

impl FrameReceiver for Inbox {
    fn receive(&self, frame: ReceivedFrame<'_>) {
        self.0.lock().unwrap().push(frame.payload.to_vec());
    }

    fn sender_report(&self, _: u32, _: u64) {}

    fn injected_trailer(&self, _: &[u8]) {}
}

impl Inbox {
    fn attached(end: &End, track: &RemoteTrack) -> Arc<Self> {
        let inbox = Arc::<Self>::default();
        end.transport.attach(&track.sid, Some(Arc::clone(&inbox) as _));
        inbox
    }

    /// Whether a frame with this mark arrived.
    fn has(&self, mark: u8) -> bool {
        self.0.lock().unwrap().iter().any(|frame| frame.last() == Some(&mark))
    }
}

/// Sends frames of one track until it is dropped. Every layer's frames end with `mark` and the layer.
struct Source(JoinHandle<()>);

impl Source {
    fn start(outlet: &Arc<dyn Outlet>, video: bool, layers: u8, mark: u8) -> Self {
        let outlet = Arc::clone(outlet);
        Self(tokio::spawn(async move {
            let mut ticks = tokio::time::interval(Duration::from_millis(20));
            for count in 0_u32.. {
                ticks.tick().await;
                for layer in 0..layers {
                    // The frame tag and the start code of a VP8 key frame (RFC 6386 §9.1).
                    let head: &[u8] =
                        if video { &[0x10, 0, 0, 0x9d, 1, 0x2a, 0x10, 0, 0x10, 0] } else { &[0xf8] };
                    outlet.send(&WireFrame {
                        payload: [head, &[mark + layer]].concat().into(),
                        rtp_timestamp: count * if video { 1800 } else { 960 },
                        layer,
                        key_frame: true,
                        audio_level: None,
                    });
                }
            }
        }))
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        self.0.abort();
    }
}

fn camera() -> TrackSpec {
    TrackSpec::camera(640, 360)
}

#[tokio::test]
async fn audio_and_video_travel_both_ways_after_one_round() {
    let mut pair = Pair::open().await;
    let publications = [
        pair.caller.publish(1, TrackSpec::microphone()),
        pair.caller.publish(2, camera()),
        pair.callee.publish(1, TrackSpec::microphone()),
        pair.callee.publish(2, camera()),
    ];
    let started = tokio::time::Instant::now();
    pair.call().await;
    pair.up().await;
    eprintln!("up after {:?}", started.elapsed());
    let mut sources = Vec::new();
    for (index, publication) in publications.into_iter().enumerate() {
        let outlet = pair.live(publication).await;
        sources.push(Source::start(&outlet, index % 2 == 1, 1, 10 + index as u8));
    }
    pair.until("tracks", |pair| pair.caller.tracks().len() == 2 && pair.callee.tracks().len() == 2).await;
    for end in [&pair.caller, &pair.callee] {
        let track = end.track("camera").unwrap();
        assert_eq!(track.dimensions, (640, 360));
        assert!(end.seen.contains(&TransportEvent::Stage(ConnectStage::MediaUp)));
    }
    let inboxes = [
        (Inbox::attached(&pair.callee, &pair.callee.track("microphone").unwrap()), 10),
        (Inbox::attached(&pair.callee, &pair.callee.track("camera").unwrap()), 11),
        (Inbox::attached(&pair.caller, &pair.caller.track("microphone").unwrap()), 12),
        (Inbox::attached(&pair.caller, &pair.caller.track("camera").unwrap()), 13),
    ];
    pair.until("frames", |_| inboxes.iter().all(|(inbox, mark)| inbox.has(*mark))).await;
    assert_eq!(pair.offers, 1);
    pair.close().await;
}

#[tokio::test]
async fn late_tracks_of_the_callee_use_what_was_offered_and_then_more() {
    let mut pair = Pair::open().await;
    pair.call().await;
    pair.up().await;
    for (id, name) in [(1, "one"), (2, "two"), (3, "three")] {
        let publication = pair.callee.publish(id, camera().with_name(name));
        let outlet = pair.live(publication).await;
        let _source = Source::start(&outlet, true, 1, id as u8);
        pair.until("track", |pair| pair.caller.track(name).is_some()).await;
        let inbox = Inbox::attached(&pair.caller, &pair.caller.track(name).unwrap());
        pair.until("frames", |_| inbox.has(id as u8)).await;
    }
    assert_eq!(pair.offers, 4);
    pair.close().await;
}

#[tokio::test]
async fn late_track_in_another_codec_gets_a_section() {
    let mut pair = Pair::open().await;
    pair.call().await;
    pair.up().await;
    let publication = pair.callee.publish(1, camera().with_codec(crate::media::Codec::Vp9));
    pair.live(publication).await;
    pair.until("track", |pair| pair.caller.track("camera").is_some()).await;
    pair.close().await;
}

#[tokio::test]
async fn late_and_ended_tracks_of_the_caller_share_a_section() {
    let mut pair = Pair::open().await;
    pair.call().await;
    pair.up().await;
    let mut sections = Vec::new();
    for round in 1..4 {
        let name = format!("camera {round}");
        let publication = pair.caller.publish(round, camera().with_name(&name));
        let outlet = pair.live(publication).await;
        let _source = Source::start(&outlet, true, 1, round as u8);
        pair.until("track", |pair| pair.callee.track(&name).is_some()).await;
        let inbox = Inbox::attached(&pair.callee, &pair.callee.track(&name).unwrap());
        pair.until("frames", |_| inbox.has(round as u8)).await;
        pair.caller.transport.unpublish(LocalTrackId(round));
        pair.until("end", |pair| pair.callee.tracks().is_empty()).await;
        let offer = |event: &TransportEvent| match event {
            TransportEvent::Negotiated(Negotiated::Offer { sdp, .. }) => Some(sdp.0.matches("\nm=").count()),
            _ => None,
        };
        sections.extend(pair.caller.seen.iter().rev().find_map(offer));
    }
    assert_eq!(sections, [4, 4, 4]);
    pair.close().await;
}

#[tokio::test]
async fn ended_track_of_the_callee_makes_room_for_the_next() {
    let mut pair = Pair::open().await;
    pair.call().await;
    pair.up().await;
    for round in 1..4 {
        let name = format!("camera {round}");
        let publication = pair.callee.publish(round, camera().with_name(&name));
        let outlet = pair.live(publication).await;
        let _source = Source::start(&outlet, true, 1, round as u8);
        pair.until("track", |pair| pair.caller.track(&name).is_some()).await;
        let inbox = Inbox::attached(&pair.caller, &pair.caller.track(&name).unwrap());
        pair.until("frames", |_| inbox.has(round as u8)).await;
        pair.callee.transport.unpublish(LocalTrackId(round));
        pair.until("end", |pair| pair.caller.tracks().is_empty()).await;
    }
    pair.close().await;
}

#[tokio::test]
async fn muting_is_told_and_drops_frames() {
    let mut pair = Pair::open().await;
    let publication = pair.callee.publish(7, TrackSpec::microphone());
    pair.call().await;
    let outlet = pair.live(publication).await;
    pair.until("track", |pair| pair.caller.track("microphone").is_some_and(|track| !track.muted)).await;
    for muted in [true, false] {
        pair.callee.transport.set_muted(LocalTrackId(7), muted);
        let is = |pair: &mut Pair| pair.caller.track("microphone").is_some_and(|track| track.muted == muted);
        pair.until("mute", is).await;
        let dropped = outlet.dropped();
        let frame = WireFrame {
            payload: vec![1].into(),
            rtp_timestamp: 0,
            layer: 0,
            key_frame: true,
            audio_level: None,
        };
        outlet.send(&frame);
        assert_eq!(outlet.dropped() > dropped, muted);
    }
    assert_eq!(pair.offers, 1);
    pair.close().await;
}

#[tokio::test]
async fn data_travels_both_ways_and_is_named_by_the_connection() {
    let mut pair = Pair::open().await;
    let packet = |text: &str, reliability, to: &[&str]| DataPacket {
        reliability,
        destinations: to.iter().map(|to| ParticipantIdentity((*to).to_owned())).collect(),
        body: DataBody::Plain(UserData { payload: text.into(), topic: None }),
    };
    for end in [&pair.caller, &pair.callee] {
        end.transport.send_data(packet("not for you", Reliability::Reliable, &["somebody else"])).unwrap();
        end.transport.send_data(packet("early", Reliability::Reliable, &[])).unwrap();
    }
    pair.call().await;
    pair.up().await;
    let got = |end: &End, text: &str| {
        end.seen.iter().any(|event| {
            matches!(event, TransportEvent::Data { body: DataBody::Plain(data), .. } if data.payload == text.as_bytes())
        })
    };
    pair.until("early data", |pair| got(&pair.caller, "early") && got(&pair.callee, "early")).await;
    pair.caller.transport.send_data(packet("lossy", Reliability::Lossy, &["callee"])).unwrap();
    pair.callee.transport.send_data(packet("lossy", Reliability::Lossy, &["caller"])).unwrap();
    pair.until("lossy data", |pair| got(&pair.caller, "lossy") && got(&pair.callee, "lossy")).await;
    for (end, from) in [(&pair.caller, "callee"), (&pair.callee, "caller")] {
        assert!(!got(end, "not for you"));
        for event in &end.seen {
            if let TransportEvent::Data { identity, .. } = event {
                assert_eq!(identity.0, from);
            }
        }
    }
    assert!(matches!(
        pair.caller.transport.send_data(packet(&"x".repeat(20_000), Reliability::Reliable, &[])),
        Err(TransportError::DataTooLarge(_))
    ));
    pair.close().await;
}

#[tokio::test]
async fn media_goes_on_after_an_ice_restart() {
    let mut pair = Pair::open().await;
    let publication = pair.caller.publish(1, TrackSpec::microphone());
    pair.call().await;
    let outlet = pair.live(publication).await;
    pair.up().await;
    pair.until("track", |pair| pair.callee.track("microphone").is_some()).await;
    let ufrag = |pair: &Pair| {
        let of_offer = |event: &TransportEvent| match event {
            TransportEvent::Negotiated(Negotiated::Offer { sdp: Sdp(sdp), .. }) => {
                sdp.lines().find(|line| line.starts_with("a=ice-ufrag")).map(str::to_owned)
            }
            _ => None,
        };
        pair.caller.seen.iter().rev().find_map(of_offer)
    };
    for round in 1..4 {
        let before = ufrag(&pair);
        pair.caller.transport.negotiate(Negotiate::Offer { restart_ice: true });
        pair.until("new credentials", |pair| ufrag(pair) != before).await;
        let source = Source::start(&outlet, false, 1, 100 + round);
        let inbox = Inbox::attached(&pair.callee, &pair.callee.track("microphone").unwrap());
        pair.until("frames", |_| inbox.has(100 + round)).await;
        drop(source);
    }
    pair.close().await;
}

#[tokio::test]
async fn peer_gets_one_layer_and_key_frame_requests_name_it() {
    let mut pair = Pair::open().await;
    let layer = |width, bitrate| VideoLayer { width, height: width / 2, bitrate, fps: 30.0 };
    let spec = camera().with_layers(vec![layer(320, 150_000), layer(640, 500_000), layer(1280, 1_700_000)]);
    let publication = pair.caller.publish(1, spec);
    pair.call().await;
    let outlet = pair.live(publication).await;
    let _source = Source::start(&outlet, true, 3, 50);
    pair.until("track", |pair| pair.callee.track("camera").is_some()).await;
    let track = pair.callee.track("camera").unwrap();
    let inbox = Inbox::attached(&pair.callee, &track);
    // The first estimate permits the second layer; later ones, on loopback, the third.
    pair.until("the second layer", |_| inbox.has(51)).await;
    pair.until("the third layer", |_| inbox.has(52)).await;
    let of_track = LocalTrackId(1);
    pair.until("layers", |pair| {
        let wanted = TransportEvent::LayersWanted { track: of_track, layers: vec![false, false, true] };
        pair.caller.seen.contains(&wanted)
    })
    .await;
    let target = |event: &TransportEvent| matches!(event, TransportEvent::TargetBitrate { .. });
    assert!(pair.caller.seen.iter().any(target));
    pair.callee.transport.request_key_frame(&track.sid);
    pair.until("a key frame request", |pair| {
        pair.caller.seen.contains(&TransportEvent::KeyFrameRequested { track: of_track, layer: 2 })
    })
    .await;
    let frames = inbox.0.lock().unwrap().clone();
    let switches = frames.windows(2).filter(|pair| pair[0].last() != pair[1].last()).count();
    assert!(switches <= 2, "one layer at a time: {switches}");
    pair.close().await;
}

#[tokio::test]
async fn dropped_publication_takes_the_track_back() {
    let mut pair = Pair::open().await;
    let publication = pair.callee.publish(1, camera());
    tokio::task::yield_now().await;
    publication.abort();
    assert!(publication.await.is_err());
    let publication = pair.callee.publish(1, camera().with_name("again"));
    pair.call().await;
    pair.live(publication).await;
    pair.until("track", |pair| pair.caller.track("again").is_some()).await;
    assert_eq!(pair.caller.tracks().len(), 1);
    pair.close().await;
}

#[tokio::test]
async fn bad_descriptions_fail_and_closing_ends() {
    let mut pair = Pair::open().await;
    let publication = pair.callee.publish(1, camera());
    let sdp = Sdp("nonsense".to_owned());
    pair.callee.transport.negotiate(Negotiate::Answer { sdp, streams: Default::default() });
    pair.until("failure", |pair| pair.callee.failure().is_some()).await;
    pair.callee.transport.close().await;
    assert!(publication.await.is_err(), "the publication fails");
    let mut last = None;
    while let Some(event) = pair.callee.events.recv().await {
        last = Some(event);
    }
    assert_eq!(last, Some(TransportEvent::Disconnected(DisconnectReason::Closed)));
    pair.caller.transport.close().await;
}

/// A browser's offer of audio and video, in both directions, and of video in a codec that nobody else knows.
fn offer_of_browser(version: u32) -> String {
    let fingerprint = ["AB"; 32].join(":");
    let mut sdp = format!(
        "v=0\r\no=- 1 {version} IN IP4 0.0.0.0\r\ns=-\r\nt=0 0\r\na=group:BUNDLE a v x\r\n\
         a=fingerprint:sha-256 {fingerprint}\r\n"
    );
    for (kind, mid, payload) in [
        ("audio", "a", "111 opus/48000/2"),
        ("video", "v", "96 VP8/90000"),
        ("video", "x", "120 EXOTIC/90000"),
    ] {
        let (number, codec) = payload.split_once(' ').unwrap();
        sdp.push_str(&format!(
            "m={kind} 9 UDP/TLS/RTP/SAVPF {number}\r\nc=IN IP4 0.0.0.0\r\na=setup:actpass\r\na=mid:{mid}\r\n\
             a=ice-ufrag:abcdefgh\r\na=ice-pwd:abcdefghijklmnopqrstuvwx\r\na=rtcp-mux\r\n\
             a=rtpmap:{number} {codec}\r\na=ssrc:{number} cname:x\r\na=msid:{mid} {mid}\r\na=sendrecv\r\n"
        ));
    }
    sdp
}

fn direction<'a>(sdp: &'a str, kind: &str) -> &'a str {
    let (_, section) = sdp.split_once(&format!("\nm={kind}")).unwrap();
    let section = section.split("\nm=").next().unwrap();
    let directions = ["a=sendrecv", "a=sendonly", "a=recvonly", "a=inactive"];
    section.lines().map(str::trim_end).find(|line| directions.contains(line)).unwrap()
}

#[tokio::test]
async fn tracks_go_into_the_sections_of_a_browser() {
    let mut callee = End::open("browser").await;
    let _microphone = callee.publish(1, TrackSpec::microphone());
    tokio::task::yield_now().await;
    let offer = |version| Negotiate::Answer { sdp: Sdp(offer_of_browser(version)), streams: Streams::new() };
    callee.transport.negotiate(offer(1));
    let (answer, streams) = callee.description().await;
    assert_eq!((direction(&answer, "audio"), direction(&answer, "video")), ("a=sendrecv", "a=recvonly"));
    let stream = streams.keys().next().unwrap();
    assert!(answer.contains(&format!("a=msid:{stream} ")), "{answer}");
    assert!(answer.ends_with("a=inactive\r\n"), "nothing is sent in a codec that we don't know: {answer}");
    let _camera = callee.publish(2, camera());
    tokio::task::yield_now().await;
    callee.transport.negotiate(offer(2));
    let (answer, streams) = callee.description().await;
    assert_eq!((direction(&answer, "audio"), direction(&answer, "video")), ("a=sendrecv", "a=sendrecv"));
    assert!(streams.keys().all(|stream| answer.contains(&format!("a=msid:{stream} "))), "{answer}");
    callee.transport.unpublish(LocalTrackId(1));
    callee.transport.negotiate(offer(3));
    let (answer, _) = callee.description().await;
    assert_eq!((direction(&answer, "audio"), direction(&answer, "video")), ("a=recvonly", "a=sendrecv"));
    callee.transport.close().await;
}

/// On every interface of this machine, if there is one besides loopback.
#[tokio::test]
async fn named_candidates_do_no_harm() {
    let options = || MeshOptions { host_candidates: true, ..MeshOptions::default() };
    let (Ok(caller), Ok(callee)) =
        (End::with(options(), "callee").await, End::with(options(), "caller").await)
    else {
        return;
    };
    let mut pair = Pair { caller, callee, offers: 0 };
    pair.call().await;
    let named = "candidate:1 1 udp 2130706431 0c3d6c1f-2f6f-4f53-8b8f-6f4f4a1b2c3d.local 5000 typ host";
    let named = Candidate { candidate: named.to_owned(), mid: Some("0".to_owned()), index: Some(0) };
    for end in [&pair.caller, &pair.callee] {
        end.transport.negotiate(Negotiate::Candidates(vec![named.clone()]));
    }
    pair.until("an exchange", |pair| {
        let answered =
            |event: &TransportEvent| matches!(event, TransportEvent::Negotiated(Negotiated::Answer { .. }));
        pair.callee.seen.iter().any(answered)
    })
    .await;
    let told = pair.callee.seen.iter().any(|event| {
        matches!(event, TransportEvent::Negotiated(Negotiated::Answer { sdp, .. }) if sdp.0.contains("a=candidate"))
    });
    if told {
        pair.up().await;
    }
    pair.close().await;
}
