//! The demo as its user runs it: the development homeserver, a real Synapse, a real LiveKit server.

use std::{process::Stdio, sync::Arc, time::Duration};

use antiphon_jwt_service::{FullAccess, Service, Settings, TlsPolicy, TwirpSfu};
use antiphon_testkit::peers::{self, Peer};

use crate::support::turn;

const LIMIT: Duration = Duration::from_secs(180);

/// Runs the demo and returns what it printed.
async fn demo(arguments: &[&str]) -> String {
    let child = tokio::process::Command::new(env!("CARGO_BIN_EXE_demo"))
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let output = tokio::time::timeout(LIMIT, child.wait_with_output()).await.expect("the demo ends").unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    println!("{out}\n{err}");
    assert!(output.status.success(), "the demo failed:\n{out}\n{err}");
    assert!(out.contains("Every claim held."), "{out}");
    out.into_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_claim_holds_on_the_development_homeserver() {
    let _turn = turn().await;
    let out = demo(&[]).await;
    assert!(out.contains("went on from member to member"), "the focus was not stopped:\n{out}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_claim_holds_without_a_focus() {
    let _turn = turn().await;
    let out = demo(&["--no-focus"]).await;
    assert!(out.contains("no member lists a focus"), "{out}");
}

#[tokio::test]
async fn no_focus_and_a_service_url_are_wrong_usage() {
    let arguments = ["--no-focus", "--service-url", "http://localhost:1"];
    let output =
        tokio::process::Command::new(env!("CARGO_BIN_EXE_demo")).args(arguments).output().await.unwrap();
    assert_eq!(output.status.code(), Some(2));
    let err = String::from_utf8_lossy(&output.stderr);
    assert!(err.contains("'--no-focus' cannot be used with '--service-url <URL>'"), "{err}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_claim_holds_on_synapse() {
    peers::require!(Peer::Synapse);
    let _turn = turn().await;
    let synapse = peers::synapse::Synapse::start(peers::synapse::SynapseOptions::default()).await.unwrap();
    demo(&["--homeserver", &synapse.url()]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_claim_holds_through_a_livekit_server() {
    peers::require!(Peer::LiveKit, Peer::LoopbackOnly);
    let _turn = turn().await;
    let livekit =
        peers::livekit::LiveKitServer::start(peers::livekit::LiveKitOptions::default()).await.unwrap();
    let mut settings = Settings::new(livekit.url(), livekit.key(), livekit.secret());
    settings.full_access = FullAccess::Loopback;
    settings.insecure_skip_verify_tls = TlsPolicy::SkipLoopback;
    let sfu = TwirpSfu::new(&settings.livekit_url, &settings.key, &settings.secret).unwrap();
    let service = Service::new(settings, Arc::new(sfu)).unwrap();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, service.router()).await });
    let out = demo(&["--service-url", &url]).await;
    assert!(out.contains("it is not stopped"), "{out}");
}
