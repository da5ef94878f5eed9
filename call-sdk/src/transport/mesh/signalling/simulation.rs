//! Whole meshes on virtual time: machines, a to-device network that loses and reorders, and engines that fail on every
//! command that a WebRTC engine would reject.
#![allow(clippy::disallowed_methods, reason = "a simulation needs some point in time to start from")]

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use serde_json::Value;

use super::{
    super::{Candidate, MeshPeer, Negotiate, Negotiated, Sdp, Streams},
    MessageId, Signalling, SignallingInput, SignallingOutput, Us,
};
use crate::{
    machine::testing,
    matrix::{Delivery, DeliveryFailure},
    member::{Device, MemberId, MemberKey, Slot},
    transport::{ConnectionId, MeshSession},
};

/// How bad the to-device network is, in percent.
#[derive(Clone, Copy, Debug, Default)]
struct Weather {
    lost: u32,
    reordered: u32,
    doubled: u32,
    /// The homeserver reports a failure; the message may have arrived all the same.
    refused: u32,
    /// Extra delay of reordered messages, in milliseconds.
    late_ms: u64,
    /// A connection cannot be opened, or the engine fails at a description.
    broken: u32,
}

const FOUL: Weather = Weather { lost: 20, reordered: 20, doubled: 10, refused: 5, late_ms: 4000, broken: 0 };

/// A process: a member in one incarnation.
type Process = (usize, u32);

#[derive(Debug)]
enum Happening {
    Wake(Process),
    Message {
        from: Device,
        to: usize,
        event_type: &'static str,
        content: Value,
    },
    Sent {
        to: Process,
        id: MessageId,
        result: Delivery,
    },
    Opened {
        at: Process,
        connection: ConnectionId,
    },
    Negotiated {
        at: Process,
        connection: ConnectionId,
        event: Negotiated,
    },
    /// The path is up if both sides still agree on this.
    Up {
        at: Process,
        connection: ConnectionId,
        agreed: Agreed,
    },
    /// The member sees the present memberships.
    Look(Process),
}

/// Offer and answer that a connection was negotiated with.
type Agreed = (u64, u64);

/// A connection that behaves like a WebRTC engine, or worse.
#[derive(Debug)]
struct Engine {
    to: MemberKey,
    opened: bool,
    /// Our offer without an answer.
    pending: Option<u64>,
    /// The offer that is being answered.
    answering: Option<u64>,
    agreed: Option<Agreed>,
    /// Descriptions of the other side whose candidates have arrived.
    reached: BTreeSet<u64>,
    /// The negotiation that the present path belongs to.
    path: Option<Agreed>,
    sections: usize,
    tracks: usize,
    remote_tracks: usize,
}

#[derive(Debug)]
struct Node {
    device: Device,
    incarnation: u32,
    /// Whether the process runs; its membership may outlive it.
    running: bool,
    /// Whether others see its membership.
    member: bool,
    signalling: Signalling,
    engines: BTreeMap<ConnectionId, Engine>,
    next_wake: Option<Instant>,
    sent: u64,
    connected: u64,
    failed: u64,
}

#[derive(Debug)]
struct World {
    now: Instant,
    rng: StdRng,
    weather: Weather,
    nodes: Vec<Node>,
    agenda: BTreeMap<(Instant, u64), Happening>,
    number: u64,
    /// Commands that no engine would take.
    violations: Vec<String>,
    invites: u64,
    view_delay_ms: u64,
    /// Least and greatest delay of a message that is not reordered.
    delay_ms: (u64, u64),
}

fn device(number: usize) -> Device {
    testing::device(&format!("@m{number}:example.org"), "D")
}

fn session(process: Process) -> MeshSession {
    MeshSession(format!("session-{}-{}", process.0, process.1))
}

fn key(number: usize) -> MemberKey {
    let device = device(number);
    let member_id = MemberId(format!("m{number}"));
    MemberKey { user_id: device.user_id, device_id: Some(device.device_id), member_id }
}

fn peer(process: Process) -> MeshPeer {
    MeshPeer { member: key(process.0), device: device(process.0), session: session(process) }
}

fn machine(process: Process, seed: u64) -> Signalling {
    let us = Us {
        room_id: "!room:example.org".try_into().unwrap(),
        slot: Slot::room_call(),
        device: device(process.0),
        session: session(process),
    };
    Signalling::new(us, ConnectionId::FIRST_MESH_ROUTE, StdRng::seed_from_u64(seed))
}

fn tracks(count: usize) -> Streams {
    (0..count).map(|n| (format!("stream{n}"), Default::default())).collect()
}

impl World {
    fn new(members: usize, seed: u64, weather: Weather) -> Self {
        let start = Instant::now();
        let mut rng = StdRng::seed_from_u64(seed);
        let nodes = (0..members)
            .map(|number| Node {
                device: device(number),
                incarnation: 0,
                running: true,
                member: true,
                signalling: machine((number, 0), rng.random()),
                engines: BTreeMap::new(),
                next_wake: None,
                sent: 0,
                connected: 0,
                failed: 0,
            })
            .collect();
        Self {
            now: start,
            rng,
            weather,
            nodes,
            agenda: BTreeMap::new(),
            number: 0,
            violations: Vec::new(),
            invites: 0,
            view_delay_ms: 2000,
            delay_ms: (20, 300),
        }
    }

    fn plan(&mut self, wait: Duration, happening: Happening) {
        self.number += 1;
        self.agenda.insert((self.now + wait, self.number), happening);
    }

    fn random_ms(&mut self, from: u64, to: u64) -> Duration {
        Duration::from_millis(self.rng.random_range(from..=to))
    }

    fn chance(&mut self, percent: u32) -> bool {
        self.rng.random_ratio(percent, 100)
    }

    fn process(&self, number: usize) -> Process {
        (number, self.nodes[number].incarnation)
    }

    fn runs(&self, process: Process) -> bool {
        let node = &self.nodes[process.0];
        node.running && node.incarnation == process.1
    }

    /// Everybody notices the present memberships sooner or later.
    fn memberships_changed(&mut self) {
        for number in 0..self.nodes.len() {
            let wait = self.random_ms(50, 50 + self.view_delay_ms);
            self.plan(wait, Happening::Look(self.process(number)));
        }
    }

    fn crash(&mut self, number: usize) {
        let node = &mut self.nodes[number];
        node.running = false;
        for (_, engine) in std::mem::take(&mut node.engines) {
            self.path_lost(number, &engine);
        }
    }

    fn come_back(&mut self, number: usize) {
        let node = &mut self.nodes[number];
        (node.incarnation, node.running, node.member) = (node.incarnation + 1, true, true);
        let seed = self.rng.random();
        node.signalling = machine((number, node.incarnation), seed);
        node.next_wake = None;
        self.memberships_changed();
    }

    fn run_for(&mut self, time: Duration) {
        let end = self.now + time;
        while let Some(entry) = self.agenda.first_entry().filter(|entry| entry.key().0 <= end) {
            let ((at, _), happening) = entry.remove_entry();
            self.now = at;
            self.happen(happening);
        }
        self.now = end;
    }

    fn run_until(&mut self, limit: Duration, done: impl Fn(&Self) -> bool) -> Option<Duration> {
        let (from, step) = (self.now, Duration::from_millis(50));
        while self.now < from + limit {
            self.run_for(step);
            if done(self) {
                return Some(self.now - from);
            }
        }
        None
    }

    fn happen(&mut self, happening: Happening) {
        let now = self.now;
        let number = match happening {
            Happening::Wake(at) => {
                if !self.runs(at) {
                    return;
                }
                self.nodes[at.0].next_wake = None;
                at.0
            }
            Happening::Message { from, to, event_type, content } => {
                if !self.nodes[to].running {
                    return;
                }
                let input = SignallingInput::Message { from: &from, event_type, content: &content };
                self.nodes[to].signalling.handle(now, input);
                to
            }
            Happening::Sent { to, id, result } => {
                if !self.runs(to) {
                    return;
                }
                self.nodes[to.0].signalling.handle(now, SignallingInput::Sent { id, result });
                to.0
            }
            Happening::Opened { at, connection } => {
                if !self.runs(at) {
                    return;
                }
                if self.chance(self.weather.broken) {
                    let input = SignallingInput::Opened { connection, result: Err("no port".to_owned()) };
                    self.nodes[at.0].signalling.handle(now, input);
                    return self.drain(at.0);
                }
                // An answer may come after the connection was closed.
                if let Some(engine) = self.nodes[at.0].engines.get_mut(&connection) {
                    engine.opened = true;
                }
                let input = SignallingInput::Opened { connection, result: Ok(()) };
                self.nodes[at.0].signalling.handle(now, input);
                at.0
            }
            Happening::Negotiated { at, connection, mut event } => {
                if !self.runs(at) {
                    return;
                }
                if let Negotiated::Answer { sdp, .. } = &event
                    && let Some(engine) = self.nodes[at.0].engines.get_mut(&connection)
                {
                    let [answer, offer] = numbers(sdp)[..] else { panic!("{}", sdp.0) };
                    engine.answering = None;
                    engine.agreed = Some((offer, answer));
                }
                if matches!(event, Negotiated::Offer { .. } | Negotiated::Answer { .. })
                    && self.chance(self.weather.broken)
                {
                    event = Negotiated::Failed("a bad day".to_owned());
                }
                self.nodes[at.0].signalling.handle(now, SignallingInput::Negotiated { connection, event });
                at.0
            }
            Happening::Up { at, connection, agreed } => {
                if !self.runs(at) || self.partner(at.0, connection, agreed).is_none() {
                    return;
                }
                let engine = self.nodes[at.0].engines.get_mut(&connection).unwrap();
                engine.path = Some(agreed);
                let input = SignallingInput::Negotiated { connection, event: Negotiated::Up };
                self.nodes[at.0].signalling.handle(now, input);
                at.0
            }
            Happening::Look(at) => {
                if !self.runs(at) {
                    return;
                }
                let peers = (0..self.nodes.len())
                    .filter(|other| *other != at.0 && self.nodes[*other].member)
                    .map(|other| peer(self.process(other)))
                    .collect();
                let input = SignallingInput::Peers { peers, moved: &[], lingering: &[] };
                self.nodes[at.0].signalling.handle(now, input);
                at.0
            }
        };
        self.drain(number);
    }

    fn drain(&mut self, number: usize) {
        for step in 0.. {
            assert!(step < 10_000, "the machine never waits");
            let Some(output) = self.nodes[number].signalling.poll(self.now) else { break };
            self.perform(number, output);
        }
        let wake = self.nodes[number].signalling.wake_at();
        if let Some(wake) = wake {
            assert!(wake > self.now, "the machine asks to be woken at once");
            if self.nodes[number].next_wake.is_none_or(|known| wake < known) {
                self.nodes[number].next_wake = Some(wake);
                self.plan(wake - self.now, Happening::Wake(self.process(number)));
            }
        }
    }

    fn perform(&mut self, number: usize, output: SignallingOutput) {
        let at = self.process(number);
        match output {
            SignallingOutput::Send { id, to, event_type, content } => {
                self.nodes[number].sent += 1;
                if event_type == "m.call.invite" && content["seq"] == 0 {
                    self.invites += 1;
                }
                self.send(at, id, &to, event_type, &content);
            }
            SignallingOutput::Open { connection, member } => {
                assert!(connection.is_mesh());
                assert_eq!(self.nodes[number].signalling.member_of(connection), Some(&member));
                let engine = Engine {
                    to: member,
                    opened: false,
                    pending: None,
                    answering: None,
                    agreed: None,
                    reached: BTreeSet::new(),
                    path: None,
                    sections: 0,
                    tracks: 2,
                    remote_tracks: 0,
                };
                let known = self.nodes[number].engines.insert(connection, engine);
                assert!(known.is_none(), "{connection} was opened twice");
                let wait = self.random_ms(1, 100);
                self.plan(wait, Happening::Opened { at, connection });
            }
            SignallingOutput::Negotiate { connection, command } => self.command(at, connection, command),
            SignallingOutput::Close { connection, .. } => {
                let engine = self.nodes[number].engines.remove(&connection).expect("an open connection");
                self.path_lost(number, &engine);
            }
            SignallingOutput::Connected { .. } => self.nodes[number].connected += 1,
            SignallingOutput::Failed { .. } => self.nodes[number].failed += 1,
        }
    }

    fn send(&mut self, at: Process, id: MessageId, to: &Device, event_type: &'static str, content: &Value) {
        let to = self.nodes.iter().position(|node| node.device == *to).unwrap();
        let from = self.nodes[at.0].device.clone();
        let refused = self.chance(self.weather.refused);
        let copies = 1 + usize::from(self.chance(self.weather.doubled));
        for _ in 0..copies {
            if self.chance(self.weather.lost) || (refused && self.chance(50)) {
                continue;
            }
            let mut wait = self.random_ms(self.delay_ms.0, self.delay_ms.1);
            if self.chance(self.weather.reordered) {
                wait += self.random_ms(0, self.weather.late_ms);
            }
            let (from, content) = (from.clone(), content.clone());
            self.plan(wait, Happening::Message { from, to, event_type, content });
        }
        let result = if refused { Err(DeliveryFailure::TimedOut) } else { Ok(()) };
        let wait = self.random_ms(10, 200);
        self.plan(wait, Happening::Sent { to: at, id, result });
    }

    fn command(&mut self, at: Process, connection: ConnectionId, command: Negotiate) {
        let id = self.rng.random_range(1..u64::MAX);
        let engine = self.nodes[at.0].engines.get_mut(&connection).expect("an open connection");
        let violation = match &command {
            _ if !engine.opened => Some("it is not open"),
            Negotiate::Offer { .. } if engine.pending.is_some() => Some("an offer is pending"),
            Negotiate::Answer { .. } if engine.pending.is_some() => Some("our offer is pending"),
            Negotiate::Answer { .. } if engine.answering.is_some() => Some("another offer is being answered"),
            Negotiate::TakeAnswer { sdp, .. } if engine.pending != numbers(sdp)[1..].first().copied() => {
                Some("no such offer is pending")
            }
            Negotiate::Candidates(_) | Negotiate::Streams(_)
                if engine.agreed.is_none() && engine.answering.is_none() =>
            {
                Some("the other side's description is missing")
            }
            _ => None,
        };
        if let Some(violation) = violation {
            self.violations.push(format!("{command:?}: {violation}"));
            let event = Negotiated::Failed(violation.to_owned());
            self.plan(Duration::from_millis(1), Happening::Negotiated { at, connection, event });
            return;
        }
        let streams = tracks(engine.tracks);
        match command {
            Negotiate::Offer { .. } => {
                engine.pending = Some(id);
                engine.sections = engine.tracks.max(2).max(engine.remote_tracks);
                let sdp = Sdp(format!("offer {id} {}", engine.sections));
                self.describe(at, connection, id, Negotiated::Offer { sdp, streams });
            }
            Negotiate::Answer { sdp, streams: theirs } => {
                let [offer, sections] = numbers(&sdp)[..] else { panic!("{}", sdp.0) };
                engine.answering = Some(offer);
                engine.sections = usize::try_from(sections).unwrap();
                engine.remote_tracks = theirs.len();
                let sdp = Sdp(format!("answer {id} {offer}"));
                self.describe(at, connection, id, Negotiated::Answer { sdp, streams });
            }
            Negotiate::TakeAnswer { sdp, streams: theirs } => {
                let [answer, offer] = numbers(&sdp)[..] else { panic!("{}", sdp.0) };
                engine.pending = None;
                engine.agreed = Some((offer, answer));
                engine.remote_tracks = theirs.len();
                self.check_sections(at, connection);
            }
            Negotiate::Candidates(candidates) => {
                for candidate in candidates {
                    engine.reached.extend(candidate.candidate.parse::<u64>().ok());
                }
            }
            Negotiate::Streams(theirs) => {
                engine.remote_tracks = theirs.len();
                self.check_sections(at, connection);
            }
        }
        self.check_path(at.0, connection);
    }

    /// Answers with a description after gathering, and trickles candidates after that.
    fn describe(&mut self, at: Process, connection: ConnectionId, id: u64, description: Negotiated) {
        let wait = self.random_ms(20, 250);
        self.plan(wait, Happening::Negotiated { at, connection, event: description });
        // Candidates may come before the description is ready.
        let mut trickle = self.random_ms(10, 200);
        for _ in 0..2 {
            let candidate = Candidate { candidate: id.to_string(), mid: Some("0".into()), index: Some(0) };
            let event = Negotiated::Candidates(vec![candidate]);
            self.plan(trickle, Happening::Negotiated { at, connection, event });
            trickle += self.random_ms(10, 800);
        }
        self.plan(trickle, Happening::Negotiated { at, connection, event: Negotiated::CandidatesEnd });
    }

    fn check_sections(&mut self, at: Process, connection: ConnectionId) {
        let engine = &self.nodes[at.0].engines[&connection];
        if engine.tracks.max(engine.remote_tracks) > engine.sections {
            let event = Negotiated::Needed { streams: tracks(engine.tracks) };
            self.plan(Duration::from_millis(5), Happening::Negotiated { at, connection, event });
        }
    }

    fn check_path(&mut self, number: usize, connection: ConnectionId) {
        let Some(agreed) = self.nodes[number].engines.get(&connection).and_then(|engine| engine.agreed)
        else {
            return;
        };
        let Some((other, theirs)) = self.partner(number, connection, agreed) else { return };
        for (number, connection) in [(number, connection), (other, theirs)] {
            if self.nodes[number].engines[&connection].path != Some(agreed) {
                let (at, wait) = (self.process(number), self.random_ms(100, 400));
                self.plan(wait, Happening::Up { at, connection, agreed });
            }
        }
    }

    /// The other end, if both have the same descriptions and each other's candidates.
    fn partner(
        &self,
        number: usize,
        connection: ConnectionId,
        agreed: Agreed,
    ) -> Option<(usize, ConnectionId)> {
        let reaches = |engine: &Engine| {
            engine.agreed == Some(agreed)
                && [agreed.0, agreed.1].iter().any(|theirs| engine.reached.contains(theirs))
        };
        let engine = self.nodes[number].engines.get(&connection).filter(|engine| reaches(engine))?;
        let other = (0..self.nodes.len()).find(|other| key(*other) == engine.to)?;
        let (theirs, _) = self.nodes[other].engines.iter().find(|(_, theirs)| reaches(theirs))?;
        Some((other, *theirs))
    }

    /// The other end of a closed connection notices after a while.
    fn path_lost(&mut self, number: usize, closed: &Engine) {
        let Some(path) = closed.path else { return };
        let other = (0..self.nodes.len()).find(|other| key(*other) == closed.to).unwrap();
        let theirs = self.nodes[other].engines.iter().find(|(_, theirs)| theirs.path == Some(path));
        if let Some((connection, _)) = theirs {
            let (at, connection) = (self.process(other), *connection);
            let event = Negotiated::Interrupted;
            self.plan(Duration::from_secs(5), Happening::Negotiated { at, connection, event });
        }
        let _ = number;
    }

    /// Whether `one` and `other` have one connection each, on the same call.
    fn is_connected(&self, one: usize, other: usize) -> bool {
        let end = |at: usize, to: usize| {
            let open =
                self.nodes[at].engines.values().filter(|engine| engine.to == key(to)).collect::<Vec<_>>();
            let [engine] = open[..] else { return None };
            let call = self.nodes[at].signalling.pairs.get(&key(to))?.call_that_is_up()?.clone();
            Some((engine.path?, call))
        };
        let (there, back) = (end(one, other), end(other, one));
        there.is_some() && there == back
    }

    fn all_connected(&self) -> bool {
        let running: Vec<_> = (0..self.nodes.len()).filter(|number| self.nodes[*number].running).collect();
        running.iter().all(|one| running.iter().all(|other| one == other || self.is_connected(*one, *other)))
    }

    fn assert_lawful(&self) {
        assert_eq!(self.violations, [""; 0]);
    }

    /// The most that one machine keeps, beside one call per pair.
    fn size(&self) -> usize {
        self.nodes.iter().map(|node| node.signalling.kept()).max().unwrap_or_default()
    }
}

fn numbers(sdp: &Sdp) -> Vec<u64> {
    sdp.0.split(' ').filter_map(|word| word.parse().ok()).collect()
}

#[test]
fn eight_members_connect_in_fair_weather() {
    let mut world = World::new(8, 1, Weather::default());
    world.memberships_changed();
    let time = world.run_until(Duration::from_secs(30), World::all_connected).expect("all are connected");
    world.run_for(Duration::from_secs(60));
    world.assert_lawful();
    assert!(world.all_connected());
    let sent: u64 = world.nodes.iter().map(|node| node.sent).sum();
    println!("fair weather: all 28 pairs after {time:?}, {:.1} messages per pair", sent as f64 / 28.0);
    assert!(world.nodes.iter().all(|node| node.connected == 7 && node.failed == 0));
}

#[test]
fn pairs_connect_in_any_weather() {
    let very_late = Weather { reordered: 50, late_ms: 40_000, ..FOUL };
    for (name, weather) in [("fair", Weather::default()), ("foul", FOUL), ("very late messages", very_late)] {
        let mut times: Vec<Duration> = (0..500)
            .map(|seed| {
                let mut world = World::new(2, seed, weather);
                world.view_delay_ms = 0;
                world.memberships_changed();
                let time = world.run_until(Duration::from_secs(600), World::all_connected);
                world.assert_lawful();
                time.unwrap_or_else(|| panic!("{name}, seed {seed}: not connected"))
            })
            .collect();
        times.sort();
        let [half, most, all] = [250, 495, 499].map(|rank| times[rank]);
        println!(
            "{name}: half of 500 pairs are connected after {half:?}, 99 % after {most:?}, all after {all:?}"
        );
    }
}

#[test]
fn eight_members_connect_in_foul_weather_and_after_crashes() {
    let (mut first, mut again, mut sent, mut kept) = (Vec::new(), Vec::new(), 0, 0);
    for seed in 0..20 {
        let mut world = World::new(8, seed, Weather { broken: 2, ..FOUL });
        world.memberships_changed();
        let time = world.run_until(Duration::from_secs(300), World::all_connected);
        first.push(time.unwrap_or_else(|| panic!("seed {seed}: not all are connected")));
        sent += world.nodes.iter().map(|node| node.sent).sum::<u64>();
        for round in 0..6 {
            let pause = world.random_ms(0, 30_000);
            world.run_for(pause);
            let one = world.rng.random_range(0..8);
            let other = (one + world.rng.random_range(1..8)) % 8;
            world.crash(one);
            world.crash(other);
            let pause = world.random_ms(0, 40_000);
            world.run_for(pause);
            if round % 3 == 2 {
                // The membership of one expires before it comes back.
                world.nodes[one].member = false;
                world.memberships_changed();
                world.run_for(Duration::from_secs(5));
            }
            world.come_back(one);
            let pause = world.random_ms(0, 3000);
            world.run_for(pause);
            world.come_back(other);
        }
        let time = world.run_until(Duration::from_secs(300), World::all_connected);
        again.push(time.unwrap_or_else(|| panic!("seed {seed}: not all are connected after the crashes")));
        world.run_for(Duration::from_secs(60));
        assert!(world.all_connected(), "seed {seed}");
        world.assert_lawful();
        kept = kept.max(world.size());
        assert!(world.nodes.iter().all(|node| node.engines.len() == 7));
    }
    // Per pair: ended calls, and the messages of the last round.
    assert!(kept <= 7 * (8 + 6), "{kept} messages are kept");
    first.sort();
    again.sort();
    println!(
        "foul weather: all 28 pairs after {:?} (half of the runs) to {:?}, {:.1} messages per pair; after crashes {:?} \
         to {:?}; at most {kept} messages and calls kept by a member",
        first[10],
        first[19],
        sent as f64 / 28.0 / 20.0,
        again[10],
        again[19]
    );
}

#[test]
fn crossing_invites_end_in_one_connection() {
    for (name, weather) in [("fair", Weather::default()), ("foul", Weather { reordered: 50, ..FOUL })] {
        let mut times = Vec::new();
        for seed in 0..1000 {
            let mut world = World::new(2, seed, weather);
            // Member 1 is the caller by order, but sees the other one only when that one's patience is over. A message
            // takes longer than opening a connection and making an offer, so the invites always cross.
            world.delay_ms = (500, 800);
            world.plan(Duration::ZERO, Happening::Look((0, 0)));
            let wait = world.random_ms(9_950, 10_050);
            world.plan(wait, Happening::Look((1, 0)));
            world.run_for(Duration::from_millis(10_450));
            assert_eq!(world.invites, 2, "seed {seed}: the invites don't cross");
            let time = world.run_until(Duration::from_secs(200), World::all_connected);
            times.push(time.unwrap_or_else(|| panic!("{name}, seed {seed}: not connected")));
            world.run_for(Duration::from_secs(60));
            assert!(world.all_connected(), "{name}, seed {seed}");
            world.assert_lawful();
            assert!(world.nodes.iter().all(|node| node.engines.len() == 1));
        }
        times.sort();
        println!(
            "crossing invites, {name}: connected after {:?} to {:?} (99 %), {:?}",
            times[500], times[990], times[999]
        );
    }
}

#[test]
fn tracks_that_come_later_get_sections_on_both_sides() {
    for seed in 0..50 {
        let weather = if seed == 0 { Weather::default() } else { FOUL };
        let mut world = World::new(2, seed, weather);
        world.memberships_changed();
        world.run_until(Duration::from_secs(200), World::all_connected).expect("connected");
        for number in [0, 1] {
            let (connection, engine) = world.nodes[number].engines.first_key_value().unwrap();
            let (connection, tracks_now) = (*connection, engine.tracks + 1 + number);
            world.nodes[number].engines.get_mut(&connection).unwrap().tracks = tracks_now;
            let event = Negotiated::Needed { streams: tracks(tracks_now) };
            let at = world.process(number);
            world.plan(Duration::from_millis(number as u64), Happening::Negotiated { at, connection, event });
        }
        let done = |world: &World| {
            world.all_connected()
                && world.nodes.iter().flat_map(|node| node.engines.values()).all(|engine| {
                    engine.pending.is_none() && engine.sections >= 4 && engine.remote_tracks >= 3
                })
        };
        world.run_until(Duration::from_secs(120), done).unwrap_or_else(|| panic!("seed {seed}"));
        world.assert_lawful();
    }
}

#[test]
fn lost_path_is_found_again_without_a_new_call() {
    for seed in 0..50 {
        let weather = if seed == 0 { Weather::default() } else { FOUL };
        let mut world = World::new(2, seed, weather);
        world.memberships_changed();
        world.run_until(Duration::from_secs(200), World::all_connected).expect("connected");
        world.run_for(Duration::from_secs(20));
        for number in [0, 1] {
            let (connection, engine) = world.nodes[number].engines.iter_mut().next().unwrap();
            engine.path = None;
            let connection = *connection;
            let event = Negotiated::Interrupted;
            let at = world.process(number);
            world.plan(Duration::from_millis(1), Happening::Negotiated { at, connection, event });
        }
        let before = world.nodes[0].connected;
        world
            .run_until(Duration::from_secs(200), World::all_connected)
            .unwrap_or_else(|| panic!("seed {seed}"));
        world.run_for(Duration::from_secs(60));
        assert!(world.all_connected());
        world.assert_lawful();
        if seed == 0 {
            assert_eq!(world.nodes[0].connected, before);
        }
    }
}
