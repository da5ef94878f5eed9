//! Which connections a call needs, and how each is opened again when it fails.
//!
//! There is one route per LiveKit deployment: ours, which carries our tracks, and one to each deployment that another
//! member publishes to. A deployment may have several names; a route whose token turns out to open an SFU that another
//! route already uses is folded into that route, because two connections with one identity evict each other.

use std::{
    collections::{BTreeMap, VecDeque},
    time::{Duration, Instant},
};

use super::event::ConnectFailure;
use crate::{
    time::retry_delay,
    transport::{ConnectionId, LiveKitFocus, NamedBy, SfuUrl},
};

/// A connection that lasted this long starts counting failures anew.
const STABLE_AFTER: Duration = Duration::from_secs(30);
/// Routes that one call opens at most. Every route costs a token request and two peer connections.
const MAX_ROUTES: usize = 16;

/// A deployment that a call needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Wanted {
    /// Its name in the membership.
    pub(crate) focus: LiveKitFocus,
    /// Whether we publish there.
    pub(crate) ours: bool,
    /// Where we have it from.
    pub(crate) named_by: NamedBy,
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum RouteOutput {
    /// Get a token. The answer goes to [`Routing::granted`].
    Access { connection: ConnectionId, wanted: Wanted },
    /// Connect with the token that was got. The answer goes to [`Routing::connected`].
    Connect { connection: ConnectionId },
    /// Close the connection, or give up getting one, and forget its token.
    Close { connection: ConnectionId },
    /// A connection could not be made, or ended.
    Failed { focus: LiveKitFocus, ours: bool, failure: ConnectFailure, failures: u32 },
}

/// Every connection of one call.
#[derive(Debug, Default)]
pub(crate) struct Routing {
    routes: BTreeMap<u32, Route>,
    next_route: u32,
    wanted: Vec<Wanted>,
    outputs: VecDeque<RouteOutput>,
}

#[derive(Debug)]
struct Route {
    /// Every name of the deployment, the first one wanted first.
    names: Vec<Wanted>,
    generation: u32,
    sfu: Option<SfuUrl>,
    state: State,
    failures: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Waiting { until: Instant },
    Access,
    Connecting,
    Up { since: Instant },
}

impl Route {
    fn serves(&self, focus: &LiveKitFocus) -> bool {
        self.names.iter().any(|name| name.focus.is_same_as(focus))
            || (self.sfu.is_some() && self.sfu == focus.sfu)
    }

    fn is_ours(&self) -> bool {
        self.names.iter().any(|name| name.ours)
    }

    fn is_open(&self) -> bool {
        !matches!(self.state, State::Waiting { .. })
    }
}

impl Routing {
    /// Takes the deployments that the call needs now, ours first.
    pub(crate) fn want(&mut self, now: Instant, wanted: Vec<Wanted>) {
        self.wanted = wanted;
        for (number, route) in &mut self.routes {
            let mut names: Vec<Wanted> = Vec::new();
            for name in &self.wanted {
                if route.names.iter().any(|known| known.focus.is_same_as(&name.focus))
                    || (route.sfu.is_some() && route.sfu == name.focus.sfu)
                {
                    names.push(name.clone());
                }
            }
            // A route that was only subscribed to has a token that may not publish under our identity.
            let became_ours = !route.is_ours() && names.iter().any(|name| name.ours);
            if (names.is_empty() || became_ours) && route.is_open() {
                let connection = ConnectionId { route: *number, generation: route.generation };
                self.outputs.push_back(RouteOutput::Close { connection });
                route.generation += 1;
                route.state = State::Waiting { until: now };
                route.sfu = None;
            }
            route.names = names;
        }
        self.routes.retain(|_, route| !route.names.is_empty());
        for name in self.wanted.clone() {
            if self.routes.values().any(|route| route.serves(&name.focus)) {
                continue;
            }
            if self.routes.len() >= MAX_ROUTES {
                tracing::warn!(focus = %name.focus, "the call has too many foci; this one is left out");
                continue;
            }
            let route = Route {
                names: vec![name],
                generation: 0,
                sfu: None,
                state: State::Waiting { until: now },
                failures: 0,
            };
            self.routes.insert(self.next_route, route);
            self.next_route += 1;
        }
        self.advance(now);
    }

    /// The token for `connection` is there: it opens `sfu`.
    pub(crate) fn granted(&mut self, connection: ConnectionId, sfu: SfuUrl) {
        let Some(route) = self.current(connection).filter(|route| route.state == State::Access) else {
            return;
        };
        let ours = route.is_ours();
        let other = self
            .routes
            .iter()
            .find(|(number, other)| **number != connection.route && other.sfu.as_ref() == Some(&sfu))
            .map(|(number, other)| (*number, other.is_ours()));
        if let Some((other, other_is_ours)) = other {
            // One of the two must go. Ours stays, because its token may publish.
            let (stays, goes) =
                if ours && !other_is_ours { (connection.route, other) } else { (other, connection.route) };
            if let Some(folded) = self.routes.remove(&goes) {
                let generation = folded.generation;
                self.outputs
                    .push_back(RouteOutput::Close { connection: ConnectionId { route: goes, generation } });
                if let Some(route) = self.routes.get_mut(&stays) {
                    route.names.extend(folded.names);
                }
            }
            if goes == connection.route {
                return;
            }
        }
        if let Some(route) = self.routes.get_mut(&connection.route) {
            route.sfu = Some(sfu);
            route.state = State::Connecting;
            self.outputs.push_back(RouteOutput::Connect { connection });
        }
    }

    /// The connection is up: signalling works.
    pub(crate) fn connected(&mut self, now: Instant, connection: ConnectionId) {
        if let Some(route) = self.current_mut(connection) {
            route.state = State::Up { since: now };
        }
    }

    /// Getting the token or connecting failed, or the connection ended.
    pub(crate) fn failed(&mut self, now: Instant, connection: ConnectionId, failure: ConnectFailure) {
        let Some(route) = self.current_mut(connection) else { return };
        match route.state {
            State::Waiting { .. } => return,
            State::Up { since } if now.saturating_duration_since(since) >= STABLE_AFTER => route.failures = 0,
            _ => {}
        }
        route.failures = route.failures.saturating_add(1);
        let wait = retry_delay(route.failures, failure.retry_after);
        route.state = State::Waiting { until: now + wait };
        route.generation += 1;
        route.sfu = None;
        let failures = route.failures;
        let names: Vec<_> = route.names.clone();
        self.outputs.push_back(RouteOutput::Close { connection });
        // One report per deployment; ours if we publish there.
        if let Some(name) = names.iter().find(|name| name.ours).or_else(|| names.first()) {
            let (focus, ours) = (name.focus.clone(), name.ours);
            self.outputs.push_back(RouteOutput::Failed { focus, ours, failure, failures });
        }
    }

    /// Closes every connection and opens it anew: our identity has changed.
    pub(crate) fn reopen_all(&mut self, now: Instant) {
        for (number, route) in &mut self.routes {
            if route.is_open() {
                let connection = ConnectionId { route: *number, generation: route.generation };
                self.outputs.push_back(RouteOutput::Close { connection });
                route.generation += 1;
                route.state = State::Waiting { until: now };
                route.sfu = None;
            }
        }
    }

    /// Ends everything.
    pub(crate) fn close_all(&mut self) {
        for (number, route) in std::mem::take(&mut self.routes) {
            if route.is_open() {
                let connection = ConnectionId { route: number, generation: route.generation };
                self.outputs.push_back(RouteOutput::Close { connection });
            }
        }
        self.wanted.clear();
    }

    /// What to do next; `None` when nothing is due before [`Self::wake_at`].
    pub(crate) fn poll(&mut self, now: Instant) -> Option<RouteOutput> {
        self.advance(now);
        self.outputs.pop_front()
    }

    /// When the next connection is tried again.
    pub(crate) fn wake_at(&self) -> Option<Instant> {
        self.routes
            .values()
            .filter_map(|route| match route.state {
                State::Waiting { until } => Some(until),
                _ => None,
            })
            .min()
    }

    /// Every connection that is up.
    pub(crate) fn open(&self) -> Vec<ConnectionId> {
        let open = self.routes.iter().filter(|(_, route)| matches!(route.state, State::Up { .. }));
        open.map(|(number, route)| ConnectionId { route: *number, generation: route.generation }).collect()
    }

    /// Whether an event of `connection` still counts.
    pub(crate) fn is_current(&self, connection: ConnectionId) -> bool {
        self.current(connection).is_some()
    }

    /// Whether `connection` is the present one to the deployment that we publish to.
    pub(crate) fn is_ours(&self, connection: ConnectionId) -> bool {
        self.current(connection).is_some_and(Route::is_ours)
    }

    /// The connection that is up for a deployment.
    #[cfg(test)]
    pub(crate) fn connection_to(&self, focus: &LiveKitFocus) -> Option<ConnectionId> {
        self.routes.iter().find(|(_, route)| route.serves(focus)).and_then(|(number, route)| {
            matches!(route.state, State::Up { .. })
                .then_some(ConnectionId { route: *number, generation: route.generation })
        })
    }

    /// Whether `connection` goes to the deployment `focus`.
    pub(crate) fn goes_to(&self, connection: ConnectionId, focus: &LiveKitFocus) -> bool {
        self.current(connection).is_some_and(|route| route.serves(focus))
    }

    /// The connection that carries our tracks, once it is up.
    pub(crate) fn ours(&self) -> Option<ConnectionId> {
        self.routes.iter().find(|(_, route)| route.is_ours()).and_then(|(number, route)| {
            matches!(route.state, State::Up { .. })
                .then_some(ConnectionId { route: *number, generation: route.generation })
        })
    }

    /// The first name of the deployment behind a connection.
    pub(crate) fn focus_of(&self, connection: ConnectionId) -> Option<&LiveKitFocus> {
        self.current(connection)?.names.first().map(|name| &name.focus)
    }

    fn advance(&mut self, now: Instant) {
        for (number, route) in &mut self.routes {
            if let State::Waiting { until } = route.state
                && until <= now
                && let Some(name) = route.names.iter().find(|name| name.ours).or_else(|| route.names.first())
            {
                route.state = State::Access;
                let connection = ConnectionId { route: *number, generation: route.generation };
                self.outputs.push_back(RouteOutput::Access { connection, wanted: name.clone() });
            }
        }
    }

    fn current(&self, connection: ConnectionId) -> Option<&Route> {
        self.routes.get(&connection.route).filter(|route| route.generation == connection.generation)
    }

    fn current_mut(&mut self, connection: ConnectionId) -> Option<&mut Route> {
        self.routes.get_mut(&connection.route).filter(|route| route.generation == connection.generation)
    }
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "a test needs some point in time to start from")]
mod tests {
    use super::*;
    use crate::machine::{event::ConnectFailureKind, testing};

    fn wanted(service: &str, ours: bool) -> Wanted {
        Wanted { focus: testing::focus(service), ours, named_by: NamedBy::Homeserver }
    }

    fn sfu(url: &str) -> SfuUrl {
        url.parse().unwrap()
    }

    fn drain(routing: &mut Routing, now: Instant) -> Vec<RouteOutput> {
        std::iter::from_fn(|| routing.poll(now)).collect()
    }

    fn lost() -> ConnectFailure {
        ConnectFailure::new(ConnectFailureKind::Lost, "gone")
    }

    /// Brings the route that is asked for next up.
    fn bring_up(routing: &mut Routing, now: Instant, url: &str) -> ConnectionId {
        let connection = drain(routing, now)
            .into_iter()
            .find_map(|output| match output {
                RouteOutput::Access { connection, .. } => Some(connection),
                _ => None,
            })
            .expect("a token is asked for");
        routing.granted(connection, sfu(url));
        assert_eq!(drain(routing, now), [RouteOutput::Connect { connection }]);
        routing.connected(now, connection);
        connection
    }

    #[test]
    fn late_events_of_closed_connection_are_recognised() {
        let (mut routing, now) = (Routing::default(), Instant::now());
        routing.want(now, vec![wanted("https://a.example", true)]);
        let first = bring_up(&mut routing, now, "wss://a.example");
        routing.failed(now, first, lost());
        assert!(!routing.is_current(first));
        // The event arrives twice: the second changes nothing.
        routing.failed(now, first, lost());
        assert_eq!(drain(&mut routing, now).len(), 2);
        let later = now + Duration::from_secs(1);
        let second = bring_up(&mut routing, later, "wss://a.example");
        assert_eq!(second, ConnectionId { route: first.route, generation: 1 });
    }

    #[test]
    fn disconnection_after_last_member_left_does_not_reconnect() {
        let (mut routing, now) = (Routing::default(), Instant::now());
        let own = wanted("https://a.example", true);
        routing.want(now, vec![own.clone()]);
        bring_up(&mut routing, now, "wss://a.example");
        routing.want(now, vec![own.clone(), wanted("https://b.example", false)]);
        let other = bring_up(&mut routing, now, "wss://b.example");
        routing.want(now, vec![own]);
        assert_eq!(drain(&mut routing, now), [RouteOutput::Close { connection: other }]);
        routing.failed(now, other, lost());
        assert_eq!(drain(&mut routing, now), []);
        assert_eq!(routing.wake_at(), None);
    }

    #[test]
    fn two_names_of_one_sfu_share_a_connection() {
        let (mut routing, now) = (Routing::default(), Instant::now());
        let (own, other) = (wanted("https://a.example", true), wanted("https://jwt.a.example", false));
        routing.want(now, vec![own.clone()]);
        let ours = bring_up(&mut routing, now, "wss://sfu.example");
        routing.want(now, vec![own.clone(), other.clone()]);
        let outputs = drain(&mut routing, now);
        let [RouteOutput::Access { connection, .. }] = outputs[..] else { panic!("{outputs:?}") };
        routing.granted(connection, sfu("https://SFU.example/"));
        assert_eq!(drain(&mut routing, now), [RouteOutput::Close { connection }]);
        assert_eq!(routing.connection_to(&other.focus), Some(ours));
        // It stays so when the members change.
        routing.want(now, vec![own, other.clone()]);
        assert_eq!(drain(&mut routing, now), []);
        assert_eq!(routing.connection_to(&other.focus), Some(ours));
    }

    #[test]
    fn foci_beyond_the_limit_are_left_out() {
        let (mut routing, now) = (Routing::default(), Instant::now());
        let many = (0..40).map(|n| wanted(&format!("https://f{n}.example"), n == 0)).collect();
        routing.want(now, many);
        assert_eq!(drain(&mut routing, now).len(), MAX_ROUTES);
    }
}
