//! Starting and stopping a focus: sockets, tasks and the planes put together.
#![allow(clippy::disallowed_methods, reason = "this is the shell: it owns the clock and the tasks")]

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use antiphon_jwt_service as jwt;
use async_trait::async_trait;
use axum::Router;
use axum::body::Body;
use axum::extract::ConnectInfo;
use axum::http::{Request, Response, Uri};
use hyper::body::Incoming;
use hyper_util::rt::{TokioIo, TokioTimer};
use livekit_protocol::DisconnectReason;
use rand::SeedableRng;
use rand::rngs::StdRng;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::ServiceExt as _;

use crate::config::{Config, ConfigError, FullAccess};
use crate::observe::{Counters, Heartbeat, Stats};
use crate::plane::{Command, Event, MediaPlane, PlaneConfig, PlaneError};
use crate::presence::Goings;
use crate::room::{AdminError, Presence, RoomOptions, Rooms, Settings};
use crate::signal::{Manager, RoomHandle, Surface};
use crate::{admin, signal};

/// Where the SFU is served besides the root.
const SFU_PATH: &str = "/livekit/sfu";
/// Where the authorisation service is served.
const JWT_PATH: &str = "/livekit/jwt";
/// Largest request head, in bytes: a token with metadata may be long.
const MAX_HEAD: usize = 1024 * 1024;
/// Time for a client to send a request's head.
const HEAD_WITHIN: Duration = Duration::from_secs(10);
/// Connections served at one time; others wait.
const MAX_CONNECTIONS: usize = 20_000;
/// Pause after a failed accept: out of file descriptors, mostly.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Time for goodbyes to be read when the server stops, and then for leaves that are being sent.
const GOODBYE_WITHIN: Duration = Duration::from_secs(5);
/// Commands that wait between the room manager and the media plane.
const COMMANDS: usize = 256;
/// Comings and goings that wait for the authorisation service.
const PRESENCE: usize = 4096;
/// How often the authorisation service looks itself who is there, for whose coming or going it missed.
const LOOK_EVERY: Duration = Duration::from_secs(30);

/// An SFU for MatrixRTC calls, with its authorisation service.
#[derive(Debug)]
pub struct Focus;

impl Focus {
    /// Starts a focus: when this returns, it is listening.
    ///
    /// # Errors
    ///
    /// [`StartError`], which says what to change.
    pub async fn start(config: Config) -> Result<FocusHandle, StartError> {
        config.check()?;
        let mut plane_config = PlaneConfig::new(config.udp_bind);
        plane_config.advertised.clone_from(&config.advertised);
        let (plane, events) = MediaPlane::start(plane_config)?;
        let (udp, plane_ended) = (plane.local_addr(), plane.ended());
        let (commands, mut queue) = mpsc::channel(COMMANDS);
        // The manager must not wait for the plane, which may wait for the manager to read its events.
        tokio::spawn(async move {
            while let Some(command) = queue.recv().await {
                if plane.send(command).await.is_err() {
                    // After a shutdown nobody holds the other end any more, and the plane may stop.
                    if !queue.is_closed() {
                        tracing::error!("the media plane has stopped");
                    }
                    return;
                }
            }
        });
        let mut handle = Self::start_with_plane(config, commands, events).await?;
        handle.udp_addr = Some(udp);
        handle.plane_ended = Some(plane_ended);
        Ok(handle)
    }

    /// As [`start`](Self::start), over a media plane of the caller's: for tests of the control plane.
    ///
    /// # Errors
    ///
    /// [`StartError`], which says what to change.
    pub async fn start_with_plane(
        config: Config,
        commands: mpsc::Sender<Command>,
        events: mpsc::Receiver<Event>,
    ) -> Result<FocusHandle, StartError> {
        config.check()?;
        let listener = TcpListener::bind(config.http_bind)
            .await
            .map_err(|source| StartError::Bind { address: config.http_bind, source })?;
        let http_addr =
            listener.local_addr().map_err(|source| StartError::Bind { address: config.http_bind, source })?;
        let ws_url = match &config.public_url {
            Some(url) => url.as_str().trim_end_matches('/').to_owned(),
            None => format!("ws://{http_addr}"),
        };
        let jwt_url = config.jwt.is_some().then(|| match config.jwt_url() {
            Some(url) => url.as_str().trim_end_matches('/').to_owned(),
            None => format!("http://{http_addr}{JWT_PATH}"),
        });

        let keys = Arc::new(config.keys.clone());
        let counters = Arc::new(Counters::default());
        let heartbeat = Arc::new(Heartbeat::new(Instant::now()));
        let settings = Settings {
            auto_create: config.auto_create,
            empty_timeout: config.empty_timeout,
            departure_timeout: config.departure_timeout,
            max_participants: config.max_participants,
            simulate: config.dev,
            ..Settings::default()
        };
        let rooms = Rooms::new(settings, Arc::clone(&keys), Arc::clone(&counters), StdRng::from_os_rng());
        let (watcher, presence) = mpsc::channel(PRESENCE);
        let watcher = config.jwt.is_some().then_some(watcher);
        let (rooms, manager) =
            Manager::spawn(rooms, Arc::clone(&counters), Arc::clone(&heartbeat), commands, events, watcher);

        let jwt = authorisation(&config, &ws_url, rooms.clone()).await?;
        if let Some(jwt) = &jwt {
            jwt.restore().await;
            tokio::spawn(watch(jwt.clone(), presence));
        }
        let admin = admin::router(rooms.clone(), Arc::clone(&keys), Arc::clone(&counters));
        let surface = Surface { rooms: rooms.clone(), keys, heartbeat, counters };
        let mut router = signal::router(surface, admin);
        if let Some(jwt) = &jwt {
            // Beside the SFU's routes, not within: the service has a CORS policy of its own.
            router = Router::new().nest(JWT_PATH, jwt.router()).fallback_service(router);
        }

        let stop = CancellationToken::new();
        let connections = TaskTracker::new();
        let server = tokio::spawn(accept(listener, router, stop.clone(), connections.clone()));
        Ok(FocusHandle {
            http_addr,
            udp_addr: None,
            plane_ended: None,
            ws_url,
            jwt_url,
            rooms,
            jwt,
            manager,
            server,
            stop,
            connections,
        })
    }
}

/// A running focus. It stops when [`shutdown`](Self::shutdown) is called, or in disorder when this is dropped.
#[derive(Debug)]
pub struct FocusHandle {
    http_addr: SocketAddr,
    udp_addr: Option<SocketAddr>,
    plane_ended: Option<CancellationToken>,
    ws_url: String,
    jwt_url: Option<String>,
    rooms: RoomHandle,
    jwt: Option<jwt::Service>,
    manager: JoinHandle<()>,
    server: JoinHandle<()>,
    stop: CancellationToken,
    connections: TaskTracker,
}

impl FocusHandle {
    /// Where HTTP is served.
    pub fn http_addr(&self) -> SocketAddr {
        self.http_addr
    }

    /// Where media are received; `None` over a media plane of the caller's.
    pub fn udp_addr(&self) -> Option<SocketAddr> {
        self.udp_addr
    }

    /// What clients connect to: `ws://…` or `wss://…`, without a slash at the end.
    pub fn ws_url(&self) -> &str {
        &self.ws_url
    }

    /// The authorisation service's address, without a slash at the end; `None` if it runs elsewhere.
    pub fn jwt_url(&self) -> Option<&str> {
        self.jwt_url.as_deref()
    }

    /// How many there are of what. All zero once the focus has stopped.
    pub async fn stats(&self) -> Stats {
        self.rooms.call(|rooms, _| rooms.stats()).await.unwrap_or_default()
    }

    /// Says goodbye to everybody (`SERVER_SHUTDOWN`), waits a moment for it to be read, and stops. Afterwards another
    /// focus can be started on the same addresses.
    pub async fn shutdown(mut self) {
        let said = self.rooms.call(|rooms, now| rooms.shut_down(now)).await;
        self.stop.cancel();
        self.connections.close();
        if said.is_ok() && tokio::time::timeout(GOODBYE_WITHIN, self.connections.wait()).await.is_err() {
            tracing::warn!("some connections did not end in time");
        }
        if let Some(jwt) = &self.jwt {
            jwt.shutdown(GOODBYE_WITHIN).await;
        }
        // A task that was aborted has ended, too: what it held is free.
        let _ = (&mut self.server).await;
        self.manager.abort();
        let _ = (&mut self.manager).await;
        if let Some(plane_ended) = &self.plane_ended
            && tokio::time::timeout(GOODBYE_WITHIN, plane_ended.cancelled()).await.is_err()
        {
            tracing::warn!("the media plane did not end in time");
        }
    }
}

impl Drop for FocusHandle {
    fn drop(&mut self) {
        self.stop.cancel();
        self.server.abort();
        self.manager.abort();
    }
}

/// Why a focus did not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The settings are wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The HTTP address cannot be had.
    #[error("the HTTP address {address} cannot be used; choose another or free it")]
    Bind {
        /// Which.
        address: SocketAddr,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The media plane does not start.
    #[error(transparent)]
    Plane(#[from] PlaneError),
    /// The authorisation service does not start.
    #[error("the authorisation service does not start: {0}")]
    Jwt(#[from] jwt::ServiceError),
    /// The directory for delegated leaves cannot be used.
    #[error("jwt.state_dir cannot be used; does this process own it, and no other process use it?")]
    Store(#[from] jwt::store::StoreError),
}

async fn authorisation(
    config: &Config,
    ws_url: &str,
    rooms: RoomHandle,
) -> Result<Option<jwt::Service>, StartError> {
    let (Some(settings), Some((key, secret))) = (&config.jwt, config.keys.first()) else { return Ok(None) };
    let mut service = jwt::Settings::new(ws_url, key, secret.expose());
    service.full_access = match &settings.full_access {
        FullAccess::All => jwt::FullAccess::All,
        FullAccess::Only(names) => jwt::FullAccess::Only(names.iter().cloned().collect()),
        FullAccess::Loopback => jwt::FullAccess::Loopback,
    };
    service.insecure_skip_verify_tls =
        if config.dev { jwt::TlsPolicy::SkipLoopback } else { jwt::TlsPolicy::Verify };
    service.cs_api_url_overrides.clone_from(&settings.cs_api_url_overrides);
    let store = match &settings.state_dir {
        Some(directory) => jwt::store::StoreConfig::File(directory.clone()),
        None => jwt::store::StoreConfig::Memory,
    };
    let store = jwt::store::open(&store).await?;
    // Neither store is shared with another process, so any name will do.
    let mut delegation = jwt::DelegationConfig::new("focus");
    delegation.sanity_interval = Some(LOOK_EVERY);
    Ok(Some(jwt::Service::with_store(service, Arc::new(OwnRooms(rooms)), store, delegation)?))
}

/// Tells the authorisation service who comes and goes, as LiveKit does with webhooks.
async fn watch(jwt: jwt::Service, mut presence: mpsc::Receiver<Presence>) {
    let tell = |Presence { room, identity, sid, gone }: Presence| {
        let (room, identity, sid) = (room.as_str(), identity.as_str(), sid.as_str());
        match gone {
            None => jwt.participant_joined(room, identity, sid),
            Some(reason) => jwt.participant_left(room, identity, sid, why(reason)),
        }
    };
    let mut goings = Goings::default();
    loop {
        let due = async {
            match goings.timeout() {
                Some(at) => tokio::time::sleep_until(at.into()).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            presence = presence.recv() => match presence {
                Some(presence) => goings.handle(Instant::now(), presence).map_or((), tell),
                // The focus stops: whoever is away may come back to the next one.
                None => return,
            },
            () = due => while let Some(gone) = goings.handle_timeout(Instant::now()) {
                tell(gone);
            },
        }
    }
}

fn why(reason: DisconnectReason) -> jwt::Leave {
    match reason {
        DisconnectReason::ClientInitiated => jwt::Leave::OnPurpose,
        DisconnectReason::DuplicateIdentity | DisconnectReason::Migration => jwt::Leave::TakenOver,
        _ => jwt::Leave::Otherwise,
    }
}

/// The SFU as the authorisation service in the same process sees it.
struct OwnRooms(RoomHandle);

#[async_trait]
impl jwt::Sfu for OwnRooms {
    async fn create_room(&self, alias: &str) -> Result<jwt::SfuRoom, jwt::SfuError> {
        let alias = alias.to_owned();
        let options = RoomOptions {
            empty_timeout: Duration::from_secs(u64::from(jwt::EMPTY_TIMEOUT)),
            departure_timeout: Duration::from_secs(u64::from(jwt::DEPARTURE_TIMEOUT)),
            ..RoomOptions::default()
        };
        let created = self
            .0
            .call(move |rooms, now| rooms.create_room(now, &alias, options))
            .await
            .map_err(|stopped| jwt::SfuError::Ours(stopped.into()))?;
        created
            .map(|room| jwt::SfuRoom::new(room.sid))
            .map_err(|error: AdminError| jwt::SfuError::Ours(error.into()))
    }

    async fn participant(
        &self,
        room: &str,
        identity: &str,
    ) -> Result<Option<jwt::SfuParticipant>, jwt::SfuError> {
        let (room, identity) = (room.to_owned(), identity.to_owned());
        let found = self
            .0
            .call(move |rooms, _| rooms.participant(&room, &identity))
            .await
            .map_err(|stopped| jwt::SfuError::Ours(stopped.into()))?;
        // The rooms are in this process, so the only thing that can be wrong is that it is not there.
        Ok(found.ok().map(|participant| jwt::SfuParticipant::new(participant.sid)))
    }
}

async fn accept(listener: TcpListener, router: Router, stop: CancellationToken, connections: TaskTracker) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            accepted = async {
                let place = Arc::clone(&places).acquire_owned().await;
                (place, listener.accept().await)
            } => accepted,
        };
        match accepted {
            (Ok(place), Ok((stream, peer))) => {
                let connection = serve_connection(stream, peer, router.clone(), stop.clone());
                connections.spawn(async move {
                    connection.await;
                    drop(place);
                });
            }
            (_, Err(error)) => {
                tracing::error!(%error, "no connection could be accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
            // The semaphore is never closed.
            (Err(_), _) => return,
        }
    }
}

async fn serve_connection(stream: TcpStream, peer: SocketAddr, router: Router, stop: CancellationToken) {
    // Signalling is small messages that somebody waits for.
    let _ = stream.set_nodelay(true);
    let service = hyper::service::service_fn(move |request: Request<Incoming>| {
        let mut request = request.map(Body::new);
        // The authorisation service counts requests by address.
        request.extensions_mut().insert(ConnectInfo(peer));
        if let Some(uri) = normalise(request.uri()) {
            *request.uri_mut() = uri;
        }
        let router = router.clone();
        async move {
            let response: Result<Response<Body>, Infallible> = router.oneshot(request).await;
            response
        }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_WITHIN)
        .max_buf_size(MAX_HEAD)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    tokio::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection ended early");
    }
}

/// Clients join the base URL and a path carelessly (`//rtc`), and know the SFU by two bases: the root, and
/// [`SFU_PATH`]. `None` if the URI is good as it is.
fn normalise(uri: &Uri) -> Option<Uri> {
    let path = uri.path();
    let folded = format!("/{}", path.trim_start_matches('/'));
    let path_of_sfu = match folded.strip_prefix(SFU_PATH) {
        Some("") => "/".to_owned(),
        Some(rest) if rest.starts_with('/') => format!("/{}", rest.trim_start_matches('/')),
        _ => folded,
    };
    if path_of_sfu == path {
        return None;
    }
    let path_and_query = match uri.query() {
        Some(query) => format!("{path_of_sfu}?{query}"),
        None => path_of_sfu,
    };
    // Every piece comes from a valid URI, so this one is valid too; if it were not, it would be served as it came.
    path_and_query.parse().ok()
}

/// What an administrator of a homeserver has to write so that its users find this focus.
pub(crate) fn homeserver_snippets(jwt_url: &str) -> String {
    let transport = serde_json::json!({ "type": "livekit", "livekit_service_url": jwt_url });
    let well_known = serde_json::json!({ "org.matrix.msc4143.rtc_foci": [transport] });
    format!(
        "Synapse, homeserver.yaml:\n\n\
         experimental_features:\n  msc4143_enabled: true\n  msc4222_enabled: true\n  msc4354_enabled: true\n\
         max_event_delay_duration: 24h\n\
         matrix_rtc:\n  transports:\n    - type: livekit\n      livekit_service_url: {jwt_url}\n\n\
         Any homeserver, for older clients, in https://<server name>/.well-known/matrix/client:\n\n{well_known:#}\n"
    )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn paths_of_both_bases_are_one() {
        let normal = |uri: &str| normalise(&uri.parse().unwrap()).map(|uri| uri.to_string());
        assert_eq!(normal("/rtc?a=b"), None);
        assert_eq!(normal("//rtc?a=b").unwrap(), "/rtc?a=b");
        assert_eq!(normal("/livekit/sfu/rtc/validate?a=b").unwrap(), "/rtc/validate?a=b");
        assert_eq!(normal("/livekit/sfu//rtc").unwrap(), "/rtc");
        assert_eq!(normal("/livekit/sfu").unwrap(), "/");
        assert_eq!(normal("/livekit/sfux"), None);
        assert_eq!(normal("//livekit/jwt/sfu/get").unwrap(), "/livekit/jwt/sfu/get");
    }

    proptest! {
        #[test]
        fn normalising_never_panics(path in "/[/a-z%?.]{0,40}") {
            if let Ok(uri) = path.parse::<Uri>() && let Some(normal) = normalise(&uri) {
                prop_assert!(!normal.path().starts_with("//"));
                prop_assert_eq!(normal.query(), uri.query());
            }
        }
    }
}
