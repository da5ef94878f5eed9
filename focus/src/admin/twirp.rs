//! `POST /twirp/livekit.RoomService/<Method>`, with protobuf or JSON bodies.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, Path, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::any;
use axum::{Json, Router};
use livekit_protocol as proto;
use prost::Message;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::observe::Counters;
use crate::room::{AdminError, Now, ParticipantChange, RoomOptions, Rooms};
use crate::signal::{RoomHandle, bearer, now};
use crate::token::{Keys, VideoGrant};

/// Largest request, in bytes.
const MAX_BODY: usize = 10 * 1024 * 1024;

#[derive(Clone)]
struct Admin {
    rooms: RoomHandle,
    keys: Arc<Keys>,
    counters: Arc<Counters>,
}

/// The RoomService.
pub(crate) fn router(rooms: RoomHandle, keys: Arc<Keys>, counters: Arc<Counters>) -> Router {
    Router::new()
        .route("/twirp/livekit.RoomService/{method}", any(call))
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .with_state(Admin { rooms, keys, counters })
}

async fn call(
    State(admin): State<Admin>,
    Path(method): Path<String>,
    http_method: axum::http::Method,
    headers: HeaderMap,
    body: Result<Bytes, axum::extract::rejection::BytesRejection>,
) -> Response {
    let result = match body {
        Ok(body) => admin.dispatch(&method, &http_method, &headers, body).await,
        // 413, as the reference answers it: not a Twirp error.
        Err(rejection) => return rejection.into_response(),
    };
    result.unwrap_or_else(|error| {
        admin.counters.refused_admin.add(1);
        tracing::info!(method, code = ?error.code, msg = %error.msg, "an admin request was refused");
        error.into_response()
    })
}

impl Admin {
    async fn dispatch(
        &self,
        method: &str,
        http_method: &axum::http::Method,
        headers: &HeaderMap,
        body: Bytes,
    ) -> Result<Response, TwirpError> {
        if http_method != axum::http::Method::POST {
            return Err(TwirpError::bad_route("a Twirp method is called with POST"));
        }
        let call = Call { admin: self, format: Format::of(headers)?, grant: self.grant(headers)?, body };
        match method {
            "CreateRoom" => {
                let may = call.grant.room_create;
                call.answer(may, |rooms, now, request: proto::CreateRoomRequest| {
                    let seconds = |seconds: u32| Duration::from_secs(u64::from(seconds));
                    let options = RoomOptions {
                        empty_timeout: seconds(request.empty_timeout),
                        departure_timeout: seconds(request.departure_timeout),
                        max_participants: request.max_participants,
                        metadata: request.metadata,
                    };
                    rooms.create_room(now, &request.name, options)
                })
                .await
            }
            "ListRooms" => {
                let may = call.grant.room_list;
                call.answer(may, |rooms, _, request: proto::ListRoomsRequest| {
                    Ok(proto::ListRoomsResponse { rooms: rooms.list_rooms(&request.names) })
                })
                .await
            }
            "DeleteRoom" => {
                let may = call.grant.room_create;
                call.answer(may, |rooms, now, request: proto::DeleteRoomRequest| {
                    rooms.delete_room(now, &request.room)?;
                    Ok(proto::DeleteRoomResponse {})
                })
                .await
            }
            "UpdateRoomMetadata" => {
                call.manage(|rooms, now, request: proto::UpdateRoomMetadataRequest| {
                    rooms.update_room_metadata(now, &request.room, request.metadata)
                })
                .await
            }
            "ListParticipants" => {
                call.manage(|rooms, _, request: proto::ListParticipantsRequest| {
                    let participants = rooms.list_participants(&request.room)?;
                    Ok(proto::ListParticipantsResponse { participants })
                })
                .await
            }
            "GetParticipant" => {
                call.manage(|rooms, _, request: proto::RoomParticipantIdentity| {
                    rooms.participant(&request.room, &request.identity)
                })
                .await
            }
            "RemoveParticipant" => {
                call.manage(|rooms, now, request: proto::RoomParticipantIdentity| {
                    rooms.remove_participant(now, &request.room, &request.identity)?;
                    Ok(proto::RemoveParticipantResponse {})
                })
                .await
            }
            "MutePublishedTrack" => {
                call.manage(|rooms, now, request: proto::MuteRoomTrackRequest| {
                    let (room, identity) = (&request.room, &request.identity);
                    let track = rooms.mute_track(now, room, identity, &request.track_sid, request.muted)?;
                    Ok(proto::MuteRoomTrackResponse { track: Some(track) })
                })
                .await
            }
            "UpdateParticipant" => {
                call.manage(|rooms, now, request: proto::UpdateParticipantRequest| {
                    let change = ParticipantChange {
                        name: request.name,
                        metadata: request.metadata,
                        attributes: request.attributes,
                        permission: request.permission,
                    };
                    rooms.update_participant(now, &request.room, &request.identity, change)
                })
                .await
            }
            "UpdateSubscriptions" => {
                call.manage(|rooms, now, request: proto::UpdateSubscriptionsRequest| {
                    let update = proto::UpdateSubscription {
                        track_sids: request.track_sids,
                        subscribe: request.subscribe,
                        participant_tracks: request.participant_tracks,
                    };
                    rooms.update_subscriptions(now, &request.room, &request.identity, &update)?;
                    Ok(proto::UpdateSubscriptionsResponse {})
                })
                .await
            }
            "SendData" => {
                call.manage(|rooms, _, request: proto::SendDataRequest| {
                    rooms.send_data(request)?;
                    Ok(proto::SendDataResponse {})
                })
                .await
            }
            "PerformRpc" | "ForwardParticipant" | "MoveParticipant" => {
                Err(TwirpError::new(Code::Unimplemented, "this server does not offer this method"))
            }
            _ => Err(TwirpError::bad_route("the RoomService has no such method")),
        }
    }

    fn grant(&self, headers: &HeaderMap) -> Result<VideoGrant, TwirpError> {
        let refuse = |msg: String| TwirpError { code: Code::Unauthenticated, msg };
        let token = bearer(headers)
            .map_err(|refusal| refuse(refusal.to_string()))?
            .ok_or_else(|| refuse("no access token: send one as `Authorization: Bearer`".to_owned()))?;
        let claims = self.keys.verify(token, now().unix).map_err(|error| refuse(error.to_string()))?;
        Ok(claims.video)
    }
}

/// One call, authenticated.
struct Call<'a> {
    admin: &'a Admin,
    format: Format,
    grant: VideoGrant,
    body: Bytes,
}

impl Call<'_> {
    /// A call that needs `roomAdmin` for the room that it is about.
    async fn manage<Q, A>(
        self,
        act: impl FnOnce(&mut Rooms, Now, Q) -> Result<A, AdminError> + Send + 'static,
    ) -> Result<Response, TwirpError>
    where
        Q: Message + Default + DeserializeOwned + AboutRoom + Send + 'static,
        A: Message + Serialize + Send + 'static,
    {
        let request: Q = self.format.decode(self.body.clone())?;
        // An empty room is nobody's, whatever the token says.
        let may = self.grant.room_admin && !request.room().is_empty() && self.grant.room == request.room();
        self.answer(may, act).await
    }

    async fn answer<Q, A>(
        self,
        may: bool,
        act: impl FnOnce(&mut Rooms, Now, Q) -> Result<A, AdminError> + Send + 'static,
    ) -> Result<Response, TwirpError>
    where
        Q: Message + Default + DeserializeOwned + Send + 'static,
        A: Message + Serialize + Send + 'static,
    {
        if !may {
            // The reference answers unauthenticated, not permission_denied.
            return Err(TwirpError::new(
                Code::Unauthenticated,
                "the access token does not grant this method for this room",
            ));
        }
        let request: Q = self.format.decode(self.body)?;
        let answer = self
            .admin
            .rooms
            .call(move |rooms, now| act(rooms, now, request))
            .await
            .map_err(|stopped| TwirpError { code: Code::Unavailable, msg: stopped.to_string() })??;
        self.format.encode(&answer)
    }
}

/// A request that names its room.
trait AboutRoom {
    fn room(&self) -> &str;
}

macro_rules! about_room {
    ($($request:ident),*) => {
        $(impl AboutRoom for proto::$request {
            fn room(&self) -> &str {
                &self.room
            }
        })*
    };
}

about_room!(
    UpdateRoomMetadataRequest,
    ListParticipantsRequest,
    RoomParticipantIdentity,
    MuteRoomTrackRequest,
    UpdateParticipantRequest,
    UpdateSubscriptionsRequest,
    SendDataRequest
);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    Protobuf,
    Json,
}

impl Format {
    fn of(headers: &HeaderMap) -> Result<Self, TwirpError> {
        let value =
            headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
        match value.split(';').next().unwrap_or_default().trim().to_ascii_lowercase().as_str() {
            "application/protobuf" => Ok(Self::Protobuf),
            "application/json" => Ok(Self::Json),
            _ => Err(TwirpError::bad_route(
                "the Content-Type must be application/protobuf or application/json",
            )),
        }
    }

    fn decode<Q: Message + Default + DeserializeOwned>(self, body: Bytes) -> Result<Q, TwirpError> {
        let malformed = |error: &dyn std::fmt::Display| TwirpError {
            code: Code::Malformed,
            msg: format!("the request's body cannot be read: {error}"),
        };
        match self {
            Self::Protobuf => Q::decode(body).map_err(|error| malformed(&error)),
            Self::Json => serde_json::from_slice(&body).map_err(|error| malformed(&error)),
        }
    }

    fn encode<A: Message + Serialize>(self, answer: &A) -> Result<Response, TwirpError> {
        match self {
            Self::Protobuf => {
                Ok(([(header::CONTENT_TYPE, "application/protobuf")], answer.encode_to_vec()).into_response())
            }
            Self::Json => match serde_json::to_vec(answer) {
                Ok(body) => Ok(([(header::CONTENT_TYPE, "application/json")], body).into_response()),
                Err(error) => Err(TwirpError {
                    code: Code::Internal,
                    msg: format!("the server's answer could not be written: {error}"),
                }),
            },
        }
    }
}

/// Twirp's error codes, as far as they are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Code {
    BadRoute,
    Malformed,
    InvalidArgument,
    Unauthenticated,
    NotFound,
    FailedPrecondition,
    Internal,
    Unimplemented,
    Unavailable,
}

impl Code {
    fn status(self) -> StatusCode {
        match self {
            Self::Malformed | Self::InvalidArgument => StatusCode::BAD_REQUEST,
            Self::Unauthenticated => StatusCode::UNAUTHORIZED,
            Self::BadRoute | Self::NotFound => StatusCode::NOT_FOUND,
            Self::FailedPrecondition => StatusCode::PRECONDITION_FAILED,
            Self::Internal => StatusCode::INTERNAL_SERVER_ERROR,
            Self::Unimplemented => StatusCode::NOT_IMPLEMENTED,
            Self::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        }
    }
}

#[derive(Debug, Serialize)]
struct TwirpError {
    code: Code,
    msg: String,
}

impl TwirpError {
    fn new(code: Code, msg: &str) -> Self {
        Self { code, msg: msg.to_owned() }
    }

    fn bad_route(msg: &str) -> Self {
        Self::new(Code::BadRoute, msg)
    }
}

impl From<AdminError> for TwirpError {
    fn from(error: AdminError) -> Self {
        let code = match error {
            AdminError::NoRoom | AdminError::NoParticipant | AdminError::NoTrack => Code::NotFound,
            AdminError::BadName | AdminError::TooLarge | AdminError::BadData => Code::InvalidArgument,
            AdminError::Unmute => Code::FailedPrecondition,
        };
        Self { code, msg: error.to_string() }
    }
}

impl IntoResponse for TwirpError {
    fn into_response(self) -> Response {
        (self.code.status(), Json(self)).into_response()
    }
}
