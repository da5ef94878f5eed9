//! RoomService over Twirp: with LiveKit's own client, and by hand in JSON.

use antiphon_focus::FocusHandle;
use livekit_api::services::room::{CreateRoomOptions, RoomClient, UpdateParticipantOptions};
use livekit_protocol::{DisconnectReason, signal_response::Message as Down};
use serde_json::{Value, json};

use crate::support::client::{Client, focus};
use crate::support::{ROOM, token};

fn admin(focus: &FocusHandle) -> RoomClient {
    let http = focus.ws_url().replacen("ws", "http", 1);
    RoomClient::with_api_key(&http, "devkey", "secret").with_failover(false)
}

async fn json_call(focus: &FocusHandle, method: &str, token: &str, body: &str) -> (u16, Value) {
    let url = format!("http://{}/twirp/livekit.RoomService/{method}", focus.http_addr());
    let response = reqwest::Client::new()
        .post(url)
        .bearer_auth(token)
        .header("content-type", "application/json")
        .body(body.to_owned())
        .send()
        .await
        .unwrap();
    (response.status().as_u16(), response.json().await.unwrap())
}

#[tokio::test]
async fn livekits_own_client_manages_rooms_and_participants() {
    let focus = focus(|config| config.auto_create = false).await;
    let admin = admin(&focus);
    let options = CreateRoomOptions { empty_timeout: 60, metadata: "m".into(), ..Default::default() };
    let room = admin.create_room(ROOM, options).await.unwrap();
    assert!(room.sid.starts_with("RM_") && room.creation_time > 0);
    assert_eq!((room.empty_timeout, room.departure_timeout, room.metadata.as_str()), (60, 20, "m"));
    let again = admin.create_room(ROOM, CreateRoomOptions::default()).await.unwrap();
    assert_eq!((again.sid, again.empty_timeout), (room.sid, 60));

    let (mut alice, _) = Client::join(&focus, "alice").await;
    let (mut bob, _) = Client::join(&focus, "bob").await;
    assert_eq!(admin.list_rooms(vec![]).await.unwrap()[0].num_participants, 2);
    assert!(admin.list_rooms(vec!["other".into()]).await.unwrap().is_empty());
    assert_eq!(admin.list_participants(ROOM).await.unwrap().len(), 2);
    assert_eq!(admin.get_participant(ROOM, "bob").await.unwrap().identity, "bob");
    let options = UpdateParticipantOptions { name: "Bob".into(), ..Default::default() };
    assert_eq!(admin.update_participant(ROOM, "bob", options).await.unwrap().name, "Bob");

    admin.remove_participant(ROOM, "bob").await.unwrap();
    let reason = |message| match message {
        Down::Leave(leave) => Some(leave.reason()),
        _ => None,
    };
    assert_eq!(bob.expect(reason).await, DisconnectReason::ParticipantRemoved);
    let error = admin.get_participant(ROOM, "bob").await.unwrap_err().to_string();
    assert!(error.contains("participant does not exist"), "{error}");

    admin.delete_room(ROOM).await.unwrap();
    assert_eq!(alice.expect(reason).await, DisconnectReason::RoomDeleted);
    assert!(admin.list_rooms(vec![]).await.unwrap().is_empty());
    focus.shutdown().await;
}

#[tokio::test]
async fn json_is_spoken_too() {
    let focus = focus(|_| {}).await;
    let create = token("admin", |claims| claims.video.room_create = true);
    let (status, room) = json_call(&focus, "CreateRoom", &create, r#"{"name":"a","emptyTimeout":9}"#).await;
    assert_eq!(status, 200, "{room}");
    assert_eq!(room["emptyTimeout"], 9);
    assert!(room["creationTime"].is_string());
    let (_, room) = json_call(&focus, "CreateRoom", &create, r#"{"name":"b","empty_timeout":8}"#).await;
    assert_eq!(room["emptyTimeout"], 8);
    let list = token("admin", |claims| claims.video.room_list = true);
    let (_, rooms) = json_call(&focus, "ListRooms", &list, "{}").await;
    assert_eq!(rooms["rooms"].as_array().unwrap().len(), 2);
    focus.shutdown().await;
}

#[tokio::test]
async fn refusals_have_twirps_codes_and_statuses() {
    let focus = focus(|_| {}).await;
    let admin_of = |room: &str| {
        token("admin", |claims| {
            claims.video.room_admin = true;
            claims.video.room = room.into();
        })
    };
    let create = token("admin", |claims| claims.video.room_create = true);
    let plain = token("alice", |_| {});
    let good = admin_of(ROOM);
    let get = json!({"room": ROOM, "identity": "x"}).to_string();
    let cases: [(&str, &str, &str, u16, &str); 10] = [
        ("CreateRoom", &plain, r#"{"name":"r"}"#, 401, "unauthenticated"),
        ("CreateRoom", "nonsense", r#"{"name":"r"}"#, 401, "unauthenticated"),
        ("CreateRoom", &create, r#"{"name":""}"#, 400, "invalid_argument"),
        ("CreateRoom", &create, "{", 400, "malformed"),
        ("ListRooms", &create, "{}", 401, "unauthenticated"),
        ("GetParticipant", &good, &get, 404, "not_found"),
        ("GetParticipant", &admin_of("other"), &get, 401, "unauthenticated"),
        ("GetParticipant", &admin_of(""), r#"{"room":"","identity":"x"}"#, 401, "unauthenticated"),
        ("PerformRpc", &good, "{}", 501, "unimplemented"),
        ("Nothing", &good, "{}", 404, "bad_route"),
    ];
    for (method, token, body, status, code) in cases {
        let (got, error) = json_call(&focus, method, token, body).await;
        assert_eq!((got, &error["code"]), (status, &json!(code)), "{method} {body}: {error}");
        assert!(error["msg"].as_str().is_some_and(|msg| !msg.is_empty()));
    }
    assert_eq!(focus.stats().await.refused_admin, 10);

    let (_alice, _) = Client::join(&focus, "alice").await;
    let (status, error) = json_call(
        &focus,
        "MutePublishedTrack",
        &good,
        &json!({"room": ROOM, "identity": "alice", "trackSid": "TR_x", "muted": false}).to_string(),
    )
    .await;
    assert_eq!((status, &error["code"]), (412, &json!("failed_precondition")));
    focus.shutdown().await;
}

#[tokio::test]
async fn an_oversized_request_is_refused_unread() {
    let focus = focus(|_| {}).await;
    let create = token("admin", |claims| claims.video.room_create = true);
    let response = reqwest::Client::new()
        .post(format!("http://{}/twirp/livekit.RoomService/CreateRoom", focus.http_addr()))
        .bearer_auth(create)
        .header("content-type", "application/protobuf")
        .body(vec![0u8; 10 * 1024 * 1024 + 1])
        .send()
        .await
        .unwrap();
    assert_eq!(response.status(), 413);
    focus.shutdown().await;
}
