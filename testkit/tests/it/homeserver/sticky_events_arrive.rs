use matrix_sdk::ruma::{
    TransactionId,
    api::client::message::send_message_event,
    events::{AnyMessageLikeEventContent, AnySyncTimelineEvent, sticky::StickyDurationMs},
    serde::Raw,
};
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::support::{call, client, encrypted_room, homeserver, sync_until};

const MEMBER: &str = "org.matrix.msc4143.rtc.member";

#[tokio::test]
async fn a_sticky_event_arrives_with_what_is_left_of_its_time() {
    let homeserver = homeserver().await;
    let (alice, bob) = (client(&homeserver, "alice").await, client(&homeserver, "bob").await);
    let (room, _) = encrypted_room(&alice, &bob).await;
    let (seen, mut sees) = mpsc::channel(16);
    bob.add_event_handler(move |raw: Raw<AnySyncTimelineEvent>| {
        let seen = seen.clone();
        async move {
            let event: Value = raw.deserialize_as_unchecked().unwrap();
            if event["type"] == MEMBER {
                seen.try_send(event).unwrap();
            }
        }
    });

    let content = json!({"slot_id": "m.call#ROOM", "msc4354_sticky_key": "one"});
    let mut request = send_message_event::v3::Request::new_raw(
        room.room_id().to_owned(),
        TransactionId::new(),
        MEMBER.into(),
        Raw::<AnyMessageLikeEventContent>::from_json_string(content.to_string()).unwrap(),
    );
    request.sticky_duration_ms = Some(StickyDurationMs::new_clamped(600_000u64));
    alice.send(request).await.unwrap();
    let event = sync_until(&bob, async |_| sees.try_recv().ok()).await;
    assert_eq!(event["content"], content);
    assert_eq!(event["msc4354_sticky"], json!({"duration_ms": 600_000}));
    let left = event["unsigned"]["msc4354_sticky_duration_ttl_ms"].as_u64().unwrap();
    assert!((1..=600_000).contains(&left), "{left}");

    // Pushed out of the timeline, it has a section of its own.
    for n in 0..3 {
        room.send_raw("m.other", json!({"n": n})).await.unwrap();
    }
    let session = bob.matrix_auth().session().unwrap();
    let filter = "%7B%22room%22:%7B%22timeline%22:%7B%22limit%22:2%7D%7D%7D"; // {"room":{"timeline":{"limit":2}}}
    let url = format!("{}/_matrix/client/v3/sync?filter={filter}", homeserver.url());
    let sync = reqwest::Client::new().get(url).bearer_auth(&session.tokens.access_token);
    let (status, answer) = call(sync).await;
    assert_eq!(status, 200);
    let joined = &answer["rooms"]["join"][room.room_id().as_str()];
    assert_eq!(joined["msc4354_sticky"]["events"][0]["content"], content);
}
