//! Membership events and room views for the tests of this room.

use std::{
    sync::LazyLock,
    time::{Duration, Instant},
};

use ruma_common::UserId;
use serde_json::{Value, json};

use super::wire::OwnTransports;
pub(crate) use crate::machine::testing::{device, focus};
use crate::{
    matrix::{MemberEvent, RoomView, SlotEvent},
    member::MembershipForm,
    time::{Now, UnixMillis},
};

pub(crate) const ALICE: &str = "@alice:example.org";
pub(crate) const BOB: &str = "@bob:example.org";
pub(crate) const CAROL: &str = "@carol:example.org";

/// The instant at which the wall clock of [`at`] is zero.
#[expect(clippy::disallowed_methods, reason = "an arbitrary origin of virtual time")]
static ORIGIN: LazyLock<Instant> = LazyLock::new(Instant::now);

/// Virtual time: `millis` after its origin on both clocks.
pub(crate) fn at(millis: u64) -> Now {
    Now { instant: *ORIGIN + Duration::from_millis(millis), unix: UnixMillis(millis) }
}

/// An unencrypted room without slot events, in which Alice, Bob and Carol are joined.
pub(crate) fn view(members: Vec<MemberEvent>) -> RoomView {
    let joined = [ALICE, BOB, CAROL].map(|user| UserId::parse(user).unwrap());
    RoomView { members, joined: joined.into(), version: "12".to_owned(), ..RoomView::default() }
}

pub(crate) fn slot_event(slot_id: &str, content: Value) -> SlotEvent {
    SlotEvent { slot_id: slot_id.to_owned(), content }
}

/// A state event of `sender`, its state key made from the content's device.
pub(crate) fn state_event(sender: &str, at: u64, content: Value) -> MemberEvent {
    let device = content.get("device_id").and_then(Value::as_str).unwrap_or_default();
    MemberEvent {
        form: MembershipForm::State,
        sender: UserId::parse(sender).unwrap(),
        sender_device: None,
        state_key: Some(format!("_{sender}_{device}_m.call")),
        encrypted: false,
        event_id: Some(format!("${at}").try_into().unwrap()),
        origin_server_ts: UnixMillis(at),
        content,
        sticky_until: None,
        sticky_rank: UnixMillis(at),
        redacted_by: None,
    }
}

/// A sticky event of `sender` that stays for an hour, in clear.
pub(crate) fn sticky_event(sender: &str, at: u64, content: Value) -> MemberEvent {
    let until = UnixMillis(at.saturating_add(3_600_000));
    MemberEvent {
        form: MembershipForm::Sticky,
        state_key: None,
        sticky_until: Some(until),
        sticky_rank: until,
        ..state_event(sender, at, content)
    }
}

/// The event after `by` has redacted it: its content is gone.
pub(crate) fn redacted(event: &MemberEvent, by: &str) -> MemberEvent {
    MemberEvent { content: json!({}), redacted_by: Some(UserId::parse(by).unwrap()), ..event.clone() }
}

pub(crate) fn with(mut content: Value, name: &str, value: Value) -> Value {
    content[name] = value;
    content
}

pub(crate) fn without(mut content: Value, name: &str) -> Value {
    content.as_object_mut().unwrap().remove(name).unwrap();
    content
}

/// A sticky membership of the one device of `sender` in a slot.
pub(crate) fn in_slot(sender: &str, at: u64, slot_id: &str, member_id: &str) -> MemberEvent {
    let (application, _) = slot_id.split_once('#').unwrap();
    let content = with(sticky_content(sender, "DEVICE", member_id), "slot_id", json!(slot_id));
    sticky_event(sender, at, with(content, "application", json!({"type": application})))
}

/// The state membership of a device, as Element Call 0.26 writes it.
pub(crate) fn state_content(device: &str) -> Value {
    json!({
        "application": "m.call", "call_id": "", "scope": "m.room",
        "device_id": device,
        "expires": 14_400_000,
        "focus_active": {"type": "livekit", "focus_selection": "multi_sfu"},
        "foci_preferred": [{
            "type": "livekit", "livekit_service_url": "https://sfu.example", "livekit_alias": "!room:example.org",
        }],
    })
}

/// The sticky membership of a device, as Element Call 0.26 writes it.
pub(crate) fn sticky_content(user: &str, device: &str, member_id: &str) -> Value {
    json!({
        "slot_id": "m.call#ROOM", "application": {"type": "m.call"},
        "member": {"user_id": user, "device_id": device, "id": member_id},
        "transports": {
            "published": [{"type": "livekit", "livekit_service_url": "https://sfu.example"}],
            "can_subscribe": ["livekit"],
        },
        "versions": [], "msc4354_sticky_key": member_id,
    })
}

/// On the focus behind a service.
pub(crate) fn on(service: &str) -> OwnTransports {
    OwnTransports { focus: Some(focus(service)), mesh: None }
}
