//! All jobs: who has one, what each wants done next, and in which order that reaches the store. No I/O: the
//! shell performs the [`Effect`]s and brings their results back.
//!
//! What must hold: a job is written to the store before its request is answered; it is removed from the store
//! after its *send* is over; the store sees the writes for one participant one after the other, and a write
//! that failed again and again until it succeeds or a newer one takes its place; a job acts only while this
//! replica has its lease. A client's newest delegation counts, at whichever replica it was made: the others give
//! theirs up when they hear of it ([`Notice`]) or find it in the store ([`Registry::swept`]), and free the lease
//! only once their last write is over.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    hash::{DefaultHasher, Hash as _, Hasher as _},
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use super::{
    JobKey, JobParams, StoredJob,
    machine::{CallId, End, Input, Job, Outcome, Output, Phase, Presence, Start},
    notice::{News, Notice},
};

/// A lease lasts for a quarter of the delay within these bounds: if its holder dies, another replica must be able to
/// restart the event before it fires. It is renewed after a third of that.
const LEASE: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(15));
/// How often replicas look into the store for jobs that are nobody's, at most and at least: so often that each reads
/// no more jobs a second than this, and asks for no more of others' leases.
pub(crate) const SWEEP: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(15));
const JOBS_READ: u32 = 2000;
const LEASES_ASKED: u32 = 500;
/// The waits between attempts to write to a store that fails: the first, and the longest.
const STORE_BACKOFF: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(15));
/// Events kept for a job whose lease has not been granted yet.
const INBOX: usize = 16;
/// How far the first looks after a restart are spread out: this much for each job, and at most that.
const LOOK_SPREAD: (Duration, Duration) = (Duration::from_millis(2), Duration::from_secs(1));
/// A delay in the store that is longer than this was never a client's.
const LONGEST_STORED: Duration = Duration::from_hours(366 * 24);
/// How long after its delayed event has fired a job of another replica is cleared from the store.
const LEFT_BEHIND: Duration = Duration::from_mins(1);

/// The time, as both clocks show it: one for timers, one for the store.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Now {
    pub(crate) instant: Instant,
    pub(crate) wall: SystemTime,
}

/// Bounds and habits of all jobs.
#[derive(Clone, Debug)]
pub(crate) struct Rules {
    pub(crate) shortest: Duration,
    pub(crate) longest: Duration,
    pub(crate) jobs: usize,
    pub(crate) jobs_per_user: usize,
    pub(crate) sanity: Option<Duration>,
    pub(crate) seed: u64,
    /// Whether other replicas may share the store.
    pub(crate) shared: bool,
}

/// A request that waits for its job to be written.
pub(crate) type Ticket = u64;
/// One job among all that ever were; a participant's next job has another one.
pub(crate) type Serial = u64;
/// One write to the store.
pub(crate) type WriteId = u64;

/// What the shell has to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    Restart {
        serial: Serial,
        call: CallId,
        params: Arc<JobParams>,
    },
    Send {
        serial: Serial,
        call: CallId,
        params: Arc<JobParams>,
    },
    Look {
        serial: Serial,
        call: CallId,
        params: Arc<JobParams>,
    },
    /// Whatever is on its way for this job: stop it.
    Cancel {
        serial: Serial,
    },
    Put {
        write: WriteId,
        job: StoredJob,
    },
    Remove {
        write: WriteId,
        key: JobKey,
    },
    Lease {
        serial: Serial,
        key: JobKey,
        ttl: Duration,
    },
    /// Give the lease up, and then say so if somebody waits for it.
    Release {
        key: JobKey,
        notice: Option<Notice>,
    },
    /// Say it to the other replicas.
    Tell {
        notice: Notice,
    },
    /// The job of this request is written, or the store is out of order and it is kept in memory.
    Reply {
        ticket: Ticket,
    },
}

/// What the store said about a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lease {
    Granted,
    Refused,
    /// The store is out of order. Then nobody else gets a lease either.
    Unknown,
}

/// Why a job is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum AddError {
    #[error("the client's fault: delay_timeout is shorter or longer than this service keeps")]
    BadTimeout,
    #[error("this user has as many delegated leaves as one user may have")]
    UserFull,
    #[error("this service has as many delegated leaves as it may have")]
    Full,
    #[error("this service is shutting down")]
    ShuttingDown,
}

/// How many there are and were.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Jobs whose participant has not connected yet.
    pub waiting: usize,
    /// Jobs whose participant is on the SFU.
    pub connected: usize,
    /// Jobs whose delayed event is being sent.
    pub leaving: usize,
    /// Jobs of which another replica has the lease.
    pub elsewhere: usize,
    /// Writes that the store has not taken yet.
    pub unwritten: usize,
    /// Those of them that have failed at least once.
    pub failing: usize,
    /// Restarts that succeeded.
    pub restarts: u64,
    /// Restart attempts that failed.
    pub restart_failures: u64,
    /// Delayed events sent.
    pub sends: u64,
    /// *Send* attempts that failed.
    pub send_failures: u64,
    /// Jobs that ended because the homeserver no longer had the event or refused.
    pub lost: u64,
    /// Jobs that ended because the participant never came.
    pub aborted: u64,
    /// Jobs whose delayed event could not be restarted in time. They go on watching for the leave.
    pub not_restarted: u64,
    /// Writes that the store failed to do.
    pub store_errors: u64,
    /// How long after they were due restarts succeeded.
    pub restart_lateness: Lateness,
    /// How long after the participant was known to be gone delayed events were sent.
    pub send_lateness: Lateness,
}

/// How often something was how late.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Lateness {
    /// How often it was not later than each of [`Self::BOUNDS`] and later than the one before; at the end, later
    /// than all.
    pub counts: [u64; Self::BOUNDS.len() + 1],
    /// All of it together.
    pub sum: Duration,
}

impl Lateness {
    /// In seconds.
    pub const BOUNDS: [f64; 11] = [0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0];

    fn count(&mut self, late: Duration) {
        let bucket = Self::BOUNDS.iter().position(|bound| late.as_secs_f64() <= *bound);
        self.counts[bucket.unwrap_or(Self::BOUNDS.len())] += 1;
        self.sum = self.sum.saturating_add(late);
    }
}

/// All jobs of this replica.
#[derive(Debug)]
pub(crate) struct Registry {
    rules: Rules,
    jobs: HashMap<Serial, Entry>,
    by_key: HashMap<JobKey, Serial>,
    per_user: HashMap<Arc<str>, usize>,
    timers: BTreeSet<(Instant, Serial)>,
    writers: HashMap<JobKey, Writer>,
    retries: BTreeSet<(Instant, JobKey)>,
    serials: Serial,
    writes: WriteId,
    closed: bool,
    /// From when on the rounds of looks are counted.
    began: Option<Instant>,
    effects: VecDeque<Effect>,
    stats: Stats,
}

#[derive(Debug)]
struct Entry {
    params: Arc<JobParams>,
    user: Option<Arc<str>>,
    job: Job,
    holding: Holding,
    inbox: Vec<Input>,
    restarted_at: SystemTime,
    /// When a client delegated it here; a job from the store is older than any of these.
    made: SystemTime,
    /// Whether another replica had the lease, and may have written to the store since.
    displaced: bool,
    connected: bool,
    /// When the store last took it; a job from the store has been taken before.
    written: Option<Instant>,
    from_store: bool,
    /// Its place in `timers`.
    due: Option<Instant>,
}

/// Whether this replica may act on the job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Holding {
    Asking,
    Held { renew: Instant, asking: bool },
    Elsewhere { ask: Instant },
}

/// The writes for one participant.
#[derive(Debug, Default)]
struct Writer {
    running: Option<(WriteId, Op, Vec<Ticket>)>,
    pending: Option<Op>,
    tickets: Vec<Ticket>,
    failures: u32,
    retry: Option<Instant>,
    /// The job is another replica's now: what to say once the last write is over.
    given_up: Option<Notice>,
}

#[derive(Clone, Debug)]
enum Op {
    Put(StoredJob),
    Remove,
}

impl Entry {
    fn lease(&self, serial: Serial) -> Effect {
        let ttl = lease_time(self.params.delay_timeout);
        Effect::Lease { serial, key: self.params.key.clone(), ttl }
    }
}

/// How long after a look into the store that had `stored` jobs the next one is due; `held` are this replica's.
pub(crate) fn sweep_after(stored: usize, held: usize) -> Duration {
    let seconds = |jobs: usize, each: u32| u32::try_from(jobs).unwrap_or(u32::MAX).div_ceil(each);
    let others = stored.saturating_sub(held);
    let seconds = seconds(stored, JOBS_READ).max(seconds(others, LEASES_ASKED));
    Duration::from_secs(seconds.into()).clamp(SWEEP.0, SWEEP.1)
}

/// How long the lease of a job with this delay lasts.
fn lease_time(delay: Duration) -> Duration {
    (delay / 4).clamp(LEASE.0, LEASE.1)
}

impl Registry {
    pub(crate) fn new(rules: Rules) -> Self {
        Self {
            rules,
            jobs: HashMap::new(),
            by_key: HashMap::new(),
            per_user: HashMap::new(),
            timers: BTreeSet::new(),
            writers: HashMap::new(),
            retries: BTreeSet::new(),
            serials: 0,
            writes: 0,
            closed: false,
            began: None,
            effects: VecDeque::new(),
            stats: Stats::default(),
        }
    }

    /// Takes a job over for `user`, in place of what there was for the same participant.
    /// [`Effect::Reply`] with `ticket` says when it is written.
    pub(crate) fn add(
        &mut self,
        now: Now,
        params: JobParams,
        user: &str,
        ticket: Ticket,
    ) -> Result<(), AddError> {
        if self.closed {
            return Err(AddError::ShuttingDown);
        }
        if params.delay_timeout < self.rules.shortest || params.delay_timeout > self.rules.longest {
            return Err(AddError::BadTimeout);
        }
        let replaced = self.by_key.get(&params.key).and_then(|serial| self.jobs.get(serial));
        let mine = replaced.and_then(|entry| entry.user.as_deref()) == Some(user);
        if replaced.is_none() && self.jobs.len() >= self.rules.jobs {
            return Err(AddError::Full);
        }
        if !mine && self.per_user.get(user).is_some_and(|count| *count >= self.rules.jobs_per_user) {
            return Err(AddError::UserFull);
        }
        let superseded = replaced.and_then(|entry| entry.job.sid()).map(str::to_owned);
        if let Some(serial) = self.by_key.get(&params.key).copied() {
            self.forget(serial);
        }
        let key = params.key.clone();
        let user: Arc<str> =
            self.per_user.get_key_value(user).map_or_else(|| user.into(), |(u, _)| u.clone());
        *self.per_user.entry(user.clone()).or_default() += 1;
        let start = Start {
            timeout: params.delay_timeout,
            remaining: params.delay_timeout,
            was_connected: false,
            first_look: Duration::ZERO,
            sanity: self.rules.sanity,
            superseded,
            seed: 0,
            rounds: self.rounds(now, &params.key),
        };
        self.insert(now, params, start, Some(user), now.wall, false);
        self.write(now, &key, Some(ticket));
        Ok(())
    }

    /// Takes a job up again that an earlier process, or another replica, has left in the store. One whose
    /// delayed event has fired meanwhile is removed.
    pub(crate) fn restore(&mut self, now: Now, stored: StoredJob) {
        if self.by_key.contains_key(&stored.params.key) {
            return;
        }
        let StoredJob { params, restarted_at, connected } = stored;
        let age = now.wall.duration_since(restarted_at).unwrap_or_default();
        let remaining = params.delay_timeout.saturating_sub(age);
        // Not `rules.longest`: whoever lowers that means new jobs.
        let sane = params.delay_timeout <= LONGEST_STORED && !params.delay_timeout.is_zero();
        if remaining.is_zero() || !sane {
            self.queue(now, params.key, Op::Remove, None);
            return;
        }
        let others = u32::try_from(self.jobs.len()).unwrap_or(u32::MAX);
        let spread = LOOK_SPREAD.0.saturating_mul(others).min(LOOK_SPREAD.1).min(remaining / 4);
        let start = Start {
            timeout: params.delay_timeout,
            remaining,
            was_connected: connected == Some(true),
            first_look: spread,
            sanity: self.rules.sanity,
            superseded: None,
            seed: 0,
            rounds: self.rounds(now, &params.key),
        };
        self.insert(now, params, start, None, restarted_at, connected == Some(true));
    }

    /// Compares with what all replicas have in the store, as read from `since` on: jobs that nobody holds are
    /// taken up, jobs that another replica has replaced are given up, jobs that the store has lost are written
    /// again.
    pub(crate) fn swept(&mut self, now: Now, since: Instant, stored: Vec<StoredJob>) {
        let mut missing: BTreeSet<Serial> = self.jobs.keys().copied().collect();
        for job in stored {
            let Some(serial) = self.by_key.get(&job.params.key).copied() else {
                let age = now.wall.duration_since(job.restarted_at).unwrap_or_default();
                let fired = age >= job.params.delay_timeout;
                let forgotten = age >= job.params.delay_timeout.saturating_add(LEFT_BEHIND);
                // What is being removed must not come back.
                if !self.closed && !self.writers.contains_key(&job.params.key) && (!fired || forgotten) {
                    self.restore(now, job);
                }
                continue;
            };
            let Some(entry) = self.jobs.get(&serial) else { continue };
            if job.params.delay_id == entry.params.delay_id {
                missing.remove(&serial);
            } else if matches!(entry.holding, Holding::Held { .. }) && self.settled(serial, since) {
                missing.remove(&serial);
                self.give_up(serial);
            }
        }
        for serial in missing {
            if self.settled(serial, since)
                && let Some(entry) = self.jobs.get(&serial)
                && !(entry.from_store && matches!(entry.holding, Holding::Elsewhere { .. }))
            {
                let key = entry.params.key.clone();
                self.write(now, &key, None);
            }
        }
    }

    /// What the SFU says about a participant.
    pub(crate) fn event(&mut self, now: Now, key: &JobKey, input: Input) {
        let held = self.by_key.get(key).and_then(|serial| self.jobs.get(serial));
        let held = held.is_some_and(|entry| matches!(entry.holding, Holding::Held { .. }));
        if self.rules.shared
            && !held
            && let Some(news) = News::of(&input)
        {
            self.effects.push_back(Effect::Tell { notice: Notice { key: key.clone(), news } });
        }
        if let Some(serial) = self.by_key.get(key).copied() {
            self.input(now, serial, input);
        }
    }

    /// What another replica tells.
    pub(crate) fn heard(&mut self, now: Now, notice: Notice) {
        let Notice { key, news } = notice;
        let Some(serial) = self.by_key.get(&key).copied() else { return };
        match news {
            News::Joined { sid } => self.input(now, serial, Input::Joined { sid }),
            News::Left { sid, why } => self.input(now, serial, Input::Left { sid, why }),
            News::Replaced { made } => {
                if self.jobs.get(&serial).is_some_and(|entry| entry.made < made) {
                    self.give_up(serial);
                }
            }
            News::Released { sid } => {
                if let Some(entry) = self.jobs.get_mut(&serial)
                    && matches!(entry.holding, Holding::Elsewhere { .. })
                {
                    if let Some(sid) = sid {
                        entry.job.supersede(sid);
                    }
                    entry.holding = Holding::Asking;
                    self.effects.push_back(entry.lease(serial));
                    self.schedule(serial);
                }
            }
        }
    }

    /// The answer to [`Effect::Look`].
    pub(crate) fn looked(&mut self, now: Now, serial: Serial, call: CallId, presence: Presence) {
        self.input(now, serial, Input::Looked { call, presence });
    }

    /// The answer to [`Effect::Restart`] and [`Effect::Send`].
    pub(crate) fn called(&mut self, now: Now, serial: Serial, call: CallId, outcome: Outcome) {
        let Some(entry) = self.jobs.get(&serial) else { return };
        if matches!(outcome, Outcome::Later(_) | Outcome::Refused) {
            match entry.job.phase() {
                Phase::Connected => self.stats.restart_failures += 1,
                Phase::Leaving => self.stats.send_failures += 1,
                Phase::Waiting | Phase::Ended => {}
            }
        }
        self.input(now, serial, Input::Called { call, outcome });
    }

    /// The answer to [`Effect::Lease`].
    pub(crate) fn leased(&mut self, now: Now, serial: Serial, lease: Lease) {
        let Some(entry) = self.jobs.get_mut(&serial) else { return };
        let renewal = matches!(entry.holding, Holding::Held { .. });
        match lease {
            Lease::Granted | Lease::Unknown => {
                let renew = now.instant + lease_time(entry.params.delay_timeout) / 3;
                entry.holding = Holding::Held { renew, asking: false };
                for input in std::mem::take(&mut entry.inbox) {
                    entry.job.handle(now.instant, input);
                }
                entry.job.handle_timeout(now.instant);
                if std::mem::take(&mut entry.displaced) {
                    // Over whatever the other replica wrote for its job in the meantime.
                    let key = entry.params.key.clone();
                    self.write(now, &key, None);
                }
                self.drain(now, serial);
            }
            // Another replica has it, and the store with it. Nothing more is written from here.
            Lease::Refused if renewal || entry.from_store => self.forget(serial),
            Lease::Refused => {
                let ask = now.instant + lease_time(entry.params.delay_timeout) / 3;
                entry.holding = Holding::Elsewhere { ask };
                entry.displaced = true;
                let notice =
                    Notice { key: entry.params.key.clone(), news: News::Replaced { made: entry.made } };
                self.effects.push_back(Effect::Tell { notice });
                self.schedule(serial);
            }
        }
    }

    /// The answer to [`Effect::Put`] and [`Effect::Remove`].
    pub(crate) fn stored(&mut self, now: Now, key: &JobKey, write: WriteId, succeeded: bool) {
        let Some(writer) = self.writers.get_mut(key) else { return };
        let Some((_, op, tickets)) = writer.running.take_if(|(running, ..)| *running == write) else {
            return;
        };
        self.effects.extend(tickets.into_iter().map(|ticket| Effect::Reply { ticket }));
        if let Some(notice) = writer.given_up.take() {
            // Whether it succeeded is not ours to care for any more.
            self.effects.push_back(Effect::Release { key: key.clone(), notice: Some(notice) });
        } else if succeeded {
            writer.failures = 0;
            match &op {
                Op::Put(_) => {
                    let entry = self.by_key.get(key).and_then(|serial| self.jobs.get_mut(serial));
                    if let Some(entry) = entry {
                        entry.written = Some(now.instant);
                    }
                }
                Op::Remove if !self.by_key.contains_key(key) => {
                    self.effects.push_back(Effect::Release { key: key.clone(), notice: None });
                }
                Op::Remove => {}
            }
        } else {
            self.stats.store_errors += 1;
            writer.failures = writer.failures.saturating_add(1);
            let wait = STORE_BACKOFF.0.saturating_mul(1 << (writer.failures - 1).min(6)).min(STORE_BACKOFF.1);
            writer.retry = Some(now.instant + wait);
            self.retries.insert((now.instant + wait, key.clone()));
            writer.pending.get_or_insert(op);
        }
        self.next_write(key);
    }

    /// Does what has become due.
    pub(crate) fn handle_timeout(&mut self, now: Now) {
        while let Some((at, serial)) = self.timers.first().copied()
            && at <= now.instant
        {
            self.timers.pop_first();
            let Some(entry) = self.jobs.get_mut(&serial) else { continue };
            entry.due = None;
            match &mut entry.holding {
                Holding::Held { renew, asking } => {
                    if *renew <= now.instant && !*asking {
                        *asking = true;
                        self.effects.push_back(entry.lease(serial));
                    }
                    entry.job.handle_timeout(now.instant);
                }
                Holding::Elsewhere { ask } => {
                    // Its event has fired meanwhile, or whoever has the lease keeps another one alive.
                    let age = now.wall.duration_since(entry.restarted_at).unwrap_or_default();
                    if age >= entry.params.delay_timeout.saturating_add(LEFT_BEHIND) {
                        self.forget(serial);
                        continue;
                    }
                    if *ask <= now.instant {
                        entry.holding = Holding::Asking;
                        self.effects.push_back(entry.lease(serial));
                    }
                }
                Holding::Asking => {}
            }
            self.drain(now, serial);
        }
        while let Some((at, key)) = self.retries.first().cloned()
            && at <= now.instant
        {
            self.retries.pop_first();
            if let Some(writer) = self.writers.get_mut(&key) {
                writer.retry = None;
            }
            self.next_write(&key);
        }
    }

    /// When [`Self::handle_timeout`] is due next.
    pub(crate) fn timeout(&self) -> Option<Instant> {
        let job = self.timers.first().map(|(at, _)| *at);
        let retry = self.retries.first().map(|(at, _)| *at);
        job.into_iter().chain(retry).min()
    }

    /// The next thing to do.
    pub(crate) fn poll(&mut self) -> Option<Effect> {
        self.effects.pop_front()
    }

    /// Takes no more jobs.
    pub(crate) fn close(&mut self) {
        self.closed = true;
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.closed
    }

    /// Whether no event is being sent and the store has taken everything that it does take: what a shutdown
    /// waits for.
    pub(crate) fn is_quiet(&self) -> bool {
        self.jobs.values().all(|entry| entry.job.phase() != Phase::Leaving)
            && self.writers.values().all(|writer| writer.running.is_none() && writer.retry.is_some())
    }

    /// Whether every lease has been answered and every write tried: what a start waits for.
    pub(crate) fn is_settled(&self) -> bool {
        self.jobs.values().all(|entry| entry.holding != Holding::Asking)
            && self.writers.values().all(|writer| writer.running.is_none())
    }

    /// The jobs of which this replica has the lease.
    pub(crate) fn held(&self) -> impl Iterator<Item = &JobKey> {
        let held = |entry: &&Entry| matches!(entry.holding, Holding::Held { .. });
        self.jobs.values().filter(held).map(|entry| &entry.params.key)
    }

    pub(crate) fn stats(&self) -> Stats {
        let mut stats = self.stats;
        for entry in self.jobs.values() {
            match (entry.holding, entry.job.phase()) {
                (Holding::Elsewhere { .. }, _) => stats.elsewhere += 1,
                (_, Phase::Waiting) => stats.waiting += 1,
                (_, Phase::Connected) => stats.connected += 1,
                (_, Phase::Leaving) => stats.leaving += 1,
                (_, Phase::Ended) => {}
            }
        }
        stats.unwritten = self.writers.len();
        stats.failing = self.writers.values().filter(|writer| writer.failures > 0).count();
        stats
    }

    fn insert(
        &mut self,
        now: Now,
        params: JobParams,
        mut start: Start,
        user: Option<Arc<str>>,
        restarted_at: SystemTime,
        connected: bool,
    ) {
        self.serials += 1;
        let serial = self.serials;
        start.seed = self.rules.seed ^ serial;
        let from_store = user.is_none();
        let key = params.key.clone();
        let entry = Entry {
            params: Arc::new(params),
            user,
            job: Job::new(now.instant, start),
            holding: Holding::Asking,
            inbox: Vec::new(),
            restarted_at,
            made: if from_store { SystemTime::UNIX_EPOCH } else { now.wall },
            displaced: false,
            connected,
            written: from_store.then_some(now.instant),
            from_store,
            due: None,
        };
        self.effects.push_back(entry.lease(serial));
        self.jobs.insert(serial, entry);
        self.by_key.insert(key, serial);
    }

    fn input(&mut self, now: Now, serial: Serial, input: Input) {
        let Some(entry) = self.jobs.get_mut(&serial) else { return };
        if matches!(entry.holding, Holding::Held { .. }) {
            entry.job.handle(now.instant, input);
            self.drain(now, serial);
        } else if entry.inbox.len() < INBOX {
            entry.inbox.push(input);
        }
    }

    /// Takes what a job wants done, and sets its timer.
    fn drain(&mut self, now: Now, serial: Serial) {
        while let Some(entry) = self.jobs.get_mut(&serial)
            && matches!(entry.holding, Holding::Held { .. })
            && let Some(output) = entry.job.poll()
        {
            let params = entry.params.clone();
            match output {
                Output::Restart(call) => self.effects.push_back(Effect::Restart { serial, call, params }),
                Output::Send(call) => self.effects.push_back(Effect::Send { serial, call, params }),
                Output::Look(call) => self.effects.push_back(Effect::Look { serial, call, params }),
                Output::Sent { late } => self.stats.send_lateness.count(late),
                Output::NotRestarted => {
                    self.stats.not_restarted += 1;
                    tracing::warn!(room = %params.key.room, server = params.server.as_str(),
                        "a delayed event could not be restarted in time; the homeserver has probably sent it");
                }
                Output::Restarted { sent_at, late } => {
                    self.stats.restart_lateness.count(late);
                    self.stats.restarts += 1;
                    entry.restarted_at = now.wall - now.instant.saturating_duration_since(sent_at);
                    entry.connected = true;
                    self.write(now, &params.key, None);
                }
                Output::Ended(end) => {
                    match end {
                        End::Sent => self.stats.sends += 1,
                        End::Lost => self.stats.lost += 1,
                        End::Aborted => self.stats.aborted += 1,
                        End::NotSent | End::Expired => {}
                    }
                    tracing::info!(room = %params.key.room, ?end, "delegated leave is over");
                    self.forget(serial);
                    self.queue(now, params.key.clone(), Op::Remove, None);
                }
            }
        }
        self.schedule(serial);
    }

    fn schedule(&mut self, serial: Serial) {
        let Some(entry) = self.jobs.get_mut(&serial) else { return };
        let due = match entry.holding {
            Holding::Held { renew, asking } => {
                entry.job.timeout().into_iter().chain((!asking).then_some(renew)).min()
            }
            Holding::Elsewhere { ask } => Some(ask),
            Holding::Asking => None,
        };
        if due != entry.due {
            if let Some(old) = entry.due {
                self.timers.remove(&(old, serial));
            }
            self.timers.extend(due.map(|at| (at, serial)));
            entry.due = due;
        }
    }

    /// From when on the looks into the room of `key` are counted: for each room from another moment, lest all
    /// rooms be asked for at once.
    fn rounds(&mut self, now: Now, key: &JobKey) -> Instant {
        let began = *self.began.get_or_insert(now.instant);
        let mut hasher = DefaultHasher::new();
        key.room.hash(&mut hasher);
        let earlier = Duration::from_millis(hasher.finish() % 60_000);
        began.checked_sub(earlier).unwrap_or(began)
    }

    /// Drops a job, and what is on its way for it.
    fn forget(&mut self, serial: Serial) {
        let Some(entry) = self.jobs.remove(&serial) else { return };
        self.by_key.remove(&entry.params.key);
        if let Some(due) = entry.due {
            self.timers.remove(&(due, serial));
        }
        if let Some(user) = entry.user
            && let Some(count) = self.per_user.get_mut(&user)
        {
            *count -= 1;
            if *count == 0 {
                self.per_user.remove(&user);
            }
        }
        self.effects.push_back(Effect::Cancel { serial });
    }

    /// Leaves a job to the replica at which its client has delegated a newer one. The lease is free once nothing
    /// is being written here any more, so that an old write cannot come after the other replica's first.
    fn give_up(&mut self, serial: Serial) {
        let Some(entry) = self.jobs.get(&serial) else { return };
        let key = entry.params.key.clone();
        let leased = !matches!(entry.holding, Holding::Elsewhere { .. });
        let sid = entry.job.sid().map(str::to_owned);
        self.forget(serial);
        let notice = Notice { key: key.clone(), news: News::Released { sid } };
        let mut writing = false;
        if let Some(writer) = self.writers.get_mut(&key) {
            writer.pending = None;
            self.effects.extend(writer.tickets.drain(..).map(|ticket| Effect::Reply { ticket }));
            if let Some(at) = writer.retry.take() {
                self.retries.remove(&(at, key.clone()));
            }
            writing = writer.running.is_some();
            writer.given_up = (writing && leased).then(|| notice.clone());
        }
        if !writing {
            self.writers.remove(&key);
            if leased {
                self.effects.push_back(Effect::Release { key, notice: Some(notice) });
            }
        }
    }

    /// Writes the job of `key` as it is now.
    fn write(&mut self, now: Now, key: &JobKey, ticket: Option<Ticket>) {
        let Some(entry) = self.by_key.get(key).and_then(|serial| self.jobs.get(serial)) else { return };
        let job = StoredJob {
            params: JobParams::clone(&entry.params),
            restarted_at: entry.restarted_at,
            connected: Some(entry.connected),
        };
        self.queue(now, key.clone(), Op::Put(job), ticket);
    }

    fn queue(&mut self, _: Now, key: JobKey, op: Op, ticket: Option<Ticket>) {
        let writer = self.writers.entry(key.clone()).or_default();
        // A new job of the same participant keeps the lease.
        writer.given_up = None;
        writer.pending = Some(op);
        writer.tickets.extend(ticket);
        // A request does not wait for the next attempt at a store that is out of order.
        if writer.retry.is_some() {
            self.effects.extend(writer.tickets.drain(..).map(|ticket| Effect::Reply { ticket }));
        }
        self.next_write(&key);
    }

    fn next_write(&mut self, key: &JobKey) {
        let Some(writer) = self.writers.get_mut(key) else { return };
        if writer.running.is_some() || writer.retry.is_some() {
            return;
        }
        let Some(op) = writer.pending.take() else {
            self.writers.remove(key);
            return;
        };
        self.writes += 1;
        let write = self.writes;
        self.effects.push_back(match &op {
            Op::Put(job) => Effect::Put { write, job: job.clone() },
            Op::Remove => Effect::Remove { write, key: key.clone() },
        });
        writer.running = Some((write, op, std::mem::take(&mut writer.tickets)));
    }

    /// Whether the store had taken the job before `since`, and nothing is being written for it.
    fn settled(&self, serial: Serial, since: Instant) -> bool {
        self.jobs.get(&serial).is_some_and(|entry| {
            entry.written.is_some_and(|written| written < since)
                && !self.writers.contains_key(&entry.params.key)
        })
    }
}

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod model;

#[cfg(test)]
mod tests;
