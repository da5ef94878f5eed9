//! One peer per (user, device, member id): its membership, key ring, tracks and statistics in one place.
//!
//! Participants and their tracks are the SFU's word and are kept as such; which member a participant is, is decided
//! here and nowhere else. A participant belongs to a member if its identity is one of the member's identities and it
//! is on a connection by which the member's media travels. If two members claim one identity, neither gets it.
//!
//! A member that moves between two paths has its tracks on both for a while. The application sees one track all the
//! time, under the sid that it had first.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant},
};

use crate::{
    frame_crypto::KeyRing,
    media::TrackSource,
    member::{Member, MemberKey, ParticipantIdentity},
    transport::{ConnectionId, RemoteTrack, Subscription, TrackSid},
};

use super::{media_keys::MAX_GONE, path_choice::PathChoice, stats::TrackCounters};

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
    /// Whose frames count while the track comes by several paths.
    pub choice: Arc<PathChoice>,
    /// The number of this path for [`Self::choice`].
    pub path: u32,
}

/// A change of what flows, in the order in which it must happen.
#[derive(Clone, Debug)]
pub(crate) enum PeerChange {
    /// A member joined.
    Joined(Member),
    /// A member describes itself differently.
    Updated(Member),
    /// A track begins to come by a connection, where it is called `sid`: attach it, then tell the application if the
    /// track is `new` to it.
    TrackBegins {
        connection: ConnectionId,
        sid: TrackSid,
        route: TrackRoute,
        subscription: Option<Subscription>,
        new: bool,
    },
    /// A track's description changed.
    TrackChanged { connection: ConnectionId, sid: TrackSid, route: TrackRoute },
    /// A track does not come by a connection any more: detach it. If it comes by no other, tell the application that
    /// the track it knows as `over` has ended.
    TrackEnds { connection: ConnectionId, sid: TrackSid, member: Member, over: Option<TrackSid> },
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
    /// By connection and the sid there: a member that moves has its tracks on two for a moment.
    pub(crate) tracks: BTreeMap<(ConnectionId, TrackSid), PeerTrack>,
    /// Statistics of tracks that ended.
    pub(crate) ended_tracks: u64,
    pub(crate) subscriptions: BTreeMap<TrackSid, Subscription>,
}

#[derive(Debug)]
pub(crate) struct PeerTrack {
    pub(crate) identity: ParticipantIdentity,
    /// As the application knows it.
    pub(crate) from: Arc<IncomingTrack>,
    pub(crate) counters: Arc<TrackCounters>,
    pub(crate) choice: Arc<PathChoice>,
    pub(crate) path: u32,
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

    /// The member under a key.
    pub(crate) fn member(&self, key: &MemberKey) -> Option<Member> {
        self.peers.get(key).map(|peer| peer.member.clone())
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

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.peers.len()
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

    /// The member and the track behind a sid of a connection.
    pub(crate) fn track(&self, connection: ConnectionId, sid: &TrackSid) -> Option<&IncomingTrack> {
        let name = (connection, sid.clone());
        self.peers.values().find_map(|peer| peer.tracks.get(&name)).map(|track| track.from.as_ref())
    }

    /// Tracks on a connection whose publisher's media comes by another path, and which need not be sent here.
    pub(crate) fn superfluous(
        &self,
        connection: ConnectionId,
        carries: impl Fn(ConnectionId, &Member) -> bool,
    ) -> Vec<TrackSid> {
        let mut sids = Vec::new();
        for ((_, identity), participant) in self.participants.iter().filter(|((of, _), _)| *of == connection)
        {
            let mut members = self.peers.values().filter(|peer| peer.member.is_known_as(identity));
            if members.next().is_some_and(|peer| !carries(connection, &peer.member)) {
                sids.extend(participant.tracks.keys().cloned());
            }
        }
        sids
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
                // A member whose media comes by another path is not reported.
                && !self.peers.values().any(|peer| peer.member.is_known_as(identity))
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
        let mut tracks = peer.tracks;
        while let Some(((connection, sid), track)) = tracks.pop_first() {
            let member = peer.member.clone();
            let over = is_over(&tracks, &track);
            changes.push(PeerChange::TrackEnds { connection, sid, member, over });
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
        type Announced = BTreeMap<(ConnectionId, TrackSid), (ParticipantIdentity, RemoteTrack)>;
        let mut wanted: BTreeMap<MemberKey, Announced> = BTreeMap::new();
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
            let mut ended = Vec::new();
            let mut kept = Tracks::new();
            for (name, track) in std::mem::take(&mut peer.tracks) {
                let stays = wanted.get(&name).is_some_and(|(identity, _)| *identity == track.identity);
                if stays {
                    kept.insert(name, track);
                } else {
                    ended.push((name, track));
                }
            }
            peer.tracks = kept;
            let mut begun = Vec::new();
            for (name, (identity, mut track)) in std::mem::take(&mut wanted) {
                let Some(known) = peer.tracks.get_mut(&name) else {
                    begun.push((name, identity, track));
                    continue;
                };
                track.sid.clone_from(&known.from.track.sid);
                let from = IncomingTrack { member: peer.member.clone(), track };
                if *known.from != from {
                    known.from = Arc::new(from);
                    let route = known.route(&peer.ring, &peer.clock);
                    let (connection, sid) = name;
                    changes.push(PeerChange::TrackChanged { connection, sid, route });
                }
            }
            let mut beginnings = Vec::new();
            for (name, identity, mut track) in begun {
                // A track that moves at this very moment goes on, too.
                let (counters, choice) = match same_track(&peer.tracks, &ended, name.0, &track) {
                    Some(known) => {
                        track.sid.clone_from(&known.from.track.sid);
                        (Arc::clone(&known.counters), Arc::clone(&known.choice))
                    }
                    None => Default::default(),
                };
                let path = choice.add();
                let from = Arc::new(IncomingTrack { member: peer.member.clone(), track });
                let subscription = peer.subscriptions.get(&from.track.sid).cloned();
                let track = PeerTrack { identity, from, counters, choice, path, since: now, reported: false };
                let route = track.route(&peer.ring, &peer.clock);
                peer.tracks.insert(name.clone(), track);
                let (connection, sid) = name;
                let new = path == 1;
                beginnings.push(PeerChange::TrackBegins { connection, sid, route, subscription, new });
            }
            for ((connection, sid), track) in ended {
                track.choice.ended(track.path);
                peer.ended_tracks += 1;
                let member = peer.member.clone();
                let over = is_over(&peer.tracks, &track);
                changes.push(PeerChange::TrackEnds { connection, sid, member, over });
            }
            changes.append(&mut beginnings);
        }
    }
}

impl Peer {
    /// Where a track that the application knows as `shown` comes from, and what it is called there.
    pub(crate) fn called(&self, shown: &TrackSid) -> Vec<(ConnectionId, TrackSid)> {
        let of_track = |(_, track): &(&(ConnectionId, TrackSid), &PeerTrack)| track.from.track.sid == *shown;
        self.tracks.iter().filter(of_track).map(|(name, _)| name.clone()).collect()
    }

    /// The tracks as the application knows them: each once, by its newest path.
    pub(crate) fn shown_tracks(&self) -> impl Iterator<Item = &PeerTrack> {
        let is_newest = |track: &&PeerTrack| {
            self.tracks
                .values()
                .all(|other| other.from.track.sid != track.from.track.sid || other.path <= track.path)
        };
        self.tracks.values().filter(is_newest)
    }
}

impl PeerTrack {
    fn route(&self, ring: &KeyRing, clock: &Arc<super::clock::MemberClock>) -> TrackRoute {
        TrackRoute {
            from: Arc::clone(&self.from),
            ring: ring.clone(),
            counters: Arc::clone(&self.counters),
            clock: Arc::clone(clock),
            choice: Arc::clone(&self.choice),
            path: self.path,
        }
    }
}

type Tracks = BTreeMap<(ConnectionId, TrackSid), PeerTrack>;

/// The track of another connection that `track` continues: the same source and name, not continued by this connection
/// yet. Two such tracks of one member are not told apart when it moves.
fn same_track<'a>(
    tracks: &'a Tracks,
    ended: &'a [((ConnectionId, TrackSid), PeerTrack)],
    connection: ConnectionId,
    track: &RemoteTrack,
) -> Option<&'a PeerTrack> {
    if track.source == TrackSource::Unknown {
        return None;
    }
    let known = || tracks.iter().chain(ended.iter().map(|(name, track)| (name, track)));
    let taken =
        |sid: &TrackSid| known().any(|((of, _), known)| *of == connection && known.from.track.sid == *sid);
    known().map(|(_, known)| known).find(|known| {
        let before = &known.from.track;
        before.source == track.source && before.name == track.name && !taken(&before.sid)
    })
}

/// The sid by which the application knows `ended`, if the track comes by no other connection.
fn is_over(others: &Tracks, ended: &PeerTrack) -> Option<TrackSid> {
    let sid = &ended.from.track.sid;
    others.values().all(|track| track.from.track.sid != *sid).then(|| sid.clone())
}
