//! The port to Matrix: everything that a call asks of a homeserver, as one small trait.

use std::{fmt, time::Duration};

use async_trait::async_trait;
use ruma_common::RoomId;
use tokio::sync::mpsc;

use super::{
    Delivery, MatrixReply, MatrixRequest, MatrixUpdate, OwnTrust, RequestError, RoomView, ToDeviceBatch,
    TrustPolicy,
};
use crate::member::Device;

/// Everything that a call asks of Matrix, for one room and one logged-in device.
#[async_trait]
pub trait MatrixPort: Send + Sync + fmt::Debug {
    /// This device.
    fn device(&self) -> &Device;

    /// The room of the call.
    fn room_id(&self) -> &RoomId;

    /// Whom this port sends keys to.
    fn trust(&self) -> TrustPolicy;

    /// Why others will refuse this device, if they will: for instance it is not cross-signed. Checked on joining.
    ///
    /// # Errors
    /// [`MatrixError`] if the homeserver could not say.
    async fn own_trust(&self) -> Result<OwnTrust, MatrixError>;

    /// The room as of the last sync.
    ///
    /// # Errors
    /// [`MatrixError`] if the store or the homeserver failed; the caller tries again.
    async fn room_view(&self) -> Result<RoomView, MatrixError>;

    /// Performs one request, once, within `timeout`.
    ///
    /// # Errors
    /// [`RequestError`], sorted into what the machine tells apart.
    async fn perform(&self, request: MatrixRequest, timeout: Duration) -> Result<MatrixReply, RequestError>;

    /// Encrypts and sends a message to each device of the batch, after bringing the device lists up to date.
    ///
    /// Every device's outcome goes to `outcomes` as soon as it is known; a slow or broken device delays no other.
    async fn send_to_device(&self, batch: ToDeviceBatch, outcomes: mpsc::Sender<(Device, Delivery)>);

    /// Starts listening; dropping the receiver stops it.
    async fn updates(&self) -> mpsc::Receiver<MatrixUpdate>;
}

/// The homeserver did not do what a call needs.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MatrixError {
    /// The client is not logged in, so it has no user and no device.
    #[error("the Matrix client is not logged in; log in before joining a call")]
    NotLoggedIn,
    /// A request failed.
    #[error("the homeserver could not {doing}")]
    Request {
        /// What was asked of it.
        doing: &'static str,
        /// matrix-sdk's account of it.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}
