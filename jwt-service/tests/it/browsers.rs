//! Web pages can read every answer: the same headers on success, refusal, wrong method and preflight.

use axum::http::Method;

use crate::support::{Client, Homeserver, Reply, get_token, settings, sfu_get};

fn assert_readable(reply: &Reply) {
    for (name, value) in [
        ("content-type", "application/json"),
        ("access-control-allow-origin", "*"),
        ("access-control-allow-methods", "POST"),
        (
            "access-control-allow-headers",
            "Accept, Content-Type, Content-Length, Accept-Encoding, X-CSRF-Token",
        ),
    ] {
        let values: Vec<_> = reply.headers.get_all(name).iter().collect();
        assert_eq!(values, [value], "{name} of {reply:?}");
    }
    for name in ["access-control-max-age", "access-control-allow-credentials", "allow"] {
        assert!(!reply.headers.contains_key(name), "{name} of {reply:?}");
    }
}

#[tokio::test]
async fn preflights_succeed_and_other_methods_are_refused_without_a_body() {
    let client = Client::new(settings());
    for path in ["/get_token", "/sfu/get"] {
        for (method, status) in [
            (Method::OPTIONS, 200),
            (Method::GET, 405),
            (Method::HEAD, 405),
            (Method::PUT, 405),
            (Method::DELETE, 405),
            (Method::PATCH, 405),
        ] {
            let reply = client.send(method.clone(), path, "").await;
            assert_eq!((reply.status, reply.text.as_str()), (status, ""), "{method} {path}");
            assert_readable(&reply);
        }
    }
    let preflight = client.send(Method::OPTIONS, "/delegate_delayed_leave", "").await;
    assert_eq!((preflight.status, preflight.text.as_str()), (200, ""));
    assert_readable(&preflight);
}

#[tokio::test]
async fn answers_and_refusals_are_readable() {
    let homeserver = Homeserver::with_users(&[("good", "alice")]).await;
    let client = Client::new(settings());
    let name = homeserver.name();
    for (path, body, status) in [
        ("/get_token", get_token(&name, "good", "alice").to_string(), 200),
        ("/sfu/get", sfu_get(&name, "good").to_string(), 200),
        ("/get_token", get_token(&name, "bad", "alice").to_string(), 401),
        ("/get_token", "{}".to_owned(), 400),
        ("/sfu/get", String::new(), 400),
        ("/get_token", "x".repeat(70_000), 413),
        ("/delegate_delayed_leave", "{}".to_owned(), 404),
    ] {
        let reply = client.post(path, body).await;
        assert_eq!(reply.status, status);
        assert_readable(&reply);
    }
}

#[tokio::test]
async fn a_refusal_for_lack_of_room_is_readable_too() {
    let mut full = settings();
    full.limits.in_flight = 0;
    let reply = Client::new(full).post("/get_token", "{}").await;
    assert_eq!(reply.status, 429);
    assert_readable(&reply);
}
