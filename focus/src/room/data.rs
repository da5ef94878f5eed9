//! Data packets, patched on their bytes.
//!
//! A receiver must be able to trust who a packet is from, and a sender's newer fields must arrive although we do
//! not know them. So the packet is not decoded and encoded again: the fields that name the sender are cut out and
//! written anew, every other byte passes as it came.

use bytes::Bytes;

use crate::plane::Channel;

/// Largest message that is relayed, in bytes: what clients can rely on is 64 000.
pub const MAX_MESSAGE: usize = 65_535;
/// Most destinations that one packet may name.
const MAX_DESTINATIONS: usize = 1_000;

/// `DataPacket` fields.
mod packet {
    pub(super) const KIND: u32 = 1;
    pub(super) const USER: u32 = 2;
    pub(super) const SPEAKER: u32 = 3;
    pub(super) const IDENTITY: u32 = 4;
    pub(super) const DESTINATIONS: u32 = 5;
    pub(super) const TRANSCRIPTION: u32 = 7;
    pub(super) const METRICS: u32 = 8;
    pub(super) const SEQUENCE: u32 = 16;
    pub(super) const SID: u32 = 17;
}

/// `UserPacket` fields.
mod user {
    pub(super) const SID: u32 = 1;
    pub(super) const DESTINATION_SIDS: u32 = 3;
    pub(super) const IDENTITY: u32 = 5;
    pub(super) const DESTINATIONS: u32 = 6;
}

/// Who really sent a packet. Both are empty for a hidden participant.
#[derive(Clone, Copy, Debug)]
pub struct Sender<'a> {
    /// Its identity.
    pub identity: &'a str,
    /// Its sid.
    pub sid: &'a str,
    /// Only agents may send transcriptions.
    pub agent: bool,
}

/// A packet that is ready to be relayed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Patched {
    /// The bytes to send.
    pub payload: Bytes,
    /// Identities it is for; with `destination_sids` empty as well, it is for everybody else.
    pub destinations: Vec<String>,
    /// Participant sids it is for (deprecated form).
    pub destination_sids: Vec<String>,
    /// Sequence number of a reliable packet; 0 if it has none.
    pub sequence: u32,
}

/// Why a packet is not relayed: the sender's fault in each case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// It is not a protobuf message.
    #[error("the sender's data packet is not valid protobuf")]
    Malformed,
    /// It is larger than [`MAX_MESSAGE`].
    #[error("the sender's data packet is larger than {MAX_MESSAGE} bytes")]
    TooLarge,
    /// It is of a kind that this sender may not send.
    #[error("the sender may not send this kind of data packet")]
    NotAllowed,
    /// It names more destinations than a room may hold.
    #[error("the sender's data packet names too many destinations")]
    TooManyDestinations,
}

/// Writes the true sender and the channel's kind into a packet and reads whom it is for.
pub fn patch(bytes: &[u8], channel: Channel, sender: Sender<'_>) -> Result<Patched, DataError> {
    if bytes.len() > MAX_MESSAGE {
        return Err(DataError::TooLarge);
    }
    let mut out = Vec::with_capacity(bytes.len() + sender.identity.len() + sender.sid.len() + 16);
    let mut destinations = Vec::new();
    let mut user_destinations = Vec::new();
    let mut destination_sids = Vec::new();
    let mut sequence = 0;
    for field in Fields(bytes) {
        let field = field?;
        match (field.number, field.value) {
            (packet::KIND | packet::IDENTITY | packet::SID, _) => {}
            (packet::SPEAKER | packet::METRICS, _) => return Err(DataError::NotAllowed),
            (packet::TRANSCRIPTION, _) if !sender.agent => return Err(DataError::NotAllowed),
            (packet::USER, Value::Bytes(inner)) => {
                let inner = patch_user(inner, sender, &mut user_destinations, &mut destination_sids)?;
                write_bytes(&mut out, packet::USER, &inner);
            }
            (packet::DESTINATIONS, Value::Bytes(identity)) => {
                push_text(&mut destinations, identity)?;
                out.extend_from_slice(field.raw);
            }
            (packet::SEQUENCE, Value::Varint(value)) => {
                // Truncation to 32 bits is what a protobuf decoder does with a longer varint.
                sequence = value as u32;
                out.extend_from_slice(field.raw);
            }
            _ => out.extend_from_slice(field.raw),
        }
    }
    if channel == Channel::Lossy {
        write_varint(&mut out, u64::from(packet::KIND << 3));
        write_varint(&mut out, 1);
    }
    write_text(&mut out, packet::IDENTITY, sender.identity);
    write_text(&mut out, packet::SID, sender.sid);
    if destinations.is_empty() {
        destinations = user_destinations;
    } else {
        destination_sids.clear();
    }
    Ok(Patched { payload: out.into(), destinations, destination_sids, sequence })
}

/// The deprecated copies of the sender in a `UserPacket` are corrected where they are set.
fn patch_user(
    bytes: &[u8],
    sender: Sender<'_>,
    destinations: &mut Vec<String>,
    destination_sids: &mut Vec<String>,
) -> Result<Vec<u8>, DataError> {
    let mut out = Vec::with_capacity(bytes.len() + 64);
    let (mut had_sid, mut had_identity) = (false, false);
    for field in Fields(bytes) {
        let field = field?;
        match (field.number, field.value) {
            (user::SID, _) => had_sid = true,
            (user::IDENTITY, _) => had_identity = true,
            (user::DESTINATIONS, Value::Bytes(identity)) => {
                push_text(destinations, identity)?;
                out.extend_from_slice(field.raw);
            }
            (user::DESTINATION_SIDS, Value::Bytes(sid)) => {
                push_text(destination_sids, sid)?;
                out.extend_from_slice(field.raw);
            }
            _ => out.extend_from_slice(field.raw),
        }
    }
    if had_sid {
        write_text(&mut out, user::SID, sender.sid);
    }
    if had_identity {
        write_text(&mut out, user::IDENTITY, sender.identity);
    }
    Ok(out)
}

fn push_text(list: &mut Vec<String>, bytes: &[u8]) -> Result<(), DataError> {
    if list.len() >= MAX_DESTINATIONS {
        return Err(DataError::TooManyDestinations);
    }
    list.push(std::str::from_utf8(bytes).map_err(|_| DataError::Malformed)?.to_owned());
    Ok(())
}

/// One field of a message.
#[derive(Clone, Copy)]
struct Field<'a> {
    number: u32,
    value: Value<'a>,
    /// Tag and value as they came.
    raw: &'a [u8],
}

#[derive(Clone, Copy)]
enum Value<'a> {
    Varint(u64),
    Bytes(&'a [u8]),
    Fixed,
}

/// The fields of a message, one after the other; ends at the first error.
struct Fields<'a>(&'a [u8]);

impl<'a> Iterator for Fields<'a> {
    type Item = Result<Field<'a>, DataError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let whole = self.0;
        let field = read_field(whole);
        self.0 = match &field {
            Some(field) => &whole[field.raw.len()..],
            None => &[],
        };
        Some(field.ok_or(DataError::Malformed))
    }
}

fn read_field(whole: &[u8]) -> Option<Field<'_>> {
    let (tag, rest) = read_varint(whole)?;
    let number = u32::try_from(tag >> 3).ok().filter(|number| (1..1 << 29).contains(number))?;
    let (value, rest) = match tag & 7 {
        0 => {
            let (value, rest) = read_varint(rest)?;
            (Value::Varint(value), rest)
        }
        1 => (Value::Fixed, rest.get(8..)?),
        2 => {
            let (length, rest) = read_varint(rest)?;
            let length = usize::try_from(length).ok()?;
            (Value::Bytes(rest.get(..length)?), rest.get(length..)?)
        }
        5 => (Value::Fixed, rest.get(4..)?),
        // Groups (3, 4) were never part of proto3, and 6, 7 do not exist.
        _ => return None,
    };
    Some(Field { number, value, raw: &whole[..whole.len() - rest.len()] })
}

fn read_varint(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let mut value = 0u64;
    for (index, byte) in bytes.iter().enumerate().take(10) {
        value |= u64::from(byte & 0x7f).checked_shl(7 * u32::try_from(index).ok()?)?;
        if byte & 0x80 == 0 {
            return Some((value, &bytes[index + 1..]));
        }
    }
    None
}

fn write_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn write_bytes(out: &mut Vec<u8>, number: u32, bytes: &[u8]) {
    write_varint(out, u64::from(number) << 3 | 2);
    write_varint(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

fn write_text(out: &mut Vec<u8>, number: u32, text: &str) {
    if !text.is_empty() {
        write_bytes(out, number, text.as_bytes());
    }
}

#[cfg(test)]
#[allow(deprecated, reason = "the deprecated copies of the sender are what is tested")]
mod tests {
    use livekit_protocol::{DataPacket, UserPacket, data_packet};
    use proptest::prelude::*;
    use prost::Message as _;

    use super::*;

    const ALICE: Sender<'_> = Sender { identity: "alice", sid: "PA_alice", agent: false };

    fn user(packet: UserPacket) -> DataPacket {
        DataPacket { value: Some(data_packet::Value::User(packet)), ..DataPacket::default() }
    }

    #[test]
    fn the_true_sender_replaces_a_forged_one_everywhere() {
        let forged = DataPacket {
            participant_identity: "mallory".into(),
            participant_sid: "PA_bob".into(),
            sequence: 7,
            ..user(UserPacket {
                participant_sid: "PA_bob".into(),
                participant_identity: "bob".into(),
                payload: b"hello".to_vec(),
                ..UserPacket::default()
            })
        };
        let patched = patch(&forged.encode_to_vec(), Channel::Lossy, ALICE).unwrap();
        let read = DataPacket::decode(patched.payload).unwrap();
        assert_eq!(read.participant_identity, "alice");
        assert_eq!(read.participant_sid, "PA_alice");
        assert_eq!(read.kind, 1);
        assert_eq!(patched.sequence, 7);
        let Some(data_packet::Value::User(inner)) = read.value else { panic!("not a user packet") };
        assert_eq!(inner.participant_identity, "alice");
        assert_eq!(inner.participant_sid, "PA_alice");
        assert_eq!(inner.payload, b"hello");
    }

    #[test]
    fn a_hidden_sender_stays_unnamed() {
        let packet = DataPacket { participant_identity: "spy".into(), ..user(UserPacket::default()) };
        let hidden = Sender { identity: "", sid: "", agent: false };
        let patched = patch(&packet.encode_to_vec(), Channel::Reliable, hidden).unwrap();
        assert_eq!(DataPacket::decode(patched.payload).unwrap().participant_identity, "");
    }

    #[test]
    fn destinations_are_read_from_the_packet_and_else_from_the_user_packet() {
        let inner = UserPacket {
            destination_identities: vec!["bob".into()],
            destination_sids: vec!["PA_carol".into()],
            ..UserPacket::default()
        };
        let patched = patch(&user(inner.clone()).encode_to_vec(), Channel::Reliable, ALICE).unwrap();
        assert_eq!(patched.destinations, ["bob"]);
        assert_eq!(patched.destination_sids, ["PA_carol"]);
        let outer = DataPacket { destination_identities: vec!["dave".into()], ..user(inner) };
        let patched = patch(&outer.encode_to_vec(), Channel::Reliable, ALICE).unwrap();
        assert_eq!(patched.destinations, ["dave"]);
        assert!(patched.destination_sids.is_empty());
    }

    #[test]
    fn kinds_that_a_client_may_not_send_are_refused() {
        let transcription = DataPacket {
            value: Some(data_packet::Value::Transcription(livekit_protocol::Transcription::default())),
            ..DataPacket::default()
        }
        .encode_to_vec();
        assert_eq!(patch(&transcription, Channel::Reliable, ALICE), Err(DataError::NotAllowed));
        assert!(patch(&transcription, Channel::Reliable, Sender { agent: true, ..ALICE }).is_ok());
        let speaker = DataPacket {
            value: Some(data_packet::Value::Speaker(livekit_protocol::ActiveSpeakerUpdate::default())),
            ..DataPacket::default()
        };
        assert_eq!(patch(&speaker.encode_to_vec(), Channel::Reliable, ALICE), Err(DataError::NotAllowed));
        assert_eq!(patch(&vec![0; MAX_MESSAGE + 1], Channel::Reliable, ALICE), Err(DataError::TooLarge));
    }

    proptest! {
        #[test]
        fn patching_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = patch(&bytes, Channel::Reliable, ALICE);
        }

        /// Whatever passes names the true sender, for every decoder that reads it.
        #[test]
        fn what_passes_names_the_true_sender(
            bytes in prop::collection::vec(prop_oneof![Just(0x22u8), Just(0x12), Just(0x0a), Just(0x8a), Just(1), any::<u8>()], 0..60),
        ) {
            if let Ok(patched) = patch(&bytes, Channel::Lossy, ALICE)
                && let Ok(read) = DataPacket::decode(patched.payload)
            {
                prop_assert_eq!(read.participant_identity, "alice");
                prop_assert_eq!(read.participant_sid, "PA_alice");
                if let Some(data_packet::Value::User(inner)) = read.value {
                    prop_assert!(inner.participant_identity.is_empty() || inner.participant_identity == "alice");
                }
            }
        }

        /// Fields that we do not know pass byte for byte.
        #[test]
        fn unknown_fields_are_preserved(
            payload in prop::collection::vec(any::<u8>(), 0..100),
            unknown in prop::collection::vec(any::<u8>(), 0..100),
            number in 100u32..1_000_000,
        ) {
            let mut bytes = user(UserPacket { payload: payload.clone(), ..UserPacket::default() }).encode_to_vec();
            write_bytes(&mut bytes, number, &unknown);
            let patched = patch(&bytes, Channel::Reliable, ALICE).unwrap();
            let kept = Fields(&patched.payload).any(|field| {
                field.is_ok_and(|field| {
                    field.number == number && matches!(field.value, Value::Bytes(bytes) if bytes == unknown)
                })
            });
            prop_assert!(kept);
            let Some(data_packet::Value::User(inner)) = DataPacket::decode(patched.payload).unwrap().value else {
                panic!("the user packet was lost")
            };
            prop_assert_eq!(inner.payload, payload);
        }

        #[test]
        fn varints_round_trip(value in any::<u64>()) {
            let mut out = Vec::new();
            write_varint(&mut out, value);
            prop_assert_eq!(read_varint(&out), Some((value, &[][..])));
        }
    }
}
