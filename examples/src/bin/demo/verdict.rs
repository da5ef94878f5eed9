//! The call itself and what it proves.

use std::{collections::HashMap, fmt, sync::Arc, sync::PoisonError, time::Duration};

use antiphon_call_sdk::{MediaKey, TrackSummary};
use anyhow::{Context as _, Result};

use crate::{
    intruder::{Intruder, try_key},
    member::{Member, Scripts, cast},
    stage::{Stage, step},
    table::LiveTable,
};

/// How long the first frames may take to arrive everywhere.
const FIRST_FRAMES: Duration = Duration::from_secs(30);
/// How long the others may take to change their keys after somebody left.
const ROTATION: Duration = Duration::from_secs(30);
const REDRAW: Duration = Duration::from_millis(500);
/// Frames that each must receive from each before anything is concluded.
const ENOUGH: u64 = 50;

/// Claims, and whether each held.
#[derive(Debug, Default)]
pub(crate) struct Verdict {
    claims: Vec<(bool, String)>,
    remarks: Vec<String>,
}

impl Verdict {
    pub(crate) fn holds(&self) -> bool {
        self.claims.iter().all(|(held, _)| *held)
    }

    fn claim(&mut self, held: bool, text: impl Into<String>) {
        self.claims.push((held, text.into()));
    }

    /// Takes over what a member reports: failures as claims that did not hold, the rest as remarks.
    fn reports(&mut self, member: &Member) {
        let (failures, remarks) = member.seen(|seen| (seen.failures.clone(), seen.remarks.clone()));
        self.claims.extend(failures.into_iter().map(|text| (false, format!("{}: {text}", member.name))));
        self.remarks.extend(remarks.into_iter().map(|text| format!("{}: {text}", member.name)));
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "\nVerdict")?;
        for (held, text) in &self.claims {
            writeln!(f, "  {} {text}", if *held { "✓" } else { "✗" })?;
        }
        if !self.remarks.is_empty() {
            writeln!(f, "Remarks of the members")?;
        }
        for remark in &self.remarks {
            writeln!(f, "  · {remark}")?;
        }
        let summary = if self.holds() { "Every claim held." } else { "At least one claim did NOT hold." };
        writeln!(f, "{summary}")
    }
}

pub(crate) async fn hold_call(stage: &Stage, talk: Duration) -> Result<Verdict> {
    let mut verdict = Verdict::default();
    let cast = cast()?;
    let mut scripts = HashMap::new();
    for (part, session) in cast.iter().zip(&stage.members) {
        scripts.insert(session.client().user_id().context("not logged in")?.to_owned(), part.script());
    }
    let scripts: Scripts = Arc::new(scripts);

    let mut members = Vec::new();
    for (part, session) in cast.iter().zip(&stage.members) {
        members.push(Member::join(part, session, &stage.room_id, &stage.focus, &scripts).await?);
        step(&format!("{} joined the call", part.name));
    }
    let intruder = Intruder::enter(&stage.intruder, &stage.focus, &stage.room_id)
        .await
        .with_context(|| format!("the intruder of {} could not enter the SFU room", stage.homeserver_url))?;
    step("an intruder entered the SFU room with a valid token and no key\n");

    let mut table = LiveTable::new();
    let heard_all =
        watch(&mut table, &members, FIRST_FRAMES, |members| members.iter().all(|m| hears(m, 2))).await;
    watch(&mut table, &members, talk, |_| false).await;
    table.keep();

    verdict.claim(members.iter().all(|m| m.call.is_encrypted()), "the call is encrypted because the room is");
    verdict.claim(heard_all, "each of three members receives picture and sound of both others");
    let (identical, foreign) = members
        .iter()
        .fold((0, 0), |(i, f), m| m.seen(|s| (i + s.identical.values().sum::<u64>(), f + s.foreign)));
    verdict.claim(
        identical > 0 && foreign == 0,
        format!("{identical} frames decrypted, every one byte for byte as its sender's encoder wrote it"),
    );
    let refused: u64 = members.iter().flat_map(Member::tracks).map(|track| track.stats.refused).sum();
    verdict.claim(refused == 0, format!("{refused} frames failed to decrypt under a key that was there"));

    let before = intruder.take();
    let frames: usize = before.values().map(Vec::len).sum();
    let guess = MediaKey::new((0..16).map(|i| i * 17).collect())?;
    let mut opened = 0;
    for heard in before.values() {
        opened += try_key(heard, &guess)?.1;
    }
    verdict.claim(
        frames > 0 && opened == 0,
        format!("the intruder received {frames} frames and decrypted {opened}"),
    );

    // One leaves, and keeps the others' keys.
    let keys_before: Vec<_> = members.iter().map(|m| m.call.own_key_index()).collect();
    let leaver = members.pop().context("three members")?;
    let name = leaver.name;
    verdict.reports(&leaver);
    let kept = leaver.leave().await;
    step(&format!("{name} left and kept the others' keys"));
    let rotated = watch(&mut table, &members, ROTATION, |members| {
        members.iter().zip(&keys_before).all(|(m, before)| m.call.own_key_index() != *before)
    })
    .await;
    let indices: Vec<_> = members.iter().filter_map(|m| m.call.own_key_index()).map(|i| i.0).collect();
    verdict.claim(rotated, format!("{name} left, the others changed their keys (now at index {indices:?})"));

    let kept = kept.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let (mut worked, mut tried, mut still) = (0, 0, 0);
    // Frames that were sealed just before the change may still be under way: they do not count.
    tokio::time::sleep(Duration::from_secs(1)).await;
    intruder.take();
    watch(&mut table, &members, Duration::from_secs(3), |_| false).await;
    let after = intruder.take();
    for (identity, frames) in &after {
        for (_, key) in kept.iter().filter(|(sender, _)| identity.0.starts_with(&format!("{sender}:"))) {
            let earlier = before.get(identity).map(Vec::as_slice).unwrap_or_default();
            worked += try_key(earlier, key)?.1;
            let (frames, opened) = try_key(frames, key)?;
            tried += frames;
            still += opened;
        }
    }
    verdict.claim(worked > 0, format!("{name}'s kept keys are real: they open {worked} frames from before"));
    verdict.claim(
        tried > 0 && still == 0,
        format!("{name}'s kept keys open {still} of {tried} frames sent after the change"),
    );
    let mut all = true;
    for member in &members {
        let heard = |m: &Member| m.seen(|s| s.identical.values().sum::<u64>());
        let enough = heard(member) + ENOUGH;
        all &= member.wait_until(Duration::from_secs(10), |m| heard(m) >= enough).await;
    }
    verdict.claim(all, "the two who stayed go on hearing each other under the new keys");

    members.iter().for_each(|member| verdict.reports(member));
    intruder.leave().await;
    for member in members {
        member.leave().await;
    }
    Ok(verdict)
}

/// Whether a member has heard enough from each of `others`.
fn hears(member: &Member, others: usize) -> bool {
    let tracks = member.tracks();
    let audible = |audio: bool| {
        let is = |track: &&TrackSummary| {
            track.from.track.codec.is_some_and(|codec| codec.is_audio() == audio) && track.stats.opened > 0
        };
        tracks.iter().filter(is).count()
    };
    let enough = member.seen(|s| s.identical.values().filter(|n| **n >= ENOUGH).count());
    audible(true) >= others && audible(false) >= others && enough >= others
}

/// Keeps the table fresh until `enough`, at most for `limit`; returns whether it was enough.
async fn watch(
    table: &mut LiveTable,
    members: &[Member],
    limit: Duration,
    enough: impl Fn(&[Member]) -> bool,
) -> bool {
    let end = tokio::time::Instant::now() + limit;
    let mut redraw = tokio::time::interval(REDRAW);
    loop {
        redraw.tick().await;
        table.draw(members);
        if enough(members) {
            return true;
        }
        if tokio::time::Instant::now() >= end {
            return false;
        }
    }
}
