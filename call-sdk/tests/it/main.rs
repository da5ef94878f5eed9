//! The SDK against what it will meet: one module per behaviour.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod calls_follow_the_room;
mod livekit_transport;
mod script;
