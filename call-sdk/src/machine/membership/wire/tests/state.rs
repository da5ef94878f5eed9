//! Reading state memberships.

use std::time::Duration;

use serde_json::{Value, json};

use super::super::{
    fixtures::{state_joins, state_leaves_and_relics},
    *,
};
use crate::{
    machine::membership::testing::{ALICE, BOB, focus, redacted, state_content, state_event, with, without},
    matrix::MemberEvent,
};

fn parse(content: Value) -> Result<ParsedMembership, Rejected> {
    read(&state_event(ALICE, 1_000, content), false)
}

fn is_ignored(result: &Result<ParsedMembership, Rejected>) -> bool {
    matches!(result, Err(Rejected::Ignored(_)))
}

#[test]
fn every_generation_is_read() {
    for (name, content) in state_joins() {
        let parsed = parse(content.clone()).unwrap();
        assert_eq!(parsed.user_id, ALICE, "{name}");
        assert_eq!(parsed.device_id, Some("AAAAAAA".into()), "{name}");
        assert_eq!(parsed.member_id.0, "@alice:example.org:AAAAAAA", "{name}");
        assert_eq!(parsed.slot, Slot::room_call(), "{name}");
        let foci = vec![focus("https://sfu.example")];
        let is_oldest = content["focus_active"]["focus_selection"] == "oldest_membership";
        assert_eq!(
            parsed.route,
            if is_oldest { Route::OldestMember(foci) } else { Route::Own(foci) },
            "{name}"
        );
    }
}

// Scenario 8.
#[test]
fn leaves_and_forms_before_2024_are_not_members() {
    for (name, content) in state_leaves_and_relics() {
        let parsed = parse(content);
        assert_eq!(parsed == Err(Rejected::Left), name == "leave", "{name}");
        assert!(parsed.is_err(), "{name}");
    }
    assert!(is_ignored(&parse(json!([]))));
}

// Scenario 1.
#[test]
fn device_and_call_id_are_required_and_scope_is_not() {
    let base = state_content("AAAAAAA");
    for name in ["device_id", "call_id"] {
        assert_eq!(parse(without(base.clone(), name)), Err(Rejected::Ignored(Ignored::Missing(name))));
    }
    assert!(parse(without(base, "scope")).is_ok());
}

// Scenario 2.
#[test]
fn created_defaults_to_event_time() {
    let parsed = |content| read(&state_event(ALICE, 12_345, content), false).unwrap().created;
    assert_eq!(parsed(state_content("AAAAAAA")), UnixMillis(12_345));
    assert_eq!(parsed(with(state_content("AAAAAAA"), "created_ts", json!(67_890))), UnixMillis(67_890));
}

// Scenario 4.
#[test]
fn expiry_defaults_to_four_hours() {
    let parsed = parse(without(state_content("AAAAAAA"), "expires")).unwrap();
    assert_eq!(parsed.expires_at.unwrap().since(UnixMillis(2_000)), Duration::from_millis(14_399_000));
}

#[test]
fn odd_numbers_are_read_as_nearest_time() {
    for (number, millis) in [(json!(1.5), 1), (json!(-5), 0), (json!(1e300), u64::MAX)] {
        let parsed = parse(with(state_content("AAAAAAA"), "created_ts", number.clone())).unwrap();
        assert_eq!(parsed.created, UnixMillis(millis), "{number}");
        assert!(parsed.expires_at.unwrap() >= parsed.created);
    }
}

// Scenario 6.
#[test]
fn application_and_call_id_make_the_slot() {
    let base = state_content("AAAAAAA");
    let slot_id = |content| parse(content).unwrap().slot.slot_id();
    assert_eq!(slot_id(base.clone()), "m.call#ROOM");
    assert_eq!(slot_id(with(base.clone(), "application", json!("m.not.a.call"))), "m.not.a.call#");
    for id in ["customCallId", "room", "ROOM"] {
        assert_eq!(slot_id(with(base.clone(), "call_id", json!(id))), format!("m.call#{id}"));
    }
}

// Scenario 7.
#[test]
fn likeliest_identity_never_follows_membership_id() {
    let custom = parse(with(state_content("AAAAAAA"), "membershipID", json!("custom"))).unwrap();
    assert_eq!(custom.member_id.0, "custom");
    assert_eq!(custom.identities.len(), 3);
    assert_eq!(custom.identities[0].0, "@alice:example.org:AAAAAAA");
    let device = custom.device_id.unwrap();
    let hashed = ParticipantIdentity::of_claimed_device(&custom.user_id, &device, &custom.member_id);
    assert_eq!(custom.identities[1], hashed);
    assert_eq!(custom.identities[2], ParticipantIdentity::of_member(&custom.user_id, &custom.member_id));
}

#[test]
fn fields_of_wrong_type_reject() {
    for (name, value) in [
        ("application", json!(1)),
        ("application", json!("")),
        ("call_id", json!(null)),
        ("call_id", json!("x".repeat(256))),
        ("device_id", json!("")),
        ("device_id", json!("x".repeat(256))),
        ("scope", json!(1)),
        ("membershipID", json!({})),
        ("membershipID", json!("x".repeat(512))),
        ("expires", json!("3600")),
        ("created_ts", json!([])),
        ("focus_active", json!("livekit")),
        ("focus_active", json!({"focus_selection": "multi_sfu"})),
        ("foci_preferred", json!({})),
        ("foci_preferred", json!([{}])),
        ("m.call.intent", json!(7)),
    ] {
        assert!(is_ignored(&parse(with(state_content("AAAAAAA"), name, value.clone()))), "{name} = {value}");
    }
}

#[test]
fn overlong_intent_is_dropped() {
    let intent =
        |text: &str| parse(with(state_content("AAAAAAA"), "m.call.intent", json!(text))).unwrap().intent;
    assert_eq!(intent("video").as_deref(), Some("video"));
    assert_eq!(intent(&"x".repeat(256)), None);
}

// Scenario 23.
#[test]
fn unknown_focus_selection_has_no_route() {
    for active in [
        json!({"type": "livekit", "focus_selection": "unknown"}),
        json!({"type": "livekit"}),
        json!({"type": "other", "focus_selection": "multi_sfu"}),
    ] {
        let parsed = parse(with(state_content("AAAAAAA"), "focus_active", active)).unwrap();
        assert_eq!(parsed.route, Route::Unknown);
    }
}

#[test]
fn only_first_focus_counts() {
    let foci = json!([
        {"type": "other"},
        {"type": "livekit", "livekit_service_url": "https://jwt.example"},
        {"type": "livekit", "livekit_service_url": "https://second.example"},
        {"type": "m.livekit", "livekit_service_url": "https://jwt.example", "url": "wss://sfu.example"},
    ]);
    let parsed = parse(with(state_content("AAAAAAA"), "foci_preferred", foci)).unwrap();
    let merged =
        LiveKitFocus { sfu: Some("wss://sfu.example".parse().unwrap()), ..focus("https://jwt.example") };
    assert_eq!(parsed.route, Route::Own(vec![merged]));
    assert!(parsed.reads_msc_keys, "an m.livekit entry");
    assert!(!parse(state_content("AAAAAAA")).unwrap().reads_msc_keys);
}

#[test]
fn device_that_encrypted_must_be_the_claimed_one() {
    let mut event = state_event(ALICE, 1_000, state_content("AAAAAAA"));
    event.sender_device = Some("AAAAAAA".into());
    assert!(read(&event, true).is_ok());
    event.sender_device = Some("OTHER".into());
    assert_eq!(read(&event, true), Err(Rejected::Ignored(Ignored::ForeignDevice)));
}

#[test]
fn redacted_event_is_a_leave() {
    let event = state_event(ALICE, 1_000, state_content("AAAAAAA"));
    let with_content = MemberEvent { content: event.content.clone(), ..redacted(&event, BOB) };
    for event in [redacted(&event, BOB), redacted(&event, ALICE), with_content] {
        assert_eq!(read(&event, false), Err(Rejected::Left));
    }
}
