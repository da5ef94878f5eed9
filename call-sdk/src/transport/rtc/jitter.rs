//! Putting the packets of one incoming stream in order and its frames together.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use bytes::Bytes;

use super::payload::{self, Outline};
use crate::media::Codec;

/// How many packets the window spans at most, missing ones included.
const WINDOW_PACKETS: usize = 2048;
/// How many bytes of payload may wait in the window.
const WINDOW_BYTES: usize = 4 << 20;
/// Given up packets that are remembered.
const GIVEN_UP: usize = 64;
/// So many packets in a row from before the window mean that the sender started over.
const RESTART_AFTER: u32 = 64;

/// What of a received RTP packet matters for putting frames together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IncomingPacket {
    /// RTP sequence number.
    pub sequence: u16,
    /// RTP timestamp.
    pub timestamp: u32,
    /// RTP marker bit.
    pub marker: bool,
    /// RTP payload without padding; empty for packets of padding only.
    pub payload: Bytes,
}

/// What is known of a frame besides its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AssembledFrame {
    /// RTP timestamp in the codec's clock rate.
    pub rtp_timestamp: u32,
    /// Whether a decoder can start with this frame, by the sender's word. Always true of audio.
    pub key_frame: bool,
    /// Temporal layer, where the packets tell it (VP8, VP9, AV1).
    pub temporal: Option<u8>,
    /// Spatial layer (VP9). Frames of the same picture come one after the other, lowest layer first.
    pub spatial: u8,
}

/// Puts packets in order and frames together. A frame comes out once and whole, or not at all.
///
/// Call [`Self::next_frame`] until it returns `None` after every [`Self::push`], and when [`Self::deadline`] has
/// passed. Packets wait in a ring that is bounded in packets and in bytes; beyond the bounds the oldest are lost.
/// Once the ring has grown to the size that the network asks for, nothing is allocated.
#[derive(Debug)]
pub struct Reassembler {
    codec: Codec,
    patience: Patience,
    /// Sequence number of the front of the window, once there was a packet.
    front: Option<u16>,
    /// The packets from `front` on, `None` where one is missing. The last is never missing.
    window: VecDeque<Option<Waiting>>,
    /// Bytes of payload in the window.
    size: usize,
    /// How many packets at the front belong to the frame at hand, which is not complete.
    scanned: usize,
    before: Before,
    late_in_a_row: u32,
    lost: bool,
}

/// A packet in the window.
#[derive(Debug)]
struct Waiting {
    arrived: Instant,
    timestamp: u32,
    marker: bool,
    /// `None` if the payload is malformed.
    outline: Option<Outline>,
    payload: Bytes,
}

impl Waiting {
    fn ends_frame(&self) -> bool {
        self.marker || self.outline.is_some_and(|outline| outline.ends)
    }

    fn begins_frame(&self) -> bool {
        self.outline.is_some_and(|outline| outline.begins)
    }
}

/// What is known of the packet before the window.
#[derive(Clone, Copy, Debug)]
enum Before {
    /// It was lost, or there was none.
    Unknown,
    /// It was the last of its frame.
    End,
    /// It belonged to the frame with this timestamp, which is over for us; the next packet may be a part of it too.
    Part(u32),
}

/// How long to wait for a missing packet.
#[derive(Debug)]
struct Patience {
    wait: Duration,
    least: Duration,
    most: Duration,
    /// Packets that were given up and when, oldest first.
    given_up: VecDeque<(u16, Instant)>,
}

impl Patience {
    /// Video waits for two rounds of NACK and retransmission. Audio waits only for reordering, and no longer than the
    /// network makes necessary: a wait delays the sound.
    fn of(codec: Codec) -> Self {
        let (least, most) = if codec.is_audio() { (40, 160) } else { (350, 350) };
        let least = Duration::from_millis(least);
        Self { wait: least, least, most: Duration::from_millis(most), given_up: VecDeque::new() }
    }

    /// A packet was waited for in vain: the next wait is a little shorter.
    fn gave_up(&mut self, now: Instant, sequence: u16) {
        self.wait -= self.wait.saturating_sub(self.least) / 32;
        if self.given_up.len() >= GIVEN_UP {
            self.given_up.pop_front();
        }
        self.given_up.push_back((sequence, now));
    }

    /// A packet from before the window came: had we waited longer, it would have been in time.
    fn came_late(&mut self, now: Instant, sequence: u16) {
        let Some(index) = self.given_up.iter().position(|(given_up, _)| *given_up == sequence) else {
            return;
        };
        if let Some((_, at)) = self.given_up.remove(index) {
            let longer = self.wait + now.saturating_duration_since(at);
            self.wait = longer.min(self.most).max(self.wait);
        }
    }
}

/// How far the window has got.
enum Progress {
    /// So many packets at the front are a frame.
    Frame(usize),
    /// A packet is missing.
    Gap,
    /// The window is empty, or holds the beginning of a frame.
    Incomplete,
}

impl Reassembler {
    /// A reassembler for the frames of `codec`.
    #[must_use]
    pub fn new(codec: Codec) -> Self {
        Self {
            codec,
            patience: Patience::of(codec),
            front: None,
            window: VecDeque::with_capacity(64),
            size: 0,
            scanned: 0,
            before: Before::Unknown,
            late_in_a_row: 0,
            lost: false,
        }
    }

    /// Takes a packet. Duplicates and packets from before the window are dropped.
    pub fn push(&mut self, now: Instant, packet: IncomingPacket) {
        let IncomingPacket { sequence, timestamp, marker, payload } = packet;
        let front = *self.front.get_or_insert(sequence);
        let mut position = usize::from(sequence.wrapping_sub(front));
        if position >= 0x8000 {
            self.patience.came_late(now, sequence);
            self.late_in_a_row += 1;
            if self.late_in_a_row < RESTART_AFTER {
                return;
            }
            self.restart_at(sequence);
            position = 0;
        }
        self.late_in_a_row = 0;
        if position >= self.window.len() + WINDOW_PACKETS {
            // A jump ahead that leaves nothing of the window.
            self.restart_at(sequence);
            position = 0;
        }
        if matches!(self.window.get(position), Some(Some(_))) {
            return;
        }
        while position >= WINDOW_PACKETS || self.size + payload.len() > WINDOW_BYTES {
            self.lost = true;
            self.pop();
            let Some(next) = position.checked_sub(1) else { return };
            position = next;
        }
        if position >= self.window.len() {
            self.window.resize_with(position + 1, || None);
        }
        self.size += payload.len();
        let outline = payload::outline(self.codec, &payload);
        self.window[position] = Some(Waiting { arrived: now, timestamp, marker, outline, payload });
    }

    /// Writes the next frame, in order, to `frame`, which is overwritten and whose room is reused. `frame` is empty
    /// if there is none.
    pub fn next_frame(&mut self, now: Instant, frame: &mut Vec<u8>) -> Option<AssembledFrame> {
        loop {
            frame.clear();
            match self.scan() {
                Progress::Frame(packets) => {
                    if let Some(assembled) = self.take_frame(packets, frame) {
                        return Some(assembled);
                    }
                }
                Progress::Gap if self.deadline().is_none_or(|deadline| now >= deadline) => {
                    self.give_up_gap(now);
                }
                Progress::Gap | Progress::Incomplete => return None,
            }
        }
    }

    /// When to call [`Self::next_frame`] again although no packet came: the gap at hand is then given up.
    ///
    /// That is some time after the packet behind the gap arrived: a fixed one for video, while for audio it follows how late
    /// packets have been.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        let mut rest = self.window.iter().skip(self.scanned);
        if rest.next()?.is_some() {
            return None;
        }
        Some(rest.flatten().next()?.arrived + self.patience.wait)
    }

    /// Whether packets or frames were given up since the last call; a video decoder then needs a key frame.
    pub fn take_loss(&mut self) -> bool {
        std::mem::take(&mut self.lost)
    }

    /// Goes through the packets that came since the last time, up to the end of a frame or a gap.
    fn scan(&mut self) -> Progress {
        loop {
            let packet = match self.window.get(self.scanned) {
                Some(Some(packet)) => packet,
                Some(None) => return Progress::Gap,
                None => return Progress::Incomplete,
            };
            // SFUs probe bandwidth with packets that hold only padding.
            if packet.payload.is_empty() {
                match self.scanned {
                    0 => self.pop(),
                    _ => self.scanned += 1,
                }
                continue;
            }
            let first = match self.window.front() {
                Some(Some(first)) if self.scanned > 0 => first,
                _ if self.may_begin_frame(packet) => packet,
                _ => {
                    self.lost = true;
                    self.pop();
                    continue;
                }
            };
            if packet.timestamp != first.timestamp {
                // No packet is missing in between, so the frame is over although no packet said so.
                return Progress::Frame(self.scanned);
            }
            let ends_frame = packet.ends_frame();
            self.scanned += 1;
            if ends_frame {
                return Progress::Frame(self.scanned);
            }
        }
    }

    /// Whether a frame begins with `packet`, which is at the front.
    fn may_begin_frame(&self, packet: &Waiting) -> bool {
        match self.before {
            Before::Part(timestamp) if timestamp == packet.timestamp => false,
            Before::Unknown => packet.begins_frame(),
            _ => packet.begins_frame() || !payload::has_start_flag(self.codec),
        }
    }

    /// Assembles the first `packets` of the window; `None` if they are no frame.
    fn take_frame(&mut self, packets: usize, frame: &mut Vec<u8>) -> Option<AssembledFrame> {
        let waiting = || self.window.iter().take(packets).flatten();
        let rtp_timestamp = waiting().next()?.timestamp;
        // In H.264 and H.265 a packet can yield a start code more than it holds.
        frame.reserve(waiting().map(|packet| packet.payload.len() + 4).sum());
        let payloads = waiting().map(|packet| &packet.payload[..]).filter(|payload| !payload.is_empty());
        let facts = payload::assemble(self.codec, payloads, frame);
        (0..packets).for_each(|_| self.pop());
        self.lost |= facts.is_none();
        let payload::Facts { key_frame, temporal, spatial } = facts.filter(|_| !frame.is_empty())?;
        Some(AssembledFrame { rtp_timestamp, key_frame, temporal, spatial })
    }

    /// Drops the frame at hand and moves on to the packet behind the gap.
    fn give_up_gap(&mut self, now: Instant) {
        self.lost = true;
        (0..self.scanned).for_each(|_| self.pop());
        while matches!(self.window.front(), Some(None)) {
            if let Some(front) = self.front {
                self.patience.gave_up(now, front);
            }
            self.pop();
        }
    }

    /// Removes the front of the window.
    fn pop(&mut self) {
        self.scanned = 0;
        self.front = self.front.map(|front| front.wrapping_add(1));
        match self.window.pop_front().flatten() {
            None => self.before = Before::Unknown,
            Some(padding) if padding.payload.is_empty() => {}
            Some(packet) => {
                self.size -= packet.payload.len();
                self.before = if packet.ends_frame() { Before::End } else { Before::Part(packet.timestamp) };
            }
        }
    }

    fn restart_at(&mut self, sequence: u16) {
        self.window.clear();
        self.front = Some(sequence);
        self.size = 0;
        self.scanned = 0;
        self.before = Before::Unknown;
        self.lost = true;
    }
}

#[cfg(test)]
mod tests;
