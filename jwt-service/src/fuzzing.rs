//! What must hold whatever bytes somebody else chooses: one property for each fuzz target, which panics where
//! it does not hold.
//!
//! `fuzz/targets` calls them with inputs that libFuzzer invents (docs/fuzzing.md). The tests below call the same
//! with the committed inputs in `fuzz/corpus`, so that what was found once stays fixed, and with random ones. So
//! they are compiled for tests and with the feature `fuzzing`, and into no program.
//!
//! A property stands in a file `properties.rs` below the code that it is about, because that code is private.
//! Beyond "no panic" it compares with a second reading (`serde_json::Value`, LiveKit's own types, a naive
//! algorithm), writes out what was read and reads it again, or checks a bound.

use std::time::{Duration, Instant};

use serde_json::Value;
use url::Url;

use crate::{config, delegation, homeserver_side, http, limits, openid, store};

type Property = fn(&[u8]);

/// All of them, by the names of the targets and of the folders in the corpus.
const TARGETS: [(&str, Property); 14] = [
    ("forwarded_for", limits::properties::forwarded_for),
    ("homeserver_answer", homeserver_answer),
    ("homeserver_document", homeserver_document),
    ("homeserver_request", homeserver_request),
    ("job_log", store::job_log),
    ("job_machine", delegation::job_machine),
    ("job_registry", delegation::job_registry),
    ("request_body", http::request_body),
    ("server_name", server_name),
    ("settings_file", config::settings_file),
    ("stored_job", store::stored_job),
    ("webhook", http::webhook),
    ("well_known", well_known),
    ("x_matrix", x_matrix),
];

/// Checks the property of `target` on `data`.
///
/// # Panics
/// If it does not hold, or there is no such target.
pub fn run(target: &str, data: &[u8]) {
    let known = TARGETS.iter().find(|(name, _)| *name == target);
    let (_, property) = known.unwrap_or_else(|| panic!("there is no fuzz target {target}"));
    property(data);
}

/// The first line is a status and a `Retry-After` header, the second a server name; then comes the body.
fn homeserver_answer(data: &[u8]) {
    let (head, rest) = line(data);
    let (name, body) = line(rest);
    delegation::delayed_event_answer(&text(head), body);
    openid::userinfo_answer(&text(name), body);
}

/// The first line is a status and a Matrix ID; then comes the body. The whole is also read as a signing key file.
fn homeserver_document(data: &[u8]) {
    let (head, body) = line(data);
    let head = text(head);
    let (status, user_id) = head.split_once(' ').unwrap_or_default();
    homeserver_side::homeserver_side_answer(status.parse().unwrap_or(200), user_id, body);
    homeserver_side::signing_key_file(&text(data));
}

/// The first line is an `Authorization` header; then comes the body, whose `url` may be our SFU's.
fn homeserver_request(data: &[u8]) {
    let (header, body) = line(data);
    homeserver_side::bearer_header(header);
    homeserver_side::membership_request(body);
    let value: Value = serde_json::from_slice(body).unwrap_or_default();
    if let Some(url) = value["url"].as_str()
        && let Ok(ours) = Url::parse("wss://sfu.us.org/livekit")
    {
        http::sfu_url(url, &ours);
    }
}

/// The first line is a server name, the second a list of them, the third overrides, as an operator writes them.
fn server_name(data: &[u8]) {
    let (name, rest) = line(data);
    let (names, overrides) = line(rest);
    openid::server_name(&text(name));
    config::lists_of_servers(&text(names), &text(line(overrides).0));
}

/// The first line is a `Cache-Control` header, the second a delay id; then comes the document.
fn well_known(data: &[u8]) {
    let (header, rest) = line(data);
    let (delay_id, document) = line(rest);
    openid::server_document(&text(header), document);
    if let Some(base) = openid::client_document(document) {
        delegation::delayed_event_url(&base, &text(delay_id));
    }
}

/// The first line is a method and a path, the second a body; then come `Authorization` headers, one a line, up to an
/// empty line; then the time and the document with the other server's keys.
fn x_matrix(data: &[u8]) {
    let (start, rest) = line(data);
    let (body, rest) = line(rest);
    let mut headers = Vec::new();
    let (mut header, mut rest) = line(rest);
    while !header.is_empty() {
        headers.push(header);
        (header, rest) = line(rest);
    }
    homeserver_side::signed_request(&text(start), body, &headers);
    homeserver_side::published_keys(rest);
}

/// The first line of `data`, and what comes after it.
pub(crate) fn line(data: &[u8]) -> (&[u8], &[u8]) {
    match data.iter().position(|b| *b == b'\n') {
        Some(end) => (&data[..end], &data[end + 1..]),
        None => (data, &[]),
    }
}

/// Whatever cannot be part of a `&str` does not reach the code that takes one.
pub(crate) fn text(data: &[u8]) -> String {
    String::from_utf8_lossy(data).into_owned()
}

/// The JSON value that `json` begins with; `None` if there is none, or one in which a member occurs twice:
/// `Value` has forgotten the first by then.
pub(crate) fn first_value(json: &[u8]) -> Option<Value> {
    let mut values = serde_json::Deserializer::from_slice(json).into_iter();
    let value = values.next()?.ok()?;
    let written = json.get(..values.byte_offset())?;
    (members(&value) == colons(written)).then_some(value)
}

/// How many members all objects in `value` have.
fn members(value: &Value) -> usize {
    match value {
        Value::Array(items) => items.iter().map(members).sum(),
        Value::Object(object) => object.len() + object.values().map(members).sum::<usize>(),
        _ => 0,
    }
}

/// How many colons there are outside strings: one for each member.
fn colons(json: &[u8]) -> usize {
    let (mut count, mut quoted, mut escaped) = (0, false, false);
    for byte in json {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'"' => quoted = !quoted,
            b':' if !quoted => count += 1,
            _ => {}
        }
    }
    count
}

/// One byte's worth of time: from nothing to 174 days, finer where it is short.
pub(crate) fn duration(byte: u8) -> Duration {
    Duration::from_millis(u64::from(byte & 7) << (byte >> 3))
}

/// Where virtual time begins.
pub(crate) fn beginning() -> Instant {
    #[expect(
        clippy::disallowed_methods,
        reason = "an Instant has no other origin; the property moves it by itself"
    )]
    Instant::now()
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, fs, path::Path};

    use proptest::prelude::*;

    use super::*;

    fn names_in(folder: &str) -> BTreeSet<String> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz").join(folder);
        let stem = |path: &Path| path.file_stem().unwrap().to_str().unwrap().to_owned();
        fs::read_dir(folder).unwrap().map(|entry| stem(&entry.unwrap().path())).collect()
    }

    #[test]
    fn every_target_has_its_program_and_its_corpus() {
        let names: BTreeSet<_> = TARGETS.iter().map(|(name, _)| (*name).to_owned()).collect();
        assert_eq!(names_in("targets"), names);
        assert_eq!(names_in("corpus"), names);
    }

    #[test]
    fn what_was_found_once_stays_fixed() {
        for (name, property) in TARGETS {
            let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
            let mut inputs = 0;
            for input in fs::read_dir(corpus).unwrap() {
                let input = input.unwrap().path();
                // Seen if the property fails.
                eprintln!("{}", input.display());
                property(&fs::read(input).unwrap());
                inputs += 1;
            }
            assert!(inputs > 0, "{name} has no inputs");
        }
    }

    #[test]
    fn a_value_is_one_that_every_reader_reads_the_same() {
        assert_eq!(first_value(br#" {"a":{"b":"\":\\"}} {"#), Some(serde_json::json!({"a": {"b": "\":\\"}})));
        assert_eq!(first_value(br#"{"a":[{"b":1,"b":2}]}"#), None);
        assert_eq!(first_value(b"{"), None);
    }

    proptest! {
        #[test]
        fn random_bytes_break_nothing(data in prop::collection::vec(any::<u8>(), 0..200)) {
            for (_, property) in TARGETS {
                property(&data);
            }
        }
    }
}
