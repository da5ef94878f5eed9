//! Which changes are told.

use serde_json::json;

use super::*;
use crate::machine::membership::testing::{ALICE, BOB, with};

fn counts(change: &Change) -> [usize; 4] {
    let Change { joined, left, rejoined, updated } = change;
    [joined, left, rejoined, updated].map(Vec::len)
}

// Scenarios 28 and 29.
#[test]
fn new_member_is_told_once() {
    let mut roster = roster(2_000, vec![state(ALICE, 1_000)]);
    let both = view(vec![state(ALICE, 1_000), sticky(BOB, 1_500, "b")]);
    assert_eq!(counts(&roster.update(at(2_000), &both)), [1, 0, 0, 0]);
    assert_eq!(roster.members().len(), 2);
    assert!(roster.update(at(2_100), &both).is_empty());
}

// Scenario 32.
#[test]
fn member_of_another_slot_is_not_told() {
    let other = state_event(ALICE, 1_000, with(state_content("DEVICE"), "call_id", json!("other")));
    let mut roster = Roster::new(Slot::room_call());
    assert!(roster.update(at(2_000), &view(vec![other])).is_empty());
    assert_eq!(counts(&roster.update(at(2_000), &view(vec![state(BOB, 1_000)]))), [1, 0, 0, 0]);
    assert_eq!(counts(&roster.update(at(2_000), &view(vec![]))), [0, 1, 0, 0]);
}

#[test]
fn hourly_sticky_refresh_is_an_update() {
    let mut roster = roster(2_000, vec![sticky(BOB, 1_000, "b")]);
    let change = roster.update(at(3_000), &view(vec![sticky(BOB, 2_900, "b")]));
    assert_eq!(counts(&change), [0, 0, 0, 1]);
    assert_eq!(change.updated[0].created, UnixMillis(1_000));
    assert_eq!(change.updated[0].event_id.as_ref().unwrap(), "$2900");
    let change = roster.update(at(4_000), &view(vec![sticky(BOB, 3_900, "other")]));
    assert_eq!(counts(&change), [1, 1, 0, 0], "another member id is another member");
    assert_eq!(roster.members()[0].created, UnixMillis(3_900));
}

// Scenario 69, of the roster's part.
#[test]
fn state_member_with_new_creation_time_rejoined() {
    let mut roster = roster(2_000, vec![state(ALICE, 1_000)]);
    let change = roster.update(at(2_000), &view(vec![state(ALICE, 1_900)]));
    assert_eq!(counts(&change), [0, 0, 1, 0]);
    assert_eq!(change.rejoined[0].created, UnixMillis(1_900));
}

#[test]
fn state_refresh_is_an_update() {
    let mut roster = roster(2_000, vec![state(ALICE, 1_000)]);
    let content =
        with(with(state_content("DEVICE"), "created_ts", json!(1_000)), "expires", json!(28_800_000));
    let change = roster.update(at(2_000), &view(vec![state_event(ALICE, 1_900, content)]));
    assert_eq!(counts(&change), [0, 0, 0, 1]);
    assert_eq!(change.updated[0].expires_at, Some(UnixMillis(28_801_000)));
}

#[test]
fn change_of_form_under_one_member_id_is_a_rejoin() {
    let mut roster = roster(2_000, vec![state(ALICE, 1_000)]);
    let change = roster.update(at(2_000), &view(vec![sticky(ALICE, 1_000, "@alice:example.org:DEVICE")]));
    assert_eq!(counts(&change), [0, 0, 1, 0]);
}
