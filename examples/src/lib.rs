//! What the examples share: logging in, and playing a recording into a call.
#![allow(clippy::disallowed_methods, reason = "a program is a shell: it owns the clock and the tasks")]
// matrix-sdk's sync future nests deeper than the compiler looks by itself.
#![recursion_limit = "256"]

use std::{sync::Arc, time::Duration};

use antiphon_call_sdk::{
    call::{Call, CallEvents, CallOptions, LocalTrack, WriteError},
    frame_crypto::SealError,
    matrix::TrustPolicy,
    media::Recording,
};
use anyhow::{Context as _, Result};
use matrix_sdk::{
    Client, Room, RoomState,
    config::SyncSettings,
    encryption::EncryptionSettings,
    ruma::{OwnedRoomId, RoomId},
};
use tokio::task::JoinHandle;

/// To be called first in every `main`: two TLS providers are in the graph, and one must be the default.
pub fn init() {
    // Err means that it is set already, which is what we want.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn,matrix_sdk=off,matrix_sdk_crypto=off,rtc=off,rtc_ice=off,rtc_dtls=off,rtc_sctp=off,webrtc=off"));
    // Err means that a subscriber is installed, for instance by a test.
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).try_init();
}

/// Which user an example is, and in which room.
#[derive(Debug, clap::Args)]
pub struct Place {
    /// Base URL of the homeserver.
    #[arg(long)]
    pub homeserver: String,
    /// User name.
    #[arg(long)]
    pub user: String,
    /// Password; better in the environment than on the command line.
    #[arg(long, env = "MATRIX_PASSWORD", hide_env_values = true)]
    pub password: String,
    /// Room id; the room is joined if we are invited or it is public.
    #[arg(long)]
    pub room: OwnedRoomId,
    /// Talk to clients whose device its owner has not cross-signed, as Element Call on its own.
    #[arg(long)]
    pub trust_any_device: bool,
}

impl Place {
    /// Logs in, enters the room and joins its call.
    ///
    /// # Errors
    /// What the homeserver or the focus say if they do not let us in.
    pub async fn join_call(&self) -> Result<(Session, Call, CallEvents)> {
        let session = Session::log_in(&self.homeserver, &self.user, &self.password).await?;
        let room = session.enter(&self.room).await?;
        let mut options = CallOptions::default();
        if self.trust_any_device {
            options.trust = TrustPolicy::AnyDevice;
        }
        let (call, events) = Call::join(&room, options).await?;
        Ok((session, call, events))
    }
}

/// A logged-in client that keeps syncing until it is dropped.
#[derive(Debug)]
pub struct Session {
    /// The client.
    pub client: Client,
    sync: JoinHandle<()>,
}

impl Session {
    /// Logs in with a new device that its owner's identity signs, and starts to sync.
    ///
    /// # Errors
    /// What matrix-sdk says if the homeserver does not let us in.
    pub async fn log_in(homeserver: &str, user: &str, password: &str) -> Result<Self> {
        let client = Client::builder()
            .homeserver_url(homeserver)
            .with_encryption_settings(EncryptionSettings {
                auto_enable_cross_signing: true,
                ..EncryptionSettings::default()
            })
            .build()
            .await
            .with_context(|| format!("no Matrix homeserver answers at {homeserver}"))?;
        client
            .matrix_auth()
            .login_username(user, password)
            .initial_device_display_name("Antiphon")
            .send()
            .await
            .with_context(|| format!("{homeserver} does not log {user} in"))?;
        client.encryption().wait_for_e2ee_initialization_tasks().await;
        // One round by hand, so that a failure shows here and the store is filled when we return.
        client.sync_once(SyncSettings::default()).await.context("the first sync failed")?;
        let syncing = client.clone();
        let sync = tokio::spawn(async move {
            if let Err(error) = syncing.sync(SyncSettings::default()).await {
                tracing::error!(%error, "sync ended");
            }
        });
        Ok(Self { client, sync })
    }

    /// Joins a room by id and waits until sync shows it, with its members.
    ///
    /// # Errors
    /// If the homeserver refuses, or after 30 s.
    pub async fn enter(&self, id: &RoomId) -> Result<Room> {
        if self.client.get_room(id).is_none_or(|r| r.state() != RoomState::Joined) {
            self.client.join_room_by_id(id).await.with_context(|| format!("cannot join {id}"))?;
        }
        self.room(id.to_owned()).await
    }

    /// Waits until sync shows a joined room and whether it is encrypted.
    ///
    /// # Errors
    /// After 30 s.
    pub async fn room(&self, id: OwnedRoomId) -> Result<Room> {
        let mut changes = self.client.subscribe_to_all_room_updates();
        let shown = async {
            loop {
                if let Some(room) = self.client.get_room(&id)
                    && room.state() == RoomState::Joined
                    && room.create_content().is_some()
                {
                    return room;
                }
                // Lagging only means that something changed, so look again.
                let _ = changes.recv().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), shown)
            .await
            .with_context(|| format!("the homeserver did not show {id} within 30 s"))
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.sync.abort();
    }
}

/// Plays a recording into a track, over and over, each frame when its time has come.
///
/// # Errors
/// When the call is over.
pub async fn play(track: &LocalTrack, recording: &Arc<Recording>) -> Result<(), WriteError> {
    let start = tokio::time::Instant::now();
    for frame in recording.looped() {
        tokio::time::sleep_until(start + frame.timestamp).await;
        match track.write(frame).await {
            // The first moment of a call: our key does not exist yet, so there is nothing to send.
            Ok(()) | Err(WriteError::Seal(SealError::MissingKey(_))) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
