//! Per-sender media keys: when ours is made, sent, switched ([`rollout`]); which of theirs we accept
//! ([`inbox`]); how they look on the wire ([`wire`]).

pub mod inbox;
pub mod rollout;
pub mod wire;
