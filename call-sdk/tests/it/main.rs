//! The SDK against what it will meet: one module per behaviour.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]
#![allow(clippy::disallowed_methods, reason = "a test is a shell: it owns the clock and the tasks")]

mod bad_network;
mod focus_process;
mod js_sdk;
mod kick;
mod livekit_transport;
mod matrix;
mod mesh;
mod mesh_browser;
mod network;
mod speakers;
mod support;
