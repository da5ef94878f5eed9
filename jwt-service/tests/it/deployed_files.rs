//! The files in `deploy/jwt-service` do what they say: a client reaches the service and the SFU through each of
//! the reverse proxies, and the unit starts the service with its settings.

use std::{fs, net::IpAddr, path::PathBuf, process, sync::Arc};

use antiphon_testkit::peers::{Peer, ports, process::Process, require};
use serde_json::json;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    process::Command,
    sync::mpsc,
    task::JoinSet,
    time::timeout,
};

use crate::{
    child::Program,
    support::{DEADLINE, Homeserver, get_token},
};

/// The service, the SFU and the homeserver, as the files have them.
const SERVICE: &str = "127.0.0.1:8080";
const SFU: &str = "127.0.0.1:7880";
const HOMESERVER: &str = "127.0.0.1:8008";
const FEDERATION: &str = "/_matrix/federation/v1/rtc/livekit/get_token";

fn deployed(name: &str) -> String {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../deploy/jwt-service");
    fs::read_to_string(folder.join(name)).unwrap()
}

/// `text` with `from` replaced, which must be there.
fn replaced(text: &str, from: &str, to: &str) -> String {
    assert!(text.contains(from), "{from} is not in the file");
    text.replace(from, to)
}

/// A reverse proxy with the files' sites for clients and for the homeserver.
struct Proxy {
    clients: u16,
    homeserver: u16,
    _process: Process,
    // Last: the folder must outlive the process.
    _folder: tempfile::TempDir,
}

impl Proxy {
    async fn nginx(service: &str, sfu: &str) -> Self {
        let (clients, homeserver) = (ports::free().unwrap(), ports::free().unwrap());
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().to_str().unwrap();
        let site = replaced(&replaced(&deployed("nginx.conf"), SERVICE, service), SFU, sfu);
        fs::write(folder.path().join("site.conf"), site).unwrap();
        let site = replaced(&deployed("nginx-homeserver.conf"), SERVICE, service);
        fs::write(folder.path().join("homeserver.conf"), site).unwrap();
        let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .map(|name| format!("{name}_temp_path {path}/{name};\n"))
            .concat();
        let configuration = format!(
            "daemon off; master_process off; pid {path}/pid; error_log stderr;\n\
             events {{}}\n\
             http {{\n access_log off;\n {temporary}\
             server {{ listen 127.0.0.1:{clients}; include {path}/site.conf; }}\n\
             server {{ listen 127.0.0.1:{homeserver}; include {path}/homeserver.conf; }}\n\
             }}\n"
        );
        let file = folder.path().join("nginx.conf");
        fs::write(&file, configuration).unwrap();
        let mut command = Command::new(Peer::Nginx.find().unwrap());
        command.arg("-p").arg(folder.path()).arg("-c").arg(file).args(["-e", "stderr"]);
        Self::start("nginx", command, clients, homeserver, folder).await
    }

    async fn caddy(service: &str, sfu: &str, behind: &str) -> Self {
        let (clients, homeserver) = (ports::free().unwrap(), ports::free().unwrap());
        let folder = tempfile::tempdir().unwrap();
        let mut sites = replaced(&replaced(&deployed("Caddyfile"), SERVICE, service), SFU, sfu);
        sites = replaced(&sites, HOMESERVER, behind);
        // Told apart by their ports alone: a site with a name takes requests for that name and no others.
        sites = replaced(&sites, "https://matrix-rtc.example.com", &format!("http://:{clients}"));
        sites = replaced(&sites, "https://matrix.example.com", &format!("http://:{homeserver}"));
        let global = "admin off\n\tauto_https off\n\tdefault_bind 127.0.0.1";
        let file = folder.path().join("Caddyfile");
        fs::write(&file, format!("{{\n\t{global}\n}}\n{sites}")).unwrap();
        let mut command = Command::new(Peer::Caddy.find().unwrap());
        command.args(["run", "--adapter", "caddyfile", "--config"]).arg(file);
        for variable in ["HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"] {
            command.env(variable, folder.path());
        }
        Self::start("Caddy", command, clients, homeserver, folder).await
    }

    async fn start(
        name: &'static str,
        command: Command,
        clients: u16,
        homeserver: u16,
        folder: tempfile::TempDir,
    ) -> Self {
        let mut process = Process::start(name, command, &folder.path().join("log")).unwrap();
        let listens = async || {
            let there = async |port| TcpStream::connect(("127.0.0.1", port)).await.is_ok();
            there(clients).await && there(homeserver).await
        };
        process.until("its ports", DEADLINE, listens).await.unwrap();
        Self { clients, homeserver, _process: process, _folder: folder }
    }

    fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.clients)
    }
}

/// A program that writes down the head of each request and answers it as told, then sends back what it gets.
async fn recorder(answer: &'static str) -> (String, mpsc::UnboundedReceiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (heads, seen) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let heads = heads.clone();
            tokio::spawn(async move {
                let Some(head) = head(&mut stream).await else { return };
                let _ = heads.send(head);
                let _ = stream.write_all(answer.as_bytes()).await;
                let (mut from, mut to) = stream.split();
                let _ = tokio::io::copy(&mut from, &mut to).await;
            });
        }
    });
    (address, seen)
}

/// What comes before the empty line; `None` if the connection ends before.
async fn head(stream: &mut TcpStream) -> Option<String> {
    let mut bytes = Vec::new();
    while !bytes.ends_with(b"\r\n\r\n") {
        bytes.push(stream.read_u8().await.ok()?);
    }
    Some(String::from_utf8(bytes).unwrap())
}

/// The value of a header in a head.
fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    head.lines().find_map(|line| {
        let (its, value) = line.split_once(':')?;
        its.eq_ignore_ascii_case(name).then(|| value.trim())
    })
}

/// A client that the proxy sees at this address.
fn client(address: &str) -> reqwest::Client {
    let address: IpAddr = address.parse().unwrap();
    reqwest::Client::builder().no_proxy().timeout(DEADLINE).local_address(address).build().unwrap()
}

/// The program with room for one request of each address.
async fn strict_service() -> Program {
    let mut service = Program::new();
    service
        .set("LIVEKIT_URL", "ws://sfu.test")
        .set("LIVEKIT_KEY", "devkey")
        .set("LIVEKIT_SECRET", "devsecret")
        // Nobody has full access, so the SFU is not called.
        .set("LIVEKIT_FULL_ACCESS_HOMESERVERS", "nobody.test")
        .set("LIVEKIT_INSECURE_SKIP_VERIFY_TLS", "YES_I_KNOW_WHAT_I_AM_DOING")
        .set("LIVEKIT_JWT_ADDRESS_RATE", "1")
        .set("LIVEKIT_JWT_ADDRESS_BURST", "1")
        .start()
        .await;
    service
}

async fn clients_reach_the_service_under_their_own_addresses(proxy: &Proxy) {
    let homeserver = Homeserver::with_users(&[("token", "alice")]).await;
    let body = get_token(&homeserver.name(), "token", "alice");
    let url = proxy.url("/livekit/jwt/get_token");
    let answer = client("127.0.0.1")
        .post(&url)
        .header("x-request-id", "forged")
        .header("origin", "https://call.example.com")
        .json(&body)
        .send()
        .await
        .unwrap();
    assert_eq!(answer.status(), 200);
    let headers = answer.headers();
    assert_ne!(headers["x-request-id"], "forged");
    assert_eq!(headers.get_all("access-control-allow-origin").iter().collect::<Vec<_>>(), ["*"]);
    let answer: serde_json::Value = answer.json().await.unwrap();
    assert_eq!(answer["url"], "ws://sfu.test");
    assert!(answer["jwt"].is_string());

    // Whatever it says about where it comes from, it is one client.
    let one = Arc::new(client("127.0.0.2"));
    let mut asked = JoinSet::new();
    for n in 0..20 {
        let request = one.post(&url).header("x-forwarded-for", format!("198.51.100.{n}")).body("{}");
        asked.spawn(async move { request.send().await.unwrap().status().as_u16() });
    }
    let statuses = asked.join_all().await;
    assert!(statuses.contains(&400) && statuses.contains(&429), "{statuses:?}");
    assert!(statuses.iter().all(|status| [400, 429].contains(status)), "{statuses:?}");
    let other = client("127.0.0.3").post(&url).body("{}").send().await.unwrap();
    assert_eq!(other.status(), 400, "another client is not held up");
}

async fn web_sockets_reach_the_sfu(proxy: &Proxy, seen: &mut mpsc::UnboundedReceiver<String>) {
    let mut stream = TcpStream::connect(("127.0.0.1", proxy.clients)).await.unwrap();
    let handshake = "GET /livekit/sfu/rtc?access_token=a.b.c HTTP/1.1\r\nHost: matrix-rtc.example.com\r\n\
                     Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
                     Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n";
    stream.write_all(handshake.as_bytes()).await.unwrap();
    let answer = timeout(DEADLINE, head(&mut stream)).await.unwrap().unwrap();
    assert!(answer.starts_with("HTTP/1.1 101"), "{answer}");
    let head = seen.recv().await.unwrap();
    assert!(head.starts_with("GET /rtc?access_token=a.b.c HTTP/1.1\r\n"), "{head}");
    assert_eq!(header(&head, "upgrade"), Some("websocket"));
    assert_eq!(header(&head, "sec-websocket-key"), Some("AAAAAAAAAAAAAAAAAAAAAA=="));
    stream.write_all(b"signal").await.unwrap();
    let mut echo = [0; 6];
    timeout(DEADLINE, stream.read_exact(&mut echo)).await.unwrap().unwrap();
    assert_eq!(&echo, b"signal");
}

async fn signed_requests_arrive_as_they_were_sent(proxy: &Proxy, seen: &mut mpsc::UnboundedReceiver<String>) {
    let path = format!("{FEDERATION}?x=%2f%61%20b");
    let signature = "X-Matrix origin=\"them.org\",destination=\"us.org\",key=\"ed25519:a\",sig=\"AAAA\"";
    let mut stream = TcpStream::connect(("127.0.0.1", proxy.homeserver)).await.unwrap();
    let request = format!(
        "POST {path} HTTP/1.1\r\nHost: us.org\r\nAuthorization: {signature}\r\nX-Forwarded-For: 198.51.100.1\r\n\
         Content-Length: 0\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let head = timeout(DEADLINE, seen.recv()).await.unwrap().unwrap();
    assert!(head.starts_with(&format!("POST {path} HTTP/1.")), "{head}");
    assert_eq!(header(&head, "authorization"), Some(signature));
    assert_eq!(header(&head, "host"), Some("us.org"));
    assert_eq!(header(&head, "x-forwarded-for"), Some("127.0.0.1"));
}

const SWITCHES: &str =
    "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n";
const EMPTY: &str = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n";

#[tokio::test]
async fn a_call_is_reached_through_nginx() {
    require!(Peer::Nginx);
    let service = strict_service().await;
    let (sfu, mut seen) = recorder(SWITCHES).await;
    let proxy = Proxy::nginx(&service.address(), &sfu).await;
    clients_reach_the_service_under_their_own_addresses(&proxy).await;
    web_sockets_reach_the_sfu(&proxy, &mut seen).await;
    let (service, mut seen) = recorder(EMPTY).await;
    let proxy = Proxy::nginx(&service, &sfu).await;
    signed_requests_arrive_as_they_were_sent(&proxy, &mut seen).await;
}

#[tokio::test]
async fn a_call_is_reached_through_caddy() {
    require!(Peer::Caddy);
    let service = strict_service().await;
    let (sfu, mut seen) = recorder(SWITCHES).await;
    let (homeserver, mut others) = recorder(EMPTY).await;
    let proxy = Proxy::caddy(&service.address(), &sfu, &homeserver).await;
    clients_reach_the_service_under_their_own_addresses(&proxy).await;
    web_sockets_reach_the_sfu(&proxy, &mut seen).await;
    let (service, mut seen) = recorder(EMPTY).await;
    let proxy = Proxy::caddy(&service, &sfu, &homeserver).await;
    signed_requests_arrive_as_they_were_sent(&proxy, &mut seen).await;
    // Everything else is the homeserver's.
    let path = "/_matrix/federation/v1/version";
    let answer = client("127.0.0.1").get(format!("http://127.0.0.1:{}{path}", proxy.homeserver));
    assert_eq!(answer.send().await.unwrap().status(), 200);
    let head = timeout(DEADLINE, others.recv()).await.unwrap().unwrap();
    assert!(head.starts_with(&format!("GET {path} HTTP/1.")), "{head}");
    assert!(seen.is_empty(), "the service does not see it");
}

/// The values that the unit sets, with its state in `folder` and its credentials there too.
fn environment(unit: &str, folder: &str) -> Vec<(String, String)> {
    let lines = unit.lines().filter_map(|line| line.strip_prefix("Environment=")?.split_once('='));
    let value = |value: &str| value.replace("%S", folder).replace("%d", folder);
    lines.map(|(name, its)| (name.to_owned(), value(its))).collect()
}

#[test]
fn the_unit_starts_the_service_with_the_settings() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_str().unwrap();
    let settings = folder.path().join("jwt-service.toml");
    fs::write(&settings, deployed("jwt-service.toml")).unwrap();
    fs::write(folder.path().join("livekit-key"), "key: secret\n").unwrap();
    let unit = deployed("jwt-service.service");
    let expected = "ExecStart=/usr/local/bin/jwt-service --config /etc/jwt-service/jwt-service.toml\n";
    assert!(unit.contains(expected));
    let environment = environment(&unit, path);
    assert_eq!(environment.len(), 2);
    let run = |flag: &str| {
        let mut command = process::Command::new(env!("CARGO_BIN_EXE_jwt-service"));
        command.env_clear().envs(environment.iter().cloned());
        let output = command.arg("--config").arg(&settings).arg(flag).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    run("--check-config");
    let printed: toml::Table = run("--print-config").parse().unwrap();
    let state = format!("{path}/jwt-service");
    for (key, value) in [("bind", "127.0.0.1:8080"), ("state_dir", &state)] {
        assert_eq!(printed[key].as_str(), Some(value), "{printed}");
    }
}

#[test]
fn the_unit_is_one() {
    require!(Peer::SystemdAnalyze);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("jwt-service.service");
    let unit = replaced(
        &deployed("jwt-service.service"),
        "/usr/local/bin/jwt-service",
        env!("CARGO_BIN_EXE_jwt-service"),
    );
    fs::write(&file, unit).unwrap();
    let analyze = |arguments: &[&str]| {
        let mut command = process::Command::new(Peer::SystemdAnalyze.find().unwrap());
        let output = command.args(arguments).arg(&file).output().unwrap();
        let text = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap()).concat();
        assert!(output.status.success(), "{text}");
        text
    };
    assert_eq!(analyze(&["verify"]), "", "unknown settings are only warned about");
    // Of 100: what an attacker who has taken the service over can do to the machine.
    analyze(&["security", "--offline=true", "--threshold=20"]);
}

#[test]
fn every_file_is_in_the_index() {
    let index = deployed("README.md");
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../deploy/jwt-service");
    for entry in fs::read_dir(folder).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(name == "README.md" || index.contains(&format!("| `{name}` |")), "{name}");
    }
    // The documents in it are what they should be.
    let json = index.split("```json\n").nth(1).unwrap().split("```").next().unwrap();
    let document: serde_json::Value = format!("{{{json}}}").parse().unwrap();
    let focus =
        json!({ "type": "livekit", "livekit_service_url": "https://matrix-rtc.example.com/livekit/jwt" });
    assert_eq!(document["org.matrix.msc4143.rtc_foci"], json!([focus]));
}
