//! What must hold for any answer about a delayed event, and for any URL that leads to one.

use std::time::{Duration, SystemTime};

use hyper::{StatusCode, Uri};
use percent_encoding::percent_decode_str;
use serde_json::{Value, from_slice};
use url::Url;

use super::{
    super::{DelayId, machine::Outcome},
    Action, ClientAnswer, LONGEST_HINT, delayed_event, has_stable_paths, is_unrecognized, outcome,
};
use crate::fuzzing::first_value;

/// `head` is a status and a `Retry-After` header.
pub(crate) fn delayed_event_answer(head: &str, body: &[u8]) {
    let (status, retry_after) = head.split_once(' ').map_or((head, None), |(s, r)| (s, Some(r.to_owned())));
    let Ok(status) = status.parse::<StatusCode>() else { return };
    let answer = ClientAnswer { status, retry_after, body: body.to_vec().into() };
    let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_769_847_300);
    match outcome(&answer, now) {
        Outcome::Done => assert!(status.is_success()),
        Outcome::Gone | Outcome::Settled | Outcome::Refused => assert!(status.is_client_error()),
        Outcome::Later(Some(wait)) => {
            assert!(wait <= LONGEST_HINT && status == StatusCode::TOO_MANY_REQUESTS)
        }
        Outcome::Later(None) => assert!(!status.is_success()),
    }
    if let Some(value @ Value::Object(_)) = first_value(body).filter(|_| from_slice::<Value>(body).is_ok()) {
        assert_eq!(is_unrecognized(body), value["errcode"] == "M_UNRECOGNIZED");
        let stable = value["unstable_features"]["org.matrix.msc4140.stable"] == true;
        assert_eq!(has_stable_paths(body), stable);
    }
}

/// `base` is what a stranger's document names, `id` what a client sends.
pub(crate) fn delayed_event_url(base: &Url, id: &str) {
    let Ok(delay_id) = DelayId::new(id.to_owned()) else {
        assert!(
            id.is_empty()
                || id.len() > DelayId::MAX_LEN
                || id.contains(char::is_control)
                || id.starts_with('.')
        );
        return;
    };
    assert_eq!(format!("{delay_id:?}"), "DelayId(redacted)");
    for (stable, depth) in [(true, 6), (false, 7)] {
        let Some(url) = delayed_event(base, stable, &delay_id, Action::Send) else {
            panic!("nothing can be appended to {base}");
        };
        assert_eq!(url.origin(), base.origin());
        let segments: Vec<_> = url.path_segments().into_iter().flatten().collect();
        let before: Vec<_> = base.path_segments().into_iter().flatten().collect();
        let before = before.strip_suffix(&[""]).unwrap_or(&before);
        // Of the path `//` nothing stays.
        let before = if before == [""] { &[] } else { before };
        assert_eq!(segments.len(), before.len() + depth, "{url}");
        assert_eq!(segments[..before.len()], *before, "{url}");
        let [.., events, segment, action] = segments[..] else { panic!("{url} is too short") };
        assert_eq!((events, action), ("delayed_events", "send"));
        assert_eq!(percent_decode_str(segment).decode_utf8().as_deref(), Ok(id), "{url}");
        assert_eq!(Url::parse(url.as_str()).as_ref(), Ok(&url), "it changes when it is read again");
        let uri: Result<Uri, _> = url.as_str().parse();
        assert!(uri.is_ok_and(|uri| uri.authority().is_some()), "no request can be made to {url}");
    }
}
