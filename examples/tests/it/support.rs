//! What the tests of this folder share.

use std::time::Duration;

use antiphon_call_sdk::{
    call::{Call, CallEvent, CallEvents, CallStats},
    media::Recording,
    membership::wire::STATE_TYPE,
};
use antiphon_examples::{Session, play};
use matrix_sdk::ruma::{
    OwnedRoomId,
    api::client::room::create_room,
    events::{AnyInitialStateEvent, room::power_levels::RoomPowerLevelsEventContent},
    serde::Raw,
};
use serde_json::json;
use tokio::{
    sync::{Mutex, MutexGuard},
    task::JoinHandle,
};

/// Media on two cores leaves no room for a second test beside it.
static ONE_AT_A_TIME: Mutex<()> = Mutex::const_new(());

/// Installs what every program of this workspace installs, and waits for this test's turn.
pub(crate) async fn turn() -> MutexGuard<'static, ()> {
    antiphon_examples::init();
    ONE_AT_A_TIME.lock().await
}

/// Makes an encrypted room that anybody may join and whose members may all join its call.
pub(crate) async fn create_call_room(creator: &Session) -> OwnedRoomId {
    let encryption = json!({ "type": "m.room.encryption", "state_key": "",
        "content": { "algorithm": "m.megolm.v1.aes-sha2" } });
    let levels = json!({ "events": { STATE_TYPE: 0 } }).to_string();
    let mut request = create_room::v3::Request::new();
    request.preset = Some(create_room::v3::RoomPreset::PublicChat);
    request.initial_state =
        vec![Raw::<AnyInitialStateEvent>::from_json_string(encryption.to_string()).unwrap()];
    request.power_level_content_override =
        Some(Raw::<RoomPowerLevelsEventContent>::from_json_string(levels).unwrap().cast_unchecked());
    creator.client.create_room(request).await.unwrap().room_id().to_owned()
}

/// Publishes a picture and a sound of the examples and keeps playing them.
pub(crate) async fn play_into(call: &Call, name: &str) -> Vec<JoinHandle<()>> {
    let media = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("media");
    let mut playing = Vec::new();
    for kind in ["ivf", "ogg"] {
        let recording = std::sync::Arc::new(Recording::open(media.join(format!("{name}.{kind}"))).unwrap());
        let track = call.publish(recording.track()).await.unwrap();
        playing.push(tokio::spawn(async move {
            // It ends with the call.
            let _ = play(&track, &recording).await;
        }));
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
    enough: impl Fn(&CallStats) -> bool,
) {
    let waiting = async {
        while !enough(&call.stats()) {
            assert!(events.next().await.is_some(), "the call ended before {what}");
        }
    };
    if tokio::time::timeout(limit, waiting).await.is_err() {
        panic!("not {what} within {limit:?}: {:#?}", call.stats());
    }
}

/// Whether sound and picture of somebody have been opened, `frames` of each at least.
pub(crate) fn sound_and_picture(stats: &CallStats, identity: &str, frames: u64) -> bool {
    let opened = |audio: bool| {
        let of_them = stats.tracks.iter().filter(|t| t.identity.0 == identity && t.codec.is_audio() == audio);
        of_them.map(|t| t.opened).max().unwrap_or(0)
    };
    opened(true) >= frames && opened(false) >= frames
}
