//! Media over a LiveKit SFU.
//!
//! The signalling is LiveKit's v1, with one peer connection that carries both directions, or v0 with two. `session` is
//! the task that owns the connection; `settle` is what it does for the application, `hear` what it does about messages
//! of the SFU, and `restore` what it does when the connection is lost. `link` is one connection, from join to loss.
//! Decisions are made in plain structs without I/O: `roster` (participants and their tracks), `publications` (the way of
//! our tracks to the SFU), `resumption` (data packets around an interruption). What it shares with other connections is
//! in [`rtc`](super::rtc): the application's wishes, local and remote tracks, the framing of data packets, shares of the
//! uplink. Only `rtc::engine` knows the WebRTC engine and the work-arounds that it needs.
//!
//! What it does not do:
//!
//! - Sender reports from SFUs that name the media section in the same packet, as LiveKit does: the engine rejects it.
//! - Estimates of the downlink (REMB): an SFU that relies on them, as LiveKit does by default, never pauses our tracks.
//! - Retransmission streams for simulcast: lost packets are sent again as they were.
#![allow(clippy::disallowed_methods, reason = "this is the shell: it owns the clock and the tasks")]

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use livekit_protocol::JoinResponse;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

pub use self::connect::ConnectOptions;
use self::{
    channels::{Outbound, QUEUE},
    link::Link,
    resumption::Sequences,
    session::Session,
};
pub use super::rtc::{Bind, IceServer};
use super::rtc::{data, desired::Desired, events::EventSink, remote::RemoteTracks};
use crate::{
    media::TrackSpec,
    transport::{
        DataPacket, FrameReceiver, LocalTrackId, MediaTransport, Outlet, Subscription, TrackSid,
        TransportError, TransportEvent,
    },
};

mod channels;
mod connect;
mod ending;
mod hear;
mod link;
mod net;
mod peers;
mod publications;
mod requests;
mod restore;
mod resumption;
mod roster;
mod session;
mod settle;

/// How long leaving may take.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// One member's connection to a LiveKit SFU room.
///
/// It restores itself when the connection is lost ([`TransportEvent::Reconnecting`]) and publishes the local tracks
/// again under the same [`LocalTrackId`]. Dropping it leaves the room.
#[derive(Debug)]
pub struct LiveKitTransport {
    shared: Arc<Shared>,
    data: mpsc::Sender<DataPacket>,
}

impl LiveKitTransport {
    /// Enters the room that the token names. Media connects in the background.
    ///
    /// The receiver must be read: the connection waits for its reader, and dropping it leaves the room.
    ///
    /// # Errors
    /// [`TransportError::Unauthorised`], [`TransportError::RoomCreationRestricted`] or [`TransportError::Capacity`] if
    /// the SFU refuses, [`TransportError::Signal`] or [`TransportError::Timeout`] if it cannot be reached,
    /// [`TransportError::Media`] if no local address can be bound.
    pub async fn connect(
        options: ConnectOptions,
    ) -> Result<(Arc<Self>, mpsc::Receiver<TransportEvent>), TransportError> {
        let (link, join) = open(&options).await?;
        let (events, receiver) = EventSink::new();
        let (data, queue) = mpsc::channel(QUEUE);
        let shared = Arc::new(Shared {
            events: Arc::new(events),
            desired: Desired::default(),
            remote: RemoteTracks::default(),
            outbound: tokio::sync::Mutex::new(Outbound::new(queue)),
            sequences: Mutex::default(),
            ended: CancellationToken::new(),
        });
        tokio::spawn(Session::new(options, Arc::clone(&shared)).run(link, join));
        Ok((Arc::new(Self { shared, data }), receiver))
    }
}

/// Opens the first connection. Dropping the future leaves the room again.
async fn open(options: &ConnectOptions) -> Result<(Link, JoinResponse), TransportError> {
    let (opened, answer) = oneshot::channel();
    let options = options.clone();
    tokio::spawn(async move {
        let result = Link::open(&options, &options.token).await;
        if let Err(Ok((link, _))) = opened.send(result) {
            link.close(true).await;
        }
    });
    answer.await.unwrap_or(Err(TransportError::Closed))
}

impl Drop for LiveKitTransport {
    fn drop(&mut self) {
        self.shared.events.close();
        self.shared.desired.close();
    }
}

#[async_trait]
impl MediaTransport for LiveKitTransport {
    /// Resolves when the SFU has the track and media can flow, which is within 15 s on a live connection; during a
    /// reconnection it waits for its end.
    async fn publish(
        &self,
        track: LocalTrackId,
        spec: TrackSpec,
        encrypted: bool,
    ) -> Result<Arc<dyn Outlet>, TransportError> {
        Ok(self.shared.desired.publication(track, spec, encrypted).await?)
    }

    fn unpublish(&self, track: LocalTrackId) {
        self.shared.desired.take_back(track);
    }

    fn set_muted(&self, track: LocalTrackId, muted: bool) {
        self.shared.desired.set_muted(track, muted);
    }

    fn attach(&self, sid: &TrackSid, receiver: Option<Arc<dyn FrameReceiver>>) {
        self.shared.remote.attach(sid, receiver);
    }

    fn subscribe(&self, sid: &TrackSid, subscription: Subscription) {
        self.shared.desired.subscribe(sid, subscription);
    }

    /// At most one request per track every 500 ms is sent; others are left out, so ask again while it is needed.
    fn request_key_frame(&self, sid: &TrackSid) {
        self.shared.remote.request_key_frame(sid);
    }

    /// Reliable packets survive a resumed connection; one that had to be opened afresh may lose the last of them.
    fn send_data(&self, packet: DataPacket) -> Result<(), TransportError> {
        data::check(&packet)?;
        if self.shared.desired.is_closed() {
            return Err(TransportError::Closed);
        }
        self.data.try_send(packet).map_err(|_| TransportError::Congested)?;
        self.shared.desired.want_data();
        Ok(())
    }

    async fn close(&self) {
        // The session may be waiting for a reader that has stopped reading.
        self.shared.events.close();
        self.shared.desired.close();
        if tokio::time::timeout(CLOSE_TIMEOUT, self.shared.ended.cancelled()).await.is_err() {
            tracing::warn!("an SFU connection did not close in time");
        }
    }
}

/// What the transport's handle and its session share.
#[derive(Debug)]
struct Shared {
    events: Arc<EventSink>,
    desired: Desired,
    remote: RemoteTracks,
    outbound: tokio::sync::Mutex<Outbound>,
    /// Of the reliable packets that arrived.
    sequences: Mutex<Sequences>,
    /// Cancelled after the last event.
    ended: CancellationToken,
}

impl Shared {
    /// Nothing follows.
    fn end(&self, reason: crate::transport::DisconnectReason) {
        self.desired.end();
        self.remote.set_trailer(Bytes::new());
        self.remote.retain(|_| false);
        self.sequences.lock().unwrap_or_else(PoisonError::into_inner).clear();
        self.events.last(TransportEvent::Disconnected(reason));
        self.ended.cancel();
    }
}
