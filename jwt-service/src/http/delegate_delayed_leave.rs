//! `POST /delegate_delayed_leave` (MSC4195): takes over the delayed leave of a member that has its token
//! already.
//!
//! A service without a store does not offer this. Clients probe it without credentials and take 404 to mean
//! exactly that, and anything else to mean that it is offered.

use std::sync::Arc;

use axum::{
    extract::{Request, State},
    http::{Method, StatusCode},
    response::{IntoResponse, Response},
};

use super::{
    admit::{find_client_api, job_params},
    error::Refusal,
    get_token::check,
    intake,
    json::GET_TOKEN,
    other_than_post,
};
use crate::{
    Inner,
    delegation::{AddError, Delegation},
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
    let (_place, body) = intake::take(service, request, GET_TOKEN).await?;
    check(&body)?;
    if body.delay_id.is_empty() || body.delay_timeout <= 0 {
        return Err(Refusal::DelayIncomplete);
    }
    let (user, key) = service.member(&body).await?;
    if !service.settings.full_access.includes(&body.openid_token.matrix_server_name) {
        return Err(Refusal::DelegationForbidden);
    }
    let params = job_params(&body, key)?;
    find_client_api(delegation, &params.server).await?;
    let room = params.key.room.clone();
    delegation.add(params, user.user_id()).await.map_err(|refused| match refused {
        AddError::BadTimeout => Refusal::BadDelay,
        AddError::UserFull | AddError::Full => Refusal::TooManyDelays,
        AddError::ShuttingDown => Refusal::ShuttingDown,
    })?;
    tracing::info!(%room, "delayed leave taken over");
    Ok(())
}
