//! Our own media key: when it is made, to whom it is sent, and when we start to encrypt with it.
//!
//! The rules are those of the deployed clients: a member who leaves makes us change the key; one who joins while
//! the key is younger than the grace period is given it, one who joins later makes us change it; one rollout at a
//! time, and whatever happens meanwhile is one follow-up. Added to them: a device that a message did not reach is
//! tried again with growing waits, we switch to a new key only when every member has it or the deadline is over,
//! and a key is never older than an hour.
//!
//! *Assumptions.* The shell brings the device list of every recipient up to date before it encrypts, and reports
//! a device as reached only when the request that carried its message succeeded.

use std::{
    collections::{BTreeMap, VecDeque},
    fmt,
    time::{Duration, Instant},
};

use matrix_sdk::ruma::{OwnedDeviceId, OwnedUserId};
use rand::CryptoRng;

use crate::{
    key::{KeyIndex, MediaKey},
    member::Member,
    time::{Now, UnixMillis},
};

/// A device that is to have our key.
pub type Recipient = (OwnedUserId, OwnedDeviceId);

/// A homeserver may ask for patience, but not for ever.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(300);

/// The figures of key rotation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RolloutConfig {
    /// How long after a new key was delivered we start to encrypt with it: 1 s, as deployed clients do (MSC4143
    /// recommends 5 s: fewer frames that a slow receiver cannot open, against a leaver who listens longer).
    pub use_key_delay: Duration,
    /// How long the delivery of a new key may take before the delay starts all the same: 10 s.
    pub delivery_deadline: Duration,
    /// A key younger than this is shared with joiners instead of being replaced: 10 s.
    pub grace: Duration,
    /// Length of our keys in bytes, 16 (as deployed) or 32 (MSC4143). Anything else counts as 32.
    pub key_bytes: usize,
    /// With this many members or more, ourselves included, the key is never changed: every change costs everybody
    /// a message from everybody. `None`: no such limit.
    pub participant_limit: Option<usize>,
    /// Wait before the first retry of a device that was not reached: 1 s. It doubles each time.
    pub retry_base: Duration,
    /// Longest wait between two tries of a device: 30 s.
    pub retry_max: Duration,
    /// How long the shell may take to send before it counts as failed: 30 s.
    pub send_timeout: Duration,
    /// A key older than this is replaced: 1 h.
    pub rotate_every: Duration,
    /// Index of the first key: 0.
    pub first_index: u8,
}

impl Default for RolloutConfig {
    fn default() -> Self {
        Self {
            use_key_delay: Duration::from_secs(1),
            delivery_deadline: Duration::from_secs(10),
            grace: Duration::from_secs(10),
            key_bytes: 16,
            participant_limit: None,
            retry_base: Duration::from_secs(1),
            retry_max: Duration::from_secs(30),
            send_timeout: Duration::from_secs(30),
            rotate_every: Duration::from_secs(3600),
            first_index: 0,
        }
    }
}

/// Names one sending until its outcome is reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SendId(pub u64);

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeyInput {
    /// The members of the call without our own device; to be given after every change, and once at the start.
    Members(Vec<Member>),
    /// A sending is done.
    Sent {
        /// Which one.
        id: SendId,
        /// The recipients that it did not reach.
        undelivered: Vec<Recipient>,
    },
    /// A sending failed as a whole.
    SendFailed {
        /// Which one.
        id: SendId,
        /// How long the homeserver asks us to wait.
        retry_after: Option<Duration>,
    },
    /// Replace the key, for instance because it has sealed nearly 2³² frames. Waits for a rollout under way.
    Rotate,
}

/// What to do now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeyOutput {
    /// Send this key to these devices, Olm-encrypted, and report the outcome.
    Send {
        /// Name of the sending.
        id: SendId,
        /// Index of the key.
        index: KeyIndex,
        /// The key.
        key: MediaKey,
        /// To whom.
        recipients: Vec<Recipient>,
    },
    /// Install this key in our own ring and encrypt with it from now on.
    Use {
        /// Its index.
        index: KeyIndex,
        /// The key.
        key: MediaKey,
    },
    /// Tell the application.
    Event(KeyEvent),
    /// Nothing until then.
    WaitUntil(Instant),
    /// Nothing until the next input.
    Idle,
}

/// What the application should know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeyEvent {
    /// These devices were not reached with the current key, for the first time. They are tried again.
    DeliveryFailed {
        /// Which devices.
        devices: Vec<Recipient>,
    },
    /// Whether the key is kept although members come and go, because the call is too large.
    RotationSuppressed(bool),
    /// Every member has the key with this index.
    Delivered {
        /// Its index.
        index: KeyIndex,
    },
}

/// The state machine of our own media key. See the [module](self).
///
/// After every [`Self::handle`], and when a wait is over, drain [`Self::poll`] until it says
/// [`KeyOutput::WaitUntil`] or [`KeyOutput::Idle`].
pub struct Rollout {
    config: RolloutConfig,
    rng: Box<dyn CryptoRng + Send>,
    members: BTreeMap<Recipient, UnixMillis>,
    /// The members or the wish to rotate changed since the rules were last applied.
    dirty: bool,
    rotate_wanted: bool,
    suppressed: bool,
    current: Option<Current>,
    in_flight: Option<InFlight>,
    /// The homeserver's wish for patience.
    not_before: Option<Instant>,
    last_id: u64,
    outputs: VecDeque<KeyOutput>,
}

impl Rollout {
    /// No key yet; the first [`KeyInput::Members`] makes it. `rng` makes the keys.
    #[must_use]
    pub fn new(config: RolloutConfig, rng: Box<dyn CryptoRng + Send>) -> Self {
        Self {
            config,
            rng,
            members: BTreeMap::new(),
            dirty: false,
            rotate_wanted: false,
            suppressed: false,
            current: None,
            in_flight: None,
            not_before: None,
            last_id: 0,
            outputs: VecDeque::new(),
        }
    }

    /// Takes in what happened. Drain [`Self::poll`] after it.
    pub fn handle(&mut self, now: Now, input: KeyInput) {
        match input {
            KeyInput::Members(members) => {
                self.members = members.into_iter().map(|m| ((m.user_id, m.device_id), m.created)).collect();
                self.dirty = true;
            }
            KeyInput::Sent { id, undelivered } => {
                if self.in_flight.as_ref().is_some_and(|sending| sending.id == id) {
                    self.sent(now.instant, &undelivered);
                }
            }
            KeyInput::SendFailed { id, retry_after } => {
                if let Some(sending) = self.in_flight.as_ref().filter(|sending| sending.id == id) {
                    let undelivered: Vec<_> = sending.recipients.keys().cloned().collect();
                    self.not_before = retry_after.map(|wait| later(now.instant, wait.min(MAX_RETRY_AFTER)));
                    self.sent(now.instant, &undelivered);
                }
            }
            KeyInput::Rotate => {
                self.rotate_wanted = self.current.is_some();
                self.dirty = true;
            }
        }
    }

    /// What to do now. To be called until it says to wait.
    pub fn poll(&mut self, now: Now) -> KeyOutput {
        let now = now.instant;
        if let Some(sending) = &self.in_flight
            && now >= sending.lost_at
        {
            let undelivered: Vec<_> = sending.recipients.keys().cloned().collect();
            self.sent(now, &undelivered);
        }
        self.switch_if_due(now);
        self.apply_rules(now);
        if let Some(output) = self.outputs.pop_front() {
            return output;
        }
        match self.next_send(now) {
            Next::Send(recipients) => self.send(now, recipients),
            Next::At(at) => self.wait(Some(at)),
            Next::Nothing => self.wait(None),
        }
    }

    /// The index of the newest key, whether in use or still being rolled out.
    #[must_use]
    pub fn index(&self) -> Option<KeyIndex> {
        self.current.as_ref().map(|current| current.index)
    }

    fn apply_rules(&mut self, now: Instant) {
        let rolling = self.current.as_ref().is_some_and(|current| current.rolling.is_some());
        let too_old = self.current.as_ref().is_some_and(|current| now >= self.rotates_at(current));
        if rolling || !(self.dirty || too_old && !self.suppressed) {
            return;
        }
        let is_first = self.current.is_none();
        if is_first {
            if !self.dirty {
                return;
            }
            let index = KeyIndex(self.config.first_index);
            let key = self.new_key();
            self.outputs.push_back(KeyOutput::Use { index, key: key.clone() });
            self.current = Some(Current { index, key, made: now, rolling: None, devices: BTreeMap::new() });
        }
        self.dirty = false;

        let suppressed = self.config.participant_limit.is_some_and(|limit| self.members.len() + 1 >= limit);
        if suppressed != self.suppressed {
            self.suppressed = suppressed;
            self.outputs.push_back(KeyOutput::Event(KeyEvent::RotationSuppressed(suppressed)));
        }
        let grace = self.config.grace;
        let Some(current) = &mut self.current else { return };
        // One that has the key and is no member any more, even if the call is too large to act on it now: the
        // key changes as soon as it is not.
        let left = current
            .devices
            .iter()
            .any(|(device, offer)| offer.may_have_it() && !self.members.contains_key(device));
        let is_new = |current: &Current, device: &Recipient, created: &UnixMillis| {
            // Another creation time is a rejoin: that device has lost what it had.
            current.devices.get(device).is_none_or(|offer| offer.created != *created)
        };
        let joined = self.members.iter().any(|(device, created)| is_new(current, device, created));
        let young = now.saturating_duration_since(current.made) < grace;
        let rotate = !suppressed && (left || (joined && !young) || self.rotate_wanted || too_old);
        if suppressed || rotate {
            self.rotate_wanted = false;
        }
        if rotate {
            self.start_rollout(now);
        } else {
            for (device, created) in &self.members {
                if is_new(current, device, created) {
                    current.devices.insert(device.clone(), Offer::new(*created, now));
                }
            }
        }
    }

    fn start_rollout(&mut self, now: Instant) {
        let key = self.new_key();
        // The outcome for the key before does not matter any more, and must not hold up this one.
        self.in_flight = None;
        let Some(current) = &mut self.current else { return };
        current.index = current.index.next();
        current.key = key;
        current.made = now;
        current.devices = self
            .members
            .iter()
            .map(|(device, created)| (device.clone(), Offer::new(*created, now)))
            .collect();
        let delivered = self.members.is_empty().then_some(now);
        current.rolling = Some(Rolling { deadline: later(now, self.config.delivery_deadline), delivered });
    }

    /// Ends a rollout: the new key comes into use.
    fn switch_if_due(&mut self, now: Instant) {
        let Some(current) = &mut self.current else { return };
        if let Some(rolling) = &mut current.rolling {
            // Also when the last device that lacked the key has left.
            if rolling.delivered.is_none() && all_have_it(&current.devices, &self.members) {
                rolling.delivered = Some(now);
            }
            if now >= rolling.switches_at(self.config.use_key_delay) {
                current.rolling = None;
                let output = KeyOutput::Use { index: current.index, key: current.key.clone() };
                self.outputs.push_back(output);
            }
        }
    }

    fn next_send(&self, now: Instant) -> Next {
        let Some(current) = &self.current else { return Next::Nothing };
        if self.in_flight.is_some() {
            return Next::Nothing;
        }
        let waiting =
            || current.devices.iter().filter(|(d, o)| !o.delivered && self.members.contains_key(*d));
        let Some(first) = waiting().map(|(_, offer)| offer.not_before).min() else { return Next::Nothing };
        let first = self.not_before.map_or(first, |gate| gate.max(first));
        if first > now {
            return Next::At(first);
        }
        let due = waiting().filter(|(_, offer)| offer.not_before <= now);
        Next::Send(due.map(|(device, offer)| (device.clone(), offer.created)).collect())
    }

    fn send(&mut self, now: Instant, recipients: BTreeMap<Recipient, UnixMillis>) -> KeyOutput {
        let Some(current) = &mut self.current else { return KeyOutput::Idle };
        for device in recipients.keys() {
            if let Some(offer) = current.devices.get_mut(device) {
                offer.tries = offer.tries.saturating_add(1);
            }
        }
        self.last_id += 1;
        let id = SendId(self.last_id);
        let output = KeyOutput::Send {
            id,
            index: current.index,
            key: current.key.clone(),
            recipients: recipients.keys().cloned().collect(),
        };
        let lost_at = later(now, self.config.send_timeout);
        self.in_flight = Some(InFlight { id, index: current.index, recipients, lost_at });
        output
    }

    fn sent(&mut self, now: Instant, undelivered: &[Recipient]) {
        let (Some(sending), Some(current)) = (self.in_flight.take(), &mut self.current) else { return };
        if sending.index != current.index {
            return; // A key that was replaced meanwhile.
        }
        let mut failed = Vec::new();
        for (device, created) in sending.recipients {
            // A device that rejoined meanwhile may have lost what it was sent.
            let Some(offer) = current.devices.get_mut(&device).filter(|offer| offer.created == created)
            else {
                continue;
            };
            if undelivered.contains(&device) {
                let wait = self.config.retry_base.saturating_mul(1 << offer.tries.saturating_sub(1).min(16));
                offer.not_before = later(now, wait.min(self.config.retry_max));
                if offer.tries == 1 {
                    failed.push(device);
                }
            } else {
                offer.delivered = true;
            }
        }
        if !failed.is_empty() {
            self.outputs.push_back(KeyOutput::Event(KeyEvent::DeliveryFailed { devices: failed }));
        }
        if all_have_it(&current.devices, &self.members) {
            self.outputs.push_back(KeyOutput::Event(KeyEvent::Delivered { index: current.index }));
        }
    }

    fn wait(&self, next_send: Option<Instant>) -> KeyOutput {
        let lost = self.in_flight.as_ref().map(|sending| sending.lost_at);
        let of_key = self.current.as_ref().and_then(|current| match &current.rolling {
            Some(rolling) => Some(rolling.switches_at(self.config.use_key_delay)),
            None => (!self.suppressed).then(|| self.rotates_at(current)),
        });
        let next = [next_send, lost, of_key].into_iter().flatten().min();
        next.map_or(KeyOutput::Idle, KeyOutput::WaitUntil)
    }

    fn rotates_at(&self, current: &Current) -> Instant {
        later(current.made, self.config.rotate_every.max(Duration::from_secs(1)))
    }

    fn new_key(&mut self) -> MediaKey {
        let length = if self.config.key_bytes == 16 { 16 } else { 32 };
        loop {
            let mut bytes = vec![0; length];
            self.rng.fill_bytes(&mut bytes);
            // Both lengths are valid, so the first pass returns.
            if let Ok(key) = MediaKey::new(bytes) {
                return key;
            }
        }
    }
}

impl fmt::Debug for Rollout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rollout")
            .field("config", &self.config)
            .field("members", &self.members)
            .field("current", &self.current)
            .field("in_flight", &self.in_flight)
            .finish_non_exhaustive()
    }
}

/// The newest key. While it is being rolled out we still encrypt with the one before.
#[derive(Debug)]
struct Current {
    index: KeyIndex,
    key: MediaKey,
    made: Instant,
    rolling: Option<Rolling>,
    /// Every device that was offered the key, members or not any more.
    devices: BTreeMap<Recipient, Offer>,
}

#[derive(Debug)]
struct Rolling {
    deadline: Instant,
    delivered: Option<Instant>,
}

impl Rolling {
    fn switches_at(&self, delay: Duration) -> Instant {
        later(self.delivered.map_or(self.deadline, |delivered| delivered.min(self.deadline)), delay)
    }
}

#[derive(Debug)]
struct Offer {
    /// Creation time of the membership that it was offered to.
    created: UnixMillis,
    delivered: bool,
    tries: u32,
    not_before: Instant,
}

impl Offer {
    fn new(created: UnixMillis, now: Instant) -> Self {
        Self { created, delivered: false, tries: 0, not_before: now }
    }

    /// A message whose fate is unknown may have arrived.
    fn may_have_it(&self) -> bool {
        self.tries > 0
    }
}

#[derive(Debug)]
struct InFlight {
    id: SendId,
    index: KeyIndex,
    recipients: BTreeMap<Recipient, UnixMillis>,
    lost_at: Instant,
}

enum Next {
    Send(BTreeMap<Recipient, UnixMillis>),
    At(Instant),
    Nothing,
}

fn all_have_it(devices: &BTreeMap<Recipient, Offer>, members: &BTreeMap<Recipient, UnixMillis>) -> bool {
    devices.iter().all(|(device, offer)| offer.delivered || !members.contains_key(device))
}

/// `instant` moved later, by an age at most: a configured duration may be absurd.
fn later(instant: Instant, duration: Duration) -> Instant {
    const AGE: Duration = Duration::from_secs(100 * 365 * 24 * 3600);
    instant.checked_add(duration.min(AGE)).unwrap_or(instant)
}

#[cfg(test)]
mod tests;
