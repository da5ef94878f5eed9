//! End-to-end encryption: device keys, one-time keys, cross-signing, signatures.
//!
//! Signatures are stored as they come and not verified: a client has to verify them anyway, and a development
//! server that lets a bad one through is the better test.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use serde_json::{Value, json};

use super::{Answer, Object, State, devices::FallbackKey, objects};
use crate::homeserver::{
    error::MatrixError,
    ids::{Caller, Pos, UserId},
};

#[derive(Default)]
pub(super) struct CrossSigning {
    master: Option<Value>,
    self_signing: Option<Value>,
    user_signing: Option<Value>,
    /// What this user signed on other users' master keys; only they themselves get to see it.
    signed_others: BTreeMap<UserId, Object>,
}

/// Whose devices changed when; each user appears once, at the latest change.
#[derive(Default)]
pub(super) struct DeviceChanges {
    by_pos: BTreeMap<Pos, UserId>,
    latest: HashMap<UserId, Pos>,
    /// A new signature on somebody's master key concerns the signer alone: signer and signed.
    signatures: BTreeMap<Pos, (UserId, UserId)>,
}

impl DeviceChanges {
    /// Older signature changes are forgotten: a client that far behind asks for all keys again anyway.
    const SIGNATURES: usize = 50_000;

    fn changed(&mut self, pos: Pos, user: &UserId) {
        if let Some(previous) = self.latest.insert(user.clone(), pos) {
            self.by_pos.remove(&previous);
        }
        self.by_pos.insert(pos, user.clone());
    }

    fn signed(&mut self, pos: Pos, signer: &UserId, signed: &UserId) {
        self.signatures.insert(pos, (signer.clone(), signed.clone()));
        if self.signatures.len() > Self::SIGNATURES {
            self.signatures.pop_first();
        }
    }

    /// The users whose devices changed after `since` and, for `viewer`, those they signed.
    pub(super) fn after(&self, since: Pos, viewer: &UserId) -> impl Iterator<Item = &UserId> {
        let next = Pos(since.0.saturating_add(1));
        let signed = self.signatures.range(next..).filter(move |(_, (signer, _))| signer == viewer);
        self.by_pos.range(next..).map(|(_, user)| user).chain(signed.map(|(_, (_, signed))| signed))
    }
}

impl State {
    pub(in crate::homeserver) fn upload_keys(&mut self, who: &Caller, body: &Object) -> Answer {
        let limit = self.config.limits.one_time_keys;
        if let Some(keys) = body.get("device_keys").filter(|k| !k.is_null()) {
            if keys.get("user_id").and_then(Value::as_str) != Some(&*who.user)
                || keys.get("device_id").and_then(Value::as_str) != Some(&*who.device)
            {
                return Err(MatrixError::invalid_param("device_keys are not those of the requesting device"));
            }
            if !keys.get("keys").is_some_and(Value::is_object) {
                return Err(MatrixError::bad_json("device_keys have no keys"));
            }
        }
        let device = self.user_mut(&who.user)?.devices.get_mut(&who.device);
        let device = device.ok_or_else(|| MatrixError::unknown_token(false))?;
        for (id, key) in objects(body, "one_time_keys") {
            let algorithm = algorithm(id)?;
            let queue = device.one_time_keys.entry(algorithm.to_owned()).or_default();
            match queue.iter().find(|(known, _)| known == id) {
                // A repeated upload after a lost reply.
                Some((_, known)) if same_key(known, key) => {}
                Some(_) => {
                    return Err(MatrixError::invalid_param(format!("One time key {id} already exists")));
                }
                None if queue.len() >= limit => {
                    return Err(MatrixError::invalid_param("Too many one-time keys for this device"));
                }
                None => queue.push_back((id.clone(), key.clone())),
            }
        }
        for (id, key) in
            objects(body, "fallback_keys").chain(objects(body, "org.matrix.msc2732.fallback_keys"))
        {
            let fallback = FallbackKey { id: id.clone(), key: key.clone(), used: false };
            let algorithm = algorithm(id)?.to_owned();
            if device.fallback_keys.len() < limit || device.fallback_keys.contains_key(&algorithm) {
                device.fallback_keys.insert(algorithm, fallback);
            }
        }
        let counts = one_time_key_counts(device);
        let changed = match body.get("device_keys").filter(|k| !k.is_null()) {
            Some(keys) if device.keys.as_ref() != Some(keys) => {
                device.keys = Some(keys.clone());
                true
            }
            _ => false,
        };
        if changed {
            self.note_device_change(&who.user);
        }
        Ok(json!({"one_time_key_counts": counts}))
    }

    pub(in crate::homeserver) fn query_keys(&self, who: &Caller, body: &Object) -> Answer {
        if !body.get("device_keys").is_some_and(Value::is_object) {
            return Err(MatrixError::missing_param("device_keys"));
        }
        let mut answer = json!({
            "device_keys": {}, "master_keys": {}, "self_signing_keys": {}, "user_signing_keys": {}, "failures": {},
        });
        for (id, wanted) in objects(body, "device_keys") {
            if !self.is_local(id) {
                let server = id.split_once(':').map_or("", |(_, server)| server);
                answer["failures"][server] =
                    json!({"status": 503, "message": "The development homeserver does not federate"});
                continue;
            }
            answer["device_keys"][id] = json!({});
            let Some(account) = self.users.get(id.as_str()) else { continue };
            let wanted: BTreeSet<&str> =
                wanted.as_array().into_iter().flatten().filter_map(Value::as_str).collect();
            for (device_id, device) in &account.devices {
                if let Some(keys) = &device.keys
                    && (wanted.is_empty() || wanted.contains(&**device_id))
                {
                    let mut keys = keys.clone();
                    keys["unsigned"] = match &device.display_name {
                        Some(name) => json!({"device_display_name": name}),
                        None => json!({}),
                    };
                    answer["device_keys"][id][&**device_id] = keys;
                }
            }
            let identity = &account.cross_signing;
            if let Some(master) = &identity.master {
                let mut master = master.clone();
                if let Some(mine) = self.user(&who.user)?.cross_signing.signed_others.get(id.as_str()) {
                    merge_signatures(&mut master, &who.user, mine);
                }
                answer["master_keys"][id] = master;
            }
            if let Some(key) = &identity.self_signing {
                answer["self_signing_keys"][id] = key.clone();
            }
            if let Some(key) = identity.user_signing.as_ref().filter(|_| id.as_str() == &*who.user) {
                answer["user_signing_keys"][id] = key.clone();
            }
        }
        Ok(answer)
    }

    pub(in crate::homeserver) fn claim_keys(&mut self, body: &Object) -> Answer {
        if !body.get("one_time_keys").is_some_and(Value::is_object) {
            return Err(MatrixError::missing_param("one_time_keys"));
        }
        let mut answer = json!({"one_time_keys": {}, "failures": {}});
        for (user, devices) in objects(body, "one_time_keys") {
            let Some(account) = self.users.get_mut(user.as_str()) else { continue };
            for (device_id, algorithm) in devices.as_object().into_iter().flatten() {
                let (Some(device), Some(algorithm)) =
                    (account.devices.get_mut(device_id.as_str()), algorithm.as_str())
                else {
                    continue;
                };
                let one_time = device.one_time_keys.get_mut(algorithm).and_then(|queue| queue.pop_front());
                let claimed = one_time.or_else(|| {
                    let fallback = device.fallback_keys.get_mut(algorithm)?;
                    fallback.used = true;
                    Some((fallback.id.clone(), fallback.key.clone()))
                });
                if let Some((id, key)) = claimed {
                    answer["one_time_keys"][user][device_id] = json!({ id: key });
                }
            }
        }
        Ok(answer)
    }

    /// The first identity needs no password, as on Synapse; replacing it does.
    pub(in crate::homeserver) fn upload_cross_signing(&mut self, who: &Caller, body: &Object) -> Answer {
        for (name, usage) in KEY_USAGES {
            let Some(key) = body.get(name).filter(|k| !k.is_null()) else { continue };
            let for_usage =
                key.get("usage").and_then(Value::as_array).is_some_and(|u| u.contains(&json!(usage)));
            let one_key = key.get("keys").and_then(Value::as_object).is_some_and(|keys| keys.len() == 1);
            if key.get("user_id").and_then(Value::as_str) != Some(&*who.user) || !for_usage || !one_key {
                return Err(MatrixError::invalid_param(format!("Invalid {usage} key")));
            }
        }
        let known = &self.user(&who.user)?.cross_signing;
        let replaces =
            |stored: &Option<Value>, name: &str| match (stored, body.get(name).filter(|k| !k.is_null())) {
                (Some(stored), Some(new)) => !same_key(stored, new),
                _ => false,
            };
        if known.master.is_none() && !body.get("master_key").is_some_and(Value::is_object) {
            return Err(MatrixError::invalid_param("No master key available"));
        }
        let replaced = replaces(&known.master, "master_key")
            || replaces(&known.self_signing, "self_signing_key")
            || replaces(&known.user_signing, "user_signing_key");
        if replaced {
            self.require_password(who, body)?;
        }
        let known = &mut self.user_mut(&who.user)?.cross_signing;
        for (slot, name) in [
            (&mut known.master, "master_key"),
            (&mut known.self_signing, "self_signing_key"),
            (&mut known.user_signing, "user_signing_key"),
        ] {
            if let Some(key) = body.get(name).filter(|k| !k.is_null()) {
                *slot = Some(key.clone());
            }
        }
        self.note_device_change(&who.user);
        Ok(json!({}))
    }

    pub(in crate::homeserver) fn upload_signatures(&mut self, who: &Caller, body: &Object) -> Answer {
        let mut failures = Object::new();
        for (user, items) in body {
            for (id, signed) in items.as_object().into_iter().flatten() {
                if let Err(refusal) = self.add_signature(who, user, id, signed) {
                    let of_user = failures.entry(user.clone()).or_insert_with(|| json!({}));
                    of_user[id] = refusal.body;
                }
            }
        }
        Ok(json!({"failures": failures}))
    }

    fn add_signature(
        &mut self,
        who: &Caller,
        user: &str,
        id: &str,
        signed: &Value,
    ) -> Result<(), MatrixError> {
        let signatures = signed
            .get("signatures")
            .and_then(|by| by.get(&*who.user))
            .and_then(Value::as_object)
            .cloned()
            .ok_or_else(|| {
                MatrixError::new(400, "M_INVALID_SIGNATURE", "No signature of the requesting user")
            })?;
        let signed_user = self.users.get_key_value(user).map(|(id, _)| id.clone());
        let signed_user = signed_user.ok_or_else(|| MatrixError::not_found("No such user"))?;
        let account = self.user_mut(user)?;
        let device = account.devices.get_mut(id).and_then(|device| device.keys.as_mut());
        let master = account.cross_signing.master.as_mut().filter(|key| public_key(key) == Some(id));
        let (stored, is_own) = match (device, master) {
            (Some(keys), _) if signed_user == who.user => (keys, true),
            (_, Some(keys)) => (keys, signed_user == who.user),
            _ => return Err(MatrixError::not_found("No such key")),
        };
        if !same_key(stored, signed) {
            return Err(MatrixError::new(
                400,
                "M_INVALID_SIGNATURE",
                "The signed object differs from the stored key",
            ));
        }
        if is_own {
            merge_signatures(stored, &who.user, &signatures);
            self.note_device_change(&who.user);
        } else {
            let mine = &mut self.user_mut(&who.user)?.cross_signing.signed_others;
            mine.entry(signed_user.clone()).or_default().extend(signatures);
            let pos = self.advance();
            self.device_changes.signed(pos, &who.user, &signed_user);
            self.woken.insert(who.user.clone());
        }
        Ok(())
    }

    /// Everybody who shares a room with `user` has to ask for their keys again.
    pub(super) fn note_device_change(&mut self, user: &UserId) {
        let pos = self.advance();
        self.device_changes.changed(pos, user);
        self.woken.insert(user.clone());
        let rooms = self.users.get(user).into_iter().flat_map(|account| &account.rooms);
        for room in rooms.filter_map(|id| self.rooms.get(id)).filter(|room| room.is_joined(user)) {
            self.woken.extend(room.joined().cloned());
        }
    }

    pub(super) fn key_counts(&self, who: &Caller) -> (Value, Vec<&str>) {
        match self.users.get(&who.user).and_then(|account| account.devices.get(&who.device)) {
            None => (json!({"signed_curve25519": 0}), Vec::new()),
            Some(device) => {
                let unused = device.fallback_keys.iter().filter(|(_, key)| !key.used);
                (one_time_key_counts(device), unused.map(|(algorithm, _)| algorithm.as_str()).collect())
            }
        }
    }
}

const KEY_USAGES: [(&str, &str); 3] =
    [("master_key", "master"), ("self_signing_key", "self_signing"), ("user_signing_key", "user_signing")];

fn one_time_key_counts(device: &super::devices::Device) -> Value {
    // A count of nought has to be said, or the client does not know that it must upload.
    let mut counts = json!({"signed_curve25519": 0});
    for (algorithm, queue) in &device.one_time_keys {
        counts[algorithm] = queue.len().into();
    }
    counts
}

fn algorithm(key_id: &str) -> Result<&str, MatrixError> {
    match key_id.split_once(':') {
        Some((algorithm, id)) if !id.is_empty() => Ok(algorithm),
        _ => Err(MatrixError::invalid_param(format!("{key_id} is not a key id"))),
    }
}

/// The same key, whatever signatures it carries.
fn same_key(one: &Value, other: &Value) -> bool {
    let bare = |key: &Value| match key {
        Value::Object(key) => {
            let mut key = key.clone();
            key.remove("signatures");
            key.remove("unsigned");
            Value::Object(key)
        }
        other => other.clone(),
    };
    bare(one) == bare(other)
}

fn public_key(key: &Value) -> Option<&str> {
    key.get("keys")?.as_object()?.values().next()?.as_str()
}

fn merge_signatures(key: &mut Value, signer: &UserId, signatures: &Object) {
    let Some(key) = key.as_object_mut() else { return };
    let all = key.entry("signatures").or_insert_with(|| json!({}));
    if let Some(all) = all.as_object_mut()
        && let Some(of_signer) = all.entry(signer.to_string()).or_insert_with(|| json!({})).as_object_mut()
    {
        of_signer.extend(signatures.clone());
    }
}
