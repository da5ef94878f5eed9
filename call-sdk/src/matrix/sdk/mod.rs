//! The port over matrix-sdk: one room of a logged-in client that syncs.
#![allow(clippy::disallowed_methods, reason = "this is a shell: it owns the clock and the tasks")]

mod encrypt;
mod events;
mod http;
mod requests;
mod sticky;
mod to_device;
mod updates;
mod view;

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::AtomicUsize},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use async_trait::async_trait;
use matrix_sdk::{Client, Room, ruma::RoomId};
use matrix_sdk_base::BaseClient;
use tokio::sync::{mpsc, watch};

use self::sticky::StickyStore;
pub(crate) use self::{
    encrypt::Encryptor,
    http::{http_error, sdk_error},
};
use super::{
    Delivery, MatrixError, MatrixPort, MatrixReply, MatrixRequest, MatrixUpdate, OwnTrust, RequestError,
    RoomView, ServerSupport, ToDeviceBatch, TrustPolicy,
};
use crate::{member::Device, time::UnixMillis};

/// For requests that the port makes on its own account.
const OWN_LIMIT: Duration = Duration::from_secs(10);
/// For reading the room and our own trust, which may take several requests.
const VIEW_LIMIT: Duration = Duration::from_secs(30);

/// A room of a logged-in matrix-sdk client, as a call sees it.
#[derive(Clone, Debug)]
pub struct SdkRoom {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    room: Room,
    device: Device,
    trust: TrustPolicy,
    encryptor: Option<Arc<Encryptor>>,
    syncing: Option<watch::Receiver<bool>>,
    sticky: Mutex<StickyStore>,
    /// Whether `sticky` includes the events from before the listener started. Locked during a snapshot.
    is_loaded: tokio::sync::Mutex<bool>,
    listeners: AtomicUsize,
    support: Mutex<Option<ServerSupport>>,
}

impl SdkRoom {
    /// A room of any client. The application keeps the client syncing.
    ///
    /// Limits: encrypted *sticky* events, which sticky membership in encrypted rooms needs, fail with
    /// [`RequestError::Local`]; use a [`Session`](crate::session::Session) or [`SdkRoom::with_base_client`] for them.
    /// Failed deliveries to devices carry no reason. [`MatrixUpdate::Syncing`] is not reported.
    ///
    /// # Errors
    /// [`MatrixError::NotLoggedIn`] if the client has no session.
    pub fn new(room: Room, trust: TrustPolicy) -> Result<Self, MatrixError> {
        Self::build(room, trust, None, None)
    }

    /// A room of a client that was built over `base` with `ClientBuilder::base_client`, for applications that cannot use
    /// a [`Session`](crate::session::Session), for instance because they log in by OAuth. It can do all that a
    /// session's rooms can, but does not report [`MatrixUpdate::Syncing`].
    ///
    /// # Errors
    /// [`MatrixError::NotLoggedIn`] if the client has no session.
    pub fn with_base_client(room: Room, trust: TrustPolicy, base: BaseClient) -> Result<Self, MatrixError> {
        Self::build(room, trust, Some(Arc::new(Encryptor::new(base))), None)
    }

    /// A room of a session.
    pub(crate) fn of_session(
        room: Room,
        trust: TrustPolicy,
        encryptor: Arc<Encryptor>,
        syncing: watch::Receiver<bool>,
    ) -> Result<Self, MatrixError> {
        Self::build(room, trust, Some(encryptor), Some(syncing))
    }

    fn build(
        room: Room,
        trust: TrustPolicy,
        encryptor: Option<Arc<Encryptor>>,
        syncing: Option<watch::Receiver<bool>>,
    ) -> Result<Self, MatrixError> {
        let client = room.client();
        let (Some(user), Some(device)) = (client.user_id(), client.device_id()) else {
            return Err(MatrixError::NotLoggedIn);
        };
        let device = Device::new(user, device);
        let inner = Inner {
            room,
            device,
            trust,
            encryptor,
            syncing,
            sticky: Mutex::default(),
            is_loaded: tokio::sync::Mutex::new(false),
            listeners: AtomicUsize::new(0),
            support: Mutex::default(),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// The room as matrix-sdk knows it.
    #[must_use]
    pub fn room(&self) -> &Room {
        &self.inner.room
    }
}

#[async_trait]
impl MatrixPort for SdkRoom {
    fn device(&self) -> &Device {
        &self.inner.device
    }

    fn room_id(&self) -> &RoomId {
        self.inner.room.room_id()
    }

    fn trust(&self) -> TrustPolicy {
        self.inner.trust
    }

    async fn own_trust(&self) -> Result<OwnTrust, MatrixError> {
        let doing = "tell whether this device is cross-signed";
        in_time(doing, async { own_trust(&self.inner.client()).await.map_err(failed(doing)) }).await
    }

    async fn room_view(&self) -> Result<RoomView, MatrixError> {
        in_time("read the room", self.inner.room_view()).await
    }

    async fn perform(&self, request: MatrixRequest, timeout: Duration) -> Result<MatrixReply, RequestError> {
        let performed = tokio::time::timeout(timeout, self.inner.perform(request, timeout)).await;
        performed.unwrap_or(Err(RequestError::TimedOut))
    }

    async fn send_to_device(&self, batch: ToDeviceBatch, outcomes: mpsc::Sender<(Device, Delivery)>) {
        self.inner.send_to_device(batch, &outcomes).await;
    }

    async fn updates(&self) -> mpsc::Receiver<MatrixUpdate> {
        updates::listen(self.inner.clone()).await
    }
}

impl Inner {
    fn client(&self) -> Client {
        self.room.client()
    }

    fn sticky(&self) -> MutexGuard<'_, StickyStore> {
        self.sticky.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn ask(&self, ask: http::Ask<'_>, limit: Duration) -> Result<serde_json::Value, RequestError> {
        http::send(&self.client(), ask, limit).await
    }
}

/// How others see the client's device. Asks the homeserver unless the store says that all is well.
pub(crate) async fn own_trust(client: &Client) -> Result<OwnTrust, matrix_sdk::Error> {
    let encryption = client.encryption();
    let is_signed = async || {
        let device = encryption.get_own_device().await;
        device.map(|device| device.is_some_and(|device| device.is_cross_signed_by_owner()))
    };
    if is_signed().await? {
        return Ok(OwnTrust::CrossSigned);
    }
    let Some(user) = client.user_id() else { return Err(matrix_sdk::Error::AuthenticationRequired) };
    Ok(match encryption.request_user_identity(user).await? {
        None => OwnTrust::NoIdentity,
        Some(_) if is_signed().await? => OwnTrust::CrossSigned,
        Some(_) => OwnTrust::NotCrossSigned,
    })
}

/// matrix-sdk's own requests are repeated for up to a quarter of an hour, depending on the client.
async fn in_time<T>(
    doing: &'static str,
    work: impl Future<Output = Result<T, MatrixError>>,
) -> Result<T, MatrixError> {
    tokio::time::timeout(VIEW_LIMIT, work)
        .await
        .unwrap_or_else(|_| Err(failed(doing)(RequestError::TimedOut)))
}

fn failed<E: std::error::Error + Send + Sync + 'static>(
    doing: &'static str,
) -> impl FnOnce(E) -> MatrixError {
    move |error| MatrixError::Request { doing, source: Box::new(error) }
}

fn now() -> UnixMillis {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    UnixMillis(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}
