//! Leaving: by sending the delayed leave or by writing one, within a deadline.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use super::{
    InFlight, Now, OwnMembership, Phase, Status, Step, Task, later,
    messages::{EndReason, Event},
};
use crate::{
    machine::membership::wire::{LeaveCode, OwnDescription},
    matrix::{MatrixReply, RequestError},
    member::MembershipForm,
};

#[derive(Debug)]
pub(super) struct Leaving {
    pub(super) deadline: Instant,
    pub(super) code: LeaveCode,
    /// Ways to leave that did not work.
    spent: BTreeSet<Task>,
    /// What to join as afterwards.
    pub(super) next: Option<OwnDescription>,
    /// The leave is only a step of [`Input::SetDescription`](super::Input::SetDescription).
    pub(super) switching: bool,
}

impl OwnMembership {
    /// Ends the session without the application's doing.
    pub(super) fn end(&mut self, now: Now, reason: EndReason, code: LeaveCode) {
        self.events.push_back(Event::Ended(reason));
        self.leave(now, code);
    }

    pub(super) fn leave(&mut self, now: Now, code: LeaveCode) {
        if let Phase::Leaving(leaving) = &mut self.phase {
            leaving.next = None;
            if std::mem::take(&mut leaving.switching) {
                leaving.deadline = later(now.instant, self.config.leave_timeout);
            }
            self.set_status(Status::Disconnecting);
        } else if !matches!(self.phase, Phase::Idle) || self.maybe_published {
            self.begin_leaving(now, code, None);
            self.set_status(Status::Disconnecting);
        }
    }

    pub(super) fn begin_leaving(&mut self, now: Now, code: LeaveCode, next: Option<OwnDescription>) {
        match &mut self.in_flight {
            // Its outcome says what there is to leave, and two writes must not race on their way to the server.
            Some(request) if matches!(request.task, Task::ScheduleLeave | Task::PutMembership) => {
                request.lost_at = request.lost_at.min(later(now.instant, self.config.leave_timeout / 2));
            }
            _ => self.abandon_request(now),
        }
        self.tries.clear();
        self.trouble = None;
        self.stop_delegation();
        // A switch has time: its join needs the homeserver as well.
        let limit = if next.is_some() { Duration::MAX } else { self.config.leave_timeout };
        self.phase = Phase::Leaving(Leaving {
            deadline: later(now.instant, limit),
            code,
            spent: BTreeSet::new(),
            switching: next.is_some(),
            next,
        });
    }

    pub(super) fn finish_leaving(&mut self, now: Now) {
        self.abandon_request(now);
        self.tries.clear();
        let Phase::Leaving(leaving) = std::mem::replace(&mut self.phase, Phase::Idle) else { return };
        if !leaving.switching {
            self.set_probably_left(false);
            self.set_status(Status::Disconnected);
        }
        if let Some(next) = leaving.next {
            self.withdraw_delegation();
            self.join(now, next);
        }
    }

    /// Nothing can be asked any more.
    pub(super) fn logged_out(&mut self) {
        if matches!(self.phase, Phase::Joining(_) | Phase::Joined(_)) {
            self.events.push_back(Event::Ended(EndReason::LoggedOut));
        }
        self.phase = Phase::Idle;
        self.in_flight = None;
        self.tries.clear();
        self.trouble = None;
        self.delayed = None;
        self.stop_delegation();
        self.stale.clear();
        self.maybe_published = false;
        self.set_probably_left(false);
        self.set_status(Status::Disconnected);
    }

    pub(super) fn leaving_step(&self, now: Instant, leaving: &Leaving) -> Step {
        if self.maybe_published {
            return self.way_to_leave(leaving).map_or(Step::FinishLeaving, |task| self.gated(task, now, now));
        }
        match &self.delayed {
            // If sending it failed, it may as well fire: that is a leave, too.
            Some(_) if !leaving.spent.contains(&Task::SendLeave) => self.gated(Task::DropLeave, now, now),
            _ => Step::FinishLeaving,
        }
    }

    /// A state leave is empty whoever sends it. The delayed sticky leave says that we went silent, so the leave is
    /// written with its true reason if that works.
    fn way_to_leave(&self, leaving: &Leaving) -> Option<Task> {
        let send = self.delayed.is_some().then_some(Task::SendLeave);
        let ways = match self.form() {
            MembershipForm::State => [send, Some(Task::PutLeave)],
            MembershipForm::Sticky => [Some(Task::PutLeave), send],
        };
        ways.into_iter().flatten().find(|way| !leaving.spent.contains(way))
    }

    pub(super) fn left(&mut self, now: Now, request: &InFlight, result: Result<MatrixReply, RequestError>) {
        let Err(error) = result else {
            self.maybe_published = false;
            if request.task == Task::SendLeave {
                self.delayed = None;
            }
            return;
        };
        let Phase::Leaving(leaving) = &mut self.phase else { return };
        if request.task == Task::SendLeave
            && matches!(error, RequestError::NotFound | RequestError::AlreadyFinal)
        {
            self.delayed = None;
            return;
        }
        let other = match request.task {
            Task::SendLeave => !leaving.spent.contains(&Task::PutLeave),
            _ => self.delayed.is_some() && !leaving.spent.contains(&Task::SendLeave),
        };
        if !error.is_transient() || (other && error == RequestError::TimedOut) {
            leaving.spent.insert(request.task);
            return;
        }
        self.retry(now, request, &error);
        // Half of the time is for the other way.
        let half = self.config.leave_timeout / 2;
        let (Some(tries), Phase::Leaving(leaving)) = (self.tries.get(&request.task), &mut self.phase) else {
            return;
        };
        let late = tries.not_before.is_some_and(|again| later(again, half) > leaving.deadline);
        if other && (tries.failures > 1 || late) {
            leaving.spent.insert(request.task);
        }
    }
}
