//! How much one address and one homeserver may ask of us. No I/O, no clock: it is told who and when.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    hash::Hash,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    str::FromStr,
    time::{Duration, Instant},
};

use crate::config::Limits;

/// Addresses or servers that are remembered at once. What has been idle longest is forgotten first.
const REMEMBERED: usize = 100_000;
/// After this long a lookup counts as hanging: a homeserver that works answers within a second.
const HANGING_AFTER: Duration = Duration::from_secs(5);
/// A homeserver that hangs is worth asking again after about this long.
const HANGING_RETRY: Duration = Duration::from_secs(5);
/// How often the log says that connections are turned away.
const SAY_AGAIN: Duration = Duration::from_secs(10);
/// Hops of `X-Forwarded-For` that are read, from the nearest.
const MAX_HOPS: usize = 16;

/// A steady rate, and how much may come at once before it counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Per second, in the long run; at least 1.
    pub per_second: u32,
    /// At once; at least 1.
    pub burst: u32,
}

/// Counts requests and lookups against [`Limits`].
#[derive(Debug)]
pub(crate) struct Gate {
    addresses: Option<Buckets<IpAddr>>,
    servers: Option<Buckets<String>>,
    lookups: Lookups,
}

impl Gate {
    pub(crate) fn new(limits: &Limits) -> Self {
        Self {
            addresses: limits.per_address.map(Buckets::new),
            servers: limits.per_server.map(Buckets::new),
            lookups: Lookups {
                at_once: limits.server_in_flight,
                hanging: limits.server_hanging,
                next: 0,
                running: HashMap::new(),
            },
        }
    }

    /// A request from `client` comes in.
    pub(crate) fn request(&mut self, now: Instant, client: IpAddr) -> Result<(), Limited> {
        match &mut self.addresses {
            Some(buckets) => buckets
                .take(now, network(client))
                .map_err(|retry_after| Limited { by: Limit::Address, retry_after }),
            None => Ok(()),
        }
    }

    /// A lookup at `server` is about to begin; [`Gate::ended`] must be told of its end.
    pub(crate) fn lookup(&mut self, now: Instant, server: &str) -> Result<LookupId, Limited> {
        let server = server.to_ascii_lowercase();
        self.lookups.room(now, &server)?;
        if let Some(buckets) = &mut self.servers {
            buckets
                .take(now, server.clone())
                .map_err(|retry_after| Limited { by: Limit::Server, retry_after })?;
        }
        Ok(self.lookups.begin(now, server))
    }

    /// A lookup has ended, one way or the other.
    pub(crate) fn ended(&mut self, lookup: &LookupId) {
        self.lookups.end(lookup);
    }
}

/// A lookup in progress.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LookupId {
    server: String,
    number: u64,
}

/// A request is one too many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limited {
    pub(crate) by: Limit,
    pub(crate) retry_after: Duration,
}

/// The connections that are open, by address.
#[derive(Debug)]
pub(crate) struct OpenConnections {
    per_address: Option<usize>,
    /// Proxies connect for everybody.
    exempt: TrustedProxies,
    /// Bounded by the connections open at all.
    open: HashMap<IpAddr, usize>,
    said: Option<Instant>,
}

impl OpenConnections {
    pub(crate) fn new(per_address: Option<usize>, exempt: TrustedProxies) -> Self {
        Self { per_address, exempt, open: HashMap::new(), said: None }
    }

    /// A connection from `peer` has come in. [`Self::close`] must be told of its end, unless it is one too many.
    pub(crate) fn open(&mut self, peer: IpAddr) -> Result<CountedPeer, TooMany> {
        let Some(most) = self.per_address.filter(|_| !self.exempt.includes(peer)) else {
            return Ok(CountedPeer(None));
        };
        let network = network(peer);
        let open = self.open.entry(network).or_default();
        if *open >= most {
            return Err(TooMany);
        }
        *open += 1;
        Ok(CountedPeer(Some(network)))
    }

    /// A connection has ended.
    pub(crate) fn close(&mut self, peer: &CountedPeer) {
        if let Some(network) = peer.0
            && let Some(open) = self.open.get_mut(&network)
        {
            *open -= 1;
            if *open == 0 {
                self.open.remove(&network);
            }
        }
    }

    /// Whether the log should say at `now` that there are too many: not for each, or the log is the next thing
    /// to be flooded.
    pub(crate) fn worth_saying(&mut self, now: Instant) -> bool {
        let worth = self.said.is_none_or(|said| now.saturating_duration_since(said) >= SAY_AGAIN);
        if worth {
            self.said = Some(now);
        }
        worth
    }
}

/// Under whose name a connection is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CountedPeer(Option<IpAddr>);

/// An address has as many connections as one may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TooMany;

/// Which limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Limit {
    Address,
    Server,
    ServerBusy,
    ServerHangs,
    InFlight,
}

impl Limit {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Address => "address",
            Self::Server => "server",
            Self::ServerBusy => "server_in_flight",
            Self::ServerHangs => "server_hangs",
            Self::InFlight => "in_flight",
        }
    }
}

/// The network that one subscriber has: an IPv4 address, or a /64 of IPv6.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from(u128::from(v6) & (u128::MAX << 64))),
        v4 => v4,
    }
}

/// One token bucket per key, each written as the time at which it will be full again (the generic cell rate
/// algorithm). Two generations: when the young one is half of what we may remember, the old one, which nobody
/// has touched since, is dropped.
#[derive(Debug)]
struct Buckets<K> {
    interval: Duration,
    tolerance: Duration,
    half: usize,
    young: HashMap<K, Instant>,
    old: HashMap<K, Instant>,
}

impl<K: Eq + Hash> Buckets<K> {
    fn new(rate: Rate) -> Self {
        let interval = Duration::from_secs(1) / rate.per_second.max(1);
        let tolerance = interval * (rate.burst.max(1) - 1);
        Self { interval, tolerance, half: REMEMBERED / 2, young: HashMap::new(), old: HashMap::new() }
    }

    /// Takes one, or says how long until there is one again.
    fn take(&mut self, now: Instant, key: K) -> Result<(), Duration> {
        let full_at = match self.young.get(&key) {
            Some(at) => *at,
            None => self.old.remove(&key).unwrap_or(now),
        }
        .max(now);
        let verdict = match (full_at - now).checked_sub(self.tolerance) {
            Some(wait) if !wait.is_zero() => Err(wait),
            _ => Ok(()),
        };
        let full_at = if verdict.is_ok() { full_at + self.interval } else { full_at };
        if self.young.len() >= self.half && !self.young.contains_key(&key) {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(key, full_at);
        verdict
    }
}

/// The lookups in progress, by server. Bounded by the requests in flight.
#[derive(Debug)]
struct Lookups {
    at_once: usize,
    hanging: usize,
    next: u64,
    running: HashMap<String, BTreeMap<u64, Instant>>,
}

impl Lookups {
    fn room(&self, now: Instant, server: &str) -> Result<(), Limited> {
        let Some(running) = self.running.get(server) else { return Ok(()) };
        if running.len() >= self.at_once {
            return Err(Limited { by: Limit::ServerBusy, retry_after: Duration::from_secs(1) });
        }
        // In the order in which they began, so that the n-th tells whether n of them are old.
        let nth = running.values().nth(self.hanging.saturating_sub(1));
        if nth.is_some_and(|began| now.saturating_duration_since(*began) >= HANGING_AFTER) {
            return Err(Limited { by: Limit::ServerHangs, retry_after: HANGING_RETRY });
        }
        Ok(())
    }

    fn begin(&mut self, now: Instant, server: String) -> LookupId {
        let number = self.next;
        self.next += 1;
        self.running.entry(server.clone()).or_default().insert(number, now);
        LookupId { server, number }
    }

    fn end(&mut self, lookup: &LookupId) {
        if let Some(running) = self.running.get_mut(&lookup.server) {
            running.remove(&lookup.number);
            if running.is_empty() {
                self.running.remove(&lookup.server);
            }
        }
    }
}

/// Networks whose word about whom they forward for is believed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrustedProxies(Vec<Network>);

impl TrustedProxies {
    /// Nobody.
    pub fn none() -> Self {
        Self(Vec::new())
    }

    /// These.
    pub fn new(networks: impl IntoIterator<Item = Network>) -> Self {
        Self(networks.into_iter().collect())
    }

    /// Whether `address` is one.
    pub fn includes(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        self.0.iter().any(|network| network.includes(address))
    }

    /// Who sent a request that came from `peer` with these `X-Forwarded-For` values, the first header line
    /// first: the nearest hop that is not a trusted proxy. `peer` is `None` on a Unix socket, whose other end is
    /// the operator's own.
    pub(crate) fn client<'a>(
        &self,
        peer: Option<IpAddr>,
        forwarded_for: impl DoubleEndedIterator<Item = &'a str>,
    ) -> Option<IpAddr> {
        if peer.is_some_and(|peer| !self.includes(peer)) {
            return peer;
        }
        let mut client = peer;
        for hop in forwarded_for.rev().flat_map(|line| line.rsplit(',')).take(MAX_HOPS) {
            // What a proxy could not name ends the chain: all before it is hearsay.
            let Some(address) = hop_address(hop.trim()) else { break };
            client = Some(address);
            if !self.includes(address) {
                break;
            }
        }
        client
    }
}

impl Default for TrustedProxies {
    /// Loopback and private networks: where the reverse proxies of nearly all deployments are. Whoever else is
    /// there can evade the limit per address, and nothing more.
    fn default() -> Self {
        Self(PRIVATE.to_vec())
    }
}

const PRIVATE: [Network; 7] = [
    Network::v4(127, 0, 0, 0, 8),
    Network::v4(10, 0, 0, 0, 8),
    Network::v4(172, 16, 0, 0, 12),
    Network::v4(192, 168, 0, 0, 16),
    Network { address: IpAddr::V6(Ipv6Addr::LOCALHOST), prefix: 128 },
    Network { address: IpAddr::V6(Ipv6Addr::new(0xfc00, 0, 0, 0, 0, 0, 0, 0)), prefix: 7 },
    Network { address: IpAddr::V6(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0)), prefix: 10 },
];

impl FromStr for TrustedProxies {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let words: Vec<&str> = text.split([',', ' ']).filter(|word| !word.is_empty()).collect();
        let mut networks = Vec::new();
        for word in &words {
            match *word {
                "private" => networks.extend(PRIVATE),
                "none" if words.len() == 1 => {}
                "none" => return Err("none stands alone".to_owned()),
                word => networks.push(word.parse()?),
            }
        }
        Ok(Self(networks))
    }
}

/// Addresses that begin with the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network {
    address: IpAddr,
    prefix: u8,
}

impl Network {
    const fn v4(a: u8, b: u8, c: u8, d: u8, prefix: u8) -> Self {
        Self { address: IpAddr::V4(Ipv4Addr::new(a, b, c, d)), prefix }
    }

    /// Whether `address` is in it.
    pub fn includes(&self, address: IpAddr) -> bool {
        match (self.address, address) {
            (IpAddr::V4(a), IpAddr::V4(b)) => {
                let differing = u32::from(a) ^ u32::from(b);
                differing.leading_zeros() >= self.prefix.into()
            }
            (IpAddr::V6(a), IpAddr::V6(b)) => {
                let differing = u128::from(a) ^ u128::from(b);
                differing.leading_zeros() >= self.prefix.into()
            }
            _ => false,
        }
    }
}

impl FromStr for Network {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is neither an address nor a network");
        let (address, prefix) = match text.split_once('/') {
            Some((address, prefix)) => (address, Some(prefix)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| wrong())?;
        let longest = if address.is_ipv4() { 32 } else { 128 };
        let prefix = prefix.map_or(Ok(longest), |p| p.parse().map_err(|_| wrong()))?;
        if prefix > longest { Err(wrong()) } else { Ok(Self { address, prefix }) }
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

/// One hop: an address, perhaps with a port, perhaps in brackets.
fn hop_address(hop: &str) -> Option<IpAddr> {
    if let Ok(address) = hop.parse() {
        return Some(address);
    }
    if let Some(v6) = hop.strip_prefix('[') {
        return v6.split(']').next()?.parse::<Ipv6Addr>().ok().map(IpAddr::V6);
    }
    hop.split_once(':')?.0.parse::<Ipv4Addr>().ok().map(IpAddr::V4)
}

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod properties;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn start() -> Instant {
        #[allow(clippy::disallowed_methods, reason = "a test needs one instant to count from")]
        Instant::now()
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn two_thousand_at_once_pass_from_many_addresses_but_not_from_one() {
        let mut gate = Gate::new(&Limits::default());
        let now = start();
        let many = (0..2000u32).filter(|n| {
            let client = IpAddr::V4(Ipv4Addr::from(0x0a00_0000 + n));
            gate.request(now, client).is_ok() && gate.lookup(now, "hs.org").is_ok()
        });
        assert_eq!(many.count(), 2000);
        let one = (0..2000).filter(|_| gate.request(now, ip("192.0.2.1")).is_ok()).count();
        assert_eq!(one, 500);
    }

    #[test]
    fn after_the_time_said_there_is_one_more() {
        let limits = Limits { per_address: Some(Rate { per_second: 2, burst: 3 }), ..Limits::default() };
        let mut gate = Gate::new(&limits);
        let mut now = start();
        let client = ip("192.0.2.1");
        for _ in 0..3 {
            assert_eq!(gate.request(now, client), Ok(()));
        }
        let limited = gate.request(now, client).unwrap_err();
        assert_eq!(limited, Limited { by: Limit::Address, retry_after: Duration::from_millis(500) });
        now += Duration::from_millis(499);
        assert!(gate.request(now, client).is_err());
        now += Duration::from_millis(1);
        assert_eq!(gate.request(now, client), Ok(()));
        assert!(gate.request(now, client).is_err());
        // Another one is not affected; a long rest gives the burst back and no more.
        assert_eq!(gate.request(now, ip("192.0.2.2")), Ok(()));
        now += Duration::from_hours(1);
        assert_eq!((0..9).filter(|_| gate.request(now, client).is_ok()).count(), 3);
    }

    #[test]
    fn one_ipv6_network_is_one_client_and_mapped_addresses_are_ipv4() {
        let limits = Limits { per_address: Some(Rate { per_second: 1, burst: 1 }), ..Limits::default() };
        let mut gate = Gate::new(&limits);
        let now = start();
        assert!(gate.request(now, ip("2001:db8::1")).is_ok());
        assert!(gate.request(now, ip("2001:db8::ffff:2")).is_err());
        assert!(gate.request(now, ip("2001:db8:0:1::1")).is_ok());
        assert!(gate.request(now, ip("192.0.2.1")).is_ok());
        assert!(gate.request(now, ip("::ffff:192.0.2.1")).is_err());
    }

    #[test]
    fn memory_is_bounded_and_who_keeps_asking_is_not_forgotten() {
        let mut buckets = Buckets::new(Rate { per_second: 1, burst: 1 });
        buckets.half = 100;
        let now = start();
        assert!(buckets.take(now, 0).is_ok());
        for stranger in 1..10_000 {
            assert!(buckets.take(now, stranger).is_ok());
            assert!(buckets.take(now, 0).is_err());
            assert!(buckets.young.len() + buckets.old.len() <= 200);
        }
    }

    #[test]
    fn a_server_that_hangs_gets_no_more_lookups_until_some_end() {
        let limits = Limits { server_hanging: 2, server_in_flight: 4, ..Limits::default() };
        let mut gate = Gate::new(&limits);
        let now = start();
        let first = gate.lookup(now, "Hangs.org").unwrap();
        let by = |gate: &mut Gate, now| gate.lookup(now, "hangs.org").map_err(|limited| limited.by);
        for _ in 0..3 {
            assert!(by(&mut gate, now).is_ok());
        }
        assert_eq!(by(&mut gate, now), Err(Limit::ServerBusy));
        gate.ended(&first);
        let later = now + HANGING_AFTER;
        assert_eq!(by(&mut gate, later), Err(Limit::ServerHangs));
        assert!(gate.lookup(later, "works.org").is_ok());
        gate.ended(&LookupId { server: "hangs.org".into(), number: 1 });
        gate.ended(&LookupId { server: "hangs.org".into(), number: 2 });
        assert!(by(&mut gate, later).is_ok());
    }

    #[test]
    fn what_has_ended_takes_no_memory() {
        let mut gate = Gate::new(&Limits::default());
        let now = start();
        for n in 0..100 {
            let lookup = gate.lookup(now, &format!("{n}.org")).unwrap();
            gate.ended(&lookup);
            gate.ended(&lookup);
        }
        assert!(gate.lookups.running.is_empty());
    }

    #[test]
    fn only_trusted_proxies_say_for_whom_they_speak() {
        let client = |trusted: &str, peer: &str, lines: &[&str]| {
            let trusted: TrustedProxies = trusted.parse().unwrap();
            trusted.client(Some(ip(peer)), lines.iter().copied()).unwrap().to_string()
        };
        assert_eq!(client("private", "203.0.113.9", &["198.51.100.1"]), "203.0.113.9");
        assert_eq!(client("private", "127.0.0.1", &["198.51.100.1"]), "198.51.100.1");
        assert_eq!(client("private", "::ffff:10.0.0.1", &["198.51.100.1"]), "198.51.100.1");
        assert_eq!(client("none", "127.0.0.1", &["198.51.100.1"]), "127.0.0.1");
        assert_eq!(client("192.0.2.0/24", "192.0.2.200", &["198.51.100.1"]), "198.51.100.1");
        assert_eq!(client("192.0.2.0/24", "192.0.3.1", &["198.51.100.1"]), "192.0.3.1");
        // A client may have written whatever it liked before its proxy added the truth.
        assert_eq!(client("private", "127.0.0.1", &["6.6.6.6, 198.51.100.1"]), "198.51.100.1");
        assert_eq!(client("private", "127.0.0.1", &["6.6.6.6", "198.51.100.1, 10.0.0.2"]), "198.51.100.1");
        assert_eq!(client("private", "127.0.0.1", &["unknown, 10.0.0.2"]), "10.0.0.2");
        assert_eq!(client("private", "127.0.0.1", &["198.51.100.1:4711"]), "198.51.100.1");
        assert_eq!(client("private", "127.0.0.1", &["[2001:db8::1]:4711"]), "2001:db8::1");
        assert_eq!(client("private", "127.0.0.1", &[]), "127.0.0.1");
        let unix = TrustedProxies::none().client(None, ["198.51.100.1"].into_iter());
        assert_eq!(unix, Some(ip("198.51.100.1")));
    }

    #[test]
    fn one_address_has_so_many_connections_and_a_proxy_any_number() {
        let mut connections = OpenConnections::new(Some(2), TrustedProxies::default());
        let stranger = ip("2001:db8::1");
        let first = connections.open(stranger).unwrap();
        let second = connections.open(ip("2001:db8::2")).unwrap();
        assert_eq!(connections.open(stranger), Err(TooMany), "one /64 is one subscriber");
        assert!(connections.open(ip("2001:db8:0:1::1")).is_ok());
        connections.close(&first);
        assert!(connections.open(stranger).is_ok());
        assert_eq!(connections.open(stranger), Err(TooMany));
        connections.close(&second);
        for proxy in ["127.0.0.1", "10.0.0.1", "::ffff:192.168.1.1"] {
            let many: Vec<_> = (0..100).map(|_| connections.open(ip(proxy)).unwrap()).collect();
            many.iter().for_each(|one| connections.close(one));
        }
        let mut unlimited = OpenConnections::new(None, TrustedProxies::none());
        assert!((0..1000).all(|_| unlimited.open(stranger).is_ok()) && unlimited.open.is_empty());
    }

    #[test]
    fn connections_that_have_ended_take_no_memory_and_the_log_is_not_flooded() {
        let mut connections = OpenConnections::new(Some(1), TrustedProxies::none());
        for n in 0..100 {
            let one = connections.open(IpAddr::V4(Ipv4Addr::from(n))).unwrap();
            connections.close(&one);
        }
        assert!(connections.open.is_empty());
        let now = start();
        let said = (0..100u64).filter(|s| connections.worth_saying(now + Duration::from_secs(*s)));
        assert_eq!(said.count(), 10);
    }

    #[test]
    fn networks_are_read() {
        for bad in ["", "x", "10.0.0.0/33", "::/129", "10.0.0/8", "10.0.0.0/-1", "10.0.0.0/8/8"] {
            assert!(bad.parse::<Network>().is_err(), "{bad}");
        }
        assert!("0.0.0.0/0".parse::<Network>().unwrap().includes(ip("203.0.113.1")));
        assert!("10.0.0.0/8, none".parse::<TrustedProxies>().is_err());
    }

    proptest! {
        #[test]
        fn no_header_makes_it_panic(lines in prop::collection::vec(".{0,40}", 0..4)) {
            let trusted: TrustedProxies = "private".parse().unwrap();
            let _ = trusted.client(Some(ip("127.0.0.1")), lines.iter().map(String::as_str));
        }

        #[test]
        fn no_more_than_burst_and_rate_allow(
            steps in prop::collection::vec(0u64..400, 1..200), per_second in 1u32..50, burst in 1u32..20,
        ) {
            let mut buckets = Buckets::new(Rate { per_second, burst });
            let began = start();
            let (mut elapsed, mut taken) = (Duration::ZERO, 0u32);
            for step in steps {
                elapsed += Duration::from_millis(step);
                taken += u32::from(buckets.take(began + elapsed, ()).is_ok());
                let allowed = f64::from(burst) + elapsed.as_secs_f64() * f64::from(per_second) + 0.01;
                prop_assert!(f64::from(taken) <= allowed);
            }
        }
    }
}
