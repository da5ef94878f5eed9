//! H.264 and H.265 access units in Annex B form: finding the first slice, and writing a header that transports do
//! not change.

use super::error::SealError;

/// Bytes of the first slice that stay in clear, so that packetisers and SFUs still read its type.
pub(super) const CLEAR_OF_SLICE: usize = 2;

/// libwebrtc keeps the number of clear bytes in a `uint8_t`; above 255 its clients cannot open frames.
const MAX_CLEAR: usize = 255;

const START_CODE: [u8; 4] = [0, 0, 0, 1];

/// The standard that defines the types of NAL units.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Family {
    H264,
    H265,
}

/// Offset of the first slice NAL unit, after its start code.
///
/// `None` if there is no slice, or if bytes other than zero precede the first start code. A last unit of fewer than
/// four bytes does not count: livekit-client's scan ends there.
pub(super) fn first_slice(family: Family, unit: &[u8]) -> Option<usize> {
    let code = start_code(unit, 0)?;
    if unit[..code].iter().any(|byte| *byte != 0) {
        return None;
    }
    let mut start = code + 3;
    while unit.len() - start >= 4 {
        if family.role(unit[start]) == Role::Slice {
            return Some(start);
        }
        start = start_code(unit, start)? + 3;
    }
    None
}

/// Writes the clear part of `unit` into `header` in the one form that every transport passes on unchanged, and
/// returns the number of bytes of `unit` that it replaces.
///
/// The clear bytes are authenticated, so the frame is lost if a packetiser drops or a depacketiser rewrites any of
/// them. Hence: four-byte start codes, no delimiters or filler (dropped silently by packetisers), one of each
/// parameter set directly before the slice, and at most 255 bytes, if need be without supplemental information.
pub(super) fn canonical_header(
    family: Family,
    unit: &[u8],
    header: &mut Vec<u8>,
) -> Result<usize, SealError> {
    let slice = first_slice(family, unit).ok_or(SealError::NoSlice)?;
    let end = slice + CLEAR_OF_SLICE;
    for keep_supplemental in [true, false] {
        write_header(family, unit, slice, keep_supplemental, header)?;
        if header.len() <= MAX_CLEAR {
            return Ok(end);
        }
    }
    Err(SealError::HeaderTooLong)
}

fn write_header(
    family: Family,
    unit: &[u8],
    slice: usize,
    keep_supplemental: bool,
    header: &mut Vec<u8>,
) -> Result<(), SealError> {
    header.clear();
    let mut sets: [Option<&[u8]>; 3] = [None; 3];
    let mut start = 0;
    while start < slice {
        let code = start_code(unit, start).filter(|code| code + 3 <= slice).unwrap_or(slice);
        let end = start + unit[start..code].iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        let nalu = &unit[start..end];
        start = code + 3;
        let Some(first) = nalu.first() else { continue };
        match family.role(*first) {
            Role::Transport => {}
            Role::Supplemental if !keep_supplemental => {}
            Role::ParameterSet(place) => {
                if sets[place].replace(nalu).is_some_and(|earlier| earlier != nalu) {
                    return Err(SealError::ParameterSets);
                }
            }
            // Beyond the limit the result is known, and a hostile encoder must not make us copy the rest.
            Role::Supplemental | Role::Slice | Role::Other if header.len() > MAX_CLEAR => {}
            Role::Supplemental | Role::Slice | Role::Other => push(header, nalu),
        }
    }
    for set in sets.into_iter().flatten() {
        push(header, set);
    }
    push(header, &unit[slice..slice + CLEAR_OF_SLICE]);
    Ok(())
}

fn push(header: &mut Vec<u8>, nalu: &[u8]) {
    header.extend_from_slice(&START_CODE);
    header.extend_from_slice(nalu);
}

/// Treatment of a NAL unit by packetisers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Slice,
    /// With its position in the order of sets.
    ParameterSet(usize),
    Supplemental,
    /// Delimiter or filler.
    Transport,
    Other,
}

impl Family {
    /// ITU-T H.264 table 7-1, H.265 table 7-1.
    fn role(self, first_byte: u8) -> Role {
        match self {
            Self::H264 => match first_byte & 0x1f {
                1 | 5 => Role::Slice,
                7 => Role::ParameterSet(1),
                8 => Role::ParameterSet(2),
                6 => Role::Supplemental,
                9 | 12 => Role::Transport,
                _ => Role::Other,
            },
            Self::H265 => match (first_byte >> 1) & 0x3f {
                0..=9 | 16..=21 => Role::Slice,
                set @ 32..=34 => Role::ParameterSet(usize::from(set - 32)),
                39 | 40 => Role::Supplemental,
                35 | 38 => Role::Transport,
                _ => Role::Other,
            },
        }
    }
}

/// Position of the next `00 00 01` at or after `from` that is followed by a byte.
fn start_code(unit: &[u8], from: usize) -> Option<usize> {
    let mut position = from;
    while position + 3 < unit.len() {
        // The third byte gives the distance to the next possible code.
        position += match unit[position + 2] {
            0 => 1,
            1 if unit[position] == 0 && unit[position + 1] == 0 => return Some(position),
            _ => 3,
        };
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// livekit-client's rules for a scan, literally.
    fn reference(family: Family, unit: &[u8]) -> Option<usize> {
        let codes: Vec<_> =
            (0..unit.len().saturating_sub(3)).filter(|at| unit[*at..*at + 3] == [0, 0, 1]).collect();
        if unit[..*codes.first()?].iter().any(|byte| *byte != 0) {
            return None;
        }
        let mut starts: Vec<_> = codes.iter().map(|code| code + 3).collect();
        starts.pop_if(|last| unit.len() - *last < 4);
        starts.into_iter().find(|start| match family {
            Family::H264 => [1, 5].contains(&(unit[*start] & 0x1f)),
            Family::H265 => matches!((unit[*start] >> 1) & 0x3f, 0..=9 | 16..=21),
        })
    }

    proptest! {
        #[test]
        fn scan_agrees_with_livekit_client(
            zeros in 0..4usize,
            bytes in proptest::collection::vec(prop_oneof![6 => 0..2u8, 1 => any::<u8>()], 0..60),
        ) {
            let unit = [&[0, 0, 0][..zeros.min(3)], &bytes].concat();
            for family in [Family::H264, Family::H265] {
                prop_assert_eq!(first_slice(family, &unit), reference(family, &unit));
            }
        }
    }

    fn canonical(unit: &[u8]) -> Result<(Vec<u8>, usize), SealError> {
        let mut header = Vec::new();
        canonical_header(Family::H264, unit, &mut header).map(|end| (header, end))
    }

    #[test]
    fn header_loses_delimiters_and_gets_long_codes_and_sets_at_the_slice() {
        let unit = [
            &[0, 0, 1, 9, 16, 0, 0, 1, 0x67, 1, 0, 0, 0, 1, 0x68, 2, 0, 0, 1, 6, 3][..],
            &[0, 0, 1, 0x65, 4, 5, 6],
        ]
        .concat();
        let (header, end) = canonical(&unit).unwrap();
        assert_eq!(header, [0, 0, 0, 1, 6, 3, 0, 0, 0, 1, 0x67, 1, 0, 0, 0, 1, 0x68, 2, 0, 0, 0, 1, 0x65, 4]);
        assert_eq!(unit[end..], [5, 6]);
    }

    #[test]
    fn header_above_the_limit_loses_supplemental_information() {
        let mut unit = [&[0, 0, 0, 1, 6][..], &[7; 300], &[0, 0, 0, 1, 0x41, 1, 2, 3]].concat();
        assert_eq!(canonical(&unit).unwrap().0, [0, 0, 0, 1, 0x41, 1]);
        unit[4] = 0x67;
        assert_eq!(canonical(&unit), Err(SealError::HeaderTooLong));
    }

    #[test]
    fn repeated_set_is_merged_and_second_set_is_refused() {
        let repeated = [0, 0, 1, 0x67, 1, 0, 0, 1, 0x67, 1, 0, 0, 1, 0x65, 4, 5, 6];
        assert_eq!(canonical(&repeated).unwrap().0, [0, 0, 0, 1, 0x67, 1, 0, 0, 0, 1, 0x65, 4]);
        let differing = [0, 0, 1, 0x67, 1, 0, 0, 1, 0x67, 2, 0, 0, 1, 0x65, 4, 5, 6];
        assert_eq!(canonical(&differing), Err(SealError::ParameterSets));
    }

    #[test]
    fn unit_without_a_slice_is_refused() {
        for unit in [
            &[0, 0, 1, 0x67, 1, 2, 3][..],
            &[1, 2, 3, 4, 5],
            &[0, 0, 1, 0x65, 4, 5],
            &[7, 0, 0, 1, 0x65, 1, 2, 3],
        ] {
            assert_eq!(canonical(unit), Err(SealError::NoSlice), "{unit:?}");
        }
    }
}
