//! Names of rooms, people and tracks, and the random identifiers that clients parse.

use std::borrow::Borrow;
use std::fmt;

use rand::Rng;
use rand::rngs::StdRng;

/// Letters and digits without the five that people confuse.
const ALPHABET: &[u8] = b"23456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz";

/// Random characters after a prefix.
const LENGTH: usize = 12;

macro_rules! text_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(String);

        impl $name {
            /// The text as it is on the wire.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl From<&str> for $name {
            fn from(text: &str) -> Self {
                Self(text.to_owned())
            }
        }

        impl From<String> for $name {
            fn from(text: String) -> Self {
                Self(text)
            }
        }

        impl Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:?}", self.0)
            }
        }
    };
}

text_id! {
    /// A room's name: the alias that the authorisation service computes.
    RoomName
}
text_id! {
    /// Who a participant is, as its token says; unique within a room.
    Identity
}
text_id! {
    /// `PA_…`: one stay of a participant in a room.
    ParticipantSid
}
text_id! {
    /// `TR_…`: one publication.
    TrackSid
}

/// One signalling connection, which is one stay of one participant. Never reused within a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId(pub u64);

/// A fresh identifier: the prefix, which clients parse, and twelve random characters.
pub(crate) fn fresh(rng: &mut StdRng, prefix: &str) -> String {
    let mut sid = String::with_capacity(prefix.len() + LENGTH);
    sid.push_str(prefix);
    for _ in 0..LENGTH {
        sid.push(char::from(ALPHABET[rng.random_range(0..ALPHABET.len())]));
    }
    sid
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    #[test]
    fn an_identifier_has_its_prefix_and_twelve_unambiguous_characters() {
        let sid = fresh(&mut StdRng::seed_from_u64(1), "PA_");
        assert_eq!(sid.len(), 15);
        assert!(sid.starts_with("PA_"));
        assert!(!sid[3..].contains(['0', '1', 'O', 'I', 'l']));
    }
}
