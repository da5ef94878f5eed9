//! What users do in rooms: send, read, join, invite, leave.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use serde_json::{Value, json};

use super::{
    Answer, Object, State, required_text,
    room::{Draft, Event, Membership, Room},
    text,
};
use crate::homeserver::{
    error::MatrixError,
    ids::{Caller, EventId, Pos, RoomId, Timestamp, UserId},
};

/// MSC4354: longer stickiness is cut down to this, as Synapse does.
const LONGEST_STICKY: Duration = Duration::from_secs(3600);
/// The limit of the Matrix specification for a whole event; here it is applied to the content.
const LARGEST_EVENT: usize = 65_536;

/// An event as a client asks to send it.
#[derive(Clone, Debug)]
pub(in crate::homeserver) struct Outgoing {
    pub(in crate::homeserver) room: String,
    pub(in crate::homeserver) kind: String,
    pub(in crate::homeserver) state_key: Option<String>,
    /// Absent for state events: repeating those changes nothing.
    pub(in crate::homeserver) txn: Option<String>,
    pub(in crate::homeserver) content: Object,
    pub(in crate::homeserver) redacts: Option<String>,
    pub(in crate::homeserver) delay: Option<Duration>,
    pub(in crate::homeserver) sticky: Option<Duration>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::homeserver) enum Direction {
    Backwards,
    Forwards,
}

#[derive(Clone, Debug)]
pub(in crate::homeserver) struct MessagesQuery {
    pub(in crate::homeserver) direction: Direction,
    pub(in crate::homeserver) from: Option<String>,
    pub(in crate::homeserver) limit: usize,
}

impl State {
    pub(in crate::homeserver) fn send(&mut self, now: Timestamp, who: &Caller, event: Outgoing) -> Answer {
        let txn_key = event.txn.as_ref().map(|txn| format!("send {} {} {txn}", event.room, event.kind));
        if let Some(key) = &txn_key
            && let Some(answer) = self.transactions(who)?.answered(key)
        {
            return Ok(answer);
        }
        let in_content =
            (event.kind == "m.room.redaction").then(|| text(&event.content, "redacts")).flatten();
        let draft = Draft {
            redacts: event.redacts.as_deref().or(in_content).map(EventId::new),
            sender: who.user.clone(),
            kind: event.kind,
            state_key: event.state_key,
            content: event.content,
            sticky: event.sticky.map(|duration| duration.min(LONGEST_STICKY)).filter(|d| !d.is_zero()),
            txn: event.txn.map(|txn| (who.device.clone(), txn)),
        };
        check_size(&draft)?;
        let answer = match event.delay {
            Some(delay) => self.schedule(now, &event.room, draft, delay)?,
            None => json!({"event_id": self.send_draft(now, &event.room, draft)?}),
        };
        if let Some(key) = txn_key {
            self.transactions(who)?.remember(key, answer.clone());
        }
        Ok(answer)
    }

    pub(in crate::homeserver) fn redact(
        &mut self,
        now: Timestamp,
        who: &Caller,
        (room, event, txn): (String, String, String),
        mut content: Object,
    ) -> Answer {
        content.insert("redacts".into(), event.as_str().into());
        let redaction = Outgoing {
            room,
            kind: "m.room.redaction".to_owned(),
            state_key: None,
            txn: Some(txn),
            content,
            redacts: Some(event),
            delay: None,
            sticky: None,
        };
        self.send(now, who, redaction)
    }

    /// Authorises and appends; the way of every event but the first of a room.
    pub(super) fn send_draft(
        &mut self,
        now: Timestamp,
        room: &str,
        draft: Draft,
    ) -> Result<EventId, MatrixError> {
        let Some((_, room)) = self.rooms.get_key_value(room) else {
            return Err(MatrixError::forbidden(format!("User {} not in room {room}", draft.sender)));
        };
        room.authorise(&draft)?;
        if let Some(key) = &draft.state_key {
            let current = room.state.get(&(draft.kind.clone(), key.clone()));
            // Synapse too answers with the event that is already there; a repeated request changes nothing.
            if let Some(same) = current.filter(|c| c.sender == draft.sender && c.content == draft.content) {
                return Ok(same.id.clone());
            }
            if current.is_none() && room.state.len() >= self.config.limits.state_per_room {
                return Err(Self::full("state in this room"));
            }
        }
        let id = room.id.clone();
        let event_id = EventId::new(format!("${}", self.random_text(43)));
        self.append(now, &id, event_id, draft)
    }

    pub(super) fn append(
        &mut self,
        now: Timestamp,
        room_id: &RoomId,
        id: EventId,
        draft: Draft,
    ) -> Result<EventId, MatrixError> {
        let (pos, limit) = (self.advance(), self.config.limits.timeline);
        let room = self.rooms.get_mut(room_id).ok_or_else(|| MatrixError::not_found("No such room"))?;
        let event = room.append(now, pos, id, draft, limit);
        self.woken.extend(room.joined().cloned());
        if let Some(key) = &event.state_key {
            let target = self.users.get_key_value(key.as_str()).map(|(user, _)| user.clone());
            if event.kind == "m.room.member"
                && let Some(user) = target
                && let Some(account) = self.users.get_mut(&user)
            {
                account.rooms.insert(room_id.clone());
                self.woken.insert(user);
            }
            self.delayed.overtaken(room_id, &event.kind, key, &event.sender);
        }
        Ok(event.id.clone())
    }

    pub(in crate::homeserver) fn join(
        &mut self,
        now: Timestamp,
        who: &Caller,
        room: &str,
        body: &Object,
    ) -> Answer {
        let Some((room, known)) = self.resolve(room).and_then(|id| self.rooms.get_key_value(&*id)) else {
            return Err(MatrixError::new(
                404,
                "M_UNKNOWN",
                "Can't join a room that this server does not know.",
            ));
        };
        let room = room.clone();
        if !known.is_joined(&who.user) {
            let mut content = self.member_content(&who.user, Membership::Join);
            copy_reason(body, &mut content);
            self.send_draft(now, &room, Draft::state(&who.user, "m.room.member", &who.user, content))?;
        }
        Ok(json!({"room_id": room}))
    }

    pub(super) fn invite(
        &mut self,
        now: Timestamp,
        who: &Caller,
        room: &str,
        user: &str,
        reason: Option<&Object>,
        is_direct: bool,
    ) -> Answer {
        if !self.is_local(user) {
            return Err(MatrixError::forbidden(format!(
                "{user} is on another server, and this one does not federate"
            )));
        }
        let mut content = self.member_content(user, Membership::Invite);
        if is_direct {
            content.insert("is_direct".into(), true.into());
        }
        if let Some(body) = reason {
            copy_reason(body, &mut content);
        }
        self.send_draft(now, room, Draft::state(&who.user, "m.room.member", user, content))?;
        Ok(json!({}))
    }

    /// `invite`, `leave`, `kick`, `ban` and `unban` of the client API.
    pub(in crate::homeserver) fn change_membership(
        &mut self,
        now: Timestamp,
        who: &Caller,
        room: &str,
        verb: &str,
        body: &Object,
    ) -> Answer {
        if verb == "invite" {
            return self.invite(now, who, room, required_text(body, "user_id")?, Some(body), false);
        }
        let target = match verb {
            "leave" => who.user.to_string(),
            _ => required_text(body, "user_id")?.to_owned(),
        };
        let current = self.membership(room, &target);
        let is_moot = match verb {
            "kick" => !matches!(current, Membership::Join | Membership::Invite),
            "unban" => current != Membership::Ban,
            _ => false,
        };
        if is_moot {
            return Err(MatrixError::forbidden(format!(
                "{verb}: the membership of {target} is {}",
                current.as_str()
            )));
        }
        let mut content = Object::new();
        let membership = if verb == "ban" { Membership::Ban } else { Membership::Leave };
        content.insert("membership".into(), membership.as_str().into());
        copy_reason(body, &mut content);
        self.send_draft(now, room, Draft::state(&who.user, "m.room.member", &target, content))?;
        Ok(json!({}))
    }

    pub(in crate::homeserver) fn forget(&mut self, who: &Caller, room: &str) -> Answer {
        if self.membership(room, &who.user) == Membership::Join {
            return Err(MatrixError::new(400, "M_UNKNOWN", "User is in the room"));
        }
        self.user_mut(&who.user)?.rooms.remove(room);
        Ok(json!({}))
    }

    pub(in crate::homeserver) fn joined_rooms(&self, who: &Caller) -> Answer {
        let rooms = &self.user(&who.user)?.rooms;
        let joined: Vec<_> =
            rooms.iter().filter(|id| self.membership(id, &who.user) == Membership::Join).collect();
        Ok(json!({"joined_rooms": joined}))
    }

    pub(in crate::homeserver) fn alias(&self, alias: &str) -> Answer {
        let room = self
            .aliases
            .get(alias)
            .ok_or_else(|| MatrixError::not_found(format!("Room alias {alias} not found")))?;
        Ok(json!({"room_id": room, "servers": [self.config.server_name]}))
    }

    pub(in crate::homeserver) fn full_state(&self, now: Timestamp, who: &Caller, room: &str) -> Answer {
        let room = self.joined_room(who, room)?;
        Ok(room.state.values().map(|event| event.to_json(now, Some(who), Some(&room.id))).collect())
    }

    /// The content alone, or the whole event when asked with `?format=event`.
    pub(in crate::homeserver) fn state_event(
        &self,
        now: Timestamp,
        who: &Caller,
        (room, kind, key): (&str, &str, &str),
        whole: bool,
    ) -> Answer {
        let room = self.joined_room(who, room)?;
        let event = room.state.get(&(kind.to_owned(), key.to_owned()));
        let event = event.ok_or_else(|| MatrixError::not_found("Event not found."))?;
        Ok(if whole { event.to_json(now, Some(who), Some(&room.id)) } else { event.content.clone().into() })
    }

    pub(in crate::homeserver) fn members(
        &self,
        now: Timestamp,
        who: &Caller,
        room: &str,
        (only, except): (Option<&str>, Option<&str>),
    ) -> Answer {
        let room = self.joined_room(who, room)?;
        let chunk: Vec<Value> = room
            .state
            .iter()
            .filter(|((kind, user), _)| {
                let membership = room.membership(user).as_str();
                kind == "m.room.member"
                    && only.is_none_or(|only| only == membership)
                    && except.is_none_or(|except| except != membership)
            })
            .map(|(_, event)| event.to_json(now, Some(who), Some(&room.id)))
            .collect();
        Ok(json!({"chunk": chunk}))
    }

    pub(in crate::homeserver) fn joined_members(&self, who: &Caller, room: &str) -> Answer {
        let room = self.joined_room(who, room)?;
        let joined: Object = room
            .joined()
            .map(|user| {
                let content = room.content("m.room.member", user);
                let field = |name: &str| {
                    content.and_then(|content| content.get(name)).cloned().unwrap_or(Value::Null)
                };
                (
                    user.to_string(),
                    json!({"display_name": field("displayname"), "avatar_url": field("avatar_url")}),
                )
            })
            .collect();
        Ok(json!({"joined": joined}))
    }

    pub(in crate::homeserver) fn room_event(
        &self,
        now: Timestamp,
        who: &Caller,
        room: &str,
        event: &str,
    ) -> Answer {
        let room = self.joined_room(who, room)?;
        let event = room.event(event).ok_or_else(|| MatrixError::not_found("Could not find event"))?;
        Ok(event.to_json(now, Some(who), Some(&room.id)))
    }

    pub(in crate::homeserver) fn context(
        &self,
        now: Timestamp,
        who: &Caller,
        (room, event): (&str, &str),
        limit: usize,
    ) -> Answer {
        let room = self.joined_room(who, room)?;
        let event = room.event(event).ok_or_else(|| MatrixError::not_found("Event not found."))?;
        let show = |event: &Arc<Event>| event.to_json(now, Some(who), Some(&room.id));
        let before: Vec<_> = room.between(Pos(0), Pos(event.pos.0 - 1)).rev().take(limit / 2).collect();
        let after: Vec<_> = room.between(event.pos, self.pos).take(limit / 2).collect();
        let start = before.last().map_or(event.pos, |event| event.pos);
        let end = after.last().map_or(event.pos, |event| event.pos);
        Ok(json!({
            "event": show(event),
            "events_before": before.into_iter().map(show).collect::<Vec<_>>(),
            "events_after": after.into_iter().map(show).collect::<Vec<_>>(),
            "state": room.state_before(event.pos).values().map(show).collect::<Vec<_>>(),
            "start": page_token(start),
            "end": page_token(Pos(end.0 + 1)),
        }))
    }

    /// A page token `t<n>` stands just before the event at position n.
    pub(in crate::homeserver) fn messages(
        &self,
        now: Timestamp,
        who: &Caller,
        room: &str,
        query: &MessagesQuery,
    ) -> Answer {
        let room = self.readable_room(who, room)?;
        // Whoever left reads up to where they left.
        let last = match room.members.get(&*who.user) {
            Some(member) if member.membership != Membership::Join => member.since,
            _ => self.pos,
        };
        let from = match (&query.from, query.direction) {
            (Some(token), _) => parse_page(token)?,
            (None, Direction::Backwards) => Pos(last.0 + 1),
            (None, Direction::Forwards) => Pos(1),
        };
        let (events, end): (Vec<_>, _) = match query.direction {
            Direction::Backwards => {
                let events: Vec<_> = room
                    .between(Pos(0), last.min(Pos(from.0.saturating_sub(1))))
                    .rev()
                    .take(query.limit)
                    .collect();
                let end = events.last().map(|event| event.pos);
                (events, end)
            }
            Direction::Forwards => {
                let events: Vec<_> =
                    room.between(Pos(from.0.saturating_sub(1)), last).take(query.limit).collect();
                let end = events.last().map(|event| Pos(event.pos.0 + 1));
                (events, end)
            }
        };
        let chunk: Vec<_> =
            events.into_iter().map(|event| event.to_json(now, Some(who), Some(&room.id))).collect();
        let mut answer = json!({"chunk": chunk, "start": page_token(from)});
        if let Some(end) = end {
            answer["end"] = page_token(end).into();
        }
        Ok(answer)
    }

    /// For endpoints whose effect nobody in a call sees (typing, receipts): only the standing is checked.
    pub(in crate::homeserver) fn require_joined(&self, who: &Caller, room: &str) -> Answer {
        self.joined_room(who, room).map(|_| json!({}))
    }

    pub(super) fn membership(&self, room: &str, user: &str) -> Membership {
        self.rooms.get(room).map_or(Membership::Leave, |room| room.membership(user))
    }

    /// Whether two users share a room both are joined to.
    pub(super) fn share_room(&self, one: &UserId, other: &UserId) -> bool {
        let empty = BTreeSet::new();
        let rooms = self.users.get(one).map_or(&empty, |account| &account.rooms);
        rooms
            .iter()
            .filter_map(|id| self.rooms.get(id))
            .any(|room| room.is_joined(one) && room.is_joined(other))
    }

    fn resolve(&self, room: &str) -> Option<RoomId> {
        match room.starts_with('#') {
            true => self.aliases.get(room).cloned(),
            false => Some(RoomId::new(room)),
        }
    }

    fn joined_room(&self, who: &Caller, room: &str) -> Result<&Room, MatrixError> {
        let found = self.rooms.get(room).filter(|room| room.is_joined(&who.user));
        found.ok_or_else(|| MatrixError::forbidden(format!("User {} not in room {room}", who.user)))
    }

    fn readable_room(&self, who: &Caller, room: &str) -> Result<&Room, MatrixError> {
        let was_joined = |room: &&Room| {
            room.members.get(&*who.user).is_some_and(|m| [m.membership, m.before].contains(&Membership::Join))
        };
        let found = self.rooms.get(room).filter(was_joined);
        found.ok_or_else(|| MatrixError::forbidden(format!("User {} not in room {room}", who.user)))
    }
}

pub(super) fn page_token(before: Pos) -> String {
    format!("t{}", before.0)
}

fn parse_page(token: &str) -> Result<Pos, MatrixError> {
    let invalid = || MatrixError::invalid_param("'from' is not a page token of this server");
    if let Some(number) = token.strip_prefix('t') {
        return number.parse().map(Pos).map_err(|_| invalid());
    }
    // A `next_batch` of /sync stands after its position.
    let sync = super::sync::SyncToken::parse(token).map_err(|_| invalid())?;
    Ok(Pos(sync.pos.0.saturating_add(1)))
}

fn check_size(draft: &Draft) -> Result<(), MatrixError> {
    if draft.kind.len() > 255 || draft.state_key.as_ref().is_some_and(|key| key.len() > 255) {
        return Err(MatrixError::too_large("'type' or 'state_key' is too large"));
    }
    if draft.kind.is_empty() {
        return Err(MatrixError::invalid_param("The event type is empty"));
    }
    let size = serde_json::to_vec(&draft.content).map_or(usize::MAX, |json| json.len());
    if size > LARGEST_EVENT { Err(MatrixError::too_large("event too large")) } else { Ok(()) }
}

fn copy_reason(body: &Object, content: &mut Object) {
    if let Some(reason) = text(body, "reason") {
        content.insert("reason".into(), reason.into());
    }
}
