//! What frame encryption costs beside the bare cipher: sealing and opening frames of the usual sizes, each next
//! to AES-128-GCM alone on as many bytes.
//!
//! ```sh
//! cargo bench --package antiphon-call-sdk --bench frames --ignore-rust-version
//! ```

#![allow(clippy::unwrap_used, reason = "a benchmark fails by panicking")]
#![allow(clippy::disallowed_methods, reason = "this is the shell of a benchmark: it owns the clock")]

use std::{
    hint::black_box,
    time::{Duration, Instant},
};

use antiphon_call_sdk::{
    frame_crypto::{FrameDecryptor, FrameEncryptor, KeyRing},
    key::{KeyIndex, MediaKey},
    media::Codec,
};
use aws_lc_rs::aead::{AES_128_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use criterion::{Criterion, Throughput};

const INDEX: KeyIndex = KeyIndex(0);

/// Frames that are made before the clock starts: few enough to stay in the cache.
const BATCH: usize = 64;

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    for (name, codec, size) in [
        ("opus 80 B", Codec::Opus, 80),
        ("vp8 1200 B", Codec::Vp8, 1200),
        ("vp8 20 KB", Codec::Vp8, 20_000),
        ("h264 20 KB", Codec::H264, 20_000),
    ] {
        seal(&mut criterion, name, codec, size);
        open(&mut criterion, name, codec, size);
    }
    key_setup(&mut criterion);
    criterion.final_summary();
}

fn seal(criterion: &mut Criterion, name: &str, codec: Codec, size: usize) {
    let mut group = criterion.benchmark_group(format!("seal {name}"));
    group.throughput(Throughput::Bytes(size as u64));
    let frame = frame(codec, size);

    let (cipher, mut nonces, mut buffer) = (cipher(), Nonces(0), frame.clone());
    group.bench_function("cipher", |bencher| {
        bencher.iter(|| {
            let tag = cipher.seal_in_place_separate_tag(nonces.next(), Aad::from([frame[0]]), &mut buffer);
            black_box(tag.unwrap().as_ref());
        });
    });

    let (mut encryptor, mut wire) = (FrameEncryptor::new(codec, ring()).unwrap(), Vec::new());
    group.bench_function("frame", |bencher| {
        bencher.iter(|| {
            encryptor.seal(INDEX, &frame, &mut wire).unwrap();
            black_box(&wire);
        });
    });
    group.finish();
}

/// A frame opens once, so each is sealed anew, a batch at a time and off the clock.
fn open(criterion: &mut Criterion, name: &str, codec: Codec, size: usize) {
    let mut group = criterion.benchmark_group(format!("open {name}"));
    group.throughput(Throughput::Bytes(size as u64));
    let frame = frame(codec, size);

    let (cipher, mut nonces) = (cipher(), Nonces(0));
    let mut sealed = vec![Vec::new(); BATCH];
    group.bench_function("cipher", |bencher| {
        bencher.iter_custom(|iterations| {
            in_batches(iterations, &mut sealed, |sealed, clock| {
                let first = nonces.0;
                for buffer in &mut *sealed {
                    buffer.clone_from(&frame);
                    cipher.seal_in_place_append_tag(nonces.next(), Aad::from([frame[0]]), buffer).unwrap();
                }
                let mut again = Nonces(first);
                let start = Instant::now();
                for buffer in sealed {
                    black_box(cipher.open_in_place(again.next(), Aad::from([frame[0]]), buffer).unwrap());
                }
                *clock += start.elapsed();
            })
        });
    });

    let ring = ring();
    let mut encryptor = FrameEncryptor::new(codec, ring.clone()).unwrap();
    let (mut decryptor, mut plain) = (FrameDecryptor::new(codec, ring).unwrap(), Vec::new());
    group.bench_function("frame", |bencher| {
        bencher.iter_custom(|iterations| {
            in_batches(iterations, &mut sealed, |sealed, clock| {
                for wire in &mut *sealed {
                    encryptor.seal(INDEX, &frame, wire).unwrap();
                }
                let start = Instant::now();
                for wire in sealed {
                    black_box(decryptor.open(start, wire, None, &mut plain).unwrap());
                }
                *clock += start.elapsed();
            })
        });
    });
    group.finish();
}

fn in_batches(
    iterations: u64,
    buffers: &mut [Vec<u8>],
    mut batch: impl FnMut(&mut [Vec<u8>], &mut Duration),
) -> Duration {
    let mut clock = Duration::ZERO;
    let mut left = usize::try_from(iterations).unwrap();
    while left > 0 {
        let size = left.min(buffers.len());
        batch(&mut buffers[..size], &mut clock);
        left -= size;
    }
    clock
}

fn key_setup(criterion: &mut Criterion) {
    let (ring, mut material) = (KeyRing::new(), 0u64);
    criterion.bench_function("set a media key", |bencher| {
        bencher.iter(|| {
            material += 1;
            let key = MediaKey::new([material.to_le_bytes(), [7; 8]].concat()).unwrap();
            ring.set(INDEX, &key).unwrap();
        });
    });
}

fn ring() -> KeyRing {
    let ring = KeyRing::new();
    ring.set(INDEX, &MediaKey::new(vec![7; 32]).unwrap()).unwrap();
    ring
}

fn cipher() -> LessSafeKey {
    LessSafeKey::new(UnboundKey::new(&AES_128_GCM, &[7; 16]).unwrap())
}

struct Nonces(u64);

impl Nonces {
    fn next(&mut self) -> Nonce {
        self.0 += 1;
        let mut nonce = [0; 12];
        nonce[..8].copy_from_slice(&self.0.to_be_bytes());
        Nonce::assume_unique_for_key(nonce)
    }
}

fn frame(codec: Codec, size: usize) -> Vec<u8> {
    let header: &[u8] = match codec {
        Codec::Opus => &[0x78],
        Codec::H264 => b"\0\0\0\x01\x67\x42\xc0\x1f\0\0\0\x01\x68\x87\xcb\x83\0\0\0\x01\x65\x88",
        _ => b"\x31\x05\0",
    };
    let body = (0..size - header.len()).map(|n| (n * 31 % 251) as u8 + 4);
    header.iter().copied().chain(body).collect()
}
