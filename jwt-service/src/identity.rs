//! Names on the SFU: which LiveKit room a MatrixRTC slot is, and who a member is in it (MSC4195).

use std::fmt;

use base64::{Engine as _, engine::general_purpose::STANDARD_NO_PAD};
use sha2::{Digest as _, Sha256};

/// The slot that `/sfu/get` stands for: it predates slots and only knew the one call per room.
pub const LEGACY_SLOT: &str = "m.call#ROOM";

/// The LiveKit room name of one slot in one Matrix room.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RoomAlias(String);

impl RoomAlias {
    /// The alias of `slot_id` in `room_id`: `H(room_id, slot_id)` (MSC4195).
    pub fn of_slot(room_id: &str, slot_id: &str) -> Self {
        Self(hash(&[room_id, slot_id]))
    }

    /// The alias as the SFU or a store names it.
    pub(crate) fn from_sfu(name: impl Into<String>) -> Self {
        Self(name.into())
    }

    /// The alias as the SFU sees it.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for RoomAlias {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The LiveKit participant identity of one membership.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ParticipantIdentity(String);

impl ParticipantIdentity {
    /// The pseudonymous identity `H(user_id, device_id, member_id)` (MSC4195): without the three inputs
    /// nobody at the SFU can tell who it is.
    pub fn of_member(user_id: &str, device_id: &str, member_id: &str) -> Self {
        Self(hash(&[user_id, device_id, member_id]))
    }

    /// The pseudonymous identity `H(user_id, member_id)` of the MSC4195 text in which homeservers issue tokens:
    /// member IDs are random there, so the device adds nothing.
    pub fn of_membership(user_id: &str, member_id: &str) -> Self {
        Self(hash(&[user_id, member_id]))
    }

    /// The plain-text identity of `/sfu/get`: `user_id:device_id`.
    ///
    /// `None` if the result could be read as somebody else's: with the device `8448:D`, `@a:hs` would become
    /// `@a:hs:8448:D`, which is device `D` of `@a:hs:8448`.
    pub fn legacy(user_id: &str, device_id: &str) -> Option<Self> {
        let ambiguous = device_id
            .split_once(':')
            .is_some_and(|(head, _)| !head.is_empty() && head.bytes().all(|b| b.is_ascii_digit()));
        (!ambiguous).then(|| Self(format!("{user_id}:{device_id}")))
    }

    /// The identity as the SFU or a store names it.
    pub(crate) fn from_sfu(name: impl Into<String>) -> Self {
        Self(name.into())
    }

    /// The identity as the SFU sees it.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ParticipantIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Unpadded base64 of SHA-256 over the canonical JSON array of `parts`.
///
/// Canonical JSON escapes only `"`, `\` and control characters, which is what `serde_json` writes. (A Go
/// service that uses its standard encoder also escapes `<`, `>`, `&`, U+2028 and U+2029, and so disagrees on
/// such input.)
fn hash(parts: &[&str]) -> String {
    let mut json = String::from("[");
    for (i, part) in parts.iter().enumerate() {
        if i > 0 {
            json.push(',');
        }
        json.push_str(&serde_json::Value::from(*part).to_string());
    }
    json.push(']');
    STANDARD_NO_PAD.encode(Sha256::digest(json.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aliases_match_the_published_vectors() {
        for (room, slot, expected) in [
            ("!roomid:example.com", "slot1234", "O8437W3+jmzMVjoIP3tNwbm+XxHQk2iKpOA7aqw3qSc"),
            ("!room:example.com", "m.call#", "hrQ0l3fv1RI0sCBUn3Nu59Bu/b3f7hWXbMLLfFMLNOY"),
            ("!room:example.com", LEGACY_SLOT, "krj2dgxw2K6EOm9he4GfQJ6JsSVWfJ8a7BkyjZcSmxs"),
        ] {
            assert_eq!(RoomAlias::of_slot(room, slot).as_str(), expected, "{room} {slot}");
        }
    }

    #[test]
    fn identities_match_the_published_vectors() {
        for (user, device, member, expected) in [
            ("@alice:example.com", "DEVICE123", "memberABC", "J+T45tGruxc+HrUOqJJlyQSV33m728Cme4+vt8/SWrU"),
            ("@alice:example.com", "DEVICE", "member-1", "vYVt8NUMTb0rAawkFqilcAtxKgY26U3Ab7R9INviNnU"),
            ("@ü:example.com", "D", "m", "/O1dhRGcGnwhzzvcGhujUkQIQz/repApav3mN+xnQYE"),
            ("@a:example.com", "D&<>", "m", "XI7EnDxVkj3Qjv7+KSa08W1mMdz9eLWcyEGhk7H0+o8"),
        ] {
            let identity = ParticipantIdentity::of_member(user, device, member);
            assert_eq!(identity.as_str(), expected, "{user} {device} {member}");
        }
    }

    #[test]
    fn an_identity_without_device_matches_the_published_vector() {
        let identity = ParticipantIdentity::of_membership("@alice:example.com", "memberABC");
        assert_eq!(identity.as_str(), "M3VnsLXrkbxIDINXO64u8PZzFyD9ZYFiQULR2dshWYs");
    }

    #[test]
    fn parts_cannot_be_shifted_between_fields() {
        let one = ParticipantIdentity::of_member("a", "b\",\"c", "d");
        let other = ParticipantIdentity::of_member("a", "b", "c\",\"d");
        assert_ne!(one, other);
    }

    #[test]
    fn a_legacy_identity_names_one_device_only() {
        let legacy = |user, device| ParticipantIdentity::legacy(user, device).map(|i| i.0);
        assert_eq!(legacy("@a:hs", "D").as_deref(), Some("@a:hs:D"));
        assert_eq!(legacy("@a:hs", "").as_deref(), Some("@a:hs:"));
        assert_eq!(legacy("@a:hs:8448", "D").as_deref(), Some("@a:hs:8448:D"));
        assert_eq!(legacy("@a:hs", "8448:D"), None);
        assert_eq!(legacy("@a:hs", "x:D").as_deref(), Some("@a:hs:x:D"));
        assert_eq!(legacy("@a:hs", ":D").as_deref(), Some("@a:hs::D"));
    }
}
