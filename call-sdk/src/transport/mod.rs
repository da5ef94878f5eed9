//! How one member's media travels: the seam between a call and an SFU or a mesh peer.
//!
//! A transport carries opaque frames. It never holds a key and never decides what is encrypted: it is handed sealed
//! frames and gives back what arrived, named by the participant identity that the other end vouches for. Which member
//! that identity is, and whether the frame opens, is decided above it.

use std::{fmt, time::Duration};

use crate::{
    frame_crypto::SealedData,
    identity::ParticipantIdentity,
    media::{Codec, TrackSource},
};

mod focus;
#[cfg(feature = "webrtc")]
pub mod livekit;
pub mod mesh;
pub mod rtc;
#[cfg(feature = "shell")]
mod seam;

pub use focus::{FocusUrlError, LiveKitFocus, NamedBy, ServiceUrl, SfuUrl};
#[cfg(feature = "shell")]
pub use seam::{
    FrameReceiver, MediaTransport, MeshTransport, Outlet, ReceivedFrame, TransportError, WireFrame,
};

/// Where one member's media travels.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Transport {
    /// Over a LiveKit SFU.
    LiveKit(LiveKitFocus),
    /// From member to member, without an SFU.
    Mesh(MeshSession),
}

/// One process of a member in the mesh of one call: random, and new whenever the member joins. It ties signalling to
/// the membership that names it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MeshSession(pub String);

impl Transport {
    /// The LiveKit focus, if it is one.
    #[must_use]
    pub fn livekit(&self) -> Option<&LiveKitFocus> {
        match self {
            Self::LiveKit(focus) => Some(focus),
            Self::Mesh(_) => None,
        }
    }

    /// The mesh session, if it is one.
    #[must_use]
    pub fn mesh(&self) -> Option<&MeshSession> {
        match self {
            Self::LiveKit(_) => None,
            Self::Mesh(session) => Some(session),
        }
    }
}

/// Names a connection. A connection that is opened again gets another generation, so that a late event of the closed
/// one can be told apart and dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnectionId {
    /// Which focus or mesh peer, by order of first use in the call.
    pub route: u32,
    /// How often it was opened before.
    pub generation: u32,
}

impl ConnectionId {
    /// The first route of mesh peers; those below it lead to foci.
    pub(crate) const FIRST_MESH_ROUTE: u32 = 1 << 16;

    /// Whether it is the connection to a mesh peer.
    #[must_use]
    pub fn is_mesh(self) -> bool {
        self.route >= Self::FIRST_MESH_ROUTE
    }
}

impl fmt::Display for ConnectionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.route, self.generation)
    }
}

/// Names a local track for the life of the call, whatever connections carry it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LocalTrackId(pub u64);

/// Names a remote track on its connection: LiveKit's `TR_…` sid.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TrackSid(pub String);

/// A remote track as its transport describes it. Everything in it is the SFU's word.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RemoteTrack {
    /// The name of the track on its connection.
    pub sid: TrackSid,
    /// The publisher's word about what it is.
    pub source: TrackSource,
    /// The publisher's free name for it.
    pub name: String,
    /// The codec, once known.
    pub codec: Option<Codec>,
    /// Width and height in pixels of the largest layer; `(0, 0)` for audio, or if unknown.
    pub dimensions: (u32, u32),
    /// The `encryption` hint of TrackInfo. Never shown as truth: policy comes from Matrix.
    pub announced_encrypted: bool,
    /// Whether the publisher muted it.
    pub muted: bool,
}

impl RemoteTrack {
    /// A track of which nothing but its name and source is known.
    #[must_use]
    pub fn new(sid: TrackSid, source: TrackSource) -> Self {
        Self {
            sid,
            source,
            name: String::new(),
            codec: None,
            dimensions: (0, 0),
            announced_encrypted: false,
            muted: false,
        }
    }
}

/// Which part of a remote track to receive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subscription {
    /// Whether to receive it at all.
    pub enabled: bool,
    /// The SFU keeps the subscription but sends nothing while this is set.
    pub paused: bool,
    /// Size in pixels at which it is shown: the SFU picks the layer. `None`: the largest.
    pub dimensions: Option<(u32, u32)>,
    /// Most frames per second; `None`: as sent.
    pub fps: Option<u32>,
    /// Which track keeps its quality when the downlink is short; higher first.
    pub priority: u32,
}

impl Default for Subscription {
    fn default() -> Self {
        Self { enabled: true, paused: false, dimensions: None, fps: None, priority: 0 }
    }
}

/// How well a participant's connection does, by the SFU's word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum ConnectionQuality {
    /// Lost.
    Lost,
    /// Poor.
    Poor,
    /// Good.
    Good,
    /// Excellent.
    Excellent,
}

/// A speaking participant.
#[derive(Clone, Debug, PartialEq)]
pub struct Speaker {
    /// Its identity, by the SFU's word.
    pub identity: ParticipantIdentity,
    /// Loudness from 0 to 1, by the SFU's measurement.
    pub level: f32,
}

/// How data packets are delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reliability {
    /// In order, without loss.
    Reliable,
    /// At most once, in any order.
    Lossy,
}

/// A data packet on the wire.
#[derive(Clone, Debug, PartialEq)]
pub struct DataPacket {
    /// How it is delivered.
    pub reliability: Reliability,
    /// For whom; empty: for everybody.
    pub destinations: Vec<ParticipantIdentity>,
    /// The content.
    pub body: DataBody,
}

/// The content of a data packet.
#[derive(Clone, Debug, PartialEq)]
pub enum DataBody {
    /// A user packet in clear, for unencrypted calls.
    Plain(UserData),
    /// A sealed packet (`EncryptedPacket`).
    Sealed(SealedData),
}

/// An application's data message.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UserData {
    /// Bytes of the message, at most 15 kB to pass every SFU.
    pub payload: Vec<u8>,
    /// What it is about, in the application's words.
    pub topic: Option<String>,
}

/// A step on the way to flowing media, for timing and for telling where a connection hangs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum ConnectStage {
    /// The SFU answered the join.
    Signalled,
    /// ICE found a path.
    IceConnected,
    /// DTLS is up: media can flow.
    MediaUp,
}

/// News from a connection. Frames do not pass here: they go to the receiver that is attached to their track.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum TransportEvent {
    /// A step of connecting is done.
    Stage(ConnectStage),
    /// Media has not come up although signalling has, for 10 s: UDP may be blocked, or the SFU may advertise a wrong
    /// address. The addresses that were tried are included.
    MediaBlocked {
        /// `local -> remote` candidate pairs, at most 16.
        tried: Vec<String>,
    },
    /// A participant is in the SFU room.
    ParticipantJoined {
        /// Its identity, by the SFU's word.
        identity: ParticipantIdentity,
    },
    /// A participant left the SFU room.
    ParticipantLeft {
        /// Its identity, by the SFU's word.
        identity: ParticipantIdentity,
    },
    /// A track was published, or changed.
    TrackUpdated {
        /// Its publisher.
        identity: ParticipantIdentity,
        /// Its present description.
        track: RemoteTrack,
    },
    /// A track ended.
    TrackEnded {
        /// Its publisher.
        identity: ParticipantIdentity,
        /// Its name.
        sid: TrackSid,
    },
    /// A receiver cannot decode and asks for a key frame of a local track.
    KeyFrameRequested {
        /// The local track.
        track: LocalTrackId,
        /// The simulcast layer, lowest first.
        layer: u8,
    },
    /// The SFU or the network ended a local track.
    LocalTrackEnded {
        /// The local track.
        track: LocalTrackId,
        /// The SFU's reason.
        reason: String,
    },
    /// Layers of a local track that somebody receives; the others need not be encoded (dynacast).
    LayersWanted {
        /// The local track.
        track: LocalTrackId,
        /// One entry per layer, lowest first.
        layers: Vec<bool>,
    },
    /// How much a local track should send now, in bits per second.
    TargetBitrate {
        /// The local track.
        track: LocalTrackId,
        /// Bits per second.
        bits_per_second: u64,
    },
    /// The uplink to a mesh peer does not carry our video, which is paused there for 5 s: the peer hears us but does not
    /// see us. [`UplinkEnough`](Self::UplinkEnough) follows when it is over; so does the end of the connection.
    UplinkShort {
        /// What the uplink to the peer carries, in bits per second.
        bits_per_second: u64,
        /// What it would have to carry at least, audio included.
        needed: u64,
    },
    /// Our video flows to the mesh peer again, or there is none any more.
    UplinkEnough,
    /// The SFU pauses or resumes a remote track because our downlink is short.
    StreamPaused {
        /// The remote track.
        sid: TrackSid,
        /// Whether it is paused.
        paused: bool,
    },
    /// The participants that speak now, loudest first.
    Speakers(Vec<Speaker>),
    /// How well a participant's connection does.
    Quality {
        /// Its identity.
        identity: ParticipantIdentity,
        /// The SFU's judgement.
        quality: ConnectionQuality,
    },
    /// A data packet arrived.
    Data {
        /// Its sender, by the SFU's word.
        identity: ParticipantIdentity,
        /// How it was delivered.
        reliability: Reliability,
        /// Its content.
        body: DataBody,
    },
    /// A mesh connection answers its signalling.
    Negotiated(mesh::Negotiated),
    /// The connection is being restored; frames may be lost meanwhile.
    Reconnecting,
    /// The connection is back; local tracks are published again.
    Reconnected,
    /// The connection ended for good; the last event.
    Disconnected(DisconnectReason),
}

/// Why a connection ended for good.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DisconnectReason {
    /// We closed it.
    #[error("closed by us")]
    Closed,
    /// Another connection took our identity: two sessions of one device, or one SFU reached by two names.
    #[error("another connection with our identity replaced this one")]
    DuplicateIdentity,
    /// The SFU removed us.
    #[error("the SFU removed us: {0}")]
    Removed(String),
    /// The SFU does not accept our token any more, or its room is gone: a fresh token may help.
    #[error("the SFU asks for a new token: {0}")]
    TokenRejected(String),
    /// The SFU could not be reached for this long.
    #[error("the SFU could not be reached for {after:?}: {cause}")]
    Unreachable {
        /// How long it was tried.
        after: Duration,
        /// The last cause.
        cause: String,
    },
    /// Something failed in our own process.
    #[error("internal failure: {0}")]
    Internal(String),
}
