//! The file store is killed by SIGKILL at any moment, and has every change that was acknowledged.

use std::{
    collections::HashMap,
    fs,
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant, SystemTime},
};

use antiphon_jwt_service::{
    LEGACY_SLOT, ParticipantIdentity, RoomAlias,
    delegation::{DelayId, JobKey, JobParams, StoredJob},
    store::{FileStore, Store as _},
};

use crate::support::DEADLINE;

const DIRECTORY: &str = "ANTIPHON_TEST_STATE_DIRECTORY";
const FIRST: &str = "ANTIPHON_TEST_FIRST_NUMBER";
const KEYS: usize = 8;
const KILLS: usize = 25;

/// Large, so that the log is compacted every few dozen changes and kills hit that too.
fn key(number: usize) -> JobKey {
    let device = format!("{number}-{}", "x".repeat(20_000));
    JobKey {
        room: RoomAlias::of_slot("!r:hs", LEGACY_SLOT),
        identity: ParticipantIdentity::legacy("@a:hs", &device).unwrap(),
    }
}

fn job(key: JobKey, number: u64) -> StoredJob {
    StoredJob {
        params: JobParams {
            key,
            server: "hs".parse().unwrap(),
            delay_id: DelayId::new(format!("d{number}")).unwrap(),
            delay_timeout: Duration::from_secs(8),
        },
        restarted_at: SystemTime::UNIX_EPOCH + Duration::from_nanos(number),
        connected: Some(number.is_multiple_of(2)),
    }
}

/// What a key holds after change `number`: every third change removes its job.
fn state(number: u64) -> Option<u64> {
    (number % 3 != 2).then_some(number)
}

/// One writer for each key, each telling before and after every change, for ever.
#[tokio::test]
#[ignore = "this is the process that the test below starts and kills"]
async fn writer() {
    let store = FileStore::open(std::env::var(DIRECTORY).unwrap()).await.unwrap();
    let first: u64 = std::env::var(FIRST).unwrap().parse().unwrap();
    let write = async |index: usize| {
        let key = key(index);
        for number in first.. {
            println!("begin {index} {number}");
            match state(number) {
                Some(number) => store.put(&job(key.clone(), number)).await.unwrap(),
                None => store.remove(&key).await.unwrap(),
            }
            println!("done {index} {number}");
        }
    };
    tokio::join!(write(0), write(1), write(2), write(3), write(4), write(5), write(6), write(7));
}

fn start(directory: &Path, first: u64) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "jobs_survive_kills::writer", "--ignored", "--nocapture"]);
    command.env(DIRECTORY, directory).env(FIRST, first.to_string());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap()
}

/// Returns in the middle of a compaction, which would otherwise be a small target. The writer's pipe has room for
/// more changes than it takes to bring one about.
fn await_compaction(directory: &Path) {
    let length = || fs::metadata(directory.join("jobs.log")).map_or(0, |log| log.len());
    let (end, mut before) = (Instant::now() + DEADLINE, 0);
    loop {
        let now = length();
        if directory.join("jobs.new").exists() || now < before {
            return;
        }
        assert!(Instant::now() < end, "the log is never compacted");
        before = now;
    }
}

#[tokio::test]
async fn every_acknowledged_change_is_there_after_a_kill() {
    let state_directory = tempfile::tempdir().unwrap();
    // Of each key: the last change that was acknowledged, and one that had begun after it.
    let mut known: HashMap<usize, (Option<u64>, Option<u64>)> = HashMap::new();
    let mut acknowledged = 0;
    for kill in 0..KILLS as u64 {
        let mut writer = start(state_directory.path(), kill * 1_000_000);
        // So many lines after it has begun, it dies: early, late, and in every part of a change.
        let mut left = rand::random_range(1..400);
        for line in BufReader::new(writer.stdout.take().unwrap()).lines().map_while(Result::ok) {
            let words: Vec<_> = line.split(' ').collect();
            // Each line is one write to a pipe, so that no kill cuts it. The harness prints lines of its own.
            let &[what @ ("begin" | "done"), index, number] = &words[..] else { continue };
            let (Ok(index), Ok(number)) = (index.parse(), number.parse()) else { continue };
            let entry = known.entry(index).or_default();
            if what == "begin" {
                entry.1 = Some(number);
            } else {
                assert_eq!(entry.1, Some(number));
                *entry = (Some(number), None);
                acknowledged += 1;
            }
            left -= 1;
            if left == 0 {
                if kill % 2 == 1 {
                    await_compaction(state_directory.path());
                }
                writer.kill().unwrap();
            }
        }
        assert!(left <= 0, "the writer ended by itself");
        writer.wait().unwrap();

        let store = FileStore::open(state_directory.path()).await.unwrap();
        let mut found: HashMap<_, _> =
            store.load().await.unwrap().into_iter().map(|job| (job.params.key.clone(), job)).collect();
        for index in 0..KEYS {
            let key = key(index);
            let (done, begun) = known.get(&index).copied().unwrap_or_default();
            let is = found.remove(&key);
            let may_be =
                [done.and_then(state), begun.and_then(state)].map(|n| n.map(|n| job(key.clone(), n)));
            assert!(
                is == may_be[0] || (begun.is_some() && is == may_be[1]),
                "kill {kill}, key {index}: {:?} after {done:?} and perhaps {begun:?}",
                is.map(|job| job.params.delay_id.as_str().to_owned())
            );
            // What is found now is what the next round begins with.
            let settled = if is == may_be[0] { done } else { begun };
            known.insert(index, (settled, None));
        }
        assert!(found.is_empty());
        assert!(!state_directory.path().join("jobs.corrupt").exists());
    }
    assert!(acknowledged > KILLS * KEYS, "{acknowledged} changes prove little");
}
