//! Reading a request within bounds of number, size and time.
#![allow(clippy::disallowed_methods, reason = "this is the shell: it owns the clock and the tasks")]

use axum::{body::HttpBody as _, extract::Request};
use bytes::Bytes;

use tokio::sync::SemaphorePermit;

use super::{error::Refusal, json::Body};
use crate::{Inner, config::Limits};

/// The decoded body of a client's request, which may have the members in `known`, and its place among the requests
/// in flight, to be held until it is answered.
pub(super) async fn take<'a>(
    service: &'a Inner,
    request: Request,
    known: &[&str],
) -> Result<(SemaphorePermit<'a>, Body), Refusal> {
    let place = service.place()?;
    let bytes = read(request, &service.settings.limits).await?;
    let body = Body::decode(&bytes, known).map_err(|_| Refusal::NotJson)?;
    Ok((place, body))
}

/// The whole body of `request`, or why it is not accepted.
pub(super) async fn read(request: Request, limits: &Limits) -> Result<Bytes, Refusal> {
    let body = request.into_body();
    // A body that says it is too large is refused before a byte of it is stored.
    if body.size_hint().lower() > limits.body as u64 {
        return Err(Refusal::TooLarge);
    }
    let read = axum::body::to_bytes(body, limits.body);
    match tokio::time::timeout(limits.body_time, read).await {
        Ok(Ok(bytes)) => Ok(bytes),
        Ok(Err(error)) => Err(if is_limit(&error) { Refusal::TooLarge } else { Refusal::BrokenBody }),
        Err(_) => Err(Refusal::TooSlow),
    }
}

/// Whether reading stopped at our limit, as opposed to a connection that broke.
fn is_limit(error: &axum::Error) -> bool {
    let mut cause: Option<&dyn std::error::Error> = std::error::Error::source(error);
    while let Some(error) = cause {
        if error.is::<http_body_util::LengthLimitError>() {
            return true;
        }
        cause = error.source();
    }
    false
}
