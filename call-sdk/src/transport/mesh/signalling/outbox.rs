//! Our messages to one peer: those of the present round, and the hangup of the call before.
//!
//! They are kept after they were sent, because the other side may not have got them. A message that the homeserver does
//! not take holds up all of them for a while: the next one would fail, too.

use std::{fmt, time::Instant};

use serde_json::Value;

use super::MessageId;
use crate::{
    matrix::{Delivery, DeliveryFailure},
    time::retry_delay,
};

/// Most messages of one round. Further candidates of an absurd number of network interfaces are not sent.
const MAX_MESSAGES: usize = 32;

/// What a message is for the outbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A description: everything before it is settled.
    Description,
    /// Something that belongs to the last description.
    Follower,
    /// The streams; newer ones make it superfluous.
    Streams,
    /// The end of a call. It outlives the call until the homeserver has it.
    Hangup,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Waiting,
    Sending(MessageId),
    Sent,
}

struct Entry {
    kind: Kind,
    state: State,
    event_type: &'static str,
    content: Value,
}

/// The messages to one peer.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    entries: Vec<Entry>,
    failures: u32,
    /// When the homeserver is tried again.
    held_until: Option<Instant>,
}

impl Outbox {
    /// Adds a message.
    pub(super) fn push(&mut self, kind: Kind, (event_type, content): (&'static str, Value)) {
        match kind {
            // What was not sent yet stays, as a missing number would hold up the other side.
            Kind::Description => self.entries.retain(|entry| !entry.is_sent()),
            Kind::Follower => {}
            Kind::Streams => self.entries.retain(|entry| entry.kind != Kind::Streams || !entry.is_sent()),
            Kind::Hangup => self.entries.clear(),
        }
        if self.entries.len() >= MAX_MESSAGES && kind != Kind::Follower {
            let oldest = self.entries.iter().position(|entry| entry.kind != Kind::Description);
            self.entries.remove(oldest.unwrap_or_default());
        }
        if self.entries.len() < MAX_MESSAGES {
            self.entries.push(Entry { kind, state: State::Waiting, event_type, content });
        }
    }

    /// Sends the messages of this round again, unchanged.
    pub(super) fn resend(&mut self) {
        for entry in self.entries.iter_mut().filter(|entry| entry.is_sent()) {
            entry.state = State::Waiting;
        }
    }

    /// Drops the messages of a call that is over, but not a hangup.
    pub(super) fn end(&mut self) {
        self.entries.retain(|entry| entry.kind == Kind::Hangup);
    }

    /// Takes the outcome of a message; whether it was one of these.
    pub(super) fn sent(&mut self, now: Instant, id: MessageId, result: &Delivery) -> bool {
        let Some(entry) = self.entries.iter_mut().find(|entry| entry.state == State::Sending(id)) else {
            return false;
        };
        match result {
            Ok(()) => {
                entry.state = State::Sent;
                self.failures = 0;
                self.held_until = None;
                self.entries.retain(|entry| entry.kind != Kind::Hangup || !entry.is_sent());
            }
            Err(failure) => {
                entry.state = State::Waiting;
                // Messages that were under way together fail together: that is one failure.
                if self.held_until.is_none() {
                    self.failures = self.failures.saturating_add(1);
                    let asked = match failure {
                        DeliveryFailure::RateLimited { retry_after } => *retry_after,
                        _ => None,
                    };
                    let wait = retry_delay(self.failures, asked);
                    self.held_until = Some(now + wait);
                }
            }
        }
        true
    }

    /// The next message to send, which is named `id` from now on.
    pub(super) fn next(&mut self, now: Instant, id: MessageId) -> Option<(&'static str, Value)> {
        if self.held_until.is_some_and(|until| now < until) {
            return None;
        }
        self.held_until = None;
        let entry = self.entries.iter_mut().find(|entry| entry.state == State::Waiting)?;
        entry.state = State::Sending(id);
        Some((entry.event_type, entry.content.clone()))
    }

    /// When a message is sent again that the homeserver has not taken.
    pub(super) fn wake_at(&self) -> Option<Instant> {
        self.held_until.filter(|_| self.entries.iter().any(|entry| entry.state == State::Waiting))
    }

    #[cfg(any(test, feature = "fuzzing"))]
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }
}

impl Entry {
    fn is_sent(&self) -> bool {
        self.state == State::Sent
    }
}

// The content names addresses and is left out.
impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({:?})", self.event_type, self.state)
    }
}
