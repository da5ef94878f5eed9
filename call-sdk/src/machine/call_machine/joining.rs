//! From the start of a call to its end: room, discovery, our own membership.

use super::*;

impl CallMachine {
    pub(super) fn start(&mut self, now: Now) {
        if self.phase != Phase::Idle {
            return;
        }
        self.phase = Phase::Preparing;
        self.room.dirty = true;
        self.set_status(CallStatus::Joining);
        if !self.config.observe {
            self.read_support();
        }
        self.advance(now);
    }

    pub(super) fn read_support(&mut self) {
        self.support_again = None;
        self.request(Origin::Support, MatrixRequest::ReadSupport, SUPPORT_TIMEOUT);
    }

    /// What the homeserver can do, or why it did not say. Its silence is not taken for a lack of delayed events: our
    /// own membership asks again for itself.
    fn support_read(&mut self, now: Now, result: Result<MatrixReply, RequestError>) {
        let support = match result {
            Ok(MatrixReply::Support(support)) => {
                self.own.handle(now, own::Input::Support(support.clone()));
                support
            }
            Err(RequestError::LoggedOut) => {
                return self.leave(now, EndReason::Membership(own::EndReason::LoggedOut));
            }
            Err(error) if error.is_transient() && self.support_failures < SUPPORT_TRIES => {
                let wait = SUPPORT_AGAIN * 2_u32.pow(self.support_failures);
                self.support_failures += 1;
                self.support_again = Some(now.instant + wait);
                return;
            }
            Ok(_) => ServerSupport::default(),
            Err(error) => {
                tracing::warn!(%error, "the homeserver does not tell its abilities; discovery does without");
                ServerSupport::default()
            }
        };
        self.support = Some(support);
        self.run_when_ready(now);
    }

    pub(super) fn leave(&mut self, now: Now, reason: EndReason) {
        if matches!(self.phase, Phase::Leaving { .. } | Phase::Over) {
            return;
        }
        self.phase = Phase::Leaving { reason, until: now.instant + LEAVE_WITHIN };
        self.set_status(CallStatus::Leaving);
        // Leaving alone ends what we invited to.
        if self.notify.take_own_invite().is_some() && self.peers.members().is_empty() {
            self.write(Origin::Write, notify::withdrawal(&self.slot));
        }
        self.own.handle(now, own::Input::Leave);
        self.keys.handle(now, KeyInput::Leave);
        self.leave_mesh(now);
        let changes = self.peers.clear();
        self.apply(now, changes);
        self.routing.close_all();
        self.sealing.clear();
        for (track, local) in std::mem::take(&mut self.locals) {
            if !local.told {
                let result = Err("the call is over".to_owned());
                self.outputs.push_back(Output::TrackReady { track, result });
            }
        }
    }

    pub(super) fn over(&mut self) {
        if let Phase::Leaving { reason, .. } = std::mem::replace(&mut self.phase, Phase::Over) {
            self.set_status(CallStatus::Over);
            self.outputs.push_back(Output::Over(reason));
        }
    }

    pub(super) fn drain_own(&mut self, now: Now) -> Option<Instant> {
        loop {
            match self.own.poll(now) {
                own::Output::Request { id, request, timeout } => {
                    self.request(Origin::Own(id), request, timeout);
                }
                own::Output::Delegate { id, delay_id, delay, timeout } => {
                    let name = self.next_request(Origin::Own(id));
                    match self.routing.ours() {
                        Some(connection) => self.outputs.push_back(Output::Delegate {
                            id: name,
                            connection,
                            delay_id,
                            delay,
                            timeout,
                        }),
                        None => {
                            // It asks again when our focus is back.
                            let result =
                                Err(RequestError::Network { cause: "our focus is not connected".to_owned() });
                            self.requests.remove(&name);
                            self.own.handle(now, own::Input::Reply { id, result });
                        }
                    }
                }
                own::Output::Event(event) => self.own_event(now, event),
                own::Output::WaitUntil(at) => return Some(at),
                own::Output::Idle => return None,
            }
        }
    }

    pub(super) fn own_event(&mut self, now: Now, event: own::Event) {
        match event {
            own::Event::Status(status) => {
                if status == own::Status::Connected {
                    self.timeline.add(now.instant, Step::MembershipPublished);
                }
                self.refresh_status();
            }
            own::Event::ProbablyLeft(left) => self.tell(CallEvent::ProbablyLeft(left)),
            own::Event::DelayedLeaveUnavailable { reason, listed_for } => {
                self.tell(CallEvent::LeaveNotScheduled { reason, listed_for });
            }
            own::Event::LeaveDelegated => self.tell(CallEvent::LeaveDelegated),
            own::Event::DelegationFailed(error) => self.tell(CallEvent::DelegationFailed(error)),
            own::Event::Trouble { doing, error, .. } => {
                self.timeline.add(now.instant, Step::MembershipTrouble { reason: report::variant(&error) });
                self.tell(CallEvent::MembershipTrouble { doing, error });
            }
            own::Event::Recovered => self.tell(CallEvent::MembershipRecovered),
            own::Event::StickyUnsupported => {
                self.tell(CallEvent::StickyEventsUnsupported);
                self.config.mode = MembershipMode::Compatibility;
                self.member_id = None;
                self.take_identity(now);
                self.reopen_foci(now);
                if let Some(description) = self.describe() {
                    self.own.handle(now, own::Input::SetDescription(description));
                }
            }
            own::Event::MemberIdChanged(member_id) => {
                self.member_id = Some(member_id);
                self.take_identity(now);
                let session = self.own_transports().mesh;
                self.own.handle(now, own::Input::SetMeshSession(session));
                self.reopen_foci(now);
            }
            own::Event::Ended(reason) => self.leave(now, EndReason::Membership(reason)),
        }
    }

    pub(super) fn discovered(
        &mut self,
        now: Now,
        result: Result<Vec<(LiveKitFocus, NamedBy)>, ConnectFailure>,
    ) {
        match result {
            // A focus that is in use stays in use.
            Ok(foci) if self.discovered && self.foci.current().is_none() => {
                self.foci.set(foci);
                self.want_connections(now);
            }
            Ok(_) if self.discovered => {}
            Ok(foci) => {
                self.timeline.add(now.instant, Step::Discovered { foci: foci.len() });
                self.discovered = true;
                self.take_mode_for(&foci);
                self.foci.set(foci);
                self.run_when_ready(now);
            }
            Err(failure) if !self.placement.can_mesh() => self.leave(now, EndReason::NoFocus(failure)),
            // The call looks for one again.
            Err(_) if self.discovered => self.discover_later(now),
            Err(failure) => {
                tracing::info!(%failure, "no focus is found");
                self.timeline.add(now.instant, Step::Discovered { foci: 0 });
                self.discovered = true;
                self.run_when_ready(now);
            }
        }
    }

    /// A homeserver that names SFUs without an authorisation service issues their tokens itself, and those are for the
    /// merged form only.
    fn take_mode_for(&mut self, foci: &[(LiveKitFocus, NamedBy)]) {
        let needs_homeserver = !foci.is_empty() && foci.iter().all(|(focus, _)| focus.service.is_none());
        let has_sticky = self.support.as_ref().is_some_and(|support| support.sticky_events);
        if needs_homeserver && has_sticky && self.config.mode != MembershipMode::Matrix2Merged {
            tracing::info!(
                "the focus has no authorisation service: the membership is written in the merged form"
            );
            self.config.mode = MembershipMode::Matrix2Merged;
        }
    }

    pub(super) fn room_read(&mut self, now: Now, result: Result<Arc<RoomView>, String>) {
        self.room.reading = false;
        let view = match result {
            Ok(view) => view,
            Err(error) => {
                self.room.failures = self.room.failures.saturating_add(1);
                let wait = READ_AGAIN.saturating_mul(1 << self.room.failures.min(5)).min(READ_AGAIN_MAX);
                tracing::warn!(error, "the room could not be read; it is read again");
                self.room.read_again = Some(now.instant + wait);
                return;
            }
        };
        self.room.failures = 0;
        if matches!(self.phase, Phase::Leaving { .. }) {
            return;
        }
        if !self.room.known {
            self.room.known = true;
            if self.config.slot.is_none() {
                let slot = choose_slot(now, &view);
                if slot != self.slot {
                    self.slot = slot;
                    self.roster = Roster::new(self.slot.clone());
                    let rng = Box::new(fork(&mut self.rng));
                    self.keys = media_keys(&self.config, self.slot.clone(), rng);
                }
            }
        }
        self.room.version.clone_from(&view.version);
        self.set_encrypted(now, view.encrypted);
        if matches!(self.phase, Phase::Leaving { .. }) {
            return;
        }
        self.check_presence(now, &view);
        self.joined_users.clone_from(&view.joined);
        let change = self.roster.update(now, &view);
        let step = Step::RoomRead { encrypted: self.room.encrypted, members: self.roster.members().len() };
        if self.phase == Phase::Preparing {
            self.timeline.add(now.instant, step);
        }
        self.own_seen(now, &view);
        self.members_changed(now, change);
        self.run_when_ready(now);
    }

    /// Encryption may be switched on during a call, and never off.
    pub(super) fn set_encrypted(&mut self, now: Now, encrypted: bool) {
        if !encrypted && self.config.encryption == EncryptionPolicy::Required && !self.room.encrypted {
            self.leave(now, EndReason::NotEncrypted);
            return;
        }
        if !encrypted || self.room.encrypted {
            return;
        }
        self.room.encrypted = true;
        self.sealing.enable();
        if self.phase == Phase::Preparing {
            return;
        }
        self.tell(CallEvent::EncryptionEnabled);
        // The event of a slot in an encrypted room has to name the encryption; without it no sticky member counts.
        if self.config.mode.form() == MembershipForm::Sticky && !self.config.observe {
            self.open_slot(now);
        }
        // Peers are told by TrackInfo that these tracks are encrypted, so they are published again.
        for (track, local) in &mut self.locals {
            for connection in std::mem::take(&mut local.on) {
                self.outputs.push_back(Output::Unpublish { connection, track: *track });
            }
        }
        self.publish_locals();
        self.tell_keys(now);
    }

    pub(super) fn check_presence(&mut self, now: Now, view: &RoomView) {
        if self.config.observe || view.joined.contains(&self.config.device.user_id) {
            self.room.absent_since = None;
            return;
        }
        let since = *self.room.absent_since.get_or_insert(now.instant);
        if now.instant.saturating_duration_since(since) >= NOT_IN_ROOM_AFTER {
            self.leave(now, EndReason::NotInRoom);
        } else {
            self.room.read_again = Some(since + NOT_IN_ROOM_AFTER);
        }
    }

    pub(super) fn own_seen(&mut self, now: Now, view: &RoomView) {
        if self.config.observe {
            return;
        }
        if !self.own.may_be_listed() {
            self.own.handle(now, own::Input::LeftBehind(self.left_behind(view)));
        }
        self.own_event_id = self.own.event_id().map(ToOwned::to_owned);
        if let Some(input) = self.own.sighting(&view.members, self.roster.members()) {
            if matches!(input, own::Input::OwnSeen(own::OwnSighting::Listed { .. })) {
                self.invite_once(now);
            }
            self.own.handle(now, input);
        }
        // State members count in a closed slot, too.
        let just_opened =
            self.slot_opened.is_some_and(|at| now.instant.saturating_duration_since(at) < SLOT_SHOWN_AFTER);
        if self.roster.slot_status() == SlotStatus::Closed
            && self.config.mode.form() == MembershipForm::Sticky
            && self.own.status() == own::Status::Connected
            && !just_opened
        {
            self.own.handle(now, own::Input::SlotClosed);
        }
    }

    /// The content under our state key.
    fn left_behind(&self, view: &RoomView) -> Option<serde_json::Value> {
        let Device { user_id, device_id } = &self.config.device;
        let key = wire::state_key(user_id, device_id, &self.slot, &self.room.version);
        let event = view.members.iter().find(|event| {
            event.form == MembershipForm::State && event.state_key.as_deref() == Some(key.as_str())
        });
        event.map(|event| event.content.clone())
    }

    /// The first one in a call invites the others, once.
    fn invite_once(&mut self, now: Now) {
        if !std::mem::replace(&mut self.invited, true) {
            let alone = self.roster.members().iter().all(|member| self.is_us(member));
            if let Some(attention) = self.config.invite.filter(|_| alone) {
                self.invite(now, attention);
            }
        }
    }

    /// Starts to run once the room is read and the foci are known.
    pub(super) fn run_when_ready(&mut self, now: Now) {
        if self.phase != Phase::Preparing || !self.room.known {
            return;
        }
        if self.config.observe {
            self.phase = Phase::Running;
            self.refresh_status();
            return;
        }
        if self.support.is_none() {
            return;
        }
        if !std::mem::replace(&mut self.discovering, true) {
            self.discover();
        }
        if !self.discovered {
            return;
        }
        self.phase = Phase::Running;
        // Merged MSC4143 knows no call without an open slot. Without the power to write it the call goes on: deployed
        // readers take a missing slot for an open one.
        if self.config.mode.form() == MembershipForm::Sticky && self.roster.slot_status() != SlotStatus::Open
        {
            self.open_slot(now);
        }
        self.take_identity(now);
        self.replan(now);
        self.want_connections(now);
        for (slot, members) in self.roster.other_slots().to_vec() {
            self.tell(CallEvent::OtherCall { slot, members });
        }
    }

    /// Looks for the foci that we may publish to.
    pub(super) fn discover(&mut self) {
        let Some(support) = self.support.clone() else { return };
        let members = self.roster.members().iter().filter(|member| !self.is_us(member)).cloned().collect();
        self.outputs.push_back(Output::Discover { support, members });
    }

    /// Takes in a token of our focus. A membership that is already published follows it.
    pub(super) fn own_granted(&mut self, now: Now, grant: Grant) {
        self.own_grant = Some(grant);
        if let Some(description) = self.describe() {
            self.own.handle(now, own::Input::SetDescription(description));
        }
    }

    /// Opens every focus anew: tokens are for the identity of before.
    fn reopen_foci(&mut self, now: Now) {
        self.focus.down(now.instant, 0);
        self.routing.reopen_all(now.instant);
    }

    /// Writes that our slot is open, for the room as it is now.
    fn open_slot(&mut self, now: Now) {
        self.slot_opened = Some(now.instant);
        self.write(Origin::Write, slots::open(&self.slot, self.room.encrypted));
    }

    /// Publishes our membership once our focus has given us a token, or the call runs as a mesh: before that nobody
    /// could hear us.
    pub(super) fn join_when_ready(&mut self, now: Now) {
        let is_reachable = match self.placement.place() {
            Some(Place::Focus) => self.own_grant.is_some(),
            Some(Place::Mesh(_)) => true,
            None => false,
        };
        if self.phase == Phase::Running
            && is_reachable
            && self.own.status() == own::Status::Disconnected
            && let Some(description) = self.describe()
        {
            self.own.handle(now, own::Input::Join(description));
        }
    }

    /// Takes a membership id for the mode, and makes our keys for it.
    fn take_identity(&mut self, now: Now) {
        let member_id = match (&self.member_id, self.config.mode.form()) {
            (Some(member_id), _) => member_id.clone(),
            (None, MembershipForm::Sticky) => self.own.fresh_member_id(),
            (None, MembershipForm::State) => {
                let Device { user_id, device_id } = &self.config.device;
                MemberId::of_state_member(user_id, device_id)
            }
        };
        let is_new = self.member_id.replace(member_id.clone()).is_none() || self.signalling.is_none();
        if is_new || self.config.mode.form() == MembershipForm::Sticky {
            self.start_mesh(now);
        }
        self.own_grant = None;
        self.keys.handle(now, KeyInput::Join { member_id });
        self.tell_keys(now);
    }

    pub(super) fn tell_keys(&mut self, now: Now) {
        let members = self.roster.members();
        self.keys.handle(now, KeyInput::Members { members, joined: &self.joined_users });
    }

    /// Our membership as it is to be written now.
    ///
    /// In the sticky forms the token decides two things. Its SFU is named beside the authorisation service. And without
    /// an endpoint at the homeserver, the merged mode gets its token from the service, which derives the identity the
    /// older way; the entry then has to be of the older type, because readers derive the identity from the type.
    pub(super) fn describe(&self) -> Option<OwnDescription> {
        let member_id = self.member_id.clone()?;
        let (mut mode, mut transports) = (self.config.mode, self.own_transports());
        if transports == OwnTransports::default() {
            return None;
        }
        if mode.form() == MembershipForm::Sticky
            && let (Some(grant), Some(focus)) = (&self.own_grant, &mut transports.focus)
        {
            if grant.identity != ParticipantIdentity::of_member(&self.config.device.user_id, &member_id) {
                mode = MembershipMode::Matrix2;
            }
            focus.sfu.get_or_insert_with(|| grant.sfu.clone());
        }
        Some(OwnDescription {
            device: self.config.device.clone(),
            room_id: self.config.room_id.clone(),
            room_version: self.room.version.clone(),
            slot: self.slot.clone(),
            mode,
            member_id,
            transports,
            intent: self.config.intent.clone(),
        })
    }

    pub(super) fn matrix_done(&mut self, now: Now, id: RequestId, result: Result<MatrixReply, RequestError>) {
        match self.requests.remove(&id) {
            Some(Origin::Support) => self.support_read(now, result),
            Some(Origin::Own(id)) => self.own.handle(now, own::Input::Reply { id, result }),
            Some(Origin::Invite) => {
                if let Ok(MatrixReply::Sent { event_id }) = result {
                    self.notify.own_invite_sent(event_id);
                }
            }
            Some(Origin::Hand) => {
                if let Ok(MatrixReply::Sent { event_id }) = result {
                    self.notify.own_hand_sent(event_id);
                }
            }
            Some(Origin::Write) => {
                if let Err(error) = result {
                    tracing::warn!(%error, "an event of the call was not sent");
                }
            }
            Some(Origin::Keys(_) | Origin::Mesh(_)) | None => {}
        }
    }

    pub(super) fn refresh_status(&mut self) {
        if self.phase != Phase::Running {
            return;
        }
        let in_call = self.config.observe || self.own.status() == own::Status::Connected;
        let is_mesh = self.placement.is_mesh();
        let connected = self.config.observe || is_mesh || self.routing.ours().is_some();
        let status = match (in_call, connected, self.status) {
            (true, true, _) => CallStatus::Joined,
            (_, _, CallStatus::Joining) => CallStatus::Joining,
            _ => CallStatus::Reconnecting,
        };
        self.set_status(status);
    }

    pub(super) fn set_status(&mut self, status: CallStatus) {
        if self.status != status || status == CallStatus::Joining {
            self.status = status;
            self.outputs.push_back(Output::Status(status));
        }
    }
}
