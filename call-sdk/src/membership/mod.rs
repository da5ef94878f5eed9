//! Who is in the call: the wire forms, everybody's membership, and our own.
//!
//! [`roster`] reads everyone's membership and never writes; [`own`] maintains ours and never guesses.

pub mod own;
pub mod roster;
pub mod wire;

#[cfg(test)]
mod testing;
