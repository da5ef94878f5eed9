//! One token exchange as a decision without I/O: which endpoint is asked next, and what an answer means (MSC4195).
//!
//! Passing failures are retried with backoff; every other answer moves on to the next endpoint or ends the exchange.
//! Everything ends at the deadline.

use std::{
    collections::VecDeque,
    fmt,
    time::{Duration, Instant},
};

use ruma_common::OwnedServerName;

use super::{Fault, PolicyRefusal};
use crate::{
    machine::membership::wire::MembershipMode,
    matrix::{ApiVersion, RequestError},
    member::Slot,
    transport::LiveKitFocus,
};

/// Waits after the first, second and third failure of one endpoint.
pub(super) const BACKOFF: [Duration; 3] =
    [Duration::from_secs(1), Duration::from_secs(2), Duration::from_secs(4)];
/// How often a rate limit is waited for, in all.
const MAX_LIMITED: usize = 5;
/// The wait after a 429 that names none.
const LIMITED_WAIT: Duration = Duration::from_secs(5);
/// Text of a server that is kept for people, in characters.
const MAX_MESSAGE: usize = 300;

/// What a token is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// To publish as a member whose membership has this form: others expect the identity that belongs to it.
    Publish(MembershipMode),
    /// Only to receive: any identity will do.
    Subscribe,
}

/// An endpoint that issues tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Endpoint {
    /// `…/rtc/livekit/get_token` of our homeserver (MSC4195): identity from user and member id.
    Homeserver(ApiVersion),
    /// `/get_token` of the authorisation service (earlier MSC4195): identity from user, device and member id.
    GetToken,
    /// `/sfu/get` of the authorisation service: identity `user:device`.
    SfuGet,
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Homeserver(ApiVersion::Stable) => "the homeserver's v1/rtc/livekit/get_token",
            Self::Homeserver(ApiVersion::Unstable) => {
                "the homeserver's unstable/io.element.msc4195/rtc/livekit/get_token"
            }
            Self::GetToken => "/get_token",
            Self::SfuGet => "/sfu/get",
        })
    }
}

/// Why an endpoint did not do what it was asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EndpointError {
    /// 404 or 405.
    #[error("no such endpoint ({status})")]
    NotThere {
        /// HTTP status.
        status: u16,
    },
    /// 429.
    #[error("it limits how often it may be asked; try again later")]
    RateLimited {
        /// How long it asks us to wait.
        retry_after: Option<Duration>,
    },
    /// No connection, or 5xx.
    #[error("it cannot be reached or is in trouble ({cause}); its operator should look at it")]
    Unavailable {
        /// The status, or what went wrong on the way.
        cause: String,
    },
    /// No complete answer in time.
    #[error("it did not answer within {0:?}")]
    TimedOut(Duration),
    /// 3xx: a token must not follow.
    #[error(
        "it redirects ({status}), and an OpenID token goes to no other address than the announced one; correct that"
    )]
    Redirected {
        /// HTTP status.
        status: u16,
    },
    /// Another refusal.
    #[error("it refused ({status} {errcode}): {message}{}", advice(*status))]
    Refused {
        /// HTTP status.
        status: u16,
        /// Matrix error code, empty if it gave none.
        errcode: String,
        /// Its words, cut to 300 characters.
        message: String,
    },
    /// The answer is not what the specification says.
    #[error("its answer is unusable: {0}")]
    Malformed(Malformed),
    /// The token does not allow publishing.
    #[error(
        "its token does not allow publishing; its operator must give users of our homeserver full access"
    )]
    SubscribeOnly,
    /// Our homeserver issued no OpenID token.
    #[error("our homeserver issued no OpenID token for it: {0}")]
    OpenId(RequestError),
    /// Our access token is not accepted any more.
    #[error("the homeserver does not accept our access token any more; log in again")]
    LoggedOut,
    /// Our policy forbids to use it.
    #[error(transparent)]
    Policy(#[from] PolicyRefusal),
}

/// What is wrong with an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Malformed {
    /// Longer than 64 KiB.
    #[error("longer than 64 KiB")]
    TooLong,
    /// Not the JSON object of the specification.
    #[error("not a JSON object with url and jwt")]
    Json,
    /// No SFU URL in it.
    #[error("its url is not the URL of an SFU")]
    SfuUrl,
    /// Not a LiveKit access token.
    #[error("its jwt is not a LiveKit access token with an identity")]
    Token,
}

/// Advice for statuses whose usual cause is elsewhere.
fn advice(status: u16) -> &'static str {
    match status {
        401 => {
            "; it could not verify us with our homeserver: its operator should check that it reaches the homeserver"
        }
        403 => "; it does not see us as a member of the room, or does not serve our homeserver",
        _ => "",
    }
}

impl EndpointError {
    /// What an error of the Matrix port means for a token or delegation request to the homeserver.
    pub(super) fn of_homeserver(error: RequestError, timeout: Duration) -> Self {
        match error {
            RequestError::Unsupported | RequestError::NotFound => Self::NotThere { status: 404 },
            RequestError::Refused { status: status @ (404 | 405), .. } => Self::NotThere { status },
            RequestError::RateLimited { retry_after } => Self::RateLimited { retry_after },
            RequestError::Network { cause } | RequestError::Local { cause } => Self::Unavailable { cause },
            RequestError::TimedOut => Self::TimedOut(timeout),
            RequestError::LoggedOut => Self::LoggedOut,
            RequestError::Forbidden { errcode, message } => Self::refused(403, errcode, &message),
            RequestError::Refused { status, errcode, message } => Self::refused(status, errcode, &message),
            RequestError::MaxDelayExceeded { .. } => {
                Self::refused(400, "M_INVALID_PARAM".to_owned(), "delay too long")
            }
            RequestError::AlreadyFinal => {
                Self::refused(409, "M_UNKNOWN".to_owned(), "already sent or cancelled")
            }
        }
    }

    /// What a status other than 2xx of an authorisation service means.
    pub(super) fn of_service(status: u16, retry_after: Option<Duration>, body: &[u8]) -> Self {
        #[derive(Default, serde::Deserialize)]
        #[serde(default)]
        struct Body {
            errcode: String,
            error: String,
            retry_after_ms: Option<u64>,
        }
        match status {
            404 | 405 => return Self::NotThere { status },
            300..=399 => return Self::Redirected { status },
            500.. => return Self::Unavailable { cause: format!("HTTP status {status}") },
            _ => {}
        }
        let body: Body = serde_json::from_slice(body).unwrap_or_default();
        if status == 429 {
            let retry_after = retry_after.or_else(|| body.retry_after_ms.map(Duration::from_millis));
            return Self::RateLimited { retry_after };
        }
        Self::refused(status, body.errcode, &body.error)
    }

    /// Whose fault it is.
    pub(super) fn fault(&self) -> Fault {
        match self {
            Self::RateLimited { .. } | Self::Unavailable { .. } | Self::TimedOut(_) => Fault::Unreachable,
            Self::OpenId(_) => Fault::Homeserver,
            Self::LoggedOut => Fault::LoggedOut,
            Self::Policy(_) => Fault::Policy,
            Self::NotThere { .. }
            | Self::Redirected { .. }
            | Self::Refused { .. }
            | Self::Malformed(_)
            | Self::SubscribeOnly => Fault::Refused,
        }
    }

    /// How long the other side asks us to wait.
    pub(super) fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::RateLimited { retry_after } | Self::OpenId(RequestError::RateLimited { retry_after }) => {
                *retry_after
            }
            _ => None,
        }
    }

    fn refused(status: u16, errcode: String, message: &str) -> Self {
        let readable = |text: &str| text.chars().filter(|c| !c.is_control()).take(MAX_MESSAGE).collect();
        Self::Refused { status, errcode: readable(&errcode), message: readable(message) }
    }

    fn is(&self, status: u16, errcodes: &[&str]) -> bool {
        matches!(self, Self::Refused { status: s, errcode, .. } if *s == status && errcodes.contains(&errcode.as_str()))
    }
}

/// One endpoint's last answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attempt {
    /// Which endpoint.
    pub endpoint: Endpoint,
    /// Its answer.
    pub error: EndpointError,
}

impl fmt::Display for Attempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.endpoint, self.error)
    }
}

/// Why a focus has no endpoint that could issue the token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Unsuitable {
    /// Tokens for this form of membership come from an authorisation service.
    #[error("it names no livekit_service_url, which this form of membership needs")]
    NoService,
    /// `/sfu/get` knows only the slot `m.call#ROOM`.
    #[error("this form of membership is bound to the slot m.call#ROOM; use a sticky form for another slot")]
    Slot,
    /// Neither URL is usable for the purpose.
    #[error("it names no SFU URL for the homeserver to issue a token for")]
    NoSfu,
}

/// The endpoints that can issue a token for `purpose`, in the order of asking.
///
/// A published token's identity has to fit the membership's form, so the state form takes `/sfu/get` alone and the
/// sticky forms never do.
pub(super) fn endpoints(
    focus: &LiveKitFocus,
    slot: &Slot,
    purpose: Purpose,
) -> Result<VecDeque<Endpoint>, Unsuitable> {
    let homeserver = [ApiVersion::Stable, ApiVersion::Unstable].map(Endpoint::Homeserver);
    let homeserver = if focus.sfu.is_some() { &homeserver[..] } else { &[] };
    let service = |endpoint| focus.service.is_some().then_some(endpoint);
    let sfu_get = service(Endpoint::SfuGet).filter(|_| *slot == Slot::room_call());
    match purpose {
        Purpose::Publish(MembershipMode::Compatibility | MembershipMode::Legacy) => {
            let missing = if focus.service.is_some() { Unsuitable::Slot } else { Unsuitable::NoService };
            Ok(VecDeque::from([sfu_get.ok_or(missing)?]))
        }
        Purpose::Publish(MembershipMode::Matrix2) => {
            Ok(VecDeque::from([service(Endpoint::GetToken).ok_or(Unsuitable::NoService)?]))
        }
        Purpose::Publish(MembershipMode::Matrix2Merged) => {
            let found: VecDeque<_> = homeserver.iter().copied().chain(service(Endpoint::GetToken)).collect();
            if found.is_empty() { Err(Unsuitable::NoSfu) } else { Ok(found) }
        }
        Purpose::Subscribe => {
            let service = service(Endpoint::GetToken).into_iter().chain(sfu_get);
            let found: VecDeque<_> = homeserver.iter().copied().chain(service).collect();
            if found.is_empty() { Err(Unsuitable::NoSfu) } else { Ok(found) }
        }
    }
}

/// What the homeserver taught us; kept for the call.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Learned {
    /// Generations of `get_token` that it does not have.
    pub(super) missing: Vec<ApiVersion>,
    /// Whether its service wants `member: {id}` instead of `member_id` (before lk-jwt-service 0.8).
    pub(super) nested_member: bool,
}

/// What to do now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Ask again at this time.
    Wait(Instant),
    /// Ask this endpoint.
    Ask {
        /// Which.
        endpoint: Endpoint,
        /// For the homeserver's endpoint: whose SFU it is, `None` for its own.
        server: Option<OwnedServerName>,
        /// For the homeserver's endpoint: whether to write `member: {id}`.
        nested_member: bool,
    },
    /// Give up.
    Failed(Vec<Attempt>),
}

/// One exchange: ask [`Exchange::next`], do it, tell a failure; a success ends it.
#[derive(Debug)]
pub(super) struct Exchange {
    endpoints: VecDeque<Endpoint>,
    /// Whose SFU it may be, in the order of asking; never empty.
    servers: Vec<Option<OwnedServerName>>,
    /// Which of them is asked now.
    server: usize,
    /// How `member_id` is written now, and whether the other way was tried.
    nested_member: bool,
    other_member_tried: bool,
    learned: Learned,
    /// Failures of the present endpoint that were waited for.
    failures: usize,
    limited: usize,
    /// When the present endpoint is asked again, and what it answered last.
    retrying: Option<(Instant, Attempt)>,
    deadline: Instant,
    backoff: [Duration; 3],
    attempts: Vec<Attempt>,
}

impl Exchange {
    pub(super) fn new(
        mut endpoints: VecDeque<Endpoint>,
        servers: Vec<Option<OwnedServerName>>,
        learned: Learned,
        deadline: Instant,
        backoff: [Duration; 3],
    ) -> Self {
        let mut attempts = Vec::new();
        endpoints.retain(|endpoint| {
            let missing =
                matches!(endpoint, Endpoint::Homeserver(version) if learned.missing.contains(version));
            if missing {
                attempts
                    .push(Attempt { endpoint: *endpoint, error: EndpointError::NotThere { status: 404 } });
            }
            !missing
        });
        Self {
            endpoints,
            servers,
            server: 0,
            nested_member: learned.nested_member,
            other_member_tried: false,
            learned,
            failures: 0,
            limited: 0,
            retrying: None,
            deadline,
            backoff,
            attempts,
        }
    }

    /// What the homeserver taught us, once the exchange is over.
    pub(super) fn learned(mut self, succeeded: bool) -> Learned {
        if succeeded && matches!(self.endpoints.front(), Some(Endpoint::Homeserver(_))) {
            self.learned.nested_member = self.nested_member;
        }
        self.learned
    }

    pub(super) fn next(&self, now: Instant) -> Next {
        let over = now >= self.deadline;
        let Some(endpoint) = self.endpoints.front().copied().filter(|_| !over) else {
            let unfinished = self.retrying.as_ref().map(|(_, attempt)| attempt);
            return Next::Failed(self.attempts.iter().chain(unfinished).cloned().collect());
        };
        match &self.retrying {
            Some((until, _)) if *until > now => Next::Wait(*until),
            _ => Next::Ask {
                endpoint,
                server: self.servers.get(self.server).cloned().flatten(),
                nested_member: self.nested_member,
            },
        }
    }

    /// The endpoint that [`Next::Ask`] named did not give a token.
    pub(super) fn failed(&mut self, now: Instant, error: EndpointError) {
        let Some(endpoint) = self.endpoints.front().copied() else { return };
        self.retrying = None;
        let at_homeserver = matches!(endpoint, Endpoint::Homeserver(_));
        let verdict = match &error {
            EndpointError::NotThere { .. } => {
                if let Endpoint::Homeserver(version) = endpoint {
                    self.learned.missing.push(version);
                }
                Verdict::NextEndpoint
            }
            EndpointError::RateLimited { retry_after }
            | EndpointError::OpenId(RequestError::RateLimited { retry_after }) => {
                self.limited += 1;
                match retry_after.unwrap_or(LIMITED_WAIT) {
                    wait if self.limited <= MAX_LIMITED => Verdict::Wait(wait),
                    _ => Verdict::Stop,
                }
            }
            // A service of our own that is down need not stop us if another one is known.
            EndpointError::Unavailable { .. } | EndpointError::TimedOut(_)
                if at_homeserver && self.has_service() =>
            {
                Verdict::NextEndpoint
            }
            EndpointError::Unavailable { .. }
            | EndpointError::TimedOut(_)
            | EndpointError::OpenId(RequestError::Network { .. } | RequestError::TimedOut) => {
                self.backoff().map_or(Verdict::NextEndpoint, Verdict::Wait)
            }
            // Our join may not have reached the other server yet.
            error if error.is(403, &["M_FORBIDDEN"]) => self.backoff().map_or(Verdict::Stop, Verdict::Wait),
            error
                if at_homeserver
                    && error.is(400, &["M_NOT_JSON", "M_BAD_JSON"])
                    && !self.other_member_tried =>
            {
                (self.nested_member, self.other_member_tried) = (!self.nested_member, true);
                Verdict::Wait(Duration::ZERO)
            }
            error if at_homeserver && error.is(400, &["M_INVALID_PARAM"]) => {
                self.server += 1;
                if self.server < self.servers.len() {
                    Verdict::Wait(Duration::ZERO)
                } else {
                    Verdict::SkipHomeserver
                }
            }
            EndpointError::LoggedOut | EndpointError::OpenId(_) | EndpointError::Redirected { .. } => {
                Verdict::Stop
            }
            EndpointError::Policy(_) => Verdict::Stop,
            // The other endpoint of the service asks the homeserver the same question.
            EndpointError::Refused { status: 401, .. } => Verdict::Stop,
            EndpointError::Refused { .. } | EndpointError::Malformed(_) | EndpointError::SubscribeOnly
                if at_homeserver =>
            {
                Verdict::SkipHomeserver
            }
            EndpointError::Refused { .. } | EndpointError::Malformed(_) | EndpointError::SubscribeOnly => {
                Verdict::NextEndpoint
            }
        };
        let verdict = match verdict {
            Verdict::Wait(wait) => match now.checked_add(wait).filter(|until| *until < self.deadline) {
                Some(until) => {
                    self.retrying = Some((until, Attempt { endpoint, error }));
                    return;
                }
                None => Verdict::Stop,
            },
            verdict => verdict,
        };
        self.attempts.push(Attempt { endpoint, error });
        (self.failures, self.server) = (0, 0);
        match verdict {
            Verdict::Stop => self.endpoints.clear(),
            Verdict::SkipHomeserver => self.endpoints.retain(|e| !matches!(e, Endpoint::Homeserver(_))),
            Verdict::NextEndpoint | Verdict::Wait(_) => drop(self.endpoints.pop_front()),
        }
    }

    fn has_service(&self) -> bool {
        self.endpoints.iter().any(|endpoint| !matches!(endpoint, Endpoint::Homeserver(_)))
    }

    fn backoff(&mut self) -> Option<Duration> {
        let wait = self.backoff.get(self.failures).copied()?;
        self.failures += 1;
        Some(wait)
    }
}

enum Verdict {
    /// Ask the same endpoint again after this time.
    Wait(Duration),
    NextEndpoint,
    /// The other generation of the homeserver's endpoint would answer the same.
    SkipHomeserver,
    Stop,
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "the origin of virtual time")]
mod tests {
    use super::*;

    const V1: Endpoint = Endpoint::Homeserver(ApiVersion::Stable);
    const UNSTABLE: Endpoint = Endpoint::Homeserver(ApiVersion::Unstable);
    use Endpoint::{GetToken, SfuGet};

    fn focus(service: bool, sfu: bool) -> LiveKitFocus {
        LiveKitFocus {
            service: service.then(|| "https://jwt.example".parse().unwrap()),
            sfu: sfu.then(|| "wss://sfu.example".parse().unwrap()),
        }
    }

    /// An exchange on virtual time.
    struct Script {
        exchange: Exchange,
        now: Instant,
        waited: Vec<u64>,
    }

    impl Script {
        fn new(endpoints: &[Endpoint]) -> Self {
            Self::with(endpoints, vec![None], Learned::default())
        }

        fn with(endpoints: &[Endpoint], servers: Vec<Option<OwnedServerName>>, learned: Learned) -> Self {
            let now = Instant::now();
            let deadline = now + Duration::from_secs(60);
            let exchange =
                Exchange::new(endpoints.iter().copied().collect(), servers, learned, deadline, BACKOFF);
            Self { exchange, now, waited: Vec::new() }
        }

        /// Waits as told; the next endpoint, or `None` when it is over.
        fn next(&mut self) -> Option<Endpoint> {
            loop {
                match self.exchange.next(self.now) {
                    Next::Wait(until) => {
                        self.waited.push((until - self.now).as_secs());
                        self.now = until;
                    }
                    Next::Ask { endpoint, .. } => return Some(endpoint),
                    Next::Failed(_) => return None,
                }
            }
        }

        fn fail(&mut self, error: EndpointError) -> &mut Self {
            self.exchange.failed(self.now, error);
            self
        }

        fn ask(&self) -> (Option<String>, bool) {
            let Next::Ask { server, nested_member, .. } = self.exchange.next(self.now) else { panic!() };
            (server.map(|server| server.to_string()), nested_member)
        }

        fn attempts(&self) -> Vec<(Endpoint, EndpointError)> {
            let Next::Failed(attempts) = self.exchange.next(self.now) else { panic!() };
            attempts.into_iter().map(|attempt| (attempt.endpoint, attempt.error)).collect()
        }
    }

    fn refused(status: u16, errcode: &str) -> EndpointError {
        EndpointError::Refused { status, errcode: errcode.to_owned(), message: String::new() }
    }

    fn unavailable() -> EndpointError {
        EndpointError::Unavailable { cause: "HTTP status 502".to_owned() }
    }

    fn limited(seconds: u64) -> EndpointError {
        EndpointError::RateLimited { retry_after: Some(Duration::from_secs(seconds)) }
    }

    const NOT_THERE: EndpointError = EndpointError::NotThere { status: 404 };

    #[test]
    fn endpoints_follow_the_mode() {
        use MembershipMode::{Compatibility, Legacy, Matrix2, Matrix2Merged};
        use Purpose::{Publish, Subscribe};
        let room = Slot::room_call();
        let order = |service, sfu, purpose| {
            endpoints(&focus(service, sfu), &room, purpose).map(|found| found.into_iter().collect::<Vec<_>>())
        };
        assert_eq!(order(true, true, Publish(Compatibility)), Ok(vec![SfuGet]));
        assert_eq!(order(true, false, Publish(Legacy)), Ok(vec![SfuGet]));
        assert_eq!(order(false, true, Publish(Compatibility)), Err(Unsuitable::NoService));
        assert_eq!(order(true, true, Publish(Matrix2)), Ok(vec![GetToken]));
        assert_eq!(order(false, true, Publish(Matrix2)), Err(Unsuitable::NoService));
        assert_eq!(order(true, true, Publish(Matrix2Merged)), Ok(vec![V1, UNSTABLE, GetToken]));
        assert_eq!(order(false, true, Publish(Matrix2Merged)), Ok(vec![V1, UNSTABLE]));
        assert_eq!(order(true, true, Subscribe), Ok(vec![V1, UNSTABLE, GetToken, SfuGet]));
        assert_eq!(order(true, false, Subscribe), Ok(vec![GetToken, SfuGet]));
        assert_eq!(order(false, true, Subscribe), Ok(vec![V1, UNSTABLE]));
    }

    #[test]
    fn sfu_get_serves_only_the_room_call() {
        let slot = Slot::lower_case_room_call();
        let publish = Purpose::Publish(MembershipMode::Compatibility);
        assert_eq!(endpoints(&focus(true, true), &slot, publish), Err(Unsuitable::Slot));
        assert_eq!(endpoints(&focus(true, false), &slot, Purpose::Subscribe).unwrap(), [GetToken]);
    }

    #[test]
    fn missing_endpoints_are_walked_in_order_and_remembered() {
        let all = [V1, UNSTABLE, GetToken, SfuGet];
        let mut script = Script::new(&all);
        for endpoint in all {
            assert_eq!(script.next(), Some(endpoint));
            script.fail(NOT_THERE);
        }
        assert_eq!(script.attempts(), all.map(|endpoint| (endpoint, NOT_THERE)));
        assert!(script.waited.is_empty());
        let learned = script.exchange.learned(false);
        assert_eq!(Script::with(&all, vec![None], learned).next(), Some(GetToken));
    }

    #[test]
    fn not_joined_is_retried_three_times_then_final() {
        for endpoint in [V1, GetToken] {
            let mut script = Script::new(&[endpoint, SfuGet]);
            for _ in 0..4 {
                assert_eq!(script.next(), Some(endpoint));
                script.fail(refused(403, "M_FORBIDDEN"));
            }
            assert_eq!(script.next(), None);
            assert_eq!(script.waited, [1, 2, 4]);
            assert_eq!(script.attempts(), [(endpoint, refused(403, "M_FORBIDDEN"))]);
        }
    }

    #[test]
    fn refusals_of_the_homeserver_lead_to_the_service() {
        for error in [
            refused(403, "M_GUEST_ACCESS_FORBIDDEN"),
            refused(403, ""),
            refused(400, "M_INVALID_PARAM"),
            refused(418, "M_TEAPOT"),
            unavailable(),
            EndpointError::TimedOut(Duration::from_secs(35)),
            EndpointError::Malformed(Malformed::Token),
            EndpointError::SubscribeOnly,
        ] {
            let mut script = Script::new(&[V1, GetToken]);
            script.fail(error.clone());
            assert_eq!(script.next(), Some(GetToken), "{error}");
            assert!(script.waited.is_empty(), "{error}");
        }
    }

    #[test]
    fn access_token_refused_is_final() {
        for error in [EndpointError::LoggedOut, refused(401, "M_UNAUTHORIZED")] {
            let mut script = Script::new(&[V1, UNSTABLE, GetToken]);
            script.fail(error);
            assert_eq!(script.next(), None);
        }
    }

    #[test]
    fn unavailable_homeserver_without_service_is_retried() {
        let mut script = Script::new(&[UNSTABLE]);
        for _ in 0..4 {
            assert_eq!(script.next(), Some(UNSTABLE));
            script.fail(unavailable());
        }
        assert_eq!(script.next(), None);
        assert_eq!(script.waited, [1, 2, 4]);
    }

    #[test]
    fn unavailable_service_is_retried() {
        let mut script = Script::new(&[SfuGet]);
        for _ in 0..2 {
            script.fail(unavailable());
            assert_eq!(script.next(), Some(SfuGet));
        }
        assert_eq!(script.waited, [1, 2]);
    }

    #[test]
    fn member_is_written_the_other_way_once() {
        for errcode in ["M_NOT_JSON", "M_BAD_JSON"] {
            let mut script = Script::new(&[V1, GetToken]);
            assert_eq!(script.ask(), (None, false));
            script.fail(refused(400, errcode));
            assert_eq!((script.next(), script.ask()), (Some(V1), (None, true)));
            script.fail(refused(400, errcode));
            assert_eq!(script.next(), Some(GetToken));
            assert!(!script.exchange.learned(true).nested_member);
        }
    }

    #[test]
    fn accepted_member_form_is_remembered() {
        let mut script = Script::new(&[V1]);
        script.fail(refused(400, "M_BAD_JSON"));
        let learned = script.exchange.learned(true);
        assert!(learned.nested_member);
        let mut script = Script::with(&[V1], vec![None], learned);
        assert!(script.ask().1);
        script.fail(refused(400, "M_BAD_JSON"));
        assert!(!script.ask().1);
    }

    #[test]
    fn foreign_url_is_asked_at_other_servers() {
        let x = OwnedServerName::try_from("x.example").unwrap();
        let mut script = Script::with(&[V1, UNSTABLE, SfuGet], vec![Some(x), None], Learned::default());
        assert_eq!(script.ask().0.as_deref(), Some("x.example"));
        script.fail(refused(400, "M_INVALID_PARAM"));
        assert_eq!((script.next(), script.ask().0), (Some(V1), None));
        script.fail(refused(400, "M_INVALID_PARAM"));
        assert_eq!(script.next(), Some(SfuGet));
    }

    #[test]
    fn rate_limit_is_waited_for_as_told() {
        let mut script = Script::new(&[V1, GetToken]);
        script.fail(limited(7));
        assert_eq!((script.next(), &script.waited[..]), (Some(V1), &[7][..]));
        script.fail(EndpointError::RateLimited { retry_after: None });
        assert_eq!((script.next(), &script.waited[..]), (Some(V1), &[7, 5][..]));
    }

    #[test]
    fn rate_limit_beyond_the_deadline_ends_at_once() {
        let mut script = Script::new(&[V1, GetToken]);
        script.fail(limited(3600));
        assert_eq!(script.next(), None);
        assert_eq!(script.attempts(), [(V1, limited(3600))]);
    }

    #[test]
    fn endless_rate_limits_end() {
        let mut script = Script::new(&[GetToken]);
        for _ in 0..=MAX_LIMITED {
            assert_eq!(script.next(), Some(GetToken));
            script.fail(limited(0));
        }
        assert_eq!(script.next(), None);
    }

    #[test]
    fn deadline_ends_the_exchange_with_the_last_answer() {
        let mut script = Script::new(&[GetToken]);
        script.fail(unavailable());
        script.now += Duration::from_secs(61);
        assert_eq!(script.attempts(), [(GetToken, unavailable())]);
    }

    #[test]
    fn openid_failures_are_sorted() {
        let mut script = Script::new(&[GetToken, SfuGet]);
        script.fail(EndpointError::OpenId(RequestError::Network { cause: "reset".to_owned() }));
        assert_eq!((script.next(), &script.waited[..]), (Some(GetToken), &[1][..]));
        let wait = RequestError::RateLimited { retry_after: Some(Duration::from_secs(3)) };
        script.fail(EndpointError::OpenId(wait));
        assert_eq!((script.next(), &script.waited[..]), (Some(GetToken), &[1, 3][..]));
        let forbidden = RequestError::Forbidden { errcode: "M_FORBIDDEN".to_owned(), message: String::new() };
        script.fail(EndpointError::OpenId(forbidden));
        assert_eq!(script.next(), None);
    }

    #[test]
    fn service_refusals_try_its_other_endpoint() {
        for error in [refused(400, "M_NOT_JSON"), NOT_THERE, EndpointError::Malformed(Malformed::Json)] {
            let mut script = Script::new(&[GetToken, SfuGet]);
            script.fail(error.clone());
            assert_eq!(script.next(), Some(SfuGet), "{error}");
        }
    }

    #[test]
    fn redirect_is_final() {
        let mut script = Script::new(&[GetToken, SfuGet]);
        script.fail(EndpointError::Redirected { status: 307 });
        assert_eq!(script.next(), None);
    }

    #[test]
    fn homeserver_errors_are_sorted() {
        let sort = |error| EndpointError::of_homeserver(error, Duration::from_secs(35));
        let refusal =
            |status| RequestError::Refused { status, errcode: String::new(), message: String::new() };
        assert_eq!(sort(RequestError::Unsupported), NOT_THERE);
        assert_eq!(sort(RequestError::NotFound), NOT_THERE);
        assert_eq!(sort(refusal(405)), EndpointError::NotThere { status: 405 });
        assert_eq!(sort(refusal(400)), refused(400, ""));
        assert_eq!(sort(RequestError::LoggedOut), EndpointError::LoggedOut);
        assert_eq!(sort(RequestError::TimedOut), EndpointError::TimedOut(Duration::from_secs(35)));
        assert_eq!(
            sort(RequestError::Network { cause: "x".to_owned() }),
            EndpointError::Unavailable { cause: "x".to_owned() }
        );
    }

    #[test]
    fn service_answers_are_sorted() {
        let sort = |status, body: &str| EndpointError::of_service(status, None, body.as_bytes());
        assert_eq!(sort(404, "<html>"), NOT_THERE);
        assert_eq!(sort(405, ""), EndpointError::NotThere { status: 405 });
        assert_eq!(sort(307, ""), EndpointError::Redirected { status: 307 });
        assert_eq!(sort(502, "<html>"), unavailable());
        assert_eq!(sort(429, r#"{"errcode":"M_LIMIT_EXCEEDED","retry_after_ms":7000}"#), limited(7));
        assert_eq!(sort(400, r#"{"errcode":"M_BAD_JSON"}"#), refused(400, "M_BAD_JSON"));
        assert_eq!(sort(403, "<html>"), refused(403, ""));
        assert_eq!(EndpointError::of_service(429, Some(Duration::from_secs(2)), b""), limited(2));
    }

    #[test]
    fn words_of_a_server_are_cut_and_cleaned() {
        let body = format!(r#"{{"errcode":"M_X\u001b[2J","error":"{}"}}"#, "a".repeat(5000));
        let EndpointError::Refused { errcode, message, .. } =
            EndpointError::of_service(400, None, body.as_bytes())
        else {
            panic!()
        };
        assert_eq!((errcode.as_str(), message.len()), ("M_X[2J", MAX_MESSAGE));
    }
}
