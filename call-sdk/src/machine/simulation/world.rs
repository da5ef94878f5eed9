//! A homeserver, an SFU and any number of call machines on virtual time, seeded.
//!
//! The world is at least as nasty as the real one: to-device messages overtake each other, requests fail with 429 and
//! 5xx, the homeserver restarts, devices are slow or unknown for a while, and clients vanish without a word.

use std::{
    collections::{BTreeMap, BTreeSet, BinaryHeap},
    sync::Arc,
    time::{Duration, Instant},
};

use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use ruma_common::{OwnedEventId, OwnedRoomId, UserId};
use serde_json::Value;

use crate::{
    frame_crypto::{FrameDecryptor, FrameEncryptor, KeyRing, Opened},
    key::{KeyIndex, MediaKey},
    machine::{
        CallEvent, CallMachine, CallStatus, EndReason, Grant, Input, MachineConfig, Output, RequestId,
        Sealing, media_keys::wire, testing,
    },
    matrix::{
        ApiVersion, DelayId, DelayedAction, Delivery, DeliveryFailure, EventTarget, EventWrite, MatrixReply,
        MatrixRequest, MatrixUpdate, MemberEvent, OlmSender, RequestError, RoomView, ServerSupport,
        ToDeviceBatch, ToDeviceEvent,
    },
    media::Codec,
    member::{Device, MembershipForm, ParticipantIdentity},
    time::{Now, UnixMillis},
    transport::NamedBy,
};

/// How the world misbehaves.
#[derive(Clone, Debug)]
pub(super) struct Weather {
    /// Latency of one request, or of one delivery, from and to.
    pub(super) latency: (u64, u64),
    /// One request in so many is answered 429; 0: none.
    pub(super) rate_limited: u32,
    /// One request in so many is answered 5xx; 0: none.
    pub(super) failing: u32,
    /// One to-device message in so many is lost on its way to the homeserver, with an error; 0: none.
    pub(super) lost: u32,
    /// Devices, by order of joining, whose messages take 8 s.
    pub(super) slow: BTreeSet<usize>,
}

impl Weather {
    pub(super) fn fair() -> Self {
        Self { latency: (10, 80), rate_limited: 0, failing: 0, lost: 0, slow: BTreeSet::new() }
    }

    pub(super) fn foul() -> Self {
        Self { latency: (10, 400), rate_limited: 40, failing: 40, lost: 20, slow: [3, 11].into() }
    }
}

/// A client: its machine, and what it was given.
pub(super) struct Client {
    pub(super) device: Device,
    pub(super) machine: CallMachine,
    pub(super) sealing: Arc<Sealing>,
    pub(super) status: CallStatus,
    pub(super) ended: Option<EndReason>,
    pub(super) events: Vec<CallEvent>,
    /// Every key that was delivered to this device: sender, index, key, when.
    pub(super) got: Vec<(Device, KeyIndex, MediaKey, Instant)>,
    pub(super) joined_at: Instant,
    pub(super) left_at: Option<Instant>,
    /// Whether it still runs: a killed client neither reads nor writes.
    alive: bool,
    wake: Option<Instant>,
}

enum Happening {
    Wake(usize),
    Input(usize, Input),
    Fire(DelayId),
    Deliver { to: usize, event: ToDeviceEvent },
}

struct Scheduled {
    at: Instant,
    order: u64,
    what: Happening,
}

impl PartialEq for Scheduled {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.order) == (other.at, other.order)
    }
}

impl Eq for Scheduled {}

impl PartialOrd for Scheduled {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Scheduled {
    /// The earliest is the greatest, as the heap wants it.
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (other.at, other.order).cmp(&(self.at, self.order))
    }
}

struct Delayed {
    event: EventWrite,
    sender: usize,
    delay: Duration,
    due: Instant,
}

/// Everything.
pub(super) struct World {
    pub(super) now: Now,
    pub(super) rng: StdRng,
    pub(super) weather: Weather,
    pub(super) clients: Vec<Client>,
    room: OwnedRoomId,
    state: BTreeMap<String, MemberEvent>,
    /// The room as a sync shows it, until it changes.
    view: Option<Arc<RoomView>>,
    delayed: BTreeMap<DelayId, Delayed>,
    queue: BinaryHeap<Scheduled>,
    order: u64,
    next_event: u64,
    /// The homeserver answers nothing until then.
    down_until: Option<Instant>,
    /// To-device messages that were accepted.
    pub(super) messages: u64,
}

impl World {
    #[allow(clippy::disallowed_methods, reason = "virtual time has to start somewhere")]
    pub(super) fn new(seed: u64, weather: Weather) -> Self {
        Self {
            now: Now { instant: Instant::now(), unix: UnixMillis(1_790_000_000_000) },
            rng: StdRng::seed_from_u64(seed),
            weather,
            clients: Vec::new(),
            room: "!room:example.org".try_into().unwrap(),
            state: BTreeMap::new(),
            view: None,
            delayed: BTreeMap::new(),
            queue: BinaryHeap::new(),
            order: 0,
            next_event: 1,
            down_until: None,
            messages: 0,
        }
    }

    /// A new client starts to join.
    pub(super) fn join(&mut self) -> usize {
        let number = self.clients.len();
        let user = UserId::parse(format!("@u{number}:s{}.example.org", number % 7)).unwrap();
        let device = Device::new(user, format!("DEV{number}"));
        let sealing = Arc::<Sealing>::default();
        let config = MachineConfig::new(device.clone(), self.room.clone());
        let rng = Box::new(StdRng::from_rng(&mut self.rng));
        let machine = CallMachine::new(self.now, config, sealing.clone(), rng);
        self.clients.push(Client {
            device,
            machine,
            sealing,
            status: CallStatus::Joining,
            ended: None,
            events: Vec::new(),
            got: Vec::new(),
            joined_at: self.now.instant,
            left_at: None,
            alive: true,
            wake: None,
        });
        self.view = None;
        self.feed(number, Input::Start);
        number
    }

    pub(super) fn leave(&mut self, number: usize) {
        self.clients[number].left_at = Some(self.now.instant);
        self.feed(number, Input::Leave(EndReason::Left));
    }

    /// The process of a client is killed: only its delayed leave tells the others.
    pub(super) fn kill(&mut self, number: usize) {
        let client = &mut self.clients[number];
        client.alive = false;
        client.left_at = Some(self.now.instant);
    }

    /// The homeserver answers nothing for a while.
    pub(super) fn restart_homeserver(&mut self, outage: Duration) {
        self.down_until = Some(self.now.instant + outage);
    }

    /// Lets time pass.
    pub(super) fn run(&mut self, duration: Duration) {
        let end = self.now.instant + duration;
        while self.queue.peek().is_some_and(|next| next.at <= end) {
            let Some(next) = self.queue.pop() else { break };
            self.advance_to(next.at);
            self.happen(next.what);
        }
        self.advance_to(end);
    }

    /// Lets time pass until `done`, at most `limit`; how long it took.
    pub(super) fn run_until(&mut self, limit: Duration, done: impl Fn(&Self) -> bool) -> Option<Duration> {
        let begin = self.now.instant;
        while self.now.instant < begin + limit {
            if done(self) {
                return Some(self.now.instant - begin);
            }
            self.run(Duration::from_millis(250));
        }
        None
    }

    /// The clients that are in the call.
    pub(super) fn present(&self) -> Vec<usize> {
        let is_in = |client: &Client| client.alive && client.left_at.is_none() && client.ended.is_none();
        (0..self.clients.len()).filter(|number| is_in(&self.clients[*number])).collect()
    }

    /// Whether `receiver` can open what `sender` seals now.
    pub(super) fn decrypts(&self, receiver: usize, sender: usize) -> bool {
        let Some(index) = self.clients[sender].sealing.current() else { return false };
        let ring = self.clients[receiver].machine.ring_of(&self.clients[sender].device);
        ring.is_some_and(|ring| self.ring_opens(&ring, sender, index))
    }

    /// Whether a ring opens what `sender` seals with the key at `index`.
    pub(super) fn ring_opens(&self, ring: &KeyRing, sender: usize, index: KeyIndex) -> bool {
        let sender = &self.clients[sender];
        let (mut wire, mut plain) = (Vec::new(), Vec::new());
        let mut encryptor = FrameEncryptor::new(Codec::Opus, sender.sealing.ring().clone()).unwrap();
        encryptor.seal(index, b"\x78 a frame", &mut wire).unwrap();
        let opened = FrameDecryptor::new(Codec::Opus, ring.clone()).unwrap().open(
            self.now.instant,
            &wire,
            None,
            &mut plain,
        );
        matches!(opened, Ok(Opened::Frame(_)))
    }

    pub(super) fn all_decrypt(&self) -> bool {
        let present = self.present();
        present.iter().all(|a| present.iter().all(|b| a == b || self.decrypts(*a, *b)))
    }

    fn advance_to(&mut self, at: Instant) {
        let passed = at.saturating_duration_since(self.now.instant);
        self.now = self.now.plus(passed);
    }

    fn happen(&mut self, what: Happening) {
        match what {
            Happening::Wake(number) => {
                if self.clients[number].wake.is_some_and(|at| at <= self.now.instant) {
                    self.clients[number].wake = None;
                    self.drain(number);
                }
            }
            Happening::Input(number, input) => self.feed(number, input),
            Happening::Fire(id) => {
                let is_due = self.delayed.get(&id).is_some_and(|delayed| delayed.due <= self.now.instant);
                if is_due && let Some(delayed) = self.delayed.remove(&id) {
                    self.write(delayed.sender, &delayed.event);
                }
            }
            Happening::Deliver { to, event } => {
                let content = wire::parse(&event.content).unwrap();
                let device_id = event.olm.as_ref().and_then(|olm| olm.device_id.clone()).unwrap();
                let from = Device { user_id: event.sender.clone(), device_id };
                let at = self.now.instant;
                self.clients[to].got.push((from, content.index, content.key, at));
                self.feed(to, Input::Update(MatrixUpdate::ToDevice(event)));
            }
        }
    }

    fn feed(&mut self, number: usize, input: Input) {
        let now = self.now;
        let client = &mut self.clients[number];
        if client.alive {
            client.machine.handle(now, input);
            self.drain(number);
        }
    }

    fn drain(&mut self, number: usize) {
        if !self.clients[number].alive {
            return;
        }
        loop {
            match self.clients[number].machine.poll(self.now) {
                Output::WaitUntil(at) => {
                    let at = at.max(self.now.instant + Duration::from_millis(1));
                    let client = &mut self.clients[number];
                    if client.ended.is_none() && client.wake.is_none_or(|wake| at < wake) {
                        client.wake = Some(at);
                        self.schedule(at, Happening::Wake(number));
                    }
                    return;
                }
                output => self.perform(number, output),
            }
        }
    }

    fn perform(&mut self, number: usize, output: Output) {
        let latency = self.latency();
        match output {
            Output::Matrix { id, request, .. } => {
                let result = self.request(number, request);
                self.answer(latency, number, Input::Matrix { id, result });
            }
            Output::ReadRoom => {
                let view =
                    self.view.get_or_insert_with(|| Arc::new(view_of(&self.state, &self.clients))).clone();
                self.answer(Duration::from_millis(2), number, Input::Room(Ok(view)));
            }
            Output::SendToDevice { id, batch } => self.send_to_device(number, id, batch),
            Output::Discover { .. } => {
                let foci = vec![(testing::focus("https://jwt.example.org"), NamedBy::Homeserver)];
                self.answer(latency, number, Input::Discovered(Ok(foci)));
            }
            Output::Access { connection, .. } => {
                let Device { user_id, device_id } = &self.clients[number].device;
                let identity = ParticipantIdentity::of_device(user_id, device_id);
                let grant = Grant { sfu: "wss://sfu.example.org".parse().unwrap(), identity };
                self.answer(latency, number, Input::Granted { connection, result: Ok(grant) });
            }
            Output::Connect { connection } => {
                self.answer(latency, number, Input::Connected { connection, result: Ok(()) });
            }
            Output::Status(status) => self.clients[number].status = status,
            Output::Event(event) => self.clients[number].events.push(event),
            Output::Over(reason) => self.clients[number].ended = Some(reason),
            _ => {}
        }
    }

    fn request(&mut self, number: usize, request: MatrixRequest) -> Result<MatrixReply, RequestError> {
        if self.down_until.is_some_and(|until| self.now.instant < until) {
            return Err(RequestError::Network { cause: "connection refused".to_owned() });
        }
        if self.one_in(self.weather.rate_limited) {
            return Err(RequestError::RateLimited { retry_after: Some(Duration::from_millis(700)) });
        }
        if self.one_in(self.weather.failing) {
            return Err(RequestError::Network { cause: "502".to_owned() });
        }
        Ok(match request {
            MatrixRequest::ReadSupport => {
                let delayed_events = Some(ApiVersion::Unstable);
                MatrixReply::Support(ServerSupport { delayed_events, ..ServerSupport::default() })
            }
            MatrixRequest::Send(event) => MatrixReply::Sent { event_id: self.write(number, &event) },
            MatrixRequest::Schedule(delayed) => {
                let delay_id = DelayId(format!("d{}", self.next_event));
                self.next_event += 1;
                let due = self.now.instant + delayed.delay;
                let held = Delayed { event: delayed.event, sender: number, delay: delayed.delay, due };
                self.delayed.insert(delay_id.clone(), held);
                self.schedule(due, Happening::Fire(delay_id.clone()));
                MatrixReply::Scheduled { delay_id }
            }
            MatrixRequest::UpdateDelayed { delay_id, action } => {
                let Some(delayed) = self.delayed.get_mut(&delay_id) else {
                    return Err(RequestError::NotFound);
                };
                match action {
                    DelayedAction::Restart => {
                        delayed.due = self.now.instant + delayed.delay;
                        let due = delayed.due;
                        self.schedule(due, Happening::Fire(delay_id));
                    }
                    DelayedAction::Cancel => drop(self.delayed.remove(&delay_id)),
                    DelayedAction::Send => {
                        if let Some(delayed) = self.delayed.remove(&delay_id) {
                            self.write(delayed.sender, &delayed.event);
                        }
                    }
                }
                MatrixReply::Done
            }
            _ => return Err(RequestError::Unsupported),
        })
    }

    /// Writes a state event, and tells everybody after a sync.
    fn write(&mut self, number: usize, event: &EventWrite) -> OwnedEventId {
        let event_id: OwnedEventId = format!("$e{}", self.next_event).try_into().unwrap();
        self.next_event += 1;
        let EventTarget::State { key } = &event.target else { panic!("only the state form is simulated") };
        let written = MemberEvent {
            form: MembershipForm::State,
            sender: self.clients[number].device.user_id.clone(),
            sender_device: None,
            encrypted: false,
            state_key: Some(key.clone()),
            event_id: Some(event_id.clone()),
            origin_server_ts: self.now.unix,
            content: event.content.clone(),
            sticky_until: None,
            sticky_rank: UnixMillis(0),
            redacted_by: None,
        };
        self.state.insert(key.clone(), written);
        self.view = None;
        for number in 0..self.clients.len() {
            let latency = self.latency();
            self.answer(latency, number, Input::Update(MatrixUpdate::RoomChanged));
        }
        event_id
    }

    fn send_to_device(&mut self, from: usize, id: RequestId, batch: ToDeviceBatch) {
        let mut longest = Duration::ZERO;
        for device in batch.recipients {
            let Some(to) = self.clients.iter().position(|client| client.device == device) else { continue };
            let is_slow = self.weather.slow.contains(&to);
            let latency = if is_slow { Duration::from_secs(8) } else { self.latency() };
            longest = longest.max(latency);
            let down = self.down_until.is_some_and(|until| self.now.instant < until);
            let result: Delivery = if down || self.one_in(self.weather.lost) {
                Err(DeliveryFailure::Network("connection reset".to_owned()))
            } else {
                self.messages += 1;
                let sender = &self.clients[from].device;
                let event = ToDeviceEvent {
                    event_type: batch.event_type.clone(),
                    content: batch.content.clone(),
                    sender: sender.user_id.clone(),
                    olm: Some(OlmSender { device_id: Some(sender.device_id.clone()), cross_signed: true }),
                };
                let arrival = self.now.instant + latency + self.latency();
                self.schedule(arrival, Happening::Deliver { to, event });
                Ok(())
            };
            self.answer(latency, from, Input::Delivered { id, device, result });
        }
        self.answer(longest + Duration::from_millis(1), from, Input::BatchDone(id));
    }

    fn answer(&mut self, after: Duration, number: usize, input: Input) {
        let at = self.now.instant + after;
        self.schedule(at, Happening::Input(number, input));
    }

    fn schedule(&mut self, at: Instant, what: Happening) {
        self.order += 1;
        let order = self.order;
        self.queue.push(Scheduled { at, order, what });
    }

    fn latency(&mut self) -> Duration {
        let (from, to) = self.weather.latency;
        Duration::from_millis(self.rng.random_range(from..=to))
    }

    fn one_in(&mut self, chance: u32) -> bool {
        chance > 0 && self.rng.random_range(0..chance) == 0
    }
}

fn view_of(state: &BTreeMap<String, MemberEvent>, clients: &[Client]) -> RoomView {
    RoomView {
        members: state.values().filter(|event| event.content != Value::Null).cloned().collect(),
        slots: Vec::new(),
        joined: clients.iter().map(|client| client.device.user_id.clone()).collect(),
        encrypted: true,
        version: "11".to_owned(),
    }
}
