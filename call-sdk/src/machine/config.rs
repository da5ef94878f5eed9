//! What a call is told at its start.

use ruma_common::OwnedRoomId;

use super::{
    media_keys::{HealingConfig, InboxLimits, RolloutConfig},
    membership::{own::OwnConfig, wire::MembershipMode},
    notify::Attention,
    placement::MeshPolicy,
};
use crate::{
    matrix::TrustPolicy,
    member::{Device, Slot},
};

/// Whether the call's media must be encrypted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum EncryptionPolicy {
    /// Encrypted if and only if the room is. The default.
    #[default]
    AsTheRoom,
    /// Refuse to join a call in a room that is not encrypted.
    Required,
}

/// What a [`CallMachine`](super::CallMachine) is told at its start.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct MachineConfig {
    /// Our device.
    pub device: Device,
    /// The room of the call.
    pub room_id: OwnedRoomId,
    /// The slot; `None`: the one that the room uses (MSC4143 §Slots).
    pub slot: Option<Slot>,
    /// The membership form that we write.
    pub mode: MembershipMode,
    /// `audio`, `video` or another.
    pub intent: Option<String>,
    /// Whether an unencrypted call is acceptable.
    pub encryption: EncryptionPolicy,
    /// Which devices may send us keys.
    pub trust: TrustPolicy,
    /// Whether all members share a password instead of having a key each.
    pub shared_password: bool,
    /// Whether to invite the room when we start a call, being the first.
    pub invite: Option<Attention>,
    /// Whether somebody else is asked to keep our delayed leave (MSC4195).
    pub delegate_leave: bool,
    /// When the call does without a focus.
    pub mesh: MeshPolicy,
    /// Most members of a call that goes on without its focus, ourselves included.
    pub mesh_most: usize,
    /// Whether to watch the call without becoming a member.
    pub observe: bool,
    /// Timing of our own membership.
    pub membership: OwnConfig,
    /// Timing of our own media key.
    pub keys: RolloutConfig,
    /// Bounds on keys that wait for their sender's membership.
    pub inbox: InboxLimits,
    /// When to ask for missing keys.
    pub healing: HealingConfig,
}

impl MachineConfig {
    /// Most members of a call that goes on without its focus, unless the application says otherwise.
    pub const DEFAULT_MESH_MOST: usize = 8;

    /// The defaults for `device` in `room_id`.
    #[must_use]
    pub fn new(device: Device, room_id: OwnedRoomId) -> Self {
        Self {
            device,
            room_id,
            slot: None,
            mode: MembershipMode::default(),
            intent: None,
            encryption: EncryptionPolicy::default(),
            trust: TrustPolicy::default(),
            shared_password: false,
            invite: None,
            delegate_leave: false,
            mesh: MeshPolicy::default(),
            mesh_most: Self::DEFAULT_MESH_MOST,
            observe: false,
            membership: OwnConfig::default(),
            keys: RolloutConfig::default(),
            inbox: InboxLimits::default(),
            healing: HealingConfig::default(),
        }
    }
}
