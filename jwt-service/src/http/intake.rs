//! Reading a request within bounds of number, size and time.
#![allow(clippy::disallowed_methods, reason = "this is the shell: it owns the clock and the tasks")]

use axum::{body::HttpBody as _, extract::Request};
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt as _;
use tokio::sync::SemaphorePermit;

use super::{error::Refusal, json::Body};
use crate::{Inner, config::Limits};

/// How much of a body beyond the limit is read and dropped. A connection that is closed with bytes unread is reset, and
/// the answer may be lost with it: whoever sends a little too much should see why it is refused.
const SKIPPED: usize = 1024 * 1024;

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
    let mut body = request.into_body();
    let most = limits.body.saturating_add(SKIPPED);
    let declared = body.size_hint().lower();
    if declared > most as u64 {
        return Err(Refusal::TooLarge);
    }
    let mut large = declared > limits.body as u64;
    let (mut bytes, mut seen) = (BytesMut::new(), 0);
    let reading = async {
        while let Some(frame) = body.frame().await {
            let Ok(data) = frame.map_err(|_| Refusal::BrokenBody)?.into_data() else { continue };
            seen += data.len();
            large |= seen > limits.body;
            if seen > most {
                break;
            }
            if large {
                bytes.clear();
            } else {
                bytes.extend_from_slice(&data);
            }
        }
        Ok(())
    };
    let read = tokio::time::timeout(limits.body_time, reading).await.unwrap_or(Err(Refusal::TooSlow));
    if large {
        return Err(Refusal::TooLarge);
    }
    read.map(|()| bytes.freeze())
}
