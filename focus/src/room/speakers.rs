//! Who is speaking, from the levels that the media plane reports.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::ids::SessionId;
use crate::plane::TrackKey;

/// How often changes are told.
pub(crate) const INTERVAL: Duration = Duration::from_millis(400);
/// A source that was loud for this share of an interval is active.
const ACTIVE_SHARE: f32 = 0.4;
/// Intervals that the level is smoothed over.
const SMOOTHING: f32 = 2.0;
/// Levels are told in eighths.
const STEPS: f32 = 8.0;
/// A source that was silent for this long without a report has stopped.
const STALE: Duration = Duration::from_millis(1200);

/// A change to tell: how loud a participant is, 0.0..=1.0 in eighths.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Change {
    pub(crate) session: SessionId,
    /// The loudest of its tracks, or the one that fell silent: whoever subscribes to it is told.
    pub(crate) track: TrackKey,
    pub(crate) level: f32,
    pub(crate) active: bool,
}

/// The sound of a room.
#[derive(Debug, Default)]
pub(crate) struct Speakers {
    tracks: BTreeMap<TrackKey, Level>,
    told: BTreeMap<SessionId, (f32, TrackKey)>,
    flushed: Option<Instant>,
}

#[derive(Debug)]
struct Level {
    session: SessionId,
    smoothed: f32,
    at: Instant,
}

impl Speakers {
    /// Takes a report: `level` in −dBov, `active_share` of the interval at or above −35 dBov.
    pub(crate) fn report(
        &mut self,
        now: Instant,
        session: SessionId,
        track: TrackKey,
        level: u8,
        active_share: f32,
    ) {
        let loud = if active_share >= ACTIVE_SHARE {
            // Loudness of the whole interval: the level, lessened by the share of it that was quiet.
            let decibels = -f32::from(level.min(127)) + 20.0 * active_share.clamp(0.01, 1.0).log10();
            10f32.powf(decibels / 20.0).clamp(0.0, 1.0)
        } else {
            0.0
        };
        let entry = self.tracks.entry(track).or_insert(Level { session, smoothed: 0.0, at: now });
        entry.smoothed += (loud - entry.smoothed) / SMOOTHING;
        // Halving never reaches zero.
        if loud == 0.0 && entry.smoothed < 0.01 {
            entry.smoothed = 0.0;
        }
        entry.at = now;
    }

    /// Forgets a participant that has left; nobody is told about it again.
    pub(crate) fn forget(&mut self, session: SessionId) {
        self.tracks.retain(|_, level| level.session != session);
        self.told.remove(&session);
    }

    /// Silences a track that has ended or was muted.
    pub(crate) fn silence(&mut self, track: TrackKey) {
        self.tracks.remove(&track);
    }

    /// What has changed since the last time, at most once per interval.
    pub(crate) fn changes(&mut self, now: Instant) -> Vec<Change> {
        if self.flushed.is_some_and(|flushed| now < flushed + INTERVAL) {
            return Vec::new();
        }
        self.flushed = Some(now);
        self.tracks.retain(|_, level| now < level.at + STALE);
        let mut loudest: BTreeMap<SessionId, (f32, TrackKey)> = BTreeMap::new();
        for (track, level) in &self.tracks {
            let quantised = (level.smoothed * STEPS).ceil() / STEPS;
            let entry = loudest.entry(level.session).or_insert((quantised, *track));
            if quantised > entry.0 {
                *entry = (quantised, *track);
            }
        }
        let mut changes = Vec::new();
        for (session, (level, track)) in &loudest {
            let before = self.told.get(session).map_or(0.0, |(level, _)| *level);
            if before != *level {
                changes.push(Change {
                    session: *session,
                    track: *track,
                    level: *level,
                    active: *level > 0.0,
                });
            }
        }
        for (session, (before, track)) in &self.told {
            if *before > 0.0 && !loudest.contains_key(session) {
                changes.push(Change { session: *session, track: *track, level: 0.0, active: false });
            }
        }
        self.told = loudest;
        changes
    }
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "a test needs one instant to count from")]
mod tests {
    use super::*;

    const ALICE: SessionId = SessionId(1);
    const MIC: TrackKey = TrackKey(1);

    #[test]
    fn a_speaker_becomes_active_once_and_inactive_once() {
        let start = Instant::now();
        let mut speakers = Speakers::default();
        let mut told = Vec::new();
        for step in 0u32..20 {
            let now = start + INTERVAL * step;
            // Loud for eight intervals, then silent.
            let (level, share) = if step < 8 { (6, 1.0) } else { (127, 0.0) };
            speakers.report(now, ALICE, MIC, level, share);
            told.extend(speakers.changes(now));
        }
        assert!(told.first().is_some_and(|change| change.active && change.level > 0.0));
        assert_eq!(told.iter().filter(|change| !change.active).count(), 1);
        assert!(told.last().is_some_and(|change| !change.active && change.level == 0.0));
        assert!(told.iter().all(|change| change.level * 8.0 % 1.0 == 0.0));
    }

    #[test]
    fn a_short_noise_is_no_speaker_and_a_lost_track_falls_silent() {
        let start = Instant::now();
        let mut speakers = Speakers::default();
        speakers.report(start, ALICE, MIC, 6, 0.2);
        assert!(speakers.changes(start).is_empty());
        speakers.report(start + INTERVAL, ALICE, MIC, 6, 1.0);
        assert_eq!(speakers.changes(start + INTERVAL).len(), 1);
        let gone = speakers.changes(start + INTERVAL + STALE);
        assert_eq!(gone.len(), 1);
        assert!(!gone[0].active);
    }
}
