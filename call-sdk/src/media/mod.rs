//! What an application touches: encoded frames in and out, and the names of tracks and codecs.

use std::time::Duration;

use bytes::Bytes;

mod recording;

pub use recording::{Recording, RecordingError};

/// A media codec that calls use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Codec {
    /// Opus audio, 48 kHz.
    Opus,
    /// VP8 video.
    Vp8,
    /// VP9 video.
    Vp9,
    /// H.264 video in Annex B form.
    H264,
    /// H.265 video in Annex B form.
    H265,
    /// AV1 video; cannot be published in an encrypted call.
    Av1,
}

impl Codec {
    /// RTP clock rate in Hz.
    #[must_use]
    pub fn clock_rate(self) -> u32 {
        if self.is_audio() { 48_000 } else { 90_000 }
    }

    /// Whether this codec carries sound.
    #[must_use]
    pub fn is_audio(self) -> bool {
        matches!(self, Self::Opus)
    }
}

/// What a track shows or sounds; peers lay out their screen by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum TrackSource {
    /// A microphone.
    Microphone,
    /// A camera.
    Camera,
    /// A shared screen.
    ScreenShare,
    /// The sound of a shared screen.
    ScreenShareAudio,
    /// The sender did not say, or said something new.
    Unknown,
}

/// One encoded frame: an Opus packet, or a whole VP8 picture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EncodedFrame {
    /// The frame as the codec wrote it.
    pub payload: Bytes,
    /// Media time since the start of the track; in received frames since the first frame received.
    pub timestamp: Duration,
}

/// A track that is about to be published.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrackSpec {
    /// The codec of every frame of this track.
    pub codec: Codec,
    /// What the track is.
    pub source: TrackSource,
    /// A free name, seen by other participants and by the SFU.
    pub name: String,
    /// Width and height in pixels; `(0, 0)` for audio.
    pub dimensions: (u32, u32),
}

impl TrackSpec {
    /// An Opus microphone track.
    #[must_use]
    pub fn microphone() -> Self {
        Self {
            codec: Codec::Opus,
            source: TrackSource::Microphone,
            name: "microphone".to_owned(),
            dimensions: (0, 0),
        }
    }

    /// A VP8 camera track of the given width and height in pixels.
    #[must_use]
    pub fn camera(width: u32, height: u32) -> Self {
        Self {
            codec: Codec::Vp8,
            source: TrackSource::Camera,
            name: "camera".to_owned(),
            dimensions: (width, height),
        }
    }
}
