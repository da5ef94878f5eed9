//! The plane's thread: the socket, the clock and the two channels around [`Engine`].
#![allow(clippy::disallowed_methods, reason = "this is the shell: it owns the clock and the tasks")]

use std::io;
use std::net::{SocketAddr, SocketAddrV6};
use std::sync::Arc;
use std::time::Instant;

use str0m::Candidate;
use thiserror::Error;
use tokio::net::UdpSocket;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::counters::Counters;
use super::engine::Engine;
use super::outbox::{Kept, Outbox};
use super::{Command, Event};

/// Longest datagram that any client sends (their MTU is at most 1500).
const LONGEST: usize = 2000;
/// Datagrams and commands handled before the output is flushed and the other inputs get their turn.
const BATCH: usize = 64;
/// Commands and events that the channels hold.
const QUEUE: usize = 1024;

/// How to start a [`MediaPlane`].
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct PlaneConfig {
    /// The UDP address to receive on; port 0 lets the system choose.
    pub bind: SocketAddr,
    /// Where clients reach that socket: the candidates in our session descriptions. Port 0 stands for the port
    /// bound. Empty means the bound address itself, which must then be a specific one.
    pub advertised: Vec<SocketAddr>,
    /// Most peers at one time; a participant has two.
    pub max_peers: usize,
}

impl PlaneConfig {
    /// Receives on `bind` and advertises it, for at most 4096 peers.
    pub fn new(bind: SocketAddr) -> Self {
        Self { bind, advertised: vec![], max_peers: 4096 }
    }

    /// Advertises these addresses instead of the bound one.
    pub fn advertise(mut self, addresses: Vec<SocketAddr>) -> Self {
        self.advertised = addresses;
        self
    }
}

/// Why the plane did not start or does not listen.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PlaneError {
    /// The operator's address cannot be used.
    #[error("the media plane cannot use the UDP address {address}; choose another or free it")]
    Bind {
        /// The address of [`PlaneConfig::bind`].
        address: SocketAddr,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// No client can reach this address.
    #[error("{address} cannot be told to clients as the media address; set one that they can reach")]
    Advertised {
        /// The address of [`PlaneConfig::advertised`], or the one bound.
        address: SocketAddr,
        /// What is wrong with it.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The system has no room for a thread.
    #[error("the system could not start the media plane's thread")]
    Thread(#[source] io::Error),
    /// Too many commands wait: the plane is overloaded, or its events are not read.
    #[error("the media plane is busy: {QUEUE} commands wait; read its events and try again")]
    Busy,
    /// The plane's thread has ended.
    #[error("the media plane has stopped")]
    Stopped,
}

/// A running media plane. It ends when the last clone is dropped or its events are no longer received.
#[derive(Clone, Debug)]
pub struct MediaPlane {
    commands: mpsc::Sender<Command>,
    counters: Arc<Counters>,
    local: SocketAddr,
    ended: CancellationToken,
}

impl MediaPlane {
    /// Binds the socket and starts the thread.
    ///
    /// The receiver must be read for as long as commands are sent: once some thousands of events wait, commands
    /// wait too. Media flows in any case; events that report a state are never lost.
    ///
    /// # Errors
    ///
    /// [`PlaneError`] if the address cannot be bound or told to clients.
    pub fn start(config: PlaneConfig) -> Result<(Self, mpsc::Receiver<Event>), PlaneError> {
        let bind_error = |source| PlaneError::Bind { address: config.bind, source };
        let socket = std::net::UdpSocket::bind(config.bind).map_err(bind_error)?;
        socket.set_nonblocking(true).map_err(bind_error)?;
        let local = socket.local_addr().map_err(bind_error)?;
        let mut addresses = if config.advertised.is_empty() { vec![local] } else { config.advertised };
        let mut candidates = vec![];
        for address in &mut addresses {
            if address.port() == 0 {
                address.set_port(local.port());
            }
            let candidate = Candidate::host(*address, "udp")
                .map_err(|error| PlaneError::Advertised { address: *address, source: error.into() })?;
            candidates.push(candidate);
        }
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .enable_time()
            .build()
            .map_err(PlaneError::Thread)?;
        let socket = {
            let _entered = runtime.enter();
            UdpSocket::from_std(socket).map_err(bind_error)?
        };
        let counters = Arc::new(Counters::default());
        let engine =
            Engine::new(Instant::now(), addresses, candidates, config.max_peers, Arc::clone(&counters));
        let (commands, command_queue) = mpsc::channel(QUEUE);
        let (event_queue, events) = mpsc::channel(QUEUE);
        let shell = Shell {
            socket,
            dual_stack: local.is_ipv6(),
            engine,
            commands: command_queue,
            events: event_queue,
            outbox: Outbox::default(),
            counters: Arc::clone(&counters),
        };
        let ended = CancellationToken::new();
        let ending = ended.clone().drop_guard();
        std::thread::Builder::new()
            .name("media-plane".to_owned())
            .spawn(move || {
                runtime.block_on(shell.run());
                drop(ending);
            })
            .map_err(PlaneError::Thread)?;
        Ok((Self { commands, counters, local, ended }, events))
    }

    /// Sends a command, waiting while too many wait already. A task that also reads the events must use
    /// [`try_send`](Self::try_send), lest both wait for each other.
    ///
    /// # Errors
    ///
    /// [`PlaneError::Stopped`].
    pub async fn send(&self, command: Command) -> Result<(), PlaneError> {
        self.commands.send(command).await.map_err(|_| PlaneError::Stopped)
    }

    /// Sends a command without waiting.
    ///
    /// # Errors
    ///
    /// [`PlaneError::Busy`] and [`PlaneError::Stopped`].
    pub fn try_send(&self, command: Command) -> Result<(), PlaneError> {
        self.commands.try_send(command).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => PlaneError::Busy,
            mpsc::error::TrySendError::Closed(_) => PlaneError::Stopped,
        })
    }

    /// The address bound.
    pub fn local_addr(&self) -> SocketAddr {
        self.local
    }

    /// Is cancelled when the plane has ended and its address is free.
    pub(crate) fn ended(&self) -> CancellationToken {
        self.ended.clone()
    }

    /// What the plane has counted so far.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }
}

struct Shell {
    socket: UdpSocket,
    /// An IPv6 socket sees IPv4 senders as mapped addresses (RFC 4291 §2.5.5.2).
    dual_stack: bool,
    engine: Engine,
    commands: mpsc::Receiver<Command>,
    events: mpsc::Sender<Event>,
    outbox: Outbox,
    counters: Arc<Counters>,
}

enum Woken {
    Datagrams,
    Command(Command),
    Time,
    EventTaken,
    Ended,
}

impl Shell {
    async fn run(mut self) {
        loop {
            match self.wait().await {
                Woken::Ended => return,
                Woken::Command(command) => {
                    self.engine.handle_command(Instant::now(), command);
                    for _ in 1..BATCH {
                        let Ok(command) = self.commands.try_recv() else { break };
                        self.engine.handle_command(Instant::now(), command);
                    }
                }
                Woken::Datagrams | Woken::Time | Woken::EventTaken => {}
            }
            // Whatever woke us: a flood of commands must not keep media waiting.
            self.receive();
            let now = Instant::now();
            if self.engine.poll_timeout() <= now {
                self.engine.handle_timeout(now);
            }
            self.engine.flush(now);
            self.transmit();
            self.report(now);
        }
    }

    async fn wait(&mut self) -> Woken {
        let deadline = self.engine.poll_timeout().into();
        tokio::select! {
            biased;
            command = self.commands.recv(), if !self.outbox.is_full() => match command {
                Some(command) => Woken::Command(command),
                None => Woken::Ended,
            },
            permit = self.events.reserve(), if !self.outbox.is_empty() => match permit {
                Ok(permit) => {
                    if let Some(event) = self.outbox.pop() {
                        permit.send(event);
                    }
                    Woken::EventTaken
                }
                Err(_) => Woken::Ended,
            },
            () = self.events.closed(), if self.outbox.is_empty() => Woken::Ended,
            () = tokio::time::sleep_until(deadline) => Woken::Time,
            readable = self.socket.readable() => match readable {
                Ok(()) => Woken::Datagrams,
                Err(error) => {
                    tracing::error!(%error, "the media socket is unusable: the media plane stops");
                    Woken::Ended
                }
            },
        }
    }

    fn receive(&mut self) {
        // One byte more than allowed shows a datagram that was cut.
        let mut buffer = [0; LONGEST + 1];
        for _ in 0..BATCH {
            // An error here is an ICMP answer to something sent earlier, or "nothing more".
            let Ok((length, source)) = self.socket.try_recv_from(&mut buffer) else { return };
            let source = SocketAddr::new(source.ip().to_canonical(), source.port());
            match buffer.get(..length) {
                Some(datagram) if length <= LONGEST => {
                    self.engine.handle_datagram(Instant::now(), source, datagram);
                }
                _ => self.counters.garbage(source, "that is too long"),
            }
        }
    }

    fn transmit(&mut self) {
        while let Some((destination, datagram)) = self.engine.poll_transmit() {
            let destination = match destination {
                SocketAddr::V4(v4) if self.dual_stack => {
                    SocketAddrV6::new(v4.ip().to_ipv6_mapped(), v4.port(), 0, 0).into()
                }
                other => other,
            };
            // UDP may lose packets, so a full send buffer is a loss like any other: media must not wait.
            match self.socket.try_send_to(&datagram, destination) {
                Ok(_) => self.counters.datagrams_out.add(1),
                Err(_) => self.counters.send_failures.add(1),
            };
        }
    }

    fn report(&mut self, now: Instant) {
        while let Some(event) = self.engine.poll_event() {
            match self.outbox.push(event) {
                Kept::Yes => {}
                Kept::Dropped => {
                    self.counters.events_dropped.add(1);
                }
                Kept::GiveUp(peer) => {
                    self.engine.give_up(now, peer, "the server takes this client's data too slowly");
                }
            }
        }
        while !self.outbox.is_empty() {
            let Ok(permit) = self.events.try_reserve() else { break };
            if let Some(event) = self.outbox.pop() {
                permit.send(event);
            }
        }
    }
}
