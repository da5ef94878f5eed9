//! Calls without a focus, and tracks that move between two paths.

use super::*;
use crate::machine::{MeshPolicy, MeshReason, membership::wire::STATE_TYPE};

async fn join_with(
    script: &Script,
    sfus: &Arc<Sfus>,
    foci: &[&str],
    options: CallOptions,
) -> (Call, CallEvents) {
    let connector = Arc::new(Dial(sfus.clone(), foci.iter().map(|name| focus(name)).collect()));
    Call::join_through(Arc::new(script.clone()), connector, options).await.unwrap()
}

/// The types of the transports in our newest membership.
fn transports(script: &Script) -> Vec<String> {
    let server = script.server.lock().unwrap();
    let newest = server.requests.iter().rev().find_map(|request| match request {
        MatrixRequest::Send(event) if event.event_type == STATE_TYPE => Some(event.content.clone()),
        _ => None,
    });
    let foci = newest.unwrap()["foci_preferred"].clone();
    foci.as_array().unwrap().iter().map(|entry| entry["type"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test(start_paused = true)]
async fn call_without_a_focus_is_a_mesh() {
    let script = Script::new(true);
    let (call, mut events) = join_with(&script, &Arc::default(), &[], options()).await;
    next(&mut events, |event| matches!(event, CallEvent::MeshBegan(MeshReason::NoFocus))).await;
    assert_eq!(*call.watch_status().borrow(), CallStatus::Joined);
    assert_eq!(transports(&script), ["dev.antiphon.mesh"]);
    // Nobody is there yet to carry it to.
    call.publish(TrackSpec::microphone()).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn silent_focus_is_not_waited_for_and_used_when_it_answers() {
    let script = Script::new(true);
    let sfus = Arc::<Sfus>::default();
    *sfus.refuse.lock().unwrap() = Some(lost(ConnectFailureKind::SfuUnreachable));
    let begin = tokio::time::Instant::now();
    let (call, mut events) = join_with(&script, &sfus, &["own"], options()).await;
    assert!(begin.elapsed() < Duration::from_secs(6), "{:?}", begin.elapsed());
    next(&mut events, |event| matches!(event, CallEvent::MeshBegan(MeshReason::FocusUnreachable))).await;
    assert_eq!(transports(&script), ["dev.antiphon.mesh"]);
    let track = call.publish(TrackSpec::microphone()).await.unwrap();
    *sfus.refuse.lock().unwrap() = None;
    next(&mut events, |event| matches!(event, CallEvent::MeshEnded(_))).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(transports(&script), ["livekit", "dev.antiphon.mesh"]);
    let room = sfus.room(&focus("own")).await;
    track.write(&frame(1)).unwrap();
    assert_eq!(room.sent.lock().unwrap().len(), 1, "our track is on the focus");
}

#[tokio::test(start_paused = true)]
async fn small_call_uses_no_focus_until_a_member_comes_that_cannot_mesh() {
    let script = Script::new(true);
    let sfus = Arc::<Sfus>::default();
    let small = options().with_mesh(MeshPolicy::SmallCalls { limit: 4 });
    let (_call, mut events) = join_with(&script, &sfus, &["own"], small).await;
    next(&mut events, |event| matches!(event, CallEvent::MeshBegan(MeshReason::SmallCall))).await;
    assert_eq!(sfus.connections(), 0, "the focus is not asked for");
    script.join(BOB, "B", &focus("own"));
    next(&mut events, |event| matches!(event, CallEvent::MeshEnded(_))).await;
}

#[tokio::test(start_paused = true)]
async fn track_that_moves_to_another_focus_goes_on_under_its_name() {
    let script = Script::new(false);
    let (_call, mut events, sfus) = join(&script).await;
    let identity = script.join(BOB, "B", &focus("one"));
    let one = sfus.room(&focus("one")).await;
    let sid_there = one.announce(&identity).await;
    next(&mut events, |event| matches!(event, CallEvent::TrackPublished { .. })).await;
    one.frame_when_attached(&sid_there, None, &[1; 20]).await;
    next(&mut events, |event| matches!(event, CallEvent::Frame { .. })).await;

    script.join(BOB, "B", &focus("two"));
    let two = sfus.room(&focus("two")).await;
    let sid_here = two.announce(&identity).await;
    two.frame_when_attached(&sid_here, None, &[2; 20]).await;
    let news = |event: &CallEvent| {
        matches!(
            event,
            CallEvent::TrackPublished { .. } | CallEvent::TrackEnded { .. } | CallEvent::Frame { .. }
        )
    };
    let CallEvent::Frame { from, frame } = next(&mut events, news).await else {
        panic!("the track began anew");
    };
    assert_eq!((&from.track.sid, frame.payload[0]), (&sid_there, 2));
    // The old path carries the same frames for a moment.
    assert!(one.frame(&sid_there, None, &[3; 20]), "it stays until the new one has settled");
    two.frame(&sid_here, None, &[4; 20]);
    let CallEvent::Frame { frame, .. } = next(&mut events, news).await else { panic!("the track ended") };
    assert_eq!(frame.payload[0], 4, "nobody goes back to the old path");
}
