//! A webhook that is refused is one line in the log, from which the operator learns what to mend.

use crate::{child::Program, delegated_leave::signed};

/// Sends what `signed` has made to the program, as the request `id`.
async fn deliver(service: &Program, id: &str, request: axum::http::Request<axum::body::Body>) -> u16 {
    let (parts, body) = request.into_parts();
    let body = axum::body::to_bytes(body, usize::MAX).await.unwrap();
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let request = client.post(service.url("/sfu_webhook")).headers(parts.headers);
    request.header("x-request-id", id).body(body).send().await.unwrap().status().as_u16()
}

#[tokio::test]
async fn one_line_says_why_and_which_request() {
    let mut service = Program::alone();
    service.start().await;
    let event = r#"{"event":"room_started"}"#;
    let mut another_body = signed(event, "devsecret", 60, "");
    *another_body.body_mut() = "{}".into();
    let unsigned = axum::http::Request::post("/sfu_webhook").body(event.into()).unwrap();
    for (id, request, status, why) in [
        ("no-token", unsigned, 401, "no token"),
        ("secret", signed(event, "wrong", 60, ""), 401, "another secret"),
        ("time", signed(event, "devsecret", -120, ""), 401, "expired"),
        ("body", another_body, 401, "another body"),
        ("large", signed(&"x".repeat(1 << 21), "devsecret", 60, ""), 413, "too_large"),
        ("nonsense", signed("not JSON", "devsecret", 60, ""), 400, "no webhook of LiveKit's"),
    ] {
        assert_eq!(deliver(&service, id, request).await, status, "{id}");
        // Written before the answer.
        let log = service.log().tail();
        let lines: Vec<_> = log.lines().filter(|line| line.contains(&format!("id=\"{id}\""))).collect();
        let [line] = lines[..] else { panic!("{id}: {log}") };
        assert!(line.contains("webhook refused") && line.contains(why), "{line}");
    }
    assert_eq!(deliver(&service, "good", signed(event, "devsecret", 60, "")).await, 200);
    assert!(!service.log().tail().contains("good"), "{}", service.log().tail());
}
