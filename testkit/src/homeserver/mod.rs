//! An in-process Matrix homeserver for demos, tests and load tests. **Never deploy it.**
//!
//! It keeps everything in memory, listens on loopback only, checks no signatures, and forgets all when
//! dropped. It serves what matrix-sdk and a MatrixRTC call need, in the shapes Synapse 1.163 was seen to
//! answer, and it can be told to misbehave ([`Faults`]). One port speaks plain HTTP (client API) and TLS with a self-signed
//! certificate (for what asks `https://localhost:PORT`, such as OpenID verification).
//!
//! ```no_run
//! # async fn example() -> anyhow::Result<()> {
//! use antiphon_testkit::homeserver::{DevHomeserver, Options};
//!
//! let homeserver = DevHomeserver::start(Options::default()).await?;
//! let alice = homeserver.register_user("alice", "correct horse")?;
//! println!("{} is {} on {}", alice.user_id, alice.device_id, homeserver.url());
//! homeserver.shutdown().await;
//! # Ok(())
//! # }
//! ```
//!
//! What it leaves out on purpose: federation, media, sliding sync, threads and relations, push, key backup,
//! history visibility (a member reads everything), typing, receipts and presence (accepted, told to nobody).
//!
//! Inside, `state` is the whole server as a plain struct without I/O; this module and `http` are the
//! shell that owns the sockets, the clock and the tasks.

#![allow(clippy::disallowed_methods, reason = "this is the shell: it owns the clock and the tasks")]

use std::{
    collections::HashMap,
    fmt,
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, ensure};
use serde_json::Value;
use tokio::{
    net::TcpListener,
    sync::{Notify, watch},
    task::JoinHandle,
};

use self::{
    error::MatrixError,
    ids::{Timestamp, UserId},
    state::{Config, State},
};
pub use self::{
    faults::Faults,
    state::{DelayedForm, Limits, RoomVersion},
};

mod error;
mod faults;
mod http;
mod ids;
mod serve;
mod state;

/// How a [`DevHomeserver`] is to be.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where to listen; port 0 takes a free one. Anything but loopback is refused.
    pub bind: SocketAddr,
    /// What `GET /_matrix/client/unstable/org.matrix.msc4143/rtc/transports` lists (MSC4143).
    pub rtc_transports: Vec<Value>,
    /// The longest delay of a delayed event (MSC4140); longer ones are refused.
    pub max_delay: Duration,
    /// How delayed events are scheduled.
    pub delayed_form: DelayedForm,
    /// Whether anybody may register over HTTP. [`DevHomeserver::register_user`] works in any case.
    pub registration: bool,
    /// The version of rooms whose creator names none.
    pub room_version: RoomVersion,
    /// Upper bounds of what is kept.
    pub limits: Limits,
}

impl Default for Options {
    /// `127.0.0.1` on a free port, no transports, delays up to 24 hours by query parameter, open registration, room
    /// version 12.
    fn default() -> Self {
        Self {
            bind: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            rtc_transports: Vec::new(),
            max_delay: Duration::from_secs(24 * 3600),
            delayed_form: DelayedForm::default(),
            registration: true,
            room_version: RoomVersion::default(),
            limits: Limits::default(),
        }
    }
}

/// A running development homeserver; it ends when dropped, or with [`shutdown`](Self::shutdown).
pub struct DevHomeserver {
    shared: Arc<Shared>,
    certificate_pem: String,
    address: SocketAddr,
    stop: watch::Sender<bool>,
    tasks: Vec<JoinHandle<()>>,
}

impl DevHomeserver {
    /// Starts to listen and serve.
    ///
    /// # Errors
    /// When `options.bind` is not a loopback address, or cannot be listened on.
    pub async fn start(options: Options) -> anyhow::Result<Self> {
        ensure!(
            options.bind.ip().is_loopback(),
            "the development homeserver has no security to speak of and listens on loopback only; \
             {} is not loopback: use 127.0.0.1 or ::1",
            options.bind.ip()
        );
        let listener = TcpListener::bind(options.bind)
            .await
            .with_context(|| format!("cannot listen on {}; choose port 0 for a free port", options.bind))?;
        let address = listener.local_addr().context("the listening socket has no address")?;
        let server_name = format!("localhost:{}", address.port());
        let tls = serve::Tls::self_signed()?;
        let certificate_pem = tls.certificate_pem.clone();
        let connections = options.limits.connections;
        let config = Config {
            server_name: server_name.clone(),
            max_delay: options.max_delay,
            delayed_form: options.delayed_form,
            registration: options.registration,
            room_version: options.room_version,
            limits: options.limits,
        };
        let shared = Arc::new(Shared {
            server_name,
            url: format!("http://localhost:{}", address.port()),
            clock: Clock::start(),
            state: Mutex::new(State::new(config, rand::random())),
            waiters: Mutex::default(),
            reschedule: Notify::new(),
            rtc_transports: Mutex::new(options.rtc_transports),
            turn: Mutex::default(),
            turn_requests: AtomicU64::new(0),
            faults: Faults::default(),
        });
        let (stop, stopped) = watch::channel(false);
        let tasks = vec![
            tokio::spawn(serve::accept(listener, tls, connections, shared.clone(), stopped.clone())),
            tokio::spawn(fire_delayed_events(shared.clone(), stopped)),
        ];
        Ok(Self { shared, certificate_pem, address, stop, tasks })
    }

    /// The base URL of the client API: `http://localhost:PORT`.
    pub fn url(&self) -> &str {
        &self.shared.url
    }

    /// The server name in user ids: `localhost:PORT`. With its explicit port no discovery is needed.
    pub fn server_name(&self) -> &str {
        &self.shared.server_name
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The self-signed certificate for `localhost`, `127.0.0.1` and `::1`, to be trusted as a root.
    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// Replaces the list of `rtc/transports` (MSC4143).
    pub fn set_rtc_transports(&self, transports: Vec<Value>) {
        *lock(&self.shared.rtc_transports) = transports;
    }

    /// The TURN servers that users are told from now on; `None`: none.
    pub fn set_turn(&self, turn: Option<Turn>) {
        *lock(&self.shared.turn) = turn;
    }

    /// How often users have asked for TURN servers.
    pub fn turn_requests(&self) -> u64 {
        self.shared.turn_requests.load(Ordering::Relaxed)
    }

    /// How to make it misbehave.
    pub fn faults(&self) -> &Faults {
        &self.shared.faults
    }

    /// Creates a user with one device, logged in. `name` is the localpart: `a-z 0-9 . _ = - / +`.
    ///
    /// # Errors
    /// When the name is taken or unusable, or the server is full.
    pub fn register_user(&self, name: &str, password: &str) -> anyhow::Result<RegisteredUser> {
        let answer = self.shared.with(|state, now| state.register_user(now, name, password));
        let answer = answer.map_err(|refusal| anyhow::anyhow!("cannot register {name}: {}", refusal.body))?;
        let field = |name: &str| answer.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
        Ok(RegisteredUser {
            user_id: field("user_id"),
            device_id: field("device_id"),
            access_token: field("access_token"),
        })
    }

    /// Makes an access token expire: requests with it are refused with `M_UNKNOWN_TOKEN` and `soft_logout`, and the
    /// device may log in again.
    pub fn expire_access_token(&self, token: &str) {
        self.shared.with(|state, _| state.expire_token(token));
    }

    /// Closes every connection and waits until the port is free.
    pub async fn shutdown(mut self) {
        self.stop.send_replace(true);
        for task in std::mem::take(&mut self.tasks) {
            // A task that panicked has ended, too.
            let _ = task.await;
        }
    }
}

impl Drop for DevHomeserver {
    fn drop(&mut self) {
        self.stop.send_replace(true);
        for task in &self.tasks {
            task.abort();
        }
    }
}

impl fmt::Debug for DevHomeserver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DevHomeserver").field("url", &self.shared.url).finish_non_exhaustive()
    }
}

/// TURN servers that share a secret with the homeserver, as coturn does with `use-auth-secret`.
#[derive(Clone)]
pub struct Turn {
    /// `turn:` URLs.
    pub uris: Vec<String>,
    /// The shared secret.
    pub secret: String,
    /// How long the credentials of one answer hold.
    pub ttl: Duration,
}

impl fmt::Debug for Turn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Turn").field("uris", &self.uris).field("ttl", &self.ttl).finish_non_exhaustive()
    }
}

/// A user made by [`DevHomeserver::register_user`].
#[derive(Clone)]
#[non_exhaustive]
pub struct RegisteredUser {
    /// `@name:localhost:PORT`.
    pub user_id: String,
    /// The device the token belongs to.
    pub device_id: String,
    /// For `Authorization: Bearer`.
    pub access_token: String,
}

impl fmt::Debug for RegisteredUser {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RegisteredUser")
            .field("user_id", &self.user_id)
            .field("device_id", &self.device_id)
            .field("access_token", &"[redacted]")
            .finish()
    }
}

/// What connections and tasks have in common.
struct Shared {
    server_name: String,
    url: String,
    clock: Clock,
    state: Mutex<State>,
    /// Long polls, by user.
    waiters: Mutex<HashMap<UserId, Arc<Notify>>>,
    /// The next delayed event may be due at another time than the timer thinks.
    reschedule: Notify,
    rtc_transports: Mutex<Vec<Value>>,
    turn: Mutex<Option<Turn>>,
    turn_requests: AtomicU64,
    faults: Faults,
}

impl Shared {
    /// One mutation, then drain: wakes the long polls that have news and the timer when its deadline moved.
    fn with<T>(&self, mutate: impl FnOnce(&mut State, Timestamp) -> T) -> T {
        let mut state = lock(&self.state);
        let deadline = state.next_deadline();
        let result = mutate(&mut state, self.clock.now());
        let (woken, moved) = (state.take_woken(), state.next_deadline() != deadline);
        drop(state);
        if !woken.is_empty() {
            let waiters = lock(&self.waiters);
            for waiter in woken.iter().filter_map(|user| waiters.get(user)) {
                waiter.notify_waiters();
            }
        }
        if moved {
            self.reschedule.notify_one();
        }
        result
    }

    fn waiter(&self, user: &UserId) -> Arc<Notify> {
        lock(&self.waiters).entry(user.clone()).or_default().clone()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Wall-clock time that never steps back: read once, then carried on by the monotonic clock.
struct Clock {
    epoch: u64,
    started: tokio::time::Instant,
}

impl Clock {
    fn start() -> Self {
        let epoch = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);
        Self { epoch, started: tokio::time::Instant::now() }
    }

    fn now(&self) -> Timestamp {
        Timestamp(self.epoch + self.started.elapsed().as_millis() as u64)
    }

    fn instant(&self, at: Timestamp) -> tokio::time::Instant {
        self.started + Duration::from_millis(at.0.saturating_sub(self.epoch))
    }
}

async fn fire_delayed_events(shared: Arc<Shared>, mut stopped: watch::Receiver<bool>) {
    loop {
        let deadline = shared.with(|state, _| state.next_deadline());
        let due = async {
            match deadline {
                Some(at) => tokio::time::sleep_until(shared.clock.instant(at)).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = due => shared.with(|state, now| state.fire_due(now)),
            () = shared.reschedule.notified() => {}
            () = asked_to_stop(&mut stopped) => return,
        }
    }
}

/// Also returns when the homeserver itself is gone.
async fn asked_to_stop(stopped: &mut watch::Receiver<bool>) {
    let _ = stopped.wait_for(|stopped| *stopped).await;
}
