//! What the service talks to: homeservers with TLS, one that hangs, and an SFU. They count what reaches them and
//! measure their own share of an exchange.

use std::{
    collections::HashMap,
    convert::Infallible,
    net::SocketAddr,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::{Request, Response, StatusCode, body::Incoming, header, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use livekit_protocol::{CreateRoomRequest, ParticipantInfo, Room};
use prost::Message as _;
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

/// How a homeserver speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Speech {
    /// As the service likes: HTTP/2 or HTTP/1.1, connections kept.
    Kept,
    /// HTTP/1.1, each connection closed after its answer, no resumption: what the reference costs itself.
    Close,
}

/// The fakes. All homeservers know every token `t<number>` as that of the user `@u<number>`.
pub(crate) struct Fakes {
    pub(crate) kept: Homeserver,
    pub(crate) close: Homeserver,
    /// Accepts, shakes hands, reads and never answers.
    pub(crate) hanging: Homeserver,
    pub(crate) sfu: Sfu,
}

impl Fakes {
    /// Starts all of them; the certificate of their authority is written to `authority`.
    pub(crate) async fn start(authority: &Path) -> Self {
        let certificates = Certificates::new(authority);
        Self {
            kept: Homeserver::start(&certificates, Some(Speech::Kept)).await,
            close: Homeserver::start(&certificates, Some(Speech::Close)).await,
            hanging: Homeserver::start(&certificates, None).await,
            sfu: Sfu::start().await,
        }
    }

    pub(crate) fn homeserver(&self, speech: Speech) -> &Homeserver {
        match speech {
            Speech::Kept => &self.kept,
            Speech::Close => &self.close,
        }
    }

    pub(crate) fn homeservers(&self) -> [&Homeserver; 3] {
        [&self.kept, &self.close, &self.hanging]
    }
}

/// One homeserver.
pub(crate) struct Homeserver {
    pub(crate) address: SocketAddr,
    pub(crate) seen: Arc<Seen>,
}

impl Homeserver {
    /// With no way of speaking it hangs.
    async fn start(certificates: &Certificates, speech: Option<Speech>) -> Self {
        let acceptor = certificates.acceptor(speech);
        let (listener, address) = bound().await;
        let seen = Arc::new(Seen::default());
        let fake = seen.clone();
        tokio::spawn(async move {
            while let Ok((tcp, _)) = listener.accept().await {
                let _ = tcp.set_nodelay(true);
                fake.connections.fetch_add(1, Ordering::Relaxed);
                let (acceptor, seen) = (acceptor.clone(), fake.clone());
                tokio::spawn(async move {
                    let Ok(tls) = acceptor.accept(tcp).await else { return };
                    let service = service_fn(move |request: Request<Incoming>| {
                        let seen = seen.clone();
                        async move {
                            match speech {
                                Some(speech) => {
                                    Ok::<_, Infallible>(homeserver_answers(&seen, &request, speech).await)
                                }
                                None => {
                                    seen.requests.fetch_add(1, Ordering::Relaxed);
                                    std::future::pending().await
                                }
                            }
                        }
                    });
                    // An error is a client that went away.
                    let _ = auto::Builder::new(TokioExecutor::new())
                        .serve_connection(TokioIo::new(tls), service)
                        .await;
                });
            }
        });
        Self { address, seen }
    }

    /// Its Matrix server name.
    pub(crate) fn name(&self) -> String {
        self.address.to_string()
    }

    /// TCP connections that it has accepted so far.
    pub(crate) fn connections(&self) -> u64 {
        self.seen.connections.load(Ordering::Relaxed)
    }
}

/// What reached a fake, how slow it is to be, and how long it had each exchange, if anybody wants to know.
#[derive(Default)]
pub(crate) struct Seen {
    connections: AtomicU64,
    requests: AtomicU64,
    delay_us: AtomicU64,
    shares: Mutex<Option<HashMap<String, Duration>>>,
}

impl Seen {
    pub(crate) fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }

    /// Answers take this long from now on, and shares are kept.
    pub(crate) fn measure(&self, delay: Duration) {
        self.delay_us.store(delay.as_micros() as u64, Ordering::Relaxed);
        *self.shares.lock().unwrap() = Some(HashMap::new());
    }

    /// Answers come at once again. The shares so far: by user at a homeserver, by room at the SFU.
    pub(crate) fn measured(&self) -> HashMap<String, Duration> {
        self.delay_us.store(0, Ordering::Relaxed);
        self.shares.lock().unwrap().take().unwrap_or_default()
    }

    async fn work(&self) {
        self.requests.fetch_add(1, Ordering::Relaxed);
        let delay = self.delay_us.load(Ordering::Relaxed);
        if delay > 0 {
            tokio::time::sleep(Duration::from_micros(delay)).await;
        }
    }

    fn share(&self, whose: &str, began: Instant) {
        if let Some(shares) = &mut *self.shares.lock().unwrap() {
            shares.insert(whose.to_owned(), began.elapsed());
        }
    }
}

async fn homeserver_answers(
    seen: &Seen,
    request: &Request<Incoming>,
    speech: Speech,
) -> Response<Full<Bytes>> {
    let began = Instant::now();
    let host = request.headers().get(header::HOST).and_then(|host| host.to_str().ok());
    let host = host.or_else(|| request.uri().authority().map(|authority| authority.as_str()));
    let token = request.uri().query().and_then(|query| query.strip_prefix("access_token=t"));
    let body = match (request.uri().path(), host, token) {
        ("/_matrix/federation/v1/openid/userinfo", Some(host), Some(number)) => {
            seen.work().await;
            seen.share(number, began);
            format!(r#"{{"sub":"@u{number}:{host}"}}"#)
        }
        // Delayed events of any kind, and whatever else is asked.
        _ => "{}".to_owned(),
    };
    let mut answer = Response::new(Full::new(body.into()));
    answer.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
    if speech == Speech::Close {
        answer.headers_mut().insert(header::CONNECTION, header::HeaderValue::from_static("close"));
    }
    answer
}

/// A LiveKit server that makes every room and has every participant.
pub(crate) struct Sfu {
    pub(crate) address: SocketAddr,
    pub(crate) seen: Arc<Seen>,
}

impl Sfu {
    async fn start() -> Self {
        let (listener, address) = bound().await;
        let seen = Arc::new(Seen::default());
        let fake = seen.clone();
        tokio::spawn(async move {
            while let Ok((tcp, _)) = listener.accept().await {
                let _ = tcp.set_nodelay(true);
                fake.connections.fetch_add(1, Ordering::Relaxed);
                let seen = fake.clone();
                tokio::spawn(async move {
                    let service = service_fn(move |request: Request<Incoming>| {
                        let seen = seen.clone();
                        async move { Ok::<_, Infallible>(sfu_answers(&seen, request).await) }
                    });
                    let _ = auto::Builder::new(TokioExecutor::new())
                        .serve_connection(TokioIo::new(tcp), service)
                        .await;
                });
            }
        });
        Self { address, seen }
    }
}

async fn sfu_answers(seen: &Seen, request: Request<Incoming>) -> Response<Full<Bytes>> {
    let began = Instant::now();
    let method = request.uri().path().rsplit('/').next().unwrap_or_default().to_owned();
    let body = request.into_body().collect().await.map(|body| body.to_bytes()).unwrap_or_default();
    let answer = match method.as_str() {
        "CreateRoom" => {
            let Ok(asked) = CreateRoomRequest::decode(body) else { return status(StatusCode::BAD_REQUEST) };
            seen.work().await;
            seen.share(&asked.name, began);
            let room = Room {
                sid: "RM_fHkk3wEnNoWa".to_owned(),
                name: asked.name,
                empty_timeout: asked.empty_timeout,
                departure_timeout: asked.departure_timeout,
                creation_time: 1_700_000_000,
                turn_password: "Xv4bCDlWsTcGwqKHfMWoPqWhnaRhXWsiVvu6lyhXnXk".to_owned(),
                ..Default::default()
            };
            room.encode_to_vec()
        }
        "GetParticipant" => {
            ParticipantInfo { sid: "PA_fHkk3wEnNoWa".to_owned(), ..Default::default() }.encode_to_vec()
        }
        _ => return status(StatusCode::NOT_FOUND),
    };
    let mut answer = Response::new(Full::new(answer.into()));
    let protobuf = header::HeaderValue::from_static("application/protobuf");
    answer.headers_mut().insert(header::CONTENT_TYPE, protobuf);
    answer
}

fn status(status: StatusCode) -> Response<Full<Bytes>> {
    let mut answer = Response::new(Full::default());
    *answer.status_mut() = status;
    answer
}

async fn bound() -> (TcpListener, SocketAddr) {
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
    // Two thousand may knock at once.
    let listener = socket.listen(4096).unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

/// An authority and one certificate of it for 127.0.0.1.
struct Certificates {
    chain: Vec<rustls::pki_types::CertificateDer<'static>>,
    key: Vec<u8>,
}

impl Certificates {
    fn new(authority: &Path) -> Self {
        let mut parameters = rcgen::CertificateParams::new([]).unwrap();
        parameters.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let issuer =
            rcgen::CertifiedIssuer::self_signed(parameters, rcgen::KeyPair::generate().unwrap()).unwrap();
        std::fs::write(authority, issuer.pem()).unwrap();
        let key = rcgen::KeyPair::generate().unwrap();
        let leaf = rcgen::CertificateParams::new(["127.0.0.1".to_owned()]).unwrap();
        let leaf = leaf.signed_by(&key, &issuer).unwrap();
        Self { chain: vec![leaf.der().clone()], key: key.serialize_der() }
    }

    fn acceptor(&self, speech: Option<Speech>) -> TlsAcceptor {
        let key = rustls::pki_types::PrivateKeyDer::try_from(self.key.clone()).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut tls = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(self.chain.clone(), key)
            .unwrap();
        if speech == Some(Speech::Close) {
            tls.send_tls13_tickets = 0;
            tls.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
        }
        tls.alpn_protocols = match speech {
            Some(Speech::Kept) => vec![b"h2".to_vec(), b"http/1.1".to_vec()],
            _ => vec![b"http/1.1".to_vec()],
        };
        TlsAcceptor::from(Arc::new(tls))
    }
}
