//! What the machine of this module does, on virtual time against a scripted homeserver.

use rand::{SeedableRng as _, rngs::StdRng};
use ruma_common::{OwnedEventId, room_id, user_id};
use serde_json::{Value, json};

use super::*;
use crate::{
    machine::{
        membership::testing::{on, state_content, state_event, sticky_content, sticky_event},
        testing::{device, state_member, sticky_member},
    },
    matrix::{ApiVersion, EventTarget, MatrixReply, MatrixRequest, ServerSupport},
    member::Slot,
};

pub(super) const START: u64 = 1_800_000_000_000;
const HOUR: u64 = 3_600_000;

pub(super) fn alice() -> OwnDescription {
    let device = device("@alice:example.org", "AAAAAAA");
    OwnDescription {
        member_id: MemberId::of_state_member(&device.user_id, &device.device_id),
        device,
        room_id: room_id!("!room:example.org").to_owned(),
        room_version: "12".to_owned(),
        slot: Slot::room_call(),
        mode: MembershipMode::Compatibility,
        transports: on("https://sfu.example"),
        intent: None,
    }
}

pub(super) fn sticky_alice() -> OwnDescription {
    OwnDescription { mode: MembershipMode::Matrix2, member_id: MemberId("first".to_owned()), ..alice() }
}

pub(super) fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

pub(super) fn support(delayed_events: Option<ApiVersion>) -> ServerSupport {
    ServerSupport { delayed_events, sticky_events: true, ..ServerSupport::default() }
}

pub(super) fn network() -> RequestError {
    RequestError::Network { cause: "502".to_owned() }
}

pub(super) fn forbidden() -> RequestError {
    RequestError::Forbidden { errcode: "M_FORBIDDEN".to_owned(), message: "power level too low".to_owned() }
}

fn refused(status: u16) -> RequestError {
    RequestError::Refused { status, errcode: String::new(), message: String::new() }
}

fn limited(retry_after: Option<u64>) -> RequestError {
    RequestError::RateLimited { retry_after: retry_after.map(ms) }
}

/// A request, reduced to what tests tell apart.
#[derive(Clone, Debug, PartialEq)]
enum Asked {
    Support,
    Probe,
    Schedule {
        delay: Duration,
        form: ScheduleForm,
    },
    Update {
        id: String,
        action: DelayedAction,
    },
    /// A membership, and its sticky duration.
    Put {
        content: Value,
        sticky: Option<Duration>,
    },
    /// A leave.
    Leave {
        content: Value,
        sticky: Option<Duration>,
    },
}

fn asked(request: MatrixRequest) -> Asked {
    let sticky = |target: &EventTarget| match target {
        EventTarget::State { .. } => None,
        EventTarget::Message { sticky } | EventTarget::ClearMessage { sticky } => *sticky,
    };
    match request {
        MatrixRequest::ReadSupport => Asked::Support,
        MatrixRequest::ProbeDelayParameter => Asked::Probe,
        MatrixRequest::Schedule(event) => {
            assert!(event.event.content.get("application").is_none(), "only leaves are delayed");
            assert!(
                !matches!(event.event.target, EventTarget::Message { .. }),
                "delayed leaves are in clear"
            );
            Asked::Schedule { delay: event.delay, form: event.form }
        }
        MatrixRequest::UpdateDelayed { delay_id, action } => Asked::Update { id: delay_id.0, action },
        MatrixRequest::Send(write) => {
            let sticky = sticky(&write.target);
            if write.content.get("application").is_some() {
                Asked::Put { content: write.content, sticky }
            } else {
                Asked::Leave { content: write.content, sticky }
            }
        }
        other => panic!("not a request of this machine: {other:?}"),
    }
}

impl Asked {
    fn is_schedule(&self) -> bool {
        matches!(self, Self::Schedule { .. })
    }

    fn is_put(&self) -> bool {
        matches!(self, Self::Put { .. })
    }

    fn is_leave(&self) -> bool {
        matches!(self, Self::Leave { .. })
    }

    fn is_restart(&self) -> bool {
        matches!(self, Self::Update { action: DelayedAction::Restart, .. })
    }

    fn restart(id: &str) -> Self {
        Self::Update { id: id.to_owned(), action: DelayedAction::Restart }
    }

    fn send(id: &str) -> Self {
        Self::Update { id: id.to_owned(), action: DelayedAction::Send }
    }

    fn cancel(id: &str) -> Self {
        Self::Update { id: id.to_owned(), action: DelayedAction::Cancel }
    }
}

/// What the scripted homeserver does with a request.
enum Answer {
    Now(Result<MatrixReply, RequestError>),
    Never,
}

use Answer::{Never, Now as Answered};

fn error(error: RequestError) -> Answer {
    Answered(Err(error))
}

fn scheduled(id: &str) -> Answer {
    Answered(Ok(MatrixReply::Scheduled { delay_id: DelayId(id.to_owned()) }))
}

fn event_id(n: usize) -> OwnedEventId {
    format!("$event{n}").try_into().unwrap()
}

/// A homeserver that does everything at once. The `n`-th request makes the delayed leave `delay{n}` or the event
/// `$event{n}`.
fn obliging(n: usize, request: &Asked) -> Answer {
    match request {
        Asked::Support => Answered(Ok(MatrixReply::Support(support(Some(ApiVersion::Unstable))))),
        Asked::Probe => Answered(Ok(MatrixReply::DelayParameter(true))),
        Asked::Schedule { .. } => scheduled(&format!("delay{n}")),
        Asked::Put { .. } | Asked::Leave { .. } => Answered(Ok(MatrixReply::Sent { event_id: event_id(n) })),
        Asked::Update { .. } => Answered(Ok(MatrixReply::Done)),
    }
}

/// Like [`obliging`], with another answer to the requests that `which` picks.
fn but(which: fn(&Asked) -> bool, answer: fn() -> Answer) -> impl FnMut(usize, &Asked) -> Answer {
    move |n, request| if which(request) { answer() } else { obliging(n, request) }
}

/// The machine with its shell and homeserver on virtual time.
struct Call {
    own: OwnMembership,
    start: Now,
    now: Now,
    /// Every request with its time in milliseconds since the start.
    log: Vec<(u64, Asked)>,
    events: Vec<(u64, Event)>,
    /// What the focus's service does when it is asked to keep a delayed leave, and when it was asked for which.
    service: fn() -> Answer,
    delegated: Vec<(u64, String, Duration)>,
    unanswered: Vec<(Instant, RequestId)>,
}

#[expect(clippy::disallowed_methods, reason = "an arbitrary origin of virtual time")]
pub(super) fn origin() -> Now {
    Now { instant: Instant::now(), unix: UnixMillis(START) }
}

pub(super) fn machine(config: OwnConfig) -> OwnMembership {
    OwnMembership::new(config, Box::new(StdRng::seed_from_u64(1)))
}

impl Call {
    /// A call whose machine knows nothing of the homeserver.
    fn unread(config: OwnConfig) -> Self {
        let start = origin();
        Self {
            own: machine(config),
            start,
            now: start,
            log: Vec::new(),
            events: Vec::new(),
            service: || Answered(Ok(MatrixReply::Done)),
            delegated: Vec::new(),
            unanswered: Vec::new(),
        }
    }

    fn new(config: OwnConfig) -> Self {
        let mut call = Self::unread(config);
        call.input(Input::Support(support(Some(ApiVersion::Unstable))));
        call
    }

    fn joining(config: OwnConfig, own: OwnDescription) -> Self {
        let mut call = Self::new(config);
        call.input(Input::Join(own));
        call
    }

    /// A joined call whose requests so far are forgotten.
    fn joined_as(config: OwnConfig, own: OwnDescription) -> Self {
        let mut call = Self::joining(config, own);
        call.run(0, obliging);
        call.listed();
        call.run(0, obliging);
        assert_eq!(call.own.status(), Status::Connected);
        call.log.clear();
        call.events.clear();
        call
    }

    fn joined(config: OwnConfig) -> Self {
        Self::joined_as(config, alice())
    }

    fn sticky() -> Self {
        Self::joined_as(OwnConfig::default(), sticky_alice())
    }

    fn input(&mut self, input: Input) {
        self.own.handle(self.now, input);
    }

    fn listed(&mut self) {
        self.input(Input::OwnSeen(OwnSighting::Listed { created: None }));
    }

    fn missing(&mut self) {
        self.input(Input::OwnSeen(OwnSighting::Missing));
    }

    fn elapsed(&self) -> u64 {
        u64::try_from((self.now.instant - self.start.instant).as_millis()).unwrap()
    }

    fn set(&mut self, at: Instant) {
        let by = at - self.now.instant;
        self.now = self.now.plus(by);
    }

    /// The device sleeps: only the wall clock goes on.
    fn sleep(&mut self, millis: u64) {
        self.now.unix = self.now.unix.plus(ms(millis));
    }

    /// Runs until `until` milliseconds after the start. `answer` is given the number of the request and the
    /// request.
    fn run(&mut self, until: u64, mut answer: impl FnMut(usize, &Asked) -> Answer) {
        let end = self.start.instant + ms(until);
        loop {
            match self.own.poll(self.now) {
                Output::Event(event) => self.events.push((self.elapsed(), event)),
                Output::Request { id, request, timeout } => {
                    assert!(self.log.len() < 100_000, "the machine spins");
                    let request = asked(request);
                    self.log.push((self.elapsed(), request.clone()));
                    match answer(self.log.len(), &request) {
                        Answered(result) => self.own.handle(self.now, Input::Reply { id, result }),
                        Never => self.unanswered.push((self.now.instant + timeout, id)),
                    }
                }
                Output::Delegate { id, delay_id, delay, timeout } => {
                    assert!(self.delegated.len() < 1000, "the machine spins");
                    self.delegated.push((self.elapsed(), delay_id.0, delay));
                    match (self.service)() {
                        Answered(result) => self.own.handle(self.now, Input::Reply { id, result }),
                        Never => self.unanswered.push((self.now.instant + timeout, id)),
                    }
                }
                waiting => {
                    let timed_out = self.unanswered.iter().map(|(at, _)| *at).min();
                    let wake = match waiting {
                        Output::WaitUntil(at) => Some(at),
                        _ => None,
                    };
                    let next = [timed_out, wake].into_iter().flatten().min();
                    let Some(next) = next.filter(|next| *next <= end) else {
                        self.set(end.max(self.now.instant));
                        return;
                    };
                    self.set(next.max(self.now.instant));
                    if let Some(at) = self.unanswered.iter().position(|(at, _)| *at <= self.now.instant) {
                        let (_, id) = self.unanswered.remove(at);
                        self.own.handle(self.now, Input::Reply { id, result: Err(RequestError::TimedOut) });
                    }
                }
            }
        }
    }

    fn requests(&self) -> Vec<Asked> {
        self.log.iter().map(|(_, request)| request.clone()).collect()
    }

    fn times(&self, which: fn(&Asked) -> bool) -> Vec<u64> {
        self.log.iter().filter(|(_, request)| which(request)).map(|(at, _)| *at).collect()
    }

    fn restarts_of(&self, id: &str) -> Vec<u64> {
        let wanted = Asked::restart(id);
        self.log.iter().filter(|(_, request)| *request == wanted).map(|(at, _)| *at).collect()
    }

    fn puts(&self) -> Vec<(u64, Value)> {
        self.log
            .iter()
            .filter_map(|(at, request)| match request {
                Asked::Put { content, .. } => Some((*at, content.clone())),
                _ => None,
            })
            .collect()
    }

    fn statuses(&self) -> Vec<Status> {
        self.events
            .iter()
            .filter_map(|(_, event)| if let Event::Status(status) = event { Some(*status) } else { None })
            .collect()
    }

    fn ended(&self) -> Option<(u64, &EndReason)> {
        self.events.iter().find_map(|(at, event)| match event {
            Event::Ended(reason) => Some((*at, reason)),
            _ => None,
        })
    }

    fn probably_left(&self) -> Vec<(u64, bool)> {
        self.events
            .iter()
            .filter_map(
                |(at, event)| if let Event::ProbablyLeft(left) = event { Some((*at, *left)) } else { None },
            )
            .collect()
    }

    fn warnings(&self) -> Vec<&NoDelayedLeave> {
        self.events
            .iter()
            .filter_map(|(_, event)| match event {
                Event::DelayedLeaveUnavailable { reason, .. } => Some(reason),
                _ => None,
            })
            .collect()
    }

    fn member_id(&self) -> String {
        self.own.description().unwrap().member_id.0.clone()
    }
}

/// What matrix-js-sdk uses when an application sets nothing, as the scenarios `eNN` below have it.
fn js() -> OwnConfig {
    OwnConfig {
        leave_delay: ms(8000),
        restart_interval: ms(5000),
        network_retry: ms(3000),
        missing_grace: Duration::ZERO,
        ..OwnConfig::default()
    }
}

const UNSTABLE: ScheduleForm = ScheduleForm::Dedicated(ApiVersion::Unstable);
const STABLE: ScheduleForm = ScheduleForm::Dedicated(ApiVersion::Stable);

// Joining. `eNN` numbers a scenario of matrix-js-sdk.

#[test]
fn e33_join_schedules_publishes_and_restarts() {
    let mut call = Call::joining(js(), alice());
    call.run(0, obliging);
    let content = wire::membership(&alice(), ms(4 * HOUR), None).content;
    assert_eq!(
        call.log,
        [
            (0, Asked::Schedule { delay: ms(8000), form: UNSTABLE }),
            (0, Asked::Put { content, sticky: None }),
            (0, Asked::restart("delay1")),
        ]
    );
}

#[test]
fn join_over_a_membership_left_behind_differs_from_it() {
    let left = wire::membership(&alice(), ms(4 * HOUR), None).content;
    let published = |left: Option<Value>| {
        let mut call = Call::new(js());
        call.input(Input::LeftBehind(left));
        call.input(Input::Join(alice()));
        call.run(0, obliging);
        call.puts().remove(0).1
    };
    assert_ne!(published(Some(left.clone())), left, "the homeserver would drop it");
    assert_eq!(published(Some(json!({}))), left);
    assert_eq!(published(None), left);
}

#[test]
fn e36_leave_cancelled_by_write_is_scheduled_again() {
    for gone in [|| error(RequestError::NotFound), || error(RequestError::AlreadyFinal)] {
        let mut call = Call::joining(js(), alice());
        let mut restarts = 0;
        call.run(4_999, |n, request| {
            restarts += usize::from(request.is_restart());
            if request.is_restart() && restarts == 1 { gone() } else { obliging(n, request) }
        });
        assert_eq!((call.times(Asked::is_schedule).len(), call.times(Asked::is_put).len()), (2, 1));
        assert_eq!(call.ended(), None);
    }
}

#[test]
fn e37_limits_of_the_server_are_obeyed() {
    let mut call = Call::joining(OwnConfig { leave_delay: ms(9000), ..js() }, alice());
    let (mut schedules, mut puts) = (0, 0);
    call.run(11_000, |n, request| match request {
        Asked::Schedule { delay, .. } => {
            schedules += 1;
            match schedules {
                1 => {
                    assert_eq!(*delay, ms(9000));
                    error(RequestError::MaxDelayExceeded { max: Some(ms(7500)) })
                }
                2 => error(limited(None)),
                _ => {
                    assert_eq!(*delay, ms(7500));
                    obliging(n, request)
                }
            }
        }
        Asked::Put { .. } => {
            puts += 1;
            if puts == 1 { error(limited(Some(1000))) } else { obliging(n, request) }
        }
        _ => obliging(n, request),
    });
    assert_eq!(call.times(Asked::is_schedule), [0, 0, 5000]);
    assert_eq!(call.times(Asked::is_put), [5000, 6000]);
    assert_eq!(call.times(Asked::is_restart), [6000, 11_000]);
}

#[test]
fn e38_delay_is_clamped_to_capability_or_halved() {
    const DAY: Duration = Duration::from_secs(86_400);
    let run = |capability: Option<Duration>, accepts: Duration| {
        let mut call = Call::unread(OwnConfig { leave_delay: 4 * DAY, ..js() });
        let limits = ServerSupport { max_delay: capability, ..support(Some(ApiVersion::Unstable)) };
        call.input(Input::Support(limits));
        call.input(Input::Join(alice()));
        call.run(0, |n, request| match request {
            Asked::Schedule { delay, .. } if *delay > accepts => {
                error(RequestError::MaxDelayExceeded { max: None })
            }
            _ => obliging(n, request),
        });
        let delays = call.log.iter().filter_map(|(_, request)| match request {
            Asked::Schedule { delay, .. } => Some(*delay),
            _ => None,
        });
        (
            delays.collect::<Vec<_>>(),
            call.warnings().into_iter().cloned().collect::<Vec<_>>(),
            call.puts().len(),
        )
    };
    assert_eq!(run(Some(DAY), DAY), (vec![DAY], vec![], 1));
    assert_eq!(run(None, DAY), (vec![4 * DAY, 2 * DAY, DAY], vec![], 1));
    let too_short = NoDelayedLeave::LimitTooShort { least: ms(5000) };
    assert_eq!(run(Some(ms(2000)), ms(2000)), (vec![], vec![too_short.clone()], 1));
    let (delays, warnings, puts) = run(None, Duration::ZERO);
    assert_eq!((delays.len(), warnings, puts), (9, vec![too_short], 1), "joined with a warning");
}

#[test]
fn e39_configured_delay_and_expiry_are_sent() {
    let config = OwnConfig { leave_delay: ms(123_456), expires: ms(1_234_567), ..js() };
    let mut call = Call::joining(config, alice());
    call.run(0, obliging);
    assert_eq!(call.log[0].1, Asked::Schedule { delay: ms(123_456), form: UNSTABLE });
    assert_eq!(call.puts()[0].1["expires"], 1_234_567);
}

#[test]
fn e40_server_without_delayed_events_gets_short_expiry_and_frequent_refresh() {
    let mut call = Call::unread(OwnConfig::default());
    call.input(Input::Join(alice()));
    call.run(HOUR, |n, request| match request {
        Asked::Support => Answered(Ok(MatrixReply::Support(support(None)))),
        Asked::Put { .. } => obliging(n, request),
        _ => panic!("{request:?}"),
    });
    let warning =
        Event::DelayedLeaveUnavailable { reason: NoDelayedLeave::NotSupported, listed_for: ms(600_000) };
    assert_eq!(call.events.iter().filter(|(_, event)| *event == warning).count(), 1);
    let puts = call.puts();
    assert_eq!(puts.len(), 13, "every 5 min");
    for (at, content) in puts {
        let until = content.get("created_ts").map_or(START, |created| created.as_u64().unwrap())
            + content["expires"].as_u64().unwrap();
        assert!((START + at + 600_000..START + at + 1_200_000).contains(&until), "{at}: {content}");
    }
    assert_eq!((call.own.status(), call.ended()), (Status::Connected, None));
}

#[test]
fn e41_refused_schedule_joins_without_leave() {
    let mut call = Call::joining(js(), alice());
    call.run(0, but(Asked::is_schedule, || error(refused(601))));
    assert_eq!(
        (call.puts().len(), call.warnings(), call.ended()),
        (1, vec![&NoDelayedLeave::Refused(refused(601))], None)
    );
    assert_eq!(call.puts()[0].1["expires"], 600_000);
}

#[test]
fn e41_broken_server_fails_the_join_at_its_deadline() {
    let mut call =
        Call::joining(OwnConfig { network_retry: ms(1000), join_timeout: ms(7500), ..js() }, alice());
    call.run(60_000, |_, _| error(network()));
    assert_eq!(call.times(Asked::is_schedule), [0, 1000, 2000, 3000, 4000, 5000, 6000, 7000]);
    assert!(call.puts().is_empty());
    let (at, reason) = call.ended().unwrap();
    let expected = EndReason::JoinTimedOut { after: ms(7500), doing: Task::ScheduleLeave, error: network() };
    assert_eq!((at, reason), (7500, &expected));
    assert!(reason.to_string().contains("scheduling our delayed leave"), "{reason}");
    assert_eq!(call.own.status(), Status::Disconnected);
}

#[test]
fn silent_server_fails_the_join_at_its_deadline() {
    let mut call = Call::joining(OwnConfig::default(), alice());
    call.run(60_000, |_, _| Never);
    let (at, reason) = call.ended().unwrap();
    assert!(matches!(reason, EndReason::JoinTimedOut { error: RequestError::TimedOut, .. }), "{reason:?}");
    assert_eq!((at, call.own.status()), (30_000, Status::Disconnected));
}

#[test]
fn join_waits_for_rate_limit_as_told() {
    let mut call = Call::joining(OwnConfig::default(), alice());
    let mut puts = 0;
    call.run(70_000, |n, request| {
        puts += usize::from(request.is_put());
        if request.is_put() && puts == 1 { error(limited(Some(60_000))) } else { obliging(n, request) }
    });
    assert_eq!((call.times(Asked::is_put), call.own.status()), (vec![0, 60_000], Status::Connected));
    // The delayed leave would have fired before the join event.
    assert_eq!(call.times(Asked::is_schedule), [0, 16_000, 32_000, 48_000]);
}

#[test]
fn e42_rate_limit_beyond_patience_fails_the_join_at_once() {
    let mut call = Call::joining(OwnConfig::default(), alice());
    call.run(60_000, but(Asked::is_put, || error(limited(Some(3_600_000)))));
    assert_eq!(call.ended(), Some((0, &EndReason::RateLimited { retry_after: ms(3_600_000) })));
    let mut call = Call::joining(OwnConfig::default(), alice());
    call.run(HOUR, but(Asked::is_put, || error(limited(Some(2000)))));
    assert_eq!(call.ended(), Some((118_000, &EndReason::RateLimited { retry_after: ms(2000) })));
    assert_eq!(call.requests().iter().filter(|r| r.is_leave()).count(), 0, "nothing was published");
}

#[test]
fn limited_schedule_delays_the_join_for_thirty_seconds_at_most() {
    let mut call = Call::joining(OwnConfig::default(), alice());
    call.run(60_000, but(Asked::is_schedule, || error(limited(Some(2000)))));
    assert_eq!(call.warnings(), [&NoDelayedLeave::Refused(limited(Some(2000)))]);
    assert_eq!((call.times(Asked::is_put), call.own.status()), (vec![28_000], Status::Connected));
}

#[test]
fn forbidden_membership_fails_the_join_with_advice() {
    let mut call = Call::joining(OwnConfig::default(), alice());
    call.run(60_000, but(Asked::is_put, || error(forbidden())));
    let (at, reason) = call.ended().unwrap();
    assert_eq!(at, 0);
    assert!(matches!(reason, EndReason::NotPermitted { event_type: wire::STATE_TYPE, .. }), "{reason:?}");
    assert!(reason.to_string().contains("power levels"), "{reason}");
    assert_eq!(call.requests()[2..], [Asked::cancel("delay1")], "nothing to leave, nothing that fires");
    assert_eq!(call.statuses().last(), Some(&Status::Disconnected));
}

#[test]
fn logged_out_session_ends_at_once() {
    for joined in [false, true] {
        let mut call = Call::joining(OwnConfig::default(), alice());
        if joined {
            call.run(0, obliging);
        }
        call.run(60_000, |_, _| error(RequestError::LoggedOut));
        assert_eq!(call.ended().unwrap().1, &EndReason::LoggedOut);
        assert_eq!(call.events.last().unwrap().1, Event::Status(Status::Disconnected));
        assert_eq!(call.own.poll(call.now), Output::Idle);
    }
}

#[test]
fn e43_leave_before_anything_was_published_asks_nothing() {
    let mut call = Call::joining(js(), alice());
    call.run(1, |_, _| error(limited(Some(1000))));
    call.input(Input::Leave);
    call.run(10_000, obliging);
    assert_eq!((call.log.len(), call.times(Asked::is_schedule).len()), (1, 1));
    use Status::{Connecting, Disconnected, Disconnecting};
    assert_eq!(call.statuses(), [Connecting, Disconnecting, Disconnected]);
}

#[test]
fn e44_sync_without_us_does_not_disturb_joining() {
    let mut call = Call::joining(js(), alice());
    call.run(500, |_, _| error(limited(Some(1000))));
    call.missing();
    call.run(1000, obliging);
    assert_eq!((call.times(Asked::is_schedule), call.times(Asked::is_put)), (vec![0, 1000], vec![1000]));
}

#[test]
fn e48_joining_twice_is_joining_once() {
    let mut call = Call::joining(js(), alice());
    call.input(Input::Join(alice()));
    call.run(0, obliging);
    call.input(Input::Join(alice()));
    call.run(1, obliging);
    assert_eq!(call.times(Asked::is_put).len(), 1);
}

// The form of the delayed leave.

#[test]
fn support_is_read_once_per_session() {
    let mut call = Call::unread(OwnConfig::default());
    for _ in 0..2 {
        call.input(Input::Join(alice()));
        call.run(0, obliging);
        call.input(Input::Leave);
        call.run(0, obliging);
    }
    assert_eq!(call.requests().iter().filter(|r| **r == Asked::Support).count(), 1);
    assert_eq!(call.log[0].1, Asked::Support);
}

#[test]
fn missing_endpoints_lead_to_the_probe_before_the_query_parameter() {
    let mut call = Call::unread(OwnConfig::default());
    call.input(Input::Support(support(Some(ApiVersion::Stable))));
    call.input(Input::Join(alice()));
    let old_server = |n: usize, request: &Asked| match request {
        Asked::Schedule { form: ScheduleForm::Dedicated(_), .. } => error(RequestError::Unsupported),
        _ => obliging(n, request),
    };
    call.run(0, old_server);
    let delay = ms(18_000);
    let expected = [
        Asked::Schedule { delay, form: STABLE },
        Asked::Schedule { delay, form: UNSTABLE },
        Asked::Probe,
        Asked::Schedule { delay, form: ScheduleForm::QueryParameter },
    ];
    assert_eq!(call.requests()[..4], expected);
    assert!(call.log[4].1.is_put());
    // The answer is kept for the session, and used again while joined.
    call.log.clear();
    let mut gone = true;
    call.run(4000, |n, request| {
        if request.is_restart() && std::mem::take(&mut gone) {
            error(RequestError::NotFound)
        } else {
            old_server(n, request)
        }
    });
    assert_eq!(call.log[1].1, expected[3]);
}

#[test]
fn probe_without_a_clear_yes_means_no_delayed_leave() {
    for answer in [
        || Answered(Ok(MatrixReply::DelayParameter(false))),
        || error(forbidden()),
        || error(RequestError::Unsupported),
    ] {
        let mut call = Call::joining(OwnConfig::default(), alice());
        call.run(HOUR, |n, request| match request {
            Asked::Schedule { form: ScheduleForm::QueryParameter, .. } => panic!("this could leave"),
            Asked::Schedule { .. } => error(RequestError::Unsupported),
            Asked::Probe => answer(),
            _ => obliging(n, request),
        });
        assert_eq!(
            (call.warnings(), call.own.status()),
            (vec![&NoDelayedLeave::NotSupported], Status::Connected)
        );
    }
}

/// Once the leave was sent at once, twelve times, and then the join failed.
#[test]
fn leave_sent_at_once_is_asked_for_once_and_the_join_succeeds() {
    for own in [alice(), sticky_alice()] {
        let mut call = Call::joining(OwnConfig::default(), own);
        let ignores_delay = |n: usize, request: &Asked| match request {
            Asked::Schedule { .. } => Answered(Ok(MatrixReply::Sent { event_id: event_id(n) })),
            _ => obliging(n, request),
        };
        call.run(10, ignores_delay);
        call.listed();
        call.run(HOUR, ignores_delay);
        assert_eq!(
            (call.own.status(), call.warnings()),
            (Status::Connected, vec![&NoDelayedLeave::SentAtOnce])
        );
        // Neither after a lost membership nor at the next join of the session.
        call.missing();
        call.run(2 * HOUR, ignores_delay);
        call.input(Input::Leave);
        call.run(2 * HOUR + 5000, ignores_delay);
        call.input(Input::Join(OwnDescription {
            member_id: MemberId("second".to_owned()),
            ..sticky_alice()
        }));
        call.run(2 * HOUR + 10_000, ignores_delay);
        assert_eq!(call.times(Asked::is_schedule), [0], "{:?}", call.log);
        assert!(call.times(Asked::is_put).len() > 3);
        assert_eq!(call.ended(), None);
    }
}

#[test]
fn join_event_after_a_leave_sent_at_once_has_its_duration_and_a_later_time() {
    let mut call = Call::joining(OwnConfig::default(), sticky_alice());
    call.run(10, |n, request| match request {
        Asked::Schedule { .. } => Answered(Ok(MatrixReply::Sent { event_id: event_id(n) })),
        _ => obliging(n, request),
    });
    let Asked::Put { sticky, content } = &call.log[1].1 else { panic!("{:?}", call.log) };
    assert_eq!((*sticky, &content["sticky_key"], call.log[1].0), (Some(ms(HOUR)), &json!("first"), 1));
}

#[test]
fn long_leave_sent_at_once_makes_us_rejoin_without_one() {
    let mut call = Call::joined(OwnConfig::default());
    call.input(Input::OfferDelegation);
    call.run(60_000, |n, request| match request {
        Asked::Schedule { .. } => Answered(Ok(MatrixReply::Sent { event_id: event_id(n) })),
        _ => obliging(n, request),
    });
    assert_eq!((call.times(Asked::is_schedule), call.puts().len()), (vec![0], 1));
    assert_eq!(call.puts()[0].1.get("created_ts"), None);
    assert!(call.requests().contains(&Asked::cancel("delay1")));
    assert_eq!((call.warnings(), call.own.status()), (vec![&NoDelayedLeave::SentAtOnce], Status::Connected));
}

#[test]
fn endpoint_that_vanishes_while_joined_is_searched_for_at_the_next_rejoin() {
    let mut call = Call::joined(OwnConfig::default());
    let vanished = |n: usize, request: &Asked| match request {
        Asked::Schedule { .. } => error(RequestError::Unsupported),
        Asked::Probe => panic!("not while joined"),
        Asked::Update { .. } => error(RequestError::NotFound),
        _ => obliging(n, request),
    };
    call.run(60_000, vanished);
    assert!(
        call.requests()
            .iter()
            .filter(|r| r.is_schedule())
            .all(|r| { matches!(r, Asked::Schedule { form, .. } if *form == UNSTABLE) })
    );
    assert!((3..10).contains(&call.times(Asked::is_schedule).len()), "{:?}", call.times(Asked::is_schedule));
    call.log.clear();
    call.missing();
    call.run(60_001, |n, request| match request {
        Asked::Schedule { form: ScheduleForm::Dedicated(_), .. } => error(RequestError::Unsupported),
        _ => obliging(n, request),
    });
    let expected = [
        Asked::Support,
        Asked::Schedule { delay: ms(18_000), form: UNSTABLE },
        Asked::Probe,
        Asked::Schedule { delay: ms(18_000), form: ScheduleForm::QueryParameter },
    ];
    assert_eq!(call.requests()[..4], expected);
    assert_eq!(call.own.status(), Status::Connected);
}

// Restart and refresh.

#[test]
fn e45_limited_restart_is_repeated() {
    let mut call = Call::joining(js(), alice());
    let mut restarts = 0;
    call.run(2500, |n, request| {
        restarts += usize::from(request.is_restart());
        if request.is_restart() && restarts <= 2 { error(limited(Some(1000))) } else { obliging(n, request) }
    });
    assert_eq!((call.times(Asked::is_restart), call.puts().len()), (vec![0, 1000, 2000], 1));
}

#[test]
fn e46_delayed_leave_is_restarted_steadily() {
    let config = OwnConfig { restart_interval: ms(10_000), leave_delay: ms(30_000), ..js() };
    let mut call = Call::joining(config, alice());
    call.run(110_000, obliging);
    assert_eq!(call.times(Asked::is_restart), (0..12).map(|n| n * 10_000).collect::<Vec<_>>());
    assert_eq!(call.times(Asked::is_schedule).len(), 1);
}

#[test]
fn e47_every_refresh_moves_the_expiry() {
    for headroom in [5000, 1000] {
        let config = OwnConfig { expires: ms(10_000), expires_headroom: ms(headroom), ..js() };
        let mut call = Call::joining(config, alice());
        call.run(119_999, obliging);
        let puts = call.puts();
        assert_eq!(puts.len(), 13);
        for (n, (at, content)) in puts.iter().enumerate() {
            let n = n as u64;
            assert_eq!(*at, if n == 0 { 0 } else { n * 10_000 - headroom });
            assert_eq!(content["expires"], 10_000 * (n + 1));
            assert_eq!(content.get("created_ts").is_some(), n > 0);
        }
    }
}

#[test]
fn every_refresh_of_a_long_call_covers_four_more_hours() {
    let mut call = Call::joining(OwnConfig::default(), alice());
    call.run(100 * HOUR, obliging);
    let puts = call.puts();
    assert_eq!(puts.len(), 101);
    for (at, content) in puts {
        let created = content.get("created_ts").map_or(START, |created| created.as_u64().unwrap());
        assert_eq!(created, START);
        assert!(created + content["expires"].as_u64().unwrap() >= START + at + 4 * HOUR);
    }
}

#[test]
fn e60_dropped_leave_is_replaced_before_a_refresh() {
    let mut call = Call::joined(js());
    call.run(3_594_999, obliging);
    call.log.clear();
    let mut gone = true;
    call.run(3_595_000, |n, request| {
        if request.is_restart() && std::mem::take(&mut gone) {
            error(RequestError::NotFound)
        } else {
            obliging(n, request)
        }
    });
    let kinds = call.requests();
    assert!(kinds[0].is_restart() && kinds[1].is_schedule() && kinds[2].is_put(), "{kinds:?}");
    assert!(call.puts()[0].1.get("created_ts").is_some(), "a refresh, not a rejoin");
}

#[test]
fn refresh_waits_until_the_leave_is_known_to_be_alive() {
    let mut call = Call::joined(js());
    call.run(3_590_000, obliging);
    call.log.clear();
    call.run(3_597_000, but(Asked::is_restart, || error(network())));
    assert!(call.puts().is_empty() && !call.times(Asked::is_restart).is_empty());
    call.run(3_600_000, obliging);
    assert_eq!(call.puts().len(), 1);
}

// Trouble.

#[test]
fn homeserver_that_fails_fast_for_15_s_does_not_end_the_call() {
    let mut call = Call::joined(OwnConfig::default());
    call.run(5000, obliging);
    call.run(20_000, |_, _| error(network()));
    call.run(60_000, obliging);
    assert_eq!((call.own.status(), call.ended(), call.statuses()), (Status::Connected, None, vec![]));
    let since = UnixMillis(START + 8000);
    let trouble = Event::Trouble { doing: Task::RestartLeave, error: network(), since };
    assert_eq!(call.events[0], (8000, trouble));
    let (at, last) = call.events.last().unwrap();
    assert_eq!((*last == Event::Recovered, *at < 25_000), (true, true), "{:?}", call.events);
    let recent = call.log.iter().filter(|(at, _)| (5000..20_000).contains(at)).count();
    assert!(recent < 8, "backs off");
}

/// Case 03: the homeserver is away for 25 s behind its proxy, and sends our leave meanwhile.
#[test]
fn homeserver_that_restarts_during_a_call_gets_the_membership_again() {
    let mut call = Call::joined(OwnConfig::default());
    call.run(6000, obliging);
    call.run(31_000, |_, _| error(network()));
    call.log.clear();
    call.run(60_000, |n, request| match request {
        Asked::Update { id, .. } if id == "delay1" => error(RequestError::NotFound),
        _ => obliging(n, request),
    });
    assert_eq!((call.own.status(), call.ended()), (Status::Connected, None));
    assert_eq!((call.times(Asked::is_schedule).len(), call.puts().len()), (1, 1));
    assert!(call.puts()[0].0 < 41_000, "within the longest backoff");
    assert_eq!(call.probably_left().iter().map(|(_, left)| *left).collect::<Vec<_>>(), [true, false]);
    assert_eq!(call.events.last().unwrap().1, Event::Recovered);
}

/// Case 04: every restart is answered 429 for 40 s.
#[test]
fn limited_restarts_wait_as_told_and_the_call_goes_on() {
    let mut call = Call::joined(OwnConfig::default());
    call.run(6000, obliging);
    call.log.clear();
    call.run(46_000, but(Asked::is_restart, || error(limited(Some(3000)))));
    let restarts = call.times(Asked::is_restart);
    assert!(restarts.windows(2).all(|pair| pair[1] - pair[0] >= 3000), "{restarts:?}");
    // The leave fired at 22 s, which a sync shows.
    call.missing();
    call.run(60_000, obliging);
    assert_eq!((call.own.status(), call.ended(), call.puts().len()), (Status::Connected, None, 1));
}

#[test]
fn refused_upkeep_is_retried_for_as_long_as_the_call_lasts() {
    for refusal in [forbidden(), refused(400), RequestError::Unsupported, RequestError::NotFound] {
        let mut call = Call::joined(OwnConfig::default());
        call.run(10_000, obliging);
        call.input(Input::SetIntent(Some("video".to_owned())));
        let answer = |_: usize, request: &Asked| match request {
            Asked::Schedule { .. } => scheduled("again"),
            _ => error(refusal.clone()),
        };
        call.run(2 * HOUR, answer);
        assert_eq!(call.ended(), None, "{refusal:?}");
        let puts = call.times(Asked::is_put);
        assert!(puts.len() > 3 && puts.len() < 300, "{refusal:?}: {}", puts.len());
        call.missing();
        call.run(2 * HOUR + 120_000, obliging);
        assert_eq!(call.own.status(), Status::Connected, "{refusal:?}");
    }
}

#[test]
fn each_kind_of_trouble_is_told_once() {
    let mut call = Call::joined(OwnConfig::default());
    let mut n = 0;
    call.run(600_000, |_, _| {
        n += 1;
        error(if n % 2 == 0 { network() } else { limited(Some(1000)) })
    });
    let troubles = call.events.iter().filter(|(_, event)| matches!(event, Event::Trouble { .. })).count();
    assert_eq!(troubles, 2);
    call.run(660_000, obliging);
    assert_eq!(call.events.last().unwrap().1, Event::Recovered);
}

#[test]
fn e49_lost_leave_and_lost_membership_are_one_rejoin() {
    let mut call = Call::joined(js());
    call.run(14_999, obliging);
    call.log.clear();
    call.run(15_000, |_, request| if request.is_restart() { Never } else { panic!("{request:?}") });
    call.missing();
    call.run(15_001, |n, request| match request {
        Asked::Update { action: DelayedAction::Cancel, .. } => error(RequestError::NotFound),
        _ => obliging(n, request),
    });
    assert_eq!((call.times(Asked::is_schedule).len(), call.puts().len()), (1, 1));
    assert_eq!(call.puts()[0].1.get("created_ts"), None);
}

#[test]
fn e50_only_a_sync_without_us_makes_us_rejoin() {
    let mut call = Call::joined(js());
    call.listed();
    call.run(1, obliging);
    assert_eq!(call.log, []);
    call.missing();
    call.run(2, obliging);
    let kinds = call.requests();
    assert_eq!(kinds[0], Asked::cancel("delay1"));
    assert!(kinds[1].is_schedule() && kinds[2].is_put() && kinds[3].is_restart(), "{kinds:?}");
    assert_eq!(call.statuses(), [Status::Connecting, Status::Connected]);
}

#[test]
fn late_sync_is_not_a_lost_membership() {
    let mut call = Call::joining(OwnConfig::default(), alice());
    call.run(100, obliging);
    call.log.clear();
    call.missing();
    call.run(3_000, obliging);
    call.listed();
    call.run(20_000, obliging);
    assert!(call.puts().is_empty());
}

#[test]
fn rejoins_that_no_sync_shows_become_rare() {
    let mut call = Call::joining(OwnConfig::default(), alice());
    for second in 0..600 {
        call.run(second * 1000, obliging);
        call.missing();
    }
    // 5, 10, 20, 40, 80, 160, 320 s apart.
    assert!((5..9).contains(&call.puts().len()), "{:?}", call.times(Asked::is_put));
}

#[test]
fn rejoins_whose_leave_is_final_at_once_become_rare() {
    let mut call = Call::sticky();
    call.run(600_000, but(Asked::is_restart, || error(RequestError::AlreadyFinal)));
    assert!((5..20).contains(&call.puts().len()), "{:?}", call.times(Asked::is_put));
    assert_eq!(call.ended(), None);
}

#[test]
fn rejoin_does_not_wait_for_a_delayed_leave_that_cannot_be_scheduled() {
    let mut call = Call::joined(OwnConfig::default());
    call.run(10_000, obliging);
    call.missing();
    call.run(12_000, but(Asked::is_schedule, || error(network())));
    assert_eq!((call.puts().len(), call.own.status()), (1, Status::Connected));
    call.run(30_000, obliging);
    assert!(call.times(Asked::is_restart).last() > Some(&20_000), "the delayed leave followed");
}

#[test]
fn e51_nothing_is_asked_outside_a_call() {
    let mut call = Call::new(js());
    for input in [
        Input::OwnSeen(OwnSighting::Missing),
        Input::OwnSeen(OwnSighting::Listed { created: Some(UnixMillis(1)) }),
        Input::OwnSeen(OwnSighting::NotSticky),
        Input::SetIntent(Some("audio".to_owned())),
        Input::SetTransports(on("https://other.example")),
        Input::SetDescription(sticky_alice()),
        Input::Renew,
        Input::Leave,
        Input::SlotClosed,
        Input::Redacted { by: user_id!("@bob:example.org").to_owned() },
        Input::Reply { id: RequestId(7), result: Ok(MatrixReply::Done) },
    ] {
        call.input(input);
    }
    call.run(100_000_000, |_, request| panic!("{request:?}"));
    assert_eq!(call.events, []);
}

#[test]
fn e54_every_change_of_status_is_told_once() {
    let mut call = Call::joining(js(), alice());
    call.run(60_000, obliging);
    call.input(Input::Leave);
    call.run(61_000, obliging);
    use Status::{Connected, Connecting, Disconnected, Disconnecting};
    assert_eq!(call.statuses(), [Connecting, Connected, Disconnecting, Disconnected]);
}

#[test]
fn e55_silence_until_the_leave_fires_is_probably_left() {
    let mut call = Call::joined(OwnConfig { leave_delay: ms(10_000), ..js() });
    call.run(5000, but(Asked::is_restart, || Never));
    assert_eq!((call.times(Asked::is_restart).len(), call.probably_left()), (1, vec![]));
    call.run(9999, but(Asked::is_restart, || Never));
    assert_eq!((call.times(Asked::is_restart), call.probably_left()), (vec![5000, 7000, 9000], vec![]));
    call.run(10_000, but(Asked::is_restart, || Never));
    assert_eq!((call.times(Asked::is_restart).len(), call.probably_left()), (4, vec![(10_000, true)]));
    // The homeserver is back; it sent our leave long ago.
    call.log.clear();
    call.run(12_000, obliging);
    call.missing();
    call.run(12_000, obliging);
    assert_eq!((call.times(Asked::is_schedule).len(), call.puts().len()), (1, 1));
    assert_eq!(call.probably_left(), [(10_000, true), (12_000, false)]);
}

#[test]
fn lost_reply_does_not_stop_the_machine() {
    let mut call = Call::joined(js());
    call.run(5000, |_, _| Never);
    call.unanswered.clear();
    call.run(30_000, obliging);
    assert!(call.times(Asked::is_restart).len() > 3);
    assert_eq!((call.own.status(), call.ended()), (Status::Connected, None));
}

// Sleep.

#[test]
fn e60_device_that_slept_past_its_leave_rejoins_from_scratch() {
    for gone in [RequestError::NotFound, RequestError::AlreadyFinal] {
        let mut call = Call::joined(OwnConfig::default());
        call.run(1000, obliging);
        call.sleep(2 * HOUR);
        call.input(Input::SetIntent(Some("video".to_owned())));
        let mut first = true;
        call.run(1001, |n, request| {
            if request.is_restart() && std::mem::take(&mut first) {
                error(gone.clone())
            } else {
                obliging(n, request)
            }
        });
        assert!(call.log[0].1.is_restart() && call.log[1].1.is_schedule(), "{:?}", call.log);
        let puts = call.puts();
        assert_eq!((puts.len(), puts[0].1.get("created_ts")), (1, None), "a rejoin from scratch");
    }
}

#[test]
fn device_that_slept_without_network_does_not_list_itself_before_the_check() {
    let mut call = Call::joined(OwnConfig::default());
    call.run(1000, obliging);
    call.sleep(60_000);
    call.input(Input::SetIntent(Some("video".to_owned())));
    call.run(10_000, but(Asked::is_restart, || error(network())));
    assert!(call.puts().is_empty() && call.times(Asked::is_restart).len() > 2);
    call.run(30_000, obliging);
    assert_eq!(call.puts().len(), 1);
}

#[test]
fn short_sleep_only_checks_the_leave() {
    let mut call = Call::joined(OwnConfig::default());
    call.run(1000, obliging);
    call.sleep(5000);
    call.run(1001, obliging);
    assert_eq!(call.log, [(1000, Asked::restart("delay1"))]);
}

#[test]
fn sleep_without_a_delayed_leave_brings_the_refresh_forward() {
    let mut call = Call::unread(OwnConfig::default());
    call.input(Input::Support(support(None)));
    call.input(Input::Join(alice()));
    call.run(1000, obliging);
    call.sleep(HOUR);
    call.run(1001, obliging);
    let (at, content) = call.puts().pop().unwrap();
    assert_eq!(at, 1000);
    assert!(content["expires"].as_u64().unwrap() >= HOUR + 600_000);
}

// Updates.

#[test]
fn e56_new_intent_keeps_the_creation_time_that_peers_know() {
    let mut call = Call::joining(js(), alice());
    call.run(0, obliging);
    call.input(Input::OwnSeen(OwnSighting::Listed { created: Some(UnixMillis(START + 70)) }));
    call.input(Input::SetIntent(Some("audio".to_owned())));
    call.run(100, obliging);
    call.log.clear();
    call.input(Input::SetIntent(Some("audio".to_owned())));
    call.run(200, obliging);
    assert_eq!(call.log, []);
    call.input(Input::SetIntent(Some("video".to_owned())));
    call.run(300, obliging);
    assert_eq!(call.log.len(), 1);
    let content = &call.puts()[0].1;
    assert_eq!((&content["created_ts"], &content["m.call.intent"]), (&json!(START + 70), &json!("video")));
}

#[test]
fn intent_that_changes_while_joining_is_published() {
    let mut call = Call::joining(js(), alice());
    call.run(0, but(Asked::is_put, || Never));
    call.input(Input::SetIntent(Some("audio".to_owned())));
    let (_, id) = call.unanswered.pop().unwrap();
    call.input(Input::Reply { id, result: Ok(MatrixReply::Done) });
    call.run(0, obliging);
    assert_eq!(call.puts().last().unwrap().1["m.call.intent"], "audio");
}

#[test]
fn e57_intent_change_after_hours_does_not_shorten_our_life() {
    let mut call = Call::joining(OwnConfig::default(), alice());
    call.run(5 * HOUR, obliging);
    call.log.clear();
    call.input(Input::SetIntent(Some("video".to_owned())));
    call.run(5 * HOUR, obliging);
    let content = &call.puts()[0].1;
    let until = content["created_ts"].as_u64().unwrap() + content["expires"].as_u64().unwrap();
    assert!(until > call.now.unix.0 + 4 * HOUR - 60_000);
}

#[test]
fn creation_time_of_the_membership_before_ours_is_not_taken() {
    let mut call = Call::joined(js());
    for created in [START + 70, START - HOUR] {
        call.input(Input::OwnSeen(OwnSighting::Listed { created: Some(UnixMillis(created)) }));
    }
    call.input(Input::SetIntent(Some("audio".to_owned())));
    call.run(1, obliging);
    assert_eq!(call.puts()[0].1["created_ts"], START + 70);
}

#[test]
fn renewal_changes_the_creation_time() {
    let mut call = Call::joined(js());
    call.input(Input::OwnSeen(OwnSighting::Listed { created: Some(UnixMillis(START + 5_000)) }));
    call.run(10, obliging);
    call.log.clear();
    call.input(Input::Renew);
    call.input(Input::Renew);
    call.run(20, obliging);
    assert_eq!(call.puts().len(), 1);
    assert_eq!(call.puts()[0].1["created_ts"], START + 5_001, "later than before, whatever our clock says");
    call.run(10_000, obliging);
    call.input(Input::Renew);
    call.run(10_000, obliging);
    assert_eq!(call.puts().last().unwrap().1["created_ts"], START + 10_000);
}

#[test]
fn renewal_is_ignored_where_the_oldest_member_decides() {
    let mut call =
        Call::joined_as(OwnConfig::default(), OwnDescription { mode: MembershipMode::Legacy, ..alice() });
    call.input(Input::Renew);
    call.run(1, obliging);
    assert_eq!(call.log, []);
}

#[test]
fn moved_focus_is_published_with_the_same_creation_time() {
    let mut call = Call::joined(OwnConfig::default());
    call.input(Input::OwnSeen(OwnSighting::Listed { created: Some(UnixMillis(START + 70)) }));
    call.input(Input::SetTransports(on("https://other.example")));
    call.run(1, obliging);
    let content = &call.puts()[0].1;
    assert_eq!(content["created_ts"], START + 70);
    assert_eq!(content["foci_preferred"][0]["livekit_service_url"], "https://other.example");
    assert_eq!(call.log.len(), 1);
}

#[test]
fn description_of_the_same_membership_is_an_update() {
    let mut call = Call::joined(OwnConfig::default());
    call.input(Input::SetDescription(OwnDescription { mode: MembershipMode::Legacy, ..alice() }));
    call.run(1, obliging);
    assert_eq!(call.puts()[0].1["focus_active"]["focus_selection"], "oldest_membership");
    assert_eq!(call.log.len(), 1);
    assert_eq!(call.statuses(), []);
}

#[test]
fn description_of_another_form_leaves_and_joins() {
    let mut call = Call::joined(OwnConfig::default());
    call.input(Input::SetDescription(sticky_alice()));
    call.run(1, obliging);
    let kinds = call.requests();
    assert_eq!(kinds[0], Asked::send("delay1"));
    assert!(kinds[1].is_schedule());
    assert!(matches!(kinds[2], Asked::Put { sticky: Some(_), .. }), "{kinds:?}");
    call.listed();
    call.run(1, obliging);
    assert_eq!(call.statuses(), [Status::Connecting, Status::Connected], "no end in between");
}

// Leaving.

#[test]
fn e52_leave_sends_the_delayed_leave() {
    let mut call = Call::joined(js());
    call.input(Input::Leave);
    call.run(10_000, obliging);
    assert_eq!(call.log, [(0, Asked::send("delay1"))]);
    assert!(call.own.delayed.is_none() && call.own.description().is_none());
}

#[test]
fn e52_leave_is_written_if_sending_fails() {
    for (failure, kept) in
        [(refused(500), true), (RequestError::NotFound, false), (RequestError::AlreadyFinal, false)]
    {
        let mut call = Call::joined(js());
        call.input(Input::Leave);
        call.run(0, |n, request| match request {
            Asked::Update { action: DelayedAction::Send, .. } => error(failure.clone()),
            _ => obliging(n, request),
        });
        assert_eq!(call.log.last(), Some(&(0, Asked::Leave { content: json!({}), sticky: None })));
        assert_eq!((call.own.delayed.is_some(), call.own.status()), (kept, Status::Disconnected));
        // What is left of it cannot end the next membership.
        call.log.clear();
        call.input(Input::Join(alice()));
        call.run(0, obliging);
        assert_eq!(call.log[0].1 == Asked::cancel("delay1"), kept);
    }
}

#[test]
fn leave_is_bounded() {
    for own in [alice(), sticky_alice()] {
        for (refusal, name) in [
            (None, "silence"),
            (Some(network()), "network"),
            (Some(limited(Some(HOUR))), "limited"),
            (Some(forbidden()), "refused"),
        ] {
            let mut call = Call::joined_as(OwnConfig::default(), own.clone());
            call.input(Input::Leave);
            call.run(60_000, |_, _| refusal.clone().map_or(Never, error));
            let (at, last) = call.events.last().unwrap();
            assert_eq!(*last, Event::Status(Status::Disconnected), "{name}");
            assert!(*at <= 5_000, "{name}: {at}");
            let kinds = call.requests();
            assert!(kinds.iter().any(Asked::is_leave), "{name}: both ways");
            assert!(kinds.contains(&Asked::send("delay1")), "{name}: both ways");
        }
    }
}

#[test]
fn leave_waits_for_a_publication_under_way_and_ends_it() {
    let mut call = Call::joining(js(), alice());
    call.run(0, but(Asked::is_put, || Never));
    call.input(Input::Leave);
    call.run(500, |_, request| panic!("{request:?} races with the publication"));
    let (_, id) = call.unanswered.pop().unwrap();
    call.input(Input::Reply { id, result: Ok(MatrixReply::Done) });
    call.run(500, obliging);
    assert_eq!(call.log.last().unwrap().1, Asked::send("delay1"));
    assert_eq!(call.own.status(), Status::Disconnected);
}

#[test]
fn delayed_leave_that_comes_to_light_late_is_cancelled() {
    let mut call = Call::joining(js(), alice());
    call.run(0, |_, _| Never);
    let (_, id) = call.unanswered.pop().unwrap();
    call.input(Input::Leave);
    call.run(30_000, |_, request| panic!("{request:?}"));
    assert_eq!(call.own.status(), Status::Disconnected);
    call.input(Input::Reply {
        id,
        result: Ok(MatrixReply::Scheduled { delay_id: DelayId("late".to_owned()) }),
    });
    call.run(30_001, obliging);
    assert_eq!(call.log.last().unwrap().1, Asked::cancel("late"));
}

#[test]
fn join_while_leaving_follows_the_leave() {
    let mut call = Call::joined(js());
    call.input(Input::Leave);
    call.input(Input::Join(alice()));
    call.run(0, obliging);
    use Status::{Connected, Connecting, Disconnected, Disconnecting};
    assert_eq!(call.statuses(), [Disconnecting, Disconnected, Connecting, Connected]);
}

#[test]
fn redaction_by_another_ends_the_session() {
    let mut call = Call::joined(OwnConfig::default());
    let mut event = state_event("@alice:example.org", START, state_content("AAAAAAA"));
    event.event_id = Some(event_id(2));
    event.content = json!({});
    event.redacted_by = Some(user_id!("@alice:example.org").to_owned());
    let missing = Input::OwnSeen(OwnSighting::Missing);
    assert_eq!(call.own.sighting(&[event.clone()], &[]), Some(missing), "our own redaction is no kick");
    event.redacted_by = Some(user_id!("@mod:example.org").to_owned());
    let redacted = call.own.sighting(&[event], &[]).unwrap();
    let by = user_id!("@mod:example.org").to_owned();
    assert_eq!(redacted, Input::Redacted { by: by.clone() });
    call.input(redacted);
    call.run(HOUR, obliging);
    assert_eq!(call.log, [(0, Asked::send("delay1"))], "left, and not joined again");
    assert_eq!(call.ended(), Some((0, &EndReason::Removed { by })));
    assert_eq!(call.own.status(), Status::Disconnected);
}

// The sticky form.

#[test]
fn e58_sticky_join_schedules_and_publishes_with_one_duration() {
    let mut call = Call::joining(OwnConfig::default(), sticky_alice());
    call.run(0, |n, request| match request {
        Asked::Schedule { .. } => scheduled("leave"),
        _ => obliging(n, request),
    });
    assert!(call.log[0].1.is_schedule() && call.log[2].1 == Asked::restart("leave"), "{:?}", call.log);
    let Asked::Put { content, sticky } = &call.log[1].1 else { panic!("{:?}", call.log) };
    assert_eq!((content["member"]["id"].as_str(), *sticky), (Some("first"), Some(ms(HOUR))));
}

#[test]
fn sticky_membership_is_connected_when_a_sync_shows_it_or_none_does_for_3_s() {
    let mut call = Call::joining(OwnConfig::default(), sticky_alice());
    call.run(1000, obliging);
    assert_eq!(call.own.status(), Status::Connecting);
    call.listed();
    call.run(1000, obliging);
    assert_eq!(call.own.status(), Status::Connected);
    let mut call = Call::joining(OwnConfig::default(), sticky_alice());
    call.run(2999, obliging);
    assert_eq!(call.own.status(), Status::Connecting);
    call.run(3000, obliging);
    assert_eq!(call.own.status(), Status::Connected);
}

#[test]
fn sticky_membership_is_refreshed_well_before_its_end() {
    let mut call = Call::sticky();
    call.run(3 * HOUR - 1, obliging);
    assert_eq!(call.times(Asked::is_put), [2_700_000, 5_400_000, 8_100_000]);
    assert!(call.requests().iter().all(|request| match request {
        Asked::Put { sticky, .. } => *sticky == Some(ms(HOUR)),
        _ => true,
    }));
}

#[test]
fn sticky_membership_without_delayed_events_lasts_ten_minutes() {
    let mut call = Call::unread(OwnConfig::default());
    call.input(Input::Support(support(None)));
    call.input(Input::Join(sticky_alice()));
    call.run(HOUR, obliging);
    call.input(Input::Leave);
    call.run(HOUR + 1000, obliging);
    assert_eq!(call.times(Asked::is_put), (0..=12).map(|n| n * 300_000).collect::<Vec<_>>());
    for request in call.requests() {
        let (Asked::Put { sticky, .. } | Asked::Leave { sticky, .. }) = request else {
            panic!("{request:?}")
        };
        assert_eq!(sticky, Some(ms(600_000)), "one duration for every event of a key");
    }
}

#[test]
fn sends_of_one_key_are_a_millisecond_apart() {
    let mut call = Call::sticky();
    call.run(1000, obliging);
    call.input(Input::SetIntent(Some("audio".to_owned())));
    call.run(1000, obliging);
    call.input(Input::SetIntent(Some("video".to_owned())));
    call.run(1001, obliging);
    call.input(Input::Leave);
    call.run(2000, obliging);
    let writes = call.times(|request| request.is_put() || request.is_leave());
    assert_eq!(writes, [1000, 1001, 1002]);
}

#[test]
fn sticky_leave_is_written_with_its_reason() {
    for (input, code) in [(Input::Leave, "leave"), (Input::SlotClosed, "slot_closed")] {
        let mut call = Call::sticky();
        call.run(1000, obliging);
        call.input(input);
        call.run(1000, obliging);
        let Asked::Leave { content, sticky } = &call.log[0].1 else { panic!("{:?}", call.log) };
        assert_eq!((&content["leave_reason"]["code"], *sticky), (&json!(code), Some(ms(HOUR))));
        assert_eq!(call.requests()[1..], [Asked::cancel("delay1")]);
        let ended = (code == "slot_closed").then_some((1000, &EndReason::SlotClosed));
        assert_eq!((call.ended(), call.own.status()), (ended, Status::Disconnected));
    }
}

#[test]
fn sticky_membership_whose_leave_was_sent_rejoins_under_a_fresh_id() {
    let mut call = Call::sticky();
    call.run(1000, obliging);
    call.log.clear();
    let mut first = true;
    call.run(10_000, |n, request| {
        if request.is_restart() && std::mem::take(&mut first) {
            error(RequestError::AlreadyFinal)
        } else {
            obliging(n, request)
        }
    });
    let id = call.member_id();
    assert_ne!(id, "first");
    assert_eq!(call.events[0].1, Event::MemberIdChanged(MemberId(id.clone())));
    let puts = call.puts();
    assert_eq!((puts.len(), puts[0].0, &puts[0].1["member"]["id"]), (1, 4000, &json!(id)));
    assert_eq!(puts[0].1["sticky_key"], json!(id));
}

#[test]
fn sticky_membership_that_a_sync_does_not_show_is_left_and_joined_under_a_fresh_id() {
    let mut call = Call::sticky();
    call.run(10_000, obliging);
    call.log.clear();
    call.missing();
    call.run(10_001, obliging);
    assert_eq!(call.log[0].1, Asked::send("delay1"), "in case others still see the old id");
    assert_eq!(call.puts()[0].1["member"]["id"], json!(call.member_id()));
    assert_ne!(call.member_id(), "first");
}

#[test]
fn fresh_member_id_is_a_random_uuid() {
    let mut own = machine(OwnConfig::default());
    let (a, b) = (own.fresh_member_id().0, own.fresh_member_id().0);
    assert_ne!(a, b);
    let parts: Vec<_> = a.split('-').map(str::len).collect();
    assert_eq!(parts, [8, 4, 4, 4, 12]);
    assert_eq!(&a[14..15], "4");
    assert!("89ab".contains(&a[19..20]), "{a}");
}

#[test]
fn e59_server_without_sticky_events_asks_for_another_form_before_anything_is_sent() {
    let mut call = Call::unread(OwnConfig::default());
    let none = ServerSupport { sticky_events: false, ..support(Some(ApiVersion::Unstable)) };
    call.input(Input::Support(none));
    call.input(Input::Join(sticky_alice()));
    call.run(1000, |_, request| panic!("{request:?}"));
    assert_eq!(call.events.last().unwrap().1, Event::StickyUnsupported);
    call.input(Input::SetDescription(alice()));
    call.run(1000, obliging);
    assert_eq!(call.own.status(), Status::Connected);
    assert_eq!(call.statuses(), [Status::Connecting, Status::Connected]);
    assert!(call.requests().iter().all(|request| !request.is_leave()));

    let mut call = Call::unread(OwnConfig::default());
    call.input(Input::Support(ServerSupport::default()));
    call.input(Input::Join(sticky_alice()));
    call.run(HOUR, |_, request| panic!("{request:?}"));
    assert_eq!(call.ended(), Some((30_000, &EndReason::StickyUnsupported)));
}

#[test]
fn echo_that_is_not_sticky_leads_to_the_state_form() {
    let mut call = Call::joining(OwnConfig::default(), sticky_alice());
    call.run(100, obliging);
    let mut echo =
        sticky_event("@alice:example.org", START, sticky_content("@alice:example.org", "AAAAAAA", "member"));
    echo.event_id = Some(event_id(2));
    echo.sticky_until = None;
    let sighting = call.own.sighting(&[echo], &[]).unwrap();
    assert_eq!(sighting, Input::OwnSeen(OwnSighting::NotSticky));
    for _ in 0..3 {
        call.input(sighting.clone());
        call.missing();
    }
    call.run(60_000, obliging);
    let told = call.events.iter().filter(|(_, event)| *event == Event::StickyUnsupported).count();
    assert_eq!((told, call.own.status()), (1, Status::Connecting), "not joined before the fallback");
    call.log.clear();
    call.input(Input::SetDescription(alice()));
    call.run(60_001, obliging);
    let kinds = call.requests();
    assert!(matches!(&kinds[0], Asked::Leave { sticky: Some(_), .. }), "{kinds:?}");
    assert_eq!(kinds[1], Asked::cancel("delay1"));
    assert!(kinds[2].is_schedule() && matches!(kinds[3], Asked::Put { sticky: None, .. }), "{kinds:?}");
    assert_eq!(call.own.status(), Status::Connected);
}

#[test]
fn sighting_tells_our_membership_from_others() {
    let call = Call::joined(OwnConfig::default());
    let ours = state_member("@alice:example.org", "AAAAAAA", 7);
    let others = [
        state_member("@alice:example.org", "OTHER", 1),
        state_member("@bob:example.org", "AAAAAAA", 1),
        sticky_member("@alice:example.org", "AAAAAAA", "first", 1),
    ];
    let missing = Some(Input::OwnSeen(OwnSighting::Missing));
    assert_eq!(call.own.sighting(&[], &others), missing);
    let listed = OwnSighting::Listed { created: Some(UnixMillis(7)) };
    assert_eq!(call.own.sighting(&[], &[others[0].clone(), ours]), Some(Input::OwnSeen(listed)));
    let sticky = Call::sticky();
    assert_eq!(
        sticky.own.sighting(&[], &[sticky_member("@alice:example.org", "AAAAAAA", "old", 1)]),
        missing
    );
    assert!(matches!(sticky.own.sighting(&[], &others), Some(Input::OwnSeen(OwnSighting::Listed { .. }))));
}

// Delegation.

/// A call that has handed its delayed leave `delay1` over.
fn delegated() -> Call {
    let mut call = Call::joined(OwnConfig::default());
    call.input(Input::OfferDelegation);
    call.run(1, obliging);
    call
}

/// Like [`obliging`]; a delayed leave is named after its delay in seconds.
fn naming(_: usize, request: &Asked) -> Answer {
    match request {
        Asked::Schedule { delay, .. } => scheduled(&format!("again{}", delay.as_secs())),
        _ => obliging(0, request),
    }
}

#[test]
fn delegated_leave_replaces_the_short_one() {
    let mut call = delegated();
    let expected = [
        Asked::Schedule { delay: ms(HOUR), form: UNSTABLE },
        // After the service has taken the long one.
        Asked::cancel("delay1"),
    ];
    assert_eq!(call.requests(), expected);
    assert_eq!(call.delegated, [(0, "delay1".to_owned(), ms(HOUR))]);
    assert_eq!(call.events, [(0, Event::LeaveDelegated)]);
    call.log.clear();
    call.run(1_000_000, obliging);
    assert_eq!(call.times(Asked::is_restart), [300_000, 600_000, 900_000]);
}

#[test]
fn short_leave_is_kept_alive_until_the_focus_has_the_long_one() {
    let mut call = Call::joined(OwnConfig::default());
    call.service = || Never;
    call.input(Input::OfferDelegation);
    call.run(500_000, naming);
    let mut last = 0;
    for at in call.restarts_of("delay1") {
        assert!(at - last < 18_000, "a gap from {last} to {at}");
        last = at;
    }
    assert!(last > 480_000);
    assert!(!call.requests().contains(&Asked::cancel("delay1")));
    // A service that does not answer is given up, and what it was to keep is cancelled.
    assert_eq!(call.delegated.len(), 8);
    assert!(call.requests().contains(&Asked::cancel("again3600")));
    let failed = Event::DelegationFailed(DelegationError::NotTaken(RequestError::TimedOut));
    assert_eq!(call.events.iter().map(|(_, event)| event).collect::<Vec<_>>(), [&failed]);
}

#[test]
fn focus_that_refuses_changes_nothing() {
    let mut call = Call::joined(OwnConfig::default());
    call.service = || error(refused(400));
    call.input(Input::OfferDelegation);
    call.run(60_000, naming);
    assert_eq!(call.delegated.len(), 1);
    assert!(call.requests().contains(&Asked::cancel("again3600")));
    assert_eq!(call.restarts_of("delay1"), (1..=15).map(|n| n * 4000).collect::<Vec<_>>());
    let failed = Event::DelegationFailed(DelegationError::NotTaken(refused(400)));
    assert_eq!(call.events, [(0, failed)]);
}

#[test]
fn short_leave_that_cannot_be_cancelled_is_kept() {
    let mut call = Call::joined(OwnConfig::default());
    call.input(Input::OfferDelegation);
    call.run(60_000, but(|r| *r == Asked::cancel("delay1"), || error(refused(500))));
    assert_eq!(call.restarts_of("delay1").last(), Some(&60_000));
    assert_eq!(call.events, [(0, Event::DelegationFailed(DelegationError::NotReplaced(refused(500))))]);
}

#[test]
fn delegated_leave_obeys_the_limit_of_the_server() {
    let limited_to = |max: u64| {
        let mut call = Call::joined(OwnConfig::default());
        call.input(Input::OfferDelegation);
        call.run(200_000, |n, request| match request {
            Asked::Schedule { delay, .. } if *delay > ms(max) => {
                error(RequestError::MaxDelayExceeded { max: Some(ms(max)) })
            }
            _ => obliging(n, request),
        });
        call
    };
    let call = limited_to(120_000);
    assert_eq!(call.delegated[0].2, ms(120_000));
    assert_eq!(call.times(Asked::is_restart), [80_000, 160_000], "two thirds of it");
    let too_short = Event::DelegationFailed(DelegationError::LimitTooShort { least: ms(60_000) });
    let call = limited_to(59_999);
    assert!(call.delegated.is_empty());
    assert_eq!(call.events, [(0, too_short.clone())]);
    // A limit that the homeserver names beforehand is not tried.
    let mut call = Call::joined(OwnConfig::default());
    let limits = ServerSupport { max_delay: Some(ms(30_000)), ..support(Some(ApiVersion::Unstable)) };
    call.input(Input::Support(limits));
    call.input(Input::OfferDelegation);
    call.run(1, obliging);
    assert_eq!((call.log, call.events), (vec![], vec![(0, too_short)]));
}

#[test]
fn leave_sends_the_delegated_leave() {
    let mut call = delegated();
    call.input(Input::Leave);
    call.run(1000, obliging);
    assert_eq!(call.log.last().unwrap().1, Asked::send("delay1"));
    assert_eq!(call.own.status(), Status::Disconnected);
}

#[test]
fn leave_in_the_middle_of_delegating_leaves_nothing_that_fires() {
    let mut call = Call::joined(OwnConfig::default());
    call.service = || Never;
    call.input(Input::OfferDelegation);
    call.run(1, naming);
    call.input(Input::Leave);
    call.run(1000, naming);
    assert!(call.requests().contains(&Asked::cancel("again3600")), "{:?}", call.log);
    assert_eq!(call.own.status(), Status::Disconnected);
}

#[test]
fn delegated_leave_that_is_gone_is_replaced_and_delegated_again() {
    let mut call = delegated();
    call.log.clear();
    let mut gone = false;
    call.run(301_000, |n, request| {
        if request.is_restart() && !std::mem::replace(&mut gone, true) {
            error(RequestError::NotFound)
        } else {
            naming(n, request)
        }
    });
    assert_eq!(call.delegated.last().unwrap().1, "again3600");
    assert!(call.requests().contains(&Asked::cancel("again18")));
}

#[test]
fn delegated_leave_that_was_sent_makes_us_rejoin() {
    let mut call = delegated();
    call.log.clear();
    let mut sent = false;
    call.run(301_000, |n, request| {
        if request.is_restart() && !std::mem::replace(&mut sent, true) {
            error(RequestError::AlreadyFinal)
        } else {
            naming(n, request)
        }
    });
    assert_eq!(call.times(Asked::is_put), [300_000]);
    assert_eq!(call.delegated.last().unwrap().1, "again3600");
}

#[test]
fn fresh_member_id_waits_for_another_offer_before_delegating() {
    let mut call = Call::sticky();
    call.input(Input::OfferDelegation);
    call.run(1000, naming);
    assert_eq!(call.delegated.len(), 1);
    call.missing();
    call.run(20_000, naming);
    assert_ne!(call.member_id(), "first");
    assert_eq!(call.delegated.len(), 1, "the service would watch an identity that is not there");
    call.input(Input::OfferDelegation);
    call.run(20_001, naming);
    assert_eq!(call.delegated.len(), 2);
}

#[test]
fn removed_membership_is_published_and_delegated_again() {
    let mut call = delegated();
    call.run(100_000, obliging);
    call.log.clear();
    call.missing();
    call.run(100_001, naming);
    assert_eq!(call.puts().len(), 1);
    assert_eq!(call.delegated.len(), 2);
    assert_eq!(call.delegated[1].1, "again3600");
}

#[test]
fn write_is_followed_by_a_restart_of_the_delegated_leave() {
    let mut call = delegated();
    call.run(100_000, obliging);
    call.log.clear();
    call.input(Input::SetIntent(Some("video".to_owned())));
    call.run(100_001, obliging);
    assert_eq!(call.times(Asked::is_put), [100_000]);
    assert_eq!(call.times(Asked::is_restart), [100_000], "the write may have cancelled it");
}

#[test]
fn moved_focus_takes_the_leave_back_until_the_new_one_is_offered() {
    let mut call = delegated();
    call.run(100_000, obliging);
    call.log.clear();
    call.input(Input::SetTransports(on("https://other.example")));
    call.run(100_001, naming);
    let kinds = call.requests();
    assert_eq!(kinds[0], Asked::Schedule { delay: ms(18_000), form: UNSTABLE });
    assert!(kinds.contains(&Asked::cancel("delay1")), "{kinds:?}");
    assert_eq!(call.delegated.len(), 1);
    call.input(Input::OfferDelegation);
    call.run(100_002, naming);
    assert_eq!(call.delegated.len(), 2);
}
