//! Members in processes of their own, which can be killed, and can be in another network.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::Path,
    process::Stdio,
    sync::{Arc, Mutex},
    time::Duration,
};

use antiphon_call_sdk::{CallOptions, Session, SessionOptions, transport::livekit::Bind};
use matrix_sdk::ruma::OwnedRoomId;
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    net::TcpStream,
    process::{Child, Command},
};

use super::{FRAME_EVERY, LIMIT};
use crate::{
    speakers::Speaker,
    support::{create_call_room, enter, until},
};

const MEMBER: &str = "ANTIPHON_TEST_MEMBER";
/// Begins the lines that the process writes for the test.
const HEARS: &str = "hears ";
const ROOM: &str = "room ";

/// What a member is to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Orders {
    pub(super) homeserver: String,
    pub(super) user: String,
    /// Its device lasts as long as this folder.
    pub(super) store: String,
    /// `None`: it makes the room.
    pub(super) room: Option<String>,
    /// `None`: every interface.
    pub(super) bind: Option<SocketAddr>,
}

/// The process of a [`MemberProcess`].
#[tokio::test(flavor = "multi_thread")]
#[ignore = "only the process of a member"]
async fn member_process() {
    let Ok(orders) = std::env::var(MEMBER) else { return };
    let orders: Orders = serde_json::from_str(&orders).unwrap();
    let homeserver: url::Url = orders.homeserver.parse().unwrap();
    let address = homeserver.socket_addrs(|| None).unwrap();
    until("homeserver reachable", LIMIT, async || TcpStream::connect(&address[..]).await.is_ok()).await;
    let store = tempfile::tempdir().unwrap();
    let options =
        SessionOptions::new(orders.homeserver.parse().unwrap(), orders.user.as_str(), "pw", orders.store);
    let session = Session::log_in_or_restore(options).await.unwrap();
    let room: OwnedRoomId = match orders.room {
        Some(room) => {
            let room: OwnedRoomId = room.try_into().unwrap();
            enter(&session, &room, &[]).await;
            room
        }
        None => create_call_room(&session).await,
    };
    println!("\n{ROOM}{room}");
    let mut options = CallOptions::default();
    if let Some(bind) = orders.bind {
        options.bind = Bind::Addresses(vec![bind]);
    }
    let (call, events) = session.join_call(&room, options).await.unwrap();
    let speaker = Speaker::with_frames_every(FRAME_EVERY, call, events, session, store).await;
    let mut is_reported = false;
    loop {
        let hears: BTreeMap<_, _> = speaker
            .call
            .members()
            .iter()
            .map(|member| (member.user_id.to_string(), speaker.opened(member.user_id.as_str())))
            .collect();
        if !is_reported && !hears.is_empty() && hears.values().all(|opened| *opened > 0) {
            is_reported = true;
            let report = speaker.call.report().await.unwrap();
            let steps = report.timeline.iter().map(|entry| format!("\n  {:6} {:?}", entry.at_ms, entry.step));
            println!("{} hears the others:{}", speaker.user(), steps.collect::<String>());
        }
        println!("\n{HEARS}{}", serde_json::to_string(&hears).unwrap());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// A member in a process of its own.
pub(super) struct MemberProcess {
    child: Child,
    told: Arc<Mutex<Told>>,
}

#[derive(Default)]
struct Told {
    room: Option<String>,
    hears: BTreeMap<String, u64>,
}

impl MemberProcess {
    pub(super) fn start(orders: &Orders) -> Self {
        Self::spawn(Command::new(std::env::current_exe().unwrap()), orders)
    }

    /// Starts it in a network namespace of its own, with nothing in it.
    pub(super) fn start_apart(orders: &Orders) -> Self {
        let mut command = Command::new("unshare");
        command.arg("--net").arg(std::env::current_exe().unwrap());
        Self::spawn(command, orders)
    }

    fn spawn(mut command: Command, orders: &Orders) -> Self {
        let mut child = command
            .args(["--exact", "mesh::process::member_process", "--ignored", "--nocapture"])
            .env(MEMBER, serde_json::to_string(orders).unwrap())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let told = Arc::<Mutex<Told>>::default();
        let (mut lines, tells) = (BufReader::new(child.stdout.take().unwrap()).lines(), Arc::clone(&told));
        tokio::spawn(async move {
            while let Ok(Some(line)) = lines.next_line().await {
                let mut told = tells.lock().unwrap();
                if let Some(hears) = line.strip_prefix(HEARS) {
                    told.hears = serde_json::from_str(hears).unwrap();
                } else if let Some(room) = line.strip_prefix(ROOM) {
                    told.room = Some(room.to_owned());
                } else if !line.is_empty() {
                    println!("{line}");
                }
            }
        });
        Self { child, told }
    }

    pub(super) fn id(&self) -> u32 {
        self.child.id().unwrap()
    }

    /// The room that it made or entered.
    pub(super) async fn room(&self) -> OwnedRoomId {
        until("in the room", LIMIT, async || self.told.lock().unwrap().room.is_some()).await;
        self.told.lock().unwrap().room.clone().unwrap().try_into().unwrap()
    }

    /// How many frames of `user` it opened.
    pub(super) fn opened(&self, user: &str) -> u64 {
        self.told.lock().unwrap().hears.get(user).copied().unwrap_or_default()
    }

    /// Ends it at once, so that it tells nobody.
    pub(super) async fn kill(&mut self) {
        self.child.kill().await.unwrap();
    }
}

pub(super) fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}
