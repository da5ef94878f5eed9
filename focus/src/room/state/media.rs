//! What the media plane says of a room.

use bytes::Bytes;
use livekit_protocol::{
    self as proto, DisconnectReason, participant_info::State, signal_response::Message as Down,
};

use crate::plane::{Channel, Command, MediaKind, OfferedSection, PeerId, TrackKey};
use crate::room::ids::SessionId;
use crate::room::track::match_section;
use crate::room::{Now, data};

use super::*;

impl Room {
    pub(crate) fn answered(
        &mut self,
        desk: &mut Desk,
        now: Now,
        session: SessionId,
        sdp: String,
        sections: Vec<OfferedSection>,
    ) {
        let Some(participant) = self.participants.get_mut(&session) else { return };
        let id = participant.offers.pop_front().unwrap_or_default();
        let answer = proto::SessionDescription {
            r#type: "answer".to_owned(),
            sdp,
            id,
            // Empty in signalling v0: the client has one map for both of its connections.
            ..proto::SessionDescription::default()
        };
        desk.send(session, Down::Answer(answer));
        participant.sections = sections;

        // There is no message for "unpublish": the section stops sending.
        let ended: Vec<_> = participant
            .tracks
            .iter()
            .filter(|key| {
                let mid = self.tracks.get(*key).map(|track| track.info.mid.as_str());
                !participant.sections.iter().any(|s| s.sends && Some(s.mid.as_str()) == mid)
            })
            .copied()
            .collect();
        for key in ended {
            self.unpublish(desk, now, key, false);
        }
        self.publish_matching(desk, now, session);
    }

    /// Publishes what is announced and has a section that sends.
    pub(super) fn publish_matching(&mut self, desk: &mut Desk, now: Now, session: SessionId) {
        let Some(participant) = self.participants.get_mut(&session) else { return };
        let mut published = Vec::new();
        for section in participant.sections.iter().filter(|section| section.sends) {
            let bound = participant
                .tracks
                .iter()
                .any(|key| self.tracks.get(key).is_some_and(|track| track.info.mid == section.mid));
            if bound {
                continue;
            }
            let Some(index) = match_section(&participant.pending, section) else { continue };
            let pending = participant.pending.remove(index);
            let key = TrackKey(desk.number());
            let (track, rids) = pending.publish(now.instant, key, session, section);
            desk.tracks.insert(key, session);
            desk.plane(Command::Publish {
                peer: participant.publisher,
                mid: section.mid.clone(),
                track: key,
                kind: track.kind,
                rids,
            });
            tracing::info!(
                room = %self.name, identity = %participant.identity, track = %track.info.sid,
                mime = %track.info.mime_type, encrypted = track.info.encryption != 0, "track published"
            );
            participant.tracks.push(key);
            self.by_track_sid.insert(track.info.sid.clone(), key);
            self.tracks.insert(key, track);
            published.push(key);
        }
        if published.is_empty() {
            return;
        }
        participant.touch();
        // Everybody must know a track before the offer that carries it.
        self.announce(desk, session, true);
        for key in published {
            self.reconcile_track(desk, now, key);
            self.dynacast(desk, now.instant, key);
        }
        self.counts_changed(now);
    }

    pub(crate) fn offered(
        &mut self,
        desk: &mut Desk,
        now: Now,
        session: SessionId,
        sdp: String,
        mids: Vec<(String, TrackKey)>,
    ) {
        let Some(participant) = self.participants.get_mut(&session) else { return };
        participant.sub_offer_id = participant.sub_offer_id.wrapping_add(1).max(1);
        participant.sub_offer_at = Some(now.instant);
        let offer = proto::SessionDescription {
            r#type: "offer".to_owned(),
            sdp,
            id: participant.sub_offer_id,
            mid_to_track_id: mids
                .iter()
                .filter_map(|(mid, key)| Some((mid.clone(), self.tracks.get(key)?.info.sid.clone())))
                .collect(),
        };
        desk.send(session, Down::Offer(offer));
        for (_, key) in mids {
            let Some(subscription) = participant.subscriptions.get_mut(&key) else { continue };
            if std::mem::replace(&mut subscription.announced, true) {
                continue;
            }
            if let Some(track) = self.tracks.get(&key) {
                let track_sid = track.info.sid.clone();
                desk.send(track.owner, Down::TrackSubscribed(proto::TrackSubscribed { track_sid }));
            }
        }
    }

    pub(crate) fn rejected(&mut self, desk: &mut Desk, now: Now, session: SessionId, reason: &str) {
        desk.counters.rejected_sdp.add(1);
        tracing::warn!(room = %self.name, reason, "a client's session description was refused");
        self.remove(desk, now, session, DisconnectReason::StateMismatch, Goodbye::Rejoin);
    }

    pub(crate) fn connected(&mut self, desk: &mut Desk, session: SessionId, peer: PeerId) {
        let Some(participant) = self.participants.get_mut(&session) else { return };
        if participant.primary() == peer && participant.state == State::Joined {
            participant.state = State::Active;
            participant.touch();
            tracing::info!(room = %self.name, identity = %participant.identity, "participant active");
            self.announce(desk, session, true);
            if let Some(participant) = self.participants.get(&session) {
                desk.out.push_back(self.presence(participant, None));
            }
        }
    }

    pub(crate) fn failed(&mut self, desk: &mut Desk, now: Now, session: SessionId, reason: &str) {
        tracing::info!(room = %self.name, reason, "a media connection failed");
        self.remove(desk, now, session, DisconnectReason::ConnectionTimeout, Goodbye::Rejoin);
    }

    pub(crate) fn data(&mut self, desk: &mut Desk, session: SessionId, channel: Channel, payload: &Bytes) {
        let Some(sender) = self.participants.get_mut(&session) else { return };
        if !sender.permission.can_publish_data {
            desk.counters.dropped_data.add(1);
            return;
        }
        let hidden = sender.hidden();
        let named = data::Sender {
            identity: if hidden { "" } else { sender.identity.as_str() },
            sid: if hidden { "" } else { sender.sid.as_str() },
            agent: sender.kind == proto::participant_info::Kind::Agent,
        };
        let patched = match data::patch(payload, channel, named) {
            Ok(patched) => patched,
            Err(error) => {
                desk.counters.dropped_data.add(1);
                tracing::debug!(room = %self.name, identity = %sender.identity, %error, "data packet dropped");
                return;
            }
        };
        if channel == Channel::Reliable && patched.sequence > 0 {
            if patched.sequence <= sender.last_sequence {
                desk.counters.dropped_data.add(1);
                return;
            }
            sender.last_sequence = patched.sequence;
        }
        self.relay(desk, Some(session), channel, &patched);
    }

    /// Sends a data packet to its destinations; without any, to everybody but the sender.
    pub(crate) fn relay(
        &self,
        desk: &mut Desk,
        sender: Option<SessionId>,
        channel: Channel,
        packet: &data::Patched,
    ) {
        let everybody = packet.destinations.is_empty() && packet.destination_sids.is_empty();
        for receiver in self.participants.values() {
            let meant = if everybody {
                Some(receiver.session) != sender
            } else {
                packet.destinations.iter().any(|identity| identity == receiver.identity.as_str())
                    || packet.destination_sids.iter().any(|sid| sid == receiver.sid.as_str())
            };
            if meant && receiver.state == State::Active {
                let peer = receiver.primary();
                desk.plane(Command::SendData { peer, channel, payload: packet.payload.clone() });
            }
        }
    }

    pub(crate) fn audio_level(
        &mut self,
        now: Now,
        session: SessionId,
        key: TrackKey,
        level: u8,
        active_share: f32,
    ) {
        let audible =
            self.tracks.get(&key).is_some_and(|track| track.kind == MediaKind::Audio && !track.info.muted);
        tracing::trace!(room = %self.name, track = key.0, level, active_share, audible, "audio level");
        if audible && self.participants.get(&session).is_some_and(|p| !p.hidden()) {
            self.speakers.report(now.instant, session, key, level, active_share);
        }
    }
}
