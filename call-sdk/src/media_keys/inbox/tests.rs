//! What the machine of this module does, on virtual time.

use matrix_sdk::ruma::{UserId, device_id, room_id, user_id};
use proptest::prelude::*;
use serde_json::json;

use super::{super::wire::KeySender, *};
use crate::member::Slot;

const ALICE: (&str, &str) = ("@alice:example.org", "MYDEVICE");
const BOB: (&str, &str) = ("@bob:example.org", "BOB1");
const BOB2: (&str, &str) = ("@bob:example.org", "BOB2");
const CARL: (&str, &str) = ("@carl:example.org", "CARL1");

fn inbox() -> Inbox {
    Inbox::new(config())
}

fn config() -> InboxConfig {
    InboxConfig::new(
        room_id!("!room:example.org").to_owned(),
        user_id!("@alice:example.org").to_owned(),
        device_id!("MYDEVICE").to_owned(),
    )
}

#[expect(clippy::disallowed_methods, reason = "an arbitrary origin of virtual time")]
fn start() -> Now {
    Now { instant: Instant::now(), unix: UnixMillis(1_800_000_000_000) }
}

fn member((user, device): (&str, &str)) -> Member {
    let user_id = UserId::parse(user).unwrap();
    let device_id = OwnedDeviceId::from(device);
    Member {
        identity: ParticipantIdentity::of_state_member(&user_id, &device_id),
        member_id: MemberId(format!("{user}:{device}")),
        kind: MembershipKind::State,
        created: UnixMillis(1),
        expires_at: None,
        focus: None,
        intent: None,
        user_id,
        device_id,
    }
}

fn sticky((user, device): (&str, &str), id: &str) -> Member {
    let member = member((user, device));
    let member_id = MemberId(id.to_owned());
    let identity = ParticipantIdentity::of_sticky_member(&member.user_id, &member.device_id, &member_id);
    Member { member_id, identity, kind: MembershipKind::Sticky, ..member }
}

fn key(fill: u8) -> MediaKey {
    MediaKey::new(vec![fill; 16]).unwrap()
}

/// A faultless message of `from`.
fn message((user, device): (&str, &str), index: u8, fill: u8, sent: u64) -> ReceivedKey {
    let sender = KeySender {
        room_id: room_id!("!room:example.org").to_owned(),
        slot: Slot::room_call(),
        device_id: device.into(),
        member_id: MemberId(format!("{user}:{device}")),
    };
    ReceivedKey {
        content: wire::content(&sender, KeyIndex(index), &key(fill), UnixMillis(sent)),
        sender: UserId::parse(user).unwrap(),
        olm: Some(OlmSender { device_id: Some(device.into()), cross_signed: true }),
    }
}

fn with(mut received: ReceivedKey, path: &str, value: Value) -> ReceivedKey {
    *received.content.pointer_mut(path).unwrap() = value;
    received
}

fn installed(member: &Member, index: u8, fill: u8) -> InboxOutput {
    InboxOutput::Install { identity: member.identity.clone(), index: KeyIndex(index), key: key(fill) }
}

/// What an inbox in which Bob and Carl are members says to one message.
fn verdict(received: ReceivedKey) -> InboxOutput {
    let mut inbox = inbox();
    inbox.members(start(), &[member(ALICE), member(BOB), member(CARL)]);
    let mut outputs = inbox.receive(start(), received);
    assert_eq!(outputs.len(), 1, "{outputs:?}");
    if matches!(outputs[0], InboxOutput::Rejected { .. }) {
        assert_eq!(inbox.installed(), [], "a rejected key leaves nothing behind");
        assert!(inbox.parked.is_empty());
    }
    outputs.remove(0)
}

fn rejection(received: ReceivedKey) -> KeyRejected {
    match verdict(received) {
        InboxOutput::Rejected { reason, .. } => reason,
        accepted => panic!("{accepted:?}"),
    }
}

#[test]
fn a_faultless_key_is_installed() {
    assert_eq!(verdict(message(BOB, 0, 7, 1)), installed(&member(BOB), 0, 7));
}

#[test]
fn h84_malformed_messages_and_other_rooms_are_refused() {
    let bob = || message(BOB, 0, 7, 1);
    assert_eq!(rejection(with(bob(), "/room_id", json!("!other:example.org"))), KeyRejected::WrongRoom);
    for (path, value) in [
        ("/keys", json!({})),
        ("/keys", json!({"index": 0})),
        ("/keys", json!({"key": "AAAAAAAAAAAAAAAAAAAAAA=="})),
        ("/member", json!(null)),
        ("/member", json!({})),
        ("/room_id", json!(null)),
    ] {
        assert!(matches!(rejection(with(bob(), path, value)), KeyRejected::Malformed(_)), "{path}");
    }
}

#[test]
fn h85_keys_are_filed_under_each_members_identity() {
    let mut inbox = inbox();
    let members = [member(BOB), member(BOB2), member(CARL)];
    inbox.members(start(), &members);
    for (who, index, member) in [(BOB, 0, &members[0]), (BOB2, 4, &members[1]), (CARL, 8, &members[2])] {
        assert_eq!(inbox.receive(start(), message(who, index, index, 1)), [installed(member, index, index)]);
    }
}

#[test]
fn h86_of_two_keys_with_one_index_the_later_sent_counts() {
    let mut inbox = inbox();
    let bob = member(BOB);
    inbox.members(start(), std::slice::from_ref(&bob));
    let mut receive = |index, fill, sent| inbox.receive(start(), message(BOB, index, fill, sent));
    let outdated = [InboxOutput::Rejected { sender: bob.user_id.clone(), reason: KeyRejected::Outdated }];
    assert_eq!(receive(0, 1, 2000), [installed(&bob, 0, 1)]);
    assert_eq!(receive(0, 2, 1000), outdated);
    assert_eq!(receive(0, 2, 300), outdated);
    assert_eq!(receive(0, 3, 2000), [installed(&bob, 0, 3)]);
    assert_eq!(receive(1, 4, 1000), [installed(&bob, 1, 4)]);
}

#[test]
fn a_senders_clock_that_runs_ahead_does_not_shut_out_its_later_keys() {
    let mut inbox = inbox();
    let bob = member(BOB);
    inbox.members(start(), std::slice::from_ref(&bob));
    let now = start();
    inbox.receive(now, message(BOB, 0, 1, u64::MAX));
    let later = now.plus(Duration::from_secs(1));
    assert_eq!(inbox.receive(later, message(BOB, 0, 2, later.unix.0)), [installed(&bob, 0, 2)]);
}

#[test]
fn h87_a_key_that_comes_before_its_membership_waits_for_it() {
    let mut inbox = inbox();
    let now = start();
    assert_eq!(inbox.receive(now, message(BOB, 0, 7, 1)), []);
    assert_eq!(inbox.members(now, &[member(CARL)]), []);
    assert_eq!(inbox.members(now, &[member(CARL), member(BOB)]), [installed(&member(BOB), 0, 7)]);
    assert_eq!(inbox.members(now, &[member(CARL), member(BOB)]), [], "once");
}

#[test]
fn h88_a_new_ring_is_given_every_key() {
    let mut inbox = inbox();
    inbox.members(start(), &[member(BOB), member(CARL)]);
    inbox.receive(start(), message(BOB, 0, 1, 1));
    inbox.receive(start(), message(BOB, 1, 2, 2));
    inbox.receive(start(), message(CARL, 5, 3, 1));
    let (bob, carl) = (member(BOB), member(CARL));
    assert_eq!(inbox.installed(), [installed(&bob, 0, 1), installed(&bob, 1, 2), installed(&carl, 5, 3)]);
}

#[test]
fn h89_a_clear_text_key_is_refused() {
    assert_eq!(rejection(ReceivedKey { olm: None, ..message(BOB, 0, 7, 1) }), KeyRejected::NotEncrypted);
}

#[test]
fn h89_a_device_cannot_speak_for_another_of_its_owner() {
    let olm = OlmSender { device_id: Some(BOB2.1.into()), cross_signed: true };
    let forged = ReceivedKey { olm: Some(olm), ..message(BOB, 0, 7, 1) };
    assert_eq!(rejection(forged), KeyRejected::DeviceMismatch);
}

#[test]
fn a14_a_device_that_is_no_member_cannot_use_its_owners_other_membership() {
    // BOB2 says truly that it is BOB2, and names the membership of BOB1.
    let mut inbox = inbox();
    inbox.members(start(), &[member(BOB)]);
    let forged = with(message(BOB2, 0, 7, 1), "/member/id", json!("@bob:example.org:BOB1"));
    assert_eq!(inbox.receive(start(), forged), []);
    assert_eq!(inbox.installed(), [], "it waits for a membership of its own");
}

#[test]
fn a14_a_user_cannot_speak_for_another() {
    // Carl's device has the name of Bob's and claims Bob's membership.
    let mut inbox = inbox();
    inbox.members(start(), &[member(BOB), member(CARL)]);
    let mut forged = message(BOB, 0, 7, 1);
    forged.sender = UserId::parse(CARL.0).unwrap();
    assert_eq!(inbox.receive(start(), forged), []);
    assert_eq!(inbox.installed(), []);
}

#[test]
fn a14_a_device_that_olm_does_not_know_is_refused() {
    let olm = OlmSender { device_id: None, cross_signed: false };
    let unknown = ReceivedKey { olm: Some(olm), ..message(BOB, 0, 7, 1) };
    assert_eq!(rejection(unknown), KeyRejected::UnknownDevice);
}

#[test]
fn a14_a_device_that_is_not_cross_signed_is_refused_unless_that_is_waived() {
    let unsigned = || {
        let olm = OlmSender { device_id: Some(BOB.1.into()), cross_signed: false };
        ReceivedKey { olm: Some(olm), ..message(BOB, 0, 7, 1) }
    };
    assert_eq!(rejection(unsigned()), KeyRejected::NotCrossSigned);
    let mut waived = Inbox::new(InboxConfig { require_cross_signed: false, ..config() });
    waived.members(start(), &[member(BOB)]);
    assert_eq!(waived.receive(start(), unsigned()), [installed(&member(BOB), 0, 7)]);
}

#[test]
fn a14_nobody_gives_us_our_own_key() {
    assert_eq!(rejection(message(ALICE, 0, 7, 1)), KeyRejected::OwnIdentity);
    // Our other device claims to be this one.
    let olm = OlmSender { device_id: Some("OTHER".into()), cross_signed: true };
    let claimed = ReceivedKey { olm: Some(olm), ..message(ALICE, 0, 7, 1) };
    assert_eq!(rejection(claimed), KeyRejected::OwnIdentity);
    // And is welcome as itself.
    let mut inbox = inbox();
    let other = member((ALICE.0, "OTHER"));
    inbox.members(start(), std::slice::from_ref(&other));
    let received = inbox.receive(start(), message((ALICE.0, "OTHER"), 0, 7, 1));
    assert_eq!(received, [installed(&other, 0, 7)]);
}

#[test]
fn a14_indices_and_lengths_are_strict() {
    for index in [json!(-1), json!(1.5), json!(256), json!(1_000_000_000)] {
        assert_eq!(rejection(with(message(BOB, 0, 7, 1), "/keys/index", index)), KeyRejected::BadIndex);
    }
    let of_length = |length: usize| {
        use base64::Engine as _;
        let text = base64::engine::general_purpose::STANDARD.encode(vec![7; length]);
        rejection(with(message(BOB, 0, 7, 1), "/keys/key", json!(text)))
    };
    assert!(matches!(of_length(1), KeyRejected::BadLength(_)));
    assert!(matches!(of_length(31), KeyRejected::BadLength(_)));
    assert_eq!(of_length(64), KeyRejected::BadEncoding);
}

#[test]
fn a14_a_replayed_older_key_is_refused_even_after_the_member_came_back() {
    let mut inbox = inbox();
    inbox.members(start(), &[member(BOB)]);
    inbox.receive(start(), message(BOB, 0, 1, 1000));
    inbox.receive(start(), message(BOB, 0, 2, 2000));
    inbox.members(start(), &[]);
    assert_eq!(inbox.installed(), []);
    let replayed = InboxOutput::Rejected { sender: member(BOB).user_id, reason: KeyRejected::Outdated };
    assert_eq!(inbox.receive(start(), message(BOB, 0, 1, 1000)), [replayed]);
    assert_eq!(inbox.members(start(), &[member(BOB)]), [installed(&member(BOB), 0, 2)]);
}

#[test]
fn a_key_for_another_membership_of_a_device_waits_for_that() {
    let mut inbox = inbox();
    inbox.members(start(), &[sticky(BOB, "first")]);
    let early = with(message(BOB, 0, 7, 1), "/member/id", json!("second"));
    assert_eq!(inbox.receive(start(), early), []);
    let second = sticky(BOB, "second");
    assert_eq!(inbox.members(start(), std::slice::from_ref(&second)), [installed(&second, 0, 7)]);
}

#[test]
fn the_hidden_member_id_of_a_state_member_is_passed_over() {
    let odd = with(message(BOB, 0, 7, 1), "/member/id", json!("b7d5a6c8-uuid"));
    assert_eq!(verdict(odd), installed(&member(BOB), 0, 7));
}

#[test]
fn keys_follow_a_member_to_its_new_identity() {
    let mut inbox = inbox();
    inbox.members(start(), &[member(BOB)]);
    inbox.receive(start(), with(message(BOB, 0, 1, 1), "/member/id", json!("second")));
    inbox.receive(start(), with(message(BOB, 1, 2, 2), "/member", json!({"claimed_device_id": "BOB1"})));
    inbox.receive(start(), with(message(BOB, 2, 3, 3), "/member/id", json!("other")));
    let second = sticky(BOB, "second");
    let outputs = inbox.members(start(), std::slice::from_ref(&second));
    assert_eq!(outputs, [installed(&second, 0, 1), installed(&second, 1, 2)]);
    assert_eq!(inbox.members(start(), &[second]), []);
}

#[test]
fn the_form_of_the_msc_is_matched_by_olm_alone() {
    let mut inbox = inbox();
    let bob = sticky(BOB, "id");
    inbox.members(start(), std::slice::from_ref(&bob));
    let content = json!({
        "room_id": "!room:example.org", "member_id": "id",
        "media_key": {"index": 3, "key": "BwcHBwcHBwcHBwcHBwcHBw"},
    });
    let received = ReceivedKey { content, ..message(BOB, 0, 7, 1) };
    assert_eq!(inbox.receive(start(), received), [installed(&bob, 3, 7)]);
}

#[test]
fn what_waits_is_bounded_and_ages() {
    let mut inbox = Inbox::new(InboxConfig { max_parked_per_user: 3, max_parked: 5, ..config() });
    let now = start();
    let too_many = |outputs: Vec<InboxOutput>| {
        matches!(outputs[..], [InboxOutput::Rejected { reason: KeyRejected::TooManyParked, .. }])
    };
    for index in 0..3 {
        assert_eq!(inbox.receive(now, message(BOB, index, 1, 1)), []);
    }
    assert!(too_many(inbox.receive(now, message(BOB, 3, 1, 1))));
    assert!(too_many(inbox.receive(now, message(BOB2, 0, 1, 1))), "devices are free, users are not");
    assert_eq!(inbox.receive(now, message(BOB, 2, 9, 2)), [], "a newer one replaces");
    assert_eq!(inbox.receive(now, message(CARL, 0, 1, 1)), []);
    assert_eq!(inbox.receive(now, message(CARL, 1, 1, 1)), []);
    assert!(too_many(inbox.receive(now, message(("@dave:example.org", "D"), 0, 1, 1))));

    let later = now.plus(Duration::from_secs(120));
    let aged = inbox.members(later, &[member(BOB), member(CARL)]);
    assert_eq!(aged.len(), 5);
    assert!(
        aged.iter()
            .all(|output| matches!(output, InboxOutput::Rejected { reason: KeyRejected::NotAMember, .. }))
    );
    assert!(inbox.parked.is_empty());
}

#[test]
fn a_members_flood_of_keys_is_bounded() {
    let mut inbox = inbox();
    inbox.members(start(), &[member(BOB)]);
    for round in 0..3 {
        for index in 0..=255 {
            inbox.receive(start(), message(BOB, index, index, round));
        }
    }
    assert_eq!(inbox.installed().len(), MAX_KEPT);
}

#[test]
fn debug_shows_no_key() {
    let received = message(BOB, 0, 7, 1);
    assert!(!format!("{received:?}").contains("BwcH"));
    let mut inbox = inbox();
    inbox.receive(start(), received.clone());
    inbox.members(start(), &[member(CARL)]);
    let outputs = [inbox.members(start(), &[member(BOB)]), inbox.installed()].concat();
    let printed = format!("{inbox:?} {outputs:?}");
    assert!(printed.contains("redacted") && !printed.contains("7, 7") && !printed.contains("BwcH"));
}

proptest! {
    /// Whatever comes in whatever order: no panic; what is installed was sent over Olm by that very device,
    /// which is a member at that time and not ourselves; and nothing grows without bound.
    #[test]
    fn only_members_own_keys_are_installed(
        steps in prop::collection::vec(
            (0_usize..4, 0_usize..4, 0_u8..3, 0_u64..5, 0_u8..8, 0_u64..40_000, prop::collection::btree_set(0_usize..4, 0..4)),
            0..60,
        )
    ) {
        let people = [ALICE, BOB, BOB2, CARL];
        let mut inbox = Inbox::new(InboxConfig { max_parked: 6, max_parked_per_user: 4, ..config() });
        let mut now = start();
        let mut present: Vec<Member> = Vec::new();
        for (sealed, claimed, index, sent, odd, pass, members) in steps {
            now = now.plus(Duration::from_millis(pass));
            let mut outputs = Vec::new();
            if odd == 0 {
                present = members.iter().map(|who| {
                    if index == 0 { member(people[*who]) } else { sticky(people[*who], &format!("m{sent}")) }
                }).collect();
                outputs.extend(inbox.members(now, &present));
            } else {
                // The key itself says which device sealed it.
                let mut received = message(people[claimed], index, sealed as u8, sent);
                received.sender = UserId::parse(people[sealed].0).unwrap();
                received.olm = (odd != 1).then(|| OlmSender {
                    device_id: (odd != 2).then(|| people[sealed].1.into()),
                    cross_signed: odd != 3,
                });
                if odd == 4 {
                    received.content["member"].as_object_mut().unwrap().remove("id");
                }
                let honest = sealed == claimed && sealed != 0 && !(1..=3).contains(&odd);
                let received = inbox.receive(now, received);
                if !honest {
                    let installs = received.iter().any(|o| matches!(o, InboxOutput::Install { .. }));
                    prop_assert!(!installs);
                }
                outputs.extend(received);
            }
            for output in outputs.into_iter().chain(inbox.installed()) {
                if let InboxOutput::Install { identity, key, .. } = output {
                    let who = people[usize::from(key.as_bytes()[0])];
                    let owner = present.iter().find(|member| member.identity == identity).unwrap();
                    prop_assert_eq!((owner.user_id.as_str(), owner.device_id.as_str()), who);
                    prop_assert_ne!(who, ALICE);
                }
            }
            prop_assert!(inbox.parked.len() <= 6);
        }
    }
}
