//! The service as its peers see it: a client over HTTP, a homeserver over TLS, an SFU over Twirp.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]
#![allow(clippy::disallowed_methods, reason = "tests own their clock and tasks")]

mod support;

mod admission;
mod browsers;
mod discovery;
mod hostile_requests;
mod openid_tokens;
mod program;
mod refusals;
mod sfu_calls;
mod strangers_addresses;
