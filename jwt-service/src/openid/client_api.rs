//! The client-server API of a homeserver: where it is (client-server API, §Well-known URI), and requests to it
//! under the same egress rules as everything else that a stranger's server name leads to.

use axum::body::Body;
use bytes::Bytes;
use hyper::{
    Method, Request, StatusCode, Uri,
    header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HOST, HeaderValue, LOCATION, RETRY_AFTER, USER_AGENT},
};
use serde::Deserialize;
use url::Url;
use zeroize::Zeroizing;

use super::{AGENT, LookupError, MAX_REDIRECTS, ServerName, Verifier, addresses::Egress, body, classify};
use crate::secret::Secret;

/// The largest document and the largest answer we read.
const MAX_DOCUMENT: usize = 64 * 1024;

/// What a homeserver's client-server API answered.
#[derive(Clone, Debug)]
pub(crate) struct ClientAnswer {
    pub(crate) status: StatusCode,
    /// The `Retry-After` header.
    pub(crate) retry_after: Option<String>,
    pub(crate) body: Bytes,
}

impl Verifier {
    /// The base URL that the operator has written for `name`.
    pub(crate) fn written_client_api(&self, name: &ServerName) -> Option<&Url> {
        self.overrides.get(&name.as_str().to_ascii_lowercase())
    }

    /// Counts a use of the cache of base URLs.
    pub(crate) fn count_client_discovery(&self, outcome: &'static str) {
        self.metrics.client_discovery(outcome);
    }

    /// The base URL of `name`'s client-server API as its `.well-known` says.
    pub(crate) async fn discover_client_api(&self, name: &ServerName) -> Result<Url, LookupError> {
        let lane = self.rules.lane(name);
        let clients = self.lanes.get(&lane).ok_or(LookupError::Ours)?;
        let found = tokio::time::timeout(self.budget, clients.document(name, "client", MAX_DOCUMENT));
        let document = found.await.map_err(|_| LookupError::TimedOut)??;
        let (document, _) = document.ok_or(LookupError::NoClientApi)?;
        let url = base_url(&document).ok_or(LookupError::NoClientApi)?;
        // In plain text everyone on the way could read the delay ids; a stranger's server gets none that way.
        if url.scheme() == "https" || lane.egress != Egress::Public {
            Ok(url)
        } else {
            Err(LookupError::NoClientApi)
        }
    }

    /// The access token that `name` wants for a request to `url`. Over plain HTTP everyone on the way could
    /// read it: only an operator who has written that URL sends it so.
    fn token(&self, name: &ServerName, url: &Url) -> Option<&Secret> {
        let protected = url.scheme() == "https" || self.written_client_api(name).is_some();
        self.tokens.get(&name.as_str().to_ascii_lowercase()).filter(|_| protected)
    }

    /// One request to `url`, which is on `name`'s client-server API: a POST, which is about a delayed event,
    /// with the access token that the operator has given for that. A redirect that keeps the method is followed
    /// (307 and 308, RFC 9110 §15.4), wherever requests for `name` may go.
    pub(crate) async fn ask_client_api(
        &self,
        name: &ServerName,
        method: Method,
        url: &Url,
    ) -> Result<ClientAnswer, LookupError> {
        let lane = self.rules.lane(name);
        let clients = self.lanes.get(&lane).ok_or(LookupError::Ours)?;
        let mut next = url.clone();
        for _ in 0..=MAX_REDIRECTS {
            let token = self.token(name, &next).filter(|_| next.origin() == url.origin());
            let answer = clients.web.request(asking(&method, &next, token)?).await.map_err(classify)?;
            let status = answer.status();
            let header = |name| answer.headers().get(name).and_then(|value| value.to_str().ok());
            if matches!(status, StatusCode::TEMPORARY_REDIRECT | StatusCode::PERMANENT_REDIRECT)
                && let Some(target) = header(LOCATION).and_then(|target| next.join(target).ok())
                // As for a base URL: no delay id in plain text because a stranger says so.
                && (target.scheme() == "https" || (target.scheme() == "http" && lane.egress != Egress::Public))
            {
                next = target;
                continue;
            }
            let retry_after = header(RETRY_AFTER).map(str::to_owned);
            return Ok(ClientAnswer { status, retry_after, body: body(answer, MAX_DOCUMENT).await? });
        }
        Err(LookupError::TooManyRedirects)
    }
}

fn asking(method: &Method, url: &Url, token: Option<&Secret>) -> Result<Request<Body>, LookupError> {
    let uri: Uri = url.as_str().parse().map_err(|_| LookupError::Ours)?;
    let host = uri.authority().ok_or(LookupError::Ours)?.as_str().to_owned();
    let content = if *method == Method::POST { Body::from("{}") } else { Body::empty() };
    let mut request = Request::builder()
        .method(method.clone())
        .uri(uri)
        .header(HOST, host)
        .header(USER_AGENT, AGENT)
        .header(ACCEPT, "application/json");
    if *method == Method::POST {
        request = request.header(CONTENT_TYPE, "application/json");
        if let Some(token) = token {
            let bearer = Zeroizing::new(format!("Bearer {}", token.expose()));
            let mut value = HeaderValue::from_str(&bearer).map_err(|_| LookupError::Ours)?;
            value.set_sensitive(true);
            request = request.header(AUTHORIZATION, value);
        }
    }
    request.body(content).map_err(|_| LookupError::Ours)
}

/// The base URL in a `.well-known/matrix/client` document, if it is one that paths can be appended to.
fn base_url(document: &[u8]) -> Option<Url> {
    #[derive(Deserialize)]
    struct WellKnown {
        #[serde(rename = "m.homeserver")]
        homeserver: Homeserver,
    }
    #[derive(Deserialize)]
    struct Homeserver {
        base_url: String,
    }
    let WellKnown { homeserver } = serde_json::from_slice(document).ok()?;
    let url = Url::parse(&homeserver.base_url).ok()?;
    let plain = url.username().is_empty()
        && url.password().is_none()
        && url.query().is_none()
        && url.fragment().is_none();
    // URLs may have hosts that requests may not: `https://a}b`.
    let askable = url.as_str().parse::<Uri>().is_ok_and(|uri| uri.authority().is_some());
    (matches!(url.scheme(), "http" | "https") && plain && askable).then_some(url)
}

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod properties;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_document_names_a_base_url_or_nothing_usable() {
        let base = |text: &str| base_url(text.as_bytes()).map(|url| url.to_string());
        assert_eq!(
            base(r#"{"m.homeserver":{"base_url":"https://m.hs.org/x"},"m.other":1}"#).as_deref(),
            Some("https://m.hs.org/x")
        );
        for unusable in ["", "null", "{}", "<html>", r#"{"m.homeserver":{}}"#, r#"{"m.homeserver":"x"}"#] {
            assert_eq!(base(unusable), None, "{unusable}");
        }
        for url in [
            "",
            "hs.org",
            "ftp://hs.org",
            "https://u:p@hs.org",
            "https://hs.org/?a",
            "https://hs.org/#a",
            "https://a}b",
        ] {
            let document = serde_json::json!({ "m.homeserver": { "base_url": url } }).to_string();
            assert_eq!(base(&document), None, "{url}");
        }
    }

    proptest! {
        #[test]
        fn no_document_makes_it_panic(document in prop::collection::vec(any::<u8>(), 0..200), url in ".{0,60}") {
            let _ = base_url(&document);
            let document = serde_json::json!({ "m.homeserver": { "base_url": url } }).to_string();
            let _ = base_url(document.as_bytes());
        }
    }
}
