//! AV1 (RTP Payload Format For AV1 1.0), for calls without encryption.
//!
//! A frame here is a temporal unit in low-overhead form: open bitstream units (OBUs), each with its size. On the wire
//! sizes are those of *elements*: a unit, or the part of it that a packet holds.

use super::{Facts, Outline};
use crate::transport::rtc::packetiser::{PacketWriter, PacketiseError};

/// Bits of the aggregation header (§4.4): the first element continues a unit, the last one is continued, and a coded
/// video sequence begins.
const CONTINUES: u8 = 0x80;
const CONTINUED: u8 = 0x40;
const NEW_SEQUENCE: u8 = 0x08;

/// Bits of a unit's header (AV1 §5.3.2).
const EXTENSION: u8 = 0x04;
const HAS_SIZE: u8 = 0x02;

/// Unit types (AV1 §6.2.2).
const SEQUENCE_HEADER: u8 = 1;
const TEMPORAL_DELIMITER: u8 = 2;
const FRAME_HEADER: u8 = 3;
const FRAME: u8 = 6;
const TILE_LIST: u8 = 8;
const PADDING: u8 = 15;

/// The least that is worth putting into the rest of a packet when a unit does not fit.
const SMALLEST_PART: usize = 64;

fn kind(header: u8) -> u8 {
    header >> 3 & 0x0f
}

/// Temporal and spatial layer of an extension byte.
fn layer(extension: u8) -> (u8, u8) {
    (extension >> 5, extension >> 3 & 3)
}

/// One unit of a frame.
#[derive(Clone, Copy, Debug)]
struct Obu<'a> {
    header: u8,
    extension: Option<u8>,
    body: &'a [u8],
}

impl Obu<'_> {
    /// The bytes that stand for this unit on the wire: header without the size flag, extension, body.
    fn parts(&self) -> ([u8; 2], usize) {
        ([self.header & !HAS_SIZE, self.extension.unwrap_or(0)], 1 + usize::from(self.extension.is_some()))
    }
}

/// Takes the first unit of `rest`; `None` if it is cut short.
fn take_obu<'a>(rest: &mut &'a [u8]) -> Option<Obu<'a>> {
    let (&header, mut tail) = rest.split_first()?;
    let mut extension = None;
    if header & EXTENSION != 0 {
        let (&byte, behind) = tail.split_first()?;
        (extension, tail) = (Some(byte), behind);
    }
    let size = if header & HAS_SIZE != 0 { take_leb128(&mut tail)? } else { tail.len() };
    let (body, tail) = tail.split_at_checked(size)?;
    *rest = tail;
    Some(Obu { header, extension, body })
}

/// AV1 §4.10.5; `None` if it is cut short or no size of anything here.
fn take_leb128(rest: &mut &[u8]) -> Option<usize> {
    let mut value = 0_u64;
    for index in 0..8 {
        let (&byte, tail) = rest.split_first()?;
        *rest = tail;
        value |= u64::from(byte & 0x7f) << (7 * index);
        if byte & 0x80 == 0 {
            return usize::try_from(value).ok();
        }
    }
    None
}

/// The shortest form of `value`, and its length.
fn leb128(mut value: usize) -> ([u8; 8], usize) {
    let (mut bytes, mut length) = ([0; 8], 0);
    loop {
        bytes[length] = (value & 0x7f) as u8 | if value > 0x7f { 0x80 } else { 0 };
        value >>= 7;
        length += 1;
        if value == 0 || length == bytes.len() {
            return (bytes, length);
        }
    }
}

/// Every element is preceded by its length (W = 0).
pub(super) fn write(frame: &[u8], packets: &mut PacketWriter<'_>) -> Result<(), PacketiseError> {
    let mut rest = frame;
    let mut packet_layer = None;
    while !rest.is_empty() {
        let obu =
            take_obu(&mut rest).ok_or(PacketiseError::Malformed("an open bitstream unit is cut short"))?;
        if matches!(kind(obu.header), TEMPORAL_DELIMITER | TILE_LIST | PADDING) {
            continue;
        }
        // A packet holds units of one layer (§5), so that SFUs can drop it as a whole.
        if obu.extension.is_some() && packet_layer.is_some_and(|layer| Some(layer) != obu.extension) {
            end_packet(packets, 0);
        }
        write_obu(obu, packets);
        packet_layer = if packets.at_packet_start() { None } else { obu.extension.or(packet_layer) };
    }
    end_packet(packets, 0);
    if packets.at_frame_start() {
        return Err(PacketiseError::Malformed("it has no open bitstream unit to send"));
    }
    packets.mark_last();
    Ok(())
}

fn write_obu(obu: Obu<'_>, packets: &mut PacketWriter<'_>) {
    let (header, header_length) = obu.parts();
    let length = header_length + obu.body.len();
    let mut from = 0;
    while from < length {
        if packets.at_packet_start() {
            let mut aggregation = if from > 0 { CONTINUES } else { 0 };
            if from == 0 && packets.at_frame_start() && kind(obu.header) == SEQUENCE_HEADER {
                aggregation |= NEW_SEQUENCE;
            }
            packets.put(&[aggregation]);
        }
        let left = length - from;
        // Two bytes for the length, which suffice for any packet.
        let room = packets.room().saturating_sub(2);
        if left > room && room < SMALLEST_PART {
            end_packet(packets, 0);
            continue;
        }
        let to = from + left.min(room);
        let (size, size_length) = leb128(to - from);
        packets.put(&size[..size_length]);
        if from < header_length {
            packets.put(&header[from..header_length.min(to)]);
        }
        packets.put(&obu.body[from.saturating_sub(header_length)..to - header_length]);
        if to < length {
            end_packet(packets, CONTINUED);
        }
        from = to;
    }
}

fn end_packet(packets: &mut PacketWriter<'_>, flags: u8) {
    if !packets.at_packet_start() {
        packets.set_in_first_byte(flags);
        packets.end_packet();
    }
}

/// The elements of a payload.
struct Elements<'a> {
    rest: &'a [u8],
    /// How many are left, if the aggregation header says so; the last of them then has no length.
    left: Option<u8>,
}

impl<'a> Elements<'a> {
    fn of(aggregation: u8, rest: &'a [u8]) -> Self {
        let count = aggregation >> 4 & 3;
        Self { rest, left: (count > 0).then_some(count) }
    }

    fn is_done(&self) -> bool {
        self.left.map_or(self.rest.is_empty(), |left| left == 0)
    }

    /// The next element, unless it [`is_done`](Self::is_done); `None` if the payload is malformed.
    fn take(&mut self) -> Option<&'a [u8]> {
        self.left = self.left.map(|left| left.saturating_sub(1));
        if self.left == Some(0) {
            return Some(std::mem::take(&mut self.rest));
        }
        let size = take_leb128(&mut self.rest)?;
        let (element, rest) = self.rest.split_at_checked(size)?;
        self.rest = rest;
        Some(element)
    }
}

pub(super) fn outline(payload: &[u8]) -> Option<Outline> {
    let (&aggregation, rest) = payload.split_first()?;
    let element = Elements::of(aggregation, rest).take()?;
    let begins =
        aggregation & CONTINUES == 0 && element.first().is_some_and(|header| begins_frame(*header, element));
    Some(Outline { begins: begins || aggregation & NEW_SEQUENCE != 0, ends: false })
}

/// Sequence headers and frames come first, except for metadata. A tile group never does, nor does a frame of a higher
/// spatial layer.
fn begins_frame(header: u8, unit: &[u8]) -> bool {
    let extension = if header & EXTENSION != 0 { unit.get(1) } else { None };
    let spatial = extension.map_or(0, |extension| layer(*extension).1);
    matches!(kind(header), SEQUENCE_HEADER | FRAME_HEADER | FRAME) && spatial == 0
}

pub(super) fn assemble<'a>(payloads: impl Iterator<Item = &'a [u8]>, frame: &mut Vec<u8>) -> Option<Facts> {
    let mut facts = Facts { key_frame: false, temporal: None, spatial: 0 };
    // Where the unit begins that the next packet continues.
    let mut open = None;
    for payload in payloads {
        let (&aggregation, rest) = payload.split_first()?;
        if open.is_some() != (aggregation & CONTINUES != 0) {
            return None;
        }
        facts.key_frame |= aggregation & NEW_SEQUENCE != 0;
        let mut elements = Elements::of(aggregation, rest);
        while !elements.is_done() {
            let element = elements.take()?;
            let start = *open.get_or_insert(frame.len());
            frame.extend_from_slice(element);
            if !elements.is_done() || aggregation & CONTINUED == 0 {
                finish_obu(start, frame, &mut facts)?;
                open = None;
            }
        }
    }
    open.is_none().then_some(facts)
}

/// Gives the unit from `start` on its size, or removes it if receivers must ignore it (§5).
fn finish_obu(start: usize, frame: &mut Vec<u8>, facts: &mut Facts) -> Option<()> {
    let mut rest = &frame[start..];
    let Some(header) = rest.first().copied() else { return Some(()) };
    let obu = take_obu(&mut rest)?;
    if matches!(kind(header), TEMPORAL_DELIMITER | TILE_LIST) {
        frame.truncate(start);
        return Some(());
    }
    if let Some(extension) = obu.extension {
        let (temporal, _) = layer(extension);
        facts.temporal.get_or_insert(temporal);
    }
    if header & HAS_SIZE != 0 {
        return rest.is_empty().then_some(());
    }
    let (size, size_length) = leb128(obu.body.len());
    let body = start + obu.parts().1;
    let end = frame.len();
    frame.resize(end + size_length, 0);
    frame.copy_within(body..end, body + size_length);
    frame[body..body + size_length].copy_from_slice(&size[..size_length]);
    frame[start] |= HAS_SIZE;
    Some(())
}

/// A new coded video sequence begins with a sequence header.
pub(super) fn is_key_frame(frame: &[u8]) -> bool {
    let mut rest = frame;
    std::iter::from_fn(|| take_obu(&mut rest))
        .map(|obu| kind(obu.header))
        .find(|kind| *kind != TEMPORAL_DELIMITER)
        == Some(SEQUENCE_HEADER)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        media::Codec,
        transport::rtc::{FrameLayer, Packetiser},
    };

    /// A unit with its size, as it is in a frame.
    fn obu(header: &[u8], body: &[u8]) -> Vec<u8> {
        let (size, length) = leb128(body.len());
        let mut obu = header.to_vec();
        obu[0] |= HAS_SIZE;
        [&obu[..], &size[..length], body].concat()
    }

    fn packetise(frame: &[u8]) -> Vec<Vec<u8>> {
        let mut packets = Vec::new();
        let mut out = Packetiser::new(Codec::Av1, 0, 0);
        out.packetise(frame, FrameLayer::single(false), &mut packets).unwrap();
        assert!(packets.iter().rev().enumerate().all(|(i, packet)| packet.marker == (i == 0)));
        packets.into_iter().map(|packet| packet.payload.to_vec()).collect()
    }

    fn assemble(payloads: &[impl AsRef<[u8]>]) -> Option<(Vec<u8>, Facts)> {
        let mut frame = Vec::new();
        let facts = super::assemble(payloads.iter().map(AsRef::as_ref), &mut frame)?;
        Some((frame, facts))
    }

    const DELIMITER: [u8; 2] = [0x12, 0];

    #[test]
    fn sizes_of_units_become_lengths_of_elements() {
        let units = [obu(&[0x08], &[1, 2, 3]), obu(&[0x30], &[4; 200])].concat();
        let payloads = packetise(&[&DELIMITER[..], &units].concat());
        assert_eq!(payloads.len(), 1);
        assert_eq!(payloads[0][..9], [NEW_SEQUENCE, 4, 0x08, 1, 2, 3, 0xc9, 0x01, 0x30]);
        let (frame, facts) = assemble(&payloads).unwrap();
        assert_eq!(frame, units, "without the delimiter");
        assert!(facts.key_frame);
    }

    #[test]
    fn long_unit_is_continued_in_further_packets() {
        let units = [obu(&[0x08], &[1; 1100]), obu(&[0x30], &[4; 3000])].concat();
        let payloads = packetise(&units);
        let flags: Vec<_> = payloads.iter().map(|payload| payload[0]).collect();
        assert_eq!(flags, [NEW_SEQUENCE, CONTINUED, CONTINUES | CONTINUED, CONTINUES]);
        assert!(payloads.iter().all(|payload| payload.len() <= 1150));
        assert_eq!(assemble(&payloads).unwrap().0, units);
    }

    #[test]
    fn packet_holds_units_of_one_layer() {
        // The example of §5.1: SH MD MD(0,0) FH(0,0) TG(0,0) MD(0,1) FH(0,1) TG(0,1).
        let low = [
            obu(&[0x08], &[1]),
            obu(&[0x28], &[2]),
            obu(&[0x2c, 0x00], &[3]),
            obu(&[0x1c, 0x00], &[4]),
            obu(&[0x24, 0x00], &[5]),
        ];
        let high = [obu(&[0x2c, 0x08], &[6]), obu(&[0x1c, 0x08], &[7]), obu(&[0x24, 0x08], &[8])];
        let units = [low.concat(), high.concat()].concat();
        let payloads = packetise(&[&DELIMITER[..], &units].concat());
        assert_eq!(payloads.len(), 2);
        assert_eq!(payloads[1], [0, 3, 0x2c, 0x08, 6, 3, 0x1c, 0x08, 7, 3, 0x24, 0x08, 8]);
        assert_eq!(assemble(&payloads).unwrap().0, units);
    }

    #[test]
    fn last_element_has_no_length_where_elements_are_counted() {
        // As Chromium writes a key frame: W = 2, N; then a fragment with W = 1, Z.
        let payloads = [&[0x68, 4, 0x08, 1, 2, 3, 0x30, 4, 5][..], &[0x90, 6]];
        let (frame, facts) = assemble(&payloads).unwrap();
        assert_eq!(frame, [obu(&[0x08], &[1, 2, 3]), obu(&[0x30], &[4, 5, 6])].concat());
        assert!(facts.key_frame);
    }

    #[test]
    fn units_that_receivers_must_ignore_are_removed() {
        let payloads = [[0x00, 1, 0x10, 2, 0x40, 9, 2, 0x30, 7]];
        assert_eq!(assemble(&payloads).unwrap().0, obu(&[0x30], &[7]));
    }

    #[test]
    fn unit_with_its_own_size_is_kept_if_the_size_is_right() {
        assert_eq!(assemble(&[[0x10, 0x32, 1, 7]]).unwrap().0, [0x32, 1, 7]);
        assert_eq!(assemble(&[[0x10, 0x32, 1, 7, 8]]), None);
        assert_eq!(assemble(&[[0x10, 0x32, 3, 7]]), None);
    }

    #[test]
    fn temporal_layer_is_that_of_the_extension() {
        assert_eq!(assemble(&[[0x10, 0x34, 0x40, 7]]).unwrap().1.temporal, Some(2));
    }

    #[test]
    fn contradictory_packets_are_malformed() {
        for payloads in [
            &[&[0x90, 1][..]][..],                 // a continuation of nothing
            &[&[0x50, 0x30, 1]],                   // continued by nothing
            &[&[0x50, 0x30, 1], &[0x10, 0x30, 1]], // continued by another unit
            &[&[0x00, 9, 0x30]],                   // a length beyond the packet
            &[&[0x30, 1, 0x30]],                   // three elements announced, one there
            &[&[0x00, 0x80, 0x80]],                // an unfinished length
            &[&[]],
        ] {
            assert_eq!(assemble(payloads), None, "{payloads:?}");
        }
    }

    #[test]
    fn first_packets_are_recognised_by_their_content() {
        let begins = |payload: &[u8]| outline(payload).map(|outline| outline.begins);
        assert_eq!(begins(&[0x18, 0x08, 1]), Some(true));
        assert_eq!(begins(&[0x00, 2, 0x30, 1]), Some(true));
        assert_eq!(begins(&[0x10, 0x34, 0x00, 1]), Some(true));
        // A tile group, a higher spatial layer, a continuation.
        assert_eq!(begins(&[0x10, 0x20, 1]), Some(false));
        assert_eq!(begins(&[0x10, 0x34, 0x08, 1]), Some(false));
        assert_eq!(begins(&[0x90, 0x30, 1]), Some(false));
        assert_eq!(begins(&[]), None);
    }

    #[test]
    fn sequence_header_makes_a_key_frame() {
        assert!(is_key_frame(&[&DELIMITER[..], &obu(&[0x08], &[1])].concat()));
        assert!(!is_key_frame(&[&DELIMITER[..], &obu(&[0x30], &[1])].concat()));
        assert!(!is_key_frame(&[0x0a, 9]));
    }

    #[test]
    fn lengths_of_all_sizes_are_read_back() {
        for value in [0, 1, 127, 128, 16_383, 16_384, 2 << 20] {
            let (bytes, length) = leb128(value);
            let mut rest = &bytes[..length];
            assert_eq!((take_leb128(&mut rest), rest.len()), (Some(value), 0));
        }
        // A longer form than needed is allowed.
        assert_eq!(take_leb128(&mut &[0x81, 0x80, 0x00][..]), Some(1));
    }
}
