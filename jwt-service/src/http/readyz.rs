//! `/readyz`: whether requests can be served well now. It asks the store and the SFU, which `/healthz` does
//! not.

use std::{
    error::Error,
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use axum::{
    extract::State,
    http::{StatusCode, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
};
use tokio::{sync::Mutex, time::Instant};

use crate::{
    Inner,
    http::causes,
    metrics::Metrics,
    sfu::Sfu,
    store::{Store, StoreError},
};

/// How long one check of a part may take.
const CHECK_TIME: Duration = Duration::from_secs(3);
/// How long what was found is good for: anybody may ask, and must not make us ask the SFU as often.
const LIFETIME: Duration = Duration::from_secs(1);

/// The parts that must work.
pub(crate) struct Readiness {
    sfu: Arc<dyn Sfu>,
    store: Option<Arc<dyn Store>>,
    metrics: Metrics,
    restored: AtomicBool,
    stopping: AtomicBool,
    found: Mutex<Option<(Instant, Found)>>,
}

/// What the last check found.
#[derive(Clone, Copy, Debug)]
struct Found {
    sfu: bool,
    store: bool,
}

impl Readiness {
    /// Of a service with this SFU and store. Without a store there is nothing to restore.
    pub(crate) fn new(sfu: Arc<dyn Sfu>, store: Option<Arc<dyn Store>>, metrics: Metrics) -> Self {
        let restored = AtomicBool::new(store.is_none());
        Self { sfu, store, metrics, restored, stopping: AtomicBool::new(false), found: Mutex::new(None) }
    }

    pub(crate) fn restored(&self) {
        self.restored.store(true, Ordering::Relaxed);
    }

    pub(crate) fn stopping(&self) {
        self.stopping.store(true, Ordering::Relaxed);
    }

    /// One check at a time; those who ask meanwhile get the same answer. `failing` is how many writes the store has
    /// refused and not taken since.
    #[allow(clippy::disallowed_methods, reason = "this is the shell: it owns the clock and the tasks")]
    async fn check(&self, failing: usize) -> Found {
        let mut found = self.found.lock().await;
        if let Some((at, found)) = *found
            && at.elapsed() < LIFETIME
        {
            return found;
        }
        let before = found.map(|(_, found)| found);
        let sfu = works("sfu", before.is_none_or(|found| found.sfu), self.sfu.check());
        let store = async {
            match &self.store {
                Some(store) => {
                    let check = async {
                        store.check().await?;
                        // It may answer and yet take no writes: full, read-only, or another thing by that name.
                        (failing == 0).then_some(()).ok_or_else(|| StoreError {
                            kind: store.kind(),
                            doing: "take writes",
                            source: format!("{failing} of them have failed and are tried again").into(),
                        })
                    };
                    works("store", before.is_none_or(|found| found.store), check).await
                }
                None => true,
            }
        };
        let (sfu, store) = tokio::join!(sfu, store);
        let new = Found { sfu, store };
        self.metrics.up("sfu", sfu);
        self.metrics.up("store", store);
        self.metrics.up("restore", self.restored.load(Ordering::Relaxed));
        *found = Some((Instant::now(), new));
        new
    }
}

/// Whether `part` passes its check in time. A log line says when that changes, and why.
async fn works<E: Error + 'static>(
    part: &str,
    worked: bool,
    check: impl Future<Output = Result<(), E>>,
) -> bool {
    let cause = match tokio::time::timeout(CHECK_TIME, check).await {
        Ok(Ok(())) => {
            if !worked {
                tracing::info!(part, "works again");
            }
            return true;
        }
        Ok(Err(error)) => causes(&error),
        Err(_) => format!("no answer within {} s", CHECK_TIME.as_secs()),
    };
    if worked {
        tracing::warn!(part, cause, "does not work");
    } else {
        tracing::debug!(part, cause, "still does not work");
    }
    false
}

impl fmt::Debug for Readiness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Readiness").field("restored", &self.restored).finish_non_exhaustive()
    }
}

pub(super) async fn readyz(State(service): State<Arc<Inner>>) -> Response {
    let readiness = &service.readiness;
    let failing = service.delegation.as_ref().map_or(0, |delegation| delegation.stats().failing);
    let Found { sfu, store } = readiness.check(failing).await;
    let restored = readiness.restored.load(Ordering::Relaxed);
    let stopping = readiness.stopping.load(Ordering::Relaxed);
    let ready = sfu && store && restored && !stopping;
    let word = |works| if works { "ok" } else { "down" };
    let body = serde_json::json!({
        "ready": ready,
        "sfu": word(sfu),
        "store": readiness.store.as_ref().map_or("none", |_| word(store)),
        "restore": if restored { "ok" } else { "running" },
        "stopping": stopping,
    });
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, [(CONTENT_TYPE, "application/json")], format!("{body}\n")).into_response()
}
