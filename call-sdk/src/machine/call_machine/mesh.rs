//! Where our media travels, by which path each member is reached, and the pairs of the mesh.

use super::*;

/// How long our focus stays connected after we left it for the mesh: others still subscribe there.
const FOCUS_LINGER: Duration = Duration::from_secs(20);
/// How often a call without a focus looks for one.
const DISCOVER_AGAIN: Duration = Duration::from_secs(60);
/// How soon it looks for one after a member came that has one.
const DISCOVER_SOON: Duration = Duration::from_secs(1);
/// Members that we exchange media with directly, at most: each takes a peer connection and its own uplink.
const MAX_PAIRS: usize = 32;
/// Of one user, so that nobody takes the others' places.
const MAX_DEVICES: usize = 4;

/// How our focus does.
#[derive(Debug, Default)]
pub(super) struct FocusState {
    /// Since when it is asked for, or was lost.
    down_since: Option<Instant>,
    failures: u32,
    up_since: Option<Instant>,
    /// Signalling works but no media path.
    blocked: bool,
    /// It stays connected until then although our media has moved.
    pub(super) leaves_at: Option<Instant>,
}

impl FocusState {
    pub(super) fn up(&mut self, now: Instant) {
        if !self.blocked {
            self.up_since.get_or_insert(now);
            self.down_since = None;
            self.failures = 0;
        }
    }

    pub(super) fn media_up(&mut self, now: Instant) {
        self.blocked = false;
        self.up(now);
    }

    pub(super) fn blocked(&mut self, now: Instant) {
        self.blocked = true;
        self.down(now, 0);
    }

    /// Another focus is tried: what the one before did does not count against it.
    pub(super) fn another(&mut self) {
        self.failures = 0;
        self.blocked = false;
    }

    pub(super) fn down(&mut self, now: Instant, failures: u32) {
        self.up_since = None;
        self.down_since.get_or_insert(now);
        self.failures = failures;
    }
}

impl CallMachine {
    /// Decides anew where our media travels, and moves it. Returns when to decide again.
    pub(super) fn replan(&mut self, now: Now) -> Option<Instant> {
        if self.phase != Phase::Running || self.config.observe {
            return None;
        }
        let size = self.call_size();
        let wanted = self.placement.wants_focus(size);
        if !wanted && self.focus.leaves_at.is_none() {
            self.focus = FocusState::default();
        }
        let health = self.focus_health(now.instant, wanted);
        let before = self.placement.place();
        let mut again = self.placement.decide(now.instant, size, health);
        let place = self.placement.place();
        if before != place
            && let Some(place) = place
        {
            self.moved(now, before, place);
        }
        if self.placement.wants_focus(size) != wanted {
            self.want_connections(now);
        }
        if self.focus.leaves_at.is_some_and(|at| at <= now.instant) {
            self.focus.leaves_at = None;
            self.want_connections(now);
        }
        if self.discover_again.is_some_and(|at| at <= now.instant) {
            self.discover_again = None;
            self.discover();
        }
        if self.paths.expire(now.instant) {
            self.paths_changed(now);
        }
        for at in [self.focus.leaves_at, self.discover_again, self.paths.wake_at()].into_iter().flatten() {
            again = Some(again.map_or(at, |again| again.min(at)));
        }
        again
    }

    pub(super) fn call_size(&self) -> CallSize {
        let can_mesh = |peer: &Peer| peer.member.device_id.is_some() && peer.member.mesh().is_some();
        CallSize { members: self.peers.count() + 1, all_can_mesh: self.peers.iter().all(can_mesh) }
    }

    fn focus_health(&mut self, now: Instant, wanted: bool) -> FocusHealth {
        if self.foci.current().is_none() {
            return FocusHealth::None;
        }
        if !wanted {
            return FocusHealth::Unused;
        }
        if let Some(since) = self.focus.up_since {
            return FocusHealth::Up { since };
        }
        if self.placement.place().is_none() && self.own_grant.is_some() {
            return FocusHealth::Granted;
        }
        let since = *self.focus.down_since.get_or_insert(now);
        FocusHealth::Down { since, failures: self.focus.failures }
    }

    fn moved(&mut self, now: Now, before: Option<Place>, place: Place) {
        self.focus.leaves_at = None;
        match place {
            Place::Focus => {
                self.discover_again = None;
                if let (Some(Place::Mesh(_)), Some(focus)) = (before, self.foci.current().cloned()) {
                    self.timeline.add(now.instant, Step::Moved { to: "focus" });
                    self.tell(CallEvent::MeshEnded(focus));
                }
            }
            Place::Mesh(reason) => {
                if before == Some(Place::Focus) {
                    self.focus.leaves_at = Some(now.instant + FOCUS_LINGER);
                }
                if reason == MeshReason::NoFocus {
                    self.discover_later(now);
                }
                self.timeline.add(now.instant, Step::Moved { to: "mesh" });
                self.tell(CallEvent::MeshBegan(reason));
            }
        }
        if let Some(description) = self.describe() {
            self.own.handle(now, own::Input::SetDescription(description));
        }
        if place == Place::Focus && self.config.delegate_leave && self.routing.ours().is_some() {
            self.own.handle(now, own::Input::OfferDelegation);
        }
        self.update_paths(now);
        self.want_connections(now);
        self.publish_locals();
        self.join_when_ready(now);
        self.refresh_status();
    }

    /// What our membership says about our transports now.
    pub(super) fn own_transports(&self) -> OwnTransports {
        let on_focus = !self.placement.is_mesh();
        OwnTransports {
            focus: self.foci.current().filter(|_| on_focus).cloned(),
            mesh: self.mesh_session.clone(),
        }
    }

    /// Looks for a focus again after a while.
    pub(super) fn discover_later(&mut self, now: Now) {
        self.discover_again = Some(now.instant + DISCOVER_AGAIN);
    }

    /// Starts a session in the mesh under our present membership. What was before is hung up.
    pub(super) fn start_mesh(&mut self, now: Now) {
        if !self.placement.can_mesh() {
            return;
        }
        self.leave_mesh(now);
        let session = MeshSession(format!("{:032x}", self.rng.random::<u128>()));
        self.mesh_session = Some(session.clone());
        let us = Us {
            room_id: self.config.room_id.clone(),
            slot: self.slot.clone(),
            device: self.config.device.clone(),
            session,
        };
        let first_route = self.next_mesh_route;
        self.signalling = Some(Signalling::new(us, first_route, fork(&mut self.rng)));
        self.update_pairs(now);
    }

    /// Hangs up every pair.
    pub(super) fn leave_mesh(&mut self, now: Now) {
        if let Some(signalling) = &mut self.signalling {
            signalling.handle(now.instant, SignallingInput::Leave);
            self.drain_signalling(now);
        }
        if let Some(signalling) = self.signalling.take() {
            self.next_mesh_route = signalling.next_route();
        }
    }

    /// The members, or our own place, changed.
    pub(super) fn update_paths(&mut self, now: Now) {
        if self.config.observe {
            return;
        }
        let transports = self.own_transports();
        let us = OwnPlace { has_focus: transports.focus.is_some(), can_mesh: transports.mesh.is_some() };
        let members = self.peers.members();
        if !self.paths.update(now.instant, &us, &members) {
            return;
        }
        self.paths_changed(now);
        // A member has a focus, and we know none: perhaps it would have us.
        let has_focus = members.iter().any(|member| member.focus().is_some());
        if has_focus && self.placement.place() == Some(Place::Mesh(MeshReason::NoFocus)) {
            self.discover_again = Some(now.instant + DISCOVER_SOON);
        }
    }

    fn paths_changed(&mut self, now: Now) {
        self.update_pairs(now);
        self.rematch(now);
        self.want_connections(now);
    }

    fn update_pairs(&mut self, now: Now) {
        let Some(signalling) = &mut self.signalling else { return };
        let mut peers = Vec::new();
        let (mut moved, mut lingering) = (Vec::new(), Vec::new());
        // Whoever was there first keeps its place.
        let mut members: Vec<&Peer> = self.peers.iter().collect();
        members.sort_by_key(|peer| peer.member.created);
        let mut devices_of: BTreeMap<&OwnedUserId, usize> = BTreeMap::new();
        for peer in members {
            let member = peer.member.key();
            match (self.paths.mesh(&member), peer.member.device()) {
                (Some(_), Some(_))
                    if peers.len() >= MAX_PAIRS
                        || devices_of.get(&peer.member.user_id).is_some_and(|n| *n >= MAX_DEVICES) =>
                {
                    tracing::warn!(user_id = %member.user_id, "the mesh has too many members; this one is left out");
                }
                (Some(session), Some(device)) => {
                    *devices_of.entry(&peer.member.user_id).or_default() += 1;
                    if !matches!(self.paths.now(&member), Path::Mesh(_)) {
                        lingering.push(member.clone());
                    }
                    peers.push(MeshPeer { member, device, session: session.clone() });
                }
                _ => moved.push(member),
            }
        }
        let input = SignallingInput::Peers { peers, moved: &moved, lingering: &lingering };
        signalling.handle(now.instant, input);
        self.drain_signalling(now);
    }

    /// Performs what the pairs ask for; returns when they have something to do next.
    pub(super) fn drain_signalling(&mut self, now: Now) -> Option<Instant> {
        loop {
            let signalling = self.signalling.as_mut()?;
            let Some(output) = signalling.poll(now.instant) else { return signalling.wake_at() };
            match output {
                SignallingOutput::Send { id, to, event_type, content } => {
                    let id = self.next_request(Origin::Mesh(id));
                    let event_type = event_type.to_owned();
                    let batch = ToDeviceBatch { event_type, content, recipients: vec![to] };
                    self.outputs.push_back(Output::SendToDevice { id, batch });
                }
                SignallingOutput::Open { connection, member } => {
                    let identity = self.peers.get(&member).and_then(|peer| peer.member.identities.first());
                    match identity.cloned() {
                        Some(identity) => self.outputs.push_back(Output::OpenPeer { connection, identity }),
                        None => {
                            let result = Err("the member has no identity".to_owned());
                            let opened = SignallingInput::Opened { connection, result };
                            signalling_input(&mut self.signalling, now, opened);
                        }
                    }
                }
                SignallingOutput::Negotiate { connection, command } => {
                    self.outputs.push_back(Output::Negotiate { connection, command });
                }
                SignallingOutput::Close { connection, member } => {
                    self.uplink_enough(connection, &member);
                    self.open_pairs.remove(&connection);
                    self.connected_pairs.remove(&connection);
                    self.connection_closed(now, connection);
                }
                SignallingOutput::Connected { connection, member } => {
                    self.connected_pairs.insert(connection);
                    let number = self.timeline.number(&member);
                    self.timeline.add(now.instant, Step::PairConnected { member: number });
                    if let Some(member) = self.peers.member(&member) {
                        self.tell(CallEvent::PeerConnected(member));
                    }
                }
                SignallingOutput::Failed { member, reason, failures } => {
                    let number = self.timeline.number(&member);
                    self.timeline
                        .add(now.instant, Step::PairFailed { member: number, reason: reason.clone() });
                    if let Some(member) = self.peers.member(&member) {
                        self.tell(CallEvent::PeerFailed { member, reason, failures });
                    }
                }
            }
        }
    }

    /// Our video flows to a member again, or its connection is over.
    pub(super) fn uplink_enough(&mut self, connection: ConnectionId, member: &MemberKey) {
        if self.short_pairs.remove(&connection)
            && let Some(member) = self.peers.member(member)
        {
            self.tell(CallEvent::MeshFits(member));
        }
    }

    /// A mesh connection was opened, or could not be. Our tracks are on it before its first offer.
    pub(super) fn pair_opened(
        &mut self,
        now: Now,
        connection: ConnectionId,
        result: Result<(), ConnectFailure>,
    ) {
        if self.mesh_member(connection).is_none() {
            return;
        }
        if result.is_ok() {
            self.open_pairs.insert(connection);
            self.publish_locals();
        }
        let result = result.map_err(|failure| failure.message);
        signalling_input(&mut self.signalling, now, SignallingInput::Opened { connection, result });
    }

    pub(super) fn negotiated(&mut self, now: Now, connection: ConnectionId, event: Negotiated) {
        signalling_input(&mut self.signalling, now, SignallingInput::Negotiated { connection, event });
    }

    pub(super) fn mesh_message(&mut self, now: Now, event: &ToDeviceEvent) {
        let Some(olm) = &event.olm else {
            tracing::debug!(sender = %event.sender, "signalling of the mesh that came in clear is ignored");
            return;
        };
        let Some(device_id) = olm.device_id.clone() else { return };
        if self.config.trust == TrustPolicy::CrossSigned && !olm.cross_signed {
            tracing::debug!(sender = %event.sender, "signalling of a device that is not cross-signed is ignored");
            return;
        }
        let from = Device { user_id: event.sender.clone(), device_id };
        let (event_type, content) = (event.event_type.as_str(), &event.content);
        signalling_input(
            &mut self.signalling,
            now,
            SignallingInput::Message { from: &from, event_type, content },
        );
    }

    pub(super) fn mesh_trust_changed(&mut self, now: Now, user_id: &ruma_common::UserId) {
        signalling_input(&mut self.signalling, now, SignallingInput::TrustChanged(user_id));
    }

    pub(super) fn mesh_sent(&mut self, now: Now, id: MessageId, result: Delivery) {
        signalling_input(&mut self.signalling, now, SignallingInput::Sent { id, result });
    }

    /// The member behind a current mesh connection.
    pub(super) fn mesh_member(&self, connection: ConnectionId) -> Option<&MemberKey> {
        self.signalling.as_ref()?.member_of(connection)
    }

    /// Members whose media arrives by their new path need the old one only a little longer.
    pub(super) fn settle_paths(&mut self, now: Now) {
        let arrives = |member: &MemberKey| {
            let peer = self.peers.get(member)?;
            let is_new = |connection: ConnectionId| match self.paths.now(member) {
                Path::Mesh(_) => self.connected_pairs.contains(&connection),
                Path::Focus(focus) => self.routing.goes_to(connection, focus),
                Path::None => false,
            };
            let is_heard = |track: &PeerTrack| track.from.track.muted || track.choice.carries(track.path);
            let mut heard = BTreeSet::new();
            let mut all = BTreeSet::new();
            for ((connection, _), track) in &peer.tracks {
                all.insert(&track.from.track.sid);
                if is_new(*connection) && is_heard(track) {
                    heard.insert(&track.from.track.sid);
                }
            }
            let is_mesh = matches!(self.paths.now(member), Path::Mesh(_));
            let is_up = !is_mesh
                || self
                    .connected_pairs
                    .iter()
                    .any(|connection| self.mesh_member(*connection) == Some(member));
            // The caller of a pair hangs up, so that both sides have come to the focus before.
            let may_end =
                is_mesh || self.signalling.as_ref().is_none_or(|signalling| signalling.calls(member));
            (is_up && may_end && heard == all).then(|| member.clone())
        };
        let settled: Vec<_> = self.paths.unsettled().filter_map(arrives).collect();
        for member in settled {
            self.paths.settled(now.instant, &member);
        }
    }
}

fn signalling_input(signalling: &mut Option<Signalling>, now: Now, input: SignallingInput<'_>) {
    if let Some(signalling) = signalling {
        signalling.handle(now.instant, input);
    }
}
