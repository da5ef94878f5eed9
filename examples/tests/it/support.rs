//! What the tests of this folder share.

use std::{ops::Deref, time::Duration};

use antiphon_call_sdk::{Call, CallEvent, CallEvents, Recording, Session, SessionOptions, TrackSummary};
use antiphon_examples::play;
use antiphon_testkit::homeserver::DevHomeserver;
use matrix_sdk::ruma::{
    OwnedRoomId, UserId,
    api::client::room::create_room,
    events::{AnyInitialStateEvent, room::power_levels::RoomPowerLevelsEventContent},
    serde::Raw,
};
use serde_json::json;
use tokio::{
    sync::{Mutex, MutexGuard},
    task::JoinSet,
};

/// Media on two cores leaves no room for a second test beside it.
static ONE_AT_A_TIME: Mutex<()> = Mutex::const_new(());

/// Sets logging up as the programs do, and waits for this test's turn.
pub(crate) async fn turn() -> MutexGuard<'static, ()> {
    antiphon_examples::init();
    ONE_AT_A_TIME.lock().await
}

/// A session whose device lasts as long as the test.
pub(crate) struct TestSession {
    session: Session,
    _store: tempfile::TempDir,
}

impl Deref for TestSession {
    type Target = Session;

    fn deref(&self) -> &Session {
        &self.session
    }
}

/// Logs a user with the password `pw` in.
pub(crate) async fn log_in(homeserver: &str, user: &str) -> TestSession {
    let store = tempfile::tempdir().unwrap();
    let options = SessionOptions::new(homeserver.parse().unwrap(), user, "pw", store.path().join("device"));
    let session = Session::log_in_or_restore(options).await.unwrap();
    TestSession { session, _store: store }
}

/// A development homeserver that names `service` as its authorisation service, with `users`.
pub(crate) async fn homeserver(service: &str, users: &[&str]) -> DevHomeserver {
    let homeserver = DevHomeserver::start(antiphon_testkit::homeserver::Options::default()).await.unwrap();
    homeserver.set_rtc_transports(vec![json!({ "type": "livekit", "livekit_service_url": service })]);
    for user in users {
        homeserver.register_user(user, "pw").unwrap();
    }
    homeserver
}

/// Makes an encrypted room that anybody may join and whose members may all join its call.
pub(crate) async fn create_call_room(creator: &Session) -> OwnedRoomId {
    let encryption = json!({ "type": "m.room.encryption", "state_key": "",
        "content": { "algorithm": "m.megolm.v1.aes-sha2" } });
    let levels = json!({ "events": { "org.matrix.msc3401.call.member": 0 } }).to_string();
    let mut request = create_room::v3::Request::new();
    request.preset = Some(create_room::v3::RoomPreset::PublicChat);
    request.initial_state =
        vec![Raw::<AnyInitialStateEvent>::from_json_string(encryption.to_string()).unwrap()];
    request.power_level_content_override =
        Some(Raw::<RoomPowerLevelsEventContent>::from_json_string(levels).unwrap().cast_unchecked());
    let id = creator.client().create_room(request).await.unwrap().room_id().to_owned();
    creator.enter_room((&*id).into()).await.unwrap();
    id
}

/// Where a recording of the examples is.
pub(crate) fn media(name: &str) -> std::path::PathBuf {
    std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("media").join(name)
}

/// Publishes a picture and a sound of the examples and keeps playing them until the set is dropped.
pub(crate) async fn play_into(call: &Call, name: &str) -> JoinSet<()> {
    let mut playing = JoinSet::new();
    for kind in ["ivf", "ogg"] {
        let recording = Recording::open(media(&format!("{name}.{kind}"))).unwrap();
        let track = call.publish(recording.track()).await.unwrap();
        playing.spawn(async move { play(&track, &recording).await.unwrap() });
    }
    playing
}

/// Reads events until one satisfies `wanted`; panics after `limit` with what came instead.
pub(crate) async fn event(
    events: &mut CallEvents,
    what: &str,
    limit: Duration,
    wanted: impl Fn(&CallEvent) -> bool,
) -> CallEvent {
    let mut others = Vec::new();
    let waiting = async {
        while let Some(event) = events.next().await {
            if wanted(&event) {
                return Some(event);
            }
            if !matches!(event, CallEvent::Frame { .. }) {
                others.push(format!("{event:?}"));
            }
        }
        None
    };
    match tokio::time::timeout(limit, waiting).await {
        Ok(Some(event)) => event,
        Ok(None) => panic!("the call ended before {what}; events: {others:#?}"),
        Err(_) => panic!("no {what} within {limit:?}; events: {others:#?}"),
    }
}

/// Reads frames until the call's counters satisfy `enough`; panics after `limit` with the counters.
pub(crate) async fn hears(
    call: &Call,
    events: &mut CallEvents,
    what: &str,
    limit: Duration,
    enough: impl Fn(&[TrackSummary]) -> bool,
) {
    let mut others = Vec::new();
    let waiting = async {
        while !enough(&call.tracks()) {
            match events.next().await {
                None => panic!("the call ended before {what}"),
                Some(CallEvent::Frame { .. }) => {}
                Some(event) => others.push(format!("{event:?}")),
            }
        }
    };
    if tokio::time::timeout(limit, waiting).await.is_err() {
        panic!("not {what} within {limit:?}: {:#?}; events: {others:#?}", call.tracks());
    }
}

/// Whether sound and picture of a user have been opened, `frames` of each at least.
pub(crate) fn sound_and_picture(tracks: &[TrackSummary], user: &UserId, frames: u64) -> bool {
    let opened = |audio: bool| {
        let of_them = tracks.iter().filter(|track| {
            track.from.member.user_id == user
                && track.from.track.codec.is_some_and(|codec| codec.is_audio() == audio)
        });
        of_them.map(|track| track.stats.opened).max().unwrap_or(0)
    };
    opened(true) >= frames && opened(false) >= frames
}
