//! Healing on virtual time.

use std::collections::BTreeSet;

use super::{super::presence::Presence, *};
use crate::machine::testing::{device, state_member};

const ME: (&str, &str) = ("@alice:example.org", "ME");
const BOB: (&str, &str) = ("@bob:example.org", "BOB");
const CARL: (&str, &str) = ("@carl:example.org", "CARL");

struct Clinic {
    healing: Healing,
    presence: Presence,
    start: Instant,
    /// Seconds since the start.
    at: u64,
    refused: BTreeSet<Device>,
    /// When which device was sent our key again.
    sent: Vec<(u64, &'static str)>,
    renewed: Vec<u64>,
}

fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

impl Clinic {
    #[expect(clippy::disallowed_methods, reason = "an arbitrary origin of virtual time")]
    fn new() -> Self {
        let start = Instant::now();
        let mut healing = Healing::new(HealingConfig::default());
        healing.join(start);
        let presence = Presence::new(device(ME.0, ME.1));
        Self {
            healing,
            presence,
            start,
            at: 0,
            refused: BTreeSet::new(),
            sent: Vec::new(),
            renewed: Vec::new(),
        }
    }

    fn now(&self) -> Instant {
        self.start + secs(self.at)
    }

    fn members(&mut self, members: &[((&str, &str), u64)]) {
        let members: Vec<_> =
            members.iter().map(|((user, id), created)| state_member(user, id, *created)).collect();
        self.healing.members(self.now(), &self.presence.update(&members));
    }

    fn keyed(&mut self, who: (&str, &str), new: bool) {
        self.healing.keyed(self.now(), &state_member(who.0, who.1, 0).key(), new);
    }

    /// `heard`: seconds since the start.
    fn media(&mut self, who: (&str, &str), publishing: bool, heard: Option<u64>) {
        let heard = heard.map(|at| self.start + secs(at));
        self.healing.media(self.now(), &state_member(who.0, who.1, 0).key(), publishing, heard);
    }

    fn run(&mut self, until: u64) {
        let end = self.start + secs(until);
        let mut now = self.now();
        loop {
            let at = (now - self.start).as_secs();
            for remedy in self.healing.poll(now, |device| self.refused.contains(device)) {
                match remedy {
                    Remedy::SendKey(to) if to.device_id == BOB.1 => self.sent.push((at, "BOB")),
                    Remedy::SendKey(_) => self.sent.push((at, "CARL")),
                    Remedy::RenewMembership => self.renewed.push(at),
                }
            }
            let Some(next) = self.healing.next().filter(|next| *next <= end) else { break };
            assert!(next > now, "a wait ends in the future");
            now = next;
        }
        self.at = until;
    }

    fn times(&self) -> Vec<u64> {
        self.sent.iter().map(|(at, _)| *at).collect()
    }
}

#[test]
fn missing_key_is_asked_for_after_10_s_with_growing_waits() {
    let mut clinic = Clinic::new();
    clinic.members(&[(ME, 1), (BOB, 1)]);
    clinic.run(9);
    assert_eq!(clinic.sent, []);
    clinic.run(400);
    assert_eq!(clinic.times(), [10, 30, 70, 150, 310]);
    clinic.run(40_000);
    let times = clinic.times();
    assert_eq!(times[times.len() - 1] - times[times.len() - 2], 3600);
    assert!(clinic.renewed.is_empty(), "a member without media may be a crashed client's");
}

#[test]
fn nothing_happens_before_joining() {
    let mut clinic = Clinic::new();
    clinic.healing.leave();
    clinic.members(&[(BOB, 1)]);
    clinic.run(100);
    assert_eq!(clinic.sent, []);
    clinic.healing.join(clinic.now());
    clinic.run(115);
    assert_eq!(clinic.times(), [110], "ten seconds after both joined");
}

#[test]
fn key_that_arrives_ends_the_treatment() {
    let mut clinic = Clinic::new();
    clinic.members(&[(BOB, 1)]);
    clinic.media(BOB, true, None);
    clinic.run(15);
    clinic.keyed(BOB, true);
    clinic.media(BOB, true, Some(15));
    clinic.run(24);
    assert_eq!((clinic.times(), clinic.renewed.clone()), (vec![10], vec![]));
    // It works; a later failure starts from the beginning.
    for at in 24..100 {
        clinic.run(at);
        clinic.media(BOB, true, Some(at));
    }
    clinic.run(140);
    assert_eq!(clinic.times(), [10, 109, 129]);
}

#[test]
fn renewal_follows_if_media_arrives_without_a_key() {
    let mut clinic = Clinic::new();
    clinic.members(&[(BOB, 1)]);
    clinic.media(BOB, true, None);
    clinic.run(19);
    assert!(clinic.renewed.is_empty());
    clinic.run(20_000);
    // Gaps of 1, 2, 4, … minutes, at most an hour.
    assert_eq!(clinic.renewed, [20, 80, 200, 440, 920, 1880, 3800, 7400, 11_000, 14_600, 18_200]);
}

#[test]
fn renewal_follows_at_once_if_media_arrives_late() {
    let mut clinic = Clinic::new();
    clinic.members(&[(BOB, 1)]);
    clinic.run(100);
    clinic.media(BOB, true, None);
    clinic.run(101);
    assert_eq!(clinic.renewed, [100]);
}

#[test]
fn renewals_are_counted_over_the_whole_call() {
    let mut clinic = Clinic::new();
    clinic.members(&[(BOB, 1), (CARL, 1)]);
    clinic.media(BOB, true, None);
    clinic.run(30);
    clinic.media(CARL, true, None);
    clinic.run(100);
    assert_eq!(clinic.renewed, [20, 80]);
    // Members that provoke a renewal whenever one is allowed do not reset the wait.
    for n in 0..200 {
        clinic.keyed(BOB, true);
        clinic.members(&[]);
        clinic.members(&[(BOB, n)]);
        clinic.media(BOB, true, None);
        clinic.run(100 + (n + 1) * 25);
    }
    assert!(clinic.renewed.len() < 9, "{:?}", clinic.renewed);
}

#[test]
fn need_long_after_the_last_renewal_starts_anew() {
    let mut clinic = Clinic::new();
    clinic.members(&[(BOB, 1)]);
    clinic.media(BOB, true, None);
    clinic.run(90);
    clinic.keyed(BOB, true);
    clinic.media(BOB, false, None);
    clinic.run(1000);
    clinic.members(&[(CARL, 1)]);
    clinic.media(CARL, true, None);
    clinic.run(1100);
    assert_eq!(clinic.renewed, [20, 80, 1020, 1080]);
}

#[test]
fn renewal_can_be_switched_off() {
    let mut clinic = Clinic::new();
    clinic.healing.config.renew_membership = false;
    clinic.members(&[(BOB, 1)]);
    clinic.media(BOB, true, None);
    clinic.run(1000);
    assert!(clinic.renewed.is_empty());
    assert!(!clinic.sent.is_empty());
}

#[test]
fn media_that_does_not_authenticate_is_treated_without_renewal() {
    let mut clinic = Clinic::new();
    clinic.members(&[(BOB, 1)]);
    clinic.keyed(BOB, true);
    clinic.run(100);
    clinic.media(BOB, true, None);
    clinic.run(109);
    assert_eq!(clinic.sent, []);
    clinic.run(1000);
    assert_eq!(clinic.times(), [110, 130, 170, 250, 410, 730]);
    assert!(clinic.renewed.is_empty());
    // Frames authenticate again, then stop again.
    clinic.media(BOB, true, Some(1000));
    clinic.run(1030);
    assert_eq!(clinic.times()[6..], [1010, 1030]);
}

#[test]
fn key_sent_again_does_not_shorten_the_wait() {
    let mut clinic = Clinic::new();
    clinic.members(&[(BOB, 1)]);
    clinic.keyed(BOB, true);
    clinic.media(BOB, true, None);
    for at in 0..200 {
        clinic.run(at);
        clinic.keyed(BOB, false);
    }
    assert_eq!(clinic.times(), [10, 30, 70, 150]);
}

#[test]
fn muted_member_with_a_key_is_fine() {
    let mut clinic = Clinic::new();
    clinic.members(&[(BOB, 1)]);
    clinic.keyed(BOB, true);
    clinic.media(BOB, false, None);
    clinic.run(10_000);
    assert_eq!(clinic.sent, []);
}

#[test]
fn rejoin_without_a_new_key_is_treated_and_renewal_helps() {
    let mut clinic = Clinic::new();
    clinic.members(&[(BOB, 1)]);
    clinic.keyed(BOB, true);
    clinic.media(BOB, true, Some(5));
    clinic.run(8);
    clinic.members(&[(BOB, 2)]);
    clinic.run(17);
    assert_eq!(clinic.sent, []);
    clinic.run(40);
    assert_eq!((clinic.times(), clinic.renewed.clone()), (vec![18, 38], vec![28]));
}

#[test]
fn renewed_membership_of_a_member_that_is_heard_is_fine() {
    let mut clinic = Clinic::new();
    clinic.members(&[(BOB, 1)]);
    clinic.keyed(BOB, true);
    clinic.members(&[(BOB, 2)]);
    for at in 0..100 {
        clinic.run(at);
        clinic.media(BOB, true, Some(at));
    }
    assert_eq!((clinic.sent.len(), clinic.renewed.len()), (0, 0));
    // Silence later on is no reason to renew.
    clinic.run(200);
    assert!(!clinic.sent.is_empty());
    assert!(clinic.renewed.is_empty());
}

#[test]
fn refused_member_is_left_alone_until_trust_changes() {
    let mut clinic = Clinic::new();
    clinic.refused.insert(device(BOB.0, BOB.1));
    clinic.members(&[(BOB, 1)]);
    clinic.media(BOB, true, None);
    clinic.run(1000);
    assert_eq!((clinic.sent.len(), clinic.renewed.len()), (0, 0));
    clinic.refused.clear();
    clinic.healing.trust_changed(clinic.now(), &device(BOB.0, BOB.1).user_id);
    clinic.run(1015);
    assert_eq!(clinic.times(), [1010]);
}

#[test]
fn leaver_needs_no_treatment() {
    let mut clinic = Clinic::new();
    clinic.members(&[(BOB, 1)]);
    clinic.run(15);
    clinic.members(&[]);
    clinic.run(1000);
    assert_eq!(clinic.times(), [10]);
}
