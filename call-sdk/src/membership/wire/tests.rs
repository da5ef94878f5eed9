//! What the machine of this module does, on virtual time.

use matrix_sdk::ruma::{device_id, room_id, user_id};
use proptest::prelude::*;

use super::*;
use crate::membership::testing::{
    focus, state_event, state_member_content, sticky_event, sticky_member_content,
};

fn without(mut content: Value, name: &str) -> Value {
    content.as_object_mut().unwrap().remove(name).unwrap();
    content
}

fn with(mut content: Value, name: &str, value: Value) -> Value {
    content[name] = value;
    content
}

fn state(content: Value) -> Result<ParsedMembership, Rejected> {
    parse(&state_event("@alice:example.org", 1_000, content))
}

fn sticky(content: Value) -> Result<ParsedMembership, Rejected> {
    parse(&sticky_event("@alice:example.org", 1_000, content))
}

fn is_ignored(result: &Result<ParsedMembership, Rejected>) -> bool {
    matches!(result, Err(Rejected::Ignored(_)))
}

#[test]
fn a01_device_and_call_id_are_required_and_scope_is_not() {
    let base = state_member_content("AAAAAAA");
    assert_eq!(
        state(without(base.clone(), "device_id")),
        Err(Rejected::Ignored(Ignored::Missing("device_id")))
    );
    assert_eq!(state(without(base.clone(), "call_id")), Err(Rejected::Ignored(Ignored::Missing("call_id"))));
    assert!(state(without(base, "scope")).is_ok());
}

#[test]
fn a02_created_is_created_ts_else_the_events_time() {
    let base = state_member_content("AAAAAAA");
    let event = |content| parse(&state_event("@alice:example.org", 12345, content)).unwrap();
    assert_eq!(event(base.clone()).created, UnixMillis(12345));
    assert_eq!(event(with(base, "created_ts", json!(67890))).created, UnixMillis(67890));
}

#[test]
fn a04_expiry_defaults_to_four_hours() {
    let parsed = state(without(state_member_content("AAAAAAA"), "expires")).unwrap();
    assert_eq!(parsed.expires_at.unwrap().since(UnixMillis(2_000)), Duration::from_millis(14_399_000));
}

#[test]
fn a06_application_and_call_id_make_the_slot() {
    let base = state_member_content("AAAAAAA");
    assert_eq!(state(base.clone()).unwrap().slot.id(), "m.call#ROOM");
    let other = state(with(base.clone(), "application", json!("m.not.a.call"))).unwrap().slot;
    assert_eq!((other.application.as_str(), other.call_id.as_str()), ("m.not.a.call", ""));
    let custom = state(with(base, "call_id", json!("customCallId"))).unwrap().slot;
    assert_eq!(custom.id(), "m.call#customCallId");
}

#[test]
fn a07_member_id_has_a_default_and_the_identity_never_follows_it() {
    let base = without(state_member_content("AAAAAAA"), "membershipID");
    let plain = state(base.clone()).unwrap();
    assert_eq!(plain.member_id.0, "@alice:example.org:AAAAAAA");
    let custom = state(with(base, "membershipID", json!("custom"))).unwrap();
    assert_eq!(custom.member_id.0, "custom");
    assert_eq!(custom.identity.0, "@alice:example.org:AAAAAAA");
}

#[test]
fn a08_empty_and_pre_2024_contents_are_not_members() {
    assert_eq!(state(json!({})), Err(Rejected::Left));
    for content in [json!({"memberships": []}), json!({"memberships": [{}]}), json!({"foo": 1}), json!([])] {
        assert!(is_ignored(&state(content.clone())), "{content}");
    }
}

#[test]
fn fields_of_the_wrong_type_reject_a_state_membership() {
    let base = state_member_content("AAAAAAA");
    for (name, value) in [
        ("application", json!(1)),
        ("call_id", json!(null)),
        ("device_id", json!("")),
        ("scope", json!(1)),
        ("membershipID", json!({})),
        ("expires", json!("3600")),
        ("created_ts", json!([])),
        ("focus_active", json!("livekit")),
        ("focus_active", json!({"focus_selection": "multi_sfu"})),
        ("foci_preferred", json!({})),
        ("foci_preferred", json!([{}])),
        ("m.call.intent", json!(7)),
    ] {
        assert!(is_ignored(&state(with(base.clone(), name, value.clone()))), "{name} = {value}");
    }
}

#[test]
fn b13_b18_b19_a_sticky_membership_of_either_generation_is_read() {
    for content in [sticky_member_content("transports"), sticky_member_content("rtc_transports")] {
        let parsed = sticky(content).unwrap();
        assert_eq!(parsed.slot, Slot::room_call());
        assert_eq!(parsed.identity.0, "jUZ0Q1yF5nV3LlAI5xfD1I7BPnAytJaPEAR57EXjJ6s");
        assert_eq!(parsed.expires_at, None);
        assert_eq!(parsed.created, UnixMillis(1_000));
    }
}

#[test]
fn b14_slot_ids_must_name_the_application_and_one_call() {
    let base = sticky_member_content("transports");
    assert!(is_ignored(&sticky(without(base.clone(), "slot_id"))));
    for id in ["invalid_slot_id", "m.call#mycall#extra", "m.other#", "#"] {
        assert!(is_ignored(&sticky(with(base.clone(), "slot_id", json!(id)))), "{id}");
    }
    assert_eq!(sticky(with(base, "slot_id", json!("m.call#ROOM"))).unwrap().slot, Slot::room_call());
}

#[test]
fn b15_an_application_needs_a_plain_type() {
    let base = sticky_member_content("transports");
    assert!(sticky(without(base.clone(), "application")).is_err());
    for application in [json!({}), json!({"type": "m.c#all"}), json!({"type": 1}), json!("m.call")] {
        assert!(is_ignored(&sticky(with(base.clone(), "application", application))));
    }
}

#[test]
fn b16_a_member_must_be_its_sender() {
    let base = sticky_member_content("transports");
    assert!(is_ignored(&sticky(without(base.clone(), "member"))));
    for member in [
        json!({"i": "test"}),
        json!({"device_id": "AAAAAAA", "id": "x"}),
        json!({"user_id": "@@test", "device_id": "AAAAAAA", "id": "x"}),
        json!({"user_id": "@bob:example.org", "device_id": "AAAAAAA", "id": "x"}),
        json!({"user_id": "@alice:example.org", "id": "x"}),
        json!({"user_id": "@alice:example.org", "device_id": "AAAAAAA"}),
    ] {
        assert!(is_ignored(&sticky(with(base.clone(), "member", member))));
    }
}

#[test]
fn b17_a_sticky_key_is_one_string() {
    let base = without(sticky_member_content("transports"), "msc4354_sticky_key");
    assert!(is_ignored(&sticky(base.clone())));
    assert!(is_ignored(&sticky(with(base.clone(), "msc4354_sticky_key", json!(1)))));
    let stable = with(base, "sticky_key", json!("abc123"));
    assert!(sticky(stable.clone()).is_ok());
    assert!(is_ignored(&sticky(with(stable.clone(), "msc4354_sticky_key", json!("other")))));
    assert!(sticky(with(stable, "msc4354_sticky_key", json!("abc123"))).is_ok());
}

#[test]
fn b20_both_generations_name_their_transport() {
    for form in ["transports", "rtc_transports"] {
        let parsed = sticky(sticky_member_content(form)).unwrap();
        assert_eq!(parsed.route, Route::Own(Some(focus("https://sfu.example"))));
    }
    let base = sticky_member_content("transports");
    for transports in [
        json!({"published": [{}], "can_subscribe": ["livekit"]}),
        json!({"published": [{}]}),
        json!({"published": []}),
        json!({"can_subscribe": []}),
        json!([]),
    ] {
        assert!(is_ignored(&sticky(with(base.clone(), "transports", transports))));
    }
}

#[test]
fn b21_the_three_leave_forms_are_leaves() {
    let msc_leave = with(
        sticky_member_content("transports"),
        "member",
        json!({"id": "xyzHASHxyz", "membership": "leave"}),
    );
    for content in [
        json!({"slot_id": "m.call#ROOM", "msc4354_sticky_key": "abc123"}),
        json!({"msc4354_sticky_key": "abc123"}),
        msc_leave,
    ] {
        assert_eq!(sticky(content), Err(Rejected::Left));
    }
}

#[test]
fn the_msc_form_takes_user_and_device_from_the_event() {
    let content = json!({
        "slot_id": "m.call#ROOM",
        "application": {"type": "m.call"},
        "member": {"id": "xyzHASHxyz", "membership": "join"},
        "transports": {"published": [], "can_subscribe": ["livekit"]},
        "sticky_key": "abc123",
    });
    let mut event = sticky_event("@alice:example.org", 1_000, content);
    assert_eq!(parse(&event), Err(Rejected::Ignored(Ignored::Missing("member.device_id"))));
    event.sender_device = Some("AAAAAAA".into());
    let parsed = parse(&event).unwrap();
    assert_eq!((parsed.device_id.as_str(), &parsed.route), ("AAAAAAA", &Route::Own(None)));
    event.content["member"]["claimed_device_id"] = json!("OTHER");
    assert_eq!(parse(&event), Err(Rejected::Ignored(Ignored::ForeignDevice)));
}

#[test]
fn a_sticky_form_that_is_not_sticky_is_ignored() {
    let mut event = sticky_event("@alice:example.org", 1_000, sticky_member_content("transports"));
    event.sticky_until = None;
    assert_eq!(parse(&event), Err(Rejected::Ignored(Ignored::NotSticky)));
}

#[test]
fn c25_what_is_a_transport_and_what_a_selection() {
    let full = json!({"type": "livekit", "livekit_service_url": "https://a/jwt/", "livekit_alias": "!r:example.org"});
    assert_eq!(livekit_focus(&full), Some(focus("https://a/jwt")));
    assert_eq!(livekit_focus(&without(full.clone(), "livekit_alias")), Some(focus("https://a/jwt")));
    assert_eq!(livekit_focus(&without(full.clone(), "livekit_service_url")), None);
    assert_eq!(livekit_focus(&with(full.clone(), "type", json!("other"))), None);
    assert_eq!(livekit_focus(&with(full, "livekit_service_url", json!("file:///etc"))), None);
    assert_eq!(
        focus_selection(&json!({"type": "livekit", "focus_selection": "oldest_membership"})),
        Some(FocusSelection::OldestMembership)
    );
    assert_eq!(focus_selection(&json!({"type": "livekit", "focus_selection": "unknown"})), None);
}

#[test]
fn e35_the_underscore_goes_only_in_rooms_with_owned_state() {
    let key = |version| {
        state_key(user_id!("@alice:example.org"), device_id!("AAAAAAA"), &Slot::room_call(), version)
    };
    for version in ["org.matrix.msc3757.default", "org.matrix.msc3779", "org.matrix.msc3757-x"] {
        assert_eq!(key(version), "@alice:example.org_AAAAAAA_m.call");
    }
    for version in ["12", "1", "org.matrix.msc37570", "org.matrix.msc3757_2"] {
        assert_eq!(key(version), "_@alice:example.org_AAAAAAA_m.call");
    }
}

#[test]
fn e34_a_custom_call_id_is_appended() {
    let slot = Slot { application: "m.call".to_owned(), call_id: "custom".to_owned() };
    assert_eq!(
        state_key(user_id!("@alice:example.org"), device_id!("AAAAAAA"), &slot, "12"),
        "_@alice:example.org_AAAAAAA_m.callcustom"
    );
}

#[test]
fn our_content_is_what_element_call_sends() {
    let own = OwnDescription {
        user_id: user_id!("@alice:example.org").to_owned(),
        device_id: device_id!("AAAAAAA").to_owned(),
        slot: Slot::room_call(),
        focus: focus("https://sfu.example"),
        room_id: room_id!("!room:example.org").to_owned(),
        intent: None,
    };
    let first = state_content(&own, DEFAULT_EXPIRES, None);
    assert_eq!(
        first,
        json!({
            "application": "m.call", "call_id": "", "scope": "m.room",
            "device_id": "AAAAAAA", "membershipID": "@alice:example.org:AAAAAAA",
            "expires": 14_400_000,
            "focus_active": {"type": "livekit", "focus_selection": "multi_sfu"},
            "foci_preferred": [{
                "type": "livekit", "livekit_service_url": "https://sfu.example",
                "livekit_alias": "!room:example.org",
            }],
        })
    );
    let own = OwnDescription { intent: Some("video".to_owned()), ..own };
    let later = state_content(&own, DEFAULT_EXPIRES, Some(UnixMillis(17)));
    assert_eq!((&later["created_ts"], &later["m.call.intent"]), (&json!(17), &json!("video")));
    let parsed = state(later).unwrap();
    assert_eq!(parsed.route, Route::Own(Some(focus("https://sfu.example"))));
    assert_eq!((parsed.intent.as_deref(), parsed.created), (Some("video"), UnixMillis(17)));
}

/// Any JSON of moderate size, biased towards the field names that the parsers look at.
fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        prop_oneof![Just("m.call"), Just("livekit"), Just("m.call#ROOM"), Just("join"), Just("")]
            .prop_map(Value::from),
        ".{0,12}".prop_map(Value::from),
    ];
    let names = prop::sample::select(vec![
        "application",
        "call_id",
        "device_id",
        "expires",
        "created_ts",
        "focus_active",
        "foci_preferred",
        "type",
        "livekit_service_url",
        "slot_id",
        "member",
        "id",
        "user_id",
        "transports",
        "published",
        "can_subscribe",
        "rtc_transports",
        "versions",
        "sticky_key",
        "msc4354_sticky_key",
        "m.relates_to",
        "membership",
        "other",
    ]);
    leaf.prop_recursive(4, 48, 6, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec((names.clone(), inner), 0..8).prop_map(|fields| {
                Value::Object(fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect())
            }),
        ]
    })
}

proptest! {
    #[test]
    fn parsing_never_panics_and_never_leaves_the_sender(content in any_json(), sticky in any::<bool>()) {
        let event = if sticky { sticky_event } else { state_event }("@alice:example.org", u64::MAX, content);
        if let Ok(parsed) = parse(&event) {
            prop_assert_eq!(parsed.user_id, event.sender);
        }
    }

    #[test]
    fn what_we_write_we_read(
        device in "[A-Z]{1,10}", call in "[a-z]{0,8}", intent in prop::option::of("[a-z]{1,8}"),
        expires in 0_u64..u64::MAX / 4, created in prop::option::of(0_u64..u64::MAX / 4),
    ) {
        let own = OwnDescription {
            user_id: user_id!("@alice:example.org").to_owned(),
            device_id: device.as_str().into(),
            slot: Slot { application: "m.call".to_owned(), call_id: call },
            focus: focus("https://sfu.example/jwt"),
            room_id: room_id!("!room:example.org").to_owned(),
            intent,
        };
        let content = state_content(&own, Duration::from_millis(expires), created.map(UnixMillis));
        let parsed = parse(&state_event("@alice:example.org", 5, content)).unwrap();
        prop_assert_eq!(parsed.device_id, own.device_id);
        prop_assert_eq!(parsed.slot, own.slot);
        prop_assert_eq!(parsed.intent, own.intent);
        prop_assert_eq!(parsed.created, UnixMillis(created.unwrap_or(5)));
        prop_assert_eq!(parsed.expires_at, Some(UnixMillis(created.unwrap_or(5) + expires)));
        prop_assert_eq!(parsed.route, Route::Own(Some(own.focus)));
    }
}
