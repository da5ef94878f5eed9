//! The task behind a [`super::Call`]: owns the machines, performs their requests, merges their events.
#![allow(clippy::disallowed_methods, reason = "this is the shell: it owns the clock and the tasks")]

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use rand::{SeedableRng as _, rngs::StdRng};
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinSet,
};

use super::{
    CallEvent, CallOptions, LEAVE_TIMEOUT,
    connections::{Connected, Connection, Connector, retry_delay},
    outgoing::Outgoing,
    remote::{Inbound, Remote},
    stats::{Arrival, Counters},
};
use crate::{
    foci::{DelayedLeave, FocusError},
    frame_crypto::OpenError,
    matrix::{KeySendError, MatrixError, MatrixPort, MemberDevice, RoomFacts, RoomView, TrustPolicy, Update},
    media_keys::{
        inbox::{Inbox, InboxConfig, InboxOutput},
        rollout::{KeyEvent, KeyInput, KeyOutput, Rollout, SendId},
        wire::{self as key_wire, KeySender},
    },
    member::{LiveKitFocus, Member, MemberId, ParticipantIdentity},
    membership::{
        own::{Event as OwnEvent, Input, Output, OwnMembership, Reply, RequestError, RequestId, Status},
        roster::{Change, Roster},
        wire::{self, OwnDescription},
    },
    time::{Now, UnixMillis},
    transport::{MediaTransport, TransportEvent},
};

/// Media events of all foci that may wait for the shell.
const MEDIA_QUEUE: usize = 1024;
/// How often old keys are looked through.
const RETIRE_EVERY: Duration = Duration::from_secs(5);
/// How long a key message may take to go out; the rollout tries again.
const KEY_SEND_TIMEOUT: Duration = Duration::from_secs(20);
/// How long a member's media may come without its key before we ask for the key, by renewing our membership.
const KEYLESS: Duration = Duration::from_secs(10);
/// How long a goodbye to one SFU may take.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// What the application asks of its call.
#[derive(Debug)]
pub(super) enum Command {
    SetIntent(Option<String>),
    Leave(oneshot::Sender<()>),
}

/// What a finished piece of work brings back.
enum Done {
    Membership(RequestId, Result<Reply, RequestError>),
    Key(SendId, Result<Vec<MemberDevice>, KeySendError>),
    View(Result<RoomView, MatrixError>),
    Connected(LiveKitFocus, Result<Connected, String>),
}

/// All that a shell is made of.
pub(super) struct Parts {
    pub(super) port: Arc<dyn MatrixPort>,
    pub(super) connector: Arc<dyn Connector>,
    pub(super) options: CallOptions,
    pub(super) facts: RoomFacts,
    pub(super) focus: LiveKitFocus,
    pub(super) outgoing: Arc<Outgoing>,
    pub(super) stats: Arc<Counters>,
    pub(super) control: mpsc::Sender<CallEvent>,
    pub(super) frames: mpsc::Sender<CallEvent>,
    pub(super) members: watch::Sender<Vec<Member>>,
    pub(super) status: watch::Sender<Status>,
}

pub(super) struct Shell {
    parts: Parts,
    state_key: String,
    key_sender: KeySender,
    roster: Roster,
    own: OwnMembership,
    rollout: Rollout,
    inbox: Inbox,
    remote: Remote,
    connections: BTreeMap<LiveKitFocus, Connection>,
    media_tx: mpsc::Sender<(LiveKitFocus, TransportEvent)>,
    media: mpsc::Receiver<(LiveKitFocus, TransportEvent)>,
    work: JoinSet<Done>,
    view: ViewState,
    /// Since when the media of these participants has been coming without a key for it.
    keyless: HashMap<ParticipantIdentity, Instant>,
    next_retire: Instant,
    ending: Option<Ending>,
}

/// The room is read whole, one reading at a time; a change during a reading asks for another.
#[derive(Default)]
struct ViewState {
    reading: bool,
    dirty: bool,
}

struct Ending {
    reason: String,
    deadline: Instant,
    waiters: Vec<oneshot::Sender<()>>,
}

impl Shell {
    pub(super) fn new(parts: Parts) -> Self {
        let port = &parts.port;
        let state_key =
            wire::state_key(port.user_id(), port.device_id(), &parts.options.slot, &parts.facts.version);
        let (media_tx, media) = mpsc::channel(MEDIA_QUEUE);
        let mut inbox_config = InboxConfig::new(
            port.room_id().to_owned(),
            port.user_id().to_owned(),
            port.device_id().to_owned(),
        );
        inbox_config.require_cross_signed = parts.options.trust == TrustPolicy::CrossSigned;
        let inbox = Inbox::new(inbox_config);
        let key_sender = KeySender {
            room_id: port.room_id().to_owned(),
            slot: parts.options.slot.clone(),
            device_id: port.device_id().to_owned(),
            member_id: MemberId(format!("{}:{}", port.user_id(), port.device_id())),
        };
        Self {
            state_key,
            key_sender,
            roster: Roster::new(parts.options.slot.clone()),
            own: OwnMembership::new(parts.options.membership.clone()),
            rollout: Rollout::new(parts.options.keys.clone(), Box::new(StdRng::from_os_rng())),
            inbox,
            remote: Remote::default(),
            connections: BTreeMap::new(),
            media_tx,
            media,
            work: JoinSet::new(),
            view: ViewState::default(),
            keyless: HashMap::new(),
            next_retire: instant() + RETIRE_EVERY,
            ending: None,
            parts,
        }
    }

    /// Takes over a connected transport.
    pub(super) fn adopt(
        &mut self,
        focus: LiveKitFocus,
        transport: Arc<dyn MediaTransport>,
        mut events: mpsc::Receiver<TransportEvent>,
    ) {
        let tx = self.media_tx.clone();
        let of = focus.clone();
        tokio::spawn(async move {
            while let Some(event) = events.recv().await {
                if tx.send((of.clone(), event)).await.is_err() {
                    return;
                }
            }
        });
        self.connections.insert(focus, Connection::Up { transport });
    }

    pub(super) async fn run(
        mut self,
        description: OwnDescription,
        mut updates: mpsc::Receiver<Update>,
        mut commands: mpsc::Receiver<Command>,
    ) {
        self.own.handle(now(), Input::Join(description));
        if self.parts.options.delegate_leave {
            self.own.handle(now(), Input::OfferDelegation);
        }
        self.view.dirty = true;
        loop {
            let wake = self.drain();
            if self.is_over() {
                break;
            }
            tokio::select! {
                Some((focus, event)) = self.media.recv() => self.on_media(focus, event).await,
                Some(done) = self.work.join_next(), if !self.work.is_empty() => match done {
                    Ok(done) => self.on_done(done).await,
                    Err(error) => self.end(format!("a task of the call failed: {error}")),
                },
                update = updates.recv() => match update {
                    Some(Update::RoomChanged) => self.view.dirty = true,
                    Some(Update::Key(received)) => {
                        let outputs = self.inbox.receive(now(), received);
                        self.on_inbox(outputs).await;
                    }
                    None => self.end("the Matrix client is gone".to_owned()),
                },
                command = commands.recv(), if self.ending.is_none() => match command {
                    Some(Command::SetIntent(intent)) => self.own.handle(now(), Input::SetIntent(intent)),
                    Some(Command::Leave(waiter)) => {
                        self.end("left".to_owned());
                        if let Some(ending) = &mut self.ending {
                            ending.waiters.push(waiter);
                        }
                    }
                    None => self.end("the application dropped the call".to_owned()),
                },
                () = tokio::time::sleep_until(wake.into()) => self.tick().await,
            }
        }
        self.close().await;
    }

    /// Drains every machine, starts the work they ask for, and returns when to look again.
    fn drain(&mut self) -> Instant {
        let now = now();
        let mut wake = now.instant + RETIRE_EVERY;
        wake = wake.min(self.next_retire);
        loop {
            match self.own.poll(now) {
                Output::Request { id, request, timeout } => {
                    let (port, key) = (self.parts.port.clone(), self.state_key.clone());
                    self.perform(id, timeout, async move {
                        port.membership_request(&key, request, timeout).await
                    });
                }
                Output::Delegate { id, delay_id, delay, timeout } => {
                    let (port, connector) = (self.parts.port.clone(), self.parts.connector.clone());
                    let (focus, leave) = (self.parts.focus.clone(), DelayedLeave { delay_id, delay });
                    self.perform(id, timeout, async move {
                        let delegated = connector.delegate_leave(&focus, port.as_ref(), &leave).await;
                        delegated.map(|()| Reply::Done).map_err(|error| delegation_error(&error))
                    });
                }
                Output::Event(event) => self.on_own_event(event),
                Output::WaitUntil(at) => {
                    wake = wake.min(at);
                    break;
                }
                Output::Idle => break,
            }
        }
        while self.parts.facts.encrypted {
            match self.rollout.poll(now) {
                KeyOutput::Send { id, index, key, recipients } => {
                    let port = self.parts.port.clone();
                    let content = key_wire::content(&self.key_sender, index, &key, now.unix);
                    self.work.spawn(async move {
                        let sending = port.send_key(&recipients, content);
                        let result =
                            tokio::time::timeout(KEY_SEND_TIMEOUT, sending).await.unwrap_or_else(|_| {
                                let message = "the homeserver did not answer in time".to_owned();
                                Err(KeySendError { message, retry_after: None })
                            });
                        Done::Key(id, result)
                    });
                }
                KeyOutput::Use { index, key } => match self.parts.outgoing.ring.set(index, &key) {
                    Ok(()) => {
                        self.parts.outgoing.switch_to(index);
                        self.tell(CallEvent::OwnKeyInUse(index));
                    }
                    Err(error) => self.end(format!("our media key cannot be used: {error}")),
                },
                KeyOutput::Event(KeyEvent::DeliveryFailed { devices }) => {
                    self.tell(CallEvent::KeyDeliveryFailed(devices));
                }
                KeyOutput::Event(_) => {}
                KeyOutput::WaitUntil(at) => {
                    wake = wake.min(at);
                    break;
                }
                KeyOutput::Idle => break,
            }
        }
        if self.view.dirty && !self.view.reading && self.ending.is_none() {
            self.view = ViewState { reading: true, dirty: false };
            let port = self.parts.port.clone();
            self.work.spawn(async move { Done::View(port.room_view().await) });
        }
        if let Some(at) = self.roster.next_expiry() {
            wake = wake.min(now.instant + at.since(now.unix));
        }
        for connection in self.connections.values() {
            if let Connection::Waiting { until, .. } = connection {
                wake = wake.min(*until);
            }
        }
        if let Some(ending) = &self.ending {
            wake = wake.min(ending.deadline);
        }
        wake
    }

    /// Starts one request of our own membership.
    fn perform(
        &mut self,
        id: RequestId,
        timeout: Duration,
        request: impl Future<Output = Result<Reply, RequestError>> + Send + 'static,
    ) {
        self.work.spawn(async move {
            let result = tokio::time::timeout(timeout, request).await.unwrap_or(Err(RequestError::TimedOut));
            Done::Membership(id, result)
        });
    }

    async fn tick(&mut self) {
        let now = now();
        let change = self.roster.tick(now);
        if !change.is_empty() {
            self.on_change(change).await;
        }
        if now.instant >= self.next_retire {
            self.next_retire = now.instant + RETIRE_EVERY;
            self.remote.retire_keys(now.instant);
            self.parts.outgoing.ring.retire(now.instant);
        }
        // A peer that lost our membership's key delivery sends it again to a member that looks new.
        if self.keyless.values().any(|since| now.instant.saturating_duration_since(*since) >= KEYLESS) {
            self.keyless.clear();
            self.own.handle(now, Input::Renew);
        }
        self.connect_to_members(now.instant);
    }

    async fn on_done(&mut self, done: Done) {
        match done {
            Done::Membership(id, result) => self.own.handle(now(), Input::Reply { id, result }),
            Done::Key(id, Ok(undelivered)) => self.rollout.handle(now(), KeyInput::Sent { id, undelivered }),
            Done::Key(id, Err(error)) => {
                tracing::warn!(%error, "a media key was not sent");
                self.rollout.handle(now(), KeyInput::SendFailed { id, retry_after: error.retry_after });
            }
            Done::View(Ok(view)) => {
                self.view.reading = false;
                let change = self.roster.update(now(), view.events, &view.joined);
                self.on_change(change).await;
                let created = self.roster.members().iter().find(|m| self.is_us(m)).map(|m| m.created);
                self.own.handle(now(), Input::OwnSeen(created.is_some()));
                if let Some(created) = created {
                    self.own.handle(now(), Input::OwnCreated(created));
                }
            }
            Done::View(Err(error)) => {
                self.view.reading = false;
                tracing::warn!(%error, "the room could not be read; the next sync tries again");
            }
            Done::Connected(focus, result) => self.on_connected(focus, result).await,
        }
    }

    async fn on_connected(&mut self, focus: LiveKitFocus, result: Result<Connected, String>) {
        let Some(Connection::Connecting { failures }) = self.connections.get(&focus) else {
            // Nobody publishes there any more.
            if let Ok((transport, _)) = result {
                transport.close().await;
            }
            return;
        };
        match result {
            Ok((transport, events)) => {
                self.adopt(focus.clone(), transport, events);
                self.tell(CallEvent::Connected(focus));
            }
            Err(reason) => {
                let failures = failures + 1;
                let until = instant() + retry_delay(failures);
                self.connections.insert(focus.clone(), Connection::Waiting { failures, until });
                self.tell(CallEvent::FocusFailed { focus, reason });
            }
        }
    }

    async fn on_change(&mut self, change: Change) {
        let others: Vec<Member> = self.roster.members().iter().filter(|m| !self.is_us(m)).cloned().collect();
        let left: Vec<Member> = change.left.into_iter().filter(|m| !self.is_us(m)).collect();
        for member in left {
            if !others.iter().any(|m| m.identity == member.identity) {
                self.remote.forget_keys(&member.identity);
                self.keyless.remove(&member.identity);
            }
            self.tell(CallEvent::MemberLeft(member));
        }
        let joined: Vec<Member> = change.joined.into_iter().filter(|m| !self.is_us(m)).collect();
        for member in &joined {
            self.tell(CallEvent::MemberJoined(member.clone()));
            // Its tracks may have been announced before its membership.
            if let Some(focus) = &member.focus {
                for track in self.remote.tracks_of(focus, &member.identity) {
                    self.tell(CallEvent::TrackUpdated { member: member.clone(), track });
                }
            }
        }
        // Listeners may have gone; the list is still ours to keep.
        let _ = self.parts.members.send_replace(others.clone());
        let now = now();
        if self.parts.facts.encrypted {
            self.rollout.handle(now, KeyInput::Members(others.clone()));
            let outputs = self.inbox.members(now, &others);
            self.on_inbox(outputs).await;
        }
        self.connect_to_members(now.instant);
        self.disconnect_from_leavers().await;
    }

    async fn on_inbox(&mut self, outputs: Vec<InboxOutput>) {
        if !self.parts.facts.encrypted {
            return;
        }
        for output in outputs {
            match output {
                InboxOutput::Install { identity, index, key } => {
                    if let Err(error) = self.remote.ring(&identity).set(index, &key) {
                        tracing::error!(%error, "a media key cannot be used");
                        continue;
                    }
                    let Some(member) = self.member(&identity).cloned() else { continue };
                    // What came before the key was dropped, so the decoder needs a key frame to start from.
                    if let Some(focus) = &member.focus
                        && let Some(Connection::Up { transport }) = self.connections.get(focus)
                    {
                        for track in self.remote.tracks_of(focus, &identity) {
                            if track.codec.is_some_and(|c| !c.is_audio()) {
                                transport.request_key_frame(&track.sid).await;
                            }
                        }
                    }
                    self.tell(CallEvent::KeyReceived { member, index });
                }
                InboxOutput::Rejected { sender, reason } => {
                    self.tell(CallEvent::KeyRejected { sender, reason: reason.to_string() });
                }
            }
        }
    }

    fn on_own_event(&mut self, event: OwnEvent) {
        match event {
            OwnEvent::Status(status) => {
                self.parts.status.send_replace(status);
            }
            OwnEvent::ProbablyLeft(left) => self.tell(CallEvent::ProbablyLeft(left)),
            OwnEvent::DelayedLeaveUnavailable { reason } => {
                self.tell(CallEvent::DelayedLeaveUnavailable { reason });
            }
            OwnEvent::LeaveDelegated => self.tell(CallEvent::LeaveDelegated),
            OwnEvent::DelegationFailed { reason } => self.tell(CallEvent::DelegationFailed { reason }),
            OwnEvent::Fatal { message } => self.end(message),
        }
    }

    async fn on_media(&mut self, focus: LiveKitFocus, event: TransportEvent) {
        match event {
            TransportEvent::Frame { identity, sid, codec, frame } => {
                // Membership is Matrix's word; the SFU's participants are only looked up in it.
                let Some(member) = self.member_on(&focus, &identity).cloned() else {
                    self.parts.stats.unattributed();
                    return;
                };
                let now = instant();
                let from = (&focus, &identity, &sid);
                let bytes = frame.payload.len();
                let encrypted = self.parts.facts.encrypted;
                let arrival = |source| Arrival { identity: &identity, sid: &sid, source, codec, bytes };
                match self.remote.receive(now, from, codec, &frame, encrypted) {
                    Inbound::Frame { track, frame, index } => {
                        self.keyless.remove(&identity);
                        self.parts.stats.opened(now, &arrival(track.source), index);
                        let event = CallEvent::Frame { member, track, frame };
                        if self.parts.frames.try_send(event).is_err() {
                            self.parts.stats.dropped();
                        }
                    }
                    Inbound::Refused { source, reason } => {
                        if matches!(reason, OpenError::MissingKey(_)) {
                            self.keyless.entry(identity.clone()).or_insert(now);
                        }
                        if self.parts.stats.refused(&arrival(source), reason) {
                            self.tell(CallEvent::Undecryptable { member, sid, reason });
                        }
                    }
                    Inbound::Silent => {}
                }
            }
            TransportEvent::TrackUpdated { identity, track } => {
                self.remote.update_track(focus.clone(), identity.clone(), track.clone());
                if let Some(member) = self.member_on(&focus, &identity).cloned() {
                    self.tell(CallEvent::TrackUpdated { member, track });
                }
            }
            TransportEvent::TrackEnded { identity, sid } => {
                self.remote.end_track(&focus, &sid);
                if let Some(member) = self.member_on(&focus, &identity).cloned() {
                    self.tell(CallEvent::TrackEnded { member, sid });
                }
            }
            TransportEvent::KeyFrameRequested { track } => self.tell(CallEvent::KeyFrameRequested(track)),
            TransportEvent::Reconnecting => self.tell(CallEvent::Reconnecting(focus)),
            TransportEvent::Reconnected => self.tell(CallEvent::Connected(focus)),
            TransportEvent::Disconnected { reason } if focus == self.parts.focus => {
                self.end(format!("our focus is gone: {reason}"));
            }
            TransportEvent::Disconnected { reason } => {
                for (identity, sid) in self.remote.end_focus(&focus) {
                    if let Some(member) = self.member_on(&focus, &identity).cloned() {
                        self.tell(CallEvent::TrackEnded { member, sid });
                    }
                }
                let until = instant() + retry_delay(1);
                self.connections.insert(focus.clone(), Connection::Waiting { failures: 1, until });
                self.tell(CallEvent::FocusFailed { focus, reason });
            }
            TransportEvent::ParticipantJoined { .. } | TransportEvent::ParticipantLeft { .. } => {}
        }
    }

    /// Starts a connection to every focus that a member publishes to and that has none.
    fn connect_to_members(&mut self, now: Instant) {
        if self.ending.is_some() {
            return;
        }
        let wanted: Vec<LiveKitFocus> =
            self.roster.members().iter().filter_map(|m| m.focus.clone()).collect();
        for focus in wanted {
            let failures = match self.connections.get(&focus) {
                None => 0,
                Some(Connection::Waiting { failures, until }) if *until <= now => *failures,
                Some(_) => continue,
            };
            self.connections.insert(focus.clone(), Connection::Connecting { failures });
            let (port, connector) = (self.parts.port.clone(), self.parts.connector.clone());
            self.work.spawn(async move {
                let result = connector.connect(&focus, port.as_ref()).await;
                Done::Connected(focus, result.map_err(|e| describe(&e)))
            });
        }
    }

    /// Ends the connections that no member needs any more; our own stays.
    async fn disconnect_from_leavers(&mut self) {
        let needed = |focus: &LiveKitFocus| {
            *focus == self.parts.focus
                || self.roster.members().iter().any(|m| m.focus.as_ref() == Some(focus))
        };
        let idle: Vec<LiveKitFocus> = self.connections.keys().filter(|f| !needed(f)).cloned().collect();
        for focus in idle {
            if let Some(Connection::Up { transport }) = self.connections.remove(&focus) {
                let _ = tokio::time::timeout(CLOSE_TIMEOUT, transport.close()).await;
            }
            self.remote.end_focus(&focus);
        }
    }

    fn member(&self, identity: &ParticipantIdentity) -> Option<&Member> {
        self.roster.members().iter().find(|m| m.identity == *identity && !self.is_us(m))
    }

    /// The member behind a participant of a focus: its identity, on the focus that it publishes to.
    fn member_on(&self, focus: &LiveKitFocus, identity: &ParticipantIdentity) -> Option<&Member> {
        self.member(identity).filter(|m| m.focus.as_ref() == Some(focus))
    }

    fn is_us(&self, member: &Member) -> bool {
        member.user_id == self.parts.port.user_id() && member.device_id == self.parts.port.device_id()
    }

    fn tell(&mut self, event: CallEvent) {
        match self.parts.control.try_send(event) {
            Ok(()) => {}
            Err(mpsc::error::TrySendError::Full(_)) => {
                self.end("the application has stopped reading the call's events".to_owned());
            }
            // The application dropped its events but keeps the call: it only sends.
            Err(mpsc::error::TrySendError::Closed(_)) => {}
        }
    }

    fn end(&mut self, reason: String) {
        if self.ending.is_some() {
            return;
        }
        self.own.handle(now(), Input::Leave);
        let deadline = instant() + LEAVE_TIMEOUT;
        self.ending = Some(Ending { reason, deadline, waiters: Vec::new() });
    }

    fn is_over(&self) -> bool {
        self.ending.as_ref().is_some_and(|ending| {
            *self.parts.status.borrow() == Status::Disconnected || instant() >= ending.deadline
        })
    }

    async fn close(mut self) {
        for (_, connection) in std::mem::take(&mut self.connections) {
            if let Connection::Up { transport } = connection {
                // A goodbye that does not get through is replaced by the SFU's own timeouts.
                let _ = tokio::time::timeout(CLOSE_TIMEOUT, transport.close()).await;
            }
        }
        self.work.shutdown().await;
        self.parts.status.send_replace(Status::Disconnected);
        let Some(ending) = self.ending.take() else { return };
        // The application may be gone, or have stopped reading: it learns of the end by the closed channel.
        let _ = self.parts.control.try_send(CallEvent::Ended { reason: ending.reason });
        for waiter in ending.waiters {
            let _ = waiter.send(());
        }
    }
}

/// The runtime's clock, which tests can drive.
fn instant() -> Instant {
    tokio::time::Instant::now().into_std()
}

fn now() -> Now {
    let unix = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Now { instant: instant(), unix: UnixMillis(u64::try_from(unix.as_millis()).unwrap_or(u64::MAX)) }
}

/// What the failure of a delegation means to the membership: whether it is worth another try.
fn delegation_error(error: &FocusError) -> RequestError {
    match error {
        FocusError::Refused { status: 429, .. } => RequestError::RateLimited { retry_after: None },
        FocusError::Refused { status: 500.., .. } | FocusError::Http { .. } | FocusError::Matrix(_) => {
            RequestError::Network
        }
        FocusError::Refused { .. }
        | FocusError::Malformed { .. }
        | FocusError::NoFocus { .. }
        | FocusError::NoDelegation => RequestError::Other { message: describe(error) },
    }
}

/// An error with its causes on one line.
fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text.push_str(": ");
        text.push_str(&inner.to_string());
        cause = inner.source();
    }
    text
}
