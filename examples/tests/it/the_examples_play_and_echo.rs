//! The file player and the echo bot as their users run them, heard by a member of the same call.

use std::{collections::HashSet, process::Stdio, time::Duration};

use antiphon_call_sdk::{
    call::{Call, CallEvent, CallOptions},
    media::Recording,
};
use antiphon_examples::Session;
use antiphon_focus::{Config, Focus};
use antiphon_testkit::homeserver::{DevHomeserver, Options};
use serde_json::json;

use crate::support::{create_call_room, turn};

const LIMIT: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_bot_sends_back_what_the_player_plays() {
    let _turn = turn().await;
    let focus = Focus::start(Config::dev_ephemeral()).await.unwrap();
    let homeserver = DevHomeserver::start(Options::default()).await.unwrap();
    let service = focus.jwt_url().unwrap();
    homeserver.set_rtc_transports(vec![json!({ "type": "livekit", "livekit_service_url": service })]);
    for user in ["listener", "player", "bot"] {
        homeserver.register_user(user, "pw").unwrap();
    }
    let listener = Session::log_in(homeserver.url(), "listener", "pw").await.unwrap();
    let room_id = create_call_room(&listener).await;
    let room = listener.enter(&room_id).await.unwrap();
    let (call, mut events) = Call::join(&room, CallOptions::default()).await.unwrap();

    let media = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("media/alice.ogg");
    let start = |program: &str, user: &str, files: &[&std::path::Path]| {
        tokio::process::Command::new(program)
            .args(["--homeserver", homeserver.url(), "--user", user, "--room", room_id.as_str()])
            .args(files)
            .env("MATRIX_PASSWORD", "pw")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .unwrap()
    };
    let _bot = start(env!("CARGO_BIN_EXE_echo_bot"), "bot", &[]);
    let _player = start(env!("CARGO_BIN_EXE_file_player"), "player", &[&media]);

    let played: HashSet<_> =
        Recording::open(&media).unwrap().frames().iter().map(|f| f.payload.clone()).collect();
    let hearing = async {
        let (mut from_player, mut from_bot) = (0, 0);
        while from_player < 50 || from_bot < 50 {
            if let Some(CallEvent::Frame { member, frame, .. }) = events.next().await {
                assert!(played.contains(&frame.payload), "a frame of {} is not in the file", member.user_id);
                match member.user_id.localpart() {
                    "player" => from_player += 1,
                    "bot" => from_bot += 1,
                    other => panic!("{other} is not in this call"),
                }
            }
        }
    };
    tokio::time::timeout(LIMIT, hearing).await.expect("both are heard");
    call.leave().await;
    focus.shutdown().await;
}
