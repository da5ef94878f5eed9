//! The example programs as their users run them, seen by a member of the same call.

use std::{
    collections::{BTreeMap, HashSet},
    path::Path,
    process::Stdio,
    sync::Arc,
    time::Duration,
};

use antiphon_call_sdk::{
    Call, CallEvent, CallEvents, CallOptions, IncomingTrack, Recording, Reliability, TrackSid, UserData,
};
use antiphon_examples::play;
use antiphon_focus::{Config, Focus, FocusHandle};
use antiphon_testkit::{
    homeserver::DevHomeserver,
    peers::{self, Peer},
};
use matrix_sdk::ruma::OwnedRoomId;
use tokio::process::{Child, Command};

use crate::support::{TestSession, create_call_room, event, homeserver, log_in, media, turn};

const LIMIT: Duration = Duration::from_secs(60);

/// A call with one member of ours in it, for programs to join.
struct Stage {
    homeserver: DevHomeserver,
    focus: FocusHandle,
    room: OwnedRoomId,
    session: TestSession,
    folder: tempfile::TempDir,
}

impl Stage {
    async fn new() -> Self {
        let focus = Focus::start(Config::dev_ephemeral()).await.unwrap();
        let homeserver = homeserver(focus.jwt_url().unwrap(), &["listener", "player", "bot"]).await;
        let session = log_in(homeserver.url(), "listener").await;
        let room = create_call_room(&session).await;
        Self { homeserver, focus, room, session, folder: tempfile::tempdir().unwrap() }
    }

    async fn join(&self) -> (Call, CallEvents) {
        self.session.join_call(&self.room, CallOptions::default()).await.unwrap()
    }

    fn program(&self, path: &str, user: &str) -> Command {
        let mut program = Command::new(path);
        program
            .args(["--homeserver", self.homeserver.url(), "--user", user, "--room", self.room.as_str()])
            .arg("--state")
            .arg(self.folder.path().join(user))
            .env("MATRIX_PASSWORD", "pw")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .kill_on_drop(true);
        program
    }
}

/// Ends a program as a service manager does, so that it leaves the call.
async fn stop(program: Child) {
    end_by(program, "-TERM").await;
}

async fn end_by(mut program: Child, signal: &str) {
    let id = program.id().expect("the program runs").to_string();
    assert!(Command::new("kill").args([signal, &id]).status().await.unwrap().success());
    let status = tokio::time::timeout(LIMIT, program.wait()).await.expect("the program ends").unwrap();
    assert!(status.success(), "{status}");
}

fn payloads(recording: &Path) -> HashSet<Vec<u8>> {
    Recording::open(recording).unwrap().frames().iter().map(|frame| frame.payload.to_vec()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn echo_bot_returns_what_the_player_plays() {
    let _turn = turn().await;
    let stage = Stage::new().await;
    let (call, mut events) = stage.join().await;
    let sound = media("alice.ogg");
    let bot = stage.program(env!("CARGO_BIN_EXE_echo_bot"), "bot").spawn().unwrap();
    let player = stage.program(env!("CARGO_BIN_EXE_file_player"), "player").arg(&sound).spawn().unwrap();
    let played = payloads(&sound);
    let hearing = async {
        let mut heard = BTreeMap::<String, u32>::new();
        while ["player", "bot"].iter().any(|user| heard.get(*user).is_none_or(|frames| *frames < 50)) {
            if let Some(CallEvent::Frame { from, frame }) = events.next().await {
                let user = from.member.user_id.localpart();
                assert!(played.contains(&frame.payload[..]), "a frame of {user} is not in the file");
                *heard.entry(user.to_owned()).or_default() += 1;
            }
        }
    };
    tokio::time::timeout(LIMIT, hearing).await.expect("both are heard");
    stop(player).await;
    stop(bot).await;
    call.leave().await;
    stage.focus.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn restarted_bot_is_the_same_device_and_hears_and_is_heard() {
    let _turn = turn().await;
    check_restarts(|stage| stage.program(env!("CARGO_BIN_EXE_echo_bot"), "bot")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn restarted_bot_of_another_workspace_hears_and_is_heard() {
    peers::require!(Peer::EmbedBot);
    let _turn = turn().await;
    let path = Peer::EmbedBot.find().unwrap();
    check_restarts(|stage| {
        let mut bot = Command::new(&path);
        bot.env("MATRIX_HOMESERVER", stage.homeserver.url())
            .env("MATRIX_USER", "bot")
            .env("MATRIX_PASSWORD", "pw")
            .env("MATRIX_ROOM", stage.room.as_str())
            .env("BOT_FOLDER", stage.folder.path().join("bot"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .kill_on_drop(true);
        bot
    })
    .await;
}

/// Starts a bot that echoes three times with the same folder.
async fn check_restarts(bot: impl Fn(&Stage) -> Command) {
    let stage = Stage::new().await;
    let (call, mut events) = stage.join().await;
    let recording = Recording::open(media("alice.ogg")).unwrap();
    let track = call.publish(recording.track()).await.unwrap();
    let mut playing = tokio::task::JoinSet::new();
    playing.spawn(async move { play(&track, &recording).await.unwrap() });
    let (mut devices, mut echoes, mut created) = (HashSet::new(), HashSet::new(), HashSet::new());
    for end in ["leaves", "is killed", "leaves"] {
        let mut bot = bot(&stage).spawn().unwrap();
        // It echoes, so a frame of it says that it hears us and that we hear it.
        let echo = echo_of(&mut events, 50, |sid| !echoes.contains(sid)).await;
        devices.insert(echo.member.device_id.clone());
        echoes.insert(echo.track.sid.clone());
        created.extend(call.members().iter().map(|member| member.created));
        if end == "leaves" {
            // As Ctrl-C does.
            end_by(bot, "-INT").await;
            event(&mut events, "the leave", LIMIT, |e| matches!(e, CallEvent::MemberLeft(_))).await;
        } else {
            bot.kill().await.unwrap();
        }
    }
    assert_eq!(devices.len(), 1, "{devices:?}");
    // Even after it was killed: members send their keys only to a device that has joined anew.
    assert_eq!(created.len(), 3, "each start is a join: {created:?}");
    drop(playing);
    call.leave().await;
    stage.focus.shutdown().await;
}

/// Waits for frames of a track that `is_new`.
async fn echo_of(
    events: &mut CallEvents,
    frames: usize,
    is_new: impl Fn(&TrackSid) -> bool,
) -> Arc<IncomingTrack> {
    let (mut heard, mut last) = (0, None);
    while heard < frames {
        let frame = |e: &CallEvent| matches!(e, CallEvent::Frame { from, .. } if is_new(&from.track.sid));
        let CallEvent::Frame { from, .. } = event(events, "the echo", LIMIT, frame).await else {
            unreachable!("only frames pass")
        };
        (heard, last) = (heard + 1, Some(from));
    }
    last.expect("at least one frame")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn recorder_writes_what_the_player_plays() {
    let _turn = turn().await;
    let stage = Stage::new().await;
    let (call, mut events) = stage.join().await;
    let (sound, picture) = (media("carol.ogg"), media("carol.ivf"));
    let to = stage.folder.path().join("recordings");
    let recorder = stage.program(env!("CARGO_BIN_EXE_recorder"), "bot").arg("--to").arg(&to).spawn().unwrap();
    event(&mut events, "the recorder", LIMIT, |e| matches!(e, CallEvent::MemberJoined(_))).await;
    let mut player = stage.program(env!("CARGO_BIN_EXE_file_player"), "player");
    let player = player.args([&sound, &picture]).spawn().unwrap();
    // The member that only listens sees as much as the recorder: two rounds of four seconds.
    let mut frames = 0;
    let playing = async {
        while frames < 2 * payloads(&sound).len() {
            frames += usize::from(matches!(events.next().await, Some(CallEvent::Frame { .. })));
        }
    };
    tokio::time::timeout(LIMIT, playing).await.expect("the player is heard");
    stop(player).await;
    stop(recorder).await;
    let mut written = BTreeMap::new();
    for file in std::fs::read_dir(&to).unwrap() {
        let path = file.unwrap().path();
        written.insert(path.extension().unwrap().to_str().unwrap().to_owned(), path);
    }
    assert_eq!(written.keys().collect::<Vec<_>>(), ["ivf", "ogg"]);
    for (kind, original) in [("ogg", sound), ("ivf", picture)] {
        let played = payloads(&original);
        let recorded = Recording::open(&written[kind]).unwrap();
        // One byte is a frame that fills a gap.
        let frames: Vec<_> = recorded.frames().iter().filter(|frame| frame.payload.len() > 1).collect();
        assert!(frames.len() > played.len() / 2, "{} frames of {kind}", frames.len());
        assert!(frames.iter().all(|frame| played.contains(&frame.payload[..])), "{kind} is damaged");
    }
    call.leave().await;
    stage.focus.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tone_bot_sounds_only_when_it_is_asked() {
    let _turn = turn().await;
    let stage = Stage::new().await;
    let (call, mut events) = stage.join().await;
    let bot = stage.program(env!("CARGO_BIN_EXE_tone_bot"), "bot").spawn().unwrap();
    let published =
        event(&mut events, "the track", LIMIT, |e| matches!(e, CallEvent::TrackPublished { .. })).await;
    assert!(
        matches!(published, CallEvent::TrackPublished { track, .. } if track.muted),
        "the bot joins muted"
    );
    assert!(call.tracks().iter().all(|track| track.stats.received == 0), "{:#?}", call.tracks());
    let ask = || UserData { payload: b"1".to_vec(), topic: Some("talk".to_owned()) };
    let sounding = async {
        let mut frames = 0;
        let mut again = tokio::time::interval(Duration::from_secs(2));
        while frames < 20 {
            tokio::select! {
                // The bot may not have our key yet.
                _ = again.tick() => call.send_data(Reliability::Reliable, &[], ask()).await.unwrap(),
                event = events.next() => frames += u32::from(matches!(event, Some(CallEvent::Frame { .. }))),
            }
        }
    };
    tokio::time::timeout(LIMIT, sounding).await.expect("the tone sounds");
    event(
        &mut events,
        "the end of the tone",
        LIMIT,
        |e| matches!(e, CallEvent::TrackUpdated { track, .. } if track.muted),
    )
    .await;
    stop(bot).await;
    call.leave().await;
    stage.focus.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn probe_succeeds_only_if_everybody_is_decrypted() {
    let _turn = turn().await;
    let stage = Stage::new().await;
    let probe = async || {
        let mut probe = stage.program(env!("CARGO_BIN_EXE_probe"), "bot");
        let probe = probe.args(["--seconds", "6"]).stdout(Stdio::piped()).stderr(Stdio::piped());
        tokio::time::timeout(LIMIT, probe.output()).await.expect("the probe ends").unwrap()
    };
    let alone = probe().await;
    let said = String::from_utf8_lossy(&alone.stderr).into_owned();
    assert_eq!(alone.status.code(), Some(1), "{said}");
    assert!(said.contains("nobody else is in the call"), "{said}");

    let player =
        stage.program(env!("CARGO_BIN_EXE_file_player"), "player").arg(media("bob.ogg")).spawn().unwrap();
    let (call, mut events) = stage.join().await;
    event(&mut events, "the player", LIMIT, |e| matches!(e, CallEvent::Frame { .. })).await;
    // Our member publishes nothing.
    let silent = probe().await;
    let said = String::from_utf8_lossy(&silent.stderr).into_owned();
    assert_eq!(silent.status.code(), Some(1), "{said}");
    call.leave().await;

    let heard = probe().await;
    let said = String::from_utf8_lossy(&heard.stderr).into_owned();
    assert_eq!(heard.status.code(), Some(0), "{said}");
    let report: serde_json::Value = serde_json::from_slice(&heard.stdout).unwrap();
    assert_eq!(report["encrypted"], true);
    assert!(!report.to_string().contains("player"), "{report}");
    stop(player).await;
    stage.focus.shutdown().await;
}
