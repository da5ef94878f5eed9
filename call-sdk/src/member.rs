//! A member of a call as Matrix sees it.

use std::fmt;

use ruma_common::{OwnedDeviceId, OwnedEventId, OwnedUserId};

pub use crate::identity::{MemberId, ParticipantIdentity};
use crate::{
    time::UnixMillis,
    transport::{LiveKitFocus, MeshSession, Transport},
};

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
    /// Every identity under which an SFU may know this member, most likely first (MSC4195: hashed
    /// identities, and `user:device` for state members).
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

    /// The focus that it publishes on, if it names one.
    #[must_use]
    pub fn focus(&self) -> Option<&LiveKitFocus> {
        self.transports.iter().find_map(Transport::livekit)
    }

    /// Its session in the mesh, if it can mesh.
    #[must_use]
    pub fn mesh(&self) -> Option<&MeshSession> {
        self.transports.iter().find_map(Transport::mesh)
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
    use super::*;

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
