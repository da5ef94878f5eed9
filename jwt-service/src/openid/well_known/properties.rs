//! What must hold for any `/.well-known/matrix/server`.

use serde_json::Value;

use super::{Delegation, DelegationCache, MAX_LIFETIME, delegation, lifetime};
use crate::fuzzing::{beginning, first_value};

/// A document that came with this `Cache-Control` header.
pub(crate) fn server_document(cache_control: &str, document: &[u8]) {
    let found = delegation(document);
    if let Delegation::To(name) = &found {
        assert!(!name.as_str().is_empty() && name.as_str().len() <= document.len());
    }
    // An array of one string is read as an object of one member: a habit of serde, and harmless.
    if serde_json::from_slice::<Value>(document).is_ok_and(|value| !value.is_array())
        && let Some(value) = first_value(document)
    {
        let server = value.get("m.server").and_then(Value::as_str).filter(|server| !server.is_empty());
        let expected = server.map(|server| server.parse().map_or(Delegation::Invalid, Delegation::To));
        assert_eq!(found, expected.unwrap_or(Delegation::None), "another reading of it");
    }
    for reached in [false, true] {
        let life = lifetime(&found, reached, Some(cache_control));
        assert!(life <= MAX_LIFETIME);
        let lower = cache_control.to_ascii_lowercase();
        if matches!(found, Delegation::To(_)) && lower == "no-store" {
            assert!(life.is_zero());
        }
        let (mut cache, now) = (DelegationCache::default(), beginning());
        cache.remember("hs".to_owned(), found.clone(), now, life);
        assert_eq!(cache.lookup("hs", now), (!life.is_zero()).then(|| found.clone()));
        assert_eq!(cache.lookup("hs", now + life), None);
    }
}
