//! Delayed events (MSC4140): scheduled, restarted, cancelled, sent at once, or sent when their time comes.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    time::Duration,
};

use serde_json::{Value, json};

use super::{Answer, State, room::Draft};
use crate::homeserver::{
    error::MatrixError,
    ids::{Caller, DelayId, RoomId, Timestamp, UserId},
};

/// How delayed events are scheduled and managed (MSC4140).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DelayedForm {
    /// By a query parameter of the ordinary requests, as on Synapse 1.163. Other paths do not exist.
    #[default]
    QueryParameter,
    /// By the dedicated endpoint under its unstable path; the query parameter is ignored, and the event is sent at once.
    Unstable,
    /// By the dedicated endpoint under its stable or its unstable path.
    Stable,
}

/// What the owner, or whoever they told the delay id, may do with a scheduled event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::homeserver) enum Action {
    Restart,
    Cancel,
    Send,
}

impl Action {
    pub(in crate::homeserver) fn parse(text: &str) -> Option<Self> {
        match text {
            "restart" => Some(Self::Restart),
            "cancel" => Some(Self::Cancel),
            "send" => Some(Self::Send),
            _ => None,
        }
    }
}

struct Scheduled {
    room: RoomId,
    draft: Draft,
    delay: Duration,
    since: Timestamp,
}

impl Scheduled {
    fn due(&self) -> Timestamp {
        self.since.after(self.delay)
    }

    fn to_json(&self, id: &DelayId) -> Value {
        // Both generations of names, as Synapse gives them.
        let mut entry = json!({
            "delay_id": id,
            "room_id": self.room,
            "type": self.draft.kind,
            "content": self.draft.content,
            "delay": self.delay.as_millis() as u64,
            "delay_ms": self.delay.as_millis() as u64,
            "running_since": self.since.0,
            "delayed_since_ts": self.since.0,
        });
        if let Some(key) = &self.draft.state_key {
            entry["state_key"] = json!(key);
        }
        entry
    }
}

type StateSlot = (RoomId, String, String);

#[derive(Default)]
pub(super) struct DelayedEvents {
    by_id: BTreeMap<DelayId, Scheduled>,
    due: BTreeSet<(Timestamp, DelayId)>,
    by_user: HashMap<UserId, BTreeSet<DelayId>>,
    by_slot: HashMap<StateSlot, BTreeSet<DelayId>>,
    /// The latest that were sent or cancelled.
    finalised: VecDeque<DelayId>,
}

/// Delayed events that are remembered after they were sent or cancelled.
const FINALISED: usize = 1_000;

impl DelayedEvents {
    fn of(&self, user: &str) -> impl Iterator<Item = (&DelayId, &Scheduled)> {
        self.by_user.get(user).into_iter().flatten().filter_map(|id| self.by_id.get_key_value(id))
    }

    fn insert(&mut self, id: DelayId, event: Scheduled) {
        self.due.insert((event.due(), id.clone()));
        self.by_user.entry(event.draft.sender.clone()).or_default().insert(id.clone());
        if let Some(slot) = slot(&event) {
            self.by_slot.entry(slot).or_default().insert(id.clone());
        }
        self.by_id.insert(id, event);
    }

    fn remove(&mut self, id: &str) -> Option<Scheduled> {
        let (id, event) = self.by_id.remove_entry(id)?;
        self.due.remove(&(event.due(), id.clone()));
        forget(&mut self.by_user, &event.draft.sender, &id);
        if let Some(slot) = slot(&event) {
            forget(&mut self.by_slot, &slot, &id);
        }
        Some(event)
    }

    fn finalise(&mut self, id: &str) {
        self.finalised.push_back(DelayId::new(id));
        if self.finalised.len() > FINALISED {
            self.finalised.pop_front();
        }
    }

    /// A state event by somebody else makes the scheduled one moot; by the same sender it does not.
    pub(super) fn overtaken(&mut self, room: &RoomId, kind: &str, key: &str, sender: &UserId) {
        let ids =
            self.by_slot.get(&(room.clone(), kind.to_owned(), key.to_owned())).cloned().unwrap_or_default();
        for id in ids {
            if self.by_id.get(&id).is_some_and(|event| event.draft.sender != *sender) {
                self.remove(&id);
            }
        }
    }
}

fn slot(event: &Scheduled) -> Option<StateSlot> {
    let key = event.draft.state_key.as_ref()?;
    Some((event.room.clone(), event.draft.kind.clone(), key.clone()))
}

fn forget<K: std::hash::Hash + Eq>(index: &mut HashMap<K, BTreeSet<DelayId>>, key: &K, id: &DelayId) {
    if let Some(ids) = index.get_mut(key) {
        ids.remove(id);
        if ids.is_empty() {
            index.remove(key);
        }
    }
}

impl State {
    /// Whether the sender may send it is asked when it is sent, as on Synapse.
    pub(super) fn schedule(&mut self, now: Timestamp, room: &str, draft: Draft, delay: Duration) -> Answer {
        let max = self.config.max_delay;
        if delay > max {
            return Err(MatrixError::new(
                400,
                "ORG.MATRIX.MSC4140_DELAY_TOO_LARGE",
                format!(
                    "The requested delay ({}ms) exceeds the allowed maximum ({}ms)",
                    delay.as_millis(),
                    max.as_millis()
                ),
            ));
        }
        let Some((room, _)) = self.rooms.get_key_value(room) else {
            return Err(MatrixError::not_found(format!("Could not find room_version for {room}")));
        };
        if self.delayed.of(&draft.sender).count() >= self.config.limits.scheduled {
            return Err(MatrixError::limit_exceeded(
                "The maximum number of delayed events has been reached.",
                None,
            ));
        }
        let room = room.clone();
        let id = DelayId::new(format!("syd_{}", self.random_text(20)));
        self.delayed.insert(id.clone(), Scheduled { room, draft, delay, since: now });
        Ok(json!({"delay_id": id}))
    }

    pub(in crate::homeserver) fn delayed_events(&self, who: &Caller) -> Answer {
        let mut events: Vec<_> = self.delayed.of(&who.user).collect();
        events.sort_by_key(|(_, event)| event.due());
        let events: Vec<_> = events.into_iter().map(|(id, event)| event.to_json(id)).collect();
        Ok(json!({"delayed_events": events}))
    }

    pub(in crate::homeserver) fn delayed_event(&self, who: &Caller, id: &str) -> Answer {
        match self.delayed.by_id.get_key_value(id) {
            Some((id, event)) if event.draft.sender == who.user => Ok(event.to_json(id)),
            _ => Err(unknown()),
        }
    }

    /// Knowing the delay id is all the authority it takes: that is how a leave is delegated.
    pub(in crate::homeserver) fn manage_delayed(
        &mut self,
        now: Timestamp,
        id: &str,
        action: Action,
    ) -> Answer {
        let Some(event) = self.delayed.remove(id) else {
            let is_final = self.delayed.finalised.iter().any(|known| **known == *id);
            let is_told = self.config.delayed_form != DelayedForm::QueryParameter;
            return Err(if is_final && is_told { already_final() } else { unknown() });
        };
        match action {
            Action::Cancel => self.delayed.finalise(id),
            Action::Restart => self.delayed.insert(DelayId::new(id), Scheduled { since: now, ..event }),
            Action::Send => {
                self.delayed.finalise(id);
                self.send_draft(now, &event.room, event.draft)?;
            }
        }
        Ok(json!({}))
    }

    pub(in crate::homeserver) fn delayed_form(&self) -> DelayedForm {
        self.config.delayed_form
    }

    /// When [`Self::fire_due`] has something to do.
    pub(in crate::homeserver) fn next_deadline(&self) -> Option<Timestamp> {
        self.delayed.due.first().map(|(due, _)| *due)
    }

    /// Sends every delayed event whose time has come. One that its sender may no longer send is dropped.
    pub(in crate::homeserver) fn fire_due(&mut self, now: Timestamp) {
        while let Some((due, id)) = self.delayed.due.first().cloned()
            && due <= now
        {
            let Some(event) = self.delayed.remove(&id) else { break };
            self.delayed.finalise(&id);
            if let Err(refusal) = self.send_draft(now, &event.room, event.draft) {
                tracing::debug!(delay_id = %id, refusal = %refusal.body, "a delayed event was refused");
            }
        }
    }
}

fn already_final() -> MatrixError {
    MatrixError::new(409, "M_UNKNOWN", "The delayed event was already sent or cancelled")
}

fn unknown() -> MatrixError {
    MatrixError::not_found("Delayed event not found")
}
