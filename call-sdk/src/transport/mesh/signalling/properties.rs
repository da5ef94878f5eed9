//! What must hold for any message of a member: the machine waits in the end, keeps a bounded number of messages, and
//! gives its connections nothing oversized (docs/fuzzing.md).
#![allow(clippy::disallowed_methods, reason = "a property needs some point in time to start from")]

use std::time::{Duration, Instant};

use rand::{SeedableRng as _, rngs::StdRng};
use ruma_common::{OwnedDeviceId, OwnedUserId};
use serde_json::{Map, Value, json};

use super::{
    super::{Candidate, Negotiate, Negotiated, Sdp, Streams, wire},
    MeshPeer, Signalling, SignallingInput, SignallingOutput, Us,
};
use crate::{
    matrix::DeliveryFailure,
    member::{Device, MemberId, MemberKey, Slot},
    transport::{ConnectionId, MeshSession},
};

const ROOM: &str = "!room:example.org";
const TYPES: [&str; 8] = [
    "m.call.invite",
    "m.call.answer",
    "m.call.candidates",
    "m.call.negotiate",
    "m.call.sdp_stream_metadata_changed",
    "m.call.hangup",
    "m.call.select_answer",
    "m.call.reject",
];
/// Longest series of outputs after one input.
const OUTPUTS: usize = 10_000;
/// Most messages and calls that are kept for one pair and for all unknown senders together.
const KEPT: usize = 8 + 16 + 32 + 32;

/// Takes a series of steps, each ended by `0xff`: a message whose missing fields are filled in, an event of the
/// connection, an outcome, or time.
pub fn mesh_message(data: &[u8]) {
    let [role, data @ ..] = data else { return };
    let (Ok(room_id), Some(bob)) = (ROOM.try_into(), device("@bob:example.org", "B")) else { return };
    // Before or after Bob in the order of callers.
    let name = if role & 1 == 1 { "@carol:example.org" } else { "@alice:example.org" };
    let Some(device) = device(name, "US") else { return };
    let us = Us { room_id, slot: Slot::room_call(), device, session: MeshSession("ours".to_owned()) };
    let mut bench = Bench {
        now: Instant::now(),
        machine: Signalling::new(us, ConnectionId::FIRST_MESH_ROUTE, StdRng::seed_from_u64(1)),
        bob,
        connection: None,
        call: Value::from("call"),
    };
    if role & 2 == 0 {
        bench.peers();
    }
    for step in data.split(|byte| *byte == 0xff).take(128) {
        let [kind, flags, text @ ..] = step else { continue };
        bench.step(*kind, *flags, text);
    }
    bench.machine.handle(bench.now, SignallingInput::Leave);
    bench.drain();
    assert_eq!(bench.machine.wake_at(), None, "the machine wants something after it left");
}

struct Bench {
    now: Instant,
    machine: Signalling,
    bob: Device,
    connection: Option<ConnectionId>,
    /// The call that was spoken about last.
    call: Value,
}

impl Bench {
    fn step(&mut self, kind: u8, flags: u8, text: &[u8]) {
        match kind % 16 {
            number @ 0..8 => {
                let Ok(Value::Object(fields)) = serde_json::from_slice(text) else { return };
                let content = self.content(flags, fields);
                let event_type = TYPES[usize::from(number)];
                let from = self.bob.clone();
                self.handle(SignallingInput::Message { from: &from, event_type, content: &content });
            }
            8 => self.peers(),
            9 => self.handle(SignallingInput::Peers { peers: Vec::new(), moved: &[], lingering: &[] }),
            10 => {
                self.now += Duration::from_millis(u64::from(flags) * 100);
                self.drain();
            }
            number => {
                let Some(connection) = self.connection else { return };
                if number == 11 {
                    let result = if flags == 0 { Err("no port".to_owned()) } else { Ok(()) };
                    return self.handle(SignallingInput::Opened { connection, result });
                }
                let (sdp, streams) = (Sdp("v=0".to_owned()), Streams::new());
                let event = match (number, flags % 8) {
                    (12, 0) => Negotiated::Offer { sdp, streams },
                    (12, 1) => Negotiated::Answer { sdp, streams },
                    (12, 2) => Negotiated::CandidatesEnd,
                    (12, 3) => Negotiated::Streams(streams),
                    (12, 4) => Negotiated::Needed { streams },
                    (12, 5) => Negotiated::Up,
                    (12, 6) => Negotiated::Interrupted,
                    (12, _) => Negotiated::Failed("fuzzed".to_owned()),
                    _ => {
                        let candidate = Candidate { candidate: "a".to_owned(), mid: None, index: None };
                        Negotiated::Candidates(vec![candidate; usize::from(flags)])
                    }
                };
                self.handle(SignallingInput::Negotiated { connection, event });
            }
        }
    }

    fn content(&self, flags: u8, mut fields: Map<String, Value>) -> Value {
        let mut content = json!({
            "version": "1", "room_id": ROOM, "conf_id": "m.call#ROOM", "call_id": self.call, "party_id": "B",
            "device_id": "B", "sender_session_id": "bobs", "dest_session_id": "ours", "seq": flags >> 4,
            "offer": { "type": "offer", "sdp": "v=0" }, "answer": { "type": "answer", "sdp": "v=0" },
            "description": { "type": if flags & 1 == 0 { "offer" } else { "answer" }, "sdp": "v=0" },
            "candidates": [{ "candidate": "a" }], "sdp_stream_metadata": {},
        });
        if let Some(content) = content.as_object_mut() {
            content.append(&mut fields);
        }
        content
    }

    fn peers(&mut self) {
        let (device, session) = (self.bob.clone(), MeshSession("bobs".to_owned()));
        let member = MemberKey {
            user_id: device.user_id.clone(),
            device_id: Some(device.device_id.clone()),
            member_id: MemberId("bob".to_owned()),
        };
        let peers = vec![MeshPeer { member, device, session }];
        self.handle(SignallingInput::Peers { peers, moved: &[], lingering: &[] });
    }

    fn handle(&mut self, input: SignallingInput<'_>) {
        self.machine.handle(self.now, input);
        self.drain();
    }

    fn drain(&mut self) {
        for _ in 0..OUTPUTS {
            let Some(output) = self.machine.poll(self.now) else {
                assert!(self.machine.wake_at().is_none_or(|at| at > self.now), "it asks to be woken at once");
                assert!(self.machine.kept() <= KEPT, "{} messages are kept", self.machine.kept());
                return;
            };
            match output {
                SignallingOutput::Open { connection, .. } => {
                    assert!(self.connection.is_none(), "two connections to one member");
                    self.connection = Some(connection);
                }
                SignallingOutput::Close { connection, .. } => {
                    assert_eq!(self.connection, Some(connection), "another connection is closed");
                    self.connection = None;
                }
                SignallingOutput::Negotiate { connection, command } => {
                    assert_eq!(self.connection, Some(connection), "a command to a closed connection");
                    check(&command);
                }
                SignallingOutput::Send { id, content, .. } => {
                    self.call = content["call_id"].clone();
                    let refused = self.call.as_str().is_some_and(|call| call.ends_with(['a', 'e', 'i']));
                    let result = if refused { Err(DeliveryFailure::UnknownDevice) } else { Ok(()) };
                    self.machine.handle(self.now, SignallingInput::Sent { id, result });
                }
                _ => {}
            }
        }
        panic!("the machine never waits");
    }
}

fn check(command: &Negotiate) {
    let fits = |sdp: &Sdp, streams: &Streams| {
        (1..=wire::MAX_SDP).contains(&sdp.0.len()) && streams.len() <= wire::MAX_STREAMS
    };
    let bounded = match command {
        Negotiate::Offer { .. } => true,
        Negotiate::Answer { sdp, streams } | Negotiate::TakeAnswer { sdp, streams } => fits(sdp, streams),
        Negotiate::Candidates(candidates) => candidates.len() <= 256,
        Negotiate::Streams(streams) => streams.len() <= wire::MAX_STREAMS,
    };
    assert!(bounded, "{command:?}");
}

fn device(user: &str, device: &str) -> Option<Device> {
    let user: OwnedUserId = user.try_into().ok()?;
    Some(Device::new(user, OwnedDeviceId::from(device)))
}

#[cfg(test)]
mod tests {
    use rand::Rng as _;

    use super::*;

    #[test]
    fn committed_corpus_keeps_the_property() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/corpus/mesh_message");
        let mut inputs = 0;
        for entry in std::fs::read_dir(folder).unwrap() {
            mesh_message(&std::fs::read(entry.unwrap().path()).unwrap());
            inputs += 1;
        }
        assert!(inputs > 0);
    }

    #[test]
    fn random_steps_keep_the_property() {
        const TEXTS: [&str; 6] = [
            "{}",
            r#"{"call_id":"a"}"#,
            r#"{"call_id":"~"}"#,
            r#"{"dev.antiphon.call_number":3}"#,
            r#"{"sender_session_id":"other"}"#,
            r#"{"seq":9}"#,
        ];
        let mut rng = StdRng::seed_from_u64(1);
        for _ in 0..3000 {
            let mut data = vec![rng.random::<u8>()];
            for _ in 0..60 {
                data.extend([rng.random_range(0..16), rng.random_range(0..0xff)]);
                data.extend(TEXTS[rng.random_range(0..TEXTS.len())].bytes());
                data.push(0xff);
            }
            mesh_message(&data);
        }
    }
}
