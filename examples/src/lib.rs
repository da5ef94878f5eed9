//! What the examples share: logging in and joining a call ([`Place`], [`InCall`]), playing recordings ([`play`]), writing
//! received frames to files ([`TrackFile`]), and saying what goes wrong ([`trouble`]).
#![allow(clippy::disallowed_methods, reason = "a program is a shell: it owns the clock and the tasks")]
// matrix-sdk's sync future nests deeper than the compiler looks by itself.
#![recursion_limit = "256"]

use std::time::Duration;

use antiphon_call_sdk::{LocalTrack, Recording, Session, WriteError, frame_crypto::SealError};
use anyhow::{Context as _, Result};
use matrix_sdk::{
    Room, RoomState,
    ruma::{OwnedRoomId, RoomId, RoomOrAliasId},
};

mod in_call;
mod place;
mod track_file;
mod trouble;

pub use in_call::InCall;
pub use place::Place;
pub use track_file::TrackFile;
pub use trouble::trouble;

/// How long the homeserver may take to show a room that we have joined.
const ROOM_SHOWN: Duration = Duration::from_secs(30);

/// Sets logging up: warnings of Antiphon to standard error, or what `RUST_LOG` says.
pub fn init() {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| {
        let quiet = ["matrix_sdk", "matrix_sdk_crypto", "rtc", "rtc_ice", "rtc_dtls", "rtc_sctp", "webrtc"];
        let quiet = quiet.map(|target| format!(",{target}=off")).concat();
        tracing_subscriber::EnvFilter::new(format!("warn{quiet}"))
    });
    // Err means that a subscriber is installed, for instance by a test.
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).try_init();
}

/// Joins a room, if the user has not already, and waits until the sync shows it.
///
/// # Errors
/// If the homeserver refuses, or does not show the room within 30 s.
pub async fn enter(session: &Session, room: &RoomOrAliasId) -> Result<Room> {
    let client = session.client();
    let known = <&RoomId>::try_from(room).ok().and_then(|id| client.get_room(id));
    let id = match known.filter(|room| room.state() == RoomState::Joined) {
        Some(room) => room.room_id().to_owned(),
        None => {
            let joined = client.join_room_by_id_or_alias(room, &[]).await;
            joined.with_context(|| format!("cannot join {room}"))?.room_id().to_owned()
        }
    };
    shown(session, id).await
}

/// Waits until the sync shows a joined room with its state.
async fn shown(session: &Session, id: OwnedRoomId) -> Result<Room> {
    let mut changes = session.client().subscribe_to_all_room_updates();
    let shown = async {
        loop {
            if let Some(room) = session.client().get_room(&id)
                && room.state() == RoomState::Joined
                && room.create_content().is_some()
            {
                return room;
            }
            // Lagging only means that something changed, so look again.
            let _ = changes.recv().await;
        }
    };
    let room = tokio::time::timeout(ROOM_SHOWN, shown).await;
    room.with_context(|| format!("the homeserver did not show {id} within 30 s"))
}

/// Plays a recording into a track, over and over, each frame when its time has come. Never ends by itself: abort the
/// task, or drop the future, to end the track.
///
/// # Errors
/// If the track cannot carry the recording's codec.
pub async fn play(track: &LocalTrack, recording: &Recording) -> Result<(), WriteError> {
    play_layers(track, std::slice::from_ref(recording)).await
}

/// Plays one recording per simulcast layer of a track, smallest first, over and over.
///
/// # Errors
/// As [`play`], and if the track was published with fewer layers.
pub async fn play_layers(track: &LocalTrack, layers: &[Recording]) -> Result<(), WriteError> {
    let start = tokio::time::Instant::now();
    // Of each layer the next frame and those after it.
    let mut layers: Vec<_> = (0..)
        .zip(layers)
        .filter_map(|(layer, recording)| {
            let mut frames = recording.looped();
            Some((layer, frames.next()?, frames))
        })
        .collect();
    while let Some((layer, next, frames)) = layers.iter_mut().min_by_key(|(_, next, _)| next.timestamp) {
        let Some(after) = frames.next() else { break };
        let (layer, frame) = (*layer, std::mem::replace(next, after));
        tokio::time::sleep_until(start + frame.timestamp).await;
        match track.write_layer(layer, &frame) {
            // The first moment of a call: our key does not exist yet, so there is nothing to send.
            Ok(()) | Err(WriteError::Seal(SealError::MissingKey(_))) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
