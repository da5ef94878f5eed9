//! The folder of a session: databases, session file, lock.

use std::{
    fs::{self, DirBuilder, File, OpenOptions, TryLockError},
    io::Write as _,
    path::{Path, PathBuf},
};

use matrix_sdk::{
    Client, SqliteCryptoStore, SqliteEventCacheStore, SqliteMediaStore, SqliteStateStore, SqliteStoreConfig,
    ThreadingSupport, authentication::matrix::MatrixSession, cross_process_lock::CrossProcessLockConfig,
};
use matrix_sdk_base::{BaseClient, DmRoomDefinition, crypto::store::CryptoStore as _, store::StoreConfig};
use serde::{Deserialize, Serialize};
use url::Url;
use zeroize::Zeroizing;

use super::{Secret, SessionError};

const SESSION_FILE: &str = "session.json";
const LOCK_FILE: &str = "lock";

/// A locked folder. The lock ends when this is dropped, also by the end of the process.
#[derive(Debug)]
pub(super) struct Store {
    path: PathBuf,
    _lock: File,
}

/// Content of the session file.
#[derive(Serialize, Deserialize)]
pub(super) struct SavedSession {
    pub(super) homeserver: Url,
    #[serde(flatten)]
    pub(super) session: MatrixSession,
}

impl SavedSession {
    /// The client's session; `None` if it is not logged in.
    pub(super) fn of(client: &Client) -> Option<Self> {
        Some(Self { homeserver: client.homeserver(), session: client.matrix_auth().session()? })
    }
}

/// The databases.
pub(super) struct Opened {
    pub(super) base: BaseClient,
    /// Whether they hold the keys of a device.
    pub(super) has_account: bool,
}

/// Writes the session file; the folder must stay locked meanwhile.
pub(super) struct Writer(PathBuf);

impl Store {
    /// Creates the folder if it is missing, and locks it.
    pub(super) fn lock(path: &Path) -> Result<Self, SessionError> {
        let failed = failed(path);
        let mut folder = DirBuilder::new();
        folder.recursive(true);
        #[cfg(unix)]
        std::os::unix::fs::DirBuilderExt::mode(&mut folder, 0o700);
        folder.create(path).map_err(&failed)?;
        let lock = private().open(path.join(LOCK_FILE)).map_err(&failed)?;
        match lock.try_lock() {
            Ok(()) => Ok(Self { path: path.to_owned(), _lock: lock }),
            Err(TryLockError::WouldBlock) => Err(SessionError::StoreInUse { path: path.to_owned() }),
            Err(TryLockError::Error(error)) => Err(failed(error)),
        }
    }

    /// The saved session, if there is one.
    pub(super) fn read(&self) -> Result<Option<SavedSession>, SessionError> {
        let path = self.path.join(SESSION_FILE);
        let text = match fs::read_to_string(&path) {
            Ok(text) => Zeroizing::new(text),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(&path)(error)),
        };
        serde_json::from_str(&text)
            .map(Some)
            .map_err(|source| SessionError::Store { path, source: Box::new(source) })
    }

    pub(super) fn write(&self, saved: &SavedSession) -> Result<(), SessionError> {
        self.writer().write(saved)
    }

    pub(super) fn writer(&self) -> Writer {
        Writer(self.path.join(SESSION_FILE))
    }

    /// Opens the databases.
    pub(super) async fn open(&self, passphrase: Option<&Secret>) -> Result<Opened, SessionError> {
        let unusable = |source: Box<dyn std::error::Error + Send + Sync>| SessionError::Store {
            path: self.path.clone(),
            source,
        };
        let config = SqliteStoreConfig::new(&self.path).passphrase(passphrase.map(Secret::expose));
        let crypto =
            SqliteCryptoStore::open_with_config(&config).await.map_err(|error| unusable(error.into()))?;
        let has_account = crypto.load_account().await.map_err(|error| unusable(error.into()))?.is_some();
        let state =
            SqliteStateStore::open_with_config(&config).await.map_err(|error| unusable(error.into()))?;
        let cache =
            SqliteEventCacheStore::open_with_config(&config).await.map_err(|error| unusable(error.into()))?;
        let media =
            SqliteMediaStore::open_with_config(&config).await.map_err(|error| unusable(error.into()))?;
        // The lock file has seen to it.
        let stores = StoreConfig::new(CrossProcessLockConfig::SingleProcess)
            .crypto_store(crypto)
            .state_store(state)
            .event_cache_store(cache)
            .media_store(media);
        let base = BaseClient::new(stores, ThreadingSupport::Disabled, DmRoomDefinition::default());
        Ok(Opened { base, has_account })
    }
}

impl Writer {
    /// Replaces the file as a whole: a crash leaves the old one or the new one.
    pub(super) fn write(&self, saved: &SavedSession) -> Result<(), SessionError> {
        let path = &self.0;
        let text = serde_json::to_string(saved).map(Zeroizing::new);
        let text =
            text.map_err(|source| SessionError::Store { path: path.clone(), source: Box::new(source) })?;
        let new = path.with_extension("new");
        let written = private().truncate(true).open(&new).and_then(|mut file| {
            file.write_all(text.as_bytes())?;
            file.sync_all()
        });
        written.and_then(|()| fs::rename(&new, path)).map_err(failed(path))
    }
}

/// For files that only their owner may read.
fn private() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.write(true).create(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options
}

fn failed(path: &Path) -> impl Fn(std::io::Error) -> SessionError {
    let path = path.to_owned();
    move |source| SessionError::Store { path: path.clone(), source: Box::new(source) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn saved() -> SavedSession {
        serde_json::from_str(
            r#"{"homeserver": "https://hs.example/", "user_id": "@a:x", "device_id": "DEV", "access_token": "token"}"#,
        )
        .unwrap()
    }

    #[test]
    fn session_file_is_private_and_round_trips() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::lock(&folder.path().join("new")).unwrap();
        assert!(store.read().unwrap().is_none());
        store.write(&saved()).unwrap();
        let read = store.read().unwrap().unwrap();
        assert_eq!((read.homeserver.as_str(), &read.session), ("https://hs.example/", &saved().session));
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt as _;
            let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
            assert_eq!(mode(&store.path.join(SESSION_FILE)), 0o600);
            assert_eq!(mode(&store.path), 0o700);
        }
    }

    #[test]
    fn second_lock_of_one_folder_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let first = Store::lock(folder.path()).unwrap();
        assert!(matches!(Store::lock(folder.path()), Err(SessionError::StoreInUse { .. })));
        drop(first);
        Store::lock(folder.path()).unwrap();
    }

    #[test]
    fn damaged_session_file_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::lock(folder.path()).unwrap();
        fs::write(folder.path().join(SESSION_FILE), "{").unwrap();
        let Err(SessionError::Store { path, .. }) = store.read() else { panic!("read") };
        assert!(path.ends_with(SESSION_FILE));
    }
}
