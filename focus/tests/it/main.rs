//! The focus from outside: one module per behaviour.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod media_clients;
mod support;

mod admin_api;
mod bad_input;
mod data_crosses_the_plane;
mod leaving_and_shutdown;
mod media_is_forwarded;
mod room_machine;
mod room_never_panics;
mod sessions_change;
mod signalling;
mod strangers_change_nothing;
