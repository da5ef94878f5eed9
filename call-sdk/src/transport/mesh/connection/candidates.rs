//! Which of our ICE candidates the other side is told, and which of its candidates we use.

use std::net::IpAddr;

use crate::addresses::AddressRule;

/// Candidates of either side, until ICE is restarted.
pub(super) const MOST_CANDIDATES: usize = 64;

/// What the other side may learn about our network.
#[derive(Clone, Copy, Debug)]
pub(super) struct Policy {
    /// Only the addresses of relays.
    pub(super) relay_only: bool,
    /// The addresses of our interfaces too.
    pub(super) host: bool,
}

impl Policy {
    /// The candidate as the other side may see it; `None`: not at all.
    ///
    /// A reflexive or relayed candidate names the address that it was found from; that goes if interfaces are not told.
    pub(super) fn reveal(self, candidate: &str) -> Option<String> {
        let mut fields: Vec<&str> = candidate.split_ascii_whitespace().collect();
        let value = |fields: &[&str], name| fields.iter().position(|field| *field == name).map(|at| at + 1);
        let kind = *fields.get(value(&fields, "typ")?)?;
        let address: IpAddr = fields.get(4)?.parse().ok()?;
        let allowed = match kind {
            "relay" => true,
            "host" => !self.relay_only && (self.host || address.is_loopback()),
            _ => !self.relay_only,
        };
        if !allowed {
            return None;
        }
        if kind != "host" && (!self.host || self.relay_only) {
            let anything = if address.is_ipv4() { "0.0.0.0" } else { "::" };
            for (name, neutral) in [("raddr", anything), ("rport", "0")] {
                if let Some(field) = value(&fields, name).and_then(|at| fields.get_mut(at)) {
                    *field = neutral;
                }
            }
        }
        Some(fields.join(" "))
    }
}

/// The other side's candidates: each makes us send packets to an address of its choice.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Admission {
    /// Which addresses may be used. Names may only where any address may.
    rule: AddressRule,
    used: usize,
}

impl Admission {
    pub(super) fn new(rule: AddressRule) -> Self {
        Self { rule, used: 0 }
    }

    /// Begins anew: the other side has found its paths anew.
    pub(super) fn reset(&mut self) {
        self.used = 0;
    }

    /// Whether a candidate is used, of which this is the value without `candidate:`.
    pub(super) fn admits(&mut self, candidate: &str) -> bool {
        let address = candidate.split_ascii_whitespace().nth(4).and_then(|field| field.parse().ok());
        let is_permitted =
            address.map_or(self.rule == AddressRule::Any, |address| self.rule.permits(address));
        self.used += usize::from(is_permitted);
        is_permitted && self.used <= MOST_CANDIDATES
    }

    /// A description with no other candidates than those that are used.
    pub(super) fn description(&mut self, sdp: &str) -> String {
        let is_kept = |line: &&str| match line.trim_end().strip_prefix("a=candidate:") {
            Some(candidate) => self.admits(candidate),
            None => true,
        };
        sdp.split_inclusive('\n').filter(is_kept).collect()
    }
}

/// Our candidates.
#[derive(Debug, Default)]
pub(super) struct Gathered {
    /// As they are told: lines without `a=`.
    pub(super) found: Vec<String>,
    /// None follows.
    pub(super) complete: bool,
    /// How many of them the other side was told.
    pub(super) told: usize,
    /// Whether it was told that none follows.
    pub(super) told_end: bool,
}

impl Gathered {
    /// Adds a candidate if it is new and not too many are known.
    pub(super) fn add(&mut self, candidate: String) {
        if self.found.len() < MOST_CANDIDATES && !self.found.contains(&candidate) {
            self.found.push(candidate);
        }
    }

    /// Those that the other side was not told yet; they count as told from now on.
    pub(super) fn news(&mut self) -> Vec<String> {
        let news = self.found.get(self.told..).unwrap_or_default().to_vec();
        self.told = self.found.len();
        news
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: &str = "candidate:1 1 udp 2130706431 192.168.1.7 5000 typ host";
    const LOOPBACK: &str = "candidate:1 1 udp 2130706431 127.0.0.1 5000 typ host";
    const REFLEXIVE: &str =
        "candidate:2 1 udp 1694498815 203.0.113.7 6000 typ srflx raddr 192.168.1.7 rport 5000";
    const RELAYED: &str =
        "candidate:3 1 udp 16777215 198.51.100.1 7000 typ relay raddr 203.0.113.7 rport 6000";

    #[test]
    fn addresses_of_interfaces_are_told_on_request() {
        let policy = |relay_only, host| Policy { relay_only, host };
        let hidden = REFLEXIVE.replace("192.168.1.7 rport 5000", "0.0.0.0 rport 0");
        assert_eq!(policy(false, false).reveal(HOST), None);
        assert_eq!(policy(false, false).reveal(LOOPBACK).as_deref(), Some(LOOPBACK));
        assert_eq!(policy(false, false).reveal(REFLEXIVE), Some(hidden));
        assert_eq!(policy(false, true).reveal(HOST).as_deref(), Some(HOST));
        assert_eq!(policy(false, true).reveal(REFLEXIVE).as_deref(), Some(REFLEXIVE));
    }

    #[test]
    fn relay_only_tells_nothing_but_relays() {
        let policy = Policy { relay_only: true, host: true };
        for candidate in [HOST, LOOPBACK, REFLEXIVE] {
            assert_eq!(policy.reveal(candidate), None);
        }
        let relayed = policy.reveal(RELAYED).unwrap();
        assert!(relayed.contains("198.51.100.1 7000") && !relayed.contains("203.0.113.7"), "{relayed}");
    }

    #[test]
    fn malformed_candidates_are_not_told() {
        for candidate in
            ["", "candidate:", "candidate:1 1 udp 1 name.local 5 typ host", "a b c d 10.0.0.1 typ"]
        {
            assert_eq!(Policy { relay_only: false, host: true }.reveal(candidate), None);
        }
    }

    #[test]
    fn candidates_are_bounded_and_told_once() {
        let mut gathered = Gathered::default();
        for port in 0..100 {
            gathered.add(port.to_string());
            gathered.add(port.to_string());
        }
        assert_eq!(gathered.news().len(), MOST_CANDIDATES);
        assert!(gathered.news().is_empty());
    }

    #[test]
    fn other_side_chooses_neither_many_addresses_nor_private_ones() {
        let line = |n: usize, address: &str| format!("a=candidate:{n} 1 udp 1 {address} 5000 typ host\r\n");
        let many: String = (0..1000).map(|n| line(n, "203.0.113.7")).collect();
        let mut any = Admission::new(AddressRule::Any);
        let kept = any.description(&format!("v=0\r\n{many}a=mid:0\r\n"));
        assert_eq!(kept.matches("a=candidate").count(), MOST_CANDIDATES);
        assert!(kept.starts_with("v=0\r\n") && kept.ends_with("a=mid:0\r\n"));
        assert!(!any.admits("1 1 udp 1 192.168.1.7 5000 typ host"), "they are counted together");
        any.reset();
        assert!(any.admits("1 1 udp 1 192.168.1.7 5000 typ host"));
        assert!(any.admits("1 1 udp 1 4f2a.local 5000 typ host"));
        let mut public = Admission::new(AddressRule::PublicOnly);
        assert!(!public.admits("1 1 udp 1 192.168.1.7 5000 typ host"));
        assert!(!public.admits("1 1 udp 1 127.0.0.1 5000 typ host"));
        assert!(!public.admits("1 1 udp 1 4f2a.local 5000 typ host"));
        assert!(public.admits("1 1 udp 1 8.8.8.8 5000 typ srflx"));
    }
}
