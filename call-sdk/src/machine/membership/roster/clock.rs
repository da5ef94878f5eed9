//! A guard against a local clock that is far ahead.

use std::time::Duration;

use crate::time::UnixMillis;

/// Age of a live event up to which our clock counts as correct: more than a slow sync or federation takes.
const TOLERANCE: Duration = Duration::from_mins(5);

/// How far our clock is ahead of the homeservers', by the newest event that came while we watched.
///
/// A clock that is hours ahead would expire everybody at once, our own membership included. An event that is newer than
/// all before has just been sent, so its apparent age is how far our clock is ahead. A clock that is behind is not
/// corrected: it delays expiry only, and a correction would let one homeserver with a false time expire everybody.
#[derive(Debug, Default)]
pub(super) struct ClockGuard {
    newest: Option<UnixMillis>,
    ahead: Duration,
}

impl ClockGuard {
    /// Takes the times of the events of a view. The first view may be old, so it is only the baseline.
    pub(super) fn observe(&mut self, now: UnixMillis, sent: impl Iterator<Item = UnixMillis>) {
        // A time in the future says nothing about a clock that is ahead, and would be the newest for long.
        let newest = sent.filter(|at| *at <= now).max().unwrap_or_default();
        let Some(known) = self.newest.replace(newest) else { return };
        if newest > known {
            let age = now.since(newest);
            self.ahead = if age > TOLERANCE { age } else { Duration::ZERO };
        } else {
            self.newest = Some(known);
        }
    }

    /// A time of the homeservers by our clock.
    pub(super) fn local(&self, time: UnixMillis) -> UnixMillis {
        time.plus(self.ahead)
    }
}
