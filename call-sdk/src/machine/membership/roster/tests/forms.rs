//! Both forms together: order, one entry per device, and the winner of a sticky key.

use proptest::prelude::*;
use ruma_common::UserId;
use serde_json::json;

use super::*;
use crate::machine::membership::testing::{ALICE, BOB, CAROL, redacted, with};

/// Alice's leave with the sticky key `member_id`.
fn sticky_leave(sent: u64, member_id: &str) -> MemberEvent {
    sticky_event(ALICE, sent, json!({"msc4354_sticky_key": member_id}))
}

fn with_id(event: MemberEvent, id: &str) -> MemberEvent {
    MemberEvent { event_id: Some(id.try_into().unwrap()), ..event }
}

// Scenarios 11 and 27.
#[test]
fn members_of_both_forms_are_sorted_by_creation() {
    let created = |sender, created| {
        state_event(sender, 5_000, with(state_content("DEVICE"), "created_ts", json!(created)))
    };
    assert_eq!(
        names(&roster(5_000, vec![created(ALICE, 3000), created(BOB, 1000), sticky(CAROL, 2000, "c")])),
        [BOB, CAROL, ALICE]
    );
}

// Scenario 26.
#[test]
fn device_in_both_forms_is_one_sticky_member() {
    let events = vec![state(ALICE, 1_000), sticky(ALICE, 900, "a")];
    assert_eq!(forms(&roster(2_000, events)), [MembershipForm::Sticky]);
}

#[test]
fn left_sticky_event_does_not_hide_joined_state() {
    let events = vec![sticky_leave(1_200, "a"), sticky(ALICE, 1_100, "a"), state(ALICE, 1_000)];
    assert_eq!(forms(&roster(2_000, events)), [MembershipForm::State]);
}

#[test]
fn state_form_shows_again_when_stickiness_ends() {
    let mut roster = roster(2_000, vec![state(ALICE, 1_000), sticky(ALICE, 1_000, "a")]);
    assert_eq!(roster.next_expiry(), Some(UnixMillis(3_601_000)));
    let change = roster.tick(at(3_601_000));
    assert_eq!((change.left.len(), change.joined.len()), (1, 1), "the member id changes with the form");
    assert_eq!(forms(&roster), [MembershipForm::State]);
}

#[test]
fn newest_of_two_memberships_of_a_device_counts() {
    let member_id = |events| roster(2_000, events).members()[0].member_id.0.clone();
    assert_eq!(member_id(vec![sticky(ALICE, 1_000, "old"), sticky(ALICE, 1_100, "new")]), "new");
    assert_eq!(member_id(vec![sticky(ALICE, 1_100, "new"), sticky(ALICE, 1_000, "old")]), "new");
}

// Scenario 62, with the rule of MSC4354.
#[test]
fn event_that_expires_last_wins_its_key() {
    let event = |id, sent, lasts, intent| {
        let application = json!({"type": "m.call", "intent": intent});
        let content = with(sticky_content(ALICE, "DEVICE", "a"), "application", application);
        let until = UnixMillis(sent + lasts);
        let event = sticky_event(ALICE, sent, content);
        with_id(MemberEvent { sticky_until: Some(until), sticky_rank: until, ..event }, id)
    };
    let winner = |other: MemberEvent| {
        let first = event("$foo:bar", 1_000, 10_000, "first");
        let intent = |events| roster(2_000, events).members()[0].intent.clone().unwrap();
        let winner = intent(vec![first.clone(), other.clone()]);
        assert_eq!(winner, intent(vec![other, first]), "in any order");
        winner
    };
    assert_eq!(winner(event("$abc:bar", 1_000, 10_000, "second")), "first");
    assert_eq!(winner(event("$zzz:bar", 1_000, 10_000, "second")), "second");
    assert_eq!(winner(event("$zzz:bar", 999, 10_000, "second")), "first");
    assert_eq!(winner(event("$abc:bar", 1_001, 10_000, "second")), "second");
    assert_eq!(winner(event("$zzz:bar", 1_500, 9_000, "second")), "first", "a shorter duration ends earlier");
}

#[test]
fn leave_ends_the_join_of_its_key_only() {
    let events = || vec![sticky(ALICE, 1_000, "a"), sticky_leave(1_001, "a")];
    assert!(roster(2_000, events()).members().is_empty());
    assert_eq!(roster(2_000, [events(), vec![sticky(ALICE, 1_002, "b")]].concat()).members().len(), 1);
    let foreign = MemberEvent { sender: UserId::parse(BOB).unwrap(), ..sticky_leave(1_001, "a") };
    assert_eq!(names(&roster(2_000, vec![sticky(ALICE, 1_000, "a"), foreign])), [ALICE]);
}

// Scenario 66, for the homeserver's clear events.
#[test]
fn clear_leave_ends_an_encrypted_join() {
    let join = MemberEvent { encrypted: true, ..sticky(ALICE, 1_000, "a") };
    let mut view = view(vec![join]);
    view.encrypted = true;
    let mut roster = Roster::new(Slot::room_call());
    assert_eq!(roster.update(at(2_000), &view).joined.len(), 1);
    view.members.push(sticky_leave(1_001, "a"));
    assert_eq!(roster.update(at(2_000), &view).left.len(), 1);
}

// In place of scenario 65: redacting a member event kicks the member (MSC4143).
#[test]
fn redaction_kicks_and_does_not_revive_the_predecessor() {
    let (first, second) = (sticky(ALICE, 1_000, "a"), sticky(ALICE, 1_100, "a"));
    let mut roster = roster(2_000, vec![first.clone(), second.clone()]);
    // A redacted event has lost its stickiness as well.
    let gone = MemberEvent { sticky_until: None, sticky_rank: UnixMillis(1_100), ..redacted(&second, BOB) };
    let redacted = view(vec![first.clone(), gone.clone()]);
    assert_eq!(roster.update(at(2_000), &redacted).left.len(), 1);
    assert!(roster.update(at(2_100), &redacted).is_empty());
    let rejoined = view(vec![first, gone, sticky(ALICE, 2_200, "a")]);
    assert_eq!(roster.update(at(2_300), &rejoined).joined.len(), 1, "a new event is a new join");
}

#[test]
fn redacted_state_event_kicks() {
    let event = state(ALICE, 1_000);
    let mut roster = roster(2_000, vec![event.clone()]);
    assert_eq!(roster.update(at(2_000), &view(vec![redacted(&event, BOB)])).left.len(), 1);
}

#[test]
fn forged_state_key_names_its_sender() {
    // In room version 12 any member may write any underscore key.
    let mut forged = state_event(BOB, 1_000, state_content("AAAAAAA"));
    forged.state_key = Some("_@alice:example.org_AAAAAAA_m.call".to_owned());
    let roster = roster(2_000, vec![forged]);
    assert_eq!(roster.members()[0].identities[0].0, "@bob:example.org:AAAAAAA");
}

#[test]
fn members_without_device_are_told_apart_by_member_id() {
    let unnamed = |sent, id| {
        let content = with(sticky_content(ALICE, "x", id), "member", json!({"id": id, "membership": "join"}));
        sticky_event(ALICE, sent, content)
    };
    let roster = roster(2_000, vec![unnamed(1_000, "a"), unnamed(1_001, "b")]);
    let keys: BTreeSet<_> = roster.members().iter().map(Member::key).collect();
    assert_eq!((roster.members().len(), keys.len()), (2, 2));
    assert!(keys.iter().all(|key| key.device_id.is_none()));
}

#[test]
fn invented_devices_are_bounded() {
    let devices = 0..MAX_DEVICES_PER_USER as u64 + 20;
    let events: Vec<_> = devices
        .map(|n| state_event(ALICE, 1_000 + n, state_content(&format!("D{n}"))))
        .chain([state(BOB, 5_000)])
        .collect();
    let roster = roster(6_000, events);
    assert_eq!(roster.members().len(), MAX_DEVICES_PER_USER + 1);
    assert_eq!(roster.members()[0].created, UnixMillis(1_000), "the oldest stay");
}

proptest! {
    /// The order of events in a view does not matter.
    #[test]
    fn order_of_events_does_not_matter(order in Just((0..8).collect::<Vec<usize>>()).prop_shuffle()) {
        let events = [
            state(ALICE, 1_000), state(BOB, 1_000), sticky(ALICE, 1_000, "a"), sticky(ALICE, 1_001, "a"),
            sticky_leave(1_002, "a"), sticky(BOB, 900, "b"), with_id(sticky(BOB, 900, "b2"), "$z"), state(CAROL, 1),
        ];
        let sorted = roster(2_000, events.to_vec());
        let shuffled = roster(2_000, order.iter().map(|n| events[*n].clone()).collect());
        prop_assert_eq!(sorted.members(), shuffled.members());
    }
}
