//! What the machine of this module does, on virtual time.

use std::time::{Duration, Instant};

use matrix_sdk::ruma::UserId;
use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::membership::testing::{
    focus, state_event, state_member_content, sticky_event, sticky_member_content,
};

const ALICE: &str = "@alice:example.org";
const BOB: &str = "@bob:example.org";
const CAROL: &str = "@carol:example.org";

#[expect(clippy::disallowed_methods, reason = "an arbitrary origin of virtual time")]
fn at(millis: u64) -> Now {
    Now { instant: Instant::now(), unix: UnixMillis(millis) }
}

fn users(names: &[&str]) -> BTreeSet<OwnedUserId> {
    names.iter().map(|name| UserId::parse(*name).unwrap()).collect()
}

fn everyone() -> BTreeSet<OwnedUserId> {
    users(&[ALICE, BOB, CAROL])
}

fn roster(now: u64, events: Vec<MemberEvent>) -> Roster {
    let mut roster = Roster::new(Slot::room_call());
    roster.update(at(now), events, &everyone());
    roster
}

fn names(roster: &Roster) -> Vec<&str> {
    roster.members().iter().map(|member| member.user_id.as_str()).collect()
}

fn with(mut content: Value, name: &str, value: Value) -> Value {
    content[name] = value;
    content
}

/// A state membership of `sender` with the given focus and selection.
fn routed(sender: &str, created: u64, url: &str, selection: &str) -> MemberEvent {
    let content = with(
        state_member_content("DEVICE"),
        "foci_preferred",
        json!([{"type": "livekit", "livekit_service_url": url, "livekit_alias": "!r:example.org"}]),
    );
    let active = json!({"type": "livekit", "focus_selection": selection});
    state_event(sender, created, with(content, "focus_active", active))
}

fn bob_sticky(at: u64, member_id: &str) -> MemberEvent {
    let member = json!({"user_id": BOB, "device_id": "BBBBBBB", "id": member_id});
    sticky_event(BOB, at, with(sticky_member_content("transports"), "member", member))
}

#[test]
fn a03_a_membership_of_default_length_ends_after_exactly_four_hours() {
    const FOUR_HOURS: u64 = 4 * 3600 * 1000;
    let mut content = state_member_content("AAAAAAA");
    content.as_object_mut().unwrap().remove("expires");
    let event = state_event(ALICE, 1_000, content);
    for (age, count) in [(FOUR_HOURS - 1, 1), (FOUR_HOURS, 0), (FOUR_HOURS + 1, 0)] {
        assert_eq!(roster(1_000 + age, vec![event.clone()]).members().len(), count, "age {age}");
    }
}

#[test]
fn a05_a_member_expires_without_any_sync() {
    let content = with(state_member_content("AAAAAAA"), "expires", json!(1000));
    let mut roster = roster(1000, vec![state_event(ALICE, 900, with(content, "created_ts", json!(500)))]);
    assert_eq!(roster.members()[0].expires_at, Some(UnixMillis(1500)));
    assert_eq!(roster.next_expiry(), Some(UnixMillis(1500)));
    assert!(roster.tick(at(1499)).is_empty());
    let change = roster.tick(at(1500));
    assert_eq!((change.left.len(), roster.members().len(), roster.next_expiry()), (1, 0, None));
}

#[test]
fn a09_other_calls_are_not_this_call() {
    let content = || state_member_content("AAAAAAA");
    for content in
        [with(content(), "application", json!("not-m.call")), with(content(), "call_id", json!("not-room"))]
    {
        assert!(roster(2_000, vec![state_event(ALICE, 1_000, content)]).members().is_empty());
    }
    let room_by_name = with(content(), "call_id", json!("ROOM"));
    assert_eq!(roster(2_000, vec![state_event(ALICE, 1_000, room_by_name)]).members().len(), 1);
}

#[test]
fn a10_who_left_the_room_left_the_call() {
    let events = || {
        vec![
            state_event(ALICE, 1_000, state_member_content("AAAAAAA")),
            state_event(BOB, 1_000, state_member_content("BBBBBBB")),
        ]
    };
    let mut roster = roster(2_000, events());
    assert_eq!(roster.members().len(), 2);
    let change = roster.update(at(2_000), events(), &users(&[ALICE]));
    assert_eq!((change.left.len(), names(&roster)), (1, vec![ALICE]));
}

#[test]
fn a11_members_are_sorted_by_creation() {
    let created = |sender, created| {
        state_event(sender, 5_000, with(state_member_content("D"), "created_ts", json!(created)))
    };
    let roster = roster(5_000, vec![created(ALICE, 3000), created(BOB, 1000), created(CAROL, 2000)]);
    assert_eq!(names(&roster), [BOB, CAROL, ALICE]);
}

#[test]
fn c22_the_oldest_member_decides_for_those_who_follow_it() {
    let roster = roster(
        3_000,
        vec![
            routed(ALICE, 1_000, "https://a", "oldest_membership"),
            routed(BOB, 2_000, "https://b", "oldest_membership"),
        ],
    );
    let foci: Vec<_> = roster.members().iter().map(|m| m.focus.clone()).collect();
    assert_eq!(foci, [Some(focus("https://a")), Some(focus("https://a"))]);
}

#[test]
fn c22_the_oldest_may_itself_be_of_another_mode() {
    let follower = || routed(ALICE, 9_000, "https://a", "oldest_membership");
    let of_alice = |roster: &Roster| roster.members().last().unwrap().focus.clone();
    let multi = roster(9_000, vec![follower(), routed(BOB, 1_000, "https://b", "multi_sfu")]);
    assert_eq!(of_alice(&multi), Some(focus("https://b")));
    let sticky = roster(9_000, vec![follower(), bob_sticky(1_000, "m")]);
    assert_eq!(of_alice(&sticky), Some(focus("https://sfu.example")));
    let unknown = roster(9_000, vec![follower(), routed(BOB, 1_000, "https://b", "unknown")]);
    assert_eq!(of_alice(&unknown), None);
}

#[test]
fn c23_multi_sfu_members_choose_for_themselves_and_unknown_modes_have_no_focus() {
    let roster = roster(
        3_000,
        vec![
            routed(ALICE, 1_000, "https://a", "oldest_membership"),
            routed(BOB, 2_000, "https://b", "multi_sfu"),
            routed(CAROL, 3_000, "https://c", "unknown"),
        ],
    );
    assert_eq!(roster.members()[1].focus, Some(focus("https://b")));
    assert_eq!((names(&roster)[2], roster.members()[2].focus.clone()), (CAROL, None));
}

#[test]
fn c24_a_sticky_member_uses_its_first_transport() {
    let roster =
        roster(3_000, vec![routed(ALICE, 1_000, "https://a", "oldest_membership"), bob_sticky(2_000, "m")]);
    assert_eq!(roster.members()[1].focus, Some(focus("https://sfu.example")));
}

#[test]
fn d26_one_device_in_both_forms_is_one_member_and_sticky_wins() {
    let state = state_event(ALICE, 1_000, state_member_content("AAAAAAA"));
    let sticky = sticky_event(ALICE, 900, sticky_member_content("transports"));
    let roster = roster(2_000, vec![state, sticky]);
    let kinds: Vec<_> = roster.members().iter().map(|m| m.kind).collect();
    assert_eq!(kinds, [MembershipKind::Sticky]);
}

#[test]
fn a_left_sticky_event_hides_its_own_membership_and_not_the_state_form() {
    let state = state_event(ALICE, 1_000, state_member_content("AAAAAAA"));
    let sticky = sticky_event(ALICE, 1_100, sticky_member_content("transports"));
    let left = sticky_event(ALICE, 1_200, json!({"msc4354_sticky_key": "abc123"}));
    let roster = roster(2_000, vec![left, sticky, state]);
    let kinds: Vec<_> = roster.members().iter().map(|m| m.kind).collect();
    assert_eq!(kinds, [MembershipKind::State]);
}

#[test]
fn the_state_form_shows_again_when_stickiness_ends() {
    let state = state_event(ALICE, 1_000, state_member_content("AAAAAAA"));
    let sticky = sticky_event(ALICE, 1_000, sticky_member_content("transports"));
    let mut roster = roster(2_000, vec![state, sticky]);
    assert_eq!(roster.next_expiry(), Some(UnixMillis(3_601_000)));
    let change = roster.tick(at(3_601_000));
    assert_eq!((change.left.len(), change.joined.len()), (1, 1), "the identity changes with the form");
    assert_eq!(roster.members()[0].kind, MembershipKind::State);
}

#[test]
fn d27_both_forms_are_sorted_together() {
    let roster = roster(
        10_000,
        vec![state_event(ALICE, 10_000, state_member_content("AAAAAAA")), bob_sticky(9_000, "m")],
    );
    assert_eq!(names(&roster), [BOB, ALICE]);
}

#[test]
fn d28_d29_one_change_for_a_new_member_and_none_for_the_same_events() {
    let state = || state_event(ALICE, 1_000, state_member_content("AAAAAAA"));
    let mut roster = roster(2_000, vec![state()]);
    let change = roster.update(at(2_000), vec![state(), bob_sticky(1_500, "m")], &everyone());
    assert_eq!((change.joined.len(), change.left.len(), change.updated.len()), (1, 0, 0));
    assert_eq!(roster.members().len(), 2);
    assert!(roster.update(at(2_100), vec![bob_sticky(1_500, "m"), state()], &everyone()).is_empty());
}

#[test]
fn d30_an_intent_is_shared_only_if_nobody_disagrees() {
    let consensus = |alice: Option<&str>, bob: Option<&str>| {
        let event = |sender, intent: Option<&str>| {
            let content = state_member_content("D");
            let content = match intent {
                Some(intent) => with(content, "m.call.intent", json!(intent)),
                None => content,
            };
            state_event(sender, 1_000, content)
        };
        let roster = roster(2_000, vec![event(ALICE, alice), event(BOB, bob)]);
        roster.consensus_intent().map(str::to_owned)
    };
    assert_eq!(consensus(None, None), None);
    assert_eq!(consensus(Some("audio"), None).as_deref(), Some("audio"));
    assert_eq!(consensus(None, Some("audio")).as_deref(), Some("audio"));
    assert_eq!(consensus(Some("audio"), Some("audio")).as_deref(), Some("audio"));
    assert_eq!(consensus(Some("audio"), Some("video")), None);
}

#[test]
fn d31_a_closed_slot_hides_sticky_members_only() {
    let state = state_event(ALICE, 1_000, state_member_content("AAAAAAA"));
    let mut roster = roster(2_000, vec![state, bob_sticky(1_500, "m")]);
    assert_eq!(names(&roster), [ALICE, BOB]);
    assert_eq!(roster.slot_event(at(2_000), Some(&json!({"status": "closed"}))).left.len(), 1);
    assert_eq!(names(&roster), [ALICE]);
    assert_eq!(roster.slot_event(at(2_000), None).joined.len(), 1);
    assert_eq!(roster.slot_event(at(2_000), Some(&json!({"status": "open"}))).left.len(), 1);
    let open = json!({"status": "open", "application": {"type": "m.call"}});
    assert_eq!(roster.slot_event(at(2_000), Some(&open)).joined.len(), 1);
}

#[test]
fn d32_a_member_of_another_slot_does_not_start_the_call() {
    let other = with(state_member_content("AAAAAAA"), "call_id", json!("other"));
    let mut roster = Roster::new(Slot::room_call());
    assert!(roster.update(at(2_000), vec![state_event(ALICE, 1_000, other)], &everyone()).is_empty());
    let here = state_event(BOB, 1_000, state_member_content("BBBBBBB"));
    assert_eq!(roster.update(at(2_000), vec![here], &everyone()).joined.len(), 1);
    assert_eq!(roster.update(at(2_000), vec![], &everyone()).left.len(), 1);
}

#[test]
fn an_hourly_sticky_refresh_is_not_a_rejoin() {
    let mut roster = roster(2_000, vec![bob_sticky(1_000, "m")]);
    let change = roster.update(at(3_000), vec![bob_sticky(2_900, "m")], &everyone());
    assert!(change.is_empty());
    assert_eq!(roster.members()[0].created, UnixMillis(1_000));
    let change = roster.update(at(4_000), vec![bob_sticky(3_900, "other")], &everyone());
    assert_eq!((change.left.len(), change.joined.len()), (1, 1), "another member id is a rejoin");
    assert_eq!(roster.members()[0].created, UnixMillis(3_900));
}

#[test]
fn a_rejoin_in_the_state_form_updates_the_creation_time() {
    let mut roster = roster(2_000, vec![state_event(ALICE, 1_000, state_member_content("AAAAAAA"))]);
    let again = state_event(ALICE, 1_900, state_member_content("AAAAAAA"));
    let change = roster.update(at(2_000), vec![again], &everyone());
    assert_eq!(change.updated[0].created, UnixMillis(1_900));
}

#[test]
fn f62_of_two_sticky_events_with_one_key_the_newer_or_the_higher_id_counts() {
    let event =
        |id: &str, sent, member| MemberEvent { event_id: Some(id.to_owned()), ..bob_sticky(sent, member) };
    let first = || event("$foo:bar", 1_000, "first");
    let winner = |other| roster(2_000, vec![first(), other]).members()[0].member_id.0.clone();
    assert_eq!(winner(event("$abc:bar", 1_000, "second")), "first");
    assert_eq!(winner(event("$zzz:bar", 999, "second")), "first");
    assert_eq!(winner(event("$abc:bar", 1_001, "second")), "second");
}

#[test]
fn nobody_can_write_another_users_membership() {
    // In room version 12 any member may write any underscore key: the sender counts, not the key.
    let mut forged = state_event(BOB, 1_000, state_member_content("AAAAAAA"));
    forged.state_key = Some("_@alice:example.org_AAAAAAA_m.call".to_owned());
    let roster = roster(2_000, vec![forged]);
    assert_eq!(roster.members()[0].identity.0, "@bob:example.org:AAAAAAA");
}

#[test]
fn invented_devices_are_bounded() {
    let events: Vec<_> = (0..MAX_DEVICES_PER_USER + 20)
        .map(|n| state_event(ALICE, 1_000 + n as u64, state_member_content(&format!("D{n}"))))
        .chain([state_event(BOB, 5_000, state_member_content("BBBBBBB"))])
        .collect();
    let roster = roster(6_000, events);
    assert_eq!(roster.members().len(), MAX_DEVICES_PER_USER + 1);
}

proptest! {
    /// Whatever events come and whichever way the clock goes, the list is sorted, has every device once,
    /// only joined users and nothing expired; and applying the changes in order yields the list.
    #[test]
    fn the_list_is_always_sound(
        steps in prop::collection::vec(
            (
                prop::collection::vec(
                    (0_usize..3, 0_usize..3, any::<bool>(), 0_u64..10_000, 0_u64..8_000, 0_usize..3),
                    0..8,
                ),
                0_u64..20_000,
                0_usize..4,
            ),
            1..6,
        )
    ) {
        let people = [ALICE, BOB, CAROL];
        let mut roster = Roster::new(Slot::room_call());
        let mut replayed: BTreeSet<(String, String)> = BTreeSet::new();
        for (events, now, joined) in steps {
            let events = events.into_iter().map(|(who, device, sticky, sent, expires, leaves)| {
                let (who, device) = (people[who], format!("D{device}"));
                if sticky {
                    let member = json!({"user_id": who, "device_id": device, "id": device});
                    let content = if leaves == 0 {
                        json!({"msc4354_sticky_key": device})
                    } else {
                        let content = with(sticky_member_content("transports"), "member", member);
                        with(content, "msc4354_sticky_key", json!(device))
                    };
                    let mut event = sticky_event(who, sent, content);
                    event.sticky_until = Some(UnixMillis(sent + expires));
                    event
                } else if leaves == 0 {
                    state_event(who, sent, json!({}))
                } else {
                    let mode = ["", "oldest_membership", "multi_sfu"][leaves];
                    let content = with(state_member_content(&device), "expires", json!(expires));
                    let active = json!({"type": "livekit", "focus_selection": mode});
                    state_event(who, sent, with(content, "focus_active", active))
                }
            });
            let joined = users(&people[..joined.min(3)]);
            let change = roster.update(at(now), events.collect(), &joined);
            let name = |m: &Member| (m.user_id.to_string(), m.identity.0.clone());
            for member in &change.left {
                prop_assert!(replayed.remove(&name(member)));
            }
            for member in &change.joined {
                prop_assert!(replayed.insert(name(member)));
            }
            prop_assert_eq!(&replayed, &roster.members().iter().map(name).collect::<BTreeSet<_>>());
            prop_assert!(roster.members().is_sorted_by_key(|m| m.created));
            let devices: BTreeSet<_> =
                roster.members().iter().map(|m| (&m.user_id, &m.device_id)).collect();
            prop_assert_eq!(devices.len(), roster.members().len());
            prop_assert!(roster.members().iter().all(|m| joined.contains(&m.user_id)));
            prop_assert!(roster.members().iter().all(|m| m.expires_at.is_none_or(|e| e > UnixMillis(now))));
            prop_assert!(roster.next_expiry().is_none_or(|e| e > UnixMillis(now)));
            // Ticking at the time just used changes nothing.
            let again = roster.tick(at(now).plus(Duration::ZERO));
            prop_assert!(again.is_empty());
        }
    }
}
