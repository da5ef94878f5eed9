//! Our own membership: published, kept alive by a delayed leave, refreshed before it expires, and left.
//!
//! [`OwnMembership`] decides and the shell performs. After every [`OwnMembership::handle`], and when a wait is
//! over, the shell drains [`OwnMembership::poll`] until it says [`Output::WaitUntil`] or [`Output::Idle`]. The machine
//! waits for one request at a time; the shell performs it once, within its timeout, and replies.
//!
//! A first join fails with an [`EndReason`] when the homeserver refuses it or the time for joining is over. Once
//! joined, no failure of the homeserver ends the session: everything is tried again for as long as the call lasts, and
//! a membership that the homeserver lost is published anew.
//!
//! *Assumptions.* A delayed leave (MSC4140) that is not restarted in time is sent by the homeserver, and ends our
//! membership. Writing the membership again does not cancel it, except on servers that do (the restart right
//! after joining detects those). The caller tells us after each sync what the room shows of us.

use std::{
    collections::{BTreeMap, VecDeque},
    fmt,
    mem::Discriminant,
    time::{Duration, Instant},
};

use rand::CryptoRng;
use ruma_common::{EventId, OwnedEventId};

use super::wire::{self, LeaveCode, MembershipMode, OwnDescription, OwnTransports};
use crate::{
    matrix::{DelayId, DelayedAction, MemberEvent, RequestError, ScheduleForm},
    member::{Member, MemberId, MembershipForm},
    time::{Now, UnixMillis},
};

mod config;
mod delayed_leave;
mod delegation;
mod leaving;
mod messages;
mod replies;
mod scheduling;
mod steps;

pub use config::OwnConfig;
pub use messages::{DelegationError, EndReason, NoDelayedLeave, Task};
pub(crate) use messages::{Event, Input, Output, OwnSighting, RequestId, Status};

use delayed_leave::{Delayed, MAX_STALE, Stale};
use delegation::Delegation;
use leaving::Leaving;
use scheduling::Scheduling;
use steps::Step;

/// A wall clock that is this far ahead of the monotonic one was set, or the device has slept.
const MIN_SLEEP: Duration = Duration::from_secs(1);
/// Longest wait before a membership that was lost again is published again.
const MAX_REJOIN_WAIT: Duration = Duration::from_secs(60);

/// The state machine of our own membership. See the [module](self).
#[derive(Debug)]
pub(crate) struct OwnMembership {
    config: OwnConfig,
    rng: Rng,
    phase: Phase,
    status: Status,
    probably_left: bool,
    own: Option<OwnDescription>,
    /// Both clocks when they were last told, to notice sleep.
    clocks: Option<Now>,
    events: VecDeque<Event>,
    last_id: u64,
    in_flight: Option<InFlight>,
    tries: BTreeMap<Task, Tries>,
    trouble: Option<Trouble>,
    scheduling: Scheduling,
    /// The present membership goes without a delayed leave.
    without_leave: bool,
    /// The reason for that which the application knows.
    told_no_leave: Option<NoDelayedLeave>,
    /// The longest delay that the homeserver has accepted or named, after it refused a longer one.
    delay_limit: Option<Duration>,
    delay_adaptations: u32,
    delayed: Option<Delayed>,
    /// Whether the homeserver has ever restarted a delayed leave.
    restart_works: bool,
    delegation: Delegation,
    /// Delayed leaves of earlier memberships.
    stale: VecDeque<Stale>,
    /// Abandoned requests that may yet have scheduled a delayed leave.
    orphans: VecDeque<RequestId>,
    /// Whether the homeserver may list us under the present key.
    maybe_published: bool,
    /// Sticky form: the duration of every event under the present key, once one was written.
    sticky: Option<Duration>,
    /// When an event may last have been written under the present key.
    key_written: Option<Instant>,
    /// Our latest membership events.
    event_ids: VecDeque<OwnedEventId>,
    /// State form: what stood under our state key before we wrote there.
    left_behind: Option<serde_json::Value>,
    /// Rejoins since our membership was last seen.
    unseen_rejoins: u32,
    /// Rejoins since a delayed leave was last restarted.
    lost_rejoins: u32,
}

impl OwnMembership {
    /// A membership that is not published. `rng` makes member ids.
    #[must_use]
    pub(crate) fn new(config: OwnConfig, rng: Box<dyn CryptoRng + Send>) -> Self {
        Self {
            config,
            rng: Rng(rng),
            phase: Phase::Idle,
            status: Status::Disconnected,
            probably_left: false,
            own: None,
            clocks: None,
            events: VecDeque::new(),
            last_id: 0,
            in_flight: None,
            tries: BTreeMap::new(),
            trouble: None,
            scheduling: Scheduling::default(),
            without_leave: false,
            told_no_leave: None,
            delay_limit: None,
            delay_adaptations: 0,
            delayed: None,
            restart_works: false,
            delegation: Delegation::default(),
            stale: VecDeque::new(),
            orphans: VecDeque::new(),
            maybe_published: false,
            sticky: None,
            key_written: None,
            event_ids: VecDeque::new(),
            left_behind: None,
            unseen_rejoins: 0,
            lost_rejoins: 0,
        }
    }

    /// Takes in what happened. Drain [`Self::poll`] after it.
    pub(crate) fn handle(&mut self, now: Now, input: Input) {
        self.notice_sleep(now);
        match input {
            Input::Join(own) => match &mut self.phase {
                Phase::Idle => self.join(now, own),
                Phase::Joining(_) | Phase::Joined(_) => {}
                Phase::Leaving(leaving) => leaving.next = Some(own),
            },
            Input::Leave => self.leave(now, LeaveCode::Leave),
            Input::SlotClosed => self.end_if_in_call(now, EndReason::SlotClosed, LeaveCode::SlotClosed),
            Input::Redacted { by } => self.end_if_in_call(now, EndReason::Removed { by }, LeaveCode::Leave),
            Input::SetDescription(own) => self.describe(now, own),
            Input::SetTransports(transports) => self.move_to(transports),
            Input::SetMeshSession(session) => {
                if let Some(own) = self.wanted_mut() {
                    own.transports.mesh = session;
                }
            }
            Input::SetIntent(intent) => {
                if let Some(own) = self.wanted_mut() {
                    own.intent = intent;
                }
            }
            Input::OwnSeen(sighting) => self.seen(now, &sighting),
            Input::LeftBehind(content) => {
                if !self.maybe_published {
                    self.left_behind = content;
                }
            }
            Input::Support(support) => self.scheduling.learn(support),
            Input::OfferDelegation => self.offer_delegation(),
            Input::Renew => self.renew(now),
            Input::Reply { id, result } => self.reply(now, id, result),
        }
    }

    /// What to do now. To be called until it says to wait.
    pub(crate) fn poll(&mut self, now: Now) -> Output {
        self.notice_sleep(now);
        loop {
            if let Some(event) = self.events.pop_front() {
                return Output::Event(event);
            }
            let timer = self.advance(now);
            self.check_recovery(now.instant);
            if !self.events.is_empty() {
                continue;
            }
            let wait = if let Some(in_flight) = &self.in_flight {
                Some(earliest(timer, in_flight.lost_at))
            } else {
                match self.next_step(now.instant) {
                    Step::Start(task) => match self.start(now, task) {
                        Some(output) => return output,
                        None => timer,
                    },
                    Step::FinishLeaving => {
                        self.finish_leaving(now);
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
    pub(crate) fn status(&self) -> Status {
        self.status
    }

    /// How we are described, from joining to leaving. The member id changes with [`Event::MemberIdChanged`].
    #[must_use]
    pub(crate) fn description(&self) -> Option<&OwnDescription> {
        self.own.as_ref().filter(|_| !matches!(self.phase, Phase::Idle))
    }

    /// Our latest membership event: invites and reactions refer to it.
    #[must_use]
    pub(crate) fn event_id(&self) -> Option<&EventId> {
        self.event_ids.back().map(|id| &**id)
    }

    /// Whether the homeserver may list us under the present key. Before that, [`Input::LeftBehind`] counts.
    #[must_use]
    pub(crate) fn may_be_listed(&self) -> bool {
        self.maybe_published
    }

    /// A new member id for the sticky form: a random UUID (version 4).
    pub(crate) fn fresh_member_id(&mut self) -> MemberId {
        let mut bytes = [0; 16];
        self.rng.0.fill_bytes(&mut bytes);
        bytes[6] = bytes[6] & 0x0f | 0x40;
        bytes[8] = bytes[8] & 0x3f | 0x80;
        let hex = format!("{:032x}", u128::from_be_bytes(bytes));
        let parts = [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]];
        MemberId(parts.join("-"))
    }

    /// The input to give after a sync: what `events`, every member event of the room, and `members`, the roster, show
    /// of us. `None` outside a call.
    #[must_use]
    pub(crate) fn sighting(&self, events: &[MemberEvent], members: &[Member]) -> Option<Input> {
        let own = self.description()?;
        let form = own.mode.form();
        let is_ours =
            |event: &&MemberEvent| event.event_id.as_ref().is_some_and(|id| self.event_ids.contains(id));
        for event in events.iter().filter(is_ours) {
            // A member that redacts its own event leaves on another of its devices; that is no kick.
            if let Some(by) = event.redacted_by.as_ref().filter(|by| **by != own.device.user_id) {
                return Some(Input::Redacted { by: by.clone() });
            }
            let is_latest = event.event_id.as_deref() == self.event_id();
            if is_latest && form == MembershipForm::Sticky && event.sticky_until.is_none() {
                return Some(Input::OwnSeen(OwnSighting::NotSticky));
            }
        }
        let listed = members.iter().find(|member| {
            member.form == form
                && member.user_id == own.device.user_id
                && member.device_id.as_ref().is_none_or(|device| *device == own.device.device_id)
                && (form == MembershipForm::State || member.member_id == own.member_id)
        });
        let sighting = listed
            .map_or(OwnSighting::Missing, |member| OwnSighting::Listed { created: Some(member.created) });
        Some(Input::OwnSeen(sighting))
    }

    fn form(&self) -> MembershipForm {
        self.own.as_ref().map_or(MembershipForm::State, |own| own.mode.form())
    }

    fn join(&mut self, now: Now, own: OwnDescription) {
        if self.own.as_ref().is_some_and(|old| is_same_membership(old, &own)) {
            self.discard_delayed_leave(DelayedAction::Cancel);
        } else {
            self.discard_delayed_leave(DelayedAction::Send);
            self.begin_key();
        }
        self.own = Some(own);
        self.tries.clear();
        self.trouble = None;
        self.unseen_rejoins = 0;
        self.lost_rejoins = 0;
        self.told_no_leave = None;
        let deadline = later(now.instant, self.config.join_timeout);
        self.begin_joining(now.instant, now.instant, Some(deadline));
    }

    /// Publishes from scratch: the homeserver does not list us any more. `left` says that others saw us leave.
    fn rejoin(&mut self, now: Now, left: bool) {
        // MSC4143 wants a new member id per join. The delayed leave of the old one ends that, in case it is listed.
        let fresh = self.form() == MembershipForm::Sticky && (left || self.delayed.is_some());
        let obsolete = self.in_flight.as_ref().is_some_and(|request| {
            // One that is just being scheduled serves the new membership as well, under the same key.
            request.task.concerns_delayed_leave() || (fresh && request.task == Task::ScheduleLeave)
        });
        if obsolete {
            self.abandon_request(now);
        }
        if fresh {
            self.discard_delayed_leave(DelayedAction::Send);
            let member_id = self.fresh_member_id();
            if let Some(own) = &mut self.own {
                own.member_id = member_id.clone();
            }
            self.begin_key();
            // The service would watch an SFU identity that we do not have yet.
            self.withdraw_delegation();
            self.events.push_back(Event::MemberIdChanged(member_id));
        } else {
            self.discard_delayed_leave(DelayedAction::Cancel);
        }
        self.tries.remove(&Task::RestartLeave);
        let wait = match self.lost_rejoins {
            0 | 1 => Duration::ZERO,
            n => self.config.network_retry.saturating_mul(1 << (n - 2).min(10)).min(MAX_REJOIN_WAIT),
        };
        self.begin_joining(now.instant, later(now.instant, wait), None);
    }

    /// Our leave was sent: publish anew, the later the more often that happened in a row.
    fn rejoin_lost(&mut self, now: Now) {
        self.lost_rejoins = self.lost_rejoins.saturating_add(1);
        self.rejoin(now, true);
    }

    /// Nothing was written yet under the key of the present description.
    fn begin_key(&mut self) {
        self.sticky = None;
        self.maybe_published = false;
        self.event_ids.clear();
    }

    fn begin_joining(&mut self, since: Instant, not_before: Instant, deadline: Option<Instant>) {
        self.without_leave = false;
        if self.scheduling.before_join() {
            self.tries.remove(&Task::ScheduleLeave);
        }
        self.restart_delegation();
        self.phase = Phase::Joining(Joining {
            since,
            not_before,
            deadline,
            last_error: None,
            sticky_unsupported: false,
        });
        self.set_status(Status::Connecting);
    }

    fn end_if_in_call(&mut self, now: Now, reason: EndReason, code: LeaveCode) {
        match &self.phase {
            Phase::Idle => {}
            Phase::Leaving(leaving) if !leaving.switching => self.leave(now, code),
            _ => self.end(now, reason, code),
        }
    }

    fn join_timed_out(&mut self, now: Now) {
        let Phase::Joining(joining) = &mut self.phase else { return };
        let after = now.instant.saturating_duration_since(joining.since);
        let reason = match joining.last_error.take() {
            _ if joining.sticky_unsupported => EndReason::StickyUnsupported,
            Some((_, RequestError::RateLimited { retry_after })) => {
                EndReason::RateLimited { retry_after: retry_after.unwrap_or(self.config.rate_limit_default) }
            }
            Some((doing, error)) => EndReason::JoinTimedOut { after, doing, error },
            None => {
                let doing = self.in_flight.as_ref().map_or(Task::PutMembership, |request| request.task);
                EndReason::JoinTimedOut { after, doing, error: RequestError::TimedOut }
            }
        };
        self.end(now, reason, LeaveCode::Leave);
    }

    fn describe(&mut self, now: Now, new: OwnDescription) {
        match &mut self.phase {
            Phase::Idle => return,
            Phase::Leaving(leaving) => {
                if leaving.next.is_some() {
                    leaving.next = Some(new);
                }
                return;
            }
            Phase::Joining(_) | Phase::Joined(_) => {}
        }
        let Some(own) = &mut self.own else { return };
        if is_same_membership(own, &new) {
            let transports = new.transports.clone();
            *own = OwnDescription { transports: own.transports.clone(), ..new };
            return self.move_to(transports);
        }
        let untouched = matches!(self.phase, Phase::Joining(_))
            && !self.maybe_published
            && self.delayed.is_none()
            && self
                .in_flight
                .as_ref()
                .is_none_or(|request| !matches!(request.task, Task::ScheduleLeave | Task::PutMembership));
        if untouched {
            self.join(now, new);
        } else {
            self.begin_leaving(now, LeaveCode::Leave, Some(new));
            self.set_status(Status::Connecting);
        }
    }

    fn move_to(&mut self, transports: OwnTransports) {
        let Some(own) = self.wanted_mut() else { return };
        let before = std::mem::replace(&mut own.transports, transports);
        let stayed = match (&before.focus, &own.transports.focus) {
            (Some(before), Some(now)) => before.is_same_as(now),
            (before, now) => before.is_none() && now.is_none(),
        };
        if !stayed && !matches!(self.phase, Phase::Leaving(_)) {
            self.withdraw_delegation();
        }
    }

    /// The description that the application's changes apply to.
    fn wanted_mut(&mut self) -> Option<&mut OwnDescription> {
        match &mut self.phase {
            Phase::Idle => None,
            Phase::Joining(_) | Phase::Joined(_) => self.own.as_mut(),
            Phase::Leaving(leaving) => leaving.next.as_mut(),
        }
    }

    fn seen(&mut self, now: Now, sighting: &OwnSighting) {
        let missing_grace = self.config.missing_grace;
        let Phase::Joined(joined) = &mut self.phase else { return };
        match sighting {
            OwnSighting::Listed { created } => {
                joined.seen = true;
                joined.rejoin_at = None;
                // The greatest: a sync may still bring the membership that ours has replaced.
                joined.created = joined.created.max(*created);
                joined.confirm_by = None;
                self.unseen_rejoins = 0;
                self.set_status(Status::Connected);
            }
            OwnSighting::NotSticky => {
                if !std::mem::replace(&mut joined.sticky_unsupported, true) {
                    joined.rejoin_at = None;
                    self.scheduling.sticky_is_ignored();
                    self.events.push_back(Event::StickyUnsupported);
                }
            }
            OwnSighting::Missing => {
                if joined.rejoin_at.is_none() && !joined.sticky_unsupported {
                    let backoff = 1 << if joined.seen { 0 } else { self.unseen_rejoins.min(6) };
                    let at = later(joined.since.instant, missing_grace.saturating_mul(backoff));
                    joined.rejoin_at = Some(at.max(now.instant));
                }
            }
        }
    }

    fn renew(&mut self, now: Now) {
        if self.own.as_ref().is_some_and(|own| own.mode == MembershipMode::Legacy) {
            return;
        }
        let Phase::Joined(joined) = &mut self.phase else { return };
        let next = UnixMillis(joined.created().0.saturating_add(1));
        joined.renewed = Some(now.unix.max(next));
    }

    /// The monotonic clock stands still while a device sleeps, and the homeserver's timers do not.
    fn notice_sleep(&mut self, now: Now) {
        let Some(last) = self.clocks.replace(now) else { return };
        let awake = now.instant.saturating_duration_since(last.instant);
        let slept = now.unix.since(last.unix).saturating_sub(awake);
        if slept < MIN_SLEEP {
            return;
        }
        if let Some(delayed) = &mut self.delayed {
            delayed.slept = delayed.slept.saturating_add(slept);
        }
        if let Phase::Joined(joined) = &mut self.phase {
            joined.restart_at = joined.restart_at.min(now.instant);
            joined.refresh_at = joined.refresh_at.checked_sub(slept).unwrap_or(now.instant);
            self.tries.remove(&Task::RestartLeave);
        }
    }

    /// Does what time alone brings about; returns when the next of that is due.
    fn advance(&mut self, now: Now) -> Option<Instant> {
        if let Some(request) = &self.in_flight
            && now.instant >= request.lost_at
        {
            let (id, task) = (request.id, request.task);
            self.reply(now, id, Err(RequestError::TimedOut));
            if task.schedules() {
                self.remember_orphan(id);
            }
        }
        match &mut self.phase {
            Phase::Idle => None,
            Phase::Leaving(leaving) if now.instant >= leaving.deadline => {
                self.finish_leaving(now);
                None
            }
            Phase::Leaving(leaving) => Some(leaving.deadline),
            Phase::Joining(_) => self.advance_joining(now),
            Phase::Joined(_) => self.advance_joined(now),
        }
    }

    fn advance_joining(&mut self, now: Now) -> Option<Instant> {
        self.check_scheduling();
        // One that fires before the join event helps nothing.
        let renew_by = self.delayed.as_ref().map(|delayed| {
            let spare = self.config.restart_timeout.min(delayed.delay / 3);
            delayed.fires_at().checked_sub(spare).unwrap_or(now.instant)
        });
        if renew_by.is_some_and(|by| now.instant >= by) {
            self.discard_delayed_leave(DelayedAction::Cancel);
        }
        let unsupported =
            self.form() == MembershipForm::Sticky && self.scheduling.sticky_events() == Some(false);
        let deadline = later(now.instant, self.config.join_timeout);
        let Phase::Joining(joining) = &mut self.phase else { return None };
        if unsupported && !std::mem::replace(&mut joining.sticky_unsupported, true) {
            joining.deadline.get_or_insert(deadline);
            self.events.push_back(Event::StickyUnsupported);
        }
        let deadline = joining.deadline;
        if deadline.is_some_and(|deadline| now.instant >= deadline) {
            self.join_timed_out(now);
            return None;
        }
        [deadline, renew_by.filter(|_| self.delayed.is_some())].into_iter().flatten().min()
    }

    fn advance_joined(&mut self, now: Now) -> Option<Instant> {
        if self.delayed.is_some() {
            self.check_delegation();
        }
        let Phase::Joined(joined) = &mut self.phase else { return None };
        if joined.rejoin_at.is_some_and(|at| now.instant >= at) {
            if !joined.seen {
                self.unseen_rejoins = self.unseen_rejoins.saturating_add(1);
            }
            self.rejoin(now, false);
            return None;
        }
        if joined.refresh_due.is_none() && now.instant >= joined.refresh_at {
            joined.refresh_due = Some(now.instant);
            // A sleeping device that wakes up must not list itself again without a delayed leave, so that is
            // restarted first.
            joined.restart_at = now.instant;
        }
        let refresh_at = joined.refresh_due.is_none().then_some(joined.refresh_at);
        let confirm_by = joined.confirm_by;
        let rejoin_at = joined.rejoin_at;
        if confirm_by.is_some_and(|by| now.instant >= by) && !joined.sticky_unsupported {
            joined.confirm_by = None;
            self.set_status(Status::Connected);
        }
        let confirm_by = confirm_by.filter(|by| now.instant < *by);
        [refresh_at, rejoin_at, confirm_by].into_iter().flatten().min()
    }

    fn check_recovery(&mut self, now: Instant) {
        if self.trouble.is_some() && !self.is_in_trouble(now) {
            self.trouble = None;
            self.events.push_back(Event::Recovered);
        }
    }

    fn abandon_request(&mut self, now: Now) {
        let Some(request) = self.in_flight.take() else { return };
        if request.task.writes() {
            self.key_written = Some(now.instant);
        }
        if request.task.schedules() {
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

/// Random numbers, without a `Debug` of their state.
struct Rng(Box<dyn CryptoRng + Send>);

impl fmt::Debug for Rng {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Rng")
    }
}

#[derive(Debug)]
enum Phase {
    /// Nothing to keep alive.
    Idle,
    /// On the way to a first publication, or to one from scratch.
    Joining(Joining),
    Joined(Joined),
    Leaving(Leaving),
}

#[derive(Debug)]
struct Joining {
    since: Instant,
    not_before: Instant,
    /// When a first join is given up; a rejoin never is.
    deadline: Option<Instant>,
    last_error: Option<(Task, RequestError)>,
    /// Nothing is asked until another description comes.
    sticky_unsupported: bool,
}

#[derive(Debug)]
struct Joined {
    /// When the reply to the first publication came.
    since: Now,
    /// When the publication with the present creation time was sent.
    base: Now,
    /// The creation time by the homeserver's clock, once a sync brought it.
    created: Option<UnixMillis>,
    published: OwnDescription,
    restart_at: Instant,
    /// Whether the delayed leave was restarted since the last publication.
    restarted: bool,
    refresh_at: Instant,
    /// Since when a refresh is due.
    refresh_due: Option<Instant>,
    /// A new creation time that is to be published.
    renewed: Option<UnixMillis>,
    seen: bool,
    rejoin_at: Option<Instant>,
    /// Sticky form: until when the status waits for a sync that shows us.
    confirm_by: Option<Instant>,
    sticky_unsupported: bool,
}

impl Joined {
    fn created(&self) -> UnixMillis {
        self.created.unwrap_or(self.base.unix)
    }
}

#[derive(Debug)]
struct InFlight {
    id: RequestId,
    task: Task,
    sent: Now,
    timeout: Duration,
    /// When it counts as timed out although nobody said so.
    lost_at: Instant,
    /// Of a schedule: the delay that was asked for, and how.
    delay: Duration,
    form: Option<ScheduleForm>,
    /// Which delayed leave it is about.
    delay_id: DelayId,
    publication: Option<Publication>,
}

#[derive(Debug)]
struct Publication {
    kind: PublicationKind,
    own: OwnDescription,
    /// Whether the homeserver may have listed us before.
    was_published: bool,
}

#[derive(Clone, Copy, Debug)]
enum PublicationKind {
    First,
    Renewed(UnixMillis),
    Update { refresh: bool },
}

#[derive(Debug, Default)]
struct Tries {
    failures: u32,
    not_before: Option<Instant>,
}

/// Failures of requests that keep us in the call.
#[derive(Debug)]
struct Trouble {
    since: UnixMillis,
    /// What the application knows of it.
    told: Vec<(Task, Discriminant<RequestError>)>,
}

/// Whether both describe one membership: the same leave ends it.
fn is_same_membership(a: &OwnDescription, b: &OwnDescription) -> bool {
    wire::leave(a, LeaveCode::Leave) == wire::leave(b, LeaveCode::Leave)
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
mod model;
#[cfg(test)]
mod tests;
