//! What the testkit offers, used as its users use it.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod element_calls_decode_each_other;
mod homeserver;
mod js_sdk_members_exchange_keys;
mod livekit_clients_decode_each_other;
mod synapse_serves_what_a_call_needs;
