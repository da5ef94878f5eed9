//! A listener with a valid SFU token and no key: receives every frame, and tries to open them.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use antiphon_call_sdk::{
    Codec, FrameBytes, KeyIndex, LiveKitFocus, MediaKey, ParticipantIdentity, Session,
    frame_crypto::{FrameDecryptor, KeyRing, Opened},
    transport::{
        FrameReceiver, MediaTransport as _, ReceivedFrame, TransportEvent,
        livekit::{ConnectOptions, LiveKitTransport},
    },
};
use anyhow::{Context as _, Result};
use matrix_sdk::ruma::{RoomId, api::client::account::request_openid_token};
use serde_json::{Value, json};

/// Frames as they came over the SFU, by the participant that the SFU names as their sender.
pub(crate) type Heard = BTreeMap<ParticipantIdentity, Vec<(Codec, FrameBytes)>>;

/// A listener in the SFU room.
pub(crate) struct Intruder {
    transport: Arc<LiveKitTransport>,
    heard: Arc<Mutex<Heard>>,
}

impl Intruder {
    /// Gets a token as any user of the homeserver can, for a room that the user is not in, and listens.
    pub(crate) async fn enter(session: &Session, focus: &LiveKitFocus, room: &RoomId) -> Result<Self> {
        let (url, jwt) = token(session, focus, room).await?;
        let (transport, mut events) = LiveKitTransport::connect(ConnectOptions::new(url, jwt)).await?;
        let heard = Arc::new(Mutex::new(Heard::new()));
        let (listening, log) = (Arc::downgrade(&transport), heard.clone());
        tokio::spawn(async move {
            let mut known = BTreeSet::new();
            while let Some(event) = events.recv().await {
                if let TransportEvent::TrackUpdated { identity, track } = event
                    && known.insert(track.sid.clone())
                    && let Some(transport) = listening.upgrade()
                {
                    transport.attach(&track.sid, Some(Arc::new(Ear { identity, log: log.clone() })));
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

/// URL of the SFU and token for the room of a call, from `/sfu/get`.
async fn token(session: &Session, focus: &LiveKitFocus, room: &RoomId) -> Result<(String, String)> {
    let client = session.client();
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
    let service = focus.service.as_ref().context("the focus has no authorisation service")?;
    let reply = reqwest::Client::new().post(format!("{service}/sfu/get")).json(&body).send().await?;
    let reply = reply.error_for_status().context("the authorisation service refused the intruder a token")?;
    let reply: Value = reply.json().await?;
    let field =
        |name: &str| reply[name].as_str().map(ToOwned::to_owned).context("an answer without url or jwt");
    Ok((field("url")?, field("jwt")?))
}

/// Keeps the frames of one track.
#[derive(Debug)]
struct Ear {
    identity: ParticipantIdentity,
    log: Arc<Mutex<Heard>>,
}

impl FrameReceiver for Ear {
    fn receive(&self, frame: ReceivedFrame<'_>) {
        let mut log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        log.entry(self.identity.clone()).or_default().push((frame.codec, frame.payload.into()));
    }

    fn sender_report(&self, _rtp_timestamp: u32, _ntp: u64) {}

    fn injected_trailer(&self, _trailer: &[u8]) {}
}

/// Tries a key on every frame, whatever index the frame asks for; returns how many were tried and how many opened.
pub(crate) fn try_key(frames: &[(Codec, FrameBytes)], key: &MediaKey) -> Result<(usize, usize)> {
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
