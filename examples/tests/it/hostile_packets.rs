//! Two participants talk through the focus while garbage arrives at every port that it has.

use std::{sync::Arc, time::Duration};

use antiphon_call_sdk::{
    LocalTrackId, TrackSpec,
    transport::{
        FrameReceiver, MediaTransport as _, ReceivedFrame, TransportEvent, WireFrame,
        livekit::{ConnectOptions, LiveKitTransport},
    },
};
use antiphon_focus::{Config, Focus, FocusHandle};
use antiphon_testkit::{
    media::{SyntheticOpus, parse},
    peers::livekit::access_token,
};
use tokio::{
    io::AsyncWriteExt as _,
    net::{TcpStream, UdpSocket},
    sync::mpsc,
};

use crate::support::turn;

const FRAMES: u64 = 150;

async fn join(
    focus: &FocusHandle,
    identity: &str,
) -> (Arc<LiveKitTransport>, mpsc::Receiver<TransportEvent>) {
    let token = access_token("devkey", "secret", "garbage", identity);
    LiveKitTransport::connect(ConnectOptions::new(focus.ws_url(), token)).await.unwrap()
}

/// Passes what arrives on.
#[derive(Debug)]
struct Ear(mpsc::Sender<Vec<u8>>);

impl FrameReceiver for Ear {
    fn receive(&self, frame: ReceivedFrame<'_>) {
        let _ = self.0.try_send(frame.payload.to_vec());
    }

    fn sender_report(&self, _rtp_timestamp: u32, _ntp: u64) {}

    fn injected_trailer(&self, _trailer: &[u8]) {}
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_on_every_port_does_not_disturb_a_call() {
    let _turn = turn().await;
    let focus = Focus::start(Config::dev_ephemeral()).await.unwrap();
    let (alice, _events) = join(&focus, "alice").await;
    let (bob, mut events) = join(&focus, "bob").await;
    let outlet = alice.publish(LocalTrackId(0), TrackSpec::microphone(), true).await.unwrap();
    let sending = tokio::spawn(async move {
        let frames = SyntheticOpus::new(1, 80);
        let mut pace = tokio::time::interval(Duration::from_millis(20));
        for number in 0u32.. {
            pace.tick().await;
            let payload = frames.frame(u64::from(number)).into();
            let rtp_timestamp = number.wrapping_mul(960);
            outlet.send(&WireFrame { payload, rtp_timestamp, layer: 0, key_frame: true, audio_level: None });
        }
    });

    let udp = focus.udp_addr().unwrap();
    let http = focus.http_addr();
    let throwing = tokio::spawn(async move {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let mut pace = tokio::time::interval(Duration::from_millis(2));
        for round in 0u16.. {
            pace.tick().await;
            // Every kind of first byte: STUN, DTLS, RTP and others; every length up to a full packet.
            let mut packet = vec![round.to_be_bytes()[1]; usize::from(round) * 7 % 1400 + 1];
            if round % 3 == 0 {
                packet.splice(0..1, [0, 1, 0, 8, 0x21, 0x12, 0xa4, 0x42]);
            }
            socket.send_to(&packet, udp).await.unwrap();
            if round % 50 == 0 {
                let mut stream = TcpStream::connect(http).await.unwrap();
                // Half a WebSocket upgrade, then noise; the focus may stop reading.
                let _ = stream.write_all(b"GET /rtc?access_token=\xff\xfe HTTP/1.1\r\n\x00\x01\x02").await;
            }
        }
    });

    let hearing = async {
        let (ear, mut frames) = mpsc::channel(256);
        let sid = loop {
            if let TransportEvent::TrackUpdated { track, .. } =
                events.recv().await.expect("Bob's connection lasts")
            {
                break track.sid;
            }
        };
        bob.attach(&sid, Some(Arc::new(Ear(ear))));
        let (mut next, mut received) = (None, 0);
        while received < FRAMES {
            tokio::select! {
                event = events.recv() => assert!(event.is_some(), "Bob's connection ended"),
                frame = frames.recv() => {
                    let record = parse(&frame.unwrap()).expect("frames arrive as they were sent");
                    assert!(next.is_none_or(|n| record.number >= n), "frames arrive in order");
                    next = Some(record.number + 1);
                    received += 1;
                }
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(40), hearing).await.expect("the call goes on");
    throwing.abort();
    sending.abort();
    focus.shutdown().await;
}
