//! Opening the frames of one incoming track.

use std::{fmt, time::Instant};

use super::{
    OVERHEAD, TAG_LEN,
    codec::{Rule, UnsupportedCodec},
    emulation,
    error::OpenError,
    iv::{IV_LEN, Iv},
    key::FrameKey,
    ring::{KeyFinder, KeyRing},
    sif::{SifKind, SifLimiter, SifTrailer},
};
use crate::{key::KeyIndex, media::Codec};

/// Opens the frames of one track with the key ring of the member who sends it.
///
/// Opened frames are remembered with the key, not here: a replay is recognised on any track of the member, and a
/// decryptor can be replaced (when a track changes its codec) without forgetting.
pub struct FrameDecryptor {
    rule: Rule,
    keys: KeyFinder,
    injected: SifLimiter,
    /// Sealed tail of the current frame without its escapes.
    scratch: Vec<u8>,
}

impl FrameDecryptor {
    /// A decryptor for frames of `codec`, with the keys of `ring`: the sender's ring.
    ///
    /// # Errors
    /// [`UnsupportedCodec`] for AV1.
    pub fn new(codec: Codec, ring: KeyRing) -> Result<Self, UnsupportedCodec> {
        let rule = Rule::of(codec)?;
        Ok(Self { rule, keys: KeyFinder::new(ring), injected: SifLimiter::default(), scratch: Vec::new() })
    }

    /// Opens `wire`, a whole depacketised frame, into `out`, which is overwritten and whose capacity is reused.
    /// Fastest with a buffer that still holds an earlier frame, as [`FramePool`](crate::media::FramePool) hands
    /// them out.
    ///
    /// Frames that the SFU injects are recognised here and nowhere else: `sif_trailer` is the trailer it announced
    /// for them, if it did. `now` limits how many of them pass, and has no other use.
    ///
    /// `out` holds a frame after [`Opened::Frame`] and is empty in every other case.
    ///
    /// # Errors
    /// An [`OpenError`]: drop the frame. Errors come at the rate of hostile traffic; limit the rate of reports.
    pub fn open(
        &mut self,
        now: Instant,
        wire: &[u8],
        sif_trailer: Option<&SifTrailer>,
        out: &mut Vec<u8>,
    ) -> Result<Opened, OpenError> {
        let opened = self.try_open(now, wire, sif_trailer, out);
        if !matches!(opened, Ok(Opened::Frame(_))) {
            out.clear();
        }
        opened
    }

    fn try_open(
        &mut self,
        now: Instant,
        wire: &[u8],
        sif_trailer: Option<&SifTrailer>,
        out: &mut Vec<u8>,
    ) -> Result<Opened, OpenError> {
        if wire.is_empty() {
            return Ok(Opened::Empty);
        }
        if let Some(payload) = sif_trailer.and_then(|trailer| trailer.strip(wire)) {
            let kind = SifKind::of(payload).ok_or(OpenError::ForeignInjection)?;
            return if self.injected.admit(now) {
                Ok(Opened::Injected(kind))
            } else {
                Err(OpenError::InjectionFlood)
            };
        }

        // The trailer is never escaped. Reading it first drops a frame without a key in constant time, before the
        // scan for slices and escapes.
        let [.., iv_len, index] = *wire else { return Err(OpenError::TooShort(wire.len())) };
        if usize::from(iv_len) != IV_LEN {
            return Err(OpenError::NotSealed);
        }
        let index = KeyIndex(index);
        let key = self.keys.find(index).ok_or(OpenError::MissingKey(index))?;

        let layout = self.rule.layout(wire);
        let (header, tail) = wire.split_at_checked(layout.clear).ok_or(OpenError::TooShort(wire.len()))?;
        let tail = if layout.escaped { emulation::unescape(tail, &mut self.scratch) } else { tail };
        let tail = Tail::parse(tail).ok_or(OpenError::TooShort(wire.len()))?;
        read_sealed(key, index, header, &tail, out)?;
        Ok(Opened::Frame(index))
    }
}

impl fmt::Debug for FrameDecryptor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FrameDecryptor")
            .field("rule", &self.rule)
            .field("ring", &self.keys)
            .finish_non_exhaustive()
    }
}

/// The sealed part of a frame behind its clear bytes, without escapes.
pub(super) struct Tail<'a> {
    ciphertext: &'a [u8],
    tag: &'a [u8; TAG_LEN],
    iv: Iv,
}

impl<'a> Tail<'a> {
    /// Takes `ciphertext | tag | IV | trailer` apart; `None` if it is too short for them.
    pub(super) fn parse(tail: &'a [u8]) -> Option<Self> {
        let (ciphertext, overhead) = tail.split_at_checked(tail.len().checked_sub(OVERHEAD)?)?;
        let (tag, rest) = overhead.split_first_chunk()?;
        let (iv, _trailer) = rest.split_first_chunk()?;
        Some(Self { ciphertext, tag, iv: *iv })
    }
}

/// Writes `header` and the opened `tail` to `out`. After an error `out` must not be used.
#[inline]
pub(super) fn read_sealed(
    key: &FrameKey,
    index: KeyIndex,
    header: &[u8],
    tail: &Tail<'_>,
    out: &mut Vec<u8>,
) -> Result<(), OpenError> {
    // Not cleared first: in a reused buffer only the part beyond the last frame is filled with zeros.
    out.resize(header.len() + tail.ciphertext.len(), 0);
    let (clear, plain) = out.split_at_mut(header.len());
    clear.copy_from_slice(header);
    key.open(index, tail.iv, header, tail.ciphertext, tail.tag, plain)
}

/// Outcome of opening a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Opened {
    /// A frame that its sender sealed under the key at this index; it is in the caller's buffer.
    Frame(KeyIndex),
    /// A frame of zero bytes. It is not authenticated and carries no media.
    Empty,
    /// The SFU replaced the sender's media. Not from the sender and not encrypted: show a muted track, and leave
    /// any indicator of encryption unchanged.
    Injected(SifKind),
}
