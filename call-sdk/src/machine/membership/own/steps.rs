//! What is asked next, and how.

use std::time::{Duration, Instant};

use super::{
    InFlight, Joined, Joining, Now, Output, OwnMembership, Phase, Publication, PublicationKind, RequestId,
    Task, delayed_leave::MAX_DROP_TRIES, later,
};
use crate::{
    machine::membership::wire::{self, LeaveCode},
    matrix::{DelayId, DelayedAction, DelayedEvent, EventTarget, EventWrite, MatrixRequest},
    member::MembershipForm,
};

/// How long past its timeout a request is waited for before it counts as lost with its reply.
const REPLY_SLACK: Duration = Duration::from_secs(1);
/// Least time between two events of one sticky key: of two with the same expiry the greater event id would win
/// (MSC4354).
const KEY_SPACING: Duration = Duration::from_millis(1);
/// By how much an event that would repeat the present one expires later.
const REPEATED: Duration = Duration::from_secs(1);
/// How often a rejoin tries to find a form of scheduling before it does without a delayed leave.
const MAX_UNPROVEN_TRIES: u32 = 5;
/// Shortest stickiness that events should have (MSC4354).
const MIN_STICKY: Duration = Duration::from_mins(5);

#[derive(Debug)]
pub(super) enum Step {
    Start(Task),
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

impl OwnMembership {
    pub(super) fn next_step(&self, now: Instant) -> Step {
        match &self.phase {
            Phase::Idle => self.drop_step(now, MAX_DROP_TRIES),
            Phase::Joining(joining) => self.joining_step(now, joining),
            Phase::Joined(joined) => self.joined_step(now, joined),
            Phase::Leaving(leaving) => self.leaving_step(now, leaving),
        }
    }

    fn joining_step(&self, now: Instant, joining: &Joining) -> Step {
        if joining.sticky_unsupported {
            return Step::Nothing;
        }
        if now < joining.not_before {
            return Step::WaitUntil(joining.not_before);
        }
        // A first try to drop what could end the new membership; the rest of the tries can wait.
        if let step @ Step::Start(_) = self.drop_step(now, 1) {
            return step;
        }
        let task = if self.scheduling.is_read() { self.schedule_task() } else { Some(Task::ReadSupport) };
        let put = || self.gated(Task::PutMembership, now, now);
        let Some(task) = task else { return put() };
        let failures = self.tries.get(&task).map_or(0, |tries| tries.failures);
        // A rejoin must not depend on the delayed leave. A proven form can bring it later, another cannot.
        let is_proven = self.scheduling.task(true).is_some();
        match (joining.deadline, is_proven) {
            (None, true) if failures > 0 => self.gated(task, now, now).or(put()),
            (None, false) if failures >= MAX_UNPROVEN_TRIES => put(),
            _ => self.gated(task, now, now),
        }
    }

    fn joined_step(&self, now: Instant, joined: &Joined) -> Step {
        let keep_alive = match (&self.delayed, self.schedule_task()) {
            (Some(_), _) => self.gated(Task::RestartLeave, joined.restart_at, now),
            (None, Some(task)) => self.gated(task, now, now),
            (None, None) => Step::Nothing,
        };
        let publish = if self.publication_wanted(now, joined) {
            self.gated(Task::PutMembership, now, now)
        } else {
            Step::Nothing
        };
        keep_alive.or(publish).or(self.delegation_step(now)).or(self.drop_step(now, MAX_DROP_TRIES))
    }

    fn publication_wanted(&self, now: Instant, joined: &Joined) -> bool {
        // A device that slept past its leave must not list itself again without one.
        if self.delayed.as_ref().is_some_and(|delayed| now >= delayed.fires_at()) {
            return false;
        }
        let refresh = joined.refresh_due.is_some_and(|due| match &self.delayed {
            // The service keeps a delegated one alive, whatever our own restarts meet.
            Some(delayed) => {
                delayed.since >= due
                    || (self.delegation.is_done() && self.tries.contains_key(&Task::RestartLeave))
            }
            None => self.schedule_task().is_none_or(|task| self.tries.contains_key(&task)),
        });
        refresh || joined.renewed.is_some() || self.own.as_ref() != Some(&joined.published)
    }

    fn drop_step(&self, now: Instant, tries: u32) -> Step {
        if self.stale.iter().any(|stale| stale.tries < tries) {
            self.gated(Task::DropLeave, now, now)
        } else {
            Step::Nothing
        }
    }

    /// What is to be asked so that we have a delayed leave; `None` if we have one or can have none.
    pub(super) fn schedule_task(&self) -> Option<Task> {
        if self.delayed.is_some() || self.without_leave {
            return None;
        }
        self.scheduling.task(matches!(self.phase, Phase::Joined(_)))
    }

    /// Whether something that keeps us in the call waits for another try.
    pub(super) fn is_in_trouble(&self, now: Instant) -> bool {
        let failed = |task: Task| self.tries.contains_key(&task);
        match &self.phase {
            Phase::Joined(joined) => {
                self.schedule_task().is_some_and(failed)
                    || (self.delayed.is_some() && failed(Task::RestartLeave))
                    || (failed(Task::PutMembership) && self.publication_wanted(now, joined))
            }
            _ => true,
        }
    }

    pub(super) fn gated(&self, task: Task, at: Instant, now: Instant) -> Step {
        let mut at = self.tries.get(&task).and_then(|tries| tries.not_before).map_or(at, |gate| gate.max(at));
        if task.writes()
            && self.form() == MembershipForm::Sticky
            && let Some(written) = self.key_written
        {
            at = at.max(later(written, KEY_SPACING));
        }
        if at <= now { Step::Start(task) } else { Step::WaitUntil(at) }
    }

    /// Makes the request of a task. `None` if there is nothing to ask, which no step leads to.
    pub(super) fn start(&mut self, now: Now, task: Task) -> Option<Output> {
        let timeout = self.timeout(now.instant, task);
        let mut in_flight = InFlight {
            id: RequestId(self.last_id + 1),
            task,
            sent: now,
            timeout,
            lost_at: later(later(now.instant, timeout), REPLY_SLACK),
            delay: Duration::ZERO,
            delay_id: DelayId(String::new()),
            form: None,
            publication: None,
        };
        let id = in_flight.id;
        let request = match task {
            Task::ReadSupport => MatrixRequest::ReadSupport,
            Task::ProbeDelayParameter => MatrixRequest::ProbeDelayParameter,
            Task::ScheduleLeave => self.schedule(self.leave_delay(), &mut in_flight)?,
            Task::ScheduleLongLeave => self.schedule(self.long_delay(), &mut in_flight)?,
            Task::RestartLeave => self.update_delayed(DelayedAction::Restart, &mut in_flight)?,
            Task::SendLeave => self.update_delayed(DelayedAction::Send, &mut in_flight)?,
            Task::ReplaceLeave => self.update_delayed(DelayedAction::Cancel, &mut in_flight)?,
            Task::DropLeave => {
                let (delay_id, action) = self.next_to_drop()?;
                in_flight.delay_id = delay_id.clone();
                MatrixRequest::UpdateDelayed { delay_id, action }
            }
            Task::DelegateLeave => {
                let (delay_id, delay) = self.delegation.handed_over()?;
                self.last_id = id.0;
                self.in_flight = Some(in_flight);
                return Some(Output::Delegate { id, delay_id, delay, timeout });
            }
            Task::PutMembership => {
                let (write, publication) = self.publication(now)?;
                in_flight.publication = Some(publication);
                self.maybe_published = true;
                MatrixRequest::Send(write)
            }
            Task::PutLeave => {
                let code = match &self.phase {
                    Phase::Leaving(leaving) => leaving.code,
                    _ => LeaveCode::Leave,
                };
                let leave = wire::leave(self.own.as_ref()?, code);
                MatrixRequest::Send(self.with_duration(leave, self.has_leave()))
            }
        };
        self.last_id = id.0;
        self.in_flight = Some(in_flight);
        Some(Output::Request { id, request, timeout })
    }

    fn schedule(&mut self, delay: Duration, in_flight: &mut InFlight) -> Option<MatrixRequest> {
        let form = self.scheduling.form()?;
        let leave = wire::leave(self.own.as_ref()?, LeaveCode::DelayedLeave);
        in_flight.delay = delay;
        in_flight.form = Some(form);
        let event = self.with_duration(leave, true);
        Some(MatrixRequest::Schedule(DelayedEvent { event, delay, form }))
    }

    fn update_delayed(&self, action: DelayedAction, in_flight: &mut InFlight) -> Option<MatrixRequest> {
        let delay_id = self.delayed.as_ref()?.id.clone();
        in_flight.delay_id = delay_id.clone();
        Some(MatrixRequest::UpdateDelayed { delay_id, action })
    }

    /// Gives a sticky event the duration of its key. It never changes for a key, as the event that expires last wins:
    /// a shorter join would lose against a longer leave.
    fn with_duration(&mut self, mut write: EventWrite, has_leave: bool) -> EventWrite {
        let (EventTarget::Message { sticky: Some(duration) }
        | EventTarget::ClearMessage { sticky: Some(duration) }) = &mut write.target
        else {
            return write;
        };
        let short = self.config.undelayed_expires.max(MIN_STICKY).min(*duration);
        let chosen = if has_leave { *duration } else { short };
        *duration = *self.sticky.get_or_insert(chosen);
        write
    }

    /// Whether we have a delayed leave or are about to have one.
    pub(super) fn has_leave(&self) -> bool {
        self.delayed.is_some() || (!self.without_leave && self.scheduling.task(true).is_some())
    }

    /// How long past a publication others list us if nothing more comes from us.
    pub(super) fn lasting(&self) -> Duration {
        match self.form() {
            MembershipForm::State if self.has_leave() => self.config.expires,
            MembershipForm::State => self.config.undelayed_expires,
            MembershipForm::Sticky => {
                self.sticky.unwrap_or_else(|| self.config.undelayed_expires.max(MIN_STICKY))
            }
        }
    }

    fn timeout(&self, now: Instant, task: Task) -> Duration {
        let until_fired =
            self.delayed.as_ref().map(|delayed| delayed.fires_at().saturating_duration_since(now));
        let timeout = match task {
            // So that we know at the very moment when the homeserver has probably sent our leave.
            Task::RestartLeave => match until_fired {
                Some(left) if !self.probably_left && !left.is_zero() => self.config.restart_timeout.min(left),
                _ => self.config.restart_timeout,
            },
            Task::SendLeave | Task::DropLeave | Task::ReplaceLeave => self.config.restart_timeout,
            // A request that hangs must not keep us from the next restart.
            Task::PutMembership | Task::ScheduleLongLeave | Task::DelegateLeave => match until_fired {
                Some(left) => {
                    let spare = left.saturating_sub(self.config.restart_timeout * 2);
                    self.config.request_timeout.min(spare.max(self.config.restart_timeout))
                }
                None => self.config.request_timeout,
            },
            Task::PutLeave => self.config.request_timeout.min(self.config.leave_timeout / 2),
            Task::ScheduleLeave | Task::ReadSupport | Task::ProbeDelayParameter => {
                self.config.request_timeout
            }
        };
        match &self.phase {
            Phase::Leaving(leaving) => timeout.min(leaving.deadline.saturating_duration_since(now)),
            _ => timeout,
        }
    }

    /// The event to publish now, and what it means once it is published.
    fn publication(&mut self, now: Now) -> Option<(EventWrite, Publication)> {
        let own = self.own.clone()?;
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
        let least = self.lasting();
        let expires = multiple_of(least, age.saturating_add(least));
        let mut write = wire::membership(&own, expires, created);
        let kind = match &self.phase {
            Phase::Joined(Joined { renewed: Some(renewed), .. }) => PublicationKind::Renewed(*renewed),
            Phase::Joined(_) => PublicationKind::Update { refresh },
            _ => PublicationKind::First,
        };
        // A homeserver drops a state event that repeats the present one. Then the others would not see that this
        // device is new in the call, and would not send it their keys.
        if self.left_behind.as_ref() == Some(&write.content) {
            write = wire::membership(&own, expires.saturating_add(REPEATED), created);
        }
        Some((
            self.with_duration(write, self.has_leave()),
            Publication { kind, own, was_published: self.maybe_published },
        ))
    }
}

/// The smallest multiple of `unit` that is at least `least`.
fn multiple_of(unit: Duration, least: Duration) -> Duration {
    let unit = unit.as_millis().max(1);
    let millis = least.as_millis().div_ceil(unit).saturating_mul(unit);
    Duration::from_millis(u64::try_from(millis).unwrap_or(u64::MAX))
}
