//! Slots: which members are in this call, which in another, and closed slots.

use serde_json::{Value, json};

use super::*;
use crate::{
    machine::membership::{
        slots::SlotFault,
        testing::{ALICE, BOB, CAROL, in_slot, slot_event, with},
    },
    matrix::RoomView,
};

fn others(roster: &Roster) -> Vec<(String, usize)> {
    roster.other_slots().iter().map(|(slot, count)| (slot.slot_id(), *count)).collect()
}

// Scenario 9.
#[test]
fn other_calls_are_not_this_call() {
    for (name, value) in [("application", "not-m.call"), ("call_id", "not-room"), ("call_id", "room")] {
        let content = with(state_content("DEVICE"), name, json!(value));
        assert!(
            roster(2_000, vec![state_event(ALICE, 1_000, content)]).members().is_empty(),
            "{name} = {value}"
        );
    }
    let room_by_name = with(state_content("DEVICE"), "call_id", json!("ROOM"));
    assert_eq!(roster(2_000, vec![state_event(ALICE, 1_000, room_by_name)]).members().len(), 1);
}

#[test]
fn members_of_other_slots_are_counted_apart() {
    let roster = roster(
        2_000,
        vec![
            state(ALICE, 1_000),
            in_slot(BOB, 1_000, "m.call#room", "b"),
            in_slot(CAROL, 1_000, "m.call#room", "c"),
            in_slot(CAROL, 1_001, "m.call#custom", "c2"),
            in_slot(BOB, 1_000, "m.other#ROOM", "b2"),
        ],
    );
    assert_eq!(names(&roster), [ALICE]);
    assert_eq!(others(&roster), [("m.call#room".to_owned(), 2), ("m.call#custom".to_owned(), 1)]);
}

#[test]
fn device_in_two_slots_counts_in_both() {
    let events = vec![in_slot(ALICE, 1_000, "m.call#ROOM", "a"), in_slot(ALICE, 1_500, "m.call#room", "b")];
    let roster = roster(2_000, events);
    assert_eq!(roster.members()[0].member_id.0, "a");
    assert_eq!(others(&roster), [("m.call#room".to_owned(), 1)]);
}

#[test]
fn members_of_other_slots_expire() {
    let content = with(with(state_content("DEVICE"), "call_id", json!("room")), "expires", json!(500));
    let mut roster = roster(1_100, vec![state_event(ALICE, 1_000, content)]);
    assert_eq!((others(&roster).len(), roster.next_expiry()), (1, Some(UnixMillis(1_500))));
    roster.tick(at(1_500));
    assert!(others(&roster).is_empty());
}

#[test]
fn invented_slots_are_bounded() {
    let events = (0..100).map(|n| in_slot(ALICE, 1_000, &format!("m.call#{n}"), &n.to_string()));
    let crowded = in_slot(BOB, 1_000, "m.call#99", "b");
    let roster = roster(2_000, events.chain([crowded]).collect());
    assert_eq!(others(&roster).len(), MAX_OTHER_SLOTS);
    assert_eq!(others(&roster)[0], ("m.call#99".to_owned(), 2), "the largest first");
}

// Scenario 31.
#[test]
fn closed_slot_hides_sticky_members_only() {
    let open = json!({"status": "open", "application": {"type": "m.call"}});
    let mut roster = Roster::new(Slot::room_call());
    let mut seen = |content: Option<Value>| {
        let slots = content.map(|content| slot_event("m.call#ROOM", content));
        let view = RoomView {
            slots: slots.into_iter().collect(),
            ..view(vec![state(ALICE, 1_000), sticky(BOB, 1_500, "b")])
        };
        roster.update(at(2_000), &view);
        (roster.slot_status(), roster.members().len())
    };
    assert_eq!(seen(None), (SlotStatus::Absent, 2));
    assert_eq!(seen(Some(json!({"status": "closed"}))), (SlotStatus::Closed, 1));
    assert_eq!(seen(Some(open.clone())), (SlotStatus::Open, 2));
    let without_application = json!({"status": "open"});
    assert_eq!(seen(Some(without_application)), (SlotStatus::Unusable(SlotFault::Application), 1));
    assert_eq!(seen(None), (SlotStatus::Absent, 2));
    let encrypted = with(open, "encryption", json!({"type": "m.per_member"}));
    assert_eq!(seen(Some(encrypted)), (SlotStatus::Unusable(SlotFault::EncryptionForbidden), 1));
}

#[test]
fn closed_other_slot_has_no_sticky_members() {
    let events = vec![in_slot(BOB, 1_000, "m.call#room", "b")];
    let slots = vec![slot_event("m.call#room", json!({"status": "closed"}))];
    let mut roster = Roster::new(Slot::room_call());
    roster.update(at(2_000), &RoomView { slots, ..view(events) });
    assert_eq!((roster.slot_status(), others(&roster)), (SlotStatus::Absent, vec![]));
}
