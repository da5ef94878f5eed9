//! How a stored job is written down: the format of lk-jwt-service, so that either can take over from the other.

use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use zeroize::Zeroizing;

use crate::{
    ParticipantIdentity, RoomAlias,
    delegation::{DelayId, JobKey, JobParams, StoredJob},
};

/// The longest value that is read, in bytes. An identity comes from a request body of at most 64 KiB, and JSON
/// can write a byte as six.
pub(crate) const MAX_VALUE: usize = 1024 * 1024;

/// The name of a job's entry: the compact JSON array `["<room alias>","<identity>"]`.
///
/// Go's encoder also escapes `<`, `>`, `&`, U+2028 and U+2029, and the reference finds an entry again only under
/// the name that it would have written itself; so they are escaped here too.
pub(crate) fn field(key: &JobKey) -> String {
    let array = serde_json::Value::from(vec![key.room.as_str(), key.identity.as_str()]).to_string();
    let mut field = String::with_capacity(array.len());
    for c in array.chars() {
        match c {
            // All five occur in JSON only inside strings.
            '<' => field.push_str("\\u003c"),
            '>' => field.push_str("\\u003e"),
            '&' => field.push_str("\\u0026"),
            '\u{2028}' => field.push_str("\\u2028"),
            '\u{2029}' => field.push_str("\\u2029"),
            c => field.push(c),
        }
    }
    field
}

/// The key that [`field`] has written.
pub(crate) fn parse_field(field: &[u8]) -> Result<JobKey, Unreadable> {
    let (room, identity): (String, String) =
        serde_json::from_slice(field).map_err(|_| Unreadable::NotJson)?;
    key(room, identity)
}

/// A job as text. It holds the delay id, hence wiped on drop.
pub(crate) fn encode(job: &StoredJob) -> Zeroizing<String> {
    let JobParams { key, server, delay_id, delay_timeout } = &job.params;
    let value = ValueRef {
        params: ParamsRef {
            delay_id: delay_id.as_str(),
            delay_timeout: i64::try_from(delay_timeout.as_nanos()).unwrap_or(i64::MAX),
            server_name: server.as_str(),
            room: key.room.as_str(),
            identity: key.identity.as_str(),
        },
        restarted_at: &timestamp(job.restarted_at),
        connected: job.connected,
    };
    // Serialising strings, integers and booleans into memory has no way to fail.
    Zeroizing::new(serde_json::to_string(&value).unwrap_or_default())
}

/// The job that was written, by this service or by the reference. Unknown members are ignored.
pub(crate) fn decode(value: &[u8]) -> Result<StoredJob, Unreadable> {
    if value.len() > MAX_VALUE {
        return Err(Unreadable::TooLong);
    }
    let Value { params, restarted_at, connected } =
        serde_json::from_slice(value).map_err(|_| Unreadable::NotJson)?;
    let delay_timeout = u64::try_from(params.delay_timeout).ok().filter(|ns| *ns > 0);
    Ok(StoredJob {
        params: JobParams {
            key: key(params.room, params.identity)?,
            server: params.server_name.parse().map_err(|_| Unreadable::Member("ServerName"))?,
            delay_id: DelayId::new(params.delay_id).map_err(|_| Unreadable::Member("DelayId"))?,
            delay_timeout: delay_timeout
                .map(Duration::from_nanos)
                .ok_or(Unreadable::Member("DelayTimeout"))?,
        },
        restarted_at: OffsetDateTime::parse(&restarted_at, &Rfc3339)
            .map(SystemTime::from)
            .map_err(|_| Unreadable::Member("RestartedAt"))?,
        connected: connected.and_then(|connected| connected.as_bool()),
    })
}

/// Why an entry is no job. Quotes nothing of it: it may hold a delay id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Unreadable {
    #[error("it is longer than any job")]
    TooLong,
    #[error("it is not the JSON of a job")]
    NotJson,
    #[error("its {0} is not usable")]
    Member(&'static str),
}

fn key(room: String, identity: String) -> Result<JobKey, Unreadable> {
    match (room.is_empty(), identity.is_empty()) {
        (true, _) => Err(Unreadable::Member("LiveKitRoom")),
        (_, true) => Err(Unreadable::Member("LiveKitIdentity")),
        _ => {
            Ok(JobKey { room: RoomAlias::from_sfu(room), identity: ParticipantIdentity::from_sfu(identity) })
        }
    }
}

/// RFC 3339 in UTC. It can only write the years 0 to 9999; a clock beyond them is taken for their end.
fn timestamp(at: SystemTime) -> String {
    let nanoseconds = match at.duration_since(SystemTime::UNIX_EPOCH) {
        Ok(after) => i128::try_from(after.as_nanos()).unwrap_or(i128::MAX),
        Err(before) => i128::try_from(before.duration().as_nanos()).map_or(i128::MIN, |ns| -ns),
    };
    let clamped = nanoseconds.clamp(YEAR_0, YEAR_9999);
    OffsetDateTime::from_unix_timestamp_nanos(clamped)
        .ok()
        .and_then(|at| at.format(&Rfc3339).ok())
        .unwrap_or_else(|| "1970-01-01T00:00:00Z".to_owned())
}

/// 0000-01-01T00:00:00Z, in nanoseconds since 1970.
const YEAR_0: i128 = -62_167_219_200 * 1_000_000_000;
/// 9999-12-31T23:59:59.999999999Z, in nanoseconds since 1970.
const YEAR_9999: i128 = 253_402_300_800 * 1_000_000_000 - 1;

#[derive(Serialize)]
struct ValueRef<'a> {
    #[serde(rename = "Params")]
    params: ParamsRef<'a>,
    #[serde(rename = "RestartedAt")]
    restarted_at: &'a str,
    #[serde(rename = "Connected", skip_serializing_if = "Option::is_none")]
    connected: Option<bool>,
}

#[derive(Serialize)]
struct ParamsRef<'a> {
    #[serde(rename = "DelayId")]
    delay_id: &'a str,
    #[serde(rename = "DelayTimeout")]
    delay_timeout: i64,
    #[serde(rename = "ServerName")]
    server_name: &'a str,
    #[serde(rename = "LiveKitRoom")]
    room: &'a str,
    #[serde(rename = "LiveKitIdentity")]
    identity: &'a str,
}

#[derive(Deserialize)]
struct Value {
    #[serde(rename = "Params")]
    params: Params,
    #[serde(rename = "RestartedAt")]
    restarted_at: String,
    // Ours, not the reference's: whatever else somebody means by it must not cost the job.
    #[serde(rename = "Connected", default)]
    connected: Option<serde_json::Value>,
}

#[derive(Deserialize)]
struct Params {
    #[serde(rename = "DelayId")]
    delay_id: String,
    #[serde(rename = "DelayTimeout")]
    delay_timeout: i64,
    #[serde(rename = "ServerName")]
    server_name: String,
    #[serde(rename = "LiveKitRoom")]
    room: String,
    #[serde(rename = "LiveKitIdentity")]
    identity: String,
}

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod properties;

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    pub(crate) fn job(identity: &str, delay_id: &str) -> StoredJob {
        StoredJob {
            params: JobParams {
                key: JobKey {
                    room: RoomAlias::from_sfu("room"),
                    identity: ParticipantIdentity::from_sfu(identity),
                },
                server: "hs.example".parse().unwrap(),
                delay_id: DelayId::new(delay_id.to_owned()).unwrap(),
                delay_timeout: Duration::from_secs(8),
            },
            restarted_at: SystemTime::UNIX_EPOCH + Duration::new(1_769_847_300, 123_456_789),
            connected: None,
        }
    }

    /// The example of the reference.
    const REFERENCE: &str = r#"{"Params":{"DelayId":"syd_x","DelayTimeout":8000000000,"ServerName":"hs.example","LiveKitRoom":"room","LiveKitIdentity":"vYVt"},"RestartedAt":"2026-01-31T09:15:00.123456789+01:00"}"#;

    #[test]
    fn what_the_reference_wrote_is_read() {
        assert_eq!(decode(REFERENCE.as_bytes()).unwrap(), job("vYVt", "syd_x"));
    }

    #[test]
    fn what_is_written_is_what_the_reference_writes() {
        assert_eq!(
            *encode(&job("vYVt", "syd_x")),
            REFERENCE.replace("09:15", "08:15").replace("+01:00", "Z")
        );
        let connected = StoredJob { connected: Some(true), ..job("vYVt", "syd_x") };
        assert!(
            encode(&connected)
                .ends_with(r#""RestartedAt":"2026-01-31T08:15:00.123456789Z","Connected":true}"#)
        );
    }

    #[test]
    fn every_offset_and_fraction_is_read() {
        let at = |text: &str| {
            let value = REFERENCE.replace("2026-01-31T09:15:00.123456789+01:00", text);
            decode(value.as_bytes()).map(|job| job.restarted_at)
        };
        let whole = SystemTime::UNIX_EPOCH + Duration::from_secs(1_769_847_300);
        for text in [
            "2026-01-31T08:15:00Z",
            "2026-01-31T08:15:00.0Z",
            "2026-01-31T08:15:00+00:00",
            "2026-01-31T14:00:00.000000+05:45",
            "2026-01-30T20:15:00-12:00",
            "2026-01-31T08:15:00.00000000000000Z",
        ] {
            assert_eq!(at(text), Ok(whole), "{text}");
        }
        assert_eq!(at("2026-01-31T08:15:00.5Z"), Ok(whole + Duration::from_millis(500)));
        assert!(at("0001-01-01T00:00:00Z").unwrap() < SystemTime::UNIX_EPOCH, "Go's zero time");
        for bad in ["", "2026-01-31", "2026-01-31T08:15:00", "1769847300", "2026-13-31T08:15:00Z"] {
            assert_eq!(at(bad), Err(Unreadable::Member("RestartedAt")), "{bad}");
        }
    }

    #[test]
    fn members_somebody_added_are_ignored() {
        let more = REFERENCE.replacen('{', r#"{"Version":2,"Connected":"maybe","#, 1);
        assert_eq!(decode(more.as_bytes()).unwrap(), job("vYVt", "syd_x"));
    }

    #[test]
    fn an_entry_that_no_job_can_have_is_refused_and_not_quoted() {
        for (from, to, why) in [
            ("syd_x", "", Unreadable::Member("DelayId")),
            ("syd_x", "..", Unreadable::Member("DelayId")),
            ("8000000000", "0", Unreadable::Member("DelayTimeout")),
            ("8000000000", "-1", Unreadable::Member("DelayTimeout")),
            ("8000000000", "1.5", Unreadable::NotJson),
            ("hs.example", "hs/example", Unreadable::Member("ServerName")),
            ("\"room\"", "\"\"", Unreadable::Member("LiveKitRoom")),
            ("vYVt", "", Unreadable::Member("LiveKitIdentity")),
            ("Params", "params2", Unreadable::NotJson),
        ] {
            let error = decode(REFERENCE.replace(from, to).as_bytes()).unwrap_err();
            assert_eq!(error, why, "{from} -> {to}");
            assert!(!error.to_string().contains("syd_x"));
        }
        assert_eq!(decode(&vec![b' '; MAX_VALUE + 1]), Err(Unreadable::TooLong));
    }

    #[test]
    fn fields_are_named_as_go_names_them() {
        let field = |identity| field(&job(identity, "d").params.key);
        assert_eq!(field("vYVt"), r#"["room","vYVt"]"#);
        assert_eq!(field("@a:hs:<D&\u{2028}>"), r#"["room","@a:hs:\u003cD\u0026\u2028\u003e"]"#);
        assert_eq!(field("\"ü\\\n\u{1f}"), r#"["room","\"ü\\\n\u001f"]"#);
    }

    #[test]
    fn a_clock_that_is_far_out_still_writes_a_time() {
        let far = SystemTime::UNIX_EPOCH + Duration::from_secs(1 << 40);
        assert_eq!(timestamp(far), "9999-12-31T23:59:59.999999999Z");
        let long_ago = SystemTime::UNIX_EPOCH - Duration::from_secs(1 << 40);
        assert_eq!(timestamp(long_ago), "0000-01-01T00:00:00Z");
    }

    proptest! {
        #[test]
        fn jobs_come_back_as_they_were(
            room in ".+", identity in ".+", delay_id in "[^\\p{Cc}]{1,60}x",
            ns in 1..=i64::MAX as u64, at in -62_135_596_800_i64..253_402_300_800, fraction in 0..1_000_000_000_u32,
            connected: Option<bool>,
        ) {
            let seconds = Duration::from_secs(at.unsigned_abs());
            let epoch = SystemTime::UNIX_EPOCH;
            let at = if at < 0 { epoch - seconds } else { epoch + seconds } + Duration::from_nanos(fraction.into());
            let mut job = job("x", &delay_id);
            job.params.key = key(room, identity).unwrap();
            job.params.delay_timeout = Duration::from_nanos(ns);
            job.restarted_at = at;
            job.connected = connected;
            prop_assert_eq!(decode(encode(&job).as_bytes()).unwrap(), job.clone());
            prop_assert_eq!(parse_field(field(&job.params.key).as_bytes()).unwrap(), job.params.key);
        }

        #[test]
        fn no_bytes_make_it_panic(bytes: Vec<u8>) {
            let _ = (decode(&bytes), parse_field(&bytes));
        }

        #[test]
        fn no_change_of_a_job_makes_it_panic(at in 0..REFERENCE.len(), bytes in prop::collection::vec(any::<u8>(), 0..4)) {
            let mut value = REFERENCE.as_bytes().to_vec();
            value.splice(at..(at + bytes.len()).min(value.len()), bytes);
            if let Ok(job) = decode(&value) {
                prop_assert_eq!(decode(encode(&job).as_bytes()), Ok(job));
            }
        }
    }
}
