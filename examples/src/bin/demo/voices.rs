//! How long each voice was silent, and since when it travels as it does.

use std::{
    collections::HashMap,
    fmt,
    time::{Duration, Instant},
};

use matrix_sdk::ruma::OwnedUserId;

/// What one member hears of the others' sound.
#[derive(Debug, Default)]
pub(crate) struct Voices(HashMap<OwnedUserId, Voice>);

#[derive(Debug)]
struct Voice {
    last: Instant,
    /// Between two frames, since [`Voices::begin`].
    longest: Duration,
    /// Since [`Voices::begin`] or [`Voices::moved`].
    frames: u64,
}

impl Voices {
    pub(crate) fn heard(&mut self, speaker: &OwnedUserId) {
        let now = Instant::now();
        let new = || Voice { last: now, longest: Duration::ZERO, frames: 0 };
        let voice = self.0.entry(speaker.clone()).or_insert_with(new);
        voice.longest = voice.longest.max(now - voice.last);
        voice.last = now;
        voice.frames += 1;
    }

    /// Measures from now on.
    pub(crate) fn begin(&mut self) {
        self.0.values_mut().for_each(|voice| (voice.longest, voice.frames) = (Duration::ZERO, 0));
    }

    /// Counts frames from now on, because they take another path.
    pub(crate) fn moved(&mut self) {
        self.0.values_mut().for_each(|voice| voice.frames = 0);
    }

    /// How many speakers were heard with at least so many frames.
    pub(crate) fn with_frames(&self, least: u64) -> usize {
        self.0.values().filter(|voice| voice.frames >= least).count()
    }

    /// The longest silence of each voice, the present one included.
    pub(crate) fn silences(&self) -> impl Iterator<Item = Duration> {
        self.0.values().map(|voice| voice.longest.max(voice.last.elapsed()))
    }
}

/// The silences of all voices at all listeners.
pub(crate) struct Silences {
    pub(crate) median: Duration,
    pub(crate) longest: Duration,
}

impl Silences {
    pub(crate) fn of(mut silences: Vec<Duration>) -> Self {
        silences.sort();
        let at = |index: usize| silences.get(index).copied().unwrap_or(Duration::MAX);
        Self { median: at(silences.len() / 2), longest: at(silences.len().saturating_sub(1)) }
    }
}

impl fmt::Display for Silences {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "median {} ms, longest {} ms", self.median.as_millis(), self.longest.as_millis())
    }
}
