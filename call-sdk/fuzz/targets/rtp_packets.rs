//! RTP packets from an SFU: frames hold no more than the packets did, and a frame that was cut comes back whole.
#![no_main]

use std::time::{Duration, Instant};

use antiphon_call_sdk::{
    Codec,
    transport::rtc::{FrameLayer, IncomingPacket, Packetiser, Reassembler},
};
use bytes::Bytes;
use libfuzzer_sys::fuzz_target;

const CODECS: [Codec; 6] = [Codec::Opus, Codec::Vp8, Codec::Vp9, Codec::H264, Codec::H265, Codec::Av1];
/// Longest growth of a packet's bytes in a frame: start codes and size fields, for each piece of at least one byte.
const GROWTH: usize = 16;

fuzz_target!(|data: &[u8]| {
    let [codec, rest @ ..] = data else { return };
    let codec = CODECS[usize::from(*codec) % CODECS.len()];
    hostile(codec, rest);
    if matches!(codec, Codec::Opus | Codec::Vp8) && !rest.is_empty() {
        whole(codec, rest);
    }
});

/// Each packet: sequence step, time step, marker and length, then so many bytes.
fn hostile(codec: Codec, mut data: &[u8]) {
    let mut now = Instant::now();
    let mut reassembler = Reassembler::new(codec);
    let (mut sequence, mut timestamp, mut bytes) = (0_u16, 0_u32, 0);
    let mut frame = Vec::new();
    while let [step, time, flags, length, rest @ ..] = data {
        let (payload, rest) = rest.split_at(usize::from(*length).min(rest.len()));
        data = rest;
        sequence = sequence.wrapping_add(u16::from(*step)).wrapping_sub(u16::from(*flags >> 4));
        timestamp = timestamp.wrapping_add(u32::from(*time) * 100);
        now += Duration::from_millis(u64::from(*time));
        bytes += payload.len() + GROWTH;
        let payload = Bytes::copy_from_slice(payload);
        reassembler.push(now, IncomingPacket { sequence, timestamp, marker: flags & 1 == 1, payload });
        while reassembler.next_frame(now, &mut frame).is_some() {
            assert!(frame.len() <= bytes * GROWTH, "{} bytes out of {bytes}", frame.len());
        }
        let _ = (reassembler.deadline(), reassembler.take_loss());
    }
}

fn whole(codec: Codec, frame: &[u8]) {
    let now = Instant::now();
    let mut packetiser = Packetiser::new(codec, 65_530, 0);
    let mut packets = Vec::new();
    if packetiser.packetise(frame, FrameLayer::single(true), &mut packets).is_err() {
        return;
    }
    let mut reassembler = Reassembler::new(codec);
    for packet in packets {
        let incoming = IncomingPacket {
            sequence: packet.sequence,
            timestamp: 7,
            marker: packet.marker,
            payload: packet.payload,
        };
        reassembler.push(now, incoming);
    }
    let mut out = Vec::new();
    let assembled = reassembler.next_frame(now, &mut out);
    assert!(assembled.is_some() && out == frame, "{codec:?}: {} bytes became {}", frame.len(), out.len());
}
