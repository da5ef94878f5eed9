//! `/healthz`: the process is alive and answers. It says nothing about the SFU.

use axum::http::{Method, StatusCode};

pub(super) async fn healthz(method: Method) -> StatusCode {
    match method {
        Method::GET | Method::HEAD => StatusCode::OK,
        _ => StatusCode::METHOD_NOT_ALLOWED,
    }
}
