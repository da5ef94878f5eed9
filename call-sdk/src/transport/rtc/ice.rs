//! STUN and TURN servers, and how the network may be used.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
};

use super::turn_stream::{StreamServer, TurnStream};
use crate::{
    addresses::AddressRule,
    tls::{self, TlsOptions},
};

/// A STUN or TURN server.
#[derive(Clone, PartialEq, Eq)]
pub struct IceServer {
    /// `stun:`, `turn:` and `turns:` URLs (RFC 7064, RFC 7065). TURN over DTLS is left out: no other client has it.
    pub urls: Vec<String>,
    /// TURN user name; empty for STUN.
    pub username: String,
    /// TURN password; empty for STUN.
    pub credential: String,
}

/// On which local addresses media travels.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Bind {
    /// Every interface; only `127.0.0.1` if the SFU's URL names a loopback host.
    #[default]
    Auto,
    /// Exactly these addresses; port 0 picks a free one.
    Addresses(Vec<SocketAddr>),
}

impl Bind {
    /// The socket addresses that it means away from this machine.
    pub(in crate::transport) fn addresses(&self) -> Vec<SocketAddr> {
        match self {
            Self::Addresses(addresses) => addresses.clone(),
            Self::Auto => vec![
                SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0),
                SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), 0),
            ],
        }
    }
}

/// How a peer connection may use the network.
#[derive(Clone, Default)]
pub(in crate::transport) struct Network {
    /// The local addresses that media travels from.
    pub(in crate::transport) addresses: Vec<SocketAddr>,
    /// Media travels through TURN servers only.
    pub(in crate::transport) relay_only: bool,
    /// The other end is a member, not an SFU.
    pub(in crate::transport) mesh: bool,
    /// TLS towards TURN servers; `None`: trust the system's roots.
    pub(in crate::transport) tls: Option<Arc<rustls::ClientConfig>>,
    /// Which addresses a TURN server may have that is reached over TCP or TLS.
    pub(in crate::transport) rule: AddressRule,
}

impl Network {
    /// Whether no server is needed, and none may be asked: a connection within this machine.
    pub(super) fn is_local(&self) -> bool {
        !self.relay_only && self.addresses.iter().all(|address| address.ip().is_loopback())
    }
}

/// The ICE servers of a connection as its engine reaches them.
#[derive(Debug, Default)]
pub(super) struct Reachable {
    /// With the port that leads to each TURN server over a stream.
    streams: Vec<(StreamServer, TurnStream)>,
}

impl Reachable {
    /// The servers that the engine is to use. Streams to servers that are not among them any more are closed.
    pub(super) async fn update(&mut self, network: &Network, servers: Vec<IceServer>) -> Vec<IceServer> {
        let mut kept = Vec::new();
        let mut usable = Vec::new();
        for mut server in if network.is_local() { Vec::new() } else { servers } {
            let mut urls = Vec::new();
            for url in server.urls {
                if is_over_udp(&url) {
                    urls.push(url);
                } else if let Some(place) = StreamServer::parse(&url) {
                    match self.stream(&mut kept, network, &place).await {
                        Ok(url) => urls.push(url),
                        Err(error) => {
                            tracing::warn!(server = %place, error, "a TURN server cannot be used");
                        }
                    }
                } else {
                    tracing::info!(url, "this kind of ICE server is not supported; it is left out");
                }
            }
            if !urls.is_empty() {
                server.urls = urls;
                usable.push(server);
            }
        }
        self.streams = kept;
        usable
    }

    async fn stream(
        &mut self,
        kept: &mut Vec<(StreamServer, TurnStream)>,
        network: &Network,
        place: &StreamServer,
    ) -> Result<String, String> {
        if let Some((_, stream)) = kept.iter().find(|(of, _)| of == place) {
            return Ok(stream.url());
        }
        let stream = match self.streams.iter().position(|(of, _)| of == place) {
            Some(known) => self.streams.swap_remove(known).1,
            None => {
                let tls = match &network.tls {
                    Some(tls) => Arc::clone(tls),
                    None => tls::client_config(&TlsOptions::default()).map_err(|error| error.to_string())?,
                };
                TurnStream::open(place.clone(), tls, network.rule).await.map_err(|error| error.to_string())?
            }
        };
        let url = stream.url();
        kept.push((place.clone(), stream));
        Ok(url)
    }
}

fn is_over_udp(url: &str) -> bool {
    let url = url.to_ascii_lowercase();
    (url.starts_with("stun:") || url.starts_with("turn:")) && !url.contains("transport=tcp")
}

impl fmt::Debug for IceServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IceServer")
            .field("urls", &self.urls)
            .field("username", &self.username)
            .field("credential", &"redacted")
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server(urls: &[&str]) -> IceServer {
        IceServer {
            urls: urls.iter().map(|url| (*url).to_owned()).collect(),
            username: "u".into(),
            credential: "verysecret".into(),
        }
    }

    #[tokio::test]
    async fn turn_servers_over_streams_are_reached_through_a_local_port() {
        let network = Network { addresses: vec!["0.0.0.0:0".parse().unwrap()], ..Network::default() };
        let servers = [
            server(&["stun:a", "turns:b:443?transport=tcp", "turn:d", "turns:e?transport=udp"]),
            server(&["turns:b:443"]),
            server(&["turns:b:443?transport=udp"]),
        ];
        let mut reachable = Reachable::default();
        let usable = reachable.update(&network, servers.to_vec()).await;
        let port = usable[1].urls[0].clone();
        assert!(port.starts_with("turn:127.0.0.1:"), "{port}");
        assert_eq!(usable, [server(&["stun:a", &port, "turn:d"]), server(&[&port])]);
        // The same servers again keep their ports, others close them.
        assert_eq!(reachable.update(&network, servers[1..].to_vec()).await[0].urls, [port]);
        assert_eq!(reachable.update(&network, vec![server(&["turn:d"])]).await, [server(&["turn:d"])]);
        assert!(reachable.streams.is_empty());
    }

    #[tokio::test]
    async fn connection_within_the_machine_asks_no_server() {
        let mut network = Network { addresses: vec!["127.0.0.1:0".parse().unwrap()], ..Network::default() };
        let asked = Reachable::default().update(&network, vec![server(&["turn:d"])]).await;
        assert!(asked.is_empty());
        network.relay_only = true;
        assert_eq!(Reachable::default().update(&network, vec![server(&["turn:d"])]).await.len(), 1);
    }

    #[test]
    fn credential_does_not_print() {
        assert!(!format!("{:?}", server(&["turn:x"])).contains("verysecret"));
    }
}
