//! Media through a TURN server (coturn) that takes clients over TCP and TLS only.

use super::*;

const USER: &str = "antiphon";
const PASSWORD: &str = "turnsecretturnsecret";

#[tokio::test(flavor = "multi_thread")]
async fn media_is_relayed_over_turn_on_tcp() {
    relayed("turn:127.0.0.1:PORT?transport=tcp", PASSWORD).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn media_is_relayed_over_turn_on_tls() {
    relayed("turns:localhost:PORT?transport=tcp", PASSWORD).await;
}

/// The member that is relayed sends to, and hears, one that is not.
async fn relayed(url: &str, password: &str) {
    require!(Peer::LiveKit, Peer::Coturn, Peer::LoopbackOnly);
    let server = Server::start().await;
    let turn = Turn::start().await;
    let port = if url.starts_with("turns") { turn.tls_port } else { turn.port };
    let mut options = ConnectOptions::new(server.url(), server.token("room", "relayed", true));
    options.relay_only = true;
    options.tls = Some(turn.tls.clone());
    options.ice_servers = vec![IceServer {
        urls: vec![url.replace("PORT", &port.to_string())],
        username: USER.to_owned(),
        credential: password.to_owned(),
    }];
    let mut relayed = Member::enter_with(options).await;
    let mut direct = Member::enter(&server, "direct").await;
    let (one, other) = (Sending::start(&relayed, true).await, Sending::start(&direct, true).await);
    for (member, from) in [(&mut relayed, "direct"), (&mut direct, "relayed")] {
        let camera = member.until(published(from, TrackSource::Camera)).await;
        member.receive(&camera.sid, Codec::Vp8, 40).await;
    }
    one.stop().await;
    other.stop().await;
    assert!(turn.log().contains("peer usage"), "coturn relayed nothing: {}", turn.log());
}

/// coturn with a certificate of an authority of its own.
struct Turn {
    port: u16,
    tls_port: u16,
    tls: Arc<rustls::ClientConfig>,
    folder: tempfile::TempDir,
    _process: tokio::process::Child,
}

impl Turn {
    async fn start() -> Self {
        let binary = Peer::Coturn.find().unwrap();
        let (port, tls_port) = (free_port(), free_port());
        let folder = tempfile::tempdir().unwrap();
        let key = rcgen::KeyPair::generate().unwrap();
        let mut ca = rcgen::CertificateParams::new(Vec::new()).unwrap();
        ca.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let root = ca.self_signed(&key).unwrap().pem();
        let issuer = rcgen::Issuer::new(ca, key);
        let key = rcgen::KeyPair::generate().unwrap();
        let leaf = rcgen::CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        let leaf = leaf.signed_by(&key, &issuer).unwrap();
        std::fs::write(folder.path().join("cert.pem"), leaf.pem()).unwrap();
        std::fs::write(folder.path().join("key.pem"), key.serialize_pem()).unwrap();
        let log = std::fs::File::create(folder.path().join("log")).unwrap();
        let process = tokio::process::Command::new(binary)
            .args(["-n", "--no-cli", "--no-udp", "--no-dtls", "--lt-cred-mech", "--realm=example.org"])
            .args(["--listening-ip=127.0.0.1", "--relay-ip=127.0.0.1", "--allow-loopback-peers"])
            .arg(format!("--user={USER}:{PASSWORD}"))
            .args([format!("--listening-port={port}"), format!("--tls-listening-port={tls_port}")])
            .args(["--cert=cert.pem", "--pkey=key.pem", "--log-file=stdout", "--pidfile=pid", "--verbose"])
            .args(["--db=turn.sqlite"])
            .current_dir(folder.path())
            .stdout(Stdio::from(log.try_clone().unwrap()))
            .stderr(Stdio::from(log))
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut options = TlsOptions::default();
        options.extra_roots = vec![ExtraRoots::Pem(root.into_bytes())];
        let tls = client_config(&options).unwrap();
        let turn = Self { port, tls_port, tls, folder, _process: process };
        let listening = async {
            for port in [port, tls_port] {
                while tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_err() {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        };
        timeout(PATIENCE, listening).await.unwrap_or_else(|_| panic!("coturn is not ready: {}", turn.log()));
        turn
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }
}
