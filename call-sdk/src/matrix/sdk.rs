//! The port over matrix-sdk: one room of a logged-in client that syncs by itself.
#![allow(clippy::disallowed_methods, reason = "this is the shell: it owns the clock and the tasks")]

use std::{collections::BTreeMap, time::Duration};

use async_trait::async_trait;
use matrix_sdk::{
    HttpError, Room, RoomMemberships,
    config::RequestConfig,
    deserialized_responses::{
        AlgorithmInfo, EncryptionInfo, RawAnySyncOrStrippedState, VerificationLevel, VerificationState,
    },
    encryption::identities::Device,
    event_handler::EventHandlerDropGuard,
    ruma::{
        DeviceId, OwnedDeviceId, OwnedUserId, RoomId, UserId,
        api::{
            client::{
                account::request_openid_token,
                delayed_events::{
                    DelayParameters, delayed_state_event, update_delayed_event,
                    update_delayed_event::UpdateAction,
                },
                discovery::get_capabilities,
                state::send_state_event,
            },
            error::{ErrorKind, RetryAfter},
        },
        events::{AnyStateEventContent, AnyToDeviceEvent, AnyToDeviceEventContent, StateEventType},
        serde::Raw,
    },
};
use matrix_sdk_base::crypto::CollectStrategy;
use serde::Deserialize;
use serde_json::Value;
use tokio::sync::{broadcast, mpsc};

use super::{
    KeySendError, MatrixError, MatrixPort, MemberDevice, OpenIdToken, RoomFacts, RoomView, TrustPolicy,
    Update,
};
use crate::{
    media_keys::{
        inbox::{OlmSender, ReceivedKey},
        wire::KEY_EVENT_TYPE,
    },
    member::{LiveKitFocus, MembershipKind},
    membership::{
        own::{Reply, Request, RequestError},
        wire::{MemberEvent, STATE_TYPE},
    },
    time::UnixMillis,
};

/// How many updates may wait for the call; key messages beyond it are dropped and their senders retry.
const UPDATE_QUEUE: usize = 1024;
/// A key message is a few hundred bytes; anything much larger is not one.
const MAX_KEY_MESSAGE: usize = 8 * 1024;
const MAX_DELAY_CAPABILITY: &str = "org.matrix.msc4140.delayed_events";

/// A room of a logged-in matrix-sdk client. The application keeps the client syncing.
#[derive(Clone, Debug)]
pub struct SdkRoom {
    room: Room,
    user_id: OwnedUserId,
    device_id: OwnedDeviceId,
    trust: TrustPolicy,
}

impl SdkRoom {
    /// The room as a call sees it.
    ///
    /// # Errors
    /// [`MatrixError::NotLoggedIn`] if the client has no session.
    pub fn new(room: Room, trust: TrustPolicy) -> Result<Self, MatrixError> {
        let client = room.client();
        let (Some(user_id), Some(device_id)) = (client.user_id(), client.device_id()) else {
            return Err(MatrixError::NotLoggedIn);
        };
        let (user_id, device_id) = (user_id.to_owned(), device_id.to_owned());
        Ok(Self { room, user_id, device_id, trust })
    }

    /// Finds a device, asking the homeserver for its owner's list if it is not known yet: a key counts as sent
    /// only to a device that we have seen.
    async fn device(&self, user: &UserId, device: &DeviceId) -> Result<Option<Device>, matrix_sdk::Error> {
        let encryption = self.room.client().encryption();
        if let Some(found) = encryption.get_device(user, device).await? {
            // Cross-signing may have happened since the list was read.
            if self.trust == TrustPolicy::AnyDevice || found.is_cross_signed_by_owner() {
                return Ok(Some(found));
            }
        }
        encryption.request_user_identity(user).await?;
        let found = encryption.get_device(user, device).await?;
        Ok(found.filter(|d| self.trust == TrustPolicy::AnyDevice || d.is_cross_signed_by_owner()))
    }
}

#[async_trait]
impl MatrixPort for SdkRoom {
    fn user_id(&self) -> &UserId {
        &self.user_id
    }

    fn device_id(&self) -> &DeviceId {
        &self.device_id
    }

    fn room_id(&self) -> &RoomId {
        self.room.room_id()
    }

    async fn room_facts(&self) -> Result<RoomFacts, MatrixError> {
        let state = self
            .room
            .latest_encryption_state()
            .await
            .map_err(failed("read whether the room is encrypted"))?;
        // An unknown state counts as encrypted: the mistake that leaks nothing.
        let version = self.room.version().map(|v| v.to_string()).unwrap_or_default();
        Ok(RoomFacts { encrypted: state.is_encrypted() || state.is_unknown(), version })
    }

    async fn room_view(&self) -> Result<RoomView, MatrixError> {
        let raw = self
            .room
            .get_state_events(StateEventType::from(STATE_TYPE))
            .await
            .map_err(failed("read the call members"))?;
        let members =
            self.room.members(RoomMemberships::JOIN).await.map_err(failed("list the members of the room"))?;
        let events = raw.iter().filter_map(member_event).collect();
        Ok(RoomView { events, joined: members.iter().map(|m| m.user_id().to_owned()).collect() })
    }

    async fn membership_request(
        &self,
        state_key: &str,
        request: Request,
        timeout: Duration,
    ) -> Result<Reply, RequestError> {
        let client = self.room.client();
        let config = RequestConfig::new().disable_retry().timeout(timeout);
        let room_id = self.room.room_id().to_owned();
        let put = |content: &Value| -> Result<_, RequestError> {
            let raw = Raw::<AnyStateEventContent>::from_json_string(content.to_string())
                .map_err(|e| RequestError::Other { message: e.to_string() })?;
            Ok(send_state_event::v3::Request::new_raw(
                room_id.clone(),
                StateEventType::from(STATE_TYPE),
                state_key.to_owned(),
                raw,
            ))
        };
        let empty = Value::Object(serde_json::Map::new());
        match request {
            Request::ScheduleLeave { delay } => {
                let raw = Raw::<AnyStateEventContent>::from_json_string(empty.to_string())
                    .map_err(|e| RequestError::Other { message: e.to_string() })?;
                let leave = delayed_state_event::unstable::Request::new_raw(
                    room_id.clone(),
                    state_key.to_owned(),
                    StateEventType::from(STATE_TYPE),
                    DelayParameters::Timeout { timeout: delay },
                    raw,
                );
                let reply =
                    client.send(leave).with_request_config(config).await.map_err(|e| request_error(&e))?;
                Ok(Reply::Scheduled { delay_id: reply.delay_id })
            }
            Request::RestartLeave { delay_id } => {
                update_delayed(self, delay_id, UpdateAction::Restart, config).await
            }
            Request::SendLeave { delay_id } => {
                update_delayed(self, delay_id, UpdateAction::Send, config).await
            }
            Request::CancelLeave { delay_id } => {
                update_delayed(self, delay_id, UpdateAction::Cancel, config).await
            }
            Request::PutMembership { content } => {
                client
                    .send(put(&content)?)
                    .with_request_config(config)
                    .await
                    .map_err(|e| request_error(&e))?;
                Ok(Reply::Done)
            }
            Request::PutLeave => {
                client.send(put(&empty)?).with_request_config(config).await.map_err(|e| request_error(&e))?;
                Ok(Reply::Done)
            }
            Request::ReadMaxDelay => {
                let request = get_capabilities::v3::Request::new();
                let reply =
                    client.send(request).with_request_config(config).await.map_err(|e| request_error(&e))?;
                let max = reply
                    .capabilities
                    .get(MAX_DELAY_CAPABILITY)
                    .and_then(|c| c.get("max_delay_ms").and_then(Value::as_u64))
                    .map(Duration::from_millis);
                Ok(Reply::MaxDelay(max))
            }
        }
    }

    async fn send_key(
        &self,
        recipients: &[MemberDevice],
        content: Value,
    ) -> Result<Vec<MemberDevice>, KeySendError> {
        let mut devices = Vec::new();
        let mut undelivered = Vec::new();
        for (user, device) in recipients {
            match self.device(user, device).await {
                Ok(Some(found)) => devices.push(found),
                Ok(None) => undelivered.push((user.clone(), device.clone())),
                Err(error) => {
                    tracing::debug!(%user, %device, %error, "no device list, so no media key");
                    undelivered.push((user.clone(), device.clone()));
                }
            }
        }
        if devices.is_empty() {
            return Ok(undelivered);
        }
        let raw = Raw::<AnyToDeviceEventContent>::from_json_string(content.to_string())
            .map_err(|e| KeySendError { message: e.to_string(), retry_after: None })?;
        let strategy = match self.trust {
            TrustPolicy::CrossSigned => CollectStrategy::IdentityBasedStrategy,
            TrustPolicy::AnyDevice => CollectStrategy::AllDevices,
        };
        let failed = self
            .room
            .client()
            .encryption()
            .encrypt_and_send_raw_to_device(devices.iter().collect(), KEY_EVENT_TYPE, raw, strategy)
            .await
            .map_err(|error| KeySendError {
                retry_after: match error.client_api_error_kind() {
                    Some(ErrorKind::LimitExceeded(limit)) => delay_of(limit.retry_after.as_ref()),
                    _ => None,
                },
                message: error.to_string(),
            })?;
        undelivered.extend(failed);
        Ok(undelivered)
    }

    async fn openid_token(&self) -> Result<OpenIdToken, MatrixError> {
        let request = request_openid_token::v3::Request::new(self.user_id.clone());
        let reply = self.room.client().send(request).await.map_err(failed("issue an OpenID token"))?;
        Ok(OpenIdToken {
            access_token: reply.access_token,
            token_type: reply.token_type.to_string(),
            matrix_server_name: reply.matrix_server_name.to_string(),
            expires_in: reply.expires_in.as_secs(),
        })
    }

    async fn livekit_foci(&self) -> Result<Vec<LiveKitFocus>, MatrixError> {
        let client = self.room.client();
        let transports = match client.fetch_rtc_transports().await {
            Ok(transports) => transports,
            Err(error) if error.is_endpoint_not_implemented() || is_not_found(&error) => {
                client.well_known_rtc_transports().await.map_err(failed("list its MatrixRTC transports"))?
            }
            Err(error) => return Err(failed("list its MatrixRTC transports")(error)),
        };
        Ok(transports
            .iter()
            .filter(|t| t.transport_type() == "livekit")
            .filter_map(|t| t.data().get("livekit_service_url").and_then(Value::as_str).map(str::to_owned))
            .map(|url| LiveKitFocus { service_url: url.trim_end_matches('/').to_owned() })
            .collect())
    }

    async fn updates(&self) -> mpsc::Receiver<Update> {
        let (tx, rx) = mpsc::channel(UPDATE_QUEUE);
        let guard = self.listen_for_keys(tx.clone());
        let mut changes = self.room.subscribe_to_updates();
        tokio::spawn(async move {
            let _listening = guard;
            loop {
                let change = tokio::select! {
                    change = changes.recv() => change,
                    () = tx.closed() => return,
                };
                match change {
                    // A full queue already holds a wake-up, and the view is read whole: nothing is lost.
                    Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => {
                        drop(tx.try_send(Update::RoomChanged))
                    }
                    Err(broadcast::error::RecvError::Closed) => return,
                }
            }
        });
        rx
    }
}

impl SdkRoom {
    fn listen_for_keys(&self, tx: mpsc::Sender<Update>) -> EventHandlerDropGuard {
        let client = self.room.client();
        let handler = move |raw: Raw<AnyToDeviceEvent>, info: Option<EncryptionInfo>| {
            let tx = tx.clone();
            async move {
                if let Some(received) = received_key(&raw, info)
                    && tx.try_send(Update::Key(received)).is_err()
                {
                    tracing::warn!("the call does not keep up: a media key message was dropped");
                }
            }
        };
        let handle = client.add_event_handler(handler);
        client.event_handler_drop_guard(handle)
    }
}

async fn update_delayed(
    port: &SdkRoom,
    delay_id: String,
    action: UpdateAction,
    config: RequestConfig,
) -> Result<Reply, RequestError> {
    let update = update_delayed_event::unstable_v1::Request::new(delay_id, action);
    port.room.client().send(update).with_request_config(config).await.map_err(|e| request_error(&e))?;
    Ok(Reply::Done)
}

/// Reads a state event as matrix-sdk stores it; what does not even look like an event is nobody's membership.
fn member_event(raw: &RawAnySyncOrStrippedState) -> Option<MemberEvent> {
    #[derive(Deserialize)]
    struct Envelope {
        sender: OwnedUserId,
        state_key: Option<String>,
        event_id: Option<String>,
        #[serde(default)]
        origin_server_ts: UnixMillis,
        content: Value,
    }
    let RawAnySyncOrStrippedState::Sync(raw) = raw else { return None };
    let envelope: Envelope = serde_json::from_str(raw.json().get()).ok()?;
    Some(MemberEvent {
        kind: MembershipKind::State,
        sender: envelope.sender,
        sender_device: None,
        state_key: envelope.state_key,
        event_id: envelope.event_id,
        origin_server_ts: envelope.origin_server_ts,
        content: envelope.content,
        sticky_until: None,
    })
}

/// Reads a to-device event if it is a key message; who sent it is taken from Olm, never from the message.
fn received_key(raw: &Raw<AnyToDeviceEvent>, info: Option<EncryptionInfo>) -> Option<ReceivedKey> {
    #[derive(Deserialize)]
    struct Envelope {
        #[serde(rename = "type")]
        event_type: String,
        sender: OwnedUserId,
        content: Value,
    }
    let json = raw.json().get();
    if json.len() > MAX_KEY_MESSAGE {
        return None;
    }
    let envelope: Envelope = serde_json::from_str(json).ok()?;
    if envelope.event_type != KEY_EVENT_TYPE {
        return None;
    }
    let olm = info.filter(|i| matches!(i.algorithm_info, AlgorithmInfo::OlmV1Curve25519AesSha2 { .. }));
    // Olm's own word about the sender must agree with the event's.
    let olm = olm.filter(|i| i.sender == envelope.sender).map(|i| OlmSender {
        cross_signed: matches!(
            i.verification_state,
            VerificationState::Verified
                | VerificationState::Unverified(VerificationLevel::UnverifiedIdentity)
        ),
        device_id: i.sender_device,
    });
    Some(ReceivedKey { content: envelope.content, sender: envelope.sender, olm })
}

fn failed<E: std::error::Error + Send + Sync + 'static>(
    doing: &'static str,
) -> impl FnOnce(E) -> MatrixError {
    move |error| MatrixError::Request { doing, source: Box::new(error) }
}

fn is_not_found(error: &HttpError) -> bool {
    matches!(error.client_api_error_kind(), Some(ErrorKind::NotFound | ErrorKind::Unrecognized))
}

fn delay_of(retry_after: Option<&RetryAfter>) -> Option<Duration> {
    match retry_after? {
        RetryAfter::Delay(delay) => Some(*delay),
        RetryAfter::DateTime(at) => at.duration_since(std::time::SystemTime::now()).ok(),
    }
}

/// Sorts a failed request into what the membership machine tells apart (MSC4140, matrixrtc §1.2).
fn request_error(error: &HttpError) -> RequestError {
    let Some(api) = error.as_client_api_error() else {
        return match error {
            HttpError::Reqwest(e) if e.is_timeout() => RequestError::TimedOut,
            _ => RequestError::Network,
        };
    };
    let other = || RequestError::Other { message: error.to_string() };
    let Some(kind) = api.error_kind() else {
        return if api.status_code.is_server_error() { RequestError::Network } else { other() };
    };
    match kind {
        ErrorKind::LimitExceeded(limit) => {
            RequestError::RateLimited { retry_after: delay_of(limit.retry_after.as_ref()) }
        }
        ErrorKind::NotFound => RequestError::NotFound,
        ErrorKind::Unrecognized => RequestError::Unsupported,
        _ if kind.errcode().as_str() == "ORG.MATRIX.MSC4140_DELAY_TOO_LARGE" => {
            RequestError::MaxDelayExceeded { max: None }
        }
        _ if api.status_code.is_server_error() => RequestError::Network,
        _ => match extra_fields(api) {
            Some(fields)
                if fields.get("org.matrix.msc4140.errcode").is_some_and(|c| c == "M_MAX_DELAY_EXCEEDED") =>
            {
                let max = fields.get("org.matrix.msc4140.max_delay").and_then(Value::as_u64);
                RequestError::MaxDelayExceeded { max: max.map(Duration::from_millis) }
            }
            _ => other(),
        },
    }
}

/// The error body as JSON, for members that ruma does not model.
fn extra_fields(error: &matrix_sdk::ruma::api::error::Error) -> Option<BTreeMap<String, Value>> {
    match &error.body {
        matrix_sdk::ruma::api::error::ErrorBody::Json(Value::Object(fields)) => {
            Some(fields.clone().into_iter().collect())
        }
        _ => error.error_kind()?.custom_json_data().map(|data| data.clone().into_iter().collect()),
    }
}
