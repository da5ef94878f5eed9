//! A redacted state membership is empty in the view, whatever hid the redaction.

use antiphon_call_sdk::{
    Session,
    matrix::{
        EventTarget, EventWrite, MatrixPort as _, MatrixRequest, MatrixUpdate, MemberEvent, TrustPolicy,
        sdk::SdkRoom,
    },
};
use matrix_sdk::ruma::{OwnedEventId, UserId};
use serde_json::json;
use tokio::sync::mpsc;

use super::support::{STATE_MEMBER, User, homeserver, message, send, view_until};

/// A key that names no user, which ruma refuses to read.
const UNREADABLE_KEY: &str = "_@alice_DEVICE_m.call";

async fn join_state(port: &SdkRoom, key: &str) -> OwnedEventId {
    let content = json!({ "application": "m.call", "call_id": "", "scope": "m.room", "device_id": "DEVICE",
        "membershipID": "one", "expires": 14_400_000, "foci_preferred": [],
        "focus_active": { "type": "livekit", "focus_selection": "multi_sfu" } });
    let target = EventTarget::State { key: key.to_owned() };
    send(port, MatrixRequest::Send(EventWrite { event_type: STATE_MEMBER.to_owned(), target, content })).await
}

async fn redact(port: &SdkRoom, event_id: &OwnedEventId) {
    send(port, MatrixRequest::Redact { event_id: event_id.clone(), reason: None }).await;
}

async fn until_present(port: &SdkRoom, updates: &mut mpsc::Receiver<MatrixUpdate>) {
    view_until(port, updates, |view| (view.members.len() == 1).then_some(())).await;
}

async fn until_redacted(port: &SdkRoom, updates: &mut mpsc::Receiver<MatrixUpdate>) -> MemberEvent {
    view_until(port, updates, |view| view.members.iter().find(|m| m.redacted_by.is_some()).cloned()).await
}

/// More events than one answer to a sync holds.
async fn fill_the_timeline(port: &SdkRoom) {
    for n in 0..60 {
        send(port, message("m.room.message", json!({"msgtype": "m.text", "body": n.to_string()}), None))
            .await;
    }
}

fn assert_emptied(seen: &MemberEvent, event_id: &OwnedEventId, by: &UserId) {
    assert_eq!(seen.event_id.as_ref(), Some(event_id));
    assert_eq!((&seen.content, seen.redacted_by.as_deref()), (&json!({}), Some(by)));
}

#[tokio::test(flavor = "multi_thread")]
async fn redacted_state_membership_is_emptied() {
    let homeserver = homeserver().await;
    let (alice, bob) = (User::new(&homeserver, "alice").await, User::new(&homeserver, "bob").await);
    check_redacted_state_membership(&alice, &bob).await;
}

/// Alice redacts Bob's membership; both are told.
pub(super) async fn check_redacted_state_membership(alice: &User, bob: &User) {
    let room = alice.create_room(true, &[bob]).await;
    let (port, bobs) = (alice.port(&room), bob.port(&room));
    let (mut updates, mut bobs_updates) = (port.updates().await, bobs.updates().await);
    let client = bob.session.client();
    let event_id = join_state(&bobs, &format!("_{}_DEVICE_m.call", client.user_id().unwrap())).await;
    until_present(&port, &mut updates).await;
    until_present(&bobs, &mut bobs_updates).await;
    redact(&port, &event_id).await;
    for (port, updates) in [(&port, &mut updates), (&bobs, &mut bobs_updates)] {
        let seen = until_redacted(port, updates).await;
        assert_emptied(&seen, &event_id, alice.session.client().user_id().unwrap());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn gap_in_the_timeline_does_not_hide_the_redaction() {
    let homeserver = homeserver().await;
    let (alice, bob) = (User::new(&homeserver, "alice").await, User::new(&homeserver, "bob").await);
    let room = alice.create_room(true, &[&bob]).await;
    let (port, bobs) = (alice.port(&room), bob.port(&room));
    let alices_id = alice.session.client().user_id().unwrap().to_owned();
    let mut updates = bobs.updates().await;
    let event_id = join_state(&port, &format!("_{alices_id}_DEVICE_m.call")).await;
    until_present(&bobs, &mut updates).await;
    // Bob's sync hangs while more happens than one answer holds.
    homeserver.faults().fail("GET /_matrix/client/v3/sync", 4, 503);
    redact(&port, &event_id).await;
    fill_the_timeline(&port).await;
    assert_emptied(&until_redacted(&bobs, &mut updates).await, &event_id, &alices_id);
}

#[tokio::test(flavor = "multi_thread")]
async fn absence_does_not_hide_the_redaction() {
    let homeserver = homeserver().await;
    let (alice, bob) = (User::new(&homeserver, "alice").await, User::new(&homeserver, "bob").await);
    check_redaction_while_away(&alice, bob).await;
}

/// Alice redacts her membership while Bob is away, and more happens than his first sync holds.
pub(super) async fn check_redaction_while_away(alice: &User, bob: User) {
    let room = alice.create_room(true, &[&bob]).await;
    let (port, bobs) = (alice.port(&room), bob.port(&room));
    let alices_id = alice.session.client().user_id().unwrap().to_owned();
    let mut updates = bobs.updates().await;
    let event_id = join_state(&port, &format!("_{alices_id}_DEVICE_m.call")).await;
    until_present(&bobs, &mut updates).await;
    drop((bobs, updates));
    let User { session, folder: _folder, options } = bob;
    drop(session);
    redact(&port, &event_id).await;
    fill_the_timeline(&port).await;
    let session = Session::log_in_or_restore(options).await.unwrap();
    let view = session.room(&room, TrustPolicy::CrossSigned).unwrap().room_view().await.unwrap();
    assert_emptied(&view.members[0], &event_id, &alices_id);
}

#[tokio::test(flavor = "multi_thread")]
async fn redaction_of_unreadable_state_does_not_stop_the_sync() {
    let homeserver = homeserver().await;
    let (alice, bob) = (User::new(&homeserver, "alice").await, User::new(&homeserver, "bob").await);
    check_redacted_unreadable_state(&alice, bob).await;
}

/// Alice redacts a membership that ruma cannot read, while Bob syncs and while he is away.
pub(super) async fn check_redacted_unreadable_state(alice: &User, bob: User) {
    let room = alice.create_room(true, &[&bob]).await;
    let (port, bobs) = (alice.port(&room), bob.port(&room));
    let alices_id = alice.session.client().user_id().unwrap().to_owned();
    let mut updates = bobs.updates().await;
    let event_id = join_state(&port, UNREADABLE_KEY).await;
    until_present(&bobs, &mut updates).await;
    redact(&port, &event_id).await;
    assert_emptied(&until_redacted(&bobs, &mut updates).await, &event_id, &alices_id);

    let again = join_state(&port, UNREADABLE_KEY).await;
    view_until(&bobs, &mut updates, |view| view.members[0].redacted_by.is_none().then_some(())).await;
    drop((bobs, updates));
    let User { session, folder: _folder, options } = bob;
    drop(session);
    redact(&port, &again).await;
    let session = Session::log_in_or_restore(options).await.unwrap();
    let bobs = session.room(&room, TrustPolicy::CrossSigned).unwrap();
    let view = bobs.room_view().await.unwrap();
    assert_emptied(&view.members[0], &again, &alices_id);
    assert!(*session.syncing().borrow());
}
