//! The focus stops in the middle of the call and comes back.

use std::time::Duration;

use anyhow::Result;

use crate::{
    call::{ENOUGH, frames, watch},
    intruder::Intruder,
    member::Member,
    metronome::Metronome,
    own_focus::OwnFocus,
    stage::step,
    table::LiveTable,
    verdict::Verdict,
    voices::Silences,
};

/// How long a move may take.
const MOVE: Duration = Duration::from_secs(60);
/// How long the members talk without the focus.
const AWAY: Duration = Duration::from_secs(3);
/// After a move back the path of before stays for 5 s (docs/mesh.md §Moving): what comes later came over the focus.
const BOTH_PATHS: Duration = Duration::from_secs(6);
/// Longest silence in a move that is planned, besides what the machine itself causes.
const UNHEARD: Duration = Duration::from_millis(200);

/// Stops the focus, and starts it again; returns whether the call moved back to it. The intruder goes with the focus.
pub(crate) async fn without_focus(
    verdict: &mut Verdict,
    table: &mut LiveTable,
    members: &[Member],
    focus: &mut OwnFocus,
    intruder: Intruder,
) -> Result<bool> {
    let others = members.len() - 1;
    let all_heard =
        |members: &[Member]| members.iter().all(|m| m.seen(|s| s.voices.with_frames(ENOUGH) == others));
    for member in members {
        member.note(|seen| {
            seen.expects_no_focus = true;
            seen.direct.clear();
            seen.voices.begin();
        });
    }
    focus.stop().await;
    step("the focus was stopped in the middle of the call");
    intruder.take();
    let before = frames(members);
    let meshes = watch(table, members, MOVE, |members| {
        members.iter().all(|m| m.seen(|s| s.meshes && s.direct.len() == others)) && all_heard(members)
    })
    .await;
    watch(table, members, AWAY, |_| false).await;
    table.keep();
    let silences = silences(members);
    step(&format!("media travels from member to member; silence of a voice: {silences}"));
    verdict.claim(
        meshes,
        format!("without the focus the call went on from member to member (silence: {silences})"),
    );
    let after = frames(members);
    let (direct, overheard) = (after.0 - before.0, intruder.take().values().map(Vec::len).sum::<usize>());
    verdict.claim(
        direct > 0 && after.1 == 0 && overheard == 0,
        format!("{direct} frames came directly, every one byte for byte the same; the intruder received {overheard}"),
    );
    intruder.leave().await;

    members.iter().for_each(|member| member.note(|seen| seen.voices.begin()));
    let metronome = Metronome::start();
    focus.start_again().await?;
    step("the focus was started again, on the same addresses");
    let moved = watch(table, members, MOVE, |members| members.iter().all(|m| m.seen(|s| !s.meshes))).await;
    watch(table, members, BOTH_PATHS, |_| false).await;
    let (silences, standstill) = (self::silences(members), metronome.standstill());
    // From here on nothing but the focus carries media.
    members.iter().for_each(|member| member.note(|seen| seen.voices.moved()));
    let is_back = moved && watch(table, members, MOVE, all_heard).await;
    table.keep();
    verdict.claim(is_back, "the call moved back to the focus when it was there again");
    if is_back {
        let machine = format!("the demo itself stood still for up to {} ms", standstill.as_millis());
        step(&format!("media travels over the focus again; silence of a voice: {silences}; {machine}"));
        verdict.claim(
            silences.longest < UNHEARD + standstill,
            format!(
                "the move back left less than {} ms of silence ({silences}; {machine})",
                UNHEARD.as_millis()
            ),
        );
    }
    members.iter().for_each(|member| member.note(|seen| seen.expects_no_focus = false));
    Ok(is_back)
}

/// The silences of all voices at all members.
fn silences(members: &[Member]) -> Silences {
    Silences::of(members.iter().flat_map(|m| m.seen(|s| s.voices.silences().collect::<Vec<_>>())).collect())
}
