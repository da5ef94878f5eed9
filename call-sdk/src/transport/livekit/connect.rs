//! How to reach an SFU: options, the signalling connection, and what its refusals mean.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use livekit_protocol as proto;
use livekit_signaling::{SignalClient, SignalError, SignalEvents, SignalOptions};

use super::net::{self, Dial};
use crate::{
    addresses::AddressRule,
    transport::{
        TransportError,
        rtc::{Bind, IceServer, Network},
    },
};

/// The newest LiveKit signalling protocol whose duties this transport fulfils: from 18 on, data channels are negotiated
/// by number.
const PROTOCOL: u32 = 17;
/// One attempt to open the WebSocket and get the first answer.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Where and how to connect.
#[derive(Clone)]
pub struct ConnectOptions {
    /// The SFU's WebSocket URL (`ws`, `wss`, `http` or `https`), as the authorisation service answered it.
    pub url: String,
    /// The access token that the authorisation service issued.
    pub token: String,
    /// Whether the SFU sends every track without being asked (true by default).
    pub auto_subscribe: bool,
    /// Whether to try signalling v1, with one peer connection for both directions, before v0 with two (true by
    /// default). Servers without v1 are noticed.
    pub single_peer_connection: bool,
    /// On which local addresses media travels.
    pub bind: Bind,
    /// STUN and TURN servers in addition to those that the SFU names. Unused with loopback addresses.
    pub ice_servers: Vec<IceServer>,
    /// Whether media travels through TURN servers only (false by default): the SFU does not learn our address.
    pub relay_only: bool,
    /// TLS of the signalling connection and of TURN servers; `None`: trust the system's roots.
    pub tls: Option<Arc<rustls::ClientConfig>>,
    /// Which addresses the signalling connection may go to.
    pub addresses: AddressRule,
}

impl ConnectOptions {
    /// The usual options: subscribe to everything, addresses by [`Bind::Auto`].
    #[must_use]
    pub fn new(url: impl Into<String>, token: impl Into<String>) -> Self {
        Self {
            url: url.into(),
            token: token.into(),
            auto_subscribe: true,
            single_peer_connection: true,
            bind: Bind::Auto,
            ice_servers: Vec::new(),
            relay_only: false,
            tls: None,
            addresses: AddressRule::Any,
        }
    }

    /// How the signalling connection is opened, the first time and on resuming.
    pub(super) fn dial(&self) -> Dial {
        Dial { tls: self.tls.clone(), addresses: self.addresses }
    }

    /// How the peer connections may use the network.
    pub(super) fn network(&self) -> Network {
        Network {
            addresses: self.local_addresses(),
            relay_only: self.relay_only,
            mesh: false,
            tls: self.tls.clone(),
            rule: self.addresses,
        }
    }

    /// The local socket addresses that [`Self::bind`] means for this URL.
    fn local_addresses(&self) -> Vec<SocketAddr> {
        match &self.bind {
            Bind::Auto if is_loopback(&self.url) => {
                vec![SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0)]
            }
            bind => bind.addresses(),
        }
    }
}

impl fmt::Debug for ConnectOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConnectOptions")
            .field("url", &self.url)
            .field("token", &"redacted")
            .field("auto_subscribe", &self.auto_subscribe)
            .field("single_peer_connection", &self.single_peer_connection)
            .field("bind", &self.bind)
            .field("ice_servers", &self.ice_servers)
            .field("relay_only", &self.relay_only)
            .finish()
    }
}

impl From<proto::IceServer> for IceServer {
    fn from(server: proto::IceServer) -> Self {
        Self { urls: server.urls, username: server.username, credential: server.credential }
    }
}

/// Opens the signalling connection with `token`: v1 with `offer` if there is one, and v0 without it or if the server has
/// no v1.
pub(super) async fn open_signalling(
    options: &ConnectOptions,
    token: &str,
    offer: Option<proto::SessionDescription>,
) -> Result<(SignalClient, proto::JoinResponse, SignalEvents), TransportError> {
    let mut signal = SignalOptions::default();
    signal.auto_subscribe = options.auto_subscribe;
    signal.single_peer_connection = offer.is_some();
    signal.region_failover = false;
    signal.protocol_version = PROTOCOL;
    signal.client_capabilities = Vec::new();
    signal.connect_timeout = CONNECT_TIMEOUT;
    // Each step inside has a time limit; this one holds for their sum.
    let connecting = net::with(options.dial(), SignalClient::connect(&options.url, token, signal, offer));
    let (client, join, events) = tokio::time::timeout(CONNECT_TIMEOUT * 3, connecting)
        .await
        .map_err(|_| TransportError::Timeout(CONNECT_TIMEOUT * 3, "connecting to the SFU"))?
        .map_err(refusal)?;
    // The signalling client needs our sid to resume the connection.
    if join.participant.as_ref().is_none_or(|own| own.sid.is_empty()) {
        return Err(TransportError::Signal("the SFU's join response does not name us".into()));
    }
    Ok((client, join, events))
}

/// What a failed connection means for the caller.
fn refusal(error: SignalError) -> TransportError {
    let (status, message) = match &error {
        SignalError::Client(status, message) | SignalError::Server(status, message) => {
            (status.as_u16(), message.as_str())
        }
        SignalError::Handshake { status } => (status.as_u16(), ""),
        SignalError::Timeout(_) => {
            return TransportError::Timeout(CONNECT_TIMEOUT, "opening the signalling connection");
        }
        _ => return TransportError::Signal(Box::new(error)),
    };
    match status {
        401 | 403 => TransportError::Unauthorised { status, message: shortened(message) },
        404 if message.contains("requested room does not exist") => TransportError::RoomCreationRestricted,
        429 | 503 => TransportError::Capacity { status },
        _ => TransportError::Signal(Box::new(error)),
    }
}

/// The first part of a server's text; it may be a page of HTML.
fn shortened(message: &str) -> String {
    message.trim().chars().take(300).collect()
}

fn is_loopback(url: &str) -> bool {
    let Ok(url) = url::Url::parse(url) else { return false };
    match url.host() {
        // `ws` is a special scheme, so IP addresses come parsed.
        Some(url::Host::Domain(name)) => {
            name.eq_ignore_ascii_case("localhost") || name.to_ascii_lowercase().ends_with(".localhost")
        }
        Some(url::Host::Ipv4(ip)) => ip.is_loopback(),
        Some(url::Host::Ipv6(ip)) => ip.is_loopback(),
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_urls_bind_loopback_only() {
        for url in ["ws://localhost:7880", "ws://127.0.0.1:7880/x", "wss://[::1]", "http://127.9.9.9"] {
            let options = ConnectOptions::new(url, "t");
            assert_eq!(options.local_addresses(), [SocketAddr::from((Ipv4Addr::LOCALHOST, 0))], "{url}");
        }
        for url in ["wss://sfu.example.org", "ws://10.0.0.1", "ws://localhost.example.org", "nonsense"] {
            assert_eq!(ConnectOptions::new(url, "t").local_addresses().len(), 2, "{url}");
        }
    }

    #[test]
    fn secrets_do_not_print() {
        let mut options = ConnectOptions::new("ws://x", "verysecret");
        options.ice_servers = vec![IceServer {
            urls: vec!["turn:x".into()],
            username: "u".into(),
            credential: "verysecret".into(),
        }];
        assert!(!format!("{options:?}").contains("verysecret"));
    }

    #[test]
    fn refusals_have_meanings() {
        let status = |code: u16| http_status(code);
        let client = |code, text: &str| refusal(SignalError::Client(status(code), text.to_owned()));
        assert!(matches!(client(401, "bad"), TransportError::Unauthorised { status: 401, .. }));
        assert!(matches!(client(403, ""), TransportError::Unauthorised { status: 403, .. }));
        assert!(matches!(
            client(404, "requested room does not exist\n"),
            TransportError::RoomCreationRestricted
        ));
        assert!(matches!(client(404, "page not found"), TransportError::Signal(_)));
        assert!(matches!(client(429, ""), TransportError::Capacity { status: 429 }));
        assert!(matches!(
            refusal(SignalError::Server(status(503), String::new())),
            TransportError::Capacity { status: 503 }
        ));
        assert!(matches!(
            refusal(SignalError::Handshake { status: status(401) }),
            TransportError::Unauthorised { .. }
        ));
        assert!(matches!(refusal(SignalError::Connection("refused".into())), TransportError::Signal(_)));
    }

    /// The status type of the signalling crate, which is the `http` crate's, as reqwest exports it.
    fn http_status(code: u16) -> reqwest::StatusCode {
        reqwest::StatusCode::from_u16(code).unwrap()
    }
}
