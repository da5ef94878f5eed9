//! The peer connections of a LiveKit session: two in signalling v0, one in v1.

use livekit_protocol as proto;
use tokio::sync::mpsc;

use super::ConnectOptions;
use crate::transport::{
    TransportError,
    rtc::{
        IceServer,
        engine::{EVENTS, Peer, PeerEvent},
    },
};

/// Which peer connection. In v1 the publisher is the only one and carries both directions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    /// Carries our tracks; we offer.
    Publisher,
    /// Carries everybody else's; the SFU offers.
    Subscriber,
}

impl Side {
    pub(super) fn target(self) -> proto::SignalTarget {
        match self {
            Self::Publisher => proto::SignalTarget::Publisher,
            Self::Subscriber => proto::SignalTarget::Subscriber,
        }
    }
}

/// The peer connections of one session.
pub(super) struct Peers {
    pub(super) publisher: Peer,
    subscriber: Option<Peer>,
}

/// What the peer connections report.
pub(super) type PeerEvents = mpsc::Receiver<(Side, PeerEvent)>;

impl Peers {
    /// Opens the two of v0.
    pub(super) async fn two(
        options: &ConnectOptions,
        ice_servers: Vec<IceServer>,
    ) -> Result<(Self, PeerEvents), TransportError> {
        let (events, receiver) = mpsc::channel(EVENTS);
        let network = options.network();
        let open = |side| Peer::open(&network, ice_servers.clone(), side, events.clone());
        let publisher = open(Side::Publisher).await?;
        let subscriber = Some(open(Side::Subscriber).await?);
        Ok((Self { publisher, subscriber }, receiver))
    }

    /// Opens the one of v1.
    pub(super) async fn one(options: &ConnectOptions) -> Result<(Self, PeerEvents), TransportError> {
        let (events, receiver) = mpsc::channel(EVENTS);
        let ice_servers = options.ice_servers.clone();
        let publisher = Peer::open(&options.network(), ice_servers, Side::Publisher, events).await?;
        Ok((Self { publisher, subscriber: None }, receiver))
    }

    /// Whether there is only one.
    pub(super) fn is_single(&self) -> bool {
        self.subscriber.is_none()
    }

    pub(super) fn subscriber(&mut self) -> &mut Peer {
        self.subscriber.as_mut().unwrap_or(&mut self.publisher)
    }

    /// The peer connection of a side.
    pub(super) fn side(&mut self, side: Side) -> &mut Peer {
        match side {
            Side::Publisher => &mut self.publisher,
            Side::Subscriber => self.subscriber(),
        }
    }

    fn all(&self) -> impl Iterator<Item = &Peer> {
        [Some(&self.publisher), self.subscriber.as_ref()].into_iter().flatten()
    }

    /// Replaces the ICE servers.
    pub(super) async fn set_ice_servers(
        &self,
        options: &ConnectOptions,
        ice_servers: &[IceServer],
    ) -> Result<(), TransportError> {
        let network = options.network();
        for peer in self.all() {
            peer.set_ice_servers(&network, ice_servers.to_vec()).await?;
        }
        Ok(())
    }

    /// Whether events were lost.
    pub(super) fn overflowed(&self) -> bool {
        self.all().any(Peer::overflowed)
    }

    /// The candidate pairs that were tried, at most `most`.
    pub(super) fn pairs(&self, most: usize) -> Vec<String> {
        self.all().flat_map(|peer| peer.pairs(most)).take(most).collect()
    }

    pub(super) async fn close(&self) {
        match &self.subscriber {
            Some(subscriber) => {
                tokio::join!(self.publisher.close(), subscriber.close());
            }
            None => self.publisher.close().await,
        }
    }
}
