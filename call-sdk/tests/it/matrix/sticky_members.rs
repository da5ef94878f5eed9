//! Sticky memberships arrive with their stickiness, encrypted or not, early or late.

use antiphon_call_sdk::{
    UnixMillis,
    matrix::{
        EventTarget, EventWrite, MatrixPort as _, MatrixRequest, RequestError, TrustPolicy, sdk::SdkRoom,
    },
};
use serde_json::json;

use super::support::{
    HOUR, STICKY_MEMBER, User, homeserver, join_sticky, member, message, on_the_wire, refused, send,
    sticky_members, view_until,
};

#[tokio::test(flavor = "multi_thread")]
async fn encrypted_membership_is_seen_with_device_and_stickiness() {
    let homeserver = homeserver().await;
    let (alice, bob) = (User::new(&homeserver, "alice").await, User::new(&homeserver, "bob").await);
    check_encrypted_membership(&alice, &bob).await;
}

/// Alice joins; Bob sees it at once, and again as a late listener.
pub(super) async fn check_encrypted_membership(alice: &User, bob: &User) {
    let room = alice.create_room(true, &[bob]).await;
    let (port, bobs) = (alice.port(&room), bob.port(&room));
    let mut updates = bobs.updates().await;
    let mut own_updates = port.updates().await;
    let event_id = join_sticky(&port, "one").await;

    let wire = on_the_wire(alice, &room, &event_id).await;
    assert_eq!(wire["type"], "m.room.encrypted");
    assert_eq!(wire["msc4354_sticky"], json!({"duration_ms": 3_600_000}));
    let sent = wire["origin_server_ts"].as_u64().unwrap();
    for (port, updates) in [(&bobs, &mut updates), (&port, &mut own_updates)] {
        let seen =
            view_until(port, updates, |view| sticky_members(view).first().map(|member| (*member).clone()))
                .await;
        assert_eq!(seen.event_id.as_ref(), Some(&event_id));
        assert!(seen.encrypted);
        assert_eq!(seen.sender, alice.session.client().user_id().unwrap());
        assert_eq!(seen.sender_device.as_deref(), alice.session.client().device_id());
        assert_eq!(seen.content, member("one"));
        assert_eq!(seen.sticky_rank, UnixMillis(sent + 3_600_000));
        let until = seen.sticky_until.unwrap().0;
        assert!((sent + 3_500_000..=sent + 3_660_000).contains(&until), "{until} for {sent}");
    }

    // Out of the timeline, and then changed: each view without a listener looks anew.
    for n in 0..5 {
        send(&port, message("m.room.message", json!({"msgtype": "m.text", "body": n.to_string()}), None))
            .await;
    }
    let late = bob.port(&room);
    for events in 1..=2 {
        let view = late.room_view().await.unwrap();
        let seen = sticky_members(&view);
        assert_eq!(seen.len(), events);
        assert!(seen.iter().all(|member| member.sticky_until.is_some() && member.encrypted));
        assert!(seen.iter().all(|m| m.sender_device.as_deref() == alice.session.client().device_id()));
        join_sticky(&port, "two").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn plain_room_and_clear_leave_are_told_apart_from_encryption() {
    let homeserver = homeserver().await;
    let alice = User::new(&homeserver, "alice").await;
    let plain = alice.port(&alice.create_room(false, &[]).await);
    let mut updates = plain.updates().await;
    join_sticky(&plain, "one").await;
    let seen =
        view_until(&plain, &mut updates, |view| sticky_members(view).first().map(|m| (*m).clone())).await;
    assert!(!seen.encrypted && seen.sticky_until.is_some());

    let encrypted = alice.port(&alice.create_room(true, &[]).await);
    let mut updates = encrypted.updates().await;
    let target = EventTarget::ClearMessage { sticky: Some(HOUR) };
    let leave =
        EventWrite { event_type: STICKY_MEMBER.into(), target, content: json!({"sticky_key": "one"}) };
    send(&encrypted, MatrixRequest::Send(leave)).await;
    let seen =
        view_until(&encrypted, &mut updates, |view| sticky_members(view).first().map(|m| (*m).clone())).await;
    assert!(!seen.encrypted);
}

#[tokio::test(flavor = "multi_thread")]
async fn late_room_key_makes_a_membership_readable() {
    let homeserver = homeserver().await;
    let (alice, bob) = (User::new(&homeserver, "alice").await, User::new(&homeserver, "bob").await);
    let room = alice.create_room(true, &[&bob]).await;
    let bobs = bob.port(&room);
    let mut updates = bobs.updates().await;
    assert_eq!(sticky_members(&bobs.room_view().await.unwrap()).len(), 0);

    homeserver.faults().drop_to_device_for(
        "m.room.encrypted",
        bob.session.client().user_id().unwrap().as_str(),
        1,
    );
    join_sticky(&alice.port(&room), "one").await;
    assert_eq!(homeserver.faults().outstanding(), 0, "Bob has no key");
    // A later event in clear shows that Bob has synced the first.
    let target = EventTarget::ClearMessage { sticky: Some(HOUR) };
    let leave =
        EventWrite { event_type: STICKY_MEMBER.into(), target, content: json!({"sticky_key": "two"}) };
    send(&alice.port(&room), MatrixRequest::Send(leave)).await;
    view_until(&bobs, &mut updates, |view| (sticky_members(view).len() == 1).then_some(())).await;

    let file = alice.folder.path().join("keys");
    alice.session.client().encryption().export_room_keys(file.clone(), "phrase", |_| true).await.unwrap();
    bob.session.client().encryption().import_room_keys(file, "phrase").await.unwrap();
    let seen = view_until(&bobs, &mut updates, |view| {
        sticky_members(view).into_iter().find(|member| member.encrypted).cloned()
    })
    .await;
    assert_eq!(seen.content, member("one"));
    assert_eq!(seen.sender_device, None, "an imported key does not tell whose device it was");
}

#[tokio::test(flavor = "multi_thread")]
async fn redacted_membership_is_emptied() {
    let homeserver = homeserver().await;
    let (alice, bob) = (User::new(&homeserver, "alice").await, User::new(&homeserver, "bob").await);
    let room = alice.create_room(true, &[&bob]).await;
    let (port, bobs) = (alice.port(&room), bob.port(&room));
    let mut updates = bobs.updates().await;
    let event_id = join_sticky(&port, "one").await;
    view_until(&bobs, &mut updates, |view| (sticky_members(view).len() == 1).then_some(())).await;
    send(&port, MatrixRequest::Redact { event_id: event_id.clone(), reason: Some("out".to_owned()) }).await;
    let seen = view_until(&bobs, &mut updates, |view| {
        sticky_members(view).into_iter().find(|member| member.redacted_by.is_some()).cloned()
    })
    .await;
    assert_eq!((seen.event_id, seen.content), (Some(event_id), json!({})));
    assert_eq!(seen.redacted_by.as_deref(), alice.session.client().user_id());
}

#[tokio::test(flavor = "multi_thread")]
async fn gap_in_the_timeline_hides_neither_membership_nor_redaction() {
    let homeserver = homeserver().await;
    let (alice, bob) = (User::new(&homeserver, "alice").await, User::new(&homeserver, "bob").await);
    let room = alice.create_room(true, &[&bob]).await;
    let (port, bobs) = (alice.port(&room), bob.port(&room));
    let mut updates = bobs.updates().await;
    let first = join_sticky(&port, "one").await;
    view_until(&bobs, &mut updates, |view| (sticky_members(view).len() == 1).then_some(())).await;
    // Bob's sync hangs while more happens than one answer holds.
    homeserver.faults().fail("GET /_matrix/client/v3/sync", 4, 503);
    send(&port, MatrixRequest::Redact { event_id: first, reason: None }).await;
    join_sticky(&port, "two").await;
    for n in 0..60 {
        send(&port, message("m.room.message", json!({"msgtype": "m.text", "body": n.to_string()}), None))
            .await;
    }
    let (redacted, joined) = view_until(&bobs, &mut updates, |view| {
        let members = sticky_members(view);
        let (redacted, joined) = members.into_iter().partition::<Vec<_>, _>(|m| m.redacted_by.is_some());
        Some((redacted.first().copied()?.clone(), joined.first().copied()?.clone()))
    })
    .await;
    assert_eq!((redacted.content, joined.content), (json!({}), member("two")));
}

#[tokio::test(flavor = "multi_thread")]
async fn client_of_another_making_cannot_send_encrypted_sticky_events() {
    let homeserver = homeserver().await;
    let alice = User::new(&homeserver, "alice").await;
    let room = alice.create_room(true, &[]).await;
    let port = SdkRoom::new(alice.room(&room), TrustPolicy::CrossSigned).unwrap();
    let error = refused(&port, message(STICKY_MEMBER, member("one"), Some(HOUR))).await;
    assert!(matches!(error, RequestError::Local { .. }), "{error:?}");
    let event_id = send(&port, message(STICKY_MEMBER, member("one"), None)).await;
    assert_eq!(on_the_wire(&alice, &room, &event_id).await["type"], "m.room.encrypted");
}
