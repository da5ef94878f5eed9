//! The binary: start-up errors that say what to do, serving, the health check, an orderly end.

use std::{
    net::SocketAddr,
    process::{Output, Stdio},
};

use antiphon_jwt_service::{EMPTY_TIMEOUT, SETTINGS};
use antiphon_testkit::peers::ports;
use axum::{
    Router,
    body::Bytes,
    http::{StatusCode, Uri},
    response::IntoResponse,
    routing::post,
};
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
        (("LIVEKIT_SECRET", ""), "LIVEKIT_SECRET is not set; write "),
        (("LIVEKIT_SECRET", " "), "LIVEKIT_SECRET: there is no secret in it; write "),
        (("LIVEKIT_KEY_FILE", "/nonexistent"), "LIVEKIT_KEY_FILE: /nonexistent cannot be read; check "),
        (("LIVEKIT_FULL_ACCESS_HOMESERVERS", ""), "LIVEKIT_FULL_ACCESS_HOMESERVERS is not set; write "),
        (("LIVEKIT_JWT_BIND", "8080"), "LIVEKIT_JWT_BIND: \"8080\" has no colon before the port; write "),
        (("LIVEKIT_JWT_PORT", "8080"), "LIVEKIT_JWT_BIND and LIVEKIT_JWT_PORT are both set; keep "),
        (("LIVEKIT_CS_API_URL_OVERRIDES", "a=b,"), "LIVEKIT_CS_API_URL_OVERRIDES: "),
        (
            ("LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS", "1.5"),
            "LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS: \"1.5\" is not ",
        ),
        (
            ("LIVEKIT_REDIS_URL", "redis://u:hunter2@h/x"),
            "LIVEKIT_REDIS_URL: its database is not a number; write ",
        ),
        (("LIVEKIT_JWT_METRICS_BIND", "x"), "LIVEKIT_JWT_METRICS_BIND: \"x\" has no colon "),
        (
            ("LIVEKIT_JWT_METRICS_BIND", "192.0.2.1:1"),
            "LIVEKIT_JWT_METRICS_BIND: cannot listen on 192.0.2.1:1 (",
        ),
        (
            ("LIVEKIT_JWT_TLS_KEY_FILE", "/k"),
            "LIVEKIT_JWT_TLS_KEY_FILE is set and LIVEKIT_JWT_TLS_CERT_FILE is not; ",
        ),
        (("LIVEKIT_JWT_STATE_DIR", "/proc/nowhere"), "LIVEKIT_JWT_STATE_DIR: /proc/nowhere cannot be made; "),
        (("LIVEKIT_JWT_STATE_DIR", "state"), "LIVEKIT_JWT_STATE_DIR: \"state\" depends on "),
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
async fn a_variable_in_another_encoding_is_no_unset_one() {
    use std::os::unix::ffi::OsStrExt as _;
    for flags in [&[][..], &["--print-config"], &["--check-config"], &["--healthcheck"]] {
        let mut command = program(&[]);
        command.env("LIVEKIT_JWT_REPLICA", std::ffi::OsStr::from_bytes(b"caf\xe9")).args(flags);
        let ended = output(command).await;
        let stderr = String::from_utf8(ended.stderr).unwrap();
        assert_eq!(ended.status.code(), Some(1), "{stderr}");
        let expected = "jwt-service: LIVEKIT_JWT_REPLICA: the value is not text in UTF-8; write ";
        assert!(stderr.starts_with(expected), "{stderr}");
    }
}

#[tokio::test]
async fn help_teaches_the_environment() {
    let mut command = program(&[]);
    command.arg("--help");
    let help = output(command).await;
    let text = String::from_utf8(help.stdout).unwrap();
    assert!(help.status.success());
    for setting in SETTINGS {
        assert!(text.contains(setting.variable), "{}", setting.variable);
        assert!(text.contains(setting.key.unwrap_or_default()), "{:?}", setting.key);
    }
    let mut command = program(&[]);
    command.arg("-h");
    let help = String::from_utf8(output(command).await.stdout).unwrap();
    for flag in SETTINGS.iter().filter_map(|setting| setting.flag) {
        assert!(help.contains(&format!("--{flag} ")), "{flag}");
    }
    assert!(
        !help.contains("--secret ") && !help.contains("--redis-url"),
        "secrets have no place in arguments"
    );
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
    // A delayed event's id is as good as a secret: whoever has it can send the event.
    let mut delegated = get_token(&name, "syt_token", "alice");
    delegated["delay_id"] = "syd_capability".into();
    delegated["delay_timeout"] = 8000.into();
    let no_client_api = client.post(&url).json(&delegated).send().await.unwrap();
    assert_eq!(no_client_api.status(), 400);
    delegated["openid_token"].as_object_mut().unwrap().remove("matrix_server_name");
    assert_eq!(client.post(&url).json(&delegated).send().await.unwrap().status(), 400);

    let log = stop(&mut running).await;
    assert!(log.contains("token issued") && log.contains("OpenID token not accepted"), "{log}");
    for secret in
        ["syt_token", "syt_wrong", "syd_capability", "hunter2", "@alice", answer["jwt"].as_str().unwrap()]
    {
        assert!(!log.contains(secret), "{secret} in {log}");
    }
}

#[tokio::test]
async fn a_stranger_cannot_fill_the_log_with_a_name() {
    let mut running = start(&[]).await;
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let name = "\u{fc}".repeat(10_000);
    let request = client.post(format!("http://{}/get_token", running.address));
    let answer = request.json(&get_token(&name, "token", "alice")).send().await.unwrap();
    assert_eq!(answer.status(), 401);
    drop(client);
    let log = stop(&mut running).await;
    assert!(log.contains("OpenID token not accepted") && log.len() < 4096, "{} bytes", log.len());
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
    let create = async move |body: Bytes| {
        let request = CreateRoomRequest::decode(body).unwrap();
        assert_eq!(request.empty_timeout, EMPTY_TIMEOUT);
        rooms.lock().unwrap().push(request.name);
        Room { sid: "RM_1".into(), ..Default::default() }.encode_to_vec().into_response()
    };
    // Whoever else is asked for is not there.
    let router = Router::new()
        .route("/twirp/livekit.RoomService/CreateRoom", post(create))
        .fallback((StatusCode::NOT_FOUND, r#"{"code":"not_found"}"#));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("ws://{}", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, router).await });
    (url, created)
}

#[tokio::test]
async fn settings_are_checked_and_printed_without_secrets() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("jwt.toml");
    std::fs::write(&path, "redis_url = \"redis://u:hunter2@127.0.0.1\"\nin_flight = 17\n").unwrap();
    let ask = async |flags: &[&str]| {
        let mut command = program(&[]);
        command.arg("--config").arg(&path).args(flags);
        let ended = output(command).await;
        (
            ended.status.code(),
            String::from_utf8(ended.stdout).unwrap(),
            String::from_utf8(ended.stderr).unwrap(),
        )
    };
    let (code, said, _) = ask(&["--print-config", "--bind", "127.0.0.1:1234"]).await;
    assert_eq!(code, Some(0));
    for line in [
        "secret = \"[redacted]\"  # LIVEKIT_SECRET",
        "bind = \"127.0.0.1:1234\"  # --bind",
        "full_access_homeservers = [\"*\"]  # LIVEKIT_FULL_ACCESS_HOMESERVERS",
    ] {
        assert!(said.lines().any(|l| l == line), "{line}\n{said}");
    }
    assert!(said.contains("in_flight = 17  # in_flight in ") && !said.contains("hunter2"), "{said}");

    let (code, said, _) = ask(&["--check-config", "--log-level", "loud"]).await;
    assert_eq!(code, Some(0));
    assert!(
        said.starts_with("warning: LIVEKIT_LOG_LEVEL: ") && said.ends_with("the settings are good\n"),
        "{said}"
    );
    let (code, _, said) = ask(&["--check-config", "--bind", "1234"]).await;
    assert_eq!(code, Some(1));
    assert!(said.starts_with("jwt-service: --bind: "), "{said}");

    std::fs::write(&path, b"key = 'k'\nsecret = 'hunter2\xff'\n").unwrap();
    let (code, _, said) = ask(&["--check-config"]).await;
    assert_eq!(code, Some(1));
    assert!(said.ends_with("is not TOML: it is not text in UTF-8 (line 2)\n"), "{said}");

    std::fs::write(&path, "secrets = \"hunter2\"").unwrap();
    let (code, _, said) = ask(&["--check-config"]).await;
    assert_eq!(code, Some(1));
    assert!(said.ends_with("there is no setting \"secrets\"; did you mean \"secret\"?\n"), "{said}");
}

#[tokio::test]
async fn operators_see_what_happens_on_a_listener_of_their_own() {
    let homeserver = Homeserver::with_users(&[("token", "alice")]).await;
    let (sfu, _) = sfu().await;
    let mut command = program(&[
        ("LIVEKIT_URL", &sfu),
        ("LIVEKIT_INSECURE_SKIP_VERIFY_TLS", "YES_I_KNOW_WHAT_I_AM_DOING"),
        ("LIVEKIT_JWT_METRICS_BIND", "0"),
    ]);
    let mut child = command.spawn().unwrap();
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    let metrics = announced(&mut stderr, "metrics address=").await;
    let address: SocketAddr = announced(&mut stderr, "listening address=").await.parse().unwrap();
    assert!(metrics.starts_with("127.0.0.1:"), "{metrics}");
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let name = homeserver.name();
    let url = format!("http://{address}/get_token");
    for (token, status) in [("token", 200), ("wrong", 401)] {
        let reply = client.post(&url).json(&get_token(&name, token, "alice")).send().await.unwrap();
        assert_eq!(reply.status(), status);
    }
    let text = async |path: &str| {
        client.get(format!("http://{metrics}{path}")).send().await.unwrap().text().await.unwrap()
    };
    let counts = text("/metrics").await;
    for line in [
        "jwt_service_requests_total{endpoint=\"get_token\",outcome=\"ok\"} 1",
        "jwt_service_requests_total{endpoint=\"get_token\",outcome=\"unauthorized\"} 1",
        "jwt_service_lookup_failures_total{class=\"token_unknown\"} 1",
        "jwt_service_sfu_calls_total{call=\"create_room\",outcome=\"ok\"} 1",
        "jwt_service_jobs{state=\"connected\"} 0",
    ] {
        assert!(counts.lines().any(|l| l == line), "{line}\n{counts}");
    }
    assert!(text("/readyz").await.contains("\"ready\":true"));
    // The public listener does not show them.
    assert_eq!(client.get(format!("http://{address}/metrics")).send().await.unwrap().status(), 404);
    drop(client);
    stop(&mut Running { child, address, stderr }).await;
}

const GET_PARTICIPANT: &str = "/twirp/livekit.RoomService/GetParticipant";

#[tokio::test]
async fn the_sfu_is_called_through_a_proxy_unless_it_is_here_or_excepted() {
    let proxy = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", proxy.local_addr().unwrap());
    let asked = std::sync::Arc::<std::sync::Mutex<Vec<String>>>::default();
    let seen = asked.clone();
    let router = Router::new().fallback(move |uri: Uri| {
        seen.lock().unwrap().push(uri.to_string());
        async { "OK" }
    });
    tokio::spawn(async move { axum::serve(proxy, router).await });
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let ready = async |url: &str, exception: &str| {
        let mut running =
            start(&[("LIVEKIT_URL", url), ("HTTP_PROXY", &address), ("NO_PROXY", exception)]).await;
        let answer = client.get(format!("http://{}/readyz", running.address)).send().await.unwrap();
        let answer = answer.text().await.unwrap();
        stop(&mut running).await;
        (answer.contains("\"sfu\":\"ok\""), std::mem::take(&mut *asked.lock().unwrap()))
    };
    assert_eq!(
        ready("ws://sfu.test:7880", "").await,
        (true, vec![format!("http://sfu.test:7880{GET_PARTICIPANT}")])
    );
    assert_eq!(ready("ws://sfu.test:7880", "sfu.test").await, (false, vec![]));
    let (here, _) = sfu().await;
    assert_eq!(ready(&here, "").await, (true, vec![]));
}

#[tokio::test]
async fn log_lines_can_be_json_and_carry_the_requests_id() {
    let mut command = program(&[("LIVEKIT_JWT_LOG_FORMAT", "json")]);
    let mut child = command.spawn().unwrap();
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    let address = loop {
        let line = next_line(&mut stderr).await;
        let line: serde_json::Value = serde_json::from_str(&line).unwrap();
        if line["message"] == "listening" {
            break line["address"].as_str().unwrap().to_owned();
        }
    };
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let url = format!("http://{address}/get_token");
    let reply = client
        .post(url)
        .header("x-request-id", "from-the-proxy")
        .json(&get_token("nowhere.invalid", "hunter2", "alice"))
        .send()
        .await
        .unwrap();
    assert_eq!(reply.headers()["x-request-id"], "from-the-proxy");
    let body: serde_json::Value = reply.json().await.unwrap();
    assert_eq!(body["request_id"], "from-the-proxy");
    let line = next_line(&mut stderr).await;
    assert!(!line.contains("hunter2"), "{line}");
    let line: serde_json::Value = serde_json::from_str(&line).unwrap();
    assert_eq!(line["message"], "OpenID token not accepted");
    assert_eq!(
        (&line["span"]["id"], &line["span"]["endpoint"]),
        (&"from-the-proxy".into(), &"get_token".into())
    );
    drop(client);
    stop(&mut Running { child, address: address.parse().unwrap(), stderr }).await;
}

#[tokio::test]
async fn requests_in_progress_are_answered_before_it_stops() {
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let name = silent.local_addr().unwrap().to_string();
    let operators = ports::free().unwrap().to_string();
    let mut running = start(&[
        ("LIVEKIT_INSECURE_SKIP_VERIFY_TLS", "YES_I_KNOW_WHAT_I_AM_DOING"),
        ("LIVEKIT_JWT_METRICS_BIND", &operators),
    ])
    .await;
    let url = format!("http://{}/get_token", running.address);
    let asked = tokio::spawn(async move {
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        client.post(url).json(&get_token(&name, "token", "alice")).send().await
    });
    // It is in the middle of its lookup.
    let (held, _) = timeout(DEADLINE, silent.accept()).await.unwrap().unwrap();
    let pid = running.child.id().unwrap().to_string();
    assert!(Command::new("kill").args(["-TERM", &pid]).status().await.unwrap().success());
    loop {
        if next_line(&mut running.stderr).await.contains("stopping") {
            break;
        }
    }
    // Operators' tools see it until the end.
    let readyz = format!("http://127.0.0.1:{operators}/readyz");
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let ready: serde_json::Value = client.get(readyz).send().await.unwrap().json().await.unwrap();
    assert_eq!((&ready["ready"], &ready["stopping"]), (&false.into(), &true.into()));
    drop(client);
    // The lookup fails now, and its client is told so.
    drop((held, silent));
    assert_eq!(asked.await.unwrap().unwrap().status(), 401);
    let status = timeout(DEADLINE, running.child.wait()).await.expect("stops in time").unwrap();
    assert_eq!(status.code(), Some(0));
}

async fn next_line(stderr: &mut BufReader<ChildStderr>) -> String {
    let mut line = String::new();
    let read = timeout(DEADLINE, stderr.read_line(&mut line)).await.expect("a line in time").unwrap();
    assert!(read > 0, "it ended");
    line
}

/// What stands behind `what` in the next line that has it.
async fn announced(stderr: &mut BufReader<ChildStderr>, what: &str) -> String {
    loop {
        if let Some((_, address)) = next_line(stderr).await.split_once(what) {
            return address.trim().to_owned();
        }
    }
}
