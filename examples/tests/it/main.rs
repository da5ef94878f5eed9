//! The whole system against programs that nobody here wrote.
#![allow(clippy::disallowed_methods, reason = "a program is a shell: it owns the clock and the tasks")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod delegated_leave;
mod demo;
mod element_call;
mod homeserver_tokens;
mod hostile_packets;
mod livekit_client;
mod programs;
mod support;
