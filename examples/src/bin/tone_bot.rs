//! Push-to-talk by data message.
#![allow(clippy::disallowed_methods, reason = "a program is a shell: it owns the clock and the tasks")]

use std::{f64::consts::TAU, time::Duration};

use antiphon_call_sdk::{CallEvent, CallOptions, FRAME_SAMPLES, PcmTrack, SAMPLE_RATE, TrackSpec};
use antiphon_examples::{Place, init};
use anyhow::Result;
use clap::Parser;
use tokio::time::{Instant, interval};

const FRAME: Duration = Duration::from_millis(20);

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
    let mut call = options.place.join_call(CallOptions::default()).await?;
    let mut spec = TrackSpec::microphone();
    spec.muted = true;
    let mut microphone = PcmTrack::new(call.call.publish(spec).await?)?;
    println!("waiting for data messages with the topic talk");
    let (mut frames, mut number) = (interval(FRAME), 0);
    let mut talk_until = None;
    loop {
        tokio::select! {
            event = call.next() => match event {
                Some(CallEvent::Data { member, message, .. }) if message.topic.as_deref() == Some("talk") => {
                    let wanted = std::str::from_utf8(&message.payload).ok().and_then(|text| text.trim().parse().ok());
                    let seconds = wanted.unwrap_or(3).min(options.longest);
                    println!("{} asks for {seconds} s", member.user_id);
                    talk_until = Some(Instant::now() + Duration::from_secs(seconds));
                    microphone.track().set_muted(false);
                }
                Some(_) => {}
                None => break,
            },
            _ = frames.tick() => {
                number += 1;
                match talk_until {
                    Some(until) if Instant::now() < until => microphone.write(&tone(number))?,
                    // Media time goes on while nobody speaks, as RTP wants it.
                    Some(_) => {
                        talk_until = None;
                        microphone.track().set_muted(true);
                        microphone.skip(FRAME);
                    }
                    None => microphone.skip(FRAME),
                }
            }
        }
    }
    call.leave().await
}

/// The `number`th 20 ms of a tone of 262 Hz. Another program would read a microphone here.
fn tone(number: usize) -> Vec<i16> {
    let sample = |n| (n as f64 * 262.0 * TAU / f64::from(SAMPLE_RATE)).sin() * 8_000.0;
    (number * FRAME_SAMPLES..).take(FRAME_SAMPLES).map(|n| sample(n) as i16).collect()
}
