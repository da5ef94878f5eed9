//! What a hostile SFU, network, participant or encoder can try, and what comes of it.

#![allow(clippy::disallowed_methods, reason = "a test needs some point in time to start from")]

use std::{
    collections::HashSet,
    time::{Duration, Instant},
};

use proptest::prelude::*;

use super::{
    DataDecryptor, DataEncryptor, FrameDecryptor, FrameEncryptor, KeyRing, OVERHEAD, OpenError, Opened,
    SealError, codec::Rule,
};
use crate::{
    key::{KeyIndex, MediaKey},
    media::Codec,
};

const INDEX: KeyIndex = KeyIndex(5);
const CODECS: [Codec; 5] = [Codec::Opus, Codec::Vp8, Codec::Vp9, Codec::H264, Codec::H265];
const KEY_BYTES: [u8; 16] =
    [0xa1, 0xb2, 0xc3, 0xd4, 0xe5, 0xf6, 0x17, 0x28, 0x39, 0x4a, 0x5b, 0x6c, 0x7d, 0x8e, 0x9f, 0xa0];

#[test]
fn a_replayed_frame_is_delivered_once_on_any_track() {
    let (ours, theirs) = (ring(), ring());
    let wire = seal(Codec::Opus, &ours, &frame(Codec::Opus));
    let mut decryptor = FrameDecryptor::new(Codec::Opus, theirs.clone()).unwrap();
    assert_eq!(open(&mut decryptor, &wire), Ok(frame(Codec::Opus)));
    assert_eq!(open(&mut decryptor, &wire), Err(OpenError::Replayed(INDEX)));
    let mut other_track = FrameDecryptor::new(Codec::Opus, theirs.clone()).unwrap();
    assert_eq!(open(&mut other_track, &wire), Err(OpenError::Replayed(INDEX)));

    theirs.set(INDEX, &key()).unwrap();
    assert_eq!(open(&mut decryptor, &wire), Err(OpenError::Replayed(INDEX)), "the same key message again");
    theirs.set(KeyIndex(6), &key()).unwrap();
    let moved = [&wire[..wire.len() - 1], &[6]].concat();
    assert_eq!(
        open(&mut decryptor, &moved),
        Err(OpenError::Replayed(KeyIndex(6))),
        "the index is not authenticated"
    );
}

#[test]
fn a_forged_frame_does_not_use_up_the_iv_of_a_good_one() {
    let wire = seal(Codec::Opus, &ring(), &frame(Codec::Opus));
    let mut forged = wire.clone();
    forged[3] ^= 1;
    let mut decryptor = FrameDecryptor::new(Codec::Opus, ring()).unwrap();
    assert_eq!(open(&mut decryptor, &forged), Err(OpenError::Unauthentic(INDEX)));
    assert_eq!(open(&mut decryptor, &wire), Ok(frame(Codec::Opus)));
}

#[test]
fn every_index_without_a_key_is_named_and_dropped() {
    let mut wire = seal(Codec::Vp8, &ring(), &frame(Codec::Vp8));
    for index in 0..=u8::MAX {
        *wire.last_mut().unwrap() = index;
        let mut decryptor = FrameDecryptor::new(Codec::Vp8, ring()).unwrap();
        match open(&mut decryptor, &wire) {
            Ok(_) => assert_eq!(KeyIndex(index), INDEX),
            Err(error) => assert_eq!(error, OpenError::MissingKey(KeyIndex(index))),
        }
    }
}

#[test]
fn no_prefix_and_no_suffix_of_a_frame_opens() {
    for codec in CODECS {
        let wire = seal(codec, &ring(), &frame(codec));
        let mut decryptor = FrameDecryptor::new(codec, ring()).unwrap();
        for cut in 1..wire.len() {
            assert!(open(&mut decryptor, &wire[..cut]).is_err(), "{codec:?}, first {cut}");
            assert!(open(&mut decryptor, &wire[cut..]).is_err(), "{codec:?}, all but {cut}");
        }
        let trailer_only = [&[0; OVERHEAD - 2][..], &[12, INDEX.0]].concat();
        for start in 0..OVERHEAD {
            let short = open(&mut decryptor, &trailer_only[start..]);
            assert!(
                matches!(short, Err(OpenError::TooShort(_) | OpenError::Unauthentic(_))),
                "{codec:?} {short:?}"
            );
        }
        assert_eq!(open(&mut decryptor, &wire), Ok(frame(codec)), "the whole frame does");
    }
}

#[test]
fn no_bit_of_a_frame_can_be_changed() {
    for codec in CODECS {
        let wire = seal(codec, &ring(), &frame(codec));
        let mut decryptor = FrameDecryptor::new(codec, ring()).unwrap();
        for bit in 0..wire.len() * 8 {
            let mut changed = wire.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            assert!(open(&mut decryptor, &changed).is_err(), "{codec:?}, bit {bit}");
        }
    }
}

#[test]
fn an_iv_length_other_than_twelve_is_refused_before_the_key() {
    let mut wire = seal(Codec::Opus, &ring(), &frame(Codec::Opus));
    let place = wire.len() - 2;
    let mut decryptor = FrameDecryptor::new(Codec::Opus, KeyRing::new()).unwrap();
    for length in (0..=u8::MAX).filter(|length| *length != 12) {
        wire[place] = length;
        assert_eq!(open(&mut decryptor, &wire), Err(OpenError::NotSealed));
    }
}

#[test]
fn ten_thousand_bad_frames_do_not_cost_the_next_good_one() {
    let good = seal(Codec::Opus, &ring(), &frame(Codec::Opus));
    let mut decryptor = FrameDecryptor::new(Codec::Opus, ring()).unwrap();
    for n in 0..10_000u32 {
        let mut bad = good.clone();
        bad[4..8].copy_from_slice(&n.to_be_bytes());
        bad[9] ^= 1;
        assert_eq!(open(&mut decryptor, &bad), Err(OpenError::Unauthentic(INDEX)));
    }
    assert_eq!(open(&mut decryptor, &good), Ok(frame(Codec::Opus)));
}

/// Whatever the SFU says about a track's encryption, there is no state here for it to change.
#[test]
fn plaintext_is_never_delivered_and_ciphertext_always_opened() {
    for codec in CODECS {
        let mut decryptor = FrameDecryptor::new(codec, ring()).unwrap();
        assert!(open(&mut decryptor, &frame(codec)).is_err(), "{codec:?}");
        let plausible = [&frame(codec)[..], &[12, INDEX.0]].concat();
        assert!(open(&mut decryptor, &plausible).is_err(), "{codec:?}");
        assert_eq!(open(&mut decryptor, &seal(codec, &ring(), &frame(codec))), Ok(frame(codec)));
    }
}

#[test]
fn without_a_key_nothing_is_sent() {
    for codec in CODECS {
        let mut encryptor = FrameEncryptor::new(codec, KeyRing::new()).unwrap();
        let mut out = frame(codec);
        assert_eq!(encryptor.seal(INDEX, &frame(codec), &mut out), Err(SealError::MissingKey(INDEX)));
        assert!(out.is_empty(), "not even what was in the buffer");
    }
}

#[test]
fn a_key_that_is_wiped_seals_nothing_more() {
    let ring = ring();
    let mut encryptor = FrameEncryptor::new(Codec::Opus, ring.clone()).unwrap();
    let mut out = Vec::new();
    encryptor.seal(INDEX, b"\x78abc", &mut out).unwrap();
    ring.clear();
    assert_eq!(encryptor.seal(INDEX, b"\x78abc", &mut out), Err(SealError::MissingKey(INDEX)));
}

#[test]
fn the_trailer_of_injected_frames_lets_no_media_in() {
    let trailer = b"announced by the SFU";
    let mut decryptor = FrameDecryptor::new(Codec::Opus, ring()).unwrap();
    let now = Instant::now();
    let mut out = Vec::new();
    let sealed = seal(Codec::Opus, &ring(), &frame(Codec::Opus));
    let silence_and_more = [&[0xef, 0xf8, 0xff, 0xfe][..], &[0; 77]].concat(); // RED with a second block to come
    for payload in [&frame(Codec::Opus)[..], &sealed, b"", b"\xf8\xff\xfe", &silence_and_more] {
        let wire = [payload, trailer].concat();
        assert_eq!(decryptor.open(now, &wire, Some(trailer), &mut out), Err(OpenError::ForeignInjection));
        assert!(out.is_empty());
    }
    // No trailer, or an empty one, switches the feature off: then it is a frame like any other.
    for off in [None, Some(&b""[..])] {
        let wire = [&frame(Codec::Opus)[..], trailer].concat();
        assert_eq!(decryptor.open(now, &wire, off, &mut out), Err(OpenError::NotSealed));
    }
}

#[test]
fn injected_frames_come_a_hundred_in_two_seconds() {
    let trailer = b"announced by the SFU";
    let silence = [&[0xf8, 0xff, 0xfe][..], &[0; 77], trailer].concat();
    let mut decryptor = FrameDecryptor::new(Codec::Opus, ring()).unwrap();
    let start = Instant::now();
    let mut burst = |now| {
        let mut open = || decryptor.open(now, &silence, Some(trailer), &mut Vec::new());
        (0..300).filter(|_| open() != Err(OpenError::InjectionFlood)).count()
    };
    assert_eq!(burst(start), 100);
    assert_eq!(burst(start + Duration::from_millis(1999)), 0);
    assert_eq!(burst(start + Duration::from_secs(2)), 100);
}

/// A new encryptor is what a restart, a second track and a cloned process look like.
#[test]
fn encryptors_that_share_a_key_share_no_iv() {
    const EACH: usize = 1_000_000;
    let ring = ring();
    let key = ring.find(INDEX).unwrap();
    let mut seen = HashSet::with_capacity(2 * EACH);
    for _ in 0..2 {
        let mut ivs = super::iv::IvSource::default();
        for _ in 0..EACH {
            let iv = ivs.next(&key).unwrap();
            assert!(seen.insert(iv) && !iv.contains(&0), "{iv:?}");
        }
    }
}

#[test]
fn the_iv_counter_wraps_without_repeating_a_frame() {
    let ring = ring();
    let mut encryptor = FrameEncryptor::new(Codec::Opus, ring.clone()).unwrap();
    encryptor.start_ivs_at(INDEX, [7, 7, 7, 7, 7, 7, 255, 255, 255, 255, 255, 200]);
    let mut decryptor = FrameDecryptor::new(Codec::Opus, ring).unwrap();
    let mut wire = Vec::new();
    for _ in 0..1000 {
        encryptor.seal(INDEX, b"\x78abc", &mut wire).unwrap();
        assert_eq!(open(&mut decryptor, &wire), Ok(b"\x78abc".to_vec()), "not taken for a replay");
    }
}

#[test]
fn a_key_seals_two_to_the_thirty_two_frames_over_all_encryptors() {
    let ring = ring();
    ring.find(INDEX).unwrap().leave_budget(2);
    let mut out = Vec::new();
    for _ in 0..2 {
        FrameEncryptor::new(Codec::Opus, ring.clone()).unwrap().seal(INDEX, b"\x78abc", &mut out).unwrap();
    }
    let mut encryptor = FrameEncryptor::new(Codec::Opus, ring.clone()).unwrap();
    assert_eq!(encryptor.seal(INDEX, b"\x78abc", &mut out), Err(SealError::KeyExhausted));
    assert_eq!(DataEncryptor::new(ring.clone()).seal(INDEX, b"abc"), Err(SealError::KeyExhausted));
    ring.set(INDEX, &MediaKey::new(vec![1; 32]).unwrap()).unwrap();
    encryptor.seal(INDEX, b"\x78abc", &mut out).unwrap();
}

#[test]
fn a_megabyte_of_zeros_start_codes_or_escapes_is_only_a_bad_frame() {
    const MEGABYTE: usize = 1 << 20;
    for codec in [Codec::H264, Codec::H265] {
        for pattern in [&[0][..], &[0, 0, 1], &[0, 0, 0, 1], &[0, 0, 3], &[0, 0, 1, 0x67], &[0, 0, 1, 0x7e]] {
            for head in [&[][..], &[0, 0, 0, 1, 0x41, 2], &[0, 0, 0, 1, 2, 1]] {
                let bomb = [head, &pattern.repeat(MEGABYTE / pattern.len()), &[12, INDEX.0]].concat();
                let mut decryptor = FrameDecryptor::new(codec, ring()).unwrap();
                assert!(open(&mut decryptor, &bomb).is_err(), "{codec:?} {pattern:?}");
                let mut encryptor = FrameEncryptor::new(codec, ring()).unwrap();
                let mut wire = Vec::new();
                if encryptor.seal(INDEX, &bomb, &mut wire).is_ok() {
                    assert!(
                        wire.len() <= bomb.len() + bomb.len() / 256 + 300,
                        "sealed bytes are random: few escapes"
                    );
                    assert!(open(&mut decryptor, &wire).is_ok());
                }
            }
        }
    }
}

#[test]
fn nothing_that_can_be_printed_has_a_key_byte() {
    let ring = ring();
    ring.set_password(KeyIndex(9), "correct horse battery staple").unwrap();
    let wire = seal(Codec::Vp8, &ring, &frame(Codec::Vp8));
    let mut decryptor = FrameDecryptor::new(Codec::Vp8, ring.clone()).unwrap();
    open(&mut decryptor, &wire).unwrap();
    let key = ring.find(INDEX).unwrap();
    let encryptor = FrameEncryptor::new(Codec::Vp8, ring.clone()).unwrap();
    let (seal_data, open_data) = (DataEncryptor::new(ring.clone()), DataDecryptor::new(ring.clone()));
    let printed = format!("{ring:?} {key:?} {encryptor:?} {decryptor:?} {seal_data:?} {open_data:?}");
    assert_eq!(
        printed,
        "KeyRing { indices: [KeyIndex(5), KeyIndex(9)], .. } FrameKey(redacted) \
         FrameEncryptor { rule: Vp8, ring: KeyRing { indices: [KeyIndex(5), KeyIndex(9)], .. }, .. } \
         FrameDecryptor { rule: Vp8, ring: KeyRing { indices: [KeyIndex(5), KeyIndex(9)], .. }, .. } \
         DataEncryptor { ring: KeyRing { indices: [KeyIndex(5), KeyIndex(9)], .. }, .. } \
         DataDecryptor { ring: KeyRing { indices: [KeyIndex(5), KeyIndex(9)], .. } }"
    );
}

#[test]
fn data_packets_are_bound_to_their_key_and_delivered_once() {
    let ring = ring();
    let sealed = DataEncryptor::new(ring.clone()).seal(INDEX, b"hello").unwrap();
    let decryptor = DataDecryptor::new(ring);
    assert_eq!(decryptor.open(&sealed.iv[..11], INDEX, &sealed.value), Err(OpenError::NotSealed));
    assert_eq!(
        decryptor.open(&sealed.iv, KeyIndex(4), &sealed.value),
        Err(OpenError::MissingKey(KeyIndex(4)))
    );
    assert_eq!(decryptor.open(&sealed.iv, INDEX, &sealed.value[..15]), Err(OpenError::TooShort(15)));
    assert_eq!(
        decryptor.open(&sealed.iv, INDEX, b"hello, in clear and long"),
        Err(OpenError::Unauthentic(INDEX))
    );
    assert_eq!(decryptor.open(&sealed.iv, INDEX, &sealed.value).unwrap(), b"hello");
    assert_eq!(decryptor.open(&sealed.iv, INDEX, &sealed.value), Err(OpenError::Replayed(INDEX)));
}

#[test]
fn buffers_are_reused() {
    let (mut wire, mut plain) = (Vec::new(), Vec::new());
    let ring = ring();
    let mut encryptor = FrameEncryptor::new(Codec::H264, ring.clone()).unwrap();
    let mut decryptor = FrameDecryptor::new(Codec::H264, ring).unwrap();
    let long = [&frame(Codec::H264)[..], &[9; 2000]].concat();
    encryptor.seal(INDEX, &long, &mut wire).unwrap();
    decryptor.open(Instant::now(), &wire, None, &mut plain).unwrap();
    let (sealed_at, opened_at) = (wire.as_ptr(), plain.as_ptr());
    for cut in 1..1500 {
        encryptor.seal(INDEX, &long[..long.len() - cut], &mut wire).unwrap();
        decryptor.open(Instant::now(), &wire, None, &mut plain).unwrap();
        assert_eq!(plain, long[..long.len() - cut]);
    }
    assert_eq!((wire.as_ptr(), plain.as_ptr()), (sealed_at, opened_at));
}

proptest! {
    #[test]
    fn opening_arbitrary_bytes_never_panics_and_never_opens(
        bytes in hostile_bytes(),
        trailer in proptest::option::of(proptest::collection::vec(0..4u8, 0..3)),
    ) {
        for codec in CODECS {
            let mut decryptor = FrameDecryptor::new(codec, ring()).unwrap();
            for wire in [bytes.clone(), [&bytes[..], &[12, INDEX.0]].concat()] {
                let mut out = vec![1];
                let opened = decryptor.open(Instant::now(), &wire, trailer.as_deref(), &mut out);
                prop_assert!(!matches!(opened, Ok(Opened::Frame(_))));
                prop_assert!(out.is_empty());
            }
        }
    }

    #[test]
    fn what_is_sealed_opens(codec in proptest::sample::select(&CODECS[..3]), bytes in hostile_bytes()) {
        let frame = [&frame(codec)[..], &bytes].concat();
        let wire = seal(codec, &ring(), &frame);
        prop_assert_eq!(wire.len(), frame.len() + OVERHEAD);
        let mut decryptor = FrameDecryptor::new(codec, ring()).unwrap();
        prop_assert_eq!(open(&mut decryptor, &wire), Ok(frame));
    }

    /// Any unit that can be sealed opens; and as the header is canonical after one pass, a second changes nothing.
    #[test]
    fn access_units_open_in_canonical_form(codec in proptest::sample::select(&CODECS[3..]), unit in access_unit()) {
        let mut encryptor = FrameEncryptor::new(codec, ring()).unwrap();
        let mut wire = Vec::new();
        if encryptor.seal(INDEX, &unit, &mut wire).is_ok() && !unit.is_empty() {
            let mut decryptor = FrameDecryptor::new(codec, ring()).unwrap();
            let canonical = open(&mut decryptor, &wire).unwrap();
            encryptor.seal(INDEX, &canonical, &mut wire).unwrap();
            prop_assert_eq!(open(&mut decryptor, &wire), Ok(canonical));
        }
    }

    #[test]
    fn a_canonical_unit_is_returned_as_it_was(
        codec in proptest::sample::select(&CODECS[3..]),
        payload in hostile_bytes(),
    ) {
        let unit = [&frame(codec)[..], &payload].concat();
        let wire = seal(codec, &ring(), &unit);
        let sealed = &wire[Rule::of(codec).unwrap().layout(&wire).clear..];
        prop_assert!(!sealed.windows(3).any(|w| w[..2] == [0, 0] && w[2] < 3), "nothing like a start code");
        let mut decryptor = FrameDecryptor::new(codec, ring()).unwrap();
        prop_assert_eq!(open(&mut decryptor, &wire), Ok(unit));
    }
}

fn hostile_bytes() -> impl Strategy<Value = Vec<u8>> {
    proptest::collection::vec(prop_oneof![3 => 0..4u8, 1 => any::<u8>()], 0..600)
}

/// NAL units of all sorts behind start codes of both lengths.
fn access_unit() -> impl Strategy<Value = Vec<u8>> {
    let header = prop_oneof![
        any::<u8>(),
        proptest::sample::select(&[0x65, 0x41, 0x67, 0x68, 6, 9, 2, 0x26, 0x42, 0x4e][..])
    ];
    let body = proptest::collection::vec(prop_oneof![2 => 0..4u8, 3 => any::<u8>()], 0..90);
    let nalu = (any::<bool>(), header, body).prop_map(|(long, header, body)| {
        let code: &[u8] = if long { &[0, 0, 0, 1] } else { &[0, 0, 1] };
        [code, &[header], &body].concat()
    });
    proptest::collection::vec(nalu, 0..8).prop_map(|nalus| nalus.concat())
}

fn key() -> MediaKey {
    MediaKey::new(KEY_BYTES.to_vec()).unwrap()
}

fn ring() -> KeyRing {
    let ring = KeyRing::new();
    ring.set(INDEX, &key()).unwrap();
    ring
}

/// A short frame of each codec, in canonical form.
fn frame(codec: Codec) -> Vec<u8> {
    match codec {
        Codec::Opus => b"\x78 an Opus frame".to_vec(),
        Codec::Vp8 => b"\x10\x02\x00\x9d\x01\x2a\x80\x02\xe0\x01 a key frame".to_vec(),
        Codec::H264 => b"\0\0\0\x01\x67\x42\xc0\0\0\0\x01\x68\x87\0\0\0\x01\x65\x88 a slice".to_vec(),
        Codec::H265 => {
            b"\0\0\0\x01\x40\x01\x0c\0\0\0\x01\x42\x01\x02\0\0\0\x01\x44\x01\xc1\0\0\0\x01\x26\x01 a slice"
                .to_vec()
        }
        _ => b"a VP9 frame".to_vec(),
    }
}

fn seal(codec: Codec, ring: &KeyRing, frame: &[u8]) -> Vec<u8> {
    let mut wire = Vec::new();
    FrameEncryptor::new(codec, ring.clone()).unwrap().seal(INDEX, frame, &mut wire).unwrap();
    wire
}

fn open(decryptor: &mut FrameDecryptor, wire: &[u8]) -> Result<Vec<u8>, OpenError> {
    let mut out = Vec::new();
    decryptor.open(Instant::now(), wire, None, &mut out).map(|_| out)
}
