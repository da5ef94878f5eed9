//! Making a room.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::{
    Answer, Object, State,
    power::RoomVersion,
    room::{Draft, Membership, Room},
    text,
};
use crate::homeserver::{
    error::MatrixError,
    ids::{Caller, EventId, RoomId, Timestamp},
};

impl State {
    pub(in crate::homeserver) fn create_room(
        &mut self,
        now: Timestamp,
        who: &Caller,
        body: &Object,
    ) -> Answer {
        let plan = Plan::read(body, self.config.room_version)?;
        if self.rooms.len() >= self.config.limits.rooms {
            return Err(Self::full("rooms"));
        }
        let alias = text(body, "room_alias_name").map(|name| format!("#{name}:{}", self.config.server_name));
        if alias.as_ref().is_some_and(|alias| self.aliases.contains_key(alias)) {
            return Err(MatrixError::new(400, "M_ROOM_IN_USE", "Room alias already taken"));
        }
        let opaque = self.random_text(43);
        let id = match plan.version {
            RoomVersion::V11 => RoomId::new(format!("!{}:{}", &opaque[..18], self.config.server_name)),
            RoomVersion::V12 => RoomId::new(format!("!{opaque}")),
        };
        let mut creators = BTreeSet::from([who.user.clone()]);
        creators.extend(plan.additional_creators.iter().map(super::UserId::new));
        let room = Room::new(id.clone(), plan.version, creators);
        self.rooms.insert(id.clone(), room);
        let filled = self.fill(now, who, &id, EventId::new(format!("${opaque}")), plan, alias.as_deref());
        if let Err(refusal) = filled {
            self.discard(&id);
            return Err(refusal);
        }
        if let Some(alias) = alias {
            self.aliases.insert(alias, id.clone());
        }
        Ok(json!({"room_id": id}))
    }

    fn fill(
        &mut self,
        now: Timestamp,
        who: &Caller,
        room: &RoomId,
        create_id: EventId,
        plan: Plan,
        alias: Option<&str>,
    ) -> Result<(), MatrixError> {
        let state = |kind: &str, content: Value| Draft::state(&who.user, kind, "", object(content));
        // The create event is the one that no rule can allow: there is no room yet.
        self.append(now, room, create_id, state("m.room.create", plan.create_content(who)))?;
        let join = self.member_content(&who.user, Membership::Join);
        self.send_draft(now, room, Draft::state(&who.user, "m.room.member", &who.user, join))?;
        self.send_draft(now, room, state("m.room.power_levels", plan.power_levels(who)))?;
        if let Some(alias) = alias {
            self.send_draft(now, room, state("m.room.canonical_alias", json!({"alias": alias})))?;
        }
        for (kind, content) in plan.preset.state() {
            if !plan.initial_state.iter().any(|(k, key, _)| k == kind && key.is_empty()) {
                self.send_draft(now, room, state(kind, content))?;
            }
        }
        for (kind, key, content) in plan.initial_state {
            self.send_draft(now, room, Draft::state(&who.user, &kind, &key, content))?;
        }
        if let Some(name) = plan.name {
            self.send_draft(now, room, state("m.room.name", json!({"name": name})))?;
        }
        if let Some(topic) = plan.topic {
            self.send_draft(now, room, state("m.room.topic", json!({"topic": topic})))?;
        }
        for user in plan.invite {
            self.invite(now, who, room, &user, None, plan.is_direct)?;
        }
        Ok(())
    }

    /// A room whose making failed half-way never was.
    fn discard(&mut self, room: &RoomId) {
        self.rooms.remove(room);
        for account in self.users.values_mut() {
            account.rooms.remove(room);
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Preset {
    Private,
    TrustedPrivate,
    Public,
}

impl Preset {
    fn state(self) -> [(&'static str, Value); 3] {
        let is_public = self == Self::Public;
        [
            ("m.room.join_rules", json!({"join_rule": if is_public { "public" } else { "invite" }})),
            ("m.room.history_visibility", json!({"history_visibility": "shared"})),
            (
                "m.room.guest_access",
                json!({"guest_access": if is_public { "forbidden" } else { "can_join" }}),
            ),
        ]
    }
}

struct Plan {
    version: RoomVersion,
    preset: Preset,
    creation_content: Object,
    additional_creators: Vec<String>,
    power_override: Object,
    initial_state: Vec<(String, String, Object)>,
    name: Option<String>,
    topic: Option<String>,
    invite: Vec<String>,
    is_direct: bool,
}

impl Plan {
    fn read(body: &Object, default_version: RoomVersion) -> Result<Self, MatrixError> {
        let version = match body.get("room_version") {
            None | Some(Value::Null) => default_version,
            Some(version) => version.as_str().and_then(RoomVersion::parse).ok_or_else(|| {
                MatrixError::new(
                    400,
                    "M_UNSUPPORTED_ROOM_VERSION",
                    "Your homeserver does not support this room version",
                )
            })?,
        };
        let preset = match (text(body, "preset"), text(body, "visibility")) {
            (Some("private_chat"), _) => Preset::Private,
            (Some("trusted_private_chat"), _) => Preset::TrustedPrivate,
            (Some("public_chat"), _) | (None, Some("public")) => Preset::Public,
            (None, _) => Preset::Private,
            (Some(other), _) => {
                return Err(MatrixError::bad_json(format!("'{other}' is not a valid preset")));
            }
        };
        let mut initial_state = Vec::new();
        for event in body.get("initial_state").and_then(Value::as_array).into_iter().flatten() {
            let kind = event.get("type").and_then(Value::as_str);
            let content = event.get("content").and_then(Value::as_object);
            let (Some(kind), Some(content)) = (kind, content) else {
                return Err(MatrixError::bad_json("initial_state events need a type and a content"));
            };
            let key = event.get("state_key").and_then(Value::as_str).unwrap_or_default();
            initial_state.push((kind.to_owned(), key.to_owned(), content.clone()));
        }
        let mut invite = Vec::new();
        for user in body.get("invite").and_then(Value::as_array).into_iter().flatten() {
            let user = user.as_str().ok_or_else(|| MatrixError::bad_json("invite must hold user ids"))?;
            invite.push(user.to_owned());
        }
        let creation_content =
            body.get("creation_content").and_then(Value::as_object).cloned().unwrap_or_default();
        let mut additional_creators: Vec<String> = creation_content
            .get("additional_creators")
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
            .filter_map(|user| user.as_str().map(str::to_owned))
            .collect();
        if preset == Preset::TrustedPrivate && version == RoomVersion::V12 {
            additional_creators.extend(invite.iter().cloned());
        }
        if version == RoomVersion::V11 {
            additional_creators.clear();
        }
        Ok(Self {
            version,
            preset,
            creation_content,
            additional_creators,
            power_override: body
                .get("power_level_content_override")
                .and_then(Value::as_object)
                .cloned()
                .unwrap_or_default(),
            initial_state,
            name: text(body, "name").filter(|name| !name.is_empty()).map(str::to_owned),
            topic: text(body, "topic").filter(|topic| !topic.is_empty()).map(str::to_owned),
            invite,
            is_direct: body.get("is_direct").and_then(Value::as_bool) == Some(true),
        })
    }

    fn create_content(&self, who: &Caller) -> Value {
        let mut content = self.creation_content.clone();
        content.insert("room_version".into(), self.version.as_str().into());
        content.remove("creator");
        if !self.additional_creators.is_empty() {
            let others: Vec<&String> =
                self.additional_creators.iter().filter(|user| ***user != *who.user).collect();
            content.insert("additional_creators".into(), json!(others));
        }
        content.into()
    }

    /// Synapse's defaults; the override replaces whole top-level entries.
    fn power_levels(&self, who: &Caller) -> Value {
        let mut users = Object::new();
        if self.version == RoomVersion::V11 {
            users.insert(who.user.to_string(), 100.into());
            if self.preset == Preset::TrustedPrivate {
                users.extend(self.invite.iter().map(|user| (user.clone(), 100.into())));
            }
        }
        let tombstone = if self.version == RoomVersion::V12 { 150 } else { 100 };
        let mut levels = object(json!({
            "users": users,
            "users_default": 0,
            "events": {
                "m.room.name": 50,
                "m.room.power_levels": 100,
                "m.room.history_visibility": 100,
                "m.room.canonical_alias": 50,
                "m.room.avatar": 50,
                "m.room.tombstone": tombstone,
                "m.room.server_acl": 100,
                "m.room.encryption": 100,
            },
            "events_default": 0,
            "state_default": 50,
            "ban": 50,
            "kick": 50,
            "redact": 50,
            "invite": if self.preset == Preset::Public { 50 } else { 0 },
            "historical": 100,
        }));
        levels.extend(self.power_override.clone());
        levels.into()
    }
}

fn object(value: Value) -> Object {
    match value {
        Value::Object(object) => object,
        _ => Object::new(),
    }
}
