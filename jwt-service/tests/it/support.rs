//! Fakes: a homeserver with a self-signed certificate, an SFU, a resolver, and a client of the service.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use antiphon_jwt_service::{
    FullAccess, Resolve, ResolveError, Service, Settings, Sfu, SfuError, SfuRoom, SrvRecord, TlsPolicy,
};
use async_trait::async_trait;
use axum::{
    Router,
    body::Body,
    extract::Request,
    http::{HeaderMap, Method, StatusCode, Uri, header},
    response::{IntoResponse, Response},
};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
    service::TowerToHyperService,
};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tower::ServiceExt as _;

pub(crate) const USERINFO: &str = "/_matrix/federation/v1/openid/userinfo";
/// Long enough for a loaded machine, short enough that a hang fails the test.
pub(crate) const DEADLINE: Duration = Duration::from_secs(30);

/// One request that a homeserver has seen.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    pub(crate) method: Method,
    pub(crate) path: String,
    pub(crate) query: Option<String>,
    pub(crate) host: String,
    pub(crate) sni: Option<String>,
    pub(crate) headers: HeaderMap,
}

type Answer = dyn Fn(&Seen) -> Response + Send + Sync;

/// TLS with a self-signed certificate for this machine.
pub(crate) fn certificate() -> rustls::ServerConfig {
    let certified =
        rcgen::generate_simple_self_signed(["127.0.0.1".to_owned(), "localhost".to_owned()]).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            vec![certified.cert.der().clone()],
            rustls::pki_types::PrivateKeyDer::try_from(certified.signing_key.serialize_der()).unwrap(),
        )
        .unwrap()
}

/// An HTTPS server on 127.0.0.1 with a self-signed certificate that offers HTTP/1.1 and h2.
pub(crate) struct Homeserver {
    pub(crate) address: SocketAddr,
    seen: Arc<Mutex<Vec<Seen>>>,
    peers: Arc<Mutex<Vec<SocketAddr>>>,
}

impl Homeserver {
    pub(crate) async fn start(answer: impl Fn(&Seen) -> Response + Send + Sync + 'static) -> Self {
        let mut tls = certificate();
        tls.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        let acceptor = TlsAcceptor::from(Arc::new(tls));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let peers = Arc::new(Mutex::new(Vec::new()));
        let answer: Arc<Answer> = Arc::new(answer);
        tokio::spawn({
            let (seen, peers) = (seen.clone(), peers.clone());
            async move {
                while let Ok((tcp, peer)) = listener.accept().await {
                    peers.lock().unwrap().push(peer);
                    let (acceptor, seen, answer) = (acceptor.clone(), seen.clone(), answer.clone());
                    tokio::spawn(async move {
                        let Ok(tls) = acceptor.accept(tcp).await else { return };
                        let sni = tls.get_ref().1.server_name().map(str::to_owned);
                        let router = Router::new().fallback(move |request: Request| {
                            let one = Seen {
                                method: request.method().clone(),
                                path: request.uri().path().to_owned(),
                                query: request.uri().query().map(str::to_owned),
                                host: request.headers()[header::HOST].to_str().unwrap().to_owned(),
                                sni: sni.clone(),
                                headers: request.headers().clone(),
                            };
                            seen.lock().unwrap().push(one.clone());
                            let answer = answer(&one);
                            async move { answer }
                        });
                        let service = TowerToHyperService::new(router);
                        let _ = auto::Builder::new(TokioExecutor::new())
                            .serve_connection(TokioIo::new(tls), service)
                            .await;
                    });
                }
            }
        });
        Self { address, seen, peers }
    }

    /// A homeserver that knows the tokens in `users` (token, local part) and answers 404 to all but userinfo.
    pub(crate) async fn with_users(users: &'static [(&'static str, &'static str)]) -> Self {
        Self::start(move |seen| userinfo(seen, users)).await
    }

    /// Its Matrix server name.
    pub(crate) fn name(&self) -> String {
        self.address.to_string()
    }

    pub(crate) fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }

    pub(crate) fn lookups(&self) -> usize {
        self.seen().iter().filter(|s| s.path == USERINFO).count()
    }

    pub(crate) fn connections(&self) -> usize {
        self.peers().len()
    }

    /// Who has connected, oldest first.
    pub(crate) fn peers(&self) -> Vec<SocketAddr> {
        self.peers.lock().unwrap().clone()
    }
}

/// What a homeserver named as in the `Host` header answers about `users`.
pub(crate) fn userinfo(seen: &Seen, users: &[(&str, &str)]) -> Response {
    if seen.path != USERINFO {
        return StatusCode::NOT_FOUND.into_response();
    }
    let token = url::form_urlencoded::parse(seen.query.as_deref().unwrap_or_default().as_bytes())
        .find(|(name, _)| name == "access_token")
        .map(|(_, token)| token.into_owned());
    match users.iter().find(|(t, _)| Some(*t) == token.as_deref()) {
        Some((_, user)) => json!({ "sub": format!("@{user}:{}", seen.host) }).to_string().into_response(),
        None => {
            (StatusCode::UNAUTHORIZED, json!({ "errcode": "M_UNKNOWN_TOKEN" }).to_string()).into_response()
        }
    }
}

/// An SFU in this process that remembers what it was asked, and can be told to fail.
#[derive(Default)]
pub(crate) struct FakeSfu {
    rooms: Mutex<Vec<String>>,
    broken: bool,
}

impl FakeSfu {
    /// One that fails at every request.
    pub(crate) fn broken() -> Self {
        Self { broken: true, ..Self::default() }
    }

    pub(crate) fn rooms(&self) -> Vec<String> {
        self.rooms.lock().unwrap().clone()
    }
}

#[async_trait]
impl Sfu for FakeSfu {
    async fn create_room(&self, alias: &str) -> Result<SfuRoom, SfuError> {
        self.rooms.lock().unwrap().push(alias.to_owned());
        if self.broken { Err(SfuError::NotARoom) } else { Ok(SfuRoom::new("RM_1")) }
    }
}

/// Names that resolve as the test says, to any port.
#[derive(Default)]
pub(crate) struct Names {
    addresses: HashMap<(String, u16), SocketAddr>,
    services: HashMap<String, Vec<SrvRecord>>,
}

impl Names {
    pub(crate) fn address(mut self, host: &str, port: u16, to: SocketAddr) -> Self {
        self.addresses.insert((host.to_owned(), port), to);
        self
    }

    pub(crate) fn service(mut self, name: &str, target: &str, port: u16) -> Self {
        let record = SrvRecord { priority: 0, weight: 0, port, target: target.to_owned() };
        self.services.entry(name.to_owned()).or_default().push(record);
        self
    }
}

#[async_trait]
impl Resolve for Names {
    async fn addresses(&self, host: &str, port: u16) -> Result<Vec<SocketAddr>, ResolveError> {
        self.addresses.get(&(host.to_owned(), port)).map(|a| vec![*a]).ok_or(ResolveError::NotFound)
    }

    async fn services(&self, name: &str) -> Result<Vec<SrvRecord>, ResolveError> {
        self.services.get(name).cloned().ok_or(ResolveError::NotFound)
    }
}

/// Settings for a deployment on this machine: everyone has full access, certificates are not checked.
pub(crate) fn settings() -> Settings {
    let mut settings = Settings::new("ws://sfu.test:7880/path", "devkey", "devsecret");
    settings.full_access = FullAccess::All;
    settings.insecure_skip_verify_tls = TlsPolicy::SkipAll;
    settings
}

/// The service under test, reached without a socket.
pub(crate) struct Client {
    router: Router,
    pub(crate) sfu: Arc<FakeSfu>,
}

impl Client {
    pub(crate) fn new(settings: Settings) -> Self {
        Self::with(settings, FakeSfu::default(), Names::default())
    }

    pub(crate) fn with(settings: Settings, sfu: FakeSfu, names: Names) -> Self {
        let sfu = Arc::new(sfu);
        let service = Service::with_resolver(settings, sfu.clone(), Arc::new(names)).unwrap();
        Self { router: service.router(), sfu }
    }

    /// With this machine's own name resolution.
    pub(crate) fn on_this_machine(settings: Settings) -> Self {
        let sfu = Arc::new(FakeSfu::default());
        let service = Service::new(settings, sfu.clone()).unwrap();
        Self { router: service.router(), sfu }
    }

    /// Of a service that the test has made.
    pub(crate) fn of(service: Service) -> Self {
        Self { router: service.router(), sfu: Arc::new(FakeSfu::default()) }
    }

    pub(crate) async fn send(&self, method: Method, path: &str, body: impl Into<Body>) -> Reply {
        let request =
            Request::builder().method(method).uri(path.parse::<Uri>().unwrap()).body(body.into()).unwrap();
        self.request(request).await
    }

    pub(crate) async fn request(&self, request: Request) -> Reply {
        let answer = tokio::time::timeout(DEADLINE, self.router.clone().oneshot(request)).await;
        let (parts, body) = answer.expect("answered in time").unwrap().into_parts();
        let text = axum::body::to_bytes(body, 1 << 20).await.unwrap();
        let text = String::from_utf8(text.to_vec()).unwrap();
        Reply { status: parts.status.as_u16(), headers: parts.headers, text }
    }

    pub(crate) async fn post(&self, path: &str, body: impl ToString) -> Reply {
        self.send(Method::POST, path, body.to_string()).await
    }
}

/// What the service answered.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    pub(crate) text: String,
}

impl Reply {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap()
    }

    /// Status and Matrix error code of a refusal, whose body has exactly the two members it must have and the
    /// request's id.
    pub(crate) fn refusal(&self) -> (u16, String) {
        let json = self.json();
        assert_eq!(json.as_object().unwrap().len(), 3, "{json}");
        assert_eq!(json["request_id"], self.headers["x-request-id"].to_str().unwrap());
        assert!(json["error"].is_string() && self.text.ends_with('\n'), "{json}");
        (self.status, json["errcode"].as_str().unwrap().to_owned())
    }

    /// The claims of the token in a successful answer.
    pub(crate) fn claims(&self) -> Value {
        assert_eq!(self.status, 200, "{}", self.text);
        let json = self.json();
        let payload = json["jwt"].as_str().unwrap().split('.').nth(1).unwrap().to_owned();
        serde_json::from_slice(&URL_SAFE_NO_PAD.decode(payload).unwrap()).unwrap()
    }
}

/// A complete `/get_token` body for `user` of `server` with `token`.
pub(crate) fn get_token(server: &str, token: &str, user: &str) -> Value {
    json!({
        "room_id": "!room:hs", "slot_id": "m.call#ROOM",
        "openid_token": {
            "access_token": token, "token_type": "Bearer", "matrix_server_name": server, "expires_in": 3600,
        },
        "member": {
            "id": "member-1", "claimed_user_id": format!("@{user}:{server}"), "claimed_device_id": "DEVICE",
        },
    })
}

/// A complete `/sfu/get` body.
pub(crate) fn sfu_get(server: &str, token: &str) -> Value {
    json!({
        "room": "!room:hs", "device_id": "DEVICE",
        "openid_token": {
            "access_token": token, "token_type": "Bearer", "matrix_server_name": server, "expires_in": 3600,
        },
    })
}
