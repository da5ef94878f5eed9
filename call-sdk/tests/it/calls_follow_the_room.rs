//! A call does what the room says, on virtual time: who is in, whose key opens what, when keys change, how it ends.

use std::{sync::Arc, time::Duration};

use antiphon_call_sdk::{
    call::{Call, CallError, CallEvent, CallEvents, CallOptions, EncryptionPolicy, WriteError},
    frame_crypto::OpenError,
    key::{KeyIndex, MediaKey},
    media::{EncodedFrame, TrackSpec},
    membership::own::Request,
    transport::TransportEvent,
};
use bytes::Bytes;

use crate::script::{Dial, Script, Sfus, focus, frame};

const BOB: &str = "@bob:example.org";

async fn join(script: &Script) -> (Call, CallEvents, Arc<Sfus>) {
    let sfus = Arc::new(Sfus::default());
    let connector = Arc::new(Dial(sfus.clone()));
    let (call, events) =
        Call::join_through(Arc::new(script.clone()), connector, CallOptions::default()).await.unwrap();
    (call, events, sfus)
}

async fn next(events: &mut CallEvents, wanted: impl Fn(&CallEvent) -> bool) -> CallEvent {
    let waiting = async {
        loop {
            let event = events.next().await.expect("the call goes on");
            if wanted(&event) {
                return event;
            }
        }
    };
    // Virtual: it passes as soon as nothing else can happen.
    tokio::time::timeout(Duration::from_secs(60), waiting).await.expect("the event comes")
}

fn key(byte: u8) -> MediaKey {
    MediaKey::new(vec![byte; 16]).unwrap()
}

#[tokio::test(start_paused = true)]
async fn joining_schedules_a_leave_publishes_membership_and_shares_our_key() {
    let script = Script::new(true);
    script.join(BOB, "BOB", &focus("own"));
    let (call, mut events, _) = join(&script).await;
    next(&mut events, |e| matches!(e, CallEvent::OwnKeyInUse(KeyIndex(0)))).await;
    let world = script.world.lock().unwrap();
    assert!(matches!(world.requests[0], Request::ScheduleLeave { .. }), "{:?}", world.requests);
    assert!(matches!(world.requests[1], Request::PutMembership { .. }), "{:?}", world.requests);
    let (to, message) = &world.keys[0];
    assert_eq!(to.iter().map(|(u, d)| (u.as_str(), d.as_str())).collect::<Vec<_>>(), [(BOB, "BOB")]);
    assert_eq!(message["keys"]["index"], 0);
    drop(world);
    assert_eq!(call.members().len(), 1, "our own device is not among the others");
}

#[tokio::test(start_paused = true)]
async fn a_members_frames_open_with_that_members_key_only() {
    let script = Script::new(true);
    let bob = script.join(BOB, "BOB", &focus("own"));
    let carol = script.join("@carol:example.org", "CAROL", &focus("own"));
    let (call, mut events, sfus) = join(&script).await;
    script.key(BOB, "BOB", &key(1), true);
    script.key("@carol:example.org", "CAROL", &key(2), true);
    for _ in 0..2 {
        next(&mut events, |e| matches!(e, CallEvent::KeyReceived { .. })).await;
    }
    let room = sfus.room(&focus("own")).await;
    // Carol's name on a frame that Bob sealed: refused. The same frame in his own name: opened.
    room.send(frame(&carol, Some(&key(1)), b"hello")).await.unwrap();
    let refused = next(&mut events, |e| matches!(e, CallEvent::Undecryptable { .. })).await;
    assert!(matches!(refused, CallEvent::Undecryptable { reason: OpenError::Unauthentic(_), .. }));
    room.send(frame(&bob, Some(&key(1)), b"hello")).await.unwrap();
    let CallEvent::Frame { member, frame, .. } =
        next(&mut events, |e| matches!(e, CallEvent::Frame { .. })).await
    else {
        unreachable!()
    };
    assert_eq!((member.user_id.as_str(), &frame.payload[..]), (BOB, &b"hello"[..]));
    assert_eq!(call.stats().tracks.iter().map(|t| t.opened).sum::<u64>(), 1);
}

#[tokio::test(start_paused = true)]
async fn neither_plaintext_nor_strangers_nor_the_wrong_focus_reach_the_application() {
    let script = Script::new(true);
    let bob = script.join(BOB, "BOB", &focus("own"));
    let carol = script.join("@carol:example.org", "CAROL", &focus("other"));
    let (call, mut events, sfus) = join(&script).await;
    script.key(BOB, "BOB", &key(1), true);
    script.key("@carol:example.org", "CAROL", &key(2), true);
    for _ in 0..2 {
        next(&mut events, |e| matches!(e, CallEvent::KeyReceived { .. })).await;
    }
    let room = sfus.room(&focus("own")).await;
    let stranger = antiphon_call_sdk::member::ParticipantIdentity("@mallory:example.org:M".to_owned());
    room.send(frame(&stranger, Some(&key(1)), b"stranger")).await.unwrap();
    // Carol publishes to the other focus; here, somebody only claims to be her.
    room.send(frame(&carol, Some(&key(2)), b"wrong focus")).await.unwrap();
    room.send(frame(&bob, None, &[0x78; 60])).await.unwrap();
    next(&mut events, |e| matches!(e, CallEvent::Undecryptable { .. })).await;
    assert_eq!(call.stats().unattributed, 2);
    // On her own focus she is heard.
    let other = sfus.room(&focus("other")).await;
    other.send(frame(&carol, Some(&key(2)), b"right focus")).await.unwrap();
    let heard = next(&mut events, |e| matches!(e, CallEvent::Frame { .. })).await;
    assert!(matches!(heard, CallEvent::Frame { frame, .. } if &frame.payload[..] == b"right focus"));
}

#[tokio::test(start_paused = true)]
async fn a_key_that_is_not_olm_encrypted_is_refused() {
    let script = Script::new(true);
    script.join(BOB, "BOB", &focus("own"));
    let (_call, mut events, _) = join(&script).await;
    script.key(BOB, "BOB", &key(1), false);
    next(&mut events, |e| matches!(e, CallEvent::KeyRejected { .. })).await;
}

#[tokio::test(start_paused = true)]
async fn a_leaver_makes_us_change_our_key_and_forget_theirs() {
    let script = Script::new(true);
    let bob = script.join(BOB, "BOB", &focus("own"));
    script.join("@carol:example.org", "CAROL", &focus("own"));
    let (_call, mut events, sfus) = join(&script).await;
    next(&mut events, |e| matches!(e, CallEvent::OwnKeyInUse(KeyIndex(0)))).await;
    script.key(BOB, "BOB", &key(1), true);
    next(&mut events, |e| matches!(e, CallEvent::KeyReceived { .. })).await;
    script.leave(BOB);
    next(&mut events, |e| matches!(e, CallEvent::MemberLeft(m) if m.user_id == BOB)).await;
    next(&mut events, |e| matches!(e, CallEvent::OwnKeyInUse(KeyIndex(1)))).await;
    {
        let world = script.world.lock().unwrap();
        let (to, message) = world.keys.last().unwrap();
        assert_eq!(message["keys"]["index"], 1);
        assert!(to.iter().all(|(user, _)| user != BOB), "the leaver gets no new key: {to:?}");
    }
    // Back again, with the old key: it was wiped and must come anew.
    script.join(BOB, "BOB", &focus("own"));
    next(&mut events, |e| matches!(e, CallEvent::MemberJoined(m) if m.user_id == BOB)).await;
    sfus.room(&focus("own")).await.send(frame(&bob, Some(&key(9)), b"old")).await.unwrap();
    next(&mut events, |e| matches!(e, CallEvent::Undecryptable { .. })).await;
}

#[tokio::test(start_paused = true)]
async fn what_we_send_is_sealed() {
    let script = Script::new(true);
    let (call, mut events, sfus) = join(&script).await;
    let track = call.publish(TrackSpec::microphone()).await.unwrap();
    next(&mut events, |e| matches!(e, CallEvent::OwnKeyInUse(_))).await;
    let plain = Bytes::from_static(&[0x78; 80]);
    track.write(EncodedFrame { payload: plain.clone(), timestamp: Duration::ZERO }).await.unwrap();
    let sent = sfus.sent.lock().unwrap()[0].payload.clone();
    assert_eq!(sent.len(), plain.len() + antiphon_call_sdk::frame_crypto::OVERHEAD);
    assert!(!sent.windows(8).any(|w| w == &plain[1..9]), "only the first byte travels in clear");
}

#[tokio::test(start_paused = true)]
async fn an_unencrypted_room_has_an_unencrypted_call_unless_that_is_refused() {
    let script = Script::new(false);
    let bob = script.join(BOB, "BOB", &focus("own"));
    let (call, mut events, sfus) = join(&script).await;
    assert!(!call.is_encrypted());
    next(&mut events, |e| matches!(e, CallEvent::MemberJoined(_))).await;
    sfus.room(&focus("own")).await.send(frame(&bob, None, b"in clear")).await.unwrap();
    next(&mut events, |e| matches!(e, CallEvent::Frame { .. })).await;
    assert!(script.world.lock().unwrap().keys.is_empty(), "no keys are made for it");

    let mut options = CallOptions::default();
    options.encryption = EncryptionPolicy::Required;
    let refused = Call::join_through(Arc::new(script), Arc::new(Dial(Arc::default())), options).await;
    assert!(matches!(refused, Err(CallError::RoomNotEncrypted)));
}

#[tokio::test(start_paused = true)]
async fn leaving_takes_the_membership_back_and_closes_every_connection() {
    let script = Script::new(true);
    script.join(BOB, "BOB", &focus("other"));
    let (call, mut events, sfus) = join(&script).await;
    next(&mut events, |e| matches!(e, CallEvent::Connected(f) if *f == focus("other"))).await;
    call.leave().await;
    let ended = next(&mut events, |e| matches!(e, CallEvent::Ended { .. })).await;
    assert!(matches!(ended, CallEvent::Ended { reason } if reason == "left"));
    assert!(events.next().await.is_none(), "nothing comes after the end");
    assert_eq!(*sfus.closed.lock().unwrap(), 2);
    let world = script.world.lock().unwrap();
    assert!(world.requests.iter().any(|r| matches!(r, Request::SendLeave { .. })), "{:?}", world.requests);
    assert_eq!(world.view.events.len(), 1, "only Bob is left");
}

#[tokio::test(start_paused = true)]
async fn a_dropped_call_and_a_lost_focus_leave_too() {
    for lost in [false, true] {
        let script = Script::new(true);
        let (call, mut events, sfus) = join(&script).await;
        let track = call.publish(TrackSpec::microphone()).await.unwrap();
        if lost {
            let gone = TransportEvent::Disconnected { reason: "the room was closed".to_owned() };
            sfus.room(&focus("own")).await.send(gone).await.unwrap();
        } else {
            drop(call);
        }
        next(&mut events, |e| matches!(e, CallEvent::Ended { .. })).await;
        assert!(script.world.lock().unwrap().view.events.is_empty(), "we are not listed any more");
        // The track's handle outlives the call without harm.
        let late = track
            .write(EncodedFrame { payload: Bytes::from_static(b"late"), timestamp: Duration::ZERO })
            .await;
        assert!(matches!(late, Ok(()) | Err(WriteError::Seal(_) | WriteError::Transport(_))));
    }
}
