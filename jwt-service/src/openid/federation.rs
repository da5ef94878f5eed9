//! Requests to other homeservers, found and guarded as OpenID lookups are, and to the operator's own homeserver.

use axum::body::Body;
use bytes::Bytes;
use hyper::{
    Method, Request, Uri,
    header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HOST, HeaderValue, RETRY_AFTER, USER_AGENT},
};
use url::Url;

use super::{
    AGENT, ClientAnswer, LookupError, ServerName, Verifier, body, cache_key, classify,
    connect::GuardedClient, https,
};
use crate::secret::Secret;

/// A federation request, as it was signed.
#[derive(Clone, Debug)]
pub(crate) struct FederationRequest<'a> {
    pub(crate) method: Method,
    /// Path and query.
    pub(crate) path: &'a str,
    /// The signature, for endpoints that ask for one.
    pub(crate) authorization: Option<HeaderValue>,
    /// JSON; empty for none.
    pub(crate) body: Bytes,
}

impl Verifier {
    /// Sends `request` to the homeserver `name`, and reads at most `limit` bytes of the answer. Redirects are not
    /// followed. If a kept connection turns out to be closed it is sent again.
    pub(crate) async fn federate(
        &self,
        name: &ServerName,
        request: &FederationRequest<'_>,
        limit: usize,
    ) -> Result<ClientAnswer, LookupError> {
        let clients = self.lanes.get(&self.rules.lane(name)).ok_or(LookupError::Ours)?;
        let (target, remembered) = self.delegated(name, clients).await?;
        match send(&clients.federation, &target, request, limit).await {
            Err(LookupError::Connect(_)) if remembered => {
                // The server may have moved since. Ask again, once.
                self.cache().forget(&cache_key(name));
                let (target, _) = self.delegated(name, clients).await?;
                send(&clients.federation, &target, request, limit).await
            }
            Err(LookupError::Closed(_)) => send(&clients.federation, &target, request, limit).await,
            answer => answer,
        }
    }

    /// Asks for `url` at the homeserver that the operator has named, with an access token. Redirects are not
    /// followed: the token goes nowhere else.
    pub(crate) async fn ask_own_homeserver(
        &self,
        url: &Url,
        token: &Secret,
        limit: usize,
    ) -> Result<ClientAnswer, LookupError> {
        let clients = self.lanes.get(&self.rules.operators_lane()).ok_or(LookupError::Ours)?;
        let mut authorization =
            HeaderValue::from_str(&format!("Bearer {}", token.expose())).map_err(|_| LookupError::Ours)?;
        authorization.set_sensitive(true);
        let uri: Uri = url.as_str().parse().map_err(|_| LookupError::Ours)?;
        let host = uri.authority().ok_or(LookupError::Ours)?.as_str().to_owned();
        let once = async || {
            let request = Request::get(uri.clone())
                .header(HOST, &host)
                .header(USER_AGENT, AGENT)
                .header(ACCEPT, "application/json")
                .header(AUTHORIZATION, authorization.clone())
                .body(Body::empty())
                .map_err(|_| LookupError::Ours)?;
            exchange(&clients.web, request, limit).await
        };
        match once().await {
            // The homeserver closed a connection that we had kept.
            Err(LookupError::Closed(_)) => once().await,
            answer => answer,
        }
    }
}

async fn send(
    client: &GuardedClient,
    target: &ServerName,
    request: &FederationRequest<'_>,
    limit: usize,
) -> Result<ClientAnswer, LookupError> {
    let mut built = Request::builder()
        .method(request.method.clone())
        .uri(https(target.as_str(), request.path)?)
        .header(HOST, target.as_str())
        .header(USER_AGENT, AGENT)
        .header(ACCEPT, "application/json");
    if let Some(authorization) = &request.authorization {
        built = built.header(AUTHORIZATION, authorization);
    }
    if !request.body.is_empty() {
        built = built.header(CONTENT_TYPE, "application/json");
    }
    let built = built.body(Body::from(request.body.clone())).map_err(|_| LookupError::Ours)?;
    exchange(client, built, limit).await
}

async fn exchange(
    client: &GuardedClient,
    request: Request<Body>,
    limit: usize,
) -> Result<ClientAnswer, LookupError> {
    let answer = client.request(request).await.map_err(classify)?;
    let status = answer.status();
    let retry_after = answer.headers().get(RETRY_AFTER).and_then(|v| v.to_str().ok()).map(str::to_owned);
    Ok(ClientAnswer { status, retry_after, body: body(answer, limit).await? })
}
