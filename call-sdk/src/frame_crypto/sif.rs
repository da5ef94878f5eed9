//! Frames that the SFU makes itself: silence or a blank picture when a track is muted or ends, marked with a
//! trailer it announced on joining. The one kind of plaintext an encrypted call carries, so it never reaches
//! the application: it is an event.

use std::time::{Duration, Instant};

/// What a server-injected frame shows or sounds.
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
    /// Recognises a payload, its trailer taken off. Anything else with a trailer is an attempt to get plaintext
    /// in: every participant knows the trailer.
    pub(super) fn of(payload: &[u8]) -> Option<Self> {
        match payload {
            _ if is_opus_silence(payload) => Some(Self::OpusSilence),
            // One header byte with F = 0 (RFC 2198 §3): the primary block is all there is.
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

/// Lets 100 injected frames pass in 2 s: an SFU has no reason to send more, and each is an event.
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
