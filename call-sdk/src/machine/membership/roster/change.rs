//! The difference between two lists of members.

use std::collections::BTreeMap;

use crate::member::{Member, MemberKey};

/// How the members changed. A member is the same one while its [`MemberKey`] stays; a device that comes back with
/// another member id is in both `left` and `joined`. Otherwise a member is in at most one list.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Change {
    /// The new members.
    pub joined: Vec<Member>,
    /// The members that are gone, as last known.
    pub left: Vec<Member>,
    /// The members that left and came back unnoticed: another creation time or event form under the same key. They
    /// need our media key again.
    pub rejoined: Vec<Member>,
    /// The members that changed in any other way: transport, intent, expiry or newest event.
    pub updated: Vec<Member>,
}

impl Change {
    /// Whether nothing changed.
    #[must_use]
    pub(crate) fn is_empty(&self) -> bool {
        let Self { joined, left, rejoined, updated } = self;
        [joined, left, rejoined, updated].into_iter().all(Vec::is_empty)
    }

    pub(super) fn between(before: Vec<Member>, after: &[Member]) -> Self {
        let mut change = Self::default();
        let mut before: BTreeMap<MemberKey, Member> = before.into_iter().map(|m| (m.key(), m)).collect();
        for member in after {
            let Some(known) = before.remove(&member.key()) else {
                change.joined.push(member.clone());
                continue;
            };
            if known.created != member.created || known.form != member.form {
                change.rejoined.push(member.clone());
            } else if known != *member {
                change.updated.push(member.clone());
            }
        }
        change.left = before.into_values().collect();
        change
    }
}
