use matrix_sdk::{
    deserialized_responses::EncryptionInfo,
    ruma::events::room::message::{OriginalSyncRoomMessageEvent, RoomMessageEventContent},
};
use tokio::sync::mpsc;

use super::support::{anonymous, client, encrypted_room, homeserver, sync_until};

#[tokio::test]
async fn two_clients_talk_in_an_encrypted_room() {
    let homeserver = homeserver().await;
    let (alice, bob) = (client(&homeserver, "alice").await, client(&homeserver, "bob").await);
    let (to_bob, _) = encrypted_room(&alice, &bob).await;

    let (heard, mut hears) = mpsc::channel(16);
    bob.add_event_handler(move |event: OriginalSyncRoomMessageEvent, info: Option<EncryptionInfo>| {
        let heard = heard.clone();
        async move { heard.try_send((event.content.body().to_owned(), info.map(|info| info.sender))).unwrap() }
    });
    let sent = to_bob.send(RoomMessageEventContent::text_plain("hello bob")).await.unwrap();
    let (body, sender) = sync_until(&bob, async |_| hears.try_recv().ok()).await;
    assert_eq!(body, "hello bob");
    assert_eq!(sender.as_deref(), alice.user_id(), "the message came encrypted");

    let on_server = to_bob.event(&sent.response.event_id, None).await.unwrap();
    assert!(on_server.encryption_info().is_some(), "the server holds ciphertext");
}

#[tokio::test]
async fn a_second_login_of_the_same_user_is_another_device_that_the_others_see() {
    let homeserver = homeserver().await;
    let (alice, bob) = (client(&homeserver, "alice").await, client(&homeserver, "bob").await);
    encrypted_room(&alice, &bob).await;
    let second = anonymous(&homeserver).await;
    second.matrix_auth().login_username("bob", "pw").device_id("SECOND").send().await.unwrap();
    sync_until(&second, async |second| second.joined_rooms().first().map(|_| ())).await;
    sync_until(&alice, async |alice| {
        let device = alice.encryption().get_device(bob.user_id()?, "SECOND".into()).await.unwrap()?;
        assert!(!device.is_cross_signed_by_owner(), "nobody has signed it");
        Some(())
    })
    .await;

    second.matrix_auth().logout().await.unwrap();
    sync_until(&alice, async |alice| {
        let gone = alice.encryption().get_device(bob.user_id()?, "SECOND".into()).await.unwrap().is_none();
        gone.then_some(())
    })
    .await;
}
