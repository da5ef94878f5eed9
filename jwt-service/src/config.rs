//! What an operator may set, read from the environment variables of lk-jwt-service into types.
//!
//! An unset variable and an empty one are the same thing. Every failure says which variable, what was wrong
//! with it, and what to write instead.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, fs, io,
    path::PathBuf,
    str::FromStr,
    time::Duration,
};

use url::Url;

use crate::{openid::ServerName, secret::Secret, sfu};

/// The only value that turns certificate checks off: nobody writes it by accident.
const MAGIC: &str = "YES_I_KNOW_WHAT_I_AM_DOING";

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
    /// Whether homeservers' certificates are checked. The SFU's always is.
    pub insecure_skip_verify_tls: TlsPolicy,
    /// Server names that may be on private addresses, beside those named in `full_access` and
    /// `cs_api_url_overrides`.
    pub private_homeservers: BTreeSet<String>,
    /// Client-server API base URLs by server name, in place of discovery.
    pub cs_api_url_overrides: BTreeMap<String, Url>,
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
            insecure_skip_verify_tls: TlsPolicy::Verify,
            private_homeservers: BTreeSet::new(),
            cs_api_url_overrides: BTreeMap::new(),
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
            body: 64 * 1024,
            body_time: Duration::from_secs(10),
            lookup: Duration::from_secs(30),
            connect: Duration::from_secs(5),
        }
    }
}

/// The settings of the program `jwt-service`: those of the service, and where to listen and what to log.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Config {
    /// The service's settings.
    pub settings: Settings,
    /// Where to listen.
    pub bind: Bind,
    /// What to log.
    pub log_level: LogLevel,
    /// What the operator should read, though the program can run.
    pub warnings: Vec<Warning>,
}

impl Config {
    /// Reads the environment variables that the program knows; `variable` looks one up.
    ///
    /// # Errors
    /// [`ConfigError`] for the first variable that is missing or wrong.
    pub fn from_env(variable: &impl Fn(&str) -> Option<String>) -> Result<Self, ConfigError> {
        let variable = |name: &str| variable(name).filter(|value| !value.is_empty());
        let mut warnings = Vec::new();

        let log_level = variable("LIVEKIT_LOG_LEVEL").map_or(LogLevel::Info, |text| {
            text.parse().unwrap_or_else(|()| {
                warnings.push(Warning::UnknownLogLevel(text));
                LogLevel::Info
            })
        });
        let skip_tls = variable("LIVEKIT_INSECURE_SKIP_VERIFY_TLS");
        let insecure_skip_verify_tls = match skip_tls.as_deref() {
            Some(MAGIC) => {
                warnings.push(Warning::TlsNotVerified);
                TlsPolicy::SkipAll
            }
            Some(_) => {
                warnings.push(Warning::TlsStillVerified);
                TlsPolicy::Verify
            }
            None => TlsPolicy::Verify,
        };
        let (key, secret) = key_and_secret(&variable)?;
        let livekit_url = variable("LIVEKIT_URL").ok_or(ConfigError::Missing {
            variable: "LIVEKIT_URL",
            advice: "the SFU's address as clients reach it, such as wss://sfu.example.com",
        })?;
        // Not quoted: it may hold a password, which is one of the reasons to refuse it.
        if sfu::api_base(&livekit_url).is_err() {
            return Err(malformed(
                "LIVEKIT_URL",
                "not an address to which API paths can be appended",
                "ws:// or wss://, a host, and a port or path if needed, without user name, query or fragment",
            ));
        }
        let full_access =
            full_access(&variable("LIVEKIT_FULL_ACCESS_HOMESERVERS").ok_or(ConfigError::Missing {
                variable: "LIVEKIT_FULL_ACCESS_HOMESERVERS",
                advice: "the server names whose users may start calls, separated by commas, or * for all",
            })?);
        if let FullAccess::Only(names) = &full_access {
            if names.is_empty() {
                warnings.push(Warning::NobodyHasFullAccess);
            }
            if names.contains("*") {
                warnings.push(Warning::WildcardInList);
            }
        }
        let bind = bind(&variable, &mut warnings)?;
        if let Some(seconds) = variable("LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS") {
            let digits = seconds.strip_prefix('+').unwrap_or(&seconds);
            if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
                return Err(malformed(
                    "LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS",
                    format_args!("{seconds:?} is not a whole number of seconds"),
                    "a number such as 60, or 0 for off",
                ));
            }
            if digits.bytes().any(|b| b != b'0') {
                warnings.push(Warning::NoDelegation("LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS"));
            }
        }
        let cs_api_url_overrides = variable("LIVEKIT_CS_API_URL_OVERRIDES")
            .map_or_else(|| Ok(BTreeMap::new()), |text| overrides(&text))?;
        // Refused, not ignored: jobs of an earlier service that wait in Redis would silently be nobody's.
        if variable("LIVEKIT_REDIS_URL").is_some() {
            return Err(ConfigError::NotInThisVersion {
                variable: "LIVEKIT_REDIS_URL",
                what: "delegated leave, which is what Redis keeps,",
                advice: "unset it; clients then keep their delayed leave alive themselves",
            });
        }
        let private_homeservers = names(&variable("LIVEKIT_PRIVATE_HOMESERVERS").unwrap_or_default());

        let mut settings = Settings::new(livekit_url, key, secret);
        settings.full_access = full_access;
        settings.insecure_skip_verify_tls = insecure_skip_verify_tls;
        settings.private_homeservers = private_homeservers;
        settings.cs_api_url_overrides = cs_api_url_overrides;
        Ok(Self { settings, bind, log_level, warnings })
    }

    /// Only the address to listen on: all that a health check needs.
    ///
    /// # Errors
    /// [`ConfigError`] if it is wrong.
    pub fn bind_from_env(variable: &impl Fn(&str) -> Option<String>) -> Result<Bind, ConfigError> {
        bind(&|name: &str| variable(name).filter(|value| !value.is_empty()), &mut Vec::new())
    }
}

/// Where to listen: `host:port`, `:port` for all interfaces, `[v6]:port`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bind {
    host: Option<String>,
    port: u16,
}

impl Bind {
    /// The host, without the brackets of IPv6; `None` is all interfaces.
    pub fn host(&self) -> Option<&str> {
        self.host.as_deref()
    }

    /// The port; 0 lets the system choose one.
    pub fn port(&self) -> u16 {
        self.port
    }
}

impl Default for Bind {
    /// All interfaces, port 8080.
    fn default() -> Self {
        Self { host: None, port: 8080 }
    }
}

impl FromStr for Bind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (host, port) =
            text.rsplit_once(':').ok_or_else(|| format!("{text:?} has no colon before the port"))?;
        let port = port.parse().map_err(|_| format!("{port:?} is not a port (0 to 65535)"))?;
        let host = match host.strip_prefix('[') {
            Some(v6) => v6.strip_suffix(']').ok_or_else(|| format!("{text:?} lacks a closing bracket"))?,
            None if host.contains(':') => return Err(format!("{text:?} is IPv6 without brackets")),
            None => host,
        };
        Ok(Self { host: (!host.is_empty()).then(|| host.to_owned()), port })
    }
}

impl fmt::Display for Bind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            Some(host) if host.contains(':') => write!(f, "[{host}]:{}", self.port),
            Some(host) => write!(f, "{host}:{}", self.port),
            None => write!(f, ":{}", self.port),
        }
    }
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
        "LIVEKIT_FULL_ACCESS_HOMESERVERS: * means everyone only when it stands alone; in a list it has no \
         effect"
    )]
    WildcardInList,
    /// A setting of delegated leave.
    #[error("{0} has no effect: this version does not offer delegated leave")]
    NoDelegation(&'static str),
}

/// Why the configuration cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// A required variable is not set.
    #[error("{variable} is not set; write {advice}")]
    Missing {
        /// The variable.
        variable: &'static str,
        /// What to write.
        advice: &'static str,
    },
    /// A variable's value is not usable.
    #[error("{variable}: {problem}; write {advice}")]
    Malformed {
        /// The variable.
        variable: &'static str,
        /// What is wrong. Never quotes a secret.
        problem: String,
        /// What to write.
        advice: &'static str,
    },
    /// A file named by a variable cannot be read.
    #[error("{variable}: {path} cannot be read; check the path and that this process may read it", path = path.display())]
    Unreadable {
        /// The variable.
        variable: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// Two variables exclude each other.
    #[error("{0} and {1} are both set; keep {0} and unset {1}")]
    Conflict(&'static str, &'static str),
    /// A setting for something that is not there yet.
    #[error("{variable} is set, but {what} is not in this version; {advice}")]
    NotInThisVersion {
        /// The variable.
        variable: &'static str,
        /// What is missing.
        what: &'static str,
        /// What to do.
        advice: &'static str,
    },
}

fn malformed(variable: &'static str, problem: impl fmt::Display, advice: &'static str) -> ConfigError {
    ConfigError::Malformed { variable, problem: problem.to_string(), advice }
}

/// Key and secret: from the two-in-one file, else each from its own file, else each from its variable.
fn key_and_secret(variable: &impl Fn(&str) -> Option<String>) -> Result<(String, Secret), ConfigError> {
    let (key, secret) = if let Some(path) = variable("LIVEKIT_KEY_FILE") {
        key_file(&read("LIVEKIT_KEY_FILE", path)?)?
    } else {
        let source = |file: &'static str, plain: &'static str| match variable(file) {
            Some(path) => read(file, path),
            None => Ok(Secret::new(variable(plain).unwrap_or_default())),
        };
        (
            source("LIVEKIT_KEY_FROM_FILE", "LIVEKIT_KEY")?,
            source("LIVEKIT_SECRET_FROM_FILE", "LIVEKIT_SECRET")?,
        )
    };
    // Editors end files with line breaks. Tabs stay: they may belong to the secret.
    let trim = |secret: &Secret| secret.expose().trim_matches([' ', '\r', '\n']).to_owned();
    let (key, secret) = (trim(&key), Secret::new(trim(&secret)));
    if key.is_empty() {
        return Err(ConfigError::Missing {
            variable: "LIVEKIT_KEY",
            advice: "the SFU's API key, or name a file that holds it in LIVEKIT_KEY_FROM_FILE, or a file \
                     with `key: secret` in LIVEKIT_KEY_FILE",
        });
    }
    if secret.is_empty() {
        return Err(ConfigError::Missing {
            variable: "LIVEKIT_SECRET",
            advice: "the SFU's API secret, or name a file that holds it in LIVEKIT_SECRET_FROM_FILE, or a file \
                     with `key: secret` in LIVEKIT_KEY_FILE",
        });
    }
    Ok((key, secret))
}

/// One `key: secret` line. The secret may contain colons.
fn key_file(text: &Secret) -> Result<(Secret, Secret), ConfigError> {
    const VARIABLE: &str = "LIVEKIT_KEY_FILE";
    const ADVICE: &str = "one line, `key: secret`, into that file";
    let mut lines =
        text.expose().lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    let line = lines.next().ok_or_else(|| malformed(VARIABLE, "the file is empty", ADVICE))?;
    if lines.next().is_some() {
        return Err(malformed(VARIABLE, "the file has more than one line", ADVICE));
    }
    let (key, secret) =
        line.split_once(':').ok_or_else(|| malformed(VARIABLE, "the file has no colon", ADVICE))?;
    Ok((Secret::new(key), Secret::new(secret)))
}

fn read(variable: &'static str, path: String) -> Result<Secret, ConfigError> {
    let path = PathBuf::from(path);
    fs::read_to_string(&path).map(Secret::new).map_err(|source| ConfigError::Unreadable {
        variable,
        path,
        source,
    })
}

fn full_access(text: &str) -> FullAccess {
    let names = names(text);
    if names.len() == 1 && names.contains("*") { FullAccess::All } else { FullAccess::Only(names) }
}

/// Names separated by commas or white space.
fn names(text: &str) -> BTreeSet<String> {
    text.replace(',', " ").split_whitespace().map(str::to_owned).collect()
}

fn bind(
    variable: &impl Fn(&str) -> Option<String>,
    warnings: &mut Vec<Warning>,
) -> Result<Bind, ConfigError> {
    match (variable("LIVEKIT_JWT_BIND"), variable("LIVEKIT_JWT_PORT")) {
        (Some(_), Some(_)) => Err(ConfigError::Conflict("LIVEKIT_JWT_BIND", "LIVEKIT_JWT_PORT")),
        (Some(bind), None) => bind.parse().map_err(|problem: String| {
            malformed("LIVEKIT_JWT_BIND", problem, "host:port, or :8080 for all interfaces")
        }),
        (None, Some(port)) => {
            let port = port.parse().map_err(|_| {
                malformed(
                    "LIVEKIT_JWT_PORT",
                    format_args!("{port:?} is not a port (0 to 65535)"),
                    "LIVEKIT_JWT_BIND=:8080 instead, with your port",
                )
            })?;
            warnings.push(Warning::DeprecatedPort(port));
            Ok(Bind { host: None, port })
        }
        (None, None) => Ok(Bind::default()),
    }
}

/// `server_name=url`, separated by commas. A name occurring twice has the last URL.
fn overrides(text: &str) -> Result<BTreeMap<String, Url>, ConfigError> {
    const ADVICE: &str = "server_name=https://host for each, separated by commas, without a comma at the end";
    let wrong = |problem: fmt::Arguments<'_>| malformed("LIVEKIT_CS_API_URL_OVERRIDES", problem, ADVICE);
    let entry = |entry: &str| {
        let (name, url) =
            entry.split_once('=').ok_or_else(|| wrong(format_args!("{:?} has no =", entry.trim())))?;
        let (name, url) = (name.trim(), url.trim());
        if name.is_empty() || url.is_empty() {
            return Err(wrong(format_args!("{:?} lacks a name or a URL", entry.trim())));
        }
        let url = Url::parse(url)
            .ok()
            .filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host())
            .ok_or_else(|| wrong(format_args!("the URL for {name:?} does not begin with https://host")))?;
        Ok((name.to_owned(), url))
    };
    text.split(',').map(entry).collect()
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    const GOOD: [(&str, &str); 4] = [
        ("LIVEKIT_URL", "wss://sfu.example.com"),
        ("LIVEKIT_KEY", "key"),
        ("LIVEKIT_SECRET", "hunter2"),
        ("LIVEKIT_FULL_ACCESS_HOMESERVERS", "example.com"),
    ];

    fn config(changes: &[(&str, &str)]) -> Result<Config, ConfigError> {
        let mut variables: BTreeMap<&str, &str> = GOOD.into();
        variables.extend(changes.iter().copied());
        Config::from_env(&|name| variables.get(name).map(|v| (*v).to_owned()))
    }

    fn refused(changes: &[(&str, &str)]) -> String {
        let text = config(changes).expect_err("must be refused").to_string();
        assert!(!text.contains("hunter2"), "{text}");
        text
    }

    fn file(content: &str) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(content.as_bytes()).unwrap();
        file
    }

    #[test]
    fn the_minimum_is_enough() {
        let config = config(&[]).unwrap();
        assert_eq!(config.settings.livekit_url, "wss://sfu.example.com");
        assert_eq!(config.settings.full_access, FullAccess::Only(["example.com".to_owned()].into()));
        assert_eq!(config.settings.insecure_skip_verify_tls, TlsPolicy::Verify);
        assert_eq!(config.bind.to_string(), ":8080");
        assert_eq!(config.log_level, LogLevel::Info);
        assert_eq!(config.warnings, []);
        assert!(!format!("{config:?}").contains("hunter2"));
    }

    #[test]
    fn each_missing_variable_is_named() {
        for (name, _) in GOOD {
            let text = refused(&[(name, "")]);
            assert!(text.starts_with(&format!("{name} is not set; write ")), "{text}");
        }
    }

    #[test]
    fn the_full_access_list_is_split_and_the_star_stands_alone() {
        let list = |text| config(&[("LIVEKIT_FULL_ACCESS_HOMESERVERS", text)]).unwrap().settings.full_access;
        let only = |names: &[&str]| FullAccess::Only(names.iter().map(|n| (*n).to_owned()).collect());
        assert_eq!(list("*"), FullAccess::All);
        assert_eq!(list(" * ,"), FullAccess::All);
        assert_eq!(list("a,b c\u{2003}d,,e"), only(&["a", "b", "c", "d", "e"]));
        assert_eq!(list("*,a"), only(&["*", "a"]));
        assert_eq!(list(","), only(&[]));
        assert!(list("Example.com").includes("example.COM"));
        assert!(!list("*,a").includes("b"));
        assert!(!list("a").includes("a:8448"));
        assert!(FullAccess::All.includes("anything"));
        assert!(FullAccess::Loopback.includes("localhost:8448") && !FullAccess::Loopback.includes("a"));
    }

    #[test]
    fn listen_addresses_have_go_syntax() {
        let bind = |text| config(&[("LIVEKIT_JWT_BIND", text)]).map(|c| (c.bind.host, c.bind.port));
        assert_eq!(bind(":80").unwrap(), (None, 80));
        assert_eq!(bind("127.0.0.1:81").unwrap(), (Some("127.0.0.1".into()), 81));
        assert_eq!(bind("[::1]:82").unwrap(), (Some("::1".into()), 82));
        assert_eq!(bind("localhost:0").unwrap(), (Some("localhost".into()), 0));
        for bad in ["8080", ":", ":x", ":65536", "::1:80", "[::1:80", "host"] {
            assert!(refused(&[("LIVEKIT_JWT_BIND", bad)]).starts_with("LIVEKIT_JWT_BIND: "), "{bad}");
        }
    }

    #[test]
    fn the_old_port_variable_works_alone() {
        let old = config(&[("LIVEKIT_JWT_PORT", "9000")]).unwrap();
        assert_eq!(old.bind.to_string(), ":9000");
        assert_eq!(old.warnings, [Warning::DeprecatedPort(9000)]);
        let both = refused(&[("LIVEKIT_JWT_PORT", "9000"), ("LIVEKIT_JWT_BIND", ":9000")]);
        assert!(both.contains("unset LIVEKIT_JWT_PORT"), "{both}");
        assert!(refused(&[("LIVEKIT_JWT_PORT", "x")]).starts_with("LIVEKIT_JWT_PORT: "));
    }

    #[test]
    fn only_the_magic_words_turn_certificate_checks_off() {
        let tls = |text| config(&[("LIVEKIT_INSECURE_SKIP_VERIFY_TLS", text)]).unwrap();
        assert_eq!(tls(MAGIC).settings.insecure_skip_verify_tls, TlsPolicy::SkipAll);
        assert_eq!(tls(MAGIC).warnings, [Warning::TlsNotVerified]);
        for other in ["true", "1", "yes_i_know_what_i_am_doing", "YES_I_KNOW_WHAT_I_AM_DOING "] {
            assert_eq!(tls(other).settings.insecure_skip_verify_tls, TlsPolicy::Verify);
            assert_eq!(tls(other).warnings, [Warning::TlsStillVerified]);
        }
        assert_eq!(tls("").warnings, []);
    }

    #[test]
    fn keys_come_from_files_too() {
        let loaded = |changes: &[(&str, &str)]| {
            let settings = config(changes).unwrap().settings;
            (settings.key, settings.secret.expose().to_owned())
        };
        let both = file("filekey: filesecret\n");
        let path = both.path().to_str().unwrap();
        assert_eq!(loaded(&[("LIVEKIT_KEY_FILE", path)]), ("filekey".into(), "filesecret".into()));
        let colon = file("k: a:b\n");
        let path = colon.path().to_str().unwrap();
        assert_eq!(loaded(&[("LIVEKIT_KEY_FILE", path)]), ("k".into(), "a:b".into()));
        let secret = file("\tsecret\t\r\n");
        let path = secret.path().to_str().unwrap();
        assert_eq!(loaded(&[("LIVEKIT_SECRET_FROM_FILE", path)]), ("key".into(), "\tsecret\t".into()));
        let key = file("onlykey\n");
        let path = key.path().to_str().unwrap();
        assert_eq!(loaded(&[("LIVEKIT_KEY_FROM_FILE", path)]), ("onlykey".into(), "hunter2".into()));
    }

    #[test]
    fn bad_key_files_are_refused_without_quoting_them() {
        for content in ["", "hunter2", "a: hunter2\nb: hunter2\n"] {
            let bad = file(content);
            let text = refused(&[("LIVEKIT_KEY_FILE", bad.path().to_str().unwrap())]);
            assert!(text.starts_with("LIVEKIT_KEY_FILE: the file "), "{text}");
        }
        for name in ["LIVEKIT_KEY_FILE", "LIVEKIT_KEY_FROM_FILE", "LIVEKIT_SECRET_FROM_FILE"] {
            let text = refused(&[(name, "/nonexistent/file")]);
            assert!(text.starts_with(&format!("{name}: /nonexistent/file cannot be read")), "{text}");
        }
    }

    #[test]
    fn overrides_map_names_to_urls() {
        let map = config(&[(
            "LIVEKIT_CS_API_URL_OVERRIDES",
            " a.org = https://x/?q=1, [2001:db8::1]:8448=https://y ,127.0.0.1:8448=http://127.0.0.1:8008,\
             a.org=http://z",
        )])
        .unwrap()
        .settings
        .cs_api_url_overrides;
        let map: Vec<_> = map.iter().map(|(n, u)| (n.as_str(), u.as_str())).collect();
        assert_eq!(
            map,
            [
                ("127.0.0.1:8448", "http://127.0.0.1:8008/"),
                ("[2001:db8::1]:8448", "https://y/"),
                ("a.org", "http://z/")
            ]
        );
        for bad in ["a", "=https://x", "a=", "a=https://x,", "a=x.org", "a=ftp://x", ","] {
            let text = refused(&[("LIVEKIT_CS_API_URL_OVERRIDES", bad)]);
            assert!(text.starts_with("LIVEKIT_CS_API_URL_OVERRIDES: "), "{text}");
        }
    }

    #[test]
    fn what_this_version_lacks_is_said() {
        let redis = refused(&[("LIVEKIT_REDIS_URL", "redis://:hunter2@localhost")]);
        assert!(redis.starts_with("LIVEKIT_REDIS_URL is set, but delegated leave"), "{redis}");
        let sanity = |text| config(&[("LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS", text)]).unwrap().warnings;
        assert_eq!(sanity("+060"), [Warning::NoDelegation("LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS")]);
        assert_eq!(sanity("00"), []);
        for bad in ["-1", " 1", "1.5", "+", "x"] {
            let text = refused(&[("LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS", bad)]);
            assert!(text.contains(&format!("{bad:?}")), "{text}");
        }
    }

    #[test]
    fn log_levels_are_case_insensitive_and_an_unknown_one_is_info() {
        let level = |text| config(&[("LIVEKIT_LOG_LEVEL", text)]).unwrap();
        assert_eq!(level("DEBUG").log_level, LogLevel::Debug);
        assert_eq!(level("Warning").log_level, LogLevel::Warn);
        assert_eq!(level("error").log_level, LogLevel::Error);
        assert_eq!(level("loud").log_level, LogLevel::Info);
        assert_eq!(level("loud").warnings, [Warning::UnknownLogLevel("loud".into())]);
    }

    #[test]
    fn an_sfu_url_nobody_can_call_is_refused() {
        for bad in ["sfu.example.com", "localhost:7880", "ftp://x", "ws://u:hunter2@x"] {
            assert!(refused(&[("LIVEKIT_URL", bad)]).starts_with("LIVEKIT_URL: "), "{bad}");
        }
    }
}
