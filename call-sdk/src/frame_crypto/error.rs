//! Why frames are not sealed or not opened.

use super::derive::CryptoFailed;
use crate::key::KeyIndex;

/// Why a frame was not sealed. It must be dropped, never sent as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SealError {
    /// Our ring has no key at this index.
    #[error("we have no media key at index {}; drop frames until one is set", .0.0)]
    MissingKey(KeyIndex),
    /// The key has sealed 2^32 frames.
    #[error("our media key has sealed 2^32 frames, the most that is safe; rotate it")]
    KeyExhausted,
    /// The frame ends within the bytes that stay in clear. Its length is given in bytes.
    #[error("the encoder's frame of {0} bytes is shorter than its codec's header; drop it")]
    FrameTooShort(usize),
    /// An H.264 or H.265 unit without a slice: no two clients seal it alike.
    #[error("the encoder's access unit has no slice; send parameter sets together with the next slice")]
    NoSlice,
    /// Two different parameter sets of one kind in one unit: packetisers keep only the last one.
    #[error("the encoder's access unit has several parameter sets of one kind; configure it to write one")]
    ParameterSets,
    /// More than 255 bytes before the first slice: libwebrtc cannot open such a frame.
    #[error("the encoder's parameter sets exceed 249 bytes, more than receivers can authenticate")]
    HeaderTooLong,
    /// The cryptographic library failed.
    #[error(transparent)]
    Crypto(#[from] CryptoFailed),
}

/// Why a frame was not opened. It must be dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The sender's ring has no key at this index.
    #[error("the sender's media key at index {} has not reached us; wait for its key message", .0.0)]
    MissingKey(KeyIndex),
    /// Fewer bytes than any sealed frame of this codec has. The length is given in bytes.
    #[error("the frame of {0} bytes is too short to be sealed; the SFU or the network cut it")]
    TooShort(usize),
    /// The trailer does not announce an IV of 12 bytes.
    #[error("the frame is not sealed: its sender does not encrypt, or the SFU changed it")]
    NotSealed,
    /// The frame does not authenticate under the key at this index.
    #[error("the frame does not open under the sender's key {}: it was changed on its way, or the key is not the one it was sealed with", .0.0)]
    Unauthentic(KeyIndex),
    /// The same frame was opened before.
    #[error("the frame under the sender's key {} was replayed by the SFU or the network", .0.0)]
    Replayed(KeyIndex),
    /// The trailer of injected frames on a payload that no SFU injects.
    #[error(
        "a frame marked as injected by the SFU carries foreign media; the SFU or a participant tried to pass it in"
    )]
    ForeignInjection,
    /// More than 100 injected frames in 2 s.
    #[error("the SFU injects more than 100 frames in 2 s; the excess is dropped")]
    InjectionFlood,
}
