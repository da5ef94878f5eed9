//! Data packets as LiveKit frames them.

use livekit_protocol::{self as proto, data_packet::Value};
use prost::Message as _;

use crate::{
    frame_crypto::SealedData,
    identity::ParticipantIdentity,
    key::KeyIndex,
    transport::{DataBody, DataPacket, Reliability, TransportError, UserData},
};

/// Labels of the data channels.
pub(in crate::transport) const RELIABLE: &str = "_reliable";
pub(in crate::transport) const LOSSY: &str = "_lossy";
/// Bytes of a user's message that every SFU forwards.
const MOST_BYTES: usize = 15_000;
/// What sealing and the protocol buffers around a message may add to it.
const MOST_OVERHEAD: usize = 1_000;
/// The largest packet that is read.
const LARGEST_INCOMING: usize = 64_000;

/// Checks the bounds of a packet before it is queued.
pub(in crate::transport) fn check(packet: &DataPacket) -> Result<(), TransportError> {
    let size = match &packet.body {
        DataBody::Plain(data) => data.payload.len() + data.topic.as_ref().map_or(0, String::len),
        DataBody::Sealed(sealed) => sealed.value.len().saturating_sub(MOST_OVERHEAD),
    };
    if size > MOST_BYTES { Err(TransportError::DataTooLarge(size)) } else { Ok(()) }
}

/// A packet on the wire. The SFU fills in the sender.
#[allow(deprecated, reason = "servers before protocol 9 read `kind`")]
pub(in crate::transport) fn encode(packet: &DataPacket, sequence: u32) -> Vec<u8> {
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
pub(in crate::transport) struct Received {
    pub(in crate::transport) identity: ParticipantIdentity,
    pub(in crate::transport) body: DataBody,
    /// The sender's sid, by the SFU's word.
    pub(in crate::transport) sender: String,
    /// The sender's number of a reliable packet; 0: none.
    pub(in crate::transport) sequence: u32,
}

/// Reads a packet; `None` if it is malformed or not an application's.
pub(in crate::transport) fn decode(bytes: &[u8]) -> Option<Received> {
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

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            decode(&bytes);
        }
    }
}
