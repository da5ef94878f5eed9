//! How one member's media travels: the seam between a call and an SFU or mesh.
//!
//! A transport carries opaque frames. It never holds a key and never decides what is encrypted: it is handed
//! sealed frames and gives back what arrived, named by the participant identity that the other end vouches
//! for. Which member that identity is, and whether the frame opens, is decided above it.

use async_trait::async_trait;
use bytes::Bytes;

use crate::{
    media::{Codec, TrackSource, TrackSpec},
    member::ParticipantIdentity,
};

pub mod livekit;

/// Names a track published here, for the life of the transport.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LocalTrackId(pub u64);

/// Names a remote track: LiveKit's `TR_…` sid.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TrackSid(pub String);

/// A frame on its way in or out, exactly as it is on the wire (sealed, in an encrypted call).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WireFrame {
    /// The whole frame, after depacketisation or before packetisation.
    pub payload: Bytes,
    /// RTP timestamp in the codec's clock rate.
    pub rtp_timestamp: u32,
}

/// What a remote participant publishes. Everything in it is the SFU's word.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteTrack {
    /// The SFU's name of the track.
    pub sid: TrackSid,
    /// What the publisher says it is.
    pub source: TrackSource,
    /// The codec, once known.
    pub codec: Option<Codec>,
    /// The `encryption` hint of TrackInfo: shown to nobody as truth, policy comes from Matrix.
    pub announced_encrypted: bool,
    /// Whether the publisher muted it.
    pub muted: bool,
}

/// What a transport tells the call above it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum TransportEvent {
    /// A participant is in the SFU room.
    ParticipantJoined {
        /// Who, by the SFU's word.
        identity: ParticipantIdentity,
    },
    /// A participant left the SFU room.
    ParticipantLeft {
        /// Who, by the SFU's word.
        identity: ParticipantIdentity,
    },
    /// A track was published, or changed (mute, codec).
    TrackUpdated {
        /// Who publishes it.
        identity: ParticipantIdentity,
        /// Its present description.
        track: RemoteTrack,
    },
    /// A track ended.
    TrackEnded {
        /// Who published it.
        identity: ParticipantIdentity,
        /// Which one.
        sid: TrackSid,
    },
    /// A whole frame arrived. Frames that the SFU injects into encrypted tracks are not among them.
    Frame {
        /// Who publishes the track that it came on.
        identity: ParticipantIdentity,
        /// Which track.
        sid: TrackSid,
        /// Codec by the negotiated payload type.
        codec: Codec,
        /// The frame as it was on the wire.
        frame: WireFrame,
    },
    /// A receiver cannot decode and asks for a key frame of a local track.
    KeyFrameRequested {
        /// Which local track.
        track: LocalTrackId,
    },
    /// The connection is being restored; frames may be lost meanwhile.
    Reconnecting,
    /// The connection is back; local tracks are published again.
    Reconnected,
    /// The connection ended for good; this is the last event.
    Disconnected {
        /// Why, in words for a log or a user.
        reason: String,
    },
}

/// A connection that carries one member's media.
///
/// Events come on the bounded channel that the constructor of the implementation returns. A reader that falls
/// behind loses frames (never control events), as a late video frame is worth nothing.
#[async_trait]
pub trait MediaTransport: Send + Sync + std::fmt::Debug {
    /// Announces a track and negotiates it. `encrypted` is only the hint that peers are told
    /// (TrackInfo.encryption = GCM, RED off).
    ///
    /// # Errors
    /// [`TransportError`] if the SFU refuses the track or the connection is gone.
    async fn publish(&self, spec: TrackSpec, encrypted: bool) -> Result<LocalTrackId, TransportError>;

    /// Ends a track; unknown ids are ignored.
    async fn unpublish(&self, track: LocalTrackId);

    /// Tells everybody that a track is muted or not.
    async fn set_muted(&self, track: LocalTrackId, muted: bool);

    /// Packetises and sends one frame. Frames sent while the connection is not up are dropped and counted.
    ///
    /// # Errors
    /// [`TransportError::UnknownTrack`], or [`TransportError::Closed`].
    async fn send(&self, track: LocalTrackId, frame: WireFrame) -> Result<(), TransportError>;

    /// Asks the sender of a remote video track for a key frame.
    async fn request_key_frame(&self, sid: &TrackSid);

    /// Leaves the room politely and closes everything.
    async fn close(&self);
}

/// Why a transport could not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TransportError {
    /// The SFU answered that this token may not enter.
    #[error("the SFU refused the token ({status}): {message}; ask the authorisation service for a new one")]
    Unauthorised {
        /// HTTP status.
        status: u16,
        /// The SFU's text.
        message: String,
    },
    /// The room does not exist and this user's homeserver may not create rooms there.
    #[error(
        "the SFU room does not exist and this token may not create it: the focus serves another homeserver"
    )]
    RoomCreationRestricted,
    /// The SFU has no room left.
    #[error("the SFU is out of capacity ({status}); try again later or use another focus")]
    Capacity {
        /// HTTP status.
        status: u16,
    },
    /// The SFU refused a track.
    #[error("the SFU refused the track: {0}")]
    TrackRefused(String),
    /// No answer within the time that the protocol grants.
    #[error("the SFU did not answer within {0:?} while {1}")]
    Timeout(std::time::Duration, &'static str),
    /// A codec that this transport cannot carry.
    #[error("this transport cannot carry {0:?}")]
    UnsupportedCodec(Codec),
    /// The track id is not published here.
    #[error("no such local track")]
    UnknownTrack,
    /// The connection has ended.
    #[error("the connection is closed")]
    Closed,
    /// Signalling failed.
    #[error("signalling with the SFU failed")]
    Signal(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The peer connection failed.
    #[error("the media connection failed")]
    Media(#[source] Box<dyn std::error::Error + Send + Sync>),
}
