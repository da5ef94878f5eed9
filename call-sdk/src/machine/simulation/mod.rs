//! Whole calls on virtual time: many machines, one homeserver, seeded misfortune.

mod world;

use std::time::Duration;

use rand::Rng as _;

use self::world::{Weather, World};
use super::CallStatus;

const SECOND: Duration = Duration::from_secs(1);

/// Joins `count` clients over `period`.
fn join_over(world: &mut World, count: u32, period: Duration) {
    for _ in 0..count {
        world.join();
        world.run(period / count);
    }
}

/// Nobody holds a key that a present member uses now, unless they are present too.
fn assert_leavers_read_nothing(world: &World) {
    let present = world.present();
    for leaver in world.clients.iter().filter(|client| client.left_at.is_some()) {
        for number in &present {
            let sender = &world.clients[*number];
            let Some(index) = sender.sealing.current() else { continue };
            let kept = leaver.got.iter().filter(|(from, at, ..)| *from == sender.device && *at == index);
            for (_, _, key, delivered) in kept {
                let ring = crate::frame_crypto::KeyRing::new();
                ring.set(index, key).unwrap();
                assert!(
                    !world.ring_opens(&ring, *number, index),
                    "{} left {:?} ago and still reads {}, whose key it got {:?} ago",
                    leaver.device,
                    leaver.left_at.map(|at| world.now.instant - at),
                    sender.device,
                    world.now.instant - *delivered
                );
            }
        }
    }
}

#[test]
fn two_hundred_members_join_within_a_minute() {
    let mut world = World::new(1, Weather::fair());
    join_over(&mut world, 200, 60 * SECOND);
    let took = world.run_until(120 * SECOND, World::all_decrypt).expect("everybody decrypts everybody");
    // Each member tells its key to each other member once.
    let minimum = 200 * 199;
    println!(
        "200 members over 60 s: {} to-device messages, {:.2} × the minimum of {minimum}; all decrypt {took:?} after the \
         last join",
        world.messages,
        f64::from(u32::try_from(world.messages).unwrap()) / f64::from(minimum)
    );
    assert!(world.clients.iter().all(|client| client.status == CallStatus::Joined));
}

#[test]
fn two_hundred_members_join_in_foul_weather() {
    let mut world = World::new(2, Weather::foul());
    join_over(&mut world, 100, 30 * SECOND);
    world.restart_homeserver(10 * SECOND);
    join_over(&mut world, 100, 30 * SECOND);
    for leaver in [20, 70, 120] {
        world.leave(leaver);
        world.kill(leaver + 1);
        world.run(SECOND);
    }
    world.run(60 * SECOND);
    let took = world.run_until(240 * SECOND, World::all_decrypt);
    assert!(took.is_some(), "{}", pairs_that_do_not(&world));
    assert_leavers_read_nothing(&world);
    let (joins, present) = (200 * 199, world.present().len());
    println!(
        "200 members in foul weather, six of whom leave: {} to-device messages; the minimum is {joins} for the joins and \
         {} each time that everybody replaces the key",
        world.messages,
        present * (present - 1)
    );
}

#[test]
fn churn_in_foul_weather_ends_with_every_pair_decrypting() {
    for seed in 10..16 {
        let mut world = World::new(seed, Weather::foul());
        join_over(&mut world, 20, 10 * SECOND);
        for round in 0..30 {
            let present = world.present();
            let victim = present[world.rng.random_range(0..present.len())];
            match round % 5 {
                0 | 1 if present.len() > 5 => world.leave(victim),
                2 if present.len() > 5 => world.kill(victim),
                3 if round == 13 => world.restart_homeserver(20 * SECOND),
                _ => drop(world.join()),
            }
            let pause = world.rng.random_range(200..4_000);
            world.run(Duration::from_millis(pause));
        }
        world.run(30 * SECOND);
        let took = world.run_until(180 * SECOND, World::all_decrypt);
        assert!(took.is_some(), "seed {seed}: {}", pairs_that_do_not(&world));
        assert_leavers_read_nothing(&world);
        println!("seed {seed}: {} present, {} messages", world.present().len(), world.messages);
    }
}

#[test]
fn slow_devices_delay_nobody_else() {
    let mut weather = Weather::fair();
    weather.slow = [0, 1].into();
    let mut world = World::new(3, weather);
    join_over(&mut world, 12, SECOND);
    world.run(30 * SECOND);
    let newcomer = world.join();
    let others: Vec<_> = (2..newcomer).collect();
    let took = world
        .run_until(30 * SECOND, |world| {
            others.iter().all(|other| world.decrypts(newcomer, *other) && world.decrypts(*other, newcomer))
        })
        .expect("the newcomer and the fast devices decrypt each other");
    assert!(took < 5 * SECOND, "{took:?}");
    println!("with two slow devices the newcomer and ten others decrypt each other after {took:?}");
}

#[test]
fn outage_of_the_homeserver_ends_no_call() {
    let mut world = World::new(4, Weather::fair());
    join_over(&mut world, 8, 2 * SECOND);
    world.run(20 * SECOND);
    world.restart_homeserver(90 * SECOND);
    world.run(150 * SECOND);
    assert_eq!(world.present().len(), 8, "nobody gave up");
    assert!(world.run_until(120 * SECOND, World::all_decrypt).is_some(), "{}", pairs_that_do_not(&world));
    assert!(world.clients.iter().all(|client| client.status == CallStatus::Joined));
}

#[test]
fn joiner_gets_no_key_older_than_the_grace_rule() {
    let mut world = World::new(5, Weather::fair());
    join_over(&mut world, 6, SECOND);
    world.run(120 * SECOND);
    let late = world.join();
    world.run(30 * SECOND);
    let joined_at = world.clients[late].joined_at;
    // The others' keys were made two minutes ago, so the newcomer must have been given new ones.
    for number in 0..6 {
        let of_before = world.clients[(number + 1) % 6].got.iter().filter(|(from, _, _, at)| {
            *from == world.clients[number].device && *at + 100 * SECOND < joined_at
        });
        for (from, _, old, _) in of_before {
            let given = world.clients[late].got.iter().any(|(by, _, key, _)| by == from && key == old);
            assert!(!given, "{from} gave a newcomer the key of two minutes ago");
        }
    }
    assert!(world.all_decrypt());
}

fn pairs_that_do_not(world: &World) -> String {
    let present = world.present();
    let mut pairs = String::new();
    for receiver in &present {
        for sender in &present {
            if receiver != sender && !world.decrypts(*receiver, *sender) {
                let members = world.clients[*receiver].machine.members().len();
                pairs.push_str(&format!("{receiver} cannot read {sender} ({members} members); "));
            }
        }
    }
    pairs
}
