//! What came in on one track. The media path counts, the machine and the application read.

use std::{
    sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering},
    time::{Duration, Instant},
};

use serde::Serialize;

use crate::{frame_crypto::OpenError, key::KeyIndex};

/// Counters of one remote track.
#[derive(Debug)]
pub struct TrackCounters {
    received: AtomicU64,
    opened: AtomicU64,
    bytes: AtomicU64,
    missing_key: AtomicU64,
    refused: AtomicU64,
    dropped: AtomicU64,
    /// 1 + index of the key that opened the last frame; 0: none.
    key_index: AtomicU16,
    /// One bit per reason that was reported.
    reported: AtomicU32,
    /// Milliseconds since the call began, plus one; 0: never.
    first_opened: AtomicU64,
    last_received: AtomicU64,
    last_opened: AtomicU64,
}

impl Default for TrackCounters {
    fn default() -> Self {
        let zero = || AtomicU64::new(0);
        Self {
            received: zero(),
            opened: zero(),
            bytes: zero(),
            missing_key: zero(),
            refused: zero(),
            dropped: zero(),
            key_index: AtomicU16::new(0),
            reported: AtomicU32::new(0),
            first_opened: zero(),
            last_received: zero(),
            last_opened: zero(),
        }
    }
}

/// A reading of [`TrackCounters`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct TrackStats {
    /// Whole frames that arrived.
    pub received: u64,
    /// Frames that opened; in an unencrypted call all.
    pub opened: u64,
    /// Bytes of the frames that arrived.
    pub bytes: u64,
    /// Frames dropped because no key was there for their index.
    pub missing_key: u64,
    /// Frames dropped for any other reason.
    pub refused: u64,
    /// Frames that the application was too slow for.
    pub dropped: u64,
    /// Index of the key that opened the last frame.
    #[serde(serialize_with = "index")]
    pub key_index: Option<KeyIndex>,
    /// From the beginning of the call to the first frame that opened.
    #[serde(serialize_with = "millis")]
    pub first_opened: Option<Duration>,
    /// From the beginning of the call to the last frame that arrived.
    #[serde(serialize_with = "millis")]
    pub last_received: Option<Duration>,
    /// From the beginning of the call to the last frame that opened.
    #[serde(serialize_with = "millis")]
    pub last_opened: Option<Duration>,
}

impl TrackCounters {
    /// A frame arrived.
    pub(crate) fn received(&self, since_begin: Duration, bytes: usize) {
        self.received.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(u64::try_from(bytes).unwrap_or(u64::MAX), Ordering::Relaxed);
        self.last_received.store(mark(since_begin), Ordering::Relaxed);
    }

    /// The frame opened, or needed no opening.
    pub(crate) fn opened(&self, since_begin: Duration, index: Option<KeyIndex>) {
        self.opened.fetch_add(1, Ordering::Relaxed);
        self.key_index.store(index.map_or(0, |index| 1 + u16::from(index.0)), Ordering::Relaxed);
        self.last_opened.store(mark(since_begin), Ordering::Relaxed);
        if self.first_opened.load(Ordering::Relaxed) == 0 {
            self.first_opened.store(mark(since_begin), Ordering::Relaxed);
        }
    }

    /// The frame did not open. True if this reason is new on this track.
    pub(crate) fn refused(&self, reason: OpenError) -> bool {
        match reason {
            OpenError::MissingKey(_) => self.missing_key.fetch_add(1, Ordering::Relaxed),
            _ => self.refused.fetch_add(1, Ordering::Relaxed),
        };
        let bit = bit_of(reason);
        self.reported.fetch_or(bit, Ordering::Relaxed) & bit == 0
    }

    /// The application's queue was full.
    pub(crate) fn dropped(&self) {
        self.dropped.fetch_add(1, Ordering::Relaxed);
    }

    /// What was counted so far.
    #[must_use]
    pub fn read(&self) -> TrackStats {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        TrackStats {
            received: of(&self.received),
            opened: of(&self.opened),
            bytes: of(&self.bytes),
            missing_key: of(&self.missing_key),
            refused: of(&self.refused),
            dropped: of(&self.dropped),
            key_index: self
                .key_index
                .load(Ordering::Relaxed)
                .checked_sub(1)
                .and_then(|index| u8::try_from(index).ok())
                .map(KeyIndex),
            first_opened: time(of(&self.first_opened)),
            last_received: time(of(&self.last_received)),
            last_opened: time(of(&self.last_opened)),
        }
    }
}

impl TrackStats {
    /// When the last frame opened, for a call that began at `begin`.
    pub(crate) fn last_opened_at(&self, begin: Instant) -> Option<Instant> {
        Some(begin + self.last_opened?)
    }
}

/// A bit per kind of reason, whatever its details.
fn bit_of(reason: OpenError) -> u32 {
    let kind = match reason {
        OpenError::MissingKey(_) => 0,
        OpenError::TooShort(_) => 1,
        OpenError::NotSealed => 2,
        OpenError::Unauthentic(_) => 3,
        OpenError::Replayed(_) => 4,
        OpenError::ForeignInjection => 5,
        OpenError::InjectionFlood => 6,
    };
    1 << kind
}

fn mark(since_begin: Duration) -> u64 {
    u64::try_from(since_begin.as_millis()).unwrap_or(u64::MAX).saturating_add(1)
}

fn time(mark: u64) -> Option<Duration> {
    mark.checked_sub(1).map(Duration::from_millis)
}

fn millis<S: serde::Serializer>(time: &Option<Duration>, to: S) -> Result<S::Ok, S::Error> {
    time.map(|time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX)).serialize(to)
}

fn index<S: serde::Serializer>(index: &Option<KeyIndex>, to: S) -> Result<S::Ok, S::Error> {
    index.map(|index| index.0).serialize(to)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reason_is_new_once() {
        let counters = TrackCounters::default();
        assert!(counters.refused(OpenError::MissingKey(KeyIndex(1))));
        assert!(!counters.refused(OpenError::MissingKey(KeyIndex(2))));
        assert!(counters.refused(OpenError::NotSealed));
        let stats = counters.read();
        assert_eq!((stats.missing_key, stats.refused, stats.key_index), (2, 1, None));
        counters.opened(Duration::ZERO, Some(KeyIndex(0)));
        let stats = counters.read();
        assert_eq!(
            (stats.opened, stats.key_index, stats.first_opened),
            (1, Some(KeyIndex(0)), Some(Duration::ZERO))
        );
    }
}
