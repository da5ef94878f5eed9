//! The calls: to our homeserver, to find out who somebody is and whether they are in a room, and to other
//! homeservers, for their keys and for tokens of their SFUs.
#![allow(clippy::disallowed_methods, reason = "this is the shell: it owns the clock and the tasks")]

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use hyper::{Method, Request, StatusCode};
use tokio::sync::{Mutex as AsyncMutex, Semaphore};
use url::Url;

use super::{
    HomeserverSide, Membership, RemoteToken,
    answers::{self, DelayedEvent},
    request::domain,
    server_keys::{Cached, KeyCache, KeysError, MAX_DOCUMENT, PublishedKeys},
    x_matrix::Credentials,
};
use crate::{
    delegation::DelayId,
    http::causes,
    openid::{ClientAnswer, FederationRequest, LookupError, ServerName, Verifier},
    secret::Secret,
};

/// The largest answer about one user, one event or one token.
const MAX_ANSWER: usize = 128 * 1024;
/// The largest list of members: a room of a hundred thousand.
const MAX_MEMBERS: usize = 16 * 1024 * 1024;
/// Lists of members that are read at a time, because each takes memory here and work at the homeserver.
const LISTS: usize = 4;
/// Time to fetch a server's keys: less than its caller has, so that a failure is remembered and not repeated for
/// every request.
const KEYS_TIME: Duration = Duration::from_secs(10);
/// The endpoint's path at other servers: the one before MSC4195 is accepted first, for that is what there is.
const GET_TOKEN: [&str; 2] = [
    "/_matrix/federation/unstable/io.element.msc4195/rtc/livekit/get_token",
    "/_matrix/federation/v1/rtc/livekit/get_token",
];

/// Our homeserver, and through it the others.
pub(crate) struct Homeserver {
    side: HomeserverSide,
    verifier: Arc<Verifier>,
    keys: Mutex<KeyCache>,
    /// Whose keys are being fetched: whoever wants them too waits for that answer.
    fetching: Mutex<HashMap<String, Arc<AsyncMutex<()>>>>,
    lists: Semaphore,
}

impl Homeserver {
    pub(crate) fn new(side: HomeserverSide, verifier: Arc<Verifier>) -> Self {
        Self {
            side,
            verifier,
            keys: Mutex::default(),
            fetching: Mutex::default(),
            lists: Semaphore::new(LISTS),
        }
    }

    /// Our server name.
    pub(crate) fn name(&self) -> &ServerName {
        &self.side.name
    }

    /// Whether users of other homeservers are served.
    pub(crate) fn serves_others(&self) -> bool {
        self.side.application_service_token.is_some()
    }

    /// Whose access token `token` is.
    pub(crate) async fn whoami(&self, token: &Secret) -> Result<String, AskError> {
        let answer = self.ask(&["_matrix", "client", "v3", "account", "whoami"], token, MAX_ANSWER).await?;
        match answer.status {
            StatusCode::OK => {
                let user_id = answers::whoami(&answer.body).ok_or(AskError::NotAnAnswer)?;
                if domain(&user_id) == Some(self.side.name.as_str()) {
                    Ok(user_id)
                } else {
                    Err(AskError::AnotherHomeserver)
                }
            }
            StatusCode::FORBIDDEN => Err(AskError::Forbidden),
            _ => Err(refused(&answer)),
        }
    }

    /// Whether `user_id`, whose token `token` is, is joined to `room_id`.
    pub(crate) async fn is_joined(
        &self,
        token: &Secret,
        room_id: &str,
        user_id: &str,
    ) -> Result<bool, AskError> {
        // With the user's own token: the homeserver shows somebody who has left the state at that time.
        let path = ["_matrix", "client", "v3", "rooms", room_id, "state", "m.room.member", user_id];
        let answer = self.ask(&path, token, MAX_ANSWER).await?;
        match answer.status {
            StatusCode::OK => Ok(answers::is_join(&answer.body)),
            StatusCode::FORBIDDEN | StatusCode::NOT_FOUND => Ok(false),
            _ => Err(refused(&answer)),
        }
    }

    /// Whether `user_id`, who may be another homeserver's, is joined to `room_id`. Asked as the application
    /// service, which sees rooms that have at least one of our homeserver's users in them.
    pub(crate) async fn has_member(&self, room_id: &str, user_id: &str) -> Result<bool, AskError> {
        let token = self.side.application_service_token.as_ref().ok_or(AskError::NotOffered)?;
        let _place = self.lists.acquire().await.map_err(|_| AskError::NotAnAnswer)?;
        let path = ["_matrix", "client", "v3", "rooms", room_id, "joined_members"];
        let answer = self.ask(&path, token, MAX_MEMBERS).await?;
        match answer.status {
            StatusCode::OK => answers::has_member(&answer.body, user_id).ok_or(AskError::NotAnAnswer),
            StatusCode::FORBIDDEN | StatusCode::NOT_FOUND => Ok(false),
            StatusCode::UNAUTHORIZED => Err(AskError::ApplicationServiceUnknown),
            _ => Err(refused(&answer)),
        }
    }

    /// The delayed event `delay_id` of the user whose token `token` is; `None` if there is none that waits.
    pub(crate) async fn delayed_event(
        &self,
        token: &Secret,
        delay_id: &DelayId,
    ) -> Result<Option<DelayedEvent>, AskError> {
        let id = delay_id.as_str();
        let path = ["_matrix", "client", "unstable", "org.matrix.msc4140", "delayed_events", id];
        let answer = self.ask(&path, token, MAX_ANSWER).await?;
        match answer.status {
            StatusCode::OK => Ok(answers::delayed_event(&answer.body)),
            StatusCode::NOT_FOUND if answers::errcode(&answer.body).as_deref() == Some("M_UNRECOGNIZED") => {
                Err(AskError::NoDelayedEvents)
            }
            StatusCode::NOT_FOUND | StatusCode::FORBIDDEN => Ok(None),
            _ => Err(refused(&answer)),
        }
    }

    /// Whether `request` is really from the server that its credentials name.
    pub(crate) async fn is_genuine(
        &self,
        credentials: &Credentials,
        request: &Request<Bytes>,
    ) -> Result<bool, AskError> {
        let keys = self.keys(credentials).await?;
        Ok(keys.is_some_and(|keys| credentials.verify(request, &self.side.name, &keys)))
    }

    /// A token of another homeserver's SFU for our user `user_id`.
    pub(crate) async fn remote_token(
        &self,
        server: &ServerName,
        membership: &Membership,
        user_id: &str,
    ) -> Result<RemoteToken, AskError> {
        let key = self.side.signing_key.as_ref().ok_or(AskError::NotOffered)?;
        let body = Bytes::from(membership.federation_body(user_id).to_string());
        let mut last = RemoteToken::Failed;
        for path in GET_TOKEN {
            let request = Request::post(path).body(body.clone()).map_err(|_| AskError::NotAnAnswer)?;
            let authorization = key.authorization(&request, &self.side.name, server);
            let request = FederationRequest {
                method: Method::POST,
                path,
                authorization: Some(authorization.ok_or(AskError::NotAnAnswer)?),
                body: body.clone(),
            };
            let answer = self.verifier.federate(server, &request, MAX_ANSWER).await?;
            let status = answer.status.as_u16();
            last = RemoteToken::read(status, &answer.body);
            if last == RemoteToken::Failed {
                let errcode = answers::errcode(&answer.body).filter(|code| is_code(code));
                tracing::warn!(server = server.as_str(), status, errcode, path, "no token from this server");
            }
            // Only a server that does not know this path may know the other.
            if !matches!(answer.status, StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED) {
                break;
            }
        }
        Ok(last)
    }

    /// The keys of the credentials' origin, if one of those that it names is among them.
    async fn keys(&self, credentials: &Credentials) -> Result<Option<Arc<PublishedKeys>>, AskError> {
        let origin = credentials.origin();
        let cached = || lock(&self.keys).lookup(origin, credentials.key_ids(), SystemTime::now());
        let known = |cached| match cached {
            Cached::Here(keys) => Some(Some(keys)),
            Cached::Unknown => Some(None),
            Cached::Ask => None,
        };
        if let Some(keys) = known(cached()) {
            return Ok(keys);
        }
        let turn = Turn::take(&self.fetching, origin);
        let _guard = turn.lock.lock().await;
        // Somebody may have fetched them while we waited.
        if let Some(keys) = known(cached()) {
            return Ok(keys);
        }
        let fetched = tokio::time::timeout(KEYS_TIME, self.fetch_keys(origin)).await;
        let fetched = fetched.unwrap_or(Err(AskError::Lookup(LookupError::TimedOut)));
        let published = fetched.as_ref().ok().cloned();
        lock(&self.keys).remember(origin, published, SystemTime::now());
        let keys = fetched.inspect_err(|error| {
            tracing::warn!(origin = origin.as_str(), cause = causes(error), "no keys of this server");
        });
        Ok(keys.ok().filter(|keys| credentials.key_ids().any(|id| keys.has(id))))
    }

    async fn fetch_keys(&self, origin: &ServerName) -> Result<Arc<PublishedKeys>, AskError> {
        let request = FederationRequest {
            method: Method::GET,
            path: "/_matrix/key/v2/server",
            authorization: None,
            body: Bytes::new(),
        };
        let answer = self.verifier.federate(origin, &request, MAX_DOCUMENT).await?;
        if answer.status != StatusCode::OK {
            return Err(AskError::Status(answer.status));
        }
        Ok(Arc::new(PublishedKeys::read(&answer.body, origin, SystemTime::now())?))
    }

    /// Asks our homeserver for the path of these segments.
    async fn ask(&self, path: &[&str], token: &Secret, limit: usize) -> Result<ClientAnswer, AskError> {
        let url = below(&self.side.url, path).ok_or(AskError::NotAnAnswer)?;
        Ok(self.verifier.ask_own_homeserver(&url, token, limit).await?)
    }
}

/// `base` with more segments, each encoded as one: no ID can climb out of its place.
pub(super) fn below(base: &Url, path: &[&str]) -> Option<Url> {
    // `Url` drops these two even when they are pushed as segments, and tabs and line ends within any.
    if path.iter().any(|segment| matches!(*segment, "." | "..") || segment.contains(['\t', '\n', '\r'])) {
        return None;
    }
    let mut url = base.clone();
    url.path_segments_mut().ok()?.pop_if_empty().extend(path);
    Some(url)
}

/// What an answer means that no endpoint has a meaning of its own for.
fn refused(answer: &ClientAnswer) -> AskError {
    match answer.status {
        StatusCode::UNAUTHORIZED => {
            AskError::UnknownToken { soft_logout: answers::is_soft_logout(&answer.body) }
        }
        StatusCode::TOO_MANY_REQUESTS => AskError::Busy,
        status => AskError::Status(status),
    }
}

/// Whether a stranger's error code is one that a log can hold.
fn is_code(code: &str) -> bool {
    code.len() <= 64 && code.bytes().all(|b| b.is_ascii_uppercase() || b == b'_' || b == b'.')
}

/// A place in the queue of those who want a server's keys; the queue is gone with the last of them.
struct Turn<'a> {
    queues: &'a Mutex<HashMap<String, Arc<AsyncMutex<()>>>>,
    server: String,
    lock: Arc<AsyncMutex<()>>,
}

impl<'a> Turn<'a> {
    fn take(queues: &'a Mutex<HashMap<String, Arc<AsyncMutex<()>>>>, server: &ServerName) -> Self {
        let server = server.as_str().to_owned();
        let lock = lock(queues).entry(server.clone()).or_default().clone();
        Self { queues, server, lock }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut queues = lock(self.queues);
        // Ours and the map's: under the lock, so that of several that leave at once the last sees it.
        if Arc::strong_count(&self.lock) <= 2 {
            queues.remove(&self.server);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing between lock and unlock can leave the value half-changed.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Why there is no answer to what we asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AskError {
    #[error("the homeserver does not know the access token")]
    UnknownToken { soft_logout: bool },
    #[error("the homeserver forbids this user everything")]
    Forbidden,
    #[error("the homeserver has too much to do")]
    Busy,
    #[error(
        "the homeserver at LIVEKIT_JWT_HOMESERVER_URL has users of another name than LIVEKIT_JWT_HOMESERVER_NAME; \
         one of the two is wrong"
    )]
    AnotherHomeserver,
    #[error(
        "the homeserver does not know the token in LIVEKIT_JWT_HOMESERVER_AS_TOKEN_FILE; is the registration in \
         its app_service_config_files, and was it restarted since?"
    )]
    ApplicationServiceUnknown,
    #[error("the homeserver has no delayed events; for Synapse set max_event_delay_duration")]
    NoDelayedEvents,
    #[error("this is not set up here")]
    NotOffered,
    #[error("the server answered HTTP {0}")]
    Status(StatusCode),
    #[error("the server's answer cannot be read")]
    NotAnAnswer,
    #[error(transparent)]
    Keys(#[from] KeysError),
    #[error(transparent)]
    Lookup(#[from] LookupError),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_stays_in_its_segment() {
        let base: Url = "http://127.0.0.1:8008/prefix/".parse().unwrap();
        let url = below(&base, &["rooms", "!a/../b?c#d%2e:hs", "state"]).unwrap();
        assert_eq!(url.as_str(), "http://127.0.0.1:8008/prefix/rooms/!a%2F..%2Fb%3Fc%23d%252e:hs/state");
        for changed in [".", "..", "!a\t:hs", "!a\n:hs", "!a:hs\r"] {
            assert_eq!(below(&base, &["rooms", changed, "state"]), None);
        }
    }

    #[test]
    fn queues_for_keys_leave_nothing_behind() {
        let queues = Mutex::default();
        let server = "hs.org".parse().unwrap();
        let (one, two) = (Turn::take(&queues, &server), Turn::take(&queues, &server));
        assert!(Arc::ptr_eq(&one.lock, &two.lock));
        drop(one);
        assert_eq!(lock(&queues).len(), 1);
        drop(two);
        assert!(lock(&queues).is_empty());
    }

    #[test]
    fn a_strangers_error_code_cannot_forge_a_log_line() {
        assert!(is_code("M_FORBIDDEN") && is_code("ORG.MATRIX.X"));
        assert!(!is_code("M_A\nERROR") && !is_code(&"M".repeat(65)));
    }
}
