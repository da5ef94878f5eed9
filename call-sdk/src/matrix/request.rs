//! What a call asks of Matrix, and what comes back.

use std::{fmt, time::Duration};

use ruma_common::{OwnedEventId, OwnedServerName};
use serde::Serialize;
use serde_json::Value;
use zeroize::ZeroizeOnDrop;

use crate::{
    member::{Device, MemberId, Slot},
    transport::{LiveKitFocus, SfuUrl},
};

/// One request to the homeserver, performed once, within its timeout.
#[derive(Clone, Debug, PartialEq)]
pub enum MatrixRequest {
    /// Read `/versions` and the capabilities. Answer: [`MatrixReply::Support`].
    ReadSupport,
    /// Send an event. Answer: [`MatrixReply::Sent`].
    Send(EventWrite),
    /// Schedule a delayed event (MSC4140). Answer: [`MatrixReply::Scheduled`], or [`MatrixReply::Sent`] if the
    /// homeserver ignored the delay and sent the event at once.
    Schedule(DelayedEvent),
    /// Ask, without being able to send anything, whether the homeserver understands the delay query parameter:
    /// schedules `delay=-1` in a room that does not exist. Answer: [`MatrixReply::DelayParameter`].
    ProbeDelayParameter,
    /// Restart, cancel or send a delayed event.
    UpdateDelayed {
        /// Which one: a capability, redacted in `Debug`.
        delay_id: DelayId,
        /// What to do with it.
        action: DelayedAction,
    },
    /// Redact an event.
    Redact {
        /// Which one.
        event_id: OwnedEventId,
        /// Why, shown to people.
        reason: Option<String>,
    },
    /// Issue an OpenID token. Answer: [`MatrixReply::OpenId`].
    OpenIdToken,
    /// List the homeserver's MatrixRTC transports by the given endpoint. Answer: [`MatrixReply::Transports`].
    Transports(TransportSource),
    /// Read the TURN servers. Answer: [`MatrixReply::Turn`].
    TurnServers,
    /// Get an SFU token from the homeserver (MSC4195). Answer: [`MatrixReply::Jwt`].
    RtcToken(RtcTokenRequest),
    /// Hand a delayed leave to the homeserver's SFU service (MSC4195).
    DelegateLeave {
        /// Which generation of the endpoint.
        version: ApiVersion,
        /// The SFU.
        sfu: SfuUrl,
        /// The slot.
        slot: Slot,
        /// Our membership.
        member_id: MemberId,
        /// The delayed leave.
        delay_id: DelayId,
    },
}

/// The handle of a delayed event. Some servers take it without a token, so it is redacted in `Debug`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DelayId(pub String);

impl fmt::Debug for DelayId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DelayId(redacted)")
    }
}

/// Where transports are listed (MSC4143 §Transport discovery).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TransportSource {
    /// `GET …/rtc/transports`, stable or unstable.
    Endpoint(ApiVersion),
    /// `org.matrix.msc4143.rtc_foci` of the user's server's `/.well-known/matrix/client`.
    WellKnown,
}

/// Stable or unstable form of an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ApiVersion {
    /// `/v1` or `/v3`.
    Stable,
    /// `/unstable/…`.
    Unstable,
}

/// An event to write.
#[derive(Clone, Debug, PartialEq)]
pub struct EventWrite {
    /// Its type.
    pub event_type: String,
    /// State or message.
    pub target: EventTarget,
    /// Its content.
    pub content: Value,
}

/// How an event is sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EventTarget {
    /// As state under this key; never encrypted.
    State {
        /// The state key.
        key: String,
    },
    /// As a message, encrypted in encrypted rooms; sticky for this long if set (MSC4354).
    Message {
        /// Sticky duration, at most 1 h.
        sticky: Option<Duration>,
    },
    /// As a message that is never encrypted: delayed leaves, which the homeserver sends when we are gone.
    ClearMessage {
        /// Sticky duration, at most 1 h.
        sticky: Option<Duration>,
    },
}

/// An event that the homeserver is to send later.
#[derive(Clone, Debug, PartialEq)]
pub struct DelayedEvent {
    /// The event.
    pub event: EventWrite,
    /// How long after the last restart it is sent.
    pub delay: Duration,
    /// Which request schedules it.
    pub form: ScheduleForm,
}

/// Which request schedules a delayed event. An unknown *path* cannot send an event; an unknown *parameter* is
/// ignored, and the event is sent at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ScheduleForm {
    /// `PUT …/delayed_event/{type}/{txn}`.
    Dedicated(ApiVersion),
    /// `?org.matrix.msc4140.delay=`. Only after [`MatrixRequest::ProbeDelayParameter`] said yes.
    QueryParameter,
}

/// What to do with a delayed event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DelayedAction {
    /// Start its delay anew.
    Restart,
    /// Drop it.
    Cancel,
    /// Send it now.
    Send,
}

/// A request for an SFU token at the homeserver (MSC4195 `get_token`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RtcTokenRequest {
    /// Which generation of the endpoint.
    pub version: ApiVersion,
    /// Homeserver whose SFU it is; `None`: our own.
    pub server: Option<OwnedServerName>,
    /// The SFU.
    pub sfu: SfuUrl,
    /// The slot.
    pub slot: Slot,
    /// Our own membership's id.
    pub member_id: MemberId,
    /// Whether to write `member: {id}` instead of `member_id`, as services before lk-jwt-service 0.8 want it.
    pub nested_member: bool,
}

/// What the homeserver answered.
#[derive(Clone, Debug, PartialEq)]
pub enum MatrixReply {
    /// It did what it was asked.
    Done,
    /// It sent an event.
    Sent {
        /// The event's id.
        event_id: OwnedEventId,
    },
    /// It scheduled a delayed event.
    Scheduled {
        /// Its handle.
        delay_id: DelayId,
    },
    /// Whether it understands the delay query parameter.
    DelayParameter(bool),
    /// What it supports.
    Support(ServerSupport),
    /// An OpenID token.
    OpenId(OpenIdToken),
    /// The transports that it lists, by preference; entries that we cannot use are left out.
    Transports(Vec<LiveKitFocus>),
    /// TURN servers.
    Turn(TurnServers),
    /// An SFU token.
    Jwt(Jwt),
}

/// An SFU token; redacted in `Debug`, wiped on drop.
#[derive(Clone, PartialEq, Eq, ZeroizeOnDrop)]
pub struct Jwt(pub String);

impl fmt::Debug for Jwt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Jwt(redacted)")
    }
}

/// What a homeserver supports, of what calls use.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ServerSupport {
    /// Delayed events (MSC4140), and whether by stable names.
    pub delayed_events: Option<ApiVersion>,
    /// The longest delay, if the capability names one.
    pub max_delay: Option<Duration>,
    /// Sticky events (MSC4354).
    pub sticky_events: bool,
    /// The transports endpoint (MSC4143), and whether by stable names.
    pub transports: Option<ApiVersion>,
}

/// Why the homeserver did not do what it was asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RequestError {
    /// 429.
    #[error("the homeserver limits how often this may be asked")]
    RateLimited {
        /// How long it asks us to wait.
        retry_after: Option<Duration>,
    },
    /// `M_MAX_DELAY_EXCEEDED`, `ORG.MATRIX.MSC4140_DELAY_TOO_LARGE`, or 403 of the dedicated endpoint for a delay
    /// beyond the capability.
    #[error("the homeserver does not allow so long a delay")]
    MaxDelayExceeded {
        /// The limit, if it was named.
        max: Option<Duration>,
    },
    /// 404 `M_NOT_FOUND`: it does not know the thing (any more).
    #[error("the homeserver does not know it (M_NOT_FOUND)")]
    NotFound,
    /// 409 on a delayed event: it was already sent or cancelled.
    #[error("the delayed event was already sent or cancelled")]
    AlreadyFinal,
    /// The endpoint does not exist: 404 or 405 `M_UNRECOGNIZED`.
    #[error("the homeserver does not have this endpoint (M_UNRECOGNIZED)")]
    Unsupported,
    /// 403: the user may not do this.
    #[error("the homeserver forbids it ({errcode}): {message}")]
    Forbidden {
        /// Matrix error code.
        errcode: String,
        /// Its words.
        message: String,
    },
    /// No connection, or 5xx.
    #[error("the homeserver could not be reached or is in trouble: {cause}")]
    Network {
        /// The first cause.
        cause: String,
    },
    /// No answer within the timeout of the request.
    #[error("the homeserver did not answer in time")]
    TimedOut,
    /// 401 `M_UNKNOWN_TOKEN`: the session is over.
    #[error("the homeserver does not accept our access token any more; log in again")]
    LoggedOut,
    /// The request could not be made on this side: for instance the event could not be encrypted.
    #[error("the request could not be made: {cause}")]
    Local {
        /// Why.
        cause: String,
    },
    /// Any other refusal.
    #[error("the homeserver refused ({status} {errcode}): {message}")]
    Refused {
        /// HTTP status.
        status: u16,
        /// Matrix error code, empty if it gave none.
        errcode: String,
        /// Its words.
        message: String,
    },
}

impl RequestError {
    /// Whether the same request may well work in a while.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::RateLimited { .. } | Self::Network { .. } | Self::TimedOut)
    }
}

/// To-device messages of one type, one per device, always Olm-encrypted. The contents may hold keys and are left out
/// of `Debug`.
#[derive(Clone, PartialEq)]
pub struct ToDeviceBatch {
    /// Type of the messages.
    pub event_type: String,
    /// The content, equal for all.
    pub content: Value,
    /// The recipients. Each gets its own outcome, as soon as it is known.
    pub recipients: Vec<Device>,
}

impl fmt::Debug for ToDeviceBatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ToDeviceBatch")
            .field("event_type", &self.event_type)
            .field("recipients", &self.recipients)
            .finish_non_exhaustive()
    }
}

/// What became of a to-device message to one device.
pub type Delivery = Result<(), DeliveryFailure>;

/// Why a device did not get a to-device message.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DeliveryFailure {
    /// Its owner's device list does not hold it.
    #[error("the device is not in its owner's device list")]
    UnknownDevice,
    /// Its owner has not cross-signed it, and the policy asks for that.
    #[error("its owner has not cross-signed the device; the owner should verify it")]
    NotCrossSigned,
    /// We had verified its owner, whose identity has changed since.
    #[error(
        "the identity of the user has changed since it was verified; verify it again or withdraw the verification"
    )]
    IdentityChanged,
    /// We have blocked it.
    #[error("we blocked the device; unblock it to share keys with it")]
    Blocked,
    /// It has no one-time key left, or Olm failed.
    #[error("no Olm session could be made with the device: {0}")]
    NoSession(String),
    /// The homeserver limits us.
    #[error("the homeserver limits how often messages may be sent")]
    RateLimited {
        /// How long it asks us to wait.
        retry_after: Option<Duration>,
    },
    /// No answer in time.
    #[error("the homeserver did not answer in time")]
    TimedOut,
    /// The homeserver failed.
    #[error("the homeserver failed: {0}")]
    Network(String),
}

impl DeliveryFailure {
    /// Whether only the user or an administrator can change it: trying again soon is pointless.
    #[must_use]
    pub fn is_policy(&self) -> bool {
        matches!(self, Self::NotCrossSigned | Self::IdentityChanged | Self::Blocked)
    }
}

/// A homeserver's short-lived proof of who a user is (OpenID, client-server API §OpenID). Wiped on drop.
#[derive(Clone, PartialEq, Eq, Serialize, ZeroizeOnDrop)]
pub struct OpenIdToken {
    /// The capability; redacted in `Debug`.
    pub access_token: String,
    /// Always `Bearer`.
    pub token_type: String,
    /// The server that vouches.
    pub matrix_server_name: String,
    /// Lifetime in seconds.
    pub expires_in: u64,
}

impl fmt::Debug for OpenIdToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OpenIdToken")
            .field("matrix_server_name", &self.matrix_server_name)
            .field("expires_in", &self.expires_in)
            .finish_non_exhaustive()
    }
}

/// TURN servers of the homeserver (`/voip/turnServer`).
#[derive(Clone, Default, PartialEq, Eq)]
pub struct TurnServers {
    /// `turn:` and `stun:` URLs.
    pub uris: Vec<String>,
    /// User name.
    pub username: String,
    /// Password; redacted in `Debug`.
    pub password: String,
    /// How long the credentials hold.
    pub ttl: Duration,
}

impl fmt::Debug for TurnServers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TurnServers")
            .field("uris", &self.uris)
            .field("ttl", &self.ttl)
            .finish_non_exhaustive()
    }
}
