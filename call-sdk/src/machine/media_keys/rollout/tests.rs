//! Our own key on virtual time.

use proptest::prelude::*;
use rand::{SeedableRng as _, rngs::StdRng};
use ruma_common::room_id;

use super::{super::presence::Presence, *};
use crate::{
    machine::testing::{device, state_member, sticky_member},
    member::Slot,
};

const ALICE: (&str, &str) = ("@alice:example.org", "MYDEVICE");
const BOB: (&str, &str) = ("@bob:example.org", "BOBDEVICE");
const BOB2: (&str, &str) = ("@bob:example.org", "BOBDEVICE2");
const BOB3: (&str, &str) = ("@bob:example.org", "BOBDEVICE3");
const CARL: (&str, &str) = ("@carl:example.org", "CARLDEVICE");
const DAVID: (&str, &str) = ("@david:example.org", "DAVIDDEVICE");

fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

fn dev((user, id): (&str, &str)) -> Device {
    device(user, id)
}

fn member((user, id): (&str, &str), created: u64) -> Member {
    state_member(user, id, created)
}

fn sender() -> KeySender {
    KeySender {
        room_id: room_id!("!room:example.org").to_owned(),
        slot: Slot::room_call(),
        device: dev(ALICE),
        member_id: MemberId("@alice:example.org:MYDEVICE".to_owned()),
    }
}

fn first_0() -> RolloutConfig {
    RolloutConfig { first_index: Some(KeyIndex(0)), ..RolloutConfig::default() }
}

fn no_session() -> DeliveryFailure {
    DeliveryFailure::NoSession("no one-time key".to_owned())
}

#[derive(Clone, Debug, PartialEq)]
enum Outcome {
    /// Reached after this long.
    After(u64),
    Failed(DeliveryFailure),
    /// No outcome until the batch is reported as finished after this long.
    Finished(u64),
    /// Nothing is ever reported.
    Silence,
}

const REACHED: Outcome = Outcome::After(0);

type Sent = (u64, u8, Vec<String>);
/// An outcome on its way; `None`: the batch is finished.
type Pending = (Now, SendId, Option<(Device, Delivery)>);

/// The state machine with its shell.
struct Keys {
    rollout: Rollout,
    presence: Presence,
    start: Now,
    now: Now,
    /// Time, index and device ids of every batch of the deployed type.
    sent: Vec<Sent>,
    /// The same of the type of MSC4143.
    sent_msc: Vec<Sent>,
    used: Vec<(u64, u8)>,
    events: Vec<KeyEvent>,
    material: BTreeMap<u8, MediaKey>,
    pending: Vec<Pending>,
    /// By device id and how often it was tried before.
    outcome: fn(&str, usize) -> Outcome,
    tries: BTreeMap<String, usize>,
}

impl Keys {
    #[expect(clippy::disallowed_methods, reason = "an arbitrary origin of virtual time")]
    fn new(config: RolloutConfig) -> Self {
        let start = Now { instant: Instant::now(), unix: UnixMillis(1_800_000_000_000) };
        let mut rollout = Rollout::new(config, Box::new(StdRng::seed_from_u64(7)));
        rollout.join(sender());
        Self {
            rollout,
            presence: Presence::new(dev(ALICE)),
            start,
            now: start,
            sent: Vec::new(),
            sent_msc: Vec::new(),
            used: Vec::new(),
            events: Vec::new(),
            material: BTreeMap::new(),
            pending: Vec::new(),
            outcome: |_, _| REACHED,
            tries: BTreeMap::new(),
        }
    }

    fn members(&mut self, members: &[((&str, &str), u64)]) {
        let members: Vec<_> = members.iter().map(|(who, created)| member(*who, *created)).collect();
        self.update(self.now, &members);
        self.drain(self.now);
    }

    fn update(&mut self, now: Now, members: &[Member]) {
        self.rollout.members(now.instant, &self.presence.update(members));
    }

    fn leave(&mut self) {
        self.presence.clear();
        self.rollout.leave();
    }

    /// Lets time pass up to `at` milliseconds after the start.
    fn run(&mut self, at: u64) {
        self.drain(self.start.plus(ms(at)));
    }

    fn at(&self) -> u64 {
        u64::try_from((self.now.instant - self.start.instant).as_millis()).unwrap()
    }

    fn drain(&mut self, end: Now) {
        loop {
            if let Some(place) = self.pending.iter().position(|(at, ..)| at.instant <= self.now.instant) {
                let (_, id, outcome) = self.pending.remove(place);
                match outcome {
                    Some((device, result)) => self.rollout.delivered(self.now.instant, id, &device, result),
                    None => self.rollout.finished(self.now.instant, id),
                }
                continue;
            }
            let next = match self.rollout.poll(self.now) {
                Step::Send { id, batch } => {
                    self.sent(id, &batch);
                    continue;
                }
                Step::Use { index, key } => {
                    let known = self.material.entry(index.0).or_insert_with(|| key.clone());
                    assert_eq!(*known, key, "the key in use is the one that was sent");
                    self.used.push((self.at(), index.0));
                    continue;
                }
                Step::Event(event) => {
                    self.events.push(event);
                    continue;
                }
                Step::Wait(next) => next,
            };
            let next = self.pending.iter().map(|(at, ..)| at.instant).chain(next).min();
            let Some(next) = next.filter(|next| *next <= end.instant) else { break };
            assert!(next > self.now.instant, "a wait ends in the future");
            self.now = self.now.plus(next - self.now.instant);
        }
        self.now = end;
    }

    fn sent(&mut self, id: SendId, batch: &ToDeviceBatch) {
        let message = wire::parse(&batch.content).unwrap();
        self.material.entry(message.index.0).or_insert_with(|| message.key.clone());
        let mut ids: Vec<_> = batch.recipients.iter().map(|device| device.device_id.to_string()).collect();
        ids.sort();
        let is_legacy = batch.event_type == wire::LEGACY_KEY_EVENT;
        let log = if is_legacy { &mut self.sent } else { &mut self.sent_msc };
        log.push((
            u64::try_from((self.now.instant - self.start.instant).as_millis()).unwrap(),
            message.index.0,
            ids,
        ));
        for device in &batch.recipients {
            let tries = self.tries.entry(device.device_id.to_string()).or_default();
            let (after, outcome) = match (self.outcome)(device.device_id.as_str(), *tries) {
                Outcome::After(after) => (after, Some((device.clone(), Ok(())))),
                Outcome::Failed(failure) => (0, Some((device.clone(), Err(failure)))),
                Outcome::Finished(after) => (after, None),
                Outcome::Silence => continue,
            };
            *tries += 1;
            self.pending.push((self.now.plus(ms(after)), id, outcome));
        }
    }

    /// Batches of the deployed type from `at` on.
    fn sent_from(&self, at: u64) -> Vec<Sent> {
        self.sent.iter().filter(|(when, ..)| *when >= at).cloned().collect()
    }

    /// Times and indices of the messages to one device.
    fn sent_to(&self, who: (&str, &str)) -> Vec<(u64, u8)> {
        let to = |(at, index, ids): &Sent| ids.contains(&who.1.to_owned()).then_some((*at, *index));
        self.sent.iter().filter_map(to).collect()
    }
}

fn to(devices: &[(&str, &str)]) -> Vec<String> {
    devices.iter().map(|(_, id)| (*id).to_owned()).collect()
}

// The scenarios of the specification

#[test]
fn g67_first_update_makes_the_first_key() {
    let mut keys = Keys::new(first_0());
    keys.run(1000);
    assert_eq!(keys.used, []);
    keys.members(&[]);
    assert_eq!((keys.used.clone(), keys.sent.len()), (vec![(1000, 0)], 0));
}

#[test]
fn g68_all_members_get_the_first_key_in_one_batch() {
    let mut keys = Keys::new(first_0());
    keys.members(&[(ALICE, 1), (BOB, 1000), (BOB2, 1000), (CARL, 1000)]);
    assert_eq!(keys.sent, [(0, 0, to(&[BOB, BOB2, CARL]))]);
    assert_eq!(keys.used, [(0, 0)]);
    assert_eq!(keys.events, [KeyEvent::Delivered { index: KeyIndex(0) }]);
    assert_eq!(keys.sent_msc, []);
}

#[test]
fn g69_rejoined_device_gets_the_same_key_again() {
    let mut keys = Keys::new(first_0());
    keys.members(&[(BOB, 1000), (CARL, 1000)]);
    keys.members(&[(BOB, 2000), (CARL, 1000)]);
    assert_eq!(keys.sent[1..], [(0, 0, to(&[BOB]))]);
    keys.run(100_000);
    keys.members(&[(BOB, 3000), (CARL, 1000)]);
    assert_eq!(
        keys.sent[2..],
        [(100_000, 0, to(&[BOB]))],
        "it may have the key, so there is no need to rotate"
    );
}

#[test]
fn new_member_id_is_a_rejoin() {
    let mut keys = Keys::new(first_0());
    let sticky = |id| sticky_member(CARL.0, CARL.1, id, 5);
    for members in [vec![sticky("one")], vec![sticky("one"), sticky("two")], vec![sticky("two")]] {
        keys.update(keys.now, &members);
        keys.run(keys.at() + 1000);
    }
    assert_eq!(keys.sent_to(CARL), [(0, 0), (1000, 0)]);
}

#[test]
fn g70_g71_grace_decides_between_sharing_and_rotating() {
    let config = || RolloutConfig { grace: ms(15_000), ..first_0() };
    let mut early = Keys::new(config());
    early.members(&[(BOB, 1), (BOB2, 1)]);
    early.run(7500);
    early.members(&[(BOB, 1), (BOB2, 1), (CARL, 2)]);
    early.run(60_000);
    assert_eq!(early.sent[1..], [(7500, 0, to(&[CARL]))]);
    assert_eq!(early.used, [(0, 0)]);

    let mut late = Keys::new(config());
    late.members(&[(BOB, 1), (BOB2, 1)]);
    late.run(16_001);
    late.members(&[(BOB, 1), (BOB2, 1), (CARL, 2)]);
    late.run(60_000);
    assert_eq!(late.sent[1..], [(16_001, 1, to(&[BOB, BOB2, CARL]))]);
    assert_eq!(late.used, [(0, 0), (17_001, 1)]);
}

#[test]
fn g72_joiner_during_a_rollout_gets_the_new_key_at_once() {
    let config = RolloutConfig { grace: ms(3000), use_key_delay: ms(5000), ..first_0() };
    let mut keys = Keys::new(config);
    keys.members(&[(BOB, 1)]);
    keys.run(300_000);
    keys.members(&[(BOB, 1), (CARL, 2)]);
    keys.run(304_500);
    keys.members(&[(BOB, 1), (CARL, 2), (DAVID, 3)]);
    keys.run(400_000);
    assert_eq!((keys.sent_to(CARL), keys.sent_to(DAVID)), (vec![(300_000, 1)], vec![(304_500, 1)]));
    assert_eq!(keys.used, [(0, 0), (305_000, 1)], "a newcomer does not delay the switch");
}

#[test]
fn g73_burst_of_joiners_shares_one_key() {
    let mut keys = Keys::new(first_0());
    let mut members = Vec::new();
    keys.members(&members);
    for (n, id) in ["A", "B", "C", "D", "E"].into_iter().enumerate() {
        keys.run(n as u64 * 1000);
        members.push((("@x:example.org", id), 1));
        keys.members(&members);
    }
    keys.run(60_000);
    assert_eq!(keys.sent.len(), 5);
    assert!(keys.sent.iter().all(|(_, index, to)| *index == 0 && to.len() == 1));
}

#[test]
fn g74_update_without_changes_sends_nothing() {
    let mut keys = Keys::new(first_0());
    keys.members(&[(BOB, 1)]);
    keys.run(20_000);
    keys.members(&[(BOB, 1)]);
    keys.run(40_000);
    assert_eq!(keys.sent.len(), 1);
}

#[test]
fn g75_leave_rotates_and_the_switch_is_delayed() {
    let mut keys = Keys::new(first_0());
    keys.members(&[(BOB, 1), (BOB2, 1), (CARL, 1)]);
    keys.run(3000);
    keys.members(&[(BOB, 1), (BOB2, 1)]);
    keys.run(3200);
    assert_eq!(keys.sent[1..], [(3000, 1, to(&[BOB, BOB2]))]);
    assert_eq!(keys.used, [(0, 0)]);
    keys.run(4200);
    assert_eq!(keys.used, [(0, 0), (4000, 1)]);
}

#[test]
fn g76_leaves_during_a_rollout_are_one_more_rollout() {
    let mut keys = Keys::new(first_0());
    keys.members(&[(BOB, 1), (BOB2, 1), (CARL, 1)]);
    keys.run(3000);
    keys.members(&[(BOB, 1), (BOB2, 1)]);
    keys.run(3200);
    keys.members(&[(BOB, 1)]);
    keys.run(3400);
    keys.members(&[(BOB3, 2)]);
    keys.run(60_000);
    assert_eq!(keys.sent_to(BOB3), [(3400, 1), (4000, 2)]);
    assert_eq!(keys.sent_from(3400).len(), 2);
    assert_eq!(keys.used, [(0, 0), (4000, 1), (5000, 2)]);
}

#[test]
fn g79_index_0_follows_255() {
    let mut keys = Keys::new(RolloutConfig { first_index: Some(KeyIndex(255)), ..RolloutConfig::default() });
    keys.members(&[(BOB, 1), (CARL, 1)]);
    keys.run(1000);
    keys.members(&[(BOB, 1)]);
    keys.run(60_000);
    assert_eq!(keys.used, [(0, 255), (2000, 0)]);
}

#[test]
fn g80_failed_device_is_retried_without_a_membership_change() {
    let mut keys = Keys::new(first_0());
    keys.outcome = |id, tries| match (id, tries) {
        ("BOBDEVICE", 0) => Outcome::Failed(DeliveryFailure::Network("down".to_owned())),
        _ => REACHED,
    };
    keys.members(&[(BOB, 1), (CARL, 1)]);
    keys.run(60_000);
    assert_eq!(keys.sent, [(0, 0, to(&[BOB, CARL])), (1000, 0, to(&[BOB]))]);
    assert!(matches!(&keys.events[0], KeyEvent::DeliveryFailed { device, .. } if *device == dev(BOB)));
    assert_eq!(keys.events[1..], [KeyEvent::Delivered { index: KeyIndex(0) }]);
}

#[test]
fn g80_switch_waits_for_success_or_deadline() {
    // The homeserver fails: every device is waited for until it got the key.
    let mut keys = Keys::new(first_0());
    keys.members(&[(BOB, 1), (CARL, 1)]);
    keys.run(3000);
    keys.outcome = |_, tries| match tries {
        1 => Outcome::Failed(DeliveryFailure::Network("down".to_owned())),
        _ => REACHED,
    };
    keys.members(&[(BOB, 1)]);
    keys.run(60_000);
    assert_eq!(keys.sent[1..], [(3000, 1, to(&[BOB])), (4000, 1, to(&[BOB]))]);
    assert_eq!(keys.used, [(0, 0), (5000, 1)]);

    let mut keys = Keys::new(first_0());
    keys.members(&[(BOB, 1), (CARL, 1)]);
    keys.run(3000);
    keys.outcome = |_, _| Outcome::Failed(DeliveryFailure::Network("down".to_owned()));
    keys.members(&[(BOB, 1)]);
    keys.run(60_000);
    assert_eq!(keys.used, [(0, 0), (9000, 1)], "deadline and delay");
}

#[test]
fn h83_own_device_gets_nothing_and_own_other_device_gets_the_key() {
    let mut keys = Keys::new(first_0());
    keys.members(&[(ALICE, 1)]);
    keys.run(1000);
    assert_eq!(keys.sent, []);
    let other = (ALICE.0, "OTHER");
    keys.members(&[(ALICE, 1), (other, 1)]);
    assert_eq!(keys.sent, [(1000, 0, to(&[other]))]);
}

#[test]
fn g81_large_call_keeps_its_key() {
    let limit = || RolloutConfig { participant_limit: Some(3), ..first_0() };
    let mut keys = Keys::new(limit());
    keys.members(&[(BOB, 1)]);
    keys.run(20_000);
    keys.members(&[(BOB, 1), (CARL, 1)]);
    assert!(keys.events.contains(&KeyEvent::RotationSuppressed(true)));
    assert_eq!(keys.sent[1..], [(20_000, 0, to(&[CARL]))]);
    keys.run(30_000);
    keys.members(&[(CARL, 1)]);
    keys.run(60_000);
    assert!(keys.events.contains(&KeyEvent::RotationSuppressed(false)));
    assert_eq!(keys.sent_from(30_000), [(30_000, 1, to(&[CARL]))]);

    let mut large = Keys::new(limit());
    large.members(&[(BOB, 1), (BOB2, 1), (CARL, 1), (DAVID, 1)]);
    large.run(20_000);
    large.members(&[(BOB, 1), (BOB2, 1), (CARL, 1)]);
    large.run(7_300_000);
    assert_eq!(large.sent.len(), 1);
    // A member that left while the call was large is locked out as soon as the call is small.
    large.members(&[(BOB, 1)]);
    assert_eq!(large.sent_from(7_300_000), [(7_300_000, 1, to(&[BOB]))]);
}

// Coalescing

/// `count` devices of as many users.
fn crowd(count: usize) -> Vec<Member> {
    (0..count).map(|n| state_member(&format!("@user{n:03}:example.org"), "D", 1)).collect()
}

#[test]
fn grace_grows_with_the_call() {
    for (size, age, rotates) in
        [(5, 9_999, false), (5, 10_000, true), (40, 41_999, false), (40, 42_000, true)]
    {
        let mut keys = Keys::new(first_0());
        keys.update(keys.now, &crowd(size));
        keys.run(age);
        let mut members = crowd(size);
        members.push(member(BOB, 1));
        keys.update(keys.now, &members);
        keys.run(age + 500);
        let expected = if rotates { size + 1 } else { 1 };
        assert_eq!(
            keys.sent_from(age).iter().map(|(_, _, to)| to.len()).sum::<usize>(),
            expected,
            "{size} {age}"
        );
    }
}

#[test]
fn grace_has_an_upper_bound() {
    let mut keys = Keys::new(first_0());
    keys.update(keys.now, &crowd(500));
    keys.run(300_000);
    keys.update(keys.now, &crowd(501));
    keys.run(300_000);
    assert_eq!(keys.sent_from(300_000).iter().map(|(_, _, to)| to.len()).sum::<usize>(), 501);
}

#[test]
fn joiner_is_never_kept_waiting_by_coalescing() {
    let mut keys = Keys::new(first_0());
    for size in 1..=60 {
        keys.update(keys.now, &crowd(size));
        let at = keys.at();
        keys.run(at);
        let newest = format!("@user{:03}:example.org", size - 1);
        let device = device(&newest, "D");
        assert!(
            keys.rollout.recipients[&device].is_in_flight() || keys.rollout.recipients[&device].is_served()
        );
        keys.run(at + 700);
    }
}

#[test]
fn leaves_are_coalesced_in_large_calls() {
    let mut keys = Keys::new(first_0());
    keys.update(keys.now, &crowd(100));
    keys.run(60_000);
    // The first leave acts at once, those within the next 10 s together.
    for (n, at) in (0..10).map(|n| (n, 60_000 + n as u64 * 900)) {
        keys.run(at);
        keys.update(keys.now, &crowd(99 - n));
        keys.run(at);
    }
    keys.run(100_000);
    let rotations: Vec<_> =
        keys.sent_from(60_000).iter().map(|(at, index, to)| (*at, *index, to.len())).collect();
    assert_eq!(rotations, [(60_000, 1, 99), (69_100, 2, 90)]);
    assert_eq!(keys.used, [(0, 0), (61_000, 1), (70_100, 2)]);
}

#[test]
fn leaver_reads_no_longer_than_documented() {
    let config = RolloutConfig::default();
    let bound = config.leave_wait_max + config.delivery_deadline + config.use_key_delay;
    let mut keys = Keys::new(first_0());
    keys.update(keys.now, &crowd(1000));
    keys.run(1000);
    keys.outcome = |_, _| Outcome::Silence;
    keys.update(keys.now, &crowd(999));
    keys.run(60_000);
    let (used, _) = keys.used[1];
    assert!(ms(used - 1000) <= bound, "{used}");
}

#[test]
fn member_that_returns_before_the_rotation_makes_it_needless() {
    let mut keys = Keys::new(first_0());
    keys.update(keys.now, &crowd(50));
    keys.run(1000);
    keys.update(keys.now, &crowd(49));
    keys.run(3000);
    keys.update(keys.now, &crowd(50));
    keys.run(100_000);
    assert_eq!(keys.used, [(0, 0)]);
    assert_eq!(keys.sent[1..], [(3000, 0, vec!["D".to_owned()])]);
}

// Delivery per device

#[test]
fn slow_device_delays_no_other_device() {
    let mut keys = Keys::new(first_0());
    keys.outcome = |id, _| if id == "BOBDEVICE" { Outcome::Silence } else { REACHED };
    keys.members(&[(BOB, 1), (CARL, 1)]);
    keys.run(2000);
    keys.members(&[(BOB, 1), (CARL, 1), (DAVID, 1)]);
    assert_eq!(keys.sent_to(DAVID), [(2000, 0)], "while the first batch is on its way");
}

#[test]
fn silent_device_delays_one_switch_until_the_deadline() {
    let mut keys = Keys::new(first_0());
    keys.members(&[(BOB, 1), (BOB2, 1), (CARL, 1), (DAVID, 1)]);
    keys.run(3000);
    keys.outcome = |id, _| if id == "BOBDEVICE" { Outcome::Silence } else { REACHED };
    keys.members(&[(BOB, 1), (BOB2, 1), (CARL, 1)]);
    keys.run(20_000);
    assert_eq!(keys.used, [(0, 0), (9000, 1)]);
    keys.members(&[(BOB, 1), (BOB2, 1)]);
    keys.run(40_000);
    assert_eq!(keys.used, [(0, 0), (9000, 1), (21_000, 2)], "it is not waited for again");
}

#[test]
fn undeliverable_device_delays_no_switch() {
    let mut keys = Keys::new(first_0());
    keys.outcome = |id, _| if id == "BOBDEVICE" { Outcome::Failed(no_session()) } else { REACHED };
    keys.members(&[(BOB, 1), (BOB2, 1), (CARL, 1)]);
    keys.run(3000);
    keys.members(&[(BOB, 1), (BOB2, 1)]);
    keys.run(5000);
    assert_eq!(keys.used, [(0, 0), (4000, 1)]);
}

#[test]
fn device_that_fails_during_a_rollout_is_not_waited_for() {
    let mut keys = Keys::new(first_0());
    keys.members(&[(BOB, 1), (BOB2, 1), (CARL, 1)]);
    keys.run(3000);
    keys.outcome = |id, _| if id == "BOBDEVICE" { Outcome::Failed(no_session()) } else { REACHED };
    keys.members(&[(BOB, 1), (BOB2, 1)]);
    keys.run(5000);
    assert_eq!(keys.used, [(0, 0), (4000, 1)]);
}

#[test]
fn device_that_answers_again_is_waited_for_again() {
    let mut keys = Keys::new(first_0());
    keys.outcome = |_, tries| if tries == 0 { Outcome::Failed(no_session()) } else { Outcome::After(2000) };
    keys.members(&[(BOB, 1), (CARL, 1)]);
    keys.run(10_000);
    keys.members(&[(BOB, 1)]);
    keys.run(20_000);
    assert_eq!(keys.used, [(0, 0), (13_000, 1)]);
}

#[test]
fn retries_back_off_to_30_s() {
    let mut keys = Keys::new(first_0());
    keys.outcome = |_, _| Outcome::Failed(no_session());
    keys.members(&[(BOB, 1)]);
    keys.run(100_000);
    let times: Vec<_> = keys.sent_to(BOB).into_iter().map(|(at, _)| at).collect();
    assert_eq!(times, [0, 1000, 3000, 7000, 15_000, 31_000, 61_000, 91_000]);
    assert_eq!(keys.events.len(), 1, "reported once");
}

#[test]
fn retry_after_is_respected() {
    let mut keys = Keys::new(first_0());
    keys.outcome = |_, tries| match tries {
        0 => Outcome::Failed(DeliveryFailure::RateLimited { retry_after: Some(ms(7000)) }),
        _ => REACHED,
    };
    keys.members(&[(BOB, 1)]);
    keys.run(2000);
    keys.outcome = |_, _| REACHED;
    keys.members(&[(BOB, 1), (CARL, 1)]);
    keys.run(8000);
    assert_eq!(keys.sent[1..], [(7000, 0, to(&[BOB, CARL]))]);
}

#[test]
fn devices_without_an_outcome_count_as_timed_out() {
    let mut keys = Keys::new(first_0());
    keys.outcome = |id, tries| match (id, tries) {
        ("BOBDEVICE", 0) => Outcome::Finished(4000),
        _ => REACHED,
    };
    keys.members(&[(BOB, 1), (CARL, 1)]);
    keys.run(60_000);
    assert_eq!(keys.sent[1..], [(5000, 0, to(&[BOB]))]);

    let mut keys = Keys::new(first_0());
    keys.outcome = |_, tries| if tries == 0 { Outcome::Silence } else { REACHED };
    keys.members(&[(BOB, 1)]);
    keys.outcome = |_, _| REACHED;
    keys.run(60_000);
    assert_eq!(keys.sent[1..], [(31_000, 0, to(&[BOB]))], "also if the batch is never reported as finished");
}

#[test]
fn late_outcome_counts() {
    let mut keys = Keys::new(first_0());
    keys.outcome = |_, tries| if tries == 0 { Outcome::After(30_500) } else { Outcome::Silence };
    keys.members(&[(BOB, 1)]);
    keys.run(200_000);
    assert_eq!(keys.sent_to(BOB).len(), 1);
    assert_eq!(keys.events.last(), Some(&KeyEvent::Delivered { index: KeyIndex(0) }));
}

#[test]
fn stray_outcomes_change_nothing() {
    let mut keys = Keys::new(first_0());
    keys.outcome = |_, _| Outcome::Silence;
    keys.members(&[(BOB, 1)]);
    keys.rollout.delivered(keys.now.instant, SendId(99), &dev(BOB), Ok(()));
    keys.rollout.delivered(keys.now.instant, SendId(1), &dev(CARL), Ok(()));
    keys.rollout.finished(keys.now.instant, SendId(99));
    keys.run(1000);
    assert_eq!(keys.events, []);
    assert!(keys.rollout.recipients[&dev(BOB)].is_in_flight());
}

#[test]
fn stuck_delivery_of_the_old_key_does_not_delay_the_new_one() {
    let mut keys = Keys::new(first_0());
    keys.outcome = |id, tries| if id == "BOBDEVICE" && tries == 0 { Outcome::After(20_000) } else { REACHED };
    keys.members(&[(BOB, 1), (CARL, 1)]);
    keys.outcome = |_, _| REACHED;
    keys.run(500);
    keys.members(&[(BOB, 1)]);
    keys.run(5000);
    assert_eq!(keys.sent[1..], [(500, 1, to(&[BOB]))]);
    assert_eq!(keys.used, [(0, 0), (1500, 1)]);
}

#[test]
fn switch_is_immediate_if_nobody_has_the_key_in_use() {
    let mut keys = Keys::new(first_0());
    keys.members(&[]);
    keys.run(60_000);
    keys.members(&[(BOB, 1)]);
    assert_eq!(keys.used, [(0, 0), (60_000, 1)]);
    assert_eq!(keys.sent, [(60_000, 1, to(&[BOB]))]);
}

#[test]
fn msc_readers_get_the_second_form_too() {
    let mut keys = Keys::new(first_0());
    let members = [member(BOB, 1), sticky_member(CARL.0, CARL.1, "id", 1)];
    keys.update(keys.now, &members);
    keys.run(1000);
    assert_eq!(keys.sent, [(0, 0, to(&[BOB, CARL]))]);
    assert_eq!(keys.sent_msc, [(0, 0, to(&[CARL]))]);
    // A member that turns out to read it gets it then.
    let upgraded = Member { reads_msc_keys: true, ..member(BOB, 1) };
    keys.update(keys.now, &[upgraded, members[1].clone()]);
    keys.run(2000);
    assert_eq!(keys.sent_msc[1..], [(1000, 0, to(&[BOB]))]);
    assert_eq!(keys.sent.len(), 1);
}

#[test]
fn large_batches_are_split() {
    let mut keys = Keys::new(first_0());
    keys.update(keys.now, &crowd(250));
    keys.run(0);
    assert_eq!(keys.sent.iter().map(|(_, _, to)| to.len()).collect::<Vec<_>>(), [100, 100, 50]);
}

// Policy

#[test]
fn refused_device_is_reported_once_and_rechecked_rarely() {
    let mut keys = Keys::new(first_0());
    keys.outcome = |id, _| match id {
        "BOBDEVICE" => Outcome::Failed(DeliveryFailure::NotCrossSigned),
        _ => REACHED,
    };
    keys.members(&[(BOB, 1), (CARL, 1), (DAVID, 1)]);
    keys.run(1000);
    assert!(keys.rollout.refuses(&dev(BOB)) && !keys.rollout.refuses(&dev(CARL)));
    keys.members(&[(BOB, 1), (CARL, 1)]);
    keys.run(700_000);
    assert_eq!(keys.sent_to(BOB), [(0, 0), (300_000, 1), (600_000, 1)]);
    assert_eq!(keys.used, [(0, 0), (2000, 1)], "it delays nothing");
    let refused = KeyEvent::Refused { device: dev(BOB), failure: DeliveryFailure::NotCrossSigned };
    assert_eq!(keys.events.iter().filter(|event| **event == refused).count(), 1);
    assert!(keys.events.contains(&KeyEvent::Delivered { index: KeyIndex(1) }), "as far as policy allows");
    let printed = refused.to_string();
    for part in [BOB.0, BOB.1, "cross-signed", "verify"] {
        assert!(printed.contains(part), "{printed}");
    }
}

#[test]
fn failure_of_another_kind_does_not_end_a_refusal() {
    let mut keys = Keys::new(first_0());
    keys.outcome = |_, tries| match tries {
        0 => Outcome::Failed(DeliveryFailure::Blocked),
        1 => Outcome::Failed(DeliveryFailure::Network("down".to_owned())),
        _ => REACHED,
    };
    keys.members(&[(BOB, 1)]);
    keys.run(300_500);
    assert!(keys.rollout.refuses(&dev(BOB)));
    keys.run(302_000);
    assert!(!keys.rollout.refuses(&dev(BOB)));
    assert_eq!(keys.sent_to(BOB), [(0, 0), (300_000, 0), (302_000, 0)]);
}

#[test]
fn leavers_of_a_large_call_are_bounded_and_not_forgotten() {
    let mut keys = Keys::new(RolloutConfig { participant_limit: Some(2), ..first_0() });
    for round in 0..15 {
        let members: Vec<_> =
            (0..100).map(|n| state_member("@x:example.org", &format!("D{round}-{n}"), 1)).collect();
        keys.update(keys.now, &members);
        keys.run(keys.at() + 1000);
    }
    assert!(keys.rollout.key.as_ref().unwrap().holders.len() <= 100 + MAX_LEAVERS);
    keys.members(&[]);
    keys.run(60_000);
    assert_eq!(keys.used.len(), 2, "the call is small now");
}

#[test]
fn changed_trust_sends_at_once() {
    let mut keys = Keys::new(first_0());
    keys.outcome = |_, tries| match tries {
        0 => Outcome::Failed(DeliveryFailure::IdentityChanged),
        _ => REACHED,
    };
    keys.members(&[(BOB, 1)]);
    keys.run(10_000);
    keys.rollout.trust_changed(keys.now.instant, &dev(CARL).user_id);
    keys.run(20_000);
    assert_eq!(keys.sent.len(), 1, "somebody else's trust");
    keys.rollout.trust_changed(keys.now.instant, &dev(BOB).user_id);
    keys.run(20_000);
    assert_eq!(keys.sent_to(BOB), [(0, 0), (20_000, 0)]);
    assert!(!keys.rollout.refuses(&dev(BOB)));
}

#[test]
fn refused_device_that_leaves_makes_no_rotation() {
    let mut keys = Keys::new(first_0());
    keys.outcome = |id, _| match id {
        "BOBDEVICE" => Outcome::Failed(DeliveryFailure::Blocked),
        _ => REACHED,
    };
    keys.members(&[(BOB, 1), (CARL, 1)]);
    keys.run(5000);
    keys.members(&[(CARL, 1)]);
    keys.run(60_000);
    assert_eq!(keys.used, [(0, 0)], "it never had the key");
}

// Who left

#[test]
fn message_of_unknown_fate_to_a_leaver_rotates() {
    for outcome in [
        (|_: &str, _: usize| Outcome::Silence) as fn(&str, usize) -> Outcome,
        |_, _| Outcome::Failed(DeliveryFailure::TimedOut),
        |_, _| Outcome::Failed(DeliveryFailure::Network("reset".to_owned())),
    ] {
        let mut keys = Keys::new(first_0());
        keys.outcome = outcome;
        keys.members(&[(BOB, 1), (CARL, 1)]);
        keys.run(500);
        keys.members(&[(BOB, 1)]);
        keys.run(60_000);
        assert!(keys.sent_from(500).iter().all(|(_, index, to)| *to == [BOB.1] && *index == 1));
        assert_eq!(keys.sent_from(500)[0].0, 500, "at once");
        assert_eq!(keys.used.len(), 2);
    }
}

#[test]
fn late_outcome_of_the_old_key_says_nothing_of_the_new_one() {
    let mut keys = Keys::new(first_0());
    keys.outcome = |_, _| Outcome::After(20_000);
    keys.members(&[(BOB, 1), (CARL, 1)]);
    keys.outcome = |_, _| REACHED;
    keys.run(500);
    keys.members(&[(CARL, 1)]);
    keys.run(30_000);
    keys.members(&[(CARL, 2)]);
    keys.run(60_000);
    assert_eq!(keys.used, [(0, 0), (1500, 1)], "the leaver does not have the new key");
}

#[test]
fn message_from_before_a_rejoin_does_not_count() {
    let mut keys = Keys::new(first_0());
    keys.outcome = |_, tries| match tries {
        0 => Outcome::After(2000),
        1 => Outcome::Failed(no_session()),
        _ => REACHED,
    };
    keys.members(&[(BOB, 1)]);
    keys.run(1000);
    keys.members(&[(BOB, 2)]);
    keys.run(60_000);
    assert_eq!(keys.sent_to(BOB), [(0, 0), (1000, 0), (2000, 0)]);
}

#[test]
fn leaver_gets_no_retry() {
    let mut keys = Keys::new(first_0());
    keys.outcome = |_, _| Outcome::Failed(no_session());
    keys.members(&[(BOB, 1)]);
    keys.run(500);
    keys.members(&[]);
    keys.run(100_000);
    assert_eq!(keys.sent.len(), 1);
}

// Age, use, end

#[test]
fn key_is_replaced_after_an_hour_and_on_demand() {
    let mut keys = Keys::new(first_0());
    keys.members(&[(BOB, 1)]);
    keys.run(2 * 3_600_000 + 5000);
    assert_eq!(keys.used, [(0, 0), (3_601_000, 1), (7_201_000, 2)]);
    keys.rollout.rotate();
    keys.run(2 * 3_600_000 + 10_000);
    assert_eq!(keys.used.last(), Some(&(7_206_000, 3)));
}

#[test]
fn key_age_is_capped_at_12_h() {
    let mut keys = Keys::new(RolloutConfig { rotate_every: Duration::MAX, ..first_0() });
    keys.members(&[(BOB, 1)]);
    keys.run(13 * 3_600_000);
    assert_eq!(keys.used, [(0, 0), (12 * 3_600_000 + 1000, 1)]);
}

#[test]
fn key_is_replaced_before_an_iv_can_repeat() {
    let config = RolloutConfig { participant_limit: Some(2), ..first_0() };
    let mut keys = Keys::new(config);
    keys.members(&[(BOB, 1)]);
    keys.rollout.sealed(KeyIndex(0), (1 << 31) - 1);
    keys.run(1000);
    assert_eq!(keys.used, [(0, 0)]);
    keys.rollout.sealed(KeyIndex(9), u64::MAX);
    keys.run(2000);
    assert_eq!(keys.used, [(0, 0)], "another key's count");
    keys.rollout.sealed(KeyIndex(0), 1 << 31);
    keys.run(3000);
    assert_eq!(keys.used, [(0, 0), (3000, 1)], "also in a call that keeps its key");
    keys.rollout.sealed(KeyIndex(0), u64::MAX);
    keys.run(10_000);
    assert_eq!(keys.used.len(), 2);
}

#[test]
fn leave_wipes_and_rejoin_starts_afresh() {
    let mut keys = Keys::new(first_0());
    keys.members(&[(BOB, 1), (CARL, 1)]);
    keys.run(2000);
    let old = keys.material[&0].clone();
    keys.leave();
    assert!(keys.rollout.key.is_none() && keys.rollout.flights.is_empty());
    keys.members(&[(BOB, 1)]);
    keys.run(60_000);
    assert_eq!((keys.sent.len(), keys.used.len()), (1, 1), "nothing happens outside of a call");
    keys.rollout.join(sender());
    keys.members(&[(BOB, 1)]);
    let (at, index) = keys.used[1];
    assert_eq!(at, 60_000);
    assert_ne!(index, 0, "another index than last time");
    assert_ne!(keys.material[&index], old);
}

#[test]
fn join_without_leave_starts_afresh_for_the_same_members() {
    let mut keys = Keys::new(first_0());
    keys.members(&[(BOB, 1)]);
    keys.run(60_000);
    keys.rollout.join(KeySender { member_id: MemberId("new".to_owned()), ..sender() });
    keys.run(61_000);
    let (at, index) = keys.used[1];
    assert!(at == 60_000 && index != 0);
    assert_eq!(keys.sent[1..], [(60_000, index, to(&[BOB]))]);
}

#[test]
fn first_index_is_random() {
    let index = |seed| {
        let mut rollout = Rollout::new(RolloutConfig::default(), Box::new(StdRng::seed_from_u64(seed)));
        rollout.join(sender());
        let now = Keys::new(first_0()).now;
        rollout.members(now.instant, &Changes::default());
        rollout.poll(now);
        rollout.index().unwrap()
    };
    assert!((0..20).map(index).collect::<BTreeSet<_>>().len() > 10);
}

#[test]
fn keys_have_the_configured_length_and_differ() {
    for (config, length) in [(16, 16), (32, 32), (5, 32), (64, 64)] {
        let mut keys = Keys::new(RolloutConfig { key_bytes: config, ..first_0() });
        keys.members(&[(BOB, 1), (CARL, 1)]);
        keys.run(1000);
        keys.members(&[(BOB, 1)]);
        keys.run(5000);
        assert!(keys.material.values().all(|key| key.as_bytes().len() == length));
        assert_ne!(keys.material[&0], keys.material[&1]);
    }
}

// Answers

#[test]
fn answers_are_limited_per_device() {
    let mut keys = Keys::new(first_0());
    keys.members(&[(BOB, 1), (CARL, 1)]);
    for second in 1..200 {
        keys.run(second * 1000);
        keys.rollout.resend(keys.now.instant, &dev(BOB), Resend::Answer);
        keys.rollout.resend(keys.now.instant, &dev(DAVID), Resend::Answer);
        keys.run(second * 1000);
    }
    // Not within 5 s of any sending; nor within 10 s of joining, when everybody sends; then the gap doubles.
    let times: Vec<_> = keys.sent_to(BOB).into_iter().map(|(at, _)| at / 1000).collect();
    assert_eq!(times, [0, 5, 15, 35, 75, 155]);
    assert_eq!((keys.sent_to(CARL).len(), keys.sent_to(DAVID).len()), (1, 0));
}

#[test]
fn answers_pause_after_our_own_renewal() {
    let mut keys = Keys::new(first_0());
    keys.members(&[(ALICE, 1), (BOB, 1)]);
    keys.run(100_000);
    keys.members(&[(ALICE, 2), (BOB, 1)]);
    keys.rollout.resend(keys.now.instant, &dev(BOB), Resend::Answer);
    keys.run(109_000);
    assert_eq!(keys.sent.len(), 1, "everybody sends its key again now");
    keys.run(110_000);
    keys.rollout.resend(keys.now.instant, &dev(BOB), Resend::Answer);
    keys.run(111_000);
    assert_eq!(keys.sent_to(BOB), [(0, 0), (110_000, 0)]);
}

#[test]
fn answer_cuts_a_retry_short() {
    let mut keys = Keys::new(first_0());
    keys.outcome = |_, tries| if tries < 6 { Outcome::Failed(no_session()) } else { REACHED };
    keys.members(&[(BOB, 1)]);
    keys.run(45_000);
    keys.rollout.resend(keys.now.instant, &dev(BOB), Resend::Answer);
    keys.run(45_000);
    assert_eq!(keys.sent_to(BOB).last(), Some(&(45_000, 0)));
}

#[test]
fn refused_device_gets_no_answer() {
    let mut keys = Keys::new(first_0());
    keys.outcome = |_, _| Outcome::Failed(DeliveryFailure::Blocked);
    keys.members(&[(BOB, 1)]);
    keys.run(60_000);
    keys.rollout.resend(keys.now.instant, &dev(BOB), Resend::Answer);
    keys.rollout.resend(keys.now.instant, &dev(BOB), Resend::Healing);
    keys.run(61_000);
    assert_eq!(keys.sent.len(), 1);
}

#[test]
fn debug_shows_no_key() {
    let mut keys = Keys::new(first_0());
    keys.members(&[(BOB, 1)]);
    let bytes = format!("{:?}", keys.material[&0].as_bytes());
    let mut printed = format!("{:?}", keys.rollout);
    keys.rollout.rotate();
    while let step @ (Step::Send { .. } | Step::Use { .. } | Step::Event(_)) = keys.rollout.poll(keys.now) {
        printed.push_str(&format!("{step:?}"));
    }
    let text =
        base64::Engine::encode(&base64::engine::general_purpose::STANDARD, keys.material[&0].as_bytes());
    assert!(printed.contains("redacted"));
    assert!(!printed.contains(bytes.trim_matches(['[', ']'])) && !printed.contains(text.trim_matches('=')));
}

// Any history

#[derive(Clone, Debug)]
enum Turn {
    Members(Vec<(usize, u64)>),
    /// Outcome of one device of the oldest open batch.
    Answer(u8),
    Finish,
    Pass(u64),
    Rotate,
    Trust(usize),
    Resend(usize),
    Rejoin,
}

fn any_turn() -> impl Strategy<Value = Turn> {
    prop_oneof![
        5 => prop::collection::vec((0_usize..5, 0_u64..3), 0..5).prop_map(Turn::Members),
        8 => any::<u8>().prop_map(Turn::Answer),
        2 => Just(Turn::Finish),
        6 => (0_u64..12_000).prop_map(Turn::Pass),
        1 => (0_u64..100_000_000).prop_map(Turn::Pass),
        1 => Just(Turn::Rotate),
        1 => (0_usize..5).prop_map(Turn::Trust),
        1 => (0_usize..5).prop_map(Turn::Resend),
        1 => Just(Turn::Rejoin),
    ]
}

fn answer(how: u8) -> Delivery {
    match how % 10 {
        0..=4 => Ok(()),
        5 => Err(DeliveryFailure::TimedOut),
        6 => Err(no_session()),
        7 => Err(DeliveryFailure::NotCrossSigned),
        8 => Err(DeliveryFailure::RateLimited { retry_after: Some(ms(u64::from(how) * 10)) }),
        _ => Err(DeliveryFailure::Network("down".to_owned())),
    }
}

proptest! {
    /// Whatever happens: no panic, no spinning; keys go to present members only; and when it is quiet again the key in
    /// use is one that all members have and nobody else.
    #[test]
    fn no_history_breaks_the_rules(turns in prop::collection::vec(any_turn(), 0..80)) {
        let people = [BOB, BOB2, BOB3, CARL, DAVID];
        let mut keys = Keys::new(RolloutConfig::default());
        let mut now = keys.now;
        let mut present: BTreeSet<Device> = BTreeSet::new();
        let mut open: Vec<(SendId, MediaKey, Vec<Device>)> = Vec::new();
        let mut has: Vec<(MediaKey, BTreeSet<Device>)> = Vec::new();
        let mut in_use: Option<(MediaKey, KeyIndex)> = None;
        let mut members = Vec::new();
        let mut settled = false;
        let settle = [Turn::Answer(0), Turn::Answer(0), Turn::Answer(0), Turn::Answer(0), Turn::Answer(0)];
        let settle = [310_000, 40_000, 10_000, 10_000, 10_000, 310_000, 40_000, 10_000, 10_000, 10_000]
            .into_iter()
            .flat_map(|pass| std::iter::once(Turn::Pass(pass)).chain(settle.clone()));
        let history = turns.len();
        for (n, turn) in turns.into_iter().chain(settle).enumerate() {
            match turn {
                Turn::Members(new) => {
                    let new: BTreeMap<_, _> = new.into_iter().collect();
                    present = new.keys().map(|who| dev(people[*who])).collect();
                    members = new.iter().map(|(who, created)| member(people[*who], *created)).collect::<Vec<_>>();
                    keys.update(now, &members);
                }
                Turn::Answer(how) => {
                    open.retain(|(_, _, to)| !to.is_empty());
                    if let Some((id, key, to)) = open.first_mut() {
                        let device = to.remove(usize::from(how) % to.len());
                        let result = answer(how);
                        if result.is_ok() {
                            match has.iter_mut().find(|(known, _)| known == key) {
                                Some((_, devices)) => { devices.insert(device.clone()); }
                                None => has.push((key.clone(), [device.clone()].into())),
                            }
                        }
                        keys.rollout.delivered(now.instant, *id, &device, result);
                    }
                }
                Turn::Finish => if !open.is_empty() {
                    let (id, ..) = open.remove(0);
                    keys.rollout.finished(now.instant, id);
                },
                Turn::Pass(millis) => now = now.plus(ms(millis)),
                Turn::Rotate => keys.rollout.rotate(),
                Turn::Trust(who) => keys.rollout.trust_changed(now.instant, &dev(people[who]).user_id),
                Turn::Resend(who) => keys.rollout.resend(now.instant, &dev(people[who]), Resend::Answer),
                Turn::Rejoin => {
                    keys.leave();
                    keys.rollout.join(sender());
                    keys.update(now, &members);
                    open.clear();
                }
            }
            for spins in 0.. {
                prop_assert!(spins < 30, "the state machine spins");
                match keys.rollout.poll(now) {
                    Step::Send { id, batch } => {
                        prop_assert!(!batch.recipients.is_empty());
                        prop_assert!(batch.recipients.iter().all(|to| present.contains(to)));
                        open.push((id, wire::parse(&batch.content).unwrap().key, batch.recipients));
                    }
                    Step::Use { index, key } => {
                        prop_assert_ne!(in_use.replace((key, index)).map(|(_, index)| index), Some(index));
                    }
                    Step::Event(_) => {}
                    Step::Wait(at) => {
                        prop_assert!(at.is_none_or(|at| at > now.instant));
                        break;
                    }
                }
            }
            settled |= n >= history && match &in_use {
                None => present.is_empty(),
                Some((key, index)) => {
                    let holders = has.iter().find(|(known, _)| known == key).map(|(_, devices)| devices.clone());
                    keys.rollout.index() == Some(*index) && holders.unwrap_or_default() == present
                }
            };
        }
        prop_assert!(settled);
    }
}
