//! What must hold for any document in which a server says that it publishes its keys.

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use ruma_common::{CanonicalJsonObject, serde::Base64};
use ruma_signatures::{PublicKeyMap, PublicKeySet, SigningKeyAlgorithm, sign_json};
use serde_json::{Map, Value, json};

use super::{
    super::signing_key::{SigningKey, properties::THEIRS},
    Cached, KeyCache, KeysError, LONGEST, PAUSE, PublishedKeys,
};
use crate::{
    fuzzing::{first_value, line},
    openid::ServerName,
};

/// What `server` would publish if `key` were its only key.
pub(in crate::homeserver_side) fn keys_of(server: &ServerName, key: &SigningKey) -> PublishedKeys {
    let id = format!("ed25519:{}", key.pair().version());
    let keys = PublicKeySet::from([(id, Base64::new(key.pair().public_key().to_vec()))]);
    let keys = PublicKeyMap::from([(server.as_str().to_owned(), keys)]);
    PublishedKeys { keys, valid_until: UNIX_EPOCH }
}

/// The first line is the time in milliseconds; then comes the document.
pub(crate) fn published_keys(data: &[u8]) {
    let (time, document) = line(data);
    let time = std::str::from_utf8(time).ok().and_then(|time| time.parse::<u32>().ok());
    let now = UNIX_EPOCH + Duration::from_millis(time.unwrap_or(0).into());
    let Some(server) = "them.org".parse::<ServerName>().ok() else { return };

    let read = PublishedKeys::read(document, &server, now);
    if let Ok(keys) = &read {
        bounded(keys, &server, now);
        let Some(value) = first_value(document) else { return };
        assert!(vouches_for_itself(&value, &server), "it is not signed with one of the keys in it");
    }
    // The same, signed.
    let Ok(object) = serde_json::from_slice::<CanonicalJsonObject>(document) else {
        assert_eq!(read, Err(KeysError::NotKeys));
        return;
    };
    signed(json!(object), &server, now);
}

fn signed(mut value: Value, server: &ServerName, now: SystemTime) {
    let name = server.as_str();
    let id = format!("ed25519:{}", THEIRS.pair().version());
    let public = STANDARD.encode(THEIRS.pair().public_key());
    if let Some(keys) = value["verify_keys"].as_object_mut() {
        keys.insert(id.clone(), json!({ "key": public }));
    }
    // What the server has signed with its other keys is not about this document; what others have is their affair.
    match value["signatures"].as_object_mut() {
        Some(signatures) => drop(signatures.remove(name)),
        None => value["signatures"] = json!({}),
    }
    let document = sign(&value, name);
    let read = PublishedKeys::read(&document, server, now);
    let found = read.as_ref().map(|keys| (ids(keys), keys.valid_until)).map_err(|error| *error);
    assert_eq!(found, expected(&value, name, now), "another reading of it");
    let Ok(keys) = read else { return };
    bounded(&keys, server, now);
    assert!(keys.has(&id));

    // Not a moment longer than it is valid, and for no other server.
    assert_eq!(PublishedKeys::read(&document, server, until(&value)), Err(KeysError::Expired));
    let [other, longer]: [Option<ServerName>; 2] =
        ["other.org", "them.org:8448"].map(|name| name.parse().ok());
    for other in [other, longer].into_iter().flatten() {
        assert_eq!(PublishedKeys::read(&document, &other, now), Err(KeysError::OfAnother));
    }
    // Nothing can be changed.
    let tampered = |change: &dyn Fn(&mut Value)| {
        let Ok(mut value) = serde_json::from_slice(&document) else { panic!("what was signed is JSON") };
        change(&mut value);
        PublishedKeys::read(value.to_string().as_bytes(), server, now)
    };
    let more = |value: &mut Value| value["more"] = if value["more"] == 1 { json!(2) } else { json!(1) };
    assert_eq!(tampered(&more), Err(KeysError::NotSigned));
    let another = |value: &mut Value| {
        if let Some(keys) = value["verify_keys"].as_object_mut()
            && keys.remove("ed25519:more").is_none()
        {
            keys.insert("ed25519:more".to_owned(), json!({ "key": public }));
        }
    };
    assert_eq!(tampered(&another), Err(KeysError::NotSigned));
    let unsigned = |value: &mut Value| drop(value["signatures"].as_object_mut().map(|all| all.remove(name)));
    assert_eq!(tampered(&unsigned), Err(KeysError::NotSigned));
    cached(keys, server, &id, now);
}

/// What a document means that its server has signed.
fn expected(value: &Value, server: &str, now: SystemTime) -> Result<(Vec<String>, SystemTime), KeysError> {
    if value["server_name"] != server {
        return Err(KeysError::OfAnother);
    }
    let keys = value["verify_keys"].as_object().ok_or(KeysError::NotKeys)?;
    let letters = |c: char| c.is_ascii_alphanumeric() || c == '+' || c == '/';
    for key in keys.values() {
        let key = key["key"].as_str().filter(|_| key.is_object()).ok_or(KeysError::NotKeys)?;
        let bare = key.trim_end_matches('=');
        let padding = key.len() - bare.len();
        let whole = bare.len() % 4 != 1 && (padding == 0 || key.len() % 4 == 0 && padding < 3);
        if !whole || !bare.chars().all(letters) {
            return Err(KeysError::NotKeys);
        }
    }
    if !value["valid_until_ts"].is_u64() {
        return Err(KeysError::NotKeys);
    }
    let until = until(value);
    if until <= now {
        Err(KeysError::Expired)
    } else {
        Ok((keys.keys().cloned().collect(), until.min(now + LONGEST)))
    }
}

fn until(value: &Value) -> SystemTime {
    UNIX_EPOCH + Duration::from_millis(value["valid_until_ts"].as_u64().unwrap_or(0))
}

fn ids(keys: &PublishedKeys) -> Vec<String> {
    keys.keys.values().flat_map(|keys| keys.keys().cloned()).collect()
}

fn bounded(keys: &PublishedKeys, server: &ServerName, now: SystemTime) {
    assert!(now < keys.valid_until && keys.valid_until <= now + LONGEST);
    assert!(keys.keys.keys().eq([server.as_str()]), "keys of another server");
}

fn sign(value: &Value, server: &str) -> Vec<u8> {
    let Ok(mut object) = serde_json::from_value(value.clone()) else { panic!("it was canonical") };
    let signed = sign_json(server, THEIRS.pair(), &mut object);
    signed.and_then(|()| Ok(serde_json::to_vec(&object)?)).unwrap_or_else(|error| panic!("{error}"))
}

/// Whether one of the signatures is of one of the keys, and of the rest of the document.
fn vouches_for_itself(value: &Value, server: &ServerName) -> bool {
    let empty = Map::new();
    let signatures = value["signatures"][server.as_str()].as_object().unwrap_or(&empty);
    let mut rest = value.clone();
    for name in ["signatures", "unsigned"] {
        rest.as_object_mut().map(|rest| rest.remove(name));
    }
    let text = rest.to_string();
    let ed25519 = signatures.iter().filter(|(id, _)| id.starts_with("ed25519:"));
    ed25519.into_iter().any(|(id, signature)| {
        let bytes =
            |value: &Value| Base64::<ruma_common::serde::base64::Standard>::parse(value.as_str()?).ok();
        let key = bytes(&value["verify_keys"][id]["key"]);
        let (Some(key), Some(signature)) = (key, bytes(signature)) else { return false };
        let algorithm = SigningKeyAlgorithm::Ed25519;
        ruma_signatures::verify_canonical_json_bytes(
            &algorithm,
            key.as_bytes(),
            signature.as_bytes(),
            text.as_bytes(),
        )
        .is_ok()
    })
}

fn cached(keys: PublishedKeys, server: &ServerName, id: &str, now: SystemTime) {
    let until = keys.valid_until;
    let keys = Arc::new(keys);
    let mut cache = KeyCache::default();
    cache.remember(server, Some(keys.clone()), now);
    let look = |cache: &KeyCache, id: &str, now| cache.lookup(server, ["ed25519:none", id].into_iter(), now);
    let moment = Duration::from_millis(1);
    for at in [now, until - moment] {
        assert_eq!(look(&cache, id, at), Cached::Here(keys.clone()));
    }
    assert!(!matches!(look(&cache, id, until), Cached::Here(_)), "older than it may be");
    if !["ed25519:none", "ed25519:other"].iter().any(|id| keys.has(id)) {
        assert_eq!(look(&cache, "ed25519:other", now + PAUSE - moment), Cached::Unknown);
        assert_eq!(look(&cache, "ed25519:other", now + PAUSE), Cached::Ask);
    }
    if let Ok(other) = "other.org".parse() {
        assert_eq!(cache.lookup(&other, [id].into_iter(), now), Cached::Ask);
    }
}
