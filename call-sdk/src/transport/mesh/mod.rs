//! Media from member to member, without an SFU: full mesh.
//!
//! `docs/mesh.md` specifies the wire. `signalling` is the state machine behind it, for every pair of one call, without
//! I/O: it decides who offers, reads and writes the `m.call.*` to-device messages (`wire`), and tells each connection
//! what to do by a [`Negotiate`] command. `connection` is one peer connection over the WebRTC engine; it answers with
//! [`Negotiated`] events.

use std::{collections::BTreeMap, fmt};

use serde::{Deserialize, Serialize};

use super::MeshSession;
use crate::{
    media::TrackSource,
    member::{Device, MemberKey},
};

#[cfg(feature = "webrtc")]
mod connection;
mod signalling;
mod wire;

#[cfg(feature = "webrtc")]
pub use self::connection::{MeshConnection, MeshOptions};
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub use self::signalling::mesh_message;
pub(crate) use self::signalling::{MessageId, Signalling, SignallingInput, SignallingOutput, Us};

/// The type of a mesh entry among a membership's transports.
pub(crate) const TRANSPORT_TYPE: &str = "dev.antiphon.mesh";

/// A member that we exchange media with directly.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MeshPeer {
    /// The member.
    pub(crate) member: MemberKey,
    /// Its device, which alone gets and sends our signalling.
    pub(crate) device: Device,
    /// Its session, by its membership. Another session is another process: everything starts anew.
    pub(crate) session: MeshSession,
}

/// What signalling asks of a connection.
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Negotiate {
    /// Make an offer with every local track and a section for every track that the other side announced; answered by
    /// [`Negotiated::Offer`].
    Offer {
        /// Whether to find paths anew.
        restart_ice: bool,
    },
    /// Take an offer and make the answer to it; answered by [`Negotiated::Answer`].
    Answer {
        /// The other side's offer.
        sdp: Sdp,
        /// The other side's streams.
        streams: Streams,
    },
    /// Take the answer to the latest offer.
    TakeAnswer {
        /// The other side's answer.
        sdp: Sdp,
        /// The other side's streams.
        streams: Streams,
    },
    /// Take candidates of the other side.
    Candidates(Vec<Candidate>),
    /// The other side describes its streams anew: some are muted, or it wants to send more than there are sections for.
    Streams(Streams),
}

/// What a connection tells signalling.
#[derive(Clone, PartialEq)]
#[non_exhaustive]
pub enum Negotiated {
    /// Our offer, with the candidates that were found at once.
    Offer {
        /// The offer.
        sdp: Sdp,
        /// Our streams.
        streams: Streams,
    },
    /// Our answer, with the candidates that were found at once.
    Answer {
        /// The answer.
        sdp: Sdp,
        /// Our streams.
        streams: Streams,
    },
    /// Further candidates of ours.
    Candidates(Vec<Candidate>),
    /// No candidate of ours follows.
    CandidatesEnd,
    /// Our streams are described differently: one was muted.
    Streams(Streams),
    /// Sections are missing or superfluous, for a track of ours or of the other side. Repeated calls are one wish.
    Needed {
        /// Our streams, with those that have no section yet.
        streams: Streams,
    },
    /// ICE found a path and DTLS is up.
    Up,
    /// The path is lost; ICE may find another.
    Interrupted,
    /// The other side's description cannot be used, or the engine failed: a new connection is needed.
    Failed(String),
}

/// A session description. It names addresses and is left out of `Debug`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Sdp(pub String);

impl fmt::Debug for Sdp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Sdp({} bytes)", self.0.len())
    }
}

/// An ICE candidate as `RTCIceCandidateInit` has it. It names an address and is left out of `Debug`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Candidate {
    /// The candidate line without `a=`; empty: the end of candidates.
    pub candidate: String,
    /// The section's id.
    #[serde(rename = "sdpMid", default, skip_serializing_if = "Option::is_none")]
    pub mid: Option<String>,
    /// The section's number.
    #[serde(rename = "sdpMLineIndex", default, skip_serializing_if = "Option::is_none")]
    pub index: Option<u16>,
}

impl fmt::Debug for Candidate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Candidate(redacted)")
    }
}

/// What each media stream of one side is, by the stream half of its msid (MSC3077, `sdp_stream_metadata`).
pub type Streams = BTreeMap<String, StreamMetadata>;

/// What one media stream is. We send one track per stream.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamMetadata {
    /// `m.usermedia` or `m.screenshare`.
    pub purpose: String,
    /// Whether its audio is muted.
    #[serde(default)]
    pub audio_muted: bool,
    /// Whether its video is muted.
    #[serde(default)]
    pub video_muted: bool,
    /// Ours: what the one track of the stream is.
    #[serde(rename = "dev.antiphon.track", default, skip_serializing_if = "Option::is_none")]
    pub track: Option<TrackMetadata>,
}

/// What a track is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrackMetadata {
    /// Its source.
    pub source: TrackSource,
    /// The application's name for it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub name: String,
    /// Width in pixels of a video track; 0: not known.
    #[serde(default)]
    pub width: u32,
    /// Height in pixels of a video track; 0: not known.
    #[serde(default)]
    pub height: u32,
}

impl fmt::Debug for Negotiate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Offer { restart_ice: false } => "Offer",
            Self::Offer { restart_ice: true } => "Offer with an ICE restart",
            Self::Answer { .. } => "Answer",
            Self::TakeAnswer { .. } => "TakeAnswer",
            Self::Candidates(_) => "Candidates",
            Self::Streams(_) => "Streams",
        })
    }
}

impl fmt::Debug for Negotiated {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Offer { .. } => f.write_str("Offer"),
            Self::Answer { .. } => f.write_str("Answer"),
            Self::Candidates(_) => f.write_str("Candidates"),
            Self::CandidatesEnd => f.write_str("CandidatesEnd"),
            Self::Streams(_) => f.write_str("Streams"),
            Self::Needed { .. } => f.write_str("Needed"),
            Self::Up => f.write_str("Up"),
            Self::Interrupted => f.write_str("Interrupted"),
            Self::Failed(cause) => f.debug_tuple("Failed").field(cause).finish(),
        }
    }
}
