//! The two clocks of a call, always passed in and never read by protocol logic.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// Wall-clock time in milliseconds since the Unix epoch, as Matrix events carry it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct UnixMillis(pub u64);

impl UnixMillis {
    /// This time moved later by `duration`, saturating at the far end.
    #[must_use]
    pub fn plus(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)))
    }

    /// How long after `earlier` this is; zero if it is not later.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(self.0.saturating_sub(earlier.0))
    }
}

/// One reading of both clocks: the monotonic one for timers, the wall clock for what peers compare.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Now {
    /// Monotonic, for timers and deadlines.
    pub instant: Instant,
    /// Wall clock, for event timestamps and expiry.
    pub unix: UnixMillis,
}

impl Now {
    /// This reading moved later by `duration` on both clocks; virtual time in tests.
    #[must_use]
    pub fn plus(self, duration: Duration) -> Self {
        Self { instant: self.instant + duration, unix: self.unix.plus(duration) }
    }
}
