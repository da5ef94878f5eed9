//! Members that speak, and what each hears of every other one.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use antiphon_call_sdk::{
    Call, CallEvent, CallEvents, EncodedFrame, Session, TrackSid, TrackSource, TrackSpec, TrackSummary,
};
use tokio::task::JoinSet;

/// The longest Opus frame (RFC 6716 §2.1.4), as ten members decrypt ninety tracks on two cores in a debug build.
const FRAME_EVERY: Duration = Duration::from_millis(60);
const PICTURE_EVERY: Duration = Duration::from_millis(100);
/// More than the frames that are on their way when something breaks.
pub(crate) const ENOUGH: u64 = 10;
/// Every member must hear every other one in each such stretch of time.
const WINDOW: Duration = Duration::from_secs(5);
const WINDOWS: usize = 2;

/// A member that sends a microphone, and reads its events so that they are not in the way.
pub(crate) struct Speaker {
    pub(crate) call: Arc<Call>,
    heard: Arc<Mutex<Heard>>,
    tasks: JoinSet<()>,
    session: Session,
    _store: tempfile::TempDir,
}

/// What a member's application was given.
#[derive(Default)]
struct Heard {
    /// By speaker, when the last frame of its microphone came, and the longest silence since [`Speaker::begin_gaps`].
    voices: HashMap<String, (Instant, Duration)>,
    /// The events that say where media travels.
    moves: Vec<String>,
}

impl Speaker {
    pub(crate) async fn of(
        call: Call,
        events: CallEvents,
        session: Session,
        store: tempfile::TempDir,
    ) -> Self {
        Self::with_frames_every(FRAME_EVERY, call, events, session, store).await
    }

    pub(crate) async fn with_frames_every(
        every: Duration,
        call: Call,
        mut events: CallEvents,
        session: Session,
        store: tempfile::TempDir,
    ) -> Self {
        let (call, heard) = (Arc::new(call), Arc::<Mutex<Heard>>::default());
        let mut tasks = JoinSet::new();
        let hears = heard.clone();
        tasks.spawn(async move {
            while let Some(event) = events.next().await {
                hears.lock().unwrap().take(&event);
            }
        });
        let track = call.publish(TrackSpec::microphone()).await.unwrap();
        tasks.spawn(async move {
            let mut ticks = tokio::time::interval(every);
            let start = ticks.tick().await;
            loop {
                let timestamp = ticks.tick().await - start;
                // A frame before our first key exists is dropped.
                let _ = track.write(&EncodedFrame { payload: vec![0x78; 80].into(), timestamp });
            }
        });
        Self { call, heard, tasks, session, _store: store }
    }

    /// Sends a picture, too: VP8 frames of 1 kB, a key frame every second.
    pub(crate) async fn show(&mut self) {
        let track = self.call.publish(TrackSpec::camera(320, 180)).await.unwrap();
        self.tasks.spawn(async move {
            let mut ticks = tokio::time::interval(PICTURE_EVERY);
            let start = ticks.tick().await;
            for number in 0_u64.. {
                let timestamp = ticks.tick().await - start;
                let mut payload = vec![0; 1000];
                // The header of a key frame, or of another (RFC 6386 §9.1).
                let header: &[u8] =
                    if number % 10 == 0 { &[0x10, 0, 0, 0x9d, 1, 0x2a, 64, 1, 180, 0] } else { &[0x11] };
                payload[..header.len()].copy_from_slice(header);
                let _ = track.write(&EncodedFrame { payload: payload.into(), timestamp });
            }
        });
    }

    /// Whether pictures of all these users opened.
    pub(crate) fn sees<'a>(&self, mut users: impl Iterator<Item = &'a str>) -> bool {
        users.all(|user| {
            self.tracks_of(user)
                .any(|track| track.from.track.source == TrackSource::Camera && track.stats.opened >= ENOUGH)
        })
    }

    /// Measures silences from now on.
    pub(crate) fn begin_gaps(&self) {
        let mut heard = self.heard.lock().unwrap();
        heard.voices.values_mut().for_each(|(_, longest)| *longest = Duration::ZERO);
        heard.moves.clear();
    }

    /// The longest silence of each speaker since [`Self::begin_gaps`], the present one included.
    pub(crate) fn gaps(&self) -> Vec<Duration> {
        self.silences().into_iter().map(|(_, silence)| silence).collect()
    }

    /// The same, with the speakers.
    pub(crate) fn silences(&self) -> Vec<(String, Duration)> {
        let heard = self.heard.lock().unwrap();
        let silence = |(user, (last, longest)): (&String, &(Instant, Duration))| {
            (user.clone(), last.elapsed().max(*longest))
        };
        heard.voices.iter().map(silence).collect()
    }

    /// The events since [`Self::begin_gaps`] that say where media travels.
    pub(crate) fn moves(&self) -> Vec<String> {
        self.heard.lock().unwrap().moves.clone()
    }

    pub(crate) fn user(&self) -> String {
        self.session.client().user_id().unwrap().to_string()
    }

    pub(crate) fn tracks_of(&self, user: &str) -> impl Iterator<Item = TrackSummary> {
        self.call.tracks().into_iter().filter(move |track| track.from.member.user_id == user)
    }

    /// How many frames of `user` opened so far.
    pub(crate) fn opened(&self, user: &str) -> u64 {
        self.tracks_of(user).map(|track| track.stats.opened).sum()
    }
}

impl Heard {
    fn take(&mut self, event: &CallEvent) {
        match event {
            CallEvent::Frame { from, .. } if from.track.source == TrackSource::Microphone => {
                let now = Instant::now();
                let voice = self.voices.entry(from.member.user_id.to_string());
                let (last, longest) = voice.or_insert((now, Duration::ZERO));
                *longest = (now - *last).max(*longest);
                *last = now;
            }
            CallEvent::MeshBegan(_) | CallEvent::MeshEnded(_) | CallEvent::TrackEnded { .. } => {
                self.moves.push(format!("{event:?}"));
            }
            _ => {}
        }
    }
}

/// What every member hears of every other one, compared with an earlier time.
pub(crate) struct Pairs<'a> {
    speakers: &'a [Speaker],
    users: Vec<String>,
    /// Frames that opened and that did not, by listener and track.
    before: HashMap<(usize, TrackSid), (u64, u64)>,
}

impl<'a> Pairs<'a> {
    pub(crate) fn of(speakers: &'a [Speaker]) -> Self {
        let mut pairs =
            Self { speakers, users: speakers.iter().map(Speaker::user).collect(), before: HashMap::new() };
        pairs.begin();
        pairs
    }

    /// Compares with now from now on.
    pub(crate) fn begin(&mut self) {
        self.before.clear();
        for (listener, speaker) in self.speakers.iter().enumerate() {
            for track in speaker.call.tracks() {
                let counts = (track.stats.opened, track.stats.missing_key + track.stats.refused);
                self.before.insert((listener, track.from.track.sid.clone()), counts);
            }
        }
    }

    /// By listener and speaker, the frames that opened since [`Self::begin`], and those that did not.
    pub(crate) fn heard(&self) -> impl Iterator<Item = (usize, usize, u64, u64)> {
        let pair = |listener: usize, speaker: usize| {
            let mut heard = (listener, speaker, 0, 0);
            for track in self.speakers[listener].tracks_of(&self.users[speaker]) {
                // A track that was published anew counts from zero.
                let before = self.before.get(&(listener, track.from.track.sid.clone())).copied();
                let (opened, refused) = before.unwrap_or_default();
                heard.2 += track.stats.opened - opened;
                heard.3 += track.stats.missing_key + track.stats.refused - refused;
            }
            heard
        };
        let count = self.speakers.len();
        (0..count)
            .flat_map(move |listener| (0..count).map(move |speaker| (listener, speaker)))
            .filter(|(listener, speaker)| listener != speaker)
            .map(move |(listener, speaker)| pair(listener, speaker))
    }

    /// Awaits that everybody hears everybody anew.
    pub(crate) async fn until_heard(&mut self, limit: Duration, when: &str) {
        self.begin();
        let begin = Instant::now();
        let waiting = async {
            while self.heard().any(|(.., opened, _)| opened < ENOUGH) {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        if tokio::time::timeout(limit, waiting).await.is_err() {
            self.fail(&format!("not heard within {limit:?} {when}")).await;
        }
        println!("everybody hears everybody {when} after {:?}", begin.elapsed());
    }

    /// Asserts that everybody hears everybody in each of [`WINDOWS`], and that every frame opens.
    pub(crate) async fn hear_in_every_window(&mut self, when: &str) {
        for window in 1..=WINDOWS {
            self.begin();
            tokio::time::sleep(WINDOW).await;
            let heard: Vec<_> = self.heard().collect();
            let least = heard.iter().map(|(.., opened, _)| *opened).min().unwrap();
            let refused: u64 = heard.iter().map(|(.., refused)| refused).sum();
            println!("window {window} {when}: at least {least} frames of each, {refused} did not open");
            if least == 0 || refused > 0 {
                self.fail(&format!("not all heard in window {window} {when}")).await;
            }
        }
    }

    async fn fail(&self, what: &str) -> ! {
        let deaf: Vec<_> =
            self.heard().filter(|(.., opened, refused)| *opened < ENOUGH || *refused > 0).collect();
        let mut reports = Vec::new();
        for listener in deaf.iter().map(|(listener, ..)| *listener).collect::<BTreeSet<_>>() {
            reports.push((listener, self.speakers[listener].call.report().await));
        }
        panic!("{what}; listener, speaker, frames opened, not opened: {deaf:?}; {reports:#?}");
    }
}
