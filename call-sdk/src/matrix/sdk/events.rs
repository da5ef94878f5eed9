//! Events as they lie on the wire, and the names of those that calls use.

use std::time::Duration;

use ruma_common::{OwnedEventId, OwnedUserId};
use serde::Deserialize;
use serde_json::Value;

use crate::time::UnixMillis;

/// State events that announce a call member. ruma takes both names for one type, so either finds both in a store.
pub(super) const STATE_MEMBER: [&str; 2] = ["org.matrix.msc3401.call.member", "m.call.member"];
/// Sticky events that announce a call member.
pub(super) const STICKY_MEMBER: [&str; 2] = ["org.matrix.msc4143.rtc.member", "m.rtc.member"];
/// Slots, as state.
pub(super) const SLOT: [&str; 2] = ["org.matrix.msc4143.rtc.slot", "m.rtc.slot"];
pub(super) const ENCRYPTED: &str = "m.room.encrypted";
pub(super) const REDACTION: &str = "m.room.redaction";
/// Events of the timeline that a call is told of: invites, declines, raised hands, reactions.
const TIMELINE: [&str; 8] = [
    "org.matrix.msc4075.rtc.notification",
    "m.rtc.notification",
    "m.rtc.invite",
    "org.matrix.msc4310.rtc.decline",
    "m.rtc.decline",
    "m.reaction",
    "io.element.call.reaction",
    REDACTION,
];
const MEDIA_KEY: [&str; 3] =
    ["io.element.call.encryption_keys", "m.rtc.encryption_key", "org.matrix.msc4143.rtc.encryption_key"];

/// The limit of the Matrix specification for an event (64 KiB), plus `unsigned`.
pub(super) const LARGEST_EVENT: usize = 96 * 1024;
/// A media key message is a few hundred bytes.
const LARGEST_KEY_MESSAGE: usize = 8 * 1024;
/// Longest stickiness (MSC4354).
const LONGEST_STICKY: Duration = Duration::from_secs(3600);

pub(super) fn is_timeline_type(event_type: &str) -> bool {
    TIMELINE.contains(&event_type)
}

pub(super) fn is_state_member(event: &WireEvent) -> bool {
    event.state_key.is_some() && STATE_MEMBER.contains(&event.event_type.as_str())
}

pub(super) fn is_sticky_member(event_type: &str) -> bool {
    STICKY_MEMBER.contains(&event_type)
}

/// Whether a to-device message of this type and size is for calls: a media key, or signalling of a full mesh.
pub(super) fn is_to_device(event_type: &str, size: usize) -> bool {
    if MEDIA_KEY.contains(&event_type) {
        return size <= LARGEST_KEY_MESSAGE;
    }
    (event_type.starts_with("m.call.") || event_type.starts_with("org.matrix.call.")) && size <= LARGEST_EVENT
}

/// An event as the homeserver hands it out, outside of any encryption.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct WireEvent {
    #[serde(rename = "type")]
    pub(super) event_type: String,
    pub(super) event_id: OwnedEventId,
    pub(super) sender: OwnedUserId,
    pub(super) origin_server_ts: UnixMillis,
    #[serde(default)]
    pub(super) content: Value,
    pub(super) state_key: Option<String>,
    redacts: Option<OwnedEventId>,
    #[serde(default)]
    unsigned: Unsigned,
    sticky: Option<StickyObject>,
    msc4354_sticky: Option<StickyObject>,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct Unsigned {
    sticky_duration_remaining_ms: Option<u64>,
    msc4354_sticky_duration_ttl_ms: Option<u64>,
    redacted_because: Option<Redaction>,
}

#[derive(Clone, Debug, Deserialize)]
struct Redaction {
    sender: OwnedUserId,
}

#[derive(Clone, Copy, Debug, Deserialize)]
struct StickyObject {
    duration_ms: u64,
}

/// Until when an event is sticky, and its rank among events of one key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stickiness {
    pub(super) until: UnixMillis,
    pub(super) rank: UnixMillis,
}

impl WireEvent {
    /// Returns `None` for an oversized or malformed event.
    pub(super) fn parse(json: &str) -> Option<Self> {
        if json.len() > LARGEST_EVENT {
            return None;
        }
        serde_json::from_str(json).ok()
    }

    /// Drops the fields that matrix-sdk copies from the plaintext of a decrypted event, where the sender writes them.
    pub(super) fn drop_plaintext_fields(&mut self) {
        (self.state_key, self.redacts, self.sticky, self.msc4354_sticky) = (None, None, None, None);
    }

    /// Whether the homeserver says that it is sticky.
    pub(super) fn has_remaining_time(&self) -> bool {
        self.unsigned.sticky_duration_remaining_ms.or(self.unsigned.msc4354_sticky_duration_ttl_ms).is_some()
    }

    /// Sender of its redaction, if it was redacted.
    pub(super) fn redacted_by(&self) -> Option<OwnedUserId> {
        self.unsigned.redacted_because.as_ref().map(|redaction| redaction.sender.clone())
    }

    /// Target of a redaction: in the content since room version 11, before that beside it.
    pub(super) fn redacts(&self) -> Option<OwnedEventId> {
        let in_content = self.content.get("redacts").and_then(Value::as_str);
        in_content.and_then(|id| id.try_into().ok()).or_else(|| self.redacts.clone())
    }

    /// By MSC4354; `None` if it is not sticky. The remaining time is the homeserver's word, so clocks need not agree.
    pub(super) fn stickiness(&self, received: UnixMillis) -> Option<Stickiness> {
        let duration = self.sticky.or(self.msc4354_sticky)?;
        let duration = Duration::from_millis(duration.duration_ms).min(LONGEST_STICKY);
        let remaining =
            self.unsigned.sticky_duration_remaining_ms.or(self.unsigned.msc4354_sticky_duration_ttl_ms);
        let until = match remaining {
            Some(left) => received.plus(Duration::from_millis(left).min(LONGEST_STICKY)),
            None => received.min(self.origin_server_ts).plus(duration),
        };
        Some(Stickiness { until, rank: self.origin_server_ts.plus(duration) })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn event(more: &Value) -> WireEvent {
        let mut event = json!({"type": "m.rtc.member", "event_id": "$e", "sender": "@a:x",
            "origin_server_ts": 1_000_000, "content": {}});
        event.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        WireEvent::parse(&event.to_string()).unwrap()
    }

    fn until(received: u64, more: &Value) -> Option<u64> {
        event(more).stickiness(UnixMillis(received)).map(|s| s.until.0)
    }

    #[test]
    fn either_name_of_stickiness_is_read() {
        for (object, unsigned) in
            [("sticky", "sticky_duration_remaining_ms"), ("msc4354_sticky", "msc4354_sticky_duration_ttl_ms")]
        {
            let more = json!({object: {"duration_ms": 60_000}, "unsigned": {unsigned: 10_000}});
            assert_eq!(until(5_000_000, &more), Some(5_010_000), "remaining time counts from receipt");
            assert_eq!(event(&more).stickiness(UnixMillis(0)).unwrap().rank, UnixMillis(1_060_000));
        }
        assert_eq!(until(5_000_000, &json!({"unsigned": {"msc4354_sticky_duration_ttl_ms": 10_000}})), None);
    }

    #[test]
    fn without_remaining_time_the_earlier_clock_counts() {
        let more = json!({"sticky": {"duration_ms": 60_000}});
        assert_eq!(until(1_030_000, &more), Some(1_060_000));
        assert_eq!(until(900_000, &more), Some(960_000), "a sender whose clock is ahead gains nothing");
    }

    #[test]
    fn stickiness_is_capped_at_an_hour() {
        let more = json!({"sticky": {"duration_ms": u64::MAX}, "unsigned": {"sticky_duration_remaining_ms": u64::MAX}});
        assert_eq!(until(1_000_000, &more), Some(1_000_000 + 3_600_000));
    }

    #[test]
    fn plaintext_fields_of_decrypted_event_are_dropped() {
        let mut inside = event(&json!({"state_key": "", "redacts": "$x", "sticky": {"duration_ms": 60_000},
            "msc4354_sticky": {"duration_ms": 60_000}}));
        inside.drop_plaintext_fields();
        assert_eq!((inside.state_key.is_none(), inside.redacts()), (true, None));
        assert_eq!(inside.stickiness(UnixMillis(0)), None);
    }

    #[test]
    fn redaction_target_is_read_from_either_place() {
        assert_eq!(event(&json!({"redacts": "$old"})).redacts().unwrap(), "$old");
        assert_eq!(event(&json!({"content": {"redacts": "$new"}})).redacts().unwrap(), "$new");
        let by = json!({"unsigned": {"redacted_because": {"sender": "@m:x", "type": "m.room.redaction"}}});
        assert_eq!(event(&by).redacted_by().unwrap(), "@m:x");
    }

    #[test]
    fn to_device_types_are_bounded_in_size() {
        assert!(is_to_device("io.element.call.encryption_keys", 500));
        assert!(!is_to_device("io.element.call.encryption_keys", 9000));
        assert!(is_to_device("m.call.invite", 9000));
        assert!(!is_to_device("m.room_key", 500));
    }
}
