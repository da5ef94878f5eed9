//! Data messages: sealed with our key, opened with the key of their sender (LiveKit's `EncryptedPacket`).

use prost::Message as _;

use crate::{
    frame_crypto::{DataDecryptor, DataEncryptor, KeyRing, SealError},
    key::KeyIndex,
    machine::{CallEvent, Sealing},
    member::{Member, ParticipantIdentity},
    transport::{DataBody, DataPacket, Reliability, UserData},
};

/// Longest user message that SFUs forward, in bytes.
pub(super) const MAX_DATA: usize = 15_000;

/// LiveKit's `EncryptedPacketPayload`, of which a call uses the user packet.
#[derive(Clone, PartialEq, prost::Message)]
struct Payload {
    #[prost(message, optional, tag = "1")]
    user: Option<UserPacket>,
}

/// LiveKit's `UserPacket`.
#[derive(Clone, PartialEq, prost::Message)]
struct UserPacket {
    #[prost(bytes = "vec", tag = "2")]
    payload: Vec<u8>,
    #[prost(string, optional, tag = "4")]
    topic: Option<String>,
}

/// The data messages that we send: one encryptor for the whole call, so that no IV repeats.
#[derive(Debug)]
pub(super) struct DataSealer {
    encryptor: DataEncryptor,
}

impl DataSealer {
    pub(super) fn new(sealing: &Sealing) -> Self {
        Self { encryptor: DataEncryptor::new(sealing.ring().clone()) }
    }

    /// The packet to send; sealed in an encrypted call.
    ///
    /// # Errors
    /// [`SealError::MissingKey`] before our first key exists.
    pub(super) fn packet(
        &mut self,
        sealing: &Sealing,
        reliability: Reliability,
        destinations: Vec<ParticipantIdentity>,
        message: UserData,
    ) -> Result<DataPacket, SealError> {
        let body = if sealing.is_encrypted() {
            let index = sealing.current().ok_or(SealError::MissingKey(KeyIndex(0)))?;
            let user = Some(UserPacket { payload: message.payload, topic: message.topic });
            DataBody::Sealed(self.encryptor.seal(index, &Payload { user }.encode_to_vec())?)
        } else {
            DataBody::Plain(message)
        };
        Ok(DataPacket { reliability, destinations, body })
    }
}

/// Opens a sealed message with the keys of `member`; `None` if it does not open or is not a user message.
pub(super) fn open(member: Member, ring: KeyRing, packet: DataPacket) -> Option<CallEvent> {
    let DataBody::Sealed(sealed) = packet.body else { return None };
    let plain = match DataDecryptor::new(ring).open(&sealed.iv, sealed.index, &sealed.value) {
        Ok(plain) => plain,
        Err(reason) => {
            tracing::debug!(user = %member.user_id, %reason, "a data message does not open");
            return None;
        }
    };
    let user = Payload::decode(plain.as_slice()).ok()?.user?;
    let message = UserData { payload: user.payload, topic: user.topic };
    Some(CallEvent::Data { member, reliability: packet.reliability, message })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{key::MediaKey, machine::testing};

    #[test]
    fn sealed_message_opens_with_its_senders_key_only() {
        let sealing = Sealing::default();
        sealing.enable();
        let message = UserData { payload: b"hello".to_vec(), topic: Some("greeting".to_owned()) };
        let mut sealer = DataSealer::new(&sealing);
        let packet = |sealer: &mut DataSealer| {
            sealer.packet(&sealing, Reliability::Reliable, Vec::new(), message.clone())
        };
        assert!(packet(&mut sealer).is_err(), "nothing is sent in clear before the first key");
        let key = MediaKey::new(vec![3; 16]).unwrap();
        sealing.switch_to(KeyIndex(5), &key).unwrap();
        let packet = packet(&mut sealer).unwrap();

        let alice = testing::state_member("@alice:example.org", "A", 0);
        let ring = KeyRing::new();
        assert!(open(alice.clone(), ring.clone(), packet.clone()).is_none());
        ring.set(KeyIndex(5), &key).unwrap();
        let opened = open(alice.clone(), ring.clone(), packet.clone());
        assert!(matches!(opened, Some(CallEvent::Data { message: got, .. }) if got == message));
        assert!(open(alice, ring, packet).is_none(), "a replay is dropped");
    }
}
