//! Joins the call of a room and sends every member's sound back into the call.
#![allow(clippy::disallowed_methods, reason = "a program is a shell: it owns the clock and the tasks")]

use std::collections::HashMap;

use antiphon_call_sdk::{
    call::{Call, CallEvent, CallOptions, LocalTrack},
    media::{Codec, TrackSpec},
    member::ParticipantIdentity,
};
use antiphon_examples::{Session, init};
use anyhow::Result;
use clap::Parser;
use matrix_sdk::ruma::OwnedRoomId;

/// Joins the call of a Matrix room and sends back what it hears: one track per member, until you press Ctrl-C.
#[derive(Parser)]
struct Options {
    /// Base URL of the homeserver.
    #[arg(long)]
    homeserver: String,
    /// User name.
    #[arg(long)]
    user: String,
    /// Password; better in the environment than on the command line.
    #[arg(long, env = "MATRIX_PASSWORD", hide_env_values = true)]
    password: String,
    /// Room id; the room is joined if we are invited or it is public.
    #[arg(long)]
    room: OwnedRoomId,
}

#[tokio::main]
async fn main() -> Result<()> {
    init();
    let options = Options::parse();
    let session = Session::log_in(&options.homeserver, &options.user, &options.password).await?;
    let room = session.enter(&options.room).await?;
    let (call, mut events) = Call::join(&room, CallOptions::default()).await?;
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
