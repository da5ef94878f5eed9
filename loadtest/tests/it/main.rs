//! A small conference through the focus of this workspace.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use std::time::Duration;

use antiphon_focus::{Config, Focus};
use antiphon_loadtest::{Plan, run};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_stream_reaches_every_participant() {
    let focus = Focus::start(Config::dev_ephemeral()).await.unwrap();
    let plan = Plan {
        url: focus.ws_url().to_owned(),
        api_key: "devkey".to_owned(),
        api_secret: "secret".to_owned(),
        room: "small".to_owned(),
        publishers: 2,
        subscribers: 2,
        video: true,
        video_frame: 3_000,
        duration: Duration::from_secs(4),
        join_rate: 10.0,
    };
    let report = run(&plan).await.unwrap();
    assert!(report.is_clean(), "{report}");
    assert_eq!((report.joined, report.streams), (4, (12, 12)), "{report}");
    focus.shutdown().await;
}

#[tokio::test]
async fn a_plan_without_publishers_is_refused() {
    let plan = Plan {
        url: "ws://localhost:1".to_owned(),
        api_key: "k".to_owned(),
        api_secret: "s".to_owned(),
        room: "r".to_owned(),
        publishers: 0,
        subscribers: 1,
        video: false,
        video_frame: 0,
        duration: Duration::ZERO,
        join_rate: 1.0,
    };
    assert!(run(&plan).await.unwrap_err().to_string().contains("--publishers"));
}
