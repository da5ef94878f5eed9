//! Key messages as they are written and read.

use proptest::prelude::*;
use ruma_common::room_id;

use super::*;
use crate::machine::testing::device;

fn sender() -> KeySender {
    KeySender {
        room_id: room_id!("!room:example.org").to_owned(),
        slot: Slot::room_call(),
        device: device("@alice:example.org", "MYDEVICE"),
        member_id: MemberId("@alice:example.org:MYDEVICE".to_owned()),
    }
}

fn key() -> MediaKey {
    MediaKey::new((0..16).collect()).unwrap()
}

fn with(mut content: Value, path: &str, value: Value) -> Value {
    *content.pointer_mut(path).unwrap() = value;
    content
}

fn without(mut content: Value, names: &[&str]) -> Value {
    for name in names {
        content.as_object_mut().unwrap().remove(*name);
    }
    content
}

/// Our message to everybody.
fn superset() -> Value {
    messages(&sender(), KeyIndex(0), &key(), UnixMillis(17)).legacy.1
}

/// What deployed clients send.
fn deployed() -> Value {
    without(superset(), &["member_id", "media_key"])
}

fn msc() -> Value {
    messages(&sender(), KeyIndex(0), &key(), UnixMillis(17)).msc.1
}

#[test]
fn h82_written_messages_match_the_specification() {
    let messages = messages(&sender(), KeyIndex(2), &key(), UnixMillis(1_700_000_000_000));
    let legacy = json!({
        "keys": {"index": 2, "key": "AAECAwQFBgcICQoLDA0ODw=="},
        "room_id": "!room:example.org",
        "member": {"id": "@alice:example.org:MYDEVICE", "claimed_device_id": "MYDEVICE"},
        "session": {"application": "m.call", "call_id": "", "scope": "m.room"},
        "sent_ts": 1_700_000_000_000_u64,
        "member_id": "@alice:example.org:MYDEVICE",
        "media_key": {"index": 2, "key": "AAECAwQFBgcICQoLDA0ODw"},
    });
    let msc = json!({
        "room_id": "!room:example.org",
        "member_id": "@alice:example.org:MYDEVICE",
        "media_key": {"index": 2, "key": "AAECAwQFBgcICQoLDA0ODw"},
    });
    assert_eq!(messages.legacy, ("io.element.call.encryption_keys", legacy));
    assert_eq!(messages.msc, ("org.matrix.msc4143.rtc.encryption_key", msc));
}

#[test]
fn three_event_types_carry_keys() {
    for event_type in [LEGACY_KEY_EVENT, "m.rtc.encryption_key", "org.matrix.msc4143.rtc.encryption_key"] {
        assert!(is_key_event(event_type));
    }
    assert!(!is_key_event("m.room_key"));
}

#[test]
fn every_content_is_read() {
    let expected = KeyMessage {
        room_id: sender().room_id,
        claimed_device_id: Some(sender().device.device_id),
        member_id: Some(sender().member_id),
        index: KeyIndex(0),
        key: key(),
        sent_ts: Some(UnixMillis(17)),
    };
    assert_eq!(parse(&superset()).unwrap(), expected);
    assert_eq!(parse(&deployed()).unwrap(), expected);
    let bare = KeyMessage { claimed_device_id: None, sent_ts: None, ..expected };
    assert_eq!(parse(&msc()).unwrap(), bare);
}

#[test]
fn msc_fields_win_and_absent_ones_fall_back() {
    let other = json!({"index": 9, "key": "/////////////////////w"});
    let message = parse(&with(with(superset(), "/media_key", other), "/member_id", json!("id"))).unwrap();
    assert_eq!((message.index, message.key.as_bytes()), (KeyIndex(9), &[0xff; 16][..]));
    assert_eq!(message.member_id, Some(MemberId("id".to_owned())));
    for absent in [json!({}), json!(null), json!({"index": null, "key": null})] {
        assert_eq!(parse(&with(superset(), "/media_key", absent)).unwrap().key, key());
    }
    let message = parse(&without(superset(), &["member_id"])).unwrap();
    assert_eq!(message.member_id, Some(sender().member_id), "member.id");
}

#[test]
fn member_id_is_optional() {
    let content = with(deployed(), "/member", json!({"claimed_device_id": "BOB"}));
    assert_eq!(parse(&content).unwrap().member_id, None);
    assert_eq!(parse(&without(msc(), &["member_id"])).unwrap().member_id, None);
}

#[test]
fn h84_malformed_messages_are_named() {
    let malformed = |path, value| parse(&with(deployed(), path, value)).unwrap_err();
    assert_eq!(malformed("/keys", json!({})), KeyRejected::Malformed("index"));
    assert_eq!(malformed("/keys", json!({"index": 0})), KeyRejected::Malformed("key"));
    assert_eq!(malformed("/keys", json!({"index": 0, "key": ""})), KeyRejected::Malformed("key"));
    assert_eq!(malformed("/keys", json!({"key": "AAAA"})), KeyRejected::Malformed("index"));
    assert_eq!(malformed("/keys", json!([{"index": 0, "key": "AAAA"}])), KeyRejected::Malformed("keys"));
    assert_eq!(malformed("/member", json!({})), KeyRejected::Malformed("claimed_device_id"));
    assert_eq!(malformed("/member/id", json!(1)), KeyRejected::Malformed("id"));
    assert_eq!(malformed("/sent_ts", json!("now")), KeyRejected::Malformed("sent_ts"));
    for missing in ["member", "room_id", "keys"] {
        assert_eq!(parse(&without(deployed(), &[missing])).unwrap_err(), KeyRejected::Malformed(missing));
    }
    assert_eq!(parse(&json!([])).unwrap_err(), KeyRejected::Malformed("content"));
}

#[test]
fn unknown_format_is_refused() {
    let in_key = |format: Value| {
        parse(&with(
            msc(),
            "/media_key",
            json!({"index": 0, "key": "AAECAwQFBgcICQoLDA0ODw", "format": format}),
        ))
    };
    assert!(in_key(json!("m.base64")).is_ok());
    assert_eq!(in_key(json!("m.wrapped")).unwrap_err(), KeyRejected::Malformed("format"));
    let mut content = msc();
    content["format"] = json!(0);
    assert!(parse(&content).is_ok());
    content["format"] = json!(1);
    assert_eq!(parse(&content).unwrap_err(), KeyRejected::Malformed("format"));
}

#[test]
fn index_is_an_integer_of_one_byte() {
    for index in [json!(-1), json!(1.5), json!(256), json!(1_000_000_000), json!("0")] {
        assert_eq!(
            parse(&with(deployed(), "/keys/index", index.clone())).unwrap_err(),
            KeyRejected::BadIndex
        );
        assert_eq!(parse(&with(msc(), "/media_key/index", index)).unwrap_err(), KeyRejected::BadIndex);
    }
    assert_eq!(parse(&with(deployed(), "/keys/index", json!(255))).unwrap().index, KeyIndex(255));
}

#[test]
fn key_has_16_to_64_bytes_in_any_base64() {
    let bytes = |text: &str| {
        parse(&with(deployed(), "/keys/key", json!(text))).map(|message| message.key.as_bytes().to_vec())
    };
    for text in [
        "/////////////////////w==",
        "/////////////////////w",
        "_____________________w==",
        "_____________________w",
    ] {
        assert_eq!(bytes(text).unwrap(), [0xff; 16], "{text}");
    }
    assert_eq!(bytes(&"AAAA".repeat(8)).unwrap().len(), 24);
    assert_eq!(bytes(&PADDED.encode([7; 64])).unwrap(), [7; 64]);
    assert_eq!(bytes("AA==").unwrap_err(), KeyRejected::BadLength(BadKeyLength(1)));
    assert_eq!(bytes(&PADDED.encode([7; 65])).unwrap_err(), KeyRejected::BadLength(BadKeyLength(65)));
    for text in ["A", "AAAA AAAA", "-_+/", &"A".repeat(89)] {
        assert_eq!(bytes(text).unwrap_err(), KeyRejected::BadEncoding);
    }
}

#[test]
fn debug_shows_no_key() {
    let printed = format!("{:?}", parse(&superset()).unwrap());
    assert!(printed.contains("redacted") && !printed.contains("AAEC") && !printed.contains("1, 2, 3"));
}

proptest! {
    #[test]
    fn written_messages_are_read_back(
        index in any::<u8>(),
        bytes in prop::collection::vec(any::<u8>(), 16..=64),
        sent in any::<u64>(),
    ) {
        let key = MediaKey::new(bytes).unwrap();
        let written = messages(&sender(), KeyIndex(index), &key, UnixMillis(sent));
        let expected = KeyMessage {
            room_id: sender().room_id,
            claimed_device_id: Some(sender().device.device_id),
            member_id: Some(sender().member_id),
            index: KeyIndex(index),
            key,
            sent_ts: Some(UnixMillis(sent)),
        };
        prop_assert_eq!(parse(&written.legacy.1).unwrap(), expected.clone());
        let bare = KeyMessage { claimed_device_id: None, sent_ts: None, ..expected };
        prop_assert_eq!(parse(&written.msc.1).unwrap(), bare);
    }

    #[test]
    fn parsing_never_panics(
        path in prop::sample::select(vec![
            "", "/keys", "/keys/index", "/keys/key", "/room_id", "/member", "/member/id",
            "/member/claimed_device_id", "/sent_ts", "/member_id", "/media_key", "/media_key/index", "/media_key/key",
        ]),
        value in prop_oneof![
            Just(Value::Null), any::<f64>().prop_map(Value::from), any::<i64>().prop_map(Value::from),
            "\\PC{0,60}".prop_map(Value::from), "[A-Za-z0-9+/_=-]{0,100}".prop_map(Value::from),
            Just(json!([])), Just(json!({})),
        ],
    ) {
        if let Ok(message) = parse(&with(superset(), path, value)) {
            prop_assert!((16..=64).contains(&message.key.as_bytes().len()));
        }
    }
}
