//! Matrix server discovery: where a server name leads, which `Host` is sent and which name TLS is about.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use antiphon_jwt_service::{Resolve, ResolveError, Service, Settings, SrvRecord};
use async_trait::async_trait;
use axum::{
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use serde_json::json;

use crate::support::{
    Client, FakeSfu, Homeserver, Names, Reply, Seen, USERINFO, get_token, settings, sfu_get, userinfo,
};

const WELL_KNOWN: &str = "/.well-known/matrix/server";
const USERS: &[(&str, &str)] = &[("good", "alice")];

/// A homeserver called `hs.test`, whatever the `Host` header says, and what it serves as its well-known
/// document.
async fn homeserver(well_known: impl Fn(&Seen) -> Response + Send + Sync + 'static) -> Homeserver {
    Homeserver::start(move |seen| match seen.path.as_str() {
        WELL_KNOWN => well_known(seen),
        _ => userinfo(&Seen { host: "hs.test".into(), ..seen.clone() }, USERS),
    })
    .await
}

fn absent(_: &Seen) -> Response {
    StatusCode::NOT_FOUND.into_response()
}

fn delegate(to: &'static str) -> impl Fn(&Seen) -> Response + Send + Sync {
    move |_| json!({ "m.server": to }).to_string().into_response()
}

fn client(names: Names) -> Client {
    Client::with(settings(), FakeSfu::default(), names)
}

async fn ask(client: &Client) -> Reply {
    client.post("/get_token", get_token("hs.test", "good", "alice")).await
}

/// Path, `Host` and TLS name of each request.
fn trace(homeserver: &Homeserver) -> Vec<(String, String, Option<String>)> {
    homeserver.seen().into_iter().map(|s| (s.path, s.host, s.sni)).collect()
}

fn step(path: &str, host: &str, sni: &str) -> (String, String, Option<String>) {
    (path.to_owned(), host.to_owned(), Some(sni.to_owned()))
}

#[tokio::test]
async fn without_a_document_or_srv_records_it_is_port_8448() {
    let hs = homeserver(absent).await;
    let names = Names::default().address("hs.test", 443, hs.address).address("hs.test", 8448, hs.address);
    ask(&client(names)).await.claims();
    assert_eq!(trace(&hs), [step(WELL_KNOWN, "hs.test", "hs.test"), step(USERINFO, "hs.test", "hs.test")]);
}

#[tokio::test]
async fn a_name_with_a_port_is_taken_at_its_word() {
    let hs = Homeserver::with_users(USERS).await;
    let names =
        Names::default().address("hs.test", 1234, hs.address).service("_matrix-fed._tcp.hs.test", "x", 1);
    client(names).post("/get_token", get_token("hs.test:1234", "good", "alice")).await.claims();
    assert_eq!(trace(&hs), [step(USERINFO, "hs.test:1234", "hs.test")]);
}

#[tokio::test]
async fn an_srv_target_is_connected_to_under_the_servers_own_name() {
    let hs = homeserver(absent).await;
    for service in ["_matrix-fed._tcp.hs.test", "_matrix._tcp.hs.test"] {
        let names = Names::default()
            .address("hs.test", 443, hs.address)
            .address("target.test", 4433, hs.address)
            .service(service, "target.test", 4433);
        ask(&client(names)).await.claims();
    }
    let both = [step(WELL_KNOWN, "hs.test", "hs.test"), step(USERINFO, "hs.test", "hs.test")];
    assert_eq!(trace(&hs), [both.clone(), both].concat());
}

#[tokio::test]
async fn a_document_delegates_to_a_name_with_a_port() {
    let hs = homeserver(delegate("fed.test:4433")).await;
    let names = Names::default().address("hs.test", 443, hs.address).address("fed.test", 4433, hs.address);
    ask(&client(names)).await.claims();
    assert_eq!(
        trace(&hs),
        [step(WELL_KNOWN, "hs.test", "hs.test"), step(USERINFO, "fed.test:4433", "fed.test")]
    );
}

#[tokio::test]
async fn delegation_is_one_hop_then_srv_or_the_default_port() {
    let hs = homeserver(delegate("fed.test")).await;
    let names = || {
        Names::default()
            .address("hs.test", 443, hs.address)
            .address("fed.test", 443, hs.address)
            .address("fed.test", 8448, hs.address)
    };
    ask(&client(names())).await.claims();
    let srv =
        names().service("_matrix-fed._tcp.fed.test", "target.test", 1).address("target.test", 1, hs.address);
    ask(&client(srv)).await.claims();
    let both = [step(WELL_KNOWN, "hs.test", "hs.test"), step(USERINFO, "fed.test", "fed.test")];
    assert_eq!(trace(&hs), [both.clone(), both].concat(), "fed.test's own document is not asked for");
}

#[tokio::test]
async fn a_delegated_address_literal_needs_no_name() {
    let hs = homeserver(absent).await;
    let to: &'static str = Box::leak(hs.address.to_string().into_boxed_str());
    let front = homeserver(delegate(to)).await;
    let names = Names::default().address("hs.test", 443, front.address);
    ask(&client(names)).await.claims();
    assert_eq!(front.seen().len(), 1);
    assert_eq!(trace(&hs), [(USERINFO.to_owned(), to.to_owned(), None)], "an address has no SNI");
}

#[tokio::test]
async fn redirects_lead_to_the_document() {
    let hs = homeserver(|seen| match (seen.host.as_str(), seen.query.as_deref()) {
        ("hs.test", None) => {
            (StatusCode::FOUND, [(header::LOCATION, format!("{WELL_KNOWN}?again"))]).into_response()
        }
        ("hs.test", _) => {
            let to = format!("https://www.test:444{WELL_KNOWN}");
            (StatusCode::PERMANENT_REDIRECT, [(header::LOCATION, to)]).into_response()
        }
        _ => json!({ "m.server": "fed.test:4433" }).to_string().into_response(),
    })
    .await;
    let names = Names::default()
        .address("hs.test", 443, hs.address)
        .address("www.test", 444, hs.address)
        .address("fed.test", 4433, hs.address);
    ask(&client(names)).await.claims();
    let hosts: Vec<_> = trace(&hs).into_iter().map(|(_, host, _)| host).collect();
    assert_eq!(hosts, ["hs.test", "hs.test", "www.test:444", "fed.test:4433"]);
}

#[tokio::test]
async fn unusable_documents_are_passed_over() {
    type Answer = fn(&Seen) -> Response;
    let unusable: [(&str, Answer); 8] = [
        ("error", |_| StatusCode::INTERNAL_SERVER_ERROR.into_response()),
        ("a success other than 200", |_| {
            (StatusCode::CREATED, "{\"m.server\":\"fed.test:1\"}").into_response()
        }),
        ("no JSON", |_| "<html>".into_response()),
        ("no member", |_| "{}".into_response()),
        ("empty member", |_| "{\"m.server\":\"\"}".into_response()),
        ("too large", |_| {
            json!({ "m.server": "fed.test:1", "padding": "x".repeat(60_000) }).to_string().into_response()
        }),
        ("redirect loop", |_| (StatusCode::FOUND, [(header::LOCATION, WELL_KNOWN)]).into_response()),
        ("redirect to plain HTTP", |_| {
            (StatusCode::FOUND, [(header::LOCATION, "http://hs.test/")]).into_response()
        }),
    ];
    for (what, well_known) in unusable {
        let hs = homeserver(well_known).await;
        let names = Names::default().address("hs.test", 443, hs.address).address("hs.test", 8448, hs.address);
        ask(&client(names)).await.claims();
        assert_eq!(hs.lookups(), 1, "{what}");
        assert!(hs.seen().len() <= 12, "{what}: at most eleven requests for the document");
    }
}

#[tokio::test]
async fn a_document_that_delegates_to_nonsense_ends_the_lookup() {
    let hs = homeserver(delegate("https://fed.test")).await;
    let names = Names::default().address("hs.test", 443, hs.address).address("hs.test", 8448, hs.address);
    assert_eq!(ask(&client(names)).await.refusal(), (401, "M_UNAUTHORIZED".into()));
    assert_eq!(hs.lookups(), 0);
}

#[tokio::test]
async fn a_document_is_remembered_as_long_as_it_allows() {
    for (cache_control, fetched) in [("max-age=3600", 1), ("no-store", 3)] {
        let hs = homeserver(move |_| {
            let body = json!({ "m.server": "fed.test:4433" }).to_string();
            ([(header::CACHE_CONTROL, cache_control)], body).into_response()
        })
        .await;
        let names =
            Names::default().address("hs.test", 443, hs.address).address("fed.test", 4433, hs.address);
        let client = client(names);
        for _ in 0..3 {
            ask(&client).await.claims();
        }
        let documents = hs.seen().iter().filter(|s| s.path == WELL_KNOWN).count();
        assert_eq!((documents, hs.lookups()), (fetched, 3), "{cache_control}");
    }
}

#[tokio::test]
async fn a_dead_address_is_passed_over_for_the_next_srv_target() {
    let hs = homeserver(absent).await;
    // Bound and closed again: nobody listens there.
    let dead = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let names = Names::default()
        .address("dead.test", 1, dead)
        .address("target.test", 2, hs.address)
        .service("_matrix-fed._tcp.hs.test", "dead.test", 1)
        .service("_matrix-fed._tcp.hs.test", "unknown.test", 3)
        .service("_matrix-fed._tcp.hs.test", "target.test", 2);
    ask(&client(names)).await.claims();
}

#[tokio::test]
async fn a_homeserver_with_nothing_but_userinfo_on_loopback_works() {
    // The smallest deployment: an address with a port, HTTP/1.1 and h2 offered, both documents answered 404.
    let hs = Homeserver::with_users(USERS).await;
    let mut settings: Settings = settings();
    settings.full_access = antiphon_jwt_service::FullAccess::Only([].into());
    Client::new(settings).post("/sfu/get", sfu_get(&hs.name(), "good")).await.claims();
    assert_eq!(trace(&hs), [(USERINFO.to_owned(), hs.name(), None)]);
}

/// A name server that answers every second time.
struct Wavering(Names, AtomicUsize);

#[async_trait]
impl Resolve for Wavering {
    async fn addresses(&self, host: &str, port: u16) -> Result<Vec<SocketAddr>, ResolveError> {
        if self.1.fetch_add(1, Ordering::Relaxed).is_multiple_of(2) {
            return Err(ResolveError::NotFound);
        }
        self.0.addresses(host, port).await
    }

    async fn services(&self, name: &str) -> Result<Vec<SrvRecord>, ResolveError> {
        self.0.services(name).await
    }
}

#[tokio::test]
async fn a_server_that_cannot_be_connected_to_is_tried_once_more() {
    let hs = homeserver(absent).await;
    let names = Names::default().address("hs.test", 8008, hs.address);
    let names = Arc::new(Wavering(names, AtomicUsize::new(0)));
    let service = Service::with_resolver(settings(), Arc::new(FakeSfu::default()), names.clone()).unwrap();
    let client = Client::of(service);
    let reply = client.post("/get_token", get_token("hs.test:8008", "good", "alice")).await;
    // The fake vouches for users of another name; what counts is that it was asked.
    assert_eq!((reply.status, hs.lookups(), names.1.load(Ordering::Relaxed)), (401, 1, 2));
    let gone = client.post("/get_token", get_token("hs.test:1", "good", "alice")).await;
    assert_eq!((gone.status, names.1.load(Ordering::Relaxed)), (401, 4), "once, and no more");
}
