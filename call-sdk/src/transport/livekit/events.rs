//! The queue towards the application: control events are never lost, frames are dropped when it is full.

use std::sync::{
    PoisonError, RwLock,
    atomic::{AtomicU64, Ordering},
};

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::transport::TransportEvent;

/// Places that frames may not take, so that control events seldom wait for a slow reader.
const RESERVED: usize = 64;

/// The sending end of the event queue.
#[derive(Debug)]
pub(super) struct EventSink {
    /// Empty after the last event, so that the reader finds the end.
    queue: RwLock<Option<mpsc::Sender<TransportEvent>>>,
    /// Set when the transport closes: nobody need read any more, and nobody waits for the reader.
    closing: CancellationToken,
    dropped: AtomicU64,
}

impl EventSink {
    /// A queue for `frames` frames and a reserve of control events.
    pub(super) fn new(frames: usize) -> (Self, mpsc::Receiver<TransportEvent>) {
        let (queue, receiver) = mpsc::channel(frames.max(1).saturating_add(RESERVED));
        let sink = Self {
            queue: RwLock::new(Some(queue)),
            closing: CancellationToken::new(),
            dropped: AtomicU64::new(0),
        };
        (sink, receiver)
    }

    /// Queues a frame, or drops it if the reader is behind.
    pub(super) fn frame(&self, event: TransportEvent) {
        let queue = self.queue.read().unwrap_or_else(PoisonError::into_inner);
        let queued =
            queue.as_ref().is_some_and(|queue| queue.capacity() > RESERVED && queue.try_send(event).is_ok());
        if !queued {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Queues a control event, waiting for room; says whether anybody can still read it.
    pub(super) async fn control(&self, event: TransportEvent) -> bool {
        let Some(queue) = self.sender() else { return false };
        tokio::select! {
            biased;
            sent = queue.send(event) => sent.is_ok(),
            () = self.closing.cancelled() => false,
        }
    }

    /// Queues the last event if there is room, and ends the queue; nobody waits for a reader any more.
    pub(super) fn last(&self, event: TransportEvent) {
        self.closing.cancel();
        let queue = self.queue.write().unwrap_or_else(PoisonError::into_inner).take();
        if queue.is_some_and(|queue| queue.try_send(event).is_err()) {
            tracing::debug!("nobody read the last event of a transport");
        }
    }

    /// Stops waiting for the reader.
    pub(super) fn close(&self) {
        self.closing.cancel();
    }

    /// Frames dropped so far because the reader was behind.
    pub(super) fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    /// Resolves when nobody will read any more.
    pub(super) async fn abandoned(&self) {
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
    use bytes::Bytes;

    use super::*;
    use crate::{
        media::Codec,
        member::ParticipantIdentity,
        transport::{TrackSid, WireFrame},
    };

    fn frame() -> TransportEvent {
        TransportEvent::Frame {
            identity: ParticipantIdentity("a".into()),
            sid: TrackSid("TR_a".into()),
            codec: Codec::Opus,
            frame: WireFrame { payload: Bytes::new(), rtp_timestamp: 0 },
        }
    }

    #[tokio::test]
    async fn frames_fill_their_share_and_control_events_still_pass() {
        let (sink, mut queue) = EventSink::new(3);
        for _ in 0..10 {
            sink.frame(frame());
        }
        assert_eq!(sink.dropped(), 7);
        for _ in 0..RESERVED {
            assert!(sink.control(TransportEvent::Reconnecting).await);
        }
        queue.close();
        let mut received = 0;
        while queue.recv().await.is_some() {
            received += 1;
        }
        assert_eq!(received, 3 + RESERVED);
        assert!(!sink.control(TransportEvent::Reconnected).await);
    }

    #[tokio::test]
    async fn the_queue_ends_with_the_last_event() {
        let (sink, mut queue) = EventSink::new(1);
        sink.last(TransportEvent::Disconnected { reason: String::new() });
        sink.frame(frame());
        assert!(!sink.control(TransportEvent::Reconnecting).await);
        assert!(matches!(queue.recv().await, Some(TransportEvent::Disconnected { .. })));
        assert_eq!(queue.recv().await, None);
    }

    #[tokio::test]
    async fn closing_frees_whoever_waits_for_the_reader() {
        let (sink, _queue) = EventSink::new(1);
        for _ in 0..=RESERVED {
            sink.control(TransportEvent::Reconnecting).await;
        }
        let (sent, ()) = tokio::join!(sink.control(TransportEvent::Reconnected), async { sink.close() });
        assert!(!sent);
    }
}
