//! Join end-to-end encrypted MatrixRTC calls (MSC3401, MSC4143) from Rust.
//!
//! One rule holds in every module: protocol logic does no I/O. Membership ([`membership`]), media keys
//! ([`media_keys`]) and frame encryption ([`frame_crypto`]) are plain structs that are given inputs and the
//! time and are drained of outputs; [`call`] is the shell that owns the clock, the homeserver ([`matrix`]) and
//! the media transport ([`transport`]).
//!
//! What this crate refuses to do: hand plaintext from the network to an application in an encrypted call,
//! accept a media key that did not come Olm-encrypted from the device that is the member, or take the question
//! "is this call encrypted?" from the SFU. Policy comes from Matrix.

pub mod call;
pub mod foci;
pub mod frame_crypto;
pub mod key;
pub mod matrix;
pub mod media;
pub mod media_keys;
pub mod member;
pub mod membership;
pub mod time;
pub mod transport;

/// The examples of the README compile.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct Readme;
