//! What goes in and out of [`OwnMembership`](super::OwnMembership).

use std::time::{Duration, Instant};

use serde_json::Value;

use super::super::wire::OwnDescription;
use crate::time::UnixMillis;

/// Names a request until its reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);

/// What happened.
#[derive(Clone, Debug, PartialEq)]
pub enum Input {
    /// The application joins. A no-op while joining or joined; while leaving it is done after.
    Join(OwnDescription),
    /// The application leaves. A no-op if there is nothing to leave.
    Leave,
    /// The application says something else about its intent. Ignored outside a call.
    SetIntent(Option<String>),
    /// A sync was processed: whether our membership is in the roster.
    OwnSeen(bool),
    /// When our membership was created, as the roster has it. Later events of the membership repeat this time:
    /// with any other, every member would take us for one that has rejoined.
    OwnCreated(UnixMillis),
    /// The authorisation service of our focus may take our delayed leave: [`Output::Delegate`] is possible.
    OfferDelegation,
    /// Publish again with a new creation time, so that members take us for a newcomer and send us their key. A
    /// remedy for peers that lost a key message; done at most once a minute.
    Renew,
    /// A request is done. Unknown ids are ignored.
    Reply {
        /// Which request.
        id: RequestId,
        /// Its outcome.
        result: Result<Reply, RequestError>,
    },
}

/// What the shell asks of the homeserver.
#[derive(Clone, Debug, PartialEq)]
pub enum Request {
    /// Schedule an empty membership (MSC4140). Answer: [`Reply::Scheduled`].
    ScheduleLeave {
        /// How long until the homeserver sends it.
        delay: Duration,
    },
    /// Start the delay of a delayed leave anew.
    RestartLeave {
        /// Which one.
        delay_id: String,
    },
    /// Send a delayed leave now.
    SendLeave {
        /// Which one.
        delay_id: String,
    },
    /// Drop a delayed leave.
    CancelLeave {
        /// Which one.
        delay_id: String,
    },
    /// Write our membership.
    PutMembership {
        /// Its content.
        content: Value,
    },
    /// Write an empty membership.
    PutLeave,
    /// Read the capability `org.matrix.msc4140.delayed_events.max_delay_ms`. Answer: [`Reply::MaxDelay`].
    ReadMaxDelay,
}

/// What the homeserver answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// It did what it was asked.
    Done,
    /// It scheduled a delayed leave.
    Scheduled {
        /// Its handle.
        delay_id: String,
    },
    /// The longest delay that it allows, if it says.
    MaxDelay(Option<Duration>),
}

/// Why the homeserver did not do what it was asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// 429.
    #[error("the homeserver limits how often this may be asked")]
    RateLimited {
        /// How long it asks us to wait.
        retry_after: Option<Duration>,
    },
    /// `M_MAX_DELAY_EXCEEDED`, or `ORG.MATRIX.MSC4140_DELAY_TOO_LARGE` of present Synapse, which names no limit.
    #[error("the homeserver allows no such long delay")]
    MaxDelayExceeded {
        /// The limit, if it was named.
        max: Option<Duration>,
    },
    /// 404 `M_NOT_FOUND`: no such delayed event (any more).
    #[error("the homeserver knows no such delayed event")]
    NotFound,
    /// The homeserver has no delayed events.
    #[error("the homeserver does not support delayed events (MSC4140)")]
    Unsupported,
    /// No connection, or 5xx.
    #[error("the homeserver could not be reached or is in trouble")]
    Network,
    /// No answer within the timeout of the request.
    #[error("the homeserver did not answer in time")]
    TimedOut,
    /// Any other refusal.
    #[error("the homeserver refused: {message}")]
    Other {
        /// Its words.
        message: String,
    },
}

/// What to do now.
#[derive(Clone, Debug, PartialEq)]
pub enum Output {
    /// Perform this once and reply, with [`RequestError::TimedOut`] if it takes longer than `timeout`.
    Request {
        /// Its name.
        id: RequestId,
        /// What to ask.
        request: Request,
        /// How long it may take.
        timeout: Duration,
    },
    /// Ask the authorisation service of our focus, once, to keep a delayed leave alive while we are on its SFU, and to
    /// have it sent when we are gone. Reply as to a request, with [`Reply::Done`] if it does.
    Delegate {
        /// The name of this request.
        id: RequestId,
        /// Which delayed leave.
        delay_id: String,
        /// Its delay.
        delay: Duration,
        /// How long asking may take.
        timeout: Duration,
    },
    /// Tell the application.
    Event(Event),
    /// Nothing until then.
    WaitUntil(Instant),
    /// Nothing until the next input.
    Idle,
}

/// What the application should know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The status changed.
    Status(Status),
    /// Whether the homeserver has probably sent our delayed leave while we could not reach it.
    ProbablyLeft(bool),
    /// The call goes on without a delayed leave: if this device vanishes, it stays listed until its membership
    /// expires.
    DelayedLeaveUnavailable {
        /// Why.
        reason: String,
    },
    /// The focus's authorisation service keeps our delayed leave.
    LeaveDelegated,
    /// It does not, and is not asked again in this call; we keep the delayed leave ourselves.
    DelegationFailed {
        /// Why.
        reason: String,
    },
    /// The membership was given up. The homeserver may still list us until the delayed leave or expiry;
    /// [`Input::Leave`] tries to end that.
    Fatal {
        /// What failed, and how.
        message: String,
    },
}

/// Whether we are a member, as far as we know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Status {
    /// Not in the call.
    Disconnected,
    /// Publishing our membership, for the first time or again.
    Connecting,
    /// Our membership is published.
    Connected,
    /// Leaving.
    Disconnecting,
}
