//! Slot events, and the choice of a slot.

use super::*;
use crate::{
    machine::membership::testing::{
        ALICE, BOB, CAROL, at, in_slot, slot_event, state_content, state_event, view, with,
    },
    matrix::{MemberEvent, SlotEvent},
    time::UnixMillis,
};

fn opened() -> Value {
    json!({"status": "open", "application": {"type": "m.call"}})
}

fn status_of(content: Value, encrypted: bool) -> SlotStatus {
    let view = RoomView { slots: vec![slot_event("m.call#ROOM", content)], encrypted, ..view(vec![]) };
    statuses(&view)[&Slot::room_call()]
}

fn chosen(slots: Vec<SlotEvent>, members: Vec<MemberEvent>) -> String {
    choose(at(2_000), &RoomView { slots, ..view(members) }).slot_id()
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

#[test]
fn open_slot_is_chosen_first() {
    let lower = || slot_event("m.call#room", opened());
    assert_eq!(chosen(vec![lower()], vec![in_slot(ALICE, 1_000, "m.call#ROOM", "x")]), "m.call#room");
    assert_eq!(chosen(vec![lower(), slot_event("m.call#ROOM", opened())], vec![]), "m.call#ROOM");
    assert_eq!(chosen(vec![slot_event("m.call#a", opened()), lower()], vec![]), "m.call#room");
    let unusable = [
        slot_event("m.call#room", json!({"status": "closed"})),
        slot_event("m.other#x", json!({"status": "open", "application": {"type": "m.other"}})),
    ];
    assert_eq!(chosen(unusable.into(), vec![]), "m.call#ROOM");
}

#[test]
fn slot_of_most_users_is_chosen_next() {
    let members = vec![
        in_slot(ALICE, 1_000, "m.call#room", "x"),
        in_slot(BOB, 1_000, "m.call#room", "x"),
        in_slot(CAROL, 1_000, "m.call#ROOM", "x"),
    ];
    assert_eq!(chosen(vec![], members), "m.call#room");
    let state = state_event(ALICE, 1_000, state_content("DEVICE"));
    assert_eq!(
        chosen(vec![], vec![state, in_slot(BOB, 1_000, "m.call#room", "x")]),
        "m.call#ROOM",
        "ROOM among equals"
    );
    assert_eq!(chosen(vec![], vec![in_slot(ALICE, 1_000, "m.other#x", "x")]), "m.call#ROOM");
    assert_eq!(chosen(vec![], vec![]), "m.call#ROOM");
}

#[test]
fn many_devices_of_one_user_do_not_choose_the_slot() {
    let flood = (0..50).map(|n| {
        let content = with(state_content(&format!("D{n}")), "call_id", json!("evil"));
        state_event(CAROL, 1_000, content)
    });
    let members = flood
        .chain([in_slot(ALICE, 1_000, "m.call#room", "x"), in_slot(BOB, 1_000, "m.call#room", "x")])
        .collect();
    assert_eq!(chosen(vec![], members), "m.call#room");
}

#[test]
fn expired_members_do_not_choose_the_slot() {
    let old =
        MemberEvent { sticky_until: Some(UnixMillis(1_999)), ..in_slot(ALICE, 1_000, "m.call#room", "x") };
    assert_eq!(chosen(vec![], vec![old]), "m.call#ROOM");
}
