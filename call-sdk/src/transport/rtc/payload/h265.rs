//! H.265 (RFC 7798) without decoding order numbers, as WebRTC uses it: single units, AP and FU.

use super::nal::{Class, NalFormat};

/// NAL unit types (H.265 table 7-1).
const LAST_TRAILING_SLICE: u8 = 9;
const FIRST_RANDOM_ACCESS_SLICE: u8 = 16;
const LAST_RANDOM_ACCESS_SLICE: u8 = 23;
const VIDEO_PARAMETERS: u8 = 32;
const DELIMITER: u8 = 35;

pub(super) struct H265;

/// A header is `F | type (6 bits) | layer id (6 bits) | temporal id + 1 (3 bits)`.
impl NalFormat for H265 {
    const HEADER: usize = 2;
    const AGGREGATION: u8 = 48;
    const FRAGMENT: u8 = 49;
    const FRAGMENT_KIND: u8 = 0x3f;

    fn kind(first_byte: u8) -> u8 {
        first_byte >> 1 & 0x3f
    }

    fn with_kind(first_byte: u8, kind: u8) -> u8 {
        first_byte & 0x81 | kind << 1
    }

    fn class(kind: u8) -> Option<Class> {
        match kind {
            FIRST_RANDOM_ACCESS_SLICE..=LAST_RANDOM_ACCESS_SLICE => Some(Class::KeySlice),
            0..VIDEO_PARAMETERS => Some(Class::Slice),
            VIDEO_PARAMETERS..48 => Some(Class::Other),
            _ => None,
        }
    }

    /// RFC 7798 §4.4.2: F is set if it is in any unit, layer and temporal id are the lowest of all.
    fn merge(aggregation: &mut [u8], unit: &[u8]) {
        let forbidden = (aggregation[0] | unit[0]) & 0x80;
        let layer = |header: &[u8]| (header[0] & 1, header[1] & 0xf8);
        let (high, low) = layer(aggregation).min(layer(unit));
        let temporal = (aggregation[1] & 7).min(unit[1] & 7);
        aggregation[0] = forbidden | high;
        aggregation[1] = low | temporal;
    }

    /// A slice of a key frame does not count: the parameter sets before it may be missing.
    fn begins_frame(kind: u8, body: &[u8]) -> bool {
        match kind {
            VIDEO_PARAMETERS | DELIMITER => true,
            // `first_slice_segment_in_pic_flag`. In a sealed frame this bit is random; where it is unset, a frame
            // after a loss is dropped that most likely depends on what was lost.
            0..=LAST_TRAILING_SLICE => body.first().is_some_and(|first| first & 0x80 != 0),
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::nal, *};
    use crate::{
        media::Codec,
        transport::rtc::{FrameLayer, Packetiser},
    };

    fn packetise(frame: &[u8]) -> Vec<Vec<u8>> {
        let mut packets = Vec::new();
        let mut out = Packetiser::new(Codec::H265, 0, 0);
        out.packetise(frame, FrameLayer::single(false), &mut packets).unwrap();
        packets.into_iter().map(|packet| packet.payload.to_vec()).collect()
    }

    fn assemble(payloads: &[&[u8]]) -> Option<(Vec<u8>, bool)> {
        let mut frame = Vec::new();
        let facts = nal::assemble::<H265>(payloads.iter().copied(), &mut frame)?;
        Some((frame, facts.key_frame))
    }

    #[test]
    fn parameter_sets_share_a_packet_and_a_long_slice_is_fragmented() {
        let sets = b"\0\0\0\x01\x40\x01\x0c\0\0\0\x01\x42\x01\x01\0\0\0\x01\x44\x01\xc1";
        let frame = [&sets[..], &[0, 0, 0, 1, 0x26, 0x01], &[0xaf; 2000]].concat();
        let payloads = packetise(&frame);
        assert_eq!(payloads[0], b"\x60\x01\0\x03\x40\x01\x0c\0\x03\x42\x01\x01\0\x03\x44\x01\xc1");
        assert_eq!(payloads[1][..4], [0x62, 0x01, 0x93, 0xaf]);
        assert_eq!(payloads[2][..4], [0x62, 0x01, 0x53, 0xaf]);
        let payloads: Vec<_> = payloads.iter().map(Vec::as_slice).collect();
        assert_eq!(assemble(&payloads), Some((frame, true)));
    }

    #[test]
    fn aggregation_header_has_the_lowest_layer_and_temporal_id() {
        let mut header = [0x40, 0x0b]; // layer 1, temporal id + 1 = 3
        H265::merge(&mut header, &[0x42, 0x09]);
        assert_eq!(header, [0x00, 0x09]);
        H265::merge(&mut header, &[0xc1, 0x02]);
        assert_eq!(header, [0x80, 0x09]);
    }

    #[test]
    fn contradictory_packets_are_malformed() {
        for payloads in [
            &[&[0x62, 0x01, 0x13, 1][..]][..],
            &[&[0x62, 0x01, 0x93, 1]],
            &[&[0x60, 0x01, 0, 1, 0x40]],
            &[&[0x64, 0x01, 0, 0]], // PACI
            &[&[0x26]],
        ] {
            assert_eq!(assemble(payloads), None, "{payloads:?}");
        }
    }

    #[test]
    fn first_packets_are_recognised_by_their_content() {
        let begins = |payload: &[u8]| nal::outline::<H265>(payload).map(|outline| outline.begins);
        assert_eq!(begins(&[0x60, 0x01, 0, 3, 0x40, 0x01, 0x0c]), Some(true));
        assert_eq!(begins(&[0x02, 0x01, 0xd0]), Some(true));
        assert_eq!(begins(&[0x02, 0x01, 0x50]), Some(false));
        assert_eq!(begins(&[0x26, 0x01, 0xaf]), Some(false));
        assert_eq!(begins(&[0x62, 0x01, 0x81, 0xd0]), Some(true));
        assert_eq!(begins(&[0x62, 0x01, 0x01, 0xd0]), Some(false));
    }
}
