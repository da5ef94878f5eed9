//! Unmodified Element Call on a real Synapse, through our focus and authorisation service, with a member of ours.

use std::time::{Duration, Instant};

use antiphon_call_sdk::{
    call::{Call, CallEvent, CallOptions},
    matrix::TrustPolicy,
};
use antiphon_examples::Session;
use antiphon_focus::{Config, Focus};
use antiphon_testkit::peers::{
    self, Peer,
    browser::{Browser, ElementCallJoin},
    synapse::{Synapse, SynapseOptions},
};
use matrix_sdk::ruma::RoomId;

use crate::support::{event, hears, play_into, turn};

/// What users would bear, and then some for two cores.
const LIMIT: Duration = Duration::from_secs(40);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_decodes_the_other_and_its_end_is_seen() {
    peers::require!(Peer::Synapse, Peer::Npm, Peer::Chromium, Peer::LoopbackOnly);
    let _turn = turn().await;
    let focus = Focus::start(Config::dev_ephemeral()).await.unwrap();
    let synapse = Synapse::start(SynapseOptions::with_rtc_service(focus.jwt_url().unwrap())).await.unwrap();
    let alice = synapse.register("alice", "pw").await.unwrap();
    let bob = synapse.register("bob", "pw").await.unwrap();
    let room = synapse.create_call_room(&alice).await.unwrap();
    synapse.join(&bob, &room).await.unwrap();
    let session = Session::log_in(&synapse.url(), "alice", "pw").await.unwrap();
    let room_id = <&RoomId>::try_from(room.as_str()).unwrap();
    let alices_room = session.enter(room_id).await.unwrap();

    let mut options = CallOptions::default();
    // Element Call on its own does not cross-sign its device.
    options.trust = TrustPolicy::AnyDevice;
    let (call, mut events) = Call::join(&alices_room, options).await.unwrap();
    assert!(call.is_encrypted());
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
    let of_bob =
        |t: &antiphon_call_sdk::call::TrackStats| t.identity.0.starts_with(&format!("{}:", bob.user_id));
    hears(&call, &mut events, "Element Call heard and seen", LIMIT, |s| {
        let opened = |audio: bool| {
            s.tracks.iter().filter(|t| of_bob(t) && t.codec.is_audio() == audio).map(|t| t.opened).max()
        };
        opened(true).unwrap_or(0) > 20 && opened(false).unwrap_or(0) > 20
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
    for task in playing {
        task.abort();
    }
    call.leave().await;
    focus.shutdown().await;
}
