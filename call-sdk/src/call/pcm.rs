//! A local track that is given samples.

use std::time::Duration;

use super::outgoing::{LocalTrack, WriteError};
use crate::media::{Codec, PcmEncoder, PcmError};

/// An Opus track that encodes what it is given, and tells its loudness to the SFU.
#[derive(Debug)]
pub struct PcmTrack {
    track: LocalTrack,
    encoder: PcmEncoder,
}

impl PcmTrack {
    /// Encodes for a published Opus track, in one channel or two as its description says.
    ///
    /// # Errors
    /// [`PcmWriteError::NotOpus`] for a track of another codec.
    pub fn new(track: LocalTrack) -> Result<Self, PcmWriteError> {
        if track.spec().codec != Codec::Opus {
            return Err(PcmWriteError::NotOpus(track.spec().codec));
        }
        let encoder = PcmEncoder::new(track.spec().stereo)?;
        Ok(Self { track, encoder })
    }

    /// Sends samples: signed 16-bit at 48 kHz, interleaved. Never waits; give them at the pace of real time.
    ///
    /// # Errors
    /// As [`LocalTrack::write`]; frames before our first key are dropped without an error.
    pub fn write(&mut self, samples: &[i16]) -> Result<(), PcmWriteError> {
        let Self { track, encoder } = self;
        encoder.push(samples, |encoded| {
            track.set_audio_level(Some(encoded.level));
            match track.write(&encoded.frame) {
                Ok(()) => Ok(()),
                Err(error) if error.is_before_our_key() => Ok(()),
                Err(error) => Err(PcmWriteError::Write(error)),
            }
        })
    }

    /// Moves the media clock on after a time without samples.
    pub fn skip(&mut self, time: Duration) {
        self.encoder.skip(time);
    }

    /// The track, to mute it.
    #[must_use]
    pub fn track(&self) -> &LocalTrack {
        &self.track
    }
}

/// Why samples were not sent.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PcmWriteError {
    /// The track is of another codec.
    #[error("samples can be written to Opus tracks only, and this one is {0:?}")]
    NotOpus(Codec),
    /// The codec refuses them.
    #[error(transparent)]
    Codec(#[from] PcmError),
    /// The frame was not sent.
    #[error(transparent)]
    Write(#[from] WriteError),
}
