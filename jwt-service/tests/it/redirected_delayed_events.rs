//! A homeserver may send delayed-event calls elsewhere: by a redirect that keeps the method, and never with the access
//! token to another origin.

use std::time::Duration;

use antiphon_jwt_service::Service;
use axum::{
    http::{Method, StatusCode, header},
    response::IntoResponse,
};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use crate::{
    delegated_leave::keeping_a_leave,
    support::{DEADLINE, Homeserver, Seen, settings, userinfo},
};

/// A service with the delayed leave of somebody who is on the SFU.
struct World {
    _service: Service,
    homeserver: Homeserver,
    other: Homeserver,
    calls: UnboundedReceiver<Seen>,
}

impl World {
    /// The homeserver's API is at `/from`. It redirects every call there, to `/to` at another server's origin or,
    /// with `here`, its own.
    async fn new(status: StatusCode, here: bool) -> Self {
        let (called, calls) = unbounded_channel();
        let arrive = {
            let called = called.clone();
            move |seen: &Seen| {
                let _ = called.send(seen.clone());
                "{}".into_response()
            }
        };
        let other = Homeserver::start(arrive.clone()).await;
        let target = if here { String::new() } else { format!("https://{}", other.name()) };
        let homeserver = Homeserver::start(move |seen| match seen.path.strip_prefix("/from") {
            Some(path) if path.contains("/delayed_events/") => {
                let _ = called.send(seen.clone());
                (status, [(header::LOCATION, format!("{target}/to{path}"))]).into_response()
            }
            None if seen.path.starts_with("/to/") => arrive(seen),
            _ => userinfo(seen, &[("good", "alice")]),
        })
        .await;
        let mut settings = settings();
        let base = format!("https://{}/from", homeserver.name()).parse().unwrap();
        settings.cs_api_url_overrides = [(homeserver.name(), base)].into();
        settings.delayed_event_tokens = [(homeserver.name(), "hunter2".into())].into();
        let service = keeping_a_leave(settings, &homeserver.name(), Duration::from_mins(1)).await;
        Self { _service: service, homeserver, other, calls }
    }

    /// The next call: at whom, which path, and whether with the token.
    async fn next(&mut self) -> (&'static str, String, bool) {
        let seen = tokio::time::timeout(DEADLINE, self.calls.recv()).await.expect("a call in time").unwrap();
        assert_eq!(seen.method, Method::POST);
        let at = if seen.host == self.other.name() { "other" } else { "homeserver" };
        assert!(at == "other" || seen.host == self.homeserver.name(), "{}", seen.host);
        let path = seen.path.replace("/_matrix/client/unstable/org.matrix.msc4140/delayed_events", "");
        let authorization = seen.headers.get(header::AUTHORIZATION);
        assert!(authorization.is_none_or(|value| value == "Bearer hunter2"));
        (at, path, authorization.is_some())
    }
}

#[tokio::test]
async fn a_call_is_made_where_the_homeserver_says() {
    for status in [StatusCode::TEMPORARY_REDIRECT, StatusCode::PERMANENT_REDIRECT] {
        let mut world = World::new(status, true).await;
        assert_eq!(world.next().await, ("homeserver", "/from/syd_1/restart".into(), true));
        assert_eq!(world.next().await, ("homeserver", "/to/syd_1/restart".into(), true));
    }
}

#[tokio::test]
async fn another_origin_gets_the_call_without_the_token() {
    let mut world = World::new(StatusCode::TEMPORARY_REDIRECT, false).await;
    assert_eq!(world.next().await, ("homeserver", "/from/syd_1/restart".into(), true));
    assert_eq!(world.next().await, ("other", "/to/syd_1/restart".into(), false));
}

#[tokio::test]
async fn a_redirect_that_may_change_the_method_is_a_failed_call() {
    let mut world = World::new(StatusCode::FOUND, true).await;
    for _ in 0..2 {
        assert_eq!(world.next().await, ("homeserver", "/from/syd_1/restart".into(), true), "tried again");
    }
}
