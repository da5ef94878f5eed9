//! Membership contents of every generation, as observed on the wire or given by the MSC texts.

use serde_json::{Value, json};

use crate::machine::membership::testing::{state_content, with, without};

/// A generation of the sticky form, by its validator in matrix-js-sdk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Generation {
    /// Mid-2026: `rtc_transports`.
    G1,
    /// From autumn 2026 on: `transports`.
    G2,
}

fn livekit() -> Value {
    json!({"type": "livekit", "livekit_service_url": "https://sfu.example"})
}

/// The states of Alice's device `AAAAAAA` in the room call.
pub(super) fn state_joins() -> Vec<(&'static str, Value)> {
    let observed = with(state_content("AAAAAAA"), "membershipID", json!("@alice:example.org:AAAAAAA"));
    let resent = with(with(observed.clone(), "created_ts", json!(900)), "m.call.intent", json!("video"));
    let oldest = json!({"type": "livekit", "focus_selection": "oldest_membership"});
    vec![
        ("observed, compatibility mode", observed.clone()),
        ("sent again", resent),
        ("oldest membership", with(observed.clone(), "focus_active", oldest)),
        ("without optional fields", without(without(observed, "membershipID"), "scope")),
    ]
}

/// State contents that are not memberships.
pub(super) fn state_leaves_and_relics() -> Vec<(&'static str, Value)> {
    vec![
        ("leave", json!({})),
        ("before 2024, empty", json!({"memberships": []})),
        ("before 2024", json!({"memberships": [{}]})),
        ("one unrelated field", json!({"foo": 1})),
    ]
}

/// The sticky memberships of Alice's device `AAAAAAA` with the member id `xyzHASHxyz`, and the generations whose
/// validators accept each.
pub(super) fn sticky_joins() -> Vec<(&'static str, Value, Vec<Generation>)> {
    use Generation::{G1, G2};
    let member = json!({"user_id": "@alice:example.org", "device_id": "AAAAAAA", "id": "xyzHASHxyz"});
    let g2 = json!({
        "application": {"type": "m.call", "m.call.intent": "video"},
        "slot_id": "m.call#ROOM",
        "transports": {"published": [livekit()], "can_subscribe": ["livekit"]},
        "member": member,
        "versions": [],
        "msc4354_sticky_key": "xyzHASHxyz",
    });
    let relation = json!({"rel_type": "m.reference", "event_id": "$previous"});
    let merged = json!({
        "slot_id": "m.call#ROOM",
        "member": {"id": "xyzHASHxyz", "membership": "join"},
        "application": {"type": "m.call"},
        "transports": {
            "published": [{"type": "m.livekit", "url": "wss://sfu.example"}], "can_subscribe": ["m.livekit"],
        },
        "sticky_key": "xyzHASHxyz",
    });
    vec![
        ("G2", g2.clone(), vec![G2]),
        ("G2 sent again", with(g2.clone(), "m.relation", relation.clone()), vec![G2]),
        ("G3 with a relation", with(g2.clone(), "m.relates_to", relation), vec![G2]),
        ("G1", with(without(g2.clone(), "transports"), "rtc_transports", json!([livekit()])), vec![G1]),
        (
            "an older MSC4196",
            json!({
                "slot_id": "m.call#ROOM",
                "application": {"type": "m.call"},
                "member": {
                    "id": "xyzHASHxyz", "claimed_user_id": "@alice:example.org", "claimed_device_id": "AAAAAAA",
                },
                "rtc_transports": [livekit()],
                "versions": ["v0"],
                "sticky_key": "xyzHASHxyz",
            }),
            vec![],
        ),
        ("MSC4143", merged.clone(), vec![]),
        ("MSC4143 without transports", without(merged, "transports"), vec![]),
        (
            "G4",
            with(
                with(g2, "member", with(member, "membership", json!("join"))),
                "capabilities",
                json!({"a": 1}),
            ),
            vec![G2],
        ),
    ]
}

/// The leaves of a sticky membership with the key `xyzHASHxyz`.
pub(super) fn sticky_leaves() -> Vec<(&'static str, Value)> {
    let leave = |code| {
        json!({
            "slot_id": "m.call#ROOM",
            "member": {"id": "xyzHASHxyz", "membership": "leave"},
            "leave_reason": {"code": code},
            "sticky_key": "xyzHASHxyz", "msc4354_sticky_key": "xyzHASHxyz",
        })
    };
    vec![
        ("G1, G2", json!({"msc4354_sticky_key": "xyzHASHxyz"})),
        ("G3", json!({"slot_id": "m.call#ROOM", "msc4354_sticky_key": "xyzHASHxyz"})),
        ("leave", leave("leave")),
        ("delayed leave", leave("delayed_leave")),
        ("unknown reason", leave("transport_error")),
        (
            "G4 without a reason",
            json!({
                "slot_id": "m.call#ROOM", "member": {"id": "xyzHASHxyz", "membership": "leave"},
                "sticky_key": "xyzHASHxyz",
            }),
        ),
        (
            "leave that repeats the application",
            json!({
                "slot_id": "m.call#ROOM", "application": {"type": "m.call"},
                "member": {"id": "xyzHASHxyz", "membership": "leave"}, "sticky_key": "xyzHASHxyz",
            }),
        ),
        (
            "unknown membership",
            json!({
                "slot_id": "m.call#ROOM", "application": {"type": "m.call"},
                "member": {"id": "xyzHASHxyz", "membership": "away"}, "sticky_key": "xyzHASHxyz",
            }),
        ),
    ]
}
