//! One time base for all tracks of a member, so that its voice and its picture can be played in step.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// A correction larger than this is a broken sender report, not drift.
const MAX_CORRECTION: i128 = 60 * 1_000_000_000;

/// What the tracks of one member share: when the first frame came, and how the sender's clock relates to that.
#[derive(Debug, Default)]
pub struct MemberClock {
    base: Mutex<Base>,
}

#[derive(Debug, Default)]
struct Base {
    epoch: Option<Instant>,
    /// Sender time at media time zero, in nanoseconds.
    ntp_zero: Option<i128>,
}

impl MemberClock {
    /// Time since the first frame of any of the member's tracks.
    fn arrival(&self, now: Instant) -> Duration {
        let mut base = self.base.lock().unwrap_or_else(PoisonError::into_inner);
        now.saturating_duration_since(*base.epoch.get_or_insert(now))
    }

    /// Media time of the sender's time `ntp`; the first caller defines the relation by `here`.
    fn media_time(&self, ntp: i128, here: i128) -> i128 {
        let mut base = self.base.lock().unwrap_or_else(PoisonError::into_inner);
        ntp - *base.ntp_zero.get_or_insert(ntp - here)
    }
}

/// Turns the RTP timestamps of one track, which wrap, into media time of its member.
#[derive(Debug, Default)]
pub(crate) struct TrackClock {
    /// Last timestamp, and its distance from the first one in ticks.
    last: Option<(u32, i64)>,
    /// Media time of the first timestamp, in nanoseconds.
    offset: i128,
}

impl TrackClock {
    /// Media time of a frame. Frames of before the member's first frame count as zero.
    pub(crate) fn time(&mut self, member: &MemberClock, now: Instant, rtp: u32, clock_rate: u32) -> Duration {
        let ticks = match self.last {
            None => {
                self.offset = i128::try_from(member.arrival(now).as_nanos()).unwrap_or_default();
                0
            }
            // A signed difference keeps slightly older frames older (RFC 3550 §A.1).
            Some((last, ticks)) => ticks + i64::from(rtp.wrapping_sub(last).cast_signed()),
        };
        self.last = Some((rtp, ticks));
        let nanos = (self.offset + nanoseconds(ticks, clock_rate)).max(0);
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    /// A sender report: `rtp` and `ntp` are one instant (RFC 3550 §6.4.1). Tracks of one member move together by it.
    pub(crate) fn sender_report(&mut self, member: &MemberClock, rtp: u32, ntp: u64, clock_rate: u32) {
        let Some((last, ticks)) = self.last else { return };
        let ticks = ticks + i64::from(rtp.wrapping_sub(last).cast_signed());
        let here = self.offset + nanoseconds(ticks, clock_rate);
        // 32 bits of seconds, 32 bits of fraction.
        let ntp = (i128::from(ntp) * 1_000_000_000) >> 32;
        let correction = member.media_time(ntp, here) - here;
        if correction.abs() <= MAX_CORRECTION {
            self.offset += correction;
        }
    }
}

fn nanoseconds(ticks: i64, clock_rate: u32) -> i128 {
    i128::from(ticks) * 1_000_000_000 / i128::from(clock_rate.max(1))
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "a test needs some point in time to start from")]
mod tests {
    use super::*;

    fn ntp(millis: u64) -> u64 {
        (millis << 32) / 1000
    }

    #[test]
    fn media_time_survives_wrap_of_rtp_time() {
        let (member, mut clock, now) = (MemberClock::default(), TrackClock::default(), Instant::now());
        let start = u32::MAX - 480;
        assert_eq!(clock.time(&member, now, start, 48_000), Duration::ZERO);
        assert_eq!(clock.time(&member, now, start.wrapping_add(960), 48_000), Duration::from_millis(20));
    }

    #[test]
    fn tracks_of_one_member_share_time_after_sender_reports() {
        let (member, now) = (MemberClock::default(), Instant::now());
        let (mut voice, mut picture) = (TrackClock::default(), TrackClock::default());
        voice.time(&member, now, 1_000, 48_000);
        // The picture's first frame was captured with the voice's, but came 300 ms later.
        let late = now + Duration::from_millis(300);
        assert_eq!(picture.time(&member, late, 500, 90_000), Duration::from_millis(300));
        voice.sender_report(&member, 1_000, ntp(5_000), 48_000);
        picture.sender_report(&member, 500, ntp(5_000), 90_000);
        let voice_time = voice.time(&member, late, 1_000 + 48_000, 48_000);
        let picture_time = picture.time(&member, late, 500 + 90_000, 90_000);
        assert_eq!(voice_time, Duration::from_secs(1));
        assert_eq!(picture_time, voice_time);
    }

    #[test]
    fn absurd_sender_report_is_ignored() {
        let (member, mut clock, now) = (MemberClock::default(), TrackClock::default(), Instant::now());
        clock.time(&member, now, 0, 48_000);
        clock.sender_report(&member, 0, ntp(1_000), 48_000);
        clock.sender_report(&member, 0, ntp(900_000), 48_000);
        assert_eq!(clock.time(&member, now, 960, 48_000), Duration::from_millis(20));
    }
}
