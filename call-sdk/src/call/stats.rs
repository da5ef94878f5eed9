//! What came in, counted per member and track.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use crate::{
    frame_crypto::OpenError,
    key::KeyIndex,
    media::{Codec, TrackSource},
    member::ParticipantIdentity,
    transport::TrackSid,
};

/// What a call has received so far.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct CallStats {
    /// One entry per remote track, by participant and track sid.
    pub tracks: Vec<TrackStats>,
    /// Frames of participants whom no member vouches for; always dropped.
    pub unattributed: u64,
    /// Frames that the application was too slow for.
    pub dropped: u64,
}

/// What has been received on one remote track.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct TrackStats {
    /// Who publishes it.
    pub identity: ParticipantIdentity,
    /// Which track.
    pub sid: TrackSid,
    /// What it is.
    pub source: TrackSource,
    /// The codec of its last frame.
    pub codec: Codec,
    /// Whole frames that arrived.
    pub received: u64,
    /// Frames that opened (in an unencrypted call: all).
    pub opened: u64,
    /// Bytes of the frames that arrived.
    pub bytes: u64,
    /// Index of the key that opened the last frame.
    pub key_index: Option<KeyIndex>,
    /// From joining to the first frame that opened.
    pub first_opened: Option<Duration>,
    /// Frames dropped because no key was there yet for their index.
    pub missing_key: u64,
    /// Frames dropped for any other reason.
    pub refused: u64,
}

/// The counters behind [`CallStats`]; written by the call's task, read by the application.
#[derive(Debug)]
pub(super) struct Counters {
    joined: Instant,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    tracks: BTreeMap<(ParticipantIdentity, TrackSid), TrackStats>,
    seen: HashMap<(ParticipantIdentity, TrackSid), Vec<OpenError>>,
    unattributed: u64,
    dropped: u64,
}

impl Counters {
    pub(super) fn new(joined: Instant) -> Self {
        Self { joined, inner: Mutex::default() }
    }

    pub(super) fn snapshot(&self) -> CallStats {
        let inner = self.lock();
        CallStats {
            tracks: inner.tracks.values().cloned().collect(),
            unattributed: inner.unattributed,
            dropped: inner.dropped,
        }
    }

    pub(super) fn unattributed(&self) {
        self.lock().unattributed += 1;
    }

    pub(super) fn dropped(&self) {
        self.lock().dropped += 1;
    }

    pub(super) fn opened(&self, now: Instant, arrival: &Arrival<'_>, index: Option<KeyIndex>) {
        let mut inner = self.lock();
        let track = inner.arrived(arrival);
        track.opened += 1;
        track.key_index = index;
        track.first_opened.get_or_insert_with(|| now.saturating_duration_since(self.joined));
    }

    /// Counts a dropped frame; true if this reason is new on this track.
    pub(super) fn refused(&self, arrival: &Arrival<'_>, reason: OpenError) -> bool {
        let mut inner = self.lock();
        let track = inner.arrived(arrival);
        match reason {
            OpenError::MissingKey(_) => track.missing_key += 1,
            _ => track.refused += 1,
        }
        let seen = inner.seen.entry(arrival.key()).or_default();
        let kind = std::mem::discriminant(&reason);
        if seen.iter().any(|s| std::mem::discriminant(s) == kind) {
            return false;
        }
        seen.push(reason);
        true
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        // Counters have no invariant that a panic elsewhere could break.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A frame that arrived, as the counters see it.
pub(super) struct Arrival<'a> {
    pub(super) identity: &'a ParticipantIdentity,
    pub(super) sid: &'a TrackSid,
    pub(super) source: TrackSource,
    pub(super) codec: Codec,
    pub(super) bytes: usize,
}

impl Arrival<'_> {
    fn key(&self) -> (ParticipantIdentity, TrackSid) {
        (self.identity.clone(), self.sid.clone())
    }
}

impl Inner {
    fn arrived(&mut self, arrival: &Arrival<'_>) -> &mut TrackStats {
        let track = self.tracks.entry(arrival.key()).or_insert_with(|| TrackStats {
            identity: arrival.identity.clone(),
            sid: arrival.sid.clone(),
            source: arrival.source,
            codec: arrival.codec,
            received: 0,
            opened: 0,
            bytes: 0,
            key_index: None,
            first_opened: None,
            missing_key: 0,
            refused: 0,
        });
        track.received += 1;
        track.bytes += u64::try_from(arrival.bytes).unwrap_or(u64::MAX);
        track.codec = arrival.codec;
        track
    }
}
