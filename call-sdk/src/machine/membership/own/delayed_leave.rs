//! The delayed leave: scheduled, restarted, and replaced when it is lost.

use std::time::{Duration, Instant};

use super::{Event, InFlight, Now, OwnMembership, Phase, Task, later, messages::NoDelayedLeave};
use crate::{
    matrix::{DelayId, DelayedAction, MatrixReply, RequestError},
    member::MembershipForm,
};

/// A delayed leave shorter than this is not worth its requests: a passing fault would end the membership.
const MIN_LEAVE_DELAY: Duration = Duration::from_secs(5);
/// How often the delay is adapted to what the homeserver allows before we go without.
const MAX_DELAY_ADAPTATIONS: u32 = 8;
/// How often dropping a delayed leave of an earlier membership is tried. It ends by itself.
pub(super) const MAX_DROP_TRIES: u32 = 3;
/// Most delayed leaves of earlier memberships that are remembered.
pub(super) const MAX_STALE: usize = 8;

/// A delayed leave that the homeserver holds for us.
#[derive(Debug)]
pub(super) struct Delayed {
    pub(super) id: DelayId,
    /// When its last successful (re)start was asked for: the homeserver cannot have counted from earlier.
    pub(super) since: Instant,
    pub(super) delay: Duration,
    /// How long this device has slept since: the monotonic clock stands still meanwhile.
    pub(super) slept: Duration,
}

impl Delayed {
    pub(super) fn new(id: DelayId, request: &InFlight) -> Self {
        Self { id, since: request.sent.instant, delay: request.delay, slept: Duration::ZERO }
    }

    /// When the homeserver sends it, at the earliest.
    pub(super) fn fires_at(&self) -> Instant {
        later(self.since, self.delay.saturating_sub(self.slept))
    }
}

/// A delayed leave of an earlier membership.
#[derive(Debug)]
pub(super) struct Stale {
    pub(super) id: DelayId,
    /// Cancelled, as it would end the present membership; or sent, if it ends one under another sticky key.
    pub(super) action: DelayedAction,
    pub(super) tries: u32,
}

impl OwnMembership {
    pub(super) fn support_read(
        &mut self,
        now: Now,
        request: &InFlight,
        result: Result<MatrixReply, RequestError>,
    ) {
        match result {
            Ok(MatrixReply::Support(support)) => self.scheduling.learn(support),
            Err(error) if error.is_transient() => self.retry(now, request, &error),
            Ok(_) | Err(_) => self.scheduling.learn_nothing(),
        }
    }

    pub(super) fn probed(&mut self, now: Now, request: &InFlight, result: Result<MatrixReply, RequestError>) {
        match result {
            Err(error) if error.is_transient() => self.retry(now, request, &error),
            // Anything but a clear yes means that a leave might be sent at once.
            result => self.scheduling.probed(matches!(result, Ok(MatrixReply::DelayParameter(true)))),
        }
    }

    /// Before a join event: whether it has to do without a delayed leave.
    pub(super) fn check_scheduling(&mut self) {
        if !self.without_leave
            && let Some(obstacle) = self.scheduling.obstacle(MIN_LEAVE_DELAY)
        {
            self.no_delayed_leave(obstacle);
        }
    }

    pub(super) fn scheduled(
        &mut self,
        now: Now,
        request: &InFlight,
        result: Result<MatrixReply, RequestError>,
    ) {
        let error = match result {
            Ok(MatrixReply::Scheduled { delay_id }) => {
                if let Some(form) = request.form {
                    self.scheduling.proven(form);
                }
                self.delayed = Some(Delayed::new(delay_id, request));
                self.delay_adaptations = 0;
                self.told_no_leave = None;
                self.plan_restart(now, request);
                return;
            }
            Ok(_) => return self.leave_was_sent_at_once(now),
            Err(error) => error,
        };
        let joined = match self.phase {
            Phase::Joining(_) => false,
            Phase::Joined(_) => true,
            Phase::Leaving(_) | Phase::Idle => return,
        };
        match error {
            RequestError::MaxDelayExceeded { max } => self.adapt_delay(max),
            RequestError::Unsupported if !joined => self.scheduling.missing(joined),
            error if joined || error.is_transient() => {
                if error == RequestError::Unsupported {
                    self.scheduling.missing(joined);
                }
                self.retry(now, request, &error);
            }
            error => self.no_delayed_leave(NoDelayedLeave::Refused(error)),
        }
    }

    /// The homeserver sent a leave instead of scheduling it. While joining, the join event comes later and wins; a
    /// joined member has to join again.
    pub(super) fn leave_was_sent_at_once(&mut self, now: Now) {
        self.key_written = Some(now.instant);
        self.scheduling.sent_at_once();
        self.withdraw_delegation();
        self.no_delayed_leave(NoDelayedLeave::SentAtOnce);
        if matches!(self.phase, Phase::Joined(_)) {
            self.rejoin(now, true);
        }
    }

    /// Takes the homeserver's limit, or halves the delay if it names none.
    fn adapt_delay(&mut self, max: Option<Duration>) {
        let current = self.leave_delay();
        self.delay_adaptations += 1;
        let next = max.filter(|max| *max < current).unwrap_or(current / 2);
        if next < MIN_LEAVE_DELAY || self.delay_adaptations > MAX_DELAY_ADAPTATIONS {
            self.no_delayed_leave(NoDelayedLeave::LimitTooShort { least: MIN_LEAVE_DELAY });
        } else {
            self.delay_limit = Some(next);
        }
    }

    pub(super) fn no_delayed_leave(&mut self, reason: NoDelayedLeave) {
        self.without_leave = true;
        self.tries.remove(&Task::ScheduleLeave);
        if self.told_no_leave.as_ref() != Some(&reason) {
            self.told_no_leave = Some(reason.clone());
            let listed_for = self.lasting();
            self.events.push_back(Event::DelayedLeaveUnavailable { reason, listed_for });
        }
    }

    pub(super) fn restarted(
        &mut self,
        now: Now,
        request: &InFlight,
        result: Result<MatrixReply, RequestError>,
    ) {
        let Phase::Joined(joined) = &mut self.phase else { return };
        let Some(delayed) = &mut self.delayed else { return };
        let fired = now.instant >= delayed.fires_at();
        let Err(error) = result else {
            delayed.since = request.sent.instant;
            delayed.slept = Duration::ZERO;
            joined.restarted = true;
            self.restart_works = true;
            self.lost_rejoins = 0;
            self.plan_restart(now, request);
            self.set_probably_left(false);
            return;
        };
        match error {
            RequestError::NotFound | RequestError::AlreadyFinal => {
                // It was sent, and we are not listed any more; or the server dropped it, and we need another. Some
                // servers cancel a delayed state event when its key is written, which is as final (409) as sending.
                let cancelled_by_write = !joined.restarted && self.form() == MembershipForm::State;
                let sent = match error {
                    RequestError::AlreadyFinal => fired || self.delegation.is_done() || !cancelled_by_write,
                    _ => fired,
                };
                self.delayed = None;
                self.tries.remove(&Task::RestartLeave);
                if self.delegation.is_done() {
                    self.restart_delegation();
                }
                if sent {
                    self.rejoin_lost(now);
                }
            }
            // It cannot be kept alive here: it fires, and the next sync without us makes us rejoin without one.
            RequestError::Unsupported if !self.restart_works => {
                self.delayed = None;
                self.tries.remove(&Task::RestartLeave);
                self.scheduling.switch_off();
                self.withdraw_delegation();
                self.no_delayed_leave(NoDelayedLeave::NotSupported);
            }
            error => {
                self.retry(now, request, &error);
                if fired {
                    self.set_probably_left(true);
                }
            }
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

    pub(super) fn dropped(
        &mut self,
        now: Now,
        request: &InFlight,
        result: Result<MatrixReply, RequestError>,
    ) {
        let again = result.err().filter(RequestError::is_transient);
        if let Some(error) = &again {
            self.retry(now, request, error);
        }
        if matches!(self.phase, Phase::Leaving(_))
            && let Some(delayed) = self.delayed.take_if(|delayed| delayed.id == request.delay_id)
        {
            if again.is_some() {
                self.discard(delayed.id, DelayedAction::Cancel);
            }
            return;
        }
        if let Some(at) = self.stale.iter().position(|stale| stale.id == request.delay_id) {
            self.stale[at].tries += 1;
            if again.is_none() || self.stale[at].tries >= MAX_DROP_TRIES {
                self.stale.remove(at);
            }
        }
    }

    pub(super) fn leave_delay(&self) -> Duration {
        [self.delay_limit, self.scheduling.max_delay()]
            .into_iter()
            .flatten()
            .fold(self.config.leave_delay, Duration::min)
    }

    pub(super) fn restart_interval(&self) -> Duration {
        let delay = self.delayed.as_ref().map_or(self.config.leave_delay, |delayed| delayed.delay);
        let interval = if self.delegation.is_done() {
            self.config.delegated_restart_interval
        } else {
            self.config.restart_interval
        };
        interval.min(delay / 3 * 2)
    }

    /// Which delayed leave to drop next, and how.
    pub(super) fn next_to_drop(&self) -> Option<(DelayId, DelayedAction)> {
        match (&self.phase, &self.delayed) {
            (Phase::Leaving(_), Some(delayed)) => Some((delayed.id.clone(), DelayedAction::Cancel)),
            _ => {
                let next = self.stale.iter().min_by_key(|stale| stale.tries)?;
                Some((next.id.clone(), next.action))
            }
        }
    }

    pub(super) fn discard_delayed_leave(&mut self, action: DelayedAction) {
        if let Some(delayed) = self.delayed.take() {
            self.discard(delayed.id, action);
        }
    }

    pub(super) fn discard(&mut self, id: DelayId, action: DelayedAction) {
        if self.stale.len() == MAX_STALE {
            self.stale.pop_front();
        }
        self.stale.push_back(Stale { id, action, tries: 0 });
    }
}
