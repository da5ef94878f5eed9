//! One call without I/O: membership, media keys, peers, routing and policy.
//!
//! [`CallMachine`] decides everything and performs nothing. Feed it with [`CallMachine::handle`], and after every input,
//! and when a wait is over, drain [`CallMachine::poll`] until it says [`Output::WaitUntil`]. Times are arguments. The
//! shell behind [`Call`](crate::call::Call) is one way to perform its outputs; simulations and load tests are others.
//!
//! *Assumptions.* Outputs are performed in order. Every request gets exactly one outcome, however late; events of a
//! connection that was closed may still come and are dropped by their [`ConnectionId`](crate::transport::ConnectionId).

mod call_machine;
mod clock;
mod config;
mod event;
pub(crate) mod media_keys;
pub(crate) mod membership;
mod messages;
mod notify;
mod own_foci;
mod path_choice;
mod paths;
mod peers;
mod placement;
mod report;
mod routing;
mod sealing;
#[cfg(test)]
mod simulation;
mod stats;
#[cfg(test)]
pub(crate) mod testing;
mod wishes;

pub use call_machine::CallMachine;
pub use clock::MemberClock;
pub(crate) use clock::TrackClock;
pub use config::{EncryptionPolicy, MachineConfig};
pub use event::{CallEvent, ConnectFailure, ConnectFailureKind, EndReason, NoMediaCause};
pub use media_keys::{HealingConfig, InboxLimits, KeyRejected, RolloutConfig};
pub use membership::{
    own::{DelegationError, EndReason as MembershipEnd, NoDelayedLeave, OwnConfig, Task},
    wire::MembershipMode,
};
pub use messages::{AccessWanted, CallStatus, Grant, Input, Output, PublishFailure, RequestId};
pub use notify::{Attention, Invite, InviteEnd};
pub use path_choice::PathChoice;
pub use peers::{IncomingTrack, TrackRoute};
pub use placement::{MeshPolicy, MeshReason};
pub use report::{CallReport, Entry, MemberReport, Step, TrackReport};
pub use sealing::Sealing;
pub use stats::{TrackCounters, TrackStats};
