//! The VP8 payload descriptor (RFC 7741 §4.2): read and renumbered in place.
//!
//! The descriptor belongs to the packetiser and is in clear even in an encrypted call; the bytes behind it are
//! the encrypted frame and are never changed. Of those only one bit is read: P, the lowest bit of the first
//! byte, which LiveKit's frame encryption leaves in clear and which tells a key frame from a delta frame.

/// Picture ids count modulo this when they are 15 bits wide.
const WIDE: u16 = 1 << 15;
/// Picture ids count modulo this when they are 7 bits wide.
const NARROW: u16 = 1 << 7;
/// KEYIDX is 5 bits wide.
const KEY_INDICES: u8 = 1 << 5;

/// What a descriptor says, and where its fields are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Descriptor {
    /// Bytes of the descriptor; the frame's data begin there.
    pub(crate) len: usize,
    /// First packet of a frame: S = 1 and partition 0.
    pub(crate) starts_frame: bool,
    /// The numbers that a forwarder must keep continuous.
    pub(crate) numbers: Numbers,
    picture_id_at: usize,
    tl0_at: usize,
    key_at: usize,
}

/// The running numbers of a descriptor. A field is `None` if the sender does not write it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Numbers {
    pub(crate) picture_id: Option<PictureId>,
    pub(crate) tl0_pic_idx: Option<u8>,
    pub(crate) key_idx: Option<u8>,
}

/// A picture id in the width that its sender uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PictureId {
    pub(crate) value: u16,
    pub(crate) wide: bool,
}

impl PictureId {
    fn modulus(self) -> u16 {
        if self.wide { WIDE } else { NARROW }
    }

    fn shifted(self, by: u16) -> Self {
        Self { value: self.value.wrapping_add(by) % self.modulus(), ..self }
    }
}

impl Descriptor {
    /// Reads the descriptor at the start of an RTP payload; `None` if it is cut short.
    pub(crate) fn parse(payload: &[u8]) -> Option<Self> {
        let first = *payload.first()?;
        let mut d = Self {
            len: 1,
            starts_frame: first & 0x10 != 0 && first & 0x07 == 0,
            numbers: Numbers::default(),
            picture_id_at: 0,
            tl0_at: 0,
            key_at: 0,
        };
        if first & 0x80 == 0 {
            return Some(d);
        }
        let present = *payload.get(1)?;
        d.len = 2;
        if present & 0x80 != 0 {
            d.picture_id_at = d.len;
            let high = *payload.get(d.len)?;
            d.len += 1;
            let mut id = PictureId { value: u16::from(high & 0x7f), wide: high & 0x80 != 0 };
            if id.wide {
                id.value = id.value << 8 | u16::from(*payload.get(d.len)?);
                d.len += 1;
            }
            d.numbers.picture_id = Some(id);
        }
        if present & 0x40 != 0 {
            d.tl0_at = d.len;
            d.numbers.tl0_pic_idx = Some(*payload.get(d.len)?);
            d.len += 1;
        }
        if present & 0x30 != 0 {
            d.key_at = d.len;
            let byte = *payload.get(d.len)?;
            d.len += 1;
            if present & 0x10 != 0 {
                d.numbers.key_idx = Some(byte & 0x1f);
            }
        }
        Some(d)
    }

    /// Whether the packet is the first of a key frame.
    pub(crate) fn starts_key_frame(&self, payload: &[u8]) -> bool {
        self.starts_frame && payload.get(self.len).is_some_and(|byte| byte & 1 == 0)
    }

    /// Writes other numbers into a copy of the payload that this descriptor was read from. Fields that the
    /// sender did not write stay absent, widths stay as they are.
    pub(crate) fn renumber(&self, payload: &mut [u8], to: &Numbers) {
        if let (Some(own), Some(id)) = (self.numbers.picture_id, to.picture_id) {
            let [high, low] = id.value.to_be_bytes();
            if own.wide {
                set(payload, self.picture_id_at, 0x80 | high & 0x7f);
                set(payload, self.picture_id_at + 1, low);
            } else {
                set(payload, self.picture_id_at, low & 0x7f);
            }
        }
        if let (Some(_), Some(tl0)) = (self.numbers.tl0_pic_idx, to.tl0_pic_idx) {
            set(payload, self.tl0_at, tl0);
        }
        if let (Some(_), Some(key)) = (self.numbers.key_idx, to.key_idx) {
            let kept = payload.get(self.key_at).map_or(0, |byte| byte & 0xe0);
            set(payload, self.key_at, kept | (key % KEY_INDICES));
        }
    }
}

fn set(payload: &mut [u8], at: usize, byte: u8) {
    if let Some(place) = payload.get_mut(at) {
        *place = byte;
    }
}

/// What to add to the numbers of a source so that they continue the numbers sent before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Shift {
    picture_id: u16,
    tl0_pic_idx: u8,
    key_idx: u8,
}

impl Shift {
    /// The shift that makes `first` follow `last` by one in every field that both have.
    pub(crate) fn continuing(last: &Numbers, first: &Numbers) -> Self {
        let picture_id = match (last.picture_id, first.picture_id) {
            // WIDE is a multiple of NARROW, so one difference serves both widths.
            (Some(last), Some(first)) => last.value.wrapping_add(1).wrapping_sub(first.value),
            _ => 0,
        };
        let step = |last: Option<u8>, first: Option<u8>| match (last, first) {
            (Some(last), Some(first)) => last.wrapping_add(1).wrapping_sub(first),
            _ => 0,
        };
        Self {
            picture_id,
            tl0_pic_idx: step(last.tl0_pic_idx, first.tl0_pic_idx),
            key_idx: step(last.key_idx, first.key_idx),
        }
    }

    /// The numbers to send for the numbers received.
    pub(crate) fn apply(&self, numbers: &Numbers) -> Numbers {
        Numbers {
            picture_id: numbers.picture_id.map(|id| id.shifted(self.picture_id)),
            tl0_pic_idx: numbers.tl0_pic_idx.map(|idx| idx.wrapping_add(self.tl0_pic_idx)),
            key_idx: numbers.key_idx.map(|idx| idx.wrapping_add(self.key_idx) % KEY_INDICES),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// X, S; I L T K; 15-bit picture id 0x1234; TL0PICIDX 9; TID 1, Y, KEYIDX 3; key frame data.
    const FULL: [u8; 7] = [0x90, 0xf0, 0x92, 0x34, 9, 0x63, 0x00];

    #[test]
    fn reads_every_field() {
        let d = Descriptor::parse(&FULL).unwrap();
        assert_eq!(d.len, 6);
        assert!(d.starts_key_frame(&FULL));
        assert_eq!(d.numbers.picture_id, Some(PictureId { value: 0x1234, wide: true }));
        assert_eq!(d.numbers.tl0_pic_idx, Some(9));
        assert_eq!(d.numbers.key_idx, Some(3));
    }

    #[test]
    fn a_delta_frame_or_a_later_packet_starts_no_key_frame() {
        let delta = [0x10, 0x01];
        assert!(!Descriptor::parse(&delta).unwrap().starts_key_frame(&delta));
        let later = [0x00, 0x00];
        assert!(!Descriptor::parse(&later).unwrap().starts_key_frame(&later));
        let other_partition = [0x11, 0x00];
        assert!(!Descriptor::parse(&other_partition).unwrap().starts_key_frame(&other_partition));
        let no_data = [0x10];
        assert!(!Descriptor::parse(&no_data).unwrap().starts_key_frame(&no_data));
    }

    #[test]
    fn renumbering_keeps_everything_else() {
        let d = Descriptor::parse(&FULL).unwrap();
        let mut copy = FULL;
        let to = Numbers {
            picture_id: Some(PictureId { value: 0x7fff, wide: true }),
            tl0_pic_idx: Some(255),
            key_idx: Some(31),
        };
        d.renumber(&mut copy, &to);
        assert_eq!(copy, [0x90, 0xf0, 0xff, 0xff, 255, 0x7f, 0x00]);
        assert_eq!(Descriptor::parse(&copy).unwrap().numbers, to);
    }

    #[test]
    fn a_shift_wraps_in_the_width_of_the_source() {
        let last = Numbers {
            picture_id: Some(PictureId { value: 0x7fff, wide: true }),
            tl0_pic_idx: Some(255),
            key_idx: Some(31),
        };
        let first = Numbers {
            picture_id: Some(PictureId { value: 100, wide: true }),
            tl0_pic_idx: Some(7),
            key_idx: Some(4),
        };
        let sent = Shift::continuing(&last, &first).apply(&first);
        assert_eq!(sent.picture_id.unwrap().value, 0);
        assert_eq!(sent.tl0_pic_idx, Some(0));
        assert_eq!(sent.key_idx, Some(0));
    }

    proptest! {
        #[test]
        fn never_panics_and_touches_only_the_descriptor(
            payload in proptest::collection::vec(any::<u8>(), 0..32),
            picture_id in 0u16..0x8000, tl0 in any::<u8>(), key in any::<u8>(),
        ) {
            if let Some(d) = Descriptor::parse(&payload) {
                prop_assert!(d.len <= payload.len());
                let mut copy = payload.clone();
                d.renumber(&mut copy, &Numbers {
                    picture_id: Some(PictureId { value: picture_id, wide: true }),
                    tl0_pic_idx: Some(tl0),
                    key_idx: Some(key),
                });
                prop_assert_eq!(&copy[d.len..], &payload[d.len..]);
                let again = Descriptor::parse(&copy).unwrap();
                prop_assert_eq!(again.len, d.len);
                prop_assert_eq!(again.starts_frame, d.starts_frame);
                prop_assert_eq!(again.numbers.tl0_pic_idx.is_some(), d.numbers.tl0_pic_idx.is_some());
            }
        }

        #[test]
        fn renumbering_by_nothing_is_the_identity(payload in proptest::collection::vec(any::<u8>(), 1..32)) {
            if let Some(d) = Descriptor::parse(&payload) {
                let mut copy = payload.clone();
                d.renumber(&mut copy, &Shift::default().apply(&d.numbers));
                prop_assert_eq!(copy, payload);
            }
        }
    }
}
