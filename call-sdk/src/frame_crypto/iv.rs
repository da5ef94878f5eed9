//! Initialisation vectors.

pub(super) const IV_LEN: usize = 12;

/// Initialisation vector of one frame, in clear at its end.
pub(super) type Iv = [u8; IV_LEN];
