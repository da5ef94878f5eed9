//! One member of the demo: plays a recording of its own and checks every frame that it receives.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use antiphon_call_sdk::{
    call::{Call, CallEvent, CallOptions, CallStats, LiveKitConnector},
    key::KeyIndex,
    matrix::{TrustPolicy, sdk::SdkRoom},
    media::Recording,
    member::{LiveKitFocus, ParticipantIdentity},
    transport::livekit::Bind,
};
use antiphon_examples::play;
use anyhow::{Context as _, Result};
use bytes::Bytes;
use matrix_sdk::{Room, ruma::OwnedUserId};
use tokio::task::JoinHandle;

use crate::key_tap::{KeptKeys, KeyTap};

/// The recordings in the order of the members, made by `examples/media/make.sh`.
const MEDIA: [(&str, &[u8], &[u8]); 3] = [
    ("alice", include_bytes!("../../../media/alice.ivf"), include_bytes!("../../../media/alice.ogg")),
    ("bob", include_bytes!("../../../media/bob.ivf"), include_bytes!("../../../media/bob.ogg")),
    ("carol", include_bytes!("../../../media/carol.ivf"), include_bytes!("../../../media/carol.ogg")),
];

/// A member's name, picture and sound.
pub(crate) struct Cast {
    pub(crate) name: &'static str,
    recordings: [Arc<Recording>; 2],
}

/// Every frame that a member sends, to compare with what the others receive.
pub(crate) type Scripts = Arc<HashMap<OwnedUserId, HashSet<Bytes>>>;

pub(crate) fn cast() -> Result<Vec<Cast>> {
    let read = |bytes: &'static [u8]| Recording::read(std::io::Cursor::new(bytes)).map(Arc::new);
    MEDIA
        .iter()
        .map(|(name, picture, sound)| Ok(Cast { name, recordings: [read(picture)?, read(sound)?] }))
        .collect()
}

impl Cast {
    pub(crate) fn script(&self) -> HashSet<Bytes> {
        self.recordings.iter().flat_map(|r| r.frames()).map(|f| f.payload.clone()).collect()
    }
}

/// What a member saw.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    /// Frames received per sender that are byte for byte in that sender's recording.
    pub(crate) identical: HashMap<ParticipantIdentity, u64>,
    /// Frames that are not.
    pub(crate) foreign: u64,
    pub(crate) own_keys: Vec<KeyIndex>,
    pub(crate) trouble: Vec<String>,
}

/// A member in the call.
pub(crate) struct Member {
    pub(crate) name: &'static str,
    pub(crate) call: Call,
    pub(crate) kept: KeptKeys,
    seen: Arc<Mutex<Seen>>,
    changed: Arc<tokio::sync::Notify>,
    quiet: Arc<AtomicBool>,
    tasks: Vec<JoinHandle<()>>,
}

impl Member {
    pub(crate) async fn join(
        cast: &Cast,
        room: &Room,
        focus: &LiveKitFocus,
        scripts: &Scripts,
    ) -> Result<Self> {
        let (port, kept) = KeyTap::new(SdkRoom::new(room.clone(), TrustPolicy::CrossSigned)?);
        let mut options = CallOptions::default();
        options.focus = Some(focus.clone());
        options.intent = Some("video".to_owned());
        let (call, mut events) =
            Call::join_through(Arc::new(port), Arc::new(LiveKitConnector::new(Bind::Auto)?), options)
                .await
                .with_context(|| format!("{} could not join the call", cast.name))?;
        let (seen, changed) = (Arc::new(Mutex::new(Seen::default())), Arc::new(tokio::sync::Notify::new()));
        let quiet = Arc::new(AtomicBool::new(false));
        let mut tasks = Vec::new();
        for recording in &cast.recordings {
            let track = call.publish(recording.track()).await?;
            let recording = recording.clone();
            let quiet = quiet.clone();
            tasks.push(tokio::spawn(async move {
                if let Err(error) = play(&track, &recording).await {
                    // The end of the call also ends the playing.
                    if !quiet.load(Ordering::Relaxed) {
                        tracing::warn!(%error, "playing stopped");
                    }
                }
            }));
        }
        let (log, scripts, notify) = (seen.clone(), scripts.clone(), changed.clone());
        tasks.push(tokio::spawn(async move {
            while let Some(event) = events.next().await {
                let mut seen = log.lock().unwrap_or_else(PoisonError::into_inner);
                match event {
                    CallEvent::Frame { member, frame, .. } => {
                        if scripts.get(&member.user_id).is_some_and(|s| s.contains(&frame.payload)) {
                            *seen.identical.entry(member.identity).or_default() += 1;
                        } else {
                            seen.foreign += 1;
                        }
                    }
                    CallEvent::OwnKeyInUse(index) => seen.own_keys.push(index),
                    CallEvent::KeyRejected { sender, reason } => {
                        seen.trouble.push(format!("key of {sender} refused: {reason}"));
                    }
                    CallEvent::Ended { reason } if reason != "left" => seen.trouble.push(reason),
                    _ => {}
                }
                notify.notify_waiters();
            }
        }));
        Ok(Self { name: cast.name, call, kept, seen, changed, quiet, tasks })
    }

    pub(crate) fn stats(&self) -> CallStats {
        self.call.stats()
    }

    /// Reads what was seen so far.
    pub(crate) fn seen<T>(&self, read: impl FnOnce(&Seen) -> T) -> T {
        read(&self.seen.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Waits until what was seen satisfies `enough`; false after `limit`.
    pub(crate) async fn wait_until(&self, limit: Duration, enough: impl Fn(&Self) -> bool) -> bool {
        let waiting = async {
            loop {
                let next = self.changed.notified();
                if enough(self) {
                    return;
                }
                next.await;
            }
        };
        tokio::time::timeout(limit, waiting).await.is_ok()
    }

    pub(crate) async fn leave(self) -> (KeptKeys, CallStats) {
        self.quiet.store(true, Ordering::Relaxed);
        let stats = self.call.stats();
        for task in &self.tasks {
            task.abort();
        }
        self.call.leave().await;
        (self.kept, stats)
    }
}
