//! What must hold for any body of a request.

use hyper::Uri;
use percent_encoding::percent_decode_str;
use serde_json::{Value, from_slice};

use super::{
    super::shell::below, DelegationRequest, FederationTokenRequest, MAX_ID, Member, Membership, RequestError,
    TokenRequest,
};
use crate::{delegation::DelayId, fuzzing::first_value, openid::ServerName};

const USER: &str = "@a:hs.org";

/// The body, as each endpoint decodes it.
pub(crate) fn membership_request(body: &[u8]) {
    let token = TokenRequest::decode(body);
    let delegation = DelegationRequest::decode(body);
    let federation = FederationTokenRequest::decode(body);

    let memberships = [
        token.as_ref().ok().map(|request| &request.membership),
        delegation.as_ref().ok().map(|request| &request.membership),
        federation.as_ref().ok().map(|request| &request.membership),
    ];
    let memberships: Vec<_> = memberships.into_iter().flatten().collect();
    if let [one, others @ ..] = &memberships[..] {
        assert!(others.iter().all(|other| other == one), "each endpoint reads another membership");
        membership(one, body);
    }
    if let Ok(request) = &delegation {
        in_its_segment(&["delayed_events", request.delay_id.as_str()]);
        assert!(format!("{request:?}").contains("delay_id: DelayId(redacted)"));
    }
    if let Ok(request) = &federation {
        user(request);
    }

    let readings = [token.map(drop), delegation.map(drop), federation.map(drop)];
    match from_slice(body) {
        Err(_) => assert_eq!(readings, [Err(RequestError::NotJson); 3]),
        Ok(Value::Object(_)) => {
            if let Some(value) = first_value(body) {
                agree(&value, body, readings);
            }
        }
        Ok(_) => assert_eq!(readings, [Err(RequestError::BadJson); 3]),
    }
}

fn membership(membership: &Membership, body: &[u8]) {
    let Membership { url, room_id, slot_id, member } = membership;
    let (id, device) = match member {
        Member::Id(id) => (id, None),
        Member::WithDevice { id, device } => (id, Some(device)),
    };
    let texts = [Some(url), Some(room_id), Some(slot_id), Some(id), device];
    assert!(texts.iter().flatten().all(|text| !text.is_empty()));
    assert!(texts.iter().flatten().map(|text| text.len()).sum::<usize>() <= body.len());
    assert!(room_id.starts_with('!') && room_id.len() <= MAX_ID);
    in_its_segment(&["rooms", room_id, "state"]);

    // What is sent on to another server means the same there.
    let sent = membership.federation_body(USER);
    let received = FederationTokenRequest::decode(sent.to_string().as_bytes());
    let expected = FederationTokenRequest { user_id: USER.to_owned(), membership: membership.clone() };
    assert_eq!(received.as_ref(), Ok(&expected));

    let alias = membership.alias();
    let [one, other] = [USER, "@b:hs.org"].map(|user| membership.identity(user));
    assert_ne!(one, other);
    for hash in [alias.as_str(), one.as_str(), other.as_str()] {
        assert_eq!(hash.len(), 43, "SHA-256 in base64 without padding");
    }
}

fn user(request: &FederationTokenRequest) {
    let user_id = &*request.user_id;
    assert!(user_id.len() <= MAX_ID);
    let rest = user_id.strip_prefix('@').unwrap_or_default();
    let Some(colon) = rest.find(':') else { panic!("{user_id:?} has no server") };
    let server = &rest[colon + 1..];
    if let Ok(name) = server.parse::<ServerName>() {
        assert!(request.is_of(&name));
    }
    for other in [format!("{server}0"), format!("x.{server}"), "us.org".to_owned()] {
        if let Ok(name) = other.parse::<ServerName>() {
            assert_eq!(request.is_of(&name), other == server, "a server speaks for its own users only");
        }
    }
}

/// A request with these segments asks for nothing else.
fn in_its_segment(path: &[&str]) {
    for (base, depth) in [("http://127.0.0.1:8008", 0), ("https://hs.org/prefix/", 1)] {
        let Ok(base) = base.parse() else { continue };
        let Some(url) = below(&base, path) else { panic!("{path:?} climbs") };
        assert_eq!(url.origin(), base.origin());
        assert!(url.query().is_none() && url.fragment().is_none(), "{url}");
        let segments = url.path_segments().into_iter().flatten().skip(depth);
        let segments = segments.map(|segment| percent_decode_str(segment).decode_utf8_lossy());
        let segments: Vec<_> = segments.collect();
        assert_eq!(segments, path, "{url}");
        let uri: Result<Uri, _> = url.as_str().parse();
        assert!(uri.is_ok_and(|uri| uri.authority().is_some()), "no request can be made to {url}");
    }
}

/// The same by way of `Value`: each endpoint takes what has all that it needs, and reads what stands there.
fn agree(value: &Value, body: &[u8], [token, delegation, federation]: [Result<(), RequestError>; 3]) {
    let server = optional(value, "server_name").is_some_and(|name| name.is_none_or(is_server));
    let delay = needed(value, "delay_id").is_some_and(|id| DelayId::new(id.to_owned()).is_ok());
    let user = needed(value, "user_id")
        .filter(|id| id.len() <= 255 && id.split_once(':').is_some_and(|(local, _)| local.starts_with('@')));
    let member = member(value);
    let membership = needed(value, "url").is_some()
        && needed(value, "room_id").is_some_and(is_room)
        && needed(value, "slot_id").is_some()
        && member.is_some();
    assert_eq!(token.is_ok(), membership && server, "{token:?}");
    assert_eq!(delegation.is_ok(), membership && delay, "{delegation:?}");
    assert_eq!(federation.is_ok(), membership && user.is_some(), "{federation:?}");

    if let Ok(request) = TokenRequest::decode(body) {
        let name = request.server_name.as_ref().map(ServerName::as_str);
        assert_eq!(Some(name), optional(value, "server_name"));
        let sent = request.membership.federation_body(USER);
        for name in ["url", "room_id", "slot_id"] {
            assert_eq!(sent[name], value[name], "{name}");
        }
        let id = sent.get("member_id").or_else(|| sent.pointer("/member/id"));
        let device = sent.pointer("/member/claimed_device_id");
        let sent = id.and_then(Value::as_str).map(|id| (id, device.and_then(Value::as_str)));
        assert_eq!(sent, member);
    }
    if let Ok(request) = DelegationRequest::decode(body) {
        assert_eq!(request.delay_id.as_str(), value["delay_id"]);
    }
    if let Ok(request) = FederationTokenRequest::decode(body) {
        assert_eq!(Some(&*request.user_id), user);
    }
    for error in [token, delegation, federation].into_iter().filter_map(Result::err) {
        match error {
            RequestError::NotJson => panic!("it is JSON"),
            RequestError::BadJson => {
                let mut members = value.as_object().into_iter().chain(value["member"].as_object()).flatten();
                let wrong = |(name, value): (&String, &Value)| {
                    !value.is_null() && if name == "member" { !value.is_object() } else { !value.is_string() }
                };
                assert!(members.any(wrong), "all types are right");
            }
            RequestError::Missing(name) => {
                let absent = |value: &Value| value[name].is_null() || value[name] == "";
                assert!(absent(value) || absent(&value["member"]), "{name} is there");
            }
            RequestError::Invalid(sentence) => {
                let name = sentence.split(' ').next().unwrap_or_default();
                assert!(needed(value, name).is_some(), "{sentence:?}: it is not there");
            }
        }
    }
}

/// The ID and the device of the member.
fn member(value: &Value) -> Option<(&str, Option<&str>)> {
    let object = value.get("member").filter(|member| !member.is_null());
    match optional(value, "member_id")? {
        Some(id) => object.is_none_or(Value::is_object).then_some((id, None)),
        None => {
            let object = object.filter(|member| member.is_object())?;
            Some((needed(object, "id")?, optional(object, "claimed_device_id")?))
        }
    }
}

fn is_room(id: &str) -> bool {
    id.len() <= 255 && id.starts_with('!') && !id.chars().any(|c| c.is_control())
}

fn is_server(name: &str) -> bool {
    name.parse::<ServerName>().is_ok()
}

fn needed<'a>(value: &'a Value, name: &str) -> Option<&'a str> {
    optional(value, name)?
}

/// `None` if it can be no member of a request.
fn optional<'a>(value: &'a Value, name: &str) -> Option<Option<&'a str>> {
    match &value[name] {
        Value::Null => Some(None),
        Value::String(text) if !text.is_empty() => Some(Some(text)),
        _ => None,
    }
}
