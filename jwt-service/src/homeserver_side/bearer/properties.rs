//! What must hold for any `Authorization` header of a client.

use hyper::{
    HeaderMap,
    header::{AUTHORIZATION, HeaderValue},
};

use super::{BadBearer, MAX_LEN, bearer};

/// The header's value.
pub(crate) fn bearer_header(value: &[u8]) {
    let Ok(value) = HeaderValue::from_bytes(value) else { return };
    let mut headers = HeaderMap::from_iter([(AUTHORIZATION, value.clone())]);
    let token = bearer(&headers);
    let read = token.as_ref().ok().map(|token| token.expose());
    assert_eq!(read, naive(value.as_bytes()), "another reading of it");
    if let Ok(token) = &token {
        assert_eq!(format!("{token:?}"), "[redacted]");
        let again = HeaderValue::from_str(&format!("Bearer {}", token.expose()));
        let again = again.map(|value| bearer(&HeaderMap::from_iter([(AUTHORIZATION, value)])));
        assert_eq!(again.ok().as_ref(), Some(&Ok(token.clone())), "what is passed on is the same");
    }
    // Of two nobody knows which one a proxy has looked at.
    headers.append(AUTHORIZATION, value);
    assert_eq!(bearer(&headers), Err(BadBearer::Unusable));
}

/// The scheme, blanks, one word, blanks.
fn naive(value: &[u8]) -> Option<&str> {
    let text = std::str::from_utf8(value).ok()?;
    let (scheme, _) = text.split_at_checked(7)?;
    let mut words = text.split(' ').filter(|word| !word.is_empty());
    let (_, token, None) = (words.next()?, words.next()?, words.next()) else { return None };
    let usable = token.len() <= MAX_LEN && token.chars().all(|c| ('!'..='~').contains(&c));
    (scheme.eq_ignore_ascii_case("bearer ") && usable).then_some(token)
}
