//! What must hold for any webhook.

use std::time::SystemTime;

use axum::http::{HeaderMap, HeaderValue, header::AUTHORIZATION};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use livekit_protocol::WebhookEvent;
use serde_json::Value;
use sha2::{Digest as _, Sha256};

use super::{LEEWAY, event, token, verify};
use crate::{
    delegation::{Input, JobKey, Leave},
    fuzzing::line,
    identity::{ParticipantIdentity, RoomAlias},
    secret::Secret,
};

const KEY: &str = "key";
const SECRET: &str = "a secret that is in no input";

/// The first line is the `Authorization` header or the claims that LiveKit signs; then comes the body. The claim
/// `"sha256":"body"` stands for the body's digest, which no fuzzer guesses.
pub(crate) fn webhook(data: &[u8]) {
    let (head, body) = line(data);
    unsigned_is_refused(head, body);
    if let Ok(claims @ Value::Object(_)) = serde_json::from_slice(head) {
        signed_is_good_while_its_claims_are(claims, body);
    }
    read_as_livekit_reads_it(body);
}

fn check(token: &str, secret: &str, digest: &[u8; 32]) -> Option<u64> {
    verify(token, KEY, &Secret::new(secret), digest).ok()
}

fn carried(header: &[u8]) -> Option<Secret> {
    let value = HeaderValue::from_bytes(header).ok()?;
    token(&HeaderMap::from_iter([(AUTHORIZATION, value)]))
}

fn unsigned_is_refused(header: &[u8], body: &[u8]) {
    if let Some(token) = carried(header) {
        assert!(token.expose().len() <= header.len());
        assert_eq!(check(token.expose(), SECRET, &Sha256::digest(body).into()), None);
    }
}

fn signed_is_good_while_its_claims_are(mut claims: Value, body: &[u8]) {
    let digest: [u8; 32] = Sha256::digest(body).into();
    let right = STANDARD.encode(digest);
    if claims["sha256"] == "body" {
        claims["sha256"] = right.clone().into();
    }
    let signer = EncodingKey::from_secret(SECRET.as_bytes());
    let Ok(token) = jsonwebtoken::encode(&Header::new(Algorithm::HS256), &claims, &signer) else { return };
    let verdict = check(&token, SECRET, &digest);

    #[expect(clippy::disallowed_methods, reason = "the token check reads the clock by itself")]
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
    // What lies within a few seconds of a limit may be on either side of it by now.
    let (early, late) = (now - LEEWAY - 5, now + LEEWAY + 5);
    if let Some(exp) = verdict {
        assert_eq!(claims["exp"].as_u64(), Some(exp));
        assert!(exp >= early, "expired");
        assert!(claims["nbf"].as_u64().is_none_or(|from| from <= late), "not good yet");
        assert_eq!(claims["sha256"], *right, "about another body");
        assert!(
            claims["iss"] == KEY || claims["iss"].as_array().is_some_and(|all| all.contains(&KEY.into())),
            "somebody else's"
        );
    } else {
        let perfect = claims["iss"] == KEY
            && claims["sha256"] == *right
            && claims["exp"].as_u64().is_some_and(|until| (late..1 << 50).contains(&until))
            && claims.get("nbf").is_none();
        assert!(!perfect, "LiveKit's own is refused");
    }
    assert_eq!(check(&token, "another secret", &digest), None);
    assert_eq!(check(&token, SECRET, &Sha256::digest([body, b" "].concat()).into()), None);
    for header in [token.clone(), format!("Bearer {token}"), format!("bEARER {token} ")] {
        let carried = carried(header.as_bytes());
        assert_eq!(carried.as_ref().map(Secret::expose), Some(&*token));
    }
}

fn read_as_livekit_reads_it(body: &[u8]) {
    let ours = event(body);
    if let Some(Some((key, _))) = &ours {
        assert!(!key.room.as_str().is_empty() && !key.identity.as_str().is_empty());
    }
    // What LiveKit does not know it skips unread, text that is none included.
    if serde_json::from_slice::<Value>(body).is_ok()
        && let Ok(theirs) = serde_json::from_slice::<WebhookEvent>(body)
    {
        assert_eq!(ours, meaning(theirs));
    }
}

fn meaning(webhook: WebhookEvent) -> Option<Option<(JobKey, Input)>> {
    if !["participant_joined", "participant_left", "participant_connection_aborted"]
        .contains(&&*webhook.event)
    {
        return Some(None);
    }
    let (room, participant) = (webhook.room?.name, webhook.participant?);
    if room.is_empty() || participant.identity.is_empty() {
        return None;
    }
    let why = match participant.disconnect_reason {
        1 => Leave::OnPurpose,
        2 | 8 => Leave::TakenOver,
        _ => Leave::Otherwise,
    };
    let sid = (!participant.sid.is_empty()).then_some(participant.sid);
    let input =
        if webhook.event == "participant_joined" { Input::Joined { sid } } else { Input::Left { sid, why } };
    let identity = ParticipantIdentity::from_sfu(participant.identity);
    Some(Some((JobKey { room: RoomAlias::from_sfu(room), identity }, input)))
}
