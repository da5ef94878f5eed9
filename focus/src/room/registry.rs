//! All rooms of a focus, and the way from a session, a peer or a track to its room.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use livekit_protocol::{
    self as proto, DisconnectReason, ParticipantInfo, ParticipantPermission, signal_request::Message as Up,
};
use prost::Message as _;
use rand::rngs::StdRng;

use super::ids::{RoomName, SessionId, fresh};
use super::participant::size;
use super::state::{Desk, Goodbye, Room};
use super::{Join, JoinError, MAX_ATTRIBUTES, MAX_METADATA, MAX_NAME, Now, Output, Patched, Settings};
use crate::observe::{Counters, Stats};
use crate::plane::{Channel, Event, PeerId, TrackKey};
use crate::token::Keys;

/// Every room. See the [module](super) for how it is driven.
#[derive(Debug)]
pub struct Rooms {
    desk: Desk,
    rooms: BTreeMap<RoomName, Room>,
    closing: bool,
}

/// What a room is created with; zero and empty fields leave it as it is, or at the default.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct RoomOptions {
    /// How long nobody may come.
    pub empty_timeout: Duration,
    /// How long it outlives the last participant.
    pub departure_timeout: Duration,
    /// Most participants.
    pub max_participants: u32,
    /// Application data.
    pub metadata: String,
}

/// What the admin API changes of a participant; empty fields leave it as it is.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct ParticipantChange {
    /// Display name.
    pub name: String,
    /// Application data.
    pub metadata: String,
    /// Application data by key; an empty value deletes.
    pub attributes: HashMap<String, String>,
    /// What it may do.
    pub permission: Option<ParticipantPermission>,
}

/// Why an admin request was not carried out: the caller's fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AdminError {
    /// There is no such room.
    #[error("requested room does not exist")]
    NoRoom,
    /// There is no such participant in the room.
    #[error("participant does not exist")]
    NoParticipant,
    /// The participant has no such track.
    #[error("track does not exist")]
    NoTrack,
    /// The name of a room is empty or too long.
    #[error("a room's name must have 1 to {MAX_NAME} bytes")]
    BadName,
    /// Name, metadata or attributes exceed the limits.
    #[error("name, metadata or attributes are too large")]
    TooLarge,
    /// Only the participant itself may make itself heard.
    #[error("a track can only be unmuted by its publisher")]
    Unmute,
    /// The message is larger than clients accept.
    #[error("the data is too large, or its nonce is not 16 bytes long")]
    BadData,
}

impl Rooms {
    /// No rooms yet. `rng` names rooms and people, so a seeded one makes a test repeatable.
    pub fn new(settings: Settings, keys: Arc<Keys>, counters: Arc<Counters>, mut rng: StdRng) -> Self {
        let node_id = fresh(&mut rng, "ND_");
        let desk = Desk {
            settings,
            keys,
            counters,
            rng,
            node_id,
            out: VecDeque::new(),
            sessions: HashMap::new(),
            peers: HashMap::new(),
            tracks: HashMap::new(),
            last_number: 0,
        };
        Self { desk, rooms: BTreeMap::new(), closing: false }
    }

    /// What is to be done next.
    pub fn poll(&mut self) -> Option<Output> {
        self.desk.out.pop_front()
    }

    /// Whether a token's bearer would be let in, as far as can be told without letting it in.
    pub fn may_join(&self, claims: &crate::token::Claims) -> Result<(), JoinError> {
        let (identity, room) = (claims.identity(), claims.video.room.as_str());
        let good = |name: &str| (1..=MAX_NAME).contains(&name.len());
        if !good(identity) || !good(room) {
            return Err(JoinError::BadName);
        }
        if claims.metadata.len() > MAX_METADATA
            || claims.name.len() > MAX_NAME
            || size(&claims.attributes) > MAX_ATTRIBUTES
        {
            return Err(JoinError::TooLarge);
        }
        if self.closing {
            return Err(JoinError::ShuttingDown);
        }
        let may_create = self.desk.settings.auto_create || claims.video.room_create;
        if !may_create && !self.rooms.contains_key(room) {
            return Err(JoinError::NoRoom);
        }
        Ok(())
    }

    /// Lets a participant in. Its first message, a `JoinResponse`, is among the outputs when this returns.
    pub fn join(&mut self, now: Now, join: Join) -> Result<SessionId, JoinError> {
        self.may_join(&join.claims)?;
        let name = RoomName::from(join.claims.video.room.as_str());
        let identity = join.claims.identity();
        if self.rooms.get(&name).is_some_and(|room| room.full(identity)) {
            return Err(JoinError::RoomFull);
        }
        let session = SessionId(self.desk.number());
        tracing::info!(
            room = %name, identity, session = session.0, protocol = join.client.protocol,
            sdk = join.client.sdk().as_str_name(), version = %join.client.version, "participant joins"
        );
        self.desk.counters.joined.add(1);
        let room = self.rooms.entry(name.clone()).or_insert_with(|| Room::new(&mut self.desk, now, name));
        room.join(&mut self.desk, now, session, join);
        Ok(session)
    }

    /// A message came on a session's signalling connection.
    pub fn signal(&mut self, now: Now, session: SessionId, message: Up) {
        if let Some(room) = room_of(&mut self.rooms, &self.desk, session) {
            room.signal(&mut self.desk, now, session, message);
        }
    }

    /// A session's signalling connection has ended without a goodbye. The participant goes at once: there is no
    /// resume that it could come back by.
    pub fn signal_closed(&mut self, now: Now, session: SessionId) {
        if let Some(room) = room_of(&mut self.rooms, &self.desk, session) {
            room.remove(&mut self.desk, now, session, DisconnectReason::SignalClose, Goodbye::Silent);
        }
    }

    /// A session's client broke the protocol: it is sent away and may come again.
    pub fn protocol_error(&mut self, now: Now, session: SessionId) {
        self.desk.counters.bad_messages.add(1);
        if let Some(room) = room_of(&mut self.rooms, &self.desk, session) {
            room.remove(&mut self.desk, now, session, DisconnectReason::SignalClose, Goodbye::Silent);
        }
    }

    /// The media plane reports. What it says about peers and tracks that are gone is ignored.
    pub fn plane(&mut self, now: Now, event: Event) {
        match event {
            Event::Answered { peer, sdp, sections } => self.with_peer(peer, |room, desk, session| {
                room.answered(desk, now, session, sdp, sections);
            }),
            Event::Offer { peer, sdp, mids } => self.with_peer(peer, |room, desk, session| {
                room.offered(desk, now, session, sdp, mids);
            }),
            Event::Rejected { peer, reason } => self.with_peer(peer, |room, desk, session| {
                room.rejected(desk, now, session, &reason);
            }),
            Event::Connected { peer } => self.with_peer(peer, |room, desk, session| {
                room.connected(desk, session, peer);
            }),
            Event::Failed { peer, reason } => self.with_peer(peer, |room, desk, session| {
                room.failed(desk, now, session, &reason);
            }),
            Event::Data { peer, channel, payload } => self.with_peer(peer, |room, desk, session| {
                room.data(desk, session, channel, &payload);
            }),
            Event::TrackStarted { track } => tracing::debug!(track = track.0, "first media packet"),
            Event::AudioLevel { track, level, active_share } => self.with_track(track, |room, _, session| {
                room.audio_level(now, session, track, level, active_share);
            }),
        }
    }

    /// Time has passed. To be called a few times a second.
    pub fn tick(&mut self, now: Now) {
        for room in self.rooms.values_mut() {
            room.tick(&mut self.desk, now);
        }
        self.rooms.retain(|name, room| {
            let over = room.over(now.instant);
            if over {
                tracing::info!(room = %name, "room closed");
            }
            !over
        });
    }

    /// Sends everybody away; nobody is let in any more.
    pub fn shut_down(&mut self, now: Now) {
        self.closing = true;
        for room in self.rooms.values_mut() {
            room.clear(&mut self.desk, now, DisconnectReason::ServerShutdown);
        }
        self.rooms.clear();
    }

    /// How many there are of what.
    pub fn stats(&self) -> Stats {
        Stats {
            rooms: self.rooms.len(),
            participants: self.rooms.values().map(|room| room.participants.len()).sum(),
            tracks: self.rooms.values().map(Room::track_count).sum(),
            ..Stats::default()
        }
        .with(&self.desk.counters)
    }

    fn with_peer(&mut self, peer: PeerId, act: impl FnOnce(&mut Room, &mut Desk, SessionId)) {
        let Some(session) = self.desk.peers.get(&peer).copied() else { return };
        if let Some(room) = room_of(&mut self.rooms, &self.desk, session) {
            act(room, &mut self.desk, session);
        }
    }

    fn with_track(&mut self, track: TrackKey, act: impl FnOnce(&mut Room, &mut Desk, SessionId)) {
        let Some(session) = self.desk.tracks.get(&track).copied() else { return };
        if let Some(room) = room_of(&mut self.rooms, &self.desk, session) {
            act(room, &mut self.desk, session);
        }
    }
}

/// The admin API (`spec` §6.1 of LiveKit's RoomService).
impl Rooms {
    /// Creates a room, or changes the one that exists.
    pub fn create_room(
        &mut self,
        now: Now,
        name: &str,
        options: RoomOptions,
    ) -> Result<proto::Room, AdminError> {
        if !(1..=MAX_NAME).contains(&name.len()) {
            return Err(AdminError::BadName);
        }
        if options.metadata.len() > MAX_METADATA {
            return Err(AdminError::TooLarge);
        }
        let name = RoomName::from(name);
        let room = self.rooms.entry(name.clone()).or_insert_with(|| Room::new(&mut self.desk, now, name));
        if !options.empty_timeout.is_zero() {
            room.empty_timeout = options.empty_timeout;
        }
        if !options.departure_timeout.is_zero() {
            room.departure_timeout = options.departure_timeout;
        }
        if options.max_participants > 0 {
            room.max_participants = options.max_participants;
        }
        if !options.metadata.is_empty() && room.metadata != options.metadata {
            room.metadata = options.metadata;
            room.tell_room(&mut self.desk, now);
        }
        Ok(room.info(&self.desk))
    }

    /// Describes the rooms of these names, or all without names.
    pub fn list_rooms(&self, names: &[String]) -> Vec<proto::Room> {
        self.rooms
            .values()
            .filter(|room| names.is_empty() || names.iter().any(|name| name == room.name.as_str()))
            .map(|room| room.info(&self.desk))
            .collect()
    }

    /// Ends a room.
    pub fn delete_room(&mut self, now: Now, name: &str) -> Result<(), AdminError> {
        let mut room = self.rooms.remove(name).ok_or(AdminError::NoRoom)?;
        room.clear(&mut self.desk, now, DisconnectReason::RoomDeleted);
        Ok(())
    }

    /// Changes a room's metadata.
    pub fn update_room_metadata(
        &mut self,
        now: Now,
        name: &str,
        metadata: String,
    ) -> Result<proto::Room, AdminError> {
        if metadata.len() > MAX_METADATA {
            return Err(AdminError::TooLarge);
        }
        let room = self.rooms.get_mut(name).ok_or(AdminError::NoRoom)?;
        room.metadata = metadata;
        room.tell_room(&mut self.desk, now);
        Ok(room.info(&self.desk))
    }

    /// Describes everybody in a room.
    pub fn list_participants(&self, room: &str) -> Result<Vec<ParticipantInfo>, AdminError> {
        Ok(self.rooms.get(room).ok_or(AdminError::NoRoom)?.participant_infos())
    }

    /// Describes one participant.
    pub fn participant(&self, room: &str, identity: &str) -> Result<ParticipantInfo, AdminError> {
        let room = self.rooms.get(room).ok_or(AdminError::NoRoom)?;
        room.participant_info(identity).ok_or(AdminError::NoParticipant)
    }

    /// Sends a participant away.
    pub fn remove_participant(&mut self, now: Now, room: &str, identity: &str) -> Result<(), AdminError> {
        let (room, session) = find(&mut self.rooms, room, identity)?;
        let reason = DisconnectReason::ParticipantRemoved;
        room.remove(&mut self.desk, now, session, reason, Goodbye::Disconnect);
        Ok(())
    }

    /// Mutes a track. Unmuting is refused: nobody is made to be heard.
    pub fn mute_track(
        &mut self,
        now: Now,
        room: &str,
        identity: &str,
        sid: &str,
        muted: bool,
    ) -> Result<proto::TrackInfo, AdminError> {
        let (room, session) = find(&mut self.rooms, room, identity)?;
        if !muted {
            return Err(AdminError::Unmute);
        }
        room.admin_mute(&mut self.desk, now, session, sid).ok_or(AdminError::NoTrack)
    }

    /// Changes a participant's description or permissions.
    pub fn update_participant(
        &mut self,
        now: Now,
        room: &str,
        identity: &str,
        change: ParticipantChange,
    ) -> Result<ParticipantInfo, AdminError> {
        let (room, session) = find(&mut self.rooms, room, identity)?;
        if !room.admin_update(&mut self.desk, now, session, change) {
            return Err(AdminError::TooLarge);
        }
        room.participant_info(identity).ok_or(AdminError::NoParticipant)
    }

    /// Subscribes a participant to tracks, or the opposite.
    pub fn update_subscriptions(
        &mut self,
        now: Now,
        room: &str,
        identity: &str,
        update: &proto::UpdateSubscription,
    ) -> Result<(), AdminError> {
        let (room, session) = find(&mut self.rooms, room, identity)?;
        room.update_subscription(&mut self.desk, now, session, update);
        Ok(())
    }

    /// Sends data to participants, in the name of the server.
    #[allow(deprecated, reason = "the request and the packet have deprecated fields that still count")]
    pub fn send_data(&mut self, request: proto::SendDataRequest) -> Result<(), AdminError> {
        let room = self.rooms.get(request.room.as_str()).ok_or(AdminError::NoRoom)?;
        if request.data.len() > super::MAX_MESSAGE || !matches!(request.nonce.len(), 0 | 16) {
            return Err(AdminError::BadData);
        }
        let lossy = request.kind() == proto::data_packet::Kind::Lossy;
        let packet = proto::DataPacket {
            kind: request.kind,
            destination_identities: request.destination_identities.clone(),
            value: Some(proto::data_packet::Value::User(proto::UserPacket {
                payload: request.data,
                topic: request.topic,
                nonce: request.nonce,
                destination_identities: request.destination_identities.clone(),
                destination_sids: request.destination_sids.clone(),
                ..proto::UserPacket::default()
            })),
            ..proto::DataPacket::default()
        };
        let packet = Patched {
            payload: packet.encode_to_vec().into(),
            destinations: request.destination_identities,
            destination_sids: request.destination_sids,
            sequence: 0,
        };
        let channel = if lossy { Channel::Lossy } else { Channel::Reliable };
        room.relay(&mut self.desk, None, channel, &packet);
        Ok(())
    }
}

fn room_of<'a>(
    rooms: &'a mut BTreeMap<RoomName, Room>,
    desk: &Desk,
    session: SessionId,
) -> Option<&'a mut Room> {
    rooms.get_mut(desk.sessions.get(&session)?)
}

fn find<'a>(
    rooms: &'a mut BTreeMap<RoomName, Room>,
    room: &str,
    identity: &str,
) -> Result<(&'a mut Room, SessionId), AdminError> {
    let room = rooms.get_mut(room).ok_or(AdminError::NoRoom)?;
    let session = room.session_of(identity).ok_or(AdminError::NoParticipant)?;
    Ok((room, session))
}
