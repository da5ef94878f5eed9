//! The dependency descriptor of frames without layers (AV1 RTP Payload Format 1.0, appendix A).
//!
//! SFUs recognise key frames of VP9 and AV1 by it. Without it, LiveKit looks into the frame, which fails if the frame
//! is sealed, and then forwards nothing.

use bytes::{BufMut as _, Bytes, BytesMut};

pub(super) const URI: &str =
    "https://aomediacodec.github.io/av1-rtp-spec/#dependency-descriptor-rtp-header-extension";

/// What a packet says about its frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Descriptor {
    /// First packet of the frame.
    pub(super) starts: bool,
    /// Last packet of the frame.
    pub(super) ends: bool,
    /// Number of the frame in its stream.
    pub(super) frame: u16,
    /// Whether the frame depends on no other.
    pub(super) key_frame: bool,
    /// Width and height in pixels of the stream, which key frames tell.
    pub(super) dimensions: (u32, u32),
}

/// A key frame refers to the first template, which depends on nothing, every other frame to the second, which depends
/// on the frame before.
const KEY_TEMPLATE: u8 = 0;
const DELTA_TEMPLATE: u8 = 1;

impl Descriptor {
    /// The value of the header extension.
    pub(super) fn encode(self) -> Bytes {
        let template = if self.key_frame { KEY_TEMPLATE } else { DELTA_TEMPLATE };
        let mut out = BytesMut::with_capacity(16);
        out.put_u8(u8::from(self.starts) << 7 | u8::from(self.ends) << 6 | template);
        out.put_u16(self.frame);
        if self.key_frame && self.starts {
            let mut bits = Bits { out: &mut out, pending: 0, count: 0 };
            // template_dependency_structure_present, then no other extended field.
            bits.put(0b1_0000, 5);
            // template_id_offset, and dt_cnt_minus_one: one decode target.
            bits.put(0, 6);
            bits.put(0, 5);
            // Two templates in one layer: next_layer_idc "same", then "none".
            bits.put(0b00_11, 4);
            // Both are "switch" indications for the decode target.
            bits.put(0b10_10, 4);
            // Frame differences: none for the first template; one, of one frame, for the second.
            bits.put(0, 1);
            bits.put(1, 1);
            bits.put(0, 4);
            bits.put(0, 1);
            // One chain, which starts anew with the first template and goes on by one frame with the second.
            bits.put(0b1, 1);
            bits.put(0, 4);
            bits.put(1, 4);
            // Resolution, less one.
            bits.put(1, 1);
            bits.put(self.dimensions.0.saturating_sub(1).min(0xffff), 16);
            bits.put(self.dimensions.1.saturating_sub(1).min(0xffff), 16);
            bits.finish();
        }
        out.freeze()
    }
}

/// Writes fields of less than a byte, highest bit first.
struct Bits<'a> {
    out: &'a mut BytesMut,
    pending: u64,
    count: u32,
}

impl Bits<'_> {
    fn put(&mut self, value: u32, bits: u32) {
        self.pending = self.pending << bits | u64::from(value);
        self.count += bits;
        while self.count >= 8 {
            self.count -= 8;
            self.out.put_u8((self.pending >> self.count & 0xff) as u8);
        }
    }

    fn finish(mut self) {
        if self.count > 0 {
            self.put(0, 8 - self.count);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn descriptor(starts: bool, ends: bool, key_frame: bool) -> Bytes {
        Descriptor { starts, ends, frame: 0x1234, key_frame, dimensions: (640, 360) }.encode()
    }

    #[test]
    fn delta_frame_takes_three_bytes() {
        assert_eq!(*descriptor(true, false, false), [0x81, 0x12, 0x34]);
        assert_eq!(*descriptor(false, true, false), [0x41, 0x12, 0x34]);
    }

    #[test]
    fn first_packet_of_a_key_frame_carries_the_structure() {
        let bytes = descriptor(true, true, true);
        // Written out by hand from the syntax of the appendix.
        let fields = [
            "1",
            "1",
            "000000",
            "0001001000110100",
            "10000",
            "000000",
            "00000",
            "0011",
            "1010",
            "0",
            "100000",
            "1",
            "0000",
            "0001",
            "1",
            "0000001001111111",
            "0000000101100111",
        ];
        let mut bits = fields.concat();
        while bits.len() % 8 != 0 {
            bits.push('0');
        }
        let expected: Vec<_> = bits
            .as_bytes()
            .chunks(8)
            .map(|byte| u8::from_str_radix(str::from_utf8(byte).unwrap(), 2).unwrap())
            .collect();
        assert_eq!(*bytes, expected[..]);
        // The one-byte form of header extensions holds 16 bytes (RFC 8285 §4.2).
        assert!(bytes.len() <= 16);
        assert_eq!(descriptor(false, true, true).len(), 3);
    }
}
