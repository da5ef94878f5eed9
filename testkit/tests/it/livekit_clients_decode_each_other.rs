//! The control for every test with a page: unmodified `livekit-client` with its encryption worker, twice, through a
//! real LiveKit server. What fails with our parts and passes here is our fault.

use std::time::Duration;

use antiphon_testkit::peers::{Browser, FrameKey, LiveKitJoin, LiveKitOptions, LiveKitServer, Peer, require};

const LIMIT: Duration = Duration::from_secs(40);
const ALICE_KEY: [u8; 16] = [0xa1; 16];
const BOB_KEY: [u8; 16] = [0xb0; 16];

#[tokio::test(flavor = "multi_thread")]
async fn with_the_right_keys_they_decode_and_with_a_wrong_one_they_do_not() {
    require!(Peer::LoopbackOnly, Peer::LiveKit, Peer::Npm, Peer::Chromium);
    let server = LiveKitServer::start(LiveKitOptions::auto_create()).await.unwrap();
    let browser = Browser::start().await.unwrap();
    let join = |identity: &str, keys: Vec<FrameKey>, publish| LiveKitJoin {
        url: server.url(),
        token: server.token("room", identity),
        keys: Some(keys),
        publish,
        simulcast: false,
    };
    let both = || vec![FrameKey::new("alice", ALICE_KEY, 0), FrameKey::new("bob", BOB_KEY, 0)];
    let alice = browser.livekit_page(join("alice", both(), true)).await.unwrap();
    let bob = browser.livekit_page(join("bob", both(), true)).await.unwrap();
    // Eve is in the room with a valid token, hears the same packets, and has guessed a key for each.
    let guesses = vec![FrameKey::new("alice", [1; 16], 0), FrameKey::new("bob", [2; 16], 0)];
    let eve = browser.livekit_page(join("eve", guesses, false)).await.unwrap();

    for (page, other) in [(&alice, "bob"), (&bob, "alice")] {
        let stats = page
            .until("decoding the other", LIMIT, |stats| {
                stats.frames_decoded(other) >= 30
                    && stats.samples_decoded(other) >= 48_000
                    && stats.audio_energy(other) > 0.0
            })
            .await
            .unwrap();
        assert!(stats.of(other, "video").is_some_and(|of| of.encrypted && !of.muted), "{stats:#?}");
    }
    let seen = eve
        .until("receiving both", LIMIT, |stats| {
            ["alice", "bob"].iter().all(|identity| {
                ["audio", "video"]
                    .iter()
                    .all(|kind| stats.of(identity, kind).is_some_and(|of| of.packets_received >= 60))
            })
        })
        .await
        .unwrap();
    for identity in ["alice", "bob"] {
        assert_eq!(seen.frames_decoded(identity), 0, "{seen:#?}");
        assert!(seen.audio_energy(identity) < 1e-6, "{seen:#?}");
    }
    // With the right key for one of them she decodes that one: it was the key and nothing else.
    eve.set_key(&FrameKey::new("alice", ALICE_KEY, 0)).await.unwrap();
    let seen = eve.until("decoding alice", LIMIT, |stats| stats.frames_decoded("alice") >= 10).await.unwrap();
    assert_eq!(seen.frames_decoded("bob"), 0, "{seen:#?}");

    bob.set_muted("video", true).await.unwrap();
    alice
        .until("seeing bob's camera muted", LIMIT, |stats| {
            stats.of("bob", "video").is_some_and(|of| of.muted)
        })
        .await
        .unwrap();
    bob.leave().await.unwrap();
    alice
        .until("seeing bob leave", LIMIT, |stats| !stats.participants.contains(&"bob".to_owned()))
        .await
        .unwrap();
}
