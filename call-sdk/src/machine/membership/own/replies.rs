//! What the homeserver's answers mean.

use std::time::{Duration, Instant};

use super::{
    InFlight, Joined, Now, OwnMembership, Phase, PublicationKind, RequestId, Status, Task, Trouble,
    is_same_membership, later,
    messages::{EndReason, Event, NoDelayedLeave, event_type, sent_event},
};
use crate::{
    machine::membership::wire::LeaveCode,
    matrix::{DelayedAction, MatrixReply, RequestError},
    member::MembershipForm,
};

/// Longest wait that a homeserver can ask for.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(300);
/// Shortest wait after a failure, whatever the homeserver says.
const MIN_WAIT: Duration = Duration::from_millis(500);
/// Longest wait before a request is tried again that was refused while joined.
const MAX_REFUSED_WAIT: Duration = Duration::from_secs(60);
/// Longest interval between two refreshes of the state form.
const MAX_REFRESH_INTERVAL: Duration = Duration::from_secs(3600);
/// Shortest interval between two refreshes.
const MIN_REFRESH_INTERVAL: Duration = Duration::from_secs(1);
/// Most ids of our own events that are remembered.
const MAX_EVENT_IDS: usize = 8;

impl OwnMembership {
    pub(super) fn reply(&mut self, now: Now, id: RequestId, result: Result<MatrixReply, RequestError>) {
        if let Some(at) = self.orphans.iter().position(|orphan| *orphan == id) {
            self.orphans.remove(at);
            match result {
                Ok(MatrixReply::Scheduled { delay_id }) => self.discard(delay_id, DelayedAction::Cancel),
                Ok(_) => self.leave_was_sent_at_once(now),
                Err(_) => {}
            }
            return;
        }
        let Some(request) = self.in_flight.take_if(|request| request.id == id) else { return };
        if request.task.writes() {
            self.key_written = Some(now.instant);
        }
        if result.is_ok() {
            self.tries.remove(&request.task);
        }
        // What a focus's service says about tokens is not about our session.
        if result == Err(RequestError::LoggedOut) && request.task != Task::DelegateLeave {
            return self.logged_out();
        }
        match request.task {
            Task::ReadSupport => self.support_read(now, &request, result),
            Task::ProbeDelayParameter => self.probed(now, &request, result),
            Task::ScheduleLeave => self.scheduled(now, &request, result),
            Task::RestartLeave => self.restarted(now, &request, result),
            Task::PutMembership => self.put(now, &request, result),
            Task::SendLeave | Task::PutLeave => self.left(now, &request, result),
            Task::DropLeave => self.dropped(now, &request, result),
            Task::ScheduleLongLeave => self.long_leave_scheduled(now, &request, result),
            Task::DelegateLeave => self.leave_delegated(now, &request, result),
            Task::ReplaceLeave => self.leave_replaced(now, &request, result),
        }
    }

    fn put(&mut self, now: Now, request: &InFlight, result: Result<MatrixReply, RequestError>) {
        let Some(publication) = &request.publication else { return };
        let reply = match result {
            Ok(reply) => reply,
            Err(error) => {
                if !matches!(error, RequestError::Network { .. } | RequestError::TimedOut)
                    && !publication.was_published
                {
                    self.maybe_published = false;
                }
                return self.put_failed(now, request, error);
            }
        };
        let is_present = self.own.as_ref().is_some_and(|own| is_same_membership(own, &publication.own));
        if let Some(event_id) = sent_event(&reply).filter(|_| is_present) {
            if self.event_ids.len() == MAX_EVENT_IDS {
                self.event_ids.pop_front();
            }
            self.event_ids.push_back(event_id.clone());
        }
        let (form, echo_timeout) = (self.form(), self.config.echo_timeout);
        match (&mut self.phase, publication.kind) {
            (Phase::Joining(_), PublicationKind::First) => {
                let confirm_by = (form == MembershipForm::Sticky).then(|| later(now.instant, echo_timeout));
                self.phase = Phase::Joined(Joined {
                    since: now,
                    base: request.sent,
                    created: None,
                    published: publication.own.clone(),
                    restart_at: now.instant,
                    restarted: false,
                    refresh_at: now.instant,
                    refresh_due: None,
                    renewed: None,
                    seen: false,
                    rejoin_at: None,
                    confirm_by,
                    sticky_unsupported: false,
                });
                self.plan_refresh(now, request);
                self.set_probably_left(false);
                if confirm_by.is_none() {
                    self.set_status(Status::Connected);
                }
            }
            (Phase::Joined(joined), kind) => {
                joined.published.clone_from(&publication.own);
                joined.restarted = false;
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
                if self.delegation.is_done() {
                    // The next restart may be minutes away: has the write cancelled the delayed leave?
                    joined.restart_at = now.instant;
                }
                self.plan_refresh(now, request);
            }
            // An update of a membership that is being replaced, or left: the new one, or the leave, follows.
            _ => {}
        }
    }

    fn put_failed(&mut self, now: Now, request: &InFlight, error: RequestError) {
        match (&self.phase, error) {
            (Phase::Leaving(_) | Phase::Idle, _) => {}
            (Phase::Joining(joining), error) if joining.deadline.is_some() && !error.is_transient() => {
                let reason = match error {
                    RequestError::Forbidden { message, .. } => {
                        EndReason::NotPermitted { event_type: event_type(self.form()), message }
                    }
                    error => EndReason::Refused(error),
                };
                self.end(now, reason, LeaveCode::Leave);
            }
            (_, error) => self.retry(now, request, &error),
        }
    }

    /// When to publish again although nothing changed, after the publication by `request`.
    fn plan_refresh(&mut self, now: Now, request: &InFlight) {
        let lasting = self.lasting();
        let every = if self.has_leave() { lasting } else { lasting / 2 };
        let every = match self.form() {
            MembershipForm::State => every.clamp(MIN_REFRESH_INTERVAL, MAX_REFRESH_INTERVAL),
            // With time left for an outage, as stickiness cannot be extended afterwards.
            MembershipForm::Sticky if self.has_leave() => lasting / 4 * 3,
            MembershipForm::Sticky => every,
        };
        let headroom = self.config.expires_headroom;
        let form = self.form();
        if let Phase::Joined(joined) = &mut self.phase {
            joined.refresh_at = match form {
                MembershipForm::State => next_refresh(joined.base.instant, now.instant, every, headroom),
                MembershipForm::Sticky => later(request.sent.instant, every),
            };
        }
    }

    /// Plans another try of a request that failed. A first join waits as told or for a constant time until its
    /// deadline; later requests wait longer with every failure, for as long as the call lasts.
    pub(super) fn retry(&mut self, now: Now, request: &InFlight, error: &RequestError) {
        let first_join = matches!(&self.phase, Phase::Joining(joining) if joining.deadline.is_some());
        let tries = self.tries.entry(request.task).or_default();
        tries.failures = tries.failures.saturating_add(1);
        let failures = tries.failures;
        let backoff = |longest: Duration| {
            let factor = if first_join { 1 } else { 1 << failures.saturating_sub(1).min(10) };
            self.config.network_retry.saturating_mul(factor).min(longest).max(MIN_WAIT)
        };
        let alive = self.delayed.as_ref().is_some_and(|delayed| now.instant < delayed.fires_at());
        // A delayed leave that still waits can be saved.
        let (network_wait, refused_wait) = if request.task == Task::RestartLeave && alive {
            let interval = self.restart_interval().min(self.config.max_backoff);
            (interval, interval)
        } else {
            (self.config.max_backoff, MAX_REFUSED_WAIT)
        };
        let at = match error {
            RequestError::RateLimited { retry_after } => {
                let wait = retry_after.unwrap_or(self.config.rate_limit_default);
                later(now.instant, wait.clamp(MIN_WAIT, MAX_RETRY_AFTER))
            }
            RequestError::Network { .. } => later(now.instant, backoff(network_wait)),
            // At once, but never before its time was over: a shell that fails fast must not spin.
            RequestError::TimedOut => later(request.sent.instant, request.timeout).max(now.instant),
            _ => later(now.instant, backoff(refused_wait)),
        };
        if let Some(tries) = self.tries.get_mut(&request.task) {
            tries.not_before = Some(at);
        }
        self.note_trouble(now, request.task, error);
        self.extend_join(now, at, request.task, error);
    }

    /// Waiting as told is not a failure: it moves the deadline of a first join, within limits.
    fn extend_join(&mut self, now: Now, at: Instant, task: Task, error: &RequestError) {
        let Phase::Joining(joining) = &mut self.phase else { return };
        if !task.is_upkeep() {
            return;
        }
        joining.last_error = Some((task, error.clone()));
        let Some(deadline) = &mut joining.deadline else { return };
        let RequestError::RateLimited { retry_after } = error else { return };
        if task == Task::ScheduleLeave {
            // Too many delayed events of this user look like this, too (MSC4140): better without a leave than never.
            if at >= later(joining.since, self.config.join_timeout) {
                *deadline = (*deadline).max(later(now.instant, self.config.join_timeout));
                self.no_delayed_leave(NoDelayedLeave::Refused(error.clone()));
            }
            return;
        }
        let latest = later(joining.since, self.config.rate_limit_patience);
        *deadline = (*deadline).max(later(at, self.config.request_timeout).min(latest));
        if at >= *deadline {
            let retry_after = retry_after.unwrap_or(self.config.rate_limit_default);
            self.end(now, EndReason::RateLimited { retry_after }, LeaveCode::Leave);
        }
    }

    fn note_trouble(&mut self, now: Now, task: Task, error: &RequestError) {
        if !task.is_upkeep() || !matches!(self.phase, Phase::Joining(_) | Phase::Joined(_)) {
            return;
        }
        let told = (task, std::mem::discriminant(error));
        let trouble = self.trouble.get_or_insert_with(|| Trouble { since: now.unix, told: Vec::new() });
        if !trouble.told.contains(&told) {
            trouble.told.push(told);
            let since = trouble.since;
            self.events.push_back(Event::Trouble { doing: task, error: error.clone(), since });
        }
    }
}

/// The first of `start + n × every − headroom` that is later than now.
fn next_refresh(start: Instant, now: Instant, every: Duration, headroom: Duration) -> Instant {
    let passed = now.saturating_duration_since(start).saturating_add(headroom).as_millis();
    let due = (passed / every.as_millis().max(1) + 1).saturating_mul(every.as_millis());
    let due = Duration::from_millis(u64::try_from(due).unwrap_or(u64::MAX));
    later(start, due.saturating_sub(headroom))
}
