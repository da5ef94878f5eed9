//! A local track: from the application's frame to the publisher's RTP.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use rtc::rtp;
use tokio::{sync::Mutex, time::Instant};
use webrtc::media_stream::track_local::{TrackLocal as _, TrackLocalEvent};

use super::{
    engine::SendingTrack,
    events::EventSink,
    pace::Throttle,
    packet::{OutgoingPacket, Packetiser},
};
use crate::{
    media::Codec,
    transport::{LocalTrackId, TransportEvent, WireFrame},
};

/// Key frame requests of one track are passed on at most this often; an encoder that is asked by fifty
/// receivers at once must not make fifty key frames.
const KEY_FRAME_REQUESTS: Duration = Duration::from_millis(200);

/// One local track, for the life of the transport: it outlives the connections that carry it.
#[derive(Debug)]
pub(super) struct LocalTrack {
    pub(super) id: LocalTrackId,
    muted: AtomicBool,
    dropped: AtomicU64,
    /// Held while a frame is sent, so that the packets of two frames never mix.
    packetiser: Mutex<Packetiser>,
    outlet: std::sync::RwLock<Option<Outlet>>,
}

/// Where the packets go while a connection carries the track.
#[derive(Clone)]
struct Outlet {
    sending: SendingTrack,
    payload_type: u8,
}

impl std::fmt::Debug for Outlet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Outlet").field("ssrc", &self.sending.ssrc).finish_non_exhaustive()
    }
}

impl LocalTrack {
    pub(super) fn new(id: LocalTrackId, codec: Codec) -> Self {
        Self {
            id,
            muted: AtomicBool::new(false),
            dropped: AtomicU64::new(0),
            packetiser: Mutex::new(Packetiser::new(codec, rand::random(), rand::random())),
            outlet: std::sync::RwLock::new(None),
        }
    }

    /// Sends one frame, or drops it while the track is muted or not on a connection.
    pub(super) async fn send(&self, frame: WireFrame) {
        let mut packetiser = self.packetiser.lock().await;
        let outlet = if self.muted() { None } else { self.outlet() };
        let Some(outlet) = outlet else {
            self.dropped.fetch_add(1, Ordering::Relaxed);
            return;
        };
        let packets = packetiser.packetise(&frame.payload);
        if packets.is_empty() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
        for OutgoingPacket { sequence, marker, payload } in packets {
            let packet = rtp::Packet {
                header: rtp::Header {
                    version: 2,
                    marker,
                    payload_type: outlet.payload_type,
                    sequence_number: sequence,
                    timestamp: frame.rtp_timestamp,
                    ssrc: outlet.sending.ssrc,
                    ..Default::default()
                },
                payload,
            };
            if let Err(error) = outlet.sending.track.write_rtp(packet).await {
                tracing::debug!(%error, "the connection ended while a frame was sent");
                self.dropped.fetch_add(1, Ordering::Relaxed);
                return;
            }
        }
    }

    /// From now on packets go to `sending`.
    pub(super) fn attach(&self, sending: SendingTrack, payload_type: u8) {
        *self.outlet.write().unwrap_or_else(std::sync::PoisonError::into_inner) =
            Some(Outlet { sending, payload_type });
    }

    /// From now on frames are dropped.
    pub(super) fn detach(&self) {
        *self.outlet.write().unwrap_or_else(std::sync::PoisonError::into_inner) = None;
    }

    pub(super) fn set_muted(&self, muted: bool) {
        self.muted.store(muted, Ordering::Relaxed);
    }

    pub(super) fn muted(&self) -> bool {
        self.muted.load(Ordering::Relaxed)
    }

    /// Frames that were not sent.
    pub(super) fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    fn outlet(&self) -> Option<Outlet> {
        self.outlet.read().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }
}

/// Passes the receivers' key frame requests on, until the connection or the track ends.
pub(super) async fn watch_key_frame_requests(
    sending: SendingTrack,
    id: LocalTrackId,
    events: Arc<EventSink>,
) {
    let mut throttle = Throttle::new(KEY_FRAME_REQUESTS);
    while let Some(TrackLocalEvent::OnRtcpPacket(_)) = sending.track.poll().await {
        // The engine lets nothing but key frame requests through.
        if throttle.allow(Instant::now().into_std())
            && !events.control(TransportEvent::KeyFrameRequested { track: id }).await
        {
            return;
        }
    }
}
