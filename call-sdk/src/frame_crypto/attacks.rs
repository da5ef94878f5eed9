//! Attacks by a hostile SFU, network, participant or encoder, and their outcome. Two are covered elsewhere: forged
//! key messages by the key inbox, and frames swapped between two tracks of one sender by the assumptions of the
//! module's documentation.

#![allow(clippy::disallowed_methods, reason = "a test needs some point in time to start from")]

use std::{
    collections::HashSet,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use proptest::prelude::*;

use super::{
    DataDecryptor, DataEncryptor, FrameDecryptor, FrameEncryptor, KeyRing, MAX_SEALED, OVERHEAD, OpenError,
    Opened, SealError, SifTrailer, codec::Rule, iv_source::IvSource,
};
use crate::{
    key::{KeyIndex, MediaKey},
    media::Codec,
};

const INDEX: KeyIndex = KeyIndex(5);
const CODECS: [Codec; 5] = [Codec::Opus, Codec::Vp8, Codec::Vp9, Codec::H264, Codec::H265];
const KEY_BYTES: [u8; 16] =
    [0xa1, 0xb2, 0xc3, 0xd4, 0xe5, 0xf6, 0x17, 0x28, 0x39, 0x4a, 0x5b, 0x6c, 0x7d, 0x8e, 0x9f, 0xa0];
const PASSWORD: &str = "correct horse battery staple";

// Replays.

#[test]
fn replayed_frame_is_delivered_once_on_any_track() {
    let (ours, theirs) = (ring(), ring());
    let wire = seal(Codec::Opus, &ours, &frame(Codec::Opus));
    let mut decryptor = decryptor(Codec::Opus, &theirs);
    assert_eq!(open(&mut decryptor, &wire), Ok(frame(Codec::Opus)));
    for _ in 0..2 {
        assert_eq!(open(&mut decryptor, &wire), Err(OpenError::Replayed(INDEX)));
    }
    let mut other_track = FrameDecryptor::new(Codec::Opus, theirs.clone()).unwrap();
    assert_eq!(open(&mut other_track, &wire), Err(OpenError::Replayed(INDEX)));
}

#[test]
fn same_key_message_again_does_not_admit_replays() {
    let ring = ring();
    let wire = seal(Codec::Opus, &ring, &frame(Codec::Opus));
    let mut decryptor = decryptor(Codec::Opus, &ring);
    assert_eq!(open(&mut decryptor, &wire), Ok(frame(Codec::Opus)));
    ring.set(INDEX, &key()).unwrap();
    assert_eq!(open(&mut decryptor, &wire), Err(OpenError::Replayed(INDEX)));
}

/// The index is not authenticated.
#[test]
fn same_key_at_another_index_does_not_admit_replays() {
    let ring = ring();
    let wire = seal(Codec::Opus, &ring, &frame(Codec::Opus));
    let mut decryptor = decryptor(Codec::Opus, &ring);
    assert_eq!(open(&mut decryptor, &wire), Ok(frame(Codec::Opus)));
    ring.set(KeyIndex(6), &key()).unwrap();
    let moved = [&wire[..wire.len() - 1], &[6]].concat();
    assert_eq!(open(&mut decryptor, &moved), Err(OpenError::Replayed(KeyIndex(6))));
}

/// A member leaves and returns, and their key is installed again: recorded frames stay closed, new ones open.
#[test]
fn key_installed_again_after_clear_does_not_admit_replays() {
    let (ours, theirs) = (ring(), ring());
    let recorded: Vec<_> = (0..100).map(|_| seal(Codec::Vp8, &ours, &frame(Codec::Vp8))).collect();
    let mut decryptor = decryptor(Codec::Vp8, &theirs);
    for wire in &recorded {
        assert_eq!(open(&mut decryptor, wire), Ok(frame(Codec::Vp8)));
    }
    theirs.clear();
    assert_eq!(open(&mut decryptor, &recorded[0]), Err(OpenError::MissingKey(INDEX)));
    theirs.set(INDEX, &key()).unwrap();
    for wire in &recorded {
        assert_eq!(open(&mut decryptor, wire), Err(OpenError::Replayed(INDEX)));
    }
    let fresh = seal(Codec::Vp8, &ours, &frame(Codec::Vp8));
    assert_eq!(open(&mut decryptor, &fresh), Ok(frame(Codec::Vp8)));
}

#[test]
fn key_installed_again_after_overwriting_or_retiring_does_not_admit_replays() {
    let ring = ring();
    let wire = seal(Codec::Opus, &ring, &frame(Codec::Opus));
    let mut decryptor = decryptor(Codec::Opus, &ring);
    assert_eq!(open(&mut decryptor, &wire), Ok(frame(Codec::Opus)));

    ring.set(INDEX, &other_key()).unwrap();
    assert_eq!(open(&mut decryptor, &wire), Err(OpenError::Unauthentic(INDEX)));
    ring.set(INDEX, &key()).unwrap();
    assert_eq!(open(&mut decryptor, &wire), Err(OpenError::Replayed(INDEX)));

    ring.set(KeyIndex(6), &other_key()).unwrap();
    let mut encryptor = FrameEncryptor::new(Codec::Opus, ring.clone()).unwrap();
    encryptor.seal(KeyIndex(6), b"\x78", &mut Vec::new()).unwrap();
    let start = Instant::now();
    ring.retire(start);
    encryptor.seal(KeyIndex(6), b"\x78", &mut Vec::new()).unwrap();
    assert_eq!(ring.retire(start + super::RETIRE_AFTER), [INDEX]);
    assert_eq!(open(&mut decryptor, &wire), Err(OpenError::MissingKey(INDEX)));
    ring.set(INDEX, &key()).unwrap();
    assert_eq!(open(&mut decryptor, &wire), Err(OpenError::Replayed(INDEX)));
}

#[test]
fn forged_frame_does_not_use_up_the_iv_of_a_good_one() {
    let wire = seal(Codec::Opus, &ring(), &frame(Codec::Opus));
    let mut forged = wire.clone();
    forged[3] ^= 1;
    let mut decryptor = decryptor(Codec::Opus, &ring());
    assert_eq!(open(&mut decryptor, &forged), Err(OpenError::Unauthentic(INDEX)));
    assert_eq!(open(&mut decryptor, &wire), Ok(frame(Codec::Opus)));
    assert_eq!(open(&mut decryptor, &forged), Err(OpenError::Unauthentic(INDEX)), "not called a replay");
}

// Damaged and forged frames.

#[test]
fn index_without_a_key_is_named_and_dropped() {
    let mut wire = seal(Codec::Vp8, &ring(), &frame(Codec::Vp8));
    for index in 0..=u8::MAX {
        *wire.last_mut().unwrap() = index;
        match open(&mut decryptor(Codec::Vp8, &ring()), &wire) {
            Ok(_) => assert_eq!(KeyIndex(index), INDEX),
            Err(error) => assert_eq!(error, OpenError::MissingKey(KeyIndex(index))),
        }
    }
}

#[test]
fn no_prefix_and_no_suffix_of_a_frame_opens() {
    for codec in CODECS {
        let wire = seal(codec, &ring(), &frame(codec));
        let mut decryptor = decryptor(codec, &ring());
        for cut in 1..wire.len() {
            assert!(open(&mut decryptor, &wire[..cut]).is_err(), "{codec:?}, first {cut}");
            assert!(open(&mut decryptor, &wire[cut..]).is_err(), "{codec:?}, all but {cut}");
        }
        assert_eq!(open(&mut decryptor, &wire), Ok(frame(codec)), "the whole frame does");
    }
}

/// The last two bytes stay plausible, so that every later length check is reached.
#[test]
fn frame_with_a_truncated_tail_does_not_open() {
    for codec in CODECS {
        let wire = seal(codec, &ring(), &frame(codec));
        let mut decryptor = decryptor(codec, &ring());
        let body = &wire[..wire.len() - 2];
        for cut in 1..=body.len() {
            for kept in [&body[..body.len() - cut], &body[cut..]] {
                let short = [kept, &[12, INDEX.0]].concat();
                let opened = open(&mut decryptor, &short);
                let expected = matches!(opened, Err(OpenError::TooShort(_) | OpenError::Unauthentic(_)));
                assert!(expected, "{codec:?}, {cut} bytes less: {opened:?}");
            }
        }
        // Every length below the overhead, of zeros: escapes and start codes to H.264 and H.265.
        for length in 0..OVERHEAD {
            let zeros = [&[0; OVERHEAD][..length], &[12, INDEX.0]].concat();
            let opened = open(&mut decryptor, &zeros);
            let expected = matches!(opened, Err(OpenError::TooShort(_) | OpenError::Unauthentic(_)));
            assert!(expected, "{codec:?}, {length} zeros: {opened:?}");
        }
    }
}

#[test]
fn frame_with_one_bit_changed_does_not_open() {
    for codec in CODECS {
        let wire = seal(codec, &ring(), &frame(codec));
        let mut decryptor = decryptor(codec, &ring());
        for bit in 0..wire.len() * 8 {
            let mut changed = wire.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            assert!(open(&mut decryptor, &changed).is_err(), "{codec:?}, bit {bit}");
        }
    }
}

#[test]
fn iv_length_other_than_twelve_is_refused_before_the_key_lookup() {
    let mut wire = seal(Codec::Opus, &ring(), &frame(Codec::Opus));
    let place = wire.len() - 2;
    let mut decryptor = decryptor(Codec::Opus, &KeyRing::new());
    for length in (0..=u8::MAX).filter(|length| *length != 12) {
        wire[place] = length;
        assert_eq!(open(&mut decryptor, &wire), Err(OpenError::NotSealed));
    }
}

#[test]
fn good_frame_opens_after_ten_thousand_damaged_ones() {
    let good = seal(Codec::Opus, &ring(), &frame(Codec::Opus));
    let mut decryptor = decryptor(Codec::Opus, &ring());
    for n in 0..10_000u32 {
        let mut bad = good.clone();
        bad[4..8].copy_from_slice(&n.to_be_bytes());
        bad[9] ^= 1;
        assert_eq!(open(&mut decryptor, &bad), Err(OpenError::Unauthentic(INDEX)));
    }
    assert_eq!(open(&mut decryptor, &good), Ok(frame(Codec::Opus)));
}

#[test]
fn good_frame_opens_after_ten_thousand_under_a_wrong_key() {
    let forgers = KeyRing::new();
    forgers.set(INDEX, &other_key()).unwrap();
    let mut forger = FrameEncryptor::new(Codec::Vp8, forgers).unwrap();
    let mut decryptor = decryptor(Codec::Vp8, &ring());
    let mut wire = Vec::new();
    for _ in 0..10_000 {
        forger.seal(INDEX, &frame(Codec::Vp8), &mut wire).unwrap();
        assert_eq!(open(&mut decryptor, &wire), Err(OpenError::Unauthentic(INDEX)));
    }
    let good = seal(Codec::Vp8, &ring(), &frame(Codec::Vp8));
    assert_eq!(open(&mut decryptor, &good), Ok(frame(Codec::Vp8)));
}

// Downgrades.

/// Nothing that an SFU says about a track's encryption is an input here.
#[test]
fn plaintext_is_never_delivered_and_ciphertext_always_opened() {
    for codec in CODECS {
        let mut decryptor = decryptor(codec, &ring());
        assert!(open(&mut decryptor, &frame(codec)).is_err(), "{codec:?}");
        let plausible = [&frame(codec)[..], &[12, INDEX.0]].concat();
        assert!(open(&mut decryptor, &plausible).is_err(), "{codec:?}");
        assert_eq!(open(&mut decryptor, &seal(codec, &ring(), &frame(codec))), Ok(frame(codec)));
    }
}

#[test]
fn frame_is_not_sent_without_a_key() {
    for codec in CODECS {
        let mut encryptor = FrameEncryptor::new(codec, KeyRing::new()).unwrap();
        let mut out = frame(codec);
        assert_eq!(encryptor.seal(INDEX, &frame(codec), &mut out), Err(SealError::MissingKey(INDEX)));
        assert!(out.is_empty(), "the earlier content of the buffer is gone too");
    }
}

#[test]
fn wiped_key_seals_nothing_more() {
    let ring = ring();
    let mut encryptor = FrameEncryptor::new(Codec::Opus, ring.clone()).unwrap();
    let mut out = Vec::new();
    encryptor.seal(INDEX, b"\x78abc", &mut out).unwrap();
    ring.clear();
    assert_eq!(encryptor.seal(INDEX, b"\x78abc", &mut out), Err(SealError::MissingKey(INDEX)));
}

#[test]
fn clear_reaches_encryptors_on_other_threads() {
    let (ring, started, cleared) = (ring(), AtomicBool::new(false), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let sealing = scope.spawn(|| {
            let mut encryptor = FrameEncryptor::new(Codec::Opus, ring.clone()).unwrap();
            let mut out = Vec::new();
            loop {
                let after = cleared.load(Ordering::SeqCst);
                match encryptor.seal(INDEX, b"\x78abc", &mut out) {
                    Ok(()) => assert!(!after, "sealed after the key was wiped"),
                    Err(error) => return error,
                }
                started.store(true, Ordering::SeqCst);
            }
        });
        while !started.load(Ordering::SeqCst) && !sealing.is_finished() {
            std::thread::yield_now();
        }
        ring.clear();
        cleared.store(true, Ordering::SeqCst);
        assert_eq!(sealing.join().unwrap(), SealError::MissingKey(INDEX));
    });
}

// Injected frames.

#[test]
fn trailer_of_injected_frames_admits_no_media() {
    let announced = b"announced by the SFU";
    let trailer = SifTrailer::new(announced).unwrap();
    let mut decryptor = decryptor(Codec::Opus, &ring());
    let now = Instant::now();
    let mut out = Vec::new();
    let sealed = seal(Codec::Opus, &ring(), &frame(Codec::Opus));
    let silence_and_more = [&[0xef, 0xf8, 0xff, 0xfe][..], &[0; 77]].concat(); // RED with a second block
    for payload in [&frame(Codec::Opus)[..], &sealed, b"", b"\xf8\xff\xfe", &silence_and_more] {
        let wire = [payload, announced].concat();
        assert_eq!(decryptor.open(now, &wire, Some(&trailer), &mut out), Err(OpenError::ForeignInjection));
        assert!(out.is_empty());
    }
    // Without a trailer there are no injected frames.
    let wire = [&frame(Codec::Opus)[..], announced].concat();
    assert_eq!(decryptor.open(now, &wire, None, &mut out), Err(OpenError::NotSealed));
}

#[test]
fn trailer_of_unusable_length_is_none() {
    assert_eq!(SifTrailer::new(b""), None);
    assert!(SifTrailer::new(&[1; SifTrailer::MAX_LEN]).is_some());
    assert_eq!(SifTrailer::new(&[1; SifTrailer::MAX_LEN + 1]), None);
}

/// The worst an SFU can do with a trailer that looks like that of a sealed frame is to drop frames.
#[test]
fn trailer_like_that_of_a_sealed_frame_only_drops_frames() {
    let trailer = SifTrailer::new(&[12, INDEX.0]).unwrap();
    let wire = seal(Codec::Opus, &ring(), &frame(Codec::Opus));
    let mut decryptor = decryptor(Codec::Opus, &ring());
    let mut out = Vec::new();
    let opened = decryptor.open(Instant::now(), &wire, Some(&trailer), &mut out);
    assert_eq!((opened, out.len()), (Err(OpenError::ForeignInjection), 0));
    assert_eq!(open(&mut decryptor, &wire), Ok(frame(Codec::Opus)));
}

#[test]
fn injected_frames_are_limited_to_a_hundred_in_two_seconds() {
    let announced = b"announced by the SFU";
    let trailer = SifTrailer::new(announced).unwrap();
    let silence = [&[0xf8, 0xff, 0xfe][..], &[0; 77], announced].concat();
    let mut decryptor = decryptor(Codec::Opus, &ring());
    let start = Instant::now();
    let mut burst = |now| {
        let mut open = || decryptor.open(now, &silence, Some(&trailer), &mut Vec::new());
        (0..300).filter(|_| open() != Err(OpenError::InjectionFlood)).count()
    };
    assert_eq!(burst(start), 100);
    assert_eq!(burst(start + Duration::from_millis(1999)), 0);
    assert_eq!(burst(start + Duration::from_secs(2)), 100);
}

// Initialisation vectors.

/// A restart, a second track and a cloned process are all a new encryptor.
#[test]
fn encryptors_of_one_key_share_no_iv() {
    const EACH: usize = 1_000_000;
    let ring = ring();
    let key = ring.find(INDEX).unwrap();
    let mut seen = HashSet::with_capacity(2 * EACH);
    for _ in 0..2 {
        let mut ivs = IvSource::default();
        for _ in 0..EACH {
            let iv = ivs.next(&key).unwrap();
            assert!(seen.insert(iv) && !iv.contains(&0), "{iv:?}");
        }
    }
}

/// We leave and return with the same key (a shared password), with a new ring or with the old one.
#[test]
fn rejoin_with_the_same_key_repeats_no_iv() {
    let receiver = ring();
    let mut decryptor = decryptor(Codec::Opus, &receiver);
    let mut ivs = HashSet::new();
    let returning = ring();
    for ring in [returning.clone(), returning, ring()] {
        ring.clear();
        ring.set(INDEX, &key()).unwrap();
        // Two tracks at the same time.
        let mut encryptors = [(); 2].map(|()| FrameEncryptor::new(Codec::Opus, ring.clone()).unwrap());
        let mut wire = Vec::new();
        for _ in 0..600 {
            for encryptor in &mut encryptors {
                encryptor.seal(INDEX, b"\x78abc", &mut wire).unwrap();
                assert!(ivs.insert(wire[wire.len() - 14..wire.len() - 2].to_vec()));
                assert_eq!(open(&mut decryptor, &wire), Ok(b"\x78abc".to_vec()), "not taken for a replay");
            }
        }
    }
}

#[test]
fn iv_counter_wraps_without_repeating_a_frame() {
    let ring = ring();
    let mut encryptor = FrameEncryptor::new(Codec::Opus, ring.clone()).unwrap();
    encryptor.start_ivs_at(INDEX, [7, 7, 7, 7, 7, 7, 255, 255, 255, 255, 255, 200]);
    let mut decryptor = decryptor(Codec::Opus, &ring);
    let (mut wire, mut wrapped) = (Vec::new(), false);
    for _ in 0..1000 {
        encryptor.seal(INDEX, b"\x78abc", &mut wire).unwrap();
        wrapped |= wire[wire.len() - 14..wire.len() - 2] == [7, 7, 7, 7, 7, 7, 1, 1, 1, 1, 1, 1];
        assert_eq!(open(&mut decryptor, &wire), Ok(b"\x78abc".to_vec()), "not taken for a replay");
    }
    assert!(wrapped);
}

#[test]
fn key_seals_two_to_the_thirty_two_frames_over_all_encryptors() {
    let ring = ring();
    ring.find(INDEX).unwrap().leave_budget(2);
    let mut out = Vec::new();
    for _ in 0..2 {
        FrameEncryptor::new(Codec::Opus, ring.clone()).unwrap().seal(INDEX, b"\x78abc", &mut out).unwrap();
    }
    let mut encryptor = FrameEncryptor::new(Codec::Opus, ring.clone()).unwrap();
    assert_eq!(encryptor.seal(INDEX, b"\x78abc", &mut out), Err(SealError::KeyExhausted));
    assert_eq!(DataEncryptor::new(ring.clone()).seal(INDEX, b"abc"), Err(SealError::KeyExhausted));
    assert_eq!(ring.sealed(INDEX), MAX_SEALED);

    ring.clear();
    ring.set(INDEX, &key()).unwrap();
    let again = encryptor.seal(INDEX, b"\x78abc", &mut out);
    assert_eq!(again, Err(SealError::KeyExhausted), "installing a key again does not renew its budget");
    ring.set(INDEX, &other_key()).unwrap();
    encryptor.seal(INDEX, b"\x78abc", &mut out).unwrap();
    assert_eq!(ring.sealed(INDEX), 1);
}

#[test]
fn sealed_frames_are_counted_per_key() {
    let ring = ring();
    ring.set(KeyIndex(6), &other_key()).unwrap();
    assert_eq!((ring.sealed(INDEX), ring.sealed(KeyIndex(7))), (0, 0));
    let mut encryptor = FrameEncryptor::new(Codec::Opus, ring.clone()).unwrap();
    for _ in 0..3 {
        encryptor.seal(INDEX, b"\x78abc", &mut Vec::new()).unwrap();
    }
    DataEncryptor::new(ring.clone()).seal(INDEX, b"abc").unwrap();
    encryptor.seal(KeyIndex(6), b"\x78abc", &mut Vec::new()).unwrap();
    assert_eq!((ring.sealed(INDEX), ring.sealed(KeyIndex(6))), (4, 1));
}

// Shared passwords.

#[test]
fn members_with_the_same_password_open_each_others_frames_once() {
    let rings = [(); 2].map(|()| KeyRing::new());
    for ring in &rings {
        ring.set_password(INDEX, PASSWORD).unwrap();
    }
    for codec in CODECS {
        for (ours, theirs) in [(&rings[0], &rings[1]), (&rings[1], &rings[0])] {
            let wire = seal(codec, ours, &frame(codec));
            let mut decryptor = decryptor(codec, theirs);
            assert_eq!(open(&mut decryptor, &wire), Ok(frame(codec)));
            assert_eq!(open(&mut decryptor, &wire), Err(OpenError::Replayed(INDEX)));
        }
    }
    let wire = seal(Codec::Opus, &rings[0], &frame(Codec::Opus));
    let wrong = KeyRing::new();
    wrong.set_password(INDEX, "correct horse battery stable").unwrap();
    assert_eq!(open(&mut decryptor(Codec::Opus, &wrong), &wire), Err(OpenError::Unauthentic(INDEX)));
}

#[test]
fn password_set_again_continues_budget_and_replay_window() {
    let ring = KeyRing::new();
    ring.set_password(INDEX, PASSWORD).unwrap();
    let wire = seal(Codec::Opus, &ring, &frame(Codec::Opus));
    let mut decryptor = decryptor(Codec::Opus, &ring);
    assert_eq!(open(&mut decryptor, &wire), Ok(frame(Codec::Opus)));
    ring.clear();
    ring.set_password(INDEX, PASSWORD).unwrap();
    assert_eq!(open(&mut decryptor, &wire), Err(OpenError::Replayed(INDEX)));
    assert_eq!(ring.sealed(INDEX), 1);
    ring.find(INDEX).unwrap().leave_budget(0);
    let mut encryptor = FrameEncryptor::new(Codec::Opus, ring).unwrap();
    assert_eq!(encryptor.seal(INDEX, b"\x78abc", &mut Vec::new()), Err(SealError::KeyExhausted));
}

// Hostile parser input and leaks.

#[test]
fn megabyte_of_zeros_start_codes_or_escapes_is_only_a_bad_frame() {
    const MEGABYTE: usize = 1 << 20;
    for codec in [Codec::H264, Codec::H265] {
        for pattern in [&[0][..], &[0, 0, 1], &[0, 0, 0, 1], &[0, 0, 3], &[0, 0, 1, 0x67], &[0, 0, 1, 0x7e]] {
            for head in [&[][..], &[0, 0, 0, 1, 0x41, 2], &[0, 0, 0, 1, 2, 1]] {
                let bomb = [head, &pattern.repeat(MEGABYTE / pattern.len()), &[12, INDEX.0]].concat();
                let mut decryptor = decryptor(codec, &ring());
                assert!(open(&mut decryptor, &bomb).is_err(), "{codec:?} {pattern:?}");
                let mut encryptor = FrameEncryptor::new(codec, ring()).unwrap();
                let mut wire = Vec::new();
                if encryptor.seal(INDEX, &bomb, &mut wire).is_ok() {
                    let few_escapes = bomb.len() + bomb.len() / 256 + 300;
                    assert!(wire.len() <= few_escapes, "sealed bytes are random");
                    assert!(open(&mut decryptor, &wire).is_ok());
                }
            }
        }
    }
}

#[test]
fn debug_output_has_no_key_byte() {
    let ring = ring();
    ring.set_password(KeyIndex(9), PASSWORD).unwrap();
    let wire = seal(Codec::Vp8, &ring, &frame(Codec::Vp8));
    let mut decryptor = decryptor(Codec::Vp8, &ring);
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

// Data packets.

#[test]
fn data_packet_opens_under_its_key_once() {
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

/// A VP9 frame has no clear bytes, so the cipher cannot tell it from a data packet. The replay window can.
#[test]
fn opened_vp9_frame_is_not_delivered_as_data() {
    let ring = ring();
    let wire = seal(Codec::Vp9, &ring, b"a VP9 frame");
    assert_eq!(open(&mut decryptor(Codec::Vp9, &ring), &wire), Ok(b"a VP9 frame".to_vec()));
    let (value, rest) = wire.split_at(wire.len() - 14);
    let as_data = DataDecryptor::new(ring).open(&rest[..12], INDEX, value);
    assert_eq!(as_data, Err(OpenError::Replayed(INDEX)));
}

// Properties.

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
        trailer in proptest::collection::vec(0..4u8, 0..3),
    ) {
        let trailer = SifTrailer::new(&trailer);
        for codec in CODECS {
            let mut decryptor = decryptor(codec, &ring());
            for wire in [bytes.clone(), [&bytes[..], &[12, INDEX.0]].concat()] {
                let mut out = vec![1];
                let opened = decryptor.open(Instant::now(), &wire, trailer.as_ref(), &mut out);
                prop_assert!(!matches!(opened, Ok(Opened::Frame(_))));
                prop_assert!(out.is_empty());
            }
        }
    }

    #[test]
    fn sealed_frame_opens(codec in proptest::sample::select(&CODECS[..3]), bytes in hostile_bytes()) {
        let frame = [&frame(codec)[..], &bytes].concat();
        let wire = seal(codec, &ring(), &frame);
        prop_assert_eq!(wire.len(), frame.len() + OVERHEAD);
        let mut decryptor = decryptor(codec, &ring());
        prop_assert_eq!(open(&mut decryptor, &wire), Ok(frame));
    }

    /// Any unit that can be sealed opens. Its header is canonical after one pass, so a second changes nothing.
    #[test]
    fn access_unit_opens_in_canonical_form(codec in proptest::sample::select(&CODECS[3..]), unit in access_unit()) {
        let mut encryptor = FrameEncryptor::new(codec, ring()).unwrap();
        let mut wire = Vec::new();
        if encryptor.seal(INDEX, &unit, &mut wire).is_ok() && !unit.is_empty() {
            let mut decryptor = decryptor(codec, &ring());
            let canonical = open(&mut decryptor, &wire).unwrap();
            encryptor.seal(INDEX, &canonical, &mut wire).unwrap();
            prop_assert_eq!(open(&mut decryptor, &wire), Ok(canonical));
        }
    }

    #[test]
    fn canonical_unit_is_unchanged(
        codec in proptest::sample::select(&CODECS[3..]),
        payload in hostile_bytes(),
    ) {
        let unit = [&frame(codec)[..], &payload].concat();
        let wire = seal(codec, &ring(), &unit);
        let sealed = &wire[Rule::of(codec).unwrap().layout(&wire).clear..];
        prop_assert!(!sealed.windows(3).any(|w| w[..2] == [0, 0] && w[2] < 3), "no start code");
        let mut decryptor = decryptor(codec, &ring());
        prop_assert_eq!(open(&mut decryptor, &wire), Ok(unit));
    }
}

fn hostile_bytes() -> impl Strategy<Value = Vec<u8>> {
    proptest::collection::vec(prop_oneof![3 => 0..4u8, 1 => any::<u8>()], 0..600)
}

/// NAL units of all types after start codes of both lengths.
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

fn other_key() -> MediaKey {
    MediaKey::new(vec![1; 32]).unwrap()
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

fn decryptor(codec: Codec, ring: &KeyRing) -> FrameDecryptor {
    FrameDecryptor::new(codec, ring.clone()).unwrap()
}

fn open(decryptor: &mut FrameDecryptor, wire: &[u8]) -> Result<Vec<u8>, OpenError> {
    let mut out = Vec::new();
    decryptor.open(Instant::now(), wire, None, &mut out).map(|_| out)
}
