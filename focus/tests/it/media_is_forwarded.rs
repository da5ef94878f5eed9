//! Two subscribers get a publisher's sound and picture, byte for byte and as one continuous stream.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use antiphon_focus::plane::{Command, Event, MediaKind};
use str0m::media::KeyframeRequestKind;

use crate::media_clients::{World, is_vp8, sealed};

#[tokio::test]
async fn sound_and_picture_reach_every_subscriber_unchanged() {
    let mut world = World::new();
    let mut alice = world.publisher(1, &[]).await;
    let tracks = [alice.audio_track, alice.video_track];
    let subscribers = [world.subscriber(2).await, world.subscriber(3).await];
    for peer in subscribers {
        world.subscribe(peer, &tracks).await;
    }

    // Until the first packets pass, the answers are still on their way to the plane.
    let (mut sounds, mut pictures) = (vec![], vec![]);
    for i in 0..30 {
        sounds.push(alice.speak(&mut world, -20));
        pictures.extend(alice.show(&mut world, None, i % 10 == 0));
        let want = i + 1;
        world
            .until("the plane to have taken the packets", |w| {
                w.plane.counters().datagrams_in.count() > 3 * want
            })
            .await;
    }
    world
        .until("the last packets", |w| {
            subscribers.iter().all(|peer| {
                let client = &w.clients[peer];
                let has = |track, payload: &[u8], skip| {
                    client
                        .received(&client.mid_of(track))
                        .last()
                        .is_some_and(|p| p.payload[skip..] == *payload)
                };
                has(tracks[0], sounds.last().unwrap(), 0) && has(tracks[1], pictures.last().unwrap(), 6)
            })
        })
        .await;
    for peer in subscribers {
        let client = &world.clients[&peer];
        let audio = client.received(&client.mid_of(tracks[0]));
        let video = client.received(&client.mid_of(tracks[1]));
        assert!(audio.len() >= 5 && video.len() >= 10, "{} {}", audio.len(), video.len());
        // Everything from the first packet on, in order, untouched.
        let tail = &sounds[sounds.len() - audio.len()..];
        assert!(audio.iter().zip(tail).all(|(packet, sent)| packet.payload[..] == sent[..]));
        let tail = &pictures[pictures.len() - video.len()..];
        assert!(video.iter().zip(tail).all(|(packet, sent)| sealed(packet) == *sent));
        assert_eq!(sealed(video[0])[0] & 1, 0, "the picture begins with a key frame");
        for packets in [audio, video] {
            for pair in packets.windows(2) {
                assert_eq!(*pair[1].seq_no, *pair[0].seq_no + 1);
                assert!(pair[1].header.timestamp >= pair[0].header.timestamp);
            }
        }
    }
    for track in tracks {
        assert!(
            world.events.iter().any(|e| matches!(e, Event::TrackStarted { track: t } if *t == track)),
            "{:?}",
            world.events
        );
    }
    world
        .until("the loudness", |w| {
            w.events.iter().any(|e| {
                matches!(e, Event::AudioLevel { track, level: 20, active_share }
                    if *track == tracks[0] && *active_share > 0.0)
            })
        })
        .await;
    assert_eq!(world.plane.counters().panics.count(), 0);
}

#[tokio::test]
async fn a_key_frame_request_reaches_the_publisher() {
    let mut world = World::new();
    let mut alice = world.publisher(1, &[]).await;
    let bob = world.subscriber(2).await;
    // The stream must be known before a key frame of it can be asked for.
    alice.show(&mut world, None, false);
    world.subscribe(bob, &[alice.video_track]).await;
    let peer = alice.peer;
    world
        .until("the request of a subscriber that waits for its first picture", |w| {
            !w.clients[&peer].key_frame_requests.is_empty()
        })
        .await;
    alice.show(&mut world, None, true);
    let mid = world.client(bob).mid_of(alice.video_track);
    world.until("the picture", |w| w.clients[&bob].received(&mid).len() == 2).await;

    world.client(peer).key_frame_requests.clear();
    let ssrc = world.client(bob).received(&mid)[0].header.ssrc;
    let mut api = world.client(bob).rtc.direct_api();
    api.stream_rx(&ssrc).unwrap().request_keyframe(KeyframeRequestKind::Fir);
    world
        .until("the request of a subscriber that lost the picture", |w| {
            w.clients[&peer].key_frame_requests == [(alice.video, None)]
        })
        .await;
}

#[tokio::test]
async fn a_lost_packet_is_sent_again() {
    let mut world = World::new();
    let mut alice = world.publisher(1, &[]).await;
    let bob = world.subscriber(2).await;
    world.subscribe(bob, &[alice.video_track]).await;
    let mid = world.client(bob).mid_of(alice.video_track);
    let mut sent = vec![];
    // The first pictures make the stream known.
    while world.client(bob).received(&mid).is_empty() {
        sent.extend(alice.show(&mut world, None, true));
        let taken = world.plane.counters().datagrams_in.count();
        world.until("the plane to go on", |w| w.plane.counters().datagrams_in.count() > taken).await;
    }
    let mut seen = 0;
    world.client(bob).lose = Box::new(move |datagram| {
        seen += u32::from(is_vp8(datagram));
        is_vp8(datagram) && seen == 4
    });
    for _ in 0..5 {
        sent.extend(alice.show(&mut world, None, false));
    }
    let last = sent.last().unwrap().clone();
    world
        .until("every packet, the lost one too", |w| {
            let packets = w.clients[&bob].received(&mid);
            packets.last().is_some_and(|p| sealed(p) == last)
                && packets.windows(2).all(|pair| *pair[1].seq_no == *pair[0].seq_no + 1)
        })
        .await;
    let packets = world.clients[&bob].received(&mid);
    let tail = &sent[sent.len() - packets.len()..];
    assert!(packets.iter().zip(tail).all(|(packet, sent)| sealed(packet) == *sent));
}

#[tokio::test]
async fn a_packet_lost_before_us_is_asked_for_and_fills_its_gap() {
    let mut world = World::new();
    // Of a simulcast layer: its retransmissions come on a stream of their own, named by the repaired rid.
    let mut alice = world.publisher(1, &["q", "h"]).await;
    let bob = world.subscriber(2).await;
    world.subscribe(bob, &[alice.video_track]).await;
    let mid = world.client(bob).mid_of(alice.video_track);
    let mut sent = vec![];
    while world.client(bob).received(&mid).is_empty() {
        sent.extend(alice.show(&mut world, Some("q"), true));
        let taken = world.plane.counters().datagrams_in.count();
        world.until("the plane to go on", |w| w.plane.counters().datagrams_in.count() > taken).await;
    }
    let mut seen = 0;
    world.client(alice.peer).lose_sent = Box::new(move |datagram| {
        seen += u32::from(is_vp8(datagram));
        is_vp8(datagram) && seen == 4
    });
    for _ in 0..5 {
        sent.extend(alice.show(&mut world, Some("q"), false));
    }
    let last = sent.last().unwrap().clone();
    world
        .until("every packet, the lost one too", |w| {
            let packets = w.clients[&bob].received(&mid);
            packets.last().is_some_and(|p| sealed(p) == last)
                && packets.windows(2).all(|pair| *pair[1].seq_no == *pair[0].seq_no + 1)
        })
        .await;
    let packets = world.clients[&bob].received(&mid);
    let tail = &sent[sent.len() - packets.len()..];
    assert!(packets.iter().zip(tail).all(|(packet, sent)| sealed(packet) == *sent));
}

#[tokio::test]
async fn a_lower_layer_is_forwarded_on_request_and_the_stream_goes_on() {
    let mut world = World::new();
    let mut alice = world.publisher(1, &["q", "h"]).await;
    let bob = world.subscriber(2).await;
    let track = alice.video_track;
    world.subscribe(bob, &[track]).await;
    let mid = world.client(bob).mid_of(track);
    assert_eq!(
        world.client(alice.peer).sections.iter().find(|s| s.kind == MediaKind::Video).unwrap().rids,
        ["q", "h"]
    );
    let mut rounds = 0;
    let layer = |packet: &[u8]| String::from_utf8_lossy(packet).contains("Some(\"h\")");
    for (max_layer, high) in [(1, true), (0, false), (1, true)] {
        world.command(Command::SetForwarding { peer: bob, track, paused: false, max_layer });
        let before = world.client(bob).received(&mid).len();
        let mut wanted = 0;
        while wanted < 6 {
            rounds += 1;
            assert!(rounds < 500, "the layer never came");
            // An encoder obeys every key frame request here.
            for rid in ["q", "h"] {
                alice.show(&mut world, Some(rid), true);
            }
            let taken = world.plane.counters().datagrams_in.count();
            world.until("the plane to go on", |w| w.plane.counters().datagrams_in.count() > taken).await;
            let packets = world.clients[&bob].received(&mid);
            wanted = packets[before..].iter().rev().take_while(|p| layer(&p.payload) == high).count();
        }
    }
    let packets = world.clients[&bob].received(&mid);
    for pair in packets.windows(2) {
        assert_eq!(*pair[1].seq_no, *pair[0].seq_no + 1);
        assert!(pair[1].header.timestamp.wrapping_sub(pair[0].header.timestamp) < 1 << 31);
        let picture = |p: &[u8]| u16::from_be_bytes([p[2] & 0x7f, p[3]]);
        assert!(picture(&pair[1].payload) >= picture(&pair[0].payload), "picture ids go on");
    }
    world.command(Command::SetForwarding { peer: bob, track, paused: true, max_layer: 1 });
    // Data overtakes nothing: once it is here, the pause has been obeyed.
    world.command(Command::SendData {
        peer: bob,
        channel: antiphon_focus::plane::Channel::Reliable,
        payload: bytes::Bytes::from_static(b"paused"),
    });
    world.until("the pause", |w| !w.clients[&bob].messages.is_empty()).await;
    let before = world.client(bob).packets.len();
    alice.show(&mut world, Some("q"), true);
    alice.show(&mut world, Some("h"), true);
    let taken = world.plane.counters().datagrams_in.count();
    world.until("the plane to go on", |w| w.plane.counters().datagrams_in.count() >= taken + 4).await;
    assert_eq!(world.client(bob).packets.len(), before);
}
