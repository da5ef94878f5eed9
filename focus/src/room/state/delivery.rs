//! Who gets what of a room.

use std::time::Instant;

use livekit_protocol::{self as proto, signal_response::Message as Down};

use crate::plane::{Command, MediaKind, TrackKey};
use crate::room::Now;
use crate::room::ids::SessionId;
use crate::room::participant::Subscription;
use crate::room::quality::{Quality, quality_update};

use super::*;

impl Room {
    /// Tells everybody of a participant's change; `to_itself` too.
    pub(super) fn announce(&self, desk: &mut Desk, session: SessionId, to_itself: bool) {
        let Some(participant) = self.participants.get(&session) else { return };
        let info = participant.info(&self.tracks);
        for other in self.participants.values() {
            let itself = other.session == session;
            if if itself { to_itself } else { !participant.hidden() } {
                desk.send(other.session, update(vec![info.clone()]));
            }
        }
    }

    /// Ends a track. `tell_owner`: it was not the owner's wish.
    pub(super) fn unpublish(&mut self, desk: &mut Desk, now: Now, key: TrackKey, tell_owner: bool) {
        let Some(track) = self.tracks.remove(&key) else { return };
        self.by_track_sid.remove(&track.info.sid);
        self.speakers.silence(key);
        desk.tracks.remove(&key);
        desk.plane(Command::Unpublish { track: key });
        for participant in self.participants.values_mut() {
            participant.forget(key);
        }
        let Some(owner) = self.participants.get_mut(&track.owner) else { return };
        owner.tracks.retain(|other| *other != key);
        owner.touch();
        let next = owner.queued.iter().position(|request| request.cid == track.cid);
        let next = next.map(|index| owner.queued.remove(index));
        if tell_owner {
            let track_sid = track.info.sid;
            desk.send(track.owner, Down::TrackUnpublished(proto::TrackUnpublishedResponse { track_sid }));
        }
        self.announce(desk, track.owner, true);
        self.counts_changed(now);
        if let Some(request) = next {
            self.add_track(desk, now, track.owner, request);
        }
    }

    pub(super) fn reconcile_track(&mut self, desk: &mut Desk, now: Now, key: TrackKey) {
        let sessions: Vec<_> = self.participants.keys().copied().collect();
        for session in sessions {
            self.reconcile(desk, now, session, key);
        }
    }

    pub(super) fn reconcile_subscriber(&mut self, desk: &mut Desk, now: Now, session: SessionId) {
        let keys: Vec<_> = self.tracks.keys().copied().collect();
        for key in keys {
            self.reconcile(desk, now, session, key);
        }
    }

    /// Makes one subscription what it should be: wished for, allowed to subscribe, and let by the publisher.
    pub(super) fn reconcile(&mut self, desk: &mut Desk, now: Now, session: SessionId, key: TrackKey) {
        let Some(track) = self.tracks.get(&key) else { return };
        let owner = track.owner;
        if owner == session {
            return;
        }
        let sid = track.info.sid.clone();
        let (Some(publisher), Some(subscriber)) =
            (self.participants.get(&owner), self.participants.get(&session))
        else {
            return;
        };
        let allowed = publisher.allows(subscriber, &sid);
        let wanted = subscriber.permission.can_subscribe && !publisher.hidden() && subscriber.wants(&sid);
        let publisher_sid = publisher.sid.to_string();
        let Some(subscriber) = self.participants.get_mut(&session) else { return };
        subscriber.missing.remove(&sid);

        let told_denied = subscriber.denied.contains(&key);
        if wanted && !allowed && !told_denied {
            subscriber.denied.insert(key);
        } else if allowed && told_denied {
            subscriber.denied.remove(&key);
        }
        if subscriber.denied.contains(&key) != told_denied {
            let change = proto::SubscriptionPermissionUpdate {
                participant_sid: publisher_sid.clone(),
                track_sid: sid.clone(),
                allowed,
            };
            desk.send(session, Down::SubscriptionPermissionUpdate(change));
        }

        let Some(peer) = subscriber.subscriber else { return };
        let has = subscriber.subscriptions.contains_key(&key);
        match (wanted && allowed, has) {
            (true, false) => {
                subscriber.subscriptions.insert(key, Subscription::default());
                desk.plane(Command::Subscribe {
                    peer,
                    track: key,
                    stream_id: format!("{publisher_sid}|{sid}"),
                    track_id: sid,
                });
                self.forward(desk, session, key);
            }
            (false, true) => {
                subscriber.subscriptions.remove(&key);
                desk.plane(Command::Unsubscribe { peer, track: key });
            }
            _ => return,
        }
        self.dynacast(desk, now.instant, key);
    }

    /// Tells the plane what a subscriber wants of a track, if that has changed.
    pub(super) fn forward(&mut self, desk: &mut Desk, session: SessionId, key: TrackKey) {
        let Some(track) = self.tracks.get(&key) else { return };
        let Some(participant) = self.participants.get_mut(&session) else { return };
        let Some(peer) = participant.subscriber else { return };
        let settings = participant.settings(key);
        let Some(subscription) = participant.subscriptions.get_mut(&key) else { return };
        let paused = settings.disabled || settings.quality == Quality::Off || track.info.muted;
        let max_layer = settings.quality.layer(track.declared(), track.layers);
        if subscription.forwarding.replace((paused, max_layer)) != Some((paused, max_layer)) {
            desk.plane(Command::SetForwarding { peer, track: key, paused, max_layer });
        }
    }

    pub(super) fn forward_to_all(&mut self, desk: &mut Desk, now: Now, key: TrackKey) {
        let sessions: Vec<_> = self.participants.keys().copied().collect();
        for session in sessions {
            self.forward(desk, session, key);
        }
        self.dynacast(desk, now.instant, key);
    }

    /// Tells a publisher which layers of a track somebody wants. Its own mute does not count: it would have to
    /// start its encoders again when it speaks.
    pub(super) fn dynacast(&mut self, desk: &mut Desk, now: Instant, key: TrackKey) {
        let Some(track) = self.tracks.get_mut(&key) else { return };
        if track.kind != MediaKind::Video {
            return;
        }
        let wanted = self
            .participants
            .values()
            .filter(|participant| participant.subscriptions.contains_key(&key))
            .map(|participant| {
                let settings = participant.settings(key);
                if settings.disabled { Quality::Off } else { settings.quality }
            })
            .max();
        if let Some(max) = track.dynacast.update(now, wanted) {
            let message = quality_update(&track.info.sid, &track.info.mime_type, max);
            desk.send(track.owner, Down::SubscribedQualityUpdate(message));
        }
    }
}
