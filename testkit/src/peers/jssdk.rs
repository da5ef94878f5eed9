//! matrix-js-sdk in node: a member of a call that has memberships and keys, and no media.
#![allow(clippy::disallowed_methods, reason = "this is the shell: it owns the clock and the tasks")]

use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use serde_json::json;

use super::driver::Driver;
use super::{PeerError, Session};

const PEER: &str = "matrix-js-sdk";
const CONNECT_LIMIT: Duration = Duration::from_secs(60);
const COMMAND_LIMIT: Duration = Duration::from_secs(20);
const POLL: Duration = Duration::from_millis(50);

/// A matrix-js-sdk client in a node of its own. It ends when this is dropped.
#[derive(Debug)]
pub struct JsSdk {
    driver: Driver,
}

/// What a matrix-js-sdk client sees of the call.
#[derive(Debug, Clone, Deserialize)]
pub struct JsSdkState {
    /// Who is in the call.
    pub members: Vec<JsSdkMember>,
    /// The media keys it has, its own among them, in the order of arrival. Those of former memberships stay.
    pub keys: Vec<JsSdkKey>,
    /// Whether its last sync succeeded.
    pub syncing: bool,
    /// What its membership manager complained about.
    pub errors: Vec<String>,
}

/// A member of the call.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct JsSdkMember {
    /// The Matrix user.
    pub user_id: String,
    /// The device.
    pub device_id: String,
    /// The identity on the SFU.
    pub backend_identity: String,
}

/// A media key.
#[derive(Clone, Deserialize)]
pub struct JsSdkKey {
    /// Whose.
    pub user_id: String,
    /// Of which device.
    pub device_id: String,
    /// The identity on the SFU.
    pub backend_identity: String,
    /// The key index.
    pub index: u8,
    /// The raw key in base64.
    key: String,
}

impl JsSdk {
    /// Starts a client for `session`, joins `room` and awaits that it is known to be encrypted.
    ///
    /// # Errors
    /// [`PeerError::Missing`] when the npm packages are not installed; otherwise what failed.
    pub async fn connect(
        homeserver: &str,
        session: &Session,
        room: &str,
        via: &str,
    ) -> Result<Self, PeerError> {
        let driver = Driver::start(PEER, "jssdk.mjs", &[])?;
        let args = json!({"homeserver": homeserver, "user_id": session.user_id, "device_id": session.device_id,
            "access_token": session.access_token, "room": room, "via": [via]});
        let _: serde_json::Value = driver.call("connect", args, CONNECT_LIMIT).await?;
        Ok(Self { driver })
    }

    /// Joins the call: state events, or with `sticky` sticky events. The delayed leave fires after `delayed_leave`
    /// without a sign of life.
    ///
    /// # Errors
    /// When the SDK or the driver fails.
    pub async fn join(
        &self,
        service_url: &str,
        sticky: bool,
        delayed_leave: Duration,
    ) -> Result<(), PeerError> {
        let args = json!({"service_url": service_url, "sticky": sticky, "delay_ms": delayed_leave.as_millis() as u64});
        self.driver.call("join", args, COMMAND_LIMIT).await
    }

    /// What it sees at present.
    ///
    /// # Errors
    /// When the driver fails.
    pub async fn state(&self) -> Result<JsSdkState, PeerError> {
        self.driver.call("state", json!({}), COMMAND_LIMIT).await
    }

    /// Awaits a state that satisfies `reached`, and returns it.
    ///
    /// # Errors
    /// [`PeerError::Refused`] with the last state when `limit` has passed.
    pub async fn until(
        &self,
        what: &str,
        limit: Duration,
        reached: impl Fn(&JsSdkState) -> bool,
    ) -> Result<JsSdkState, PeerError> {
        let end = Instant::now() + limit;
        loop {
            let state = self.state().await?;
            if reached(&state) {
                return Ok(state);
            }
            if Instant::now() >= end {
                return Err(PeerError::Refused {
                    peer: PEER,
                    what: format!("{what} within {limit:?}"),
                    why: format!("it last saw {state:#?}"),
                    log: self.driver.log_tail(),
                });
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Forgets every media key that it was given, as an application does that loses its key ring. It sends nothing.
    ///
    /// # Errors
    /// When the driver fails.
    pub async fn forget_keys(&self) -> Result<(), PeerError> {
        self.driver.call("forget_keys", json!({}), COMMAND_LIMIT).await
    }

    /// Leaves the call properly.
    ///
    /// # Errors
    /// When the SDK or the driver fails.
    pub async fn leave(&self) -> Result<(), PeerError> {
        self.driver.call("leave", json!({}), COMMAND_LIMIT).await
    }

    /// Ends the process at once, as a crash: only the delayed leave speaks for it then.
    ///
    /// # Errors
    /// When the system refuses.
    pub async fn kill(self) -> Result<(), PeerError> {
        self.driver.kill().await
    }
}

impl JsSdkState {
    /// The key of a device's current membership at `index`.
    pub fn key(&self, user_id: &str, device_id: &str, index: u8) -> Option<Vec<u8>> {
        let found = self.keys_of(user_id, device_id).find(|key| key.index == index)?;
        STANDARD.decode(&found.key).ok()
    }

    /// The index of the newest key of a device's current membership. Not the highest: indices begin anywhere and wrap.
    pub fn newest_index(&self, user_id: &str, device_id: &str) -> Option<u8> {
        self.keys_of(user_id, device_id).last().map(|key| key.index)
    }

    /// The keys of a device's current membership. In the sticky form, a device that joins again has another identity.
    fn keys_of(&self, user_id: &str, device_id: &str) -> impl Iterator<Item = &JsSdkKey> {
        let member =
            self.members.iter().find(|member| member.user_id == user_id && member.device_id == device_id);
        let identity = member.map(|member| &member.backend_identity);
        self.keys.iter().filter(move |key| Some(&key.backend_identity) == identity)
    }

    /// The SFU identity under which it lists this user.
    pub fn identity(&self, user_id: &str) -> Option<&str> {
        let member = self.members.iter().find(|member| member.user_id == user_id)?;
        Some(&member.backend_identity)
    }

    /// Whether it lists this user in the call.
    pub fn lists(&self, user_id: &str) -> bool {
        self.members.iter().any(|member| member.user_id == user_id)
    }
}

impl std::fmt::Debug for JsSdkKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("JsSdkKey")
            .field("backend_identity", &self.backend_identity)
            .field("index", &self.index)
            .finish_non_exhaustive()
    }
}
