//! Devices, and the messages that go straight to them.

use std::collections::{BTreeMap, VecDeque};

use serde_json::{Value, json};

use super::{Answer, Object, State, Transactions, objects, text};
use crate::homeserver::{
    error::MatrixError,
    ids::{Caller, DeviceId, Pos, Timestamp, UserId},
};

#[derive(Default)]
pub(super) struct Device {
    pub(super) display_name: Option<String>,
    pub(super) last_seen: Option<Timestamp>,
    pub(super) token: Option<String>,
    /// The uploaded identity keys, with signatures that arrived since.
    pub(super) keys: Option<Value>,
    /// By algorithm; claimed oldest first.
    pub(super) one_time_keys: BTreeMap<String, VecDeque<(String, Value)>>,
    pub(super) fallback_keys: BTreeMap<String, FallbackKey>,
    /// To-device messages that no `since` has acknowledged yet.
    pub(super) inbox: VecDeque<(Pos, Value)>,
    pub(super) transactions: Transactions,
}

pub(super) struct FallbackKey {
    pub(super) id: String,
    pub(super) key: Value,
    pub(super) used: bool,
}

impl State {
    pub(in crate::homeserver) fn devices(&self, who: &Caller) -> Answer {
        let account = self.user(&who.user)?;
        let devices: Vec<Value> =
            account.devices.iter().map(|(id, device)| describe(&who.user, id, device)).collect();
        Ok(json!({"devices": devices}))
    }

    pub(in crate::homeserver) fn device(&self, who: &Caller, id: &str) -> Answer {
        let device = self.user(&who.user)?.devices.get_key_value(id);
        let (id, device) = device.ok_or_else(|| MatrixError::not_found("No device found"))?;
        Ok(describe(&who.user, id, device))
    }

    pub(in crate::homeserver) fn rename_device(&mut self, who: &Caller, id: &str, body: &Object) -> Answer {
        let device = self.user_mut(&who.user)?.devices.get_mut(id);
        let device = device.ok_or_else(|| MatrixError::not_found("No device found"))?;
        if let Some(name) = text(body, "display_name") {
            device.display_name = Some(name.chars().take(100).collect());
            self.note_device_change(&who.user);
        }
        Ok(json!({}))
    }

    pub(in crate::homeserver) fn delete_devices(
        &mut self,
        who: &Caller,
        ids: &[&str],
        body: &Object,
    ) -> Answer {
        self.require_password(who, body)?;
        for id in ids {
            self.remove_device(&who.user, id);
        }
        Ok(json!({}))
    }

    pub(in crate::homeserver) fn logout(&mut self, who: &Caller, all: bool) -> Answer {
        let ids: Vec<DeviceId> = match all {
            true => self.user(&who.user)?.devices.keys().cloned().collect(),
            false => vec![who.device.clone()],
        };
        for id in ids {
            self.remove_device(&who.user, &id);
        }
        Ok(json!({}))
    }

    fn remove_device(&mut self, user: &UserId, id: &str) {
        let Some(device) = self.users.get_mut(user).and_then(|account| account.devices.remove(id)) else {
            return;
        };
        if let Some(token) = device.token {
            self.tokens.remove(&token);
        }
        self.note_device_change(user);
    }

    /// `dropped` is asked per message whether a fault swallows it; the sender is told nothing.
    pub(in crate::homeserver) fn send_to_device(
        &mut self,
        who: &Caller,
        kind: &str,
        txn: &str,
        body: &Object,
        dropped: &mut dyn FnMut(&str) -> bool,
    ) -> Answer {
        if !body.get("messages").is_some_and(Value::is_object) {
            return Err(MatrixError::missing_param("messages"));
        }
        let key = format!("to-device {kind} {txn}");
        if let Some(answer) = self.transactions(who)?.answered(&key) {
            return Ok(answer);
        }
        for (user, devices) in objects(body, "messages") {
            for (device, content) in devices.as_object().into_iter().flatten() {
                if !dropped(user) {
                    self.enqueue(who, kind, user, device, content);
                }
            }
        }
        self.transactions(who)?.remember(key, json!({}));
        Ok(json!({}))
    }

    fn enqueue(&mut self, who: &Caller, kind: &str, user: &str, device: &str, content: &Value) {
        let (limit, pos) = (self.config.limits.to_device_queue, self.advance());
        let Some((user, _)) = self.users.get_key_value(user) else { return };
        let user = user.clone();
        let Some(account) = self.users.get_mut(&user) else { return };
        let message = json!({"sender": who.user, "type": kind, "content": content});
        for (_, recipient) in account.devices.iter_mut().filter(|(id, _)| device == "*" || &***id == device) {
            recipient.inbox.push_back((pos, message.clone()));
            if recipient.inbox.len() > limit {
                recipient.inbox.pop_front();
            }
        }
        self.woken.insert(user);
    }

    pub(super) fn transactions(&mut self, who: &Caller) -> Result<&mut Transactions, MatrixError> {
        let device = self.users.get_mut(&who.user).and_then(|account| account.devices.get_mut(&who.device));
        device.map(|device| &mut device.transactions).ok_or_else(|| MatrixError::unknown_token(false))
    }
}

fn describe(user: &UserId, id: &DeviceId, device: &Device) -> Value {
    json!({
        "user_id": user,
        "device_id": id,
        "display_name": device.display_name,
        "last_seen_ts": device.last_seen.map(|at| at.0),
        "last_seen_ip": "127.0.0.1",
    })
}
