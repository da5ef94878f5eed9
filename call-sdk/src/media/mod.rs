//! Encoded frames, the buffers that hold them, recordings of them, and the types that describe a track.

use std::time::Duration;

mod buffer;
#[cfg(feature = "opus")]
mod pcm;
mod recording;

pub use buffer::{FrameBytes, FramePool};
#[cfg(feature = "opus")]
pub use pcm::{FRAME_SAMPLES, PcmDecoder, PcmEncoder, PcmError, PcmFrame, SAMPLE_RATE};
pub use recording::{Recording, RecordingError, opus_duration};

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

    /// Whether this is an audio codec.
    #[must_use]
    pub fn is_audio(self) -> bool {
        matches!(self, Self::Opus)
    }
}

/// The device or surface that a track captures; peers choose their layout by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum TrackSource {
    /// A microphone.
    Microphone,
    /// A camera.
    Camera,
    /// A shared screen.
    ScreenShare,
    /// The audio of a shared screen.
    ScreenShareAudio,
    /// Not stated by the sender, or not known to this crate.
    #[serde(other)]
    Unknown,
}

/// One encoded frame: an Opus packet, or a whole VP8 picture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EncodedFrame {
    /// The frame as the encoder wrote it.
    pub payload: FrameBytes,
    /// Media time since the start of the track. In received frames: since the first frame of any track of the same
    /// member.
    pub timestamp: Duration,
}

impl EncodedFrame {
    /// A frame of these bytes at this media time.
    #[must_use]
    pub fn new(payload: impl Into<FrameBytes>, timestamp: Duration) -> Self {
        Self { payload: payload.into(), timestamp }
    }
}

/// The description of a track to publish.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct TrackSpec {
    /// The codec of every frame of this track.
    pub codec: Codec,
    /// The source of its media; peers choose their layout by it.
    pub source: TrackSource,
    /// Any name. Other participants and the SFU can read it.
    pub name: String,
    /// The layers of a video track, smallest first; more than one is simulcast. Empty for audio.
    pub layers: Vec<VideoLayer>,
    /// Whether an audio track is stereo.
    pub stereo: bool,
    /// Whether the track starts muted.
    pub muted: bool,
}

/// One encoding of a video track.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct VideoLayer {
    /// Width in pixels.
    pub width: u32,
    /// Height in pixels.
    pub height: u32,
    /// Highest bitrate in bits per second.
    pub bitrate: u64,
    /// Highest frame rate in frames per second.
    pub fps: f64,
}

impl TrackSpec {
    /// An Opus microphone track.
    #[must_use]
    pub fn microphone() -> Self {
        Self::audio(TrackSource::Microphone, "microphone")
    }

    /// The Opus sound of a shared screen.
    #[must_use]
    pub fn screen_share_audio() -> Self {
        Self { stereo: true, ..Self::audio(TrackSource::ScreenShareAudio, "screen share audio") }
    }

    /// A VP8 camera track of the given width and height in pixels.
    #[must_use]
    pub fn camera(width: u32, height: u32) -> Self {
        Self::video(TrackSource::Camera, "camera", Codec::Vp8, width, height)
    }

    /// A VP8 track of a shared screen of the given width and height in pixels.
    #[must_use]
    pub fn screen_share(width: u32, height: u32) -> Self {
        Self::video(TrackSource::ScreenShare, "screen share", Codec::Vp8, width, height)
    }

    /// The same track with another codec.
    #[must_use]
    pub fn with_codec(mut self, codec: Codec) -> Self {
        self.codec = codec;
        self
    }

    /// The same track under another name.
    #[must_use]
    pub fn with_name(mut self, name: impl Into<String>) -> Self {
        self.name = name.into();
        self
    }

    /// The same video track with these layers, smallest first.
    #[must_use]
    pub fn with_layers(mut self, layers: Vec<VideoLayer>) -> Self {
        self.layers = layers;
        self
    }

    /// Width and height in pixels of the largest layer; `(0, 0)` for audio.
    #[must_use]
    pub fn dimensions(&self) -> (u32, u32) {
        self.layers.last().map_or((0, 0), |layer| (layer.width, layer.height))
    }

    fn audio(source: TrackSource, name: &str) -> Self {
        Self {
            codec: Codec::Opus,
            source,
            name: name.to_owned(),
            layers: Vec::new(),
            stereo: false,
            muted: false,
        }
    }

    fn video(source: TrackSource, name: &str, codec: Codec, width: u32, height: u32) -> Self {
        let layer = VideoLayer { width, height, bitrate: 1_700_000, fps: 30.0 };
        Self { codec, source, name: name.to_owned(), layers: vec![layer], stereo: false, muted: false }
    }
}
