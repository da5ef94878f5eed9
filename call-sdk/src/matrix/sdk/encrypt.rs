//! Megolm for events that `Room::send` cannot send: it has no query parameters, so encrypted sticky events are encrypted
//! here and sent by our own request.
//!
//! The Olm machine of a matrix-sdk client can only be reached through the `BaseClient` that the client was built over
//! (`ClientBuilder::base_client`; the version is pinned). [`Session`](crate::session::Session) builds its client so.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use matrix_sdk::{
    Room,
    config::RequestConfig,
    ruma::{
        OwnedRoomId, OwnedUserId, RoomId, UserId, api::client::to_device::send_event_to_device,
        events::AnyMessageLikeEventContent, serde::Raw,
    },
};
use matrix_sdk_base::{
    BaseClient, RoomMemberships,
    crypto::{CollectStrategy, OlmError, OlmMachine},
};
use serde_json::Value;

use super::http;
use crate::{matrix::RequestError, member::Device};

/// How long the homeserver may ask another server for keys: a dead one must not hold up a call.
pub(super) const REMOTE_LIMIT: Duration = Duration::from_secs(3);
/// For one request of our own about keys.
const LIMIT: Duration = Duration::from_secs(10);

/// The encryption of a client whose `BaseClient` we know.
pub(crate) struct Encryptor {
    base: BaseClient,
    /// One at a time in a room; matrix-sdk's own lock is out of reach.
    rooms: Mutex<HashMap<OwnedRoomId, Arc<tokio::sync::Mutex<()>>>>,
}

impl Encryptor {
    /// `base` must be the one that the client was built over.
    pub(crate) fn new(base: BaseClient) -> Self {
        Self { base, rooms: Mutex::default() }
    }

    /// Shares the room key with every member's devices and encrypts. Returns the content of an `m.room.encrypted`.
    pub(super) async fn encrypt(
        self: &Arc<Self>,
        room: &Room,
        event_type: &str,
        content: &Value,
    ) -> Result<Value, RequestError> {
        let (this, room, event_type, content) =
            (self.clone(), room.clone(), event_type.to_owned(), content.to_string());
        // A task, so that a timeout of the caller does not leave the key half shared. It also contains a panic of
        // matrix-sdk-crypto, which expects that the session still exists when it encrypts.
        let task = tokio::spawn(async move { this.encrypt_now(&room, &event_type, content).await });
        task.await.unwrap_or_else(|error| Err(local(error)))
    }

    async fn encrypt_now(
        &self,
        room: &Room,
        event_type: &str,
        content: String,
    ) -> Result<Value, RequestError> {
        let lock = self.lock(room.room_id());
        let _one_at_a_time = lock.lock().await;
        room.sync_members().await.map_err(|error| http::sdk_error(&error))?;
        let members = room.client().state_store().get_user_ids(room.room_id(), RoomMemberships::ACTIVE).await;
        let members = members.map_err(local)?;
        let machine = self.base.olm_machine().await;
        let machine = machine.as_ref().ok_or(RequestError::LoggedOut)?;
        if let Err(error) = query_unknown(machine, room, &members).await {
            tracing::debug!(%error, "no current device lists: the room key goes to the devices that are known");
        }
        if let Err(error) = claim_from(machine, room, members.iter().map(|user| &**user)).await {
            tracing::debug!(%error, "no one-time keys: devices without an Olm session cannot read the event");
        }
        if let Err(error) = self.share(machine, room).await {
            // Events under a half-shared key would be unreadable for some.
            machine.discard_room_key(room.room_id()).await.map_err(local)?;
            return Err(error);
        }
        let content = Raw::<AnyMessageLikeEventContent>::from_json_string(content).map_err(local)?;
        let encrypted =
            machine.encrypt_room_event_raw(room.room_id(), event_type, &content).await.map_err(local)?;
        encrypted.content.deserialize_as_unchecked::<Value>().map_err(local)
    }

    async fn share(&self, machine: &OlmMachine, room: &Room) -> Result<(), RequestError> {
        for request in self.base.share_room_key(room.room_id()).await.map_err(local)? {
            let (event_type, messages) = (request.event_type.clone(), request.messages.clone());
            let send =
                send_event_to_device::v3::Request::new_raw(event_type, request.txn_id.clone(), messages);
            let sent = room.client().send(send).with_request_config(once()).await;
            let sent = sent.map_err(|error| http::http_error(&error))?;
            machine.mark_request_as_sent(&request.txn_id, &sent).await.map_err(local)?;
        }
        Ok(())
    }

    /// Makes Olm sessions with the users' devices that have none.
    pub(super) async fn claim(&self, room: &Room, users: &[OwnedUserId]) -> Result<(), RequestError> {
        let machine = self.base.olm_machine().await;
        let machine = machine.as_ref().ok_or(RequestError::LoggedOut)?;
        claim_from(machine, room, users.iter().map(|user| &**user)).await
    }

    /// Encrypts a to-device message for one device, whose trust has been judged: the other strategies would judge it
    /// again. Returns the content of an `m.room.encrypted`.
    pub(super) async fn encrypt_for(
        &self,
        device: &Device,
        event_type: &str,
        content: &Value,
    ) -> Result<Value, OlmError> {
        let machine = self.base.olm_machine().await;
        let machine = machine.as_ref().ok_or(OlmError::MissingSession)?;
        let keys = machine.get_device(&device.user_id, &device.device_id, None).await?;
        let keys = keys.ok_or(OlmError::MissingSession)?;
        let message = keys.encrypt_event_raw(event_type, content, CollectStrategy::AllDevices).await?;
        Ok(message.deserialize_as_unchecked()?)
    }

    fn lock(&self, room: &RoomId) -> Arc<tokio::sync::Mutex<()>> {
        let mut rooms = self.rooms.lock().unwrap_or_else(PoisonError::into_inner);
        rooms.entry(room.to_owned()).or_default().clone()
    }
}

impl fmt::Debug for Encryptor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Encryptor").finish_non_exhaustive()
    }
}

async fn query_unknown(
    machine: &OlmMachine,
    room: &Room,
    members: &[OwnedUserId],
) -> Result<(), RequestError> {
    let tracked = machine.store().load_tracked_users().await.map_err(local)?;
    let tracked: HashMap<_, _> = tracked.into_iter().map(|user| (user.user_id, user.dirty)).collect();
    let unknown = members.iter().filter(|user| tracked.get(*user).is_none_or(|dirty| *dirty));
    let (id, request) = machine.query_keys_for_users(unknown.map(|user| &**user));
    if request.device_keys.is_empty() {
        return Ok(());
    }
    let mut query = matrix_sdk::ruma::api::client::keys::get_keys::v3::Request::new();
    query.device_keys = request.device_keys;
    query.timeout = Some(REMOTE_LIMIT);
    let answer = room.client().send(query).with_request_config(once()).await;
    let answer = answer.map_err(|error| http::http_error(&error))?;
    machine.mark_request_as_sent(&id, &answer).await.map_err(local)
}

async fn claim_from(
    machine: &OlmMachine,
    room: &Room,
    users: impl Iterator<Item = &UserId>,
) -> Result<(), RequestError> {
    let Some((id, mut claim)) = machine.get_missing_sessions(users).await.map_err(local)? else {
        return Ok(());
    };
    claim.timeout = Some(REMOTE_LIMIT);
    let answer = room.client().send(claim).with_request_config(once()).await;
    let answer = answer.map_err(|error| http::http_error(&error))?;
    machine.mark_request_as_sent(&id, &answer).await.map_err(local)
}

fn once() -> RequestConfig {
    RequestConfig::new().disable_retry().timeout(LIMIT)
}

fn local(error: impl fmt::Display) -> RequestError {
    RequestError::Local { cause: error.to_string() }
}
