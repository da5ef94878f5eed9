//! How a call finds, enters and connects to SFU rooms: the seam that tests and other transports use.

use std::{fmt, sync::Arc, time::Duration};

use async_trait::async_trait;
use tokio::sync::mpsc;

use crate::{
    foci::SfuAccess,
    machine::{AccessWanted, ConnectFailure, ConnectFailureKind},
    matrix::{DelayId, MatrixPort, RequestError, ServerSupport},
    member::{Member, ParticipantIdentity},
    transport::{LiveKitFocus, MediaTransport, MeshTransport, NamedBy, TransportEvent},
};

/// A connected transport and what it tells.
pub type Connected = (Arc<dyn MediaTransport>, mpsc::Receiver<TransportEvent>);

/// A connection to a mesh peer and what it tells.
pub type PeerOpened = (Arc<dyn MeshTransport>, mpsc::Receiver<TransportEvent>);

/// How a call finds, enters and connects to SFU rooms, and connects to mesh peers.
#[async_trait]
pub trait Connector: Send + Sync + fmt::Debug {
    /// The foci that we may publish to, best first; at least one.
    async fn discover(
        &self,
        port: &dyn MatrixPort,
        support: &ServerSupport,
        members: &[Member],
    ) -> Result<Vec<(LiveKitFocus, NamedBy)>, ConnectFailure>;

    /// Gets a token for the call's room at a focus.
    async fn access(&self, port: &dyn MatrixPort, wanted: &AccessWanted)
    -> Result<SfuAccess, ConnectFailure>;

    /// Connects with a token. Media comes up in the background.
    async fn connect(&self, access: &SfuAccess) -> Result<Connected, ConnectFailure>;

    /// Opens a connection to a mesh peer, whose events name it `identity`. A connector of SFUs alone need not.
    async fn open_peer(
        &self,
        port: &dyn MatrixPort,
        identity: &ParticipantIdentity,
    ) -> Result<PeerOpened, ConnectFailure> {
        let _ = (port, identity);
        Err(ConnectFailure::new(ConnectFailureKind::PeerUnreachable, "this connector reaches no mesh peers"))
    }

    /// Asks the issuer of a token to keep our delayed leave while its participant is on the SFU.
    async fn delegate_leave(
        &self,
        port: &dyn MatrixPort,
        access: &SfuAccess,
        delay_id: &DelayId,
        delay: Duration,
    ) -> Result<(), RequestError>;
}
