//! Clients for the tests, and waiting with a deadline.

use std::time::Duration;

use antiphon_testkit::homeserver::{DevHomeserver, Options};
use matrix_sdk::{
    Client, Room,
    config::SyncSettings,
    encryption::EncryptionSettings,
    ruma::{
        RoomId,
        api::client::{
            account::register,
            room::create_room,
            uiaa::{AuthData, Dummy},
        },
        events::{InitialStateEvent, room::encryption::RoomEncryptionEventContent},
        serde::Raw,
    },
};
use serde_json::{Value, json};

pub(super) const MEMBER: &str = "org.matrix.msc3401.call.member";

/// Long enough for a busy machine; a test that needs it all has failed.
pub(super) const DEADLINE: Duration = Duration::from_secs(60);

pub(super) async fn homeserver() -> DevHomeserver {
    DevHomeserver::start(Options::default()).await.unwrap()
}

/// An unmodified matrix-sdk client with its store in memory, not logged in.
pub(super) async fn anonymous(homeserver: &DevHomeserver) -> Client {
    let encryption = EncryptionSettings { auto_enable_cross_signing: false, ..Default::default() };
    Client::builder()
        .homeserver_url(homeserver.url())
        .with_encryption_settings(encryption)
        .build()
        .await
        .unwrap()
}

/// Registered over the wire, with an identity of its own.
pub(super) async fn client(homeserver: &DevHomeserver, name: &str) -> Client {
    let client = anonymous(homeserver).await;
    let mut request = register::v3::Request::new();
    request.username = Some(name.to_owned());
    request.password = Some("pw".to_owned());
    request.device_id = Some(format!("{}DEVICE", name.to_uppercase()).into());
    request.auth = Some(AuthData::Dummy(Dummy::new()));
    client.matrix_auth().register(request).await.unwrap();
    client.encryption().bootstrap_cross_signing(None).await.unwrap();
    client
}

/// Syncs until `done` finds what it looks for.
pub(super) async fn sync_until<T>(client: &Client, mut done: impl AsyncFnMut(&Client) -> Option<T>) -> T {
    let settings = || SyncSettings::new().timeout(Duration::from_secs(10));
    let found = async {
        loop {
            if let Some(found) = done(client).await {
                return found;
            }
            client.sync_once(settings()).await.unwrap();
        }
    };
    tokio::time::timeout(DEADLINE, found).await.expect("what the test waits for did not come")
}

/// An encrypted room of two in which everybody may be in a call; both have seen each other.
pub(super) async fn encrypted_room(alice: &Client, bob: &Client) -> (Room, Room) {
    let mut request = create_room::v3::Request::new();
    request.preset = Some(create_room::v3::RoomPreset::PrivateChat);
    request.invite = vec![bob.user_id().unwrap().to_owned()];
    let encryption = RoomEncryptionEventContent::with_recommended_defaults();
    request.initial_state = vec![InitialStateEvent::with_empty_state_key(encryption).to_raw_any()];
    let levels = json!({"events": {MEMBER: 0}});
    request.power_level_content_override = Some(Raw::from_json_string(levels.to_string()).unwrap());
    let room_id = alice.create_room(request).await.unwrap().room_id().to_owned();
    sync_until(bob, async |bob| bob.invited_rooms().into_iter().find(|room| room.room_id() == room_id)).await;
    bob.join_room_by_id(&room_id).await.unwrap();
    for client in [alice, bob] {
        sync_until(client, async |client| {
            let room = client.get_room(&room_id)?;
            let is_complete = room.joined_members_count() == 2 && room.encryption_state().is_encrypted();
            is_complete.then_some(())
        })
        .await;
    }
    (joined(alice, &room_id), joined(bob, &room_id))
}

fn joined(client: &Client, room: &RoomId) -> Room {
    client.get_room(room).unwrap()
}

/// A plain HTTP request to the client API: the status and the body.
pub(super) async fn call(request: reqwest::RequestBuilder) -> (u16, Value) {
    let response = tokio::time::timeout(DEADLINE, request.send()).await.expect("no answer").unwrap();
    let status = response.status().as_u16();
    (status, response.json().await.unwrap_or(Value::Null))
}
