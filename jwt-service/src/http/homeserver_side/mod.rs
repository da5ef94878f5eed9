//! The endpoints that the newest MSC4195 gives to homeservers, at the paths under which a homeserver has them:
//! a reverse proxy in front of the homeserver hands these over to us.
#![allow(clippy::disallowed_methods, reason = "this is the shell: it owns the clock and the tasks")]

mod delegate_delayed_leave;
mod federation_get_token;
mod get_token;

use std::{future::Future, sync::Arc, time::SystemTime};

use axum::{
    Router,
    extract::{Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header},
    middleware::{from_fn_with_state, map_response},
    response::{IntoResponse, Response},
    routing::{MethodRouter, any},
};
use serde::Serialize;
use url::Url;

use super::{
    admit::causes,
    error::{HomeserverRefusal, Refusal},
    limits,
};
use crate::{
    Inner,
    homeserver_side::{AskError, BadBearer, Membership, RequestError, bearer},
    openid::{LookupError, ServerName},
    secret::Secret,
};

/// Each endpoint at its stable path and at the one before MSC4195 is accepted.
const GET_TOKEN: [&str; 2] = [
    "/_matrix/client/v1/rtc/livekit/get_token",
    "/_matrix/client/unstable/io.element.msc4195/rtc/livekit/get_token",
];
const DELEGATE_DELAYED_LEAVE: [&str; 2] = [
    "/_matrix/client/v1/rtc/livekit/delegate_delayed_leave",
    "/_matrix/client/unstable/io.element.msc4195/rtc/livekit/delegate_delayed_leave",
];
const FEDERATION_GET_TOKEN: [&str; 2] = [
    "/_matrix/federation/v1/rtc/livekit/get_token",
    "/_matrix/federation/unstable/io.element.msc4195/rtc/livekit/get_token",
];

/// What browsers need to see on every answer of the client-server API (client-server API, §Web Browser Clients),
/// refusals included.
const CORS: [(HeaderName, HeaderValue); 3] = [
    (header::ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("*")),
    (header::ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("GET, POST, PUT, DELETE, OPTIONS")),
    (
        header::ACCESS_CONTROL_ALLOW_HEADERS,
        HeaderValue::from_static("X-Requested-With, Content-Type, Authorization"),
    ),
];

/// The routes, if they are switched on.
pub(super) fn router(service: &Arc<Inner>) -> Router<Arc<Inner>> {
    let mut router = Router::new();
    let Some(homeserver) = &service.homeserver else { return router };
    let limited = |route: MethodRouter<Arc<Inner>>| {
        route
            .layer(from_fn_with_state(service.clone(), limits::per_address))
            .layer(map_response(async |answer| with_headers(answer, &[])))
    };
    let client = |route| limited(route).layer(map_response(async |answer| with_headers(answer, &CORS)));
    for path in GET_TOKEN {
        router = router.route(path, client(any(get_token::get_token)));
    }
    for path in DELEGATE_DELAYED_LEAVE {
        router = router.route(path, client(any(delegate_delayed_leave::delegate_delayed_leave)));
    }
    if homeserver.serves_others() {
        for path in FEDERATION_GET_TOKEN {
            let answer = move |state: State<Arc<Inner>>, request: Request| {
                federation_get_token::federation_get_token(state, path, request)
            };
            router = router.route(path, limited(any(answer)));
        }
    }
    router
}

/// The endpoint's name, for counts.
pub(super) fn endpoint(path: &str) -> Option<&'static str> {
    [
        (GET_TOKEN, "homeserver_get_token"),
        (DELEGATE_DELAYED_LEAVE, "homeserver_delegate_delayed_leave"),
        (FEDERATION_GET_TOKEN, "federation_get_token"),
    ]
    .into_iter()
    .find_map(|(paths, name)| paths.contains(&path).then_some(name))
}

fn with_headers(mut answer: Response, more: &[(HeaderName, HeaderValue)]) -> Response {
    let headers = answer.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.extend(more.iter().cloned());
    answer
}

/// What `method` gets before anything is read: `None` for POST, which goes on.
fn other_than_post(method: &Method) -> Option<Response> {
    match *method {
        Method::POST => None,
        Method::OPTIONS => Some(StatusCode::OK.into_response()),
        _ => Some(HomeserverRefusal::Method.into_response()),
    }
}

/// What a client needs to enter the SFU; it knows the URL already.
#[derive(Serialize)]
struct Token {
    jwt: String,
}

impl IntoResponse for Token {
    fn into_response(self) -> Response {
        match serde_json::to_string(&self) {
            Ok(body) => body.into_response(),
            Err(_) => Refusal::Internal.into_response(),
        }
    }
}

impl From<HomeserverRefusal> for Refusal {
    fn from(refusal: HomeserverRefusal) -> Self {
        Self::Homeserver(refusal)
    }
}

impl IntoResponse for HomeserverRefusal {
    fn into_response(self) -> Response {
        Refusal::from(self).into_response()
    }
}

impl From<RequestError> for Refusal {
    fn from(error: RequestError) -> Self {
        match error {
            RequestError::NotJson => Self::NotJson,
            RequestError::BadJson => HomeserverRefusal::BadJson.into(),
            RequestError::Missing(name) => HomeserverRefusal::MissingParam(name).into(),
            RequestError::Invalid(sentence) => HomeserverRefusal::InvalidParam(sentence).into(),
        }
    }
}

/// The access token, if there is one that can be somebody's.
fn access_token(headers: &HeaderMap) -> Result<Secret, Refusal> {
    bearer(headers).map_err(|bad| match bad {
        BadBearer::Missing => HomeserverRefusal::MissingToken.into(),
        BadBearer::Unusable => HomeserverRefusal::UnknownToken { soft_logout: false }.into(),
    })
}

/// What a client or another server is told when `server` gave us no answer. The log has the rest.
fn refusal(server: &ServerName, error: AskError) -> Refusal {
    match error {
        AskError::UnknownToken { soft_logout } => {
            return HomeserverRefusal::UnknownToken { soft_logout }.into();
        }
        AskError::Forbidden => return HomeserverRefusal::Forbidden.into(),
        _ => {}
    }
    tracing::warn!(server = server.as_str(), cause = causes(&error), "no answer from a homeserver");
    match error {
        AskError::Busy => Refusal::TooBusy,
        _ => HomeserverRefusal::Upstream.into(),
    }
}

impl Inner {
    /// Does `work`, which asks `server`, within the limits on lookups there.
    async fn asking<T>(
        &self,
        server: &ServerName,
        work: impl Future<Output = Result<T, AskError>>,
    ) -> Result<T, Refusal> {
        let mut lookup = self.limiter.lookup(server.as_str())?;
        // Waiting for a turn counts: the client must have its answer in time.
        let answer = tokio::time::timeout(self.settings.limits.lookup, async {
            if let Some(lookup) = &mut lookup {
                lookup.turn().await;
            }
            work.await
        })
        .await;
        answer.unwrap_or(Err(AskError::Lookup(LookupError::TimedOut))).map_err(|e| refusal(server, e))
    }

    /// Refuses a URL that is not our SFU's.
    fn check_url(&self, url: &str) -> Result<(), Refusal> {
        if is_same(url, &self.settings.livekit_url) {
            Ok(())
        } else {
            Err(HomeserverRefusal::InvalidParam("url is not an SFU of this homeserver").into())
        }
    }

    /// A token of our SFU for `user_id`, who is in the Matrix room; the SFU's room exists then. Users of other
    /// homeservers publish on their own homeservers' SFUs (MSC4195).
    async fn own_token(
        &self,
        membership: &Membership,
        user_id: &str,
        may_publish: bool,
    ) -> Result<Token, Refusal> {
        let (alias, identity) = (membership.alias(), membership.identity(user_id));
        let (now, lifetime) = (SystemTime::now(), self.settings.token_lifetime);
        let jwt = if may_publish {
            self.signer.join_from_homeserver(&identity, &alias, now, lifetime)
        } else {
            self.signer.listen(&identity, &alias, now, lifetime)
        };
        let jwt = jwt.map_err(|error| {
            tracing::error!(cause = causes(&error), "no token could be signed");
            Refusal::Internal
        })?;
        self.make_room(&alias).await?;
        // The Matrix ID stays out of the log: next to the identity it would undo the pseudonym.
        tracing::info!(%alias, may_publish, "token issued to a member of the room");
        Ok(Token { jwt })
    }
}

/// Whether both are the same SFU, written one way or the other.
fn is_same(url: &str, ours: &str) -> bool {
    let plain = |text: &str| {
        let url = Url::parse(text).ok()?;
        Some(url.as_str().trim_end_matches('/').to_owned())
    };
    url == ours || plain(url).is_some_and(|url| Some(url) == plain(ours))
}

#[cfg(any(test, feature = "fuzzing"))]
pub(super) mod properties;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_sfu_is_the_same_however_it_is_written() {
        let ours = "wss://SFU.hs.org/livekit";
        for same in [ours, "wss://sfu.hs.org/livekit/", "wss://sfu.hs.org:443/livekit"] {
            assert!(is_same(same, ours), "{same}");
        }
        for other in ["", "x", "ws://sfu.hs.org/livekit", "wss://sfu.hs.org", "wss://sfu.hs.org/livekit?a"] {
            assert!(!is_same(other, ours), "{other}");
        }
    }

    #[test]
    fn endpoints_are_counted_under_their_names() {
        assert_eq!(endpoint(GET_TOKEN[1]), Some("homeserver_get_token"));
        assert_eq!(endpoint(FEDERATION_GET_TOKEN[0]), Some("federation_get_token"));
        assert_eq!(endpoint("/_matrix/client/v1/rtc/livekit/other"), None);
    }
}
