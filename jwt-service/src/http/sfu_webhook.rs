//! `POST /sfu_webhook`: what the SFU tells about participants, signed with our API key and secret.
//!
//! LiveKit repeats a webhook after a 5xx and never after a 4xx, so what is wrong with it is said plainly: 401
//! for the signature, 400 for the body, 503 while we are shutting down.
#![allow(clippy::disallowed_methods, reason = "this is the shell: it owns the clock and the tasks")]

use std::{
    collections::{HashSet, VecDeque},
    sync::{Arc, Mutex, PoisonError},
    time::SystemTime,
};

use axum::{
    extract::{Request, State},
    http::{HeaderMap, Method, StatusCode, header::AUTHORIZATION},
    response::{IntoResponse, Response},
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use jsonwebtoken::{Algorithm, DecodingKey, Validation, errors::ErrorKind};
use serde::Deserialize;
use serde_json::Value;
use sha2::{Digest as _, Sha256};

use super::{error::Refusal, intake};
use crate::{
    Inner,
    config::Limits,
    delegation::{Delegation, Input, JobKey, Leave},
    identity::{ParticipantIdentity, RoomAlias},
    secret::Secret,
};

/// The largest webhook: a room's description with all its participants' metadata is far below it.
const MAX_BODY: usize = 1024 * 1024;
/// How far the SFU's clock may be off, in seconds.
const LEEWAY: u64 = 60;
/// How many webhooks are remembered against replays. Beyond it the oldest are forgotten, whose tokens have
/// mostly expired by then.
const MAX_REPLAYS: usize = 16 * 1024;

pub(super) async fn sfu_webhook(State(service): State<Arc<Inner>>, request: Request) -> Response {
    let Some(delegation) = &service.delegation else {
        return StatusCode::NOT_FOUND.into_response();
    };
    if request.method() != Method::POST {
        return StatusCode::METHOD_NOT_ALLOWED.into_response();
    }
    match receive(&service, delegation, request).await {
        Ok(()) => StatusCode::OK.into_response(),
        Err(fault) => {
            let refusal = Refusal::from(fault);
            tracing::warn!(refusal = refusal.label(), cause = %fault, "webhook refused");
            refusal.into_response()
        }
    }
}

async fn receive(service: &Inner, delegation: &Delegation, request: Request) -> Result<(), Fault> {
    let token = token(request.headers()).ok_or(Fault::NoToken)?;
    let limits = Limits { body: MAX_BODY, ..service.settings.limits.clone() };
    let body = intake::read(request, &limits).await.map_err(Fault::Body)?;
    let digest: [u8; 32] = Sha256::digest(&body).into();
    let settings = &service.settings;
    let expiry = verify(token.expose(), &settings.key, &settings.secret, &digest)?;
    let event = event(&body).ok_or(Fault::NoEvent)?;
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let Some((key, input)) = event else { return Ok(()) };
    // A repetition brings the same token, and the token is about the body. The same body with another token is
    // something that happened again: not every SFU gives its events ids and times of their own.
    let delivery: [u8; 32] = Sha256::digest(token.expose()).into();
    if !service.replays.is_new(delivery, expiry.saturating_add(LEEWAY), now) {
        tracing::debug!("webhook received before");
        return Ok(());
    }
    if delegation.event(&key, input) {
        Ok(())
    } else {
        service.replays.forget(&delivery);
        Err(Fault::ShuttingDown)
    }
}

/// The token in the `Authorization` header: LiveKit sends it bare, others after `Bearer`.
fn token(headers: &HeaderMap) -> Option<Secret> {
    let value = headers.get(AUTHORIZATION)?.to_str().ok()?;
    let bare = match value.split_once(' ') {
        Some((scheme, token)) if scheme.eq_ignore_ascii_case("bearer") => token,
        Some(_) => return None,
        None => value,
    };
    Some(Secret::new(bare.trim()))
}

/// Why a webhook is refused, for the log: its sender is told less.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
enum Fault {
    #[error("it has no token in its Authorization header")]
    NoToken,
    #[error("its token was signed with another API key; webhook.api_key of the SFU must be our key")]
    AnotherKey,
    #[error("its token was signed with another secret; key and secret of the SFU must be ours")]
    AnotherSecret,
    #[error("its token has expired, or is not valid yet; are both clocks right?")]
    AnotherTime,
    #[error("its token is about another body")]
    AnotherBody,
    #[error("its token is no LiveKit token: HS256, with iss, exp and sha256")]
    Malformed,
    #[error("its body was not taken: {}", .0.label())]
    Body(Refusal),
    #[error("its body is no webhook of LiveKit's: an event with the names of room and participant")]
    NoEvent,
    #[error("this process is shutting down; LiveKit repeats it")]
    ShuttingDown,
}

impl From<Fault> for Refusal {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::NoToken
            | Fault::AnotherKey
            | Fault::AnotherSecret
            | Fault::AnotherTime
            | Fault::AnotherBody
            | Fault::Malformed => Self::WebhookUnauthorized,
            Fault::Body(refusal) => refusal,
            Fault::NoEvent => Self::WebhookMalformed,
            Fault::ShuttingDown => Self::ShuttingDown,
        }
    }
}

/// When the token expires, if it is ours, good at this time, and about a body with this digest.
fn verify(token: &str, key: &str, secret: &Secret, digest: &[u8; 32]) -> Result<u64, Fault> {
    #[derive(Deserialize)]
    struct Claims {
        sha256: String,
        exp: u64,
    }
    let mut validation = Validation::new(Algorithm::HS256);
    validation.leeway = LEEWAY;
    validation.validate_nbf = true;
    validation.validate_aud = false;
    validation.set_required_spec_claims(&["exp", "iss"]);
    validation.set_issuer(&[key]);
    let secret = DecodingKey::from_secret(secret.expose().as_bytes());
    let decoded = jsonwebtoken::decode::<Claims>(token, &secret, &validation);
    let claims = decoded.map_err(|error| match error.kind() {
        ErrorKind::InvalidIssuer => Fault::AnotherKey,
        ErrorKind::InvalidSignature => Fault::AnotherSecret,
        ErrorKind::ExpiredSignature | ErrorKind::ImmatureSignature => Fault::AnotherTime,
        _ => Fault::Malformed,
    })?;
    let claims = claims.claims;
    let claimed = STANDARD.decode(&claims.sha256).map_err(|_| Fault::Malformed)?;
    // In constant time; the claim is signed, so this only keeps to the letter of the specification.
    let different = claimed.iter().zip(digest).fold(0, |different, (a, b)| different | (a ^ b));
    if claimed.len() == digest.len() && different == 0 { Ok(claims.exp) } else { Err(Fault::AnotherBody) }
}

/// What a webhook's body says about a participant: `None` if it is no webhook, `Some(None)` if it is about
/// something else.
///
/// The body is protobuf's JSON: members in camel case or as in the protocol file, enums as names or numbers,
/// `null` for the default, and more members than we know.
fn event(body: &[u8]) -> Option<Option<(JobKey, Input)>> {
    let body: Value = serde_json::from_slice(body).ok()?;
    let body = body.as_object()?;
    let text = |value: Option<&Value>| match value {
        None | Some(Value::Null) => Some(String::new()),
        Some(Value::String(text)) => Some(text.clone()),
        Some(_) => None,
    };
    let kind = text(body.get("event"))?;
    if !matches!(kind.as_str(), "participant_joined" | "participant_left" | "participant_connection_aborted")
    {
        return Some(None);
    }
    let room = text(body.get("room")?.as_object()?.get("name")).filter(|name| !name.is_empty())?;
    let participant = body.get("participant")?.as_object()?;
    let identity = text(participant.get("identity")).filter(|identity| !identity.is_empty())?;
    let sid = text(participant.get("sid"))?;
    let sid = Some(sid).filter(|sid| !sid.is_empty());
    let reason = participant.get("disconnectReason").or_else(|| participant.get("disconnect_reason"));
    let input = if kind == "participant_joined" {
        Input::Joined { sid }
    } else {
        Input::Left { sid, why: why(reason) }
    };
    let key = JobKey { room: RoomAlias::from_sfu(room), identity: ParticipantIdentity::from_sfu(identity) };
    Some(Some((key, input)))
}

/// LiveKit's `DisconnectReason`, as far as it matters. Names that we do not know are the default.
fn why(reason: Option<&Value>) -> Leave {
    match reason {
        Some(Value::String(name)) => match name.as_str() {
            "CLIENT_INITIATED" => Leave::OnPurpose,
            "DUPLICATE_IDENTITY" | "MIGRATION" => Leave::TakenOver,
            _ => Leave::Otherwise,
        },
        Some(Value::Number(number)) => match number.as_u64() {
            Some(1) => Leave::OnPurpose,
            Some(2 | 8) => Leave::TakenOver,
            _ => Leave::Otherwise,
        },
        _ => Leave::Otherwise,
    }
}

/// Webhooks that were taken, by the digest of their token: ids and times of events may repeat, and so may bodies.
#[derive(Debug, Default)]
pub(crate) struct Replays(Mutex<Taken>);

#[derive(Debug, Default)]
struct Taken {
    digests: HashSet<[u8; 32]>,
    /// In order of arrival, with the second from which on the token is no good any more.
    order: VecDeque<([u8; 32], u64)>,
}

impl Replays {
    /// Whether a delivery, by the digest of its token, was not taken before; from now on it was, until `until`.
    /// Seconds since 1970.
    fn is_new(&self, digest: [u8; 32], until: u64, now: u64) -> bool {
        let mut taken = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Taken { digests, order } = &mut *taken;
        while let Some((oldest, expired)) = order.front()
            && (*expired < now || order.len() >= MAX_REPLAYS)
        {
            digests.remove(oldest);
            order.pop_front();
        }
        let new = digests.insert(digest);
        if new {
            order.push_back((digest, until));
        }
        new
    }

    /// The delivery was not taken after all.
    fn forget(&self, digest: &[u8; 32]) {
        let mut taken = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        taken.digests.remove(digest);
        taken.order.retain(|(other, _)| other != digest);
    }
}

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod properties;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn input(body: &Value) -> Option<Option<Input>> {
        event(body.to_string().as_bytes()).map(|event| event.map(|(_, input)| input))
    }

    fn left(reason: &Value) -> Option<Option<Input>> {
        input(&json!({
            "event": "participant_left", "room": {"name": "r"},
            "participant": {"identity": "i", "disconnectReason": reason},
        }))
    }

    #[test]
    fn reasons_come_as_names_or_numbers() {
        for (reason, expected) in [
            (json!("CLIENT_INITIATED"), Leave::OnPurpose),
            (json!(1), Leave::OnPurpose),
            (json!("DUPLICATE_IDENTITY"), Leave::TakenOver),
            (json!(2), Leave::TakenOver),
            (json!("MIGRATION"), Leave::TakenOver),
            (json!(8), Leave::TakenOver),
            (json!("SIGNAL_CLOSE"), Leave::Otherwise),
            (json!("SOMETHING_NEW"), Leave::Otherwise),
            (json!(99), Leave::Otherwise),
            (json!(null), Leave::Otherwise),
        ] {
            assert_eq!(left(&reason), Some(Some(Input::Left { sid: None, why: expected })), "{reason}");
        }
    }

    #[test]
    fn both_spellings_of_members_are_read_and_unknown_ones_ignored() {
        let body = json!({
            "event": "participant_connection_aborted", "id": "same", "createdAt": "0", "numDropped": 0,
            "room": {"name": "r", "sid": "RM_1", "metadata": null},
            "participant": {"identity": "i", "sid": "PA_1", "disconnect_reason": "CLIENT_INITIATED", "tracks": []},
        });
        let expected = Input::Left { sid: Some("PA_1".into()), why: Leave::OnPurpose };
        assert_eq!(input(&body), Some(Some(expected)));
        let body =
            json!({"event": "participant_joined", "room": {"name": "r"}, "participant": {"identity": "i"}});
        assert_eq!(input(&body), Some(Some(Input::Joined { sid: None })));
    }

    #[test]
    fn other_events_pass_and_broken_ones_do_not() {
        for other in [json!({"event": "room_started"}), json!({}), json!({"event": null, "room": 1})] {
            assert_eq!(input(&other), Some(None), "{other}");
        }
        for broken in [
            json!([]),
            json!("participant_left"),
            json!({"event": 1}),
            json!({"event": "participant_left"}),
            json!({"event": "participant_left", "room": {"name": "r"}}),
            json!({"event": "participant_left", "room": {"name": 1}, "participant": {"identity": "i"}}),
            json!({"event": "participant_left", "room": {"name": "r"}, "participant": {"identity": null}}),
            json!({"event": "participant_left", "participant": {"identity": "i"}}),
        ] {
            assert_eq!(input(&broken), None, "{broken}");
        }
        assert_eq!(event(b"{"), None);
    }

    #[test]
    fn replays_are_remembered_as_long_as_their_tokens_are_good() {
        let replays = Replays::default();
        let digest = |n: u8| [n; 32];
        assert!(replays.is_new(digest(1), 100, 0));
        assert!(!replays.is_new(digest(1), 100, 100));
        assert!(replays.is_new(digest(1), 300, 101), "its token is no good any more");
        replays.forget(&digest(1));
        assert!(replays.is_new(digest(1), 300, 101));
    }

    proptest! {
        #[test]
        fn no_body_or_token_makes_it_panic(body in prop::collection::vec(any::<u8>(), 0..200), text in ".{0,100}") {
            let _ = event(&body);
            let _ = event(text.as_bytes());
            let _ = verify(&text, "key", &Secret::new("secret"), &[0; 32]);
        }
    }
}
