//! Messages that came too early: before the membership of their sender, or before the invite of their call.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use crate::{member::Device, transport::mesh::wire::Message};

/// How long a message waits.
const PATIENCE: Duration = Duration::from_secs(30);

/// A bounded number of waiting messages.
#[derive(Debug)]
pub(super) struct Parked {
    limit: usize,
    messages: VecDeque<(Instant, Device, Message)>,
}

impl Parked {
    /// Room for `limit` messages.
    pub(super) fn new(limit: usize) -> Self {
        Self { limit, messages: VecDeque::new() }
    }

    /// Keeps a message. Without room, the oldest one of the device with the most makes room, so that one device cannot
    /// push out the others.
    pub(super) fn park(&mut self, now: Instant, from: &Device, message: Message) {
        self.expire(now);
        if self.messages.iter().any(|(_, device, known)| device == from && *known == message) {
            return;
        }
        self.messages.push_back((now + PATIENCE, from.clone(), message));
        if self.messages.len() > self.limit {
            let count = |of: &Device| self.messages.iter().filter(|(_, device, _)| device == of).count();
            let most = self.messages.iter().map(|(_, device, _)| count(device)).max();
            let victim = self.messages.iter().position(|(_, device, _)| Some(count(device)) == most);
            victim.and_then(|victim| self.messages.remove(victim));
        }
    }

    /// Takes out the messages that `wanted` is true for, oldest first.
    pub(super) fn take(
        &mut self,
        now: Instant,
        wanted: impl Fn(&Device, &Message) -> bool,
    ) -> Vec<(Device, Message)> {
        self.expire(now);
        let (taken, kept) = std::mem::take(&mut self.messages)
            .into_iter()
            .partition::<VecDeque<_>, _>(|(_, device, message)| wanted(device, message));
        self.messages = kept;
        taken.into_iter().map(|(_, device, message)| (device, message)).collect()
    }

    /// Drops what waited too long.
    pub(super) fn expire(&mut self, now: Instant) {
        while self.messages.front().is_some_and(|(until, ..)| *until <= now) {
            self.messages.pop_front();
        }
    }

    /// When a message expires next.
    pub(super) fn wake_at(&self) -> Option<Instant> {
        self.messages.front().map(|(until, ..)| *until)
    }

    /// Drops everything.
    pub(super) fn clear(&mut self) {
        self.messages.clear();
    }

    #[cfg(any(test, feature = "fuzzing"))]
    pub(super) fn len(&self) -> usize {
        self.messages.len()
    }
}
