//! The slots of a room (MSC4143 §Slots): the state events that open and close calls.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::wire::SLOT_TYPE;
use crate::{
    matrix::{EventTarget, EventWrite, RoomView},
    member::Slot,
};

/// Encryption of a slot with a media key per member, by its unstable and stable names.
const PER_MEMBER: [&str; 2] = ["org.matrix.msc4143.per_member", "m.per_member"];

/// The state of a slot, by its state event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum SlotStatus {
    /// It has no event. Deployed clients treat it as open for membership.
    Absent,
    /// It is open.
    Open,
    /// It is closed: sticky members do not count, state members do.
    Closed,
    /// Its event is invalid, which counts as closed.
    Unusable(SlotFault),
}

impl SlotStatus {
    /// Whether sticky members of the slot count.
    #[must_use]
    pub(crate) fn is_usable(self) -> bool {
        matches!(self, Self::Absent | Self::Open)
    }
}

/// Why the event of an open slot is invalid. A user with the power to write it must correct it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum SlotFault {
    /// `application.type` is missing or differs from that of the slot id.
    #[error("the slot event does not name the application of its slot id; open the slot again")]
    Application,
    /// The room is encrypted, and `encryption` is missing or of a type that we do not support.
    #[error("the slot event names no supported encryption in an encrypted room; open the slot again")]
    EncryptionMissing,
    /// The room is not encrypted, and `encryption` is present.
    #[error("the slot event asks for encryption in an unencrypted room; open the slot again")]
    EncryptionForbidden,
}

/// The status of every slot that has an event. Events with an invalid slot id are skipped.
#[must_use]
pub(crate) fn statuses(view: &RoomView) -> BTreeMap<Slot, SlotStatus> {
    let events = view.slots.iter().filter_map(|event| {
        let slot = Slot::parse(&event.slot_id)?;
        let status = read(&slot, &event.content, view.encrypted);
        Some((slot, status))
    });
    events.collect()
}

/// The event that opens a slot, to be written before the membership if we may send state.
#[must_use]
pub(crate) fn open(slot: &Slot, room_is_encrypted: bool) -> EventWrite {
    let mut content = json!({ "status": "open", "application": { "type": slot.application } });
    if room_is_encrypted {
        content["encryption"] = json!({ "type": PER_MEMBER[0] });
    }
    EventWrite {
        event_type: SLOT_TYPE.to_owned(),
        target: EventTarget::State { key: slot.slot_id() },
        content,
    }
}

fn read(slot: &Slot, content: &Value, room_is_encrypted: bool) -> SlotStatus {
    let type_of = |name| content.get(name).and_then(|of| of.get("type")).and_then(Value::as_str);
    if content.get("status").and_then(Value::as_str) != Some("open") {
        return SlotStatus::Closed;
    }
    if type_of("application") != Some(slot.application.as_str()) {
        return SlotStatus::Unusable(SlotFault::Application);
    }
    let is_supported = type_of("encryption").is_some_and(|kind| PER_MEMBER.contains(&kind));
    match (room_is_encrypted, content.get("encryption")) {
        (true, _) if !is_supported => SlotStatus::Unusable(SlotFault::EncryptionMissing),
        (false, Some(_)) => SlotStatus::Unusable(SlotFault::EncryptionForbidden),
        _ => SlotStatus::Open,
    }
}

#[cfg(test)]
mod tests;
