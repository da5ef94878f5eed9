//! From a server name to the places to connect to (Matrix server-server API, §Resolving server names).

use super::{
    resolver::{Resolve, ResolveError, SrvRecord},
    server_name::{Host, ServerName},
};

/// The port of federation when nothing names another.
const FEDERATION_PORT: u16 = 8448;
/// How many SRV targets we try. A caller's DNS may list more; they would only keep us busy.
const MAX_TARGETS: usize = 8;

/// One place to connect to; its addresses are looked up, and checked, when connecting.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Destination {
    pub(crate) host: Host,
    pub(crate) port: u16,
}

/// The places where `name` is served, first choice first; `.well-known` has been dealt with before.
///
/// `random` gives a number in `0..=max`, for the weights of RFC 2782.
pub(crate) async fn destinations(
    name: &ServerName,
    resolver: &dyn Resolve,
    random: impl FnMut(u32) -> u32,
) -> Result<Vec<Destination>, ResolveError> {
    let Host::Dns(host) = name.host() else {
        return Ok(vec![direct(name, FEDERATION_PORT)]);
    };
    if name.port().is_some() {
        return Ok(vec![direct(name, FEDERATION_PORT)]);
    }
    for service in ["_matrix-fed._tcp", "_matrix._tcp"] {
        match resolver.services(&format!("{service}.{host}")).await {
            Ok(records) => {
                let targets = in_order(records, random);
                return if targets.is_empty() { Err(ResolveError::NotFound) } else { Ok(targets) };
            }
            Err(ResolveError::NotFound) => {}
            Err(ResolveError::Failed(_)) => break,
        }
    }
    Ok(vec![direct(name, FEDERATION_PORT)])
}

/// `name` as it stands, on its own port or else on `default_port`.
pub(crate) fn direct(name: &ServerName, default_port: u16) -> Destination {
    Destination { host: name.host().clone(), port: name.port().unwrap_or(default_port) }
}

/// The order of RFC 2782: by priority, then a weighted draw. A record whose target is the root says that
/// there is no such service and is dropped; taken literally it would be an empty name, which some systems
/// read as loopback.
fn in_order(mut records: Vec<SrvRecord>, mut random: impl FnMut(u32) -> u32) -> Vec<Destination> {
    records.retain(|r| !r.target.is_empty());
    // Within one priority, records without weight come first in the list so that they keep a small chance.
    records.sort_by_key(|r| (r.priority, r.weight));
    let mut ordered = Vec::new();
    while ordered.len() < MAX_TARGETS {
        let Some(priority) = records.first().map(|r| r.priority) else { break };
        let group = records.iter().take_while(|r| r.priority == priority);
        let sum = group.clone().map(|r| u32::from(r.weight)).sum();
        let mut drawn = random(sum);
        let mut chosen = 0;
        for (i, record) in group.enumerate() {
            chosen = i;
            match drawn.checked_sub(u32::from(record.weight)) {
                Some(rest) if rest > 0 => drawn = rest,
                _ => break,
            }
        }
        let SrvRecord { target, port, .. } = records.remove(chosen);
        // A target is a DNS name by definition; one that looks like an address is not looked up but used, and
        // the egress check sees it either way.
        let host = target.parse().map_or(Host::Dns(target), Host::Ip);
        ordered.push(Destination { host, port });
    }
    ordered
}

#[cfg(test)]
mod tests {
    use std::{collections::HashMap, net::SocketAddr};

    use async_trait::async_trait;
    use proptest::prelude::*;

    use super::*;

    #[derive(Default)]
    struct Zone(HashMap<&'static str, Result<Vec<SrvRecord>, ()>>);

    #[async_trait]
    impl Resolve for Zone {
        async fn addresses(&self, _: &str, _: u16) -> Result<Vec<SocketAddr>, ResolveError> {
            panic!("addresses are looked up when connecting, not here")
        }

        async fn services(&self, name: &str) -> Result<Vec<SrvRecord>, ResolveError> {
            match self.0.get(name) {
                Some(Ok(records)) => Ok(records.clone()),
                Some(Err(())) => Err(ResolveError::Failed("servfail".into())),
                None => Err(ResolveError::NotFound),
            }
        }
    }

    fn srv(priority: u16, weight: u16, target: &str, port: u16) -> SrvRecord {
        SrvRecord { priority, weight, port, target: target.to_owned() }
    }

    async fn resolved(name: &str, zone: &Zone) -> Result<Vec<String>, ResolveError> {
        let found = destinations(&name.parse().unwrap(), zone, |_| 0).await?;
        Ok(found.into_iter().map(|d| format!("{}:{}", d.host, d.port)).collect())
    }

    #[tokio::test]
    async fn literals_and_ports_are_taken_at_their_word() {
        let zone = Zone(HashMap::from([("_matrix-fed._tcp.hs.org", Ok(vec![srv(0, 0, "elsewhere", 1)]))]));
        for (name, expected) in [
            ("1.2.3.4", "1.2.3.4:8448"),
            ("1.2.3.4:99", "1.2.3.4:99"),
            ("[2001:db8::1]", "[2001:db8::1]:8448"),
            ("[2001:db8::1]:7", "[2001:db8::1]:7"),
            ("hs.org:443", "hs.org:443"),
        ] {
            assert_eq!(resolved(name, &zone).await.unwrap(), [expected]);
        }
    }

    #[tokio::test]
    async fn srv_names_are_tried_new_then_old_then_the_name_itself() {
        let mut zone = Zone::default();
        assert_eq!(resolved("hs.org", &zone).await.unwrap(), ["hs.org:8448"]);
        zone.0.insert("_matrix._tcp.hs.org", Ok(vec![srv(0, 0, "old.hs.org", 1)]));
        assert_eq!(resolved("hs.org", &zone).await.unwrap(), ["old.hs.org:1"]);
        zone.0.insert("_matrix-fed._tcp.hs.org", Ok(vec![srv(20, 0, "b", 2), srv(10, 0, "a", 1)]));
        assert_eq!(resolved("hs.org", &zone).await.unwrap(), ["a:1", "b:2"]);
    }

    #[tokio::test]
    async fn a_failing_name_server_falls_back_to_the_default_port() {
        let zone = Zone(HashMap::from([
            ("_matrix-fed._tcp.hs.org", Err(())),
            ("_matrix._tcp.hs.org", Ok(vec![srv(0, 0, "old.hs.org", 1)])),
        ]));
        assert_eq!(resolved("hs.org", &zone).await.unwrap(), ["hs.org:8448"]);
    }

    #[tokio::test]
    async fn a_root_target_means_no_service() {
        let zone = Zone(HashMap::from([("_matrix-fed._tcp.hs.org", Ok(vec![srv(0, 0, "", 0)]))]));
        assert!(matches!(resolved("hs.org", &zone).await, Err(ResolveError::NotFound)));
    }

    #[test]
    fn weights_decide_within_a_priority() {
        let records = || vec![srv(1, 10, "light", 1), srv(1, 90, "heavy", 1), srv(0, 0, "first", 1)];
        let first_of_group = |draw: u32| {
            let hosts = in_order(records(), |max| draw.min(max));
            assert_eq!(hosts[0].host, Host::Dns("first".into()));
            hosts[1].host.to_string()
        };
        assert_eq!(first_of_group(0), "light");
        assert_eq!(first_of_group(10), "light");
        assert_eq!(first_of_group(11), "heavy");
        assert_eq!(first_of_group(100), "heavy");
    }

    proptest! {
        #[test]
        fn every_record_comes_out_once_and_by_priority(
            input in prop::collection::vec((0u16..3, any::<u16>()), 0..12), seed in any::<u32>(),
        ) {
            let records: Vec<_> = (0u16..).zip(&input).map(|(i, (p, w))| srv(*p, *w, "t", i)).collect();
            let ordered = in_order(records, |max| seed % max.saturating_add(1));
            prop_assert_eq!(ordered.len(), input.len().min(MAX_TARGETS));
            let priorities: Vec<_> = ordered.iter().map(|d| input[usize::from(d.port)].0).collect();
            prop_assert!(priorities.is_sorted());
            let mut ports: Vec<_> = ordered.iter().map(|d| d.port).collect();
            ports.sort_unstable();
            ports.dedup();
            prop_assert_eq!(ports.len(), ordered.len());
        }
    }
}
