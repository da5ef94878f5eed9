//! When the authorisation service is told that a participant has gone. No I/O; the time is an argument.
//!
//! A signalling connection that breaks off is not a leave yet: a reverse proxy that is reloaded cuts all of them, and
//! the clients are back within a second or two. Told at once, the service would have everybody's delayed leave sent,
//! and the whole call would leave the Matrix room and join again, with new keys for all.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use livekit_protocol::DisconnectReason;

use crate::room::Presence;

/// How long somebody whose signalling connection broke off may take to be back; LiveKit grants as much after the loss
/// of the media connection.
const BACK_WITHIN: Duration = Duration::from_secs(5);
/// How many may be waited for at a time.
const WAITING: usize = 10_000;

/// Comings and goings on their way to the authorisation service.
#[derive(Debug, Default)]
pub(crate) struct Goings {
    /// In the order of their times.
    waiting: VecDeque<(Instant, Presence)>,
}

impl Goings {
    /// Takes in who has come or gone, and returns what is to be told at once.
    pub(crate) fn handle(&mut self, now: Instant, presence: Presence) -> Option<Presence> {
        match presence.gone {
            Some(DisconnectReason::SignalClose) if self.waiting.len() < WAITING => {
                self.waiting.push_back((now + BACK_WITHIN, presence));
                None
            }
            Some(_) => Some(presence),
            None => {
                let same = |gone: &Presence| gone.room == presence.room && gone.identity == presence.identity;
                self.waiting.retain(|(_, gone)| !same(gone));
                Some(presence)
            }
        }
    }

    /// Who has not come back in time; to be called until it returns `None`.
    pub(crate) fn handle_timeout(&mut self, now: Instant) -> Option<Presence> {
        self.waiting.pop_front_if(|(at, _)| *at <= now).map(|(_, gone)| gone)
    }

    /// When [`Self::handle_timeout`] is due next.
    pub(crate) fn timeout(&self) -> Option<Instant> {
        self.waiting.front().map(|(at, _)| *at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn presence(identity: &str, sid: &str, gone: Option<DisconnectReason>) -> Presence {
        Presence { room: "room".into(), identity: identity.into(), sid: sid.into(), gone }
    }

    #[expect(clippy::disallowed_methods, reason = "an arbitrary origin of virtual time")]
    fn start() -> Instant {
        Instant::now()
    }

    #[test]
    fn a_goodbye_is_told_at_once() {
        let mut goings = Goings::default();
        for reason in [DisconnectReason::ClientInitiated, DisconnectReason::ParticipantRemoved] {
            let gone = presence("alice", "PA_1", Some(reason));
            assert_eq!(goings.handle(start(), gone.clone()), Some(gone));
        }
        assert_eq!(goings.timeout(), None);
    }

    #[test]
    fn a_connection_that_broke_off_is_told_when_nobody_came_back() {
        let (mut goings, start) = (Goings::default(), start());
        let alice = presence("alice", "PA_1", Some(DisconnectReason::SignalClose));
        let bob = presence("bob", "PA_2", Some(DisconnectReason::SignalClose));
        assert_eq!(goings.handle(start, alice.clone()), None);
        assert_eq!(goings.handle(start + Duration::from_secs(1), bob.clone()), None);
        assert_eq!(goings.timeout(), Some(start + BACK_WITHIN));
        assert_eq!(goings.handle_timeout(start + BACK_WITHIN - Duration::from_millis(1)), None);
        assert_eq!(goings.handle_timeout(start + BACK_WITHIN), Some(alice));
        assert_eq!(goings.handle_timeout(start + BACK_WITHIN), None);
        assert_eq!(goings.handle_timeout(start + BACK_WITHIN * 2), Some(bob));
        assert_eq!(goings.timeout(), None);
    }

    #[test]
    fn who_comes_back_was_never_gone() {
        let (mut goings, start) = (Goings::default(), start());
        goings.handle(start, presence("alice", "PA_1", Some(DisconnectReason::SignalClose)));
        goings.handle(start, presence("bob", "PA_2", Some(DisconnectReason::SignalClose)));
        let back = presence("alice", "PA_3", None);
        assert_eq!(goings.handle(start + Duration::from_secs(2), back.clone()), Some(back));
        let told = goings.handle_timeout(start + BACK_WITHIN).unwrap();
        assert_eq!(told.identity.as_str(), "bob");
        assert_eq!(goings.handle_timeout(start + BACK_WITHIN), None);
    }

    #[test]
    fn what_is_waited_for_is_bounded() {
        let (mut goings, start) = (Goings::default(), start());
        let gone = |n: usize| presence(&format!("user{n}"), "PA_1", Some(DisconnectReason::SignalClose));
        for n in 0..WAITING {
            assert_eq!(goings.handle(start, gone(n)), None);
        }
        assert_eq!(goings.handle(start, gone(WAITING)), Some(gone(WAITING)));
    }
}
