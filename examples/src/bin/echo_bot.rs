//! Joins the call of a room and sends every member's sound back into the call.
#![allow(clippy::disallowed_methods, reason = "a program is a shell: it owns the clock and the tasks")]

use std::collections::HashMap;

use antiphon_call_sdk::{CallEvent, CallOptions, Codec, LocalTrack, TrackSid, TrackSpec};
use antiphon_examples::{Place, init};
use anyhow::Result;
use clap::Parser;

/// Joins the call of a Matrix room and sends back what it hears: one echo track per received track, until you press
/// Ctrl-C.
///
/// Shows how media goes through a program: frames come in decrypted, with the member that they are from, and go out
/// encrypted with our own key. Put a transcriber or a translator in between.
#[derive(Parser)]
#[command(version)]
struct Options {
    #[command(flatten)]
    place: Place,
}

#[tokio::main]
async fn main() -> Result<()> {
    init();
    let mut call = Options::parse().place.join_call(CallOptions::default()).await?;
    println!("listening");
    let mut echoes: HashMap<TrackSid, LocalTrack> = HashMap::new();
    while let Some(event) = call.next().await {
        match event {
            CallEvent::TrackPublished { member, track } if track.codec == Some(Codec::Opus) => {
                let spec = TrackSpec::microphone().with_name(format!("echo of {}", member.user_id));
                echoes.insert(track.sid, call.call.publish(spec).await?);
            }
            CallEvent::Frame { from, frame } => {
                // Only sound has an echo.
                if let Some(echo) = echoes.get(&from.track.sid) {
                    // A frame that cannot be sent is a moment of silence.
                    let _ = echo.write(&frame);
                }
            }
            // Dropping a track ends it.
            CallEvent::TrackEnded { sid, .. } => drop(echoes.remove(&sid)),
            _ => {}
        }
    }
    call.leave().await
}
