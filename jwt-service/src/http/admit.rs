//! What both token endpoints do once a request is complete: verify the user, sign the token, make the room.
#![allow(clippy::disallowed_methods, reason = "this is the shell: it owns the clock and the tasks")]

use std::time::SystemTime;

use axum::response::{IntoResponse, Response};
use serde::Serialize;

use super::{
    error::Refusal,
    json::{Body, OpenIdToken},
};
use crate::{
    Inner,
    identity::{ParticipantIdentity, RoomAlias},
    openid::VerifiedUser,
};

/// What a client needs to enter the SFU.
#[derive(Serialize)]
pub(super) struct Admission<'a> {
    url: &'a str,
    jwt: String,
}

impl IntoResponse for Admission<'_> {
    fn into_response(self) -> Response {
        match serde_json::to_string(&self) {
            Ok(body) => body.into_response(),
            Err(_) => Refusal::Internal.into_response(),
        }
    }
}

/// The checks of the OpenID token's form.
pub(super) fn check_token(token: &OpenIdToken) -> Result<(), Refusal> {
    if token.access_token.is_empty() || token.matrix_server_name.is_empty() {
        return Err(Refusal::MissingParameter("openid_token needs access_token and matrix_server_name"));
    }
    Ok(())
}

/// Delay parameters come all or not at all. A timeout of zero or less is none.
pub(super) fn check_delay(body: &Body) -> Result<(), Refusal> {
    if body.delay_id.is_empty() == (body.delay_timeout > 0) { Err(Refusal::DelayIncomplete) } else { Ok(()) }
}

impl Inner {
    /// Whom the homeserver says the token belongs to.
    pub(super) async fn verify(&self, token: &OpenIdToken) -> Result<VerifiedUser, Refusal> {
        let server_name = token.matrix_server_name.as_str();
        self.verifier.verify(server_name, &token.access_token).await.map_err(|error| {
            let cause = causes(&error);
            tracing::warn!(?server_name, cause, "OpenID token not accepted");
            Refusal::Unauthorized
        })
    }

    /// Admits a verified user of `server_name` to `alias` as `identity`.
    pub(super) async fn admit(
        &self,
        server_name: &str,
        body: &Body,
        alias: &RoomAlias,
        identity: &ParticipantIdentity,
    ) -> Result<Admission<'_>, Refusal> {
        if !body.delay_id.is_empty() {
            // Clients take this answer as "not here" and ask again without a delayed event.
            return Err(Refusal::DelegationNotOffered);
        }
        let settings = &self.settings;
        let jwt = self.signer.join(identity, alias, SystemTime::now(), settings.token_lifetime).map_err(
            |error| {
                tracing::error!(cause = causes(&error), "no token could be signed");
                Refusal::Internal
            },
        )?;
        let full_access = settings.full_access.includes(server_name);
        if full_access {
            let room = self.sfu.create_room(alias.as_str()).await.map_err(|error| {
                tracing::error!(cause = causes(&error), %alias, "no room on the SFU");
                Refusal::Internal
            })?;
            tracing::debug!(%alias, sid = room.sid, "room is there");
        }
        // The Matrix ID stays out of the log: next to the identity it would undo the pseudonym.
        tracing::info!(server_name, %alias, full_access, "token issued");
        Ok(Admission { url: &settings.livekit_url, jwt })
    }
}

/// An error and what lies beneath it, in one line.
fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        next = cause.source();
    }
    text
}
