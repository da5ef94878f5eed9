#![allow(clippy::disallowed_methods, reason = "an arbitrary origin for virtual time")]

use proptest::prelude::*;

use super::*;
use crate::transport::rtc::tests::{CODECS, Wire, plain, send};

const PATIENCE: Duration = Duration::from_millis(350);

fn opus(sequence: u16) -> IncomingPacket {
    IncomingPacket { sequence, timestamp: 0, marker: false, payload: Bytes::from_static(b"abc") }
}

fn drain(reassembler: &mut Reassembler, now: Instant) -> Vec<Wire> {
    let mut frame = Vec::new();
    std::iter::from_fn(|| {
        let rtp_timestamp = reassembler.next_frame(now, &mut frame)?.rtp_timestamp;
        Some(Wire { rtp_timestamp, frame: frame.clone() })
    })
    .collect()
}

/// Two frames of five packets each, and their packets.
fn two_frames() -> ([Wire; 2], Vec<IncomingPacket>) {
    let frames = [1, 2].map(|seed| Wire {
        rtp_timestamp: u32::from(seed) * 3000,
        frame: plain(Codec::Vp8, false, 5000, seed),
    });
    let packets = send(Codec::Vp8, &frames);
    assert_eq!(packets.len(), 10);
    (frames, packets)
}

#[test]
fn frame_with_missing_packet_never_comes_out() {
    let now = Instant::now();
    let ([_, second], packets) = two_frames();
    let mut back = Reassembler::new(Codec::Vp8);
    for (index, packet) in packets.into_iter().enumerate() {
        if index != 2 {
            back.push(now, packet);
        }
        assert_eq!(drain(&mut back, now), [], "the gap may still close");
    }
    assert_eq!(back.deadline(), Some(now + PATIENCE));
    assert_eq!(drain(&mut back, now + PATIENCE), [second]);
    assert!(back.take_loss());
    assert!(!back.take_loss(), "each loss is reported once");
    assert_eq!(back.deadline(), None);
}

#[test]
fn retransmission_within_patience_closes_the_gap() {
    let now = Instant::now();
    let (frames, mut packets) = two_frames();
    let mut back = Reassembler::new(Codec::Vp8);
    let missing = packets.remove(3);
    packets.into_iter().for_each(|packet| back.push(now, packet));
    let later = now + PATIENCE - Duration::from_millis(1);
    assert_eq!(drain(&mut back, later), []);
    back.push(later, missing.clone());
    assert_eq!(drain(&mut back, later), frames);
    back.push(later, missing);
    assert_eq!(drain(&mut back, later + PATIENCE), [], "a duplicate yields nothing");
    assert!(!back.take_loss());
}

#[test]
fn second_gap_does_not_wait_for_the_first() {
    let now = Instant::now();
    let mut back = Reassembler::new(Codec::Opus);
    for (sequence, at) in [(0, 0), (2, 10), (4, 20)] {
        back.push(now + Duration::from_millis(at), opus(sequence));
    }
    assert_eq!(drain(&mut back, now).len(), 1);
    assert_eq!(back.deadline(), Some(now + Duration::from_millis(50)));
    assert_eq!(drain(&mut back, now + Duration::from_millis(50)).len(), 1);
    assert_eq!(back.deadline(), Some(now + Duration::from_millis(60)));
}

#[test]
fn audio_waits_longer_while_packets_come_late() {
    let begin = Instant::now();
    let after = |millis| begin + Duration::from_millis(millis);
    let mut back = Reassembler::new(Codec::Opus);
    back.push(after(0), opus(0));
    back.push(after(20), opus(2));
    assert_eq!(drain(&mut back, after(59)).len(), 1);
    assert_eq!(drain(&mut back, after(60)).len(), 1, "the gap is given up");
    back.push(after(100), opus(1));
    back.push(after(100), opus(4));
    assert_eq!(back.deadline(), Some(after(180)), "a wait of 80 ms would have been enough");
    drain(&mut back, after(180));
    back.push(after(900), opus(3));
    back.push(after(1000), opus(6));
    assert_eq!(back.deadline(), Some(after(1160)), "no sound is worth a longer wait");

    let mut now = after(1160);
    for sequence in (8..400).step_by(2) {
        drain(&mut back, now);
        back.push(now, opus(sequence));
        now = back.deadline().unwrap();
    }
    back.push(now, opus(500));
    drain(&mut back, now);
    let wait = back.deadline().unwrap() - now;
    assert!(wait < Duration::from_millis(45), "after losses only, {wait:?}");
}

#[test]
fn frame_without_marker_ends_where_the_next_begins() {
    let now = Instant::now();
    for codec in [Codec::Vp8, Codec::Vp9, Codec::H264, Codec::H265, Codec::Av1] {
        let frames = [3000, 6000, 9000]
            .map(|rtp_timestamp| Wire { rtp_timestamp, frame: plain(codec, rtp_timestamp == 3000, 2000, 1) });
        let mut back = Reassembler::new(codec);
        for packet in send(codec, &frames) {
            back.push(now, IncomingPacket { marker: packet.timestamp == 9000 && packet.marker, ..packet });
        }
        assert_eq!(drain(&mut back, now), frames, "{codec:?}");
        assert!(!back.take_loss());
    }
}

#[test]
fn receiver_that_joins_within_a_frame_begins_with_the_next() {
    let now = Instant::now();
    let ([_, second], packets) = two_frames();
    let mut back = Reassembler::new(Codec::Vp8);
    packets.into_iter().skip(2).for_each(|packet| back.push(now, packet));
    assert_eq!(drain(&mut back, now), [second]);
    assert!(back.take_loss(), "the decoder needs a key frame");
}

#[test]
fn frame_that_begins_in_the_middle_is_dropped() {
    let now = Instant::now();
    let ([first, _], mut packets) = two_frames();
    // The sixth packet is the first of the second frame; without its S bit, the beginning was never sent.
    packets.remove(5);
    for (packet, sequence) in packets.iter_mut().zip(0..) {
        packet.sequence = sequence;
    }
    let mut back = Reassembler::new(Codec::Vp8);
    packets.into_iter().for_each(|packet| back.push(now, packet));
    assert_eq!(drain(&mut back, now), [first]);
    assert!(back.take_loss());
}

#[test]
fn later_slices_of_a_damaged_picture_are_dropped() {
    let now = Instant::now();
    let slices = |first: u8| [0x80, 0x40, 0x20].map(|position| vec![0, 0, 0, 1, first, position, 7]).concat();
    let frames = [0, 3000, 6000].map(|rtp_timestamp| Wire { rtp_timestamp, frame: slices(0x41) });
    for lost in [3, 4] {
        let mut back = Reassembler::new(Codec::H264);
        for (index, packet) in send(Codec::H264, &frames).into_iter().enumerate() {
            if index != lost {
                back.push(now, packet);
            }
        }
        assert_eq!(drain(&mut back, now + PATIENCE), [frames[0].clone(), frames[2].clone()]);
    }
}

#[test]
fn padding_is_skipped_within_and_between_frames() {
    let now = Instant::now();
    let (frames, packets) = two_frames();
    let mut back = Reassembler::new(Codec::Vp8);
    let mut sequence = 100;
    for packet in packets {
        for payload in [Bytes::new(), packet.payload] {
            back.push(now, IncomingPacket { sequence, payload, ..packet });
            sequence += 1;
        }
    }
    assert_eq!(drain(&mut back, now), frames);
    assert!(!back.take_loss());
}

#[test]
fn malformed_packet_costs_only_its_frame() {
    let now = Instant::now();
    let ([_, second], mut packets) = two_frames();
    packets[2].payload = Bytes::from_static(&[0x90]);
    let mut back = Reassembler::new(Codec::Vp8);
    packets.into_iter().for_each(|packet| back.push(now, packet));
    assert_eq!(drain(&mut back, now), [second]);
    assert!(back.take_loss());
}

#[test]
fn contradictory_fragments_cost_only_their_frame() {
    let now = Instant::now();
    let frames =
        [3000, 6000].map(|rtp_timestamp| Wire { rtp_timestamp, frame: plain(Codec::H264, true, 2000, 1) });
    let mut packets = send(Codec::H264, &frames);
    // The first fragment turns into a unit of its own.
    packets[1].payload = Bytes::from_static(&[0x65, 0x88]);
    let mut back = Reassembler::new(Codec::H264);
    packets.into_iter().for_each(|packet| back.push(now, packet));
    assert_eq!(drain(&mut back, now), frames[1..]);
    assert!(back.take_loss());
}

#[test]
fn sender_that_starts_over_is_followed() {
    let now = Instant::now();
    // Behind and ahead of the last number.
    for start in [100, 40_000] {
        let mut back = Reassembler::new(Codec::Opus);
        back.push(now, opus(20_000));
        let mut received = drain(&mut back, now).len();
        for sequence in start..start + 200 {
            back.push(now, opus(sequence));
            received += drain(&mut back, now).len();
        }
        assert!(received > 200 - RESTART_AFTER as usize);
        assert!(back.take_loss());
    }
}

#[test]
fn few_late_packets_do_not_restart() {
    let now = Instant::now();
    let mut back = Reassembler::new(Codec::Opus);
    for sequence in 1000..1200 {
        back.push(now, opus(sequence));
        back.push(now, opus(sequence - 500));
        assert_eq!(drain(&mut back, now).len(), 1);
    }
    assert!(!back.take_loss());
}

#[test]
fn gap_that_never_closes_is_bounded() {
    let now = Instant::now();
    let mut back = Reassembler::new(Codec::Opus);
    back.push(now, opus(0));
    let mut received = drain(&mut back, now).len();
    for sequence in 2..10_000 {
        back.push(now, opus(sequence));
        assert!(back.window.len() <= WINDOW_PACKETS);
        received += drain(&mut back, now).len();
    }
    assert_eq!(received, 9_999, "one packet is missing, no other");
}

#[test]
fn waiting_bytes_are_bounded() {
    let now = Instant::now();
    let mut back = Reassembler::new(Codec::Vp8);
    let payload = Bytes::from(vec![0x10; 60_000]);
    back.push(now, IncomingPacket { payload: payload.clone(), ..opus(0) });
    for sequence in 2..500 {
        back.push(now, IncomingPacket { payload: payload.clone(), ..opus(sequence) });
        assert!(back.size <= WINDOW_BYTES);
        drain(&mut back, now);
    }
}

#[test]
fn frame_that_never_ends_is_bounded() {
    let now = Instant::now();
    let mut back = Reassembler::new(Codec::Vp8);
    for sequence in 0..5000 {
        let payload = Bytes::from_static(&[0x10, 1]);
        back.push(now, IncomingPacket { payload, ..opus(sequence) });
        assert_eq!(drain(&mut back, now), []);
        assert!(back.window.len() <= WINDOW_PACKETS);
    }
    assert!(back.take_loss());
}

#[test]
fn steady_stream_allocates_nothing() {
    let now = Instant::now();
    for codec in CODECS {
        let frames: Vec<_> = (0..40)
            .map(|n| Wire { rtp_timestamp: n * 3000, frame: plain(codec, n == 0, 1300, n as u8) })
            .collect();
        let (mut back, mut frame) = (Reassembler::new(codec), Vec::with_capacity(2000));
        let room = (back.window.capacity(), frame.capacity());
        let mut received = 0;
        for packet in send(codec, &frames) {
            back.push(now, packet);
            while back.next_frame(now, &mut frame).is_some() {
                received += 1;
            }
        }
        assert_eq!(received, 40);
        assert_eq!((back.window.capacity(), frame.capacity()), room, "{codec:?}");
    }
}

proptest! {
    #[test]
    fn arbitrary_packets_neither_panic_nor_grow(
        packets in prop::collection::vec(
            (0_u16..400, 0_u32..4, any::<bool>(), prop::collection::vec(any::<u8>(), 0..40)),
            0..300,
        ),
        jump in any::<u16>(),
    ) {
        let start = Instant::now();
        for codec in CODECS {
            let (mut back, mut frame) = (Reassembler::new(codec), Vec::new());
            for (i, (sequence, timestamp, marker, payload)) in packets.iter().enumerate() {
                let now = start + Duration::from_millis(i as u64 * 7);
                let sequence = if i < 200 { *sequence } else { sequence.wrapping_add(jump) };
                let (timestamp, marker, payload) = (*timestamp, *marker, payload.clone().into());
                back.push(now, IncomingPacket { sequence, timestamp, marker, payload });
                while back.next_frame(now, &mut frame).is_some() {
                    prop_assert!(!frame.is_empty());
                    prop_assert!(frame.len() <= 300 * 40 * 5, "five bytes for a unit of one");
                }
                prop_assert!(frame.is_empty());
                prop_assert!(back.window.len() <= WINDOW_PACKETS);
                prop_assert!(back.window.back().is_none_or(Option::is_some));
                let size: usize = back.window.iter().flatten().map(|packet| packet.payload.len()).sum();
                prop_assert_eq!(back.size, size);
            }
        }
    }
}
