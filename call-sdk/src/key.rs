//! Media keys and their indices. One sender's frames are sealed under that sender's keys.

use std::fmt;

use zeroize::{Zeroize, ZeroizeOnDrop};

/// Position of a key in the ring of its sender, and the last byte of every frame sealed with it (0..=255).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyIndex(pub u8);

impl KeyIndex {
    /// The next index; 0 follows 255.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0.wrapping_add(1))
    }
}

/// Raw media key material of 16 to 64 bytes: 16 in deployed clients, 32 in MSC4195. Wiped on drop, redacted in `Debug`.
#[derive(Clone, PartialEq, Eq, Zeroize, ZeroizeOnDrop)]
pub struct MediaKey(Vec<u8>);

impl MediaKey {
    /// Takes key material of 16 to 64 bytes. Refused bytes are wiped too.
    ///
    /// # Errors
    /// [`BadKeyLength`] for any other length.
    pub fn new(mut bytes: Vec<u8>) -> Result<Self, BadKeyLength> {
        match bytes.len() {
            16..=64 => Ok(Self(bytes)),
            length => {
                bytes.zeroize();
                Err(BadKeyLength(length))
            }
        }
    }

    /// The raw bytes, for derivation and for the key message.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for MediaKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MediaKey(redacted)")
    }
}

/// Key material of an unusable length, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the sender's media key has {0} bytes; a media key has 16 to 64")]
pub struct BadKeyLength(pub usize);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_output_has_no_key_byte() {
        let key = MediaKey::new(vec![0xab; 16]).unwrap();
        assert_eq!(format!("{key:?}"), "MediaKey(redacted)");
    }

    #[test]
    fn key_length_is_16_to_64_bytes() {
        assert_eq!(MediaKey::new(vec![1; 15]).unwrap_err(), BadKeyLength(15));
        assert_eq!(MediaKey::new(vec![1; 65]).unwrap_err(), BadKeyLength(65));
        assert!(MediaKey::new(vec![1; 16]).is_ok() && MediaKey::new(vec![1; 64]).is_ok());
    }

    #[test]
    fn index_wraps() {
        assert_eq!(KeyIndex(255).next(), KeyIndex(0));
    }
}
