//! The bodies of the requests (MSC4195).
//!
//! Members that we do not know are ignored, as everywhere in Matrix. Of duplicate members the last counts, which
//! is also what a server signs.

use serde_json::{Map, Value, json};

use crate::{
    delegation::DelayId,
    identity::{ParticipantIdentity, RoomAlias},
    openid::ServerName,
};

/// The longest Matrix identifier (appendices, §Common Identifier Format).
const MAX_ID: usize = 255;

/// Which membership a token or a delegation is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Membership {
    /// The SFU's URL, as the client has learnt it.
    pub(crate) url: String,
    pub(crate) room_id: String,
    slot_id: String,
    member: Member,
}

/// How a request names the member.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Member {
    /// `member_id`: the current text.
    Id(String),
    /// `member`, with a device: the text before it, which matrix-js-sdk 43 speaks. Other clients derive this
    /// member's identity with the device too, so that it pairs with members that came through `/get_token`.
    WithDevice { id: String, device: String },
}

impl Membership {
    /// The SFU room of the slot. No salt is mixed in: members whose tokens come from `/get_token` or from
    /// another replica are to meet in the same room.
    pub(crate) fn alias(&self) -> RoomAlias {
        RoomAlias::of_slot(&self.room_id, &self.slot_id)
    }

    /// What `user_id` is called on the SFU with this membership: what the other clients in the call derive from
    /// its membership event.
    pub(crate) fn identity(&self, user_id: &str) -> ParticipantIdentity {
        match &self.member {
            Member::Id(id) => ParticipantIdentity::of_membership(user_id, id),
            Member::WithDevice { id, device } => ParticipantIdentity::of_member(user_id, device, id),
        }
    }

    /// The body of the federation request with which another server is asked for `user_id`'s token.
    pub(crate) fn federation_body(&self, user_id: &str) -> Value {
        let mut body = json!({
            "user_id": user_id, "url": self.url, "room_id": self.room_id, "slot_id": self.slot_id,
        });
        match &self.member {
            Member::Id(id) => body["member_id"] = json!(id),
            Member::WithDevice { id, device } => {
                body["member"] = json!({ "id": id, "claimed_device_id": device });
            }
        }
        body
    }

    fn read(body: &Object) -> Result<Self, RequestError> {
        let url = body.needed("url")?;
        let room_id = body.needed("room_id")?;
        // `Url` leaves tabs and line ends out: it would be another room that the homeserver is asked about.
        let room = room_id.starts_with('!') && room_id.len() <= MAX_ID && !room_id.contains(char::is_control);
        if !room {
            return Err(RequestError::Invalid("room_id is not the ID of a room"));
        }
        let slot_id = body.needed("slot_id")?;
        let member = match (body.text("member_id")?, body.object("member")?) {
            (Some(id), _) => Member::Id(id),
            (None, Some(member)) => {
                let id = member.needed("id")?;
                match member.text("claimed_device_id")? {
                    Some(device) => Member::WithDevice { id, device },
                    None => Member::Id(id),
                }
            }
            (None, None) => return Err(RequestError::Missing("member_id")),
        };
        Ok(Self { url, room_id, slot_id, member })
    }
}

/// `POST /_matrix/client/v1/rtc/livekit/get_token`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TokenRequest {
    /// Whose SFU; `None`: our own homeserver's.
    pub(crate) server_name: Option<ServerName>,
    pub(crate) membership: Membership,
}

impl TokenRequest {
    pub(crate) fn decode(body: &[u8]) -> Result<Self, RequestError> {
        let body = Object::decode(body)?;
        let server_name = body.text("server_name")?;
        let server_name = server_name.map(|name| name.parse()).transpose();
        let server_name =
            server_name.map_err(|_| RequestError::Invalid("server_name is not a server name"))?;
        Ok(Self { server_name, membership: Membership::read(&body)? })
    }
}

/// `POST /_matrix/client/v1/rtc/livekit/delegate_delayed_leave`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DelegationRequest {
    pub(crate) membership: Membership,
    pub(crate) delay_id: DelayId,
}

impl DelegationRequest {
    pub(crate) fn decode(body: &[u8]) -> Result<Self, RequestError> {
        let body = Object::decode(body)?;
        let membership = Membership::read(&body)?;
        let delay_id = DelayId::new(body.needed("delay_id")?)
            .map_err(|_| RequestError::Invalid("delay_id is not the ID of a delayed event"))?;
        Ok(Self { membership, delay_id })
    }
}

/// `POST /_matrix/federation/v1/rtc/livekit/get_token`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct FederationTokenRequest {
    pub(crate) user_id: String,
    pub(crate) membership: Membership,
}

impl FederationTokenRequest {
    pub(crate) fn decode(body: &[u8]) -> Result<Self, RequestError> {
        let body = Object::decode(body)?;
        let user_id = body.needed("user_id")?;
        if domain(&user_id).is_none() {
            return Err(RequestError::Invalid("user_id is not a Matrix ID"));
        }
        Ok(Self { user_id, membership: Membership::read(&body)? })
    }

    /// Whether the user is one of `server`'s: a server speaks for its own users only.
    pub(crate) fn is_of(&self, server: &ServerName) -> bool {
        domain(&self.user_id) == Some(server.as_str())
    }
}

/// The server name in a Matrix ID.
pub(super) fn domain(user_id: &str) -> Option<&str> {
    let (_, domain) = user_id.strip_prefix('@')?.split_once(':')?;
    (user_id.len() <= MAX_ID).then_some(domain)
}

/// Why a body is no request. The names and sentences are ours, so they can go into an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RequestError {
    /// It is not JSON.
    NotJson,
    /// It is not an object, or a member has the wrong type.
    BadJson,
    /// This member is absent or empty.
    Missing(&'static str),
    /// A member has a value that it cannot have.
    Invalid(&'static str),
}

/// A JSON object whose members are asked for by name.
struct Object(Map<String, Value>);

impl Object {
    fn decode(body: &[u8]) -> Result<Self, RequestError> {
        match serde_json::from_slice(body) {
            Ok(Value::Object(members)) => Ok(Self(members)),
            Ok(_) => Err(RequestError::BadJson),
            Err(_) => Err(RequestError::NotJson),
        }
    }

    /// A string, if it is there.
    fn text(&self, name: &'static str) -> Result<Option<String>, RequestError> {
        match self.0.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) if text.is_empty() => Err(RequestError::Missing(name)),
            Some(Value::String(text)) => Ok(Some(text.clone())),
            Some(_) => Err(RequestError::BadJson),
        }
    }

    fn needed(&self, name: &'static str) -> Result<String, RequestError> {
        self.text(name)?.ok_or(RequestError::Missing(name))
    }

    fn object(&self, name: &'static str) -> Result<Option<Self>, RequestError> {
        match self.0.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Object(members)) => Ok(Some(Self(members.clone()))),
            Some(_) => Err(RequestError::BadJson),
        }
    }
}

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod properties;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn newest() -> Value {
        json!({
            "url": "wss://sfu.hs.org", "room_id": "!room:hs.org", "slot_id": "m.call#ROOM", "member_id": "m1",
        })
    }

    fn token(body: &Value) -> Result<TokenRequest, RequestError> {
        TokenRequest::decode(body.to_string().as_bytes())
    }

    #[test]
    fn the_current_text_names_the_member_by_its_id_alone() {
        let request = token(&newest()).unwrap();
        assert_eq!(request.server_name, None);
        assert_eq!(request.membership.alias(), RoomAlias::of_slot("!room:hs.org", "m.call#ROOM"));
        let identity = request.membership.identity("@a:hs.org");
        assert_eq!(identity, ParticipantIdentity::of_membership("@a:hs.org", "m1"));
        let mut forwarded = newest();
        forwarded["user_id"] = json!("@a:hs.org");
        assert_eq!(request.membership.federation_body("@a:hs.org"), forwarded);
    }

    #[test]
    fn the_text_before_it_adds_the_device_and_so_pairs_with_get_token() {
        let mut body = newest();
        body.as_object_mut().unwrap().remove("member_id");
        body["member"] = json!({ "id": "m1", "claimed_device_id": "DEVICE", "more": 1 });
        body["server_name"] = json!("other.org:8448");
        let request = token(&body).unwrap();
        assert_eq!(request.server_name.as_ref().map(ServerName::as_str), Some("other.org:8448"));
        let identity = request.membership.identity("@a:hs.org");
        assert_eq!(identity, ParticipantIdentity::of_member("@a:hs.org", "DEVICE", "m1"));
        let forwarded = request.membership.federation_body("@a:hs.org");
        assert_eq!(forwarded["member"], json!({ "id": "m1", "claimed_device_id": "DEVICE" }));
        assert_eq!(forwarded.get("server_name"), None);

        body["member"] = json!({ "id": "m1" });
        let identity = token(&body).unwrap().membership.identity("@a:hs.org");
        assert_eq!(identity, ParticipantIdentity::of_membership("@a:hs.org", "m1"));
    }

    #[test]
    fn what_is_missing_is_named() {
        for name in ["url", "room_id", "slot_id", "member_id"] {
            for absent in [json!(null), json!("")] {
                let mut body = newest();
                body[name] = absent;
                assert_eq!(token(&body), Err(RequestError::Missing(name)));
            }
        }
        let mut body = newest();
        assert_eq!(
            DelegationRequest::decode(body.to_string().as_bytes()),
            Err(RequestError::Missing("delay_id"))
        );
        assert_eq!(
            FederationTokenRequest::decode(body.to_string().as_bytes()),
            Err(RequestError::Missing("user_id"))
        );
        body["member_id"] = json!(null);
        body["member"] = json!({});
        assert_eq!(token(&body), Err(RequestError::Missing("id")));
    }

    #[test]
    fn wrong_types_and_values_are_told_apart() {
        for (name, value) in [
            ("url", json!(1)),
            ("room_id", json!([])),
            ("server_name", json!({})),
            ("member_id", json!(true)),
        ] {
            let mut body = newest();
            body[name] = value;
            assert_eq!(token(&body), Err(RequestError::BadJson), "{name}");
        }
        for (name, value) in [
            ("room_id", json!("#alias:hs")),
            ("room_id", json!("!room\t:hs")),
            ("room_id", json!(format!("!{}", "x".repeat(255)))),
            ("server_name", json!("a b")),
        ] {
            let mut body = newest();
            body[name] = value;
            assert!(matches!(token(&body), Err(RequestError::Invalid(_))), "{name}");
        }
        for (body, error) in [
            ("", RequestError::NotJson),
            ("{", RequestError::NotJson),
            ("[]", RequestError::BadJson),
            ("null", RequestError::BadJson),
            ("{} x", RequestError::NotJson),
        ] {
            assert_eq!(TokenRequest::decode(body.as_bytes()), Err(error), "{body}");
        }
    }

    #[test]
    fn a_server_speaks_for_its_own_users_only() {
        let of = |user: &str, server: &str| {
            let mut body = newest();
            body["user_id"] = json!(user);
            FederationTokenRequest::decode(body.to_string().as_bytes())
                .unwrap()
                .is_of(&server.parse().unwrap())
        };
        assert!(of("@a:hs.org", "hs.org"));
        assert!(of("@a:hs.org:8448", "hs.org:8448"));
        for (user, server) in [("@a:hs.org", "hs.org:8448"), ("@a:hs.org:8448", "hs.org"), ("@a:x", "hs.org")]
        {
            assert!(!of(user, server), "{user} {server}");
        }
        for user in ["a:hs.org", "@a", "", ":"] {
            assert_eq!(domain(user), None, "{user}");
        }
    }

    proptest! {
        #[test]
        fn no_body_makes_it_panic(body in prop::collection::vec(any::<u8>(), 0..200), text in "\\PC{0,60}") {
            let _ = (TokenRequest::decode(&body), DelegationRequest::decode(&body));
            let mut object = newest();
            for name in ["user_id", "server_name", "room_id", "delay_id"] {
                object[name] = json!(text);
                let object = object.to_string();
                let _ = TokenRequest::decode(object.as_bytes());
                let _ = DelegationRequest::decode(object.as_bytes());
                let _ = FederationTokenRequest::decode(object.as_bytes());
            }
        }
    }
}
