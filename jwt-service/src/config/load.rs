//! From what is written to what is meant: each setting's parser, in the order in which failures are reported.

mod homeserver;
mod keys;
mod lists;

use std::{fs, path::PathBuf, time::Duration};

use self::{
    homeserver::homeserver,
    keys::key_and_secret,
    lists::{allowed, delayed_event_tokens, full_access, overrides, private},
};
use super::{
    Bind, Config, ConfigError, Limits, LogFormat, LogLevel, Rate, Settings, TlsFiles, TlsPolicy, Warning,
    sources::{Found, LAYERS, Sources},
};
use crate::{
    delegation::DelegationConfig,
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
    let cs_api_url_overrides = overrides(sources, &mut warnings)?;
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
    settings.private_homeservers = private(sources, &mut warnings);
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

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod properties;

#[cfg(test)]
mod tests;
