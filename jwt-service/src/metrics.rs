//! What a service counts, for Prometheus. One registry per service, so that two in one process do not mix.
//!
//! Every label has a bounded set of values: nothing that a stranger chooses becomes one.

#![allow(clippy::disallowed_methods, reason = "this is the shell: it owns the clock and the tasks")]

use std::{
    future::Future,
    sync::Arc,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use prometheus::{
    Encoder as _, Histogram, HistogramOpts, HistogramVec, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry, TextEncoder, core::Collector,
};

use crate::{
    delegation::{JobKey, Lateness, Stats, StoredJob},
    openid::LookupError,
    sfu::{Sfu, SfuError, SfuParticipant, SfuRoom},
    store::{Heard, Store, StoreError},
};

/// Seconds: from a cached connection next door to the end of a lookup's budget.
const DURATIONS: [f64; 13] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 30.0];
/// The counters. Cloning gives another handle to the same ones.
#[derive(Clone, Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    requests: IntCounterVec,
    request_seconds: HistogramVec,
    in_flight: IntGauge,
    limited: IntCounterVec,
    lookups: Histogram,
    lookup_failures: IntCounterVec,
    discovery: IntCounterVec,
    client_discovery: IntCounterVec,
    sfu_calls: IntCounterVec,
    sfu_seconds: HistogramVec,
    store_errors: IntCounterVec,
    up: IntGaugeVec,
}

impl Metrics {
    /// All at zero.
    ///
    /// # Errors
    /// Only if two of our names were the same.
    pub(crate) fn new() -> Result<Self, prometheus::Error> {
        let made = Maker(Registry::new());
        let build = made.gauges("build_info", "Which version runs: always 1", &["version"])?;
        build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        Ok(Self {
            requests: made.counters(
                "requests_total",
                "Requests answered, by endpoint and outcome (ok, or why refused)",
                &["endpoint", "outcome"],
            )?,
            request_seconds: made.histograms(
                "request_seconds",
                "Time to answer a request",
                &["endpoint"],
                &DURATIONS,
            )?,
            in_flight: made.gauge("requests_in_flight", "Requests being answered")?,
            limited: made.counters("limited_total", "Requests answered 429, by the limit met", &["limit"])?,
            lookups: made.add(Histogram::with_opts(
                HistogramOpts::new("jwt_service_lookup_seconds", "Time of an OpenID lookup at a homeserver")
                    .buckets(DURATIONS.to_vec()),
            )?)?,
            lookup_failures: made.counters(
                "lookup_failures_total",
                "OpenID lookups that confirmed nobody, by class",
                &["class"],
            )?,
            discovery: made.counters(
                "discovery_total",
                "Uses of the cache of federation discovery, by outcome",
                &["outcome"],
            )?,
            client_discovery: made.counters(
                "client_discovery_total",
                "Uses of the cache of homeservers' client-server APIs, by outcome",
                &["outcome"],
            )?,
            sfu_calls: made.counters(
                "sfu_calls_total",
                "Calls of the SFU's API, by call and outcome",
                &["call", "outcome"],
            )?,
            sfu_seconds: made.histograms(
                "sfu_call_seconds",
                "Time of a call of the SFU's API",
                &["call"],
                &DURATIONS,
            )?,
            store_errors: made.counters(
                "store_errors_total",
                "Failures of the store of jobs, by operation",
                &["operation"],
            )?,
            up: made.gauges(
                "up",
                "Whether a part worked when it was last checked: 1 or 0 (restore, store, sfu)",
                &["part"],
            )?,
            registry: made.0,
        })
    }

    /// Everything in Prometheus' text format, with the counts that delegated leave keeps itself.
    pub(crate) fn text(&self, delegation: Option<&Stats>) -> String {
        let mut text = Vec::new();
        if let Err(error) = TextEncoder::new().encode(&self.registry.gather(), &mut text) {
            tracing::error!(%error, "metrics could not be written");
        }
        let mut text = String::from_utf8_lossy(&text).into_owned();
        if let Some(stats) = delegation {
            text.push_str(&delegated_leave(stats));
        }
        text
    }

    /// A request begins; it is in flight until the guard is dropped.
    pub(crate) fn request_begins(&self) -> InFlight {
        self.in_flight.inc();
        InFlight(self.in_flight.clone())
    }

    pub(crate) fn request(&self, endpoint: &'static str, outcome: &str, took: Duration) {
        self.requests.with_label_values(&[endpoint, outcome]).inc();
        self.request_seconds.with_label_values(&[endpoint]).observe(took.as_secs_f64());
    }

    pub(crate) fn limited(&self, limit: &'static str) {
        self.limited.with_label_values(&[limit]).inc();
    }

    pub(crate) fn lookup<T>(&self, result: &Result<T, LookupError>, took: Duration) {
        self.lookups.observe(took.as_secs_f64());
        if let Err(error) = result {
            self.lookup_failures.with_label_values(&[class(error)]).inc();
        }
    }

    /// A use of the cache of federation discovery: `hit`, `fetched` or `failed`.
    pub(crate) fn discovery(&self, outcome: &'static str) {
        self.discovery.with_label_values(&[outcome]).inc();
    }

    /// A use of the cache of client-server APIs: `written` by the operator, `hit`, `stale` (good, but old, since
    /// it could not be looked up again), `fetched` or `failed`.
    pub(crate) fn client_discovery(&self, outcome: &'static str) {
        self.client_discovery.with_label_values(&[outcome]).inc();
    }

    /// A call of the SFU: `create_room`, `get_participant` or `list_participants`.
    pub(crate) fn sfu_call(&self, call: &'static str, succeeded: bool, took: Duration) {
        self.sfu_calls.with_label_values(&[call, if succeeded { "ok" } else { "failed" }]).inc();
        self.sfu_seconds.with_label_values(&[call]).observe(took.as_secs_f64());
    }

    /// The store failed to `put`, `remove`, `load`, `lease`, `release`, `tell` or `listen`.
    pub(crate) fn store_error(&self, operation: &'static str) {
        self.store_errors.with_label_values(&[operation]).inc();
    }

    pub(crate) fn up(&self, part: &'static str, works: bool) {
        self.up.with_label_values(&[part]).set(works.into());
    }
}

/// Delegated leave's own counts, in the same format.
fn delegated_leave(stats: &Stats) -> String {
    let mut text = String::new();
    let mut family = |name: &str, kind: &str, help: &str, label: &str, values: &[(&str, u64)]| {
        text.push_str(&format!("# HELP jwt_service_{name} {help}\n# TYPE jwt_service_{name} {kind}\n"));
        for (value, number) in values {
            text.push_str(&format!("jwt_service_{name}{{{label}=\"{value}\"}} {number}\n"));
        }
    };
    let wide = |number: usize| u64::try_from(number).unwrap_or(u64::MAX);
    family(
        "jobs",
        "gauge",
        "Delegated leaves alive, by state",
        "state",
        &[
            ("waiting", wide(stats.waiting)),
            ("connected", wide(stats.connected)),
            ("leaving", wide(stats.leaving)),
            ("elsewhere", wide(stats.elsewhere)),
        ],
    );
    family(
        "jobs_given_up_total",
        "counter",
        "Delegated leaves given up: the homeserver had lost the event, nobody ever came, or it could not be restarted \
         in time",
        "why",
        &[("lost", stats.lost), ("aborted", stats.aborted), ("not_restarted", stats.not_restarted)],
    );
    family(
        "delayed_event_calls_total",
        "counter",
        "Calls for delayed events at homeservers, by action and outcome",
        "call",
        &[
            ("restart_ok", stats.restarts),
            ("restart_failed", stats.restart_failures),
            ("send_ok", stats.sends),
            ("send_failed", stats.send_failures),
        ],
    );
    family(
        "store_unwritten",
        "gauge",
        "Writes that the store has not taken yet",
        "kind",
        &[("job", wide(stats.unwritten))],
    );
    for (name, help, lateness) in [
        (
            "restart_lateness_seconds",
            "From when the restart of a delayed event was due to when it succeeded",
            &stats.restart_lateness,
        ),
        (
            "send_lateness_seconds",
            "From when a participant was known to be gone to when its delayed event was sent",
            &stats.send_lateness,
        ),
    ] {
        text.push_str(&histogram(name, help, lateness));
    }
    text
}

fn histogram(name: &str, help: &str, lateness: &Lateness) -> String {
    let mut text = format!("# HELP jwt_service_{name} {help}\n# TYPE jwt_service_{name} histogram\n");
    let mut so_far = 0;
    let bounds = Lateness::BOUNDS.iter().map(f64::to_string).chain(["+Inf".to_owned()]);
    for (bound, count) in bounds.zip(lateness.counts) {
        so_far += count;
        text.push_str(&format!("jwt_service_{name}_bucket{{le=\"{bound}\"}} {so_far}\n"));
    }
    text.push_str(&format!("jwt_service_{name}_sum {}\n", lateness.sum.as_secs_f64()));
    text.push_str(&format!("jwt_service_{name}_count {so_far}\n"));
    text
}

/// An SFU whose calls are counted.
pub(crate) struct CountedSfu {
    pub(crate) sfu: Arc<dyn Sfu>,
    pub(crate) metrics: Metrics,
}

impl CountedSfu {
    async fn counted<T>(
        &self,
        call: &'static str,
        work: impl Future<Output = Result<T, SfuError>>,
    ) -> Result<T, SfuError> {
        let began = Instant::now();
        let result = work.await;
        self.metrics.sfu_call(call, result.is_ok(), began.elapsed());
        result
    }
}

#[async_trait]
impl Sfu for CountedSfu {
    async fn create_room(&self, alias: &str) -> Result<SfuRoom, SfuError> {
        self.counted("create_room", self.sfu.create_room(alias)).await
    }

    async fn participant(&self, room: &str, identity: &str) -> Result<Option<SfuParticipant>, SfuError> {
        self.counted("get_participant", self.sfu.participant(room, identity)).await
    }

    async fn participants(
        &self,
        room: &str,
        identities: &[&str],
    ) -> Result<Vec<Option<SfuParticipant>>, SfuError> {
        let call = if identities.len() > 1 { "list_participants" } else { "get_participant" };
        self.counted(call, self.sfu.participants(room, identities)).await
    }

    async fn check(&self) -> Result<(), SfuError> {
        self.sfu.check().await
    }
}

/// A store whose failures are counted.
#[derive(Debug)]
pub(crate) struct CountedStore {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) metrics: Metrics,
}

impl CountedStore {
    fn counted<T>(&self, operation: &'static str, result: Result<T, StoreError>) -> Result<T, StoreError> {
        if result.is_err() {
            self.metrics.store_error(operation);
        }
        result
    }
}

#[async_trait]
impl Store for CountedStore {
    async fn put(&self, job: &StoredJob) -> Result<(), StoreError> {
        self.counted("put", self.store.put(job).await)
    }

    async fn remove(&self, key: &JobKey) -> Result<(), StoreError> {
        self.counted("remove", self.store.remove(key).await)
    }

    async fn load(&self) -> Result<Vec<StoredJob>, StoreError> {
        self.counted("load", self.store.load().await)
    }

    async fn lease(&self, key: &JobKey, replica: &str, ttl: Duration) -> Result<bool, StoreError> {
        self.counted("lease", self.store.lease(key, replica, ttl).await)
    }

    async fn release(&self, key: &JobKey, replica: &str) -> Result<(), StoreError> {
        self.counted("release", self.store.release(key, replica).await)
    }

    async fn tell(&self, message: &[u8]) -> Result<(), StoreError> {
        self.counted("tell", self.store.tell(message).await)
    }

    async fn listen(&self, heard: &Heard) -> Result<(), StoreError> {
        self.counted("listen", self.store.listen(heard).await)
    }

    async fn check(&self) -> Result<(), StoreError> {
        self.store.check().await
    }

    fn kind(&self) -> &'static str {
        self.store.kind()
    }
}

/// One request in flight.
#[derive(Debug)]
pub(crate) struct InFlight(IntGauge);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// Makes metrics and registers them.
struct Maker(Registry);

impl Maker {
    fn add<C: Collector + Clone + 'static>(&self, collector: C) -> Result<C, prometheus::Error> {
        self.0.register(Box::new(collector.clone()))?;
        Ok(collector)
    }

    fn counters(&self, name: &str, help: &str, labels: &[&str]) -> Result<IntCounterVec, prometheus::Error> {
        self.add(IntCounterVec::new(Opts::new(format!("jwt_service_{name}"), help), labels)?)
    }

    fn gauge(&self, name: &str, help: &str) -> Result<IntGauge, prometheus::Error> {
        self.add(IntGauge::new(format!("jwt_service_{name}"), help)?)
    }

    fn gauges(&self, name: &str, help: &str, labels: &[&str]) -> Result<IntGaugeVec, prometheus::Error> {
        self.add(IntGaugeVec::new(Opts::new(format!("jwt_service_{name}"), help), labels)?)
    }

    fn histograms(
        &self,
        name: &str,
        help: &str,
        labels: &[&str],
        buckets: &[f64],
    ) -> Result<HistogramVec, prometheus::Error> {
        let options = HistogramOpts::new(format!("jwt_service_{name}"), help).buckets(buckets.to_vec());
        self.add(HistogramVec::new(options, labels)?)
    }
}

/// Whose fault a failed lookup is, roughly.
fn class(error: &LookupError) -> &'static str {
    match error {
        LookupError::InvalidServerName(_) => "invalid_server_name",
        LookupError::BadDelegation => "bad_delegation",
        LookupError::NotPermitted => "not_permitted",
        LookupError::Connect(_) => "connect",
        LookupError::TimedOut => "timed_out",
        LookupError::Status(_) => "token_unknown",
        LookupError::Userinfo(_) => "bad_answer",
        LookupError::Ours => "ours",
        LookupError::Closed(_) | LookupError::Http(_) => "broken_off",
        LookupError::NoClientApi | LookupError::WellKnown(_) => "no_client_api",
        LookupError::TooManyRedirects => "too_many_redirects",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_happened_is_told_in_prometheus_text() {
        let metrics = Metrics::new().unwrap();
        let in_flight = metrics.request_begins();
        assert!(metrics.text(None).contains("\njwt_service_requests_in_flight 1\n"));
        drop(in_flight);
        metrics.request("get_token", "ok", Duration::from_millis(3));
        metrics.limited("address");
        metrics.lookup(&Err::<(), _>(LookupError::TimedOut), Duration::from_secs(30));
        metrics.discovery("hit");
        metrics.client_discovery("stale");
        metrics.sfu_call("create_room", false, Duration::from_secs(1));
        metrics.store_error("put");
        metrics.up("sfu", true);
        let mut stats = Stats::default();
        (stats.connected, stats.restarts) = (7, 9);
        (stats.send_lateness.counts[0], stats.send_lateness.counts[11]) = (2, 1);
        stats.send_lateness.sum = Duration::from_millis(61_500);
        let text = metrics.text(Some(&stats));
        for line in [
            "jwt_service_requests_in_flight 0",
            "jwt_service_requests_total{endpoint=\"get_token\",outcome=\"ok\"} 1",
            "jwt_service_request_seconds_bucket{endpoint=\"get_token\",le=\"0.005\"} 1",
            "jwt_service_limited_total{limit=\"address\"} 1",
            "jwt_service_lookup_failures_total{class=\"timed_out\"} 1",
            "jwt_service_lookup_seconds_count 1",
            "jwt_service_discovery_total{outcome=\"hit\"} 1",
            "jwt_service_client_discovery_total{outcome=\"stale\"} 1",
            "jwt_service_send_lateness_seconds_bucket{le=\"0.01\"} 2",
            "jwt_service_send_lateness_seconds_bucket{le=\"60\"} 2",
            "jwt_service_send_lateness_seconds_bucket{le=\"+Inf\"} 3",
            "jwt_service_send_lateness_seconds_sum 61.5",
            "jwt_service_send_lateness_seconds_count 3",
            "jwt_service_restart_lateness_seconds_count 0",
            "jwt_service_sfu_calls_total{call=\"create_room\",outcome=\"failed\"} 1",
            "jwt_service_jobs{state=\"connected\"} 7",
            "jwt_service_delayed_event_calls_total{call=\"restart_ok\"} 9",
            "jwt_service_store_errors_total{operation=\"put\"} 1",
            "jwt_service_up{part=\"sfu\"} 1",
        ] {
            assert!(text.lines().any(|l| l == line), "{line}\n{text}");
        }
    }

    #[test]
    fn two_services_count_apart() {
        let (one, other) = (Metrics::new().unwrap(), Metrics::new().unwrap());
        one.limited("address");
        assert!(!other.text(None).contains("limited_total{"));
    }
}
