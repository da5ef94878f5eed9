//! What every local track of a call shares: whether the call is encrypted, our keys, and which of them seals now.

use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};

use super::media_keys::KeySource;
use crate::{
    frame_crypto::{CryptoFailed, KeyRing},
    key::{KeyIndex, MediaKey},
};

const NO_KEY: u16 = u16::MAX;

/// Our side of the call's encryption. The machine changes it; the media path reads it.
#[derive(Debug)]
pub struct Sealing {
    ring: KeyRing,
    current: AtomicU16,
    encrypted: AtomicBool,
}

impl Default for Sealing {
    fn default() -> Self {
        Self { ring: KeyRing::new(), current: AtomicU16::new(NO_KEY), encrypted: AtomicBool::new(false) }
    }
}

impl Sealing {
    /// Whether everything must be sealed. It never goes back to false during a call.
    #[must_use]
    pub fn is_encrypted(&self) -> bool {
        self.encrypted.load(Ordering::Acquire)
    }

    /// Our own keys.
    #[must_use]
    pub fn ring(&self) -> &KeyRing {
        &self.ring
    }

    /// The index of the key that seals now.
    #[must_use]
    pub fn current(&self) -> Option<KeyIndex> {
        u8::try_from(self.current.load(Ordering::Acquire)).ok().map(KeyIndex)
    }

    pub(crate) fn enable(&self) {
        self.encrypted.store(true, Ordering::Release);
    }

    /// Installs a key and seals with it from now on.
    pub(crate) fn switch_to(&self, index: KeyIndex, key: &MediaKey) -> Result<(), CryptoFailed> {
        self.ring.set(index, key)?;
        self.current.store(u16::from(index.0), Ordering::Release);
        Ok(())
    }

    /// Derives the key of a shared password and seals with it from now on. Takes 10 to 20 ms.
    pub(crate) fn switch_to_password(&self, password: &str) -> Result<(), CryptoFailed> {
        let index = KeySource::PASSWORD_INDEX;
        self.ring.set_password(index, password)?;
        self.current.store(u16::from(index.0), Ordering::Release);
        Ok(())
    }

    /// Wipes our keys. Nothing is sealed any more, and nothing is sent.
    pub(crate) fn clear(&self) {
        self.current.store(NO_KEY, Ordering::Release);
        self.ring.clear();
    }
}
