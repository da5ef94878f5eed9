//! How to reach an SFU: options, the signalling connection, and what its refusals mean.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use livekit_protocol as proto;
use livekit_signaling::{SignalClient, SignalError, SignalEvents, SignalOptions};

use crate::transport::TransportError;

/// The newest LiveKit signalling protocol whose duties this transport fulfils (17 and below have no negotiated
/// data channels).
const PROTOCOL: u32 = 16;
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
    /// On which local addresses media travels.
    pub bind: Bind,
    /// STUN and TURN servers in addition to those that the SFU names. Unused with loopback addresses.
    pub ice_servers: Vec<IceServer>,
    /// How many received frames may wait for the application before new ones are dropped.
    pub frame_queue: usize,
}

impl ConnectOptions {
    /// The usual options: subscribe to everything, addresses by [`Bind::Auto`], 512 frames of queue.
    #[must_use]
    pub fn new(url: impl Into<String>, token: impl Into<String>) -> Self {
        Self {
            url: url.into(),
            token: token.into(),
            auto_subscribe: true,
            bind: Bind::Auto,
            ice_servers: Vec::new(),
            frame_queue: 512,
        }
    }

    /// The local socket addresses that [`Self::bind`] means for this URL.
    pub(super) fn local_addresses(&self) -> Vec<SocketAddr> {
        match &self.bind {
            Bind::Addresses(addresses) => addresses.clone(),
            Bind::Auto if is_loopback(&self.url) => {
                vec![SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0)]
            }
            Bind::Auto => vec![
                SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0),
                SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), 0),
            ],
        }
    }
}

impl fmt::Debug for ConnectOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConnectOptions")
            .field("url", &self.url)
            .field("token", &"redacted")
            .field("auto_subscribe", &self.auto_subscribe)
            .field("bind", &self.bind)
            .field("ice_servers", &self.ice_servers)
            .field("frame_queue", &self.frame_queue)
            .finish()
    }
}

/// On which local addresses media travels.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Bind {
    /// Every interface; only `127.0.0.1` if the SFU's URL names a loopback host.
    Auto,
    /// Exactly these addresses; port 0 picks a free one.
    Addresses(Vec<SocketAddr>),
}

/// A STUN or TURN server.
#[derive(Clone, PartialEq, Eq)]
pub struct IceServer {
    /// `stun:` and `turn:` URLs. TURN over TCP or TLS is not supported; such URLs are left out.
    pub urls: Vec<String>,
    /// TURN user name; empty for STUN.
    pub username: String,
    /// TURN password; empty for STUN.
    pub credential: String,
}

impl IceServer {
    /// The same without URLs that the engine cannot use; `None` if none is left.
    pub(super) fn usable(self) -> Option<Self> {
        let urls: Vec<_> = self
            .urls
            .into_iter()
            .filter(|url| {
                let usable = (url.starts_with("stun:") || url.starts_with("turn:"))
                    && !url.to_ascii_lowercase().contains("transport=tcp");
                if !usable {
                    tracing::info!(url, "left out: only STUN and TURN over UDP are supported");
                }
                usable
            })
            .collect();
        (!urls.is_empty()).then_some(Self { urls, ..self })
    }
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

impl From<proto::IceServer> for IceServer {
    fn from(server: proto::IceServer) -> Self {
        Self { urls: server.urls, username: server.username, credential: server.credential }
    }
}

/// Opens the signalling connection (v0: two peer connections) with `token`.
pub(super) async fn open_signalling(
    options: &ConnectOptions,
    token: &str,
) -> Result<(SignalClient, proto::JoinResponse, SignalEvents), TransportError> {
    // Without a process-wide provider the TLS client panics, and an application that never chose one must not
    // learn it that way. Whoever chose before keeps their choice.
    if rustls::crypto::CryptoProvider::get_default().is_none()
        && rustls::crypto::aws_lc_rs::default_provider().install_default().is_err()
    {
        tracing::debug!("another thread chose a TLS provider first");
    }
    let mut signal = SignalOptions::default();
    signal.auto_subscribe = options.auto_subscribe;
    signal.single_peer_connection = false;
    signal.region_failover = false;
    signal.protocol_version = PROTOCOL;
    signal.client_capabilities = Vec::new();
    signal.connect_timeout = CONNECT_TIMEOUT;
    // Each step inside has a time limit; this one holds for their sum.
    tokio::time::timeout(CONNECT_TIMEOUT * 3, SignalClient::connect(&options.url, token, signal, None))
        .await
        .map_err(|_| TransportError::Timeout(CONNECT_TIMEOUT * 3, "connecting to the SFU"))?
        .map_err(refusal)
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
    fn only_usable_ice_servers_are_kept() {
        let server = |urls: &[&str]| IceServer {
            urls: urls.iter().map(|url| (*url).to_owned()).collect(),
            username: String::new(),
            credential: String::new(),
        };
        let kept =
            server(&["stun:a", "turns:b:443?transport=tcp", "turn:c?transport=TCP", "turn:d"]).usable();
        assert_eq!(kept, Some(server(&["stun:a", "turn:d"])));
        assert_eq!(server(&["turns:b:443"]).usable(), None);
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
