//! The key message: one media key for one member, sent to devices over Olm.
//!
//! What deployed clients send and read is written; that form and the form of MSC4143 are read. A message says
//! only what its sender claims: what may be believed of it is decided in [`super::inbox`].

use base64::{
    Engine as _,
    alphabet::{STANDARD, URL_SAFE},
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use matrix_sdk::ruma::{OwnedDeviceId, OwnedRoomId, RoomId};
use serde_json::{Map, Value, json};

use crate::{
    key::{BadKeyLength, KeyIndex, MediaKey},
    member::{MemberId, Slot},
    membership::wire::room_call_as_empty,
    time::UnixMillis,
};

/// Event type of the to-device message in use.
pub const KEY_EVENT_TYPE: &str = "io.element.call.encryption_keys";

/// Longest base64 text of a 32-byte key, with padding.
const MAX_KEY_TEXT: usize = 44;
/// Longest identifier taken from a message, in bytes. A state member's default id is a user id and a device id.
const MAX_IDENTIFIER: usize = 511;

/// Reads base64 with and without padding.
const LENIENT: GeneralPurposeConfig =
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
const PLAIN_BASE64: GeneralPurpose = GeneralPurpose::new(&STANDARD, LENIENT);
const URL_SAFE_BASE64: GeneralPurpose = GeneralPurpose::new(&URL_SAFE, LENIENT);

/// What our key messages say about us: the same in every one of a call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeySender {
    /// The room of the call.
    pub room_id: OwnedRoomId,
    /// Which call.
    pub slot: Slot,
    /// Our device.
    pub device_id: OwnedDeviceId,
    /// Our membership's id: `{user}:{device}` in the state form.
    pub member_id: MemberId,
}

/// The content of the message that gives `key`. It holds the key: encrypt it with Olm, and never log it.
#[must_use]
pub fn content(sender: &KeySender, index: KeyIndex, key: &MediaKey, sent: UnixMillis) -> Value {
    json!({
        "keys": { "index": index.0, "key": PLAIN_BASE64.encode(key.as_bytes()) },
        "room_id": sender.room_id,
        "member": { "id": sender.member_id, "claimed_device_id": sender.device_id },
        "session": {
            "application": sender.slot.application,
            "call_id": room_call_as_empty(&sender.slot.call_id),
            "scope": "m.room",
        },
        "sent_ts": sent.0,
    })
}

/// A well-formed key message. Everything in it is its sender's claim.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyMessage {
    /// For a call in this room.
    pub room_id: OwnedRoomId,
    /// The device that it says it comes from; the MSC4143 form does not say.
    pub claimed_device_id: Option<OwnedDeviceId>,
    /// The membership that it says it belongs to; older senders do not say.
    pub member_id: Option<MemberId>,
    /// Where the key goes in the sender's key ring.
    pub index: KeyIndex,
    /// The key.
    pub key: MediaKey,
    /// When it was sent, by the sender's clock.
    pub sent_ts: Option<UnixMillis>,
}

/// Why a key was not accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KeyRejected {
    /// It came in the clear: the homeserver could have written it.
    #[error("the key was not Olm-encrypted, so its homeserver may have forged it")]
    NotEncrypted,
    /// The content is not a key message.
    #[error("the sender's key message is malformed: `{0}` is missing or not what it must be")]
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
    /// Olm does not tell which device sent it.
    #[error("the device that sent the key is unknown: its owner's device list does not hold it")]
    UnknownDevice,
    /// The message claims another device than the one that encrypted it.
    #[error("the key claims another device than the one that sent it")]
    DeviceMismatch,
    /// It claims to be our own.
    #[error("the key claims to be our own; nobody sends us that")]
    OwnIdentity,
    /// The sending device is not cross-signed by its owner (MSC4153).
    #[error("the device that sent the key is not cross-signed by its owner; the owner should verify it")]
    NotCrossSigned,
    /// A newer key with this index is known.
    #[error("a newer key of this sender with this index is already known")]
    Outdated,
    /// Its sender did not become a member in time.
    #[error("the sender of the key is not a member of the call")]
    NotAMember,
    /// Too many keys of senders who are not members wait already.
    #[error("too many keys of senders who are not members of the call wait already")]
    TooManyParked,
}

/// Reads a key message in the deployed form or in that of MSC4143.
///
/// # Errors
/// [`KeyRejected::Malformed`] with the field, [`KeyRejected::BadIndex`], [`KeyRejected::BadEncoding`] or
/// [`KeyRejected::BadLength`].
pub fn parse(content: &Value) -> Result<KeyMessage, KeyRejected> {
    let content = content.as_object().ok_or(KeyRejected::Malformed("content"))?;
    let room_id = text(content, "room_id")?;
    let room_id = RoomId::parse(room_id).map_err(|_| KeyRejected::Malformed("room_id"))?;
    let sent_ts = match content.get("sent_ts") {
        None => None,
        // A JavaScript number may have a fraction; `as` saturates what does not fit.
        Some(time) => {
            let millis = time.as_u64().or_else(|| time.as_f64().map(|millis| millis as u64));
            Some(UnixMillis(millis.ok_or(KeyRejected::Malformed("sent_ts"))?))
        }
    };

    if let Some(keys) = content.get("keys") {
        let (index, key) = key(keys, "keys")?;
        let member = object(content.get("member"), "member")?;
        let claimed_device_id = Some(text(member, "claimed_device_id")?.into());
        let member_id = match member.get("id") {
            None | Some(Value::Null) => None,
            Some(_) => Some(MemberId(text(member, "id")?.to_owned())),
        };
        return Ok(KeyMessage { room_id, claimed_device_id, member_id, index, key, sent_ts });
    }
    if content.get("format").is_some_and(|format| format.as_u64() != Some(0)) {
        return Err(KeyRejected::Malformed("format"));
    }
    let (index, key) = key(content.get("media_key").ok_or(KeyRejected::Malformed("keys"))?, "media_key")?;
    let member_id = Some(MemberId(text(content, "member_id")?.to_owned()));
    Ok(KeyMessage { room_id, claimed_device_id: None, member_id, index, key, sent_ts })
}

fn key(value: &Value, name: &'static str) -> Result<(KeyIndex, MediaKey), KeyRejected> {
    let value = object(Some(value), name)?;
    let index = value.get("index").ok_or(KeyRejected::Malformed("index"))?;
    let index = index.as_u64().and_then(|index| u8::try_from(index).ok()).ok_or(KeyRejected::BadIndex)?;
    let text = text(value, "key")?;
    if text.len() > MAX_KEY_TEXT {
        return Err(KeyRejected::BadEncoding);
    }
    let engine = if text.contains(['-', '_']) { &URL_SAFE_BASE64 } else { &PLAIN_BASE64 };
    let bytes = engine.decode(text).map_err(|_| KeyRejected::BadEncoding)?;
    Ok((KeyIndex(index), MediaKey::new(bytes)?))
}

fn object<'a>(value: Option<&'a Value>, name: &'static str) -> Result<&'a Map<String, Value>, KeyRejected> {
    value.and_then(Value::as_object).ok_or(KeyRejected::Malformed(name))
}

fn text<'a>(of: &'a Map<String, Value>, name: &'static str) -> Result<&'a str, KeyRejected> {
    let text = of.get(name).and_then(Value::as_str).ok_or(KeyRejected::Malformed(name))?;
    if text.is_empty() || text.len() > MAX_IDENTIFIER {
        return Err(KeyRejected::Malformed(name));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use matrix_sdk::ruma::{device_id, room_id};
    use proptest::prelude::*;

    use super::*;

    fn sender() -> KeySender {
        KeySender {
            room_id: room_id!("!room:example.org").to_owned(),
            slot: Slot::room_call(),
            device_id: device_id!("MYDEVICE").to_owned(),
            member_id: MemberId("@alice:example.org:MYDEVICE".to_owned()),
        }
    }

    fn with(mut content: Value, path: &str, value: Value) -> Value {
        *content.pointer_mut(path).unwrap() = value;
        content
    }

    fn ours() -> Value {
        content(&sender(), KeyIndex(0), &MediaKey::new((0..16).collect()).unwrap(), UnixMillis(17))
    }

    #[test]
    fn h82_our_message_is_what_element_call_sends() {
        let key = MediaKey::new((0..16).collect()).unwrap();
        assert_eq!(
            content(&sender(), KeyIndex(2), &key, UnixMillis(1_700_000_000_000)),
            json!({
                "keys": {"index": 2, "key": "AAECAwQFBgcICQoLDA0ODw=="},
                "room_id": "!room:example.org",
                "member": {"id": "@alice:example.org:MYDEVICE", "claimed_device_id": "MYDEVICE"},
                "session": {"application": "m.call", "call_id": "", "scope": "m.room"},
                "sent_ts": 1_700_000_000_000_u64,
            })
        );
    }

    #[test]
    fn h84_malformed_messages_are_named() {
        let malformed = |path, value| parse(&with(ours(), path, value)).unwrap_err();
        assert_eq!(malformed("/keys", json!({})), KeyRejected::Malformed("index"));
        assert_eq!(malformed("/keys", json!({"index": 0})), KeyRejected::Malformed("key"));
        assert_eq!(malformed("/keys", json!({"index": 0, "key": ""})), KeyRejected::Malformed("key"));
        assert_eq!(malformed("/keys", json!({"key": "AAAA"})), KeyRejected::Malformed("index"));
        assert_eq!(malformed("/keys", json!([{"index": 0, "key": "AAAA"}])), KeyRejected::Malformed("keys"));
        assert_eq!(malformed("/member", json!({})), KeyRejected::Malformed("claimed_device_id"));
        assert_eq!(malformed("/member/id", json!(1)), KeyRejected::Malformed("id"));
        assert_eq!(malformed("/sent_ts", json!("now")), KeyRejected::Malformed("sent_ts"));
        for missing in ["member", "room_id", "keys"] {
            let mut content = ours();
            content.as_object_mut().unwrap().remove(missing);
            assert_eq!(parse(&content).unwrap_err(), KeyRejected::Malformed(missing));
        }
        assert_eq!(parse(&json!([])).unwrap_err(), KeyRejected::Malformed("content"));
    }

    #[test]
    fn an_index_is_an_integer_of_one_byte() {
        for index in [json!(-1), json!(1.5), json!(256), json!(1_000_000_000), json!("0"), json!(null)] {
            assert_eq!(parse(&with(ours(), "/keys/index", index)).unwrap_err(), KeyRejected::BadIndex);
        }
        assert_eq!(parse(&with(ours(), "/keys/index", json!(255))).unwrap().index, KeyIndex(255));
    }

    #[test]
    fn a_key_has_16_or_32_bytes_in_any_base64() {
        let bytes = |text: &str| {
            parse(&with(ours(), "/keys/key", json!(text))).map(|message| message.key.as_bytes().to_vec())
        };
        let all_ones = vec![0xff; 16];
        for text in [
            "/////////////////////w==",
            "/////////////////////w",
            "_____________________w==",
            "_____________________w",
        ] {
            assert_eq!(bytes(text).unwrap(), all_ones, "{text}");
        }
        assert_eq!(bytes("AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=").unwrap().len(), 32);
        assert_eq!(bytes("AA==").unwrap_err(), KeyRejected::BadLength(BadKeyLength(1)));
        assert_eq!(bytes(&"AAAA".repeat(8)).unwrap_err(), KeyRejected::BadLength(BadKeyLength(24)));
        for text in ["A", "AAAA AAAA", "-_+/", &"A".repeat(45)] {
            assert_eq!(bytes(text).unwrap_err(), KeyRejected::BadEncoding);
        }
    }

    #[test]
    fn the_form_of_the_msc_is_read() {
        let content = json!({
            "room_id": "!room:example.org", "member_id": "xyzHASHxyz", "format": 0,
            "media_key": {"index": 7, "key": "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"},
        });
        let message = parse(&content).unwrap();
        assert_eq!((message.index, message.claimed_device_id), (KeyIndex(7), None));
        assert_eq!(message.member_id, Some(MemberId("xyzHASHxyz".to_owned())));
        assert_eq!(parse(&with(content, "/format", json!(1))).unwrap_err(), KeyRejected::Malformed("format"));
    }

    #[test]
    fn older_senders_may_omit_the_member_id() {
        let content = with(ours(), "/member", json!({"claimed_device_id": "BOB"}));
        assert_eq!(parse(&content).unwrap().member_id, None);
    }

    #[test]
    fn debug_shows_no_key() {
        let printed = format!("{:?}", parse(&ours()).unwrap());
        assert!(printed.contains("redacted") && !printed.contains("AAEC") && !printed.contains("1, 2, 3"));
    }

    proptest! {
        #[test]
        fn what_we_write_we_read(index in any::<u8>(), bytes in prop_oneof![
            prop::collection::vec(any::<u8>(), 16), prop::collection::vec(any::<u8>(), 32)
        ], sent in any::<u64>()) {
            let key = MediaKey::new(bytes).unwrap();
            let message = parse(&content(&sender(), KeyIndex(index), &key, UnixMillis(sent))).unwrap();
            prop_assert_eq!(message, KeyMessage {
                room_id: sender().room_id,
                claimed_device_id: Some(sender().device_id),
                member_id: Some(sender().member_id),
                index: KeyIndex(index),
                key,
                sent_ts: Some(UnixMillis(sent)),
            });
        }

        #[test]
        fn parsing_never_panics(
            path in prop::sample::select(vec![
                "", "/keys", "/keys/index", "/keys/key", "/room_id", "/member", "/member/id",
                "/member/claimed_device_id", "/sent_ts",
            ]),
            value in prop_oneof![
                Just(Value::Null), any::<f64>().prop_map(Value::from), any::<i64>().prop_map(Value::from),
                "\\PC{0,60}".prop_map(Value::from), "[A-Za-z0-9+/_=-]{0,60}".prop_map(Value::from),
                Just(json!([])), Just(json!({})),
            ],
        ) {
            if let Ok(message) = parse(&with(ours(), path, value)) {
                prop_assert!(matches!(message.key.as_bytes().len(), 16 | 32));
            }
        }
    }
}
