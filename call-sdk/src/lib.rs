//! Join end-to-end encrypted MatrixRTC calls (MSC3401, MSC4143, MSC4195) from Rust.
//!
//! An application names [`Call`], [`CallOptions`], [`CallEvent`], [`LocalTrack`], [`RemoteTrack`], [`Member`] and a few
//! more; all of them are at the root of this crate.
//!
//! One rule holds inside: protocol logic does no I/O. [`machine::CallMachine`] decides everything about one call;
//! the shell behind [`Call`] owns the clock, the homeserver ([`matrix`]) and the media connections ([`transport`]),
//! and performs what the machine asks for.
//!
//! What this crate refuses to do: hand plaintext from the network to an application in an encrypted call, accept a
//! media key that did not come Olm-encrypted from the member's own device, or ask the SFU whether a call is
//! encrypted. That policy comes from Matrix.
//!
//! # Features
//!
//! | feature | default | what it adds |
//! |---|---|---|
//! | `matrix-sdk` | yes | calls in rooms of a matrix-sdk client; sessions |
//! | `webrtc` | yes | media over LiveKit SFUs |
//! | `opus` | no | sound as samples: an Opus encoder and decoder in Rust |
//! | `shell` | by the first two | `Call` over a `MatrixPort` and a `Connector` of your own |
//! | `aws-lc` | yes | frame encryption by AWS-LC instead of RustCrypto |
//!
//! Without features the crate is the call machine, frame encryption, RTP packets and recordings: no sockets, no
//! threads, no clock.
#![cfg_attr(
    not(all(feature = "shell", feature = "webrtc")),
    allow(dead_code, unused_imports, reason = "what only the shell or the transports use")
)]

#[cfg(feature = "shell")]
mod addresses;
#[cfg(feature = "shell")]
mod call;
#[cfg(feature = "shell")]
pub mod foci;
pub mod frame_crypto;
mod identity;
mod key;
pub mod machine;
pub mod matrix;
mod media;
mod member;
#[cfg(feature = "matrix-sdk")]
mod session;
mod time;
#[cfg(feature = "shell")]
pub mod tls;
pub mod transport;

#[cfg(feature = "shell")]
pub use call::{
    Call, CallError, CallEvents, CallOptions, Connected, Connector, LocalTrack, PeerOpened, TrackSummary,
    WriteError,
};
#[cfg(feature = "webrtc")]
pub use call::{LiveKitConnector, LiveKitOptions};
#[cfg(all(feature = "shell", feature = "opus"))]
pub use call::{PcmTrack, PcmWriteError};
pub use key::{BadKeyLength, KeyIndex, MediaKey};
pub use machine::{
    Attention, CallEvent, CallReport, CallStatus, ConnectFailure, ConnectFailureKind, EncryptionPolicy,
    EndReason, HealingConfig, IncomingTrack, Invite, InviteEnd, MembershipMode, MeshPolicy, MeshReason,
    NoMediaCause, OwnConfig, RolloutConfig, TrackStats,
};
pub use matrix::{OwnTrust, TrustPolicy};
#[cfg(feature = "matrix-sdk")]
pub use matrix_sdk;
pub use media::{
    Codec, EncodedFrame, FrameBytes, FramePool, Recording, RecordingError, TrackSource, TrackSpec,
    VideoLayer, opus_duration,
};
#[cfg(feature = "opus")]
pub use media::{FRAME_SAMPLES, PcmDecoder, PcmEncoder, PcmError, PcmFrame, SAMPLE_RATE};
pub use member::{Device, Member, MemberId, MemberKey, MembershipForm, ParticipantIdentity, Slot};
#[cfg(feature = "matrix-sdk")]
pub use session::{Homeserver, Secret, Session, SessionError, SessionOptions};
pub use time::{Now, UnixMillis};
pub use transport::{
    ConnectionQuality, LiveKitFocus, LocalTrackId, Reliability, RemoteTrack, Subscription, TrackSid,
    Transport, UserData,
};

/// The examples of the README compile.
#[cfg(all(doctest, feature = "matrix-sdk", feature = "webrtc"))]
#[doc = include_str!("../../README.md")]
struct Readme;

/// So do those of the guide.
#[cfg(all(doctest, feature = "matrix-sdk", feature = "webrtc"))]
#[doc = include_str!("../../docs/sdk/README.md")]
struct Guide;
