//! The Matrix port over matrix-sdk, against a homeserver.

mod delayed_leaves;
mod requests_and_refusals;
mod room_news;
mod sessions;
mod state_members;
mod sticky_members;
mod support;
mod synapse;
mod to_device_outcomes;
