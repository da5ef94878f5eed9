//! Sound as samples: Opus (RFC 6716) in front of a local track and behind a remote one.
//!
//! Samples are signed 16-bit at 48 kHz, those of two channels interleaved, left first. A sound card with another rate
//! needs a resampler in front.

use std::{fmt, time::Duration};

use opus_pure::{Application, MAX_PACKET_BYTES, OpusDecoder, OpusEncoder};

use super::EncodedFrame;

/// Samples per second and channel.
pub const SAMPLE_RATE: u32 = 48_000;
/// Samples per channel in one frame: 20 ms, what every deployed client sends.
pub const FRAME_SAMPLES: usize = 960;
/// Longest frame that Opus has, in samples per channel: 120 ms.
const MAX_SAMPLES: usize = 5_760;
/// Longest gap that is filled. After a longer one the sound was away, and the filling would only be noise.
const MAX_GAP: Duration = Duration::from_millis(120);
/// Bits per second and channel: transparent for speech.
const BITRATE: i32 = 32_000;
/// Share of packets for whose loss the encoder prepares, in percent.
const EXPECTED_LOSS: i32 = 5;
/// The audio level of silence, in −dBov (RFC 6464).
const SILENCE: u8 = 127;

/// A frame, and how loud it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PcmFrame {
    /// One Opus packet of 20 ms.
    pub frame: EncodedFrame,
    /// Its level in −dBov, from 0 (loudest) to 127 (silence), as RFC 6464 has it.
    pub level: u8,
}

/// Samples into Opus packets of 20 ms.
pub struct PcmEncoder {
    encoder: OpusEncoder,
    channels: usize,
    /// Samples that do not fill a frame yet.
    pending: Vec<i16>,
    /// Samples per channel since the start of the track.
    position: u64,
    packet: Vec<u8>,
}

impl PcmEncoder {
    /// An encoder for one channel (tuned for speech) or two (tuned for music).
    ///
    /// # Errors
    /// [`PcmError`] if the codec does not start; that does not depend on input.
    pub fn new(stereo: bool) -> Result<Self, PcmError> {
        let (channels, application) = if stereo { (2, Application::Audio) } else { (1, Application::Voip) };
        let mut encoder = OpusEncoder::new(48_000, channels, application).map_err(PcmError)?;
        encoder.bitrate_bps = if stereo { BITRATE * 2 } else { BITRATE };
        encoder.use_inband_fec = true;
        encoder.packet_loss_perc = EXPECTED_LOSS;
        let packet = vec![0; MAX_PACKET_BYTES];
        Ok(Self { encoder, channels, pending: Vec::new(), position: 0, packet })
    }

    /// Takes samples in, and hands every full frame to `each`. Any number of samples may come; what does not fill a
    /// frame waits for the next call.
    ///
    /// # Errors
    /// [`PcmError`] from the codec; what `each` returns. Frames before it were handed over.
    pub fn push<E: From<PcmError>>(
        &mut self,
        samples: &[i16],
        mut each: impl FnMut(PcmFrame) -> Result<(), E>,
    ) -> Result<(), E> {
        self.pending.extend_from_slice(samples);
        let length = FRAME_SAMPLES * self.channels;
        while self.pending.len() >= length {
            let encoded = self.encode();
            self.pending.drain(..length);
            self.position += FRAME_SAMPLES as u64;
            each(encoded?)?;
        }
        Ok(())
    }

    /// Moves the media clock on after a time in which no samples came. What waited for the rest of a frame is dropped.
    pub fn skip(&mut self, time: Duration) {
        self.pending.clear();
        let samples = time.as_nanos() * u128::from(SAMPLE_RATE) / 1_000_000_000;
        self.position = self.position.saturating_add(u64::try_from(samples).unwrap_or(u64::MAX));
    }

    /// The first frame of what waits.
    fn encode(&mut self) -> Result<PcmFrame, PcmError> {
        let samples = &self.pending[..FRAME_SAMPLES * self.channels];
        let length = self.encoder.encode_s16(samples, FRAME_SAMPLES, &mut self.packet).map_err(PcmError)?;
        let timestamp = Duration::from_nanos(nanoseconds(self.position));
        let frame = EncodedFrame::new(self.packet[..length].to_vec(), timestamp);
        Ok(PcmFrame { frame, level: level(samples) })
    }
}

impl fmt::Debug for PcmEncoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PcmEncoder").field("channels", &self.channels).finish_non_exhaustive()
    }
}

/// Opus packets of one track into samples, with gaps filled.
pub struct PcmDecoder {
    decoder: OpusDecoder,
    channels: usize,
    /// Media time at which the next frame continues.
    next: Option<Duration>,
    samples: Vec<i16>,
}

impl PcmDecoder {
    /// A decoder that gives one channel or two, whatever the sender encoded.
    ///
    /// # Errors
    /// [`PcmError`] if the codec does not start; that does not depend on input.
    pub fn new(stereo: bool) -> Result<Self, PcmError> {
        let channels = if stereo { 2 } else { 1 };
        let decoder = OpusDecoder::new(48_000, channels).map_err(PcmError)?;
        Ok(Self { decoder, channels, next: None, samples: Vec::new() })
    }

    /// The samples of a frame. After a gap of at most 120 ms they begin with concealment samples, so that playback
    /// keeps its timing. Returns no samples for a frame that arrives up to 120 ms late.
    ///
    /// # Errors
    /// [`PcmError`] if the payload is not a valid Opus packet. Decoding may continue with the next frame.
    pub fn decode(&mut self, frame: &EncodedFrame) -> Result<&[i16], PcmError> {
        self.samples.clear();
        if let Some(next) = self.next {
            if frame.timestamp < next.saturating_sub(MAX_GAP) {
                // The track began anew.
                self.next = None;
            } else if frame.timestamp < next {
                return Ok(&self.samples);
            } else if frame.timestamp - next <= MAX_GAP {
                self.fill(frame.timestamp - next, &frame.payload);
            }
        }
        let decoded = self.append(MAX_SAMPLES, |decoder, samples| {
            decoder.decode_s16(&frame.payload, MAX_SAMPLES, samples)
        })?;
        self.next = Some(frame.timestamp + Duration::from_nanos(nanoseconds(decoded as u64)));
        Ok(&self.samples)
    }

    /// Fills a gap before a packet: its last 20 ms from the copy that the packet may carry, the rest by concealment.
    fn fill(&mut self, gap: Duration, packet: &[u8]) {
        let frames = usize::try_from(gap.as_millis() / 20).unwrap_or_default();
        for left in (0..frames).rev() {
            let filled = self.append(FRAME_SAMPLES, |decoder, samples| match left {
                0 => decoder.decode_fec_s16(packet, FRAME_SAMPLES, samples),
                _ => decoder.decode_s16(&[], FRAME_SAMPLES, samples),
            });
            if filled.is_err() {
                return;
            }
        }
    }

    fn append(
        &mut self,
        room: usize,
        decode: impl FnOnce(&mut OpusDecoder, &mut [i16]) -> Result<usize, opus_pure::Error>,
    ) -> Result<usize, PcmError> {
        let before = self.samples.len();
        self.samples.resize(before + room * self.channels, 0);
        let decoded = decode(&mut self.decoder, &mut self.samples[before..]);
        let kept = decoded.as_ref().map_or(0, |decoded| (*decoded).min(room));
        self.samples.truncate(before + kept * self.channels);
        decoded.map(|_| kept).map_err(PcmError)
    }
}

impl fmt::Debug for PcmDecoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PcmDecoder").field("channels", &self.channels).finish_non_exhaustive()
    }
}

/// The Opus codec refuses what it was given.
#[derive(Debug, thiserror::Error)]
#[error("the Opus codec refuses it: {0}")]
pub struct PcmError(opus_pure::Error);

/// How long so many samples per channel last, in nanoseconds.
fn nanoseconds(samples: u64) -> u64 {
    let nanoseconds = u128::from(samples) * 1_000_000_000 / u128::from(SAMPLE_RATE);
    u64::try_from(nanoseconds).unwrap_or(u64::MAX)
}

/// The level of samples in −dBov (RFC 6464 §3): the root mean square against the loudest sample.
fn level(samples: &[i16]) -> u8 {
    let square = |sample: &i16| f64::from(*sample) * f64::from(*sample);
    let mean = samples.iter().map(square).sum::<f64>() / samples.len().max(1) as f64;
    let below = -20.0 * (mean.sqrt() / 32_768.0).log10();
    if below.is_finite() { below.round().clamp(0.0, f64::from(SILENCE)) as u8 } else { SILENCE }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A tone of 440 Hz at half of the full amplitude.
    fn tone(samples: usize) -> Vec<i16> {
        let sample = |n| 16_384.0 * (n as f64 * 440.0 * std::f64::consts::TAU / 48_000.0).sin();
        (0..samples).map(|n| sample(n) as i16).collect()
    }

    fn frames(encoder: &mut PcmEncoder, samples: &[i16]) -> Vec<PcmFrame> {
        let mut frames = Vec::new();
        encoder
            .push(samples, |frame| {
                frames.push(frame);
                Ok::<_, PcmError>(())
            })
            .unwrap();
        frames
    }

    #[test]
    fn samples_in_any_portions_become_frames_of_20_ms() {
        let mut encoder = PcmEncoder::new(false).unwrap();
        let sound = tone(FRAME_SAMPLES * 10);
        let got: Vec<_> = sound.chunks(441).flat_map(|part| frames(&mut encoder, part)).collect();
        assert_eq!(got.len(), 10);
        for (frame, number) in got.iter().zip(0..) {
            assert_eq!(frame.frame.timestamp, Duration::from_millis(20) * number);
        }
        // A sine at half amplitude is 6 + 3 dB below the loudest.
        assert_eq!(got[5].level, 9);
        encoder.skip(Duration::from_secs(1));
        let silence = frames(&mut encoder, &[0; FRAME_SAMPLES]);
        assert_eq!((silence[0].level, silence[0].frame.timestamp), (127, Duration::from_millis(1_200)));
    }

    #[test]
    fn tone_survives_encoding_and_a_lost_frame_is_filled() {
        for stereo in [false, true] {
            let channels = if stereo { 2 } else { 1 };
            let mut encoder = PcmEncoder::new(stereo).unwrap();
            let mut decoder = PcmDecoder::new(stereo).unwrap();
            let sound: Vec<_> =
                tone(FRAME_SAMPLES * 50).iter().flat_map(|sample| vec![*sample; channels]).collect();
            let mut heard = Vec::new();
            for (number, frame) in frames(&mut encoder, &sound).iter().enumerate() {
                if number != 20 {
                    heard.extend_from_slice(decoder.decode(&frame.frame).unwrap());
                }
            }
            assert_eq!(heard.len(), sound.len(), "the pace is kept");
            let loudness = |part: &[i16]| level(part);
            for (number, part) in heard.chunks(FRAME_SAMPLES * channels).enumerate().skip(2) {
                assert!((7..=14).contains(&loudness(part)), "frame {number}: {}", loudness(part));
            }
        }
    }

    #[test]
    fn late_frames_and_garbage_do_no_harm() {
        let mut encoder = PcmEncoder::new(false).unwrap();
        let mut decoder = PcmDecoder::new(false).unwrap();
        let sound = frames(&mut encoder, &tone(FRAME_SAMPLES * 4));
        assert_eq!(decoder.decode(&sound[1].frame).unwrap().len(), FRAME_SAMPLES);
        assert!(decoder.decode(&sound[0].frame).unwrap().is_empty(), "late");
        let garbage = EncodedFrame::new(vec![0xff; 3], Duration::from_millis(40));
        assert!(decoder.decode(&garbage).is_err());
        assert_eq!(decoder.decode(&sound[3].frame).unwrap().len(), 2 * FRAME_SAMPLES);
    }

    proptest::proptest! {
        #[test]
        fn decoder_takes_any_bytes(payload: Vec<u8>, milliseconds in 0_u64..400) {
            let mut decoder = PcmDecoder::new(true).unwrap();
            let _ = decoder.decode(&EncodedFrame::new(payload.clone(), Duration::ZERO));
            let _ = decoder.decode(&EncodedFrame::new(payload, Duration::from_millis(milliseconds)));
        }
    }
}
