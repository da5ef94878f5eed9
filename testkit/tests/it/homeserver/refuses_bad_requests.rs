use antiphon_testkit::homeserver::{DevHomeserver, Options};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};

use super::support::{DEADLINE, call, homeserver};

#[tokio::test]
async fn only_loopback_is_listened_on() {
    for address in ["0.0.0.0:0", "[::]:0", "192.0.2.1:0"] {
        let options = Options { bind: address.parse().unwrap(), ..Options::default() };
        let refusal = DevHomeserver::start(options).await.unwrap_err().to_string();
        assert!(refusal.contains("loopback only"), "{refusal}");
    }
}

#[tokio::test]
async fn the_port_is_free_after_the_end() {
    for how in ["shutdown", "drop"] {
        let homeserver = homeserver().await;
        let (address, url) = (homeserver.address(), homeserver.url().to_owned());
        let (status, _) = call(reqwest::Client::new().get(format!("{url}/_matrix/client/versions"))).await;
        assert_eq!(status, 200);
        if how == "shutdown" {
            homeserver.shutdown().await
        } else {
            drop(homeserver)
        }
        let freed = async {
            while TcpStream::connect(address).await.is_ok() {
                tokio::task::yield_now().await;
            }
        };
        timeout(DEADLINE, freed).await.unwrap_or_else(|_| panic!("still listening after {how}"));
    }
}

#[tokio::test]
async fn malformed_requests_get_matrix_errors_with_cors() {
    let homeserver = homeserver().await;
    let user = homeserver.register_user("alice", "pw").unwrap();
    let http = reqwest::Client::new();
    let request = |method: &str, path: &str| {
        let url = format!("{}{path}", homeserver.url());
        http.request(method.parse().unwrap(), url).bearer_auth(&user.access_token)
    };
    let (_, created) = call(request("POST", "/_matrix/client/v3/createRoom").json(&json!({}))).await;
    let room = format!("/_matrix/client/v3/rooms/{}", created["room_id"].as_str().unwrap());
    let send = |txn: &str| format!("{room}/send/m.x/{txn}");
    let delayed = "/_matrix/client/unstable/org.matrix.msc4140/delayed_events";

    let cases = [
        (request("PUT", &send("1")).body("{no"), 400, "M_NOT_JSON"),
        (request("PUT", &send("2")).body("[]"), 400, "M_BAD_JSON"),
        (request("PUT", &send("3")).body(vec![0xff; 100]), 400, "M_NOT_JSON"),
        (request("PUT", &send("4")).json(&json!({"x": "y".repeat(70_000)})), 413, "M_TOO_LARGE"),
        (request("PUT", &send("5")).body(vec![b' '; 1024 * 1024 + 1]), 413, "M_TOO_LARGE"),
        (request("PUT", &send("6")).body("[".repeat(100_000)), 400, "M_NOT_JSON"),
        (
            request("PUT", &(send("7") + "?org.matrix.msc4140.delay=-1")).json(&json!({})),
            400,
            "M_INVALID_PARAM",
        ),
        (
            request("PUT", &(send("8") + "?org.matrix.msc4140.delay=soon")).json(&json!({})),
            400,
            "M_INVALID_PARAM",
        ),
        (
            request("PUT", &(send("9") + "?org.matrix.msc4140.delay=86400001")).json(&json!({})),
            400,
            "ORG.MATRIX.MSC4140_DELAY_TOO_LARGE",
        ),
        (
            request("PUT", &(send("10") + "?org.matrix.msc4354.sticky_duration_ms=x")).json(&json!({})),
            400,
            "M_INVALID_PARAM",
        ),
        (request("PUT", "/_matrix/client/v3/rooms/!no/send/m.x/1").json(&json!({})), 403, "M_FORBIDDEN"),
        (request("PUT", "/_matrix/client/v3/rooms/%ff/send/m.x/1").json(&json!({})), 400, "M_INVALID_PARAM"),
        (request("PUT", "/_matrix/client/v3/sendToDevice/m.x/1").json(&json!({})), 400, "M_MISSING_PARAM"),
        (request("POST", &format!("{room}/sing")).json(&json!({})), 404, "M_UNRECOGNIZED"),
        (request("POST", &format!("{delayed}/x")).json(&json!({})), 400, "M_MISSING_PARAM"),
        (request("POST", &format!("{delayed}/x")).json(&json!({"action": "sing"})), 400, "M_INVALID_PARAM"),
        (request("POST", &format!("{delayed}/x/restart")), 404, "M_NOT_FOUND"),
        (request("GET", "/_matrix/client/v3/sync?since=yesterday"), 400, "M_UNKNOWN"),
        (request("GET", "/_matrix/client/v3/sync?since=s9999999_0"), 400, "M_UNKNOWN"),
        (request("GET", "/_matrix/client/v3/sync?filter=77"), 400, "M_INVALID_PARAM"),
        (request("GET", "/_matrix/client/v3/sync?filter={"), 400, "M_INVALID_PARAM"),
        (request("GET", &format!("{room}/messages")), 400, "M_MISSING_PARAM"),
        (request("GET", &format!("{room}/state/m.none/")), 404, "M_NOT_FOUND"),
        (request("GET", "/_matrix/client/v3/room_keys/version"), 404, "M_NOT_FOUND"),
        (request("GET", "/_matrix/client/v3/nowhere"), 404, "M_UNRECOGNIZED"),
        (request("GET", "/nowhere"), 404, "M_UNRECOGNIZED"),
        (request("DELETE", "/_matrix/client/v3/sync"), 405, "M_UNRECOGNIZED"),
        (request("DELETE", "/_matrix/client/v3/logout"), 405, "M_UNRECOGNIZED"),
        (http.get(format!("{}/_matrix/client/v3/sync", homeserver.url())), 401, "M_MISSING_TOKEN"),
        (
            http.get(format!("{}/_matrix/client/v3/sync?access_token=x", homeserver.url())),
            401,
            "M_UNKNOWN_TOKEN",
        ),
    ];
    for (number, (request, status, errcode)) in cases.into_iter().enumerate() {
        let answer = timeout(DEADLINE, request.send()).await.unwrap().unwrap();
        let seen = (answer.status().as_u16(), answer.headers().get("access-control-allow-origin").cloned());
        let body: Value = answer.json().await.unwrap();
        assert_eq!(seen, (status, Some("*".parse().unwrap())), "case {number}: {body}");
        assert_eq!(body["errcode"], errcode, "case {number}: {body}");
    }
}

#[tokio::test]
async fn a_browser_may_ask_before_it_calls() {
    let homeserver = homeserver().await;
    let url = format!("{}/_matrix/client/v3/sync", homeserver.url());
    let answer = reqwest::Client::new().request(reqwest::Method::OPTIONS, url).send().await.unwrap();
    assert_eq!(answer.status(), 204);
    let allowed = answer.headers()["access-control-allow-headers"].to_str().unwrap().to_owned();
    assert!(allowed.contains("Authorization"), "{allowed}");
}

#[tokio::test]
async fn garbage_on_the_socket_ends_that_connection_and_no_other() {
    let homeserver = homeserver().await;
    for garbage in
        [b"\x16\x03\x01\xff\xff garbage that is no handshake".as_slice(), b"\x00\xff\x00\xff\r\n\r\n", b"GET"]
    {
        let mut stream = TcpStream::connect(homeserver.address()).await.unwrap();
        stream.write_all(garbage).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut answer = Vec::new();
        // A reset is as good an end as an orderly close.
        let _ = timeout(DEADLINE, stream.read_to_end(&mut answer)).await.expect("the server lets go");
        assert!(answer.len() < 1024);
    }
    let (status, _) =
        call(reqwest::Client::new().get(format!("{}/_matrix/client/versions", homeserver.url()))).await;
    assert_eq!(status, 200);
}
