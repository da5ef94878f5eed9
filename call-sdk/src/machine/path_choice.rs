//! Which path's frames of a track reach the application while a member moves between two paths.
//!
//! Both paths carry the same frames for a while. In an encrypted call a frame that was opened once does not open again,
//! so here is only decided whose frames count: the newer path's as soon as it delivers, the older one's again only if
//! the newer falls silent.

use std::{
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
    time::Duration,
};

/// Silence of the present path after which another may take over at once.
const SILENT: Duration = Duration::from_millis(200);

/// Shared by the receivers of one track on several paths.
#[derive(Debug, Default)]
pub struct PathChoice {
    /// How many paths there have been.
    paths: AtomicU32,
    /// The path whose frames count, numbered from 1; 0: none yet.
    present: AtomicU32,
    /// The paths that carried a frame, whoever was first with it: bit n for path n.
    arrived: AtomicU64,
    /// When it last delivered, in ms since the call began.
    delivered: AtomicU64,
}

impl PathChoice {
    /// The number of a new path, from 1.
    pub(super) fn add(&self) -> u32 {
        self.paths.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Whether there was ever more than one path, so that frames may come twice.
    pub(crate) fn is_moving(&self) -> bool {
        self.paths.load(Ordering::Relaxed) > 1
    }

    /// Whether a frame of `path` counts. `can_start` says whether a decoder can start with it: any audio, and key
    /// frames.
    pub(crate) fn admits(&self, path: u32, at: Duration, can_start: bool) -> bool {
        let present = self.present.load(Ordering::Relaxed);
        if path == present || present == 0 {
            return true;
        }
        let delivered = Duration::from_millis(self.delivered.load(Ordering::Relaxed));
        at.saturating_sub(delivered) >= SILENT || (path > present && can_start)
    }

    /// A frame came by `path`, even if another path was faster.
    pub(crate) fn arrived(&self, path: u32) {
        self.arrived.fetch_or(1 << (path % 64), Ordering::Relaxed);
    }

    /// A frame of `path` was delivered.
    pub(crate) fn delivered(&self, path: u32, at: Duration) {
        self.arrived(path);
        self.present.store(path, Ordering::Relaxed);
        self.delivered.store(u64::try_from(at.as_millis()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// Whether `path` carries frames.
    pub(super) fn carries(&self, path: u32) -> bool {
        self.arrived.load(Ordering::Relaxed) & (1 << (path % 64)) != 0
    }

    /// `path` has ended: the next frame of any other counts.
    pub(super) fn ended(&self, path: u32) {
        let _ = self.present.compare_exchange(path, 0, Ordering::Relaxed, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    #[test]
    fn newer_path_takes_over_with_a_frame_that_can_start() {
        let choice = PathChoice::default();
        let (old, new) = (choice.add(), choice.add());
        assert!(choice.is_moving());
        choice.delivered(old, ms(1000));
        assert!(!choice.admits(new, ms(1010), false), "the old path delivers");
        assert!(choice.admits(new, ms(1020), true));
        choice.delivered(new, ms(1020));
        assert!(!choice.admits(old, ms(1030), true), "nobody goes back while the new path delivers");
        assert!(choice.admits(old, ms(1220), false), "unless it falls silent");
    }

    #[test]
    fn path_that_ends_leaves_its_place_at_once() {
        let choice = PathChoice::default();
        let (old, new) = (choice.add(), choice.add());
        choice.delivered(old, ms(1000));
        choice.ended(new);
        assert!(!choice.admits(new, ms(1001), false));
        choice.ended(old);
        assert!(choice.admits(new, ms(1001), false));
    }
}
