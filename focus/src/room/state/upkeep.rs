//! What time brings of a room.

use std::time::Instant;

use livekit_protocol::{
    self as proto, DisconnectReason, participant_info::State, signal_response::Message as Down,
};

use crate::plane::MediaKind;
use crate::room::Now;

use super::*;

impl Room {
    pub(crate) fn tick(&mut self, desk: &mut Desk, now: Now) {
        let sessions: Vec<_> = self.participants.keys().copied().collect();
        for session in sessions {
            let Some(participant) = self.participants.get_mut(&session) else { continue };
            if participant.state == State::Joined && now.instant >= participant.joined.instant + ACTIVE_WITHIN
            {
                self.remove(desk, now, session, DisconnectReason::JoinFailure, Goodbye::Disconnect);
                continue;
            }
            let unanswered = participant.sub_offer_at.is_some_and(|at| now.instant >= at + ANSWER_WITHIN);
            if participant.state == State::Active && unanswered {
                self.remove(desk, now, session, DisconnectReason::StateMismatch, Goodbye::Rejoin);
                continue;
            }
            let mut gone = Vec::new();
            participant.missing.retain(|sid, deadline| {
                if now.instant >= *deadline {
                    gone.push(sid.clone());
                }
                now.instant < *deadline
            });
            for track_sid in gone {
                let err = proto::SubscriptionError::SeTrackNotfound.into();
                desk.send(
                    session,
                    Down::SubscriptionResponse(proto::SubscriptionResponse { track_sid, err }),
                );
            }
            if now.instant >= participant.refresh_at {
                self.refresh_token(desk, now, session);
            }
        }
        let videos: Vec<_> =
            self.tracks.values().filter(|t| t.kind == MediaKind::Video).map(|t| t.key).collect();
        for key in videos {
            self.dynacast(desk, now.instant, key);
        }
        self.tell_speakers(desk, now.instant);
        if self.update_due.is_some_and(|due| now.instant >= due) {
            self.tell_room(desk, now);
        }
    }

    pub(super) fn tell_speakers(&mut self, desk: &mut Desk, now: Instant) {
        let changes = self.speakers.changes(now);
        if changes.is_empty() {
            return;
        }
        for listener in self.participants.values() {
            let speakers: Vec<_> = changes
                .iter()
                .filter(|change| {
                    change.session == listener.session || listener.subscriptions.contains_key(&change.track)
                })
                .filter_map(|change| {
                    let sid = self.participants.get(&change.session)?.sid.to_string();
                    Some(proto::SpeakerInfo { sid, level: change.level, active: change.active })
                })
                .collect();
            if !speakers.is_empty() {
                desk.send(listener.session, Down::SpeakersChanged(proto::SpeakersChanged { speakers }));
            }
        }
    }

    pub(super) fn counts_changed(&mut self, now: Now) {
        self.update_due.get_or_insert_with(|| now.instant.max(self.updated + ROOM_UPDATE_EVERY));
    }

    /// Describes the room to everybody.
    pub(crate) fn tell_room(&mut self, desk: &mut Desk, now: Now) {
        self.update_due = None;
        self.updated = now.instant;
        let room = self.info(desk);
        for session in self.participants.keys() {
            desk.send(*session, Down::RoomUpdate(proto::RoomUpdate { room: Some(room.clone()) }));
        }
    }
}
