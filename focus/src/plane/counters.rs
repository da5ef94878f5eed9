//! What the plane counts about itself, readable from anywhere at any time.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Its value.
    pub fn count(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    pub(crate) fn add(&self, more: u64) -> u64 {
        self.0.fetch_add(more, Ordering::Relaxed) + more
    }
}

/// The plane's counters since it started.
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct Counters {
    /// Datagrams received.
    pub datagrams_in: Counter,
    /// Datagrams sent.
    pub datagrams_out: Counter,
    /// Datagrams that the kernel did not take: its send buffer was full or the destination is unreachable.
    pub send_failures: Counter,
    /// Datagrams from unknown addresses, of unknown protocols, or longer than any client sends.
    pub garbage: Counter,
    /// STUN requests that name a peer but do not prove that their sender knows its password.
    pub unauthenticated: Counter,
    /// Peers given up because the media engine panicked on them.
    pub panics: Counter,
    /// `_lossy` messages dropped because a client took them too slowly.
    pub data_dropped: Counter,
    /// Audio levels and `_lossy` messages dropped because the control plane read too slowly.
    pub events_dropped: Counter,
    /// Key frames requested from publishers.
    pub key_frames_requested: Counter,
}

impl Counters {
    /// Counts a datagram that means nothing. A flood of them must not become a flood of log lines, so only
    /// every power of two is told.
    pub(crate) fn garbage(&self, source: SocketAddr, what: &'static str) {
        let count = self.garbage.add(1);
        if count.is_power_of_two() {
            tracing::debug!(%source, count, "dropped a datagram {what}");
        }
    }
}
