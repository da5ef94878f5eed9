//! LiveKit's signalling: HTTP surface, WebSockets, and the task that owns the rooms.
//!
//! Dialect v0 (`/rtc`, two peer connections) is spoken. `/rtc/v1` answers a bare 404, which is how clients learn
//! to fall back to v0. A resume (`reconnect=1`) is answered with `Leave{RECONNECT, STATE_MISMATCH}`, upon which
//! clients join anew; a participant leaves as soon as its WebSocket closes.

mod http;
mod manager;
mod query;
mod socket;

pub(crate) use http::{Surface, bearer, router};
pub(crate) use manager::{Manager, RoomHandle, now};
