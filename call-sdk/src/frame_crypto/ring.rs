//! The keys of one sender.

use std::{
    fmt,
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
    time::{Duration, Instant},
};

use zeroize::Zeroizing;

use super::{
    derive::{self, CryptoFailed},
    key::{self, AES_KEY_LEN, FrameKey},
};
use crate::key::{KeyIndex, MediaKey};

/// How long a superseded key is kept for frames that are still on their way.
pub const RETIRE_AFTER: Duration = Duration::from_secs(60);

/// The 256 key slots of one sender: our own, or a remote member's. Clones share the slots.
///
/// Old and new keys open side by side. Looking a key up takes a read lock and clones one reference; nothing is
/// derived on the media path.
#[derive(Clone, Default)]
pub struct KeyRing {
    slots: Arc<RwLock<Slots>>,
}

impl KeyRing {
    /// A ring without keys: nothing seals and nothing opens.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts `key` at `index` (HKDF-SHA-256; MatrixRTC), over what was there.
    ///
    /// Putting the same key where it already is changes nothing, so a key message that is delivered twice does
    /// not reopen the door to replays.
    ///
    /// # Errors
    /// [`CryptoFailed`] if this machine cannot set up the key; the slot is as before.
    pub fn set(&self, index: KeyIndex, key: &MediaKey) -> Result<(), CryptoFailed> {
        let mut aes_key = Zeroizing::new([0; AES_KEY_LEN]);
        derive::hkdf(key.as_bytes(), aes_key.as_mut_slice())?;
        self.install(index, &aes_key)
    }

    /// Puts the key of a shared password at `index` (PBKDF2, 100 000 rounds). This blocks for 10 to 20 ms: call
    /// it off the media path.
    ///
    /// All who know the password can seal as any other who knows it.
    ///
    /// # Errors
    /// [`CryptoFailed`] if this machine cannot set up the key; the slot is as before.
    pub fn set_password(&self, index: KeyIndex, password: &str) -> Result<(), CryptoFailed> {
        let mut aes_key = Zeroizing::new([0; AES_KEY_LEN]);
        derive::pbkdf2(password.as_bytes(), derive::SALT, aes_key.as_mut_slice());
        self.install(index, &aes_key)
    }

    /// Forgets every key, as when the member leaves.
    pub fn clear(&self) {
        self.write().entries.fill_with(|| None);
    }

    /// The indices that hold a key, ascending.
    #[must_use]
    pub fn indices(&self) -> Vec<KeyIndex> {
        (0..=u8::MAX)
            .zip(self.read().entries.iter())
            .filter_map(|(index, entry)| entry.as_ref().map(|_| KeyIndex(index)))
            .collect()
    }

    /// Wipes the keys that have been superseded for [`RETIRE_AFTER`], and returns their indices. To be called
    /// every few seconds; keys live longer by one such interval at most.
    ///
    /// A key is superseded while a key installed after it carries most of the frames. Counting frames, rather
    /// than waiting for the first frame under a newer key, keeps the key in use when an older one arrives late,
    /// and leaves a key alone that was sent ahead of its use.
    pub fn retire(&self, now: Instant) -> Vec<KeyIndex> {
        self.write().retire(now)
    }

    pub(super) fn find(&self, index: KeyIndex) -> Option<Arc<FrameKey>> {
        self.read().entries[usize::from(index.0)].as_ref().map(|entry| Arc::clone(&entry.key))
    }

    fn install(&self, index: KeyIndex, aes_key: &[u8; AES_KEY_LEN]) -> Result<(), CryptoFailed> {
        let fingerprint = key::fingerprint(aes_key);
        let mut slots = self.write();
        let place = usize::from(index.0);
        if slots.entries[place].as_ref().is_some_and(|entry| *entry.key.fingerprint() == fingerprint) {
            return Ok(());
        }
        let same_key = slots.entries.iter().flatten().find(|entry| *entry.key.fingerprint() == fingerprint);
        let opened = same_key.map(|entry| Arc::clone(entry.key.opened())).unwrap_or_default();
        let key = Arc::new(FrameKey::new(aes_key, opened)?);
        slots.installed += 1;
        let sequence = slots.installed;
        slots.entries[place] = Some(Entry { key, sequence, counted: 0, superseded: None });
        Ok(())
    }

    // A panic while the lock is held leaves whole slots behind, so a poisoned lock is as good as any.
    fn read(&self) -> RwLockReadGuard<'_, Slots> {
        self.slots.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Slots> {
        self.slots.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for KeyRing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyRing").field("indices", &self.indices()).finish_non_exhaustive()
    }
}

struct Slots {
    entries: Box<[Option<Entry>; 256]>,
    /// Keys installed so far.
    installed: u64,
    /// Sequence number of the key that carried most frames between the last calls of `retire`.
    current: u64,
}

struct Entry {
    key: Arc<FrameKey>,
    /// Its place in the order of installation.
    sequence: u64,
    /// Uses up to the last call of `retire`.
    counted: u64,
    superseded: Option<Instant>,
}

impl Slots {
    fn retire(&mut self, now: Instant) -> Vec<KeyIndex> {
        let busiest = self.entries.iter_mut().flatten().filter_map(|entry| {
            let uses = entry.key.uses();
            let fresh = uses - std::mem::replace(&mut entry.counted, uses);
            (fresh > 0).then_some((fresh, entry.sequence))
        });
        if let Some((_, sequence)) = busiest.max() {
            self.current = sequence;
        }
        let mut retired = Vec::new();
        for (index, slot) in (0..=u8::MAX).zip(self.entries.iter_mut()) {
            let Some(entry) = slot else { continue };
            if entry.sequence >= self.current {
                entry.superseded = None;
            } else if now.duration_since(*entry.superseded.get_or_insert(now)) >= RETIRE_AFTER {
                *slot = None;
                retired.push(KeyIndex(index));
            }
        }
        retired
    }
}

impl Default for Slots {
    fn default() -> Self {
        Self { entries: Box::new([const { None }; 256]), installed: 0, current: 0 }
    }
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "a test needs some point in time to start from")]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn ring(indices: &[u8]) -> KeyRing {
        let ring = KeyRing::new();
        for index in indices {
            add(&ring, *index);
        }
        ring
    }

    fn add(ring: &KeyRing, index: u8) {
        ring.set(KeyIndex(index), &MediaKey::new(vec![index; 16]).unwrap()).unwrap();
    }

    fn use_key(ring: &KeyRing, index: u8, times: u8) {
        let key = ring.find(KeyIndex(index)).unwrap();
        for n in 0..times {
            key.seal([n; 12], &[], &[], &mut [0; 16]).unwrap();
        }
    }

    #[test]
    fn every_index_holds_a_key() {
        let ring = ring(&(0..=255).collect::<Vec<_>>());
        assert_eq!(ring.indices(), (0..=255).map(KeyIndex).collect::<Vec<_>>());
        ring.clear();
        assert_eq!(ring.indices(), []);
    }

    #[test]
    fn a_key_is_wiped_a_minute_after_its_successor_took_over() {
        let (ring, start) = (ring(&[3, 4]), Instant::now());
        let old = Arc::downgrade(&ring.find(KeyIndex(3)).unwrap());
        use_key(&ring, 3, 9);
        assert_eq!(ring.retire(start), []);
        assert_eq!(ring.retire(start + 3600 * SECOND), [], "an unused successor supersedes nothing");
        use_key(&ring, 4, 1);
        let takeover = start + 3601 * SECOND;
        assert_eq!(ring.retire(takeover), []);
        assert_eq!(ring.retire(takeover + RETIRE_AFTER - SECOND), []);
        assert!(old.upgrade().is_some());
        assert_eq!(ring.retire(takeover + RETIRE_AFTER), [KeyIndex(3)]);
        assert!(old.upgrade().is_none(), "no reference keeps the key alive");
        assert_eq!(ring.indices(), [KeyIndex(4)]);
    }

    #[test]
    fn a_key_that_arrives_late_does_not_supersede_the_one_in_use() {
        let (ring, start) = (ring(&[5]), Instant::now());
        use_key(&ring, 5, 10);
        ring.retire(start);
        add(&ring, 4);
        for second in 1..200 {
            use_key(&ring, 4, 1); // frames of the old key, trickling in
            use_key(&ring, 5, 10);
            assert_eq!(ring.retire(start + second * SECOND), []);
        }
    }

    #[test]
    fn a_restart_at_index_zero_supersedes_a_higher_index() {
        let (ring, start) = (ring(&[7]), Instant::now());
        use_key(&ring, 7, 10);
        ring.retire(start);
        add(&ring, 0);
        use_key(&ring, 0, 1);
        ring.retire(start + SECOND);
        assert_eq!(ring.retire(start + SECOND + RETIRE_AFTER), [KeyIndex(7)]);
    }

    #[test]
    fn the_same_key_again_changes_nothing_and_another_key_replaces() {
        let ring = ring(&[1]);
        let first = ring.find(KeyIndex(1)).unwrap().id();
        add(&ring, 1);
        assert_eq!(ring.find(KeyIndex(1)).unwrap().id(), first);
        ring.set(KeyIndex(1), &MediaKey::new(vec![99; 32]).unwrap()).unwrap();
        assert_ne!(ring.find(KeyIndex(1)).unwrap().id(), first);
    }
}
