//! The homeservers' side of delegated leave: where a client-server API is, and the calls that restart and send
//! delayed events (MSC4140).
//!
//! Where an API is is remembered for four hours, looked up again in the background before that is over, and
//! used on if that fails: a web server that is down for a minute must not end a call.
#![allow(clippy::disallowed_methods, reason = "this is the shell: it owns the clock and the tasks")]

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};

use hyper::{Method, StatusCode};
use serde::Deserialize;
use tokio::{sync::Semaphore, time::Instant};
use url::Url;

use super::{DelayId, JobParams, machine::Outcome};
use crate::{
    ServerName,
    openid::{ClientAnswer, LookupError, Verifier},
};

/// Time for one delayed-event call, discovery included.
const CALL_TIME: Duration = Duration::from_secs(5);
/// The least time before a restart that hangs is given up for another.
const SHORTEST_TRY: Duration = Duration::from_millis(500);
/// Time to ask which paths a homeserver has.
const PROBE_TIME: Duration = Duration::from_secs(10);
/// How long a base URL is good for, from when on a new one is looked for, and the pause after a failure.
const LIFETIME: Duration = Duration::from_hours(4);
const REFRESH: Duration = Duration::from_hours(3);
const REFRESH_PAUSE: Duration = Duration::from_mins(1);
/// How many homeservers are remembered.
const MAX_SERVERS: usize = 4096;
/// Calls at one homeserver at a time: one that hangs must not use up our sockets.
const CALLS_PER_SERVER: usize = 64;
/// The longest wait that a homeserver may ask for.
const LONGEST_HINT: Duration = Duration::from_hours(1);

/// What is asked of a delayed event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    Restart,
    Send,
}

impl Action {
    fn as_str(self) -> &'static str {
        match self {
            Self::Restart => "restart",
            Self::Send => "send",
        }
    }
}

/// All homeservers that jobs are about.
pub(crate) struct Homeservers {
    verifier: Arc<Verifier>,
    servers: Mutex<HashMap<String, Arc<Server>>>,
}

impl Homeservers {
    pub(crate) fn new(verifier: Arc<Verifier>) -> Self {
        Self { verifier, servers: Mutex::default() }
    }

    /// The base URL of `name`'s client-server API: what the operator has written, what is remembered, or what
    /// its `.well-known` says.
    pub(crate) async fn resolve(&self, name: &ServerName) -> Result<Url, LookupError> {
        let server = self.server(name);
        self.base(&server, name).await
    }

    /// Makes the homeserver restart or send the delayed event of a job.
    pub(crate) async fn act(&self, params: &JobParams, action: Action) -> Outcome {
        let server = self.server(&params.server);
        let attempt = async || {
            let Ok(_place) = server.places.acquire().await else { return Err(LookupError::Ours) };
            let base = self.base(&server, &params.server).await?;
            let stable = server.stable.load(Ordering::Relaxed);
            let answer = self.call(params, &base, stable, action).await?;
            if stable && answer.status == StatusCode::NOT_FOUND && is_unrecognized(&answer.body) {
                server.stable.store(false, Ordering::Relaxed);
                return self.call(params, &base, false, action).await;
            }
            Ok(answer)
        };
        let hasty = hasty(action, params.delay_timeout);
        let mut answer = tokio::time::timeout(hasty, attempt()).await;
        if answer.is_err() && hasty < CALL_TIME {
            // Slow or hung, who knows: this one has more time, and is made by another connection.
            answer = tokio::time::timeout(CALL_TIME - hasty, attempt()).await;
        }
        let answer = answer.unwrap_or(Err(LookupError::TimedOut));
        match answer {
            Ok(answer) => {
                let outcome = outcome(&answer, SystemTime::now());
                let (server, action, status) =
                    (params.server.as_str(), action.as_str(), answer.status.as_u16());
                if matches!(status, 401 | 403) {
                    tracing::warn!(
                        server,
                        action,
                        status,
                        "the homeserver refuses; if it wants an access token, set LIVEKIT_JWT_DELAYED_EVENT_TOKENS"
                    );
                } else {
                    tracing::debug!(server, action, status, ?outcome, "delayed-event call");
                }
                outcome
            }
            Err(error) => {
                let cause = crate::http::causes(&error);
                tracing::warn!(server = params.server.as_str(), action = action.as_str(), cause, "no answer");
                Outcome::Later(None)
            }
        }
    }

    async fn call(
        &self,
        params: &JobParams,
        base: &Url,
        stable: bool,
        action: Action,
    ) -> Result<ClientAnswer, LookupError> {
        let url = delayed_event(base, stable, &params.delay_id, action).ok_or(LookupError::Ours)?;
        match self.verifier.ask_client_api(&params.server, Method::POST, &url).await {
            // The server had closed a connection that we had kept. Both calls may be made twice.
            Err(LookupError::Closed(_)) => {
                self.verifier.ask_client_api(&params.server, Method::POST, &url).await
            }
            answer => answer,
        }
    }

    async fn base(&self, server: &Arc<Server>, name: &ServerName) -> Result<Url, LookupError> {
        let (outcome, found) = self.find(server, name).await;
        self.verifier.count_client_discovery(outcome);
        found
    }

    /// The base URL, and how it was found, for the metrics.
    async fn find(
        &self,
        server: &Arc<Server>,
        name: &ServerName,
    ) -> (&'static str, Result<Url, LookupError>) {
        if let Some(url) = self.verifier.written_client_api(name) {
            server.probe_once(&self.verifier, name, url);
            return ("written", Ok(url.clone()));
        }
        if let Some((outcome, url)) = server.remembered(&self.verifier, name) {
            return (outcome, Ok(url));
        }
        let asked = Instant::now();
        // One lookup at a time: the others wait for what it finds, or fails to find.
        let mut failed = server.lookup.lock().await;
        if let Some((outcome, url)) = server.remembered(&self.verifier, name) {
            return (outcome, Ok(url));
        }
        if failed.is_some_and(|at| at >= asked) {
            return ("failed", Err(LookupError::NoClientApi));
        }
        match self.verifier.discover_client_api(name).await {
            Ok(url) => {
                server.remember(url.clone());
                server.probe_once(&self.verifier, name, &url);
                ("fetched", Ok(url))
            }
            Err(error) => {
                *failed = Some(Instant::now());
                ("failed", Err(error))
            }
        }
    }

    fn server(&self, name: &ServerName) -> Arc<Server> {
        let key = name.as_str().to_ascii_lowercase();
        let mut servers = lock(&self.servers);
        if servers.len() >= MAX_SERVERS && !servers.contains_key(&key) {
            // Whoever is in use stays.
            servers.retain(|_, server| Arc::strong_count(server) > 1 || server.is_fresh());
            if servers.len() >= MAX_SERVERS {
                servers.retain(|_, server| Arc::strong_count(server) > 1);
            }
        }
        servers.entry(key).or_default().clone()
    }
}

/// How long a call is waited for before another one is made. If one restart of a short delay hung for as long as a call
/// may take, the event would fire.
fn hasty(action: Action, delay: Duration) -> Duration {
    match action {
        Action::Restart => (delay / 5).clamp(SHORTEST_TRY, CALL_TIME),
        Action::Send => CALL_TIME,
    }
}

/// One homeserver.
struct Server {
    base: Mutex<Option<Base>>,
    /// Held by whoever looks the base up; when that failed last.
    lookup: tokio::sync::Mutex<Option<Instant>>,
    places: Semaphore,
    probed: AtomicBool,
    /// Whether it has said that it has the stable paths.
    stable: AtomicBool,
}

struct Base {
    url: Url,
    found: Instant,
    /// When it may be looked up again.
    refresh: Instant,
}

impl Default for Server {
    fn default() -> Self {
        Self {
            base: Mutex::default(),
            lookup: tokio::sync::Mutex::default(),
            places: Semaphore::new(CALLS_PER_SERVER),
            probed: AtomicBool::new(false),
            stable: AtomicBool::new(false),
        }
    }
}

impl Server {
    fn is_fresh(&self) -> bool {
        lock(&self.base).as_ref().is_some_and(|base| base.found.elapsed() < LIFETIME)
    }

    fn remember(&self, url: Url) {
        let now = Instant::now();
        *lock(&self.base) = Some(Base { url, found: now, refresh: now + REFRESH });
    }

    /// The base URL as it was last found, however long ago; when it is old, a new one is looked for meanwhile.
    fn remembered(
        self: &Arc<Self>,
        verifier: &Arc<Verifier>,
        name: &ServerName,
    ) -> Option<(&'static str, Url)> {
        let mut base = lock(&self.base);
        let base = base.as_mut()?;
        let now = Instant::now();
        if base.refresh <= now {
            base.refresh = now + REFRESH_PAUSE;
            let (server, verifier, name) = (self.clone(), verifier.clone(), name.clone());
            tokio::spawn(async move {
                match verifier.discover_client_api(&name).await {
                    Ok(url) => {
                        server.probed.store(false, Ordering::Relaxed);
                        server.probe_once(&verifier, &name, &url);
                        server.remember(url);
                    }
                    Err(error) => {
                        let cause = crate::http::causes(&error);
                        tracing::warn!(
                            server = name.as_str(),
                            cause,
                            "discovery failed: using what was found before"
                        );
                    }
                }
            });
        }
        let outcome = if base.found.elapsed() < LIFETIME { "hit" } else { "stale" };
        Some((outcome, base.url.clone()))
    }

    /// Finds out in the background which paths it has. Nothing waits for that: the unstable ones always work.
    fn probe_once(self: &Arc<Self>, verifier: &Arc<Verifier>, name: &ServerName, base: &Url) {
        if self.probed.swap(true, Ordering::Relaxed) {
            return;
        }
        let Some(url) = below(base, &["_matrix", "client", "versions"]) else { return };
        let (server, verifier, name) = (self.clone(), verifier.clone(), name.clone());
        tokio::spawn(async move {
            let answer = verifier.ask_client_api(&name, Method::GET, &url);
            match tokio::time::timeout(PROBE_TIME, answer).await {
                Ok(Ok(answer)) => {
                    let stable = answer.status == StatusCode::OK && has_stable_paths(&answer.body);
                    server.stable.store(stable, Ordering::Relaxed);
                }
                // The next call asks again.
                Ok(Err(_)) | Err(_) => server.probed.store(false, Ordering::Relaxed),
            }
        });
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing between lock and unlock can leave the value half-changed.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The URL of `action` on a delayed event, whose id becomes exactly one segment.
fn delayed_event(base: &Url, stable: bool, id: &DelayId, action: Action) -> Option<Url> {
    let (id, action) = (id.as_str(), action.as_str());
    if stable {
        below(base, &["_matrix", "client", "v1", "delayed_events", id, action])
    } else {
        below(base, &["_matrix", "client", "unstable", "org.matrix.msc4140", "delayed_events", id, action])
    }
}

fn below(base: &Url, segments: &[&str]) -> Option<Url> {
    let mut url = base.clone();
    url.path_segments_mut().ok()?.pop_if_empty().extend(segments);
    Some(url)
}

/// Whether a `/versions` answer announces the stable paths (MSC4140 §Unstable prefix).
fn has_stable_paths(body: &[u8]) -> bool {
    #[derive(Deserialize)]
    struct Versions {
        #[serde(default)]
        unstable_features: HashMap<String, serde_json::Value>,
    }
    serde_json::from_slice::<Versions>(body)
        .is_ok_and(|v| v.unstable_features.get("org.matrix.msc4140.stable") == Some(&true.into()))
}

/// Whether a homeserver says that it does not know the path, as opposed to the event.
fn is_unrecognized(body: &[u8]) -> bool {
    errcode(body).is_some_and(|errcode| errcode == "M_UNRECOGNIZED")
}

fn errcode(body: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct MatrixError {
        errcode: String,
    }
    Some(serde_json::from_slice::<MatrixError>(body).ok()?.errcode)
}

/// What an answer means.
fn outcome(answer: &ClientAnswer, now: SystemTime) -> Outcome {
    match answer.status.as_u16() {
        200..=299 => Outcome::Done,
        404 => Outcome::Gone,
        409 => Outcome::Settled,
        400 | 401 | 403 => Outcome::Refused,
        429 => Outcome::Later(hint(answer, now)),
        _ => Outcome::Later(None),
    }
}

/// How long to wait after a 429: `Retry-After` in seconds or as a date, else `retry_after_ms`.
fn hint(answer: &ClientAnswer, now: SystemTime) -> Option<Duration> {
    #[derive(Deserialize)]
    struct Limited {
        retry_after_ms: u64,
    }
    let header = answer.retry_after.as_deref().map(str::trim).and_then(|text| match text.parse::<i64>() {
        Ok(seconds) => Some(Duration::from_secs(u64::try_from(seconds).unwrap_or(0))),
        Err(_) => Some(httpdate::parse_http_date(text).ok()?.duration_since(now).unwrap_or_default()),
    });
    let wait = header.or_else(|| {
        let Limited { retry_after_ms } = serde_json::from_slice(&answer.body).ok()?;
        (retry_after_ms > 0).then(|| Duration::from_secs(retry_after_ms.div_ceil(1000)))
    })?;
    Some(wait.min(LONGEST_HINT))
}

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod properties;

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use proptest::prelude::*;

    use super::*;
    use crate::{Resolve, ResolveError, Settings, SrvRecord, metrics::Metrics};

    fn answer(status: u16, retry_after: Option<&str>, body: &str) -> ClientAnswer {
        ClientAnswer {
            status: StatusCode::from_u16(status).unwrap(),
            retry_after: retry_after.map(str::to_owned),
            body: body.to_owned().into(),
        }
    }

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    #[test]
    fn answers_mean_what_the_table_says() {
        for (status, expected) in [
            (200, Outcome::Done),
            (201, Outcome::Done),
            (204, Outcome::Done),
            (404, Outcome::Gone),
            (409, Outcome::Settled),
            (400, Outcome::Refused),
            (401, Outcome::Refused),
            (403, Outcome::Refused),
            (302, Outcome::Later(None)),
            (429, Outcome::Later(None)),
            (500, Outcome::Later(None)),
            (503, Outcome::Later(None)),
        ] {
            assert_eq!(outcome(&answer(status, None, "{}"), at(0)), expected, "{status}");
        }
    }

    #[test]
    fn a_restart_that_hangs_leaves_time_for_another() {
        for delay in [2000, 4000, 8000, 10_000, 20_000, 3_600_000].map(Duration::from_millis) {
            let due = crate::delegation::machine::cadence(delay);
            assert!(due + hasty(Action::Restart, delay) < delay * 9 / 10, "{delay:?}");
        }
        assert_eq!(hasty(Action::Restart, Duration::from_millis(100)), SHORTEST_TRY);
        assert_eq!(hasty(Action::Send, Duration::from_secs(1)), CALL_TIME);
    }

    #[test]
    fn a_limit_says_when_to_come_back() {
        let now = at(784_111_777);
        let wait = |header, body| match outcome(&answer(429, header, body), now) {
            Outcome::Later(wait) => wait.map(|w| w.as_secs()),
            other => panic!("{other:?}"),
        };
        assert_eq!(wait(Some("7"), r#"{"retry_after_ms":1}"#), Some(7));
        assert_eq!(wait(Some("-7"), ""), Some(0));
        assert_eq!(wait(Some("Sun, 06 Nov 1994 08:49:47 GMT"), ""), Some(10));
        assert_eq!(wait(Some("Sunday, 06-Nov-94 08:49:47 GMT"), ""), Some(10));
        assert_eq!(wait(Some("Sun Nov  6 08:49:47 1994"), ""), Some(10));
        assert_eq!(wait(Some("Sun, 06 Nov 1994 08:49:27 GMT"), ""), Some(0));
        assert_eq!(wait(Some("Sun, 00 Nov 1994 08:49:37 GMT"), ""), None);
        assert_eq!(wait(None, r#"{"retry_after_ms":1500}"#), Some(2));
        assert_eq!(wait(None, r#"{"retry_after_ms":0}"#), None);
        assert_eq!(wait(Some("soon"), "not JSON"), None);
        assert_eq!(wait(Some("99999999999999"), ""), Some(3600), "nobody makes us wait for ever");
    }

    #[test]
    fn stable_paths_are_used_only_when_announced() {
        assert!(has_stable_paths(
            br#"{"versions":[],"unstable_features":{"org.matrix.msc4140.stable":true}}"#
        ));
        for without in ["", "{}", "[]", r#"{"unstable_features":{"org.matrix.msc4140":true}}"#] {
            assert!(!has_stable_paths(without.as_bytes()), "{without}");
        }
        let base = Url::parse("https://hs.org").unwrap();
        let url = delayed_event(&base, true, &DelayId::new("x".into()).unwrap(), Action::Send).unwrap();
        assert_eq!(url.path(), "/_matrix/client/v1/delayed_events/x/send");
    }

    #[test]
    fn a_delay_id_cannot_leave_its_place() {
        let base = Url::parse("https://hs.org/sub/").unwrap();
        for (id, segment) in [
            ("syd_x", "syd_x"),
            ("../../admin", "..%2F..%2Fadmin"),
            ("%2e%2e", "%252e%252e"),
            ("a?b#c", "a%3Fb%23c"),
            ("a\\b", "a%5Cb"),
        ] {
            let id = DelayId::new(id.into()).unwrap();
            let url = delayed_event(&base, false, &id, Action::Restart).unwrap();
            assert_eq!(
                url.as_str(),
                format!(
                    "https://hs.org/sub/_matrix/client/unstable/org.matrix.msc4140/delayed_events/{segment}/restart"
                )
            );
        }
    }

    /// A name server that is down.
    struct Down;

    #[async_trait::async_trait]
    impl Resolve for Down {
        async fn addresses(&self, _: &str, _: u16) -> Result<Vec<SocketAddr>, ResolveError> {
            Err(ResolveError::NotFound)
        }

        async fn services(&self, _: &str) -> Result<Vec<SrvRecord>, ResolveError> {
            Err(ResolveError::NotFound)
        }
    }

    fn verifier(settings: &Settings) -> Arc<Verifier> {
        Arc::new(Verifier::new(settings, Arc::new(Down), Metrics::new().unwrap()).unwrap())
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_found_is_used_on_when_discovery_fails() {
        let settings = Settings::new("ws://localhost", "key", "secret");
        let homeservers = Homeservers::new(verifier(&settings));
        let name: ServerName = "hs.org".parse().unwrap();
        assert!(homeservers.resolve(&name).await.is_err());
        let url = Url::parse("https://m.hs.org").unwrap();
        homeservers.server(&name).remember(url.clone());
        for _ in 0..3 {
            tokio::time::advance(LIFETIME * 2).await;
            assert_eq!(homeservers.resolve(&name).await.unwrap(), url);
        }
    }

    #[tokio::test]
    async fn what_the_operator_has_written_goes_before_discovery() {
        let mut settings = Settings::new("ws://localhost", "key", "secret");
        let url = Url::parse("http://127.0.0.1:8008").unwrap();
        settings.cs_api_url_overrides = [("HS.org".to_owned(), url.clone())].into();
        let homeservers = Homeservers::new(verifier(&settings));
        assert_eq!(homeservers.resolve(&"hs.org".parse().unwrap()).await.unwrap(), url);
    }

    proptest! {
        #[test]
        fn any_delay_id_is_one_segment(id in ".{1,80}") {
            let Ok(id) = DelayId::new(id) else { return Ok(()) };
            let base = Url::parse("https://hs.org").unwrap();
            let url = delayed_event(&base, false, &id, Action::Send).unwrap();
            prop_assert_eq!(url.path_segments().unwrap().count(), 7, "{}", url);
            prop_assert!(url.path().ends_with("/send") && url.query().is_none() && url.fragment().is_none());
            prop_assert!(url.as_str().parse::<hyper::Uri>().is_ok());
        }

        #[test]
        fn no_answer_makes_it_panic(
            status in 100u16..600, header in prop::option::of(".{0,40}"), body in ".{0,80}", now in 0..4_000_000_000u64,
        ) {
            let _ = outcome(&answer(status, header.as_deref(), &body), at(now));
        }
    }
}
