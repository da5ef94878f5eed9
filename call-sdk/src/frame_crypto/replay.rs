//! Recognising a frame that was opened before.

use std::{collections::HashSet, mem};

use super::iv::Iv;

/// The IVs of the last 4096 frames that opened under one key.
///
/// An IV is authenticated and a sender never repeats one, so an equal IV is the same frame again. It is a set and
/// not a counter window, because peers choose IVs as they like (the Go SDK draws them at random). A replay older
/// than 4096 frames passes: about 80 s of one audio track.
#[derive(Default)]
pub(super) struct ReplayWindow {
    seen: HashSet<Iv>,
    /// In order of arrival, from `oldest` once full.
    arrivals: Vec<Iv>,
    oldest: usize,
}

const CAPACITY: usize = 4096;

impl ReplayWindow {
    /// Whether `iv` is new; remembers it.
    pub(super) fn insert(&mut self, iv: Iv) -> bool {
        if !self.seen.insert(iv) {
            return false;
        }
        if self.arrivals.len() < CAPACITY {
            self.arrivals.push(iv);
        } else {
            let forgotten = mem::replace(&mut self.arrivals[self.oldest], iv);
            self.seen.remove(&forgotten);
            self.oldest = (self.oldest + 1) % CAPACITY;
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn iv(n: usize) -> Iv {
        let mut iv = Iv::default();
        iv[..8].copy_from_slice(&n.to_le_bytes());
        iv
    }

    #[test]
    fn remembers_the_last_4096_and_no_more() {
        let mut window = ReplayWindow::default();
        assert!((0..3 * CAPACITY).all(|n| window.insert(iv(n))));
        assert!((2 * CAPACITY..3 * CAPACITY).all(|n| !window.insert(iv(n))));
        assert_eq!((window.seen.len(), window.arrivals.len()), (CAPACITY, CAPACITY));
        assert!(window.insert(iv(2 * CAPACITY - 1)), "older than the window");
    }
}
