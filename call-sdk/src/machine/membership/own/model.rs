//! Random call histories against a model of a homeserver that is as nasty as real ones.

use std::collections::BTreeMap;

use proptest::prelude::*;
use ruma_common::OwnedEventId;

use super::{
    tests::{START, alice, forbidden, machine, ms, network, origin, sticky_alice, support},
    *,
};
use crate::{
    machine::membership::testing::on,
    matrix::{ApiVersion, EventTarget, EventWrite, MatrixReply, MatrixRequest, ServerSupport},
};

/// How the homeserver schedules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Dedicated,
    /// Only by the query parameter.
    Query,
    /// Says that it has delayed events, and ignores the query parameter.
    Ignoring,
    /// The same, and the probe does not tell.
    Lying,
    None,
}

/// What happens to requests at present.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    Healthy,
    /// Nothing arrives.
    Away,
    /// It arrives, and the answer does not, or much later.
    LostAnswers,
    Limited(u64),
    Refusing,
    /// As an old server behind the proxy for a while.
    NotFound,
}

/// The winning event of one membership key.
#[derive(Clone, Debug)]
struct Winner {
    joined: bool,
    /// By which it wins (MSC4354); the state form has the order of writing.
    rank: u64,
    expires_at: u64,
    created: u64,
}

struct Server {
    kind: Kind,
    /// Real time in milliseconds: it goes on while the device sleeps and whatever its wall clock says.
    time: u64,
    fault: Fault,
    /// Whether a write of a state key cancels its delayed event.
    cancels_on_write: bool,
    finals_are_404: bool,
    members: BTreeMap<String, Winner>,
    delayed: BTreeMap<DelayId, (u64, u64, EventWrite)>,
    ended: Vec<DelayId>,
    serial: u64,
    accidents: u32,
    /// Whether a leave was refused, which is final.
    refused_a_leave: bool,
}

impl Server {
    fn key(write: &EventWrite) -> String {
        match &write.target {
            EventTarget::State { key } => key.clone(),
            _ => write.content["sticky_key"].as_str().unwrap().to_owned(),
        }
    }

    fn write(&mut self, write: &EventWrite) -> OwnedEventId {
        self.serial += 1;
        let joined = write.content.get("application").is_some();
        let key = Self::key(write);
        let millis = |name: &str| write.content.get(name).and_then(serde_json::Value::as_u64);
        let (rank, created, expires_at) = match &write.target {
            EventTarget::State { .. } => {
                let created = millis("created_ts").unwrap_or(self.time);
                (u64::MAX, created, created.saturating_add(millis("expires").unwrap_or_default()))
            }
            EventTarget::Message { sticky } | EventTarget::ClearMessage { sticky } => {
                let until = self.time + u64::try_from(sticky.unwrap().as_millis()).unwrap();
                (until, self.time, until)
            }
        };
        // Of two equal ones the greater event id wins, which is chance: always to our disadvantage here.
        let wins = self
            .members
            .get(&key)
            .is_none_or(|old| rank > old.rank || rank == u64::MAX || (rank == old.rank && !joined));
        if wins {
            self.members.insert(key, Winner { joined, rank, expires_at, created });
        }
        format!("$event{}", self.serial).try_into().unwrap()
    }

    /// When the listed membership of `own` was created.
    fn listed(&self, own: &OwnDescription) -> Option<UnixMillis> {
        let write = wire::leave(own, LeaveCode::Leave);
        let winner = self.members.get(&Self::key(&write))?;
        (winner.joined && self.time < winner.expires_at).then_some(UnixMillis(winner.created))
    }

    fn pass(&mut self, millis: u64) {
        let end = self.time.saturating_add(millis);
        loop {
            let due =
                self.delayed.iter().min_by_key(|(_, (at, ..))| *at).map(|(id, (at, ..))| (id.clone(), *at));
            let Some((id, at)) = due.filter(|(_, at)| *at <= end) else { break };
            self.time = self.time.max(at);
            let (_, _, write) = self.delayed.remove(&id).unwrap();
            self.ended.push(id);
            self.write(&write);
        }
        self.time = end;
    }

    /// What the request does, if it arrives.
    fn perform(&mut self, request: &MatrixRequest) -> Result<MatrixReply, RequestError> {
        match request {
            MatrixRequest::ReadSupport => {
                let delayed_events = (self.kind != Kind::None).then_some(ApiVersion::Stable);
                Ok(MatrixReply::Support(ServerSupport { sticky_events: true, ..support(delayed_events) }))
            }
            MatrixRequest::ProbeDelayParameter => {
                Ok(MatrixReply::DelayParameter(matches!(self.kind, Kind::Query | Kind::Lying)))
            }
            MatrixRequest::Send(write) => {
                if self.cancels_on_write && matches!(write.target, EventTarget::State { .. }) {
                    let key = Self::key(write);
                    let gone: Vec<_> = self
                        .delayed
                        .iter()
                        .filter(|(_, (_, _, leave))| Self::key(leave) == key)
                        .map(|(id, _)| id.clone())
                        .collect();
                    for id in gone {
                        self.delayed.remove(&id);
                        self.ended.push(id);
                    }
                }
                Ok(MatrixReply::Sent { event_id: self.write(write) })
            }
            MatrixRequest::Schedule(event) => match (event.form, self.kind) {
                (ScheduleForm::Dedicated(ApiVersion::Unstable), Kind::Dedicated)
                | (ScheduleForm::QueryParameter, Kind::Query) => {
                    self.serial += 1;
                    let delay = u64::try_from(event.delay.as_millis()).unwrap();
                    let delay_id = DelayId(format!("delay{}", self.serial));
                    self.delayed.insert(delay_id.clone(), (self.time + delay, delay, event.event.clone()));
                    Ok(MatrixReply::Scheduled { delay_id })
                }
                (ScheduleForm::Dedicated(_), _) => Err(RequestError::Unsupported),
                (ScheduleForm::QueryParameter, _) => {
                    self.accidents += 1;
                    Ok(MatrixReply::Sent { event_id: self.write(&event.event) })
                }
            },
            MatrixRequest::UpdateDelayed { delay_id, action } => {
                let Some((at, delay, _)) = self.delayed.get_mut(delay_id) else {
                    return Err(if self.ended.contains(delay_id) && !self.finals_are_404 {
                        RequestError::AlreadyFinal
                    } else {
                        RequestError::NotFound
                    });
                };
                if *action == DelayedAction::Restart {
                    *at = self.time + *delay;
                } else if let Some((_, _, write)) = self.delayed.remove(delay_id) {
                    self.ended.push(delay_id.clone());
                    if *action == DelayedAction::Send {
                        self.write(&write);
                    }
                }
                Ok(MatrixReply::Done)
            }
            other => panic!("not a request of this machine: {other:?}"),
        }
    }

    /// The answer that comes at once; `None`: it is lost.
    fn answer(
        &mut self,
        request: &MatrixRequest,
    ) -> Result<Option<Result<MatrixReply, RequestError>>, MatrixReply> {
        if matches!(self.fault, Fault::Refusing | Fault::NotFound) {
            self.refused_a_leave |= match request {
                MatrixRequest::Send(write) => write.content.get("application").is_none(),
                MatrixRequest::UpdateDelayed { action, .. } => *action == DelayedAction::Send,
                _ => false,
            };
        }
        match self.fault {
            Fault::Healthy => Ok(Some(self.perform(request))),
            Fault::Away => Ok(Some(Err(network()))),
            Fault::LostAnswers => match self.perform(request) {
                Ok(reply) => Err(reply),
                Err(_) => Ok(None),
            },
            Fault::Limited(wait) => Ok(Some(Err(RequestError::RateLimited { retry_after: Some(ms(wait)) }))),
            Fault::Refusing => Ok(Some(Err(forbidden()))),
            Fault::NotFound => Ok(Some(Err(RequestError::Unsupported))),
        }
    }
}

/// The machine, its shell and the homeserver.
struct World {
    own: OwnMembership,
    server: Server,
    now: Now,
    /// The request under way: when its time is over, and the answer if it is only late.
    pending: Option<(Instant, RequestId, MatrixRequest, Option<MatrixReply>)>,
    /// Answers that come after their time.
    late: Vec<(RequestId, MatrixReply)>,
    status: Status,
    ended: bool,
    /// Until when a leave has to be done, whatever the homeserver does.
    leave_by: Option<Instant>,
}

impl World {
    fn new(kind: Kind, cancels_on_write: bool, finals_are_404: bool) -> Self {
        Self {
            own: machine(OwnConfig::default()),
            server: Server {
                kind,
                time: START,
                fault: Fault::Healthy,
                cancels_on_write,
                finals_are_404,
                members: BTreeMap::new(),
                delayed: BTreeMap::new(),
                ended: Vec::new(),
                serial: 0,
                accidents: 0,
                refused_a_leave: false,
            },
            now: origin(),
            pending: None,
            late: Vec::new(),
            status: Status::Disconnected,
            ended: false,
            leave_by: None,
        }
    }

    fn input(&mut self, input: Input) {
        match &input {
            Input::Leave => self.leave_by = Some(self.now.instant + OwnConfig::default().leave_timeout),
            Input::Join(_) => self.leave_by = None,
            _ => {}
        }
        self.own.handle(self.now, input);
    }

    fn sync(&mut self) {
        if matches!(self.server.fault, Fault::Away) {
            return;
        }
        if let Some(own) = self.own.description() {
            let sighting = self
                .server
                .listed(own)
                .map_or(OwnSighting::Missing, |created| OwnSighting::Listed { created: Some(created) });
            self.input(Input::OwnSeen(sighting));
        }
    }

    /// Drains the machine; returns when it wants to be called again.
    fn drain(&mut self) -> Result<Option<Instant>, TestCaseError> {
        for _ in 0..100 {
            if let Some((_, id, _, reply)) = self.pending.take_if(|(over, ..)| *over <= self.now.instant) {
                self.late.extend(reply.map(|reply| (id, reply)));
                self.input(Input::Reply { id, result: Err(RequestError::TimedOut) });
            }
            match self.own.poll(self.now) {
                Output::Event(Event::Status(status)) => {
                    prop_assert_ne!(self.status, status, "told twice");
                    self.status = status;
                }
                Output::Event(Event::Ended(_)) => self.ended = true,
                Output::Event(_) => {}
                Output::Request { id, request, timeout } => {
                    self.abandon_pending()?;
                    self.check(&request)?;
                    let over = self.now.instant + timeout;
                    match self.server.answer(&request) {
                        Ok(Some(result)) => self.input(Input::Reply { id, result }),
                        Ok(None) => self.pending = Some((over, id, request, None)),
                        Err(reply) => self.pending = Some((over, id, request, Some(reply))),
                    }
                }
                Output::Delegate { id, delay_id, .. } => {
                    self.abandon_pending()?;
                    let known = self.server.delayed.contains_key(&delay_id);
                    let result = if known { Ok(MatrixReply::Done) } else { Err(RequestError::NotFound) };
                    self.input(Input::Reply { id, result });
                }
                Output::WaitUntil(at) => {
                    prop_assert!(at > self.now.instant, "waits for the past");
                    if self.leave_by.is_some_and(|by| self.now.instant >= by) {
                        prop_assert_eq!(self.own.status(), Status::Disconnected, "leaving takes too long");
                    }
                    return Ok(Some(at));
                }
                Output::Idle => {
                    prop_assert_eq!(self.own.status(), Status::Disconnected, "waits for nothing");
                    return Ok(None);
                }
            }
        }
        prop_assert!(false, "the machine spins");
        Ok(None)
    }

    /// A new request replaces the one under way, which must not be one that could overtake it.
    fn abandon_pending(&mut self) -> Result<(), TestCaseError> {
        if let Some((_, id, request, reply)) = self.pending.take() {
            let leaving = matches!(self.own.phase, Phase::Leaving(_));
            prop_assert!(leaving || !matches!(request, MatrixRequest::Send(_)), "two writes at a time");
            self.late.extend(reply.map(|reply| (id, reply)));
        }
        Ok(())
    }

    fn check(&self, request: &MatrixRequest) -> Result<(), TestCaseError> {
        match request {
            MatrixRequest::Schedule(event) => {
                let proven = self.own.scheduling.task(true).is_some();
                prop_assert!(
                    proven || !matches!(self.own.phase, Phase::Joined(_)),
                    "an unproven form while joined"
                );
                prop_assert!(event.event.content.get("application").is_none());
            }
            MatrixRequest::Send(write) if write.content.get("created_ts").is_some() => {
                let millis = |name: &str| write.content[name].as_u64().unwrap();
                let until = millis("created_ts").saturating_add(millis("expires"));
                prop_assert!(
                    until >= self.now.unix.0.saturating_add(600_000),
                    "published for too short a time"
                );
            }
            _ => {}
        }
        Ok(())
    }

    /// Lets awake time pass, with everything that happens on the way.
    fn pass(&mut self, millis: u64) -> Result<(), TestCaseError> {
        let end = self.now.instant + ms(millis);
        loop {
            let wake = self.drain()?;
            let over = self.pending.as_ref().map(|(over, ..)| *over);
            let next = [wake, over].into_iter().flatten().min().unwrap_or(end).min(end);
            let by = next.saturating_duration_since(self.now.instant);
            self.now = self.now.plus(by);
            self.server.pass(
                u64::try_from(by.as_millis()).unwrap()
                    + u64::from(!by.subsec_nanos().is_multiple_of(1_000_000)),
            );
            if next >= end {
                self.drain()?;
                return Ok(());
            }
        }
    }
}

#[derive(Clone, Debug)]
enum Turn {
    Input(Box<Input>),
    Join(bool),
    Switch(bool),
    Pass(u64),
    Sleep(u64),
    Wall(i64),
    Fault(Fault),
    Sync,
    LateAnswer,
    /// The homeserver forgets our delayed events, or somebody else ends our membership.
    Forget,
    Kick,
}

fn input(inputs: impl Strategy<Value = Input>) -> impl Strategy<Value = Turn> {
    inputs.prop_map(|input| Turn::Input(Box::new(input)))
}

fn any_turn() -> impl Strategy<Value = Turn> {
    prop_oneof![
        1 => input(Just(Input::Leave)),
        2 => input(prop::option::of("[ab]").prop_map(Input::SetIntent)),
        1 => input("[ab]".prop_map(|host| Input::SetTransports(on(&format!("https://{host}.example"))))),
        1 => input(Just(Input::Renew)),
        2 => input(Just(Input::OfferDelegation)),
        1 => any::<bool>().prop_map(Turn::Join),
        1 => any::<bool>().prop_map(Turn::Switch),
        12 => (0_u64..20_000).prop_map(Turn::Pass),
        1 => (0_u64..10_000_000).prop_map(Turn::Pass),
        2 => (0_u64..10_000_000).prop_map(Turn::Sleep),
        1 => (-7_200_000_i64..7_200_000).prop_map(Turn::Wall),
        8 => prop_oneof![
            Just(Fault::Healthy), Just(Fault::Away), Just(Fault::LostAnswers), Just(Fault::Refusing),
            Just(Fault::NotFound), (0_u64..30_000).prop_map(Fault::Limited),
        ].prop_map(Turn::Fault),
        6 => Just(Turn::Sync),
        3 => Just(Turn::LateAnswer),
        1 => Just(Turn::Forget),
        1 => Just(Turn::Kick),
    ]
}

fn any_kind() -> impl Strategy<Value = Kind> {
    prop_oneof![
        4 => Just(Kind::Dedicated), 2 => Just(Kind::Query), 1 => Just(Kind::Ignoring), 1 => Just(Kind::Lying),
        1 => Just(Kind::None),
    ]
}

fn description(sticky: bool, own: &mut OwnMembership) -> OwnDescription {
    if sticky { OwnDescription { member_id: own.fresh_member_id(), ..sticky_alice() } } else { alice() }
}

proptest! {
    /// Whatever happens: one request at a time, no spinning, no status told twice, no unproven form while joined, a
    /// leave by accident at most once. A homeserver that is well again lists us again, unless the session has ended.
    /// Leaving ends within its time and leaves nothing listed.
    #[test]
    fn membership_survives_every_history(
        kind in any_kind(),
        sticky in any::<bool>(),
        cancels_on_write in any::<bool>(),
        finals_are_404 in any::<bool>(),
        turns in prop::collection::vec(any_turn(), 0..60),
    ) {
        let mut world = World::new(kind, cancels_on_write, finals_are_404);
        let own = description(sticky, &mut world.own);
        world.input(Input::Join(own));
        let (mut left, mut rejoined) = (false, false);
        for turn in turns {
            match turn {
                Turn::Input(input) => {
                    left |= *input == Input::Leave;
                    world.input(*input);
                }
                Turn::Join(sticky) => {
                    let own = description(sticky, &mut world.own);
                    rejoined |= left || world.ended;
                    left = false;
                    world.ended &= world.status != Status::Disconnected;
                    world.input(Input::Join(own));
                }
                Turn::Switch(sticky) => {
                    let own = description(sticky, &mut world.own);
                    world.input(Input::SetDescription(own));
                }
                Turn::Pass(millis) => world.pass(millis)?,
                Turn::Sleep(millis) => {
                    world.now.unix = world.now.unix.plus(ms(millis));
                    world.server.pass(millis);
                }
                Turn::Wall(by) => world.now.unix = UnixMillis(world.now.unix.0.saturating_add_signed(by)),
                Turn::Fault(fault) => world.server.fault = fault,
                Turn::Sync => world.sync(),
                Turn::LateAnswer => if let Some((id, reply)) = world.late.pop() {
                    world.input(Input::Reply { id, result: Ok(reply) });
                },
                Turn::Forget => world.server.delayed.clear(),
                Turn::Kick => world.server.members.clear(),
            }
            world.drain()?;
        }

        world.server.fault = Fault::Healthy;
        // Longer than a hidden delegated leave, the longest wait for a rate limit, and every backoff.
        for _ in 0..900 {
            world.pass(5000)?;
            world.sync();
        }
        prop_assert!(world.server.accidents <= 1, "left by accident {} times", world.server.accidents);
        match world.own.status() {
            Status::Connected => {
                let own = world.own.description().unwrap().clone();
                prop_assert!(world.server.listed(&own).is_some(), "not listed again");
            }
            status => {
                prop_assert_eq!(status, Status::Disconnected);
                prop_assert!(world.ended || left, "disconnected without a reason");
            }
        }

        let last = world.own.description().cloned();
        world.input(Input::Leave);
        world.pass(5000)?;
        prop_assert_eq!(world.own.status(), Status::Disconnected);
        prop_assert!(last.is_none_or(|last| world.server.listed(&last).is_none()), "still listed");
        let listed = world.server.members.values().filter(|w| w.joined && world.server.time < w.expires_at);
        // A leave that ran out of time is not repeated after another join.
        let excused = world.server.refused_a_leave || rejoined;
        prop_assert!(excused || listed.count() == 0, "an earlier membership is still listed");
    }
}
