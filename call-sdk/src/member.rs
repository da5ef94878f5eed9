//! A member of a call as Matrix sees it, and the identity under which the SFU knows it.

use std::fmt;

use base64::{Engine as _, engine::general_purpose::STANDARD_NO_PAD};
use matrix_sdk::ruma::{DeviceId, OwnedDeviceId, OwnedUserId, UserId};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::time::UnixMillis;

/// Names one membership of one device: `membershipID` of the state form, `member.id` of the sticky form.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct MemberId(pub String);

/// The identity of a participant in an SFU room. Only [`crate::foci`] and [`Member`] map members to it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ParticipantIdentity(pub String);

impl ParticipantIdentity {
    /// The identity of a state-form member: `{user_id}:{device_id}`, never its `membershipID`.
    #[must_use]
    pub fn of_state_member(user: &UserId, device: &DeviceId) -> Self {
        Self(format!("{user}:{device}"))
    }

    /// The identity of a sticky-form member: unpadded base64 of SHA-256 over the compact JSON array
    /// `[user_id, device_id, member.id]` (MSC4195 §Pseudonymous identity).
    #[must_use]
    pub fn of_sticky_member(user: &UserId, device: &DeviceId, member: &MemberId) -> Self {
        let parts = serde_json::json!([user.as_str(), device.as_str(), member.0]);
        Self(STANDARD_NO_PAD.encode(Sha256::digest(parts.to_string().as_bytes())))
    }
}

impl fmt::Display for ParticipantIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Which event form a membership was read from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MembershipKind {
    /// `org.matrix.msc3401.call.member`: a state event per device.
    State,
    /// `org.matrix.msc4143.rtc.member`: a sticky event (MSC4354).
    Sticky,
}

/// A LiveKit SFU deployment as membership names it: the base URL of its authorisation service.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct LiveKitFocus {
    /// `livekit_service_url`, without a trailing slash.
    pub service_url: String,
}

/// Which call of a room: an application and its call id (`""` and `"ROOM"` both mean the room call).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Slot {
    /// `m.call` for voice and video.
    pub application: String,
    /// Empty for the room call.
    pub call_id: String,
}

impl Slot {
    /// The room call that Element Call shows: `m.call#ROOM`.
    #[must_use]
    pub fn room_call() -> Self {
        Self { application: "m.call".to_owned(), call_id: String::new() }
    }

    /// The slot id of MSC4143, for instance `m.call#ROOM`.
    #[must_use]
    pub fn id(&self) -> String {
        let part =
            if self.call_id.is_empty() && self.application == "m.call" { "ROOM" } else { &self.call_id };
        format!("{}#{part}", self.application)
    }
}

/// One device in a call, as an accepted, unexpired membership event of a joined room member describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// The sender of the membership event; never read from its content or state key.
    pub user_id: OwnedUserId,
    /// The device that is in the call.
    pub device_id: OwnedDeviceId,
    /// This membership's own id.
    pub member_id: MemberId,
    /// Under which identity the SFU knows this member.
    pub identity: ParticipantIdentity,
    /// Which event form it was read from.
    pub kind: MembershipKind,
    /// When the membership was created: `created_ts`, else the event's own time.
    pub created: UnixMillis,
    /// When its content expires; `None` for sticky members.
    pub expires_at: Option<UnixMillis>,
    /// Where its media travels; `None` if it names no transport that we can use.
    pub focus: Option<LiveKitFocus>,
    /// `m.call.intent`, for instance `audio` or `video`.
    pub intent: Option<String>,
}

#[cfg(test)]
mod tests {
    use matrix_sdk::ruma::{device_id, user_id};

    use super::*;

    #[test]
    fn sticky_identity_matches_deployed_clients() {
        let identity = |u: &UserId, d: &DeviceId, m: &str| {
            ParticipantIdentity::of_sticky_member(u, d, &MemberId(m.to_owned())).0
        };
        assert_eq!(
            identity(user_id!("@alice:example.org"), device_id!("AAAAAAA"), "xyzHASHxyz"),
            "jUZ0Q1yF5nV3LlAI5xfD1I7BPnAytJaPEAR57EXjJ6s"
        );
        assert_eq!(
            identity(user_id!("@alice:example.com"), device_id!("DEVICE123"), "memberABC"),
            "J+T45tGruxc+HrUOqJJlyQSV33m728Cme4+vt8/SWrU"
        );
    }

    #[test]
    fn the_room_call_has_a_fixed_slot_id() {
        assert_eq!(Slot::room_call().id(), "m.call#ROOM");
        let other = Slot { application: "m.not.a.call".to_owned(), call_id: String::new() };
        assert_eq!(other.id(), "m.not.a.call#");
    }
}
