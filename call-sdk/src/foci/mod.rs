//! Foci: which SFU deployment a call publishes to, and tokens for its rooms.
//!
//! 1. [`discover`] finds the foci that this device may publish to.
//! 2. [`Access::get`] gets a token for one of them, or for the focus of another member.
//! 3. [`Access::delegate`] hands our delayed leave to the issuer of the publishing token.
//!
//! [`ServicePolicy`] decides which services see an OpenID token of ours.
//!
//! *Assumptions.* The members that the caller passes are joined to the room. The Matrix port sorts the homeserver's
//! errors as [`crate::matrix::RequestError`] says.

mod access;
mod delegation;
mod discovery;
mod exchange;
mod policy;
#[cfg(test)]
mod tests;
mod wire;

pub use crate::addresses::AddressRule;
#[cfg(feature = "webrtc")]
pub(crate) use access::service_client;
pub use access::{Access, AccessRequest, SfuAccess};
pub use delegation::DelegationError;
pub use discovery::{
    Candidate, Discovered, Discovery, DiscoveryOptions, Next, NoFocus, Source, Tried, discover,
};
pub use exchange::{Attempt, Endpoint, EndpointError, Malformed, Purpose, Unsuitable};
pub use policy::{PolicyRefusal, RefusalReason, ServicePolicy};

use std::time::Duration;

use crate::transport::LiveKitFocus;

/// Why there is no focus to publish to, or no token for one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FocusError {
    /// Nobody names a focus.
    #[error(transparent)]
    NoFocus(#[from] NoFocus),
    /// The focus has no endpoint for the purpose.
    #[error("the focus {focus} cannot be used: {reason}")]
    Unsuitable {
        /// The focus.
        focus: LiveKitFocus,
        /// What it lacks.
        reason: Unsuitable,
    },
    /// No endpoint issued a token.
    #[error("no token for the SFU of {focus} ({})", list(attempts))]
    NoToken {
        /// The focus.
        focus: LiveKitFocus,
        /// Every endpoint that was asked, and its last answer.
        attempts: Vec<Attempt>,
    },
}

impl FocusError {
    /// Whose fault it is, by the answer that decided.
    #[must_use]
    pub fn fault(&self) -> Fault {
        let attempts = match self {
            Self::NoFocus(nothing) if nothing.is_logged_out() => return Fault::LoggedOut,
            Self::NoFocus(_) => return Fault::NoFocus,
            Self::Unsuitable { .. } => return Fault::Refused,
            Self::NoToken { attempts, .. } => attempts,
        };
        let last = attempts.last().map_or(Fault::Refused, |attempt| attempt.error.fault());
        // A service that lacks an endpoint says nothing about the one that was away.
        let passing = attempts.iter().map(|attempt| attempt.error.fault()).find(|fault| fault.may_pass());
        if last == Fault::Refused { passing.unwrap_or(last) } else { last }
    }

    /// How long the other side asks us to wait.
    #[must_use]
    pub fn retry_after(&self) -> Option<Duration> {
        let Self::NoToken { attempts, .. } = self else { return None };
        attempts.iter().rev().find_map(|attempt| attempt.error.retry_after())
    }
}

/// Whose fault it is that there is no token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Fault {
    /// Nobody names a focus.
    NoFocus,
    /// Our own policy forbids it.
    Policy,
    /// Our homeserver does not issue OpenID tokens, for now or at all.
    Homeserver,
    /// The issuer cannot be reached, is in trouble, or limits us.
    Unreachable,
    /// The issuer refuses, or its answers are unusable.
    Refused,
    /// Our session at the homeserver is over.
    LoggedOut,
}

impl Fault {
    /// Whether the same attempt may succeed later.
    #[must_use]
    pub fn may_pass(self) -> bool {
        matches!(self, Self::Homeserver | Self::Unreachable)
    }
}

fn list<T: std::fmt::Display>(items: &[T]) -> String {
    items.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}
