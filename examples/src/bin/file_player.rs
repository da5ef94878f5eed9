//! Plays a VP8 file and an Opus file into the call of a room, until it is interrupted.
#![allow(clippy::disallowed_methods, reason = "a program is a shell: it owns the clock and the tasks")]

use std::{path::PathBuf, sync::Arc};

use antiphon_call_sdk::{call::CallEvent, media::Recording};
use antiphon_examples::{Place, init, play};
use anyhow::Result;
use clap::Parser;

/// Plays a VP8 file (.ivf) and an Opus file (.ogg) into the call of a Matrix room, until you press Ctrl-C.
///
/// Example: `file_player --homeserver https://matrix.example --user bot --room '!abc:example'
/// examples/media/alice.ivf examples/media/alice.ogg` with the password in MATRIX_PASSWORD.
#[derive(Parser)]
struct Options {
    #[command(flatten)]
    place: Place,
    /// Recordings to play, each as a track of its own.
    #[arg(required = true)]
    files: Vec<PathBuf>,
}

#[tokio::main]
async fn main() -> Result<()> {
    init();
    let options = Options::parse();
    let recordings: Vec<_> = options.files.iter().map(Recording::open).collect::<Result<_, _>>()?;
    let (_session, call, mut events) = options.place.join_call().await?;
    println!("joined as {}, encrypted: {}", call.identity(), call.is_encrypted());
    for recording in recordings.into_iter().map(Arc::new) {
        let track = call.publish(recording.track()).await?;
        tokio::spawn(async move { play(&track, &recording).await });
    }
    loop {
        tokio::select! {
            _ = tokio::signal::ctrl_c() => break,
            event = events.next() => match event {
                Some(CallEvent::MemberJoined(member)) => println!("{} is here", member.user_id),
                Some(CallEvent::MemberLeft(member)) => println!("{} left", member.user_id),
                Some(CallEvent::Ended { reason }) => anyhow::bail!("the call ended: {reason}"),
                Some(_) => {}
                None => break,
            },
        }
    }
    call.leave().await;
    Ok(())
}
