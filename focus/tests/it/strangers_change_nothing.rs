//! Datagrams from nobody in particular: counted, dropped, harmless.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]
#![allow(clippy::disallowed_methods, reason = "the client's end of a socket needs the clock")]

use std::time::Instant;

use antiphon_focus::plane::{Command, Event, PeerId, PeerRole};
use str0m::change::SdpOffer;
use str0m::{Candidate, Input, Output, RtcConfig};
use tokio::net::UdpSocket;

use crate::media_clients::World;

#[tokio::test]
async fn garbage_is_counted_and_the_call_goes_on() {
    let mut world = World::new();
    let mut alice = world.publisher(1, &[]).await;
    let bob = world.subscriber(2).await;
    world.subscribe(bob, &[alice.audio_track]).await;
    let stranger = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let target = world.plane.local_addr();
    let mut sent = 0;
    for first in 0..=255u8 {
        for length in [1, 2, 13, 20, 200, 1999] {
            let datagram: Vec<u8> = (0..length).map(|i| first.wrapping_add((i * 7) as u8)).collect();
            stranger.send_to(&datagram, target).await.unwrap();
            sent += 1;
            // The socket's buffer is finite: let the plane keep up.
            if sent % 64 == 0 {
                world.until("the garbage", |w| w.plane.counters().garbage.count() >= sent).await;
            }
        }
    }
    stranger.send_to(&[0x80; 3000], target).await.unwrap();
    world.until("the garbage", |w| w.plane.counters().garbage.count() == sent + 1).await;
    assert_eq!(world.plane.counters().panics.count(), 0);
    // A client's own garbage costs at most itself: noise on a known address.
    let peer = alice.peer;
    for first in 128..192u8 {
        world.client(peer).socket.send_to(&[first; 100], target).await.unwrap();
    }
    let mid = world.client(bob).mid_of(alice.audio_track);
    while world.client(bob).received(&mid).is_empty() {
        alice.speak(&mut world, -20);
        let taken = world.plane.counters().datagrams_in.count();
        world.until("the plane to go on", |w| w.plane.counters().datagrams_in.count() > taken).await;
    }
    assert_eq!(world.plane.counters().panics.count(), 0);
}

#[tokio::test]
async fn a_request_without_the_password_binds_no_address() {
    let mut world = World::new();
    let peer = PeerId(9);
    world.command(Command::AddPeer { peer, role: PeerRole::Subscriber });
    let mut offer = None;
    world
        .until("the offer", |w| {
            offer = w.events.iter().find_map(|e| match e {
                Event::Offer { sdp, .. } => Some(sdp.clone()),
                _ => None,
            });
            offer.is_some()
        })
        .await;
    let offer = offer.unwrap();
    // The stranger has seen the user name fragment but not the password.
    let password = offer.lines().find_map(|line| line.strip_prefix("a=ice-pwd:")).unwrap();
    let forged = offer.replace(password, "aaaaaaaaaaaaaaaaaaaaaaaa");
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let mut stranger = RtcConfig::new().build(Instant::now());
    stranger.add_local_candidate(Candidate::host(socket.local_addr().unwrap(), "udp").unwrap());
    stranger.sdp_api().accept_offer(SdpOffer::from_sdp_string(&forged).unwrap()).unwrap();
    stranger.handle_input(Input::Timeout(Instant::now())).unwrap();
    let mut requests = 0;
    while requests < 1 {
        match stranger.poll_output().unwrap() {
            Output::Timeout(at) => {
                tokio::time::sleep_until(at.into()).await;
                stranger.handle_input(Input::Timeout(Instant::now())).unwrap();
            }
            Output::Transmit(t) => {
                socket.send_to(&t.contents, t.destination).await.unwrap();
                requests += 1;
            }
            Output::Event(_) => {}
        }
    }
    world.until("the request", |w| w.plane.counters().unauthenticated.count() >= 1).await;
    // Its address is as unknown as before: what is no STUN from there is garbage.
    let before = world.plane.counters().garbage.count();
    socket.send_to(&[22, 254, 253, 0, 0], world.plane.local_addr()).await.unwrap();
    world.until("the garbage", |w| w.plane.counters().garbage.count() == before + 1).await;
    assert_eq!(world.plane.counters().datagrams_out.count(), 0, "a stranger gets no answer");
}
