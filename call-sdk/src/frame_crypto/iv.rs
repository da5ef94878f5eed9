//! The sender's initialisation vectors.

use aws_lc_rs::rand;

use super::{derive::CryptoFailed, key::FrameKey, seal::SealError};

pub(super) const IV_LEN: usize = 12;

/// The nonce of one frame, in clear at its end.
pub(super) type Iv = [u8; IV_LEN];

/// Where the counter part of an IV begins.
const PREFIX_LEN: usize = 6;

/// The IVs of one encryptor: a fresh random sequence for each key it meets.
#[derive(Default)]
pub(super) struct IvSource {
    current: Option<(u64, IvSequence)>,
}

impl IvSource {
    /// The next IV for `key`, whose budget of 2^32 frames it draws on.
    pub(super) fn next(&mut self, key: &FrameKey) -> Result<Iv, SealError> {
        key.spend()?;
        let sequence = match &mut self.current {
            Some((id, sequence)) if *id == key.id() => sequence,
            // Coming back to an earlier key draws anew: a clash then needs the same 48-bit prefix.
            current => &mut current.insert((key.id(), IvSequence::random()?)).1,
        };
        Ok(sequence.next())
    }

    #[cfg(test)]
    pub(super) fn starting_at(key: &FrameKey, first: Iv) -> Self {
        Self { current: Some((key.id(), IvSequence { next: first })) }
    }
}

/// Six random bytes, then a six-digit counter to the base 255 that starts anywhere and wraps.
///
/// No byte is zero, so no emulation-prevention escape can fall inside an IV: libwebrtc of 2024 reads the IV
/// before it unescapes. Neither SSRC nor time goes in, so two tracks, a restart or a cloned process cannot
/// repeat an IV; the counter has 2.7e14 states and the key is refused after 2^32 frames.
struct IvSequence {
    next: Iv,
}

impl IvSequence {
    fn random() -> Result<Self, CryptoFailed> {
        let mut next = [0; IV_LEN];
        // Redrawing the zeros alone leaves every byte uniform on 1..=255.
        while next.contains(&0) {
            let mut drawn = [0; IV_LEN];
            rand::fill(&mut drawn).map_err(|_| CryptoFailed)?;
            for (byte, drawn) in next.iter_mut().zip(drawn).filter(|(byte, _)| **byte == 0) {
                *byte = drawn;
            }
        }
        Ok(Self { next })
    }

    fn next(&mut self) -> Iv {
        let iv = self.next;
        for digit in self.next[PREFIX_LEN..].iter_mut().rev() {
            if *digit < u8::MAX {
                *digit += 1;
                break;
            }
            *digit = 1;
        }
        iv
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn the_counter_crosses_its_end_without_repeating() {
        let mut last = [255; IV_LEN];
        last[IV_LEN - 1] = 250;
        let mut sequence = IvSequence { next: last };
        let ivs: HashSet<Iv> = (0..100_000).map(|_| sequence.next()).collect();
        assert_eq!(ivs.len(), 100_000);
        assert!(ivs.contains(&[255, 255, 255, 255, 255, 255, 1, 1, 1, 1, 1, 1]), "it wrapped");
        assert!(ivs.iter().all(|iv| !iv.contains(&0)), "no byte is zero");
    }

    #[test]
    fn a_digit_carries_into_the_one_before() {
        let mut sequence = IvSequence { next: [9, 9, 9, 9, 9, 9, 1, 1, 1, 7, 255, 255] };
        sequence.next();
        assert_eq!(sequence.next(), [9, 9, 9, 9, 9, 9, 1, 1, 1, 8, 1, 1]);
    }
}
