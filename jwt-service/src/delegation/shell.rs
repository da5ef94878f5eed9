//! Delegated leave at work: performs what the [`Registry`] wants done, and tells it the time.
#![allow(clippy::disallowed_methods, reason = "this is the shell: it owns the clock and the tasks")]

use std::{
    collections::HashMap,
    fmt,
    future::Future,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use tokio::{
    sync::{Notify, Semaphore, mpsc, oneshot},
    task::AbortHandle,
    time::Instant,
};
use url::Url;

use super::{
    DelegationConfig, JobKey, JobParams, Stats,
    homeservers::{Action, Homeservers},
    machine::{CallId, Input, Outcome, Presence},
    notice::{Notice, Told},
    registry::{AddError, Effect, Lease, Now, Registry, Rules, SWEEP, Serial, Ticket, sweep_after},
};
use crate::{
    ParticipantIdentity, RoomAlias, ServerName, Sfu,
    http::causes,
    openid::{LookupError, Verifier},
    store::{Store, StoreError},
};

/// Time for one call to the store.
const STORE_TIME: Duration = Duration::from_secs(5);
/// Time to read all jobs.
const LOAD_TIME: Duration = Duration::from_secs(30);
/// Time for one look at the SFU, waiting for a place included.
const LOOK_TIME: Duration = Duration::from_secs(10);
/// How long a look waits for others into the same room. Their times are chosen to meet: see the machine.
const ROUND: Duration = Duration::from_millis(20);
/// Calls to the SFU, and to the store, at a time.
const LOOKS: usize = 64;
const STORE_CALLS: usize = 64;
/// Notices that wait to be told, and how long one is worth telling.
const TOLD: usize = 1024;
const TOLD_TIME: Duration = Duration::from_secs(10);
/// Between two attempts to listen: where that failed, and where the store does not offer it.
const LISTEN_PAUSE: Duration = Duration::from_secs(5);
const LISTEN_PAUSE_REFUSED: Duration = Duration::from_mins(5);
/// How often a replica says that it is there.
const ANNOUNCE_PAUSE: Duration = Duration::from_mins(1);
/// How soon it says so again to one that has its name: two that answer each other must come to an end.
const ANSWER_PAUSE: Duration = Duration::from_secs(5);
/// Between two log lines about a store that is out of order.
const COMPLAINT_PAUSE: Duration = Duration::from_secs(10);
/// Time to give all leases up at the end.
const RELEASE_TIME: Duration = Duration::from_secs(2);

/// All delegated leaves of this process. Dropping it stops them; they stay in the store.
pub(crate) struct Delegation {
    shared: Arc<Shared>,
    tasks: Vec<AbortHandle>,
}

struct Shared {
    registry: Mutex<Registry>,
    calls: Mutex<HashMap<Serial, Vec<(CallId, AbortHandle)>>>,
    replies: Mutex<HashMap<Ticket, oneshot::Sender<()>>>,
    tickets: AtomicU64,
    /// The time to come back has changed.
    wake: Notify,
    /// The shared store is worth a look before its time.
    look: Notify,
    /// Anything has changed.
    changed: Notify,
    homeservers: Homeservers,
    sfu: Arc<dyn Sfu>,
    store: Arc<dyn Store>,
    replica: String,
    looks: Semaphore,
    /// Who is looked for next, by room.
    rounds: Mutex<HashMap<RoomAlias, Vec<Looker>>>,
    store_calls: Semaphore,
    /// Which process says what the others hear: unlike `replica`, never the same twice.
    process: u64,
    tell: mpsc::Sender<(Instant, Told)>,
    /// When this process last said that it is there.
    announced: Mutex<Option<Instant>>,
    complaints: Mutex<Complaints>,
}

/// About the store: the last one that was logged, and how many since were not.
#[derive(Default)]
struct Complaints {
    last: Option<Instant>,
    unsaid: u64,
}

/// A participant that is looked for, and who wants to know.
type Looker = (ParticipantIdentity, oneshot::Sender<Presence>);

impl Delegation {
    /// Starts with no jobs. Must be called within a tokio runtime.
    pub(crate) fn start(
        config: DelegationConfig,
        sfu: Arc<dyn Sfu>,
        store: Arc<dyn Store>,
        verifier: Arc<Verifier>,
    ) -> Self {
        let rules = Rules {
            shortest: config.shortest_delay,
            longest: config.longest_delay,
            jobs: config.jobs,
            jobs_per_user: config.jobs_per_user,
            sanity: config.sanity_interval,
            seed: rand::random(),
            // Only Redis can be another process's store too.
            shared: store.kind() == "redis",
        };
        let shared_store = rules.shared;
        let (tell, told) = mpsc::channel(TOLD);
        let shared = Arc::new(Shared {
            registry: Mutex::new(Registry::new(rules)),
            calls: Mutex::default(),
            replies: Mutex::default(),
            tickets: AtomicU64::new(0),
            wake: Notify::new(),
            look: Notify::new(),
            changed: Notify::new(),
            homeservers: Homeservers::new(verifier),
            sfu,
            store,
            replica: config.replica,
            looks: Semaphore::new(LOOKS),
            rounds: Mutex::default(),
            store_calls: Semaphore::new(STORE_CALLS),
            process: rand::random(),
            tell,
            announced: Mutex::default(),
            complaints: Mutex::default(),
        });
        let mut tasks = vec![tokio::spawn(shared.clone().keep_time()).abort_handle()];
        if shared_store {
            tasks.push(tokio::spawn(shared.clone().sweep()).abort_handle());
            tasks.push(tokio::spawn(shared.clone().tell(told)).abort_handle());
            tasks.push(tokio::spawn(shared.clone().listen()).abort_handle());
            tasks.push(tokio::spawn(shared.clone().keep_announcing()).abort_handle());
        }
        Self { shared, tasks }
    }

    /// Takes the jobs up that an earlier process has left in the store, and clears those away whose delayed
    /// event has fired; whether the store could be read. To be awaited before requests and webhooks come in.
    pub(crate) async fn restore(&self) -> bool {
        match self.shared.load().await {
            Ok(stored) => {
                let found = stored.len();
                self.shared.with(|registry, now| {
                    for job in stored {
                        registry.restore(now, job);
                    }
                });
                self.shared.until(LOAD_TIME, Registry::is_settled).await;
                let taken = self.stats();
                tracing::info!(found, waiting = taken.waiting, "delegated leaves restored");
                true
            }
            Err(error) => {
                tracing::error!(cause = causes(&error), "no delegated leave could be restored yet");
                false
            }
        }
    }

    /// Tries again what [`Self::restore`] could not do; whether it is done now.
    pub(crate) async fn restore_late(&self) -> bool {
        let since = Instant::now().into_std();
        let Ok(stored) = self.shared.load().await else { return false };
        // Requests have come in meanwhile: what they made stays.
        self.shared.with(|registry, now| registry.swept(now, since, stored));
        tracing::info!("delegated leaves restored");
        true
    }

    /// Where the client-server API of `server` is.
    pub(crate) async fn resolve(&self, server: &ServerName) -> Result<Url, LookupError> {
        self.shared.homeservers.resolve(server).await
    }

    /// Takes a job over for `user`; when this returns it is in the store, if the store works.
    pub(crate) async fn add(&self, params: JobParams, user: &str) -> Result<(), AddError> {
        let ticket = self.shared.tickets.fetch_add(1, Ordering::Relaxed);
        let (sender, written) = oneshot::channel();
        lock(&self.shared.replies).insert(ticket, sender);
        if let Err(refused) = self.shared.with(|registry, now| registry.add(now, params, user, ticket)) {
            lock(&self.shared.replies).remove(&ticket);
            return Err(refused);
        }
        // The job is taken in any case, so a sender that is dropped is no failure.
        let _ = written.await;
        Ok(())
    }

    /// What the SFU says about a participant. `false`: we are shutting down, say it to another process.
    pub(crate) fn event(&self, key: &JobKey, input: Input) -> bool {
        self.shared.with(|registry, now| {
            let open = !registry.is_closed();
            if open {
                registry.event(now, key, input);
            }
            open
        })
    }

    pub(crate) fn stats(&self) -> Stats {
        lock(&self.shared.registry).stats()
    }

    /// Takes no more jobs, lets events be sent that are being sent, for at most `grace`, and leaves all other
    /// jobs in the store to the next process.
    pub(crate) async fn shutdown(&self, grace: Duration) {
        self.shared.with(|registry, _| registry.close());
        if !self.shared.until(grace, Registry::is_quiet).await {
            tracing::warn!("some delayed events could not be sent before the end");
        }
        for task in &self.tasks {
            task.abort();
        }
        for (_, calls) in lock(&self.shared.calls).drain() {
            for (_, call) in calls {
                call.abort();
            }
        }
        let held: Vec<JobKey> = lock(&self.shared.registry).held().cloned().collect();
        let leaves_jobs = !held.is_empty();
        let mut releases = tokio::task::JoinSet::new();
        for key in held {
            let shared = self.shared.clone();
            releases.spawn(async move { shared.release(&key).await });
        }
        // A lease that is not given up runs out by itself.
        let _ = tokio::time::timeout(RELEASE_TIME, async {
            releases.join_all().await;
            if leaves_jobs {
                self.shared.store.tell(&Told::Stopped.encode(self.shared.process)).await?;
            }
            Ok::<_, StoreError>(())
        })
        .await;
    }
}

impl Drop for Delegation {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

impl fmt::Debug for Delegation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Delegation").field("stats", &self.stats()).finish_non_exhaustive()
    }
}

impl Shared {
    /// Changes the registry, and sets going what that leads to. Nothing waits while it is locked.
    fn with<T>(self: &Arc<Self>, change: impl FnOnce(&mut Registry, Now) -> T) -> T {
        let now = Now { instant: Instant::now().into_std(), wall: SystemTime::now() };
        let mut registry = lock(&self.registry);
        let result = change(&mut registry, now);
        while let Some(effect) = registry.poll() {
            // Under the lock, so that a job's cancellation cannot overtake its calls.
            self.perform(effect);
        }
        drop(registry);
        self.wake.notify_one();
        self.changed.notify_waiters();
        result
    }

    fn perform(self: &Arc<Self>, effect: Effect) {
        let shared = self.clone();
        match effect {
            Effect::Restart { serial, call, params } => self.act(serial, call, params, Action::Restart),
            Effect::Send { serial, call, params } => self.act(serial, call, params, Action::Send),
            Effect::Look { serial, call, params } => self.spawn(serial, call, async move {
                let presence = shared.clone().look(&params.key).await;
                shared.with(|registry, now| registry.looked(now, serial, call, presence));
            }),
            Effect::Cancel { serial } => {
                for (_, call) in lock(&self.calls).remove(&serial).into_iter().flatten() {
                    call.abort();
                }
            }
            Effect::Put { write, job } => {
                tokio::spawn(async move {
                    let written = shared.stored(shared.store.put(&job)).await.is_ok();
                    shared.with(|registry, now| registry.stored(now, &job.params.key, write, written));
                });
            }
            Effect::Remove { write, key } => {
                tokio::spawn(async move {
                    let written = shared.stored(shared.store.remove(&key)).await.is_ok();
                    shared.with(|registry, now| registry.stored(now, &key, write, written));
                });
            }
            Effect::Lease { serial, key, ttl } => {
                tokio::spawn(async move {
                    let asked = shared.store.lease(&key, &shared.replica, ttl);
                    let lease = match shared.stored(asked).await {
                        Ok(true) => Lease::Granted,
                        Ok(false) => Lease::Refused,
                        Err(()) => Lease::Unknown,
                    };
                    shared.with(|registry, now| registry.leased(now, serial, lease));
                });
            }
            Effect::Release { key, notice } => {
                tokio::spawn(async move {
                    shared.release(&key).await;
                    notice.into_iter().for_each(|notice| shared.say(notice));
                });
            }
            Effect::Tell { notice } => self.say(notice),
            Effect::Reply { ticket } => {
                if let Some(waiting) = lock(&self.replies).remove(&ticket) {
                    // The client may have gone; the job is taken all the same.
                    let _ = waiting.send(());
                }
            }
        }
    }

    fn act(self: &Arc<Self>, serial: Serial, call: CallId, params: Arc<JobParams>, action: Action) {
        let shared = self.clone();
        self.spawn(serial, call, async move {
            let outcome: Outcome = shared.homeservers.act(&params, action).await;
            shared.with(|registry, now| registry.called(now, serial, call, outcome));
        });
    }

    /// Runs a call of a job, so that it can be stopped with the job.
    fn spawn(
        self: &Arc<Self>,
        serial: Serial,
        call: CallId,
        work: impl Future<Output = ()> + Send + 'static,
    ) {
        let shared = self.clone();
        let mut calls = lock(&self.calls);
        let task = tokio::spawn(async move {
            work.await;
            let mut calls = lock(&shared.calls);
            if let Some(running) = calls.get_mut(&serial) {
                running.retain(|(id, _)| *id != call);
                if running.is_empty() {
                    calls.remove(&serial);
                }
            }
        });
        // Still locked: the task cannot have taken itself off the list before it is on it.
        calls.entry(serial).or_default().push((call, task.abort_handle()));
    }

    /// Looks for a participant together with all others of its room that are looked for now.
    async fn look(self: Arc<Self>, key: &JobKey) -> Presence {
        let (answer, asked) = oneshot::channel();
        let first = {
            let mut rounds = lock(&self.rounds);
            let round = rounds.entry(key.room.clone()).or_default();
            round.push((key.identity.clone(), answer));
            round.len() == 1
        };
        if first {
            tokio::spawn(self.round(key.room.clone()));
        }
        asked.await.unwrap_or(Presence::Unknown)
    }

    /// One call of the SFU for all who look into `room`. Whoever comes later is for the next: an answer that set
    /// out before the question would be about an earlier time.
    async fn round(self: Arc<Self>, room: RoomAlias) {
        tokio::time::sleep(ROUND).await;
        let round = lock(&self.rounds).remove(&room).unwrap_or_default();
        // Jobs that are over do not wait for an answer.
        let round: Vec<_> = round.into_iter().filter(|(_, answer)| !answer.is_closed()).collect();
        if round.is_empty() {
            return;
        }
        let identities: Vec<&str> = round.iter().map(|(identity, _)| identity.as_str()).collect();
        let asked = async {
            let _place = self.looks.acquire().await;
            self.sfu.participants(room.as_str(), &identities).await
        };
        let found = match tokio::time::timeout(LOOK_TIME, asked).await {
            Ok(Ok(found)) => found.into_iter().map(Some).collect(),
            Ok(Err(error)) => {
                tracing::debug!(%room, cause = causes(&error), "the SFU does not say who is there");
                Vec::new()
            }
            Err(_) => Vec::new(),
        };
        let nobody_knows = std::iter::repeat(None);
        for ((_, answer), found) in round.into_iter().zip(found.into_iter().chain(nobody_knows)) {
            let presence = match found {
                Some(Some(found)) => Presence::Present { sid: Some(found.sid).filter(|sid| !sid.is_empty()) },
                Some(None) => Presence::Absent,
                None => Presence::Unknown,
            };
            // The job may be over meanwhile.
            let _ = answer.send(presence);
        }
    }

    /// One call to the store within bounds.
    async fn stored<T>(&self, call: impl Future<Output = Result<T, StoreError>>) -> Result<T, ()> {
        let call = async {
            let _place = self.store_calls.acquire().await;
            call.await
        };
        match tokio::time::timeout(STORE_TIME, call).await {
            Ok(Ok(done)) => Ok(done),
            Ok(Err(error)) => {
                self.complain(&causes(&error));
                Err(())
            }
            Err(_) => {
                self.complain("it did not answer in time");
                Err(())
            }
        }
    }

    /// Logs a failure of the store, and while it is out of order only now and then: every job has its leases and
    /// writes, and each of them fails.
    fn complain(&self, cause: &str) {
        let mut complaints = lock(&self.complaints);
        if complaints.last.is_some_and(|at| at.elapsed() < COMPLAINT_PAUSE) {
            complaints.unsaid += 1;
            return;
        }
        let unsaid = std::mem::take(&mut complaints.unsaid);
        complaints.last = Some(Instant::now());
        tracing::error!(kind = self.store.kind(), cause, unsaid, "the store failed");
    }

    async fn release(&self, key: &JobKey) {
        let _ = self.stored(self.store.release(key, &self.replica)).await;
    }

    /// Has `notice` told to the other replicas.
    fn say(&self, notice: Notice) {
        // Full while Redis is down: then nobody would hear it either.
        let _ = self.tell.try_send((Instant::now(), Told::Notice(notice)));
    }

    /// Tells one notice after the other: that somebody has left must not come before that they have joined.
    async fn tell(self: Arc<Self>, mut queue: mpsc::Receiver<(Instant, Told)>) {
        while let Some((at, told)) = queue.recv().await {
            // What has waited for a store that was down is no news any more.
            if at.elapsed() < TOLD_TIME {
                let message = told.encode(self.process);
                let _ = self.stored(self.store.tell(&message)).await;
            }
        }
    }

    /// Listens to the other replicas.
    async fn listen(self: Arc<Self>) {
        loop {
            let began = Instant::now();
            let shared = self.clone();
            let heard = move |message: &[u8]| match Told::decode(message, shared.process) {
                Some(Told::Notice(notice)) => shared.with(|registry, now| registry.heard(now, notice)),
                Some(Told::Stopped) => shared.look.notify_one(),
                Some(Told::Here { replica }) if replica == shared.replica => {
                    tracing::warn!(
                        replica,
                        "another process on this Redis has our name, and both act on every job; if it is not about \
                         to stop, give each a LIVEKIT_JWT_REPLICA of its own"
                    );
                    // It may not know yet.
                    shared.announce(ANSWER_PAUSE);
                }
                Some(Told::Here { .. }) | None => {}
            };
            let pause = match self.store.listen(&heard).await {
                Ok(()) => {
                    tracing::debug!("the shared store passes nothing on between replicas");
                    LISTEN_PAUSE_REFUSED
                }
                Err(error) => {
                    tracing::warn!(cause = causes(&error), "other replicas cannot be heard");
                    LISTEN_PAUSE
                }
            };
            tokio::time::sleep_until(began + pause).await;
        }
    }

    /// Says who we are, again and again: whoever has the same name hears it.
    async fn keep_announcing(self: Arc<Self>) {
        loop {
            self.announce(Duration::ZERO);
            tokio::time::sleep(ANNOUNCE_PAUSE).await;
        }
    }

    /// Says who we are, unless that was said less than `pause` ago.
    fn announce(&self, pause: Duration) {
        let mut announced = lock(&self.announced);
        if announced.is_none_or(|at| at.elapsed() >= pause) {
            *announced = Some(Instant::now());
            let here = Told::Here { replica: self.replica.clone() };
            let _ = self.tell.try_send((Instant::now(), here));
        }
    }

    async fn load(&self) -> Result<Vec<super::StoredJob>, StoreError> {
        tokio::time::timeout(LOAD_TIME, self.store.load()).await.unwrap_or_else(|late| {
            Err(StoreError { kind: self.store.kind(), doing: "read all jobs", source: late.into() })
        })
    }

    /// Waits until the registry is as `ready` says, for at most `limit`.
    async fn until(self: &Arc<Self>, limit: Duration, ready: impl Fn(&Registry) -> bool) -> bool {
        let wait = async {
            loop {
                let changed = self.changed.notified();
                tokio::pin!(changed);
                changed.as_mut().enable();
                if ready(&lock(&self.registry)) {
                    return;
                }
                changed.await;
            }
        };
        tokio::time::timeout(limit, wait).await.is_ok()
    }

    async fn keep_time(self: Arc<Self>) {
        loop {
            let due = lock(&self.registry).timeout();
            let sleep = async {
                match due {
                    Some(at) => tokio::time::sleep_until(Instant::from_std(at)).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = sleep => self.with(|registry, now| registry.handle_timeout(now)),
                () = self.wake.notified() => {}
            }
        }
    }

    async fn sweep(self: Arc<Self>) {
        let mut pause = SWEEP.0;
        loop {
            // At once when a replica has stopped: its jobs are nobody's.
            let _ = tokio::time::timeout(pause, self.look.notified()).await;
            let since = Instant::now().into_std();
            pause = match self.load().await {
                Ok(stored) => self.with(|registry, now| {
                    let pause = sweep_after(stored.len(), registry.held().count());
                    registry.swept(now, since, stored);
                    pause
                }),
                Err(error) => {
                    tracing::warn!(cause = causes(&error), "the shared store cannot be read");
                    SWEEP.1
                }
            };
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic elsewhere must not take all other jobs along.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
