//! What Matrix tells a call.

use std::{collections::BTreeSet, fmt};

use ruma_common::{OwnedDeviceId, OwnedEventId, OwnedUserId};
use serde_json::Value;

use crate::{member::MembershipForm, time::UnixMillis};

/// Which devices may hold and send media keys.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TrustPolicy {
    /// Only devices that their owner has cross-signed (MSC4153). The default.
    #[default]
    CrossSigned,
    /// Every device of a member, as Element Call does on its own. A homeserver that adds a device to a member's
    /// account can then read that member's calls.
    AnyDevice,
}

/// How others see our own device.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum OwnTrust {
    /// Cross-signed by our own identity.
    CrossSigned,
    /// Our account has a cross-signing identity that has not signed this device: devices with the cross-signed policy
    /// refuse our keys and send us none.
    NotCrossSigned,
    /// Our account has no cross-signing identity.
    NoIdentity,
}

/// The room as of the last sync.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RoomView {
    /// Every call member event of the room, state and sticky, unjudged. Redacted events are included with empty
    /// content.
    pub members: Vec<MemberEvent>,
    /// Every slot event of the room.
    pub slots: Vec<SlotEvent>,
    /// The users that are joined to the room.
    pub joined: BTreeSet<OwnedUserId>,
    /// Whether the room is encrypted; the only source of the call's encryption policy.
    pub encrypted: bool,
    /// The room version, for instance `12`.
    pub version: String,
}

/// A membership event as the port hands it over, decrypted.
#[derive(Clone, Debug, PartialEq)]
pub struct MemberEvent {
    /// Its form.
    pub form: MembershipForm,
    /// Its sender, by the homeserver's word.
    pub sender: OwnedUserId,
    /// The device whose session encrypted the event, if it was encrypted and the device is known.
    pub sender_device: Option<OwnedDeviceId>,
    /// Whether the event was encrypted. In an encrypted room a sticky membership in clear counts as a leave.
    pub encrypted: bool,
    /// State key, of the state form.
    pub state_key: Option<String>,
    /// The event's id, used to break ties.
    pub event_id: Option<OwnedEventId>,
    /// When the sender's homeserver got it.
    pub origin_server_ts: UnixMillis,
    /// The content as the sender wrote it.
    pub content: Value,
    /// When its stickiness ends by our clock: the remaining time in `unsigned` if the homeserver tells it, else
    /// `min(received, origin_server_ts) + min(duration, 1 h)` (MSC4354). `None`: not sticky.
    pub sticky_until: Option<UnixMillis>,
    /// Of the sticky form: `origin_server_ts` plus its duration, by which the newest event of a key is chosen.
    pub sticky_rank: UnixMillis,
    /// Who redacted it, if somebody did.
    pub redacted_by: Option<OwnedUserId>,
}

/// A slot event (MSC4143 §Slots).
#[derive(Clone, Debug, PartialEq)]
pub struct SlotEvent {
    /// Its state key.
    pub slot_id: String,
    /// Its content.
    pub content: Value,
}

/// A to-device event, unjudged. The content may hold a key and is left out of `Debug`.
#[derive(Clone, PartialEq)]
pub struct ToDeviceEvent {
    /// Its type.
    pub event_type: String,
    /// Its content.
    pub content: Value,
    /// Its sender: of an encrypted event the owner of the Olm session.
    pub sender: OwnedUserId,
    /// What Olm says; `None` if the event came in clear.
    pub olm: Option<OlmSender>,
}

impl fmt::Debug for ToDeviceEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ToDeviceEvent")
            .field("event_type", &self.event_type)
            .field("sender", &self.sender)
            .field("olm", &self.olm)
            .finish_non_exhaustive()
    }
}

/// The device that encrypted a message, by its Olm session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OlmSender {
    /// The device that the session belongs to. `None` if its owner's device list does not hold it (yet): the port
    /// sends the event again when the list is current.
    pub device_id: Option<OwnedDeviceId>,
    /// Whether the device's owner has cross-signed it.
    pub cross_signed: bool,
}

/// A timeline or sticky event other than a membership: invites, declines, reactions, redactions.
#[derive(Clone, Debug, PartialEq)]
pub struct RoomEvent {
    /// Its id.
    pub event_id: OwnedEventId,
    /// Its type, after decryption.
    pub event_type: String,
    /// Its sender.
    pub sender: OwnedUserId,
    /// When the sender's homeserver got it.
    pub origin_server_ts: UnixMillis,
    /// Its content, after decryption.
    pub content: Value,
    /// When its stickiness ends, of a sticky event.
    pub sticky_until: Option<UnixMillis>,
    /// Of a redaction: the event that it redacts.
    pub redacts: Option<OwnedEventId>,
    /// Whether a mention of the whole room by this sender counts (power levels).
    pub may_mention_room: bool,
}

/// What the homeserver tells a call without being asked.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum MatrixUpdate {
    /// Something in the room changed: read the [`RoomView`] again.
    RoomChanged,
    /// A to-device event of a type that calls use.
    ToDevice(ToDeviceEvent),
    /// An event of a type that calls use.
    Event(RoomEvent),
    /// Trust in a user's devices may have changed: deliveries that were refused for lack of trust may work now.
    TrustChanged {
        /// Whose.
        user_id: OwnedUserId,
    },
    /// Whether syncing works: `false` after a failed sync, `true` after the next that succeeds.
    Syncing(bool),
}
