//! One room: its timeline, its current state, its members, its sticky events.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use serde_json::{Value, json};

use super::{Object, power::RoomVersion};
use crate::homeserver::ids::{Caller, DeviceId, EventId, Pos, RoomId, Timestamp, UserId};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Membership {
    Invite,
    Join,
    /// Also: was never here.
    Leave,
    Ban,
}

impl Membership {
    pub(super) fn parse(text: &str) -> Option<Self> {
        match text {
            "invite" => Some(Self::Invite),
            "join" => Some(Self::Join),
            "leave" => Some(Self::Leave),
            "ban" => Some(Self::Ban),
            _ => None,
        }
    }

    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Invite => "invite",
            Self::Join => "join",
            Self::Leave => "leave",
            Self::Ban => "ban",
        }
    }
}

/// An event on its way into a room.
#[derive(Clone, Debug)]
pub(super) struct Draft {
    pub(super) sender: UserId,
    pub(super) kind: String,
    pub(super) state_key: Option<String>,
    pub(super) content: Object,
    pub(super) redacts: Option<EventId>,
    /// MSC4354; at most an hour.
    pub(super) sticky: Option<Duration>,
    /// The device and its transaction id, shown to that device alone.
    pub(super) txn: Option<(DeviceId, String)>,
}

impl Draft {
    pub(super) fn state(sender: &UserId, kind: &str, key: &str, content: Object) -> Self {
        Self { state_key: Some(key.to_owned()), ..Self::message(sender, kind, content) }
    }

    pub(super) fn message(sender: &UserId, kind: &str, content: Object) -> Self {
        let kind = kind.to_owned();
        Self {
            sender: sender.clone(),
            kind,
            state_key: None,
            content,
            redacts: None,
            sticky: None,
            txn: None,
        }
    }
}

#[derive(Clone, Debug)]
pub(super) struct Event {
    pub(super) pos: Pos,
    pub(super) id: EventId,
    pub(super) at: Timestamp,
    pub(super) sender: UserId,
    pub(super) kind: String,
    pub(super) state_key: Option<String>,
    pub(super) content: Object,
    redacts: Option<EventId>,
    sticky: Option<Duration>,
    txn: Option<(DeviceId, String)>,
    /// The state event it took the place of: id, sender, content.
    replaces: Option<(EventId, UserId, Object)>,
    redacted_because: Option<Arc<Self>>,
}

impl Event {
    pub(super) fn sticky_until(&self) -> Option<Timestamp> {
        self.sticky.map(|duration| self.at.after(duration))
    }

    /// As clients see it. Inside `/sync` the room is known from its place: pass no `room`.
    pub(super) fn to_json(&self, now: Timestamp, viewer: Option<&Caller>, room: Option<&RoomId>) -> Value {
        let mut unsigned = Object::new();
        unsigned.insert("age".into(), (self.at.until(now).as_millis() as u64).into());
        if let Some((id, sender, content)) = &self.replaces {
            unsigned.insert("replaces_state".into(), json!(id));
            unsigned.insert("prev_sender".into(), json!(sender));
            unsigned.insert("prev_content".into(), json!(content));
        }
        if let (Some((device, txn)), Some(viewer)) = (&self.txn, viewer)
            && (&self.sender, device) == (&viewer.user, &viewer.device)
        {
            unsigned.insert("transaction_id".into(), json!(txn));
        }
        // As on Synapse, a redacted event stays in the section of sticky ones, but does not say that it sticks.
        let sticky = self.sticky.filter(|_| self.redacted_because.is_none());
        if let Some(until) = sticky.and_then(|_| self.sticky_until()) {
            let left = now.until(until).as_millis() as u64;
            unsigned.insert("msc4354_sticky_duration_ttl_ms".into(), left.into());
        }
        if let Some(redaction) = &self.redacted_because {
            unsigned.insert("redacted_by".into(), json!(redaction.id));
            unsigned.insert("redacted_because".into(), redaction.to_json(now, viewer, room));
        }
        let mut event = json!({
            "type": self.kind,
            "event_id": self.id,
            "sender": self.sender,
            "origin_server_ts": self.at.0,
            "content": self.content,
            "unsigned": unsigned,
        });
        if let Some(room) = room {
            event["room_id"] = json!(room);
        }
        if let Some(key) = &self.state_key {
            event["state_key"] = json!(key);
        }
        if let Some(redacts) = &self.redacts {
            event["redacts"] = json!(redacts);
        }
        if let Some(duration) = sticky {
            event["msc4354_sticky"] = json!({"duration_ms": duration.as_millis() as u64});
        }
        event
    }

    /// What an invited user may see before they join.
    pub(super) fn stripped(&self) -> Value {
        json!({"type": self.kind, "state_key": self.state_key, "sender": self.sender, "content": self.content})
    }

    fn redacted(&self, because: Arc<Self>) -> Self {
        let keep: &[&str] = match self.kind.as_str() {
            "m.room.member" => &["membership", "join_authorised_via_users_server"],
            "m.room.join_rules" => &["join_rule", "allow"],
            "m.room.history_visibility" => &["history_visibility"],
            "m.room.power_levels" => &[
                "ban",
                "events",
                "events_default",
                "invite",
                "kick",
                "redact",
                "state_default",
                "users",
                "users_default",
            ],
            _ => &[],
        };
        let mut event = self.clone();
        if self.kind != "m.room.create" {
            event.content.retain(|name, _| keep.contains(&name.as_str()));
        }
        event.redacted_because = Some(because);
        event
    }
}

pub(super) type StateMap = BTreeMap<(String, String), Arc<Event>>;

/// One member's standing, and since when.
#[derive(Clone, Debug)]
pub(super) struct Member {
    pub(super) membership: Membership,
    /// When the membership became what it is; a new display name does not count.
    pub(super) since: Pos,
    pub(super) before: Membership,
}

pub(super) struct Room {
    pub(super) id: RoomId,
    pub(super) version: RoomVersion,
    pub(super) creators: BTreeSet<UserId>,
    pub(super) state: StateMap,
    pub(super) members: BTreeMap<UserId, Member>,
    /// Every change of membership, for device lists.
    pub(super) member_log: VecDeque<(Pos, UserId, Membership)>,
    timeline: VecDeque<Arc<Event>>,
    by_id: HashMap<EventId, Pos>,
    /// The state before the first event of `timeline`: what forgotten events left behind.
    base: StateMap,
    sticky: Vec<Arc<Event>>,
}

impl Room {
    pub(super) fn new(id: RoomId, version: RoomVersion, creators: BTreeSet<UserId>) -> Self {
        Self {
            id,
            version,
            creators,
            state: StateMap::new(),
            members: BTreeMap::new(),
            member_log: VecDeque::new(),
            timeline: VecDeque::new(),
            by_id: HashMap::new(),
            base: StateMap::new(),
            sticky: Vec::new(),
        }
    }

    /// Takes the event in; the caller has authorised it. `limit` bounds the timeline.
    pub(super) fn append(
        &mut self,
        now: Timestamp,
        pos: Pos,
        id: EventId,
        draft: Draft,
        limit: usize,
    ) -> Arc<Event> {
        let key = draft.state_key.as_ref().map(|key| (draft.kind.clone(), key.clone()));
        let replaced = key.as_ref().and_then(|key| self.state.get(key));
        let event = Arc::new(Event {
            pos,
            id: id.clone(),
            at: now,
            replaces: replaced.map(|old| (old.id.clone(), old.sender.clone(), old.content.clone())),
            sender: draft.sender,
            kind: draft.kind,
            state_key: draft.state_key,
            content: draft.content,
            redacts: draft.redacts,
            sticky: draft.sticky,
            txn: draft.txn,
            redacted_because: None,
        });
        self.timeline.push_back(event.clone());
        self.by_id.insert(id, pos);
        if event.sticky.is_some() {
            self.sticky.retain(|old| old.sticky_until().is_some_and(|until| until > now));
            self.sticky.push(event.clone());
        }
        if let Some(key) = key {
            if key.0 == "m.room.member" {
                self.note_member(&event, &key.1, limit);
            }
            self.state.insert(key, event.clone());
        }
        if let Some(target) = &event.redacts {
            self.redact(target, &event);
        }
        while self.timeline.len() > limit.max(1) {
            let Some(oldest) = self.timeline.pop_front() else { break };
            self.by_id.remove(&oldest.id);
            if let Some(key) = &oldest.state_key {
                self.base.insert((oldest.kind.clone(), key.clone()), oldest);
            }
        }
        event
    }

    fn note_member(&mut self, event: &Event, target: &str, limit: usize) {
        let membership = event.content.get("membership").and_then(Value::as_str).and_then(Membership::parse);
        let (membership, before) = (membership.unwrap_or(Membership::Leave), self.membership(target));
        if membership == before && self.members.contains_key(target) {
            return;
        }
        let user = UserId::new(target);
        self.member_log.push_back((event.pos, user.clone(), membership));
        if self.member_log.len() > limit.max(1) {
            self.member_log.pop_front();
        }
        self.members.insert(user, Member { membership, since: event.pos, before });
    }

    fn redact(&mut self, target: &EventId, redaction: &Arc<Event>) {
        let Some(index) = self.index_of(target) else { return };
        let Some(slot) = self.timeline.get_mut(index) else { return };
        let redacted = Arc::new(slot.redacted(redaction.clone()));
        *slot = redacted.clone();
        for held in self.state.values_mut().chain(self.base.values_mut()).chain(&mut self.sticky) {
            if held.id == *target {
                *held = redacted.clone();
            }
        }
    }

    pub(super) fn membership(&self, user: &str) -> Membership {
        self.members.get(user).map_or(Membership::Leave, |member| member.membership)
    }

    pub(super) fn is_joined(&self, user: &str) -> bool {
        self.membership(user) == Membership::Join
    }

    pub(super) fn joined(&self) -> impl Iterator<Item = &UserId> {
        self.members.iter().filter(|(_, member)| member.membership == Membership::Join).map(|(user, _)| user)
    }

    pub(super) fn content(&self, kind: &str, key: &str) -> Option<&Object> {
        self.state.get(&(kind.to_owned(), key.to_owned())).map(|event| &event.content)
    }

    pub(super) fn event(&self, id: &str) -> Option<&Arc<Event>> {
        self.index_of(id).and_then(|index| self.timeline.get(index))
    }

    fn index_of(&self, id: &str) -> Option<usize> {
        let pos = self.by_id.get(id)?;
        self.timeline.binary_search_by_key(pos, |event| event.pos).ok()
    }

    /// Whether something older than the kept timeline was forgotten.
    pub(super) fn is_trimmed(&self) -> bool {
        !self.base.is_empty()
    }

    /// Events after `after` up to and including `up_to`, oldest first.
    pub(super) fn between(
        &self,
        after: Pos,
        up_to: Pos,
    ) -> impl DoubleEndedIterator<Item = &Arc<Event>> + ExactSizeIterator {
        let start = self.timeline.partition_point(|event| event.pos <= after);
        let end = self.timeline.partition_point(|event| event.pos <= up_to).max(start);
        self.timeline.range(start..end)
    }

    /// The state before the event at `before`.
    pub(super) fn state_before(&self, before: Pos) -> StateMap {
        let mut state = self.base.clone();
        for event in self.timeline.iter().take_while(|event| event.pos < before) {
            if let Some(key) = &event.state_key {
                state.insert((event.kind.clone(), key.clone()), event.clone());
            }
        }
        state
    }

    /// Sticky events that still stick.
    pub(super) fn sticky(&self, now: Timestamp) -> impl Iterator<Item = &Arc<Event>> {
        self.sticky.iter().filter(move |event| event.sticky_until().is_some_and(|until| until > now))
    }
}
