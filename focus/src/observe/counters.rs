//! Counters of what was refused or dropped, and how many there are of what.

use std::sync::atomic::{AtomicU64, Ordering};

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds to it.
    pub fn add(&self, amount: u64) {
        self.0.fetch_add(amount, Ordering::Relaxed);
    }

    /// Its value.
    pub fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What the control plane counts. Each is about input from outside that was not acted upon, or about load.
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct Counters {
    /// Participants that joined.
    pub joined: Counter,
    /// Joins that were refused, whatever the reason.
    pub refused_joins: Counter,
    /// Signalling messages that were not valid, or larger than allowed.
    pub bad_messages: Counter,
    /// Signalling connections dropped because their client did not read.
    pub slow_clients: Counter,
    /// Session descriptions that could not be used.
    pub rejected_sdp: Counter,
    /// Data packets that were not relayed.
    pub dropped_data: Counter,
    /// Admin requests that were refused.
    pub refused_admin: Counter,
}

/// A look at the whole.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Rooms that exist, empty ones too.
    pub rooms: usize,
    /// Participants in all rooms.
    pub participants: usize,
    /// Published tracks in all rooms.
    pub tracks: usize,
    /// See [`Counters::joined`].
    pub joined: u64,
    /// See [`Counters::refused_joins`].
    pub refused_joins: u64,
    /// See [`Counters::bad_messages`].
    pub bad_messages: u64,
    /// See [`Counters::slow_clients`].
    pub slow_clients: u64,
    /// See [`Counters::rejected_sdp`].
    pub rejected_sdp: u64,
    /// See [`Counters::dropped_data`].
    pub dropped_data: u64,
    /// See [`Counters::refused_admin`].
    pub refused_admin: u64,
}

impl Stats {
    /// Takes the counters over.
    #[must_use]
    pub fn with(self, counters: &Counters) -> Self {
        Self {
            joined: counters.joined.value(),
            refused_joins: counters.refused_joins.value(),
            bad_messages: counters.bad_messages.value(),
            slow_clients: counters.slow_clients.value(),
            rejected_sdp: counters.rejected_sdp.value(),
            dropped_data: counters.dropped_data.value(),
            refused_admin: counters.refused_admin.value(),
            ..self
        }
    }
}
