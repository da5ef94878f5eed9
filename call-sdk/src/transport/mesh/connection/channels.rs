//! The data channels of a mesh connection: `_reliable` and `_lossy`, which the caller opens.

use std::sync::Arc;

use tokio::sync::{mpsc, watch};

use super::Shared;
use crate::{
    identity::ParticipantIdentity,
    transport::{
        DataPacket, Reliability, TransportError, TransportEvent,
        rtc::{
            data::{LOSSY, RELIABLE, decode, encode},
            engine::{Channel, ChannelEvent, Peer},
        },
    },
};

/// Packets of the application that may wait for the connection.
pub(super) const QUEUE: usize = 64;
/// Data channels that the other side may open.
pub(super) const MOST_CHANNELS: usize = 8;

/// Both channels.
pub(super) struct Channels {
    reliable: Channel,
    lossy: Channel,
}

impl Channels {
    /// Opens both; they are on the wire after the next offer.
    pub(super) async fn open(peer: &Peer) -> Result<Self, TransportError> {
        Ok(Self {
            reliable: peer.open_channel(RELIABLE, true).await?,
            lossy: peer.open_channel(LOSSY, false).await?,
        })
    }

    /// Reads both until the connection ends, and sends what comes from `queue` once they are open.
    pub(super) async fn serve(
        self,
        shared: Arc<Shared>,
        identity: ParticipantIdentity,
        queue: mpsc::Receiver<DataPacket>,
    ) {
        let (reliable_opened, mut reliable_open) = watch::channel(false);
        let (lossy_opened, mut lossy_open) = watch::channel(false);
        let writing = async {
            for open in [&mut reliable_open, &mut lossy_open] {
                if open.wait_for(|open| *open).await.is_err() {
                    return;
                }
            }
            write(&self.reliable, &self.lossy, &identity, queue).await;
        };
        tokio::join!(
            read(&self.reliable, Reliability::Reliable, &shared, &identity, Some(reliable_opened)),
            read(&self.lossy, Reliability::Lossy, &shared, &identity, Some(lossy_opened)),
            writing,
        );
    }
}

/// Channels that the other side has opened, until both are there.
#[derive(Default)]
pub(super) struct Theirs {
    reliable: Option<Channel>,
    lossy: Option<Channel>,
    pub(super) count: usize,
}

impl Theirs {
    /// Adds a channel that is open. Returns the reliable and the lossy one as soon as both are there.
    pub(super) async fn add(&mut self, channel: Channel) -> Option<(Channel, Channel)> {
        let place = match channel.label().await.as_str() {
            RELIABLE => &mut self.reliable,
            LOSSY => &mut self.lossy,
            _ => return None,
        };
        place.get_or_insert(channel);
        Some((self.reliable.clone()?, self.lossy.clone()?))
    }
}

/// Reads a channel that the other side opened, to its end.
pub(super) async fn read_theirs(channel: Channel, shared: Arc<Shared>, identity: ParticipantIdentity) {
    match channel.label().await.as_str() {
        RELIABLE => read(&channel, Reliability::Reliable, &shared, &identity, None).await,
        LOSSY => read(&channel, Reliability::Lossy, &shared, &identity, None).await,
        // Others are read too, so that they don't stop the rest.
        _ => while channel.next().await.is_some() {},
    }
}

/// Sends what comes from `queue`, until the connection ends.
pub(super) async fn write(
    reliable: &Channel,
    lossy: &Channel,
    identity: &ParticipantIdentity,
    mut queue: mpsc::Receiver<DataPacket>,
) {
    while let Some(packet) = queue.recv().await {
        if !packet.destinations.is_empty() && !packet.destinations.contains(identity) {
            continue;
        }
        match packet.reliability {
            Reliability::Reliable => {
                if let Err(error) = reliable.send(&encode(&packet, 0)).await {
                    tracing::debug!(%error, "the data channels are closed");
                    return;
                }
            }
            Reliability::Lossy => lossy.send_or_drop(&encode(&packet, 0)).await,
        }
    }
}

async fn read(
    channel: &Channel,
    reliability: Reliability,
    shared: &Shared,
    identity: &ParticipantIdentity,
    opened: Option<watch::Sender<bool>>,
) {
    while let Some(event) = channel.next().await {
        let message = match event {
            ChannelEvent::Open => {
                if let Some(opened) = &opened {
                    opened.send_replace(true);
                }
                continue;
            }
            ChannelEvent::Message(message) => message,
        };
        let Some(received) = decode(&message) else { continue };
        // Whatever the packet says, it comes from the member at the other end.
        let event = TransportEvent::Data { identity: identity.clone(), reliability, body: received.body };
        match reliability {
            Reliability::Reliable => {
                shared.events.send(event).await;
            }
            Reliability::Lossy => shared.events.offer(event),
        }
    }
}
