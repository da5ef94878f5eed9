//! What the admin API asks of a room.

use livekit_protocol::{self as proto, ParticipantInfo, signal_response::Message as Down};

use crate::plane::PeerRole;
use crate::room::Now;
use crate::room::ids::SessionId;

use super::*;

impl Room {
    pub(crate) fn participant_info(&self, identity: &str) -> Option<ParticipantInfo> {
        let session = self.session_of(identity)?;
        Some(self.participants.get(&session)?.info(&self.tracks))
    }

    pub(crate) fn participant_infos(&self) -> Vec<ParticipantInfo> {
        self.participants.values().map(|participant| participant.info(&self.tracks)).collect()
    }

    pub(crate) fn track_count(&self) -> usize {
        self.tracks.len()
    }

    /// Mutes a track and tells its publisher to; `None` if there is no such track of this participant.
    pub(crate) fn admin_mute(
        &mut self,
        desk: &mut Desk,
        now: Now,
        session: SessionId,
        sid: &str,
    ) -> Option<proto::TrackInfo> {
        let key = self.by_track_sid.get(sid).copied()?;
        if self.tracks.get(&key)?.owner != session {
            return None;
        }
        desk.send(session, Down::Mute(proto::MuteTrackRequest { sid: sid.to_owned(), muted: true }));
        self.set_muted(desk, now, session, sid, true);
        Some(self.tracks.get(&key)?.info.clone())
    }

    /// Changes what a participant is and may do; `false` if the limits are exceeded.
    pub(crate) fn admin_update(
        &mut self,
        desk: &mut Desk,
        now: Now,
        session: SessionId,
        change: crate::room::ParticipantChange,
    ) -> bool {
        let Some(participant) = self.participants.get_mut(&session) else { return false };
        if !participant.describe(&change.name, &change.metadata, &change.attributes) {
            return false;
        }
        if let Some(permission) = change.permission {
            participant.permission = permission;
        }
        participant.touch();
        let ended: Vec<_> = participant
            .tracks
            .iter()
            .filter(|key| self.tracks.get(*key).is_some_and(|t| !participant.may_publish(t.info.source)))
            .copied()
            .collect();
        if participant.permission.can_subscribe && participant.subscriber.is_none() {
            participant.subscriber = Some(desk.peer(session, PeerRole::Subscriber));
        }
        self.announce(desk, session, true);
        for key in ended {
            self.unpublish(desk, now, key, true);
        }
        self.reconcile_subscriber(desk, now, session);
        self.refresh_token(desk, now, session);
        true
    }

    pub(crate) fn info(&self, desk: &Desk) -> proto::Room {
        let visible = || self.participants.values().filter(|participant| !participant.hidden());
        proto::Room {
            sid: self.sid.clone(),
            name: self.name.to_string(),
            empty_timeout: u32::try_from(self.empty_timeout.as_secs()).unwrap_or(u32::MAX),
            departure_timeout: u32::try_from(self.departure_timeout.as_secs()).unwrap_or(u32::MAX),
            max_participants: self.max_participants,
            creation_time: self.created.unix_s(),
            creation_time_ms: self.created.unix_ms(),
            enabled_codecs: desk.settings.wire_codecs(),
            metadata: self.metadata.clone(),
            num_participants: u32::try_from(visible().count()).unwrap_or(u32::MAX),
            num_publishers: u32::try_from(visible().filter(|p| !p.tracks.is_empty()).count())
                .unwrap_or(u32::MAX),
            ..proto::Room::default()
        }
    }
}
