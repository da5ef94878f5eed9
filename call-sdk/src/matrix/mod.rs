//! The port to Matrix: all that a call asks of a homeserver, as one small trait.
//!
//! [`sdk`] implements it over matrix-sdk; a test may implement it over a script.

use std::{collections::BTreeSet, fmt, time::Duration};

use async_trait::async_trait;
use matrix_sdk::ruma::{DeviceId, OwnedDeviceId, OwnedUserId, RoomId, UserId};
use serde::Serialize;
use serde_json::Value;
use tokio::sync::mpsc;

use crate::{
    media_keys::inbox::ReceivedKey,
    member::LiveKitFocus,
    membership::{
        own::{Reply, Request, RequestError},
        wire::MemberEvent,
    },
};

pub mod sdk;

/// Which devices may hold and send media keys.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TrustPolicy {
    /// Only devices that their owner has cross-signed (MSC4153). The default.
    #[default]
    CrossSigned,
    /// Every device of a member, as Element Call does on its own. A homeserver that adds a device to a member's
    /// account can then read that member's calls.
    AnyDevice,
}

/// What the room says about a call in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RoomFacts {
    /// Whether the room is encrypted; the only source of the call's encryption policy.
    pub encrypted: bool,
    /// The room version, for instance `12`.
    pub version: String,
}

/// Everybody's membership events and who is in the room.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RoomView {
    /// Every call member event of the room, unjudged.
    pub events: Vec<MemberEvent>,
    /// Who is joined to the room.
    pub joined: BTreeSet<OwnedUserId>,
}

/// A homeserver's short-lived proof of who a user is (OpenID, client-server API §OpenID).
#[derive(Clone, Serialize)]
pub struct OpenIdToken {
    /// The capability; redacted in `Debug`.
    pub access_token: String,
    /// Always `Bearer`.
    pub token_type: String,
    /// The server that vouches.
    pub matrix_server_name: String,
    /// Lifetime in seconds.
    pub expires_in: u64,
}

impl fmt::Debug for OpenIdToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OpenIdToken")
            .field("matrix_server_name", &self.matrix_server_name)
            .field("expires_in", &self.expires_in)
            .finish_non_exhaustive()
    }
}

/// What the homeserver tells a call without being asked.
#[derive(Debug)]
#[non_exhaustive]
pub enum Update {
    /// Something in the room changed: read the [`RoomView`] again.
    RoomChanged,
    /// A key message came, encrypted or not; the inbox judges it.
    Key(ReceivedKey),
}

/// A device of a member.
pub type MemberDevice = (OwnedUserId, OwnedDeviceId);

/// All that a call asks of Matrix, for one room and one logged-in device.
#[async_trait]
pub trait MatrixPort: Send + Sync + fmt::Debug {
    /// Whose device this is.
    fn user_id(&self) -> &UserId;

    /// This device.
    fn device_id(&self) -> &DeviceId;

    /// The room of the call.
    fn room_id(&self) -> &RoomId;

    /// Whether the room is encrypted, and its version.
    async fn room_facts(&self) -> Result<RoomFacts, MatrixError>;

    /// Membership events and joined users, as of the last sync.
    async fn room_view(&self) -> Result<RoomView, MatrixError>;

    /// Performs one request of our own membership under `state_key`, once, within `timeout`.
    async fn membership_request(
        &self,
        state_key: &str,
        request: Request,
        timeout: Duration,
    ) -> Result<Reply, RequestError>;

    /// Sends a key message Olm-encrypted to each device, after bringing the device lists up to date. Returns the
    /// devices that it did not reach.
    async fn send_key(
        &self,
        recipients: &[MemberDevice],
        content: Value,
    ) -> Result<Vec<MemberDevice>, KeySendError>;

    /// A fresh OpenID token.
    async fn openid_token(&self) -> Result<OpenIdToken, MatrixError>;

    /// The LiveKit foci that the homeserver offers, best first (MSC4143 §Transport discovery).
    async fn livekit_foci(&self) -> Result<Vec<LiveKitFocus>, MatrixError>;

    /// Starts listening; dropping the receiver stops it.
    async fn updates(&self) -> mpsc::Receiver<Update>;
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

/// A key message did not go out; nobody got it.
#[derive(Debug, thiserror::Error)]
#[error("the media key could not be sent: {message}")]
pub struct KeySendError {
    /// What the homeserver or the crypto machine said.
    pub message: String,
    /// When the homeserver allows another try, if it said so.
    pub retry_after: Option<Duration>,
}
