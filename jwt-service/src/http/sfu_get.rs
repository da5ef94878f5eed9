//! `POST /sfu/get`: the older endpoint, one call per room and a readable identity. Deployed clients still use
//! it.

use std::sync::Arc;

use axum::{
    extract::{Request, State},
    response::{IntoResponse, Response},
};

use super::{
    admit::{Admission, check_delay, check_token},
    error::Refusal,
    intake,
    json::SFU_GET,
    other_than_post,
};
use crate::{
    Inner,
    identity::{LEGACY_SLOT, ParticipantIdentity, RoomAlias},
};

pub(super) async fn sfu_get(State(service): State<Arc<Inner>>, request: Request) -> Response {
    if let Some(answer) = other_than_post(request.method()) {
        return answer;
    }
    answer(&service, request).await.into_response()
}

async fn answer(service: &Inner, request: Request) -> Result<Admission<'_>, Refusal> {
    let (_place, body) = intake::take(service, request, SFU_GET).await?;
    if body.room.is_empty() {
        return Err(Refusal::MissingParameter("room is needed"));
    }
    check_token(&body.openid_token)?;
    check_delay(&body)?;
    // The user is not known yet, but whether the device can be mistaken for another user's does not depend on
    // it.
    if ParticipantIdentity::legacy("", &body.device_id).is_none() {
        return Err(Refusal::AmbiguousDevice);
    }
    let user = service.verify(&body.openid_token).await?;
    let alias = RoomAlias::of_slot(&body.room, LEGACY_SLOT);
    let identity =
        ParticipantIdentity::legacy(user.user_id(), &body.device_id).ok_or(Refusal::AmbiguousDevice)?;
    service.admit(&user, &body, alias, identity).await
}
