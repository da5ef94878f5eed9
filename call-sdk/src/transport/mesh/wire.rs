//! The `m.call.*` to-device messages.
