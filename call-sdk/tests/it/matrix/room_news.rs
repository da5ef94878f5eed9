//! The port reports room changes, invites, reactions, redactions and failing syncs.

use antiphon_call_sdk::matrix::{MatrixPort as _, MatrixRequest, MatrixUpdate, RoomEvent};
use serde_json::json;
use tokio::sync::mpsc;

use super::support::{HOUR, User, homeserver, message, next, send, view_until};

async fn event(updates: &mut mpsc::Receiver<MatrixUpdate>) -> RoomEvent {
    next(updates, |update| match update {
        MatrixUpdate::Event(event) => Some(event),
        _ => None,
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn invite_reaction_and_redaction_are_told_once() {
    let homeserver = homeserver().await;
    let (alice, bob) = (User::new(&homeserver, "alice").await, User::new(&homeserver, "bob").await);
    let room = alice.create_room(true, &[&bob]).await;
    let (port, bobs) = (alice.port(&room), bob.port(&room));
    let mut updates = bobs.updates().await;
    let mut own_updates = port.updates().await;
    let content = json!({"slot_id": "m.call#ROOM", "lifetime": 90_000, "m.mentions": {"room": true}});
    let invite = send(&port, message("m.rtc.invite", content.clone(), Some(HOUR))).await;
    let told = event(&mut updates).await;
    assert_eq!(
        (&told.event_id, told.event_type.as_str(), &told.content),
        (&invite, "m.rtc.invite", &content)
    );
    assert!(told.sticky_until.is_some());
    assert!(told.may_mention_room, "Alice has made the room");
    // Bob may not mention the whole room.
    send(&bobs, message("org.matrix.msc4310.rtc.decline", json!({"n": 1}), None)).await;
    assert_eq!(event(&mut own_updates).await.event_id, invite);
    let told = event(&mut own_updates).await;
    assert_eq!((told.event_type.as_str(), told.may_mention_room), ("org.matrix.msc4310.rtc.decline", false));
    assert_eq!(event(&mut updates).await.event_type, "org.matrix.msc4310.rtc.decline");
    let relation = json!({"m.relates_to": {"rel_type": "m.annotation", "event_id": invite, "key": "🖐️"}});
    let hand = send(&port, message("m.reaction", relation, None)).await;
    assert_eq!(event(&mut updates).await.event_id, hand);
    send(&port, MatrixRequest::Redact { event_id: hand.clone(), reason: None }).await;
    let told = event(&mut updates).await;
    assert_eq!((told.event_type.as_str(), told.redacts), ("m.room.redaction", Some(hand)));
}

#[tokio::test(flavor = "multi_thread")]
async fn members_slots_and_encryption_are_in_the_view() {
    let homeserver = homeserver().await;
    let (alice, bob) = (User::new(&homeserver, "alice").await, User::new(&homeserver, "bob").await);
    let room = alice.create_room(false, &[&bob]).await;
    let bobs = bob.port(&room);
    let mut updates = bobs.updates().await;
    let view = bobs.room_view().await.unwrap();
    assert_eq!((view.joined.len(), view.encrypted, view.version.as_str()), (2, false, "12"));
    let client = alice.room(&room);
    client
        .send_state_event_raw("org.matrix.msc4143.rtc.slot", "m.call#ROOM", json!({"status": "open"}))
        .await
        .unwrap();
    let slot = view_until(&bobs, &mut updates, |view| view.slots.first().cloned()).await;
    assert_eq!((slot.slot_id.as_str(), slot.content), ("m.call#ROOM", json!({"status": "open"})));
    client.enable_encryption().await.unwrap();
    view_until(&bobs, &mut updates, |view| view.encrypted.then_some(())).await;
    client.leave().await.unwrap();
    view_until(&bobs, &mut updates, |view| (view.joined.len() == 1).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn trouble_with_the_sync_and_its_end_are_told() {
    let homeserver = homeserver().await;
    let alice = User::new(&homeserver, "alice").await;
    let room = alice.create_room(false, &[]).await;
    let port = alice.port(&room);
    let mut updates = port.updates().await;
    // So that the port itself asks no more for now.
    port.room_view().await.unwrap();
    // matrix-sdk tries three times before it tells.
    homeserver.faults().fail("GET /_matrix/client/v3/sync", 3, 503);
    // The waiting sync has to return first.
    send(&port, message("m.room.message", json!({"body": "x", "msgtype": "m.text"}), None)).await;
    for wanted in [false, true] {
        next(&mut updates, |update| (update == MatrixUpdate::Syncing(wanted)).then_some(())).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn dropped_receiver_ends_the_listener() {
    let homeserver = homeserver().await;
    let alice = User::new(&homeserver, "alice").await;
    let room = alice.create_room(false, &[]).await;
    let port = alice.port(&room);
    drop(port.updates().await);
    let mut again = port.updates().await;
    send(&port, message("m.reaction", json!({"x": 1}), None)).await;
    event(&mut again).await;
}
