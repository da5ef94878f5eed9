//! Whether our media travels over our focus or from member to member, and when we move.

use std::time::{Duration, Instant};

/// When a call does without a focus.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum MeshPolicy {
    /// While no focus is found or reachable. The default.
    #[default]
    WithoutFocus,
    /// While the call is small, as well, even if there is a focus: nobody but the members carries the media.
    SmallCalls {
        /// Most members, ourselves included. One more, and the call moves to the focus.
        limit: usize,
    },
    /// Never. Without a focus there is no call.
    Never,
}

impl MeshPolicy {
    /// Members of a small call, ourselves included, unless the application says otherwise.
    pub const DEFAULT_LIMIT: usize = 4;
}

/// Why a call runs as a mesh.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum MeshReason {
    /// Nobody names a focus that we can use.
    NoFocus,
    /// Our focus cannot be reached, or was lost.
    FocusUnreachable,
    /// The call is small, and the application prefers a mesh then.
    SmallCall,
}

/// Where our media travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    Focus,
    Mesh(MeshReason),
}

/// How large a call is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CallSize {
    /// Members, ourselves included.
    pub(crate) members: usize,
    /// Whether every other member can mesh. Those that cannot hear us on a focus only.
    pub(crate) all_can_mesh: bool,
}

/// How our focus does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FocusHealth {
    /// We know none that would have us.
    None,
    /// It is not asked for.
    Unused,
    /// It was granted to us, and media is on its way up.
    Granted,
    /// It is not reached.
    Down { since: Instant, failures: u32 },
    /// It carries media.
    Up { since: Instant },
}

/// How long a focus may take on joining before the call begins without it.
const FIRST_PATIENCE: Duration = Duration::from_secs(5);
/// How long a focus that worked may be away before the call goes on without it.
const LOST_PATIENCE: Duration = Duration::from_secs(3);
/// Failures in a row after which a focus is not waited for.
const MOST_FAILURES: u32 = 2;
/// How long a focus that was away has to work before the call moves back.
const SETTLED_AFTER: Duration = Duration::from_secs(5);
/// How long a call has to be small before it leaves its focus.
const SMALL_FOR: Duration = Duration::from_secs(30);

/// Decides where our media travels.
#[derive(Debug)]
pub(crate) struct Placement {
    policy: MeshPolicy,
    /// Most members of a call that goes on without its focus.
    most: usize,
    place: Option<Place>,
    /// Since when the call, on its focus, has been small.
    small_since: Option<Instant>,
}

impl Placement {
    pub(crate) fn new(policy: MeshPolicy, most: usize) -> Self {
        Self { policy, most, place: None, small_since: None }
    }

    /// Where our media travels; `None`: not decided yet.
    pub(crate) fn place(&self) -> Option<Place> {
        self.place
    }

    /// Whether our media travels from member to member.
    pub(crate) fn is_mesh(&self) -> bool {
        matches!(self.place, Some(Place::Mesh(_)))
    }

    /// Whether we can mesh at all.
    pub(crate) fn can_mesh(&self) -> bool {
        self.policy != MeshPolicy::Never
    }

    /// Whether our focus is to be connected.
    pub(crate) fn wants_focus(&self, size: CallSize) -> bool {
        !matches!(self.place, None | Some(Place::Mesh(MeshReason::SmallCall))) || !self.is_small(size)
    }

    /// Decides anew for a call of this size. Returns when to ask again at the latest.
    pub(crate) fn decide(&mut self, now: Instant, size: CallSize, focus: FocusHealth) -> Option<Instant> {
        let (place, again) = self.target(now, size, focus);
        self.place = place;
        again.filter(|at| *at > now)
    }

    fn target(
        &mut self,
        now: Instant,
        size: CallSize,
        focus: FocusHealth,
    ) -> (Option<Place>, Option<Instant>) {
        if self.policy == MeshPolicy::Never {
            return (Some(Place::Focus), None);
        }
        if focus == FocusHealth::None {
            return (Some(Place::Mesh(MeshReason::NoFocus)), None);
        }
        let small = Some(Place::Mesh(MeshReason::SmallCall));
        if self.is_small(size) {
            if self.place != Some(Place::Focus) {
                return (small, None);
            }
            let since = *self.small_since.get_or_insert(now);
            if now >= since + SMALL_FOR {
                self.small_since = None;
                return (small, None);
            }
        } else {
            self.small_since = None;
        }
        let unreachable = Some(Place::Mesh(MeshReason::FocusUnreachable));
        let small_for = self.small_since.map(|since| since + SMALL_FOR);
        match (self.place, focus) {
            (None, FocusHealth::Down { since, failures }) => {
                let until = since + FIRST_PATIENCE;
                if size.members > self.most {
                    (None, None)
                } else if failures >= MOST_FAILURES || now >= until {
                    (unreachable, None)
                } else {
                    (None, Some(until))
                }
            }
            (None, FocusHealth::Granted | FocusHealth::Up { .. }) => (Some(Place::Focus), None),
            (Some(Place::Focus), FocusHealth::Down { since, .. }) => {
                let until = since + LOST_PATIENCE;
                match (size.members <= self.most, now >= until) {
                    (true, true) => (unreachable, None),
                    (true, false) => (Some(Place::Focus), Some(until)),
                    (false, _) => (Some(Place::Focus), small_for),
                }
            }
            // Nobody waits for a focus that was not lost: the call has outgrown the mesh.
            (Some(Place::Mesh(MeshReason::SmallCall)), FocusHealth::Up { .. }) => (Some(Place::Focus), None),
            (Some(Place::Mesh(reason)), FocusHealth::Up { since }) => {
                let until = since + SETTLED_AFTER;
                if now >= until {
                    (Some(Place::Focus), None)
                } else {
                    (Some(Place::Mesh(reason)), Some(until))
                }
            }
            (place, _) => (place, small_for),
        }
    }

    /// A call on its focus has to be smaller than the limit to leave it, so that a call at the limit stays where it is.
    fn is_small(&self, size: CallSize) -> bool {
        match self.policy {
            MeshPolicy::SmallCalls { limit } => {
                let limit = limit.saturating_sub(usize::from(self.place == Some(Place::Focus)));
                size.all_can_mesh && size.members <= limit
            }
            MeshPolicy::WithoutFocus | MeshPolicy::Never => false,
        }
    }
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "a test needs some point in time to start from")]
mod tests {
    use super::*;

    const MESH_WITHOUT: Option<Place> = Some(Place::Mesh(MeshReason::FocusUnreachable));
    const SMALL: Option<Place> = Some(Place::Mesh(MeshReason::SmallCall));

    fn of(members: usize) -> CallSize {
        CallSize { members, all_can_mesh: true }
    }

    fn seconds(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    #[test]
    fn focus_is_used_while_it_works_and_the_mesh_while_it_is_away() {
        let now = Instant::now();
        let mut placement = Placement::new(MeshPolicy::WithoutFocus, 8);
        assert_eq!(placement.decide(now, of(3), FocusHealth::Granted), None);
        assert_eq!(placement.place(), Some(Place::Focus));
        let down = FocusHealth::Down { since: now, failures: 1 };
        assert_eq!(placement.decide(now, of(3), down), Some(now + LOST_PATIENCE));
        assert_eq!(placement.place(), Some(Place::Focus), "a short interruption moves nobody");
        placement.decide(now + seconds(3), of(3), down);
        assert_eq!(placement.place(), MESH_WITHOUT);
        assert!(placement.wants_focus(of(3)), "it is tried again");
        let back = now + seconds(10);
        let up = FocusHealth::Up { since: back };
        assert_eq!(placement.decide(back, of(3), up), Some(back + SETTLED_AFTER));
        assert_eq!(placement.place(), MESH_WITHOUT, "a focus that comes and goes moves nobody");
        placement.decide(back + seconds(5), of(3), up);
        assert_eq!(placement.place(), Some(Place::Focus));
    }

    #[test]
    fn large_call_waits_for_its_focus() {
        let now = Instant::now();
        let mut placement = Placement::new(MeshPolicy::WithoutFocus, 8);
        placement.decide(now, of(9), FocusHealth::Granted);
        placement.decide(now + seconds(60), of(9), FocusHealth::Down { since: now, failures: 9 });
        assert_eq!(placement.place(), Some(Place::Focus));
    }

    #[test]
    fn call_begins_as_a_mesh_when_no_focus_answers() {
        let now = Instant::now();
        let mut placement = Placement::new(MeshPolicy::WithoutFocus, 8);
        let trying = FocusHealth::Down { since: now, failures: 1 };
        assert_eq!(placement.decide(now, of(1), trying), Some(now + FIRST_PATIENCE));
        assert_eq!(placement.place(), None);
        placement.decide(now, of(1), FocusHealth::Down { since: now, failures: 2 });
        assert_eq!(placement.place(), MESH_WITHOUT);

        let mut placement = Placement::new(MeshPolicy::WithoutFocus, 8);
        placement.decide(now, of(20), FocusHealth::None);
        assert_eq!(placement.place(), Some(Place::Mesh(MeshReason::NoFocus)), "there is nothing to wait for");
    }

    #[test]
    fn call_at_the_limit_does_not_flap() {
        let now = Instant::now();
        let mut placement = Placement::new(MeshPolicy::SmallCalls { limit: 4 }, 8);
        placement.decide(now, of(4), FocusHealth::Unused);
        assert_eq!(placement.place(), SMALL);
        assert!(!placement.wants_focus(of(4)));
        assert!(placement.wants_focus(of(5)), "the focus is connected before anybody moves");
        placement.decide(now, of(5), FocusHealth::Down { since: now, failures: 0 });
        assert_eq!(placement.place(), SMALL);
        placement.decide(now, of(5), FocusHealth::Up { since: now });
        assert_eq!(placement.place(), Some(Place::Focus));
        let up = FocusHealth::Up { since: now };
        placement.decide(now + seconds(100), of(4), up);
        assert_eq!(placement.place(), Some(Place::Focus), "four is not smaller than the limit");
        let small = now + seconds(200);
        assert_eq!(placement.decide(small, of(3), up), Some(small + SMALL_FOR));
        placement.decide(small + seconds(20), of(4), up);
        assert_eq!(placement.decide(small + seconds(31), of(3), up), Some(small + seconds(61)));
        placement.decide(small + seconds(61), of(3), up);
        assert_eq!(placement.place(), SMALL);
    }

    #[test]
    fn member_that_cannot_mesh_makes_a_small_call_use_the_focus() {
        let now = Instant::now();
        let mut placement = Placement::new(MeshPolicy::SmallCalls { limit: 4 }, 8);
        placement.decide(now, of(2), FocusHealth::Unused);
        assert_eq!(placement.place(), SMALL);
        let size = CallSize { members: 3, all_can_mesh: false };
        assert!(placement.wants_focus(size));
        placement.decide(now, size, FocusHealth::Up { since: now });
        assert_eq!(placement.place(), Some(Place::Focus));
    }

    #[test]
    fn application_can_forbid_the_mesh() {
        let mut placement = Placement::new(MeshPolicy::Never, 8);
        placement.decide(Instant::now(), of(1), FocusHealth::None);
        assert_eq!(placement.place(), Some(Place::Focus));
        assert!(!placement.can_mesh());
    }
}
