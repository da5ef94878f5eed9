//! Events on their way to the control plane, when it reads too slowly.
//!
//! Media never waits for the control plane. Events that report a state (an answer, an offer, a failure) are kept
//! until they are taken; there are few per command. Events that flow (audio levels, messages on `_lossy`) are
//! dropped and counted while too many wait. Messages on `_reliable` must not vanish one by one: they are kept up
//! to a limit in bytes, and beyond it their sender is given up, so that it connects again and knows.

use std::collections::VecDeque;

use super::{Channel, Event, PeerId};

/// Flowing events are dropped while this many events wait.
const FLOWING: usize = 256;
/// While this many events wait, no further command should be read: whoever sends them must read events.
const FULL: usize = 4096;
/// Bytes of `_reliable` messages that may wait.
const RELIABLE_BYTES: usize = 4 << 20;

/// The queue.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    waiting: VecDeque<Event>,
    reliable_bytes: usize,
}

/// What became of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kept {
    /// It waits to be taken.
    Yes,
    /// It was dropped; another like it will come.
    Dropped,
    /// Its sender's messages cannot be kept: give the peer up.
    GiveUp(PeerId),
}

impl Outbox {
    /// Puts an event at the end.
    pub(crate) fn push(&mut self, event: Event) -> Kept {
        match &event {
            Event::AudioLevel { .. } | Event::Data { channel: Channel::Lossy, .. }
                if self.waiting.len() >= FLOWING =>
            {
                return Kept::Dropped;
            }
            Event::Data { peer, channel: Channel::Reliable, payload } => {
                if self.reliable_bytes + payload.len() > RELIABLE_BYTES || self.is_full() {
                    return Kept::GiveUp(*peer);
                }
                self.reliable_bytes += payload.len();
            }
            _ => {}
        }
        self.waiting.push_back(event);
        Kept::Yes
    }

    /// Takes the oldest event.
    pub(crate) fn pop(&mut self) -> Option<Event> {
        let event = self.waiting.pop_front()?;
        if let Event::Data { channel: Channel::Reliable, payload, .. } = &event {
            self.reliable_bytes -= payload.len();
        }
        Some(event)
    }

    /// Whether nothing waits.
    pub(crate) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Whether commands should wait too.
    pub(crate) fn is_full(&self) -> bool {
        self.waiting.len() >= FULL
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn data(channel: Channel, bytes: usize) -> Event {
        Event::Data { peer: PeerId(1), channel, payload: Bytes::from(vec![0; bytes]) }
    }

    #[test]
    fn what_flows_is_dropped_and_what_reports_is_kept() {
        let mut outbox = Outbox::default();
        for _ in 0..FLOWING {
            assert_eq!(outbox.push(data(Channel::Lossy, 1)), Kept::Yes);
        }
        assert_eq!(outbox.push(data(Channel::Lossy, 1)), Kept::Dropped);
        assert_eq!(outbox.push(Event::Connected { peer: PeerId(1) }), Kept::Yes);
        let mut events = std::iter::from_fn(|| outbox.pop());
        assert!(matches!(events.by_ref().last(), Some(Event::Connected { .. })));
        assert!(outbox.is_empty());
    }

    #[test]
    fn reliable_messages_are_kept_whole_or_their_sender_is_given_up() {
        let mut outbox = Outbox::default();
        for _ in 0..RELIABLE_BYTES / 65_536 {
            assert_eq!(outbox.push(data(Channel::Reliable, 65_536)), Kept::Yes);
        }
        assert_eq!(outbox.push(data(Channel::Reliable, 1)), Kept::GiveUp(PeerId(1)));
        outbox.pop();
        assert_eq!(outbox.push(data(Channel::Reliable, 65_536)), Kept::Yes);
    }
}
