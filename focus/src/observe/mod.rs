//! Health and counters.

mod counters;
mod health;

pub use counters::{Counter, Counters, Stats};
pub use health::Heartbeat;
