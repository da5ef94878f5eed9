//! One key of a ring, and what is remembered about its use.

use std::{
    fmt,
    sync::{
        PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
};

use super::{
    TAG_LEN,
    aead::{AES_KEY_LEN, Cipher},
    derive,
    error::{OpenError, SealError},
    iv::Iv,
    replay::ReplayWindow,
};
use crate::key::KeyIndex;

/// Frames that one key may seal, over all encryptors that use it: the limit of NIST SP 800-38D §8.3 for random
/// IVs. A rotation has to come before ([`KeyRing::sealed`](super::KeyRing::sealed)).
pub const MAX_SEALED: u64 = 1 << 32;

/// A key, and the memory of its use. The memory outlives the key: [`FrameKey::wipe`] takes the key away, and
/// [`FrameKey::restore`] continues with the same budget and the same replay window.
pub(super) struct FrameKey {
    id: u64,
    fingerprint: Fingerprint,
    state: RwLock<State>,
    sealed: AtomicU64,
}

/// One lock for both: opening a frame takes it once. Frames under one key are opened one at a time, and sealed
/// side by side.
struct State {
    /// `None` after a wipe.
    cipher: Option<Cipher>,
    window: ReplayWindow,
}

/// Tells equal keys from different ones without keeping them.
pub(super) type Fingerprint = [u8; 32];

impl FrameKey {
    pub(super) fn new(fingerprint: Fingerprint, cipher: Cipher) -> Self {
        static NEXT_ID: AtomicU64 = AtomicU64::new(0);
        Self {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            fingerprint,
            state: RwLock::new(State { cipher: Some(cipher), window: ReplayWindow::default() }),
            sealed: AtomicU64::new(0),
        }
    }

    /// Unlike an address, never given to a second key.
    pub(super) fn id(&self) -> u64 {
        self.id
    }

    pub(super) fn fingerprint(&self) -> &Fingerprint {
        &self.fingerprint
    }

    /// Wipes the key, also for those who still hold a reference. Waits for a frame being sealed or opened.
    pub(super) fn wipe(&self) {
        self.write().cipher = None;
    }

    /// Puts the same key back after a wipe.
    pub(super) fn restore(&self, cipher: Cipher) {
        self.write().cipher = Some(cipher);
    }

    /// Frames sealed so far.
    pub(super) fn sealed(&self) -> u64 {
        self.sealed.load(Ordering::Relaxed).min(MAX_SEALED)
    }

    /// Frames sealed and frames opened so far.
    pub(super) fn uses(&self) -> u64 {
        self.sealed() + self.read().window.opened()
    }

    /// Takes one frame off the budget of this key.
    pub(super) fn spend(&self) -> Result<(), SealError> {
        if self.sealed.fetch_add(1, Ordering::Relaxed) < MAX_SEALED {
            Ok(())
        } else {
            Err(SealError::KeyExhausted)
        }
    }

    #[cfg(test)]
    pub(super) fn leave_budget(&self, frames: u64) {
        self.sealed.store(MAX_SEALED - frames, Ordering::Relaxed);
    }

    #[cfg(test)]
    pub(super) fn is_wiped(&self) -> bool {
        self.read().cipher.is_none()
    }

    /// Encrypts `plain` into `ciphertext`, which has the same length. `index` is where this key is, for the error.
    #[inline]
    pub(super) fn seal(
        &self,
        index: KeyIndex,
        iv: Iv,
        aad: &[u8],
        plain: &[u8],
        ciphertext: &mut [u8],
        tag: &mut [u8; TAG_LEN],
    ) -> Result<(), SealError> {
        let state = self.read();
        let cipher = state.cipher.as_ref().ok_or(SealError::MissingKey(index))?;
        Ok(cipher.seal(iv, aad, plain, ciphertext, tag)?)
    }

    /// Decrypts `ciphertext` into `plain`, which has the same length, and remembers the IV. After an error `plain`
    /// must not be used: a replayed frame was decrypted before it was recognised.
    #[inline]
    pub(super) fn open(
        &self,
        index: KeyIndex,
        iv: Iv,
        aad: &[u8],
        ciphertext: &[u8],
        tag: &[u8; TAG_LEN],
        plain: &mut [u8],
    ) -> Result<(), OpenError> {
        let mut state = self.write();
        let State { cipher, window } = &mut *state;
        let cipher = cipher.as_ref().ok_or(OpenError::MissingKey(index))?;
        cipher.open(iv, aad, ciphertext, tag, plain).map_err(|_| OpenError::Unauthentic(index))?;
        // Only now: an IV that was never authenticated must not push out one that was.
        if window.insert(iv) { Ok(()) } else { Err(OpenError::Replayed(index)) }
    }

    // A panic while the lock is held leaves a whole state behind, so a poisoned lock is as good as any.
    fn read(&self) -> std::sync::RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for FrameKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("FrameKey(redacted)")
    }
}

pub(super) fn fingerprint(aes_key: &[u8; AES_KEY_LEN]) -> Fingerprint {
    derive::sha256(&[b"Antiphon frame key id:", aes_key])
}
