//! Connections: one port for plain HTTP/1.1 and for TLS, told apart by the first byte.

#![allow(clippy::disallowed_methods, reason = "this is the shell: it owns the clock and the tasks")]

use std::{fmt, sync::Arc, time::Duration};

use anyhow::Context as _;
use axum::{Router, body::Body, response::IntoResponse as _};
use hyper::{Method, Request, Response, StatusCode, body::Incoming, header, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use rcgen::{CertifiedKey, generate_simple_self_signed};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::{Semaphore, watch},
    task::JoinSet,
    time::timeout,
};
use tokio_rustls::TlsAcceptor;
use tower::ServiceExt as _;

use super::{MatrixError, Shared, faults::Kind, http};

/// A client that is slower than this with its first byte, its handshake or its request head is let go.
const PATIENCE: Duration = Duration::from_secs(30);
/// Request line and headers together; a `/sync` with an inline filter is the longest that is known.
const LARGEST_HEAD: usize = 64 * 1024;

pub(super) struct Tls {
    pub(super) certificate_pem: String,
    acceptor: TlsAcceptor,
}

impl Tls {
    pub(super) fn self_signed() -> anyhow::Result<Self> {
        let names = ["localhost", "127.0.0.1", "::1"].map(str::to_owned);
        let CertifiedKey { cert, signing_key } =
            generate_simple_self_signed(names).context("cannot make a self-signed certificate")?;
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(signing_key.serialize_der()));
        // The provider is named because two are linked in and none is the default.
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .context("the TLS provider supports no protocol version")?
            .with_no_client_auth()
            .with_single_cert(vec![cert.der().clone()], key)
            .context("the self-signed certificate does not fit its key")?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Self { certificate_pem: cert.pem(), acceptor: TlsAcceptor::from(Arc::new(config)) })
    }
}

/// Accepts until told to stop; all connections end with it.
pub(super) async fn accept(
    listener: TcpListener,
    tls: Tls,
    connections: usize,
    shared: Arc<Shared>,
    mut stopped: watch::Receiver<bool>,
) {
    let router = http::router(shared.clone());
    let free = Arc::new(Semaphore::new(connections.max(1)));
    let mut running = JoinSet::new();
    loop {
        let next = async {
            let place = free.clone().acquire_owned().await;
            (listener.accept().await, place)
        };
        tokio::select! {
            (accepted, place) = next => match accepted {
                Ok((stream, _)) => {
                    let connection = connection(stream, tls.acceptor.clone(), shared.clone(), router.clone());
                    running.spawn(async move {
                        let _place = place;
                        connection.await;
                    });
                }
                // Out of file descriptors, or a client that is gone already: let others finish first.
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            },
            Some(_) = running.join_next() => {}
            () = super::asked_to_stop(&mut stopped) => break,
        }
    }
    drop(listener);
    running.shutdown().await;
}

async fn connection(stream: TcpStream, tls: TlsAcceptor, shared: Arc<Shared>, router: Router) {
    // Answers are small and awaited: without this each waits for an acknowledgement.
    let _ = stream.set_nodelay(true);
    let mut first = [0];
    match timeout(PATIENCE, stream.peek(&mut first)).await {
        // A TLS record of type handshake; no HTTP method begins with this byte (RFC 8446 §5.1).
        Ok(Ok(1)) if first == [0x16] => {
            if let Ok(Ok(stream)) = timeout(PATIENCE, tls.accept(stream)).await {
                http1(stream, shared, router).await;
            }
        }
        Ok(Ok(1)) => http1(stream, shared, router).await,
        _ => {}
    }
}

async fn http1(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    shared: Arc<Shared>,
    router: Router,
) {
    let service = service_fn(move |request| respond(request, shared.clone(), router.clone()));
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(PATIENCE)
        .max_buf_size(LARGEST_HEAD)
        .serve_connection(TokioIo::new(stream), service)
        .await;
    if let Err(error) = served {
        tracing::trace!(%error, "a connection ended early");
    }
}

/// Faults, the router, and the headers that let a browser read the answer.
async fn respond(
    request: Request<Incoming>,
    shared: Arc<Shared>,
    router: Router,
) -> Result<Response<Body>, ReplyLost> {
    if request.method() == Method::OPTIONS {
        return Ok(readable_by_browsers(StatusCode::NO_CONTENT.into_response()));
    }
    let path = http::segments(request.uri().path());
    let verdict = shared.faults.judge(request.method().as_str(), &path);
    if !verdict.latency.is_zero() {
        tokio::time::sleep(verdict.latency).await;
    }
    let refusal = match verdict.fault {
        Some(Kind::RateLimit(after)) => Some(MatrixError::limit_exceeded("Too Many Requests", Some(after))),
        Some(Kind::Fail(status)) => {
            Some(MatrixError::new(status, "M_UNKNOWN", "The homeserver was told to fail this request"))
        }
        Some(Kind::LoseReply) | None => None,
    };
    let response = match refusal {
        Some(refusal) => refusal.into_response(),
        None => match router.oneshot(request.map(Body::new)).await {
            Ok(response) => response,
            Err(never) => match never {},
        },
    };
    match verdict.fault {
        Some(Kind::LoseReply) => Err(ReplyLost),
        _ => Ok(readable_by_browsers(response)),
    }
}

/// Matrix, *Web browser clients*.
fn readable_by_browsers(mut response: Response<Body>) -> Response<Body> {
    let headers = response.headers_mut();
    for (name, value) in [
        (header::ACCESS_CONTROL_ALLOW_ORIGIN, "*"),
        (header::ACCESS_CONTROL_ALLOW_METHODS, "GET, HEAD, POST, PUT, DELETE, OPTIONS"),
        (header::ACCESS_CONTROL_ALLOW_HEADERS, "X-Requested-With, Content-Type, Authorization, Date"),
        (header::ACCESS_CONTROL_EXPOSE_HEADERS, "Retry-After"),
    ] {
        headers.insert(name, header::HeaderValue::from_static(value));
    }
    response
}

/// hyper closes the connection without an answer when a service fails.
#[derive(Debug)]
struct ReplyLost;

impl fmt::Display for ReplyLost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the homeserver was told to lose this reply")
    }
}

impl std::error::Error for ReplyLost {}
