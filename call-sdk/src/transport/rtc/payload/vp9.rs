//! VP9 (RFC 9628).
//!
//! A frame is one spatial layer of a picture: encoders write layers one by one, and each is sealed on its own. The
//! payload descriptor is the only clear text, so key frames are recognised by it.

use super::{Facts, Outline, PictureNumbers};
use crate::transport::rtc::packetiser::{FrameLayer, LONGEST_PAYLOAD, PacketWriter, pieces};

/// The longest descriptor that is written.
const DESCRIPTOR: usize = 6;

/// Bits of the first byte (RFC 9628 §4.2).
const PICTURE_ID: u8 = 0x80;
const INTER_PICTURE: u8 = 0x40;
const LAYER_INDICES: u8 = 0x20;
const FLEXIBLE: u8 = 0x10;
const START: u8 = 0x08;
const END: u8 = 0x04;
const SCALABILITY: u8 = 0x02;

/// The payload descriptor, as far as it concerns receivers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Descriptor {
    length: usize,
    flags: u8,
    layer: Option<Layer>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Layer {
    temporal: u8,
    spatial: u8,
    /// The frame depends on the spatial layer below.
    dependent: bool,
}

impl Descriptor {
    /// `None` if the descriptor is cut short or nothing follows it.
    fn parse(payload: &[u8]) -> Option<Self> {
        let (&flags, mut rest) = payload.split_first()?;
        if flags & PICTURE_ID != 0 {
            let long = take(&mut rest)? & 0x80 != 0;
            if long {
                take(&mut rest)?;
            }
        }
        let mut layer = None;
        if flags & LAYER_INDICES != 0 {
            let indices = take(&mut rest)?;
            layer = Some(Layer {
                temporal: indices >> 5,
                spatial: indices >> 1 & 7,
                dependent: indices & 1 != 0,
            });
            if flags & FLEXIBLE == 0 {
                // TL0PICIDX.
                take(&mut rest)?;
            }
        }
        if flags & FLEXIBLE != 0 && flags & INTER_PICTURE != 0 {
            // At most three references; N says that another follows.
            let mut references = 1;
            while take(&mut rest)? & 1 != 0 {
                references += 1;
                if references > 3 {
                    return None;
                }
            }
        }
        if flags & SCALABILITY != 0 {
            skip_scalability_structure(&mut rest)?;
        }
        (!rest.is_empty()).then_some(Self { length: payload.len() - rest.len(), flags, layer })
    }

    fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }
}

/// RFC 9628 §4.2.1.
fn skip_scalability_structure(rest: &mut &[u8]) -> Option<()> {
    let first = take(rest)?;
    if first & 0x10 != 0 {
        // Width and height of each spatial layer.
        let layers = usize::from(first >> 5) + 1;
        *rest = rest.get(layers * 4..)?;
    }
    if first & 0x08 != 0 {
        for _ in 0..take(rest)? {
            let references = usize::from(take(rest)? >> 2 & 3);
            *rest = rest.get(references..)?;
        }
    }
    Some(())
}

fn take(rest: &mut &[u8]) -> Option<u8> {
    let (&first, tail) = rest.split_first()?;
    *rest = tail;
    Some(first)
}

pub(super) fn outline(payload: &[u8]) -> Option<Outline> {
    let descriptor = Descriptor::parse(payload)?;
    Some(Outline { begins: descriptor.has(START), ends: descriptor.has(END) })
}

pub(super) fn assemble<'a>(payloads: impl Iterator<Item = &'a [u8]>, frame: &mut Vec<u8>) -> Option<Facts> {
    let mut first = None;
    for payload in payloads {
        let descriptor = Descriptor::parse(payload)?;
        first.get_or_insert(descriptor);
        frame.extend_from_slice(&payload[descriptor.length..]);
    }
    let first = first?;
    Some(Facts {
        // A higher layer of a key picture depends on the layer below.
        key_frame: !first.has(INTER_PICTURE) && !first.layer.is_some_and(|layer| layer.dependent),
        temporal: first.layer.map(|layer| layer.temporal),
        spatial: first.layer.map_or(0, |layer| layer.spatial),
    })
}

/// Writes non-flexible mode: Safari and older Chromium drop inter frames of the flexible mode. Receivers then demand
/// layer indices with TL0PICIDX, and a scalability structure in every key frame, even for a single layer.
pub(super) fn write(
    frame: &[u8],
    layer: FrameLayer,
    pictures: &mut PictureNumbers,
    packets: &mut PacketWriter<'_>,
) {
    if layer.spatial == 0 {
        pictures.next_picture(0);
    }
    let [high, low] = (0x8000 | pictures.picture).to_be_bytes();
    let spatial = layer.spatial & 7;
    // TID 0, U unset, SID, D.
    let indices = spatial << 1 | u8::from(spatial > 0);
    let inter_picture = if layer.key_frame { 0 } else { INTER_PICTURE };
    let pieces = pieces(frame, LONGEST_PAYLOAD - DESCRIPTOR);
    let count = pieces.len();
    for (index, piece) in pieces.enumerate() {
        let describes_layers = index == 0 && layer.key_frame && spatial == 0;
        let mut flags = PICTURE_ID | LAYER_INDICES | inter_picture;
        if index == 0 {
            flags |= START;
        }
        if index + 1 == count {
            flags |= END;
        }
        if describes_layers {
            flags |= SCALABILITY;
        }
        packets.put(&[flags, high, low, indices, pictures.base_layer]);
        if describes_layers {
            // N_S; neither sizes nor a picture group, which means one temporal layer.
            packets.put(&[layer.spatial_layers.saturating_sub(1) << 5]);
        }
        packets.put(piece);
        packets.end_packet();
    }
    // The marker ends a picture, not a layer.
    if layer.spatial.saturating_add(1) >= layer.spatial_layers {
        packets.mark_last();
    }
}

/// Reads the uncompressed header of a plain frame (VP9 bitstream §6.2, §7.2): frame marker 2, profile, not a repeat
/// of an earlier frame, frame type 0.
pub(super) fn is_key_frame(frame: &[u8]) -> bool {
    let Some(first) = frame.first() else { return false };
    // Profile 3 has a reserved bit between the profile and `show_existing_frame`.
    let header = if first & 0x30 == 0x30 { first << 1 } else { *first };
    first & 0xc0 == 0x80 && header & 0x0c == 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        media::Codec,
        transport::rtc::{OutgoingPacket, Packetiser},
    };

    fn parse(bytes: &[u8]) -> Option<(usize, Option<Layer>)> {
        Descriptor::parse(bytes).map(|descriptor| (descriptor.length, descriptor.layer))
    }

    fn layer(temporal: u8, spatial: u8, dependent: bool) -> Option<Layer> {
        Some(Layer { temporal, spatial, dependent })
    }

    #[test]
    fn non_flexible_descriptors_are_read() {
        assert_eq!(parse(&[0x00, 0xaa]), Some((1, None)));
        assert_eq!(parse(&[0x80, 0x02, 0xaa]), Some((2, None)));
        assert_eq!(parse(&[0x80, 0x81, 0xff, 0xaa]), Some((3, None)));
        // TID 1, U unset, SID 1, D; TL0PICIDX.
        assert_eq!(parse(&[0xa0, 0x02, 0x23, 0x01, 0xaa]), Some((4, layer(1, 1, true))));
    }

    #[test]
    fn flexible_descriptors_are_read() {
        // Layer indices without TL0PICIDX.
        assert_eq!(parse(&[0xb0, 0x02, 0x24, 0xaa]), Some((3, layer(1, 2, false))));
        // One and three references.
        assert_eq!(parse(&[0xd0, 0x02, 0x08, 0xaa]), Some((3, None)));
        assert_eq!(parse(&[0xd0, 0x02, 0x05, 0x07, 0x08, 0xaa]), Some((5, None)));
        assert_eq!(parse(&[0xd0, 0x02, 0x05, 0x07, 0x09, 0x08, 0xaa]), None, "four references");
        // References are only there if the frame is predicted from other pictures.
        assert_eq!(parse(&[0x90, 0x02, 0xaa]), Some((2, None)));
    }

    #[test]
    fn scalability_structures_are_skipped() {
        // Two layers with sizes: 640x360 and 1280x720.
        let sizes = [0x0a, 0x30, 0x02, 0x80, 0x01, 0x68, 0x05, 0x00, 0x02, 0xd0, 0xaa];
        assert_eq!(parse(&sizes), Some((10, None)));
        // A picture group of three: no, one and two references.
        let group = [0x0a, 0x08, 3, 0x00, 0x24, 0x04, 0x48, 0x02, 0x03, 0xaa];
        assert_eq!(parse(&group), Some((9, None)));
        // The smallest, as Chromium writes it for a single layer.
        assert_eq!(parse(&[0xae, 0x80, 0x01, 0x00, 0x01, 0x00, 0xaa]), Some((6, layer(0, 0, false))));
    }

    #[test]
    fn truncated_descriptor_is_malformed() {
        let whole = [0xfa, 0x80, 0x01, 0x24, 0x09, 0x08, 0x38, 0, 1, 0, 1, 0, 1, 0, 1, 1, 0x04, 0x01, 0xaa];
        assert_eq!(parse(&whole), Some((18, layer(1, 2, false))));
        for length in 0..whole.len() {
            assert_eq!(parse(&whole[..length]), None, "{length}");
        }
    }

    fn packets(out: &mut Packetiser, size: usize, layer: FrameLayer) -> Vec<OutgoingPacket> {
        let mut packets = Vec::new();
        out.packetise(&vec![9; size], layer, &mut packets).unwrap();
        packets
    }

    #[test]
    fn key_frame_carries_the_scalability_structure_once() {
        let mut out = Packetiser::new(Codec::Vp9, 0, 0x0102);
        let key = packets(&mut out, 2000, FrameLayer::single(true));
        assert_eq!(key[0].payload[..7], [0xaa, 0x81, 0x02, 0x00, 1, 0x00, 9]);
        assert_eq!(key[1].payload[..6], [0xa4, 0x81, 0x02, 0x00, 1, 9]);
        assert_eq!((key[0].marker, key[1].marker), (false, true));
        let delta = packets(&mut out, 20, FrameLayer::single(false));
        assert_eq!(delta[0].payload[..6], [0xec, 0x81, 0x03, 0x00, 2, 9]);
    }

    #[test]
    fn spatial_layers_share_a_picture_and_one_marker() {
        let mut out = Packetiser::new(Codec::Vp9, 0, 7);
        let of = |spatial| FrameLayer { spatial, spatial_layers: 2, ..FrameLayer::single(true) };
        let (low, high) = (packets(&mut out, 20, of(0)), packets(&mut out, 20, of(1)));
        assert_eq!(low[0].payload[..7], [0xae, 0x80, 7, 0x00, 1, 0x20, 9]);
        assert_eq!(high[0].payload[..6], [0xac, 0x80, 7, 0x03, 1, 9]);
        assert_eq!((low[0].marker, high[0].marker), (false, true));
    }

    #[test]
    fn plain_key_frames_are_told_by_their_header() {
        // Profile 0: key, inter, repeat of an earlier frame. Profile 3: key, inter.
        for (first, key) in [(0x82, true), (0x86, false), (0x88, false), (0xb1, true), (0xb2, false)] {
            assert_eq!(is_key_frame(&[first]), key, "{first:#x}");
        }
        assert!(!is_key_frame(&[]) && !is_key_frame(&[0x42]));
    }
}
