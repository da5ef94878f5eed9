//! What must hold for any stored entry.

use std::time::{Duration, SystemTime};

use super::{MAX_VALUE, YEAR_0, YEAR_9999, decode, encode, field, parse_field};
use crate::{delegation::StoredJob, fuzzing::first_value};

/// An entry's value, which is read as an entry's name, too.
pub(crate) fn stored_job(data: &[u8]) {
    if let Ok(job) = decode(data) {
        whole(&job, data);
    }
    if let Ok(key) = parse_field(data) {
        let name = field(&key);
        assert_eq!(parse_field(name.as_bytes()), Ok(key));
        assert!(!name.contains(['<', '>', '&', '\u{2028}', '\u{2029}']) && !name.contains('\n'));
    }
}

fn whole(job: &StoredJob, data: &[u8]) {
    assert!(data.len() <= MAX_VALUE);
    let params = &job.params;
    assert!(!params.key.room.as_str().is_empty() && !params.key.identity.as_str().is_empty());
    assert!(
        !params.delay_timeout.is_zero()
            && params.delay_timeout <= Duration::from_nanos(i64::MAX.unsigned_abs())
    );
    if let Some(value) = first_value(data) {
        let member = |name: &str| value["Params"][name].as_str().map(str::to_owned);
        assert_eq!(member("DelayId").as_deref(), Some(params.delay_id.as_str()));
        assert_eq!(member("ServerName").as_deref(), Some(params.server.as_str()));
        assert_eq!(member("LiveKitRoom").as_deref(), Some(params.key.room.as_str()));
        assert_eq!(member("LiveKitIdentity").as_deref(), Some(params.key.identity.as_str()));
        assert_eq!(
            value["Params"]["DelayTimeout"].as_u64().map(Duration::from_nanos),
            Some(params.delay_timeout)
        );
        assert_eq!(value["Connected"].as_bool(), job.connected);
    }
    let written = encode(job);
    assert!(!written.contains('\n'), "an entry is one line");
    let again = decode(written.as_bytes());
    // An offset can carry a time out of the years that can be written.
    let within = match job.restarted_at.duration_since(SystemTime::UNIX_EPOCH) {
        Ok(after) => i128::try_from(after.as_nanos()).is_ok_and(|ns| ns <= YEAR_9999),
        Err(before) => i128::try_from(before.duration().as_nanos()).is_ok_and(|ns| -ns >= YEAR_0),
    };
    if within {
        assert_eq!(again.as_ref(), Ok(job), "written and read again");
    }
    assert!(again.is_ok_and(|again| *encode(&again) == *written), "written twice");
    let name = field(&params.key);
    assert_eq!(parse_field(name.as_bytes()).as_ref(), Ok(&params.key));
}
