//! Listening: dual-stack sockets, bounds on slow clients, an orderly end.
#![allow(clippy::disallowed_methods, reason = "this is the shell: it owns the clock and the tasks")]

use std::{future::Future, io, time::Duration};

use axum::{Router, body::Body, http::Request};
use hyper::body::Incoming;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::{conn::auto, graceful::GracefulShutdown},
    service::TowerToHyperService,
};
use tokio::net::TcpListener;
use tower::ServiceExt as _;

use crate::config::Bind;

/// Time for a client to send its request's headers, and how long a connection may wait for its next request:
/// longer than the 60 s for which nginx keeps idle connections, so that it is never us who hang up on a
/// request on its way.
const HEADER_TIME: Duration = Duration::from_secs(75);
/// Time for requests in progress to end after the signal to stop: one whole lookup.
const GRACE: Duration = Duration::from_secs(30);
/// Pause after a failed accept: usually we are out of file descriptors, and trying at once changes nothing.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Listens on `bind`. Without a host: on all interfaces, IPv6 and IPv4, or IPv4 alone where there is no IPv6.
///
/// # Errors
/// The system's, for instance if the port is taken.
pub async fn listen(bind: &Bind) -> io::Result<TcpListener> {
    match bind.host() {
        Some(host) => TcpListener::bind((host, bind.port())).await,
        None => match TcpListener::bind(("::", bind.port())).await {
            Err(error) if error.kind() != io::ErrorKind::AddrInUse => {
                TcpListener::bind(("0.0.0.0", bind.port())).await
            }
            bound => bound,
        },
    }
}

/// Serves `router` on `listener` until `stop` is ready, then takes no new connections and lets requests in
/// progress end, for at most 30 s.
pub async fn serve(listener: TcpListener, router: Router, stop: impl Future<Output = ()>) {
    let mut server = auto::Builder::new(TokioExecutor::new()).http1_only();
    server.http1().timer(TokioTimer::new()).header_read_timeout(HEADER_TIME);
    let graceful = GracefulShutdown::new();
    tokio::pin!(stop);
    loop {
        let stream = tokio::select! {
            () = &mut stop => break,
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::error!(%error, "no connection could be accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            },
        };
        let router = router.clone().map_request(|request: Request<Incoming>| request.map(Body::new));
        let connection =
            server.serve_connection_with_upgrades(TokioIo::new(stream), TowerToHyperService::new(router));
        let connection = graceful.watch(connection.into_owned());
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "connection ended early");
            }
        });
    }
    drop(listener);
    if tokio::time::timeout(GRACE, graceful.shutdown()).await.is_err() {
        tracing::warn!("some requests did not end in time");
    }
}
