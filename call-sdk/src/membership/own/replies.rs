//! What the homeserver's answers mean.

use std::time::{Duration, Instant};

use super::{
    InFlight, Joined, Now, OwnMembership, Phase, PublicationKind, Reply, RequestError, RequestId, Status,
    later, steps::Kind,
};

/// A homeserver may ask for patience, but not for ever.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(300);
/// Longest interval between two refreshes, whatever the expiry is.
const MAX_REFRESH_INTERVAL: Duration = Duration::from_secs(3600);
/// Shortest interval between two refreshes.
const MIN_REFRESH_INTERVAL: Duration = Duration::from_secs(1);

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Retry {
    Later,
    Exhausted(String),
    No,
}

impl OwnMembership {
    pub(super) fn reply(&mut self, now: Now, id: RequestId, result: Result<Reply, RequestError>) {
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
            Kind::ScheduleLongLeave => self.long_leave_scheduled(now, &request, result),
            Kind::DelegateLeave => self.leave_delegated(now, &request, result),
            Kind::ReplaceLeave => self.leave_replaced(now, &request, result),
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
                if self.delegation.is_done() {
                    // The next restart may be minutes away: has the write cancelled the delayed leave?
                    joined.restart_at = now.instant;
                }
            }
            // An update of a membership that is being replaced, or left: the new one, or the leave, follows.
            _ => {}
        }
    }

    pub(super) fn retry(&mut self, now: Now, request: &InFlight, error: &RequestError) -> Retry {
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
}

/// The first of `start + n × every − headroom` that is later than now.
fn next_refresh(start: Instant, now: Instant, every: Duration, headroom: Duration) -> Instant {
    let passed = now.saturating_duration_since(start).saturating_add(headroom).as_millis();
    let due = (passed / every.as_millis().max(1) + 1).saturating_mul(every.as_millis());
    let due = Duration::from_millis(u64::try_from(due).unwrap_or(u64::MAX));
    later(start, due.saturating_sub(headroom))
}
