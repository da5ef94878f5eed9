//! Joins the call of a room and sends every member's sound back into the call.
#![allow(clippy::disallowed_methods, reason = "a program is a shell: it owns the clock and the tasks")]

use std::collections::HashMap;

use antiphon_call_sdk::{
    call::{CallEvent, LocalTrack},
    media::{Codec, TrackSpec},
    member::ParticipantIdentity,
};
use antiphon_examples::{Place, init};
use anyhow::Result;
use clap::Parser;

/// Joins the call of a Matrix room and sends back what it hears: one track per member, until you press Ctrl-C.
#[derive(Parser)]
struct Options {
    #[command(flatten)]
    place: Place,
}

#[tokio::main]
async fn main() -> Result<()> {
    init();
    let options = Options::parse();
    let (_session, call, mut events) = options.place.join_call().await?;
    println!("listening as {}", call.identity());
    let mut echoes: HashMap<ParticipantIdentity, LocalTrack> = HashMap::new();
    loop {
        let event = tokio::select! {
            _ = tokio::signal::ctrl_c() => break,
            event = events.next() => event,
        };
        match event {
            Some(CallEvent::Frame { member, track, frame }) if track.codec == Some(Codec::Opus) => {
                if !echoes.contains_key(&member.identity) {
                    let spec =
                        TrackSpec { name: format!("echo of {}", member.user_id), ..TrackSpec::microphone() };
                    echoes.insert(member.identity.clone(), call.publish(spec).await?);
                }
                // A frame that cannot be sent is a moment of silence.
                let _ = echoes[&member.identity].write(frame).await;
            }
            Some(CallEvent::MemberLeft(member)) => {
                if let Some(echo) = echoes.remove(&member.identity) {
                    echo.unpublish().await;
                }
            }
            Some(_) => {}
            None => break,
        }
    }
    call.leave().await;
    Ok(())
}
