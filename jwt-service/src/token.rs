//! LiveKit access tokens: HS256 JSON web tokens whose `video` claim is the grant.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use jsonwebtoken::{EncodingKey, Header};
use serde::Serialize;
use zeroize::Zeroize as _;

use crate::{
    identity::{ParticipantIdentity, RoomAlias},
    secret::Secret,
};

/// How long the token with which we call the SFU's API is valid.
pub(crate) const API_TOKEN_LIFETIME: Duration = Duration::from_hours(6);

/// Signs tokens with the SFU's API key and secret.
#[derive(Clone, Debug)]
pub struct TokenSigner {
    key: String,
    secret: Secret,
}

impl TokenSigner {
    /// A signer for the API key `key` and its secret.
    ///
    /// # Errors
    /// [`TokenError::NoKey`] if either is empty: an SFU would refuse every token.
    pub fn new(key: impl Into<String>, secret: Secret) -> Result<Self, TokenError> {
        let key = key.into();
        if key.is_empty() || secret.is_empty() { Err(TokenError::NoKey) } else { Ok(Self { key, secret }) }
    }

    /// The token with which a client joins `alias` as `identity`, valid from `now` for `lifetime`.
    ///
    /// It carries the right to join, publish, subscribe and change its own metadata, and nothing else: no
    /// room creation, no administration, and no audience, which some verifiers would refuse.
    ///
    /// # Errors
    /// [`TokenError::Sign`] if the signature cannot be made.
    pub fn join(
        &self,
        identity: &ParticipantIdentity,
        alias: &RoomAlias,
        now: SystemTime,
        lifetime: Duration,
    ) -> Result<String, TokenError> {
        let video = VideoGrant {
            room: Some(alias.as_str()),
            room_join: true,
            can_publish: Some(true),
            can_subscribe: true,
            can_update_own_metadata: true,
            ..VideoGrant::default()
        };
        self.sign(Some(identity.as_str()), video, now, lifetime)
    }

    /// The same for a client that may only watch and listen: no media, no data, no metadata of its own.
    ///
    /// # Errors
    /// [`TokenError::Sign`] if the signature cannot be made.
    pub fn listen(
        &self,
        identity: &ParticipantIdentity,
        alias: &RoomAlias,
        now: SystemTime,
        lifetime: Duration,
    ) -> Result<String, TokenError> {
        let video = VideoGrant {
            room: Some(alias.as_str()),
            room_join: true,
            // Written out: LiveKit takes what is absent for permitted.
            can_publish: Some(false),
            can_publish_data: Some(false),
            can_subscribe: true,
            ..VideoGrant::default()
        };
        self.sign(Some(identity.as_str()), video, now, lifetime)
    }

    /// The token that a homeserver gives (MSC4195, §Access token properties): without the right to change one's
    /// own metadata, which no client needs.
    ///
    /// # Errors
    /// [`TokenError::Sign`] if the signature cannot be made.
    pub(crate) fn join_from_homeserver(
        &self,
        identity: &ParticipantIdentity,
        alias: &RoomAlias,
        now: SystemTime,
        lifetime: Duration,
    ) -> Result<String, TokenError> {
        let video = VideoGrant {
            room: Some(alias.as_str()),
            room_join: true,
            can_publish: Some(true),
            can_subscribe: true,
            ..VideoGrant::default()
        };
        self.sign(Some(identity.as_str()), video, now, lifetime)
    }

    /// The token with which this service asks the SFU to create rooms, valid for six hours from `now`.
    ///
    /// # Errors
    /// [`TokenError::Sign`] if the signature cannot be made.
    pub fn create_rooms(&self, now: SystemTime) -> Result<String, TokenError> {
        let video = VideoGrant { room_create: true, ..VideoGrant::default() };
        self.sign(None, video, now, API_TOKEN_LIFETIME)
    }

    /// The token with which this service asks the SFU about the participants of `room`, valid for six hours
    /// from `now`.
    ///
    /// # Errors
    /// [`TokenError::Sign`] if the signature cannot be made.
    pub fn administer(&self, room: &str, now: SystemTime) -> Result<String, TokenError> {
        let video = VideoGrant { room: Some(room), room_admin: true, ..VideoGrant::default() };
        self.sign(None, video, now, API_TOKEN_LIFETIME)
    }

    fn sign(
        &self,
        identity: Option<&str>,
        video: VideoGrant<'_>,
        now: SystemTime,
        lifetime: Duration,
    ) -> Result<String, TokenError> {
        let issued = now.duration_since(UNIX_EPOCH).map_err(|_| TokenError::ClockBeforeEpoch)?.as_secs();
        let claims = Claims {
            iss: &self.key,
            sub: identity,
            identity,
            iat: issued,
            nbf: issued,
            exp: issued.saturating_add(lifetime.as_secs()),
            video,
        };
        let mut key = EncodingKey::from_secret(self.secret.expose().as_bytes());
        let signed = jsonwebtoken::encode(&Header::default(), &claims, &key);
        key.zeroize();
        Ok(signed?)
    }
}

/// Why a token could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TokenError {
    /// The key or the secret is empty.
    #[error("our configuration: the SFU's API key and secret must not be empty")]
    NoKey,
    /// The system clock is unusable.
    #[error("our machine: the system clock stands before 1970; set it")]
    ClockBeforeEpoch,
    /// The signature failed.
    #[error("our side: signing the token failed")]
    Sign(#[from] jsonwebtoken::errors::Error),
}

#[derive(Serialize)]
struct Claims<'a> {
    iss: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    sub: Option<&'a str>,
    /// LiveKit reads `sub`; lk-jwt-service also writes this, and readers of its tokens may rely on it.
    #[serde(skip_serializing_if = "Option::is_none")]
    identity: Option<&'a str>,
    iat: u64,
    nbf: u64,
    exp: u64,
    video: VideoGrant<'a>,
}

/// LiveKit's grant. What is false or absent is left out, as LiveKit's own libraries do.
#[derive(Default, Serialize)]
#[serde(rename_all = "camelCase")]
struct VideoGrant<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    room: Option<&'a str>,
    #[serde(skip_serializing_if = "is_false")]
    room_create: bool,
    #[serde(skip_serializing_if = "is_false")]
    room_admin: bool,
    #[serde(skip_serializing_if = "is_false")]
    room_join: bool,
    /// Written out when it is false: LiveKit takes an absent one for true.
    #[serde(skip_serializing_if = "Option::is_none")]
    can_publish: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    can_publish_data: Option<bool>,
    #[serde(skip_serializing_if = "is_false")]
    can_subscribe: bool,
    #[serde(skip_serializing_if = "is_false")]
    can_update_own_metadata: bool,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it with a reference")]
fn is_false(value: &bool) -> bool {
    !value
}

#[cfg(test)]
mod tests {
    use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
    use jsonwebtoken::{Algorithm, DecodingKey, Validation};
    use serde_json::{Value, json};

    use super::*;

    fn signer() -> TokenSigner {
        TokenSigner::new("devkey", Secret::new("secret")).unwrap()
    }

    fn at(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_millis(seconds * 1000 + 999)
    }

    fn parts(token: &str) -> (Value, Value) {
        let mut parts = token.split('.').map(|p| URL_SAFE_NO_PAD.decode(p).unwrap());
        let mut json = || serde_json::from_slice(&parts.next().unwrap()).unwrap();
        (json(), json())
    }

    #[test]
    fn a_join_token_has_exactly_the_claims_of_the_reference() {
        let alias = RoomAlias::of_slot("!r:hs", "s");
        let identity = ParticipantIdentity::of_member("@a:hs", "D", "m");
        let token = signer().join(&identity, &alias, at(1_700_000_000), Duration::from_secs(3600)).unwrap();
        let (header, claims) = parts(&token);
        assert_eq!(header, json!({"alg": "HS256", "typ": "JWT"}));
        assert_eq!(
            claims,
            json!({
                "iss": "devkey", "sub": identity.as_str(), "identity": identity.as_str(),
                "iat": 1_700_000_000, "nbf": 1_700_000_000, "exp": 1_700_003_600,
                "video": {
                    "roomJoin": true, "room": alias.as_str(),
                    "canPublish": true, "canSubscribe": true, "canUpdateOwnMetadata": true,
                },
            })
        );
    }

    #[test]
    fn a_listener_is_told_what_it_may_not_do() {
        let alias = RoomAlias::of_slot("!r:hs", "s");
        let identity = ParticipantIdentity::of_member("@a:hs", "D", "m");
        let token = signer().listen(&identity, &alias, at(1_700_000_000), Duration::from_secs(60)).unwrap();
        let (_, claims) = parts(&token);
        assert_eq!(claims["sub"], identity.as_str());
        assert_eq!(
            claims["video"],
            json!({
                "roomJoin": true, "room": alias.as_str(),
                "canPublish": false, "canPublishData": false, "canSubscribe": true,
            })
        );
    }

    #[test]
    fn a_homeservers_token_does_not_let_change_metadata() {
        let alias = RoomAlias::of_slot("!r:hs", "s");
        let identity = ParticipantIdentity::of_membership("@a:hs", "m");
        let (now, lifetime) = (at(1_700_000_000), Duration::from_secs(60));
        let token = signer().join_from_homeserver(&identity, &alias, now, lifetime).unwrap();
        let (_, claims) = parts(&token);
        assert_eq!(claims["exp"], 1_700_000_060);
        assert_eq!(
            claims["video"],
            json!({ "roomJoin": true, "room": alias.as_str(), "canPublish": true, "canSubscribe": true })
        );
    }

    #[test]
    fn an_api_token_may_create_rooms_and_nothing_else() {
        let (_, claims) = parts(&signer().create_rooms(at(1_700_000_000)).unwrap());
        assert_eq!(
            claims,
            json!({
                "iss": "devkey", "iat": 1_700_000_000, "nbf": 1_700_000_000, "exp": 1_700_021_600,
                "video": {"roomCreate": true},
            })
        );
    }

    #[test]
    fn tokens_verify_with_the_secret_and_only_with_it() {
        let token = signer().create_rooms(at(1_700_000_000)).unwrap();
        let mut validation = Validation::new(Algorithm::HS256);
        validation.validate_exp = false;
        let decode = |secret: &[u8]| {
            jsonwebtoken::decode::<Value>(&token, &DecodingKey::from_secret(secret), &validation).is_ok()
        };
        assert!(decode(b"secret"));
        assert!(!decode(b"other"));
    }

    #[test]
    fn the_secret_is_not_printed() {
        assert!(!format!("{:?}", signer()).contains("secret\""));
        assert!(format!("{:?}", signer()).contains("[redacted]"));
    }

    #[test]
    fn an_empty_key_or_secret_is_refused() {
        assert!(matches!(TokenSigner::new("", Secret::new("s")), Err(TokenError::NoKey)));
        assert!(matches!(TokenSigner::new("k", Secret::new("")), Err(TokenError::NoKey)));
    }
}
