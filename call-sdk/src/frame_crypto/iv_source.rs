//! The sender's choice of initialisation vectors.

use rand::{TryRngCore as _, rngs::OsRng};

use super::{
    derive::CryptoFailed,
    error::SealError,
    iv::{IV_LEN, Iv},
    key::FrameKey,
};

/// Bytes of an IV before its counter.
const PREFIX_LEN: usize = 6;

/// The IVs of one encryptor: a new random sequence whenever the key changes.
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
            // Also after a return to an earlier key: a clash then needs the same 48-bit prefix.
            current => &mut current.insert((key.id(), IvSequence::random()?)).1,
        };
        Ok(sequence.next())
    }

    #[cfg(test)]
    pub(super) fn starting_at(key: &FrameKey, first: Iv) -> Self {
        Self { current: Some((key.id(), IvSequence { next: first })) }
    }
}

/// Six random bytes, then a six-digit counter in base 255 that starts at a random value and wraps.
///
/// No byte is zero, so no emulation-prevention escape can fall inside an IV: libwebrtc of 2024 reads the IV
/// before it unescapes. An IV does not depend on SSRC or time, so two tracks, a restart or a cloned process do not
/// repeat one. The counter has 2.7e14 states, and the key is refused after 2^32 frames.
struct IvSequence {
    next: Iv,
}

impl IvSequence {
    fn random() -> Result<Self, CryptoFailed> {
        let mut next = [0; IV_LEN];
        // Redrawing the zeros alone leaves every byte uniform on 1..=255.
        while next.contains(&0) {
            let mut drawn = [0; IV_LEN];
            // Not a generator in this process: a clone of the process would draw the same.
            OsRng.try_fill_bytes(&mut drawn).map_err(|_| CryptoFailed)?;
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
    fn counter_wraps_without_repeating() {
        let mut last = [255; IV_LEN];
        last[IV_LEN - 1] = 250;
        let mut sequence = IvSequence { next: last };
        let ivs: HashSet<Iv> = (0..100_000).map(|_| sequence.next()).collect();
        assert_eq!(ivs.len(), 100_000);
        assert!(ivs.contains(&[255, 255, 255, 255, 255, 255, 1, 1, 1, 1, 1, 1]), "it wrapped");
        assert!(ivs.iter().all(|iv| !iv.contains(&0)), "no byte is zero");
    }

    #[test]
    fn digit_carries_into_the_one_before() {
        let mut sequence = IvSequence { next: [9, 9, 9, 9, 9, 9, 1, 1, 1, 7, 255, 255] };
        sequence.next();
        assert_eq!(sequence.next(), [9, 9, 9, 9, 9, 9, 1, 1, 1, 8, 1, 1]);
    }
}
