//! Sessions on a development homeserver, and waiting with a deadline.

use std::time::Duration;

use antiphon_call_sdk::{
    Session, SessionOptions,
    matrix::{
        EventTarget, EventWrite, MatrixPort, MatrixReply, MatrixRequest, MatrixUpdate, MemberEvent,
        RequestError, RoomView, TrustPolicy, sdk::SdkRoom,
    },
};
use antiphon_testkit::homeserver::{DevHomeserver, Options};
use matrix_sdk::{
    Room,
    ruma::{
        OwnedEventId, OwnedRoomId, RoomId,
        api::client::room::create_room,
        events::{InitialStateEvent, room::encryption::RoomEncryptionEventContent},
        serde::Raw,
    },
};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::sync::mpsc;

pub(super) const STICKY_MEMBER: &str = "org.matrix.msc4143.rtc.member";
pub(super) const STATE_MEMBER: &str = "org.matrix.msc3401.call.member";
pub(super) const HOUR: Duration = Duration::from_secs(3600);
pub(super) const LIMIT: Duration = Duration::from_secs(20);
/// Long enough for a busy machine; a test that needs it all has failed.
pub(super) const DEADLINE: Duration = Duration::from_secs(60);

pub(super) async fn homeserver() -> DevHomeserver {
    DevHomeserver::start(Options::default()).await.unwrap()
}

/// A session and the folder that it lives in.
pub(super) struct User {
    pub(super) session: Session,
    pub(super) folder: TempDir,
    pub(super) options: SessionOptions,
}

impl User {
    /// Registers the user and logs in.
    pub(super) async fn new(homeserver: &DevHomeserver, name: &str) -> Self {
        homeserver.register_user(name, "pw").unwrap();
        Self::log_in(homeserver.url(), name).await
    }

    pub(super) async fn log_in(url: &str, name: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let options = SessionOptions::new(url.parse().unwrap(), name, "pw", folder.path());
        let session = Session::log_in_or_restore(options.clone()).await.unwrap();
        Self { session, folder, options }
    }

    pub(super) fn port(&self, room: &RoomId) -> SdkRoom {
        self.session.room(room, TrustPolicy::CrossSigned).unwrap()
    }

    /// An encrypted or plain room with these users, in which every member may be in a call.
    pub(super) async fn create_room(&self, encrypted: bool, others: &[&Self]) -> OwnedRoomId {
        let mut request = create_room::v3::Request::new();
        request.preset = Some(create_room::v3::RoomPreset::PublicChat);
        if encrypted {
            let encryption = RoomEncryptionEventContent::with_recommended_defaults();
            request.initial_state = vec![InitialStateEvent::with_empty_state_key(encryption).to_raw_any()];
        }
        let levels = json!({"events": {STATE_MEMBER: 0, STICKY_MEMBER: 0}});
        request.power_level_content_override = Some(Raw::from_json_string(levels.to_string()).unwrap());
        let room_id = self.session.client().create_room(request).await.unwrap().room_id().to_owned();
        for other in others {
            other.session.client().join_room_by_id(&room_id).await.unwrap();
        }
        for user in others.iter().copied().chain([self]) {
            eventually("every user sees all members", async || {
                let room = user.session.client().get_room(&room_id)?;
                let is_complete = room.joined_members_count() == others.len() as u64 + 1;
                (is_complete && room.encryption_state().is_encrypted() == encrypted).then_some(())
            })
            .await;
        }
        room_id
    }

    pub(super) fn room(&self, room: &RoomId) -> Room {
        self.session.client().get_room(room).unwrap()
    }
}

/// Waits until `probe` finds something.
pub(super) async fn eventually<T>(what: &str, mut probe: impl AsyncFnMut() -> Option<T>) -> T {
    let found = async {
        loop {
            if let Some(found) = probe().await {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(DEADLINE, found).await.unwrap_or_else(|_| panic!("in vain: {what}"))
}

/// Reads the room whenever it is said to have changed, until `wanted` finds something.
pub(super) async fn view_until<T>(
    port: &SdkRoom,
    updates: &mut mpsc::Receiver<MatrixUpdate>,
    wanted: impl Fn(&RoomView) -> Option<T>,
) -> T {
    let mut last = None;
    let found = async {
        loop {
            let view = port.room_view().await.unwrap();
            if let Some(found) = wanted(&view) {
                return found;
            }
            last = Some(view);
            while updates.recv().await.expect("the port goes on") != MatrixUpdate::RoomChanged {}
        }
    };
    match tokio::time::timeout(DEADLINE, found).await {
        Ok(found) => found,
        Err(_) => panic!("the room never was as wanted: {last:#?}"),
    }
}

/// The next update of the wanted kind; others are passed over.
pub(super) async fn next<T>(
    updates: &mut mpsc::Receiver<MatrixUpdate>,
    wanted: impl Fn(MatrixUpdate) -> Option<T>,
) -> T {
    let found = async {
        loop {
            if let Some(found) = wanted(updates.recv().await.expect("the port goes on")) {
                return found;
            }
        }
    };
    tokio::time::timeout(DEADLINE, found).await.expect("the update comes")
}

pub(super) fn sticky_members(view: &RoomView) -> Vec<&MemberEvent> {
    view.members.iter().filter(|member| member.state_key.is_none()).collect()
}

pub(super) fn member(key: &str) -> Value {
    json!({"slot_id": "m.call#ROOM", "application": {"type": "m.call"}, "member": {"id": key, "membership": "join"},
        "sticky_key": key, "msc4354_sticky_key": key})
}

pub(super) fn message(event_type: &str, content: Value, sticky: Option<Duration>) -> MatrixRequest {
    MatrixRequest::Send(EventWrite {
        event_type: event_type.to_owned(),
        target: EventTarget::Message { sticky },
        content,
    })
}

pub(super) async fn send(port: &SdkRoom, request: MatrixRequest) -> OwnedEventId {
    match port.perform(request, LIMIT).await.unwrap() {
        MatrixReply::Sent { event_id } => event_id,
        other => panic!("{other:?}"),
    }
}

pub(super) async fn join_sticky(port: &SdkRoom, key: &str) -> OwnedEventId {
    send(port, message(STICKY_MEMBER, member(key), Some(HOUR))).await
}

pub(super) async fn refused(port: &SdkRoom, request: MatrixRequest) -> RequestError {
    port.perform(request, LIMIT).await.expect_err("refused")
}

/// The event as it lies on the server.
pub(super) async fn on_the_wire(user: &User, room: &RoomId, event: &OwnedEventId) -> Value {
    let client = user.session.client();
    let mut url = client.homeserver();
    url.path_segments_mut().unwrap().pop_if_empty().extend([
        "_matrix",
        "client",
        "v3",
        "rooms",
        room.as_str(),
        "event",
        event.as_str(),
    ]);
    let request = client.http_client().get(url).bearer_auth(client.access_token().unwrap());
    let answer = request.send().await.unwrap().bytes().await.unwrap();
    serde_json::from_slice(&answer).unwrap()
}
