//! What we write, judged by the rules of every reader and by our own.

use std::time::Duration;

use proptest::prelude::*;
use ruma_common::{OwnedRoomId, device_id, user_id};
use serde_json::json;

use super::{
    super::{fixtures::Generation, *},
    validators::*,
};
use crate::{
    machine::membership::testing::{ALICE, device, focus, state_event, sticky_event},
    matrix::{EventTarget, EventWrite},
};

const MODES: [MembershipMode; 4] = [
    MembershipMode::Compatibility,
    MembershipMode::Legacy,
    MembershipMode::Matrix2,
    MembershipMode::Matrix2Merged,
];

fn both_urls() -> LiveKitFocus {
    LiveKitFocus { sfu: Some("wss://sfu.example".parse().unwrap()), ..focus("https://jwt.example") }
}

fn own(mode: MembershipMode, focus: LiveKitFocus) -> OwnDescription {
    let member_id = match mode.form() {
        MembershipForm::State => "@alice:example.org:AAAAAAA",
        MembershipForm::Sticky => "b7c1f0e2-3a54-4d7e-9f0a-5f5b2f0c9d11",
    };
    OwnDescription {
        device: device(ALICE, "AAAAAAA"),
        room_id: OwnedRoomId::try_from("!room:example.org").unwrap(),
        room_version: "12".to_owned(),
        slot: Slot::room_call(),
        mode,
        member_id: MemberId(member_id.to_owned()),
        transports: OwnTransports { focus: Some(focus), mesh: None },
        intent: Some("video".to_owned()),
    }
}

/// The membership as the room would show it, read again.
fn read_back(own: &OwnDescription, write: EventWrite) -> Result<ParsedMembership, Rejected> {
    let event = match own.mode.form() {
        MembershipForm::State => state_event(ALICE, 5, write.content),
        MembershipForm::Sticky => sticky_event(ALICE, 5, write.content),
    };
    read(&event, false)
}

#[test]
fn state_content_is_what_element_call_sends() {
    let own =
        OwnDescription { intent: None, ..own(MembershipMode::Compatibility, focus("https://sfu.example")) };
    let write = membership(&own, DEFAULT_EXPIRES, None);
    assert_eq!(write.event_type, "org.matrix.msc3401.call.member");
    assert_eq!(write.target, EventTarget::State { key: "_@alice:example.org_AAAAAAA_m.call".to_owned() });
    assert_eq!(
        write.content,
        json!({
            "application": "m.call", "call_id": "", "scope": "m.room",
            "device_id": "AAAAAAA", "membershipID": "@alice:example.org:AAAAAAA",
            "expires": 14_400_000,
            "focus_active": {"type": "livekit", "focus_selection": "multi_sfu"},
            "foci_preferred": [{
                "type": "livekit", "livekit_service_url": "https://sfu.example",
                "livekit_alias": "!room:example.org",
            }],
        })
    );
    let own = OwnDescription { intent: Some("video".to_owned()), ..own };
    let later = membership(&own, DEFAULT_EXPIRES, Some(UnixMillis(17))).content;
    assert_eq!((&later["created_ts"], &later["m.call.intent"]), (&json!(17), &json!("video")));
}

#[test]
fn sticky_content_is_the_documented_superset() {
    let transport = json!({
        "type": "livekit", "livekit_service_url": "https://jwt.example", "url": "wss://sfu.example",
    });
    let own = own(MembershipMode::Matrix2, both_urls());
    let write = membership(&own, DEFAULT_EXPIRES, Some(UnixMillis(17)));
    assert_eq!(write.event_type, "org.matrix.msc4143.rtc.member");
    assert_eq!(write.target, EventTarget::Message { sticky: Some(Duration::from_millis(3_600_000)) });
    let id = own.member_id.0.as_str();
    assert_eq!(
        write.content,
        json!({
            "slot_id": "m.call#ROOM",
            "application": {"type": "m.call", "intent": "video", "m.call.intent": "video"},
            "member": {"id": id, "membership": "join", "user_id": ALICE, "device_id": "AAAAAAA"},
            "transports": {"published": [transport], "can_subscribe": ["m.livekit", "livekit"]},
            "rtc_transports": [transport], "versions": [],
            "sticky_key": id, "msc4354_sticky_key": id,
        })
    );
}

#[test]
fn every_reader_accepts_every_mode() {
    for mode in MODES {
        let own = own(mode, both_urls());
        let write = membership(&own, DEFAULT_EXPIRES, Some(UnixMillis(3)));
        match mode.form() {
            MembershipForm::State => {
                assert!(js_sdk_reads_state(&write.content), "{mode:?}");
                assert!(element_x_reads_state(&write.content), "{mode:?}");
            }
            MembershipForm::Sticky => {
                assert!(js_sdk_reads_sticky(Generation::G1, ALICE, &write.content), "{mode:?}");
                assert!(js_sdk_reads_sticky(Generation::G2, ALICE, &write.content), "{mode:?}");
                assert!(msc_reads_join(&write.content), "{mode:?}");
            }
        }
        let parsed = read_back(&own, write).unwrap();
        assert_eq!(parsed.identities[0], own.identity(), "{mode:?}: type and identity agree");
        assert_eq!(parsed.reads_msc_keys, mode.form() == MembershipForm::Sticky, "{mode:?}");
    }
}

#[test]
fn every_reader_accepts_every_leave() {
    for mode in MODES {
        let own = own(mode, both_urls());
        for (code, text) in [
            (LeaveCode::Leave, "leave"),
            (LeaveCode::DelayedLeave, "delayed_leave"),
            (LeaveCode::SlotClosed, "slot_closed"),
        ] {
            let write = leave(&own, code);
            let sticky = Some(STICKY_DURATION);
            let join = membership(&own, DEFAULT_EXPIRES, None);
            assert_eq!(write.event_type, join.event_type);
            match (mode.form(), code) {
                (MembershipForm::State, _) => {
                    assert_eq!((&write.target, &write.content), (&join.target, &json!({})));
                }
                (_, LeaveCode::DelayedLeave) => {
                    assert_eq!(write.target, EventTarget::ClearMessage { sticky })
                }
                _ => assert_eq!(write.target, EventTarget::Message { sticky }),
            }
            if mode.form() == MembershipForm::Sticky {
                assert!(js_sdk_reads_leave(&write.content) && msc_reads_leave(&write.content), "{mode:?}");
                assert_eq!(write.content["leave_reason"]["code"], text);
                assert_eq!(sticky_key(&write.content), sticky_key(&join.content), "the leave ends the join");
            }
            assert_eq!(read_back(&own, write), Err(Rejected::Left), "{mode:?}");
        }
    }
}

#[test]
fn transport_type_follows_the_known_url() {
    let sfu = LiveKitFocus::of_sfu("wss://sfu.example".parse().unwrap());
    for (mode, focus, kind) in [
        (MembershipMode::Matrix2, both_urls(), "livekit"),
        (MembershipMode::Matrix2Merged, both_urls(), "m.livekit"),
        (MembershipMode::Matrix2, sfu, "m.livekit"),
        (MembershipMode::Matrix2Merged, focus("https://jwt.example"), "livekit"),
    ] {
        let own = own(mode, focus.clone());
        let write = membership(&own, DEFAULT_EXPIRES, None);
        assert_eq!(write.content["transports"]["published"][0]["type"], kind, "{mode:?} {focus}");
        let parsed = read_back(&own, write).unwrap();
        assert_eq!(parsed.identities[0], own.identity(), "{mode:?} {focus}");
        assert_eq!(parsed.route, Route::Own(vec![focus]));
    }
}

#[test]
fn numbers_stay_within_canonical_json() {
    let own = own(MembershipMode::Compatibility, both_urls());
    let content = membership(&own, Duration::MAX, None).content;
    assert_eq!(content["expires"], json!(9_007_199_254_740_991_u64));
}

// Scenario 35.
#[test]
fn underscore_is_dropped_only_in_rooms_with_owned_state() {
    let key = |version| {
        state_key(user_id!("@alice:example.org"), device_id!("AAAAAAA"), &Slot::room_call(), version)
    };
    for version in ["org.matrix.msc3757.default", "org.matrix.msc3779", "org.matrix.msc3757-x"] {
        assert_eq!(key(version), "@alice:example.org_AAAAAAA_m.call");
    }
    for version in ["12", "1", "org.matrix.msc37570", "org.matrix.msc3757_2"] {
        assert_eq!(key(version), "_@alice:example.org_AAAAAAA_m.call");
    }
}

// Scenario 34.
#[test]
fn custom_call_id_is_appended() {
    let own = OwnDescription {
        slot: Slot::parse("m.call#custom").unwrap(),
        ..own(MembershipMode::Compatibility, both_urls())
    };
    let write = membership(&own, DEFAULT_EXPIRES, None);
    assert_eq!(
        write.target,
        EventTarget::State { key: "_@alice:example.org_AAAAAAA_m.callcustom".to_owned() }
    );
    assert_eq!(write.content["call_id"], "custom");
}

proptest! {
    #[test]
    fn reader_gets_back_what_was_written(
        mode in prop::sample::select(MODES.to_vec()),
        call in "[a-z]{1,8}", intent in prop::option::of("[a-z]{1,8}"),
        expires in 0_u64..(1 << 50), created in prop::option::of(0_u64..(1 << 50)),
    ) {
        let slot = Slot { application: "m.call".to_owned(), id: call };
        let own = OwnDescription { slot, intent, ..own(mode, focus("https://jwt.example/path")) };
        let write = membership(&own, Duration::from_millis(expires), created.map(UnixMillis));
        let parsed = read_back(&own, write).unwrap();
        prop_assert_eq!(parsed.device_id, Some(own.device.device_id));
        prop_assert_eq!(parsed.member_id, own.member_id);
        prop_assert_eq!(parsed.slot, own.slot);
        prop_assert_eq!(parsed.intent, own.intent);
        let foci = own.transports.focus.into_iter().collect();
        let is_oldest = mode == MembershipMode::Legacy;
        prop_assert_eq!(parsed.route, if is_oldest { Route::OldestMember(foci) } else { Route::Own(foci) });
        if mode.form() == MembershipForm::State {
            prop_assert_eq!(parsed.created, UnixMillis(created.unwrap_or(5)));
            prop_assert_eq!(parsed.expires_at, Some(UnixMillis(created.unwrap_or(5) + expires)));
        }
    }
}
