//! The tasks that read and write the data channels of a connection.

use std::sync::{Arc, PoisonError};

use tokio::sync::{mpsc, watch};

use super::{Shared, resumption::Sent};
use crate::transport::{
    DataPacket, Reliability, TransportError, TransportEvent,
    rtc::{
        data::{LOSSY, RELIABLE, decode, encode},
        engine::{Channel, ChannelEvent, Peer},
    },
};

/// Packets of the application that may wait for the connection.
pub(super) const QUEUE: usize = 64;

/// The packets that the application sends. Locked by the writer of the present connection.
#[derive(Debug)]
pub(super) struct Outbound {
    queue: mpsc::Receiver<DataPacket>,
    sent: Sent,
}

impl Outbound {
    pub(super) fn new(queue: mpsc::Receiver<DataPacket>) -> Self {
        Self { queue, sent: Sent::default() }
    }
}

/// The channels that we opened.
pub(super) struct OwnChannels {
    reliable: Channel,
    lossy: Channel,
}

impl OwnChannels {
    /// Opens both; they are on the wire after the next offer.
    pub(super) async fn open(peer: &Peer) -> Result<Self, TransportError> {
        let reliable = peer.open_channel(RELIABLE, true).await?;
        let lossy = peer.open_channel(LOSSY, false).await?;
        Ok(Self { reliable, lossy })
    }

    /// Serves them until the connection ends. `resumed` names the last reliable packet that the SFU got before an
    /// interruption.
    pub(super) async fn serve(self, shared: Arc<Shared>, resumed: mpsc::Receiver<u32>) {
        let (reliable_opened, reliable_open) = watch::channel(false);
        let (lossy_opened, lossy_open) = watch::channel(false);
        tokio::join!(
            read(self.reliable.clone(), Reliability::Reliable, Arc::clone(&shared), reliable_opened),
            read(self.lossy.clone(), Reliability::Lossy, Arc::clone(&shared), lossy_opened),
            self.write(&shared, [reliable_open, lossy_open], resumed),
        );
    }

    async fn write(&self, shared: &Shared, opened: [watch::Receiver<bool>; 2], resumed: mpsc::Receiver<u32>) {
        for mut opened in opened {
            if opened.wait_for(|opened| *opened).await.is_err() {
                return;
            }
        }
        if let Err(error) = self.write_all(shared, resumed).await {
            tracing::debug!(%error, "the data channels are closed");
        }
    }

    async fn write_all(
        &self,
        shared: &Shared,
        mut resumed: mpsc::Receiver<u32>,
    ) -> Result<(), TransportError> {
        let mut outbound = shared.outbound.lock().await;
        // A new connection numbers from the start.
        outbound.sent = Sent::default();
        loop {
            tokio::select! {
                last = resumed.recv() => {
                    for packet in outbound.sent.after(last.ok_or(TransportError::Closed)?) {
                        self.reliable.send(&packet).await?;
                    }
                }
                packet = outbound.queue.recv() => {
                    let packet = packet.ok_or(TransportError::Closed)?;
                    match packet.reliability {
                        Reliability::Reliable => {
                            let bytes = outbound.sent.encode(&packet);
                            self.reliable.send(&bytes).await?;
                        }
                        Reliability::Lossy => self.lossy.send_or_drop(&encode(&packet, 0)).await,
                    }
                }
            }
        }
    }
}

/// Reads a channel that the SFU opened.
pub(super) async fn read_theirs(channel: Channel, shared: Arc<Shared>) {
    let label = channel.label().await;
    let reliability = if label == RELIABLE { Reliability::Reliable } else { Reliability::Lossy };
    // Others, such as data tracks, are read too, so that they do not stop the rest, but nothing in them is for us.
    let (opened, _) = watch::channel(false);
    if label == RELIABLE || label == LOSSY {
        read(channel, reliability, shared, opened).await;
    } else {
        while channel.next().await.is_some() {}
    }
}

async fn read(channel: Channel, reliability: Reliability, shared: Arc<Shared>, opened: watch::Sender<bool>) {
    while let Some(event) = channel.next().await {
        let message = match event {
            ChannelEvent::Open => {
                opened.send_replace(true);
                continue;
            }
            ChannelEvent::Message(message) => message,
        };
        let Some(received) = decode(&message) else { continue };
        let reliable = reliability == Reliability::Reliable;
        if reliable && !shared.sequences.lock().unwrap_or_else(PoisonError::into_inner).admit(&received) {
            continue;
        }
        let event = TransportEvent::Data { identity: received.identity, reliability, body: received.body };
        if reliable {
            shared.events.send(event).await;
        } else {
            shared.events.offer(event);
        }
    }
}
