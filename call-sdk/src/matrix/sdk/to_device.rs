//! To-device messages: one outcome per device, and no device that holds up another.
//!
//! matrix-sdk's own call sends to a whole batch or fails for it: one verified user whose identity changed, or an own
//! device that is not cross-signed, is enough. It also says neither why a device got nothing nor how long to wait. So
//! trust is judged here, and where we know the client's Olm machine, each device is encrypted for by itself and our own
//! request sends. For other clients matrix-sdk sends, with the strategy that judges nothing.

use std::{collections::BTreeMap, time::Duration};

use futures_util::{StreamExt as _, future::join, stream};
use matrix_sdk::{
    encryption::identities::Device as SdkDevice,
    ruma::{
        OwnedServerName, OwnedUserId, TransactionId, UserId, events::AnyToDeviceEventContent, serde::Raw,
    },
};
use matrix_sdk_base::crypto::{CollectStrategy, OlmError};
use serde_json::{Map, Value, json};
use tokio::{sync::mpsc, time::timeout};

use super::{
    Encryptor, Inner, events,
    http::{Ask, sdk_error},
};
use crate::{
    matrix::{Delivery, DeliveryFailure, RequestError, ToDeviceBatch, TrustPolicy},
    member::Device,
};

/// For the device list of one user. Another server may be slow or gone.
const QUERY_LIMIT: Duration = Duration::from_secs(3);
/// For the one-time keys of one server's users.
const CLAIM_LIMIT: Duration = Duration::from_secs(8);
const SEND_LIMIT: Duration = Duration::from_secs(10);
/// Servers and users that are worked on at a time.
const AT_A_TIME: usize = 8;
/// Messages in one request; each is about 1 kB.
const CHUNK: usize = 100;

type Outcomes = mpsc::Sender<(Device, Delivery)>;

impl Inner {
    pub(super) async fn send_to_device(&self, batch: ToDeviceBatch, outcomes: &Outcomes) {
        let own_server = self.device.user_id.server_name();
        let mut by_server: BTreeMap<(bool, OwnedServerName), Vec<Device>> = BTreeMap::new();
        for device in batch.recipients {
            let server = device.user_id.server_name().to_owned();
            by_server.entry((server != own_server, server)).or_default().push(device);
        }
        let (event_type, content) = (batch.event_type.as_str(), &batch.content);
        // Our own server comes first: it alone is known to answer.
        stream::iter(by_server.into_values())
            .for_each_concurrent(AT_A_TIME, |devices| {
                self.send_to_server(event_type, content, devices, outcomes)
            })
            .await;
    }

    /// Devices that the stored lists allow are served at once; the others wait for their owner's current list.
    async fn send_to_server(
        &self,
        event_type: &str,
        content: &Value,
        devices: Vec<Device>,
        outcomes: &Outcomes,
    ) {
        let (mut allowed, mut outdated) = (Vec::new(), BTreeMap::<OwnedUserId, Vec<Device>>::new());
        for device in devices {
            match self.judge(&device).await {
                Ok(keys) => allowed.push((device, keys)),
                // The sync keeps the lists of users current that share an encrypted room with us, but it may lag.
                Err(DeliveryFailure::UnknownDevice | DeliveryFailure::NotCrossSigned) => {
                    outdated.entry(device.user_id.clone()).or_default().push(device);
                }
                Err(failure) => report(outcomes, device, Err(failure)).await,
            }
        }
        let known = self.send_allowed(event_type, content, allowed, outcomes);
        let queried = async {
            let users = stream::iter(outdated).map(|(user, devices)| async move {
                self.query(&user).await;
                devices
            });
            let mut users = users.buffer_unordered(AT_A_TIME);
            let mut allowed = Vec::new();
            while let Some(devices) = users.next().await {
                for device in devices {
                    match self.judge(&device).await {
                        Ok(keys) => allowed.push((device, keys)),
                        Err(failure) => report(outcomes, device, Err(failure)).await,
                    }
                }
            }
            self.send_allowed(event_type, content, allowed, outcomes).await;
        };
        join(known, queried).await;
    }

    async fn send_allowed(
        &self,
        event_type: &str,
        content: &Value,
        allowed: Vec<(Device, SdkDevice)>,
        outcomes: &Outcomes,
    ) {
        match &self.encryptor {
            Some(encryptor) => {
                let allowed = allowed.into_iter().map(|(device, _)| device).collect();
                self.send_encrypted(encryptor, event_type, content, allowed, outcomes).await;
            }
            None => self.send_by_sdk(event_type, content, allowed, outcomes).await,
        }
    }

    async fn query(&self, user: &UserId) {
        let encryption = self.client().encryption();
        match timeout(QUERY_LIMIT, encryption.request_user_identity(user)).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => tracing::debug!(%user, %error, "the device list could not be read"),
            Err(_) => tracing::debug!(%user, "the device list did not come in time"),
        }
    }

    /// Applies the trust policy to the stored device list.
    async fn judge(&self, device: &Device) -> Result<SdkDevice, DeliveryFailure> {
        let (encryption, user) = (self.client().encryption(), &device.user_id);
        let broken = |error: &dyn std::fmt::Display| {
            DeliveryFailure::NoSession(format!("the crypto store failed: {error}"))
        };
        let keys = encryption.get_device(user, &device.device_id).await.map_err(|error| broken(&error))?;
        let keys = keys.ok_or(DeliveryFailure::UnknownDevice)?;
        if keys.is_blacklisted() {
            return Err(DeliveryFailure::Blocked);
        }
        let identity = encryption.get_user_identity(user).await.map_err(|error| broken(&error))?;
        if identity.is_some_and(|identity| identity.has_verification_violation()) {
            return Err(DeliveryFailure::IdentityChanged);
        }
        if self.trust == TrustPolicy::CrossSigned && !keys.is_cross_signed_by_owner() {
            return Err(DeliveryFailure::NotCrossSigned);
        }
        Ok(keys)
    }

    /// Devices with an Olm session get theirs at once; only the others wait for one-time keys.
    async fn send_encrypted(
        &self,
        encryptor: &Encryptor,
        event_type: &str,
        content: &Value,
        devices: Vec<Device>,
        outcomes: &Outcomes,
    ) {
        let (ready, without_session) =
            self.encrypt_for(encryptor, event_type, content, devices, outcomes).await;
        self.put_all(ready, outcomes).await;
        if without_session.is_empty() {
            return;
        }
        let users: Vec<_> = without_session.iter().map(|device| device.user_id.clone()).collect();
        let claimed = timeout(CLAIM_LIMIT, encryptor.claim(&self.room, &users)).await;
        let claimed = claimed.unwrap_or(Err(RequestError::TimedOut));
        let (ready, without_session) =
            self.encrypt_for(encryptor, event_type, content, without_session, outcomes).await;
        for device in without_session {
            let why = "it has no one-time key left, or its homeserver did not hand one out";
            let failure = claimed.clone().map_err(failure).err();
            let failure = failure.unwrap_or_else(|| DeliveryFailure::NoSession(why.to_owned()));
            report(outcomes, device, Err(failure)).await;
        }
        self.put_all(ready, outcomes).await;
    }

    /// The encrypted messages, and the devices that no Olm session exists with.
    async fn encrypt_for(
        &self,
        encryptor: &Encryptor,
        event_type: &str,
        content: &Value,
        devices: Vec<Device>,
        outcomes: &Outcomes,
    ) -> (Vec<(Device, Value)>, Vec<Device>) {
        let (mut ready, mut without_session) = (Vec::new(), Vec::new());
        for device in devices {
            let failure = match encryptor.encrypt_for(&device, event_type, content).await {
                Ok(message) => {
                    ready.push((device, message));
                    continue;
                }
                Err(OlmError::MissingSession) => {
                    without_session.push(device);
                    continue;
                }
                Err(OlmError::Withheld(_)) => DeliveryFailure::Blocked,
                Err(error) => DeliveryFailure::NoSession(error.to_string()),
            };
            report(outcomes, device, Err(failure)).await;
        }
        (ready, without_session)
    }

    async fn send_by_sdk(
        &self,
        event_type: &str,
        content: &Value,
        devices: Vec<(Device, SdkDevice)>,
        outcomes: &Outcomes,
    ) {
        let is_single = devices.len() == 1;
        match self.send_batch_by_sdk(event_type, content, &devices).await {
            Ok(failed) => {
                for (device, _) in devices {
                    let is_failed = failed.contains(&device);
                    let why = "matrix-sdk could not deliver the message and does not say why";
                    let outcome =
                        if is_failed { Err(DeliveryFailure::NoSession(why.to_owned())) } else { Ok(()) };
                    report(outcomes, device, outcome).await;
                }
            }
            // About one of them, or about us: each by itself.
            Err(RequestError::Local { .. }) if !is_single => {
                for device in devices {
                    let sent =
                        self.send_batch_by_sdk(event_type, content, std::slice::from_ref(&device)).await;
                    let sent = match sent {
                        Ok(failed) if failed.is_empty() => Ok(()),
                        Ok(_) => Err(DeliveryFailure::NoSession("no Olm session could be made".to_owned())),
                        Err(error) => Err(failure(error)),
                    };
                    report(outcomes, device.0, sent).await;
                }
            }
            Err(error) => {
                for (device, _) in devices {
                    report(outcomes, device, Err(failure(error.clone()))).await;
                }
            }
        }
    }

    /// The devices that got nothing.
    async fn send_batch_by_sdk(
        &self,
        event_type: &str,
        content: &Value,
        devices: &[(Device, SdkDevice)],
    ) -> Result<Vec<Device>, RequestError> {
        if devices.is_empty() {
            return Ok(Vec::new());
        }
        let content = Raw::<AnyToDeviceEventContent>::from_json_string(content.to_string());
        let content = content.map_err(|error| RequestError::Local { cause: error.to_string() })?;
        let encryption = self.client().encryption();
        let keys = devices.iter().map(|(_, keys)| keys).collect();
        let sent =
            encryption.encrypt_and_send_raw_to_device(keys, event_type, content, CollectStrategy::AllDevices);
        let failed = timeout(CLAIM_LIMIT + SEND_LIMIT, sent).await.map_err(|_| RequestError::TimedOut)?;
        let failed = failed.map_err(|error| sdk_error(&error))?;
        Ok(failed.into_iter().map(|(user, device)| Device::new(user, device)).collect())
    }

    async fn put_all(&self, messages: Vec<(Device, Value)>, outcomes: &Outcomes) {
        let mut messages = messages;
        while !messages.is_empty() {
            let rest = messages.split_off(messages.len().min(CHUNK));
            match self.put(&messages).await {
                // Something about one of them: each by itself.
                Err(RequestError::Refused { .. } | RequestError::Forbidden { .. }) if messages.len() > 1 => {
                    for message in messages {
                        let sent = self.put(std::slice::from_ref(&message)).await;
                        report(outcomes, message.0, sent.map_err(failure)).await;
                    }
                }
                sent => {
                    for (device, _) in messages {
                        report(outcomes, device, sent.clone().map_err(failure)).await;
                    }
                }
            }
            messages = rest;
        }
    }

    async fn put(&self, messages: &[(Device, Value)]) -> Result<(), RequestError> {
        let mut by_user: Map<String, Value> = Map::new();
        for (device, message) in messages {
            let of_user = by_user.entry(device.user_id.as_str()).or_insert_with(|| json!({}));
            of_user[device.device_id.as_str()] = message.clone();
        }
        let body = json!({"messages": by_user});
        let txn = TransactionId::new();
        let path = ["_matrix", "client", "v3", "sendToDevice", events::ENCRYPTED, txn.as_str()];
        self.ask(Ask::put(&path, &body), SEND_LIMIT).await.map(drop)
    }
}

async fn report(outcomes: &Outcomes, device: Device, delivery: Delivery) {
    // A closed channel means that the call has ended.
    drop(outcomes.send((device, delivery)).await);
}

fn failure(error: RequestError) -> DeliveryFailure {
    match error {
        RequestError::RateLimited { retry_after } => DeliveryFailure::RateLimited { retry_after },
        RequestError::TimedOut => DeliveryFailure::TimedOut,
        error => DeliveryFailure::Network(error.to_string()),
    }
}
