//! Expiry, room membership, and a wrong clock.

use serde_json::json;

use super::*;
use crate::machine::membership::testing::{ALICE, BOB, with, without};

const FOUR_HOURS: u64 = 4 * 3600 * 1000;

// Scenario 3.
#[test]
fn default_length_ends_after_exactly_four_hours() {
    let event = state_event(ALICE, 1_000, without(state_content("DEVICE"), "expires"));
    for (age, count) in [(FOUR_HOURS - 1, 1), (FOUR_HOURS, 0), (FOUR_HOURS + 1, 0)] {
        assert_eq!(roster(1_000 + age, vec![event.clone()]).members().len(), count, "age {age}");
    }
}

// Scenario 5.
#[test]
fn member_expires_without_any_sync() {
    let content = with(with(state_content("DEVICE"), "expires", json!(1000)), "created_ts", json!(500));
    let mut roster = roster(1000, vec![state_event(ALICE, 900, content)]);
    assert_eq!(roster.members()[0].expires_at, Some(UnixMillis(1500)));
    assert_eq!(roster.next_expiry(), Some(UnixMillis(1500)));
    assert!(roster.tick(at(1499)).is_empty());
    let change = roster.tick(at(1500));
    assert_eq!((change.left.len(), roster.members().len(), roster.next_expiry()), (1, 0, None));
}

// Scenario 64.
#[test]
fn sticky_members_end_with_their_stickiness() {
    let until = |event: MemberEvent, until| MemberEvent { sticky_until: Some(UnixMillis(until)), ..event };
    let events = vec![until(sticky(ALICE, 0, "a"), 15_000), until(sticky(BOB, 1_000, "b"), 16_000)];
    let mut roster = roster(1_000, events);
    assert_eq!((names(&roster), roster.next_expiry()), (vec![ALICE, BOB], Some(UnixMillis(15_000))));
    assert_eq!(roster.tick(at(15_000)).left[0].user_id, ALICE);
    assert_eq!(roster.next_expiry(), Some(UnixMillis(16_000)));
    assert_eq!(roster.tick(at(16_000)).left[0].user_id, BOB);
}

// Scenario 10.
#[test]
fn user_who_left_the_room_left_the_call() {
    let mut view = view(vec![state(ALICE, 1_000), state(BOB, 1_000)]);
    let mut roster = Roster::new(Slot::room_call());
    assert_eq!(roster.update(at(2_000), &view).joined.len(), 2);
    view.joined.retain(|user| user == ALICE);
    assert_eq!(roster.update(at(2_000), &view).left.len(), 1);
    assert_eq!(names(&roster), [ALICE]);
}

#[test]
fn clock_that_is_hours_ahead_expires_nobody() {
    const AHEAD: u64 = 5 * 3600 * 1000;
    // Alice joined a minute ago, Bob just now, by the homeserver's clock.
    let (alice, bob) = (state(ALICE, 40_000), state(BOB, 100_000));
    let mut roster = roster(99_000 + AHEAD, vec![alice.clone()]);
    assert_eq!(roster.members().len(), 0, "nothing tells yet that our clock is wrong");
    let change = roster.update(at(100_000 + AHEAD), &view(vec![alice.clone(), bob.clone()]));
    assert_eq!(change.joined.len(), 2);
    assert_eq!(roster.next_expiry(), Some(UnixMillis(40_000 + FOUR_HOURS + AHEAD)));
    assert_eq!(roster.tick(at(40_000 + FOUR_HOURS + AHEAD)).left[0].user_id, ALICE);

    // An event with a time in the far future does not stop the measurement.
    let lie = MemberEvent { origin_server_ts: UnixMillis(u64::MAX), ..state(ALICE, 1) };
    roster.update(at(200_000 + AHEAD), &view(vec![lie.clone(), bob.clone()]));
    assert_eq!(names(&roster), [BOB, ALICE]);
    let again = state(BOB, 300_000);
    roster.update(at(300_000), &view(vec![lie, again]));
    assert_eq!(roster.next_expiry(), Some(UnixMillis(300_000 + FOUR_HOURS)), "our clock was set right");
}

#[test]
fn small_delays_do_not_move_expiry() {
    let mut roster = roster(1_000, vec![]);
    roster.update(at(60_000), &view(vec![state(ALICE, 2_000)]));
    assert_eq!(roster.next_expiry(), Some(UnixMillis(2_000 + FOUR_HOURS)));
}

#[test]
fn old_events_of_the_first_view_do_not_move_expiry() {
    let events = vec![state(ALICE, 1_000), state(BOB, FOUR_HOURS)];
    assert_eq!(names(&roster(1_000 + FOUR_HOURS, events)), [BOB]);
}
