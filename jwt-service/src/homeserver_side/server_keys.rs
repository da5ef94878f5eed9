//! Other servers' signing keys: reading what a server publishes (server-server API, §Publishing Keys), and
//! remembering it for as long as it allows.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use ruma_common::{CanonicalJsonObject, CanonicalJsonValue, serde::Base64};
use ruma_signatures::{PublicKeyMap, PublicKeySet, verify_json};

use crate::openid::ServerName;

/// The largest document we read. A server has one key, or a few.
pub(super) const MAX_DOCUMENT: usize = 64 * 1024;
/// The longest that keys are believed, whatever their server says (server-server API, §Publishing Keys).
const LONGEST: Duration = Duration::from_hours(7 * 24);
/// The pause before a server is asked again that did not answer well, or that did not have the key.
const PAUSE: Duration = Duration::from_mins(1);
/// How many servers are remembered, so that callers who invent names cannot grow the cache.
const MAX_SERVERS: usize = 4096;

/// The keys with which a server signs now. Keys that it has given up are not among them: they vouch for old
/// events, not for requests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PublishedKeys {
    keys: PublicKeyMap,
    valid_until: SystemTime,
}

impl PublishedKeys {
    /// The keys in `document`, which `server` has published.
    pub(crate) fn read(document: &[u8], server: &ServerName, now: SystemTime) -> Result<Self, KeysError> {
        let mut object: CanonicalJsonObject =
            serde_json::from_slice(document).map_err(|_| KeysError::NotKeys)?;
        let name = server.as_str();
        if object.get("server_name").and_then(CanonicalJsonValue::as_str) != Some(name) {
            return Err(KeysError::OfAnother);
        }
        let keys = verify_keys(&object).ok_or(KeysError::NotKeys)?;
        let until = object.get("valid_until_ts").and_then(CanonicalJsonValue::as_integer);
        let until = until.and_then(|ms| u64::try_from(i64::from(ms)).ok()).ok_or(KeysError::NotKeys)?;
        let until = UNIX_EPOCH.checked_add(Duration::from_millis(until)).ok_or(KeysError::NotKeys)?;
        if until <= now {
            return Err(KeysError::Expired);
        }
        // Others may have signed it too; whether they did is not our question, and would be an error.
        let own = object.get("signatures").and_then(|s| s.as_object()?.get(name)).cloned();
        let own = own.ok_or(KeysError::NotSigned)?;
        let only_own = CanonicalJsonObject::from([(name.to_owned(), own)]);
        object.insert("signatures".to_owned(), only_own.into());
        let keys = PublicKeyMap::from([(name.to_owned(), keys)]);
        verify_json(&keys, &object).map_err(|_| KeysError::NotSigned)?;
        Ok(Self { keys, valid_until: until.min(now + LONGEST) })
    }

    /// By server, as the signature library takes them.
    pub(super) fn map(&self) -> &PublicKeyMap {
        &self.keys
    }

    /// Whether `key_id` is one of them.
    pub(super) fn has(&self, key_id: &str) -> bool {
        self.keys.values().any(|keys| keys.contains_key(key_id))
    }
}

fn verify_keys(object: &CanonicalJsonObject) -> Option<PublicKeySet> {
    let keys = object.get("verify_keys")?.as_object()?;
    let key = |(id, key): (&String, &CanonicalJsonValue)| {
        Some((id.clone(), Base64::parse(key.as_object()?.get("key")?.as_str()?).ok()?))
    };
    keys.iter().map(key).collect()
}

/// Why what a server has published is not believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum KeysError {
    #[error("the server publishes no keys: what it answers is another kind of document")]
    NotKeys,
    #[error("the server publishes the keys of a server with another name")]
    OfAnother,
    #[error("the server's keys have expired; its clock or ours is wrong, or it publishes an old document")]
    Expired,
    #[error("the server's keys are not signed by the server itself")]
    NotSigned,
}

/// Published keys, by server.
#[derive(Debug, Default)]
pub(crate) struct KeyCache {
    servers: HashMap<String, Entry>,
}

#[derive(Debug)]
struct Entry {
    published: Option<Arc<PublishedKeys>>,
    asked: SystemTime,
}

/// What the cache says about a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Cached {
    /// It is here, among its server's others.
    Here(Arc<PublishedKeys>),
    /// The server is to be asked.
    Ask,
    /// The server has been asked just now, and did not have it.
    Unknown,
}

impl KeyCache {
    /// What is known at `now` about the keys `key_ids` of `server`: any of them will do.
    pub(crate) fn lookup<'a>(
        &self,
        server: &ServerName,
        mut key_ids: impl Iterator<Item = &'a str>,
        now: SystemTime,
    ) -> Cached {
        let Some(entry) = self.servers.get(server.as_str()) else { return Cached::Ask };
        if let Some(published) = entry.published.as_ref().filter(|keys| now < keys.valid_until)
            && key_ids.any(|id| published.has(id))
        {
            return Cached::Here(published.clone());
        }
        // A clock that has been set back makes the pause void, not endless.
        match now.duration_since(entry.asked) {
            Ok(since) if since < PAUSE => Cached::Unknown,
            _ => Cached::Ask,
        }
    }

    /// Remembers that `server` was asked at `now`, and its answer if it was good. What an earlier answer said
    /// stays if this one was not.
    pub(crate) fn remember(
        &mut self,
        server: &ServerName,
        published: Option<Arc<PublishedKeys>>,
        now: SystemTime,
    ) {
        let name = server.as_str();
        if !self.servers.contains_key(name) && self.servers.len() >= MAX_SERVERS {
            // Those without keys first: a caller who makes names up leaves only such.
            let least = self.servers.iter().min_by_key(|(_, e)| (e.published.is_some(), e.asked));
            if let Some(name) = least.map(|(name, _)| name.clone()) {
                self.servers.remove(&name);
            }
        }
        let entry =
            self.servers.entry(name.to_owned()).or_insert_with(|| Entry { published: None, asked: now });
        entry.asked = now;
        if published.is_some() {
            entry.published = published;
        }
    }
}

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod properties;

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;
    use ruma_signatures::{Ed25519KeyPair, sign_json};
    use serde_json::{Value, json};

    use super::*;

    pub(in crate::homeserver_side) fn at(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(seconds)
    }

    /// A key pair, and the document in which `server` publishes it.
    pub(in crate::homeserver_side) fn publish(
        server: &str,
        version: &str,
        change: impl FnOnce(&mut Value),
    ) -> (Ed25519KeyPair, Vec<u8>) {
        let pair = Ed25519KeyPair::from_der(&Ed25519KeyPair::generate(), version.to_owned()).unwrap();
        let mut document = json!({
            "server_name": server, "valid_until_ts": 2_000_000_000_000_u64, "old_verify_keys": {},
            "verify_keys": { format!("ed25519:{version}"): { "key": Base64::<
                ruma_common::serde::base64::Standard, _>::new(pair.public_key()).encode() } },
        });
        change(&mut document);
        let mut object = serde_json::from_value(document).unwrap();
        sign_json(server, &pair, &mut object).unwrap();
        (pair, serde_json::to_vec(&object).unwrap())
    }

    fn read(document: &[u8]) -> Result<PublishedKeys, KeysError> {
        PublishedKeys::read(document, &"hs.org".parse().unwrap(), at(1_900_000_000))
    }

    fn changed(document: &[u8], change: impl FnOnce(&mut Value)) -> Vec<u8> {
        let mut value: Value = serde_json::from_slice(document).unwrap();
        change(&mut value);
        value.to_string().into_bytes()
    }

    #[test]
    fn keys_are_good_until_their_server_says_or_for_a_week() {
        let (_, document) = publish("hs.org", "a", |d| d["valid_until_ts"] = json!(1_900_000_100_000_u64));
        let keys = read(&document).unwrap();
        assert!(keys.has("ed25519:a") && !keys.has("ed25519:b"));
        assert_eq!(keys.valid_until, at(1_900_000_100));
        let (_, document) = publish("hs.org", "a", |_| {});
        assert_eq!(read(&document).unwrap().valid_until, at(1_900_000_000) + LONGEST);
    }

    #[test]
    fn what_synapse_publishes_is_read() {
        let document = br#"{"old_verify_keys":{},"server_name":"localhost:8449","signatures":{"localhost:8449":
            {"ed25519:a_test":"wszhxCCVjJdeTsN3VHYLon+PYPY/w/B6w6ECXWrn8tyv6JqJpRHm9ZR8Zhs6v59wOFwRlchn92KsU5XIOwqfCg"}},
            "valid_until_ts":1795633172757,
            "verify_keys":{"ed25519:a_test":{"key":"2Od/K3DE/Zy2y3oiQwEAWbUl1baI/rkMsdJEbvJZKNs"}}}"#;
        let server = "localhost:8449".parse().unwrap();
        let keys = PublishedKeys::read(document, &server, at(1_795_600_000)).unwrap();
        assert!(keys.has("ed25519:a_test"));
        let late = PublishedKeys::read(document, &server, at(1_795_700_000));
        assert_eq!(late, Err(KeysError::Expired));
    }

    #[test]
    fn documents_that_are_tampered_with_are_not_believed() {
        let (_, document) = publish("hs.org", "a", |_| {});
        let (_, other) = publish("hs.org", "a", |_| {});
        let other: Value = serde_json::from_slice(&other).unwrap();
        let tampered = |change: &dyn Fn(&mut Value)| read(&changed(&document, change)).unwrap_err();
        assert_eq!(tampered(&|d| d["valid_until_ts"] = json!(1_999_999_999_999_u64)), KeysError::NotSigned);
        assert_eq!(tampered(&|d| d["verify_keys"] = other["verify_keys"].clone()), KeysError::NotSigned);
        assert_eq!(tampered(&|d| d["signatures"] = other["signatures"].clone()), KeysError::NotSigned);
        assert_eq!(tampered(&|d| d["signatures"] = json!({})), KeysError::NotSigned);
        assert_eq!(tampered(&|d| d["signatures"]["hs.org"] = json!({})), KeysError::NotSigned);
        assert_eq!(tampered(&|d| d["more"] = json!(1)), KeysError::NotSigned);
        assert_eq!(tampered(&|d| d["server_name"] = json!("hs.com")), KeysError::OfAnother);
        assert_eq!(tampered(&|d| d["server_name"] = json!(null)), KeysError::OfAnother);
        assert_eq!(tampered(&|d| d["verify_keys"] = json!([])), KeysError::NotKeys);
        assert_eq!(tampered(&|d| d["verify_keys"]["ed25519:a"]["key"] = json!("!")), KeysError::NotKeys);
        assert_eq!(tampered(&|d| d["valid_until_ts"] = json!(-1)), KeysError::NotKeys);
        assert_eq!(tampered(&|d| d["valid_until_ts"] = json!(1)), KeysError::Expired);
        for document in ["", "null", "[]", "<html>", "{\"a\":1.5}"] {
            assert_eq!(read(document.as_bytes()), Err(KeysError::NotKeys), "{document}");
        }
    }

    #[test]
    fn a_second_signature_by_somebody_else_does_no_harm() {
        let (_, document) = publish("hs.org", "a", |_| {});
        let document = changed(&document, |d| d["signatures"]["notary.org"] = json!({ "ed25519:1": "AAAA" }));
        assert!(read(&document).is_ok());
    }

    #[test]
    fn given_up_keys_do_not_count() {
        let (pair, document) = publish("hs.org", "a", |d| {
            d["old_verify_keys"] = json!({ "ed25519:old": { "key": "AAAA", "expired_ts": 1 } });
        });
        drop(pair);
        assert!(!read(&document).unwrap().has("ed25519:old"));
    }

    #[test]
    fn the_cache_asks_again_when_it_must_and_not_more_often() {
        let server: ServerName = "hs.org".parse().unwrap();
        let (_, document) = publish("hs.org", "a", |_| {});
        let now = at(1_900_000_000);
        let keys = Arc::new(read(&document).unwrap());
        let mut cache = KeyCache::default();
        let ask = |cache: &KeyCache, id: &str, now| cache.lookup(&server, [id].into_iter(), now);
        assert_eq!(ask(&cache, "ed25519:a", now), Cached::Ask);
        cache.remember(&server, None, now);
        assert_eq!(ask(&cache, "ed25519:a", now), Cached::Unknown);
        assert_eq!(ask(&cache, "ed25519:a", now + PAUSE), Cached::Ask);
        cache.remember(&server, Some(keys.clone()), now);
        assert_eq!(ask(&cache, "ed25519:a", now), Cached::Here(keys.clone()));
        assert_eq!(ask(&cache, "ed25519:b", now), Cached::Unknown, "asked just now");
        assert_eq!(ask(&cache, "ed25519:b", now + PAUSE), Cached::Ask, "it may be new");
        cache.remember(&server, None, now + PAUSE);
        assert_eq!(ask(&cache, "ed25519:a", now + PAUSE), Cached::Here(keys), "a failure takes nothing away");
        assert_eq!(ask(&cache, "ed25519:a", now + LONGEST), Cached::Ask);
        assert_eq!(ask(&cache, "ed25519:b", now - PAUSE), Cached::Ask, "the clock was set back");
    }

    #[test]
    fn invented_names_do_not_push_real_keys_out() {
        let (_, document) = publish("hs.org", "a", |_| {});
        let now = at(1_900_000_000);
        let keys = Arc::new(read(&document).unwrap());
        let mut cache = KeyCache::default();
        cache.remember(&"hs.org".parse().unwrap(), Some(keys), now);
        for i in 0..2 * MAX_SERVERS {
            cache.remember(&format!("x{i}.org").parse().unwrap(), None, now + Duration::from_secs(1));
        }
        assert_eq!(cache.servers.len(), MAX_SERVERS);
        assert!(cache.servers["hs.org"].published.is_some());
    }

    proptest! {
        #[test]
        fn no_document_makes_it_panic(
            document in prop::collection::vec(any::<u8>(), 0..200), key in "\\PC{0,50}", until in any::<i64>(),
        ) {
            let _ = read(&document);
            let document = json!({
                "server_name": "hs.org", "valid_until_ts": until, "verify_keys": { &key: { "key": key } },
                "signatures": { "hs.org": { &key: key } },
            });
            prop_assert!(read(document.to_string().as_bytes()).is_err());
        }
    }
}
