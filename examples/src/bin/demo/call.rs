//! The call from the first member's joining to the last one's leaving.

use std::{collections::HashMap, sync::Arc, time::Duration};

use antiphon_call_sdk::{MediaKey, TrackSummary};
use anyhow::{Context as _, Result};

use crate::{
    departure,
    intruder::{Heard, Intruder, try_key},
    member::{Member, Scripts, cast},
    moves,
    stage::{Route, Stage, step},
    table::LiveTable,
    verdict::Verdict,
};

/// How long the first frames may take to arrive everywhere.
const FIRST_FRAMES: Duration = Duration::from_secs(30);
const REDRAW: Duration = Duration::from_millis(500);
/// Frames that each must receive from each before anything is concluded.
pub(crate) const ENOUGH: u64 = 50;

pub(crate) async fn hold_call(stage: &mut Stage, talk: Duration) -> Result<Verdict> {
    let (mut verdict, mut table) = (Verdict::default(), LiveTable::new());
    let members = join(stage).await?;
    let intruder = intrude(stage).await?;
    talk_together(&mut verdict, &mut table, &members, talk).await;
    if let Route::Mesh = stage.route {
        claim_mesh(&mut verdict, &members);
    }
    let overheard = match &intruder {
        Some(intruder) => {
            let overheard = intruder.take();
            claim_overheard(&mut verdict, &overheard)?;
            overheard
        }
        None => Heard::default(),
    };

    let intruder = match (&mut stage.own_focus, intruder) {
        (Some(focus), Some(cut_off)) => {
            let is_back = moves::without_focus(&mut verdict, &mut table, &members, focus, cut_off).await?;
            if !is_back {
                // The rest of the call would prove nothing.
                members.iter().for_each(|member| verdict.reports(member));
                return Ok(verdict);
            }
            intrude(stage).await?
        }
        (_, intruder) => {
            if intruder.is_some() {
                step("the focus is not this demo's, so it is not stopped during the call");
            }
            intruder
        }
    };

    let members =
        departure::one_leaves(&mut verdict, &mut table, members, intruder.as_ref(), &overheard).await?;
    members.iter().for_each(|member| verdict.reports(member));
    if let Some(intruder) = intruder {
        intruder.leave().await;
    }
    for member in members {
        member.leave().await;
    }
    Ok(verdict)
}

async fn join(stage: &Stage) -> Result<Vec<Member>> {
    let cast = cast()?;
    let mut scripts = HashMap::new();
    for (part, session) in cast.iter().zip(&stage.members) {
        scripts.insert(session.client().user_id().context("not logged in")?.to_owned(), part.script());
    }
    let scripts: Scripts = Arc::new(scripts);
    let mut members = Vec::new();
    for (part, session) in cast.iter().zip(&stage.members) {
        members.push(Member::join(part, session, &stage.room_id, &stage.route, &scripts).await?);
        step(&format!("{} joined the call", part.name));
    }
    Ok(members)
}

/// The intruder enters; `None` without a focus.
async fn intrude(stage: &Stage) -> Result<Option<Intruder>> {
    let (Some(session), Some(focus)) = (&stage.intruder, stage.route.focus()) else { return Ok(None) };
    let intruder = Intruder::enter(session, focus, &stage.room_id)
        .await
        .with_context(|| format!("the intruder of {} could not enter the SFU room", stage.homeserver_url))?;
    step("an intruder entered the SFU room with a valid token and no key");
    Ok(Some(intruder))
}

async fn talk_together(verdict: &mut Verdict, table: &mut LiveTable, members: &[Member], talk: Duration) {
    let heard_all =
        watch(table, members, FIRST_FRAMES, |members| members.iter().all(|m| hears(m, members.len() - 1)))
            .await;
    watch(table, members, talk, |_| false).await;
    table.keep();

    verdict.claim(members.iter().all(|m| m.call.is_encrypted()), "the call is encrypted because the room is");
    verdict.claim(heard_all, "each of three members receives picture and sound of both others");
    let (identical, foreign) = frames(members);
    verdict.claim(
        identical > 0 && foreign == 0,
        format!("{identical} frames decrypted, every one byte for byte as its sender's encoder wrote it"),
    );
    let refused: u64 = members.iter().flat_map(Member::tracks).map(|track| track.stats.refused).sum();
    verdict.claim(refused == 0, format!("{refused} frames failed to decrypt under a key that was there"));
}

fn claim_mesh(verdict: &mut Verdict, members: &[Member]) {
    let others = members.len() - 1;
    let direct = members.iter().all(|m| m.seen(|s| s.meshes && s.direct.len() == others) && !m.sees_focus());
    verdict.claim(direct, "no member lists a focus, and each exchanges media with both others directly");
    let (encrypted, clear) =
        members.iter().map(Member::signalling).fold((0, 0), |(e, c), (more, clear)| (e + more, c + clear));
    verdict.claim(
        encrypted > 0 && clear == 0,
        format!("{encrypted} signalling messages came Olm-encrypted, {clear} in clear"),
    );
}

fn claim_overheard(verdict: &mut Verdict, overheard: &Heard) -> Result<()> {
    let frames: usize = overheard.values().map(Vec::len).sum();
    let guess = MediaKey::new((0..16).map(|i| i * 17).collect())?;
    let mut opened = 0;
    for heard in overheard.values() {
        opened += try_key(heard, &guess)?.1;
    }
    verdict.claim(
        frames > 0 && opened == 0,
        format!("the intruder received {frames} frames and decrypted {opened}"),
    );
    Ok(())
}

/// How many frames all members received that are byte for byte in their sender's recording, and how many that are not.
pub(crate) fn frames(members: &[Member]) -> (u64, u64) {
    members
        .iter()
        .fold((0, 0), |(i, f), m| m.seen(|s| (i + s.identical.values().sum::<u64>(), f + s.foreign)))
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
pub(crate) async fn watch(
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
