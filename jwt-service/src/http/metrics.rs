//! `/metrics`, in Prometheus' text format.

use std::sync::Arc;

use axum::{
    extract::State,
    http::header::CONTENT_TYPE,
    response::{IntoResponse, Response},
};

use crate::{Inner, delegation::Delegation};

pub(super) async fn metrics(State(service): State<Arc<Inner>>) -> Response {
    let stats = service.delegation.as_ref().map(Delegation::stats);
    ([(CONTENT_TYPE, "text/plain; version=0.0.4")], service.metrics.text(stats.as_ref())).into_response()
}
