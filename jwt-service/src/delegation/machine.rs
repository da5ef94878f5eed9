//! One delegated leave, from the client's request to the delayed event's end. No I/O: it is given events and
//! the time, and is drained of what it wants done.
//!
//! After every [`Job::handle`] and [`Job::handle_timeout`], call [`Job::poll`] until it returns `None`; then
//! come back with `handle_timeout` at [`Job::timeout`].
//!
//! A job waits for its participant, keeps the delayed event alive while the participant is on the SFU, and has
//! the event sent once the participant is gone. At most one restart is on its way at a time, at most one *send*,
//! and at most one look at the SFU of which the answer counts; there is no *send* after one has succeeded.
//!
//! A job that is replaced is simply dropped: whatever is still on its way for it has nobody to come back to.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

/// The longest that a job waits for its participant's first connect.
const LONGEST_WAIT: Duration = Duration::from_hours(1);
/// The window in which *send* is tried, whatever the delayed event's own deadline.
const SEND_WINDOW: (Duration, Duration) = (Duration::from_secs(1), Duration::from_hours(1));
/// How long a job goes on watching after its delayed event could not be restarted in time.
const WATCH_AFTER_FAILURE: Duration = Duration::from_hours(1);
/// The waits between attempts: the first, and the longest. Each next one is half as long again.
const BACKOFF: (Duration, Duration) = (Duration::from_secs(1), Duration::from_mins(1));
/// Restarts of one delayed event come no closer than this: whoever delegates a delay of a millisecond must not
/// turn us against the homeserver.
const SHORTEST_CADENCE: Duration = Duration::from_millis(400);
/// Short delays are restarted after half their time, long ones after four fifths; between, it slides.
const SHORT: Duration = Duration::from_secs(8);
const LONG: Duration = Duration::from_mins(1);
/// Between the two looks that it takes to believe that a participant is gone.
const SECOND_LOOK: Duration = Duration::from_millis(500);
/// The same after a restart of this service: the SFU may be restarting too.
const SECOND_LOOK_RESTORED: Duration = Duration::from_secs(5);
/// The second look of a sanity check is not later than this after the first.
const SECOND_LOOK_SANITY: Duration = Duration::from_secs(5);

/// Looks for who has not come yet meet at multiples of this times a power of two, a quarter of the wait at most.
const SHORTEST_ROUND: Duration = Duration::from_millis(125);

/// What a job knows at its beginning.
#[derive(Clone, Debug)]
pub(crate) struct Start {
    /// After how long without a restart the homeserver sends the event.
    pub(crate) timeout: Duration,
    /// How much of that is left: all of it for a new job.
    pub(crate) remaining: Duration,
    /// Whether the participant had been connected before this service restarted.
    pub(crate) was_connected: bool,
    /// When to look at the SFU first, from now.
    pub(crate) first_look: Duration,
    /// How often to check that a connected participant is still there.
    pub(crate) sanity: Option<Duration>,
    /// The connection of the job that this one replaces: its end is no news.
    pub(crate) superseded: Option<String>,
    /// For the jitter.
    pub(crate) seed: u64,
    /// The same for all jobs of a room: their later looks are at times counted from it, so that many of them
    /// meet and take one call.
    pub(crate) rounds: Instant,
}

/// A call of which the result comes back.
pub(crate) type CallId = u64;

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Input {
    /// The SFU says that the participant has joined, by this connection if it says which.
    Joined { sid: Option<String> },
    /// The SFU says that the participant's connection has ended.
    Left { sid: Option<String>, why: Leave },
    /// A look at the SFU is done.
    Looked { call: CallId, presence: Presence },
    /// A delayed-event call is done.
    Called { call: CallId, outcome: Outcome },
}

/// Why a participant's connection to the SFU ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leave {
    /// The participant wanted to go.
    OnPurpose,
    /// Another connection of the same participant took over, or is about to.
    TakenOver,
    /// Anything else, a connect that failed included.
    Otherwise,
}

/// What the SFU said about the participant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Presence {
    /// There, by this connection if it says which.
    Present { sid: Option<String> },
    /// Certainly not there.
    Absent,
    /// The SFU could not be asked. Never taken for absence.
    Unknown,
}

/// What became of a delayed-event call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Done.
    Done,
    /// The homeserver does not know the event: sent or cancelled already.
    Gone,
    /// The event is being sent or was: nothing is left to do.
    Settled,
    /// The homeserver will not do this, now or later.
    Refused,
    /// Not done: ask again, after this long if the homeserver says so.
    Later(Option<Duration>),
}

/// What a job wants done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Output {
    /// Ask the homeserver to restart the delayed event.
    Restart(CallId),
    /// Ask the homeserver to send it.
    Send(CallId),
    /// Ask the SFU for the participant.
    Look(CallId),
    /// The event was restarted by a call made at this time, this long after it was due: write it down.
    Restarted { sent_at: Instant, late: Duration },
    /// The event could not be restarted in time: the homeserver has probably sent it by now.
    NotRestarted,
    /// The event was sent, this long after the participant was known to be gone.
    Sent { late: Duration },
    /// The job is over. Nothing comes after this.
    Ended(End),
}

/// How a job ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// The homeserver was made to send the event, or had done so.
    Sent,
    /// The homeserver could not be made to send the event in time; its own timer does it.
    NotSent,
    /// The participant never came.
    Aborted,
    /// The homeserver no longer has the event, or refuses to restart it.
    Lost,
    /// The event could not be restarted, and watching on has taken long enough.
    Expired,
}

/// For counts and logs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// The participant has not connected yet.
    Waiting,
    /// It is on the SFU.
    Connected,
    /// It is gone; the event is being sent.
    Leaving,
    /// Over.
    Ended,
}

/// One delegated leave.
#[derive(Debug)]
pub(crate) struct Job {
    timeout: Duration,
    sanity: Option<Duration>,
    superseded: Option<String>,
    /// It had been connected before this service restarted, and nobody has told since whether it still is.
    was_connected: bool,
    state: State,
    /// When the homeserver sends the event by itself, as far as we know.
    deadline: Instant,
    look: Look,
    rounds: Instant,
    calls: CallId,
    random: SplitMix,
    outputs: VecDeque<Output>,
}

#[derive(Debug)]
enum State {
    Waiting {
        until: Instant,
    },
    Connected {
        /// The connection that was told of last.
        sid: Option<String>,
        /// The one before, until it is told that it has ended: the two may have been told of the wrong way round. It
        /// is none where the last one has no id.
        rival: Option<String>,
        keeping: Keeping,
    },
    Leaving {
        since: Instant,
        until: Instant,
        call: Attempt,
    },
    Ended,
}

/// How a connected job keeps its event alive.
#[derive(Debug)]
enum Keeping {
    Restarting(Attempt),
    /// It was not restarted in time. The participant may be there all the same: its leave is still ours to
    /// notice, until then.
    Watching {
        until: Instant,
    },
}

/// A call that is due or on its way, with its place in the retry schedule.
#[derive(Debug)]
struct Attempt {
    /// When the first of its calls was due.
    due: Instant,
    at: When,
    backoff: Duration,
}

#[derive(Debug)]
enum When {
    Due(Instant),
    Flying { call: CallId, sent_at: Instant },
}

/// Looking at the SFU: why, and when next.
#[derive(Debug)]
struct Look {
    purpose: Purpose,
    at: Option<When>,
    backoff: Duration,
    /// When it was first found absent, if it has not been seen since.
    missed: Option<Instant>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Purpose {
    /// Has it come?
    Arrival,
    /// A connection has gone: is there another?
    Takeover,
    /// One of two connections has gone, and it is not certain that it was the newer one.
    Doubt,
    /// Is it still there?
    Sanity,
}

impl Job {
    /// A job that begins at `now`.
    pub(crate) fn new(now: Instant, start: Start) -> Self {
        let deadline = now + start.remaining;
        Self {
            timeout: start.timeout,
            sanity: start.sanity,
            superseded: start.superseded,
            was_connected: start.was_connected,
            state: State::Waiting { until: now + start.remaining.min(LONGEST_WAIT) },
            deadline,
            look: Look {
                purpose: Purpose::Arrival,
                at: Some(When::Due(now + start.first_look)),
                backoff: BACKOFF.0,
                missed: None,
            },
            rounds: start.rounds,
            calls: 0,
            random: SplitMix(start.seed),
            outputs: VecDeque::new(),
        }
    }

    /// The end of the connection `sid` is no news: it was there for the job that this one replaces.
    pub(crate) fn supersede(&mut self, sid: String) {
        self.superseded = Some(sid);
    }

    /// Takes note of what happened at `now`.
    pub(crate) fn handle(&mut self, now: Instant, input: Input) {
        match input {
            Input::Joined { sid } => self.joined(now, sid),
            Input::Left { sid, why } => self.left(now, sid.as_deref(), why),
            Input::Looked { call, presence } => self.looked(now, call, presence),
            Input::Called { call, outcome } => self.called(now, call, outcome),
        }
        self.handle_timeout(now);
    }

    /// Does what has become due.
    pub(crate) fn handle_timeout(&mut self, now: Instant) {
        if let State::Waiting { until } = self.state
            && until <= now
        {
            self.leave(now);
        }
        if let State::Connected { keeping: Keeping::Watching { until }, .. } = self.state
            && until <= now
        {
            self.end(End::Expired);
        }
        let calls = &mut self.calls;
        let mut launch = |at: &mut When| match *at {
            When::Due(due) if due <= now => {
                *calls += 1;
                *at = When::Flying { call: *calls, sent_at: now };
                Some(*calls)
            }
            _ => None,
        };
        match &mut self.state {
            State::Connected { keeping: Keeping::Restarting(attempt), .. } => {
                self.outputs.extend(launch(&mut attempt.at).map(Output::Restart));
            }
            State::Leaving { call, .. } => self.outputs.extend(launch(&mut call.at).map(Output::Send)),
            State::Waiting { .. } | State::Connected { .. } | State::Ended => {}
        }
        if let Some(at) = &mut self.look.at {
            self.outputs.extend(launch(at).map(Output::Look));
        }
    }

    /// When [`Self::handle_timeout`] is due next.
    pub(crate) fn timeout(&self) -> Option<Instant> {
        let due = |at: &When| match *at {
            When::Due(due) => Some(due),
            When::Flying { .. } => None,
        };
        let own = match &self.state {
            State::Waiting { until } => Some(*until),
            State::Connected { keeping: Keeping::Watching { until }, .. } => Some(*until),
            State::Connected { keeping: Keeping::Restarting(attempt), .. } => due(&attempt.at),
            State::Leaving { call, .. } => due(&call.at),
            State::Ended => None,
        };
        own.into_iter().chain(self.look.at.as_ref().and_then(due)).min()
    }

    /// The next thing to do.
    pub(crate) fn poll(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// Where the job is.
    pub(crate) fn phase(&self) -> Phase {
        match self.state {
            State::Waiting { .. } => Phase::Waiting,
            State::Connected { .. } => Phase::Connected,
            State::Leaving { .. } => Phase::Leaving,
            State::Ended => Phase::Ended,
        }
    }

    /// The connection by which the participant is there, as far as the SFU has told.
    pub(crate) fn sid(&self) -> Option<&str> {
        match &self.state {
            State::Connected { sid, .. } => sid.as_deref(),
            State::Waiting { .. } | State::Leaving { .. } | State::Ended => None,
        }
    }

    fn joined(&mut self, now: Instant, new: Option<String>) {
        match &mut self.state {
            State::Waiting { .. } => self.connect(now, new),
            State::Connected { sid, rival, .. } => {
                // A webhook without a connection's id makes the current one unknown: any leave then counts.
                let old = std::mem::replace(sid, new);
                if *sid != old {
                    *rival = old.filter(|_| sid.is_some());
                }
                self.was_connected = false;
                self.back_to_sanity(now);
            }
            State::Leaving { .. } | State::Ended => {}
        }
    }

    fn left(&mut self, now: Instant, gone: Option<&str>, why: Leave) {
        match &mut self.state {
            State::Waiting { .. } => {
                if gone.is_some() && gone == self.superseded.as_deref() {
                    return;
                }
                match why {
                    Leave::OnPurpose => self.leave(now),
                    // A reconnect: the new connection may be there before its webhook is.
                    Leave::TakenOver => self.look_again(now, Purpose::Takeover),
                    // Said again by an SFU that did not reach us: of which connection, only a look can tell.
                    Leave::Otherwise if self.was_connected => self.look_again(now, Purpose::Takeover),
                    Leave::Otherwise => self.end(End::Aborted),
                }
            }
            State::Connected { sid, rival, .. } => {
                if gone.is_some() && gone == rival.as_deref() {
                    *rival = None;
                    return;
                }
                let other = matches!((gone, sid.as_deref()), (Some(gone), Some(current)) if gone != current);
                match why {
                    // Whoever took that connection over is there by another.
                    Leave::TakenOver if other => {}
                    // An old one, told late, or one that we were never told of: a look can tell.
                    Leave::OnPurpose | Leave::Otherwise if other => self.look_again(now, Purpose::Takeover),
                    Leave::Otherwise if self.was_connected => self.look_again(now, Purpose::Takeover),
                    Leave::OnPurpose | Leave::Otherwise if rival.is_some() => {
                        self.look_again(now, Purpose::Doubt);
                    }
                    Leave::OnPurpose | Leave::Otherwise => self.leave(now),
                    Leave::TakenOver => {
                        (*sid, *rival) = (None, None);
                        self.look_again(now, Purpose::Takeover);
                    }
                }
            }
            State::Leaving { .. } | State::Ended => {}
        }
    }

    fn looked(&mut self, now: Instant, call: CallId, presence: Presence) {
        if !matches!(self.look.at, Some(When::Flying { call: flying, .. }) if flying == call) {
            return;
        }
        self.look.at = None;
        match (&mut self.state, presence) {
            (State::Waiting { .. }, Presence::Present { sid }) => self.connect(now, sid),
            (State::Connected { sid, rival, .. }, Presence::Present { sid: seen }) => {
                if self.look.purpose == Purpose::Doubt {
                    (*sid, *rival) = (seen, None);
                } else if sid.is_none() {
                    // What a webhook said is newer than a look that set out before it.
                    *sid = seen;
                }
                self.was_connected = false;
                self.back_to_sanity(now);
            }
            (State::Waiting { .. }, Presence::Absent) => match self.look.purpose {
                Purpose::Takeover => {
                    if self.missed(now, SECOND_LOOK) {
                        if self.was_connected {
                            self.leave(now);
                        } else {
                            self.end(End::Aborted);
                        }
                    }
                }
                Purpose::Arrival | Purpose::Sanity | Purpose::Doubt if self.was_connected => {
                    if self.missed(now, SECOND_LOOK_RESTORED) {
                        self.leave(now);
                    }
                }
                Purpose::Arrival | Purpose::Sanity | Purpose::Doubt => self.look_later(now),
            },
            (State::Connected { .. }, Presence::Absent) => {
                let second = match (self.look.purpose, self.sanity) {
                    (Purpose::Sanity, Some(interval)) => interval.min(SECOND_LOOK_SANITY),
                    (Purpose::Arrival, _) => SECOND_LOOK_RESTORED,
                    (Purpose::Sanity, None) | (Purpose::Takeover | Purpose::Doubt, _) => SECOND_LOOK,
                };
                if self.missed(now, second) {
                    self.leave(now);
                }
            }
            (State::Connected { .. }, Presence::Unknown) if self.look.purpose == Purpose::Sanity => {
                self.look.at = self.next_sanity(now);
            }
            // Nobody contradicts the webhook.
            (State::Connected { .. }, Presence::Unknown) if self.look.purpose == Purpose::Doubt => {
                self.leave(now)
            }
            (State::Waiting { .. }, Presence::Unknown) if self.was_connected => {
                // An SFU that is down must not end the call of who may be in it: keep the event alive meanwhile.
                self.keep(now, None);
                self.look_later(now);
            }
            (State::Waiting { .. } | State::Connected { .. }, Presence::Unknown) => self.look_later(now),
            (State::Leaving { .. } | State::Ended, _) => {}
        }
    }

    /// Absent. Once may be the SFU's mistake, so it is asked again after `second`; twice is gone.
    fn missed(&mut self, now: Instant, second: Duration) -> bool {
        let again = *self.look.missed.get_or_insert(now) + second;
        if again <= now {
            return true;
        }
        self.look.at = Some(When::Due(again));
        false
    }

    fn called(&mut self, now: Instant, call: CallId, outcome: Outcome) {
        let grace = (self.timeout / 10).clamp(Duration::from_secs(1), Duration::from_secs(10));
        match &mut self.state {
            State::Connected { keeping: Keeping::Restarting(attempt), .. } => {
                let When::Flying { call: flying, sent_at } = attempt.at else { return };
                if flying != call {
                    return;
                }
                match outcome {
                    Outcome::Done => {
                        // Counted from the sending: the homeserver's clock started then or later.
                        self.deadline = sent_at + self.timeout;
                        let late = now.saturating_duration_since(attempt.due);
                        *attempt = Attempt::due(sent_at + cadence(self.timeout));
                        self.outputs.push_back(Output::Restarted { sent_at, late });
                    }
                    Outcome::Gone | Outcome::Settled | Outcome::Refused => self.end(End::Lost),
                    Outcome::Later(hint) => {
                        let next = attempt.next(now, hint, self.timeout, &mut self.random);
                        if next > self.deadline + grace {
                            let until = now + WATCH_AFTER_FAILURE;
                            self.outputs.push_back(Output::NotRestarted);
                            if let State::Connected { keeping, .. } = &mut self.state {
                                *keeping = Keeping::Watching { until };
                            }
                        } else {
                            attempt.at = When::Due(next);
                        }
                    }
                }
            }
            State::Leaving { since, until, call: attempt } => {
                if !matches!(attempt.at, When::Flying { call: flying, .. } if flying == call) {
                    return;
                }
                match outcome {
                    Outcome::Done | Outcome::Gone | Outcome::Settled => {
                        let late = now.saturating_duration_since(*since);
                        self.outputs.push_back(Output::Sent { late });
                        self.end(End::Sent);
                    }
                    Outcome::Refused | Outcome::Later(_) => {
                        let hint = if let Outcome::Later(hint) = outcome { hint } else { None };
                        let until = *until;
                        let next = attempt.next(now, hint, self.timeout, &mut self.random);
                        attempt.at = When::Due(next);
                        if next > until {
                            self.end(End::NotSent);
                        }
                    }
                }
            }
            State::Waiting { .. } | State::Connected { .. } | State::Ended => {}
        }
    }

    fn connect(&mut self, now: Instant, sid: Option<String>) {
        self.keep(now, sid);
        self.was_connected = false;
        self.superseded = None;
        self.back_to_sanity(now);
    }

    /// Keeps the event alive from now on.
    fn keep(&mut self, now: Instant, sid: Option<String>) {
        // Nobody knows how old the delayed event is: the first restart puts our clock and the homeserver's
        // together, so the time to succeed in is counted from here.
        self.deadline = now + self.timeout;
        self.state = State::Connected { sid, rival: None, keeping: Keeping::Restarting(Attempt::due(now)) };
    }

    fn leave(&mut self, now: Instant) {
        let window = self.deadline.saturating_duration_since(now).clamp(SEND_WINDOW.0, SEND_WINDOW.1);
        self.state = State::Leaving { since: now, until: now + window, call: Attempt::due(now) };
        self.look.at = None;
    }

    fn end(&mut self, end: End) {
        self.state = State::Ended;
        self.look.at = None;
        self.outputs.push_back(Output::Ended(end));
    }

    /// It is there: look again at the next sanity check, if there are any.
    fn back_to_sanity(&mut self, now: Instant) {
        self.look =
            Look { purpose: Purpose::Sanity, at: self.next_sanity(now), backoff: BACKOFF.0, missed: None };
    }

    fn look_again(&mut self, now: Instant, purpose: Purpose) {
        // A look that is on its way may have been answered before what we just heard.
        self.look = Look { purpose, at: Some(When::Due(now)), backoff: BACKOFF.0, missed: None };
    }

    fn look_later(&mut self, now: Instant) {
        let wait = self.random.around(self.look.backoff);
        self.look.backoff = longer(self.look.backoff);
        // A power of two times the shortest, so that all rounds of long steps are rounds of short ones too.
        let steps = (wait / 4).as_millis() / SHORTEST_ROUND.as_millis();
        let step = steps.checked_ilog2().map(|power| SHORTEST_ROUND.saturating_mul(1 << power.min(20)));
        let due = step.map_or(now + wait, |step| self.round(now + wait, step));
        self.look.at = Some(When::Due(due));
    }

    /// When to check next that it is still there: at the same time as all others of the room.
    fn next_sanity(&self, now: Instant) -> Option<When> {
        self.sanity.map(|interval| When::Due(self.round(now + interval / 2, interval)))
    }

    /// The room's first round from `due` on, if there is one every `step`.
    fn round(&self, due: Instant, step: Duration) -> Instant {
        let since = due.saturating_duration_since(self.rounds).as_nanos();
        let over = since.checked_rem(step.as_nanos()).unwrap_or(0);
        let rest = if over == 0 { 0 } else { step.as_nanos() - over };
        due + Duration::from_nanos(u64::try_from(rest).unwrap_or(0))
    }
}

impl Attempt {
    fn due(due: Instant) -> Self {
        Self { due, at: When::Due(due), backoff: BACKOFF.0 }
    }

    /// When to try again, after an attempt that failed at `now`.
    fn next(
        &mut self,
        now: Instant,
        hint: Option<Duration>,
        timeout: Duration,
        random: &mut SplitMix,
    ) -> Instant {
        match hint {
            Some(wait) => {
                self.backoff = BACKOFF.0;
                // However soon it says: an endless loop helps nobody.
                now + wait.max(Duration::from_millis(100))
            }
            None => {
                // The shorter the delay, the sooner the next attempt has to come.
                let wait = self.backoff.min((timeout / 8).max(Duration::from_millis(100)));
                self.backoff = longer(self.backoff);
                now + random.around(wait)
            }
        }
    }
}

/// After how much of `timeout` the event is restarted: half for short ones, where one lost packet's retry takes
/// a good part of the rest, up to four fifths for long ones.
pub(crate) fn cadence(timeout: Duration) -> Duration {
    let share = if timeout <= SHORT {
        0.5
    } else if timeout >= LONG {
        0.8
    } else {
        0.5 + 0.3 * (timeout - SHORT).as_secs_f64() / (LONG - SHORT).as_secs_f64()
    };
    timeout.mul_f64(share).max(SHORTEST_CADENCE)
}

fn longer(wait: Duration) -> Duration {
    (wait * 3 / 2).min(BACKOFF.1)
}

/// Jitter needs no secrets: Steele, Lea and Flood's SplitMix64.
#[derive(Debug)]
struct SplitMix(u64);

impl SplitMix {
    /// `wait`, half as long to half as long again.
    fn around(&mut self, wait: Duration) -> Duration {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let thousandth = u32::try_from((z ^ (z >> 31)) % 1001).unwrap_or(0);
        wait / 2 + wait * thousandth / 1000
    }
}

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod properties;

#[cfg(test)]
mod tests;
