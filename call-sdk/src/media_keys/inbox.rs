//! Others' media keys: which of them we believe, and under whose SFU identity they are filed.
//!
//! A key is accepted only if all of this holds: it came Olm-encrypted; Olm's sending device is the device that
//! the message claims and the device that is the member; that device is cross-signed by its owner (unless the
//! application waives it); it is for our room; it is not our own; and no newer key with its index is known. What
//! a message says about its sender is compared and never believed.
//!
//! A key that comes before its sender's membership is parked, within bounds. When a member's SFU identity changes
//! its keys are given out again under the new one.
//!
//! *Assumptions.* The port takes the sending device from the Olm session, and `cross_signed` from the owner's
//! signed device list. Sender and content come from the decrypted event.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    time::{Duration, Instant},
};

use matrix_sdk::ruma::{OwnedDeviceId, OwnedRoomId, OwnedUserId};
use serde_json::Value;

pub use super::wire::KeyRejected;
use super::wire::{self, KeyMessage};
use crate::{
    key::{KeyIndex, MediaKey},
    member::{Member, MemberId, MembershipKind, ParticipantIdentity},
    time::{Now, UnixMillis},
};

/// How many of a member's newest keys are kept, to be given out again under a new identity.
const MAX_KEPT: usize = 4;

/// Whose keys the inbox takes, and its bounds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InboxConfig {
    /// The room of the call.
    pub room_id: OwnedRoomId,
    /// Our user.
    pub own_user: OwnedUserId,
    /// Our device.
    pub own_device: OwnedDeviceId,
    /// Refuse keys of devices that their owner did not cross-sign (MSC4153): on. Off is what Element Call does.
    pub require_cross_signed: bool,
    /// How long a key waits for its sender to become a member: 2 min.
    pub park_for: Duration,
    /// Most keys of one user that wait: 16.
    pub max_parked_per_user: usize,
    /// Most keys that wait: 512.
    pub max_parked: usize,
}

impl InboxConfig {
    /// The defaults for a call in `room_id`.
    #[must_use]
    pub fn new(room_id: OwnedRoomId, own_user: OwnedUserId, own_device: OwnedDeviceId) -> Self {
        Self {
            room_id,
            own_user,
            own_device,
            require_cross_signed: true,
            park_for: Duration::from_secs(120),
            max_parked_per_user: 16,
            max_parked: 512,
        }
    }
}

/// A key message as the port hands it over, unjudged.
#[derive(Clone, PartialEq)]
pub struct ReceivedKey {
    /// The content of the event. It holds the key and is left out of `Debug`.
    pub content: Value,
    /// Who sent it: of an encrypted event the owner of the Olm session.
    pub sender: OwnedUserId,
    /// What Olm says; `None` if the event came in the clear.
    pub olm: Option<OlmSender>,
}

impl fmt::Debug for ReceivedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReceivedKey")
            .field("sender", &self.sender)
            .field("olm", &self.olm)
            .finish_non_exhaustive()
    }
}

/// Who encrypted a message, by its Olm session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OlmSender {
    /// The device that the session belongs to; `None` if it is not in its owner's device list.
    pub device_id: Option<OwnedDeviceId>,
    /// Whether the device's owner has cross-signed it.
    pub cross_signed: bool,
}

/// What became of a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum InboxOutput {
    /// File this key in the ring of the participant with this identity.
    Install {
        /// The member's SFU identity.
        identity: ParticipantIdentity,
        /// Where in its ring.
        index: KeyIndex,
        /// The key.
        key: MediaKey,
    },
    /// A key was not accepted.
    Rejected {
        /// Who sent it.
        sender: OwnedUserId,
        /// Why not.
        reason: KeyRejected,
    },
}

/// The state machine of others' media keys. See the [module](self).
#[derive(Debug)]
pub struct Inbox {
    config: InboxConfig,
    members: BTreeMap<DeviceName, MemberKeys>,
    /// In order of arrival.
    parked: Vec<Parked>,
}

impl Inbox {
    /// An empty inbox; nobody is a member yet.
    #[must_use]
    pub fn new(config: InboxConfig) -> Self {
        Self { config, members: BTreeMap::new(), parked: Vec::new() }
    }

    /// Judges a key. Nothing comes back for one that is parked.
    pub fn receive(&mut self, now: Now, received: ReceivedKey) -> Vec<InboxOutput> {
        let mut outputs = self.expire_parked(now.instant);
        let sender = received.sender.clone();
        let judged = self.judge(now, received).and_then(|key| {
            let member = self.members.get_mut(&key.from).filter(|member| member.is_meant_by(&key));
            match member {
                Some(member) => member.accept(key).map(Some),
                None => self.park(key).map(|()| None),
            }
        });
        match judged {
            Ok(install) => outputs.extend(install),
            Err(reason) => outputs.push(InboxOutput::Rejected { sender, reason }),
        }
        outputs
    }

    /// Takes the members of the call, after every change; our own among them is passed over.
    pub fn members(&mut self, now: Now, members: &[Member]) -> Vec<InboxOutput> {
        let mut outputs = self.expire_parked(now.instant);
        let own = (self.config.own_user.clone(), self.config.own_device.clone());
        let mut present = BTreeSet::new();
        for member in members {
            let name = (member.user_id.clone(), member.device_id.clone());
            if name == own {
                continue;
            }
            present.insert(name.clone());
            match self.members.get_mut(&name) {
                None => {
                    self.members.insert(name, MemberKeys::new(member));
                }
                Some(known) => outputs.extend(known.rename(member)),
            }
        }
        // Who is gone may be back in a moment, without sending its keys again: they wait like early ones.
        let gone: Vec<_> = self.members.keys().filter(|name| !present.contains(*name)).cloned().collect();
        for name in gone {
            if let Some(member) = self.members.remove(&name) {
                for key in member.kept {
                    // A full park has no room for it; the member sends a new key when it joins again.
                    let _ = self.park(Parked { since: now.instant, ..key });
                }
            }
        }
        for key in std::mem::take(&mut self.parked) {
            match self.members.get_mut(&key.from).filter(|member| member.is_meant_by(&key)) {
                None => self.parked.push(key),
                Some(member) => outputs.extend(member.accept(key)),
            }
        }
        outputs
    }

    /// Every key that we hold of present members, for a ring that starts empty.
    #[must_use]
    pub fn installed(&self) -> Vec<InboxOutput> {
        self.members.values().flat_map(MemberKeys::installs).collect()
    }

    /// All that can be said of a key without knowing the members.
    fn judge(&self, now: Now, received: ReceivedKey) -> Result<Parked, KeyRejected> {
        let olm = received.olm.as_ref().ok_or(KeyRejected::NotEncrypted)?;
        let message = wire::parse(&received.content)?;
        if message.room_id != self.config.room_id {
            return Err(KeyRejected::WrongRoom);
        }
        let device = olm.device_id.clone().ok_or(KeyRejected::UnknownDevice)?;
        // Also when it only claims to be ours: nobody but this device can make our keys.
        let is_own = |device: &OwnedDeviceId| *device == self.config.own_device;
        if received.sender == self.config.own_user
            && (is_own(&device) || message.claimed_device_id.as_ref().is_some_and(is_own))
        {
            return Err(KeyRejected::OwnIdentity);
        }
        if message.claimed_device_id.as_ref().is_some_and(|claimed| *claimed != device) {
            return Err(KeyRejected::DeviceMismatch);
        }
        if self.config.require_cross_signed && !olm.cross_signed {
            return Err(KeyRejected::NotCrossSigned);
        }
        let KeyMessage { member_id, index, key, sent_ts, .. } = message;
        // A sender's clock orders its own messages; one that runs ahead must not shut out its later keys.
        let sent = sent_ts.map_or(now.unix, |sent| sent.min(now.unix));
        Ok(Parked { from: (received.sender, device), since: now.instant, member_id, index, key, sent })
    }

    fn park(&mut self, key: Parked) -> Result<(), KeyRejected> {
        let newer = |known: &Parked| {
            known.from == key.from && known.member_id == key.member_id && known.index == key.index
        };
        if let Some(known) = self.parked.iter_mut().find(|known| newer(known)) {
            // One key per index is all that its membership could use.
            if key.sent < known.sent {
                return Err(KeyRejected::Outdated);
            }
            *known = key;
            return Ok(());
        }
        let of_user = self.parked.iter().filter(|known| known.from.0 == key.from.0).count();
        if of_user >= self.config.max_parked_per_user || self.parked.len() >= self.config.max_parked {
            return Err(KeyRejected::TooManyParked);
        }
        self.parked.push(key);
        Ok(())
    }

    fn expire_parked(&mut self, now: Instant) -> Vec<InboxOutput> {
        let limit = self.config.park_for;
        let is_old = |key: &mut Parked| now.saturating_duration_since(key.since) >= limit;
        let expired = self.parked.extract_if(.., is_old);
        expired
            .map(|key| InboxOutput::Rejected { sender: key.from.0.clone(), reason: KeyRejected::NotAMember })
            .collect()
    }
}

type DeviceName = (OwnedUserId, OwnedDeviceId);

/// A key that passed every check but membership.
#[derive(Clone, Debug)]
struct Parked {
    from: DeviceName,
    since: Instant,
    member_id: Option<MemberId>,
    index: KeyIndex,
    key: MediaKey,
    /// When it was sent, or received if that is earlier.
    sent: UnixMillis,
}

/// What we hold of one member.
#[derive(Debug)]
struct MemberKeys {
    identity: ParticipantIdentity,
    member_id: MemberId,
    kind: MembershipKind,
    /// The newest time seen at each index.
    newest: BTreeMap<KeyIndex, UnixMillis>,
    /// The newest keys, in order of acceptance, one per index.
    kept: Vec<Parked>,
}

impl MemberKeys {
    fn new(member: &Member) -> Self {
        Self {
            identity: member.identity.clone(),
            member_id: member.member_id.clone(),
            kind: member.kind,
            newest: BTreeMap::new(),
            kept: Vec::new(),
        }
    }

    /// Whether a key of this device is for this membership. The id in a message of a state member means nothing:
    /// one generation of clients writes an id there that its membership does not show.
    fn is_meant_by(&self, key: &Parked) -> bool {
        self.kind == MembershipKind::State || key.member_id.as_ref().is_none_or(|id| *id == self.member_id)
    }

    fn accept(&mut self, key: Parked) -> Result<InboxOutput, KeyRejected> {
        let newest = self.newest.entry(key.index).or_insert(key.sent);
        if key.sent < *newest {
            return Err(KeyRejected::Outdated);
        }
        *newest = key.sent;
        let install = self.install(&key);
        self.kept.retain(|known| known.index != key.index);
        if self.kept.len() == MAX_KEPT {
            self.kept.remove(0);
        }
        self.kept.push(key);
        Ok(install)
    }

    /// Takes the member's present description. Keys that are for it too are given out under its new identity;
    /// the others are dropped.
    fn rename(&mut self, member: &Member) -> Vec<InboxOutput> {
        let renamed = self.identity != member.identity;
        self.identity = member.identity.clone();
        self.member_id = member.member_id.clone();
        self.kind = member.kind;
        if !renamed {
            return Vec::new();
        }
        let kept = std::mem::take(&mut self.kept);
        self.kept = kept.into_iter().filter(|key| self.is_meant_by(key)).collect();
        self.installs()
    }

    fn installs(&self) -> Vec<InboxOutput> {
        self.kept.iter().map(|key| self.install(key)).collect()
    }

    fn install(&self, key: &Parked) -> InboxOutput {
        InboxOutput::Install { identity: self.identity.clone(), index: key.index, key: key.key.clone() }
    }
}

#[cfg(test)]
mod tests;
