//! Jobs in Redis, in the hash of lk-jwt-service, and leases for several replicas.
//!
//! Jobs need `PING`, `HSET`, `HDEL` and `HGETALL` of a server that speaks RESP2, and nothing else. Leases need
//! `EVAL`; where a server refuses it (an old one, a proxy, an access list), they are granted to everybody and
//! the log says so: such a server carries one replica. What replicas tell each other needs `PUBLISH` and
//! `SUBSCRIBE`; without these nothing is told, which with one replica nobody misses.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    str::FromStr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use base64::{Engine as _, engine::general_purpose::STANDARD_NO_PAD};
use futures_util::StreamExt as _;
use percent_encoding::percent_decode_str;
use redis::{
    AsyncConnectionConfig, Client, Cmd, ConnectionAddr, ConnectionInfo, ErrorKind, FromRedisValue,
    IntoConnectionInfo as _, RedisConnectionInfo, RedisError, ServerErrorKind, aio::MultiplexedConnection,
};
use sha2::{Digest as _, Sha256};
use tokio::time::timeout;
use url::{Url, form_urlencoded};

use super::{Heard, Store, StoreError, wire};
use crate::delegation::{JobKey, StoredJob};

const KIND: &str = "redis";
const DEFAULT_HOST: &str = "localhost";
const DEFAULT_PORT: u16 = 6379;

const DIAL_TIMEOUT: Duration = Duration::from_secs(5);
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(3);
/// For one call of the store, with whatever it has to wait for.
const CALL_TIMEOUT: Duration = DIAL_TIMEOUT.saturating_add(RESPONSE_TIMEOUT);

/// After this long without a message, whoever listens asks the server whether it is still there.
const SILENCE: Duration = Duration::from_secs(15);

/// Takes a lease, or prolongs it for who has it.
const LEASE: &str = "local holder = redis.call('GET', KEYS[1]) \
    if holder and holder ~= ARGV[1] then return 0 end \
    redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2]) return 1";
const RELEASE: &str =
    "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0";

/// A store on a Redis server. It connects when it is used, and again whenever the connection is lost.
pub struct RedisStore {
    server: RedisUrl,
    client: Arc<Client>,
    prefix: String,
    hash: String,
    connection: tokio::sync::Mutex<Slot>,
    /// Fields that were read under another name than [`wire::field`] gives them.
    names: Mutex<HashMap<JobKey, Vec<u8>>>,
    leases: Leases,
    /// Whether the server behind the open connection refuses `PUBLISH`.
    mute: AtomicBool,
}

impl RedisStore {
    /// What the keys of lk-jwt-service begin with: its jobs are in `lk-jwt:jobs`.
    pub const DEFAULT_PREFIX: &str = "lk-jwt:";

    /// A store on `server` with its jobs in the hash `<prefix>jobs`, its leases below `<prefix>lease:` and what
    /// replicas tell each other on the channel `<prefix>notices`. Does not connect yet.
    ///
    /// With `rediss://` and no process default of rustls, aws-lc-rs is made the default.
    pub fn new(server: RedisUrl, prefix: &str) -> Self {
        if server.tls() && rustls::crypto::CryptoProvider::get_default().is_none() {
            // An error means that somebody else was faster, which is as good.
            let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        }
        Self {
            client: server.client.clone(),
            server,
            hash: format!("{prefix}jobs"),
            prefix: prefix.to_owned(),
            connection: tokio::sync::Mutex::default(),
            names: Mutex::default(),
            leases: Leases::default(),
            mute: AtomicBool::new(false),
        }
    }

    async fn call<T: FromRedisValue>(&self, doing: &'static str, command: &Cmd) -> Result<T, StoreError> {
        self.ask(command).await.map_err(|fault| self.failed(doing, &fault))
    }

    async fn ask<T: FromRedisValue>(&self, command: &Cmd) -> Result<T, Fault> {
        let twice = async {
            match self.ask_once(command).await {
                // The server was restarted since the last command; each of ours may be done twice.
                Err(error) if error.is_connection_dropped() => self.ask_once(command).await,
                result => result,
            }
        };
        match timeout(CALL_TIMEOUT, twice).await {
            Ok(result) => result.map_err(Fault::Redis),
            Err(_) => Err(Fault::TimedOut),
        }
    }

    async fn ask_once<T: FromRedisValue>(&self, command: &Cmd) -> Result<T, RedisError> {
        let (number, mut connection) = self.connection().await?;
        let result = command.query_async(&mut connection).await;
        if let Err(error) = &result
            && !answers(error)
        {
            let mut slot = self.connection.lock().await;
            if slot.number == number {
                slot.open = None;
            }
        }
        result
    }

    /// The connection that is open, or a new one, and which one it is.
    async fn connection(&self) -> Result<(u64, MultiplexedConnection), RedisError> {
        let mut slot = self.connection.lock().await;
        if let Some(open) = &slot.open {
            return Ok((slot.number, open.clone()));
        }
        let limits = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(DIAL_TIMEOUT))
            .set_response_timeout(Some(RESPONSE_TIMEOUT));
        let open = self.client.get_multiplexed_async_connection_with_config(&limits).await?;
        slot.number += 1;
        slot.open = Some(open.clone());
        // It may be another server now, or another version of it.
        self.leases.refused.store(false, Ordering::Relaxed);
        self.mute.store(false, Ordering::Relaxed);
        Ok((slot.number, open))
    }

    /// Whether the script said 1; true if the server runs no scripts.
    async fn script(&self, doing: &'static str, command: &Cmd) -> Result<bool, StoreError> {
        if self.leases.refused.load(Ordering::Relaxed) {
            return Ok(true);
        }
        match self.ask::<i64>(command).await {
            Ok(answer) => Ok(answer == 1),
            Err(Fault::Redis(error)) if refuses(&error) => {
                self.leases.refused.store(true, Ordering::Relaxed);
                if !self.leases.said.swap(true, Ordering::Relaxed) {
                    tracing::warn!(
                        server = %self.server,
                        "this Redis server refuses EVAL, so that there are no leases: run one replica only, \
                         or two will act on the same job"
                    );
                }
                Ok(true)
            }
            Err(fault) => Err(self.failed(doing, &fault)),
        }
    }

    fn channel(&self) -> String {
        format!("{}notices", self.prefix)
    }

    fn lease_key(&self, key: &JobKey) -> String {
        format!("{}lease:{}", self.prefix, STANDARD_NO_PAD.encode(Sha256::digest(wire::field(key))))
    }

    fn command(&self, name: &str) -> Cmd {
        let mut command = redis::cmd(name);
        command.arg(&self.hash);
        command
    }

    fn names(&self) -> MutexGuard<'_, HashMap<JobKey, Vec<u8>>> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn failed(&self, doing: &'static str, fault: &Fault) -> StoreError {
        StoreError { kind: KIND, doing, source: Box::new(RedisFault::new(&self.server, fault)) }
    }

    /// An entry that nobody can use is deleted; if that fails, the next load will do it.
    async fn purge(&self, name: &[u8]) {
        if let Err(error) = self.call::<i64>("purge an entry", self.command("HDEL").arg(name)).await {
            tracing::warn!(error = &error as &dyn std::error::Error, "an unreadable entry stays in Redis");
        }
    }
}

#[async_trait]
impl Store for RedisStore {
    async fn put(&self, job: &StoredJob) -> Result<(), StoreError> {
        let key = &job.params.key;
        let name = self.names().get(key).cloned().unwrap_or_else(|| wire::field(key).into_bytes());
        let value = wire::encode(job);
        let mut command = self.command("HSET");
        self.call::<i64>("write a job", command.arg(name).arg(value.as_str())).await.map(|_| ())
    }

    async fn remove(&self, key: &JobKey) -> Result<(), StoreError> {
        let other = self.names().get(key).cloned();
        if let Some(name) = other {
            self.call::<i64>("remove a job", self.command("HDEL").arg(name)).await?;
        }
        self.call::<i64>("remove a job", self.command("HDEL").arg(wire::field(key))).await?;
        self.names().remove(key);
        Ok(())
    }

    async fn load(&self) -> Result<Vec<StoredJob>, StoreError> {
        let entries: Vec<(Vec<u8>, Vec<u8>)> = self.call("load the jobs", &self.command("HGETALL")).await?;
        let (mut found, mut unusable) = (BTreeMap::<JobKey, (StoredJob, Vec<u8>)>::new(), Vec::new());
        for (name, value) in entries {
            let job = match wire::decode(&value) {
                Ok(job) => job,
                Err(error) => {
                    tracing::warn!(%error, hash = %self.hash, "purging an entry that is no job");
                    unusable.push(name);
                    continue;
                }
            };
            // One job under two names: somebody else escapes differently. The later one counts.
            match found.get(&job.params.key) {
                Some((other, _)) if other.restarted_at >= job.restarted_at => unusable.push(name),
                _ => {
                    let older = found.insert(job.params.key.clone(), (job, name));
                    unusable.extend(older.map(|(_, name)| name));
                }
            }
        }
        let other = |(key, (_, name)): (&JobKey, &(StoredJob, Vec<u8>))| {
            (wire::field(key).as_bytes() != name).then(|| (key.clone(), name.clone()))
        };
        *self.names() = found.iter().filter_map(other).collect();
        for name in unusable {
            self.purge(&name).await;
        }
        Ok(found.into_values().map(|(job, _)| job).collect())
    }

    async fn lease(&self, key: &JobKey, replica: &str, ttl: Duration) -> Result<bool, StoreError> {
        let milliseconds = u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX).clamp(1, MAX_TTL);
        let mut command = redis::cmd("EVAL");
        command.arg(LEASE).arg(1).arg(self.lease_key(key)).arg(replica).arg(milliseconds);
        self.script("lease a job", &command).await
    }

    async fn release(&self, key: &JobKey, replica: &str) -> Result<(), StoreError> {
        let mut command = redis::cmd("EVAL");
        command.arg(RELEASE).arg(1).arg(self.lease_key(key)).arg(replica);
        self.script("release a job", &command).await.map(|_| ())
    }

    async fn tell(&self, message: &[u8]) -> Result<(), StoreError> {
        if self.mute.load(Ordering::Relaxed) {
            return Ok(());
        }
        let mut command = redis::cmd("PUBLISH");
        command.arg(self.channel()).arg(message);
        match self.ask::<i64>(&command).await {
            Ok(_) => Ok(()),
            Err(Fault::Redis(error)) if refuses(&error) => {
                self.mute.store(true, Ordering::Relaxed);
                Ok(())
            }
            Err(fault) => Err(self.failed("tell other replicas", &fault)),
        }
    }

    async fn listen(&self, heard: &Heard) -> Result<(), StoreError> {
        let failed = |error| self.failed("listen to other replicas", &Fault::Redis(error));
        let subscribe = async {
            let mut subscription = self.client.get_async_pubsub().await?;
            subscription.subscribe(self.channel()).await?;
            Ok(subscription)
        };
        let subscription = match timeout(DIAL_TIMEOUT, subscribe).await {
            Ok(Ok(subscription)) => subscription,
            Ok(Err(error)) if refuses(&error) => return Ok(()),
            Ok(Err(error)) => return Err(failed(error)),
            Err(_) => return Err(self.failed("listen to other replicas", &Fault::TimedOut)),
        };
        let (mut sink, mut messages) = subscription.split();
        loop {
            match timeout(SILENCE, messages.next()).await {
                Ok(Some(message)) => heard(message.get_payload_bytes()),
                Ok(None) => {
                    return Err(failed(RedisError::from((ErrorKind::Io, "the connection was closed"))));
                }
                // A connection that died without a word is silent too.
                Err(_) => match timeout(RESPONSE_TIMEOUT, sink.ping::<redis::Value>()).await {
                    Ok(Ok(_)) => {}
                    Ok(Err(error)) => return Err(failed(error)),
                    Err(_) => return Err(self.failed("listen to other replicas", &Fault::TimedOut)),
                },
            }
        }
    }

    async fn check(&self) -> Result<(), StoreError> {
        self.call::<redis::Value>("answer", &redis::cmd("PING")).await.map(|_| ())
    }

    fn kind(&self) -> &'static str {
        KIND
    }
}

impl fmt::Debug for RedisStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisStore")
            .field("server", &self.server)
            .field("hash", &self.hash)
            .finish_non_exhaustive()
    }
}

/// A year: far beyond any job, and far below where Redis overflows.
const MAX_TTL: u64 = 365 * 24 * 3600 * 1000;

#[derive(Default)]
struct Slot {
    number: u64,
    open: Option<MultiplexedConnection>,
}

#[derive(Default)]
struct Leases {
    /// Whether the server behind the open connection refuses them.
    refused: AtomicBool,
    /// Whether the log says so.
    said: AtomicBool,
}

/// Whether the server is there and merely did not do what it was told. After anything else a new connection is
/// better: after a failover, for one, the name stands for another server.
fn answers(error: &RedisError) -> bool {
    matches!(error.kind(), ErrorKind::Server(kind) if kind != ServerErrorKind::ReadOnly)
}

/// Whether the server does not know a command, or not for us.
fn refuses(error: &RedisError) -> bool {
    matches!(error.kind(), ErrorKind::Server(ServerErrorKind::ResponseError | ServerErrorKind::NoPerm))
}

enum Fault {
    TimedOut,
    Redis(RedisError),
}

/// What went wrong, without what was sent: a server quotes the command that it does not like, delay id and all.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
enum RedisFault {
    #[error("the Redis server at {0} does not answer in time; see that it is up and not overloaded")]
    TimedOut(String),
    #[error(
        "no connection to the Redis server at {server} ({reason}); see that it is up and the address right"
    )]
    Unreachable { server: String, reason: String },
    #[error("the Redis server at {server} refused the password or user name of LIVEKIT_REDIS_URL")]
    Login { server: String },
    #[error("the Redis server at {server} answered {code}")]
    Refused { server: String, code: String },
    #[error("what answers at {server} is not a Redis server ({reason})")]
    NotRedis { server: String, reason: String },
}

impl RedisFault {
    fn new(server: &RedisUrl, fault: &Fault) -> Self {
        let server = server.to_string();
        let error = match fault {
            Fault::TimedOut => return Self::TimedOut(server),
            Fault::Redis(error) => error,
        };
        match (error.kind(), error.code()) {
            _ if error.is_timeout() => Self::TimedOut(server),
            (ErrorKind::Io, _) => Self::Unreachable { server, reason: error.to_string() },
            (ErrorKind::AuthenticationFailed, _) | (_, Some("NOAUTH" | "WRONGPASS")) => {
                Self::Login { server }
            }
            (_, Some(code)) => Self::Refused { server, code: code.to_owned() },
            _ => Self::NotRedis { server, reason: error.category().to_owned() },
        }
    }
}

/// Where a Redis server is: `redis://`, `rediss://` (TLS) or `unix://`. Prints without user name and password.
#[derive(Clone)]
pub struct RedisUrl {
    client: Arc<Client>,
    shown: String,
}

impl RedisUrl {
    fn tls(&self) -> bool {
        matches!(self.client.get_connection_info().addr(), ConnectionAddr::TcpTls { .. })
    }

    fn new(address: ConnectionAddr, login: Login, shown: String) -> Result<Self, InvalidRedisUrl> {
        let settings = |address: ConnectionAddr| -> Result<ConnectionInfo, RedisError> {
            let mut settings = RedisConnectionInfo::default().set_db(login.database).set_skip_set_lib_name();
            if let Some(user) = &login.user {
                settings = settings.set_username(user);
            }
            if let Some(password) = &login.password {
                settings = settings.set_password(password);
            }
            Ok(address.into_connection_info()?.set_redis_settings(settings))
        };
        let client = settings(address).and_then(Client::open).map_err(|_| InvalidRedisUrl::NotAUrl)?;
        Ok(Self { client: Arc::new(client), shown })
    }
}

impl FromStr for RedisUrl {
    type Err = InvalidRedisUrl;

    fn from_str(text: &str) -> Result<Self, InvalidRedisUrl> {
        if let Some(rest) = text.strip_prefix("unix://") {
            return unix(rest);
        }
        let url = Url::parse(text).map_err(|_| InvalidRedisUrl::NotAUrl)?;
        let tls = match url.scheme() {
            "redis" => false,
            "rediss" => true,
            _ => return Err(InvalidRedisUrl::Scheme),
        };
        // Without brackets: this goes to the resolver.
        let host = match url.host() {
            Some(url::Host::Ipv6(ip)) => ip.to_string(),
            Some(host) if !host.to_string().is_empty() => decoded(&host.to_string())?,
            _ => DEFAULT_HOST.to_owned(),
        };
        let port = url.port().unwrap_or(DEFAULT_PORT);
        let mut login = Login::new(url.username(), url.password(), url.query().unwrap_or_default())?;
        let path = url.path().trim_matches('/');
        if !path.is_empty() {
            login.database = database(path)?;
        }
        let shown_host = if host.contains(':') { format!("[{host}]") } else { host.clone() };
        let shown = format!("{}://{shown_host}:{port}/{}", url.scheme(), login.database);
        let address = if tls {
            ConnectionAddr::TcpTls { host, port, insecure: false, tls_params: None }
        } else {
            ConnectionAddr::Tcp(host, port)
        };
        Self::new(address, login, shown)
    }
}

impl PartialEq for RedisUrl {
    fn eq(&self, other: &Self) -> bool {
        let parts = |url: &Self| {
            let settings = url.client.get_connection_info().redis_settings().clone();
            (settings.username().map(str::to_owned), settings.password().map(str::to_owned))
        };
        self.shown == other.shown && parts(self) == parts(other)
    }
}

impl Eq for RedisUrl {}

impl fmt::Display for RedisUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.shown)
    }
}

impl fmt::Debug for RedisUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A Redis address that cannot be used. Quotes nothing of it: there may be a password in it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidRedisUrl {
    /// No URL at all, or one without sense.
    #[error("it is not a URL; special characters in a password are written as %XX")]
    NotAUrl,
    /// Another kind of URL.
    #[error("it begins with neither redis://, rediss:// nor unix://")]
    Scheme,
    /// The database is not a number.
    #[error("its database is not a number")]
    Database,
    /// A parameter that means nothing here.
    #[error("its parameter {0} is not known")]
    Parameter(String),
    /// TLS without checks.
    #[error("skip_verify is not supported; name the server's certification authority in SSL_CERT_FILE")]
    SkipVerify,
}

/// `user:password@/path?db=1`, where everything but the path may be missing.
fn unix(rest: &str) -> Result<RedisUrl, InvalidRedisUrl> {
    let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
    let slash = place.find('/').ok_or(InvalidRedisUrl::NotAUrl)?;
    let (login, path) = place.split_at(slash);
    let (user, password) = match login.strip_suffix('@') {
        Some(login) => login.split_once(':').map_or((login, None), |(user, password)| (user, Some(password))),
        None if login.is_empty() => ("", None),
        None => return Err(InvalidRedisUrl::NotAUrl),
    };
    let login = Login::new(user, password, query)?;
    let path = decoded(path)?;
    let shown = format!("unix://{path}?db={}", login.database);
    RedisUrl::new(ConnectionAddr::Unix(path.into()), login, shown)
}

/// Who we are on the server, and where on it.
struct Login {
    user: Option<Arc<str>>,
    password: Option<Arc<str>>,
    database: i64,
}

impl Login {
    fn new(user: &str, password: Option<&str>, query: &str) -> Result<Self, InvalidRedisUrl> {
        let given = |text: String| Some(text).filter(|text| !text.is_empty()).map(Arc::from);
        let mut login = Self {
            user: given(decoded(user)?),
            password: given(decoded(password.unwrap_or_default())?),
            database: 0,
        };
        for (name, value) in form_urlencoded::parse(query.as_bytes()) {
            match &*name {
                "db" => login.database = database(&value)?,
                "user" | "username" => login.user = given(value.into_owned()),
                "pass" | "password" => login.password = given(value.into_owned()),
                "skip_verify" if value != "false" => return Err(InvalidRedisUrl::SkipVerify),
                // They tune go-redis, which makes connections in another way; see the time-outs above.
                name if TUNING.contains(&name) => {}
                name => return Err(InvalidRedisUrl::Parameter(name.chars().take(40).collect())),
            }
        }
        Ok(login)
    }
}

/// Parameters that the reference's client takes.
const TUNING: [&str; 22] = [
    "client_name",
    "conn_max_idle_time",
    "conn_max_lifetime",
    "context_timeout_enabled",
    "dial_timeout",
    "dialer_retries",
    "dialer_retry_timeout",
    "idle_check_frequency",
    "idle_timeout",
    "max_active_conns",
    "max_conn_age",
    "max_idle_conns",
    "max_retries",
    "max_retry_backoff",
    "min_idle_conns",
    "min_retry_backoff",
    "pool_fifo",
    "pool_size",
    "pool_timeout",
    "protocol",
    "read_timeout",
    "write_timeout",
];

fn database(text: &str) -> Result<i64, InvalidRedisUrl> {
    text.parse().ok().filter(|number| *number >= 0).ok_or(InvalidRedisUrl::Database)
}

fn decoded(text: &str) -> Result<String, InvalidRedisUrl> {
    percent_decode_str(text).decode_utf8().map(Into::into).map_err(|_| InvalidRedisUrl::NotAUrl)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parsed(text: &str) -> (String, Option<String>, Option<String>) {
        let url: RedisUrl = text.parse().unwrap();
        let settings = url.client.get_connection_info().redis_settings();
        (url.to_string(), settings.username().map(str::to_owned), settings.password().map(str::to_owned))
    }

    #[test]
    fn addresses_are_read_as_the_reference_reads_them() {
        let nobody = |shown: &str| (shown.to_owned(), None, None);
        let some = |text: &str| Some(text.to_owned());
        assert_eq!(parsed("redis://10.0.0.1"), nobody("redis://10.0.0.1:6379/0"));
        assert_eq!(parsed("redis://h:1/0"), nobody("redis://h:1/0"));
        assert_eq!(parsed("redis://h/7"), nobody("redis://h:6379/7"));
        assert_eq!(parsed("redis://h?db=7&pool_size=3"), nobody("redis://h:6379/7"));
        assert_eq!(parsed("redis://"), nobody("redis://localhost:6379/0"));
        assert_eq!(parsed("rediss://[2001:db8::1]"), nobody("rediss://[2001:db8::1]:6379/0"));
        assert_eq!(parsed("redis://:p%40ss%2F@h"), ("redis://h:6379/0".into(), None, some("p@ss/")));
        assert_eq!(parsed("redis://u:p@h"), ("redis://h:6379/0".into(), some("u"), some("p")));
        assert_eq!(parsed("unix:///run/r.sock"), nobody("unix:///run/r.sock?db=0"));
        assert_eq!(
            parsed("unix://u:p@/run/r.sock?db=2"),
            ("unix:///run/r.sock?db=2".into(), some("u"), some("p"))
        );
        let server: RedisUrl = "rediss://h".parse().unwrap();
        assert!(server.tls());
    }

    #[test]
    fn addresses_that_cannot_work_are_refused() {
        for (text, why) in [
            ("", InvalidRedisUrl::NotAUrl),
            ("localhost", InvalidRedisUrl::NotAUrl),
            ("http://h", InvalidRedisUrl::Scheme),
            ("redis://h/x", InvalidRedisUrl::Database),
            ("redis://h?db=-1", InvalidRedisUrl::Database),
            ("redis://h?colour=1", InvalidRedisUrl::Parameter("colour".into())),
            ("rediss://h?skip_verify=true", InvalidRedisUrl::SkipVerify),
            ("unix://", InvalidRedisUrl::NotAUrl),
            ("unix://host/path", InvalidRedisUrl::NotAUrl),
        ] {
            assert_eq!(text.parse::<RedisUrl>(), Err(why), "{text}");
        }
    }

    #[test]
    fn debug_output_is_redacted() {
        let url: RedisUrl = "redis://operator:hunter2@h".parse().unwrap();
        let store = RedisStore::new(url.clone(), RedisStore::DEFAULT_PREFIX);
        let text = format!("{url:?} {url} {store:?}");
        assert!(!text.contains("hunter2") && !text.contains("operator"), "{text}");
        assert!(text.contains("redis://h:6379/0"), "{text}");
    }

    proptest! {
        #[test]
        fn no_address_makes_it_panic(rest in ".*") {
            for scheme in ["redis://", "unix://", ""] {
                let _ = format!("{scheme}{rest}").parse::<RedisUrl>();
            }
        }
    }
}
