//! The two clocks of a call, always passed in and never read by protocol logic.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// The wait after the first failure.
pub(crate) const FIRST_RETRY: Duration = Duration::from_secs(1);
const LONGEST_RETRY: Duration = Duration::from_secs(30);
/// The longest wait that the other side may ask for.
const LONGEST_ASKED: Duration = Duration::from_secs(300);

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

/// The wait after the `failures`th failure in a row, counted from 1: 1 s, doubled each time, at most 30 s; but no less
/// than the other side asks for, up to 5 min.
pub(crate) fn retry_delay(failures: u32, asked: Option<Duration>) -> Duration {
    let doubled = FIRST_RETRY.saturating_mul(1 << failures.saturating_sub(1).min(16)).min(LONGEST_RETRY);
    doubled.max(asked.unwrap_or_default().min(LONGEST_ASKED))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_back_off_and_stay_bounded() {
        let waits: Vec<_> = [1, 2, 3, 6, 40].map(|n| retry_delay(n, None).as_secs()).into();
        assert_eq!(waits, [1, 2, 4, 30, 30]);
        assert_eq!(retry_delay(1, Some(Duration::from_secs(7))).as_secs(), 7);
        assert_eq!(retry_delay(1, Some(Duration::from_secs(700))).as_secs(), 300);
    }
}
