//! How sessions end, and how the server does.

use antiphon_focus::{Config, Focus};
use livekit_protocol::{
    self as proto, DisconnectReason, participant_info::State, signal_request::Message as Up,
    signal_response::Message as Down,
};

use crate::support::client::{Client, focus};

async fn gone(client: &mut Client) -> DisconnectReason {
    client
        .expect(|message| match message {
            Down::Update(update) => {
                let other = &update.participants[0];
                (other.state() == State::Disconnected).then(|| other.disconnect_reason())
            }
            _ => None,
        })
        .await
}

#[tokio::test]
async fn a_goodbye_is_answered_and_its_reason_told_to_others() {
    let focus = focus(|_| {}).await;
    let (mut alice, _) = Client::join(&focus, "alice").await;
    let (mut bob, _) = Client::join(&focus, "bob").await;
    let reason = DisconnectReason::ClientInitiated.into();
    bob.send(Up::Leave(proto::LeaveRequest { reason, ..Default::default() })).await;
    bob.expect(|message| matches!(message, Down::Leave(_)).then_some(())).await;
    assert_eq!(bob.closed().await.0, 1000);
    assert_eq!(gone(&mut alice).await, DisconnectReason::ClientInitiated);
    focus.shutdown().await;
}

#[tokio::test]
async fn a_lost_connection_ends_the_participant_at_once() {
    let focus = focus(|_| {}).await;
    let (mut alice, _) = Client::join(&focus, "alice").await;
    let (bob, _) = Client::join(&focus, "bob").await;
    drop(bob);
    assert_eq!(gone(&mut alice).await, DisconnectReason::SignalClose);
    focus.shutdown().await;
}

#[tokio::test]
async fn a_second_connection_replaces_the_first() {
    let focus = focus(|_| {}).await;
    let (mut old, _) = Client::join(&focus, "alice").await;
    let (_new, _) = Client::join(&focus, "alice").await;
    let leave = old
        .expect(|message| match message {
            Down::Leave(leave) => Some(leave),
            _ => None,
        })
        .await;
    assert_eq!(leave.reason(), DisconnectReason::DuplicateIdentity);
    assert_eq!(focus.stats().await.participants, 1);
    focus.shutdown().await;
}

#[tokio::test]
async fn a_stopping_server_says_goodbye_to_everybody() {
    let focus = focus(|_| {}).await;
    let address = focus.http_addr();
    let (mut alice, _) = Client::join(&focus, "alice").await;
    let (mut bob, _) = Client::join(&focus, "bob").await;
    let listen = async |client: &mut Client| {
        let leave = client
            .expect(|message| match message {
                Down::Leave(leave) => Some(leave),
                _ => None,
            })
            .await;
        assert_eq!(leave.reason(), DisconnectReason::ServerShutdown);
        assert_eq!(client.closed().await.0, 1000);
    };
    tokio::join!(focus.shutdown(), listen(&mut alice), listen(&mut bob));
    assert!(tokio::net::TcpStream::connect(address).await.is_err(), "the server still listens");
}

#[tokio::test]
async fn stopped_focus_leaves_its_addresses_to_the_next() {
    let mut config = Config::dev_ephemeral();
    for _ in 0..20 {
        let focus = Focus::start(config.clone()).await.unwrap();
        (config.http_bind, config.udp_bind) = (focus.http_addr(), focus.udp_addr().unwrap());
        let (client, _) = Client::join(&focus, "alice").await;
        drop(client);
        focus.shutdown().await;
    }
}

#[tokio::test]
async fn a_client_that_does_not_read_is_dropped_and_the_others_go_on() {
    let focus = focus(|_| {}).await;
    let (mut alice, _) = Client::join(&focus, "alice").await;
    let (deaf, _) = Client::join(&focus, "deaf").await;
    // Large metadata fills the sockets' buffers, then the queue; alice reads all of it.
    let mut dropped = false;
    for round in 0..4_000u32 {
        let metadata = format!("{round}{}", "x".repeat(64 * 1024));
        alice
            .send(Up::UpdateMetadata(proto::UpdateParticipantMetadata { metadata, ..Default::default() }))
            .await;
        alice.expect(|message| matches!(message, Down::RequestResponse(_)).then_some(())).await;
        let stats = focus.stats().await;
        if stats.participants == 1 {
            assert_eq!(stats.slow_clients, 1);
            dropped = true;
            break;
        }
    }
    assert!(dropped, "the queue of a client that does not read has no end");
    drop(deaf);
    focus.shutdown().await;
}
