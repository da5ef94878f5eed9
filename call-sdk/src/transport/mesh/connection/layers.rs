//! Which layer of a video track a mesh peer gets: one, the highest that its share of the uplink permits.

use std::time::{Duration, Instant};

use crate::transport::rtc::local::Selected;

/// What a track with a single layer needs at least, in bits per second: its encoder follows the target bitrate.
const LEAST_USEFUL: u64 = 80_000;
/// How long a higher layer must fit before it is sent.
const STEADY: Duration = Duration::from_secs(2);
/// The first wait until paused video is tried again, and the longest. Without video there is no feedback about the
/// uplink, so nothing but a trial can tell that it is enough again.
const FIRST_RETRY: Duration = Duration::from_secs(5);
const LAST_RETRY: Duration = Duration::from_secs(30);
/// How long a trial goes on before it is judged.
const TRIAL: Duration = Duration::from_secs(5);
/// Key frames of a layer are asked for at most this often.
const ASK: Duration = Duration::from_millis(500);

/// See the module. Time is an argument.
#[derive(Debug)]
pub(super) struct Layers {
    /// What each layer needs in bits per second, lowest first.
    rates: Vec<u64>,
    sending: Option<usize>,
    /// The layer to switch to at its next key frame; `None`: paused.
    wanted: Option<usize>,
    /// Since when a higher layer fits.
    fits: Option<Instant>,
    pause: Option<Pause>,
    asked: Option<Instant>,
}

/// Video is paused, or tried again after that.
#[derive(Clone, Copy, Debug)]
struct Pause {
    since: Instant,
    wait: Duration,
    next: Instant,
    trial: Option<Trial>,
}

#[derive(Clone, Copy, Debug)]
struct Trial {
    until: Instant,
    /// The share when it began, or when it was extended.
    share: u64,
}

impl Layers {
    /// Layers of these rates in bits per second, lowest first; `share` is what the track may use at first.
    pub(super) fn new(mut rates: Vec<u64>, share: u64) -> Self {
        if let [only] = rates.as_mut_slice() {
            *only = (*only).min(LEAST_USEFUL);
        }
        let mut layers = Self { rates, sending: None, wanted: None, fits: None, pause: None, asked: None };
        layers.wanted = layers.highest(share, 1, 1).or(Some(0));
        layers
    }

    /// The track may use `share` bits per second from now on.
    pub(super) fn set_share(&mut self, now: Instant, share: u64) {
        let Some(wanted) = self.wanted else {
            let retry = self.pause.is_some_and(|pause| now >= pause.next);
            if self.fits_steadily(now, share, 0) {
                self.wanted = self.highest(share, 20, 23);
                self.pause = None;
            } else if let Some(pause) = self.pause.as_mut().filter(|_| retry) {
                pause.trial = Some(Trial { until: now + TRIAL, share });
                self.wanted = Some(0);
            }
            return;
        };
        let short =
            self.rates.get(wanted).is_some_and(|rate| share.saturating_mul(10) < rate.saturating_mul(9));
        if let Some(Pause { trial: Some(trial), .. }) = &mut self.pause {
            if now < trial.until {
                return;
            }
            if short && share > trial.share {
                *trial = Trial { until: now + TRIAL, share };
                return;
            }
        }
        if !short {
            self.pause = None;
            if self.fits_steadily(now, share, wanted + 1) {
                self.wanted = self.highest(share, 20, 23);
            }
            return;
        }
        self.fits = None;
        self.wanted = self.highest(share, 1, 1);
        if self.wanted.is_none() {
            self.sending = None;
            let (since, wait) = match self.pause {
                Some(pause) => (pause.since, (pause.wait * 2).min(LAST_RETRY)),
                None => (now, FIRST_RETRY),
            };
            self.pause = Some(Pause { since, wait, next: now + wait, trial: None });
        }
    }

    /// What becomes of a frame. All layers go out as one stream.
    pub(super) fn select(&mut self, now: Instant, layer: u8, key_frame: bool) -> Selected {
        let layer = usize::from(layer);
        let Some(wanted) = self.wanted else { return Selected::Leave };
        let next_best = layer < wanted && self.sending.is_none();
        if key_frame && (layer == wanted || next_best) {
            self.sending = Some(layer);
        }
        if self.sending == Some(layer) {
            return Selected::Send(0);
        }
        let ask = layer == wanted || next_best;
        if ask && self.asked.is_none_or(|asked| now.saturating_duration_since(asked) >= ASK) {
            self.asked = Some(now);
            return Selected::Wait;
        }
        Selected::Leave
    }

    /// The layer that a receiver's request for a key frame means.
    pub(super) fn current(&self) -> u8 {
        self.sending.or(self.wanted).and_then(|layer| u8::try_from(layer).ok()).unwrap_or(0)
    }

    /// Which layers are of use, lowest first.
    pub(super) fn in_use(&self) -> Vec<bool> {
        let used =
            |layer| self.wanted.is_some() && (self.wanted == Some(layer) || self.sending == Some(layer));
        (0..self.rates.len()).map(used).collect()
    }

    /// Since when the uplink is short of this much in bits per second, trials included.
    pub(super) fn paused(&self) -> Option<(Instant, u64)> {
        let pause = self.pause?;
        Some((pause.since, self.rates.first().copied().unwrap_or(0)))
    }

    /// Whether a layer from `from` on has fitted into the share long enough.
    fn fits_steadily(&mut self, now: Instant, share: u64, from: usize) -> bool {
        if self.highest(share, 20, 23).is_none_or(|layer| layer < from) {
            self.fits = None;
            return false;
        }
        let since = *self.fits.get_or_insert(now);
        let steady = now.saturating_duration_since(since) >= STEADY;
        if steady {
            self.fits = None;
        }
        steady
    }

    /// The highest layer whose rate is at most `share` · `times` / `over`.
    fn highest(&self, share: u64, times: u64, over: u64) -> Option<usize> {
        let fits = |rate: &u64| rate.saturating_mul(over) <= share.saturating_mul(times);
        self.rates.iter().rposition(fits)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::disallowed_methods, reason = "an arbitrary origin for virtual time")]

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn three(share: u64) -> Layers {
        Layers::new(vec![150_000, 500_000, 1_700_000], share)
    }

    #[test]
    fn first_key_frame_that_fits_is_sent() {
        let (now, mut layers) = (Instant::now(), three(600_000));
        assert_eq!(layers.select(now, 2, true), Selected::Leave);
        assert_eq!(layers.select(now, 1, false), Selected::Wait, "a key frame is asked for");
        assert_eq!(layers.select(now, 1, false), Selected::Leave, "but not again at once");
        assert_eq!(layers.select(now, 0, true), Selected::Send(0), "a lower layer meanwhile");
        assert_eq!(layers.select(now, 1, true), Selected::Send(0));
        assert_eq!(layers.select(now, 0, true), Selected::Leave);
        assert_eq!(layers.in_use(), [false, true, false]);
    }

    #[test]
    fn switches_at_a_key_frame_only() {
        let (now, mut layers) = (Instant::now(), three(600_000));
        layers.select(now, 1, true);
        layers.set_share(now, 200_000);
        assert_eq!(layers.in_use(), [true, true, false]);
        assert_eq!(layers.select(now, 0, false), Selected::Wait);
        assert_eq!(layers.select(now, 1, false), Selected::Send(0));
        assert_eq!(layers.select(now, 0, true), Selected::Send(0));
        assert_eq!(layers.select(now, 1, false), Selected::Leave);
    }

    #[test]
    fn goes_up_only_when_the_share_is_ample_for_a_while() {
        let (now, mut layers) = (Instant::now(), three(600_000));
        layers.select(now, 1, true);
        for second in 0..5 {
            layers.set_share(now + SECOND * second, 1_750_000);
            assert_eq!(layers.in_use(), [false, true, false], "just enough is not ample");
        }
        layers.set_share(now + SECOND * 5, 2_000_000);
        layers.set_share(now + SECOND * 6, 2_000_000);
        assert_eq!(layers.in_use(), [false, true, false]);
        layers.set_share(now + SECOND * 7, 2_000_000);
        assert_eq!(layers.in_use(), [false, true, true]);
        layers.set_share(now + SECOND * 8, 1_600_000);
        assert_eq!(layers.in_use(), [false, true, true], "a little less changes nothing");
    }

    #[test]
    fn pauses_below_the_lowest_and_tries_again() {
        let (now, mut layers) = (Instant::now(), three(600_000));
        layers.select(now, 1, true);
        layers.set_share(now, 60_000);
        assert_eq!(layers.select(now, 0, true), Selected::Leave);
        assert_eq!(layers.in_use(), [false; 3]);
        assert_eq!(layers.paused(), Some((now, 150_000)));
        layers.set_share(now + SECOND * 4, 60_000);
        assert_eq!(layers.in_use(), [false; 3]);
        layers.set_share(now + SECOND * 5, 60_000);
        assert_eq!(layers.select(now, 0, true), Selected::Send(0), "a trial");
        assert!(layers.paused().is_some());
        layers.set_share(now + SECOND * 10, 90_000);
        assert_eq!(layers.in_use(), [true, false, false], "it goes on while the estimate grows");
        layers.set_share(now + SECOND * 15, 90_000);
        assert_eq!(layers.in_use(), [false; 3]);
        layers.set_share(now + SECOND * 20, 90_000);
        assert_eq!(layers.in_use(), [false; 3], "the wait grows");
        layers.set_share(now + SECOND * 25, 90_000);
        layers.set_share(now + SECOND * 30, 150_000);
        assert_eq!(layers.in_use(), [true, false, false]);
        assert_eq!(layers.paused(), None);
    }

    #[test]
    fn resumes_when_the_share_is_ample() {
        let (now, mut layers) = (Instant::now(), three(10));
        layers.set_share(now, 10);
        layers.set_share(now + SECOND, 600_000);
        layers.set_share(now + SECOND * 3, 600_000);
        assert_eq!(layers.in_use(), [false, true, false]);
        assert_eq!(layers.paused(), None);
    }

    #[test]
    fn single_layer_needs_little() {
        let now = Instant::now();
        let mut layers = Layers::new(vec![1_700_000], 100_000);
        layers.set_share(now, 75_000);
        assert_eq!(layers.in_use(), [true]);
        layers.set_share(now, 50_000);
        assert_eq!(layers.in_use(), [false]);
    }
}
