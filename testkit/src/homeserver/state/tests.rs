//! The machine on virtual time: no socket, no clock, no waiting.

use std::time::Duration;

use serde_json::{Value, json};

use super::*;

const SECOND: Duration = Duration::from_secs(1);
const MEMBER: &str = "org.matrix.msc3401.call.member";

struct Hs {
    state: State,
    now: Timestamp,
}

impl Hs {
    fn new() -> Self {
        Self::with(|_| {})
    }

    fn with(change: impl FnOnce(&mut Config)) -> Self {
        let mut config = Config {
            server_name: "localhost:1".to_owned(),
            max_delay: Duration::from_secs(3600),
            delayed_form: DelayedForm::QueryParameter,
            registration: true,
            room_version: RoomVersion::V12,
            limits: Limits::default(),
        };
        change(&mut config);
        Self { state: State::new(config, [7; 32]), now: Timestamp(1_000_000) }
    }

    fn user(&mut self, name: &str) -> Caller {
        self.state.add_user(name, "pw").unwrap();
        self.device(name)
    }

    fn device(&mut self, name: &str) -> Caller {
        let login = json!({"type": "m.login.password", "user": name, "password": "pw"});
        let session = self.state.login(self.now, &object(login)).unwrap();
        self.state.caller(session["access_token"].as_str().unwrap()).unwrap()
    }

    fn room(&mut self, creator: &Caller, body: Value) -> String {
        let answer = self.state.create_room(self.now, creator, &object(body)).unwrap();
        answer["room_id"].as_str().unwrap().to_owned()
    }

    /// A public room in which everybody may be in a call.
    fn call_room(&mut self, creator: &Caller, others: &[&Caller]) -> String {
        let levels = json!({"events": {MEMBER: 0}});
        let room =
            self.room(creator, json!({"preset": "public_chat", "power_level_content_override": levels}));
        for other in others {
            self.state.join(self.now, other, &room, &Object::new()).unwrap();
        }
        room
    }

    fn put(&mut self, who: &Caller, event: Outgoing) -> Answer {
        self.state.send(self.now, who, event)
    }

    fn sync(&mut self, who: &Caller, since: Option<&str>) -> Value {
        self.sync_with(who, since, None, false)
    }

    fn sync_with(&mut self, who: &Caller, since: Option<&str>, filter: Option<&str>, after: bool) -> Value {
        let request = self.state.read_sync_request(who, since, filter, false, after).unwrap();
        self.state.sync(self.now, who, &request).unwrap().body
    }

    fn member_content(&self, who: &Caller, room: &str, key: &str) -> Value {
        self.state.state_event(self.now, who, (room, MEMBER, key), false).unwrap_or(Value::Null)
    }

    /// Lets the time pass in one step.
    fn pass(&mut self, time: Duration) {
        self.now = self.now.after(time);
        self.state.fire_due(self.now);
    }
}

fn object(value: Value) -> Object {
    value.as_object().unwrap().clone()
}

fn state(room: &str, kind: &str, key: &str, content: Value) -> Outgoing {
    Outgoing { state_key: Some(key.to_owned()), txn: None, ..message(room, kind, "", content) }
}

fn message(room: &str, kind: &str, txn: &str, content: Value) -> Outgoing {
    Outgoing {
        room: room.to_owned(),
        kind: kind.to_owned(),
        state_key: None,
        txn: Some(txn.to_owned()),
        content: object(content),
        redacts: None,
        delay: None,
        sticky: None,
    }
}

fn delayed(event: Outgoing, delay: Duration) -> Outgoing {
    Outgoing { delay: Some(delay), ..event }
}

fn errcode(answer: Answer) -> String {
    answer.unwrap_err().body["errcode"].as_str().unwrap().to_owned()
}

fn delay_id(answer: Answer) -> String {
    answer.unwrap()["delay_id"].as_str().unwrap().to_owned()
}

fn token(answer: &Value) -> &str {
    answer["next_batch"].as_str().unwrap()
}

#[test]
fn a_delayed_leave_fires_at_its_time_and_not_before() {
    let mut hs = Hs::new();
    let alice = hs.user("alice");
    let room = hs.call_room(&alice, &[]);
    hs.put(&alice, state(&room, MEMBER, "_key", json!({"application": "m.call"}))).unwrap();
    hs.put(&alice, delayed(state(&room, MEMBER, "_key", json!({})), 8 * SECOND)).unwrap();
    assert_eq!(hs.state.next_deadline(), Some(hs.now.after(8 * SECOND)));

    hs.pass(8 * SECOND - Duration::from_millis(1));
    assert_eq!(hs.member_content(&alice, &room, "_key"), json!({"application": "m.call"}));
    hs.pass(Duration::from_millis(1));
    assert_eq!(hs.member_content(&alice, &room, "_key"), json!({}));
    assert_eq!(hs.state.next_deadline(), None);
}

#[test]
fn restarting_a_delayed_event_counts_from_the_restart() {
    let mut hs = Hs::new();
    let alice = hs.user("alice");
    let room = hs.call_room(&alice, &[]);
    hs.put(&alice, state(&room, MEMBER, "k", json!({"a": 1}))).unwrap();
    let id = delay_id(hs.put(&alice, delayed(state(&room, MEMBER, "k", json!({})), 8 * SECOND)));
    for _ in 0..10 {
        hs.pass(5 * SECOND);
        hs.state.manage_delayed(hs.now, &id, Action::Restart).unwrap();
    }
    assert_eq!(hs.member_content(&alice, &room, "k"), json!({"a": 1}));
    hs.pass(8 * SECOND);
    assert_eq!(hs.member_content(&alice, &room, "k"), json!({}));
    assert_eq!(errcode(hs.state.manage_delayed(hs.now, &id, Action::Restart)), "M_NOT_FOUND");
}

#[test]
fn a_cancelled_delayed_event_never_comes_and_one_sent_comes_at_once() {
    let mut hs = Hs::new();
    let alice = hs.user("alice");
    let room = hs.call_room(&alice, &[]);
    let cancelled = delay_id(hs.put(&alice, delayed(state(&room, MEMBER, "c", json!({"x": 1})), SECOND)));
    let sent = delay_id(hs.put(&alice, delayed(state(&room, MEMBER, "s", json!({"x": 2})), SECOND)));
    hs.state.manage_delayed(hs.now, &cancelled, Action::Cancel).unwrap();
    hs.state.manage_delayed(hs.now, &sent, Action::Send).unwrap();
    assert_eq!(hs.member_content(&alice, &room, "s"), json!({"x": 2}));
    hs.pass(10 * SECOND);
    assert_eq!(hs.member_content(&alice, &room, "c"), Value::Null);
}

#[test]
fn only_a_state_event_of_somebody_else_overtakes_a_delayed_one() {
    let mut hs = Hs::new();
    let (alice, bob) = (hs.user("alice"), hs.user("bob"));
    let room = hs.call_room(&alice, &[&bob]);
    let id = delay_id(hs.put(&alice, delayed(state(&room, MEMBER, "k", json!({})), 8 * SECOND)));
    hs.put(&alice, state(&room, MEMBER, "k", json!({"mine": 1}))).unwrap();
    hs.put(&bob, state(&room, MEMBER, "other key", json!({"his": 1}))).unwrap();
    assert!(hs.state.delayed_event(&alice, &id).is_ok());
    hs.put(&bob, state(&room, MEMBER, "k", json!({"his": 2}))).unwrap();
    assert_eq!(errcode(hs.state.delayed_event(&alice, &id)), "M_NOT_FOUND");
    hs.pass(10 * SECOND);
    assert_eq!(hs.member_content(&alice, &room, "k"), json!({"his": 2}));
}

#[test]
fn a_delayed_message_is_scheduled_once_per_transaction() {
    let mut hs = Hs::new();
    let (alice, bob) = (hs.user("alice"), hs.user("bob"));
    let room = hs.call_room(&alice, &[&bob]);
    let once = || delayed(message(&room, "m.x", "txn", json!({"n": 1})), SECOND);
    let first = delay_id(hs.put(&alice, once()));
    assert_eq!(delay_id(hs.put(&alice, once())), first);
    let since = hs.sync(&bob, None);
    hs.pass(SECOND);
    let news = hs.sync(&bob, Some(token(&since)));
    let events = news["rooms"]["join"][&room]["timeline"]["events"].as_array().unwrap();
    assert_eq!(events.len(), 1);
    assert_eq!(events[0]["content"], json!({"n": 1}));
    assert_eq!(events[0]["origin_server_ts"], json!(hs.now.0));
}

#[test]
fn a_delay_beyond_the_maximum_and_a_full_schedule_are_refused() {
    let mut hs = Hs::with(|config| config.limits.scheduled = 1);
    let alice = hs.user("alice");
    let room = hs.call_room(&alice, &[]);
    let leave = |delay| delayed(state(&room, MEMBER, "k", json!({})), delay);
    assert_eq!(errcode(hs.put(&alice, leave(3601 * SECOND))), "ORG.MATRIX.MSC4140_DELAY_TOO_LARGE");
    hs.put(&alice, leave(3600 * SECOND)).unwrap();
    let full = hs.put(&alice, leave(SECOND)).unwrap_err();
    assert_eq!((full.status, full.body["retry_after_ms"].clone()), (429, Value::Null));
    assert_eq!(errcode(hs.put(&alice, delayed(state("!no", MEMBER, "k", json!({})), SECOND))), "M_NOT_FOUND");
}

#[test]
fn a_delayed_event_is_authorised_when_it_is_sent() {
    let mut hs = Hs::new();
    let (alice, bob) = (hs.user("alice"), hs.user("bob"));
    let room = hs.call_room(&alice, &[&bob]);
    hs.put(&bob, state(&room, MEMBER, "k", json!({"in": 1}))).unwrap();
    hs.put(&bob, delayed(state(&room, MEMBER, "k", json!({})), SECOND)).unwrap();
    let kick = object(json!({"user_id": bob.user}));
    hs.state.change_membership(hs.now, &alice, &room, "kick", &kick).unwrap();
    hs.pass(2 * SECOND);
    assert_eq!(hs.member_content(&alice, &room, "k"), json!({"in": 1}));
}

#[test]
fn the_list_of_delayed_events_shows_both_generations_of_names_to_the_owner_only() {
    let mut hs = Hs::new();
    let (alice, bob) = (hs.user("alice"), hs.user("bob"));
    let room = hs.call_room(&alice, &[&bob]);
    let id = delay_id(hs.put(&alice, delayed(state(&room, MEMBER, "k", json!({"q": 1})), 8 * SECOND)));
    let expected = json!({
        "delay_id": id, "room_id": room, "type": MEMBER, "state_key": "k", "content": {"q": 1},
        "delay": 8000, "delay_ms": 8000, "running_since": hs.now.0, "delayed_since_ts": hs.now.0,
    });
    assert_eq!(hs.state.delayed_events(&alice).unwrap(), json!({"delayed_events": [expected]}));
    assert_eq!(hs.state.delayed_events(&bob).unwrap(), json!({"delayed_events": []}));
    assert_eq!(errcode(hs.state.delayed_event(&bob, &id)), "M_NOT_FOUND");
}

#[test]
fn sticky_events_outside_the_timeline_have_their_own_section_until_they_expire() {
    let mut hs = Hs::new();
    let (alice, bob, carol) = (hs.user("alice"), hs.user("bob"), hs.user("carol"));
    let room = hs.call_room(&alice, &[&bob]);
    let since = hs.sync(&bob, None);
    let sticky =
        Outgoing { sticky: Some(2 * 3600 * SECOND), ..message(&room, "m.sticky", "1", json!({"s": 1})) };
    hs.put(&alice, sticky).unwrap();
    hs.put(&alice, message(&room, "m.plain", "2", json!({"p": 1}))).unwrap();
    hs.now = hs.now.after(SECOND);

    let one = Some(r#"{"room":{"timeline":{"limit":1}}}"#);
    let joined = hs.sync_with(&bob, Some(token(&since)), one, false)["rooms"]["join"][&room].clone();
    assert_eq!(joined["timeline"]["limited"], json!(true));
    assert_eq!(joined["timeline"]["events"][0]["type"], "m.plain");
    let stuck = &joined["msc4354_sticky"]["events"][0];
    assert_eq!(stuck["content"], json!({"s": 1}));
    // Two hours were asked for; MSC4354 allows one.
    assert_eq!(stuck["msc4354_sticky"]["duration_ms"], json!(3_600_000));
    assert_eq!(stuck["unsigned"]["msc4354_sticky_duration_ttl_ms"], json!(3_599_000));

    let in_timeline = hs.sync(&bob, Some(token(&since)))["rooms"]["join"][&room].clone();
    assert_eq!(in_timeline["timeline"]["events"].as_array().unwrap().len(), 2);
    assert_eq!(in_timeline["msc4354_sticky"], Value::Null);

    hs.state.join(hs.now, &carol, &room, &Object::new()).unwrap();
    assert_eq!(
        hs.sync_with(&carol, None, one, false)["rooms"]["join"][&room]["msc4354_sticky"]["events"]
            .as_array()
            .unwrap()
            .len(),
        1
    );
    hs.pass(3600 * SECOND);
    assert_eq!(hs.sync_with(&carol, None, one, false)["rooms"]["join"][&room]["msc4354_sticky"], Value::Null);
}

#[test]
fn a_gap_in_the_timeline_is_said_and_its_state_is_given() {
    let mut hs = Hs::new();
    let (alice, bob) = (hs.user("alice"), hs.user("bob"));
    let room = hs.call_room(&alice, &[&bob]);
    let since = hs.sync(&bob, None);
    hs.put(&alice, state(&room, MEMBER, "k", json!({"v": 1}))).unwrap();
    hs.put(&alice, state(&room, MEMBER, "k", json!({"v": 2}))).unwrap();
    for n in 0..10 {
        hs.put(&alice, message(&room, "m.x", &n.to_string(), json!({"n": n}))).unwrap();
    }
    hs.put(&alice, state(&room, MEMBER, "late", json!({"v": 3}))).unwrap();

    let joined = hs.sync(&bob, Some(token(&since)))["rooms"]["join"][&room].clone();
    assert_eq!(joined["timeline"]["limited"], json!(true));
    assert_eq!(joined["timeline"]["events"].as_array().unwrap().len(), 10);
    let state = joined["state"]["events"].as_array().unwrap();
    assert_eq!(state.len(), 1);
    assert_eq!(state[0]["content"], json!({"v": 2}));

    let after = hs.sync_with(&bob, Some(token(&since)), None, true)["rooms"]["join"][&room].clone();
    assert_eq!(after["org.matrix.msc4222.state_after"]["events"].as_array().unwrap().len(), 2);

    // Backwards from the gap: everything that was left out.
    let from = joined["timeline"]["prev_batch"].as_str().unwrap().to_owned();
    let query = MessagesQuery { direction: Direction::Backwards, from: Some(from), limit: 3 };
    let page = hs.state.messages(hs.now, &bob, &room, &query).unwrap();
    let contents: Vec<_> =
        page["chunk"].as_array().unwrap().iter().map(|event| event["content"].clone()).collect();
    assert_eq!(contents, [json!({"n": 0}), json!({"v": 2}), json!({"v": 1})]);
}

#[test]
fn filtered_types_are_left_out_of_the_timeline() {
    let mut hs = Hs::new();
    let (alice, bob) = (hs.user("alice"), hs.user("bob"));
    let room = hs.call_room(&alice, &[&bob]);
    let since = hs.sync(&bob, None);
    hs.put(&alice, message(&room, "m.x", "1", json!({}))).unwrap();
    hs.put(&alice, message(&room, "m.y", "2", json!({}))).unwrap();
    let filter = Some(r#"{"room":{"timeline":{"limit":1,"not_types":["m.y"]}}}"#);
    let timeline =
        hs.sync_with(&bob, Some(token(&since)), filter, false)["rooms"]["join"][&room]["timeline"].clone();
    assert_eq!((&timeline["events"][0]["type"], &timeline["limited"]), (&json!("m.x"), &json!(false)));

    let since = hs.sync(&bob, None);
    hs.put(&alice, message(&room, "m.y", "3", json!({}))).unwrap();
    assert_eq!(hs.sync_with(&bob, Some(token(&since)), filter, false)["rooms"]["join"], Value::Null);
}

#[test]
fn a_forgotten_timeline_leaves_its_state_behind() {
    let mut hs = Hs::with(|config| config.limits.timeline = 5);
    let (alice, bob) = (hs.user("alice"), hs.user("bob"));
    let room = hs.call_room(&alice, &[&bob]);
    hs.put(&alice, state(&room, MEMBER, "k", json!({"v": 1}))).unwrap();
    for n in 0..20 {
        hs.put(&alice, message(&room, "m.x", &n.to_string(), json!({}))).unwrap();
    }
    let joined = hs.sync(&bob, None)["rooms"]["join"][&room].clone();
    assert_eq!(joined["timeline"]["events"].as_array().unwrap().len(), 5);
    assert_eq!(joined["timeline"]["limited"], json!(true));
    let state = joined["state"]["events"].as_array().unwrap();
    assert!(state.iter().any(|event| event["content"] == json!({"v": 1})));
    assert!(state.iter().any(|event| event["type"] == "m.room.create"));
}

#[test]
fn to_device_messages_wait_until_acknowledged_and_come_in_batches() {
    let mut hs = Hs::new();
    let (alice, bob, bob2) = (hs.user("alice"), hs.user("bob"), hs.device("bob"));
    for n in 0..150 {
        let to = json!({"messages": {&*bob.user: {"*": {"n": n}}}});
        hs.state.send_to_device(&alice, "m.t", &n.to_string(), &object(to), &mut |_| false).unwrap();
    }
    // A repeated transaction delivers nothing twice.
    let again = object(json!({"messages": {&*bob.user: {"*": {"n": 0}}}}));
    hs.state.send_to_device(&alice, "m.t", "0", &again, &mut |_| false).unwrap();

    let first = hs.sync(&bob, None);
    let events = |answer: &Value| answer["to_device"]["events"].as_array().cloned().unwrap_or_default();
    assert_eq!(events(&first).len(), 100);
    assert_eq!(events(&first)[0], json!({"sender": alice.user, "type": "m.t", "content": {"n": 0}}));
    // The same again, as long as nothing is acknowledged.
    assert_eq!(events(&hs.sync(&bob, None)).len(), 100);
    let second = hs.sync(&bob, Some(token(&first)));
    assert_eq!(events(&second).len(), 50);
    assert_eq!(events(&second)[0]["content"], json!({"n": 100}));
    assert_eq!(events(&hs.sync(&bob, Some(token(&second)))).len(), 0);
    assert_eq!(events(&hs.sync(&bob2, None)).len(), 100);
}

#[test]
fn device_lists_follow_those_who_share_a_room() {
    let mut hs = Hs::new();
    let (alice, bob, carol) = (hs.user("alice"), hs.user("bob"), hs.user("carol"));
    let room = hs.call_room(&alice, &[]);
    let keys = |who: &Caller| {
        object(json!({"device_keys": {"user_id": who.user, "device_id": who.device, "keys": {}}}))
    };
    let lists = |answer: &Value| answer["device_lists"].clone();

    let mut since = hs.sync(&alice, None);
    hs.state.upload_keys(&carol, &keys(&carol)).unwrap();
    let answer = hs.sync(&alice, Some(token(&since)));
    assert_eq!(lists(&answer), Value::Null, "carol shares no room");

    hs.state.join(hs.now, &bob, &room, &Object::new()).unwrap();
    since = hs.sync(&alice, Some(token(&since)));
    assert_eq!(lists(&since), json!({"changed": [bob.user]}));
    let bobs = hs.sync(&bob, None);
    hs.state.upload_keys(&alice, &keys(&alice)).unwrap();
    assert_eq!(lists(&hs.sync(&bob, Some(token(&bobs)))), json!({"changed": [alice.user]}));
    since = hs.sync(&alice, Some(token(&since)));
    assert_eq!(lists(&since), json!({"changed": [alice.user]}), "one's own devices, too");

    hs.state.change_membership(hs.now, &bob, &room, "leave", &Object::new()).unwrap();
    assert_eq!(lists(&hs.sync(&alice, Some(token(&since)))), json!({"left": [bob.user]}));
    let left = hs.sync(&bob, Some(token(&bobs)));
    assert_eq!(lists(&left)["left"], json!([alice.user]));
    assert_eq!(left["rooms"]["leave"][&room]["timeline"]["events"][0]["content"]["membership"], "leave");
}

#[test]
fn one_time_keys_are_claimed_once_and_the_fallback_key_forever() {
    let mut hs = Hs::new();
    let bob = hs.user("bob");
    let upload = object(json!({
        "one_time_keys": {"signed_curve25519:A": {"key": "a"}, "signed_curve25519:B": {"key": "b"}},
        "fallback_keys": {"signed_curve25519:F": {"key": "f", "fallback": true}},
    }));
    let counts = hs.state.upload_keys(&bob, &upload).unwrap();
    assert_eq!(counts, json!({"one_time_key_counts": {"signed_curve25519": 2}}));
    assert_eq!(hs.state.upload_keys(&bob, &upload).unwrap(), counts, "a repeated upload changes nothing");
    let other = object(json!({"one_time_keys": {"signed_curve25519:A": {"key": "forged"}}}));
    assert_eq!(errcode(hs.state.upload_keys(&bob, &other)), "M_INVALID_PARAM");
    assert_eq!(hs.sync(&bob, None)["device_unused_fallback_key_types"], json!(["signed_curve25519"]));

    let claim = object(json!({"one_time_keys": {&*bob.user: {&*bob.device: "signed_curve25519"}}}));
    let mut claimed =
        || hs.state.claim_keys(&claim).unwrap()["one_time_keys"][&*bob.user][&*bob.device].clone();
    assert_eq!(claimed(), json!({"signed_curve25519:A": {"key": "a"}}));
    assert_eq!(claimed(), json!({"signed_curve25519:B": {"key": "b"}}));
    assert_eq!(claimed(), json!({"signed_curve25519:F": {"key": "f", "fallback": true}}));
    assert_eq!(claimed(), json!({"signed_curve25519:F": {"key": "f", "fallback": true}}));
    let answer = hs.sync(&bob, None);
    assert_eq!(answer["device_one_time_keys_count"], json!({"signed_curve25519": 0}));
    assert_eq!(answer["device_unused_fallback_key_types"], json!([]));
}

#[test]
fn power_levels_decide_who_sends_what() {
    for version in ["11", "12"] {
        let mut hs = Hs::new();
        let (alice, bob) = (hs.user("alice"), hs.user("bob"));
        let levels = json!({"events": {MEMBER: 0}, "users": if version == "11" { json!({&*alice.user: 100}) } else { json!({}) }});
        let room = hs.room(
            &alice,
            json!({"preset": "public_chat", "room_version": version, "power_level_content_override": levels}),
        );
        assert_eq!(room.ends_with(":localhost:1"), version == "11");
        hs.state.join(hs.now, &bob, &room, &Object::new()).unwrap();

        hs.put(&bob, state(&room, MEMBER, "_k", json!({"a": 1}))).unwrap();
        assert_eq!(
            errcode(hs.put(&bob, state(&room, "m.room.name", "", json!({"name": "x"})))),
            "M_FORBIDDEN"
        );
        hs.put(&alice, state(&room, "m.room.name", "", json!({"name": "x"}))).unwrap();
        // A key that begins with '@' belongs to that user, whatever the power level.
        assert_eq!(errcode(hs.put(&alice, state(&room, MEMBER, &bob.user, json!({})))), "M_FORBIDDEN");
        assert_eq!(errcode(hs.put(&bob, state(&room, "m.room.power_levels", "", json!({})))), "M_FORBIDDEN");
        let kick = object(json!({"user_id": alice.user}));
        assert_eq!(errcode(hs.state.change_membership(hs.now, &bob, &room, "kick", &kick)), "M_FORBIDDEN");
        let ban = object(json!({"user_id": bob.user}));
        hs.state.change_membership(hs.now, &alice, &room, "ban", &ban).unwrap();
        assert_eq!(errcode(hs.state.join(hs.now, &bob, &room, &Object::new())), "M_FORBIDDEN");
        assert_eq!(errcode(hs.put(&bob, message(&room, "m.x", "1", json!({})))), "M_FORBIDDEN");
    }
}

#[test]
fn an_invitation_shows_stripped_state_and_opens_the_room() {
    let mut hs = Hs::new();
    let (alice, bob, carol) = (hs.user("alice"), hs.user("bob"), hs.user("carol"));
    let room = hs.room(&alice, json!({"preset": "private_chat", "name": "n", "invite": [bob.user]}));
    let first = hs.sync(&bob, None);
    let invite = first["rooms"]["invite"][&room]["invite_state"]["events"].as_array().unwrap().clone();
    assert!(invite.iter().any(|event| event["content"] == json!({"name": "n"})));
    assert_eq!(invite.last().unwrap()["content"]["membership"], "invite");
    assert_eq!(errcode(hs.state.join(hs.now, &carol, &room, &Object::new())), "M_FORBIDDEN");
    hs.state.join(hs.now, &bob, &room, &Object::new()).unwrap();
    let joined = hs.sync(&bob, Some(token(&first)))["rooms"]["join"][&room].clone();
    assert_eq!(joined["summary"]["m.joined_member_count"], 2);
    let complete = joined["state"]["events"].as_array().unwrap().len()
        + joined["timeline"]["events"].as_array().unwrap().len();
    assert!(complete >= 8, "a fresh member gets the whole room");
}

#[test]
fn a_redacted_event_loses_its_content_everywhere() {
    let mut hs = Hs::new();
    let (alice, bob) = (hs.user("alice"), hs.user("bob"));
    let room = hs.call_room(&alice, &[&bob]);
    let sent = hs.put(&alice, message(&room, "m.x", "1", json!({"secret": 1}))).unwrap();
    let id = sent["event_id"].as_str().unwrap().to_owned();
    let path = || (room.clone(), id.clone(), "r".to_owned());
    assert_eq!(errcode(hs.state.redact(hs.now, &bob, path(), Object::new())), "M_FORBIDDEN");
    hs.state.redact(hs.now, &alice, path(), Object::new()).unwrap();
    let event = hs.state.room_event(hs.now, &bob, &room, &id).unwrap();
    assert_eq!(event["content"], json!({}));
    assert_eq!(event["unsigned"]["redacted_because"]["redacts"], json!(id));
}

#[test]
fn an_openid_token_says_who_asked_for_it_for_an_hour() {
    let mut hs = Hs::new();
    let (alice, bob) = (hs.user("alice"), hs.user("bob"));
    assert_eq!(errcode(hs.state.openid_token(hs.now, &alice, &bob.user)), "M_FORBIDDEN");
    let answer = hs.state.openid_token(hs.now, &alice, &alice.user).unwrap();
    let token = answer["access_token"].as_str().unwrap();
    assert_eq!(hs.state.openid_userinfo(hs.now, Some(token)).unwrap(), json!({"sub": alice.user}));
    let later = hs.now.after(3600 * SECOND);
    assert_eq!(errcode(hs.state.openid_userinfo(later, Some(token))), "M_UNKNOWN_TOKEN");
    assert_eq!(errcode(hs.state.openid_userinfo(hs.now, None)), "M_MISSING_TOKEN");
}

#[test]
fn replacing_an_identity_needs_the_password() {
    let mut hs = Hs::new();
    let alice = hs.user("alice");
    let key = |name: &str, usage: &str, public: &str| {
        let id = format!("ed25519:{public}");
        json!({ name: {"user_id": alice.user, "usage": [usage], "keys": {id: public}} })
    };
    hs.state.upload_cross_signing(&alice, &object(key("master_key", "master", "A"))).unwrap();
    hs.state.upload_cross_signing(&alice, &object(key("master_key", "master", "A"))).unwrap();
    let mut other = object(key("master_key", "master", "B"));
    let refusal = hs.state.upload_cross_signing(&alice, &other).unwrap_err();
    assert_eq!(
        (refusal.status, refusal.body["flows"].clone()),
        (401, json!([{"stages": ["m.login.password"]}]))
    );
    let auth = |password: &str| json!({"type": "m.login.password", "identifier": {"type": "m.id.user", "user": "alice"}, "password": password});
    other.insert("auth".into(), auth("wrong"));
    assert_eq!(hs.state.upload_cross_signing(&alice, &other).unwrap_err().body["errcode"], "M_FORBIDDEN");
    other.insert("auth".into(), auth("pw"));
    hs.state.upload_cross_signing(&alice, &other).unwrap();
}

#[test]
fn what_is_full_refuses_and_says_so() {
    let mut hs = Hs::with(|config| {
        config.limits.users = 1;
        config.limits.rooms = 1;
        config.limits.devices_per_user = 2;
        config.limits.to_device_queue = 3;
    });
    let alice = hs.user("alice");
    assert_eq!(hs.state.add_user("bob", "pw").unwrap_err().body["errcode"], "M_RESOURCE_LIMIT_EXCEEDED");
    hs.room(&alice, json!({}));
    assert_eq!(errcode(hs.state.create_room(hs.now, &alice, &Object::new())), "M_RESOURCE_LIMIT_EXCEEDED");
    hs.device("alice");
    let login = object(json!({"type": "m.login.password", "user": "alice", "password": "pw"}));
    assert_eq!(errcode(hs.state.login(hs.now, &login)), "M_RESOURCE_LIMIT_EXCEEDED");
    for n in 0..5 {
        let to = object(json!({"messages": {&*alice.user: {&*alice.device: {"n": n}}}}));
        hs.state.send_to_device(&alice, "m.t", &n.to_string(), &to, &mut |_| false).unwrap();
    }
    let kept: Vec<_> = hs.sync(&alice, None)["to_device"]["events"]
        .as_array()
        .unwrap()
        .iter()
        .map(|e| e["content"]["n"].clone())
        .collect();
    assert_eq!(kept, [2, 3, 4]);
}

#[test]
fn a_room_whose_making_fails_never_was() {
    let mut hs = Hs::new();
    let alice = hs.user("alice");
    let refused = hs.state.create_room(hs.now, &alice, &object(json!({"invite": ["@x:elsewhere"]})));
    assert_eq!(errcode(refused), "M_FORBIDDEN");
    assert_eq!(hs.state.joined_rooms(&alice).unwrap(), json!({"joined_rooms": []}));
    assert_eq!(hs.sync(&alice, None)["rooms"], Value::Null);
}

mod hostile {
    use proptest::prelude::*;

    use super::*;

    /// Words the server looks for, next to any other text.
    fn word() -> impl Strategy<Value = String> {
        const KNOWN: [&str; 36] = [
            "type",
            "auth",
            "m.login.dummy",
            "m.login.password",
            "username",
            "password",
            "device_id",
            "identifier",
            "user",
            "preset",
            "public_chat",
            "room_version",
            "11",
            "invite",
            "@alice:localhost:1",
            "@bob:localhost:1",
            "initial_state",
            "content",
            "state_key",
            "m.room.member",
            "membership",
            "join",
            "m.room.power_levels",
            "users",
            "events",
            "device_keys",
            "one_time_keys",
            "signed_curve25519:A",
            "signed_curve25519",
            "fallback_keys",
            "keys",
            "master_key",
            "usage",
            "master",
            "signatures",
            "messages",
        ];
        prop_oneof![4 => proptest::sample::select(&KNOWN[..]).prop_map(str::to_owned), 1 => ".{0,20}"]
    }

    fn json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            word().prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 40, 5, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
                prop::collection::vec((word(), inner), 0..5)
                    .prop_map(|pairs| Object::from_iter(pairs).into()),
            ]
        })
    }

    fn body() -> impl Strategy<Value = Object> {
        prop::collection::vec((word(), json()), 0..6).prop_map(Object::from_iter)
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// Whatever comes as a body, the server answers, and still serves the next.
        #[test]
        fn no_body_makes_the_server_panic(bodies in prop::collection::vec((0..16u8, body(), word(), word()), 1..12)) {
            let mut hs = Hs::new();
            let (alice, bob) = (hs.user("alice"), hs.user("bob"));
            let room = hs.call_room(&alice, &[&bob]);
            let first = hs.sync(&bob, None);
            for (which, body, one, other) in bodies {
                let (now, s) = (hs.now, &mut hs.state);
                let answer = match which {
                    0 => s.register(now, &body),
                    1 => s.login(now, &body),
                    2 => s.create_room(now, &alice, &body),
                    3 => s.send(now, &alice, Outgoing { content: body, ..state(&room, &one, &other, json!({})) }),
                    4 => s.send(now, &bob, Outgoing { content: body, ..message(&room, &one, &other, json!({})) }),
                    5 => s.upload_keys(&alice, &body),
                    6 => s.query_keys(&alice, &body),
                    7 => s.claim_keys(&body),
                    8 => s.upload_cross_signing(&alice, &body),
                    9 => s.upload_signatures(&alice, &body),
                    10 => s.send_to_device(&alice, &one, &other, &body, &mut |_| false),
                    11 => s.change_membership(now, &alice, &room, "invite", &body),
                    12 => s.set_account_data(&bob, &bob.user, Some(&room), &one, body),
                    13 => s.add_filter(&bob, &bob.user, body),
                    14 => s.redact(now, &alice, (room.clone(), one, other), body),
                    _ => s.set_profile_field(now, &bob, &bob.user, "displayname", &body),
                };
                if let Err(refusal) = answer {
                    prop_assert!((400..500).contains(&refusal.status), "{refusal:?}");
                }
            }
            hs.sync(&bob, Some(token(&first)));
            hs.sync(&alice, None);
        }

        #[test]
        fn a_sync_token_survives_the_round_trip_and_nonsense_is_refused(pos: u64, to_device: u64, nonsense in ".{0,30}") {
            let text = format!("s{pos}_{to_device}");
            let parsed = super::super::sync::SyncToken::parse(&text).unwrap();
            prop_assert_eq!(parsed.to_text(), text);
            if let Ok(parsed) = super::super::sync::SyncToken::parse(&nonsense) {
                prop_assert!(nonsense.starts_with('s'), "{:?}", parsed);
            }
        }
    }
}
