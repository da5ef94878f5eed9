//! Sealing the frames of one outgoing encoding.

use std::fmt;

use super::{
    OVERHEAD,
    codec::{Rule, UnsupportedCodec},
    derive::CryptoFailed,
    emulation,
    error::SealError,
    h26x,
    iv::{IV_LEN, Iv},
    iv_source::IvSource,
    key::FrameKey,
    ring::{KeyFinder, KeyRing},
};
use crate::{key::KeyIndex, media::Codec};

/// Seals the frames of one encoding: one track, or one layer of a simulcast track.
///
/// An encryptor needs a key ring, and has no mode that passes a frame unsealed. Bytes that stay in clear:
///
/// | codec | clear bytes |
/// |---|---|
/// | Opus | 1 |
/// | VP8 | 10 of a key frame, 3 of any other |
/// | VP9 | none |
/// | H.264, H.265 | up to the second byte of the first slice, parameter sets included |
///
/// H.264 and H.265 units are given a canonical header before they are sealed (four-byte start codes; delimiters
/// and filler dropped; parameter sets directly before the slice; supplemental information dropped if the header
/// would exceed 255 bytes), because receivers authenticate the header as their transport rebuilt it. The opened
/// frame has that header too.
///
/// The packetiser must take the sealed frame as it is: a trailing zero is the key index 0, not padding.
pub struct FrameEncryptor {
    rule: Rule,
    keys: KeyFinder,
    ivs: IvSource,
    /// Canonical header of the current frame.
    header: Vec<u8>,
    /// Tail of the current frame while it is escaped.
    scratch: Vec<u8>,
}

impl FrameEncryptor {
    /// An encryptor for frames of `codec`, with the keys of `ring`: our own ring.
    ///
    /// # Errors
    /// [`UnsupportedCodec`] for AV1.
    pub fn new(codec: Codec, ring: KeyRing) -> Result<Self, UnsupportedCodec> {
        let rule = Rule::of(codec)?;
        let keys = KeyFinder::new(ring);
        Ok(Self { rule, keys, ivs: IvSource::default(), header: Vec::new(), scratch: Vec::new() })
    }

    /// Seals `frame` under the key at `index` into `out`, which is overwritten and whose capacity is reused.
    ///
    /// An empty frame stays empty, as with every client. The caller decides when to move to a new index.
    ///
    /// # Errors
    /// A [`SealError`], with `out` empty: drop the frame. The next frame may succeed.
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
        let key = self.keys.find(index).ok_or(SealError::MissingKey(index))?;
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
        let iv = self.ivs.next(key)?;
        write_sealed(key, index, iv, header, payload, out)?;
        if escaped {
            emulation::escape(out, header.len(), &mut self.scratch);
        }
        Ok(())
    }

    #[cfg(test)]
    pub(super) fn start_ivs_at(&mut self, index: KeyIndex, first: Iv) {
        self.ivs = IvSource::starting_at(self.keys.find(index).unwrap(), first);
    }
}

impl fmt::Debug for FrameEncryptor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FrameEncryptor")
            .field("rule", &self.rule)
            .field("ring", &self.keys)
            .finish_non_exhaustive()
    }
}

/// Writes `header | ciphertext | tag | IV | trailer` to `out`.
pub(super) fn write_sealed(
    key: &FrameKey,
    index: KeyIndex,
    iv: Iv,
    header: &[u8],
    payload: &[u8],
    out: &mut Vec<u8>,
) -> Result<(), SealError> {
    // Not cleared first: in a reused buffer only the part beyond the last frame is filled with zeros.
    out.resize(header.len() + payload.len() + OVERHEAD, 0);
    let (clear, tail) = out.split_at_mut(header.len());
    let (ciphertext, overhead) = tail.split_at_mut(payload.len());
    clear.copy_from_slice(header);
    let (tag, rest) = overhead.split_first_chunk_mut().ok_or(CryptoFailed)?;
    let (iv_place, trailer) = rest.split_first_chunk_mut().ok_or(CryptoFailed)?;
    key.seal(index, iv, header, payload, ciphertext, tag)?;
    *iv_place = iv;
    trailer.copy_from_slice(&[IV_LEN as u8, index.0]);
    Ok(())
}
