//! Inputs and outputs of [`OwnMembership`](super::OwnMembership).

use std::{
    fmt,
    time::{Duration, Instant},
};

use ruma_common::{OwnedEventId, OwnedUserId};

use super::super::wire::{OwnDescription, OwnTransports};
use crate::{
    matrix::{DelayId, MatrixReply, MatrixRequest, RequestError, ServerSupport},
    member::{MemberId, MembershipForm},
    time::UnixMillis,
    transport::MeshSession,
};

/// Names a request until its reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct RequestId(pub u64);

/// What happened.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Input {
    /// The application joins. Ignored while joining or joined; done after the leave while leaving. Its member id must
    /// be new in the sticky form: see [`OwnMembership::fresh_member_id`](super::OwnMembership::fresh_member_id).
    Join(OwnDescription),
    /// The application leaves.
    Leave,
    /// The slot was closed: leave with that reason, and end with [`EndReason::SlotClosed`].
    SlotClosed,
    /// Somebody else redacted our membership event, which removes us from the call (MSC4143): leave, and end with
    /// [`EndReason::Removed`].
    Redacted {
        /// The sender of the redaction.
        by: OwnedUserId,
    },
    /// Be described like this from now on. A change of the event form, the slot or the sticky member id leaves the old
    /// membership and joins with the new one; anything else is published as an update. Ignored outside a call.
    SetDescription(OwnDescription),
    /// Our media moved. Published with the same creation time; a delegation to the service of another deployment is
    /// undone, and [`Input::OfferDelegation`] starts one with the new focus. Ignored outside a call.
    SetTransports(OwnTransports),
    /// Our session in the mesh is another one. Ignored outside a call.
    SetMeshSession(Option<MeshSession>),
    /// The application changes its intent. Ignored outside a call.
    SetIntent(Option<String>),
    /// A sync was processed: what the room shows of us. To be given after every sync, not while syncing fails.
    OwnSeen(OwnSighting),
    /// State form: the content under our state key. To be given before joining: a process of this device that died may
    /// have left its membership there. Ignored once we may have written there ourselves.
    LeftBehind(Option<serde_json::Value>),
    /// What the homeserver supports, if the caller has read it. Without it the machine reads it on joining.
    Support(ServerSupport),
    /// We are on the SFU of our focus, and its service may take our delayed leave: [`Output::Delegate`] is possible. To
    /// be given again after [`Input::SetTransports`], [`Input::SetDescription`] and [`Event::MemberIdChanged`], once the SFU
    /// knows us by the new identity.
    OfferDelegation,
    /// Publish again with a new creation time, so that members take us for a newcomer and send us their key: a remedy
    /// for peers that lost a key message. Every member rotates its key, so the caller limits how often. Ignored in the
    /// legacy mode, where the order of creation times decides on the focus.
    Renew,
    /// A request is done. Unknown ids are ignored.
    Reply {
        /// Which request.
        id: RequestId,
        /// Its outcome.
        result: Result<MatrixReply, RequestError>,
    },
}

/// What the room shows of our own membership.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum OwnSighting {
    /// The roster lists us.
    Listed {
        /// When our membership was created, by the homeserver's clock. Later state events of the membership repeat it:
        /// with another, every member would take us for one that has rejoined.
        created: Option<UnixMillis>,
    },
    /// The event that we published in the sticky form is there, and is not sticky.
    NotSticky,
    /// The roster does not list us.
    Missing,
}

/// What to do now.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Output {
    /// Perform this once and reply, with [`RequestError::TimedOut`] if it takes longer than `timeout`. If another is
    /// under way, the machine does not wait for that any more: drop it, or reply late.
    Request {
        /// Its name.
        id: RequestId,
        /// What to ask.
        request: MatrixRequest,
        /// How long it may take.
        timeout: Duration,
    },
    /// Ask the service of our focus, once, to keep a delayed leave alive while we are on its SFU, and to have it sent
    /// when we are gone (MSC4195). Reply as to a request, with [`MatrixReply::Done`] if it does.
    Delegate {
        /// The name of this request.
        id: RequestId,
        /// Which delayed leave.
        delay_id: DelayId,
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
#[non_exhaustive]
pub(crate) enum Event {
    /// The status changed.
    Status(Status),
    /// Whether the homeserver has probably sent our delayed leave while we could not reach it.
    ProbablyLeft(bool),
    /// We rejoin under a new member id, as others saw us leave under the old one: our SFU identity and the member id
    /// in key messages change with it. Sticky form only.
    MemberIdChanged(MemberId),
    /// The call goes on without a delayed leave: if this device vanishes, it stays listed for `listed_for`.
    DelayedLeaveUnavailable {
        /// Why.
        reason: NoDelayedLeave,
        /// How long a vanished device stays listed.
        listed_for: Duration,
    },
    /// The service of our focus keeps our delayed leave.
    LeaveDelegated,
    /// It does not, and is not asked again for this focus; we keep the delayed leave ourselves.
    DelegationFailed(DelegationError),
    /// The homeserver has no sticky events (MSC4354), so nobody sees us. The machine waits for
    /// [`Input::SetDescription`] with a mode of the state form, or for [`Input::Leave`].
    StickyUnsupported,
    /// A request that keeps us in the call failed and is tried again. Told again when the request or the kind of error
    /// changes; [`Event::Recovered`] ends it.
    Trouble {
        /// What failed.
        doing: Task,
        /// How.
        error: RequestError,
        /// Since when something fails.
        since: UnixMillis,
    },
    /// Everything that failed works again.
    Recovered,
    /// The session is over without [`Input::Leave`]. What is left of the membership is taken back;
    /// [`Status::Disconnected`] follows.
    Ended(EndReason),
}

/// Whether we are a member, as far as we know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Status {
    /// Not in the call.
    Disconnected,
    /// Publishing our membership, for the first time or again.
    Connecting,
    /// Our membership is published; in the sticky form a sync has shown it, or none did for a while.
    Connected,
    /// Leaving.
    Disconnecting,
}

/// Why a session ended by itself.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EndReason {
    /// Joining: the homeserver forbids us to publish our membership.
    #[error(
        "the room does not let us join calls: {message}. Either we are not joined to the room, or its power levels do \
         not allow us to send `{event_type}`: an administrator of the room must set that to the users' level, usually 0"
    )]
    NotPermitted {
        /// The event type that the power levels must allow.
        event_type: &'static str,
        /// The homeserver's words.
        message: String,
    },
    /// Joining: the homeserver refused our membership for another reason; trying again will not help.
    #[error("the homeserver refused our membership: {0}")]
    Refused(#[source] RequestError),
    /// Joining: the homeserver did not do its part within the time for joining.
    #[error(
        "joining was given up after {after:?}, as the homeserver failed at {doing}: {error}. Try again later"
    )]
    JoinTimedOut {
        /// How long it was tried.
        after: Duration,
        /// What failed last.
        doing: Task,
        /// How.
        #[source]
        error: RequestError,
    },
    /// Joining: the homeserver asks us to wait longer than a join may take.
    #[error(
        "the homeserver limits our requests and asks us to wait for {retry_after:?}: join again after that"
    )]
    RateLimited {
        /// How long it asks us to wait.
        retry_after: Duration,
    },
    /// Joining: the homeserver has no sticky events, and the caller did not change to the state form.
    #[error("the homeserver has no sticky events (MSC4354): join in compatibility mode")]
    StickyUnsupported,
    /// Our access token is not valid any more.
    #[error("the homeserver does not accept our access token any more: log in again")]
    LoggedOut,
    /// Somebody removed us from the call by redacting our membership event.
    #[error("{by} removed us from the call")]
    Removed {
        /// Who.
        by: OwnedUserId,
    },
    /// The slot of the call was closed.
    #[error("the call was closed in this room")]
    SlotClosed,
}

/// Why we have no delayed leave.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NoDelayedLeave {
    /// The homeserver has no delayed events, or no form of them that we know.
    #[error("the homeserver does not support delayed events (MSC4140): its administrator can switch them on")]
    NotSupported,
    /// The homeserver sent a leave at once instead of delaying it, so it is never asked again in this session.
    #[error(
        "the homeserver ignored the delay and sent our leave at once: its delayed events (MSC4140) are broken"
    )]
    SentAtOnce,
    /// The longest delay that the homeserver allows is too short to be kept alive.
    #[error("the homeserver allows no delay of {least:?} or more: its administrator can raise the limit")]
    LimitTooShort {
        /// The shortest delay that we use.
        least: Duration,
    },
    /// The homeserver refused to schedule one. Tried again at the next rejoin.
    #[error("the homeserver refused to schedule our leave: {0}")]
    Refused(#[source] RequestError),
}

/// Why the service of our focus does not keep our delayed leave.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DelegationError {
    /// The homeserver does not allow a delay that is worth it.
    #[error("the homeserver allows no delay of {least:?} or more for the delayed leave")]
    LimitTooShort {
        /// The shortest delay that we delegate.
        least: Duration,
    },
    /// The homeserver did not schedule the long delayed leave.
    #[error("the homeserver did not schedule the long delayed leave: {0}")]
    NotScheduled(#[source] RequestError),
    /// The service did not take it.
    #[error("the authorisation service of the focus did not take the delayed leave: {0}")]
    NotTaken(#[source] RequestError),
    /// The service took it, but the homeserver did not cancel the short one, so we keep that.
    #[error("the homeserver did not cancel the delayed leave that the service has replaced: {0}")]
    NotReplaced(#[source] RequestError),
}

/// What a request is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Task {
    /// Reading what the homeserver supports.
    ReadSupport,
    /// Asking whether it understands the delay query parameter.
    ProbeDelayParameter,
    /// Scheduling our delayed leave.
    ScheduleLeave,
    /// Restarting it.
    RestartLeave,
    /// Publishing our membership.
    PutMembership,
    /// Leaving by sending the delayed leave.
    SendLeave,
    /// Leaving by writing the leave.
    PutLeave,
    /// Taking back a delayed leave of an earlier membership.
    DropLeave,
    /// Scheduling the delayed leave that the focus's service is to keep.
    ScheduleLongLeave,
    /// Handing it to the service.
    DelegateLeave,
    /// Cancelling the delayed leave that the service has replaced.
    ReplaceLeave,
}

impl fmt::Display for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ReadSupport => "reading what it supports",
            Self::ProbeDelayParameter => "saying whether it understands the delay parameter",
            Self::ScheduleLeave => "scheduling our delayed leave",
            Self::RestartLeave => "restarting our delayed leave",
            Self::PutMembership => "publishing our membership",
            Self::SendLeave => "sending our delayed leave",
            Self::PutLeave => "writing our leave",
            Self::DropLeave => "dropping a delayed leave of an earlier membership",
            Self::ScheduleLongLeave => "scheduling the delayed leave that the focus is to keep",
            Self::DelegateLeave => "delegating the delayed leave",
            Self::ReplaceLeave => "cancelling the delayed leave that the focus has replaced",
        })
    }
}

impl Task {
    /// Whether its answer may bring a delayed leave, however late.
    pub(super) fn schedules(self) -> bool {
        matches!(self, Self::ScheduleLeave | Self::ScheduleLongLeave)
    }

    /// Whether it is about the delayed leave of the present membership and no other.
    pub(super) fn concerns_delayed_leave(self) -> bool {
        matches!(
            self,
            Self::RestartLeave | Self::ScheduleLongLeave | Self::DelegateLeave | Self::ReplaceLeave
        )
    }

    /// Whether it writes an event under the key of our membership at once.
    pub(super) fn writes(self) -> bool {
        matches!(self, Self::PutMembership | Self::PutLeave | Self::SendLeave)
    }

    /// Whether being in the call depends on it.
    pub(super) fn is_upkeep(self) -> bool {
        matches!(
            self,
            Self::ReadSupport
                | Self::ProbeDelayParameter
                | Self::ScheduleLeave
                | Self::RestartLeave
                | Self::PutMembership
        )
    }
}

/// The event type that power levels must allow for a membership of this form.
pub(super) fn event_type(form: MembershipForm) -> &'static str {
    match form {
        MembershipForm::State => super::super::wire::STATE_TYPE,
        MembershipForm::Sticky => super::super::wire::STICKY_TYPE,
    }
}

/// The id of an event that was sent, if the reply names it.
pub(super) fn sent_event(reply: &MatrixReply) -> Option<&OwnedEventId> {
    match reply {
        MatrixReply::Sent { event_id } => Some(event_id),
        _ => None,
    }
}
