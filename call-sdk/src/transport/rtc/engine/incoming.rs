//! A remote track.

use std::sync::Arc;

use rtc::rtcp::{
    payload_feedbacks::picture_loss_indication::PictureLossIndication, sender_report::SenderReport,
};
use webrtc::media_stream::track_remote::{TrackRemote, TrackRemoteEvent};

use super::codecs::codec_of_mime;
use crate::{media::Codec, transport::rtc::IncomingPacket};

/// A remote track. The engine drops packets silently as soon as its own short queue is full, so its reader must not wait
/// for anything else.
#[derive(Clone)]
pub(in crate::transport) struct IncomingTrack(Arc<dyn TrackRemote>);

/// What arrived on a track.
pub(in crate::transport) enum Arrival {
    /// A media packet.
    Packet { ssrc: u32, payload_type: u8, packet: IncomingPacket },
    /// A sender report (RFC 3550 §6.4.1).
    SenderReport { ssrc: u32, rtp_timestamp: u32, ntp: u64 },
}

impl IncomingTrack {
    pub(super) fn new(track: Arc<dyn TrackRemote>) -> Self {
        Self(track)
    }

    /// The track half of the msid.
    pub(in crate::transport) async fn id(&self) -> String {
        self.0.track_id().await
    }

    /// What arrives next; `None` when the track or its connection has ended. Dropping the future loses nothing.
    pub(in crate::transport) async fn next(&self) -> Option<Arrival> {
        loop {
            match self.0.poll().await? {
                TrackRemoteEvent::OnRtpPacket(packet) => {
                    return Some(Arrival::Packet {
                        ssrc: packet.header.ssrc,
                        payload_type: packet.header.payload_type,
                        packet: IncomingPacket {
                            sequence: packet.header.sequence_number,
                            timestamp: packet.header.timestamp,
                            marker: packet.header.marker,
                            payload: packet.payload,
                        },
                    });
                }
                TrackRemoteEvent::OnRtcpPacket(packets) => {
                    let report =
                        packets.iter().find_map(|packet| packet.as_any().downcast_ref::<SenderReport>());
                    if let Some(report) = report {
                        return Some(Arrival::SenderReport {
                            ssrc: report.ssrc,
                            rtp_timestamp: report.rtp_time,
                            ntp: report.ntp_time,
                        });
                    }
                }
                _ => {}
            }
        }
    }

    /// The codec of the stream with this SSRC.
    pub(in crate::transport) async fn codec(&self, ssrc: u32) -> Option<Codec> {
        self.0.codec(ssrc).await.and_then(|codec| codec_of_mime(&codec.mime_type))
    }

    /// Asks the sender for a key frame.
    pub(in crate::transport) async fn request_key_frame(&self, media_ssrc: u32) {
        let request = PictureLossIndication { sender_ssrc: 0, media_ssrc };
        if let Err(error) = self.0.write_rtcp(vec![Box::new(request)]).await {
            tracing::debug!(%error, "a key frame request could not be sent");
        }
    }
}
