//! How long this process stood still: on a busy machine that is silence, too, but not the call's.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::task::JoinSet;

const TICK: Duration = Duration::from_millis(10);

/// A task that does nothing but wake up, beside those of the call.
pub(crate) struct Metronome {
    late: Arc<AtomicU64>,
    // Aborted when dropped.
    _task: JoinSet<()>,
}

impl Metronome {
    pub(crate) fn start() -> Self {
        let (late, mut task) = (Arc::<AtomicU64>::default(), JoinSet::new());
        let latest = late.clone();
        task.spawn(async move {
            loop {
                let slept = Instant::now();
                tokio::time::sleep(TICK).await;
                let millis = slept.elapsed().saturating_sub(TICK).as_millis();
                latest.fetch_max(millis.try_into().unwrap_or(u64::MAX), Ordering::Relaxed);
            }
        });
        Self { late, _task: task }
    }

    /// The longest standstill since the start.
    pub(crate) fn standstill(&self) -> Duration {
        Duration::from_millis(self.late.load(Ordering::Relaxed))
    }
}
