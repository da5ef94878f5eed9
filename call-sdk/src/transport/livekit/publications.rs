//! The way of local tracks to the SFU: asked for, granted, offered, live. And which offer is on its way.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use crate::transport::LocalTrackId;

/// How long the SFU may take to answer AddTrackRequest.
pub(super) const ANSWER_TO_ADD_TRACK: Duration = Duration::from_secs(10);
/// How long the SFU may take to answer an offer.
pub(super) const ANSWER_TO_OFFER: Duration = Duration::from_secs(15);

/// The local tracks of one connection, and the one negotiation that may be under way.
#[derive(Debug, Default)]
pub(super) struct Publications {
    tracks: HashMap<LocalTrackId, Stage>,
    /// The offer that waits for its answer.
    offer: Option<(u32, Instant)>,
    /// Something changed that no offer has carried yet.
    dirty: bool,
    last_offer: u32,
}

#[derive(Debug)]
enum Stage {
    Asked { cid: String, deadline: Instant },
    Granted { sid: String },
    Offered { sid: String, offer: u32 },
    Live { sid: String },
}

impl Publications {
    /// AddTrackRequest for `track` went out under `cid`.
    pub(super) fn ask(&mut self, now: Instant, track: LocalTrackId, cid: String) {
        self.tracks.insert(track, Stage::Asked { cid, deadline: now + ANSWER_TO_ADD_TRACK });
    }

    /// The SFU grants `cid`: the track, unless nobody asked. It goes into the next offer.
    pub(super) fn grant(&mut self, cid: &str, sid: String) -> Option<LocalTrackId> {
        let track = self.asked_as(cid)?;
        self.tracks.insert(track, Stage::Granted { sid });
        self.dirty = true;
        Some(track)
    }

    /// The SFU refuses `cid`: the track, unless nobody asked.
    pub(super) fn refuse(&mut self, cid: &str) -> Option<LocalTrackId> {
        let track = self.asked_as(cid)?;
        self.tracks.remove(&track);
        Some(track)
    }

    /// Forgets a track; says whether its end must be negotiated.
    pub(super) fn remove(&mut self, track: LocalTrackId) -> bool {
        let negotiated = matches!(
            self.tracks.remove(&track),
            Some(Stage::Granted { .. } | Stage::Offered { .. } | Stage::Live { .. })
        );
        self.dirty |= negotiated;
        negotiated
    }

    /// The first offer went out with the request to join.
    pub(super) fn offered_on_joining(&mut self, now: Instant) {
        self.last_offer = 1;
        self.offer = Some((1, now + ANSWER_TO_OFFER));
    }

    /// Makes an offer due, for what no track asks for.
    pub(super) fn require_offer(&mut self) {
        self.dirty = true;
    }

    /// The id of the offer to make now, if one is due and none is under way.
    pub(super) fn next_offer(&mut self, now: Instant) -> Option<u32> {
        if !self.dirty || self.offer.is_some() {
            return None;
        }
        self.dirty = false;
        self.last_offer = self.last_offer.wrapping_add(1).max(1);
        self.offer = Some((self.last_offer, now + ANSWER_TO_OFFER));
        for stage in self.tracks.values_mut() {
            if let Stage::Granted { sid } = stage {
                *stage = Stage::Offered { sid: std::mem::take(sid), offer: self.last_offer };
            }
        }
        Some(self.last_offer)
    }

    /// Whether something is asked or offered that the other side may have got or not.
    pub(super) fn is_undecided(&self) -> bool {
        self.offer.is_some() || self.tracks.values().any(|stage| matches!(stage, Stage::Asked { .. }))
    }

    /// Whether an answer with this id belongs to the offer under way. Zero is "unknown" and is taken.
    pub(super) fn expects_answer(&self, id: u32) -> bool {
        self.offer.is_some_and(|(offer, _)| id == 0 || id == offer)
    }

    /// The offer under way is answered: the tracks that are live from now on.
    pub(super) fn answered(&mut self) -> Vec<LocalTrackId> {
        let Some((answered, _)) = self.offer.take() else { return Vec::new() };
        let mut live = Vec::new();
        for (track, stage) in &mut self.tracks {
            if let Stage::Offered { sid, offer } = stage
                && *offer == answered
            {
                *stage = Stage::Live { sid: std::mem::take(sid) };
                live.push(*track);
            }
        }
        live
    }

    /// The SFU's name of a granted track.
    pub(super) fn sid(&self, track: LocalTrackId) -> Option<&str> {
        match self.tracks.get(&track)? {
            Stage::Asked { .. } => None,
            Stage::Granted { sid } | Stage::Offered { sid, .. } | Stage::Live { sid } => Some(sid),
        }
    }

    /// The track that the SFU calls `sid`.
    pub(super) fn track_of(&self, sid: &str) -> Option<LocalTrackId> {
        self.tracks.keys().copied().find(|track| self.sid(*track) == Some(sid))
    }

    /// Whether the SFU carries the track.
    pub(super) fn is_live(&self, track: LocalTrackId) -> bool {
        matches!(self.tracks.get(&track), Some(Stage::Live { .. }))
    }

    /// The tracks that the SFU has a name for.
    pub(super) fn granted(&self) -> impl Iterator<Item = (LocalTrackId, &str)> {
        self.tracks.keys().filter_map(|track| Some((*track, self.sid(*track)?)))
    }

    /// Whether every track is live.
    pub(super) fn settled(&self) -> bool {
        self.tracks.values().all(|stage| matches!(stage, Stage::Live { .. }))
    }

    /// Tracks that the SFU never answered for; they are forgotten.
    pub(super) fn take_unanswered(&mut self, now: Instant) -> Vec<LocalTrackId> {
        let overdue = |stage: &Stage| matches!(stage, Stage::Asked { deadline, .. } if *deadline <= now);
        let tracks: Vec<_> =
            self.tracks.iter().filter(|(_, stage)| overdue(stage)).map(|(track, _)| *track).collect();
        tracks.iter().for_each(|track| drop(self.tracks.remove(track)));
        tracks
    }

    /// Whether the SFU owes an answer to an offer for too long.
    pub(super) fn negotiation_overdue(&self, now: Instant) -> bool {
        self.offer.is_some_and(|(_, deadline)| deadline <= now)
    }

    /// When the next of the two can be true.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let asked = self.tracks.values().filter_map(|stage| match stage {
            Stage::Asked { deadline, .. } => Some(*deadline),
            _ => None,
        });
        asked.chain(self.offer.map(|(_, deadline)| deadline)).min()
    }

    fn asked_as(&self, wanted: &str) -> Option<LocalTrackId> {
        self.tracks.iter().find_map(|(track, stage)| match stage {
            Stage::Asked { cid, .. } if cid == wanted => Some(*track),
            _ => None,
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::disallowed_methods, reason = "an arbitrary origin for virtual time")]

    use super::*;

    const A: LocalTrackId = LocalTrackId(1);
    const B: LocalTrackId = LocalTrackId(2);

    fn start() -> Instant {
        Instant::now()
    }

    #[test]
    fn track_granted_during_negotiation_waits_for_next_offer() {
        let now = start();
        let mut all = Publications::default();
        all.ask(now, A, "a".into());
        all.ask(now, B, "b".into());
        assert_eq!(all.next_offer(now), None, "nothing granted");
        assert_eq!(all.grant("a", "TR_a".into()), Some(A));
        let first = all.next_offer(now).unwrap();
        assert_eq!(all.grant("b", "TR_b".into()), Some(B));
        assert_eq!(all.next_offer(now), None, "one at a time");
        assert!(all.is_undecided());
        assert!(!all.expects_answer(first + 1) && all.expects_answer(first) && all.expects_answer(0));
        assert_eq!(all.answered(), [A]);
        assert!(!all.settled());
        let second = all.next_offer(now).unwrap();
        assert!(second > first);
        assert_eq!(all.answered(), [B]);
        assert!(all.settled() && !all.is_undecided());
        assert_eq!((all.sid(B), all.track_of("TR_a")), (Some("TR_b"), Some(A)));
    }

    #[test]
    fn refusal_of_unknown_cid_is_ignored() {
        let now = start();
        let mut all = Publications::default();
        all.ask(now, A, "a".into());
        assert_eq!(all.refuse("zzz"), None);
        assert_eq!(all.grant("zzz", "TR_z".into()), None);
        assert_eq!(all.refuse("a"), Some(A));
        assert!(all.settled());
    }

    #[test]
    fn removal_of_granted_track_requires_an_offer() {
        let now = start();
        let mut all = Publications::default();
        all.ask(now, A, "a".into());
        assert!(!all.remove(A));
        assert_eq!(all.next_offer(now), None);
        all.ask(now, B, "b".into());
        all.grant("b", "TR_b".into());
        all.next_offer(now);
        all.answered();
        assert!(all.remove(B));
        assert!(all.next_offer(now).is_some());
    }

    #[test]
    fn missing_answers_are_overdue() {
        let now = start();
        let mut all = Publications::default();
        all.ask(now, A, "a".into());
        assert_eq!(all.deadline(), Some(now + ANSWER_TO_ADD_TRACK));
        assert_eq!(all.take_unanswered(now), []);
        assert_eq!(all.take_unanswered(now + ANSWER_TO_ADD_TRACK), [A]);
        all.ask(now, B, "b".into());
        all.grant("b", "TR_b".into());
        all.next_offer(now);
        assert!(!all.negotiation_overdue(now));
        assert!(all.negotiation_overdue(all.deadline().unwrap()));
    }
}
