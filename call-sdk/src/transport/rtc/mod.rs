//! One peer connection: encoded frames into RTP payloads and back, without I/O, and in `engine` the connection itself
//! over the WebRTC crates.
//!
//! Connections to an SFU and to a mesh peer share what is around it: `desired` (the application's wishes), `local` and
//! `remote` (tracks), `data` (the framing of data packets), `bitrate` (shares of the uplink), `events` (the queue to the
//! application).
//!
//! A sending track owns a [`Packetiser`], a receiving one a [`Reassembler`]; both are plain structs that are given
//! the time. Frames are opaque and usually sealed by [`frame_crypto`](crate::frame_crypto), so the one rule here
//! is that a frame leaves the reassembler byte for byte as it entered the packetiser:
//!
//! - the last byte of a sealed frame is its key index, so a trailing zero is never trimmed;
//! - start codes, parameter sets and supplemental information in front of an H.264 or H.265 slice are
//!   authenticated, so none is dropped, merged or reordered.
//!
//! | codec | payload format | exceptions to "byte for byte" |
//! |---|---|---|
//! | Opus | RFC 7587 | |
//! | VP8 | RFC 7741 | |
//! | VP9 | RFC 9628 | a frame is one spatial layer of a picture |
//! | H.264, H.265 | RFC 6184 (packetisation mode 1), RFC 7798 | start codes get four bytes, as sealed frames have them |
//! | AV1 | AV1 RTP payload format | no delimiters, tile lists and padding; never sealed |

#[cfg(feature = "webrtc")]
pub(in crate::transport) mod bitrate;
#[cfg(feature = "webrtc")]
pub(in crate::transport) mod data;
#[cfg(feature = "webrtc")]
pub(in crate::transport) mod desired;
#[cfg(feature = "webrtc")]
pub(in crate::transport) mod engine;
#[cfg(feature = "webrtc")]
pub(in crate::transport) mod events;
#[cfg(feature = "webrtc")]
mod ice;
mod jitter;
#[cfg(feature = "webrtc")]
pub(in crate::transport) mod local;
#[cfg(any(feature = "webrtc", test))]
pub(in crate::transport) mod pace;
mod packetiser;
mod payload;
#[cfg(feature = "webrtc")]
pub(in crate::transport) mod remote;
#[cfg(feature = "webrtc")]
pub(in crate::transport) mod sections;
#[cfg(feature = "webrtc")]
mod turn_stream;

#[cfg(all(test, feature = "webrtc"))]
mod interop;
#[cfg(test)]
mod tests;

#[cfg(feature = "webrtc")]
pub(in crate::transport) use self::ice::Network;
#[cfg(feature = "webrtc")]
pub use self::ice::{Bind, IceServer};
pub use self::{
    jitter::{AssembledFrame, IncomingPacket, Reassembler},
    packetiser::{FrameLayer, OutgoingPacket, PacketiseError, Packetiser},
    payload::is_key_frame,
};
