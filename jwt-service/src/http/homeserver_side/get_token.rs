//! `POST /_matrix/client/v1/rtc/livekit/get_token` (MSC4195): a token of our SFU, or of another homeserver's,
//! for a user who is in the room.

use std::sync::Arc;

use axum::{
    extract::{Request, State},
    response::{IntoResponse, Response},
};

use super::{Token, access_token, other_than_post};
use crate::{
    Inner,
    homeserver_side::{Homeserver, RemoteToken, TokenRequest},
    http::{
        error::{HomeserverRefusal, Refusal},
        intake,
    },
    openid::ServerName,
};

pub(super) async fn get_token(State(service): State<Arc<Inner>>, request: Request) -> Response {
    if let Some(answer) = other_than_post(request.method()) {
        return answer;
    }
    answer(&service, request).await.into_response()
}

async fn answer(service: &Inner, request: Request) -> Result<Token, Refusal> {
    let _place = service.place()?;
    let homeserver = service.homeserver.as_ref().ok_or(Refusal::Internal)?;
    let token = access_token(request.headers())?;
    let body = intake::read(request, &service.settings.limits).await?;
    let TokenRequest { server_name, membership } = TokenRequest::decode(&body)?;
    drop(body);
    let joined = async {
        let user_id = homeserver.whoami(&token).await?;
        let joined = homeserver.is_joined(&token, &membership.room_id, &user_id).await?;
        Ok(joined.then_some(user_id))
    };
    let user_id = service.asking(homeserver.name(), joined).await?;
    let user_id = user_id.ok_or(HomeserverRefusal::Forbidden)?;
    // Users' tokens are not kept: it has served.
    drop(token);
    match server_name.filter(|name| !is_ours(homeserver, name)) {
        None => {
            service.check_url(&membership.url)?;
            service.own_token(&membership, &user_id, true).await
        }
        Some(server) => {
            let remote = homeserver.remote_token(&server, &membership, &user_id);
            match service.asking(&server, remote).await? {
                RemoteToken::Jwt(jwt) => {
                    tracing::info!(server = server.as_str(), "token of another homeserver's SFU");
                    Ok(Token { jwt: jwt.expose().to_owned() })
                }
                RemoteToken::Forbidden => Err(HomeserverRefusal::Forbidden.into()),
                RemoteToken::InvalidParam => {
                    let sentence = "the other homeserver refused a parameter: is url an SFU of server_name?";
                    Err(HomeserverRefusal::InvalidParam(sentence).into())
                }
                RemoteToken::Failed => Err(HomeserverRefusal::Upstream.into()),
            }
        }
    }
}

fn is_ours(homeserver: &Homeserver, name: &ServerName) -> bool {
    name.as_str().eq_ignore_ascii_case(homeserver.name().as_str())
}
