//! Many machines against each other on virtual time, over a network with delays, loss, slow and unreachable devices.

use std::{
    collections::{BTreeMap, HashMap},
    time::Duration,
};

use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use ruma_common::room_id;

use super::*;
use crate::{machine::testing::state_member, matrix::OlmSender, time::UnixMillis};

/// What the network does to one message.
#[derive(Clone, Copy, Debug, Default)]
struct Network {
    /// Percentage of messages that are reported as delivered and get lost.
    lost: u32,
    /// Percentage of messages that fail, half of which arrive all the same.
    failed: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Line {
    Good,
    /// Every message takes 8 s.
    Slow,
    /// Nothing can be sent to it.
    Unreachable,
    /// It is not cross-signed: the others neither send it keys nor accept its keys.
    Untrusted,
}

struct Node {
    device: Device,
    line: Line,
    keys: MediaKeys,
    /// Its membership, in the call or not.
    member: Member,
    member_key: MemberKey,
    is_present: bool,
    left_at: Option<Instant>,
    /// When it is to be polled next.
    wake: Option<Instant>,
    in_use: Option<(KeyIndex, MediaKey)>,
    /// By sender and index.
    rings: HashMap<(MemberKey, KeyIndex), MediaKey>,
    /// Key material of every message that reached it, whatever became of it.
    received: Vec<MediaKey>,
    renewals: usize,
    events: Vec<KeyEvent>,
}

#[derive(Debug)]
enum Event {
    Wake,
    Roster,
    Outcome(SendId, Option<(Device, Delivery)>),
    Message(Box<ToDeviceEvent>),
    /// Media of all members flows and is reported.
    Media,
}

/// A call.
struct World {
    now: Now,
    rng: StdRng,
    network: Network,
    nodes: Vec<Node>,
    queue: BTreeMap<(Instant, u64), (usize, Event)>,
    sequence: u64,
    messages: usize,
    joined: BTreeSet<OwnedUserId>,
    /// Nodes by user.
    places: HashMap<OwnedUserId, usize>,
    /// Whether media flows and is reported.
    media: bool,
    /// Messages that joins make necessary: one for each ordered pair of members.
    pairs: usize,
    /// Messages that changes of keys make necessary: one for each other member.
    rotations: usize,
}

/// Longest time until a node learns of a change of the members.
const SYNC: u64 = 500;

impl World {
    #[expect(clippy::disallowed_methods, reason = "an arbitrary origin of virtual time")]
    fn new(size: usize, seed: u64, network: Network, line: impl Fn(usize) -> Line) -> Self {
        let now = Now { instant: Instant::now(), unix: UnixMillis(1_800_000_000_000) };
        let nodes = (0..size).map(|n| {
            let member = state_member(&format!("@user{n:03}:example.org"), "D", 0);
            let device = member.device().unwrap();
            let rng = Box::new(StdRng::seed_from_u64(seed * 1000 + n as u64));
            let room = room_id!("!room:example.org").to_owned();
            let config = MediaKeysConfig::default();
            Node {
                keys: MediaKeys::new(config, room, Slot::room_call(), device.clone(), rng),
                device,
                line: line(n),
                member_key: member.key(),
                member,
                is_present: false,
                left_at: None,
                wake: None,
                in_use: None,
                rings: HashMap::new(),
                received: Vec::new(),
                renewals: 0,
                events: Vec::new(),
            }
        });
        let nodes: Vec<_> = nodes.collect();
        Self {
            now,
            rng: StdRng::seed_from_u64(seed),
            network,
            places: nodes.iter().enumerate().map(|(n, node)| (node.device.user_id.clone(), n)).collect(),
            media: true,
            joined: nodes.iter().map(|node| node.device.user_id.clone()).collect(),
            nodes,
            queue: BTreeMap::new(),
            sequence: 0,
            messages: 0,
            pairs: 0,
            rotations: 0,
        }
    }

    fn schedule(&mut self, after: Duration, node: usize, event: Event) {
        self.sequence += 1;
        self.queue.insert((self.now.instant + after, self.sequence), (node, event));
    }

    fn millis(&mut self, range: std::ops::Range<u64>) -> Duration {
        Duration::from_millis(self.rng.random_range(range))
    }

    fn present(&self) -> Vec<usize> {
        (0..self.nodes.len()).filter(|n| self.nodes[*n].is_present).collect()
    }

    fn join(&mut self, n: usize) {
        if self.nodes[n].is_present {
            // A rejoin: the others send their keys again.
            self.pairs += self.present().len() - 1;
        } else {
            self.pairs += 2 * self.present().len();
            let member_id = self.nodes[n].member.member_id.clone();
            self.input(n, KeyInput::Join { member_id });
            if self.media {
                self.schedule(Duration::ZERO, n, Event::Media);
            }
        }
        self.nodes[n].is_present = true;
        self.nodes[n].member.created = self.now.unix;
        self.announce(n);
    }

    fn leave(&mut self, n: usize) {
        self.nodes[n].is_present = false;
        self.nodes[n].left_at = Some(self.now.instant);
        self.nodes[n].in_use = None;
        self.input(n, KeyInput::Leave);
        self.announce(n);
    }

    /// Tells everybody, and the node itself at once.
    fn announce(&mut self, changed: usize) {
        for n in self.present() {
            let after = if n == changed { Duration::ZERO } else { self.millis(20..SYNC) };
            self.schedule(after, n, Event::Roster);
        }
    }

    fn run(&mut self, duration: Duration) {
        let end = self.now.instant + duration;
        while let Some(entry) = self.queue.first_entry().filter(|entry| entry.key().0 <= end) {
            let at = entry.key().0;
            let (n, event) = entry.remove();
            self.now = self.now.plus(at.saturating_duration_since(self.now.instant));
            self.happen(n, event);
        }
        self.now = self.now.plus(end.saturating_duration_since(self.now.instant));
    }

    fn happen(&mut self, n: usize, event: Event) {
        match event {
            Event::Wake => {
                if self.nodes[n].wake.is_some_and(|at| at <= self.now.instant) {
                    self.nodes[n].wake = None;
                    self.drain(n);
                }
            }
            Event::Roster => {
                if self.nodes[n].is_present {
                    let present = self.nodes.iter().filter(|node| node.is_present);
                    let members: Vec<_> = present.map(|node| node.member.clone()).collect();
                    let joined = std::mem::take(&mut self.joined);
                    self.input(n, KeyInput::Members { members: &members, joined: &joined });
                    self.joined = joined;
                }
            }
            Event::Outcome(id, Some((device, result))) => {
                self.input(n, KeyInput::Delivered { id, device, result })
            }
            Event::Outcome(id, None) => self.input(n, KeyInput::Finished { id }),
            Event::Message(event) => {
                self.nodes[n].received.push(wire::parse(&event.content).unwrap().key);
                self.input(n, KeyInput::ToDevice(&event));
            }
            Event::Media => {
                if !self.nodes[n].is_present {
                    return;
                }
                for other in self.present() {
                    if other != n {
                        let heard = self.can_decrypt(n, other).then_some(self.now.instant);
                        let member = self.nodes[other].member_key.clone();
                        let now = self.now;
                        let keys = &mut self.nodes[n].keys;
                        keys.handle(
                            now,
                            KeyInput::Media { member, publishing: true, last_authenticated: heard },
                        );
                    }
                }
                self.drain(n);
                self.schedule(Duration::from_secs(2), n, Event::Media);
            }
        }
    }

    fn input(&mut self, n: usize, input: KeyInput<'_>) {
        self.nodes[n].keys.handle(self.now, input);
        self.drain(n);
    }

    fn drain(&mut self, n: usize) {
        loop {
            match self.nodes[n].keys.poll(self.now) {
                KeyOutput::Send { id, batch } => self.send(n, id, &batch),
                KeyOutput::Use { index, key } => {
                    if self.nodes[n].in_use.replace((index, key)).is_some() {
                        self.rotations += self.present().len() - 1;
                    }
                }
                KeyOutput::Install { member, index, key } => {
                    self.nodes[n].rings.insert((member, index), key);
                }
                KeyOutput::Forget { member } => self.nodes[n].rings.retain(|(known, _), _| *known != member),
                KeyOutput::RenewMembership => {
                    self.nodes[n].renewals += 1;
                    self.nodes[n].member.created = self.now.unix;
                    self.announce(n);
                }
                KeyOutput::Event(event) => self.nodes[n].events.push(event),
                KeyOutput::WaitUntil(at) => {
                    assert!(at > self.now.instant, "a wait ends in the future");
                    if self.nodes[n].wake.is_none_or(|wake| at < wake) {
                        self.nodes[n].wake = Some(at);
                        self.schedule(at - self.now.instant, n, Event::Wake);
                    }
                    return;
                }
                KeyOutput::Idle => return,
            }
        }
    }

    fn send(&mut self, from: usize, id: SendId, batch: &ToDeviceBatch) {
        for device in &batch.recipients {
            self.messages += 1;
            let to = self.places[&device.user_id];
            if let Some(left_at) = self.nodes[to].left_at.filter(|_| !self.nodes[to].is_present) {
                let gone = self.now.instant - left_at;
                assert!(gone <= Duration::from_millis(SYNC), "a leaver gets a key {gone:?} after leaving");
            }
            let latency = match self.nodes[to].line {
                Line::Good => self.millis(20..400),
                Line::Slow => Duration::from_secs(8),
                line => {
                    let failure = match line {
                        Line::Untrusted => DeliveryFailure::NotCrossSigned,
                        _ => DeliveryFailure::NoSession("no one-time key".to_owned()),
                    };
                    let outcome = Event::Outcome(id, Some((device.clone(), Err(failure))));
                    self.schedule(Duration::ZERO, from, outcome);
                    continue;
                }
            };
            let dice = self.rng.random_range(0..100);
            let failed = dice < self.network.failed;
            let arrives =
                if failed { dice % 2 == 0 } else { dice >= self.network.failed + self.network.lost };
            let result = if failed { Err(DeliveryFailure::Network("reset".to_owned())) } else { Ok(()) };
            self.schedule(latency, from, Event::Outcome(id, Some((device.clone(), result))));
            if arrives {
                let Node { device: sender, line, .. } = &self.nodes[from];
                let cross_signed = *line != Line::Untrusted;
                let event = ToDeviceEvent {
                    event_type: batch.event_type.clone(),
                    content: batch.content.clone(),
                    sender: sender.user_id.clone(),
                    olm: Some(OlmSender { device_id: Some(sender.device_id.clone()), cross_signed }),
                };
                let sync = self.millis(10..200);
                self.schedule(latency + sync, to, Event::Message(Box::new(event)));
            }
        }
    }

    /// Whether `receiver` has the key in use of `sender`.
    fn can_decrypt(&self, receiver: usize, sender: usize) -> bool {
        let Some((index, key)) = &self.nodes[sender].in_use else { return false };
        self.nodes[receiver].rings.get(&(self.nodes[sender].member_key.clone(), *index)) == Some(key)
    }

    /// Ordered pairs of present members that cannot decrypt.
    fn broken(&self) -> Vec<(usize, usize)> {
        let present = self.present();
        let pairs =
            present.iter().flat_map(|receiver| present.iter().map(move |sender| (*receiver, *sender)));
        pairs
            .filter(|(receiver, sender)| {
                let reachable = self.nodes[*receiver].line != Line::Unreachable;
                receiver != sender && reachable && !self.can_decrypt(*receiver, *sender)
            })
            .collect()
    }

    fn assert_whole(&self) {
        assert_eq!(self.broken(), [], "every pair can decrypt");
        for gone in self.nodes.iter().filter(|node| !node.is_present) {
            for node in &self.nodes {
                if let Some((_, key)) = &node.in_use {
                    assert!(!gone.received.contains(key), "a leaver has a key in use");
                }
            }
        }
    }

    /// Prints the cost, and returns it relative to the minimum.
    fn cost(&self, name: &str) -> f64 {
        let minimum = self.pairs + self.rotations;
        let ratio = self.messages as f64 / minimum as f64;
        println!(
            "{name}: {} messages, {ratio:.2} x the minimum ({} for ordered pairs, {} for new keys), {} renewals",
            self.messages,
            self.pairs,
            self.rotations,
            self.nodes.iter().map(|node| node.renewals).sum::<usize>(),
        );
        ratio
    }
}

/// 200 members that join within a minute cost at most 1.2 × the minimum, and nobody waits for anybody.
#[test]
fn two_hundred_joins_in_a_minute_stay_within_the_budget() {
    let mut world = World::new(200, 1, Network::default(), |_| Line::Good);
    world.media = false;
    for n in 0..200 {
        world.join(n);
        world.run(Duration::from_millis(300));
    }
    world.run(Duration::from_secs(10));
    assert_eq!((world.pairs, world.rotations), (200 * 199, 0));
    assert!(world.cost("200 joins in 60 s") <= 1.2);
    world.assert_whole();
}

/// The same with the rhythm that is worst for the rule: a key is replaced in calls as large as its age allows.
#[test]
fn joins_in_bursts_stay_within_the_budget() {
    let mut world = World::new(120, 2, Network::default(), |_| Line::Good);
    for n in 0..50 {
        world.join(n);
    }
    world.run(Duration::from_secs(52));
    for n in 50..120 {
        world.join(n);
        world.run(Duration::from_millis(100));
    }
    world.run(Duration::from_secs(10));
    assert!(world.rotations > 0);
    world.rotations = 0; // joins alone make no new key necessary
    assert!(world.cost("50 joins at once, 70 a minute later") <= 1.2);
    world.assert_whole();
}

/// Loss, failures, slow and unreachable devices, members that come, go and come back: in the end every pair can
/// decrypt, and nobody who left got a later key.
#[test]
fn churn_over_a_bad_network_ends_well() {
    for seed in 1..=2 {
        let line = |n| match n % 10 {
            3 => Line::Slow,
            7 if n == 7 => Line::Unreachable,
            _ => Line::Good,
        };
        let mut world = World::new(50, seed, Network { lost: 2, failed: 5 }, line);
        for n in 0..40 {
            world.join(n);
            world.run(Duration::from_millis(200));
        }
        for _ in 0..60 {
            let n = world.rng.random_range(0..50);
            if !world.nodes[n].is_present || world.rng.random_range(0..4) == 0 {
                world.join(n); // or join again, without having left
            } else {
                world.leave(n);
            }
            let pause = world.millis(0..3000);
            world.run(pause);
        }
        world.run(Duration::from_secs(300));
        world.assert_whole();
        assert!(world.cost("50 members, churn") <= 1.2);
    }
}

/// A slow device and an unreachable one do not hold up the others.
#[test]
fn bad_devices_delay_nobody() {
    let line = |n: usize| [Line::Slow, Line::Unreachable, Line::Good][n.min(2)];
    let mut world = World::new(8, 5, Network::default(), line);
    (0..7).for_each(|n| world.join(n));
    world.run(Duration::from_secs(30));
    // They were found out by now: a leave and a join take effect at the usual pace.
    world.leave(6);
    world.run(Duration::from_secs(3));
    world.assert_leaver_locked_out(6);
    world.run(Duration::from_secs(60));
    world.join(7);
    world.run(Duration::from_secs(3));
    assert!((2..6).all(|n| world.can_decrypt(7, n) && world.can_decrypt(n, 7)));
}

impl World {
    fn assert_leaver_locked_out(&self, leaver: usize) {
        for node in self.nodes.iter().filter(|node| node.is_present) {
            let (_, key) = node.in_use.as_ref().unwrap();
            assert!(
                !self.nodes[leaver].received.contains(key),
                "{} still uses the leaver's key",
                node.device
            );
        }
    }
}

/// A key that was lost although it was reported as delivered is healed without renewing a membership.
#[test]
fn lost_keys_are_healed_between_two_of_our_kind() {
    let mut world = World::new(2, 6, Network { lost: 100, failed: 0 }, |_| Line::Good);
    world.join(0);
    world.join(1);
    world.run(Duration::from_secs(3));
    assert_eq!(world.broken().len(), 2);
    world.network = Network::default();
    world.run(Duration::from_secs(9));
    assert_eq!(world.broken(), []);
    // Lost later on, one way only.
    world.network.lost = 100;
    world.input(0, KeyInput::Rotate);
    world.run(Duration::from_secs(3));
    assert_eq!(world.broken(), [(1, 0)]);
    world.network.lost = 0;
    let before = world.messages;
    world.run(Duration::from_secs(12));
    assert_eq!(world.broken(), []);
    assert!(world.messages - before <= 3, "a question and an answer");
    assert_eq!(world.nodes.iter().map(|node| node.renewals).sum::<usize>(), 0);
    world.run(Duration::from_secs(1000));
    assert!(world.messages - before <= 3, "and then it is quiet");
}

/// A member of another kind never answers: our membership is renewed, sparingly.
#[test]
fn member_that_does_not_answer_gets_a_renewal() {
    let mut world = World::new(2, 7, Network { lost: 100, failed: 0 }, |_| Line::Good);
    world.join(0);
    world.join(1);
    world.run(Duration::from_secs(19));
    assert_eq!(world.nodes[0].renewals, 0);
    world.run(Duration::from_secs(3 * 3600));
    assert!((5..12).contains(&world.nodes[0].renewals), "{}", world.nodes[0].renewals);
    assert!(world.messages < 100);
}

/// Policy is the reason: nothing is asked for, and the application learns of it once.
#[test]
fn member_refused_by_policy_is_not_healed() {
    let line = |n| if n == 1 { Line::Untrusted } else { Line::Good };
    let mut world = World::new(2, 10, Network::default(), line);
    world.join(0);
    world.join(1);
    world.run(Duration::from_secs(200));
    let node = &world.nodes[0];
    assert_eq!(node.renewals, 0);
    assert!(node.rings.is_empty() && world.nodes[1].received.is_empty());
    let untrusted = &world.nodes[1].device;
    let withheld = node
        .events
        .iter()
        .filter(|event| matches!(event, KeyEvent::Refused { device, .. } if device == untrusted));
    assert_eq!(withheld.count(), 1);
    let is_rejected = |event: &&KeyEvent| {
        let KeyEvent::Rejected { device_id, reason: KeyRejected::NotCrossSigned, .. } = event else {
            return false;
        };
        device_id.as_ref() == Some(&untrusted.device_id)
    };
    assert!((1..=4).contains(&node.events.iter().filter(is_rejected).count()), "once in a while");

    // Its owner verifies it.
    world.nodes[1].line = Line::Good;
    let user_id = world.nodes[1].device.user_id.clone();
    world.network.lost = 100;
    world.input(0, KeyInput::TrustChanged { user_id });
    world.run(Duration::from_secs(15));
    assert_eq!(world.nodes[0].renewals, 0, "the symptom counts from the change of trust");
    world.network.lost = 0;
    world.run(Duration::from_secs(60));
    world.assert_whole();
}

#[test]
fn shared_password_distributes_nothing() {
    let password = Zeroizing::new("correct horse battery staple".to_owned());
    let source = KeySource::SharedPassword(password);
    assert_eq!(format!("{source:?}"), "SharedPassword(redacted)");
    let mut world = World::new(2, 8, Network::default(), |_| Line::Good);
    for node in &mut world.nodes {
        let config = MediaKeysConfig { source: source.clone(), ..MediaKeysConfig::default() };
        let rng = Box::new(StdRng::seed_from_u64(1));
        let room = room_id!("!room:example.org").to_owned();
        node.keys = MediaKeys::new(config, room, Slot::room_call(), node.device.clone(), rng);
    }
    world.join(0);
    world.join(1);
    world.run(Duration::from_secs(100));
    assert_eq!(world.messages, 0);
    assert!(world.nodes.iter().all(|node| node.in_use.is_none() && node.rings.is_empty()));
}

#[test]
fn leaving_wipes_all_keys() {
    let mut world = World::new(3, 9, Network::default(), |_| Line::Good);
    (0..3).for_each(|n| world.join(n));
    world.run(Duration::from_secs(5));
    world.assert_whole();
    let (index, key) = world.nodes[0].in_use.clone().unwrap();
    assert_eq!(world.nodes[0].keys.installed().len(), 2);
    world.leave(0);
    assert!(world.nodes[0].rings.is_empty() && world.nodes[0].keys.installed().is_empty());
    assert_eq!(world.nodes[0].keys.index(), None);
    world.join(0);
    world.run(Duration::from_secs(30));
    world.assert_whole();
    let (new_index, new_key) = world.nodes[0].in_use.clone().unwrap();
    assert!(new_index != index && new_key != key);
}
