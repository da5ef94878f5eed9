//! What is to be asked next, and how.

use std::time::{Duration, Instant};

use serde_json::Value;

use super::{
    InFlight, Joined, Leaving, MAX_CANCEL_TRIES, Now, Output, OwnMembership, Phase, Publication,
    PublicationKind, Request, RequestId, Support, later,
};
use crate::membership::wire::state_content;

/// How long past its timeout a request is waited for before it counts as lost with its reply.
const REPLY_SLACK: Duration = Duration::from_secs(1);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    ScheduleLeave,
    ReadMaxDelay,
    RestartLeave,
    SendLeave,
    CancelLeave,
    ScheduleLongLeave,
    DelegateLeave,
    ReplaceLeave,
    PutMembership,
    PutLeave,
}

impl Kind {
    /// Whether its answer may bring a delayed leave, however late.
    pub(super) fn schedules(self) -> bool {
        matches!(self, Self::ScheduleLeave | Self::ScheduleLongLeave)
    }

    /// Whether it is about the delayed leave of the present membership, and about no other.
    pub(super) fn concerns_delayed_leave(self) -> bool {
        matches!(
            self,
            Self::RestartLeave | Self::ScheduleLongLeave | Self::DelegateLeave | Self::ReplaceLeave
        )
    }

    pub(super) fn doing(self) -> &'static str {
        match self {
            Self::ScheduleLeave => "scheduling the delayed leave",
            Self::ReadMaxDelay => "reading the longest delay",
            Self::RestartLeave => "restarting the delayed leave",
            Self::SendLeave => "sending the delayed leave",
            Self::CancelLeave => "cancelling a delayed leave",
            Self::ScheduleLongLeave => "scheduling the delayed leave that the focus is to keep",
            Self::DelegateLeave => "delegating the delayed leave to the focus",
            Self::ReplaceLeave => "cancelling the delayed leave that the focus has replaced",
            Self::PutMembership => "publishing it",
            Self::PutLeave => "writing the leave",
        }
    }
}

#[derive(Debug)]
pub(super) enum Step {
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

impl OwnMembership {
    pub(super) fn next_step(&self, now: Instant) -> Step {
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
        keep_alive.or(publish).or(self.delegation_step(now)).or(self.cancel_step(now, MAX_CANCEL_TRIES))
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

    pub(super) fn gated(&self, kind: Kind, at: Instant, now: Instant) -> Step {
        let at = self.tries.get(&kind).and_then(|tries| tries.not_before).map_or(at, |gate| gate.max(at));
        if at <= now { Step::Start(kind) } else { Step::WaitUntil(at) }
    }

    pub(super) fn start(&mut self, now: Now, kind: Kind) -> Output {
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
            Kind::ScheduleLongLeave => {
                in_flight.delay = self.long_delay();
                Request::ScheduleLeave { delay: in_flight.delay }
            }
            Kind::DelegateLeave => {
                let (delay_id, delay) = self.delegation.handed_over();
                self.in_flight = Some(in_flight);
                return Output::Delegate { id, delay_id, delay, timeout };
            }
            Kind::ReplaceLeave => Request::CancelLeave { delay_id: self.delay_id() },
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
            Kind::SendLeave | Kind::CancelLeave | Kind::ReplaceLeave => self.config.restart_timeout,
            // What hangs must not keep us from the next restart.
            Kind::PutMembership | Kind::ScheduleLongLeave | Kind::DelegateLeave => match until_fired {
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
}

/// The smallest multiple of `unit` that is at least `least`.
fn multiple_of(unit: Duration, least: Duration) -> Duration {
    let unit = unit.as_millis().max(1);
    let millis = least.as_millis().div_ceil(unit).saturating_mul(unit);
    Duration::from_millis(u64::try_from(millis).unwrap_or(u64::MAX))
}
