//! Every row of the state table, the time budgets and the call counts, on virtual time.

use proptest::prelude::*;

use super::*;

const MS: fn(u64) -> Duration = Duration::from_millis;

/// A job with a homeserver and an SFU that answer at once, as `homeserver` and `sfu` say.
struct World {
    job: Job,
    begin: Instant,
    now: Instant,
    homeserver: Outcome,
    sfu: Presence,
    log: Vec<(u64, Seen)>,
    late: Vec<(Seen, Duration)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    Restart,
    Send,
    Look,
    NotRestarted,
    Ended(End),
}

fn start(timeout: u64) -> Start {
    Start {
        timeout: MS(timeout),
        remaining: MS(timeout),
        was_connected: false,
        first_look: Duration::ZERO,
        sanity: None,
        superseded: None,
        seed: 1,
        rounds: now(),
    }
}

#[expect(clippy::disallowed_methods, reason = "an Instant has no other origin; the test moves it by itself")]
fn now() -> Instant {
    Instant::now()
}

impl World {
    fn new(start: Start) -> Self {
        let now = start.rounds;
        let job = Job::new(now, start);
        let (homeserver, sfu) = (Outcome::Done, Presence::Unknown);
        let mut world = Self { job, begin: now, now, homeserver, sfu, log: Vec::new(), late: Vec::new() };
        world.job.handle_timeout(now);
        world.settle();
        world
    }

    fn handle(&mut self, input: Input) {
        self.job.handle(self.now, input);
        self.settle();
    }

    fn joined(&mut self, sid: Option<&str>) {
        self.handle(Input::Joined { sid: sid.map(str::to_owned) });
    }

    fn left(&mut self, sid: Option<&str>, why: Leave) {
        self.handle(Input::Left { sid: sid.map(str::to_owned), why });
    }

    /// Answers calls until there are none.
    fn settle(&mut self) {
        while let Some(output) = self.job.poll() {
            let at = u64::try_from((self.now - self.begin).as_millis()).unwrap();
            match output {
                Output::Restart(call) => {
                    self.log.push((at, Seen::Restart));
                    self.job.handle(self.now, Input::Called { call, outcome: self.homeserver });
                }
                Output::Send(call) => {
                    self.log.push((at, Seen::Send));
                    self.job.handle(self.now, Input::Called { call, outcome: self.homeserver });
                }
                Output::Look(call) => {
                    self.log.push((at, Seen::Look));
                    self.job.handle(self.now, Input::Looked { call, presence: self.sfu.clone() });
                }
                Output::Restarted { late, .. } => self.late.push((Seen::Restart, late)),
                Output::NotRestarted => self.log.push((at, Seen::NotRestarted)),
                Output::Sent { late } => self.late.push((Seen::Send, late)),
                Output::Ended(end) => self.log.push((at, Seen::Ended(end))),
            }
        }
    }

    /// Lets time pass up to `at` after the beginning.
    fn until(&mut self, at: u64) {
        let end = self.begin + MS(at);
        while let Some(due) = self.job.timeout().filter(|due| *due <= end) {
            self.now = self.now.max(due);
            self.job.handle_timeout(self.now);
            self.settle();
        }
        self.now = end;
    }

    /// What was seen, looks aside.
    fn calls(&self) -> Vec<Seen> {
        self.log.iter().map(|(_, seen)| *seen).filter(|seen| *seen != Seen::Look).collect()
    }

    fn times(&self, what: Seen) -> Vec<u64> {
        self.log.iter().filter(|(_, seen)| *seen == what).map(|(at, _)| *at).collect()
    }
}

fn connected(timeout: u64) -> World {
    let mut world = World::new(start(timeout));
    world.joined(None);
    world
}

#[test]
fn a_join_restarts_at_once_and_then_in_time() {
    let mut world = connected(1500);
    world.until(3400);
    let restarts = world.times(Seen::Restart);
    assert_eq!(restarts[0], 0);
    assert!(restarts[1] <= 1200, "{restarts:?}");
    assert!(restarts.windows(2).all(|pair| pair[1] - pair[0] >= 400), "{restarts:?}");
}

#[test]
fn a_participant_found_by_a_look_counts_as_joined() {
    let mut world = World::new(start(8000));
    assert_eq!(world.times(Seen::Look), [0], "asked at once");
    world.sfu = Presence::Present { sid: Some("PA_1".into()) };
    world.until(2000);
    assert_eq!(world.times(Seen::Restart).len(), 1);
    assert_eq!(world.job.sid(), Some("PA_1"));
    let looks = world.times(Seen::Look).len();
    world.until(7000);
    assert_eq!(world.times(Seen::Look).len(), looks, "no more looks once it is there");
}

#[test]
fn looks_end_with_a_webhook_that_tells_more() {
    let mut world = connected(60_000);
    world.until(59_000);
    assert_eq!(world.times(Seen::Look), [0]);
}

#[test]
fn leaves_of_every_kind_send_from_connected() {
    for why in [Leave::OnPurpose, Leave::Otherwise] {
        let mut world = connected(8000);
        world.left(None, why);
        assert_eq!(world.calls(), [Seen::Restart, Seen::Send, Seen::Ended(End::Sent)], "{why:?}");
        assert_eq!(world.job.timeout(), None);
    }
}

#[test]
fn before_a_join_a_deliberate_leave_sends_and_a_failed_connect_is_silent() {
    let mut world = World::new(start(8000));
    world.left(None, Leave::OnPurpose);
    assert_eq!(world.calls(), [Seen::Send, Seen::Ended(End::Sent)]);
    let mut world = World::new(start(8000));
    world.left(Some("PA_1"), Leave::Otherwise);
    assert_eq!(world.calls(), [Seen::Ended(End::Aborted)]);
}

#[test]
fn whoever_never_comes_is_gone_after_the_delay_or_an_hour() {
    for (timeout, at) in [(1000, 1000), (7_200_000, 3_600_000)] {
        let mut world = World::new(start(timeout));
        world.sfu = Presence::Absent;
        world.until(at - 1);
        assert_eq!(world.calls(), []);
        world.until(at);
        assert_eq!(world.calls(), [Seen::Send, Seen::Ended(End::Sent)]);
    }
}

#[test]
fn an_event_that_is_gone_or_refused_ends_the_job_without_a_send() {
    for outcome in [Outcome::Gone, Outcome::Settled, Outcome::Refused] {
        let mut world = connected(1000);
        world.homeserver = outcome;
        world.until(3000);
        assert_eq!(world.calls().last(), Some(&Seen::Ended(End::Lost)), "{outcome:?}");
        assert!(world.times(Seen::Send).is_empty());
    }
}

#[test]
fn lateness_counts_from_when_it_was_due_to_when_it_was_done() {
    let mut world = connected(8000);
    assert_eq!(world.late, [(Seen::Restart, Duration::ZERO)]);
    // Due at 4 s; the homeserver works again from 6 s on.
    world.until(3999);
    world.homeserver = Outcome::Later(None);
    world.until(6000);
    world.homeserver = Outcome::Done;
    world.until(7000);
    assert!(
        matches!(world.late[1], (Seen::Restart, late) if late >= MS(2000) && late < MS(3000)),
        "{:?}",
        world.late
    );
    world.homeserver = Outcome::Later(Some(MS(700)));
    world.left(None, Leave::OnPurpose);
    world.homeserver = Outcome::Gone;
    world.until(9000);
    assert_eq!(world.late[2..], [(Seen::Send, MS(700))]);
}

#[test]
fn a_send_that_finds_nothing_is_made_once() {
    for outcome in [Outcome::Gone, Outcome::Settled, Outcome::Done] {
        let mut world = connected(8000);
        world.homeserver = outcome;
        world.left(None, Leave::OnPurpose);
        world.until(60_000);
        assert_eq!(world.times(Seen::Send).len(), 1, "{outcome:?}");
    }
}

#[test]
fn a_send_is_tried_again_within_its_window() {
    let mut world = connected(8000);
    world.homeserver = Outcome::Later(None);
    world.left(None, Leave::OnPurpose);
    world.until(60_000);
    let sends = world.times(Seen::Send);
    assert!(sends.len() > 3 && sends.iter().all(|at| *at <= 8000), "{sends:?}");
    assert_eq!(world.calls().last(), Some(&Seen::Ended(End::NotSent)));
}

#[test]
fn a_restart_is_tried_until_a_little_beyond_the_deadline_and_a_later_leave_is_still_sent() {
    let mut world = connected(8000);
    world.homeserver = Outcome::Later(None);
    world.until(60_000);
    let restarts = world.times(Seen::Restart);
    assert!(restarts.iter().any(|at| *at > 7000) && restarts.iter().all(|at| *at <= 9000), "{restarts:?}");
    assert_eq!(world.job.phase(), Phase::Connected);
    world.homeserver = Outcome::Done;
    world.left(None, Leave::Otherwise);
    assert_eq!(world.calls().last(), Some(&Seen::Ended(End::Sent)));

    let mut world = connected(8000);
    world.homeserver = Outcome::Later(None);
    world.until(4_000_000);
    assert_eq!(world.calls().last(), Some(&Seen::Ended(End::Expired)), "not for ever");
}

#[test]
fn a_failed_restart_recovers_before_the_deadline() {
    let mut world = connected(8000);
    world.homeserver = Outcome::Later(Some(MS(2000)));
    world.until(4100);
    assert_eq!(world.times(Seen::Restart), [0, 4000]);
    world.homeserver = Outcome::Done;
    world.until(30_000);
    let restarts = world.times(Seen::Restart);
    assert_eq!(restarts[..4], [0, 4000, 6000, 10_000], "the homeserver said when");
}

#[test]
fn a_hint_beyond_the_deadline_ends_the_restarts() {
    let mut world = connected(8000);
    world.homeserver = Outcome::Later(Some(MS(60_000)));
    world.until(100_000);
    assert_eq!(world.times(Seen::Restart), [0, 4000]);
}

#[test]
fn the_end_of_another_connection_is_no_leave() {
    for order in ["join first", "leave first"] {
        let mut world = World::new(start(8000));
        world.joined(Some("PA_1"));
        world.sfu = Presence::Present { sid: Some("PA_2".into()) };
        if order == "join first" {
            world.joined(Some("PA_2"));
            world.left(Some("PA_1"), Leave::TakenOver);
            world.left(Some("PA_1"), Leave::Otherwise);
        } else {
            world.left(Some("PA_1"), Leave::TakenOver);
            world.joined(Some("PA_2"));
        }
        assert_eq!(world.calls(), [Seen::Restart], "{order}");
        assert_eq!(world.job.sid(), Some("PA_2"));
        world.left(Some("PA_2"), Leave::Otherwise);
        assert_eq!(world.calls().last(), Some(&Seen::Ended(End::Sent)));
    }
}

#[test]
fn a_connection_that_nobody_took_over_is_a_leave_after_two_looks() {
    let mut world = World::new(start(8000));
    world.joined(Some("PA_1"));
    world.sfu = Presence::Absent;
    world.left(Some("PA_1"), Leave::TakenOver);
    assert_eq!(world.calls(), [Seen::Restart]);
    world.until(2000);
    assert_eq!(world.times(Seen::Send), [500]);
}

#[test]
fn an_sfu_that_cannot_be_asked_does_not_end_a_call() {
    let mut world = World::new(start(8000));
    world.joined(Some("PA_1"));
    world.left(Some("PA_1"), Leave::TakenOver);
    world.until(60_000);
    assert!(world.times(Seen::Send).is_empty() && world.times(Seen::Look).len() > 3);
    world.left(Some("PA_2"), Leave::Otherwise);
    assert_eq!(world.times(Seen::Send).len(), 1, "any leave counts when the connection is not known");
}

#[test]
fn the_end_of_the_replaced_jobs_connection_is_no_news() {
    let mut world = World::new(Start { superseded: Some("PA_1".into()), ..start(8000) });
    world.left(Some("PA_1"), Leave::OnPurpose);
    assert_eq!(world.calls(), []);
    world.left(Some("PA_2"), Leave::OnPurpose);
    assert_eq!(world.calls(), [Seen::Send, Seen::Ended(End::Sent)]);
}

#[test]
fn sanity_checks_need_two_misses() {
    let mut world = World::new(Start { sanity: Some(MS(1000)), ..start(8000) });
    world.sfu = Presence::Present { sid: None };
    world.joined(None);
    world.until(3500);
    world.sfu = Presence::Absent;
    world.until(4500);
    world.sfu = Presence::Present { sid: None };
    world.until(6500);
    assert!(world.times(Seen::Send).is_empty(), "one miss is none");
    world.sfu = Presence::Unknown;
    world.until(20_500);
    assert!(world.times(Seen::Send).is_empty(), "an SFU that is down is none");
    world.sfu = Presence::Absent;
    world.until(26_500);
    assert_eq!(world.times(Seen::Send), [22_000]);
}

#[test]
fn looks_into_one_room_meet() {
    let rounds = now();
    let look_times = |start: Start, present: bool| {
        let (mut looks, mut times) = (0, std::collections::BTreeSet::new());
        for n in 0..50 {
            let mut world = World::new(Start { seed: n, rounds, ..start.clone() });
            world.sfu = Presence::Absent;
            (world.begin, world.now) = (rounds, rounds + MS(37 * n));
            if present {
                world.sfu = Presence::Present { sid: None };
                world.joined(None);
            }
            world.until(600_000);
            let late: Vec<_> = world.times(Seen::Look).into_iter().filter(|at| *at > 300_000).collect();
            looks += late.len();
            times.extend(late);
        }
        (looks, times.len())
    };
    let sanity = look_times(Start { sanity: Some(MS(10_000)), ..start(3_600_000) }, true);
    assert_eq!(sanity, (1500, 30), "once for all in each interval");
    let (looks, times) = look_times(start(3_600_000), false);
    assert!(looks >= 150 && times <= 76, "{looks} looks at {times} times: at every fourth second at most");
}

#[test]
fn a_restored_job_uses_what_is_left_of_its_time() {
    let mut world = World::new(Start { remaining: MS(3000), ..start(8000) });
    world.until(2999);
    assert_eq!(world.calls(), []);
    world.until(3000);
    assert_eq!(world.calls(), [Seen::Send, Seen::Ended(End::Sent)]);
}

#[test]
fn a_leave_during_the_services_restart_is_noticed() {
    let mut world = World::new(Start { was_connected: true, ..start(3_600_000) });
    world.sfu = Presence::Absent;
    world.until(30_000);
    assert_eq!(world.times(Seen::Send).len(), 1);
}

#[test]
fn the_leave_of_a_connection_that_was_not_told_of_is_looked_into() {
    for why in [Leave::OnPurpose, Leave::Otherwise] {
        // The webhook about its coming was lost, and it has gone.
        let mut world = World::new(start(60_000));
        world.joined(Some("PA_1"));
        world.sfu = Presence::Absent;
        world.left(Some("PA_2"), why);
        world.until(1000);
        assert_eq!(world.times(Seen::Send), [500], "{why:?}");

        // An old connection's, told late.
        let mut world = World::new(start(60_000));
        world.joined(Some("PA_2"));
        world.sfu = Presence::Present { sid: Some("PA_2".into()) };
        world.left(Some("PA_1"), why);
        world.until(10_000);
        assert_eq!(world.calls(), [Seen::Restart], "{why:?}");
        assert_eq!(world.times(Seen::Look), [0, 0]);
        world.left(Some("PA_2"), why);
        assert_eq!(world.times(Seen::Send), [10_000], "{why:?}");
    }
    let mut world = World::new(start(60_000));
    world.joined(Some("PA_2"));
    world.left(Some("PA_1"), Leave::TakenOver);
    assert_eq!(world.times(Seen::Look), [0], "an ordinary reconnect costs no call");
}

#[test]
fn connections_may_be_told_of_the_wrong_way_round() {
    let reconnected = || {
        let mut world = World::new(start(60_000));
        // The second webhook is about the first connection.
        world.joined(Some("PA_2"));
        world.joined(Some("PA_1"));
        world
    };
    let mut world = reconnected();
    world.sfu = Presence::Present { sid: Some("PA_2".into()) };
    world.left(Some("PA_1"), Leave::Otherwise);
    world.until(10_000);
    assert_eq!(world.calls(), [Seen::Restart], "it is there");
    world.left(Some("PA_2"), Leave::OnPurpose);
    assert_eq!(world.times(Seen::Send), [10_000], "and now it has gone");

    let mut world = reconnected();
    world.sfu = Presence::Absent;
    world.left(Some("PA_1"), Leave::OnPurpose);
    world.until(1000);
    assert_eq!(world.times(Seen::Send), [500], "nobody is there: the other end was not told");

    let mut world = reconnected();
    world.left(Some("PA_1"), Leave::OnPurpose);
    assert_eq!(world.times(Seen::Send), [0], "an SFU that cannot be asked does not contradict its webhook");

    let mut world = reconnected();
    world.joined(None);
    world.joined(Some("PA_2"));
    world.left(Some("PA_2"), Leave::OnPurpose);
    assert_eq!(world.times(Seen::Send), [0], "what has no id makes the others unknown");

    let mut world = reconnected();
    world.left(Some("PA_2"), Leave::TakenOver);
    world.left(Some("PA_1"), Leave::Otherwise);
    assert_eq!(world.times(Seen::Send), [0], "both ends were told");
}

#[test]
fn an_sfu_that_is_down_after_the_services_restart_ends_no_call() {
    let restored = || World::new(Start { was_connected: true, remaining: MS(3000), ..start(8000) });
    let mut world = restored();
    world.until(60_000);
    assert_eq!(world.times(Seen::Restart)[..2], [0, 4000]);
    assert!(world.times(Seen::Send).is_empty());
    world.sfu = Presence::Present { sid: Some("PA_2".into()) };
    world.until(130_000);
    world.left(Some("PA_1"), Leave::Otherwise);
    assert!(world.times(Seen::Send).is_empty(), "it is there by another connection");
    world.left(Some("PA_2"), Leave::Otherwise);
    assert_eq!(world.times(Seen::Send), [130_000]);

    // Gone meanwhile: two looks say so, as far apart as after any restart.
    let mut world = restored();
    world.until(20_000);
    world.sfu = Presence::Absent;
    world.until(100_000);
    let (send, looks) = (world.times(Seen::Send)[0], world.times(Seen::Look));
    assert_eq!(looks.iter().rev().take(2).collect::<Vec<_>>(), [&send, &(send - 5000)]);
    assert_eq!(world.times(Seen::Send).len(), 1);

    // A webhook that does not say of which connection it is: only a look can tell.
    let mut world = restored();
    world.left(None, Leave::Otherwise);
    world.sfu = Presence::Present { sid: Some("PA_2".into()) };
    world.until(60_000);
    assert!(world.times(Seen::Send).is_empty());
}

#[test]
fn a_leave_that_is_told_after_the_services_restart_is_sent_if_nobody_is_there() {
    for why in [Leave::Otherwise, Leave::TakenOver] {
        let mut world = World::new(Start { was_connected: true, ..start(3_600_000) });
        world.until(100);
        world.sfu = Presence::Absent;
        world.left(Some("PA_1"), why);
        world.until(1000);
        assert_eq!(world.times(Seen::Send), [600]);
        assert_eq!(world.calls(), [Seen::Restart, Seen::Send, Seen::Ended(End::Sent)]);
    }
    // It may be about the connection before the one that we have not been told of.
    let mut world = World::new(Start { was_connected: true, ..start(3_600_000) });
    world.sfu = Presence::Present { sid: Some("PA_2".into()) };
    world.left(Some("PA_1"), Leave::Otherwise);
    world.until(10_000);
    assert_eq!(world.calls(), [Seen::Restart]);
}

#[test]
fn tiny_delays_do_not_hammer_the_homeserver() {
    let mut world = connected(1);
    world.until(10_000);
    assert!(world.times(Seen::Restart).len() <= 26);
    for (timeout, least, most) in
        [(500, 400, 400), (1000, 400, 800), (8000, 4000, 4000), (120_000, 96_000, 96_000)]
    {
        let cadence = cadence(MS(timeout));
        assert!((MS(least)..=MS(most)).contains(&cadence), "{timeout}: {cadence:?}");
    }
}

#[test]
fn nothing_comes_after_the_end() {
    let mut world = connected(8000);
    world.left(None, Leave::OnPurpose);
    let seen = world.log.len();
    world.joined(None);
    world.left(None, Leave::Otherwise);
    world.handle(Input::Called { call: 2, outcome: Outcome::Later(None) });
    world.until(1_000_000);
    assert_eq!(world.log.len(), seen);
}

fn any_input() -> impl Strategy<Value = Input> {
    let sid = || prop::option::of("[ab]");
    let why = prop_oneof![Just(Leave::OnPurpose), Just(Leave::TakenOver), Just(Leave::Otherwise)];
    let presence = prop_oneof![
        sid().prop_map(|sid| Presence::Present { sid }),
        Just(Presence::Absent),
        Just(Presence::Unknown)
    ];
    let outcome = prop_oneof![
        Just(Outcome::Done),
        Just(Outcome::Gone),
        Just(Outcome::Settled),
        Just(Outcome::Refused),
        prop::option::of((0u64..100_000).prop_map(MS)).prop_map(Outcome::Later),
    ];
    prop_oneof![
        sid().prop_map(|sid| Input::Joined { sid }),
        (sid(), why).prop_map(|(sid, why)| Input::Left { sid, why }),
        (0u64..12, presence).prop_map(|(call, presence)| Input::Looked { call, presence }),
        (0u64..12, outcome).prop_map(|(call, outcome)| Input::Called { call, outcome }),
    ]
}

proptest! {
    #[test]
    fn whatever_happens_there_is_one_end_and_one_call_at_a_time(
        steps in prop::collection::vec((0u64..20_000, any_input()), 0..60),
        timeout in 1u64..100_000, sanity in prop::option::of(1u64..10_000), was_connected: bool,
    ) {
        #[expect(clippy::disallowed_methods, reason = "an Instant has no other origin; the test moves it by itself")]
        let mut now = Instant::now();
        let mut job = Job::new(now, Start { sanity: sanity.map(MS), was_connected, ..start(timeout) });
        let (mut ended, mut sent, mut flying) = (false, false, None::<CallId>);
        for (wait, input) in steps {
            now += MS(wait);
            job.handle_timeout(now);
            let answers = match &input {
                Input::Called { call, outcome } => flying.take_if(|f| f == call).map(|_| *outcome),
                _ => None,
            };
            if job.phase() == Phase::Leaving && matches!(answers, Some(Outcome::Done)) {
                sent = true;
            }
            job.handle(now, input);
            while let Some(output) = job.poll() {
                prop_assert!(!ended, "{output:?} after the end");
                match output {
                    Output::Send(call) => {
                        prop_assert!(!sent, "sent again");
                        flying = Some(call);
                    }
                    Output::Restart(call) => {
                        prop_assert!(flying.is_none(), "two calls at a time");
                        flying = Some(call);
                    }
                    Output::Ended(_) => ended = true,
                    Output::Look(_)
                    | Output::Restarted { .. }
                    | Output::NotRestarted
                    | Output::Sent { .. } => {}
                }
            }
            prop_assert_eq!(ended, job.phase() == Phase::Ended);
            if let Some(due) = job.timeout() {
                prop_assert!(due > now, "something due was not done");
            }
        }
    }
}
