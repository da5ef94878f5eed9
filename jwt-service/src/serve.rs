//! Listening: dual-stack and Unix sockets, TLS, bounds on slow and on many clients, an orderly end.
#![allow(clippy::disallowed_methods, reason = "this is the shell: it owns the clock and the tasks")]

mod unread;

use std::{
    fmt,
    future::Future,
    io,
    net::{IpAddr, SocketAddr},
    os::unix::{fs::FileTypeExt as _, net::UnixStream as StdUnixStream},
    path::{Path, PathBuf},
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock},
    time::{Duration, Instant},
};

use axum::{Router, extract::ConnectInfo, http::Request};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::{GracefulShutdown, Watcher},
};
use rustls::{
    ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpSocket, TcpStream, UnixListener, UnixStream, lookup_host},
    sync::{OwnedSemaphorePermit, Semaphore},
};
use tokio_rustls::TlsAcceptor;

use crate::{
    config::{Bind, TlsFiles, TrustedProxies},
    http::limits::LocalPeer,
    limits::{CountedPeer, OpenConnections, TooMany},
};

/// Time for a client to send its request's headers, and how long a connection may wait for its next request:
/// longer than the 60 s for which nginx keeps idle connections, so that it is never us who hang up on a
/// request on its way.
const HEADER_TIME: Duration = Duration::from_secs(75);
/// Time for a client's TLS handshake.
const HANDSHAKE_TIME: Duration = Duration::from_secs(10);
/// Time for requests in progress to end after the signal to stop: one whole lookup.
const GRACE: Duration = Duration::from_secs(30);
/// Connections that the system completes before we accept them; Linux gives at most `net.core.somaxconn`, 4096. Of
/// two thousand clients that come at once, a shorter queue lets some wait a second to knock again.
const BACKLOG: u32 = 4096;
/// Pause after a failed accept: usually we are out of file descriptors, and trying at once changes nothing.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Listens on `bind`. Without a host: on all interfaces, IPv6 and IPv4, or IPv4 alone where there is no IPv6. A
/// Unix socket that nobody listens on any more is replaced.
///
/// # Errors
/// The system's, for instance if the port is taken.
pub async fn listen(bind: &Bind) -> io::Result<Listener> {
    let socket = match bind {
        Bind::Tcp { host: Some(host), port } => Socket::Tcp(listen_at(host, *port).await?),
        Bind::Tcp { host: None, port } => Socket::Tcp(match listen_at("::", *port).await {
            Err(error) if error.kind() != io::ErrorKind::AddrInUse => listen_at("0.0.0.0", *port).await?,
            bound => bound?,
        }),
        Bind::Unix(path) => {
            // An ordinary file refuses connections, too, and is not ours to remove.
            let abandoned = std::fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket())
                && StdUnixStream::connect(path)
                    .is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused);
            if abandoned {
                std::fs::remove_file(path)?;
            }
            Socket::Unix(UnixListener::bind(path)?, RemovedOnDrop(path.clone()))
        }
    };
    Ok(Listener { socket, certificate: None })
}

/// The first address of `host` that can be listened on.
async fn listen_at(host: &str, port: u16) -> io::Result<TcpListener> {
    let mut failure = io::ErrorKind::AddrNotAvailable.into();
    for address in lookup_host((host, port)).await? {
        let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        // A restart must not wait for the connections of the last run to be forgotten.
        socket.set_reuseaddr(true)?;
        match socket.bind(address).and_then(|()| socket.listen(BACKLOG)) {
            Ok(listener) => return Ok(listener),
            Err(error) => failure = error,
        }
    }
    Err(failure)
}

/// A socket that listens.
#[derive(Debug)]
pub struct Listener {
    socket: Socket,
    certificate: Option<Certificate>,
}

impl Listener {
    /// The address of a TCP socket.
    ///
    /// # Errors
    /// The system's; a Unix socket has none.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        match &self.socket {
            Socket::Tcp(listener) => listener.local_addr(),
            Socket::Unix(..) => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// The same, speaking TLS with `certificate`.
    #[must_use]
    pub fn with_certificate(mut self, certificate: Certificate) -> Self {
        self.certificate = Some(certificate);
        self
    }

    async fn accept(&self) -> io::Result<Accepted> {
        match &self.socket {
            Socket::Tcp(listener) => {
                let (stream, peer) = listener.accept().await?;
                // Answers are one small write; a failure costs milliseconds, no more.
                let _ = stream.set_nodelay(true);
                Ok(Accepted::Tcp(stream, peer))
            }
            Socket::Unix(listener, _) => Ok(Accepted::Unix(listener.accept().await?.0)),
        }
    }
}

impl fmt::Display for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.socket {
            Socket::Tcp(listener) => match listener.local_addr() {
                Ok(address) => write!(f, "{address}"),
                Err(_) => f.write_str("unknown"),
            },
            Socket::Unix(_, path) => write!(f, "unix:{}", path.0.display()),
        }
    }
}

#[derive(Debug)]
enum Socket {
    Tcp(TcpListener),
    Unix(UnixListener, RemovedOnDrop),
}

enum Accepted {
    Tcp(TcpStream, SocketAddr),
    Unix(UnixStream),
}

/// A path whose file goes when this does.
#[derive(Debug)]
struct RemovedOnDrop(PathBuf);

impl Drop for RemovedOnDrop {
    fn drop(&mut self) {
        // If it is gone already, so much the better.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// A certificate to serve with, which can be read again when it has been renewed. Cloning gives another handle
/// to the same one.
#[derive(Clone)]
pub struct Certificate(Arc<Loaded>);

struct Loaded {
    files: TlsFiles,
    current: RwLock<Arc<ServerConfig>>,
}

impl Certificate {
    /// Reads the certificate and its key.
    ///
    /// # Errors
    /// [`CertificateError`]: which file, and why it cannot be used.
    pub fn load(files: TlsFiles) -> Result<Self, CertificateError> {
        let current = RwLock::new(read(&files)?);
        Ok(Self(Arc::new(Loaded { files, current })))
    }

    /// Reads the files again; connections from now on get what is in them.
    ///
    /// # Errors
    /// [`CertificateError`]; the old certificate then stays.
    pub fn reload(&self) -> Result<(), CertificateError> {
        let new = read(&self.0.files)?;
        *self.0.current.write().unwrap_or_else(PoisonError::into_inner) = new;
        Ok(())
    }

    fn acceptor(&self) -> TlsAcceptor {
        self.0.current.read().unwrap_or_else(PoisonError::into_inner).clone().into()
    }
}

impl fmt::Debug for Certificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Certificate").field(&self.0.files).finish()
    }
}

fn read(files: &TlsFiles) -> Result<Arc<ServerConfig>, CertificateError> {
    let unreadable = |path: &Path| {
        let path = path.to_owned();
        move |source| CertificateError::Unreadable { path, source }
    };
    let chain = CertificateDer::pem_file_iter(&files.certificate)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(unreadable(&files.certificate))?;
    let key = PrivateKeyDer::from_pem_file(&files.key).map_err(unreadable(&files.key))?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .and_then(|builder| builder.with_no_client_auth().with_single_cert(chain, key))
        .map_err(|source| CertificateError::Unusable { path: files.certificate.clone(), source })?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

/// Why a certificate cannot be served with.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CertificateError {
    /// A file.
    #[error("{path} cannot be read as PEM; check the path, and that this process may read it", path = path.display())]
    Unreadable {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: rustls::pki_types::pem::Error,
    },
    /// What is in the files.
    #[error("the certificate in {path} cannot be used; does it belong to the key?", path = path.display())]
    Unusable {
        /// The certificate's file.
        path: PathBuf,
        /// Why.
        #[source]
        source: rustls::Error,
    },
}

/// Bounds on connections.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Bounds {
    /// Held at once; more wait in the system's queue: 10,000.
    pub connections: usize,
    /// From one IPv4 address or IPv6 /64 network; more are closed at once: 500. `None`: any number.
    pub per_address: Option<usize>,
    /// Who may have any number, since they connect for others.
    pub trusted_proxies: TrustedProxies,
    /// How long requests in progress may take to end after the signal to stop: 30 s.
    pub grace: Duration,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            connections: 10_000,
            per_address: Some(500),
            trusted_proxies: TrustedProxies::default(),
            grace: GRACE,
        }
    }
}

/// Serves `router` on `listener` until `stop` is ready, then takes no new connections and lets requests in
/// progress end. The bounds are [`Bounds::default`].
pub async fn serve(listener: Listener, router: Router, stop: impl Future<Output = ()>) {
    serve_with(listener, router, Bounds::default(), stop).await;
}

/// The same with other bounds.
pub async fn serve_with(listener: Listener, router: Router, bounds: Bounds, stop: impl Future<Output = ()>) {
    let Bounds { connections, per_address, trusted_proxies, grace } = bounds;
    let open = Arc::new(Mutex::new(OpenConnections::new(per_address, trusted_proxies)));
    let places = Arc::new(Semaphore::new(connections.clamp(1, Semaphore::MAX_PERMITS)));
    let graceful = GracefulShutdown::new();
    let mut stop = pin!(stop);
    loop {
        let next = async {
            // Never closed, so never an error; and if it were, there would be nobody to serve.
            let place = places.clone().acquire_owned().await.map_err(io::Error::other)?;
            Ok::<_, io::Error>((place, listener.accept().await?))
        };
        let (place, accepted) = tokio::select! {
            () = &mut stop => break,
            next = next => match next {
                Ok(next) => next,
                Err(error) => {
                    tracing::error!(%error, "no connection could be accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            },
        };
        let peer = match &accepted {
            Accepted::Tcp(_, peer) => Some(peer.ip()),
            Accepted::Unix(_) => None,
        };
        let Ok(counted) = Counted::new(&open, peer) else { continue };
        let connection = Connection {
            router: router.clone(),
            watcher: graceful.watcher(),
            _place: place,
            _counted: counted,
        };
        let acceptor = listener.certificate.as_ref().map(Certificate::acceptor);
        tokio::spawn(async move {
            match accepted {
                Accepted::Tcp(stream, peer) => connection.secure(stream, Some(peer), acceptor).await,
                Accepted::Unix(stream) => connection.secure(stream, None, acceptor).await,
            }
        });
    }
    drop(listener);
    if tokio::time::timeout(grace, graceful.shutdown()).await.is_err() {
        tracing::warn!("some requests did not end in time");
    }
}

/// A connection that counts against its address until this is dropped.
struct Counted {
    open: Arc<Mutex<OpenConnections>>,
    peer: Option<CountedPeer>,
}

impl Counted {
    /// An error if the address has enough already. The other end of a Unix socket has none.
    fn new(open: &Arc<Mutex<OpenConnections>>, peer: Option<IpAddr>) -> Result<Self, TooMany> {
        let counted = {
            let mut open = lock(open);
            let counted = peer.map(|peer| open.open(peer)).transpose();
            if counted.is_err() && open.worth_saying(Instant::now()) {
                tracing::warn!(address = ?peer, "too many connections from one address: turned away");
            }
            counted?
        };
        Ok(Self { open: open.clone(), peer: counted })
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        if let Some(peer) = &self.peer {
            lock(&self.open).close(peer);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing between lock and unlock can leave the counts half-changed.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One connection to be served.
struct Connection {
    router: Router,
    watcher: Watcher,
    _place: OwnedSemaphorePermit,
    _counted: Counted,
}

impl Connection {
    async fn secure<S>(self, stream: S, peer: Option<SocketAddr>, acceptor: Option<TlsAcceptor>)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let Some(acceptor) = acceptor else { return self.serve(stream, peer).await };
        match tokio::time::timeout(HANDSHAKE_TIME, acceptor.accept(stream)).await {
            Ok(Ok(stream)) => self.serve(stream, peer).await,
            Ok(Err(error)) => tracing::debug!(%error, "no TLS with a client"),
            Err(_) => tracing::debug!("a client's TLS handshake took too long"),
        }
    }

    async fn serve<S>(self, stream: S, peer: Option<SocketAddr>)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        // Not hyper-util's `auto`: it waits for the first bytes of a connection without limit.
        let mut server = http1::Builder::new();
        server.timer(TokioTimer::new()).header_read_timeout(HEADER_TIME);
        let router = self.router;
        let service = service_fn(move |mut request: Request<Incoming>| {
            match peer {
                Some(peer) => request.extensions_mut().insert(ConnectInfo(peer)).is_some(),
                None => request.extensions_mut().insert(LocalPeer).is_some(),
            };
            unread::answer(router.clone(), request)
        });
        let connection = server.serve_connection(TokioIo::new(stream), service);
        if let Err(error) = self.watcher.watch(connection).await {
            tracing::debug!(%error, "connection ended early");
        }
    }
}
