//! Recognising a frame that was opened before.

use std::hash::{BuildHasher as _, RandomState};

use super::iv::{IV_LEN, Iv};

/// The IVs of the last 4096 frames that opened under one key.
///
/// An IV is authenticated and a sender never repeats one, so an equal IV is the same frame again. The window is a
/// set and not a counter range because senders choose IVs as they like (the Go SDK draws them at random). A
/// replay older than 4096 frames passes: about 80 s of one audio track.
///
/// A ring of IVs in order of arrival, and a hash table of chains that lead through the ring from newer to older
/// IVs. A chain ends where it leaves the window, so no IV is ever removed from the table, and an insertion touches
/// two or three cache lines. Both grow with the number of frames, up to 72 KiB: in a large call many keys open few.
///
/// IVs are numbered modulo 2^16. A number that was left in the table 2^16 insertions ago looks new again and leads
/// into the chain of another bucket. That costs comparisons and never an answer: IVs are compared as a whole, and
/// all IVs of the own bucket from there on are too old to count.
pub(super) struct ReplayWindow {
    /// The IV with number `n` is at `n` modulo the length, which is zero or a power of two up to [`CAPACITY`].
    ring: Vec<Seen>,
    /// For each hash, the number of the newest IV with it. Twice as long as the ring.
    newest: Vec<u16>,
    /// Hidden from senders, so that none can craft IVs that share a bucket.
    secret: [u64; 2],
    /// Frames that were new, also those no longer in the window.
    opened: u64,
}

const CAPACITY: usize = 4096;
/// Length of the ring after the first IV.
const SMALLEST: usize = 32;

#[derive(Clone, Copy)]
struct Seen {
    iv: Iv,
    /// Number of the IV before this one in the same bucket.
    older: u16,
}

impl ReplayWindow {
    /// Whether `iv` is new; remembers it.
    pub(super) fn insert(&mut self, iv: Iv) -> bool {
        if self.opened == self.ring.len() as u64 && self.ring.len() < CAPACITY {
            self.grow();
        }
        let number = number(self.opened);
        let bucket = self.bucket(iv);
        let newest = self.newest[bucket];
        let (mut candidate, mut age) = (newest, number.wrapping_sub(newest));
        while usize::from(age) <= self.ring.len() {
            let seen = &self.ring[self.place(candidate)];
            if seen.iv == iv {
                return false;
            }
            candidate = seen.older;
            let older = number.wrapping_sub(candidate);
            // A chain leads to ever older IVs. Only a number of an earlier round of 2^16 breaks this.
            if older <= age {
                break;
            }
            age = older;
        }
        self.link(iv, number, bucket);
        self.opened += 1;
        true
    }

    /// Frames opened so far.
    pub(super) fn opened(&self) -> u64 {
        self.opened
    }

    /// Doubles the ring, which is full and has not forgotten anything yet.
    fn grow(&mut self) {
        let length = (2 * self.ring.len()).max(SMALLEST);
        let ring = std::mem::replace(&mut self.ring, vec![Seen { iv: [0; IV_LEN], older: 0 }; length]);
        self.newest = vec![0; 2 * length];
        for n in 0..self.opened {
            let number = number(n);
            let Seen { iv, .. } = ring[usize::from(number) % ring.len()];
            self.link(iv, number, self.bucket(iv));
        }
    }

    fn link(&mut self, iv: Iv, number: u16, bucket: usize) {
        let place = self.place(number);
        self.ring[place] = Seen { iv, older: self.newest[bucket] };
        self.newest[bucket] = number;
    }

    fn place(&self, number: u16) -> usize {
        usize::from(number) & (self.ring.len() - 1)
    }

    /// A multiplication under a secret: a fraction of the time of SipHash, and enough for a table of bounded size.
    fn bucket(&self, iv: Iv) -> usize {
        let [a0, a1, a2, a3, a4, a5, a6, a7, b0, b1, b2, b3] = iv;
        let first = u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]) ^ self.secret[0];
        let last = u64::from(u32::from_le_bytes([b0, b1, b2, b3])) ^ self.secret[1];
        let product = u128::from(first) * u128::from(last);
        (product as u64 ^ (product >> 64) as u64) as usize & (self.newest.len() - 1)
    }
}

impl Default for ReplayWindow {
    fn default() -> Self {
        let random = RandomState::new();
        let secret = [random.hash_one(0), random.hash_one(1)];
        Self { ring: Vec::new(), newest: Vec::new(), secret, opened: 0 }
    }
}

/// Number of the `n`th IV. Number 0, where every bucket points at first, is just outside the window of the first.
fn number(n: u64) -> u16 {
    (n as u16).wrapping_add(CAPACITY as u16 + 1)
}

#[cfg(test)]
mod tests {
    use std::collections::{HashSet, VecDeque};

    use proptest::prelude::*;

    use super::*;

    /// The definition, without any economy.
    #[derive(Default)]
    struct Reference {
        seen: HashSet<Iv>,
        arrivals: VecDeque<Iv>,
    }

    impl Reference {
        fn insert(&mut self, iv: Iv) -> bool {
            if !self.seen.insert(iv) {
                return false;
            }
            self.arrivals.push_back(iv);
            if self.arrivals.len() > CAPACITY {
                let forgotten = self.arrivals.pop_front().unwrap();
                self.seen.remove(&forgotten);
            }
            true
        }
    }

    fn iv(n: u32) -> Iv {
        let mut iv = [9; IV_LEN];
        iv[8..].copy_from_slice(&n.to_be_bytes());
        iv
    }

    #[test]
    fn last_4096_ivs_are_known_and_no_older_one() {
        let mut window = ReplayWindow::default();
        assert!((0..3 * 4096).all(|n| window.insert(iv(n))));
        assert!((2 * 4096..3 * 4096).all(|n| !window.insert(iv(n))));
        assert!(window.insert(iv(2 * 4096 - 1)), "older than the window");
        assert_eq!(window.opened(), 3 * 4096 + 1);
    }

    #[test]
    fn all_zero_iv_is_new_once() {
        let mut window = ReplayWindow::default();
        assert!(window.insert([0; IV_LEN]));
        assert!(!window.insert([0; IV_LEN]));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(8))]

        /// IVs from a small set, so that many are replays, over several rounds of 2^16 numbers.
        #[test]
        fn window_agrees_with_its_definition(seed: u64, distinct in 9000..30_000u64) {
            let (mut window, mut reference) = (ReplayWindow::default(), Reference::default());
            let mut state = seed;
            for step in 0..400_000u32 {
                // Knuth's MMIX generator.
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let iv = iv(((state >> 33) % distinct) as u32);
                prop_assert_eq!(window.insert(iv), reference.insert(iv), "step {}", step);
            }
            prop_assert!(window.opened() > 1 << 17);
        }
    }
}
