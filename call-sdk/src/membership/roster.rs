//! Everybody's membership: which events count now, in which order, and where each member's media travels.
//!
//! The roster is given the whole set of membership events whenever it changes, and the time. It reads the local
//! clock without correction, as all deployed clients do.
//!
//! Deliberate differences from deployed clients:
//! a device that is present in both forms is one member, its sticky form preferred; a *left* sticky event hides
//! nothing but its own predecessors; a sticky member keeps its first creation time while its member id stays, so
//! that an hourly refresh does not look like a rejoin; and the application of a slot is compared, not only the id.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
};

use matrix_sdk::ruma::{OwnedDeviceId, OwnedUserId};
use serde_json::Value;

use super::wire::{self, MemberEvent, ParsedMembership, Route};
use crate::{
    member::{LiveKitFocus, Member, MembershipKind, Slot},
    time::{Now, UnixMillis},
};

/// Most devices of one user that are counted as members; its oldest memberships win. Every member costs everybody
/// a key message, and a user can invent devices.
pub const MAX_DEVICES_PER_USER: usize = 128;

/// Who is in one call of one room.
#[derive(Debug)]
pub struct Roster {
    slot: Slot,
    slot_closed: bool,
    joined: BTreeSet<OwnedUserId>,
    candidates: Vec<Candidate>,
    members: Vec<Member>,
    next_expiry: Option<UnixMillis>,
}

impl Roster {
    /// An empty roster of the call `slot`.
    #[must_use]
    pub fn new(slot: Slot) -> Self {
        let call_id = wire::room_call_as_empty(&slot.call_id).to_owned();
        Self {
            slot: Slot { call_id, ..slot },
            slot_closed: false,
            joined: BTreeSet::new(),
            candidates: Vec::new(),
            members: Vec::new(),
            next_expiry: None,
        }
    }

    /// Replaces the whole set of membership events and of users joined to the room.
    pub fn update(&mut self, now: Now, events: Vec<MemberEvent>, joined: &BTreeSet<OwnedUserId>) -> Change {
        self.joined.clone_from(joined);
        self.candidates = newest_of_each_key(events)
            .into_iter()
            .filter_map(|event| {
                let membership = wire::parse(&event).ok()?;
                let gone_at = [membership.expires_at, event.sticky_until].into_iter().flatten().min();
                Some(Candidate { membership, sent: event.origin_server_ts, gone_at })
            })
            .filter(|candidate| candidate.membership.slot == self.slot)
            .collect();
        self.recount(now)
    }

    /// Takes the content of the slot's state event, `None` if there is none. In a closed slot sticky members do
    /// not count; state members do. Without the event the slot is usable (MSC4143, as deployed).
    pub fn slot_event(&mut self, now: Now, content: Option<&Value>) -> Change {
        self.slot_closed = content.is_some_and(|content| {
            let application = content.get("application").and_then(|application| application.get("type"));
            content.get("status").and_then(Value::as_str) != Some("open")
                || application.and_then(Value::as_str) != Some(self.slot.application.as_str())
        });
        self.recount(now)
    }

    /// Drops what has expired; to be called at [`Self::next_expiry`].
    pub fn tick(&mut self, now: Now) -> Change {
        self.recount(now)
    }

    /// The members, oldest first.
    #[must_use]
    pub fn members(&self) -> &[Member] {
        &self.members
    }

    /// When the next member expires if nothing comes; `None` if none does.
    #[must_use]
    pub fn next_expiry(&self) -> Option<UnixMillis> {
        self.next_expiry
    }

    /// The intent (`audio`, `video`…) that all members who state one agree on.
    #[must_use]
    pub fn consensus_intent(&self) -> Option<&str> {
        let mut stated = self.members.iter().filter_map(|member| member.intent.as_deref());
        let first = stated.next()?;
        stated.all(|intent| intent == first).then_some(first)
    }

    fn recount(&mut self, now: Now) -> Change {
        let mut counted: BTreeMap<(&OwnedUserId, &OwnedDeviceId), &Candidate> = BTreeMap::new();
        for candidate in &self.candidates {
            let membership = &candidate.membership;
            let hidden = self.slot_closed && membership.kind == MembershipKind::Sticky;
            if hidden || candidate.is_gone(now.unix) || !self.joined.contains(&membership.user_id) {
                continue;
            }
            let known = counted.entry((&membership.user_id, &membership.device_id)).or_insert(candidate);
            if candidate.rank() > known.rank() {
                *known = candidate;
            }
        }

        let mut counted: Vec<(UnixMillis, &Candidate)> =
            counted.into_values().map(|candidate| (self.first_created(candidate), candidate)).collect();
        counted.sort_by(|(a_created, a), (b_created, b)| {
            let name = |c: &Candidate| (c.membership.user_id.clone(), c.membership.device_id.clone());
            a_created.cmp(b_created).then_with(|| name(a).cmp(&name(b)))
        });
        let mut devices_of: BTreeMap<OwnedUserId, usize> = BTreeMap::new();
        counted.retain(|(_, candidate)| {
            let devices = devices_of.entry(candidate.membership.user_id.clone()).or_default();
            *devices += 1;
            *devices <= MAX_DEVICES_PER_USER
        });

        self.next_expiry = counted.iter().filter_map(|(_, candidate)| candidate.gone_at).min();
        let oldest = counted.first().and_then(|(_, oldest)| match &oldest.membership.route {
            Route::Own(focus) | Route::OldestMember(focus) => focus.clone(),
            Route::Unknown => None,
        });
        let members = counted
            .into_iter()
            .map(|(created, candidate)| candidate.member(created, oldest.as_ref()))
            .collect();
        let before = std::mem::replace(&mut self.members, members);
        Change::between(before, &self.members)
    }

    /// A sticky event is sent anew every hour and at every change, so its own time is that of the latest event;
    /// a member that is already listed keeps the time under which it is listed.
    fn first_created(&self, candidate: &Candidate) -> UnixMillis {
        let membership = &candidate.membership;
        if membership.kind == MembershipKind::State {
            return membership.created;
        }
        self.members
            .iter()
            .find(|member| member.kind == MembershipKind::Sticky && member.identity == membership.identity)
            .map_or(membership.created, |known| known.created.min(membership.created))
    }
}

/// How the members changed. A member is the same one while its user, device and SFU identity stay; a device that
/// comes back under another identity is in both `left` and `joined`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// Who is new.
    pub joined: Vec<Member>,
    /// Who is gone, as last known.
    pub left: Vec<Member>,
    /// Who says something else about itself than before: focus, intent, expiry or creation time.
    pub updated: Vec<Member>,
}

impl Change {
    /// Whether nothing changed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.joined.is_empty() && self.left.is_empty() && self.updated.is_empty()
    }

    fn between(before: Vec<Member>, after: &[Member]) -> Self {
        type Name = (OwnedUserId, OwnedDeviceId, String);
        let name = |m: &Member| -> Name { (m.user_id.clone(), m.device_id.clone(), m.identity.0.clone()) };
        let mut change = Self::default();
        let mut before: BTreeMap<Name, Member> = before.into_iter().map(|m| (name(&m), m)).collect();
        for member in after {
            match before.remove(&name(member)) {
                None => change.joined.push(member.clone()),
                Some(known) if known != *member => change.updated.push(member.clone()),
                Some(_) => {}
            }
        }
        change.left = before.into_values().collect();
        change
    }
}

/// A membership in our slot that counts while it is not gone and its sender is in the room.
#[derive(Debug)]
struct Candidate {
    membership: ParsedMembership,
    sent: UnixMillis,
    gone_at: Option<UnixMillis>,
}

impl Candidate {
    fn is_gone(&self, now: UnixMillis) -> bool {
        self.gone_at.is_some_and(|gone_at| now >= gone_at)
    }

    /// Of two memberships of one device the higher counts: sticky before state, then the newer.
    fn rank(&self) -> (bool, UnixMillis) {
        (self.membership.kind == MembershipKind::Sticky, self.sent)
    }

    fn member(&self, created: UnixMillis, oldest: Option<&LiveKitFocus>) -> Member {
        let membership = &self.membership;
        let focus = match &membership.route {
            Route::Own(focus) => focus.clone(),
            // The oldest member itself names its own focus, and that is what `oldest` is.
            Route::OldestMember(_) => oldest.cloned(),
            Route::Unknown => None,
        };
        Member {
            user_id: membership.user_id.clone(),
            device_id: membership.device_id.clone(),
            member_id: membership.member_id.clone(),
            identity: membership.identity.clone(),
            kind: membership.kind,
            created,
            expires_at: membership.expires_at,
            focus,
            intent: membership.intent.clone(),
        }
    }
}

/// Keeps of every state key, and of every sticky key of a sender, the newest event; of equal times the higher
/// event id (MSC4354). A leave is an event like any other here, so it hides what it ends and nothing else.
fn newest_of_each_key(events: Vec<MemberEvent>) -> Vec<MemberEvent> {
    let mut keyed: BTreeMap<(bool, String, String), MemberEvent> = BTreeMap::new();
    for event in events {
        let key = match event.kind {
            MembershipKind::State => (false, String::new(), event.state_key.clone().unwrap_or_default()),
            MembershipKind::Sticky => match wire::sticky_key(&event.content) {
                Ok(key) => (true, event.sender.to_string(), key.to_owned()),
                Err(_) => continue,
            },
        };
        let age = |event: &MemberEvent| (event.origin_server_ts, event.event_id.clone());
        match keyed.get(&key) {
            Some(known) if age(known) >= age(&event) => {}
            _ => {
                keyed.insert(key, event);
            }
        }
    }
    let mut events: Vec<_> = keyed.into_values().collect();
    events.sort_by_key(|event| Reverse(event.origin_server_ts));
    events
}

#[cfg(test)]
mod tests;
