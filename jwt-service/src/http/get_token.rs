//! `POST /get_token` (MSC4195): a token for one membership in one slot of one room.

use std::sync::Arc;

use axum::{
    extract::{Request, State},
    response::{IntoResponse, Response},
};

use super::{
    admit::{Admission, check_delay, check_token},
    error::Refusal,
    intake,
    json::{Body, GET_TOKEN},
    other_than_post,
};
use crate::{
    Inner,
    delegation::JobKey,
    identity::{ParticipantIdentity, RoomAlias},
    openid::VerifiedUser,
};

pub(super) async fn get_token(State(service): State<Arc<Inner>>, request: Request) -> Response {
    if let Some(answer) = other_than_post(request.method()) {
        return answer;
    }
    answer(&service, request).await.into_response()
}

async fn answer(service: &Inner, request: Request) -> Result<Admission<'_>, Refusal> {
    let (_place, body) = intake::take(service, request, GET_TOKEN).await?;
    check(&body)?;
    check_delay(&body)?;
    let (user, key) = service.member(&body).await?;
    service.admit(&user, &body, key.room, key.identity).await
}

impl Inner {
    /// The user who asks, if it is the one that the request claims, and what its membership is called on the
    /// SFU.
    pub(super) async fn member(&self, body: &Body) -> Result<(VerifiedUser, JobKey), Refusal> {
        let user = self.verify(&body.openid_token).await?;
        if body.member.claimed_user_id != user.user_id() {
            let server_name = &body.openid_token.matrix_server_name;
            tracing::warn!(?server_name, "the token belongs to another user");
            return Err(Refusal::Unauthorized);
        }
        let room = RoomAlias::of_slot(&body.room_id, &body.slot_id);
        let member = &body.member;
        let identity = ParticipantIdentity::of_member(user.user_id(), &member.claimed_device_id, &member.id);
        Ok((user, JobKey { room, identity }))
    }
}

/// What `/get_token` and `/delegate_delayed_leave` refuse without asking anybody, in the order that clients
/// know; the delay parameters come after it.
pub(super) fn check(body: &Body) -> Result<(), Refusal> {
    if body.room_id.is_empty() || body.slot_id.is_empty() {
        return Err(Refusal::MissingParameter("room_id and slot_id are needed"));
    }
    let member = &body.member;
    if member.id.is_empty() || member.claimed_user_id.is_empty() || member.claimed_device_id.is_empty() {
        return Err(Refusal::MissingParameter("member needs id, claimed_user_id and claimed_device_id"));
    }
    check_token(&body.openid_token)
}
