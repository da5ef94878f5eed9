//! A downtrack: one track on its way to one subscriber.
//!
//! It chooses which packets of which layer pass and rewrites sequence number, timestamp and VP8 numbers so that
//! the subscriber sees one uninterrupted stream on one SSRC, whatever happens at the source. Losses before us
//! stay visible as gaps: the subscriber then asks again, and the late packet still fits where it belongs.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::MediaKind;
use super::vp8::{Descriptor, Numbers, Shift};

/// Simulcast layers that a track can have.
pub(crate) const MAX_LAYERS: usize = 4;
/// A layer without packets for this long is taken for dead.
const LAYER_DIES: Duration = Duration::from_secs(2);
/// Time between two key frame requests of one downtrack while it needs one.
const ASK_AGAIN: Duration = Duration::from_millis(500);
/// Packets remembered to recognise repeats and to place late ones.
const WINDOW: u64 = 1024;
/// A longer jump of the source's sequence numbers is a new beginning, not a loss.
const LONGEST_GAP: u64 = 1000;
/// Changes of the sequence offset remembered for late packets.
const OFFSETS: usize = 256;
/// After a silence this long the arrival time decides about the timestamp, not the senders' clocks.
const LONG_PAUSE: Duration = Duration::from_secs(2);
/// A layer whose clock is behind by more than this is not switched to.
const BEHIND: Duration = Duration::from_millis(50);
/// A timestamp may run ahead of the wall clock by this much.
const AHEAD: Duration = Duration::from_millis(25);

/// A packet of the track, as the forwarder looks at it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Incoming<'a> {
    /// Simulcast layer, 0 = lowest.
    pub(crate) layer: u8,
    /// SSRC: a new one is a new source even on the same layer.
    pub(crate) ssrc: u32,
    /// Sequence number, extended.
    pub(crate) sequence: u64,
    /// RTP timestamp.
    pub(crate) timestamp: u32,
    /// Clear of padding; empty for a packet that only probes.
    pub(crate) payload: &'a [u8],
    /// The sender's clock as its last sender report told it.
    pub(crate) clock: Option<SenderClock>,
}

/// A sender report: this wall clock time is this timestamp.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SenderClock {
    /// The sender's wall clock, microseconds since an epoch that all its layers share.
    pub(crate) wall_micros: u64,
    /// The RTP timestamp of that moment.
    pub(crate) timestamp: u32,
}

/// What to send for a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Outgoing {
    /// Sequence number, extended; the first of a downtrack is below 65 536 (the receiver's rollover counter
    /// starts at 0, RFC 3711 §3.3.1).
    pub(crate) sequence: u64,
    /// RTP timestamp.
    pub(crate) timestamp: u32,
    /// The descriptor to renumber and its new numbers; `None` passes the payload untouched.
    pub(crate) vp8: Option<(Descriptor, Numbers)>,
}

/// The forwarder of one subscription.
#[derive(Debug)]
pub(crate) struct Downtrack {
    kind: MediaKind,
    paused: bool,
    max_layer: u8,
    source: Option<Source>,
    sent: Option<Sent>,
    seen: [Option<Instant>; MAX_LAYERS],
    clocks: [Option<SenderClock>; MAX_LAYERS],
    asked: Option<Instant>,
}

/// The last packet sent, in sequence order.
#[derive(Clone, Copy, Debug)]
struct Sent {
    sequence: u64,
    timestamp: u32,
    at: Instant,
    numbers: Numbers,
    layer: u8,
    timestamp_offset: u32,
    /// The subscription was paused since: what comes next is no mere change of layer.
    interrupted: bool,
}

impl Downtrack {
    /// A downtrack that waits for its first packet (audio) or key frame (video).
    pub(crate) fn new(kind: MediaKind) -> Self {
        Self {
            kind,
            paused: false,
            max_layer: u8::MAX,
            source: None,
            sent: None,
            seen: [None; MAX_LAYERS],
            clocks: [None; MAX_LAYERS],
            asked: None,
        }
    }

    /// Pauses or resumes, and limits the layer.
    pub(crate) fn set(&mut self, paused: bool, max_layer: u8) {
        if paused && !self.paused {
            self.interrupt();
        }
        self.paused = paused;
        self.max_layer = max_layer;
        // A wish that changed is worth asking for at once.
        self.asked = None;
    }

    /// Stops; the next packet (audio) or key frame (video) begins anew on the same numbers.
    pub(crate) fn interrupt(&mut self) {
        self.source = None;
        self.asked = None;
        if let Some(sent) = &mut self.sent {
            sent.interrupted = true;
        }
    }

    /// The layer being forwarded.
    pub(crate) fn layer(&self) -> Option<u8> {
        self.source.as_ref().map(|source| source.layer)
    }

    /// The layer whose key frame this downtrack needs and has not asked for lately.
    pub(crate) fn wants_key_frame(&mut self, now: Instant) -> Option<u8> {
        if self.paused || self.kind == MediaKind::Audio {
            return None;
        }
        let target = self.target(now).unwrap_or(0);
        if self.layer() == Some(target) {
            return None;
        }
        if self.asked.is_some_and(|asked| now.saturating_duration_since(asked) < ASK_AGAIN) {
            return None;
        }
        self.asked = Some(now);
        Some(target)
    }

    /// Decides about a packet of any layer of the track; `None` drops it.
    pub(crate) fn forward(&mut self, now: Instant, packet: &Incoming<'_>) -> Option<Outgoing> {
        let layer = usize::from(packet.layer);
        *self.seen.get_mut(layer)? = Some(now);
        if packet.clock.is_some() {
            self.clocks[layer] = packet.clock;
        }
        if self.paused {
            return None;
        }
        let descriptor = match self.kind {
            MediaKind::Video if !packet.payload.is_empty() => Some(Descriptor::parse(packet.payload)?),
            _ => None,
        };
        if !self.source.as_ref().is_some_and(|source| source.is(packet)) {
            let may_start = match (&descriptor, self.kind) {
                (Some(descriptor), _) => {
                    descriptor.starts_key_frame(packet.payload) && self.accepts_layer(now, packet.layer)
                }
                (None, MediaKind::Audio) => !packet.payload.is_empty(),
                (None, MediaKind::Video) => false,
            };
            if !may_start {
                return None;
            }
            let numbers = descriptor.map_or_else(Numbers::default, |d| d.numbers);
            self.source = Some(self.switch(now, packet, &numbers)?);
        }
        let source = self.source.as_mut()?;
        let sequence = source.place(packet.sequence, packet.payload.is_empty())?;
        let timestamp = packet.timestamp.wrapping_add(source.timestamp_offset);
        let vp8 = descriptor.map(|d| (d, source.shift.apply(&d.numbers)));
        if self.sent.as_ref().is_none_or(|sent| sent.sequence < sequence) {
            self.sent = Some(Sent {
                sequence,
                timestamp,
                at: now,
                numbers: vp8.map_or_else(Numbers::default, |(_, numbers)| numbers),
                layer: packet.layer,
                timestamp_offset: source.timestamp_offset,
                interrupted: false,
            });
        }
        Some(Outgoing { sequence, timestamp, vp8 })
    }

    /// The best layer alive within the wish, else the lowest alive above it.
    fn target(&self, now: Instant) -> Option<u8> {
        let alive = |layer: &u8| {
            self.seen[usize::from(*layer)]
                .is_some_and(|seen| now.saturating_duration_since(seen) < LAYER_DIES)
        };
        let layers = 0..MAX_LAYERS as u8;
        let wished = layers.clone().filter(alive).filter(|layer| *layer <= self.max_layer).max();
        wished.or_else(|| layers.clone().find(alive))
    }

    /// Whether a key frame of a layer is taken: any while nothing is forwarded, a better one within the wish
    /// while climbing, the target itself otherwise.
    fn accepts_layer(&self, now: Instant, layer: u8) -> bool {
        let Some(current) = self.layer() else { return true };
        let target = self.target(now);
        let climbs = layer > current && layer <= self.max_layer;
        climbs || target == Some(layer)
    }

    /// A new source whose first packet continues what was sent; `None` refuses it for now.
    fn switch(&self, now: Instant, first: &Incoming<'_>, numbers: &Numbers) -> Option<Source> {
        let Some(sent) = &self.sent else {
            let out = first.sequence & 0xffff;
            return Some(Source::new(first, out, 0, Shift::default()));
        };
        let timestamp = self.continue_timestamp(now, sent, first)?;
        Some(Source::new(
            first,
            sent.sequence + 1,
            timestamp.wrapping_sub(first.timestamp),
            Shift::continuing(&sent.numbers, numbers),
        ))
    }

    /// The timestamp with which another source continues.
    fn continue_timestamp(&self, now: Instant, sent: &Sent, first: &Incoming<'_>) -> Option<u32> {
        let elapsed = now.saturating_duration_since(sent.at);
        let expected = sent.timestamp.wrapping_add(self.ticks(elapsed));
        let after_last = sent.timestamp.wrapping_add(1);
        let reference = if elapsed > LONG_PAUSE { None } else { self.by_sender_clocks(sent, first) };
        let Some(reference) = reference else {
            return Some(if expected == sent.timestamp { after_last } else { expected });
        };
        let lead = signed(reference.wrapping_sub(sent.timestamp));
        if lead <= 0 {
            if sent.interrupted {
                return Some(if expected == sent.timestamp { after_last } else { expected });
            }
            let behind = i64::from(self.ticks(BEHIND));
            return (-i64::from(lead) <= behind).then_some(after_last);
        }
        let latest = i64::from(self.ticks(elapsed + AHEAD));
        if i64::from(lead) > latest {
            return Some(if expected == sent.timestamp { after_last } else { expected });
        }
        Some(reference)
    }

    /// Where the packet lies on the outgoing time line, by the sender reports of both layers.
    fn by_sender_clocks(&self, sent: &Sent, first: &Incoming<'_>) -> Option<u32> {
        let old = (*self.clocks.get(usize::from(sent.layer))?)?;
        let new = (*self.clocks.get(usize::from(first.layer))?)?;
        let rate = i128::from(self.rate());
        let wall = i128::from(new.wall_micros)
            + i128::from(signed(first.timestamp.wrapping_sub(new.timestamp))) * 1_000_000 / rate;
        let ticks = (wall - i128::from(old.wall_micros)) * rate / 1_000_000;
        // Wrapping is wanted: timestamps are a circle of 2^32.
        let on_old = old.timestamp.wrapping_add(ticks as u32);
        Some(on_old.wrapping_add(sent.timestamp_offset))
    }

    fn rate(&self) -> u32 {
        match self.kind {
            MediaKind::Audio => 48_000,
            MediaKind::Video => 90_000,
        }
    }

    fn ticks(&self, time: Duration) -> u32 {
        (time.as_micros() * u128::from(self.rate()) / 1_000_000) as u32
    }
}

fn signed(difference: u32) -> i32 {
    difference as i32
}

/// One SSRC of one layer while it is being forwarded.
#[derive(Debug)]
struct Source {
    layer: u8,
    ssrc: u32,
    highest: u64,
    /// Earlier packets are older than what was sent before the switch.
    first: u64,
    /// From this incoming number on, outgoing = incoming − offset.
    offsets: VecDeque<(u64, i128)>,
    seen: [u64; (WINDOW / 64) as usize],
    timestamp_offset: u32,
    shift: Shift,
}

impl Source {
    fn new(first: &Incoming<'_>, out: u64, timestamp_offset: u32, shift: Shift) -> Self {
        Self {
            layer: first.layer,
            ssrc: first.ssrc,
            // One before, so that the first packet is new.
            highest: first.sequence.wrapping_sub(1),
            first: first.sequence,
            offsets: VecDeque::from([(first.sequence, i128::from(first.sequence) - i128::from(out))]),
            seen: [0; (WINDOW / 64) as usize],
            timestamp_offset,
            shift,
        }
    }

    fn is(&self, packet: &Incoming<'_>) -> bool {
        self.layer == packet.layer && self.ssrc == packet.ssrc
    }

    /// The outgoing number of a packet; `None` for a repeat, for one too old, and for one that is closed over.
    fn place(&mut self, sequence: u64, close_over: bool) -> Option<u64> {
        if sequence < self.first {
            return None;
        }
        let newest = self.highest.wrapping_add(1);
        if sequence >= newest {
            if sequence - newest > LONGEST_GAP {
                let offset = self.offset(newest)? + i128::from(sequence - newest);
                self.push_offset(sequence, offset);
                self.first = sequence;
                self.seen = [0; (WINDOW / 64) as usize];
            } else {
                (newest..=sequence).for_each(|number| self.mark(number, false));
            }
            self.highest = sequence;
        } else if newest - sequence > WINDOW || self.is_marked(sequence) {
            return None;
        }
        self.mark(sequence, true);
        let offset = self.offset(sequence)?;
        if close_over {
            // Too late to close a gap that later packets already showed: it stays a gap.
            if sequence == self.highest {
                self.push_offset(sequence + 1, offset + 1);
            }
            return None;
        }
        u64::try_from(i128::from(sequence) - offset).ok()
    }

    fn offset(&self, sequence: u64) -> Option<i128> {
        self.offsets.iter().rev().find(|(from, _)| *from <= sequence).map(|(_, offset)| *offset)
    }

    fn push_offset(&mut self, from: u64, offset: i128) {
        if self.offsets.len() == OFFSETS {
            self.offsets.pop_front();
        }
        self.offsets.push_back((from, offset));
    }

    fn mark(&mut self, sequence: u64, on: bool) {
        let bit = sequence % WINDOW;
        let word = &mut self.seen[(bit / 64) as usize];
        if on { *word |= 1 << (bit % 64) } else { *word &= !(1 << (bit % 64)) }
    }

    fn is_marked(&self, sequence: u64) -> bool {
        let bit = sequence % WINDOW;
        self.seen[(bit / 64) as usize] & 1 << (bit % 64) != 0
    }
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "virtual time begins somewhere")]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    /// A VP8 packet: 15-bit picture id, TL0PICIDX, KEYIDX; then P and filler.
    fn vp8(picture: u16, starts: bool, key: bool) -> Vec<u8> {
        let first = if starts { 0x90 } else { 0x80 };
        let [high, low] = (picture & 0x7fff).to_be_bytes();
        vec![first, 0xf0, 0x80 | high, low, picture as u8, (picture & 0x1f) as u8, u8::from(!key), 1, 2]
    }

    struct Layer {
        layer: u8,
        sequence: u64,
        timestamp: u32,
        picture: u16,
    }

    impl Layer {
        fn packet<'a>(&self, payload: &'a [u8]) -> Incoming<'a> {
            Incoming {
                layer: self.layer,
                ssrc: u32::from(self.layer) + 1,
                sequence: self.sequence,
                timestamp: self.timestamp,
                payload,
                clock: None,
            }
        }

        /// The next frame of `packets` packets through the downtrack.
        fn frame(
            &mut self,
            track: &mut Downtrack,
            now: Instant,
            packets: usize,
            key: bool,
        ) -> Vec<Option<Outgoing>> {
            self.picture = (self.picture + 1) & 0x7fff;
            self.timestamp = self.timestamp.wrapping_add(3000);
            (0..packets)
                .map(|i| {
                    self.sequence += 1;
                    track.forward(now, &self.packet(&vp8(self.picture, i == 0, key && i == 0)))
                })
                .collect()
        }
    }

    fn layer(layer: u8, sequence: u64) -> Layer {
        Layer {
            layer,
            sequence,
            timestamp: u32::from(layer) * 1_000_000 + 7,
            picture: u16::from(layer) * 500,
        }
    }

    fn picture(out: &Outgoing) -> u16 {
        out.vp8.unwrap().1.picture_id.unwrap().value
    }

    #[test]
    fn video_starts_at_a_key_frame_and_keeps_its_numbers() {
        let now = Instant::now();
        let mut track = Downtrack::new(MediaKind::Video);
        let mut source = layer(0, 70_000);
        assert!(source.frame(&mut track, now, 2, false).iter().all(Option::is_none));
        assert_eq!(track.wants_key_frame(now), Some(0));
        assert_eq!(track.wants_key_frame(now), None, "not twice within half a second");
        let out = source.frame(&mut track, now, 2, true);
        assert_eq!(out[0].unwrap().sequence, 70_003 & 0xffff);
        assert_eq!(out[0].unwrap().timestamp, source.timestamp);
        assert_eq!(picture(&out[1].unwrap()), source.picture);
        assert_eq!(track.wants_key_frame(now + ASK_AGAIN), None);
    }

    #[test]
    fn a_gap_stays_and_the_late_packet_fills_it_once() {
        let now = Instant::now();
        let mut track = Downtrack::new(MediaKind::Audio);
        let packet = |sequence, payload| Incoming {
            layer: 0,
            ssrc: 1,
            sequence,
            timestamp: sequence as u32 * 960,
            payload,
            clock: None,
        };
        let mut send = |sequence| track.forward(now, &packet(sequence, &[1])).map(|out| out.sequence);
        assert_eq!(send(10), Some(10));
        assert_eq!(send(12), Some(12));
        assert_eq!(send(11), Some(11));
        assert_eq!(send(11), None);
        assert_eq!(send(12), None);
        assert_eq!(send(9), None, "before the beginning");
    }

    #[test]
    fn probing_packets_are_closed_over_also_for_late_packets() {
        let now = Instant::now();
        let mut track = Downtrack::new(MediaKind::Audio);
        let mut send = |sequence, payload: &[u8]| {
            let packet = Incoming { layer: 0, ssrc: 1, sequence, timestamp: 0, payload, clock: None };
            track.forward(now, &packet).map(|out| out.sequence)
        };
        assert_eq!(send(10, &[1]), Some(10));
        assert_eq!(send(12, &[]), None);
        assert_eq!(send(13, &[1]), Some(12), "12 is closed over");
        assert_eq!(send(11, &[1]), Some(11), "the late one keeps its own place");
        assert_eq!(send(12, &[1]), None, "dropped once, dropped for ever");
    }

    #[test]
    fn a_long_jump_is_closed_over() {
        let now = Instant::now();
        let mut track = Downtrack::new(MediaKind::Audio);
        let mut send = |sequence| {
            let packet = Incoming { layer: 0, ssrc: 1, sequence, timestamp: 0, payload: &[1], clock: None };
            track.forward(now, &packet).map(|out| out.sequence)
        };
        assert_eq!(send(10), Some(10));
        assert_eq!(send(5000), Some(11));
        assert_eq!(send(5001), Some(12));
        assert_eq!(send(4999), None);
    }

    #[test]
    fn layers_change_at_key_frames_and_the_numbers_go_on() {
        let now = Instant::now();
        let mut track = Downtrack::new(MediaKind::Video);
        track.set(false, 2);
        let (mut low, mut high) = (layer(0, 100), layer(2, 9000));
        let last = *low.frame(&mut track, now, 3, true).last().unwrap();
        let last = last.unwrap();
        let now = now + Duration::from_millis(33);
        assert!(high.frame(&mut track, now, 3, false).iter().all(Option::is_none));
        assert_eq!(track.wants_key_frame(now), Some(2), "the better layer is alive");
        let out = high.frame(&mut track, now, 3, true);
        assert_eq!(track.layer(), Some(2));
        assert_eq!(out[0].unwrap().sequence, last.sequence + 1);
        assert_eq!(picture(&out[0].unwrap()), picture(&last) + 1);
        assert_eq!(out[0].unwrap().timestamp.wrapping_sub(last.timestamp), 2970, "33 ms by arrival");
        assert!(low.frame(&mut track, now, 1, false)[0].is_none());

        track.set(false, 0);
        assert_eq!(track.wants_key_frame(now), Some(0));
        assert!(high.frame(&mut track, now, 1, false)[0].is_some(), "the old layer goes on until then");
        assert!(low.frame(&mut track, now, 1, true)[0].is_some());
        assert_eq!(track.layer(), Some(0));
        assert!(high.frame(&mut track, now, 1, true)[0].is_none());
    }

    #[test]
    fn the_first_key_frame_is_taken_even_above_the_wish() {
        let now = Instant::now();
        let mut track = Downtrack::new(MediaKind::Video);
        track.set(false, 0);
        assert!(layer(2, 1).frame(&mut track, now, 1, true)[0].is_some());
        assert_eq!(track.layer(), Some(2));
    }

    #[test]
    fn a_dead_layer_is_left() {
        let start = Instant::now();
        let mut track = Downtrack::new(MediaKind::Video);
        let (mut low, mut high) = (layer(0, 1), layer(1, 1));
        assert!(high.frame(&mut track, start, 1, true)[0].is_some());
        let later = start + LAYER_DIES;
        assert!(low.frame(&mut track, later, 1, false)[0].is_none());
        assert_eq!(track.wants_key_frame(later), Some(0));
        assert!(low.frame(&mut track, later, 1, true)[0].is_some());
    }

    #[test]
    fn a_pause_ends_with_a_key_frame_and_the_clock_has_gone_on() {
        let start = Instant::now();
        let mut track = Downtrack::new(MediaKind::Video);
        let mut source = layer(0, 1);
        let before = source.frame(&mut track, start, 1, true)[0].unwrap();
        track.set(true, 0);
        assert!(source.frame(&mut track, start, 1, true)[0].is_none());
        assert_eq!(track.wants_key_frame(start), None);
        track.set(false, 0);
        let now = start + Duration::from_secs(5);
        assert_eq!(track.wants_key_frame(now), Some(0));
        assert!(source.frame(&mut track, now, 1, false)[0].is_none());
        let after = source.frame(&mut track, now, 1, true)[0].unwrap();
        assert_eq!(after.sequence, before.sequence + 1);
        assert_eq!(after.timestamp.wrapping_sub(before.timestamp), 450_000);
    }

    #[test]
    fn sender_reports_place_the_first_frame_of_a_layer() {
        let now = Instant::now();
        let mut track = Downtrack::new(MediaKind::Video);
        let key = vp8(1, true, true);
        let packet = |layer, timestamp, wall_micros, at| Incoming {
            layer,
            ssrc: 1,
            sequence: 1,
            timestamp,
            payload: &key,
            clock: Some(SenderClock { wall_micros, timestamp: at }),
        };
        // The low layer shows 1000 at 5 s; its first frame is at 5.1 s.
        track.forward(now, &packet(0, 1000 + 9000, 5_000_000, 1000)).unwrap();
        // The high layer shows 77 at 4 s; its frame is at 5.12 s, 20 ms later. It arrives 10 ms later.
        let now = now + Duration::from_millis(10);
        let out = track.forward(now, &packet(1, 77 + 100_800, 4_000_000, 77)).unwrap();
        assert_eq!(out.timestamp, 1000 + 9000 + 1800);
    }

    #[test]
    fn a_layer_far_behind_is_refused_and_one_slightly_behind_is_nudged() {
        let now = Instant::now();
        let key = vp8(1, true, true);
        let packet = |layer, timestamp| Incoming {
            layer,
            ssrc: 1,
            sequence: 1,
            timestamp,
            payload: &key,
            clock: Some(SenderClock { wall_micros: 0, timestamp: 0 }),
        };
        let mut track = Downtrack::new(MediaKind::Video);
        track.forward(now, &packet(0, 90_000)).unwrap();
        assert_eq!(track.forward(now, &packet(1, 90_000 - 9_000)), None, "100 ms behind");
        assert_eq!(track.forward(now, &packet(1, 90_000 - 900)).unwrap().timestamp, 90_001);
    }

    #[test]
    fn bytes_that_are_no_vp8_are_dropped() {
        let mut track = Downtrack::new(MediaKind::Video);
        let packet = Incoming { layer: 0, ssrc: 1, sequence: 1, timestamp: 1, payload: &[0x80], clock: None };
        assert_eq!(track.forward(Instant::now(), &packet), None);
        let packet = Incoming { layer: 200, payload: &[0x10, 0], ..packet };
        assert_eq!(track.forward(Instant::now(), &packet), None);
    }

    #[derive(Clone, Debug)]
    enum Step {
        Frame { layer: u8, packets: usize, key: bool, keep: u8, swap: bool },
        Probe { layer: u8 },
        Wish { paused: bool, max_layer: u8 },
        Repeat,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            8 => (0u8..3, 1usize..5, proptest::bool::weighted(0.3), any::<u8>(), any::<bool>()).prop_map(
                |(layer, packets, key, keep, swap)| Step::Frame { layer, packets, key, keep, swap }),
            1 => (0u8..3).prop_map(|layer| Step::Probe { layer }),
            1 => (proptest::bool::weighted(0.2), 0u8..3)
                .prop_map(|(paused, max_layer)| Step::Wish { paused, max_layer }),
            1 => Just(Step::Repeat),
        ];
        proptest::collection::vec(step, 1..200)
    }

    proptest! {
        /// Random loss, swaps, probing, pauses and switches: no number is used twice, timestamps and picture
        /// ids never go back, and they change together with the frame.
        #[test]
        fn one_continuous_stream_whatever_happens(steps in steps()) {
            let mut now = Instant::now();
            let mut track = Downtrack::new(MediaKind::Video);
            let mut layers = [layer(0, 65_000), layer(1, 3), layer(2, 1_000_000)];
            let mut out: Vec<Outgoing> = vec![];
            let mut last: Option<(u8, u64, u32, Vec<u8>)> = None;
            for step in steps {
                now += Duration::from_millis(11);
                match step {
                    Step::Frame { layer, packets, key, keep, swap } => {
                        let source = &mut layers[usize::from(layer)];
                        source.picture = (source.picture + 1) & 0x7fff;
                        source.timestamp = source.timestamp.wrapping_add(990);
                        let mut frame: Vec<_> = (0..packets).map(|i| {
                            source.sequence += 1;
                            (source.sequence, vp8(source.picture, i == 0, key && i == 0))
                        }).enumerate().filter(|(i, _)| keep & 1 << i != 0).map(|(_, p)| p).collect();
                        if swap { frame.reverse(); }
                        for (sequence, payload) in frame {
                            let packet = Incoming { sequence, ..source.packet(&payload) };
                            out.extend(track.forward(now, &packet));
                            last = Some((layer, sequence, source.timestamp, payload));
                        }
                    }
                    Step::Probe { layer } => {
                        let source = &mut layers[usize::from(layer)];
                        source.sequence += 1;
                        prop_assert_eq!(track.forward(now, &source.packet(&[])), None);
                    }
                    Step::Wish { paused, max_layer } => track.set(paused, max_layer),
                    Step::Repeat => if let Some((layer, sequence, timestamp, payload)) = &last {
                        let packet = Incoming {
                            layer: *layer, ssrc: u32::from(*layer) + 1, sequence: *sequence,
                            timestamp: *timestamp, payload, clock: None,
                        };
                        if track.layer() == Some(*layer) {
                            prop_assert_eq!(track.forward(now, &packet).and_then(|o| {
                                out.iter().find(|sent| sent.sequence == o.sequence)
                            }), None, "sent twice");
                        }
                    },
                }
            }
            let numbers: HashSet<u64> = out.iter().map(|o| o.sequence).collect();
            prop_assert_eq!(numbers.len(), out.len(), "a sequence number was used twice");
            prop_assert!(out.first().is_none_or(|first| first.sequence < 65_536));
            out.sort_by_key(|o| o.sequence);
            for pair in out.windows(2) {
                let step = signed(pair[1].timestamp.wrapping_sub(pair[0].timestamp));
                let pictures = picture(&pair[1]).wrapping_sub(picture(&pair[0])) & 0x7fff;
                prop_assert!(step >= 0, "time goes back");
                prop_assert!(pictures < 0x4000, "pictures go back");
                prop_assert_eq!(step == 0, pictures == 0, "a frame is one time and one picture");
                if pair[1].sequence == pair[0].sequence + 1 {
                    prop_assert!(pictures <= 1, "a picture is missing without a gap");
                }
            }
        }

        /// Without loss nothing is missing: numbers are consecutive through every switch.
        #[test]
        fn no_gap_of_our_own_making(frames in proptest::collection::vec(
            (0u8..3, 1usize..4, proptest::bool::weighted(0.4), proptest::bool::weighted(0.2), 0u8..3), 1..200,
        )) {
            let mut now = Instant::now();
            let mut track = Downtrack::new(MediaKind::Video);
            let mut layers = [layer(0, 65_000), layer(1, 3), layer(2, 1_000_000)];
            let mut out: Vec<Outgoing> = vec![];
            for (layer, packets, key, probe, max_layer) in frames {
                now += Duration::from_millis(11);
                track.set(false, max_layer);
                let source = &mut layers[usize::from(layer)];
                out.extend(source.frame(&mut track, now, packets, key).into_iter().flatten());
                if probe {
                    source.sequence += 1;
                    prop_assert_eq!(track.forward(now, &source.packet(&[])), None);
                }
            }
            for pair in out.windows(2) {
                prop_assert_eq!(pair[1].sequence, pair[0].sequence + 1);
            }
        }
    }
}
