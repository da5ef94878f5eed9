//! Clear bytes of a frame, for each codec.

use super::h26x::{self, Family};
use crate::media::Codec;

/// How frames of one codec are divided into clear and sealed bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rule {
    /// Audio: the first byte, Opus's table of contents.
    FirstByte,
    /// VP8: the frame header, 10 bytes of a key frame and 3 of any other.
    Vp8,
    /// VP9: no clear byte, because forwarders read the payload descriptor outside the frame.
    Nothing,
    /// H.264 and H.265: up to the second byte of the first slice.
    UpToSlice(Family),
}

impl Rule {
    pub(super) fn of(codec: Codec) -> Result<Self, UnsupportedCodec> {
        match codec {
            Codec::Opus => Ok(Self::FirstByte),
            Codec::Vp8 => Ok(Self::Vp8),
            Codec::Vp9 => Ok(Self::Nothing),
            Codec::H264 => Ok(Self::UpToSlice(Family::H264)),
            Codec::H265 => Ok(Self::UpToSlice(Family::H265)),
            Codec::Av1 => Err(UnsupportedCodec(codec)),
        }
    }

    /// Divides a frame, plain or sealed: both give the same answer, because it depends on clear bytes only.
    pub(super) fn layout(self, frame: &[u8]) -> Layout {
        match self {
            Self::FirstByte => Layout { clear: 1, escaped: false },
            Self::Vp8 => Layout { clear: vp8_clear(frame), escaped: false },
            Self::Nothing => Layout { clear: 0, escaped: false },
            Self::UpToSlice(family) => match h26x::first_slice(family, frame) {
                Some(slice) => Layout { clear: slice + h26x::CLEAR_OF_SLICE, escaped: true },
                // livekit-client's fallback for a unit without a slice. Only receivers get here.
                None => Layout { clear: vp8_clear(frame), escaped: false },
            },
        }
    }
}

/// Where the sealed part of a frame begins, and whether it is escaped on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) clear: usize,
    pub(super) escaped: bool,
}

/// The inverse key-frame flag is the lowest bit of the first byte (RFC 6386 §9.1), and it stays in clear.
fn vp8_clear(frame: &[u8]) -> usize {
    if frame.first().is_some_and(|first| first & 1 == 0) { 10 } else { 3 }
}

/// Clients do not agree on how to encrypt frames of this codec, so it cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} cannot be used in an encrypted call: clients do not agree on how to encrypt it; use another codec"
)]
pub struct UnsupportedCodec(pub Codec);
