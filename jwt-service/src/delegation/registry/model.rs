//! The registry in a model of its world: a store that fails, homeservers and an SFU that answer anything in any
//! order, other replicas, and a process that dies at any point. It checks after every step what must hold.

use std::{
    collections::{HashMap, HashSet},
    time::{Duration, Instant, UNIX_EPOCH},
};

use super::{
    AddError, Effect, Holding, Input, JobKey, JobParams, Lease, News, Notice, Now, Outcome, Phase, Presence,
    Registry, Rules, StoredJob, Ticket,
};
use crate::{
    ParticipantIdentity, RoomAlias,
    delegation::{DelayId, Leave},
    fuzzing::{beginning, duration},
};

pub(super) const HOUR: Duration = Duration::from_hours(1);

/// Every two bytes are one step: a letter and how.
pub(crate) fn job_registry(data: &[u8]) {
    let mut world = World::new();
    for step in data.chunks_exact(2) {
        world.step(step[0], step[1]);
        world.check();
    }
    world.finish();
}

pub(super) fn rules() -> Rules {
    Rules {
        shortest: Duration::from_millis(100),
        longest: Duration::from_hours(24),
        jobs: 4,
        jobs_per_user: 2,
        sanity: None,
        seed: 7,
        shared: true,
    }
}

pub(super) fn key(n: u8) -> JobKey {
    JobKey {
        room: RoomAlias::of_slot("!r:hs", "s"),
        identity: ParticipantIdentity::of_member("@a:hs", "D", &n.to_string()),
    }
}

pub(super) fn params(n: u8, id: &str, timeout: Duration) -> JobParams {
    JobParams {
        key: key(n),
        server: "hs.org".parse().unwrap_or_else(|error| panic!("{error}")),
        delay_id: DelayId::new(id.to_owned()).unwrap_or_else(|error| panic!("{error}")),
        delay_timeout: timeout,
    }
}

fn name(params: &JobParams) -> (JobKey, String) {
    (params.key.clone(), params.delay_id.as_str().to_owned())
}

/// What comes back for something that was on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reply {
    Done,
    /// An error, and nothing was done.
    Failed,
    /// An error, though it was done.
    Arrived,
    /// The homeserver does not know the event; the participant is not on the SFU.
    Gone,
    /// The participant is on the SFU.
    Present,
    /// The homeserver will not; another replica has the lease.
    Refused,
}

/// A registry with everything around it, and what its promises come to.
pub(super) struct World {
    pub(super) registry: Registry,
    pub(super) now: Now,
    pub(super) store: HashMap<JobKey, StoredJob>,
    pub(super) outstanding: Vec<Effect>,
    /// Requests that wait, with the job that they are about.
    tickets: HashMap<Ticket, (JobKey, String)>,
    /// Jobs that a client was told we have, less those that are over or may be.
    promised: HashMap<JobKey, String>,
    pub(super) replies: Vec<Ticket>,
    /// Delayed events that were sent, and those whose job may end without that.
    pub(super) sent: HashSet<String>,
    excused: HashSet<String>,
    /// Since when the restarts of a job fail.
    failing: HashMap<JobKey, Instant>,
    /// Whether other replicas have been there.
    others: bool,
    next: u64,
}

impl World {
    pub(super) fn new() -> Self {
        Self {
            registry: Registry::new(rules()),
            now: Now { instant: beginning(), wall: UNIX_EPOCH + HOUR * 1000 },
            store: HashMap::new(),
            outstanding: Vec::new(),
            tickets: HashMap::new(),
            promised: HashMap::new(),
            replies: Vec::new(),
            sent: HashSet::new(),
            excused: HashSet::new(),
            failing: HashMap::new(),
            others: false,
            next: 0,
        }
    }

    fn step(&mut self, letter: u8, how: u8) {
        let (n, rest) = (how % 6, how / 6);
        let sid = || [None, Some("a"), Some("b")][usize::from(rest % 3)].map(str::to_owned);
        match letter {
            b'A' => {
                let seconds = [1, 8, 60, 3600, 7200, 90_000][usize::from(rest % 6)];
                // A refusal promises nothing.
                let _ = self.add(n, Duration::from_secs(seconds));
            }
            b'J' => self.event(n, Input::Joined { sid: sid() }),
            b'L' => self.event(n, Input::Left { sid: sid(), why: Leave::OnPurpose }),
            b'T' => self.event(n, Input::Left { sid: sid(), why: Leave::TakenOver }),
            b'O' => self.event(n, Input::Left { sid: sid(), why: Leave::Otherwise }),
            b'N' => {
                let why = if rest % 2 == 0 { Leave::OnPurpose } else { Leave::Otherwise };
                let news = match rest / 3 % 4 {
                    0 => News::Joined { sid: sid() },
                    1 => News::Left { sid: sid(), why },
                    2 => News::Replaced { made: self.now.wall },
                    _ => News::Released { sid: sid() },
                };
                self.heard(n, news);
            }
            b'P' => self.pass(duration(how)),
            b'D' => {
                let due = self.registry.timeout().unwrap_or(self.now.instant);
                self.pass(due.saturating_duration_since(self.now.instant));
            }
            b'S' => self.sweep(),
            b'C' => self.crash(how % 2 == 1),
            b'X' => self.registry.close(),
            _ => {
                use Reply::{Arrived, Done, Failed, Gone, Present, Refused};
                let reply = [Done, Failed, Arrived, Gone, Present, Refused, Done, Done][usize::from(how % 8)];
                self.reply(usize::from(how / 8), reply);
            }
        }
    }

    pub(super) fn add(&mut self, n: u8, timeout: Duration) -> Result<Ticket, AddError> {
        self.next += 1;
        let (ticket, id) = (self.next, format!("id-{}", self.next));
        self.registry.add(self.now, params(n, &id, timeout), &format!("@{}:hs", n % 2), ticket)?;
        // The new job replaces what was promised before, whether its request is answered or not.
        self.promised.remove(&key(n));
        self.failing.remove(&key(n));
        self.tickets.insert(ticket, (key(n), id));
        self.collect();
        Ok(ticket)
    }

    pub(super) fn event(&mut self, n: u8, input: Input) {
        if let Input::Left { why, .. } = input {
            self.left(n, why);
        }
        self.registry.event(self.now, &key(n), input);
        self.collect();
    }

    /// What another replica passes on.
    fn heard(&mut self, n: u8, news: News) {
        match news {
            News::Left { why, .. } => self.left(n, why),
            News::Replaced { .. } => {
                // The job that counts is another replica's now, and so is its place in the store.
                self.others = true;
                self.excuse(&key(n));
            }
            News::Joined { .. } | News::Released { .. } => {}
        }
        self.registry.heard(self.now, Notice { key: key(n), news });
        self.collect();
    }

    fn left(&mut self, n: u8, why: Leave) {
        let Some(entry) = self.registry.by_key.get(&key(n)).map(|serial| &self.registry.jobs[serial]) else {
            return;
        };
        let arrived = entry.job.phase() != Phase::Waiting && matches!(entry.holding, Holding::Held { .. });
        if !arrived && matches!(why, Leave::TakenOver | Leave::Otherwise) {
            // It never came, perhaps.
            self.excuse(&key(n));
        }
    }

    pub(super) fn pass(&mut self, time: Duration) {
        self.now = Now { instant: self.now.instant + time, wall: self.now.wall + time };
        let over = |since: &Instant| self.now.instant - *since >= HOUR;
        let over: Vec<_> =
            self.failing.iter().filter(|(_, since)| over(since)).map(|(k, _)| k.clone()).collect();
        over.iter().for_each(|key| self.excuse(key));
        self.registry.handle_timeout(self.now);
        self.collect();
    }

    /// Compares with the store, as it is right now.
    fn sweep(&mut self) {
        let stored = self.store.values().cloned().collect();
        self.registry.swept(self.now, self.now.instant, stored);
        self.collect();
    }

    /// From here on the job of `key` may be over.
    fn excuse(&mut self, key: &JobKey) {
        self.promised.remove(key);
        if let Some(entry) = self.registry.by_key.get(key).map(|serial| &self.registry.jobs[serial]) {
            self.excused.insert(entry.params.delay_id.as_str().to_owned());
        }
    }

    pub(super) fn collect(&mut self) {
        while let Some(effect) = self.registry.poll() {
            match effect {
                Effect::Cancel { serial } => self.outstanding.retain(|effect| {
                    !matches!(effect, Effect::Restart { serial: s, .. } | Effect::Send { serial: s, .. }
                        | Effect::Look { serial: s, .. } if *s == serial)
                }),
                Effect::Reply { ticket } => {
                    self.replies.push(ticket);
                    let Some((key, id)) = self.tickets.remove(&ticket) else {
                        panic!("answered twice");
                    };
                    let current = self.registry.by_key.get(&key).map(|serial| &self.registry.jobs[serial]);
                    if current.is_some_and(|entry| entry.params.delay_id.as_str() == id)
                        && self.store.get(&key).is_some_and(|job| job.params.delay_id.as_str() == id)
                        && !self.excused.contains(&id)
                    {
                        self.promised.insert(key, id);
                    }
                }
                Effect::Release { .. } | Effect::Tell { .. } => {}
                Effect::Send { serial, ref params, .. } => {
                    let id = params.delay_id.as_str().to_owned();
                    assert!(!self.sent.contains(&id), "sent again after success");
                    let same = |e: &Effect| matches!(e, Effect::Send { serial: s, .. } if *s == serial);
                    assert!(!self.outstanding.iter().any(same), "two sends at a time");
                    self.acts(serial);
                    self.outstanding.push(effect);
                }
                Effect::Restart { serial, .. } | Effect::Look { serial, .. } => {
                    self.acts(serial);
                    self.outstanding.push(effect);
                }
                other => self.outstanding.push(other),
            }
        }
    }

    /// Only a job whose lease is held asks anybody for anything. One that is over by now has asked before.
    fn acts(&self, serial: u64) {
        if let Some(entry) = self.registry.jobs.get(&serial) {
            assert!(matches!(entry.holding, Holding::Held { .. }), "it acts without its lease");
        }
    }

    /// The answer to the `n`-th thing that is on its way comes: a success or a failure.
    pub(super) fn answer(&mut self, n: usize, good: bool) {
        self.reply(n, if good { Reply::Done } else { Reply::Failed });
    }

    fn reply(&mut self, n: usize, reply: Reply) {
        if self.outstanding.is_empty() {
            return;
        }
        let effect = self.outstanding.remove(n % self.outstanding.len());
        let failed = matches!(reply, Reply::Failed | Reply::Arrived);
        let outcome = match reply {
            Reply::Done | Reply::Present => Outcome::Done,
            Reply::Failed | Reply::Arrived => Outcome::Later(None),
            Reply::Gone => Outcome::Gone,
            Reply::Refused => Outcome::Refused,
        };
        match effect {
            Effect::Restart { serial, call, params } => {
                match outcome {
                    Outcome::Done => drop(self.failing.remove(&params.key)),
                    Outcome::Later(_) => {
                        self.failing.entry(params.key.clone()).or_insert(self.now.instant);
                    }
                    _ => self.excuse(&params.key),
                }
                self.registry.called(self.now, serial, call, outcome);
            }
            Effect::Send { serial, call, params } => {
                if matches!(outcome, Outcome::Done | Outcome::Gone) {
                    self.sent.insert(params.delay_id.as_str().to_owned());
                }
                self.excuse(&params.key);
                self.registry.called(self.now, serial, call, outcome);
            }
            Effect::Look { serial, call, .. } => {
                let presence = match reply {
                    Reply::Present => Presence::Present { sid: None },
                    Reply::Gone => Presence::Absent,
                    _ => Presence::Unknown,
                };
                self.registry.looked(self.now, serial, call, presence);
            }
            Effect::Put { write, job } => {
                if reply != Reply::Failed {
                    self.store.insert(job.params.key.clone(), job.clone());
                }
                self.registry.stored(self.now, &job.params.key, write, !failed);
            }
            Effect::Remove { write, key } => {
                if reply != Reply::Failed {
                    // An older job may be there still, whose successor the store never took; never one that
                    // is promised and not sent.
                    let gone = self.store.remove(&key).map(|job| job.params.delay_id.as_str().to_owned());
                    let promised = self.promised.get(&key);
                    assert!(gone.is_none() || gone.as_ref() != promised, "removed before it was sent");
                }
                self.registry.stored(self.now, &key, write, !failed);
            }
            Effect::Lease { serial, key, .. } => {
                let lease = match reply {
                    Reply::Failed | Reply::Arrived => Lease::Unknown,
                    Reply::Refused => Lease::Refused,
                    Reply::Done | Reply::Gone | Reply::Present => Lease::Granted,
                };
                if lease == Lease::Refused {
                    self.others = true;
                    self.excuse(&key);
                }
                self.registry.leased(self.now, serial, lease);
            }
            Effect::Cancel { .. } | Effect::Release { .. } | Effect::Tell { .. } | Effect::Reply { .. } => {}
        }
        self.collect();
    }

    pub(super) fn answer_all(&mut self) {
        while !self.outstanding.is_empty() {
            self.answer(0, true);
        }
    }

    /// The process dies and another one starts. A write that is on its way may have arrived.
    pub(super) fn crash(&mut self, arrived: bool) {
        for effect in std::mem::take(&mut self.outstanding) {
            match effect {
                Effect::Put { job, .. } if arrived => {
                    self.store.insert(job.params.key.clone(), job);
                }
                Effect::Remove { key, .. } if arrived => {
                    self.store.remove(&key);
                }
                _ => {}
            }
        }
        self.registry = Registry::new(rules());
        self.tickets.clear();
        self.failing.clear();
        // What was sent but not yet removed comes back, and finds nothing at the homeserver.
        self.sent.clear();
        for job in self.store.values().cloned().collect::<Vec<_>>() {
            let age = self.now.wall.duration_since(job.restarted_at).unwrap_or_default();
            if age >= job.params.delay_timeout {
                // The homeserver has sent it meanwhile.
                self.promised.remove(&job.params.key);
            }
            self.registry.restore(self.now, job);
        }
        self.collect();
    }

    pub(super) fn check(&self) {
        assert_eq!(self.registry.jobs.len(), self.registry.by_key.len(), "one live job for each participant");
        for (key, id) in &self.promised {
            let Some(serial) = self.registry.by_key.get(key) else {
                panic!("a promised job is not there");
            };
            assert_eq!(self.registry.jobs[serial].params.delay_id.as_str(), id);
            let stored = self.store.get(key).map(|job| job.params.delay_id.as_str());
            assert_eq!(stored, Some(&**id), "a promised job is in the store");
        }
        let mut writing = HashSet::new();
        for effect in &self.outstanding {
            let (Effect::Put { job: StoredJob { params: JobParams { key, .. }, .. }, .. }
            | Effect::Remove { key, .. }) = effect
            else {
                continue;
            };
            assert!(writing.insert(key.clone()), "two writes at once for one participant");
        }
        if let Some(due) = self.registry.timeout() {
            assert!(due > self.now.instant, "what was due was not done");
        }
    }

    /// With a store that works again, it has exactly the jobs that are live; and when everybody goes, each
    /// event is sent.
    pub(super) fn finish(&mut self) {
        self.pass(Duration::from_secs(20));
        self.answer_all();
        self.check();
        assert!(self.tickets.is_empty(), "every request is answered");
        if !self.others {
            let live: HashSet<_> = self.registry.jobs.values().map(|entry| name(&entry.params)).collect();
            let stored: HashSet<_> = self.store.values().map(|job| name(&job.params)).collect();
            assert_eq!(live, stored);
        }
        for (key, id) in self.promised.clone() {
            self.registry.event(self.now, &key, Input::Left { sid: None, why: Leave::OnPurpose });
            self.collect();
            self.answer_all();
            assert!(self.sent.contains(&id), "its participant is gone, and it is not sent");
        }
    }
}
