//! Server-injected frames (SIF): silence or a blank picture that the SFU sends when a track is muted or ends,
//! marked with a trailer that it announced on joining. This is the only plaintext in an encrypted call, so it never
//! reaches the application: it becomes an event.

use std::time::{Duration, Instant};

/// The trailer of injected frames, as the SFU announced it (`JoinResponse.sif_trailer`).
///
/// Opaque bytes, and no secret: every participant knows them. LiveKit draws 32 characters per room.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SifTrailer(Vec<u8>);

impl SifTrailer {
    /// Longest trailer that is accepted, in bytes.
    pub const MAX_LEN: usize = 255;

    /// Takes the announced bytes. `None` if there are none, which means that the SFU injects no frames, or more
    /// than [`SifTrailer::MAX_LEN`].
    #[must_use]
    pub fn new(announced: &[u8]) -> Option<Self> {
        (1..=Self::MAX_LEN).contains(&announced.len()).then(|| Self(announced.to_vec()))
    }

    /// The payload of a frame with this trailer.
    pub(super) fn strip<'a>(&self, wire: &'a [u8]) -> Option<&'a [u8]> {
        wire.strip_suffix(&*self.0)
    }
}

/// Content of a server-injected frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum SifKind {
    /// 20 ms of Opus silence, bare or as the primary block of RED.
    OpusSilence,
    /// 20 ms of PCMU or PCMA silence.
    PcmSilence,
    /// The blank VP8 key frame of 8 by 8 pixels.
    Vp8Blank,
    /// The blank H.264 picture, with or without its parameter sets.
    H264Blank,
}

impl SifKind {
    /// Recognises a payload without its trailer. Anything else with a trailer is an attempt to pass plaintext in:
    /// every participant knows the trailer.
    pub(super) fn of(payload: &[u8]) -> Option<Self> {
        match payload {
            _ if is_opus_silence(payload) => Some(Self::OpusSilence),
            // One header byte with F = 0 (RFC 2198 §3): the primary block is the only one.
            [header, block @ ..] if header & 0x80 == 0 && is_opus_silence(block) => Some(Self::OpusSilence),
            _ if is_run(payload, 0xff, 160) || is_run(payload, 0xd5, 160) => Some(Self::PcmSilence),
            _ if payload == VP8_BLANK => Some(Self::Vp8Blank),
            _ if is_h264_blank(payload) => Some(Self::H264Blank),
            _ => None,
        }
    }
}

const VP8_BLANK: [u8; 31] = [
    0x10, 0x02, 0x00, 0x9d, 0x01, 0x2a, 0x08, 0x00, 0x08, 0x00, 0x00, 0x47, 0x08, 0x85, 0x85, 0x88, 0x85,
    0x84, 0x88, 0x02, 0x02, 0x00, 0x0c, 0x0d, 0x60, 0x00, 0xfe, 0xff, 0xab, 0x50, 0x80,
];

/// Sequence parameter set, picture parameter set, picture.
const H264_BLANK: [&[u8]; 3] = [
    &[
        0x67, 0x42, 0xc0, 0x1f, 0x0f, 0xd9, 0x1f, 0x88, 0x88, 0x84, 0x00, 0x00, 0x03, 0x00, 0x04, 0x00, 0x00,
        0x03, 0x00, 0xc8, 0x3c, 0x60, 0xc9, 0x20,
    ],
    &[0x68, 0x87, 0xcb, 0x83, 0xcb, 0x20],
    &[0x65, 0x88, 0x84, 0x0a, 0xf2, 0x62, 0x80, 0x00, 0xa7, 0xbe],
];

fn is_opus_silence(payload: &[u8]) -> bool {
    payload.strip_prefix(&[0xf8, 0xff, 0xfe]).is_some_and(|rest| is_run(rest, 0, 77))
}

fn is_run(payload: &[u8], byte: u8, length: usize) -> bool {
    payload.len() == length && payload.iter().all(|b| *b == byte)
}

fn is_h264_blank(payload: &[u8]) -> bool {
    let mut rest = payload;
    while !rest.is_empty() {
        let Some(unit) = rest.strip_prefix(&[0]).unwrap_or(rest).strip_prefix(&[0, 0, 1]) else {
            return false;
        };
        let Some(left) = H264_BLANK.iter().find_map(|nalu| unit.strip_prefix(*nalu)) else { return false };
        rest = left;
    }
    !payload.is_empty()
}

/// Limits injected frames to 100 in 2 s: an SFU has no reason to send more, and each is an event.
#[derive(Default)]
pub(super) struct SifLimiter {
    window: Option<(Instant, u32)>,
}

const WINDOW: Duration = Duration::from_secs(2);
const PER_WINDOW: u32 = 100;

impl SifLimiter {
    pub(super) fn admit(&mut self, now: Instant) -> bool {
        match &mut self.window {
            Some((start, count)) if now.duration_since(*start) < WINDOW => {
                *count = count.saturating_add(1);
                *count <= PER_WINDOW
            }
            window => {
                *window = Some((now, 1));
                true
            }
        }
    }
}
