//! Whether the room manager is alive.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A manager that was silent for this long is ill.
const STALE: Duration = Duration::from_secs(4);

/// The last sign of life of a task, shared with whoever asks for its health.
#[derive(Debug)]
pub struct Heartbeat {
    start: Instant,
    last_ms: AtomicU64,
}

impl Heartbeat {
    /// Alive at `now`.
    pub fn new(now: Instant) -> Self {
        Self { start: now, last_ms: AtomicU64::new(0) }
    }

    /// A sign of life.
    pub fn beat(&self, now: Instant) {
        self.last_ms.store(self.since_start(now), Ordering::Relaxed);
    }

    /// Whether the last sign of life is recent.
    pub fn alive(&self, now: Instant) -> bool {
        let silent = self.since_start(now).saturating_sub(self.last_ms.load(Ordering::Relaxed));
        Duration::from_millis(silent) < STALE
    }

    fn since_start(&self, now: Instant) -> u64 {
        u64::try_from(now.saturating_duration_since(self.start).as_millis()).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "a test needs one instant to count from")]
mod tests {
    use super::*;

    #[test]
    fn a_silent_manager_is_ill_until_it_beats_again() {
        let start = Instant::now();
        let heartbeat = Heartbeat::new(start);
        assert!(heartbeat.alive(start + Duration::from_secs(3)));
        assert!(!heartbeat.alive(start + Duration::from_secs(4)));
        heartbeat.beat(start + Duration::from_secs(4));
        assert!(heartbeat.alive(start + Duration::from_secs(5)));
    }
}
