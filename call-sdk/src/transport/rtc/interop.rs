//! The payload formats against another implementation of them: that of the WebRTC engine, in both directions.

use bytes::Bytes;
use rtc::rtp::{
    codec::{
        av1::{Av1Depacketizer, Av1Payloader},
        h264::{H264Packet, H264Payloader},
        h265::HevcPayloader,
        opus::{OpusPacket, OpusPayloader},
        vp8::{Vp8Packet, Vp8Payloader},
        vp9::{Vp9Packet, Vp9Payloader},
    },
    packetizer::{Depacketizer, Payloader},
};

use super::{
    IncomingPacket,
    tests::{CODECS, Wire, plain, receive, send},
};
use crate::media::Codec;

/// Key and delta frames of one packet and of several.
fn frames(codec: Codec) -> Vec<Wire> {
    let sizes = if codec.is_audio() { [80, 3, 1, 900] } else { [3000, 2, 20_000, 1200] };
    let frame = |(n, size): (usize, usize)| Wire {
        rtp_timestamp: n as u32 * 3000,
        frame: plain(codec, n % 2 == 0, size, n as u8),
    };
    sizes.into_iter().enumerate().map(frame).collect()
}

#[test]
fn packets_of_the_engine_are_put_together() {
    for codec in CODECS {
        let mut payloader: Box<dyn Payloader> = match codec {
            Codec::Opus => Box::new(OpusPayloader),
            Codec::Vp8 => {
                let mut payloader = Vp8Payloader::default();
                payloader.enable_picture_id = true;
                Box::new(payloader)
            }
            Codec::Vp9 => Box::new(Vp9Payloader::default()),
            Codec::H264 => Box::new(H264Payloader::default()),
            Codec::H265 => Box::new(HevcPayloader),
            Codec::Av1 => Box::new(Av1Payloader::default()),
        };
        let frames = frames(codec);
        let mut packets = Vec::new();
        for Wire { rtp_timestamp, frame } in &frames {
            let payloads = payloader.payload(1200, &Bytes::from(frame.clone())).unwrap();
            let count = payloads.len();
            packets.extend(
                payloads.into_iter().zip(1..).map(|(payload, n)| (*rtp_timestamp, n == count, payload)),
            );
        }
        let packets = packets.into_iter().zip(0..).map(|((timestamp, marker, payload), sequence)| {
            IncomingPacket { sequence, timestamp, marker, payload }
        });
        let (received, lost) = receive(codec, packets.collect());
        assert!(received == frames && !lost, "{codec:?}");
    }
}

#[test]
fn our_packets_are_put_together_by_the_engine() {
    for codec in CODECS {
        let mut depacketizer: Box<dyn Depacketizer> = match codec {
            Codec::Opus => Box::new(OpusPacket),
            Codec::Vp8 => Box::new(Vp8Packet::default()),
            Codec::Vp9 => Box::new(Vp9Packet::default()),
            Codec::H264 => Box::new(H264Packet::default()),
            // The engine divides H.265 into units but does not join them.
            Codec::H265 => continue,
            Codec::Av1 => Box::new(Av1Depacketizer::new()),
        };
        for wire in frames(codec) {
            let packets = send(codec, std::slice::from_ref(&wire));
            let parts = packets.iter().map(|packet| depacketizer.depacketize(&packet.payload).unwrap());
            assert!(parts.collect::<Vec<_>>().concat() == wire.frame, "{codec:?}");
        }
    }
}
