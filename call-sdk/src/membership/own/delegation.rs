//! Our delayed leave in the hands of the focus's authorisation service (MSC4195 §Delegation of Delayed Leave).
//!
//! The service learns from the SFU when we are gone, and has the homeserver send our leave within a moment, whatever
//! became of this process. So the delay may be long, and we restart it rarely, only to notice that it is gone.
//!
//! It takes a second delayed leave: until the service has taken that, the short one stays ours to keep, so that a
//! crash in between does not leave us listed for the long time. If nothing comes of it, all stays as it was.

use std::time::{Duration, Instant};

use super::{
    Delayed, Event, InFlight, Now, OwnMembership, Phase, Reply, RequestError, Step, later, replies::Retry,
    steps::Kind,
};

/// With a delay shorter than this, an hour's outage of the service is better survived by restarting ourselves.
const MIN_DELAY: Duration = Duration::from_secs(60);

/// How far the handing over is.
#[derive(Debug, Default)]
pub(super) struct Delegation {
    /// Whether the shell can reach a service that may take our leave.
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
    /// The service keeps it; the short one has to go.
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
    pub(super) fn handed_over(&self) -> (String, Duration) {
        self.delayed().map(|delayed| (delayed.id.clone(), delayed.delay)).unwrap_or_default()
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

    /// From the beginning: there is no delayed leave any more that the service keeps.
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
            self.discard(delayed.id);
        }
    }

    pub(super) fn delegation_step(&self, now: Instant) -> Step {
        // Without a short one there is nothing to hand over safely.
        if self.delayed.is_none() {
            return Step::Nothing;
        }
        match self.delegation.stage {
            Stage::Schedule => self.gated(Kind::ScheduleLongLeave, now, now),
            Stage::HandOver(_) => self.gated(Kind::DelegateLeave, now, now),
            Stage::Replace(_) => self.gated(Kind::ReplaceLeave, now, now),
            Stage::Off | Stage::Done => Step::Nothing,
        }
    }

    pub(super) fn long_delay(&self) -> Duration {
        let longest = self.config.delegated_delay;
        self.delegation.limit.map_or(longest, |limit| limit.min(longest))
    }

    pub(super) fn long_leave_scheduled(
        &mut self,
        now: Now,
        request: &InFlight,
        result: Result<Reply, RequestError>,
    ) {
        let wanted =
            matches!(self.delegation.stage, Stage::Schedule) && matches!(self.phase, Phase::Joined(_));
        let error = match result {
            Ok(Reply::Scheduled { delay_id }) if wanted => {
                let since = request.sent.instant;
                self.delegation.stage =
                    Stage::HandOver(Delayed { id: delay_id, since, delay: request.delay });
                return;
            }
            Ok(Reply::Scheduled { delay_id }) => return self.discard(delay_id),
            Ok(_) => RequestError::Other { message: "the answer holds no delay id".to_owned() },
            Err(error) => error,
        };
        match error {
            RequestError::MaxDelayExceeded { max: Some(max) }
                if (MIN_DELAY..request.delay).contains(&max) =>
            {
                self.delegation.limit = Some(max);
            }
            error => self.delegation_failed(now, request, &error),
        }
    }

    pub(super) fn leave_delegated(
        &mut self,
        now: Now,
        request: &InFlight,
        result: Result<Reply, RequestError>,
    ) {
        match (std::mem::take(&mut self.delegation.stage), result) {
            (Stage::HandOver(delayed), Ok(_)) => self.delegation.stage = Stage::Replace(delayed),
            (stage, Ok(_)) => self.delegation.stage = stage,
            (stage, Err(error)) => {
                self.delegation.stage = stage;
                self.delegation_failed(now, request, &error);
            }
        }
    }

    pub(super) fn leave_replaced(
        &mut self,
        now: Now,
        request: &InFlight,
        result: Result<Reply, RequestError>,
    ) {
        match result {
            // Whatever became of it: it will not fire any more.
            Ok(_) | Err(RequestError::NotFound) => {
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
                self.events.push_back(Event::LeaveDelegated);
            }
            Err(error) => self.delegation_failed(now, request, &error),
        }
    }

    /// Tries again later, or goes on without.
    fn delegation_failed(&mut self, now: Now, request: &InFlight, error: &RequestError) {
        let reason = match self.retry(now, request, error) {
            Retry::Later => return,
            Retry::No => error.to_string(),
            Retry::Exhausted(reason) => reason,
        };
        self.delegation.offered = false;
        match std::mem::take(&mut self.delegation.stage) {
            Stage::HandOver(delayed) => self.discard(delayed.id),
            // The service keeps it all the same, which does no harm beside the one that we keep.
            Stage::Replace(_) | Stage::Off | Stage::Schedule | Stage::Done => {}
        }
        self.events.push_back(Event::DelegationFailed { reason });
    }
}
