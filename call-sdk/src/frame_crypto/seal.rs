//! Sealing the frames of one outgoing encoding.

use std::fmt;

use super::{
    OVERHEAD, TAG_LEN,
    codec::{Rule, UnsupportedCodec},
    derive::CryptoFailed,
    emulation, h26x,
    iv::{IV_LEN, Iv, IvSource},
    key::FrameKey,
    ring::KeyRing,
};
use crate::{key::KeyIndex, media::Codec};

/// Seals the frames of one encoding: one track, or one layer of a simulcast track.
///
/// There is no encryptor without a key ring and no mode that lets a frame through unsealed. What stays in clear:
///
/// | codec | clear bytes |
/// |---|---|
/// | Opus | 1 |
/// | VP8 | 10 of a key frame, 3 of any other |
/// | VP9 | none |
/// | H.264, H.265 | up to the second byte of the first slice, parameter sets included |
///
/// H.264 and H.265 units are given a canonical header before they are sealed (four-byte start codes; delimiters
/// and filler dropped; parameter sets directly before the slice; at most 255 bytes, for which supplemental
/// information gives way), as receivers authenticate what their transport made of it. The opened frame therefore
/// has that header too.
///
/// The packetiser must take the sealed frame as it is: a trailing zero is the key index 0, not padding.
pub struct FrameEncryptor {
    rule: Rule,
    ring: KeyRing,
    ivs: IvSource,
    /// Canonical header of the frame at hand.
    header: Vec<u8>,
    /// Tail of the frame at hand while it is escaped.
    scratch: Vec<u8>,
}

impl FrameEncryptor {
    /// An encryptor for frames of `codec`, with the keys of `ring`: our own ring.
    ///
    /// # Errors
    /// [`UnsupportedCodec`] for AV1.
    pub fn new(codec: Codec, ring: KeyRing) -> Result<Self, UnsupportedCodec> {
        let rule = Rule::of(codec)?;
        Ok(Self { rule, ring, ivs: IvSource::default(), header: Vec::new(), scratch: Vec::new() })
    }

    /// Seals `frame` under the key at `index` into `out`, which is overwritten and whose room is reused.
    ///
    /// An empty frame has nothing to hide and stays empty. When to move to a new index is the caller's decision.
    ///
    /// # Errors
    /// A [`SealError`], with `out` empty: the frame must be dropped. The next frame may well succeed.
    pub fn seal(&mut self, index: KeyIndex, frame: &[u8], out: &mut Vec<u8>) -> Result<(), SealError> {
        let sealed = self.try_seal(index, frame, out);
        if sealed.is_err() {
            out.clear();
        }
        sealed
    }

    fn try_seal(&mut self, index: KeyIndex, frame: &[u8], out: &mut Vec<u8>) -> Result<(), SealError> {
        if frame.is_empty() {
            out.clear();
            return Ok(());
        }
        let key = self.ring.find(index).ok_or(SealError::MissingKey(index))?;
        let (header, payload, escaped) = match self.rule {
            Rule::UpToSlice(family) => {
                let end = h26x::canonical_header(family, frame, &mut self.header)?;
                (self.header.as_slice(), &frame[end..], true)
            }
            rule => {
                let layout = rule.layout(frame);
                let (header, payload) =
                    frame.split_at_checked(layout.clear).ok_or(SealError::FrameTooShort(frame.len()))?;
                (header, payload, layout.escaped)
            }
        };
        let iv = self.ivs.next(&key)?;
        write_sealed(&key, index, iv, header, payload, out)?;
        if escaped {
            emulation::escape(out, header.len(), &mut self.scratch);
        }
        Ok(())
    }

    #[cfg(test)]
    pub(super) fn start_ivs_at(&mut self, index: KeyIndex, first: Iv) {
        let key = self.ring.find(index).unwrap();
        self.ivs = IvSource::starting_at(&key, first);
    }
}

impl fmt::Debug for FrameEncryptor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FrameEncryptor")
            .field("rule", &self.rule)
            .field("ring", &self.ring)
            .finish_non_exhaustive()
    }
}

/// Writes `header | sealed payload | tag | IV | trailer`.
pub(super) fn write_sealed(
    key: &FrameKey,
    index: KeyIndex,
    iv: Iv,
    header: &[u8],
    payload: &[u8],
    out: &mut Vec<u8>,
) -> Result<(), CryptoFailed> {
    let plain_len = header.len() + payload.len();
    out.reserve((plain_len + OVERHEAD).saturating_sub(out.len()));
    // Not cleared first: in a buffer that is reused, only what grew beyond the last frame is zeroed.
    out.resize(plain_len + TAG_LEN, 0);
    let (clear, sealed) = out.split_at_mut(header.len());
    clear.copy_from_slice(header);
    key.seal(iv, header, payload, sealed)?;
    out.extend_from_slice(&iv);
    out.extend_from_slice(&[IV_LEN as u8, index.0]);
    Ok(())
}

/// Why a frame was not sealed. It must be dropped, never sent as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SealError {
    /// Our ring has no key at this index.
    #[error("we have no media key at index {} yet; drop the frame until one is set", .0.0)]
    MissingKey(KeyIndex),
    /// The key has sealed 2^32 frames.
    #[error("our media key has sealed 2^32 frames, the most that is safe; rotate it")]
    KeyExhausted,
    /// The frame ends within the bytes that stay in clear. Its length is given in bytes.
    #[error("the encoder's frame of {0} bytes is shorter than its codec's header; drop it")]
    FrameTooShort(usize),
    /// An H.264 or H.265 unit without a slice: no two clients agree how to seal it.
    #[error("the encoder's access unit has no slice; send parameter sets together with the next slice")]
    NoSlice,
    /// Two different parameter sets of one kind in one unit: packetisers keep only the last.
    #[error("the encoder's access unit has several parameter sets of one kind; configure it to write one")]
    ParameterSets,
    /// More than 255 bytes before the first slice: libwebrtc cannot open such a frame.
    #[error("the encoder's parameter sets exceed 249 bytes, more than receivers can authenticate")]
    HeaderTooLong,
    /// The cryptographic library failed.
    #[error(transparent)]
    Crypto(#[from] CryptoFailed),
}
