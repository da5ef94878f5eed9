//! Request bodies, decoded by hand: frameworks answer 415 or 422 where clients of lk-jwt-service rely on
//! `M_NOT_JSON` and `M_BAD_JSON`.
//!
//! The rules are the reference's: only the first JSON value counts, member names match in any case, of
//! duplicates the last wins, `null` is absent, a wrong type or an unknown member at the top is no request.
//! Inside `openid_token` and `member` unknown members are let through, because the objects are other
//! specifications' and grow.

use std::fmt;

use serde::{
    Deserialize,
    de::{Deserializer, MapAccess, Visitor},
};
use serde_json::value::RawValue;

use crate::secret::Secret;

/// The members of all three request bodies; absent ones are empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Body {
    pub(crate) room: String,
    pub(crate) room_id: String,
    pub(crate) slot_id: String,
    pub(crate) device_id: String,
    pub(crate) openid_token: OpenIdToken,
    pub(crate) member: Member,
    pub(crate) delay_id: String,
    pub(crate) delay_timeout: i64,
}

/// The homeserver's answer to the client's request for an OpenID token, as far as it matters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct OpenIdToken {
    pub(crate) access_token: Secret,
    pub(crate) matrix_server_name: String,
}

impl Default for OpenIdToken {
    fn default() -> Self {
        Self { access_token: Secret::new(""), matrix_server_name: String::new() }
    }
}

/// Which membership the token is for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Member {
    pub(crate) id: String,
    pub(crate) claimed_user_id: String,
    pub(crate) claimed_device_id: String,
}

/// The members that `/get_token` knows at the top, and those of `/sfu/get`.
pub(crate) const GET_TOKEN: &[&str] =
    &["room_id", "slot_id", "openid_token", "member", "delay_id", "delay_timeout", "delay_cs_api_url"];
pub(crate) const SFU_GET: &[&str] =
    &["room", "openid_token", "device_id", "delay_id", "delay_timeout", "delay_cs_api_url"];

/// The body is not the JSON that the endpoint takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NotJson;

impl Body {
    /// Decodes `bytes`, with the members in `known` and no others.
    pub(crate) fn decode(bytes: &[u8], known: &[&str]) -> Result<Self, NotJson> {
        let mut json = serde_json::Deserializer::from_slice(bytes);
        let mut body = Self::default();
        for (name, node) in Node::deserialize(&mut json).map_err(|_| NotJson)?.members()? {
            let name = known.iter().find(|k| k.eq_ignore_ascii_case(&name)).ok_or(NotJson)?;
            match *name {
                "room" => node.string_into(&mut body.room)?,
                "room_id" => node.string_into(&mut body.room_id)?,
                "slot_id" => node.string_into(&mut body.slot_id)?,
                "device_id" => node.string_into(&mut body.device_id)?,
                "openid_token" => body.openid_token.merge(node)?,
                "member" => body.member.merge(node)?,
                "delay_id" => node.string_into(&mut body.delay_id)?,
                "delay_timeout" => node.integer_into(&mut body.delay_timeout)?,
                // `delay_cs_api_url`: its type is checked, its value never used; the caller must not choose
                // where we send requests.
                _ => node.string_into(&mut String::new())?,
            }
        }
        Ok(body)
    }
}

impl OpenIdToken {
    fn merge(&mut self, node: Node<'_>) -> Result<(), NotJson> {
        for (name, node) in node.members()? {
            match name.to_ascii_lowercase().as_str() {
                "access_token" => {
                    if let Some(token) = node.read::<String>()? {
                        self.access_token = Secret::new(token);
                    }
                }
                "matrix_server_name" => node.string_into(&mut self.matrix_server_name)?,
                "token_type" => node.string_into(&mut String::new())?,
                "expires_in" => node.integer_into(&mut 0)?,
                _ => {}
            }
        }
        Ok(())
    }
}

impl Member {
    fn merge(&mut self, node: Node<'_>) -> Result<(), NotJson> {
        for (name, node) in node.members()? {
            match name.to_ascii_lowercase().as_str() {
                "id" => node.string_into(&mut self.id)?,
                "claimed_user_id" => node.string_into(&mut self.claimed_user_id)?,
                "claimed_device_id" => node.string_into(&mut self.claimed_device_id)?,
                _ => {}
            }
        }
        Ok(())
    }
}

/// A JSON value as it is written: what type it must have is known only where it is used, and whether a number is an
/// integer is seen in its text alone (`-0` is one, `-0.0` is none).
#[derive(Deserialize)]
#[serde(transparent)]
struct Node<'a>(#[serde(borrow)] &'a RawValue);

impl<'a> Node<'a> {
    fn members(self) -> Result<Vec<(String, Self)>, NotJson> {
        let members: Option<Members<'a>> = self.read()?;
        Ok(members.map_or_else(Vec::new, |Members(members)| members))
    }

    fn string_into(self, target: &mut String) -> Result<(), NotJson> {
        if let Some(text) = self.read()? {
            *target = text;
        }
        Ok(())
    }

    fn integer_into(self, target: &mut i64) -> Result<(), NotJson> {
        match self.0.get() {
            "null" => {}
            number => *target = number.parse().map_err(|_| NotJson)?,
        }
        Ok(())
    }

    fn read<T: Deserialize<'a>>(self) -> Result<Option<T>, NotJson> {
        serde_json::from_str(self.0.get()).map_err(|_| NotJson)
    }
}

/// An object's members in their order, duplicates included, so that the last one can win.
struct Members<'a>(Vec<(String, Node<'a>)>);

impl<'de> Deserialize<'de> for Members<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(MembersVisitor)
    }
}

struct MembersVisitor;

impl<'de> Visitor<'de> for MembersVisitor {
    type Value = Members<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Members<'de>, A::Error> {
        let mut members = Vec::new();
        while let Some(member) = map.next_entry()? {
            members.push(member);
        }
        Ok(Members(members))
    }
}

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod properties;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn decode(text: &str) -> Result<Body, NotJson> {
        Body::decode(text.as_bytes(), GET_TOKEN)
    }

    #[test]
    fn names_match_in_any_case_and_the_last_duplicate_wins() {
        let body = decode(
            r#"{"Room_ID":"a","room_id":"b","OPENID_TOKEN":{"Access_Token":"t","access_token":"u"},
                "member":{"id":"x"},"member":{"ID":"y","claimed_user_id":"z"}} trailing"#,
        )
        .unwrap();
        assert_eq!(body.room_id, "b");
        assert_eq!(body.openid_token.access_token.expose(), "u");
        assert_eq!((body.member.id.as_str(), body.member.claimed_user_id.as_str()), ("y", "z"));
    }

    #[test]
    fn what_go_reads_and_we_do_not_is_refused_not_misread() {
        // Half a surrogate pair: Go puts a replacement character there, which is no member's id either.
        for text in [r#"{"room_id":"\ud800"}"#, r#"{"room_id":"\udc00x"}"#] {
            assert_eq!(decode(text), Err(NotJson), "{text}");
        }
        assert_eq!(decode(r#"{"room_id":"\ud83d\ude00"}"#).unwrap().room_id, "\u{1f600}");
    }

    #[test]
    fn only_the_first_value_is_read() {
        for rest in ["", " ", "{", "]", "\u{0}", "{\"unknown\":1}"] {
            assert_eq!(decode(&format!("{{\"room_id\":\"x\"}}{rest}")).unwrap().room_id, "x", "{rest:?}");
        }
    }

    #[test]
    fn unknown_members_are_refused_at_the_top_and_passed_over_inside() {
        assert_eq!(decode(r#"{"unknown":null}"#), Err(NotJson));
        let inside = r#"{"openid_token":{"unknown":null},"member":{"unknown":{}}}"#;
        assert_eq!(decode(inside), Ok(Body::default()));
    }

    #[test]
    fn null_is_absent_everywhere() {
        for text in
            ["null", "{}", r#"{"room_id":null,"openid_token":null,"member":null,"delay_timeout":null}"#]
        {
            assert_eq!(decode(text), Ok(Body::default()), "{text}");
        }
        assert_eq!(decode(r#"{"member":{"id":null}}"#), Ok(Body::default()));
    }

    #[test]
    fn what_is_not_a_request_is_not_json() {
        for text in [
            "",
            " ",
            "{",
            "[]",
            "\"x\"",
            "1",
            "true",
            "{\"room_id\":1}",
            "{\"room_id\":[]}",
            "{\"room_id\":{}}",
            "{\"openid_token\":\"t\"}",
            "{\"openid_token\":{\"access_token\":1}}",
            "{\"member\":[]}",
            "{\"openid_token\":{\"expires_in\":\"3600\"}}",
            "{\"openid_token\":{\"expires_in\":1.0}}",
            "{\"openid_token\":{\"expires_in\":1e3}}",
            "{\"delay_timeout\":9223372036854775808}",
            "{\"delay_timeout\":true}",
            "{\"delay_cs_api_url\":1}",
            "{\"unknown\":1}",
            "{\"room\":\"legacy\"}",
        ] {
            assert_eq!(decode(text), Err(NotJson), "{text}");
        }
        assert_eq!(Body::decode(b"\"\xff\"", GET_TOKEN), Err(NotJson));
        assert_eq!(Body::decode(b"{\"room_id\":\"x\"}", SFU_GET), Err(NotJson));
    }

    #[test]
    fn other_specifications_objects_may_grow() {
        let body =
            decode(r#"{"openid_token":{"new":{"a":[1,{}]}},"member":{"id":"x","new":1.5e300}}"#).unwrap();
        assert_eq!(body.member.id, "x");
    }

    #[test]
    fn the_whole_range_of_integers_is_read() {
        assert_eq!(decode(r#"{"delay_timeout":9223372036854775807}"#).unwrap().delay_timeout, i64::MAX);
        assert_eq!(decode(r#"{"delay_timeout":-9223372036854775808}"#).unwrap().delay_timeout, i64::MIN);
        assert_eq!(decode(r#"{"delay_timeout":-0}"#).unwrap().delay_timeout, 0);
        for no_integer in ["-0.0", "0.0", "-0e0", "0E5", "-1e-400", "1.0", "+1", "01", "-"] {
            let text = format!("{{\"delay_timeout\":{no_integer}}}");
            assert_eq!(decode(&text), Err(NotJson), "{text}");
        }
    }

    #[test]
    fn deep_nesting_is_refused_not_followed() {
        let deep = format!("{{\"member\":{}", "[".repeat(60_000));
        assert_eq!(decode(&deep), Err(NotJson));
        let whole = format!("{deep}{}}}", "]".repeat(60_000));
        assert_eq!(decode(&whole), Err(NotJson));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = Body::decode(&bytes, GET_TOKEN);
            let _ = Body::decode(&bytes, SFU_GET);
        }
    }
}
