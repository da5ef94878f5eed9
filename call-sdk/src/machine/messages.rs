//! What goes in and out of [`CallMachine`](super::CallMachine).

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use ruma_common::OwnedEventId;

use super::{
    event::{CallEvent, ConnectFailure, EndReason},
    membership::wire::MembershipMode,
    notify::Attention,
    peers::{IncomingTrack, TrackRoute},
    routing::Wanted,
    stats::TrackCounters,
};
use crate::{
    matrix::{
        DelayId, Delivery, MatrixReply, MatrixRequest, MatrixUpdate, RequestError, RoomView, ServerSupport,
        ToDeviceBatch,
    },
    media::TrackSpec,
    member::{Device, Member, MemberId, MemberKey, ParticipantIdentity, Slot},
    transport::{
        ConnectionId, DataPacket, LiveKitFocus, LocalTrackId, NamedBy, Reliability, SfuUrl, Subscription,
        TrackSid, TransportEvent, UserData, mesh::Negotiate,
    },
};

/// Names a request until its outcome.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);

/// What happened.
#[derive(Debug)]
#[non_exhaustive]
pub enum Input {
    /// The call starts: join it, or observe it.
    Start,
    /// The application leaves.
    Leave(EndReason),
    /// The application says something else about its intent.
    SetIntent(Option<String>),
    /// The application asks for a new media key of ours.
    RotateKey,
    /// The application publishes a track.
    Publish {
        /// Its name.
        track: LocalTrackId,
        /// What it is.
        spec: TrackSpec,
    },
    /// The application ends a track.
    Unpublish(LocalTrackId),
    /// The application mutes a track or not.
    SetMuted {
        /// Which.
        track: LocalTrackId,
        /// Whether it is muted.
        muted: bool,
    },
    /// The application chooses what to receive.
    Subscribe {
        /// From whom.
        member: MemberKey,
        /// Which track.
        sid: TrackSid,
        /// Which part.
        subscription: Subscription,
    },
    /// The application asks for a key frame.
    RequestKeyFrame {
        /// Of whom.
        member: MemberKey,
        /// Which track.
        sid: TrackSid,
    },
    /// The application sends data.
    SendData {
        /// How.
        reliability: Reliability,
        /// To whom; empty: to everybody.
        to: Vec<MemberKey>,
        /// The message.
        message: UserData,
    },
    /// The application invites everybody in the room.
    Invite(Attention),
    /// The application does not follow an invitation.
    Decline(OwnedEventId),
    /// The application reacts.
    React {
        /// The emoji.
        emoji: String,
        /// Its name, for instance `thumbsup`.
        name: String,
    },
    /// The application raises or lowers our hand.
    RaiseHand(bool),
    /// The room was read, or could not be.
    Room(Result<Arc<RoomView>, String>),
    /// The homeserver told something.
    Update(MatrixUpdate),
    /// The outcome of [`Output::Matrix`] or [`Output::Delegate`].
    Matrix {
        /// Which request.
        id: RequestId,
        /// Its outcome.
        result: Result<MatrixReply, RequestError>,
    },
    /// A device got a to-device message, or did not.
    Delivered {
        /// Which batch.
        id: RequestId,
        /// The device.
        device: Device,
        /// Its outcome.
        result: Delivery,
    },
    /// No outcome of this batch follows.
    BatchDone(RequestId),
    /// The outcome of [`Output::Discover`].
    Discovered(Result<Vec<(LiveKitFocus, NamedBy)>, ConnectFailure>),
    /// The outcome of [`Output::Access`].
    Granted {
        /// Which connection.
        connection: ConnectionId,
        /// What the token grants, or why there is none.
        result: Result<Grant, ConnectFailure>,
    },
    /// The outcome of [`Output::Connect`].
    Connected {
        /// Which connection.
        connection: ConnectionId,
        /// Success: signalling is up.
        result: Result<(), ConnectFailure>,
    },
    /// A connection told something.
    Transport {
        /// Which connection.
        connection: ConnectionId,
        /// What.
        event: TransportEvent,
    },
    /// The outcome of [`Output::Publish`].
    Published {
        /// On which connection.
        connection: ConnectionId,
        /// Which track.
        track: LocalTrackId,
        /// Why not.
        result: Result<(), PublishFailure>,
    },
}

/// Why a connection does not carry a track.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PublishFailure {
    /// The connection has ended.
    Closed,
    /// The SFU refuses the track, with its words.
    Refused(String),
}

/// What to do now.
#[derive(Debug)]
#[non_exhaustive]
pub enum Output {
    /// Perform this once.
    Matrix {
        /// Its name.
        id: RequestId,
        /// What to ask.
        request: MatrixRequest,
        /// How long it may take.
        timeout: Duration,
    },
    /// Read the room. One reading at a time.
    ReadRoom,
    /// Send these, Olm-encrypted.
    SendToDevice {
        /// Its name.
        id: RequestId,
        /// The messages.
        batch: ToDeviceBatch,
    },
    /// Find the foci that we may publish to.
    Discover {
        /// What the homeserver supports.
        support: ServerSupport,
        /// The other members: the last resort is the focus of one of them.
        members: Vec<Member>,
    },
    /// Get a token for a focus, and keep it under this connection.
    Access {
        /// Which connection.
        connection: ConnectionId,
        /// Which focus, and for what.
        access: AccessWanted,
    },
    /// Connect with the token kept under this connection.
    Connect {
        /// Which connection.
        connection: ConnectionId,
    },
    /// Open a connection to a mesh peer; the outcome is [`Input::Connected`].
    OpenPeer {
        /// Which connection.
        connection: ConnectionId,
        /// What its events are to call the peer.
        identity: ParticipantIdentity,
    },
    /// Do this on the connection to a mesh peer.
    Negotiate {
        /// Which connection.
        connection: ConnectionId,
        /// What.
        command: Negotiate,
    },
    /// Close a connection, or give up opening it. Nobody waits for it.
    Close {
        /// Which connection.
        connection: ConnectionId,
    },
    /// Ask whoever issued the token of our connection to keep our delayed leave.
    Delegate {
        /// Name of the request.
        id: RequestId,
        /// Our connection.
        connection: ConnectionId,
        /// The delayed leave.
        delay_id: DelayId,
        /// Its delay.
        delay: Duration,
        /// How long asking may take.
        timeout: Duration,
    },
    /// Publish a local track on a connection.
    Publish {
        /// Which connection.
        connection: ConnectionId,
        /// Which track.
        track: LocalTrackId,
        /// What it is.
        spec: TrackSpec,
        /// The hint that peers are told.
        encrypted: bool,
    },
    /// End a local track on a connection.
    Unpublish {
        /// Which connection.
        connection: ConnectionId,
        /// Which track.
        track: LocalTrackId,
    },
    /// A local track is published, or will not be: tell its publisher.
    TrackReady {
        /// Which track.
        track: LocalTrackId,
        /// Why not.
        result: Result<(), String>,
    },
    /// Tell everybody on a connection that a local track is muted or not.
    Mute {
        /// Which connection.
        connection: ConnectionId,
        /// Which track.
        track: LocalTrackId,
        /// Whether it is muted.
        muted: bool,
    },
    /// Give the frames of a remote track to the application by this route.
    Attach {
        /// On which connection.
        connection: ConnectionId,
        /// Its name there; the application may know it by another one.
        sid: TrackSid,
        /// How to open and count them.
        route: TrackRoute,
    },
    /// The same track, described differently.
    Reroute {
        /// On which connection.
        connection: ConnectionId,
        /// Its name there.
        sid: TrackSid,
        /// How to open and count them.
        route: TrackRoute,
    },
    /// No frame of this track may reach the application after this.
    Detach {
        /// On which connection.
        connection: ConnectionId,
        /// Which track.
        sid: TrackSid,
    },
    /// Ask for a key frame.
    RequestKeyFrame {
        /// On which connection.
        connection: ConnectionId,
        /// Of which track.
        sid: TrackSid,
    },
    /// Say what to receive.
    Subscribe {
        /// On which connection.
        connection: ConnectionId,
        /// Which track.
        sid: TrackSid,
        /// Which part.
        subscription: Subscription,
    },
    /// Seal (in an encrypted call) and send a data message.
    SendData {
        /// On which connection.
        connection: ConnectionId,
        /// How.
        reliability: Reliability,
        /// For whom; empty: for everybody.
        destinations: Vec<ParticipantIdentity>,
        /// The message.
        message: UserData,
    },
    /// Open a data packet with the keys of its sender, and give it to the application.
    OpenData {
        /// Its sender.
        member: Member,
        /// The sender's keys.
        ring: crate::frame_crypto::KeyRing,
        /// The packet.
        packet: DataPacket,
    },
    /// Tell the application.
    Event(CallEvent),
    /// The other members changed.
    Members(Arc<Vec<Member>>),
    /// The remote tracks changed: which there are, and where they are counted.
    Tracks(Arc<Vec<(Arc<IncomingTrack>, Arc<TrackCounters>)>>),
    /// Whether we are in the call changed.
    Status(CallStatus),
    /// Nothing until then.
    WaitUntil(Instant),
    /// The call is over: release everything.
    Over(EndReason),
}

/// A token to get.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AccessWanted {
    /// The focus.
    pub focus: LiveKitFocus,
    /// Whether we publish there.
    pub ours: bool,
    /// Where we have it from.
    pub named_by: NamedBy,
    /// The slot.
    pub slot: Slot,
    /// Our membership.
    pub member_id: MemberId,
    /// The form of our membership: others expect the identity that belongs to it.
    pub mode: MembershipMode,
}

impl AccessWanted {
    pub(crate) fn new(wanted: Wanted, slot: Slot, member_id: MemberId, mode: MembershipMode) -> Self {
        Self { focus: wanted.focus, ours: wanted.ours, named_by: wanted.named_by, slot, member_id, mode }
    }
}

/// What a token grants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// The SFU that it opens.
    pub sfu: SfuUrl,
    /// Our identity there.
    pub identity: ParticipantIdentity,
}

/// Whether we are in the call.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum CallStatus {
    /// On the way in: discovery, token, connection, membership.
    #[default]
    Joining,
    /// Our membership is published and our focus is connected. For an observer: the room was read.
    Joined,
    /// In the call by Matrix, without a connection to our focus.
    Reconnecting,
    /// On the way out.
    Leaving,
    /// Over.
    Over,
}
