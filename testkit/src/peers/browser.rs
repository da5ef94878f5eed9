//! Headless Chromium with pages of unmodified `livekit-client` and Element Call, and Chromium or Firefox with a page that
//! meshes by a plain `RTCPeerConnection`.
#![allow(clippy::disallowed_methods, reason = "this is the shell: it owns the clock and the tasks")]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::{Semaphore, SemaphorePermit};

use super::driver::Driver;
use super::{Peer, PeerError};

const TURN_LIMIT: Duration = Duration::from_secs(600);
const START_LIMIT: Duration = Duration::from_secs(60);
const JOIN_LIMIT: Duration = Duration::from_secs(90);
const COMMAND_LIMIT: Duration = Duration::from_secs(20);
const POLL: Duration = Duration::from_millis(200);

/// A running Chromium or Firefox. It ends when this and all its pages are dropped.
///
/// There is one at a time in a process, because software codecs fill the cores: a second test waits for the first.
/// One test therefore starts one browser; every page has its own storage and login anyway.
#[derive(Debug, Clone)]
pub struct Browser {
    running: Arc<Running>,
}

/// How a `livekit-client` page joins.
#[derive(Debug, Clone)]
pub struct LiveKitJoin {
    /// The SFU: `ws://…`.
    pub url: String,
    /// The access token.
    pub token: String,
    /// The frame keys known at the start, its own among them. None: no end-to-end encryption at all.
    pub keys: Option<Vec<FrameKey>>,
    /// Whether it publishes a camera (VP8, 640×360, 15 frames a second) and a tone (Opus).
    pub publish: bool,
    /// Whether the camera is published in several layers.
    pub simulcast: bool,
}

/// A frame key of one participant, as MatrixRTC distributes it: raw bytes, the input of HKDF.
#[derive(Clone)]
pub struct FrameKey {
    /// The participant's identity on the SFU.
    pub identity: String,
    /// The raw key.
    pub key: Vec<u8>,
    /// The key index.
    pub index: u8,
}

/// A page with `livekit-client` in a room.
#[derive(Debug)]
pub struct LiveKitPage {
    page: Page,
    /// Its own identity.
    pub identity: String,
    /// From `Room.connect` to connected.
    pub connect: Duration,
    /// From connected to both tracks published.
    pub publish: Duration,
}

/// What a `livekit-client` page sees.
#[derive(Debug, Clone, Deserialize)]
pub struct LiveKitStats {
    /// `connected`, `reconnecting`, `disconnected`…
    pub state: String,
    /// The identities of the others in the room.
    pub participants: Vec<String>,
    /// Per participant identity, the errors of the encryption worker. Its own errors carry its own identity, or none.
    pub encryption_errors: BTreeMap<String, EncryptionErrors>,
    /// One entry per track of the others.
    pub remote: Vec<RtpIn>,
    /// One entry per own track.
    pub own: Vec<RtpOut>,
}

/// What the encryption worker complained about.
#[derive(Debug, Clone, Deserialize)]
pub struct EncryptionErrors {
    /// How often.
    pub count: u64,
    /// The last complaint.
    pub last: String,
}

/// Chromium's counters of one received track, from the start of the track.
#[derive(Debug, Clone, Deserialize)]
pub struct RtpIn {
    /// The sender's identity; empty in Element Call, which only shows [`RtpIn::stream`].
    #[serde(default)]
    pub identity: String,
    /// The media stream id, which LiveKit begins with the participant's sid; empty in a page with `livekit-client`.
    #[serde(default)]
    pub stream: String,
    /// Whether the sender has muted it; Element Call does not show it.
    #[serde(default)]
    pub muted: bool,
    /// Whether the sender has announced it as encrypted; Element Call does not show it.
    #[serde(default)]
    pub encrypted: bool,
    /// `audio` or `video`.
    pub kind: String,
    /// RTP packets.
    pub packets_received: u64,
    /// Video frames that arrived complete.
    pub frames_received: u64,
    /// Video frames that the decoder accepted.
    pub frames_decoded: u64,
    /// Audio samples played, concealed ones included.
    pub samples_received: u64,
    /// Audio samples that had to be invented because nothing could be decoded.
    pub samples_concealed: u64,
    /// The energy of what was played: silence and concealment add nothing.
    pub audio_energy: f64,
}

/// Chromium's counters of one sent track.
#[derive(Debug, Clone, Deserialize)]
pub struct RtpOut {
    /// `audio` or `video`.
    pub kind: String,
    /// RTP packets.
    pub packets_sent: u64,
    /// Video frames.
    pub frames_encoded: u64,
}

/// How Element Call logs in and joins.
#[derive(Debug, Clone)]
pub struct ElementCallJoin {
    /// The homeserver's client-server API, `http://localhost:PORT`.
    pub homeserver: String,
    /// The homeserver's name.
    pub server_name: String,
    /// The local part of the user.
    pub user: String,
    /// The password.
    pub password: String,
    /// The room id.
    pub room: String,
    /// Whether media is encrypted with a key per participant.
    pub encrypted: bool,
}

/// A page with Element Call that has pressed "join".
#[derive(Debug)]
pub struct ElementCallPage {
    page: Page,
    /// From the start to logged in.
    pub login: Duration,
    /// From logged in to a lobby that can be left.
    pub lobby: Duration,
}

/// What an Element Call page sees.
#[derive(Debug, Clone, Deserialize)]
pub struct ElementCallStats {
    /// The state of each peer connection it ever made.
    pub connections: Vec<String>,
    /// How many video tiles it shows, its own among them.
    pub tiles: u64,
    /// Where the page is.
    pub url: String,
    /// One entry per received track.
    pub inbound: Vec<RtpIn>,
    /// One entry per sent track.
    pub outbound: Vec<RtpOut>,
}

/// One side of a mesh connection.
#[derive(Debug, Clone, Serialize)]
pub struct MeshParty {
    /// The user.
    pub user_id: String,
    /// The device.
    pub device_id: String,
    /// The session of its membership.
    pub session_id: String,
}

/// How a page with a plain `RTCPeerConnection` meshes.
#[derive(Debug, Clone)]
pub struct MeshJoin {
    /// The page's user.
    pub us: MeshParty,
    /// The member that it meshes with.
    pub them: MeshParty,
    /// The room id.
    pub room: String,
    /// The slot, `m.call#ROOM`.
    pub slot: String,
    /// What it sends from the first description on: `microphone`, `camera`.
    pub sources: Vec<String>,
    /// Whether a caller offers to receive in the sections that it sends in, instead of in further ones.
    pub bidirectional: bool,
}

/// A message of mesh signalling, on its way between page and homeserver.
#[derive(Clone, Serialize, Deserialize)]
pub struct MeshMessage {
    /// `m.call.*`.
    #[serde(rename = "type")]
    pub event_type: String,
    /// Its content.
    pub content: Value,
}

/// A page that meshes.
#[derive(Debug)]
pub struct MeshPage {
    page: Page,
}

/// What a page that meshes sees.
#[derive(Debug, Clone, Deserialize)]
pub struct MeshStats {
    /// Whether it is the caller.
    pub caller: bool,
    /// `connectionState`.
    pub connection: String,
    /// The reason of the other side's hangup.
    pub ended: Option<String>,
    /// `sdp_stream_metadata` of the other side.
    pub streams: Value,
    /// Messages that came on the data channels, as far as they are UTF-8.
    pub data: Vec<String>,
    /// What went wrong in the page.
    pub errors: Vec<String>,
    /// One entry per received track.
    pub inbound: Vec<RtpIn>,
    /// One entry per sent track.
    pub outbound: Vec<RtpOut>,
}

#[derive(Debug)]
struct Page {
    running: Arc<Running>,
    number: u64,
}

#[derive(Debug)]
struct Running {
    peer: &'static str,
    driver: Driver,
    // Last: it is returned when the driver has ended.
    _turn: SemaphorePermit<'static>,
}

static TURN: Semaphore = Semaphore::const_new(1);

#[derive(Deserialize)]
struct LiveKitJoined {
    page: u64,
    identity: String,
    connect_ms: u64,
    publish_ms: u64,
}

#[derive(Deserialize)]
struct ElementCallJoined {
    page: u64,
    login_ms: u64,
    lobby_ms: u64,
}

impl Browser {
    /// Starts Chromium (about a second).
    ///
    /// # Errors
    /// [`PeerError::Missing`] when Chromium, the npm packages or the namespace is missing; otherwise why it did not
    /// start, with the end of its log.
    pub async fn start() -> Result<Self, PeerError> {
        Self::start_program("Chromium", Peer::Chromium, "ANTIPHON_CHROMIUM").await
    }

    /// Starts Firefox, for [`Self::mesh_page`] only: the other pages need a browser that playwright drives.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub async fn start_firefox() -> Result<Self, PeerError> {
        Self::start_program("Firefox", Peer::Firefox, "ANTIPHON_FIREFOX").await
    }

    async fn start_program(peer: &'static str, program: Peer, variable: &str) -> Result<Self, PeerError> {
        Peer::LoopbackOnly.find()?;
        let program = program.find()?;
        let turn = tokio::time::timeout(TURN_LIMIT, TURN.acquire()).await;
        let Ok(Ok(turn)) = turn else {
            return Err(PeerError::Deadline {
                peer,
                what: "the end of the other browser of this process".to_owned(),
                limit: TURN_LIMIT,
                log: String::new(),
            });
        };
        let driver = Driver::start(peer, "driver.mjs", &[(variable, program.to_string_lossy().as_ref())])?;
        let browser = Self { running: Arc::new(Running { peer, driver, _turn: turn }) };
        browser.version().await?;
        Ok(browser)
    }

    /// The browser's version.
    ///
    /// # Errors
    /// When the driver has ended or does not answer.
    pub async fn version(&self) -> Result<String, PeerError> {
        self.running.driver.call("browser.version", json!({}), START_LIMIT).await
    }

    /// Ends all of Chromium's processes by SIGKILL, as a crash or a phone without battery: no page has a chance to
    /// say good-bye. Returns when they are gone.
    ///
    /// # Errors
    /// When the driver fails, or the system refuses.
    pub async fn kill(&self) -> Result<(), PeerError> {
        self.running.driver.call("browser.kill", json!({}), COMMAND_LIMIT).await
    }

    /// Opens a page with `livekit-client` and joins a room; returns when connected and, if asked, published.
    ///
    /// # Errors
    /// [`PeerError::Refused`] with the client's own error, [`PeerError::Deadline`] after 90 seconds.
    pub async fn livekit_page(&self, join: LiveKitJoin) -> Result<LiveKitPage, PeerError> {
        let e2ee = join.keys.map(|keys| json!({"keys": keys.iter().map(FrameKey::json).collect::<Vec<_>>()}));
        let args = json!({"url": join.url, "token": join.token, "e2ee": e2ee, "publish": join.publish,
            "simulcast": join.simulcast});
        let joined: LiveKitJoined = self.running.driver.call("livekit.connect", args, JOIN_LIMIT).await?;
        Ok(LiveKitPage {
            page: self.page(joined.page),
            identity: joined.identity,
            connect: Duration::from_millis(joined.connect_ms),
            publish: Duration::from_millis(joined.publish_ms),
        })
    }

    /// Opens Element Call, logs in, and joins the room's call; returns when the button was pressed.
    ///
    /// # Errors
    /// [`PeerError::Refused`] with the stage that failed, [`PeerError::Deadline`] after 90 seconds.
    pub async fn element_call(&self, join: ElementCallJoin) -> Result<ElementCallPage, PeerError> {
        let args = json!({"homeserver": join.homeserver, "server_name": join.server_name, "user": join.user,
            "password": join.password, "room": join.room, "via": join.server_name, "encrypted": join.encrypted});
        let joined: ElementCallJoined = self.running.driver.call("ec.join", args, JOIN_LIMIT).await?;
        Ok(ElementCallPage {
            page: self.page(joined.page),
            login: Duration::from_millis(joined.login_ms),
            lobby: Duration::from_millis(joined.lobby_ms),
        })
    }

    /// Opens a page that meshes with one member by a plain `RTCPeerConnection`, as `docs/mesh.md` says, and captures
    /// the sources. As the caller it makes its offer at once.
    ///
    /// # Errors
    /// [`PeerError::Refused`] with the browser's own error, [`PeerError::Deadline`] after 90 seconds.
    pub async fn mesh_page(&self, join: MeshJoin) -> Result<MeshPage, PeerError> {
        #[derive(Deserialize)]
        struct Started {
            page: u64,
        }
        let place = json!({"room": join.room, "slot": join.slot});
        let args = json!({"us": join.us, "them": join.them, "place": place, "sources": join.sources,
            "bidirectional": join.bidirectional});
        let Started { page } = self.running.driver.call("mesh.start", args, JOIN_LIMIT).await?;
        Ok(MeshPage { page: self.page(page) })
    }

    /// The end of what the browser, the driver and the consoles of the pages said.
    pub fn log_tail(&self) -> String {
        self.running.driver.log_tail()
    }

    fn page(&self, number: u64) -> Page {
        Page { running: self.running.clone(), number }
    }
}

impl LiveKitPage {
    /// Gives the page a key: its own, which it then encrypts with, or another participant's.
    ///
    /// # Errors
    /// When the page or the driver fails.
    pub async fn set_key(&self, key: &FrameKey) -> Result<(), PeerError> {
        self.page.call("livekit.setKey", key.json()).await
    }

    /// Mutes or unmutes its own `audio` or `video`.
    ///
    /// # Errors
    /// When the page or the driver fails, such as when it publishes nothing of that kind.
    pub async fn set_muted(&self, kind: &str, muted: bool) -> Result<(), PeerError> {
        self.page.call("livekit.setMuted", json!({"kind": kind, "muted": muted})).await
    }

    /// The present counters.
    ///
    /// # Errors
    /// When the page or the driver fails.
    pub async fn stats(&self) -> Result<LiveKitStats, PeerError> {
        self.page.call("livekit.stats", json!({})).await
    }

    /// Awaits counters that satisfy `reached`, and returns them.
    ///
    /// # Errors
    /// [`PeerError::Refused`] with the last counters when `limit` has passed.
    pub async fn until(
        &self,
        what: &str,
        limit: Duration,
        reached: impl Fn(&LiveKitStats) -> bool,
    ) -> Result<LiveKitStats, PeerError> {
        self.page.until("livekit.stats", what, limit, reached).await
    }

    /// Leaves the room properly and closes the page.
    ///
    /// # Errors
    /// When the page or the driver fails.
    pub async fn leave(self) -> Result<(), PeerError> {
        self.page.call("livekit.leave", json!({})).await
    }

    /// Closes the page without a word to the SFU.
    ///
    /// # Errors
    /// When the driver fails.
    pub async fn close(self) -> Result<(), PeerError> {
        self.page.call("page.close", json!({})).await
    }

    /// Writes a PNG of the page.
    ///
    /// # Errors
    /// When the page or the driver fails.
    pub async fn screenshot(&self, file: &Path) -> Result<(), PeerError> {
        self.page.screenshot(file).await
    }
}

impl LiveKitStats {
    /// The counters of one kind of one sender, if that track is known.
    pub fn of(&self, identity: &str, kind: &str) -> Option<&RtpIn> {
        self.remote.iter().find(|track| track.identity == identity && track.kind == kind)
    }

    /// Decoded video frames of one sender.
    pub fn frames_decoded(&self, identity: &str) -> u64 {
        self.of(identity, "video").map_or(0, |track| track.frames_decoded)
    }

    /// Audio samples of one sender that were decoded, not invented.
    pub fn samples_decoded(&self, identity: &str) -> u64 {
        self.of(identity, "audio").map_or(0, RtpIn::samples_decoded)
    }

    /// The energy of the audio of one sender.
    pub fn audio_energy(&self, identity: &str) -> f64 {
        self.of(identity, "audio").map_or(0.0, |track| track.audio_energy)
    }
}

impl RtpIn {
    /// Audio samples that were decoded, not invented.
    pub fn samples_decoded(&self) -> u64 {
        self.samples_received.saturating_sub(self.samples_concealed)
    }
}

impl ElementCallPage {
    /// The present counters.
    ///
    /// # Errors
    /// When the page or the driver fails.
    pub async fn stats(&self) -> Result<ElementCallStats, PeerError> {
        self.page.call("ec.stats", json!({})).await
    }

    /// Awaits counters that satisfy `reached`, and returns them.
    ///
    /// # Errors
    /// [`PeerError::Refused`] with the last counters when `limit` has passed.
    pub async fn until(
        &self,
        what: &str,
        limit: Duration,
        reached: impl Fn(&ElementCallStats) -> bool,
    ) -> Result<ElementCallStats, PeerError> {
        self.page.until("ec.stats", what, limit, reached).await
    }

    /// Presses the button that ends the call, and returns when its connections are closed. The page stays.
    ///
    /// # Errors
    /// When the page or the driver fails.
    pub async fn leave(&self) -> Result<(), PeerError> {
        self.page.call("ec.leave", json!({})).await
    }

    /// Takes the page away from under Element Call, as a closed tab does: only its delayed leave speaks for it then.
    ///
    /// # Errors
    /// When the driver fails.
    pub async fn close(self) -> Result<(), PeerError> {
        let () = self.page.call("ec.blank", json!({})).await?;
        self.page.call("page.close", json!({})).await
    }

    /// Writes a PNG of the page.
    ///
    /// # Errors
    /// When the page or the driver fails.
    pub async fn screenshot(&self, file: &Path) -> Result<(), PeerError> {
        self.page.screenshot(file).await
    }
}

impl ElementCallStats {
    /// Decoded video frames, of all received tracks together.
    pub fn frames_decoded(&self) -> u64 {
        self.inbound.iter().filter(|track| track.kind == "video").map(|track| track.frames_decoded).sum()
    }

    /// Audio samples that were decoded, not invented, of all received tracks together.
    pub fn samples_decoded(&self) -> u64 {
        self.inbound.iter().filter(|track| track.kind == "audio").map(RtpIn::samples_decoded).sum()
    }

    /// The energy of all received audio.
    pub fn audio_energy(&self) -> f64 {
        self.inbound.iter().map(|track| track.audio_energy).sum()
    }
}

impl MeshPage {
    /// Gives the page messages of the other side, and returns those that it wants sent.
    ///
    /// # Errors
    /// When the page or the driver fails.
    pub async fn exchange(&self, incoming: &[MeshMessage]) -> Result<Vec<MeshMessage>, PeerError> {
        self.page.call("mesh.exchange", json!({"incoming": incoming})).await
    }

    /// The present counters.
    ///
    /// # Errors
    /// When the page or the driver fails.
    pub async fn stats(&self) -> Result<MeshStats, PeerError> {
        self.page.call("mesh.stats", json!({})).await
    }

    /// Awaits counters that satisfy `reached`, and returns them.
    ///
    /// # Errors
    /// [`PeerError::Refused`] with the last counters when `limit` has passed.
    pub async fn until(
        &self,
        what: &str,
        limit: Duration,
        reached: impl Fn(&MeshStats) -> bool,
    ) -> Result<MeshStats, PeerError> {
        self.page.until("mesh.stats", what, limit, reached).await
    }

    /// Captures more sources and negotiates them: by an offer of its own, or, as the callee, by describing them.
    ///
    /// # Errors
    /// When the page or the driver fails.
    pub async fn publish_later(&self, sources: &[&str]) -> Result<(), PeerError> {
        self.page.call("mesh.publishLater", json!({"sources": sources})).await
    }

    /// Mutes or unmutes a source.
    ///
    /// # Errors
    /// When the page or the driver fails.
    pub async fn set_muted(&self, source: &str, muted: bool) -> Result<(), PeerError> {
        self.page.call("mesh.setMuted", json!({"source": source, "muted": muted})).await
    }

    /// Sends a text on a data channel.
    ///
    /// # Errors
    /// When the page or the driver fails.
    pub async fn send_data(&self, reliable: bool, topic: &str, text: &str) -> Result<(), PeerError> {
        self.page.call("mesh.sendData", json!({"reliable": reliable, "topic": topic, "text": text})).await
    }

    /// Hangs up.
    ///
    /// # Errors
    /// When the page or the driver fails.
    pub async fn hang_up(&self) -> Result<(), PeerError> {
        self.page.call("mesh.hangUp", json!({})).await
    }
}

impl MeshStats {
    /// Decoded video frames.
    pub fn frames_decoded(&self) -> u64 {
        self.inbound.iter().map(|track| track.frames_decoded).sum()
    }

    /// Audio samples that were decoded, not invented.
    pub fn samples_decoded(&self) -> u64 {
        self.inbound.iter().filter(|track| track.kind == "audio").map(RtpIn::samples_decoded).sum()
    }

    /// The energy of all received audio.
    pub fn audio_energy(&self) -> f64 {
        self.inbound.iter().map(|track| track.audio_energy).sum()
    }
}

impl FrameKey {
    /// A key of `identity`.
    pub fn new(identity: impl Into<String>, key: impl Into<Vec<u8>>, index: u8) -> Self {
        Self { identity: identity.into(), key: key.into(), index }
    }

    fn json(&self) -> Value {
        json!({"identity": self.identity, "key": STANDARD.encode(&self.key), "index": self.index})
    }
}

impl std::fmt::Debug for MeshMessage {
    /// Without the content, which names addresses.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("MeshMessage").field(&self.event_type).finish()
    }
}

impl std::fmt::Debug for FrameKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FrameKey")
            .field("identity", &self.identity)
            .field("index", &self.index)
            .finish_non_exhaustive()
    }
}

impl Page {
    async fn call<T: serde::de::DeserializeOwned>(&self, cmd: &str, mut args: Value) -> Result<T, PeerError> {
        args["page"] = self.number.into();
        self.running.driver.call(cmd, args, COMMAND_LIMIT).await
    }

    async fn screenshot(&self, file: &Path) -> Result<(), PeerError> {
        self.call("page.screenshot", json!({"file": file})).await
    }

    async fn until<T>(
        &self,
        cmd: &str,
        what: &str,
        limit: Duration,
        reached: impl Fn(&T) -> bool,
    ) -> Result<T, PeerError>
    where
        T: serde::de::DeserializeOwned + std::fmt::Debug,
    {
        // The browser has no event for its counters: they can only be asked for.
        let end = Instant::now() + limit;
        loop {
            let stats: T = self.call(cmd, json!({})).await?;
            if reached(&stats) {
                return Ok(stats);
            }
            if Instant::now() >= end {
                return Err(PeerError::Refused {
                    peer: self.running.peer,
                    what: format!("{what} within {limit:?}"),
                    why: format!("it last saw {stats:#?}"),
                    log: self.running.driver.log_tail(),
                });
            }
            tokio::time::sleep(POLL).await;
        }
    }
}
