//! The delayed leave: scheduled, restarted, sent, cancelled, and replaced when it is lost.

use std::time::{Duration, Instant};

use super::{
    Event, InFlight, Now, OwnMembership, Phase, Reply, RequestError, later, replies::Retry, steps::Kind,
};

/// A delayed leave shorter than this is not worth its requests: a passing fault would end the membership.
const MIN_LEAVE_DELAY: Duration = Duration::from_secs(5);
/// How often the delay of the delayed leave is adapted to what the homeserver allows before we give it up.
const MAX_DELAY_ADAPTATIONS: u32 = 8;
/// How often the cancelling of a delayed leave that is no longer ours to keep is tried. It ends by itself.
pub(super) const MAX_CANCEL_TRIES: u32 = 3;
/// Bounds on what is remembered of delayed leaves that must go.
pub(super) const MAX_STALE: usize = 8;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Support {
    /// We want a delayed leave, and have no reason to think that we cannot have one.
    Wanted,
    /// Not now.
    Failed,
    /// Not on this homeserver.
    Unsupported,
}

/// What is known of the longest delay that the homeserver allows.
#[derive(Debug, Default)]
pub(super) struct DelayLimit {
    pub(super) limit: Option<Duration>,
    pub(super) ask: bool,
    pub(super) asked: bool,
    pub(super) adaptations: u32,
}

/// A delayed leave that the homeserver holds for us.
#[derive(Debug)]
pub(super) struct Delayed {
    pub(super) id: String,
    /// When its last successful (re)start was asked for: the homeserver cannot have counted from earlier.
    pub(super) since: Instant,
    pub(super) delay: Duration,
}

impl Delayed {
    pub(super) fn fires_at(&self) -> Instant {
        later(self.since, self.delay)
    }
}

#[derive(Debug)]
pub(super) struct Stale {
    pub(super) id: String,
    pub(super) tries: u32,
}

impl OwnMembership {
    pub(super) fn scheduled(&mut self, now: Now, request: &InFlight, result: Result<Reply, RequestError>) {
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
    pub(super) fn adapt_delay(&mut self, max: Option<Duration>) {
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

    pub(super) fn no_delayed_leave(&mut self, support: Support, reason: String) {
        self.support = support;
        self.events.push_back(Event::DelayedLeaveUnavailable { reason });
    }

    pub(super) fn restarted(&mut self, now: Now, request: &InFlight, result: Result<Reply, RequestError>) {
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
                if self.delegation.is_done() {
                    self.restart_delegation();
                }
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
    pub(super) fn plan_restart(&mut self, now: Now, request: &InFlight) {
        let interval = self.restart_interval();
        if let Phase::Joined(joined) = &mut self.phase {
            let sent = request.sent.instant;
            let refresh_waits = joined.refresh_due.is_some_and(|due| sent < due);
            joined.restart_at =
                if refresh_waits { now.instant } else { later(sent, interval).max(now.instant) };
        }
    }

    pub(super) fn sent_leave(&mut self, now: Now, result: Result<Reply, RequestError>) {
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

    pub(super) fn cancelled(&mut self, now: Now, request: &InFlight, result: Result<Reply, RequestError>) {
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
    pub(super) fn leave_delay(&self) -> Duration {
        self.delay.limit.map_or(self.config.leave_delay, |limit| limit.min(self.config.leave_delay))
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

    pub(super) fn delay_id(&self) -> String {
        self.delayed.as_ref().map(|delayed| delayed.id.clone()).unwrap_or_default()
    }

    pub(super) fn next_to_cancel(&self) -> String {
        match (&self.phase, &self.delayed) {
            (Phase::Leaving(_), Some(delayed)) => delayed.id.clone(),
            _ => {
                let next = self.stale.iter().min_by_key(|stale| stale.tries);
                next.map(|stale| stale.id.clone()).unwrap_or_default()
            }
        }
    }

    pub(super) fn discard_delayed_leave(&mut self) {
        if let Some(delayed) = self.delayed.take() {
            self.discard(delayed.id);
        }
    }

    pub(super) fn discard(&mut self, id: String) {
        if self.stale.len() == MAX_STALE {
            self.stale.pop_front();
        }
        self.stale.push_back(Stale { id, tries: 0 });
    }
}
