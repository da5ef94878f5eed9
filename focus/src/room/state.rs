//! One room: the only place where the order of what clients see is decided.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use livekit_protocol::{
    self as proto, DisconnectReason, ParticipantInfo,
    participant_info::State,
    request_response::{Reason, Request},
    signal_response::Message as Down,
};
use rand::Rng;
use rand::rngs::StdRng;

mod administration;
mod delivery;
mod media;
mod signals;
mod upkeep;

use super::ids::{Identity, RoomName, SessionId, fresh};
use super::participant::Participant;
use super::speakers::Speakers;
use super::track::Track;
use super::{Join, MIN_PROTOCOL, Now, Output, PROTOCOL, Presence, SERVER_VERSION, Settings};
use crate::observe::Counters;
use crate::plane::{Command, PeerId, PeerRole, TrackKey};
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
        desk.out.push_back(self.presence(&participant, Some(reason)));
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
            // A server that stops takes nobody out of the call: whoever comes back to it was never gone.
            if reason != DisconnectReason::ServerShutdown {
                desk.out.push_back(self.presence(participant, Some(reason)));
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

    fn presence(&self, participant: &Participant, gone: Option<DisconnectReason>) -> Output {
        let Participant { identity, sid, .. } = participant;
        let (room, identity, sid) = (self.name.clone(), identity.clone(), sid.clone());
        Output::Presence(Presence { room, identity, sid, gone })
    }

    fn refresh_token(&mut self, desk: &mut Desk, now: Now, session: SessionId) {
        let Some(participant) = self.participants.get_mut(&session) else { return };
        participant.refresh_at = now.instant + REFRESH_EVERY;
        if let Some(token) = desk.keys.sign(&participant.refreshed(now)) {
            desk.send(session, Down::RefreshToken(token));
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
