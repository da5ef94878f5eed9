//! The order of the other side's messages in one call.
//!
//! `seq` counts them. A message that comes too early waits until those before it are there, or [`PATIENCE`] is over.
//! Numbers that were passed over are remembered, so that a late message is still told from a duplicate.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use crate::transport::mesh::wire::Body;

/// How long a missing message holds up those after it.
const PATIENCE: Duration = Duration::from_secs(5);
/// Most messages that wait for a missing one.
const MAX_EARLY: usize = 32;
/// How far ahead of the expected number a message may be. It bounds the numbers that are passed over, too.
const WINDOW: u64 = 256;

/// What a new message is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Arrival {
    /// Its turn comes; see [`Order::next`].
    Queued,
    /// Its turn is over, but it was missed and is of use still.
    Late(Body),
    /// It was there before.
    Duplicate(Body),
    /// There is no room for it, or its number is absurd.
    Refused,
}

/// The messages of one call and direction.
#[derive(Debug, Default)]
pub(super) struct Order {
    expected: u64,
    early: BTreeMap<u64, Body>,
    missed: BTreeSet<u64>,
    /// When the missing message is given up.
    until: Option<Instant>,
}

impl Order {
    /// Takes a message in.
    pub(super) fn push(&mut self, now: Instant, seq: u64, body: Body) -> Arrival {
        if seq < self.expected {
            return if self.missed.remove(&seq) { Arrival::Late(body) } else { Arrival::Duplicate(body) };
        }
        if self.early.contains_key(&seq) {
            return Arrival::Duplicate(body);
        }
        // The expected one always has room.
        if seq != self.expected && (self.early.len() >= MAX_EARLY || seq - self.expected > WINDOW) {
            return Arrival::Refused;
        }
        self.early.insert(seq, body);
        self.until = self.until.or(Some(now + PATIENCE));
        Arrival::Queued
    }

    /// The message whose turn it is, with its number.
    pub(super) fn next(&mut self, now: Instant) -> Option<(u64, Body)> {
        let first = *self.early.first_key_value()?.0;
        if first != self.expected {
            if self.until.is_some_and(|until| now < until) {
                return None;
            }
            self.missed.extend(self.expected..first);
            while self.missed.len() as u64 > WINDOW {
                self.missed.pop_first();
            }
        }
        let (seq, body) = self.early.pop_first()?;
        self.expected = seq.saturating_add(1);
        // A further gap has a time of its own.
        self.until = (!self.early.is_empty()).then(|| now + PATIENCE);
        Some((seq, body))
    }

    /// When [`Self::next`] has something by time alone.
    pub(super) fn wake_at(&self) -> Option<Instant> {
        self.until
    }
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "a test needs some point in time to start from")]
mod tests {
    use super::*;
    use crate::transport::mesh::wire::Reason;

    const A: Body = Body::Ignored;
    const B: Body = Body::Hangup(Reason::Moved);

    fn drain(order: &mut Order, now: Instant) -> Vec<u64> {
        std::iter::from_fn(|| order.next(now)).map(|(seq, _)| seq).collect()
    }

    #[test]
    fn reordered_messages_come_in_order() {
        let (mut order, now) = (Order::default(), Instant::now());
        for seq in [2, 1] {
            assert_eq!(order.push(now, seq, A), Arrival::Queued);
            assert_eq!(drain(&mut order, now), [0; 0]);
        }
        order.push(now, 0, A);
        assert_eq!(drain(&mut order, now), [0, 1, 2]);
        assert_eq!(order.wake_at(), None);
    }

    #[test]
    fn missing_message_is_passed_over_after_five_seconds_and_taken_late_once() {
        let (mut order, now) = (Order::default(), Instant::now());
        order.push(now, 3, A);
        assert_eq!(order.wake_at(), Some(now + PATIENCE));
        assert_eq!(drain(&mut order, now + PATIENCE), [3]);
        assert_eq!(order.push(now, 1, B), Arrival::Late(B));
        assert_eq!(order.push(now, 1, B), Arrival::Duplicate(B));
        assert_eq!(order.push(now, 3, A), Arrival::Duplicate(A));
    }

    #[test]
    fn far_numbers_and_floods_are_refused() {
        let (mut order, now) = (Order::default(), Instant::now());
        assert_eq!(order.push(now, u64::MAX, A), Arrival::Refused);
        for seq in 1..=MAX_EARLY as u64 {
            assert_eq!(order.push(now, seq, A), Arrival::Queued);
        }
        assert_eq!(order.push(now, 40, A), Arrival::Refused);
        // The one that all others wait for is always taken.
        assert_eq!(order.push(now, 0, A), Arrival::Queued);
        assert_eq!(drain(&mut order, now).len(), MAX_EARLY + 1);
    }
}
