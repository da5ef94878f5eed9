//! From what is written to what is meant: each setting's parser, in the order in which failures are reported.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, fs,
    path::PathBuf,
    time::Duration,
};

use url::Url;

use super::{
    Bind, Config, ConfigError, FullAccess, Limits, LogFormat, LogLevel, Rate, Settings, TlsFiles, TlsPolicy,
    Warning,
    sources::{Found, LAYERS, Sources},
};
use crate::{
    delegation::DelegationConfig,
    homeserver_side::{BadSigningKey, HomeserverSide},
    openid::ServerName,
    secret::Secret,
    sfu,
    store::{RedisStore, RedisUrl, StoreConfig},
};

/// The only value that turns certificate checks off: nobody writes it by accident.
const MAGIC: &str = "YES_I_KNOW_WHAT_I_AM_DOING";

pub(super) fn config(sources: &Sources) -> Result<Config, ConfigError> {
    let mut warnings = Vec::new();
    let log_level = sources.find("LIVEKIT_LOG_LEVEL").map_or(LogLevel::Info, |found| {
        found.text.parse().unwrap_or_else(|()| {
            warnings.push(Warning::UnknownLogLevel(found.text.to_owned()));
            LogLevel::Info
        })
    });
    let insecure_skip_verify_tls = match sources.find("LIVEKIT_INSECURE_SKIP_VERIFY_TLS").map(|f| f.text) {
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
    let (key, secret) = key_and_secret(sources)?;
    let livekit_url = livekit_url(sources)?;
    let full_access = full_access(sources, &mut warnings)?;
    let bind = bind(sources, &mut warnings)?;
    let sanity_interval =
        Number::of(sources, "LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS", "a number such as 60, or 0 for off")
            .within(0, u32::MAX.into())?
            .filter(|seconds| *seconds > 0)
            .map(Duration::from_secs);
    let cs_api_url_overrides =
        sources.find("LIVEKIT_CS_API_URL_OVERRIDES").map_or_else(|| Ok(BTreeMap::new()), overrides)?;
    let store = store(sources)?;
    if store == StoreConfig::Memory {
        warnings.push(Warning::NothingPersisted);
    }

    let mut settings = Settings::new(livekit_url, key, secret);
    settings.full_access = full_access;
    settings.allowed_homeservers = allowed(sources, &mut warnings);
    if let Some(found) = sources.find("LIVEKIT_JWT_RESTRICTED_USERS") {
        settings.restricted_users = found.text.parse().map_err(|()| {
            found.malformed(format_args!("{:?} is nothing they can do", found.text), "publish or listen")
        })?;
    }
    settings.insecure_skip_verify_tls = insecure_skip_verify_tls;
    settings.private_homeservers =
        sources.find("LIVEKIT_PRIVATE_HOMESERVERS").map(|found| names(found.text)).unwrap_or_default();
    settings.cs_api_url_overrides = cs_api_url_overrides;
    settings.delayed_event_tokens = delayed_event_tokens(sources)?;
    settings.homeserver = homeserver(sources)?;
    if let Some(seconds) =
        Number::of(sources, "LIVEKIT_JWT_TOKEN_LIFETIME_SECONDS", "60 to 86400").within(60, 86400)?
    {
        settings.token_lifetime = Duration::from_secs(seconds);
    }
    settings.limits = limits(sources)?;
    let delegation = delegation(sources, &bind, sanity_interval)?;
    Ok(Config {
        settings,
        bind,
        tls: tls(sources)?,
        connections: count(sources, "LIVEKIT_JWT_CONNECTIONS")?.unwrap_or(10_000),
        address_connections: Number::of(
            sources,
            "LIVEKIT_JWT_ADDRESS_CONNECTIONS",
            "a number such as 500, or 0 for no limit",
        )
        .within(0, 10_000_000)?
        .map_or(Some(500), |number| usize::try_from(number).ok().filter(|number| *number > 0)),
        metrics: sources.find("LIVEKIT_JWT_METRICS_BIND").map(metrics).transpose()?,
        store,
        delegation,
        grace: Number::of(sources, "LIVEKIT_JWT_GRACE_SECONDS", "0 to 600")
            .within(0, 600)?
            .map_or(Duration::from_secs(30), Duration::from_secs),
        log_level,
        log_format: match sources.find("LIVEKIT_JWT_LOG_FORMAT") {
            None => LogFormat::Text,
            Some(found) => match found.text {
                "text" => LogFormat::Text,
                "json" => LogFormat::Json,
                other => return Err(found.malformed(format_args!("{other:?} is no format"), "text or json")),
            },
        },
        warnings,
    })
}

/// Key and secret: from the two-in-one file, else each from its own file, else each from its own setting. The
/// first layer that has any of these for the key decides the key, and likewise for the secret.
fn key_and_secret(sources: &Sources) -> Result<(String, Secret), ConfigError> {
    let source = |plain, file, half: fn((Secret, Secret)) -> Secret| {
        for layer in 0..LAYERS {
            if let Some(found) = sources.at(layer, "LIVEKIT_KEY_FILE") {
                return key_file(&found).map(half);
            }
            if let Some(found) = sources.at(layer, file) {
                return read(&found);
            }
            if let Some(found) = sources.at(layer, plain) {
                return Ok(Secret::new(found.text));
            }
        }
        Ok(Secret::new(""))
    };
    let key = source("LIVEKIT_KEY", "LIVEKIT_KEY_FROM_FILE", |(key, _)| key)?;
    let secret = source("LIVEKIT_SECRET", "LIVEKIT_SECRET_FROM_FILE", |(_, secret)| secret)?;
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
fn key_file(found: &Found<'_>) -> Result<(Secret, Secret), ConfigError> {
    const ADVICE: &str = "one line, `key: secret`, into that file";
    let text = read(found)?;
    let says = |line: &&str| !line.trim().is_empty() && !line.trim_start().starts_with('#');
    let mut lines = text.expose().lines().filter(says);
    let line = lines.next().ok_or_else(|| found.malformed("the file is empty", ADVICE))?;
    if lines.next().is_some() {
        return Err(found.malformed("the file has more than one line", ADVICE));
    }
    let (key, secret) =
        line.split_once(':').ok_or_else(|| found.malformed("the file has no colon", ADVICE))?;
    Ok((Secret::new(key), Secret::new(secret)))
}

fn read(found: &Found<'_>) -> Result<Secret, ConfigError> {
    let path = PathBuf::from(found.text);
    fs::read_to_string(&path).map(Secret::new).map_err(|source| ConfigError::Unreadable {
        place: found.place.clone(),
        path,
        source,
    })
}

/// The homeserver to answer for, if its name is set; the rest needs it.
fn homeserver(sources: &Sources) -> Result<Option<HomeserverSide>, ConfigError> {
    const NAME: &str = "LIVEKIT_JWT_HOMESERVER_NAME";
    const URL: &str = "LIVEKIT_JWT_HOMESERVER_URL";
    let as_token = sources.find("LIVEKIT_JWT_HOMESERVER_AS_TOKEN_FILE");
    let signing_key = sources.find("LIVEKIT_JWT_HOMESERVER_SIGNING_KEY_FILE");
    let (name, url) = match (sources.find(NAME), sources.find(URL)) {
        (Some(name), Some(url)) => (name, url),
        (Some(name), None) => return Err(ConfigError::Alone(name.place, URL)),
        (None, url) => {
            return match url.or(as_token).or(signing_key) {
                Some(found) => Err(ConfigError::Alone(found.place, NAME)),
                None => Ok(None),
            };
        }
    };
    let server = name.text.parse().map_err(|_| {
        name.malformed(
            format_args!("{:?} is not a server name", name.text),
            "what comes after the colon in your users' Matrix IDs, such as example.com",
        )
    })?;
    // Not quoted: it may hold a password, which is one of the reasons to refuse it.
    let base = Url::parse(url.text).ok().filter(|base| {
        let plain = base.username().is_empty()
            && base.password().is_none()
            && base.query().is_none()
            && base.fragment().is_none();
        matches!(base.scheme(), "http" | "https") && base.has_host() && plain
    });
    let base = base.ok_or_else(|| {
        url.malformed(
            "not an address to which API paths can be appended",
            "the client-server API as it is reached from here, such as http://127.0.0.1:8008",
        )
    })?;
    let mut side = HomeserverSide::new(server, base);
    if let Some(found) = as_token {
        let token = Secret::new(read(&found)?.expose().trim());
        if token.is_empty() || !token.expose().bytes().all(|b| b.is_ascii_graphic()) {
            return Err(
                found.malformed("the file does not hold a token", "the as_token of the registration into it")
            );
        }
        side.application_service_token = Some(token);
    }
    if let Some(found) = signing_key {
        let key = read(&found)?.expose().parse();
        side.signing_key = Some(key.map_err(|problem: BadSigningKey| {
            found.malformed(problem, "the path of the homeserver's signing key, Synapse's signing_key_path")
        })?);
    }
    Ok(Some(side))
}

fn livekit_url(sources: &Sources) -> Result<String, ConfigError> {
    let found = sources.find("LIVEKIT_URL").ok_or(ConfigError::Missing {
        variable: "LIVEKIT_URL",
        advice: "the SFU's address as clients reach it, such as wss://sfu.example.com",
    })?;
    // Not quoted: it may hold a password, which is one of the reasons to refuse it.
    if sfu::api_base(found.text).is_err() {
        return Err(found.malformed(
            "not an address to which API paths can be appended",
            "ws:// or wss://, a host, and a port or path if needed, without user name, query or fragment",
        ));
    }
    Ok(found.text.to_owned())
}

fn full_access(sources: &Sources, warnings: &mut Vec<Warning>) -> Result<FullAccess, ConfigError> {
    let found = sources.find("LIVEKIT_FULL_ACCESS_HOMESERVERS").ok_or(ConfigError::Missing {
        variable: "LIVEKIT_FULL_ACCESS_HOMESERVERS",
        advice: "the server names whose users may start calls, separated by commas, or * for all",
    })?;
    let names = names(found.text);
    if is_wildcard(found.text) {
        return Ok(FullAccess::All);
    }
    if names.is_empty() {
        warnings.push(Warning::NobodyHasFullAccess);
    }
    if names.contains("*") {
        warnings.push(Warning::WildcardInList);
    }
    Ok(FullAccess::Only(names))
}

/// Whose users get tokens at all; `None` is everybody's.
fn allowed(sources: &Sources, warnings: &mut Vec<Warning>) -> Option<BTreeSet<String>> {
    let text = sources.find("LIVEKIT_JWT_ALLOWED_HOMESERVERS")?.text;
    let names = names(text);
    if is_wildcard(text) {
        return None;
    }
    if names.contains("*") {
        warnings.push(Warning::WildcardInAllowed);
    }
    Some(names)
}

/// Names separated by commas or white space.
fn names(text: &str) -> BTreeSet<String> {
    text.replace(',', " ").split_whitespace().map(str::to_owned).collect()
}

/// Whether a list is a star alone: one that somebody wrote into a longer list is a slip, not everybody.
fn is_wildcard(text: &str) -> bool {
    text.replace(',', " ").split_whitespace().eq(["*"])
}

pub(super) fn bind(sources: &Sources, warnings: &mut Vec<Warning>) -> Result<Bind, ConfigError> {
    for layer in 0..LAYERS {
        match (sources.at(layer, "LIVEKIT_JWT_BIND"), sources.at(layer, "LIVEKIT_JWT_PORT")) {
            (Some(bind), Some(port)) => return Err(ConfigError::Conflict(bind.place, port.place)),
            (Some(bind), None) => {
                return bind.text.parse().map_err(|problem: String| {
                    bind.malformed(problem, "host:port, or :8080 for all interfaces")
                });
            }
            (None, Some(port)) => {
                let number = port.text.parse().map_err(|_| {
                    port.malformed(
                        format_args!("{:?} is not a port (0 to 65535)", port.text),
                        "LIVEKIT_JWT_BIND=:8080 instead, with your port",
                    )
                })?;
                warnings.push(Warning::DeprecatedPort(number));
                return Ok(Bind::everywhere(number));
            }
            (None, None) => {}
        }
    }
    Ok(Bind::default())
}

/// A port alone is one of loopback: metrics are for this machine unless somebody says otherwise.
fn metrics(found: Found<'_>) -> Result<Bind, ConfigError> {
    if let Ok(port) = found.text.parse() {
        return Ok(Bind::loopback(port));
    }
    found.text.parse().map_err(|problem: String| {
        found.malformed(problem, "a port such as 9108 for this machine alone, or host:port")
    })
}

pub(super) fn tls(sources: &Sources) -> Result<Option<TlsFiles>, ConfigError> {
    const CERTIFICATE: &str = "LIVEKIT_JWT_TLS_CERT_FILE";
    const KEY: &str = "LIVEKIT_JWT_TLS_KEY_FILE";
    match (sources.find(CERTIFICATE), sources.find(KEY)) {
        (None, None) => Ok(None),
        (Some(certificate), None) => Err(ConfigError::Alone(certificate.place, KEY)),
        (None, Some(key)) => Err(ConfigError::Alone(key.place, CERTIFICATE)),
        (Some(certificate), Some(key)) => {
            Ok(Some(TlsFiles { certificate: certificate.text.into(), key: key.text.into() }))
        }
    }
}

fn store(sources: &Sources) -> Result<StoreConfig, ConfigError> {
    let prefix = match sources.find("LIVEKIT_JWT_REDIS_PREFIX") {
        Some(found) => {
            let fits = |b: u8| b.is_ascii_graphic();
            if !found.text.bytes().all(fits) || found.text.len() > 64 {
                return Err(found.malformed(
                    "it is longer than 64 bytes, or has white space or letters beyond ASCII",
                    "a word such as lk-jwt:",
                ));
            }
            found.text.to_owned()
        }
        None => RedisStore::DEFAULT_PREFIX.to_owned(),
    };
    match (sources.find("LIVEKIT_REDIS_URL"), sources.find("LIVEKIT_JWT_STATE_DIR")) {
        (Some(redis), Some(directory)) => Err(ConfigError::Conflict(redis.place, directory.place)),
        (Some(redis), None) => {
            let url: RedisUrl = redis.text.parse().map_err(|problem| {
                redis.malformed(
                    problem,
                    "redis://host:6379, rediss://host:6379 for TLS, or unix:///path/of/socket",
                )
            })?;
            Ok(StoreConfig::Redis { url, prefix })
        }
        (None, Some(directory)) => {
            let path = PathBuf::from(directory.text);
            if path.is_relative() {
                return Err(directory.malformed(
                    format_args!("{:?} depends on where the program is started", directory.text),
                    "an absolute path such as /var/lib/jwt-service",
                ));
            }
            Ok(StoreConfig::File(path))
        }
        (None, None) => Ok(StoreConfig::Memory),
    }
}

fn limits(sources: &Sources) -> Result<Limits, ConfigError> {
    let mut limits = Limits::default();
    for (limit, rate, burst) in [
        (&mut limits.per_address, "LIVEKIT_JWT_ADDRESS_RATE", "LIVEKIT_JWT_ADDRESS_BURST"),
        (&mut limits.per_server, "LIVEKIT_JWT_SERVER_RATE", "LIVEKIT_JWT_SERVER_BURST"),
    ] {
        let default = limit.unwrap_or(Rate { per_second: 0, burst: 1 });
        let per_second = Number::of(sources, rate, "requests per second, or 0 for no limit")
            .within(0, 1_000_000)?
            .unwrap_or_else(|| default.per_second.into());
        let burst = Number::of(sources, burst, "1 to 1000000")
            .within(1, 1_000_000)?
            .unwrap_or_else(|| default.burst.into());
        let narrow = |number: u64| u32::try_from(number).unwrap_or(u32::MAX);
        *limit = (per_second > 0).then(|| Rate { per_second: narrow(per_second), burst: narrow(burst) });
    }
    if let Some(number) = count(sources, "LIVEKIT_JWT_SERVER_IN_FLIGHT")? {
        limits.server_in_flight = number;
    }
    if let Some(number) = count(sources, "LIVEKIT_JWT_IN_FLIGHT")? {
        limits.in_flight = number;
    }
    if let Some(found) = sources.find("LIVEKIT_JWT_TRUSTED_PROXIES") {
        limits.trusted_proxies = found.text.parse().map_err(|problem: String| {
            found.malformed(
                problem,
                "addresses such as 192.0.2.7, networks such as 10.0.0.0/8, private, or none",
            )
        })?;
    }
    Ok(limits)
}

fn delegation(
    sources: &Sources,
    bind: &Bind,
    sanity_interval: Option<Duration>,
) -> Result<DelegationConfig, ConfigError> {
    const DAY: u64 = 24 * 60 * 60 * 1000;
    let replica = sources.find("LIVEKIT_JWT_REPLICA").map(|found| found.text.to_owned());
    let mut settings = DelegationConfig::new(replica.unwrap_or_else(|| format!("{}/{bind}", host_name())));
    settings.sanity_interval = sanity_interval;
    let milliseconds = |variable| {
        Number::of(sources, variable, "milliseconds: 1 to 2678400000, which are 31 days").within(1, 31 * DAY)
    };
    if let Some(shortest) = milliseconds("LIVEKIT_JWT_SHORTEST_DELAY_MS")? {
        settings.shortest_delay = Duration::from_millis(shortest);
    }
    if let Some(longest) = milliseconds("LIVEKIT_JWT_LONGEST_DELAY_MS")? {
        settings.longest_delay = Duration::from_millis(longest);
    }
    if settings.shortest_delay > settings.longest_delay {
        let found = sources
            .find("LIVEKIT_JWT_SHORTEST_DELAY_MS")
            .or_else(|| sources.find("LIVEKIT_JWT_LONGEST_DELAY_MS"));
        return Err(ConfigError::Malformed {
            place: found.map_or_else(String::new, |found| found.place),
            problem: "the shortest delay is longer than the longest".to_owned(),
            advice: "a smaller LIVEKIT_JWT_SHORTEST_DELAY_MS or a greater LIVEKIT_JWT_LONGEST_DELAY_MS"
                .to_owned(),
        });
    }
    if let Some(number) = count(sources, "LIVEKIT_JWT_JOBS")? {
        settings.jobs = number;
    }
    if let Some(number) = count(sources, "LIVEKIT_JWT_JOBS_PER_USER")? {
        settings.jobs_per_user = number;
    }
    Ok(settings)
}

/// This machine's, or this container's.
fn host_name() -> String {
    // A machine that does not say is the only one, as far as anybody knows.
    fs::read_to_string("/proc/sys/kernel/hostname")
        .map_or_else(|_| "localhost".to_owned(), |n| n.trim().to_owned())
}

/// How many of something there may be.
fn count(sources: &Sources, variable: &'static str) -> Result<Option<usize>, ConfigError> {
    let number = Number::of(sources, variable, "1 to 10000000").within(1, 10_000_000)?;
    Ok(number.map(|number| usize::try_from(number).unwrap_or(usize::MAX)))
}

/// A whole number in decimal. A plus sign and leading zeros are accepted, as lk-jwt-service does.
struct Number<'a> {
    found: Option<Found<'a>>,
    advice: &'static str,
}

impl<'a> Number<'a> {
    fn of(sources: &'a Sources, variable: &'static str, advice: &'static str) -> Self {
        Self { found: sources.find(variable), advice }
    }

    fn within(self, least: u64, most: u64) -> Result<Option<u64>, ConfigError> {
        let Some(found) = self.found else { return Ok(None) };
        let digits = found.text.strip_prefix('+').unwrap_or(found.text);
        if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
            let problem = format!("{:?} is not a whole number", found.text);
            return Err(found.malformed(problem, self.advice));
        }
        match digits.parse() {
            Ok(number) if (least..=most).contains(&number) => Ok(Some(number)),
            _ => {
                Err(found
                    .malformed(format_args!("{:?} is not from {least} to {most}", found.text), self.advice))
            }
        }
    }
}

/// `server_name=url`, separated by commas. A name occurring twice has the last URL.
fn overrides(found: Found<'_>) -> Result<BTreeMap<String, Url>, ConfigError> {
    const ADVICE: &str = "server_name=https://host for each, separated by commas, without a comma at the end";
    let wrong = |problem: fmt::Arguments<'_>| found.malformed(problem, ADVICE);
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
            // URLs may have hosts that requests may not: `https://a}b`.
            .filter(|url| url.as_str().parse::<hyper::Uri>().is_ok())
            .ok_or_else(|| wrong(format_args!("the URL for {name:?} does not begin with https://host")))?;
        Ok((name.to_ascii_lowercase(), url))
    };
    found.text.split(',').map(entry).collect()
}

/// `server_name=token`, separated by commas, or one a line in a file. Nothing of it is quoted.
fn delayed_event_tokens(sources: &Sources) -> Result<BTreeMap<String, Secret>, ConfigError> {
    const ADVICE: &str = "server_name=token for each: separated by commas, or in a file one a line";
    let listed = sources.find("LIVEKIT_JWT_DELAYED_EVENT_TOKENS");
    let filed = sources.find("LIVEKIT_JWT_DELAYED_EVENT_TOKENS_FROM_FILE");
    let (found, text, separator) = match (listed, filed) {
        (None, None) => return Ok(BTreeMap::new()),
        (Some(listed), Some(filed)) => return Err(ConfigError::Conflict(filed.place, listed.place)),
        (Some(listed), None) => {
            let text = Secret::new(listed.text);
            (listed, text, ',')
        }
        (None, Some(filed)) => {
            let text = read(&filed)?;
            (filed, text, '\n')
        }
    };
    let entries = text.expose().split(separator).map(str::trim);
    let entries =
        entries.enumerate().filter(|(_, e)| separator == ',' || !(e.is_empty() || e.starts_with('#')));
    let entry = |(index, entry): (usize, &str)| {
        let number = index + 1;
        let wrong = |what: &str| found.malformed(format_args!("entry {number} {what}"), ADVICE);
        let (name, token) = entry.split_once('=').ok_or_else(|| wrong("has no ="))?;
        let (name, token) = (name.trim(), token.trim());
        name.parse::<ServerName>().map_err(|_| wrong("does not begin with a server name"))?;
        if token.is_empty() || !token.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(wrong("has no token, or one that is more than a word of ASCII"));
        }
        Ok((name.to_ascii_lowercase(), Secret::new(token)))
    };
    entries.map(entry).collect()
}

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod properties;

#[cfg(test)]
mod tests {
    use std::{io::Write as _, path::Path};

    use super::*;
    use crate::config::{RestrictedUsers, SETTINGS};

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
        assert_eq!(config.warnings, [Warning::NothingPersisted]);
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
    fn the_homeservers_side_is_off_until_its_name_and_url_are_set() {
        const NAME: (&str, &str) = ("LIVEKIT_JWT_HOMESERVER_NAME", "example.com");
        const URL: (&str, &str) = ("LIVEKIT_JWT_HOMESERVER_URL", "http://127.0.0.1:8008");
        assert!(config(&[]).unwrap().settings.homeserver.is_none());
        let side = config(&[NAME, URL]).unwrap().settings.homeserver.unwrap();
        assert_eq!((side.name.as_str(), side.url.as_str()), ("example.com", "http://127.0.0.1:8008/"));
        assert!(side.application_service_token.is_none() && side.signing_key.is_none());

        let token = file("hunter2\r\n");
        let token = ("LIVEKIT_JWT_HOMESERVER_AS_TOKEN_FILE", token.path().to_str().unwrap());
        let seed = format!("ed25519 a_key {}\n", "A".repeat(43));
        let key = file(&seed);
        let key = ("LIVEKIT_JWT_HOMESERVER_SIGNING_KEY_FILE", key.path().to_str().unwrap());
        let side = config(&[NAME, URL, token, key]).unwrap().settings.homeserver.unwrap();
        assert_eq!(side.application_service_token.as_ref().map(Secret::expose), Some("hunter2"));
        assert!(side.signing_key.is_some());
        assert!(!format!("{side:?}").contains("hunter2"));

        for (alone, other) in [(NAME, URL.0), (URL, NAME.0), (token, NAME.0), (key, NAME.0)] {
            let text = refused(&[alone]);
            assert_eq!(text, format!("{} is set and {other} is not; set both or neither", alone.0));
        }
        let spoilt = [("LIVEKIT_JWT_HOMESERVER_NAME", "@a:b"), ("LIVEKIT_JWT_HOMESERVER_NAME", "https://hs")];
        for spoilt in spoilt {
            let text = refused(&[spoilt, URL]);
            assert!(
                text.starts_with("LIVEKIT_JWT_HOMESERVER_NAME: ") && text.contains("; write what"),
                "{text}"
            );
        }
        for url in ["127.0.0.1:8008", "ftp://hs", "https://u:hunter2@hs", "https://hs/?a"] {
            let text = refused(&[NAME, ("LIVEKIT_JWT_HOMESERVER_URL", url)]);
            assert!(text.starts_with("LIVEKIT_JWT_HOMESERVER_URL: not an address"), "{text}");
        }
        for content in ["", "two words", "h\u{fc}nter"] {
            let spoilt = file(content);
            let text = refused(&[NAME, URL, (token.0, spoilt.path().to_str().unwrap())]);
            assert!(text.starts_with("LIVEKIT_JWT_HOMESERVER_AS_TOKEN_FILE: the file"), "{text}");
        }
        let spoilt = file("ed25519 hunter2");
        let text = refused(&[NAME, URL, (key.0, spoilt.path().to_str().unwrap())]);
        assert!(text.starts_with("LIVEKIT_JWT_HOMESERVER_SIGNING_KEY_FILE: the first line is not"), "{text}");
        let text = refused(&[NAME, URL, (key.0, "/nowhere")]);
        assert!(text.contains("cannot be read"), "{text}");
    }

    #[test]
    fn an_empty_variable_is_none() {
        let implied = format!("{:?}", config(&[]).unwrap());
        for setting in SETTINGS.iter().filter(|s| GOOD.iter().all(|(name, _)| *name != s.variable)) {
            let empty = config(&[(setting.variable, "")]).unwrap();
            assert_eq!(format!("{empty:?}"), implied, "{}", setting.variable);
        }
    }

    #[test]
    fn failures_come_in_the_order_of_the_reference() {
        let mut wrong = vec![
            ("LIVEKIT_KEY_FILE", "/nonexistent/file"),
            ("LIVEKIT_URL", "nowhere"),
            ("LIVEKIT_FULL_ACCESS_HOMESERVERS", ""),
            ("LIVEKIT_JWT_BIND", "8080"),
            ("LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS", "x"),
            ("LIVEKIT_CS_API_URL_OVERRIDES", "x"),
            ("LIVEKIT_REDIS_URL", "x"),
        ];
        while !wrong.is_empty() {
            let text = refused(&wrong);
            let (first, _) = wrong.remove(0);
            assert!(text.starts_with(first), "{first}: {text}");
        }
        config(&wrong).unwrap();
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
        let warns = |text| config(&[("LIVEKIT_FULL_ACCESS_HOMESERVERS", text)]).unwrap().warnings;
        assert!(warns("*,a").contains(&Warning::WildcardInList), "it may not be what was meant");
        assert!(warns(",").contains(&Warning::NobodyHasFullAccess));
        assert!(!warns("*").contains(&Warning::WildcardInList));
        assert!(list("Example.com").includes("example.COM"));
        assert!(!list("*,a").includes("b"));
        assert!(!list("a").includes("a:8448"));
        assert!(FullAccess::All.includes("anything"));
        assert!(FullAccess::Loopback.includes("localhost:8448") && !FullAccess::Loopback.includes("a"));
    }

    #[test]
    fn a_list_says_whose_users_get_tokens_at_all() {
        let admits = |changes: &[(&str, &str)], name: &str| config(changes).unwrap().settings.admits(name);
        let list = ("LIVEKIT_JWT_ALLOWED_HOMESERVERS", "a.org, B.org:8448");
        assert!(admits(&[], "anything"));
        assert!(admits(&[("LIVEKIT_JWT_ALLOWED_HOMESERVERS", "*")], "anything"));
        assert!(admits(&[list], "A.org") && admits(&[list], "b.org:8448"));
        assert!(admits(&[list], "example.com"), "full access implies it");
        for name in ["b.org", "c.org", "*", ""] {
            assert!(!admits(&[list], name), "{name}");
            assert!(!admits(&[list, ("LIVEKIT_FULL_ACCESS_HOMESERVERS", "*")], name), "{name}");
        }
        let nobody_else = [("LIVEKIT_JWT_ALLOWED_HOMESERVERS", ",")];
        assert!(admits(&nobody_else, "example.com") && !admits(&nobody_else, "a.org"));
        let star = config(&[("LIVEKIT_JWT_ALLOWED_HOMESERVERS", "*,a.org")]).unwrap();
        assert!(!star.settings.admits("c.org") && star.warnings.contains(&Warning::WildcardInAllowed));
    }

    #[test]
    fn restricted_users_publish_unless_they_only_listen() {
        let users =
            |text| config(&[("LIVEKIT_JWT_RESTRICTED_USERS", text)]).map(|c| c.settings.restricted_users);
        assert_eq!(users("").unwrap(), RestrictedUsers::Publish);
        assert_eq!(users("publish").unwrap(), RestrictedUsers::Publish);
        assert_eq!(users("listen").unwrap(), RestrictedUsers::Listen);
        let said = users("false").unwrap_err().to_string();
        assert_eq!(
            said,
            "LIVEKIT_JWT_RESTRICTED_USERS: \"false\" is nothing they can do; write publish or listen"
        );
    }

    #[test]
    fn listen_addresses_have_go_syntax() {
        let bind = |text| config(&[("LIVEKIT_JWT_BIND", text)]).map(|c| c.bind);
        assert_eq!(bind(":80").unwrap(), Bind::everywhere(80));
        assert_eq!(bind("127.0.0.1:81").unwrap(), Bind::loopback(81));
        assert_eq!(bind("[::1]:82").unwrap(), Bind::Tcp { host: Some("::1".into()), port: 82 });
        assert_eq!(bind("unix:/run/jwt").unwrap(), Bind::Unix("/run/jwt".into()));
        for bad in ["8080", ":", ":x", ":65536", "::1:80", "[::1:80", "host", "unix:run"] {
            assert!(refused(&[("LIVEKIT_JWT_BIND", bad)]).starts_with("LIVEKIT_JWT_BIND: "), "{bad}");
        }
    }

    #[test]
    fn the_old_port_variable_works_alone() {
        let old = config(&[("LIVEKIT_JWT_PORT", "9000")]).unwrap();
        assert_eq!(old.bind.to_string(), ":9000");
        assert_eq!(old.warnings[0], Warning::DeprecatedPort(9000));
        let both = refused(&[("LIVEKIT_JWT_PORT", "9000"), ("LIVEKIT_JWT_BIND", ":9000")]);
        assert!(both.contains("unset LIVEKIT_JWT_PORT"), "{both}");
        assert!(refused(&[("LIVEKIT_JWT_PORT", "x")]).starts_with("LIVEKIT_JWT_PORT: "));
    }

    #[test]
    fn only_the_magic_words_turn_certificate_checks_off() {
        let tls = |text| config(&[("LIVEKIT_INSECURE_SKIP_VERIFY_TLS", text)]).unwrap();
        assert_eq!(tls(MAGIC).settings.insecure_skip_verify_tls, TlsPolicy::SkipAll);
        assert_eq!(tls(MAGIC).warnings[0], Warning::TlsNotVerified);
        for other in ["true", "1", "yes_i_know_what_i_am_doing", "YES_I_KNOW_WHAT_I_AM_DOING "] {
            assert_eq!(tls(other).settings.insecure_skip_verify_tls, TlsPolicy::Verify);
            assert_eq!(tls(other).warnings[0], Warning::TlsStillVerified);
        }
        assert_eq!(tls("").warnings, [Warning::NothingPersisted]);
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
        // A tab may belong to the secret, wherever it stands.
        let tabs = file("k: \ts\t \r\n");
        let path = tabs.path().to_str().unwrap();
        assert_eq!(loaded(&[("LIVEKIT_KEY_FILE", path)]), ("k".into(), "\ts\t".into()));
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
        for bad in ["a", "=https://x", "a=", "a=https://x,", "a=x.org", "a=ftp://x", "a=https://a}b", ","] {
            let text = refused(&[("LIVEKIT_CS_API_URL_OVERRIDES", bad)]);
            assert!(text.starts_with("LIVEKIT_CS_API_URL_OVERRIDES: "), "{text}");
        }
    }

    #[test]
    fn access_tokens_come_as_a_list_or_in_a_file_and_are_never_quoted() {
        let tokens = |changes: &[(&str, &str)]| {
            let loaded = config(changes).unwrap();
            assert!(!format!("{loaded:?}").contains("hunter"), "redacted");
            let tokens = loaded.settings.delayed_event_tokens.into_iter();
            tokens.map(|(name, token)| (name, token.expose().to_owned())).collect::<Vec<_>>()
        };
        let expected = [("[::1]:8448".into(), "hunter3".into()), ("a.org".into(), "hunter2==".into())];
        let list = "A.org = hunter2==, [::1]:8448=hunter3";
        assert_eq!(tokens(&[("LIVEKIT_JWT_DELAYED_EVENT_TOKENS", list)]), expected);
        let lines = file("# why\n\na.org=hunter2==\r\n[::1]:8448 = hunter3\n");
        let path = lines.path().to_str().unwrap();
        assert_eq!(tokens(&[("LIVEKIT_JWT_DELAYED_EVENT_TOKENS_FROM_FILE", path)]), expected);
        for bad in ["hunter2", "a.org=", "=hunter2", "a b=hunter2", "a.org=hunter2 hunter2", "a.org=hunter2,"]
        {
            let text = refused(&[("LIVEKIT_JWT_DELAYED_EVENT_TOKENS", bad)]);
            assert!(text.starts_with("LIVEKIT_JWT_DELAYED_EVENT_TOKENS: entry "), "{text}");
        }
        let both = refused(&[
            ("LIVEKIT_JWT_DELAYED_EVENT_TOKENS", list),
            ("LIVEKIT_JWT_DELAYED_EVENT_TOKENS_FROM_FILE", path),
        ]);
        assert!(both.contains("are both set"), "{both}");
        let toml = format!("{FILE}\n[delayed_event_tokens]\n\"a.org\" = \"hunter2\"");
        let sources = sources(&[], &toml).unwrap();
        let loaded = Config::load(&sources).unwrap().settings.delayed_event_tokens;
        assert_eq!(loaded["a.org"].expose(), "hunter2");
        let printed = Config::print(&sources);
        assert!(printed.contains("\"a.org\" = \"[redacted]\"") && !printed.contains("hunter2"), "{printed}");
        let wrong = self::sources(&[], "[delayed_event_tokens]\nx = 2").unwrap_err().to_string();
        assert!(wrong.starts_with("delayed_event_tokens in jwt.toml: it has the wrong type"), "{wrong}");
    }

    #[test]
    fn the_sanity_interval_is_a_whole_number_or_off() {
        let sanity = |text| {
            config(&[("LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS", text)]).unwrap().delegation.sanity_interval
        };
        assert_eq!(sanity("+060"), Some(Duration::from_mins(1)));
        assert_eq!(sanity("00"), None);
        for bad in ["-1", " 1", "1.5", "+", "x", "99999999999999999999"] {
            let text = refused(&[("LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS", bad)]);
            assert!(text.contains(&format!("{bad:?}")), "{text}");
        }
    }

    #[test]
    fn jobs_are_kept_in_one_place() {
        let store = |changes: &[(&str, &str)]| config(changes).unwrap().store;
        assert_eq!(store(&[]), StoreConfig::Memory);
        assert_eq!(store(&[("LIVEKIT_JWT_STATE_DIR", "/var/lib/x")]), StoreConfig::File("/var/lib/x".into()));
        for url in ["redis://:hunter2@localhost/1", "rediss://h", "unix:///run/redis.sock"] {
            let redis = StoreConfig::Redis { url: url.parse().unwrap(), prefix: "lk-jwt:".into() };
            assert_eq!(store(&[("LIVEKIT_REDIS_URL", url)]), redis);
            assert!(!format!("{redis:?}").contains("hunter2"));
        }
        for bad in ["localhost", "http://:hunter2@h", "redis//hunter2"] {
            assert!(refused(&[("LIVEKIT_REDIS_URL", bad)]).starts_with("LIVEKIT_REDIS_URL: it "), "{bad}");
        }
        refused(&[("LIVEKIT_JWT_STATE_DIR", "relative")]);
        let both = refused(&[("LIVEKIT_JWT_STATE_DIR", "/s"), ("LIVEKIT_REDIS_URL", "redis://:hunter2@h")]);
        assert_eq!(
            both,
            "LIVEKIT_REDIS_URL and LIVEKIT_JWT_STATE_DIR are both set; keep LIVEKIT_REDIS_URL and unset \
             LIVEKIT_JWT_STATE_DIR"
        );
    }

    #[test]
    fn bounds_are_within_bounds() {
        let limits = |changes: &[(&str, &str)]| config(changes).unwrap().settings.limits;
        assert_eq!(limits(&[]), Limits::default());
        assert_eq!(limits(&[("LIVEKIT_JWT_ADDRESS_RATE", "0")]).per_address, None);
        let connections =
            |text| config(&[("LIVEKIT_JWT_ADDRESS_CONNECTIONS", text)]).unwrap().address_connections;
        assert_eq!((connections(""), connections("7"), connections("0")), (Some(500), Some(7), None));
        assert_eq!(
            limits(&[("LIVEKIT_JWT_SERVER_RATE", "7"), ("LIVEKIT_JWT_SERVER_BURST", "9")]).per_server,
            Some(Rate { per_second: 7, burst: 9 })
        );
        for (name, bad) in [
            ("LIVEKIT_JWT_ADDRESS_BURST", "0"),
            ("LIVEKIT_JWT_IN_FLIGHT", "0"),
            ("LIVEKIT_JWT_CONNECTIONS", "many"),
            ("LIVEKIT_JWT_ADDRESS_CONNECTIONS", "-1"),
            ("LIVEKIT_JWT_TOKEN_LIFETIME_SECONDS", "59"),
            ("LIVEKIT_JWT_LONGEST_DELAY_MS", "1"),
            ("LIVEKIT_JWT_SHORTEST_DELAY_MS", "2678400001"),
            ("LIVEKIT_JWT_GRACE_SECONDS", "601"),
            ("LIVEKIT_JWT_LOG_FORMAT", "xml"),
            ("LIVEKIT_JWT_TRUSTED_PROXIES", "10.0.0.0/33"),
            ("LIVEKIT_JWT_METRICS_BIND", "nowhere"),
        ] {
            assert!(refused(&[(name, bad)]).starts_with(&format!("{name}: ")), "{name}");
        }
    }

    #[test]
    fn a_metrics_port_alone_is_one_of_loopback() {
        let metrics = |text| config(&[("LIVEKIT_JWT_METRICS_BIND", text)]).unwrap().metrics;
        assert_eq!(metrics(""), None);
        assert_eq!(metrics("9108"), Some(Bind::loopback(9108)));
        assert_eq!(metrics(":9108"), Some(Bind::everywhere(9108)));
    }

    #[test]
    fn a_certificate_comes_with_its_key() {
        let alone = refused(&[("LIVEKIT_JWT_TLS_CERT_FILE", "/c")]);
        assert!(alone.starts_with("LIVEKIT_JWT_TLS_CERT_FILE is set and LIVEKIT_JWT_TLS_KEY_FILE is not"));
    }

    fn sources(environment: &[(&str, &str)], toml: &str) -> Result<Sources, ConfigError> {
        let environment: BTreeMap<&str, &str> = environment.iter().copied().collect();
        Sources::from_env(&|name| environment.get(name).map(|v| (*v).to_owned()))
            .with_toml(Path::new("jwt.toml"), &toml.into())
    }

    const FILE: &str = r#"
        livekit_url = "wss://file"
        key = "filekey"
        secret = "hunter2"
        full_access_homeservers = ["a.org", "b.org"]
        bind = ":1"
        metrics_bind = 9108
        address_rate = 5
        [cs_api_url_overrides]
        "A.org" = "https://matrix.a.org"
    "#;

    #[test]
    fn the_file_says_the_same_as_variables() {
        let config = Config::load(&sources(&[], FILE).unwrap()).unwrap();
        assert_eq!(config.settings.livekit_url, "wss://file");
        assert_eq!(config.settings.full_access.to_string(), "a.org,b.org");
        assert_eq!(config.metrics, Some(Bind::loopback(9108)));
        assert_eq!(config.settings.limits.per_address, Some(Rate { per_second: 5, burst: 500 }));
        assert_eq!(config.settings.cs_api_url_overrides["a.org"].as_str(), "https://matrix.a.org/");
    }

    #[test]
    fn flags_win_over_variables_and_these_over_the_file() {
        let both = sources(&[("LIVEKIT_JWT_BIND", ":2"), ("LIVEKIT_SECRET", "env")], FILE).unwrap();
        let config = Config::load(&both).unwrap();
        assert_eq!(config.bind, Bind::everywhere(2));
        assert_eq!((&*config.settings.key, config.settings.secret.expose()), ("filekey", "env"));
        let bind = SETTINGS.iter().find(|s| s.variable == "LIVEKIT_JWT_BIND").unwrap();
        let all = both.with_flag(bind, ":3".to_owned());
        assert_eq!(Config::load(&all).unwrap().bind, Bind::everywhere(3));
        let wrong = Config::load(&all.with_flag(bind, "3".to_owned())).unwrap_err().to_string();
        assert!(wrong.starts_with("--bind: "), "{wrong}");
        // The old variable belongs to the environment and is above the file.
        let port = sources(&[("LIVEKIT_JWT_PORT", "4")], FILE).unwrap();
        assert_eq!(Config::load(&port).unwrap().bind, Bind::everywhere(4));
    }

    #[test]
    fn what_the_file_cannot_say_is_an_error_that_names_the_place() {
        let refused = |toml: &str| {
            let text = match sources(&GOOD, toml) {
                Ok(sources) => Config::load(&sources).unwrap_err(),
                Err(error) => error,
            }
            .to_string();
            assert!(text.contains("jwt.toml") && !text.contains("hunter2"), "{text}");
            text
        };
        assert_eq!(
            refused("lissten = 1"),
            "jwt.toml: there is no setting \"lissten\"; `jwt-service --help` lists them"
        );
        assert!(refused("binds = ':1'").ends_with("did you mean \"bind\"?"));
        assert!(refused("LIVEKIT_JWT_BIND = ':1'").ends_with("did you mean \"bind\"?"));
        assert!(refused("[limits]\nx = 1").contains("no setting \"limits\""));
        assert!(refused("\n\nsecret = hunter2").contains("(line 3)"));
        assert!(refused("address_rate = \"hunter2\"").starts_with("address_rate in jwt.toml: "));
        assert!(refused("key = 'k'\nkey_file = [\"hunter2\"]").contains("a string in quotes"));
        assert!(refused("full_access_homeservers = [1]").contains("array of strings"));
        assert!(refused("log_format = 'xml'").starts_with("log_format in jwt.toml: \"xml\""));
    }

    #[test]
    fn printed_settings_say_where_they_come_from_and_can_be_read_again() {
        let sources = sources(&[("LIVEKIT_REDIS_URL", "redis://u:hunter2@h:1/2")], FILE).unwrap();
        let printed = Config::print(&sources);
        assert!(!printed.contains("hunter2"), "{printed}");
        for line in [
            "secret = \"[redacted]\"  # secret in jwt.toml",
            "full_access_homeservers = [\"a.org\", \"b.org\"]  # full_access_homeservers in jwt.toml",
            "in_flight = 4096  # default",
            "# state_dir is not set",
            "redis_url = \"redis://u:[redacted]@h:1/2\"  # LIVEKIT_REDIS_URL",
            "\"A.org\" = \"https://matrix.a.org\"",
        ] {
            assert!(printed.lines().any(|l| l == line), "{line}\n{printed}");
        }
        let again = Sources::default().with_toml(Path::new("printed"), &printed.into()).unwrap();
        let (first, second) = (Config::load(&sources).unwrap(), Config::load(&again).unwrap());
        assert_eq!(first.settings.limits, second.settings.limits);
        assert_eq!(first.settings.full_access, second.settings.full_access);
        assert_eq!(first.bind, second.bind);
        // What variables may say and a file may not.
        let variables = [
            ("LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS", "+060"),
            ("LIVEKIT_CS_API_URL_OVERRIDES", "a.org=http://x,A.org=http://y,a.org=http://z,b\nc=http://x"),
        ];
        let printed = Config::print(&self::sources(&variables, FILE).unwrap());
        let again = Sources::default().with_toml(Path::new("printed"), &printed.into()).unwrap();
        let again = Config::load(&again).unwrap();
        assert_eq!(again.delegation.sanity_interval, Some(Duration::from_mins(1)));
        assert_eq!(again.settings.cs_api_url_overrides["a.org"].as_str(), "http://z/");
        // What a URL's query holds may be a secret as well.
        let query = self::sources(&[("LIVEKIT_REDIS_URL", "redis://h?password=hunter2")], FILE).unwrap();
        assert!(!Config::print(&query).contains("hunter2"));
        let homeserver = Sources::from_env(&|name| {
            (name == "LIVEKIT_JWT_HOMESERVER_URL").then(|| "https://u:hunter2@hs".to_owned())
        });
        assert!(!Config::print(&homeserver).contains("hunter2"));
    }

    #[test]
    fn the_table_of_settings_tells_the_defaults() {
        let defaults: BTreeMap<&str, &str> = SETTINGS.iter().map(|s| (s.variable, s.default)).collect();
        let written = Config::from_env(&|name| {
            let good = GOOD.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned());
            good.or_else(|| defaults.get(name).map(|v| (*v).to_owned()))
        })
        .unwrap();
        let implied = config(&[]).unwrap();
        assert_eq!(format!("{written:?}"), format!("{implied:?}"));
    }

    #[test]
    fn log_levels_are_case_insensitive_and_an_unknown_one_is_info() {
        let level = |text| config(&[("LIVEKIT_LOG_LEVEL", text)]).unwrap();
        assert_eq!(level("DEBUG").log_level, LogLevel::Debug);
        assert_eq!(level("Warning").log_level, LogLevel::Warn);
        assert_eq!(level("error").log_level, LogLevel::Error);
        assert_eq!(level("loud").log_level, LogLevel::Info);
        assert_eq!(level("loud").warnings[0], Warning::UnknownLogLevel("loud".into()));
    }

    #[test]
    fn an_sfu_url_nobody_can_call_is_refused() {
        for bad in ["sfu.example.com", "localhost:7880", "ftp://x", "ws://u:hunter2@x"] {
            assert!(refused(&[("LIVEKIT_URL", bad)]).starts_with("LIVEKIT_URL: "), "{bad}");
        }
    }
}
