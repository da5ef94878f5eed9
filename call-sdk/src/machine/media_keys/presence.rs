//! Differences between two lists of members, so that a change costs only as much as it changes.

use std::collections::BTreeMap;

use ruma_common::{DeviceId, UserId};

use crate::{
    member::{Device, Member, MemberKey, MembershipForm},
    time::UnixMillis,
};

/// The members as they were given last.
#[derive(Debug)]
pub(super) struct Presence {
    own: Device,
    seen: Vec<Seen>,
}

/// What changed. Our own device is left out, except in `own`.
#[derive(Debug, Default)]
pub(super) struct Changes<'a> {
    /// New memberships.
    pub(super) joined: Vec<&'a Member>,
    /// Memberships with another creation time, form or reading of MSC4143.
    pub(super) changed: Vec<&'a Member>,
    /// Memberships that ended.
    pub(super) left: Vec<MemberKey>,
    /// The memberships of our own device, if one of them changed.
    pub(super) own: Option<Vec<&'a Member>>,
}

impl Presence {
    pub(super) fn new(own: Device) -> Self {
        Self { own, seen: Vec::new() }
    }

    pub(super) fn clear(&mut self) {
        self.seen.clear();
    }

    pub(super) fn update<'a>(&mut self, members: &'a [Member]) -> Changes<'a> {
        let mut changes = Changes::default();
        // Lists of members are in order of creation: most changes are at the end.
        let same = self.seen.iter().zip(members).take_while(|(seen, member)| seen.is(member)).count();
        for (seen, member) in self.seen.iter_mut().zip(&members[..same]) {
            if seen.update(member) {
                changes.changed.push(member);
            }
        }
        let mut old: BTreeMap<_, _> = self.seen.drain(same..).map(|seen| (seen.key.clone(), seen)).collect();
        for member in &members[same..] {
            match old.remove(&member.key()) {
                Some(mut seen) => {
                    if seen.update(member) {
                        changes.changed.push(member);
                    }
                    self.seen.push(seen);
                }
                None => {
                    changes.joined.push(member);
                    self.seen.push(Seen::new(member));
                }
            }
        }
        changes.left = old.into_keys().collect();
        self.set_own_apart(members, &mut changes);
        changes
    }

    fn set_own_apart<'a>(&self, members: &'a [Member], changes: &mut Changes<'a>) {
        let is_own = |member: &Member| self.is_own(&member.user_id, member.device_id.as_deref());
        let before = changes.joined.len() + changes.changed.len() + changes.left.len();
        changes.joined.retain(|member| !is_own(member));
        changes.changed.retain(|member| !is_own(member));
        changes.left.retain(|key| !self.is_own(&key.user_id, key.device_id.as_deref()));
        if before != changes.joined.len() + changes.changed.len() + changes.left.len() {
            changes.own = Some(members.iter().filter(|member| is_own(member)).collect());
        }
    }

    fn is_own(&self, user: &UserId, device: Option<&DeviceId>) -> bool {
        *user == self.own.user_id && device == Some(&self.own.device_id)
    }
}

#[derive(Debug)]
struct Seen {
    key: MemberKey,
    state: State,
}

type State = (UnixMillis, MembershipForm, bool);

fn state(member: &Member) -> State {
    (member.created, member.form, member.reads_msc_keys)
}

impl Seen {
    fn new(member: &Member) -> Self {
        Self { key: member.key(), state: state(member) }
    }

    fn is(&self, member: &Member) -> bool {
        self.key.user_id == member.user_id
            && self.key.device_id == member.device_id
            && self.key.member_id == member.member_id
    }

    /// Whether something changed.
    fn update(&mut self, member: &Member) -> bool {
        let state = state(member);
        std::mem::replace(&mut self.state, state) != state
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::testing::{device, state_member};

    fn member(name: &str, created: u64) -> Member {
        state_member(&format!("@{name}:example.org"), "D", created)
    }

    fn names(members: &[&Member]) -> Vec<String> {
        members.iter().map(|member| member.user_id.localpart().to_owned()).collect()
    }

    #[test]
    fn changes_are_the_difference_of_two_lists() {
        let mut presence = Presence::new(device("@me:example.org", "D"));
        let lists = [
            vec![member("me", 1), member("a", 1), member("b", 1)],
            vec![member("me", 1), member("a", 1), member("b", 2), member("c", 1)],
            vec![member("a", 1), member("c", 1), member("b", 2), member("d", 1)],
            vec![member("a", 3), member("me", 9)],
        ];
        let mut seen = Vec::new();
        for list in &lists {
            let changes = presence.update(list);
            let left: Vec<_> = changes.left.iter().map(|key| key.user_id.localpart().to_owned()).collect();
            let own = changes.own.map(|own| own.len());
            seen.push((
                names(&changes.joined).join(""),
                names(&changes.changed).join(""),
                left.join(""),
                own,
            ));
        }
        let row = |joined: &str, changed: &str, left: &str, own| {
            (joined.to_owned(), changed.to_owned(), left.to_owned(), own)
        };
        assert_eq!(
            seen,
            [
                row("ab", "", "", Some(1)),
                row("c", "b", "", None),
                row("d", "", "", Some(0)),
                row("", "a", "bcd", Some(1)),
            ]
        );
        presence.clear();
        assert_eq!(names(&presence.update(&lists[3]).joined), ["a"]);
    }
}
