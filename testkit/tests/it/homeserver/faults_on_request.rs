use std::time::Duration;

use antiphon_testkit::homeserver::{DevHomeserver, RegisteredUser};
use serde_json::{Value, json};

use super::support::{call, client, homeserver};

const WHOAMI: &str = "/_matrix/client/v3/account/whoami";

struct Http {
    client: reqwest::Client,
    url: String,
    user: RegisteredUser,
}

impl Http {
    fn new(homeserver: &DevHomeserver) -> Self {
        let user = homeserver.register_user("alice", "pw").unwrap();
        Self { client: reqwest::Client::new(), url: homeserver.url().to_owned(), user }
    }

    fn request(&self, method: &str, path: &str) -> reqwest::RequestBuilder {
        let method = method.parse().unwrap();
        self.client.request(method, format!("{}{path}", self.url)).bearer_auth(&self.user.access_token)
    }

    async fn room(&self) -> String {
        let created = self.request("POST", "/_matrix/client/v3/createRoom").json(&json!({}));
        call(created).await.1["room_id"].as_str().unwrap().to_owned()
    }
}

#[tokio::test]
async fn a_lost_reply_leaves_the_request_done() {
    let homeserver = homeserver().await;
    let http = Http::new(&homeserver);
    let room = http.room().await;
    let path = format!("/_matrix/client/v3/rooms/{room}/send/m.x/txn1");
    let send = || http.request("PUT", &path).json(&json!({"n": 1}));

    homeserver.faults().lose_replies("PUT /_matrix/client/v3/rooms/*/send/m.x", 1);
    assert!(send().send().await.is_err(), "the connection closes without an answer");
    assert_eq!(homeserver.faults().outstanding(), 0);
    let (status, again) = call(send()).await;
    assert_eq!(status, 200);

    let messages = http.request("GET", &format!("/_matrix/client/v3/rooms/{room}/messages?dir=b"));
    let (_, page) = call(messages).await;
    let sent: Vec<&Value> =
        page["chunk"].as_array().unwrap().iter().filter(|event| event["type"] == "m.x").collect();
    assert_eq!(sent.len(), 1, "the repetition is not a second event");
    assert_eq!(sent[0]["event_id"], again["event_id"]);
}

#[tokio::test]
async fn a_rate_limit_says_when_to_come_back_in_both_places() {
    let homeserver = homeserver().await;
    let http = Http::new(&homeserver);
    homeserver.faults().rate_limit(WHOAMI, 1, Duration::from_millis(1500));
    let limited = http.request("GET", WHOAMI).send().await.unwrap();
    assert_eq!(limited.status(), 429);
    assert_eq!(limited.headers()["retry-after"], "2");
    assert_eq!(limited.headers()["access-control-allow-origin"], "*");
    let body: Value = limited.json().await.unwrap();
    assert_eq!((&body["errcode"], &body["retry_after_ms"]), (&json!("M_LIMIT_EXCEEDED"), &json!(1500)));
    assert_eq!(call(http.request("GET", WHOAMI)).await.0, 200);
}

#[tokio::test]
async fn matrix_sdk_gets_over_a_failure_and_a_rate_limit_by_itself() {
    let homeserver = homeserver().await;
    let alice = client(&homeserver, "alice2").await;
    homeserver.faults().fail(WHOAMI, 1, 502);
    homeserver.faults().rate_limit(WHOAMI, 1, Duration::from_millis(100));
    assert_eq!(alice.whoami().await.unwrap().user_id, alice.user_id().unwrap());
    assert_eq!(homeserver.faults().outstanding(), 0);
}

#[tokio::test]
async fn a_failing_endpoint_fails_so_many_times_and_no_other_does() {
    let homeserver = homeserver().await;
    let http = Http::new(&homeserver);
    homeserver.faults().fail(WHOAMI, 2, 503);
    assert_eq!(call(http.request("GET", "/_matrix/client/v3/joined_rooms")).await.0, 200);
    let statuses = [
        call(http.request("GET", WHOAMI)).await.0,
        call(http.request("GET", WHOAMI)).await.0,
        call(http.request("GET", WHOAMI)).await.0,
    ];
    assert_eq!(statuses, [503, 503, 200]);
}

#[tokio::test]
async fn a_slow_endpoint_outlasts_an_impatient_client() {
    let homeserver = homeserver().await;
    let http = Http::new(&homeserver);
    homeserver.faults().latency("/_matrix/client/v3/account", Duration::from_secs(3600));
    let impatient = http.request("GET", WHOAMI).timeout(Duration::from_millis(300)).send().await;
    assert!(impatient.unwrap_err().is_timeout());
    assert_eq!(call(http.request("GET", "/_matrix/client/v3/joined_rooms")).await.0, 200);
    homeserver.faults().clear();
    assert_eq!(call(http.request("GET", WHOAMI)).await.0, 200);
}
