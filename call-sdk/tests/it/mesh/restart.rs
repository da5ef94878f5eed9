//! A member whose process was killed, and started again with the same device.

use super::{
    process::{MemberProcess, Orders, text},
    *,
};
use crate::speakers::ENOUGH;

#[tokio::test(flavor = "multi_thread")]
async fn killed_process_is_heard_again_in_its_new_session() {
    require!(Peer::LoopbackOnly);
    let _turn = turn().await;
    let homeserver = with_users(&["alice", "bob", "carol"]).await;
    let mut room = Room::on(homeserver.url());
    // Bob calls one of them, and is called by the other.
    let speakers = [room.speaker("alice", options()).await, room.speaker("carol", options()).await];
    let store = tempfile::tempdir().unwrap();
    let orders = Orders {
        homeserver: homeserver.url().to_owned(),
        user: "bob".to_owned(),
        store: text(&store.path().join("device")),
        room: room.room.as_ref().map(ToString::to_string),
        bind: Some(SocketAddr::from(([127, 0, 0, 1], 0))),
    };
    let bobs_id = format!("@bob:{}", homeserver.server_name());
    let mut bob = MemberProcess::start(&orders);
    let heard = |bob: &MemberProcess, before: &[u64]| {
        // A track of a new connection counts from zero.
        let new = |opened: u64, before: u64| if opened < before { opened } else { opened - before };
        speakers.iter().zip(before).all(|(speaker, before)| {
            new(speaker.opened(&bobs_id), *before) >= ENOUGH && bob.opened(&speaker.user()) >= ENOUGH
        })
    };
    until("all heard", LIMIT, async || heard(&bob, &[0, 0])).await;
    Pairs::of(&speakers).until_heard(LIMIT, "beside the process").await;
    for round in 1..=2 {
        bob.kill().await;
        // The frames that were on their way.
        let mut before = Vec::new();
        until("bob silent", LIMIT, async || {
            let opened: Vec<_> = speakers.iter().map(|speaker| speaker.opened(&bobs_id)).collect();
            opened == std::mem::replace(&mut before, opened.clone())
        })
        .await;
        speakers.iter().for_each(Speaker::begin_gaps);
        let started = Instant::now();
        bob = MemberProcess::start(&orders);
        until("all heard again", LIMIT, async || heard(&bob, &before)).await;
        println!("restart {round}: everybody hears everybody {:?} after the start", started.elapsed());
        let (_, longest) = gaps_without(&speakers, &bobs_id);
        assert!(longest < Duration::from_secs(1), "the others did not hear each other for {longest:?}");
    }
}

/// Median and longest silence of all voices but one.
fn gaps_without(speakers: &[Speaker], user: &str) -> (Duration, Duration) {
    let silences = speakers.iter().flat_map(Speaker::silences);
    let mut gaps: Vec<_> =
        silences.filter(|(speaker, _)| speaker != user).map(|(_, silence)| silence).collect();
    gaps.sort();
    (gaps[gaps.len() / 2], *gaps.last().unwrap())
}
