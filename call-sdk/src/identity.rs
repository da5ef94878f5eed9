//! The names of a membership: its own, and those under which an SFU knows it.

use std::fmt;

use base64::{Engine as _, engine::general_purpose::STANDARD_NO_PAD};
use ruma_common::{DeviceId, UserId};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

/// Names one membership of one device: `membershipID` or `{user}:{device}` of the state form, `member.id` of the
/// sticky form.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct MemberId(pub String);

impl MemberId {
    /// The id that deployed clients give a state membership: `{user}:{device}`.
    #[must_use]
    pub fn of_state_member(user: &UserId, device: &DeviceId) -> Self {
        Self(format!("{user}:{device}"))
    }
}

/// The identity of a participant in an SFU room, by the SFU's word.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ParticipantIdentity(pub String);

impl ParticipantIdentity {
    /// The legacy identity, issued by `/sfu/get`: `{user_id}:{device_id}`.
    #[must_use]
    pub fn of_device(user: &UserId, device: &DeviceId) -> Self {
        Self(format!("{user}:{device}"))
    }

    /// The identity that `/get_token` of an authorisation service issues: unpadded base64 of SHA-256 over the compact
    /// JSON array `[user_id, device_id, member.id]` (MSC4195, earlier text).
    #[must_use]
    pub fn of_claimed_device(user: &UserId, device: &DeviceId, member: &MemberId) -> Self {
        Self::hashed(&serde_json::json!([user.as_str(), device.as_str(), member.0]))
    }

    /// The identity that the endpoints of merged MSC4195 issue: the same hash over `[user_id, member.id]`.
    #[must_use]
    pub fn of_member(user: &UserId, member: &MemberId) -> Self {
        Self::hashed(&serde_json::json!([user.as_str(), member.0]))
    }

    fn hashed(parts: &serde_json::Value) -> Self {
        Self(STANDARD_NO_PAD.encode(Sha256::digest(parts.to_string().as_bytes())))
    }
}

impl fmt::Display for ParticipantIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use ruma_common::{device_id, user_id};

    use super::*;

    /// A homeserver with a port and odd characters.
    const ZOE: &str = "@zoë/\"q\\:example.com:8448";

    fn hash(parts: &[&str]) -> String {
        ParticipantIdentity::hashed(&serde_json::json!(parts)).0
    }

    #[test]
    fn identity_of_claimed_device_matches_vectors() {
        let identity = |u: &UserId, d: &DeviceId, m: &str| {
            ParticipantIdentity::of_claimed_device(u, d, &MemberId(m.to_owned())).0
        };
        assert_eq!(
            identity(user_id!("@alice:example.org"), device_id!("AAAAAAA"), "xyzHASHxyz"),
            "jUZ0Q1yF5nV3LlAI5xfD1I7BPnAytJaPEAR57EXjJ6s"
        );
        assert_eq!(
            identity(user_id!("@alice:example.com"), device_id!("DEVICE123"), "memberABC"),
            "J+T45tGruxc+HrUOqJJlyQSV33m728Cme4+vt8/SWrU"
        );
        assert_eq!(
            identity(
                user_id!("@bob:matrix.example.org"),
                device_id!("QRSTUVWXYZ"),
                "b7c1f0e2-3a54-4d7e-9f0a-5f5b2f0c9d11"
            ),
            "K98ERAcSQU6j/VtplSujalszLyxvlHRqQxGBIDGuUpw"
        );
        assert_eq!(hash(&[ZOE, "D+/=", "mémber ☃"]), "E/Fhqpe/njUAZLyr7NUwjqJxYSLqYmp3lpteY+kdfEo");
    }

    #[test]
    fn identity_of_member_matches_vectors() {
        let identity = |u: &UserId, m: &str| ParticipantIdentity::of_member(u, &MemberId(m.to_owned())).0;
        assert_eq!(
            identity(user_id!("@alice:example.com"), "memberABC"),
            "M3VnsLXrkbxIDINXO64u8PZzFyD9ZYFiQULR2dshWYs"
        );
        assert_eq!(
            identity(user_id!("@bob:matrix.example.org"), "b7c1f0e2-3a54-4d7e-9f0a-5f5b2f0c9d11"),
            "XrxbwcUrhJMNpSj4KueUASTwQoc+ep8SiMZdCZH/+ZQ"
        );
        assert_eq!(hash(&[ZOE, "mémber ☃"]), "jtaHwCfPg/XbY9KqTD+9gO/GmG5V1DBj+V4RdyKRRKA");
    }
}
