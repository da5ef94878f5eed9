//! Who calls whom, and what is said until media flows: every pair of one call, without I/O.

use std::time::Instant;

use rand::rngs::StdRng;
use ruma_common::OwnedRoomId;
use serde_json::Value;

use super::{MeshPeer, Negotiate, Negotiated};
use crate::{
    matrix::Delivery,
    member::{Device, MemberKey, Slot},
    transport::{ConnectionId, MeshSession},
};

/// Names a message until its outcome.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct MessageId(pub(crate) u64);

/// Ourselves in the mesh of one call.
#[derive(Clone, Debug)]
pub(crate) struct Us {
    /// The room of the call.
    pub(crate) room_id: OwnedRoomId,
    /// The slot: `conf_id` is its id.
    pub(crate) slot: Slot,
    /// Our device.
    pub(crate) device: Device,
    /// Our session, as our membership names it.
    pub(crate) session: MeshSession,
}

/// What happened.
#[derive(Debug)]
pub(crate) enum SignallingInput<'a> {
    /// The members that media is exchanged with directly from now on. A pair that is not among them any more is hung
    /// up, `moved` if its member is reached by a focus instead.
    Peers {
        /// Every one.
        peers: Vec<MeshPeer>,
        /// Those whose pairs end because a focus carries them.
        moved: &'a [MemberKey],
    },
    /// A to-device message of a type that begins with `m.call.`, decrypted, from a device that Olm vouches for.
    Message {
        /// That device.
        from: &'a Device,
        /// Its type.
        event_type: &'a str,
        /// Its content.
        content: &'a Value,
    },
    /// What became of a message of ours.
    Sent {
        /// Which.
        id: MessageId,
        /// Its outcome.
        result: Delivery,
    },
    /// A connection was opened, or could not be.
    Opened {
        /// Which.
        connection: ConnectionId,
        /// Why not.
        result: Result<(), String>,
    },
    /// A connection answered.
    Negotiated {
        /// Which.
        connection: ConnectionId,
        /// What.
        event: Negotiated,
    },
    /// We leave the call: every pair is hung up.
    Leave,
}

/// What to do.
#[derive(Debug, PartialEq)]
pub(crate) enum SignallingOutput {
    /// Send this, Olm-encrypted, to one device.
    Send {
        /// Its name.
        id: MessageId,
        /// To whom.
        to: Device,
        /// Its type.
        event_type: &'static str,
        /// Its content.
        content: Value,
    },
    /// Open a connection to a member. The answer is [`SignallingInput::Opened`].
    Open {
        /// Its name.
        connection: ConnectionId,
        /// To whom.
        member: MemberKey,
    },
    /// Tell a connection what to do.
    Negotiate {
        /// Which.
        connection: ConnectionId,
        /// What.
        command: Negotiate,
    },
    /// Close a connection, or give up opening it.
    Close {
        /// Which.
        connection: ConnectionId,
    },
    /// Media flows between us and a member.
    Connected {
        /// By which connection.
        connection: ConnectionId,
        /// Who.
        member: MemberKey,
    },
    /// An attempt to connect failed; another follows.
    Failed {
        /// Who.
        member: MemberKey,
        /// Why, in words.
        reason: String,
        /// Failures in a row.
        failures: u32,
    },
}

/// Every pair of one call.
#[derive(Debug)]
pub(crate) struct Signalling {
    us: Us,
    next_route: u32,
    rng: StdRng,
}

impl Signalling {
    /// No pair yet. `next_route` is the first route that no connection of this call has had.
    pub(crate) fn new(us: Us, next_route: u32, rng: StdRng) -> Self {
        Self { us, next_route, rng }
    }

    /// The first route that no connection has had.
    pub(crate) fn next_route(&self) -> u32 {
        self.next_route
    }

    /// Takes in what happened.
    pub(crate) fn handle(&mut self, now: Instant, input: SignallingInput<'_>) {
        let _ = (now, input, &self.us, &self.rng);
    }

    /// What to do next; `None` when nothing is due before [`Self::wake_at`].
    pub(crate) fn poll(&mut self, now: Instant) -> Option<SignallingOutput> {
        let _ = now;
        None
    }

    /// When something is due by time alone.
    pub(crate) fn wake_at(&self) -> Option<Instant> {
        None
    }

    /// The member behind a connection that is still current.
    pub(crate) fn member_of(&self, connection: ConnectionId) -> Option<&MemberKey> {
        let _ = connection;
        None
    }
}
