//! The to-device message that carries one media key of one member.
//!
//! Two contents and three event types are in use (MSC4143 §Encryption keys, and the forms of deployed clients). All
//! combinations are read. Written is the deployed type with both contents in one, and, to members that read MSC4143,
//! its own form in addition. A message holds its sender's claims; the inbox decides which of them to believe.

use base64::{
    Engine as _,
    alphabet::{STANDARD, URL_SAFE},
    engine::{
        DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig,
        general_purpose::{STANDARD as PADDED, STANDARD_NO_PAD as UNPADDED},
    },
};
use ruma_common::{OwnedDeviceId, OwnedRoomId, RoomId};
use serde_json::{Map, Value, json};

use crate::{
    key::{BadKeyLength, KeyIndex, MediaKey},
    member::{Device, MemberId, Slot},
    time::UnixMillis,
};

/// Type of the key message that deployed clients send and read.
pub(crate) const LEGACY_KEY_EVENT: &str = "io.element.call.encryption_keys";
/// Type of the key message in MSC4143 before it is part of the specification.
pub(crate) const UNSTABLE_KEY_EVENT: &str = "org.matrix.msc4143.rtc.encryption_key";
/// Type of the key message in MSC4143.
pub(crate) const KEY_EVENT: &str = "m.rtc.encryption_key";

/// Longest base64 text of a 64-byte key, with padding.
const MAX_KEY_TEXT: usize = 88;
/// Longest identifier taken from a message, in bytes. A state member's default id is a user id and a device id.
const MAX_IDENTIFIER: usize = 511;

/// Reads base64 with and without padding.
const LENIENT: GeneralPurposeConfig =
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
const PLAIN_BASE64: GeneralPurpose = GeneralPurpose::new(&STANDARD, LENIENT);
const URL_SAFE_BASE64: GeneralPurpose = GeneralPurpose::new(&URL_SAFE, LENIENT);

/// Whether to-device events of this type carry media keys.
#[must_use]
pub(crate) fn is_key_event(event_type: &str) -> bool {
    [LEGACY_KEY_EVENT, UNSTABLE_KEY_EVENT, KEY_EVENT].contains(&event_type)
}

/// What our key messages say about us.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct KeySender {
    /// The room of the call.
    pub room_id: OwnedRoomId,
    /// Which call of the room.
    pub slot: Slot,
    /// Our device.
    pub device: Device,
    /// Our membership's id, exactly as our member event has it: `{user}:{device}` in the state form.
    pub member_id: MemberId,
}

/// The messages that give away one key: type and content. Encrypt them with Olm, and never log them.
#[derive(Clone, PartialEq)]
pub(crate) struct KeyMessages {
    /// For every member: the deployed type, and a content that readers of either form understand.
    pub legacy: (&'static str, Value),
    /// In addition for members with [`Member::reads_msc_keys`](crate::member::Member): the form of MSC4143.
    pub msc: (&'static str, Value),
}

/// Writes the messages that give away `key` at `index`, sent at `sent`.
#[must_use]
pub(crate) fn messages(sender: &KeySender, index: KeyIndex, key: &MediaKey, sent: UnixMillis) -> KeyMessages {
    let media_key = json!({ "index": index.0, "key": UNPADDED.encode(key.as_bytes()) });
    let legacy = json!({
        "keys": { "index": index.0, "key": PADDED.encode(key.as_bytes()) },
        "room_id": sender.room_id,
        "member": { "id": sender.member_id, "claimed_device_id": sender.device.device_id },
        "session": {
            "application": sender.slot.application,
            "call_id": sender.slot.call_id(),
            "scope": "m.room",
        },
        "sent_ts": sent.0,
        "member_id": sender.member_id,
        "media_key": media_key,
    });
    let msc = json!({ "room_id": sender.room_id, "member_id": sender.member_id, "media_key": media_key });
    KeyMessages { legacy: (LEGACY_KEY_EVENT, legacy), msc: (UNSTABLE_KEY_EVENT, msc) }
}

/// A well-formed key message. Everything in it is its sender's claim.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct KeyMessage {
    /// The room of the call.
    pub room_id: OwnedRoomId,
    /// The device that it claims to come from; the form of MSC4143 does not say.
    pub claimed_device_id: Option<OwnedDeviceId>,
    /// The membership that it claims to belong to; `None` stands for `{sender}:{device}`.
    pub member_id: Option<MemberId>,
    /// Where the key goes in the sender's key ring.
    pub index: KeyIndex,
    /// The key.
    pub key: MediaKey,
    /// When it was sent, by the sender's clock; the form of MSC4143 does not say.
    pub sent_ts: Option<UnixMillis>,
}

/// Why a key was not accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KeyRejected {
    /// It came in clear: the homeserver could have written it.
    #[error("the key was not Olm-encrypted; its homeserver may have forged it")]
    NotEncrypted,
    /// The content is not a key message.
    #[error("the sender's key message is malformed: `{0}` is missing or has an invalid value")]
    Malformed(&'static str),
    /// The index is not an integer of 0..=255.
    #[error("the sender's key index is not an integer from 0 to 255")]
    BadIndex,
    /// The key is not base64.
    #[error("the sender's key is not base64")]
    BadEncoding,
    /// The key has a length that no client uses.
    #[error(transparent)]
    BadLength(#[from] BadKeyLength),
    /// It is for a call in another room.
    #[error("the key is for a call in another room")]
    WrongRoom,
    /// Olm does not tell which device sent it. The port delivers the event again when the device list is current.
    #[error(
        "the sender's device list does not hold the device that sent the key; waiting for an update of the list"
    )]
    UnknownDevice,
    /// The message claims another device than the one that encrypted it, or a membership of another device.
    #[error("the key claims to come from another device than the one that sent it")]
    DeviceMismatch,
    /// It claims to be our own.
    #[error("the key claims to be our own key; only this device makes that")]
    OwnIdentity,
    /// The sending device is not cross-signed by its owner (MSC4153).
    #[error("the device that sent the key is not cross-signed by its owner; the owner should verify it")]
    NotCrossSigned,
    /// A newer key with this index is known.
    #[error("a newer key of this sender with this index is known")]
    Outdated,
    /// The sender replaced this key before, or sent it before it left the call.
    #[error("the sender stopped using this key before")]
    Replayed,
    /// The sender is not joined to the room.
    #[error("the sender of the key is not joined to the room")]
    NotInRoom,
    /// Its sender did not become a member in time.
    #[error("the sender of the key did not join the call in time")]
    NotAMember,
    /// Too many keys of senders that are not members wait already.
    #[error("too many keys of senders that are not members of the call wait already")]
    TooManyParked,
}

/// Reads the content of a key message of any type: the deployed form, that of MSC4143, or both in one, of which the
/// fields of MSC4143 win.
///
/// # Errors
/// [`KeyRejected::Malformed`] with the field, [`KeyRejected::BadIndex`], [`KeyRejected::BadEncoding`] or
/// [`KeyRejected::BadLength`].
pub(crate) fn parse(content: &Value) -> Result<KeyMessage, KeyRejected> {
    let content = content.as_object().ok_or(KeyRejected::Malformed("content"))?;
    let room_id = text(content, "room_id")?.ok_or(KeyRejected::Malformed("room_id"))?;
    let room_id = RoomId::parse(room_id).map_err(|_| KeyRejected::Malformed("room_id"))?;
    let sent_ts = match content.get("sent_ts") {
        None => None,
        // A JavaScript number may have a fraction; `as` saturates.
        Some(time) => {
            let millis = time.as_u64().or_else(|| time.as_f64().map(|millis| millis as u64));
            Some(UnixMillis(millis.ok_or(KeyRejected::Malformed("sent_ts"))?))
        }
    };

    let media_key = object(content, "media_key")?;
    let keys = object(content, "keys")?;
    let member = object(content, "member")?;
    let member_id = text(content, "member_id")?;
    if !is_known_format(content.get("format"))
        || !is_known_format(media_key.and_then(|key| key.get("format")))
    {
        return Err(KeyRejected::Malformed("format"));
    }
    let claimed_device_id = member.map(|member| text(member, "claimed_device_id")).transpose()?.flatten();
    if media_key.is_none() && member_id.is_none() && claimed_device_id.is_none() {
        // The deployed form names a device; deployed clients ignore a message without one.
        let missing = if member.is_none() { "member" } else { "claimed_device_id" };
        return Err(KeyRejected::Malformed(missing));
    }
    let member_id = match (member_id, member) {
        (None, Some(member)) => text(member, "id")?,
        (member_id, _) => member_id,
    };
    if media_key.is_none() && keys.is_none() {
        return Err(KeyRejected::Malformed("keys"));
    }
    let field = |name| {
        let value = media_key.and_then(|key| key.get(name)).filter(|value| !value.is_null());
        value.or_else(|| keys?.get(name)).ok_or(KeyRejected::Malformed(name))
    };
    let index =
        field("index")?.as_u64().and_then(|index| u8::try_from(index).ok()).ok_or(KeyRejected::BadIndex)?;
    let key = decode(field("key")?.as_str().ok_or(KeyRejected::Malformed("key"))?)?;
    Ok(KeyMessage {
        room_id,
        claimed_device_id: claimed_device_id.map(Into::into),
        member_id: member_id.map(|id| MemberId(id.to_owned())),
        index: KeyIndex(index),
        key,
        sent_ts,
    })
}

/// Whether the material of a key message is plain base64: format 0 in one draft of MSC4143, `m.base64` in another.
fn is_known_format(format: Option<&Value>) -> bool {
    format.is_none_or(|format| format.as_u64() == Some(0) || format.as_str() == Some("m.base64"))
}

fn decode(text: &str) -> Result<MediaKey, KeyRejected> {
    if text.is_empty() {
        return Err(KeyRejected::Malformed("key"));
    }
    if text.len() > MAX_KEY_TEXT {
        return Err(KeyRejected::BadEncoding);
    }
    let engine = if text.contains(['-', '_']) { &URL_SAFE_BASE64 } else { &PLAIN_BASE64 };
    let bytes = engine.decode(text).map_err(|_| KeyRejected::BadEncoding)?;
    Ok(MediaKey::new(bytes)?)
}

/// The object at `name`; `None` if it is absent or null.
fn object<'a>(
    of: &'a Map<String, Value>,
    name: &'static str,
) -> Result<Option<&'a Map<String, Value>>, KeyRejected> {
    match of.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => value.as_object().map(Some).ok_or(KeyRejected::Malformed(name)),
    }
}

/// The identifier at `name`; `None` if it is absent or null.
fn text<'a>(of: &'a Map<String, Value>, name: &'static str) -> Result<Option<&'a str>, KeyRejected> {
    match of.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) if (1..=MAX_IDENTIFIER).contains(&text.len()) => Ok(Some(text)),
        Some(_) => Err(KeyRejected::Malformed(name)),
    }
}

#[cfg(test)]
mod tests;
