//! Access tokens: HS256 JWTs with LiveKit's `video` grant.
//!
//! The time is an argument, so expiry is tested without a clock.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::time::Duration;

use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

/// Clocks of two machines may differ by this much.
pub const LEEWAY: Duration = Duration::from_secs(60);
/// A refreshed token lives at least this long.
pub const REFRESH_MIN_LIFE: Duration = Duration::from_secs(600);
/// Longest token that is looked at, in bytes. Metadata may take 512 KiB of it.
const MAX_TOKEN: usize = 1024 * 1024;

/// The API keys that may sign tokens, in the order of the configuration.
#[derive(Clone, Default)]
pub struct Keys {
    first: Option<String>,
    secrets: BTreeMap<String, Secret>,
}

impl Keys {
    /// No key: every token is refused.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a key; the first one added signs refreshed tokens.
    #[must_use]
    pub fn with(mut self, key: impl Into<String>, secret: Secret) -> Self {
        let key = key.into();
        self.first.get_or_insert_with(|| key.clone());
        self.secrets.insert(key, secret);
        self
    }

    /// The key that signs, with its secret.
    pub fn first(&self) -> Option<(&str, &Secret)> {
        let key = self.first.as_deref()?;
        Some((key, self.secrets.get(key)?))
    }

    /// The names of all keys, with their secrets.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Secret)> {
        self.secrets.iter().map(|(key, secret)| (key.as_str(), secret))
    }

    /// Checks a token's signature and dates. `now` is the time since the Unix epoch.
    pub fn verify(&self, token: &str, now: Duration) -> Result<Claims, TokenError> {
        if token.len() > MAX_TOKEN {
            return Err(TokenError::TooLong);
        }
        let header = jsonwebtoken::decode_header(token).map_err(|_| TokenError::Malformed)?;
        if header.alg != Algorithm::HS256 {
            return Err(TokenError::Algorithm);
        }
        // The issuer selects the secret, so it is read before the signature is checked and believed only after.
        let unverified: Issuer = {
            let payload = token.split('.').nth(1).ok_or(TokenError::Malformed)?;
            let payload = base64::Engine::decode(&base64::engine::general_purpose::URL_SAFE_NO_PAD, payload)
                .map_err(|_| TokenError::Malformed)?;
            serde_json::from_slice(&payload).map_err(|_| TokenError::Malformed)?
        };
        let secret = self.secrets.get(&unverified.iss).ok_or(TokenError::UnknownKey)?;

        let mut validation = Validation::new(Algorithm::HS256);
        // The dates are checked below, against the time we are given.
        validation.validate_exp = false;
        validation.validate_nbf = false;
        validation.validate_aud = false;
        validation.required_spec_claims.clear();
        let key = DecodingKey::from_secret(secret.expose().as_bytes());
        let claims = jsonwebtoken::decode::<Claims>(token, &key, &validation)
            .map_err(|error| match error.kind() {
                jsonwebtoken::errors::ErrorKind::InvalidSignature => TokenError::Signature,
                _ => TokenError::Malformed,
            })?
            .claims;

        let now = now.as_secs();
        let leeway = LEEWAY.as_secs();
        let exp = claims.exp.ok_or(TokenError::NoExpiry)?;
        if exp.saturating_add(leeway) < now {
            return Err(TokenError::Expired);
        }
        if claims.nbf.unwrap_or(0) > now.saturating_add(leeway)
            || claims.iat.unwrap_or(0) > now.saturating_add(leeway)
        {
            return Err(TokenError::NotYetValid);
        }
        Ok(claims)
    }

    /// Signs claims with the first key; `None` if there is no key.
    pub fn sign(&self, claims: &Claims) -> Option<String> {
        let (key, secret) = self.first()?;
        let claims = Claims { iss: key.to_owned(), ..claims.clone() };
        let key = EncodingKey::from_secret(secret.expose().as_bytes());
        jsonwebtoken::encode(&Header::new(Algorithm::HS256), &claims, &key).ok()
    }
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.secrets.iter()).finish()
    }
}

/// An API secret: printed redacted, wiped when dropped.
#[derive(Clone)]
pub struct Secret(Zeroizing<String>);

impl Secret {
    /// Takes a secret over.
    pub fn new(secret: impl Into<String>) -> Self {
        Self(Zeroizing::new(secret.into()))
    }

    /// The secret itself.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl PartialEq for Secret {
    fn eq(&self, other: &Self) -> bool {
        self.expose() == other.expose()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("<redacted>")
    }
}

#[derive(Deserialize)]
struct Issuer {
    iss: String,
}

/// What a token says.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
#[non_exhaustive]
pub struct Claims {
    /// The API key that signed it.
    pub iss: String,
    /// The participant's identity.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub sub: String,
    /// Fallback for [`sub`](Self::sub).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub jti: Option<String>,
    /// End of validity, in seconds since the Unix epoch; obligatory.
    pub exp: Option<u64>,
    /// Begin of validity, in seconds since the Unix epoch.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nbf: Option<u64>,
    /// When it was made, in seconds since the Unix epoch.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iat: Option<u64>,
    /// Display name.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub name: String,
    /// `standard`, `agent`, …
    #[serde(skip_serializing_if = "String::is_empty")]
    pub kind: String,
    /// Application data.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub metadata: String,
    /// Application data by key.
    #[serde(skip_serializing_if = "HashMap::is_empty")]
    pub attributes: HashMap<String, String>,
    /// What the bearer may do.
    pub video: VideoGrant,
}

impl Claims {
    /// The identity: `sub`, else `jti`; empty if there is neither.
    pub fn identity(&self) -> &str {
        if self.sub.is_empty() { self.jti.as_deref().unwrap_or_default() } else { &self.sub }
    }
}

/// The `video` claim.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
#[non_exhaustive]
pub struct VideoGrant {
    /// The room that the other grants are about.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub room: String,
    /// May join [`room`](Self::room).
    #[serde(skip_serializing_if = "is_false")]
    pub room_join: bool,
    /// May create and delete rooms.
    #[serde(skip_serializing_if = "is_false")]
    pub room_create: bool,
    /// May list rooms.
    #[serde(skip_serializing_if = "is_false")]
    pub room_list: bool,
    /// May manage [`room`](Self::room).
    #[serde(skip_serializing_if = "is_false")]
    pub room_admin: bool,
    /// May publish; true when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub can_publish: Option<bool>,
    /// May subscribe; true when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub can_subscribe: Option<bool>,
    /// May send data; as `can_publish` when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub can_publish_data: Option<bool>,
    /// `camera`, `microphone`, `screen_share`, `screen_share_audio`; all when empty.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub can_publish_sources: Vec<String>,
    /// May change its own name, metadata and attributes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub can_update_own_metadata: Option<bool>,
    /// Sees everybody and is not seen.
    #[serde(skip_serializing_if = "is_false")]
    pub hidden: bool,
    /// Records.
    #[serde(skip_serializing_if = "is_false")]
    pub recorder: bool,
    /// Is an agent.
    #[serde(skip_serializing_if = "is_false")]
    pub agent: bool,
}

/// Serde wants a function that takes a reference.
#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde's skip_serializing_if passes a reference")]
fn is_false(value: &bool) -> bool {
    !*value
}

/// Why a token was refused. The text goes to the client: it names no key and no secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TokenError {
    /// It is not a JWT, or its claims have the wrong types.
    #[error("the access token is malformed; ask the authorisation service for a new one")]
    Malformed,
    /// It is longer than any token of ours.
    #[error("the access token is too long")]
    TooLong,
    /// Only HS256 is accepted; `none` above all is not.
    #[error("the access token is not signed with HS256")]
    Algorithm,
    /// Its issuer is not one of our API keys.
    #[error("the access token was issued with an API key that this server does not know")]
    UnknownKey,
    /// The signature does not fit the key.
    #[error("the access token's signature is wrong; check that the API secret is the same on both sides")]
    Signature,
    /// `exp` is missing.
    #[error("the access token has no expiry")]
    NoExpiry,
    /// It has expired.
    #[error("the access token has expired; ask the authorisation service for a new one")]
    Expired,
    /// `nbf` or `iat` lies in the future.
    #[error("the access token is not valid yet; check the clocks of both servers")]
    NotYetValid,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NOW: Duration = Duration::from_secs(1_800_000_000);

    fn keys() -> Keys {
        Keys::new().with("devkey", Secret::new("secret"))
    }

    fn claims() -> Claims {
        Claims {
            sub: "alice".into(),
            exp: Some(NOW.as_secs() + 3600),
            video: VideoGrant { room: "r".into(), room_join: true, ..VideoGrant::default() },
            ..Claims::default()
        }
    }

    #[test]
    fn what_is_signed_is_verified() {
        let token = keys().sign(&claims()).unwrap();
        let read = keys().verify(&token, NOW).unwrap();
        assert_eq!(read.iss, "devkey");
        assert_eq!(read.identity(), "alice");
        assert_eq!(read.video.room, "r");
        assert_eq!(read.video.can_publish, None);
    }

    #[test]
    fn the_dates_are_checked_with_a_minute_of_leeway() {
        let token = keys().sign(&claims()).unwrap();
        assert!(keys().verify(&token, NOW + Duration::from_secs(3660)).is_ok());
        assert_eq!(keys().verify(&token, NOW + Duration::from_secs(3661)), Err(TokenError::Expired));
        let early = keys().sign(&Claims { nbf: Some(NOW.as_secs() + 61), ..claims() }).unwrap();
        assert_eq!(keys().verify(&early, NOW), Err(TokenError::NotYetValid));
        let timeless = keys().sign(&Claims { exp: None, ..claims() }).unwrap();
        assert_eq!(keys().verify(&timeless, NOW), Err(TokenError::NoExpiry));
    }

    #[test]
    fn foreign_keys_and_signatures_are_refused() {
        let foreign = Keys::new().with("other", Secret::new("secret")).sign(&claims()).unwrap();
        assert_eq!(keys().verify(&foreign, NOW), Err(TokenError::UnknownKey));
        let forged = Keys::new().with("devkey", Secret::new("guess")).sign(&claims()).unwrap();
        assert_eq!(keys().verify(&forged, NOW), Err(TokenError::Signature));
    }

    #[test]
    fn only_hs256_is_accepted() {
        use base64::Engine as _;
        let engine = base64::engine::general_purpose::URL_SAFE_NO_PAD;
        let payload = engine.encode(serde_json::to_vec(&claims()).unwrap());
        let none = format!("{}.{payload}.", engine.encode(br#"{"alg":"none","typ":"JWT"}"#));
        assert!(keys().verify(&none, NOW).is_err());
        let hs512 = jsonwebtoken::encode(
            &Header::new(Algorithm::HS512),
            &Claims { iss: "devkey".into(), ..claims() },
            &EncodingKey::from_secret(b"secret"),
        )
        .unwrap();
        assert_eq!(keys().verify(&hs512, NOW), Err(TokenError::Algorithm));
    }

    #[test]
    fn secrets_are_not_printed() {
        let printed = format!("{:?}", Keys::new().with("devkey", Secret::new("correct horse")));
        assert!(printed.contains("devkey") && !printed.contains("correct horse"), "{printed}");
    }

    proptest! {
        #[test]
        fn verifying_never_panics(text in ".{0,300}") {
            prop_assert!(keys().verify(&text, NOW).is_err());
        }

        #[test]
        fn verifying_never_panics_on_something_like_a_token(header in "[ -~]{0,40}", payload in "[ -~]{0,80}") {
            use base64::Engine as _;
            let engine = base64::engine::general_purpose::URL_SAFE_NO_PAD;
            let token = format!("{}.{}.AAAA", engine.encode(header), engine.encode(payload));
            prop_assert!(keys().verify(&token, NOW).is_err());
        }
    }
}
