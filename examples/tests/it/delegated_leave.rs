//! A client delegates its delayed leave to the focus and loses its connection: the homeserver soon says that it has left,
//! long before the delayed leave would have fired by itself.

use std::time::Duration;

use antiphon_call_sdk::{
    CallEvent, CallOptions, LocalTrackId, TrackSpec,
    transport::{
        MediaTransport as _,
        livekit::{ConnectOptions, LiveKitTransport},
    },
};
use antiphon_focus::{Config, Focus, FocusHandle};
use antiphon_testkit::homeserver::{DevHomeserver, Options, RegisteredUser};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::support::{create_call_room, event, homeserver, log_in, turn};

const MEMBER: &str = "org.matrix.msc3401.call.member";
const HOUR_MS: u32 = 3_600_000;

/// A user in a room of her own, who is a member of its call.
struct Caller<'a> {
    homeserver: &'a DevHomeserver,
    user: RegisteredUser,
    room: String,
    http: reqwest::Client,
}

impl<'a> Caller<'a> {
    async fn new(homeserver: &'a DevHomeserver) -> Self {
        let user = homeserver.register_user("alice", "correct horse").unwrap();
        let mut caller = Self { homeserver, user, room: String::new(), http: reqwest::Client::new() };
        let made = caller.ask(Method::POST, "v3/createRoom", json!({ "room_version": "11" })).await;
        caller.room = made["room_id"].as_str().unwrap().to_owned();
        caller.ask(Method::PUT, &caller.membership(), json!({ "application": "m.call" })).await;
        caller
    }

    fn membership(&self) -> String {
        format!("v3/rooms/{}/state/{MEMBER}/{}", self.room, self.user.user_id)
    }

    async fn ask(&self, method: Method, path: &str, body: Value) -> Value {
        let request = self.http.request(method, format!("{}/_matrix/client/{path}", self.homeserver.url()));
        let answer = request.bearer_auth(&self.user.access_token).json(&body).send().await.unwrap();
        assert_eq!(answer.status(), StatusCode::OK, "{path}");
        answer.json().await.unwrap()
    }

    /// Schedules the leave in an hour, and gets a token for the SFU in exchange for it.
    async fn delegate(&self, focus: &FocusHandle) -> String {
        let path = format!("{}?org.matrix.msc4140.delay={HOUR_MS}", self.membership());
        let delayed = self.ask(Method::PUT, &path, json!({})).await;
        let path = format!("v3/user/{}/openid/request_token", self.user.user_id);
        let openid_token = self.ask(Method::POST, &path, json!({})).await;
        let request = json!({
            "room_id": self.room,
            "slot_id": "m.call#ROOM",
            "openid_token": openid_token,
            "member": {
                "id": "membership",
                "claimed_user_id": self.user.user_id,
                "claimed_device_id": self.user.device_id,
            },
            "delay_id": delayed["delay_id"],
            "delay_timeout": HOUR_MS,
        });
        let url = format!("{}/get_token", focus.jwt_url().unwrap());
        let answer = self.http.post(url).json(&request).send().await.unwrap();
        assert_eq!(answer.status(), StatusCode::OK);
        answer.json::<Value>().await.unwrap()["jwt"].as_str().unwrap().to_owned()
    }

    /// Waits until the room says that she has left.
    async fn has_left(&self) {
        let mut since = String::new();
        loop {
            let path = format!("v3/sync?timeout=30000{since}");
            let answer = self.http.get(format!("{}/_matrix/client/{path}", self.homeserver.url()));
            let sync: Value =
                answer.bearer_auth(&self.user.access_token).send().await.unwrap().json().await.unwrap();
            let room = &sync["rooms"]["join"][&self.room];
            let events = [&room["state"]["events"], &room["timeline"]["events"]];
            let mut memberships =
                events.into_iter().filter_map(Value::as_array).flatten().filter(|e| e["type"] == MEMBER);
            if memberships.next_back().is_some_and(|event| event["content"] == json!({})) {
                return;
            }
            since = format!("&since={}", sync["next_batch"].as_str().unwrap());
        }
    }
}

/// A member's process that is about to die: its runtime and everything in it.
struct Process {
    runtime: tokio::runtime::Runtime,
    _whole: Box<dyn std::any::Any + Send>,
}

impl Process {
    /// A member with a track that has delegated its leave, which would otherwise come in ten minutes.
    fn start(homeserver: &str, room: &matrix_sdk::ruma::RoomId) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        let whole = runtime.block_on(async {
            let session = log_in(homeserver, "bob").await;
            session.enter_room(room.into()).await.unwrap();
            let mut options = CallOptions::default().with_delegate_leave(true);
            options.membership.leave_delay = Duration::from_mins(10);
            let (call, mut events) = session.join_call(room, options).await.unwrap();
            let track = call.publish(TrackSpec::microphone()).await.unwrap();
            let delegated = |event: &CallEvent| matches!(event, CallEvent::LeaveDelegated);
            event(&mut events, "delegation", Duration::from_secs(30), delegated).await;
            (session, call, events, track)
        });
        Self { runtime, _whole: Box::new(whole) }
    }

    /// Stops every task at once, so that nothing says goodbye.
    fn kill(self) {
        self.runtime.shutdown_background();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn death_of_a_process_is_seen_soon() {
    let _turn = turn().await;
    let focus = Focus::start(Config::dev_ephemeral()).await.unwrap();
    let homeserver = homeserver(focus.jwt_url().unwrap(), &["alice", "bob"]).await;
    let alice = log_in(homeserver.url(), "alice").await;
    let id = create_call_room(&alice).await;
    let (call, mut events) = alice.join_call(&id, CallOptions::default()).await.unwrap();
    let url = homeserver.url().to_owned();
    let bob = tokio::task::spawn_blocking(move || Process::start(&url, &id)).await.unwrap();
    let about_bob =
        |event: &CallEvent| matches!(event, CallEvent::MemberJoined(m) if m.user_id.localpart() == "bob");
    event(&mut events, "bob", Duration::from_secs(30), about_bob).await;
    bob.kill();
    let gone =
        |event: &CallEvent| matches!(event, CallEvent::MemberLeft(m) if m.user_id.localpart() == "bob");
    event(&mut events, "bob's leave", Duration::from_secs(20), gone).await;
    call.leave().await;
    focus.shutdown().await;
    homeserver.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn end_of_a_connection_sends_the_leave() {
    let _turn = turn().await;
    let homeserver = DevHomeserver::start(Options::default()).await.unwrap();
    let focus = Focus::start(Config::dev_ephemeral()).await.unwrap();
    let alice = Caller::new(&homeserver).await;
    let token = alice.delegate(&focus).await;
    let (transport, _events) =
        LiveKitTransport::connect(ConnectOptions::new(focus.ws_url(), token)).await.unwrap();
    // Media can flow, so the focus knows that she is there.
    let _outlet = transport.publish(LocalTrackId(0), TrackSpec::microphone(), true).await.unwrap();
    drop(transport);
    tokio::time::timeout(Duration::from_secs(20), alice.has_left()).await.expect("the leave is sent");
    focus.shutdown().await;
    homeserver.shutdown().await;
}
