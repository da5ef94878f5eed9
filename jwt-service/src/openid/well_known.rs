//! `/.well-known/matrix/server`: reading it, and remembering what it said for as long as it allows.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use serde::Deserialize;

use super::server_name::ServerName;

/// The largest document we read.
pub(crate) const MAX_DOCUMENT: usize = 50 * 1024;

/// How long an answer without cache headers is good for, and the longest for any (server-server API).
const DEFAULT_LIFETIME: Duration = Duration::from_hours(24);
const MAX_LIFETIME: Duration = Duration::from_hours(48);
/// How long "there is no such document" is good for, and "we could not find out".
const ABSENT_LIFETIME: Duration = Duration::from_mins(10);
const FAILED_LIFETIME: Duration = Duration::from_mins(1);
/// How many names are remembered, so that callers who invent names cannot grow the cache.
const MAX_ENTRIES: usize = 4096;

/// What a well-known lookup came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Delegation {
    /// The server is reached under this name instead.
    To(ServerName),
    /// No usable document: go on with SRV.
    None,
    /// The document delegates to something that is no server name: the server cannot be reached.
    Invalid,
}

/// What `document` delegates to.
pub(crate) fn delegation(document: &[u8]) -> Delegation {
    #[derive(Deserialize)]
    struct WellKnown {
        #[serde(rename = "m.server")]
        server: String,
    }
    match serde_json::from_slice(document) {
        Ok(WellKnown { server }) if !server.is_empty() => {
            server.parse().map_or(Delegation::Invalid, Delegation::To)
        }
        _ => Delegation::None,
    }
}

/// How long an answer may be kept: `cache_control` is the header's value, if there was one.
pub(crate) fn lifetime(answer: &Delegation, reached: bool, cache_control: Option<&str>) -> Duration {
    match answer {
        Delegation::None if !reached => FAILED_LIFETIME,
        Delegation::None => ABSENT_LIFETIME,
        Delegation::Invalid => FAILED_LIFETIME,
        Delegation::To(_) => {
            let directives = || cache_control.unwrap_or_default().split(',').map(str::trim);
            if directives().any(|d| d.eq_ignore_ascii_case("no-store") || d.eq_ignore_ascii_case("no-cache"))
            {
                return Duration::ZERO;
            }
            directives()
                .filter_map(|d| d.split_once('='))
                .find(|(name, _)| name.trim().eq_ignore_ascii_case("max-age"))
                .and_then(|(_, seconds)| seconds.trim().trim_matches('"').parse().ok())
                .map_or(DEFAULT_LIFETIME, Duration::from_secs)
                .min(MAX_LIFETIME)
        }
    }
}

/// Remembered delegations, by host.
#[derive(Debug, Default)]
pub(crate) struct DelegationCache {
    entries: HashMap<String, (Delegation, Instant)>,
}

impl DelegationCache {
    /// What is remembered about `host` and still good at `now`.
    pub(crate) fn lookup(&self, host: &str, now: Instant) -> Option<Delegation> {
        let (delegation, until) = self.entries.get(host)?;
        (now < *until).then(|| delegation.clone())
    }

    /// Where `host` last delegated to, however long ago: better than nothing while its web server is in trouble.
    pub(crate) fn stale(&self, host: &str) -> Option<Delegation> {
        let (delegation, _) = self.entries.get(host)?;
        matches!(delegation, Delegation::To(_)).then(|| delegation.clone())
    }

    /// Remembers `delegation` for `lifetime` from `now`.
    pub(crate) fn remember(
        &mut self,
        host: String,
        delegation: Delegation,
        now: Instant,
        lifetime: Duration,
    ) {
        if lifetime.is_zero() {
            self.forget(&host);
            return;
        }
        if self.entries.len() >= MAX_ENTRIES && !self.entries.contains_key(&host) {
            self.entries.retain(|_, (_, until)| now < *until);
            if self.entries.len() >= MAX_ENTRIES {
                let soonest =
                    self.entries.iter().min_by_key(|(_, (_, until))| *until).map(|(h, _)| h.clone());
                soonest.map(|host| self.entries.remove(&host));
            }
        }
        self.entries.insert(host, (delegation, now + lifetime));
    }

    /// Forgets `host`: what was remembered turned out not to work.
    pub(crate) fn forget(&mut self, host: &str) {
        self.entries.remove(host);
    }
}

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod properties;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[expect(
        clippy::disallowed_methods,
        reason = "an Instant has no other origin; the test moves it by itself"
    )]
    fn start() -> Instant {
        Instant::now()
    }

    fn to(name: &str) -> Delegation {
        Delegation::To(name.parse().unwrap())
    }

    #[test]
    fn a_document_delegates_or_is_unusable_or_is_wrong() {
        assert_eq!(delegation(br#"{"m.server":"m.hs.org:443"}"#), to("m.hs.org:443"));
        assert_eq!(delegation(br#"{"m.server":"m.hs.org","other":[1]}"#), to("m.hs.org"));
        for unusable in ["", "{", "[]", "{}", r#"{"m.server":""}"#, r#"{"m.server":1}"#, "<html>"] {
            assert_eq!(delegation(unusable.as_bytes()), Delegation::None, "{unusable}");
        }
        assert_eq!(delegation(br#"{"m.server":"https://m.hs.org"}"#), Delegation::Invalid);
    }

    #[test]
    fn cache_headers_are_honoured_within_limits() {
        let life = |header| lifetime(&to("a"), true, header);
        assert_eq!(life(None), DEFAULT_LIFETIME);
        assert_eq!(life(Some("public, Max-Age=60")), Duration::from_secs(60));
        assert_eq!(life(Some("max-age=99999999")), MAX_LIFETIME);
        assert_eq!(life(Some("max-age=nonsense")), DEFAULT_LIFETIME);
        assert_eq!(life(Some("no-store, max-age=60")), Duration::ZERO);
        assert_eq!(lifetime(&Delegation::None, true, Some("max-age=99999999")), ABSENT_LIFETIME);
        assert_eq!(lifetime(&Delegation::None, false, None), FAILED_LIFETIME);
    }

    #[test]
    fn entries_end_with_their_lifetime() {
        let start = start();
        let mut cache = DelegationCache::default();
        cache.remember("a".into(), to("b"), start, Duration::from_secs(10));
        assert_eq!(cache.lookup("a", start + Duration::from_secs(9)), Some(to("b")));
        assert_eq!(cache.lookup("a", start + Duration::from_secs(10)), None);
        assert_eq!(cache.stale("a"), Some(to("b")));
        cache.remember("none".into(), Delegation::None, start, Duration::from_secs(10));
        assert_eq!((cache.stale("none"), cache.stale("never seen")), (None, None));
        cache.remember("a".into(), to("b"), start, Duration::ZERO);
        assert_eq!(cache.lookup("a", start), None);
    }

    #[test]
    fn invented_names_do_not_grow_the_cache() {
        let start = start();
        let mut cache = DelegationCache::default();
        for i in 0..MAX_ENTRIES as u64 + 100 {
            cache.remember(i.to_string(), Delegation::None, start, Duration::from_secs(10 + i));
        }
        assert_eq!(cache.entries.len(), MAX_ENTRIES);
        assert_eq!(cache.lookup("0", start), None, "the one that would have ended first made room");
        assert!(cache.lookup("4195", start).is_some());
    }

    proptest! {
        #[test]
        fn no_document_or_header_makes_it_panic(
            document in prop::collection::vec(any::<u8>(), 0..200), header in ".{0,80}",
        ) {
            let answer = delegation(&document);
            prop_assert!(lifetime(&answer, true, Some(&header)) <= MAX_LIFETIME);
        }
    }
}
