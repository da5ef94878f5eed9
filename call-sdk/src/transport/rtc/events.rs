//! The queue of events towards the application.

use std::sync::{PoisonError, RwLock};

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::transport::TransportEvent;

/// Events that may wait for the application.
const EVENTS: usize = 1024;

/// The sending end of the event queue.
#[derive(Debug)]
pub(in crate::transport) struct EventSink {
    /// Empty after the last event, so that the reader finds the end.
    queue: RwLock<Option<mpsc::Sender<TransportEvent>>>,
    /// Set when the transport closes: nobody waits for the reader any more.
    closing: CancellationToken,
}

impl EventSink {
    pub(in crate::transport) fn new() -> (Self, mpsc::Receiver<TransportEvent>) {
        let (queue, receiver) = mpsc::channel(EVENTS);
        (Self { queue: RwLock::new(Some(queue)), closing: CancellationToken::new() }, receiver)
    }

    /// Queues an event, waiting for room. Returns whether anybody can still read it.
    pub(in crate::transport) async fn send(&self, event: TransportEvent) -> bool {
        let Some(queue) = self.sender() else { return false };
        tokio::select! {
            biased;
            sent = queue.send(event) => sent.is_ok(),
            () = self.closing.cancelled() => false,
        }
    }

    /// Queues an event that may be lost, such as a request that its sender repeats.
    pub(in crate::transport) fn offer(&self, event: TransportEvent) {
        if self.sender().is_some_and(|queue| queue.try_send(event).is_err()) {
            tracing::debug!("the event queue of a transport is full; an event was dropped");
        }
    }

    /// Queues the last event if there is room, and ends the queue; nobody waits for the reader any more.
    pub(in crate::transport) fn last(&self, event: TransportEvent) {
        self.closing.cancel();
        let queue = self.queue.write().unwrap_or_else(PoisonError::into_inner).take();
        if queue.is_some_and(|queue| queue.try_send(event).is_err()) {
            tracing::debug!("nobody read the last event of a transport");
        }
    }

    /// Stops waiting for the reader.
    pub(in crate::transport) fn close(&self) {
        self.closing.cancel();
    }

    /// Resolves when nobody will read any more.
    pub(in crate::transport) async fn abandoned(&self) {
        if let Some(queue) = self.sender() {
            queue.closed().await;
        }
    }

    fn sender(&self) -> Option<mpsc::Sender<TransportEvent>> {
        self.queue.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::DisconnectReason;

    #[tokio::test]
    async fn last_event_ends_the_queue() {
        let (sink, mut queue) = EventSink::new();
        sink.last(TransportEvent::Disconnected(DisconnectReason::Closed));
        sink.offer(TransportEvent::Reconnecting);
        assert!(!sink.send(TransportEvent::Reconnecting).await);
        assert_eq!(queue.recv().await, Some(TransportEvent::Disconnected(DisconnectReason::Closed)));
        assert_eq!(queue.recv().await, None);
    }

    #[tokio::test]
    async fn close_frees_waiting_senders() {
        let (sink, _queue) = EventSink::new();
        for _ in 0..EVENTS {
            assert!(sink.send(TransportEvent::Reconnecting).await);
        }
        sink.offer(TransportEvent::Reconnecting);
        let (sent, ()) = tokio::join!(sink.send(TransportEvent::Reconnected), async { sink.close() });
        assert!(!sent);
    }
}
