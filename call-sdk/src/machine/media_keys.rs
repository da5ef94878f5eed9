//! Per-sender media keys (MSC4143 §Encryption keys).
//!
//! [`MediaKeys`] joins four parts: `rollout` makes, sends and switches our key; `inbox` judges the keys of others;
//! `healing` notices a pair that cannot decrypt and decides on a remedy; [`wire`] reads and writes the messages.
//!
//! After every [`MediaKeys::handle`], and when a wait is over, drain [`MediaKeys::poll`] until it returns
//! [`KeyOutput::WaitUntil`] or [`KeyOutput::Idle`].
//!
//! With a shared password there is nothing to distribute: every input is ignored, and the caller installs the password
//! at [`KeySource::PASSWORD_INDEX`] in every ring.

mod healing;
mod inbox;
mod presence;
mod rollout;
#[cfg(test)]
mod simulation;
pub(crate) mod wire;

use std::{
    collections::{BTreeSet, VecDeque},
    fmt,
    time::{Duration, Instant},
};

use rand::CryptoRng;
use ruma_common::{OwnedDeviceId, OwnedRoomId, OwnedUserId};
use zeroize::Zeroizing;

pub(crate) use self::inbox::MAX_GONE;
pub use self::{healing::HealingConfig, inbox::InboxLimits, rollout::RolloutConfig, wire::KeyRejected};
use self::{
    healing::{Healing, Remedy},
    inbox::{Inbox, InboxOutput},
    presence::Presence,
    rollout::{Resend, Rollout, Step},
    wire::KeySender,
};
use crate::{
    key::{KeyIndex, MediaKey},
    matrix::{Delivery, DeliveryFailure, ToDeviceBatch, ToDeviceEvent, TrustPolicy},
    member::{Device, Member, MemberId, MemberKey, Slot},
    time::Now,
};

/// Where the keys of a call come from.
#[derive(Clone, Default, PartialEq, Eq)]
pub(crate) enum KeySource {
    /// Every member makes its own key and sends it to the others over Olm.
    #[default]
    PerMember,
    /// All members derive one key from a password that they were given elsewhere. Wiped on drop, redacted in `Debug`.
    /// Nobody can be locked out, and a member can speak in the name of another.
    SharedPassword(Zeroizing<String>),
}

impl KeySource {
    /// The key index of a shared password.
    pub(crate) const PASSWORD_INDEX: KeyIndex = KeyIndex(0);
}

impl fmt::Debug for KeySource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::PerMember => "PerMember",
            Self::SharedPassword(_) => "SharedPassword(redacted)",
        })
    }
}

/// How media keys are made, shared and judged.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct MediaKeysConfig {
    /// Where the keys come from.
    pub source: KeySource,
    /// Whose keys are accepted. Whom ours go to is the port's decision, by the same policy.
    pub trust: TrustPolicy,
    /// Timing of our own key.
    pub rollout: RolloutConfig,
    /// Bounds on keys that wait for their sender's membership.
    pub inbox: InboxLimits,
    /// When to ask for missing keys.
    pub healing: HealingConfig,
}

/// Names one batch of key messages until its outcomes are reported. Never reused within a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct SendId(pub u64);

/// What happened.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum KeyInput<'a> {
    /// We join the call under this membership id, or join it again under another. A fresh key is made at another index
    /// than last time, as soon as the members are known.
    Join {
        /// Exactly as our member event has it.
        member_id: MemberId,
    },
    /// We leave: our key and those of others are wiped.
    Leave,
    /// The members of the call and the users joined to the room. To be given once at the start, after [`Self::Leave`],
    /// and after every change. Our own device is recognised and passed over.
    Members {
        /// The members.
        members: &'a [Member],
        /// The users joined to the room: only their keys wait for a membership.
        joined: &'a BTreeSet<OwnedUserId>,
    },
    /// A to-device event of any type; other types than keys are ignored.
    ToDevice(&'a ToDeviceEvent),
    /// What became of a message to one device.
    Delivered {
        /// The batch.
        id: SendId,
        /// The device.
        device: Device,
        /// The outcome.
        result: Delivery,
    },
    /// A batch is over. Devices of it without an outcome count as timed out.
    Finished {
        /// The batch.
        id: SendId,
    },
    /// Trust in the devices of a user may have changed.
    TrustChanged {
        /// The user.
        user_id: OwnedUserId,
    },
    /// How many frames all our encryptors together have sealed with the key at `index`. To be given now and then, so
    /// that the key is replaced before an initialisation vector can repeat.
    Sealed {
        /// Index of the key in use.
        index: KeyIndex,
        /// Frames sealed with it.
        frames: u64,
    },
    /// What arrives of a member's media. To be given when it changes; `last_authenticated` at least every few seconds.
    Media {
        /// The member.
        member: MemberKey,
        /// Whether it publishes a track that is not muted and that we receive.
        publishing: bool,
        /// When a frame of it was last decrypted and authenticated.
        last_authenticated: Option<Instant>,
    },
    /// Replace our key even if nothing demands it.
    Rotate,
}

/// What to do now.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum KeyOutput {
    /// Send these messages and report the outcome of each device under this id. Several batches may be on their way
    /// at once.
    Send {
        /// Name of the batch.
        id: SendId,
        /// The messages.
        batch: ToDeviceBatch,
    },
    /// Install this key in our own ring and encrypt with it from now on.
    Use {
        /// Its index.
        index: KeyIndex,
        /// The key.
        key: MediaKey,
    },
    /// Install this key in the ring of this member. The ring keeps what it knows of a key that it had before.
    Install {
        /// The member.
        member: MemberKey,
        /// Where in its ring.
        index: KeyIndex,
        /// The key.
        key: MediaKey,
    },
    /// Drop all keys from the ring of this member, but keep what the ring knows about replays: the member may return.
    Forget {
        /// The member.
        member: MemberKey,
    },
    /// Publish our membership again with a new creation time (state form: `created_ts`), so that clients that do not
    /// retry send us their keys again. If that changes our member id, give [`KeyInput::Join`] with the new one.
    RenewMembership,
    /// Tell the application.
    Event(KeyEvent),
    /// Nothing until then.
    WaitUntil(Instant),
    /// Nothing until the next input.
    Idle,
}

/// What the application should know.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub(crate) enum KeyEvent {
    /// A device does not get our key until its owner or our user acts, so it cannot see or hear us. Reported once per
    /// device and cause. The key is sent when trust in the user changes.
    Refused {
        /// The device.
        device: Device,
        /// Why, and what to do about it.
        failure: DeliveryFailure,
    },
    /// A device did not get our key; it is tried again. Reported once per device and cause until a key gets through.
    DeliveryFailed {
        /// The device.
        device: Device,
        /// Why.
        failure: DeliveryFailure,
    },
    /// Every member that our key may go to has the key at this index.
    Delivered {
        /// Its index.
        index: KeyIndex,
    },
    /// Whether the key is kept although members come and go, because the call is too large.
    RotationSuppressed(bool),
    /// A key was not accepted. Reported once in a while per sender and reason.
    Rejected {
        /// Its sender.
        sender: OwnedUserId,
        /// The device that sent it, if it is known.
        device_id: Option<OwnedDeviceId>,
        /// Why not.
        reason: KeyRejected,
    },
}

impl fmt::Display for KeyEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused { device, failure } => {
                write!(f, "our media key is withheld from {device}: {failure}")
            }
            Self::DeliveryFailed { device, failure } => {
                write!(f, "our media key did not reach {device}, trying again: {failure}")
            }
            Self::Delivered { index } => write!(f, "every member has our media key {}", index.0),
            Self::RotationSuppressed(true) => f.write_str("the call is too large to replace our media key"),
            Self::RotationSuppressed(false) => {
                f.write_str("our media key is replaced again when members change")
            }
            Self::Rejected { sender, device_id: Some(device), reason } => {
                write!(f, "a media key from {sender} ({device}) was refused: {reason}")
            }
            Self::Rejected { sender, device_id: None, reason } => {
                write!(f, "a media key from {sender} was refused: {reason}")
            }
        }
    }
}

/// The media keys of one call. See the [module](self).
#[derive(Debug)]
pub(crate) struct MediaKeys {
    per_member: bool,
    presence: Presence,
    room_id: OwnedRoomId,
    slot: Slot,
    device: Device,
    rollout: Rollout,
    inbox: Inbox,
    healing: Healing,
    outputs: VecDeque<KeyOutput>,
}

impl MediaKeys {
    /// Keys for the call `slot` of `room_id` on our `device`. Nothing happens before [`KeyInput::Join`]. `rng` makes
    /// the keys.
    #[must_use]
    pub(crate) fn new(
        config: MediaKeysConfig,
        room_id: OwnedRoomId,
        slot: Slot,
        device: Device,
        rng: Box<dyn CryptoRng + Send>,
    ) -> Self {
        Self {
            per_member: config.source == KeySource::PerMember,
            rollout: Rollout::new(config.rollout, rng),
            inbox: Inbox::new(config.inbox, config.trust, room_id.clone(), device.clone()),
            healing: Healing::new(config.healing),
            presence: Presence::new(device.clone()),
            room_id,
            slot,
            device,
            outputs: VecDeque::new(),
        }
    }

    /// Takes in what happened. Drain [`Self::poll`] after it.
    pub(crate) fn handle(&mut self, now: Now, input: KeyInput<'_>) {
        if !self.per_member {
            return;
        }
        match input {
            KeyInput::Join { member_id } => {
                self.healing.join(now.instant);
                self.rollout.join(KeySender {
                    room_id: self.room_id.clone(),
                    slot: self.slot.clone(),
                    device: self.device.clone(),
                    member_id,
                });
            }
            KeyInput::Leave => {
                self.presence.clear();
                self.rollout.leave();
                self.healing.leave();
                let outputs = self.inbox.leave();
                self.absorb(now, outputs);
            }
            KeyInput::Members { members, joined } => {
                let changes = self.presence.update(members);
                self.healing.members(now.instant, &changes);
                let outputs = self.inbox.members(now, &changes, joined);
                self.rollout.members(now.instant, &changes);
                self.absorb(now, outputs);
            }
            KeyInput::ToDevice(event) => {
                let outputs = self.inbox.receive(now, event);
                self.absorb(now, outputs);
            }
            KeyInput::Delivered { id, device, result } => {
                let refused = self.rollout.refuses(&device);
                self.rollout.delivered(now.instant, id, &device, result);
                if refused != self.rollout.refuses(&device) {
                    self.healing.policy_changed();
                }
            }
            KeyInput::Finished { id } => self.rollout.finished(now.instant, id),
            KeyInput::TrustChanged { user_id } => {
                self.inbox.trust_changed(&user_id);
                self.rollout.trust_changed(now.instant, &user_id);
                self.healing.trust_changed(now.instant, &user_id);
            }
            KeyInput::Sealed { index, frames } => self.rollout.sealed(index, frames),
            KeyInput::Media { member, publishing, last_authenticated } => {
                self.healing.media(now.instant, &member, publishing, last_authenticated);
            }
            KeyInput::Rotate => self.rollout.rotate(),
        }
    }

    /// What to do now. To be called until it returns [`KeyOutput::WaitUntil`] or [`KeyOutput::Idle`].
    pub(crate) fn poll(&mut self, now: Now) -> KeyOutput {
        if !self.per_member {
            return KeyOutput::Idle;
        }
        let expired = self.inbox.expire(now.instant);
        self.absorb(now, expired);
        if let Some(output) = self.outputs.pop_front() {
            return output;
        }
        let (rollout, inbox) = (&self.rollout, &self.inbox);
        let refused = |device: &Device| rollout.refuses(device) || inbox.distrusts(device);
        for remedy in self.healing.poll(now.instant, refused) {
            match remedy {
                Remedy::SendKey(device) => self.rollout.resend(now.instant, &device, Resend::Healing),
                Remedy::RenewMembership => self.outputs.push_back(KeyOutput::RenewMembership),
            }
        }
        if let Some(output) = self.outputs.pop_front() {
            return output;
        }
        match self.rollout.poll(now) {
            Step::Send { id, batch } => KeyOutput::Send { id, batch },
            Step::Use { index, key } => KeyOutput::Use { index, key },
            Step::Event(event) => KeyOutput::Event(event),
            Step::Wait(at) => {
                let next = [at, self.inbox.next_expiry(), self.healing.next()].into_iter().flatten().min();
                next.map_or(KeyOutput::Idle, KeyOutput::WaitUntil)
            }
        }
    }

    /// The index of our newest key, whether in use or still being sent out.
    #[cfg(test)]
    #[must_use]
    pub(crate) fn index(&self) -> Option<KeyIndex> {
        self.rollout.index()
    }

    /// [`KeyOutput::Install`] for the newest keys of present members, for a caller whose rings start empty.
    #[cfg(test)]
    #[must_use]
    pub(crate) fn installed(&self) -> Vec<KeyOutput> {
        self.inbox.installed().filter_map(|output| self.translate(output)).collect()
    }

    fn absorb(&mut self, now: Now, outputs: Vec<InboxOutput>) {
        for output in outputs {
            match &output {
                InboxOutput::Install { member, .. } => self.healing.keyed(now.instant, member, true),
                InboxOutput::Repeated { member, device } => {
                    self.healing.keyed(now.instant, member, false);
                    self.rollout.resend(now.instant, device, Resend::Answer);
                }
                InboxOutput::Forget { .. } | InboxOutput::Rejected { .. } => {}
            }
            let output = self.translate(output);
            self.outputs.extend(output);
        }
    }

    fn translate(&self, output: InboxOutput) -> Option<KeyOutput> {
        Some(match output {
            InboxOutput::Install { member, index, key } => KeyOutput::Install { member, index, key },
            InboxOutput::Forget { member } => KeyOutput::Forget { member },
            InboxOutput::Rejected { sender, device_id, reason } => {
                KeyOutput::Event(KeyEvent::Rejected { sender, device_id, reason })
            }
            InboxOutput::Repeated { .. } => return None,
        })
    }
}

/// `instant` moved later, by a century at most: a configured duration may be absurd.
fn later(instant: Instant, duration: Duration) -> Instant {
    const CENTURY: Duration = Duration::from_secs(100 * 365 * 24 * 3600);
    instant.checked_add(duration.min(CENTURY)).unwrap_or(instant)
}

/// `base` doubled `times` times, at most `max`.
fn doubled(base: Duration, times: u32, max: Duration) -> Duration {
    base.saturating_mul(1 << times.min(16)).min(max)
}
