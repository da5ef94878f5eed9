//! Messages on the data channels, up and down.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use antiphon_focus::plane::{Channel, Command, Event, PeerRole};
use bytes::Bytes;

use crate::media_clients::{World, has_data};

#[tokio::test]
async fn messages_go_up_and_down_on_both_channels() {
    let mut world = World::new();
    let alice = world.publisher(1, &[]).await.peer;
    let bob = world.subscriber(2).await;
    let big = vec![7; 60_000];
    world.client(alice).send("_reliable", b"hello");
    world.client(alice).send("_lossy", b"quick");
    world.client(alice).send("_reliable", &big);
    world
        .until("the messages of the publisher", |w| {
            has_data(&w.events, alice, Channel::Reliable, b"hello")
                && has_data(&w.events, alice, Channel::Lossy, b"quick")
                && has_data(&w.events, alice, Channel::Reliable, &big)
        })
        .await;
    for (channel, payload) in
        [(Channel::Reliable, Bytes::from(big.clone())), (Channel::Lossy, Bytes::from_static(b"now"))]
    {
        world.command(Command::SendData { peer: bob, channel, payload });
    }
    world
        .until("the messages to the subscriber", |w| {
            let messages = &w.clients[&bob].messages;
            messages.contains(&("_reliable".to_owned(), big.clone()))
                && messages.contains(&("_lossy".to_owned(), b"now".to_vec()))
        })
        .await;
}

#[tokio::test]
async fn messages_wait_for_the_channel_and_keep_their_order() {
    let mut world = World::new();
    let bob = world.connect(2, PeerRole::Subscriber).await;
    for i in 0..100u8 {
        let payload = Bytes::from(vec![i; 9000]);
        world.command(Command::SendData { peer: bob, channel: Channel::Reliable, payload });
    }
    world.until("all of them", |w| w.clients[&bob].messages.len() == 100).await;
    assert!(world.client(bob).messages.iter().zip(0u8..).all(|((_, message), i)| message[0] == i));
}

#[tokio::test]
async fn a_client_that_takes_nothing_loses_lossy_messages_and_then_its_peer() {
    let mut world = World::new();
    let bob = world.connect(2, PeerRole::Subscriber).await;
    // It never answers, so nothing can be delivered.
    world.clients.clear();
    let payload = Bytes::from(vec![0; 65_000]);
    for _ in 0..20 {
        let payload = payload.clone();
        world.command(Command::SendData { peer: bob, channel: Channel::Lossy, payload });
    }
    world.until("lossy messages to be dropped", |w| w.plane.counters().data_dropped.count() == 4).await;
    for _ in 0..20 {
        let payload = payload.clone();
        world.command(Command::SendData { peer: bob, channel: Channel::Reliable, payload });
    }
    world
        .until("the peer to be given up", |w| {
            w.events.iter().any(|e| matches!(e, Event::Failed { peer, .. } if *peer == bob))
        })
        .await;
}
