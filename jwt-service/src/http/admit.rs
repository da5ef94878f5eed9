//! What both token endpoints do once a request is complete: verify the user, sign the token, make the room.
#![allow(clippy::disallowed_methods, reason = "this is the shell: it owns the clock and the tasks")]

use std::time::{Duration, Instant, SystemTime};

use axum::response::{IntoResponse, Response};
use serde::Serialize;

use super::{
    error::Refusal,
    json::{Body, OpenIdToken},
};
use crate::{
    Inner,
    config::RestrictedUsers,
    delegation::{AddError, DelayId, Delegation, JobKey, JobParams},
    identity::{ParticipantIdentity, RoomAlias},
    openid::{LookupError, ServerName, VerifiedUser},
};

/// How much of a server name is logged, in bytes (Matrix, §Appendices, Server Name).
const LONGEST_NAME: usize = 255;

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
        // Any text of a stranger's; no server's name is longer.
        let shown = &server_name[..server_name.floor_char_boundary(LONGEST_NAME)];
        if !self.settings.admits(server_name) {
            tracing::info!(server_name = ?shown, "users of this homeserver are not admitted");
            return Err(Refusal::ServerNotAllowed);
        }
        let mut lookup = self.limiter.lookup(server_name)?;
        let began = Instant::now();
        // Waiting for a turn counts: the client must have its answer in time.
        let verified = tokio::time::timeout(self.settings.limits.lookup, async {
            if let Some(lookup) = &mut lookup {
                lookup.turn().await;
            }
            self.verifier.verify(server_name, &token.access_token).await
        })
        .await
        .unwrap_or(Err(LookupError::TimedOut));
        self.metrics.lookup(&verified, began.elapsed());
        verified.map_err(|error| {
            let cause = causes(&error);
            tracing::warn!(server_name = ?shown, cause, "OpenID token not accepted");
            Refusal::Unauthorized
        })
    }

    /// Admits a verified user of `server_name` to `alias` as `identity`, and takes the delayed leave over that
    /// comes with the request.
    pub(super) async fn admit(
        &self,
        user: &VerifiedUser,
        body: &Body,
        alias: RoomAlias,
        identity: ParticipantIdentity,
    ) -> Result<Admission<'_>, Refusal> {
        let server_name = body.openid_token.matrix_server_name.as_str();
        let full_access = self.settings.full_access.includes(server_name);
        let delegated = if body.delay_id.is_empty() {
            None
        } else {
            // Clients take this answer as "not here" and ask again without a delayed event.
            let delegation = self.delegation.as_ref().filter(|_| full_access);
            let delegation = delegation.ok_or(Refusal::DelegationNotOffered)?;
            let key = JobKey { room: alias.clone(), identity: identity.clone() };
            Some((delegation, job_params(body, key)?))
        };
        let settings = &self.settings;
        let (now, lifetime) = (SystemTime::now(), settings.token_lifetime);
        let jwt = if full_access || settings.restricted_users == RestrictedUsers::Publish {
            self.signer.join(&identity, &alias, now, lifetime)
        } else {
            self.signer.listen(&identity, &alias, now, lifetime)
        };
        let jwt = jwt.map_err(|error| {
            tracing::error!(cause = causes(&error), "no token could be signed");
            Refusal::Internal
        })?;
        if let Some((delegation, params)) = &delegated {
            // Before the room is made: a request that fails for this leaves nothing behind.
            find_client_api(delegation, &params.server).await?;
        }
        if full_access {
            self.make_room(&alias).await?;
        }
        let with_leave = delegated.is_some();
        if let Some((delegation, params)) = delegated {
            delegation.add(params, user.user_id()).await.map_err(|refused| match refused {
                AddError::BadTimeout => Refusal::BadDelay,
                // The call can go on without us keeping the delayed event alive.
                AddError::UserFull | AddError::Full => Refusal::DelegationNotOffered,
                AddError::ShuttingDown => Refusal::ShuttingDown,
            })?;
        }
        // The Matrix ID stays out of the log: next to the identity it would undo the pseudonym.
        tracing::info!(server_name, %alias, full_access, with_leave, "token issued");
        Ok(Admission { url: &settings.livekit_url, jwt })
    }
}

impl Inner {
    /// Makes the room exist on the SFU.
    pub(super) async fn make_room(&self, alias: &RoomAlias) -> Result<(), Refusal> {
        let room = self.sfu.create_room(alias.as_str()).await.map_err(|error| {
            tracing::error!(cause = causes(&error), %alias, "no room on the SFU");
            Refusal::Internal
        })?;
        tracing::debug!(%alias, sid = room.sid, "room is there");
        Ok(())
    }
}

/// The job that a request with complete delay parameters asks for.
pub(super) fn job_params(body: &Body, key: JobKey) -> Result<JobParams, Refusal> {
    let server: ServerName =
        body.openid_token.matrix_server_name.parse().map_err(|_| Refusal::Unauthorized)?;
    let delay_id = DelayId::new(body.delay_id.clone()).map_err(|_| Refusal::BadDelay)?;
    let milliseconds = u64::try_from(body.delay_timeout).map_err(|_| Refusal::DelayIncomplete)?;
    Ok(JobParams { key, server, delay_id, delay_timeout: Duration::from_millis(milliseconds) })
}

/// Makes sure that we shall find the homeserver when its delayed event is due.
pub(super) async fn find_client_api(delegation: &Delegation, server: &ServerName) -> Result<(), Refusal> {
    delegation.resolve(server).await.map(drop).map_err(|error| {
        tracing::warn!(server = server.as_str(), cause = causes(&error), "client-server API not found");
        Refusal::NoClientApi
    })
}

/// An error and what lies beneath it, in one line.
pub(crate) fn causes(error: &dyn std::error::Error) -> String {
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
