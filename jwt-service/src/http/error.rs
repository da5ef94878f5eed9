//! Refusals: a status, a Matrix error code, and a sentence that gives nothing away.

use axum::{
    http::{
        HeaderValue, StatusCode,
        header::{CONTENT_TYPE, RETRY_AFTER},
    },
    response::{IntoResponse, Response},
};

use crate::limits::Limited;

/// How long a client should wait when we are full, in seconds.
const RETRY_AFTER_SECONDS: HeaderValue = HeaderValue::from_static("2");

/// Why a request is refused. The sentences are generic on purpose (MSC4195): details are in our log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    NotJson,
    MissingParameter(&'static str),
    DelayIncomplete,
    DelegationNotOffered,
    DelegationForbidden,
    NoClientApi,
    BadDelay,
    TooManyDelays,
    ShuttingDown,
    WebhookUnauthorized,
    WebhookMalformed,
    AmbiguousDevice,
    TooLarge,
    TooSlow,
    BrokenBody,
    TooBusy,
    Limited(Limited),
    Unauthorized,
    ServerNotAllowed,
    Unrecognized,
    Internal,
    /// The refusals of the homeserver's side (MSC4195), in the words of the Matrix specification.
    Homeserver(HomeserverRefusal),
}

/// Why a request to the homeserver's side is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HomeserverRefusal {
    Method,
    MissingToken,
    UnknownToken {
        soft_logout: bool,
    },
    ServerUnauthorized,
    Forbidden,
    BadJson,
    MissingParam(&'static str),
    InvalidParam(&'static str),
    /// Another server, ours included, did not do its part.
    Upstream,
}

impl HomeserverRefusal {
    fn parts(self) -> (StatusCode, &'static str, &'static str) {
        match self {
            Self::Method => {
                (StatusCode::METHOD_NOT_ALLOWED, "M_UNRECOGNIZED", "This endpoint takes POST alone")
            }
            Self::MissingToken => (StatusCode::UNAUTHORIZED, "M_MISSING_TOKEN", "Missing access token"),
            Self::UnknownToken { .. } => {
                (StatusCode::UNAUTHORIZED, "M_UNKNOWN_TOKEN", "The homeserver does not know the access token")
            }
            Self::ServerUnauthorized => {
                (StatusCode::UNAUTHORIZED, "M_UNAUTHORIZED", "The request's signature was not verified")
            }
            // The same for a room that is not there: who is not in it need not know.
            Self::Forbidden => (StatusCode::FORBIDDEN, "M_FORBIDDEN", "The user is not in the room"),
            Self::BadJson => {
                (StatusCode::BAD_REQUEST, "M_BAD_JSON", "The body does not have this endpoint's types")
            }
            Self::MissingParam(name) => (StatusCode::BAD_REQUEST, "M_MISSING_PARAM", name),
            Self::InvalidParam(sentence) => (StatusCode::BAD_REQUEST, "M_INVALID_PARAM", sentence),
            Self::Upstream => (
                StatusCode::BAD_GATEWAY,
                "M_UNKNOWN",
                "Another server did not do its part: the operator finds the reason in the log",
            ),
        }
    }

    fn label(self) -> &'static str {
        match self {
            Self::Method => "method",
            Self::MissingToken => "missing_token",
            Self::UnknownToken { .. } => "unknown_token",
            Self::ServerUnauthorized => "server_unauthorized",
            Self::Forbidden => "forbidden",
            Self::BadJson => "bad_json",
            Self::MissingParam(_) => "missing_parameter",
            Self::InvalidParam(_) => "invalid_parameter",
            Self::Upstream => "upstream",
        }
    }
}

impl Refusal {
    fn parts(self) -> (StatusCode, &'static str, &'static str) {
        let bad_json = |sentence| (StatusCode::BAD_REQUEST, "M_BAD_JSON", sentence);
        match self {
            Self::NotJson => (
                StatusCode::BAD_REQUEST,
                "M_NOT_JSON",
                "The body is not a JSON object with this endpoint's members and types",
            ),
            Self::MissingParameter(sentence) => bad_json(sentence),
            Self::DelayIncomplete => {
                bad_json("delay_id and a positive delay_timeout belong together: send both or neither")
            }
            Self::DelegationNotOffered => bad_json(
                "Delegated leave is not available to you here: ask again without delay_id and delay_timeout",
            ),
            Self::DelegationForbidden => (
                StatusCode::FORBIDDEN,
                "M_FORBIDDEN",
                "Delegated leave is not available to users of this homeserver",
            ),
            Self::NoClientApi => bad_json(
                "The homeserver's client-server API was not found, so no leave can be delegated for it",
            ),
            Self::BadDelay => {
                bad_json("delay_id or delay_timeout is not what a homeserver's delayed event can have")
            }
            Self::TooManyDelays => (
                StatusCode::TOO_MANY_REQUESTS,
                "M_LIMIT_EXCEEDED",
                "Too many delegated leaves: try again when others have ended",
            ),
            Self::ShuttingDown => (
                StatusCode::SERVICE_UNAVAILABLE,
                "M_UNKNOWN",
                "The service is shutting down: try again shortly",
            ),
            Self::WebhookUnauthorized => (
                StatusCode::UNAUTHORIZED,
                "M_UNAUTHORIZED",
                "The webhook is not signed with this service's API key and secret, or its clock is off",
            ),
            Self::WebhookMalformed => {
                (StatusCode::BAD_REQUEST, "M_BAD_JSON", "The body is not a LiveKit webhook event")
            }
            Self::AmbiguousDevice => bad_json("device_id must not begin with digits and a colon"),
            Self::TooLarge => (StatusCode::PAYLOAD_TOO_LARGE, "M_TOO_LARGE", "The body is too large"),
            Self::TooSlow => (StatusCode::REQUEST_TIMEOUT, "M_UNKNOWN", "The body did not arrive in time"),
            Self::BrokenBody => (StatusCode::BAD_REQUEST, "M_NOT_JSON", "The body could not be read"),
            Self::TooBusy => (
                StatusCode::TOO_MANY_REQUESTS,
                "M_LIMIT_EXCEEDED",
                "Too many requests at once: try again shortly",
            ),
            Self::Limited(_) => (
                StatusCode::TOO_MANY_REQUESTS,
                "M_LIMIT_EXCEEDED",
                "Too many requests: try again after the time in Retry-After",
            ),
            Self::Unauthorized => (
                StatusCode::UNAUTHORIZED,
                "M_UNAUTHORIZED",
                "The homeserver did not confirm the OpenID token for this user",
            ),
            Self::ServerNotAllowed => {
                (StatusCode::FORBIDDEN, "M_FORBIDDEN", "This service is not for users of this homeserver")
            }
            Self::Unrecognized => {
                (StatusCode::NOT_FOUND, "M_UNRECOGNIZED", "Delegated leave is not offered by this service")
            }
            Self::Internal => (
                StatusCode::INTERNAL_SERVER_ERROR,
                "M_UNKNOWN",
                "The service could not prepare the call: its operator finds the reason in its log",
            ),
            Self::Homeserver(refusal) => refusal.parts(),
        }
    }
}

impl Refusal {
    /// The body: `errcode` and `error`, and the request's id, by which the operator finds it in the log.
    pub(super) fn body(self, request_id: Option<&str>) -> String {
        let (_, errcode, error) = self.parts();
        let mut body = serde_json::json!({ "errcode": errcode, "error": error });
        match self {
            Self::Homeserver(HomeserverRefusal::MissingParam(name)) => {
                body["error"] = format!("{name} is needed").into();
            }
            // Clients keep their keys when they can log in again to the same session.
            Self::Homeserver(HomeserverRefusal::UnknownToken { soft_logout: true }) => {
                body["soft_logout"] = true.into();
            }
            _ => {}
        }
        if let Some(id) = request_id {
            body["request_id"] = id.into();
        }
        format!("{body}\n")
    }

    /// For counts.
    pub(super) fn label(self) -> &'static str {
        match self {
            Self::NotJson => "not_json",
            Self::MissingParameter(_) => "missing_parameter",
            Self::DelayIncomplete => "delay_incomplete",
            Self::DelegationNotOffered => "delegation_not_offered",
            Self::DelegationForbidden => "delegation_forbidden",
            Self::NoClientApi => "no_client_api",
            Self::BadDelay => "bad_delay",
            Self::TooManyDelays => "too_many_delays",
            Self::ShuttingDown => "shutting_down",
            Self::WebhookUnauthorized => "webhook_unauthorized",
            Self::WebhookMalformed => "webhook_malformed",
            Self::AmbiguousDevice => "ambiguous_device",
            Self::TooLarge => "too_large",
            Self::TooSlow => "too_slow",
            Self::BrokenBody => "broken_body",
            Self::TooBusy => "too_busy",
            Self::Limited(_) => "limited",
            Self::Unauthorized => "unauthorized",
            Self::ServerNotAllowed => "server_not_allowed",
            Self::Unrecognized => "unrecognized",
            Self::Internal => "internal",
            Self::Homeserver(refusal) => refusal.label(),
        }
    }

    fn retry_after(self) -> Option<HeaderValue> {
        match self {
            Self::TooBusy | Self::TooManyDelays | Self::ShuttingDown => Some(RETRY_AFTER_SECONDS),
            // Rounded up: a client that comes too early is refused again.
            Self::Limited(limited) => {
                let wait = limited.retry_after;
                Some((wait.as_secs() + u64::from(wait.subsec_nanos() > 0)).max(1).into())
            }
            _ => None,
        }
    }
}

impl IntoResponse for Refusal {
    /// The refusal itself stays with the response, for the layer that knows the request's id.
    fn into_response(self) -> Response {
        let (status, ..) = self.parts();
        let json = HeaderValue::from_static("application/json");
        let mut response = (status, [(CONTENT_TYPE, json)], self.body(None)).into_response();
        if let Some(seconds) = self.retry_after() {
            response.headers_mut().insert(RETRY_AFTER, seconds);
        }
        response.extensions_mut().insert(self);
        response
    }
}
