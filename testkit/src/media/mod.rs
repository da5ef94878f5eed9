//! Synthetic media: frames that look like VP8 and Opus on the outside and carry a checked record inside.
//!
//! A receiver that reads a [`Record`] knows which stream the frame came from, which number it had, and that every
//! byte arrived as it was sent. The frames have what packetisers, SFUs and frame encryption look at (the VP8 frame
//! tag and key frame header of RFC 6386 §9.1, the Opus TOC byte of RFC 6716 §3.1); a decoder finds no picture in
//! them and no sound.

use bytes::{BufMut as _, Bytes, BytesMut};
use sha2::{Digest as _, Sha256};

/// Bytes that a record takes in the smallest frame: magic, stream, number and checksum.
pub const RECORD_BYTES: usize = MAGIC.len() + 4 + 8 + CHECKSUM_BYTES;

const MAGIC: [u8; 4] = *b"ANTI";
const CHECKSUM_BYTES: usize = 8;
const VP8_KEY_HEADER_BYTES: usize = 10;
const VP8_DELTA_HEADER_BYTES: usize = 3;
const VP8_START_CODE: [u8; 3] = [0x9d, 0x01, 0x2a];
/// Configuration 31 (CELT, full band, 20 ms), mono, one frame in the packet.
const OPUS_TOC: u8 = 31 << 3;
const OPUS_LARGEST_FRAME_BYTES: usize = 1275;

/// A source of VP8-like frames.
#[derive(Debug, Clone, Copy)]
pub struct SyntheticVp8 {
    stream: u32,
    width: u16,
    height: u16,
    key_interval: u64,
    bytes: usize,
}

/// A source of Opus-like frames of 20 ms.
#[derive(Debug, Clone, Copy)]
pub struct SyntheticOpus {
    stream: u32,
    bytes: usize,
}

/// What a synthetic frame says about itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record {
    /// Which header the frame has.
    pub kind: FrameKind,
    /// The stream's number, chosen by the sender.
    pub stream: u32,
    /// The frame's number in its stream.
    pub number: u64,
}

/// The header of a synthetic frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum FrameKind {
    /// A VP8 key frame.
    Vp8Key,
    /// A VP8 frame that depends on an earlier one.
    Vp8Delta,
    /// An Opus packet.
    Opus,
}

/// Reads the record of a synthetic frame. None when it is no such frame, or when any byte of it, the header and the
/// filler included, is not what was sent.
pub fn parse(frame: &[u8]) -> Option<Record> {
    let kind = FrameKind::of(frame)?;
    let body = frame.get(kind.header_bytes()..)?.strip_prefix(&MAGIC)?;
    let (stream, body) = body.split_first_chunk()?;
    let (number, _) = body.split_first_chunk()?;
    let (checked, checksum) = frame.split_last_chunk::<CHECKSUM_BYTES>()?;
    let record = Record { kind, stream: u32::from_be_bytes(*stream), number: u64::from_be_bytes(*number) };
    (frame.len() >= kind.header_bytes() + RECORD_BYTES && checksum == &checksum_of(checked)).then_some(record)
}

impl SyntheticVp8 {
    /// Frames of 640×360, a key frame every 60, about `bytes` each (never less than the record needs).
    pub fn new(stream: u32, bytes: usize) -> Self {
        Self { stream, width: 640, height: 360, key_interval: 60, bytes }
    }

    /// Another picture size, in pixels; VP8 has 14 bits for each side.
    #[must_use]
    pub fn size(self, width: u16, height: u16) -> Self {
        Self { width: width & 0x3fff, height: height & 0x3fff, ..self }
    }

    /// A key frame every `interval` frames; at least one.
    #[must_use]
    pub fn key_every(self, interval: u64) -> Self {
        Self { key_interval: interval.max(1), ..self }
    }

    /// Frame `number`; a key frame where the interval says so.
    pub fn frame(&self, number: u64) -> Bytes {
        if number.is_multiple_of(self.key_interval) {
            self.key_frame(number)
        } else {
            self.delta_frame(number)
        }
    }

    /// Frame `number` as a key frame, as after a request for one.
    pub fn key_frame(&self, number: u64) -> Bytes {
        let mut frame = BytesMut::with_capacity(self.bytes);
        frame.put_slice(&self.tag(FrameKind::Vp8Key));
        frame.put_slice(&VP8_START_CODE);
        frame.put_u16_le(self.width);
        frame.put_u16_le(self.height);
        sealed(frame, self.stream, number, self.bytes)
    }

    fn delta_frame(&self, number: u64) -> Bytes {
        let mut frame = BytesMut::with_capacity(self.bytes);
        frame.put_slice(&self.tag(FrameKind::Vp8Delta));
        sealed(frame, self.stream, number, self.bytes)
    }

    /// Bit 0: not a key frame; bits 1-3: version 0; bit 4: shown; 19 bits: size of the first partition.
    fn tag(&self, kind: FrameKind) -> [u8; 3] {
        const LARGEST_PARTITION: usize = (1 << 19) - 1;
        let size =
            self.bytes.saturating_sub(kind.header_bytes()).clamp(RECORD_BYTES, LARGEST_PARTITION) as u32;
        let tag = u32::from(kind == FrameKind::Vp8Delta) | 1 << 4 | size << 5;
        let [a, b, c, _] = tag.to_le_bytes();
        [a, b, c]
    }
}

impl SyntheticOpus {
    /// Frames of about `bytes` each: at least what the record needs, at most the 1275 that Opus allows.
    pub fn new(stream: u32, bytes: usize) -> Self {
        Self { stream, bytes: bytes.min(OPUS_LARGEST_FRAME_BYTES) }
    }

    /// Frame `number`.
    pub fn frame(&self, number: u64) -> Bytes {
        let mut frame = BytesMut::with_capacity(self.bytes);
        frame.put_u8(OPUS_TOC);
        sealed(frame, self.stream, number, self.bytes)
    }
}

impl FrameKind {
    fn of(frame: &[u8]) -> Option<Self> {
        let at = |kind: Self| frame.get(kind.header_bytes()..).is_some_and(|body| body.starts_with(&MAGIC));
        let first = *frame.first()?;
        let is_key = frame.get(3..6) == Some(&VP8_START_CODE);
        match first {
            OPUS_TOC if at(Self::Opus) => Some(Self::Opus),
            _ if first & 1 == 0 && is_key && at(Self::Vp8Key) => Some(Self::Vp8Key),
            _ if first & 1 == 1 && at(Self::Vp8Delta) => Some(Self::Vp8Delta),
            _ => None,
        }
    }

    fn header_bytes(self) -> usize {
        match self {
            Self::Vp8Key => VP8_KEY_HEADER_BYTES,
            Self::Vp8Delta => VP8_DELTA_HEADER_BYTES,
            Self::Opus => 1,
        }
    }
}

fn sealed(mut frame: BytesMut, stream: u32, number: u64, bytes: usize) -> Bytes {
    frame.put_slice(&MAGIC);
    frame.put_u32(stream);
    frame.put_u64(number);
    // Filler that repeats nowhere, so that a frame put together from parts of two is noticed.
    let mut state = (u64::from(stream) << 32) ^ number ^ 0x9e37_79b9_7f4a_7c15;
    while frame.len() + CHECKSUM_BYTES < bytes {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        frame.put_u8(state as u8);
    }
    let checksum = checksum_of(&frame);
    frame.put_slice(&checksum);
    frame.freeze()
}

fn checksum_of(bytes: &[u8]) -> [u8; CHECKSUM_BYTES] {
    let mut checksum = [0; CHECKSUM_BYTES];
    checksum.copy_from_slice(&Sha256::digest(bytes)[..CHECKSUM_BYTES]);
    checksum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_frame_says_what_it_is() {
        let (video, audio) = (SyntheticVp8::new(7, 900).key_every(10), SyntheticOpus::new(8, 120));
        for number in 0..25 {
            let kind = if number % 10 == 0 { FrameKind::Vp8Key } else { FrameKind::Vp8Delta };
            assert_eq!(parse(&video.frame(number)), Some(Record { kind, stream: 7, number }));
            assert_eq!(video.frame(number).len(), 900);
            let opus = Record { kind: FrameKind::Opus, stream: 8, number };
            assert_eq!(parse(&audio.frame(number)), Some(opus));
            assert_eq!(audio.frame(number).len(), 120);
        }
    }

    #[test]
    fn a_changed_byte_or_length_is_noticed() {
        for frame in [
            SyntheticVp8::new(1, 200).frame(0),
            SyntheticVp8::new(1, 200).frame(1),
            SyntheticOpus::new(1, 90).frame(0),
        ] {
            for position in 0..frame.len() {
                let mut changed = frame.to_vec();
                changed[position] ^= 0x10;
                assert_eq!(parse(&changed), None, "byte {position}");
                assert_eq!(parse(&frame[..position]), None, "the first {position} bytes");
            }
            assert_eq!(parse(&[&frame[..], &[0]].concat()), None);
        }
    }

    #[test]
    fn the_smallest_frame_still_carries_its_record() {
        for size in 0..=RECORD_BYTES + VP8_KEY_HEADER_BYTES {
            for number in [0, 1, u64::MAX] {
                assert_eq!(
                    parse(&SyntheticVp8::new(u32::MAX, size).frame(number)).map(|record| record.number),
                    Some(number)
                );
                assert_eq!(
                    parse(&SyntheticOpus::new(0, size).frame(number)).map(|record| record.number),
                    Some(number)
                );
            }
        }
    }

    #[test]
    fn the_vp8_header_is_the_one_of_rfc_6386() {
        let source = SyntheticVp8::new(1, 1000).size(320, 180);
        let key = source.frame(0);
        assert_eq!(key[0] & 0b1_1111, 0b1_0000, "key frame, version 0, shown");
        assert_eq!(u32::from_le_bytes([key[0], key[1], key[2], 0]) >> 5, 990, "the first partition");
        assert_eq!(key[3..10], [0x9d, 0x01, 0x2a, 64, 1, 180, 0]);
        assert_eq!(source.frame(1)[0] & 1, 1, "no key frame");
    }

    #[test]
    fn no_opus_frame_is_longer_than_opus_allows() {
        assert_eq!(SyntheticOpus::new(1, 5000).frame(3).len(), 1275);
    }
}
