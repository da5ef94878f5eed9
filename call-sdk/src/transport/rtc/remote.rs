//! A remote track: from RTP to whole frames at the receiver that is attached to it.
#![allow(clippy::disallowed_methods, reason = "the tasks of the shell, which owns the clock")]

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock},
    time::Duration,
};

use bytes::Bytes;
use tokio::{sync::Notify, time::Instant};

use crate::{
    media::Codec,
    transport::{
        FrameReceiver, ReceivedFrame, TrackSid,
        rtc::{
            Reassembler,
            engine::{Arrival, IncomingTrack},
            pace::Throttle,
        },
    },
};

/// More remote tracks than any call has.
pub(in crate::transport) const MOST_REMOTE_TRACKS: usize = 4096;
/// The most a track asks for key frames; the SFU and the sender throttle at the same pace.
const KEY_FRAME_REQUESTS: Duration = Duration::from_millis(500);

/// The remote tracks and their receivers, across connections.
#[derive(Default)]
pub(in crate::transport) struct RemoteTracks(Mutex<State>);

#[derive(Default)]
struct State {
    tracks: HashMap<TrackSid, Arc<RemoteTrack>>,
    /// What the SFU appends to frames of its own (`sif_trailer`).
    trailer: Bytes,
}

/// One remote track as its reader and the transport's handle share it.
#[derive(Default)]
pub(in crate::transport) struct RemoteTrack {
    receiver: RwLock<Option<Arc<dyn FrameReceiver>>>,
    key_frame_wanted: Notify,
}

impl RemoteTracks {
    /// Frames of `sid` go to `receiver` from now on.
    pub(in crate::transport) fn attach(&self, sid: &TrackSid, receiver: Option<Arc<dyn FrameReceiver>>) {
        let mut state = self.state();
        if let Some(receiver) = &receiver
            && !state.trailer.is_empty()
        {
            receiver.injected_trailer(&state.trailer);
        }
        if receiver.is_some() || state.tracks.contains_key(sid) {
            // Under the lock, so that no change of the trailer is missed.
            if let Some(track) = state.track(sid) {
                *track.receiver.write().unwrap_or_else(PoisonError::into_inner) = receiver;
            }
        }
    }

    /// Tells every receiver what the SFU appends to frames of its own.
    pub(in crate::transport) fn set_trailer(&self, trailer: Bytes) {
        let mut state = self.state();
        if state.trailer == trailer {
            return;
        }
        for track in state.tracks.values() {
            if let Some(receiver) = track.receiver() {
                receiver.injected_trailer(&trailer);
            }
        }
        state.trailer = trailer;
    }

    /// Asks for a key frame of `sid`.
    pub(in crate::transport) fn request_key_frame(&self, sid: &TrackSid) {
        let track = self.state().tracks.get(sid).cloned();
        if let Some(track) = track {
            track.key_frame_wanted.notify_one();
        }
    }

    /// Forgets the tracks that `exists` denies.
    pub(in crate::transport) fn retain(&self, exists: impl Fn(&TrackSid) -> bool) {
        self.state().tracks.retain(|sid, _| exists(sid));
    }

    /// The track for its reader; `None` if there are too many.
    pub(in crate::transport) fn track(&self, sid: &TrackSid) -> Option<Arc<RemoteTrack>> {
        self.state().track(sid)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn track(&mut self, sid: &TrackSid) -> Option<Arc<RemoteTrack>> {
        if let Some(track) = self.tracks.get(sid) {
            return Some(Arc::clone(track));
        }
        if self.tracks.len() >= MOST_REMOTE_TRACKS {
            return None;
        }
        let track = Arc::<RemoteTrack>::default();
        self.tracks.insert(sid.clone(), Arc::clone(&track));
        Some(track)
    }
}

impl RemoteTrack {
    fn receiver(&self) -> Option<Arc<dyn FrameReceiver>> {
        self.receiver.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl fmt::Debug for RemoteTracks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RemoteTracks").field("tracks", &self.state().tracks.len()).finish_non_exhaustive()
    }
}

/// Reads one track to its end.
///
/// It never waits for the application: the engine drops packets silently as soon as its own short queue is full.
pub(in crate::transport) async fn read(incoming: IncomingTrack, track: Arc<RemoteTrack>) {
    let mut requests = Throttle::new(KEY_FRAME_REQUESTS);
    let mut stream: Option<Stream> = None;
    let mut payload = Vec::new();
    loop {
        let deadline = stream.as_ref().and_then(|stream| stream.frames.deadline());
        let mut key_frame_wanted = false;
        let arrival = tokio::select! {
            arrival = incoming.next() => match arrival {
                None => return,
                arrival => arrival,
            },
            () = track.key_frame_wanted.notified() => {
                key_frame_wanted = true;
                None
            }
            () = at(deadline) => None,
        };
        let now = Instant::now().into_std();
        match arrival {
            Some(Arrival::Packet { ssrc, payload_type, packet }) => {
                if !stream.as_ref().is_some_and(|s| s.is_of(ssrc, payload_type)) {
                    stream = Stream::find(&incoming, ssrc, payload_type).await;
                }
                if let Some(stream) = &mut stream {
                    stream.frames.push(now, packet);
                }
            }
            Some(Arrival::SenderReport { ssrc, rtp_timestamp, ntp }) => {
                if stream.as_ref().is_some_and(|stream| stream.ssrc == ssrc)
                    && let Some(receiver) = track.receiver()
                {
                    receiver.sender_report(rtp_timestamp, ntp);
                }
                continue;
            }
            None => {}
        }
        let Some(stream) = &mut stream else { continue };
        while let Some(frame) = stream.frames.next_frame(now, &mut payload) {
            if let Some(receiver) = track.receiver() {
                receiver.receive(ReceivedFrame {
                    now,
                    codec: stream.codec,
                    rtp_timestamp: frame.rtp_timestamp,
                    payload: &payload,
                });
            }
        }
        key_frame_wanted |= stream.frames.take_loss();
        if key_frame_wanted && !stream.codec.is_audio() && requests.allow(now) {
            incoming.request_key_frame(stream.ssrc).await;
        }
    }
}

/// One SSRC of a track; a track that is subscribed to again comes under another.
struct Stream {
    ssrc: u32,
    payload_type: u8,
    codec: Codec,
    frames: Reassembler,
}

impl Stream {
    async fn find(incoming: &IncomingTrack, ssrc: u32, payload_type: u8) -> Option<Self> {
        let codec = incoming.codec(ssrc).await?;
        Some(Self { ssrc, payload_type, codec, frames: Reassembler::new(codec) })
    }

    fn is_of(&self, ssrc: u32, payload_type: u8) -> bool {
        self.ssrc == ssrc && self.payload_type == payload_type
    }
}

async fn at(deadline: Option<std::time::Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Default)]
    struct Trailers(Mutex<Vec<Vec<u8>>>);

    impl FrameReceiver for Trailers {
        fn receive(&self, _: ReceivedFrame<'_>) {}

        fn sender_report(&self, _: u32, _: u64) {}

        fn injected_trailer(&self, trailer: &[u8]) {
            self.0.lock().unwrap().push(trailer.to_vec());
        }
    }

    #[test]
    fn trailer_reaches_receivers_on_attach_and_on_change() {
        let tracks = RemoteTracks::default();
        let sid = TrackSid("TR_a".into());
        let early = Arc::new(Trailers::default());
        tracks.attach(&sid, Some(Arc::clone(&early) as _));
        tracks.set_trailer(Bytes::from_static(b"one"));
        let late = Arc::new(Trailers::default());
        tracks.attach(&TrackSid("TR_b".into()), Some(Arc::clone(&late) as _));
        tracks.set_trailer(Bytes::from_static(b"one"));
        tracks.set_trailer(Bytes::from_static(b"two"));
        for receiver in [early, late] {
            assert_eq!(*receiver.0.lock().unwrap(), [b"one".to_vec(), b"two".to_vec()]);
        }
    }

    #[test]
    fn tracks_are_bounded() {
        let tracks = RemoteTracks::default();
        for index in 0..=MOST_REMOTE_TRACKS {
            tracks.attach(&TrackSid(format!("TR_{index}")), Some(Arc::new(Trailers::default())));
        }
        assert_eq!(tracks.state().tracks.len(), MOST_REMOTE_TRACKS);
        tracks.attach(&TrackSid("TR_new".into()), None);
        tracks.retain(|sid| sid.0 == "TR_1");
        assert_eq!(tracks.state().tracks.len(), 1);
    }
}
