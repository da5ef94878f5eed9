use super::*;
use crate::transport::{WireFrame, rtc::OutgoingPacket};

async fn peer() -> (Peer, mpsc::Receiver<((), PeerEvent)>) {
    let (events, receiver) = mpsc::channel(EVENTS);
    let network = Network { addresses: vec!["127.0.0.1:0".parse().unwrap()], ..Network::default() };
    (Peer::open(&network, Vec::new(), (), events).await.unwrap(), receiver)
}

/// An SFU's offer with data and, per entry, a video section of that direction; ended sections have no SSRC.
fn offer(version: u32, directions: &[&str]) -> String {
    let mids: Vec<_> = (0..=directions.len()).map(|mid| mid.to_string()).collect();
    let mut sdp = format!(
        "v=0\r\no=- 1 {version} IN IP4 0.0.0.0\r\ns=-\r\nt=0 0\r\n\
         a=fingerprint:sha-256 {}\r\na=group:BUNDLE {}\r\n\
         m=application 9 UDP/DTLS/SCTP webrtc-datachannel\r\nc=IN IP4 0.0.0.0\r\na=setup:actpass\r\na=mid:0\r\n\
         a=sendrecv\r\na=sctp-port:5000\r\na=ice-ufrag:abcdefgh\r\na=ice-pwd:abcdefghijklmnopqrstuvwx\r\n",
        ["AB"; 32].join(":"),
        mids.join(" ")
    );
    for (index, direction) in directions.iter().enumerate() {
        let mid = index + 1;
        sdp.push_str(&format!(
            "m=video 9 UDP/TLS/RTP/SAVPF 96 97 120\r\nc=IN IP4 0.0.0.0\r\na=setup:actpass\r\na=mid:{mid}\r\n\
             a=ice-ufrag:abcdefgh\r\na=ice-pwd:abcdefghijklmnopqrstuvwx\r\na=rtcp-mux\r\n\
             a=rtpmap:96 VP8/90000\r\na=rtcp-fb:96 nack\r\na=rtcp-fb:96 nack pli\r\n\
             a=rtpmap:97 rtx/90000\r\na=fmtp:97 apt=96\r\na=rtpmap:120 EXOTIC/90000\r\n"
        ));
        if direction.starts_with("send") {
            sdp.push_str(&format!(
                "a=ssrc-group:FID {mid}1 {mid}2\r\na=ssrc:{mid}1 cname:x\r\na=ssrc:{mid}2 cname:x\r\n\
                 a=msid:PA_a|TR_{mid}{version} TR_{mid}{version}\r\n"
            ));
        }
        sdp.push_str(&format!("a={direction}\r\n"));
    }
    sdp
}

fn directions(answer: &str) -> Vec<&str> {
    answer
        .split("\nm=video")
        .skip(1)
        .map(|section| {
            ["sendrecv", "sendonly", "recvonly", "inactive"]
                .into_iter()
                .find(|direction| section.contains(&format!("a={direction}\r")))
                .unwrap_or_else(|| panic!("no direction in {section}"))
        })
        .collect()
}

#[tokio::test]
async fn video_is_offered_with_repair_and_cid() {
    for (codec, apt) in [
        (Codec::Vp8, "a=fmtp:97 apt=96"),
        (Codec::Vp9, "a=fmtp:99 apt=98"),
        (Codec::H264, "a=fmtp:103 apt=102"),
        (Codec::H265, "a=fmtp:117 apt=116"),
        (Codec::Av1, "a=fmtp:46 apt=45"),
    ] {
        let (peer, _events) = peer().await;
        peer.add_track(Codec::Opus, "cid-mic", 1, (0, 0)).await.unwrap();
        peer.add_track(codec, "cid-cam", 1, (640, 360)).await.unwrap();
        let sdp = peer.offer().await.unwrap();
        let (_, video) = sdp.split_once("m=video").unwrap();
        let feedback = ["nack\r", "nack pli\r", "ccm fir\r", "transport-cc\r"];
        for line in [apt, "a=ssrc-group:FID ", "a=msid:stream-cid-cam cid-cam", "a=sendonly"]
            .into_iter()
            .chain(feedback)
        {
            assert!(video.contains(line), "{line} in {video}");
        }
        assert_eq!(video.matches("a=rtpmap").count(), 2, "one codec and its repair: {video}");
        assert!(sdp.contains("a=msid:stream-cid-mic cid-mic"));
        peer.close().await;
    }
}

#[tokio::test]
async fn simulcast_is_offered_by_rid() {
    let (peer, _events) = peer().await;
    peer.add_track(Codec::Vp8, "cid-cam", 3, (640, 360)).await.unwrap();
    let sdp = peer.offer().await.unwrap();
    for line in [
        "a=rid:q send",
        "a=rid:h send",
        "a=rid:f send",
        "a=simulcast:send q;h;f",
        "sdes:mid",
        "sdes:rtp-stream-id",
    ] {
        assert!(sdp.contains(line), "{line} in {sdp}");
    }
    assert!(!sdp.contains("a=ssrc"), "{sdp}");
    peer.close().await;
}

#[tokio::test]
async fn section_may_go_quiet_again_and_again() {
    for quiet in ["inactive", "recvonly"] {
        let (mut peer, _events) = peer().await;
        for round in 0..3 {
            let answer = peer.answer_offer(&offer(2 * round, &["sendonly"])).await.unwrap();
            assert_eq!(directions(&answer), ["recvonly"], "round {round}");
            let answer = peer.answer_offer(&offer(2 * round + 1, &[quiet])).await.unwrap();
            assert_eq!(directions(&answer), ["inactive"], "round {round}");
        }
        peer.close().await;
    }
}

#[tokio::test]
async fn quiet_section_can_receive_later() {
    let (mut peer, _events) = peer().await;
    let answer = peer.answer_offer(&offer(1, &["recvonly", "sendrecv"])).await.unwrap();
    assert_eq!(directions(&answer), ["inactive", "recvonly"]);
    let answer = peer.answer_offer(&offer(2, &["sendrecv", "sendrecv"])).await.unwrap();
    assert_eq!(directions(&answer), ["recvonly", "recvonly"]);
    peer.close().await;
}

#[tokio::test]
async fn unnamed_stream_does_not_fail_the_others() {
    let (mut peer, _events) = peer().await;
    let nameless = offer(1, &["sendonly", "sendrecv"])
        .replace("a=ssrc-group:FID 21 22\r\na=ssrc:21 cname:x\r\na=ssrc:22 cname:x\r\n", "");
    let answer = peer.answer_offer(&nameless).await.unwrap();
    assert_eq!(directions(&answer).len(), 2);
    assert_eq!(directions(&answer)[0], "recvonly");
    peer.close().await;
}

#[tokio::test]
async fn only_our_codecs_are_answered() {
    let (mut peer, _events) = peer().await;
    let answer = peer.answer_offer(&offer(1, &["sendrecv"])).await.unwrap();
    assert!(answer.contains("VP8") && answer.contains("apt=96") && !answer.contains("EXOTIC"));
    peer.close().await;
}

#[tokio::test]
async fn malformed_descriptions_are_errors() {
    let (mut peer, _events) = peer().await;
    assert!(peer.answer_offer("nonsense").await.is_err());
    assert!(peer.take_answer("v=0").await.is_err());
    for candidate in ["{", r#"{"candidate":""}"#, r#"{"candidate":"candidate:nonsense"}"#] {
        peer.add_candidate(candidate).await;
    }
    peer.close().await;
}

#[tokio::test]
async fn ice_restart_renews_the_credentials() {
    let (peer, _events) = peer().await;
    peer.open_channel("_reliable", true).await.unwrap();
    let first = peer.create_offer().await.unwrap();
    peer.restart_ice().await.unwrap();
    let second = peer.create_offer().await.unwrap();
    let ufrag = |sdp: &str| sdp.lines().find(|line| line.starts_with("a=ice-ufrag")).unwrap().to_owned();
    assert_ne!(ufrag(first.sdp()), ufrag(second.sdp()));
    peer.close().await;
}

#[test]
fn candidates_pair_by_protocol_and_family() {
    let candidate = |text: &str| Noted::of(text).unwrap();
    let ours = candidate("candidate:1 1 udp 2130706431 10.0.0.1 7882 typ host generation 0");
    assert_eq!(ours.to_string(), "10.0.0.1:7882/udp host");
    assert!(ours.pairs_with(&candidate("1 1 UDP 1 192.0.2.1 1 typ srflx")));
    assert!(!ours.pairs_with(&candidate("1 1 tcp 1 192.0.2.1 1 typ host tcptype passive")));
    assert!(!ours.pairs_with(&candidate("1 1 udp 1 2001:db8::1 1 typ host")));
    for malformed in ["nonsense", "1 1 udp 1 name.local 7 typ host", "1 1 udp 1 10.0.0.1 99999 typ host"] {
        assert_eq!(Noted::of(malformed), None);
    }
}

/// Connects `ours`, which offers, with `theirs`.
async fn connect(
    (ours, our_events): &mut (Peer, mpsc::Receiver<((), PeerEvent)>),
    (theirs, their_events): &mut (Peer, mpsc::Receiver<((), PeerEvent)>),
) {
    let offer = ours.offer().await.unwrap();
    let answer = theirs.answer_offer(&offer).await.unwrap();
    ours.take_answer(&answer).await.unwrap();
    let (mut our_up, mut their_up) = (false, false);
    while !(our_up && their_up) {
        tokio::select! {
            event = our_events.recv() => match event.unwrap().1 {
                PeerEvent::Candidate(json) => theirs.add_candidate(&json).await,
                PeerEvent::Up => our_up = true,
                _ => {}
            },
            event = their_events.recv() => match event.unwrap().1 {
                PeerEvent::Candidate(json) => ours.add_candidate(&json).await,
                PeerEvent::Up => their_up = true,
                _ => {}
            },
        }
    }
}

#[tokio::test]
async fn media_and_reports_travel_between_two_peers() {
    let (mut ours, mut theirs) = (peer().await, peer().await);
    let track = ours.0.add_track(Codec::Vp8, "cam", 1, (640, 360)).await.unwrap();
    connect(&mut ours, &mut theirs).await;
    track.negotiated().await.unwrap();
    let sending = async {
        for sequence in 0.. {
            let payload = bytes::Bytes::from_static(&[0x90, 0x80, 0x80, 1, 0x10, 2, 3]);
            let packet = OutgoingPacket { sequence, marker: true, payload };
            let frame = WireFrame {
                payload: vec![1].into(),
                rtp_timestamp: u32::from(sequence) * 900,
                layer: 0,
                key_frame: true,
                audio_level: None,
            };
            track.write(&frame, sequence, &mut vec![packet]).await.unwrap();
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let receiving = async {
        let incoming = loop {
            if let PeerEvent::Track(track) = theirs.1.recv().await.unwrap().1 {
                break track;
            }
        };
        assert_eq!(incoming.id().await, "cam");
        let mut packets = 0;
        loop {
            match incoming.next().await.unwrap() {
                Arrival::Packet { ssrc, .. } => {
                    packets += 1;
                    assert_eq!(incoming.codec(ssrc).await, Some(Codec::Vp8));
                }
                Arrival::SenderReport { ssrc, .. } => {
                    assert!(packets > 10);
                    incoming.request_key_frame(ssrc).await;
                    return;
                }
            }
        }
    };
    let asked = async { track.next_report().await };
    tokio::time::timeout(Duration::from_secs(20), async {
        tokio::select! {
            () = sending => {}
            (report, ()) = async { tokio::join!(asked, receiving) } => {
                assert_eq!(report, Some(Report::KeyFrameWanted { layer: 0 }));
            }
        }
    })
    .await
    .unwrap();
    assert!(ours.0.uplink().is_some());
    let pairs = ours.0.pairs(16);
    assert!(pairs.iter().any(|pair| pair.matches("127.0.0.1:").count() == 2), "{pairs:?}");
    ours.0.close().await;
    theirs.0.close().await;
}

#[tokio::test]
async fn data_channels_and_ice_restart_work_between_two_peers() {
    let (mut ours, mut theirs) = (peer().await, peer().await);
    let channel = ours.0.open_channel("_reliable", true).await.unwrap();
    connect(&mut ours, &mut theirs).await;
    let opened = loop {
        if let PeerEvent::Channel(channel) = theirs.1.recv().await.unwrap().1 {
            break channel;
        }
    };
    assert_eq!(opened.label().await, "_reliable");
    assert!(matches!(channel.next().await, Some(ChannelEvent::Open)));
    for round in 1..3_u8 {
        channel.send(&[round; 14_000]).await.unwrap();
        let message = loop {
            if let Some(ChannelEvent::Message(message)) = opened.next().await {
                break message;
            }
        };
        assert_eq!(*message, [round; 14_000]);
        ours.0.restart_ice().await.unwrap();
        connect(&mut ours, &mut theirs).await;
    }
    ours.0.close().await;
    theirs.0.close().await;
}

/// Two peers, of which the first offers data and is the DTLS server, and the second is the client. Their datagrams pass
/// through `lost`, which is asked about each and whether it comes from the server.
async fn connects_despite(mut lost: impl FnMut(bool, &[u8]) -> bool) {
    let ((mut server, mut server_events), (mut client, mut client_events)) = (peer().await, peer().await);
    let _channel = server.open_channel("data", true).await.unwrap();
    let bare = |sdp: String| -> String {
        sdp.split_inclusive('\n').filter(|line| !line.starts_with("a=candidate")).collect()
    };
    let answer = client.answer_offer(&bare(server.offer().await.unwrap())).await.unwrap();
    server.take_answer(&bare(answer)).await.unwrap();

    // One socket towards each.
    let relay = async || tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let (to_server, to_client) = (relay().await, relay().await);
    let (mut servers, mut clients, mut up) = (None, None, (false, false));
    let (mut buffer, mut other_buffer) = ([0; 2048], [0; 2048]);
    let connecting = async {
        while up != (true, true) {
            tokio::select! {
                event = server_events.recv() => match event.unwrap().1 {
                    PeerEvent::Candidate(candidate) => {
                        if let Some(candidate) = through(&candidate, &to_client, &mut servers) {
                            client.add_candidate(&candidate).await;
                        }
                    }
                    PeerEvent::Up => up.0 = true,
                    _ => {}
                },
                event = client_events.recv() => match event.unwrap().1 {
                    PeerEvent::Candidate(candidate) => {
                        if let Some(candidate) = through(&candidate, &to_server, &mut clients) {
                            server.add_candidate(&candidate).await;
                        }
                    }
                    PeerEvent::Up => up.1 = true,
                    _ => {}
                },
                received = to_server.recv(&mut buffer) => {
                    let datagram = &buffer[..received.unwrap()];
                    if let Some(client) = clients.filter(|_| !lost(true, datagram)) {
                        to_client.send_to(datagram, client).await.unwrap();
                    }
                }
                received = to_client.recv(&mut other_buffer) => {
                    let datagram = &other_buffer[..received.unwrap()];
                    if let Some(server) = servers.filter(|_| !lost(false, datagram)) {
                        to_server.send_to(datagram, server).await.unwrap();
                    }
                }
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(9), connecting).await.expect("the handshake does not end");
    server.close().await;
    client.close().await;
}

/// A UDP candidate with the relay's address in place of its own, which is noted.
fn through(candidate: &str, relay: &tokio::net::UdpSocket, own: &mut Option<SocketAddr>) -> Option<String> {
    let mut candidate: RTCIceCandidateInit = serde_json::from_str(candidate).unwrap();
    let noted = Noted::of(&candidate.candidate).filter(|noted| !noted.tcp)?;
    let port = relay.local_addr().unwrap().port();
    candidate.candidate =
        candidate.candidate.replace(&format!(" {} ", noted.address.port()), &format!(" {port} "));
    *own = Some(noted.address);
    Some(serde_json::to_string(&candidate).unwrap())
}

/// Whether a datagram begins with a handshake message of this kind, in plain text.
fn begins_with(datagram: &[u8], kind: u8) -> bool {
    datagram.first() == Some(&22) && datagram.get(13) == Some(&kind)
}

const CLIENT_HELLO: u8 = 1;
const SERVER_HELLO: u8 = 2;
const CERTIFICATE: u8 = 11;

#[tokio::test]
async fn lost_flight_of_the_dtls_client_is_sent_again() {
    let (mut losses, mut hellos) = (0, 0);
    // The client's flight is lost until the server has repeated its own.
    connects_despite(|from_server, datagram| {
        hellos += u32::from(from_server && begins_with(datagram, SERVER_HELLO));
        let lost = !from_server && begins_with(datagram, CERTIFICATE) && hellos < 2;
        losses += u32::from(lost);
        lost
    })
    .await;
    assert!(losses > 0 && hellos > 1);
}

#[tokio::test]
async fn lost_flight_of_the_dtls_server_is_sent_again() {
    let (mut losses, mut hellos) = (0, 0);
    // The server's flight is lost until the client has repeated its second ClientHello.
    connects_despite(|from_server, datagram| {
        let second =
            !from_server && begins_with(datagram, CLIENT_HELLO) && datagram.get(17..19) == Some(&[0, 1]);
        hellos += u32::from(second);
        let lost = from_server && begins_with(datagram, SERVER_HELLO) && hellos < 2;
        losses += u32::from(lost);
        lost
    })
    .await;
    assert!(losses > 0 && hellos > 1);
}
