//! Who may do what in a room: power levels and the authorisation of one event.

use serde_json::Value;

use super::{
    Object,
    room::{Draft, Membership, Room},
};
use crate::homeserver::{error::MatrixError, ids::UserId};

/// The room versions the development homeserver can make.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum RoomVersion {
    /// Room ids end with the server name; the creator has power level 100.
    V11,
    /// Room ids are the hash of the create event; creators are above all power levels. Synapse's default.
    #[default]
    V12,
}

impl RoomVersion {
    pub(in crate::homeserver) fn parse(text: &str) -> Option<Self> {
        match text {
            "11" => Some(Self::V11),
            "12" => Some(Self::V12),
            _ => None,
        }
    }

    pub(in crate::homeserver) fn as_str(self) -> &'static str {
        match self {
            Self::V11 => "11",
            Self::V12 => "12",
        }
    }
}

impl Room {
    /// The checks a homeserver makes before it accepts an event (Matrix, *Authorization rules*), without
    /// those that only concern federation.
    pub(super) fn authorise(&self, draft: &Draft) -> Result<(), MatrixError> {
        let sender = &draft.sender;
        match (draft.kind.as_str(), &draft.state_key) {
            ("m.room.create", _) => return Err(MatrixError::forbidden("A room is created only once")),
            ("m.room.member", Some(target)) => return self.authorise_membership(draft, target),
            _ => {}
        }
        if !self.is_joined(sender) {
            return Err(MatrixError::forbidden(format!("User {sender} not in room {}", self.id)));
        }
        let (has, needs) = (self.power_of(sender), self.needed(&draft.kind, draft.state_key.is_some()));
        if has < needs {
            return Err(MatrixError::forbidden(format!(
                "You don't have permission to post that to the room. user_level ({has}) < send_level ({needs})"
            )));
        }
        if draft.state_key.as_ref().is_some_and(|key| key.starts_with('@') && **key != **sender) {
            return Err(MatrixError::forbidden("You are not allowed to set others state"));
        }
        if draft.kind == "m.room.power_levels" && draft.state_key.as_deref() == Some("") {
            self.authorise_power_levels(sender, &draft.content)?;
        }
        if let Some(redacts) = &draft.redacts {
            let is_own = self.event(redacts).is_some_and(|event| event.sender == *sender);
            if !is_own && has < self.level("redact", 50) {
                return Err(MatrixError::forbidden("You don't have permission to redact events of others"));
            }
        }
        Ok(())
    }

    fn authorise_membership(&self, draft: &Draft, target: &str) -> Result<(), MatrixError> {
        let sender = &draft.sender;
        let wanted = draft.content.get("membership").and_then(Value::as_str).and_then(Membership::parse);
        let wanted = wanted.ok_or_else(|| MatrixError::bad_json("m.room.member needs a membership"))?;
        let (from, to) = (self.membership(sender), self.membership(target));
        let is_self = &**sender == target;
        let has = self.power_of(sender);
        let outranks = has > self.power_of(target);
        let need_joined = || match from {
            Membership::Join => Ok(()),
            _ => Err(MatrixError::forbidden(format!("User {sender} not in room {}", self.id))),
        };
        let enough = |level: i64, what: &str| match has >= level {
            true => Ok(()),
            false => Err(MatrixError::forbidden(format!("You don't have permission to {what}"))),
        };
        match wanted {
            Membership::Join if !is_self => Err(MatrixError::forbidden("Cannot force another user to join.")),
            Membership::Join => match to {
                Membership::Ban => Err(MatrixError::forbidden("You are banned from this room")),
                Membership::Join | Membership::Invite => Ok(()),
                Membership::Leave if self.join_rule() == "public" || self.is_founding(sender) => Ok(()),
                Membership::Leave => Err(MatrixError::forbidden("You are not invited to this room.")),
            },
            Membership::Invite => {
                need_joined()?;
                match to {
                    Membership::Ban => {
                        return Err(MatrixError::forbidden(format!("{target} is banned from the room")));
                    }
                    Membership::Join => {
                        return Err(MatrixError::forbidden(format!("{target} is already in the room.")));
                    }
                    Membership::Invite | Membership::Leave => {}
                }
                enough(self.level("invite", 0), "invite users")
            }
            Membership::Leave if is_self => match to {
                Membership::Join | Membership::Invite => Ok(()),
                _ => Err(MatrixError::forbidden(format!("User {target} not in room {}", self.id))),
            },
            Membership::Leave => {
                need_joined()?;
                if to == Membership::Ban {
                    enough(self.level("ban", 50), "unban users")?;
                }
                enough(self.level("kick", 50), "kick users")?;
                if outranks {
                    Ok(())
                } else {
                    Err(MatrixError::forbidden(format!("You cannot kick user {target}.")))
                }
            }
            Membership::Ban => {
                need_joined()?;
                enough(self.level("ban", 50), "ban users")?;
                if outranks {
                    Ok(())
                } else {
                    Err(MatrixError::forbidden(format!("You cannot ban user {target}.")))
                }
            }
        }
    }

    /// Nobody raises anything above their own level, nor touches what is at or above it.
    fn authorise_power_levels(&self, sender: &UserId, new: &Object) -> Result<(), MatrixError> {
        if self.version == RoomVersion::V12
            && self.creators.iter().any(|c| new.get("users").is_some_and(|users| users.get(&**c).is_some()))
        {
            return Err(MatrixError::bad_json(
                "Creators must not be listed in the power levels of this room version",
            ));
        }
        let has = self.power_of(sender);
        let empty = Object::new();
        let old = self.content("m.room.power_levels", "").unwrap_or(&empty);
        if old.is_empty() {
            return Ok(());
        }
        let refuse = |what: &str| {
            Err(MatrixError::forbidden(format!("You don't have permission to change the level of {what}")))
        };
        for group in [None, Some("events"), Some("users")] {
            let levels = |content: &Object| match group {
                None => content.clone(),
                Some(name) => content.get(name).and_then(Value::as_object).cloned().unwrap_or_default(),
            };
            let (before, after) = (levels(old), levels(new));
            for name in before.keys().chain(after.keys()) {
                let (from, to) =
                    (before.get(name).and_then(Value::as_i64), after.get(name).and_then(Value::as_i64));
                if from == to {
                    continue;
                }
                let lowers_self = group == Some("users") && name.as_str() == &**sender;
                let peer = group == Some("users") && !lowers_self && from.is_some_and(|level| level >= has);
                if peer || from.is_some_and(|level| level > has) || to.is_some_and(|level| level > has) {
                    return refuse(name);
                }
            }
        }
        Ok(())
    }

    pub(super) fn power_of(&self, user: &str) -> i64 {
        if self.creators.contains(user)
            && (self.version == RoomVersion::V12 || self.content("m.room.power_levels", "").is_none())
        {
            return i64::MAX;
        }
        let levels = self.content("m.room.power_levels", "");
        let of_user =
            levels.and_then(|l| l.get("users")).and_then(|users| users.get(user)).and_then(Value::as_i64);
        of_user.unwrap_or_else(|| self.level("users_default", 0))
    }

    fn needed(&self, kind: &str, is_state: bool) -> i64 {
        let levels = self.content("m.room.power_levels", "");
        let of_kind =
            levels.and_then(|l| l.get("events")).and_then(|events| events.get(kind)).and_then(Value::as_i64);
        of_kind.unwrap_or_else(|| match is_state {
            true => self.level("state_default", 50),
            false => self.level("events_default", 0),
        })
    }

    fn level(&self, name: &str, default: i64) -> i64 {
        self.content("m.room.power_levels", "")
            .and_then(|levels| levels.get(name))
            .and_then(Value::as_i64)
            .unwrap_or(default)
    }

    fn join_rule(&self) -> &str {
        self.content("m.room.join_rules", "")
            .and_then(|rule| rule.get("join_rule"))
            .and_then(Value::as_str)
            .unwrap_or("invite")
    }

    /// The creator's own join is the second event of every room.
    fn is_founding(&self, user: &str) -> bool {
        self.creators.contains(user) && self.members.is_empty()
    }
}
