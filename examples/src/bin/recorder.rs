//! Records the call of a room: a file per track.
#![allow(clippy::disallowed_methods, reason = "a program is a shell: it owns the clock and the tasks")]

use std::{collections::HashMap, path::PathBuf, time::Instant};

use antiphon_call_sdk::{CallEvent, CallOptions, IncomingTrack, MemberKey, TrackSid};
use antiphon_examples::{Place, TrackFile, init};
use anyhow::{Context as _, Result};
use clap::Parser;

/// Records the call of a Matrix room until you press Ctrl-C: one file per sender and track, Ogg for Opus, IVF for VP8.
///
/// The recorder is a member like any other: everybody in the call sees it, and clients that trust its device send it
/// their media keys, because it is a member of the call. Tell people that they are recorded. All files start at the
/// same instant, so that they play in step; `ffmpeg -i alice-….ogg -i alice-….ivf -c copy alice.mkv` joins sound and
/// picture of a sender.
#[derive(Parser)]
#[command(version)]
struct Options {
    #[command(flatten)]
    place: Place,
    /// Folder for the files; it is made if it is missing. Existing files are never overwritten.
    #[arg(long, value_name = "DIR", default_value = "recordings")]
    to: PathBuf,
}

#[tokio::main]
async fn main() -> Result<()> {
    init();
    let Options { place, to } = Options::parse();
    std::fs::create_dir_all(&to).with_context(|| format!("cannot make {}", to.display()))?;
    let mut call = place.join_call(CallOptions::default()).await?;
    let begin = Instant::now();
    println!("recording to {}", to.display());
    let mut files: HashMap<TrackSid, Option<TrackFile>> = HashMap::new();
    // The media time of a member counts from its first frame: this is when that was.
    let mut starts = HashMap::<MemberKey, _>::new();
    while let Some(event) = call.next().await {
        match event {
            CallEvent::TrackPublished { member, track } => {
                // A recording can only start at a key frame.
                call.call.request_key_frame(&member, &track.sid).await?;
            }
            CallEvent::Frame { from, frame } => {
                let elapsed = begin.elapsed();
                let start = *starts
                    .entry(from.member.key())
                    .or_insert_with(|| elapsed.saturating_sub(frame.timestamp));
                let file = files.entry(from.track.sid.clone()).or_insert_with(|| create(&to, &from, begin));
                if let Some(file) = file {
                    file.write(start + frame.timestamp, &frame.payload)
                        .context("cannot write a recording")?;
                }
            }
            CallEvent::TrackEnded { sid, .. } => {
                if let Some(file) = files.remove(&sid).flatten() {
                    file.finish()?;
                }
            }
            _ => {}
        }
    }
    for file in files.into_values().flatten() {
        file.finish()?;
    }
    call.leave().await
}

/// The file for a track; `None`, with a message, if it cannot be recorded.
fn create(to: &std::path::Path, from: &IncomingTrack, begin: Instant) -> Option<TrackFile> {
    let user = &from.member.user_id;
    let Some((codec, extension)) =
        from.track.codec.and_then(|codec| Some((codec, TrackFile::extension(codec)?)))
    else {
        eprintln!("a track of {user} is not recorded: only Opus and VP8 can be");
        return None;
    };
    // A user name may hold anything; a file name may not.
    let name: String = format!("{}-{:?}-{}", user.localpart(), from.track.source, from.track.sid.0)
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '_' })
        .collect();
    let path = to.join(format!("{name}.{extension}"));
    match TrackFile::create(&path, codec, begin) {
        Ok(file) => {
            println!("{user}: {}", path.display());
            Some(file)
        }
        Err(error) => {
            eprintln!("a track of {user} is not recorded: {}: {error}", path.display());
            None
        }
    }
}
