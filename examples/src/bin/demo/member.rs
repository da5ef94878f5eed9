//! One member of the demo: plays a recording of its own and checks every frame that it receives.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use antiphon_call_sdk::{
    Call, CallEvent, CallOptions, EndReason, LiveKitConnector, LiveKitFocus, Recording, Session,
    TrackSummary, TrustPolicy,
};
use antiphon_examples::{play, trouble};
use anyhow::{Context as _, Result};
use matrix_sdk::ruma::{OwnedUserId, RoomId};
use tokio::task::JoinSet;

use crate::key_tap::{KeptKeys, KeyTap};

/// The recordings in the order of the members, made by `examples/media/make.sh`.
const MEDIA: [(&str, &[u8], &[u8]); 3] = [
    ("alice", include_bytes!("../../../media/alice.ivf"), include_bytes!("../../../media/alice.ogg")),
    ("bob", include_bytes!("../../../media/bob.ivf"), include_bytes!("../../../media/bob.ogg")),
    ("carol", include_bytes!("../../../media/carol.ivf"), include_bytes!("../../../media/carol.ogg")),
];

/// A member's name, picture and sound.
pub(crate) struct Part {
    pub(crate) name: &'static str,
    recordings: [Arc<Recording>; 2],
}

/// Every frame that each member sends, to compare with what the others receive.
pub(crate) type Scripts = Arc<HashMap<OwnedUserId, HashSet<Vec<u8>>>>;

pub(crate) fn cast() -> Result<Vec<Part>> {
    let read = |bytes: &'static [u8]| Recording::read(std::io::Cursor::new(bytes)).map(Arc::new);
    MEDIA
        .iter()
        .map(|(name, picture, sound)| Ok(Part { name, recordings: [read(picture)?, read(sound)?] }))
        .collect()
}

impl Part {
    pub(crate) fn script(&self) -> HashSet<Vec<u8>> {
        self.recordings.iter().flat_map(|r| r.frames()).map(|f| f.payload.to_vec()).collect()
    }
}

/// What a member saw.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    /// Frames received per sender that are byte for byte in that sender's recording.
    pub(crate) identical: HashMap<OwnedUserId, u64>,
    /// Frames that are not.
    pub(crate) foreign: u64,
    /// What must not happen in a call among friends.
    pub(crate) failures: Vec<String>,
    /// What may happen, and explains a failed claim.
    pub(crate) remarks: Vec<String>,
}

/// A member in the call.
pub(crate) struct Member {
    pub(crate) name: &'static str,
    pub(crate) call: Call,
    kept: KeptKeys,
    seen: Arc<Mutex<Seen>>,
    changed: Arc<tokio::sync::Notify>,
    // Aborted when dropped.
    _tasks: JoinSet<()>,
}

impl Member {
    pub(crate) async fn join(
        part: &Part,
        session: &Session,
        room: &RoomId,
        focus: &LiveKitFocus,
        scripts: &Scripts,
    ) -> Result<Self> {
        let (port, kept) = KeyTap::new(session.room(room, TrustPolicy::CrossSigned)?);
        let options = CallOptions::default().with_focus(focus.clone()).with_intent("video".to_owned());
        let connector = Arc::new(LiveKitConnector::new(options.livekit())?);
        let (call, mut events) = Call::join_through(Arc::new(port), connector, options)
            .await
            .with_context(|| format!("{} could not join the call", part.name))?;
        let mut tasks = JoinSet::new();
        for recording in &part.recordings {
            let track = call.publish(recording.track()).await?;
            let recording = recording.clone();
            tasks.spawn(async move {
                if let Err(error) = play(&track, &recording).await {
                    tracing::warn!(%error, "playing stopped");
                }
            });
        }
        let (seen, changed) = (Arc::new(Mutex::new(Seen::default())), Arc::new(tokio::sync::Notify::new()));
        let (log, scripts, notify) = (seen.clone(), scripts.clone(), changed.clone());
        tasks.spawn(async move {
            while let Some(event) = events.next().await {
                log.lock().unwrap_or_else(PoisonError::into_inner).add(&event, &scripts);
                notify.notify_waiters();
            }
        });
        Ok(Self { name: part.name, call, kept, seen, changed, _tasks: tasks })
    }

    pub(crate) fn tracks(&self) -> Vec<TrackSummary> {
        self.call.tracks()
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

    /// Leaves, and returns the keys that the member kept.
    pub(crate) async fn leave(self) -> KeptKeys {
        self.call.leave().await;
        self.kept
    }
}

impl Seen {
    fn add(&mut self, event: &CallEvent, scripts: &Scripts) {
        if let CallEvent::Frame { from, frame } = event {
            let sender = &from.member.user_id;
            if scripts.get(sender).is_some_and(|script| script.contains(&frame.payload[..])) {
                *self.identical.entry(sender.clone()).or_default() += 1;
            } else {
                self.foreign += 1;
            }
            return;
        }
        let Some(trouble) = trouble(event) else { return };
        let is_failure = match event {
            CallEvent::PeerRefused { .. }
            | CallEvent::KeyRejected { .. }
            | CallEvent::OwnDeviceNotTrusted(_)
            | CallEvent::MediaBlocked { .. } => true,
            CallEvent::Ended(reason) => *reason != EndReason::Left,
            _ => false,
        };
        if is_failure { &mut self.failures } else { &mut self.remarks }.push(trouble);
    }
}
