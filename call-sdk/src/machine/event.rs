//! What a call tells its application. Everything is owned data, so that other languages can be given it as it is.

use std::{sync::Arc, time::Duration};

use ruma_common::OwnedUserId;

use super::{
    media_keys::wire::KeyRejected,
    membership::own::{self, DelegationError, NoDelayedLeave, Task},
    notify::{Invite, InviteEnd},
    peers::IncomingTrack,
    placement::MeshReason,
};
use crate::{
    frame_crypto::OpenError,
    key::KeyIndex,
    matrix::{DeliveryFailure, OwnTrust, RequestError},
    media::EncodedFrame,
    member::{Device, Member, ParticipantIdentity, Slot},
    transport::{
        ConnectionQuality, DisconnectReason, LiveKitFocus, LocalTrackId, Reliability, RemoteTrack, TrackSid,
        UserData,
    },
};

/// What happens in a call.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum CallEvent {
    /// A member joined, or was there when we came. Our own device is not announced.
    MemberJoined(Member),
    /// A member says something else about itself: intent, transport, identity.
    MemberUpdated(Member),
    /// A member left, was removed, or its membership expired. Its tracks have ended before this event.
    MemberLeft(Member),
    /// A member publishes a track. Frames of the track follow this event.
    TrackPublished {
        /// The publisher.
        member: Member,
        /// The track, by the SFU's word.
        track: RemoteTrack,
    },
    /// A track changed, for instance it was muted.
    TrackUpdated {
        /// The publisher.
        member: Member,
        /// The track, by the SFU's word.
        track: RemoteTrack,
    },
    /// A member's track ended; no frame of it follows.
    TrackEnded {
        /// The publisher.
        member: Member,
        /// Which track.
        sid: TrackSid,
    },
    /// A frame. In an encrypted call it was opened with the key of this very member.
    Frame {
        /// Member and track.
        from: Arc<IncomingTrack>,
        /// The frame as its sender's encoder wrote it.
        frame: EncodedFrame,
    },
    /// A data message. In an encrypted call it was opened with the key of this very member.
    Data {
        /// The sender.
        member: Member,
        /// How it was delivered.
        reliability: Reliability,
        /// The message.
        message: UserData,
    },
    /// Frames of a track are dropped because they do not open. Reported once per track and reason;
    /// [`CallReport`](super::CallReport) counts all.
    Undecryptable {
        /// The member that the SFU names as their sender.
        member: Member,
        /// Which track.
        sid: TrackSid,
        /// Why.
        reason: OpenError,
    },
    /// No frame of an unmuted track has been decrypted for 10 s. For audio, only before the first one. Reported once
    /// until frames come.
    NoMedia {
        /// The publisher.
        member: Member,
        /// Which track.
        sid: TrackSid,
        /// What is missing.
        cause: NoMediaCause,
    },
    /// A member's media key is installed.
    KeyReceived {
        /// Whose.
        member: Member,
        /// At which index.
        index: KeyIndex,
    },
    /// A key message was refused.
    KeyRejected {
        /// Its sender, by the homeserver's word.
        sender: OwnedUserId,
        /// Why.
        reason: KeyRejected,
    },
    /// From now on our frames are sealed with the key at this index.
    OwnKeyInUse(KeyIndex),
    /// Our key did not reach a device; it is tried again.
    KeyDeliveryFailed {
        /// Which device.
        device: Device,
        /// Why.
        failure: DeliveryFailure,
    },
    /// Our trust policy refuses a device that is in the call: it gets no key from us and its keys are not accepted. The
    /// failure names the cause and the remedy.
    PeerRefused {
        /// Which device.
        device: Device,
        /// Why.
        failure: DeliveryFailure,
    },
    /// A receiver cannot decode a layer of a local video track and asks for a key frame.
    KeyFrameRequested {
        /// Which track.
        track: LocalTrackId,
        /// Which simulcast layer, lowest first.
        layer: u8,
    },
    /// Which layers of a local track somebody receives; the others need not be encoded.
    LayersWanted {
        /// Which track.
        track: LocalTrackId,
        /// One entry per layer, lowest first.
        layers: Vec<bool>,
    },
    /// How much a local track should send now.
    TargetBitrate {
        /// Which track.
        track: LocalTrackId,
        /// Bits per second.
        bits_per_second: u64,
    },
    /// The SFU or the network ended a local track. Publish it again if it is still wanted.
    LocalTrackEnded {
        /// Which track.
        track: LocalTrackId,
        /// The SFU's reason.
        reason: String,
    },
    /// The SFU pauses or resumes a track because our downlink is short.
    StreamPaused {
        /// The publisher.
        member: Member,
        /// Which track.
        sid: TrackSid,
        /// Whether it is paused.
        paused: bool,
    },
    /// The members that speak now, loudest first, with their loudness from 0 to 1.
    Speakers(Vec<(Member, f32)>),
    /// How well a member's connection does, or ours (`None`).
    Quality {
        /// Whose; `None`: ours.
        member: Option<Member>,
        /// The SFU's judgement.
        quality: ConnectionQuality,
    },
    /// A focus is connected, or connected again.
    Connected(LiveKitFocus),
    /// A connection is lost and being restored.
    Reconnecting(LiveKitFocus),
    /// A focus cannot be used now; it is tried again while the call needs it.
    FocusFailed {
        /// Which.
        focus: LiveKitFocus,
        /// Whether it is the one that we publish to.
        ours: bool,
        /// Why.
        failure: ConnectFailure,
    },
    /// We publish to another focus from now on, because the one before failed.
    FocusChanged(LiveKitFocus),
    /// Media travels from member to member from now on, where the other members can do that.
    MeshBegan(MeshReason),
    /// Media travels over our focus from now on.
    MeshEnded(LiveKitFocus),
    /// We exchange media with a member directly.
    PeerConnected(Member),
    /// An attempt to exchange media with a member directly failed; another follows.
    PeerFailed {
        /// Who.
        member: Member,
        /// Why, in words.
        reason: String,
        /// Failures in a row.
        failures: u32,
    },
    /// The network is too narrow for a mesh of this size: a member has had no video from us for 5 s. Send fewer pixels,
    /// or use a focus.
    MeshTooLarge {
        /// Who gets no video.
        member: Member,
        /// What the path to it carries, in bits per second.
        bits_per_second: u64,
        /// What the least of our video needs, with our audio.
        needed: u64,
    },
    /// The member gets video again.
    MeshFits(Member),
    /// Signalling works but no media path: UDP may be blocked, or the SFU may advertise a wrong address.
    MediaBlocked {
        /// Which focus.
        focus: LiveKitFocus,
        /// Candidate pairs that were tried.
        tried: Vec<String>,
    },
    /// An SFU participant with tracks has matched no member of the call for 5 s. Without a member its media is never
    /// decrypted.
    UnknownParticipant {
        /// Where.
        focus: LiveKitFocus,
        /// Its identity.
        identity: ParticipantIdentity,
    },
    /// There is a call in another slot of this room.
    OtherCall {
        /// Which slot.
        slot: Slot,
        /// How many members.
        members: usize,
    },
    /// The room was encrypted during the call: everything is sealed from now on.
    EncryptionEnabled,
    /// Our own device is not cross-signed: members with the cross-signed policy refuse it. Sign it with the recovery
    /// key, or verify it from another session.
    OwnDeviceNotTrusted(OwnTrust),
    /// The homeserver schedules no delayed leave for us: if this process dies, we stay listed until our membership
    /// expires.
    LeaveNotScheduled {
        /// Why.
        reason: NoDelayedLeave,
        /// How long a vanished device stays listed.
        listed_for: Duration,
    },
    /// The focus's authorisation service, or the homeserver, keeps our delayed leave from now on.
    LeaveDelegated,
    /// It does not: if this process dies, the others see it after the short delay.
    DelegationFailed(DelegationError),
    /// Upkeep of our membership fails; it is tried again for as long as the call lasts.
    MembershipTrouble {
        /// What fails.
        doing: Task,
        /// How.
        error: RequestError,
    },
    /// Upkeep of our membership works again.
    MembershipRecovered,
    /// True while the homeserver has probably removed us because restarts failed.
    ProbablyLeft(bool),
    /// The homeserver does not keep sticky events; the call continues in compatibility mode.
    StickyEventsUnsupported,
    /// Somebody invites to the call (MSC4075). Only while we are not in it.
    Invited(Invite),
    /// An invitation ended.
    InviteEnded {
        /// Which.
        invite: Invite,
        /// How.
        end: InviteEnd,
    },
    /// Somebody declined our invitation.
    Declined(OwnedUserId),
    /// A member reacts.
    Reaction {
        /// The member.
        member: Member,
        /// The emoji.
        emoji: String,
        /// Its name, for instance `thumbsup`.
        name: String,
    },
    /// A member raised or lowered its hand.
    HandRaised {
        /// The member.
        member: Member,
        /// Whether it is up.
        raised: bool,
    },
    /// The call is over for us; the last event.
    Ended(EndReason),
}

/// Why frames of a track do not come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum NoMediaCause {
    /// The SFU announces the track and sends nothing.
    NothingArrives,
    /// Frames come, and the member's key has not.
    NoKey,
    /// Frames come, and none opens.
    NothingOpens,
}

/// Why a focus cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
#[non_exhaustive]
pub struct ConnectFailure {
    /// What kind of failure.
    pub kind: ConnectFailureKind,
    /// The whole story with its first cause, for people.
    pub message: String,
    /// How long the other side asks us to wait.
    pub retry_after: Option<Duration>,
}

impl ConnectFailure {
    /// A failure that names no wait.
    pub fn new(kind: ConnectFailureKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), retry_after: None }
    }
}

/// What kind of failure keeps a focus from being used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ConnectFailureKind {
    /// Nobody names a focus.
    NoFocus,
    /// Our own policy: too many foci, an unsafe URL, a private address.
    Policy,
    /// No OpenID token: our homeserver.
    Homeserver,
    /// The authorisation service cannot be reached.
    ServiceUnreachable,
    /// The authorisation service, or the homeserver, refuses us a token.
    TokenRefused,
    /// The SFU refuses the token.
    SfuRefused,
    /// The SFU has no capacity left.
    SfuFull,
    /// The SFU cannot be reached.
    SfuUnreachable,
    /// A mesh peer cannot be reached.
    PeerUnreachable,
    /// An established connection ended.
    Lost,
}

impl ConnectFailureKind {
    /// Whether the same attempt will fail again: another focus is better.
    #[must_use]
    pub fn is_final(self) -> bool {
        matches!(self, Self::NoFocus | Self::Policy | Self::TokenRefused | Self::SfuRefused)
    }
}

/// Why a call is over.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EndReason {
    /// The application left.
    #[error("left")]
    Left,
    /// The application dropped its handle.
    #[error("the application dropped the call")]
    Dropped,
    /// The room is not encrypted, and the application requires encryption.
    #[error("the room is not encrypted and EncryptionPolicy::Required was asked for")]
    NotEncrypted,
    /// We are not in the room any more.
    #[error("no longer a member of the room")]
    NotInRoom,
    /// Our membership ended: refused, removed by somebody, the slot closed, or logged out.
    #[error(transparent)]
    Membership(own::EndReason),
    /// No focus could be used.
    #[error("no focus could be used: {0}")]
    NoFocus(ConnectFailure),
    /// Another session of this device took our place on the SFU.
    #[error("another session of this device took our place: {0}")]
    Replaced(DisconnectReason),
    /// The application has stopped reading events.
    #[error("the application has stopped reading the call's events")]
    NotReading,
    /// The Matrix client has gone.
    #[error("the Matrix client was dropped")]
    ClientGone,
    /// The call's own task failed.
    #[error("internal failure: {0}")]
    Internal(String),
}
