//! A data channel.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use webrtc::data_channel::{DataChannel, DataChannelEvent};

use super::media;
use crate::transport::TransportError;

/// A data channel.
#[derive(Clone)]
pub(in crate::transport) struct Channel(Arc<dyn DataChannel>);

/// What happens on a data channel.
pub(in crate::transport) enum ChannelEvent {
    /// Messages can be sent.
    Open,
    /// A message arrived.
    Message(Bytes),
}

impl Channel {
    pub(super) fn new(channel: Arc<dyn DataChannel>) -> Self {
        Self(channel)
    }

    /// The label, and the SCTP stream if it is known.
    pub(in crate::transport) async fn label(&self) -> String {
        self.0.label().await.unwrap_or_default()
    }

    /// What happens next; `None` when the channel is closed. Somebody must always read: the engine reads nothing more
    /// from the network, media included, while messages wait here.
    pub(in crate::transport) async fn next(&self) -> Option<ChannelEvent> {
        loop {
            match self.0.poll().await? {
                DataChannelEvent::OnOpen => return Some(ChannelEvent::Open),
                DataChannelEvent::OnMessage(message) => {
                    return Some(ChannelEvent::Message(message.data.freeze()));
                }
                DataChannelEvent::OnClose => return None,
                _ => {}
            }
        }
    }

    /// Sends a message; waits while the channel's buffer is full.
    ///
    /// # Errors
    /// [`TransportError::Media`] if the channel is closed.
    pub(in crate::transport) async fn send(&self, message: &[u8]) -> Result<(), TransportError> {
        self.0.send(BytesMut::from(message)).await.map_err(media)
    }

    /// Sends a message, or drops it if the channel's buffer is full.
    pub(in crate::transport) async fn send_or_drop(&self, message: &[u8]) {
        if let Err(error) = self.0.try_send(BytesMut::from(message)).await {
            tracing::debug!(%error, "a data message was dropped");
        }
    }
}
