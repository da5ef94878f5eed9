//! Membership events for the tests of this room.

use matrix_sdk::ruma::UserId;
use serde_json::{Value, json};

use super::wire::MemberEvent;
use crate::{
    member::{LiveKitFocus, MembershipKind},
    time::UnixMillis,
};

pub(crate) fn focus(url: &str) -> LiveKitFocus {
    LiveKitFocus { service_url: url.to_owned() }
}

/// A state event of `sender`, its state key made from the content's device.
pub(crate) fn state_event(sender: &str, at: u64, content: Value) -> MemberEvent {
    let device = content.get("device_id").and_then(Value::as_str).unwrap_or_default();
    MemberEvent {
        kind: MembershipKind::State,
        sender: UserId::parse(sender).unwrap(),
        sender_device: None,
        state_key: Some(format!("_{sender}_{device}_m.call")),
        event_id: Some(format!("${at}")),
        origin_server_ts: UnixMillis(at),
        content,
        sticky_until: None,
    }
}

/// A sticky event of `sender` that stays for an hour.
pub(crate) fn sticky_event(sender: &str, at: u64, content: Value) -> MemberEvent {
    MemberEvent {
        kind: MembershipKind::Sticky,
        sender: UserId::parse(sender).unwrap(),
        sender_device: None,
        state_key: None,
        event_id: Some(format!("${at}")),
        origin_server_ts: UnixMillis(at),
        content,
        sticky_until: Some(UnixMillis(at.saturating_add(3_600_000))),
    }
}

pub(crate) fn state_member_content(device: &str) -> Value {
    json!({
        "application": "m.call", "call_id": "", "scope": "m.room",
        "device_id": device, "membershipID": format!("@alice:example.org:{device}"),
        "expires": 14_400_000,
        "focus_active": {"type": "livekit", "focus_selection": "multi_sfu"},
        "foci_preferred": [{
            "type": "livekit", "livekit_service_url": "https://sfu.example", "livekit_alias": "!room:example.org",
        }],
    })
}

/// Alice's sticky membership of scenario 13, with its transports in the field `form`.
pub(crate) fn sticky_member_content(form: &str) -> Value {
    let list = json!([{"type": "livekit", "livekit_service_url": "https://sfu.example"}]);
    let transports =
        if form == "transports" { json!({"published": list, "can_subscribe": ["livekit"]}) } else { list };
    json!({
        "slot_id": "m.call#", "application": {"type": "m.call"},
        "member": {"user_id": "@alice:example.org", "device_id": "AAAAAAA", "id": "xyzHASHxyz"},
        form: transports,
        "versions": [], "msc4354_sticky_key": "abc123",
    })
}
