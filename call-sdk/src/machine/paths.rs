//! By which path media travels between us and each member (`docs/mesh.md`, Which path a pair takes).
//!
//! The rule looks at two memberships, so both sides of a pair come to the same answer. When a path changes, the one
//! before stays for a while, because the new one has to carry media first.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use crate::{
    member::{Member, MemberKey},
    transport::{LiveKitFocus, MeshSession},
};

/// How long a path stays at most after another took its place.
const LINGER: Duration = Duration::from_secs(20);
/// How long a path stays once the new one carries media.
const OVERLAP: Duration = Duration::from_secs(5);

/// How media travels between us and one member.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Path {
    /// We subscribe on the member's focus, and publish on ours if we have one.
    Focus(LiveKitFocus),
    /// By one peer connection, in both directions.
    Mesh(MeshSession),
    /// Not at all.
    None,
}

/// The paths to every other member.
#[derive(Debug, Default)]
pub(crate) struct Paths {
    paths: BTreeMap<MemberKey, MemberPaths>,
}

#[derive(Debug)]
struct MemberPaths {
    now: Path,
    /// The one before, and until when it stays.
    before: Option<(Path, Instant)>,
    /// Whether the end of the one before is settled.
    settled: bool,
}

impl Paths {
    /// Takes the present members, our own left out. Returns whether any path changed.
    pub(crate) fn update(&mut self, now: Instant, us: &OwnPlace, members: &[Member]) -> bool {
        let present: BTreeSet<MemberKey> = members.iter().map(Member::key).collect();
        let count = self.paths.len();
        self.paths.retain(|key, _| present.contains(key));
        let mut changed = count != self.paths.len();
        for member in members {
            let path = path(us, member);
            let paths = self.paths.entry(member.key()).or_insert_with(|| {
                changed = true;
                MemberPaths { now: path.clone(), before: None, settled: false }
            });
            if paths.now == path {
                continue;
            }
            changed = true;
            let before = std::mem::replace(&mut paths.now, path);
            let is_same_deployment = match (&before, &paths.now) {
                (Path::Focus(before), Path::Focus(now)) => before.is_same_as(now),
                _ => false,
            };
            if is_same_deployment {
                continue;
            }
            // Another session is another process: nobody is behind the old one any more. And a path that is taken
            // again has no predecessor of its own.
            let lasts = !matches!((&before, &paths.now), (Path::None, _) | (Path::Mesh(_), Path::Mesh(_)));
            paths.before = lasts.then(|| (before, now + LINGER));
            paths.settled = false;
        }
        changed
    }

    /// The member's media arrives on its present path: the one before is not needed much longer.
    pub(crate) fn settled(&mut self, now: Instant, member: &MemberKey) {
        if let Some(paths) = self.paths.get_mut(member)
            && let Some((_, until)) = &mut paths.before
            && !std::mem::replace(&mut paths.settled, true)
        {
            *until = (*until).min(now + OVERLAP);
        }
    }

    /// Members whose path before is still there although nothing says that the present one works.
    pub(crate) fn unsettled(&self) -> impl Iterator<Item = &MemberKey> {
        let unsettled = |(_, paths): &(&MemberKey, &MemberPaths)| paths.before.is_some() && !paths.settled;
        self.paths.iter().filter(unsettled).map(|(key, _)| key)
    }

    /// Ends paths whose time is over. Returns whether any ended.
    pub(crate) fn expire(&mut self, now: Instant) -> bool {
        let mut ended = false;
        for paths in self.paths.values_mut() {
            if paths.before.as_ref().is_some_and(|(_, until)| *until <= now) {
                paths.before = None;
                ended = true;
            }
        }
        ended
    }

    /// When the next path ends.
    pub(crate) fn wake_at(&self) -> Option<Instant> {
        self.paths.values().filter_map(|paths| paths.before.as_ref().map(|(_, until)| *until)).min()
    }

    /// The present path to a member.
    pub(crate) fn now(&self, member: &MemberKey) -> &Path {
        self.paths.get(member).map_or(&Path::None, |paths| &paths.now)
    }

    /// Every path to a member, the present one first.
    pub(crate) fn of(&self, member: &MemberKey) -> impl Iterator<Item = &Path> {
        let paths = self.paths.get(member);
        paths
            .into_iter()
            .flat_map(|paths| std::iter::once(&paths.now).chain(paths.before.as_ref().map(|(path, _)| path)))
    }

    /// The mesh session of a member that is meshed with now or was until a moment ago.
    pub(crate) fn mesh(&self, member: &MemberKey) -> Option<&MeshSession> {
        self.of(member).find_map(|path| match path {
            Path::Mesh(session) => Some(session),
            Path::Focus(_) | Path::None => None,
        })
    }
}

/// What our own membership says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct OwnPlace {
    /// It names a focus.
    pub(crate) has_focus: bool,
    /// It names the mesh.
    pub(crate) can_mesh: bool,
}

fn path(us: &OwnPlace, member: &Member) -> Path {
    match (member.focus(), member.mesh()) {
        (Some(focus), _) if us.has_focus => Path::Focus(focus.clone()),
        (_, Some(session)) if us.can_mesh && member.device_id.is_some() => Path::Mesh(session.clone()),
        (Some(focus), _) => Path::Focus(focus.clone()),
        (None, _) => Path::None,
    }
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "a test needs some point in time to start from")]
mod tests {
    use super::*;
    use crate::{machine::testing, transport::Transport};

    const BOTH: OwnPlace = OwnPlace { has_focus: true, can_mesh: true };
    const MESH: OwnPlace = OwnPlace { has_focus: false, can_mesh: true };

    fn member(focus: bool, session: Option<&str>) -> Member {
        let mut member = testing::state_member("@bob:example.org", "B", 1);
        if !focus {
            member.transports.clear();
        }
        member.transports.extend(session.map(|session| Transport::Mesh(MeshSession(session.to_owned()))));
        member
    }

    fn focus() -> Path {
        Path::Focus(testing::focus("https://sfu.example"))
    }

    fn mesh(session: &str) -> Path {
        Path::Mesh(MeshSession(session.to_owned()))
    }

    #[test]
    fn pair_meshes_if_one_has_no_focus_and_both_can() {
        let alone = OwnPlace { has_focus: true, can_mesh: false };
        for (us, them, expected) in [
            (BOTH, member(true, Some("s")), focus()),
            (MESH, member(true, Some("s")), mesh("s")),
            (BOTH, member(false, Some("s")), mesh("s")),
            (MESH, member(false, Some("s")), mesh("s")),
            (MESH, member(true, None), focus()),
            (alone, member(true, Some("s")), focus()),
            (alone, member(false, Some("s")), Path::None),
            (BOTH, member(false, None), Path::None),
        ] {
            assert_eq!(path(&us, &them), expected, "{us:?} {:?}", them.transports);
        }
    }

    #[test]
    fn path_before_stays_until_the_new_one_has_carried_media_for_a_while() {
        let now = Instant::now();
        let mut paths = Paths::default();
        let key = member(false, None).key();
        assert!(paths.update(now, &MESH, &[member(true, Some("s"))]));
        assert!(!paths.update(now, &MESH, &[member(true, Some("s"))]));
        assert!(paths.update(now, &BOTH, &[member(true, Some("s"))]));
        assert_eq!(paths.of(&key).cloned().collect::<Vec<_>>(), [focus(), mesh("s")]);
        assert_eq!(paths.wake_at(), Some(now + LINGER));
        assert_eq!(paths.unsettled().collect::<Vec<_>>(), [&key]);
        paths.settled(now, &key);
        paths.settled(now + Duration::from_secs(4), &key);
        assert!(!paths.expire(now + Duration::from_secs(4)));
        assert!(paths.expire(now + OVERLAP));
        assert_eq!(paths.of(&key).cloned().collect::<Vec<_>>(), [focus()]);
        assert_eq!(paths.mesh(&key), None);
    }

    #[test]
    fn new_session_takes_the_place_of_the_old_one_at_once() {
        let now = Instant::now();
        let mut paths = Paths::default();
        let key = member(false, None).key();
        paths.update(now, &MESH, &[member(false, Some("a"))]);
        paths.update(now, &MESH, &[member(false, Some("b"))]);
        assert_eq!(paths.of(&key).cloned().collect::<Vec<_>>(), [mesh("b")]);
        paths.update(now, &MESH, &[]);
        assert_eq!(paths.now(&key), &Path::None);
    }
}
