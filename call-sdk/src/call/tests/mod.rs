//! A call does what the room says, on virtual time: who is in it, whose key opens what, when keys change, how it ends.

mod mesh;
mod script;

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use serde_json::{Value, json};

use self::script::{Dial, Script, Sfus, focus, lost, user};
use super::{Call, CallError, CallEvents, CallOptions, WriteError};
use crate::{
    foci::Endpoint,
    frame_crypto::OpenError,
    key::{KeyIndex, MediaKey},
    machine::{
        CallEvent, CallStatus, ConnectFailureKind, EncryptionPolicy, EndReason, RolloutConfig,
        membership::wire::{MembershipMode, STICKY_TYPE},
    },
    matrix::{ApiVersion, DelayedAction, MatrixRequest, OwnTrust, SlotEvent},
    media::{EncodedFrame, TrackSpec},
    member::ParticipantIdentity,
    transport::{DisconnectReason, LiveKitFocus, TransportEvent},
};

const BOB: &str = "@bob:example.org";
const CAROL: &str = "@carol:example.org";

fn options() -> CallOptions {
    CallOptions::default()
        .with_keys(RolloutConfig { first_index: Some(KeyIndex(0)), ..RolloutConfig::default() })
}

async fn join(script: &Script) -> (Call, CallEvents, Arc<Sfus>) {
    let sfus = Arc::new(Sfus::default());
    let connector = Arc::new(Dial(sfus.clone(), vec![focus("own")]));
    let (call, events) = Call::join_through(Arc::new(script.clone()), connector, options()).await.unwrap();
    (call, events, sfus)
}

async fn next(events: &mut CallEvents, wanted: impl Fn(&CallEvent) -> bool) -> CallEvent {
    let mut others = Vec::new();
    let waiting = async {
        loop {
            let event = events.next().await.expect("the call goes on");
            if wanted(&event) {
                return event;
            }
            others.push(format!("{event:?}"));
        }
    };
    // Virtual: it passes as soon as nothing else can happen.
    tokio::time::timeout(Duration::from_secs(120), waiting)
        .await
        .unwrap_or_else(|_| panic!("the event does not come; instead {others:#?}"))
}

fn key(byte: u8) -> MediaKey {
    MediaKey::new(vec![byte; 16]).unwrap()
}

fn frame(byte: u8) -> EncodedFrame {
    EncodedFrame { payload: vec![byte; 80].into(), timestamp: Duration::ZERO }
}

#[tokio::test(start_paused = true)]
async fn homeserver_that_says_late_what_it_supports_gets_a_delayed_leave() {
    for failures in [1, 20] {
        let script = Script::new(true);
        script.server.lock().unwrap().silent_about_support = failures;
        let (call, ..) = join(&script).await;
        tokio::time::sleep(Duration::from_secs(10)).await;
        let server = script.server.lock().unwrap();
        let scheduled = server.requests.iter().any(|r| matches!(r, MatrixRequest::Schedule(_)));
        assert!(scheduled, "after {failures} failures: {:?}", server.requests);
        drop(call);
    }
}

#[tokio::test(start_paused = true)]
async fn joining_schedules_a_leave_publishes_membership_and_shares_our_key() {
    let script = Script::new(true);
    script.join(BOB, "BOB", &focus("own"));
    let (call, mut events, _) = join(&script).await;
    next(&mut events, |e| matches!(e, CallEvent::OwnKeyInUse(KeyIndex(0)))).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(call.members().len(), 1, "our own device is not among the others");
    let report = call.report().await.unwrap().to_json();
    assert!(report.contains("membership_published") && !report.contains("bob"), "{report}");
    let server = script.server.lock().unwrap();
    let place = |is: fn(&MatrixRequest) -> bool| server.requests.iter().position(is).unwrap();
    let scheduled = place(|r| matches!(r, MatrixRequest::Schedule(_)));
    assert!(scheduled < place(|r| matches!(r, MatrixRequest::Send(_))), "{:?}", server.requests);
    let (to, message) = &server.keys[0];
    assert_eq!(to.iter().map(|d| d.user_id.as_str()).collect::<Vec<_>>(), [BOB]);
    assert_eq!(message["keys"]["index"], 0);
}

#[tokio::test(start_paused = true)]
async fn frames_open_with_their_members_key_only() {
    let script = Script::new(true);
    let bob = script.join(BOB, "BOB", &focus("own"));
    let carol = script.join(CAROL, "CAROL", &focus("own"));
    let (call, mut events, sfus) = join(&script).await;
    script.key(BOB, "BOB", &key(1), true);
    script.key(CAROL, "CAROL", &key(2), true);
    for _ in 0..2 {
        next(&mut events, |e| matches!(e, CallEvent::KeyReceived { .. })).await;
    }
    let room = sfus.room(&focus("own")).await;
    let (of_bob, of_carol) = (room.announce(&bob).await, room.announce(&carol).await);
    // A frame that Bob sealed, on Carol's track: refused. On his own: opened.
    room.frame_when_attached(&of_carol, Some(&key(1)), b"hello").await;
    let refused = next(&mut events, |e| matches!(e, CallEvent::Undecryptable { .. })).await;
    assert!(matches!(refused, CallEvent::Undecryptable { reason: OpenError::Unauthentic(_), .. }));
    room.frame_when_attached(&of_bob, Some(&key(1)), b"hello").await;
    let CallEvent::Frame { from, frame } = next(&mut events, |e| matches!(e, CallEvent::Frame { .. })).await
    else {
        unreachable!()
    };
    assert_eq!((&*from.member.user_id, &frame.payload[..]), (user(BOB), &b"hello"[..]));
    assert_eq!(call.tracks().iter().map(|track| track.stats.opened).sum::<u64>(), 1);
}

#[tokio::test(start_paused = true)]
async fn plaintext_strangers_and_wrong_foci_do_not_reach_the_application() {
    let script = Script::new(true);
    let bob = script.join(BOB, "BOB", &focus("own"));
    let carol = script.join(CAROL, "CAROL", &focus("other"));
    let (_call, mut events, sfus) = join(&script).await;
    script.key(BOB, "BOB", &key(1), true);
    script.key(CAROL, "CAROL", &key(2), true);
    for _ in 0..2 {
        next(&mut events, |e| matches!(e, CallEvent::KeyReceived { .. })).await;
    }
    let room = sfus.room(&focus("own")).await;
    let stranger = room.announce(&ParticipantIdentity("@mallory:example.org:M".to_owned())).await;
    // Carol publishes to the other focus; here, somebody only claims to be her.
    let not_carol = room.announce(&carol).await;
    let of_bob = room.announce(&bob).await;
    room.frame_when_attached(&of_bob, None, &[0x78; 60]).await;
    next(&mut events, |e| matches!(e, CallEvent::Undecryptable { .. })).await;
    assert!(!room.frame(&stranger, Some(&key(1)), b"stranger"), "nobody takes a stranger's frames");
    assert!(!room.frame(&not_carol, Some(&key(2)), b"wrong focus"));
    next(&mut events, |e| matches!(e, CallEvent::UnknownParticipant { .. })).await;
    // On her own focus she is heard.
    let other = sfus.room(&focus("other")).await;
    let of_carol = other.announce(&carol).await;
    other.frame_when_attached(&of_carol, Some(&key(2)), b"right focus").await;
    let heard = next(&mut events, |e| matches!(e, CallEvent::Frame { .. })).await;
    assert!(matches!(heard, CallEvent::Frame { frame, .. } if &frame.payload[..] == b"right focus"));
}

#[tokio::test(start_paused = true)]
async fn clear_key_is_refused() {
    let script = Script::new(true);
    script.join(BOB, "BOB", &focus("own"));
    let (_call, mut events, _) = join(&script).await;
    script.key(BOB, "BOB", &key(1), false);
    next(&mut events, |e| matches!(e, CallEvent::KeyRejected { .. })).await;
}

#[tokio::test(start_paused = true)]
async fn leaver_changes_our_key_and_recorded_frames_stay_closed_when_it_returns() {
    let script = Script::new(true);
    let bob = script.join(BOB, "BOB", &focus("own"));
    script.join(CAROL, "CAROL", &focus("own"));
    let (_call, mut events, sfus) = join(&script).await;
    next(&mut events, |e| matches!(e, CallEvent::OwnKeyInUse(KeyIndex(0)))).await;
    script.key(BOB, "BOB", &key(1), true);
    next(&mut events, |e| matches!(e, CallEvent::KeyReceived { .. })).await;
    let room = sfus.room(&focus("own")).await;
    let sid = room.announce(&bob).await;
    room.frame_when_attached(&sid, Some(&key(1)), b"once").await;
    next(&mut events, |e| matches!(e, CallEvent::Frame { .. })).await;
    script.leave(BOB);
    // The track ends before its member leaves, and no frame follows either.
    let mut ended = false;
    loop {
        match events.next().await.unwrap() {
            CallEvent::TrackEnded { .. } => ended = true,
            CallEvent::MemberLeft(member) => {
                assert_eq!(&*member.user_id, user(BOB));
                break;
            }
            _ => {}
        }
    }
    assert!(ended);
    room.frame(&sid, Some(&key(1)), b"after");
    let follows =
        next(&mut events, |e| matches!(e, CallEvent::OwnKeyInUse(_) | CallEvent::Frame { .. })).await;
    assert!(matches!(follows, CallEvent::OwnKeyInUse(KeyIndex(1))), "{follows:?}");
    let server = script.server.lock().unwrap();
    let (to, message) = server.keys.last().unwrap();
    assert_eq!(message["keys"]["index"], 1);
    assert!(to.iter().all(|device| device.user_id != BOB), "the leaver gets no new key: {to:?}");
}

#[tokio::test(start_paused = true)]
async fn frames_we_send_are_sealed() {
    let script = Script::new(true);
    let (call, mut events, sfus) = join(&script).await;
    let track = call.publish(TrackSpec::microphone()).await.unwrap();
    next(&mut events, |e| matches!(e, CallEvent::OwnKeyInUse(_))).await;
    track.write(&frame(0x78)).unwrap();
    let room = sfus.room(&focus("own")).await;
    let sent = room.sent.lock().unwrap()[0].payload.clone();
    assert_eq!(sent.len(), 80 + crate::frame_crypto::OVERHEAD);
    assert!(!sent.windows(8).any(|window| window == [0x78; 8]), "only the first byte travels in clear");
    track.set_muted(true);
    track.write(&frame(1)).unwrap();
    assert_eq!(room.sent.lock().unwrap().len(), 1, "a muted track sends nothing");
}

#[tokio::test(start_paused = true)]
async fn unencrypted_room_has_an_unencrypted_call_unless_that_is_refused() {
    let script = Script::new(false);
    let bob = script.join(BOB, "BOB", &focus("own"));
    let (call, mut events, sfus) = join(&script).await;
    assert!(!call.is_encrypted());
    let room = sfus.room(&focus("own")).await;
    let sid = room.announce(&bob).await;
    room.frame_when_attached(&sid, None, b"in clear").await;
    next(&mut events, |e| matches!(e, CallEvent::Frame { .. })).await;
    assert!(script.server.lock().unwrap().keys.is_empty(), "no keys are made for it");

    let required = options().with_encryption(EncryptionPolicy::Required);
    let dial = Arc::new(Dial(Arc::default(), vec![focus("own")]));
    let refused = Call::join_through(Arc::new(script), dial, required).await;
    assert!(matches!(refused, Err(CallError::Ended { reason: EndReason::NotEncrypted, .. })), "{refused:?}");
}

#[tokio::test(start_paused = true)]
async fn encryption_switched_on_during_a_call_holds_from_then_on() {
    let script = Script::new(false);
    let bob = script.join(BOB, "BOB", &focus("own"));
    let (call, mut events, sfus) = join(&script).await;
    let track = call.publish(TrackSpec::microphone()).await.unwrap();
    track.write(&frame(0x78)).unwrap();
    script.encrypt_room();
    next(&mut events, |e| matches!(e, CallEvent::EncryptionEnabled)).await;
    next(&mut events, |e| matches!(e, CallEvent::OwnKeyInUse(_))).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    track.write(&frame(0x78)).unwrap();
    let room = sfus.room(&focus("own")).await;
    let lengths: Vec<_> = room.sent.lock().unwrap().iter().map(|frame| frame.payload.len()).collect();
    assert_eq!(lengths, [80, 80 + crate::frame_crypto::OVERHEAD]);
    let sid = room.announce(&bob).await;
    room.frame_when_attached(&sid, None, &[0x78; 60]).await;
    next(&mut events, |e| matches!(e, CallEvent::Undecryptable { .. })).await;
}

#[tokio::test(start_paused = true)]
async fn leaving_takes_the_membership_back_and_closes_every_connection() {
    let script = Script::new(true);
    script.join(BOB, "BOB", &focus("other"));
    let (call, mut events, sfus) = join(&script).await;
    sfus.room(&focus("other")).await;
    next(&mut events, |e| matches!(e, CallEvent::Connected(f) if *f == focus("other"))).await;
    call.leave().await;
    let ended = next(&mut events, |e| matches!(e, CallEvent::Ended(_))).await;
    assert!(matches!(ended, CallEvent::Ended(EndReason::Left)));
    assert!(events.next().await.is_none(), "nothing comes after the end");
    tokio::time::sleep(Duration::from_millis(10)).await;
    assert_eq!(sfus.closed.load(Ordering::Relaxed), 2);
    let sent =
        |r: &MatrixRequest| matches!(r, MatrixRequest::UpdateDelayed { action: DelayedAction::Send, .. });
    assert!(script.server.lock().unwrap().requests.iter().any(sent));
    assert!(!script.is_listed("@alice:example.org") && script.is_listed(BOB));
}

#[tokio::test(start_paused = true)]
async fn dropped_call_leaves() {
    let script = Script::new(true);
    let (call, mut events, _) = join(&script).await;
    let track = call.publish(TrackSpec::microphone()).await.unwrap();
    drop(call);
    next(&mut events, |e| matches!(e, CallEvent::Ended(EndReason::Dropped))).await;
    assert!(!script.is_listed("@alice:example.org"));
    // The track's handle outlives the call without harm.
    assert!(matches!(track.write(&frame(1)), Ok(()) | Err(WriteError::Seal(_))));
}

#[tokio::test(start_paused = true)]
async fn lost_focus_is_connected_again_with_a_fresh_token_and_tracks_return() {
    let script = Script::new(true);
    let (call, mut events, sfus) = join(&script).await;
    let track = call.publish(TrackSpec::microphone()).await.unwrap();
    next(&mut events, |e| matches!(e, CallEvent::OwnKeyInUse(_))).await;
    let first = sfus.room(&focus("own")).await;
    let gone = DisconnectReason::TokenRejected("the room does not exist".to_owned());
    first.tell(TransportEvent::Disconnected(gone)).await;
    next(&mut events, |e| matches!(e, CallEvent::FocusFailed { ours: true, .. })).await;
    next(&mut events, |e| matches!(e, CallEvent::Connected(_))).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    let second = sfus.room(&focus("own")).await;
    assert!(!Arc::ptr_eq(&first, &second));
    track.write(&frame(0x78)).unwrap();
    assert_eq!((second.published.lock().unwrap().len(), second.sent.lock().unwrap().len()), (1, 1));
    assert_eq!(*call.watch_status().borrow(), CallStatus::Joined);
    assert!(script.is_listed("@alice:example.org"), "we never left");
}

/// Joins in a sticky form at `own`, with tokens of `issuer`.
async fn join_sticky(
    script: &Script,
    mode: MembershipMode,
    own: &LiveKitFocus,
    issuer: Endpoint,
) -> (Call, CallEvents, Arc<Sfus>) {
    let sfus = Arc::new(Sfus::default());
    *sfus.issuer.lock().unwrap() = Some(issuer);
    let connector = Arc::new(Dial(sfus.clone(), vec![own.clone()]));
    let options = options().with_mode(mode);
    let (call, events) = Call::join_through(Arc::new(script.clone()), connector, options).await.unwrap();
    (call, events, sfus)
}

/// The contents of our sticky memberships, in the order of writing.
fn memberships(script: &Script) -> Vec<Value> {
    let server = script.server.lock().unwrap();
    let sent = server.requests.iter().filter_map(|request| match request {
        MatrixRequest::Send(event) if event.event_type == STICKY_TYPE => Some(event.content.clone()),
        _ => None,
    });
    sent.collect()
}

#[tokio::test(start_paused = true)]
async fn sticky_membership_names_the_sfu_and_the_type_that_fit_the_token() {
    use MembershipMode::{Matrix2, Matrix2Merged};
    let homeserver = Endpoint::Homeserver(ApiVersion::Stable);
    let service_only = focus("own");
    let both = LiveKitFocus { sfu: Some("wss://own.example".parse().unwrap()), ..focus("own") };
    for (mode, own, issuer, kind) in [
        (Matrix2Merged, &both, homeserver, "m.livekit"),
        (Matrix2Merged, &both, Endpoint::GetToken, "livekit"),
        (Matrix2Merged, &service_only, Endpoint::GetToken, "livekit"),
        (Matrix2, &service_only, Endpoint::GetToken, "livekit"),
        (Matrix2, &both, Endpoint::GetToken, "livekit"),
    ] {
        let script = Script::new(true);
        let (_call, ..) = join_sticky(&script, mode, own, issuer).await;
        tokio::time::sleep(Duration::from_secs(60)).await;
        let transport = json!({
            "type": kind, "livekit_service_url": "https://own.example", "url": "wss://own.example",
        });
        let written: Vec<_> = memberships(&script)
            .iter()
            .map(|content| content["transports"]["published"][0].clone())
            .collect();
        assert_eq!(written, [transport], "{mode:?} {own} {issuer}");
    }
}

#[tokio::test(start_paused = true)]
async fn sticky_membership_follows_the_issuer_of_a_later_token() {
    let script = Script::new(true);
    let own = LiveKitFocus { sfu: Some("wss://own.example".parse().unwrap()), ..focus("own") };
    let homeserver = Endpoint::Homeserver(ApiVersion::Stable);
    let (call, mut events, sfus) =
        join_sticky(&script, MembershipMode::Matrix2Merged, &own, homeserver).await;
    for issuer in [Endpoint::GetToken, homeserver] {
        *sfus.issuer.lock().unwrap() = Some(issuer);
        let gone = DisconnectReason::Removed("gone".to_owned());
        sfus.room(&own).await.tell(TransportEvent::Disconnected(gone)).await;
        next(&mut events, |e| matches!(e, CallEvent::FocusFailed { ours: true, .. })).await;
        next(&mut events, |e| matches!(e, CallEvent::Connected(_))).await;
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    let written = memberships(&script);
    let kinds: Vec<_> =
        written.iter().map(|content| content["transports"]["published"][0]["type"].clone()).collect();
    assert_eq!(kinds, ["m.livekit", "livekit", "m.livekit"]);
    assert!(written.iter().all(|content| content["member"] == written[0]["member"]), "{written:?}");
    assert_eq!(*call.watch_status().borrow(), CallStatus::Joined);
}

#[tokio::test(start_paused = true)]
async fn encryption_switched_on_during_a_sticky_call_keeps_its_members() {
    let script = Script::new(false);
    let own = focus("own");
    let (call, mut events, _) = join_sticky(&script, MembershipMode::Matrix2, &own, Endpoint::GetToken).await;
    script.encrypt_room();
    next(&mut events, |e| matches!(e, CallEvent::EncryptionEnabled)).await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    let slot = script.server.lock().unwrap().view.slots[0].content.clone();
    assert_eq!(slot["encryption"]["type"], "org.matrix.msc4143.per_member", "{slot}");
    assert_eq!(*call.watch_status().borrow(), CallStatus::Joined);
    assert_eq!(memberships(&script).len(), 2, "the membership is written once more, encrypted now");
    assert!(script.is_listed("@alice:example.org"));
}

#[tokio::test(start_paused = true)]
async fn closed_slot_is_opened_for_sticky_members_and_is_nothing_to_state_members() {
    for mode in [MembershipMode::Matrix2, MembershipMode::Compatibility] {
        let script = Script::new(true);
        let closed = SlotEvent { slot_id: "m.call#ROOM".to_owned(), content: json!({ "status": "closed" }) };
        script.server.lock().unwrap().view.slots.push(closed);
        let (call, ..) = join_sticky(&script, mode, &focus("own"), Endpoint::GetToken).await;
        tokio::time::sleep(Duration::from_secs(60)).await;
        assert_eq!(*call.watch_status().borrow(), CallStatus::Joined, "{mode:?}");
        let status = script.server.lock().unwrap().view.slots[0].content["status"].clone();
        let expected = if mode == MembershipMode::Matrix2 { "open" } else { "closed" };
        assert_eq!(status, expected, "{mode:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn focus_without_an_authorisation_service_is_joined_in_the_merged_form() {
    let script = Script::new(true);
    let own = LiveKitFocus { service: None, sfu: Some("wss://own.example".parse().unwrap()) };
    let homeserver = Endpoint::Homeserver(ApiVersion::Stable);
    let (_call, ..) = join_sticky(&script, MembershipMode::Compatibility, &own, homeserver).await;
    tokio::time::sleep(Duration::from_secs(10)).await;
    let written = memberships(&script);
    assert_eq!(written[0]["transports"]["published"][0]["type"], "m.livekit", "{written:?}");
}

#[tokio::test(start_paused = true)]
async fn token_of_another_focus_does_not_publish_our_membership() {
    let script = Script::new(true);
    script.join(BOB, "BOB", &focus("other"));
    let sfus = Arc::new(Sfus::default());
    *sfus.silent.lock().unwrap() = Some(focus("own"));
    let connector = Arc::new(Dial(sfus.clone(), vec![focus("own")]));
    let port = Arc::new(script.clone());
    let joining = tokio::spawn(async move { Call::join_through(port, connector, options()).await.is_ok() });
    sfus.room(&focus("other")).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(!script.is_listed("@alice:example.org"));
    joining.abort();
}

#[tokio::test(start_paused = true)]
async fn another_focus_is_chosen_when_ours_stays_away() {
    let script = Script::new(true);
    let sfus = Arc::new(Sfus::default());
    let connector = Arc::new(Dial(sfus.clone(), vec![focus("own"), focus("spare")]));
    let (call, mut events) =
        Call::join_through(Arc::new(script.clone()), connector, options()).await.unwrap();
    *sfus.refuse.lock().unwrap() = Some(lost(ConnectFailureKind::SfuUnreachable));
    let gone = DisconnectReason::Removed("gone".to_owned());
    sfus.room(&focus("own")).await.tell(TransportEvent::Disconnected(gone)).await;
    next(&mut events, |e| matches!(e, CallEvent::FocusChanged(f) if *f == focus("spare"))).await;
    *sfus.refuse.lock().unwrap() = None;
    next(&mut events, |e| matches!(e, CallEvent::Connected(_))).await;
    assert_ne!(*call.watch_status().borrow(), CallStatus::Over);
}

#[tokio::test(start_paused = true)]
async fn last_member_of_another_focus_leaves_without_a_reconnection() {
    let script = Script::new(true);
    script.join(BOB, "BOB", &focus("other"));
    let (_call, mut events, sfus) = join(&script).await;
    next(&mut events, |e| matches!(e, CallEvent::Connected(f) if *f == focus("other"))).await;
    script.leave(BOB);
    next(&mut events, |e| matches!(e, CallEvent::MemberLeft(_))).await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!((sfus.connections(), sfus.closed.load(Ordering::Relaxed)), (2, 1));
}

#[tokio::test(start_paused = true)]
async fn closing_that_hangs_holds_up_no_media() {
    let script = Script::new(true);
    let bob = script.join(BOB, "BOB", &focus("own"));
    script.join(CAROL, "CAROL", &focus("other"));
    let (_call, mut events, sfus) = join(&script).await;
    script.key(BOB, "BOB", &key(1), true);
    next(&mut events, |e| matches!(e, CallEvent::Connected(f) if *f == focus("other"))).await;
    *sfus.hangs.lock().unwrap() = true;
    script.leave(CAROL);
    next(&mut events, |e| matches!(e, CallEvent::MemberLeft(_))).await;
    let before = tokio::time::Instant::now();
    let room = sfus.room(&focus("own")).await;
    let sid = room.announce(&bob).await;
    room.frame_when_attached(&sid, Some(&key(1)), b"meanwhile").await;
    next(&mut events, |e| matches!(e, CallEvent::Frame { .. })).await;
    assert!(before.elapsed() < Duration::from_millis(500), "{:?}", before.elapsed());
}

#[tokio::test(start_paused = true)]
async fn dropped_publish_or_handle_leaves_no_ghost_track() {
    let script = Script::new(true);
    let (call, _events, sfus) = join(&script).await;
    let room = sfus.room(&focus("own")).await;
    room.hold_publishing();
    let publishing = tokio::time::timeout(Duration::from_secs(1), call.publish(TrackSpec::microphone()));
    assert!(publishing.await.is_err(), "the publisher stops waiting");
    room.let_publish();
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert!(room.published.lock().unwrap().is_empty());

    let track = call.publish(TrackSpec::microphone()).await.unwrap();
    assert_eq!(room.published.lock().unwrap().len(), 1);
    drop(track);
    tokio::time::sleep(Duration::from_millis(10)).await;
    assert!(room.published.lock().unwrap().is_empty());
}

#[tokio::test(start_paused = true)]
async fn outage_of_the_homeserver_does_not_end_the_call() {
    let script = Script::new(true);
    let bob = script.join(BOB, "BOB", &focus("own"));
    let (call, mut events, sfus) = join(&script).await;
    script.key(BOB, "BOB", &key(1), true);
    next(&mut events, |e| matches!(e, CallEvent::KeyReceived { .. })).await;
    script.server.lock().unwrap().down = true;
    next(&mut events, |e| matches!(e, CallEvent::MembershipTrouble { .. })).await;
    tokio::time::sleep(Duration::from_secs(300)).await;
    let room = sfus.room(&focus("own")).await;
    let sid = room.announce(&bob).await;
    room.frame_when_attached(&sid, Some(&key(1)), b"still here").await;
    next(&mut events, |e| matches!(e, CallEvent::Frame { .. })).await;
    script.server.lock().unwrap().down = false;
    next(&mut events, |e| matches!(e, CallEvent::MembershipRecovered)).await;
    assert_eq!(*call.watch_status().borrow(), CallStatus::Joined);
}

#[tokio::test(start_paused = true)]
async fn room_that_cannot_be_read_is_read_again_without_a_sync() {
    let script = Script::new(true);
    script.join(BOB, "BOB", &focus("own"));
    script.server.lock().unwrap().unreadable = 3;
    let (call, _events, _) = join(&script).await;
    assert_eq!(call.members().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn untrusted_device_does_not_join_silently() {
    let mut script = Script::new(true);
    script.trusted = OwnTrust::NotCrossSigned;
    let dial = || Arc::new(Dial(Arc::default(), vec![focus("own")]));
    let refused = Call::join_through(Arc::new(script.clone()), dial(), options()).await;
    let Err(error @ CallError::OwnDeviceNotTrusted(_)) = refused else { panic!("{refused:?}") };
    assert!(error.to_string().contains("recovery key"), "the remedy is named: {error}");
    let all_the_same = options().with_allow_untrusted(true);
    let (_call, mut events) = Call::join_through(Arc::new(script), dial(), all_the_same).await.unwrap();
    next(&mut events, |e| matches!(e, CallEvent::OwnDeviceNotTrusted(_))).await;
}

#[tokio::test(start_paused = true)]
async fn refusal_by_every_focus_fails_the_join_with_the_cause() {
    let script = Script::new(true);
    let sfus = Arc::new(Sfus::default());
    *sfus.refuse.lock().unwrap() = Some(lost(ConnectFailureKind::SfuRefused));
    let connector = Arc::new(Dial(sfus, vec![focus("own")]));
    let refused = Call::join_through(Arc::new(script.clone()), connector, options()).await;
    let Err(error @ CallError::Ended { reason: EndReason::NoFocus(_), .. }) = refused else {
        panic!("{refused:?}");
    };
    let report = error.report().unwrap().to_json();
    assert!(report.contains("ended") && !report.contains("https://own.example"), "{report}");
    assert!(!script.is_listed("@alice:example.org"), "nothing stays behind");
}
