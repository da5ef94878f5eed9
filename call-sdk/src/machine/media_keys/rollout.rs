//! Our own media key: when it is made, to which devices it is sent, and when we start to encrypt with it.
//!
//! [`RolloutConfig`] has the rules by which the key is replaced, what they cost and what they protect.
//!
//! # When the new key is used
//!
//! [`RolloutConfig::use_key_delay`] after the new key reached every device that has the key in use and that can be
//! reached. Newcomers are not waited for, as they can decrypt nothing either way; nor are devices that refused or missed
//! a key before. A device that does not answer delays the use once, until [`RolloutConfig::delivery_deadline`]. Every
//! device has retries of its own, with growing waits.
//!
//! *Assumption.* The port brings device lists up to date before it encrypts, and reports a device as reached only if
//! the request that carried its message succeeded.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    fmt,
    mem::Discriminant,
    time::{Duration, Instant},
};

use rand::CryptoRng;
use ruma_common::UserId;

use super::{
    KeyEvent, SendId, doubled, later,
    presence::Changes,
    wire::{self, KeySender},
};
use crate::{
    key::{KeyIndex, MediaKey},
    matrix::{Delivery, DeliveryFailure, ToDeviceBatch},
    member::{Device, Member, MemberId, MemberKey},
    time::{Now, UnixMillis},
};

/// Longest pause that a homeserver's `retry_after` can impose.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(300);
/// No key gets older than this, whatever the configuration says.
const MAX_KEY_AGE: Duration = Duration::from_secs(12 * 3600);
/// Most messages of one batch.
const MAX_BATCH: usize = 100;
/// Most batches whose time is over but whose late outcomes still count.
const MAX_LATE_BATCHES: usize = 64;
/// Most leavers with our key that are known by name.
const MAX_LEAVERS: usize = 1024;
/// Most devices whose failures are remembered, so as not to report them twice.
const MAX_REPORTED: usize = 512;
/// A device that was sent our key this recently is not sent it again as an answer. Ends a loop of two devices that
/// answer each other.
const RECENTLY_SENT: Duration = Duration::from_secs(5);
/// Least time between two answers to one device. Doubles with each.
const ANSWER_BASE: Duration = Duration::from_secs(10);
/// Longest time between two answers to one device.
const ANSWER_MAX: Duration = Duration::from_secs(3600);
/// After we published our membership again, everybody sends us their keys again; that is not a question.
const RENEWAL_QUIET: Duration = Duration::from_secs(10);

/// Timing of our own key.
///
/// # When the key is replaced
///
/// Replacing the key costs one message per member (two for members that also read MSC4143), from every member: the
/// square of the size of the call. With *n* members, ourselves included:
///
/// | event | what happens | default |
/// |---|---|---|
/// | join | a key that is not in use yet, or in use for less than the limit, is given to the newcomer at once; else the key is replaced first | 10 s up to 10 members, then 1 s per member, at most 5 min |
/// | leave | the key is replaced as soon as its age reaches the limit | 0.1 s per member, at most 30 s |
/// | rejoin of a device that may have the key | the same key again, to that device alone | |
/// | age | the key is replaced | 1 h |
/// | use | the key is replaced, before an initialisation vector can repeat | 2³¹ frames |
///
/// *Cost.* Beyond the one message that each newcomer needs, joins cost a member at most one message per second and
/// leaves at most ten per second in calls of up to 300, however fast members come and go. 200 members that join a new
/// call within a minute, in any rhythm, cost at most 1.1 × the minimum of one message per ordered pair: within 60 s a
/// key is replaced only in calls of less than 60 members. Hourly replacement costs less than 0.1 messages per second in
/// a call of 300, so its default stays at an hour.
///
/// *Security.* A joiner that recorded ciphertext can decrypt what was said before it joined as far back as the limit for
/// joins: 10 s in small calls, 5 min in large ones. A leaver can decrypt until the replacement is in use, at worst
/// [`leave_wait_max`](Self::leave_wait_max) + [`delivery_deadline`](Self::delivery_deadline) +
/// [`use_key_delay`](Self::use_key_delay): 36 s by default, and about 2 s in a call of ten members that can be reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RolloutConfig {
    /// How long after its delivery a new key comes into use: 1 s, as in deployed clients, because delivery is confirmed
    /// by then (MSC4143 recommends 5 s). Longer spares slow receivers lost frames and lets a leaver listen longer.
    pub use_key_delay: Duration,
    /// How long a device that does not answer can delay the use of a new key: 5 s.
    pub delivery_deadline: Duration,
    /// Limit for joins: a key in use for less than this is shared with newcomers: 10 s (MSC4143: at most 10 s).
    pub grace: Duration,
    /// The same per member of the call, if that is longer: 1 s. Zero: `grace` in calls of any size.
    pub join_spacing: Duration,
    /// Upper bound on the limit that grows with the call: 5 min.
    pub grace_max: Duration,
    /// Limit for leaves, per member of the call: 100 ms. A younger key is replaced when it reaches that age.
    pub leave_spacing: Duration,
    /// Upper bound on the limit for leaves: 30 s.
    pub leave_wait_max: Duration,
    /// Length of our keys in bytes, 16 to 64: 32 (MSC4195). Other values count as 32.
    pub key_bytes: usize,
    /// With this many members or more, ourselves included, the key is kept when members come and go. `None` (default):
    /// no such limit.
    pub participant_limit: Option<usize>,
    /// Wait before a device is tried again: 1 s. It doubles each time.
    pub retry_base: Duration,
    /// Longest wait before a device is tried again: 30 s.
    pub retry_max: Duration,
    /// How long a batch may take before devices without an outcome count as timed out: 30 s.
    pub send_timeout: Duration,
    /// How often a device that is refused by policy is tried all the same: 5 min.
    pub recheck_every: Duration,
    /// Age at which the key is replaced: 1 h, at most 12 h.
    pub rotate_every: Duration,
    /// Number of frames after which the key is replaced: 2³¹. Encryption stops at 2³².
    pub rotate_after_frames: u64,
    /// Index of the first key of the first join. `None` (default): random, so that a late message from before a quick
    /// rejoin does not meet a new key.
    pub first_index: Option<KeyIndex>,
}

impl Default for RolloutConfig {
    fn default() -> Self {
        Self {
            use_key_delay: Duration::from_secs(1),
            delivery_deadline: Duration::from_secs(5),
            grace: Duration::from_secs(10),
            join_spacing: Duration::from_secs(1),
            grace_max: Duration::from_secs(300),
            leave_spacing: Duration::from_millis(100),
            leave_wait_max: Duration::from_secs(30),
            key_bytes: 32,
            participant_limit: None,
            retry_base: Duration::from_secs(1),
            retry_max: Duration::from_secs(30),
            send_timeout: Duration::from_secs(30),
            recheck_every: Duration::from_secs(300),
            rotate_every: Duration::from_secs(3600),
            rotate_after_frames: 1 << 31,
            first_index: None,
        }
    }
}

impl RolloutConfig {
    fn grace_of(&self, members: u32) -> Duration {
        self.grace.max(self.join_spacing.saturating_mul(members)).min(self.grace_max.max(self.grace))
    }

    fn leave_wait_of(&self, members: u32) -> Duration {
        self.leave_spacing.saturating_mul(members).min(self.leave_wait_max)
    }

    fn key_age(&self) -> Duration {
        self.rotate_every.clamp(Duration::from_secs(1), MAX_KEY_AGE)
    }
}

/// Why a device is sent a key that it was sent before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Resend {
    /// To heal a pair that cannot decrypt; [`super::healing`] limits how often.
    Healing,
    /// Because the device sent us a key again, which asks for ours. Limited here.
    Answer,
}

/// What to do next.
#[derive(Debug)]
pub(super) enum Step {
    Send { id: SendId, batch: ToDeviceBatch },
    Use { index: KeyIndex, key: MediaKey },
    Event(KeyEvent),
    Wait(Option<Instant>),
}

/// The state machine of our own key.
pub(super) struct Rollout {
    config: RolloutConfig,
    rng: Box<dyn CryptoRng + Send>,
    /// While we are in the call.
    sender: Option<KeySender>,
    /// When our own membership changed last.
    renewed_at: Option<Instant>,
    /// The members are known.
    primed: bool,
    /// Members, their state or ours changed since the rules were last applied.
    dirty: bool,
    recipients: BTreeMap<Device, Recipient>,
    key: Option<OurKey>,
    /// Index of our last key, also after we left.
    last_index: Option<KeyIndex>,
    rotate_wanted: bool,
    suppressed: bool,
    flights: BTreeMap<SendId, Flight>,
    /// The homeserver asked us to wait.
    gate: Option<Instant>,
    /// No message is due before this.
    scan_at: Option<Instant>,
    last_id: u64,
    last_epoch: u64,
    generation: u64,
    reported: BTreeMap<Device, Vec<Discriminant<DeliveryFailure>>>,
    steps: VecDeque<Step>,
}

impl Rollout {
    pub(super) fn new(config: RolloutConfig, rng: Box<dyn CryptoRng + Send>) -> Self {
        Self {
            config,
            rng,
            sender: None,
            renewed_at: None,
            primed: false,
            dirty: false,
            recipients: BTreeMap::new(),
            key: None,
            last_index: None,
            rotate_wanted: false,
            suppressed: false,
            flights: BTreeMap::new(),
            gate: None,
            scan_at: None,
            last_id: 0,
            last_epoch: 0,
            generation: 0,
            reported: BTreeMap::new(),
            steps: VecDeque::new(),
        }
    }

    /// A fresh key is made when the members are known.
    pub(super) fn join(&mut self, sender: KeySender) {
        self.wipe();
        self.sender = Some(sender);
        self.dirty = true;
    }

    /// Wipes the key and forgets the members.
    pub(super) fn leave(&mut self) {
        self.wipe();
        self.sender = None;
        self.primed = false;
        self.recipients.clear();
        self.reported.clear();
    }

    fn wipe(&mut self) {
        self.key = None;
        self.rotate_wanted = false;
        self.flights.clear();
        self.steps.clear();
        self.recipients.values_mut().for_each(|recipient| recipient.offered = false);
    }

    pub(super) fn members(&mut self, now: Instant, changes: &Changes<'_>) {
        self.primed = true;
        if changes.own.is_some() {
            self.renewed_at = Some(now);
        }
        // Joins first: a device that joins again under another id did not leave.
        for member in changes.joined.iter().chain(&changes.changed) {
            self.joined(now, member);
        }
        for member in &changes.left {
            self.left(member);
        }
        if !changes.joined.is_empty() || !changes.changed.is_empty() || !changes.left.is_empty() {
            self.dirty = true;
            self.scan_at = Some(now);
        }
        // Leavers add up only while rotation is suppressed.
        if let Some(key) =
            self.key.as_mut().filter(|key| key.holders.len() > self.recipients.len() + MAX_LEAVERS)
        {
            key.holders.retain(|device| self.recipients.contains_key(device));
            key.left_before = true;
        }
    }

    fn joined(&mut self, now: Instant, member: &Member) {
        let Some(device) = member.device() else { return };
        self.last_epoch += 1;
        let Some(recipient) = self.recipients.get_mut(&device) else {
            self.recipients.insert(device, Recipient::new(member, self.last_epoch, now));
            return;
        };
        if member.reads_msc_keys && recipient.msc.is_none() {
            recipient.msc = Some(Parcel::due(recipient.next_try(now)));
        }
        // Another id or creation time is a rejoin: the device lost what it had.
        if recipient.memberships.insert(member.member_id.clone(), member.created) != Some(member.created) {
            recipient.epoch = self.last_epoch;
            recipient.send_again(now);
            if let Some(key) = &mut self.key {
                key.stop_waiting_for(&device);
            }
        }
    }

    fn left(&mut self, member: &MemberKey) {
        let Some(device_id) = member.device_id.clone() else { return };
        let device = Device::new(member.user_id.clone(), device_id);
        let Some(recipient) = self.recipients.get_mut(&device) else { return };
        recipient.memberships.remove(&member.member_id);
        if !recipient.memberships.is_empty() {
            return;
        }
        // A message that is still on its way may arrive.
        let may_arrive = recipient.offered && recipient.is_in_flight();
        self.recipients.remove(&device);
        if let Some(key) = &mut self.key {
            key.stop_waiting_for(&device);
            if may_arrive {
                key.holders.insert(device);
            }
        }
    }

    pub(super) fn delivered(&mut self, now: Instant, id: SendId, device: &Device, result: Delivery) {
        let Some(flight) = self.flights.get_mut(&id) else { return };
        let Some(epoch) = flight.devices.remove(device) else { return };
        let (form, generation, sent_at) = (flight.form, flight.generation, flight.sent_at);
        if flight.devices.is_empty() {
            self.flights.remove(&id);
        }
        match result {
            Ok(()) => self.reached(now, device, epoch, form, generation, sent_at),
            Err(failure) => self.missed(now, id, device, form, generation, failure),
        }
    }

    pub(super) fn finished(&mut self, now: Instant, id: SendId) {
        if let Some(flight) = self.flights.remove(&id) {
            for device in flight.devices.into_keys() {
                self.missed(now, id, &device, flight.form, flight.generation, DeliveryFailure::TimedOut);
            }
        }
    }

    pub(super) fn trust_changed(&mut self, now: Instant, user: &UserId) {
        self.scan_at = Some(now);
        for (device, recipient) in &mut self.recipients {
            if device.user_id == user && recipient.refused_until.take().is_some() {
                recipient.send_again(now);
            }
        }
    }

    pub(super) fn resend(&mut self, now: Instant, device: &Device, cause: Resend) {
        let within =
            |at: Option<Instant>, limit| at.is_some_and(|at| now.saturating_duration_since(at) < limit);
        let Some(recipient) = self.recipients.get_mut(device) else { return };
        if !recipient.offered || recipient.refused_until.is_some() {
            return;
        }
        if cause == Resend::Answer {
            let answered =
                within(recipient.last_sent, RECENTLY_SENT) || within(self.renewed_at, RENEWAL_QUIET);
            if answered || !recipient.answers.allow(now) {
                return;
            }
        }
        for parcel in recipient.parcels_mut() {
            if !matches!(parcel.state, ParcelState::InFlight(_)) {
                parcel.state = ParcelState::Due(now);
            }
        }
        self.scan_at = Some(now);
    }

    pub(super) fn rotate(&mut self) {
        self.rotate_wanted = self.key.is_some();
    }

    pub(super) fn sealed(&mut self, index: KeyIndex, frames: u64) {
        if let Some(key) = self.key.as_mut().filter(|key| key.index == index && key.rolling.is_none()) {
            key.frames = frames;
        }
    }

    /// Whether policy withholds our key from this device.
    pub(super) fn refuses(&self, device: &Device) -> bool {
        self.recipients.get(device).is_some_and(|recipient| recipient.refused_until.is_some())
    }

    #[cfg(test)]
    pub(super) fn index(&self) -> Option<KeyIndex> {
        self.key.as_ref().map(|key| key.index)
    }

    /// What to do now; to be called until it says to wait.
    pub(super) fn poll(&mut self, now: Now) -> Step {
        self.time_out(now.instant);
        self.switch_if_due(now.instant);
        self.apply_rules(now.instant);
        if let Some(step) = self.steps.pop_front() {
            return step;
        }
        if self.gate.is_some_and(|gate| now.instant >= gate) {
            self.gate = None;
        }
        if self.gate.is_none() && self.scan_at.is_some_and(|at| now.instant >= at) {
            if let Some(step) = self.next_batch(now) {
                return step;
            }
            self.scan_at = self.next_due();
        }
        Step::Wait(self.next_change())
    }

    /// Devices without an outcome count as timed out; late outcomes still count if they come.
    fn time_out(&mut self, now: Instant) {
        let lost: Vec<_> =
            self.flights.iter().filter(|(_, flight)| flight.is_lost(now)).map(|(id, _)| *id).collect();
        for id in lost {
            let Some(flight) = self.flights.get_mut(&id) else { continue };
            flight.lost_at = None;
            let (form, generation) = (flight.form, flight.generation);
            let devices: Vec<_> = flight.devices.keys().cloned().collect();
            for device in devices {
                self.missed(now, id, &device, form, generation, DeliveryFailure::TimedOut);
            }
        }
        while self.flights.values().filter(|flight| flight.lost_at.is_none()).count() > MAX_LATE_BATCHES {
            let oldest = self.flights.iter().find(|(_, flight)| flight.lost_at.is_none()).map(|(id, _)| *id);
            oldest.and_then(|id| self.flights.remove(&id));
        }
    }

    fn switch_if_due(&mut self, now: Instant) {
        let Some(key) = &mut self.key else { return };
        let Some(rolling) = &mut key.rolling else { return };
        if rolling.delivered_at.is_none() && now >= rolling.deadline {
            for device in std::mem::take(&mut rolling.awaited) {
                if let Some(recipient) = self.recipients.get_mut(&device) {
                    // A device that the homeserver did not take the message for is not to blame.
                    recipient.lagging |= recipient.is_in_flight();
                }
            }
            rolling.delivered_at = Some(rolling.deadline);
        }
        if rolling.delivered_at.is_none() && rolling.awaited.is_empty() {
            rolling.delivered_at = Some(now);
        }
        if rolling.switches_at(self.config.use_key_delay).is_some_and(|at| now >= at) {
            key.rolling = None;
            key.used_since = now;
            self.steps.push_back(Step::Use { index: key.index, key: key.key.clone() });
            self.dirty = true;
        }
    }

    fn apply_rules(&mut self, now: Instant) {
        if self.sender.is_none() || !self.primed {
            return;
        }
        let members = self.member_count();
        let Some(key) = &mut self.key else {
            self.dirty = false;
            self.suppress();
            self.start_key(now);
            return;
        };
        if key.rolling.is_some() {
            // The switch sets the flag again, for members that left meanwhile.
            if std::mem::take(&mut self.dirty) {
                self.offer_to_all(now);
            }
            return;
        }
        let mut newcomers = false;
        if self.dirty {
            let is_gone = |device: &Device| !self.recipients.contains_key(device);
            key.left = key.left_before || key.holders.iter().any(is_gone);
            newcomers = self.recipients.values().any(|recipient| !recipient.offered);
        }
        let age = now.saturating_duration_since(key.used_since);
        let after_join = newcomers && age >= self.config.grace_of(members);
        let after_leave = key.left && now >= later(key.made, self.config.leave_wait_of(members));
        let too_old = now >= later(key.made, self.config.key_age());
        let too_used = key.frames >= self.config.rotate_after_frames;
        let was_dirty = std::mem::take(&mut self.dirty);
        if was_dirty {
            self.suppress();
        }
        if self.rotate_wanted || too_used || !self.suppressed && (after_join || after_leave || too_old) {
            self.rotate_wanted = false;
            self.start_key(now);
        } else if was_dirty {
            self.offer_to_all(now);
        }
    }

    fn offer_to_all(&mut self, now: Instant) {
        self.recipients.values_mut().for_each(|recipient| recipient.offered = true);
        self.scan_at = Some(now);
    }

    fn suppress(&mut self) {
        let members = self.recipients.len() + 1;
        let suppressed = self.config.participant_limit.is_some_and(|limit| members >= limit);
        if suppressed != self.suppressed {
            self.suppressed = suppressed;
            self.steps.push_back(Step::Event(KeyEvent::RotationSuppressed(suppressed)));
        }
    }

    /// Makes a key and offers it to every member.
    fn start_key(&mut self, now: Instant) {
        let old = self.key.take();
        let index = match &old {
            Some(old) => old.index.next(),
            None => self.first_index(),
        };
        let key = self.new_key();
        let mut awaited = BTreeSet::new();
        let mut anyone_has_old = false;
        for (device, recipient) in &mut self.recipients {
            let has_old =
                old.as_ref().is_some_and(|old| old.holders.contains(device) || recipient.is_in_flight());
            anyone_has_old |= has_old;
            if has_old && !recipient.lagging && recipient.refused_until.is_none() {
                awaited.insert(device.clone());
            }
            recipient.offered = true;
            recipient.send_again(now);
        }
        self.scan_at = Some(now);
        self.generation += 1;
        self.last_index = Some(index);
        let mut key = OurKey {
            index,
            key,
            made: now,
            used_since: now,
            frames: 0,
            holders: BTreeSet::new(),
            left: false,
            left_before: false,
            reported: false,
            rolling: None,
        };
        if anyone_has_old {
            let deadline = later(now, self.config.delivery_deadline);
            let delivered_at = awaited.is_empty().then_some(now);
            key.rolling = Some(Rolling { deadline, awaited, delivered_at });
        } else {
            // Nobody can decrypt the key in use, so nobody loses by the change.
            self.steps.push_back(Step::Use { index, key: key.key.clone() });
        }
        self.key = Some(key);
    }

    fn first_index(&mut self) -> KeyIndex {
        match (self.last_index, self.config.first_index) {
            (None, Some(index)) => index,
            (None, None) => KeyIndex((self.rng.next_u32() % 256) as u8),
            (Some(last), _) => KeyIndex(last.0.wrapping_add(1 + (self.rng.next_u32() % 255) as u8)),
        }
    }

    fn new_key(&mut self) -> MediaKey {
        let length = if (16..=64).contains(&self.config.key_bytes) { self.config.key_bytes } else { 32 };
        loop {
            let mut bytes = vec![0; length];
            self.rng.fill_bytes(&mut bytes);
            // The length is valid, so the first pass returns.
            if let Ok(key) = MediaKey::new(bytes) {
                return key;
            }
        }
    }

    fn next_batch(&mut self, now: Now) -> Option<Step> {
        let (Some(sender), Some(key)) = (&self.sender, &self.key) else { return None };
        let id = SendId(self.last_id + 1);
        for form in [Form::Legacy, Form::Msc] {
            let mut devices = BTreeMap::new();
            for (device, recipient) in &mut self.recipients {
                if !recipient.offered || devices.len() == MAX_BATCH {
                    continue;
                }
                let epoch = recipient.epoch;
                let Some(parcel) = recipient.parcel_mut(form).filter(|parcel| parcel.is_due(now.instant))
                else {
                    continue;
                };
                parcel.state = ParcelState::InFlight(id);
                parcel.tries = parcel.tries.saturating_add(1);
                recipient.last_sent = Some(now.instant);
                devices.insert(device.clone(), epoch);
            }
            if devices.is_empty() {
                continue;
            }
            let messages = wire::messages(sender, key.index, &key.key, now.unix);
            let (event_type, content) = match form {
                Form::Legacy => messages.legacy,
                Form::Msc => messages.msc,
            };
            let recipients = devices.keys().cloned().collect();
            self.last_id = id.0;
            self.flights.insert(
                id,
                Flight {
                    generation: self.generation,
                    form,
                    sent_at: now.instant,
                    lost_at: Some(later(now.instant, self.config.send_timeout)),
                    devices,
                },
            );
            return Some(Step::Send {
                id,
                batch: ToDeviceBatch { event_type: event_type.to_owned(), content, recipients },
            });
        }
        None
    }

    fn reached(
        &mut self,
        now: Instant,
        device: &Device,
        epoch: u64,
        form: Form,
        generation: u64,
        sent_at: Instant,
    ) {
        let is_current = generation == self.generation;
        if is_current && let Some(key) = &mut self.key {
            key.holders.insert(device.clone());
        }
        let Some(recipient) = self.recipients.get_mut(device) else {
            self.dirty |= is_current;
            return;
        };
        self.reported.remove(device);
        recipient.refused_until = None;
        recipient.lagging = now.saturating_duration_since(sent_at) > self.config.delivery_deadline;
        if !is_current || recipient.epoch != epoch {
            return;
        }
        if let Some(parcel) = recipient.parcel_mut(form) {
            parcel.state = ParcelState::Delivered;
            parcel.tries = 0;
        }
        if recipient.is_served()
            && let Some(key) = &mut self.key
        {
            key.stop_waiting_for(device);
        }
        self.report_delivered();
    }

    fn missed(
        &mut self,
        now: Instant,
        id: SendId,
        device: &Device,
        form: Form,
        generation: u64,
        failure: DeliveryFailure,
    ) {
        let is_current = generation == self.generation;
        // No answer does not mean that the message did not arrive.
        let may_have_arrived = matches!(failure, DeliveryFailure::TimedOut | DeliveryFailure::Network(_));
        if is_current
            && may_have_arrived
            && let Some(key) = &mut self.key
        {
            key.holders.insert(device.clone());
            self.dirty |= !self.recipients.contains_key(device);
        }
        if let DeliveryFailure::RateLimited { retry_after: Some(wait) } = &failure {
            let until = later(now, (*wait).min(MAX_RETRY_AFTER));
            self.gate = Some(self.gate.map_or(until, |gate| gate.max(until)));
        }
        let Some(recipient) = self.recipients.get_mut(device) else { return };
        self.scan_at = Some(now);
        let is_policy = failure.is_policy();
        if is_policy {
            let until = later(now, self.config.recheck_every);
            recipient.refused_until = Some(until);
            recipient.parcels_mut().for_each(|parcel| parcel.state = ParcelState::Due(until));
        } else {
            let wait =
                |tries: u32| doubled(self.config.retry_base, tries.saturating_sub(1), self.config.retry_max);
            if let Some(parcel) = recipient.parcel_mut(form)
                && parcel.state == ParcelState::InFlight(id)
            {
                parcel.state = ParcelState::Due(later(now, wait(parcel.tries)));
            }
        }
        // A homeserver that takes no message says nothing about the device.
        if !matches!(failure, DeliveryFailure::RateLimited { .. } | DeliveryFailure::Network(_)) {
            recipient.lagging = true;
            if let Some(key) = &mut self.key {
                key.stop_waiting_for(device);
            }
        }
        self.report(device, failure, is_policy);
        self.report_delivered();
    }

    /// Reports once per key that everybody has it.
    fn report_delivered(&mut self) {
        let has_it = |recipient: &Recipient| recipient.refused_until.is_some() || recipient.is_served();
        if let Some(key) = self.key.as_mut().filter(|key| !key.reported)
            && self.recipients.values().all(has_it)
        {
            key.reported = true;
            self.steps.push_back(Step::Event(KeyEvent::Delivered { index: key.index }));
        }
    }

    /// Reports a failure once per device and cause.
    fn report(&mut self, device: &Device, failure: DeliveryFailure, is_policy: bool) {
        if self.reported.len() >= MAX_REPORTED {
            self.reported.retain(|device, _| self.recipients.contains_key(device));
        }
        let causes = self.reported.entry(device.clone()).or_default();
        let cause = std::mem::discriminant(&failure);
        if causes.contains(&cause) {
            return;
        }
        causes.push(cause);
        let device = device.clone();
        self.steps.push_back(Step::Event(if is_policy {
            KeyEvent::Refused { device, failure }
        } else {
            KeyEvent::DeliveryFailed { device, failure }
        }));
    }

    /// When the next message is due.
    fn next_due(&self) -> Option<Instant> {
        let offered = self.recipients.values().filter(|recipient| recipient.offered);
        let due = offered.flat_map(Recipient::parcels).filter_map(|parcel| match parcel.state {
            ParcelState::Due(at) => Some(at),
            ParcelState::InFlight(_) | ParcelState::Delivered => None,
        });
        due.min()
    }

    fn next_change(&self) -> Option<Instant> {
        let due = self.scan_at.map(|at| self.gate.map_or(at, |gate| gate.max(at)));
        let lost = self.flights.values().filter_map(|flight| flight.lost_at);
        let mut next = lost.chain(due).min();
        let mut sooner = |at: Instant| next = Some(next.map_or(at, |next| next.min(at)));
        if let Some(key) = &self.key {
            match &key.rolling {
                Some(rolling) => {
                    sooner(rolling.switches_at(self.config.use_key_delay).unwrap_or(rolling.deadline));
                }
                None if self.suppressed => {}
                None => {
                    sooner(later(key.made, self.config.key_age()));
                    if key.left {
                        sooner(later(key.made, self.config.leave_wait_of(self.member_count())));
                    }
                }
            }
        }
        next
    }

    /// Members of the call, ourselves included.
    fn member_count(&self) -> u32 {
        u32::try_from(self.recipients.len()).unwrap_or(u32::MAX).saturating_add(1)
    }
}

impl fmt::Debug for Rollout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rollout")
            .field("config", &self.config)
            .field("sender", &self.sender)
            .field("recipients", &self.recipients)
            .field("key", &self.key)
            .field("flights", &self.flights)
            .finish_non_exhaustive()
    }
}

/// Our newest key. While it is rolling we still encrypt with the one before.
#[derive(Debug)]
struct OurKey {
    index: KeyIndex,
    key: MediaKey,
    made: Instant,
    /// When it came into use, if it is not rolling.
    used_since: Instant,
    /// Frames sealed with it.
    frames: u64,
    /// Devices that have it or may have it, members or not any more.
    holders: BTreeSet<Device>,
    /// One of the holders is not a member any more.
    left: bool,
    /// The same of devices that are not among the holders any more, as they were too many.
    left_before: bool,
    /// Its delivery was reported.
    reported: bool,
    rolling: Option<Rolling>,
}

impl OurKey {
    fn stop_waiting_for(&mut self, device: &Device) {
        if let Some(rolling) = &mut self.rolling {
            rolling.awaited.remove(device);
        }
    }
}

#[derive(Debug)]
struct Rolling {
    deadline: Instant,
    /// Devices that have the key in use and do not have the new one yet.
    awaited: BTreeSet<Device>,
    delivered_at: Option<Instant>,
}

impl Rolling {
    fn switches_at(&self, delay: Duration) -> Option<Instant> {
        self.delivered_at.map(|delivered| later(delivered, delay))
    }
}

/// A member's device.
#[derive(Debug)]
struct Recipient {
    /// Ids and creation times.
    memberships: BTreeMap<MemberId, UnixMillis>,
    /// Changes when the device joins again: a message from before does not count.
    epoch: u64,
    /// It is to have the newest key.
    offered: bool,
    legacy: Parcel,
    msc: Option<Parcel>,
    /// The last message failed because of the device, or took longer than the deadline. Not waited for.
    lagging: bool,
    /// Policy withholds our keys from it; when to try all the same.
    refused_until: Option<Instant>,
    last_sent: Option<Instant>,
    answers: Answers,
}

impl Recipient {
    fn new(member: &Member, epoch: u64, now: Instant) -> Self {
        Self {
            memberships: BTreeMap::from([(member.member_id.clone(), member.created)]),
            epoch,
            offered: false,
            legacy: Parcel::due(now),
            msc: member.reads_msc_keys.then(|| Parcel::due(now)),
            lagging: false,
            refused_until: None,
            last_sent: None,
            answers: Answers { last: None, gap: ANSWER_BASE },
        }
    }

    fn parcels(&self) -> impl Iterator<Item = &Parcel> {
        std::iter::once(&self.legacy).chain(&self.msc)
    }

    fn parcels_mut(&mut self) -> impl Iterator<Item = &mut Parcel> {
        std::iter::once(&mut self.legacy).chain(&mut self.msc)
    }

    fn parcel_mut(&mut self, form: Form) -> Option<&mut Parcel> {
        match form {
            Form::Legacy => Some(&mut self.legacy),
            Form::Msc => self.msc.as_mut(),
        }
    }

    fn next_try(&self, now: Instant) -> Instant {
        self.refused_until.unwrap_or(now)
    }

    fn send_again(&mut self, now: Instant) {
        let at = self.next_try(now);
        self.parcels_mut().for_each(|parcel| *parcel = Parcel::due(at));
    }

    fn is_in_flight(&self) -> bool {
        self.parcels().any(|parcel| matches!(parcel.state, ParcelState::InFlight(_)))
    }

    fn is_served(&self) -> bool {
        self.parcels().all(|parcel| parcel.state == ParcelState::Delivered)
    }
}

/// One message to one device: the newest key in one form.
#[derive(Debug)]
struct Parcel {
    state: ParcelState,
    tries: u32,
}

impl Parcel {
    fn due(at: Instant) -> Self {
        Self { state: ParcelState::Due(at), tries: 0 }
    }

    fn is_due(&self, now: Instant) -> bool {
        matches!(self.state, ParcelState::Due(at) if at <= now)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ParcelState {
    Due(Instant),
    InFlight(SendId),
    Delivered,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Legacy,
    Msc,
}

/// A batch on its way.
#[derive(Debug)]
struct Flight {
    /// Which key it carries.
    generation: u64,
    form: Form,
    sent_at: Instant,
    /// When its devices count as timed out; `None` if they did.
    lost_at: Option<Instant>,
    /// Devices without an outcome, with their epochs.
    devices: BTreeMap<Device, u64>,
}

impl Flight {
    fn is_lost(&self, now: Instant) -> bool {
        self.lost_at.is_some_and(|at| now >= at)
    }
}

/// Limits how often one device gets an answer.
#[derive(Debug)]
struct Answers {
    last: Option<Instant>,
    gap: Duration,
}

impl Answers {
    fn allow(&mut self, now: Instant) -> bool {
        if let Some(last) = self.last {
            let quiet = now.saturating_duration_since(last);
            if quiet < self.gap {
                return false;
            }
            let over = quiet >= self.gap.saturating_mul(4);
            self.gap = if over { ANSWER_BASE } else { doubled(self.gap, 1, ANSWER_MAX) };
        }
        self.last = Some(now);
        true
    }
}

#[cfg(test)]
mod tests;
