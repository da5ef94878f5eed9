//! A port to Matrix that also keeps a copy of every media key that comes in, and counts signalling.
//!
//! Members of a call hold each other's keys, so a member who leaves can keep them. The demo lets one do just that, to
//! show that they open nothing that is sent afterwards. The SDK itself never hands a key out.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use antiphon_call_sdk::{
    Device, MediaKey, OwnTrust, TrustPolicy,
    matrix::{
        Delivery, MatrixError, MatrixPort, MatrixReply, MatrixRequest, MatrixUpdate, RequestError, RoomView,
        ToDeviceBatch, ToDeviceEvent, sdk::SdkRoom,
    },
};
use async_trait::async_trait;
use base64::{Engine as _, engine::general_purpose::STANDARD};
use matrix_sdk::ruma::{OwnedUserId, RoomId};
use serde_json::Value;
use tokio::sync::mpsc;

/// What came in so far.
#[derive(Debug, Default)]
pub(crate) struct Tapped {
    /// Media keys by their sender.
    pub(crate) keys: Vec<(OwnedUserId, MediaKey)>,
    /// Signalling messages of the mesh that came Olm-encrypted.
    pub(crate) encrypted: u64,
    /// Signalling messages of the mesh that came in clear.
    pub(crate) clear: u64,
}

impl Tapped {
    fn add(&mut self, event: &ToDeviceEvent) {
        if event.event_type == "io.element.call.encryption_keys" {
            self.keys.extend(key(&event.content).map(|key| (event.sender.clone(), key)));
        } else if event.event_type.starts_with("m.call.") {
            *(if event.olm.is_some() { &mut self.encrypted } else { &mut self.clear }) += 1;
        }
    }
}

/// [`SdkRoom`] with a tap on it.
#[derive(Debug)]
pub(crate) struct Tap {
    inner: SdkRoom,
    tapped: Arc<Mutex<Tapped>>,
}

impl Tap {
    pub(crate) fn new(inner: SdkRoom) -> (Self, Arc<Mutex<Tapped>>) {
        let tapped = Arc::<Mutex<Tapped>>::default();
        (Self { inner, tapped: tapped.clone() }, tapped)
    }
}

#[async_trait]
impl MatrixPort for Tap {
    fn device(&self) -> &Device {
        self.inner.device()
    }

    fn room_id(&self) -> &RoomId {
        self.inner.room_id()
    }

    fn trust(&self) -> TrustPolicy {
        self.inner.trust()
    }

    async fn own_trust(&self) -> Result<OwnTrust, MatrixError> {
        self.inner.own_trust().await
    }

    async fn room_view(&self) -> Result<RoomView, MatrixError> {
        self.inner.room_view().await
    }

    async fn perform(&self, request: MatrixRequest, timeout: Duration) -> Result<MatrixReply, RequestError> {
        self.inner.perform(request, timeout).await
    }

    async fn send_to_device(&self, batch: ToDeviceBatch, outcomes: mpsc::Sender<(Device, Delivery)>) {
        self.inner.send_to_device(batch, outcomes).await;
    }

    async fn updates(&self) -> mpsc::Receiver<MatrixUpdate> {
        let mut from = self.inner.updates().await;
        let (tx, rx) = mpsc::channel(64);
        let tapped = self.tapped.clone();
        tokio::spawn(async move {
            while let Some(update) = from.recv().await {
                if let MatrixUpdate::ToDevice(event) = &update {
                    tapped.lock().unwrap_or_else(PoisonError::into_inner).add(event);
                }
                if tx.send(update).await.is_err() {
                    return;
                }
            }
        });
        rx
    }
}

/// The key in a key message, as deployed clients write it.
fn key(content: &Value) -> Option<MediaKey> {
    MediaKey::new(STANDARD.decode(content["keys"]["key"].as_str()?).ok()?).ok()
}
