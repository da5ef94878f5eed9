//! The members of a call, in order, and which focus carries each member's media.
//!
//! The roster is given the whole room view whenever it changes, and the time.
//!
//! Deliberate differences from deployed clients:
//! - a device that is present in both forms is one member, its sticky form preferred;
//! - a *left* sticky event hides nothing but its own predecessors;
//! - a sticky member keeps its first creation time while its member id stays, so that an hourly refresh does not look
//!   like a rejoin;
//! - the application of a slot is compared, not only the id;
//! - a local clock that is far ahead does not expire everybody.

mod change;
mod clock;
mod current;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use ruma_common::{DeviceId, UserId};

pub(crate) use change::Change;
use clock::ClockGuard;
use current::{Candidate, CurrentEvents};

use super::{
    slots::{self, SlotStatus},
    wire::Route,
};
use crate::{
    matrix::RoomView,
    member::{Member, MemberId, MembershipForm, Slot},
    time::{Now, UnixMillis},
    transport::{LiveKitFocus, Transport},
};

/// Most devices of one user that are counted as members; its oldest memberships win. Every member costs everybody
/// a key message, and a user can invent devices.
pub(crate) const MAX_DEVICES_PER_USER: usize = 128;

/// Most other slots that are reported.
pub(crate) const MAX_OTHER_SLOTS: usize = 16;

/// The members of one call of one room.
#[derive(Debug)]
pub(crate) struct Roster {
    slot: Slot,
    slot_status: SlotStatus,
    events: CurrentEvents,
    clock: ClockGuard,
    /// The memberships of users in the room, in all usable slots of our application.
    candidates: Vec<Candidate>,
    members: Vec<Member>,
    other_slots: Vec<(Slot, usize)>,
    next_expiry: Option<UnixMillis>,
}

impl Roster {
    /// An empty roster of the call `slot`.
    #[must_use]
    pub(crate) fn new(slot: Slot) -> Self {
        Self {
            slot,
            slot_status: SlotStatus::Absent,
            events: CurrentEvents::default(),
            clock: ClockGuard::default(),
            candidates: Vec::new(),
            members: Vec::new(),
            other_slots: Vec::new(),
            next_expiry: None,
        }
    }

    /// Reads the room anew.
    pub(crate) fn update(&mut self, now: Now, view: &RoomView) -> Change {
        self.clock.observe(now.unix, view.members.iter().map(|event| event.origin_server_ts));
        let statuses = slots::statuses(view);
        self.slot_status = statuses.get(&self.slot).copied().unwrap_or(SlotStatus::Absent);
        self.candidates = self.events.read(view);
        self.candidates.retain(|Candidate { membership, .. }| {
            let is_usable = membership.form == MembershipForm::State
                || statuses.get(&membership.slot).is_none_or(|status| status.is_usable());
            is_usable
                && membership.slot.application == self.slot.application
                && view.joined.contains(&membership.user_id)
        });
        self.recount(now)
    }

    /// Drops expired members; to be called at [`Self::next_expiry`].
    pub(crate) fn tick(&mut self, now: Now) -> Change {
        self.recount(now)
    }

    /// The members, oldest first.
    #[must_use]
    pub(crate) fn members(&self) -> &[Member] {
        &self.members
    }

    /// When the next membership expires by our clock, in this slot or another; `None` if none does.
    #[must_use]
    pub(crate) fn next_expiry(&self) -> Option<UnixMillis> {
        self.next_expiry
    }

    /// The other slots of our application that have members, and how many; the largest first, at most
    /// [`MAX_OTHER_SLOTS`]. Their members are in another call: they are never merged with ours.
    #[must_use]
    pub(crate) fn other_slots(&self) -> &[(Slot, usize)] {
        &self.other_slots
    }

    /// The state of our slot.
    #[must_use]
    pub(crate) fn slot_status(&self) -> SlotStatus {
        self.slot_status
    }

    /// The number of users in each slot of our application.
    pub(super) fn users_per_slot(&self) -> BTreeMap<Slot, usize> {
        let mut users: BTreeMap<&Slot, BTreeSet<&UserId>> = BTreeMap::new();
        for Candidate { membership, .. } in &self.candidates {
            users.entry(&membership.slot).or_default().insert(&membership.user_id);
        }
        users.into_iter().map(|(slot, users)| (slot.clone(), users.len())).collect()
    }

    fn recount(&mut self, now: Now) -> Change {
        let clock = &self.clock;
        self.candidates.retain(|candidate| gone_at(candidate, clock).is_none_or(|at| now.unix < at));
        let mut slots = by_slot(&self.candidates);
        let counted = slots.remove(&self.slot).unwrap_or_default();

        let mut counted: Vec<(UnixMillis, &Candidate)> = self.with_created(counted);
        counted.sort_by(|(a_created, a), (b_created, b)| {
            a_created.cmp(b_created).then_with(|| device_key(a).cmp(&device_key(b)))
        });
        let mut devices_of: BTreeMap<&UserId, usize> = BTreeMap::new();
        counted.retain(|(_, candidate)| {
            let devices = devices_of.entry(&candidate.membership.user_id).or_default();
            *devices += 1;
            *devices <= MAX_DEVICES_PER_USER
        });

        let others = slots.values().flatten().copied();
        let shown = counted.iter().map(|(_, candidate)| *candidate).chain(others);
        self.next_expiry = shown.filter_map(|candidate| gone_at(candidate, clock)).min();
        self.other_slots = largest(slots);

        let oldest = counted.first().and_then(|(_, oldest)| match &oldest.membership.route {
            Route::Own(foci) | Route::OldestMember(foci) => foci.first(),
            Route::Unknown => None,
        });
        let members =
            counted.iter().map(|(created, candidate)| member(candidate, *created, oldest)).collect();
        let before = std::mem::replace(&mut self.members, members);
        Change::between(before, &self.members)
    }

    /// Pairs candidates with their creation times. A sticky event is sent anew every hour and at every change, so its
    /// own time is that of the latest event; a listed member keeps the time under which it is listed.
    fn with_created<'a>(&self, candidates: Vec<&'a Candidate>) -> Vec<(UnixMillis, &'a Candidate)> {
        let sticky = self.members.iter().filter(|member| member.form == MembershipForm::Sticky);
        let listed: BTreeMap<_, _> =
            sticky.map(|member| ((&member.user_id, &member.member_id), member.created)).collect();
        let created = |Candidate { membership, .. }: &Candidate| {
            let known = (membership.form == MembershipForm::Sticky)
                .then(|| listed.get(&(&membership.user_id, &membership.member_id)));
            known.flatten().copied().unwrap_or(membership.created)
        };
        candidates.into_iter().map(|candidate| (created(candidate), candidate)).collect()
    }
}

/// When a membership ends by our clock unless it is renewed.
fn gone_at(candidate: &Candidate, clock: &ClockGuard) -> Option<UnixMillis> {
    let expires = candidate.membership.expires_at.map(|at| clock.local(at));
    [expires, candidate.sticky_until].into_iter().flatten().min()
}

/// A device, or a membership without one.
fn device_key(candidate: &Candidate) -> (&UserId, Option<&DeviceId>, Option<&MemberId>) {
    let membership = &candidate.membership;
    let device_id = membership.device_id.as_deref();
    (&membership.user_id, device_id, device_id.is_none().then_some(&membership.member_id))
}

/// One candidate per device in each slot.
fn by_slot(candidates: &[Candidate]) -> BTreeMap<&Slot, Vec<&Candidate>> {
    let mut slots: BTreeMap<&Slot, BTreeMap<_, &Candidate>> = BTreeMap::new();
    for candidate in candidates {
        let devices = slots.entry(&candidate.membership.slot).or_default();
        let known = devices.entry(device_key(candidate)).or_insert(candidate);
        if candidate.rank() > known.rank() {
            *known = candidate;
        }
    }
    slots.into_iter().map(|(slot, devices)| (slot, devices.into_values().collect())).collect()
}

fn largest(slots: BTreeMap<&Slot, Vec<&Candidate>>) -> Vec<(Slot, usize)> {
    let mut slots: Vec<_> = slots.into_iter().map(|(slot, members)| (slot.clone(), members.len())).collect();
    slots.sort_by(|(a, a_count), (b, b_count)| b_count.cmp(a_count).then_with(|| a.cmp(b)));
    slots.truncate(MAX_OTHER_SLOTS);
    slots
}

fn member(candidate: &Candidate, created: UnixMillis, oldest: Option<&LiveKitFocus>) -> Member {
    let membership = &candidate.membership;
    let foci = match &membership.route {
        Route::Own(foci) => foci.as_slice(),
        // The oldest member itself names its own focus, and that is `oldest`.
        // Without a focus of its own it is in the mesh, if it is there.
        Route::OldestMember(own) if own.is_empty() && membership.mesh.is_some() => &[],
        Route::OldestMember(_) => oldest.map(std::slice::from_ref).unwrap_or_default(),
        Route::Unknown => &[],
    };
    Member {
        user_id: membership.user_id.clone(),
        device_id: membership.device_id.clone(),
        member_id: membership.member_id.clone(),
        identities: membership.identities.clone(),
        form: membership.form,
        created,
        expires_at: membership.expires_at,
        transports: foci
            .iter()
            .cloned()
            .map(Transport::LiveKit)
            .chain(membership.mesh.clone().map(Transport::Mesh))
            .collect(),
        intent: membership.intent.clone(),
        event_id: candidate.event_id.clone(),
        reads_msc_keys: membership.reads_msc_keys,
    }
}
