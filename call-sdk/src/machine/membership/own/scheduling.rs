//! Which request schedules a delayed leave on this homeserver.
//!
//! A homeserver that does not know a query *parameter* ignores it and sends the leave at once; an unknown *path*
//! cannot send anything. So the dedicated endpoints are tried with the real request, and the query parameter is used
//! only after a probe that cannot send. A form counts as proven once it has brought a delayed leave, and a joined
//! member uses no other. If a leave is sent at once all the same, the session does without delayed events.

use std::time::Duration;

use crate::matrix::{ApiVersion, ScheduleForm, ServerSupport};

use super::messages::{NoDelayedLeave, Task};

/// How far the search for a working form has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Search {
    /// To begin with what the homeserver says that it supports.
    #[default]
    Start,
    /// To be tried before the join event.
    Unproven(ScheduleForm),
    /// The dedicated endpoints do not exist.
    Probe,
    /// Has brought a delayed leave.
    Proven(ScheduleForm),
    /// None works, for the rest of the session.
    Off,
}

/// What is known about scheduling delayed events. Lives as long as the machine, not only for one membership.
#[derive(Debug, Default)]
pub(super) struct Scheduling {
    support: Option<ServerSupport>,
    search: Search,
    /// The endpoint of the proven form was missing: search again before the next join event.
    doubted: bool,
    /// The homeserver sent a leave at once.
    sent_at_once: bool,
    /// An event that was to be sticky was not, whatever the homeserver says.
    sticky_ignored: bool,
}

impl Scheduling {
    /// Whether the homeserver has sticky events; `None` before it said so.
    pub(super) fn sticky_events(&self) -> Option<bool> {
        if self.sticky_ignored {
            Some(false)
        } else {
            self.support.as_ref().map(|support| support.sticky_events)
        }
    }

    pub(super) fn max_delay(&self) -> Option<Duration> {
        self.support.as_ref().and_then(|support| support.max_delay)
    }

    pub(super) fn is_read(&self) -> bool {
        self.support.is_some()
    }

    pub(super) fn learn(&mut self, support: ServerSupport) {
        if self.search == Search::Start {
            self.search = support
                .delayed_events
                .map_or(Search::Off, |version| Search::Unproven(ScheduleForm::Dedicated(version)));
        }
        self.support = Some(support);
    }

    /// The homeserver does not say what it supports. Sticky events show by themselves; delayed events must not be
    /// tried.
    pub(super) fn learn_nothing(&mut self) {
        self.learn(ServerSupport { sticky_events: true, ..ServerSupport::default() });
    }

    /// The echo of a sticky event was not sticky.
    pub(super) fn sticky_is_ignored(&mut self) {
        self.sticky_ignored = true;
    }

    /// Before a join event: begins anew if a missing endpoint put the form in doubt. Returns whether it did.
    pub(super) fn before_join(&mut self) -> bool {
        let anew = std::mem::take(&mut self.doubted) && self.search != Search::Off;
        if anew {
            self.support = None;
            self.search = Search::Start;
        }
        anew
    }

    /// What is to be asked so that a leave is scheduled; `None` if none can be.
    pub(super) fn task(&self, joined: bool) -> Option<Task> {
        match self.search {
            Search::Proven(_) => Some(Task::ScheduleLeave),
            Search::Off => None,
            _ if joined => None,
            Search::Start => Some(Task::ReadSupport),
            Search::Unproven(_) => Some(Task::ScheduleLeave),
            Search::Probe => Some(Task::ProbeDelayParameter),
        }
    }

    pub(super) fn form(&self) -> Option<ScheduleForm> {
        match self.search {
            Search::Unproven(form) | Search::Proven(form) => Some(form),
            Search::Start | Search::Probe | Search::Off => None,
        }
    }

    /// Why no delayed leave of at least `least` can be had, if that is known.
    pub(super) fn obstacle(&self, least: Duration) -> Option<NoDelayedLeave> {
        if self.sent_at_once {
            Some(NoDelayedLeave::SentAtOnce)
        } else if self.search == Search::Off {
            Some(NoDelayedLeave::NotSupported)
        } else if self.max_delay().is_some_and(|max| max < least) {
            Some(NoDelayedLeave::LimitTooShort { least })
        } else {
            None
        }
    }

    /// A reply to this form brought a delayed leave.
    pub(super) fn proven(&mut self, form: ScheduleForm) {
        if self.search != Search::Off {
            self.search = Search::Proven(form);
            self.doubted = false;
        }
    }

    /// The homeserver sent a leave at once.
    pub(super) fn sent_at_once(&mut self) {
        self.sent_at_once = true;
        self.search = Search::Off;
    }

    /// What is scheduled cannot be restarted.
    pub(super) fn switch_off(&mut self) {
        self.search = Search::Off;
    }

    /// The endpoint of a form does not exist.
    pub(super) fn missing(&mut self, joined: bool) {
        match self.search {
            _ if joined => self.doubted = true,
            Search::Unproven(ScheduleForm::Dedicated(ApiVersion::Stable)) => {
                self.search = Search::Unproven(ScheduleForm::Dedicated(ApiVersion::Unstable));
            }
            Search::Unproven(ScheduleForm::Dedicated(ApiVersion::Unstable)) => self.search = Search::Probe,
            Search::Proven(_) => {
                self.support = None;
                self.search = Search::Start;
            }
            Search::Unproven(ScheduleForm::QueryParameter) => self.search = Search::Off,
            Search::Start | Search::Probe | Search::Off => {}
        }
    }

    pub(super) fn probed(&mut self, understood: bool) {
        if self.search == Search::Probe {
            self.search =
                if understood { Search::Unproven(ScheduleForm::QueryParameter) } else { Search::Off };
        }
    }
}
