//! Reading the state form (MSC3401, as matrix-js-sdk writes it).

use std::time::Duration;

use serde_json::Value;

use super::{
    DEFAULT_EXPIRES, Ignored, ParsedMembership, Rejected, Route,
    fields::{Fields, MAX_IDENTIFIER, identifier, intent, optional_millis, optional_text, text},
    read::device,
    transports::{self, Published},
};
use crate::{
    matrix::MemberEvent,
    member::{MemberId, MembershipForm, ParticipantIdentity, Slot},
};

/// Reads a state membership. The state key is not looked at: in room version 12 any member may write any key that
/// begins with an underscore.
pub(super) fn read(event: &MemberEvent, content: &Fields) -> Result<ParsedMembership, Rejected> {
    if content.is_empty() {
        return Err(Rejected::Left);
    }
    if content.len() < 2 || (!content.contains_key("application") && content.contains_key("memberships")) {
        return Err(Ignored::Obsolete.into());
    }
    let application = identifier(content, "application")?;
    let slot = slot(application, content)?;
    let device_id =
        device(event, Some(identifier(content, "device_id")?))?.ok_or(Ignored::Missing("device_id"))?;
    optional_text(content, "scope")?;
    let member_id = match optional_text(content, "membershipID")? {
        None => MemberId::of_state_member(&event.sender, &device_id),
        // Deployed clients write `{user}:{device}`.
        Some(id) if id.len() <= 2 * MAX_IDENTIFIER + 1 => MemberId(id.to_owned()),
        Some(_) => return Err(Ignored::Malformed("membershipID").into()),
    };
    let created = optional_millis(content, "created_ts")?.unwrap_or(event.origin_server_ts);
    let expires =
        optional_millis(content, "expires")?.map_or(DEFAULT_EXPIRES, |ms| Duration::from_millis(ms.0));
    let published = match content.get("foci_preferred") {
        None => Published::default(),
        Some(list) => transports::published(list, "foci_preferred")?,
    };
    let reads_msc_keys = published.names_merged_type;
    let mesh = published.mesh.clone();
    Ok(ParsedMembership {
        // The first is what `/sfu/get` issues. A client that writes state and asks `/get_token` has a hashed one.
        identities: vec![
            ParticipantIdentity::of_device(&event.sender, &device_id),
            ParticipantIdentity::of_claimed_device(&event.sender, &device_id, &member_id),
            ParticipantIdentity::of_member(&event.sender, &member_id),
        ],
        user_id: event.sender.clone(),
        device_id: Some(device_id),
        member_id,
        form: MembershipForm::State,
        slot,
        created,
        expires_at: Some(created.plus(expires)),
        route: route(content, published)?,
        mesh,
        intent: intent(optional_text(content, "m.call.intent")?),
        reads_msc_keys,
    })
}

/// The empty call id is the room call, of voice and video.
fn slot(application: &str, content: &Fields) -> Result<Slot, Ignored> {
    let call_id = text(content, "call_id")?;
    if call_id.len() > MAX_IDENTIFIER {
        return Err(Ignored::Malformed("call_id"));
    }
    let room_call = Slot::room_call();
    if application == room_call.application && call_id.is_empty() {
        return Ok(room_call);
    }
    Ok(Slot { application: application.to_owned(), id: call_id.to_owned() })
}

fn route(content: &Fields, published: Published) -> Result<Route, Ignored> {
    let active = content.get("focus_active").ok_or(Ignored::Missing("focus_active"))?;
    let kind = active.get("type").and_then(Value::as_str).ok_or(Ignored::Malformed("focus_active"))?;
    // Deployed readers use the first focus only.
    let first = published.foci.into_iter().take(1).collect();
    Ok(match active.get("focus_selection").and_then(Value::as_str) {
        Some("multi_sfu") if transports::is_livekit(kind) => Route::Own(first),
        Some("oldest_membership") if transports::is_livekit(kind) => Route::OldestMember(first),
        _ => Route::Unknown,
    })
}
