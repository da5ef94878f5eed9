//! Frames from an SFU: none opens but those that were sealed with the member's key, and each of those once.
#![no_main]

use std::time::Instant;

use antiphon_call_sdk::{
    Codec, KeyIndex, MediaKey,
    frame_crypto::{FrameDecryptor, FrameEncryptor, KeyRing, Opened, SifTrailer},
};
use libfuzzer_sys::fuzz_target;

const CODECS: [Codec; 5] = [Codec::Opus, Codec::Vp8, Codec::Vp9, Codec::H264, Codec::H265];

fuzz_target!(|data: &[u8]| {
    let [codec, index, change, bytes @ ..] = data else { return };
    let codec = CODECS[usize::from(*codec) % CODECS.len()];
    let (index, key) = (KeyIndex(*index), MediaKey::new(vec![7; 32]).expect("a good length"));
    let ring = || {
        let ring = KeyRing::new();
        ring.set(index, &key).expect("a key can be set");
        ring
    };
    let now = Instant::now();
    let (mut wire, mut plain) = (Vec::new(), Vec::new());
    let mut decryptor = FrameDecryptor::new(codec, ring()).expect("a codec that can be encrypted");

    // As it is: nobody but the holder of the key makes a frame that opens.
    let trailer = SifTrailer::new(&[1; 16]);
    let opened = decryptor.open(now, bytes, trailer.as_ref(), &mut plain);
    let is_frame = matches!(opened, Ok(Opened::Frame(_)));
    assert!(!is_frame && plain.is_empty(), "forged: {opened:?}");

    // Sealed, it opens once and not with a byte changed.
    let mut encryptor = FrameEncryptor::new(codec, ring()).expect("a codec that can be encrypted");
    if encryptor.seal(index, bytes, &mut wire).is_err() {
        assert!(wire.is_empty());
        return;
    }
    if wire.is_empty() {
        return;
    }
    let mut changed = wire.clone();
    let place = usize::from(*change) * changed.len() / 256;
    changed[place] ^= 0x10;
    let opened = decryptor.open(now, &changed, None, &mut plain);
    assert!(!matches!(opened, Ok(Opened::Frame(_))), "changed at {place}: {opened:?}");
    let opened = decryptor.open(now, &wire, None, &mut plain);
    assert!(matches!(opened, Ok(Opened::Frame(of)) if of == index), "{opened:?}");
    if !matches!(codec, Codec::H264 | Codec::H265) {
        assert_eq!(plain, bytes);
    }
    let again = decryptor.open(now, &wire, None, &mut plain);
    assert!(!matches!(again, Ok(Opened::Frame(_))) && plain.is_empty(), "replayed: {again:?}");
});
