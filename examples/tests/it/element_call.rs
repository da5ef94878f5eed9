//! Unmodified Element Call on a real Synapse, through our focus and authorisation service, with a member of ours.

use std::time::{Duration, Instant};

use antiphon_call_sdk::{CallEvent, CallOptions, MeshPolicy, TrustPolicy};
use antiphon_focus::{Config, Focus};
use antiphon_testkit::peers::{
    self, Peer,
    browser::{Browser, ElementCallJoin},
    synapse::{Synapse, SynapseOptions},
};
use matrix_sdk::ruma::{RoomId, UserId};

use crate::support::{event, hears, log_in, play_into, sound_and_picture, turn};

/// Longer than users wait, because the tests have two cores.
const LIMIT: Duration = Duration::from_secs(40);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_decodes_the_other_and_its_end_is_seen() {
    each_decodes_the_other(CallOptions::default()).await;
}

/// Element Call does not know the mesh: our member, whose small calls do without a focus, has to move to one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn member_in_a_mesh_moves_to_the_focus_for_element_call() {
    each_decodes_the_other(CallOptions::default().with_mesh(MeshPolicy::SmallCalls { limit: 4 })).await;
}

async fn each_decodes_the_other(options: CallOptions) {
    peers::require!(Peer::Synapse, Peer::Npm, Peer::Chromium, Peer::LoopbackOnly);
    let _turn = turn().await;
    let focus = Focus::start(Config::dev_ephemeral()).await.unwrap();
    let synapse = Synapse::start(SynapseOptions::with_rtc_service(focus.jwt_url().unwrap())).await.unwrap();
    let alice = synapse.register("alice", "pw").await.unwrap();
    let bob = synapse.register("bob", "pw").await.unwrap();
    let room = synapse.create_call_room(&alice).await.unwrap();
    synapse.join(&bob, &room).await.unwrap();
    let session = log_in(&synapse.url(), "alice").await;
    let room_id = <&RoomId>::try_from(room.as_str()).unwrap();
    session.enter_room(room_id.into()).await.unwrap();

    // Element Call on its own does not cross-sign its device.
    let options = options.with_trust(TrustPolicy::AnyDevice);
    let (call, mut events) = session.join_call(room_id, options).await.unwrap();
    assert!(call.is_encrypted());
    let state = format!("{}/_matrix/client/v3/rooms/{room}/state", synapse.url());
    let state = reqwest::Client::new().get(state).bearer_auth(&alice.access_token).send().await.unwrap();
    assert!(state.text().await.unwrap().contains("dev.antiphon.mesh"), "our membership lists the mesh");
    let playing = play_into(&call, "alice").await;

    let browser = Browser::start().await.unwrap();
    let page = browser
        .element_call(ElementCallJoin {
            homeserver: synapse.localhost_url(),
            server_name: synapse.server_name(),
            user: "bob".to_owned(),
            password: "pw".to_owned(),
            room: room.clone(),
            encrypted: true,
        })
        .await
        .unwrap();
    let clicked = Instant::now();
    let bobs_id = <&UserId>::try_from(bob.user_id.as_str()).unwrap();
    hears(&call, &mut events, "Element Call heard and seen", LIMIT, |tracks| {
        sound_and_picture(tracks, bobs_id, 20)
    })
    .await;
    println!("Element Call heard and seen {:?} after the click", clicked.elapsed());
    page.until("our member decoded", LIMIT.saturating_sub(clicked.elapsed()), |s| {
        let video = s.inbound.iter().any(|t| t.kind == "video" && t.frames_decoded > 20);
        video
            && s.inbound
                .iter()
                .any(|t| t.kind == "audio" && t.samples_received - t.samples_concealed > 24_000)
    })
    .await
    .unwrap();
    println!("our member decoded by Element Call {:?} after the click", clicked.elapsed());

    page.close().await.unwrap();
    // Its delayed leave fires 18 s after the last restart.
    event(
        &mut events,
        "Element Call's leave",
        LIMIT,
        |e| matches!(e, CallEvent::MemberLeft(m) if m.user_id.as_str() == bob.user_id),
    )
    .await;
    drop(playing);
    call.leave().await;
    focus.shutdown().await;
}
