//! Frames on their way in: opened with the key of the member that they are attributed to, or dropped.

use std::{
    fmt,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use super::queue::EventSender;
use crate::{
    frame_crypto::{FrameDecryptor, OpenError, Opened, SifTrailer},
    machine::{CallEvent, Sealing, TrackClock, TrackRoute},
    media::{Codec, EncodedFrame, FramePool},
    transport::{FrameReceiver, ReceivedFrame, TrackSid, rtc::is_key_frame},
};

/// Takes the frames of one remote track. The lock is held while a frame is opened and queued, so that after
/// [`TrackReceiver::end`] no frame of the track follows.
pub(super) struct TrackReceiver {
    sid: TrackSid,
    begin: Instant,
    sealing: Arc<Sealing>,
    events: EventSender,
    /// Whether the application wants the track.
    wanted: AtomicBool,
    inner: Mutex<Inner>,
}

struct Inner {
    /// `None` after the track ended.
    route: Option<TrackRoute>,
    decryptor: Option<(Codec, FrameDecryptor)>,
    clock: TrackClock,
    clock_rate: u32,
    pool: FramePool,
    trailer: Option<SifTrailer>,
}

impl TrackReceiver {
    pub(super) fn new(route: TrackRoute, begin: Instant, sealing: Arc<Sealing>, events: EventSender) -> Self {
        Self {
            sid: route.from.track.sid.clone(),
            begin,
            sealing,
            events,
            wanted: AtomicBool::new(true),
            inner: Mutex::new(Inner {
                route: Some(route),
                decryptor: None,
                clock: TrackClock::default(),
                clock_rate: 0,
                pool: FramePool::default(),
                trailer: None,
            }),
        }
    }

    /// The track or its member describes itself differently.
    pub(super) fn update(&self, route: TrackRoute) {
        let mut inner = self.lock();
        if inner.route.is_some() {
            inner.route = Some(route);
        }
    }

    /// Frames that the application does not want are dropped.
    pub(super) fn set_wanted(&self, wanted: bool) {
        self.wanted.store(wanted, Ordering::Relaxed);
    }

    /// No frame follows.
    pub(super) fn end(&self) {
        let mut inner = self.lock();
        inner.route = None;
        inner.decryptor = None;
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        // Every frame leaves the state whole, so a poisoned lock is as good as any.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// Opens a frame into a pooled buffer.
    fn open(&mut self, frame: &ReceivedFrame<'_>, encrypted: bool) -> Outcome {
        let Some(route) = &self.route else { return Outcome::Silent };
        if !encrypted {
            let filled = self.pool.fill(|buffer| {
                frame.payload.clone_into(buffer);
                Ok::<_, OpenError>(())
            });
            return match filled {
                Ok((payload, ())) => Outcome::Frame(payload, None),
                Err(reason) => Outcome::Refused(reason),
            };
        }
        if self.decryptor.as_ref().is_none_or(|(codec, _)| *codec != frame.codec) {
            match FrameDecryptor::new(frame.codec, route.ring.clone()) {
                Ok(decryptor) => self.decryptor = Some((frame.codec, decryptor)),
                // Nobody can seal this codec, so it is not sealed.
                Err(_) => return Outcome::Refused(OpenError::NotSealed),
            }
        }
        let Some((_, decryptor)) = &mut self.decryptor else { return Outcome::Silent };
        let trailer = self.trailer.as_ref();
        match self.pool.fill(|buffer| decryptor.open(frame.now, frame.payload, trailer, buffer)) {
            Ok((payload, Opened::Frame(index))) => Outcome::Frame(payload, Some(index)),
            // Empty, or the SFU's own silence: neither is the member's.
            Ok(_) => Outcome::Silent,
            Err(reason) => Outcome::Refused(reason),
        }
    }
}

/// Whether a decoder can start with a frame.
fn can_start(frame: &ReceivedFrame<'_>) -> bool {
    frame.codec.is_audio() || is_key_frame(frame.codec, frame.payload)
}

enum Outcome {
    Frame(crate::media::FrameBytes, Option<crate::key::KeyIndex>),
    Refused(OpenError),
    Silent,
}

impl FrameReceiver for TrackReceiver {
    fn receive(&self, frame: ReceivedFrame<'_>) {
        if !self.wanted.load(Ordering::Relaxed) {
            return;
        }
        let mut inner = self.lock();
        let at = frame.now.saturating_duration_since(self.begin);
        let Some(TrackRoute { choice, path, .. }) = &inner.route else { return };
        let is_moving = choice.is_moving();
        if is_moving && !choice.admits(*path, at, can_start(&frame)) {
            return;
        }
        let outcome = inner.open(&frame, self.sealing.is_encrypted());
        let clock_rate = frame.codec.clock_rate();
        let Inner { route: Some(route), clock, .. } = &mut *inner else { return };
        route.counters.received(at, frame.payload.len());
        let timestamp = clock.time(&route.clock, frame.now, frame.rtp_timestamp, clock_rate);
        match outcome {
            Outcome::Frame(payload, index) => {
                route.choice.delivered(route.path, at);
                route.counters.opened(at, index);
                let event = CallEvent::Frame {
                    from: Arc::clone(&route.from),
                    frame: EncodedFrame { payload, timestamp },
                };
                if !self.events.frame(event) {
                    route.counters.dropped();
                }
            }
            // It came by the other path before.
            Outcome::Refused(OpenError::Replayed(_)) if is_moving => route.choice.arrived(route.path),
            Outcome::Refused(reason) => {
                if route.counters.refused(reason) {
                    let event = CallEvent::Undecryptable {
                        member: route.from.member.clone(),
                        sid: self.sid.clone(),
                        reason,
                    };
                    // A queue without room ends the call from the task that also writes to it.
                    let _ = self.events.control(event);
                }
            }
            Outcome::Silent => {}
        }
        inner.clock_rate = clock_rate;
    }

    fn sender_report(&self, rtp_timestamp: u32, ntp: u64) {
        let mut inner = self.lock();
        let Inner { route: Some(route), clock, clock_rate, .. } = &mut *inner else { return };
        if *clock_rate > 0 {
            clock.sender_report(&route.clock, rtp_timestamp, ntp, *clock_rate);
        }
    }

    fn injected_trailer(&self, trailer: &[u8]) {
        self.lock().trailer = SifTrailer::new(trailer);
    }
}

impl fmt::Debug for TrackReceiver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TrackReceiver").field("sid", &self.sid).finish_non_exhaustive()
    }
}
