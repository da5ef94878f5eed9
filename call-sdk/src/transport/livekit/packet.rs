//! Frames into RTP payloads and back. Payloads are opaque: nothing here looks past the VP8 payload descriptor.

use std::{
    collections::{BTreeMap, VecDeque},
    time::{Duration, Instant},
};

use bytes::{BufMut as _, Bytes, BytesMut};

use crate::{media::Codec, transport::WireFrame};

/// Room for a frame in one packet, in bytes. 1200 bytes of RTP is what every path carries; the rest of it goes
/// to the RTP header with one extension and to the VP8 payload descriptor.
const CHUNK: usize = 1150;
/// The longest Opus frame, plus what frame encryption adds; anything larger would be fragmented by IP.
const LONGEST_AUDIO: usize = 1400;
/// The largest video frame that is packetised or put together, in bytes.
const LARGEST_FRAME: usize = 4 << 20;
/// How many packets may wait behind a gap.
const LARGEST_WINDOW: usize = 2048;
/// So many packets in a row from before the window mean that the sender started over.
const RESTART_AFTER: u32 = 64;

/// One packet's worth of a frame, on its way out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct OutgoingPacket {
    pub(super) sequence: u16,
    pub(super) marker: bool,
    pub(super) payload: Bytes,
}

/// Cuts the frames of one track into packets. Lives as long as the track, across reconnections.
#[derive(Debug)]
pub(super) struct Packetiser {
    codec: Codec,
    sequence: u16,
    picture: u16,
}

impl Packetiser {
    /// `sequence` and `picture` are where the counters start; random, so that a restart is not mistaken for
    /// retransmission.
    pub(super) fn new(codec: Codec, sequence: u16, picture: u16) -> Self {
        // The first 2^15 numbers: a receiver that joins just before the first wrap guesses a wrong SRTP
        // rollover counter (RFC 3711 §3.3.1).
        Self { codec, sequence: sequence & 0x7fff, picture: picture & 0x7fff }
    }

    /// The packets of one frame; none if the frame is empty or too large to send.
    pub(super) fn packetise(&mut self, frame: &Bytes) -> Vec<OutgoingPacket> {
        if self.codec.is_audio() { self.audio(frame) } else { self.video(frame) }
    }

    fn audio(&mut self, frame: &Bytes) -> Vec<OutgoingPacket> {
        if frame.is_empty() || frame.len() > LONGEST_AUDIO {
            return Vec::new();
        }
        vec![OutgoingPacket { sequence: self.advance(), marker: false, payload: frame.clone() }]
    }

    /// RFC 7741 §4.2: X=1, I=1, M=1 (15-bit picture id), S on the first packet, marker on the last. The picture
    /// id is not optional in practice: LiveKit needs it to splice layers and to resume after a mute.
    fn video(&mut self, frame: &Bytes) -> Vec<OutgoingPacket> {
        if frame.is_empty() || frame.len() > LARGEST_FRAME {
            return Vec::new();
        }
        let picture = self.picture;
        self.picture = (picture + 1) & 0x7fff;
        let count = frame.len().div_ceil(CHUNK);
        // Equal sizes, so that no packet of a frame is much easier to lose than another.
        let size = frame.len().div_ceil(count);
        (0..count)
            .map(|index| {
                let part = frame.slice(index * size..((index + 1) * size).min(frame.len()));
                let mut payload = BytesMut::with_capacity(part.len() + 4);
                payload.put_u8(if index == 0 { 0x90 } else { 0x80 });
                payload.put_u8(0x80);
                payload.put_u16(0x8000 | picture);
                payload.put_slice(&part);
                OutgoingPacket {
                    sequence: self.advance(),
                    marker: index + 1 == count,
                    payload: payload.freeze(),
                }
            })
            .collect()
    }

    fn advance(&mut self) -> u16 {
        let sequence = self.sequence;
        self.sequence = sequence.wrapping_add(1);
        sequence
    }
}

/// What of a received RTP packet matters for putting frames together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct IncomingPacket {
    pub(super) sequence: u16,
    pub(super) timestamp: u32,
    pub(super) marker: bool,
    pub(super) payload: Bytes,
}

/// Puts packets in order and frames together. A frame comes out once, whole, or not at all.
///
/// Drain [`Self::next_frame`] after every [`Self::push`], and again when [`Self::deadline`] has passed.
#[derive(Debug)]
pub(super) struct Reassembler {
    audio: bool,
    patience: Duration,
    extend: SequenceExtender,
    /// The sequence number that is consumed next.
    next: Option<u64>,
    /// Packets that wait for an earlier one.
    window: BTreeMap<u64, IncomingPacket>,
    window_bytes: usize,
    /// Since when the first packet of the window waits.
    waiting_since: Option<Instant>,
    late_in_a_row: u32,
    building: Option<Building>,
    ready: VecDeque<WireFrame>,
    lost: bool,
}

impl Reassembler {
    /// For a stream of `codec`.
    pub(super) fn new(codec: Codec) -> Self {
        Self {
            audio: codec.is_audio(),
            // Video waits for two rounds of NACK and RTX; audio only for reordering, as a late sound is a gap
            // that has been heard.
            patience: Duration::from_millis(if codec.is_audio() { 40 } else { 350 }),
            extend: SequenceExtender::default(),
            next: None,
            window: BTreeMap::new(),
            window_bytes: 0,
            waiting_since: None,
            late_in_a_row: 0,
            building: None,
            ready: VecDeque::new(),
            lost: false,
        }
    }

    /// Takes a packet; duplicates and packets from before the present position are dropped.
    pub(super) fn push(&mut self, now: Instant, packet: IncomingPacket) {
        let sequence = self.extend.extend(packet.sequence);
        let next = *self.next.get_or_insert(sequence);
        if sequence < next {
            self.late_in_a_row += 1;
            if self.late_in_a_row < RESTART_AFTER {
                return;
            }
            self.restart();
            let sequence = self.extend.extend(packet.sequence);
            self.next = Some(sequence);
            self.window_bytes += packet.payload.len();
            self.window.insert(sequence, packet);
        } else {
            self.late_in_a_row = 0;
            let size = packet.payload.len();
            if let std::collections::btree_map::Entry::Vacant(entry) = self.window.entry(sequence) {
                entry.insert(packet);
                self.window_bytes += size;
            }
        }
        self.advance(now);
    }

    /// The next whole frame, in order.
    pub(super) fn next_frame(&mut self, now: Instant) -> Option<WireFrame> {
        self.advance(now);
        self.ready.pop_front()
    }

    /// When to call [`Self::next_frame`] again although no packet came: a gap is then given up.
    pub(super) fn deadline(&self) -> Option<Instant> {
        Some(self.waiting_since? + self.patience)
    }

    /// Whether packets were given up since the last call.
    pub(super) fn take_loss(&mut self) -> bool {
        std::mem::take(&mut self.lost)
    }

    fn advance(&mut self, now: Instant) {
        loop {
            let moved = self.consume_run();
            if self.window.is_empty() {
                self.waiting_since = None;
                return;
            }
            let since = match self.waiting_since {
                Some(since) if !moved => since,
                _ => *self.waiting_since.insert(now),
            };
            let overdue = now.saturating_duration_since(since) >= self.patience;
            let full = self.window.len() > LARGEST_WINDOW || self.window_bytes > LARGEST_FRAME;
            if !overdue && !full {
                return;
            }
            self.give_up_gap();
        }
    }

    /// Consumes packets up to the first gap; says whether there was any.
    fn consume_run(&mut self) -> bool {
        let mut moved = false;
        while let Some(next) = self.next
            && let Some(packet) = self.window.remove(&next)
        {
            self.window_bytes -= packet.payload.len();
            self.next = Some(next + 1);
            self.consume(packet);
            moved = true;
        }
        moved
    }

    fn give_up_gap(&mut self) {
        self.lost = true;
        self.building = None;
        self.next = self.window.keys().next().copied();
    }

    fn restart(&mut self) {
        self.extend = SequenceExtender::default();
        self.window.clear();
        self.window_bytes = 0;
        self.waiting_since = None;
        self.late_in_a_row = 0;
        self.building = None;
        self.lost = true;
    }

    fn consume(&mut self, packet: IncomingPacket) {
        // An SFU probes bandwidth with packets that hold only padding.
        if packet.payload.is_empty() {
            return;
        }
        if self.audio {
            self.ready.push_back(WireFrame { payload: packet.payload, rtp_timestamp: packet.timestamp });
            return;
        }
        let Some(descriptor) = Vp8Descriptor::parse(&packet.payload) else {
            self.building = None;
            self.lost = true;
            return;
        };
        let part = packet.payload.slice(descriptor.length..);
        let same_frame = self.building.as_ref().is_some_and(|b| b.timestamp == packet.timestamp);
        if !same_frame {
            // No packet is missing between the two, so the frame before ended although its marker is lost.
            self.finish();
            if !descriptor.starts_frame {
                self.lost = true;
                return;
            }
            self.building = Some(Building { timestamp: packet.timestamp, parts: Vec::new(), size: 0 });
        }
        if let Some(building) = &mut self.building {
            building.size += part.len();
            building.parts.push(part);
            if building.size > LARGEST_FRAME || building.parts.len() > LARGEST_FRAME / 64 {
                self.building = None;
                self.lost = true;
                return;
            }
        }
        if packet.marker {
            self.finish();
        }
    }

    fn finish(&mut self) {
        let Some(mut building) = self.building.take() else { return };
        let payload = match building.parts.len() {
            1 => building.parts.swap_remove(0),
            _ => {
                let mut whole = BytesMut::with_capacity(building.size);
                building.parts.iter().for_each(|part| whole.put_slice(part));
                whole.freeze()
            }
        };
        if !payload.is_empty() {
            self.ready.push_back(WireFrame { payload, rtp_timestamp: building.timestamp });
        }
    }
}

#[derive(Debug)]
struct Building {
    timestamp: u32,
    parts: Vec<Bytes>,
    size: usize,
}

/// Turns 16-bit sequence numbers into numbers that do not wrap.
#[derive(Debug, Default)]
pub(super) struct SequenceExtender {
    highest: Option<u64>,
}

impl SequenceExtender {
    /// The number nearest to the highest one so far that ends in `sequence`.
    pub(super) fn extend(&mut self, sequence: u16) -> u64 {
        let Some(highest) = self.highest else {
            // Away from zero, so that an earlier packet still has a number.
            let first = (1 << 32) + u64::from(sequence);
            self.highest = Some(first);
            return first;
        };
        #[expect(clippy::cast_possible_truncation, reason = "the low 16 bits are what is compared")]
        let step = sequence.wrapping_sub(highest as u16);
        let extended =
            if step < 0x8000 { highest + u64::from(step) } else { highest - u64::from(step.wrapping_neg()) };
        self.highest = Some(highest.max(extended));
        extended
    }
}

/// RFC 7741 §4.2, as far as it concerns frame boundaries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Vp8Descriptor {
    length: usize,
    starts_frame: bool,
}

impl Vp8Descriptor {
    fn parse(payload: &[u8]) -> Option<Self> {
        let first = *payload.first()?;
        let starts_frame = first & 0x10 != 0 && first & 0x07 == 0;
        let mut length = 1;
        if first & 0x80 != 0 {
            let extension = *payload.get(length)?;
            length += 1;
            if extension & 0x80 != 0 {
                length += if payload.get(length)? & 0x80 != 0 { 2 } else { 1 };
            }
            if extension & 0x40 != 0 {
                length += 1;
            }
            if extension & 0x30 != 0 {
                length += 1;
            }
        }
        (length < payload.len()).then_some(Self { length, starts_frame })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::disallowed_methods, reason = "an arbitrary origin for virtual time")]

    use proptest::prelude::*;

    use super::*;

    fn start() -> Instant {
        Instant::now()
    }

    fn frame(size: usize, seed: u8) -> Bytes {
        (0..size).map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed)).collect::<Vec<_>>().into()
    }

    fn incoming(packets: Vec<OutgoingPacket>, timestamp: u32) -> Vec<IncomingPacket> {
        packets
            .into_iter()
            .map(|p| IncomingPacket { sequence: p.sequence, timestamp, marker: p.marker, payload: p.payload })
            .collect()
    }

    fn drain(reassembler: &mut Reassembler, now: Instant) -> Vec<WireFrame> {
        std::iter::from_fn(|| reassembler.next_frame(now)).collect()
    }

    #[test]
    fn a_large_frame_survives() {
        let mut out = Packetiser::new(Codec::Vp8, 7, 0x7fff);
        let packets = out.packetise(&frame(20_000, 1));
        assert_eq!(packets.len(), 18);
        assert!(packets.iter().all(|p| p.payload.len() <= CHUNK + 4));
        assert_eq!(packets.iter().filter(|p| p.marker).count(), 1);
        let mut back = Reassembler::new(Codec::Vp8);
        for packet in incoming(packets, 9000) {
            back.push(start(), packet);
        }
        assert_eq!(drain(&mut back, start()), [WireFrame { payload: frame(20_000, 1), rtp_timestamp: 9000 }]);
        assert!(!back.take_loss());
    }

    #[test]
    fn a_frame_with_a_missing_packet_never_comes_out() {
        let now = start();
        let mut out = Packetiser::new(Codec::Vp8, 0, 0);
        let mut back = Reassembler::new(Codec::Vp8);
        let damaged = incoming(out.packetise(&frame(5000, 1)), 1);
        let whole = incoming(out.packetise(&frame(5000, 2)), 2);
        for (index, packet) in damaged.into_iter().enumerate() {
            if index != 2 {
                back.push(now, packet);
            }
        }
        for packet in whole {
            back.push(now, packet);
        }
        assert_eq!(drain(&mut back, now), [], "the gap may still close");
        let later = back.deadline().unwrap();
        assert_eq!(drain(&mut back, later), [WireFrame { payload: frame(5000, 2), rtp_timestamp: 2 }]);
        assert!(back.take_loss());
    }

    #[test]
    fn a_retransmission_within_patience_closes_the_gap() {
        let now = start();
        let mut out = Packetiser::new(Codec::Vp8, 0, 0);
        let mut back = Reassembler::new(Codec::Vp8);
        let mut packets = incoming(out.packetise(&frame(5000, 1)), 1);
        let missing = packets.remove(3);
        for packet in packets {
            back.push(now, packet);
        }
        back.push(now + Duration::from_millis(200), missing.clone());
        assert_eq!(drain(&mut back, now + Duration::from_millis(200)).len(), 1);
        back.push(now + Duration::from_millis(210), missing);
        assert_eq!(drain(&mut back, now + Duration::from_secs(9)), [], "a duplicate yields nothing");
        assert!(!back.take_loss());
    }

    #[test]
    fn a_lost_marker_between_two_whole_runs_ends_the_frame() {
        let now = start();
        let mut out = Packetiser::new(Codec::Vp8, 0, 0);
        let mut back = Reassembler::new(Codec::Vp8);
        let mut packets = incoming(out.packetise(&frame(2000, 1)), 1);
        packets.last_mut().unwrap().marker = false;
        packets.extend(incoming(out.packetise(&frame(10, 2)), 2));
        for packet in packets {
            back.push(now, packet);
        }
        assert_eq!(drain(&mut back, now).len(), 2);
    }

    #[test]
    fn a_sender_that_starts_over_is_followed() {
        let now = start();
        let mut back = Reassembler::new(Codec::Opus);
        let packet =
            |sequence| IncomingPacket { sequence, timestamp: 0, marker: false, payload: frame(3, 0) };
        back.push(now, packet(20_000));
        for sequence in 0..200 {
            back.push(now, packet(sequence));
        }
        assert!(drain(&mut back, now).len() > 100);
    }

    #[test]
    fn an_unfillable_gap_is_bounded_in_memory() {
        let now = start();
        let mut back = Reassembler::new(Codec::Opus);
        let packet =
            |sequence| IncomingPacket { sequence, timestamp: 0, marker: false, payload: frame(3, 0) };
        back.push(now, packet(0));
        for sequence in 2..10_000 {
            back.push(now, packet(sequence));
        }
        assert!(back.window.len() <= LARGEST_WINDOW + 1);
        assert!(drain(&mut back, now).len() > 5000);
    }

    #[test]
    fn padding_only_packets_do_not_tear_a_frame() {
        let now = start();
        let mut back = Reassembler::new(Codec::Vp8);
        let mut packets = incoming(Packetiser::new(Codec::Vp8, 0, 0).packetise(&frame(2000, 1)), 1);
        packets[1].sequence = 2;
        packets.insert(1, IncomingPacket { sequence: 1, timestamp: 1, marker: false, payload: Bytes::new() });
        for packet in packets {
            back.push(now, packet);
        }
        assert_eq!(drain(&mut back, now).len(), 1);
    }

    #[test]
    fn sfu_descriptors_with_all_fields_are_skipped() {
        let parse = |bytes: &[u8]| Vp8Descriptor::parse(bytes).map(|d| (d.length, d.starts_frame));
        assert_eq!(parse(&[0x10, 1]), Some((1, true)));
        assert_eq!(parse(&[0x90, 0xe0, 0x81, 2, 3, 4, 5]), Some((6, true)));
        assert_eq!(parse(&[0x90, 0xf0, 0x01, 3, 4, 5]), Some((5, true)));
        assert_eq!(parse(&[0x81, 0x80, 0x81, 2, 5]), Some((4, false)));
        assert_eq!(parse(&[0x90, 0x80, 0x81, 2]), None, "a descriptor without a payload");
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(
            packets in prop::collection::vec(
                (any::<u16>(), any::<u32>(), any::<bool>(), prop::collection::vec(any::<u8>(), 0..12)), 0..300),
        ) {
            let now = start();
            for codec in [Codec::Vp8, Codec::Opus] {
                let mut back = Reassembler::new(codec);
                for (i, (sequence, timestamp, marker, payload)) in packets.iter().enumerate() {
                    let now = now + Duration::from_millis(i as u64 * 7);
                    back.push(now, IncomingPacket {
                        sequence: *sequence, timestamp: *timestamp, marker: *marker, payload: payload.clone().into(),
                    });
                    drain(&mut back, now);
                }
            }
        }

        #[test]
        fn shuffled_duplicated_and_lost_packets_give_only_whole_frames_in_order(
            sizes in prop::collection::vec(1_usize..6000, 1..12),
            first in any::<u16>(),
            chaos in prop::collection::vec((0_u8..12, 0_usize..6), 200),
        ) {
            let now = start();
            let mut out = Packetiser::new(Codec::Vp8, first, 0);
            let mut sent = Vec::new();
            let mut stream = Vec::new();
            for (index, size) in sizes.iter().enumerate() {
                let payload = frame(*size, index as u8);
                stream.extend(incoming(out.packetise(&payload), index as u32 * 3000));
                sent.push(WireFrame { payload, rtp_timestamp: index as u32 * 3000 });
            }
            // The first packet arrives, so that both ends agree where the stream begins.
            let mut arrivals = Vec::new();
            for (index, packet) in stream.into_iter().enumerate() {
                let (fate, shift) = chaos[index % chaos.len()];
                if index == 0 {
                    arrivals.push((0, packet));
                } else if fate == 0 {
                    continue;
                } else {
                    if fate == 1 {
                        arrivals.push((index * 2 + 7, packet.clone()));
                    }
                    arrivals.push((index * 2 + shift, packet));
                }
            }
            arrivals.sort_by_key(|(at, _)| *at);
            let lost_any = chaos.iter().any(|(fate, _)| *fate == 0);
            let mut back = Reassembler::new(Codec::Vp8);
            let mut received = Vec::new();
            for (_, packet) in arrivals {
                back.push(now, packet);
                received.extend(drain(&mut back, now));
            }
            received.extend(drain(&mut back, now + Duration::from_secs(1)));
            received.extend(drain(&mut back, now + Duration::from_secs(2)));
            prop_assert!(received.windows(2).all(|w| w[0].rtp_timestamp < w[1].rtp_timestamp));
            prop_assert!(received.iter().all(|frame| sent.contains(frame)));
            if !lost_any {
                prop_assert_eq!(received, sent);
            }
        }

        #[test]
        fn extended_numbers_follow_the_nearest_way(steps in prop::collection::vec(-3000_i32..3000, 0..200), first in any::<u16>()) {
            let mut extender = SequenceExtender::default();
            let mut truth = i64::from(first) + (1 << 32);
            let mut highest = truth;
            prop_assert_eq!(extender.extend(first) as i64, truth);
            for step in steps {
                truth = highest + i64::from(step);
                highest = highest.max(truth);
                prop_assert_eq!(extender.extend(truth as u16) as i64, truth);
            }
        }
    }
}
