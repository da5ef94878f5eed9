//! Negotiation with the media plane: what its descriptions say, and how subscriptions come and go.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use antiphon_focus::plane::{Command, Event, MediaKind, PeerId, PeerRole};
use antiphon_focus::sdp::{self, Direction, Media};

use crate::media_clients::World;

/// livekit-client 2.23.0 in Chromium: data channels, a microphone, a camera in three simulcast layers.
const CHROMIUM: &str = include_str!("chromium-offer.sdp");

#[tokio::test]
async fn chromium_is_answered_with_its_own_numbers() {
    let mut world = World::new();
    let (plane, peer) = (world.plane.clone(), PeerId(1));
    world.command(Command::AddPeer { peer, role: PeerRole::Publisher });
    // The world answers for its own clients only, so this answer is taken by hand.
    let sections = offer_by_hand(&mut world, peer, CHROMIUM).await.unwrap();
    let (answer, sections) = sections;
    let kinds: Vec<_> = sections.iter().map(|s| (s.mid.as_str(), s.kind, s.sends)).collect();
    assert_eq!(kinds, [("1", MediaKind::Audio, true), ("2", MediaKind::Video, true)]);
    assert_eq!(sections[0].track_id.as_deref(), Some("90b26b9a-d0f8-4cdc-bc83-07dab86a65f6"));
    assert_eq!(sections[0].mimes, ["audio/opus"]);
    assert_eq!(sections[1].mimes, ["video/VP8"]);
    assert_eq!(sections[1].rids, ["q", "h", "f"]);
    for line in [
        "a=ice-lite",
        "a=group:BUNDLE 0 1 2",
        "m=audio 9 UDP/TLS/RTP/SAVPF 111",
        "m=video 9 UDP/TLS/RTP/SAVPF 96 97",
        "a=rtpmap:96 VP8/90000",
        "a=fmtp:97 apt=96",
        "a=extmap:1 urn:ietf:params:rtp-hdrext:ssrc-audio-level",
        "a=extmap:4 urn:ietf:params:rtp-hdrext:sdes:mid",
        "a=extmap:10 urn:ietf:params:rtp-hdrext:sdes:rtp-stream-id",
        "a=extmap:11 urn:ietf:params:rtp-hdrext:sdes:repaired-rtp-stream-id",
        "a=rid:q recv",
        "a=simulcast:recv q;h;f",
        "a=setup:passive",
    ] {
        assert!(answer.lines().any(|l| l == line), "{line} is missing in\n{answer}");
    }
    let candidate = format!("127.0.0.1 {} typ host", plane.local_addr().port());
    assert_eq!(answer.matches("a=candidate:").count(), 1);
    assert!(answer.contains(&candidate));
    let answered = sdp::sections(&answer).unwrap();
    assert!(answered[1..].iter().all(|s| s.direction == Direction::RecvOnly && !s.announces_ssrcs));

    // The camera is switched off and its upper layers are paused, as livekit-client does.
    let off = CHROMIUM
        .replace("a=simulcast:send q;h;f", "a=simulcast:send q;~h;~f")
        .replace("a=sendonly", "a=inactive");
    let (answer, sections) = offer_by_hand(&mut world, peer, &off).await.unwrap();
    assert!(sections.iter().all(|s| !s.sends));
    assert!(sdp::sections(&answer).unwrap()[1..].iter().all(|s| s.direction == Direction::Inactive));
}

#[tokio::test]
async fn a_bad_description_is_rejected_and_the_peer_goes_on() {
    let mut world = World::new();
    let peer = PeerId(1);
    world.command(Command::AddPeer { peer, role: PeerRole::Publisher });
    let huge = format!("{CHROMIUM}{}", "a=x\r\n".repeat(300_000));
    let no_fingerprint: String =
        CHROMIUM.lines().filter(|l| !l.contains("fingerprint")).map(|l| format!("{l}\r\n")).collect();
    let unnamed = CHROMIUM.replace("a=mid:2", "a=mid:../../etc");
    for bad in ["", "v=0", "m=audio", "\u{0}\u{1}", &huge, &unnamed] {
        let reason = offer_by_hand(&mut world, peer, bad).await.unwrap_err();
        assert!(!reason.is_empty());
    }
    assert!(offer_by_hand(&mut world, peer, CHROMIUM).await.is_ok());
    world.command(Command::ApplyAnswer { peer, sdp: CHROMIUM.to_owned() });
    world
        .until("an answer on a publisher peer to be rejected", |w| {
            w.events.iter().any(|e| matches!(e, Event::Rejected { .. }))
        })
        .await;
    let other = PeerId(2);
    world.command(Command::AddPeer { peer: other, role: PeerRole::Publisher });
    assert!(offer_by_hand(&mut world, other, &no_fingerprint).await.is_err());
    assert_eq!(world.plane.counters().panics.count(), 0);
}

#[tokio::test]
async fn a_section_without_a_known_codec_is_rejected_alone() {
    let mut world = World::new();
    let peer = PeerId(1);
    world.command(Command::AddPeer { peer, role: PeerRole::Publisher });
    let h264_only = CHROMIUM.replace("VP8/90000", "VP7/90000");
    let (answer, sections) = offer_by_hand(&mut world, peer, &h264_only).await.unwrap();
    assert!(answer.contains("m=video 0 "), "{answer}");
    assert!(answer.contains("a=group:BUNDLE 0 1\r\n"));
    let sends: Vec<_> = sections.iter().map(|s| (s.mid.as_str(), s.sends)).collect();
    assert_eq!(sends, [("1", true), ("2", false)]);
    assert!(sections[1].mimes.is_empty());
}

#[tokio::test]
async fn subscriptions_come_and_go_in_the_same_sections() {
    let mut world = World::new();
    let mut alice = world.publisher(1, &[]).await;
    let mut carol = world.publisher(4, &[]).await;
    let bob = world.subscriber(2).await;
    let first = sdp::sections(&world.client(bob).offers[0].0).unwrap();
    assert_eq!(first.len(), 1, "the first offer has the data channels alone");
    assert_eq!(first[0].media, Media::Application);

    let tracks = [alice.audio_track, alice.video_track, carol.audio_track];
    world.subscribe(bob, &tracks).await;
    let (offer, mids) = world.client(bob).offers.last().unwrap().clone();
    assert!(offer.contains("a=ice-lite") && offer.contains("a=setup:actpass"));
    let sections = sdp::sections(&offer).unwrap();
    assert_eq!((sections.len(), mids.len()), (4, 3));
    for (mid, track) in &mids {
        let section = sections.iter().find(|s| s.mid == *mid).unwrap();
        assert_eq!(section.direction, Direction::SendOnly);
        assert!(section.announces_ssrcs, "some clients refuse a section without a=ssrc");
        assert_eq!(section.track_id, Some(format!("TR_{}", track.0)));
        assert!(offer.contains(&format!("a=msid:PA_x|TR_{0} TR_{0}\r\n", track.0)));
    }
    assert_eq!(offer.matches("a=sendonly\r\n").count(), 3);
    assert_eq!(offer.matches("a=ssrc-group:FID ").count(), 1, "the picture has a retransmission stream");

    // One track goes, the others stay where they are.
    let (track, mid) = (alice.audio_track, world.client(bob).mid_of(alice.audio_track));
    hear(&mut world, &mut alice, bob, &mid).await;
    world.command(Command::Unsubscribe { peer: bob, track });
    world.until("the section to be off", |w| w.clients[&bob].offers.last().unwrap().1.len() == 2).await;
    let sections = sdp::sections(&world.client(bob).offers.last().unwrap().0).unwrap();
    assert_eq!(sections.len(), 4);
    assert_eq!(sections.iter().find(|s| s.mid == mid).unwrap().direction, Direction::Inactive);
    let before = world.client(bob).received(&mid).len();
    let carols = world.client(bob).mid_of(carol.audio_track);
    alice.speak(&mut world, -20);
    hear(&mut world, &mut carol, bob, &carols).await;
    assert_eq!(world.client(bob).received(&mid).len(), before, "nothing more of what was unsubscribed");

    // It comes back where it was, on the same numbers.
    world.subscribe(bob, &[track]).await;
    assert_eq!(world.client(bob).mid_of(track), mid);
    hear(&mut world, &mut alice, bob, &mid).await;
    let packets = world.clients[&bob].received(&mid);
    assert!(packets.windows(2).all(|p| *p[1].seq_no == *p[0].seq_no + 1));

    // Its publisher leaves: both of its sections go off.
    world.command(Command::RemovePeer { peer: alice.peer });
    world
        .until("the publisher's sections to be off", |w| w.clients[&bob].offers.last().unwrap().1.len() == 1)
        .await;
    hear(&mut world, &mut carol, bob, &carols).await;
}

#[tokio::test]
async fn changes_while_an_answer_is_awaited_are_offered_afterwards() {
    let mut world = World::new();
    let alice = world.publisher(1, &[]).await;
    let bob = world.connect(2, PeerRole::Subscriber).await;
    // Before the first answer: these cannot be in the first offer.
    world.subscribe(bob, &[alice.audio_track, alice.video_track]).await;
    assert_eq!(world.client(bob).offers.len(), 2, "gathered into one offer");
    world.command(Command::ApplyAnswer { peer: bob, sdp: CHROMIUM.to_owned() });
    world.command(Command::ApplyAnswer { peer: bob, sdp: CHROMIUM.to_owned() });
    world
        .until("the second answer to one offer to be rejected", |w| {
            w.events.iter().any(|e| matches!(e, Event::Rejected { .. }))
        })
        .await;
}

/// Speaks until the subscriber hears it.
async fn hear(
    world: &mut World,
    publisher: &mut crate::media_clients::Published,
    subscriber: PeerId,
    mid: &str,
) {
    let before = world.client(subscriber).received(mid).len();
    while world.client(subscriber).received(mid).len() == before {
        publisher.speak(world, -20);
        let taken = world.plane.counters().datagrams_in.count();
        world.until("the plane to go on", |w| w.plane.counters().datagrams_in.count() > taken).await;
    }
}

/// Sends an offer that no client of the world stands behind.
async fn offer_by_hand(
    world: &mut World,
    peer: PeerId,
    offer: &str,
) -> Result<(String, Vec<antiphon_focus::plane::OfferedSection>), String> {
    world.command(Command::ApplyOffer { peer, sdp: offer.to_owned() });
    world
        .until("the answer", |w| {
            w.events.iter().any(|e| matches!(e, Event::Answered { .. } | Event::Rejected { .. }))
        })
        .await;
    match world.events.pop().unwrap() {
        Event::Answered { sdp, sections, .. } => Ok((sdp, sections)),
        Event::Rejected { reason, .. } => Err(reason),
        other => panic!("{other:?}"),
    }
}
