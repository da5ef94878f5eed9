//! What the machine of this module does, on virtual time.

use std::collections::BTreeSet;

use matrix_sdk::ruma::UserId;
use proptest::prelude::*;
use rand::{SeedableRng as _, rngs::StdRng};

use super::*;
use crate::member::{MemberId, MembershipKind, ParticipantIdentity};

const BOB: (&str, &str) = ("@bob:example.org", "BOBDEVICE");
const BOB2: (&str, &str) = ("@bob:example.org", "BOBDEVICE2");
const BOB3: (&str, &str) = ("@bob:example.org", "BOBDEVICE3");
const CARL: (&str, &str) = ("@carl:example.org", "CARLDEVICE");
const DAVID: (&str, &str) = ("@david:example.org", "DAVIDDEVICE");

fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

fn recipient((user, device): (&str, &str)) -> Recipient {
    (UserId::parse(user).unwrap(), device.into())
}

fn member(who: (&str, &str), created: u64) -> Member {
    let (user_id, device_id) = recipient(who);
    Member {
        identity: ParticipantIdentity::of_state_member(&user_id, &device_id),
        member_id: MemberId(format!("{user_id}:{device_id}")),
        kind: MembershipKind::State,
        created: UnixMillis(created),
        expires_at: None,
        focus: None,
        intent: None,
        user_id,
        device_id,
    }
}

/// What js-sdk uses where ours differs.
fn js() -> RolloutConfig {
    RolloutConfig { use_key_delay: ms(1000), ..RolloutConfig::default() }
}

type Sent = (u64, u8, Vec<String>);

/// The machine with its shell on virtual time: a sending succeeds at once unless `outcome` says otherwise.
struct Keys {
    rollout: Rollout,
    start: Now,
    now: Now,
    sent: Vec<Sent>,
    used: Vec<(u64, u8)>,
    events: Vec<KeyEvent>,
    material: BTreeMap<u8, MediaKey>,
    outcome: fn(n: usize, recipients: &[Recipient]) -> Outcome,
}

enum Outcome {
    Reached,
    Missed(Vec<Recipient>),
    Failed(Option<Duration>),
    Silence,
}

impl Keys {
    #[expect(clippy::disallowed_methods, reason = "an arbitrary origin of virtual time")]
    fn new(config: RolloutConfig) -> Self {
        let start = Now { instant: Instant::now(), unix: UnixMillis(1_800_000_000_000) };
        Self {
            rollout: Rollout::new(config, Box::new(StdRng::seed_from_u64(7))),
            start,
            now: start,
            sent: Vec::new(),
            used: Vec::new(),
            events: Vec::new(),
            material: BTreeMap::new(),
            outcome: |_, _| Outcome::Reached,
        }
    }

    fn members(&mut self, members: &[((&str, &str), u64)]) {
        let members = members.iter().map(|(who, created)| member(*who, *created)).collect();
        self.rollout.handle(self.now, KeyInput::Members(members));
        self.run(self.elapsed());
    }

    fn elapsed(&self) -> u64 {
        self.now.unix.since(self.start.unix).as_millis() as u64
    }

    fn run(&mut self, until: u64) {
        let end = self.start.plus(ms(until));
        loop {
            let at = self.elapsed();
            match self.rollout.poll(self.now) {
                KeyOutput::Send { id, index, key, recipients } => {
                    assert!(self.sent.len() < 10_000, "the machine spins");
                    let known = self.material.entry(index.0).or_insert_with(|| key.clone());
                    assert_eq!(*known, key, "one key per index");
                    let names = recipients.iter().map(|(_, device)| device.to_string()).collect();
                    self.sent.push((at, index.0, names));
                    let input = match (self.outcome)(self.sent.len(), &recipients) {
                        Outcome::Reached => KeyInput::Sent { id, undelivered: vec![] },
                        Outcome::Missed(undelivered) => KeyInput::Sent { id, undelivered },
                        Outcome::Failed(retry_after) => KeyInput::SendFailed { id, retry_after },
                        Outcome::Silence => continue,
                    };
                    self.rollout.handle(self.now, input);
                }
                KeyOutput::Use { index, key } => {
                    let known = self.material.entry(index.0).or_insert_with(|| key.clone());
                    assert_eq!(*known, key, "what is used is what was sent");
                    self.used.push((at, index.0));
                }
                KeyOutput::Event(event) => self.events.push(event),
                KeyOutput::WaitUntil(next) if next <= end.instant => {
                    assert!(next > self.now.instant);
                    self.now = self.now.plus(next - self.now.instant);
                }
                KeyOutput::WaitUntil(_) | KeyOutput::Idle => break,
            }
        }
        self.now = end;
    }

    fn sent_at(&self, from: u64) -> Vec<Sent> {
        self.sent.iter().filter(|(at, ..)| *at >= from).cloned().collect()
    }
}

fn to(devices: &[(&str, &str)]) -> Vec<String> {
    devices.iter().map(|(_, device)| (*device).to_owned()).collect()
}

#[test]
fn g67_the_first_update_makes_the_first_key() {
    let mut keys = Keys::new(js());
    keys.run(1000);
    assert_eq!(keys.used, []);
    keys.members(&[]);
    assert_eq!((keys.used.clone(), keys.sent.len()), (vec![(1000, 0)], 0));
}

#[test]
fn g68_everybody_gets_the_first_key_in_one_sending() {
    let mut keys = Keys::new(js());
    keys.members(&[(BOB, 1000), (BOB2, 1000), (CARL, 1000)]);
    assert_eq!(keys.sent, [(0, 0, to(&[BOB, BOB2, CARL]))]);
    assert_eq!(keys.used, [(0, 0)]);
    assert_eq!(keys.events, [KeyEvent::Delivered { index: KeyIndex(0) }]);
}

#[test]
fn g69_who_rejoins_is_sent_the_same_key_again() {
    let mut keys = Keys::new(js());
    keys.members(&[(BOB, 1000), (CARL, 1000)]);
    keys.members(&[(BOB, 2000), (CARL, 1000)]);
    assert_eq!(keys.sent[1..], [(0, 0, to(&[BOB]))]);
}

#[test]
fn g70_g71_the_grace_period_decides_between_sharing_and_rotating() {
    let config = || RolloutConfig { grace: ms(15_000), ..js() };
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
fn g72_a_joiner_during_a_rollout_waits_for_the_next() {
    let config = RolloutConfig { grace: ms(3000), use_key_delay: ms(5000), ..js() };
    let mut keys = Keys::new(config);
    keys.members(&[(BOB, 1)]);
    keys.run(300_000);
    keys.members(&[(BOB, 1), (CARL, 2)]);
    keys.run(301_000);
    keys.members(&[(BOB, 1), (CARL, 2), (DAVID, 3)]);
    keys.run(400_000);
    let of = |who: (&str, &str)| -> Vec<u8> {
        keys.sent.iter().filter(|(_, _, to)| to.contains(&who.1.to_owned())).map(|(_, i, _)| *i).collect()
    };
    assert_eq!((of(CARL), of(DAVID)), (vec![1, 2], vec![2]));
    assert_eq!(keys.used, [(0, 0), (305_000, 1), (310_000, 2)]);
}

#[test]
fn g73_a_burst_of_joiners_shares_one_key() {
    let mut keys = Keys::new(js());
    let mut members = Vec::new();
    keys.members(&members);
    for (n, device) in ["A", "B", "C", "D", "E"].into_iter().enumerate() {
        keys.run(n as u64 * 1000);
        members.push((("@x:example.org", device), 1));
        keys.members(&members);
    }
    keys.run(60_000);
    assert_eq!(keys.sent.len(), 5);
    assert!(keys.sent.iter().all(|(_, index, to)| *index == 0 && to.len() == 1));
}

#[test]
fn g74_an_update_without_changes_sends_nothing() {
    let mut keys = Keys::new(js());
    keys.members(&[(BOB, 1)]);
    keys.run(20_000);
    keys.members(&[(BOB, 1)]);
    keys.run(40_000);
    assert_eq!(keys.sent.len(), 1);
}

#[test]
fn g75_who_leaves_makes_us_rotate() {
    let mut keys = Keys::new(js());
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
fn g76_what_happens_during_a_rollout_is_one_more_rollout() {
    let mut keys = Keys::new(js());
    keys.members(&[(BOB, 1), (BOB2, 1), (CARL, 1)]);
    keys.run(3000);
    keys.members(&[(BOB, 1), (BOB2, 1)]);
    keys.run(3200);
    keys.members(&[(BOB, 1)]);
    keys.run(3400);
    keys.members(&[(BOB3, 2)]);
    keys.run(60_000);
    assert_eq!(keys.sent[2..], [(4000, 2, to(&[BOB3]))]);
    assert_eq!(keys.used, [(0, 0), (4000, 1), (5000, 2)]);
}

#[test]
fn g79_after_index_255_comes_0() {
    let mut keys = Keys::new(RolloutConfig { first_index: 255, ..js() });
    keys.members(&[(BOB, 1), (CARL, 1)]);
    keys.members(&[(BOB, 1)]);
    // The key changes with the index: the harness only accepts one key per index.
    keys.run(60_000);
    assert_eq!(keys.used, [(0, 255), (1000, 0)]);
}

#[test]
fn g80_a_failed_sending_is_retried_and_holds_up_the_switch() {
    let mut keys = Keys::new(js());
    keys.members(&[(BOB, 1), (CARL, 1)]);
    keys.run(3000);
    keys.outcome = |n, _| if n == 2 { Outcome::Failed(None) } else { Outcome::Reached };
    keys.members(&[(BOB, 1)]);
    keys.run(60_000);
    assert_eq!(keys.sent[1..], [(3000, 1, to(&[BOB])), (4000, 1, to(&[BOB]))]);
    assert_eq!(keys.used, [(0, 0), (5000, 1)]);
    let failed = KeyEvent::DeliveryFailed { devices: vec![recipient(BOB)] };
    assert_eq!(keys.events[1..], [failed, KeyEvent::Delivered { index: KeyIndex(1) }]);
}

#[test]
fn g80_the_deadline_ends_the_wait_and_the_retries_go_on() {
    let mut keys = Keys::new(js());
    keys.members(&[(BOB, 1), (BOB2, 1), (CARL, 1)]);
    keys.run(3000);
    keys.outcome = |_, to| Outcome::Missed(to.iter().filter(|r| **r == recipient(BOB2)).cloned().collect());
    keys.members(&[(BOB, 1), (BOB2, 1)]);
    keys.run(40_000);
    // Waits of 1, 2, 4, 8 and 16 s, to the one device that was missed.
    assert_eq!(
        keys.sent[1..].iter().map(|(at, _, to)| (*at, to.len())).collect::<Vec<_>>(),
        [(3000, 2), (4000, 1), (6000, 1), (10_000, 1), (18_000, 1), (34_000, 1)]
    );
    assert_eq!(keys.used, [(0, 0), (14_000, 1)]);
    assert_eq!(keys.events.iter().filter(|e| matches!(e, KeyEvent::DeliveryFailed { .. })).count(), 1);
}

#[test]
fn the_homeservers_patience_is_respected() {
    let mut keys = Keys::new(js());
    keys.outcome = |n, _| if n == 1 { Outcome::Failed(Some(ms(7000))) } else { Outcome::Reached };
    keys.members(&[(BOB, 1)]);
    keys.run(2000);
    keys.members(&[(BOB, 1), (CARL, 1)]);
    keys.run(8000);
    assert_eq!(keys.sent[1..], [(7000, 0, to(&[BOB, CARL]))]);
}

#[test]
fn a_sending_without_outcome_is_a_failed_one() {
    let mut keys = Keys::new(js());
    keys.outcome = |n, _| if n == 1 { Outcome::Silence } else { Outcome::Reached };
    keys.members(&[(BOB, 1)]);
    keys.run(60_000);
    assert_eq!(keys.sent[1..], [(31_000, 0, to(&[BOB]))]);
}

#[test]
fn nobody_who_left_is_sent_a_key() {
    let mut keys = Keys::new(js());
    keys.outcome = |_, to| Outcome::Missed(to.to_vec());
    keys.members(&[(BOB, 1), (CARL, 1)]);
    keys.run(500);
    keys.members(&[(BOB, 1)]);
    keys.run(60_000);
    // Carl was not reached as far as we know, but a message may have got through: the key changes.
    assert!(keys.sent[1..].iter().all(|(_, index, to)| *index == 1 && *to == [BOB.1]));
}

#[test]
fn a_stuck_sending_of_the_old_key_does_not_hold_up_the_new_one() {
    let mut keys = Keys::new(js());
    keys.outcome = |n, _| if n == 1 { Outcome::Silence } else { Outcome::Reached };
    keys.members(&[(BOB, 1), (CARL, 1)]);
    keys.run(500);
    keys.members(&[(BOB, 1)]);
    keys.run(5000);
    assert_eq!(keys.sent[1..], [(500, 1, to(&[BOB]))]);
    assert_eq!(keys.used, [(0, 0), (1500, 1)]);
}

#[test]
fn g81_a_large_call_keeps_its_key() {
    let limit = || RolloutConfig { participant_limit: Some(3), ..js() };
    let mut keys = Keys::new(limit());
    keys.members(&[(BOB, 1)]);
    keys.run(20_000);
    keys.members(&[(BOB, 1), (CARL, 1)]);
    assert_eq!(keys.events.last(), Some(&KeyEvent::Delivered { index: KeyIndex(0) }));
    assert!(keys.events.contains(&KeyEvent::RotationSuppressed(true)));
    assert_eq!(keys.sent[1..], [(20_000, 0, to(&[CARL]))]);
    keys.run(30_000);
    keys.members(&[(CARL, 1)]);
    keys.run(60_000);
    assert!(keys.events.contains(&KeyEvent::RotationSuppressed(false)));
    assert_eq!(keys.sent_at(30_000), [(30_000, 1, to(&[CARL]))]);

    let mut large = Keys::new(limit());
    large.members(&[(BOB, 1), (BOB2, 1), (CARL, 1), (DAVID, 1)]);
    large.run(20_000);
    large.members(&[(BOB, 1), (BOB2, 1), (CARL, 1)]);
    large.run(7_300_000);
    assert_eq!(large.sent.len(), 1);
    // Whoever left while the call was large is locked out as soon as it is not.
    large.members(&[(BOB, 1)]);
    assert_eq!(large.sent_at(7_300_000), [(7_300_000, 1, to(&[BOB]))]);
}

#[test]
fn a_key_does_not_get_older_than_an_hour() {
    let mut keys = Keys::new(js());
    keys.members(&[(BOB, 1)]);
    keys.run(2 * 3_600_000 + 5000);
    assert_eq!(keys.used, [(0, 0), (3_601_000, 1), (7_201_000, 2)]);
    keys.rollout.handle(keys.now, KeyInput::Rotate);
    keys.run(2 * 3_600_000 + 10_000);
    assert_eq!(keys.used.last(), Some(&(7_206_000, 3)), "and changes when it is told to");
}

#[test]
fn keys_have_the_configured_length_and_differ() {
    for (config, length) in [(16, 16), (32, 32), (5, 32)] {
        let mut keys = Keys::new(RolloutConfig { key_bytes: config, ..js() });
        keys.members(&[(BOB, 1), (CARL, 1)]);
        keys.members(&[(BOB, 1)]);
        assert!(keys.material.values().all(|key| key.as_bytes().len() == length));
        assert_ne!(keys.material[&0], keys.material[&1]);
    }
}

#[test]
fn debug_shows_no_key() {
    let mut keys = Keys::new(js());
    keys.members(&[(BOB, 1)]);
    let bytes = format!("{:?}", keys.material[&0].as_bytes());
    let printed = format!("{:?}", keys.rollout);
    assert!(printed.contains("redacted") && !printed.contains(bytes.trim_matches(['[', ']'])));
    let output = KeyOutput::Use { index: KeyIndex(0), key: keys.material[&0].clone() };
    assert_eq!(format!("{output:?}"), "Use { index: KeyIndex(0), key: MediaKey(redacted) }");
}

#[derive(Clone, Debug)]
enum Turn {
    Members(Vec<(usize, u64)>),
    Answer(u8),
    Pass(u64),
    Rotate,
    Stray(u64),
}

fn any_turn() -> impl Strategy<Value = Turn> {
    prop_oneof![
        4 => prop::collection::vec((0_usize..5, 0_u64..3), 0..5).prop_map(Turn::Members),
        6 => any::<u8>().prop_map(Turn::Answer),
        6 => (0_u64..12_000).prop_map(Turn::Pass),
        1 => (0_u64..100_000_000).prop_map(Turn::Pass),
        1 => Just(Turn::Rotate),
        1 => (0_u64..10).prop_map(Turn::Stray),
    ]
}

proptest! {
    /// Whatever happens: no panic, no spinning, keys go to present members only, no index is taken into use
    /// twice in a row, and in the end every member has the key that is in use.
    #[test]
    fn no_history_breaks_the_rules(turns in prop::collection::vec(any_turn(), 0..80)) {
        let people = [BOB, BOB2, BOB3, CARL, DAVID];
        let mut keys = Keys::new(RolloutConfig::default());
        let mut now = keys.now;
        let mut present: BTreeSet<Recipient> = BTreeSet::new();
        let mut pending: Option<(SendId, u8, Vec<Recipient>)> = None;
        let mut has: BTreeMap<u8, BTreeSet<Recipient>> = BTreeMap::new();
        let mut in_use = None;
        let settle = [Turn::Pass(1), Turn::Answer(0), Turn::Pass(40_000), Turn::Answer(0), Turn::Pass(40_000),
            Turn::Answer(0), Turn::Pass(40_000), Turn::Answer(0), Turn::Pass(40_000), Turn::Answer(0)];
        for turn in turns.into_iter().chain(settle) {
            match turn {
                Turn::Members(members) => {
                    let members: BTreeMap<_, _> = members.into_iter().collect();
                    present = members.keys().map(|who| recipient(people[*who])).collect();
                    let members = members.iter().map(|(who, created)| member(people[*who], *created)).collect();
                    keys.rollout.handle(now, KeyInput::Members(members));
                }
                Turn::Answer(how) => if let Some((id, index, to)) = pending.take() {
                    let input = match how % 4 {
                        0 | 1 => {
                            has.entry(index).or_default().extend(to);
                            KeyInput::Sent { id, undelivered: vec![] }
                        }
                        2 => {
                            has.entry(index).or_default().extend(to[1..].to_vec());
                            KeyInput::Sent { id, undelivered: to[..1].to_vec() }
                        }
                        _ => KeyInput::SendFailed { id, retry_after: Some(ms(u64::from(how) * 10)) },
                    };
                    keys.rollout.handle(now, input);
                },
                Turn::Pass(millis) => now = now.plus(ms(millis)),
                Turn::Rotate => keys.rollout.handle(now, KeyInput::Rotate),
                Turn::Stray(id) => if pending.as_ref().is_none_or(|(pending, ..)| pending.0 != id) {
                    keys.rollout.handle(now, KeyInput::Sent { id: SendId(id), undelivered: vec![] });
                },
            }
            for spins in 0.. {
                prop_assert!(spins < 20, "the machine spins");
                match keys.rollout.poll(now) {
                    KeyOutput::Send { id, index, recipients, .. } => {
                        prop_assert!(!recipients.is_empty());
                        prop_assert!(recipients.iter().all(|to| present.contains(to)));
                        pending = Some((id, index.0, recipients));
                    }
                    KeyOutput::Use { index, .. } => {
                        prop_assert_ne!(in_use, Some(index.0));
                        in_use = Some(index.0);
                    }
                    KeyOutput::Event(_) => {}
                    KeyOutput::WaitUntil(at) => {
                        prop_assert!(at > now.instant);
                        break;
                    }
                    KeyOutput::Idle => break,
                }
            }
        }
        if let Some(in_use) = in_use {
            prop_assert_eq!(keys.rollout.index(), Some(KeyIndex(in_use)), "nothing is left rolling");
            let has = has.remove(&in_use).unwrap_or_default();
            prop_assert!(present.is_subset(&has), "{:?} lack key {}", present.difference(&has), in_use);
        } else {
            prop_assert!(present.is_empty());
        }
    }
}
