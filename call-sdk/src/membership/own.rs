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

use serde_json::Value;

use super::wire::{OwnDescription, state_content};
use crate::time::{Now, UnixMillis};

/// A delayed leave shorter than this is not worth its requests: a passing fault would end the membership.
const MIN_LEAVE_DELAY: Duration = Duration::from_secs(5);
/// How often the delay of the delayed leave is adapted to what the homeserver allows before we give it up.
const MAX_DELAY_ADAPTATIONS: u32 = 8;
/// A homeserver may ask for patience, but not for ever.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(300);
/// How often the cancelling of a delayed leave that is no longer ours to keep is tried. It ends by itself.
const MAX_CANCEL_TRIES: u32 = 3;
/// Bounds on what is remembered of delayed leaves that must go.
const MAX_STALE: usize = 8;
/// How long past its timeout a request is waited for before it counts as lost with its reply.
const REPLY_SLACK: Duration = Duration::from_secs(1);
/// Everybody sends us a key when we renew, so it is done sparingly.
const RENEW_INTERVAL: Duration = Duration::from_secs(60);
/// Longest interval between two refreshes, whatever the expiry is.
const MAX_REFRESH_INTERVAL: Duration = Duration::from_secs(3600);
/// Shortest interval between two refreshes.
const MIN_REFRESH_INTERVAL: Duration = Duration::from_secs(1);

/// The figures of our membership. The default is what Element Call uses today.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnConfig {
    /// How long after its last restart the homeserver sends our leave: 18 s.
    pub leave_delay: Duration,
    /// How often the delayed leave is restarted: 4 s, but at most two thirds of the delay.
    pub restart_interval: Duration,
    /// How long one restart may take: 2 s.
    pub restart_timeout: Duration,
    /// Wait after a network error or 5xx: 1 s.
    pub network_retry: Duration,
    /// Network errors in a row, per kind of request, that are retried before the membership is given up: 11.
    pub network_retries: u32,
    /// 429 answers in a row, per kind of request, that are retried: 10.
    pub rate_limit_retries: u32,
    /// Wait after a 429 that names none: 5 s.
    pub rate_limit_default: Duration,
    /// How long past now a membership is published for, at least: 4 h.
    pub expires: Duration,
    /// How long before the interval is over the membership is refreshed: 5 s.
    pub expires_headroom: Duration,
    /// How long any other request may take: 10 s.
    pub request_timeout: Duration,
    /// How long leaving may take in all: 5 s. After that the delayed leave does it.
    pub leave_timeout: Duration,
    /// How long after publishing a sync without our membership is taken for a late sync: 5 s. It doubles with
    /// every rejoin that is not seen either.
    pub missing_grace: Duration,
}

impl OwnConfig {
    /// What matrix-js-sdk uses when an application sets nothing.
    #[must_use]
    pub fn js_sdk_defaults() -> Self {
        Self {
            leave_delay: Duration::from_secs(8),
            restart_interval: Duration::from_secs(5),
            network_retry: Duration::from_secs(3),
            network_retries: 10,
            missing_grace: Duration::ZERO,
            ..Self::default()
        }
    }
}

impl Default for OwnConfig {
    fn default() -> Self {
        Self {
            leave_delay: Duration::from_secs(18),
            restart_interval: Duration::from_secs(4),
            restart_timeout: Duration::from_secs(2),
            network_retry: Duration::from_secs(1),
            network_retries: 11,
            rate_limit_retries: 10,
            rate_limit_default: Duration::from_secs(5),
            expires: super::wire::DEFAULT_EXPIRES,
            expires_headroom: Duration::from_secs(5),
            request_timeout: Duration::from_secs(10),
            leave_timeout: Duration::from_secs(5),
            missing_grace: Duration::from_secs(5),
        }
    }
}

/// Names a request until its reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);

/// What happened.
#[derive(Clone, Debug, PartialEq)]
pub enum Input {
    /// The application joins. A no-op while joining or joined; while leaving it is done after.
    Join(OwnDescription),
    /// The application leaves. A no-op if there is nothing to leave.
    Leave,
    /// The application says something else about its intent. Ignored outside a call.
    SetIntent(Option<String>),
    /// A sync was processed: whether our membership is in the roster.
    OwnSeen(bool),
    /// When our membership was created, as the roster has it. Later events of the membership repeat this time:
    /// with any other, every member would take us for one that has rejoined.
    OwnCreated(UnixMillis),
    /// Publish again with a new creation time, so that members take us for a newcomer and send us their key. A
    /// remedy for peers that lost a key message; done at most once a minute.
    Renew,
    /// A request is done. Unknown ids are ignored.
    Reply {
        /// Which request.
        id: RequestId,
        /// Its outcome.
        result: Result<Reply, RequestError>,
    },
}

/// What the shell asks of the homeserver.
#[derive(Clone, Debug, PartialEq)]
pub enum Request {
    /// Schedule an empty membership (MSC4140). Answer: [`Reply::Scheduled`].
    ScheduleLeave {
        /// How long until the homeserver sends it.
        delay: Duration,
    },
    /// Start the delay of a delayed leave anew.
    RestartLeave {
        /// Which one.
        delay_id: String,
    },
    /// Send a delayed leave now.
    SendLeave {
        /// Which one.
        delay_id: String,
    },
    /// Drop a delayed leave.
    CancelLeave {
        /// Which one.
        delay_id: String,
    },
    /// Write our membership.
    PutMembership {
        /// Its content.
        content: Value,
    },
    /// Write an empty membership.
    PutLeave,
    /// Read the capability `org.matrix.msc4140.delayed_events.max_delay_ms`. Answer: [`Reply::MaxDelay`].
    ReadMaxDelay,
}

/// What the homeserver answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// It did what it was asked.
    Done,
    /// It scheduled a delayed leave.
    Scheduled {
        /// Its handle.
        delay_id: String,
    },
    /// The longest delay that it allows, if it says.
    MaxDelay(Option<Duration>),
}

/// Why the homeserver did not do what it was asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// 429.
    #[error("the homeserver limits how often this may be asked")]
    RateLimited {
        /// How long it asks us to wait.
        retry_after: Option<Duration>,
    },
    /// `M_MAX_DELAY_EXCEEDED`, or `ORG.MATRIX.MSC4140_DELAY_TOO_LARGE` of present Synapse, which names no limit.
    #[error("the homeserver allows no such long delay")]
    MaxDelayExceeded {
        /// The limit, if it was named.
        max: Option<Duration>,
    },
    /// 404 `M_NOT_FOUND`: no such delayed event (any more).
    #[error("the homeserver knows no such delayed event")]
    NotFound,
    /// The homeserver has no delayed events.
    #[error("the homeserver does not support delayed events (MSC4140)")]
    Unsupported,
    /// No connection, or 5xx.
    #[error("the homeserver could not be reached or is in trouble")]
    Network,
    /// No answer within the timeout of the request.
    #[error("the homeserver did not answer in time")]
    TimedOut,
    /// Any other refusal.
    #[error("the homeserver refused: {message}")]
    Other {
        /// Its words.
        message: String,
    },
}

/// What to do now.
#[derive(Clone, Debug, PartialEq)]
pub enum Output {
    /// Perform this once and reply, with [`RequestError::TimedOut`] if it takes longer than `timeout`.
    Request {
        /// Its name.
        id: RequestId,
        /// What to ask.
        request: Request,
        /// How long it may take.
        timeout: Duration,
    },
    /// Tell the application.
    Event(Event),
    /// Nothing until then.
    WaitUntil(Instant),
    /// Nothing until the next input.
    Idle,
}

/// What the application should know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The status changed.
    Status(Status),
    /// Whether the homeserver has probably sent our delayed leave while we could not reach it.
    ProbablyLeft(bool),
    /// The call goes on without a delayed leave: if this device vanishes, it stays listed until its membership
    /// expires.
    DelayedLeaveUnavailable {
        /// Why.
        reason: String,
    },
    /// The membership was given up. The homeserver may still list us until the delayed leave or expiry;
    /// [`Input::Leave`] tries to end that.
    Fatal {
        /// What failed, and how.
        message: String,
    },
}

/// Whether we are a member, as far as we know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Status {
    /// Not in the call.
    Disconnected,
    /// Publishing our membership, for the first time or again.
    Connecting,
    /// Our membership is published.
    Connected,
    /// Leaving.
    Disconnecting,
}

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
        self.phase = Phase::Joining;
        self.set_status(Status::Connecting);
    }

    /// Publishes from scratch: the homeserver does not list us any more.
    fn rejoin(&mut self) {
        // A new delayed leave that is just being scheduled serves the new membership as well.
        if self.in_flight.as_ref().is_some_and(|request| request.kind == Kind::RestartLeave) {
            self.abandon_request();
        }
        if self.support == Support::Failed {
            self.support = Support::Wanted;
        }
        self.discard_delayed_leave();
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
            if kind == Kind::ScheduleLeave {
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

    fn next_step(&self, now: Instant) -> Step {
        match &self.phase {
            Phase::Idle => self.cancel_step(now, MAX_CANCEL_TRIES),
            Phase::Joining => self.joining_step(now),
            Phase::Joined(joined) => self.joined_step(now, joined),
            Phase::Leaving(leaving) => self.leaving_step(now, leaving),
        }
    }

    fn joining_step(&self, now: Instant) -> Step {
        // A first try to cancel what could end the new membership; the rest of the tries can wait.
        if let step @ Step::Start(_) = self.cancel_step(now, 1) {
            return step;
        }
        match self.schedule_kind() {
            Some(kind) => self.gated(kind, now, now),
            None => self.gated(Kind::PutMembership, now, now),
        }
    }

    fn joined_step(&self, now: Instant, joined: &Joined) -> Step {
        let keep_alive = match (&self.delayed, self.schedule_kind()) {
            (Some(_), _) => self.gated(Kind::RestartLeave, joined.restart_at, now),
            (None, Some(kind)) => self.gated(kind, now, now),
            (None, None) => Step::Nothing,
        };
        let refresh = joined.refresh_due.is_some_and(|due| match &self.delayed {
            Some(delayed) => delayed.since >= due,
            None => self.support != Support::Wanted,
        });
        let intent_changed = self.own.as_ref().is_some_and(|own| own.intent != joined.intent);
        let publish = if refresh || intent_changed || joined.renewed.is_some() {
            self.gated(Kind::PutMembership, now, now)
        } else {
            Step::Nothing
        };
        keep_alive.or(publish).or(self.cancel_step(now, MAX_CANCEL_TRIES))
    }

    fn leaving_step(&self, now: Instant, leaving: &Leaving) -> Step {
        match &self.delayed {
            Some(_) if !leaving.send_failed && self.maybe_published => self.gated(Kind::SendLeave, now, now),
            // After a failed try to send it, it may as well fire: that is a leave, too.
            Some(_) if !leaving.send_failed => self.gated(Kind::CancelLeave, now, now),
            _ if self.maybe_published => self.gated(Kind::PutLeave, now, now),
            _ => Step::FinishLeaving,
        }
    }

    fn cancel_step(&self, now: Instant, tries: u32) -> Step {
        if self.stale.iter().any(|stale| stale.tries < tries) {
            self.gated(Kind::CancelLeave, now, now)
        } else {
            Step::Nothing
        }
    }

    /// What is to be asked so that we have a delayed leave; `None` if we have one or can have none.
    fn schedule_kind(&self) -> Option<Kind> {
        if self.delayed.is_some() || self.support != Support::Wanted {
            None
        } else if self.delay.ask {
            Some(Kind::ReadMaxDelay)
        } else {
            Some(Kind::ScheduleLeave)
        }
    }

    fn gated(&self, kind: Kind, at: Instant, now: Instant) -> Step {
        let at = self.tries.get(&kind).and_then(|tries| tries.not_before).map_or(at, |gate| gate.max(at));
        if at <= now { Step::Start(kind) } else { Step::WaitUntil(at) }
    }

    fn start(&mut self, now: Now, kind: Kind) -> Output {
        self.last_id += 1;
        let id = RequestId(self.last_id);
        let timeout = self.timeout(now.instant, kind);
        let mut in_flight = InFlight {
            id,
            kind,
            sent: now,
            timeout,
            lost_at: later(later(now.instant, timeout), REPLY_SLACK),
            delay: Duration::ZERO,
            delay_id: String::new(),
            publication: None,
        };
        let request = match kind {
            Kind::ScheduleLeave => {
                in_flight.delay = self.leave_delay();
                Request::ScheduleLeave { delay: in_flight.delay }
            }
            Kind::ReadMaxDelay => Request::ReadMaxDelay,
            Kind::RestartLeave => {
                in_flight.delay_id = self.delay_id();
                Request::RestartLeave { delay_id: in_flight.delay_id.clone() }
            }
            Kind::SendLeave => {
                in_flight.delay_id = self.delay_id();
                Request::SendLeave { delay_id: in_flight.delay_id.clone() }
            }
            Kind::CancelLeave => {
                in_flight.delay_id = self.next_to_cancel();
                Request::CancelLeave { delay_id: in_flight.delay_id.clone() }
            }
            Kind::PutMembership => {
                self.maybe_published = true;
                let (content, publication) = self.publication(now);
                in_flight.publication = Some(publication);
                Request::PutMembership { content }
            }
            Kind::PutLeave => Request::PutLeave,
        };
        self.in_flight = Some(in_flight);
        Output::Request { id, request, timeout }
    }

    fn timeout(&self, now: Instant, kind: Kind) -> Duration {
        let until_fired =
            self.delayed.as_ref().map(|delayed| delayed.fires_at().saturating_duration_since(now));
        let timeout = match kind {
            // So that we know at the very moment when the homeserver has probably sent our leave.
            Kind::RestartLeave => match until_fired {
                Some(left) if !self.probably_left && !left.is_zero() => self.config.restart_timeout.min(left),
                _ => self.config.restart_timeout,
            },
            Kind::SendLeave | Kind::CancelLeave => self.config.restart_timeout,
            // A write that hangs must not keep us from the next restart.
            Kind::PutMembership => match until_fired {
                Some(left) => {
                    let spare = left.saturating_sub(self.config.restart_timeout * 2);
                    self.config.request_timeout.min(spare.max(self.config.restart_timeout))
                }
                None => self.config.request_timeout,
            },
            Kind::PutLeave => self.config.request_timeout.min(self.config.leave_timeout / 2),
            Kind::ScheduleLeave | Kind::ReadMaxDelay => self.config.request_timeout,
        };
        match &self.phase {
            Phase::Leaving(leaving) => timeout.min(leaving.deadline.saturating_duration_since(now)),
            _ => timeout,
        }
    }

    /// The content to publish now, and what it will mean when it is published.
    fn publication(&self, now: Now) -> (Value, Publication) {
        let intent = self.own.as_ref().and_then(|own| own.intent.clone());
        let (created, base, refresh) = match &self.phase {
            Phase::Joined(joined) => match joined.renewed {
                Some(renewed) => (Some(renewed), now, true),
                None => (Some(joined.created()), joined.base, joined.refresh_due.is_some()),
            },
            _ => (None, now, false),
        };
        // `created` never moves, so `expires` has to cover the time since then as well, at every publication and
        // not only at a refresh. The two clocks differ after a correction of the wall clock; the longer counts.
        let age = created.map_or(Duration::ZERO, |created| {
            now.unix.since(created).max(now.instant.saturating_duration_since(base.instant))
        });
        let expires = multiple_of(self.config.expires, age.saturating_add(self.config.expires));
        let content = self.own.as_ref().map_or(Value::Null, |own| state_content(own, expires, created));
        let kind = match &self.phase {
            Phase::Joined(Joined { renewed: Some(renewed), .. }) => PublicationKind::Renewed(*renewed),
            Phase::Joined(_) => PublicationKind::Update { refresh },
            _ => PublicationKind::First,
        };
        (content, Publication { kind, intent })
    }

    fn reply(&mut self, now: Now, id: RequestId, result: Result<Reply, RequestError>) {
        if let Some(at) = self.orphans.iter().position(|orphan| *orphan == id) {
            self.orphans.remove(at);
            if let Ok(Reply::Scheduled { delay_id }) = result {
                self.discard(delay_id);
            }
            return;
        }
        let Some(request) = self.in_flight.take_if(|request| request.id == id) else { return };
        if result.is_ok() {
            self.tries.remove(&request.kind);
        }
        match request.kind {
            Kind::ScheduleLeave => self.scheduled(now, &request, result),
            Kind::ReadMaxDelay => {
                self.delay.ask = false;
                self.delay.asked = true;
                let max = match result {
                    Ok(Reply::MaxDelay(max)) => max,
                    _ => None,
                };
                self.adapt_delay(max);
            }
            Kind::RestartLeave => self.restarted(now, &request, result),
            Kind::PutMembership => self.put(now, &request, result),
            Kind::SendLeave => self.sent_leave(now, result),
            Kind::PutLeave => match result {
                Ok(_) => self.maybe_published = false,
                Err(error) => {
                    // Retried until the deadline; a refusal is final and the delayed leave has to do it.
                    if self.retry(now, &request, &error) != Retry::Later {
                        self.finish_leaving();
                    }
                }
            },
            Kind::CancelLeave => self.cancelled(now, &request, result),
        }
    }

    fn scheduled(&mut self, now: Now, request: &InFlight, result: Result<Reply, RequestError>) {
        let error = match result {
            Ok(Reply::Scheduled { delay_id }) => {
                self.delayed =
                    Some(Delayed { id: delay_id, since: request.sent.instant, delay: request.delay });
                self.delay.adaptations = 0;
                self.plan_restart(now, request);
                return;
            }
            Ok(_) => RequestError::Other { message: "the answer holds no delay id".to_owned() },
            Err(error) => error,
        };
        if matches!(self.phase, Phase::Leaving(_) | Phase::Idle) {
            return;
        }
        match (&error, self.retry(now, request, &error)) {
            (RequestError::MaxDelayExceeded { max }, _) => self.adapt_delay(*max),
            (RequestError::Unsupported, _) => self.no_delayed_leave(Support::Unsupported, error.to_string()),
            (_, Retry::Later) => {}
            (_, Retry::Exhausted(message)) => self.fatal(message),
            (_, Retry::No) => self.no_delayed_leave(Support::Failed, error.to_string()),
        }
    }

    /// Takes the homeserver's limit, asks for it if it did not say, and halves if it does not say then either.
    fn adapt_delay(&mut self, max: Option<Duration>) {
        let current = self.leave_delay();
        self.delay.adaptations += 1;
        let next = match max {
            Some(max) if max < current => max,
            _ if !self.delay.asked => {
                self.delay.ask = true;
                return;
            }
            _ => current / 2,
        };
        if next < MIN_LEAVE_DELAY || self.delay.adaptations > MAX_DELAY_ADAPTATIONS {
            let reason = format!("the homeserver allows no delay of {MIN_LEAVE_DELAY:?} or more");
            self.no_delayed_leave(Support::Failed, reason);
        } else {
            self.delay.limit = Some(next);
        }
    }

    fn no_delayed_leave(&mut self, support: Support, reason: String) {
        self.support = support;
        self.events.push_back(Event::DelayedLeaveUnavailable { reason });
    }

    fn restarted(&mut self, now: Now, request: &InFlight, result: Result<Reply, RequestError>) {
        let fired = self.delayed.as_ref().is_none_or(|delayed| now.instant >= delayed.fires_at());
        let Err(error) = result else {
            if let Some(delayed) = &mut self.delayed {
                delayed.since = request.sent.instant;
            }
            self.plan_restart(now, request);
            self.set_probably_left(false);
            return;
        };
        let retry = self.retry(now, request, &error);
        match (&error, retry) {
            // Either it fired, and we are not listed any more; or the server dropped it, and we need another.
            (RequestError::NotFound, _) => {
                self.delayed = None;
                if fired {
                    self.rejoin();
                }
            }
            (RequestError::Unsupported, _) => {
                self.delayed = None;
                self.no_delayed_leave(Support::Unsupported, error.to_string());
            }
            (_, Retry::Exhausted(message)) => self.fatal(message),
            (_, Retry::No) => self.fatal(format!("the delayed leave could not be restarted: {error}")),
            (_, Retry::Later) => {}
        }
        if fired && matches!(self.phase, Phase::Joined(_)) && self.delayed.is_some() {
            self.set_probably_left(true);
        }
    }

    /// After the delayed leave was scheduled or restarted by `request`.
    fn plan_restart(&mut self, now: Now, request: &InFlight) {
        let interval = self.restart_interval();
        if let Phase::Joined(joined) = &mut self.phase {
            let sent = request.sent.instant;
            let refresh_waits = joined.refresh_due.is_some_and(|due| sent < due);
            joined.restart_at =
                if refresh_waits { now.instant } else { later(sent, interval).max(now.instant) };
        }
    }

    fn put(&mut self, now: Now, request: &InFlight, result: Result<Reply, RequestError>) {
        let Some(publication) = &request.publication else { return };
        if let Err(error) = result {
            if matches!(self.phase, Phase::Joining | Phase::Joined(_)) {
                match self.retry(now, request, &error) {
                    Retry::Later => {}
                    Retry::Exhausted(message) => self.fatal(message),
                    Retry::No => self.fatal(format!("the membership could not be published: {error}")),
                }
            }
            return;
        }
        let refresh_every = self.config.expires.clamp(MIN_REFRESH_INTERVAL, MAX_REFRESH_INTERVAL);
        let headroom = self.config.expires_headroom;
        match (&mut self.phase, publication.kind) {
            (Phase::Joining, PublicationKind::First) => {
                self.phase = Phase::Joined(Joined {
                    since: now,
                    base: request.sent,
                    created: None,
                    intent: publication.intent.clone(),
                    restart_at: now.instant,
                    refresh_at: next_refresh(request.sent.instant, now.instant, refresh_every, headroom),
                    refresh_due: None,
                    renewed: None,
                    seen: false,
                    rejoin_at: None,
                });
                self.set_status(Status::Connected);
                self.set_probably_left(false);
            }
            (Phase::Joined(joined), kind) => {
                joined.intent.clone_from(&publication.intent);
                match kind {
                    PublicationKind::Renewed(created) => {
                        joined.created = joined.created.max(Some(created));
                        joined.base = request.sent;
                        joined.renewed = None;
                        joined.refresh_due = None;
                    }
                    PublicationKind::Update { refresh: true } => joined.refresh_due = None,
                    PublicationKind::Update { refresh: false } | PublicationKind::First => {}
                }
                joined.refresh_at = next_refresh(joined.base.instant, now.instant, refresh_every, headroom);
            }
            // An update of a membership that is being replaced, or left: the new one, or the leave, follows.
            _ => {}
        }
    }

    fn sent_leave(&mut self, now: Now, result: Result<Reply, RequestError>) {
        let tries = self.tries.entry(Kind::SendLeave).or_default();
        let Phase::Leaving(leaving) = &mut self.phase else { return };
        match result {
            Ok(_) => {
                self.delayed = None;
                self.maybe_published = false;
                self.set_probably_left(false);
            }
            Err(RequestError::NotFound) => self.delayed = None,
            Err(error @ (RequestError::RateLimited { .. } | RequestError::Network)) if tries.network == 0 => {
                tries.network = 1;
                let wait = match error {
                    RequestError::RateLimited { retry_after } => {
                        retry_after.unwrap_or(self.config.rate_limit_default)
                    }
                    _ => self.config.network_retry,
                };
                let again = later(now.instant, wait);
                tries.not_before = Some(again);
                // Half of the time is for the other way to leave.
                leaving.send_failed = later(again, self.config.leave_timeout / 2) > leaving.deadline;
            }
            Err(_) => leaving.send_failed = true,
        }
    }

    fn cancelled(&mut self, now: Now, request: &InFlight, result: Result<Reply, RequestError>) {
        let retried = match &result {
            Ok(_) => false,
            Err(error) => self.retry(now, request, error) != Retry::No,
        };
        if matches!(self.phase, Phase::Leaving(_))
            && let Some(delayed) = self.delayed.take_if(|delayed| delayed.id == request.delay_id)
        {
            if retried {
                self.discard(delayed.id);
            }
            return;
        }
        if let Some(at) = self.stale.iter().position(|stale| stale.id == request.delay_id) {
            self.stale[at].tries += 1;
            if !retried || self.stale[at].tries >= MAX_CANCEL_TRIES {
                self.stale.remove(at);
            }
        }
    }

    /// Plans another try of a request that failed for a passing reason.
    fn retry(&mut self, now: Now, request: &InFlight, error: &RequestError) -> Retry {
        let tries = self.tries.entry(request.kind).or_default();
        let (count, limit, wait) = match error {
            RequestError::RateLimited { retry_after } => {
                let wait = retry_after.unwrap_or(self.config.rate_limit_default).min(MAX_RETRY_AFTER);
                (&mut tries.rate_limited, self.config.rate_limit_retries, wait)
            }
            RequestError::Network => {
                (&mut tries.network, self.config.network_retries, self.config.network_retry)
            }
            RequestError::TimedOut => {
                // At once, but never before its time was over: a shell that fails fast must not spin.
                let over = later(request.sent.instant, request.timeout);
                tries.not_before = Some(over.max(now.instant));
                if request.kind == Kind::RestartLeave {
                    return Retry::Later;
                }
                (&mut tries.network, self.config.network_retries, over.saturating_duration_since(now.instant))
            }
            RequestError::MaxDelayExceeded { .. }
            | RequestError::NotFound
            | RequestError::Unsupported
            | RequestError::Other { .. } => return Retry::No,
        };
        if *count >= limit {
            return Retry::Exhausted(format!(
                "our membership was given up, {} failed {} times in a row: {error}",
                request.kind.doing(),
                limit.saturating_add(1),
            ));
        }
        *count += 1;
        tries.not_before = Some(later(now.instant, wait));
        Retry::Later
    }

    fn leave_delay(&self) -> Duration {
        self.delay.limit.map_or(self.config.leave_delay, |limit| limit.min(self.config.leave_delay))
    }

    fn restart_interval(&self) -> Duration {
        let delay = self.delayed.as_ref().map_or(self.config.leave_delay, |delayed| delayed.delay);
        self.config.restart_interval.min(delay / 3 * 2)
    }

    fn delay_id(&self) -> String {
        self.delayed.as_ref().map(|delayed| delayed.id.clone()).unwrap_or_default()
    }

    fn next_to_cancel(&self) -> String {
        match (&self.phase, &self.delayed) {
            (Phase::Leaving(_), Some(delayed)) => delayed.id.clone(),
            _ => {
                let next = self.stale.iter().min_by_key(|stale| stale.tries);
                next.map(|stale| stale.id.clone()).unwrap_or_default()
            }
        }
    }

    fn discard_delayed_leave(&mut self) {
        if let Some(delayed) = self.delayed.take() {
            self.discard(delayed.id);
        }
    }

    fn discard(&mut self, id: String) {
        if self.stale.len() == MAX_STALE {
            self.stale.pop_front();
        }
        self.stale.push_back(Stale { id, tries: 0 });
    }

    fn abandon_request(&mut self) {
        if let Some(request) = self.in_flight.take()
            && request.kind == Kind::ScheduleLeave
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

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    ScheduleLeave,
    ReadMaxDelay,
    RestartLeave,
    SendLeave,
    CancelLeave,
    PutMembership,
    PutLeave,
}

impl Kind {
    fn doing(self) -> &'static str {
        match self {
            Self::ScheduleLeave => "scheduling the delayed leave",
            Self::ReadMaxDelay => "reading the longest delay",
            Self::RestartLeave => "restarting the delayed leave",
            Self::SendLeave => "sending the delayed leave",
            Self::CancelLeave => "cancelling a delayed leave",
            Self::PutMembership => "publishing it",
            Self::PutLeave => "writing the leave",
        }
    }
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

#[derive(Debug, PartialEq, Eq)]
enum Retry {
    Later,
    Exhausted(String),
    No,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Support {
    /// We want a delayed leave, and have no reason to think that we cannot have one.
    Wanted,
    /// Not now.
    Failed,
    /// Not on this homeserver.
    Unsupported,
}

/// What is known of the longest delay that the homeserver allows.
#[derive(Debug, Default)]
struct DelayLimit {
    limit: Option<Duration>,
    ask: bool,
    asked: bool,
    adaptations: u32,
}

/// A delayed leave that the homeserver holds for us.
#[derive(Debug)]
struct Delayed {
    id: String,
    /// When its last successful (re)start was asked for: the homeserver cannot have counted from earlier.
    since: Instant,
    delay: Duration,
}

impl Delayed {
    fn fires_at(&self) -> Instant {
        later(self.since, self.delay)
    }
}

#[derive(Debug)]
struct Stale {
    id: String,
    tries: u32,
}

#[derive(Debug)]
enum Step {
    Start(Kind),
    FinishLeaving,
    WaitUntil(Instant),
    Nothing,
}

impl Step {
    /// The first of two that can start, else the earlier wait.
    fn or(self, other: Self) -> Self {
        match (self, other) {
            (Self::Nothing, step) | (step, Self::Nothing) => step,
            (Self::WaitUntil(a), Self::WaitUntil(b)) => Self::WaitUntil(a.min(b)),
            (Self::WaitUntil(_), start) => start,
            (start, _) => start,
        }
    }
}

/// `instant` moved later, by an age at most: a configured or received duration may be absurd.
fn later(instant: Instant, duration: Duration) -> Instant {
    const AGE: Duration = Duration::from_secs(100 * 365 * 24 * 3600);
    instant.checked_add(duration.min(AGE)).unwrap_or(instant)
}

fn earliest(a: Option<Instant>, b: Instant) -> Instant {
    a.map_or(b, |a| a.min(b))
}

/// The smallest multiple of `unit` that is at least `least`.
fn multiple_of(unit: Duration, least: Duration) -> Duration {
    let unit = unit.as_millis().max(1);
    let millis = least.as_millis().div_ceil(unit).saturating_mul(unit);
    Duration::from_millis(u64::try_from(millis).unwrap_or(u64::MAX))
}

/// The first of `start + n × every − headroom` that is later than now.
fn next_refresh(start: Instant, now: Instant, every: Duration, headroom: Duration) -> Instant {
    let passed = now.saturating_duration_since(start).saturating_add(headroom).as_millis();
    let due = (passed / every.as_millis().max(1) + 1).saturating_mul(every.as_millis());
    let due = Duration::from_millis(u64::try_from(due).unwrap_or(u64::MAX));
    later(start, due.saturating_sub(headroom))
}

#[cfg(test)]
mod tests;
