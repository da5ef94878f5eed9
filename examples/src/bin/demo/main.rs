//! One command, one encrypted group call: three members, real media, the proof that nobody else hears it, and what
//! becomes of it without its SFU.
#![allow(clippy::disallowed_methods, reason = "a program is a shell: it owns the clock and the tasks")]

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;

mod call;
mod departure;
mod intruder;
mod member;
mod metronome;
mod moves;
mod own_focus;
mod stage;
mod table;
mod tap;
mod verdict;
mod voices;

use antiphon_examples::init;

/// Shows an end-to-end encrypted group call between three Matrix users, and proves the encryption.
///
/// Without options everything runs in this process, on loopback: a development homeserver, a focus (the SFU) with its
/// authorisation service, and three members that play short VP8 and Opus recordings to each other. A fourth user
/// with a valid SFU token, but without a key, listens in and must decrypt nothing. Then the focus is stopped in the
/// middle of the call: the members go on directly, each with each, and move back when it is started again. At last
/// one member leaves, and the others change their keys.
///
/// With --no-focus there is no SFU at all: the whole call is a mesh. Nobody can listen in on an SFU then, so the
/// intruder is left out.
///
/// With --homeserver the call is held on a running homeserver (its users are registered for the occasion, so open
/// registration is needed, or --account options). The focus still runs in this process unless --service-url names
/// another; that one is not stopped during the call.
///
/// Exit status: 0 if every claim of the verdict held, 1 if one did not, 2 for wrong usage.
#[derive(Clone, Debug, Parser)]
#[command(name = "demo", version)]
struct Options {
    /// Hold the call on this homeserver, for instance http://localhost:8008.
    #[arg(long, value_name = "URL")]
    homeserver: Option<String>,
    /// An existing user, as USER:PASSWORD; give four (three members and the intruder; three with --no-focus) or none.
    #[arg(long, value_name = "USER:PASSWORD", requires = "homeserver")]
    account: Vec<String>,
    /// Use the focus behind this authorisation service instead of one in this process.
    #[arg(long, value_name = "URL")]
    service_url: Option<String>,
    /// Hold the whole call without a focus: media travels directly from member to member.
    #[arg(long, conflicts_with = "service_url")]
    no_focus: bool,
    /// How long the members talk before anything happens, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 6)]
    talk: u64,
}

#[tokio::main]
async fn main() -> ExitCode {
    init();
    match run(Options::parse()).await {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("the demo could not be held: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(options: Options) -> Result<bool> {
    let mut stage = stage::Stage::set(&options).await?;
    let verdict = call::hold_call(&mut stage, std::time::Duration::from_secs(options.talk)).await;
    stage.strike().await;
    let verdict = verdict?;
    print!("{verdict}");
    Ok(verdict.holds())
}
