//! One participant: joins, publishes if it is a publisher, and accounts for every frame that it receives.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use antiphon_call_sdk::{
    TrackSpec,
    transport::{
        FrameReceiver, LocalTrackId, MediaTransport as _, Outlet, ReceivedFrame, TransportEvent, WireFrame,
        livekit::{ConnectOptions, LiveKitTransport},
    },
};
use antiphon_testkit::media::{SyntheticOpus, SyntheticVp8, parse};
use anyhow::{Context as _, Result};
use livekit_api::access_token::{AccessToken, VideoGrants};
use tokio::task::JoinHandle;

use crate::Plan;

const AUDIO_EVERY: Duration = Duration::from_millis(20);
const AUDIO_FRAME: usize = 80;
const VIDEO_EVERY: Duration = Duration::from_nanos(33_333_333);
const KEY_FRAME_EVERY: u64 = 90;

/// When each frame of each stream was handed to the transport; all participants share this process's clock.
pub(crate) type SentAt = Arc<Mutex<HashMap<u32, Vec<Instant>>>>;

#[derive(Clone, Copy, Debug)]
pub(crate) enum Role {
    Publisher(u32),
    Subscriber,
}

/// What one participant received of one stream.
#[derive(Clone, Debug, Default)]
pub(crate) struct Received {
    pub(crate) frames: u64,
    pub(crate) first: Option<u64>,
    pub(crate) last: u64,
    pub(crate) delays: Vec<Duration>,
}

#[derive(Debug, Default)]
struct Log {
    streams: BTreeMap<u32, Received>,
    damaged: u64,
    first_frame: Option<Duration>,
    end: Option<String>,
}

/// What one participant saw in all.
#[derive(Debug)]
pub(crate) struct Account {
    pub(crate) publishes: bool,
    pub(crate) joined_in: Duration,
    pub(crate) first_frame: Option<Duration>,
    pub(crate) streams: BTreeMap<u32, Received>,
    pub(crate) damaged: u64,
    pub(crate) end: Option<String>,
}

#[derive(Debug)]
pub(crate) struct Participant {
    transport: Arc<LiveKitTransport>,
    joined_in: Duration,
    log: Arc<Mutex<Log>>,
    senders: Vec<JoinHandle<()>>,
}

impl Participant {
    pub(crate) async fn join(plan: &Plan, number: u32, role: Role, sent: SentAt) -> Result<Self> {
        let identity = format!("load-{number}");
        let grants = VideoGrants { room_join: true, room: plan.room.clone(), ..Default::default() };
        let token = AccessToken::with_api_key(&plan.api_key, &plan.api_secret)
            .with_identity(&identity)
            .with_grants(grants)
            .to_jwt()
            .context("the API key cannot sign tokens")?;
        let start = Instant::now();
        let options = ConnectOptions::new(plan.url.clone(), token);
        let (transport, mut events) =
            LiveKitTransport::connect(options).await.with_context(|| format!("{identity} could not join"))?;
        let joined_in = start.elapsed();
        let log = Arc::new(Mutex::new(Log::default()));
        let receiver = Arc::new(Receiver { log: log.clone(), start, sent: sent.clone() });
        // The events end with the transport, so this task must not keep it.
        let (of, ends) = (Arc::downgrade(&transport), log.clone());
        tokio::spawn(async move {
            let mut attached = BTreeSet::new();
            while let Some(event) = events.recv().await {
                match event {
                    TransportEvent::TrackUpdated { track, .. } if attached.insert(track.sid.clone()) => {
                        let Some(transport) = of.upgrade() else { return };
                        transport.attach(&track.sid, Some(receiver.clone()));
                    }
                    TransportEvent::Disconnected(reason) => {
                        ends.lock().unwrap_or_else(PoisonError::into_inner).end = Some(reason.to_string());
                    }
                    _ => {}
                }
            }
        });
        let mut senders = Vec::new();
        if let Role::Publisher(publisher) = role {
            let audio = SyntheticOpus::new(publisher * 2, AUDIO_FRAME);
            let outlet = transport.publish(LocalTrackId(0), TrackSpec::microphone(), false).await?;
            let sending = Sending { stream: publisher * 2, every: AUDIO_EVERY, clock: 48_000, key_every: 1 };
            senders.push(sending.start(outlet, sent.clone(), move |n| audio.frame(n)));
            if plan.video {
                let video = SyntheticVp8::new(publisher * 2 + 1, plan.video_frame).key_every(KEY_FRAME_EVERY);
                let outlet = transport.publish(LocalTrackId(1), TrackSpec::camera(1280, 720), false).await?;
                let (stream, key_every) = (publisher * 2 + 1, KEY_FRAME_EVERY);
                let sending = Sending { stream, every: VIDEO_EVERY, clock: 90_000, key_every };
                senders.push(sending.start(outlet, sent, move |n| video.frame(n)));
            }
        }
        Ok(Self { transport, joined_in, log, senders })
    }

    pub(crate) async fn leave(self) -> Account {
        for sender in &self.senders {
            sender.abort();
        }
        let account = {
            let mut log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
            Account {
                publishes: !self.senders.is_empty(),
                joined_in: self.joined_in,
                first_frame: log.first_frame,
                streams: std::mem::take(&mut log.streams),
                damaged: log.damaged,
                end: log.end.take(),
            }
        };
        self.transport.close().await;
        account
    }
}

/// Accounts for the frames of every track of one participant: each frame says which stream it is of.
#[derive(Debug)]
struct Receiver {
    log: Arc<Mutex<Log>>,
    start: Instant,
    sent: SentAt,
}

impl FrameReceiver for Receiver {
    fn receive(&self, frame: ReceivedFrame<'_>) {
        let mut log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(record) = parse(frame.payload) else {
            log.damaged += 1;
            return;
        };
        log.first_frame.get_or_insert_with(|| frame.now.saturating_duration_since(self.start));
        let received = log.streams.entry(record.stream).or_default();
        received.frames += 1;
        received.first.get_or_insert(record.number);
        received.last = received.last.max(record.number);
        let sent = self.sent.lock().unwrap_or_else(PoisonError::into_inner);
        let index = usize::try_from(record.number).unwrap_or(usize::MAX);
        if let Some(at) = sent.get(&record.stream).and_then(|times| times.get(index)) {
            received.delays.push(frame.now.saturating_duration_since(*at));
        }
    }

    fn sender_report(&self, _rtp_timestamp: u32, _ntp: u64) {}

    fn injected_trailer(&self, _trailer: &[u8]) {}
}

/// A stream of frames at a steady pace.
#[derive(Clone, Copy)]
struct Sending {
    stream: u32,
    every: Duration,
    clock: u64,
    /// Every how many frames a decoder can start.
    key_every: u64,
}

impl Sending {
    fn start(
        self,
        outlet: Arc<dyn Outlet>,
        sent: SentAt,
        frame: impl Fn(u64) -> bytes::Bytes + Send + 'static,
    ) -> JoinHandle<()> {
        tokio::spawn(async move {
            let mut pace = tokio::time::interval(self.every);
            for number in 0.. {
                pace.tick().await;
                let nanos = u64::try_from(self.every.as_nanos()).unwrap_or(u64::MAX).saturating_mul(number);
                let ticks = u128::from(nanos) * u128::from(self.clock) / 1_000_000_000;
                let rtp_timestamp = u32::try_from(ticks & u128::from(u32::MAX)).unwrap_or_default();
                sent.lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .entry(self.stream)
                    .or_default()
                    .push(Instant::now());
                let key_frame = number % self.key_every == 0;
                outlet.send(&WireFrame {
                    payload: frame(number).into(),
                    rtp_timestamp,
                    layer: 0,
                    key_frame,
                    audio_level: None,
                });
            }
        })
    }
}
