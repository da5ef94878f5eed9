//! What must hold for any job log.

use std::{collections::BTreeMap, io::BufReader};

use super::{Change, checksum, line, parse, put_line, read, wire};
use crate::delegation::{JobKey, StoredJob};

type Jobs = BTreeMap<JobKey, StoredJob>;

/// The log as it is on the disk: as given, and with the right checksum before every line.
pub(crate) fn job_log(data: &[u8]) {
    log(data);
    let mut signed = Vec::new();
    for text in data.split(|b| *b == b'\n') {
        let (sign, json) = text.split_at_checked(1).unwrap_or_default();
        signed.extend_from_slice(checksum(sign, json).as_bytes());
        signed.extend_from_slice(&[b" ", text, b"\n"].concat());
    }
    log(&signed);
    // A write that was cut off.
    log(&signed[..signed.len() / 2]);
}

fn log(bytes: &[u8]) {
    let jobs = jobs_in(bytes);
    assert_eq!(jobs, line_by_line(bytes), "another reading of it");
    // However the disk hands it out.
    let trickle = BufReader::with_capacity(1 + bytes.len() % 61, bytes);
    assert_eq!(read(trickle).ok().map(|(jobs, _)| jobs).as_ref(), Some(&jobs));

    // What a compaction writes is what was read, and nothing in it is unreadable.
    let mut written = Vec::new();
    jobs.values().for_each(|job| put_line(&mut written, job));
    assert!(read(&written[..]).is_ok_and(|(_, corrupt)| corrupt.lines == 0));
    let lines = |jobs: &Jobs| jobs.values().map(wire::encode).collect::<Vec<_>>();
    assert_eq!(lines(&jobs_in(&written)), lines(&jobs));

    // Nothing that stands before it costs a job that is whole, nor brings back one that was removed.
    let Some(job) = jobs.values().next() else { return };
    // (What stands after the last line end may be whole but for that: more is written after a compaction only.)
    let mut more = whole(bytes).to_vec();
    line(&mut more, b'-', wire::field(&job.params.key).as_bytes());
    assert!(!jobs_in(&more).contains_key(&job.params.key));
    put_line(&mut more, job);
    assert_eq!(lines(&jobs_in(&more)), lines(&jobs));
}

fn jobs_in(log: &[u8]) -> Jobs {
    // Memory can always be read.
    read(log).map(|(jobs, _)| jobs).unwrap_or_default()
}

/// All lines that have an end.
fn whole(log: &[u8]) -> &[u8] {
    &log[..log.iter().rposition(|b| *b == b'\n').map_or(0, |end| end + 1)]
}

/// What the whole lines say. The last one lacks its end.
fn line_by_line(log: &[u8]) -> Jobs {
    let mut jobs = Jobs::new();
    for line in whole(log).split_inclusive(|b| *b == b'\n').filter_map(|line| line.strip_suffix(b"\n")) {
        match parse(line) {
            Some(Change::Put(job)) => drop(jobs.insert(job.params.key.clone(), job)),
            Some(Change::Remove(key)) => drop(jobs.remove(&key)),
            None => {}
        }
    }
    jobs
}
