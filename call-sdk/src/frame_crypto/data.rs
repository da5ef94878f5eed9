//! Data packets (LiveKit's `EncryptedPacket`): the same keys as media, no clear bytes, the IV in a field of its own.

use std::fmt;

use super::{
    TAG_LEN,
    iv::{Iv, IvSource},
    key::Refused,
    open::OpenError,
    ring::KeyRing,
    seal::SealError,
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
    /// Where the sender's key is.
    pub index: KeyIndex,
    /// Ciphertext and tag.
    pub value: Vec<u8>,
}

/// Seals our data packets.
pub struct DataEncryptor {
    ring: KeyRing,
    ivs: IvSource,
}

impl DataEncryptor {
    /// An encryptor with the keys of `ring`: our own ring.
    #[must_use]
    pub fn new(ring: KeyRing) -> Self {
        Self { ring, ivs: IvSource::default() }
    }

    /// Seals `plain`, an encoded `EncryptedPacketPayload`, under the key at `index`.
    ///
    /// # Errors
    /// A [`SealError`]: the packet must not be sent.
    pub fn seal(&mut self, index: KeyIndex, plain: &[u8]) -> Result<SealedData, SealError> {
        let key = self.ring.find(index).ok_or(SealError::MissingKey(index))?;
        let iv = self.ivs.next(&key)?;
        let mut value = vec![0; plain.len() + TAG_LEN];
        key.seal(iv, &[], plain, &mut value)?;
        Ok(SealedData { iv, index, value })
    }

    #[cfg(test)]
    pub(super) fn start_ivs_at(&mut self, index: KeyIndex, first: Iv) {
        let key = self.ring.find(index).unwrap();
        self.ivs = IvSource::starting_at(&key, first);
    }
}

impl fmt::Debug for DataEncryptor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DataEncryptor").field("ring", &self.ring).finish_non_exhaustive()
    }
}

/// Opens the data packets of one member. A replay is dropped, also one of the member's media frames.
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

    /// Opens a packet from its fields. The packet's `encryption_type` is not asked for: deployed clients leave it
    /// at "none" on packets they did encrypt.
    ///
    /// # Errors
    /// An [`OpenError`]: the packet must be dropped.
    pub fn open(&self, iv: &[u8], index: KeyIndex, value: &[u8]) -> Result<Vec<u8>, OpenError> {
        let iv = Iv::try_from(iv).map_err(|_| OpenError::NotSealed)?;
        let key = self.ring.find(index).ok_or(OpenError::MissingKey(index))?;
        let plain_len = value.len().checked_sub(TAG_LEN).ok_or(OpenError::TooShort(value.len()))?;
        let mut plain = vec![0; plain_len];
        match key.open(iv, &[], value, &mut plain) {
            Ok(()) => Ok(plain),
            Err(Refused::Unauthentic) => Err(OpenError::Unauthentic(index)),
            Err(Refused::Replayed) => Err(OpenError::Replayed(index)),
        }
    }
}
