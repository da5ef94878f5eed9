//! Signalling over real WebSockets, and the HTTP surface around it.

use antiphon_focus::{Config, Focus};
use livekit_protocol::{self as proto, signal_request::Message as Up, signal_response::Message as Down};
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;

use crate::support::client::{Client, focus, refusal};
use crate::support::token;

fn http(ws: &str) -> String {
    ws.replacen("ws", "http", 1)
}

#[tokio::test]
async fn two_clients_join_see_each_other_and_are_answered() {
    let focus = focus(|_| {}).await;
    let (mut alice, _) = Client::join(&focus, "alice").await;
    let (mut bob, join) = Client::join(&focus, "bob").await;
    assert_eq!(join.other_participants[0].identity, "alice");
    let seen = alice
        .expect(|message| match message {
            Down::Update(update) => Some(update.participants[0].identity.clone()),
            _ => None,
        })
        .await;
    assert_eq!(seen, "bob");

    bob.send(Up::Ping(5)).await;
    bob.expect(|message| matches!(message, Down::Pong(now) if now > 1_700_000_000_000).then_some(())).await;
    bob.send(Up::PingReq(proto::Ping { timestamp: 77, rtt: 3 })).await;
    let pong = bob
        .expect(|message| match message {
            Down::PongResp(pong) => Some(pong),
            _ => None,
        })
        .await;
    assert_eq!(pong.last_ping_timestamp, 77);

    // The offer came before the pongs, so the answer is awaited.
    let answer = proto::SessionDescription { r#type: "answer".into(), ..Default::default() };
    bob.send(Up::Answer(answer)).await;
    let active = proto::participant_info::State::Active;
    alice
        .expect(|message| match message {
            Down::Update(update) => (update.participants[0].state() == active).then_some(()),
            _ => None,
        })
        .await;
    let stats = focus.stats().await;
    assert_eq!((stats.rooms, stats.participants, stats.joined), (1, 2, 2));
    focus.shutdown().await;
}

#[tokio::test]
async fn the_token_may_be_a_header_and_the_path_may_have_two_bases_and_two_slashes() {
    let focus = focus(|_| {}).await;
    for base in ["", "/", "/livekit/sfu", "/livekit/sfu/"] {
        let url = format!("{}{base}/rtc?protocol=17", focus.ws_url());
        let mut request = url.into_client_request().unwrap();
        let value = format!("Bearer {}", token("alice", |_| {}));
        request.headers_mut().insert("authorization", value.parse().unwrap());
        let (socket, _) = tokio_tungstenite::connect_async(request).await.unwrap();
        let mut client = Client { socket };
        assert!(matches!(client.next().await, Down::Join(_)), "base {base:?}");
    }
    focus.shutdown().await;
}

#[tokio::test]
async fn refusals_are_http_statuses_with_a_reason() {
    let focus = focus(|config| config.auto_create = false).await;
    let ws = focus.ws_url().to_owned();
    let good = token("alice", |claims| claims.video.room_create = true);
    let no_join = token("alice", |claims| claims.video.room_join = false);
    let nameless = token("", |_| {});
    let long = token(&"x".repeat(257), |_| {});
    let plain = token("alice", |_| {});
    let cases = [
        (format!("{ws}/rtc?protocol=17"), 401, "no access token"),
        (format!("{ws}/rtc?protocol=17&access_token=nonsense"), 401, "malformed"),
        (format!("{ws}/rtc?protocol=17&access_token={no_join}"), 401, "roomJoin"),
        (format!("{ws}/rtc?protocol=17&access_token={nameless}"), 400, "identity"),
        (format!("{ws}/rtc?protocol=17&access_token={long}"), 400, "identity"),
        (format!("{ws}/rtc?protocol=8&access_token={good}"), 400, "too old"),
        (format!("{ws}/rtc?protocol=new&access_token={good}"), 400, "protocol"),
        (format!("{ws}/rtc?protocol=17&access_token={plain}"), 404, "requested room does not exist"),
        (format!("{ws}/rtc/v1?join_request=x&access_token={good}"), 404, ""),
        (format!("{ws}/rtc?join_request=x&access_token={good}"), 404, ""),
    ];
    for (url, status, text) in cases {
        let (got, body) = refusal(Client::connect_to(&url).await);
        assert_eq!(got, status, "{url}: {body}");
        assert!(body.contains(text), "{url}: {body}");
        if status == 404 && text.is_empty() {
            assert_eq!(body, "", "a bare 404 is what makes clients fall back to v0");
        }
    }
    focus.shutdown().await;
}

#[tokio::test]
async fn validate_says_what_an_upgrade_would_with_cors_on_errors_too() {
    let focus = focus(|_| {}).await;
    let base = http(focus.ws_url());
    let client = reqwest::Client::new();
    let answer = async |path: String| {
        let response =
            client.get(format!("{base}{path}")).header("origin", "https://x.example").send().await.unwrap();
        let cors =
            response.headers().get("access-control-allow-origin").map(|v| v.to_str().unwrap().to_owned());
        (response.status().as_u16(), cors, response.text().await.unwrap())
    };
    let any = Some("*".to_owned());
    let good = token("alice", |_| {});
    let expired = token("alice", |claims| claims.exp = Some(1));
    let query = |token: &str| format!("/rtc/validate?protocol=17&access_token={token}");
    assert_eq!(answer(query(&good)).await, (200, any.clone(), "success".into()));
    let (status, cors, text) = answer(query(&expired)).await;
    assert_eq!((status, cors), (401, any.clone()));
    assert!(text.contains("expired"), "{text}");
    assert_eq!(
        answer(format!("/rtc/v1/validate?access_token={good}")).await,
        (404, any.clone(), String::new())
    );
    assert_eq!(answer(format!("/rtc?protocol=17&access_token={good}")).await, (404, any, String::new()));
    assert_eq!(focus.stats().await.participants, 0, "validate starts no session");
    focus.shutdown().await;
}

#[tokio::test]
async fn health_is_served_to_get_and_head_and_across_origins() {
    let focus = focus(|_| {}).await;
    let client = reqwest::Client::new();
    for base in [http(focus.ws_url()), format!("{}/livekit/sfu", http(focus.ws_url()))] {
        assert_eq!(client.get(&base).send().await.unwrap().text().await.unwrap(), "OK");
        assert_eq!(client.head(&base).send().await.unwrap().status(), 200);
    }
    let preflight = client
        .request(reqwest::Method::OPTIONS, http(focus.ws_url()))
        .header("origin", "https://x.example")
        .header("access-control-request-method", "HEAD")
        .header("access-control-request-headers", "x-anything")
        .send()
        .await
        .unwrap();
    assert!(preflight.status().is_success());
    assert_eq!(preflight.headers()["access-control-allow-headers"], "x-anything");
    assert_eq!(preflight.headers()["access-control-max-age"], "86400");
    focus.shutdown().await;
}

#[tokio::test]
async fn the_authorisation_service_is_in_the_same_process() {
    let focus = focus(|_| {}).await;
    let base = focus.jwt_url().unwrap().to_owned();
    let client = reqwest::Client::new();
    assert_eq!(client.get(format!("{base}/healthz")).send().await.unwrap().status(), 200);
    let refused = client.post(format!("{base}/get_token")).body("{}").send().await.unwrap();
    assert_eq!(refused.status(), 400);
    assert_eq!(refused.headers().get_all("access-control-allow-origin").iter().count(), 1);
    focus.shutdown().await;
}

#[tokio::test]
async fn a_resume_is_answered_with_rejoin() {
    let focus = focus(|_| {}).await;
    let (_alice, join) = Client::join(&focus, "alice").await;
    let sid = join.participant.unwrap().sid;
    let url = format!(
        "{}/rtc?reconnect=1&sid={sid}&protocol=17&access_token={}",
        focus.ws_url(),
        token("alice", |_| {})
    );
    let mut again = Client::connect_to(&url).await.unwrap();
    let Down::Leave(leave) = again.next().await else { panic!("the first message is not a goodbye") };
    assert_eq!(leave.action(), proto::leave_request::Action::Reconnect);
    assert_eq!(leave.reason(), proto::DisconnectReason::StateMismatch);
    assert!(leave.can_reconnect);
    assert_eq!(again.closed().await.0, 1000);
    focus.shutdown().await;
}

#[tokio::test]
async fn attributes_of_the_query_need_the_right_to_set_them() {
    let focus = focus(|_| {}).await;
    // {"hand":"up"}
    let url = |token: &str| {
        format!("{}/rtc?protocol=17&attributes=eyJoYW5kIjoidXAifQ&access_token={token}", focus.ws_url())
    };
    let mut client = Client::connect_to(&url(&token("alice", |_| {}))).await.unwrap();
    let Down::Join(join) = client.next().await else { panic!("no join") };
    assert_eq!(join.participant.unwrap().attributes["hand"], "up");
    let without = token("bob", |claims| claims.video.can_update_own_metadata = None);
    assert_eq!(refusal(Client::connect_to(&url(&without)).await).0, 401);
    drop(client);
    focus.shutdown().await;
}

/// The focus as it is embedded, with its real media plane: the offer has a candidate on loopback.
#[tokio::test]
async fn a_whole_focus_offers_its_media_port() {
    let focus = Focus::start(Config::dev_ephemeral()).await.unwrap();
    let udp = focus.udp_addr().unwrap();
    let (mut alice, _) = Client::join(&focus, "alice").await;
    let sdp = alice
        .expect(|message| match message {
            Down::Offer(offer) => Some(offer.sdp),
            _ => None,
        })
        .await;
    assert!(sdp.contains("a=ice-lite") && sdp.contains("m=application"), "{sdp}");
    assert!(sdp.contains(&format!("127.0.0.1 {} typ host", udp.port())), "{sdp}");
    focus.shutdown().await;
}
