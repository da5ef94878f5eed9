//! From key material to an AES key, as every LiveKit client derives it.

use std::num::NonZeroU32;

use aws_lc_rs::{hkdf, pbkdf2};

/// The salt of both derivations. LiveKit calls it the ratchet salt; every deployed client uses this value.
pub(super) const SALT: &[u8] = b"LKFrameEncryptionKey";

/// 128 zero bytes. Not in any document: an empty info, which the text suggests, interoperates with nobody.
const HKDF_INFO: [u8; 128] = [0; 128];

const PBKDF2_ITERATIONS: NonZeroU32 = NonZeroU32::new(100_000).unwrap();

/// Derives `out` from raw key material; the way of MatrixRTC.
pub(super) fn hkdf(material: &[u8], out: &mut [u8]) -> Result<(), CryptoFailed> {
    let key = hkdf::Salt::new(hkdf::HKDF_SHA256, SALT).extract(material);
    key.expand(&[&HKDF_INFO], OutputLength(out.len()))
        .and_then(|output| output.fill(out))
        .map_err(|_| CryptoFailed)
}

/// Derives `out` from a password; takes 10 to 20 ms of one core.
pub(super) fn pbkdf2(password: &[u8], salt: &[u8], out: &mut [u8]) {
    pbkdf2::derive(pbkdf2::PBKDF2_HMAC_SHA256, PBKDF2_ITERATIONS, salt, password, out);
}

struct OutputLength(usize);

impl hkdf::KeyType for OutputLength {
    fn len(&self) -> usize {
        self.0
    }
}

/// The cryptographic library failed on valid input: this machine is out of memory or of randomness.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "this machine's cryptographic library failed on valid input; it may be out of memory or of randomness"
)]
pub struct CryptoFailed;
