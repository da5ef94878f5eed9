//! The documented rules by which other clients judge an event, as oracles for what we write and read.

use serde_json::{Value, json};

use super::super::fixtures::{Generation, state_joins, state_leaves_and_relics, sticky_joins, sticky_leaves};
use crate::machine::membership::testing::{ALICE, with, without};

fn is_text(value: Option<&Value>) -> bool {
    value.is_some_and(Value::is_string)
}

fn is_optional(value: Option<&Value>, holds: impl Fn(&Value) -> bool) -> bool {
    value.is_none_or(holds)
}

fn is_list_of(value: Option<&Value>, holds: impl Fn(&Value) -> bool) -> bool {
    value.and_then(Value::as_array).is_some_and(|list| list.iter().all(holds))
}

fn has_type(entry: &Value) -> bool {
    is_text(entry.get("type"))
}

/// matrix-js-sdk of all generations.
pub(super) fn js_sdk_reads_state(content: &Value) -> bool {
    let Some(fields) = content.as_object() else { return false };
    fields.len() >= 2
        && ["application", "call_id", "device_id"].iter().all(|name| is_text(fields.get(*name)))
        && fields.get("focus_active").is_some_and(has_type)
        && ["scope", "membershipID", "m.call.intent"]
            .iter()
            .all(|name| is_optional(fields.get(*name), Value::is_string))
        && ["expires", "created_ts"].iter().all(|name| is_optional(fields.get(*name), Value::is_number))
        && is_optional(fields.get("foci_preferred"), |foci| is_list_of(Some(foci), has_type))
}

/// Element X over ruma: it counts a call with the scope of the room, and cannot read a focus without an alias.
pub(super) fn element_x_reads_state(content: &Value) -> bool {
    content.get("scope") == Some(&json!("m.room"))
        && content.get("expires").is_some_and(Value::is_u64)
        && is_list_of(content.get("foci_preferred"), |focus| {
            ["livekit_service_url", "livekit_alias"].iter().all(|name| is_text(focus.get(*name)))
        })
}

/// The validator of matrix-js-sdk for the sticky form.
pub(super) fn js_sdk_reads_sticky(generation: Generation, sender: &str, content: &Value) -> bool {
    let text =
        |of: Option<&Value>, name| of.and_then(|of| of.get(name)).and_then(Value::as_str).map(str::to_owned);
    let member = content.get("member");
    let user_and_server = |user: &str| user.strip_prefix('@').is_some_and(|rest| rest.contains(':'));
    let is_member = text(member, "user_id").is_some_and(|user| user_and_server(&user) && user == sender)
        && text(member, "device_id").is_some()
        && text(member, "id").is_some();
    let application = text(content.get("application"), "type").filter(|kind| !kind.contains('#'));
    let is_slot = text(Some(content), "slot_id").zip(application).is_some_and(|(slot, application)| {
        slot.matches('#').count() == 1 && slot.starts_with(&format!("{application}#"))
    });
    let has_transports = match generation {
        Generation::G1 => is_list_of(content.get("rtc_transports"), has_type),
        Generation::G2 => content.get("transports").is_some_and(|transports| {
            is_list_of(transports.get("published"), has_type)
                && is_list_of(transports.get("can_subscribe"), Value::is_string)
        }),
    };
    let keys: Vec<_> =
        ["msc4354_sticky_key", "sticky_key"].iter().filter_map(|name| content.get(*name)).collect();
    let has_key = keys.first().is_some_and(|first| first.is_string() && keys.iter().all(|key| key == first));
    let is_related = is_optional(content.get("m.relates_to"), |relation| {
        is_text(relation.get("event_id")) && relation.get("rel_type") == Some(&json!("m.reference"))
    });
    let has_versions = is_list_of(content.get("versions"), Value::is_string);
    is_member && is_slot && has_transports && has_key && is_related && has_versions
}

/// Content that js-sdk of every generation takes for a leave; 45 takes `member.membership` for one as well.
pub(super) fn js_sdk_reads_leave(content: &Value) -> bool {
    content.get("application").is_none()
}

/// MSC4143 with MSC4195.
pub(super) fn msc_reads_join(content: &Value) -> bool {
    let member = content.get("member");
    let id = member.and_then(|member| member.get("id"));
    let has_transports = is_optional(content.get("transports"), |transports| {
        is_list_of(transports.get("can_subscribe"), Value::is_string)
            && is_list_of(transports.get("published"), |entry| {
                has_type(entry) && (entry["type"] != "m.livekit" || is_text(entry.get("url")))
            })
    });
    is_text(id)
        && content.get("sticky_key") == id
        && member.and_then(|member| member.get("membership")) == Some(&json!("join"))
        && content.get("application").is_some_and(has_type)
        && is_text(content.get("slot_id"))
        && has_transports
}

/// MSC4143.
pub(super) fn msc_reads_leave(content: &Value) -> bool {
    let id = content.get("member").and_then(|member| member.get("id"));
    is_text(id)
        && content.get("sticky_key") == id
        && content["member"]["membership"] == "leave"
        && is_optional(content.get("leave_reason"), |reason| is_text(reason.get("code")))
}

#[test]
fn validators_accept_their_own_generation_only() {
    for (name, content, generations) in sticky_joins() {
        for generation in [Generation::G1, Generation::G2] {
            let accepted = js_sdk_reads_sticky(generation, ALICE, &content);
            assert_eq!(accepted, generations.contains(&generation), "{name}, {generation:?}");
        }
        assert_eq!(msc_reads_join(&content), name.starts_with("MSC4143"), "{name}");
    }
    for (name, content) in sticky_leaves() {
        assert!(!js_sdk_reads_sticky(Generation::G2, ALICE, &content), "{name}");
    }
    for (name, content) in state_joins() {
        assert!(js_sdk_reads_state(&content), "{name}");
    }
    for (name, content) in state_leaves_and_relics() {
        assert!(!js_sdk_reads_state(&content), "{name}");
    }
}

// Scenarios 14 to 17.
#[test]
fn sticky_validator_rejects_documented_faults() {
    let (_, base, _) = sticky_joins().swap_remove(0);
    let member = |content: Value| with(base.clone(), "member", content);
    for content in [
        without(base.clone(), "slot_id"),
        with(base.clone(), "slot_id", json!("invalid_slot_id")),
        with(base.clone(), "slot_id", json!("m.call#mycall#extra")),
        without(base.clone(), "application"),
        with(base.clone(), "application", json!({})),
        with(base.clone(), "application", json!({"type": "m.call#"})),
        without(base.clone(), "member"),
        member(json!({"i": "test"})),
        member(json!({"device_id": "AAAAAAA", "id": "x"})),
        member(json!({"user_id": "@@test", "device_id": "AAAAAAA", "id": "x"})),
        member(json!({"user_id": "@bob:example.org", "device_id": "AAAAAAA", "id": "x"})),
        without(base.clone(), "msc4354_sticky_key"),
        with(base.clone(), "msc4354_sticky_key", json!(1)),
        with(base.clone(), "sticky_key", json!("other")),
        without(base.clone(), "versions"),
        with(base.clone(), "transports", json!({"published": [{}], "can_subscribe": []})),
        with(base.clone(), "transports", json!({"published": []})),
        with(base.clone(), "m.relates_to", json!({"event_id": "$x"})),
    ] {
        assert!(!js_sdk_reads_sticky(Generation::G2, ALICE, &content), "{content}");
    }
    let stable = with(without(base, "msc4354_sticky_key"), "sticky_key", json!("abc123"));
    assert!(js_sdk_reads_sticky(Generation::G2, ALICE, &stable));
}
