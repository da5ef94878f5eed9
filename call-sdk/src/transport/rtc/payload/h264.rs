//! H.264 (RFC 6184), packetisation mode 1: single units, STAP-A and FU-A. The other packet types, which only mode 2
//! uses, are malformed.

use super::nal::{Class, NalFormat};

/// NAL unit types (H.264 table 7-1).
const SLICE: u8 = 1;
const IDR_SLICE: u8 = 5;
const SEQUENCE_PARAMETERS: u8 = 7;
const DELIMITER: u8 = 9;

pub(super) struct H264;

/// A header is `F | NRI (2 bits) | type (5 bits)`.
impl NalFormat for H264 {
    const HEADER: usize = 1;
    const AGGREGATION: u8 = 24;
    const FRAGMENT: u8 = 28;
    const FRAGMENT_KIND: u8 = 0x1f;

    fn kind(first_byte: u8) -> u8 {
        first_byte & 0x1f
    }

    fn with_kind(first_byte: u8, kind: u8) -> u8 {
        first_byte & 0xe0 | kind
    }

    fn class(kind: u8) -> Option<Class> {
        match kind {
            IDR_SLICE => Some(Class::KeySlice),
            SLICE..IDR_SLICE => Some(Class::Slice),
            6..=23 => Some(Class::Other),
            _ => None,
        }
    }

    /// RFC 6184 §5.7.1: F is set if it is in any unit, NRI is the highest of all.
    fn merge(aggregation: &mut [u8], unit: &[u8]) {
        let forbidden = (aggregation[0] | unit[0]) & 0x80;
        aggregation[0] = forbidden | (aggregation[0] & 0x60).max(unit[0] & 0x60);
    }

    /// A slice of a key frame does not count: the parameter sets before it may be missing.
    fn begins_frame(kind: u8, body: &[u8]) -> bool {
        match kind {
            SEQUENCE_PARAMETERS | DELIMITER => true,
            // `first_mb_in_slice` is 0, which is a single set bit; this byte stays in clear.
            SLICE => body.first().is_some_and(|first| first & 0x80 != 0),
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::{super::nal, *};
    use crate::{
        media::Codec,
        transport::rtc::{FrameLayer, Packetiser},
    };

    fn packetise(frame: &[u8]) -> Vec<Bytes> {
        let mut packets = Vec::new();
        let mut out = Packetiser::new(Codec::H264, 0, 0);
        out.packetise(frame, FrameLayer::single(false), &mut packets).unwrap();
        assert!(packets.iter().rev().enumerate().all(|(i, packet)| packet.marker == (i == 0)));
        packets.into_iter().map(|packet| packet.payload).collect()
    }

    fn assemble(payloads: &[&[u8]]) -> Option<(Vec<u8>, bool)> {
        let mut frame = Vec::new();
        let facts = nal::assemble::<H264>(payloads.iter().copied(), &mut frame)?;
        Some((frame, facts.key_frame))
    }

    #[test]
    fn parameter_sets_share_a_packet_and_the_slice_has_its_own() {
        let frame = b"\0\0\0\x01\x67\x42\xc0\x1f\0\0\0\x01\x28\xce\0\0\0\x01\x65\x88\x80";
        let payloads = packetise(frame);
        assert_eq!(payloads, [&b"\x78\0\x04\x67\x42\xc0\x1f\0\x02\x28\xce"[..], b"\x65\x88\x80"]);
        let payloads: Vec<_> = payloads.iter().map(|payload| &payload[..]).collect();
        assert_eq!(assemble(&payloads), Some((frame.to_vec(), true)));
    }

    #[test]
    fn parameter_sets_too_large_to_share_are_sent_one_by_one() {
        let unit = |first: u8| [&[0, 0, 0, 1, first][..], &[7; 600]].concat();
        let frame = [unit(0x67), unit(0x68), unit(0x06), vec![0, 0, 0, 1, 0x41, 0x9a]].concat();
        let firsts: Vec<_> = packetise(&frame).iter().map(|payload| payload[0]).collect();
        assert_eq!(firsts, [0x67, 0x68, 0x06, 0x41]);
    }

    #[test]
    fn long_slice_is_fragmented_with_its_header_in_two_bytes() {
        let frame = [&[0, 0, 0, 1, 0x65, 0x88][..], &[5; 3000]].concat();
        let payloads = packetise(&frame);
        assert_eq!(payloads.len(), 3);
        let headers: Vec<_> = payloads.iter().map(|payload| (payload[0], payload[1])).collect();
        assert_eq!(headers, [(0x7c, 0x85), (0x7c, 0x05), (0x7c, 0x45)]);
        assert!(payloads.iter().all(|payload| payload.len() <= 1150));
        let payloads: Vec<_> = payloads.iter().map(|payload| &payload[..]).collect();
        assert_eq!(assemble(&payloads), Some((frame, true)));
    }

    #[test]
    fn aggregation_packet_of_the_rfc_is_read() {
        // RFC 6184 figure 7: two units in a STAP-A.
        let (frame, key_frame) = assemble(&[&[24, 0, 3, 0x67, 1, 2, 0, 2, 0x41, 3]]).unwrap();
        assert_eq!(frame, [0, 0, 0, 1, 0x67, 1, 2, 0, 0, 0, 1, 0x41, 3]);
        assert!(!key_frame);
    }

    #[test]
    fn contradictory_packets_are_malformed() {
        for payloads in [
            &[&[0x7c, 0x05, 1][..]][..],                    // a fragment without its start
            &[&[0x7c, 0x85, 1]],                            // a fragment without its end
            &[&[0x7c, 0x85, 1], &[0x7c, 0x85, 1]],          // two starts
            &[&[0x7c, 0x85, 1], &[0x7c, 0x41, 1]],          // parts of two units
            &[&[0x7c, 0x85, 1], &[0x41, 1], &[0x7c, 0x45]], // a unit between two parts
            &[&[0x7c, 0x98, 1], &[0x7c, 0x58, 1]],          // a fragmented aggregation packet
            &[&[24, 0, 3, 0x67, 1]],                        // a size beyond the packet
            &[&[24, 0, 0]],                                 // an empty unit
            &[&[24, 0, 2, 24, 1]],                          // nested aggregation
            &[&[24, 0, 1, 0x41, 9]],                        // bytes behind the last unit
            &[&[25, 0, 0, 0, 1, 0x41]],                     // STAP-B
            &[&[]],
        ] {
            assert_eq!(assemble(payloads), None, "{payloads:?}");
        }
    }

    #[test]
    fn first_packets_are_recognised_by_their_content() {
        let begins = |payload: &[u8]| nal::outline::<H264>(payload).map(|outline| outline.begins);
        assert_eq!(begins(&[0x67, 1]), Some(true));
        assert_eq!(begins(&[0x09, 0x10]), Some(true));
        assert_eq!(begins(&[24, 0, 2, 0x67, 1]), Some(true));
        assert_eq!(begins(&[0x41, 0x9a]), Some(true));
        assert_eq!(begins(&[0x5c, 0x81, 0x9a]), Some(true));
        // A later slice, a later fragment, a key slice without parameter sets, a picture parameter set.
        assert_eq!(begins(&[0x41, 0x46]), Some(false));
        assert_eq!(begins(&[0x5c, 0x01, 0x9a]), Some(false));
        assert_eq!(begins(&[0x65, 0x88]), Some(false));
        assert_eq!(begins(&[0x68, 1]), Some(false));
        assert_eq!(begins(&[0x5c]), None);
        assert_eq!(begins(&[]), None);
    }

    #[test]
    fn key_frames_are_told_by_the_first_slice() {
        let key = |frame: &[u8]| nal::is_key_frame::<H264>(frame);
        assert!(key(&[0, 0, 1, 0x67, 1, 0, 0, 1, 0x65, 0x88]));
        assert!(!key(&[0, 0, 1, 0x06, 5, 0, 0, 1, 0x41, 0x9a]));
        assert!(!key(&[0, 0, 1, 0x67, 1]));
        assert!(!key(&[]));
    }
}
