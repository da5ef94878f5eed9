//! `POST /_matrix/federation/v1/rtc/livekit/get_token` (MSC4195): a token of our SFU for a user of another
//! homeserver, which asks for it and signs the request.

use std::sync::Arc;

use axum::{
    body::Bytes,
    extract::{Request, State},
    http::{self, Method},
    response::{IntoResponse, Response},
};

use super::{Token, other_than_post};
use crate::{
    Inner,
    homeserver_side::{Credentials, FederationTokenRequest, Homeserver},
    http::{
        error::{HomeserverRefusal, Refusal},
        intake,
    },
};

/// Answers at `path`, which is what the other server has signed, whatever prefix we are mounted under.
pub(super) async fn federation_get_token(
    State(service): State<Arc<Inner>>,
    path: &'static str,
    request: Request,
) -> Response {
    if let Some(answer) = other_than_post(request.method()) {
        return answer;
    }
    answer(&service, path, request).await.into_response()
}

async fn answer(service: &Inner, path: &'static str, request: Request) -> Result<Token, Refusal> {
    let _place = service.place()?;
    let homeserver = service.homeserver.as_ref().ok_or(Refusal::Internal)?;
    let credentials = Credentials::read(request.headers(), homeserver.name()).map_err(|error| {
        tracing::warn!(cause = %error, "federation request refused");
        HomeserverRefusal::ServerUnauthorized
    })?;
    let origin = credentials.origin();
    if !service.settings.admits(origin.as_str()) {
        tracing::info!(origin = origin.as_str(), "users of this homeserver are not admitted");
        return Err(HomeserverRefusal::Forbidden.into());
    }
    let uri = match request.uri().query() {
        Some(query) => format!("{path}?{query}"),
        None => path.to_owned(),
    };
    let body = intake::read(request, &service.settings.limits).await?;
    let signed = http::Request::builder().method(Method::POST).uri(uri).body(body);
    let signed = signed.map_err(|_| HomeserverRefusal::ServerUnauthorized)?;
    verify(service, homeserver, &credentials, &signed).await?;
    let asked = FederationTokenRequest::decode(signed.body())?;
    drop(signed);
    if !asked.is_of(origin) {
        tracing::warn!(origin = origin.as_str(), "a server asks for a user who is not its own");
        return Err(HomeserverRefusal::Forbidden.into());
    }
    let joined = homeserver.has_member(&asked.membership.room_id, &asked.user_id);
    if !service.asking(homeserver.name(), joined).await? {
        return Err(HomeserverRefusal::Forbidden.into());
    }
    service.check_url(&asked.membership.url)?;
    service.own_token(&asked.membership, &asked.user_id, false).await
}

async fn verify(
    service: &Inner,
    homeserver: &Homeserver,
    credentials: &Credentials,
    signed: &http::Request<Bytes>,
) -> Result<(), Refusal> {
    let origin = credentials.origin();
    if service.asking(origin, homeserver.is_genuine(credentials, signed)).await? {
        Ok(())
    } else {
        tracing::warn!(origin = origin.as_str(), "a federation request's signature was not verified");
        Err(HomeserverRefusal::ServerUnauthorized.into())
    }
}
