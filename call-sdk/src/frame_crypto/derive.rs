//! From key material to an AES key, as every LiveKit client derives it. The same code with either cipher backend.

use hkdf::Hkdf;
use sha2::{Digest as _, Sha256};

/// The salt of both derivations. LiveKit calls it the ratchet salt; every deployed client uses this value.
pub(super) const SALT: &[u8] = b"LKFrameEncryptionKey";

/// 128 zero bytes, observed in livekit-client. No document states it, and an empty info does not interoperate.
const HKDF_INFO: [u8; 128] = [0; 128];

const PBKDF2_ROUNDS: u32 = 100_000;

/// Derives `out` (at most 8160 bytes) from raw key material with HKDF-SHA-256, as MatrixRTC does.
pub(super) fn hkdf(material: &[u8], out: &mut [u8]) -> Result<(), CryptoFailed> {
    Hkdf::<Sha256>::new(Some(SALT), material).expand(&HKDF_INFO, out).map_err(|_| CryptoFailed)
}

/// Derives `out` from a password with PBKDF2-HMAC-SHA-256; takes 10 to 20 ms of one core.
pub(super) fn pbkdf2(password: &[u8], salt: &[u8], out: &mut [u8]) {
    pbkdf2::pbkdf2_hmac::<Sha256>(password, salt, PBKDF2_ROUNDS, out);
}

pub(super) fn sha256(parts: &[&[u8]]) -> [u8; 32] {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update(part);
    }
    hash.finalize().into()
}

/// The cryptographic library failed on valid input.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "this machine's cryptographic library failed on valid input; it may be out of memory or out of randomness"
)]
pub struct CryptoFailed;
