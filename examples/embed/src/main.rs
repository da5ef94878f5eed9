//! Joins the call of a room and sends every member's sound back into it, until you press Ctrl-C.
use std::{collections::HashMap, env, pin::pin};

use antiphon_call_sdk::{CallEvent, CallOptions, Codec, Session, SessionOptions, TrackSpec};
use anyhow::{Context, Result};

fn setting(name: &str) -> Result<String> {
    env::var(name).with_context(|| format!("set {name} in the environment"))
}

#[tokio::main]
async fn main() -> Result<()> {
    let (user, password) = (setting("MATRIX_USER")?, setting("MATRIX_PASSWORD")?);
    // The folder keeps the device: the next start is the same device, with the same keys.
    let options =
        SessionOptions::new(setting("MATRIX_HOMESERVER")?.parse()?, user, password, setting("BOT_FOLDER")?);
    let session = Session::log_in_or_restore(options).await?;
    let room = session.enter_room(setting("MATRIX_ROOM")?.as_str().try_into()?).await?;
    let (call, mut events) = session.join_call(room.room_id(), CallOptions::default()).await?;
    println!("in the call: {session:?}");

    let mut echoes = HashMap::new();
    let mut stop = pin!(tokio::signal::ctrl_c());
    while let Some(event) = tokio::select! { event = events.next() => event, _ = &mut stop => None } {
        match event {
            CallEvent::TrackPublished { member, track } if track.codec == Some(Codec::Opus) => {
                println!("hearing {}", member.user_id);
                let spec = TrackSpec::microphone().with_name(format!("echo of {}", member.user_id));
                echoes.insert(track.sid, call.publish(spec).await?);
            }
            CallEvent::Frame { from, frame } => {
                if let Some(echo) = echoes.get(&from.track.sid) {
                    // Fails in the first moments of a call, before our key exists: a moment of silence.
                    let _ = echo.write(&frame);
                }
            }
            // Dropping a track ends it.
            CallEvent::TrackEnded { sid, .. } => drop(echoes.remove(&sid)),
            CallEvent::PeerRefused { device, failure } => println!("{device} is refused: {failure}"),
            CallEvent::Ended(reason) => println!("the call ended: {reason}"),
            _ => {}
        }
    }
    call.leave().await;
    Ok(())
}
