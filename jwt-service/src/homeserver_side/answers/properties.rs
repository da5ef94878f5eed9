//! What must hold for any answer of a homeserver.

use std::time::Duration;

use serde_json::{Value, from_slice};

use super::{
    DelayedEvent, MAX_JWT, RemoteToken, delayed_event, errcode, has_member, is_join, is_soft_logout, whoami,
};
use crate::fuzzing::first_value;

/// An answer with this status, to a question about `user_id`.
pub(crate) fn homeserver_side_answer(status: u16, user_id: &str, body: &[u8]) {
    let token = RemoteToken::read(status, body);
    match &token {
        RemoteToken::Jwt(jwt) => {
            assert_eq!(status, 200);
            let jwt = jwt.expose();
            assert!((1..=MAX_JWT).contains(&jwt.len()));
            // It cannot break out of the answer it goes into.
            assert!(jwt.chars().all(|c| ('!'..='~').contains(&c)));
            assert_eq!(format!("{token:?}"), "Jwt([redacted])");
        }
        RemoteToken::Forbidden => assert_eq!(status, 403),
        RemoteToken::InvalidParam => assert_eq!(status, 400),
        RemoteToken::Failed => {}
    }

    // An array is read as an object with its members in order: a habit of serde, and harmless.
    let object = from_slice(body).is_ok_and(|value: Value| value.is_object());
    let Some(value) = first_value(body).filter(|_| object) else { return };
    let text = |name: &str| value[name].as_str();
    assert_eq!(whoami(body).as_deref(), text("user_id"));
    assert_eq!(is_join(body), value["membership"] == "join");
    assert_eq!(errcode(body).as_deref(), text("errcode"));
    assert_eq!(is_soft_logout(body), value["soft_logout"] == true);
    let joined = value["joined"].as_object();
    assert_eq!(has_member(body, user_id), joined.map(|members| members.contains_key(user_id)));
    assert_eq!(delayed_event(body), waiting(&value));
    let jwt = text("jwt").filter(|jwt| !jwt.is_empty() && jwt.len() <= MAX_JWT);
    let expected = match (status, text("errcode"), jwt) {
        (200, _, Some(jwt)) if jwt.chars().all(|c| c.is_ascii_graphic()) => RemoteToken::Jwt(jwt.into()),
        (403, Some("M_FORBIDDEN"), _) => RemoteToken::Forbidden,
        (400, Some("M_INVALID_PARAM"), _) => RemoteToken::InvalidParam,
        _ => RemoteToken::Failed,
    };
    assert_eq!(token, expected, "another reading of it");
}

fn waiting(answer: &Value) -> Option<DelayedEvent> {
    let delays = [&answer["delay_ms"], &answer["delay"]];
    if !delays.iter().all(|delay| delay.is_null() || delay.is_u64()) {
        return None;
    }
    let delay = Duration::from_millis(delays.into_iter().find_map(Value::as_u64)?);
    let room_id = answer["room_id"].as_str()?.to_owned();
    let waits = answer["finalised"].is_null() && answer["finalised_ts"].is_null();
    waits.then_some(DelayedEvent { room_id, delay })
}
