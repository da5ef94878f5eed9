//! The SFU's side of a token request: the room must exist before a client with full access enters it.
#![allow(clippy::disallowed_methods, reason = "this is the shell: it owns the clock and the tasks")]

use std::{
    collections::{HashMap, VecDeque},
    error::Error,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use async_trait::async_trait;
use hyper::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderValue};
use livekit_protocol::{
    CreateRoomRequest, ListParticipantsRequest, ListParticipantsResponse, ParticipantInfo, Room,
    RoomParticipantIdentity,
};
use prost::Message as _;
use serde::Deserialize;
use tokio::time::Instant;
use url::Url;
use zeroize::Zeroize as _;

use crate::{
    openid::{PROBE_AFTER, UNACKNOWLEDGED},
    roots,
    secret::Secret,
    token::{API_TOKEN_LIFETIME, TokenSigner},
};

/// How long an empty room lives before anybody has joined, in seconds.
pub const EMPTY_TIMEOUT: u32 = 300;
/// How long a room lives after the last participant has left, in seconds.
pub const DEPARTURE_TIMEOUT: u32 = 20;

/// Total time for one call to the SFU, its retry included.
const CALL_TIMEOUT: Duration = Duration::from_secs(8);
/// Pause before the one retry after a failed connect: a restarting SFU is back within a moment.
const RETRY_PAUSE: Duration = Duration::from_millis(300);
/// How long the SFU's word that a room is there is taken for another request too. Short beside the SFU's own time-outs
/// and beside the time that a client takes to enter: an SFU that restarts meanwhile has lost the room for whoever
/// asked first as well.
const REMEMBERED: Duration = Duration::from_secs(1);
/// How many rooms are remembered that nobody asks for at the moment: a flood of them must not take memory.
const MOST_REMEMBERED: usize = 1024;
/// A room that is never made, for asking whether the SFU answers: real aliases are 43 characters long.
const NO_ROOM: &str = "readiness";
const PROTOBUF: HeaderValue = HeaderValue::from_static("application/protobuf");
/// The largest answer we read. A room description is a few hundred bytes.
const MAX_ANSWER: usize = 64 * 1024;
/// The same for a list of everybody in a room, with their tracks and metadata.
const MAX_LIST: usize = 8 * 1024 * 1024;

/// What this service needs of an SFU. [`TwirpSfu`] asks a LiveKit server; an SFU in the same process
/// implements it directly.
#[async_trait]
pub trait Sfu: Send + Sync {
    /// Makes the room `alias`, or returns it if it exists: [`EMPTY_TIMEOUT`], [`DEPARTURE_TIMEOUT`], no limit
    /// on participants.
    ///
    /// # Errors
    /// [`SfuError`]: whose fault it is and what to do. The client then gets no token.
    async fn create_room(&self, alias: &str) -> Result<SfuRoom, SfuError>;

    /// The participant `identity` of the room `room`; `None` if it is certainly not there.
    ///
    /// An SFU that does not implement this cannot be asked; delegated leave then relies on webhooks alone.
    ///
    /// # Errors
    /// [`SfuError`] if that cannot be found out. It is never taken for absence.
    async fn participant(&self, room: &str, identity: &str) -> Result<Option<SfuParticipant>, SfuError> {
        let _ = (room, identity);
        Err(SfuError::NotOffered)
    }

    /// Which of `identities` are participants of the room `room`, in their order: `None` for those that are
    /// certainly not. Unless it is implemented, they are asked for one by one.
    ///
    /// # Errors
    /// [`SfuError`] if that cannot be found out for one of them. It is never taken for absence.
    async fn participants(
        &self,
        room: &str,
        identities: &[&str],
    ) -> Result<Vec<Option<SfuParticipant>>, SfuError> {
        let mut found = Vec::with_capacity(identities.len());
        for identity in identities {
            found.push(self.participant(room, identity).await?);
        }
        Ok(found)
    }

    /// Whether the SFU answers and lets us in: for readiness. An SFU in the same process always does.
    ///
    /// # Errors
    /// [`SfuError`]: why not.
    async fn check(&self) -> Result<(), SfuError> {
        Ok(())
    }
}

/// A participant on the SFU.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct SfuParticipant {
    /// The SFU's own id of this connection of the participant; a reconnect gets another.
    pub sid: String,
}

impl SfuParticipant {
    /// A participant with the SFU's id `sid`.
    pub fn new(sid: impl Into<String>) -> Self {
        Self { sid: sid.into() }
    }
}

/// A room on the SFU.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct SfuRoom {
    /// The SFU's own id of this room.
    pub sid: String,
}

impl SfuRoom {
    /// A room with the SFU's id `sid`.
    pub fn new(sid: impl Into<String>) -> Self {
        Self { sid: sid.into() }
    }
}

/// Why the SFU did not give us a room.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SfuError {
    /// `LIVEKIT_URL` is no address we can call.
    #[error(
        "our configuration: {0:?} is not an SFU address; write ws://, wss://, http:// or https:// and a host"
    )]
    BadUrl(String),
    /// No connection, or it broke.
    #[error("the SFU cannot be reached; check that it runs and that its URL is right from here")]
    Unreachable(#[source] Box<dyn Error + Send + Sync>),
    /// No answer in time.
    #[error("the SFU did not answer within {} s; check its load and the way to it", .0.as_secs())]
    TimedOut(Duration),
    /// The SFU said no.
    #[error(
        "the SFU refused (HTTP {status}, {code}); if it is `unauthenticated`, the API key and secret here and \
         there differ, or the clocks do"
    )]
    Refused {
        /// HTTP status.
        status: u16,
        /// The Twirp error code, or `no code` if the answer carried none.
        code: String,
    },
    /// The answer was not a room.
    #[error("the SFU's answer is not a LiveKit room; is something else listening at its URL?")]
    NotARoom,
    /// The answer was not a participant.
    #[error("the SFU's answer is not a LiveKit participant; is something else listening at its URL?")]
    NotAParticipant,
    /// This SFU cannot be asked that.
    #[error("this SFU cannot be asked who is in a room; only its webhooks tell")]
    NotOffered,
    /// Our own failure to ask.
    #[error("our side: the request to the SFU could not be made")]
    Ours(#[source] Box<dyn Error + Send + Sync>),
}

/// A LiveKit server, asked over its `RoomService` API: Twirp with protobuf bodies.
pub struct TwirpSfu {
    create_room: Url,
    get_participant: Url,
    list_participants: Url,
    http: reqwest::Client,
    signer: TokenSigner,
    right_to_create: Mutex<Option<Right>>,
    rooms: Mutex<Rooms>,
    timeout: Duration,
}

impl TwirpSfu {
    /// The SFU at `url` (`ws`, `wss`, `http` or `https`; a path is kept) with its API key and secret.
    ///
    /// # Errors
    /// [`SfuError::BadUrl`] if the URL cannot be called, [`SfuError::Ours`] if key or secret is empty or no
    /// HTTP client can be made.
    pub fn new(url: &str, key: &str, secret: &Secret) -> Result<Self, SfuError> {
        let base = api_base(url)?;
        let method = |name| {
            Url::parse(&format!("{base}/twirp/livekit.RoomService/{name}"))
                .map_err(|_| SfuError::BadUrl(url.to_owned()))
        };
        let (create_room, get_participant) = (method("CreateRoom")?, method("GetParticipant")?);
        let list_participants = method("ListParticipants")?;
        let tls = roots::checking_certificates().map_err(|e| SfuError::Ours(e.into()))?;
        let mut http = reqwest::Client::builder()
            .redirect(reqwest::redirect::Policy::none())
            .tls_backend_preconfigured(tls)
            .tcp_keepalive(PROBE_AFTER)
            .tcp_keepalive_interval(PROBE_AFTER);
        #[cfg(any(target_os = "linux", target_os = "android"))]
        {
            http = http.tcp_user_timeout(UNACKNOWLEDGED);
        }
        if is_loopback(&create_room) {
            http = http.no_proxy();
        }
        let http = http.build().map_err(|e| SfuError::Ours(e.into()))?;
        let signer = TokenSigner::new(key, secret.clone()).map_err(|e| SfuError::Ours(e.into()))?;
        Ok(Self {
            create_room,
            get_participant,
            list_participants,
            http,
            signer,
            right_to_create: Mutex::default(),
            rooms: Mutex::default(),
            timeout: CALL_TIMEOUT,
        })
    }

    /// The same, giving up on a call after `timeout` instead of 8 s.
    #[must_use]
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Work within the time of one call.
    async fn in_time<T>(&self, work: impl Future<Output = Result<T, SfuError>>) -> Result<T, SfuError> {
        tokio::time::timeout(self.timeout, work).await.map_err(|_| SfuError::TimedOut(self.timeout))?
    }

    async fn make(&self, alias: &str) -> Result<SfuRoom, SfuError> {
        let request = CreateRoomRequest {
            name: alias.to_owned(),
            empty_timeout: EMPTY_TIMEOUT,
            departure_timeout: DEPARTURE_TIMEOUT,
            max_participants: 0,
            ..Default::default()
        };
        let right = self.right_to_create()?;
        let body = self.call(&self.create_room, right, request.encode_to_vec(), MAX_ANSWER).await?;
        let room = Room::decode(body).map_err(|_| SfuError::NotARoom)?;
        Ok(SfuRoom::new(room.sid))
    }

    /// The `Authorization` for making rooms, signed anew once half of its life is over.
    fn right_to_create(&self) -> Result<HeaderValue, SfuError> {
        let now = SystemTime::now();
        let mut right = lock(&self.right_to_create);
        match &*right {
            Some(right) if right.is_fresh(now) => Ok(right.authorization.clone()),
            _ => {
                let token = self.signer.create_rooms(now).map_err(|e| SfuError::Ours(e.into()))?;
                let authorization = bearer(token)?;
                *right = Some(Right { authorization: authorization.clone(), signed: now });
                Ok(authorization)
            }
        }
    }

    /// Everybody in a room.
    async fn list(&self, room: &str) -> Result<Vec<ParticipantInfo>, SfuError> {
        let request = ListParticipantsRequest { room: room.to_owned() };
        let token = self.signer.administer(room, SystemTime::now()).map_err(|e| SfuError::Ours(e.into()))?;
        let asked = self.call(&self.list_participants, bearer(token)?, request.encode_to_vec(), MAX_LIST);
        let list = ListParticipantsResponse::decode(self.in_time(asked).await?);
        Ok(list.map_err(|_| SfuError::NotAParticipant)?.participants)
    }

    async fn call(
        &self,
        method: &Url,
        authorization: HeaderValue,
        body: Vec<u8>,
        most: usize,
    ) -> Result<bytes::Bytes, SfuError> {
        let body = bytes::Bytes::from(body);
        let request = || {
            self.http
                .post(method.clone())
                .header(CONTENT_TYPE, PROTOBUF)
                .header(ACCEPT, PROTOBUF)
                .header(AUTHORIZATION, authorization.clone())
                .body(body.clone())
                .send()
        };
        let mut answer = match request().await {
            Err(error) if error.is_connect() => {
                tokio::time::sleep(RETRY_PAUSE).await;
                request().await
            }
            // A kept connection, mostly, to which the way is gone. Every call may be made twice.
            Err(error) if error.is_request() => request().await,
            answer => answer,
        }
        .map_err(unreachable)?;
        let status = answer.status();
        let mut body = Vec::new();
        while let Some(chunk) = answer.chunk().await.map_err(unreachable)? {
            if body.len() + chunk.len() > most {
                return Err(SfuError::NotARoom);
            }
            body.extend_from_slice(&chunk);
        }
        if status == reqwest::StatusCode::OK {
            return Ok(body.into());
        }
        Err(SfuError::Refused { status: status.as_u16(), code: twirp_code(&body) })
    }
}

#[async_trait]
impl Sfu for TwirpSfu {
    async fn create_room(&self, alias: &str) -> Result<SfuRoom, SfuError> {
        let place = lock(&self.rooms).place(Instant::now(), alias);
        // Whoever waits for another's call to end has no more time than for a call of its own.
        self.in_time(async {
            let mut made = place.lock().await;
            if let Some(made) = made.as_ref().filter(|made| made.is_fresh(Instant::now())) {
                return Ok(made.room.clone());
            }
            let room = self.make(alias).await?;
            *made = Some(Made { room: room.clone(), at: Instant::now() });
            Ok(room)
        })
        .await
    }

    async fn participant(&self, room: &str, identity: &str) -> Result<Option<SfuParticipant>, SfuError> {
        let request = RoomParticipantIdentity {
            room: room.to_owned(),
            identity: identity.to_owned(),
            ..Default::default()
        };
        let token = self.signer.administer(room, SystemTime::now()).map_err(|e| SfuError::Ours(e.into()))?;
        let asked = self.call(&self.get_participant, bearer(token)?, request.encode_to_vec(), MAX_ANSWER);
        match self.in_time(asked).await {
            Ok(body) => {
                let participant = ParticipantInfo::decode(body).map_err(|_| SfuError::NotAParticipant)?;
                Ok(Some(SfuParticipant::new(participant.sid)))
            }
            // A plain 404, from a proxy for instance, has no such code and says nothing about the participant.
            Err(SfuError::Refused { code, .. }) if code == "not_found" => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn participants(
        &self,
        room: &str,
        identities: &[&str],
    ) -> Result<Vec<Option<SfuParticipant>>, SfuError> {
        if let [identity] = identities {
            return Ok(vec![self.participant(room, identity).await?]);
        }
        let mut found = Vec::with_capacity(identities.len());
        let listed: Option<HashMap<_, _>> = match self.list(room).await {
            Ok(list) => Some(list.into_iter().map(|one| (one.identity, one.sid)).collect()),
            // An SFU without lists, or whose list is of no use; it may know single ones.
            Err(SfuError::Refused { .. } | SfuError::NotAParticipant | SfuError::NotARoom) => None,
            Err(error) => return Err(error),
        };
        // An empty list is also what something that is no SFU would answer: one that is certainly absent must
        // bear it out.
        let borne_out = match (&listed, identities.first()) {
            (Some(listed), Some(first)) if listed.is_empty() => {
                self.participant(room, first).await?.is_none()
            }
            (listed, _) => listed.is_some(),
        };
        for identity in identities {
            found.push(match listed.as_ref().filter(|_| borne_out) {
                Some(listed) => listed.get(*identity).map(SfuParticipant::new),
                None => self.participant(room, identity).await?,
            });
        }
        Ok(found)
    }

    async fn check(&self) -> Result<(), SfuError> {
        // Nobody is there; what matters is whether we are let in to ask.
        match self.participant(NO_ROOM, NO_ROOM).await {
            Err(SfuError::Refused { status, .. }) if !matches!(status, 401 | 403) && status < 500 => Ok(()),
            Err(SfuError::NotAParticipant) => Ok(()),
            answer => answer.map(drop),
        }
    }
}

impl fmt::Debug for TwirpSfu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TwirpSfu").field("create_room", &self.create_room.as_str()).finish_non_exhaustive()
    }
}

/// An `Authorization` header and when it was signed.
struct Right {
    authorization: HeaderValue,
    signed: SystemTime,
}

impl Right {
    /// Also not if the clock was set back since: the SFU would find that it is not valid yet.
    fn is_fresh(&self, now: SystemTime) -> bool {
        now.duration_since(self.signed).is_ok_and(|age| age < API_TOKEN_LIFETIME / 2)
    }
}

fn bearer(mut token: String) -> Result<HeaderValue, SfuError> {
    token.insert_str(0, "Bearer ");
    let value = HeaderValue::from_str(&token).map_err(|e| SfuError::Ours(e.into()));
    token.zeroize();
    let mut value = value?;
    value.set_sensitive(true);
    Ok(value)
}

/// The rooms that are being made or were a moment ago. When a call begins all its members ask for the same room
/// at once: one of them asks the SFU, the others take its word.
#[derive(Default)]
struct Rooms {
    places: HashMap<String, Place>,
    /// When each was first asked for, in this order.
    order: VecDeque<(Instant, String)>,
}

/// Held by who asks the SFU for a room; holds that room once it is there.
type Place = Arc<tokio::sync::Mutex<Option<Made>>>;

/// A room that the SFU has made, and when.
struct Made {
    room: SfuRoom,
    at: Instant,
}

impl Made {
    fn is_fresh(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.at) < REMEMBERED
    }
}

impl Rooms {
    /// The place of the room `alias`. Places that nobody holds are forgotten once their time is over, or too many.
    fn place(&mut self, now: Instant, alias: &str) -> Place {
        // Two, because one comes: what has piled up goes too, and no request does the work of many.
        for _ in 0..2 {
            let full = self.order.len() >= MOST_REMEMBERED;
            let Some((_, oldest)) = self
                .order
                .pop_front_if(|(since, _)| full || now.saturating_duration_since(*since) >= REMEMBERED)
            else {
                break;
            };
            match self.places.get(&oldest) {
                Some(place) if Arc::strong_count(place) > 1 => self.order.push_back((now, oldest)),
                _ => drop(self.places.remove(&oldest)),
            }
        }
        if let Some(place) = self.places.get(alias) {
            return place.clone();
        }
        let place = Place::default();
        self.places.insert(alias.to_owned(), place.clone());
        self.order.push_back((now, alias.to_owned()));
        place
    }
}

fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing between lock and unlock can leave it half-changed.
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The base of the SFU's HTTP API: `ws` becomes `http`, `wss` becomes `https`, the path stays, a trailing
/// slash goes.
pub(crate) fn api_base(url: &str) -> Result<String, SfuError> {
    let bad = || SfuError::BadUrl(url.to_owned());
    let parsed = Url::parse(url).map_err(|_| bad())?;
    let scheme = match parsed.scheme() {
        "ws" | "http" => "http",
        "wss" | "https" => "https",
        _ => return Err(bad()),
    };
    // A user name, a query or a fragment has no place in a base to which paths are appended.
    let plain = parsed.username().is_empty()
        && parsed.password().is_none()
        && parsed.query().is_none()
        && parsed.fragment().is_none();
    let authority = parsed.host_str().filter(|_| plain).ok_or_else(bad)?;
    let port = parsed.port().map(|p| format!(":{p}")).unwrap_or_default();
    Ok(format!("{scheme}://{authority}{port}{}", parsed.path().trim_end_matches('/')))
}

fn is_loopback(url: &Url) -> bool {
    match url.host() {
        Some(url::Host::Domain(name)) => name == "localhost" || name.ends_with(".localhost"),
        Some(url::Host::Ipv4(ip)) => ip.is_loopback(),
        Some(url::Host::Ipv6(ip)) => ip.is_loopback(),
        None => false,
    }
}

fn unreachable(error: reqwest::Error) -> SfuError {
    SfuError::Unreachable(error.without_url().into())
}

/// The `code` of a Twirp error body; foreign text is cut to what a code can look like, for it goes into the
/// log.
fn twirp_code(body: &[u8]) -> String {
    #[derive(Deserialize)]
    struct TwirpError {
        code: String,
    }
    serde_json::from_slice::<TwirpError>(body)
        .map(|e| e.code.chars().filter(|c| c.is_ascii_lowercase() || *c == '_').take(40).collect())
        .unwrap_or_else(|_| "no code".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_api_lives_below_the_signalling_url() {
        for (url, base) in [
            ("ws://127.0.0.1:7880", "http://127.0.0.1:7880"),
            ("wss://h/livekit/sfu", "https://h/livekit/sfu"),
            ("wss://h/livekit/sfu/", "https://h/livekit/sfu"),
            ("http://h:80/", "http://h"),
            ("https://[::1]:7443", "https://[::1]:7443"),
        ] {
            assert_eq!(api_base(url).unwrap(), base, "{url}");
        }
        for url in [
            "",
            "h",
            "localhost:7880",
            "ftp://h",
            "ws://",
            "ws://u@h",
            "ws://:p@h",
            "ws://h/?a=b",
            "ws://h/#x",
        ] {
            assert!(matches!(api_base(url), Err(SfuError::BadUrl(_))), "{url}");
        }
    }

    #[test]
    fn the_secret_is_not_printed() {
        let sfu = TwirpSfu::new("ws://127.0.0.1:1", "key", &Secret::new("hunter2")).unwrap();
        assert!(!format!("{sfu:?}").contains("hunter2"));
    }

    #[tokio::test(start_paused = true)]
    async fn rooms_are_remembered_for_a_moment_and_then_take_no_memory() {
        let mut rooms = Rooms::default();
        let now = Instant::now();
        let made = Made { room: SfuRoom::new("RM_1"), at: now };
        assert!(made.is_fresh(now + REMEMBERED - Duration::from_millis(1)));
        assert!(!made.is_fresh(now + REMEMBERED));
        let held = rooms.place(now, "held");
        drop(rooms.place(now, "left"));
        assert!(Arc::ptr_eq(&held, &rooms.place(now + REMEMBERED, "held")));
        drop(rooms.place(now + 2 * REMEMBERED, "new"));
        let mut left: Vec<_> = rooms.places.keys().map(String::as_str).collect();
        left.sort_unstable();
        assert_eq!(left, ["held", "new"]);
        drop(held);
        drop(rooms.place(now + 4 * REMEMBERED, "newer"));
        assert_eq!((rooms.places.len(), rooms.order.len()), (1, 1));
        for stranger in 0..3 * MOST_REMEMBERED {
            drop(rooms.place(now + 4 * REMEMBERED, &stranger.to_string()));
            assert!(rooms.places.len() <= MOST_REMEMBERED && rooms.order.len() == rooms.places.len());
        }
    }

    #[test]
    fn the_right_to_make_rooms_is_signed_anew_in_time_and_when_the_clock_was_set_back() {
        let signed = SystemTime::UNIX_EPOCH + Duration::from_hours(24);
        let right = Right { authorization: bearer("token".to_owned()).unwrap(), signed };
        assert!(right.is_fresh(signed) && right.is_fresh(signed + Duration::from_hours(2)));
        assert!(!right.is_fresh(signed + Duration::from_hours(3)));
        assert!(!right.is_fresh(signed - Duration::from_secs(1)));
        assert!(!format!("{:?}", right.authorization).contains("token"));
    }

    #[test]
    fn a_twirp_code_cannot_forge_log_lines() {
        assert_eq!(twirp_code(b"{\"code\":\"not_found\",\"msg\":\"x\"}"), "not_found");
        assert_eq!(twirp_code(b"{\"code\":\"a\\nERROR b\"}"), "ab");
        assert_eq!(twirp_code(b"<html>"), "no code");
    }
}
