//! The wire forms of a membership: the state event that every deployed client reads, and the sticky event.
//!
//! Reading is lenient about generations and strict about identity. State events of all generations and sticky
//! events of both deployed generations (`rtc_transports`, `transports`) and of MSC4143 are read; the user is
//! always the sender of the event, never what its content or state key says. Writing produces the state form
//! in `multi_sfu` mode.
//!
//! *Assumptions.* The port hands over events of one room, decrypted, with `content` as the sender wrote it.

use std::time::Duration;

use matrix_sdk::ruma::{DeviceId, OwnedDeviceId, OwnedRoomId, OwnedUserId, UserId};
use serde_json::{Map, Value, json};

use crate::{
    member::{LiveKitFocus, MemberId, MembershipKind, ParticipantIdentity, Slot},
    time::UnixMillis,
};

/// Event type of the state form (MSC3401).
pub const STATE_TYPE: &str = "org.matrix.msc3401.call.member";
/// Event type of the sticky form (MSC4143, MSC4354).
pub const STICKY_TYPE: &str = "org.matrix.msc4143.rtc.member";
/// Event type of a slot, whose content [`crate::membership::roster::Roster::slot_event`] takes (MSC4143).
pub const SLOT_TYPE: &str = "org.matrix.msc4143.rtc.slot";

/// How long a state membership counts when its content does not say: 4 h.
pub const DEFAULT_EXPIRES: Duration = Duration::from_secs(4 * 3600);

/// Longest identifier (device, member, call) taken from an event, in bytes; that of Matrix identifiers.
const MAX_IDENTIFIER: usize = 255;
/// Longest service URL taken from an event, in bytes.
const MAX_URL: usize = 2048;

/// A membership event as the port hands it over.
#[derive(Clone, Debug, PartialEq)]
pub struct MemberEvent {
    /// Which form it is.
    pub kind: MembershipKind,
    /// Who sent it, by the homeserver's word.
    pub sender: OwnedUserId,
    /// The device whose session encrypted the event, if it was encrypted and the device is known. The MSC4143
    /// form names no device in its content and is read only with this.
    pub sender_device: Option<OwnedDeviceId>,
    /// State key, of the state form.
    pub state_key: Option<String>,
    /// The event's id, used to break ties.
    pub event_id: Option<String>,
    /// When the sender's homeserver got it.
    pub origin_server_ts: UnixMillis,
    /// The content as the sender wrote it.
    pub content: Value,
    /// When its stickiness ends, of the sticky form: `min(received, origin_server_ts) + min(duration, 1 h)`
    /// (MSC4354). A sticky event without it is ignored.
    pub sticky_until: Option<UnixMillis>,
}

/// A well-formed membership, before it is known whether it counts (slot, expiry, joined sender).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParsedMembership {
    /// The sender.
    pub user_id: OwnedUserId,
    /// The device that is in the call.
    pub device_id: OwnedDeviceId,
    /// This membership's own id.
    pub member_id: MemberId,
    /// Under which identity the SFU knows it.
    pub identity: ParticipantIdentity,
    /// Which form it was.
    pub kind: MembershipKind,
    /// Which call of the room; `ROOM` and the empty call id are both read as empty.
    pub slot: Slot,
    /// `created_ts`, else the event's own time.
    pub created: UnixMillis,
    /// When its content expires; `None` for the sticky form.
    pub expires_at: Option<UnixMillis>,
    /// How the focus of its media is found.
    pub route: Route,
    /// `m.call.intent`.
    pub intent: Option<String>,
}

/// How the focus of a member's media is found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Route {
    /// It publishes to this focus, whoever else is there: `multi_sfu`, and every sticky member.
    Own(Option<LiveKitFocus>),
    /// It follows the oldest member; the focus is its own and counts only while it is the oldest itself.
    OldestMember(Option<LiveKitFocus>),
    /// It names a selection that we do not know: it is listed, and its media is not reachable.
    Unknown,
}

/// What `focus_active.focus_selection` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FocusSelection {
    /// Everybody publishes to the focus of their own choice.
    MultiSfu,
    /// Everybody publishes to the focus of the oldest member.
    OldestMembership,
}

/// Why an event is not a membership.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Rejected {
    /// The sender left: an empty state event, or a sticky event without an application or with
    /// `member.membership = "leave"`.
    #[error("the sender has left the call")]
    Left,
    /// The event is not one that we can read.
    #[error("the event is not a usable membership: {0}")]
    Ignored(#[from] Ignored),
}

/// Why a membership event is ignored. Each is the sender's fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Ignored {
    /// The content is not an object.
    #[error("its content is not an object")]
    NotAnObject,
    /// The array form of before 2024, or content too short to be a membership.
    #[error("it is in a form from before 2024, or has fewer than two fields")]
    Obsolete,
    /// A required field is missing.
    #[error("`{0}` is missing")]
    Missing(&'static str),
    /// A field has a type or a value that it may not have.
    #[error("`{0}` is not what it must be")]
    Malformed(&'static str),
    /// The content names another user than the sender.
    #[error("its content names another user than its sender")]
    ForeignUser,
    /// The content names another device than the one that encrypted the event.
    #[error("its content names another device than the one that encrypted it")]
    ForeignDevice,
    /// A sticky-form event that is not sticky.
    #[error("it is not sticky")]
    NotSticky,
}

/// Reads one membership event.
///
/// # Errors
/// [`Rejected::Left`] if the event says that its sender left, else [`Rejected::Ignored`] with the reason.
pub fn parse(event: &MemberEvent) -> Result<ParsedMembership, Rejected> {
    let content = event.content.as_object().ok_or(Ignored::NotAnObject)?;
    match event.kind {
        MembershipKind::State => parse_state(event, content),
        MembershipKind::Sticky => parse_sticky(event, content),
    }
}

/// The state key of our membership: `_{user}_{device}_{application}{call id}`. The leading underscore is dropped
/// only in rooms of MSC3757 and MSC3779, where a key may begin with its owner's user id.
#[must_use]
pub fn state_key(user: &UserId, device: &DeviceId, slot: &Slot, room_version: &str) -> String {
    let owned = ["org.matrix.msc3757", "org.matrix.msc3779"].iter().any(|prefix| {
        room_version.strip_prefix(prefix).is_some_and(|rest| {
            !rest.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_') // a word boundary
        })
    });
    let underscore = if owned { "" } else { "_" };
    format!("{underscore}{user}_{device}_{}{}", slot.application, room_call_as_empty(&slot.call_id))
}

/// What we say about ourselves in our membership.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnDescription {
    /// Our user.
    pub user_id: OwnedUserId,
    /// Our device.
    pub device_id: OwnedDeviceId,
    /// Which call.
    pub slot: Slot,
    /// Where we publish.
    pub focus: LiveKitFocus,
    /// The room of the call; old clients read the SFU's room from it.
    pub room_id: OwnedRoomId,
    /// `m.call.intent`; `None` leaves it out.
    pub intent: Option<String>,
}

/// The content of our state membership, in `multi_sfu` mode. `created` is left out of the first event of a
/// membership and is in every later one. `expires` counts from `created`.
#[must_use]
pub fn state_content(own: &OwnDescription, expires: Duration, created: Option<UnixMillis>) -> Value {
    let mut content = json!({
        "application": own.slot.application,
        "call_id": room_call_as_empty(&own.slot.call_id),
        "scope": "m.room",
        "device_id": own.device_id,
        "membershipID": format!("{}:{}", own.user_id, own.device_id),
        "expires": u64::try_from(expires.as_millis()).unwrap_or(u64::MAX),
        "focus_active": { "type": "livekit", "focus_selection": "multi_sfu" },
        "foci_preferred": [{
            "type": "livekit",
            "livekit_service_url": own.focus.service_url,
            "livekit_alias": own.room_id,
        }],
    });
    if let Some(created) = created {
        content["created_ts"] = json!(created.0);
    }
    if let Some(intent) = &own.intent {
        content["m.call.intent"] = json!(intent);
    }
    content
}

/// Reads one entry of `foci_preferred`, `rtc_transports` or `transports.published`: a LiveKit focus, with or
/// without `livekit_alias`; `None` for another type or without a usable URL.
#[must_use]
pub fn livekit_focus(entry: &Value) -> Option<LiveKitFocus> {
    if entry.get("type")?.as_str()? != "livekit" {
        return None;
    }
    let url = entry.get("livekit_service_url")?.as_str()?;
    let host = url.strip_prefix("https://").or_else(|| url.strip_prefix("http://"))?;
    if url.len() > MAX_URL || host.trim_matches('/').is_empty() || url.chars().any(char::is_control) {
        return None;
    }
    Some(LiveKitFocus { service_url: url.trim_end_matches('/').to_owned() })
}

/// Reads `focus_active`: which focus selection it asks for; `None` for one that we do not know.
#[must_use]
pub fn focus_selection(focus_active: &Value) -> Option<FocusSelection> {
    if focus_active.get("type")?.as_str()? != "livekit" {
        return None;
    }
    match focus_active.get("focus_selection")?.as_str()? {
        "multi_sfu" => Some(FocusSelection::MultiSfu),
        "oldest_membership" => Some(FocusSelection::OldestMembership),
        _ => None,
    }
}

/// The sticky key of an event, under its unstable or stable name.
///
/// # Errors
/// If there is none, or one is not a string, or the two differ.
pub fn sticky_key(content: &Value) -> Result<&str, Ignored> {
    let text = |name: &'static str| match content.get(name) {
        None => Ok(None),
        Some(Value::String(key)) => Ok(Some(key.as_str())),
        Some(_) => Err(Ignored::Malformed(name)),
    };
    match (text("msc4354_sticky_key")?, text("sticky_key")?) {
        (Some(unstable), Some(stable)) if unstable != stable => Err(Ignored::Malformed("sticky_key")),
        (Some(key), _) | (None, Some(key)) => Ok(key),
        (None, None) => Err(Ignored::Missing("sticky_key")),
    }
}

/// `ROOM` is how the slot id writes the room call, the empty string how the state form does.
pub(crate) fn room_call_as_empty(call_id: &str) -> &str {
    if call_id == "ROOM" { "" } else { call_id }
}

fn parse_state(event: &MemberEvent, content: &Map<String, Value>) -> Result<ParsedMembership, Rejected> {
    if content.is_empty() {
        return Err(Rejected::Left);
    }
    if content.len() < 2 || (!content.contains_key("application") && content.contains_key("memberships")) {
        return Err(Ignored::Obsolete.into());
    }
    let application = identifier(content, "application")?;
    let call_id = identifier(content, "call_id")?;
    let device_id = OwnedDeviceId::from(identifier(content, "device_id")?);
    optional_text(content, "scope")?;
    let member_id = match optional_text(content, "membershipID")? {
        Some(id) if id.len() <= 2 * MAX_IDENTIFIER + 1 => id.to_owned(),
        Some(_) => return Err(Ignored::Malformed("membershipID").into()),
        None => format!("{}:{device_id}", event.sender),
    };
    let created = optional_millis(content, "created_ts")?.unwrap_or(event.origin_server_ts);
    let expires = optional_millis(content, "expires")?
        .map_or(DEFAULT_EXPIRES, |millis| Duration::from_millis(millis.0));

    let focus_active = content.get("focus_active").ok_or(Ignored::Missing("focus_active"))?;
    if !focus_active.get("type").is_some_and(Value::is_string) {
        return Err(Ignored::Malformed("focus_active").into());
    }
    let focus = match content.get("foci_preferred") {
        None => None,
        Some(foci) => first_focus(foci, "foci_preferred")?,
    };
    let route = match focus_selection(focus_active) {
        Some(FocusSelection::MultiSfu) => Route::Own(focus),
        Some(FocusSelection::OldestMembership) => Route::OldestMember(focus),
        None => Route::Unknown,
    };
    Ok(ParsedMembership {
        user_id: event.sender.clone(),
        identity: ParticipantIdentity::of_state_member(&event.sender, &device_id),
        device_id,
        member_id: MemberId(member_id),
        kind: MembershipKind::State,
        slot: slot(application, call_id),
        created,
        expires_at: Some(created.plus(expires)),
        route,
        intent: intent(optional_text(content, "m.call.intent")?),
    })
}

fn parse_sticky(event: &MemberEvent, content: &Map<String, Value>) -> Result<ParsedMembership, Rejected> {
    let membership = content.get("member").and_then(|member| member.get("membership"));
    if membership.and_then(Value::as_str) == Some("leave") || !content.contains_key("application") {
        return Err(Rejected::Left);
    }
    if event.sticky_until.is_none() {
        return Err(Ignored::NotSticky.into());
    }
    let application = object(content, "application")?;
    let app_type = identifier(application, "type")?;
    let slot_id = text(content, "slot_id")?;
    let (slot_application, call_id) = slot_id.split_once('#').ok_or(Ignored::Malformed("slot_id"))?;
    if slot_application != app_type || call_id.contains('#') || call_id.len() > MAX_IDENTIFIER {
        return Err(Ignored::Malformed("slot_id").into());
    }

    let member = object(content, "member")?;
    let member_id = MemberId(identifier(member, "id")?.to_owned());
    // MSC4143 takes user and device from the event; the deployed generations repeat them, the MSC4196 page
    // under `claimed_` names.
    let is_msc_form = membership.and_then(Value::as_str) == Some("join");
    let claimed = |name, claimed_name| match optional_text(member, name) {
        Ok(None) => optional_text(member, claimed_name),
        found => found,
    };
    match claimed("user_id", "claimed_user_id")? {
        Some(user) if user == event.sender.as_str() => {}
        Some(_) => return Err(Ignored::ForeignUser.into()),
        None if is_msc_form => {}
        None => return Err(Ignored::Missing("member.user_id").into()),
    }
    let device_id = match (claimed("device_id", "claimed_device_id")?, &event.sender_device) {
        (Some(claimed), Some(sealed)) if claimed != sealed.as_str() => {
            return Err(Ignored::ForeignDevice.into());
        }
        (Some(claimed), _) if (1..=MAX_IDENTIFIER).contains(&claimed.len()) => OwnedDeviceId::from(claimed),
        (Some(_), _) => return Err(Ignored::Malformed("member.device_id").into()),
        (None, Some(sealed)) if is_msc_form => sealed.clone(),
        (None, _) => return Err(Ignored::Missing("member.device_id").into()),
    };

    let focus = match (content.get("transports"), content.get("rtc_transports")) {
        (Some(transports), _) => {
            let subscribes = transports.get("can_subscribe").and_then(Value::as_array);
            if !subscribes.is_some_and(|types| types.iter().all(Value::is_string)) {
                return Err(Ignored::Malformed("transports.can_subscribe").into());
            }
            let published = transports.get("published").ok_or(Ignored::Missing("transports.published"))?;
            first_focus(published, "transports.published")?
        }
        (None, Some(transports)) => first_focus(transports, "rtc_transports")?,
        (None, None) => return Err(Ignored::Missing("transports").into()),
    };
    match content.get("versions") {
        Some(Value::Array(versions)) if versions.iter().all(Value::is_string) => {}
        None if is_msc_form => {}
        None => return Err(Ignored::Missing("versions").into()),
        Some(_) => return Err(Ignored::Malformed("versions").into()),
    }
    if let Some(relation) = content.get("m.relates_to") {
        let refers = relation.get("rel_type").and_then(Value::as_str) == Some("m.reference");
        if !refers || !relation.get("event_id").is_some_and(Value::is_string) {
            return Err(Ignored::Malformed("m.relates_to").into());
        }
    }
    sticky_key(&event.content)?;

    Ok(ParsedMembership {
        user_id: event.sender.clone(),
        identity: ParticipantIdentity::of_sticky_member(&event.sender, &device_id, &member_id),
        device_id,
        member_id,
        kind: MembershipKind::Sticky,
        slot: slot(app_type, call_id),
        created: event.origin_server_ts,
        expires_at: None,
        route: Route::Own(focus),
        intent: intent(optional_text(application, "m.call.intent")?),
    })
}

fn slot(application: &str, call_id: &str) -> Slot {
    Slot { application: application.to_owned(), call_id: room_call_as_empty(call_id).to_owned() }
}

/// An intent is shown and compared, so one of absurd length is no intent.
fn intent(text: Option<&str>) -> Option<String> {
    text.filter(|text| text.len() <= MAX_IDENTIFIER).map(str::to_owned)
}

/// The first entry that is a usable LiveKit focus. Every entry must at least have a type.
fn first_focus(list: &Value, name: &'static str) -> Result<Option<LiveKitFocus>, Ignored> {
    let list = list.as_array().ok_or(Ignored::Malformed(name))?;
    if !list.iter().all(|entry| entry.get("type").is_some_and(Value::is_string)) {
        return Err(Ignored::Malformed(name));
    }
    Ok(list.iter().find_map(livekit_focus))
}

fn object<'a>(of: &'a Map<String, Value>, name: &'static str) -> Result<&'a Map<String, Value>, Ignored> {
    of.get(name).ok_or(Ignored::Missing(name))?.as_object().ok_or(Ignored::Malformed(name))
}

fn text<'a>(of: &'a Map<String, Value>, name: &'static str) -> Result<&'a str, Ignored> {
    optional_text(of, name)?.ok_or(Ignored::Missing(name))
}

fn identifier<'a>(of: &'a Map<String, Value>, name: &'static str) -> Result<&'a str, Ignored> {
    let text = text(of, name)?;
    let may_be_empty = name == "call_id";
    if text.len() > MAX_IDENTIFIER
        || (text.is_empty() && !may_be_empty)
        || text.contains('#') && name == "type"
    {
        return Err(Ignored::Malformed(name));
    }
    Ok(text)
}

fn optional_text<'a>(of: &'a Map<String, Value>, name: &'static str) -> Result<Option<&'a str>, Ignored> {
    match of.get(name) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(_) => Err(Ignored::Malformed(name)),
    }
}

/// A JavaScript sender may write a fraction or a negative number; both are times, if odd ones.
fn optional_millis(of: &Map<String, Value>, name: &'static str) -> Result<Option<UnixMillis>, Ignored> {
    let Some(value) = of.get(name) else { return Ok(None) };
    let number = value.as_u64().or_else(|| {
        // `as` saturates: negative and NaN become 0, what is too large becomes u64::MAX.
        value.as_f64().map(|millis| millis as u64)
    });
    number.map(|millis| Some(UnixMillis(millis))).ok_or(Ignored::Malformed(name))
}

#[cfg(test)]
mod tests;
