//! The keys of one sender.

use std::{
    collections::VecDeque,
    fmt,
    sync::{
        Arc, PoisonError, RwLock, RwLockReadGuard,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use zeroize::Zeroizing;

use super::{
    aead::{AES_KEY_LEN, Cipher},
    derive::{self, CryptoFailed},
    key::{self, Fingerprint, FrameKey},
};
use crate::key::{KeyIndex, MediaKey};

/// How long a superseded key is kept for frames that are still on their way.
pub const RETIRE_AFTER: Duration = Duration::from_secs(60);

/// Wiped keys whose use is remembered, per ring. A replay window takes up to 72 KiB. More keys than this do not come back,
/// as the key inbox keeps four per member.
const REMEMBERED: usize = 8;

/// The 256 key slots of one sender: our own, or a remote member's. Clones share the slots.
///
/// Old and new keys open side by side. A key that is overwritten, retired or cleared is wiped at once, but the ring
/// remembers its last 4096 opened frames and how many frames it sealed, for the last 8 such keys. If the same key
/// is installed again, recorded frames do not open a second time. So keep the ring of a member who leaves and may
/// come back.
#[derive(Clone, Default)]
pub struct KeyRing {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    slots: RwLock<Slots>,
    /// Grows after every change of the slots, so that an encryptor or decryptor can keep the key it found last.
    version: AtomicU64,
}

impl KeyRing {
    /// A ring without keys: nothing seals and nothing opens.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts `key` at `index`, in place of the key that was there (HKDF-SHA-256; MatrixRTC).
    ///
    /// Installing a key again, at the same index or another, continues its replay window and its budget of frames:
    /// a key message that is delivered twice does not open the door to replays.
    ///
    /// # Errors
    /// [`CryptoFailed`] if this machine cannot set up the key; the slot is unchanged.
    pub fn set(&self, index: KeyIndex, key: &MediaKey) -> Result<(), CryptoFailed> {
        let mut aes_key = Zeroizing::new([0; AES_KEY_LEN]);
        derive::hkdf(key.as_bytes(), aes_key.as_mut_slice())?;
        self.install(index, &aes_key)
    }

    /// Puts the key of a shared password at `index` (PBKDF2, 100 000 rounds). This blocks for 10 to 20 ms: call
    /// it off the media path.
    ///
    /// Everyone who knows the password can seal in anyone's name, and an SFU can present one member's frame as
    /// another's. One ring for all members opens such a frame once, but its replay window covers the last 4096
    /// frames of all members together; with a ring per member it covers 4096 of each.
    ///
    /// The limit of 2^32 frames applies to all devices with the password together, and across restarts. This ring
    /// counts its own frames only.
    ///
    /// # Errors
    /// [`CryptoFailed`] if this machine cannot set up the key; the slot is unchanged.
    pub fn set_password(&self, index: KeyIndex, password: &str) -> Result<(), CryptoFailed> {
        let mut aes_key = Zeroizing::new([0; AES_KEY_LEN]);
        derive::pbkdf2(password.as_bytes(), derive::SALT, aes_key.as_mut_slice());
        self.install(index, &aes_key)
    }

    /// Wipes every key, as when the member leaves.
    pub fn clear(&self) {
        self.change(Slots::clear);
    }

    /// The indices that hold a key, ascending.
    #[must_use]
    pub fn indices(&self) -> Vec<KeyIndex> {
        self.read().entries().map(|(index, _)| index).collect()
    }

    /// Frames sealed so far with the key at `index`, by all encryptors of this ring; 0 without a key.
    ///
    /// Sealing refuses after [`MAX_SEALED`](super::MAX_SEALED) frames. Rotate the key before.
    #[must_use]
    pub fn sealed(&self, index: KeyIndex) -> u64 {
        self.find(index).map_or(0, |key| key.sealed())
    }

    /// Wipes the keys that have been superseded for [`RETIRE_AFTER`], and returns their indices. To be called
    /// every few seconds; keys live longer by one such interval at most.
    ///
    /// A key is superseded while a key installed after it carries most of the frames. Counting frames, rather
    /// than waiting for the first frame under a newer key, keeps the key in use when an older one arrives late,
    /// and spares a key that was sent ahead of its use.
    pub fn retire(&self, now: Instant) -> Vec<KeyIndex> {
        self.change(|slots| slots.retire(now))
    }

    pub(super) fn find(&self, index: KeyIndex) -> Option<Arc<FrameKey>> {
        self.read().entries[usize::from(index.0)].as_ref().map(|entry| Arc::clone(&entry.key))
    }

    fn install(&self, index: KeyIndex, aes_key: &[u8; AES_KEY_LEN]) -> Result<(), CryptoFailed> {
        let cipher = Cipher::new(aes_key)?;
        self.change(|slots| slots.install(index, key::fingerprint(aes_key), cipher));
        Ok(())
    }

    // A panic while the lock is held leaves whole slots behind, so a poisoned lock is as good as any.
    fn read(&self) -> RwLockReadGuard<'_, Slots> {
        self.shared.slots.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn change<R>(&self, change: impl FnOnce(&mut Slots) -> R) -> R {
        let mut slots = self.shared.slots.write().unwrap_or_else(PoisonError::into_inner);
        let changed = change(&mut slots);
        self.shared.version.fetch_add(1, Ordering::Release);
        changed
    }
}

impl fmt::Debug for KeyRing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyRing").field("indices", &self.indices()).finish_non_exhaustive()
    }
}

/// Finds keys for one encryptor or decryptor. It keeps the last one, so that a frame under the same key as the
/// frame before costs one atomic load instead of a lock and a new reference.
///
/// The reference that it keeps does not keep the key alive: the ring wipes keys in place.
pub(super) struct KeyFinder {
    ring: KeyRing,
    last: Option<Found>,
}

struct Found {
    version: u64,
    index: KeyIndex,
    key: Arc<FrameKey>,
}

impl KeyFinder {
    pub(super) fn new(ring: KeyRing) -> Self {
        Self { ring, last: None }
    }

    #[inline]
    pub(super) fn find(&mut self, index: KeyIndex) -> Option<&FrameKey> {
        // Loaded before the slots are read: a change in between makes the next frame look again.
        let version = self.ring.shared.version.load(Ordering::Acquire);
        if self.last.as_ref().is_none_or(|last| (last.version, last.index) != (version, index)) {
            self.last = Some(Found { version, index, key: self.ring.find(index)? });
        }
        self.last.as_ref().map(|last| &*last.key)
    }
}

impl fmt::Debug for KeyFinder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.ring.fmt(f)
    }
}

struct Slots {
    entries: Box<[Option<Entry>; 256]>,
    /// Wiped keys, the one wiped last at the back.
    remembered: VecDeque<Arc<FrameKey>>,
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
    fn entries(&self) -> impl Iterator<Item = (KeyIndex, &Entry)> {
        let indices = (0..=u8::MAX).map(KeyIndex);
        indices.zip(self.entries.iter()).filter_map(|(index, slot)| Some((index, slot.as_ref()?)))
    }

    fn install(&mut self, index: KeyIndex, fingerprint: Fingerprint, cipher: Cipher) {
        let place = usize::from(index.0);
        if self.entries[place].as_ref().is_some_and(|entry| *entry.key.fingerprint() == fingerprint) {
            return;
        }
        let key = self.known(&fingerprint, cipher);
        self.installed += 1;
        let entry = Entry { counted: key.uses(), key, sequence: self.installed, superseded: None };
        if let Some(overwritten) = self.entries[place].replace(entry) {
            self.release(overwritten.key);
        }
    }

    /// The key with this fingerprint, with the memory of its use. Two slots with the same key share it, because
    /// the index of a frame is not authenticated: an SFU could replay a frame under the other index.
    fn known(&mut self, fingerprint: &Fingerprint, cipher: Cipher) -> Arc<FrameKey> {
        if let Some((_, entry)) = self.entries().find(|(_, entry)| entry.key.fingerprint() == fingerprint) {
            return Arc::clone(&entry.key);
        }
        let wiped = self.remembered.iter().position(|key| key.fingerprint() == fingerprint);
        match wiped.and_then(|place| self.remembered.remove(place)) {
            Some(key) => {
                key.restore(cipher);
                key
            }
            None => Arc::new(FrameKey::new(*fingerprint, cipher)),
        }
    }

    /// Wipes a key that was taken out of a slot, unless another slot has it too, and remembers its use.
    fn release(&mut self, key: Arc<FrameKey>) {
        if self.entries().any(|(_, entry)| Arc::ptr_eq(&entry.key, &key)) {
            return;
        }
        key.wipe();
        if key.uses() == 0 {
            return;
        }
        if self.remembered.len() == REMEMBERED {
            self.remembered.pop_front();
        }
        self.remembered.push_back(key);
    }

    fn clear(&mut self) {
        let mut entries: Vec<_> = self.entries.iter_mut().filter_map(Option::take).collect();
        // The newest are remembered.
        entries.sort_by_key(|entry| entry.sequence);
        for entry in entries {
            self.release(entry.key);
        }
    }

    fn retire(&mut self, now: Instant) -> Vec<KeyIndex> {
        let busiest = self.entries.iter_mut().flatten().filter_map(|entry| {
            let uses = entry.key.uses();
            let fresh = uses - std::mem::replace(&mut entry.counted, uses);
            (fresh > 0).then_some((fresh, entry.sequence))
        });
        if let Some((_, sequence)) = busiest.max() {
            self.current = sequence;
        }
        let in_use = self.entries().find(|(_, entry)| entry.sequence == self.current);
        let in_use = in_use.map(|(_, entry)| Arc::clone(&entry.key));
        let mut retired = Vec::new();
        for index in 0..=u8::MAX {
            let slot = &mut self.entries[usize::from(index)];
            let Some(entry) = slot else { continue };
            // A second slot with the key in use is in use: which of the two carries the frames is not counted.
            let superseded = entry.sequence < self.current
                && in_use.as_ref().is_none_or(|key| !Arc::ptr_eq(key, &entry.key));
            if !superseded {
                entry.superseded = None;
            } else if now.duration_since(*entry.superseded.get_or_insert(now)) >= RETIRE_AFTER
                && let Some(entry) = slot.take()
            {
                self.release(entry.key);
                retired.push(KeyIndex(index));
            }
        }
        retired
    }
}

impl Default for Slots {
    fn default() -> Self {
        Self {
            entries: Box::new([const { None }; 256]),
            remembered: VecDeque::new(),
            installed: 0,
            current: 0,
        }
    }
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "a test needs some point in time to start from")]
mod tests {
    use super::{
        super::{OpenError, TAG_LEN, iv::Iv},
        *,
    };

    const SECOND: Duration = Duration::from_secs(1);

    fn ring(indices: &[u8]) -> KeyRing {
        let ring = KeyRing::new();
        for index in indices {
            add(&ring, *index);
        }
        ring
    }

    fn add(ring: &KeyRing, index: u8) {
        set(ring, index, index);
    }

    fn set(ring: &KeyRing, index: u8, material: u8) {
        ring.set(KeyIndex(index), &MediaKey::new(vec![material; 16]).unwrap()).unwrap();
    }

    fn find(ring: &KeyRing, index: u8) -> Arc<FrameKey> {
        ring.find(KeyIndex(index)).unwrap()
    }

    /// Opens frames under the key at `index`, with IVs that the key has not seen.
    fn use_key(ring: &KeyRing, index: u8, times: u64) {
        let key = find(ring, index);
        for n in key.uses()..key.uses() + times {
            let mut iv = [0; 12];
            iv[..8].copy_from_slice(&n.to_be_bytes());
            assert_eq!(open(&key, iv), Ok(()));
        }
    }

    fn open(key: &FrameKey, iv: Iv) -> Result<(), OpenError> {
        let mut tag = [0; TAG_LEN];
        key.seal(KeyIndex(0), iv, &[], &[], &mut [], &mut tag).unwrap();
        key.open(KeyIndex(0), iv, &[], &[], &tag, &mut [])
    }

    #[test]
    fn every_index_holds_a_key() {
        let ring = ring(&(0..=255).collect::<Vec<_>>());
        assert_eq!(ring.indices(), (0..=255).map(KeyIndex).collect::<Vec<_>>());
        ring.clear();
        assert_eq!(ring.indices(), []);
    }

    #[test]
    fn superseded_key_is_wiped_after_a_minute() {
        let (ring, start) = (ring(&[3, 4]), Instant::now());
        let old = find(&ring, 3);
        use_key(&ring, 3, 9);
        assert_eq!(ring.retire(start), []);
        assert_eq!(ring.retire(start + 3600 * SECOND), [], "an unused successor supersedes nothing");
        use_key(&ring, 4, 1);
        let takeover = start + 3601 * SECOND;
        assert_eq!(ring.retire(takeover), []);
        assert_eq!(ring.retire(takeover + RETIRE_AFTER - SECOND), []);
        assert!(!old.is_wiped());
        assert_eq!(ring.retire(takeover + RETIRE_AFTER), [KeyIndex(3)]);
        assert!(old.is_wiped());
        assert_eq!(ring.indices(), [KeyIndex(4)]);
    }

    #[test]
    fn key_that_arrives_late_does_not_supersede_the_one_in_use() {
        let (ring, start) = (ring(&[5]), Instant::now());
        use_key(&ring, 5, 10);
        ring.retire(start);
        add(&ring, 4);
        for second in 1..200 {
            use_key(&ring, 4, 1); // late frames under the old key
            use_key(&ring, 5, 10);
            assert_eq!(ring.retire(start + second * SECOND), []);
        }
    }

    #[test]
    fn restart_at_index_zero_supersedes_a_higher_index() {
        let (ring, start) = (ring(&[7]), Instant::now());
        use_key(&ring, 7, 10);
        ring.retire(start);
        add(&ring, 0);
        use_key(&ring, 0, 1);
        ring.retire(start + SECOND);
        assert_eq!(ring.retire(start + SECOND + RETIRE_AFTER), [KeyIndex(7)]);
    }

    #[test]
    fn restored_key_is_not_taken_for_busy() {
        let (ring, start) = (ring(&[1]), Instant::now());
        use_key(&ring, 1, 100);
        ring.clear();
        add(&ring, 2);
        use_key(&ring, 2, 1);
        add(&ring, 1);
        ring.retire(start);
        use_key(&ring, 2, 1);
        assert_eq!(ring.retire(start + 2 * RETIRE_AFTER), []);
        assert_eq!(ring.indices(), [1, 2].map(KeyIndex));
    }

    #[test]
    fn same_key_in_two_slots_is_retired_from_neither() {
        let (ring, start) = (ring(&[1, 3]), Instant::now());
        set(&ring, 2, 1);
        use_key(&ring, 2, 5);
        ring.retire(start);
        assert_eq!(ring.retire(start + 2 * RETIRE_AFTER), [KeyIndex(3)]);
        assert!(!find(&ring, 1).is_wiped());
    }

    #[test]
    fn same_key_again_changes_nothing_and_another_key_replaces() {
        let ring = ring(&[1]);
        let first = find(&ring, 1);
        add(&ring, 1);
        assert_eq!(find(&ring, 1).id(), first.id());
        assert!(!first.is_wiped());
        set(&ring, 1, 99);
        assert_ne!(find(&ring, 1).id(), first.id());
        assert!(first.is_wiped());
    }

    #[test]
    fn key_in_two_slots_is_wiped_with_the_second() {
        let ring = ring(&[1]);
        set(&ring, 2, 1);
        let key = find(&ring, 1);
        set(&ring, 1, 99);
        assert!(!key.is_wiped());
        set(&ring, 2, 99);
        assert!(key.is_wiped());
    }

    #[test]
    fn wiped_keys_are_remembered_up_to_a_limit() {
        let (ring, keys) = (KeyRing::new(), 2 * REMEMBERED as u8);
        for material in 0..keys {
            set(&ring, 0, material);
            use_key(&ring, 0, 1);
        }
        ring.clear();
        assert_eq!(ring.read().remembered.len(), REMEMBERED);
        set(&ring, 0, keys - 1);
        assert_eq!(open(&find(&ring, 0), [0; 12]), Err(OpenError::Replayed(KeyIndex(0))));
        set(&ring, 0, 0);
        assert_eq!(open(&find(&ring, 0), [0; 12]), Ok(()), "forgotten");
    }

    #[test]
    fn newest_keys_are_remembered_by_clear() {
        let ring = KeyRing::new();
        for index in (0..=u8::MAX).rev() {
            add(&ring, index);
            use_key(&ring, index, 1);
        }
        ring.clear();
        add(&ring, 0);
        assert_eq!(find(&ring, 0).uses(), 1, "installed last, at the lowest index");
    }

    #[test]
    fn unused_keys_push_no_used_key_out_of_memory() {
        let ring = ring(&[1]);
        use_key(&ring, 1, 1);
        for material in 10..200 {
            set(&ring, 1, material);
        }
        add(&ring, 1);
        assert_eq!(find(&ring, 1).uses(), 1);
    }

    #[test]
    fn kept_lookup_sees_every_change() {
        let ring = ring(&[1]);
        let mut finder = KeyFinder::new(ring.clone());
        let first = finder.find(KeyIndex(1)).unwrap().id();
        assert_eq!(finder.find(KeyIndex(1)).unwrap().id(), first);
        set(&ring, 1, 99);
        let second = finder.find(KeyIndex(1)).unwrap().id();
        assert_ne!(second, first);
        assert!(finder.find(KeyIndex(2)).is_none());
        add(&ring, 2);
        assert!(finder.find(KeyIndex(2)).is_some());
        ring.clear();
        assert!(finder.find(KeyIndex(2)).is_none() && finder.find(KeyIndex(1)).is_none());
    }
}
