//! The current events of a view: its state, and the winner of every sticky key (MSC4354).

use std::{
    collections::{BTreeMap, btree_map::Entry},
    sync::Arc,
};

use ruma_common::{EventId, OwnedEventId, UserId};
use serde_json::Value;

use crate::{
    machine::membership::wire::{self, ParsedMembership, Rejected},
    matrix::{MemberEvent, RoomView},
    member::MembershipForm,
    time::UnixMillis,
};

/// Longest text of a `capabilities` field that is logged, in bytes.
const MAX_LOGGED: usize = 1024;

/// A current membership. It counts until it expires.
#[derive(Debug)]
pub(super) struct Candidate {
    pub(super) membership: Arc<ParsedMembership>,
    pub(super) event_id: Option<OwnedEventId>,
    pub(super) sent: UnixMillis,
    pub(super) sticky_until: Option<UnixMillis>,
}

impl Candidate {
    /// Of two memberships of one device the higher counts: sticky before state, then the newer.
    pub(super) fn rank(&self) -> (bool, UnixMillis, Option<&EventId>) {
        (self.membership.form == MembershipForm::Sticky, self.sent, self.event_id.as_deref())
    }
}

/// Finds the current events, and remembers what a redaction takes away: the sticky key of an event.
#[derive(Debug, Default)]
pub(super) struct CurrentEvents {
    /// The memberships of the last view, by event.
    known: BTreeMap<OwnedEventId, Known>,
    capabilities_logged: bool,
}

#[derive(Clone, Debug)]
struct Known {
    event: MemberEvent,
    /// Whether the room was encrypted when the event was read.
    encrypted: bool,
    membership: Arc<ParsedMembership>,
}

impl Known {
    /// Whether it was read from this very event.
    fn is(&self, event: &MemberEvent, encrypted: bool) -> bool {
        self.encrypted == encrypted && self.event == *event
    }
}

impl CurrentEvents {
    /// Reads the current memberships of a view. In a room of many members all but one are known from the view before.
    pub(super) fn read(&mut self, view: &RoomView) -> Vec<Candidate> {
        let mut known = BTreeMap::new();
        let mut candidates = Vec::new();
        for event in self.current(&view.members) {
            self.log_capabilities(&event.content);
            let before = event.event_id.as_ref().and_then(|id| self.known.remove(id));
            let as_before = before.as_ref().filter(|known| known.is(event, view.encrypted));
            let read = match as_before {
                Some(known) => Ok(known.membership.clone()),
                None => wire::read(event, view.encrypted).map(Arc::new),
            };
            let membership = match read {
                Ok(membership) => membership,
                Err(rejected) => {
                    if let Rejected::Ignored(reason) = rejected {
                        tracing::trace!(sender = %event.sender, %reason, "member event ignored");
                    }
                    known.extend(event.event_id.clone().zip(before));
                    continue;
                }
            };
            if let Some(id) = &event.event_id {
                let entry = match before {
                    Some(before) if Arc::ptr_eq(&before.membership, &membership) => before,
                    _ => {
                        let (event, membership) = (event.clone(), membership.clone());
                        Known { event, encrypted: view.encrypted, membership }
                    }
                };
                known.insert(id.clone(), entry);
            }
            candidates.push(Candidate {
                membership,
                event_id: event.event_id.clone(),
                sent: event.origin_server_ts,
                sticky_until: event.sticky_until,
            });
        }
        self.known = known;
        candidates
    }

    /// Returns every state event, and for every sticky key of a sender the event that expires last; among equals the
    /// one with the higher event id. A leave is an event like any other here: it hides its predecessors and nothing
    /// else.
    fn current<'a>(&self, events: &'a [MemberEvent]) -> Vec<&'a MemberEvent> {
        let mut current = Vec::new();
        let mut winners: BTreeMap<(&UserId, &str), &MemberEvent> = BTreeMap::new();
        for event in events {
            if event.form == MembershipForm::State {
                current.push(event);
                continue;
            }
            let Some(key) = self.sticky_key(event) else { continue };
            match winners.entry((&event.sender, key)) {
                Entry::Vacant(entry) => drop(entry.insert(event)),
                Entry::Occupied(mut entry) => {
                    if self.rank(event) > self.rank(entry.get()) {
                        entry.insert(event);
                    }
                }
            }
        }
        current.extend(winners.into_values());
        current
    }

    /// The key of an event. A redacted event has lost its key and stays under the one that it had.
    fn sticky_key<'a>(&'a self, event: &'a MemberEvent) -> Option<&'a str> {
        if event.redacted_by.is_none() {
            return event.sticky_until.and_then(|_| wire::sticky_key(&event.content).ok());
        }
        wire::sticky_key(&self.known(event)?.event.content).ok()
    }

    fn rank<'a>(&self, event: &'a MemberEvent) -> (UnixMillis, Option<&'a EventId>) {
        let known = self.known(event).map_or(UnixMillis(0), |known| known.event.sticky_rank);
        (event.sticky_rank.max(known), event.event_id.as_deref())
    }

    fn known(&self, event: &MemberEvent) -> Option<&Known> {
        self.known.get(event.event_id.as_ref()?)
    }

    /// `capabilities` of member events are not documented yet: the first one is logged to learn them.
    fn log_capabilities(&mut self, content: &Value) {
        if let (false, Some(capabilities)) = (self.capabilities_logged, content.get("capabilities")) {
            self.capabilities_logged = true;
            let text = capabilities.to_string();
            let end = text.floor_char_boundary(MAX_LOGGED);
            tracing::debug!(capabilities = &text[..end], "a member event has capabilities");
        }
    }
}
