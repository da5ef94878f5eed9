//! How loud a track is: RFC 6464 levels of its packets, summed up every 400 ms.

use std::time::{Duration, Instant};

/// Length of a window. LiveKit clients expect speaker updates at this pace.
pub(crate) const WINDOW: Duration = Duration::from_millis(400);
/// A packet at or above this level (−dBov, so at or below this number) counts as speech.
const ACTIVE: u8 = 35;
/// Silence in −dBov.
const SILENCE: u8 = 127;
/// Opus frames are at most this long (RFC 6716 §2.1.4); a longer step of the timestamp is a pause.
const LONGEST_PACKET: Duration = Duration::from_millis(120);
/// What a packet lasts when its predecessor does not tell.
const USUAL_PACKET: Duration = Duration::from_millis(20);
/// Opus always counts 48 kHz on the wire (RFC 7587 §4.1).
const CLOCK_RATE: u64 = 48_000;

/// One window's result.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Level {
    /// −dBov of the loudest packet; 127 is silence.
    pub(crate) loudest: u8,
    /// Share of the window covered by packets at or above −35 dBov, 0.0..=1.0.
    pub(crate) active_share: f32,
}

/// The running window of one track.
#[derive(Debug, Default)]
pub(crate) struct AudioLevels {
    window: Option<Window>,
    last_timestamp: Option<u32>,
    /// The last window reported was not silent, so silence must be reported once.
    was_audible: bool,
}

#[derive(Debug)]
struct Window {
    began: Instant,
    loudest: u8,
    active: Duration,
}

impl AudioLevels {
    /// Takes a packet's level (−dBov) and RTP timestamp.
    pub(crate) fn observe(&mut self, now: Instant, timestamp: u32, level: u8) {
        let level = level.min(SILENCE);
        let lasts = self.last_timestamp.map_or(USUAL_PACKET, |last| {
            let step = u64::from(timestamp.wrapping_sub(last));
            let step = Duration::from_micros(step * 1_000_000 / CLOCK_RATE);
            if step.is_zero() || step > LONGEST_PACKET { USUAL_PACKET } else { step }
        });
        self.last_timestamp = Some(timestamp);
        let window =
            self.window.get_or_insert(Window { began: now, loudest: SILENCE, active: Duration::ZERO });
        window.loudest = window.loudest.min(level);
        if level <= ACTIVE {
            window.active += lasts;
        }
    }

    /// Ends the window if it is over. A track that falls silent is reported once more, as silence.
    pub(crate) fn poll(&mut self, now: Instant) -> Option<Level> {
        let window = self.window.as_ref()?;
        if now.saturating_duration_since(window.began) < WINDOW {
            return None;
        }
        let level = Level {
            loudest: window.loudest,
            active_share: (window.active.as_secs_f32() / WINDOW.as_secs_f32()).min(1.0),
        };
        let audible = level.loudest < SILENCE;
        // The next window is opened by a packet; while a track is audible one is opened here, so that the
        // silence after a sender that stops (mute, DTX) is noticed too.
        self.window = audible.then_some(Window { began: now, loudest: SILENCE, active: Duration::ZERO });
        let report = audible || self.was_audible;
        self.was_audible = audible;
        report.then_some(level)
    }
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "virtual time begins somewhere")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn speak(levels: &mut AudioLevels, from: Instant, packets: u32, level: u8) {
        for i in 0..packets {
            levels.observe(from + Duration::from_millis(20) * i, i * 960, level);
        }
    }

    #[test]
    fn half_a_window_of_speech_is_half_active() {
        let start = Instant::now();
        let mut levels = AudioLevels::default();
        speak(&mut levels, start, 10, 20);
        assert_eq!(levels.poll(start + Duration::from_millis(399)), None);
        let level = levels.poll(start + WINDOW).unwrap();
        assert_eq!(level.loudest, 20);
        assert!((level.active_share - 0.5).abs() < 0.01, "{level:?}");
    }

    #[test]
    fn a_quiet_track_is_not_active_and_silence_is_told_once() {
        let start = Instant::now();
        let mut levels = AudioLevels::default();
        speak(&mut levels, start, 20, 60);
        assert_eq!(levels.poll(start + WINDOW), Some(Level { loudest: 60, active_share: 0.0 }));
        assert_eq!(levels.poll(start + 2 * WINDOW), Some(Level { loudest: 127, active_share: 0.0 }));
        assert_eq!(levels.poll(start + 3 * WINDOW), None);
        speak(&mut levels, start + 4 * WINDOW, 20, 127);
        assert_eq!(levels.poll(start + 5 * WINDOW), None);
    }

    proptest! {
        #[test]
        fn the_share_is_a_share(packets in proptest::collection::vec((any::<u32>(), any::<u8>()), 0..200)) {
            let start = Instant::now();
            let mut levels = AudioLevels::default();
            for (timestamp, level) in packets {
                levels.observe(start, timestamp, level);
            }
            if let Some(level) = levels.poll(start + WINDOW) {
                prop_assert!((0.0..=1.0).contains(&level.active_share));
                prop_assert!(level.loudest <= 127);
            }
        }
    }
}
