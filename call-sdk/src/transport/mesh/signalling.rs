//! Signalling between mesh members: every pair of one call, without I/O.
//!
//! - [`pair`] decides who calls, settles crossing invites, and calls again after failures.
//! - [`attempt`] negotiates one connection.
//! - [`order`] sorts the other side's messages, [`outbox`] repeats ours, [`parked`] keeps those that come too early.
//!
//! Mutate once with [`Signalling::handle`], then call [`Signalling::poll`] until it returns `None`.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    fmt,
    time::Instant,
};

use rand::{Rng as _, distr::Alphanumeric, rngs::StdRng};
use ruma_common::{OwnedRoomId, UserId};
use serde_json::Value;

use self::{pair::Pair, parked::Parked};
use super::{
    MeshPeer, Negotiate, Negotiated,
    wire::{self, CallId},
};
use crate::{
    matrix::Delivery,
    member::{Device, MemberKey, Slot},
    transport::{ConnectionId, MeshSession},
};

mod attempt;
mod order;
mod outbox;
mod pair;
mod parked;

/// Messages that wait for the memberships of their senders.
const MAX_PARKED: usize = 32;

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
pub(crate) enum SignallingInput<'a> {
    /// The members that media is exchanged with directly from now on. A pair that is not among them any more is hung
    /// up: its member is reached by a focus instead, or has no membership.
    Peers {
        /// Every one.
        peers: Vec<MeshPeer>,
        /// Those whose pairs end because a focus carries them.
        moved: &'a [MemberKey],
        /// Those of `peers` that a focus carries already. Their connections stay, and are not made anew.
        lingering: &'a [MemberKey],
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
    /// Devices of this user that we refused may be trusted now.
    TrustChanged(&'a UserId),
    /// We leave the call: every pair is hung up.
    Leave,
}

/// What to do.
#[derive(PartialEq)]
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
        /// Whose.
        member: MemberKey,
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
    desk: Desk,
    pairs: BTreeMap<MemberKey, Pair>,
    /// Messages of senders without a membership.
    parked: Parked,
    next_route: u32,
}

/// What the pairs share.
#[derive(Debug)]
struct Desk {
    us: Us,
    rng: StdRng,
    outputs: VecDeque<SignallingOutput>,
    next_message: u64,
    /// Counts our invites.
    next_call: u64,
}

impl Signalling {
    /// No pair yet. `next_route` is the first route that no connection of this call has had.
    pub(crate) fn new(us: Us, next_route: u32, rng: StdRng) -> Self {
        Self {
            desk: Desk { us, rng, outputs: VecDeque::new(), next_message: 0, next_call: 0 },
            pairs: BTreeMap::new(),
            parked: Parked::new(MAX_PARKED),
            next_route,
        }
    }

    /// The first route that no connection has had.
    pub(crate) fn next_route(&self) -> u32 {
        self.next_route
    }

    /// Takes in what happened.
    pub(crate) fn handle(&mut self, now: Instant, input: SignallingInput<'_>) {
        match input {
            SignallingInput::Peers { peers, moved, lingering } => self.peers(now, peers, moved, lingering),
            SignallingInput::Message { from, event_type, content } => {
                let Some(message) = wire::read(&self.desk.us, from, event_type, content) else { return };
                let pair = self.pairs.values_mut().find(|pair| pair.is_with(from, &message.session));
                match pair {
                    Some(pair) => pair.message(now, &mut self.desk, message),
                    None => self.parked.park(now, from, message),
                }
            }
            SignallingInput::Sent { id, result } => {
                // A repeated message has a new name; outcomes of the old one don't matter any more.
                let desk = &mut self.desk;
                let _ = self.pairs.values_mut().any(|pair| pair.sent(now, desk, id, &result));
            }
            SignallingInput::Opened { connection, result } => {
                let pair = self.pairs.values_mut().find(|pair| pair.connection() == Some(connection));
                if let Some(pair) = pair {
                    pair.opened(now, &mut self.desk, result);
                }
            }
            SignallingInput::Negotiated { connection, event } => {
                let pair = self.pairs.values_mut().find(|pair| pair.connection() == Some(connection));
                if let Some(pair) = pair {
                    pair.negotiated(now, &mut self.desk, event);
                }
            }
            SignallingInput::TrustChanged(user_id) => {
                let theirs = self.pairs.values_mut().filter(|pair| pair.peer().device.user_id == user_id);
                theirs.for_each(|pair| pair.trust_changed(now));
            }
            SignallingInput::Leave => {
                for pair in std::mem::take(&mut self.pairs).into_values() {
                    pair.close(&mut self.desk, Some(wire::Reason::UserHangup));
                }
                self.parked.clear();
            }
        }
    }

    /// What to do next; `None` when nothing is due before [`Self::wake_at`].
    pub(crate) fn poll(&mut self, now: Instant) -> Option<SignallingOutput> {
        if self.desk.outputs.is_empty() {
            self.parked.expire(now);
            for pair in self.pairs.values_mut() {
                pair.advance(now, &mut self.desk);
            }
        }
        self.desk.outputs.pop_front()
    }

    /// When something is due by time alone.
    pub(crate) fn wake_at(&self) -> Option<Instant> {
        self.pairs.values().filter_map(Pair::wake_at).chain(self.parked.wake_at()).min()
    }

    /// The member behind a connection that is still current.
    pub(crate) fn member_of(&self, connection: ConnectionId) -> Option<&MemberKey> {
        self.pairs.iter().find(|(_, pair)| pair.connection() == Some(connection)).map(|(member, _)| member)
    }

    /// Whether we are the caller of a member by order; true without a pair.
    pub(crate) fn calls(&self, member: &MemberKey) -> bool {
        self.pairs.get(member).is_none_or(Pair::is_caller)
    }

    /// How many messages and calls are kept, beside the present call of every pair.
    #[cfg(any(test, feature = "fuzzing"))]
    fn kept(&self) -> usize {
        self.pairs.values().map(Pair::kept).sum::<usize>() + self.parked.len()
    }

    fn peers(&mut self, now: Instant, peers: Vec<MeshPeer>, moved: &[MemberKey], lingering: &[MemberKey]) {
        let mut wanted = BTreeMap::new();
        let mut addresses = BTreeSet::new();
        for peer in peers {
            // A message names a device and a session, so two memberships with both the same are one peer. Our own
            // device can only be a membership that we left behind: Olm does not encrypt to itself.
            let is_ours = peer.device == self.desk.us.device;
            if !is_ours && addresses.insert((peer.device.clone(), peer.session.clone())) {
                wanted.insert(peer.member.clone(), peer);
            }
        }
        for (member, pair) in std::mem::take(&mut self.pairs) {
            if wanted.get(&member) == Some(pair.peer()) {
                wanted.remove(&member);
                self.pairs.insert(member, pair);
            } else {
                let reason = if moved.contains(&member) {
                    Some(wire::Reason::Moved)
                } else if wanted.contains_key(&member) {
                    // Nobody is left in an old session to read a hangup.
                    None
                } else {
                    // A member that could not renew its membership may still be there, and think that we are.
                    Some(wire::Reason::NoMembership)
                };
                pair.close(&mut self.desk, reason);
            }
        }
        for (member, peer) in wanted {
            let pair = Pair::new(now, &self.desk.us, peer, self.next_route);
            self.next_route = self.next_route.saturating_add(1);
            self.pairs.insert(member, pair);
        }
        for (member, pair) in &mut self.pairs {
            pair.set_lingering(now, lingering.contains(member));
        }
        let parked = self.parked.take(now, |device, message| {
            self.pairs.values().any(|pair| pair.is_with(device, &message.session))
        });
        for (device, message) in parked {
            if let Some(pair) = self.pairs.values_mut().find(|pair| pair.is_with(&device, &message.session)) {
                pair.message(now, &mut self.desk, message);
            }
        }
    }
}

impl Desk {
    fn message_id(&mut self) -> MessageId {
        let id = MessageId(self.next_message);
        self.next_message += 1;
        id
    }

    fn call_number(&mut self) -> u64 {
        let number = self.next_call;
        self.next_call += 1;
        number
    }

    fn call_id(&mut self) -> CallId {
        CallId((&mut self.rng).sample_iter(Alphanumeric).take(22).map(char::from).collect())
    }
}

// Contents of messages name addresses and are left out.
impl fmt::Debug for SignallingInput<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Peers { peers, moved, lingering } => f
                .debug_struct("Peers")
                .field("peers", peers)
                .field("moved", moved)
                .field("lingering", lingering)
                .finish(),
            Self::Message { from, event_type, .. } => {
                f.debug_struct("Message").field("from", from).field("event_type", event_type).finish()
            }
            Self::Sent { id, result } => {
                f.debug_struct("Sent").field("id", id).field("result", result).finish()
            }
            Self::Opened { connection, result } => {
                f.debug_struct("Opened").field("connection", connection).field("result", result).finish()
            }
            Self::Negotiated { connection, event } => {
                f.debug_struct("Negotiated").field("connection", connection).field("event", event).finish()
            }
            Self::TrustChanged(user_id) => f.debug_tuple("TrustChanged").field(user_id).finish(),
            Self::Leave => f.write_str("Leave"),
        }
    }
}

impl fmt::Debug for SignallingOutput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Send { id, to, event_type, .. } => f
                .debug_struct("Send")
                .field("id", id)
                .field("to", to)
                .field("event_type", event_type)
                .finish(),
            Self::Open { connection, member } => {
                f.debug_struct("Open").field("connection", connection).field("member", member).finish()
            }
            Self::Negotiate { connection, command } => {
                f.debug_struct("Negotiate").field("connection", connection).field("command", command).finish()
            }
            Self::Close { connection, .. } => {
                f.debug_struct("Close").field("connection", connection).finish()
            }
            Self::Connected { connection, member } => {
                f.debug_struct("Connected").field("connection", connection).field("member", member).finish()
            }
            Self::Failed { member, reason, failures } => f
                .debug_struct("Failed")
                .field("member", member)
                .field("reason", reason)
                .field("failures", failures)
                .finish(),
        }
    }
}

#[cfg(any(test, feature = "fuzzing"))]
pub use self::properties::mesh_message;

#[cfg(any(test, feature = "fuzzing"))]
mod properties;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;
