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
mod tests {
    use std::collections::BTreeSet;

    use matrix_sdk::ruma::UserId;
    use proptest::prelude::*;
    use rand::{SeedableRng as _, rngs::StdRng};

    use super::*;
    use crate::member::{MemberId, MembershipKind, ParticipantIdentity};

    const BOB: (&str, &str) = ("@bob:example.org", "BOBDEVICE");
    const BOB2: (&str, &str) = ("@bob:example.org", "BOBDEVICE2");
    const BOB3: (&str, &str) = ("@bob:example.org", "BOBDEVICE3");
    const CARL: (&str, &str) = ("@carl:example.org", "CARLDEVICE");
    const DAVID: (&str, &str) = ("@david:example.org", "DAVIDDEVICE");

    fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    fn recipient((user, device): (&str, &str)) -> Recipient {
        (UserId::parse(user).unwrap(), device.into())
    }

    fn member(who: (&str, &str), created: u64) -> Member {
        let (user_id, device_id) = recipient(who);
        Member {
            identity: ParticipantIdentity::of_state_member(&user_id, &device_id),
            member_id: MemberId(format!("{user_id}:{device_id}")),
            kind: MembershipKind::State,
            created: UnixMillis(created),
            expires_at: None,
            focus: None,
            intent: None,
            user_id,
            device_id,
        }
    }

    /// What js-sdk uses where ours differs.
    fn js() -> RolloutConfig {
        RolloutConfig { use_key_delay: ms(1000), ..RolloutConfig::default() }
    }

    type Sent = (u64, u8, Vec<String>);

    /// The machine with its shell on virtual time: a sending succeeds at once unless `outcome` says otherwise.
    struct Keys {
        rollout: Rollout,
        start: Now,
        now: Now,
        sent: Vec<Sent>,
        used: Vec<(u64, u8)>,
        events: Vec<KeyEvent>,
        material: BTreeMap<u8, MediaKey>,
        outcome: fn(n: usize, recipients: &[Recipient]) -> Outcome,
    }

    enum Outcome {
        Reached,
        Missed(Vec<Recipient>),
        Failed(Option<Duration>),
        Silence,
    }

    impl Keys {
        #[expect(clippy::disallowed_methods, reason = "an arbitrary origin of virtual time")]
        fn new(config: RolloutConfig) -> Self {
            let start = Now { instant: Instant::now(), unix: UnixMillis(1_800_000_000_000) };
            Self {
                rollout: Rollout::new(config, Box::new(StdRng::seed_from_u64(7))),
                start,
                now: start,
                sent: Vec::new(),
                used: Vec::new(),
                events: Vec::new(),
                material: BTreeMap::new(),
                outcome: |_, _| Outcome::Reached,
            }
        }

        fn members(&mut self, members: &[((&str, &str), u64)]) {
            let members = members.iter().map(|(who, created)| member(*who, *created)).collect();
            self.rollout.handle(self.now, KeyInput::Members(members));
            self.run(self.elapsed());
        }

        fn elapsed(&self) -> u64 {
            self.now.unix.since(self.start.unix).as_millis() as u64
        }

        fn run(&mut self, until: u64) {
            let end = self.start.plus(ms(until));
            loop {
                let at = self.elapsed();
                match self.rollout.poll(self.now) {
                    KeyOutput::Send { id, index, key, recipients } => {
                        assert!(self.sent.len() < 10_000, "the machine spins");
                        let known = self.material.entry(index.0).or_insert_with(|| key.clone());
                        assert_eq!(*known, key, "one key per index");
                        let names = recipients.iter().map(|(_, device)| device.to_string()).collect();
                        self.sent.push((at, index.0, names));
                        let input = match (self.outcome)(self.sent.len(), &recipients) {
                            Outcome::Reached => KeyInput::Sent { id, undelivered: vec![] },
                            Outcome::Missed(undelivered) => KeyInput::Sent { id, undelivered },
                            Outcome::Failed(retry_after) => KeyInput::SendFailed { id, retry_after },
                            Outcome::Silence => continue,
                        };
                        self.rollout.handle(self.now, input);
                    }
                    KeyOutput::Use { index, key } => {
                        let known = self.material.entry(index.0).or_insert_with(|| key.clone());
                        assert_eq!(*known, key, "what is used is what was sent");
                        self.used.push((at, index.0));
                    }
                    KeyOutput::Event(event) => self.events.push(event),
                    KeyOutput::WaitUntil(next) if next <= end.instant => {
                        assert!(next > self.now.instant);
                        self.now = self.now.plus(next - self.now.instant);
                    }
                    KeyOutput::WaitUntil(_) | KeyOutput::Idle => break,
                }
            }
            self.now = end;
        }

        fn sent_at(&self, from: u64) -> Vec<Sent> {
            self.sent.iter().filter(|(at, ..)| *at >= from).cloned().collect()
        }
    }

    fn to(devices: &[(&str, &str)]) -> Vec<String> {
        devices.iter().map(|(_, device)| (*device).to_owned()).collect()
    }

    #[test]
    fn g67_the_first_update_makes_the_first_key() {
        let mut keys = Keys::new(js());
        keys.run(1000);
        assert_eq!(keys.used, []);
        keys.members(&[]);
        assert_eq!((keys.used.clone(), keys.sent.len()), (vec![(1000, 0)], 0));
    }

    #[test]
    fn g68_everybody_gets_the_first_key_in_one_sending() {
        let mut keys = Keys::new(js());
        keys.members(&[(BOB, 1000), (BOB2, 1000), (CARL, 1000)]);
        assert_eq!(keys.sent, [(0, 0, to(&[BOB, BOB2, CARL]))]);
        assert_eq!(keys.used, [(0, 0)]);
        assert_eq!(keys.events, [KeyEvent::Delivered { index: KeyIndex(0) }]);
    }

    #[test]
    fn g69_who_rejoins_is_sent_the_same_key_again() {
        let mut keys = Keys::new(js());
        keys.members(&[(BOB, 1000), (CARL, 1000)]);
        keys.members(&[(BOB, 2000), (CARL, 1000)]);
        assert_eq!(keys.sent[1..], [(0, 0, to(&[BOB]))]);
    }

    #[test]
    fn g70_g71_the_grace_period_decides_between_sharing_and_rotating() {
        let config = || RolloutConfig { grace: ms(15_000), ..js() };
        let mut early = Keys::new(config());
        early.members(&[(BOB, 1), (BOB2, 1)]);
        early.run(7500);
        early.members(&[(BOB, 1), (BOB2, 1), (CARL, 2)]);
        early.run(60_000);
        assert_eq!(early.sent[1..], [(7500, 0, to(&[CARL]))]);
        assert_eq!(early.used, [(0, 0)]);

        let mut late = Keys::new(config());
        late.members(&[(BOB, 1), (BOB2, 1)]);
        late.run(16_001);
        late.members(&[(BOB, 1), (BOB2, 1), (CARL, 2)]);
        late.run(60_000);
        assert_eq!(late.sent[1..], [(16_001, 1, to(&[BOB, BOB2, CARL]))]);
        assert_eq!(late.used, [(0, 0), (17_001, 1)]);
    }

    #[test]
    fn g72_a_joiner_during_a_rollout_waits_for_the_next() {
        let config = RolloutConfig { grace: ms(3000), use_key_delay: ms(5000), ..js() };
        let mut keys = Keys::new(config);
        keys.members(&[(BOB, 1)]);
        keys.run(300_000);
        keys.members(&[(BOB, 1), (CARL, 2)]);
        keys.run(301_000);
        keys.members(&[(BOB, 1), (CARL, 2), (DAVID, 3)]);
        keys.run(400_000);
        let of = |who: (&str, &str)| -> Vec<u8> {
            keys.sent.iter().filter(|(_, _, to)| to.contains(&who.1.to_owned())).map(|(_, i, _)| *i).collect()
        };
        assert_eq!((of(CARL), of(DAVID)), (vec![1, 2], vec![2]));
        assert_eq!(keys.used, [(0, 0), (305_000, 1), (310_000, 2)]);
    }

    #[test]
    fn g73_a_burst_of_joiners_shares_one_key() {
        let mut keys = Keys::new(js());
        let mut members = Vec::new();
        keys.members(&members);
        for (n, device) in ["A", "B", "C", "D", "E"].into_iter().enumerate() {
            keys.run(n as u64 * 1000);
            members.push((("@x:example.org", device), 1));
            keys.members(&members);
        }
        keys.run(60_000);
        assert_eq!(keys.sent.len(), 5);
        assert!(keys.sent.iter().all(|(_, index, to)| *index == 0 && to.len() == 1));
    }

    #[test]
    fn g74_an_update_without_changes_sends_nothing() {
        let mut keys = Keys::new(js());
        keys.members(&[(BOB, 1)]);
        keys.run(20_000);
        keys.members(&[(BOB, 1)]);
        keys.run(40_000);
        assert_eq!(keys.sent.len(), 1);
    }

    #[test]
    fn g75_who_leaves_makes_us_rotate() {
        let mut keys = Keys::new(js());
        keys.members(&[(BOB, 1), (BOB2, 1), (CARL, 1)]);
        keys.run(3000);
        keys.members(&[(BOB, 1), (BOB2, 1)]);
        keys.run(3200);
        assert_eq!(keys.sent[1..], [(3000, 1, to(&[BOB, BOB2]))]);
        assert_eq!(keys.used, [(0, 0)]);
        keys.run(4200);
        assert_eq!(keys.used, [(0, 0), (4000, 1)]);
    }

    #[test]
    fn g76_what_happens_during_a_rollout_is_one_more_rollout() {
        let mut keys = Keys::new(js());
        keys.members(&[(BOB, 1), (BOB2, 1), (CARL, 1)]);
        keys.run(3000);
        keys.members(&[(BOB, 1), (BOB2, 1)]);
        keys.run(3200);
        keys.members(&[(BOB, 1)]);
        keys.run(3400);
        keys.members(&[(BOB3, 2)]);
        keys.run(60_000);
        assert_eq!(keys.sent[2..], [(4000, 2, to(&[BOB3]))]);
        assert_eq!(keys.used, [(0, 0), (4000, 1), (5000, 2)]);
    }

    #[test]
    fn g79_after_index_255_comes_0() {
        let mut keys = Keys::new(RolloutConfig { first_index: 255, ..js() });
        keys.members(&[(BOB, 1), (CARL, 1)]);
        keys.members(&[(BOB, 1)]);
        // The key changes with the index: the harness only accepts one key per index.
        keys.run(60_000);
        assert_eq!(keys.used, [(0, 255), (1000, 0)]);
    }

    #[test]
    fn g80_a_failed_sending_is_retried_and_holds_up_the_switch() {
        let mut keys = Keys::new(js());
        keys.members(&[(BOB, 1), (CARL, 1)]);
        keys.run(3000);
        keys.outcome = |n, _| if n == 2 { Outcome::Failed(None) } else { Outcome::Reached };
        keys.members(&[(BOB, 1)]);
        keys.run(60_000);
        assert_eq!(keys.sent[1..], [(3000, 1, to(&[BOB])), (4000, 1, to(&[BOB]))]);
        assert_eq!(keys.used, [(0, 0), (5000, 1)]);
        let failed = KeyEvent::DeliveryFailed { devices: vec![recipient(BOB)] };
        assert_eq!(keys.events[1..], [failed, KeyEvent::Delivered { index: KeyIndex(1) }]);
    }

    #[test]
    fn g80_the_deadline_ends_the_wait_and_the_retries_go_on() {
        let mut keys = Keys::new(js());
        keys.members(&[(BOB, 1), (BOB2, 1), (CARL, 1)]);
        keys.run(3000);
        keys.outcome =
            |_, to| Outcome::Missed(to.iter().filter(|r| **r == recipient(BOB2)).cloned().collect());
        keys.members(&[(BOB, 1), (BOB2, 1)]);
        keys.run(40_000);
        // Waits of 1, 2, 4, 8 and 16 s, to the one device that was missed.
        assert_eq!(
            keys.sent[1..].iter().map(|(at, _, to)| (*at, to.len())).collect::<Vec<_>>(),
            [(3000, 2), (4000, 1), (6000, 1), (10_000, 1), (18_000, 1), (34_000, 1)]
        );
        assert_eq!(keys.used, [(0, 0), (14_000, 1)]);
        assert_eq!(keys.events.iter().filter(|e| matches!(e, KeyEvent::DeliveryFailed { .. })).count(), 1);
    }

    #[test]
    fn the_homeservers_patience_is_respected() {
        let mut keys = Keys::new(js());
        keys.outcome = |n, _| if n == 1 { Outcome::Failed(Some(ms(7000))) } else { Outcome::Reached };
        keys.members(&[(BOB, 1)]);
        keys.run(2000);
        keys.members(&[(BOB, 1), (CARL, 1)]);
        keys.run(8000);
        assert_eq!(keys.sent[1..], [(7000, 0, to(&[BOB, CARL]))]);
    }

    #[test]
    fn a_sending_without_outcome_is_a_failed_one() {
        let mut keys = Keys::new(js());
        keys.outcome = |n, _| if n == 1 { Outcome::Silence } else { Outcome::Reached };
        keys.members(&[(BOB, 1)]);
        keys.run(60_000);
        assert_eq!(keys.sent[1..], [(31_000, 0, to(&[BOB]))]);
    }

    #[test]
    fn nobody_who_left_is_sent_a_key() {
        let mut keys = Keys::new(js());
        keys.outcome = |_, to| Outcome::Missed(to.to_vec());
        keys.members(&[(BOB, 1), (CARL, 1)]);
        keys.run(500);
        keys.members(&[(BOB, 1)]);
        keys.run(60_000);
        // Carl was not reached as far as we know, but a message may have got through: the key changes.
        assert!(keys.sent[1..].iter().all(|(_, index, to)| *index == 1 && *to == [BOB.1]));
    }

    #[test]
    fn a_stuck_sending_of_the_old_key_does_not_hold_up_the_new_one() {
        let mut keys = Keys::new(js());
        keys.outcome = |n, _| if n == 1 { Outcome::Silence } else { Outcome::Reached };
        keys.members(&[(BOB, 1), (CARL, 1)]);
        keys.run(500);
        keys.members(&[(BOB, 1)]);
        keys.run(5000);
        assert_eq!(keys.sent[1..], [(500, 1, to(&[BOB]))]);
        assert_eq!(keys.used, [(0, 0), (1500, 1)]);
    }

    #[test]
    fn g81_a_large_call_keeps_its_key() {
        let limit = || RolloutConfig { participant_limit: Some(3), ..js() };
        let mut keys = Keys::new(limit());
        keys.members(&[(BOB, 1)]);
        keys.run(20_000);
        keys.members(&[(BOB, 1), (CARL, 1)]);
        assert_eq!(keys.events.last(), Some(&KeyEvent::Delivered { index: KeyIndex(0) }));
        assert!(keys.events.contains(&KeyEvent::RotationSuppressed(true)));
        assert_eq!(keys.sent[1..], [(20_000, 0, to(&[CARL]))]);
        keys.run(30_000);
        keys.members(&[(CARL, 1)]);
        keys.run(60_000);
        assert!(keys.events.contains(&KeyEvent::RotationSuppressed(false)));
        assert_eq!(keys.sent_at(30_000), [(30_000, 1, to(&[CARL]))]);

        let mut large = Keys::new(limit());
        large.members(&[(BOB, 1), (BOB2, 1), (CARL, 1), (DAVID, 1)]);
        large.run(20_000);
        large.members(&[(BOB, 1), (BOB2, 1), (CARL, 1)]);
        large.run(7_300_000);
        assert_eq!(large.sent.len(), 1);
        // Whoever left while the call was large is locked out as soon as it is not.
        large.members(&[(BOB, 1)]);
        assert_eq!(large.sent_at(7_300_000), [(7_300_000, 1, to(&[BOB]))]);
    }

    #[test]
    fn a_key_does_not_get_older_than_an_hour() {
        let mut keys = Keys::new(js());
        keys.members(&[(BOB, 1)]);
        keys.run(2 * 3_600_000 + 5000);
        assert_eq!(keys.used, [(0, 0), (3_601_000, 1), (7_201_000, 2)]);
        keys.rollout.handle(keys.now, KeyInput::Rotate);
        keys.run(2 * 3_600_000 + 10_000);
        assert_eq!(keys.used.last(), Some(&(7_206_000, 3)), "and changes when it is told to");
    }

    #[test]
    fn keys_have_the_configured_length_and_differ() {
        for (config, length) in [(16, 16), (32, 32), (5, 32)] {
            let mut keys = Keys::new(RolloutConfig { key_bytes: config, ..js() });
            keys.members(&[(BOB, 1), (CARL, 1)]);
            keys.members(&[(BOB, 1)]);
            assert!(keys.material.values().all(|key| key.as_bytes().len() == length));
            assert_ne!(keys.material[&0], keys.material[&1]);
        }
    }

    #[test]
    fn debug_shows_no_key() {
        let mut keys = Keys::new(js());
        keys.members(&[(BOB, 1)]);
        let bytes = format!("{:?}", keys.material[&0].as_bytes());
        let printed = format!("{:?}", keys.rollout);
        assert!(printed.contains("redacted") && !printed.contains(bytes.trim_matches(['[', ']'])));
        let output = KeyOutput::Use { index: KeyIndex(0), key: keys.material[&0].clone() };
        assert_eq!(format!("{output:?}"), "Use { index: KeyIndex(0), key: MediaKey(redacted) }");
    }

    #[derive(Clone, Debug)]
    enum Turn {
        Members(Vec<(usize, u64)>),
        Answer(u8),
        Pass(u64),
        Rotate,
        Stray(u64),
    }

    fn any_turn() -> impl Strategy<Value = Turn> {
        prop_oneof![
            4 => prop::collection::vec((0_usize..5, 0_u64..3), 0..5).prop_map(Turn::Members),
            6 => any::<u8>().prop_map(Turn::Answer),
            6 => (0_u64..12_000).prop_map(Turn::Pass),
            1 => (0_u64..100_000_000).prop_map(Turn::Pass),
            1 => Just(Turn::Rotate),
            1 => (0_u64..10).prop_map(Turn::Stray),
        ]
    }

    proptest! {
        /// Whatever happens: no panic, no spinning, keys go to present members only, no index is taken into use
        /// twice in a row, and in the end every member has the key that is in use.
        #[test]
        fn no_history_breaks_the_rules(turns in prop::collection::vec(any_turn(), 0..80)) {
            let people = [BOB, BOB2, BOB3, CARL, DAVID];
            let mut keys = Keys::new(RolloutConfig::default());
            let mut now = keys.now;
            let mut present: BTreeSet<Recipient> = BTreeSet::new();
            let mut pending: Option<(SendId, u8, Vec<Recipient>)> = None;
            let mut has: BTreeMap<u8, BTreeSet<Recipient>> = BTreeMap::new();
            let mut in_use = None;
            let settle = [Turn::Pass(1), Turn::Answer(0), Turn::Pass(40_000), Turn::Answer(0), Turn::Pass(40_000),
                Turn::Answer(0), Turn::Pass(40_000), Turn::Answer(0), Turn::Pass(40_000), Turn::Answer(0)];
            for turn in turns.into_iter().chain(settle) {
                match turn {
                    Turn::Members(members) => {
                        let members: BTreeMap<_, _> = members.into_iter().collect();
                        present = members.keys().map(|who| recipient(people[*who])).collect();
                        let members = members.iter().map(|(who, created)| member(people[*who], *created)).collect();
                        keys.rollout.handle(now, KeyInput::Members(members));
                    }
                    Turn::Answer(how) => if let Some((id, index, to)) = pending.take() {
                        let input = match how % 4 {
                            0 | 1 => {
                                has.entry(index).or_default().extend(to);
                                KeyInput::Sent { id, undelivered: vec![] }
                            }
                            2 => {
                                has.entry(index).or_default().extend(to[1..].to_vec());
                                KeyInput::Sent { id, undelivered: to[..1].to_vec() }
                            }
                            _ => KeyInput::SendFailed { id, retry_after: Some(ms(u64::from(how) * 10)) },
                        };
                        keys.rollout.handle(now, input);
                    },
                    Turn::Pass(millis) => now = now.plus(ms(millis)),
                    Turn::Rotate => keys.rollout.handle(now, KeyInput::Rotate),
                    Turn::Stray(id) => if pending.as_ref().is_none_or(|(pending, ..)| pending.0 != id) {
                        keys.rollout.handle(now, KeyInput::Sent { id: SendId(id), undelivered: vec![] });
                    },
                }
                for spins in 0.. {
                    prop_assert!(spins < 20, "the machine spins");
                    match keys.rollout.poll(now) {
                        KeyOutput::Send { id, index, recipients, .. } => {
                            prop_assert!(!recipients.is_empty());
                            prop_assert!(recipients.iter().all(|to| present.contains(to)));
                            pending = Some((id, index.0, recipients));
                        }
                        KeyOutput::Use { index, .. } => {
                            prop_assert_ne!(in_use, Some(index.0));
                            in_use = Some(index.0);
                        }
                        KeyOutput::Event(_) => {}
                        KeyOutput::WaitUntil(at) => {
                            prop_assert!(at > now.instant);
                            break;
                        }
                        KeyOutput::Idle => break,
                    }
                }
            }
            if let Some(in_use) = in_use {
                prop_assert_eq!(keys.rollout.index(), Some(KeyIndex(in_use)), "nothing is left rolling");
                let has = has.remove(&in_use).unwrap_or_default();
                prop_assert!(present.is_subset(&has), "{:?} lack key {}", present.difference(&has), in_use);
            } else {
                prop_assert!(present.is_empty());
            }
        }
    }
}
