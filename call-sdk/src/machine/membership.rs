//! The members of the call: the wire forms, everybody's membership, the slots, and our own membership.
//!
//! [`roster`] reads everyone's membership and never writes; [`own`] maintains ours and never guesses.

pub(crate) mod choice;
pub(crate) mod own;
pub(crate) mod roster;
pub(crate) mod slots;
pub(crate) mod wire;

#[cfg(test)]
mod testing;
