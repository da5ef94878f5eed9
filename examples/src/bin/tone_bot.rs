//! Push-to-talk by data message.
#![allow(clippy::disallowed_methods, reason = "a program is a shell: it owns the clock and the tasks")]

use std::time::Duration;

use antiphon_call_sdk::{CallEvent, CallOptions, Recording};
use antiphon_examples::{Place, init};
use anyhow::Result;
use clap::Parser;
use tokio::time::{Instant, sleep_until};

/// A tone of 262 Hz. An application with an Opus encoder writes its frames the same way.
const TONE: &[u8] = include_bytes!("../../media/alice.ogg");

/// Joins the call of a Matrix room muted, and sounds a tone when a member sends a data message with the topic `talk`.
///
/// The text of the message is how long to sound, in seconds (3 if it is empty). Data messages are encrypted like media;
/// `probe --send talk=5` sends one. Shows push-to-talk: the track stays published, so that the first word is not lost,
/// and is muted between the words, so that everybody sees that nobody speaks.
#[derive(Parser)]
#[command(version)]
struct Options {
    #[command(flatten)]
    place: Place,
    /// Longest tone, in seconds.
    #[arg(long, default_value_t = 10)]
    longest: u64,
}

#[tokio::main]
async fn main() -> Result<()> {
    init();
    let options = Options::parse();
    let tone = Recording::read(std::io::Cursor::new(TONE))?;
    let mut call = options.place.join_call(CallOptions::default()).await?;
    let mut spec = tone.track();
    spec.muted = true;
    let track = call.call.publish(spec).await?;
    println!("waiting for data messages with the topic talk");
    let (start, mut frames) = (Instant::now(), tone.looped().peekable());
    let mut talk_until = None;
    loop {
        // Media time goes on while the track is muted, as RTP wants it.
        let due = start + frames.peek().map(|frame| frame.timestamp).unwrap_or_default();
        tokio::select! {
            event = call.next() => match event {
                Some(CallEvent::Data { member, message, .. }) if message.topic.as_deref() == Some("talk") => {
                    let wanted = std::str::from_utf8(&message.payload).ok().and_then(|text| text.trim().parse().ok());
                    let seconds = wanted.unwrap_or(3).min(options.longest);
                    println!("{} asks for {seconds} s", member.user_id);
                    talk_until = Some(Instant::now() + Duration::from_secs(seconds));
                    track.set_muted(false);
                }
                Some(_) => {}
                None => break,
            },
            () = sleep_until(due) => {
                if let Some(frame) = frames.next() {
                    // While the track is muted, and before our first key exists, nothing is sent.
                    let _ = track.write(&frame);
                }
                if talk_until.is_some_and(|until| Instant::now() >= until) {
                    talk_until = None;
                    track.set_muted(true);
                }
            }
        }
    }
    call.leave().await
}
