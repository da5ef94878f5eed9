//! What must hold for any `/.well-known/matrix/client`.

use serde_json::Value;
use url::Url;

use super::base_url;
use crate::fuzzing::first_value;

/// The base URL in a document, to which requests can be made.
pub(crate) fn client_document(document: &[u8]) -> Option<Url> {
    let base = base_url(document)?;
    assert!(matches!(base.scheme(), "http" | "https") && base.host().is_some(), "{base}");
    assert!(base.username().is_empty() && base.password().is_none(), "{base}");
    assert!(base.query().is_none() && base.fragment().is_none(), "{base}");
    if let Some(value) = first_value(document)
        && let Some(written) = value.pointer("/m.homeserver/base_url").and_then(Value::as_str)
    {
        assert_eq!(Url::parse(written).as_ref(), Ok(&base), "another reading of it");
    }
    Some(base)
}
