use matrix_sdk::{
    Client,
    deserialized_responses::EncryptionInfo,
    encryption::identities::Device,
    ruma::{
        events::{AnyToDeviceEvent, AnyToDeviceEventContent},
        serde::Raw,
    },
};
use matrix_sdk_base::crypto::CollectStrategy;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::support::{client, encrypted_room, homeserver, sync_until};

const KEYS: &str = "io.element.call.encryption_keys";

#[tokio::test]
async fn a_custom_message_reaches_a_cross_signed_device_encrypted() {
    let homeserver = homeserver().await;
    let (alice, bob) = (client(&homeserver, "alice").await, client(&homeserver, "bob").await);
    encrypted_room(&alice, &bob).await;
    let device = signed_device(&alice, &bob).await;
    let mut keys = listen(&bob);

    send(&alice, &device, 1).await;
    let (content, info) = sync_until(&bob, async |_| keys.try_recv().ok()).await;
    assert_eq!(content, json!({"n": 1}));
    let info = info.expect("Olm-encrypted");
    assert_eq!(info.sender, alice.user_id().unwrap());
    assert_eq!(info.sender_device.as_deref(), alice.device_id());
}

#[tokio::test]
async fn a_dropped_message_vanishes_and_the_next_arrives() {
    let homeserver = homeserver().await;
    let (alice, bob) = (client(&homeserver, "alice").await, client(&homeserver, "bob").await);
    encrypted_room(&alice, &bob).await;
    let device = signed_device(&alice, &bob).await;
    let mut keys = listen(&bob);

    homeserver.faults().drop_to_device_for("m.room.encrypted", bob.user_id().unwrap().as_str(), 1);
    send(&alice, &device, 1).await;
    assert_eq!(homeserver.faults().outstanding(), 0);
    send(&alice, &device, 2).await;
    let (content, _) = sync_until(&bob, async |_| keys.try_recv().ok()).await;
    assert_eq!(content, json!({"n": 2}));
}

async fn signed_device(alice: &Client, bob: &Client) -> Device {
    let (user, id) = (bob.user_id().unwrap(), bob.device_id().unwrap());
    // Their own signatures show up with the answer to the next key query.
    sync_until(alice, async |alice| {
        let own = alice.encryption().get_own_device().await.unwrap()?;
        let device = alice.encryption().get_device(user, id).await.unwrap()?;
        (own.is_cross_signed_by_owner() && device.is_cross_signed_by_owner()).then_some(device)
    })
    .await
}

async fn send(from: &Client, to: &Device, n: u32) {
    let content = Raw::<AnyToDeviceEventContent>::from_json_string(json!({"n": n}).to_string()).unwrap();
    let encryption = from.encryption();
    let failed = encryption.encrypt_and_send_raw_to_device(
        vec![to],
        KEYS,
        content,
        CollectStrategy::IdentityBasedStrategy,
    );
    assert_eq!(failed.await.unwrap(), []);
}

fn listen(client: &Client) -> mpsc::Receiver<(Value, Option<EncryptionInfo>)> {
    let (heard, hears) = mpsc::channel(16);
    client.add_event_handler(move |raw: Raw<AnyToDeviceEvent>, info: Option<EncryptionInfo>| {
        let heard = heard.clone();
        async move {
            if raw.get_field::<String>("type").unwrap().as_deref() == Some(KEYS) {
                heard.try_send((raw.get_field("content").unwrap().unwrap(), info)).unwrap();
            }
        }
    });
    hears
}
