//! What came through: loss, damage, delay and time to the first frame.

use std::{fmt, time::Duration};

use comfy_table::{CellAlignment, Table, presets::UTF8_HORIZONTAL_ONLY};

use crate::{Plan, participant::Account};

/// The result of a run.
#[derive(Clone, Debug)]
pub struct Report {
    /// Participants that joined.
    pub joined: usize,
    /// Why the others did not.
    pub failures: Vec<String>,
    /// Frames received by all.
    pub frames: u64,
    /// Frames missing between the first and the last that a participant received of a stream.
    pub lost: u64,
    /// Frames that arrived whole but not as they were sent.
    pub damaged: u64,
    /// Streams that should have reached a participant, and how many did.
    pub streams: (usize, usize),
    /// Participants whose connection ended early, with the reason.
    pub ended: Vec<String>,
    duration: Duration,
    delays: Vec<Duration>,
    joins: Vec<Duration>,
    first_frames: Vec<Duration>,
    streams_per_receiver: (usize, usize),
}

impl Report {
    pub(crate) fn new(plan: &Plan, failures: Vec<String>) -> Self {
        let per_publisher = if plan.video { 2 } else { 1 };
        let publishers = usize::try_from(plan.publishers).unwrap_or(usize::MAX);
        Self {
            joined: 0,
            failures,
            frames: 0,
            lost: 0,
            damaged: 0,
            streams: (0, 0),
            ended: Vec::new(),
            duration: plan.duration,
            delays: Vec::new(),
            joins: Vec::new(),
            first_frames: Vec::new(),
            streams_per_receiver: (publishers, per_publisher),
        }
    }

    pub(crate) fn add(&mut self, account: Account) {
        let (publishers, per_publisher) = self.streams_per_receiver;
        // A publisher does not receive itself.
        let expected = (publishers - usize::from(account.publishes)) * per_publisher;
        self.joined += 1;
        self.streams.0 += expected;
        self.streams.1 += account.streams.len();
        self.damaged += account.damaged;
        self.joins.push(account.joined_in);
        self.first_frames.extend(account.first_frame);
        self.ended.extend(account.end);
        for received in account.streams.into_values() {
            let span = received.first.map_or(0, |first| received.last - first + 1);
            self.frames += received.frames;
            self.lost += span.saturating_sub(received.frames);
            self.delays.extend(received.delays);
        }
    }

    /// Whether every participant joined and every stream reached it undamaged.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.failures.is_empty()
            && self.ended.is_empty()
            && self.damaged == 0
            && self.streams.0 == self.streams.1
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut table = Table::new();
        table.load_style(UTF8_HORIZONTAL_ONLY);
        let seconds = self.duration.as_secs_f64().max(0.001);
        let frames = f64::from(u32::try_from(self.frames).unwrap_or(u32::MAX));
        let total = self.frames + self.lost;
        let lost_share =
            f64::from(u32::try_from(self.lost * 10_000 / total.max(1)).unwrap_or(u32::MAX)) / 100.0;
        table.add_row(["participants joined", &format!("{} (failed: {})", self.joined, self.failures.len())]);
        table.add_row(["streams received", &format!("{} of {}", self.streams.1, self.streams.0)]);
        table.add_row(["frames received", &format!("{} ({:.0}/s)", self.frames, frames / seconds)]);
        table.add_row(["frames lost", &format!("{} ({lost_share:.2} %)", self.lost)]);
        table.add_row(["frames damaged", &self.damaged.to_string()]);
        table.add_row(["frame delay p50 / p99", &quantiles(&self.delays)]);
        table.add_row(["time to join p50 / p99", &quantiles(&self.joins)]);
        table.add_row(["time to first frame p50 / p99", &quantiles(&self.first_frames)]);
        if let Some(column) = table.column_mut(1) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        writeln!(f, "{table}")?;
        for failure in self.failures.iter().chain(&self.ended).take(5) {
            writeln!(f, "  ✗ {failure}")?;
        }
        Ok(())
    }
}

fn quantiles(values: &[Duration]) -> String {
    let mut sorted = values.to_vec();
    sorted.sort_unstable();
    let at = |percent: usize| sorted.get((sorted.len() * percent / 100).min(sorted.len().saturating_sub(1)));
    match (at(50), at(99)) {
        (Some(median), Some(high)) => {
            format!("{:.1} / {:.1} ms", median.as_secs_f64() * 1e3, high.as_secs_f64() * 1e3)
        }
        _ => "–".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_of_nothing_are_a_dash() {
        assert_eq!(quantiles(&[]), "–");
        let values: Vec<_> = (1..=100).map(Duration::from_millis).collect();
        assert_eq!(quantiles(&values), "51.0 / 100.0 ms");
    }
}
