//! What the machine of this module does, on virtual time.

use std::collections::BTreeSet;

use matrix_sdk::ruma::{device_id, room_id, user_id};
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::{
    member::Slot,
    membership::{testing::focus, wire::state_content},
};

const START: u64 = 1_800_000_000_000;

fn alice() -> OwnDescription {
    OwnDescription {
        user_id: user_id!("@alice:example.org").to_owned(),
        device_id: device_id!("AAAAAAA").to_owned(),
        slot: Slot::room_call(),
        focus: focus("https://sfu.example"),
        room_id: room_id!("!room:example.org").to_owned(),
        intent: None,
    }
}

fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

fn limited(retry_after: Option<u64>) -> Result<Reply, RequestError> {
    Err(RequestError::RateLimited { retry_after: retry_after.map(ms) })
}

/// What the scripted homeserver does with a request.
enum Answer {
    Now(Result<Reply, RequestError>),
    Never,
}

use Answer::{Never, Now as Answered};

/// A homeserver that does everything it is asked at once.
fn obliging(n: usize, request: &Request) -> Answer {
    Answered(Ok(match request {
        Request::ScheduleLeave { .. } => Reply::Scheduled { delay_id: format!("delay{n}") },
        Request::ReadMaxDelay => Reply::MaxDelay(None),
        _ => Reply::Done,
    }))
}

/// The machine with its shell and homeserver on virtual time.
struct Call {
    own: OwnMembership,
    start: Now,
    now: Now,
    /// Every request with its time in milliseconds since the start.
    log: Vec<(u64, Request)>,
    events: Vec<(u64, Event)>,
    /// What the focus's service does when it is asked to keep a delayed leave, and when it was asked for which.
    service: fn() -> Answer,
    delegated: Vec<(u64, String, Duration)>,
    unanswered: Vec<(Instant, RequestId)>,
}

impl Call {
    #[expect(clippy::disallowed_methods, reason = "an arbitrary origin of virtual time")]
    fn new(config: OwnConfig) -> Self {
        let start = Now { instant: Instant::now(), unix: UnixMillis(START) };
        Self {
            own: OwnMembership::new(config),
            start,
            now: start,
            log: Vec::new(),
            events: Vec::new(),
            service: || Answered(Ok(Reply::Done)),
            delegated: Vec::new(),
            unanswered: Vec::new(),
        }
    }

    /// A joined call whose requests so far are forgotten.
    fn joined(config: OwnConfig) -> Self {
        let mut call = Self::new(config);
        call.own.handle(call.now, Input::Join(alice()));
        call.run(0, obliging);
        call.own.handle(call.now, Input::OwnSeen(true));
        call.log.clear();
        call.events.clear();
        call
    }

    fn input(&mut self, input: Input) {
        self.own.handle(self.now, input);
    }

    fn elapsed(&self) -> u64 {
        self.now.unix.0 - START
    }

    fn set(&mut self, at: Instant) {
        self.now = self.start.plus(at - self.start.instant);
    }

    /// Runs until `until` milliseconds after the start. `answer` is given the number of the request and the
    /// request.
    fn run(&mut self, until: u64, mut answer: impl FnMut(usize, &Request) -> Answer) {
        let end = self.start.instant + ms(until);
        loop {
            match self.own.poll(self.now) {
                Output::Event(event) => self.events.push((self.elapsed(), event)),
                Output::Request { id, request, timeout } => {
                    assert!(self.log.len() < 100_000, "the machine spins");
                    self.log.push((self.elapsed(), request.clone()));
                    match answer(self.log.len(), &request) {
                        Answered(result) => self.own.handle(self.now, Input::Reply { id, result }),
                        Never => self.unanswered.push((self.now.instant + timeout, id)),
                    }
                }
                Output::Delegate { id, delay_id, delay, timeout } => {
                    assert!(self.delegated.len() < 1000, "the machine spins");
                    self.delegated.push((self.elapsed(), delay_id, delay));
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
                        let result = Err(RequestError::TimedOut);
                        self.own.handle(self.now, Input::Reply { id, result });
                    }
                }
            }
        }
    }

    fn times(&self, which: fn(&Request) -> bool) -> Vec<u64> {
        self.log.iter().filter(|(_, request)| which(request)).map(|(at, _)| *at).collect()
    }

    fn puts(&self) -> Vec<(u64, Value)> {
        self.log
            .iter()
            .filter_map(|(at, request)| match request {
                Request::PutMembership { content } => Some((*at, content.clone())),
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

    fn fatal(&self) -> Option<(u64, &str)> {
        self.events.iter().find_map(|(at, event)| match event {
            Event::Fatal { message } => Some((*at, message.as_str())),
            _ => None,
        })
    }

    fn probably_left(&self) -> Vec<(u64, bool)> {
        self.events
            .iter()
            .filter_map(|(at, event)| match event {
                Event::ProbablyLeft(left) => Some((*at, *left)),
                _ => None,
            })
            .collect()
    }

    fn warned(&self) -> usize {
        self.events.iter().filter(|(_, event)| matches!(event, Event::DelayedLeaveUnavailable { .. })).count()
    }
}

fn is_schedule(request: &Request) -> bool {
    matches!(request, Request::ScheduleLeave { .. })
}

fn is_restart(request: &Request) -> bool {
    matches!(request, Request::RestartLeave { .. })
}

fn is_put(request: &Request) -> bool {
    matches!(request, Request::PutMembership { .. })
}

fn join(config: OwnConfig) -> Call {
    let mut call = Call::new(config);
    call.input(Input::Join(alice()));
    call
}

fn js() -> OwnConfig {
    OwnConfig::js_sdk_defaults()
}

#[test]
fn e33_joining_schedules_a_leave_publishes_and_restarts_at_once() {
    let mut call = join(js());
    call.run(0, obliging);
    let content = state_content(&alice(), ms(14_400_000), None);
    assert_eq!(
        call.log,
        [
            (0, Request::ScheduleLeave { delay: ms(8000) }),
            (0, Request::PutMembership { content }),
            (0, Request::RestartLeave { delay_id: "delay1".to_owned() }),
        ]
    );
}

#[test]
fn e36_a_leave_that_the_write_cancelled_is_scheduled_again() {
    let mut call = join(js());
    let mut restarts = 0;
    call.run(4_999, |n, request| {
        restarts += usize::from(is_restart(request));
        if is_restart(request) && restarts == 1 {
            Answered(Err(RequestError::NotFound))
        } else {
            obliging(n, request)
        }
    });
    assert_eq!((call.times(is_schedule).len(), call.times(is_put).len()), (2, 1));
    assert_eq!(call.fatal(), None);
}

#[test]
fn e37_the_servers_limits_are_obeyed() {
    let mut call = join(OwnConfig { leave_delay: ms(9000), ..js() });
    let (mut schedules, mut puts) = (0, 0);
    call.run(11_000, |n, request| match request {
        Request::ScheduleLeave { delay } => {
            schedules += 1;
            match schedules {
                1 => {
                    assert_eq!(*delay, ms(9000));
                    Answered(Err(RequestError::MaxDelayExceeded { max: Some(ms(7500)) }))
                }
                2 => Answered(limited(None)),
                _ => {
                    assert_eq!(*delay, ms(7500));
                    obliging(n, request)
                }
            }
        }
        Request::PutMembership { .. } => {
            puts += 1;
            if puts == 1 { Answered(limited(Some(1000))) } else { obliging(n, request) }
        }
        _ => obliging(n, request),
    });
    assert_eq!(call.times(is_schedule), [0, 0, 5000]);
    assert_eq!(call.times(is_put), [5000, 6000]);
    assert_eq!(call.times(is_restart), [6000, 11_000]);
}

#[test]
fn e38_an_unnamed_limit_is_asked_for_and_else_the_delay_is_halved() {
    const DAY: Duration = Duration::from_secs(86_400);
    let run = |capability: Option<Duration>, accepts: Duration| {
        let mut call = join(OwnConfig { leave_delay: 4 * DAY, ..js() });
        call.run(0, |n, request| match request {
            Request::ScheduleLeave { delay } if *delay > accepts => {
                Answered(Err(RequestError::MaxDelayExceeded { max: None }))
            }
            Request::ReadMaxDelay => Answered(Ok(Reply::MaxDelay(capability))),
            _ => obliging(n, request),
        });
        call
    };
    let asked = run(Some(DAY), DAY);
    assert_eq!(asked.log[1..3], [(0, Request::ReadMaxDelay), (0, Request::ScheduleLeave { delay: DAY })]);
    let halved = run(None, DAY);
    let delays: Vec<_> = halved
        .log
        .iter()
        .filter_map(|(_, r)| if let Request::ScheduleLeave { delay } = r { Some(*delay) } else { None })
        .collect();
    assert_eq!(delays, [4 * DAY, 2 * DAY, DAY]);
    assert_eq!((asked.warned(), halved.warned()), (0, 0));
    let never = run(None, Duration::ZERO);
    assert_eq!((never.warned(), never.times(is_put).len()), (1, 1), "joined with a warning");
}

#[test]
fn e39_configured_delay_and_expiry_are_sent() {
    let mut call = join(OwnConfig { leave_delay: ms(123_456), expires: ms(1_234_567), ..js() });
    call.run(0, obliging);
    assert_eq!(call.log[0].1, Request::ScheduleLeave { delay: ms(123_456) });
    assert_eq!(call.puts()[0].1["expires"], 1_234_567);
}

#[test]
fn e40_without_delayed_events_we_join_with_a_warning() {
    let mut call = join(js());
    call.run(3_600_000, |n, request| match request {
        Request::ScheduleLeave { .. } => Answered(Err(RequestError::Unsupported)),
        _ => obliging(n, request),
    });
    assert_eq!((call.times(is_schedule).len(), call.times(is_restart).len(), call.warned()), (1, 0, 1));
    assert_eq!(call.times(is_put), [0, 3_595_000]);
    assert_eq!((call.own.status(), call.fatal()), (Status::Connected, None));
}

#[test]
fn e41_a_refusal_joins_without_and_a_broken_server_is_fatal() {
    let mut refused = join(js());
    refused.run(0, |n, request| match request {
        Request::ScheduleLeave { .. } => Answered(Err(RequestError::Other { message: "601".to_owned() })),
        _ => obliging(n, request),
    });
    assert_eq!((refused.times(is_put).len(), refused.warned(), refused.fatal()), (1, 1, None));

    let mut broken = join(OwnConfig { network_retry: ms(1000), network_retries: 7, ..js() });
    broken.run(60_000, |_, _| Answered(Err(RequestError::Network)));
    assert_eq!(broken.times(is_schedule), [0, 1000, 2000, 3000, 4000, 5000, 6000, 7000]);
    assert_eq!(broken.times(is_put).len(), 0);
    let (at, message) = broken.fatal().unwrap();
    assert_eq!(at, 7000);
    assert!(message.contains("given up") && message.contains("could not be reached"), "{message}");
    assert_eq!(broken.own.status(), Status::Disconnected);
}

#[test]
fn e42_rate_limits_are_obeyed_ten_times() {
    let mut joining = join(js());
    joining.run(60_000, |_, _| Answered(limited(Some(2000))));
    assert_eq!((joining.times(is_schedule).len(), joining.fatal().unwrap().0), (11, 20_000));

    let mut restarting = join(js());
    restarting.run(60_000, |n, request| match request {
        Request::RestartLeave { .. } => Answered(limited(Some(1000))),
        _ => obliging(n, request),
    });
    assert_eq!((restarting.times(is_restart).len(), restarting.fatal().unwrap().0), (11, 10_000));
}

#[test]
fn e43_leaving_before_anything_was_published_asks_nothing() {
    let mut call = join(js());
    call.run(1, |_, _| Answered(limited(Some(1000))));
    call.input(Input::Leave);
    call.run(10_000, obliging);
    assert_eq!((call.log.len(), call.times(is_schedule).len()), (1, 1));
    use Status::{Connecting, Disconnected, Disconnecting};
    assert_eq!(call.statuses(), [Connecting, Disconnecting, Disconnected]);
}

#[test]
fn e44_a_sync_without_us_does_not_disturb_joining() {
    let mut call = join(js());
    call.run(500, |_, _| Answered(limited(Some(1000))));
    call.input(Input::OwnSeen(false));
    call.run(1000, obliging);
    assert_eq!((call.times(is_schedule), call.times(is_put)), (vec![0, 1000], vec![1000]));
}

#[test]
fn e45_a_limited_restart_is_repeated() {
    let mut call = join(js());
    let mut restarts = 0;
    call.run(2500, |n, request| {
        restarts += usize::from(is_restart(request));
        if is_restart(request) && restarts <= 2 {
            Answered(limited(Some(1000)))
        } else {
            obliging(n, request)
        }
    });
    assert_eq!((call.times(is_restart), call.times(is_put).len()), (vec![0, 1000, 2000], 1));
}

#[test]
fn e46_the_delayed_leave_is_restarted_steadily() {
    let config = OwnConfig { restart_interval: ms(10_000), leave_delay: ms(30_000), ..js() };
    let mut call = join(config);
    call.run(110_000, obliging);
    assert_eq!(call.times(is_restart), (0..12).map(|n| n * 10_000).collect::<Vec<_>>());
    assert_eq!(call.times(is_schedule).len(), 1);
}

#[test]
fn e47_every_refresh_moves_the_expiry() {
    for headroom in [5000, 1000] {
        let config = OwnConfig { expires: ms(10_000), expires_headroom: ms(headroom), ..js() };
        let mut call = join(config);
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
fn e48_joining_twice_is_joining_once() {
    let mut call = join(js());
    call.input(Input::Join(alice()));
    call.run(0, obliging);
    call.input(Input::Join(alice()));
    call.run(1, obliging);
    assert_eq!(call.times(is_put).len(), 1);
}

#[test]
fn e49_a_lost_leave_and_a_lost_membership_are_one_rejoin() {
    let mut call = Call::joined(js());
    call.run(14_999, obliging);
    call.log.clear();
    call.run(15_000, |_, request| if is_restart(request) { Never } else { panic!("{request:?}") });
    call.input(Input::OwnSeen(false));
    call.run(15_001, |n, request| match request {
        Request::CancelLeave { .. } => Answered(Err(RequestError::NotFound)),
        _ => obliging(n, request),
    });
    assert_eq!((call.times(is_schedule).len(), call.times(is_put).len()), (1, 1));
    assert_eq!(call.puts()[0].1.get("created_ts"), None);
}

#[test]
fn e50_only_a_sync_without_us_makes_us_rejoin() {
    let mut call = Call::joined(js());
    call.input(Input::OwnSeen(true));
    call.run(1, obliging);
    assert_eq!(call.log, []);
    call.input(Input::OwnSeen(false));
    call.run(2, obliging);
    let kinds: Vec<_> = call.log.iter().map(|(_, request)| request.clone()).collect();
    assert_eq!(kinds[0], Request::CancelLeave { delay_id: "delay1".to_owned() });
    assert!(is_schedule(&kinds[1]) && is_put(&kinds[2]) && is_restart(&kinds[3]), "{kinds:?}");
    assert_eq!(call.statuses(), [Status::Connecting, Status::Connected]);
}

#[test]
fn a_late_sync_is_not_a_lost_membership() {
    let mut call = join(OwnConfig::default());
    call.run(100, obliging);
    call.log.clear();
    call.input(Input::OwnSeen(false));
    call.run(3_000, obliging);
    call.input(Input::OwnSeen(true));
    call.run(20_000, obliging);
    assert!(call.times(is_put).is_empty());
}

#[test]
fn rejoins_that_nobody_sees_become_rare() {
    let mut call = join(OwnConfig::default());
    for second in 0..600 {
        call.run(second * 1000, obliging);
        call.input(Input::OwnSeen(false));
    }
    // 5, 10, 20, 40, 80, 160, 320 s apart.
    assert!((5..9).contains(&call.times(is_put).len()), "{:?}", call.times(is_put));
}

#[test]
fn e51_nothing_is_asked_outside_a_call() {
    let mut call = Call::new(js());
    for input in [
        Input::OwnSeen(false),
        Input::OwnSeen(true),
        Input::OwnCreated(UnixMillis(1)),
        Input::SetIntent(Some("audio".to_owned())),
        Input::Renew,
        Input::Leave,
        Input::Reply { id: RequestId(7), result: Ok(Reply::Done) },
    ] {
        call.input(input);
    }
    call.run(100_000_000, |_, request| panic!("{request:?}"));
    assert_eq!(call.events, []);
}

#[test]
fn e52_leaving_sends_the_delayed_leave() {
    let mut call = Call::joined(js());
    call.input(Input::Leave);
    call.run(10_000, obliging);
    assert_eq!(call.log, [(0, Request::SendLeave { delay_id: "delay1".to_owned() })]);
    assert!(call.own.delayed.is_none());
}

#[test]
fn e52_if_that_fails_the_leave_is_written() {
    for (error, kept) in
        [(RequestError::Other { message: "?".to_owned() }, true), (RequestError::NotFound, false)]
    {
        let mut call = Call::joined(js());
        call.input(Input::Leave);
        call.run(0, |n, request| match request {
            Request::SendLeave { .. } => Answered(Err(error.clone())),
            _ => obliging(n, request),
        });
        assert_eq!(call.log.last(), Some(&(0, Request::PutLeave)));
        assert_eq!((call.own.delayed.is_some(), call.own.status()), (kept, Status::Disconnected));
        // What is left of it cannot end the next membership.
        call.log.clear();
        call.input(Input::Join(alice()));
        call.run(0, obliging);
        let cancelled = call.log[0].1 == Request::CancelLeave { delay_id: "delay1".to_owned() };
        assert_eq!(cancelled, kept);
    }
}

#[test]
fn leaving_is_bounded() {
    for (refusal, name) in [
        (None, "silence"),
        (Some(RequestError::Network), "network"),
        (Some(RequestError::RateLimited { retry_after: Some(ms(3_600_000)) }), "limited"),
    ] {
        let mut call = Call::joined(OwnConfig::default());
        call.input(Input::Leave);
        call.run(60_000, |_, _| refusal.clone().map_or(Never, |error| Answered(Err(error))));
        let (at, last) = call.events.last().unwrap();
        assert_eq!(*last, Event::Status(Status::Disconnected), "{name}");
        assert!(*at <= 5_000, "{name}: {at}");
        assert!(call.log.iter().any(|(_, request)| *request == Request::PutLeave), "{name}: both ways");
    }
}

#[test]
fn leaving_waits_for_a_publication_under_way_and_ends_it() {
    let mut call = join(js());
    call.run(0, |n, request| if is_put(request) { Never } else { obliging(n, request) });
    call.input(Input::Leave);
    call.run(500, |_, request| panic!("{request:?} races with the publication"));
    let (_, id) = call.unanswered.pop().unwrap();
    call.input(Input::Reply { id, result: Ok(Reply::Done) });
    call.run(500, obliging);
    assert_eq!(call.log.last().unwrap().1, Request::SendLeave { delay_id: "delay1".to_owned() });
    assert_eq!(call.own.status(), Status::Disconnected);
}

#[test]
fn a_delayed_leave_that_comes_to_light_late_is_cancelled() {
    let mut call = join(js());
    call.run(0, |_, _| Never);
    let (_, id) = call.unanswered.pop().unwrap();
    call.input(Input::Leave);
    call.run(30_000, |_, request| panic!("{request:?}"));
    assert_eq!(call.own.status(), Status::Disconnected);
    call.input(Input::Reply { id, result: Ok(Reply::Scheduled { delay_id: "late".to_owned() }) });
    call.run(30_001, obliging);
    assert_eq!(call.log.last().unwrap().1, Request::CancelLeave { delay_id: "late".to_owned() });
}

#[test]
fn a_join_while_leaving_follows_the_leave() {
    let mut call = Call::joined(js());
    call.input(Input::Leave);
    call.input(Input::Join(alice()));
    call.run(0, obliging);
    use Status::{Connected, Connecting, Disconnected, Disconnecting};
    assert_eq!(call.statuses(), [Disconnecting, Disconnected, Connecting, Connected]);
}

#[test]
fn e54_every_change_of_status_is_told_once() {
    let mut call = join(js());
    call.run(60_000, obliging);
    call.input(Input::Leave);
    call.run(61_000, obliging);
    use Status::{Connected, Connecting, Disconnected, Disconnecting};
    assert_eq!(call.statuses(), [Connecting, Connected, Disconnecting, Disconnected]);
}

#[test]
fn e55_silence_until_the_leave_fires_is_probably_left() {
    let mut call = Call::joined(OwnConfig { leave_delay: ms(10_000), ..js() });
    let silent = |n: usize, request: &Request| if is_restart(request) { Never } else { obliging(n, request) };
    call.run(5000, silent);
    assert_eq!((call.times(is_restart).len(), call.probably_left()), (1, vec![]));
    call.run(9999, silent);
    assert_eq!((call.times(is_restart), call.probably_left()), (vec![5000, 7000, 9000], vec![]));
    call.run(10_000, silent);
    assert_eq!((call.times(is_restart).len(), call.probably_left()), (4, vec![(10_000, true)]));
    // The homeserver is back; it sent our leave long ago.
    call.log.clear();
    call.run(12_000, obliging);
    call.input(Input::OwnSeen(false));
    call.run(12_000, obliging);
    assert_eq!((call.times(is_schedule).len(), call.times(is_put).len()), (1, 1));
    assert_eq!(call.probably_left(), [(10_000, true), (12_000, false)]);
}

#[test]
fn e56_a_new_intent_is_published_with_the_creation_time_that_peers_know() {
    let mut call = join(js());
    call.run(0, obliging);
    call.input(Input::OwnSeen(true));
    call.input(Input::OwnCreated(UnixMillis(START + 70)));
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
fn an_intent_that_changes_while_joining_is_not_lost() {
    let mut call = join(js());
    call.run(0, |n, request| if is_put(request) { Never } else { obliging(n, request) });
    call.input(Input::SetIntent(Some("audio".to_owned())));
    let (_, id) = call.unanswered.pop().unwrap();
    call.input(Input::Reply { id, result: Ok(Reply::Done) });
    call.run(0, obliging);
    assert_eq!(call.puts().last().unwrap().1["m.call.intent"], "audio");
}

#[test]
fn e57_an_intent_change_after_hours_does_not_shorten_our_life() {
    const HOUR: u64 = 3_600_000;
    let mut call = join(OwnConfig::default());
    call.run(5 * HOUR, obliging);
    call.log.clear();
    call.input(Input::SetIntent(Some("video".to_owned())));
    call.run(5 * HOUR, obliging);
    let content = &call.puts()[0].1;
    let until = content["created_ts"].as_u64().unwrap() + content["expires"].as_u64().unwrap();
    assert!(until > call.now.unix.0 + 4 * HOUR - 60_000);
}

#[test]
fn every_refresh_of_a_long_call_covers_four_more_hours() {
    let mut call = join(OwnConfig::default());
    call.run(100 * 3_600_000, obliging);
    let puts = call.puts();
    assert_eq!(puts.len(), 101);
    for (at, content) in puts {
        let created = content.get("created_ts").map_or(START, |created| created.as_u64().unwrap());
        assert_eq!(created, START);
        assert!(created + content["expires"].as_u64().unwrap() >= START + at + 4 * 3_600_000);
    }
}

#[test]
fn e60_a_device_that_slept_does_not_resurrect_itself_without_a_leave() {
    const HOUR: u64 = 3_600_000;
    let mut call = Call::joined(js());
    // Asleep: nothing is polled for two hours, and the homeserver sent the leave meanwhile.
    call.set(call.start.instant + ms(2 * HOUR));
    let mut gone = true;
    call.run(2 * HOUR + 1, |n, request| {
        if is_restart(request) && std::mem::take(&mut gone) {
            Answered(Err(RequestError::NotFound))
        } else {
            obliging(n, request)
        }
    });
    assert!(is_restart(&call.log[0].1) && is_schedule(&call.log[1].1), "{:?}", call.log);
    let puts = call.puts();
    assert_eq!((puts.len(), puts[0].1.get("created_ts")), (1, None), "a rejoin from scratch");
}

#[test]
fn e60_a_leave_that_was_dropped_is_replaced_before_a_refresh() {
    let mut call = Call::joined(js());
    call.run(3_594_999, obliging);
    call.log.clear();
    let mut gone = true;
    call.run(3_595_000, |n, request| {
        if is_restart(request) && std::mem::take(&mut gone) {
            Answered(Err(RequestError::NotFound))
        } else {
            obliging(n, request)
        }
    });
    let kinds: Vec<_> = call.log.iter().map(|(_, request)| request.clone()).collect();
    assert!(is_restart(&kinds[0]) && is_schedule(&kinds[1]) && is_put(&kinds[2]), "{kinds:?}");
    assert!(call.puts()[0].1.get("created_ts").is_some(), "a refresh, not a rejoin");
}

#[test]
fn no_refresh_before_the_leave_is_known_to_be_alive() {
    let mut call = Call::joined(js());
    call.run(3_590_000, obliging);
    call.log.clear();
    let deaf = |n: usize, request: &Request| {
        if is_restart(request) { Answered(Err(RequestError::Network)) } else { obliging(n, request) }
    };
    call.run(3_597_000, deaf);
    assert!(call.times(is_put).is_empty() && !call.times(is_restart).is_empty());
    call.run(3_600_000, obliging);
    assert_eq!(call.times(is_put).len(), 1);
}

#[test]
fn the_creation_time_of_the_membership_before_ours_is_not_taken() {
    let mut call = Call::joined(js());
    for created in [START + 70, START - 3_600_000] {
        call.input(Input::OwnCreated(UnixMillis(created)));
    }
    call.input(Input::SetIntent(Some("audio".to_owned())));
    call.run(1, obliging);
    assert_eq!(call.puts()[0].1["created_ts"], START + 70);
}

#[test]
fn renewing_changes_the_creation_time_once_a_minute() {
    let mut call = Call::joined(js());
    call.input(Input::OwnCreated(UnixMillis(START + 5_000)));
    call.run(10, obliging);
    call.log.clear();
    call.input(Input::Renew);
    call.input(Input::Renew);
    call.run(20, obliging);
    assert_eq!(call.puts()[0].1["created_ts"], START + 5_001, "later than before, whatever our clock says");
    call.input(Input::Renew);
    call.run(30, obliging);
    assert_eq!(call.puts().len(), 1);
    call.run(60_010, obliging);
    call.input(Input::Renew);
    call.run(60_010, obliging);
    assert_eq!(call.puts().last().unwrap().1["created_ts"], START + 60_010);
}

#[test]
fn a_lost_reply_does_not_stop_the_machine() {
    let mut call = Call::joined(js());
    call.run(5000, |_, _| Never);
    call.unanswered.clear();
    call.run(30_000, obliging);
    assert!(call.times(is_restart).len() > 3);
    assert_eq!((call.own.status(), call.fatal()), (Status::Connected, None));
}

#[test]
fn after_a_fatal_error_leaving_still_ends_the_membership() {
    let mut call = Call::joined(js());
    call.run(60_000, |n, request| {
        if is_restart(request) {
            Answered(Err(RequestError::Other { message: "401".to_owned() }))
        } else {
            obliging(n, request)
        }
    });
    assert!(call.fatal().is_some());
    call.log.clear();
    call.input(Input::Leave);
    call.run(60_001, obliging);
    assert_eq!(call.log.last().unwrap().1, Request::SendLeave { delay_id: "delay1".to_owned() });
}

const HOUR: u64 = 3_600_000;

fn restarts_of<'a>(call: &'a Call, id: &'a str) -> impl Iterator<Item = u64> + 'a {
    let of = move |request: &Request| matches!(request, Request::RestartLeave { delay_id } if delay_id == id);
    call.log.iter().filter(move |(_, request)| of(request)).map(|(at, _)| *at)
}

fn is_cancel_of(request: &Request, id: &str) -> bool {
    matches!(request, Request::CancelLeave { delay_id } if delay_id == id)
}

/// A call that has handed its delayed leave `delay1` over.
fn delegated() -> Call {
    let mut call = Call::joined(OwnConfig::default());
    call.input(Input::OfferDelegation);
    call.run(1, obliging);
    call
}

#[test]
fn a_focus_that_keeps_a_long_delayed_leave_replaces_the_short_one() {
    let mut call = delegated();
    let expected = [
        Request::ScheduleLeave { delay: ms(HOUR) },
        // After the service has taken the long one.
        Request::CancelLeave { delay_id: "delay1".to_owned() },
    ];
    assert_eq!(call.log.iter().map(|(_, request)| request.clone()).collect::<Vec<_>>(), expected);
    assert_eq!(call.delegated, [(0, "delay1".to_owned(), ms(HOUR))]);
    assert_eq!(call.events, [(0, Event::LeaveDelegated)]);
    call.log.clear();
    call.run(1_000_000, obliging);
    assert_eq!(call.times(is_restart), [300_000, 600_000, 900_000]);
}

#[test]
fn the_short_leave_is_kept_alive_until_the_focus_has_the_long_one() {
    let mut call = Call::joined(OwnConfig::default());
    call.service = || Never;
    call.input(Input::OfferDelegation);
    call.run(500_000, |_, request| match request {
        Request::ScheduleLeave { .. } => Answered(Ok(Reply::Scheduled { delay_id: "long".to_owned() })),
        _ => obliging(0, request),
    });
    let mut last = 0;
    for at in restarts_of(&call, "delay1") {
        assert!(at - last < 18_000, "a gap from {last} to {at}");
        last = at;
    }
    assert!(last > 480_000);
    assert!(!call.log.iter().any(|(_, request)| is_cancel_of(request, "delay1")));
    // A service that does not answer is given up, and what it was to keep is cancelled.
    assert_eq!(call.delegated.len(), 12);
    assert!(call.log.iter().any(|(_, request)| is_cancel_of(request, "long")));
    assert!(matches!(&call.events[..], [(_, Event::DelegationFailed { .. })]), "{:?}", call.events);
}

#[test]
fn a_focus_that_refuses_leaves_all_as_it_was() {
    let mut call = Call::joined(OwnConfig::default());
    call.service = || Answered(Err(RequestError::Other { message: "400 M_BAD_JSON".to_owned() }));
    call.input(Input::OfferDelegation);
    call.run(60_000, |_, request| match request {
        Request::ScheduleLeave { .. } => Answered(Ok(Reply::Scheduled { delay_id: "long".to_owned() })),
        _ => obliging(0, request),
    });
    assert_eq!(call.delegated.len(), 1);
    assert!(call.log.iter().any(|(_, request)| is_cancel_of(request, "long")));
    assert_eq!(
        restarts_of(&call, "delay1").collect::<Vec<_>>(),
        (1..=15).map(|n| n * 4000).collect::<Vec<_>>()
    );
    let [(0, Event::DelegationFailed { reason })] = &call.events[..] else { panic!("{:?}", call.events) };
    assert!(reason.contains("M_BAD_JSON"));
}

#[test]
fn a_short_leave_that_cannot_be_cancelled_goes_on() {
    let mut call = Call::joined(OwnConfig::default());
    call.input(Input::OfferDelegation);
    call.run(60_000, |n, request| match request {
        Request::CancelLeave { .. } => Answered(Err(RequestError::Other { message: "no".to_owned() })),
        _ => obliging(n, request),
    });
    assert_eq!(restarts_of(&call, "delay1").last(), Some(60_000));
    assert!(matches!(&call.events[..], [(0, Event::DelegationFailed { .. })]), "{:?}", call.events);
}

#[test]
fn the_homeservers_limit_holds_for_the_long_leave_too() {
    let limited_to = |max: u64| {
        let mut call = Call::joined(OwnConfig::default());
        call.input(Input::OfferDelegation);
        call.run(200_000, |n, request| match request {
            Request::ScheduleLeave { delay } if *delay > ms(max) => {
                Answered(Err(RequestError::MaxDelayExceeded { max: Some(ms(max)) }))
            }
            _ => obliging(n, request),
        });
        call
    };
    let call = limited_to(120_000);
    assert_eq!(call.delegated[0].2, ms(120_000));
    assert_eq!(call.times(is_restart), [80_000, 160_000], "two thirds of it");
    let call = limited_to(59_999);
    assert!(call.delegated.is_empty());
    assert!(matches!(&call.events[..], [(0, Event::DelegationFailed { .. })]), "{:?}", call.events);
}

#[test]
fn leaving_sends_the_delegated_leave() {
    let mut call = delegated();
    call.input(Input::Leave);
    call.run(1000, obliging);
    assert_eq!(call.log.last().unwrap().1, Request::SendLeave { delay_id: "delay1".to_owned() });
    assert_eq!(call.own.status(), Status::Disconnected);
}

#[test]
fn leaving_in_the_middle_leaves_nothing_that_fires() {
    let mut call = Call::joined(OwnConfig::default());
    call.service = || Never;
    call.input(Input::OfferDelegation);
    let scheduled = |_: usize, request: &Request| match request {
        Request::ScheduleLeave { .. } => Answered(Ok(Reply::Scheduled { delay_id: "long".to_owned() })),
        _ => obliging(0, request),
    };
    call.run(1, scheduled);
    call.input(Input::Leave);
    call.run(1000, scheduled);
    assert!(call.log.iter().any(|(_, request)| is_cancel_of(request, "long")), "{:?}", call.log);
    assert_eq!(call.own.status(), Status::Disconnected);
}

#[test]
fn a_delegated_leave_that_is_gone_is_replaced_and_delegated_again() {
    let mut call = delegated();
    call.log.clear();
    let mut gone = false;
    call.run(301_000, |n, request| match request {
        Request::RestartLeave { .. } if !std::mem::replace(&mut gone, true) => {
            Answered(Err(RequestError::NotFound))
        }
        Request::ScheduleLeave { delay } => {
            Answered(Ok(Reply::Scheduled { delay_id: format!("again{}", delay.as_secs()) }))
        }
        _ => obliging(n, request),
    });
    assert_eq!(call.delegated.last().unwrap().1, "again3600");
    assert!(call.log.iter().any(|(_, request)| is_cancel_of(request, "again18")));
}

#[test]
fn who_is_removed_joins_again_and_delegates_again() {
    let mut call = delegated();
    call.run(100_000, obliging);
    call.log.clear();
    call.input(Input::OwnSeen(false));
    call.run(100_001, |_, request| match request {
        Request::ScheduleLeave { delay } => {
            Answered(Ok(Reply::Scheduled { delay_id: format!("again{}", delay.as_secs()) }))
        }
        _ => obliging(0, request),
    });
    assert_eq!(call.puts().len(), 1);
    assert_eq!(call.delegated.len(), 2);
    assert_eq!(call.delegated[1].1, "again3600");
}

#[test]
fn a_write_is_followed_by_a_restart_of_the_delegated_leave() {
    let mut call = delegated();
    call.run(100_000, obliging);
    call.log.clear();
    call.input(Input::SetIntent(Some("video".to_owned())));
    call.run(100_001, obliging);
    assert_eq!(call.times(is_put), [100_000]);
    assert_eq!(call.times(is_restart), [100_000], "the write may have cancelled it");
}

fn any_result() -> impl Strategy<Value = Result<Reply, RequestError>> {
    prop_oneof![
        6 => Just(Ok(Reply::Done)),
        1 => any::<u64>().prop_map(|retry| Err(RequestError::RateLimited { retry_after: Some(ms(retry)) })),
        1 => (0_u64..3000).prop_map(|retry| Err(RequestError::RateLimited { retry_after: Some(ms(retry)) })),
        1 => Just(Err(RequestError::RateLimited { retry_after: None })),
        1 => any::<Option<u64>>().prop_map(|max| Err(RequestError::MaxDelayExceeded { max: max.map(ms) })),
        1 => Just(Ok(Reply::MaxDelay(Some(ms(7000))))),
        1 => Just(Err(RequestError::NotFound)),
        1 => Just(Err(RequestError::Unsupported)),
        2 => Just(Err(RequestError::Network)),
        2 => Just(Err(RequestError::TimedOut)),
        1 => Just(Err(RequestError::Other { message: String::new() })),
    ]
}

#[derive(Clone, Debug)]
enum Turn {
    Input(Input),
    Answer(Result<Reply, RequestError>),
    AnswerAgain(u64),
    Pass(u64),
    Wall(i64),
}

fn any_turn() -> impl Strategy<Value = Turn> {
    prop_oneof![
        2 => Just(Turn::Input(Input::Join(alice()))),
        1 => Just(Turn::Input(Input::Leave)),
        2 => any::<bool>().prop_map(|seen| Turn::Input(Input::OwnSeen(seen))),
        1 => any::<u64>().prop_map(|at| Turn::Input(Input::OwnCreated(UnixMillis(at)))),
        1 => prop::option::of("[ab]").prop_map(|intent| Turn::Input(Input::SetIntent(intent))),
        1 => Just(Turn::Input(Input::Renew)),
        1 => Just(Turn::Input(Input::OfferDelegation)),
        12 => any_result().prop_map(Turn::Answer),
        2 => (0_u64..20).prop_map(Turn::AnswerAgain),
        6 => (0_u64..20_000).prop_map(Turn::Pass),
        1 => (0_u64..100_000_000_000).prop_map(Turn::Pass),
        1 => any::<i64>().prop_map(Turn::Wall),
    ]
}

/// The delayed leave that the service is asked to keep, and its delay in milliseconds; 0 if there is none.
fn handed_over(call: &Call) -> (String, u128) {
    let (delay_id, delay) = call.own.delegation.handed_over();
    (delay_id, delay.as_millis())
}

proptest! {
    /// Whatever the homeserver answers and the clocks do: no panic, no spinning, one request at a time, no
    /// status told twice; every delayed leave that we know of is the current one, is on its way to the focus's
    /// service or kept by it, waits to be cancelled, or was asked to go; and on a homeserver that is well again, leaving comes to an end.
    #[test]
    fn nothing_confuses_the_machine(turns in prop::collection::vec(any_turn(), 0..120)) {
        let mut call = Call::new(OwnConfig::default());
        // `None`: the focus's service is asked.
        let mut pending: Option<(RequestId, Option<Request>)> = None;
        let mut kept: BTreeSet<String> = BTreeSet::new();
        let mut live: BTreeSet<String> = BTreeSet::new();
        let mut asked_to_go: BTreeSet<String> = BTreeSet::new();
        let mut status = Status::Disconnected;
        let mut scheduled = 0;
        for turn in turns {
            match turn {
                Turn::Input(input) => call.input(input),
                Turn::Answer(result) => if let Some((id, request)) = pending.take() {
                    let result = match (&request, result) {
                        (Some(Request::ScheduleLeave { .. }), Ok(Reply::Done)) => {
                            scheduled += 1;
                            live.insert(format!("d{scheduled}"));
                            Ok(Reply::Scheduled { delay_id: format!("d{scheduled}") })
                        }
                        (None, result) => {
                            if result.is_ok() && let (delay_id, 1..) = handed_over(&call) {
                                kept.insert(delay_id);
                            }
                            result
                        }
                        (Some(Request::RestartLeave { delay_id } | Request::SendLeave { delay_id }), result) => {
                            let not_found = result == Err(RequestError::NotFound);
                            let unsupported = result == Err(RequestError::Unsupported);
                            let sent = matches!(request, Some(Request::SendLeave { .. })) && result.is_ok();
                            if not_found || unsupported || sent {
                                live.remove(delay_id);
                            }
                            result
                        }
                        (_, result) => result,
                    };
                    call.input(Input::Reply { id, result });
                },
                Turn::AnswerAgain(id) => {
                    // A reply to a request that was answered, abandoned, or never made.
                    if pending.as_ref().is_none_or(|(pending, _)| pending.0 != id) {
                        scheduled += 1;
                        let delay_id = format!("d{scheduled}");
                        let orphan = call.own.orphans.contains(&RequestId(id));
                        if orphan {
                            live.insert(delay_id.clone());
                        }
                        call.input(Input::Reply { id: RequestId(id), result: Ok(Reply::Scheduled { delay_id }) });
                    }
                }
                Turn::Pass(millis) => call.now = call.now.plus(ms(millis)),
                Turn::Wall(by) => call.now.unix = UnixMillis(call.now.unix.0.saturating_add_signed(by)),
            }
            for spins in 0.. {
                prop_assert!(spins < 50, "the machine spins");
                match call.own.poll(call.now) {
                    Output::Event(Event::Status(new)) => {
                        prop_assert_ne!(status, new);
                        status = new;
                    }
                    Output::Event(_) => {}
                    Output::Request { id, request, .. } => {
                        if let Request::CancelLeave { delay_id } | Request::SendLeave { delay_id } = &request {
                            asked_to_go.insert(delay_id.clone());
                        }
                        if let Request::PutMembership { content } = &request
                            && let Some(created) = content.get("created_ts") {
                            let until = created.as_u64().unwrap()
                                .saturating_add(content["expires"].as_u64().unwrap());
                            prop_assert!(until >= call.now.unix.0.saturating_add(4 * 3_600_000) || until == u64::MAX);
                        }
                        pending = Some((id, Some(request)));
                    }
                    Output::Delegate { id, delay_id, .. } => {
                        prop_assert!(live.contains(&delay_id), "{} is unknown", delay_id);
                        pending = Some((id, None));
                    }
                    Output::WaitUntil(at) => {
                        prop_assert!(at > call.now.instant);
                        break;
                    }
                    Output::Idle => {
                        prop_assert_eq!(call.own.status(), Status::Disconnected, "it waits for nothing");
                        break;
                    }
                }
            }
            let current = call.own.delayed.as_ref().map(|delayed| &delayed.id);
            let (handed_over, _) = handed_over(&call);
            let stale: BTreeSet<_> = call.own.stale.iter().map(|stale| &stale.id).collect();
            for id in &live {
                prop_assert!(
                    Some(id) == current
                        || *id == handed_over
                        || kept.contains(id)
                        || stale.contains(id)
                        || asked_to_go.contains(id),
                    "{} is forgotten", id
                );
            }
        }
        if call.own.in_flight.is_some() && let Some((id, _)) = pending {
            call.input(Input::Reply { id, result: Err(RequestError::Network) });
        }
        // Twice: the first leave may have used up its time on answers that it got before.
        for _ in 0..2 {
            call.input(Input::Leave);
            for _ in 0..200 {
                match call.own.poll(call.now) {
                    Output::Request { id, request, .. } => {
                        if let Answered(result) = obliging(9999, &request) {
                            call.input(Input::Reply { id, result });
                        }
                    }
                    Output::Delegate { .. } => prop_assert!(false, "nothing is delegated any more"),
                    Output::WaitUntil(at) => call.now = call.now.plus(at - call.now.instant),
                    Output::Event(_) => {}
                    Output::Idle => break,
                }
            }
        }
        prop_assert_eq!(call.own.status(), Status::Disconnected);
        prop_assert!(!call.own.maybe_published);
    }
}
