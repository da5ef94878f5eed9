//! Others' keys on virtual time.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use proptest::prelude::*;
use ruma_common::{UserId, room_id};
use serde_json::{Value, json};

use super::{
    super::{presence::Presence, wire::KeySender},
    *,
};
use crate::{
    machine::testing::{device, state_member, sticky_member},
    member::{Member, Slot},
};

const ALICE: (&str, &str) = ("@alice:example.org", "MYDEVICE");
const BOB: (&str, &str) = ("@bob:example.org", "BOB1");
const BOB2: (&str, &str) = ("@bob:example.org", "BOB2");
const CARL: (&str, &str) = ("@carl:example.org", "CARL1");

/// The inbox with the list of members before it.
struct Mail {
    inbox: Inbox,
    presence: Presence,
}

impl Mail {
    fn members(&mut self, now: Now, members: &[Member], joined: &BTreeSet<OwnedUserId>) -> Vec<InboxOutput> {
        self.inbox.members(now, &self.presence.update(members), joined)
    }

    fn leave(&mut self) -> Vec<InboxOutput> {
        self.presence.clear();
        self.inbox.leave()
    }
}

impl std::ops::Deref for Mail {
    type Target = Inbox;

    fn deref(&self) -> &Inbox {
        &self.inbox
    }
}

impl std::ops::DerefMut for Mail {
    fn deref_mut(&mut self) -> &mut Inbox {
        &mut self.inbox
    }
}

fn with_limits(limits: InboxLimits, trust: TrustPolicy) -> Mail {
    let own = device(ALICE.0, ALICE.1);
    let mut mail = Mail {
        inbox: Inbox::new(limits, trust, room_id!("!room:example.org").to_owned(), own.clone()),
        presence: Presence::new(own),
    };
    mail.members(start(), &[], &joined());
    mail
}

fn inbox() -> Mail {
    with_limits(InboxLimits::default(), TrustPolicy::CrossSigned)
}

fn joined() -> BTreeSet<OwnedUserId> {
    [ALICE.0, BOB.0, CARL.0].map(|user| UserId::parse(user).unwrap()).into()
}

#[expect(clippy::disallowed_methods, reason = "an arbitrary origin of virtual time")]
fn start() -> Now {
    use std::sync::OnceLock;
    static START: OnceLock<Instant> = OnceLock::new();
    Now { instant: *START.get_or_init(Instant::now), unix: UnixMillis(1_800_000_000_000) }
}

fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn member((user, id): (&str, &str)) -> Member {
    state_member(user, id, 1)
}

fn sticky((user, id): (&str, &str), member: &str) -> Member {
    sticky_member(user, id, member, 1)
}

fn key(fill: u8) -> MediaKey {
    MediaKey::new(vec![fill; 16]).unwrap()
}

/// What deployed clients send: without the fields of MSC4143.
fn message((user, id): (&str, &str), index: u8, fill: u8, sent: u64) -> ToDeviceEvent {
    let sender = KeySender {
        room_id: room_id!("!room:example.org").to_owned(),
        slot: Slot::room_call(),
        device: device(user, id),
        member_id: MemberId(format!("{user}:{id}")),
    };
    let (event_type, mut content) =
        wire::messages(&sender, KeyIndex(index), &key(fill), UnixMillis(sent)).legacy;
    content.as_object_mut().unwrap().retain(|name, _| !["member_id", "media_key"].contains(&name.as_str()));
    ToDeviceEvent {
        event_type: event_type.to_owned(),
        content,
        sender: sender.device.user_id,
        olm: Some(OlmSender { device_id: Some(id.into()), cross_signed: true }),
    }
}

/// The form of MSC4143, which has no time.
fn msc_message(who: (&str, &str), id: &str, index: u8, fill: u8) -> ToDeviceEvent {
    let content = json!({
        "room_id": "!room:example.org", "member_id": id,
        "media_key": {"index": index, "key": STANDARD.encode(key(fill).as_bytes())},
    });
    ToDeviceEvent { event_type: wire::UNSTABLE_KEY_EVENT.to_owned(), content, ..message(who, 0, 0, 0) }
}

fn with(mut event: ToDeviceEvent, path: &str, value: Value) -> ToDeviceEvent {
    *event.content.pointer_mut(path).unwrap() = value;
    event
}

fn sealed_by(mut event: ToDeviceEvent, device_id: Option<&str>, cross_signed: bool) -> ToDeviceEvent {
    event.olm = Some(OlmSender { device_id: device_id.map(Into::into), cross_signed });
    event
}

fn install(member: &Member, index: u8, fill: u8) -> InboxOutput {
    InboxOutput::Install { member: member.key(), index: KeyIndex(index), key: key(fill) }
}

fn forget(member: &Member) -> InboxOutput {
    InboxOutput::Forget { member: member.key() }
}

fn repeated(who: (&str, &str)) -> InboxOutput {
    InboxOutput::Repeated { member: member(who).key(), device: device(who.0, who.1) }
}

fn rejected((user, id): (&str, &str), reason: KeyRejected) -> InboxOutput {
    InboxOutput::Rejected { sender: UserId::parse(user).unwrap(), device_id: Some(id.into()), reason }
}

/// What an inbox in which Alice (ourselves), Bob and Carl are members makes of one message.
fn verdict(event: &ToDeviceEvent) -> InboxOutput {
    let mut inbox = inbox();
    inbox.members(start(), &[member(ALICE), member(BOB), member(CARL)], &joined());
    let mut outputs = inbox.receive(start(), event);
    assert_eq!(outputs.len(), 1, "{outputs:?}");
    if matches!(outputs[0], InboxOutput::Rejected { .. }) {
        assert_eq!(inbox.installed().count(), 0, "a rejected key leaves nothing behind");
        assert!(inbox.parked.is_empty());
    }
    outputs.remove(0)
}

fn rejection(event: &ToDeviceEvent) -> KeyRejected {
    match verdict(event) {
        InboxOutput::Rejected { reason, .. } => reason,
        accepted => panic!("{accepted:?}"),
    }
}

// Which messages count

#[test]
fn faultless_key_is_installed() {
    assert_eq!(verdict(&message(BOB, 0, 7, 1)), install(&member(BOB), 0, 7));
    let stable = ToDeviceEvent { event_type: wire::KEY_EVENT.to_owned(), ..message(BOB, 0, 7, 1) };
    assert_eq!(verdict(&stable), install(&member(BOB), 0, 7));
}

#[test]
fn other_events_are_ignored() {
    let other = ToDeviceEvent { event_type: "m.room_key".to_owned(), ..message(BOB, 0, 7, 1) };
    assert_eq!(inbox().receive(start(), &other), []);
}

#[test]
fn h84_malformed_messages_and_other_rooms_are_refused() {
    let bob = || message(BOB, 0, 7, 1);
    assert_eq!(rejection(&with(bob(), "/room_id", json!("!other:example.org"))), KeyRejected::WrongRoom);
    for (path, value) in [
        ("/keys", json!({})),
        ("/keys", json!({"index": 0})),
        ("/keys", json!({"key": "AAAAAAAAAAAAAAAAAAAAAA=="})),
        ("/member", json!(null)),
        ("/member", json!({})),
        ("/room_id", json!(null)),
    ] {
        assert!(matches!(rejection(&with(bob(), path, value)), KeyRejected::Malformed(_)), "{path}");
    }
}

#[test]
fn h85_keys_go_to_the_ring_of_each_member() {
    let mut inbox = inbox();
    let members = [member(BOB), member(BOB2), member(CARL)];
    inbox.members(start(), &members, &joined());
    for (who, index, member) in [(BOB, 0, &members[0]), (BOB2, 4, &members[1]), (CARL, 8, &members[2])] {
        assert_eq!(inbox.receive(start(), &message(who, index, index, 1)), [install(member, index, index)]);
    }
}

#[test]
fn h86_older_key_with_the_same_index_is_refused() {
    let mut inbox = inbox();
    let bob = member(BOB);
    inbox.members(start(), std::slice::from_ref(&bob), &joined());
    let mut receive = |index, fill, sent| inbox.receive(start(), &message(BOB, index, fill, sent));
    assert_eq!(receive(0, 1, 2000), [install(&bob, 0, 1)]);
    assert_eq!(receive(0, 2, 1000), [rejected(BOB, KeyRejected::Outdated)]);
    assert_eq!(receive(0, 2, 300), [], "reported once in a while");
    assert_eq!(receive(0, 3, 2000), [install(&bob, 0, 3)]);
    assert_eq!(receive(1, 4, 1000), [install(&bob, 1, 4)]);
}

#[test]
fn clock_that_runs_ahead_does_not_shut_out_later_keys() {
    let mut inbox = inbox();
    let bob = member(BOB);
    inbox.members(start(), std::slice::from_ref(&bob), &joined());
    let now = start();
    inbox.receive(now, &message(BOB, 0, 1, u64::MAX));
    let later = now.plus(secs(1));
    assert_eq!(inbox.receive(later, &message(BOB, 0, 2, later.unix.0)), [install(&bob, 0, 2)]);
}

#[test]
fn replaced_key_does_not_come_back() {
    let mut inbox = inbox();
    let bob = member(BOB);
    inbox.members(start(), std::slice::from_ref(&bob), &joined());
    assert_eq!(inbox.receive(start(), &message(BOB, 0, 1, 1000)), [install(&bob, 0, 1)]);
    assert_eq!(inbox.receive(start(), &message(BOB, 0, 2, 2000)), [install(&bob, 0, 2)]);
    // Without a time, and with a later one.
    let untimed = msc_message(BOB, "@bob:example.org:BOB1", 0, 1);
    assert_eq!(inbox.receive(start(), &untimed), [rejected(BOB, KeyRejected::Replayed)]);
    let later = start().plus(secs(100));
    assert_eq!(inbox.receive(later, &message(BOB, 5, 1, 3000)), [rejected(BOB, KeyRejected::Replayed)]);
}

// Who may speak for whom

#[test]
fn h89_clear_key_is_refused() {
    assert_eq!(rejection(&ToDeviceEvent { olm: None, ..message(BOB, 0, 7, 1) }), KeyRejected::NotEncrypted);
}

#[test]
fn h89_device_cannot_speak_for_another_of_its_owner() {
    assert_eq!(rejection(&sealed_by(message(BOB, 0, 7, 1), Some("BOB2"), true)), KeyRejected::DeviceMismatch);
}

#[test]
fn a14_device_cannot_use_the_membership_of_another_of_its_owner() {
    let honest_device = with(message(BOB2, 0, 7, 1), "/member/id", json!("@bob:example.org:BOB1"));
    assert_eq!(rejection(&honest_device), KeyRejected::DeviceMismatch);
    assert_eq!(rejection(&msc_message(BOB2, "@bob:example.org:BOB1", 0, 7)), KeyRejected::DeviceMismatch);
}

#[test]
fn a14_user_cannot_speak_for_another() {
    // Carl's device has the name of Bob's and names Bob's membership.
    let mut inbox = inbox();
    inbox.members(start(), &[member(BOB), member(CARL)], &joined());
    let mut forged = message(BOB, 0, 7, 1);
    forged.sender = UserId::parse(CARL.0).unwrap();
    assert_eq!(inbox.receive(start(), &forged), []);
    assert_eq!(inbox.installed().count(), 0);
}

#[test]
fn a14_unknown_device_never_counts_whatever_it_claims() {
    for trust in [TrustPolicy::CrossSigned, TrustPolicy::AnyDevice] {
        let mut inbox = with_limits(InboxLimits::default(), trust);
        let bob = member(BOB);
        inbox.members(start(), std::slice::from_ref(&bob), &joined());
        let claims_bob = || sealed_by(message(BOB, 0, 7, 1), None, false);
        let unknown = InboxOutput::Rejected {
            sender: bob.user_id.clone(),
            device_id: None,
            reason: KeyRejected::UnknownDevice,
        };
        assert_eq!(inbox.receive(start(), &claims_bob()), [unknown]);
        assert_eq!((inbox.installed().count(), inbox.parked.len()), (0, 0));
        // The port delivers it again when the device list is current.
        let known = sealed_by(claims_bob(), Some("BOB1"), true);
        assert_eq!(inbox.receive(start().plus(secs(30)), &known), [install(&bob, 0, 7)]);
    }
}

#[test]
fn a14_device_without_cross_signing_is_refused_unless_waived() {
    let unsigned = || sealed_by(message(BOB, 0, 7, 1), Some("BOB1"), false);
    assert_eq!(rejection(&unsigned()), KeyRejected::NotCrossSigned);
    let mut waived = with_limits(InboxLimits::default(), TrustPolicy::AnyDevice);
    waived.members(start(), &[member(BOB)], &joined());
    assert_eq!(waived.receive(start(), &unsigned()), [install(&member(BOB), 0, 7)]);
}

#[test]
fn distrust_ends_with_a_trusted_key_or_changed_trust() {
    let mut inbox = inbox();
    inbox.members(start(), &[member(BOB)], &joined());
    let bob = device(BOB.0, BOB.1);
    let unsigned = || sealed_by(message(BOB, 0, 7, 1), Some("BOB1"), false);
    inbox.receive(start(), &unsigned());
    assert!(inbox.distrusts(&bob));
    inbox.trust_changed(&bob.user_id);
    assert!(!inbox.distrusts(&bob));
    inbox.receive(start(), &unsigned());
    assert!(inbox.distrusts(&bob));
    inbox.receive(start(), &message(BOB, 0, 7, 2));
    assert!(!inbox.distrusts(&bob));
}

#[test]
fn a14_own_key_is_never_accepted() {
    assert_eq!(rejection(&message(ALICE, 0, 7, 1)), KeyRejected::OwnIdentity);
    // Another device of ours claims to be this one, or names our membership.
    let other = || message((ALICE.0, "OTHER"), 0, 7, 1);
    let claimed = with(other(), "/member/claimed_device_id", json!("MYDEVICE"));
    assert_eq!(rejection(&claimed), KeyRejected::OwnIdentity);
    assert_eq!(rejection(&sealed_by(claimed, None, false)), KeyRejected::OwnIdentity);
    assert_eq!(
        rejection(&msc_message((ALICE.0, "OTHER"), "@alice:example.org:MYDEVICE", 0, 7)),
        KeyRejected::OwnIdentity
    );
    // As itself it is welcome.
    let mut inbox = inbox();
    let other_member = member((ALICE.0, "OTHER"));
    inbox.members(start(), &[member(ALICE), other_member.clone()], &joined());
    assert_eq!(inbox.receive(start(), &other()), [install(&other_member, 0, 7)]);
}

#[test]
fn a14_indices_and_lengths_are_strict() {
    for index in [json!(-1), json!(1.5), json!(256), json!(1_000_000_000)] {
        assert_eq!(rejection(&with(message(BOB, 0, 7, 1), "/keys/index", index)), KeyRejected::BadIndex);
    }
    for length in [1, 15, 65] {
        let text = json!(STANDARD.encode(vec![7; length]));
        let reason = rejection(&with(message(BOB, 0, 7, 1), "/keys/key", text));
        assert!(matches!(reason, KeyRejected::BadLength(_)));
    }
}

// Which membership

#[test]
fn state_member_is_found_by_device_if_the_id_is_another() {
    let odd = with(message(BOB, 0, 7, 1), "/member/id", json!("b7d5a6c8-uuid"));
    assert_eq!(verdict(&odd), install(&member(BOB), 0, 7));
    let silent = with(message(BOB, 0, 7, 1), "/member", json!({"claimed_device_id": "BOB1"}));
    assert_eq!(verdict(&silent), install(&member(BOB), 0, 7));
}

#[test]
fn sticky_member_is_found_by_id_only() {
    let mut inbox = inbox();
    let first = sticky(BOB, "first");
    inbox.members(start(), std::slice::from_ref(&first), &joined());
    assert_eq!(inbox.receive(start(), &msc_message(BOB, "first", 3, 7)), [install(&first, 3, 7)]);
    assert_eq!(inbox.receive(start(), &msc_message(BOB, "second", 0, 8)), []);
    assert_eq!(inbox.receive(start(), &message(BOB, 1, 9, 1)), [], "the default id is not its id");
    let second = sticky(BOB, "second");
    let outputs = inbox.members(start(), &[first.clone(), second.clone()], &joined());
    assert_eq!(outputs, [install(&second, 0, 8)]);
}

#[test]
fn member_without_known_device_takes_keys_of_its_user_and_keeps_them() {
    let mut inbox = inbox();
    let unnamed = Member { device_id: None, ..sticky(BOB, "id") };
    inbox.members(start(), std::slice::from_ref(&unnamed), &joined());
    assert_eq!(inbox.receive(start(), &msc_message(BOB, "id", 0, 7)), [install(&unnamed, 0, 7)]);
    assert_eq!(inbox.receive(start(), &msc_message(BOB2, "id", 1, 8)), [install(&unnamed, 1, 8)]);
    // Its device becomes known: the keys of that device stay.
    let named = sticky(BOB, "id");
    let outputs = inbox.members(start(), std::slice::from_ref(&named), &joined());
    assert_eq!(outputs, [forget(&unnamed), install(&named, 0, 7)]);
    assert_eq!(
        inbox.receive(start(), &msc_message(BOB2, "id", 2, 8)),
        [rejected(BOB2, KeyRejected::DeviceMismatch)]
    );
}

// Waiting for a membership

#[test]
fn h87_key_before_its_membership_waits() {
    let mut inbox = inbox();
    let now = start();
    assert_eq!(inbox.receive(now, &message(BOB, 0, 7, 1)), []);
    assert_eq!(inbox.members(now, &[member(CARL)], &joined()), []);
    let later = now.plus(secs(599));
    assert_eq!(inbox.members(later, &[member(CARL), member(BOB)], &joined()), [install(&member(BOB), 0, 7)]);
    assert_eq!(inbox.members(later, &[member(CARL), member(BOB)], &joined()), [], "once");
}

#[test]
fn waiting_key_expires_after_ten_minutes() {
    let mut inbox = inbox();
    assert_eq!(inbox.next_expiry(), None);
    inbox.receive(start(), &message(BOB, 0, 7, 1));
    let at = inbox.next_expiry().unwrap();
    assert_eq!(at, start().instant + secs(600));
    assert_eq!(inbox.expire(at - secs(1)), []);
    assert_eq!(inbox.expire(at), [rejected(BOB, KeyRejected::NotAMember)]);
    assert_eq!(inbox.members(start().plus(secs(601)), &[member(BOB)], &joined()), []);
}

#[test]
fn newer_waiting_key_replaces_an_older_one() {
    let mut inbox = inbox();
    let bob = member(BOB);
    inbox.receive(start(), &message(BOB, 0, 1, 2000));
    assert_eq!(inbox.receive(start(), &message(BOB, 0, 2, 1000)), [rejected(BOB, KeyRejected::Outdated)]);
    inbox.receive(start(), &message(BOB, 0, 3, 3000));
    assert_eq!(inbox.members(start(), std::slice::from_ref(&bob), &joined()), [install(&bob, 0, 3)]);
    assert_eq!(inbox.receive(start(), &message(BOB, 0, 1, 2000)), [], "outdated, as reported");
}

#[test]
fn key_that_overtakes_its_senders_entry_into_the_room_waits_for_it() {
    let mut inbox = inbox();
    let bob = member(BOB);
    let without_bob: BTreeSet<_> = joined().into_iter().filter(|user| user.as_str() != BOB.0).collect();
    inbox.members(start(), &[], &without_bob);
    assert_eq!(inbox.receive(start(), &message(BOB, 0, 1, 1)), []);
    let later = start().plus(secs(2));
    assert_eq!(inbox.members(later, std::slice::from_ref(&bob), &joined()), [install(&bob, 0, 1)]);
    assert_eq!(inbox.next_expiry(), None);
}

#[test]
fn strangers_take_no_room_for_long() {
    let mut inbox = inbox();
    let stranger = ("@stranger:example.org", "S");
    for index in 0..4 {
        assert_eq!(inbox.receive(start(), &message(stranger, index, 1, 1)), []);
    }
    let refused = [rejected(stranger, KeyRejected::NotInRoom)];
    assert_eq!(inbox.receive(start(), &message(stranger, 4, 1, 1)), refused);
    let at = inbox.next_expiry().unwrap();
    assert_eq!(at, start().instant + secs(30));
    inbox.expire(at);
    assert_eq!(inbox.next_expiry(), None);
    for number in 0..100 {
        let user = format!("@stranger{number}:example.org");
        inbox.receive(start(), &message((&user, "S"), 0, 1, 1));
    }
    assert_eq!(inbox.strangers.len(), 64);
}

#[test]
fn user_that_leaves_the_room_loses_its_waiting_keys() {
    let mut inbox = inbox();
    inbox.receive(start(), &message(BOB, 0, 1, 1));
    assert_eq!(inbox.parked.len(), 1);
    let without_bob: BTreeSet<_> = joined().into_iter().filter(|user| user.as_str() != BOB.0).collect();
    inbox.members(start(), &[], &without_bob);
    assert_eq!(inbox.parked.len(), 0);
}

#[test]
fn waiting_keys_are_bounded_per_device_and_user_and_overall() {
    let limits = InboxLimits {
        max_parked_per_device: 3,
        max_parked_per_user: 4,
        max_parked: 6,
        ..InboxLimits::default()
    };
    let mut inbox = with_limits(limits, TrustPolicy::CrossSigned);
    for index in 0..3 {
        assert_eq!(inbox.receive(start(), &message(BOB, index, 1, 1)), []);
    }
    assert_eq!(inbox.receive(start(), &message(BOB, 3, 1, 1)), [rejected(BOB, KeyRejected::TooManyParked)]);
    assert_eq!(inbox.receive(start(), &message(BOB, 2, 9, 2)), [], "a newer one replaces");
    inbox.receive(start(), &message(BOB2, 0, 1, 1));
    inbox.receive(start(), &message(BOB2, 1, 1, 1));
    assert_eq!(inbox.parked.len(), 4);
    for index in 0..3 {
        inbox.receive(start(), &message(CARL, index, 1, 1));
    }
    assert_eq!(inbox.parked.len(), 6);
}

// Leaving and coming back

#[test]
fn leaver_loses_its_keys_and_old_messages_do_not_bring_them_back() {
    let mut inbox = inbox();
    let bob = member(BOB);
    inbox.members(start(), std::slice::from_ref(&bob), &joined());
    inbox.receive(start(), &message(BOB, 0, 1, 1000));
    inbox.receive(start(), &message(BOB, 0, 2, 2000));
    assert_eq!(inbox.members(start(), &[], &joined()), [forget(&bob)]);
    assert_eq!((inbox.installed().count(), inbox.parked.len()), (0, 0));

    // A replay while it is away, and after it is back.
    assert_eq!(inbox.receive(start(), &message(BOB, 0, 2, 2000)), []);
    let outputs = inbox.members(start(), std::slice::from_ref(&bob), &joined());
    assert_eq!(outputs, [rejected(BOB, KeyRejected::Replayed)]);
    assert_eq!(inbox.receive(start(), &message(BOB, 0, 2, 2000)), [], "replayed, as reported");
    assert_eq!(inbox.receive(start(), &message(BOB, 0, 3, 1500)), [rejected(BOB, KeyRejected::Outdated)]);
    assert_eq!(inbox.receive(start(), &message(BOB, 0, 3, 2000)), [], "outdated, as reported");
    assert_eq!(inbox.installed().count(), 0);
    // Sent later, the same key counts, and so does a new one.
    assert_eq!(inbox.receive(start(), &message(BOB, 0, 2, 2001)), [install(&bob, 0, 2)]);
    assert_eq!(inbox.receive(start(), &message(BOB, 1, 4, 500)), [install(&bob, 1, 4)]);
}

#[test]
fn key_given_up_long_before_leaving_does_not_come_back() {
    let mut inbox = inbox();
    let bob = member(BOB);
    inbox.members(start(), std::slice::from_ref(&bob), &joined());
    for index in 0..=4 {
        inbox.receive(start(), &message(BOB, index, index, 1000));
    }
    inbox.members(start(), &[], &joined());
    inbox.members(start(), std::slice::from_ref(&bob), &joined());
    assert_eq!(inbox.receive(start(), &message(BOB, 0, 0, 5000)), [rejected(BOB, KeyRejected::Replayed)]);
    assert_eq!(inbox.receive(start(), &message(BOB, 4, 4, 5000)), [install(&bob, 4, 4)]);
    assert_eq!(inbox.receive(start(), &message(BOB, 0, 9, 5000)), [install(&bob, 0, 9)]);
}

#[test]
fn same_key_of_a_returned_member_without_a_time_is_installed() {
    // The ring keeps the replay window; a sender of MSC4143 has no other way.
    let mut inbox = inbox();
    let bob = sticky(BOB, "id");
    inbox.members(start(), std::slice::from_ref(&bob), &joined());
    inbox.receive(start(), &msc_message(BOB, "id", 0, 7));
    inbox.members(start(), &[], &joined());
    inbox.members(start(), std::slice::from_ref(&bob), &joined());
    assert_eq!(inbox.receive(start(), &msc_message(BOB, "id", 0, 7)), [install(&bob, 0, 7)]);
}

#[test]
fn leave_wipes_every_key() {
    let mut inbox = inbox();
    let bob = member(BOB);
    inbox.members(start(), std::slice::from_ref(&bob), &joined());
    inbox.receive(start(), &message(BOB, 0, 7, 1000));
    inbox.receive(start(), &message(CARL, 0, 7, 1000));
    assert_eq!(inbox.leave(), [forget(&bob)]);
    assert_eq!((inbox.installed().count(), inbox.parked.len(), inbox.members.len()), (0, 0, 0));
    inbox.members(start(), std::slice::from_ref(&bob), &joined());
    assert_eq!(inbox.receive(start(), &message(BOB, 0, 7, 1000)), [rejected(BOB, KeyRejected::Replayed)]);
}

// Known keys

#[test]
fn key_sent_again_asks_for_ours() {
    let mut inbox = inbox();
    let bob = member(BOB);
    inbox.members(start(), std::slice::from_ref(&bob), &joined());
    assert_eq!(inbox.receive(start(), &message(BOB, 0, 7, 1000)), [install(&bob, 0, 7)]);
    assert_eq!(inbox.receive(start(), &message(BOB, 0, 7, 1000)), [], "the same message");
    assert_eq!(inbox.receive(start(), &message(BOB, 0, 7, 900)), [], "an earlier one that was late");
    assert_eq!(
        inbox.receive(start(), &msc_message(BOB, "@bob:example.org:BOB1", 0, 7)),
        [],
        "the other form"
    );
    assert_eq!(inbox.receive(start(), &message(BOB, 0, 7, 1001)), [repeated(BOB)]);
    assert_eq!(inbox.receive(start(), &message(BOB, 0, 7, 1001)), []);
}

#[test]
fn either_form_may_come_first() {
    let mut inbox = inbox();
    let bob = member(BOB);
    inbox.members(start(), std::slice::from_ref(&bob), &joined());
    assert_eq!(
        inbox.receive(start(), &msc_message(BOB, "@bob:example.org:BOB1", 0, 7)),
        [install(&bob, 0, 7)]
    );
    assert_eq!(inbox.receive(start(), &message(BOB, 0, 7, 1000)), []);
    assert_eq!(inbox.receive(start(), &message(BOB, 0, 7, 2000)), [repeated(BOB)]);
}

#[test]
fn h88_new_rings_are_given_the_newest_keys() {
    let mut inbox = inbox();
    let (bob, carl) = (member(BOB), member(CARL));
    inbox.members(start(), &[bob.clone(), carl.clone()], &joined());
    for index in 0..6 {
        inbox.receive(start(), &message(BOB, index, index, 1));
    }
    inbox.receive(start(), &message(CARL, 5, 3, 1));
    let expected = [
        install(&bob, 2, 2),
        install(&bob, 3, 3),
        install(&bob, 4, 4),
        install(&bob, 5, 5),
        install(&carl, 5, 3),
    ];
    assert_eq!(inbox.installed().collect::<Vec<_>>(), expected);
}

#[test]
fn rejections_are_reported_rarely() {
    let mut inbox = inbox();
    inbox.members(start(), &[member(BOB)], &joined());
    let clear = || ToDeviceEvent { olm: None, ..message(BOB, 0, 7, 1) };
    let unsigned = || sealed_by(message(BOB, 0, 7, 1), Some("BOB1"), false);
    assert_eq!(inbox.receive(start(), &clear()).len(), 1);
    assert_eq!(inbox.receive(start(), &clear()).len(), 0);
    assert_eq!(inbox.receive(start(), &unsigned()).len(), 1, "another reason");
    assert_eq!(inbox.receive(start().plus(secs(60)), &clear()).len(), 1);
    let reports = (0..1000).map(|n| {
        let sender = UserId::parse(format!("@user{n}:example.org")).unwrap();
        inbox.receive(start().plus(secs(61)), &ToDeviceEvent { sender, ..clear() }).len()
    });
    assert!(reports.sum::<usize>() <= MAX_REPORTED);
}

#[test]
fn flood_of_keys_is_bounded() {
    let mut inbox = inbox();
    inbox.members(start(), &[member(BOB)], &joined());
    for round in 0..3 {
        for index in 0..=255 {
            let mut flood = message(BOB, index, index, round);
            flood.content["keys"]["key"] = json!(STANDARD.encode([index, round as u8].repeat(8)));
            inbox.receive(start(), &flood);
        }
    }
    let keys = inbox.members.values().next().unwrap();
    assert_eq!((keys.kept.len(), keys.memory.slots.len()), (MAX_KEPT, 256));
    assert!(keys.memory.replaced.len() <= MAX_REPLACED);
}

#[test]
fn debug_shows_no_key() {
    let mut inbox = inbox();
    let event = message(BOB, 0, 7, 1);
    inbox.receive(start(), &event);
    inbox.members(start(), &[member(CARL)], &joined());
    let parked = format!("{:?}", inbox.inbox);
    let outputs = inbox.members(start(), &[member(BOB)], &joined());
    let printed = format!("{event:?} {parked} {:?} {outputs:?}", inbox.inbox);
    assert!(printed.contains("redacted") && !printed.contains("7, 7") && !printed.contains("BwcH"));
}

proptest! {
    /// Whatever comes in whatever order: no panic; an installed key was sent over Olm by the member's own device,
    /// which is present at that time and not ourselves; and nothing grows without bound.
    #[test]
    fn only_members_own_keys_are_installed(
        steps in prop::collection::vec(
            (
                0_usize..4, 0_usize..4, 0_u8..3, 0_u64..5, 0_u8..9, 0_u64..40_000,
                prop::collection::btree_set(0_usize..4, 0..4),
            ),
            0..60,
        )
    ) {
        let people = [ALICE, BOB, BOB2, CARL];
        let limits = InboxLimits { max_parked: 6, max_parked_per_user: 4, ..InboxLimits::default() };
        let mut inbox = with_limits(limits, TrustPolicy::CrossSigned);
        let mut now = start();
        let mut present: Vec<Member> = Vec::new();
        for (sealed, claimed, index, sent, odd, pass, members) in steps {
            now = now.plus(Duration::from_millis(pass));
            let mut outputs = inbox.expire(now.instant);
            if odd == 0 {
                present = members.iter().map(|who| {
                    if index == 0 { member(people[*who]) } else { sticky(people[*who], &format!("m{sent}")) }
                }).collect();
                outputs.extend(inbox.members(now, &present, &joined()));
            } else {
                // The key itself says which device sealed it.
                let fill = u8::try_from(sealed).unwrap();
                let mut received = match odd {
                    8 => msc_message(people[claimed], &format!("m{sent}"), index, fill),
                    _ => message(people[claimed], index, fill, sent),
                };
                received.sender = UserId::parse(people[sealed].0).unwrap();
                received.olm = (odd != 1).then(|| OlmSender {
                    device_id: (odd != 2).then(|| people[sealed].1.into()),
                    cross_signed: odd != 3,
                });
                if odd == 4 {
                    received.content["member"].as_object_mut().unwrap().remove("id");
                }
                let honest = (sealed == claimed || odd == 8) && sealed != 0 && !(1..=3).contains(&odd);
                let received = inbox.receive(now, &received);
                if !honest {
                    let installs = received.iter().any(|o| matches!(o, InboxOutput::Install { .. }));
                    prop_assert!(!installs);
                }
                outputs.extend(received);
            }
            for output in outputs.into_iter().chain(inbox.installed()) {
                if let InboxOutput::Install { member, key, .. } = output {
                    let who = people[usize::from(key.as_bytes()[0])];
                    let owner = present.iter().find(|present| present.key() == member).unwrap();
                    let owner = (owner.user_id.as_str(), owner.device_id.as_ref().unwrap().as_str());
                    prop_assert_eq!(owner, who);
                    prop_assert_ne!(who, ALICE);
                }
            }
            prop_assert!(inbox.parked.len() <= 6);
            prop_assert!(inbox.parked.iter().map(|key| key.since).is_sorted());
        }
    }
}
