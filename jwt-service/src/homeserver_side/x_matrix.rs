//! Requests of other servers: their `X-Matrix` credentials, and whether these are true (server-server API,
//! §Request Authentication).

use hyper::{HeaderMap, Request, header::AUTHORIZATION};
use ruma_common::ServerName as RumaServerName;
use ruma_federation_api::authentication::XMatrix;

use super::server_keys::PublishedKeys;
use crate::openid::ServerName;

/// The longest header that is parsed: two names of 255 bytes, a key and a signature of 86.
const MAX_HEADER: usize = 4096;
/// Signatures that are looked at: a server sends one for each of its keys.
const MAX_SIGNATURES: usize = 4;

/// Who a request says it is from. Nothing of it is true before [`Credentials::verify`].
#[derive(Clone, Debug)]
pub(crate) struct Credentials {
    origin: ServerName,
    signatures: Vec<XMatrix>,
}

impl Credentials {
    /// The credentials in `headers`, if they are meant for the server `us`.
    pub(crate) fn read(headers: &HeaderMap, us: &ServerName) -> Result<Self, CredentialsError> {
        let mut signatures = Vec::new();
        let mut origin: Option<ServerName> = None;
        for value in headers.get_all(AUTHORIZATION) {
            if signatures.len() == MAX_SIGNATURES || value.len() > MAX_HEADER {
                return Err(CredentialsError::TooMuch);
            }
            let text = value.to_str().map_err(|_| CredentialsError::Malformed)?;
            let signature = XMatrix::parse(text).map_err(|_| CredentialsError::Malformed)?;
            // Servers before Matrix 1.3 name no destination; their signature covers it all the same.
            if signature.destination.as_ref().is_some_and(|name| name.as_str() != us.as_str()) {
                return Err(CredentialsError::ForAnother);
            }
            let from: ServerName =
                signature.origin.as_str().parse().map_err(|_| CredentialsError::Malformed)?;
            if origin.as_ref().is_some_and(|origin| *origin != from) {
                return Err(CredentialsError::Malformed);
            }
            origin = Some(from);
            signatures.push(signature);
        }
        let origin = origin.ok_or(CredentialsError::Missing)?;
        if origin == *us {
            return Err(CredentialsError::FromUs);
        }
        Ok(Self { origin, signatures })
    }

    /// The server that the request says it is from.
    pub(crate) fn origin(&self) -> &ServerName {
        &self.origin
    }

    /// The keys with which it says it is signed.
    pub(crate) fn key_ids(&self) -> impl Iterator<Item = &str> {
        self.signatures.iter().map(|signature| signature.key.as_str())
    }

    /// Whether `request` was signed by its origin for `us` with one of `keys`. Method, path with query, and body
    /// are what was signed.
    pub(crate) fn verify<T: AsRef<[u8]>>(
        &self,
        request: &Request<T>,
        us: &ServerName,
        keys: &PublishedKeys,
    ) -> bool {
        let Ok(us) = RumaServerName::parse(us.as_str()) else { return false };
        // The signature is looked up under the origin's name, so no other server's key can be meant.
        self.signatures
            .iter()
            .any(|signature| signature.verify_http_request(request, &us, keys.map()).is_ok())
    }
}

/// Why there are no credentials.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum CredentialsError {
    #[error("there is no X-Matrix authorization")]
    Missing,
    #[error("the X-Matrix authorization is malformed")]
    Malformed,
    #[error("the X-Matrix authorization is longer than any server's, or there are too many")]
    TooMuch,
    #[error("the request is signed for another server")]
    ForAnother,
    #[error("the request says it is from this server")]
    FromUs,
}

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod properties;

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use hyper::header::HeaderValue;
    use proptest::prelude::*;
    use ruma_federation_api::authentication::XMatrixSigningInput;
    use ruma_signatures::Ed25519KeyPair;

    use super::{
        super::server_keys::tests::{at, publish},
        *,
    };

    const PATH: &str = "/_matrix/federation/v1/rtc/livekit/get_token";

    fn us() -> ServerName {
        "us.org".parse().unwrap()
    }

    fn request(body: &'static str) -> Request<Bytes> {
        Request::post(PATH).body(Bytes::from_static(body.as_bytes())).unwrap()
    }

    fn keys(document: &[u8]) -> PublishedKeys {
        PublishedKeys::read(document, &"them.org".parse().unwrap(), at(1_900_000_000)).unwrap()
    }

    fn sign(pair: &Ed25519KeyPair, origin: &str, destination: &str, request: &Request<Bytes>) -> String {
        let name = |name| RumaServerName::parse(name).unwrap();
        let input = XMatrixSigningInput::new(name(origin), name(destination), pair);
        XMatrix::sign_http_request(request, input).unwrap().to_string()
    }

    fn read(values: &[&str]) -> Result<Credentials, CredentialsError> {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(AUTHORIZATION, HeaderValue::from_str(value).unwrap());
        }
        Credentials::read(&headers, &us())
    }

    #[test]
    fn what_is_signed_is_believed_and_nothing_else() {
        let (pair, document) = publish("them.org", "a", |_| {});
        let keys = keys(&document);
        let signed = request("{\"a\":1,\"b\":\"x\"}");
        let header = sign(&pair, "them.org", "us.org", &signed);
        let credentials = read(&[&header]).unwrap();
        assert_eq!(credentials.origin().as_str(), "them.org");
        assert_eq!(credentials.key_ids().collect::<Vec<_>>(), ["ed25519:a"]);
        assert!(credentials.verify(&signed, &us(), &keys));
        assert!(credentials.verify(&request("{ \"b\":\"x\", \"a\":1}"), &us(), &keys), "the same content");

        for body in ["{\"a\":2,\"b\":\"x\"}", "{\"a\":1}", "{}", "", "[]", "{\"a\":1.0,\"b\":\"x\"}"] {
            assert!(!credentials.verify(&request(body), &us(), &keys), "{body}");
        }
        let body = || signed.body().clone();
        let path = Request::post("/_matrix/other").body(body()).unwrap();
        assert!(!credentials.verify(&path, &us(), &keys));
        let query = Request::post(format!("{PATH}?a=b")).body(body()).unwrap();
        assert!(!credentials.verify(&query, &us(), &keys));
        let method = Request::put(PATH).body(body()).unwrap();
        assert!(!credentials.verify(&method, &us(), &keys));
    }

    #[test]
    fn keys_of_others_and_other_keys_do_not_verify() {
        let (pair, document) = publish("them.org", "a", |_| {});
        let (other_pair, other_document) = publish("them.org", "a", |_| {});
        let signed = request("{}");
        let header = sign(&pair, "them.org", "us.org", &signed);
        assert!(!read(&[&header]).unwrap().verify(&signed, &us(), &keys(&other_document)));
        // A signature by another key under the same name.
        let header = sign(&other_pair, "them.org", "us.org", &signed);
        assert!(!read(&[&header]).unwrap().verify(&signed, &us(), &keys(&document)));
        // Signed by them.org, but said to be from evil.org: them.org's keys do not speak for it.
        let header = sign(&pair, "evil.org", "us.org", &signed);
        assert!(!read(&[&header]).unwrap().verify(&signed, &us(), &keys(&document)));
        // An unknown key beside a good one: servers send one header for each key.
        let (second, _) = publish("them.org", "b", |_| {});
        let two = [sign(&second, "them.org", "us.org", &signed), sign(&pair, "them.org", "us.org", &signed)];
        assert!(read(&[&two[0], &two[1]]).unwrap().verify(&signed, &us(), &keys(&document)));
    }

    #[test]
    fn a_signature_for_another_server_is_not_for_us() {
        let (pair, document) = publish("them.org", "a", |_| {});
        let signed = request("{}");
        let header = sign(&pair, "them.org", "other.org", &signed);
        assert_eq!(read(&[&header]).unwrap_err(), CredentialsError::ForAnother);
        // Taking the destination out does not help: it is part of what was signed.
        let cut = header.replace("destination=other.org,", "");
        assert_ne!(cut, header);
        assert!(!read(&[&cut]).unwrap().verify(&signed, &us(), &keys(&document)));
        // A server that names no destination but has signed ours is an old one.
        let header = sign(&pair, "them.org", "us.org", &signed).replace("destination=us.org,", "");
        assert!(read(&[&header]).unwrap().verify(&signed, &us(), &keys(&document)));
    }

    #[test]
    fn headers_that_are_no_credentials_are_refused() {
        let good = "X-Matrix origin=them.org,destination=us.org,key=\"ed25519:a\",sig=\"AAAA\"";
        assert!(read(&[good]).is_ok());
        assert_eq!(read(&[]).unwrap_err(), CredentialsError::Missing);
        for malformed in [
            "",
            "Bearer x",
            "X-Matrix",
            "X-Matrix origin=them.org",
            "X-Matrix origin=them.org,key=\"ed25519:a\"",
            "X-Matrix origin=\"a b\",key=\"ed25519:a\",sig=\"AAAA\"",
            "X-Matrix origin=them.org,key=a,sig=\"AAAA\"",
            "X-Matrix origin=them.org,key=\"ed25519:a\",sig=\"!\"",
            "X-Matrix origin=them.org,origin=them.org,key=\"ed25519:a\",sig=\"AAAA\"",
        ] {
            assert_eq!(read(&[malformed]).unwrap_err(), CredentialsError::Malformed, "{malformed}");
        }
        let other = good.replace("them.org", "evil.org");
        assert_eq!(read(&[good, &other]).unwrap_err(), CredentialsError::Malformed);
        assert_eq!(read(&[&good.replace("us.org", "US.org")]).unwrap_err(), CredentialsError::ForAnother);
        let ours = good.replace("them.org", "us.org");
        assert_eq!(read(&[&ours]).unwrap_err(), CredentialsError::FromUs);
        assert_eq!(read(&[good; 5]).unwrap_err(), CredentialsError::TooMuch);
        let long = format!("{good},x=\"{}\"", "a".repeat(MAX_HEADER));
        assert_eq!(read(&[&long]).unwrap_err(), CredentialsError::TooMuch);
    }

    proptest! {
        #[test]
        fn no_header_and_no_body_make_it_panic(
            value in prop::collection::vec(any::<u8>(), 0..200), field in "[ -~]{0,60}",
            body in prop::collection::vec(any::<u8>(), 0..100),
        ) {
            let (_, document) = publish("them.org", "a", |_| {});
            let keys = keys(&document);
            let forged = format!("X-Matrix origin=them.org,key=\"ed25519:a\",sig=\"AAAA\",{field}");
            for value in [HeaderValue::from_bytes(&value).ok(), HeaderValue::from_str(&forged).ok()] {
                let Some(value) = value else { continue };
                let mut headers = HeaderMap::new();
                headers.insert(AUTHORIZATION, value);
                if let Ok(credentials) = Credentials::read(&headers, &us()) {
                    let request = Request::post(PATH).body(Bytes::from(body.clone())).unwrap();
                    prop_assert!(!credentials.verify(&request, &us(), &keys));
                }
            }
        }
    }
}
