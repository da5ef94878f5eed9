//! The answers a homeserver gives when it refuses: an HTTP status and the Matrix error object.

use std::time::Duration;

use serde_json::{Map, Value, json};

/// A refusal as it goes on the wire. The wording imitates what Synapse 1.163 was seen to answer.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct MatrixError {
    pub(super) status: u16,
    pub(super) body: Value,
    /// Goes out as the `Retry-After` header too, because some clients read only one of the two.
    pub(super) retry_after: Option<Duration>,
}

impl MatrixError {
    pub(super) fn new(status: u16, errcode: &str, error: impl Into<String>) -> Self {
        Self { status, body: json!({"errcode": errcode, "error": error.into()}), retry_after: None }
    }

    pub(super) fn forbidden(error: impl Into<String>) -> Self {
        Self::new(403, "M_FORBIDDEN", error)
    }

    pub(super) fn not_found(error: impl Into<String>) -> Self {
        Self::new(404, "M_NOT_FOUND", error)
    }

    pub(super) fn bad_json(error: impl Into<String>) -> Self {
        Self::new(400, "M_BAD_JSON", error)
    }

    pub(super) fn invalid_param(error: impl Into<String>) -> Self {
        Self::new(400, "M_INVALID_PARAM", error)
    }

    pub(super) fn missing_param(name: &str) -> Self {
        Self::new(400, "M_MISSING_PARAM", format!("Missing params: ['{name}']"))
    }

    pub(super) fn too_large(error: impl Into<String>) -> Self {
        Self::new(413, "M_TOO_LARGE", error)
    }

    pub(super) fn unrecognized(status: u16) -> Self {
        Self::new(status, "M_UNRECOGNIZED", "Unrecognized request")
    }

    pub(super) fn missing_token() -> Self {
        Self::new(401, "M_MISSING_TOKEN", "Missing access token")
    }

    /// `soft_logout`: the device may log in again.
    pub(super) fn unknown_token(soft_logout: bool) -> Self {
        let mut refusal = Self::new(401, "M_UNKNOWN_TOKEN", "Invalid access token passed.");
        refusal.body["soft_logout"] = Value::Bool(soft_logout);
        refusal
    }

    /// `retry_after` is `None` where waiting would not help, for example when a quota is full.
    pub(super) fn limit_exceeded(error: impl Into<String>, retry_after: Option<Duration>) -> Self {
        let mut refusal = Self::new(429, "M_LIMIT_EXCEEDED", error);
        refusal.body["retry_after_ms"] = retry_after.map_or(Value::Null, |d| json!(d.as_millis() as u64));
        refusal.retry_after = retry_after;
        refusal
    }

    /// User-interactive authentication is needed: one flow with one stage.
    pub(super) fn interactive(stage: &str, session: String, failure: Option<Self>) -> Self {
        let mut body = Map::new();
        if let Some(Value::Object(failed)) = failure.map(|f| f.body) {
            body.extend(failed);
        }
        body.insert("session".into(), session.into());
        body.insert("flows".into(), json!([{ "stages": [stage] }]));
        body.insert("params".into(), json!({}));
        Self { status: 401, body: Value::Object(body), retry_after: None }
    }
}
