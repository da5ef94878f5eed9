//! Slot events.

use super::*;
use crate::machine::membership::testing::{slot_event, view, with};

fn opened() -> Value {
    json!({"status": "open", "application": {"type": "m.call"}})
}

fn status_of(content: Value, encrypted: bool) -> SlotStatus {
    let view = RoomView { slots: vec![slot_event("m.call#ROOM", content)], encrypted, ..view(vec![]) };
    statuses(&view)[&Slot::room_call()]
}

#[test]
fn encryption_of_slot_must_match_the_room() {
    for kind in ["m.per_member", "org.matrix.msc4143.per_member"] {
        let sealed = with(opened(), "encryption", json!({"type": kind}));
        assert_eq!(status_of(sealed.clone(), true), SlotStatus::Open);
        assert_eq!(status_of(sealed, false), SlotStatus::Unusable(SlotFault::EncryptionForbidden));
    }
    assert_eq!(status_of(opened(), false), SlotStatus::Open);
    let missing = SlotStatus::Unusable(SlotFault::EncryptionMissing);
    assert_eq!(status_of(opened(), true), missing);
    assert_eq!(status_of(with(opened(), "encryption", json!({"type": "m.shared_key"})), true), missing);
}

#[test]
fn slot_is_open_only_by_status_and_application() {
    for content in [json!({}), json!({"status": "closed"}), json!({"status": 1}), json!([])] {
        assert_eq!(status_of(content.clone(), false), SlotStatus::Closed, "{content}");
    }
    for application in [json!({"type": "m.other"}), json!({}), json!("m.call")] {
        let content = with(opened(), "application", application);
        assert_eq!(status_of(content, false), SlotStatus::Unusable(SlotFault::Application));
    }
    assert!(
        SlotStatus::Absent.is_usable() && SlotStatus::Open.is_usable() && !SlotStatus::Closed.is_usable()
    );
}

#[test]
fn invalid_slot_ids_are_skipped() {
    let slots = ["", "m.call", "m.call#", "m.call#a#b"].map(|id| slot_event(id, opened()));
    assert!(statuses(&RoomView { slots: slots.into(), ..view(vec![]) }).is_empty());
}

#[test]
fn written_slot_event_is_open() {
    for encrypted in [false, true] {
        let write = open(&Slot::lower_case_room_call(), encrypted);
        assert_eq!(write.event_type, "org.matrix.msc4143.rtc.slot");
        assert_eq!(write.target, EventTarget::State { key: "m.call#room".to_owned() });
        assert_eq!(status_of(write.content.clone(), encrypted), SlotStatus::Open);
        let encryption = write.content.get("encryption");
        assert_eq!(encryption, encrypted.then_some(&json!({"type": "org.matrix.msc4143.per_member"})));
    }
}
