//! What a frame costs between RTP and the application, in both directions, next to copying its bytes once.
//!
//! ```sh
//! cargo bench --package antiphon-call-sdk --bench rtp --ignore-rust-version
//! ```

#![allow(clippy::unwrap_used, reason = "a benchmark fails by panicking")]
#![allow(clippy::disallowed_methods, reason = "this is the shell of a benchmark: it owns the clock")]

use std::{
    hint::black_box,
    time::{Duration, Instant},
};

use antiphon_call_sdk::{
    Codec,
    transport::rtc::{FrameLayer, IncomingPacket, Packetiser, Reassembler},
};

/// Frames between two looks at the clock.
const BATCH: u32 = 200;

fn main() {
    // `cargo test` runs benchmarks too, to see that they work.
    let rounds = if std::env::args().any(|argument| argument == "--bench") { 500 } else { 1 };
    println!("per frame, best of {rounds} rounds:");
    for (name, codec, size) in [
        ("opus 80 B", Codec::Opus, 80),
        ("vp8 20 kB", Codec::Vp8, 20_000),
        ("h264 20 kB", Codec::H264, 20_000),
    ] {
        let frame = frame(codec, size);
        let copy = copy(&frame, rounds);
        let (send, receive) = cross(codec, &frame, rounds);
        println!(
            "{name:>10}: copy {copy:.1} ns, packetise {send:.1} ns ({:.1} copies), \
             assemble {receive:.1} ns ({:.1} copies)",
            send / copy,
            receive / copy,
        );
    }
}

/// The cost of copying `frame` into a buffer that is reused, in nanoseconds.
fn copy(frame: &[u8], rounds: usize) -> f64 {
    let mut target = Vec::new();
    let round = |_| {
        let start = Instant::now();
        for _ in 0..BATCH {
            target.clear();
            target.extend_from_slice(black_box(frame));
            black_box(&target);
        }
        start.elapsed()
    };
    per_frame((0..rounds).map(round).min().unwrap())
}

/// The costs of `frame` on its way out and in, in nanoseconds.
fn cross(codec: Codec, frame: &[u8], rounds: usize) -> (f64, f64) {
    let (mut out, mut back) = (Packetiser::new(codec, 0, 0), Reassembler::new(codec));
    let (mut packets, mut sent, mut received) = (Vec::new(), Vec::new(), Vec::new());
    let (mut send, mut receive) = (Duration::MAX, Duration::MAX);
    let mut timestamp = 0;
    for _ in 0..rounds {
        let mut elapsed = Duration::ZERO;
        for _ in 0..BATCH {
            let start = Instant::now();
            out.packetise(black_box(frame), FrameLayer::single(false), &mut packets).unwrap();
            elapsed += start.elapsed();
            timestamp += 3000;
            sent.extend(packets.drain(..).map(|packet| IncomingPacket {
                sequence: packet.sequence,
                timestamp,
                marker: packet.marker,
                // Every packet from a socket has a buffer of its own.
                payload: packet.payload.to_vec().into(),
            }));
        }
        send = send.min(elapsed);

        let start = Instant::now();
        let mut bytes = 0;
        for packet in sent.drain(..) {
            back.push(start, packet);
            while back.next_frame(start, &mut received).is_some() {
                bytes += black_box(&received).len();
            }
        }
        receive = receive.min(start.elapsed());
        assert_eq!(bytes, frame.len() * BATCH as usize);
    }
    (per_frame(send), per_frame(receive))
}

fn per_frame(batch: Duration) -> f64 {
    batch.as_secs_f64() * 1e9 / f64::from(BATCH)
}

/// A frame without zeros, so that H.264 has one unit behind its parameter sets.
fn frame(codec: Codec, size: usize) -> Vec<u8> {
    let header: &[u8] = match codec {
        Codec::H264 => b"\0\0\0\x01\x67\x42\xc0\x1f\0\0\0\x01\x68\x87\xcb\x83\0\0\0\x01\x65\x88",
        Codec::Vp8 => b"\x31\x05\0",
        _ => b"\x78",
    };
    let body = (0..size - header.len()).map(|n| (n * 31 % 251) as u8 | 4);
    header.iter().copied().chain(body).collect()
}
