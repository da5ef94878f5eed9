//! What an operator may set, as types. [`setting`] lists the settings, [`sources`] says where each is read from, and
//! [`load`] how.
//!
//! Every failure says which setting, what was wrong with it, and what to write instead.

mod bind;
mod load;
mod print;
mod setting;
mod sources;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, io,
    path::PathBuf,
    str::FromStr,
    time::Duration,
};

use url::Url;

pub use self::{
    bind::Bind,
    setting::{SETTINGS, Setting},
    sources::Sources,
};
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use self::{load::properties::lists_of_servers, sources::properties::settings_file};
pub use crate::limits::{Network, Rate, TrustedProxies};
use crate::{
    delegation::DelegationConfig, homeserver_side::HomeserverSide, openid::ServerName, secret::Secret,
    store::StoreConfig,
};

/// Everything a [`Service`](crate::Service) needs to know.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Settings {
    /// The SFU's URL, given to clients as it stands here.
    pub livekit_url: String,
    /// The SFU's API key.
    pub key: String,
    /// The SFU's API secret.
    pub secret: Secret,
    /// Whose users may make rooms exist. [`Settings::new`] says nobody's.
    pub full_access: FullAccess,
    /// Whose users get tokens at all, beside those named in `full_access`; `None`: everybody's. Upper and lower
    /// case are the same.
    pub allowed_homeservers: Option<BTreeSet<String>>,
    /// What users without full access may do in the calls that they enter.
    pub restricted_users: RestrictedUsers,
    /// Whether homeservers' certificates are checked. The SFU's always is.
    pub insecure_skip_verify_tls: TlsPolicy,
    /// Server names that may be on private addresses, beside those named in `full_access` and
    /// `cs_api_url_overrides`.
    pub private_homeservers: BTreeSet<String>,
    /// Client-server API base URLs by server name in lower case, in place of discovery.
    pub cs_api_url_overrides: BTreeMap<String, Url>,
    /// Access tokens for restarting and sending delayed events, by server name in lower case, for homeservers
    /// that want one beside the delay id.
    pub delayed_event_tokens: BTreeMap<String, Secret>,
    /// The homeserver for which the endpoints of the newest MSC4195 are served; `None`: they are not there.
    pub homeserver: Option<HomeserverSide>,
    /// How long a client's token is valid: one hour.
    pub token_lifetime: Duration,
    /// Bounds on what one request, and all together, may use.
    pub limits: Limits,
}

impl Settings {
    /// Settings for the SFU at `livekit_url` with its API key and secret. Nobody has full access,
    /// certificates are checked, strangers' servers must be on public addresses.
    pub fn new(livekit_url: impl Into<String>, key: impl Into<String>, secret: impl Into<Secret>) -> Self {
        Self {
            livekit_url: livekit_url.into(),
            key: key.into(),
            secret: secret.into(),
            full_access: FullAccess::Only(BTreeSet::new()),
            allowed_homeservers: None,
            restricted_users: RestrictedUsers::default(),
            insecure_skip_verify_tls: TlsPolicy::Verify,
            private_homeservers: BTreeSet::new(),
            cs_api_url_overrides: BTreeMap::new(),
            delayed_event_tokens: BTreeMap::new(),
            homeserver: None,
            token_lifetime: Duration::from_hours(1),
            limits: Limits::default(),
        }
    }

    /// Settings from environment variables, which `variable` looks up. See [`Config::from_env`] for those of
    /// the program itself.
    ///
    /// # Errors
    /// [`ConfigError`] for the first variable that is missing or wrong.
    pub fn from_env(variable: &impl Fn(&str) -> Option<String>) -> Result<Self, ConfigError> {
        Ok(Config::from_env(variable)?.settings)
    }

    /// Whether users of `server_name` get tokens at all.
    pub fn admits(&self, server_name: &str) -> bool {
        let Some(allowed) = &self.allowed_homeservers else { return true };
        // Full access for all means: for all that are allowed.
        (self.full_access != FullAccess::All && self.full_access.includes(server_name))
            || allowed.iter().any(|name| name.eq_ignore_ascii_case(server_name))
    }
}

/// Whose users have full access: the SFU room is created for them. Other users get a token too, but only
/// enter rooms that exist.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FullAccess {
    /// Users of every homeserver.
    All,
    /// Users of these homeservers. Upper and lower case are the same.
    Only(BTreeSet<String>),
    /// Users of homeservers whose name is a loopback host: for development.
    Loopback,
}

impl FullAccess {
    /// Whether users of `server_name` have it.
    pub fn includes(&self, server_name: &str) -> bool {
        match self {
            Self::All => true,
            Self::Only(names) => names.iter().any(|name| name.eq_ignore_ascii_case(server_name)),
            Self::Loopback => server_name.parse().is_ok_and(|name: ServerName| name.is_loopback()),
        }
    }
}

impl fmt::Display for FullAccess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All => f.write_str("*"),
            Self::Only(names) => f.write_str(&names.iter().map(String::as_str).collect::<Vec<_>>().join(",")),
            Self::Loopback => f.write_str("loopback"),
        }
    }
}

/// What users without full access may do in a call.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum RestrictedUsers {
    /// What everybody may, as with lk-jwt-service.
    #[default]
    Publish,
    /// Watch and listen: no media, no data, no metadata of their own.
    Listen,
}

impl FromStr for RestrictedUsers {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "publish" => Ok(Self::Publish),
            "listen" => Ok(Self::Listen),
            _ => Err(()),
        }
    }
}

/// Which homeservers' TLS certificates are checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum TlsPolicy {
    /// All.
    Verify,
    /// None, and homeservers may be on any address. Whoever can answer for a homeserver's name can then pose
    /// as any of its users.
    SkipAll,
    /// All but those whose name is a loopback host: for development.
    SkipLoopback,
}

/// Bounds on what requests may use.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Limits {
    /// Token requests served at once; those beyond are answered 429.
    pub in_flight: usize,
    /// Requests from one address (IPv4) or one /64 network (IPv6). Only where the address is known: served
    /// with [`serve`](crate::serve), or by a server that adds axum's `ConnectInfo<SocketAddr>`.
    pub per_address: Option<Rate>,
    /// Lookups at one homeserver.
    pub per_server: Option<Rate>,
    /// Lookups in progress at one homeserver at once.
    pub server_in_flight: usize,
    /// Lookups in progress at one homeserver that have run for more than 5 s, beyond which no new one is
    /// begun there: it hangs, and must not take everybody's places.
    pub server_hanging: usize,
    /// Whose `X-Forwarded-For` and `X-Request-Id` are believed.
    pub trusted_proxies: TrustedProxies,
    /// The largest request body, in bytes.
    pub body: usize,
    /// Time to receive a request body.
    pub body_time: Duration,
    /// Time for a whole OpenID lookup: discovery, connecting, answer.
    pub lookup: Duration,
    /// Time for one TCP connect to a homeserver, and again for its TLS handshake.
    pub connect: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            in_flight: 4096,
            per_address: Some(Rate { per_second: 100, burst: 500 }),
            per_server: Some(Rate { per_second: 1000, burst: 4000 }),
            server_in_flight: 2048,
            server_hanging: 64,
            trusted_proxies: TrustedProxies::default(),
            body: 64 * 1024,
            body_time: Duration::from_secs(10),
            lookup: Duration::from_secs(30),
            connect: Duration::from_secs(5),
        }
    }
}

/// The settings of the program `jwt-service`: those of the service, and where to listen, what to log and where
/// to keep jobs.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Config {
    /// The service's settings.
    pub settings: Settings,
    /// Where to listen.
    pub bind: Bind,
    /// The certificate to serve with; `None`: plain HTTP, a reverse proxy does TLS.
    pub tls: Option<TlsFiles>,
    /// Connections held at once; more wait in the system's queue.
    pub connections: usize,
    /// Connections from one address at once, trusted proxies aside; `None`: any number.
    pub address_connections: Option<usize>,
    /// Where to serve metrics; `None`: nowhere.
    pub metrics: Option<Bind>,
    /// Where delegated leaves are kept.
    pub store: StoreConfig,
    /// Bounds and habits of delegated leave.
    pub delegation: DelegationConfig,
    /// How long requests and delayed events in progress may take to end after the signal to stop.
    pub grace: Duration,
    /// What to log.
    pub log_level: LogLevel,
    /// In which form.
    pub log_format: LogFormat,
    /// What the operator should read, though the program can run.
    pub warnings: Vec<Warning>,
}

impl Config {
    /// Reads the environment variables that the program knows; `variable` looks one up.
    ///
    /// # Errors
    /// [`ConfigError`] for the first variable that is missing or wrong.
    pub fn from_env(variable: &impl Fn(&str) -> Option<String>) -> Result<Self, ConfigError> {
        Self::load(&Sources::from_env(variable))
    }

    /// Reads every setting from `sources`: flags win over environment variables, these over the file.
    ///
    /// # Errors
    /// [`ConfigError`] for the first setting that is missing or wrong.
    pub fn load(sources: &Sources) -> Result<Self, ConfigError> {
        load::config(sources)
    }

    /// Only where and how to listen: all that a health check needs.
    ///
    /// # Errors
    /// [`ConfigError`] if it is wrong.
    pub fn listening(sources: &Sources) -> Result<(Bind, Option<TlsFiles>), ConfigError> {
        Ok((load::bind(sources, &mut Vec::new())?, load::tls(sources)?))
    }

    /// The settings in effect as a TOML file, each with where it came from. Secrets are redacted; what is
    /// printed can be a file again once they are filled in.
    pub fn print(sources: &Sources) -> String {
        print::print(sources)
    }
}

/// A certificate to serve with, and its key: paths of PEM files.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct TlsFiles {
    /// The certificate and the chain below it.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

/// How much to log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogLevel {
    /// Every request and lookup.
    Debug,
    /// Start, tokens issued, refusals.
    #[default]
    Info,
    /// What may need attention.
    Warn,
    /// What failed on our side.
    Error,
}

impl FromStr for LogLevel {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text.to_ascii_lowercase().as_str() {
            "debug" => Ok(Self::Debug),
            "info" => Ok(Self::Info),
            "warn" | "warning" => Ok(Self::Warn),
            "error" => Ok(Self::Error),
            _ => Err(()),
        }
    }
}

/// How a log line looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line, for machines.
    Json,
}

/// Something the operator should know about the configuration.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Warning {
    /// Certificates are not checked.
    #[error(
        "LIVEKIT_INSECURE_SKIP_VERIFY_TLS is on: homeservers' certificates are NOT checked, and homeservers may \
         be on any address, this machine's own networks included. Whoever can answer for a homeserver's name can \
         pose as any of its users. Never use this outside development."
    )]
    TlsNotVerified,
    /// The variable is set, but not to the magic value.
    #[error(
        "LIVEKIT_INSECURE_SKIP_VERIFY_TLS has no effect: certificates are checked; only the value \
         YES_I_KNOW_WHAT_I_AM_DOING turns that off"
    )]
    TlsStillVerified,
    /// The log level is not known.
    #[error("LIVEKIT_LOG_LEVEL: {0:?} is not a level; using info; write debug, info, warn or error")]
    UnknownLogLevel(String),
    /// The port variable is old.
    #[error("LIVEKIT_JWT_PORT is deprecated; write LIVEKIT_JWT_BIND=:{0} instead")]
    DeprecatedPort(u16),
    /// The full-access list is empty.
    #[error(
        "LIVEKIT_FULL_ACCESS_HOMESERVERS names no server: nobody can start a call, only join a running one"
    )]
    NobodyHasFullAccess,
    /// A star in a list.
    #[error(
        "LIVEKIT_JWT_ALLOWED_HOMESERVERS: * means everyone only when it stands alone; in a list it has no effect"
    )]
    WildcardInAllowed,
    /// A star in a list.
    #[error(
        "LIVEKIT_FULL_ACCESS_HOMESERVERS: * means everyone only when it stands alone; in a list it has no \
         effect"
    )]
    WildcardInList,
    /// A star in a list.
    #[error(
        "LIVEKIT_PRIVATE_HOMESERVERS: * has no effect here; write the name of each server that is on a private \
         address"
    )]
    WildcardInPrivate,
    /// An entry of a list of servers that no server has for a name.
    #[error(
        "{place}: {name:?} is no server name and never matches; write what comes after the colon in Matrix IDs, \
         such as example.com"
    )]
    NoServer {
        /// The variable, the flag, or the key and its file.
        place: String,
        /// The entry.
        name: String,
    },
    /// Jobs are kept in memory.
    #[error(
        "delegated leaves are kept in memory alone: when this service restarts, every one of them is forgotten \
         and the homeservers remove users who are still in calls; set LIVEKIT_JWT_STATE_DIR or LIVEKIT_REDIS_URL"
    )]
    NothingPersisted,
}

/// Why the configuration cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// A required setting is nowhere.
    #[error("{variable} is not set; write {advice}")]
    Missing {
        /// The variable.
        variable: &'static str,
        /// What to write.
        advice: &'static str,
    },
    /// A setting's value is not usable.
    #[error("{place}: {problem}; write {advice}")]
    Malformed {
        /// The variable, the flag, or the key and its file.
        place: String,
        /// What is wrong. Never quotes a secret.
        problem: String,
        /// What to write.
        advice: String,
    },
    /// A file named by a setting cannot be read.
    #[error("{place}: {path} cannot be read; check the path and that this process may read it", path = path.display())]
    Unreadable {
        /// The variable, the flag, or the key and its file.
        place: String,
        /// The file.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// Two settings exclude each other.
    #[error("{0} and {1} are both set; keep {0} and unset {1}")]
    Conflict(String, String),
    /// One setting needs another.
    #[error("{0} is set and {1} is not; set both or neither")]
    Alone(String, &'static str),
    /// The file is not TOML.
    #[error("{path} is not TOML: {problem} (line {line})", path = path.display())]
    NotToml {
        /// The file.
        path: PathBuf,
        /// Where.
        line: usize,
        /// The parser's reason. It does not quote the line, which may hold a secret.
        problem: String,
    },
    /// The file has a key that means nothing.
    #[error("{path}: there is no setting {key:?}; {advice}", path = path.display())]
    UnknownKey {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// The likely one, or where to find them all.
        advice: String,
    },
}
