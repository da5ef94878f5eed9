//! What hostile or broken clients send: a clear refusal or a counted drop, and everybody else goes on.

use antiphon_focus::token::{Keys, Secret};
use antiphon_focus::{FocusHandle, StartError};
use futures_util::SinkExt as _;
use livekit_protocol::{self as proto, signal_request::Message as Up, signal_response::Message as Down};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_tungstenite::tungstenite::Message;

use crate::support::client::{Client, DEADLINE, focus, refusal};
use crate::support::{claims, token};

async fn still_answers(client: &mut Client) {
    client.send(Up::PingReq(proto::Ping { timestamp: 4711, rtt: 0 })).await;
    client
        .expect(|message| {
            matches!(message, Down::PongResp(pong) if pong.last_ping_timestamp == 4711).then_some(())
        })
        .await;
}

async fn refused(focus: &FocusHandle, token: &str) -> String {
    let (status, body) = refusal(Client::connect(focus, token).await);
    assert_eq!(status, 401, "{body}");
    body
}

#[tokio::test]
async fn expired_foreign_and_malformed_tokens_are_refused_and_counted() {
    let focus = focus(|_| {}).await;
    let (mut alice, _) = Client::join(&focus, "alice").await;
    let expired = token("bob", |claims| claims.exp = Some(1_000_000));
    let endless = token("bob", |claims| claims.exp = None);
    let foreign = Keys::new().with("stranger", Secret::new("secret")).sign(&claims("bob", |_| {})).unwrap();
    let forged = Keys::new().with("devkey", Secret::new("guessed")).sign(&claims("bob", |_| {})).unwrap();
    let cut = &forged[..forged.len() / 2];
    assert!(refused(&focus, &expired).await.contains("expired"));
    assert!(refused(&focus, &endless).await.contains("no expiry"));
    assert!(refused(&focus, &foreign).await.contains("does not know"));
    assert!(refused(&focus, &forged).await.contains("signature"));
    assert!(refused(&focus, cut).await.contains("malformed"));
    assert!(refused(&focus, "").await.contains("no access token"));
    // {"alg":"none"} over good claims.
    let good = token("bob", |_| {});
    let payload = good.split('.').nth(1).unwrap();
    refused(&focus, &format!("eyJhbGciOiJub25lIiwidHlwIjoiSldUIn0.{payload}.")).await;
    assert_eq!(focus.stats().await.refused_joins, 7);
    still_answers(&mut alice).await;
    focus.shutdown().await;
}

#[tokio::test]
async fn malformed_oversized_and_textual_messages_end_only_their_own_connection() {
    let focus = focus(|_| {}).await;
    let (mut alice, _) = Client::join(&focus, "alice").await;
    let too_large = vec![0u8; 2 * 1024 * 1024 + 1];
    let cases = [
        (Message::Binary(vec![0xff; 9].into()), 1007, "protobuf"),
        (Message::Binary(too_large.into()), 1009, "2 MiB"),
        (Message::Text("{}".into()), 1003, "JSON"),
    ];
    for (message, code, reason) in cases {
        let (mut mallory, _) = Client::join(&focus, "mallory").await;
        // The server may close while a large message is still on its way.
        let _ = mallory.socket.send(message).await;
        let (got, why) = mallory.closed().await;
        assert_eq!(got, code, "{why}");
        assert!(why.contains(reason), "{why}");
        still_answers(&mut alice).await;
    }
    let stats = focus.stats().await;
    assert_eq!((stats.bad_messages, stats.participants), (3, 1));
    focus.shutdown().await;
}

#[tokio::test]
async fn empty_and_unknown_messages_are_passed_over() {
    let focus = focus(|_| {}).await;
    let (mut alice, _) = Client::join(&focus, "alice").await;
    alice.socket.send(Message::Binary(Vec::new().into())).await.unwrap();
    // Field 1000, a string: a message of a future protocol.
    alice.socket.send(Message::Binary(vec![0xc2, 0x3e, 0x01, b'x'].into())).await.unwrap();
    still_answers(&mut alice).await;
    assert_eq!(focus.stats().await.bad_messages, 0);
    focus.shutdown().await;
}

#[tokio::test]
async fn a_session_description_of_garbage_ends_only_its_own_session() {
    let focus = focus(|_| {}).await;
    let (mut alice, _) = Client::join(&focus, "alice").await;
    let (mut mallory, _) = Client::join(&focus, "mallory").await;
    let garbage = proto::SessionDescription { sdp: "garbage".into(), ..Default::default() };
    mallory.send(Up::Offer(garbage)).await;
    let leave = mallory
        .expect(|message| match message {
            Down::Leave(leave) => Some(leave),
            _ => None,
        })
        .await;
    assert_eq!(leave.reason(), proto::DisconnectReason::StateMismatch);
    assert_eq!(focus.stats().await.rejected_sdp, 1);
    still_answers(&mut alice).await;
    focus.shutdown().await;
}

#[tokio::test]
async fn garbage_instead_of_http_and_a_head_without_end_are_cut_off() {
    let focus = focus(|_| {}).await;
    let (mut alice, _) = Client::join(&focus, "alice").await;
    let mut stream = tokio::net::TcpStream::connect(focus.http_addr()).await.unwrap();
    stream.write_all(b"\x16\x03\x01 this is no HTTP\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    // A reset is as good an end as a 400.
    let _ = tokio::time::timeout(DEADLINE, stream.read_to_end(&mut answer))
        .await
        .expect("the connection was kept");

    let mut stream = tokio::net::TcpStream::connect(focus.http_addr()).await.unwrap();
    let head = format!("GET /rtc?x={} HTTP/1.1\r\n", "x".repeat(2 * 1024 * 1024));
    let _ = stream.write_all(head.as_bytes()).await;
    let _ = tokio::time::timeout(DEADLINE, stream.read_to_end(&mut answer))
        .await
        .expect("the connection was kept");
    still_answers(&mut alice).await;
    focus.shutdown().await;
}

#[tokio::test]
async fn a_port_that_is_taken_is_an_error_that_names_it() {
    let first = focus(|_| {}).await;
    let address = first.http_addr();
    let mut config = antiphon_focus::Config::dev_ephemeral();
    config.http_bind = address;
    let error = antiphon_focus::Focus::start(config).await.unwrap_err();
    assert!(matches!(error, StartError::Bind { .. }));
    assert!(error.to_string().contains(&address.to_string()), "{error}");
    first.shutdown().await;
}
