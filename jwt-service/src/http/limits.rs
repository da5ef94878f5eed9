//! The limits on requests and lookups, applied. Who counts as one client is decided in [`crate::limits`].
#![allow(clippy::disallowed_methods, reason = "this is the shell: it owns the clock and the tasks")]

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use axum::{
    extract::{ConnectInfo, Request, State},
    http::Method,
    middleware::Next,
    response::{IntoResponse, Response},
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::error::Refusal;
use crate::{
    Inner,
    config::{Limits, TrustedProxies},
    limits::{Gate, Limited, LookupId},
    metrics::Metrics,
    openid::ServerName,
};

/// The other end of a Unix socket: the operator's own reverse proxy.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LocalPeer;

/// What all requests of a service are counted against.
#[derive(Debug)]
pub(crate) struct Limiter {
    gate: Arc<Mutex<Gate>>,
    queues: Arc<Queues>,
    trusted: TrustedProxies,
    metrics: Metrics,
}

/// Who waits for which homeserver; one that nobody waits for is not there.
type Queues = Mutex<HashMap<String, Arc<Semaphore>>>;

/// Lookups that talk to one homeserver at a time; others wait their turn. Two thousand TLS handshakes at once
/// would be slower for everybody than these many, whose connections the rest then uses.
pub(crate) const TALKING: usize = 128;

impl Limiter {
    pub(crate) fn new(limits: &Limits, metrics: Metrics) -> Self {
        let gate = Arc::new(Mutex::new(Gate::new(limits)));
        Self { gate, queues: Arc::default(), trusted: limits.trusted_proxies.clone(), metrics }
    }

    /// Leave for a lookup at `server_name`, held until it is dropped; [`Lookup::turn`] must be awaited before
    /// it begins. A name that is none is not looked up.
    pub(crate) fn lookup(&self, server_name: &str) -> Result<Option<Lookup>, Refusal> {
        if server_name.parse::<ServerName>().is_err() {
            return Ok(None);
        }
        let id = lock(&self.gate).lookup(Instant::now(), server_name);
        let id = id.map_err(|limited| {
            tracing::warn!(server_name, limit = limited.by.as_str(), "request refused");
            self.refusal(limited)
        })?;
        let server = server_name.to_ascii_lowercase();
        let queue = lock(&self.queues)
            .entry(server.clone())
            .or_insert_with(|| Arc::new(Semaphore::new(TALKING)))
            .clone();
        Ok(Some(Lookup {
            gate: self.gate.clone(),
            id,
            queues: self.queues.clone(),
            server,
            queue: Some(queue),
            turn: None,
        }))
    }

    /// Whether what the sender of `request` says about others is believed.
    pub(super) fn trusts_sender_of(&self, request: &Request) -> bool {
        match peer(request) {
            Some(address) => self.trusted.includes(address),
            None => request.extensions().get::<LocalPeer>().is_some(),
        }
    }

    fn request(&self, request: &Request) -> Result<(), Refusal> {
        let forwarded = request.headers().get_all("x-forwarded-for").iter().filter_map(|v| v.to_str().ok());
        let client = match peer(request) {
            None if request.extensions().get::<LocalPeer>().is_none() => None,
            peer => self.trusted.client(peer, forwarded),
        };
        // Without an address there is nobody to count against.
        let Some(client) = client else { return Ok(()) };
        lock(&self.gate).request(Instant::now(), client).map_err(|limited| {
            tracing::debug!(%client, limit = limited.by.as_str(), "request refused");
            self.refusal(limited)
        })
    }

    fn refusal(&self, limited: Limited) -> Refusal {
        self.metrics.limited(limited.by.as_str());
        Refusal::Limited(limited)
    }
}

/// A lookup, from when it may begin until it has ended.
#[derive(Debug)]
pub(crate) struct Lookup {
    gate: Arc<Mutex<Gate>>,
    id: LookupId,
    queues: Arc<Queues>,
    server: String,
    /// Always there until the end.
    queue: Option<Arc<Semaphore>>,
    turn: Option<OwnedSemaphorePermit>,
}

impl Lookup {
    /// Waits until few enough others talk to this homeserver.
    pub(crate) async fn turn(&mut self) {
        if let Some(queue) = self.queue.clone() {
            // Never closed, so never an error.
            self.turn = queue.acquire_owned().await.ok();
        }
    }
}

impl Drop for Lookup {
    fn drop(&mut self) {
        lock(&self.gate).ended(&self.id);
        self.turn = None;
        let mut queues = lock(&self.queues);
        // Under the lock, so that of several that end at once the last sees that it is the last.
        self.queue = None;
        if queues.get(&self.server).is_some_and(|queue| Arc::strong_count(queue) == 1) {
            queues.remove(&self.server);
        }
    }
}

/// Refuses what is one too many from its address, before a byte of its body is read.
pub(super) async fn per_address(State(service): State<Arc<Inner>>, request: Request, next: Next) -> Response {
    // A preflight costs nothing, and a page whose preflight fails cannot see why.
    if request.method() == Method::POST
        && let Err(refusal) = service.limiter.request(&request)
    {
        return refusal.into_response();
    }
    next.run(request).await
}

fn peer(request: &Request) -> Option<IpAddr> {
    request.extensions().get::<ConnectInfo<SocketAddr>>().map(|ConnectInfo(address)| address.ip())
}

fn lock<T>(counts: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing between lock and unlock can leave the counts half-changed.
    counts.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn lookups_at_one_server_take_turns_and_leave_nothing_behind() {
        let limiter = Limiter::new(&Limits::default(), Metrics::new().unwrap());
        let mut talking = Vec::new();
        for _ in 0..TALKING {
            let mut lookup = limiter.lookup("hs.org").unwrap().unwrap();
            lookup.turn().await;
            talking.push(lookup);
        }
        let mut next = limiter.lookup("HS.org").unwrap().unwrap();
        let mut other = limiter.lookup("other.org").unwrap().unwrap();
        other.turn().await;
        {
            let mut turn = std::pin::pin!(next.turn());
            assert!(
                std::future::poll_fn(|cx| std::task::Poll::Ready(turn.as_mut().poll(cx).is_pending())).await
            );
            talking.pop();
            turn.await;
        }
        drop((talking, next, other));
        assert!(lock(&limiter.queues).is_empty());
        assert!(limiter.lookup("no name").unwrap().is_none());
    }
}
