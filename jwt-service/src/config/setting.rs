//! What settings there are: their names, types and defaults, and a line of help for each.

use crate::store::RedisStore;

/// What TOML type a setting has in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Text,
    Number,
    List,
    /// Names to URLs.
    Map,
    /// Names to secrets.
    Secrets,
}

/// One setting: its names and what it is for.
#[derive(Debug)]
#[non_exhaustive]
pub struct Setting {
    /// The environment variable.
    pub variable: &'static str,
    /// The key in a TOML file; `None`: not there.
    pub key: Option<&'static str>,
    /// The flag, without dashes; `None`: none, because other users of the machine can read a process's
    /// arguments.
    pub flag: Option<&'static str>,
    /// What it is when it is not set, as it would be written; empty: nothing.
    pub default: &'static str,
    /// One line of help.
    pub help: &'static str,
    pub(super) kind: Kind,
}

const fn setting(
    (variable, key, flag): (&'static str, &'static str, &'static str),
    kind: Kind,
    default: &'static str,
    help: &'static str,
) -> Setting {
    Setting {
        variable,
        key: if key.is_empty() { None } else { Some(key) },
        flag: if flag.is_empty() { None } else { Some(flag) },
        default,
        help,
        kind,
    }
}

/// Every setting of the program.
pub const SETTINGS: &[Setting] = &[
    setting(
        ("LIVEKIT_URL", "livekit_url", "livekit-url"),
        Kind::Text,
        "",
        "the SFU as clients reach it, such as wss://sfu.example.com; required",
    ),
    setting(("LIVEKIT_KEY", "key", ""), Kind::Text, "", "the SFU's API key; required, here or from a file"),
    setting(
        ("LIVEKIT_SECRET", "secret", ""),
        Kind::Text,
        "",
        "the SFU's API secret; required, here or from a file",
    ),
    setting(
        ("LIVEKIT_KEY_FROM_FILE", "key_from_file", "key-from-file"),
        Kind::Text,
        "",
        "path of a file that holds the key",
    ),
    setting(
        ("LIVEKIT_SECRET_FROM_FILE", "secret_from_file", "secret-from-file"),
        Kind::Text,
        "",
        "path of a file that holds the secret",
    ),
    setting(
        ("LIVEKIT_KEY_FILE", "key_file", "key-file"),
        Kind::Text,
        "",
        "path of a file with one line, `key: secret`",
    ),
    setting(
        ("LIVEKIT_FULL_ACCESS_HOMESERVERS", "full_access_homeservers", "full-access-homeservers"),
        Kind::List,
        "",
        "whose users may start calls: server names, or * for all; others only join; required",
    ),
    setting(
        ("LIVEKIT_JWT_ALLOWED_HOMESERVERS", "allowed_homeservers", "allowed-homeservers"),
        Kind::List,
        "*",
        "whose users get tokens at all, beside those with full access: server names, or * for all",
    ),
    setting(
        ("LIVEKIT_JWT_RESTRICTED_USERS", "restricted_users", "restricted-users"),
        Kind::Text,
        "publish",
        "what users without full access may do: publish, or only listen",
    ),
    setting(
        ("LIVEKIT_JWT_BIND", "bind", "bind"),
        Kind::Text,
        ":8080",
        "where to listen: host:port, :port for all interfaces, or unix:/path",
    ),
    setting(("LIVEKIT_JWT_PORT", "", ""), Kind::Number, "", "deprecated: the port to listen on"),
    setting(
        ("LIVEKIT_JWT_TLS_CERT_FILE", "tls_cert_file", "tls-cert-file"),
        Kind::Text,
        "",
        "path of a PEM certificate chain: serve HTTPS; read again on SIGHUP",
    ),
    setting(
        ("LIVEKIT_JWT_TLS_KEY_FILE", "tls_key_file", "tls-key-file"),
        Kind::Text,
        "",
        "path of its PEM private key",
    ),
    setting(
        ("LIVEKIT_JWT_METRICS_BIND", "metrics_bind", "metrics-bind"),
        Kind::Text,
        "",
        "where to serve /metrics, /healthz and /readyz: a port of loopback, or as above",
    ),
    setting(
        ("LIVEKIT_LOG_LEVEL", "log_level", "log-level"),
        Kind::Text,
        "info",
        "debug, info, warn or error",
    ),
    setting(("LIVEKIT_JWT_LOG_FORMAT", "log_format", "log-format"), Kind::Text, "text", "text or json"),
    setting(
        ("LIVEKIT_REDIS_URL", "redis_url", ""),
        Kind::Text,
        "",
        "keep delegated leaves in Redis: redis://, rediss:// or unix://",
    ),
    setting(
        ("LIVEKIT_JWT_REDIS_PREFIX", "redis_prefix", "redis-prefix"),
        Kind::Text,
        RedisStore::DEFAULT_PREFIX,
        "the Redis keys begin with this",
    ),
    setting(
        ("LIVEKIT_JWT_STATE_DIR", "state_dir", "state-dir"),
        Kind::Text,
        "",
        "keep delegated leaves in files in this directory",
    ),
    setting(
        (
            "LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS",
            "sanity_check_interval_seconds",
            "sanity-check-interval-seconds",
        ),
        Kind::Number,
        "0",
        "how often to ask the SFU whether participants are still there; 0: never",
    ),
    setting(
        ("LIVEKIT_CS_API_URL_OVERRIDES", "cs_api_url_overrides", "cs-api-url-overrides"),
        Kind::Map,
        "",
        "client-server API of homeservers, in place of discovery: server_name=url",
    ),
    setting(
        ("LIVEKIT_JWT_DELAYED_EVENT_TOKENS", "delayed_event_tokens", ""),
        Kind::Secrets,
        "",
        "access tokens for delayed events, where a homeserver wants one: server_name=token",
    ),
    setting(
        (
            "LIVEKIT_JWT_DELAYED_EVENT_TOKENS_FROM_FILE",
            "delayed_event_tokens_from_file",
            "delayed-event-tokens-from-file",
        ),
        Kind::Text,
        "",
        "path of a file with one server_name=token a line",
    ),
    setting(
        ("LIVEKIT_PRIVATE_HOMESERVERS", "private_homeservers", "private-homeservers"),
        Kind::List,
        "",
        "server names that may be on private addresses, beside those named above",
    ),
    setting(
        ("LIVEKIT_INSECURE_SKIP_VERIFY_TLS", "insecure_skip_verify_tls", "insecure-skip-verify-tls"),
        Kind::Text,
        "",
        "YES_I_KNOW_WHAT_I_AM_DOING: no checks of homeservers' certificates and addresses",
    ),
    setting(
        ("LIVEKIT_JWT_HOMESERVER_NAME", "homeserver_name", "homeserver-name"),
        Kind::Text,
        "",
        "serve the newest MSC4195's endpoints for the homeserver with this server name",
    ),
    setting(
        ("LIVEKIT_JWT_HOMESERVER_URL", "homeserver_url", "homeserver-url"),
        Kind::Text,
        "",
        "its client-server API as reached from here, such as http://127.0.0.1:8008",
    ),
    setting(
        ("LIVEKIT_JWT_HOMESERVER_AS_TOKEN_FILE", "homeserver_as_token_file", "homeserver-as-token-file"),
        Kind::Text,
        "",
        "path of a file with the as_token of its application service: serve other homeservers' users",
    ),
    setting(
        (
            "LIVEKIT_JWT_HOMESERVER_SIGNING_KEY_FILE",
            "homeserver_signing_key_file",
            "homeserver-signing-key-file",
        ),
        Kind::Text,
        "",
        "path of its signing key: get its users tokens for other homeservers' SFUs",
    ),
    setting(
        ("LIVEKIT_JWT_TOKEN_LIFETIME_SECONDS", "token_lifetime_seconds", "token-lifetime-seconds"),
        Kind::Number,
        "3600",
        "how long a client's token is valid: 60 to 86400",
    ),
    setting(
        ("LIVEKIT_JWT_TRUSTED_PROXIES", "trusted_proxies", "trusted-proxies"),
        Kind::List,
        "private",
        "whose X-Forwarded-For is believed: addresses, networks, private, or none",
    ),
    setting(
        ("LIVEKIT_JWT_ADDRESS_RATE", "address_rate", "address-rate"),
        Kind::Number,
        "100",
        "requests per second from one address; 0: no limit",
    ),
    setting(
        ("LIVEKIT_JWT_ADDRESS_BURST", "address_burst", "address-burst"),
        Kind::Number,
        "500",
        "requests at once from one address",
    ),
    setting(
        ("LIVEKIT_JWT_SERVER_RATE", "server_rate", "server-rate"),
        Kind::Number,
        "1000",
        "lookups per second at one homeserver; 0: no limit",
    ),
    setting(
        ("LIVEKIT_JWT_SERVER_BURST", "server_burst", "server-burst"),
        Kind::Number,
        "4000",
        "lookups begun at once at one homeserver",
    ),
    setting(
        ("LIVEKIT_JWT_SERVER_IN_FLIGHT", "server_in_flight", "server-in-flight"),
        Kind::Number,
        "2048",
        "lookups in progress at one homeserver",
    ),
    setting(
        ("LIVEKIT_JWT_IN_FLIGHT", "in_flight", "in-flight"),
        Kind::Number,
        "4096",
        "requests in progress",
    ),
    setting(
        ("LIVEKIT_JWT_CONNECTIONS", "connections", "connections"),
        Kind::Number,
        "10000",
        "connections held at once",
    ),
    setting(
        ("LIVEKIT_JWT_ADDRESS_CONNECTIONS", "address_connections", "address-connections"),
        Kind::Number,
        "500",
        "connections held at once from one address, trusted proxies aside; 0: no limit",
    ),
    setting(
        ("LIVEKIT_JWT_SHORTEST_DELAY_MS", "shortest_delay_ms", "shortest-delay-ms"),
        Kind::Number,
        "100",
        "the shortest delay_timeout that is taken, in milliseconds",
    ),
    setting(
        ("LIVEKIT_JWT_LONGEST_DELAY_MS", "longest_delay_ms", "longest-delay-ms"),
        Kind::Number,
        "2678400000",
        "the longest delay_timeout that is taken, in milliseconds",
    ),
    setting(("LIVEKIT_JWT_JOBS", "jobs", "jobs"), Kind::Number, "100000", "delegated leaves held at once"),
    setting(
        ("LIVEKIT_JWT_JOBS_PER_USER", "jobs_per_user", "jobs-per-user"),
        Kind::Number,
        "100",
        "delegated leaves held at once for one user",
    ),
    setting(
        ("LIVEKIT_JWT_REPLICA", "replica", "replica"),
        Kind::Text,
        "",
        "who this process is among those that share a Redis; host name and address unless set",
    ),
    setting(
        ("LIVEKIT_JWT_GRACE_SECONDS", "grace_seconds", "grace-seconds"),
        Kind::Number,
        "30",
        "how long requests in progress may take to end after SIGTERM: 0 to 600",
    ),
];
