//! What a resumed connection needs of the data packets before the interruption.

use std::collections::{HashMap, VecDeque};

use livekit_protocol as proto;

use crate::transport::{
    DataPacket,
    rtc::data::{Received, encode},
};

/// Reliable packets that are kept to be sent again when the connection is resumed.
const MOST_KEPT: usize = 64;
/// Senders whose sequence numbers are kept.
const MOST_SENDERS: usize = 10_000;

/// The highest sequence number from each sender: the SFU may repeat reliable packets when a connection is resumed.
#[derive(Debug, Default)]
pub(super) struct Sequences(HashMap<String, u32>);

impl Sequences {
    /// Whether a reliable packet is new. Packets without a number always are.
    pub(super) fn admit(&mut self, packet: &Received) -> bool {
        if packet.sequence == 0 || packet.sender.is_empty() {
            return true;
        }
        if let Some(last) = self.0.get_mut(&packet.sender) {
            let new = packet.sequence > *last;
            *last = packet.sequence.max(*last);
            return new;
        }
        if self.0.len() < MOST_SENDERS {
            self.0.insert(packet.sender.clone(), packet.sequence);
        }
        true
    }

    /// What to tell the SFU when a connection is resumed.
    pub(super) fn states(&self) -> Vec<proto::DataChannelReceiveState> {
        self.0
            .iter()
            .map(|(sender, last_seq)| proto::DataChannelReceiveState {
                publisher_sid: sender.clone(),
                last_seq: *last_seq,
            })
            .collect()
    }

    /// Forgets all senders: a new connection numbers from the start.
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }
}

/// Reliable packets that were sent last.
#[derive(Debug, Default)]
pub(super) struct Sent {
    last: u32,
    kept: VecDeque<(u32, Vec<u8>)>,
}

impl Sent {
    /// Encodes a reliable packet under the next number and keeps it.
    pub(super) fn encode(&mut self, packet: &DataPacket) -> Vec<u8> {
        self.last = self.last.wrapping_add(1).max(1);
        let bytes = encode(packet, self.last);
        if self.kept.len() >= MOST_KEPT {
            self.kept.pop_front();
        }
        self.kept.push_back((self.last, bytes.clone()));
        bytes
    }

    /// The packets to send again if the SFU got those up to `last`.
    pub(super) fn after(&mut self, last: u32) -> Vec<Vec<u8>> {
        self.kept.retain(|(sequence, _)| *sequence > last);
        self.kept.iter().map(|(_, bytes)| bytes.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::{DataBody, Reliability, UserData, rtc::data::decode};

    fn plain(bytes: usize) -> DataPacket {
        DataPacket {
            reliability: Reliability::Reliable,
            destinations: Vec::new(),
            body: DataBody::Plain(UserData { payload: vec![7; bytes], topic: None }),
        }
    }

    #[test]
    fn repeated_packets_are_admitted_once() {
        let mut sequences = Sequences::default();
        let received = |sequence, sender: &str| {
            let received = decode(&encode(&plain(1), sequence)).unwrap();
            Received { sender: sender.to_owned(), ..received }
        };
        assert!(sequences.admit(&received(4, "PA_1")));
        assert!(!sequences.admit(&received(4, "PA_1")));
        assert!(sequences.admit(&received(4, "PA_2")));
        assert!(sequences.admit(&received(0, "PA_1")) && sequences.admit(&received(0, "PA_1")));
        assert_eq!(sequences.states().len(), 2);
    }

    #[test]
    fn packets_after_the_last_received_are_sent_again() {
        let mut sent = Sent::default();
        let all: Vec<_> = (0..MOST_KEPT + 10).map(|bytes| sent.encode(&plain(bytes))).collect();
        assert_eq!(sent.after(0), all[10..]);
        assert_eq!(sent.after(MOST_KEPT as u32 + 8), all[MOST_KEPT + 8..]);
    }
}
