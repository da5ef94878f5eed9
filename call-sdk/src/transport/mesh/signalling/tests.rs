#![allow(clippy::disallowed_methods, reason = "a test needs some point in time to start from")]

use std::time::Duration;

use rand::SeedableRng as _;
use serde_json::json;

use super::*;
use crate::{
    machine::testing,
    matrix::DeliveryFailure,
    member::MemberId,
    transport::mesh::{Candidate, Sdp, Streams},
};

const ROOM: &str = "!room:example.org";

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn key(device: &Device) -> MemberKey {
    let member_id = MemberId(device.user_id.to_string());
    MemberKey { user_id: device.user_id.clone(), device_id: Some(device.device_id.clone()), member_id }
}

fn bob() -> Device {
    testing::device("@bob:example.org", "B")
}

fn session(text: &str) -> MeshSession {
    MeshSession(text.to_owned())
}

fn streams(count: usize) -> Streams {
    (0..count).map(|n| (format!("s{n}"), Default::default())).collect()
}

fn candidate(text: &str) -> Candidate {
    Candidate { candidate: text.to_owned(), mid: None, index: Some(0) }
}

/// Our machine, and what Bob says to it.
struct Bench {
    now: Instant,
    machine: Signalling,
    bob_session: &'static str,
}

/// What our machine said.
#[derive(Debug, Default)]
struct Said {
    messages: Vec<(MessageId, &'static str, Value)>,
    opened: Vec<ConnectionId>,
    closed: Vec<ConnectionId>,
    commands: Vec<Negotiate>,
    connected: usize,
    failed: Vec<String>,
}

impl Said {
    fn types(&self) -> Vec<&'static str> {
        self.messages.iter().map(|(_, event_type, _)| *event_type).collect()
    }

    fn is_nothing(&self) -> bool {
        self.messages.is_empty()
            && self.opened.is_empty()
            && self.closed.is_empty()
            && self.commands.is_empty()
            && self.connected == 0
            && self.failed.is_empty()
    }
}

impl Bench {
    /// We are the caller of Bob by order if our name is greater.
    fn named(user: &str) -> Self {
        let us = Us {
            room_id: ROOM.try_into().unwrap(),
            slot: Slot::room_call(),
            device: testing::device(user, "US"),
            session: session("ours"),
        };
        let machine = Signalling::new(us, ConnectionId::FIRST_MESH_ROUTE, StdRng::seed_from_u64(1));
        Self { now: Instant::now(), machine, bob_session: "bobs" }
    }

    fn caller() -> Self {
        Self::named("@carol:example.org")
    }

    fn callee() -> Self {
        Self::named("@alice:example.org")
    }

    fn handle(&mut self, input: SignallingInput<'_>) -> Said {
        self.machine.handle(self.now, input);
        self.drain()
    }

    fn drain(&mut self) -> Said {
        let mut said = Said::default();
        while let Some(output) = self.machine.poll(self.now) {
            match output {
                SignallingOutput::Send { id, to, event_type, content } => {
                    assert_eq!(to, bob());
                    said.messages.push((id, event_type, content));
                }
                SignallingOutput::Open { connection, .. } => said.opened.push(connection),
                SignallingOutput::Negotiate { command, .. } => said.commands.push(command),
                SignallingOutput::Close { connection, .. } => said.closed.push(connection),
                SignallingOutput::Connected { .. } => said.connected += 1,
                SignallingOutput::Failed { reason, .. } => said.failed.push(reason),
            }
        }
        assert!(self.machine.wake_at().is_none_or(|at| at > self.now));
        said
    }

    /// Lets time pass. Messages are delivered to the homeserver at once.
    fn pass(&mut self, time: Duration) -> Said {
        let end = self.now + time;
        let mut all = Said::default();
        loop {
            self.now = self.machine.wake_at().map_or(end, |at| at.min(end)).max(self.now);
            let said = self.drain();
            for (id, ..) in &said.messages {
                self.machine.handle(self.now, SignallingInput::Sent { id: *id, result: Ok(()) });
            }
            all.messages.extend(said.messages);
            all.opened.extend(said.opened);
            all.closed.extend(said.closed);
            all.commands.extend(said.commands);
            all.connected += said.connected;
            all.failed.extend(said.failed);
            if self.now >= end {
                return all;
            }
        }
    }

    fn peers(&mut self, sessions: &[&str]) -> Said {
        let peers = sessions
            .iter()
            .map(|text| MeshPeer { member: key(&bob()), device: bob(), session: session(text) })
            .collect();
        self.handle(SignallingInput::Peers { peers, moved: &[], lingering: &[] })
    }

    fn opened(&mut self, connection: ConnectionId) -> Said {
        self.handle(SignallingInput::Opened { connection, result: Ok(()) })
    }

    fn event(&mut self, connection: ConnectionId, event: Negotiated) -> Said {
        self.handle(SignallingInput::Negotiated { connection, event })
    }

    fn offer(&mut self, connection: ConnectionId) -> Said {
        let event = Negotiated::Offer { sdp: Sdp("our offer".to_owned()), streams: streams(1) };
        self.event(connection, event)
    }

    fn answer(&mut self, connection: ConnectionId) -> Said {
        let event = Negotiated::Answer { sdp: Sdp("our answer".to_owned()), streams: streams(1) };
        self.event(connection, event)
    }

    fn content(&self, call: &str, seq: u64, body: Value) -> Value {
        let mut content = json!({
            "version": "1", "room_id": ROOM, "conf_id": "m.call#ROOM", "call_id": call, "party_id": "B",
            "device_id": "B", "sender_session_id": self.bob_session, "dest_session_id": "ours", "seq": seq,
        });
        content.as_object_mut().unwrap().extend(body.as_object().unwrap().clone());
        content
    }

    fn hear(&mut self, event_type: &str, call: &str, seq: u64, body: Value) -> Said {
        let content = self.content(call, seq, body);
        self.hear_content(event_type, &content)
    }

    fn hear_content(&mut self, event_type: &str, content: &Value) -> Said {
        self.handle(SignallingInput::Message { from: &bob(), event_type, content })
    }

    fn hear_invite(&mut self, call: &str) -> Said {
        self.hear("m.call.invite", call, 0, invite())
    }

    /// We have called: the connection and the call.
    fn called(&mut self) -> (ConnectionId, String) {
        let said = self.peers(&[self.bob_session]);
        self.call_from(&said)
    }

    fn call_from(&mut self, said: &Said) -> (ConnectionId, String) {
        let [connection] = said.opened[..] else { panic!("{said:?}") };
        assert_eq!(self.opened(connection).commands, [Negotiate::Offer { restart_ice: false }]);
        let said = self.offer(connection);
        assert_eq!(said.types(), ["m.call.invite"]);
        self.delivered(&said);
        (connection, said.messages[0].2["call_id"].as_str().unwrap().to_owned())
    }

    fn hear_answer(&mut self, call: &str) -> Said {
        let answer = json!({ "answer": { "type": "answer", "sdp": "their answer" } });
        self.hear("m.call.answer", call, 0, answer)
    }

    /// A call of ours that is up.
    fn connected(&mut self) -> (ConnectionId, String) {
        let (connection, call) = self.called();
        self.hear_answer(&call);
        assert_eq!(self.event(connection, Negotiated::Up).connected, 1);
        (connection, call)
    }

    /// A call of Bob's that is up.
    fn answered(&mut self, call: &str) -> ConnectionId {
        self.peers(&[self.bob_session]);
        let [connection] = self.hear_invite(call).opened[..] else { panic!("no connection") };
        self.opened(connection);
        let said = self.answer(connection);
        assert_eq!(said.types(), ["m.call.answer"]);
        self.delivered(&said);
        assert_eq!(self.event(connection, Negotiated::Up).connected, 1);
        connection
    }

    fn delivered(&mut self, said: &Said) {
        for (id, ..) in &said.messages {
            self.machine.handle(self.now, SignallingInput::Sent { id: *id, result: Ok(()) });
        }
    }
}

fn invite() -> Value {
    json!({ "offer": { "type": "offer", "sdp": "their offer" }, "lifetime": 60000 })
}

fn later_offer() -> Value {
    json!({ "description": { "type": "offer", "sdp": "later offer" } })
}

fn later_answer() -> Value {
    json!({ "description": { "type": "answer", "sdp": "later answer" } })
}

#[test]
fn greater_member_calls_at_once() {
    let mut bench = Bench::caller();
    let (connection, _) = bench.called();
    assert_eq!(connection, ConnectionId { route: ConnectionId::FIRST_MESH_ROUTE, generation: 0 });
    assert_eq!(bench.machine.member_of(connection), Some(&key(&bob())));
}

#[test]
fn lesser_member_calls_after_ten_seconds_without_an_invite() {
    let mut bench = Bench::callee();
    assert!(bench.peers(&["bobs"]).is_nothing());
    assert!(bench.pass(Duration::from_millis(9_999)).is_nothing());
    assert_eq!(bench.pass(Duration::from_millis(1)).opened.len(), 1);
}

#[test]
fn callee_opens_then_answers() {
    let mut bench = Bench::callee();
    bench.peers(&["bobs"]);
    let [connection] = bench.hear_invite("x").opened[..] else { panic!() };
    assert_eq!(bench.machine.member_of(connection), Some(&key(&bob())));
    let said = bench.opened(connection);
    let offer = Negotiate::Answer { sdp: Sdp("their offer".into()), streams: Streams::new() };
    assert_eq!(said.commands, [offer]);
    let said = bench.answer(connection);
    assert_eq!(said.types(), ["m.call.answer"]);
    let content = &said.messages[0].2;
    assert_eq!(content["answer"], json!({ "type": "answer", "sdp": "our answer" }));
    assert_eq!((&content["call_id"], &content["seq"]), (&json!("x"), &json!(0)));
    assert_eq!(bench.event(connection, Negotiated::Up).connected, 1);
    assert_eq!(bench.event(connection, Negotiated::Up).connected, 0);
}

#[test]
fn invite_with_smaller_call_id_wins_a_race() {
    // Random call ids are alphanumeric: `~` is greater than all of them, `!` smaller.
    let mut bench = Bench::caller();
    let (connection, call) = bench.called();
    assert!(bench.hear_invite("~").is_nothing());
    // Nothing of the losing call counts any more.
    assert!(bench.hear("m.call.hangup", "~", 1, json!({ "reason": "ice_timeout" })).is_nothing());
    let said = bench.hear_invite("!");
    assert_eq!(said.closed, [connection]);
    assert_eq!((said.opened.len(), said.messages.len()), (1, 0));
    assert!(bench.hear_answer(&call).is_nothing());
}

#[test]
fn late_invite_of_a_lost_race_does_not_replace_an_answered_call() {
    let mut bench = Bench::caller();
    let (connection, _) = bench.connected();
    assert!(bench.hear_invite("~").is_nothing());
    // Long after, it is a new call of a peer that has given up the present one.
    bench.pass(seconds(21));
    assert_eq!(bench.hear_invite("~").closed, [connection]);
}

#[test]
fn invite_before_ours_was_sent_is_taken() {
    let mut bench = Bench::caller();
    let [connection] = bench.peers(&["bobs"]).opened[..] else { panic!() };
    let said = bench.hear_invite("~");
    assert_eq!(said.closed, [connection]);
    assert_eq!(said.opened.len(), 1);
    assert!(bench.opened(connection).is_nothing());
}

#[test]
fn another_invite_replaces_the_present_call() {
    let mut bench = Bench::callee();
    let first = bench.answered("x");
    assert!(bench.hear_invite("y").is_nothing(), "each costs a connection, so they are not taken in a row");
    bench.pass(seconds(1));
    let said = bench.hear_invite("y");
    assert_eq!(said.closed, [first]);
    let [second] = said.opened[..] else { panic!() };
    assert_eq!(second, ConnectionId { generation: 1, ..first });
    // Late events and messages of the first one are dropped.
    assert_eq!(bench.machine.member_of(first), None);
    assert!(bench.event(first, Negotiated::Failed("late".into())).is_nothing());
    assert!(bench.hear_invite("x").is_nothing());
}

#[test]
fn invite_with_a_lower_number_is_stale() {
    let mut bench = Bench::callee();
    bench.peers(&["bobs"]);
    let numbered = |number: u64| {
        let mut invite = invite();
        invite["dev.antiphon.call_number"] = json!(number);
        invite
    };
    assert_eq!(bench.hear("m.call.invite", "y", 0, numbered(5)).opened.len(), 1);
    bench.pass(seconds(1));
    assert!(bench.hear("m.call.invite", "x", 0, numbered(4)).is_nothing());
    assert_eq!(bench.hear("m.call.invite", "z", 0, numbered(6)).opened.len(), 1);
}

#[test]
fn candidates_are_collected_for_half_a_second_and_never_overtake_the_description() {
    let mut bench = Bench::caller();
    let [connection] = bench.peers(&["bobs"]).opened[..] else { panic!() };
    bench.opened(connection);
    assert!(bench.event(connection, Negotiated::Candidates(vec![candidate("a")])).is_nothing());
    assert!(bench.pass(seconds(2)).is_nothing());
    assert_eq!(bench.offer(connection).types(), ["m.call.invite"]);
    bench.event(connection, Negotiated::Candidates(vec![candidate("b")]));
    let said = bench.pass(Duration::from_millis(500));
    assert_eq!(said.types(), ["m.call.candidates"]);
    let content = &said.messages[0].2;
    assert_eq!(content["candidates"].as_array().unwrap().len(), 2);
    assert_eq!(content["candidates"][0], json!({ "candidate": "a", "sdpMLineIndex": 0 }));
    assert_eq!(content["seq"], 1);
    let said = bench.event(connection, Negotiated::CandidatesEnd);
    assert_eq!(said.messages[0].2["candidates"], json!([{ "candidate": "" }]));
}

#[test]
fn their_candidates_and_streams_wait_for_their_description() {
    let mut bench = Bench::callee();
    bench.peers(&["bobs"]);
    // Even before the invite.
    let list = json!({ "candidates": [{ "candidate": "a", "sdpMid": "0" }] });
    assert!(bench.hear("m.call.candidates", "x", 1, list).is_nothing());
    let [connection] = bench.hear_invite("x").opened[..] else { panic!() };
    let muted = json!({ "sdp_stream_metadata": { "s": { "purpose": "m.usermedia", "audio_muted": true } } });
    assert!(bench.hear("m.call.sdp_stream_metadata_changed", "x", 2, muted).is_nothing());
    let commands = bench.opened(connection).commands;
    assert!(
        matches!(
            &commands[..],
            [Negotiate::Answer { .. }, Negotiate::Candidates(list), Negotiate::Streams(streams)]
                if list.len() == 1 && streams["s"].audio_muted
        ),
        "{commands:?}"
    );
}

#[test]
fn messages_are_sent_again_until_something_new_is_heard() {
    let mut bench = Bench::caller();
    let (connection, call) = bench.called();
    let said = bench.event(connection, Negotiated::CandidatesEnd);
    bench.delivered(&said);
    let said = bench.pass(Duration::from_millis(2_999));
    assert_eq!(said.types(), [""; 0]);
    let first = bench.pass(Duration::from_millis(1));
    assert_eq!(first.types(), ["m.call.invite", "m.call.candidates"]);
    let second = bench.pass(seconds(6));
    assert_eq!(second.types(), ["m.call.invite", "m.call.candidates"]);
    assert_eq!(first.messages[0].2, second.messages[0].2, "unchanged");
    bench.hear_answer(&call);
    bench.event(connection, Negotiated::Up);
    assert!(bench.pass(seconds(60)).is_nothing());
}

#[test]
fn repeated_invite_is_answered_with_the_same_answer() {
    let mut bench = Bench::callee();
    bench.answered("x");
    bench.pass(seconds(2));
    let said = bench.hear_invite("x");
    assert_eq!(said.types(), ["m.call.answer"]);
    assert_eq!(said.messages[0].2["seq"], 0);
    // A flood of them is not.
    bench.delivered(&said);
    assert!(bench.hear_invite("x").is_nothing());
}

#[test]
fn device_that_is_refused_is_left_alone_until_trust_changes() {
    let mut bench = Bench::caller();
    let [connection] = bench.peers(&["bobs"]).opened[..] else { panic!() };
    bench.opened(connection);
    let id = bench.offer(connection).messages[0].0;
    let said = bench.handle(SignallingInput::Sent { id, result: Err(DeliveryFailure::NotCrossSigned) });
    assert_eq!((said.closed.len(), said.failed.len()), (1, 1));
    assert!(bench.pass(seconds(200)).is_nothing());
    let user = bob().user_id;
    assert_eq!(bench.handle(SignallingInput::TrustChanged(&user)).opened.len(), 1);
}

#[test]
fn message_that_was_not_sent_is_sent_again_with_growing_waits() {
    for failure in [DeliveryFailure::UnknownDevice, DeliveryFailure::TimedOut] {
        let mut bench = Bench::caller();
        let [connection] = bench.peers(&["bobs"]).opened[..] else { panic!() };
        bench.opened(connection);
        let mut said = bench.offer(connection);
        for wait in [1, 2, 4, 8] {
            let id = said.messages[0].0;
            assert!(bench.handle(SignallingInput::Sent { id, result: Err(failure.clone()) }).is_nothing());
            bench.now += seconds(wait) - Duration::from_millis(1);
            assert!(bench.drain().is_nothing());
            bench.now += Duration::from_millis(1);
            said = bench.drain();
            assert_eq!(said.types(), ["m.call.invite"]);
        }
    }
}

#[test]
fn attempts_without_an_answer_are_hung_up_after_twenty_seconds_and_repeated() {
    let mut bench = Bench::caller();
    let (mut connection, _) = bench.called();
    for wait in [1, 2, 4, 8, 16, 30, 30] {
        let said = bench.pass(seconds(20));
        assert_eq!(said.closed, [connection]);
        assert_eq!(said.failed.len(), 1);
        let (_, event_type, content) = said.messages.last().unwrap();
        assert_eq!((*event_type, &content["reason"]), ("m.call.hangup", &json!("invite_timeout")));
        assert!(bench.pass(seconds(wait) - Duration::from_millis(1)).is_nothing());
        let said = bench.pass(Duration::from_millis(1));
        let next = bench.call_from(&said).0;
        assert_eq!(next, ConnectionId { generation: connection.generation + 1, ..connection });
        connection = next;
    }
}

#[test]
fn answered_attempt_without_a_path_ends_with_ice_timeout() {
    let mut bench = Bench::caller();
    let (_, call) = bench.called();
    bench.hear_answer(&call);
    let said = bench.pass(seconds(20));
    assert_eq!(said.messages.last().unwrap().2["reason"], "ice_timeout");
}

#[test]
fn hangup_is_repeated_until_the_homeserver_takes_it() {
    let mut bench = Bench::caller();
    let (connection, _) = bench.called();
    let said = bench.event(connection, Negotiated::Failed("bad".into()));
    assert_eq!((said.types(), &said.failed[..]), (vec!["m.call.hangup"], &["bad".to_owned()][..]));
    let (id, _, content) = &said.messages[0];
    assert_eq!(content["reason"], "unknown_error");
    bench
        .machine
        .handle(bench.now, SignallingInput::Sent { id: *id, result: Err(DeliveryFailure::TimedOut) });
    bench.now += seconds(1);
    assert_eq!(bench.drain().types(), ["m.call.hangup"]);
}

#[test]
fn connection_that_cannot_be_opened_is_tried_again() {
    let mut bench = Bench::caller();
    let [connection] = bench.peers(&["bobs"]).opened[..] else { panic!() };
    let said = bench.handle(SignallingInput::Opened { connection, result: Err("no port".into()) });
    assert_eq!((&said.closed[..], said.messages.len(), said.failed.len()), (&[connection][..], 0, 1));
    assert_eq!(bench.pass(seconds(1)).opened.len(), 1);
}

#[test]
fn caller_makes_one_offer_at_a_time() {
    let mut bench = Bench::caller();
    let (connection, call) = bench.connected();
    let needed = || Negotiated::Needed { streams: streams(2) };
    assert_eq!(bench.event(connection, needed()).commands, [Negotiate::Offer { restart_ice: false }]);
    assert!(bench.event(connection, needed()).is_nothing());
    let said = bench.offer(connection);
    assert_eq!(said.types(), ["m.call.negotiate"]);
    assert_eq!(said.messages[0].2["description"]["type"], "offer");
    assert!(bench.event(connection, needed()).is_nothing());
    let said = bench.hear("m.call.negotiate", &call, 1, later_answer());
    assert!(matches!(
        &said.commands[..],
        [Negotiate::TakeAnswer { .. }, Negotiate::Offer { restart_ice: false }]
    ));
    // The other side may not offer, and an answer without an offer is dropped.
    assert!(bench.hear("m.call.negotiate", &call, 2, later_offer()).is_nothing());
    assert!(bench.hear("m.call.negotiate", &call, 3, later_answer()).is_nothing());
}

#[test]
fn later_offer_is_repeated_until_it_is_answered() {
    let mut bench = Bench::caller();
    let (connection, call) = bench.connected();
    bench.event(connection, Negotiated::Needed { streams: streams(2) });
    let said = bench.offer(connection);
    bench.delivered(&said);
    let said = bench.pass(seconds(100));
    assert!((4..8).contains(&said.messages.len()), "{:?}", said.types());
    bench.hear("m.call.negotiate", &call, 1, later_answer());
    assert!(bench.pass(seconds(100)).is_nothing());
}

#[test]
fn callee_asks_for_sections_instead_of_offering() {
    let mut bench = Bench::callee();
    let connection = bench.answered("x");
    let said = bench.event(connection, Negotiated::Needed { streams: streams(3) });
    assert_eq!(said.types(), ["m.call.sdp_stream_metadata_changed"]);
    assert_eq!(said.messages[0].2["sdp_stream_metadata"].as_object().unwrap().len(), 3);
    bench.delivered(&said);
    // The wish is repeated, but not for ever.
    let repeated = bench.pass(seconds(200));
    let wishes = repeated.types().iter().filter(|it| **it == "m.call.sdp_stream_metadata_changed").count();
    assert_eq!(wishes, 3);
    let said = bench.hear("m.call.negotiate", "x", 1, later_offer());
    assert!(matches!(&said.commands[..], [Negotiate::Answer { .. }]));
    let said = bench.answer(connection);
    assert_eq!(said.types(), ["m.call.negotiate"]);
    assert_eq!(said.messages[0].2["description"]["type"], "answer");
}

#[test]
fn muting_is_told_at_once_and_older_news_never_overrides_newer() {
    let mut bench = Bench::caller();
    let (connection, call) = bench.connected();
    assert_eq!(
        bench.event(connection, Negotiated::Streams(streams(1))).types(),
        ["m.call.sdp_stream_metadata_changed"]
    );
    let metadata = |count| json!({ "sdp_stream_metadata": streams(count) });
    let changed = "m.call.sdp_stream_metadata_changed";
    assert!(bench.hear(changed, &call, 2, metadata(2)).is_nothing());
    assert_eq!(bench.pass(seconds(5)).commands, [Negotiate::Streams(streams(2))]);
    assert!(bench.hear(changed, &call, 1, metadata(1)).is_nothing());
}

#[test]
fn lost_path_is_looked_for_after_two_seconds_and_given_up_after_twenty() {
    let mut bench = Bench::caller();
    let (connection, _) = bench.connected();
    assert!(bench.event(connection, Negotiated::Interrupted).is_nothing());
    assert!(bench.pass(Duration::from_millis(1_999)).is_nothing());
    let said = bench.pass(Duration::from_millis(1));
    assert_eq!(said.commands, [Negotiate::Offer { restart_ice: true }]);
    let said = bench.offer(connection);
    bench.delivered(&said);
    let said = bench.pass(seconds(18));
    assert_eq!(said.closed, [connection]);
    assert_eq!(said.messages.last().unwrap().2["reason"], "ice_failed");
}

#[test]
fn path_that_comes_back_is_left_alone() {
    let mut bench = Bench::callee();
    let connection = bench.answered("x");
    bench.event(connection, Negotiated::Interrupted);
    assert!(bench.pass(seconds(19)).is_nothing());
    bench.event(connection, Negotiated::Up);
    assert!(bench.pass(seconds(60)).is_nothing());
}

#[test]
fn failures_are_forgotten_with_the_session_and_after_a_stable_connection() {
    let mut bench = Bench::caller();
    bench.called();
    bench.pass(seconds(20));
    // Another session is called at once, on another route.
    bench.bob_session = "other";
    let (connection, call) = bench.called();
    assert_eq!(connection.route, ConnectionId::FIRST_MESH_ROUTE + 1);
    bench.hear_answer(&call);
    bench.event(connection, Negotiated::Up);
    bench.pass(seconds(30));
    bench.hear("m.call.hangup", &call, 1, json!({ "reason": "ice_failed" }));
    assert_eq!(bench.pass(seconds(1)).opened.len(), 1);
}

#[test]
fn peer_without_a_membership_is_told_so() {
    let mut bench = Bench::caller();
    let (connection, _) = bench.connected();
    let said = bench.peers(&[]);
    assert_eq!((said.types(), &said.closed[..]), (vec!["m.call.hangup"], &[connection][..]));
    assert_eq!(said.messages[0].2["reason"], "no_membership");
    assert_eq!(bench.machine.wake_at(), None);
    // It may be mistaken, and calls again.
    let (_, call) = bench.connected();
    bench.hear("m.call.hangup", &call, 1, json!({ "reason": "no_membership" }));
    assert_eq!(bench.pass(seconds(1)).opened.len(), 1);
}

#[test]
fn nobody_is_told_in_an_old_session() {
    let mut bench = Bench::caller();
    let (connection, _) = bench.connected();
    let said = bench.peers(&["other"]);
    assert_eq!((&said.closed[..], said.messages.len()), (&[connection][..], 0));
}

#[test]
fn both_sides_tell_that_a_pair_has_moved() {
    for mut bench in [Bench::caller(), Bench::callee()] {
        let connection =
            if bench.machine.desk.us.device < bob() { bench.answered("x") } else { bench.connected().0 };
        let peers = vec![];
        let moved = &[key(&bob())];
        let said = bench.handle(SignallingInput::Peers { peers, moved, lingering: &[] });
        assert_eq!((said.types(), &said.closed[..]), (vec!["m.call.hangup"], &[connection][..]));
        assert_eq!(said.messages[0].2["reason"], "moved");
    }
}

#[test]
fn pair_that_moved_and_is_wanted_again_is_called_at_once() {
    let mut bench = Bench::caller();
    let (_, call) = bench.connected();
    let peers = || vec![MeshPeer { member: key(&bob()), device: bob(), session: session("bobs") }];
    let bobs = [key(&bob())];
    let lingers = SignallingInput::Peers { peers: peers(), moved: &[], lingering: &bobs };
    assert!(bench.handle(lingers).is_nothing());
    let said = bench.hear("m.call.hangup", &call, 1, json!({ "reason": "moved" }));
    assert_eq!(said.closed.len(), 1);
    assert!(bench.pass(seconds(15)).is_nothing(), "a focus carries the pair");
    let said = bench.handle(SignallingInput::Peers { peers: peers(), moved: &[], lingering: &[] });
    assert_eq!(said.opened.len(), 1);

    // The hangup may also come after both have moved back.
    let (connection, call) = bench.call_from(&said);
    bench.hear_answer(&call);
    bench.event(connection, Negotiated::Up);
    bench.hear("m.call.hangup", &call, 1, json!({ "reason": "moved" }));
    assert_eq!(bench.pass(seconds(1)).opened.len(), 1);
}

#[test]
fn leaving_hangs_up_every_call() {
    let mut bench = Bench::callee();
    let connection = bench.answered("x");
    let said = bench.handle(SignallingInput::Leave);
    assert_eq!((said.types(), said.closed), (vec!["m.call.hangup"], vec![connection]));
    assert_eq!(said.messages[0].2["reason"], "user_hangup");
    assert_eq!(said.messages[0].2["seq"], 1);
    assert_eq!(bench.machine.wake_at(), None);
}

#[test]
fn member_that_hangs_up_is_left_alone_for_a_while() {
    let mut bench = Bench::caller();
    let (connection, call) = bench.connected();
    let said = bench.hear("m.call.hangup", &call, 9, json!({ "reason": "user_hangup" }));
    assert_eq!((&said.closed[..], said.failed.len()), (&[connection][..], 0));
    assert!(bench.pass(seconds(9)).is_nothing());
    assert_eq!(bench.pass(seconds(1)).opened.len(), 1);
}

#[test]
fn hangup_that_overtakes_its_invite_ends_the_call() {
    let mut bench = Bench::callee();
    bench.peers(&["bobs"]);
    bench.hear("m.call.hangup", "x", 1, json!({ "reason": "ice_timeout" }));
    assert!(bench.hear_invite("x").is_nothing());
}

#[test]
fn message_waits_for_the_membership_of_its_sender() {
    let mut bench = Bench::callee();
    assert!(bench.hear_invite("x").is_nothing());
    assert_eq!(bench.peers(&["bobs"]).opened.len(), 1);
    // So does a message of a session that the membership does not name yet.
    bench.bob_session = "other";
    assert!(bench.hear_invite("y").is_nothing());
    assert_eq!(bench.peers(&["other"]).opened.len(), 1);
}

#[test]
fn waiting_messages_expire_and_are_bounded() {
    let mut bench = Bench::callee();
    bench.hear_invite("x");
    bench.pass(seconds(30));
    assert!(bench.peers(&["bobs"]).is_nothing());
    assert_eq!(bench.machine.parked.len(), 0);
    bench.peers(&[]);
    // One device floods; the message of another stays.
    bench.hear_invite("x");
    for number in 0..1000 {
        let flooder = testing::device("@mallory:example.org", "M");
        let mut content = bench.content(&format!("c{number}"), 0, invite());
        (content["device_id"], content["party_id"]) = (json!("M"), json!("M"));
        let input =
            SignallingInput::Message { from: &flooder, event_type: "m.call.invite", content: &content };
        bench.handle(input);
    }
    assert_eq!(bench.machine.parked.len(), MAX_PARKED);
    assert_eq!(bench.peers(&["bobs"]).opened.len(), 1);
}

#[test]
fn message_with_a_wrong_field_is_ignored() {
    for (field, value) in [
        ("version", json!("0")),
        ("version", json!(1)),
        ("room_id", json!("!other:example.org")),
        ("conf_id", json!("m.call#other")),
        ("party_id", json!("C")),
        ("device_id", json!("C")),
        ("dest_session_id", json!("old")),
        ("sender_session_id", json!("old")),
        ("sender_session_id", json!("")),
        ("call_id", json!("")),
        ("call_id", json!("x".repeat(256))),
        ("seq", json!(-1)),
        ("seq", json!(0.5)),
        ("seq", json!(u64::MAX)),
        ("seq", Value::Null),
        ("invitee", json!("@mallory:example.org")),
        ("offer", json!({ "type": "answer", "sdp": "v=0" })),
        ("offer", json!({ "type": "offer", "sdp": "" })),
        ("offer", json!({ "type": "offer", "sdp": "x".repeat(wire::MAX_SDP + 1) })),
        ("offer", json!("v=0")),
        ("sdp_stream_metadata", json!([])),
        ("sdp_stream_metadata", json!({ "s": 1 })),
        ("sdp_stream_metadata", json!({ "s": { "purpose": "x".repeat(65) } })),
        ("sdp_stream_metadata", json!(streams(wire::MAX_STREAMS + 1))),
        ("dev.antiphon.call_number", json!("1")),
    ] {
        let mut bench = Bench::callee();
        bench.peers(&["bobs"]);
        let mut content = bench.content("x", 0, invite());
        content[field] = value.clone();
        assert!(bench.hear_content("m.call.invite", &content).is_nothing(), "{field}: {value}");
        assert!(bench.hear_content("m.call.invite", &json!([])).is_nothing());
    }
}

#[test]
fn oversized_candidates_are_ignored() {
    for list in [
        json!({}),
        json!([{ "sdpMid": "0" }]),
        json!([{ "candidate": "x".repeat(1025) }]),
        json!([{ "candidate": "a", "sdpMid": "x".repeat(256) }]),
        json!([{ "candidate": "a", "sdpMLineIndex": 65536 }]),
        json!(vec![json!({ "candidate": "a" }); wire::MAX_CANDIDATES + 1]),
    ] {
        let mut bench = Bench::callee();
        bench.answered("x");
        let said = bench.hear("m.call.candidates", "x", 1, json!({ "candidates": list }));
        assert!(said.is_nothing(), "{list}");
    }
}

#[test]
fn flood_of_candidates_ends_at_a_limit() {
    let mut bench = Bench::callee();
    bench.answered("x");
    let mut taken = 0;
    for seq in 1..200 {
        let list = json!({ "candidates": vec![json!({ "candidate": "a" }); wire::MAX_CANDIDATES] });
        for command in bench.hear("m.call.candidates", "x", seq, list).commands {
            let Negotiate::Candidates(list) = command else { panic!("{command:?}") };
            taken += list.len();
        }
    }
    assert_eq!(taken, 256);
}

#[test]
fn unused_messages_count_in_the_order_but_do_nothing() {
    let mut bench = Bench::callee();
    bench.answered("x");
    assert!(bench.hear("m.call.select_answer", "x", 1, json!({})).is_nothing());
    let said = bench.hear("m.call.candidates", "x", 2, json!({ "candidates": [{ "candidate": "a" }] }));
    assert_eq!(said.commands.len(), 1);
}

#[test]
fn members_are_one_peer_if_they_share_device_and_session() {
    let mut bench = Bench::caller();
    let peer = |member: MemberKey| MeshPeer { member, device: bob(), session: session("bobs") };
    let other = MemberKey { member_id: MemberId("other".into()), ..key(&bob()) };
    let own = MeshPeer {
        member: key(&testing::device("@carol:example.org", "US")),
        device: testing::device("@carol:example.org", "US"),
        session: session("left behind"),
    };
    let peers = vec![peer(key(&bob())), peer(other), own];
    let said = bench.handle(SignallingInput::Peers { peers, moved: &[], lingering: &[] });
    assert_eq!(said.opened.len(), 1);
}

#[test]
fn what_is_written_is_read_again() {
    use crate::transport::mesh::{TrackMetadata, wire::*};
    let alice = testing::device("@alice:example.org", "A");
    let us = |device: &Device, text| Us {
        room_id: ROOM.try_into().unwrap(),
        slot: Slot::room_call(),
        device: device.clone(),
        session: session(text),
    };
    let (from, to) = (us(&alice, "alices"), us(&bob(), "bobs"));
    let sdp = || Sdp("v=0".to_owned());
    let mut streams = streams(2);
    streams.get_mut("s1").unwrap().track = Some(TrackMetadata {
        source: crate::TrackSource::ScreenShareAudio,
        name: "slides".to_owned(),
        width: 0,
        height: 0,
    });
    let streams = || streams.clone();
    let mut bodies = vec![
        Body::Invite { sdp: sdp(), streams: streams(), number: Some(7) },
        Body::Invite { sdp: sdp(), streams: streams(), number: None },
        Body::Answer { sdp: sdp(), streams: streams() },
        Body::Candidates(vec![candidate("a"), candidate("")]),
        Body::Offer { sdp: sdp(), streams: streams() },
        Body::LaterAnswer { sdp: sdp(), streams: streams() },
        Body::Streams(streams()),
        Body::Ignored,
    ];
    bodies.extend(Reason::ALL.map(Body::Hangup));
    for (seq, body) in (0..).zip(bodies) {
        let call = CallId("c".to_owned());
        let envelope = Envelope { us: &from, to: &to.device, session: &to.session };
        let (event_type, content) = write(envelope, &call, seq, &body);
        let message = Message { call, session: from.session.clone(), seq, body };
        assert_eq!(read(&to, &alice, event_type, &content), Some(message));
        assert_eq!(read(&to, &bob(), event_type, &content), None, "another device says it");
        assert_eq!(read(&from, &alice, event_type, &content), None, "it is for somebody else");
    }
}
