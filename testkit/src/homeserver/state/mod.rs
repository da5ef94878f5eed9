//! The homeserver without its sockets: rooms, users, devices and queues in memory.
//!
//! Every method takes the time as an argument and returns the JSON body of the answer. After a mutation the
//! shell drains [`State::take_woken`] (whose long polls have news) and asks [`State::next_deadline`] when to
//! call [`State::fire_due`].

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    time::Duration,
};

use rand::{Rng, SeedableRng, rngs::StdRng};
use serde_json::{Map, Value, json};

use super::{
    error::MatrixError,
    ids::{Caller, Pos, RoomId, Timestamp, UserId},
};

mod accounts;
mod create;
mod delayed;
mod devices;
mod keys;
mod power;
mod room;
mod rooms;
mod sync;
#[cfg(test)]
mod tests;

use self::{accounts::User, delayed::DelayedEvents, keys::DeviceChanges, room::Room};
pub(super) use self::{
    accounts::push_rules,
    delayed::Action,
    rooms::{Direction, MessagesQuery, Outgoing},
};
pub use self::{delayed::DelayedForm, power::RoomVersion};

/// The body of a successful answer, or the refusal.
pub(super) type Answer = Result<Value, MatrixError>;
pub(super) type Object = Map<String, Value>;

/// Upper bounds of what the server keeps; beyond them it refuses, or forgets the oldest where it says so.
///
/// The defaults leave room for a load test of some thousand users on one machine.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Limits {
    /// Registered users; more are refused with `M_RESOURCE_LIMIT_EXCEEDED`.
    pub users: usize,
    /// Devices of one user; more are refused with `M_RESOURCE_LIMIT_EXCEEDED`.
    pub devices_per_user: usize,
    /// Rooms; more are refused with `M_RESOURCE_LIMIT_EXCEEDED`.
    pub rooms: usize,
    /// Events kept per room. The oldest are forgotten, their state is kept.
    pub timeline: usize,
    /// Distinct state keys per room; more are refused with `M_RESOURCE_LIMIT_EXCEEDED`.
    pub state_per_room: usize,
    /// To-device messages waiting for one device. The oldest are forgotten.
    pub to_device_queue: usize,
    /// One-time keys kept per device; more are refused with `M_INVALID_PARAM`.
    pub one_time_keys: usize,
    /// Account data entries, and stored filters, of one user.
    pub account_data: usize,
    /// Delayed events one user may have scheduled (MSC4140); more are refused with 429.
    pub scheduled: usize,
    /// TCP connections served at a time; further ones wait to be accepted.
    pub connections: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            users: 20_000,
            devices_per_user: 100,
            rooms: 10_000,
            timeline: 20_000,
            state_per_room: 50_000,
            to_device_queue: 20_000,
            one_time_keys: 500,
            account_data: 1_000,
            scheduled: 10_000,
            connections: 8_192,
        }
    }
}

#[derive(Clone, Debug)]
pub(super) struct Config {
    pub(super) server_name: String,
    pub(super) max_delay: Duration,
    pub(super) delayed_form: DelayedForm,
    pub(super) registration: bool,
    pub(super) room_version: RoomVersion,
    pub(super) limits: Limits,
}

pub(super) struct State {
    config: Config,
    rng: StdRng,
    pos: Pos,
    users: BTreeMap<UserId, User>,
    tokens: HashMap<String, Caller>,
    expired_tokens: BTreeSet<String>,
    rooms: HashMap<RoomId, Room>,
    aliases: BTreeMap<String, RoomId>,
    device_changes: DeviceChanges,
    delayed: DelayedEvents,
    openid: HashMap<String, (UserId, Timestamp)>,
    woken: BTreeSet<UserId>,
}

impl State {
    /// `seed` makes identifiers and tokens; the same seed gives the same ones.
    pub(super) fn new(config: Config, seed: [u8; 32]) -> Self {
        Self {
            config,
            rng: StdRng::from_seed(seed),
            pos: Pos::default(),
            users: BTreeMap::new(),
            tokens: HashMap::new(),
            expired_tokens: BTreeSet::new(),
            rooms: HashMap::new(),
            aliases: BTreeMap::new(),
            device_changes: DeviceChanges::default(),
            delayed: DelayedEvents::default(),
            openid: HashMap::new(),
            woken: BTreeSet::new(),
        }
    }

    /// The users for whom a waiting `/sync` should look again.
    pub(super) fn take_woken(&mut self) -> BTreeSet<UserId> {
        std::mem::take(&mut self.woken)
    }

    pub(super) fn capabilities(&self) -> Value {
        json!({"capabilities": {
            "m.room_versions": {
                "default": self.config.room_version.as_str(),
                "available": {"11": "stable", "12": "stable"},
            },
            "m.change_password": {"enabled": false},
            "m.set_displayname": {"enabled": true},
            "m.set_avatar_url": {"enabled": true},
            "m.3pid_changes": {"enabled": false},
            "m.get_login_token": {"enabled": false},
            "org.matrix.msc4140.delayed_events": {
                "max_delay_ms": self.config.max_delay.as_millis() as u64,
                "max_scheduled": self.config.limits.scheduled,
            },
        }})
    }

    fn advance(&mut self) -> Pos {
        self.pos.0 += 1;
        self.pos
    }

    fn random_text(&mut self, length: usize) -> String {
        (&mut self.rng).sample_iter(rand::distr::Alphanumeric).take(length).map(char::from).collect()
    }

    fn user(&self, id: &str) -> Result<&User, MatrixError> {
        self.users.get(id).ok_or_else(|| MatrixError::not_found("User not found"))
    }

    fn user_mut(&mut self, id: &str) -> Result<&mut User, MatrixError> {
        self.users.get_mut(id).ok_or_else(|| MatrixError::not_found("User not found"))
    }

    fn is_local(&self, user_id: &str) -> bool {
        user_id
            .strip_prefix('@')
            .and_then(|rest| rest.split_once(':'))
            .is_some_and(|(localpart, server)| !localpart.is_empty() && server == self.config.server_name)
    }

    fn full(what: &str) -> MatrixError {
        MatrixError::new(
            403,
            "M_RESOURCE_LIMIT_EXCEEDED",
            format!("The development homeserver holds no more {what}; raise Limits or start a fresh one"),
        )
    }
}

/// Answers to requests that may be repeated with the same transaction id.
#[derive(Default)]
struct Transactions {
    answers: HashMap<String, Value>,
    order: VecDeque<String>,
}

impl Transactions {
    /// Clients repeat the latest requests only; this many cover a burst of sends that all lost their reply.
    const KEPT: usize = 1_000;

    fn answered(&self, key: &str) -> Option<Value> {
        self.answers.get(key).cloned()
    }

    fn remember(&mut self, key: String, answer: Value) {
        if self.answers.insert(key.clone(), answer).is_none() {
            self.order.push_back(key);
        }
        if self.order.len() > Self::KEPT
            && let Some(oldest) = self.order.pop_front()
        {
            self.answers.remove(&oldest);
        }
    }
}

fn text<'a>(object: &'a Object, name: &str) -> Option<&'a str> {
    object.get(name).and_then(Value::as_str)
}

fn required_text<'a>(object: &'a Object, name: &str) -> Result<&'a str, MatrixError> {
    text(object, name).ok_or_else(|| MatrixError::missing_param(name))
}

fn objects<'a>(object: &'a Object, name: &str) -> impl Iterator<Item = (&'a String, &'a Value)> {
    object.get(name).and_then(Value::as_object).into_iter().flatten()
}
