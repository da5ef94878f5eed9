//! Cost of frame encryption compared with the bare cipher: frames of usual sizes are sealed and opened, and the same
//! AES-128-GCM library seals and opens the same bytes under the same key, from and to the same buffers.
//!
//! ```sh
//! cargo bench --package antiphon-call-sdk --bench frames --ignore-rust-version
//! ```
//!
//! The two take turns, a batch of 64 frames at a time, so that other load on the machine affects both. Printed are
//! medians per frame, and the cipher's time divided by the frame's: 1.00 is a frame encryption that costs nothing.
//! The cipher's batches have an advantage that frames cannot have: without locks between two messages, the
//! processor starts on the next one before it has finished the last.

#![allow(clippy::unwrap_used, reason = "a benchmark fails by panicking")]
#![allow(clippy::disallowed_methods, reason = "this is the shell of a benchmark: it owns the clock")]

use std::{
    hint::black_box,
    time::{Duration, Instant},
};

use antiphon_call_sdk::{
    Codec, KeyIndex, MediaKey,
    frame_crypto::{FrameDecryptor, FrameEncryptor, KeyRing},
};

const INDEX: KeyIndex = KeyIndex(0);
const MATERIAL: [u8; 32] = [7; 32];
/// Few enough small frames to stay in the cache.
const BATCH: usize = 64;
const TAG_LEN: usize = 16;
const IV_LEN: usize = 12;

fn main() {
    println!("{:<14}{:>8}{:>12}{:>12}{:>8}", "", "bytes", "cipher", "frame", "ratio");
    for (codec, size) in [(Codec::Opus, 80), (Codec::Vp8, 1200), (Codec::Vp8, 20_000), (Codec::H264, 20_000)]
    {
        let measured = Bench::new(codec, size).run(if size > 10_000 { 2000 } else { 10_000 });
        for (name, [cipher, frame]) in [("seal", measured.seal), ("open", measured.open)] {
            let name = format!("{name} {codec:?}");
            let ratio = cipher / frame;
            println!("{name:<14}{size:>8}{cipher:>9.0} ns{frame:>9.0} ns{ratio:>8.2}");
        }
    }
    set_a_key();
}

struct Bench {
    cipher: Cipher,
    encryptor: FrameEncryptor,
    decryptor: FrameDecryptor,
    frame: Vec<u8>,
    /// Clear bytes.
    clear: usize,
    wires: Vec<Vec<u8>>,
    raws: Vec<Vec<u8>>,
    plain: Vec<u8>,
    nonce: u64,
}

/// Nanoseconds per frame: of the cipher, and of frame encryption.
struct Measured {
    seal: [f64; 2],
    open: [f64; 2],
}

impl Bench {
    fn new(codec: Codec, size: usize) -> Self {
        let ring = KeyRing::new();
        ring.set(INDEX, &MediaKey::new(MATERIAL.to_vec()).unwrap()).unwrap();
        let (frame, clear) = frame(codec, size);
        Self {
            cipher: Cipher::new(&aes_key()),
            encryptor: FrameEncryptor::new(codec, ring.clone()).unwrap(),
            decryptor: FrameDecryptor::new(codec, ring).unwrap(),
            wires: vec![Vec::new(); BATCH],
            raws: vec![vec![0; size + TAG_LEN + IV_LEN]; BATCH],
            plain: vec![0; size],
            frame,
            clear,
            nonce: 0,
        }
    }

    fn run(mut self, rounds: usize) -> Measured {
        let mut times: [Vec<Duration>; 4] = Default::default();
        for round in 0..rounds {
            // A frame opens once, so every round seals new ones.
            let seal_frames = timed(|| self.seal_frames());
            let seal_raw = timed(|| self.seal_raw());
            let (open_raw, open_frames);
            if round % 2 == 0 {
                open_raw = timed(|| self.open_raw());
                open_frames = timed(|| self.open_frames());
            } else {
                open_frames = timed(|| self.open_frames());
                open_raw = timed(|| self.open_raw());
            }
            for (times, time) in times.iter_mut().zip([seal_raw, seal_frames, open_raw, open_frames]) {
                times.push(time);
            }
        }
        let [seal_raw, seal_frames, open_raw, open_frames] = times.map(median_per_frame);
        Measured { seal: [seal_raw, seal_frames], open: [open_raw, open_frames] }
    }

    fn seal_frames(&mut self) {
        for wire in &mut self.wires {
            self.encryptor.seal(INDEX, &self.frame, wire).unwrap();
            black_box(&wire);
        }
    }

    fn open_frames(&mut self) {
        let now = Instant::now();
        for wire in &self.wires {
            self.decryptor.open(now, wire, None, &mut self.plain).unwrap();
            black_box(&self.plain);
        }
    }

    fn seal_raw(&mut self) {
        let (header, payload) = self.frame.split_at(self.clear);
        for raw in &mut self.raws {
            let mut iv = [1; IV_LEN];
            iv[4..].copy_from_slice(&self.nonce.to_be_bytes());
            self.nonce += 1;
            let (ciphertext, overhead) = raw[self.clear..].split_at_mut(payload.len());
            let (tag, iv_place) = overhead.split_first_chunk_mut().unwrap();
            self.cipher.seal(iv, header, payload, ciphertext, tag);
            iv_place.copy_from_slice(&iv);
            black_box(&raw);
        }
    }

    fn open_raw(&mut self) {
        for raw in &self.raws {
            let (header, tail) = raw.split_at(self.clear);
            let (ciphertext, overhead) = tail.split_at(tail.len() - TAG_LEN - IV_LEN);
            let (tag, iv) = overhead.split_first_chunk().unwrap();
            let plain = &mut self.plain[self.clear..];
            self.cipher.open(iv.try_into().unwrap(), &self.frame[..header.len()], ciphertext, tag, plain);
            black_box(&self.plain);
        }
    }
}

fn timed(batch: impl FnOnce()) -> Duration {
    let start = Instant::now();
    batch();
    start.elapsed()
}

fn median_per_frame(mut times: Vec<Duration>) -> f64 {
    times.sort_unstable();
    times[times.len() / 2].as_nanos() as f64 / BATCH as f64
}

fn set_a_key() {
    let ring = KeyRing::new();
    let times = (0..BATCH * 100).map(|n| {
        let key = MediaKey::new([n.to_le_bytes(), [7; 8]].concat()).unwrap();
        timed(|| ring.set(INDEX, &key).unwrap())
    });
    let median = median_per_frame(times.collect()) * BATCH as f64;
    println!("set a media key: {median:.0} ns");
}

/// A frame of `size` bytes in canonical form, and its number of clear bytes.
fn frame(codec: Codec, size: usize) -> (Vec<u8>, usize) {
    let header: &[u8] = match codec {
        Codec::Opus => &[0x78],
        Codec::H264 => b"\0\0\0\x01\x67\x42\xc0\x1f\0\0\0\x01\x68\x87\xcb\x83\0\0\0\x01\x65\x88",
        _ => b"\x31\x05\0",
    };
    let body = (0..size - header.len()).map(|n| (n * 31 % 251) as u8 + 4);
    (header.iter().copied().chain(body).collect(), header.len())
}

/// The derivation of every LiveKit client, so that cipher and frames use the same key.
fn aes_key() -> [u8; 16] {
    let mut key = [0; 16];
    let hkdf = hkdf::Hkdf::<sha2::Sha256>::new(Some(b"LKFrameEncryptionKey"), &MATERIAL);
    hkdf.expand(&[0; 128], &mut key).unwrap();
    key
}

#[cfg(feature = "aws-lc")]
struct Cipher(aws_lc_rs::aead::LessSafeKey);

#[cfg(feature = "aws-lc")]
impl Cipher {
    fn new(key: &[u8; 16]) -> Self {
        use aws_lc_rs::aead::{AES_128_GCM, LessSafeKey, UnboundKey};
        Self(LessSafeKey::new(UnboundKey::new(&AES_128_GCM, key).unwrap()))
    }

    fn seal(&self, iv: [u8; IV_LEN], aad: &[u8], plain: &[u8], out: &mut [u8], tag: &mut [u8; TAG_LEN]) {
        use aws_lc_rs::aead::{Aad, Nonce};
        let nonce = Nonce::assume_unique_for_key(iv);
        self.0.seal_out_of_place_scatter(nonce, Aad::from(aad), plain, out, &[], tag).unwrap();
    }

    fn open(&self, iv: [u8; IV_LEN], aad: &[u8], sealed: &[u8], tag: &[u8; TAG_LEN], out: &mut [u8]) {
        use aws_lc_rs::aead::{Aad, Nonce};
        let nonce = Nonce::assume_unique_for_key(iv);
        self.0.open_separate_gather(nonce, Aad::from(aad), sealed, tag, out).unwrap();
    }
}

#[cfg(not(feature = "aws-lc"))]
struct Cipher(aes_gcm::Aes128Gcm);

#[cfg(not(feature = "aws-lc"))]
impl Cipher {
    fn new(key: &[u8; 16]) -> Self {
        use aes_gcm::KeyInit as _;
        Self(aes_gcm::Aes128Gcm::new(key.into()))
    }

    fn seal(&self, iv: [u8; IV_LEN], aad: &[u8], plain: &[u8], out: &mut [u8], tag: &mut [u8; TAG_LEN]) {
        use aes_gcm::aead::{AeadInOut as _, inout::InOutBuf};
        let buffers = InOutBuf::new(plain, out).unwrap();
        *tag = self.0.encrypt_inout_detached(&iv.into(), aad, buffers).unwrap().into();
    }

    fn open(&self, iv: [u8; IV_LEN], aad: &[u8], sealed: &[u8], tag: &[u8; TAG_LEN], out: &mut [u8]) {
        use aes_gcm::aead::{AeadInOut as _, inout::InOutBuf};
        let buffers = InOutBuf::new(sealed, out).unwrap();
        self.0.decrypt_inout_detached(&iv.into(), aad, buffers, tag.into()).unwrap();
    }
}
