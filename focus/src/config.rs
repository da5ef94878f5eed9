//! The operator's settings: one TOML file, then the environment, then flags. Unknown keys are errors.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use url::Url;

use crate::token::{Keys, Secret};

/// Shortest secret that is accepted outside development, in characters: as many as HS256 has bytes of security.
pub const MIN_SECRET: usize = 32;
/// Port of HTTP and WebSockets.
pub const HTTP_PORT: u16 = 7880;
/// UDP port of the media.
pub const UDP_PORT: u16 = 7882;

/// Everything that [`Focus::start`](crate::Focus::start) needs to know.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Config {
    /// Where HTTP and WebSockets are served. A reverse proxy stands in front, so loopback is the default.
    pub http_bind: SocketAddr,
    /// Where clients reach the SFU: `wss://…`. `None`: the bound address, for development.
    pub public_url: Option<Url>,
    /// Where clients reach the authorisation service: `https://…`. `None`: derived from
    /// [`public_url`](Self::public_url), if that ends in `/livekit/sfu`.
    pub public_jwt_url: Option<Url>,
    /// Where media are received.
    pub udp_bind: SocketAddr,
    /// The addresses that clients send media to; empty: the bound one. Port 0 stands for the bound port.
    pub advertised: Vec<SocketAddr>,
    /// The API keys; the first signs.
    pub keys: Keys,
    /// Whether joining makes a room. In MatrixRTC the authorisation service makes rooms.
    pub auto_create: bool,
    /// How long a room waits for its first participant.
    pub empty_timeout: Duration,
    /// How long a room outlives its last participant.
    pub departure_timeout: Duration,
    /// Most participants in a room; 0: no limit.
    pub max_participants: u32,
    /// The authorisation service in this process; `None`: it runs elsewhere.
    pub jwt: Option<JwtConfig>,
    /// Development: everything on loopback, with leniencies that a deployment must not have.
    pub dev: bool,
}

/// The authorisation service.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct JwtConfig {
    /// Homeservers whose users may create rooms.
    pub full_access: FullAccess,
    /// Client-server API base URLs by server name, in place of discovery.
    pub cs_api_url_overrides: BTreeMap<String, Url>,
    /// Where delegated leaves are kept, a directory of this process alone; `None`: in memory, so that a restart
    /// forgets them.
    pub state_dir: Option<PathBuf>,
}

impl JwtConfig {
    fn new(full_access: FullAccess) -> Self {
        Self { full_access, cs_api_url_overrides: BTreeMap::new(), state_dir: None }
    }
}

/// Whose users may create rooms.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FullAccess {
    /// Everybody's.
    All,
    /// Those of these homeservers.
    Only(Vec<String>),
    /// Those of homeservers on loopback: development.
    Loopback,
}

impl Config {
    /// Development, as LiveKit's `--dev`: loopback, HTTP 7880, UDP 7882, key `devkey` with the secret `secret`, rooms
    /// made on join, homeservers on loopback accepted whatever their certificate.
    pub fn dev() -> Self {
        Self {
            http_bind: (Ipv4Addr::LOCALHOST, HTTP_PORT).into(),
            public_url: None,
            public_jwt_url: None,
            udp_bind: (Ipv4Addr::LOCALHOST, UDP_PORT).into(),
            advertised: Vec::new(),
            keys: Keys::new().with("devkey", Secret::new("secret")),
            auto_create: true,
            empty_timeout: Duration::from_secs(300),
            departure_timeout: Duration::from_secs(20),
            max_participants: 0,
            jwt: Some(JwtConfig::new(FullAccess::Loopback)),
            dev: true,
        }
    }

    /// As [`dev`](Self::dev), on ports that the system chooses: for tests and demonstrations in one process.
    pub fn dev_ephemeral() -> Self {
        let mut config = Self::dev();
        config.http_bind.set_port(0);
        config.udp_bind.set_port(0);
        config
    }

    /// Reads a configuration from a TOML file's text and overrides.
    ///
    /// # Errors
    ///
    /// [`ConfigError`], which names the key and what to write instead.
    pub fn from_toml(text: &str, overrides: &Overrides) -> Result<Self, ConfigError> {
        let file: File = toml::from_str(text).map_err(|error| ConfigError::Toml(Box::new(error)))?;
        file.resolve(overrides)
    }

    /// Reads the configuration file, if there is one, and applies the overrides.
    ///
    /// # Errors
    ///
    /// [`ConfigError`] if the file cannot be read, or as [`from_toml`](Self::from_toml).
    pub fn load(path: Option<&Path>, overrides: &Overrides) -> Result<Self, ConfigError> {
        let text = match path {
            Some(path) => std::fs::read_to_string(path)
                .map_err(|source| ConfigError::Unreadable { path: path.to_owned(), source })?,
            None => String::new(),
        };
        Self::from_toml(&text, overrides)
    }

    /// Development with overrides. Only loopback addresses are accepted.
    ///
    /// # Errors
    ///
    /// [`ConfigError::DevAddress`] if an address is not loopback.
    pub fn dev_with(overrides: &Overrides) -> Result<Self, ConfigError> {
        let mut config = Self::dev();
        if let Some(bind) = overrides.http_bind {
            config.http_bind = bind;
        }
        if let Some(bind) = overrides.udp_bind {
            config.udp_bind = bind;
        }
        config.advertised.clone_from(&overrides.advertised);
        if let (Some(key), Some(secret)) = (&overrides.key, &overrides.secret) {
            config.keys = Keys::new().with(key, secret.clone());
        }
        config.public_url.clone_from(&overrides.public_url);
        if let Some(jwt) = &mut config.jwt {
            jwt.state_dir.clone_from(&overrides.state_dir);
        }
        config.check()?;
        Ok(config)
    }

    /// Checks what types cannot.
    ///
    /// # Errors
    ///
    /// [`ConfigError`], which says what to change.
    pub fn check(&self) -> Result<(), ConfigError> {
        if self.keys.first().is_none() {
            return Err(ConfigError::NoKey);
        }
        if self.dev {
            let addresses = [self.http_bind, self.udp_bind];
            for address in addresses.iter().chain(&self.advertised) {
                if !address.ip().is_loopback() {
                    return Err(ConfigError::DevAddress(*address));
                }
            }
            return Ok(());
        }
        for (key, secret) in self.keys.iter() {
            if secret.expose().chars().count() < MIN_SECRET {
                return Err(ConfigError::ShortSecret(key.to_owned()));
            }
        }
        let Some(url) = &self.public_url else { return Err(ConfigError::NoPublicUrl) };
        if !matches!(url.scheme(), "ws" | "wss") || url.host_str().is_none() {
            return Err(ConfigError::BadPublicUrl(url.to_string()));
        }
        if self.advertised.is_empty() && self.udp_bind.ip().is_unspecified() {
            return Err(ConfigError::NoAdvertised);
        }
        if let Some(address) = self.advertised.iter().find(|address| address.ip().is_unspecified()) {
            return Err(ConfigError::Unspecified(*address));
        }
        if self.jwt.is_some() && self.jwt_url().is_none() {
            return Err(ConfigError::NoJwtUrl);
        }
        Ok(())
    }

    /// Where clients reach the authorisation service, if that is known without the bound address.
    pub fn jwt_url(&self) -> Option<Url> {
        if let Some(url) = &self.public_jwt_url {
            return Some(url.clone());
        }
        let sfu = self.public_url.as_ref()?;
        let base = sfu.as_str().trim_end_matches('/').strip_suffix("/livekit/sfu")?;
        let base = base.replacen("ws", "http", 1);
        Url::parse(&format!("{base}/livekit/jwt")).ok()
    }
}

/// What environment and flags say; it wins over the file.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Overrides {
    /// Replaces `http.bind`.
    pub http_bind: Option<SocketAddr>,
    /// Replaces `public_url`.
    pub public_url: Option<Url>,
    /// Replaces `media.bind`.
    pub udp_bind: Option<SocketAddr>,
    /// Replaces `media.advertise`.
    pub advertised: Vec<SocketAddr>,
    /// Together with [`secret`](Self::secret) replaces `keys`.
    pub key: Option<String>,
    /// See [`key`](Self::key).
    pub secret: Option<Secret>,
    /// Replaces `jwt.full_access_homeservers`.
    pub full_access: Option<Vec<String>>,
    /// Replaces `jwt.state_dir`.
    pub state_dir: Option<PathBuf>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    public_url: Option<Url>,
    #[serde(default)]
    http: HttpSection,
    #[serde(default)]
    media: MediaSection,
    #[serde(default)]
    keys: toml::Table,
    #[serde(default)]
    rooms: RoomsSection,
    #[serde(default)]
    jwt: JwtSection,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct HttpSection {
    bind: Option<SocketAddr>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct MediaSection {
    bind: Option<SocketAddr>,
    #[serde(default)]
    advertise: Vec<Advertised>,
}

/// An address, with the port or without.
#[derive(Deserialize)]
#[serde(untagged)]
enum Advertised {
    Socket(SocketAddr),
    Host(IpAddr),
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RoomsSection {
    #[serde(default)]
    auto_create: bool,
    empty_timeout_seconds: Option<u32>,
    departure_timeout_seconds: Option<u32>,
    #[serde(default)]
    max_participants: u32,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct JwtSection {
    #[serde(default = "yes")]
    enabled: bool,
    public_url: Option<Url>,
    #[serde(default)]
    full_access_homeservers: Vec<String>,
    #[serde(default)]
    cs_api_url_overrides: BTreeMap<String, Url>,
    state_dir: Option<PathBuf>,
}

impl Default for JwtSection {
    fn default() -> Self {
        Self {
            enabled: true,
            public_url: None,
            full_access_homeservers: Vec::new(),
            cs_api_url_overrides: BTreeMap::new(),
            state_dir: None,
        }
    }
}

fn yes() -> bool {
    true
}

impl File {
    fn resolve(self, overrides: &Overrides) -> Result<Config, ConfigError> {
        let mut keys = Keys::new();
        match (&overrides.key, &overrides.secret) {
            (Some(key), Some(secret)) => keys = keys.with(key, secret.clone()),
            (None, None) => {
                for (key, secret) in self.keys {
                    // Not through serde: its error would print the secret.
                    let toml::Value::String(secret) = secret else { return Err(ConfigError::BadSecret(key)) };
                    keys = keys.with(key, Secret::new(secret));
                }
            }
            _ => return Err(ConfigError::HalfKey),
        }
        let advertised = if overrides.advertised.is_empty() {
            let address = |advertised: &Advertised| match advertised {
                Advertised::Socket(address) => *address,
                Advertised::Host(host) => SocketAddr::new(*host, 0),
            };
            self.media.advertise.iter().map(address).collect()
        } else {
            overrides.advertised.clone()
        };
        let seconds =
            |seconds: Option<u32>, default: u64| Duration::from_secs(seconds.map_or(default, u64::from));
        let homeservers = overrides.full_access.clone().unwrap_or(self.jwt.full_access_homeservers);
        let everybody = matches!(homeservers.as_slice(), [only] if only == "*");
        let config = Config {
            http_bind: overrides
                .http_bind
                .or(self.http.bind)
                .unwrap_or_else(|| (Ipv4Addr::LOCALHOST, HTTP_PORT).into()),
            public_url: overrides.public_url.clone().or(self.public_url),
            public_jwt_url: self.jwt.public_url,
            udp_bind: overrides
                .udp_bind
                .or(self.media.bind)
                .unwrap_or_else(|| (Ipv4Addr::UNSPECIFIED, UDP_PORT).into()),
            advertised,
            keys,
            auto_create: self.rooms.auto_create,
            empty_timeout: seconds(self.rooms.empty_timeout_seconds, 300),
            departure_timeout: seconds(self.rooms.departure_timeout_seconds, 20),
            max_participants: self.rooms.max_participants,
            jwt: self.jwt.enabled.then_some(JwtConfig {
                full_access: if everybody { FullAccess::All } else { FullAccess::Only(homeservers) },
                cs_api_url_overrides: self.jwt.cs_api_url_overrides,
                state_dir: overrides.state_dir.clone().or(self.jwt.state_dir),
            }),
            dev: false,
        };
        config.check()?;
        Ok(config)
    }
}

/// What is wrong with the operator's settings, and what to write instead.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("the configuration file {path} cannot be read; `focus init` writes one")]
    Unreadable {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The file is not the TOML that is expected. The sentence says where; it does not show the line, which could
    /// be a secret.
    #[error("the configuration file is wrong{}: {}", place(.0), .0.message())]
    Toml(Box<toml::de::Error>),
    /// No key.
    #[error("there is no API key: write one under [keys] (`focus init` makes a good one)")]
    NoKey,
    /// Key without secret or the opposite.
    #[error("give both FOCUS_KEY and FOCUS_SECRET, or neither")]
    HalfKey,
    /// A secret is not a string.
    #[error("the secret of the key {0:?} must be a string")]
    BadSecret(String),
    /// A secret can be guessed.
    #[error("the secret of the key {0:?} has fewer than {MIN_SECRET} characters (only `--dev` accepts that)")]
    ShortSecret(String),
    /// The SFU's public address is missing.
    #[error(
        "public_url is missing: write where clients reach this server, like wss://rtc.example.org/livekit/sfu"
    )]
    NoPublicUrl,
    /// The SFU's public address is no WebSocket address.
    #[error("public_url is {0}, but must begin with wss:// (or ws://, without TLS) and name a host")]
    BadPublicUrl(String),
    /// The authorisation service's public address cannot be derived.
    #[error("jwt.public_url is missing, and can only be derived if public_url ends in /livekit/sfu")]
    NoJwtUrl,
    /// Nobody would know where to send media.
    #[error("media.advertise is missing: write the address at which clients reach this machine's UDP port")]
    NoAdvertised,
    /// Nobody can send media there.
    #[error("media.advertise has {0}, to which nobody can send; write this machine's public address")]
    Unspecified(SocketAddr),
    /// Development is for one machine.
    #[error("{0} is not a loopback address; --dev accepts no other, as anybody could make rooms")]
    DevAddress(SocketAddr),
}

fn place(error: &toml::de::Error) -> String {
    error.span().map(|span| format!(" at byte {}", span.start)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
        public_url = "wss://rtc.example.org/livekit/sfu"
        [media]
        advertise = ["203.0.113.5"]
        [keys]
        APIkey = "0123456789abcdef0123456789abcdef"
    "#;

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::from_toml(text, &Overrides::default())
    }

    #[test]
    fn a_deployment_has_none_of_the_leniencies_of_development() {
        let config = parse(GOOD).unwrap();
        assert!(!config.dev && !config.auto_create);
        assert_eq!(config.http_bind, (Ipv4Addr::LOCALHOST, 7880).into());
        assert_eq!(config.advertised, ["203.0.113.5:0".parse().unwrap()]);
        assert_eq!(config.jwt_url().unwrap().as_str(), "https://rtc.example.org/livekit/jwt");
        assert_eq!(config.jwt.unwrap().full_access, FullAccess::Only(vec![]));
    }

    #[test]
    fn unknown_keys_are_errors_that_name_them() {
        for text in ["htttp = 1", "[http]\nport = 1", "[rooms]\nautocreate = true", "[jwt]\nenable = true"] {
            let error = parse(&format!("{text}\n")).unwrap_err().to_string();
            assert!(error.contains("unknown field"), "{error}");
        }
    }

    #[test]
    fn what_is_missing_or_wrong_is_said() {
        let says = |text: &str, word: &str| {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        };
        says("", "API key");
        says(&GOOD.replace("0123456789abcdef0123456789abcdef", "short"), "fewer than 32");
        says(
            &GOOD.replace("public_url = \"wss://rtc.example.org/livekit/sfu\"", ""),
            "public_url is missing",
        );
        says(&GOOD.replace("wss:", "https:"), "must begin with wss://");
        says(&GOOD.replace("/livekit/sfu", ""), "jwt.public_url");
        says(&GOOD.replace("advertise", "# advertise"), "media.advertise");
        says(&GOOD.replace("203.0.113.5", "0.0.0.0"), "nobody can send");
        says(&GOOD.replace("\"0123456789abcdef0123456789abcdef\"", "5"), "must be a string");
    }

    #[test]
    fn no_error_shows_a_secret() {
        let text = GOOD.replace("0123456789abcdef0123456789abcdef\"", "hunter2hunter2");
        let error = parse(&text).unwrap_err();
        assert!(!error.to_string().contains("hunter2"), "{error}");
        assert!(!format!("{:?}", parse(GOOD).unwrap()).contains("0123456789abcdef"));
    }

    #[test]
    fn overrides_win_over_the_file() {
        let overrides = Overrides {
            http_bind: Some("127.0.0.1:1".parse().unwrap()),
            full_access: Some(vec!["*".into()]),
            key: Some("other".into()),
            secret: Some(Secret::new("x".repeat(32))),
            ..Overrides::default()
        };
        let config = Config::from_toml(GOOD, &overrides).unwrap();
        assert_eq!(config.http_bind.port(), 1);
        assert_eq!(config.keys.first().unwrap().0, "other");
        assert_eq!(config.jwt.unwrap().full_access, FullAccess::All);
        let half = Overrides { key: Some("other".into()), ..Overrides::default() };
        assert!(matches!(Config::from_toml(GOOD, &half), Err(ConfigError::HalfKey)));
    }

    #[test]
    fn development_stays_on_loopback() {
        let overrides =
            Overrides { http_bind: Some("0.0.0.0:7880".parse().unwrap()), ..Overrides::default() };
        assert!(matches!(Config::dev_with(&overrides), Err(ConfigError::DevAddress(_))));
        assert!(Config::dev_with(&Overrides::default()).unwrap().auto_create);
    }
}
