//! Somebody with a valid SFU token and no key: receives every frame, and tries to open them.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use antiphon_call_sdk::{
    frame_crypto::{FrameDecryptor, KeyRing, Opened},
    key::{KeyIndex, MediaKey},
    media::Codec,
    member::{LiveKitFocus, ParticipantIdentity},
    transport::{
        MediaTransport as _, TransportEvent,
        livekit::{ConnectOptions, LiveKitTransport},
    },
};
use anyhow::{Context as _, Result};
use bytes::Bytes;
use matrix_sdk::ruma::{RoomId, api::client::account::request_openid_token};
use serde_json::json;

use antiphon_examples::Session;

/// Frames as they came over the SFU, by the participant they are said to come from.
type Heard = BTreeMap<ParticipantIdentity, Vec<(Codec, Bytes)>>;

/// A listener in the SFU room.
pub(crate) struct Intruder {
    transport: Arc<LiveKitTransport>,
    heard: Arc<Mutex<Heard>>,
}

impl Intruder {
    /// Gets a token as any user of the homeserver can, for a room they are not in, and listens.
    pub(crate) async fn enter(session: &Session, focus: &LiveKitFocus, room: &RoomId) -> Result<Self> {
        let client = &session.client;
        let user = client.user_id().context("not logged in")?.to_owned();
        let openid = client.send(request_openid_token::v3::Request::new(user)).await?;
        let body = json!({
            "room": room,
            "device_id": client.device_id(),
            "openid_token": {
                "access_token": openid.access_token,
                "token_type": "Bearer",
                "matrix_server_name": openid.matrix_server_name,
                "expires_in": openid.expires_in.as_secs(),
            },
        });
        let reply = reqwest::Client::new()
            .post(format!("{}/sfu/get", focus.service_url))
            .json(&body)
            .send()
            .await?
            .error_for_status()
            .context("the authorisation service refused the intruder a token")?;
        let access: antiphon_call_sdk::foci::SfuAccess = serde_json::from_slice(&reply.bytes().await?)?;
        let (transport, mut events) =
            LiveKitTransport::connect(ConnectOptions::new(access.url, access.jwt)).await?;
        let heard = Arc::new(Mutex::new(Heard::new()));
        let log = heard.clone();
        tokio::spawn(async move {
            while let Some(event) = events.recv().await {
                if let TransportEvent::Frame { identity, codec, frame, .. } = event {
                    let mut log = log.lock().unwrap_or_else(PoisonError::into_inner);
                    log.entry(identity).or_default().push((codec, frame.payload));
                }
            }
        });
        Ok(Self { transport, heard })
    }

    /// Takes what was heard so far.
    pub(crate) fn take(&self) -> Heard {
        std::mem::take(&mut self.heard.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) async fn leave(self) {
        self.transport.close().await;
    }
}

/// Tries a key on every frame, whatever index the frame asks for; returns how many were tried and how many opened.
pub(crate) fn try_key(frames: &[(Codec, Bytes)], key: &MediaKey) -> Result<(usize, usize)> {
    let ring = KeyRing::new();
    for index in 0..=u8::MAX {
        ring.set(KeyIndex(index), key)?;
    }
    let mut opened = 0;
    for (codec, frame) in frames {
        let mut decryptor = FrameDecryptor::new(*codec, ring.clone())?;
        let mut plain = Vec::new();
        if let Ok(Opened::Frame(_)) = decryptor.open(Instant::now(), frame, None, &mut plain) {
            opened += 1;
        }
    }
    Ok((frames.len(), opened))
}
