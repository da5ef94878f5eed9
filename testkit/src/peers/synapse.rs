//! A real Synapse, alone, on loopback.

use std::path::Path;
use std::time::Duration;

use aws_lc_rs::hmac;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose,
};
use serde::Deserialize;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::process::Command;

use super::process::Process;
use super::{Peer, PeerError, ports};

const PEER: &str = "Synapse";
const START_LIMIT: Duration = Duration::from_secs(60);
const REQUEST_LIMIT: Duration = Duration::from_secs(30);

/// How a Synapse is to be configured.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct SynapseOptions {
    /// The authorisation service that the homeserver offers under `rtc/transports` (MSC4143). None: no transport.
    pub rtc_service_url: Option<String>,
    /// Whether the homeserver sends clients to its TLS listener (`/.well-known/matrix/client`), as a deployment does
    /// that has no plain one.
    pub clients_over_tls: bool,
    /// Where the homeserver sends clients (`/.well-known/matrix/client`), if that is not itself.
    pub clients_at: Option<String>,
    /// The token of an application service that is interested in all users and is sent nothing. None: there is none.
    pub application_service_token: Option<String>,
    /// Whether it speaks to other Synapses on loopback, whose self-signed certificates it then takes.
    pub federates: bool,
}

impl SynapseOptions {
    /// Offers this authorisation service to clients.
    pub fn with_rtc_service(url: impl Into<String>) -> Self {
        Self { rtc_service_url: Some(url.into()), ..Self::default() }
    }

    /// Sends clients to the TLS listener.
    #[must_use]
    pub fn clients_over_tls(mut self) -> Self {
        self.clients_over_tls = true;
        self
    }

    /// The same, with an application service that is interested in all users and has this token.
    #[must_use]
    pub fn and_application_service(mut self, token: impl Into<String>) -> Self {
        self.application_service_token = Some(token.into());
        self
    }

    /// The same, federating with other Synapses on loopback.
    #[must_use]
    pub fn and_federation(mut self) -> Self {
        self.federates = true;
        self
    }
}

/// A running Synapse. It ends when this is dropped, and its data goes with it.
#[derive(Debug)]
pub struct Synapse {
    process: Process,
    client_port: u16,
    federation_port: u16,
    shared_secret: String,
    authority: String,
    signing_key: String,
    http: reqwest::Client,
    // Last: the folder must outlive the process.
    folder: TempDir,
}

/// A logged-in device.
#[derive(Clone, Deserialize)]
pub struct Session {
    /// The full user id.
    pub user_id: String,
    /// The device.
    pub device_id: String,
    /// Its access token.
    pub access_token: String,
}

impl Synapse {
    /// Starts a fresh Synapse and waits until it answers (about two seconds).
    ///
    /// # Errors
    /// [`PeerError::Missing`] when it is not installed; otherwise why it did not start, with the end of its log.
    pub async fn start(options: SynapseOptions) -> Result<Self, PeerError> {
        let python = Peer::Synapse.find()?;
        let machine = || PeerError::machine(PEER);
        let folder = tempfile::tempdir().map_err(machine())?;
        let (client_port, federation_port) =
            (ports::free().map_err(machine())?, ports::free().map_err(machine())?);
        let shared_secret = secret();
        let Certificates { authority, leaf, key } =
            Certificates::new().map_err(std::io::Error::other).map_err(machine())?;
        let config = config(client_port, federation_port, &shared_secret, &options);
        let signing_key = format!("ed25519 a_test {}\n", STANDARD_NO_PAD.encode(rand::random::<[u8; 32]>()));
        for (name, content) in [
            // JSON is YAML.
            ("homeserver.yaml", format!("{config:#}")),
            ("ca.crt", authority.clone()),
            ("tls.crt", leaf),
            ("tls.key", key),
            ("signing.key", signing_key.clone()),
            ("application_service.yaml", format!("{:#}", application_service(&options))),
        ] {
            std::fs::write(folder.path().join(name), content).map_err(machine())?;
        }
        let process = Self::spawn(&python, folder.path())?;
        let http = reqwest::Client::builder()
            .timeout(REQUEST_LIMIT)
            .no_proxy()
            .build()
            .map_err(std::io::Error::other)
            .map_err(machine())?;
        let mut synapse = Self {
            process,
            client_port,
            federation_port,
            shared_secret,
            authority,
            signing_key,
            http,
            folder,
        };
        synapse.until_ready().await?;
        Ok(synapse)
    }

    /// Stops it. Its data stays for [`Synapse::start_again`]. Blocks the thread for up to three seconds.
    pub fn stop(&mut self) {
        self.process.stop();
    }

    /// Starts it again after [`Synapse::stop`], on the same ports with the same data, and waits until it answers.
    ///
    /// # Errors
    /// Why it did not start, with the end of its log.
    pub async fn start_again(&mut self) -> Result<(), PeerError> {
        self.process = Self::spawn(&Peer::Synapse.find()?, self.folder.path())?;
        self.until_ready().await
    }

    fn spawn(python: &Path, folder: &Path) -> Result<Process, PeerError> {
        Process::start(PEER, command(python, folder), &folder.join("log"))
    }

    /// The client-server API: `http://127.0.0.1:PORT`.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.client_port)
    }

    /// The same with the name instead of the address, for browsers: `http://localhost:PORT`.
    pub fn localhost_url(&self) -> String {
        format!("http://localhost:{}", self.client_port)
    }

    /// The server name: `localhost:PORT` of the federation listener, so that no discovery is needed.
    pub fn server_name(&self) -> String {
        format!("localhost:{}", self.federation_port)
    }

    /// The certificate of the authority that has signed the federation listener's, PEM, for whoever must trust it.
    pub fn authority_pem(&self) -> &str {
        &self.authority
    }

    /// The content of its signing key file, for whoever must sign in its name.
    pub fn signing_key(&self) -> &str {
        &self.signing_key
    }

    /// Registers a user by the shared secret; the answer is a logged-in device.
    ///
    /// # Errors
    /// [`PeerError::Refused`] with Synapse's answer, such as a user name that is taken.
    pub async fn register(&self, username: &str, password: &str) -> Result<Session, PeerError> {
        let path = "/_synapse/admin/v1/register";
        let nonce = self.call(self.http.get(self.url() + path), path).await?;
        let nonce = nonce["nonce"].as_str().unwrap_or_default();
        let key = hmac::Key::new(hmac::HMAC_SHA1_FOR_LEGACY_USE_ONLY, self.shared_secret.as_bytes());
        let mac: String = hmac::sign(&key, [nonce, username, password, "notadmin"].join("\0").as_bytes())
            .as_ref()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        let body =
            json!({"nonce": nonce, "username": username, "password": password, "admin": false, "mac": mac});
        let answer = self.call(self.http.post(self.url() + path).json(&body), path).await?;
        serde_json::from_value(answer).map_err(|error| self.refused(path, &error.to_string()))
    }

    /// Creates a public, encrypted room in which everybody may join a call; returns its id.
    ///
    /// # Errors
    /// [`PeerError::Refused`] with Synapse's answer.
    pub async fn create_call_room(&self, creator: &Session) -> Result<String, PeerError> {
        let path = "/_matrix/client/v3/createRoom";
        // Call membership is room state: with the default power levels only moderators could join.
        let body = json!({
            "preset": "public_chat",
            "name": "call",
            "initial_state": [{"type": "m.room.encryption", "state_key": "",
                "content": {"algorithm": "m.megolm.v1.aes-sha2"}}],
            "power_level_content_override": {"events":
                {"org.matrix.msc3401.call.member": 0, "org.matrix.msc4143.rtc.member": 0}},
        });
        let request = self.http.post(self.url() + path).bearer_auth(&creator.access_token).json(&body);
        let answer = self.call(request, path).await?;
        answer["room_id"]
            .as_str()
            .map(str::to_owned)
            .ok_or_else(|| self.refused(path, "no room_id in the answer"))
    }

    /// Joins a public room of this server.
    ///
    /// # Errors
    /// [`PeerError::Refused`] with Synapse's answer.
    pub async fn join(&self, member: &Session, room: &str) -> Result<(), PeerError> {
        self.join_via(member, room, None).await
    }

    /// Joins a public room that `server` has, if one is given, or else this server.
    ///
    /// # Errors
    /// [`PeerError::Refused`] with Synapse's answer.
    pub async fn join_via(
        &self,
        member: &Session,
        room: &str,
        server: Option<&str>,
    ) -> Result<(), PeerError> {
        let mut url =
            reqwest::Url::parse(&self.url()).map_err(|error| self.refused("join", &error.to_string()))?;
        // The id may hold any character, and each belongs into one segment.
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.extend(["_matrix", "client", "v3", "join", room]);
        }
        if let Some(server) = server {
            // The older name beside the newer.
            url.query_pairs_mut().append_pair("server_name", server).append_pair("via", server);
        }
        let request = self.http.post(url).bearer_auth(&member.access_token).json(&json!({}));
        self.call(request, "join").await.map(drop)
    }

    /// The end of Synapse's log.
    pub fn log_tail(&self) -> String {
        self.process.log_tail()
    }

    async fn until_ready(&mut self) -> Result<(), PeerError> {
        let (http, url) = (self.http.clone(), self.url() + "/_matrix/client/versions");
        let ready = async || http.get(&url).send().await.is_ok_and(|answer| answer.status().is_success());
        self.process.until("an answer to /versions", START_LIMIT, ready).await
    }

    async fn call(&self, request: reqwest::RequestBuilder, what: &str) -> Result<Value, PeerError> {
        let failed = |error: reqwest::Error| self.refused(what, &error.to_string());
        let answer = request.send().await.map_err(failed)?;
        let status = answer.status();
        let body = answer.text().await.map_err(failed)?;
        if !status.is_success() {
            return Err(self.refused(what, &format!("{status} {body}")));
        }
        serde_json::from_str(&body).map_err(|error| self.refused(what, &error.to_string()))
    }

    fn refused(&self, what: &str, why: &str) -> PeerError {
        PeerError::Refused { peer: PEER, what: what.to_owned(), why: why.to_owned(), log: self.log_tail() }
    }
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session")
            .field("user_id", &self.user_id)
            .field("device_id", &self.device_id)
            .finish_non_exhaustive()
    }
}

fn command(python: &Path, folder: &Path) -> Command {
    let mut command = Command::new(python);
    command.args(["-m", "synapse.app.homeserver", "-c", "homeserver.yaml"]).current_dir(folder);
    command
}

fn secret() -> String {
    STANDARD_NO_PAD.encode(rand::random::<[u8; 32]>())
}

/// An authority of the test's own, and what it has signed for the federation listener. All PEM.
struct Certificates {
    authority: String,
    leaf: String,
    key: String,
}

impl Certificates {
    fn new() -> Result<Self, rcgen::Error> {
        let mut authority = CertificateParams::default();
        authority.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        authority.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        authority.distinguished_name.push(DnType::CommonName, "authority of a test");
        let authority = CertifiedIssuer::self_signed(authority, KeyPair::generate()?)?;
        // A wildcard would make Synapse's own client refuse the whole certificate.
        let mut leaf = CertificateParams::new(["localhost", "127.0.0.1", "::1"].map(str::to_owned))?;
        leaf.distinguished_name.push(DnType::CommonName, "localhost");
        leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        leaf.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate()?;
        let leaf = leaf.signed_by(&key, &authority)?;
        Ok(Self { authority: authority.pem(), leaf: leaf.pem(), key: key.serialize_pem() })
    }
}

/// The registration of an application service that may ask about every room with a user of ours in it.
fn application_service(options: &SynapseOptions) -> Value {
    json!({
        "id": "test", "url": null, "as_token": options.application_service_token, "hs_token": secret(),
        "sender_localpart": "_test", "rate_limited": false,
        "namespaces": {"users": [{"exclusive": false, "regex": "@.*"}], "rooms": [], "aliases": []},
    })
}

fn config(client_port: u16, federation_port: u16, shared_secret: &str, options: &SynapseOptions) -> Value {
    let listener = |port: u16, tls: bool| {
        json!({"port": port, "type": "http", "tls": tls, "bind_addresses": ["127.0.0.1"],
            "resources": [{"names": ["client", "federation", "openid"], "compress": false}]})
    };
    let fast = json!({"per_second": 100_000, "burst_count": 100_000});
    let public = if let Some(url) = &options.clients_at {
        format!("{url}/")
    } else if options.clients_over_tls {
        format!("https://localhost:{federation_port}/")
    } else {
        format!("http://localhost:{client_port}/")
    };
    let mut config = json!({
        "server_name": format!("localhost:{federation_port}"),
        "public_baseurl": public,
        "pid_file": "homeserver.pid",
        "listeners": [listener(client_port, false), listener(federation_port, true)],
        "tls_certificate_path": "tls.crt",
        "tls_private_key_path": "tls.key",
        "federation_custom_ca_list": ["ca.crt"],
        // The default refuses loopback.
        "ip_range_blacklist": [],
        "trusted_key_servers": [],
        "suppress_key_server_warning": true,
        "database": {"name": "sqlite3", "args": {"database": "homeserver.db"}},
        "media_store_path": "media",
        "signing_key_path": "signing.key",
        "report_stats": false,
        "registration_shared_secret": shared_secret,
        "enable_registration": true,
        "enable_registration_without_verification": true,
        "macaroon_secret_key": secret(),
        "form_secret": secret(),
        "bcrypt_rounds": 4,
        "presence": {"enabled": false},
        // MSC4140 is off when this is absent.
        "max_event_delay_duration": "24h",
        "experimental_features": {"msc4143_enabled": true, "msc4354_enabled": true, "msc4222_enabled": true,
            "msc4140_max_delayed_events_per_user": 10_000},
        "rc_login": {"address": fast, "account": fast, "failed_attempts": fast},
        "rc_joins": {"local": fast, "remote": fast},
        "rc_invites": {"per_room": fast, "per_user": fast, "per_issuer": fast},
        "rc_presence": {"per_user": fast},
        "rc_federation": {"window_size": 1000, "sleep_limit": 100_000, "sleep_delay": 1, "reject_limit": 100_000,
            "concurrent": 100},
        "federation": {"destination_min_retry_interval": "1s", "destination_max_retry_interval": "5s",
            "destination_retry_multiplier": 1},
    });
    for limit in [
        "rc_message",
        "rc_registration",
        "rc_registration_token_validity",
        "rc_joins_per_room",
        "rc_third_party_invite",
        "rc_delayed_event_mgmt",
        "rc_room_creation",
        "rc_profile",
        "rc_key_requests",
        "rc_media_create",
        "rc_user_directory",
    ] {
        config[limit] = fast.clone();
    }
    if options.application_service_token.is_some() {
        config["app_service_config_files"] = json!(["application_service.yaml"]);
    }
    if options.federates {
        config["federation_verify_certificates"] = json!(false);
    }
    if let Some(url) = &options.rtc_service_url {
        config["matrix_rtc"] = json!({"transports": [{"type": "livekit", "livekit_service_url": url}]});
    }
    config
}
