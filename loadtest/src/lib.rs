//! Conferences by the hundred against any LiveKit SFU: participants that publish and receive synthetic frames,
//! each of which carries its own number and checksum, so that loss, damage and delay are seen exactly.
//!
//! Every participant is a real WebRTC client (the call SDK's LiveKit transport), so this measures the SFU and the
//! client together. One machine carries a few dozen of them; run several for more.
#![allow(clippy::disallowed_methods, reason = "a load tester is a shell: it owns the clock and the tasks")]

mod participant;
mod report;

use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use tokio::task::JoinSet;

use participant::{Participant, Role, SentAt};
pub use report::Report;

/// What to run.
#[derive(Clone, Debug)]
pub struct Plan {
    /// `ws:` or `wss:` URL of the SFU.
    pub url: String,
    /// API key that signs the participants' tokens.
    pub api_key: String,
    /// Its secret.
    pub api_secret: String,
    /// Room name; the SFU must allow rooms to be made on join, or the room must exist.
    pub room: String,
    /// Participants that publish; they receive as well.
    pub publishers: u32,
    /// Participants that only receive.
    pub subscribers: u32,
    /// Whether publishers send video as well as audio.
    pub video: bool,
    /// Bytes of one video frame; 30 are sent each second.
    pub video_frame: usize,
    /// How long the publishers send.
    pub duration: Duration,
    /// Participants that join per second.
    pub join_rate: f64,
}

/// Runs a plan and reports what came through.
///
/// # Errors
/// If no participant can join, or the plan is empty.
pub async fn run(plan: &Plan) -> Result<Report> {
    if plan.publishers == 0 {
        bail!("a load test needs at least one publisher; give --publishers 1 or more");
    }
    if !(plan.join_rate > 0.0 && plan.join_rate.is_finite()) {
        bail!("--join-rate must be more than 0");
    }
    let sent: SentAt = Arc::new(Mutex::default());
    let gap = Duration::from_secs_f64(1.0 / plan.join_rate);
    let start = Instant::now();
    let mut joining = JoinSet::new();
    for number in 0..plan.publishers + plan.subscribers {
        let role = if number < plan.publishers { Role::Publisher(number) } else { Role::Subscriber };
        let (plan, sent) = (plan.clone(), sent.clone());
        let at = start + gap * number;
        joining.spawn(async move {
            tokio::time::sleep_until(at.into()).await;
            Participant::join(&plan, number, role, sent).await
        });
    }
    let mut participants = Vec::new();
    let mut failures = Vec::new();
    while let Some(joined) = joining.join_next().await {
        match joined.context("a participant's task failed")? {
            Ok(participant) => participants.push(participant),
            Err(error) => failures.push(format!("{error:#}")),
        }
    }
    if participants.is_empty() {
        bail!("nobody could join {}: {}", plan.url, failures.join("; "));
    }
    tokio::time::sleep(plan.duration).await;
    let mut report = Report::new(plan, failures);
    for participant in participants {
        report.add(participant.leave().await);
    }
    Ok(report)
}
