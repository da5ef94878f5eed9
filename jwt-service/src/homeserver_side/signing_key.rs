//! Our homeserver's signing key, and requests signed with it (server-server API, §Request Authentication).

use std::{fmt, str::FromStr, sync::Arc};

use base64::{
    Engine as _, alphabet,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use hyper::{Request, header::HeaderValue};
use ruma_common::ServerName as RumaServerName;
use ruma_federation_api::authentication::{XMatrix, XMatrixSigningInput};
use ruma_signatures::Ed25519KeyPair;
use zeroize::Zeroizing;

use crate::openid::ServerName;

/// A PKCS#8 document is this and the 32 bytes of the seed (RFC 8410, §7): the one form that the signing library
/// reads.
const PKCS8_PREFIX: [u8; 16] =
    [0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20];
const SEED: usize = 32;

/// As lenient as Synapse's reader: with or without padding, and with whatever is left over in the last letter,
/// as in the key of the specification's examples.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new()
        .with_decode_padding_mode(DecodePaddingMode::Indifferent)
        .with_decode_allow_trailing_bits(true),
);

/// A homeserver's Ed25519 signing key. Its secret half is not printed, and wiped when the last clone is dropped.
#[derive(Clone)]
pub struct SigningKey(Arc<Ed25519KeyPair>);

impl SigningKey {
    /// The `Authorization` header for `request`, sent by `origin` to `destination`; `None` if one of the names
    /// or the body cannot be signed.
    pub(super) fn authorization<T: AsRef<[u8]>>(
        &self,
        request: &Request<T>,
        origin: &ServerName,
        destination: &ServerName,
    ) -> Option<HeaderValue> {
        let name = |name: &ServerName| RumaServerName::parse(name.as_str()).ok();
        let input = XMatrixSigningInput::new(name(origin)?, name(destination)?, &self.0);
        let signed = XMatrix::sign_http_request(request, input).ok()?;
        HeaderValue::from_str(&signed.to_string()).ok()
    }
}

impl FromStr for SigningKey {
    type Err = BadSigningKey;

    /// Reads the content of Synapse's signing key file: `ed25519 a_key base64seed`. Of several lines the first
    /// counts, as with Synapse.
    fn from_str(text: &str) -> Result<Self, BadSigningKey> {
        let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
        let mut words = lines.next().ok_or(BadSigningKey::Form)?.split_ascii_whitespace();
        let (Some(algorithm), Some(version), Some(seed), None) =
            (words.next(), words.next(), words.next(), words.next())
        else {
            return Err(BadSigningKey::Form);
        };
        if algorithm != "ed25519" {
            return Err(BadSigningKey::Algorithm);
        }
        // The grammar of key versions; anything else could not stand in a header.
        if !version.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') {
            return Err(BadSigningKey::Form);
        }
        let seed = Zeroizing::new(BASE64.decode(seed).map_err(|_| BadSigningKey::Seed)?);
        if seed.len() != SEED {
            return Err(BadSigningKey::Seed);
        }
        let document = Zeroizing::new([&PKCS8_PREFIX[..], &seed].concat());
        let pair =
            Ed25519KeyPair::from_der(&document, version.to_owned()).map_err(|_| BadSigningKey::Seed)?;
        Ok(Self(Arc::new(pair)))
    }
}

impl fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SigningKey(ed25519:{}, [redacted])", self.0.version())
    }
}

/// The text is no signing key. It is not quoted: it is a secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BadSigningKey {
    /// Not the three words.
    #[error("the first line is not `ed25519 VERSION BASE64`")]
    Form,
    /// Another kind of key.
    #[error("the key is not an ed25519 key")]
    Algorithm,
    /// The third word is not a seed.
    #[error("the third word is not 32 bytes in base64")]
    Seed,
}

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod properties;

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use proptest::prelude::*;

    use super::*;

    /// The key of the examples in the Matrix specification (appendices, §Cryptographic Test Vectors).
    const SPEC: &str = "ed25519 1 YJDBA9Xnr2sVqXD9Vj7XVUnmFZcZrlw8Md7kMW+3XA1";

    #[test]
    fn the_specifications_vectors_come_out() {
        use ruma_signatures::sign_json;
        let key: SigningKey = SPEC.parse().unwrap();
        for (json, signature) in [
            ("{}", "K8280/U9SSy9IVtjBuVeLr+HpOB4BQFWbg+UZaADMtTdGYI7Geitb76LTrr5QV/7Xg4ahLwYGYZzuHGZKM5ZAQ"),
            (
                r#"{"one":1,"two":"Two"}"#,
                "KqmLSbO39/Bzb0QIYE82zqLwsA+PDzYIpIRA2sRQ4sL53+sN6/fpNSoqE7BP7vBZhG6kYdD13EIMJpvhJI+6Bw",
            ),
        ] {
            let mut object = serde_json::from_str(json).unwrap();
            sign_json("domain", &*key.0, &mut object).unwrap();
            let signed = serde_json::to_value(&object).unwrap();
            assert_eq!(signed["signatures"]["domain"]["ed25519:1"], signature, "{json}");
        }
    }

    #[test]
    fn a_request_is_signed_with_its_method_uri_content_origin_and_destination() {
        let key: SigningKey = SPEC.parse().unwrap();
        let request = Request::post("/_matrix/x").body(Bytes::from_static(b"{\"a\":1}")).unwrap();
        let header = key
            .authorization(&request, &"one.org".parse().unwrap(), &"two.org:8448".parse().unwrap())
            .unwrap();
        let text = header.to_str().unwrap();
        assert!(
            text.starts_with("X-Matrix destination=\"two.org:8448\",key=\"ed25519:1\",origin=one.org,sig="),
            "{text}"
        );
        let request = Request::post("/_matrix/x").body(Bytes::from_static(b"no json")).unwrap();
        let (one, two) = ("one.org".parse().unwrap(), "two.org".parse().unwrap());
        assert_eq!(key.authorization(&request, &one, &two), None);
    }

    #[test]
    fn the_first_line_counts_and_padding_does_not() {
        for text in [
            format!("{SPEC}\n"),
            format!("\n# made by hand\n {SPEC} \r\n"),
            format!("{SPEC}=\n"),
            format!("{SPEC}\ned25519 2 {}\n", "A".repeat(43)),
        ] {
            let key: SigningKey = text.parse().unwrap();
            assert_eq!(key.0.version(), "1", "{text}");
        }
    }

    #[test]
    fn other_texts_are_refused() {
        let seed = "A".repeat(43);
        for (text, error) in [
            (String::new(), BadSigningKey::Form),
            ("ed25519 1".to_owned(), BadSigningKey::Form),
            (format!("ed25519 a:b {seed}"), BadSigningKey::Form),
            (format!("ed25519 1 {seed} x"), BadSigningKey::Form),
            (format!("curve25519 1 {seed}"), BadSigningKey::Algorithm),
            ("ed25519 1 AAAA".to_owned(), BadSigningKey::Seed),
            ("ed25519 1 !".to_owned(), BadSigningKey::Seed),
        ] {
            assert_eq!(text.parse::<SigningKey>().err(), Some(error), "{text}");
        }
    }

    #[test]
    fn the_secret_is_not_printed() {
        let key: SigningKey = SPEC.parse().unwrap();
        assert_eq!(format!("{key:?}"), "SigningKey(ed25519:1, [redacted])");
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in "\\PC{0,80}", words in "(ed25519 )?[a-z_0-9]{0,4} [A-Za-z0-9+/=]{0,50}") {
            let _ = text.parse::<SigningKey>();
            let _ = words.parse::<SigningKey>();
        }
    }
}
