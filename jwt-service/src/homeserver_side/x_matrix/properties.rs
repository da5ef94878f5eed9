//! What must hold for any request that says it is from another server.

use base64::{Engine as _, engine::general_purpose::STANDARD_NO_PAD};
use hyper::{
    HeaderMap, Method, Request, Uri,
    header::{AUTHORIZATION, HeaderValue},
};
use ruma_common::CanonicalJsonValue;
use ruma_signatures::KeyPair as _;
use serde_json::{Value, json};

use super::{
    super::{
        request::FederationTokenRequest,
        server_keys::properties::keys_of,
        signing_key::properties::{NOBODYS, THEIRS},
    },
    Credentials, CredentialsError, MAX_HEADER, MAX_SIGNATURES,
};
use crate::{fuzzing::text, openid::ServerName};

/// A request that begins with the line `start`, and its `Authorization` headers.
pub(crate) fn signed_request(start: &str, body: &[u8], headers: &[&[u8]]) {
    let Ok(us) = "us.org".parse::<ServerName>() else { return };
    let values: Vec<_> = headers.iter().filter_map(|value| HeaderValue::from_bytes(value).ok()).collect();
    let (method, path) = start.split_once(' ').unwrap_or(("POST", "/"));
    let request = request(method.as_bytes(), path, body);

    let read = credentials(&values, &us);
    let mut origin = "them.org".parse::<ServerName>().ok();
    if let Ok(credentials) = &read {
        well_formed(credentials, &values, &us);
        let keys = keys_of(&credentials.origin, &THEIRS);
        if let Some(request) = &request {
            let signed = is_signed(credentials, request, &us);
            assert_eq!(credentials.verify(request, &us, &keys), signed, "another reading of it");
        }
        origin = Some(credentials.origin.clone());
    }
    if let (Some(request), Some(origin)) = (request, origin) {
        sign(&request, &origin, &us);
    }
}

fn request(method: &[u8], path: &str, body: &[u8]) -> Option<Request<Vec<u8>>> {
    let method = Method::from_bytes(method).ok()?;
    // As the service gives it: it has the path from its own list.
    let uri: Uri = path.parse().ok().filter(|_| path.starts_with('/'))?;
    Request::builder().method(method).uri(uri).body(body.to_vec()).ok()
}

fn credentials(values: &[HeaderValue], us: &ServerName) -> Result<Credentials, CredentialsError> {
    let mut headers = HeaderMap::new();
    for value in values {
        headers.append(AUTHORIZATION, value.clone());
    }
    let read = Credentials::read(&headers, us);
    assert_eq!(read.as_ref().err() == Some(&CredentialsError::Missing), values.is_empty());
    read
}

fn well_formed(credentials: &Credentials, values: &[HeaderValue], us: &ServerName) {
    assert!((1..=MAX_SIGNATURES).contains(&values.len()));
    assert!(values.iter().all(|value| value.len() <= MAX_HEADER));
    assert_ne!(credentials.origin, *us, "we ask nothing of ourselves");
    let ids: Vec<_> = credentials.key_ids().collect();
    assert_eq!(ids.len(), values.len());
    for (value, id) in values.iter().zip(ids) {
        let Some(parameters) = value.to_str().ok().and_then(plain) else { continue };
        let named = |name| parameters.iter().find(|(known, _)| known == name).map(|(_, value)| *value);
        assert_eq!(named("origin"), Some(credentials.origin.as_str()));
        assert!(named("destination").is_none_or(|name| name == us.as_str()));
        assert_eq!(named("key"), Some(id));
    }
}

/// The parameters of a header that quotes nothing in which a comma, a quote or a backslash stands, and no name twice.
fn plain(header: &str) -> Option<Vec<(String, &str)>> {
    let (scheme, parameters) = header.split_once(' ')?;
    let mut read = Vec::<(String, &str)>::new();
    for parameter in parameters.split(',') {
        let (name, value) = parameter.trim_matches([' ', '\t']).split_once('=')?;
        let value = value.strip_prefix('"').and_then(|value| value.strip_suffix('"')).unwrap_or(value);
        let name = name.to_ascii_lowercase();
        let odd = |c: char| "\"\\ \t=".contains(c);
        if name.contains(odd) || value.contains(odd) || read.iter().any(|(known, _)| *known == name) {
            return None;
        }
        read.push((name, value));
    }
    scheme.eq_ignore_ascii_case("X-Matrix").then_some(read)
}

/// What `origin` signs of `request` (server-server API, §Request Authentication); `None` if it cannot.
fn to_sign(request: &Request<Vec<u8>>, origin: &ServerName, us: &ServerName) -> Option<String> {
    let mut object = json!({
        "destination": us.as_str(), "method": request.method().as_str(), "origin": origin.as_str(),
        "uri": request.uri().to_string(),
    });
    if !request.body().is_empty() {
        object["content"] = serde_json::from_slice(request.body()).ok().filter(is_canonical)?;
    }
    Some(object.to_string())
}

fn is_canonical(value: &Value) -> bool {
    match value {
        Value::Number(number) => number.as_i64().is_some_and(|number| number.unsigned_abs() < 1 << 53),
        Value::Array(items) => items.iter().all(is_canonical),
        Value::Object(members) => members.values().all(is_canonical),
        _ => true,
    }
}

/// Whether the other server's key has signed just this.
fn is_signed(credentials: &Credentials, request: &Request<Vec<u8>>, us: &ServerName) -> bool {
    let text = to_sign(request, &credentials.origin, us);
    let signature = text.map(|text| THEIRS.pair().sign(text.as_bytes()).base64());
    let mut signatures = credentials.signatures.iter().filter(|one| one.key == "ed25519:fixed");
    signatures.any(|one| Some(one.sig.encode()) == signature)
}

/// The other server signs `request`.
fn sign(request: &Request<Vec<u8>>, origin: &ServerName, us: &ServerName) {
    let header = THEIRS.authorization(request, origin, us);
    assert_eq!(header.is_some(), to_sign(request, origin, us).is_some());
    let Some(header) = header else { return };
    let signed = credentials(&[header], us).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!((&signed.origin, signed.key_ids().collect()), (origin, vec!["ed25519:fixed"]));
    assert!(is_signed(&signed, request, us));
    let keys = keys_of(origin, &THEIRS);
    assert!(signed.verify(request, us, &keys));
    assert!(!signed.verify(request, us, &keys_of(origin, &NOBODYS)), "another key under the same name");
    means_what_was_signed(request.body());
    alter(&signed, request, us);
}

/// A body is read as the text that was signed, in which no member occurs twice.
fn means_what_was_signed(body: &[u8]) {
    if let Ok(canonical) = serde_json::from_slice::<CanonicalJsonValue>(body) {
        let read = FederationTokenRequest::decode(canonical.to_string().as_bytes());
        assert_eq!(FederationTokenRequest::decode(body), read);
    }
}

/// One byte of one part is another, or one more is there: the signature says where, as good as by chance.
fn alter(signed: &Credentials, original: &Request<Vec<u8>>, us: &ServerName) {
    let signature = &signed.signatures[0].sig;
    let which = signature.as_bytes().iter().take(4).fold(0_usize, |sum, byte| sum << 8 | usize::from(*byte));
    let change = |bytes: &[u8]| {
        let (mut bytes, bit) = (bytes.to_vec(), which / 6);
        let at = bit / 8 % (bytes.len() + 1);
        match bytes.get_mut(at) {
            Some(byte) => *byte ^= 1 << (bit % 8),
            None => bytes.push(b'1'),
        }
        bytes
    };
    let change_name = |name: &ServerName| text(&change(name.as_str().as_bytes())).parse::<ServerName>().ok();
    let (method, uri, body) = (original.method().as_str(), original.uri().to_string(), original.body());
    let keys = keys_of(&signed.origin, &THEIRS);
    let header = |origin: &ServerName, destination: &str, signature: &str| {
        let value =
            format!("X-Matrix origin=\"{origin}\",{destination}key=\"ed25519:fixed\",sig=\"{signature}\"");
        HeaderValue::from_str(&value).unwrap_or_else(|error| panic!("{error}"))
    };
    let other = match which % 6 {
        0 => request(&change(method.as_bytes()), &uri, body),
        1 => request(method.as_bytes(), &text(&change(uri.as_bytes())), body),
        2 => request(method.as_bytes(), &uri, &change(body)),
        3 => {
            let Some(origin) = change_name(&signed.origin) else { return };
            let read = credentials(&[header(&origin, "", &signature.encode())], us);
            // Not even if the other server says that the key is its own.
            let keys = keys_of(&origin, &THEIRS);
            assert!(!read.is_ok_and(|read| read.verify(original, us, &keys)), "said to be from {origin}");
            return;
        }
        4 => {
            let Some(destination) = change_name(us) else { return };
            let named = header(&signed.origin, "destination=\"us.org\",", &signature.encode());
            assert_eq!(credentials(&[named], &destination).err(), Some(CredentialsError::ForAnother));
            // An old server names no destination, but has signed it.
            let unnamed = [header(&signed.origin, "", &signature.encode())];
            assert!(credentials(&unnamed, us).is_ok_and(|read| read.verify(original, us, &keys)));
            let read = credentials(&unnamed, &destination);
            assert!(!read.is_ok_and(|read| read.verify(original, &destination, &keys)), "for {destination}");
            return;
        }
        _ => {
            let forged = STANDARD_NO_PAD.encode(change(signature.as_bytes()));
            let read = credentials(&[header(&signed.origin, "", &forged)], us);
            assert!(!read.is_ok_and(|read| read.verify(original, us, &keys)), "{forged}");
            return;
        }
    };
    let Some(other) = other else { return };
    let same = to_sign(&other, &signed.origin, us) == to_sign(original, &signed.origin, us);
    assert_eq!(signed.verify(&other, us, &keys), same, "{other:?}");
    assert_eq!(is_signed(signed, &other, us), same);
}
