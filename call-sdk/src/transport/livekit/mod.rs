//! Media over a LiveKit SFU.
//!
//! The signalling is LiveKit's v0: two peer connections, one that we offer (our tracks) and one that the SFU
//! offers (everybody else's). `session` is the task that owns both and restores them; what it decides by is
//! in plain structs without I/O: `roster` (who is there), `publications` (what we publish), `packet`
//! (frames to RTP and back), `sections` (which track a media section carries), `pace` (how often).
//! `engine` is the only place that knows the WebRTC engine, with the work-arounds that it needs.
//!
//! What it does not do: simulcast, codecs other than Opus and VP8, data channels, TURN over TCP or TLS, bandwidth
//! estimation (frames come encoded), resuming a connection (it always connects afresh).
#![allow(clippy::disallowed_methods, reason = "this is the shell: it owns the clock and the tasks")]

use std::{
    collections::HashMap,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicBool, Ordering},
    },
};

use async_trait::async_trait;
use tokio::sync::{mpsc, oneshot};

pub use self::connect::{Bind, ConnectOptions, IceServer};
use self::{
    events::EventSink,
    incoming::IncomingTracks,
    outgoing::LocalTrack,
    session::{Command, Link, Session},
};
use crate::{
    media::TrackSpec,
    transport::{LocalTrackId, MediaTransport, TrackSid, TransportError, TransportEvent, WireFrame},
};

mod connect;
mod engine;
mod events;
mod incoming;
mod outgoing;
mod pace;
mod packet;
mod publications;
mod roster;
mod sections;
mod session;

/// Commands that may wait for the session.
const COMMANDS: usize = 64;

/// One member's connection to a LiveKit SFU room.
///
/// It restores itself when the connection is lost ([`TransportEvent::Reconnecting`]) and publishes the local
/// tracks again under the same [`LocalTrackId`]. Dropping it leaves the room.
#[derive(Debug)]
pub struct LiveKitTransport {
    commands: mpsc::Sender<Command>,
    shared: Arc<Shared>,
}

impl LiveKitTransport {
    /// Enters the room that the token names. Media connects in the background.
    ///
    /// The receiver must be read: control events wait for it, and dropping it leaves the room.
    ///
    /// # Errors
    /// [`TransportError::Unauthorised`], [`TransportError::RoomCreationRestricted`] or
    /// [`TransportError::Capacity`] if the SFU refuses, [`TransportError::Signal`] or
    /// [`TransportError::Timeout`] if it cannot be reached, [`TransportError::Media`] if no local address can
    /// be bound.
    pub async fn connect(
        options: ConnectOptions,
    ) -> Result<(Arc<Self>, mpsc::Receiver<TransportEvent>), TransportError> {
        let (link, join) = Link::open(&options, &options.token).await?;
        let (events, receiver) = EventSink::new(options.frame_queue);
        let shared = Arc::new(Shared {
            events: Arc::new(events),
            incoming: Arc::new(IncomingTracks::default()),
            locals: RwLock::new(HashMap::new()),
            closed: AtomicBool::new(false),
        });
        let (commands, inbox) = mpsc::channel(COMMANDS);
        let session = Session::new(options, Arc::clone(&shared), inbox);
        tokio::spawn(session.run(link, join));
        Ok((Arc::new(Self { commands, shared }), receiver))
    }

    /// How many frames were dropped so far.
    #[must_use]
    pub fn statistics(&self) -> LiveKitStatistics {
        let locals = self.shared.locals.read().unwrap_or_else(PoisonError::into_inner);
        LiveKitStatistics {
            outgoing_dropped: locals.values().map(|track| track.dropped()).sum(),
            incoming_dropped: self.shared.events.dropped(),
        }
    }

    async fn command<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Option<T> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(command(reply)).await.ok()?;
        answer.await.ok()
    }
}

#[async_trait]
impl MediaTransport for LiveKitTransport {
    /// Resolves when the SFU has the track and media can flow, which is within 15 s on a live connection; during
    /// a reconnection it waits for its end.
    async fn publish(&self, spec: TrackSpec, encrypted: bool) -> Result<LocalTrackId, TransportError> {
        self.command(|reply| Command::Publish { spec, encrypted, reply })
            .await
            .unwrap_or(Err(TransportError::Closed))
    }

    async fn unpublish(&self, track: LocalTrackId) {
        self.command(|done| Command::Unpublish { track, done }).await;
    }

    /// Frames of a muted track are dropped here, from before the SFU is told.
    async fn set_muted(&self, track: LocalTrackId, muted: bool) {
        if let Some(local) = self.shared.local(track) {
            local.set_muted(muted);
            self.command(|done| Command::TellMuted { track, done }).await;
        }
    }

    async fn send(&self, track: LocalTrackId, frame: WireFrame) -> Result<(), TransportError> {
        if self.shared.closed.load(Ordering::Relaxed) {
            return Err(TransportError::Closed);
        }
        let local = self.shared.local(track).ok_or(TransportError::UnknownTrack)?;
        local.send(frame).await;
        Ok(())
    }

    /// At most one request per track every 500 ms is sent; others are left out, so ask again while it is needed.
    async fn request_key_frame(&self, sid: &TrackSid) {
        self.shared.incoming.request_key_frame(sid).await;
    }

    async fn close(&self) {
        // The session may be waiting for a reader who has stopped reading.
        self.shared.events.close();
        self.command(|done| Command::Close { done }).await;
    }
}

/// Counters of a [`LiveKitTransport`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct LiveKitStatistics {
    /// Frames of present local tracks that were not sent: the track was muted, the connection not up, or the
    /// frame too large.
    pub outgoing_dropped: u64,
    /// Received frames that found the event queue full.
    pub incoming_dropped: u64,
}

/// What the transport's handle and its session share.
#[derive(Debug)]
struct Shared {
    events: Arc<EventSink>,
    incoming: Arc<IncomingTracks>,
    locals: RwLock<HashMap<LocalTrackId, Arc<LocalTrack>>>,
    closed: AtomicBool,
}

impl Shared {
    fn local(&self, track: LocalTrackId) -> Option<Arc<LocalTrack>> {
        self.locals.read().unwrap_or_else(PoisonError::into_inner).get(&track).cloned()
    }

    fn add(&self, track: Arc<LocalTrack>) {
        self.locals.write().unwrap_or_else(PoisonError::into_inner).insert(track.id, track);
    }

    fn remove(&self, track: LocalTrackId) {
        self.locals.write().unwrap_or_else(PoisonError::into_inner).remove(&track);
    }
}
