//! A local track on a connection.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use bytes::Bytes;
use rtc::{
    rtcp::payload_feedbacks::{
        full_intra_request::FullIntraRequest, picture_loss_indication::PictureLossIndication,
    },
    rtp,
};
use webrtc::{
    media_stream::{
        MediaStreamTrack,
        track_local::{TrackLocal as _, TrackLocalEvent, static_rtp::TrackLocalStaticRTP},
    },
    rtp_transceiver::{RTCRtpTransceiverDirection, RtpSender, RtpTransceiver},
};

use super::{
    AUDIO_LEVEL, RIDS,
    codecs::mime,
    dependency::{self, Descriptor},
    media,
};
use crate::{
    media::Codec,
    transport::{TransportError, WireFrame, rtc::OutgoingPacket},
};

const MID: &str = "urn:ietf:params:rtp-hdrext:sdes:mid";
const RID: &str = "urn:ietf:params:rtp-hdrext:sdes:rtp-stream-id";

/// The audio level of silence (RFC 6464 §3).
const LOWEST_LEVEL: u8 = 127;

/// A local track on a connection: one stream of packets per simulcast layer.
#[derive(Clone)]
pub(in crate::transport) struct OutgoingTrack {
    track: Arc<TrackLocalStaticRTP>,
    transceiver: Arc<dyn RtpTransceiver>,
    sender: Arc<dyn RtpSender>,
    /// By layer, lowest first.
    ssrcs: Vec<u32>,
    codec: Codec,
    dimensions: (u32, u32),
    negotiated: Arc<OnceLock<Negotiated>>,
    numbers: Arc<Mutex<Numbers>>,
    /// The stream half of the msid.
    stream: Arc<tokio::sync::Mutex<String>>,
}

/// Keeps the sequence numbers of a section going when its track changes: a receiver takes a jump for a rollover and
/// fails to decrypt (RFC 3711 §3.3.1).
#[derive(Debug, Default)]
struct Numbers {
    next: Option<u16>,
    offset: u16,
    /// The next packet is the first of another track.
    changed: bool,
}

impl Numbers {
    fn number(&mut self, sequence: u16) -> u16 {
        if std::mem::take(&mut self.changed)
            && let Some(next) = self.next
        {
            self.offset = next.wrapping_sub(sequence);
        }
        let number = sequence.wrapping_add(self.offset);
        self.next = Some(number.wrapping_add(1));
        number
    }
}

/// What the negotiation gave a track.
#[derive(Debug)]
struct Negotiated {
    payload_type: u8,
    /// Header extensions that every packet carries, by layer (RFC 8852); only simulcast needs them.
    extensions: Vec<Vec<(u8, Bytes)>>,
    /// The id of the dependency descriptor, for codecs that need it.
    descriptor: Option<u8>,
    /// The id of the audio level, if the other side takes it, and the values from 0 to 127 (RFC 6464 §3), to be cut
    /// out without an allocation per packet. Their first bit would say that a detector found speech.
    audio_level: Option<(u8, Bytes)>,
}

/// What receivers report about a track.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::transport) enum Report {
    /// A receiver needs a key frame of this layer.
    KeyFrameWanted { layer: u8 },
}

impl OutgoingTrack {
    pub(super) async fn new(
        track: Arc<TrackLocalStaticRTP>,
        transceiver: Arc<dyn RtpTransceiver>,
        ssrcs: Vec<u32>,
        codec: Codec,
        dimensions: (u32, u32),
    ) -> Result<Self, TransportError> {
        let sender = transceiver
            .sender()
            .await
            .map_err(media)?
            .ok_or_else(|| TransportError::TrackRefused("the engine made no sender".to_owned()))?;
        let stream = Arc::new(tokio::sync::Mutex::new(track.track().await.stream_id().clone()));
        let (negotiated, numbers) = Default::default();
        Ok(Self { track, transceiver, sender, ssrcs, codec, dimensions, negotiated, numbers, stream })
    }

    /// The codec, which never changes.
    pub(in crate::transport) fn codec(&self) -> Codec {
        self.codec
    }

    /// The id of its section, once there is one.
    pub(in crate::transport) async fn mid(&self) -> Result<Option<String>, TransportError> {
        self.transceiver.mid().await.map_err(media)
    }

    /// Gives the section to the track of another media stream, or to none; the other side learns it from the next
    /// description. The track half of the msid stays. `receives`: whether the other side may send in it too.
    pub(in crate::transport) async fn assign(
        &self,
        stream: Option<&str>,
        receives: bool,
    ) -> Result<(), TransportError> {
        let direction = match (stream.is_some(), receives) {
            (true, true) => RTCRtpTransceiverDirection::Sendrecv,
            (true, false) => RTCRtpTransceiverDirection::Sendonly,
            (false, true) => RTCRtpTransceiverDirection::Recvonly,
            (false, false) => RTCRtpTransceiverDirection::Inactive,
        };
        // First: the engine denies having a sender while the direction does not send.
        self.transceiver.set_direction(direction).await.map_err(media)?;
        let (track, mut stream_now) = (self.track.track().await, self.stream.lock().await);
        let Some(stream) = stream.filter(|stream| *stream_now != *stream) else { return Ok(()) };
        let named = MediaStreamTrack::new(
            stream.to_owned(),
            track.track_id().clone(),
            track.label().clone(),
            track.kind(),
            track.codings().to_vec(),
        );
        // The engine takes the name over; packets go on through the track that it was bound to.
        self.sender.replace_track(Arc::new(TrackLocalStaticRTP::new(named))).await.map_err(media)?;
        stream.clone_into(&mut stream_now);
        self.numbers.lock().unwrap_or_else(PoisonError::into_inner).changed = true;
        Ok(())
    }

    pub(super) fn sender(&self) -> &Arc<dyn RtpSender> {
        &self.sender
    }

    /// Takes the outcome of the negotiation over; packets can be written from now on.
    ///
    /// # Errors
    /// [`TransportError::TrackRefused`] if the other side does not take the codec.
    pub(in crate::transport) async fn negotiated(&self) -> Result<(), TransportError> {
        let parameters = self.sender.get_parameters().await.map_err(media)?.rtp_parameters;
        let payload_type = parameters
            .codecs
            .iter()
            .find(|codec| codec.rtp_codec.mime_type.eq_ignore_ascii_case(mime(self.codec)))
            .map(|codec| codec.payload_type)
            .ok_or_else(|| TransportError::TrackRefused(format!("{:?} was not negotiated", self.codec)))?;
        let id = |uri: &str| {
            let found = parameters.header_extensions.iter().find(|extension| extension.uri == uri);
            found.and_then(|extension| u8::try_from(extension.id).ok())
        };
        let extensions = if self.ssrcs.len() > 1 {
            let mid = self.transceiver.mid().await.map_err(media)?.unwrap_or_default();
            let (Some(mid_id), Some(rid_id)) = (id(MID), id(RID)) else {
                return Err(TransportError::TrackRefused("simulcast was not negotiated".to_owned()));
            };
            let of_layer = |rid: &&'static str| {
                vec![(mid_id, Bytes::from(mid.clone())), (rid_id, Bytes::from_static(rid.as_bytes()))]
            };
            RIDS.iter().take(self.ssrcs.len()).map(of_layer).collect()
        } else {
            vec![Vec::new()]
        };
        let descriptor = id(dependency::URI).filter(|_| matches!(self.codec, Codec::Vp9 | Codec::Av1));
        // A second negotiation of the same section changes nothing.
        let audio_level = id(AUDIO_LEVEL).map(|id| (id, (0..=LOWEST_LEVEL).collect()));
        drop(self.negotiated.set(Negotiated { payload_type, extensions, descriptor, audio_level }));
        Ok(())
    }

    /// Sends the packets of one frame, the `number`th of its layer; waits while the engine is busy.
    ///
    /// # Errors
    /// [`TransportError::Closed`] if the track is not negotiated or its connection has ended.
    pub(in crate::transport) async fn write(
        &self,
        frame: &WireFrame,
        number: u16,
        packets: &mut Vec<OutgoingPacket>,
    ) -> Result<(), TransportError> {
        let negotiated = self.negotiated.get().ok_or(TransportError::Closed)?;
        let layer = usize::from(frame.layer);
        let (Some(ssrc), Some(extensions)) = (self.ssrcs.get(layer), negotiated.extensions.get(layer)) else {
            return Ok(());
        };
        let last = packets.len().saturating_sub(1);
        for (index, packet) in packets.drain(..).enumerate() {
            let sequence_number = if self.ssrcs.len() > 1 {
                packet.sequence
            } else {
                self.numbers.lock().unwrap_or_else(PoisonError::into_inner).number(packet.sequence)
            };
            let mut header = rtp::Header {
                version: 2,
                marker: packet.marker,
                payload_type: negotiated.payload_type,
                sequence_number,
                timestamp: frame.rtp_timestamp,
                ssrc: *ssrc,
                ..Default::default()
            };
            for (id, value) in extensions {
                header.set_extension(*id, value.clone()).map_err(media)?;
            }
            if let Some(id) = negotiated.descriptor {
                let descriptor = Descriptor {
                    starts: index == 0,
                    ends: index == last,
                    frame: number,
                    key_frame: frame.key_frame,
                    dimensions: self.dimensions,
                };
                header.set_extension(id, descriptor.encode()).map_err(media)?;
            }
            if let (Some((id, levels)), Some(level)) = (&negotiated.audio_level, frame.audio_level) {
                let level = usize::from(level.min(LOWEST_LEVEL));
                header.set_extension(*id, levels.slice(level..=level)).map_err(media)?;
            }
            let packet = rtp::Packet { header, payload: packet.payload };
            self.track.write_rtp(packet).await.map_err(|_| TransportError::Closed)?;
        }
        Ok(())
    }

    /// The next report of a receiver; `None` when the track or its connection has ended.
    pub(in crate::transport) async fn next_report(&self) -> Option<Report> {
        loop {
            let TrackLocalEvent::OnRtcpPacket(packets) = self.track.poll().await? else { continue };
            for packet in packets {
                let any = packet.as_any();
                let ssrc = if let Some(request) = any.downcast_ref::<PictureLossIndication>() {
                    Some(request.media_ssrc)
                } else {
                    let request = any.downcast_ref::<FullIntraRequest>();
                    request.and_then(|request| request.fir.first()).map(|entry| entry.ssrc)
                };
                let layer = self.ssrcs.iter().position(|of_layer| Some(*of_layer) == ssrc);
                if let Some(layer) = layer.and_then(|layer| u8::try_from(layer).ok()) {
                    return Some(Report::KeyFrameWanted { layer });
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sequence_numbers_go_on_when_the_track_changes() {
        let mut numbers = Numbers::default();
        assert_eq!([65_534, 65_535].map(|sequence| numbers.number(sequence)), [65_534, 65_535]);
        numbers.changed = true;
        assert_eq!([40_000, 40_001].map(|sequence| numbers.number(sequence)), [0, 1]);
    }
}
