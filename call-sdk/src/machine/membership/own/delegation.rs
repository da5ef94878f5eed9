//! Our delayed leave in the hands of the focus's authorisation service (MSC4195 §Delegation of Delayed Leave).
//!
//! The service learns from the SFU when we are gone, and has the homeserver send our leave at once, even if this process
//! crashed. So the delay may be long, and we restart it rarely, only to notice its loss.
//!
//! The long delay needs a second delayed leave: until the service has taken that, we keep the short one alive, so that
//! a crash in between does not leave us listed for the long time. If delegation fails, nothing changes.

use std::time::{Duration, Instant};

use super::{
    Delayed, Event, InFlight, Now, OwnMembership, Phase, Step, Task, later, messages::DelegationError,
};
use crate::matrix::{DelayId, DelayedAction, MatrixReply, RequestError};

/// With a delay shorter than this, an hour's outage of the service is better survived by restarting ourselves.
const MIN_DELAY: Duration = Duration::from_secs(60);
/// How often a request of the delegation is tried before we keep the short delayed leave.
const MAX_TRIES: u32 = 8;

/// Progress of the delegation.
#[derive(Debug, Default)]
pub(super) struct Delegation {
    /// Whether the caller knows a service that may take our leave.
    offered: bool,
    /// The longest delay that the homeserver allows, if that is shorter than ours.
    limit: Option<Duration>,
    stage: Stage,
}

#[derive(Debug, Default)]
enum Stage {
    /// Nothing to do.
    #[default]
    Off,
    /// The long delayed leave has to be scheduled.
    Schedule,
    /// The service has to take it.
    HandOver(Delayed),
    /// The service keeps it; the short one has to be cancelled.
    Replace(Delayed),
    /// The service keeps our only delayed leave.
    Done,
}

impl Delegation {
    /// Whether the service keeps our only delayed leave.
    pub(super) fn is_done(&self) -> bool {
        matches!(self.stage, Stage::Done)
    }

    fn delayed(&self) -> Option<&Delayed> {
        match &self.stage {
            Stage::HandOver(delayed) | Stage::Replace(delayed) => Some(delayed),
            Stage::Off | Stage::Schedule | Stage::Done => None,
        }
    }

    /// The delayed leave that the service is asked to keep, and its delay.
    pub(super) fn handed_over(&self) -> Option<(DelayId, Duration)> {
        self.delayed().map(|delayed| (delayed.id.clone(), delayed.delay))
    }
}

impl OwnMembership {
    /// There is a service that may take our leave.
    pub(super) fn offer_delegation(&mut self) {
        self.delegation.offered = true;
        if matches!(self.delegation.stage, Stage::Off) {
            self.delegation.stage = Stage::Schedule;
        }
    }

    /// From the beginning: the service keeps no delayed leave of ours any more.
    pub(super) fn restart_delegation(&mut self) {
        self.stop_delegation();
        if self.delegation.offered {
            self.delegation.stage = Stage::Schedule;
        }
    }

    /// What was scheduled for the service and is not our delayed leave yet must not fire.
    pub(super) fn stop_delegation(&mut self) {
        if let Stage::HandOver(delayed) | Stage::Replace(delayed) = std::mem::take(&mut self.delegation.stage)
        {
            self.discard(delayed.id, DelayedAction::Cancel);
        }
    }

    /// The service is not to keep our leave any more, and there is no other yet.
    pub(super) fn withdraw_delegation(&mut self) {
        self.delegation.offered = false;
        if self.delegation.is_done() {
            // It would send the leave when we leave its SFU.
            self.discard_delayed_leave(DelayedAction::Cancel);
        }
        self.stop_delegation();
    }

    pub(super) fn delegation_step(&self, now: Instant) -> Step {
        // Without a short one there is nothing to hand over safely.
        if self.delayed.is_none() || self.scheduling.task(true).is_none() {
            return Step::Nothing;
        }
        match self.delegation.stage {
            Stage::Schedule => self.gated(Task::ScheduleLongLeave, now, now),
            Stage::HandOver(_) => self.gated(Task::DelegateLeave, now, now),
            Stage::Replace(_) => self.gated(Task::ReplaceLeave, now, now),
            Stage::Off | Stage::Done => Step::Nothing,
        }
    }

    pub(super) fn long_delay(&self) -> Duration {
        [self.delegation.limit, self.scheduling.max_delay()]
            .into_iter()
            .flatten()
            .fold(self.config.delegated_delay, Duration::min)
    }

    /// Once joined: whether the homeserver's limit rules delegation out.
    pub(super) fn check_delegation(&mut self) {
        if matches!(self.delegation.stage, Stage::Schedule) && self.long_delay() < MIN_DELAY {
            self.give_delegation_up(DelegationError::LimitTooShort { least: MIN_DELAY });
        }
    }

    pub(super) fn long_leave_scheduled(
        &mut self,
        now: Now,
        request: &InFlight,
        result: Result<MatrixReply, RequestError>,
    ) {
        let wanted =
            matches!(self.delegation.stage, Stage::Schedule) && matches!(self.phase, Phase::Joined(_));
        let error = match result {
            Ok(MatrixReply::Scheduled { delay_id }) if wanted => {
                self.delegation.stage = Stage::HandOver(Delayed::new(delay_id, request));
                return;
            }
            Ok(MatrixReply::Scheduled { delay_id }) => return self.discard(delay_id, DelayedAction::Cancel),
            Ok(_) => return self.leave_was_sent_at_once(now),
            Err(error) => error,
        };
        match error {
            RequestError::MaxDelayExceeded { max: Some(max) }
                if (MIN_DELAY..request.delay).contains(&max) =>
            {
                self.delegation.limit = Some(max);
            }
            RequestError::MaxDelayExceeded { .. } => {
                self.give_delegation_up(DelegationError::LimitTooShort { least: MIN_DELAY });
            }
            error => self.delegation_failed(now, request, error, DelegationError::NotScheduled),
        }
    }

    pub(super) fn leave_delegated(
        &mut self,
        now: Now,
        request: &InFlight,
        result: Result<MatrixReply, RequestError>,
    ) {
        match (std::mem::take(&mut self.delegation.stage), result) {
            (Stage::HandOver(delayed), Ok(_)) => self.delegation.stage = Stage::Replace(delayed),
            (stage, Ok(_)) => self.delegation.stage = stage,
            (stage, Err(error)) => {
                self.delegation.stage = stage;
                self.delegation_failed(now, request, error, DelegationError::NotTaken);
            }
        }
    }

    pub(super) fn leave_replaced(
        &mut self,
        now: Now,
        request: &InFlight,
        result: Result<MatrixReply, RequestError>,
    ) {
        let fired = self.delayed.as_ref().is_some_and(|delayed| now.instant >= delayed.fires_at());
        match result {
            // Cancelled by this request, by an earlier try whose answer was lost, or sent.
            Ok(_) | Err(RequestError::NotFound | RequestError::AlreadyFinal) => {
                let sent = result.is_err() && fired;
                let Stage::Replace(delayed) = std::mem::replace(&mut self.delegation.stage, Stage::Done)
                else {
                    self.delegation.stage = Stage::Off;
                    return;
                };
                let since = delayed.since;
                self.delayed = Some(delayed);
                let interval = self.restart_interval();
                if let Phase::Joined(joined) = &mut self.phase {
                    joined.restart_at = later(since, interval).max(now.instant);
                }
                self.tries.remove(&Task::RestartLeave);
                self.events.push_back(Event::LeaveDelegated);
                if sent {
                    self.rejoin_lost(now);
                }
            }
            Err(error) => self.delegation_failed(now, request, error, DelegationError::NotReplaced),
        }
    }

    /// Tries again later, or goes on without.
    fn delegation_failed(
        &mut self,
        now: Now,
        request: &InFlight,
        error: RequestError,
        doing: fn(RequestError) -> DelegationError,
    ) {
        let failures = self.tries.get(&request.task).map_or(0, |tries| tries.failures);
        if error.is_transient() && failures + 1 < MAX_TRIES {
            self.retry(now, request, &error);
        } else {
            self.give_delegation_up(doing(error));
        }
    }

    fn give_delegation_up(&mut self, error: DelegationError) {
        self.delegation.offered = false;
        for task in [Task::ScheduleLongLeave, Task::DelegateLeave, Task::ReplaceLeave] {
            self.tries.remove(&task);
        }
        match std::mem::take(&mut self.delegation.stage) {
            Stage::HandOver(delayed) | Stage::Replace(delayed) => {
                self.discard(delayed.id, DelayedAction::Cancel)
            }
            Stage::Off | Stage::Schedule | Stage::Done => {}
        }
        self.events.push_back(Event::DelegationFailed(error));
    }
}
