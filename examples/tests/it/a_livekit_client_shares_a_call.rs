//! Unmodified livekit-client with its encryption worker, in the same call as a member of ours.
//!
//! The page knows nothing of Matrix: a Matrix client beside it publishes the membership and exchanges the keys.

use std::time::Duration;

use crate::support::{create_call_room, hears, play_into, sound_and_picture, turn};
use antiphon_call_sdk::{
    call::{Call, CallOptions},
    foci::TokenClient,
    key::{KeyIndex, MediaKey},
    matrix::{MatrixPort as _, TrustPolicy, Update, sdk::SdkRoom},
    media_keys::wire::{self as key_wire, KeySender},
    member::{LiveKitFocus, MemberId, ParticipantIdentity, Slot},
    membership::wire::{OwnDescription, STATE_TYPE, state_content, state_key},
    time::UnixMillis,
};
use antiphon_examples::Session;
use antiphon_focus::{Config, Focus};
use antiphon_testkit::{
    homeserver::{DevHomeserver, Options},
    peers::{
        self, Peer,
        browser::{Browser, FrameKey, LiveKitJoin, LiveKitStats},
    },
};

const LIMIT: Duration = Duration::from_secs(60);

fn decoded(stats: &LiveKitStats, identity: &str, kind: &str) -> u64 {
    let of_them = stats.remote.iter().filter(|t| t.identity == identity && t.kind == kind);
    of_them
        .map(|t| if kind == "video" { t.frames_decoded } else { t.samples_received - t.samples_concealed })
        .max()
        .unwrap_or(0)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_decrypts_the_other_and_a_wrong_key_decrypts_nothing() {
    peers::require!(Peer::Npm, Peer::Chromium, Peer::LoopbackOnly);
    let _turn = turn().await;
    let focus = Focus::start(Config::dev_ephemeral()).await.unwrap();
    let homeserver = DevHomeserver::start(Options::default()).await.unwrap();
    let service = LiveKitFocus { service_url: focus.jwt_url().unwrap().to_owned() };
    for user in ["alice", "bob", "eve"] {
        homeserver.register_user(user, "pw").unwrap();
    }
    let alice = Session::log_in(homeserver.url(), "alice", "pw").await.unwrap();
    let bob = Session::log_in(homeserver.url(), "bob", "pw").await.unwrap();
    let room_id = create_call_room(&alice).await;
    let alices_room = alice.enter(&room_id).await.unwrap();
    let bobs_room = bob.enter(&room_id).await.unwrap();

    // Alice is a member of ours.
    let mut options = CallOptions::default();
    options.focus = Some(service.clone());
    let (call, mut events) = Call::join(&alices_room, options).await.unwrap();
    let playing = play_into(&call, "alice").await;
    let alices_identity = call.identity().0.clone();

    // Bob's Matrix side: his membership, his key to Alice, and Alice's key to him.
    let port = SdkRoom::new(bobs_room.clone(), TrustPolicy::CrossSigned).unwrap();
    let mut updates = port.updates().await;
    let facts = port.room_facts().await.unwrap();
    let description = OwnDescription {
        user_id: port.user_id().to_owned(),
        device_id: port.device_id().to_owned(),
        slot: Slot::room_call(),
        focus: service.clone(),
        room_id: room_id.clone(),
        intent: None,
    };
    let key = state_key(port.user_id(), port.device_id(), &Slot::room_call(), &facts.version);
    let content = state_content(&description, Duration::from_secs(4 * 3600), None);
    bobs_room.send_state_event_raw(STATE_TYPE, &key, content).await.unwrap();
    let alices_key = tokio::time::timeout(LIMIT, async {
        loop {
            if let Some(Update::Key(received)) = updates.recv().await {
                assert!(received.olm.is_some(), "keys travel encrypted");
                return key_wire::parse(&received.content).unwrap();
            }
        }
    })
    .await
    .expect("Alice sends her key to the new member");
    let bobs_identity = ParticipantIdentity::of_state_member(port.user_id(), port.device_id()).0;
    let bobs_key: Vec<u8> = (100..116).collect();
    let sender = KeySender {
        room_id: room_id.clone(),
        slot: Slot::room_call(),
        device_id: port.device_id().to_owned(),
        member_id: MemberId(bobs_identity.clone()),
    };
    let message = key_wire::content(
        &sender,
        KeyIndex(3),
        &MediaKey::new(bobs_key.clone()).unwrap(),
        UnixMillis(1_800_000_000_000),
    );
    let to_alice = (alice.client.user_id().unwrap().to_owned(), alice.client.device_id().unwrap().to_owned());
    let undelivered = port.send_key(&[to_alice], message).await.unwrap();
    assert!(undelivered.is_empty(), "Bob's key reaches Alice");

    // Bob's page.
    let access = TokenClient::new().unwrap().sfu_get(&service, &port).await.unwrap();
    let browser = Browser::start().await.unwrap();
    let frame_key = |identity: &str, key: &[u8], index| FrameKey {
        identity: identity.to_owned(),
        key: key.to_vec(),
        index,
    };
    let page = browser
        .livekit_page(LiveKitJoin {
            url: access.url.clone(),
            token: access.jwt,
            keys: Some(vec![
                frame_key(&bobs_identity, &bobs_key, 3),
                frame_key(&alices_identity, alices_key.key.as_bytes(), alices_key.index.0),
            ]),
            publish: true,
            simulcast: true,
        })
        .await
        .unwrap();
    hears(&call, &mut events, "Bob's page heard and seen", LIMIT, |s| {
        sound_and_picture(s, &bobs_identity, 50)
    })
    .await;
    let seen = page
        .until("Alice decoded", LIMIT, |s| {
            decoded(s, &alices_identity, "video") > 20 && decoded(s, &alices_identity, "audio") > 48_000
        })
        .await
        .unwrap();
    assert!(seen.remote.iter().all(|t| t.encrypted), "tracks are announced as encrypted: {seen:#?}");

    // Eve has a token and the wrong key: packets, but not one frame.
    let eve = Session::log_in(homeserver.url(), "eve", "pw").await.unwrap();
    let eves_room = eve.enter(&room_id).await.unwrap();
    let eves_port = SdkRoom::new(eves_room, TrustPolicy::CrossSigned).unwrap();
    let access = TokenClient::new().unwrap().sfu_get(&service, &eves_port).await.unwrap();
    let eves_identity = ParticipantIdentity::of_state_member(eves_port.user_id(), eves_port.device_id()).0;
    let wrong = [7_u8; 16];
    let eves_page = browser
        .livekit_page(LiveKitJoin {
            url: access.url,
            token: access.jwt,
            keys: Some(vec![
                frame_key(&eves_identity, &wrong, 0),
                frame_key(&alices_identity, &wrong, alices_key.index.0),
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
    for task in playing {
        task.abort();
    }
    call.leave().await;
    focus.shutdown().await;
}
