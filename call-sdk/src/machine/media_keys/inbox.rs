//! The media keys of others: which of them are believed, and whose they are.
//!
//! A key is accepted only if all of this holds (MSC4143 §Encryption keys):
//!
//! 1. It came Olm-encrypted, from a device in its owner's device list. That device, never the one that the message
//!    claims, is its origin.
//! 2. The policy trusts the device ([`TrustPolicy`]).
//! 3. It is for our room and not for our own device or membership.
//! 4. It names a membership of its sender, and the membership's device, if known, is the origin. State members match by
//!    device alone, as deployed clients name other ids; sticky members never do.
//! 5. It is not older than the newest key with this index, and the sender has not replaced it before.
//!
//! A key that arrives before its sender's membership waits for it, within bounds. One whose sender is not joined to the
//! room waits only as long as a sync may take to bring that, and few of them do, as anybody can send such keys. The keys of a member that leaves are dropped. When it returns, a message from before does not count again.
//!
//! *Assumptions.* The port takes the device from the Olm session and delivers an event again when a device list that it
//! lacked is current.

use std::{
    cmp::Ordering,
    collections::{BTreeMap, BTreeSet, VecDeque},
    mem::Discriminant,
    time::{Duration, Instant},
};

use ruma_common::{OwnedDeviceId, OwnedRoomId, OwnedUserId, UserId};
use sha2::{Digest as _, Sha256};

use super::{
    later,
    presence::Changes,
    wire::{self, KeyMessage, KeyRejected},
};
use crate::{
    key::{KeyIndex, MediaKey},
    matrix::{OlmSender, ToDeviceEvent, TrustPolicy},
    member::{Device, MemberId, MemberKey, MembershipForm},
    time::{Now, UnixMillis},
};

/// Newest keys of a member that are kept, to be given out again.
const MAX_KEPT: usize = 4;
/// Replaced keys of a member that are recognised.
const MAX_REPLACED: usize = 32;
/// Members that left and whose old messages are recognised.
pub(crate) const MAX_GONE: usize = 512;
/// Devices whose keys were refused by policy that are remembered.
const MAX_DISTRUSTED: usize = 512;
/// How long a key waits for its sender to be joined to the room: keys and the room come by different ways.
const STRANGER_FOR: Duration = Duration::from_secs(30);
/// Most keys of users who are not joined that wait, of all and of one.
const MAX_STRANGERS: usize = 64;
const MAX_OF_STRANGER: usize = 4;
/// A rejection is reported again after this.
const REPORT_AGAIN: Duration = Duration::from_secs(60);
/// Most different rejections reported within that time.
const MAX_REPORTED: usize = 64;

/// Bounds on keys that wait for their sender's membership.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InboxLimits {
    /// How long a key waits: 10 min.
    pub park_for: Duration,
    /// Most keys of one device that wait: 16.
    pub max_parked_per_device: usize,
    /// Most keys of one user that wait: 64.
    pub max_parked_per_user: usize,
    /// Most keys that wait: 4096.
    pub max_parked: usize,
}

impl Default for InboxLimits {
    fn default() -> Self {
        Self {
            park_for: Duration::from_secs(600),
            max_parked_per_device: 16,
            max_parked_per_user: 64,
            max_parked: 4096,
        }
    }
}

/// What became of a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum InboxOutput {
    /// Install this key.
    Install {
        /// Whose it is.
        member: MemberKey,
        /// Where in the member's ring.
        index: KeyIndex,
        /// The key.
        key: MediaKey,
    },
    /// Drop this member's keys.
    Forget {
        /// The member.
        member: MemberKey,
    },
    /// A member sent a key that we have again. It asks for our own key that way.
    Repeated {
        /// Whose it is.
        member: MemberKey,
        /// The device that sent it.
        device: Device,
    },
    /// A key was not accepted.
    Rejected {
        /// Who sent it.
        sender: OwnedUserId,
        /// The device, if Olm knows it.
        device_id: Option<OwnedDeviceId>,
        /// Why not.
        reason: KeyRejected,
    },
}

/// The state machine of others' media keys. See the [module](self).
#[derive(Debug)]
pub(super) struct Inbox {
    limits: InboxLimits,
    trust: TrustPolicy,
    room_id: OwnedRoomId,
    own: Device,
    own_ids: BTreeSet<MemberId>,
    joined: BTreeSet<OwnedUserId>,
    members: BTreeMap<MemberKey, MemberKeys>,
    /// What is known of members that left, in order of leaving.
    gone: VecDeque<(MemberKey, Memory)>,
    /// In order of arrival.
    parked: VecDeque<Parked>,
    /// The keys of users who are not joined to the room, in order of arrival.
    strangers: VecDeque<Parked>,
    distrusted: BTreeSet<Device>,
    reported: Vec<(OwnedUserId, Discriminant<KeyRejected>, Instant)>,
}

impl Inbox {
    /// An empty inbox of our device `own`; nobody is a member yet.
    #[must_use]
    pub(super) fn new(limits: InboxLimits, trust: TrustPolicy, room_id: OwnedRoomId, own: Device) -> Self {
        Self {
            limits,
            trust,
            room_id,
            own,
            own_ids: BTreeSet::new(),
            joined: BTreeSet::new(),
            members: BTreeMap::new(),
            gone: VecDeque::new(),
            parked: VecDeque::new(),
            strangers: VecDeque::new(),
            distrusted: BTreeSet::new(),
            reported: Vec::new(),
        }
    }

    /// Judges a to-device event; other types than keys are ignored. A key that is parked has no output.
    pub(super) fn receive(&mut self, now: Now, event: &ToDeviceEvent) -> Vec<InboxOutput> {
        if !wire::is_key_event(&event.event_type) {
            return Vec::new();
        }
        let judged = self.judge(now, event).and_then(|key| match self.owner(&key)? {
            Some(member) => Ok(self.accept(&member, key)?),
            None => self.park(key).map(|()| None),
        });
        match judged {
            Ok(output) => output.into_iter().collect(),
            Err(reason) => {
                let device_id = event.olm.as_ref().and_then(|olm| olm.device_id.clone());
                self.reject(now.instant, event.sender.clone(), device_id, reason).into_iter().collect()
            }
        }
    }

    /// Takes the changes among the members, and the users joined to the room.
    pub(super) fn members(
        &mut self,
        now: Now,
        changes: &Changes<'_>,
        joined: &BTreeSet<OwnedUserId>,
    ) -> Vec<InboxOutput> {
        if self.joined != *joined {
            self.joined.clone_from(joined);
            self.parked.retain(|key| joined.contains(&key.from.user_id));
            self.distrusted.retain(|device| joined.contains(&device.user_id));
            let (known, strangers) = std::mem::take(&mut self.strangers)
                .into_iter()
                .partition::<VecDeque<_>, _>(|key| joined.contains(&key.from.user_id));
            self.strangers = strangers;
            self.parked.extend(known);
            self.parked.make_contiguous().sort_by_key(|key| key.since);
        }
        if let Some(own) = &changes.own {
            self.own_ids = own.iter().map(|member| member.member_id.clone()).collect();
        }
        let mut outputs = Vec::new();
        let mut gone = Vec::new();
        for member in &changes.left {
            if let Some(keys) = self.members.remove(member) {
                outputs.push(InboxOutput::Forget { member: member.clone() });
                gone.push((member.clone(), keys));
            }
        }
        for member in &changes.changed {
            if let Some(known) = self.members.get_mut(&member.key()) {
                known.form = member.form;
            }
        }
        for member in &changes.joined {
            let key = member.key();
            let memory = self.gone.iter().position(|(known, _)| *known == key);
            let memory = memory.and_then(|place| self.gone.remove(place)).map(|(_, memory)| memory);
            self.members.insert(key.clone(), MemberKeys::new(member.form, memory.unwrap_or_default()));
            // The device of a membership can become known late. Its keys stay.
            let unnamed = MemberKey { device_id: None, ..key.clone() };
            for (_, keys) in gone.iter().filter(|(gone, _)| *gone == unnamed) {
                let is_of_device = |parked: &&Parked| Some(&parked.from.device_id) == key.device_id.as_ref();
                for parked in keys.kept.iter().filter(is_of_device).cloned() {
                    outputs.extend(self.accept(&key, parked).ok().flatten());
                }
            }
        }
        for (member, keys) in gone {
            self.remember(member, keys);
        }
        for key in std::mem::take(&mut self.parked) {
            let sender = key.from.clone();
            match self.owner(&key) {
                Ok(None) => self.parked.push_back(key),
                Ok(Some(member)) => match self.accept(&member, key) {
                    Ok(output) => outputs.extend(output),
                    Err(reason) => {
                        outputs.extend(self.reject(
                            now.instant,
                            sender.user_id,
                            Some(sender.device_id),
                            reason,
                        ));
                    }
                },
                Err(reason) => {
                    outputs.extend(self.reject(now.instant, sender.user_id, Some(sender.device_id), reason));
                }
            }
        }
        outputs
    }

    /// Drops keys that waited too long.
    pub(super) fn expire(&mut self, now: Instant) -> Vec<InboxOutput> {
        let mut outputs = Vec::new();
        while let Some(key) = self.parked.pop_front_if(|key| now >= later(key.since, self.limits.park_for)) {
            let Device { user_id, device_id } = key.from;
            outputs.extend(self.reject(now, user_id, Some(device_id), KeyRejected::NotAMember));
        }
        while let Some(key) = self.strangers.pop_front_if(|key| now >= later(key.since, STRANGER_FOR)) {
            let Device { user_id, device_id } = key.from;
            outputs.extend(self.reject(now, user_id, Some(device_id), KeyRejected::NotInRoom));
        }
        outputs
    }

    /// When [`Self::expire`] has something to do.
    #[must_use]
    pub(super) fn next_expiry(&self) -> Option<Instant> {
        let parked = self.parked.front().map(|key| later(key.since, self.limits.park_for));
        let stranger = self.strangers.front().map(|key| later(key.since, STRANGER_FOR));
        parked.into_iter().chain(stranger).min()
    }

    /// Wipes all keys, as when we leave. Old messages stay recognised.
    pub(super) fn leave(&mut self) -> Vec<InboxOutput> {
        self.parked.clear();
        self.strangers.clear();
        self.own_ids.clear();
        let members = std::mem::take(&mut self.members);
        let outputs = members.keys().map(|member| InboxOutput::Forget { member: member.clone() }).collect();
        for (member, keys) in members {
            self.remember(member, keys);
        }
        outputs
    }

    /// Trust in this user's devices may have changed: nothing is held against them any more.
    pub(super) fn trust_changed(&mut self, user: &UserId) {
        self.distrusted.retain(|device| device.user_id != user);
    }

    /// Whether a key of this device was refused by policy.
    #[must_use]
    pub(super) fn distrusts(&self, device: &Device) -> bool {
        self.distrusted.contains(device)
    }

    /// [`InboxOutput::Install`] for the newest keys of present members, for rings that start empty.
    #[cfg(test)]
    pub(super) fn installed(&self) -> impl Iterator<Item = InboxOutput> {
        self.members.iter().flat_map(|(member, keys)| keys.kept.iter().map(|key| key.install(member)))
    }

    /// Everything that can be said of a key without the members.
    fn judge(&mut self, now: Now, event: &ToDeviceEvent) -> Result<Parked, KeyRejected> {
        let OlmSender { device_id, cross_signed } = event.olm.as_ref().ok_or(KeyRejected::NotEncrypted)?;
        let message = wire::parse(&event.content)?;
        if message.room_id != self.room_id {
            return Err(KeyRejected::WrongRoom);
        }
        // Also if it only claims to be ours: this device alone makes our keys.
        let is_own = |device: &Option<OwnedDeviceId>| device.as_ref() == Some(&self.own.device_id);
        if event.sender == self.own.user_id && (is_own(device_id) || is_own(&message.claimed_device_id)) {
            return Err(KeyRejected::OwnIdentity);
        }
        let device_id = device_id.clone().ok_or(KeyRejected::UnknownDevice)?;
        let KeyMessage { claimed_device_id, member_id, index, key, sent_ts, .. } = message;
        if claimed_device_id.is_some_and(|claimed| claimed != device_id) {
            return Err(KeyRejected::DeviceMismatch);
        }
        let from = Device::new(event.sender.clone(), device_id);
        if self.trust == TrustPolicy::CrossSigned && !cross_signed {
            if self.joined.contains(&from.user_id) && self.distrusted.len() < MAX_DISTRUSTED {
                self.distrusted.insert(from);
            }
            return Err(KeyRejected::NotCrossSigned);
        }
        self.distrusted.remove(&from);
        let member_id =
            member_id.unwrap_or_else(|| MemberId::of_state_member(&from.user_id, &from.device_id));
        // A sender's clock orders its own messages; one that runs ahead must not shut out its later keys.
        let sent = sent_ts.map(|sent| sent.min(now.unix));
        Ok(Parked { from, member_id, since: now.instant, index, key, sent })
    }

    /// The present member that a key belongs to.
    fn owner(&self, key: &Parked) -> Result<Option<MemberKey>, KeyRejected> {
        let Device { user_id, device_id } = &key.from;
        if *user_id == self.own.user_id && self.own_ids.contains(&key.member_id) {
            return Err(KeyRejected::OwnIdentity);
        }
        let named =
            |device_id| MemberKey { user_id: user_id.clone(), device_id, member_id: key.member_id.clone() };
        for candidate in [named(Some(device_id.clone())), named(None)] {
            if self.members.contains_key(&candidate) {
                return Ok(Some(candidate));
            }
        }
        let of_user = || {
            let first =
                MemberKey { user_id: user_id.clone(), device_id: None, member_id: MemberId(String::new()) };
            self.members.range(first..).take_while(|(member, _)| member.user_id == *user_id)
        };
        if of_user().any(|(member, _)| member.member_id == key.member_id) {
            return Err(KeyRejected::DeviceMismatch);
        }
        let mut by_device = of_user().filter(|(member, keys)| {
            keys.form == MembershipForm::State && member.device_id.as_ref() == Some(device_id)
        });
        Ok(by_device.next().map(|(member, _)| member.clone()))
    }

    fn accept(&mut self, member: &MemberKey, key: Parked) -> Result<Option<InboxOutput>, KeyRejected> {
        let Some(keys) = self.members.get_mut(member) else { return Ok(None) };
        let verdict = keys.memory.judge(&key)?;
        if verdict == Verdict::New {
            let install = key.install(member);
            keys.keep(key);
            return Ok(Some(install));
        }
        let repeated = InboxOutput::Repeated { member: member.clone(), device: key.from };
        Ok((verdict == Verdict::SentAgain).then_some(repeated))
    }

    fn park(&mut self, key: Parked) -> Result<(), KeyRejected> {
        if !self.joined.contains(&key.from.user_id) {
            let of_user = self.strangers.iter().filter(|known| known.from.user_id == key.from.user_id);
            if of_user.count() >= MAX_OF_STRANGER || self.strangers.len() >= MAX_STRANGERS {
                return Err(KeyRejected::NotInRoom);
            }
            self.strangers.push_back(key);
            return Ok(());
        }
        let same_place = |known: &Parked| {
            known.from == key.from && known.member_id == key.member_id && known.index == key.index
        };
        // One key per index is all that its membership could use.
        if let Some(place) = self.parked.iter().position(same_place) {
            let known = &self.parked[place];
            if key.sent.zip(known.sent).is_some_and(|(sent, known)| sent < known) {
                return Err(KeyRejected::Outdated);
            }
            let is_copy = key.sent.is_none() && key.key == known.key;
            if !is_copy {
                self.parked.remove(place);
                self.parked.push_back(key);
            }
            return Ok(());
        }
        let of_user = self.parked.iter().filter(|known| known.from.user_id == key.from.user_id);
        let (of_user, of_device) = of_user.fold((0, 0), |(of_user, of_device), known| {
            (of_user + 1, of_device + usize::from(known.from == key.from))
        });
        if of_device >= self.limits.max_parked_per_device
            || of_user >= self.limits.max_parked_per_user
            || self.parked.len() >= self.limits.max_parked
        {
            return Err(KeyRejected::TooManyParked);
        }
        self.parked.push_back(key);
        Ok(())
    }

    fn remember(&mut self, member: MemberKey, keys: MemberKeys) {
        if self.gone.len() == MAX_GONE {
            self.gone.pop_front();
        }
        self.gone.push_back((member, keys.into_memory()));
    }

    /// A rejection, unless the same was reported a short while ago.
    fn reject(
        &mut self,
        now: Instant,
        sender: OwnedUserId,
        device_id: Option<OwnedDeviceId>,
        reason: KeyRejected,
    ) -> Option<InboxOutput> {
        self.reported.retain(|(_, _, at)| now.saturating_duration_since(*at) < REPORT_AGAIN);
        let kind = std::mem::discriminant(&reason);
        let known = self.reported.iter().any(|(user, reported, _)| *user == sender && *reported == kind);
        if known || self.reported.len() >= MAX_REPORTED {
            return None;
        }
        self.reported.push((sender.clone(), kind, now));
        Some(InboxOutput::Rejected { sender, device_id, reason })
    }
}

/// A key that passed every check but membership.
#[derive(Clone, Debug)]
struct Parked {
    from: Device,
    member_id: MemberId,
    since: Instant,
    index: KeyIndex,
    key: MediaKey,
    /// When it was sent, or received if that is earlier; `None` if the message does not say.
    sent: Option<UnixMillis>,
}

impl Parked {
    fn install(&self, member: &MemberKey) -> InboxOutput {
        InboxOutput::Install { member: member.clone(), index: self.index, key: self.key.clone() }
    }
}

/// What we hold of a present member.
#[derive(Debug)]
struct MemberKeys {
    form: MembershipForm,
    memory: Memory,
    /// The newest keys in order of acceptance, one per index.
    kept: VecDeque<Parked>,
}

impl MemberKeys {
    fn new(form: MembershipForm, memory: Memory) -> Self {
        Self { form, memory, kept: VecDeque::new() }
    }

    fn keep(&mut self, key: Parked) {
        self.kept.retain(|known| known.index != key.index);
        if self.kept.len() == MAX_KEPT {
            self.kept.pop_front();
        }
        self.kept.push_back(key);
    }

    /// What to remember of a member that leaves: its last keys may come back, all others may not.
    fn into_memory(mut self) -> Memory {
        for (index, slot) in &mut self.memory.slots {
            slot.state = match slot.state {
                SlotState::Installed if self.kept.iter().any(|key| key.index == *index) => SlotState::Dropped,
                SlotState::Dropped => SlotState::Dropped,
                SlotState::Installed | SlotState::Burnt => SlotState::Burnt,
            };
        }
        self.memory
    }
}

/// Which messages of a member count, without any key.
#[derive(Debug, Default)]
struct Memory {
    slots: BTreeMap<KeyIndex, Slot>,
    /// Keys that were replaced at their index.
    replaced: VecDeque<Fingerprint>,
}

type Fingerprint = [u8; 16];

#[derive(Debug)]
struct Slot {
    fingerprint: Fingerprint,
    /// The newest time of sending, of messages that tell it.
    newest: Option<UnixMillis>,
    state: SlotState,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SlotState {
    /// The key is in the ring, or was retired there.
    Installed,
    /// The member left while it had this key; a message sent later brings it back. The ring knows its replays.
    Dropped,
    /// The member left long after it had this key.
    Burnt,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// To be installed.
    New,
    /// Known, and its sender sent it again.
    SentAgain,
    /// Known: a copy of the message in the other form, or late.
    Known,
}

impl Memory {
    fn judge(&mut self, key: &Parked) -> Result<Verdict, KeyRejected> {
        let fingerprint = fingerprint(&key.key);
        if self.replaced.contains(&fingerprint) {
            return Err(KeyRejected::Replayed);
        }
        let Some(slot) = self.slots.get_mut(&key.index) else {
            let slot = Slot { fingerprint, newest: key.sent, state: SlotState::Installed };
            self.slots.insert(key.index, slot);
            return Ok(Verdict::New);
        };
        let is_same = slot.fingerprint == fingerprint;
        let order = key.sent.zip(slot.newest).map(|(sent, newest)| sent.cmp(&newest));
        let is_later = order.is_some_and(Ordering::is_gt);
        match slot.state {
            SlotState::Installed if is_same => {
                slot.newest = slot.newest.max(key.sent);
                return Ok(if is_later { Verdict::SentAgain } else { Verdict::Known });
            }
            SlotState::Burnt if is_same => return Err(KeyRejected::Replayed),
            // A message from before the member left, or a copy of one.
            SlotState::Dropped | SlotState::Burnt if order.is_some_and(Ordering::is_le) => {
                return Err(if is_same { KeyRejected::Replayed } else { KeyRejected::Outdated });
            }
            _ if order.is_some_and(Ordering::is_lt) => return Err(KeyRejected::Outdated),
            _ => {}
        }
        if !is_same {
            if self.replaced.len() == MAX_REPLACED {
                self.replaced.pop_front();
            }
            self.replaced.push_back(slot.fingerprint);
        }
        *slot = Slot { fingerprint, newest: slot.newest.max(key.sent), state: SlotState::Installed };
        Ok(Verdict::New)
    }
}

fn fingerprint(key: &MediaKey) -> Fingerprint {
    let digest = Sha256::new_with_prefix(b"media key fingerprint").chain_update(key.as_bytes()).finalize();
    let mut fingerprint = [0; 16];
    fingerprint.copy_from_slice(&digest[..16]);
    fingerprint
}

#[cfg(test)]
mod tests;
