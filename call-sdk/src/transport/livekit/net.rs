//! The sockets of SFU signalling, over the TLS configuration of the call.
//!
//! livekit-signaling takes its sockets from a process-wide register, which has room for one client. Ours reads what a
//! connection may do from the task that opens it ([`with`]), so that two calls of one process can differ.

use std::{
    net::{IpAddr, SocketAddr},
    sync::{Arc, Once, OnceLock},
    time::Duration,
};

use async_trait::async_trait;
use futures_util::{
    SinkExt as _, StreamExt as _,
    stream::{SplitSink, SplitStream},
};
use livekit_net::{
    Header, HttpClient, HttpMethod, HttpResponse, TransportError, WsClient, WsConnectResult, WsConnection,
};
use rustls::{ClientConfig, pki_types::ServerName};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    sync::Mutex,
};
use tokio_rustls::TlsConnector;
use tokio_tungstenite::{
    WebSocketStream, client_async_with_config,
    tungstenite::{
        Error, Message,
        client::IntoClientRequest as _,
        error::ProtocolError,
        http::{HeaderName, HeaderValue},
        protocol::WebSocketConfig,
    },
};
use url::{Host, Url};

use crate::{
    addresses::AddressRule,
    tls::{self, TlsOptions},
};

/// Longest signalling message that is read. A join answer lists every participant of the room.
const MAX_MESSAGE: usize = 16 * 1024 * 1024;
/// Longest answer to a plain request: it only explains a refusal.
const MAX_ANSWER: usize = 64 * 1024;
/// One of several addresses of a name.
const ADDRESS_TIMEOUT: Duration = Duration::from_secs(2);

/// How connections are opened.
#[derive(Clone, Default)]
pub(super) struct Dial {
    /// TLS without ALPN; `None`: trust the system's roots.
    pub(super) tls: Option<Arc<ClientConfig>>,
    /// Which addresses may be connected to.
    pub(super) addresses: AddressRule,
}

tokio::task_local! {
    static DIAL: Dial;
}

/// Runs `connecting`, whose signalling connections are opened by `dial`.
pub(super) async fn with<F: Future>(dial: Dial, connecting: F) -> F::Output {
    static REGISTER: Once = Once::new();
    // If the application registered a client of its own before, that one stays.
    REGISTER.call_once(|| {
        livekit_net::set_ws_client(Arc::new(Sockets));
        livekit_net::set_http_client(Arc::new(Sockets));
    });
    DIAL.scope(dial, connecting).await
}

impl Dial {
    /// Outside of [`with`] the application itself uses LiveKit's crates: the system's roots and any address.
    fn current() -> Self {
        DIAL.try_with(Clone::clone).unwrap_or_default()
    }

    fn tls(&self) -> Result<Arc<ClientConfig>, TransportError> {
        static SYSTEM: OnceLock<Result<Arc<ClientConfig>, String>> = OnceLock::new();
        let system = || tls::client_config(&TlsOptions::default()).map_err(|error| error.to_string());
        match &self.tls {
            Some(tls) => Ok(Arc::clone(tls)),
            None => SYSTEM.get_or_init(system).clone().map_err(TransportError::Other),
        }
    }
}

struct Sockets;

#[async_trait]
impl WsClient for Sockets {
    async fn connect(
        &self,
        url: String,
        headers: Vec<Header>,
        timeout_ms: u64,
    ) -> Result<WsConnectResult, TransportError> {
        let dial = Dial::current();
        tokio::time::timeout(Duration::from_millis(timeout_ms), open(&dial, &url, &headers))
            .await
            .map_err(|_| TransportError::Timeout)?
            .map(|connection| WsConnectResult { connection })
    }
}

async fn open(dial: &Dial, url: &str, headers: &[Header]) -> Result<Arc<dyn WsConnection>, TransportError> {
    let failed = |error: &dyn std::error::Error| TransportError::Connection(error.to_string());
    let url = Url::parse(url).map_err(|e| failed(&e))?;
    let mut request = url.as_str().into_client_request().map_err(|e| failed(&e))?;
    for Header { name, value } in headers {
        let name: HeaderName = name.parse().map_err(|e| failed(&e))?;
        request.headers_mut().insert(name, HeaderValue::from_str(value).map_err(|e| failed(&e))?);
    }
    let (Some(host), Some(port)) = (url.host(), url.port_or_known_default()) else {
        return Err(TransportError::Connection("the URL names no host".to_owned()));
    };
    let stream = reach(&host, port, dial.addresses).await?;
    if url.scheme() != "wss" {
        return Ok(Arc::new(Socket::start(request, stream).await?));
    }
    let name = match host {
        Host::Domain(name) => ServerName::try_from(name.to_owned()).map_err(|e| failed(&e))?,
        Host::Ipv4(address) => ServerName::from(IpAddr::from(address)),
        Host::Ipv6(address) => ServerName::from(IpAddr::from(address)),
    };
    let stream = TlsConnector::from(dial.tls()?).connect(name, stream).await.map_err(|e| failed(&e))?;
    Ok(Arc::new(Socket::start(request, stream).await?))
}

/// Connects to the first address that answers.
async fn reach(host: &Host<&str>, port: u16, rule: AddressRule) -> Result<TcpStream, TransportError> {
    let addresses: Vec<SocketAddr> = match host {
        Host::Ipv4(address) => vec![(*address, port).into()],
        Host::Ipv6(address) => vec![(*address, port).into()],
        Host::Domain(name) => tokio::net::lookup_host((*name, port))
            .await
            .map_err(|e| TransportError::Connection(format!("the name {name} cannot be resolved: {e}")))?
            .collect(),
    };
    let mut cause = format!("{host} has no address that may be connected to");
    for address in addresses.into_iter().filter(|address| rule.permits(address.ip())) {
        match tokio::time::timeout(ADDRESS_TIMEOUT, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => {
                // Signalling is small messages that others wait for.
                let _ = stream.set_nodelay(true);
                return Ok(stream);
            }
            Ok(Err(error)) => cause = format!("{address}: {error}"),
            Err(_) => cause = format!("{address}: no answer"),
        }
    }
    Err(TransportError::Connection(cause))
}

/// One WebSocket.
struct Socket<S> {
    writer: Mutex<SplitSink<WebSocketStream<S>, Message>>,
    reader: Mutex<SplitStream<WebSocketStream<S>>>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Socket<S> {
    async fn start(
        request: tokio_tungstenite::tungstenite::handshake::client::Request,
        stream: S,
    ) -> Result<Self, TransportError> {
        let config =
            WebSocketConfig::default().max_message_size(Some(MAX_MESSAGE)).max_frame_size(Some(MAX_MESSAGE));
        let (socket, _) =
            client_async_with_config(request, stream, Some(config)).await.map_err(|error| match error {
                Error::Http(answer) => TransportError::Http { status: answer.status().as_u16() },
                error => TransportError::Connection(error.to_string()),
            })?;
        let (writer, reader) = socket.split();
        Ok(Self { writer: Mutex::new(writer), reader: Mutex::new(reader) })
    }
}

#[async_trait]
impl<S: AsyncRead + AsyncWrite + Unpin + Send + 'static> WsConnection for Socket<S> {
    async fn send(&self, frame: Vec<u8>) -> Result<(), TransportError> {
        let mut writer = self.writer.lock().await;
        writer
            .send(Message::Binary(frame.into()))
            .await
            .map_err(|e| TransportError::Connection(e.to_string()))
    }

    async fn recv(&self) -> Result<Option<Vec<u8>>, TransportError> {
        let mut reader = self.reader.lock().await;
        loop {
            match reader.next().await {
                Some(Ok(Message::Binary(data))) => return Ok(Some(data.into())),
                // Reading on answers pings. LiveKit sends no text to clients that speak protobuf.
                Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Text(_) | Message::Frame(_))) => {}
                Some(Ok(Message::Close(_))) | None => return Ok(None),
                Some(Err(
                    Error::ConnectionClosed
                    | Error::AlreadyClosed
                    | Error::Protocol(ProtocolError::ResetWithoutClosingHandshake),
                )) => return Ok(None),
                Some(Err(error)) => return Err(TransportError::Connection(error.to_string())),
            }
        }
    }

    async fn close(&self) {
        let _ = self.writer.lock().await.close().await;
    }
}

#[async_trait]
impl HttpClient for Sockets {
    /// Only asks the SFU to explain a refusal.
    async fn request(
        &self,
        method: HttpMethod,
        url: String,
        headers: Vec<Header>,
        body: Option<Vec<u8>>,
    ) -> Result<HttpResponse, TransportError> {
        let failed = |error: reqwest::Error| TransportError::Connection(error.without_url().to_string());
        let dial = Dial::current();
        let url = Url::parse(&url).map_err(|e| TransportError::Connection(e.to_string()))?;
        // Names are checked when they are resolved.
        let address = match url.host() {
            Some(Host::Ipv4(address)) => Some(IpAddr::from(address)),
            Some(Host::Ipv6(address)) => Some(IpAddr::from(address)),
            Some(Host::Domain(_)) | None => None,
        };
        if address.is_some_and(|address| !dial.addresses.permits(address)) {
            return Err(TransportError::Connection("a private address".to_owned()));
        }
        let http = crate::foci::service_client(&dial.tls()?, dial.addresses).map_err(failed)?;
        let method = match method {
            HttpMethod::Get => reqwest::Method::GET,
            HttpMethod::Post => reqwest::Method::POST,
        };
        let mut request = http.request(method, url).body(body.unwrap_or_default());
        for Header { name, value } in headers {
            request = request.header(name, value);
        }
        let mut answer = request.send().await.map_err(failed)?;
        let headers = answer.headers().iter().filter_map(|(name, value)| {
            Some(Header { name: name.to_string(), value: value.to_str().ok()?.to_owned() })
        });
        let (status, headers) = (answer.status().as_u16(), headers.collect());
        let mut body = Vec::new();
        while let Some(chunk) = answer.chunk().await.map_err(failed)? {
            body.extend_from_slice(&chunk);
            if body.len() > MAX_ANSWER {
                body.truncate(MAX_ANSWER);
                break;
            }
        }
        Ok(HttpResponse { status, headers, body })
    }
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "the servers of the tests are tasks")]
mod tests {
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpListener,
    };

    use super::*;

    /// A WebSocket server that sends every message back, with a certificate of its own authority.
    async fn echo() -> (String, Dial) {
        let (roots, server) = tls::testing::authority();
        let acceptor = tokio_rustls::TlsAcceptor::from(server);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("wss://localhost:{}/rtc", listener.local_addr().unwrap().port());
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let Ok(stream) = acceptor.accept(stream).await else { continue };
                tokio::spawn(async move {
                    let mut socket = tokio_tungstenite::accept_async(stream).await.unwrap();
                    while let Some(Ok(message)) = socket.next().await {
                        if message.is_binary() {
                            socket.send(Message::Ping(Default::default())).await.unwrap();
                            socket.send(message).await.unwrap();
                        }
                    }
                });
            }
        });
        let tls = tls::client_config(&TlsOptions { system_roots: false, extra_roots: vec![roots] }).unwrap();
        (url, Dial { tls: Some(tls), addresses: AddressRule::Any })
    }

    async fn connect(dial: Dial, url: &str) -> Result<Arc<dyn WsConnection>, TransportError> {
        let result = with(dial, Sockets.connect(url.to_owned(), Vec::new(), 5_000)).await;
        result.map(|connected| connected.connection)
    }

    #[tokio::test]
    async fn messages_pass_over_the_tls_of_the_call() {
        let (url, dial) = echo().await;
        let connection = connect(dial, &url).await.unwrap();
        connection.send(b"hello".to_vec()).await.unwrap();
        assert_eq!(connection.recv().await.unwrap().as_deref(), Some(&b"hello"[..]));
        connection.close().await;
        assert_eq!(connection.recv().await.unwrap(), None);
    }

    #[tokio::test]
    async fn unknown_authority_is_refused() {
        let (url, _) = echo().await;
        let Err(TransportError::Connection(cause)) = connect(Dial::default(), &url).await else { panic!() };
        assert!(cause.contains("UnknownIssuer"), "{cause}");
    }

    #[tokio::test]
    async fn private_addresses_are_refused_under_public_only() {
        let (url, dial) = echo().await;
        let dial = Dial { addresses: AddressRule::PublicOnly, ..dial };
        for url in [url.clone(), url.replace("localhost", "127.0.0.1"), url.replace("localhost", "[::1]")] {
            let Err(TransportError::Connection(cause)) = connect(dial.clone(), &url).await else { panic!() };
            assert!(cause.contains("no address that may be connected to"), "{cause}");
            let get = Sockets.request(HttpMethod::Get, url.replace("wss", "https"), Vec::new(), None);
            assert!(with(dial.clone(), get).await.is_err(), "{url}");
        }
    }

    #[tokio::test]
    async fn refused_upgrade_tells_its_status() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("ws://{}/rtc", listener.local_addr().unwrap());
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let _ = stream.read(&mut [0; 4096]).await;
                let answer =
                    b"HTTP/1.1 426 Upgrade Required\r\ncontent-length: 4\r\nconnection: close\r\n\r\nwhy?";
                stream.write_all(answer).await.unwrap();
            }
        });
        let refused = connect(Dial::default(), &url).await;
        assert!(matches!(refused, Err(TransportError::Http { status: 426 })), "{:?}", refused.err());
        let get = Sockets.request(HttpMethod::Get, url.replace("ws:", "http:"), Vec::new(), None);
        let answer = with(Dial::default(), get).await.unwrap();
        assert_eq!((answer.status, &answer.body[..]), (426, &b"why?"[..]));
    }
}
