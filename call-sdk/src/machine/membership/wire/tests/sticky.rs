//! Reading sticky memberships.

use serde_json::{Value, json};

use super::super::{
    fixtures::{sticky_joins, sticky_leaves},
    *,
};
use crate::{
    machine::membership::testing::{
        ALICE, BOB, focus, redacted, sticky_content, sticky_event, with, without,
    },
    matrix::MemberEvent,
};

fn parse(content: Value) -> Result<ParsedMembership, Rejected> {
    read(&sticky_event(ALICE, 1_000, content), false)
}

fn base() -> Value {
    sticky_content(ALICE, "AAAAAAA", "xyzHASHxyz")
}

fn is_ignored(result: &Result<ParsedMembership, Rejected>) -> bool {
    matches!(result, Err(Rejected::Ignored(_)))
}

/// Alice's event in an encrypted room, encrypted by `device`.
fn encrypted(content: Value, device: Option<&str>) -> MemberEvent {
    let sender_device = device.map(Into::into);
    MemberEvent { encrypted: true, sender_device, ..sticky_event(ALICE, 1_000, content) }
}

// Scenarios 13, 18, 19 and 20.
#[test]
fn every_generation_is_read() {
    for (name, content, _) in sticky_joins() {
        let mut event = sticky_event(ALICE, 1_000, content.clone());
        event.sender_device = Some("AAAAAAA".into());
        let parsed = read(&event, false).unwrap();
        assert_eq!((parsed.user_id.as_str(), &parsed.slot), (ALICE, &Slot::room_call()), "{name}");
        assert_eq!(parsed.device_id, Some("AAAAAAA".into()), "{name}");
        assert_eq!(parsed.member_id.0, "xyzHASHxyz", "{name}");
        assert_eq!((parsed.created, parsed.expires_at), (UnixMillis(1_000), None), "{name}");
        let foci = match name {
            "MSC4143" => vec![LiveKitFocus::of_sfu("wss://sfu.example".parse().unwrap())],
            "MSC4143 without transports" => vec![],
            _ => vec![focus("https://sfu.example")],
        };
        assert_eq!(parsed.route, Route::Own(foci), "{name}");
        assert_eq!(parsed.reads_msc_keys, name.starts_with("MSC4143") || name == "G4", "{name}");
    }
}

// Scenario 21.
#[test]
fn every_leave_is_a_leave() {
    for (name, content) in sticky_leaves() {
        assert_eq!(parse(content), Err(Rejected::Left), "{name}");
    }
    let event = sticky_event(ALICE, 1_000, base());
    assert_eq!(read(&redacted(&event, BOB), false), Err(Rejected::Left));
}

#[test]
fn identities_of_the_published_type_come_first() {
    let by_device = "jUZ0Q1yF5nV3LlAI5xfD1I7BPnAytJaPEAR57EXjJ6s"; // scenario 18
    let by_member =
        ParticipantIdentity::of_member(&parse(base()).unwrap().user_id, &MemberId("xyzHASHxyz".to_owned()));
    let identities = |entry: Value| {
        let transports = json!({"published": [entry], "can_subscribe": []});
        let parsed = parse(with(base(), "transports", transports)).unwrap();
        parsed.identities.into_iter().map(|identity| identity.0).collect::<Vec<_>>()
    };
    let wide =
        json!({"type": "livekit", "livekit_service_url": "https://jwt.example", "url": "wss://sfu.example"});
    assert_eq!(identities(wide.clone()), [by_device, &by_member.0]);
    assert_eq!(identities(with(wide, "type", json!("m.livekit"))), [&by_member.0, by_device]);
}

// Scenarios 13 and 14.
#[test]
fn slot_id_names_the_application_and_one_call_exactly() {
    assert!(is_ignored(&parse(without(base(), "slot_id"))));
    for id in [
        "invalid_slot_id",
        "m.call#mycall#extra",
        "m.other#ROOM",
        "#",
        &format!("m.call#{}", "x".repeat(256)),
    ] {
        assert!(is_ignored(&parse(with(base(), "slot_id", json!(id)))), "{id}");
    }
    for id in ["m.call#ROOM", "m.call#room", "m.call#"] {
        assert_eq!(parse(with(base(), "slot_id", json!(id))).unwrap().slot.slot_id(), id);
    }
}

// Scenario 15.
#[test]
fn application_needs_a_plain_type() {
    for application in
        [json!({}), json!({"type": "m.c#all"}), json!({"type": 1}), json!("m.call"), json!(null)]
    {
        assert!(is_ignored(&parse(with(base(), "application", application.clone()))), "{application}");
    }
}

// Scenario 16, but for the user id, which MSC4143 leaves out.
#[test]
fn member_must_be_the_sender() {
    assert!(is_ignored(&parse(without(base(), "member"))));
    for member in [
        json!({"i": "test"}),
        json!({"user_id": ALICE, "device_id": "AAAAAAA"}),
        json!({"user_id": ALICE, "device_id": "AAAAAAA", "id": ""}),
        json!({"user_id": ALICE, "device_id": "AAAAAAA", "id": "x".repeat(256)}),
        json!({"user_id": ALICE, "device_id": "x".repeat(256), "id": "x"}),
        json!({"user_id": ALICE, "device_id": 1, "id": "x"}),
        json!({"user_id": 1, "device_id": "AAAAAAA", "id": "x"}),
    ] {
        assert!(is_ignored(&parse(with(base(), "member", member.clone()))), "{member}");
    }
    for name in ["user_id", "claimed_user_id"] {
        for user in ["@@test", BOB] {
            let member = json!({"id": "x", "device_id": "AAAAAAA", name: user});
            let foreign = parse(with(base(), "member", member));
            assert_eq!(foreign, Err(Rejected::Ignored(Ignored::ForeignUser)), "{name} = {user}");
        }
    }
    assert!(parse(with(base(), "member", json!({"device_id": "AAAAAAA", "id": "x"}))).is_ok());
}

// Scenario 17.
#[test]
fn sticky_key_is_one_string() {
    let base = without(base(), "msc4354_sticky_key");
    assert!(is_ignored(&parse(base.clone())));
    for key in [json!(1), json!(""), json!("x".repeat(256)), json!(null)] {
        assert!(is_ignored(&parse(with(base.clone(), "msc4354_sticky_key", key.clone()))), "{key}");
    }
    let stable = with(base, "sticky_key", json!("abc123"));
    assert!(parse(stable.clone()).is_ok());
    assert!(is_ignored(&parse(with(stable.clone(), "msc4354_sticky_key", json!("other")))));
    assert!(parse(with(stable, "msc4354_sticky_key", json!("abc123"))).is_ok());
}

// Scenario 20.
#[test]
fn one_well_formed_transport_list_is_enough() {
    let list = json!([{"type": "livekit", "livekit_service_url": "https://sfu.example"}]);
    for transports in [json!({"published": [{}], "can_subscribe": []}), json!({"published": {}}), json!([])] {
        let broken = with(base(), "transports", transports.clone());
        assert!(is_ignored(&parse(broken.clone())), "{transports}");
        let saved = parse(with(broken, "rtc_transports", list.clone())).unwrap();
        assert_eq!(saved.route, Route::Own(vec![focus("https://sfu.example")]), "{transports}");
    }
    assert!(parse(with(base(), "rtc_transports", json!(1))).is_ok());
    let only_old = without(base(), "transports");
    assert!(is_ignored(&parse(with(only_old.clone(), "rtc_transports", json!([{}])))));
    for content in [with(base(), "transports", json!({"can_subscribe": ["livekit"]})), only_old] {
        assert_eq!(parse(content).unwrap().route, Route::Own(vec![]));
    }
}

// Scenario 24.
#[test]
fn transports_of_both_lists_merge_in_order() {
    let published = json!([
        {"type": "m.livekit", "url": "wss://first.example"},
        {"type": "livekit", "livekit_service_url": "https://jwt.example"},
    ]);
    let older = json!([{"type": "livekit", "livekit_service_url": "https://jwt.example", "url": "wss://sfu.example"}]);
    let content = with(base(), "transports", json!({"published": published, "can_subscribe": []}));
    let first = LiveKitFocus::of_sfu("wss://first.example".parse().unwrap());
    let second =
        LiveKitFocus { sfu: Some("wss://sfu.example".parse().unwrap()), ..focus("https://jwt.example") };
    assert_eq!(parse(with(content, "rtc_transports", older)).unwrap().route, Route::Own(vec![first, second]));
}

#[test]
fn fields_that_other_generations_lack_are_ignored() {
    let odd =
        [("versions", json!(1)), ("capabilities", json!([])), ("m.relates_to", json!(1)), ("x", json!({}))];
    for (name, value) in odd {
        assert!(parse(with(base(), name, value)).is_ok(), "{name}");
    }
    assert!(parse(without(base(), "versions")).is_ok());
}

#[test]
fn intent_has_two_names() {
    let intent = |application| parse(with(base(), "application", application)).unwrap().intent;
    assert_eq!(intent(json!({"type": "m.call", "m.call.intent": "audio"})).as_deref(), Some("audio"));
    assert_eq!(intent(json!({"type": "m.call", "intent": "audio"})).as_deref(), Some("audio"));
    assert_eq!(
        intent(json!({"type": "m.call", "intent": "audio", "m.call.intent": 1})).as_deref(),
        Some("audio")
    );
    assert_eq!(intent(json!({"type": "m.call", "intent": "x".repeat(256)})), None);
}

#[test]
fn clear_event_in_encrypted_room_is_a_leave() {
    assert_eq!(read(&sticky_event(ALICE, 1_000, base()), true), Err(Rejected::Left));
    assert!(read(&encrypted(base(), Some("AAAAAAA")), true).is_ok());
    assert!(read(&encrypted(base(), None), true).is_ok(), "the sealing device is not known");
}

#[test]
fn device_that_encrypted_wins() {
    let unnamed = with(base(), "member", json!({"id": "x", "membership": "join"}));
    let parsed = read(&encrypted(unnamed.clone(), Some("AAAAAAA")), true).unwrap();
    assert_eq!(parsed.device_id, Some("AAAAAAA".into()));
    let foreign = Err(Rejected::Ignored(Ignored::ForeignDevice));
    assert_eq!(read(&encrypted(base(), Some("OTHER")), true), foreign);
    let claimed = with(base(), "member", json!({"id": "x", "claimed_device_id": "AAAAAAA"}));
    assert_eq!(read(&encrypted(claimed, Some("OTHER")), true), foreign);
}

#[test]
fn member_without_device_counts_in_clear_rooms_only() {
    let unnamed = with(base(), "member", json!({"id": "x", "membership": "join"}));
    let parsed = parse(unnamed.clone()).unwrap();
    assert_eq!(parsed.device_id, None);
    assert_eq!(parsed.identities, [ParticipantIdentity::of_member(&parsed.user_id, &parsed.member_id)]);
    let missing = Err(Rejected::Ignored(Ignored::Missing("member.device_id")));
    assert_eq!(read(&encrypted(unnamed, None), true), missing);
}

#[test]
fn event_without_stickiness_is_ignored() {
    let event = MemberEvent { sticky_until: None, ..sticky_event(ALICE, 1_000, base()) };
    assert_eq!(read(&event, false), Err(Rejected::Ignored(Ignored::NotSticky)));
}
