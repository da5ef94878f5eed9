//! One peer per (user, device, member id): its membership, key ring, tracks and statistics in one place.
//!
//! Participants and their tracks are the SFU's word and are kept as such; which member a participant is, is decided
//! here and nowhere else. A participant belongs to a member if its identity is one of the member's identities and it
//! is on the connection that the member publishes to. If two members claim one identity, neither gets it.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant},
};

use crate::{
    frame_crypto::KeyRing,
    member::{Member, MemberKey, ParticipantIdentity},
    transport::{ConnectionId, RemoteTrack, Subscription, TrackSid},
};

use super::{media_keys::MAX_GONE, stats::TrackCounters};

/// Participants that one SFU room may announce to us without a member; the rest are ignored.
const MAX_STRANGERS: usize = 256;
/// Tracks of one participant.
const MAX_TRACKS: usize = 64;
/// How long a participant without a member is waited for before it is reported.
const STRANGER_AFTER: Duration = Duration::from_secs(5);

/// A member's track, as frames carry it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IncomingTrack {
    /// The publisher.
    pub member: Member,
    /// The track, by the SFU's word.
    pub track: RemoteTrack,
}

/// Everything that the media path needs to open the frames of one track. Resolved once per track.
#[derive(Clone, Debug)]
pub struct TrackRoute {
    /// Member and track.
    pub from: Arc<IncomingTrack>,
    /// The member's keys.
    pub ring: KeyRing,
    /// Where the media path counts.
    pub counters: Arc<TrackCounters>,
    /// Time base of the member's tracks.
    pub clock: Arc<super::clock::MemberClock>,
}

/// A change of what flows, in the order in which it must happen.
#[derive(Clone, Debug)]
pub(crate) enum PeerChange {
    /// A member joined.
    Joined(Member),
    /// A member describes itself differently.
    Updated(Member),
    /// A track begins: attach it, then tell the application.
    TrackBegins { connection: ConnectionId, route: TrackRoute, subscription: Option<Subscription> },
    /// A track's description changed.
    TrackChanged { connection: ConnectionId, route: TrackRoute },
    /// A track ends: detach it, then tell the application.
    TrackEnds { connection: ConnectionId, member: Member, sid: TrackSid },
    /// A member left. Its ring was cleared.
    Left(Member),
}

/// Every other member of the call, and every participant that SFUs announce.
#[derive(Debug, Default)]
pub(crate) struct Peers {
    peers: BTreeMap<MemberKey, Peer>,
    participants: BTreeMap<(ConnectionId, ParticipantIdentity), Participant>,
    /// Rings of members that left: they hold no keys, but remember which frames were opened.
    former: BTreeMap<MemberKey, KeyRing>,
    former_order: Vec<MemberKey>,
    /// With a shared password everybody has the same keys.
    shared_ring: Option<KeyRing>,
}

/// Members that left whose replay memory is kept: as many as those whose old keys are recognised, because a key that is
/// accepted again with an empty memory opens recorded frames.
const MAX_FORMER: usize = MAX_GONE;

#[derive(Debug)]
pub(crate) struct Peer {
    pub(crate) member: Member,
    pub(crate) ring: KeyRing,
    pub(crate) clock: Arc<super::clock::MemberClock>,
    /// By connection and sid: a member that moves between foci has tracks on both for a moment.
    pub(crate) tracks: BTreeMap<(ConnectionId, TrackSid), PeerTrack>,
    /// Statistics of tracks that ended.
    pub(crate) ended_tracks: u64,
    pub(crate) subscriptions: BTreeMap<TrackSid, Subscription>,
}

#[derive(Debug)]
pub(crate) struct PeerTrack {
    pub(crate) identity: ParticipantIdentity,
    pub(crate) from: Arc<IncomingTrack>,
    pub(crate) counters: Arc<TrackCounters>,
    pub(crate) since: Instant,
    pub(crate) reported: bool,
}

#[derive(Debug)]
struct Participant {
    tracks: BTreeMap<TrackSid, RemoteTrack>,
    since: Instant,
    reported: bool,
}

impl Peers {
    /// Nobody yet. With a shared password `shared_ring` holds its key.
    pub(crate) fn new(shared_ring: Option<KeyRing>) -> Self {
        Self { shared_ring, ..Self::default() }
    }

    /// Takes the present members, our own left out. `carries` says whether a connection goes to where a member
    /// publishes.
    pub(crate) fn set_members(
        &mut self,
        now: Instant,
        members: &[Member],
        carries: impl Fn(ConnectionId, &Member) -> bool,
    ) -> Vec<PeerChange> {
        let mut changes = Vec::new();
        let present: BTreeSet<MemberKey> = members.iter().map(Member::key).collect();
        let gone: Vec<MemberKey> = self.peers.keys().filter(|key| !present.contains(*key)).cloned().collect();
        for key in gone {
            self.remove(&key, &mut changes);
        }
        for member in members {
            let key = member.key();
            if let Some(peer) = self.peers.get_mut(&key) {
                if peer.member != *member {
                    peer.member = member.clone();
                    changes.push(PeerChange::Updated(member.clone()));
                }
                continue;
            }
            let former = self.former.remove(&key);
            let ring = self.shared_ring.clone().or(former).unwrap_or_default();
            self.former_order.retain(|former| *former != key);
            let peer = Peer {
                member: member.clone(),
                ring,
                clock: Arc::default(),
                tracks: BTreeMap::new(),
                ended_tracks: 0,
                subscriptions: BTreeMap::new(),
            };
            self.peers.insert(key, peer);
            changes.push(PeerChange::Joined(member.clone()));
        }
        self.reconcile(now, carries, &mut changes);
        changes
    }

    /// Matches participants with members anew after connections or participants changed.
    pub(crate) fn rematch(
        &mut self,
        now: Instant,
        carries: impl Fn(ConnectionId, &Member) -> bool,
    ) -> Vec<PeerChange> {
        let mut changes = Vec::new();
        self.reconcile(now, carries, &mut changes);
        changes
    }

    /// A participant is in the SFU room, or publishes a track.
    pub(crate) fn participant(
        &mut self,
        now: Instant,
        connection: ConnectionId,
        identity: &ParticipantIdentity,
        track: Option<RemoteTrack>,
    ) {
        let name = (connection, identity.clone());
        if !self.participants.contains_key(&name)
            && self.participants.len() >= MAX_STRANGERS + self.peers.len() * 4
        {
            tracing::warn!(%connection, "the SFU announces more participants than the call has members; ignored");
            return;
        }
        let participant = self.participants.entry(name).or_insert_with(|| Participant {
            tracks: BTreeMap::new(),
            since: now,
            reported: false,
        });
        if let Some(track) = track
            && (participant.tracks.len() < MAX_TRACKS || participant.tracks.contains_key(&track.sid))
        {
            participant.tracks.insert(track.sid.clone(), track);
        }
    }

    /// A participant's track ended.
    pub(crate) fn track_ended(
        &mut self,
        connection: ConnectionId,
        identity: &ParticipantIdentity,
        sid: &TrackSid,
    ) {
        if let Some(participant) = self.participants.get_mut(&(connection, identity.clone())) {
            participant.tracks.remove(sid);
        }
    }

    /// A participant left the SFU room.
    pub(crate) fn participant_left(&mut self, connection: ConnectionId, identity: &ParticipantIdentity) {
        self.participants.remove(&(connection, identity.clone()));
    }

    /// A connection ended with everything on it.
    pub(crate) fn connection_ended(&mut self, connection: ConnectionId) {
        self.participants.retain(|(of, _), _| *of != connection);
    }

    pub(crate) fn get(&self, key: &MemberKey) -> Option<&Peer> {
        self.peers.get(key)
    }

    pub(crate) fn get_mut(&mut self, key: &MemberKey) -> Option<&mut Peer> {
        self.peers.get_mut(key)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Peer> {
        self.peers.values()
    }

    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Peer> {
        self.peers.values_mut()
    }

    /// The members, in order of their keys.
    pub(crate) fn members(&self) -> Vec<Member> {
        self.peers.values().map(|peer| peer.member.clone()).collect()
    }

    /// The member behind a participant; `None` if there is none, or more than one.
    pub(crate) fn member_of(
        &self,
        connection: ConnectionId,
        identity: &ParticipantIdentity,
        carries: impl Fn(ConnectionId, &Member) -> bool,
    ) -> Option<&Peer> {
        let mut claims = self
            .peers
            .values()
            .filter(|peer| peer.member.is_known_as(identity) && carries(connection, &peer.member));
        let first = claims.next()?;
        if claims.next().is_some() {
            tracing::warn!(%identity, "two members claim one SFU identity; neither is shown");
            return None;
        }
        Some(first)
    }

    /// The member that a track is attached to.
    pub(crate) fn owner_of(&self, connection: ConnectionId, sid: &TrackSid) -> Option<&Peer> {
        let name = (connection, sid.clone());
        self.peers.values().find(|peer| peer.tracks.contains_key(&name))
    }

    /// Participants without a member that are to be reported now; each once.
    pub(crate) fn strangers(&mut self, now: Instant) -> Vec<(ConnectionId, ParticipantIdentity)> {
        let attached: BTreeSet<(ConnectionId, &ParticipantIdentity)> = self
            .peers
            .values()
            .flat_map(|peer| {
                peer.tracks.iter().map(|((connection, _), track)| (*connection, &track.identity))
            })
            .collect();
        let mut strangers = Vec::new();
        for ((connection, identity), participant) in &mut self.participants {
            if !participant.tracks.is_empty()
                && !participant.reported
                && now.saturating_duration_since(participant.since) >= STRANGER_AFTER
                && !attached.contains(&(*connection, identity))
            {
                participant.reported = true;
                strangers.push((*connection, identity.clone()));
            }
        }
        strangers
    }

    /// Wipes the keys of everybody, as when the call ends.
    pub(crate) fn clear(&mut self) -> Vec<PeerChange> {
        let mut changes = Vec::new();
        for key in self.peers.keys().cloned().collect::<Vec<_>>() {
            self.remove(&key, &mut changes);
        }
        self.participants.clear();
        changes
    }

    fn remove(&mut self, key: &MemberKey, changes: &mut Vec<PeerChange>) {
        let Some(peer) = self.peers.remove(key) else { return };
        for (connection, sid) in peer.tracks.into_keys() {
            changes.push(PeerChange::TrackEnds { connection, member: peer.member.clone(), sid });
        }
        changes.push(PeerChange::Left(peer.member));
        if self.shared_ring.is_some() {
            return;
        }
        peer.ring.clear();
        if self.former_order.len() == MAX_FORMER {
            let oldest = self.former_order.remove(0);
            self.former.remove(&oldest);
        }
        self.former_order.push(key.clone());
        self.former.insert(key.clone(), peer.ring);
    }

    fn reconcile(
        &mut self,
        now: Instant,
        carries: impl Fn(ConnectionId, &Member) -> bool,
        changes: &mut Vec<PeerChange>,
    ) {
        type Tracks = BTreeMap<(ConnectionId, TrackSid), (ParticipantIdentity, RemoteTrack)>;
        let mut wanted: BTreeMap<MemberKey, Tracks> = BTreeMap::new();
        for ((connection, identity), participant) in &self.participants {
            let Some(peer) = self.member_of(*connection, identity, &carries) else { continue };
            let of_member = wanted.entry(peer.member.key()).or_default();
            for (sid, track) in &participant.tracks {
                of_member.insert((*connection, sid.clone()), (identity.clone(), track.clone()));
            }
        }
        for (key, peer) in &mut self.peers {
            let mut wanted = wanted.remove(key).unwrap_or_default();
            // Another identity for the same sid is another track: nothing of the old owner may be used for it.
            let ended: Vec<_> = peer
                .tracks
                .iter()
                .filter(|(name, track)| {
                    wanted.get(*name).is_none_or(|(identity, _)| *identity != track.identity)
                })
                .map(|(name, _)| name.clone())
                .collect();
            for name in ended {
                peer.tracks.remove(&name);
                peer.ended_tracks += 1;
                let (connection, sid) = name;
                changes.push(PeerChange::TrackEnds { connection, member: peer.member.clone(), sid });
            }
            for (name, (identity, track)) in std::mem::take(&mut wanted) {
                let from = Arc::new(IncomingTrack { member: peer.member.clone(), track });
                let (begins, counters) = match peer.tracks.get_mut(&name) {
                    Some(known) if known.from == from => continue,
                    Some(known) => {
                        known.from = Arc::clone(&from);
                        (false, Arc::clone(&known.counters))
                    }
                    None => {
                        let counters = Arc::<TrackCounters>::default();
                        let track = PeerTrack {
                            identity,
                            from: Arc::clone(&from),
                            counters: Arc::clone(&counters),
                            since: now,
                            reported: false,
                        };
                        peer.tracks.insert(name.clone(), track);
                        (true, counters)
                    }
                };
                let route =
                    TrackRoute { from, ring: peer.ring.clone(), counters, clock: Arc::clone(&peer.clock) };
                let (connection, sid) = name;
                changes.push(if begins {
                    let subscription = peer.subscriptions.get(&sid).cloned();
                    PeerChange::TrackBegins { connection, route, subscription }
                } else {
                    PeerChange::TrackChanged { connection, route }
                });
            }
        }
    }
}
