//! Two members that join at the same instant.

use antiphon_call_sdk::machine::Step;

use super::*;

const ROUNDS: usize = 10;

#[tokio::test(flavor = "multi_thread")]
async fn members_that_join_at_once_have_one_connection_per_pair() {
    require!(Peer::LoopbackOnly);
    let _turn = turn().await;
    let homeserver = DevHomeserver::start(Options::default()).await.unwrap();
    for round in 0..ROUNDS {
        let mut room = Room::on(homeserver.url());
        let mut entered = Vec::new();
        for number in 0..2 {
            let user = format!("member{round}x{number}");
            homeserver.register_user(&user, "pw").unwrap();
            entered.push(room.enter(&user).await);
        }
        let [(one, one_store, id), (other, other_store, _)] = entered.try_into().ok().unwrap();
        let joined = tokio::join!(one.join_call(&id, options()), other.join_call(&id, options()));
        let ((one_call, one_events), (other_call, other_events)) = (joined.0.unwrap(), joined.1.unwrap());
        let speakers = [
            Speaker::with_frames_every(FRAME_EVERY, one_call, one_events, one, one_store).await,
            Speaker::with_frames_every(FRAME_EVERY, other_call, other_events, other, other_store).await,
        ];
        let mut pairs = Pairs::of(&speakers);
        pairs.until_heard(LIMIT, &format!("in round {round}")).await;
        pairs.until_heard(LIMIT, &format!("still in round {round}")).await;
        for speaker in &speakers {
            let report = speaker.call.report().await.unwrap();
            let count =
                |is: fn(&Step) -> bool| report.timeline.iter().filter(|entry| is(&entry.step)).count();
            let connected = count(|step| matches!(step, Step::PairConnected { .. }));
            let failed = count(|step| matches!(step, Step::PairFailed { .. }));
            assert_eq!((connected, failed), (1, 0), "{:#?}", report.timeline);
            assert_eq!(speaker.call.tracks().len(), 1, "{:#?}", speaker.call.tracks());
        }
    }
}
