//! Which focus we publish to: the first that works, in the order of discovery.

use super::event::ConnectFailure;
use crate::transport::{LiveKitFocus, NamedBy};

/// Failures in a row on one focus before another is tried.
const PATIENCE: u32 = 2;

/// Our choice among the discovered foci.
#[derive(Debug, Default)]
pub(crate) struct OwnFoci {
    list: Vec<(LiveKitFocus, NamedBy)>,
    at: usize,
    /// How many were tried in a row without success.
    tried: usize,
}

/// What a failure of our focus means.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Try the same one again.
    Stay,
    /// Another one is chosen now.
    Moved,
    /// Every one was tried and the failure is final for the last.
    NoneLeft,
}

impl OwnFoci {
    pub(crate) fn set(&mut self, list: Vec<(LiveKitFocus, NamedBy)>) {
        *self = Self { list, at: 0, tried: 0 };
    }

    pub(crate) fn current(&self) -> Option<&LiveKitFocus> {
        self.list.get(self.at).map(|(focus, _)| focus)
    }

    /// Where we have the current one from.
    pub(crate) fn named_by(&self) -> Option<&NamedBy> {
        self.list.get(self.at).map(|(_, named_by)| named_by)
    }

    /// Our focus works.
    pub(crate) fn works(&mut self) {
        self.tried = 0;
    }

    /// Our focus failed for the `failures`-th time in a row.
    pub(crate) fn failed(&mut self, failure: &ConnectFailure, failures: u32) -> Verdict {
        let is_final = failure.kind.is_final();
        if !is_final && failures < PATIENCE {
            return Verdict::Stay;
        }
        self.tried += 1;
        if is_final && self.tried >= self.list.len() {
            return Verdict::NoneLeft;
        }
        if self.list.len() < 2 {
            return Verdict::Stay;
        }
        self.at = (self.at + 1) % self.list.len();
        Verdict::Moved
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::{event::ConnectFailureKind, testing};

    fn foci(count: usize) -> OwnFoci {
        let mut foci = OwnFoci::default();
        foci.set(
            (0..count)
                .map(|n| (testing::focus(&format!("https://f{n}.example")), NamedBy::Homeserver))
                .collect(),
        );
        foci
    }

    fn failure(kind: ConnectFailureKind) -> ConnectFailure {
        ConnectFailure::new(kind, "")
    }

    #[test]
    fn unreachable_focus_is_tried_twice_before_the_next() {
        let mut foci = foci(2);
        let unreachable = failure(ConnectFailureKind::SfuUnreachable);
        assert_eq!(foci.failed(&unreachable, 1), Verdict::Stay);
        assert_eq!(foci.failed(&unreachable, 2), Verdict::Moved);
        assert_eq!(foci.current(), Some(&testing::focus("https://f1.example")));
        // Both are away: it goes round for as long as the call lasts.
        assert_eq!(foci.failed(&unreachable, 2), Verdict::Moved);
        assert_eq!(foci.current(), Some(&testing::focus("https://f0.example")));
    }

    #[test]
    fn refusal_by_every_focus_is_final() {
        let mut foci = foci(2);
        let refused = failure(ConnectFailureKind::TokenRefused);
        assert_eq!(foci.failed(&refused, 1), Verdict::Moved);
        assert_eq!(foci.failed(&refused, 1), Verdict::NoneLeft);
    }

    #[test]
    fn only_focus_is_kept_while_it_is_unreachable() {
        let mut foci = foci(1);
        let lost = failure(ConnectFailureKind::Lost);
        assert_eq!(
            (1..5).map(|n| foci.failed(&lost, n)).collect::<Vec<_>>(),
            [Verdict::Stay, Verdict::Stay, Verdict::Stay, Verdict::Stay]
        );
    }
}
