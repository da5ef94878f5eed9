//! Whose datagram is it? Every peer shares one UDP port.
//!
//! A STUN request names a peer by our ICE user name fragment; everything else is known by its address alone.
//! An address is learned only from a request whose MESSAGE-INTEGRITY the peer's engine has verified, so a
//! stranger's packet never leaves a trace here.

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;

use super::PeerId;

/// Addresses kept per peer; the oldest goes. A client has a few interfaces and roams now and then.
const ADDRESSES: usize = 16;

/// The table of one socket.
#[derive(Debug, Default)]
pub(crate) struct Demux {
    by_fragment: HashMap<String, PeerId>,
    by_address: HashMap<SocketAddr, PeerId>,
    peers: HashMap<PeerId, Known>,
}

#[derive(Debug, Default)]
struct Known {
    fragment: String,
    addresses: VecDeque<SocketAddr>,
}

impl Demux {
    /// The peer that an address belongs to.
    pub(crate) fn by_address(&self, address: SocketAddr) -> Option<PeerId> {
        self.by_address.get(&address).copied()
    }

    /// The peer whose user name fragment this is.
    pub(crate) fn by_fragment(&self, fragment: &str) -> Option<PeerId> {
        self.by_fragment.get(fragment).copied()
    }

    /// Sets a peer's user name fragment; an ICE restart replaces it.
    pub(crate) fn set_fragment(&mut self, peer: PeerId, fragment: String) {
        let known = self.peers.entry(peer).or_default();
        if known.fragment != fragment {
            self.by_fragment.remove(&known.fragment);
            self.by_fragment.insert(fragment.clone(), peer);
            known.fragment = fragment;
        }
    }

    /// Binds an authenticated address to a peer, away from whoever had it.
    pub(crate) fn bind(&mut self, peer: PeerId, address: SocketAddr) {
        match self.by_address.insert(address, peer) {
            Some(other) if other == peer => return,
            Some(other) => {
                if let Some(known) = self.peers.get_mut(&other) {
                    known.addresses.retain(|a| *a != address);
                }
            }
            None => {}
        }
        let known = self.peers.entry(peer).or_default();
        known.addresses.push_back(address);
        if known.addresses.len() > ADDRESSES
            && let Some(oldest) = known.addresses.pop_front()
        {
            self.by_address.remove(&oldest);
        }
    }

    /// Forgets a peer.
    pub(crate) fn remove(&mut self, peer: PeerId) {
        if let Some(known) = self.peers.remove(&peer) {
            self.by_fragment.remove(&known.fragment);
            for address in known.addresses {
                self.by_address.remove(&address);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(port: u16) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], port))
    }

    #[test]
    fn an_address_follows_the_latest_authenticated_peer() {
        let mut demux = Demux::default();
        demux.bind(PeerId(1), address(5));
        demux.bind(PeerId(2), address(5));
        assert_eq!(demux.by_address(address(5)), Some(PeerId(2)));
        demux.remove(PeerId(1));
        assert_eq!(demux.by_address(address(5)), Some(PeerId(2)));
        demux.remove(PeerId(2));
        assert_eq!(demux.by_address(address(5)), None);
    }

    #[test]
    fn a_restart_replaces_the_fragment() {
        let mut demux = Demux::default();
        demux.set_fragment(PeerId(1), "old".to_owned());
        demux.set_fragment(PeerId(1), "new".to_owned());
        assert_eq!(demux.by_fragment("old"), None);
        assert_eq!(demux.by_fragment("new"), Some(PeerId(1)));
        demux.remove(PeerId(1));
        assert_eq!(demux.by_fragment("new"), None);
    }

    #[test]
    fn a_roaming_peer_keeps_a_bounded_number_of_addresses() {
        let mut demux = Demux::default();
        for port in 1..=1000 {
            demux.bind(PeerId(1), address(port));
            demux.bind(PeerId(1), address(port));
        }
        assert_eq!(demux.by_address.len(), ADDRESSES);
        assert_eq!(demux.by_address(address(1000)), Some(PeerId(1)));
        demux.remove(PeerId(1));
        assert!(demux.by_address.is_empty() && demux.peers.is_empty() && demux.by_fragment.is_empty());
    }
}
