//! Opus (RFC 7587): one packet is one frame.

use super::{Facts, Outline};
use crate::transport::rtc::packetiser::PacketWriter;

pub(super) fn outline() -> Outline {
    Outline { begins: true, ends: true }
}

pub(super) fn assemble<'a>(payloads: impl Iterator<Item = &'a [u8]>, frame: &mut Vec<u8>) -> Facts {
    payloads.for_each(|payload| frame.extend_from_slice(payload));
    Facts { key_frame: true, temporal: None, spatial: 0 }
}

/// The marker bit stays unset: it would announce a talk spurt (RFC 7587 §4.1), which a sealed frame does not show.
pub(super) fn write(frame: &[u8], packets: &mut PacketWriter<'_>) {
    packets.put(frame);
    packets.end_packet();
}
