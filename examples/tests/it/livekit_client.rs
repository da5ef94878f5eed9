//! Unmodified livekit-client with its encryption worker, in the same call as a member of ours.
//!
//! The page knows nothing of Matrix: a Matrix client beside it publishes the membership and exchanges the keys.

use std::time::Duration;

use antiphon_call_sdk::{
    CallOptions, Device, LiveKitFocus, MemberId, MembershipMode, Slot, TrustPolicy,
    foci::{Access, AccessRequest, Purpose, ServicePolicy, SfuAccess},
    matrix::{EventTarget, EventWrite, MatrixPort, MatrixRequest, MatrixUpdate, ToDeviceBatch},
    tls::{TlsOptions, client_config},
    transport::NamedBy,
};
use antiphon_focus::{Config, Focus};
use antiphon_testkit::peers::{
    self, Peer,
    browser::{Browser, FrameKey, LiveKitJoin, LiveKitStats},
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::json;
use tokio::sync::mpsc;

use crate::support::{create_call_room, hears, homeserver, log_in, play_into, sound_and_picture, turn};

/// Type of the key message that deployed clients send.
const KEYS: &str = "io.element.call.encryption_keys";
const LIMIT: Duration = Duration::from_secs(60);

fn decoded(stats: &LiveKitStats, identity: &str, kind: &str) -> u64 {
    let of_them = stats.remote.iter().filter(|t| t.identity == identity && t.kind == kind);
    of_them
        .map(|t| if kind == "video" { t.frames_decoded } else { t.samples_received - t.samples_concealed })
        .max()
        .unwrap_or(0)
}

/// Publishes a membership as Element Call writes it.
async fn publish_membership(port: &dyn MatrixPort, service: &LiveKitFocus) {
    let Device { user_id, device_id } = port.device();
    let content = json!({
        "application": "m.call",
        "call_id": "",
        "scope": "m.room",
        "device_id": device_id,
        "membershipID": format!("{user_id}:{device_id}"),
        "expires": 14_400_000,
        "focus_active": { "type": "livekit", "focus_selection": "multi_sfu" },
        "foci_preferred": [{
            "type": "livekit",
            "livekit_service_url": service.to_string(),
            "livekit_alias": port.room_id(),
        }],
    });
    let membership = EventWrite {
        event_type: "org.matrix.msc3401.call.member".to_owned(),
        target: EventTarget::State { key: format!("_{user_id}_{device_id}_m.call") },
        content,
    };
    port.perform(MatrixRequest::Send(membership), LIMIT).await.unwrap();
}

/// Sends a media key to a device as Element Call does.
async fn send_key(port: &dyn MatrixPort, to: &Device, key: &[u8], index: u8) {
    let Device { user_id, device_id } = port.device();
    let content = json!({
        "keys": { "index": index, "key": STANDARD.encode(key) },
        "member": { "id": format!("{user_id}:{device_id}"), "claimed_device_id": device_id },
        "room_id": port.room_id(),
        "session": { "application": "m.call", "call_id": "", "scope": "m.room" },
        "sent_ts": 1_800_000_000_000_u64,
    });
    let batch = ToDeviceBatch { event_type: KEYS.to_owned(), content, recipients: vec![to.clone()] };
    let (outcomes, mut outcome) = mpsc::channel(1);
    port.send_to_device(batch, outcomes).await;
    let (_, delivered) = outcome.recv().await.unwrap();
    delivered.unwrap();
}

/// The media key, and its index, that the next key message brings.
async fn next_key(updates: &mut mpsc::Receiver<MatrixUpdate>) -> (Vec<u8>, u8) {
    loop {
        let update = updates.recv().await.expect("updates go on");
        if let MatrixUpdate::ToDevice(received) = update
            && received.event_type == KEYS
        {
            assert!(received.olm.is_some(), "keys travel encrypted");
            let keys = &received.content["keys"];
            let index = keys["index"].as_u64().unwrap().try_into().unwrap();
            return (STANDARD.decode(keys["key"].as_str().unwrap()).unwrap(), index);
        }
    }
}

/// A token for the call's SFU room.
async fn access(port: &dyn MatrixPort, service: &LiveKitFocus) -> SfuAccess {
    let tls = client_config(&TlsOptions::default()).unwrap();
    let Device { user_id, device_id } = port.device();
    let request = AccessRequest {
        focus: service.clone(),
        named_by: NamedBy::Application,
        slot: Slot::room_call(),
        member_id: MemberId::of_state_member(user_id, device_id),
        purpose: Purpose::Publish(MembershipMode::Compatibility),
    };
    Access::new(&tls, ServicePolicy::default()).unwrap().get(port, &request).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn page_and_member_decrypt_each_other_and_a_wrong_key_nothing() {
    peers::require!(Peer::Npm, Peer::Chromium, Peer::LoopbackOnly);
    let _turn = turn().await;
    let focus = Focus::start(Config::dev_ephemeral()).await.unwrap();
    let homeserver = homeserver(focus.jwt_url().unwrap(), &["alice", "bob", "eve"]).await;
    let service = LiveKitFocus::of_service(focus.jwt_url().unwrap().parse().unwrap());
    let alice = log_in(homeserver.url(), "alice").await;
    let bob = log_in(homeserver.url(), "bob").await;
    let room_id = create_call_room(&alice).await;
    bob.enter_room((*room_id).into()).await.unwrap();

    // Alice is a member of ours.
    let (call, mut events) = alice.join_call(&room_id, CallOptions::default()).await.unwrap();
    let playing = play_into(&call, "alice").await;
    let alices_device = Device::new(alice.client().user_id().unwrap(), alice.client().device_id().unwrap());
    let alices_identity = format!("{}:{}", alices_device.user_id, alices_device.device_id);

    // Bob's Matrix side: his membership, his key to Alice, and Alice's key to him.
    let port = bob.room(&room_id, TrustPolicy::CrossSigned).unwrap();
    let mut updates = port.updates().await;
    publish_membership(&port, &service).await;
    let alices_key = tokio::time::timeout(LIMIT, next_key(&mut updates)).await.expect("Alice sends her key");
    let bobs_key: Vec<u8> = (100..116).collect();
    send_key(&port, &alices_device, &bobs_key, 3).await;

    // Bob's page.
    let bobs_access = access(&port, &service).await;
    let bobs_identity = bobs_access.identity.0.clone();
    let browser = Browser::start().await.unwrap();
    let frame_key = |identity: &str, key: &[u8], index| FrameKey {
        identity: identity.to_owned(),
        key: key.to_vec(),
        index,
    };
    let page = browser
        .livekit_page(LiveKitJoin {
            url: bobs_access.url.clone(),
            token: bobs_access.jwt.0.clone(),
            keys: Some(vec![
                frame_key(&bobs_identity, &bobs_key, 3),
                frame_key(&alices_identity, &alices_key.0, alices_key.1),
            ]),
            publish: true,
            simulcast: true,
        })
        .await
        .unwrap();
    hears(&call, &mut events, "Bob's page heard and seen", LIMIT, |tracks| {
        sound_and_picture(tracks, &port.device().user_id, 50)
    })
    .await;
    let seen = page
        .until("Alice decoded", LIMIT, |s| {
            decoded(s, &alices_identity, "video") > 20 && decoded(s, &alices_identity, "audio") > 48_000
        })
        .await
        .unwrap();
    assert!(seen.remote.iter().all(|t| t.encrypted), "tracks are announced as encrypted: {seen:#?}");

    // Eve has a token and the wrong key: packets arrive, and not one frame decodes.
    let eve = log_in(homeserver.url(), "eve").await;
    eve.enter_room((*room_id).into()).await.unwrap();
    let eves_port = eve.room(&room_id, TrustPolicy::CrossSigned).unwrap();
    let eves_access = access(&eves_port, &service).await;
    let wrong = [7_u8; 16];
    let eves_page = browser
        .livekit_page(LiveKitJoin {
            url: eves_access.url.clone(),
            token: eves_access.jwt.0.clone(),
            keys: Some(vec![
                frame_key(&eves_access.identity.0, &wrong, 0),
                frame_key(&alices_identity, &wrong, alices_key.1),
            ]),
            publish: false,
            simulcast: false,
        })
        .await
        .unwrap();
    let blind = eves_page
        .until("packets of Alice at Eve's", LIMIT, |s| {
            s.remote
                .iter()
                .any(|t| t.identity == alices_identity && t.kind == "video" && t.packets_received > 60)
        })
        .await
        .unwrap();
    assert_eq!(decoded(&blind, &alices_identity, "video"), 0, "{blind:#?}");

    eves_page.leave().await.unwrap();
    page.leave().await.unwrap();
    drop(playing);
    call.leave().await;
    focus.shutdown().await;
}
