//! LiveKit-compatible frame encryption: what leaves a sender is sealed, what reaches an application was opened.
//!
//! A frame on the wire is
//!
//! ```text
//! | C clear bytes | ciphertext | GCM tag 16 | IV 12 | 0x0C | key index |
//!  '--- AAD ----'                                      '-- trailer ---'
//! ```
//!
//! AES-128-GCM, 30 bytes of overhead. C depends on the codec ([`FrameEncryptor`]); in H.264 and H.265 all that
//! follows the clear bytes is emulation-prevention escaped, so that packetisers see one NAL unit. Keys are
//! derived from a [`MediaKey`](crate::key::MediaKey) by HKDF and live in the [`KeyRing`] of their sender.
//!
//! ```
//! use std::time::Instant;
//! use antiphon_call_sdk::frame_crypto::{FrameDecryptor, FrameEncryptor, KeyRing, Opened};
//! use antiphon_call_sdk::{key::{KeyIndex, MediaKey}, media::Codec};
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
//! - To send plaintext. An encryptor cannot be built without a key ring; no key at the index asked for is an
//!   error, not a frame.
//! - To hand over anything that did not open under a key of the ring. A frame that fails is an [`OpenError`] and
//!   an empty buffer. Whether a call is encrypted is Matrix's business; nothing here asks the SFU.
//! - To give up on a key. A bad frame costs one GCM pass at most, and never any later good frame.
//! - AV1, which deployed clients do not agree how to encrypt: refused at construction.
//! - To ratchet. The once-ratcheted chain key begins with the AES key of the step before, so ratcheting hides
//!   nothing from whom it should; deployed MatrixRTC senders never do it. Every change of key is a fresh key.
//!
//! # Assumptions
//!
//! - One [`KeyRing`] per sender identity, shared by all its tracks and data, as replays are recognised per sender.
//! - Only the clear bytes and the IV are authenticated. Which track a frame belongs to and its order are not:
//!   a malicious SFU can swap frames between two tracks of one sender, delay them, or drop them.
//! - H.264 parameter sets must survive the receiver's transport untouched. Some receivers rewrite an SPS whose
//!   VUI lacks a bitstream restriction with `max_num_reorder_frames = 0`; configure the encoder to write one.

mod codec;
mod data;
mod derive;
mod emulation;
mod h26x;
mod iv;
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
pub use open::{FrameDecryptor, OpenError, Opened};
pub use ring::{KeyRing, RETIRE_AFTER};
pub use seal::{FrameEncryptor, SealError};
pub use sif::SifKind;

/// Bytes that sealing adds to a frame: tag, IV, and the two bytes of the trailer. H.264 and H.265 may add a few
/// escape bytes on top.
pub const OVERHEAD: usize = TAG_LEN + iv::IV_LEN + TRAILER_LEN;

const TAG_LEN: usize = 16;
const TRAILER_LEN: usize = 2;
