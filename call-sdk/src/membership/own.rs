//! Our own membership: published, kept alive by a delayed leave, refreshed before it expires, and left.
//!
//! [`OwnMembership`] decides and the shell performs. After every [`OwnMembership::handle`], and when a wait is
//! over, the shell drains [`OwnMembership::poll`] until it says [`Output::WaitUntil`] or [`Output::Idle`]. At
//! most one request is under way at a time; the shell performs it once, within its timeout, and replies.
//!
//! *Assumptions.* A delayed leave (MSC4140) that is not restarted in time is sent by the homeserver, and ends our
//! membership. Writing the membership again does not cancel it, except on servers that do (the restart right
//! after joining detects those). The shell tells us after each sync whether our membership is in the roster and
//! when the homeserver says it was created.

use std::{
    collections::{BTreeMap, VecDeque},
    time::{Duration, Instant},
};

use super::wire::OwnDescription;
use crate::time::{Now, UnixMillis};

mod config;
mod delayed_leave;
mod delegation;
mod messages;
mod replies;
mod steps;

pub use config::OwnConfig;
pub use messages::{Event, Input, Output, Reply, Request, RequestError, RequestId, Status};

use delayed_leave::{DelayLimit, Delayed, MAX_CANCEL_TRIES, MAX_STALE, Stale, Support};
use delegation::Delegation;
use steps::{Kind, Step};

/// Everybody sends us a key when we renew, so it is done sparingly.
const RENEW_INTERVAL: Duration = Duration::from_secs(60);

/// The state machine of our own membership. See the [module](self).
#[derive(Debug)]
pub struct OwnMembership {
    config: OwnConfig,
    phase: Phase,
    status: Status,
    probably_left: bool,
    own: Option<OwnDescription>,
    /// A join that came while leaving.
    next_join: Option<OwnDescription>,
    events: VecDeque<Event>,
    last_id: u64,
    in_flight: Option<InFlight>,
    tries: BTreeMap<Kind, Tries>,
    support: Support,
    delay: DelayLimit,
    delayed: Option<Delayed>,
    delegation: Delegation,
    /// Delayed leaves that must not fire.
    stale: VecDeque<Stale>,
    /// Abandoned requests that may yet have scheduled a delayed leave.
    orphans: VecDeque<RequestId>,
    /// Whether the homeserver may list us.
    maybe_published: bool,
    /// Rejoins since our membership was last seen.
    unseen_rejoins: u32,
    last_renewal: Option<Instant>,
}

impl OwnMembership {
    /// A membership that is not published.
    #[must_use]
    pub fn new(config: OwnConfig) -> Self {
        Self {
            config,
            phase: Phase::Idle,
            status: Status::Disconnected,
            probably_left: false,
            own: None,
            next_join: None,
            events: VecDeque::new(),
            last_id: 0,
            in_flight: None,
            tries: BTreeMap::new(),
            support: Support::Wanted,
            delay: DelayLimit::default(),
            delayed: None,
            delegation: Delegation::default(),
            stale: VecDeque::new(),
            orphans: VecDeque::new(),
            maybe_published: false,
            unseen_rejoins: 0,
            last_renewal: None,
        }
    }

    /// Takes in what happened. Drain [`Self::poll`] after it.
    pub fn handle(&mut self, now: Now, input: Input) {
        match input {
            Input::Join(own) => match self.phase {
                Phase::Idle => self.join(own),
                Phase::Joining | Phase::Joined(_) => {}
                Phase::Leaving(_) => self.next_join = Some(own),
            },
            Input::Leave => self.leave(now),
            Input::SetIntent(intent) => {
                if let (Phase::Joining | Phase::Joined(_), Some(own)) = (&self.phase, &mut self.own) {
                    own.intent = intent;
                }
            }
            Input::OwnSeen(seen) => self.seen(now, seen),
            Input::OwnCreated(created) => {
                if let Phase::Joined(joined) = &mut self.phase {
                    // The greatest: a sync may still bring the membership that ours has replaced.
                    joined.created = joined.created.max(Some(created));
                }
            }
            Input::OfferDelegation => self.offer_delegation(),
            Input::Renew => self.renew(now),
            Input::Reply { id, result } => self.reply(now, id, result),
        }
    }

    /// What to do now. To be called until it says to wait.
    pub fn poll(&mut self, now: Now) -> Output {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Output::Event(event);
            }
            let timer = self.advance(now);
            if !self.events.is_empty() {
                continue;
            }
            let wait = if let Some(in_flight) = &self.in_flight {
                Some(earliest(timer, in_flight.lost_at))
            } else {
                match self.next_step(now.instant) {
                    Step::Start(kind) => return self.start(now, kind),
                    Step::FinishLeaving => {
                        self.finish_leaving();
                        continue;
                    }
                    Step::WaitUntil(at) => Some(earliest(timer, at)),
                    Step::Nothing => timer,
                }
            };
            return wait.map_or(Output::Idle, Output::WaitUntil);
        }
    }

    /// Whether we are a member, as far as we know.
    #[must_use]
    pub fn status(&self) -> Status {
        self.status
    }

    fn join(&mut self, own: OwnDescription) {
        self.own = Some(own);
        self.tries.clear();
        self.support = Support::Wanted;
        self.unseen_rejoins = 0;
        self.discard_delayed_leave();
        self.restart_delegation();
        self.phase = Phase::Joining;
        self.set_status(Status::Connecting);
    }

    /// Publishes from scratch: the homeserver does not list us any more.
    fn rejoin(&mut self) {
        // A new delayed leave that is just being scheduled serves the new membership as well.
        if self.in_flight.as_ref().is_some_and(|request| request.kind.concerns_delayed_leave()) {
            self.abandon_request();
        }
        if self.support == Support::Failed {
            self.support = Support::Wanted;
        }
        self.discard_delayed_leave();
        self.restart_delegation();
        self.phase = Phase::Joining;
        self.set_status(Status::Connecting);
    }

    fn leave(&mut self, now: Now) {
        self.next_join = None;
        match self.phase {
            Phase::Leaving(_) => return,
            Phase::Idle if !self.maybe_published => return,
            _ => {}
        }
        match &mut self.in_flight {
            // Its outcome says what there is to leave, and two writes must not race on their way to the server.
            Some(request) if matches!(request.kind, Kind::ScheduleLeave | Kind::PutMembership) => {
                request.lost_at = request.lost_at.min(later(now.instant, self.config.leave_timeout / 2));
            }
            _ => self.abandon_request(),
        }
        self.tries.clear();
        self.stop_delegation();
        self.phase = Phase::Leaving(Leaving {
            deadline: later(now.instant, self.config.leave_timeout),
            send_failed: false,
        });
        self.set_status(Status::Disconnecting);
    }

    fn finish_leaving(&mut self) {
        self.abandon_request();
        self.phase = Phase::Idle;
        self.own = None;
        self.tries.clear();
        self.set_status(Status::Disconnected);
        if let Some(own) = self.next_join.take() {
            self.join(own);
        }
    }

    fn fatal(&mut self, message: String) {
        self.stop_delegation();
        self.phase = Phase::Idle;
        self.own = None;
        self.tries.clear();
        self.events.push_back(Event::Fatal { message });
        self.set_status(Status::Disconnected);
    }

    fn seen(&mut self, now: Now, seen: bool) {
        let Phase::Joined(joined) = &mut self.phase else { return };
        if seen {
            joined.seen = true;
            joined.rejoin_at = None;
            self.unseen_rejoins = 0;
        } else if joined.rejoin_at.is_none() {
            let backoff = 1 << if joined.seen { 0 } else { self.unseen_rejoins.min(6) };
            let at = later(joined.since.instant, self.config.missing_grace.saturating_mul(backoff));
            joined.rejoin_at = Some(at.max(now.instant));
        }
    }

    fn renew(&mut self, now: Now) {
        let Phase::Joined(joined) = &mut self.phase else { return };
        let recent = |last: Instant| now.instant.saturating_duration_since(last) < RENEW_INTERVAL;
        if !self.last_renewal.is_some_and(recent) {
            self.last_renewal = Some(now.instant);
            let next = UnixMillis(joined.created().0.saturating_add(1));
            joined.renewed = Some(now.unix.max(next));
        }
    }

    /// Lets pass what time alone brings about; returns when the next of that is due.
    fn advance(&mut self, now: Now) -> Option<Instant> {
        if let Some(request) = &self.in_flight
            && now.instant >= request.lost_at
        {
            let (id, kind) = (request.id, request.kind);
            self.reply(now, id, Err(RequestError::TimedOut));
            if kind.schedules() {
                self.remember_orphan(id);
            }
        }
        match &mut self.phase {
            Phase::Leaving(leaving) if now.instant >= leaving.deadline => {
                self.finish_leaving();
                None
            }
            Phase::Leaving(leaving) => Some(leaving.deadline),
            Phase::Joined(joined) if joined.rejoin_at.is_some_and(|at| now.instant >= at) => {
                if !joined.seen {
                    self.unseen_rejoins = self.unseen_rejoins.saturating_add(1);
                }
                self.rejoin();
                None
            }
            Phase::Joined(joined) => {
                if joined.refresh_due.is_none() && now.instant >= joined.refresh_at {
                    joined.refresh_due = Some(now.instant);
                    // A sleeping device that wakes up must not list itself again without a delayed leave, so
                    // that is restarted first.
                    joined.restart_at = now.instant;
                }
                let refresh_at = joined.refresh_due.is_none().then_some(joined.refresh_at);
                [refresh_at, joined.rejoin_at].into_iter().flatten().min()
            }
            Phase::Idle | Phase::Joining => None,
        }
    }

    fn abandon_request(&mut self) {
        if let Some(request) = self.in_flight.take()
            && request.kind.schedules()
        {
            self.remember_orphan(request.id);
        }
    }

    fn remember_orphan(&mut self, id: RequestId) {
        if self.orphans.len() == MAX_STALE {
            self.orphans.pop_front();
        }
        self.orphans.push_back(id);
    }

    fn set_status(&mut self, status: Status) {
        if self.status != status {
            self.status = status;
            self.events.push_back(Event::Status(status));
        }
    }

    fn set_probably_left(&mut self, probably_left: bool) {
        if self.probably_left != probably_left {
            self.probably_left = probably_left;
            self.events.push_back(Event::ProbablyLeft(probably_left));
        }
    }
}

#[derive(Debug)]
enum Phase {
    /// Nothing to keep alive.
    Idle,
    /// On the way to a first publication.
    Joining,
    Joined(Joined),
    Leaving(Leaving),
}

#[derive(Debug)]
struct Joined {
    /// When the reply to the first publication came.
    since: Now,
    /// When the publication with the present creation time was sent.
    base: Now,
    /// The creation time by the homeserver's clock, once a sync brought it.
    created: Option<UnixMillis>,
    /// The intent that is published.
    intent: Option<String>,
    restart_at: Instant,
    refresh_at: Instant,
    /// Since when a refresh is due.
    refresh_due: Option<Instant>,
    /// A new creation time that is to be published.
    renewed: Option<UnixMillis>,
    seen: bool,
    rejoin_at: Option<Instant>,
}

impl Joined {
    fn created(&self) -> UnixMillis {
        self.created.unwrap_or(self.base.unix)
    }
}

#[derive(Debug)]
struct Leaving {
    deadline: Instant,
    /// Sending the delayed leave did not work: write the leave ourselves.
    send_failed: bool,
}

#[derive(Debug)]
struct InFlight {
    id: RequestId,
    kind: Kind,
    sent: Now,
    timeout: Duration,
    /// When it counts as timed out although nobody said so.
    lost_at: Instant,
    /// Of a schedule: the delay that was asked for.
    delay: Duration,
    /// Of what concerns a delayed leave: which one.
    delay_id: String,
    publication: Option<Publication>,
}

#[derive(Debug)]
struct Publication {
    kind: PublicationKind,
    intent: Option<String>,
}

#[derive(Clone, Copy, Debug)]
enum PublicationKind {
    First,
    Renewed(UnixMillis),
    Update { refresh: bool },
}

#[derive(Debug, Default)]
struct Tries {
    rate_limited: u32,
    network: u32,
    not_before: Option<Instant>,
}

/// `instant` moved later, by an age at most: a configured or received duration may be absurd.
fn later(instant: Instant, duration: Duration) -> Instant {
    const AGE: Duration = Duration::from_secs(100 * 365 * 24 * 3600);
    instant.checked_add(duration.min(AGE)).unwrap_or(instant)
}

fn earliest(a: Option<Instant>, b: Instant) -> Instant {
    a.map_or(b, |a| a.min(b))
}

#[cfg(test)]
mod tests;
