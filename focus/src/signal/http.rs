//! The HTTP surface of signalling: health, `/rtc`, `/rtc/validate`.
//!
//! A session is started before 101 is answered, so that every failure is an HTTP status: clients map those to what
//! they show.
#![allow(clippy::disallowed_methods, reason = "this is the shell: it owns the clock and the tasks")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::ws::WebSocketUpgrade;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::{RawQuery, State};
use axum::http::{HeaderMap, HeaderName, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tower_http::cors::{AllowHeaders, Any, CorsLayer};

use super::manager::{RoomHandle, Stopped, now};
use super::query::{JoinQuery, QueryError, access_token};
use super::socket;
use crate::observe::{Counters, Heartbeat};
use crate::room::{Join, JoinError, MIN_PROTOCOL, protocol_served};
use crate::token::{Keys, TokenError};

/// What the endpoints share.
#[derive(Clone)]
pub(crate) struct Surface {
    pub(crate) rooms: RoomHandle,
    pub(crate) keys: Arc<Keys>,
    pub(crate) heartbeat: Arc<Heartbeat>,
    pub(crate) counters: Arc<Counters>,
}

/// Signalling, health and `more` under one CORS policy. Everything else is 404.
pub(crate) fn router(surface: Surface, more: Router) -> Router {
    Router::new()
        .route("/", get(health))
        .route("/rtc", get(rtc))
        .route("/rtc/validate", get(validate))
        .with_state(surface)
        .merge(more)
        .fallback(async || StatusCode::NOT_FOUND)
        .layer(cors())
}

/// Any origin, any header: browsers reach the SFU from whatever page the client is. Error answers carry the
/// headers too, else a 401 would look like a broken network.
fn cors() -> CorsLayer {
    CorsLayer::new()
        .allow_origin(Any)
        .allow_headers(AllowHeaders::mirror_request())
        .allow_methods([
            Method::OPTIONS,
            Method::HEAD,
            Method::GET,
            Method::POST,
            Method::PATCH,
            Method::DELETE,
        ])
        .expose_headers([HeaderName::from_static("retry-after")])
        .max_age(Duration::from_secs(86_400))
}

async fn health(State(surface): State<Surface>) -> Response {
    if surface.heartbeat.alive(Instant::now()) {
        (StatusCode::OK, "OK").into_response()
    } else {
        (StatusCode::NOT_ACCEPTABLE, "the room manager or the media plane does not respond").into_response()
    }
}

async fn validate(State(surface): State<Surface>, headers: HeaderMap, RawQuery(query): RawQuery) -> Response {
    match admit(&surface, &headers, query.as_deref()).await {
        Ok(Admission { v1: true, .. }) => StatusCode::NOT_FOUND.into_response(),
        Ok(_) => (StatusCode::OK, "success").into_response(),
        Err(refusal) => refusal.into_response(),
    }
}

async fn rtc(
    State(surface): State<Surface>,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
    headers: HeaderMap,
    RawQuery(query): RawQuery,
) -> Response {
    // Not a WebSocket: nothing is here.
    let Ok(upgrade) = upgrade else { return StatusCode::NOT_FOUND.into_response() };
    let upgrade = upgrade.max_message_size(socket::MAX_MESSAGE).max_frame_size(socket::MAX_MESSAGE);
    let admission = match admit(&surface, &headers, query.as_deref()).await {
        Ok(Admission { v1: true, .. }) => return StatusCode::NOT_FOUND.into_response(),
        Ok(admission) => admission,
        Err(refusal) => {
            surface.counters.refused_joins.add(1);
            tracing::info!(%refusal, "a client was refused");
            return refusal.into_response();
        }
    };
    if admission.resume {
        return upgrade.on_upgrade(socket::refuse_resume);
    }
    match surface.rooms.join(admission.join).await {
        Ok(joined) => upgrade.on_upgrade(move |socket| socket::serve(socket, joined, surface.rooms)),
        Err(error) => Refusal::from(error).into_response(),
    }
}

struct Admission {
    join: Join,
    resume: bool,
    v1: bool,
}

/// Everything that can be checked before a session starts, in the order that clients rely on.
async fn admit(surface: &Surface, headers: &HeaderMap, query: Option<&str>) -> Result<Admission, Refusal> {
    let query = query.unwrap_or_default();
    let token = match bearer(headers)? {
        Some(token) => token.to_owned(),
        None => access_token(query).ok_or(Refusal::NoToken)?,
    };
    let mut claims = surface.keys.verify(&token, now().unix)?;
    if !claims.video.room_join {
        return Err(Refusal::NoJoin);
    }
    let query = JoinQuery::parse(query)?;
    if query.publish {
        return Err(Refusal::PublishOnly);
    }
    if !query.join_request && !protocol_served(query.client.protocol) {
        return Err(Refusal::OldProtocol);
    }
    if !query.attributes.is_empty() {
        if !claims.video.can_update_own_metadata.unwrap_or(false) {
            return Err(Refusal::Attributes);
        }
        claims.attributes.extend(query.attributes.into_iter().filter(|(_, value)| !value.is_empty()));
    }
    let claims = surface.rooms.call(move |rooms, _| rooms.may_join(&claims).map(|()| claims)).await??;
    Ok(Admission {
        join: Join {
            claims,
            client: query.client,
            auto_subscribe: query.auto_subscribe,
            adaptive_stream: query.adaptive_stream,
        },
        resume: query.reconnect,
        v1: query.join_request,
    })
}

/// The token of an `Authorization` header; `None` without such a header.
pub(crate) fn bearer(headers: &HeaderMap) -> Result<Option<&str>, Refusal> {
    let Some(value) = headers.get(header::AUTHORIZATION) else { return Ok(None) };
    let token = value.to_str().ok().and_then(|value| value.strip_prefix("Bearer "));
    token.map(Some).ok_or(Refusal::NoBearer)
}

/// Why a request was refused: the client's fault, but for the last.
#[derive(Debug, Clone, Copy, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("no access token: send one as `Authorization: Bearer` or as the query parameter access_token")]
    NoToken,
    #[error("the Authorization header does not begin with `Bearer `")]
    NoBearer,
    #[error(transparent)]
    Token(#[from] TokenError),
    #[error("the access token does not allow to join a room (roomJoin)")]
    NoJoin,
    #[error("the access token does not allow to set attributes (canUpdateOwnMetadata)")]
    Attributes,
    #[error(transparent)]
    Query(#[from] QueryError),
    #[error("the client's signalling protocol is too old: {MIN_PROTOCOL} is the oldest that is served")]
    OldProtocol,
    #[error("publish-only connections are not supported")]
    PublishOnly,
    #[error(transparent)]
    Join(#[from] JoinError),
    #[error(transparent)]
    Stopped(#[from] Stopped),
}

impl Refusal {
    fn status(&self) -> StatusCode {
        match self {
            Self::NoToken | Self::NoBearer | Self::Token(_) | Self::NoJoin | Self::Attributes => {
                StatusCode::UNAUTHORIZED
            }
            Self::Query(_)
            | Self::OldProtocol
            | Self::PublishOnly
            | Self::Join(JoinError::BadName | JoinError::TooLarge) => StatusCode::BAD_REQUEST,
            Self::Join(JoinError::NoRoom) => StatusCode::NOT_FOUND,
            Self::Join(JoinError::RoomFull) => StatusCode::INTERNAL_SERVER_ERROR,
            Self::Join(JoinError::ShuttingDown) | Self::Stopped(_) => StatusCode::SERVICE_UNAVAILABLE,
        }
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (self.status(), self.to_string()).into_response()
    }
}
