//! Reading a membership event of either form.

use ruma_common::OwnedDeviceId;
use serde_json::Value;

use super::{ParsedMembership, fields::MAX_IDENTIFIER, read_state, read_sticky};
use crate::{matrix::MemberEvent, member::MembershipForm};

/// Why an event is not a membership.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Rejected {
    /// The sender left, or was kicked by a redaction.
    #[error("the sender has left the call")]
    Left,
    /// The event cannot be read.
    #[error("the event is not a usable membership: {0}")]
    Ignored(#[from] Ignored),
}

/// Why a membership event is ignored. Each is the sender's fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum Ignored {
    /// The content is not an object.
    #[error("its content is not an object")]
    NotAnObject,
    /// The array form of before 2024, or content too short to be a membership.
    #[error("it has a form from before 2024, or fewer than two fields")]
    Obsolete,
    /// A required field is missing.
    #[error("`{0}` is missing")]
    Missing(&'static str),
    /// A field has an invalid type or value.
    #[error("`{0}` is invalid")]
    Malformed(&'static str),
    /// The content names another user than the sender.
    #[error("its content names another user than its sender")]
    ForeignUser,
    /// The content names another device than the one that encrypted the event.
    #[error("its content names another device than the one that encrypted it")]
    ForeignDevice,
    /// An event of the sticky form without stickiness.
    #[error("it is not sticky")]
    NotSticky,
}

/// Reads one membership event of a room that is encrypted or not.
///
/// A redacted event is a leave (MSC4143: redacting a member event kicks that member).
///
/// # Errors
/// [`Rejected::Left`] if the event says that its sender left, else [`Rejected::Ignored`] with the reason.
pub(crate) fn read(event: &MemberEvent, room_is_encrypted: bool) -> Result<ParsedMembership, Rejected> {
    if event.redacted_by.is_some() {
        return Err(Rejected::Left);
    }
    let content = event.content.as_object().ok_or(Ignored::NotAnObject)?;
    match event.form {
        MembershipForm::State => read_state::read(event, content),
        MembershipForm::Sticky => read_sticky::read(event, content, room_is_encrypted),
    }
}

/// The sticky key of a content, under its unstable or stable name.
///
/// # Errors
/// If there is none, or one is not a string of 1 to 255 bytes, or the two differ.
pub(crate) fn sticky_key(content: &Value) -> Result<&str, Ignored> {
    let text = |name: &'static str| match content.get(name) {
        None => Ok(None),
        Some(Value::String(key)) if (1..=MAX_IDENTIFIER).contains(&key.len()) => Ok(Some(key.as_str())),
        Some(_) => Err(Ignored::Malformed(name)),
    };
    match (text("msc4354_sticky_key")?, text("sticky_key")?) {
        (Some(unstable), Some(stable)) if unstable != stable => Err(Ignored::Malformed("sticky_key")),
        (Some(key), _) | (None, Some(key)) => Ok(key),
        (None, None) => Err(Ignored::Missing("sticky_key")),
    }
}

/// The device of a membership: the one that encrypted the event, else the claimed one.
pub(super) fn device(event: &MemberEvent, claimed: Option<&str>) -> Result<Option<OwnedDeviceId>, Ignored> {
    match (&event.sender_device, claimed) {
        (Some(sealing), Some(claimed)) if claimed != sealing.as_str() => Err(Ignored::ForeignDevice),
        (Some(sealing), _) => Ok(Some(sealing.clone())),
        (None, claimed) => Ok(claimed.map(OwnedDeviceId::from)),
    }
}
