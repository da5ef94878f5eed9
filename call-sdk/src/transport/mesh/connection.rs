//! One peer connection to a mesh peer, over the WebRTC engine.
//!
//! `session` is the task that owns the connection. It does what signalling asks, in order, and reports what came of it;
//! the same code serves both roles, and the first command says which it is. `sections` keeps the sections in which we
//! send and in which the other side may. Decisions are made in plain structs without I/O: `candidates` (what the other
//! side learns about our network), `metadata` (what a stream is), `layers` (which layer of a video track the peer gets).
//!
//! What it does not do:
//!
//! - Simulcast: the peer gets one layer of every video track as a single stream.
//! - Pausing what we receive: a member can't be asked for less. Subscriptions are ignored.
//! - Use the section of an ended track for one of another codec: the engine binds a section to its codec.
#![allow(clippy::disallowed_methods, reason = "this is the shell: it owns the clock and the tasks")]

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use self::session::Session;
use super::Negotiate;
use crate::{
    media::TrackSpec,
    member::ParticipantIdentity,
    transport::{
        DataPacket, DisconnectReason, FrameReceiver, LocalTrackId, MediaTransport, MeshTransport, Outlet,
        Subscription, TrackSid, TransportError, TransportEvent,
        rtc::{Bind, IceServer, Network, data, desired::Desired, events::EventSink, remote::RemoteTracks},
    },
};

mod candidates;
mod channels;
mod layers;
mod metadata;
mod sections;
mod session;

#[cfg(test)]
mod tests;

/// How long closing may take.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);
/// Commands that may wait; signalling sends one at a time.
const COMMANDS: usize = 256;

/// How a mesh connection uses the network.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct MeshOptions {
    /// The local addresses that media travels from.
    pub bind: Bind,
    /// STUN and TURN servers.
    pub ice_servers: Vec<IceServer>,
    /// Whether media travels through TURN servers only.
    pub relay_only: bool,
    /// Whether the other side learns the addresses of our interfaces: for local networks and VPNs. Loopback addresses
    /// are told in any case.
    pub host_candidates: bool,
    /// TLS towards TURN servers; `None`: trust the system's roots.
    pub tls: Option<Arc<rustls::ClientConfig>>,
    /// Which addresses the other side's candidates may have, and a TURN server that is reached over TCP or TLS.
    pub addresses: crate::addresses::AddressRule,
}

impl MeshOptions {
    fn network(&self) -> Network {
        Network {
            addresses: self.bind.addresses(),
            relay_only: self.relay_only,
            mesh: true,
            tls: self.tls.clone(),
            rule: self.addresses,
        }
    }
}

/// One peer connection to a mesh peer. Dropping it closes it.
#[derive(Debug)]
pub struct MeshConnection {
    shared: Arc<Shared>,
    commands: mpsc::Sender<Negotiate>,
    data: mpsc::Sender<DataPacket>,
}

impl MeshConnection {
    /// Opens a connection to a member; its events name the member `identity`. Nothing is sent before
    /// [`Negotiate::Offer`](super::Negotiate::Offer) or [`Negotiate::Answer`](super::Negotiate::Answer).
    ///
    /// The receiver must be read: the connection waits for its reader, and dropping it closes the connection.
    ///
    /// # Errors
    /// [`TransportError::Media`] if no local address can be bound.
    pub async fn open(
        options: MeshOptions,
        identity: ParticipantIdentity,
    ) -> Result<(Arc<dyn MeshTransport>, mpsc::Receiver<TransportEvent>), TransportError> {
        let (events, receiver) = EventSink::new();
        let (commands, commanded) = mpsc::channel(COMMANDS);
        let (data, queue) = mpsc::channel(channels::QUEUE);
        let shared = Arc::new(Shared {
            events: Arc::new(events),
            desired: Desired::default(),
            remote: RemoteTracks::default(),
            ended: CancellationToken::new(),
        });
        let session = Session::open(options, identity, Arc::clone(&shared), commanded, queue).await?;
        tokio::spawn(session.run());
        Ok((Arc::new(Self { shared, commands, data }), receiver))
    }
}

impl Drop for MeshConnection {
    fn drop(&mut self) {
        self.shared.events.close();
        self.shared.desired.close();
    }
}

#[async_trait]
impl MediaTransport for MeshConnection {
    /// Resolves when the track is negotiated and media can flow; for a track that has no section yet, that is after the
    /// next offer.
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

    /// Does nothing: a member can't be asked for less.
    fn subscribe(&self, _: &TrackSid, _: Subscription) {}

    /// At most one request per track every 500 ms is sent; others are left out, so ask again while it is needed.
    fn request_key_frame(&self, sid: &TrackSid) {
        self.shared.remote.request_key_frame(sid);
    }

    /// Packets wait until the connection is up. Those that are for others only are left out.
    fn send_data(&self, packet: DataPacket) -> Result<(), TransportError> {
        data::check(&packet)?;
        if self.shared.desired.is_closed() {
            return Err(TransportError::Closed);
        }
        self.data.try_send(packet).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => TransportError::Congested,
            mpsc::error::TrySendError::Closed(_) => TransportError::Closed,
        })
    }

    async fn close(&self) {
        // The session may be waiting for a reader that has stopped reading.
        self.shared.events.close();
        self.shared.desired.close();
        if tokio::time::timeout(CLOSE_TIMEOUT, self.shared.ended.cancelled()).await.is_err() {
            tracing::warn!("a mesh connection did not close in time");
        }
    }
}

impl MeshTransport for MeshConnection {
    fn negotiate(&self, command: Negotiate) {
        if self.commands.try_send(command).is_err() {
            tracing::warn!("a mesh connection is closed or stuck; a command of its signalling was dropped");
        }
    }
}

/// What the handle and its session share.
#[derive(Debug)]
struct Shared {
    events: Arc<EventSink>,
    desired: Desired,
    remote: RemoteTracks,
    /// Cancelled after the last event.
    ended: CancellationToken,
}

impl Shared {
    /// Nothing follows.
    fn end(&self) {
        self.desired.end();
        self.remote.retain(|_| false);
        self.events.last(TransportEvent::Disconnected(DisconnectReason::Closed));
        self.ended.cancel();
    }
}
