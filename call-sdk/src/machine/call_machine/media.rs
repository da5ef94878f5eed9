//! Connections, tracks and members.

use super::*;

impl CallMachine {
    pub(super) fn route(&mut self, now: Now, output: RouteOutput) {
        match output {
            RouteOutput::Access { connection, wanted } => {
                let Some(member_id) = self.member_id.clone() else { return };
                let access = AccessWanted::new(wanted, self.slot.clone(), member_id, self.config.mode);
                self.outputs.push_back(Output::Access { connection, access });
            }
            RouteOutput::Connect { connection } => self.outputs.push_back(Output::Connect { connection }),
            RouteOutput::Close { connection } => self.connection_closed(now, connection),
            RouteOutput::Failed { focus, ours, failure, failures } => {
                let reason = report::variant(&failure.kind);
                let step = Step::ConnectionFailed { focus: report::host(&focus), reason };
                self.timeline.add(now.instant, step);
                if ours {
                    self.own_focus_failed(now, &failure, failures);
                }
                self.tell(CallEvent::FocusFailed { focus, ours, failure });
            }
        }
    }

    /// Nothing comes by a connection any more, and nothing goes.
    pub(super) fn connection_closed(&mut self, now: Now, connection: ConnectionId) {
        self.peers.connection_ended(connection);
        self.declined.retain(|(of, _)| *of != connection);
        self.rematch(now);
        for (track, local) in &mut self.locals {
            local.wishes.forget(connection);
            if local.on.remove(&connection) {
                self.outputs.push_back(Output::Unpublish { connection, track: *track });
            }
        }
        self.tell_wishes();
        self.outputs.push_back(Output::Close { connection });
        self.refresh_status();
    }

    /// Tells the encoders what their connections ask of them, if it is new.
    fn tell_wishes(&mut self) {
        let mut events = Vec::new();
        for (track, local) in &mut self.locals {
            let track = *track;
            let is_layered = local.spec.layers.len() > 1;
            if let Some(bits_per_second) = local.wishes.new_target(is_layered, &self.short_pairs) {
                events.push(CallEvent::TargetBitrate { track, bits_per_second });
            }
            if let Some(layers) = local.wishes.new_layers(&local.on) {
                events.push(CallEvent::LayersWanted { track, layers });
            }
        }
        for event in events {
            self.tell(event);
        }
    }

    pub(super) fn own_focus_failed(&mut self, now: Now, failure: &ConnectFailure, failures: u32) {
        self.focus.down(now.instant, failures);
        match self.foci.failed(failure, failures) {
            Verdict::Stay => {}
            Verdict::Moved => {
                self.own_grant = None;
                self.focus.another();
                self.want_connections(now);
                if let Some(focus) = self.foci.current().cloned() {
                    let transports = self.own_transports();
                    self.own.handle(now, own::Input::SetTransports(transports));
                    self.tell(CallEvent::FocusChanged(focus));
                }
            }
            // Once joined the refusal may be withdrawn: the operator is repairing something.
            Verdict::NoneLeft if self.status != CallStatus::Joining => {}
            Verdict::NoneLeft => self.leave(now, EndReason::NoFocus(failure.clone())),
        }
    }

    pub(super) fn connection_failed(&mut self, now: Now, connection: ConnectionId, failure: ConnectFailure) {
        self.routing.failed(now.instant, connection, failure);
    }

    pub(super) fn connected(&mut self, now: Now, connection: ConnectionId) {
        self.routing.connected(now.instant, connection);
        let Some(focus) = self.routing.focus_of(connection).cloned() else { return };
        self.timeline
            .add(now.instant, stage(connection, Some(&focus), crate::transport::ConnectStage::Signalled));
        if self.routing.ours() == Some(connection) {
            self.foci.works();
            self.focus.up(now.instant);
            if self.config.delegate_leave && !self.placement.is_mesh() {
                self.own.handle(now, own::Input::OfferDelegation);
            }
        }
        self.tell(CallEvent::Connected(focus));
        self.publish_locals();
        self.rematch(now);
        self.refresh_status();
    }

    pub(super) fn publish_locals(&mut self) {
        let encrypted = self.sealing.is_encrypted();
        let carriers: Vec<_> =
            self.routing.ours().into_iter().chain(self.open_pairs.iter().copied()).collect();
        // In a mesh there may be nobody yet.
        let is_live = self.placement.is_mesh();
        for (track, local) in &mut self.locals {
            for connection in carriers.iter().copied() {
                if local.on.insert(connection) {
                    let spec = TrackSpec { muted: local.muted, ..local.spec.clone() };
                    self.outputs.push_back(Output::Publish { connection, track: *track, spec, encrypted });
                }
            }
            if is_live && !std::mem::replace(&mut local.told, true) {
                self.outputs.push_back(Output::TrackReady { track: *track, result: Ok(()) });
            }
        }
    }

    pub(super) fn published(
        &mut self,
        connection: ConnectionId,
        track: LocalTrackId,
        result: Result<(), PublishFailure>,
    ) {
        let Some(local) = self.locals.get_mut(&track).filter(|local| local.on.contains(&connection)) else {
            return;
        };
        match result {
            Ok(()) => {
                if !std::mem::replace(&mut local.told, true) {
                    self.outputs.push_back(Output::TrackReady { track, result: Ok(()) });
                }
            }
            // The connection is about to be reported as lost; the track moves to the next one.
            Err(PublishFailure::Closed) => {}
            Err(PublishFailure::Refused(reason)) if connection.is_mesh() => {
                tracing::warn!(reason, "a mesh peer does not take a track of ours");
            }
            Err(PublishFailure::Refused(reason)) => {
                let told = local.told;
                self.end_local(track);
                if told {
                    self.tell(CallEvent::LocalTrackEnded { track, reason });
                } else {
                    self.outputs.push_back(Output::TrackReady { track, result: Err(reason) });
                }
            }
        }
    }

    pub(super) fn send_data(
        &mut self,
        reliability: crate::transport::Reliability,
        to: &[MemberKey],
        message: crate::transport::UserData,
    ) {
        let is_meant = |key: &MemberKey| to.is_empty() || to.contains(key);
        // A member that moves is told by both paths.
        let by_focus = |key: &MemberKey| self.paths.of(key).any(|path| matches!(path, Path::Focus(_)));
        for connection in self.open_pairs.iter().copied() {
            if self.mesh_member(connection).is_some_and(is_meant) {
                let (destinations, message) = (Vec::new(), message.clone());
                self.outputs.push_back(Output::SendData { connection, reliability, destinations, message });
            }
        }
        // Every other member hears us on our own focus.
        let Some(connection) = self.routing.ours() else { return };
        let listeners: Vec<_> = self
            .peers
            .iter()
            .filter(|peer| is_meant(&peer.member.key()) && by_focus(&peer.member.key()))
            .collect();
        if listeners.is_empty() {
            return;
        }
        let destinations = if to.is_empty() {
            Vec::new()
        } else {
            // On our focus a member of another one may have any of its identities.
            listeners.iter().flat_map(|peer| peer.member.identities.iter().cloned()).collect()
        };
        self.outputs.push_back(Output::SendData { connection, reliability, destinations, message });
    }

    pub(super) fn members_changed(&mut self, now: Now, change: Change) {
        let others: Vec<Member> =
            self.roster.members().iter().filter(|member| !self.is_us(member)).cloned().collect();
        let ways = (&self.routing, &self.paths, &self.signalling);
        let changes = self
            .peers
            .set_members(now.instant, &others, |connection, member| carries(ways, connection, member));
        let changed = !changes.is_empty();
        self.apply(now, changes);
        self.update_paths(now);
        if changed || !change.is_empty() {
            self.outputs.push_back(Output::Members(Arc::new(others.clone())));
        }
        self.notify.members(&others);
        self.tell_keys(now);
        self.want_connections(now);
    }

    pub(super) fn want_connections(&mut self, now: Now) {
        if self.phase != Phase::Running || self.config.observe {
            return;
        }
        let mut wanted = Vec::new();
        let uses_focus = self.placement.wants_focus(self.call_size()) || self.focus.leaves_at.is_some();
        if let (Some(focus), Some(named_by)) = (self.foci.current(), self.foci.named_by())
            && uses_focus
        {
            wanted.push(Wanted { focus: focus.clone(), ours: true, named_by: named_by.clone() });
        }
        for peer in self.peers.iter() {
            for path in self.paths.of(&peer.member.key()) {
                let Path::Focus(focus) = path else { continue };
                let user_id = peer.member.user_id.clone();
                match wanted.iter_mut().find(|known: &&mut Wanted| known.focus.is_same_as(focus)) {
                    None => {
                        let named_by = NamedBy::Members(vec![user_id]);
                        wanted.push(Wanted { focus: focus.clone(), ours: false, named_by });
                    }
                    Some(Wanted { named_by: NamedBy::Members(users), .. }) if users.len() < MAX_NAMERS => {
                        users.push(user_id);
                    }
                    Some(_) => {}
                }
            }
        }
        self.routing.want(now.instant, wanted);
    }

    pub(super) fn rematch(&mut self, now: Now) {
        let ways = (&self.routing, &self.paths, &self.signalling);
        let changes = self.peers.rematch(now.instant, |connection, member| carries(ways, connection, member));
        self.apply(now, changes);
        self.decline_superfluous();
    }

    /// Tells SFUs not to send us what comes by another path.
    fn decline_superfluous(&mut self) {
        let ways = (&self.routing, &self.paths, &self.signalling);
        let mut superfluous = BTreeSet::new();
        for connection in self.routing.open() {
            let sids =
                self.peers.superfluous(connection, |connection, member| carries(ways, connection, member));
            superfluous.extend(sids.into_iter().map(|sid| (connection, sid)));
        }
        let before = std::mem::replace(&mut self.declined, superfluous);
        for (connection, sid) in self.declined.difference(&before).cloned() {
            let subscription = Subscription { enabled: false, ..Subscription::default() };
            self.outputs.push_back(Output::Subscribe { connection, sid, subscription });
        }
        for (connection, sid) in before.difference(&self.declined).cloned() {
            if self.routing.is_current(connection) {
                let wish = self.peers.iter().find_map(|peer| {
                    let shown = &peer.tracks.get(&(connection, sid.clone()))?.from.track.sid;
                    peer.subscriptions.get(shown).cloned()
                });
                let subscription = wish.unwrap_or_default();
                self.outputs.push_back(Output::Subscribe { connection, sid, subscription });
            }
        }
    }

    pub(super) fn apply(&mut self, now: Now, changes: Vec<PeerChange>) {
        let tracks_changed = changes.iter().any(|change| {
            !matches!(change, PeerChange::Joined(_) | PeerChange::Updated(_) | PeerChange::Left(_))
        });
        for change in changes {
            match change {
                PeerChange::Joined(member) => {
                    let number = self.timeline.number(&member.key());
                    let form = match member.form {
                        crate::member::MembershipForm::State => "state",
                        crate::member::MembershipForm::Sticky => "sticky",
                    };
                    self.timeline.add(now.instant, Step::MemberJoined { member: number, form });
                    self.tell(CallEvent::MemberJoined(member));
                }
                PeerChange::Updated(member) => self.tell(CallEvent::MemberUpdated(member)),
                PeerChange::Left(member) => {
                    let number = self.timeline.number(&member.key());
                    self.timeline.add(now.instant, Step::MemberLeft { member: number });
                    self.notify.left(&member.key());
                    self.tell(CallEvent::MemberLeft(member));
                }
                PeerChange::TrackBegins { connection, sid, route, subscription, new } => {
                    let member = self.timeline.number(&route.from.member.key());
                    let source = format!("{:?}", route.from.track.source);
                    self.timeline.add(now.instant, Step::Track { member, source });
                    let event = CallEvent::TrackPublished {
                        member: route.from.member.clone(),
                        track: route.from.track.clone(),
                    };
                    if new {
                        self.tell(event);
                    }
                    self.outputs.push_back(Output::Attach { connection, sid: sid.clone(), route });
                    if let Some(subscription) = subscription {
                        self.outputs.push_back(Output::Subscribe { connection, sid, subscription });
                    }
                }
                PeerChange::TrackChanged { connection, sid, route } => {
                    let event = CallEvent::TrackUpdated {
                        member: route.from.member.clone(),
                        track: route.from.track.clone(),
                    };
                    self.outputs.push_back(Output::Reroute { connection, sid, route });
                    self.tell(event);
                }
                PeerChange::TrackEnds { connection, sid, member, over } => {
                    self.outputs.push_back(Output::Detach { connection, sid });
                    if let Some(sid) = over {
                        self.tell(CallEvent::TrackEnded { member, sid });
                    }
                }
            }
        }
        if tracks_changed {
            let of_peer = |peer: &Peer| {
                let track = |track: &PeerTrack| (Arc::clone(&track.from), Arc::clone(&track.counters));
                peer.shown_tracks().map(track).collect::<Vec<_>>()
            };
            let tracks = self.peers.iter().flat_map(of_peer).collect();
            self.outputs.push_back(Output::Tracks(Arc::new(tracks)));
        }
    }

    pub(super) fn transport_event(&mut self, now: Now, connection: ConnectionId, event: TransportEvent) {
        let is_current = if connection.is_mesh() {
            self.mesh_member(connection).is_some()
        } else {
            self.routing.is_current(connection)
        };
        if !is_current {
            return;
        }
        let focus = self.routing.focus_of(connection).cloned();
        let is_ours = self.routing.is_ours(connection);
        match event {
            TransportEvent::Stage(reached) => {
                self.timeline.add(now.instant, stage(connection, focus.as_ref(), reached));
                if is_ours && reached == crate::transport::ConnectStage::MediaUp {
                    self.focus.media_up(now.instant);
                }
            }
            TransportEvent::MediaBlocked { tried } => {
                if is_ours {
                    self.focus.blocked(now.instant);
                }
                if let Some(focus) = focus {
                    self.tell(CallEvent::MediaBlocked { focus, tried });
                }
            }
            TransportEvent::ParticipantJoined { identity } => {
                self.peers.participant(now.instant, connection, &identity, None);
            }
            TransportEvent::ParticipantLeft { identity } => {
                self.peers.participant_left(connection, &identity);
                self.rematch(now);
            }
            TransportEvent::TrackUpdated { identity, track } => {
                self.peers.participant(now.instant, connection, &identity, Some(track));
                self.rematch(now);
            }
            TransportEvent::TrackEnded { identity, sid } => {
                self.peers.track_ended(connection, &identity, &sid);
                self.rematch(now);
            }
            TransportEvent::KeyFrameRequested { track, layer } => {
                self.tell(CallEvent::KeyFrameRequested { track, layer });
            }
            TransportEvent::LocalTrackEnded { track, reason } => {
                if is_ours && self.locals.get(&track).is_some_and(|local| local.on.contains(&connection)) {
                    self.end_local(track);
                    self.tell(CallEvent::LocalTrackEnded { track, reason });
                }
            }
            TransportEvent::LayersWanted { track, layers } => {
                if let Some(local) = self.locals.get_mut(&track) {
                    local.wishes.wants(connection, layers);
                    self.tell_wishes();
                }
            }
            TransportEvent::TargetBitrate { track, bits_per_second } => {
                if let Some(local) = self.locals.get_mut(&track) {
                    local.wishes.carries(connection, bits_per_second);
                    self.tell_wishes();
                }
            }
            TransportEvent::StreamPaused { sid, paused } => {
                if let Some(known) = self.peers.track(connection, &sid) {
                    let (member, sid) = (known.member.clone(), known.track.sid.clone());
                    self.tell(CallEvent::StreamPaused { member, sid, paused });
                }
            }
            TransportEvent::Speakers(speakers) => {
                let ways = (&self.routing, &self.paths, &self.signalling);
                let speakers = speakers
                    .into_iter()
                    .filter_map(|speaker| {
                        let peer =
                            self.peers.member_of(connection, &speaker.identity, |connection, member| {
                                carries(ways, connection, member)
                            })?;
                        Some((peer.member.clone(), speaker.level))
                    })
                    .collect();
                self.tell(CallEvent::Speakers(speakers));
            }
            TransportEvent::Quality { identity, quality } => {
                let ways = (&self.routing, &self.paths, &self.signalling);
                let peer = self
                    .peers
                    .member_of(connection, &identity, |connection, member| carries(ways, connection, member));
                let member = peer.map(|peer| peer.member.clone());
                // A participant who is nobody's may be us.
                if member.is_some() || self.describe().is_some_and(|own| own.identity() == identity) {
                    self.tell(CallEvent::Quality { member, quality });
                }
            }
            TransportEvent::Data { identity, reliability, body } => {
                self.data(connection, &identity, reliability, body);
            }
            TransportEvent::UplinkShort { bits_per_second, needed } => {
                self.short_pairs.insert(connection);
                self.tell_wishes();
                if let Some(member) = self.mesh_member(connection).and_then(|key| self.peers.member(key)) {
                    self.tell(CallEvent::MeshTooLarge { member, bits_per_second, needed });
                }
            }
            TransportEvent::UplinkEnough => {
                if let Some(member) = self.mesh_member(connection).cloned() {
                    self.uplink_enough(connection, &member);
                }
            }
            TransportEvent::Negotiated(event) => self.negotiated(now, connection, event),
            TransportEvent::Reconnecting => {
                if is_ours {
                    self.focus.down(now.instant, 0);
                }
                self.tell_of(focus, CallEvent::Reconnecting);
            }
            TransportEvent::Reconnected => {
                if is_ours {
                    self.focus.up(now.instant);
                }
                self.tell_of(focus, CallEvent::Connected);
            }
            TransportEvent::Disconnected(reason) if connection.is_mesh() => {
                self.negotiated(now, connection, Negotiated::Failed(reason.to_string()));
            }
            TransportEvent::Disconnected(reason) => self.disconnected(now, connection, reason),
        }
    }

    fn tell_of(&mut self, focus: Option<LiveKitFocus>, event: impl FnOnce(LiveKitFocus) -> CallEvent) {
        if let Some(focus) = focus {
            self.tell(event(focus));
        }
    }

    /// Takes a local track from every connection that carries it.
    fn end_local(&mut self, track: LocalTrackId) {
        for connection in self.locals.remove(&track).map(|local| local.on).unwrap_or_default() {
            self.outputs.push_back(Output::Unpublish { connection, track });
        }
    }

    pub(super) fn disconnected(
        &mut self,
        now: Now,
        connection: ConnectionId,
        reason: crate::transport::DisconnectReason,
    ) {
        use crate::transport::DisconnectReason;
        if let DisconnectReason::DuplicateIdentity = reason
            && self.routing.ours() == Some(connection)
        {
            return self.leave(now, EndReason::Replaced(reason));
        }
        let failure = ConnectFailure::new(ConnectFailureKind::Lost, reason.to_string());
        self.connection_failed(now, connection, failure);
    }

    pub(super) fn data(
        &mut self,
        connection: ConnectionId,
        identity: &crate::member::ParticipantIdentity,
        reliability: crate::transport::Reliability,
        body: DataBody,
    ) {
        let ways = (&self.routing, &self.paths, &self.signalling);
        let carries = |connection, member: &Member| carries(ways, connection, member);
        let Some(peer) = self.peers.member_of(connection, identity, carries) else { return };
        let member = peer.member.clone();
        match body {
            DataBody::Plain(message) => {
                // In an encrypted call nobody vouches for it.
                if !self.sealing.is_encrypted() {
                    self.tell(CallEvent::Data { member, reliability, message });
                }
            }
            body @ DataBody::Sealed(_) => {
                let packet = DataPacket { reliability, destinations: Vec::new(), body };
                let ring = peer.ring.clone();
                self.outputs.push_back(Output::OpenData { member, ring, packet });
            }
        }
    }

    /// What time alone brings: reports about tracks and strangers, healing, old keys.
    pub(super) fn sweep(&mut self, now: Now) {
        for (connection, identity) in self.peers.strangers(now.instant) {
            if let Some(focus) = self.routing.focus_of(connection).cloned() {
                self.tell(CallEvent::UnknownParticipant { focus, identity });
            }
        }
        for notice in self.notify.expired(now) {
            self.notice(notice);
        }
        let begin = self.timeline.begin();
        let mut silent = Vec::new();
        for peer in self.peers.iter_mut() {
            peer.ring.retire(now.instant);
            for track in peer.tracks.values_mut() {
                let sid = track.from.track.sid.clone();
                let stats = track.counters.read();
                let last = stats.last_opened_at(begin).unwrap_or(track.since).max(track.since);
                if track.from.track.muted || now.instant.saturating_duration_since(last) < NO_MEDIA_AFTER {
                    track.reported &= track.from.track.muted;
                    continue;
                }
                // Silence of a microphone is often just that.
                let is_audio = track.from.track.codec.is_some_and(|codec| codec.is_audio());
                if track.reported || (is_audio && stats.opened > 0) {
                    continue;
                }
                track.reported = true;
                let arrives = stats
                    .last_received
                    .is_some_and(|at| now.instant.saturating_duration_since(begin + at) < NO_MEDIA_AFTER);
                let cause = match (arrives, stats.missing_key > 0 && stats.opened == 0) {
                    (false, _) => NoMediaCause::NothingArrives,
                    (true, true) => NoMediaCause::NoKey,
                    (true, false) => NoMediaCause::NothingOpens,
                };
                silent.push(CallEvent::NoMedia { member: peer.member.clone(), sid, cause });
            }
        }
        for event in silent {
            self.tell(event);
        }
        self.settle_paths(now);
        if self.sealing.is_encrypted() && self.phase == Phase::Running {
            self.sealing.ring().retire(now.instant);
            self.watch_keys(now);
        }
    }
}
