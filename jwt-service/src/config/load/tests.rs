//! Every setting, in words that are right and words that are wrong.

use std::{collections::BTreeMap, io::Write as _, path::Path};

use super::*;
use crate::{
    config::{FullAccess, RestrictedUsers, SETTINGS},
    secret::Secret,
};

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
        assert!(text.starts_with("LIVEKIT_JWT_HOMESERVER_NAME: ") && text.contains("; write what"), "{text}");
    }
    for url in ["127.0.0.1:8008", "ftp://hs", "https://u:hunter2@hs", "https://hs/?a"] {
        let text = refused(&[NAME, ("LIVEKIT_JWT_HOMESERVER_URL", url)]);
        assert!(text.starts_with("LIVEKIT_JWT_HOMESERVER_URL: not an address"), "{text}");
    }
    for content in ["", "two words", "h\u{fc}nter"] {
        let spoilt = file(content);
        let path = spoilt.path().to_str().unwrap();
        let text = refused(&[NAME, URL, (token.0, path)]);
        assert!(text.starts_with(&format!("{}: {path} does not hold a token", token.0)), "{text}");
    }
    let spoilt = file("ed25519 hunter2");
    let path = spoilt.path().to_str().unwrap();
    let text = refused(&[NAME, URL, (key.0, path)]);
    assert!(text.starts_with(&format!("{}: {path}: the first line is not", key.0)), "{text}");
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
fn what_can_be_no_servers_name_is_warned_of() {
    let variables =
        ["LIVEKIT_FULL_ACCESS_HOMESERVERS", "LIVEKIT_JWT_ALLOWED_HOMESERVERS", "LIVEKIT_PRIVATE_HOMESERVERS"];
    for variable in variables {
        for wrong in ["https://a.org", "@alice:a.org", "a.org/", "*.a.org", "a.org:port", "bücher.example"] {
            let warnings = config(&[(variable, &format!("b.org,{wrong}"))]).unwrap().warnings;
            let expected = Warning::NoServer { place: variable.to_owned(), name: wrong.to_owned() };
            assert!(warnings.contains(&expected), "{variable} {wrong}: {warnings:?}");
        }
        let good = config(&[(variable, "A.org,a.org:8448,[::1]:1,10.0.0.1")]).unwrap().warnings;
        assert_eq!(good, [Warning::NothingPersisted], "{variable}");
    }
    for wrong in ["https://a.org", "*"] {
        let overrides = ("LIVEKIT_CS_API_URL_OVERRIDES", &*format!("{wrong}=https://b.org"));
        let expected = Warning::NoServer { place: overrides.0.to_owned(), name: wrong.to_owned() };
        assert!(config(&[overrides]).unwrap().warnings.contains(&expected), "{wrong}");
    }
    let star = config(&[("LIVEKIT_PRIVATE_HOMESERVERS", "*")]).unwrap().warnings;
    assert!(star.contains(&Warning::WildcardInPrivate));
}

#[test]
fn the_full_access_list_is_split_and_the_star_stands_alone() {
    let list = |text| config(&[("LIVEKIT_FULL_ACCESS_HOMESERVERS", text)]).unwrap().settings.full_access;
    let only = |names: &[&str]| FullAccess::Only(names.iter().map(|n| (*n).to_owned()).collect());
    assert_eq!(list("*"), FullAccess::All);
    assert_eq!(list(" * ,"), FullAccess::All);
    assert_eq!(list("* *"), only(&["*"]), "a slip, not everybody");
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
    let users = |text| config(&[("LIVEKIT_JWT_RESTRICTED_USERS", text)]).map(|c| c.settings.restricted_users);
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
    for (bad, problem) in [
        ("8080", "has no colon before the port"),
        ("host", "has no colon before the port"),
        (":", "is not a port"),
        (":x", "is not a port"),
        (":8080 ", "has a blank at its beginning or end"),
        ("unix:/run/jwt\n", "has a blank at its beginning or end"),
        (":65536", "is not a port"),
        (" :8080", "has a blank at its beginning or end"),
        ("a b:8080", "is no host"),
        ("a/b:8080", "is no host"),
        ("::1:80", "is IPv6 without brackets"),
        ("[::1:80", "lacks a closing bracket"),
        ("[::1]", "has no port after the bracket"),
        ("http://0.0.0.0:8080", "is a URL"),
        ("unix:run", "has no absolute path"),
    ] {
        let text = refused(&[("LIVEKIT_JWT_BIND", bad)]);
        assert!(text.starts_with("LIVEKIT_JWT_BIND: ") && text.contains(problem), "{bad}: {text}");
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
    for (content, what) in [
        ("", "is empty"),
        (" \r\n\t\n", "is empty"),
        ("hunter2", "has no colon"),
        ("a: hunter2\nb: hunter2\n", "has more than one line"),
    ] {
        let bad = file(content);
        let path = bad.path().to_str().unwrap();
        let text = refused(&[("LIVEKIT_KEY_FILE", path)]);
        assert!(text.starts_with(&format!("LIVEKIT_KEY_FILE: {path} {what}; write ")), "{text}");
    }
    for (variable, content, what) in [
        ("LIVEKIT_KEY_FILE", ": hunter2", "key"),
        ("LIVEKIT_KEY_FILE", "key: ", "secret"),
        ("LIVEKIT_KEY_FROM_FILE", "", "key"),
        ("LIVEKIT_SECRET_FROM_FILE", " \r\n", "secret"),
    ] {
        let bad = file(content);
        let path = bad.path().to_str().unwrap();
        let text = refused(&[(variable, path)]);
        assert!(text.starts_with(&format!("{variable}: there is no {what} in {path}; write ")), "{text}");
        // The setting that it goes before does not take its place.
        assert!(refused(&[("LIVEKIT_KEY", " "), ("LIVEKIT_SECRET", " ")]).starts_with("LIVEKIT_KEY: "));
    }
    for (content, what) in [
        (&b"key: hunter2\xff"[..], "is not text in UTF-8"),
        // As some editors write it: in UTF-16, or with a mark of the encoding.
        (b"k\0:\0h\0u\0n\0t\0e\0r\x002\0", "is not text: it has bytes that are 0"),
        (b"\xef\xbb\xbfkey: hunter2", "begins with a byte order mark"),
    ] {
        let mut other = tempfile::NamedTempFile::new().unwrap();
        other.write_all(content).unwrap();
        let path = other.path().to_str().unwrap();
        for variable in ["LIVEKIT_KEY_FILE", "LIVEKIT_KEY_FROM_FILE", "LIVEKIT_SECRET_FROM_FILE"] {
            let text = refused(&[(variable, path)]);
            assert!(text.starts_with(&format!("{variable}: {path} {what}; write ")), "{text}");
        }
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
    for bad in ["a=https://u:hunter2@x", "a=https://u@x"] {
        let text = refused(&[("LIVEKIT_CS_API_URL_OVERRIDES", bad)]);
        assert!(text.contains("the URL for \"a\" has a user name"), "{text}");
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
    for bad in ["hunter2", "a.org=", "=hunter2", "a b=hunter2", "a.org=hunter2 hunter2", "a.org=hunter2,"] {
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
    let sanity =
        |text| config(&[("LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS", text)]).unwrap().delegation.sanity_interval;
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
    // The deprecated variable, where it counts.
    let bind = |variables: &[(&str, &str)], file: &str| {
        let printed = Config::print(&self::sources(variables, file).unwrap());
        printed.lines().find(|line| line.contains("bind") && !line.contains("metrics")).unwrap().to_owned()
    };
    let old = ("LIVEKIT_JWT_PORT", "9000");
    assert_eq!(bind(&[old], FILE), "bind = \":9000\"  # LIVEKIT_JWT_PORT");
    assert_eq!(bind(&[], FILE), "bind = \":1\"  # bind in jwt.toml");
    assert!(bind(&[old, ("LIVEKIT_JWT_BIND", ":9")], FILE).starts_with("# bind: LIVEKIT_JWT_BIND and "));
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
