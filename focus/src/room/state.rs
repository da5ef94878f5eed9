//! One room: the only place where the order of what clients see is decided.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use livekit_protocol::{
    self as proto, AddTrackRequest, DisconnectReason, ParticipantInfo,
    participant_info::State,
    request_response::{Reason, Request},
    signal_request::Message as Up,
    signal_response::Message as Down,
};
use rand::Rng;
use rand::rngs::StdRng;

use super::ids::{Identity, RoomName, SessionId, fresh};
use super::participant::{Participant, Subscription, TrackSettings};
use super::quality::{Quality, quality_update};
use super::speakers::Speakers;
use super::track::{Pending, Track, match_section, media_kind, sid_prefix};
use super::{Join, MIN_PROTOCOL, Now, Output, PROTOCOL, SERVER_VERSION, Settings, data};
use crate::observe::Counters;
use crate::plane::{Channel, Command, MediaKind, OfferedSection, PeerId, PeerRole, TrackKey};
use crate::token::Keys;

/// A participant that is not active by then has failed to join.
const ACTIVE_WITHIN: Duration = Duration::from_secs(60);
/// How often a token is refreshed.
const REFRESH_EVERY: Duration = Duration::from_secs(300);
/// An offer of ours that stays unanswered for so long, on a connection that is up, means that the client is lost.
const ANSWER_WITHIN: Duration = Duration::from_secs(15);
/// A track that was asked for and has not appeared by then does not exist.
const MISSING_AFTER: Duration = Duration::from_secs(60);
/// Counts in the room's description are told this often.
const ROOM_UPDATE_EVERY: Duration = Duration::from_secs(5);
/// Announcements that may wait for their media section, and as many for their predecessor.
const MAX_PENDING: usize = 20;
/// Announcements that may wait behind one client id.
const MAX_QUEUED_PER_CID: usize = 3;
/// Offers that may wait for the media plane.
const MAX_OFFERS: usize = 8;
/// Track sids that one participant may ask for or refuse.
const MAX_WISHES: usize = 5_000;
/// Longest client id of a track, in bytes.
const MAX_CID: usize = 512;

/// What all rooms share: numbers, randomness and the way out.
#[derive(Debug)]
pub(crate) struct Desk {
    pub(crate) settings: Settings,
    pub(crate) keys: Arc<Keys>,
    pub(crate) counters: Arc<Counters>,
    pub(crate) rng: StdRng,
    pub(crate) node_id: String,
    pub(crate) out: VecDeque<Output>,
    pub(crate) sessions: HashMap<SessionId, RoomName>,
    pub(crate) peers: HashMap<PeerId, SessionId>,
    pub(crate) tracks: HashMap<TrackKey, SessionId>,
    pub(crate) last_number: u64,
}

impl Desk {
    fn send(&mut self, session: SessionId, message: Down) {
        self.out.push_back(Output::Send { session, message: Box::new(message) });
    }

    fn plane(&mut self, command: Command) {
        self.out.push_back(Output::Plane(command));
    }

    pub(crate) fn number(&mut self) -> u64 {
        self.last_number += 1;
        self.last_number
    }

    fn peer(&mut self, session: SessionId, role: PeerRole) -> PeerId {
        let peer = PeerId(self.number());
        self.peers.insert(peer, session);
        self.plane(Command::AddPeer { peer, role });
        peer
    }
}

/// How a participant's client is told that it is out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Goodbye {
    /// Not at all: its connection is gone.
    Silent,
    /// It shall not come back by itself.
    Disconnect,
    /// It shall join again from the start.
    Rejoin,
}

/// A room and everybody in it.
#[derive(Debug)]
pub struct Room {
    pub(crate) name: RoomName,
    pub(crate) sid: String,
    pub(crate) metadata: String,
    pub(crate) created: Now,
    pub(crate) empty_timeout: Duration,
    pub(crate) departure_timeout: Duration,
    pub(crate) max_participants: u32,
    sif_trailer: Vec<u8>,
    pub(crate) participants: BTreeMap<SessionId, Participant>,
    by_identity: HashMap<Identity, SessionId>,
    tracks: BTreeMap<TrackKey, Track>,
    by_track_sid: HashMap<String, TrackKey>,
    speakers: Speakers,
    entered: bool,
    empty_since: Instant,
    update_due: Option<Instant>,
    updated: Instant,
}

// Entering and leaving.
impl Room {
    pub(crate) fn new(desk: &mut Desk, now: Now, name: RoomName) -> Self {
        let mut sif_trailer = vec![0; 24];
        desk.rng.fill(&mut sif_trailer[..]);
        Self {
            name,
            sid: fresh(&mut desk.rng, "RM_"),
            metadata: String::new(),
            created: now,
            empty_timeout: desk.settings.empty_timeout,
            departure_timeout: desk.settings.departure_timeout,
            max_participants: desk.settings.max_participants,
            sif_trailer,
            participants: BTreeMap::new(),
            by_identity: HashMap::new(),
            tracks: BTreeMap::new(),
            by_track_sid: HashMap::new(),
            speakers: Speakers::default(),
            entered: false,
            empty_since: now.instant,
            update_due: None,
            updated: now.instant,
        }
    }

    /// Whether nobody has been here for as long as the room may stay empty.
    pub(crate) fn over(&self, now: Instant) -> bool {
        let timeout = if self.entered { self.departure_timeout } else { self.empty_timeout };
        self.participants.is_empty() && now >= self.empty_since + timeout
    }

    pub(crate) fn full(&self, joining: &str) -> bool {
        self.max_participants > 0
            && self.participants.len() >= self.max_participants as usize
            && !self.by_identity.contains_key(joining)
    }

    /// Lets a participant in; one with the same identity goes.
    pub(crate) fn join(&mut self, desk: &mut Desk, now: Now, session: SessionId, join: Join) {
        let identity: Identity = join.claims.identity().into();
        if let Some(old) = self.by_identity.get(&identity).copied() {
            self.remove_for(desk, now, old, DisconnectReason::DuplicateIdentity, Goodbye::Disconnect, true);
        }
        desk.sessions.insert(session, self.name.clone());
        self.entered = true;

        let can_subscribe = join.claims.video.can_subscribe.unwrap_or(true);
        let publisher = desk.peer(session, PeerRole::Publisher);
        let subscriber = can_subscribe.then(|| desk.peer(session, PeerRole::Subscriber));
        let sid = fresh(&mut desk.rng, "PA_").into();
        let offer_id = desk.rng.random_range(1..256);
        let participant = Participant::new(now, session, sid, join, (publisher, subscriber), offer_id);
        self.by_identity.insert(identity, session);
        self.participants.insert(session, participant);
        let Some(participant) = self.participants.get(&session) else { return };

        let others = self
            .participants
            .values()
            .filter(|other| other.session != session && !other.hidden())
            .map(|other| other.info(&self.tracks))
            .collect();
        let message = Down::Join(proto::JoinResponse {
            room: Some(self.info(desk)),
            participant: Some(participant.info(&self.tracks)),
            other_participants: others,
            server_version: SERVER_VERSION.to_owned(),
            subscriber_primary: can_subscribe,
            ping_timeout: 15,
            ping_interval: 5,
            server_info: Some(proto::ServerInfo {
                version: SERVER_VERSION.to_owned(),
                protocol: PROTOCOL,
                node_id: desk.node_id.clone(),
                ..proto::ServerInfo::default()
            }),
            sif_trailer: self.sif_trailer.clone(),
            enabled_publish_codecs: desk.settings.wire_codecs(),
            fast_publish: participant.permission.can_publish,
            ..proto::JoinResponse::default()
        });
        desk.send(session, message);
        self.refresh_token(desk, now, session);
        self.announce(desk, session, false);
        self.reconcile_subscriber(desk, now, session);
        self.counts_changed(now);
    }

    pub(crate) fn session_of(&self, identity: &str) -> Option<SessionId> {
        self.by_identity.get(identity).copied()
    }

    /// Takes a participant out, with its tracks and its peers.
    pub(crate) fn remove(
        &mut self,
        desk: &mut Desk,
        now: Now,
        session: SessionId,
        reason: DisconnectReason,
        goodbye: Goodbye,
    ) {
        self.remove_for(desk, now, session, reason, goodbye, false);
    }

    /// As [`remove`](Self::remove). `replaced`: the same identity comes again at once, which clients newer than
    /// protocol 11 see from its next update; an end of the old one in between would only make them flicker.
    fn remove_for(
        &mut self,
        desk: &mut Desk,
        now: Now,
        session: SessionId,
        reason: DisconnectReason,
        goodbye: Goodbye,
        replaced: bool,
    ) {
        let Some(mut participant) = self.participants.remove(&session) else { return };
        self.by_identity.remove(&participant.identity);
        desk.sessions.remove(&session);
        for peer in [Some(participant.publisher), participant.subscriber].into_iter().flatten() {
            desk.peers.remove(&peer);
            desk.plane(Command::RemovePeer { peer });
        }
        for key in &participant.tracks {
            if let Some(track) = self.tracks.remove(key) {
                self.by_track_sid.remove(&track.info.sid);
                desk.tracks.remove(key);
                desk.plane(Command::Unpublish { track: *key });
                for other in self.participants.values_mut() {
                    other.forget(*key);
                }
            }
        }
        self.speakers.forget(session);
        let action = match goodbye {
            Goodbye::Silent => None,
            Goodbye::Disconnect => Some(proto::leave_request::Action::Disconnect),
            Goodbye::Rejoin => Some(proto::leave_request::Action::Reconnect),
        };
        if let Some(action) = action {
            desk.send(session, leave(reason, action));
        }
        desk.out.push_back(Output::Close { session });

        participant.tracks.clear();
        participant.state = State::Disconnected;
        participant.touch();
        if !participant.hidden() {
            let info = ParticipantInfo {
                disconnect_reason: reason.into(),
                // Whoever published is told apart from who only watched, as the reference does.
                ..participant.info(&self.tracks)
            };
            for other in self.participants.values() {
                if !replaced || other.client.protocol <= 11 {
                    desk.send(other.session, update(vec![info.clone()]));
                }
            }
        }
        // What only it had subscribed to need not be sent any more.
        let tracks: Vec<_> = participant.subscriptions.keys().copied().collect();
        for track in tracks {
            self.dynacast(desk, now.instant, track);
        }
        if self.participants.is_empty() {
            self.empty_since = now.instant;
        }
        self.counts_changed(now);
        tracing::info!(
            room = %self.name, identity = %participant.identity, sid = %participant.sid,
            reason = reason.as_str_name(), "participant left"
        );
    }

    /// Sends everybody away.
    pub(crate) fn clear(&mut self, desk: &mut Desk, now: Now, reason: DisconnectReason) {
        // Goodbyes first, so that nobody is told of the others' going.
        for session in self.participants.keys() {
            desk.send(*session, leave(reason, proto::leave_request::Action::Disconnect));
            desk.out.push_back(Output::Close { session: *session });
            desk.sessions.remove(session);
        }
        for participant in self.participants.values() {
            for peer in [Some(participant.publisher), participant.subscriber].into_iter().flatten() {
                desk.peers.remove(&peer);
                desk.plane(Command::RemovePeer { peer });
            }
        }
        for key in self.tracks.keys() {
            desk.tracks.remove(key);
        }
        self.participants.clear();
        self.by_identity.clear();
        self.tracks.clear();
        self.by_track_sid.clear();
        self.empty_since = now.instant;
    }

    fn refresh_token(&mut self, desk: &mut Desk, now: Now, session: SessionId) {
        let Some(participant) = self.participants.get_mut(&session) else { return };
        participant.refresh_at = now.instant + REFRESH_EVERY;
        if let Some(token) = desk.keys.sign(&participant.refreshed(now)) {
            desk.send(session, Down::RefreshToken(token));
        }
    }
}

// What clients ask.
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

    fn offer(&mut self, desk: &mut Desk, now: Now, session: SessionId, offer: proto::SessionDescription) {
        let Some(participant) = self.participants.get_mut(&session) else { return };
        if participant.offers.len() >= MAX_OFFERS {
            self.remove(desk, now, session, DisconnectReason::StateMismatch, Goodbye::Rejoin);
            return;
        }
        participant.offers.push_back(offer.id);
        desk.plane(Command::ApplyOffer { peer: participant.publisher, sdp: offer.sdp });
    }

    fn answer(&mut self, desk: &mut Desk, session: SessionId, answer: proto::SessionDescription) {
        let Some(participant) = self.participants.get_mut(&session) else { return };
        let Some(peer) = participant.subscriber else { return };
        // 0 is what clients send that know nothing of ids.
        let current = answer.id == 0 || answer.id == participant.sub_offer_id;
        if participant.sub_offer_at.is_some() && current {
            participant.sub_offer_at = None;
            desk.plane(Command::ApplyAnswer { peer, sdp: answer.sdp });
        }
    }

    fn add_track(&mut self, desk: &mut Desk, now: Now, session: SessionId, request: AddTrackRequest) {
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

    fn mute(&mut self, desk: &mut Desk, now: Now, session: SessionId, request: &proto::MuteTrackRequest) {
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

    fn set_muted(&mut self, desk: &mut Desk, now: Now, owner: SessionId, sid: &str, muted: bool) {
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
    fn change_track(
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

    fn update_settings(
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

    fn update_permission_rules(
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

    fn update_metadata(
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

    fn simulate(&mut self, desk: &mut Desk, now: Now, session: SessionId, request: &proto::SimulateScenario) {
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

// What the media plane says.
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
    fn publish_matching(&mut self, desk: &mut Desk, now: Now, session: SessionId) {
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

// What time brings.
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

    fn tell_speakers(&mut self, desk: &mut Desk, now: Instant) {
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

    fn counts_changed(&mut self, now: Now) {
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

// What the admin API asks.
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
        change: super::ParticipantChange,
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

// Who gets what.
impl Room {
    /// Tells everybody of a participant's change; `to_itself` too.
    fn announce(&self, desk: &mut Desk, session: SessionId, to_itself: bool) {
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
    fn unpublish(&mut self, desk: &mut Desk, now: Now, key: TrackKey, tell_owner: bool) {
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

    fn reconcile_track(&mut self, desk: &mut Desk, now: Now, key: TrackKey) {
        let sessions: Vec<_> = self.participants.keys().copied().collect();
        for session in sessions {
            self.reconcile(desk, now, session, key);
        }
    }

    fn reconcile_subscriber(&mut self, desk: &mut Desk, now: Now, session: SessionId) {
        let keys: Vec<_> = self.tracks.keys().copied().collect();
        for key in keys {
            self.reconcile(desk, now, session, key);
        }
    }

    /// Makes one subscription what it should be: wished for, allowed to subscribe, and let by the publisher.
    fn reconcile(&mut self, desk: &mut Desk, now: Now, session: SessionId, key: TrackKey) {
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
    fn forward(&mut self, desk: &mut Desk, session: SessionId, key: TrackKey) {
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

    fn forward_to_all(&mut self, desk: &mut Desk, now: Now, key: TrackKey) {
        let sessions: Vec<_> = self.participants.keys().copied().collect();
        for session in sessions {
            self.forward(desk, session, key);
        }
        self.dynacast(desk, now.instant, key);
    }

    /// Tells a publisher which layers of a track somebody wants. Its own mute does not count: it would have to
    /// start its encoders again when it speaks.
    fn dynacast(&mut self, desk: &mut Desk, now: Instant, key: TrackKey) {
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

impl Participant {
    /// Forgets a track that has ended.
    fn forget(&mut self, key: TrackKey) {
        self.subscriptions.remove(&key);
        self.denied.remove(&key);
        self.settings.remove(&key);
    }
}

/// A goodbye. The reason is what others are told too.
pub(crate) fn leave(reason: DisconnectReason, action: proto::leave_request::Action) -> Down {
    Down::Leave(proto::LeaveRequest {
        can_reconnect: action != proto::leave_request::Action::Disconnect,
        reason: reason.into(),
        action: action.into(),
        regions: None,
    })
}

/// Whether a client's protocol is served.
pub(crate) fn protocol_served(protocol: i32) -> bool {
    protocol >= MIN_PROTOCOL
}

fn refuse(desk: &mut Desk, session: SessionId, reason: Reason, text: &str, request: Option<Request>) {
    desk.send(
        session,
        Down::RequestResponse(proto::RequestResponse {
            reason: reason.into(),
            message: text.to_owned(),
            request,
            ..proto::RequestResponse::default()
        }),
    );
}

fn update(participants: Vec<ParticipantInfo>) -> Down {
    Down::Update(proto::ParticipantUpdate { participants })
}
