//! The registry against a model: a store that fails and a process that dies at any point.

use std::collections::HashSet;

use proptest::prelude::*;

use super::{
    model::{HOUR, World, key, params, rules},
    *,
};
use crate::delegation::Leave;

#[test]
fn a_request_is_answered_after_its_job_is_written() {
    let mut world = World::new();
    let ticket = world.add(0, HOUR).unwrap();
    assert!(world.replies.is_empty());
    world.answer_all();
    assert_eq!(world.replies, [ticket]);
    assert!(world.store.contains_key(&key(0)));
}

#[test]
fn a_store_that_is_out_of_order_fails_no_request_and_gets_everything_later() {
    let mut world = World::new();
    let first = world.add(0, HOUR).unwrap();
    let put = world.outstanding.iter().position(|e| matches!(e, Effect::Put { .. })).unwrap();
    world.answer(put, false);
    let second = world.add(0, HOUR).unwrap();
    assert_eq!(world.replies, [first, second]);
    assert!(world.store.is_empty());
    world.pass(Duration::from_secs(1));
    world.answer_all();
    assert_eq!(world.store[&key(0)].params.delay_id.as_str(), "id-2", "the newest is written");
    assert_eq!(world.registry.stats().unwritten, 0);
}

#[test]
fn a_write_that_failed_does_not_come_after_a_newer_one() {
    let mut world = World::new();
    world.add(0, HOUR).unwrap();
    world.add(0, HOUR).unwrap();
    let put = world.outstanding.iter().position(|e| matches!(e, Effect::Put { .. })).unwrap();
    world.answer(put, false);
    world.pass(Duration::from_secs(1));
    world.answer_all();
    assert_eq!(world.store[&key(0)].params.delay_id.as_str(), "id-2");
}

#[test]
fn replacing_a_job_stops_what_was_on_its_way_for_it() {
    let mut world = World::new();
    world.add(0, HOUR).unwrap();
    world.answer_all();
    world.event(0, Input::Joined { sid: None });
    world.event(0, Input::Left { sid: None, why: Leave::OnPurpose });
    assert!(world.outstanding.iter().any(|effect| matches!(effect, Effect::Send { .. })));
    world.add(0, HOUR).unwrap();
    assert!(!world.outstanding.iter().any(|e| matches!(e, Effect::Send { .. } | Effect::Restart { .. })));
    world.answer_all();
    assert_eq!(world.store[&key(0)].params.delay_id.as_str(), "id-2");
}

#[test]
fn bounds_hold() {
    let mut world = World::new();
    assert_eq!(world.add(0, Duration::from_millis(1)), Err(AddError::BadTimeout));
    assert_eq!(world.add(0, HOUR * 25), Err(AddError::BadTimeout));
    for n in [0, 2] {
        world.add(n, HOUR).unwrap();
    }
    assert_eq!(world.add(4, HOUR), Err(AddError::UserFull));
    world.add(2, HOUR).unwrap();
    for n in [1, 3] {
        world.add(n, HOUR).unwrap();
    }
    assert_eq!(world.add(5, HOUR), Err(AddError::Full));
    world.registry.close();
    assert_eq!(world.add(0, HOUR), Err(AddError::ShuttingDown));
}

#[test]
fn a_job_whose_event_has_fired_is_cleared_away_at_the_start() {
    let mut world = World::new();
    let restarted_at = world.now.wall - HOUR;
    let job = StoredJob { params: params(0, "old", HOUR), restarted_at, connected: Some(true) };
    world.sent.insert("old".into());
    world.store.insert(key(0), job.clone());
    world.registry.restore(world.now, job);
    world.collect();
    assert!(matches!(&world.outstanding[..], [Effect::Remove { .. }]), "{:?}", world.outstanding);
    world.answer_all();
    assert!(world.store.is_empty());
}

#[test]
fn a_job_acts_only_with_its_lease() {
    let mut world = World::new();
    world.add(0, HOUR).unwrap();
    let serial = world.registry.by_key[&key(0)];
    world.registry.leased(world.now, serial, Lease::Refused);
    world.event(0, Input::Joined { sid: None });
    assert!(!world.outstanding.iter().any(|effect| matches!(effect, Effect::Restart { .. })));
    assert_eq!(world.registry.stats().elsewhere, 1);
    world.registry.leased(world.now, serial, Lease::Granted);
    world.collect();
    assert!(
        world.outstanding.iter().any(|effect| matches!(effect, Effect::Restart { .. })),
        "kept until then"
    );

    world.outstanding.clear();
    world.registry.leased(world.now, serial, Lease::Refused);
    world.collect();
    assert!(world.registry.jobs.is_empty(), "lost: another replica has the job and its entry");
    assert!(!world.outstanding.iter().any(|effect| matches!(effect, Effect::Remove { .. })));
}

#[test]
fn a_lease_is_over_long_before_the_delayed_event_fires() {
    let ms = Duration::from_millis;
    let asked = |world: &World| {
        world.outstanding.iter().find_map(|effect| match effect {
            Effect::Lease { serial, ttl, .. } => Some((*serial, *ttl)),
            _ => None,
        })
    };
    for (delay, ttl) in [(1000, 2000), (8000, 2000), (20_000, 5000), (3_600_000, 15_000)] {
        let mut world = World::new();
        world.add(0, ms(delay)).unwrap();
        let (serial, first) = asked(&world).unwrap();
        assert_eq!(first, ms(ttl), "{delay}");
        world.outstanding.clear();
        world.registry.leased(world.now, serial, Lease::Granted);
        world.pass(ms(ttl / 3 - 1));
        assert_eq!(asked(&world), None, "{delay}: renewed too often");
        world.pass(ms(2));
        assert_eq!(asked(&world), Some((serial, first)), "{delay}: renewed in time for two more attempts");
    }
}

#[test]
fn the_more_jobs_there_are_the_rarer_are_sweeps() {
    let after = |stored, held| sweep_after(stored, held).as_secs();
    assert_eq!([after(0, 0), after(0, 5), after(500, 0), after(2000, 2000)], [1; 4]);
    assert_eq!([after(501, 0), after(5000, 0), after(2001, 2001), after(10_000, 9000)], [2, 10, 2, 5]);
    assert_eq!([after(1_000_000, 1_000_000), after(usize::MAX, 0)], [15, 15]);
}

#[test]
fn a_sweep_takes_up_gives_up_and_writes_again() {
    let mut world = World::new();
    world.add(0, HOUR).unwrap();
    world.add(1, HOUR).unwrap();
    world.answer_all();
    world.pass(Duration::from_secs(1));
    let stored =
        |n, id| StoredJob { params: params(n, id, HOUR), restarted_at: world.now.wall, connected: None };
    // Job 0 was replaced at another replica, job 1 is lost, job 2 is nobody's.
    let found = vec![stored(0, "newer"), stored(2, "orphan")];
    let now = world.now;
    world.registry.swept(now, now.instant, found);
    world.collect();
    let keys: HashSet<_> = world.registry.by_key.keys().cloned().collect();
    assert_eq!(keys, HashSet::from([key(1), key(2)]));
    let puts = world.outstanding.iter().filter_map(|effect| match effect {
        Effect::Put { job, .. } => Some(job.params.key.clone()),
        _ => None,
    });
    assert_eq!(puts.collect::<Vec<_>>(), [key(1)]);
}

/// What is told to other replicas, oldest first, and which leases are given up.
fn said(registry: &mut Registry) -> (Vec<News>, Vec<Option<News>>) {
    let (mut told, mut released) = (Vec::new(), Vec::new());
    while let Some(effect) = registry.poll() {
        match effect {
            Effect::Tell { notice } => told.push(notice.news),
            Effect::Release { notice, .. } => released.push(notice.map(|notice| notice.news)),
            _ => {}
        }
    }
    (told, released)
}

fn heard(world: &mut World, n: u8, news: News) {
    world.registry.heard(world.now, Notice { key: key(n), news });
}

#[test]
fn what_the_sfu_says_is_passed_on_unless_the_job_is_held_here() {
    let mut world = World::new();
    let (joined, left) =
        (Input::Joined { sid: Some("PA".into()) }, Input::Left { sid: None, why: Leave::OnPurpose });
    world.registry.event(world.now, &key(0), joined.clone());
    assert_eq!(said(&mut world.registry).0, [News::Joined { sid: Some("PA".into()) }], "no such job here");
    world.add(0, HOUR).unwrap();
    world.answer_all();
    world.registry.event(world.now, &key(0), joined);
    world.registry.event(world.now, &key(0), left.clone());
    assert_eq!(said(&mut world.registry).0, [], "held here");

    let mut alone = Registry::new(Rules { shared: false, ..rules() });
    alone.event(world.now, &key(0), left);
    assert_eq!(said(&mut alone).0, [], "nobody to tell");
}

#[test]
fn what_another_replica_passes_on_counts_like_a_webhook_and_goes_no_further() {
    let mut world = World::new();
    world.add(0, HOUR).unwrap();
    world.answer_all();
    heard(&mut world, 0, News::Joined { sid: Some("PA".into()) });
    heard(&mut world, 0, News::Left { sid: Some("PA".into()), why: Leave::Otherwise });
    heard(&mut world, 1, News::Left { sid: None, why: Leave::OnPurpose });
    let sends = std::iter::from_fn(|| world.registry.poll()).filter(|e| matches!(e, Effect::Send { .. }));
    assert_eq!(sends.count(), 1);
    assert_eq!(said(&mut world.registry), (vec![], vec![]));
}

#[test]
fn the_newest_delegation_counts_at_whichever_replica_it_was_made() {
    let mut old = World::new();
    old.add(0, HOUR).unwrap();
    old.answer_all();
    old.event(0, Input::Joined { sid: Some("PA_1".into()) });
    let mut new = World::new();
    new.now = Now { wall: old.now.wall + Duration::from_secs(1), ..old.now };
    new.registry.add(new.now, params(0, "newer", HOUR), "@a:hs", 1).unwrap();
    let serial = new.registry.by_key[&key(0)];
    new.registry.leased(new.now, serial, Lease::Refused);
    let (told, _) = said(&mut new.registry);
    assert_eq!(told, [News::Replaced { made: new.now.wall }]);

    // The old one has a write on its way: the lease is not free before it is over.
    let write = old.registry.writes + 1;
    old.registry.write(old.now, &key(0), None);
    heard(&mut old, 0, told[0].clone());
    assert_eq!(said(&mut old.registry).1, []);
    assert_eq!(old.registry.jobs.len(), 0);
    old.registry.stored(old.now, &key(0), write, false);
    let (_, released) = said(&mut old.registry);
    assert_eq!(released, [Some(News::Released { sid: Some("PA_1".into()) })]);
    assert!(old.registry.writers.is_empty(), "and a write that failed is not made again");

    // Then the new one asks at once, writes over what may be there, and takes the old connection's end for none.
    let free = released[0].clone().unwrap();
    heard(&mut new, 0, free);
    assert!(matches!(new.registry.poll(), Some(Effect::Lease { .. })));
    new.registry.leased(new.now, serial, Lease::Granted);
    let wrote = std::iter::from_fn(|| new.registry.poll())
        .any(|effect| matches!(effect, Effect::Put { job, .. } if job.params.delay_id.as_str() == "newer"));
    // The first write is still on its way: the second comes after it.
    assert!(!wrote && new.registry.writers[&key(0)].pending.is_some());
    new.registry.event(new.now, &key(0), Input::Left { sid: Some("PA_1".into()), why: Leave::Otherwise });
    assert_eq!(new.registry.stats().waiting, 1);
}

#[test]
fn an_older_delegation_does_not_displace_a_newer_one() {
    let mut world = World::new();
    world.add(0, HOUR).unwrap();
    world.answer_all();
    let made = world.now.wall;
    for older in [made, made - Duration::from_secs(1)] {
        heard(&mut world, 0, News::Replaced { made: older });
        assert_eq!(world.registry.jobs.len(), 1);
    }
    heard(&mut world, 0, News::Released { sid: None });
    assert!(world.registry.poll().is_none(), "who has the lease asks for none");
    // One that was taken from the store is older than what any client delegates now.
    let mut restored = World::new();
    let job = StoredJob { params: params(0, "old", HOUR), restarted_at: restored.now.wall, connected: None };
    restored.registry.restore(restored.now, job);
    restored.answer_all();
    let made = restored.now.wall - Duration::from_mins(1);
    heard(&mut restored, 0, News::Replaced { made });
    assert_eq!(said(&mut restored.registry).1, [Some(News::Released { sid: None })]);
}

#[derive(Clone, Debug)]
enum Step {
    Add(u8),
    Joined(u8),
    Left(u8),
    Answer(usize, bool),
    Pass(u64),
    Crash(bool),
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        2 => (0u8..3).prop_map(Step::Add),
        2 => (0u8..3).prop_map(Step::Joined),
        1 => (0u8..3).prop_map(Step::Left),
        8 => (0usize..8, prop::bool::weighted(0.8)).prop_map(|(n, good)| Step::Answer(n, good)),
        2 => (0u64..9_000).prop_map(Step::Pass),
        1 => any::<bool>().prop_map(Step::Crash),
    ]
}

proptest! {
    #[test]
    fn no_promised_job_is_lost_wherever_the_process_dies(steps in prop::collection::vec(any_step(), 0..80)) {
        let mut world = World::new();
        for step in steps {
            match step {
                // The bounds are another test's business.
                Step::Add(n) => drop(world.add(n, HOUR)),
                Step::Joined(n) => world.event(n, Input::Joined { sid: None }),
                Step::Left(n) => world.event(n, Input::Left { sid: None, why: Leave::OnPurpose }),
                Step::Answer(n, good) => world.answer(n, good),
                Step::Pass(ms) => world.pass(Duration::from_millis(ms)),
                Step::Crash(arrived) => world.crash(arrived),
            }
            world.check();
        }
        world.finish();
    }
}
