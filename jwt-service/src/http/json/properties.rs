//! What must hold for any request body.

use serde_json::{Map, Value};

use super::{
    super::{
        admit::{check_delay, job_params},
        get_token,
    },
    Body, GET_TOKEN, Member, NotJson, OpenIdToken, SFU_GET,
};
use crate::{
    delegation::JobKey,
    fuzzing::first_value,
    identity::{LEGACY_SLOT, ParticipantIdentity, RoomAlias},
};

/// The body, as each endpoint decodes it.
pub(crate) fn request_body(data: &[u8]) {
    for known in [GET_TOKEN, SFU_GET] {
        let decoded = Body::decode(data, known);
        if let Some(expected) = first_value(data).and_then(|value| read(value, known)) {
            assert_eq!(decoded, expected, "another reading of it");
        }
        let Ok(body) = decoded else { continue };
        let texts = [
            &body.room,
            &body.room_id,
            &body.slot_id,
            &body.device_id,
            &body.delay_id,
            &body.openid_token.matrix_server_name,
            &body.member.id,
            &body.member.claimed_user_id,
            &body.member.claimed_device_id,
        ];
        let length: usize = texts.iter().map(|text| text.len()).sum();
        assert!(length + body.openid_token.access_token.expose().len() <= data.len());
        let followed = [data, b" }{"].concat();
        assert_eq!(Body::decode(&followed, known).as_ref(), Ok(&body), "only the first value counts");
        assert!(format!("{:?}", body.openid_token).starts_with("OpenIdToken { access_token: [redacted],"));
        job(&body, known);
    }
}

/// What is made of a body that passes the checks.
fn job(body: &Body, known: &[&str]) {
    let key = if known == SFU_GET {
        let Some(identity) = ParticipantIdentity::legacy("@a:hs", &body.device_id) else { return };
        JobKey { room: RoomAlias::of_slot(&body.room, LEGACY_SLOT), identity }
    } else {
        if get_token::check(body).is_ok() {
            assert!(![&body.room_id, &body.slot_id, &body.member.id].iter().any(|text| text.is_empty()));
            assert!(!body.openid_token.access_token.is_empty());
        }
        let member = &body.member;
        let identity = ParticipantIdentity::of_member("@a:hs", &member.claimed_device_id, &member.id);
        JobKey { room: RoomAlias::of_slot(&body.room_id, &body.slot_id), identity }
    };
    assert_eq!(key.room.as_str().len(), 43, "SHA-256 in base64 without padding");
    if let Ok(job) = job_params(body, key)
        && check_delay(body).is_ok()
    {
        assert_eq!(job.server.as_str(), body.openid_token.matrix_server_name);
        assert_eq!(job.delay_id.as_str(), body.delay_id);
        assert!(body.delay_timeout > 0);
        assert_eq!(job.delay_timeout.as_millis(), body.delay_timeout.unsigned_abs().into());
    }
}

/// The same by way of `Value`; `None` if the names of two members differ in nothing but case, or if a number may be
/// `-0` or `-0.0`, which are one `Value`.
fn read(value: Value, known: &[&str]) -> Option<Result<Body, NotJson>> {
    let mut top = lower_case(value)?;
    let (token, member) = (take(&mut top, "openid_token")?, take(&mut top, "member")?);
    let numbers = [(&top, "delay_timeout"), (&token, "expires_in")];
    if numbers
        .iter()
        .any(|(object, name)| object.as_ref().is_ok_and(|object| is_minus_zero(object.get(*name))))
    {
        return None;
    }
    Some((|| {
        let (top, token, member) = (top?, token?, member?);
        if !top.keys().all(|name| known.contains(&name.as_str())) {
            return Err(NotJson);
        }
        integer(&token, "expires_in")?;
        text(&token, "token_type")?;
        text(&top, "delay_cs_api_url")?;
        Ok(Body {
            room: text(&top, "room")?,
            room_id: text(&top, "room_id")?,
            slot_id: text(&top, "slot_id")?,
            device_id: text(&top, "device_id")?,
            openid_token: OpenIdToken {
                access_token: text(&token, "access_token")?.into(),
                matrix_server_name: text(&token, "matrix_server_name")?,
            },
            member: Member {
                id: text(&member, "id")?,
                claimed_user_id: text(&member, "claimed_user_id")?,
                claimed_device_id: text(&member, "claimed_device_id")?,
            },
            delay_id: text(&top, "delay_id")?,
            delay_timeout: integer(&top, "delay_timeout")?,
        })
    })())
}

type Object = Result<Map<String, Value>, NotJson>;

fn lower_case(value: Value) -> Option<Object> {
    let object = match value {
        Value::Object(object) => object,
        Value::Null => Map::new(),
        _ => return Some(Err(NotJson)),
    };
    let names = object.len();
    let lower: Map<_, _> = object.into_iter().map(|(name, v)| (name.to_ascii_lowercase(), v)).collect();
    (lower.len() == names).then_some(Ok(lower))
}

/// The object that is member `name`, which stays there as `null`.
fn take(object: &mut Object, name: &str) -> Option<Object> {
    match object.as_mut().ok().and_then(|object| object.get_mut(name)) {
        Some(value) => lower_case(value.take()),
        None => Some(Ok(Map::new())),
    }
}

fn text(object: &Map<String, Value>, name: &str) -> Result<String, NotJson> {
    match object.get(name) {
        None | Some(Value::Null) => Ok(String::new()),
        Some(Value::String(text)) => Ok(text.clone()),
        Some(_) => Err(NotJson),
    }
}

fn integer(object: &Map<String, Value>, name: &str) -> Result<i64, NotJson> {
    match object.get(name) {
        None | Some(Value::Null) => Ok(0),
        Some(value) => value.as_i64().ok_or(NotJson),
    }
}

fn is_minus_zero(value: Option<&Value>) -> bool {
    value.and_then(Value::as_f64).is_some_and(|number| number == 0.0 && number.is_sign_negative())
}
