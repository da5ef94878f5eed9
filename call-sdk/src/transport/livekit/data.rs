//! Data packets as LiveKit frames them.

use std::collections::{HashMap, VecDeque};

use livekit_protocol::{self as proto, data_packet::Value};
use prost::Message as _;

use crate::{
    frame_crypto::SealedData,
    identity::ParticipantIdentity,
    key::KeyIndex,
    transport::{DataBody, DataPacket, Reliability, TransportError, UserData},
};

/// Labels of the data channels.
pub(super) const RELIABLE: &str = "_reliable";
pub(super) const LOSSY: &str = "_lossy";
/// Bytes of a user's message that every SFU forwards.
const MOST_BYTES: usize = 15_000;
/// What sealing and the protocol buffers around a message may add to it.
const MOST_OVERHEAD: usize = 1_000;
/// The largest packet that is read.
const LARGEST_INCOMING: usize = 64_000;
/// Reliable packets that are kept to be sent again when the connection is resumed.
const MOST_KEPT: usize = 64;
/// Senders whose sequence numbers are kept.
const MOST_SENDERS: usize = 10_000;

/// Checks the bounds of a packet before it is queued.
pub(super) fn check(packet: &DataPacket) -> Result<(), TransportError> {
    let size = match &packet.body {
        DataBody::Plain(data) => data.payload.len() + data.topic.as_ref().map_or(0, String::len),
        DataBody::Sealed(sealed) => sealed.value.len().saturating_sub(MOST_OVERHEAD),
    };
    if size > MOST_BYTES { Err(TransportError::DataTooLarge(size)) } else { Ok(()) }
}

/// A packet on the wire. The SFU fills in the sender.
#[allow(deprecated, reason = "servers before protocol 9 read `kind`")]
pub(super) fn encode(packet: &DataPacket, sequence: u32) -> Vec<u8> {
    let value = match &packet.body {
        DataBody::Plain(data) => Value::User(proto::UserPacket {
            payload: data.payload.clone(),
            topic: data.topic.clone(),
            ..Default::default()
        }),
        DataBody::Sealed(sealed) => Value::EncryptedPacket(proto::EncryptedPacket {
            encryption_type: proto::encryption::Type::Gcm.into(),
            iv: sealed.iv.to_vec(),
            key_index: sealed.index.0.into(),
            encrypted_value: sealed.value.clone(),
        }),
    };
    let kind = match packet.reliability {
        Reliability::Reliable => proto::data_packet::Kind::Reliable,
        Reliability::Lossy => proto::data_packet::Kind::Lossy,
    };
    proto::DataPacket {
        kind: kind.into(),
        destination_identities: packet.destinations.iter().map(|identity| identity.0.clone()).collect(),
        sequence,
        value: Some(value),
        ..Default::default()
    }
    .encode_to_vec()
}

/// A packet that arrived.
#[derive(Debug, PartialEq)]
pub(super) struct Received {
    pub(super) identity: ParticipantIdentity,
    pub(super) body: DataBody,
    sender: String,
    sequence: u32,
}

/// Reads a packet; `None` if it is malformed or not an application's.
pub(super) fn decode(bytes: &[u8]) -> Option<Received> {
    if bytes.len() > LARGEST_INCOMING {
        return None;
    }
    let packet = proto::DataPacket::decode(bytes).ok()?;
    let (body, old_identity) = match packet.value? {
        Value::User(user) => {
            #[allow(deprecated, reason = "the form of older servers")]
            let identity = user.participant_identity;
            (DataBody::Plain(UserData { payload: user.payload, topic: user.topic }), identity)
        }
        Value::EncryptedPacket(sealed) => {
            let iv = sealed.iv.try_into().ok()?;
            let index = KeyIndex(u8::try_from(sealed.key_index).ok()?);
            (DataBody::Sealed(SealedData { iv, index, value: sealed.encrypted_value }), String::new())
        }
        _ => return None,
    };
    let identity =
        if packet.participant_identity.is_empty() { old_identity } else { packet.participant_identity };
    Some(Received {
        identity: ParticipantIdentity(identity),
        body,
        sender: packet.participant_sid,
        sequence: packet.sequence,
    })
}

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
    use proptest::prelude::*;

    use super::*;

    fn packet(body: DataBody) -> DataPacket {
        DataPacket {
            reliability: Reliability::Reliable,
            destinations: vec![ParticipantIdentity("bob".into())],
            body,
        }
    }

    fn plain(bytes: usize) -> DataPacket {
        packet(DataBody::Plain(UserData { payload: vec![7; bytes], topic: Some("chat".into()) }))
    }

    /// As the SFU forwards it.
    fn forwarded(bytes: &[u8], sender: &str) -> Vec<u8> {
        let mut packet = proto::DataPacket::decode(bytes).unwrap();
        packet.participant_identity = "alice".into();
        packet.participant_sid = sender.into();
        packet.encode_to_vec()
    }

    #[test]
    fn plain_and_sealed_packets_round_trip() {
        let sealed = SealedData { iv: [9; 12], index: KeyIndex(255), value: vec![1, 2, 3] };
        for packet in [plain(100), packet(DataBody::Sealed(sealed))] {
            let received = decode(&forwarded(&encode(&packet, 5), "PA_1")).unwrap();
            assert_eq!((received.identity.0.as_str(), &received.body), ("alice", &packet.body));
        }
    }

    #[test]
    fn destinations_are_sent() {
        let wire = proto::DataPacket::decode(&*encode(&plain(1), 0)).unwrap();
        assert_eq!(wire.destination_identities, ["bob"]);
    }

    #[test]
    fn large_packets_are_refused() {
        assert!(check(&plain(MOST_BYTES - 4)).is_ok());
        assert!(matches!(check(&plain(MOST_BYTES)), Err(TransportError::DataTooLarge(_))));
        let sealed = |bytes| {
            packet(DataBody::Sealed(SealedData { iv: [1; 12], index: KeyIndex(0), value: vec![0; bytes] }))
        };
        assert!(check(&sealed(MOST_BYTES + 100)).is_ok());
        assert!(check(&sealed(MOST_BYTES + MOST_OVERHEAD + 1)).is_err());
    }

    #[test]
    fn sealed_packet_with_odd_fields_is_dropped() {
        let wire = |iv: usize, key_index| {
            proto::DataPacket {
                value: Some(Value::EncryptedPacket(proto::EncryptedPacket {
                    iv: vec![0; iv],
                    key_index,
                    ..Default::default()
                })),
                ..Default::default()
            }
            .encode_to_vec()
        };
        assert!(decode(&wire(12, 255)).is_some());
        assert_eq!(decode(&wire(11, 0)), None);
        assert_eq!(decode(&wire(12, 256)), None);
        assert_eq!(decode(&vec![0; LARGEST_INCOMING + 1]), None);
    }

    #[test]
    fn repeated_packets_are_admitted_once() {
        let mut sequences = Sequences::default();
        let received =
            |sequence, sender: &str| decode(&forwarded(&encode(&plain(1), sequence), sender)).unwrap();
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

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Some(received) = decode(&bytes) {
                Sequences::default().admit(&received);
            }
        }
    }
}
