//! Requests to the homeserver in our own terms: one attempt, a deadline, a bounded answer, errors sorted.
//!
//! They bypass `Client::send`, which has no query parameters beyond its own requests, reads answers of any size, loses
//! the `Retry-After` of an answer without a Matrix error code, and logs every path: a delay id is a capability.

use std::{error::Error as _, time::Duration};

use matrix_sdk::{
    Client, HttpError, RefreshTokenError,
    reqwest::{self, Method, StatusCode, header},
    ruma::api::error::{ErrorBody, ErrorKind, RetryAfter},
};
use serde_json::{Value, json};
use tokio::time::timeout;
use url::Url;

use crate::matrix::RequestError;

/// Enough for every answer but a sync.
const LARGEST_ANSWER: usize = 256 * 1024;
/// Words of a server that are passed on, in characters.
const LONGEST_MESSAGE: usize = 200;

/// One request. Path segments are encoded one by one, so an id may hold any character.
#[derive(Clone, Debug)]
pub(super) struct Ask<'a> {
    method: Method,
    path: Vec<&'a str>,
    query: Vec<(&'static str, String)>,
    body: Option<&'a Value>,
    largest: usize,
}

impl<'a> Ask<'a> {
    pub(super) fn get(path: &[&'a str]) -> Self {
        Self {
            method: Method::GET,
            path: path.to_vec(),
            query: Vec::new(),
            body: None,
            largest: LARGEST_ANSWER,
        }
    }

    pub(super) fn put(path: &[&'a str], body: &'a Value) -> Self {
        Self { method: Method::PUT, body: Some(body), ..Self::get(path) }
    }

    pub(super) fn post(path: &[&'a str], body: &'a Value) -> Self {
        Self { method: Method::POST, body: Some(body), ..Self::get(path) }
    }

    pub(super) fn query(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.query.push((name, value.into()));
        self
    }

    pub(super) fn largest_answer(mut self, bytes: usize) -> Self {
        self.largest = bytes;
        self
    }

    fn url(&self, base: &Url) -> Result<Url, RequestError> {
        // The URL type drops dot segments: the request would go to another place.
        if self.path.iter().any(|segment| matches!(*segment, "." | "..")) {
            return Err(RequestError::Local { cause: "an identifier must not be `.` or `..`".to_owned() });
        }
        let mut url = base.clone();
        url.path_segments_mut()
            .map_err(|()| RequestError::Local { cause: format!("{base} is not the URL of a homeserver") })?
            .pop_if_empty()
            .extend(&self.path);
        if !self.query.is_empty() {
            url.query_pairs_mut().extend_pairs(&self.query);
        }
        Ok(url)
    }
}

/// Performs `ask` as the logged-in user. An expired access token is refreshed once if the session can.
pub(super) async fn send(client: &Client, ask: Ask<'_>, limit: Duration) -> Result<Value, RequestError> {
    let attempt = async {
        match send_once(client, &ask).await {
            Err(RequestError::LoggedOut) if can_refresh(client) => {
                match client.refresh_access_token().await {
                    Ok(()) => send_once(client, &ask).await,
                    Err(RefreshTokenError::RefreshTokenRequired) => Err(RequestError::LoggedOut),
                    Err(error) => {
                        Err(RequestError::Network { cause: format!("refreshing the access token: {error}") })
                    }
                }
            }
            outcome => outcome,
        }
    };
    timeout(limit, attempt).await.unwrap_or(Err(RequestError::TimedOut))
}

fn can_refresh(client: &Client) -> bool {
    client.session_tokens().is_some_and(|tokens| tokens.refresh_token.is_some())
}

async fn send_once(client: &Client, ask: &Ask<'_>) -> Result<Value, RequestError> {
    let url = ask.url(&client.homeserver())?;
    let token = client.access_token().ok_or(RequestError::LoggedOut)?;
    let mut request = client.http_client().request(ask.method.clone(), url).bearer_auth(token);
    if let Some(body) = ask.body {
        request = request.json(body);
    }
    answer(request, ask.largest).await
}

/// Gets a public document, without an access token.
pub(super) async fn get_public(client: &Client, url: Url, limit: Duration) -> Result<Value, RequestError> {
    let request = client.http_client().get(url);
    timeout(limit, answer(request, LARGEST_ANSWER)).await.unwrap_or(Err(RequestError::TimedOut))
}

async fn answer(request: reqwest::RequestBuilder, largest: usize) -> Result<Value, RequestError> {
    let mut response = request.send().await.map_err(|error| unreachable(&error))?;
    let host = host_of(response.url());
    let (status, retry_after) = (response.status(), retry_after(response.headers()));
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(|error| unreachable(&error))? {
        if body.len() + chunk.len() > largest {
            return Err(RequestError::Network {
                cause: format!("{host}: the answer exceeds {largest} bytes"),
            });
        }
        body.extend_from_slice(&chunk);
    }
    let parsed = serde_json::from_slice(&body);
    if status.is_success() {
        return parsed.map_err(|_| RequestError::Network {
            cause: format!("{host}: the answer with status {status} is not JSON"),
        });
    }
    Err(refusal(status, retry_after, &parsed.unwrap_or(Value::Null), &host))
}

/// The first cause in words, with the host: `reqwest` itself says only that sending failed.
fn unreachable(error: &reqwest::Error) -> RequestError {
    if error.is_timeout() {
        return RequestError::TimedOut;
    }
    let mut cause: &dyn std::error::Error = error;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    let host = error.url().map(host_of).unwrap_or_default();
    // Without a source the text of reqwest holds the URL, whose path may hold a capability.
    let cause =
        if error.source().is_some() { words(&cause.to_string()) } else { "the request failed".to_owned() };
    RequestError::Network { cause: format!("{host}: {cause}") }
}

fn host_of(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    url.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
}

fn retry_after(headers: &header::HeaderMap) -> Option<Duration> {
    delay(&RetryAfter::try_from(headers.get(header::RETRY_AFTER)?).ok()?)
}

fn delay(retry_after: &RetryAfter) -> Option<Duration> {
    match retry_after {
        RetryAfter::Delay(delay) => Some(*delay),
        RetryAfter::DateTime(at) => at.duration_since(std::time::SystemTime::now()).ok(),
    }
}

/// Sorts a refusal. 409 and a 403 for a long delay depend on the request: see `requests`.
fn refusal(status: StatusCode, header: Option<Duration>, body: &Value, host: &str) -> RequestError {
    let text = |name: &str| body.get(name).and_then(Value::as_str).unwrap_or_default();
    let (errcode, message) = (words(text("errcode")), words(text("error")));
    if status == StatusCode::TOO_MANY_REQUESTS || errcode == "M_LIMIT_EXCEEDED" {
        let in_body = || body.get("retry_after_ms").and_then(Value::as_u64).map(Duration::from_millis);
        return RequestError::RateLimited { retry_after: header.or_else(in_body) };
    }
    let delay_code = text("org.matrix.msc4140.errcode");
    if errcode == "ORG.MATRIX.MSC4140_DELAY_TOO_LARGE"
        || [errcode.as_str(), delay_code].contains(&"M_MAX_DELAY_EXCEEDED")
    {
        let max = body.get("org.matrix.msc4140.max_delay").and_then(Value::as_u64);
        return RequestError::MaxDelayExceeded { max: max.map(Duration::from_millis) };
    }
    match (status.as_u16(), errcode.as_str()) {
        (_, "M_UNRECOGNIZED") => RequestError::Unsupported,
        // A homeserver always names a code: this is a proxy that does not pass the path on.
        (404 | 405, "") => RequestError::Unsupported,
        (404, "M_NOT_FOUND") => RequestError::NotFound,
        (401, "M_UNKNOWN_TOKEN" | "M_MISSING_TOKEN") => RequestError::LoggedOut,
        (403, _) => RequestError::Forbidden { errcode, message },
        (500.., _) => RequestError::Network {
            cause: format!("{host} answered {status} {errcode} {message}").trim_end().to_owned(),
        },
        (status, _) => RequestError::Refused { status, errcode, message },
    }
}

/// Sorts the failure of a request that matrix-sdk made.
pub(crate) fn sdk_error(error: &matrix_sdk::Error) -> RequestError {
    match error {
        matrix_sdk::Error::Http(error) => http_error(error),
        other => RequestError::Local { cause: words(&other.to_string()) },
    }
}

/// The same for one of its HTTP errors.
pub(crate) fn http_error(error: &HttpError) -> RequestError {
    match error {
        HttpError::Reqwest(error) => return unreachable(error),
        HttpError::Cached(error) => return http_error(error),
        _ => {}
    }
    let Some(api) = error.as_client_api_error() else {
        return RequestError::Local { cause: words(&error.to_string()) };
    };
    let (body, header) = match &api.body {
        ErrorBody::Standard(standard) => {
            let wait = match &standard.kind {
                ErrorKind::LimitExceeded(limit) => limit.retry_after.as_ref().and_then(delay),
                _ => None,
            };
            (json!({"errcode": standard.kind.errcode().as_str(), "error": standard.message}), wait)
        }
        ErrorBody::Json(body) => (body.clone(), None),
        ErrorBody::NotJson { .. } => (Value::Null, None),
    };
    refusal(api.status_code, header, &body, "the homeserver")
}

/// Somebody else's words, fit for a log line.
fn words(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(LONGEST_MESSAGE).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sorted(status: u16, body: &Value) -> RequestError {
        refusal(StatusCode::from_u16(status).unwrap(), None, body, "hs")
    }

    fn limited(header: Option<&str>, body: &Value) -> Option<Duration> {
        let mut headers = header::HeaderMap::new();
        if let Some(value) = header {
            headers.insert(header::RETRY_AFTER, value.parse().unwrap());
        }
        match refusal(StatusCode::TOO_MANY_REQUESTS, retry_after(&headers), body, "hs") {
            RequestError::RateLimited { retry_after } => retry_after,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn retry_after_header_wins_over_body() {
        let body = json!({"errcode": "M_LIMIT_EXCEEDED", "error": "", "retry_after_ms": 2500});
        assert_eq!(limited(Some("7"), &body), Some(Duration::from_secs(7)));
        assert_eq!(limited(None, &body), Some(Duration::from_millis(2500)));
        assert_eq!(limited(Some("nonsense"), &body), Some(Duration::from_millis(2500)));
        assert_eq!(limited(None, &Value::Null), None, "a proxy's 429 without a body");
        let until = limited(Some("Fri, 01 Jan 2100 00:00:00 GMT"), &body).unwrap();
        assert!(until > Duration::from_secs(365 * 86_400), "{until:?}");
    }

    #[test]
    fn refusals_are_sorted_by_status_and_code() {
        let body = |code: &str| json!({"errcode": code, "error": "why"});
        assert_eq!(sorted(404, &body("M_UNRECOGNIZED")), RequestError::Unsupported);
        assert_eq!(sorted(405, &body("M_UNRECOGNIZED")), RequestError::Unsupported);
        assert_eq!(sorted(404, &Value::Null), RequestError::Unsupported);
        assert_eq!(sorted(404, &body("M_NOT_FOUND")), RequestError::NotFound);
        assert_eq!(sorted(401, &body("M_UNKNOWN_TOKEN")), RequestError::LoggedOut);
        assert_eq!(
            sorted(403, &body("M_FORBIDDEN")),
            RequestError::Forbidden { errcode: "M_FORBIDDEN".into(), message: "why".into() }
        );
        assert_eq!(
            sorted(400, &body("M_BAD_JSON")),
            RequestError::Refused { status: 400, errcode: "M_BAD_JSON".into(), message: "why".into() }
        );
        assert!(
            matches!(sorted(502, &Value::Null), RequestError::Network { cause } if cause.contains("hs answered 502"))
        );
    }

    #[test]
    fn both_forms_of_a_long_delay_are_recognised() {
        let synapse = json!({"errcode": "ORG.MATRIX.MSC4140_DELAY_TOO_LARGE", "error": ""});
        assert_eq!(sorted(400, &synapse), RequestError::MaxDelayExceeded { max: None });
        let older = json!({"errcode": "M_UNKNOWN", "error": "", "org.matrix.msc4140.errcode": "M_MAX_DELAY_EXCEEDED",
            "org.matrix.msc4140.max_delay": 5000});
        assert_eq!(sorted(400, &older), RequestError::MaxDelayExceeded { max: Some(Duration::from_secs(5)) });
    }

    #[test]
    fn path_segments_are_encoded_and_dots_refused() {
        let base = Url::parse("https://hs.example/base/").unwrap();
        let url = Ask::get(&["_matrix", "!a/b:c", "%2F", ""]).query("org.x", "1 2").url(&base).unwrap();
        assert_eq!(url.as_str(), "https://hs.example/base/_matrix/!a%2Fb:c/%252F/?org.x=1+2");
        assert!(matches!(Ask::get(&["a", ".."]).url(&base), Err(RequestError::Local { .. })));
    }
}
