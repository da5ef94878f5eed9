//! Users: registration, login, tokens, profile, account data, filters, OpenID.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::{
    Answer, Object, State,
    devices::Device,
    keys::CrossSigning,
    required_text,
    room::{Draft, Membership},
    text,
};
use crate::homeserver::{
    error::MatrixError,
    ids::{Caller, DeviceId, Pos, RoomId, Timestamp, UserId},
};

/// What Synapse gives too.
const OPENID_LIFETIME: Duration = Duration::from_secs(3600);
const OPENID_TOKENS: usize = 100_000;

pub(super) struct User {
    salt: String,
    password: [u8; 32],
    pub(super) displayname: Option<String>,
    pub(super) avatar_url: Option<String>,
    pub(super) devices: BTreeMap<DeviceId, Device>,
    pub(super) cross_signing: CrossSigning,
    /// By room (or none for global) and type.
    pub(super) account_data: BTreeMap<(Option<RoomId>, String), (Pos, Value)>,
    pub(super) filters: Vec<Object>,
    /// Every room that has a membership of this user, also `leave`.
    pub(super) rooms: BTreeSet<RoomId>,
}

impl User {
    fn is_password(&self, password: &str) -> bool {
        hash(&self.salt, password) == self.password
    }
}

fn hash(salt: &str, password: &str) -> [u8; 32] {
    Sha256::new().chain_update(salt).chain_update([0]).chain_update(password).finalize().into()
}

impl State {
    pub(in crate::homeserver) fn caller(&self, token: &str) -> Result<Caller, MatrixError> {
        let is_expired = self.expired_tokens.contains(token);
        self.tokens.get(token).cloned().ok_or_else(|| MatrixError::unknown_token(is_expired))
    }

    /// The token no longer counts, but its device stays, as where access tokens have a lifetime.
    pub(in crate::homeserver) fn expire_token(&mut self, token: &str) {
        if self.tokens.remove(token).is_some() {
            self.expired_tokens.insert(token.to_owned());
        }
    }

    pub(in crate::homeserver) fn username_available(&self, localpart: &str) -> Answer {
        let usable = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "=_-./+".contains(c);
        if localpart.is_empty() || localpart.len() > 200 || !localpart.chars().all(usable) {
            return Err(MatrixError::new(
                400,
                "M_INVALID_USERNAME",
                "User ID can only contain characters a-z, 0-9, or '=_-./+'",
            ));
        }
        if self.users.contains_key(self.local_id(localpart).as_str()) {
            return Err(MatrixError::new(400, "M_USER_IN_USE", "User ID already taken."));
        }
        Ok(json!({"available": true}))
    }

    pub(in crate::homeserver) fn register(&mut self, now: Timestamp, body: &Object) -> Answer {
        if !self.config.registration {
            return Err(MatrixError::forbidden("Registration has been disabled"));
        }
        let username = match text(body, "username") {
            Some(name) => name.to_owned(),
            None => self.random_text(12).to_ascii_lowercase(),
        };
        self.username_available(&username)?;
        let stage = body.get("auth").and_then(|auth| auth.get("type")).and_then(Value::as_str);
        if stage != Some("m.login.dummy") {
            let session = self.random_text(24);
            return Err(MatrixError::interactive("m.login.dummy", session, None));
        }
        let password = required_text(body, "password")?;
        self.add_user(&username, password)?;
        let user = UserId::new(self.local_id(&username));
        if body.get("inhibit_login").and_then(Value::as_bool) == Some(true) {
            return Ok(json!({"user_id": user, "home_server": self.config.server_name}));
        }
        self.new_session(now, user, body)
    }

    /// An account with one device, for the embedding program: whether registration is open does not matter.
    pub(in crate::homeserver) fn register_user(
        &mut self,
        now: Timestamp,
        name: &str,
        password: &str,
    ) -> Answer {
        self.add_user(name, password)?;
        self.new_session(now, UserId::new(self.local_id(name)), &Object::new())
    }

    pub(super) fn add_user(&mut self, username: &str, password: &str) -> Result<(), MatrixError> {
        self.username_available(username)?;
        if self.users.len() >= self.config.limits.users {
            return Err(Self::full("users"));
        }
        let salt = self.random_text(16);
        let user = User {
            password: hash(&salt, password),
            salt,
            displayname: Some(username.to_owned()),
            avatar_url: None,
            devices: BTreeMap::new(),
            cross_signing: CrossSigning::default(),
            account_data: BTreeMap::new(),
            filters: Vec::new(),
            rooms: BTreeSet::new(),
        };
        self.users.insert(UserId::new(self.local_id(username)), user);
        Ok(())
    }

    pub(in crate::homeserver) fn login(&mut self, now: Timestamp, body: &Object) -> Answer {
        if required_text(body, "type")? != "m.login.password" {
            return Err(MatrixError::new(400, "M_UNKNOWN", "Unknown login type"));
        }
        let user = self.check_password(body)?;
        self.new_session(now, user, body)
    }

    /// `{identifier: {user}, password}`, or the older `{user, password}`: of login and of interactive
    /// authentication alike.
    fn check_password(&self, body: &Object) -> Result<UserId, MatrixError> {
        let name = body
            .get("identifier")
            .and_then(|i| i.get("user"))
            .and_then(Value::as_str)
            .or_else(|| text(body, "user"))
            .ok_or_else(|| MatrixError::missing_param("identifier"))?;
        let id = if name.starts_with('@') { name.to_owned() } else { self.local_id(name) };
        let password = required_text(body, "password")?;
        match self.users.get_key_value(id.as_str()) {
            Some((id, user)) if user.is_password(password) => Ok(id.clone()),
            _ => Err(MatrixError::forbidden("Invalid username or password")),
        }
    }

    /// Passes when the request carries the password of the caller in its `auth`.
    pub(super) fn require_password(&mut self, who: &Caller, body: &Object) -> Result<(), MatrixError> {
        let failure = match body.get("auth").and_then(Value::as_object) {
            None => None,
            Some(auth) => match self.check_password(auth) {
                Ok(user) if user == who.user => return Ok(()),
                Ok(_) => Some(MatrixError::forbidden("The password belongs to another user")),
                Err(failure) => Some(failure),
            },
        };
        let session = self.random_text(24);
        Err(MatrixError::interactive("m.login.password", session, failure))
    }

    fn new_session(&mut self, now: Timestamp, user: UserId, body: &Object) -> Answer {
        let device = match text(body, "device_id") {
            Some(id) if id.is_empty() || id.len() > 255 => {
                return Err(MatrixError::invalid_param("device_id must have 1 to 255 bytes"));
            }
            Some(id) => DeviceId::new(id),
            None => DeviceId::new(self.random_text(10).to_ascii_uppercase()),
        };
        let token = format!("dev_{}", self.random_text(40));
        let limit = self.config.limits.devices_per_user;
        let account = self.user_mut(&user)?;
        if !account.devices.contains_key(&device) && account.devices.len() >= limit {
            return Err(Self::full("devices of this user"));
        }
        let entry = account.devices.entry(device.clone()).or_default();
        entry.last_seen = Some(now);
        if let Some(name) = text(body, "initial_device_display_name").filter(|_| entry.display_name.is_none())
        {
            entry.display_name = Some(name.chars().take(100).collect());
        }
        // A device has one session: logging in again with its id ends the older one, as on Synapse.
        let replaced = entry.token.replace(token.clone());
        if let Some(old) = replaced {
            self.tokens.remove(&old);
            self.expired_tokens.remove(&old);
        }
        self.tokens.insert(token.clone(), Caller { user: user.clone(), device: device.clone() });
        Ok(json!({
            "user_id": user,
            "access_token": token,
            "home_server": self.config.server_name,
            "device_id": device,
        }))
    }

    pub(in crate::homeserver) fn profile(&self, user: &str) -> Answer {
        let user = self.users.get(user).ok_or_else(|| MatrixError::not_found("Profile was not found"))?;
        let mut profile = Object::new();
        for (name, value) in [("displayname", &user.displayname), ("avatar_url", &user.avatar_url)] {
            if let Some(value) = value {
                profile.insert(name.to_owned(), json!(value));
            }
        }
        Ok(profile.into())
    }

    pub(in crate::homeserver) fn profile_field(&self, user: &str, field: &str) -> Answer {
        let profile = self.profile(user)?;
        let value =
            profile.get(field).ok_or_else(|| MatrixError::not_found("Profile field was not found"))?;
        Ok(json!({ field: value }))
    }

    pub(in crate::homeserver) fn set_profile_field(
        &mut self,
        now: Timestamp,
        who: &Caller,
        user: &str,
        field: &str,
        body: &Object,
    ) -> Answer {
        own(who, user, "Cannot set the profile of other users.")?;
        let value = match body.get(field) {
            Some(Value::String(value)) if value.len() <= 1000 => {
                Some(value.clone()).filter(|v| !v.is_empty())
            }
            Some(Value::Null) => None,
            Some(_) => {
                return Err(MatrixError::invalid_param(format!(
                    "{field} must be a string of at most 1000 bytes"
                )));
            }
            None => return Err(MatrixError::missing_param(field)),
        };
        let account = self.user_mut(user)?;
        match field {
            "displayname" => account.displayname = value,
            "avatar_url" => account.avatar_url = value,
            _ => return Err(MatrixError::unrecognized(404)),
        }
        // Members learn a new name from a new membership event in every room.
        for room in account.rooms.clone() {
            if self.membership(&room, user) == Membership::Join {
                let content = self.member_content(user, Membership::Join);
                self.send_draft(now, &room, Draft::state(&who.user, "m.room.member", user, content))?;
            }
        }
        Ok(json!({}))
    }

    /// The content of a membership event, with the user's profile as Synapse fills it in.
    pub(super) fn member_content(&self, user: &str, membership: Membership) -> Object {
        let mut content = Object::new();
        content.insert("membership".into(), membership.as_str().into());
        if let Some(account) = self.users.get(user)
            && matches!(membership, Membership::Join | Membership::Invite)
        {
            for (name, value) in [("displayname", &account.displayname), ("avatar_url", &account.avatar_url)]
            {
                if let Some(value) = value {
                    content.insert(name.into(), json!(value));
                }
            }
        }
        content
    }

    pub(in crate::homeserver) fn account_data(
        &self,
        who: &Caller,
        user: &str,
        room: Option<&str>,
        kind: &str,
    ) -> Answer {
        own(who, user, "Cannot get account data for other users.")?;
        if room.is_none() && kind == "m.push_rules" {
            return Ok(push_rules());
        }
        self.user(user)?
            .account_data
            .get(&(room.map(RoomId::new), kind.to_owned()))
            .map(|(_, content)| content.clone())
            .ok_or_else(|| MatrixError::not_found("Account data not found"))
    }

    pub(in crate::homeserver) fn set_account_data(
        &mut self,
        who: &Caller,
        user: &str,
        room: Option<&str>,
        kind: &str,
        content: Object,
    ) -> Answer {
        own(who, user, "Cannot add account data for other users.")?;
        let key = (room.map(RoomId::new), kind.to_owned());
        let (limit, pos) = (self.config.limits.account_data, self.advance());
        let account = self.user_mut(user)?;
        if account.account_data.len() >= limit && !account.account_data.contains_key(&key) {
            return Err(Self::full("account data of this user"));
        }
        account.account_data.insert(key, (pos, content.into()));
        self.woken.insert(who.user.clone());
        Ok(json!({}))
    }

    pub(in crate::homeserver) fn add_filter(&mut self, who: &Caller, user: &str, filter: Object) -> Answer {
        own(who, user, "Cannot create filters for other users")?;
        let limit = self.config.limits.account_data;
        let filters = &mut self.user_mut(user)?.filters;
        let id = match filters.iter().position(|known| *known == filter) {
            Some(id) => id,
            None if filters.len() >= limit => return Err(Self::full("filters of this user")),
            None => {
                filters.push(filter);
                filters.len() - 1
            }
        };
        Ok(json!({"filter_id": id.to_string()}))
    }

    pub(in crate::homeserver) fn filter(&self, user: &str, id: &str) -> Result<&Object, MatrixError> {
        let filters = &self.user(user)?.filters;
        id.parse::<usize>()
            .ok()
            .and_then(|id| filters.get(id))
            .ok_or_else(|| MatrixError::invalid_param("No such filter"))
    }

    pub(in crate::homeserver) fn openid_token(&mut self, now: Timestamp, who: &Caller, user: &str) -> Answer {
        own(who, user, "Cannot request tokens for other users.")?;
        if self.openid.len() >= OPENID_TOKENS {
            self.openid.retain(|_, (_, expires)| *expires > now);
            if self.openid.len() >= OPENID_TOKENS {
                return Err(MatrixError::limit_exceeded("Too many OpenID tokens", None));
            }
        }
        let token = self.random_text(32);
        self.openid.insert(token.clone(), (who.user.clone(), now.after(OPENID_LIFETIME)));
        Ok(json!({
            "access_token": token,
            "token_type": "Bearer",
            "matrix_server_name": self.config.server_name,
            "expires_in": OPENID_LIFETIME.as_secs(),
        }))
    }

    /// `GET /_matrix/federation/v1/openid/userinfo`: whose token is it?
    pub(in crate::homeserver) fn openid_userinfo(&self, now: Timestamp, token: Option<&str>) -> Answer {
        let token = token.ok_or_else(|| MatrixError::new(401, "M_MISSING_TOKEN", "Access Token required"))?;
        match self.openid.get(token) {
            Some((user, expires)) if *expires > now => Ok(json!({"sub": user})),
            _ => Err(MatrixError::new(401, "M_UNKNOWN_TOKEN", "Access Token unknown or expired")),
        }
    }

    fn local_id(&self, localpart: &str) -> String {
        format!("@{localpart}:{}", self.config.server_name)
    }
}

pub(super) fn own(who: &Caller, user: &str, refusal: &str) -> Result<(), MatrixError> {
    if &*who.user == user { Ok(()) } else { Err(MatrixError::forbidden(refusal)) }
}

/// No rules at all: nothing in a call depends on notifications of other events.
pub(in crate::homeserver) fn push_rules() -> Value {
    json!({"global": {"override": [], "content": [], "room": [], "sender": [], "underride": []}})
}
