//! The task behind a [`super::Call`]: it performs the machine's outputs and brings back what comes of them.
//!
//! Nothing here waits for the network: every request, close and query is a task of its own, so that none of them holds
//! up media or events.
#![allow(clippy::disallowed_methods, reason = "this is the shell: it owns the clock and the tasks")]

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, OnceLock},
    task::{Context, Poll, Waker},
    time::{Duration, Instant, SystemTime},
};

use ruma_common::OwnedEventId;
use tokio::{
    sync::{Notify, mpsc, oneshot, watch},
    task::JoinSet,
};

use super::{
    connector::{Connected, Connector, PeerOpened},
    data::{self, DataSealer},
    incoming::TrackReceiver,
    outgoing::{LocalTrack, Outgoing},
    queue::EventSender,
};
use crate::{
    foci::SfuAccess,
    machine::{
        Attention, CallEvent, CallMachine, CallReport, CallStatus, ConnectFailure, EndReason, Grant,
        IncomingTrack, Input, Output, PublishFailure, Sealing, TrackCounters,
    },
    matrix::{Delivery, MatrixPort, MatrixReply, MatrixUpdate, RequestError},
    media::TrackSpec,
    member::{Device, Member, MemberKey},
    time::{Now, UnixMillis},
    transport::{
        ConnectionId, LocalTrackId, MediaTransport, MeshTransport, Outlet, Reliability, Subscription,
        TrackSid, TransportError, TransportEvent, UserData,
    },
};

/// Transport events of all connections that may wait for the shell.
const TRANSPORT_EVENTS: usize = 1024;
/// Outcomes of to-device messages that may wait for the shell.
const OUTCOMES: usize = 1024;
/// How long closing a connection may take before it is abandoned.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(3);
/// How long leaving waits for hangups that are on their way, after everything else.
const GOODBYE_TIMEOUT: Duration = Duration::from_secs(2);
/// A member of a mesh is told that we have left. Other messages are pointless then.
const HANGUP: &str = "m.call.hangup";

/// What the application asks of its call.
#[derive(Debug)]
pub(super) enum Command {
    SetIntent(Option<String>),
    Publish { spec: TrackSpec, reply: oneshot::Sender<Result<LocalTrack, String>> },
    Subscribe { member: MemberKey, sid: TrackSid, subscription: Subscription },
    RequestKeyFrame { member: MemberKey, sid: TrackSid },
    SendData { reliability: Reliability, to: Vec<MemberKey>, message: UserData },
    RotateKey,
    Invite(Attention),
    Decline(OwnedEventId),
    React { emoji: String, name: String },
    RaiseHand(bool),
    Report(oneshot::Sender<CallReport>),
    Leave(oneshot::Sender<()>),
}

/// What a finished piece of work brings back.
enum Done {
    Input(Input),
    Access(ConnectionId, Result<SfuAccess, ConnectFailure>),
    Opened(ConnectionId, Result<Opened, ConnectFailure>),
    Published(ConnectionId, LocalTrackId, Result<Arc<dyn Outlet>, TransportError>),
    Nothing,
}

/// A connection to an SFU room or to a mesh peer.
struct Opened {
    transport: Arc<dyn MediaTransport>,
    /// The same, of a mesh peer.
    pair: Option<Arc<dyn MeshTransport>>,
    events: mpsc::Receiver<TransportEvent>,
}

impl From<Connected> for Opened {
    fn from((transport, events): Connected) -> Self {
        Self { transport, pair: None, events }
    }
}

impl From<PeerOpened> for Opened {
    fn from((pair, events): PeerOpened) -> Self {
        Self { transport: pair.clone(), pair: Some(pair), events }
    }
}

/// The remote tracks and where they are counted.
pub(super) type Tracks = Arc<Vec<(Arc<IncomingTrack>, Arc<TrackCounters>)>>;

/// All that a shell is made of.
pub(super) struct Parts {
    pub(super) port: Arc<dyn MatrixPort>,
    pub(super) connector: Arc<dyn Connector>,
    pub(super) machine: CallMachine,
    pub(super) sealing: Arc<Sealing>,
    pub(super) events: EventSender,
    pub(super) members: watch::Sender<Arc<Vec<Member>>>,
    pub(super) tracks: watch::Sender<Tracks>,
    pub(super) status: watch::Sender<CallStatus>,
    pub(super) begin: Instant,
    /// Where the report is left when the call is over.
    pub(super) last_report: Arc<OnceLock<CallReport>>,
}

pub(super) struct Shell {
    parts: Parts,
    /// Tokens of connections that are being made, or made.
    access: BTreeMap<ConnectionId, SfuAccess>,
    connections: BTreeMap<ConnectionId, Arc<dyn MediaTransport>>,
    /// Those of `connections` that lead to mesh peers.
    pairs: BTreeMap<ConnectionId, Arc<dyn MeshTransport>>,
    /// Tasks that make connections; aborted when the connection is given up.
    making: HashMap<ConnectionId, tokio::task::AbortHandle>,
    receivers: HashMap<(ConnectionId, TrackSid), Arc<TrackReceiver>>,
    locals: BTreeMap<LocalTrackId, Local>,
    next_local: u64,
    locals_changed: Arc<Notify>,
    work: JoinSet<Done>,
    /// Hangups on their way, which must outlive `work`.
    goodbyes: JoinSet<()>,
    transport_events: Channel<(ConnectionId, TransportEvent)>,
    outcomes: Channel<Outcome>,
    data: DataSealer,
    leaving: Vec<oneshot::Sender<()>>,
    over: Option<EndReason>,
}

/// Both ends of a channel.
type Channel<T> = (mpsc::Sender<T>, mpsc::Receiver<T>);

/// What became of a batch of to-device messages, in order.
enum Outcome {
    Delivered(crate::machine::RequestId, Device, Delivery),
    /// Nothing follows.
    Done(crate::machine::RequestId),
}

struct Local {
    outgoing: Arc<Outgoing>,
    waiting: Option<oneshot::Sender<Result<LocalTrack, String>>>,
    muted: bool,
}

impl Shell {
    pub(super) fn new(parts: Parts) -> Self {
        Self {
            access: BTreeMap::new(),
            connections: BTreeMap::new(),
            pairs: BTreeMap::new(),
            making: HashMap::new(),
            receivers: HashMap::new(),
            locals: BTreeMap::new(),
            next_local: 1,
            locals_changed: Arc::default(),
            work: JoinSet::new(),
            goodbyes: JoinSet::new(),
            transport_events: mpsc::channel(TRANSPORT_EVENTS),
            outcomes: mpsc::channel(OUTCOMES),
            data: DataSealer::new(&parts.sealing),
            leaving: Vec::new(),
            over: None,
            parts,
        }
    }

    pub(super) async fn run(
        mut self,
        updates: mpsc::Receiver<MatrixUpdate>,
        commands: mpsc::Receiver<Command>,
    ) {
        let (mut updates, mut commands) = (Some(updates), Some(commands));
        self.input(Input::Start);
        let reason = loop {
            let wake = self.drain();
            if let Some(reason) = self.over.take() {
                break reason;
            }
            let changed = Arc::clone(&self.locals_changed);
            tokio::select! {
                Some((connection, event)) = self.transport_events.1.recv() => {
                    self.input(Input::Transport { connection, event });
                }
                Some(outcome) = self.outcomes.1.recv() => match outcome {
                    Outcome::Delivered(id, device, result) => {
                        self.input(Input::Delivered { id, device, result });
                    }
                    Outcome::Done(id) => self.input(Input::BatchDone(id)),
                },
                Some(done) = self.work.join_next(), if !self.work.is_empty() => match done {
                    Ok(done) => self.done(done),
                    Err(error) if error.is_cancelled() => {}
                    Err(error) => self.input(Input::Leave(EndReason::Internal(error.to_string()))),
                },
                update = next(&mut updates) => match update {
                    Some(update) => self.input(Input::Update(update)),
                    None => {
                        updates = None;
                        self.input(Input::Leave(EndReason::ClientGone));
                    }
                },
                command = next(&mut commands) => match command {
                    Some(command) => self.command(command),
                    None => {
                        commands = None;
                        self.input(Input::Leave(EndReason::Dropped));
                    }
                },
                () = changed.notified() => self.sync_locals(),
                () = tokio::time::sleep_until(wake.into()) => {}
            }
        };
        self.close(reason);
    }

    fn input(&mut self, input: Input) {
        self.parts.machine.handle(now(), input);
    }

    /// Performs what the machine asks for, and says when to look again.
    fn drain(&mut self) -> Instant {
        loop {
            match self.parts.machine.poll(now()) {
                Output::WaitUntil(at) => return at,
                Output::Over(reason) => {
                    self.over = Some(reason);
                    return now().instant;
                }
                output => self.perform(output),
            }
        }
    }

    fn perform(&mut self, output: Output) {
        match output {
            Output::Matrix { id, request, timeout } => {
                let port = Arc::clone(&self.parts.port);
                self.work.spawn(async move {
                    let performing = port.perform(request, timeout);
                    let result = tokio::time::timeout(timeout, performing)
                        .await
                        .unwrap_or(Err(RequestError::TimedOut));
                    Done::Input(Input::Matrix { id, result })
                });
            }
            Output::ReadRoom => {
                let port = Arc::clone(&self.parts.port);
                self.work.spawn(async move {
                    let view = port.room_view().await.map(Arc::new).map_err(|error| describe(&error));
                    Done::Input(Input::Room(view))
                });
            }
            Output::SendToDevice { id, batch } => {
                let (port, to) = (Arc::clone(&self.parts.port), self.outcomes.0.clone());
                let is_goodbye = batch.event_type == HANGUP;
                let sending = async move {
                    let (outcomes, mut of_batch) = mpsc::channel(64);
                    let forward = async {
                        while let Some((device, result)) = of_batch.recv().await {
                            if to.send(Outcome::Delivered(id, device, result)).await.is_err() {
                                return;
                            }
                        }
                    };
                    tokio::join!(port.send_to_device(batch, outcomes), forward);
                    // By the same way as the outcomes, so that it comes after them.
                    drop(to.send(Outcome::Done(id)).await);
                };
                if is_goodbye {
                    while self.goodbyes.try_join_next().is_some() {}
                    self.goodbyes.spawn(sending);
                } else {
                    self.work.spawn(async move {
                        sending.await;
                        Done::Nothing
                    });
                }
            }
            Output::Discover { support, members } => {
                let (port, connector) = self.outside();
                self.work.spawn(async move {
                    Done::Input(Input::Discovered(
                        connector.discover(port.as_ref(), &support, &members).await,
                    ))
                });
            }
            Output::Access { connection, access } => {
                let (port, connector) = self.outside();
                let task = self.work.spawn(async move {
                    Done::Access(connection, connector.access(port.as_ref(), &access).await)
                });
                self.making.insert(connection, task);
            }
            Output::Connect { connection } => {
                let Some(access) = self.access.get(&connection).cloned() else { return };
                let connector = Arc::clone(&self.parts.connector);
                let task = self.work.spawn(async move {
                    Done::Opened(connection, connector.connect(&access).await.map(Opened::from))
                });
                self.making.insert(connection, task);
            }
            Output::OpenPeer { connection, identity } => {
                let (port, connector) = self.outside();
                let task = self.work.spawn(async move {
                    let opened = connector.open_peer(port.as_ref(), &identity).await;
                    Done::Opened(connection, opened.map(Opened::from))
                });
                self.making.insert(connection, task);
            }
            Output::Negotiate { connection, command } => {
                if let Some(pair) = self.pairs.get(&connection) {
                    pair.negotiate(command);
                }
            }
            Output::Close { connection } => self.close_connection(connection),
            Output::Delegate { id, connection, delay_id, delay, timeout } => {
                let (port, connector) = self.outside();
                let access = self.access.get(&connection).cloned();
                self.work.spawn(async move {
                    let result = match access {
                        None => Err(RequestError::Unsupported),
                        Some(access) => {
                            let delegating =
                                connector.delegate_leave(port.as_ref(), &access, &delay_id, delay);
                            tokio::time::timeout(timeout, delegating)
                                .await
                                .unwrap_or(Err(RequestError::TimedOut))
                        }
                    };
                    Done::Input(Input::Matrix { id, result: result.map(|()| MatrixReply::Done) })
                });
            }
            Output::Publish { connection, track, spec, encrypted } => {
                let Some(transport) = self.connections.get(&connection).cloned() else { return };
                let mut publishing = Box::pin(async move {
                    Done::Published(connection, track, transport.publish(track, spec, encrypted).await)
                });
                // It begins at once: the offer that is asked for next is to have the track.
                match publishing.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
                    Poll::Ready(done) => drop(self.work.spawn(std::future::ready(done))),
                    Poll::Pending => drop(self.work.spawn(publishing)),
                }
            }
            Output::Unpublish { connection, track } => {
                if let Some(local) = self.locals.get(&track) {
                    local.outgoing.remove_outlet(connection);
                }
                if let Some(transport) = self.connections.get(&connection) {
                    transport.unpublish(track);
                }
            }
            Output::TrackReady { track, result } => self.track_ready(track, result),
            Output::Mute { connection, track, muted } => {
                if let Some(transport) = self.connections.get(&connection) {
                    transport.set_muted(track, muted);
                }
            }
            Output::Attach { connection, sid, route } => {
                let receiver = Arc::new(TrackReceiver::new(
                    route,
                    self.parts.begin,
                    Arc::clone(&self.parts.sealing),
                    self.parts.events.clone(),
                ));
                if let Some(transport) = self.connections.get(&connection) {
                    transport.attach(&sid, Some(receiver.clone()));
                }
                self.receivers.insert((connection, sid), receiver);
            }
            Output::Reroute { connection, sid, route } => {
                if let Some(receiver) = self.receivers.get(&(connection, sid)) {
                    receiver.update(route);
                }
            }
            Output::Detach { connection, sid } => {
                if let Some(transport) = self.connections.get(&connection) {
                    transport.attach(&sid, None);
                }
                if let Some(receiver) = self.receivers.remove(&(connection, sid)) {
                    receiver.end();
                }
            }
            Output::RequestKeyFrame { connection, sid } => {
                if let Some(transport) = self.connections.get(&connection) {
                    transport.request_key_frame(&sid);
                }
            }
            Output::Subscribe { connection, sid, subscription } => {
                // A mesh peer sends what it sends: what is not wanted ends here.
                if connection.is_mesh()
                    && let Some(receiver) = self.receivers.get(&(connection, sid.clone()))
                {
                    receiver.set_wanted(subscription.enabled && !subscription.paused);
                }
                if let Some(transport) = self.connections.get(&connection) {
                    transport.subscribe(&sid, subscription);
                }
            }
            Output::SendData { connection, reliability, destinations, message } => {
                let Some(transport) = self.connections.get(&connection) else { return };
                match self.data.packet(&self.parts.sealing, reliability, destinations, message) {
                    Ok(packet) => {
                        if let Err(error) = transport.send_data(packet) {
                            tracing::warn!(%error, "a data message was dropped");
                        }
                    }
                    Err(error) => tracing::warn!(%error, "a data message was dropped"),
                }
            }
            Output::OpenData { member, ring, packet } => {
                if let Some(event) = data::open(member, ring, packet) {
                    self.tell(event);
                }
            }
            Output::Event(event) => self.tell(event),
            Output::Members(members) => {
                self.parts.members.send_replace(members);
            }
            Output::Tracks(tracks) => {
                self.parts.tracks.send_replace(tracks);
            }
            Output::Status(status) => {
                self.parts.status.send_replace(status);
            }
            Output::WaitUntil(_) | Output::Over(_) => {}
        }
    }

    fn outside(&self) -> (Arc<dyn MatrixPort>, Arc<dyn Connector>) {
        (Arc::clone(&self.parts.port), Arc::clone(&self.parts.connector))
    }

    fn tell(&mut self, event: CallEvent) {
        if matches!(event, CallEvent::Data { .. }) {
            if !self.parts.events.data(event) {
                tracing::warn!("the application does not read; a data message was dropped");
            }
        } else if self.parts.events.control(event).is_err() {
            self.input(Input::Leave(EndReason::NotReading));
        }
    }

    fn done(&mut self, done: Done) {
        match done {
            Done::Input(input) => self.input(input),
            Done::Access(connection, result) => {
                self.making.remove(&connection);
                let result = result.map(|access| {
                    let grant = Grant { sfu: access.sfu.clone(), identity: access.identity.clone() };
                    self.access.insert(connection, access);
                    grant
                });
                self.input(Input::Granted { connection, result });
            }
            Done::Opened(connection, result) => {
                // Given up meanwhile: a connection that nobody waits for is closed.
                let wanted = self.making.remove(&connection).is_some();
                let result = match result {
                    Ok(Opened { transport, pair, events }) if wanted => {
                        self.connections.insert(connection, transport);
                        self.pairs.extend(pair.map(|pair| (connection, pair)));
                        self.forward(connection, events);
                        Ok(())
                    }
                    Ok(Opened { transport, .. }) => return self.close_transport(transport),
                    Err(failure) => Err(failure),
                };
                self.input(Input::Connected { connection, result });
            }
            Done::Published(connection, track, result) => {
                let is_open = self.connections.contains_key(&connection);
                let result = match (result, self.locals.get(&track)) {
                    (Ok(_), Some(_)) if !is_open => Err(PublishFailure::Closed),
                    (Ok(outlet), Some(local)) => {
                        local.outgoing.add_outlet(connection, outlet);
                        Ok(())
                    }
                    (Ok(_), None) => {
                        if let Some(transport) = self.connections.get(&connection) {
                            transport.unpublish(track);
                        }
                        return;
                    }
                    (Err(TransportError::Closed), _) => Err(PublishFailure::Closed),
                    (Err(error), _) => Err(PublishFailure::Refused(describe(&error))),
                };
                self.input(Input::Published { connection, track, result });
            }
            Done::Nothing => {}
        }
    }

    fn forward(&mut self, connection: ConnectionId, mut events: mpsc::Receiver<TransportEvent>) {
        let to = self.transport_events.0.clone();
        self.work.spawn(async move {
            while let Some(event) = events.recv().await {
                if to.send((connection, event)).await.is_err() {
                    break;
                }
            }
            Done::Nothing
        });
    }

    fn command(&mut self, command: Command) {
        match command {
            Command::SetIntent(intent) => self.input(Input::SetIntent(intent)),
            Command::Publish { spec, reply } => {
                let track = LocalTrackId(self.next_local);
                self.next_local += 1;
                let outgoing = Arc::new(Outgoing::new(
                    track,
                    spec.clone(),
                    Arc::clone(&self.parts.sealing),
                    Arc::clone(&self.locals_changed),
                ));
                let muted = spec.muted;
                self.locals.insert(track, Local { outgoing, waiting: Some(reply), muted });
                self.input(Input::Publish { track, spec });
            }
            Command::Subscribe { member, sid, subscription } => {
                self.input(Input::Subscribe { member, sid, subscription });
            }
            Command::RequestKeyFrame { member, sid } => self.input(Input::RequestKeyFrame { member, sid }),
            Command::SendData { reliability, to, message } => {
                self.input(Input::SendData { reliability, to, message });
            }
            Command::RotateKey => self.input(Input::RotateKey),
            Command::Invite(attention) => self.input(Input::Invite(attention)),
            Command::Decline(invite) => self.input(Input::Decline(invite)),
            Command::React { emoji, name } => self.input(Input::React { emoji, name }),
            Command::RaiseHand(raised) => self.input(Input::RaiseHand(raised)),
            Command::Report(reply) => {
                // The application may have stopped waiting.
                let _ = reply.send(self.parts.machine.report(now()));
            }
            Command::Leave(done) => {
                self.leaving.push(done);
                self.input(Input::Leave(EndReason::Left));
            }
        }
    }

    /// Tracks that the application dropped or muted since the last look.
    fn sync_locals(&mut self) {
        let dropped: Vec<_> = self
            .locals
            .iter()
            .filter(|(_, local)| {
                local.outgoing.is_dropped() || local.waiting.as_ref().is_some_and(oneshot::Sender::is_closed)
            })
            .map(|(track, _)| *track)
            .collect();
        for track in dropped {
            self.input(Input::Unpublish(track));
            // The machine's outputs about the track still find it.
            self.drain();
            self.locals.remove(&track);
        }
        let mut changes = Vec::new();
        for (track, local) in &mut self.locals {
            let muted = local.outgoing.is_muted();
            if std::mem::replace(&mut local.muted, muted) != muted {
                changes.push((*track, muted));
            }
        }
        for (track, muted) in changes {
            self.input(Input::SetMuted { track, muted });
        }
    }

    fn track_ready(&mut self, track: LocalTrackId, result: Result<(), String>) {
        let Some(local) = self.locals.get_mut(&track) else { return };
        let Some(waiting) = local.waiting.take() else { return };
        let handle = result.map(|()| LocalTrack::new(Arc::clone(&local.outgoing)));
        let failed = handle.is_err();
        // A publisher that has stopped waiting drops the handle, which ends the track.
        drop(waiting.send(handle));
        if failed {
            self.locals.remove(&track);
        }
    }

    fn close_connection(&mut self, connection: ConnectionId) {
        self.access.remove(&connection);
        if self.connections.contains_key(&connection) {
            self.making.remove(&connection);
        } else if let Some(task) = self.making.remove(&connection) {
            task.abort();
        }
        for local in self.locals.values() {
            local.outgoing.remove_outlet(connection);
        }
        self.receivers.retain(|(of, _), receiver| {
            if *of == connection {
                receiver.end();
            }
            *of != connection
        });
        self.pairs.remove(&connection);
        if let Some(transport) = self.connections.remove(&connection) {
            self.close_transport(transport);
        }
    }

    fn close_transport(&mut self, transport: Arc<dyn MediaTransport>) {
        // Its own task, not the call's work: a goodbye may outlive the call.
        tokio::spawn(async move {
            if tokio::time::timeout(CLOSE_TIMEOUT, transport.close()).await.is_err() {
                tracing::debug!("a connection did not close in time");
            }
        });
    }

    fn close(mut self, reason: EndReason) {
        for connection in self.connections.keys().copied().collect::<Vec<_>>() {
            self.close_connection(connection);
        }
        self.work.abort_all();
        let _ = self.parts.last_report.set(self.parts.machine.report(now()));
        self.parts.status.send_replace(CallStatus::Over);
        self.parts.events.end(CallEvent::Ended(reason));
        let (mut goodbyes, leaving) = (self.goodbyes, self.leaving);
        tokio::spawn(async move {
            let all = async { while goodbyes.join_next().await.is_some() {} };
            if tokio::time::timeout(GOODBYE_TIMEOUT, all).await.is_err() {
                tracing::debug!("members could not be told in time that we have left");
            }
            for waiter in leaving {
                // The application may have stopped waiting.
                let _ = waiter.send(());
            }
        });
    }
}

/// The next item of a channel; never, once it has closed.
async fn next<T>(channel: &mut Option<mpsc::Receiver<T>>) -> Option<T> {
    match channel {
        Some(channel) => channel.recv().await,
        None => std::future::pending().await,
    }
}

/// The runtime's clock, which tests can drive.
pub(super) fn now() -> Now {
    let unix = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Now {
        instant: tokio::time::Instant::now().into_std(),
        unix: UnixMillis(u64::try_from(unix.as_millis()).unwrap_or(u64::MAX)),
    }
}

/// An error with its causes on one line.
pub(super) fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text.push_str(": ");
        text.push_str(&inner.to_string());
        cause = inner.source();
    }
    text
}
