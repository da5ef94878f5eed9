//! Every request has an id: in each of its log lines, in the header `X-Request-Id` of its answer, and in the
//! body of a refusal. So what a user reports leads to the log.
#![allow(clippy::disallowed_methods, reason = "this is the shell: it owns the clock and the tasks")]

use std::{sync::Arc, time::Instant};

use axum::{
    body::Body,
    extract::{Request, State},
    http::{HeaderName, HeaderValue, header::CONTENT_LENGTH},
    middleware::Next,
    response::Response,
};
use tracing::Instrument as _;

use super::{error::Refusal, homeserver_side};
use crate::Inner;

const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// The longest id that we take over from a reverse proxy.
const LONGEST: usize = 64;

/// Names, counts and times a request.
pub(super) async fn observe(State(service): State<Arc<Inner>>, request: Request, next: Next) -> Response {
    let began = Instant::now();
    let _in_flight = service.metrics.request_begins();
    let endpoint = endpoint(request.uri().path());
    let id = Some(&request)
        .filter(|request| service.limiter.trusts_sender_of(request))
        .and_then(|request| usable(request.headers().get(X_REQUEST_ID)?))
        .unwrap_or_else(|| format!("{:016x}", rand::random::<u64>()));
    // At the highest level, so that it is there whatever the log level is.
    let span = tracing::error_span!("request", id, endpoint);
    let response = async {
        let response = next.run(request).await;
        tracing::debug!(status = response.status().as_u16(), "answered");
        response
    }
    .instrument(span)
    .await;
    let (mut parts, mut body) = response.into_parts();
    let refusal = parts.extensions.get::<Refusal>().copied();
    if let Some(refusal) = refusal {
        // A HEAD or an empty answer has no refusal; what has one has its body from it.
        body = Body::from(refusal.body(Some(&id)));
        parts.headers.remove(CONTENT_LENGTH);
    }
    let outcome = match refusal {
        Some(refusal) => refusal.label(),
        None if parts.status.is_success() => "ok",
        None => "http_error",
    };
    service.metrics.request(endpoint, outcome, began.elapsed());
    if let Ok(value) = HeaderValue::from_str(&id) {
        parts.headers.insert(X_REQUEST_ID, value);
    }
    Response::from_parts(parts, body)
}

/// An id that a log can hold: nobody forges lines with it.
fn usable(id: &HeaderValue) -> Option<String> {
    let id = id.to_str().ok()?;
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    (!id.is_empty() && id.len() <= LONGEST && id.bytes().all(plain)).then(|| id.to_owned())
}

/// The endpoint's name: never a path that a stranger has made up.
fn endpoint(path: &str) -> &'static str {
    match path {
        "/get_token" => "get_token",
        "/sfu/get" => "sfu_get",
        "/delegate_delayed_leave" => "delegate_delayed_leave",
        "/sfu_webhook" => "sfu_webhook",
        "/healthz" => "healthz",
        "/readyz" => "readyz",
        path => homeserver_side::endpoint(path).unwrap_or("other"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_that_could_forge_a_log_line_are_not_taken_over() {
        let usable = |id: &str| usable(&HeaderValue::from_str(id).unwrap());
        assert_eq!(usable("0af7-651.9_x").as_deref(), Some("0af7-651.9_x"));
        for bad in ["", "a b", "a=b", "a\"b", &"a".repeat(65)] {
            assert_eq!(usable(bad), None, "{bad:?}");
        }
    }
}
