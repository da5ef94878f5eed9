//! LiveKit SFUs: discovery, tokens and connections as a [`Connector`].

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;

use super::{
    connector::{Connected, Connector, PeerOpened},
    shell::describe,
    turn::Turn,
};
use crate::{
    foci::{
        Access, AccessRequest, DiscoveryOptions, Fault, FocusError, Purpose, ServicePolicy, SfuAccess,
        discover,
    },
    machine::{AccessWanted, ConnectFailure, ConnectFailureKind},
    matrix::{DelayId, MatrixPort, RequestError, ServerSupport},
    member::{Member, ParticipantIdentity},
    tls::{TlsError, TlsOptions, client_config},
    transport::{
        LiveKitFocus, NamedBy, TransportError,
        livekit::{Bind, ConnectOptions, IceServer, LiveKitTransport},
        mesh::{MeshConnection, MeshOptions},
    },
};

/// How LiveKit SFUs are found and connected to.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct LiveKitOptions {
    /// The focus to publish to, and foci for homeservers that name none.
    pub discovery: DiscoveryOptions,
    /// Which services get our OpenID tokens, and which addresses are connected to.
    pub policy: ServicePolicy,
    /// The certificate authorities that are trusted.
    pub tls: TlsOptions,
    /// The local addresses that media travels from.
    pub bind: Bind,
    /// STUN and TURN servers in addition to those that the SFU names.
    pub ice_servers: Vec<IceServer>,
    /// Whether media travels through TURN servers only, so that the SFU does not learn our address.
    pub relay_only: bool,
    /// Whether mesh peers learn the addresses of our interfaces.
    pub host_candidates: bool,
}

/// Finds, enters and connects to LiveKit SFU rooms.
#[derive(Debug)]
pub struct LiveKitConnector {
    discovery: DiscoveryOptions,
    access: Access,
    tls: Arc<rustls::ClientConfig>,
    bind: Bind,
    ice_servers: Vec<IceServer>,
    relay_only: bool,
    mesh: MeshOptions,
    turn: Turn,
}

impl LiveKitConnector {
    /// A connector for one call.
    ///
    /// # Errors
    /// [`TlsError`] if no TLS configuration can be made of the options.
    pub fn new(options: LiveKitOptions) -> Result<Self, TlsError> {
        let tls = client_config(&options.tls)?;
        let access = Access::new(&tls, options.policy)?;
        let addresses = options.policy.addresses;
        let LiveKitOptions { discovery, bind, ice_servers, relay_only, host_candidates, .. } = options;
        let mut mesh = MeshOptions::default();
        mesh.bind.clone_from(&bind);
        mesh.relay_only = relay_only;
        mesh.host_candidates = host_candidates;
        mesh.tls = Some(Arc::clone(&tls));
        mesh.addresses = addresses;
        let turn = Turn::new(ice_servers.clone());
        Ok(Self { discovery, access, tls, bind, ice_servers, relay_only, mesh, turn })
    }
}

#[async_trait]
impl Connector for LiveKitConnector {
    async fn discover(
        &self,
        port: &dyn MatrixPort,
        support: &ServerSupport,
        members: &[Member],
    ) -> Result<Vec<(LiveKitFocus, NamedBy)>, ConnectFailure> {
        match discover(port, &self.discovery, support, members).await {
            Ok(found) => {
                Ok(found.candidates.into_iter().map(|found| (found.focus, found.named_by)).collect())
            }
            Err(nothing) => Err(refusal(&FocusError::NoFocus(nothing))),
        }
    }

    async fn access(
        &self,
        port: &dyn MatrixPort,
        wanted: &AccessWanted,
    ) -> Result<SfuAccess, ConnectFailure> {
        let request = AccessRequest {
            focus: wanted.focus.clone(),
            named_by: wanted.named_by.clone(),
            slot: wanted.slot.clone(),
            member_id: wanted.member_id.clone(),
            purpose: if wanted.ours { Purpose::Publish(wanted.mode) } else { Purpose::Subscribe },
        };
        self.access.get(port, &request).await.map_err(|error| refusal(&error))
    }

    async fn connect(&self, access: &SfuAccess) -> Result<Connected, ConnectFailure> {
        let mut options = ConnectOptions::new(access.url.clone(), access.jwt.0.clone());
        options.bind = self.bind.clone();
        options.tls = Some(Arc::clone(&self.tls));
        options.addresses = access.addresses;
        options.ice_servers.clone_from(&self.ice_servers);
        options.relay_only = self.relay_only;
        match LiveKitTransport::connect(options).await {
            Ok((transport, events)) => Ok((transport, events)),
            Err(error) => {
                let kind = match &error {
                    TransportError::Unauthorised { .. } => ConnectFailureKind::SfuRefused,
                    TransportError::Capacity { .. } => ConnectFailureKind::SfuFull,
                    // The authorisation service creates the room: the next token does.
                    _ => ConnectFailureKind::SfuUnreachable,
                };
                Err(ConnectFailure::new(kind, describe(&error)))
            }
        }
    }

    async fn open_peer(
        &self,
        port: &dyn MatrixPort,
        identity: &ParticipantIdentity,
    ) -> Result<PeerOpened, ConnectFailure> {
        let mut options = self.mesh.clone();
        options.ice_servers = self.turn.servers(port).await;
        MeshConnection::open(options, identity.clone())
            .await
            .map_err(|error| ConnectFailure::new(ConnectFailureKind::PeerUnreachable, describe(&error)))
    }

    async fn delegate_leave(
        &self,
        port: &dyn MatrixPort,
        access: &SfuAccess,
        delay_id: &DelayId,
        delay: Duration,
    ) -> Result<(), RequestError> {
        self.access.delegate(port, access, delay_id, delay).await.map_err(RequestError::from)
    }
}

fn refusal(error: &FocusError) -> ConnectFailure {
    let kind = match error.fault() {
        Fault::NoFocus => ConnectFailureKind::NoFocus,
        Fault::Policy => ConnectFailureKind::Policy,
        Fault::Homeserver | Fault::LoggedOut => ConnectFailureKind::Homeserver,
        Fault::Unreachable => ConnectFailureKind::ServiceUnreachable,
        Fault::Refused => ConnectFailureKind::TokenRefused,
    };
    let mut failure = ConnectFailure::new(kind, describe(error));
    failure.retry_after = error.retry_after();
    failure
}
