//! The HTTP surface: exact paths, the headers that browsers need on every answer, and one file per endpoint.

mod admit;
mod delegate_delayed_leave;
pub(crate) mod error;
mod get_token;
mod healthz;
mod homeserver_side;
mod intake;
mod json;
pub(crate) mod limits;
mod metrics;
pub(crate) mod readyz;
mod request_id;
mod sfu_get;
mod sfu_webhook;

use std::sync::Arc;

use axum::{
    Router,
    http::{HeaderValue, Method, StatusCode, header},
    middleware::from_fn_with_state,
    response::{IntoResponse, Response},
    routing::{MethodRouter, any, get},
};

pub(crate) use self::{admit::causes, sfu_webhook::Replays};
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use self::{
    homeserver_side::properties::sfu_url, json::properties::request_body, sfu_webhook::properties::webhook,
};
use crate::Inner;

pub(crate) fn router(service: Arc<Inner>) -> Router {
    let mut router = Router::new();
    if service.delegation.is_some() {
        router = router.route("/sfu_webhook", any(sfu_webhook::sfu_webhook));
    }
    router = router.merge(homeserver_side::router(&service));
    let public = |route: MethodRouter<Arc<Inner>>| {
        for_browsers(route.layer(from_fn_with_state(service.clone(), limits::per_address)))
    };
    router
        .route("/get_token", public(any(get_token::get_token)))
        .route("/sfu/get", public(any(sfu_get::sfu_get)))
        .route("/delegate_delayed_leave", public(any(delegate_delayed_leave::delegate_delayed_leave)))
        .route("/healthz", any(healthz::healthz))
        .route("/readyz", get(readyz::readyz))
        .layer(from_fn_with_state(service.clone(), request_id::observe))
        .with_state(service)
}

/// For operators' tools alone.
pub(crate) fn operators_router(service: Arc<Inner>) -> Router {
    Router::new()
        .route("/metrics", get(metrics::metrics))
        .route("/healthz", any(healthz::healthz))
        .route("/readyz", get(readyz::readyz))
        .with_state(service)
}

/// The headers of the three endpoints that web pages call, on every answer: without them on an error too, the
/// page sees no status at all and cannot tell a refusal from a dead server.
fn for_browsers(route: MethodRouter<Arc<Inner>>) -> MethodRouter<Arc<Inner>> {
    route.layer(axum::middleware::map_response(|mut response: Response| async move {
        let headers = response.headers_mut();
        for (name, value) in [
            (header::CONTENT_TYPE, "application/json"),
            (header::ACCESS_CONTROL_ALLOW_ORIGIN, "*"),
            (header::ACCESS_CONTROL_ALLOW_METHODS, "POST"),
            (
                header::ACCESS_CONTROL_ALLOW_HEADERS,
                "Accept, Content-Type, Content-Length, Accept-Encoding, X-CSRF-Token",
            ),
        ] {
            headers.insert(name, HeaderValue::from_static(value));
        }
        response
    }))
}

/// What `method` gets before a body is read: `None` for POST, which goes on.
fn other_than_post(method: &Method) -> Option<Response> {
    match *method {
        Method::POST => None,
        Method::OPTIONS => Some(StatusCode::OK.into_response()),
        _ => Some(StatusCode::METHOD_NOT_ALLOWED.into_response()),
    }
}
