//! Which datagrams of a DTLS handshake only repeat what arrived before.
//!
//! The engine stops its retransmission timer at every handshake message, also at one that it already had, and starts it
//! again only when a flight is complete. If a flight of ours is lost and the other side repeats its own before our timer
//! fires, our flight is never sent again, and the handshake never ends. RFC 6347 §4.2.4 wants such a repetition answered;
//! without it the timer runs on, and the answer is a little late.

use std::{collections::BTreeMap, net::SocketAddr};

/// The content type of handshake records (RFC 6347 §4.3.1).
const HANDSHAKE: u8 = 22;
const RECORD_HEADER: usize = 13;
const MESSAGE_HEADER: usize = 12;
const CLIENT_HELLO: u8 = 1;
/// Senders that are remembered; more than a connection has candidate pairs that get as far as DTLS.
const MOST_SENDERS: usize = 8;
/// Messages per sender; a handshake has at most eight from one side.
const MOST_MESSAGES: usize = 16;
/// Pieces of a message that do not touch.
const MOST_PIECES: usize = 32;

/// What arrived of the handshake, by sender.
#[derive(Debug, Default)]
pub(super) struct Repeats {
    senders: Vec<(SocketAddr, Messages)>,
}

/// By message number, which bytes arrived.
type Messages = BTreeMap<u16, Vec<(u32, u32)>>;

/// A piece of a handshake message (RFC 6347 §4.2.2).
#[derive(Clone, Copy, Debug)]
struct Fragment {
    kind: u8,
    message: u16,
    begin: u32,
    end: u32,
}

impl Repeats {
    /// Takes note of a datagram; true if it brings nothing but handshake messages that arrived before.
    ///
    /// Encrypted ones always count as new: a repeated last flight has to be answered with ours. So does the first
    /// ClientHello until the second: HelloVerifyRequest is sent only in answer to it, never by a timer.
    pub(super) fn is_repeat(&mut self, from: SocketAddr, datagram: &[u8]) -> bool {
        if datagram.first() != Some(&HANDSHAKE) {
            return false;
        }
        let Some(fragments) = fragments(datagram) else { return false };
        let Some(messages) = self.messages(from) else { return false };
        let verified = messages.contains_key(&1);
        let mut repeated = true;
        for fragment in fragments {
            let known = note(messages, fragment);
            let answered = fragment.kind != CLIENT_HELLO || fragment.message > 0 || verified;
            repeated &= known && answered;
        }
        repeated
    }

    fn messages(&mut self, from: SocketAddr) -> Option<&mut Messages> {
        let known = self.senders.iter().position(|(sender, _)| *sender == from);
        if known.is_none() && self.senders.len() < MOST_SENDERS {
            self.senders.push((from, Messages::new()));
        }
        let index = known.or_else(|| self.senders.iter().position(|(sender, _)| *sender == from))?;
        self.senders.get_mut(index).map(|(_, messages)| messages)
    }
}

/// Takes note of a fragment; true if all of it was known.
fn note(messages: &mut Messages, fragment: Fragment) -> bool {
    if messages.len() >= MOST_MESSAGES && !messages.contains_key(&fragment.message) {
        return false;
    }
    let pieces = messages.entry(fragment.message).or_default();
    if pieces.iter().any(|(begin, end)| *begin <= fragment.begin && fragment.end <= *end) {
        return true;
    }
    if pieces.len() < MOST_PIECES {
        pieces.push((fragment.begin, fragment.end));
        pieces.sort_unstable();
        pieces.dedup_by(|next, piece| {
            let touches = next.0 <= piece.1;
            if touches {
                piece.1 = piece.1.max(next.1);
            }
            touches
        });
    }
    false
}

/// The pieces of handshake messages in a datagram; `None` if there is anything else, or something malformed.
fn fragments(mut datagram: &[u8]) -> Option<Vec<Fragment>> {
    let mut fragments = Vec::new();
    while !datagram.is_empty() {
        let (header, rest) = datagram.split_at_checked(RECORD_HEADER)?;
        let epoch = number(header, 3, 2)?;
        if header.first() != Some(&HANDSHAKE) || epoch != 0 {
            return None;
        }
        let length = usize::try_from(number(header, 11, 2)?).ok()?;
        let (mut record, rest) = rest.split_at_checked(length)?;
        datagram = rest;
        while !record.is_empty() {
            let (header, rest) = record.split_at_checked(MESSAGE_HEADER)?;
            let (begin, length) = (number(header, 6, 3)?, number(header, 9, 3)?);
            fragments.push(Fragment {
                kind: *header.first()?,
                message: u16::try_from(number(header, 4, 2)?).ok()?,
                begin,
                end: begin + length,
            });
            record = rest.get(usize::try_from(length).ok()?..)?;
        }
    }
    Some(fragments)
}

/// The big-endian number of so many bytes.
fn number(bytes: &[u8], at: usize, length: usize) -> Option<u32> {
    let bytes = bytes.get(at..at + length)?;
    Some(bytes.iter().fold(0, |number, byte| number << 8 | u32::from(*byte)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SERVER_HELLO: u8 = 2;

    fn sender() -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], 1))
    }

    /// A record with one fragment of a handshake message of 100 bytes. Every record has another sequence number.
    fn record(number: u8, epoch: u8, kind: u8, message: u8, begin: u8, length: u8) -> Vec<u8> {
        let mut record = vec![HANDSHAKE, 254, 253, 0, epoch, 0, 0, 0, 0, 0, number, 0, 12 + length];
        record.extend([kind, 0, 0, 100, 0, message, 0, 0, begin, 0, 0, length]);
        record.extend(vec![7; usize::from(length)]);
        record
    }

    #[test]
    fn repeated_flight_is_recognised_however_it_is_cut() {
        let mut repeats = Repeats::default();
        let mut new = |datagram: &[u8]| !repeats.is_repeat(sender(), datagram);
        assert!(new(&record(0, 0, SERVER_HELLO, 0, 0, 60)));
        assert!(new(&record(1, 0, SERVER_HELLO, 0, 80, 20)));
        assert!(!new(&record(2, 0, SERVER_HELLO, 0, 10, 30)), "a part of what arrived");
        assert!(new(&record(3, 0, SERVER_HELLO, 0, 50, 40)), "what was missing");
        assert!(!new(&record(4, 0, SERVER_HELLO, 0, 0, 100)));
        let both = [record(5, 0, SERVER_HELLO, 0, 0, 100), record(6, 0, 14, 1, 0, 0)].concat();
        assert!(new(&both), "the second message is new");
        assert!(!new(&both));
    }

    #[test]
    fn senders_are_told_apart() {
        let mut repeats = Repeats::default();
        let datagram = record(0, 0, SERVER_HELLO, 0, 0, 100);
        for port in 1..=20 {
            let other = SocketAddr::from(([127, 0, 0, 1], port));
            assert!(!repeats.is_repeat(other, &datagram), "port {port}");
        }
        assert!(repeats.is_repeat(sender(), &datagram));
        assert_eq!(repeats.senders.len(), MOST_SENDERS);
    }

    #[test]
    fn first_client_hello_is_answered_until_the_second() {
        let mut repeats = Repeats::default();
        let mut new = |datagram: &[u8]| !repeats.is_repeat(sender(), datagram);
        assert!(new(&record(0, 0, CLIENT_HELLO, 0, 0, 100)));
        assert!(new(&record(1, 0, CLIENT_HELLO, 0, 0, 100)), "HelloVerifyRequest was lost");
        assert!(new(&record(2, 0, CLIENT_HELLO, 1, 0, 100)));
        assert!(!new(&record(3, 0, CLIENT_HELLO, 0, 0, 100)));
        assert!(!new(&record(4, 0, CLIENT_HELLO, 1, 0, 100)));
    }

    #[test]
    fn everything_but_plain_handshake_messages_is_new() {
        let mut repeats = Repeats::default();
        let finished = record(0, 1, 20, 5, 0, 100);
        let change_cipher_spec = [20, 254, 253, 0, 0, 0, 0, 0, 0, 0, 9, 0, 1, 1];
        let hello = record(1, 0, SERVER_HELLO, 0, 0, 100);
        let mixed = [&hello[..], &change_cipher_spec, &finished].concat();
        for datagram in [&finished[..], &change_cipher_spec, &mixed, b"", &[HANDSHAKE], &hello[..40]] {
            assert!(!repeats.is_repeat(sender(), datagram));
            assert!(!repeats.is_repeat(sender(), datagram));
        }
    }

    proptest! {
        #[test]
        fn any_datagram_is_survived(mut datagram in prop::collection::vec(any::<u8>(), 0..80), handshake: bool) {
            if handshake {
                datagram.insert(0, HANDSHAKE);
            }
            let mut repeats = Repeats::default();
            repeats.is_repeat(sender(), &datagram);
            repeats.is_repeat(sender(), &datagram);
        }
    }
}
