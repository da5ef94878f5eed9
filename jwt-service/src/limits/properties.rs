//! What must hold for any `X-Forwarded-For`, and for any list of trusted proxies.

use std::net::IpAddr;

use super::{MAX_HOPS, Network, TrustedProxies, hop_address, network};
use crate::fuzzing::{line, text};

/// The first line is what the operator trusts, the second the address that the request came from, the rest are
/// the header's lines.
pub(crate) fn forwarded_for(data: &[u8]) {
    let (trusted, rest) = line(data);
    let (peer, rest) = line(rest);
    let rest = text(rest);
    let lines: Vec<&str> = rest.split('\n').collect();
    let Ok(trusted) = text(trusted).parse::<TrustedProxies>() else { return };
    trusted.0.iter().for_each(|network| holds(network, &lines));
    let peer = text(peer).parse::<IpAddr>().ok();
    let client = trusted.client(peer, lines.iter().copied());
    if let Some(peer) = peer.filter(|peer| !trusted.includes(*peer)) {
        assert_eq!(client, Some(peer), "a stranger's word is taken");
        return;
    }
    assert_eq!(client, nearest_stranger(&trusted, peer, &lines), "another reading of it");
    let Some(client) = client else { return };
    assert!(
        Some(client) == peer || rest.split(['\n', ',']).any(|hop| hop_address(hop.trim()) == Some(client))
    );
    assert_eq!(network(network(client)), network(client));
    if !trusted.includes(client) {
        // Whatever a client writes itself stands before what its proxy adds.
        for claim in ["192.0.2.66", "unknown", "10.0.0.1, ::1"] {
            let with_claim = format!("{claim}, {rest}");
            assert_eq!(trusted.client(peer, with_claim.split('\n')), Some(client), "{claim} is believed");
            let before = [&[claim][..], &lines].concat();
            assert_eq!(trusted.client(peer, before.into_iter()), Some(client), "{claim} is believed");
        }
    }
}

/// All hops, the nearest first, as far as they are believed.
fn nearest_stranger(trusted: &TrustedProxies, peer: Option<IpAddr>, lines: &[&str]) -> Option<IpAddr> {
    let all = lines.join(",");
    let hops = all.split(',').map(|hop| hop_address(hop.trim())).collect::<Vec<_>>();
    let named = hops.iter().rev().take(MAX_HOPS).map_while(|hop| *hop).collect::<Vec<_>>();
    let stranger = named.iter().find(|hop| !trusted.includes(**hop));
    stranger.or_else(|| named.last()).copied().or(peer)
}

fn holds(network: &Network, lines: &[&str]) {
    assert_eq!(network.to_string().parse().as_ref(), Ok(network));
    assert!(network.includes(network.address));
    for address in lines.iter().filter_map(|line| hop_address(line.trim())) {
        let same_bits = match (network.address, address) {
            (IpAddr::V4(a), IpAddr::V4(b)) => same(&a.octets(), &b.octets(), network.prefix),
            (IpAddr::V6(a), IpAddr::V6(b)) => same(&a.octets(), &b.octets(), network.prefix),
            _ => false,
        };
        assert_eq!(network.includes(address), same_bits, "{network} {address}");
    }
}

/// Whether two addresses have the same first bits, bit by bit.
fn same(a: &[u8], b: &[u8], bits: u8) -> bool {
    (0..usize::from(bits)).all(|bit| (a[bit / 8] ^ b[bit / 8]) & (0x80 >> (bit % 8)) == 0)
}
