//! A real LiveKit server on loopback.
#![allow(clippy::disallowed_methods, reason = "this is the shell: it owns the clock and the tasks")]

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aws_lc_rs::hmac;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::json;
use tempfile::TempDir;
use tokio::process::Command;

use super::process::Process;
use super::{Peer, PeerError, ports};

const PEER: &str = "the LiveKit server";
const START_LIMIT: Duration = Duration::from_secs(30);
const KEY: &str = "devkey";

/// How a LiveKit server is to be configured.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct LiveKitOptions {
    /// Whether a room is made when somebody joins it. MatrixRTC deployments run without: the authorisation service
    /// makes the rooms.
    pub auto_create: bool,
    /// Where webhooks go.
    pub webhooks: Vec<String>,
}

impl LiveKitOptions {
    /// Rooms are made on join.
    pub fn auto_create() -> Self {
        Self { auto_create: true, ..Self::default() }
    }

    /// Sends webhooks to `url` too.
    #[must_use]
    pub fn webhook(mut self, url: impl Into<String>) -> Self {
        self.webhooks.push(url.into());
        self
    }
}

/// A running LiveKit server. It ends when this is dropped.
#[derive(Debug)]
pub struct LiveKitServer {
    process: Process,
    port: u16,
    secret: String,
    // Last: the folder must outlive the process.
    _folder: TempDir,
}

impl LiveKitServer {
    /// Starts a server and waits until it answers (about a second).
    ///
    /// # Errors
    /// [`PeerError::Missing`] when it is not installed or there is more than loopback here; otherwise why it did not start, with the end of its log.
    pub async fn start(options: LiveKitOptions) -> Result<Self, PeerError> {
        Peer::LoopbackOnly.find()?;
        let binary = Peer::LiveKit.find()?;
        let machine = || PeerError::machine(PEER);
        let folder = tempfile::tempdir().map_err(machine())?;
        let port = ports::free().map_err(machine())?;
        let (tcp, udp) = (ports::free().map_err(machine())?, ports::free().map_err(machine())?);
        // The server wants at least 32 characters.
        let secret = URL_SAFE_NO_PAD.encode(rand::random::<[u8; 32]>());
        let mut config = json!({
            "port": port,
            "bind_addresses": ["127.0.0.1"],
            // Both enable_loopback_candidate and interfaces are needed: without them there is no candidate here.
            "rtc": {"udp_port": udp, "tcp_port": tcp, "use_external_ip": false, "enable_loopback_candidate": true,
                "node_ip": "127.0.0.1", "interfaces": {"includes": ["lo"]}},
            "keys": {KEY: secret},
            "room": {"auto_create": options.auto_create},
        });
        if !options.webhooks.is_empty() {
            config["webhook"] = json!({"api_key": KEY, "urls": options.webhooks});
        }
        std::fs::write(folder.path().join("config.yaml"), format!("{config:#}")).map_err(machine())?;
        let mut command = Command::new(binary);
        command.args(["--config", "config.yaml"]).current_dir(folder.path());
        let process = Process::start(PEER, command, &folder.path().join("log"))?;
        let mut server = Self { process, port, secret, _folder: folder };
        server.until_ready().await?;
        Ok(server)
    }

    /// Where clients connect: `ws://127.0.0.1:PORT`.
    pub fn url(&self) -> String {
        format!("ws://127.0.0.1:{}", self.port)
    }

    /// The same port for HTTP: RoomService, validation, health.
    pub fn http_url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// The API key.
    pub fn key(&self) -> &str {
        KEY
    }

    /// The API secret, 43 characters.
    pub fn secret(&self) -> &str {
        &self.secret
    }

    /// A token that lets `identity` into `room`: see [`access_token`].
    pub fn token(&self, room: &str, identity: &str) -> String {
        access_token(KEY, &self.secret, room, identity)
    }

    /// The end of the server's log.
    pub fn log_tail(&self) -> String {
        self.process.log_tail()
    }

    async fn until_ready(&mut self) -> Result<(), PeerError> {
        let url = self.http_url();
        let http = reqwest::Client::builder()
            .no_proxy()
            .build()
            .map_err(std::io::Error::other)
            .map_err(PeerError::machine(PEER))?;
        let ready = async || http.get(&url).send().await.is_ok_and(|answer| answer.status().is_success());
        self.process.until("an answer to GET /", START_LIMIT, ready).await
    }
}

/// A LiveKit access token (HS256) for `identity` in `room`, good for an hour, that allows to publish and subscribe.
pub fn access_token(key: &str, secret: &str, room: &str, identity: &str) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let claims = json!({
        "iss": key, "sub": identity, "nbf": now.saturating_sub(10), "exp": now + 3600,
        "video": {"room": room, "roomJoin": true, "canPublish": true, "canSubscribe": true, "canPublishData": true},
    });
    let part = |value: &serde_json::Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let signed = format!("{}.{}", part(&json!({"alg": "HS256", "typ": "JWT"})), part(&claims));
    let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, secret.as_bytes()), signed.as_bytes());
    format!("{signed}.{}", URL_SAFE_NO_PAD.encode(tag))
}
