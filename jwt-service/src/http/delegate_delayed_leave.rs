//! `/delegate_delayed_leave`: not offered. Clients probe it without credentials and take 404 to mean exactly
//! that.

use axum::{
    http::{Method, StatusCode},
    response::{IntoResponse, Response},
};

use super::error::Refusal;

pub(super) async fn delegate_delayed_leave(method: Method) -> Response {
    // A preflight must succeed, or the page never sees the 404 behind it.
    if method == Method::OPTIONS {
        StatusCode::OK.into_response()
    } else {
        Refusal::Unrecognized.into_response()
    }
}
