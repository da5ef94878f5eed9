//! One attempt to connect a pair: the negotiation of one connection, from its opening to its end.
//!
//! The caller makes every offer, one at a time. The other side's candidates wait here until its description was given
//! to the connection, and our messages wait until our description was sent.

use std::time::{Duration, Instant};

use super::{
    Desk, SignallingOutput,
    order::{Arrival, Order},
    outbox::{Kind, Outbox},
};
use crate::transport::{
    ConnectionId,
    mesh::{
        Candidate, MeshPeer, Negotiate, Negotiated, Sdp, Streams,
        wire::{self, Body, CallId, Envelope, Reason},
    },
};

/// How long an attempt may take until the connection is up.
const CONNECT_TIME: Duration = Duration::from_secs(20);
/// How long a connection may be without a path before the caller looks for another.
const RESTART_AFTER: Duration = Duration::from_secs(2);
/// How long a connection may be without a path.
const LOST_AFTER: Duration = Duration::from_secs(20);
/// How long candidates are collected.
const COLLECT: Duration = Duration::from_millis(500);
/// First wait before our messages are sent again; it doubles.
const RESEND_BASE: Duration = Duration::from_secs(3);
const RESEND_MAX: Duration = Duration::from_secs(30);
/// How often a callee repeats its wish for an offer: the caller may see no reason for one.
const MAX_WISHES: u32 = 3;
/// Least time between two repetitions of an answer.
const REPEAT_AFTER: Duration = Duration::from_secs(1);
/// Most candidates of one side in one round.
const MAX_CANDIDATES: usize = 256;
/// Candidates in one message of ours.
const CANDIDATES_PER_MESSAGE: usize = 64;

/// What an attempt needs to act.
pub(super) struct Talk<'a> {
    pub(super) now: Instant,
    pub(super) desk: &'a mut Desk,
    pub(super) outbox: &'a mut Outbox,
    pub(super) peer: &'a MeshPeer,
}

/// What the pair has to do about its attempt.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Duty {
    Nothing,
    GiveUp(Reason),
}

/// Where the exchange of descriptions is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Round {
    /// No description is under way.
    Quiet,
    /// The connection makes an offer.
    Offering,
    /// Our offer waits for its answer.
    Offered,
    /// The connection answers the offer with this number.
    Answering { seq: u64 },
    /// The offer with this number was answered.
    Answered { seq: u64 },
}

#[derive(Clone, Copy, Debug)]
enum Path {
    Searching,
    Up,
    Lost { since: Instant, restarted: bool },
}

/// The negotiation of one connection.
#[derive(Debug)]
pub(super) struct Attempt {
    connection: ConnectionId,
    call: CallId,
    /// Whether we are the caller.
    ours: bool,
    started: Instant,
    opened: bool,
    up_at: Option<Instant>,
    path: Path,
    round: Round,
    /// Caller: another offer follows this round; whether it restarts ICE.
    next_offer: Option<bool>,
    /// Callee: an offer that the connection has not been given yet, with its number.
    offer: Option<(u64, Sdp, Streams)>,
    /// Callee: we announced streams that have no section.
    wants_offer: bool,
    /// Whether the connection was given a description of the other side.
    described: bool,
    /// Whether our first description was sent.
    spoken: bool,
    /// Our number of messages.
    seq: u64,
    order: Order,
    /// Their candidates, until the connection can take them.
    remote_candidates: Vec<Candidate>,
    /// How many of them came in this round.
    remote_count: usize,
    /// Their streams, until the connection can take them.
    remote_streams: Option<Streams>,
    /// Number of the message that described their streams last.
    streams_seq: Option<u64>,
    /// Our candidates, until they are sent.
    local_candidates: Vec<Candidate>,
    /// When they are sent.
    flush_at: Option<Instant>,
    /// Our streams, until our description is sent.
    local_streams: Option<Streams>,
    /// When our messages are sent again.
    resend_at: Instant,
    resends: u32,
    /// When our answer may be repeated.
    repeat_at: Instant,
}

impl Attempt {
    pub(super) fn new(now: Instant, connection: ConnectionId, call: CallId, ours: bool) -> Self {
        Self {
            connection,
            call,
            ours,
            started: now,
            opened: false,
            up_at: None,
            path: Path::Searching,
            round: Round::Quiet,
            next_offer: None,
            offer: None,
            wants_offer: false,
            described: false,
            spoken: false,
            seq: 0,
            order: Order::default(),
            remote_candidates: Vec::new(),
            remote_count: 0,
            remote_streams: None,
            streams_seq: None,
            local_candidates: Vec::new(),
            flush_at: None,
            local_streams: None,
            resend_at: now,
            resends: 0,
            repeat_at: now,
        }
    }

    pub(super) fn connection(&self) -> ConnectionId {
        self.connection
    }

    pub(super) fn call(&self) -> &CallId {
        &self.call
    }

    /// Whether we are the caller.
    pub(super) fn is_ours(&self) -> bool {
        self.ours
    }

    pub(super) fn started(&self) -> Instant {
        self.started
    }

    /// Whether the other side may know of this call.
    pub(super) fn is_known(&self) -> bool {
        !self.ours || self.spoken
    }

    /// Whether the other side has answered our invite.
    pub(super) fn is_answered(&self) -> bool {
        self.ours && self.described
    }

    /// When media began to flow.
    pub(super) fn up_at(&self) -> Option<Instant> {
        self.up_at
    }

    /// The number of our next message.
    pub(super) fn next_seq(&self) -> u64 {
        self.seq
    }

    /// The connection is open.
    pub(super) fn opened(&mut self, talk: &mut Talk<'_>) {
        if self.opened {
            return;
        }
        self.opened = true;
        if self.ours {
            self.make_offer(talk, false);
        } else {
            self.take_offer(talk);
        }
    }

    /// Takes a message of this call, other than a hangup.
    pub(super) fn message(&mut self, talk: &mut Talk<'_>, seq: u64, body: Body) {
        match self.order.push(talk.now, seq, body) {
            Arrival::Queued => {
                self.heard(talk.now);
                self.drain(talk);
            }
            Arrival::Late(body) => {
                self.heard(talk.now);
                self.take(talk, seq, body);
            }
            Arrival::Duplicate(Body::Invite { .. } | Body::Offer { .. }) => {
                if self.round == (Round::Answered { seq }) && talk.now >= self.repeat_at {
                    self.repeat_at = talk.now + REPEAT_AFTER;
                    talk.outbox.resend();
                }
            }
            Arrival::Duplicate(_) | Arrival::Refused => {}
        }
    }

    /// The connection answered with something other than a failure.
    pub(super) fn negotiated(&mut self, talk: &mut Talk<'_>, event: Negotiated) {
        match event {
            Negotiated::Offer { sdp, streams } if self.round == Round::Offering => {
                self.round = Round::Offered;
                let number = (!self.spoken).then(|| talk.desk.call_number());
                let announced = streams.clone();
                let body = match number {
                    number @ Some(_) => Body::Invite { sdp, streams, number },
                    None => Body::Offer { sdp, streams },
                };
                self.described_us(talk, &body, &announced);
            }
            Negotiated::Answer { sdp, streams } => {
                let Round::Answering { seq } = self.round else { return };
                self.round = Round::Answered { seq };
                let announced = streams.clone();
                let body = if self.spoken {
                    Body::LaterAnswer { sdp, streams }
                } else {
                    Body::Answer { sdp, streams }
                };
                self.described_us(talk, &body, &announced);
                self.take_offer(talk);
            }
            Negotiated::Candidates(candidates) => self.collect(talk, candidates, COLLECT),
            Negotiated::CandidatesEnd => {
                let end = Candidate { candidate: String::new(), mid: None, index: None };
                self.collect(talk, vec![end], Duration::ZERO);
            }
            Negotiated::Streams(streams) => self.announce(talk, streams),
            Negotiated::Needed { streams } if !self.ours => {
                self.wants_offer = true;
                self.heard(talk.now);
                self.announce(talk, streams);
            }
            Negotiated::Needed { .. } => self.want_offer(talk, false),
            Negotiated::Up => {
                self.path = Path::Up;
                if self.up_at.is_none() {
                    self.up_at = Some(talk.now);
                    talk.desk.outputs.push_back(SignallingOutput::Connected {
                        connection: self.connection,
                        member: talk.peer.member.clone(),
                    });
                }
            }
            Negotiated::Interrupted => {
                if matches!(self.path, Path::Up) {
                    self.path = Path::Lost { since: talk.now, restarted: false };
                }
            }
            Negotiated::Offer { .. } | Negotiated::Failed(_) => {}
        }
    }

    /// Does what is due.
    pub(super) fn advance(&mut self, talk: &mut Talk<'_>) -> Duty {
        let now = talk.now;
        self.drain(talk);
        match self.path {
            Path::Searching if now >= self.started + CONNECT_TIME => {
                let unanswered = self.ours && !self.described;
                let reason = if unanswered { Reason::InviteTimeout } else { Reason::IceTimeout };
                return Duty::GiveUp(reason);
            }
            Path::Lost { since, .. } if now >= since + LOST_AFTER => {
                return Duty::GiveUp(Reason::IceFailed);
            }
            Path::Lost { since, restarted: false } if self.ours && now >= since + RESTART_AFTER => {
                self.path = Path::Lost { since, restarted: true };
                self.want_offer(talk, true);
            }
            _ => {}
        }
        if self.may_follow() && self.flush_at.is_some_and(|at| now >= at) {
            self.flush(talk);
        }
        if self.resends_messages() && now >= self.resend_at {
            self.resends = self.resends.saturating_add(1);
            let wait = RESEND_BASE.saturating_mul(1 << self.resends.min(8)).min(RESEND_MAX);
            self.resend_at = now + wait;
            talk.outbox.resend();
        }
        Duty::Nothing
    }

    /// When something is due by time alone.
    pub(super) fn wake_at(&self) -> Option<Instant> {
        let path = match self.path {
            Path::Searching => Some(self.started + CONNECT_TIME),
            Path::Up => None,
            Path::Lost { since, restarted: false } if self.ours => Some(since + RESTART_AFTER),
            Path::Lost { since, .. } => Some(since + LOST_AFTER),
        };
        let flush = self.flush_at.filter(|_| self.may_follow());
        let resend = self.resends_messages().then_some(self.resend_at);
        [path, flush, resend, self.order.wake_at()].into_iter().flatten().min()
    }

    fn drain(&mut self, talk: &mut Talk<'_>) {
        while let Some((seq, body)) = self.order.next(talk.now) {
            self.take(talk, seq, body);
        }
    }

    fn take(&mut self, talk: &mut Talk<'_>, seq: u64, body: Body) {
        match body {
            Body::Invite { sdp, streams, .. } | Body::Offer { sdp, streams } if !self.ours => {
                let latest = match (&self.offer, self.round) {
                    (Some((latest, ..)), _) => Some(*latest),
                    (None, Round::Answering { seq } | Round::Answered { seq }) => Some(seq),
                    _ => None,
                };
                if latest.is_none_or(|latest| seq > latest) {
                    self.offer = Some((seq, sdp, streams));
                    self.take_offer(talk);
                }
            }
            Body::Answer { sdp, streams } | Body::LaterAnswer { sdp, streams }
                if self.round == Round::Offered =>
            {
                self.round = Round::Quiet;
                self.streams_described(seq);
                self.tell(talk, Negotiate::TakeAnswer { sdp, streams });
                self.described = true;
                self.flush_remote(talk);
                if let Some(restart_ice) = self.next_offer.take() {
                    self.make_offer(talk, restart_ice);
                }
            }
            Body::Candidates(candidates) => {
                let room = MAX_CANDIDATES.saturating_sub(self.remote_count);
                let before = self.remote_candidates.len();
                self.remote_candidates.extend(candidates.into_iter().take(room));
                self.remote_count += self.remote_candidates.len() - before;
                self.flush_remote(talk);
            }
            Body::Streams(streams) if self.streams_seq.is_none_or(|latest| seq > latest) => {
                self.streams_seq = Some(seq);
                self.remote_streams = Some(streams);
                self.flush_remote(talk);
            }
            _ => {}
        }
    }

    /// Gives a waiting offer to the connection, unless it is busy with another.
    fn take_offer(&mut self, talk: &mut Talk<'_>) {
        if !self.opened || matches!(self.round, Round::Answering { .. }) {
            return;
        }
        let Some((seq, sdp, streams)) = self.offer.take() else { return };
        self.round = Round::Answering { seq };
        self.wants_offer = false;
        self.streams_described(seq);
        self.tell(talk, Negotiate::Answer { sdp, streams });
        self.described = true;
        self.flush_remote(talk);
    }

    /// A description with this number describes the streams, too.
    fn streams_described(&mut self, seq: u64) {
        self.remote_count = self.remote_candidates.len();
        if self.streams_seq.is_none_or(|latest| seq > latest) {
            self.streams_seq = Some(seq);
            self.remote_streams = None;
        }
    }

    /// Gives what waited for a description to the connection.
    fn flush_remote(&mut self, talk: &mut Talk<'_>) {
        if !self.described || self.offer.is_some() {
            return;
        }
        let candidates = std::mem::take(&mut self.remote_candidates);
        if !candidates.is_empty() {
            self.tell(talk, Negotiate::Candidates(candidates));
        }
        if let Some(streams) = self.remote_streams.take() {
            self.tell(talk, Negotiate::Streams(streams));
        }
    }

    /// Caller: offers now, or after the present round.
    fn want_offer(&mut self, talk: &mut Talk<'_>, restart_ice: bool) {
        if !self.ours || !self.opened {
            return;
        }
        if self.round == Round::Quiet {
            self.make_offer(talk, restart_ice);
        } else {
            self.next_offer = Some(restart_ice || self.next_offer == Some(true));
        }
    }

    fn make_offer(&mut self, talk: &mut Talk<'_>, restart_ice: bool) {
        self.round = Round::Offering;
        self.tell(talk, Negotiate::Offer { restart_ice });
    }

    /// Sends our description, and what waited for it.
    fn described_us(&mut self, talk: &mut Talk<'_>, body: &Body, streams: &Streams) {
        self.send(talk, Kind::Description, body);
        self.spoken = true;
        self.heard(talk.now);
        if let Some(waiting) = self.local_streams.take().filter(|it| self.wants_offer || it != streams) {
            self.send(talk, Kind::Streams, &Body::Streams(waiting));
        }
        if let Some(last) = self.local_candidates.last() {
            let wait = if last.candidate.is_empty() { Duration::ZERO } else { COLLECT };
            self.flush_at = Some(talk.now + wait);
        }
    }

    /// Tells the other side our streams.
    fn announce(&mut self, talk: &mut Talk<'_>, streams: Streams) {
        if self.may_follow() {
            self.send(talk, Kind::Streams, &Body::Streams(streams));
        } else {
            self.local_streams = Some(streams);
        }
    }

    fn collect(&mut self, talk: &Talk<'_>, candidates: Vec<Candidate>, wait: Duration) {
        let room = MAX_CANDIDATES.saturating_sub(self.local_candidates.len());
        self.local_candidates.extend(candidates.into_iter().take(room));
        let at = talk.now + wait;
        self.flush_at = Some(self.flush_at.map_or(at, |known| known.min(at)));
    }

    fn flush(&mut self, talk: &mut Talk<'_>) {
        self.flush_at = None;
        let candidates = std::mem::take(&mut self.local_candidates);
        for part in candidates.chunks(CANDIDATES_PER_MESSAGE) {
            self.send(talk, Kind::Follower, &Body::Candidates(part.to_vec()));
        }
    }

    /// Whether messages that follow a description may be sent.
    fn may_follow(&self) -> bool {
        self.spoken && !matches!(self.round, Round::Offering | Round::Answering { .. })
    }

    /// Whether our messages are sent again until something new is heard.
    fn resends_messages(&self) -> bool {
        let wishes = self.wants_offer && self.resends < MAX_WISHES;
        self.spoken && (self.up_at.is_none() || self.round == Round::Offered || wishes)
    }

    /// Something new was heard or said: our messages need not be sent again for a while.
    fn heard(&mut self, now: Instant) {
        self.resends = 0;
        self.resend_at = now + RESEND_BASE;
    }

    fn send(&mut self, talk: &mut Talk<'_>, kind: Kind, body: &Body) {
        let Talk { desk, peer, outbox, .. } = talk;
        let envelope = Envelope { us: &desk.us, to: &peer.device, session: &peer.session };
        outbox.push(kind, wire::write(envelope, &self.call, self.seq, body));
        self.seq += 1;
    }

    fn tell(&self, talk: &mut Talk<'_>, command: Negotiate) {
        let connection = self.connection;
        talk.desk.outputs.push_back(SignallingOutput::Negotiate { connection, command });
    }
}
