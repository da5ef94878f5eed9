//! Sessions: a logged-in device that survives restarts, is cross-signed, and syncs by itself.
//!
//! ```no_run
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use antiphon_call_sdk::{Session, SessionOptions, TrustPolicy};
//!
//! let options = SessionOptions::new("https://matrix.example.org".parse()?, "bot", "password", "/var/lib/bot");
//! let session = Session::log_in_or_restore(options).await?;
//! let room_id = "!room:example.org".try_into()?;
//! let room = session.room(room_id, TrustPolicy::CrossSigned)?;
//! # drop(room); Ok(()) }
//! ```
//!
//! A plain password login with matrix-sdk makes a new device at every start. Others refuse media keys of a device that
//! its owner has not cross-signed and send it none, and nothing says so: it is in calls, deaf and mute. A session keeps
//! its device, and its login fails with the remedy if the device cannot be cross-signed.
#![allow(clippy::disallowed_methods, reason = "this is a shell: it owns the task that syncs")]

mod store;

use std::{fmt, path::PathBuf, pin::Pin, str::FromStr, sync::Arc, time::Duration};

use matrix_sdk::{
    Client, ClientBuildError, Room, RoomState, SessionChange,
    authentication::matrix::MatrixSession,
    config::{RequestConfig, SyncSettings},
    encryption::{
        BackupDownloadStrategy, EncryptionSettings, recovery::RecoveryError,
        secret_storage::SecretStorageError,
    },
    ruma::{
        OwnedRoomId, OwnedServerName, OwnedUserId, RoomId, RoomOrAliasId, ServerName, UserId,
        api::{
            client::{
                filter::FilterDefinition,
                session::get_login_types::v3::LoginType,
                sync::sync_events::v3::Filter,
                uiaa::{AuthData, MatrixUserIdentifier, Password, UserIdentifier},
            },
            error::ErrorKind,
        },
    },
};
use matrix_sdk_base::{BaseClient, StoreError};
use tokio::{sync::watch, task::JoinSet};
use url::Url;
use zeroize::Zeroizing;

use self::store::{SavedSession, Store};
use crate::matrix::{
    MatrixError, OwnTrust, RequestError, TrustPolicy,
    sdk::{Encryptor, SdkRoom, http_error, own_trust, sdk_error},
};

/// How long one `/sync` waits for news.
const POLL: Duration = Duration::from_secs(30);
/// How long the homeserver may take to show a room that we have joined.
const ROOM_SHOWN: Duration = Duration::from_secs(30);
/// For finding out whether the saved access token is still good.
const WHOAMI_LIMIT: Duration = Duration::from_secs(20);
/// After a failed sync, doubled each time.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// Calls go on only after it, so it is short.
const LONGEST_PAUSE: Duration = Duration::from_secs(4);
/// Events of a room in one sync. After more than these, whatever a call is told of besides state may be lost.
const TIMELINE: u32 = 50;

/// A secret text. It prints as `[redacted]` and is wiped when it is dropped.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Zeroizing<String>);

impl Secret {
    /// The text itself.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl From<&str> for Secret {
    fn from(text: &str) -> Self {
        Self(Zeroizing::new(text.to_owned()))
    }
}

impl From<String> for Secret {
    fn from(text: String) -> Self {
        Self(Zeroizing::new(text))
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[redacted]")
    }
}

/// Where a homeserver is found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Homeserver {
    /// At this URL.
    Url(Url),
    /// By the discovery of this server name (`/.well-known/matrix/client`).
    ServerName(OwnedServerName),
}

impl FromStr for Homeserver {
    type Err = SessionError;

    /// A URL with `http` or `https`, or a server name such as `example.org`.
    fn from_str(text: &str) -> Result<Self, SessionError> {
        let invalid = || SessionError::InvalidHomeserver { text: text.to_owned() };
        if text.contains("://") {
            let url = Url::parse(text).ok().filter(|url| matches!(url.scheme(), "http" | "https"));
            return url.map(Self::Url).ok_or_else(invalid);
        }
        ServerName::parse(text).map(Self::ServerName).map_err(|_| invalid())
    }
}

/// Account, store and login parameters of a session.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct SessionOptions {
    /// The homeserver. Used at the first login; later starts use the address in the store.
    pub homeserver: Homeserver,
    /// The user: a localpart or a full id.
    pub user: String,
    /// Their password, for the first login and to set up cross-signing.
    pub password: Secret,
    /// Folder of this session's own: encryption keys, state and the access token. It is created with mode 0700, the
    /// file with the token with mode 0600.
    pub store: PathBuf,
    /// Encrypts the databases in `store` (not the file with the access token). Cannot be changed later.
    pub store_passphrase: Option<Secret>,
    /// Name of the device, as other people see it in device lists.
    pub device_display_name: String,
    /// The recovery key (or passphrase) of the account, with which the device is cross-signed if the account has an
    /// identity already.
    pub recovery_key: Option<Secret>,
    /// Whether a device that cannot be cross-signed may be used: only devices with
    /// [`TrustPolicy::AnyDevice`] exchange media keys with it.
    pub allow_unsigned_device: bool,
    /// The HTTP client, for instance one that trusts a private certificate authority.
    pub http: Option<matrix_sdk::reqwest::Client>,
}

impl SessionOptions {
    /// Logs `user` in with `password`; `store` is a folder of this session's own.
    #[must_use]
    pub fn new(
        homeserver: Homeserver,
        user: impl Into<String>,
        password: impl Into<Secret>,
        store: impl Into<PathBuf>,
    ) -> Self {
        Self {
            homeserver,
            user: user.into(),
            password: password.into(),
            store: store.into(),
            store_passphrase: None,
            device_display_name: "Antiphon call".to_owned(),
            recovery_key: None,
            allow_unsigned_device: false,
            http: None,
        }
    }
}

/// A logged-in, syncing device. Dropping it ends the sync: keep it while calls last.
pub struct Session {
    client: Client,
    encryptor: Arc<Encryptor>,
    syncing: watch::Receiver<bool>,
    // Aborted when dropped.
    _tasks: JoinSet<()>,
    // Last: it holds the lock of the folder.
    _store: Store,
}

impl Session {
    /// Restores the session in the store, or logs in for the first time; cross-signs the device; syncs once, and then
    /// on by itself.
    ///
    /// On the first login of an account without cross-signing one is set up. If the account has an identity, the
    /// recovery key is needed once.
    ///
    /// # Errors
    /// [`SessionError`], each with its remedy. After [`SessionError::NotCrossSigned`] and the errors about the recovery
    /// key the device stays logged in; the next attempt goes on with it.
    pub async fn log_in_or_restore(options: SessionOptions) -> Result<Self, SessionError> {
        // Behind a trait object: matrix-sdk's futures nest deeper than the compiler looks without `recursion_limit`,
        // and an application that spawns this one should not need that attribute.
        let opening: Pin<Box<dyn Future<Output = _> + Send>> = Box::pin(Self::open(options));
        opening.await
    }

    async fn open(options: SessionOptions) -> Result<Self, SessionError> {
        let store = Store::lock(&options.store)?;
        let saved = store.read()?;
        if let Some(saved) = &saved
            && !is_user(&options.user, &saved.session.meta.user_id)
        {
            return Err(SessionError::OtherUser {
                path: options.store,
                stored: saved.session.meta.user_id.clone(),
                wanted: options.user,
            });
        }
        let opened = store.open(options.store_passphrase.as_ref()).await?;
        let missing = match (&saved, opened.has_account) {
            (None, true) => Some("the session file"),
            (Some(_), false) => Some("the encryption keys"),
            _ => None,
        };
        if let Some(missing) = missing {
            return Err(SessionError::StoreIncomplete { path: options.store, missing });
        }
        let base = opened.base;
        let client = build(&options, saved.as_ref(), base.clone()).await?;
        match saved {
            Some(saved) => restore(&client, saved.session, &options, &store).await?,
            None => log_in(&client, &options, &store).await?,
        }
        client.encryption().wait_for_e2ee_initialization_tasks().await;
        // matrix-sdk publishes the keys of a new device with its first sync, and only then can they be signed.
        sync_once(&client, Duration::ZERO, || ()).await.map_err(asked("sync"))?;
        cross_sign(&client, &options).await?;
        let (tell, syncing) = watch::channel(true);
        let mut tasks = JoinSet::new();
        tasks.spawn(sync(client.clone(), tell));
        tasks.spawn(save_tokens(client.clone(), store.writer()));
        Ok(Self { client, encryptor: Arc::new(Encryptor::new(base)), syncing, _tasks: tasks, _store: store })
    }

    /// The client, for all that is not about calls.
    #[must_use]
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Whether syncing works at the moment.
    #[must_use]
    pub fn syncing(&self) -> watch::Receiver<bool> {
        self.syncing.clone()
    }

    /// Joins a room, if the user has not already, and waits until the sync shows it with its state. `room` is an id or
    /// an alias.
    ///
    /// # Errors
    /// [`SessionError::Homeserver`] if the homeserver does not let us in, [`SessionError::NotShown`] if its sync does not
    /// show the room within 30 s.
    pub async fn enter_room(&self, room: &RoomOrAliasId) -> Result<Room, SessionError> {
        // Boxed for the reason that `log_in_or_restore` gives.
        let entering: Pin<Box<dyn Future<Output = _> + Send + '_>> = Box::pin(self.enter(room));
        entering.await
    }

    async fn enter(&self, room: &RoomOrAliasId) -> Result<Room, SessionError> {
        // Before joining, so that no update falls between.
        let mut changes = self.client.subscribe_to_all_room_updates();
        let known = <&RoomId>::try_from(room).ok().and_then(|id| self.client.get_room(id));
        let room_id = match known.filter(|room| room.state() == RoomState::Joined) {
            Some(room) => room.room_id().to_owned(),
            None => {
                let joined = self.client.join_room_by_id_or_alias(room, &[]).await;
                joined.map_err(asked("join the room"))?.room_id().to_owned()
            }
        };
        let shown = async {
            loop {
                if let Some(room) = self.client.get_room(&room_id)
                    && room.state() == RoomState::Joined
                    && room.create_content().is_some()
                {
                    return room;
                }
                // Lagging only means that something changed, so look again.
                let _ = changes.recv().await;
            }
        };
        let room = tokio::time::timeout(ROOM_SHOWN, shown).await;
        room.map_err(|_| SessionError::NotShown { room_id })
    }

    /// A room that the user has joined, for a call.
    ///
    /// # Errors
    /// [`SessionError::NotJoined`].
    pub fn room(&self, room_id: &RoomId, trust: TrustPolicy) -> Result<SdkRoom, SessionError> {
        let room = self.client.get_room(room_id).filter(|room| room.state() == RoomState::Joined);
        let room = room.ok_or_else(|| SessionError::NotJoined { room_id: room_id.to_owned() })?;
        SdkRoom::of_session(room, trust, self.encryptor.clone(), self.syncing.clone())
            .map_err(SessionError::Matrix)
    }
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (user, device) = (self.client.user_id(), self.client.device_id());
        f.debug_struct("Session").field("user", &user).field("device", &device).finish_non_exhaustive()
    }
}

/// Why there is no session.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SessionError {
    /// Neither a URL nor a server name.
    #[error(
        "{text:?} is neither a homeserver URL nor a server name; write https://matrix.example.org or example.org"
    )]
    InvalidHomeserver {
        /// The text.
        text: String,
    },
    /// Another process uses the folder.
    #[error("another session uses {path}; end it, or give this one a folder of its own")]
    StoreInUse {
        /// The folder.
        path: PathBuf,
    },
    /// The folder, a database or the session file could not be read or written.
    #[error("the session store {path} cannot be used; check its permissions and the store passphrase")]
    Store {
        /// The folder or file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The folder holds one half of a session: a device without a token, or a token without keys.
    #[error("the session store {path} lacks {missing}; delete the folder to log in as a new device")]
    StoreIncomplete {
        /// The folder.
        path: PathBuf,
        /// The missing half.
        missing: &'static str,
    },
    /// The folder belongs to another user.
    #[error("{path} holds a session of {stored}, not of {wanted}; give each user a folder of its own")]
    OtherUser {
        /// The folder.
        path: PathBuf,
        /// Owner of the stored session.
        stored: OwnedUserId,
        /// The user in the options.
        wanted: String,
    },
    /// The homeserver could not be found.
    #[error("the homeserver {homeserver} could not be found or reached")]
    Discovery {
        /// As it was given.
        homeserver: String,
        /// Why.
        #[source]
        source: Box<ClientBuildError>,
    },
    /// The homeserver has no password login.
    #[error(
        "the homeserver does not offer password login; log a matrix-sdk client in by other means and use \
         Call::join (or SdkRoom::with_base_client for sticky memberships in encrypted rooms)"
    )]
    NoPasswordLogin,
    /// Wrong user name or password.
    #[error("the homeserver does not accept the user name or password: {message}")]
    WrongCredentials {
        /// The homeserver's words.
        message: String,
    },
    /// The device was logged out.
    #[error(
        "the device {device} in {path} was logged out on the homeserver; delete the folder to log in as a new device"
    )]
    LoggedOut {
        /// Its id.
        device: String,
        /// The folder.
        path: PathBuf,
    },
    /// The account has a cross-signing identity that has not signed this device.
    #[error(
        "the account has a cross-signing identity that has not signed this device, so others would refuse its media \
         keys; give the account's recovery key, or verify the device from another one and start again"
    )]
    NotCrossSigned,
    /// The recovery key is wrong.
    #[error("the recovery key does not open the account's secret storage; check it for typing errors")]
    WrongRecoveryKey(#[source] Box<SecretStorageError>),
    /// There is nothing that the recovery key could open.
    #[error(
        "the account has no secret storage, so its recovery key opens nothing; set up recovery on a device that is \
         logged in, or verify this device from there"
    )]
    NoSecretStorage,
    /// Recovery worked, and yet the device is not signed.
    #[error(
        "the account's secret storage does not hold its cross-signing keys; set up recovery anew on another device"
    )]
    IncompleteRecovery,
    /// A request failed.
    #[error("the homeserver could not {doing}")]
    Homeserver {
        /// The operation.
        doing: &'static str,
        /// Why it did not.
        #[source]
        source: RequestError,
    },
    /// The user is not in the room.
    #[error("the user is not joined to the room {room_id}")]
    NotJoined {
        /// The room.
        room_id: OwnedRoomId,
    },
    /// The homeserver let us into the room, but its sync does not show it.
    #[error("the homeserver did not show the room {room_id} within 30 s; try again")]
    NotShown {
        /// The room.
        room_id: OwnedRoomId,
    },
    /// The client has no session.
    #[error(transparent)]
    Matrix(MatrixError),
}

/// Whether `wanted`, a localpart or full id, is `user`.
fn is_user(wanted: &str, user: &UserId) -> bool {
    if wanted.starts_with('@') { wanted == user.as_str() } else { wanted == user.localpart() }
}

async fn build(
    options: &SessionOptions,
    saved: Option<&SavedSession>,
    base: BaseClient,
) -> Result<Client, SessionError> {
    let encryption = EncryptionSettings {
        // Done here, where failing is told.
        auto_enable_cross_signing: false,
        auto_enable_backups: false,
        backup_download_strategy: BackupDownloadStrategy::AfterDecryptionFailure,
    };
    let mut builder = Client::builder()
        .base_client(base)
        .handle_refresh_tokens()
        // Without a limit a failing sync is retried for a quarter of an hour before anybody is told.
        .request_config(RequestConfig::short_retry())
        .with_encryption_settings(encryption);
    if let Some(http) = &options.http {
        builder = builder.http_client(http.clone());
    }
    let (builder, homeserver) = match (saved, &options.homeserver) {
        (Some(saved), _) => (builder.homeserver_url(&saved.homeserver), saved.homeserver.to_string()),
        (None, Homeserver::Url(url)) => (builder.homeserver_url(url), url.to_string()),
        (None, Homeserver::ServerName(name)) => (builder.server_name(name), name.to_string()),
    };
    builder.build().await.map_err(|source| SessionError::Discovery { homeserver, source: Box::new(source) })
}

async fn restore(
    client: &Client,
    session: MatrixSession,
    options: &SessionOptions,
    store: &Store,
) -> Result<(), SessionError> {
    let device = session.meta.device_id.clone();
    // Asked before the session is restored: matrix-sdk panics on a login after that.
    match token_state(client, &session.tokens.access_token).await? {
        TokenState::Valid => client.restore_session(session).await.map_err(asked("restore the session")),
        TokenState::Expired => {
            tracing::info!(%device, "the access token has expired; logging the same device in again");
            let login = client.matrix_auth().login_username(&options.user, options.password.expose());
            login.device_id(device.as_str()).send().await.map_err(refused_login)?;
            save(client, store)
        }
        TokenState::LoggedOut => {
            Err(SessionError::LoggedOut { device: device.to_string(), path: options.store.clone() })
        }
    }
}

enum TokenState {
    Valid,
    /// The device is still there (soft logout).
    Expired,
    LoggedOut,
}

async fn token_state(client: &Client, token: &str) -> Result<TokenState, SessionError> {
    #[derive(serde::Deserialize)]
    struct Refusal {
        errcode: String,
        #[serde(default)]
        soft_logout: bool,
    }
    let failed = |cause: String| SessionError::Homeserver {
        doing: "tell who we are",
        source: RequestError::Network { cause },
    };
    let mut url = client.homeserver();
    if let Ok(mut path) = url.path_segments_mut() {
        path.pop_if_empty().extend(["_matrix", "client", "v3", "account", "whoami"]);
    }
    let request = client.http_client().get(url).bearer_auth(token).timeout(WHOAMI_LIMIT);
    let answer = request.send().await;
    let answer = answer.map_err(|error| SessionError::Homeserver {
        doing: "tell who we are",
        source: http_error(&matrix_sdk::HttpError::Reqwest(error)),
    })?;
    let status = answer.status();
    if status.is_success() {
        return Ok(TokenState::Valid);
    }
    match answer.json::<Refusal>().await {
        Ok(Refusal { errcode, soft_logout }) if errcode == "M_UNKNOWN_TOKEN" => {
            Ok(if soft_logout { TokenState::Expired } else { TokenState::LoggedOut })
        }
        Ok(Refusal { errcode, .. }) => Err(failed(format!("it answered {status} {errcode}"))),
        Err(_) => Err(failed(format!("it answered {status}"))),
    }
}

async fn log_in(client: &Client, options: &SessionOptions, store: &Store) -> Result<(), SessionError> {
    let auth = client.matrix_auth();
    let types = auth.get_login_types().await;
    let types = types.map_err(|error| SessionError::Homeserver {
        doing: "list its login types",
        source: http_error(&error),
    })?;
    if !types.flows.iter().any(|flow| matches!(flow, LoginType::Password(_))) {
        return Err(SessionError::NoPasswordLogin);
    }
    let login = auth.login_username(&options.user, options.password.expose());
    login.initial_device_display_name(&options.device_display_name).send().await.map_err(refused_login)?;
    save(client, store)
}

fn save(client: &Client, store: &Store) -> Result<(), SessionError> {
    match SavedSession::of(client) {
        Some(saved) => store.write(&saved),
        None => Err(SessionError::Matrix(MatrixError::NotLoggedIn)),
    }
}

fn refused_login(error: matrix_sdk::Error) -> SessionError {
    match error.client_api_error_kind() {
        Some(ErrorKind::Forbidden | ErrorKind::UserDeactivated) => {
            SessionError::WrongCredentials { message: error.to_string() }
        }
        _ => asked("log in")(error),
    }
}

/// Makes others accept this device: sets cross-signing up, or recovers it.
async fn cross_sign(client: &Client, options: &SessionOptions) -> Result<(), SessionError> {
    let trust = async || own_trust(client).await.map_err(asked("list our own devices"));
    match trust().await? {
        OwnTrust::CrossSigned => return Ok(()),
        OwnTrust::NoIdentity => create_identity(client, options).await?,
        OwnTrust::NotCrossSigned => sign_device(client, options).await?,
    }
    match trust().await? {
        OwnTrust::CrossSigned => Ok(()),
        _ if options.allow_unsigned_device => {
            tracing::warn!(
                "this device is not cross-signed: devices that insist on it exchange no media keys with us"
            );
            Ok(())
        }
        _ if options.recovery_key.is_some() => Err(SessionError::IncompleteRecovery),
        _ => Err(SessionError::NotCrossSigned),
    }
}

async fn create_identity(client: &Client, options: &SessionOptions) -> Result<(), SessionError> {
    let encryption = client.encryption();
    let doing = "set up cross-signing";
    let Err(error) = encryption.bootstrap_cross_signing(None).await else { return Ok(()) };
    let Some(interactive) = error.as_uiaa_response() else { return Err(asked(doing)(error)) };
    let user = MatrixUserIdentifier::new(options.user.clone());
    let mut password = Password::new(UserIdentifier::Matrix(user), options.password.expose().to_owned());
    password.session = interactive.session.clone();
    encryption.bootstrap_cross_signing(Some(AuthData::Password(password))).await.map_err(asked(doing))
}

/// With the private keys if this device has them, else with the recovery key.
async fn sign_device(client: &Client, options: &SessionOptions) -> Result<(), SessionError> {
    let encryption = client.encryption();
    if encryption.cross_signing_status().await.is_some_and(|status| status.has_self_signing)
        && let Ok(Some(device)) = encryption.get_own_device().await
    {
        return device.verify().await.map_err(|error| SessionError::Homeserver {
            doing: "take our signature of this device",
            source: RequestError::Local { cause: error.to_string() },
        });
    }
    let Some(key) = &options.recovery_key else { return Ok(()) };
    encryption.recovery().recover(key.expose()).await.map_err(|error| match error {
        RecoveryError::SecretStorage(SecretStorageError::MissingKeyInfo { .. }) => {
            SessionError::NoSecretStorage
        }
        RecoveryError::SecretStorage(SecretStorageError::Sdk(error)) | RecoveryError::Sdk(error) => {
            asked("read the account's secret storage")(error)
        }
        RecoveryError::SecretStorage(error) => SessionError::WrongRecoveryKey(Box::new(error)),
        RecoveryError::BackupExistsOnServer => SessionError::IncompleteRecovery,
    })
}

fn asked(doing: &'static str) -> impl Fn(matrix_sdk::Error) -> SessionError {
    move |error| SessionError::Homeserver { doing, source: sdk_error(&error) }
}

/// Syncs once, and waits up to `poll` for news.
///
/// matrix-sdk's store fails at the redaction of a state event that ruma cannot read, such as a membership whose state key
/// names no user, and so does every later sync, which brings it again (matrix-rust-sdk issue 6336). Any member of a room can
/// do that, so the sync is repeated without redactions, after a call of `on_skip`.
async fn sync_once(client: &Client, poll: Duration, on_skip: impl FnOnce()) -> matrix_sdk::Result<()> {
    let Err(error) = client.sync_once(sync_settings(poll, &[])).await else { return Ok(()) };
    let is_unreadable = matches!(&error, matrix_sdk::Error::StateStore(error)
        if matches!(**error, StoreError::Json(_) | StoreError::Redaction(_)));
    if !is_unreadable {
        return Err(error);
    }
    tracing::warn!("the redactions of a sync cannot be stored; they are left out");
    on_skip();
    client.sync_once(sync_settings(Duration::ZERO, &["m.room.redaction"])).await.map(drop)
}

fn sync_settings(poll: Duration, not_types: &[&str]) -> SyncSettings {
    let mut filter = FilterDefinition::with_lazy_loading();
    filter.room.timeline.limit = Some(TIMELINE.into());
    filter.room.timeline.not_types = not_types.iter().map(|event_type| (*event_type).to_owned()).collect();
    SyncSettings::new().timeout(poll).filter(Filter::FilterDefinition(filter))
}

/// Syncs until the session is over.
async fn sync(client: Client, tell: watch::Sender<bool>) {
    let mut pause = FIRST_PAUSE;
    loop {
        // Listeners look for what they missed when it works again.
        let on_skip = || {
            tell.send_replace(false);
        };
        let is_working = match sync_once(&client, POLL, on_skip).await {
            Ok(()) => {
                pause = FIRST_PAUSE;
                true
            }
            Err(error) => {
                let error = sdk_error(&error);
                if error == RequestError::LoggedOut {
                    tracing::error!("the device was logged out on the homeserver: the sync has ended");
                    tell.send_replace(false);
                    return;
                }
                tracing::warn!(%error, "the sync failed; trying again in {pause:?}");
                false
            }
        };
        tell.send_if_modified(|syncing| std::mem::replace(syncing, is_working) != is_working);
        if !is_working {
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }
}

/// Keeps the session file current where the homeserver makes access tokens expire.
async fn save_tokens(client: Client, writer: store::Writer) {
    let mut changes = client.subscribe_to_session_changes();
    loop {
        match changes.recv().await {
            Ok(SessionChange::UnknownToken(_)) => {}
            Ok(SessionChange::TokensRefreshed) | Err(tokio::sync::broadcast::error::RecvError::Lagged(_)) => {
                let saved = SavedSession::of(&client).map(|saved| writer.write(&saved));
                if let Some(Err(error)) = saved {
                    tracing::error!(%error, "the new access token could not be saved: the next start will have to log in");
                }
            }
            Err(tokio::sync::broadcast::error::RecvError::Closed) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use matrix_sdk::ruma::user_id;

    use super::*;

    #[test]
    fn homeserver_is_a_url_or_a_server_name() {
        assert!(matches!("https://hs.example".parse(), Ok(Homeserver::Url(_))));
        assert!(matches!("example.org:8448".parse(), Ok(Homeserver::ServerName(_))));
        for bad in ["ftp://x", "", "a b", "https://"] {
            assert!(
                matches!(bad.parse::<Homeserver>(), Err(SessionError::InvalidHomeserver { .. })),
                "{bad}"
            );
        }
    }

    #[test]
    fn user_matches_by_localpart_or_full_id() {
        let alice = user_id!("@alice:example.org");
        assert!(is_user("alice", alice) && is_user("@alice:example.org", alice));
        assert!(!is_user("bob", alice) && !is_user("@alice:other.org", alice));
    }

    #[test]
    fn secrets_do_not_print() {
        let mut options =
            SessionOptions::new("https://hs.example".parse().unwrap(), "alice", "pass-word", "/x");
        options.store_passphrase = Some("store-phrase".into());
        options.recovery_key = Some("recovery-phrase".to_owned().into());
        let printed = format!("{options:?}");
        assert!(printed.contains("[redacted]"));
        for secret in ["pass-word", "store-phrase", "recovery-phrase"] {
            assert!(!printed.contains(secret), "{printed}");
        }
    }
}
