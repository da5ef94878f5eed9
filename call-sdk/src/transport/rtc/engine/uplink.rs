//! How much the other side's feedback allows to send.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use rtc::interceptor::{BandwidthEstimator, EstimatorStats, Gcc, PacketReport};

/// Where the estimate starts, and its bounds, in bits per second. The engine does not probe, so it starts with what a
/// camera needs rather than at the bottom.
const START: f64 = 2.0e6;
const LEAST: f64 = 1.0e5;
const MOST: f64 = 5.0e7;

/// The engine's estimator (delay and loss by transport-wide feedback), whose result goes into a counter.
pub(super) struct Uplink {
    estimator: Gcc,
    /// Bits per second; 0 before the first feedback.
    target: Arc<AtomicU64>,
}

impl Uplink {
    pub(super) fn new(target: Arc<AtomicU64>) -> Self {
        Self { estimator: Gcc::new(START, LEAST, MOST), target }
    }
}

impl BandwidthEstimator for Uplink {
    fn on_reports(&mut self, now: Instant, reports: &[PacketReport]) {
        // The engine takes packets without a transport-wide number (audio) for lost ones, as no feedback names them.
        let numbered: Vec<_> = reports.iter().filter(|report| report.is_twcc).cloned().collect();
        if numbered.is_empty() {
            return;
        }
        self.estimator.on_reports(now, &numbered);
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "casts of floats saturate, and the estimator clamps to positive bounds"
        )]
        self.target.store(self.estimator.target_bitrate() as u64, Ordering::Relaxed);
    }

    fn target_bitrate(&self) -> f64 {
        self.estimator.target_bitrate()
    }

    fn stats(&self) -> EstimatorStats {
        self.estimator.stats()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::disallowed_methods, reason = "an arbitrary origin for virtual time")]

    use std::time::Duration;

    use rtc::rtcp::transport_feedbacks::cc_feedback_report::Ecn;

    use super::*;

    /// A second of 100 packets of video, of which every `lost`th is lost, and 50 of audio without numbers.
    fn second(start: Instant, at: u64, lost: u64) -> Vec<PacketReport> {
        let report = |index: u64, is_twcc: bool, arrived: bool| PacketReport {
            ssrc: u32::from(is_twcc),
            id: at * 1000 + index,
            rtp_sequence_number: index as u16,
            is_twcc,
            twcc_sequence_number: index as u16,
            size: 1200,
            arrived,
            departure: start + Duration::from_millis(at * 1000 + index * 10),
            arrival: arrived.then(|| Duration::from_millis(at * 1000 + index * 10 + 5)),
            ecn: Ecn::default(),
        };
        let video = (0..100).map(|index| report(index, true, index % lost != 1));
        video.chain((0..50).map(|index| report(index, false, false))).collect()
    }

    fn estimate(lost: u64) -> u64 {
        let (start, target) = (Instant::now(), Arc::<AtomicU64>::default());
        let mut uplink = Uplink::new(Arc::clone(&target));
        assert_eq!(target.load(Ordering::Relaxed), 0);
        for at in 0..20 {
            for reports in second(start, at, lost).chunks(10) {
                uplink.on_reports(start + Duration::from_secs(at + 1), reports);
            }
        }
        target.load(Ordering::Relaxed)
    }

    #[test]
    fn packets_without_numbers_are_not_lost() {
        assert!(estimate(1000) >= START as u64, "{}", estimate(1000));
    }

    #[test]
    fn loss_lowers_the_estimate() {
        assert!(estimate(4) < START as u64 / 2, "{}", estimate(4));
    }
}
