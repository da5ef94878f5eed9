//! One peer connection to a mesh peer, over the WebRTC engine.

use std::sync::Arc;

use tokio::sync::mpsc;

use crate::{
    member::ParticipantIdentity,
    transport::{
        MeshTransport, TransportError, TransportEvent,
        rtc::{Bind, IceServer},
    },
};

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
    /// Which addresses a TURN server may have that is reached over TCP or TLS.
    pub addresses: crate::addresses::AddressRule,
}

/// One peer connection to a mesh peer.
#[derive(Debug)]
pub struct MeshConnection {}

impl MeshConnection {
    /// Opens a connection to a member; its events name the member `identity`. Nothing is sent before
    /// [`Negotiate::Offer`](super::Negotiate::Offer) or [`Negotiate::Answer`](super::Negotiate::Answer).
    ///
    /// # Errors
    /// [`TransportError::Media`] if no local address can be bound.
    pub async fn open(
        options: MeshOptions,
        identity: ParticipantIdentity,
    ) -> Result<(Arc<dyn MeshTransport>, mpsc::Receiver<TransportEvent>), TransportError> {
        let _ = (options, identity);
        Err(TransportError::Closed)
    }
}
