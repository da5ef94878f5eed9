//! What clients ask of a room.

use livekit_protocol::{
    self as proto, AddTrackRequest, DisconnectReason,
    request_response::{Reason, Request},
    signal_request::Message as Up,
    signal_response::Message as Down,
};

use crate::plane::Command;
use crate::room::Now;
use crate::room::ids::{SessionId, fresh};
use crate::room::participant::TrackSettings;
use crate::room::quality::Quality;
use crate::room::track::{Pending, media_kind, sid_prefix};

use super::*;

impl Room {
    pub(crate) fn signal(&mut self, desk: &mut Desk, now: Now, session: SessionId, message: Up) {
        if !self.participants.contains_key(&session) {
            return;
        }
        match message {
            Up::Offer(offer) => self.offer(desk, now, session, offer),
            Up::Answer(answer) => self.answer(desk, session, answer),
            Up::AddTrack(request) => self.add_track(desk, now, session, request),
            Up::Mute(request) => self.mute(desk, now, session, &request),
            Up::Subscription(request) => self.update_subscription(desk, now, session, &request),
            Up::TrackSetting(request) => self.update_settings(desk, now, session, &request),
            Up::SubscriptionPermission(request) => {
                self.update_permission_rules(desk, now, session, request);
            }
            Up::Leave(request) => {
                let reason = match request.reason() {
                    DisconnectReason::UnknownReason => DisconnectReason::ClientInitiated,
                    reason => reason,
                };
                self.remove(desk, now, session, reason, Goodbye::Disconnect);
            }
            Up::Ping(_) => desk.send(session, Down::Pong(now.unix_ms())),
            Up::PingReq(ping) => desk.send(
                session,
                Down::PongResp(proto::Pong { last_ping_timestamp: ping.timestamp, timestamp: now.unix_ms() }),
            ),
            Up::UpdateMetadata(request) => self.update_metadata(desk, now, session, request),
            Up::UpdateAudioTrack(request) => {
                self.change_track(desk, session, &request.track_sid, |info| {
                    info.audio_features = request.features;
                    info.audio_features.truncate(32);
                });
            }
            Up::UpdateVideoTrack(request) => {
                self.change_track(desk, session, &request.track_sid, |info| {
                    (info.width, info.height) = (request.width, request.height);
                });
            }
            Up::Simulate(request) if desk.settings.simulate => self.simulate(desk, now, session, &request),
            // Data tracks are not served: said, because the client waits for an answer.
            Up::PublishDataTrackRequest(request) => {
                refuse(
                    desk,
                    session,
                    Reason::NotAllowed,
                    "data tracks are not supported by this server",
                    Some(Request::PublishDataTrack(request)),
                );
            }
            // A lite ICE agent has no use for candidates. The rest is deprecated, or belongs to what is refused.
            _ => {}
        }
    }

    pub(super) fn offer(
        &mut self,
        desk: &mut Desk,
        now: Now,
        session: SessionId,
        offer: proto::SessionDescription,
    ) {
        let Some(participant) = self.participants.get_mut(&session) else { return };
        if participant.offers.len() >= MAX_OFFERS {
            self.remove(desk, now, session, DisconnectReason::StateMismatch, Goodbye::Rejoin);
            return;
        }
        participant.offers.push_back(offer.id);
        desk.plane(Command::ApplyOffer { peer: participant.publisher, sdp: offer.sdp });
    }

    pub(super) fn answer(&mut self, desk: &mut Desk, session: SessionId, answer: proto::SessionDescription) {
        let Some(participant) = self.participants.get_mut(&session) else { return };
        let Some(peer) = participant.subscriber else { return };
        // 0 is what clients send that know nothing of ids.
        let current = answer.id == 0 || answer.id == participant.sub_offer_id;
        if participant.sub_offer_at.is_some() && current {
            participant.sub_offer_at = None;
            desk.plane(Command::ApplyAnswer { peer, sdp: answer.sdp });
        }
    }

    pub(super) fn add_track(
        &mut self,
        desk: &mut Desk,
        now: Now,
        session: SessionId,
        request: AddTrackRequest,
    ) {
        let Some(participant) = self.participants.get_mut(&session) else { return };
        let refusal = if !participant.may_publish(request.source) {
            Some((Reason::NotAllowed, "the access token does not allow this source to be published"))
        } else if media_kind(request.r#type).is_none() {
            Some((Reason::UnsupportedType, "only audio and video tracks can be published"))
        } else if request.cid.is_empty() || request.cid.len() > MAX_CID {
            Some((Reason::InvalidRequest, "a track needs a client id of at most 512 bytes"))
        } else if !request.sid.is_empty() {
            let known = self.by_track_sid.get(&request.sid).is_some_and(|k| participant.tracks.contains(k));
            if known {
                Some((Reason::UnsupportedType, "backup codecs are not supported by this server"))
            } else {
                Some((Reason::NotFound, "there is no track with this sid"))
            }
        } else if participant.pending.len() + participant.queued.len() >= MAX_PENDING {
            Some((Reason::LimitExceeded, "too many tracks wait to be published"))
        } else {
            None
        };
        if let Some((reason, text)) = refusal {
            refuse(desk, session, reason, text, Some(Request::AddTrack(request)));
            return;
        }
        let live = participant.tracks.iter().filter_map(|key| self.tracks.get(key));
        if live.into_iter().any(|track| track.has_cid(&request.cid))
            || participant.pending.iter().any(|pending| pending.cid == request.cid)
        {
            let waiting = participant.queued.iter().filter(|queued| queued.cid == request.cid).count();
            if waiting >= MAX_QUEUED_PER_CID {
                let text = "too many tracks wait behind this client id";
                refuse(desk, session, Reason::LimitExceeded, text, Some(Request::AddTrack(request)));
            } else {
                participant.queued.push(request.clone());
                let text = "waits for the track that has this client id now";
                refuse(desk, session, Reason::Queued, text, Some(Request::AddTrack(request)));
            }
            return;
        }
        let sid = fresh(&mut desk.rng, &sid_prefix(&request));
        if let Some(pending) = Pending::new(now, sid, request) {
            let published =
                proto::TrackPublishedResponse { cid: pending.cid.clone(), track: Some(pending.info.clone()) };
            participant.pending.push(pending);
            desk.send(session, Down::TrackPublished(published));
            // The section may have come before the announcement.
            self.publish_matching(desk, now, session);
        }
    }

    pub(super) fn mute(
        &mut self,
        desk: &mut Desk,
        now: Now,
        session: SessionId,
        request: &proto::MuteTrackRequest,
    ) {
        let Some(participant) = self.participants.get_mut(&session) else { return };
        if let Some(pending) = participant.pending.iter_mut().find(|p| p.info.sid == request.sid) {
            pending.info.muted = request.muted;
        } else if self.by_track_sid.get(&request.sid).is_some_and(|key| participant.tracks.contains(key)) {
            self.set_muted(desk, now, session, &request.sid, request.muted);
        } else {
            let text = "there is no track with this sid";
            refuse(desk, session, Reason::NotFound, text, Some(Request::Mute(request.clone())));
        }
    }

    pub(super) fn set_muted(&mut self, desk: &mut Desk, now: Now, owner: SessionId, sid: &str, muted: bool) {
        let Some(key) = self.by_track_sid.get(sid).copied() else { return };
        let changed =
            self.tracks.get(&key).is_some_and(|track| track.owner == owner && track.info.muted != muted);
        if !changed {
            return;
        }
        if muted {
            self.speakers.silence(key);
        }
        self.change_track(desk, owner, sid, |info| info.muted = muted);
        self.forward_to_all(desk, now, key);
    }

    /// Changes a track's description, if the track is this participant's, and tells everybody.
    pub(super) fn change_track(
        &mut self,
        desk: &mut Desk,
        session: SessionId,
        sid: &str,
        change: impl FnOnce(&mut proto::TrackInfo),
    ) {
        let Some(participant) = self.participants.get_mut(&session) else { return };
        if let Some(pending) = participant.pending.iter_mut().find(|p| p.info.sid == sid) {
            change(&mut pending.info);
            return;
        }
        let Some(track) = self.by_track_sid.get(sid).and_then(|key| self.tracks.get_mut(key)) else { return };
        if track.owner != session {
            return;
        }
        change(&mut track.info);
        if let Some(version) = &mut track.info.version {
            version.ticks = version.ticks.saturating_add(1);
        }
        participant.touch();
        self.announce(desk, session, true);
    }

    pub(crate) fn update_subscription(
        &mut self,
        desk: &mut Desk,
        now: Now,
        session: SessionId,
        request: &proto::UpdateSubscription,
    ) {
        let sids = request
            .track_sids
            .iter()
            .chain(request.participant_tracks.iter().flat_map(|tracks| &tracks.track_sids));
        for sid in sids {
            let known = self.by_track_sid.get(sid).copied();
            let Some(participant) = self.participants.get_mut(&session) else { return };
            if participant.wishes.len() >= MAX_WISHES && !participant.wishes.contains_key(sid) {
                // Old wishes are about tracks that have ended.
                participant.wishes.retain(|sid, _| self.by_track_sid.contains_key(sid));
                if participant.wishes.len() >= MAX_WISHES {
                    return;
                }
            }
            participant.wishes.insert(sid.clone(), request.subscribe);
            if let Some(key) = known {
                self.reconcile(desk, now, session, key);
            } else if request.subscribe && participant.missing.len() < MAX_WISHES {
                participant.missing.insert(sid.clone(), now.instant + MISSING_AFTER);
            }
        }
    }

    pub(super) fn update_settings(
        &mut self,
        desk: &mut Desk,
        now: Now,
        session: SessionId,
        request: &proto::UpdateTrackSettings,
    ) {
        for sid in &request.track_sids {
            let Some(track) = self.by_track_sid.get(sid).and_then(|key| self.tracks.get(key)) else {
                continue;
            };
            let key = track.key;
            let quality = if request.width > 0 {
                let source = (track.info.width, track.info.height);
                Quality::for_size(request.width, request.height, source, track.declared())
            } else {
                Quality::from_wire(request.quality)
            };
            let Some(participant) = self.participants.get_mut(&session) else { return };
            participant.settings.insert(key, TrackSettings { disabled: request.disabled, quality });
            self.forward(desk, session, key);
            self.dynacast(desk, now.instant, key);
        }
    }

    pub(super) fn update_permission_rules(
        &mut self,
        desk: &mut Desk,
        now: Now,
        session: SessionId,
        request: proto::SubscriptionPermission,
    ) {
        let Some(participant) = self.participants.get_mut(&session) else { return };
        participant.rules = (!request.all_participants).then_some(request.track_permissions);
        for key in participant.tracks.clone() {
            self.reconcile_track(desk, now, key);
        }
    }

    pub(super) fn update_metadata(
        &mut self,
        desk: &mut Desk,
        now: Now,
        session: SessionId,
        request: proto::UpdateParticipantMetadata,
    ) {
        let Some(participant) = self.participants.get_mut(&session) else { return };
        let (reason, text) = if !participant.permission.can_update_metadata {
            (Reason::NotAllowed, "the access token does not allow the participant to change its own metadata")
        } else if participant.describe(&request.name, &request.metadata, &request.attributes) {
            participant.touch();
            self.announce(desk, session, true);
            self.refresh_token(desk, now, session);
            (Reason::Ok, "")
        } else {
            (Reason::LimitExceeded, "name, metadata or attributes are too large")
        };
        desk.send(
            session,
            Down::RequestResponse(proto::RequestResponse {
                request_id: request.request_id,
                reason: reason.into(),
                message: text.to_owned(),
                request: Some(Request::UpdateMetadata(request)),
            }),
        );
    }

    pub(super) fn simulate(
        &mut self,
        desk: &mut Desk,
        now: Now,
        session: SessionId,
        request: &proto::SimulateScenario,
    ) {
        use proto::simulate_scenario::Scenario;
        match request.scenario {
            Some(Scenario::NodeFailure(true) | Scenario::Migration(true)) => {
                self.remove(desk, now, session, DisconnectReason::StateMismatch, Goodbye::Silent);
            }
            Some(Scenario::ServerLeave(true)) => {
                self.remove(desk, now, session, DisconnectReason::ServerShutdown, Goodbye::Disconnect);
            }
            _ => {}
        }
    }
}
