//! The access token of a request (client-server API, §Using access tokens).

use hyper::{HeaderMap, header::AUTHORIZATION};

use crate::secret::Secret;

/// The longest token that we ask the homeserver about. Synapse's have about 40 bytes, those of an OpenID
/// Connect provider about a thousand.
const MAX_LEN: usize = 8 * 1024;

/// The token in the `Authorization` header.
///
/// One in the query string, which the specification has deprecated, is no token here: URLs end up in the logs of
/// proxies, and no client that knows these endpoints sends it.
pub(crate) fn bearer(headers: &HeaderMap) -> Result<Secret, BadBearer> {
    let mut values = headers.get_all(AUTHORIZATION).iter();
    let value = values.next().ok_or(BadBearer::Missing)?;
    if values.next().is_some() {
        return Err(BadBearer::Unusable);
    }
    let text = value.to_str().map_err(|_| BadBearer::Unusable)?;
    let (scheme, token) = text.split_once(' ').ok_or(BadBearer::Missing)?;
    if !scheme.eq_ignore_ascii_case("bearer") {
        return Err(BadBearer::Missing);
    }
    let token = token.trim_matches(' ');
    if token.is_empty() {
        return Err(BadBearer::Missing);
    }
    // What cannot be a token is nobody's.
    if token.len() > MAX_LEN || !token.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(BadBearer::Unusable);
    }
    Ok(Secret::new(token))
}

/// Why there is no access token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BadBearer {
    /// There is none.
    Missing,
    /// What is there is nobody's token.
    Unusable,
}

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod properties;

#[cfg(test)]
mod tests {
    use hyper::header::HeaderValue;
    use proptest::prelude::*;

    use super::*;

    fn of(values: &[&str]) -> Result<String, BadBearer> {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(AUTHORIZATION, HeaderValue::from_str(value).unwrap());
        }
        bearer(&headers).map(|token| token.expose().to_owned())
    }

    #[test]
    fn the_token_is_what_follows_the_scheme() {
        assert_eq!(of(&["Bearer abc.D_e-F=="]).as_deref(), Ok("abc.D_e-F=="));
        assert_eq!(of(&["bearer  abc "]).as_deref(), Ok("abc"));
    }

    #[test]
    fn anything_else_is_missing_or_unusable() {
        for missing in
            [&[][..], &[""], &["abc"], &["Bearer"], &["Bearer "], &["Basic YTpi"], &["X-Matrix a=b"]]
        {
            assert_eq!(of(missing), Err(BadBearer::Missing), "{missing:?}");
        }
        let long = format!("Bearer {}", "a".repeat(MAX_LEN + 1));
        for unusable in [&["Bearer a b"][..], &["Bearer a\tb"], &[&long], &["Bearer a", "Bearer a"]] {
            assert_eq!(of(unusable), Err(BadBearer::Unusable), "{unusable:?}");
        }
    }

    proptest! {
        #[test]
        fn no_header_makes_it_panic(value in prop::collection::vec(any::<u8>(), 0..100)) {
            let mut headers = HeaderMap::new();
            if let Ok(value) = HeaderValue::from_bytes(&value) {
                headers.insert(AUTHORIZATION, value);
            }
            let _ = bearer(&headers);
        }
    }
}
