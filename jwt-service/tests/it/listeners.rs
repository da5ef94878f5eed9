//! Unix sockets, TLS, and a bound on connections.

use std::{fs, sync::Arc, time::Duration};

use antiphon_jwt_service::{
    Bind, Bounds, Certificate, Config, Rate, Service, Sources, listen, serve, serve_with,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpStream, UnixStream},
    sync::oneshot,
};

use crate::support::{DEADLINE, FakeSfu, settings};

const REQUEST: &[u8] = b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";

fn service() -> Service {
    Service::new(settings(), Arc::new(FakeSfu::default())).unwrap()
}

#[tokio::test]
async fn a_unix_socket_serves_and_goes_with_the_service() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("jwt.sock");
    // Left behind by one that was killed.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let bind: Bind = format!("unix:{}", path.display()).parse().unwrap();
    let listener = listen(&bind).await.unwrap();
    assert_eq!(listener.to_string(), bind.to_string());
    assert!(listen(&bind).await.is_err(), "one that is alive is not replaced");
    let mut limited = settings();
    limited.limits.per_address = Some(Rate { per_second: 1, burst: 1 });
    let service = Service::new(limited, Arc::new(FakeSfu::default())).unwrap();
    let (stop, stopped) = oneshot::channel::<()>();
    let server = tokio::spawn(serve(listener, service.router(), async { stopped.await.unwrap() }));
    let ask = async |forwarded_for: &str| {
        let mut stream = UnixStream::connect(&path).await.unwrap();
        let request = format!(
            "POST /get_token HTTP/1.1\r\nHost: x\r\nX-Forwarded-For: {forwarded_for}\r\nContent-Length: 2\r\n\
             Connection: close\r\n\r\n{{}}"
        );
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer[9..12].to_owned()
    };
    // The other end is a proxy, and is believed.
    assert_eq!(ask("203.0.113.1").await, "400");
    assert_eq!(ask("203.0.113.1").await, "429");
    assert_eq!(ask("203.0.113.2").await, "400");
    stop.send(()).unwrap();
    server.await.unwrap();
    assert!(!path.exists());
}

#[tokio::test]
async fn a_file_in_the_place_of_the_socket_is_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("jwt.sock");
    fs::write(&path, "somebody's letters").unwrap();
    let bind: Bind = format!("unix:{}", path.display()).parse().unwrap();
    let refused = listen(&bind).await.unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::AddrInUse);
    let mut program = std::process::Command::new(env!("CARGO_BIN_EXE_jwt-service"));
    program.env_clear().envs([
        ("LIVEKIT_URL", "ws://127.0.0.1:9"),
        ("LIVEKIT_KEY", "devkey"),
        ("LIVEKIT_SECRET", "devsecret"),
        ("LIVEKIT_FULL_ACCESS_HOMESERVERS", "hs.org"),
        ("LIVEKIT_JWT_BIND", &bind.to_string()),
        ("LIVEKIT_LOG_LEVEL", "error"),
    ]);
    let ended = program.output().unwrap();
    let said = String::from_utf8(ended.stderr).unwrap();
    assert_eq!(ended.status.code(), Some(1), "{said}");
    assert!(said.starts_with("jwt-service: LIVEKIT_JWT_BIND: cannot listen on unix:/"), "{said}");
    assert_eq!(fs::read_to_string(&path).unwrap(), "somebody's letters");
    // Nor is one behind a link.
    let link = directory.path().join("link.sock");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    listen(&format!("unix:{}", link.display()).parse().unwrap()).await.unwrap_err();
    assert!(link.is_symlink() && path.is_file());
}

#[tokio::test]
async fn tls_is_served_and_a_renewed_certificate_is_read_again() {
    let directory = tempfile::tempdir().unwrap();
    let (chain, key) = (directory.path().join("chain.pem"), directory.path().join("key.pem"));
    let renew = || {
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        fs::write(&chain, made.cert.pem()).unwrap();
        fs::write(&key, made.signing_key.serialize_pem()).unwrap();
        reqwest::Certificate::from_pem(made.cert.pem().as_bytes()).unwrap()
    };
    let client = |root: reqwest::Certificate| {
        reqwest::Client::builder().no_proxy().tls_certs_only([root]).build().unwrap()
    };
    let first = client(renew());
    let toml = format!(
        "livekit_url = 'ws://x'\nkey = 'k'\nsecret = 's'\nfull_access_homeservers = '*'\n\
         tls_cert_file = '{}'\ntls_key_file = '{}'",
        chain.display(),
        key.display()
    );
    let sources = Sources::default().with_toml("x".as_ref(), &toml.into()).unwrap();
    let certificate = Certificate::load(Config::load(&sources).unwrap().tls.unwrap()).unwrap();
    let listener = listen(&Bind::loopback(0)).await.unwrap().with_certificate(certificate.clone());
    let url = format!("https://localhost:{}/healthz", listener.local_addr().unwrap().port());
    let server = tokio::spawn(serve(listener, service().router(), std::future::pending()));
    assert_eq!(first.get(&url).send().await.unwrap().status(), 200);

    let second = client(renew());
    assert!(second.get(&url).send().await.is_err());
    certificate.reload().unwrap();
    assert_eq!(second.get(&url).send().await.unwrap().status(), 200);

    fs::write(&key, "no key").unwrap();
    let text = certificate.reload().unwrap_err().to_string();
    assert!(text.contains("key.pem"), "{text}");
    assert_eq!(second.get(&url).send().await.unwrap().status(), 200, "the old one stays");
    server.abort();
}

#[tokio::test]
async fn connections_beyond_the_bound_wait_their_turn() {
    let listener = listen(&Bind::loopback(0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let mut bounds = Bounds::default();
    bounds.connections = 1;
    let server = tokio::spawn(serve_with(listener, service().router(), bounds, std::future::pending()));
    let mut first = TcpStream::connect(address).await.unwrap();
    first.write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    let mut status = [0; 12];
    first.read_exact(&mut status).await.unwrap();
    assert_eq!(&status, b"HTTP/1.1 200");

    let mut second = TcpStream::connect(address).await.unwrap();
    second.write_all(REQUEST).await.unwrap();
    let mut answer = Vec::new();
    let waiting = tokio::time::timeout(Duration::from_millis(200), second.read_to_end(&mut answer)).await;
    assert!(waiting.is_err(), "the first still has the only place");
    drop(first);
    second.read_to_end(&mut answer).await.unwrap();
    assert!(answer.starts_with(b"HTTP/1.1 200"));
    server.abort();
}

#[tokio::test]
async fn one_address_holds_so_many_connections_unless_it_is_a_proxy() {
    for (trusted, turned_away) in [("none", true), ("private", false)] {
        let listener = listen(&Bind::loopback(0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut bounds = Bounds::default();
        (bounds.per_address, bounds.trusted_proxies) = (Some(1), trusted.parse().unwrap());
        let server = tokio::spawn(serve_with(listener, service().router(), bounds, std::future::pending()));
        let mut first = TcpStream::connect(address).await.unwrap();
        first.write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
        first.read_exact(&mut [0; 12]).await.unwrap();
        let ask = async || {
            let mut another = TcpStream::connect(address).await.unwrap();
            let mut answer = Vec::new();
            // One that is turned away may be closed before all is written.
            let _ = another.write_all(REQUEST).await;
            let _ = another.read_to_end(&mut answer).await;
            answer.is_empty()
        };
        assert_eq!(ask().await, turned_away, "{trusted}");
        drop(first);
        // Its place is free as soon as its end is noticed.
        let freed = async {
            while ask().await {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(DEADLINE, freed).await.expect("in time");
        server.abort();
    }
}

/// A connection to `service`, which runs as long as the test.
async fn connected(service: &Service) -> TcpStream {
    let listener = listen(&Bind::loopback(0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(serve(listener, service.router(), std::future::pending()));
    TcpStream::connect(address).await.unwrap()
}

/// The next answer's head, in lower case. What is left of the connection is at its body.
async fn answer_head(stream: &mut TcpStream) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let byte = tokio::time::timeout(DEADLINE, stream.read_u8()).await.expect("in time");
        head.push(byte.unwrap());
    }
    String::from_utf8(head).unwrap().to_ascii_lowercase()
}

/// A service that has one request for each address.
fn strict() -> Service {
    let mut strict = settings();
    strict.limits.per_address = Some(Rate { per_second: 1, burst: 1 });
    strict.limits.trusted_proxies = "none".parse().unwrap();
    Service::new(strict, Arc::new(FakeSfu::default())).unwrap()
}

#[tokio::test]
async fn who_is_answered_before_their_body_came_is_told_that_the_connection_ends() {
    let mut full = settings();
    full.limits.in_flight = 0;
    let full = Service::new(full, Arc::new(FakeSfu::default())).unwrap();
    let limited = strict();
    let mut first = connected(&limited).await;
    first.write_all(b"POST /get_token HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}").await.unwrap();
    assert!(answer_head(&mut first).await.starts_with("http/1.1 400"));
    let mut hasty = settings();
    hasty.limits.body_time = Duration::from_millis(50);
    let hasty = Service::new(hasty, Arc::new(FakeSfu::default())).unwrap();
    for (service, request, status) in [
        (&service(), "POST /get_token", "413"),
        (&limited, "POST /get_token", "429"),
        (&full, "POST /sfu/get", "429"),
        (&hasty, "POST /get_token", "408"),
        (&service(), "POST /nowhere", "404"),
        (&service(), "PUT /get_token", "405"),
    ] {
        let mut stream = connected(service).await;
        let length = if status == "408" { 100 } else { 10_000_000 };
        let head = format!("{request} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n{{");
        stream.write_all(head.as_bytes()).await.unwrap();
        let answer = answer_head(&mut stream).await;
        assert!(answer.starts_with(&format!("http/1.1 {status}")), "{answer}");
        assert!(answer.contains("\r\nconnection: close\r\n"), "{answer}");
        let mut rest = Vec::new();
        let end = tokio::time::timeout(DEADLINE, stream.read_to_end(&mut rest)).await;
        end.expect("the end in time").unwrap();
    }
}

#[tokio::test]
async fn a_body_that_came_along_with_a_refused_request_leaves_the_connection_open() {
    let mut stream = connected(&strict()).await;
    for status in ["400", "429", "429"] {
        let request = b"POST /get_token HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}";
        stream.write_all(request).await.unwrap();
        let answer = answer_head(&mut stream).await;
        assert!(answer.starts_with(&format!("http/1.1 {status}")), "{answer}");
        assert!(!answer.contains("\r\nconnection:"), "{answer}");
        let (_, length) = answer.split_once("\r\ncontent-length: ").unwrap();
        let length: usize = length.split_once('\r').unwrap().0.parse().unwrap();
        stream.read_exact(&mut vec![0; length]).await.unwrap();
    }
}
