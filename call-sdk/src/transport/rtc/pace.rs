//! Limits in time: how often key frames are requested, and how soon a connection is tried again.

use std::time::{Duration, Instant};

/// Allows something at most once per interval.
#[derive(Debug)]
pub(in crate::transport) struct Throttle {
    interval: Duration,
    last: Option<Instant>,
}

impl Throttle {
    pub(in crate::transport) fn new(interval: Duration) -> Self {
        Self { interval, last: None }
    }

    /// Whether it may happen now; if so, it counts as done.
    pub(in crate::transport) fn allow(&mut self, now: Instant) -> bool {
        let allowed = self.last.is_none_or(|last| now.saturating_duration_since(last) >= self.interval);
        if allowed {
            self.last = Some(now);
        }
        allowed
    }
}

/// The waits between attempts to reconnect: none before the first, growing ones after that, and an end.
#[derive(Debug, Default)]
pub(in crate::transport) struct Backoff {
    attempts: usize,
}

impl Backoff {
    /// In milliseconds.
    const WAITS: [u64; 10] = [0, 300, 1200, 2700, 4800, 7000, 7000, 7000, 7000, 7000];

    /// How long to wait before the next attempt; `None` when it is time to give up. `jitter` in 0..1 spreads the
    /// clients of a restarted SFU, so that they do not come back all at once.
    pub(in crate::transport) fn next_wait(&mut self, jitter: f64) -> Option<Duration> {
        let wait = Duration::from_millis(*Self::WAITS.get(self.attempts)?);
        self.attempts += 1;
        Some(wait + wait.mul_f64(jitter.clamp(0.0, 1.0) * 0.2))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::disallowed_methods, reason = "an arbitrary origin for virtual time")]

    use super::*;

    #[test]
    fn throttle_allows_once_per_interval() {
        let now = Instant::now();
        let mut throttle = Throttle::new(Duration::from_millis(500));
        assert!(throttle.allow(now));
        assert!(!throttle.allow(now + Duration::from_millis(499)));
        assert!(throttle.allow(now + Duration::from_millis(500)));
    }

    #[test]
    fn waits_grow_and_end() {
        let mut backoff = Backoff::default();
        let waits: Vec<_> = std::iter::from_fn(|| backoff.next_wait(0.0)).collect();
        assert_eq!(waits.len(), 10);
        assert_eq!(waits[0], Duration::ZERO);
        assert!(waits.is_sorted());
        assert!(Backoff { attempts: 4 }.next_wait(1.0).unwrap() > Duration::from_millis(4800));
    }
}
