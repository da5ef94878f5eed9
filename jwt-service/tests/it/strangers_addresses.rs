//! A server name from a stranger cannot make us connect to our own networks: not directly, not through a
//! name, SRV, a delegation or a redirect. Servers that the operator has named may be there.

use std::net::SocketAddr;

use antiphon_jwt_service::{FullAccess, Settings, TlsPolicy};
use tokio::net::TcpListener;

use crate::support::{Client, FakeSfu, Homeserver, Names, settings, sfu_get};

fn strict() -> Settings {
    let mut strict = settings();
    strict.insecure_skip_verify_tls = TlsPolicy::Verify;
    strict
}

/// Asks for `name` with each of `names`, and expects a refusal without a connection to `internal`.
async fn refused(settings: Settings, name: &str, names: Names, internal: &TcpListener) {
    let client = Client::with(settings, FakeSfu::default(), names);
    let reply = client.post("/sfu/get", sfu_get(name, "token")).await;
    assert_eq!(reply.refusal(), (401, "M_UNAUTHORIZED".into()), "{name}");
    let connection = std::future::poll_fn(|cx| std::task::Poll::Ready(internal.poll_accept(cx))).await;
    assert!(connection.is_pending(), "{name}: somebody connected");
}

async fn internal() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

#[tokio::test]
async fn addresses_written_out_are_refused() {
    let (listener, address) = internal().await;
    let port = address.port();
    for name in [address.to_string(), format!("[::ffff:127.0.0.1]:{port}"), format!("[::1]:{port}")] {
        refused(strict(), &name, Names::default(), &listener).await;
    }
    for name in ["10.0.0.1", "169.254.169.254:80", "[fd00::1]", "0.0.0.0:1", "[::]:1"] {
        refused(strict(), name, Names::default(), &listener).await;
    }
}

#[tokio::test]
async fn names_that_lead_inside_are_refused() {
    let (listener, address) = internal().await;
    let direct = Names::default().address("evil.test", 443, address).address("evil.test", 8448, address);
    refused(strict(), "evil.test", direct, &listener).await;
    let with_port = Names::default().address("evil.test", 9000, address);
    refused(strict(), "evil.test:9000", with_port, &listener).await;
}

#[tokio::test]
async fn srv_records_that_lead_inside_are_refused() {
    let (listener, address) = internal().await;
    let by_name = Names::default().service("_matrix-fed._tcp.evil.test", "inside.test", 1).address(
        "inside.test",
        1,
        address,
    );
    refused(strict(), "evil.test", by_name, &listener).await;
    for target in ["127.0.0.1", ""] {
        let literal = Names::default().service("_matrix-fed._tcp.evil.test", target, address.port());
        refused(strict(), "evil.test", literal, &listener).await;
    }
}

#[tokio::test]
async fn the_wildcard_and_the_development_lists_open_nothing_for_names_of_strangers() {
    let (listener, address) = internal().await;
    let names = || Names::default().address("evil.test", 443, address).address("evil.test", 8448, address);
    let mut development = settings();
    development.insecure_skip_verify_tls = TlsPolicy::SkipLoopback;
    development.full_access = FullAccess::Loopback;
    refused(development, "evil.test", names(), &listener).await;
    let mut other = strict();
    other.full_access = FullAccess::Only(["good.test".to_owned()].into());
    refused(other, "evil.test", names(), &listener).await;
}

#[tokio::test]
async fn servers_named_by_the_operator_may_be_inside() {
    let homeserver = Homeserver::with_users(&[]).await;
    let name = homeserver.name();
    let mut listed = strict();
    listed.full_access = FullAccess::Only([name.clone()].into());
    let mut overridden = strict();
    overridden.cs_api_url_overrides = [(name.clone(), "http://127.0.0.1:8008".parse().unwrap())].into();
    let mut private = strict();
    private.private_homeservers = [name.clone()].into();
    for settings in [listed, overridden, private] {
        let before = homeserver.connections();
        let reply = Client::new(settings).post("/sfu/get", sfu_get(&name, "token")).await;
        // Its certificate is still checked, and nobody vouches for it.
        assert_eq!(reply.refusal(), (401, "M_UNAUTHORIZED".into()));
        assert!(homeserver.connections() > before, "it was connected to");
    }
    assert_eq!(homeserver.seen().len(), 0);
}
