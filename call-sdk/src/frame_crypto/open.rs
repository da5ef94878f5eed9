//! Opening the frames of one incoming track.

use std::{fmt, time::Instant};

use super::{
    OVERHEAD, TAG_LEN, TRAILER_LEN,
    codec::{Rule, UnsupportedCodec},
    emulation,
    iv::{IV_LEN, Iv},
    key::{FrameKey, Refused},
    ring::KeyRing,
    sif::{SifKind, SifLimiter},
};
use crate::{key::KeyIndex, media::Codec};

/// Opens the frames of one track with the key ring of the member who sends it.
///
/// What was opened is remembered with the key, not here: a replay is recognised on any track of the member, and a
/// decryptor can be replaced (when a track changes its codec) without forgetting.
pub struct FrameDecryptor {
    rule: Rule,
    ring: KeyRing,
    injected: SifLimiter,
    /// Sealed tail of the frame at hand without its escapes.
    scratch: Vec<u8>,
}

impl FrameDecryptor {
    /// A decryptor for frames of `codec`, with the keys of `ring`: the sender's ring.
    ///
    /// # Errors
    /// [`UnsupportedCodec`] for AV1.
    pub fn new(codec: Codec, ring: KeyRing) -> Result<Self, UnsupportedCodec> {
        let rule = Rule::of(codec)?;
        Ok(Self { rule, ring, injected: SifLimiter::default(), scratch: Vec::new() })
    }

    /// Opens `wire`, a whole depacketised frame, into `out`, which is overwritten and whose room is reused.
    ///
    /// `sif_trailer` is the trailer the SFU announced for the frames it injects, if it did. `now` bounds how many
    /// of those are let through, and nothing else.
    ///
    /// `out` holds a frame after [`Opened::Frame`] and is empty in every other case.
    ///
    /// # Errors
    /// An [`OpenError`]: the frame must be dropped. Errors come at the pace of hostile traffic; whoever reports
    /// them has to limit their rate.
    pub fn open(
        &mut self,
        now: Instant,
        wire: &[u8],
        sif_trailer: Option<&[u8]>,
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
        sif_trailer: Option<&[u8]>,
        out: &mut Vec<u8>,
    ) -> Result<Opened, OpenError> {
        if wire.is_empty() {
            return Ok(Opened::Empty);
        }
        if let Some(payload) = injected_payload(wire, sif_trailer) {
            let kind = SifKind::of(payload).ok_or(OpenError::ForeignInjection)?;
            return if self.injected.admit(now) {
                Ok(Opened::Injected(kind))
            } else {
                Err(OpenError::InjectionFlood)
            };
        }

        // The trailer is never escaped. Looking at it first drops a frame without a key in constant time, before
        // the scan for slices and escapes.
        let [.., iv_len, index] = *wire else { return Err(OpenError::TooShort(wire.len())) };
        if usize::from(iv_len) != IV_LEN {
            return Err(OpenError::NotSealed);
        }
        let index = KeyIndex(index);
        let key = self.ring.find(index).ok_or(OpenError::MissingKey(index))?;

        let layout = self.rule.layout(wire);
        let (header, tail) = wire.split_at_checked(layout.clear).ok_or(OpenError::TooShort(wire.len()))?;
        let tail = if layout.escaped { emulation::unescape(tail, &mut self.scratch) } else { tail };
        read_sealed(&key, header, tail, out).map_err(|refused| match refused {
            NotOpened::TooShort => OpenError::TooShort(wire.len()),
            NotOpened::Refused(Refused::Unauthentic) => OpenError::Unauthentic(index),
            NotOpened::Refused(Refused::Replayed) => OpenError::Replayed(index),
        })?;
        Ok(Opened::Frame(index))
    }
}

impl fmt::Debug for FrameDecryptor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FrameDecryptor")
            .field("rule", &self.rule)
            .field("ring", &self.ring)
            .finish_non_exhaustive()
    }
}

/// Reads `header` and `tail = sealed payload | tag | IV | trailer` into `out`.
pub(super) fn read_sealed(
    key: &FrameKey,
    header: &[u8],
    tail: &[u8],
    out: &mut Vec<u8>,
) -> Result<(), NotOpened> {
    let plain_len = tail.len().checked_sub(OVERHEAD).ok_or(NotOpened::TooShort)?;
    let (sealed, rest) = tail.split_at(plain_len + TAG_LEN);
    let mut iv = Iv::default();
    iv.copy_from_slice(&rest[..rest.len() - TRAILER_LEN]);
    // Not cleared first: in a buffer that is reused, only what grew beyond the last frame is zeroed.
    out.resize(header.len() + plain_len, 0);
    let (clear, plain) = out.split_at_mut(header.len());
    clear.copy_from_slice(header);
    key.open(iv, header, sealed, plain).map_err(NotOpened::Refused)
}

#[derive(Debug)]
pub(super) enum NotOpened {
    TooShort,
    Refused(Refused),
}

fn injected_payload<'a>(wire: &'a [u8], sif_trailer: Option<&[u8]>) -> Option<&'a [u8]> {
    let trailer = sif_trailer.filter(|trailer| !trailer.is_empty())?;
    wire.strip_suffix(trailer)
}

/// What came out of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Opened {
    /// A frame that its sender sealed under the key at this index; it is in the caller's buffer.
    Frame(KeyIndex),
    /// A frame of no bytes. Nobody vouches for it, and it says nothing.
    Empty,
    /// The SFU replaced the sender's media. Not from the sender and not encrypted: show a muted track, and draw
    /// no conclusion about encryption.
    Injected(SifKind),
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
        "a frame marked as the SFU's own carries foreign media; the SFU or a participant tried to inject it"
    )]
    ForeignInjection,
    /// More than 100 injected frames in 2 s.
    #[error("the SFU injects more than 100 frames in 2 s; the excess is dropped")]
    InjectionFlood,
}
