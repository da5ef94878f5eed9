//! RTP payload formats, one file per codec, both directions in each.
//!
//! Everything that is read here comes from the network: a function that cannot make sense of it returns `None`.

use super::packetiser::{FrameLayer, PacketWriter, PacketiseError};
use crate::media::Codec;

mod av1;
mod h264;
mod h265;
mod nal;
mod opus;
mod vp8;
mod vp9;

/// What one payload says about its place in a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Outline {
    /// This is the first packet of its frame. VP8 and VP9 have a flag for it ([`has_start_flag`]). In H.264, H.265
    /// and AV1 it is deduced from the content and may be `false` for a first packet, but never `true` for a packet
    /// whose frame needs an earlier one to be decoded.
    pub(super) begins: bool,
    /// The payload itself says that it is the last of its frame (Opus, VP9). Apart from that, the marker bit does.
    pub(super) ends: bool,
}

/// What a frame's payloads say about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Facts {
    pub(super) key_frame: bool,
    pub(super) temporal: Option<u8>,
    pub(super) spatial: u8,
}

/// Picture id and TL0PICIDX of an encoding (VP8, VP9).
#[derive(Debug)]
pub(super) struct PictureNumbers {
    /// Id of the picture at hand, 15 bits.
    picture: u16,
    /// Number of the last picture in the lowest temporal layer.
    base_layer: u8,
}

impl PictureNumbers {
    pub(super) fn starting_at(picture: u16) -> Self {
        Self { picture: picture.wrapping_sub(1) & 0x7fff, base_layer: 0 }
    }

    fn next_picture(&mut self, temporal: u8) {
        self.picture = (self.picture + 1) & 0x7fff;
        if temporal == 0 {
            self.base_layer = self.base_layer.wrapping_add(1);
        }
    }
}

/// Whether the first packet of every frame says that it is one.
pub(super) fn has_start_flag(codec: Codec) -> bool {
    matches!(codec, Codec::Vp8 | Codec::Vp9)
}

/// Reads a payload's place in its frame; `None` if the payload is malformed.
pub(super) fn outline(codec: Codec, payload: &[u8]) -> Option<Outline> {
    match codec {
        Codec::Opus => Some(opus::outline()),
        Codec::Vp8 => vp8::outline(payload),
        Codec::Vp9 => vp9::outline(payload),
        Codec::H264 => nal::outline::<h264::H264>(payload),
        Codec::H265 => nal::outline::<h265::H265>(payload),
        Codec::Av1 => av1::outline(payload),
    }
}

/// Appends the frame that `payloads` (all of its packets, in order) make up to `frame`; `None` if they contradict
/// each other, with `frame` in any state.
pub(super) fn assemble<'a>(
    codec: Codec,
    payloads: impl Iterator<Item = &'a [u8]>,
    frame: &mut Vec<u8>,
) -> Option<Facts> {
    match codec {
        Codec::Opus => Some(opus::assemble(payloads, frame)),
        Codec::Vp8 => vp8::assemble(payloads, frame),
        Codec::Vp9 => vp9::assemble(payloads, frame),
        Codec::H264 => nal::assemble::<h264::H264>(payloads, frame),
        Codec::H265 => nal::assemble::<h265::H265>(payloads, frame),
        Codec::Av1 => av1::assemble(payloads, frame),
    }
}

/// Writes the packets of `frame`, which is not empty.
pub(super) fn write(
    codec: Codec,
    frame: &[u8],
    layer: FrameLayer,
    pictures: &mut PictureNumbers,
    packets: &mut PacketWriter<'_>,
) -> Result<(), PacketiseError> {
    match codec {
        Codec::Opus => opus::write(frame, packets),
        Codec::Vp8 => vp8::write(frame, layer, pictures, packets),
        Codec::Vp9 => vp9::write(frame, layer, pictures, packets),
        Codec::H264 => nal::write::<h264::H264>(frame, packets)?,
        Codec::H265 => nal::write::<h265::H265>(frame, packets)?,
        Codec::Av1 => av1::write(frame, packets)?,
    }
    Ok(())
}

/// Whether a decoder can start with `frame`. Audio always can.
///
/// Frames may be sealed, except those of VP9, which have no clear byte: ask before sealing.
#[must_use]
pub fn is_key_frame(codec: Codec, frame: &[u8]) -> bool {
    match codec {
        Codec::Opus => true,
        Codec::Vp8 => vp8::is_key_frame(frame),
        Codec::Vp9 => vp9::is_key_frame(frame),
        Codec::H264 => nal::is_key_frame::<h264::H264>(frame),
        Codec::H265 => nal::is_key_frame::<h265::H265>(frame),
        Codec::Av1 => av1::is_key_frame(frame),
    }
}
