//! The binary: start-up errors that say what to do, serving, the health check, an orderly end.

use std::{
    net::SocketAddr,
    process::{Output, Stdio},
};

use antiphon_jwt_service::EMPTY_TIMEOUT;
use axum::{Router, body::Bytes, response::IntoResponse};
use livekit_protocol::{CreateRoomRequest, Room};
use prost::Message as _;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader},
    net::TcpListener,
    process::{Child, ChildStderr, Command},
    time::timeout,
};

use crate::support::{DEADLINE, Homeserver, get_token};

const GOOD: [(&str, &str); 5] = [
    ("LIVEKIT_URL", "ws://127.0.0.1:9"),
    ("LIVEKIT_KEY", "devkey"),
    ("LIVEKIT_SECRET", "hunter2"),
    ("LIVEKIT_FULL_ACCESS_HOMESERVERS", "*"),
    ("LIVEKIT_JWT_BIND", "127.0.0.1:0"),
];

/// The program with a good environment and these changes.
fn program(changes: &[(&str, &str)]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_jwt-service"));
    command.env_clear().envs(GOOD).envs(changes.iter().copied());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    command
}

async fn output(mut command: Command) -> Output {
    timeout(DEADLINE, command.output()).await.expect("ends in time").unwrap()
}

/// The program, listening.
struct Running {
    child: Child,
    address: SocketAddr,
    stderr: BufReader<ChildStderr>,
}

async fn start(changes: &[(&str, &str)]) -> Running {
    let mut child = program(changes).spawn().unwrap();
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    let address = timeout(DEADLINE, async {
        let mut line = String::new();
        loop {
            line.clear();
            assert!(stderr.read_line(&mut line).await.unwrap() > 0, "it ended");
            if let Some((_, address)) = line.split_once("listening address=") {
                return address.trim().parse().unwrap();
            }
        }
    })
    .await
    .expect("listens in time");
    Running { child, address, stderr }
}

#[tokio::test]
async fn start_up_errors_name_the_variable_and_the_remedy() {
    for (changes, expected) in [
        (("LIVEKIT_URL", ""), "LIVEKIT_URL is not set; write "),
        (("LIVEKIT_KEY", ""), "LIVEKIT_KEY is not set; write "),
        (("LIVEKIT_SECRET", " "), "LIVEKIT_SECRET is not set; write "),
        (("LIVEKIT_KEY_FILE", "/nonexistent"), "LIVEKIT_KEY_FILE: /nonexistent cannot be read; check "),
        (("LIVEKIT_FULL_ACCESS_HOMESERVERS", ""), "LIVEKIT_FULL_ACCESS_HOMESERVERS is not set; write "),
        (("LIVEKIT_JWT_BIND", "8080"), "LIVEKIT_JWT_BIND: \"8080\" has no colon before the port; write "),
        (("LIVEKIT_JWT_PORT", "8080"), "LIVEKIT_JWT_BIND and LIVEKIT_JWT_PORT are both set; keep "),
        (("LIVEKIT_CS_API_URL_OVERRIDES", "a=b,"), "LIVEKIT_CS_API_URL_OVERRIDES: "),
        (
            ("LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS", "1.5"),
            "LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS: \"1.5\" is not ",
        ),
        (("LIVEKIT_REDIS_URL", "redis://u:hunter2@h"), "LIVEKIT_REDIS_URL is set, but "),
        (("LIVEKIT_JWT_BIND", "192.0.2.1:1"), "LIVEKIT_JWT_BIND: cannot listen on 192.0.2.1:1 ("),
    ] {
        // Whatever the log level, the reason is printed.
        let ended = output(program(&[changes, ("LIVEKIT_LOG_LEVEL", "error")])).await;
        let stderr = String::from_utf8(ended.stderr).unwrap();
        assert_eq!(ended.status.code(), Some(1), "{stderr}");
        assert!(stderr.starts_with(&format!("jwt-service: {expected}")), "{stderr}");
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
        assert!(!stderr.contains("hunter2"), "{stderr}");
    }
}

#[tokio::test]
async fn help_teaches_the_environment() {
    let mut command = program(&[]);
    command.arg("--help");
    let help = output(command).await;
    let text = String::from_utf8(help.stdout).unwrap();
    assert!(help.status.success());
    for variable in [
        "LIVEKIT_URL",
        "LIVEKIT_KEY",
        "LIVEKIT_SECRET",
        "LIVEKIT_KEY_FROM_FILE",
        "LIVEKIT_SECRET_FROM_FILE",
        "LIVEKIT_KEY_FILE",
        "LIVEKIT_FULL_ACCESS_HOMESERVERS",
        "LIVEKIT_JWT_BIND",
        "LIVEKIT_LOG_LEVEL",
        "LIVEKIT_CS_API_URL_OVERRIDES",
        "LIVEKIT_PRIVATE_HOMESERVERS",
        "LIVEKIT_INSECURE_SKIP_VERIFY_TLS",
    ] {
        assert!(text.contains(variable), "{variable}");
    }
}

#[tokio::test]
async fn the_health_check_tells_a_running_service_from_none() {
    let running = start(&[]).await;
    let check = async |bind: &str| {
        // It needs the address and nothing else.
        let mut command = program(&[("LIVEKIT_JWT_BIND", bind), ("LIVEKIT_URL", ""), ("LIVEKIT_KEY", "")]);
        command.arg("--healthcheck");
        output(command).await
    };
    assert!(check(&running.address.to_string()).await.status.success());
    assert!(check(&format!(":{}", running.address.port())).await.status.success());
    let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let failed = check(&nobody.to_string()).await;
    assert_eq!(failed.status.code(), Some(1));
    let stderr = String::from_utf8(failed.stderr).unwrap();
    assert!(stderr.starts_with(&format!("jwt-service: not healthy at {nobody}: ")), "{stderr}");
}

#[tokio::test]
async fn a_deployment_on_loopback_admits_a_user_and_logs_no_secret() {
    let homeserver = Homeserver::with_users(&[("syt_token", "alice")]).await;
    let (sfu, created) = sfu().await;
    let mut running = start(&[
        ("LIVEKIT_URL", &sfu),
        ("LIVEKIT_INSECURE_SKIP_VERIFY_TLS", "YES_I_KNOW_WHAT_I_AM_DOING"),
        ("LIVEKIT_LOG_LEVEL", "debug"),
    ])
    .await;
    let url = format!("http://{}/get_token", running.address);
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let name = homeserver.name();
    let good = client.post(&url).json(&get_token(&name, "syt_token", "alice")).send().await.unwrap();
    assert_eq!(good.status(), 200);
    assert_eq!(good.headers()["access-control-allow-origin"], "*");
    let answer: serde_json::Value = good.json().await.unwrap();
    assert_eq!(answer["url"], sfu);
    let bad = client.post(&url).json(&get_token(&name, "syt_wrong", "alice")).send().await.unwrap();
    assert_eq!(bad.status(), 401);
    assert_eq!(created.lock().unwrap().len(), 1);

    let log = stop(&mut running).await;
    assert!(log.contains("token issued") && log.contains("OpenID token not accepted"), "{log}");
    for secret in ["syt_token", "syt_wrong", "hunter2", "@alice", answer["jwt"].as_str().unwrap()] {
        assert!(!log.contains(secret), "{secret} in {log}");
    }
}

#[tokio::test]
async fn without_the_magic_words_the_certificate_is_checked() {
    let homeserver = Homeserver::with_users(&[("token", "alice")]).await;
    let name = homeserver.name();
    // Listed by name, so that the address is no obstacle.
    let mut running =
        start(&[("LIVEKIT_FULL_ACCESS_HOMESERVERS", &name), ("LIVEKIT_INSECURE_SKIP_VERIFY_TLS", "true")])
            .await;
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let url = format!("http://{}/get_token", running.address);
    let reply = client.post(url).json(&get_token(&name, "token", "alice")).send().await.unwrap();
    assert_eq!(reply.status(), 401);
    assert!(homeserver.connections() > 0);
    assert_eq!(homeserver.seen().len(), 0);
    stop(&mut running).await;
}

/// Sends SIGTERM, expects exit code 0, and returns the rest of the log.
async fn stop(running: &mut Running) -> String {
    let pid = running.child.id().unwrap().to_string();
    let sent = Command::new("kill").args(["-TERM", &pid]).status().await.unwrap();
    assert!(sent.success());
    let status = timeout(DEADLINE, running.child.wait()).await.expect("stops in time").unwrap();
    assert_eq!(status.code(), Some(0));
    let mut log = String::new();
    running.stderr.read_to_string(&mut log).await.unwrap();
    log
}

/// An SFU over HTTP, and the names of the rooms it was asked for.
async fn sfu() -> (String, std::sync::Arc<std::sync::Mutex<Vec<String>>>) {
    let created = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let rooms = created.clone();
    let router = Router::new().fallback(move |body: Bytes| {
        let request = CreateRoomRequest::decode(body).unwrap();
        assert_eq!(request.empty_timeout, EMPTY_TIMEOUT);
        rooms.lock().unwrap().push(request.name);
        async { Room { sid: "RM_1".into(), ..Default::default() }.encode_to_vec().into_response() }
    });
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("ws://{}", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, router).await });
    (url, created)
}
