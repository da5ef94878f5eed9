//! The task that owns the rooms, and the handle by which sockets and the admin API reach it.
#![allow(clippy::disallowed_methods, reason = "this is the shell: it owns the clock and the tasks")]

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use livekit_protocol::{signal_request, signal_response};
use tokio::sync::{mpsc, oneshot};
use tokio::time::MissedTickBehavior;

use crate::observe::{Counters, Heartbeat};
use crate::plane::{Command, Event};
use crate::room::{Join, JoinError, Now, Output, Presence, Rooms, SessionId};

/// How often the rooms are told that time has passed.
const TICK: Duration = Duration::from_millis(200);
/// Requests that may wait for the manager; whoever sends more waits.
const REQUESTS: usize = 1024;
/// Messages that may wait for a client to read them; then its connection is dropped.
const OUT_QUEUE: usize = 1024;
/// Commands that may wait for the media plane before clients have to wait, and data packets are dropped.
const COMMANDS: usize = 4096;

/// What a session's socket has to do.
#[derive(Debug)]
pub(crate) enum Out {
    Message(Box<signal_response::Message>),
    /// Close in order.
    Close,
}

/// Something to be done with the rooms.
type Act = Box<dyn FnOnce(&mut Rooms, Now) + Send>;

enum Request {
    Join(Box<Join>, oneshot::Sender<Result<Joined, JoinError>>),
    Signal(SessionId, Box<signal_request::Message>),
    Closed(SessionId, Ending),
    Call(Act),
}

/// How a socket came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// The client went, or its connection broke.
    Gone,
    /// The client sent something that is not the protocol.
    Protocol,
}

/// A session that has been let in.
#[derive(Debug)]
pub(crate) struct Joined {
    pub(crate) session: SessionId,
    pub(crate) out: mpsc::Receiver<Out>,
    /// Tells the manager when the socket is gone, wherever it is dropped.
    pub(crate) guard: Guard,
}

/// The way to the rooms.
#[derive(Clone, Debug)]
pub(crate) struct RoomHandle {
    requests: mpsc::Sender<Request>,
}

/// The manager has ended: the server is stopping.
#[derive(Debug, Clone, Copy, thiserror::Error)]
#[error("the server is shutting down")]
pub(crate) struct Stopped;

impl RoomHandle {
    pub(crate) async fn join(&self, join: Join) -> Result<Joined, JoinError> {
        let (reply, answer) = oneshot::channel();
        let request = Request::Join(Box::new(join), reply);
        self.requests.send(request).await.map_err(|_| JoinError::ShuttingDown)?;
        answer.await.map_err(|_| JoinError::ShuttingDown)?
    }

    pub(crate) async fn signal(
        &self,
        session: SessionId,
        message: signal_request::Message,
    ) -> Result<(), Stopped> {
        self.requests.send(Request::Signal(session, Box::new(message))).await.map_err(|_| Stopped)
    }

    /// Does something with the rooms, in turn.
    pub(crate) async fn call<R: Send + 'static>(
        &self,
        act: impl FnOnce(&mut Rooms, Now) -> R + Send + 'static,
    ) -> Result<R, Stopped> {
        let (reply, answer) = oneshot::channel();
        let act = move |rooms: &mut Rooms, now: Now| {
            // Nobody waits any more: then nobody misses the answer.
            let _ = reply.send(act(rooms, now));
        };
        self.requests.send(Request::Call(Box::new(act))).await.map_err(|_| Stopped)?;
        answer.await.map_err(|_| Stopped)
    }
}

/// Says that a session's socket is gone when it is dropped, even if the upgrade never came to be.
#[derive(Debug)]
pub(crate) struct Guard {
    session: SessionId,
    requests: mpsc::Sender<Request>,
    pub(crate) ending: Ending,
}

impl Drop for Guard {
    fn drop(&mut self) {
        let request = Request::Closed(self.session, self.ending);
        if let Err(mpsc::error::TrySendError::Full(request)) = self.requests.try_send(request)
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            let requests = self.requests.clone();
            runtime.spawn(async move { requests.send(request).await });
        }
    }
}

/// The task: rooms in the middle, requests and plane events in, messages and plane commands out.
pub(crate) struct Manager {
    rooms: Rooms,
    counters: Arc<Counters>,
    heartbeat: Arc<Heartbeat>,
    requests: mpsc::Receiver<Request>,
    handle: RoomHandle,
    commands: mpsc::Sender<Command>,
    events: mpsc::Receiver<Event>,
    presence: Option<mpsc::Sender<Presence>>,
    sockets: HashMap<SessionId, mpsc::Sender<Out>>,
    waiting: VecDeque<Command>,
}

impl Manager {
    /// Starts the task, which tells `presence` who comes and goes. It ends when `commands` is closed by the plane
    /// and every handle is dropped.
    pub(crate) fn spawn(
        rooms: Rooms,
        counters: Arc<Counters>,
        heartbeat: Arc<Heartbeat>,
        commands: mpsc::Sender<Command>,
        events: mpsc::Receiver<Event>,
        presence: Option<mpsc::Sender<Presence>>,
    ) -> (RoomHandle, tokio::task::JoinHandle<()>) {
        let (sender, requests) = mpsc::channel(REQUESTS);
        let handle = RoomHandle { requests: sender };
        let manager = Self {
            rooms,
            counters,
            heartbeat,
            requests,
            handle: handle.clone(),
            commands,
            events,
            presence,
            sockets: HashMap::new(),
            waiting: VecDeque::new(),
        };
        (handle, tokio::spawn(manager.run()))
    }

    async fn run(mut self) {
        let mut ticker = tokio::time::interval(TICK);
        ticker.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut plane_alive = true;
        let commands = self.commands.clone();
        loop {
            self.carry_out();
            tokio::select! {
                permit = commands.reserve(), if plane_alive && !self.waiting.is_empty() => match permit {
                    Ok(permit) => {
                        if let Some(command) = self.waiting.pop_front() {
                            permit.send(command);
                        }
                    }
                    Err(_) => plane_alive = false,
                },
                event = self.events.recv(), if plane_alive => match event {
                    Some(event) => self.rooms.plane(now(), event),
                    None => plane_alive = false,
                },
                // Whoever asks waits while the plane does not keep up.
                request = self.requests.recv(), if self.waiting.len() < COMMANDS || !plane_alive => match request {
                    Some(request) => self.serve(request),
                    None => return,
                },
                _ = ticker.tick() => {
                    self.rooms.tick(now());
                    // Without a media plane the server is ill, and its health check says so.
                    if plane_alive {
                        self.heartbeat.beat(Instant::now());
                    }
                }
            }
            if !plane_alive {
                self.waiting.clear();
            }
        }
    }

    fn serve(&mut self, request: Request) {
        let now = now();
        match request {
            Request::Join(join, reply) => {
                let joined = self.rooms.join(now, *join).map(|session| {
                    let (sender, out) = mpsc::channel(OUT_QUEUE);
                    self.sockets.insert(session, sender);
                    let requests = self.handle.requests.clone();
                    Joined { session, out, guard: Guard { session, requests, ending: Ending::Gone } }
                });
                if joined.is_err() {
                    self.counters.refused_joins.add(1);
                }
                // Whoever asked is gone: its guard comes back with the reply and ends the session.
                let _ = reply.send(joined);
            }
            Request::Signal(session, message) => self.rooms.signal(now, session, *message),
            Request::Closed(session, ending) => {
                self.sockets.remove(&session);
                match ending {
                    Ending::Gone => self.rooms.signal_closed(now, session),
                    Ending::Protocol => self.rooms.protocol_error(now, session),
                }
            }
            Request::Call(act) => act(&mut self.rooms, now),
        }
    }

    /// Carries out what the rooms want done, in their order.
    fn carry_out(&mut self) {
        while let Some(output) = self.rooms.poll() {
            match output {
                Output::Send { session, message } => {
                    let Some(socket) = self.sockets.get(&session) else { continue };
                    match socket.try_send(Out::Message(message)) {
                        Ok(()) => {}
                        Err(mpsc::error::TrySendError::Full(_)) => {
                            // Dropping the sender ends the socket's task, whatever waits in the queue: a client
                            // that has missed one message must start anew.
                            self.sockets.remove(&session);
                            self.counters.slow_clients.add(1);
                            self.rooms.signal_closed(now(), session);
                        }
                        Err(mpsc::error::TrySendError::Closed(_)) => {
                            self.sockets.remove(&session);
                            self.rooms.signal_closed(now(), session);
                        }
                    }
                }
                Output::Close { session } => {
                    if let Some(socket) = self.sockets.remove(&session) {
                        // Full or closed: the dropped sender ends the socket's task too.
                        let _ = socket.try_send(Out::Close);
                    }
                }
                Output::Plane(command) => {
                    if self.waiting.len() >= COMMANDS && matches!(command, Command::SendData { .. }) {
                        self.counters.dropped_data.add(1);
                        continue;
                    }
                    self.waiting.push_back(command);
                }
                Output::Presence(presence) => {
                    // One that is lost is found by the watcher's own looks at the rooms.
                    if self.presence.as_ref().is_some_and(|watcher| watcher.try_send(presence).is_err()) {
                        tracing::warn!("whoever watches who is there does not keep up");
                    }
                }
            }
        }
        while !self.waiting.is_empty() {
            let Ok(permit) = self.commands.try_reserve() else { return };
            if let Some(command) = self.waiting.pop_front() {
                permit.send(command);
            }
        }
    }
}

/// What both clocks show.
pub(crate) fn now() -> Now {
    let unix = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Now { instant: Instant::now(), unix }
}
