//! One pair: who calls, what happens to crossing invites, and when the next attempt follows a failure.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use super::{
    Desk, MessageId, SignallingOutput, Us,
    attempt::{Attempt, Duty, Talk},
    outbox::{Kind, Outbox},
    parked::Parked,
};
use crate::{
    matrix::Delivery,
    member::Device,
    time::{FIRST_RETRY, retry_delay},
    transport::{
        ConnectionId, MeshSession,
        mesh::{
            MeshPeer, Negotiated,
            wire::{self, Body, CallId, Envelope, Message, Reason},
        },
    },
};

/// How long a callee waits for an invite before it places the call itself.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long an invite of the other side may cross ours, although our call was answered: messages may overtake each
/// other.
const RACE: Duration = Duration::from_secs(20);
/// A connection that lasted this long starts counting failures anew.
const STABLE_AFTER: Duration = Duration::from_secs(30);
/// Invites of the other side are taken at most this often.
const INVITE_EVERY: Duration = Duration::from_millis(500);
/// When a device that we refuse is tried again, unless trust changes before.
const REFUSED_WAIT: Duration = Duration::from_secs(300);
/// Calls that are over and remembered, so that their late messages are ignored.
const MAX_ENDED: usize = 8;
/// Messages that wait for the invite of their call.
const MAX_EARLY: usize = 16;

/// One pair of members.
#[derive(Debug)]
pub(super) struct Pair {
    peer: MeshPeer,
    route: u32,
    next_generation: u32,
    /// Whether we are the caller by order.
    we_call: bool,
    /// Failures in a row.
    failures: u32,
    /// A focus carries the media: no call is placed any more.
    lingers: bool,
    /// When we place the call, unless a call is under way by then.
    call_at: Instant,
    attempt: Option<Attempt>,
    outbox: Outbox,
    early: Parked,
    ended: VecDeque<CallId>,
    /// The highest number among the invites of the other side that were taken.
    latest_invite: Option<u64>,
    /// When the latest one was taken.
    last_invited: Option<Instant>,
    /// Whether our policy, or the owner of the device, keeps us from sending to it.
    refused: bool,
}

impl Pair {
    /// A pair without a call.
    pub(super) fn new(now: Instant, us: &Us, peer: MeshPeer, route: u32) -> Self {
        let (ours, theirs) = (&us.device, &peer.device);
        let rank = |device: &Device, session: &MeshSession| {
            (device.user_id.to_string(), device.device_id.to_string(), session.0.clone())
        };
        let we_call = rank(ours, &us.session) > rank(theirs, &peer.session);
        Self {
            peer,
            route,
            next_generation: 0,
            we_call,
            failures: 0,
            lingers: false,
            call_at: if we_call { now } else { now + PATIENCE },
            attempt: None,
            outbox: Outbox::default(),
            early: Parked::new(MAX_EARLY),
            ended: VecDeque::new(),
            latest_invite: None,
            last_invited: None,
            refused: false,
        }
    }

    /// The other side.
    pub(super) fn peer(&self) -> &MeshPeer {
        &self.peer
    }

    /// Whether the other side is this session of this device.
    pub(super) fn is_with(&self, device: &Device, session: &MeshSession) -> bool {
        self.peer.device == *device && self.peer.session == *session
    }

    /// Whether we are the caller by order.
    pub(super) fn is_caller(&self) -> bool {
        self.we_call
    }

    /// The connection that is open or being opened.
    pub(super) fn connection(&self) -> Option<ConnectionId> {
        self.attempt.as_ref().map(Attempt::connection)
    }

    /// Whether a focus carries the media. A pair that is wanted again without having ended begins as a new one does.
    pub(super) fn set_lingering(&mut self, now: Instant, lingers: bool) {
        if std::mem::replace(&mut self.lingers, lingers) && !lingers && self.attempt.is_none() {
            self.failures = 0;
            self.call_from(now);
        }
    }

    /// Takes a message of the other side.
    pub(super) fn message(&mut self, now: Instant, desk: &mut Desk, message: Message) {
        if self.ended.contains(&message.call) {
            return;
        }
        if self.attempt.as_ref().is_some_and(|attempt| *attempt.call() == message.call) {
            self.message_of_call(now, desk, message);
            return;
        }
        match message.body {
            Body::Invite { number, .. } => self.invited(now, desk, number, message),
            // It overtook its invite.
            Body::Hangup(_) => self.remember_end(message.call),
            Body::Answer { .. } => {}
            _ => self.early.park(now, &self.peer.device, message),
        }
    }

    /// The connection was opened, or could not be.
    pub(super) fn opened(&mut self, now: Instant, desk: &mut Desk, result: Result<(), String>) {
        match result {
            Ok(()) => self.with_attempt(now, desk, |attempt, talk| attempt.opened(talk)),
            Err(cause) => self.fail(now, desk, Some(Reason::UnknownError), cause),
        }
    }

    /// The connection answered.
    pub(super) fn negotiated(&mut self, now: Instant, desk: &mut Desk, event: Negotiated) {
        match event {
            Negotiated::Failed(cause) => self.fail(now, desk, Some(Reason::UnknownError), cause),
            event => self.with_attempt(now, desk, |attempt, talk| attempt.negotiated(talk, event)),
        }
    }

    /// Takes the outcome of a message; whether it was one of these.
    pub(super) fn sent(&mut self, now: Instant, desk: &mut Desk, id: MessageId, result: &Delivery) -> bool {
        if !self.outbox.sent(now, id, result) {
            return false;
        }
        if let Err(failure) = result
            && failure.is_policy()
        {
            self.fail(now, desk, None, failure.to_string());
            self.outbox = Outbox::default();
            self.refused = true;
            self.call_at = now + REFUSED_WAIT;
        }
        true
    }

    /// The other side's device may be trusted now.
    pub(super) fn trust_changed(&mut self, now: Instant) {
        if std::mem::take(&mut self.refused) {
            self.call_from(now);
        }
    }

    /// Does what is due.
    pub(super) fn advance(&mut self, now: Instant, desk: &mut Desk) {
        self.early.expire(now);
        let duty = match &mut self.attempt {
            Some(attempt) => {
                let mut talk = Talk { now, desk, outbox: &mut self.outbox, peer: &self.peer };
                attempt.advance(&mut talk)
            }
            None if now >= self.call_at && !self.lingers => {
                let call = desk.call_id();
                self.start(now, desk, call, true);
                Duty::Nothing
            }
            None => Duty::Nothing,
        };
        if let Duty::GiveUp(reason) = duty {
            let cause = match reason {
                Reason::InviteTimeout => "the other side did not answer",
                Reason::IceTimeout => "no path to the other side was found",
                _ => "the path to the other side was lost",
            };
            self.fail(now, desk, Some(reason), cause.to_owned());
        }
        loop {
            let id = desk.message_id();
            let Some((event_type, content)) = self.outbox.next(now, id) else { break };
            let to = self.peer.device.clone();
            desk.outputs.push_back(SignallingOutput::Send { id, to, event_type, content });
        }
    }

    /// Ends the pair. `reason` is told to the other side if it knows of the call.
    pub(super) fn close(mut self, desk: &mut Desk, reason: Option<Reason>) {
        let Some(attempt) = self.attempt.take() else { return };
        let member = self.peer.member.clone();
        desk.outputs.push_back(SignallingOutput::Close { connection: attempt.connection(), member });
        if let Some(reason) = reason.filter(|_| attempt.is_known()) {
            let (event_type, content) = hangup(desk, &self.peer, &attempt, reason);
            let id = desk.message_id();
            desk.outputs.push_back(SignallingOutput::Send { id, to: self.peer.device, event_type, content });
        }
    }

    /// When something is due by time alone.
    pub(super) fn wake_at(&self) -> Option<Instant> {
        let next = Some(self.call_at).filter(|_| !self.lingers);
        let call = self.attempt.as_ref().map_or(next, Attempt::wake_at);
        call.into_iter().chain(self.outbox.wake_at()).chain(self.early.wake_at()).min()
    }

    /// The caller calls at `at`; the callee calls if nobody has by then and its patience is over.
    fn call_from(&mut self, at: Instant) {
        self.call_at = if self.we_call { at } else { at + PATIENCE };
    }

    fn with_attempt(&mut self, now: Instant, desk: &mut Desk, act: impl FnOnce(&mut Attempt, &mut Talk<'_>)) {
        if let Some(attempt) = &mut self.attempt {
            act(attempt, &mut Talk { now, desk, outbox: &mut self.outbox, peer: &self.peer });
        }
    }

    fn message_of_call(&mut self, now: Instant, desk: &mut Desk, message: Message) {
        let Message { seq, body, .. } = message;
        // A hangup is taken at once: what is missing before it does not matter any more.
        match body {
            Body::Hangup(reason @ (Reason::UserHangup | Reason::Moved)) => {
                self.end_call(desk, None);
                // A membership without a call comes soon after it, but a membership with a focus came long before: if
                // we did not get it, or the member has moved back already, we may call.
                let wait = if reason == Reason::Moved { FIRST_RETRY } else { PATIENCE };
                self.call_from(now + wait);
            }
            Body::Hangup(reason) => {
                self.fail(now, desk, None, format!("the other side hung up: {}", reason.as_str()));
            }
            body => self.with_attempt(now, desk, |attempt, talk| attempt.message(talk, seq, body)),
        }
    }

    fn invited(&mut self, now: Instant, desk: &mut Desk, number: Option<u64>, message: Message) {
        if number.is_some_and(|number| self.latest_invite.is_some_and(|latest| number <= latest)) {
            return;
        }
        if let Some(attempt) = self.attempt.as_ref().filter(|attempt| attempt.is_ours() && attempt.is_known())
        {
            let answered = attempt.is_answered();
            let races = !answered || now < attempt.started() + RACE;
            if races && *attempt.call() < message.call {
                if !answered {
                    self.remember_end(message.call);
                }
                return;
            }
        }
        // Each invite costs a connection. The one that is ignored here comes again.
        if self.last_invited.is_some_and(|at| now < at + INVITE_EVERY) {
            return;
        }
        self.last_invited = Some(now);
        self.latest_invite = number.or(self.latest_invite);
        // The other side has given the present call up, or does so when our invite arrives.
        self.end_call(desk, None);
        let call = message.call.clone();
        self.start(now, desk, call.clone(), false);
        self.message_of_call(now, desk, message);
        for (_, message) in self.early.take(now, |_, message| message.call == call) {
            self.message_of_call(now, desk, message);
        }
    }

    fn start(&mut self, now: Instant, desk: &mut Desk, call: CallId, ours: bool) {
        let connection = ConnectionId { route: self.route, generation: self.next_generation };
        self.next_generation = self.next_generation.saturating_add(1);
        self.attempt = Some(Attempt::new(now, connection, call, ours));
        let member = self.peer.member.clone();
        desk.outputs.push_back(SignallingOutput::Open { connection, member });
    }

    /// Ends the present call and sends `reason` if the other side knows of it.
    fn end_call(&mut self, desk: &mut Desk, reason: Option<Reason>) -> Option<Attempt> {
        let attempt = self.attempt.take()?;
        let member = self.peer.member.clone();
        desk.outputs.push_back(SignallingOutput::Close { connection: attempt.connection(), member });
        self.remember_end(attempt.call().clone());
        self.outbox.end();
        if let Some(reason) = reason.filter(|_| attempt.is_known()) {
            self.outbox.push(Kind::Hangup, hangup(desk, &self.peer, &attempt, reason));
        }
        Some(attempt)
    }

    fn fail(&mut self, now: Instant, desk: &mut Desk, reason: Option<Reason>, cause: String) {
        let Some(attempt) = self.end_call(desk, reason) else { return };
        if attempt.up_at().is_some_and(|at| now.saturating_duration_since(at) >= STABLE_AFTER) {
            self.failures = 0;
        }
        self.failures = self.failures.saturating_add(1);
        let wait = retry_delay(self.failures, None);
        self.call_from(now + wait);
        desk.outputs.push_back(SignallingOutput::Failed {
            member: self.peer.member.clone(),
            reason: cause,
            failures: self.failures,
        });
    }

    fn remember_end(&mut self, call: CallId) {
        if self.ended.len() >= MAX_ENDED {
            self.ended.pop_front();
        }
        self.ended.push_back(call);
    }

    /// How many messages and calls are kept.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(super) fn kept(&self) -> usize {
        self.outbox.len() + self.early.len() + self.ended.len()
    }

    /// The call, if media flows.
    #[cfg(test)]
    pub(super) fn call_that_is_up(&self) -> Option<&CallId> {
        self.attempt.as_ref().filter(|attempt| attempt.up_at().is_some()).map(Attempt::call)
    }
}

fn hangup(
    desk: &Desk,
    peer: &MeshPeer,
    attempt: &Attempt,
    reason: Reason,
) -> (&'static str, serde_json::Value) {
    let envelope = Envelope { us: &desk.us, to: &peer.device, session: &peer.session };
    wire::write(envelope, attempt.call(), attempt.next_seq(), &Body::Hangup(reason))
}
