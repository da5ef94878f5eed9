//! A local track: from the application's frames to RTP.
#![allow(clippy::disallowed_methods, reason = "the tasks of the shell, which owns the clock")]

use std::{
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};

use super::events::EventSink;
use crate::{
    media::TrackSpec,
    transport::{
        LocalTrackId, Outlet, TransportError, TransportEvent, WireFrame,
        rtc::{
            FrameLayer, Packetiser,
            engine::{OutgoingTrack, Report},
            pace::Throttle,
        },
    },
};

/// Most simulcast layers: `q`, `h` and `f`.
pub(in crate::transport) const MOST_LAYERS: usize = 3;
/// Frames of one track that may wait for its writer: half a second of video in three layers.
const FRAMES: usize = 48;
/// Key frame requests of one track are passed on at most this often: an encoder that is asked by fifty receivers at
/// once must not make fifty key frames.
const KEY_FRAME_REQUESTS: Duration = Duration::from_millis(200);

/// One local track, from its publication to its end: it outlives the connections that carry it.
#[derive(Debug)]
pub(in crate::transport) struct LocalTrack {
    pub(in crate::transport) id: LocalTrackId,
    pub(in crate::transport) spec: TrackSpec,
    pub(in crate::transport) encrypted: bool,
    /// Our name for it in signalling and SDP.
    pub(in crate::transport) cid: String,
    muted: AtomicBool,
    dropped: AtomicU64,
    /// A frame was lost here, so receivers cannot decode the following ones.
    broken: AtomicBool,
    /// Towards the writer of the present connection, while there is one.
    queue: RwLock<Option<mpsc::Sender<WireFrame>>>,
    /// One per layer, with the number of its last frame. Locked by the writer of the present connection; the counters
    /// go on in the next one.
    packetisers: tokio::sync::Mutex<Vec<(Packetiser, u16)>>,
    /// Awaited by the publisher until the track is live.
    reply: Mutex<Option<oneshot::Sender<Result<(), TransportError>>>>,
}

impl LocalTrack {
    /// A track, and the answer to its publication.
    pub(in crate::transport) fn new(
        id: LocalTrackId,
        spec: TrackSpec,
        encrypted: bool,
    ) -> (Arc<Self>, oneshot::Receiver<Result<(), TransportError>>) {
        let (reply, answer) = oneshot::channel();
        let track = Self {
            id,
            encrypted,
            cid: format!("{:032x}", rand::random::<u128>()),
            muted: AtomicBool::new(spec.muted),
            dropped: AtomicU64::new(0),
            broken: AtomicBool::new(false),
            queue: RwLock::new(None),
            packetisers: tokio::sync::Mutex::new(
                (0..spec.layers.len().max(1))
                    .map(|_| (Packetiser::new(spec.codec, rand::random(), rand::random()), rand::random()))
                    .collect(),
            ),
            reply: Mutex::new(Some(reply)),
            spec,
        };
        (Arc::new(track), answer)
    }

    /// Answers the publication, the first time. Returns whether anybody waited for it.
    pub(in crate::transport) fn answer(&self, result: Result<(), TransportError>) -> bool {
        let reply = self.reply.lock().unwrap_or_else(PoisonError::into_inner).take();
        reply.is_some_and(|reply| reply.send(result).is_ok())
    }

    /// Frames go to the writer at the other end of the returned queue from now on.
    pub(in crate::transport) fn attach(&self) -> mpsc::Receiver<WireFrame> {
        let (queue, frames) = mpsc::channel(FRAMES);
        *self.queue.write().unwrap_or_else(PoisonError::into_inner) = Some(queue);
        frames
    }

    /// Frames are dropped from now on.
    pub(in crate::transport) fn detach(&self) {
        *self.queue.write().unwrap_or_else(PoisonError::into_inner) = None;
    }

    pub(in crate::transport) fn set_muted(&self, muted: bool) {
        self.muted.store(muted, Ordering::Relaxed);
    }

    pub(in crate::transport) fn muted(&self) -> bool {
        self.muted.load(Ordering::Relaxed)
    }

    fn drop_frame(&self) {
        self.dropped.fetch_add(1, Ordering::Relaxed);
    }
}

impl Outlet for LocalTrack {
    fn send(&self, frame: &WireFrame) {
        if self.muted() {
            return self.drop_frame();
        }
        let queued = match &*self.queue.read().unwrap_or_else(PoisonError::into_inner) {
            Some(queue) => queue.try_send(frame.clone()).is_ok(),
            None => false,
        };
        if !queued {
            self.broken.store(true, Ordering::Relaxed);
            self.drop_frame();
        }
    }

    fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }
}

/// What becomes of a frame on a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::transport) enum Selected {
    /// It is sent in this stream of packets.
    Send(u8),
    /// It is left out on purpose.
    Leave,
    /// It is left out, and a key frame of its layer is needed.
    Wait,
}

/// Sends the frames of `track` that `select` picks until the track or its connection ends.
pub(in crate::transport) async fn write(
    track: Arc<LocalTrack>,
    mut frames: mpsc::Receiver<WireFrame>,
    outgoing: OutgoingTrack,
    events: Arc<EventSink>,
    mut select: impl FnMut(std::time::Instant, &WireFrame) -> Selected + Send,
) {
    let mut packetisers = track.packetisers.lock().await;
    let video = !track.spec.codec.is_audio();
    let mut requests = Throttle::new(KEY_FRAME_REQUESTS);
    let mut packets = Vec::new();
    while let Some(mut frame) = frames.recv().await {
        let now = Instant::now().into_std();
        let stream = match select(now, &frame) {
            Selected::Send(stream) => stream,
            Selected::Leave => continue,
            Selected::Wait => {
                events.offer(TransportEvent::KeyFrameRequested { track: track.id, layer: frame.layer });
                continue;
            }
        };
        if video && track.broken.load(Ordering::Relaxed) && requests.allow(now) {
            track.broken.store(false, Ordering::Relaxed);
            events.offer(TransportEvent::KeyFrameRequested { track: track.id, layer: frame.layer });
        }
        frame.layer = stream;
        let Some((packetiser, number)) = packetisers.get_mut(usize::from(stream)) else {
            track.drop_frame();
            continue;
        };
        if let Err(error) =
            packetiser.packetise(&frame.payload, FrameLayer::single(frame.key_frame), &mut packets)
        {
            tracing::debug!(%error, "a frame was not sent");
            track.drop_frame();
            continue;
        }
        *number = number.wrapping_add(1);
        if let Err(error) = outgoing.write(&frame, *number, &mut packets).await {
            tracing::debug!(%error, "the connection ended while a frame was sent");
            track.drop_frame();
            return;
        }
    }
}

/// Every frame in the stream of its layer.
pub(in crate::transport) fn every_layer(_: std::time::Instant, frame: &WireFrame) -> Selected {
    Selected::Send(frame.layer)
}

/// Passes the receivers' key frame requests on, until the connection or the track ends. `layer` says which layer a
/// stream of packets carries.
pub(in crate::transport) async fn watch_reports(
    outgoing: OutgoingTrack,
    track: LocalTrackId,
    events: Arc<EventSink>,
    layer: impl Fn(u8) -> u8 + Send,
) {
    let mut requests: [Throttle; MOST_LAYERS] = std::array::from_fn(|_| Throttle::new(KEY_FRAME_REQUESTS));
    while let Some(Report::KeyFrameWanted { layer: stream }) = outgoing.next_report().await {
        let layer = layer(stream);
        let Some(throttle) = requests.get_mut(usize::from(layer)) else { continue };
        if throttle.allow(Instant::now().into_std()) {
            events.offer(TransportEvent::KeyFrameRequested { track, layer });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame() -> WireFrame {
        WireFrame { payload: vec![1].into(), rtp_timestamp: 0, layer: 0, key_frame: true, audio_level: None }
    }

    #[test]
    fn full_queue_drops_and_counts() {
        let (track, _answer) = LocalTrack::new(LocalTrackId(1), TrackSpec::microphone(), false);
        track.send(&frame());
        assert_eq!(track.dropped(), 1, "no connection yet");
        let _frames = track.attach();
        for _ in 0..FRAMES + 2 {
            track.send(&frame());
        }
        assert_eq!(track.dropped(), 3);
    }

    #[test]
    fn muted_track_drops() {
        let spec = TrackSpec { muted: true, ..TrackSpec::microphone() };
        let (track, _answer) = LocalTrack::new(LocalTrackId(1), spec, false);
        let mut frames = track.attach();
        track.send(&frame());
        assert!(frames.try_recv().is_err());
        track.set_muted(false);
        track.send(&frame());
        assert!(frames.try_recv().is_ok());
        assert_eq!(track.dropped(), 1);
    }

    #[test]
    fn detach_ends_the_writer() {
        let (track, _answer) = LocalTrack::new(LocalTrackId(1), TrackSpec::microphone(), false);
        let mut frames = track.attach();
        track.detach();
        assert_eq!(frames.try_recv(), Err(mpsc::error::TryRecvError::Disconnected));
    }
}
