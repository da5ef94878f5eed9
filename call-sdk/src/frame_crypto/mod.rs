//! LiveKit-compatible frame encryption: every frame is sealed before it leaves a sender, and opened before an
//! application sees it.
//!
//! A frame on the wire is
//!
//! ```text
//! | C clear bytes | ciphertext | GCM tag 16 | IV 12 | 0x0C | key index |
//!  '--- AAD ----'                                      '-- trailer ---'
//! ```
//!
//! AES-128-GCM, 30 bytes of overhead. C depends on the codec ([`FrameEncryptor`]); in H.264 and H.265 the part after
//! the clear bytes is emulation-prevention escaped, so that packetisers see one NAL unit. Keys are derived from a
//! [`MediaKey`](crate::key::MediaKey) by HKDF and live in the [`KeyRing`] of their sender.
//!
//! ```
//! use std::time::Instant;
//! use antiphon_call_sdk::frame_crypto::{FrameDecryptor, FrameEncryptor, KeyRing, Opened};
//! use antiphon_call_sdk::{Codec, KeyIndex, MediaKey};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let now = Instant::now();
//! let (ours, alices) = (KeyRing::new(), KeyRing::new()); // Alice's own ring, and her ring at Bob's
//! let key = MediaKey::new(vec![7; 32])?;
//! ours.set(KeyIndex(0), &key)?;
//! alices.set(KeyIndex(0), &key)?;
//!
//! let (mut wire, mut plain) = (Vec::new(), Vec::new());
//! FrameEncryptor::new(Codec::Opus, ours)?.seal(KeyIndex(0), b"\x78 a frame", &mut wire)?;
//! let opened = FrameDecryptor::new(Codec::Opus, alices)?.open(now, &wire, None, &mut plain)?;
//! assert_eq!((opened, &plain[..]), (Opened::Frame(KeyIndex(0)), &b"\x78 a frame"[..]));
//! # Ok(()) }
//! ```
//!
//! # What it refuses
//!
//! - To send plaintext. An encryptor needs a key ring, and a missing key is an error, not a frame.
//! - To deliver a frame that did not open under a key of the ring. A failed frame is an [`OpenError`] and an empty
//!   buffer. Whether a call is encrypted is decided by Matrix; nothing here asks the SFU.
//! - To give up on a key. A bad frame costs at most one pass of the cipher, and no later good frame is lost.
//! - To deliver a frame twice. A replayed frame is dropped, also after its key was wiped and installed again.
//! - AV1: deployed clients do not agree on how to encrypt it. Refused at construction.
//! - To ratchet. The once-ratcheted chain key begins with the AES key of the step before, so ratcheting hides
//!   nothing from a newcomer; deployed MatrixRTC senders do not use it. Every change of key is a fresh key.
//!
//! # Assumptions
//!
//! - One [`KeyRing`] per sender identity, shared by all its tracks and data, because replays are recognised per
//!   ring. The ring outlives a departure of the member.
//! - Only the clear bytes and the IV are authenticated. The track of a frame and its order are not: a malicious SFU
//!   can swap frames between two tracks of one sender, present a VP9 frame as a data packet, delay frames, or drop
//!   them.
//! - H.264 parameter sets must pass the receiver's transport unchanged. Some receivers rewrite an SPS whose VUI
//!   lacks a bitstream restriction with `max_num_reorder_frames = 0`; configure the encoder to write one.

mod aead;
mod codec;
mod data;
mod derive;
mod emulation;
mod error;
mod h26x;
mod iv;
mod iv_source;
mod key;
mod open;
mod replay;
mod ring;
mod seal;
mod sif;

#[cfg(test)]
mod attacks;
#[cfg(test)]
mod vectors;

pub use codec::UnsupportedCodec;
pub use data::{DataDecryptor, DataEncryptor, SealedData};
pub use derive::CryptoFailed;
pub use error::{OpenError, SealError};
pub use key::MAX_SEALED;
pub use open::{FrameDecryptor, Opened};
pub use ring::{KeyRing, RETIRE_AFTER};
pub use seal::FrameEncryptor;
pub use sif::{SifKind, SifTrailer};

/// Bytes that sealing adds to a frame: tag, IV, and the two bytes of the trailer. H.264 and H.265 frames may grow by
/// a few escape bytes in addition.
pub const OVERHEAD: usize = TAG_LEN + iv::IV_LEN + TRAILER_LEN;

const TAG_LEN: usize = 16;
const TRAILER_LEN: usize = 2;
