//! What homeservers answer us, read without trust in its form.

use std::{fmt, time::Duration};

use serde::{
    Deserialize,
    de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, Visitor},
};

use crate::secret::Secret;

/// The longest token for an SFU that we pass on.
const MAX_JWT: usize = 16 * 1024;

/// Whose access token it is (`GET /account/whoami`).
pub(super) fn whoami(body: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct Whoami {
        user_id: String,
    }
    serde_json::from_slice(body).ok().map(|Whoami { user_id }| user_id)
}

/// Whether the content of a membership event says "joined".
pub(super) fn is_join(content: &[u8]) -> bool {
    #[derive(Deserialize)]
    struct Content {
        membership: String,
    }
    serde_json::from_slice(content).is_ok_and(|Content { membership }| membership == "join")
}

/// Whether `user_id` is among the members (`GET /rooms/{roomId}/joined_members`); `None` if the answer is no
/// list of members. The others are passed over without being stored: there can be a hundred thousand.
pub(super) fn has_member(body: &[u8], user_id: &str) -> Option<bool> {
    struct Answer<'a>(&'a str);
    impl<'de> DeserializeSeed<'de> for Answer<'_> {
        type Value = bool;
        fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<bool, D::Error> {
            deserializer.deserialize_map(self)
        }
    }
    impl<'de> Visitor<'de> for Answer<'_> {
        type Value = bool;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an object with a member `joined`")
        }
        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<bool, A::Error> {
            let mut found = None;
            while let Some(name) = map.next_key::<String>()? {
                if name == "joined" {
                    found = Some(map.next_value_seed(Members(self.0))?);
                } else {
                    map.next_value::<IgnoredAny>()?;
                }
            }
            found.ok_or_else(|| A::Error::missing_field("joined"))
        }
    }
    struct Members<'a>(&'a str);
    impl<'de> DeserializeSeed<'de> for Members<'_> {
        type Value = bool;
        fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<bool, D::Error> {
            deserializer.deserialize_map(self)
        }
    }
    impl<'de> Visitor<'de> for Members<'_> {
        type Value = bool;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an object whose names are Matrix IDs")
        }
        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<bool, A::Error> {
            let mut found = false;
            while let Some((name, IgnoredAny)) = map.next_entry::<String, _>()? {
                found |= name == self.0;
            }
            Ok(found)
        }
    }
    let mut json = serde_json::Deserializer::from_slice(body);
    Answer(user_id).deserialize(&mut json).ok()
}

/// A delayed event that waits to be sent (MSC4140, `GET /delayed_events/{delay_id}`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DelayedEvent {
    pub(crate) room_id: String,
    /// After how long without a restart it is sent.
    pub(crate) delay: Duration,
}

/// The delayed event in `body`; `None` if it is none that still waits.
pub(super) fn delayed_event(body: &[u8]) -> Option<DelayedEvent> {
    #[derive(Deserialize)]
    struct Answer {
        room_id: String,
        delay_ms: Option<u64>,
        /// What `delay_ms` was called before.
        delay: Option<u64>,
        finalised: Option<IgnoredAny>,
        finalised_ts: Option<IgnoredAny>,
    }
    let answer: Answer = serde_json::from_slice(body).ok()?;
    if answer.finalised.is_some() || answer.finalised_ts.is_some() {
        return None;
    }
    let delay = Duration::from_millis(answer.delay_ms.or(answer.delay)?);
    Some(DelayedEvent { room_id: answer.room_id, delay })
}

/// What another homeserver said to our request for a token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum RemoteToken {
    /// The token.
    Jwt(Secret),
    /// 403 `M_FORBIDDEN`: to be told to the client.
    Forbidden,
    /// 400 `M_INVALID_PARAM`: to be told to the client.
    InvalidParam,
    /// Anything else: the client learns only that it failed.
    Failed,
}

impl RemoteToken {
    pub(super) fn read(status: u16, body: &[u8]) -> Self {
        #[derive(Deserialize)]
        struct Answer {
            jwt: String,
        }
        match (status, errcode(body).as_deref()) {
            (200, _) => match serde_json::from_slice(body) {
                // Of a stranger's text only what can be a token goes into our answer.
                Ok(Answer { jwt })
                    if !jwt.is_empty()
                        && jwt.len() <= MAX_JWT
                        && jwt.bytes().all(|b| b.is_ascii_graphic()) =>
                {
                    Self::Jwt(jwt.into())
                }
                _ => Self::Failed,
            },
            (403, Some("M_FORBIDDEN")) => Self::Forbidden,
            (400, Some("M_INVALID_PARAM")) => Self::InvalidParam,
            _ => Self::Failed,
        }
    }
}

/// The error code of a refusal.
pub(super) fn errcode(body: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct Refusal {
        errcode: String,
    }
    serde_json::from_slice(body).ok().map(|Refusal { errcode }| errcode)
}

/// Whether a refused access token can be replaced by logging in again to the same session.
pub(super) fn is_soft_logout(body: &[u8]) -> bool {
    #[derive(Deserialize)]
    struct Refusal {
        soft_logout: bool,
    }
    serde_json::from_slice(body).is_ok_and(|Refusal { soft_logout }| soft_logout)
}

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod properties;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn only_join_is_joined() {
        assert!(is_join(br#"{"displayname":"alice","membership":"join"}"#));
        for content in
            ["", "{}", r#"{"membership":"leave"}"#, r#"{"membership":"JOIN"}"#, r#"{"membership":1}"#]
        {
            assert!(!is_join(content.as_bytes()), "{content}");
        }
    }

    #[test]
    fn a_member_is_found_among_the_joined() {
        let body = br#"{"x":[1],"joined":{"@a:hs":{"display_name":null},"@b:hs":{}}}"#;
        assert_eq!(has_member(body, "@b:hs"), Some(true));
        assert_eq!(has_member(body, "@c:hs"), Some(false));
        for body in ["", "{}", "[]", r#"{"joined":[]}"#, r#"{"joined":{"@a:hs":{}"#] {
            assert_eq!(has_member(body.as_bytes(), "@a:hs"), None, "{body}");
        }
    }

    #[test]
    fn a_delayed_event_is_one_that_waits() {
        // What Synapse 1.163 answers.
        let body = r#"{"delay_id":"syd_X","room_id":"!r:hs","type":"m.rtc.member","delay_ms":3600000,
            "delayed_since_ts":1795546774486,"content":{"a":1}}"#;
        let hour = DelayedEvent { room_id: "!r:hs".to_owned(), delay: Duration::from_hours(1) };
        assert_eq!(delayed_event(body.as_bytes()), Some(hour.clone()));
        assert_eq!(delayed_event(br#"{"room_id":"!r:hs","delay":3600000}"#), Some(hour));
        for body in [
            r#"{"room_id":"!r:hs","delay_ms":1,"finalised":{"finalised_ts":1}}"#,
            r#"{"room_id":"!r:hs","delay":1,"finalised_ts":1}"#,
            r#"{"room_id":"!r:hs"}"#,
            r#"{"room_id":"!r:hs","delay_ms":-1}"#,
            r#"{"delay_ms":1}"#,
        ] {
            assert_eq!(delayed_event(body.as_bytes()), None, "{body}");
        }
    }

    #[test]
    fn of_another_servers_answer_only_what_the_msc_says_is_passed_on() {
        let read = |status, body: &str| RemoteToken::read(status, body.as_bytes());
        assert_eq!(read(200, r#"{"jwt":"a.b.c"}"#), RemoteToken::Jwt("a.b.c".into()));
        assert_eq!(read(403, r#"{"errcode":"M_FORBIDDEN","error":"x"}"#), RemoteToken::Forbidden);
        assert_eq!(read(400, r#"{"errcode":"M_INVALID_PARAM"}"#), RemoteToken::InvalidParam);
        let long = format!(r#"{{"jwt":"{}"}}"#, "a".repeat(MAX_JWT + 1));
        for (status, body) in [
            (200, ""),
            (200, r#"{"jwt":""}"#),
            (200, r#"{"jwt":"a b"}"#),
            (200, &long),
            (201, r#"{"jwt":"a.b.c"}"#),
            (403, ""),
            (403, r#"{"errcode":"M_UNKNOWN"}"#),
            (400, r#"{"errcode":"M_FORBIDDEN"}"#),
            (401, r#"{"errcode":"M_UNAUTHORIZED"}"#),
            (404, r#"{"errcode":"M_UNRECOGNIZED"}"#),
            (500, "<html>"),
        ] {
            assert_eq!(read(status, body), RemoteToken::Failed, "{status} {body}");
        }
    }

    #[test]
    fn another_servers_token_is_not_printed() {
        let token = RemoteToken::read(200, br#"{"jwt":"a.b.c"}"#);
        assert_eq!(format!("{token:?}"), "Jwt([redacted])");
    }

    proptest! {
        #[test]
        fn no_answer_makes_it_panic(status in 100u16..600, body in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = (whoami(&body), is_join(&body), has_member(&body, "@a:hs"), delayed_event(&body));
            let _ = (RemoteToken::read(status, &body), is_soft_logout(&body));
        }
    }
}
