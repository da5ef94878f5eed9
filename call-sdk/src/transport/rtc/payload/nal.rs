//! What H.264 (RFC 6184) and H.265 (RFC 7798) have in common: Annex B units into single, aggregation and
//! fragmentation packets, and back.
//!
//! A sealed frame is a few plain units and one slice whose ciphertext is escaped, so it divides into units like any
//! other frame. Every unit is sent, in order, and the last one up to the last byte.

use super::{Facts, Outline};
use crate::transport::rtc::packetiser::{LONGEST_PAYLOAD, PacketWriter, PacketiseError, pieces};

const START_CODE: [u8; 4] = [0, 0, 0, 1];

/// Flags of a fragmentation header, the same in both RFCs.
const FRAGMENT_START: u8 = 0x80;
const FRAGMENT_END: u8 = 0x40;

/// How one of the two standards lays out NAL unit headers.
pub(super) trait NalFormat {
    /// Bytes of a NAL unit header.
    const HEADER: usize;
    /// Type of packets that hold several units.
    const AGGREGATION: u8;
    /// Type of packets that hold a part of a unit.
    const FRAGMENT: u8;
    /// The bits of a fragmentation header that hold the unit's type.
    const FRAGMENT_KIND: u8;

    /// Type of the unit whose first byte this is.
    fn kind(first_byte: u8) -> u8;

    /// The first byte with another type.
    fn with_kind(first_byte: u8, kind: u8) -> u8;

    /// What a unit of this type is; `None` if no packet can carry it.
    fn class(kind: u8) -> Option<Class>;

    /// Combines the header of an aggregation packet with that of a further unit in it.
    fn merge(aggregation: &mut [u8], unit: &[u8]);

    /// Whether a frame begins with the unit of type `kind` that has `body` behind its header.
    fn begins_frame(kind: u8, body: &[u8]) -> bool;
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    /// Part of a picture that depends on no other.
    KeySlice,
    /// Part of any other picture.
    Slice,
    /// Parameter sets, supplemental information, delimiters, and what future standards add.
    Other,
}

/// The units of an Annex B frame, without start codes.
#[derive(Clone, Debug)]
struct Units<'a> {
    /// Begins behind a start code, or is empty.
    rest: &'a [u8],
}

impl<'a> Units<'a> {
    /// `None` if the frame does not begin with a start code.
    fn of(frame: &'a [u8]) -> Option<Self> {
        let code = start_code(frame)?;
        let leading_zeros = frame[..code].iter().all(|byte| *byte == 0);
        leading_zeros.then_some(Self { rest: &frame[code + 3..] })
    }
}

impl<'a> Iterator for Units<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        while !self.rest.is_empty() {
            let unit = match start_code(self.rest) {
                Some(code) => {
                    let unit = &self.rest[..code];
                    self.rest = &self.rest[code + 3..];
                    // Zeros in front of a start code are not part of the unit (H.264 §B.1.1).
                    let end = unit.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
                    &unit[..end]
                }
                // Nothing is trimmed here: a trailing zero is the key index of a sealed frame.
                None => std::mem::take(&mut self.rest),
            };
            if !unit.is_empty() {
                return Some(unit);
            }
        }
        None
    }
}

/// Position of the first `00 00 01` that has a byte behind it.
fn start_code(bytes: &[u8]) -> Option<usize> {
    /// Two zeros in a row are rare. Looking for them first, a block at a time and without a branch per byte, is
    /// several times faster.
    const BLOCK: usize = 64;
    let find = |from: usize, to: usize| {
        (from..to.min(bytes.len().saturating_sub(3))).find(|at| bytes[*at..at + 3] == [0, 0, 1])
    };
    let mut start = 0;
    while start + BLOCK < bytes.len() {
        let (block, shifted) = (&bytes[start..start + BLOCK], &bytes[start + 1..start + BLOCK + 1]);
        let two_zeros = block.iter().zip(shifted).fold(false, |found, (a, b)| found | (a | b == 0));
        if two_zeros && let Some(at) = find(start, start + BLOCK) {
            return Some(at);
        }
        start += BLOCK;
    }
    find(start, bytes.len())
}

pub(super) fn write<F: NalFormat>(
    frame: &[u8],
    packets: &mut PacketWriter<'_>,
) -> Result<(), PacketiseError> {
    let mut units =
        Units::of(frame).ok_or(PacketiseError::Malformed("it does not begin with a start code"))?;
    // Units other than slices that wait to share a packet, and the size of that packet.
    let (mut waiting, mut count, mut size) = (units.clone(), 0, F::HEADER);
    loop {
        let here = units.clone();
        let unit = units.next();
        let shared_size = match unit {
            Some(unit) => shared_size::<F>(unit)?,
            None => None,
        };
        if shared_size.is_none_or(|shared| size + shared > LONGEST_PAYLOAD) {
            write_together::<F>(waiting.clone(), count, packets);
            (count, size) = (0, F::HEADER);
        }
        match (unit, shared_size) {
            (Some(_), Some(shared)) => {
                if count == 0 {
                    waiting = here;
                }
                (count, size) = (count + 1, size + shared);
            }
            (Some(slice), None) => write_alone::<F>(slice, packets),
            (None, _) => break,
        }
    }
    if packets.at_frame_start() {
        return Err(PacketiseError::Malformed("it has no NAL unit"));
    }
    packets.mark_last();
    Ok(())
}

/// How many bytes `unit` takes in a packet that it shares; `None` for slices, which are sent on their own.
fn shared_size<F: NalFormat>(unit: &[u8]) -> Result<Option<usize>, PacketiseError> {
    if unit.len() < F::HEADER {
        return Err(PacketiseError::Malformed("a NAL unit is shorter than its header"));
    }
    match F::class(F::kind(unit[0])) {
        Some(Class::Other) => Ok(Some(2 + unit.len())),
        Some(Class::Slice | Class::KeySlice) => Ok(None),
        None => Err(PacketiseError::Malformed("RTP cannot carry a NAL unit of this type")),
    }
}

/// Writes the first `count` of `units`: several into one aggregation packet, for which there is room.
fn write_together<F: NalFormat>(units: Units<'_>, count: usize, packets: &mut PacketWriter<'_>) {
    let units = units.take(count);
    if count < 2 {
        units.for_each(|unit| write_alone::<F>(unit, packets));
        return;
    }
    let mut header = [0; 2];
    let header = &mut header[..F::HEADER];
    for (index, unit) in units.clone().enumerate() {
        match index {
            0 => header.copy_from_slice(&unit[..F::HEADER]),
            _ => F::merge(header, unit),
        }
    }
    header[0] = F::with_kind(header[0], F::AGGREGATION);
    packets.put(header);
    for unit in units {
        // It fits: all of them fit into a packet.
        packets.put(&u16::try_from(unit.len()).unwrap_or(u16::MAX).to_be_bytes());
        packets.put(unit);
    }
    packets.end_packet();
}

/// Writes one unit, into several packets if it is too long for one.
fn write_alone<F: NalFormat>(unit: &[u8], packets: &mut PacketWriter<'_>) {
    if unit.len() <= LONGEST_PAYLOAD {
        packets.put(unit);
        packets.end_packet();
        return;
    }
    let (header, body) = unit.split_at(F::HEADER);
    let kind = F::kind(header[0]);
    let pieces = pieces(body, LONGEST_PAYLOAD - F::HEADER - 1);
    let count = pieces.len();
    for (index, piece) in pieces.enumerate() {
        let place = match index {
            0 => FRAGMENT_START,
            _ if index + 1 == count => FRAGMENT_END,
            _ => 0,
        };
        packets.put(&[F::with_kind(header[0], F::FRAGMENT)]);
        packets.put(&header[1..]);
        packets.put(&[place | kind]);
        packets.put(piece);
        packets.end_packet();
    }
}

pub(super) fn outline<F: NalFormat>(payload: &[u8]) -> Option<Outline> {
    let kind = F::kind(*payload.first()?);
    let behind_header = payload.get(F::HEADER..)?;
    let begins = if kind == F::FRAGMENT {
        let (fragment, body) = behind_header.split_first()?;
        fragment & FRAGMENT_START != 0 && F::begins_frame(fragment & F::FRAGMENT_KIND, body)
    } else if kind == F::AGGREGATION {
        let unit = behind_header.get(2..)?;
        F::begins_frame(F::kind(*unit.first()?), unit.get(F::HEADER..)?)
    } else {
        F::begins_frame(kind, behind_header)
    };
    Some(Outline { begins, ends: false })
}

pub(super) fn assemble<'a, F: NalFormat>(
    payloads: impl Iterator<Item = &'a [u8]>,
    frame: &mut Vec<u8>,
) -> Option<Facts> {
    let mut key_frame = false;
    let mut begin_unit = |frame: &mut Vec<u8>, kind| {
        key_frame |= F::class(kind)? == Class::KeySlice;
        frame.extend_from_slice(&START_CODE);
        Some(())
    };
    // Type of the unit whose fragments are being joined.
    let mut fragmented = None;
    for payload in payloads {
        let (header, body) = payload.split_at_checked(F::HEADER)?;
        let kind = F::kind(header[0]);
        if kind == F::FRAGMENT {
            let (&fragment, body) = body.split_first()?;
            let kind = fragment & F::FRAGMENT_KIND;
            let starts = fragment & FRAGMENT_START != 0;
            if fragmented != (!starts).then_some(kind) {
                return None;
            }
            if starts {
                begin_unit(frame, kind)?;
                frame.push(F::with_kind(header[0], kind));
                frame.extend_from_slice(&header[1..]);
            }
            frame.extend_from_slice(body);
            fragmented = (fragment & FRAGMENT_END == 0).then_some(kind);
        } else if fragmented.is_some() {
            return None;
        } else if kind == F::AGGREGATION {
            let mut rest = body;
            while !rest.is_empty() {
                let (size, tail) = rest.split_first_chunk()?;
                let (unit, tail) = tail.split_at_checked(usize::from(u16::from_be_bytes(*size)))?;
                let header = unit.get(..F::HEADER)?;
                begin_unit(frame, F::kind(header[0]))?;
                frame.extend_from_slice(unit);
                rest = tail;
            }
        } else {
            begin_unit(frame, kind)?;
            frame.extend_from_slice(payload);
        }
    }
    fragmented.is_none().then_some(Facts { key_frame, temporal: None, spatial: 0 })
}

/// The first slice decides; its type stays in clear when a frame is sealed.
pub(super) fn is_key_frame<F: NalFormat>(frame: &[u8]) -> bool {
    let mut classes = Units::of(frame).into_iter().flatten().filter_map(|unit| F::class(F::kind(unit[0])));
    classes.find(|class| *class != Class::Other) == Some(Class::KeySlice)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn units(frame: &[u8]) -> Vec<&[u8]> {
        Units::of(frame).into_iter().flatten().collect()
    }

    #[test]
    fn start_codes_of_both_lengths_and_zeros_between_units_are_removed() {
        let frame = [0, 0, 1, 7, 8, 0, 0, 0, 1, 9, 0, 0, 0, 0, 0, 1, 5, 6];
        assert_eq!(units(&frame), [&[7, 8][..], &[9], &[5, 6]]);
    }

    #[test]
    fn zeros_at_the_end_of_a_frame_are_kept() {
        assert_eq!(units(&[0, 0, 0, 1, 5, 6, 0, 0, 0]), [&[5, 6, 0, 0, 0][..]]);
        assert_eq!(units(&[0, 0, 0, 1, 5, 6, 0, 0, 1]), [&[5, 6, 0, 0, 1][..]]);
    }

    proptest! {
        #[test]
        fn start_code_is_found_wherever_it_is(
            bytes in proptest::collection::vec(prop_oneof![3 => 0..2u8, 2 => any::<u8>()], 0..200),
            offset in 0..200usize,
        ) {
            let bytes = [&vec![9; offset][..], &bytes].concat();
            let expected = (0..bytes.len().saturating_sub(3)).find(|at| bytes[*at..at + 3] == [0, 0, 1]);
            prop_assert_eq!(start_code(&bytes), expected);
        }
    }

    #[test]
    fn frame_without_leading_start_code_has_no_units() {
        assert!(Units::of(&[5, 0, 0, 1, 6]).is_none());
        assert!(Units::of(&[5, 6, 7]).is_none());
        assert!(Units::of(&[0, 0, 0, 1]).is_none());
    }
}
