//! The machine that joins all the others.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use rand::{CryptoRng, Rng as _, SeedableRng as _, rngs::StdRng};
use ruma_common::{OwnedEventId, OwnedUserId};

use super::{
    config::{EncryptionPolicy, MachineConfig},
    event::{CallEvent, ConnectFailure, ConnectFailureKind, EndReason, NoMediaCause},
    media_keys::{KeyEvent, KeyInput, KeyOutput, KeySource, MediaKeys, MediaKeysConfig, SendId},
    membership::{
        choice::choose_slot,
        own::{self, OwnMembership},
        roster::{Change, Roster},
        slots::{self, SlotStatus},
        wire::{self, MembershipMode, OwnDescription, OwnTransports},
    },
    messages::{AccessWanted, CallStatus, Grant, Input, Output, PublishFailure, RequestId},
    notify::{self, Attention, Notice, Notify},
    own_foci::{OwnFoci, Verdict},
    paths::{OwnPlace, Path, Paths},
    peers::{Peer, PeerChange, PeerTrack, Peers},
    placement::{CallSize, FocusHealth, MeshReason, Place, Placement},
    report::{self, CallReport, MemberReport, Step, Timeline, TrackReport, stage},
    routing::{RouteOutput, Routing, Wanted},
    sealing::Sealing,
    wishes::Wishes,
};
use crate::{
    key::{KeyIndex, MediaKey},
    matrix::{
        Delivery, DeliveryFailure, EventWrite, MatrixReply, MatrixRequest, MatrixUpdate, RequestError,
        RoomView, ServerSupport, ToDeviceBatch, ToDeviceEvent, TrustPolicy,
    },
    media::TrackSpec,
    member::{Device, Member, MemberId, MemberKey, MembershipForm, ParticipantIdentity, Slot},
    time::Now,
    transport::{
        ConnectionId, DataBody, DataPacket, LiveKitFocus, LocalTrackId, MeshSession, NamedBy, Subscription,
        TrackSid, TransportEvent,
        mesh::{MeshPeer, MessageId, Negotiated, Signalling, SignallingInput, SignallingOutput, Us},
    },
};

/// How often peers, tracks and old keys are looked through.
const SWEEP_EVERY: Duration = Duration::from_secs(2);
/// How long a track that should flow may be silent before the application is told why.
const NO_MEDIA_AFTER: Duration = Duration::from_secs(10);
/// Wait after the room could not be read; doubled up to the maximum.
const READ_AGAIN: Duration = Duration::from_secs(1);
const READ_AGAIN_MAX: Duration = Duration::from_secs(30);
/// How long a membership that a sync has just brought may lack its sender in the list of joined users.
const NOT_IN_ROOM_AFTER: Duration = Duration::from_secs(10);
/// Time for the homeserver to tell its abilities; tries after the first, and the first wait, doubled each time.
const SUPPORT_TIMEOUT: Duration = Duration::from_secs(10);
const SUPPORT_TRIES: u32 = 4;
const SUPPORT_AGAIN: Duration = Duration::from_millis(500);
/// How long a sync may take to show that the slot is open which we have opened.
const SLOT_SHOWN_AFTER: Duration = Duration::from_secs(10);
/// Users that are named as the source of one focus: homeservers to ask for its tokens.
const MAX_NAMERS: usize = 8;
/// How long an event may take to be sent.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long leaving may take before everything is released.
const LEAVE_WITHIN: Duration = Duration::from_secs(5);

mod around;
mod joining;
mod keys;
mod media;
mod mesh;

use mesh::FocusState;

/// One call. See the [module](super).
pub struct CallMachine {
    config: MachineConfig,
    phase: Phase,
    status: CallStatus,
    timeline: Timeline,
    outputs: VecDeque<Output>,
    room: Room,
    slot: Slot,
    /// When we last wrote that the slot is open.
    slot_opened: Option<Instant>,
    support: Option<ServerSupport>,
    /// Failed tries to read it, and when the next one is due.
    support_failures: u32,
    support_again: Option<Instant>,
    own: OwnMembership,
    roster: Roster,
    keys: MediaKeys,
    /// Our membership's id, once it is needed.
    member_id: Option<MemberId>,
    joined_users: BTreeSet<OwnedUserId>,
    rng: StdRng,
    peers: Peers,
    routing: Routing,
    foci: OwnFoci,
    /// The latest token of our focus for our present identity.
    own_grant: Option<Grant>,
    discovering: bool,
    discovered: bool,
    /// When a call without a focus looks for one again.
    discover_again: Option<Instant>,
    placement: Placement,
    focus: FocusState,
    paths: Paths,
    mesh_session: Option<MeshSession>,
    signalling: Option<Signalling>,
    next_mesh_route: u32,
    /// Mesh connections that take tracks, and those that carry media.
    open_pairs: BTreeSet<ConnectionId>,
    connected_pairs: BTreeSet<ConnectionId>,
    /// Those that are too narrow for our video.
    short_pairs: BTreeSet<ConnectionId>,
    /// Tracks that come by another path and that the SFU was told not to send.
    declined: BTreeSet<(ConnectionId, TrackSid)>,
    notify: Notify,
    /// Our newest membership event.
    own_event_id: Option<OwnedEventId>,
    /// Whether the room was invited, or need not be.
    invited: bool,
    sealing: Arc<Sealing>,
    locals: BTreeMap<LocalTrackId, Local>,
    requests: BTreeMap<RequestId, Origin>,
    last_request: u64,
    next_sweep: Instant,
}

#[derive(Debug, PartialEq, Eq)]
enum Phase {
    Idle,
    /// The room, the foci and the server's abilities are asked for.
    Preparing,
    /// Membership, keys and connections are kept.
    Running,
    Leaving {
        reason: EndReason,
        until: Instant,
    },
    Over,
}

/// What is known of the room.
#[derive(Debug, Default)]
struct Room {
    known: bool,
    reading: bool,
    dirty: bool,
    read_again: Option<Instant>,
    failures: u32,
    encrypted: bool,
    version: String,
    /// Since when we are not joined to the room.
    absent_since: Option<Instant>,
}

#[derive(Debug)]
struct Local {
    spec: TrackSpec,
    muted: bool,
    /// The connections that were asked to carry it.
    on: BTreeSet<ConnectionId>,
    /// What its connections ask of its encoder.
    wishes: Wishes,
    /// Its publisher was told that it is live.
    told: bool,
}

/// Who asked for a request.
#[derive(Debug)]
enum Origin {
    Support,
    Own(own::RequestId),
    Keys(SendId),
    Mesh(MessageId),
    Invite,
    Hand,
    /// Nobody waits for its outcome.
    Write,
}

impl CallMachine {
    /// A call that has not started. `sealing` is shared with the media path; `rng` makes keys and ids.
    ///
    /// With a shared password the caller has installed its key in `sealing` before.
    #[must_use]
    pub fn new(
        now: Now,
        config: MachineConfig,
        sealing: Arc<Sealing>,
        mut rng: Box<dyn CryptoRng + Send>,
    ) -> Self {
        let slot = config.slot.clone().unwrap_or_else(Slot::room_call);
        let own = OwnMembership::new(config.membership.clone(), Box::new(fork(&mut *rng)));
        let own_rng = fork(&mut *rng);
        Self {
            phase: Phase::Idle,
            status: CallStatus::Joining,
            timeline: Timeline::new(now.instant),
            outputs: VecDeque::new(),
            room: Room::default(),
            roster: Roster::new(slot.clone()),
            slot: slot.clone(),
            slot_opened: None,
            support: None,
            support_failures: 0,
            support_again: None,
            own,
            keys: media_keys(&config, slot.clone(), rng),
            member_id: None,
            joined_users: BTreeSet::new(),
            rng: own_rng,
            peers: Peers::new(config.shared_password.then(|| sealing.ring().clone())),
            routing: Routing::default(),
            foci: OwnFoci::default(),
            own_grant: None,
            discovering: false,
            discovered: false,
            discover_again: None,
            placement: Placement::new(config.mesh, config.mesh_most),
            focus: FocusState::default(),
            paths: Paths::default(),
            mesh_session: None,
            signalling: None,
            next_mesh_route: ConnectionId::FIRST_MESH_ROUTE,
            open_pairs: BTreeSet::new(),
            connected_pairs: BTreeSet::new(),
            short_pairs: BTreeSet::new(),
            declined: BTreeSet::new(),
            notify: Notify::new(config.device.user_id.clone()),
            own_event_id: None,
            invited: false,
            sealing,
            locals: BTreeMap::new(),
            requests: BTreeMap::new(),
            last_request: 0,
            next_sweep: now.instant + SWEEP_EVERY,
            config,
        }
    }

    /// Takes in what happened. Drain [`Self::poll`] after it.
    pub fn handle(&mut self, now: Now, input: Input) {
        if self.phase == Phase::Over {
            return;
        }
        match input {
            Input::Start => self.start(now),
            Input::Leave(reason) => self.leave(now, reason),
            Input::SetIntent(intent) => {
                self.config.intent.clone_from(&intent);
                self.own.handle(now, own::Input::SetIntent(intent));
            }
            Input::RotateKey => self.keys.handle(now, KeyInput::Rotate),
            Input::Publish { track, spec } => {
                let local = Local {
                    muted: spec.muted,
                    spec,
                    on: BTreeSet::new(),
                    wishes: Wishes::default(),
                    told: false,
                };
                self.locals.insert(track, local);
                self.publish_locals();
            }
            Input::Unpublish(track) => {
                for connection in self.locals.remove(&track).map(|local| local.on).unwrap_or_default() {
                    self.outputs.push_back(Output::Unpublish { connection, track });
                }
            }
            Input::SetMuted { track, muted } => {
                if let Some(local) = self.locals.get_mut(&track)
                    && local.muted != muted
                {
                    local.muted = muted;
                    for connection in local.on.iter().copied() {
                        self.outputs.push_back(Output::Mute { connection, track, muted });
                    }
                }
            }
            Input::Subscribe { member, sid, subscription } => {
                if let Some(peer) = self.peers.get_mut(&member) {
                    for (connection, wire_sid) in peer.called(&sid) {
                        self.outputs.push_back(Output::Subscribe {
                            connection,
                            sid: wire_sid,
                            subscription: subscription.clone(),
                        });
                    }
                    peer.subscriptions.insert(sid, subscription);
                }
            }
            Input::RequestKeyFrame { member, sid } => {
                if let Some(peer) = self.peers.get(&member) {
                    for (connection, sid) in peer.called(&sid) {
                        self.outputs.push_back(Output::RequestKeyFrame { connection, sid });
                    }
                }
            }
            Input::SendData { reliability, to, message } => self.send_data(reliability, &to, message),
            Input::Invite(attention) => self.invite(now, attention),
            Input::Decline(invite) => self.write(Origin::Write, notify::decline(&invite)),
            Input::React { emoji, name } => {
                if let Some(own) = self.own_event_id.clone() {
                    self.write(Origin::Write, notify::reaction(&own, &emoji, &name));
                }
            }
            Input::RaiseHand(raised) => self.raise_hand(raised),
            Input::Room(result) => self.room_read(now, result),
            Input::Update(update) => self.update(now, update),
            Input::Matrix { id, result } => self.matrix_done(now, id, result),
            Input::Delivered { id, device, result } => self.delivered(now, id, device, result),
            Input::BatchDone(id) => match self.requests.remove(&id) {
                Some(Origin::Keys(id)) => self.keys.handle(now, KeyInput::Finished { id }),
                // Without an outcome the message was not sent.
                Some(Origin::Mesh(id)) => self.mesh_sent(now, id, Err(DeliveryFailure::UnknownDevice)),
                _ => {}
            },
            Input::Discovered(result) => self.discovered(now, result),
            Input::Granted { connection, result } => match result {
                Ok(grant) => {
                    self.timeline.add(now.instant, Step::Token { connection: connection.to_string() });
                    if self.routing.is_ours(connection) {
                        self.own_granted(now, grant.clone());
                    }
                    self.routing.granted(connection, grant.sfu);
                    self.replan(now);
                    self.join_when_ready(now);
                }
                Err(failure) => self.connection_failed(now, connection, failure),
            },
            Input::Connected { connection, result } if connection.is_mesh() => {
                self.pair_opened(now, connection, result);
            }
            Input::Connected { connection, result } => match result {
                Ok(()) => self.connected(now, connection),
                Err(failure) => self.connection_failed(now, connection, failure),
            },
            Input::Transport { connection, event } => self.transport_event(now, connection, event),
            Input::Published { connection, track, result } => self.published(connection, track, result),
        }
    }

    /// What to do now. To be called until it says [`Output::WaitUntil`] (or [`Output::Over`], the last output).
    pub fn poll(&mut self, now: Now) -> Output {
        loop {
            if let Some(output) = self.outputs.pop_front() {
                return output;
            }
            if self.phase == Phase::Over {
                return Output::WaitUntil(now.instant + READ_AGAIN_MAX);
            }
            let wake = self.advance(now);
            if self.outputs.is_empty() {
                return Output::WaitUntil(wake);
            }
        }
    }

    /// An account of the call so far, without names and keys.
    #[must_use]
    pub fn report(&mut self, now: Now) -> CallReport {
        let mut members = Vec::new();
        for peer in self.peers.iter() {
            let tracks = peer.shown_tracks().map(|track| TrackReport {
                sid: track.from.track.sid.0.clone(),
                source: format!("{:?}", track.from.track.source),
                codec: track.from.track.codec.map(|codec| format!("{codec:?}")),
                muted: track.from.track.muted,
                stats: track.counters.read(),
            });
            members.push(MemberReport {
                member: self.timeline.number(&peer.member.key()),
                server: peer.member.user_id.server_name().to_string(),
                tracks: tracks.collect(),
            });
        }
        members.sort_by_key(|member| member.member);
        CallReport {
            version: env!("CARGO_PKG_VERSION"),
            encrypted: self.sealing.is_encrypted(),
            mode: format!("{:?}", self.config.mode),
            at_ms: self.timeline.at_ms(now.instant),
            members,
            timeline: self.timeline.entries(),
            dropped_steps: self.timeline.dropped(),
        }
    }

    /// The other members.
    #[must_use]
    pub fn members(&self) -> Vec<Member> {
        self.peers.members()
    }

    /// The keys of a member's device.
    #[cfg(test)]
    pub(super) fn ring_of(&self, device: &Device) -> Option<crate::frame_crypto::KeyRing> {
        let is_theirs = |peer: &&Peer| peer.member.device().as_ref() == Some(device);
        self.peers.iter().find(is_theirs).map(|peer| peer.ring.clone())
    }

    /// Lets every room do what is due, and says when to come back.
    fn advance(&mut self, now: Now) -> Instant {
        let mut wake = self.next_sweep;
        if let Some(at) = self.drain_own(now) {
            wake = wake.min(at);
        }
        while let Some(output) = self.routing.poll(now.instant) {
            self.route(now, output);
        }
        if let Phase::Leaving { until, reason } = &self.phase {
            // An event that is on its way, as the withdrawal of an invitation, is not cut off.
            let is_writing = self.requests.values().any(|origin| matches!(origin, Origin::Write));
            let has_left = self.own.status() == own::Status::Disconnected && !is_writing;
            if has_left || now.instant >= *until {
                let reason = match reason {
                    EndReason::Membership(reason) => report::variant(reason),
                    reason => report::variant(reason),
                };
                let step = Step::Ended { reason };
                self.timeline.add(now.instant, step);
                self.over();
                return now.instant;
            }
            return wake.min(*until);
        }
        if let Some(at) = self.replan(now) {
            wake = wake.min(at);
        }
        if let Some(at) = self.drain_signalling(now) {
            wake = wake.min(at);
        }
        if self.sealing.is_encrypted()
            && let Some(at) = self.drain_keys(now)
        {
            wake = wake.min(at);
        }
        if self.room.read_again.is_some_and(|at| at <= now.instant) {
            self.room.read_again = None;
            self.room.dirty = true;
        }
        if self.support_again.is_some_and(|at| at <= now.instant) {
            self.read_support();
        }
        if self.room.dirty && !self.room.reading && self.phase != Phase::Idle {
            self.room.dirty = false;
            self.room.reading = true;
            self.outputs.push_back(Output::ReadRoom);
        }
        if let Some(at) = self.roster.next_expiry() {
            let at = now.instant + at.since(now.unix);
            if at <= now.instant {
                let change = self.roster.tick(now);
                self.members_changed(now, change);
            } else {
                wake = wake.min(at);
            }
        }
        if now.instant >= self.next_sweep {
            self.next_sweep = now.instant + SWEEP_EVERY;
            self.sweep(now);
        }
        let times = [self.room.read_again, self.support_again, self.routing.wake_at(), Some(self.next_sweep)];
        times.into_iter().flatten().fold(wake, Instant::min)
    }

    fn update(&mut self, now: Now, update: MatrixUpdate) {
        match update {
            MatrixUpdate::RoomChanged => self.room.dirty = true,
            MatrixUpdate::ToDevice(event) if event.event_type.starts_with("m.call.") => {
                self.mesh_message(now, &event);
            }
            MatrixUpdate::ToDevice(event) => {
                self.keys.handle(now, KeyInput::ToDevice(&event));
            }
            MatrixUpdate::TrustChanged { user_id } => {
                self.mesh_trust_changed(now, &user_id);
                self.keys.handle(now, KeyInput::TrustChanged { user_id });
            }
            MatrixUpdate::Event(event) => {
                let in_call = !self.config.observe && self.phase == Phase::Running;
                if let Some(notice) = self.notify.receive(now, &event, in_call) {
                    self.notice(notice);
                }
            }
            MatrixUpdate::Syncing(_) => {}
        }
    }

    fn is_us(&self, member: &Member) -> bool {
        member.user_id == self.config.device.user_id
            && member.device_id.as_ref() == Some(&self.config.device.device_id)
    }

    fn request(&mut self, origin: Origin, request: MatrixRequest, timeout: Duration) {
        let id = self.next_request(origin);
        self.outputs.push_back(Output::Matrix { id, request, timeout });
    }

    fn next_request(&mut self, origin: Origin) -> RequestId {
        self.last_request += 1;
        let id = RequestId(self.last_request);
        self.requests.insert(id, origin);
        id
    }

    fn tell(&mut self, event: CallEvent) {
        self.outputs.push_back(Output::Event(event));
    }
}

/// Whether media of `member` comes by `connection`.
fn carries(
    (routing, paths, signalling): (&Routing, &Paths, &Option<Signalling>),
    connection: ConnectionId,
    member: &Member,
) -> bool {
    let key = member.key();
    if connection.is_mesh() {
        let of_pair = signalling.as_ref().and_then(|signalling| signalling.member_of(connection));
        return of_pair == Some(&key);
    }
    paths.of(&key).any(|path| matches!(path, Path::Focus(focus) if routing.goes_to(connection, focus)))
}

fn media_keys(config: &MachineConfig, slot: Slot, rng: Box<dyn CryptoRng + Send>) -> MediaKeys {
    let source = if config.shared_password {
        // The caller has installed it; the machine only has to send no keys.
        KeySource::SharedPassword(zeroize::Zeroizing::new(String::new()))
    } else {
        KeySource::PerMember
    };
    let keys = MediaKeysConfig {
        source,
        trust: config.trust,
        rollout: config.keys.clone(),
        inbox: config.inbox.clone(),
        healing: config.healing.clone(),
    };
    MediaKeys::new(keys, config.room_id.clone(), slot, config.device.clone(), rng)
}

/// A generator of its own, seeded by `rng`.
fn fork(rng: &mut dyn CryptoRng) -> StdRng {
    let mut seed = [0; 32];
    rng.fill_bytes(&mut seed);
    StdRng::from_seed(seed)
}
