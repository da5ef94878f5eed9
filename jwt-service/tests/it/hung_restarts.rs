//! A homeserver that hangs once must not cost a short delayed event.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use axum::{body::Body, response::IntoResponse};
use tokio::{sync::mpsc::unbounded_channel, time::timeout};

use crate::{
    delegated_leave::keeping_a_leave,
    support::{DEADLINE, Homeserver, settings, userinfo},
};

const DELAY: Duration = Duration::from_secs(4);

#[tokio::test]
async fn a_restart_that_hangs_is_made_again_before_the_event_fires() {
    let (called, mut calls) = unbounded_channel();
    let count = AtomicUsize::new(0);
    let homeserver = Homeserver::start(move |seen| {
        if !seen.path.contains("/delayed_events/") {
            return userinfo(seen, &[("good", "alice")]);
        }
        let _ = called.send(seen.path.ends_with("/restart"));
        match count.fetch_add(1, Ordering::Relaxed) {
            // The head comes, and then nothing.
            1 => Body::new(crate::hostile_requests::Stalled).into_response(),
            _ => "{}".into_response(),
        }
    })
    .await;
    let mut settings = settings();
    let base = format!("https://{}", homeserver.name()).parse().unwrap();
    settings.cs_api_url_overrides = [(homeserver.name(), base)].into();
    let service = keeping_a_leave(settings, &homeserver.name(), DELAY).await;
    assert_eq!(timeout(DEADLINE, calls.recv()).await.unwrap(), Some(true));
    // The second hangs; the third comes before the homeserver, which counts from the first, sends the event.
    let third = async { (calls.recv().await, calls.recv().await) };
    assert_eq!(timeout(DELAY, third).await.expect("in time"), (Some(true), Some(true)));
    // And it goes on.
    assert_eq!(timeout(DEADLINE, calls.recv()).await.unwrap(), Some(true));
    let stats = service.delegation_stats().unwrap();
    assert_eq!((stats.connected, stats.not_restarted), (1, 0));
}
