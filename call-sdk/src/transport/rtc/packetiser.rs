//! Cutting the frames of one outgoing encoding into RTP payloads.

use bytes::{Bytes, BytesMut};

use super::payload::{self, PictureNumbers};
use crate::media::Codec;

/// The longest RTP payload, in bytes. Every path carries UDP payloads of 1200 bytes; the difference goes to the RTP
/// header with its extensions, the SRTP tag, and the two bytes of a retransmission.
pub(super) const LONGEST_PAYLOAD: usize = 1150;

/// The longest Opus packet (RFC 6716 §3.2) plus what frame encryption adds, rounded up. Audio is never cut.
const LARGEST_AUDIO: usize = 1400;

/// The largest video frame. Its packets fit into the receiver's window.
pub(super) const LARGEST_VIDEO: usize = 2 << 20;

/// Cuts the frames of one encoding into packets.
///
/// One encoding is one SSRC: each layer of a simulcast track has its own packetiser. It outlives reconnections, so
/// that receivers see one continuous stream.
#[derive(Debug)]
pub struct Packetiser {
    codec: Codec,
    sequence: u16,
    pictures: PictureNumbers,
    /// All payloads of a frame are slices of this buffer. Its room is used again once they are dropped.
    buffer: BytesMut,
}

impl Packetiser {
    /// A packetiser for frames of `codec`. `sequence` and `picture` are the first sequence number and picture id;
    /// draw them at random, so that a restarted sender is not mistaken for a retransmission.
    #[must_use]
    pub fn new(codec: Codec, sequence: u16, picture: u16) -> Self {
        Self {
            codec,
            // Only the lower half: a receiver that joins just before the first wrap would guess a wrong SRTP
            // rollover counter (RFC 3711 §3.3.1).
            sequence: sequence & 0x7fff,
            pictures: PictureNumbers::starting_at(picture),
            buffer: BytesMut::with_capacity(4096),
        }
    }

    /// Writes the packets of `frame` to `packets`, which is overwritten and whose room is reused.
    ///
    /// A sealed frame is sent as it is. H.264 and H.265 frames are in Annex B form, AV1 frames are temporal units
    /// in low-overhead form.
    ///
    /// # Errors
    /// A [`PacketiseError`], with `packets` empty and no sequence number used: drop the frame.
    pub fn packetise(
        &mut self,
        frame: &[u8],
        layer: FrameLayer,
        packets: &mut Vec<OutgoingPacket>,
    ) -> Result<(), PacketiseError> {
        packets.clear();
        let largest = if self.codec.is_audio() { LARGEST_AUDIO } else { LARGEST_VIDEO };
        if frame.is_empty() {
            return Err(PacketiseError::Empty);
        }
        if frame.len() > largest {
            return Err(PacketiseError::TooLarge { size: frame.len(), largest });
        }
        // Sixteen bytes cover the payload header of any codec.
        self.buffer.reserve(frame.len() + (frame.len() / 1024 + 4) * 16);
        let first = self.sequence;
        let mut writer = PacketWriter { buffer: &mut self.buffer, sequence: &mut self.sequence, packets };
        let written = payload::write(self.codec, frame, layer, &mut self.pictures, &mut writer);
        if written.is_err() {
            self.sequence = first;
            self.buffer.clear();
            packets.clear();
        }
        written
    }
}

/// What a packetiser is told about a frame besides its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameLayer {
    /// Whether a decoder can start with this frame (or, in a higher spatial layer, with this picture). Only VP9
    /// puts it into the packets; the other codecs show it in bytes that stay in clear.
    pub key_frame: bool,
    /// Temporal layer (0..=3), or `None` if the stream has only one. Only VP8 puts it into the packets: the
    /// non-flexible mode of VP9 needs a description of the dependencies too, without which receivers stall as
    /// soon as an SFU drops a layer.
    pub temporal: Option<u8>,
    /// Spatial layer within the stream (0..=7), lowest first. VP9 only. Layers of simulcast are streams of their
    /// own and all have 0 here.
    pub spatial: u8,
    /// How many spatial layers this stream has, at least 1. VP9 only.
    pub spatial_layers: u8,
}

impl FrameLayer {
    /// A frame of a stream without layers.
    #[must_use]
    pub fn single(key_frame: bool) -> Self {
        Self { key_frame, temporal: None, spatial: 0, spatial_layers: 1 }
    }
}

/// One packet of a frame, ready for an RTP header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutgoingPacket {
    /// RTP sequence number.
    pub sequence: u16,
    /// RTP marker bit.
    pub marker: bool,
    /// RTP payload.
    pub payload: Bytes,
}

/// Why a frame was not packetised. It must be dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PacketiseError {
    /// The frame has no bytes.
    #[error("the encoder's frame is empty; drop it")]
    Empty,
    /// The frame is larger than receivers put together.
    #[error("the encoder's frame of {size} bytes exceeds the limit of {largest}; lower the bitrate")]
    TooLarge {
        /// Size of the frame in bytes.
        size: usize,
        /// The limit in bytes.
        largest: usize,
    },
    /// The frame is not of the form that its codec is sent in.
    #[error("the encoder's frame is malformed: {0}")]
    Malformed(&'static str),
}

/// Collects the payloads of one frame.
pub(super) struct PacketWriter<'a> {
    buffer: &'a mut BytesMut,
    sequence: &'a mut u16,
    packets: &'a mut Vec<OutgoingPacket>,
}

impl PacketWriter<'_> {
    /// Appends to the payload at hand.
    pub(super) fn put(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// Sets bits in the first byte of the payload at hand.
    pub(super) fn set_in_first_byte(&mut self, bits: u8) {
        if let Some(first) = self.buffer.first_mut() {
            *first |= bits;
        }
    }

    /// Bytes that still fit into the payload at hand.
    pub(super) fn room(&self) -> usize {
        LONGEST_PAYLOAD.saturating_sub(self.buffer.len())
    }

    /// Whether nothing was put since the last packet.
    pub(super) fn at_packet_start(&self) -> bool {
        self.buffer.is_empty()
    }

    /// Whether no packet is complete yet.
    pub(super) fn at_frame_start(&self) -> bool {
        self.packets.is_empty()
    }

    /// Completes the payload at hand.
    pub(super) fn end_packet(&mut self) {
        let sequence = *self.sequence;
        *self.sequence = sequence.wrapping_add(1);
        let payload = self.buffer.split().freeze();
        self.packets.push(OutgoingPacket { sequence, marker: false, payload });
    }

    /// Sets the marker bit of the last packet.
    pub(super) fn mark_last(&mut self) {
        if let Some(last) = self.packets.last_mut() {
            last.marker = true;
        }
    }
}

/// Cuts `body` into pieces of at most `room` bytes that are of equal size, so that a burst of them is of two sizes
/// at most (segmentation offload) and none is more likely to be lost.
pub(super) fn pieces(body: &[u8], room: usize) -> std::slice::Chunks<'_, u8> {
    let count = body.len().div_ceil(room).max(1);
    body.chunks(body.len().div_ceil(count).max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn oversized_and_empty_frames_use_no_sequence_number() {
        let mut packets = Vec::new();
        let mut opus = Packetiser::new(Codec::Opus, 9, 0);
        let layer = FrameLayer::single(true);
        assert_eq!(opus.packetise(&[], layer, &mut packets), Err(PacketiseError::Empty));
        let large = [0; LARGEST_AUDIO + 1];
        assert!(matches!(opus.packetise(&large, layer, &mut packets), Err(PacketiseError::TooLarge { .. })));
        opus.packetise(&[1], layer, &mut packets).unwrap();
        assert_eq!((packets[0].sequence, &packets[0].payload[..]), (9, &[1][..]));
    }

    #[test]
    fn malformed_frame_leaves_nothing_behind() {
        let mut packets = Vec::new();
        let layer = FrameLayer::single(true);
        for (codec, frame, good) in [
            // A good slice, then a unit of the type that marks an aggregation packet.
            (Codec::H264, &[0, 0, 0, 1, 0x65, 0x88, 0, 0, 0, 1, 24, 1][..], 6),
            // A good unit, then one that is cut short.
            (Codec::Av1, &[0x32, 1, 7, 0x32, 9], 3),
        ] {
            let mut out = Packetiser::new(codec, 9, 0);
            let sent = out.packetise(frame, layer, &mut packets);
            assert!(matches!(sent, Err(PacketiseError::Malformed(_))), "{codec:?}");
            assert!(packets.is_empty());
            let mut fresh = Vec::new();
            Packetiser::new(codec, 9, 0).packetise(&frame[..good], layer, &mut fresh).unwrap();
            out.packetise(&frame[..good], layer, &mut packets).unwrap();
            assert_eq!(packets, fresh);
        }
    }

    #[test]
    fn room_is_reused_after_packets_are_dropped() {
        let mut packets = Vec::new();
        let mut vp8 = Packetiser::new(Codec::Vp8, 0, 0);
        let frame = [7; 20_000];
        let mut addresses = std::collections::HashSet::new();
        for _ in 0..10 {
            vp8.packetise(&frame, FrameLayer::single(false), &mut packets).unwrap();
            addresses.insert(packets[0].payload.as_ptr());
            packets.clear();
        }
        assert!(addresses.len() <= 2, "one buffer, grown once");
    }

    #[test]
    fn pieces_differ_by_little_and_fit() {
        for length in 1..5000 {
            let body = vec![0; length];
            let sizes: Vec<_> = pieces(&body, 1146).map(<[u8]>::len).collect();
            assert_eq!(sizes.len(), length.div_ceil(1146));
            assert_eq!(sizes.iter().sum::<usize>(), length);
            assert!(sizes.iter().all(|size| *size <= 1146));
        }
    }
}
