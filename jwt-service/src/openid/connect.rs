//! Connections to other servers: resolve, check every address, connect, speak TLS under the right name, and notice
//! when the way there is gone.
#![allow(clippy::disallowed_methods, reason = "this is the shell: it owns the clock and the tasks")]

use std::{
    future::Future,
    io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use axum::body::Body;
use hyper::{
    Uri,
    http::uri::Scheme,
    rt::{Read, ReadBufCursor, Write},
};
use hyper_util::{
    client::legacy::{
        Client,
        connect::{Connected, Connection},
    },
    rt::{TokioExecutor, TokioIo, TokioTimer},
};
use rustls::{
    ClientConfig, DigitallySignedStruct, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::CryptoProvider,
    pki_types::{CertificateDer, ServerName as TlsName, UnixTime},
};
use socket2::{SockRef, TcpKeepalive};
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};

use super::{
    addresses::Egress,
    destination::{Destination, destinations, direct},
    resolver::{Resolve, ResolveError},
    server_name::{Host, ServerName},
};
use crate::{http::limits::TALKING, roots};

/// How many addresses of one destination we try: a caller's DNS may list more.
const MAX_ADDRESSES: usize = 6;
/// How long idle connections are kept for the next lookup at the same server.
const IDLE: Duration = Duration::from_secs(30);
/// How many idle connections are kept per server: as many as lookups talk to one at a time. Fewer, and a busy
/// server's connections would be closed between two lookups only to be made again.
const MAX_IDLE: usize = TALKING;
/// How long what we send may stay unacknowledged before a connection is given up, and after how long a silent one is
/// probed.
pub(crate) const UNACKNOWLEDGED: Duration = Duration::from_secs(4);
pub(crate) const PROBE_AFTER: Duration = Duration::from_secs(10);
/// The most that headers of an answer may take.
const MAX_HEADERS: usize = 64 * 1024;

/// An HTTP client whose connections go only where [`Egress`] lets them, pooled per server name.
pub(crate) type GuardedClient = Client<Connector, Body>;

/// Makes clients that share one resolver and one set of root certificates.
pub(crate) struct Connections {
    resolver: Arc<dyn Resolve>,
    verified: Arc<ClientConfig>,
    unverified: Arc<ClientConfig>,
    connect_timeout: Duration,
}

impl Connections {
    pub(crate) fn new(resolver: Arc<dyn Resolve>, connect_timeout: Duration) -> Result<Self, rustls::Error> {
        let provider = roots::provider();
        let unverified = ClientConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(AcceptAll(provider)))
            .with_no_client_auth();
        let verified = roots::checking_certificates()?;
        Ok(Self { resolver, verified: http1(verified), unverified: http1(unverified), connect_timeout })
    }

    /// A client for plain HTTPS (port 443 unless written) or, with `federation`, for Matrix federation (SRV
    /// records, port 8448).
    pub(crate) fn client(&self, route: Route, egress: Egress, verify: bool) -> GuardedClient {
        let tls = if verify { &self.verified } else { &self.unverified };
        let connector = Connector {
            route,
            egress,
            tls: tls.clone().into(),
            resolver: self.resolver.clone(),
            connect_timeout: self.connect_timeout,
        };
        Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE)
            .pool_max_idle_per_host(MAX_IDLE)
            .http1_max_buf_size(MAX_HEADERS)
            .build(connector)
    }
}

/// Federation needs HTTP/1.1: there the `Host` header is ours to set, apart from the TCP destination.
fn http1(mut config: ClientConfig) -> Arc<ClientConfig> {
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Arc::new(config)
}

/// How a name becomes a destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Route {
    /// As a browser would: the name, port 443.
    Web,
    /// As Matrix federation does, after `.well-known`: SRV records, else the name, port 8448.
    Federation,
}

/// Connects to the server in a URL. The name in the URL is the TLS name; where the connection goes is the
/// route's business.
#[derive(Clone)]
pub(crate) struct Connector {
    route: Route,
    egress: Egress,
    tls: TlsConnector,
    resolver: Arc<dyn Resolve>,
    connect_timeout: Duration,
}

impl Connector {
    async fn connect(self, uri: Uri) -> Result<GuardedConnection, ConnectError> {
        let name: ServerName =
            uri.authority().and_then(|a| a.as_str().parse().ok()).ok_or(ConnectError::NotAServer)?;
        let plain = uri.scheme() == Some(&Scheme::HTTP);
        let places = match self.route {
            Route::Web => vec![direct(&name, if plain { 80 } else { 443 })],
            Route::Federation => {
                destinations(&name, &*self.resolver, |max| rand::random_range(0..=max)).await?
            }
        };
        let mut failure = ConnectError::NotAServer;
        for place in places {
            match self.connect_to(&place, name.host(), plain).await {
                Ok(connection) => return Ok(connection),
                Err(error) => failure = error,
            }
        }
        Err(failure)
    }

    async fn connect_to(
        &self,
        place: &Destination,
        tls_host: &Host,
        plain: bool,
    ) -> Result<GuardedConnection, ConnectError> {
        let found = match &place.host {
            Host::Ip(ip) => vec![SocketAddr::new(*ip, place.port)],
            Host::Dns(name) => self.resolver.addresses(name, place.port).await?,
        };
        let permitted: Vec<_> =
            alternating(found).filter(|address| self.egress.permits(address.ip())).collect();
        if permitted.is_empty() {
            return Err(ConnectError::NotPermitted);
        }
        let tls_name = match tls_host {
            Host::Ip(ip) => TlsName::from(*ip),
            Host::Dns(name) => TlsName::try_from(name.clone()).map_err(|_| ConnectError::NotAServer)?,
        };
        let mut failure = ConnectError::NotPermitted;
        for address in permitted.into_iter().take(MAX_ADDRESSES) {
            match self.handshake(address, (!plain).then(|| tls_name.clone())).await {
                Ok(connection) => return Ok(connection),
                Err(error) => failure = error,
            }
        }
        Err(failure)
    }

    async fn handshake(
        &self,
        address: SocketAddr,
        name: Option<TlsName<'static>>,
    ) -> Result<GuardedConnection, ConnectError> {
        let tcp = tokio::time::timeout(self.connect_timeout, TcpStream::connect(address))
            .await
            .map_err(|_| ConnectError::TimedOut)?
            .map_err(ConnectError::Tcp)?;
        tcp.set_nodelay(true).and_then(|()| notice_dead_paths(&tcp)).map_err(ConnectError::Tcp)?;
        let Some(name) = name else { return Ok(GuardedConnection::Plain(TokioIo::new(tcp))) };
        // The same budget again for TLS: a port that accepts and then stays silent must not use up the whole
        // lookup.
        let tls = tokio::time::timeout(self.connect_timeout, self.tls.connect(name, tcp))
            .await
            .map_err(|_| ConnectError::TimedOut)?
            .map_err(ConnectError::Tls)?;
        Ok(GuardedConnection::Tls(Box::new(TokioIo::new(tls))))
    }
}

/// A firewall that forgets a connection says nothing: what we send then is never acknowledged, and a kept
/// connection would cost the whole time of a lookup. A server that is merely slow acknowledges.
fn notice_dead_paths(tcp: &TcpStream) -> io::Result<()> {
    let socket = SockRef::from(tcp);
    #[cfg(any(target_os = "linux", target_os = "android"))]
    socket.set_tcp_user_timeout(Some(UNACKNOWLEDGED))?;
    socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(PROBE_AFTER).with_interval(PROBE_AFTER))
}

impl tower::Service<Uri> for Connector {
    type Response = GuardedConnection;
    type Error = ConnectError;
    type Future = Pin<Box<dyn Future<Output = Result<GuardedConnection, ConnectError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), ConnectError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        Box::pin(self.clone().connect(uri))
    }
}

/// IPv6 and IPv4 in turn, so that one family without a route costs one attempt, not all of them.
fn alternating(addresses: Vec<SocketAddr>) -> impl Iterator<Item = SocketAddr> {
    let (v6, v4): (Vec<_>, Vec<_>) = addresses.into_iter().partition(SocketAddr::is_ipv6);
    let (mut v6, mut v4) = (v6.into_iter(), v4.into_iter());
    std::iter::from_fn(move || {
        let next = v6.next().or_else(|| v4.next());
        std::mem::swap(&mut v6, &mut v4);
        next
    })
}

/// Why no connection came about.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectError {
    #[error("the name cannot be connected to")]
    NotAServer,
    #[error(
        "the server's name resolves only to addresses that strangers may not make us connect to; if it is yours, \
         list it by name in LIVEKIT_FULL_ACCESS_HOMESERVERS or LIVEKIT_PRIVATE_HOMESERVERS"
    )]
    NotPermitted,
    #[error(transparent)]
    Resolve(#[from] ResolveError),
    #[error("the server does not answer in time")]
    TimedOut,
    #[error("no TCP connection")]
    Tcp(#[source] io::Error),
    #[error("the TLS handshake failed; is the server's certificate valid for its name?")]
    Tls(#[source] io::Error),
}

/// A connection that the pool can keep.
pub(crate) enum GuardedConnection {
    /// TLS: everything that a server's name leads to.
    Tls(Box<TokioIo<TlsStream<TcpStream>>>),
    /// Plain TCP: for an `http` base URL that the operator has written, or that a server has which the
    /// operator has named.
    Plain(TokioIo<TcpStream>),
}

impl Connection for GuardedConnection {
    fn connected(&self) -> Connected {
        Connected::new()
    }
}

impl Read for GuardedConnection {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: ReadBufCursor<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tls(io) => Pin::new(io).poll_read(cx, buf),
            Self::Plain(io) => Pin::new(io).poll_read(cx, buf),
        }
    }
}

impl Write for GuardedConnection {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tls(io) => Pin::new(io).poll_write(cx, buf),
            Self::Plain(io) => Pin::new(io).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tls(io) => Pin::new(io).poll_flush(cx),
            Self::Plain(io) => Pin::new(io).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tls(io) => Pin::new(io).poll_shutdown(cx),
            Self::Plain(io) => Pin::new(io).poll_shutdown(cx),
        }
    }
}

/// Takes any certificate. Used only where the operator has said so.
#[derive(Debug)]
struct AcceptAll(Arc<CryptoProvider>);

impl ServerCertVerifier for AcceptAll {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &TlsName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn address_families_take_turns() {
        let ip = |s: &str| SocketAddr::new(s.parse().unwrap(), 1);
        let order: Vec<_> =
            alternating(["1.1.1.1", "1.1.1.2", "1.1.1.3", "2000::1"].map(ip).to_vec()).collect();
        assert_eq!(order, ["2000::1", "1.1.1.1", "1.1.1.2", "1.1.1.3"].map(ip));
    }
}
