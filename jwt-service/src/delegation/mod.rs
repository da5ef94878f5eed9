//! Delegated leave: keep a client's delayed leave event alive while its participant is on the SFU, and send it
//! as soon as the participant goes away (MSC4140, MSC4195).

mod homeservers;
mod machine;
mod notice;
mod registry;
mod shell;

use std::{
    fmt,
    time::{Duration, SystemTime},
};

use zeroize::Zeroizing;

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use self::{
    homeservers::properties::{delayed_event_answer, delayed_event_url},
    machine::properties::job_machine,
    registry::model::job_registry,
};
pub(crate) use self::{machine::Input, registry::AddError, shell::Delegation};
pub use self::{
    machine::Leave,
    registry::{Lateness, Stats},
};
use crate::{ParticipantIdentity, RoomAlias, ServerName};

/// Bounds and habits of delegated leave.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DelegationConfig {
    /// Who this process is among those that share a store. It must differ between them, and be the same again
    /// after a restart: host name and port, for instance. A process that comes back under another name waits
    /// 15 s for its earlier leases to run out.
    pub replica: String,
    /// How often to check with the SFU that a connected participant is still there: for leave webhooks that
    /// get lost. `None`: never.
    pub sanity_interval: Option<Duration>,
    /// Shorter delays than this are refused: 100 ms.
    pub shortest_delay: Duration,
    /// Longer delays than this are refused: 31 days.
    pub longest_delay: Duration,
    /// How many jobs there may be: 100,000.
    pub jobs: usize,
    /// How many one user may have: 100, as many delayed events as Synapse lets a user schedule. Jobs from
    /// before a restart do not count.
    pub jobs_per_user: usize,
}

impl DelegationConfig {
    /// The usual bounds, without sanity checks, for the process `replica`.
    pub fn new(replica: impl Into<String>) -> Self {
        Self {
            replica: replica.into(),
            sanity_interval: None,
            shortest_delay: Duration::from_millis(100),
            longest_delay: Duration::from_hours(31 * 24),
            jobs: 100_000,
            jobs_per_user: 100,
        }
    }
}

/// Which participant a job is about; there is at most one live job for each.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct JobKey {
    /// The SFU room.
    pub room: RoomAlias,
    /// The participant in it.
    pub identity: ParticipantIdentity,
}

/// A delayed event's id: whoever knows it can send or restart the event. Redacted in `Debug`, wiped on drop.
#[derive(Clone, PartialEq, Eq)]
pub struct DelayId(Zeroizing<String>);

impl DelayId {
    /// Longest id that is taken, in bytes.
    pub const MAX_LEN: usize = 255;

    /// Takes an id that can stand as one segment of a path.
    ///
    /// # Errors
    /// [`BadDelayId`]: empty, longer than 255 bytes, `.` or `..`, or with control characters.
    pub fn new(id: String) -> Result<Self, BadDelayId> {
        let id = Zeroizing::new(id);
        let bad = id.is_empty()
            || id.len() > Self::MAX_LEN
            || matches!(id.as_str(), "." | "..")
            || id.chars().any(char::is_control);
        if bad { Err(BadDelayId) } else { Ok(Self(id)) }
    }

    /// The id as the homeserver gave it; to be percent-encoded as one segment.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for DelayId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DelayId(redacted)")
    }
}

/// A client sent a delay id that no homeserver gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the client's fault: delay_id is not the id of a delayed event")]
pub struct BadDelayId;

/// What a client delegates.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobParams {
    /// Which participant.
    pub key: JobKey,
    /// The homeserver that holds the delayed event.
    pub server: ServerName,
    /// The delayed event.
    pub delay_id: DelayId,
    /// After how long without a restart the homeserver sends it.
    pub delay_timeout: Duration,
}

/// A job as a store keeps it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredJob {
    /// What was delegated.
    pub params: JobParams,
    /// When the delayed event was last restarted, or the job made.
    pub restarted_at: SystemTime,
    /// Whether the participant had connected when this was written; absent in the reference's entries.
    pub connected: Option<bool>,
}
