//! Reading the sticky form: the union of what the deployed generations and MSC4143 write.

use serde_json::Value;

use super::{
    Ignored, ParsedMembership, Rejected, Route,
    fields::{Fields, MAX_IDENTIFIER, identifier, intent, object, optional_identifier, optional_text, text},
    read::{device, sticky_key},
    transports::{self, Published},
};
use crate::{
    matrix::MemberEvent,
    member::{MemberId, MembershipForm, ParticipantIdentity, Slot},
};

/// Reads a sticky membership. `versions`, `capabilities`, relations and unknown keys are ignored: no generation needs
/// them, and some require what others forbid.
pub(super) fn read(
    event: &MemberEvent,
    content: &Fields,
    room_is_encrypted: bool,
) -> Result<ParsedMembership, Rejected> {
    if event.sticky_until.is_none() {
        return Err(Ignored::NotSticky.into());
    }
    // MSC4143: delayed leaves are in clear, and so is anything that a homeserver makes up.
    if room_is_encrypted && !event.encrypted {
        return Err(Rejected::Left);
    }
    let membership = content.get("member").and_then(|member| member.get("membership"));
    if membership.is_some_and(|membership| membership != "join") || !content.contains_key("application") {
        return Err(Rejected::Left);
    }
    sticky_key(&event.content)?;
    let application = object(content, "application")?;
    let slot = slot(application, text(content, "slot_id")?)?;

    let member = object(content, "member")?;
    let member_id = MemberId(identifier(member, "id")?.to_owned());
    // MSC4143 takes user and device from the event. Deployed generations repeat them, an older MSC4196 under
    // `claimed_` names.
    for name in ["user_id", "claimed_user_id"] {
        if optional_text(member, name)?.is_some_and(|user| user != event.sender.as_str()) {
            return Err(Ignored::ForeignUser.into());
        }
    }
    let claimed = optional_identifier(member, "device_id")?;
    let claimed = claimed.or(optional_identifier(member, "claimed_device_id")?);
    let device_id = device(event, claimed)?;
    if room_is_encrypted && device_id.is_none() {
        return Err(Ignored::Missing("member.device_id").into());
    }

    let published = published(content)?;
    let by_member = ParticipantIdentity::of_member(&event.sender, &member_id);
    let by_device = device_id
        .as_ref()
        .map(|device| ParticipantIdentity::of_claimed_device(&event.sender, device, &member_id));
    let mut identities: Vec<_> = by_device.into_iter().chain([by_member]).collect();
    if published.names_merged_type {
        // A member that publishes `m.livekit` has a token of merged MSC4195.
        identities.reverse();
    }
    Ok(ParsedMembership {
        user_id: event.sender.clone(),
        device_id,
        member_id,
        identities,
        form: MembershipForm::Sticky,
        slot,
        created: event.origin_server_ts,
        expires_at: None,
        reads_msc_keys: membership.is_some() || published.names_merged_type,
        route: Route::Own(published.foci),
        mesh: published.mesh,
        intent: ["m.call.intent", "intent"]
            .iter()
            .find_map(|name| intent(application.get(*name).and_then(Value::as_str))),
    })
}

/// Both halves as they are written: `m.call#ROOM` and `m.call#room` are two slots.
fn slot(application: &Fields, slot_id: &str) -> Result<Slot, Ignored> {
    let kind = identifier(application, "type")?;
    let (slot_application, id) = slot_id.split_once('#').ok_or(Ignored::Malformed("slot_id"))?;
    if slot_application != kind || id.contains('#') || id.len() > MAX_IDENTIFIER {
        return Err(Ignored::Malformed("slot_id"));
    }
    Ok(Slot { application: kind.to_owned(), id: id.to_owned() })
}

/// `transports.published` and `rtc_transports` together. One well-formed list is enough, as each generation looks at
/// its own list only. Without any, the member publishes nothing.
fn published(content: &Fields) -> Result<Published, Ignored> {
    let newer = content.get("transports").map(|of| match (of.as_object(), of.get("published")) {
        (None, _) => Err(Ignored::Malformed("transports")),
        (Some(_), None) => Ok(Published::default()),
        (Some(_), Some(list)) => transports::published(list, "transports.published"),
    });
    let older = content.get("rtc_transports").map(|list| transports::published(list, "rtc_transports"));
    match (newer, older) {
        (Some(Ok(newer)), Some(Ok(older))) => Ok(newer.merged_with(older)),
        (Some(Ok(list)), _) | (_, Some(Ok(list))) => Ok(list),
        (Some(Err(error)), _) | (None, Some(Err(error))) => Err(error),
        (None, None) => Ok(Published::default()),
    }
}
