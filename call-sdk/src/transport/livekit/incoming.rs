//! A remote track: from the subscriber's RTP to whole frames for the application.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, atomic::AtomicU32, atomic::Ordering},
    time::Duration,
};

use bytes::Bytes;
use rtc::rtcp::payload_feedbacks::picture_loss_indication::PictureLossIndication;
use tokio::time::Instant;
use webrtc::media_stream::track_remote::{TrackRemote, TrackRemoteEvent};

use super::{
    events::EventSink,
    pace::Throttle,
    packet::{IncomingPacket, Reassembler},
    roster::codec_of_mime,
};
use crate::{
    media::Codec,
    member::ParticipantIdentity,
    transport::{TrackSid, TransportEvent},
};

/// The most a track asks for key frames; the SFU and the sender throttle at the same pace.
const KEY_FRAME_REQUESTS: Duration = Duration::from_millis(500);

/// The remote tracks that arrive, and whose they are.
#[derive(Debug, Default)]
pub(super) struct IncomingTracks {
    /// By the SFU's word; frames of a track without an owner go nowhere.
    owners: RwLock<HashMap<TrackSid, ParticipantIdentity>>,
    tracks: Mutex<HashMap<TrackSid, Arc<IncomingTrack>>>,
    /// What the SFU appends to frames of its own.
    injected: RwLock<Bytes>,
}

impl IncomingTracks {
    /// Frames that end in `trailer` are the SFU's own from now on, and are dropped.
    ///
    /// LiveKit plays a little silence or a black picture when an encrypted track is muted or ends, which nobody
    /// could open; it marks these frames with a trailer that it told on joining (`sif_trailer`).
    pub(super) fn expect_injected(&self, trailer: Bytes) {
        *self.injected.write().unwrap_or_else(PoisonError::into_inner) = trailer;
    }

    fn is_injected(&self, frame: &[u8]) -> bool {
        let trailer = self.injected.read().unwrap_or_else(PoisonError::into_inner);
        !trailer.is_empty() && frame.ends_with(&trailer)
    }

    /// Keeps the owners in step with an event that is about to be told to the application.
    pub(super) fn note(&self, event: &TransportEvent) {
        match event {
            TransportEvent::TrackUpdated { identity, track } => {
                let mut owners = self.owners.write().unwrap_or_else(PoisonError::into_inner);
                owners.insert(track.sid.clone(), identity.clone());
            }
            TransportEvent::TrackEnded { sid, .. } => {
                self.owners.write().unwrap_or_else(PoisonError::into_inner).remove(sid);
            }
            _ => {}
        }
    }

    /// Asks for a key frame of `sid`, unless it was asked for a moment ago.
    pub(super) async fn request_key_frame(&self, sid: &TrackSid) {
        let track = self.tracks().get(sid).cloned();
        if let Some(track) = track {
            track.request_key_frame().await;
        }
    }

    /// Forgets the tracks of a connection that is gone.
    pub(super) fn clear(&self) {
        self.tracks().clear();
    }

    fn owner(&self, sid: &TrackSid) -> Option<ParticipantIdentity> {
        self.owners.read().unwrap_or_else(PoisonError::into_inner).get(sid).cloned()
    }

    fn tracks(&self) -> MutexGuard<'_, HashMap<TrackSid, Arc<IncomingTrack>>> {
        self.tracks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct IncomingTrack {
    remote: Arc<dyn TrackRemote>,
    /// Zero until the first packet.
    ssrc: AtomicU32,
    throttle: Mutex<Throttle>,
}

impl std::fmt::Debug for IncomingTrack {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IncomingTrack").field("ssrc", &self.ssrc).finish_non_exhaustive()
    }
}

impl IncomingTrack {
    async fn request_key_frame(&self) {
        let media_ssrc = self.ssrc.load(Ordering::Relaxed);
        let allowed = media_ssrc != 0
            && self.throttle.lock().unwrap_or_else(PoisonError::into_inner).allow(Instant::now().into_std());
        if !allowed {
            return;
        }
        let request = PictureLossIndication { sender_ssrc: 0, media_ssrc };
        if let Err(error) = self.remote.write_rtcp(vec![Box::new(request)]).await {
            tracing::debug!(%error, "a key frame request could not be sent");
        }
    }
}

/// Reads one track to its end.
///
/// It never waits for the application: the engine drops packets silently as soon as its own short queue is full.
pub(super) async fn read(
    remote: Arc<dyn TrackRemote>,
    sid: TrackSid,
    incoming: Arc<IncomingTracks>,
    events: Arc<EventSink>,
) {
    let track = Arc::new(IncomingTrack {
        remote: Arc::clone(&remote),
        ssrc: AtomicU32::new(0),
        throttle: Mutex::new(Throttle::new(KEY_FRAME_REQUESTS)),
    });
    incoming.tracks().insert(sid.clone(), Arc::clone(&track));
    let mut stream: Option<Stream> = None;
    loop {
        let deadline = stream.as_ref().and_then(|stream| stream.frames.deadline());
        let event = tokio::select! {
            event = remote.poll() => match event {
                Some(event) => Some(event),
                None => break,
            },
            () = at(deadline) => None,
        };
        let now = Instant::now().into_std();
        if let Some(TrackRemoteEvent::OnRtpPacket(packet)) = event {
            let header = &packet.header;
            if !stream.as_ref().is_some_and(|s| s.is_of(header.ssrc, header.payload_type)) {
                stream = Stream::find(&*remote, header.ssrc, header.payload_type).await;
                track.ssrc.store(header.ssrc, Ordering::Relaxed);
            }
            if let Some(stream) = &mut stream {
                stream.frames.push(
                    now,
                    IncomingPacket {
                        sequence: header.sequence_number,
                        timestamp: header.timestamp,
                        marker: header.marker,
                        payload: packet.payload,
                    },
                );
            }
        }
        let Some(stream) = &mut stream else { continue };
        while let Some(frame) = stream.frames.next_frame(now) {
            if let Some(identity) = incoming.owner(&sid)
                && !incoming.is_injected(&frame.payload)
            {
                events.frame(TransportEvent::Frame {
                    identity,
                    sid: sid.clone(),
                    codec: stream.codec,
                    frame,
                });
            }
        }
        if stream.frames.take_loss() && !stream.codec.is_audio() {
            track.request_key_frame().await;
        }
    }
    let mut tracks = incoming.tracks();
    if tracks.get(&sid).is_some_and(|present| Arc::ptr_eq(present, &track)) {
        tracks.remove(&sid);
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
    async fn find(remote: &dyn TrackRemote, ssrc: u32, payload_type: u8) -> Option<Self> {
        let codec = remote.codec(ssrc).await.and_then(|codec| codec_of_mime(&codec.mime_type))?;
        matches!(codec, Codec::Opus | Codec::Vp8).then(|| Self {
            ssrc,
            payload_type,
            codec,
            frames: Reassembler::new(codec),
        })
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
