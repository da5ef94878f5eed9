//! `POST /_matrix/client/v1/rtc/livekit/delegate_delayed_leave` (MSC4195): takes a member's delayed leave over.
//!
//! Only members of the room may, as for a token. The request does not say how long the delay is; the homeserver
//! does, and it also says whose event it is: nobody delegates what is not theirs. A service without a store does
//! not offer this.

use std::sync::Arc;

use axum::{
    extract::{Request, State},
    http::{Method, StatusCode},
    response::{IntoResponse, Response},
};

use super::{access_token, other_than_post};
use crate::{
    Inner,
    delegation::{AddError, Delegation, JobKey, JobParams},
    homeserver_side::DelegationRequest,
    http::{
        error::{HomeserverRefusal, Refusal},
        intake,
    },
};

pub(super) async fn delegate_delayed_leave(State(service): State<Arc<Inner>>, request: Request) -> Response {
    let Some(delegation) = &service.delegation else {
        // A preflight must succeed, or the page never sees the 404 behind it.
        return if request.method() == Method::OPTIONS {
            StatusCode::OK.into_response()
        } else {
            Refusal::Unrecognized.into_response()
        };
    };
    if let Some(answer) = other_than_post(request.method()) {
        return answer;
    }
    answer(&service, delegation, request).await.map(|()| "{}").into_response()
}

async fn answer(service: &Inner, delegation: &Delegation, request: Request) -> Result<(), Refusal> {
    let invalid = |sentence| Refusal::from(HomeserverRefusal::InvalidParam(sentence));
    let _place = service.place()?;
    let homeserver = service.homeserver.as_ref().ok_or(Refusal::Internal)?;
    let token = access_token(request.headers())?;
    let body = intake::read(request, &service.settings.limits).await?;
    let DelegationRequest { membership, delay_id } = DelegationRequest::decode(&body)?;
    drop(body);
    let event = async {
        let user_id = homeserver.whoami(&token).await?;
        if !homeserver.is_joined(&token, &membership.room_id, &user_id).await? {
            return Ok(None);
        }
        Ok(Some((user_id, homeserver.delayed_event(&token, &delay_id).await?)))
    };
    let event = service.asking(homeserver.name(), event).await?;
    let (user_id, event) = event.ok_or(HomeserverRefusal::Forbidden)?;
    drop(token);
    service.check_url(&membership.url)?;
    // Whether it is somebody else's or none at all is nobody's business.
    let event = event.filter(|event| event.room_id == membership.room_id);
    let event = event.ok_or_else(|| invalid("delay_id is not a delayed event of yours in this room"))?;
    let key = JobKey { room: membership.alias(), identity: membership.identity(&user_id) };
    let room = key.room.clone();
    let server = homeserver.name().clone();
    let params = JobParams { key, server, delay_id, delay_timeout: event.delay };
    delegation.add(params, &user_id).await.map_err(|refused| match refused {
        AddError::BadTimeout => invalid("the delayed event's delay is too short or too long to delegate"),
        AddError::UserFull | AddError::Full => Refusal::TooManyDelays,
        AddError::ShuttingDown => Refusal::ShuttingDown,
    })?;
    tracing::info!(%room, "delayed leave taken over");
    Ok(())
}
