//! Reading a request body within bounds of size and time.
#![allow(clippy::disallowed_methods, reason = "this is the shell: it owns the clock and the tasks")]

use axum::{body::HttpBody as _, extract::Request};
use bytes::Bytes;
use tokio::sync::SemaphorePermit;

use super::{error::Refusal, json::Body};
use crate::{Inner, config::Limits};

impl Inner {
    /// What a token request says, and its place among those in progress. `members` are what it may have at the top.
    pub(super) async fn take(
        &self,
        request: Request,
        members: &[&str],
    ) -> Result<(SemaphorePermit<'_>, Body), Refusal> {
        let place = self.place()?;
        let bytes = read(request, &self.settings.limits).await?;
        let body = Body::decode(&bytes, members).map_err(|_| Refusal::NotJson)?;
        Ok((place, body))
    }
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
