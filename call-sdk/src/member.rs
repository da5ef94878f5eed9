//! A member of a call as Matrix sees it, and the names under which an SFU knows it.

use std::fmt;

use base64::{Engine as _, engine::general_purpose::STANDARD_NO_PAD};
use ruma_common::{DeviceId, OwnedDeviceId, OwnedEventId, OwnedUserId, UserId};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::{time::UnixMillis, transport::Transport};

/// A device of a user. The pair is the name: a joined `user:device` string is ambiguous for servers with ports.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Device {
    /// Its owner.
    pub user_id: OwnedUserId,
    /// Its id.
    pub device_id: OwnedDeviceId,
}

impl Device {
    /// The device `device_id` of `user_id`.
    pub fn new(user_id: impl Into<OwnedUserId>, device_id: impl Into<OwnedDeviceId>) -> Self {
        Self { user_id: user_id.into(), device_id: device_id.into() }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.user_id, self.device_id)
    }
}

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

/// The event form that a membership was read from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum MembershipForm {
    /// `org.matrix.msc3401.call.member`: a state event per device.
    State,
    /// `org.matrix.msc4143.rtc.member`: a sticky event (MSC4354).
    Sticky,
}

/// A call of a room (MSC4143 §Slots): an application and an id, written `m.call#ROOM`.
///
/// Slot ids compare exactly. `m.call#ROOM` and `m.call#room` are two slots, as SFU room names are hashes of them.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot {
    /// `m.call` for voice and video.
    pub application: String,
    /// The half after `#`. The empty `call_id` of a state membership reads as `ROOM`.
    pub id: String,
}

impl Slot {
    /// The room call as deployed clients write it: `m.call#ROOM`.
    #[must_use]
    pub fn room_call() -> Self {
        Self { application: "m.call".to_owned(), id: "ROOM".to_owned() }
    }

    /// The room call as the merged MSC writes it: `m.call#room`.
    #[must_use]
    pub fn lower_case_room_call() -> Self {
        Self { application: "m.call".to_owned(), id: "room".to_owned() }
    }

    /// Reads a slot id with exactly one `#`, both halves non-empty and at most 255 bytes; `None` otherwise.
    #[must_use]
    pub fn parse(slot_id: &str) -> Option<Self> {
        let (application, id) = slot_id.split_once('#')?;
        let usable = |half: &str| (1..=255).contains(&half.len()) && !half.contains('#');
        (usable(application) && usable(id))
            .then(|| Self { application: application.to_owned(), id: id.to_owned() })
    }

    /// The slot id, for instance `m.call#ROOM`.
    #[must_use]
    pub fn slot_id(&self) -> String {
        format!("{}#{}", self.application, self.id)
    }

    /// The `call_id` of the state form: empty for the room call.
    #[must_use]
    pub fn call_id(&self) -> &str {
        if self.id == "ROOM" { "" } else { &self.id }
    }
}

/// The key of a member in every table: one membership of one device.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MemberKey {
    /// Sender of the membership event.
    pub user_id: OwnedUserId,
    /// The device, if it is known.
    pub device_id: Option<OwnedDeviceId>,
    /// The membership's own id.
    pub member_id: MemberId,
}

/// One device in a call, as an accepted, unexpired membership event of a joined room member describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Member {
    /// The sender of the membership event; never read from its content or state key.
    pub user_id: OwnedUserId,
    /// The device: the one that encrypted the event, else the one that the content claims. A member of an unencrypted
    /// room may name none.
    pub device_id: Option<OwnedDeviceId>,
    /// This membership's own id.
    pub member_id: MemberId,
    /// Every identity under which an SFU may know this member, most likely first (MSC4195; g4 forms H2 and H3,
    /// `user:device` for state members).
    pub identities: Vec<ParticipantIdentity>,
    /// The event form that it was read from.
    pub form: MembershipForm,
    /// When the membership was created: `created_ts`, else the time of its first event that we saw.
    pub created: UnixMillis,
    /// When its content expires; `None` for sticky members.
    pub expires_at: Option<UnixMillis>,
    /// Where its media travels, by preference; empty if it names no transport that we can use.
    pub transports: Vec<Transport>,
    /// Its intent, for instance `audio` or `video`.
    pub intent: Option<String>,
    /// The newest membership event: reactions refer to it.
    pub event_id: Option<OwnedEventId>,
    /// Whether it reads key messages of MSC4143 (`member.membership` or an `m.livekit` transport says so).
    pub reads_msc_keys: bool,
}

impl Member {
    /// The key of this member in tables.
    #[must_use]
    pub fn key(&self) -> MemberKey {
        MemberKey {
            user_id: self.user_id.clone(),
            device_id: self.device_id.clone(),
            member_id: self.member_id.clone(),
        }
    }

    /// The device, if it is known.
    #[must_use]
    pub fn device(&self) -> Option<Device> {
        Some(Device { user_id: self.user_id.clone(), device_id: self.device_id.clone()? })
    }

    /// Whether a participant under `identity` may be this member.
    #[must_use]
    pub fn is_known_as(&self, identity: &ParticipantIdentity) -> bool {
        self.identities.contains(identity)
    }
}

/// The intent that all members who state one agree on.
#[must_use]
pub(crate) fn common_intent(members: &[Member]) -> Option<&str> {
    let mut stated = members.iter().filter_map(|member| member.intent.as_deref());
    let first = stated.next()?;
    stated.all(|intent| intent == first).then_some(first)
}

#[cfg(test)]
mod tests {
    use ruma_common::{device_id, user_id};

    use super::*;

    /// A homeserver with a port and odd characters, as g4 §2.3 has it.
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

    #[test]
    fn intent_is_common_only_if_nobody_disagrees() {
        let common = |alice: Option<&str>, bob: Option<&str>| {
            let member = |user, intent: Option<&str>| Member {
                intent: intent.map(str::to_owned),
                ..crate::machine::testing::state_member(user, "D", 0)
            };
            common_intent(&[member("@alice:example.org", alice), member("@bob:example.org", bob)])
                .map(str::to_owned)
        };
        assert_eq!(common(None, None), None);
        assert_eq!(common(Some("audio"), None).as_deref(), Some("audio"));
        assert_eq!(common(Some("audio"), Some("audio")).as_deref(), Some("audio"));
        assert_eq!(common(Some("audio"), Some("video")), None);
    }

    #[test]
    fn slot_id_round_trips_and_keeps_case() {
        for id in ["m.call#ROOM", "m.call#room", "m.call#custom"] {
            assert_eq!(Slot::parse(id).unwrap().slot_id(), id);
        }
        assert_ne!(Slot::room_call(), Slot::lower_case_room_call());
        for bad in ["m.call", "m.call#", "#ROOM", "m.call#a#b", ""] {
            assert_eq!(Slot::parse(bad), None, "{bad}");
        }
        assert_eq!(Slot::room_call().call_id(), "");
        assert_eq!(Slot::lower_case_room_call().call_id(), "room");
    }
}
