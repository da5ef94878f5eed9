//! What must hold for one job, whatever happens to it and however much time passes in between.

use std::time::{Duration, Instant};

use super::{CallId, End, Input, Job, Leave, Outcome, Output, Phase, Presence, Start};
use crate::fuzzing::{beginning, duration};

/// The shortest wait between two attempts: half of the least backoff.
const LEAST_PAUSE: Duration = Duration::from_millis(50);

/// The first four bytes say how the job begins. Then every two bytes are one event: a letter and how.
pub(crate) fn job_machine(data: &[u8]) {
    let Some(([timeout, remaining, sanity, flags], events)) = data.split_first_chunk() else { return };
    let timeout = duration(*timeout).max(Duration::from_millis(1));
    let mut world = World::new(Start {
        timeout,
        remaining: duration(*remaining).clamp(Duration::from_millis(1), timeout),
        was_connected: flags & 1 == 1,
        first_look: duration(flags >> 3),
        sanity: Some(duration(*sanity)).filter(|interval| !interval.is_zero()),
        superseded: sid(flags >> 1),
        seed: u64::from(*flags),
        rounds: beginning(),
    });
    for event in events.chunks_exact(2) {
        world.event(event[0], event[1]);
    }
    world.finish();
}

fn sid(how: u8) -> Option<String> {
    [None, Some("a"), Some("b")][usize::from(how % 3)].map(str::to_owned)
}

/// A job, and the calls that are on their way for it.
struct World {
    job: Job,
    now: Instant,
    restart: Option<CallId>,
    send: Option<CallId>,
    look: Option<CallId>,
    /// When the last of each was made.
    restarted: Option<Instant>,
    sent: Option<Instant>,
    calls: CallId,
    settled: bool,
    end: Option<End>,
}

impl World {
    fn new(start: Start) -> Self {
        let now = beginning();
        let mut world = Self {
            job: Job::new(now, start),
            now,
            restart: None,
            send: None,
            look: None,
            restarted: None,
            sent: None,
            calls: 0,
            settled: false,
            end: None,
        };
        world.pass(Duration::ZERO);
        world
    }

    fn event(&mut self, letter: u8, how: u8) {
        match letter {
            b'J' => self.handle(Input::Joined { sid: sid(how) }),
            b'L' => self.handle(Input::Left { sid: sid(how), why: Leave::OnPurpose }),
            b'T' => self.handle(Input::Left { sid: sid(how), why: Leave::TakenOver }),
            b'O' => self.handle(Input::Left { sid: sid(how), why: Leave::Otherwise }),
            b'P' => self.pass(duration(how)),
            b'D' => self.pass_until_due(),
            b'K' => {
                let presence = match how % 3 {
                    0 => Presence::Present { sid: sid(how / 3) },
                    1 => Presence::Absent,
                    _ => Presence::Unknown,
                };
                if let Some(call) = self.look.take() {
                    self.handle(Input::Looked { call, presence });
                }
            }
            b'X' => {
                // The answer to a call that was never made, or that nobody waits for any more.
                let call = self.calls + 1 + u64::from(how);
                self.handle(Input::Looked { call, presence: Presence::Absent });
                self.handle(Input::Called { call, outcome: Outcome::Done });
            }
            b'R' => self.restart_answered(how),
            _ => self.send_answered(how),
        }
    }

    fn restart_answered(&mut self, how: u8) {
        if let Some(call) = self.restart.take() {
            self.handle(Input::Called { call, outcome: outcome(how) });
        }
    }

    fn send_answered(&mut self, how: u8) {
        if let Some(call) = self.send.take() {
            let outcome = outcome(how);
            self.settled |= matches!(outcome, Outcome::Done | Outcome::Gone | Outcome::Settled);
            self.handle(Input::Called { call, outcome });
        }
    }

    fn handle(&mut self, input: Input) {
        self.job.handle(self.now, input);
        self.drain();
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
        self.job.handle_timeout(self.now);
        self.drain();
    }

    fn pass_until_due(&mut self) {
        if let Some(due) = self.job.timeout() {
            self.pass(due.saturating_duration_since(self.now));
        }
    }

    fn drain(&mut self) {
        while let Some(output) = self.job.poll() {
            assert_eq!(self.end, None, "{output:?} after the end");
            if let Output::Restart(call) | Output::Send(call) | Output::Look(call) = output {
                assert!(call > self.calls, "a call of which the answer could be taken for another's");
                self.calls = call;
            }
            match output {
                Output::Restart(call) => {
                    assert!(self.restart.is_none(), "two restarts at a time");
                    assert!(self.sent.is_none(), "restarted while it is being sent");
                    let pause = self.restarted.map(|before| self.now - before);
                    assert!(pause.is_none_or(|pause| pause >= LEAST_PAUSE), "restarted after {pause:?}");
                    self.restart = Some(call);
                    self.restarted = Some(self.now);
                }
                Output::Send(call) => {
                    assert!(self.send.is_none(), "two sends at a time");
                    assert!(!self.settled, "sent again after success");
                    let pause = self.sent.map(|before| self.now - before);
                    assert!(pause.is_none_or(|pause| pause >= LEAST_PAUSE), "sent after {pause:?}");
                    self.send = Some(call);
                    self.sent = Some(self.now);
                }
                Output::Look(call) => self.look = Some(call),
                Output::Restarted { sent_at, .. } => assert_eq!(Some(sent_at), self.restarted),
                Output::Sent { .. } => assert!(self.settled, "it was not sent"),
                Output::NotRestarted => {
                    assert!(self.restart.is_none(), "given up while it is being restarted")
                }
                Output::Ended(end) => {
                    assert_eq!(end == End::Sent, self.settled, "{end:?}");
                    self.end = Some(end);
                }
            }
        }
        assert_eq!(self.end.is_some(), self.job.phase() == Phase::Ended);
        match self.job.timeout() {
            Some(due) => assert!(due > self.now, "what was due was not done"),
            None => assert!(
                self.end.is_some() || self.restart.is_some() || self.send.is_some() || self.look.is_some(),
                "it waits for nothing"
            ),
        }
    }

    /// Whatever has happened: once the participant goes and the homeserver answers, the event is sent.
    fn finish(&mut self) {
        if self.end.is_some() {
            return;
        }
        self.restart_answered(b'4');
        self.handle(Input::Left { sid: self.job.sid().map(str::to_owned), why: Leave::OnPurpose });
        // If it is not certain that this was its only connection, and the SFU does not say.
        self.event(b'K', 2);
        self.send_answered(0);
        // The next attempt, if it was between two.
        self.pass_until_due();
        self.send_answered(0);
        assert_eq!(self.end, Some(End::Sent));
    }
}

fn outcome(how: u8) -> Outcome {
    match how {
        0 | b'0' => Outcome::Done,
        1 | b'1' => Outcome::Gone,
        2 | b'2' => Outcome::Settled,
        3 | b'3' => Outcome::Refused,
        4 | b'4' => Outcome::Later(None),
        hint => Outcome::Later(Some(duration(hint))),
    }
}
