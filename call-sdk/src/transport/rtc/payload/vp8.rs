//! VP8 (RFC 7741).
//!
//! The payload descriptor lies outside the frame and is never encrypted; SFUs rewrite it.

use super::{Facts, Outline, PictureNumbers};
use crate::transport::rtc::packetiser::{FrameLayer, LONGEST_PAYLOAD, PacketWriter, pieces};

/// The longest descriptor that is written.
const DESCRIPTOR: usize = 6;

/// The payload descriptor of RFC 7741 §4.2, as far as it concerns receivers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Descriptor {
    length: usize,
    starts_frame: bool,
    temporal: Option<u8>,
}

impl Descriptor {
    /// `None` if the descriptor is cut short or nothing follows it.
    fn parse(payload: &[u8]) -> Option<Self> {
        let first = *payload.first()?;
        // S bit and partition index 0.
        let starts_frame = first & 0x10 != 0 && first & 0x07 == 0;
        let (mut length, mut temporal) = (1, None);
        if first & 0x80 != 0 {
            let extension = *payload.get(length)?;
            length += 1;
            if extension & 0x80 != 0 {
                length += if payload.get(length)? & 0x80 != 0 { 2 } else { 1 };
            }
            if extension & 0x40 != 0 {
                length += 1;
            }
            if extension & 0x30 != 0 {
                let layer = payload.get(length)?;
                temporal = (extension & 0x20 != 0).then_some(layer >> 6);
                length += 1;
            }
        }
        (length < payload.len()).then_some(Self { length, starts_frame, temporal })
    }
}

pub(super) fn outline(payload: &[u8]) -> Option<Outline> {
    let descriptor = Descriptor::parse(payload)?;
    Some(Outline { begins: descriptor.starts_frame, ends: false })
}

pub(super) fn assemble<'a>(payloads: impl Iterator<Item = &'a [u8]>, frame: &mut Vec<u8>) -> Option<Facts> {
    let start = frame.len();
    let mut temporal = None;
    for payload in payloads {
        let descriptor = Descriptor::parse(payload)?;
        temporal = temporal.or(descriptor.temporal);
        frame.extend_from_slice(&payload[descriptor.length..]);
    }
    Some(Facts { key_frame: is_key_frame(&frame[start..]), temporal, spatial: 0 })
}

/// The picture id is optional in the RFC but not in practice: LiveKit needs it to splice layers and to resume after
/// a mute.
pub(super) fn write(
    frame: &[u8],
    layer: FrameLayer,
    pictures: &mut PictureNumbers,
    packets: &mut PacketWriter<'_>,
) {
    pictures.next_picture(layer.temporal.unwrap_or(0));
    let [high, low] = (0x8000 | pictures.picture).to_be_bytes();
    let mut starts_frame = 0x10;
    for piece in pieces(frame, LONGEST_PAYLOAD - DESCRIPTOR) {
        match layer.temporal {
            // X; I.
            None => packets.put(&[0x80 | starts_frame, 0x80, high, low]),
            // X; I, L, T. Y stays unset: it would allow switching up to this layer here.
            Some(temporal) => {
                packets.put(&[0x80 | starts_frame, 0xe0, high, low, pictures.base_layer, (temporal & 3) << 6])
            }
        }
        packets.put(piece);
        packets.end_packet();
        starts_frame = 0;
    }
    packets.mark_last();
}

/// The lowest bit of a frame is unset in key frames (RFC 6386 §9.1); it stays in clear when a frame is sealed.
pub(super) fn is_key_frame(frame: &[u8]) -> bool {
    frame.first().is_some_and(|first| first & 1 == 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        media::Codec,
        transport::rtc::{OutgoingPacket, Packetiser},
    };

    #[test]
    fn descriptors_of_the_rfc_are_read() {
        let parse = |bytes: &[u8]| Descriptor::parse(bytes).map(|d| (d.length, d.starts_frame, d.temporal));
        // RFC 7741 §4.5: a key frame in one packet, an inter frame without picture id, the packet of a second
        // partition, a second packet of one partition, a long picture id.
        assert_eq!(parse(&[0x90, 0x80, 0x11, 0]), Some((3, true, None)));
        assert_eq!(parse(&[0x10, 0]), Some((1, true, None)));
        assert_eq!(parse(&[0x91, 0x80, 0x11, 0]), Some((3, false, None)));
        assert_eq!(parse(&[0x80, 0x80, 0x11, 0]), Some((3, false, None)));
        assert_eq!(parse(&[0x90, 0x80, 0x92, 0x67, 0]), Some((4, true, None)));
    }

    #[test]
    fn optional_fields_are_read() {
        let parse = |bytes: &[u8]| Descriptor::parse(bytes).map(|d| (d.length, d.temporal));
        assert_eq!(parse(&[0x90, 0xf0, 0x81, 2, 3, 0x85, 0]), Some((6, Some(2))));
        // A key index without a temporal layer.
        assert_eq!(parse(&[0x90, 0x90, 0x01, 0xc5, 0]), Some((4, None)));
    }

    #[test]
    fn descriptor_without_payload_is_malformed() {
        for length in 0..6 {
            assert_eq!(Descriptor::parse(&[0x90, 0xf0, 0x81, 2, 3, 0x85][..length]), None);
        }
        assert_eq!(Descriptor::parse(&[0x10]), None);
    }

    fn packets(out: &mut Packetiser, temporal: Option<u8>) -> Vec<OutgoingPacket> {
        let mut packets = Vec::new();
        let layer = FrameLayer { temporal, ..FrameLayer::single(false) };
        out.packetise(&[1; 2000], layer, &mut packets).unwrap();
        packets
    }

    #[test]
    fn picture_id_is_shared_by_a_frame_and_wraps_after_15_bits() {
        let mut out = Packetiser::new(Codec::Vp8, 0, 0x7fff);
        let first = packets(&mut out, None);
        assert_eq!(first[0].payload[..4], [0x90, 0x80, 0xff, 0xff]);
        assert_eq!(first[1].payload[..4], [0x80, 0x80, 0xff, 0xff]);
        assert_eq!((first[0].marker, first[1].marker), (false, true));
        assert_eq!(packets(&mut out, None)[0].payload[..4], [0x90, 0x80, 0x80, 0x00]);
    }

    #[test]
    fn base_layer_index_advances_with_temporal_layer_0() {
        let mut out = Packetiser::new(Codec::Vp8, 0, 5);
        let descriptors = [0, 2, 1, 0].map(|t| packets(&mut out, Some(t))[0].payload[..6].to_vec());
        assert_eq!(
            descriptors,
            [
                [0x90, 0xe0, 0x80, 5, 1, 0],
                [0x90, 0xe0, 0x80, 6, 1, 0x80],
                [0x90, 0xe0, 0x80, 7, 1, 0x40],
                [0x90, 0xe0, 0x80, 8, 2, 0],
            ]
        );
    }
}
