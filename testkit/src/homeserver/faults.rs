//! How the homeserver is told to misbehave.

use std::{
    collections::VecDeque,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

/// The faults a [`DevHomeserver`](super::DevHomeserver) commits. All methods may be called at any time.
///
/// An *endpoint* names requests by an optional method and the beginning of their path, segment by segment;
/// `*` stands for one whole segment:
///
/// * `"/_matrix/client/v3/sync"`: any method,
/// * `"PUT /_matrix/client/v3/rooms/*/state/org.matrix.msc3401.call.member"`: any room, any state key,
/// * `"POST /_matrix/client/unstable/org.matrix.msc4140/delayed_events/*/restart"`.
///
/// A segment is compared with its percent-decoded text. Browser preflights (`OPTIONS`) are never disturbed.
/// When several counted faults fit a request, the one that was asked for first is committed.
#[derive(Debug, Default)]
pub struct Faults(Mutex<Plan>);

#[derive(Debug, Default)]
struct Plan {
    latency: Vec<(Endpoint, Duration)>,
    counted: VecDeque<Counted>,
    dropped: Vec<DroppedToDevice>,
}

#[derive(Debug)]
struct Counted {
    endpoint: Endpoint,
    left: usize,
    kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Processed; then the connection closes without an answer.
    LoseReply,
    /// Not processed: 429 `M_LIMIT_EXCEEDED`.
    RateLimit(Duration),
    /// Not processed: this status with `M_UNKNOWN`.
    Fail(u16),
}

#[derive(Debug)]
struct DroppedToDevice {
    kind: String,
    recipient: Option<String>,
    /// None: always.
    left: Option<usize>,
}

/// What to do with one request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Verdict {
    pub(super) latency: Duration,
    pub(super) fault: Option<Kind>,
}

impl Faults {
    /// Every request to `endpoint` waits this long before it is looked at, until [`clear`](Self::clear).
    /// Of several that fit, the longest counts; zero takes an earlier one away.
    pub fn latency(&self, endpoint: &str, latency: Duration) {
        let endpoint = Endpoint::new(endpoint);
        let mut plan = self.plan();
        plan.latency.retain(|(known, _)| *known != endpoint);
        if !latency.is_zero() {
            plan.latency.push((endpoint, latency));
        }
    }

    /// The next `count` requests to `endpoint` are processed, but their connection closes without an answer.
    pub fn lose_replies(&self, endpoint: &str, count: usize) {
        self.count(endpoint, count, Kind::LoseReply);
    }

    /// The next `count` requests to `endpoint` are refused with 429 `M_LIMIT_EXCEEDED`, `retry_after_ms` and
    /// `Retry-After` (whole seconds, rounded up).
    pub fn rate_limit(&self, endpoint: &str, count: usize, retry_after: Duration) {
        self.count(endpoint, count, Kind::RateLimit(retry_after));
    }

    /// The next `count` requests to `endpoint` fail with this HTTP status (500 to 599; others become 500).
    pub fn fail(&self, endpoint: &str, count: usize, status: u16) {
        self.count(endpoint, count, Kind::Fail(if (500..600).contains(&status) { status } else { 500 }));
    }

    /// The next `count` to-device messages of this type vanish; their sender is told that all went well.
    ///
    /// The type is that on the wire: an encrypted message is `m.room.encrypted`. Each entry of the request
    /// (a device, or `*`) counts as one message.
    pub fn drop_to_device(&self, event_type: &str, count: usize) {
        self.drop(event_type, None, Some(count));
    }

    /// As [`drop_to_device`](Self::drop_to_device), for messages to one user.
    pub fn drop_to_device_for(&self, event_type: &str, user_id: &str, count: usize) {
        self.drop(event_type, Some(user_id), Some(count));
    }

    /// All to-device messages of this type vanish until [`clear`](Self::clear).
    pub fn drop_every_to_device(&self, event_type: &str) {
        self.drop(event_type, None, None);
    }

    /// From now on everything works.
    pub fn clear(&self) {
        *self.plan() = Plan::default();
    }

    /// How many counted faults are still to come; 0 tells a test that all it asked for has happened.
    pub fn outstanding(&self) -> usize {
        let plan = self.plan();
        let requests: usize = plan.counted.iter().map(|fault| fault.left).sum();
        requests + plan.dropped.iter().filter_map(|fault| fault.left).sum::<usize>()
    }

    /// Decides about one request, and counts it.
    pub(super) fn judge(&self, method: &str, path: &[String]) -> Verdict {
        let mut plan = self.plan();
        let slow = plan.latency.iter().filter(|(endpoint, _)| endpoint.fits(method, path));
        let latency = slow.map(|(_, latency)| *latency).max().unwrap_or_default();
        let index = plan.counted.iter().position(|fault| fault.endpoint.fits(method, path));
        let fault = index.and_then(|index| {
            let counted = plan.counted.get_mut(index)?;
            counted.left -= 1;
            let kind = counted.kind;
            if counted.left == 0 {
                plan.counted.remove(index);
            }
            Some(kind)
        });
        Verdict { latency, fault }
    }

    /// Whether this to-device message vanishes; counts it when it does.
    pub(super) fn drops(&self, kind: &str, recipient: &str) -> bool {
        let mut plan = self.plan();
        let fits = |fault: &DroppedToDevice| {
            fault.kind == kind && fault.recipient.as_deref().is_none_or(|user| user == recipient)
        };
        let Some(index) = plan.dropped.iter().position(fits) else { return false };
        if let Some(left) = plan.dropped.get_mut(index).and_then(|fault| fault.left.as_mut()) {
            *left -= 1;
            if *left == 0 {
                plan.dropped.remove(index);
            }
        }
        true
    }

    fn count(&self, endpoint: &str, left: usize, kind: Kind) {
        if left > 0 {
            self.plan().counted.push_back(Counted { endpoint: Endpoint::new(endpoint), left, kind });
        }
    }

    fn drop(&self, kind: &str, recipient: Option<&str>, left: Option<usize>) {
        if left != Some(0) {
            let recipient = recipient.map(str::to_owned);
            self.plan().dropped.push(DroppedToDevice { kind: kind.to_owned(), recipient, left });
        }
    }

    fn plan(&self) -> MutexGuard<'_, Plan> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Endpoint {
    method: Option<String>,
    segments: Vec<String>,
}

impl Endpoint {
    fn new(text: &str) -> Self {
        let (method, path) = match text.split_once(' ') {
            Some((method, path)) => (Some(method.to_ascii_uppercase()), path),
            None => (None, text),
        };
        Self { method, segments: path.split('/').filter(|s| !s.is_empty()).map(str::to_owned).collect() }
    }

    fn fits(&self, method: &str, path: &[String]) -> bool {
        self.method.as_ref().is_none_or(|wanted| wanted == method)
            && self.segments.len() <= path.len()
            && self.segments.iter().zip(path).all(|(wanted, segment)| wanted == "*" || wanted == segment)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &str) -> Vec<String> {
        text.split('/').filter(|s| !s.is_empty()).map(str::to_owned).collect()
    }

    #[test]
    fn an_endpoint_fits_by_method_and_segments() {
        let endpoint = Endpoint::new("PUT /rooms/*/state/m.call");
        assert!(endpoint.fits("PUT", &path("/rooms/!a:b/state/m.call/key")));
        assert!(!endpoint.fits("GET", &path("/rooms/!a:b/state/m.call/key")));
        assert!(!endpoint.fits("PUT", &path("/rooms/!a:b/state/m.calls")));
        assert!(!endpoint.fits("PUT", &path("/rooms/!a:b")));
        assert!(Endpoint::new("/").fits("POST", &path("/anything")));
    }

    #[test]
    fn counted_faults_come_in_the_order_they_were_asked_for_and_end() {
        let faults = Faults::default();
        faults.fail("/a", 1, 502);
        faults.rate_limit("/a", 1, Duration::from_secs(1));
        let next = || faults.judge("GET", &path("/a/b")).fault;
        assert_eq!(faults.outstanding(), 2);
        assert_eq!(
            [next(), next(), next()],
            [Some(Kind::Fail(502)), Some(Kind::RateLimit(Duration::from_secs(1))), None]
        );
        assert_eq!(faults.outstanding(), 0);
    }

    #[test]
    fn to_device_messages_are_dropped_for_the_one_and_so_many_times() {
        let faults = Faults::default();
        faults.drop_to_device_for("t", "@bob", 1);
        assert!(!faults.drops("t", "@alice"));
        assert!(!faults.drops("u", "@bob"));
        assert!(faults.drops("t", "@bob"));
        assert!(!faults.drops("t", "@bob"));
        faults.drop_every_to_device("t");
        assert!((0..10).all(|_| faults.drops("t", "@bob")));
        faults.clear();
        assert!(!faults.drops("t", "@bob"));
    }
}
