//! The wire forms of a membership: the state event that every deployed client reads, and the sticky event.
//!
//! Reading is lenient about generations and strict about identity. State events of all generations and sticky events
//! of all deployed generations and of MSC4143 are read; the user is always the sender of the event, never the one in
//! its content or state key.
//!
//! *Assumptions.* The port hands over events of one room, decrypted, with `content` as the sender wrote it.

mod fields;
mod read;
mod read_state;
mod read_sticky;
mod transports;
mod write;

#[cfg(test)]
mod fixtures;
#[cfg(test)]
mod tests;

use std::time::Duration;

use ruma_common::{OwnedDeviceId, OwnedUserId};

pub(crate) use read::{Ignored, Rejected, read, sticky_key};
pub use write::MembershipMode;
#[cfg(test)]
pub(crate) use write::STICKY_DURATION;
pub(crate) use write::{LeaveCode, OwnDescription, OwnTransports, leave, membership, state_key};

use crate::{
    member::{MemberId, MembershipForm, ParticipantIdentity, Slot},
    time::UnixMillis,
    transport::{LiveKitFocus, MeshSession},
};

/// Event type of the state form (MSC3401).
pub(crate) const STATE_TYPE: &str = "org.matrix.msc3401.call.member";
/// Event type of the sticky form (MSC4143, MSC4354).
pub(crate) const STICKY_TYPE: &str = "org.matrix.msc4143.rtc.member";
/// Event type of a slot (MSC4143); [`super::slots`] reads and writes its content.
pub(crate) const SLOT_TYPE: &str = "org.matrix.msc4143.rtc.slot";

/// How long a state membership counts when its content does not say: 4 h.
pub(crate) const DEFAULT_EXPIRES: Duration = Duration::from_secs(4 * 3600);

/// A well-formed membership, before it is known whether it counts (slot, expiry, joined sender).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ParsedMembership {
    /// The sender.
    pub user_id: OwnedUserId,
    /// The device: the one that encrypted the event, else the one that the content claims. `None` only in unencrypted
    /// rooms, where MSC4143 names no device.
    pub device_id: Option<OwnedDeviceId>,
    /// This membership's own id.
    pub member_id: MemberId,
    /// Every identity under which an SFU may know it, most likely first.
    pub identities: Vec<ParticipantIdentity>,
    /// The event form.
    pub form: MembershipForm,
    /// The call of the room.
    pub slot: Slot,
    /// `created_ts`, else the event's own time.
    pub created: UnixMillis,
    /// When its content expires; `None` for the sticky form.
    pub expires_at: Option<UnixMillis>,
    /// Which focus carries its media.
    pub route: Route,
    /// Its session in the mesh, if it can mesh.
    pub mesh: Option<MeshSession>,
    /// `m.call.intent`.
    pub intent: Option<String>,
    /// Whether it reads key messages of MSC4143: it has `member.membership` or an `m.livekit` transport.
    pub reads_msc_keys: bool,
}

/// Which focus carries a member's media.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Route {
    /// It publishes to these foci, by preference, whatever the other members do: `multi_sfu`, and every sticky member.
    Own(Vec<LiveKitFocus>),
    /// It follows the oldest member; these foci are its own and count only while it is the oldest itself.
    OldestMember(Vec<LiveKitFocus>),
    /// It names an unknown selection: it is listed, and its media is not reachable.
    Unknown,
}
