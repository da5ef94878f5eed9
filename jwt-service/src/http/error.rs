//! Refusals: a status, a Matrix error code, and a sentence that gives nothing away.

use axum::{
    http::{HeaderValue, StatusCode, header::RETRY_AFTER},
    response::{IntoResponse, Response},
};

/// How long a client should wait when we are full, in seconds.
const RETRY_AFTER_SECONDS: HeaderValue = HeaderValue::from_static("2");

/// Why a request is refused. The sentences are generic on purpose (MSC4195): details are in our log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    NotJson,
    MissingParameter(&'static str),
    DelayIncomplete,
    DelegationNotOffered,
    AmbiguousDevice,
    TooLarge,
    TooSlow,
    BrokenBody,
    TooBusy,
    Unauthorized,
    Unrecognized,
    Internal,
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
            Self::AmbiguousDevice => bad_json("device_id must not begin with digits and a colon"),
            Self::TooLarge => (StatusCode::PAYLOAD_TOO_LARGE, "M_TOO_LARGE", "The body is too large"),
            Self::TooSlow => (StatusCode::REQUEST_TIMEOUT, "M_UNKNOWN", "The body did not arrive in time"),
            Self::BrokenBody => (StatusCode::BAD_REQUEST, "M_NOT_JSON", "The body could not be read"),
            Self::TooBusy => (
                StatusCode::TOO_MANY_REQUESTS,
                "M_LIMIT_EXCEEDED",
                "Too many requests at once: try again shortly",
            ),
            Self::Unauthorized => (
                StatusCode::UNAUTHORIZED,
                "M_UNAUTHORIZED",
                "The homeserver did not confirm the OpenID token for this user",
            ),
            Self::Unrecognized => {
                (StatusCode::NOT_FOUND, "M_UNRECOGNIZED", "Delegated leave is not offered by this service")
            }
            Self::Internal => (
                StatusCode::INTERNAL_SERVER_ERROR,
                "M_UNKNOWN",
                "The service could not prepare the call: its operator finds the reason in its log",
            ),
        }
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let (status, errcode, error) = self.parts();
        let body = format!("{}\n", serde_json::json!({ "errcode": errcode, "error": error }));
        let mut response = (status, body).into_response();
        if self == Self::TooBusy {
            response.headers_mut().insert(RETRY_AFTER, RETRY_AFTER_SECONDS);
        }
        response
    }
}
