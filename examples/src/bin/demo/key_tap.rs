//! A port to Matrix that also keeps a copy of every media key that comes in.
//!
//! Members of a call hold each other's keys, so a member who leaves can keep them. The demo lets one do just
//! that, to show that they open nothing that is sent afterwards. The SDK itself never hands a key out.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use antiphon_call_sdk::{
    key::MediaKey,
    matrix::{
        KeySendError, MatrixError, MatrixPort, MemberDevice, OpenIdToken, RoomFacts, RoomView, Update,
        sdk::SdkRoom,
    },
    media_keys::wire,
    member::LiveKitFocus,
    membership::own::{Reply, Request, RequestError},
};
use matrix_sdk::{
    async_trait,
    ruma::{DeviceId, OwnedUserId, RoomId, UserId},
};
use serde_json::Value;
use tokio::sync::mpsc;

/// Keys by their sender.
pub(crate) type KeptKeys = Arc<Mutex<Vec<(OwnedUserId, MediaKey)>>>;

/// [`SdkRoom`] with a tap on it.
#[derive(Debug)]
pub(crate) struct KeyTap {
    inner: SdkRoom,
    kept: KeptKeys,
}

impl KeyTap {
    pub(crate) fn new(inner: SdkRoom) -> (Self, KeptKeys) {
        let kept = KeptKeys::default();
        (Self { inner, kept: kept.clone() }, kept)
    }
}

#[async_trait]
impl MatrixPort for KeyTap {
    fn user_id(&self) -> &UserId {
        self.inner.user_id()
    }

    fn device_id(&self) -> &DeviceId {
        self.inner.device_id()
    }

    fn room_id(&self) -> &RoomId {
        self.inner.room_id()
    }

    async fn room_facts(&self) -> Result<RoomFacts, MatrixError> {
        self.inner.room_facts().await
    }

    async fn room_view(&self) -> Result<RoomView, MatrixError> {
        self.inner.room_view().await
    }

    async fn membership_request(
        &self,
        state_key: &str,
        request: Request,
        timeout: Duration,
    ) -> Result<Reply, RequestError> {
        self.inner.membership_request(state_key, request, timeout).await
    }

    async fn send_key(
        &self,
        recipients: &[MemberDevice],
        content: Value,
    ) -> Result<Vec<MemberDevice>, KeySendError> {
        self.inner.send_key(recipients, content).await
    }

    async fn openid_token(&self) -> Result<OpenIdToken, MatrixError> {
        self.inner.openid_token().await
    }

    async fn livekit_foci(&self) -> Result<Vec<LiveKitFocus>, MatrixError> {
        self.inner.livekit_foci().await
    }

    async fn updates(&self) -> mpsc::Receiver<Update> {
        let mut from = self.inner.updates().await;
        let (tx, rx) = mpsc::channel(64);
        let kept = self.kept.clone();
        tokio::spawn(async move {
            while let Some(update) = from.recv().await {
                if let Update::Key(received) = &update
                    && let Ok(message) = wire::parse(&received.content)
                {
                    let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
                    kept.push((received.sender.clone(), message.key));
                }
                if tx.send(update).await.is_err() {
                    return;
                }
            }
        });
        rx
    }
}
