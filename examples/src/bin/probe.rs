//! Joins a call for a while and says how well it works.
#![allow(clippy::disallowed_methods, reason = "a program is a shell: it owns the clock and the tasks")]

use std::{process::ExitCode, time::Duration};

use antiphon_call_sdk::{CallError, CallEvent, CallOptions, Member, Reliability, TrackSummary, UserData};
use antiphon_examples::{Place, init};
use anyhow::Result;
use clap::Parser;
use comfy_table::{Table, presets::UTF8_FULL_CONDENSED};

/// Joins the call of a Matrix room, receives for some seconds, and says how well it works.
///
/// Standard error gets a table: for every track of every member the bitrate, the share of frames that did not decrypt,
/// and the time from joining to the first frame. Standard output gets a report as JSON that names no user, device or
/// key, made for pasting into a bug report. The quality of a connection is the SFU's judgement.
///
/// Exit status: 0 if media of every other member was decrypted, 1 if not or if nobody else is there, 2 for wrong usage.
#[derive(Parser)]
#[command(version)]
struct Options {
    #[command(flatten)]
    place: Place,
    /// How long to receive, in seconds.
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    /// Members that publish nothing do not count as failures.
    #[arg(long)]
    allow_silent: bool,
    /// Send everybody a data message after joining, for instance `talk=5` to the tone bot.
    #[arg(long, value_name = "TOPIC=TEXT")]
    send: Option<String>,
}

#[tokio::main]
async fn main() -> Result<ExitCode> {
    init();
    let options = Options::parse();
    let mut call = match options.place.join_call(CallOptions::default()).await {
        Ok(call) => call,
        Err(error) => {
            if let Some(report) = error.downcast_ref::<CallError>().and_then(CallError::report) {
                println!("{}", report.to_json());
            }
            return Err(error);
        }
    };
    if let Some(send) = &options.send {
        let (topic, text) = send.split_once('=').unwrap_or((send, ""));
        let message = UserData { payload: text.into(), topic: Some(topic.to_owned()) };
        call.call.send_data(Reliability::Reliable, &[], message).await?;
    }
    let end = tokio::time::Instant::now() + Duration::from_secs(options.seconds);
    while let Ok(Some(event)) = tokio::time::timeout_at(end, call.next()).await {
        if let CallEvent::Quality { member, quality } = event {
            let of = member.map_or_else(|| "ours".to_owned(), |member| member.user_id.to_string());
            eprintln!("connection quality of {of}: {quality:?}");
        }
    }
    let (members, tracks) = (call.call.members(), call.call.tracks());
    eprintln!("{}", table(&tracks));
    let failed: Vec<_> =
        members.iter().filter(|member| !is_received(member, &tracks, options.allow_silent)).collect();
    for member in &failed {
        eprintln!("no media of {} ({}) was decrypted", member.user_id, member.member_id.0);
    }
    if members.is_empty() {
        eprintln!("nobody else is in the call");
    }
    println!("{}", call.call.report().await?.to_json());
    call.leave().await?;
    Ok(if failed.is_empty() && !members.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Whether every unmuted track of a member was decrypted, and there is one.
fn is_received(member: &Member, tracks: &[TrackSummary], allow_silent: bool) -> bool {
    let mut tracks = tracks.iter().filter(|track| track.from.member.key() == member.key()).peekable();
    if tracks.peek().is_none() {
        return allow_silent;
    }
    let opened = |track: &TrackSummary| track.stats.opened > 0;
    let mut sounding = tracks.filter(|track| !track.from.track.muted || opened(track)).peekable();
    if sounding.peek().is_none() { allow_silent } else { sounding.all(opened) }
}

fn table(tracks: &[TrackSummary]) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED);
    table.set_header(["member", "track", "kbit/s", "frames", "not decrypted", "dropped here", "first frame"]);
    for TrackSummary { from, stats, .. } in tracks {
        let seconds =
            stats.last_received.unwrap_or_default().saturating_sub(stats.first_opened.unwrap_or_default());
        let rate = stats.bytes as f64 * 0.008 / seconds.as_secs_f64().max(0.001);
        let failed = stats.missing_key + stats.refused;
        let percent = failed as f64 * 100.0 / stats.received.max(1) as f64;
        let first =
            stats.first_opened.map_or_else(|| "–".to_owned(), |time| format!("{} ms", time.as_millis()));
        table.add_row([
            from.member.user_id.to_string(),
            format!("{:?} {}", from.track.source, if from.track.muted { "(muted)" } else { "" }),
            format!("{rate:.0}"),
            stats.received.to_string(),
            format!("{failed} ({percent:.1} %)"),
            stats.dropped.to_string(),
            first,
        ]);
    }
    table
}
