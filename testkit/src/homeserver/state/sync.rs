//! `/sync`: everything that changed for one device since its last token.

use std::{collections::BTreeSet, sync::Arc};

use serde_json::{Value, json};

use super::{
    Object, State,
    accounts::push_rules,
    room::{Event, Member, Membership, Room, StateMap},
    rooms::page_token,
};
use crate::homeserver::{
    error::MatrixError,
    ids::{Caller, Pos, RoomId, Timestamp, UserId},
};

/// As on Synapse, unless the filter says otherwise.
const DEFAULT_TIMELINE: usize = 10;
const LONGEST_TIMELINE: usize = 1_000;
/// To-device messages in one answer; the rest comes with the next.
const TO_DEVICE_BATCH: usize = 100;

/// `s<stream position>_<to-device position>`. The two differ while a full inbox is handed out in several answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct SyncToken {
    pub(super) pos: Pos,
    to_device: Pos,
}

impl SyncToken {
    pub(super) fn parse(text: &str) -> Result<Self, MatrixError> {
        let numbers = text.strip_prefix('s').and_then(|rest| rest.split_once('_'));
        match numbers.map(|(pos, to_device)| (pos.parse(), to_device.parse())) {
            Some((Ok(pos), Ok(to_device))) => Ok(Self { pos: Pos(pos), to_device: Pos(to_device) }),
            _ => Err(MatrixError::new(400, "M_UNKNOWN", "Invalid stream token")),
        }
    }

    pub(super) fn to_text(self) -> String {
        format!("s{}_{}", self.pos.0, self.to_device.0)
    }
}

/// A sync request, read and checked once; a long poll asks with it again and again.
#[derive(Clone, Debug)]
pub(in crate::homeserver) struct SyncRequest {
    since: Option<SyncToken>,
    full_state: bool,
    timeline: usize,
    /// Event types that the timeline leaves out. Other parts of a filter have no effect.
    not_types: Vec<String>,
    /// MSC4222: state up to the end of the timeline, under its unstable name.
    state_after: bool,
}

pub(in crate::homeserver) struct SyncAnswer {
    pub(in crate::homeserver) body: Value,
    /// Nothing to tell: a long poll may go on waiting.
    pub(in crate::homeserver) is_empty: bool,
}

impl State {
    pub(in crate::homeserver) fn read_sync_request(
        &self,
        who: &Caller,
        since: Option<&str>,
        filter: Option<&str>,
        full_state: bool,
        state_after: bool,
    ) -> Result<SyncRequest, MatrixError> {
        let since = since.map(SyncToken::parse).transpose()?;
        if since.is_some_and(|since| since.pos > self.pos || since.to_device > self.pos) {
            return Err(MatrixError::new(
                400,
                "M_UNKNOWN",
                "The stream token is from another server or a past life",
            ));
        }
        let inline;
        let filter = match filter {
            None => None,
            Some(json) if json.starts_with('{') => {
                inline = serde_json::from_str::<Object>(json)
                    .map_err(|_| MatrixError::invalid_param("Invalid filter JSON"))?;
                Some(&inline)
            }
            Some(id) => Some(self.filter(&who.user, id)?),
        };
        let of_timeline = |name: &str| filter?.get("room")?.get("timeline")?.get(name);
        let limit = of_timeline("limit")
            .and_then(Value::as_u64)
            .map_or(DEFAULT_TIMELINE, |limit| usize::try_from(limit).unwrap_or(LONGEST_TIMELINE));
        let not_types = of_timeline("not_types").and_then(Value::as_array).into_iter().flatten();
        Ok(SyncRequest {
            since,
            full_state,
            timeline: limit.clamp(1, LONGEST_TIMELINE),
            not_types: not_types.filter_map(Value::as_str).map(str::to_owned).collect(),
            state_after,
        })
    }

    /// Also forgets the to-device messages that `since` acknowledges.
    pub(in crate::homeserver) fn sync(
        &mut self,
        now: Timestamp,
        who: &Caller,
        request: &SyncRequest,
    ) -> Result<SyncAnswer, MatrixError> {
        let since = request.since.unwrap_or_default();
        let end = self.pos;
        let (to_device, to_device_end) = self.collect_to_device(now, who, request.since, end)?;
        let account = self.user(&who.user)?;

        let (mut join, mut invite, mut leave) = (Object::new(), Object::new(), Object::new());
        for room in account.rooms.iter().filter_map(|id| self.rooms.get(id)) {
            let Some(member) = room.members.get(&who.user) else { continue };
            match member.membership {
                Membership::Join => {
                    let data = self.account_data_after(&who.user, Some(&room.id), since.pos);
                    if let Some(section) = joined_section(now, who, room, member, request, data, end) {
                        join.insert(room.id.to_string(), section);
                    }
                }
                Membership::Invite if request.since.is_none() || member.since > since.pos => {
                    invite.insert(room.id.to_string(), invited_section(who, room));
                }
                Membership::Leave | Membership::Ban
                    if request.since.is_some() && member.since > since.pos =>
                {
                    leave.insert(room.id.to_string(), left_section(now, who, room, member, request));
                }
                _ => {}
            }
        }
        let mut rooms = Object::new();
        for (name, section) in [("join", join), ("invite", invite), ("leave", leave)] {
            if !section.is_empty() {
                rooms.insert(name.into(), section.into());
            }
        }

        let mut account_data = self.account_data_after(&who.user, None, since.pos);
        if request.since.is_none() {
            account_data.push(json!({"type": "m.push_rules", "content": push_rules()}));
        }
        let device_lists =
            request.since.map(|since| self.device_lists(&who.user, since.pos)).unwrap_or_default();
        let (counts, fallbacks) = self.key_counts(who);
        let is_empty =
            rooms.is_empty() && account_data.is_empty() && device_lists.is_empty() && to_device.is_empty();

        let mut body = json!({
            "next_batch": SyncToken { pos: end, to_device: to_device_end }.to_text(),
            "device_one_time_keys_count": counts,
            "device_unused_fallback_key_types": fallbacks,
        });
        if !rooms.is_empty() {
            body["rooms"] = rooms.into();
        }
        if !account_data.is_empty() {
            body["account_data"] = json!({"events": account_data});
        }
        if !device_lists.is_empty() {
            body["device_lists"] = device_lists.into();
        }
        if !to_device.is_empty() {
            body["to_device"] = json!({"events": to_device});
        }
        Ok(SyncAnswer { body, is_empty })
    }

    /// The waiting to-device messages, and the position up to which the next `since` will acknowledge them.
    fn collect_to_device(
        &mut self,
        now: Timestamp,
        who: &Caller,
        since: Option<SyncToken>,
        end: Pos,
    ) -> Result<(Vec<Value>, Pos), MatrixError> {
        let device = self.user_mut(&who.user)?.devices.get_mut(&who.device);
        let device = device.ok_or_else(|| MatrixError::unknown_token(false))?;
        device.last_seen = Some(now);
        if let Some(since) = since {
            let waiting = device.inbox.partition_point(|(pos, _)| *pos <= since.to_device);
            device.inbox.drain(..waiting);
        }
        let events = device.inbox.iter().take(TO_DEVICE_BATCH).map(|(_, message)| message.clone()).collect();
        let up_to = match device.inbox.get(TO_DEVICE_BATCH) {
            // Positions are unique per message in one inbox, so the last one handed out is a clean cut.
            Some(_) => device.inbox.get(TO_DEVICE_BATCH - 1).map_or(end, |(pos, _)| *pos),
            None => end,
        };
        Ok((events, up_to))
    }

    fn account_data_after(&self, user: &UserId, room: Option<&RoomId>, since: Pos) -> Vec<Value> {
        let data = self.users.get(user).into_iter().flat_map(|account| &account.account_data);
        data.filter(|((of, _), (pos, _))| of.as_ref() == room && *pos > since)
            .map(|((_, kind), (_, content))| json!({"type": kind, "content": content}))
            .collect()
    }

    /// `GET /keys/changes`: the same lists between two tokens.
    pub(in crate::homeserver) fn key_changes(
        &self,
        who: &Caller,
        from: Option<&str>,
    ) -> Result<Value, MatrixError> {
        let from = SyncToken::parse(from.ok_or_else(|| MatrixError::missing_param("from"))?)?;
        let lists = self.device_lists(&who.user, from.pos);
        let list = |name: &str| lists.get(name).cloned().unwrap_or_else(|| json!([]));
        Ok(json!({"changed": list("changed"), "left": list("left")}))
    }

    /// Whose devices `user` must look at again, and whom they need no longer follow.
    fn device_lists(&self, user: &UserId, since: Pos) -> Object {
        let mut changed: BTreeSet<UserId> = self
            .device_changes
            .after(since, user)
            .filter(|other| *other == user || self.share_room(user, other))
            .cloned()
            .collect();
        let mut left = BTreeSet::new();
        let rooms = self.users.get(user).into_iter().flat_map(|account| &account.rooms);
        for room in rooms.filter_map(|id| self.rooms.get(id)) {
            let Some(member) = room.members.get(user) else { continue };
            match (member.membership, member.since > since) {
                (Membership::Join, true) => changed.extend(room.joined().cloned()),
                (Membership::Join, false) => {
                    for (_, other, membership) in
                        room.member_log.iter().rev().take_while(|(pos, ..)| *pos > since)
                    {
                        match membership {
                            Membership::Join => changed.insert(other.clone()),
                            Membership::Leave | Membership::Ban => left.insert(other.clone()),
                            Membership::Invite => false,
                        };
                    }
                }
                (_, true) if member.before == Membership::Join => left.extend(room.joined().cloned()),
                _ => {}
            }
        }
        changed.retain(|other| other == user || self.share_room(user, other));
        left.retain(|other| other != user && !self.share_room(user, other));
        let mut lists = Object::new();
        for (name, users) in [("changed", changed), ("left", left)] {
            if !users.is_empty() {
                lists.insert(name.into(), json!(users));
            }
        }
        lists
    }
}

fn joined_section(
    now: Timestamp,
    who: &Caller,
    room: &Room,
    member: &Member,
    request: &SyncRequest,
    account_data: Vec<Value>,
    end: Pos,
) -> Option<Value> {
    // Whoever joined since the last token gets the room from scratch, as in a first sync.
    let since = request.since.map(|since| since.pos).filter(|since| member.since <= *since);
    let show = |event: &Arc<Event>| event.to_json(now, Some(who), None);
    let (timeline, start, is_limited) = timeline(room, since.unwrap_or_default(), end, request);
    let whole_state = since.is_none() || request.full_state;
    let state: StateMap = match (request.state_after, whole_state) {
        (true, true) => room.state.clone(),
        (true, false) => changed_after(room.state.clone(), since),
        (false, true) => room.state_before(start),
        // Nothing can hide between the last token and a timeline without a gap.
        (false, false) if !is_limited => StateMap::new(),
        (false, false) => changed_after(room.state_before(start), since),
    };
    let shown: BTreeSet<_> = timeline.iter().map(|event| event.id.clone()).collect();
    let sticky: Vec<Value> = room
        .sticky(now)
        .filter(|event| since.is_none_or(|since| event.pos > since) && !shown.contains(&event.id))
        .map(show)
        .collect();
    if since.is_some()
        && !request.full_state
        && timeline.is_empty()
        && account_data.is_empty()
        && sticky.is_empty()
    {
        return None;
    }
    let members_changed =
        whole_state || is_limited || timeline.iter().any(|event| event.kind == "m.room.member");
    let mut section = json!({
        "timeline": {
            "events": timeline.into_iter().map(show).collect::<Vec<_>>(),
            "limited": is_limited,
            "prev_batch": page_token(start),
        },
        "account_data": {"events": account_data},
        "ephemeral": {"events": []},
        "unread_notifications": {"notification_count": 0, "highlight_count": 0},
        "summary": if members_changed { summary(who, room) } else { json!({}) },
    });
    let name = if request.state_after { "org.matrix.msc4222.state_after" } else { "state" };
    section[name] = json!({"events": state.values().map(show).collect::<Vec<_>>()});
    if !sticky.is_empty() {
        section["msc4354_sticky"] = json!({"events": sticky});
    }
    Some(section)
}

fn invited_section(who: &Caller, room: &Room) -> Value {
    const SHOWN: [&str; 7] = [
        "m.room.create",
        "m.room.join_rules",
        "m.room.name",
        "m.room.avatar",
        "m.room.canonical_alias",
        "m.room.encryption",
        "m.room.topic",
    ];
    let own = room.state.get(&("m.room.member".to_owned(), who.user.to_string()));
    let inviter =
        own.and_then(|invite| room.state.get(&("m.room.member".to_owned(), invite.sender.to_string())));
    let shown = SHOWN.iter().filter_map(|kind| room.state.get(&((*kind).to_owned(), String::new())));
    let events: Vec<Value> = shown.chain(inviter).chain(own).map(|event| event.stripped()).collect();
    json!({"invite_state": {"events": events}})
}

fn left_section(now: Timestamp, who: &Caller, room: &Room, member: &Member, request: &SyncRequest) -> Value {
    let since = match (request.since, member.before) {
        (Some(since), Membership::Join) => since.pos,
        // A refused invitation: nothing of the room was theirs to see but the leave itself.
        _ => Pos(member.since.0.saturating_sub(1)),
    };
    let show = |event: &Arc<Event>| event.to_json(now, Some(who), None);
    let (timeline, start, is_limited) = timeline(room, since, member.since, request);
    let state =
        if is_limited { changed_after(room.state_before(start), Some(since)) } else { StateMap::new() };
    let name = if request.state_after { "org.matrix.msc4222.state_after" } else { "state" };
    json!({
        "timeline": {
            "events": timeline.into_iter().map(show).collect::<Vec<_>>(),
            "limited": is_limited,
            "prev_batch": page_token(start),
        },
        name: {"events": state.values().map(show).collect::<Vec<_>>()},
        "account_data": {"events": []},
    })
}

/// The latest events of the interval, the position before which they start, and whether there are more.
fn timeline<'a>(
    room: &'a Room,
    since: Pos,
    end: Pos,
    request: &SyncRequest,
) -> (Vec<&'a Arc<Event>>, Pos, bool) {
    let mut wanted = room.between(since, end).rev().filter(|event| !request.not_types.contains(&event.kind));
    let mut events: Vec<_> = wanted.by_ref().take(request.timeline).collect();
    events.reverse();
    let start = events.first().map_or(Pos(end.0 + 1), |event| event.pos);
    // The interval reaches back into what the room has forgotten.
    let oldest = room.between(Pos(0), end).next().map(|event| event.pos);
    let forgotten = room.is_trimmed() && oldest.is_some_and(|oldest| oldest > since);
    (events, start, wanted.next().is_some() || forgotten)
}

fn changed_after(state: StateMap, since: Option<Pos>) -> StateMap {
    state.into_iter().filter(|(_, event)| since.is_none_or(|since| event.pos > since)).collect()
}

fn summary(who: &Caller, room: &Room) -> Value {
    let count = |wanted| room.members.values().filter(|member| member.membership == wanted).count();
    let heroes: Vec<&UserId> = room
        .members
        .iter()
        .filter(|(user, member)| {
            **user != who.user && matches!(member.membership, Membership::Join | Membership::Invite)
        })
        .map(|(user, _)| user)
        .take(5)
        .collect();
    json!({
        "m.heroes": heroes,
        "m.joined_member_count": count(Membership::Join),
        "m.invited_member_count": count(Membership::Invite),
    })
}
