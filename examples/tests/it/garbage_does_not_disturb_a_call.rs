//! Two participants talk through the focus while somebody throws garbage at every port that it has.

use std::{sync::Arc, time::Duration};

use antiphon_call_sdk::{
    media::TrackSpec,
    transport::{
        MediaTransport as _, TransportEvent, WireFrame,
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_call_goes_on() {
    let _turn = turn().await;
    let focus = Focus::start(Config::dev_ephemeral()).await.unwrap();
    let (alice, _events) = join(&focus, "alice").await;
    let (_bob, mut heard) = join(&focus, "bob").await;
    let track = alice.publish(TrackSpec::microphone(), true).await.unwrap();
    let sending = tokio::spawn(async move {
        let frames = SyntheticOpus::new(1, 80);
        let mut pace = tokio::time::interval(Duration::from_millis(20));
        for number in 0u32.. {
            pace.tick().await;
            let payload = frames.frame(u64::from(number));
            if alice
                .send(track, WireFrame { payload, rtp_timestamp: number.wrapping_mul(960) })
                .await
                .is_err()
            {
                return;
            }
        }
    });

    let udp = focus.udp_addr().unwrap();
    let http = focus.http_addr();
    let throwing = tokio::spawn(async move {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let mut pace = tokio::time::interval(Duration::from_millis(2));
        for round in 0u16.. {
            pace.tick().await;
            // Every kind of first byte: STUN, DTLS, RTP and none of them; every length up to a full packet.
            let mut packet = vec![round.to_be_bytes()[1]; usize::from(round) * 7 % 1400 + 1];
            if round % 3 == 0 {
                packet.splice(0..1, [0, 1, 0, 8, 0x21, 0x12, 0xa4, 0x42]);
            }
            socket.send_to(&packet, udp).await.unwrap();
            if round % 50 == 0 {
                let mut stream = TcpStream::connect(http).await.unwrap();
                // Half a WebSocket upgrade, then noise; whether it is still read is the focus's business.
                let _ = stream.write_all(b"GET /rtc?access_token=\xff\xfe HTTP/1.1\r\n\x00\x01\x02").await;
            }
        }
    });

    let hearing = async {
        let (mut next, mut received) = (None, 0);
        while received < FRAMES {
            let Some(event) = heard.recv().await else { panic!("Bob's events ended") };
            if let TransportEvent::Frame { frame, .. } = event {
                let record = parse(&frame.payload).expect("frames arrive as they were sent");
                assert!(next.is_none_or(|n| record.number >= n), "frames arrive in order");
                next = Some(record.number + 1);
                received += 1;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(40), hearing).await.expect("the call goes on");
    throwing.abort();
    sending.abort();
    focus.shutdown().await;
}
