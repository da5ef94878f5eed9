//! One member leaves and keeps the others' keys.

use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::{
    call::{ENOUGH, watch},
    intruder::{Heard, Intruder, try_key},
    member::Member,
    stage::step,
    table::LiveTable,
    verdict::Verdict,
};

/// How long the others may take to change their keys after somebody left.
const ROTATION: Duration = Duration::from_secs(30);

/// Lets the last member leave; returns those who stay. The intruder records what they send then, and `overheard` is what
/// it received before; without them it is not tried what the kept keys open.
pub(crate) async fn one_leaves(
    verdict: &mut Verdict,
    table: &mut LiveTable,
    mut members: Vec<Member>,
    intruder: Option<&Intruder>,
    overheard: &Heard,
) -> Result<Vec<Member>> {
    let keys_before: Vec<_> = members.iter().map(|m| m.call.own_key_index()).collect();
    let leaver = members.pop().context("three members")?;
    let name = leaver.name;
    verdict.reports(&leaver);
    let kept = leaver.leave().await;
    step(&format!("{name} left and kept the others' keys"));
    let rotated = watch(table, &members, ROTATION, |members| {
        members.iter().zip(&keys_before).all(|(m, before)| m.call.own_key_index() != *before)
    })
    .await;
    let indices: Vec<_> = members.iter().filter_map(|m| m.call.own_key_index()).map(|i| i.0).collect();
    verdict.claim(rotated, format!("{name} left, the others changed their keys (now at index {indices:?})"));

    // Frames that were sealed just before the change may still be under way: they do not count.
    tokio::time::sleep(Duration::from_secs(1)).await;
    if let Some(intruder) = intruder {
        let (mut worked, mut tried, mut still) = (0, 0, 0);
        intruder.take();
        watch(table, &members, Duration::from_secs(3), |_| false).await;
        for (identity, frames) in &intruder.take() {
            for (_, key) in kept.iter().filter(|(sender, _)| identity.0.starts_with(&format!("{sender}:"))) {
                let earlier = overheard.get(identity).map(Vec::as_slice).unwrap_or_default();
                worked += try_key(earlier, key)?.1;
                let (frames, opened) = try_key(frames, key)?;
                tried += frames;
                still += opened;
            }
        }
        verdict
            .claim(worked > 0, format!("{name}'s kept keys are real: they open {worked} frames from before"));
        verdict.claim(
            tried > 0 && still == 0,
            format!("{name}'s kept keys open {still} of {tried} frames sent after the change"),
        );
    }
    let mut all = true;
    for member in &members {
        let heard = |m: &Member| m.seen(|s| s.identical.values().sum::<u64>());
        let enough = heard(member) + ENOUGH;
        all &= member.wait_until(Duration::from_secs(10), |m| heard(m) >= enough).await;
    }
    verdict.claim(all, "the two who stayed go on hearing each other under the new keys");
    Ok(members)
}
