//! One key of a ring, ready for use.

use std::{
    fmt,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use aws_lc_rs::{
    aead::{AES_128_GCM, Aad, LessSafeKey, Nonce, UnboundKey},
    digest,
};
use zeroize::Zeroizing;

use super::{TAG_LEN, derive::CryptoFailed, iv::Iv, replay::ReplayWindow, seal::SealError};

/// Length of the AES key; native and Go clients know no other.
pub(super) const AES_KEY_LEN: usize = 16;

/// Frames one key may seal, over all encryptors that use it: the bound of NIST SP 800-38D §8.3.
pub(super) const MAX_SEALED: u64 = 1 << 32;

/// An expanded AES-GCM key and what is remembered about its use. AWS-LC wipes the key schedule when it frees it,
/// so the key is gone with the last reference.
pub(super) struct FrameKey {
    id: u64,
    fingerprint: Fingerprint,
    aead: LessSafeKey,
    opened: Arc<Mutex<ReplayWindow>>,
    uses: AtomicU64,
    sealed: AtomicU64,
}

/// Tells equal keys from different ones without keeping them.
pub(super) type Fingerprint = [u8; 32];

impl FrameKey {
    /// `opened` lets two slots that hold the same key share one memory of what was opened: the index is not
    /// authenticated, so an SFU could otherwise replay a frame under the other index.
    pub(super) fn new(
        aes_key: &[u8; AES_KEY_LEN],
        opened: Arc<Mutex<ReplayWindow>>,
    ) -> Result<Self, CryptoFailed> {
        static NEXT_ID: AtomicU64 = AtomicU64::new(0);
        let aead = UnboundKey::new(&AES_128_GCM, aes_key).map_err(|_| CryptoFailed)?;
        Ok(Self {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            fingerprint: fingerprint(aes_key),
            aead: LessSafeKey::new(aead),
            opened,
            uses: AtomicU64::new(0),
            sealed: AtomicU64::new(0),
        })
    }

    /// Unlike an address, never given to a second key.
    pub(super) fn id(&self) -> u64 {
        self.id
    }

    pub(super) fn fingerprint(&self) -> &Fingerprint {
        &self.fingerprint
    }

    pub(super) fn opened(&self) -> &Arc<Mutex<ReplayWindow>> {
        &self.opened
    }

    /// Frames sealed and frames opened so far.
    pub(super) fn uses(&self) -> u64 {
        self.uses.load(Ordering::Relaxed)
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

    /// Seals `plain` into `sealed`, which is 16 bytes longer.
    pub(super) fn seal(
        &self,
        iv: Iv,
        aad: &[u8],
        plain: &[u8],
        sealed: &mut [u8],
    ) -> Result<(), CryptoFailed> {
        let (ciphertext, tag) = sealed.split_at_mut_checked(plain.len()).ok_or(CryptoFailed)?;
        let nonce = Nonce::assume_unique_for_key(iv);
        self.aead
            .seal_out_of_place_scatter(nonce, Aad::from(aad), plain, ciphertext, &[], tag)
            .map_err(|_| CryptoFailed)?;
        self.uses.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Opens `sealed` into `plain`, which is 16 bytes shorter, and remembers the IV.
    pub(super) fn open(&self, iv: Iv, aad: &[u8], sealed: &[u8], plain: &mut [u8]) -> Result<(), Refused> {
        let (ciphertext, tag) =
            sealed.split_at_checked(sealed.len().saturating_sub(TAG_LEN)).ok_or(Refused::Unauthentic)?;
        let nonce = Nonce::assume_unique_for_key(iv);
        self.aead
            .open_separate_gather(nonce, Aad::from(aad), ciphertext, tag, plain)
            .map_err(|_| Refused::Unauthentic)?;
        // Only now: an IV that was never authenticated must not push out one that was.
        if !self.opened.lock().unwrap_or_else(PoisonError::into_inner).insert(iv) {
            return Err(Refused::Replayed);
        }
        self.uses.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

impl fmt::Debug for FrameKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("FrameKey(redacted)")
    }
}

/// Why a key did not give a plaintext.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refused {
    Unauthentic,
    Replayed,
}

pub(super) fn fingerprint(aes_key: &[u8; AES_KEY_LEN]) -> Fingerprint {
    const LABEL: &[u8; 22] = b"Antiphon frame key id:";
    let mut input = Zeroizing::new([0; LABEL.len() + AES_KEY_LEN]);
    input[..LABEL.len()].copy_from_slice(LABEL);
    input[LABEL.len()..].copy_from_slice(aes_key);
    let mut output = [0; 32];
    output.copy_from_slice(digest::digest(&digest::SHA256, input.as_slice()).as_ref());
    output
}
