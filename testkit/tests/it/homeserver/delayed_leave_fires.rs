use std::time::Duration;

use matrix_sdk::{
    Client, Room,
    ruma::{
        api::client::delayed_events::{
            DelayParameters, delayed_state_event, get_all_delayed_events,
            update_delayed_event::{UpdateAction, unstable_v1, unstable_v2},
        },
        events::{AnyStateEventContent, AnySyncStateEvent},
        serde::Raw,
    },
};
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::support::{MEMBER, client, encrypted_room, homeserver, sync_until};

const KEY: &str = "_@alice_ALICEDEVICE_m.call";

#[tokio::test]
async fn a_delayed_leave_fires_unless_restarted_or_cancelled() {
    let homeserver = homeserver().await;
    let (alice, bob) = (client(&homeserver, "alice").await, client(&homeserver, "bob").await);
    let (room, _) = encrypted_room(&alice, &bob).await;
    let (seen, mut sees) = mpsc::channel(16);
    bob.add_event_handler(move |raw: Raw<AnySyncStateEvent>| {
        let seen = seen.clone();
        async move {
            if raw.get_field::<String>("type").unwrap().as_deref() == Some(MEMBER) {
                seen.try_send(raw.get_field::<Value>("content").unwrap().unwrap()).unwrap();
            }
        }
    });

    let member = json!({"application": "m.call", "device_id": "ALICEDEVICE"});
    room.send_state_event_raw(MEMBER, KEY, member.clone()).await.unwrap();
    assert_eq!(sync_until(&bob, async |_| sees.try_recv().ok()).await, member);

    // Cancelled: gone from the list, and nothing to restart.
    let cancelled = schedule(&room, Duration::from_secs(3600)).await;
    let request = unstable_v1::Request::new(cancelled.clone(), UpdateAction::Cancel);
    alice.send(request).await.unwrap();
    assert_eq!(scheduled(&alice).await, []);
    let restart = unstable_v2::Request::new(cancelled, UpdateAction::Restart);
    let refusal = alice.send(restart).await.unwrap_err();
    assert_eq!(refusal.as_client_api_error().unwrap().status_code, 404);

    // Restarted: counts from now.
    let kept = schedule(&room, Duration::from_secs(3600)).await;
    let [(id, began)] = scheduled(&alice).await.try_into().unwrap();
    assert_eq!(id, kept);
    for by_path in [false, true] {
        let restarted = async {
            loop {
                match by_path {
                    true => drop(
                        alice
                            .send(unstable_v2::Request::new(kept.clone(), UpdateAction::Restart))
                            .await
                            .unwrap(),
                    ),
                    false => drop(
                        alice
                            .send(unstable_v1::Request::new(kept.clone(), UpdateAction::Restart))
                            .await
                            .unwrap(),
                    ),
                }
                if scheduled(&alice).await[0].1 > began {
                    return;
                }
            }
        };
        tokio::time::timeout(super::support::DEADLINE, restarted)
            .await
            .expect("a restart moves the beginning");
    }

    // Left alone: fires, and the other member sees it.
    schedule(&room, Duration::from_millis(500)).await;
    assert_eq!(sync_until(&bob, async |_| sees.try_recv().ok()).await, json!({}));
    assert_eq!(scheduled(&alice).await.len(), 1, "the restarted one goes on waiting");

    // Sent at once.
    room.send_state_event_raw(MEMBER, KEY, member.clone()).await.unwrap();
    assert_eq!(sync_until(&bob, async |_| sees.try_recv().ok()).await, member);
    alice.send(unstable_v2::Request::new(kept, UpdateAction::Send)).await.unwrap();
    assert_eq!(sync_until(&bob, async |_| sees.try_recv().ok()).await, json!({}));
}

async fn schedule(room: &Room, timeout: Duration) -> String {
    let leave = delayed_state_event::unstable::Request::new_raw(
        room.room_id().to_owned(),
        KEY.to_owned(),
        MEMBER.into(),
        DelayParameters::Timeout { timeout },
        Raw::<AnyStateEventContent>::from_json_string("{}".to_owned()).unwrap(),
    );
    room.client().send(leave).await.unwrap().delay_id
}

/// Delay ids and when their delay began.
async fn scheduled(client: &Client) -> Vec<(String, u64)> {
    let answer = client.send(get_all_delayed_events::unstable::Request::new()).await.unwrap();
    answer
        .delayed_events
        .into_iter()
        .map(|event| (event.delay_id, event.running_since.get().into()))
        .collect()
}
