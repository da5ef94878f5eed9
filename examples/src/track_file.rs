//! One received track as a file: Opus in Ogg (RFC 7845), VP8 in IVF.

use std::{
    fmt,
    fs::File,
    io::{self, BufWriter, Seek as _, SeekFrom, Write as _},
    path::Path,
    time::{Duration, Instant},
};

use antiphon_call_sdk::{Codec, opus_duration};
use ogg::{PacketWriteEndInfo, PacketWriter};

/// The file of one track. Time zero of all files is the same instant, so that they play in step.
pub struct TrackFile {
    form: Form,
    begin: Instant,
}

enum Form {
    Ogg {
        writer: PacketWriter<'static, BufWriter<File>>,
        /// How far the file has got; Opus has no timestamps but counts.
        end: Duration,
        /// First byte of the last packet: its configuration (RFC 6716 §3.1).
        toc: u8,
    },
    Ivf {
        writer: BufWriter<File>,
        frames: u32,
    },
}

impl TrackFile {
    /// The usual ending of file names for a codec; `None` if it cannot be written.
    #[must_use]
    pub fn extension(codec: Codec) -> Option<&'static str> {
        match codec {
            Codec::Opus => Some("ogg"),
            Codec::Vp8 => Some("ivf"),
            _ => None,
        }
    }

    /// Makes a new file, whose time counts from `begin`.
    ///
    /// # Errors
    /// [`io::ErrorKind::Unsupported`] for a codec other than Opus and VP8, [`io::ErrorKind::AlreadyExists`], and whatever
    /// the file system says.
    pub fn create(path: &Path, codec: Codec, begin: Instant) -> io::Result<Self> {
        let form = match codec {
            Codec::Opus => {
                let mut writer = PacketWriter::new(BufWriter::new(File::create_new(path)?));
                // Version 1, two channels, nothing skipped, made at 48 kHz, no gain, plain stereo (RFC 7845 §5.1).
                let mut head = b"OpusHead\x01\x02\0\0".to_vec();
                head.extend_from_slice(&48_000_u32.to_le_bytes());
                head.extend_from_slice(&[0; 3]);
                writer.write_packet(head, SERIAL, PacketWriteEndInfo::EndPage, 0)?;
                // Eight bytes of vendor, no comment (RFC 7845 §5.2).
                let tags = b"OpusTags\x08\0\0\0Antiphon\0\0\0\0".to_vec();
                writer.write_packet(tags, SERIAL, PacketWriteEndInfo::EndPage, 0)?;
                Form::Ogg { writer, end: Duration::ZERO, toc: 0xfc }
            }
            Codec::Vp8 => Form::Ivf { writer: BufWriter::new(File::create_new(path)?), frames: 0 },
            _ => return Err(io::ErrorKind::Unsupported.into()),
        };
        Ok(Self { form, begin })
    }

    /// Writes a frame that plays `at` this time. Video before the first key frame is left out, as no decoder can use it.
    ///
    /// # Errors
    /// Whatever the file system says.
    pub fn write(&mut self, at: Duration, frame: &[u8]) -> io::Result<()> {
        match &mut self.form {
            Form::Ogg { writer, end, toc } => {
                let (Some(length), Some(first)) = (opus_duration(frame), frame.first()) else {
                    return Ok(());
                };
                // A gap is filled with empty frames, which decoders conceal (RFC 7845 §4.1). The clock bounds how much
                // a sender with wild timestamps can make us write.
                let filler = opus_duration(&[*first & !3]).unwrap_or(length);
                let until = at.min(self.begin.elapsed());
                while *end + filler <= until {
                    *end += filler;
                    writer.write_packet(
                        vec![*first & !3],
                        SERIAL,
                        PacketWriteEndInfo::NormalPacket,
                        samples(*end),
                    )?;
                }
                *end += length;
                *toc = *first;
                writer.write_packet(frame.to_vec(), SERIAL, PacketWriteEndInfo::NormalPacket, samples(*end))
            }
            Form::Ivf { writer, frames } => {
                if *frames == 0 {
                    let Some((width, height)) = key_frame_size(frame) else { return Ok(()) };
                    let mut header = b"DKIF\0\0\x20\0VP80".to_vec();
                    header.extend_from_slice(&width.to_le_bytes());
                    header.extend_from_slice(&height.to_le_bytes());
                    // Time base 1/1000 s; then the number of frames, known at the end, and four unused bytes.
                    header.extend_from_slice(&1000_u32.to_le_bytes());
                    header.extend_from_slice(&1_u32.to_le_bytes());
                    header.extend_from_slice(&[0; 8]);
                    writer.write_all(&header)?;
                }
                *frames += 1;
                let length = u32::try_from(frame.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
                writer.write_all(&length.to_le_bytes())?;
                writer.write_all(&u64::try_from(at.as_millis()).unwrap_or(u64::MAX).to_le_bytes())?;
                writer.write_all(frame)
            }
        }
    }

    /// Completes the file. A file that is not finished still plays.
    ///
    /// # Errors
    /// Whatever the file system says.
    pub fn finish(self) -> io::Result<()> {
        match self.form {
            Form::Ogg { mut writer, end, toc } => {
                writer.write_packet(vec![toc & !3], SERIAL, PacketWriteEndInfo::EndStream, samples(end))?;
                writer.into_inner().flush()
            }
            Form::Ivf { mut writer, frames } => {
                writer.flush()?;
                if frames > 0 {
                    writer.seek(SeekFrom::Start(24))?;
                    writer.write_all(&frames.to_le_bytes())?;
                }
                writer.flush()
            }
        }
    }
}

impl fmt::Debug for TrackFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TrackFile").finish_non_exhaustive()
    }
}

/// There is one stream per file.
const SERIAL: u32 = 1;

/// Ogg counts Opus in samples of 48 kHz, whatever the packets hold.
fn samples(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX).saturating_mul(48) / 1000
}

/// Width and height in pixels from the head of a VP8 key frame (RFC 6386 §9.1); `None` for any other frame.
fn key_frame_size(frame: &[u8]) -> Option<(u16, u16)> {
    let [tag, _, _, 0x9d, 0x01, 0x2a, w0, w1, h0, h1, ..] = frame else { return None };
    let side = |low: u8, high: u8| u16::from_le_bytes([low, high]) & 0x3fff;
    (tag & 1 == 0).then(|| (side(*w0, *w1), side(*h0, *h1)))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use antiphon_call_sdk::Recording;

    use super::*;

    fn media(name: &str) -> Recording {
        Recording::open(Path::new(env!("CARGO_MANIFEST_DIR")).join("media").join(name)).unwrap()
    }

    /// Writes a recording and reads it back.
    fn copy(recording: &Recording, from: Duration) -> Recording {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("copy");
        let mut file = TrackFile::create(&path, recording.codec(), Instant::now()).unwrap();
        for frame in recording.frames() {
            file.write(from + frame.timestamp, &frame.payload).unwrap();
        }
        file.finish().unwrap();
        Recording::open(path).unwrap()
    }

    #[test]
    fn written_files_read_back_the_same() {
        for name in ["alice.ogg", "alice.ivf"] {
            let original = media(name);
            let copied = copy(&original, Duration::ZERO);
            // The end of an Ogg file is an empty packet.
            let frames = &copied.frames()[..original.frames().len()];
            assert_eq!(copied.codec(), original.codec());
            assert_eq!(copied.track().dimensions(), original.track().dimensions());
            for (copied, original) in frames.iter().zip(original.frames()) {
                assert_eq!(copied.payload, original.payload);
                assert!(copied.timestamp.abs_diff(original.timestamp) <= Duration::from_millis(1));
            }
        }
    }

    #[test]
    fn gaps_are_filled_no_further_than_the_clock() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("gap.ogg");
        let begin = Instant::now() - Duration::from_secs(2);
        let mut file = TrackFile::create(&path, Codec::Opus, begin).unwrap();
        let frame = &media("bob.ogg").frames()[0].payload.clone();
        file.write(Duration::from_secs(1), frame).unwrap();
        file.write(Duration::from_secs(100_000), frame).unwrap();
        file.finish().unwrap();
        let read = Recording::open(path).unwrap();
        let at: Vec<_> = read.frames().iter().filter(|f| f.payload == *frame).map(|f| f.timestamp).collect();
        assert_eq!(at[0], Duration::from_secs(1));
        assert!((Duration::from_secs(1)..Duration::from_secs(10)).contains(&at[1]), "{at:?}");
    }

    #[test]
    fn video_begins_with_a_key_frame() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("late.ivf");
        let recording = media("alice.ivf");
        let mut file = TrackFile::create(&path, Codec::Vp8, Instant::now()).unwrap();
        for frame in &recording.frames()[1..] {
            file.write(frame.timestamp, &frame.payload).unwrap();
        }
        file.finish().unwrap();
        let first = &Recording::open(path).unwrap().frames()[0].payload.clone();
        assert!(key_frame_size(first).is_some());
    }

    #[test]
    fn existing_file_is_not_overwritten() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("there.ogg");
        std::fs::write(&path, "precious").unwrap();
        let error = TrackFile::create(&path, Codec::Opus, Instant::now()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
    }
}
