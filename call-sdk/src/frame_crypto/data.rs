//! Data packets (LiveKit's `EncryptedPacket`): the same keys as media, no clear bytes, the IV in a separate field.

use std::fmt;

use super::{
    TAG_LEN,
    error::{OpenError, SealError},
    iv::Iv,
    iv_source::IvSource,
    ring::{KeyFinder, KeyRing},
};
use crate::key::KeyIndex;

/// The fields of one sealed data packet.
///
/// On the wire they are `EncryptedPacket{iv, key_index, encrypted_value}`. Identity, destination and sequence
/// number travel outside and are not bound to the packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SealedData {
    /// The initialisation vector.
    pub iv: [u8; 12],
    /// Index of the sender's key.
    pub index: KeyIndex,
    /// Ciphertext and tag.
    pub value: Vec<u8>,
}

/// Seals our data packets.
pub struct DataEncryptor {
    keys: KeyFinder,
    ivs: IvSource,
}

impl DataEncryptor {
    /// An encryptor with the keys of `ring`: our own ring.
    #[must_use]
    pub fn new(ring: KeyRing) -> Self {
        Self { keys: KeyFinder::new(ring), ivs: IvSource::default() }
    }

    /// Seals `plain`, an encoded `EncryptedPacketPayload`, under the key at `index`.
    ///
    /// # Errors
    /// A [`SealError`]: drop the packet.
    pub fn seal(&mut self, index: KeyIndex, plain: &[u8]) -> Result<SealedData, SealError> {
        let key = self.keys.find(index).ok_or(SealError::MissingKey(index))?;
        let iv = self.ivs.next(key)?;
        let mut value = Vec::with_capacity(plain.len() + TAG_LEN);
        value.resize(plain.len(), 0);
        let mut tag = [0; TAG_LEN];
        key.seal(index, iv, &[], plain, &mut value, &mut tag)?;
        value.extend_from_slice(&tag);
        Ok(SealedData { iv, index, value })
    }

    #[cfg(test)]
    pub(super) fn start_ivs_at(&mut self, index: KeyIndex, first: Iv) {
        self.ivs = IvSource::starting_at(self.keys.find(index).unwrap(), first);
    }
}

impl fmt::Debug for DataEncryptor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DataEncryptor").field("ring", &self.keys).finish_non_exhaustive()
    }
}

/// Opens the data packets of one member. Replays are recognised, also across data and media of the member.
#[derive(Debug)]
pub struct DataDecryptor {
    ring: KeyRing,
}

impl DataDecryptor {
    /// A decryptor with the keys of `ring`: the sender's ring.
    #[must_use]
    pub fn new(ring: KeyRing) -> Self {
        Self { ring }
    }

    /// Opens a packet from its fields. The packet's `encryption_type` does not matter: deployed clients leave it at
    /// "none" on packets that they encrypt.
    ///
    /// # Errors
    /// An [`OpenError`]: drop the packet.
    pub fn open(&self, iv: &[u8], index: KeyIndex, value: &[u8]) -> Result<Vec<u8>, OpenError> {
        let iv = Iv::try_from(iv).map_err(|_| OpenError::NotSealed)?;
        let key = self.ring.find(index).ok_or(OpenError::MissingKey(index))?;
        let (ciphertext, tag) = value.split_last_chunk().ok_or(OpenError::TooShort(value.len()))?;
        let mut plain = vec![0; ciphertext.len()];
        key.open(index, iv, &[], ciphertext, tag, &mut plain)?;
        Ok(plain)
    }
}
