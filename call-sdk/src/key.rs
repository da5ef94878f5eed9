//! A media key and its index: the secret that one sender's frames are sealed with.

use std::fmt;

use zeroize::{Zeroize, ZeroizeOnDrop};

/// Where a key sits in the key ring of its sender, and the last byte of every frame sealed with it (0..=255).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyIndex(pub u8);

impl KeyIndex {
    /// The index after this one; 0 follows 255.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0.wrapping_add(1))
    }
}

/// Raw media key material: 16 bytes (deployed clients) or 32 bytes (MSC4143). Wiped on drop, redacted in `Debug`.
#[derive(Clone, PartialEq, Eq, Zeroize, ZeroizeOnDrop)]
pub struct MediaKey(Vec<u8>);

impl MediaKey {
    /// Takes key material of 16 or 32 bytes; anything else is refused.
    ///
    /// # Errors
    /// [`BadKeyLength`] with the length that was offered.
    pub fn new(mut bytes: Vec<u8>) -> Result<Self, BadKeyLength> {
        match bytes.len() {
            16 | 32 => Ok(Self(bytes)),
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

/// A key message carried key material of an unusable length.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a media key must have 16 or 32 bytes, the sender's has {0}")]
pub struct BadKeyLength(pub usize);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_shows_no_key_byte() {
        let key = MediaKey::new(vec![0xab; 16]).unwrap();
        assert_eq!(format!("{key:?}"), "MediaKey(redacted)");
    }

    #[test]
    fn only_two_lengths_are_keys() {
        assert_eq!(MediaKey::new(vec![1; 15]).unwrap_err(), BadKeyLength(15));
        assert!(MediaKey::new(vec![1; 16]).is_ok() && MediaKey::new(vec![1; 32]).is_ok());
    }

    #[test]
    fn indices_wrap() {
        assert_eq!(KeyIndex(255).next(), KeyIndex(0));
    }
}
