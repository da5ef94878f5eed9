//! Arbitrary content: reading never panics, keeps little, and accepts whatever deployed validators accept.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::{
    super::{
        fixtures::{Generation, state_joins, sticky_joins},
        *,
    },
    validators::{js_sdk_reads_state, js_sdk_reads_sticky},
};
use crate::{
    machine::membership::testing::{ALICE, state_event, sticky_event},
    matrix::MemberEvent,
};

/// More than a parsed membership ever holds: 16 foci with two URLs of 2048 bytes, and a few identifiers.
const MAX_PARSED: usize = 80_000;

/// Any JSON of moderate size, biased towards the field names and values that the readers look at.
fn any_json() -> impl Strategy<Value = Value> {
    let words = [
        "m.call",
        "livekit",
        "m.livekit",
        "m.call#ROOM",
        "join",
        "leave",
        "",
        "https://sfu.example",
        "multi_sfu",
        ALICE,
    ];
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        prop::sample::select(words.to_vec()).prop_map(Value::from),
        ".{0,12}".prop_map(Value::from),
        (0_usize..3000).prop_map(|length| Value::from("x".repeat(length))),
    ];
    let names = prop::sample::select(vec![
        "application",
        "call_id",
        "device_id",
        "membershipID",
        "expires",
        "created_ts",
        "focus_active",
        "focus_selection",
        "foci_preferred",
        "type",
        "livekit_service_url",
        "url",
        "slot_id",
        "member",
        "id",
        "user_id",
        "transports",
        "published",
        "can_subscribe",
        "rtc_transports",
        "sticky_key",
        "msc4354_sticky_key",
        "membership",
        "m.call.intent",
        "intent",
        "capabilities",
        "other",
    ]);
    leaf.prop_recursive(4, 48, 6, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..24).prop_map(Value::from),
            prop::collection::vec((names.clone(), inner), 0..8).prop_map(|fields| {
                Value::Object(fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect())
            }),
        ]
    })
}

/// A fixture of either form.
fn any_fixture() -> impl Strategy<Value = (bool, Value)> {
    let state = state_joins().into_iter().map(|(_, content)| (false, content));
    let sticky = sticky_joins().into_iter().map(|(_, content, _)| (true, content));
    prop::sample::select(state.chain(sticky).collect::<Vec<_>>())
}

/// Every object and list in `value`, by JSON pointer.
fn places(value: &Value, at: &str, found: &mut Vec<String>) {
    let children: Vec<(String, &Value)> = match value {
        Value::Object(fields) => fields.iter().map(|(name, child)| (name.clone(), child)).collect(),
        Value::Array(list) => list.iter().enumerate().map(|(n, child)| (n.to_string(), child)).collect(),
        _ => return,
    };
    for (name, child) in children {
        let at = format!("{at}/{name}");
        places(child, &at, found);
        found.push(at);
    }
}

/// The fixture with one value at any depth replaced or removed.
fn damaged(mut content: Value, place: prop::sample::Index, replacement: Option<Value>) -> Value {
    let mut found = Vec::new();
    places(&content, "", &mut found);
    let place = place.get(&found);
    match replacement {
        Some(value) => *content.pointer_mut(place).unwrap() = value,
        None => {
            let (parent, name) = place.rsplit_once('/').unwrap();
            if let Some(Value::Object(fields)) = content.pointer_mut(parent) {
                fields.remove(name);
            }
        }
    }
    content
}

fn event(sticky: bool, content: Value) -> MemberEvent {
    if sticky { sticky_event(ALICE, 1_000, content) } else { state_event(ALICE, 1_000, content) }
}

#[test]
fn many_long_transports_stay_bounded() {
    let list = |letter: &str| {
        let url = |n| format!("https://{letter}{n}.example/{}", "x".repeat(1900));
        let entry = |n: u32| json!({"type": "livekit", "livekit_service_url": url(n), "url": url(n)});
        Value::from((0..100).map(entry).collect::<Vec<_>>())
    };
    let (_, mut content, _) = sticky_joins().swap_remove(0);
    content["transports"]["published"] = list("a");
    content["rtc_transports"] = list("b");
    let parsed = read(&event(true, content), false).unwrap();
    assert!(format!("{parsed:?}").len() < MAX_PARSED);
}

proptest! {
    #[test]
    fn reading_never_panics_and_stays_bounded(
        content in any_json(), sticky in any::<bool>(), encrypted in any::<bool>(), sent in any::<u64>(),
    ) {
        let event = MemberEvent { encrypted, origin_server_ts: UnixMillis(sent), ..event(sticky, content) };
        for room_is_encrypted in [false, true] {
            if let Ok(parsed) = read(&event, room_is_encrypted) {
                prop_assert_eq!(&parsed.user_id, &event.sender);
                let size = format!("{parsed:?}").len();
                prop_assert!(size < MAX_PARSED);
            }
        }
    }

    #[test]
    fn damaged_fixtures_stay_bounded(
        (sticky, content) in any_fixture(), place in any::<prop::sample::Index>(), replacement in any_json(),
    ) {
        if let Ok(parsed) = read(&event(sticky, damaged(content, place, Some(replacement))), false) {
            prop_assert_eq!(parsed.user_id.as_str(), ALICE);
            let size = format!("{parsed:?}").len();
            prop_assert!(size < MAX_PARSED);
        }
    }

    #[test]
    fn reader_accepts_what_deployed_validators_accept(
        (sticky, content) in any_fixture(), place in any::<prop::sample::Index>(),
        replacement in prop::option::of(prop::sample::select(vec![
            json!(null), json!(1), json!("x"), json!([]), json!({}), json!([{"type": "x"}]), json!(["x"]),
        ])),
    ) {
        let content = damaged(content, place, replacement);
        let accepted = if sticky {
            // `membership` other than `join` is a leave to newer clients and unknown to older ones.
            let unknown = content["member"].get("membership").is_some_and(|membership| membership != "join");
            let by = |generation| js_sdk_reads_sticky(generation, ALICE, &content);
            !unknown && (by(Generation::G1) || by(Generation::G2))
        } else {
            js_sdk_reads_state(&content)
        };
        if accepted {
            let parsed = read(&event(sticky, content.clone()), false);
            prop_assert!(parsed.is_ok(), "{:?} for {}", parsed, content);
        }
    }
}
