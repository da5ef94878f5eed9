//! Plays recordings into the call of a room.
#![allow(clippy::disallowed_methods, reason = "a program is a shell: it owns the clock and the tasks")]

use std::path::Path;

use antiphon_call_sdk::{CallEvent, CallOptions, Recording, TrackSpec, VideoLayer};
use antiphon_examples::{Place, init, play_layers};
use anyhow::{Context as _, Result};
use clap::Parser;

/// Plays recordings into the call of a Matrix room, over and over, until you press Ctrl-C.
///
/// Each argument becomes a track: an Ogg file with Opus a microphone, an IVF file with VP8 a camera. Several IVF files
/// joined by commas, smallest picture first, become one camera with simulcast: the SFU gives each receiver the largest
/// layer that its screen and its network bear.
///
/// Example: `MATRIX_PASSWORD=… file_player --homeserver example.org --user bot --room '#team:example.org'
/// low.ivf,high.ivf hello.ogg`. Make such files with
/// `ffmpeg -i film.mp4 -an -c:v libvpx -g 30 -s 320x180 low.ivf` and
/// `ffmpeg -i film.mp4 -vn -c:a libopus -frame_duration 20 hello.ogg`.
#[derive(Parser)]
#[command(version)]
struct Options {
    #[command(flatten)]
    place: Place,
    /// Recordings, each a track of its own; layers of one track are joined by commas.
    #[arg(required = true)]
    files: Vec<String>,
}

#[tokio::main]
async fn main() -> Result<()> {
    init();
    let options = Options::parse();
    let tracks: Vec<_> = options.files.iter().map(|files| open(files)).collect::<Result<_>>()?;
    let mut call = options.place.join_call(CallOptions::default()).await?;
    println!("joined; the call is {}", if call.call.is_encrypted() { "encrypted" } else { "NOT encrypted" });
    for (spec, layers) in tracks {
        let track = call.call.publish(spec).await?;
        // The task keeps the track; dropping a track ends it.
        tokio::spawn(async move { play_layers(&track, &layers).await });
    }
    while let Some(event) = call.next().await {
        match event {
            CallEvent::MemberJoined(member) => println!("{} is here", member.user_id),
            CallEvent::MemberLeft(member) => println!("{} left", member.user_id),
            _ => {}
        }
    }
    call.leave().await
}

/// The recordings of one track, and its description.
fn open(files: &str) -> Result<(TrackSpec, Vec<Recording>)> {
    let open = |file: &str| Recording::open(Path::new(file)).with_context(|| file.to_owned());
    let recordings: Vec<_> = files.split(',').map(open).collect::<Result<_>>()?;
    let first = recordings.first().context("no file")?;
    let layers = recordings.iter().flat_map(layer).collect();
    Ok((first.track().with_layers(layers), recordings))
}

/// What a recording is as a layer: its size, and the bitrate and frame rate that it has; `None` for sound.
fn layer(recording: &Recording) -> Option<VideoLayer> {
    let layer = *recording.track().layers.first()?;
    let seconds = recording.duration().as_secs_f64().max(0.001);
    let bits: u64 = recording.frames().iter().map(|frame| 8 * frame.payload.len() as u64).sum();
    Some(VideoLayer {
        bitrate: (bits as f64 / seconds) as u64,
        fps: (recording.frames().len() as f64 / seconds).round(),
        ..layer
    })
}
