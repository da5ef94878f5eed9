//! The traits between a call and its transports.

use std::{fmt, sync::Arc, time::Instant};

use async_trait::async_trait;

use super::{DataPacket, LocalTrackId, Subscription, TrackSid};
use crate::media::{Codec, FrameBytes, TrackSpec};

/// A frame on its way out, sealed in an encrypted call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WireFrame {
    /// The whole frame before packetisation. Clones share the bytes.
    pub payload: FrameBytes,
    /// RTP timestamp in the codec's clock rate, relative to the start of the track.
    pub rtp_timestamp: u32,
    /// Simulcast layer, lowest first; 0 for audio and for a single layer.
    pub layer: u8,
    /// Whether a decoder can start here.
    pub key_frame: bool,
    /// How loud an audio frame is, from 0 (loudest) to 127 (silence) in −dBov (RFC 6464); `None`: not known.
    pub audio_level: Option<u8>,
}

/// A frame that arrived, exactly as it was on the wire.
#[derive(Clone, Copy, Debug)]
pub struct ReceivedFrame<'a> {
    /// When its last packet arrived.
    pub now: Instant,
    /// Codec by the negotiated payload type.
    pub codec: Codec,
    /// RTP timestamp in the codec's clock rate.
    pub rtp_timestamp: u32,
    /// The whole frame after depacketisation.
    pub payload: &'a [u8],
}

/// Takes the frames of one remote track. Called from the transport's own task: it must return quickly and never wait.
pub trait FrameReceiver: Send + Sync + fmt::Debug {
    /// A whole frame arrived.
    fn receive(&self, frame: ReceivedFrame<'_>);

    /// A sender report arrived: `rtp_timestamp` and `ntp` (64-bit NTP time of the sender's clock) are the same
    /// instant (RFC 3550 §6.4.1).
    fn sender_report(&self, rtp_timestamp: u32, ntp: u64);

    /// The trailer that the SFU appends to frames of its own (`sif_trailer`), told before the first frame and again
    /// whenever it changes.
    fn injected_trailer(&self, trailer: &[u8]);
}

/// Where frames of one local track leave on one connection.
///
/// `send` never waits: a frame that finds its queue full is dropped and counted, so a slow connection delays no other.
pub trait Outlet: Send + Sync + fmt::Debug {
    /// Packetises and sends one frame, or drops it while the connection is not up or the track is muted.
    fn send(&self, frame: &WireFrame);

    /// Frames that were dropped here so far.
    fn dropped(&self) -> u64;
}

/// A connection that carries media to and from one SFU room or one mesh peer.
///
/// Events come on the bounded channel that the constructor of the implementation returns. Only `publish` and `close`
/// wait for the network, and their callers run them in tasks of their own; everything else returns at once.
#[async_trait]
pub trait MediaTransport: Send + Sync + fmt::Debug {
    /// Announces a track and negotiates it. `encrypted` is only the hint that peers are told (TrackInfo.encryption =
    /// GCM, RED off). Dropping the future takes the track back. After a reconnection the same outlet carries on.
    ///
    /// # Errors
    /// [`TransportError`] if the SFU refuses the track or the connection is gone.
    async fn publish(
        &self,
        track: LocalTrackId,
        spec: TrackSpec,
        encrypted: bool,
    ) -> Result<Arc<dyn Outlet>, TransportError>;

    /// Ends a track; unknown ids are ignored.
    fn unpublish(&self, track: LocalTrackId);

    /// Tells everybody that a track is muted or not.
    fn set_muted(&self, track: LocalTrackId, muted: bool);

    /// Gives the frames of a remote track to `receiver`, from now on and across reconnections; `None` stops that.
    /// Frames of a track without a receiver are dropped.
    fn attach(&self, sid: &TrackSid, receiver: Option<Arc<dyn FrameReceiver>>);

    /// Says which part of a remote track to receive. Without it everything is received.
    fn subscribe(&self, sid: &TrackSid, subscription: Subscription);

    /// Asks the sender of a remote video track for a key frame, at most every 500 ms.
    fn request_key_frame(&self, sid: &TrackSid);

    /// Sends a data packet.
    ///
    /// # Errors
    /// [`TransportError::Congested`] if the queue is full, [`TransportError::Closed`], or
    /// [`TransportError::DataTooLarge`].
    fn send_data(&self, packet: DataPacket) -> Result<(), TransportError>;

    /// Leaves politely and closes everything; `Disconnected` is the last event. Bounded by 2 s.
    async fn close(&self);
}

/// A connection to one mesh peer. Its [`Negotiated`](super::mesh::Negotiated) events come with the others; `Up` follows
/// the stages, and it never ends by itself: signalling decides.
pub trait MeshTransport: MediaTransport {
    /// Does what signalling asks, in order and without waiting.
    fn negotiate(&self, command: super::mesh::Negotiate);
}

/// Why a transport could not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TransportError {
    /// The SFU answered that this token may not enter.
    #[error("the SFU refused the token ({status}): {message}; ask the authorisation service for a new one")]
    Unauthorised {
        /// HTTP status.
        status: u16,
        /// The SFU's text.
        message: String,
    },
    /// The room does not exist and this token may not create it.
    #[error(
        "the SFU room does not exist and this token may not create it: the authorisation service creates rooms only for \
         users of its own homeserver"
    )]
    RoomCreationRestricted,
    /// The SFU has no capacity left.
    #[error("the SFU is out of capacity ({status}); try again later or use another focus")]
    Capacity {
        /// HTTP status.
        status: u16,
    },
    /// The SFU refused a track.
    #[error("the SFU refused the track: {0}")]
    TrackRefused(String),
    /// No answer within the time that the protocol grants.
    #[error("the SFU did not answer within {0:?} while {1}")]
    Timeout(std::time::Duration, &'static str),
    /// A codec that this transport cannot carry.
    #[error("this transport cannot carry {0:?}")]
    UnsupportedCodec(Codec),
    /// More data waits than the connection can carry.
    #[error("the data queue of this connection is full; send less or wait")]
    Congested,
    /// A data packet of more bytes than SFUs forward.
    #[error("a data packet of {0} bytes is too large; send at most 15,000 bytes")]
    DataTooLarge(usize),
    /// The connection has ended.
    #[error("the connection is closed")]
    Closed,
    /// Signalling failed.
    #[error("signalling with the SFU failed")]
    Signal(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The peer connection failed.
    #[error("the media connection failed")]
    Media(#[source] Box<dyn std::error::Error + Send + Sync>),
}
