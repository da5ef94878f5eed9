//! What the examples share: logging in and joining a call ([`Place`], [`InCall`]), playing recordings ([`play`]), writing
//! received frames to files ([`TrackFile`]), and saying what goes wrong ([`trouble`]).
#![allow(clippy::disallowed_methods, reason = "a program is a shell: it owns the clock and the tasks")]

use antiphon_call_sdk::{LocalTrack, Recording, WriteError};

mod in_call;
mod place;
mod track_file;
mod trouble;

pub use in_call::InCall;
pub use place::Place;
pub use track_file::TrackFile;
pub use trouble::trouble;

/// Sets logging up: warnings of Antiphon to standard error, or what `RUST_LOG` says.
pub fn init() {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| {
        let quiet = [
            "matrix_sdk",
            "matrix_sdk_crypto",
            "livekit_signaling",
            "rtc",
            "rtc_ice",
            "rtc_dtls",
            "rtc_sctp",
            "webrtc",
        ];
        let quiet = quiet.map(|target| format!(",{target}=off")).concat();
        tracing_subscriber::EnvFilter::new(format!("warn{quiet}"))
    });
    // Err means that a subscriber is installed, for instance by a test.
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).try_init();
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
            Ok(()) => {}
            Err(error) if error.is_before_our_key() => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
