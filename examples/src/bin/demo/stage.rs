//! The stage: a homeserver, usually a focus, three users who share an encrypted room, and an intruder.

use std::path::Path;

use antiphon_call_sdk::{LiveKitFocus, Session, SessionOptions};
use antiphon_testkit::homeserver::{DevHomeserver, Options as HomeserverOptions};
use anyhow::{Context as _, Result, bail};
use matrix_sdk::{
    Room, RoomMemberships,
    ruma::{
        OwnedRoomId,
        api::client::room::create_room::{self, v3::RoomPreset},
        events::{AnyInitialStateEvent, room::power_levels::RoomPowerLevelsEventContent},
        serde::Raw,
    },
};
use serde_json::json;

use crate::{Options, own_focus::OwnFocus};

/// How media travels at first.
pub(crate) enum Route {
    /// Over the focus in this process.
    OwnFocus(LiveKitFocus),
    /// Over a focus that runs elsewhere.
    OtherFocus(LiveKitFocus),
    /// From member to member.
    Mesh,
}

impl Route {
    pub(crate) fn focus(&self) -> Option<&LiveKitFocus> {
        match self {
            Self::OwnFocus(focus) | Self::OtherFocus(focus) => Some(focus),
            Self::Mesh => None,
        }
    }
}

/// Everything that must stand before the call begins.
pub(crate) struct Stage {
    pub(crate) homeserver_url: String,
    pub(crate) route: Route,
    /// The one of [`Route::OwnFocus`].
    pub(crate) own_focus: Option<OwnFocus>,
    pub(crate) room_id: OwnedRoomId,
    /// Alice, Bob and Carol.
    pub(crate) members: Vec<Session>,
    /// Not in the room. Without a focus there is nothing to intrude on.
    pub(crate) intruder: Option<Session>,
    /// The sessions' devices; removed at the end.
    _devices: tempfile::TempDir,
    homeserver: Option<DevHomeserver>,
}

impl Stage {
    pub(crate) async fn set(options: &Options) -> Result<Self> {
        let homeserver = match &options.homeserver {
            Some(_) => None,
            None => {
                let server = DevHomeserver::start(HomeserverOptions::default()).await?;
                step(&format!("development homeserver on {}", server.url()));
                Some(server)
            }
        };
        let homeserver_url = match (&homeserver, &options.homeserver) {
            (Some(server), _) => server.url().to_owned(),
            (None, Some(url)) => url.trim_end_matches('/').to_owned(),
            (None, None) => bail!("no homeserver"),
        };
        let (own_focus, service_url) = match &options.service_url {
            _ if options.no_focus => (None, None),
            Some(url) => (None, Some(url.trim_end_matches('/').to_owned())),
            None => {
                let (focus, url) = OwnFocus::start().await?;
                step(&format!("focus with its authorisation service on {url}"));
                (Some(focus), Some(url))
            }
        };
        if let (Some(server), Some(url)) = (&homeserver, &service_url) {
            server.set_rtc_transports(vec![json!({ "type": "livekit", "livekit_service_url": url })]);
        }
        let focus = service_url.map(|url| url.parse().map(LiveKitFocus::of_service)).transpose()?;
        let route = match (focus, &own_focus) {
            (Some(focus), Some(_)) => Route::OwnFocus(focus),
            (Some(focus), None) => Route::OtherFocus(focus),
            (None, _) => Route::Mesh,
        };

        let accounts = accounts(options, &homeserver_url).await?;
        let devices = tempfile::Builder::new().prefix("antiphon-demo-").tempdir()?;
        let mut sessions = Vec::new();
        for account in &accounts {
            sessions.push(log_in(&homeserver_url, account, devices.path()).await?);
        }
        step(&format!("{} users registered and logged in, each device signed by its owner", sessions.len()));
        let intruder = if route.focus().is_some() { sessions.pop() } else { None };

        let room_id = create_room(&sessions).await?;
        let mut rooms = Vec::new();
        for session in &sessions {
            rooms.push(session.enter_room((&*room_id).into()).await?);
        }
        for (session, room) in sessions.iter().zip(&rooms) {
            wait_for_members(session, room, sessions.len()).await?;
        }
        step(&format!("encrypted room {room_id} with alice, bob and carol"));
        Ok(Self {
            homeserver_url,
            route,
            own_focus,
            room_id,
            members: sessions,
            intruder,
            _devices: devices,
            homeserver,
        })
    }

    /// Stops what was started here.
    pub(crate) async fn strike(self) {
        drop((self.members, self.intruder));
        if let Some(mut focus) = self.own_focus {
            focus.stop().await;
        }
        if let Some(homeserver) = self.homeserver {
            homeserver.shutdown().await;
        }
    }
}

pub(crate) fn step(text: &str) {
    println!("  • {text}");
}

async fn accounts(options: &Options, homeserver: &str) -> Result<Vec<(String, String)>> {
    let names: &[&str] =
        if options.no_focus { &["alice", "bob", "carol"] } else { &["alice", "bob", "carol", "mallory"] };
    if !options.account.is_empty() {
        let split = |a: &String| a.split_once(':').map(|(u, p)| (u.to_owned(), p.to_owned()));
        let accounts: Option<Vec<_>> = options.account.iter().map(split).collect();
        return match accounts {
            Some(accounts) if accounts.len() == names.len() => Ok(accounts),
            _ => bail!("give {} --account options, each as USER:PASSWORD, or none", names.len()),
        };
    }
    let run = rand_suffix();
    let mut accounts = Vec::new();
    for name in names {
        let (user, password) = (format!("{name}-{run}"), format!("demo-{run}"));
        register(homeserver, &user, &password).await?;
        accounts.push((user, password));
    }
    Ok(accounts)
}

async fn log_in(homeserver: &str, (user, password): &(String, String), devices: &Path) -> Result<Session> {
    let options =
        SessionOptions::new(homeserver.parse()?, user.as_str(), password.as_str(), devices.join(user));
    Session::log_in_or_restore(options).await.with_context(|| format!("{user} cannot log in"))
}

/// Registers by the dummy stage of user-interactive authentication, as open homeservers allow.
async fn register(homeserver: &str, user: &str, password: &str) -> Result<()> {
    let http = reqwest::Client::new();
    let url = format!("{homeserver}/_matrix/client/v3/register");
    let mut auth = json!({ "type": "m.login.dummy" });
    for _ in 0..2 {
        let body = json!({ "username": user, "password": password, "inhibit_login": true, "auth": auth });
        let reply = http.post(&url).json(&body).send().await.context("the homeserver does not answer")?;
        if reply.status().is_success() {
            return Ok(());
        }
        let status = reply.status();
        let answer: serde_json::Value = reply.json().await.unwrap_or_default();
        match answer["session"].as_str() {
            Some(session) if status == 401 => auth["session"] = session.into(),
            _ => bail!(
                "{homeserver} does not register {user} ({status}: {}); allow open registration or pass --account once per user",
                answer["error"].as_str().unwrap_or("no reason given")
            ),
        }
    }
    bail!(
        "{homeserver} wants more than a name and a password to register {user}; pass --account once per user"
    )
}

async fn create_room(sessions: &[Session]) -> Result<OwnedRoomId> {
    let encryption = json!({
        "type": "m.room.encryption",
        "state_key": "",
        "content": { "algorithm": "m.megolm.v1.aes-sha2" }
    });
    // Call membership is state, and ordinary members must be able to send it.
    let levels = json!({ "events": { "org.matrix.msc3401.call.member": 0 } });
    let mut request = create_room::v3::Request::new();
    request.name = Some("Antiphon demo".to_owned());
    request.preset = Some(RoomPreset::PrivateChat);
    request.invite =
        sessions[1..].iter().filter_map(|s| s.client().user_id().map(ToOwned::to_owned)).collect();
    request.initial_state = vec![Raw::<AnyInitialStateEvent>::from_json_string(encryption.to_string())?];
    request.power_level_content_override =
        Some(Raw::<RoomPowerLevelsEventContent>::from_json_string(levels.to_string())?.cast_unchecked());
    let room =
        sessions[0].client().create_room(request).await.context("the homeserver does not create a room")?;
    Ok(room.room_id().to_owned())
}

async fn wait_for_members(session: &Session, room: &Room, count: usize) -> Result<()> {
    let mut changes = session.client().subscribe_to_all_room_updates();
    let complete = async {
        while room.members(RoomMemberships::JOIN).await?.len() < count {
            // Lagging only means that something changed, so look again.
            let _ = changes.recv().await;
        }
        anyhow::Ok(())
    };
    tokio::time::timeout(std::time::Duration::from_secs(30), complete)
        .await
        .context("not all joined the room")?
}

fn rand_suffix() -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    format!("{:x}", now.as_millis())
}
