//! Recordings to play into a call: VP8 in IVF, Opus in Ogg.

use std::{
    io::{Read, Seek},
    path::Path,
    time::Duration,
};

use super::{Codec, EncodedFrame, TrackSpec};

/// Longest recording that is read, in frames: an hour of VP8 at 60 frames per second.
const MAX_FRAMES: usize = 216_000;
/// Largest file that is read, in bytes; recordings are held in memory.
const MAX_FILE: u64 = 512 * 1024 * 1024;
/// Longest recording that is played; later timestamps mean a damaged file.
const MAX_DURATION: Duration = Duration::from_secs(24 * 3600);
/// Length of the file header of IVF, in bytes.
const IVF_HEADER: usize = 32;
/// Length of the header of each frame in IVF: length (4 bytes) and time (8), little-endian.
const IVF_FRAME_HEADER: usize = 12;

/// A recording in memory, to be played once or in a loop.
#[derive(Clone, Debug)]
pub struct Recording {
    codec: Codec,
    dimensions: (u32, u32),
    frames: Vec<EncodedFrame>,
    duration: Duration,
}

impl Recording {
    /// Reads a `.ivf` file (VP8) or an Ogg file (Opus), distinguished by their first bytes.
    ///
    /// # Errors
    /// [`RecordingError`] if the file cannot be read or played.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, RecordingError> {
        let file = std::fs::File::open(path)?;
        if file.metadata()?.len() > MAX_FILE {
            return Err(RecordingError::Unusable("it is larger than 512 MiB".to_owned()));
        }
        Self::read(std::io::BufReader::new(file))
    }

    /// [`Recording::open`] from any seekable reader.
    ///
    /// # Errors
    /// As [`Recording::open`].
    pub fn read<R: Read + Seek>(mut from: R) -> Result<Self, RecordingError> {
        let mut magic = [0; 4];
        from.read_exact(&mut magic)?;
        from.rewind()?;
        match &magic {
            b"DKIF" => Self::from_ivf(from),
            b"OggS" => Self::from_ogg(from),
            _ => Err(RecordingError::Unusable("it is neither IVF nor Ogg".to_owned())),
        }
    }

    /// The codec of every frame.
    #[must_use]
    pub fn codec(&self) -> Codec {
        self.codec
    }

    /// A track to publish this recording as: a microphone or a camera.
    #[must_use]
    pub fn track(&self) -> TrackSpec {
        match self.codec {
            Codec::Opus => TrackSpec::microphone(),
            _ => TrackSpec::camera(self.dimensions.0, self.dimensions.1),
        }
    }

    /// The frames in order, with timestamps from zero.
    #[must_use]
    pub fn frames(&self) -> &[EncodedFrame] {
        &self.frames
    }

    /// Playing time.
    #[must_use]
    pub fn duration(&self) -> Duration {
        self.duration
    }

    /// The frames in an endless loop with growing timestamps. Write each at its timestamp.
    pub fn looped(&self) -> impl Iterator<Item = EncodedFrame> + '_ {
        (0u32..).flat_map(|round| {
            let start = self.duration * round;
            self.frames.iter().map(move |f| EncodedFrame::new(f.payload.clone(), f.timestamp + start))
        })
    }

    /// Checks every length in the file against the bytes that are there before it allocates.
    fn from_ivf(mut from: impl Read) -> Result<Self, RecordingError> {
        let unusable = |what: &str| RecordingError::Unusable(what.to_owned());
        let mut bytes = Vec::new();
        from.by_ref().take(MAX_FILE).read_to_end(&mut bytes)?;
        let header = bytes.get(..IVF_HEADER).ok_or_else(|| unusable("its IVF header is cut short"))?;
        if &header[8..12] != b"VP80" {
            return Err(unusable("its video is not VP8"));
        }
        let (denominator, numerator) = (u64::from(le32(header, 16)), u64::from(le32(header, 20)));
        if numerator == 0 || denominator == 0 {
            return Err(unusable("its time base is zero"));
        }
        let time = |units: u64| {
            Duration::from_micros(units.saturating_mul(1_000_000).saturating_mul(numerator) / denominator)
        };
        let mut frames = Vec::new();
        let mut at = usize::from(le16(header, 6)).max(IVF_HEADER);
        // A truncated file plays up to its last whole frame.
        while let Some(frame) = bytes.get(at..at + IVF_FRAME_HEADER) {
            let length = usize::try_from(le32(frame, 0)).unwrap_or(usize::MAX);
            let units = u64::from(le32(frame, 4)) | u64::from(le32(frame, 8)) << 32;
            let start = at + IVF_FRAME_HEADER;
            let Some(end) = start.checked_add(length).filter(|end| *end <= bytes.len()) else { break };
            if frames.len() == MAX_FRAMES {
                return Err(unusable("it has more than 216,000 frames"));
            }
            frames.push(EncodedFrame::new(&bytes[start..end], time(units)));
            at = end;
        }
        let last = frames.last().ok_or_else(|| unusable("it has no frame"))?;
        let longest = frames.iter().map(|f| f.timestamp).max().unwrap_or_default();
        if longest > MAX_DURATION {
            return Err(unusable("its frames claim to last longer than a day"));
        }
        let duration = last.timestamp + time(1).min(MAX_DURATION);
        let dimensions = (u32::from(le16(header, 12)), u32::from(le16(header, 14)));
        Ok(Self { codec: Codec::Vp8, dimensions, frames, duration })
    }

    fn from_ogg(from: impl Read + Seek) -> Result<Self, RecordingError> {
        let mut reader = ogg::PacketReader::new(from);
        let mut next =
            || reader.read_packet().map_err(|e| RecordingError::Unusable(format!("its Ogg pages: {e}")));
        match next()? {
            Some(head) if head.data.starts_with(b"OpusHead") => {}
            _ => return Err(RecordingError::Unusable("its audio is not Opus".to_owned())),
        }
        // The comment header (RFC 7845 §5.2) holds no audio.
        next()?;
        let mut frames = Vec::new();
        let mut timestamp = Duration::ZERO;
        while let Some(packet) = next()? {
            let Some(duration) = opus_duration(&packet.data) else { continue };
            if frames.len() == MAX_FRAMES {
                return Err(RecordingError::Unusable("it has more than 216,000 frames".to_owned()));
            }
            frames.push(EncodedFrame::new(packet.data, timestamp));
            timestamp += duration;
        }
        if frames.is_empty() {
            return Err(RecordingError::Unusable("it has no frame".to_owned()));
        }
        Ok(Self { codec: Codec::Opus, dimensions: (0, 0), frames, duration: timestamp })
    }
}

/// Why a recording cannot be played.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RecordingError {
    /// The file cannot be read.
    #[error("the recording cannot be read")]
    Io(#[from] std::io::Error),
    /// The file is in a format that is not supported, or damaged.
    #[error("the recording cannot be played: {0}; VP8 in IVF and Opus in Ogg can")]
    Unusable(String),
}

fn le16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// Playing time of an Opus packet, from its first bytes (RFC 6716 §3.1, §3.2); `None` for an invalid packet.
#[must_use]
pub fn opus_duration(packet: &[u8]) -> Option<Duration> {
    let toc = *packet.first()?;
    let frame_us = match toc >> 3 {
        config @ 0..=11 => [10_000, 20_000, 40_000, 60_000][usize::from(config & 3)],
        config @ 12..=15 => [10_000, 20_000][usize::from(config & 1)],
        config => [2_500, 5_000, 10_000, 20_000][usize::from(config & 3)],
    };
    let frames = match toc & 3 {
        0 => 1,
        1 | 2 => 2,
        _ => u64::from(*packet.get(1)? & 0x3f),
    };
    let duration = Duration::from_micros(frame_us * frames);
    (frames > 0 && duration <= Duration::from_millis(120)).then_some(duration)
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;

    #[test]
    fn opus_packet_has_the_duration_of_its_header() {
        assert_eq!(opus_duration(&[0x78]), Some(Duration::from_millis(20)));
        assert_eq!(opus_duration(&[0xfb, 0x03]), Some(Duration::from_millis(60)));
        assert_eq!(opus_duration(&[0xfb, 0x3f]), None);
        assert_eq!(opus_duration(&[]), None);
    }

    #[test]
    fn unsupported_file_is_refused_with_a_reason() {
        let error = Recording::read(Cursor::new(b"RIFF....".to_vec())).unwrap_err();
        assert!(error.to_string().contains("neither IVF nor Ogg"), "{error}");
        let mut ivf = b"DKIF\0\0 \0AV01".to_vec();
        ivf.resize(32, 0);
        assert!(Recording::read(Cursor::new(ivf)).is_err());
    }

    proptest::proptest! {
        #[test]
        fn hostile_file_does_not_panic(tail in proptest::collection::vec(proptest::num::u8::ANY, 0..200), ogg in proptest::bool::ANY) {
            let mut bytes = if ogg { b"OggS".to_vec() } else { b"DKIF\0\0 \0VP80".to_vec() };
            bytes.extend(tail);
            let _ = Recording::read(Cursor::new(bytes));
        }
    }
}
