//! One member of the demo: plays a recording of its own and checks every frame that it receives.

use std::{
    collections::{HashMap, HashSet},
    net::Ipv4Addr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use antiphon_call_sdk::{
    Call, CallEvent, CallOptions, Codec, EndReason, LiveKitConnector, MediaKey, MeshPolicy, Recording,
    Session, TrackSummary, Transport, TrustPolicy, transport::livekit::Bind,
};
use antiphon_examples::{play, trouble};
use anyhow::{Context as _, Result};
use matrix_sdk::ruma::{OwnedUserId, RoomId};
use tokio::task::JoinSet;

use crate::{
    stage::Route,
    tap::{Tap, Tapped},
    voices::Voices,
};

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
    pub(crate) voices: Voices,
    /// Whether media travels from member to member.
    pub(crate) meshes: bool,
    /// With whom media was exchanged directly.
    pub(crate) direct: HashSet<OwnedUserId>,
    /// The demo itself stopped the focus, or there is none: what the members say about that is no surprise.
    pub(crate) expects_no_focus: bool,
    /// What must not happen in a call among friends.
    pub(crate) failures: Vec<String>,
    /// What may happen, and explains a failed claim.
    pub(crate) remarks: Vec<String>,
}

/// A member in the call.
pub(crate) struct Member {
    pub(crate) name: &'static str,
    pub(crate) call: Call,
    tapped: Arc<Mutex<Tapped>>,
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
        route: &Route,
        scripts: &Scripts,
    ) -> Result<Self> {
        let (port, tapped) = Tap::new(session.room(room, TrustPolicy::CrossSigned)?);
        let options = options(route);
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
        let seen = Seen { expects_no_focus: matches!(route, Route::Mesh), ..Seen::default() };
        let (seen, changed) = (Arc::new(Mutex::new(seen)), Arc::new(tokio::sync::Notify::new()));
        let (log, scripts, notify) = (seen.clone(), scripts.clone(), changed.clone());
        tasks.spawn(async move {
            while let Some(event) = events.next().await {
                log.lock().unwrap_or_else(PoisonError::into_inner).add(&event, &scripts);
                notify.notify_waiters();
            }
        });
        Ok(Self { name: part.name, call, tapped, seen, changed, _tasks: tasks })
    }

    pub(crate) fn tracks(&self) -> Vec<TrackSummary> {
        self.call.tracks()
    }

    /// Reads what was seen so far.
    pub(crate) fn seen<T>(&self, read: impl FnOnce(&Seen) -> T) -> T {
        read(&self.seen.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Changes how what is seen is noted.
    pub(crate) fn note<T>(&self, change: impl FnOnce(&mut Seen) -> T) -> T {
        change(&mut self.seen.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// How many signalling messages of the mesh came Olm-encrypted, and how many in clear.
    pub(crate) fn signalling(&self) -> (u64, u64) {
        let tapped = self.tapped.lock().unwrap_or_else(PoisonError::into_inner);
        (tapped.encrypted, tapped.clear)
    }

    /// Whether any member of the call, as this one sees it, lists a focus.
    pub(crate) fn sees_focus(&self) -> bool {
        let has_focus = |transport: &Transport| matches!(transport, Transport::LiveKit(_));
        self.call.members().iter().any(|member| member.transports.iter().any(has_focus))
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

    /// Leaves, and returns the keys that the member kept, by their sender.
    pub(crate) async fn leave(self) -> Vec<(OwnedUserId, MediaKey)> {
        self.call.leave().await;
        let tapped = self.tapped.lock().unwrap_or_else(PoisonError::into_inner);
        tapped.keys.clone()
    }
}

fn options(route: &Route) -> CallOptions {
    let options = CallOptions::default().with_intent("video".to_owned());
    // All members are in this process, so they find each other on any machine, without a STUN or TURN server.
    let loopback = Bind::Addresses(vec![(Ipv4Addr::LOCALHOST, 0).into()]);
    match route {
        Route::OwnFocus(focus) => options.with_focus(focus.clone()).with_bind(loopback),
        Route::OtherFocus(focus) => options.with_focus(focus.clone()),
        // Whatever foci the homeserver names.
        Route::Mesh => {
            options.with_mesh(MeshPolicy::SmallCalls { limit: MeshPolicy::DEFAULT_LIMIT }).with_bind(loopback)
        }
    }
}

impl Seen {
    fn add(&mut self, event: &CallEvent, scripts: &Scripts) {
        if let CallEvent::Frame { from, frame } = event {
            let sender = &from.member.user_id;
            if from.track.codec.is_some_and(Codec::is_audio) {
                self.voices.heard(sender);
            }
            if scripts.get(sender).is_some_and(|script| script.contains(&frame.payload[..])) {
                *self.identical.entry(sender.clone()).or_default() += 1;
            } else {
                self.foreign += 1;
            }
            return;
        }
        match event {
            CallEvent::MeshBegan(_) => {
                self.meshes = true;
                self.voices.moved();
            }
            CallEvent::MeshEnded(_) => {
                self.meshes = false;
                self.voices.moved();
            }
            CallEvent::PeerConnected(member) => {
                self.direct.insert(member.user_id.clone());
            }
            _ => {}
        }
        let is_about_focus = matches!(
            event,
            CallEvent::MeshBegan(_)
                | CallEvent::Reconnecting(_)
                | CallEvent::FocusFailed { .. }
                | CallEvent::MediaBlocked { .. }
        );
        if self.expects_no_focus && is_about_focus {
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
