//! Tokens for SFU rooms: from the homeserver, or from the authorisation service of a focus (MSC4195).
#![allow(
    clippy::disallowed_methods,
    reason = "this is the shell of the exchange: it owns the clock and the sockets"
)]

use std::{
    error::Error as StdError,
    fmt,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use reqwest::{
    dns::{Addrs, Name, Resolve, Resolving},
    header,
};
use serde::Deserialize;
use zeroize::Zeroizing;

use super::{
    AddressRule, Endpoint, EndpointError, FocusError, Malformed, PolicyRefusal, Purpose, RefusalReason,
    ServicePolicy, Unsuitable,
    exchange::{self, BACKOFF, Exchange, Learned, Next},
    policy::{Admitted, token_servers},
    wire::{Claims, DelayFields, MAX_REPLY, ServiceBody, claims},
};
use crate::{
    matrix::{Jwt, MatrixPort, MatrixReply, MatrixRequest, OpenIdToken, RtcTokenRequest},
    member::{MemberId, ParticipantIdentity, Slot},
    tls::{self, TlsError},
    transport::{LiveKitFocus, NamedBy, ServiceUrl, SfuUrl},
};

/// How long our homeserver may take to issue an OpenID token.
const OPENID_TIMEOUT: Duration = Duration::from_secs(10);

/// A request for access to the SFU room of a call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AccessRequest {
    /// The focus.
    pub focus: LiveKitFocus,
    /// Where we have it from.
    pub named_by: NamedBy,
    /// The slot of the call.
    pub slot: Slot,
    /// Our own membership's id.
    pub member_id: MemberId,
    /// What the access is for.
    pub purpose: Purpose,
}

/// Access to an SFU room.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SfuAccess {
    /// What was asked for.
    pub request: AccessRequest,
    /// The SFU, in the one spelling that connections are compared by.
    pub sfu: SfuUrl,
    /// The SFU's URL as the issuer gave it, to connect to.
    pub url: String,
    /// The token; redacted in `Debug`.
    pub jwt: Jwt,
    /// Our identity in the room (`sub`).
    pub identity: ParticipantIdentity,
    /// The SFU's name of the room (`video.room`), if the token tells it.
    pub room: Option<String>,
    /// Whether the token allows publishing (`video.canPublish`).
    pub may_publish: bool,
    /// The endpoint that issued the token. It decides the form of the identity, and where our delayed leave can be
    /// delegated.
    pub issued_by: Endpoint,
    /// Which addresses the connection to the SFU may go to.
    pub addresses: AddressRule,
}

impl SfuAccess {
    /// Whether both lead into the same SFU room: a second connection there would be a duplicate, and with the same
    /// identity the SFU would close the first.
    #[must_use]
    pub fn is_same_room(&self, other: &Self) -> bool {
        self.sfu == other.sfu && self.room == other.room
    }
}

/// How long things may take; shorter in tests.
#[derive(Clone, Copy, Debug)]
pub(super) struct Timing {
    /// One request. The service asks our homeserver before it answers, for at most 30 s.
    pub(super) request: Duration,
    /// One exchange with all its retries.
    pub(super) exchange: Duration,
    /// Waits between retries.
    pub(super) backoff: [Duration; 3],
}

impl Default for Timing {
    fn default() -> Self {
        Self { request: Duration::from_secs(35), exchange: Duration::from_secs(60), backoff: BACKOFF }
    }
}

/// Gets tokens for one call. It remembers which services it sent OpenID tokens to.
pub struct Access {
    http: reqwest::Client,
    /// Connects only to what [`ServicePolicy::addresses`] permits; for services that members name.
    guarded: reqwest::Client,
    policy: ServicePolicy,
    pub(super) timing: Timing,
    admitted: Mutex<Admitted>,
    learned: Mutex<Learned>,
}

impl fmt::Debug for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Access").field("policy", &self.policy).finish_non_exhaustive()
    }
}

impl Access {
    /// Access under `policy`, over the TLS configuration of [`tls::client_config`].
    ///
    /// # Errors
    /// [`TlsError::Http`] if the HTTP client cannot be built.
    pub fn new(tls: &Arc<rustls::ClientConfig>, policy: ServicePolicy) -> Result<Self, TlsError> {
        let http = service_client(tls, AddressRule::Any).map_err(TlsError::Http)?;
        let guarded = match policy.addresses {
            AddressRule::Any => http.clone(),
            rule => service_client(tls, rule).map_err(TlsError::Http)?,
        };
        Ok(Self {
            http,
            guarded,
            policy,
            timing: Timing::default(),
            admitted: Mutex::default(),
            learned: Mutex::default(),
        })
    }

    /// Gets access, asking the endpoints that fit the purpose in turn, within 60 s.
    ///
    /// # Errors
    /// [`FocusError::Unsuitable`] or [`FocusError::NoToken`] with every endpoint's answer.
    pub async fn get(&self, port: &dyn MatrixPort, request: &AccessRequest) -> Result<SfuAccess, FocusError> {
        let AccessRequest { focus, named_by, slot, purpose, .. } = request;
        let endpoints = exchange::endpoints(focus, slot, *purpose)
            .map_err(|reason| FocusError::Unsuitable { focus: focus.clone(), reason })?;
        let servers = token_servers(named_by, port.device().user_id.server_name());
        let deadline = now() + self.timing.exchange;
        let learned = lock(&self.learned).clone();
        let mut exchange = Exchange::new(endpoints, servers, learned, deadline, self.timing.backoff);
        let result = loop {
            match exchange.next(now()) {
                Next::Wait(until) => tokio::time::sleep_until(until.into()).await,
                Next::Ask { endpoint, server, nested_member } => {
                    let timeout = self.timing.request.min(deadline.saturating_duration_since(now()));
                    let answer = match endpoint {
                        Endpoint::Homeserver(version) => {
                            let Some(sfu) = focus.sfu.clone() else {
                                break Err(FocusError::Unsuitable {
                                    focus: focus.clone(),
                                    reason: Unsuitable::NoSfu,
                                });
                            };
                            let (slot, member_id) = (slot.clone(), request.member_id.clone());
                            let token =
                                RtcTokenRequest { version, server, sfu, slot, member_id, nested_member };
                            self.ask_homeserver(port, token, timeout).await
                        }
                        Endpoint::GetToken | Endpoint::SfuGet => {
                            self.ask_service(port, request, endpoint, timeout).await
                        }
                    };
                    let access = answer.and_then(|(url, jwt)| self.accept(request, endpoint, url, jwt));
                    match access {
                        Ok(access) => break Ok(access),
                        Err(error) => {
                            tracing::debug!(%focus, %endpoint, %error, "no SFU token");
                            exchange.failed(now(), error);
                        }
                    }
                }
                Next::Failed(attempts) => break Err(FocusError::NoToken { focus: focus.clone(), attempts }),
            }
        };
        *lock(&self.learned) = exchange.learned(result.is_ok());
        if let (Ok(access), Purpose::Publish(_)) = (&result, purpose) {
            warn_of_other_identity(port, request, access);
        }
        result
    }

    async fn ask_homeserver(
        &self,
        port: &dyn MatrixPort,
        token: RtcTokenRequest,
        timeout: Duration,
    ) -> Result<(String, Jwt), EndpointError> {
        // The answer holds no URL: the SFU is the one that we asked for.
        let url = token.sfu.to_string();
        match port.perform(MatrixRequest::RtcToken(token), timeout).await {
            Ok(MatrixReply::Jwt(jwt)) => Ok((url, jwt)),
            Ok(_) => Err(EndpointError::Malformed(Malformed::Json)),
            Err(error) => Err(EndpointError::of_homeserver(error, timeout)),
        }
    }

    async fn ask_service(
        &self,
        port: &dyn MatrixPort,
        request: &AccessRequest,
        endpoint: Endpoint,
        timeout: Duration,
    ) -> Result<(String, Jwt), EndpointError> {
        #[derive(Deserialize)]
        struct Reply {
            url: String,
            jwt: String,
        }
        let Some(service) = &request.focus.service else {
            return Err(EndpointError::NotThere { status: 404 });
        };
        let body = match endpoint {
            Endpoint::SfuGet => ServiceBody::SfuGet,
            _ => ServiceBody::GetToken { slot: &request.slot, member_id: &request.member_id },
        };
        let reply = self.post(port, service, &request.named_by, &body, None, timeout).await?;
        let Reply { url, jwt } =
            serde_json::from_slice(&reply).map_err(|_| EndpointError::Malformed(Malformed::Json))?;
        Ok((url, Jwt(jwt)))
    }

    /// Posts to a service with a fresh OpenID token, if the policy lets the service have one.
    pub(super) async fn post(
        &self,
        port: &dyn MatrixPort,
        service: &ServiceUrl,
        named_by: &NamedBy,
        body: &ServiceBody<'_>,
        delay: Option<&DelayFields<'_>>,
        timeout: Duration,
    ) -> Result<Zeroizing<Vec<u8>>, EndpointError> {
        lock(&self.admitted).admit(&self.policy, service, named_by)?;
        let openid_token = openid_token(port).await?;
        let json = body.json(port, &openid_token, delay)?;
        let (http, guard) = match self.policy.addresses_for(named_by) {
            AddressRule::Any => (&self.http, None),
            AddressRule::PublicOnly => (&self.guarded, Some(named_by)),
        };
        let failed = |error: reqwest::Error| {
            if let Some(named_by) = guard
                && sources(&error).any(|source| source.is::<PrivateName>())
            {
                let (url, named_by) = (service.to_string(), named_by.clone());
                return PolicyRefusal { url, named_by, reason: RefusalReason::PrivateAddress }.into();
            }
            if error.is_timeout() {
                return EndpointError::TimedOut(timeout);
            }
            let error = error.without_url();
            // The innermost cause says most ("connection refused", "unknown issuer").
            let cause = sources(&error).last().map_or_else(|| error.to_string(), ToString::to_string);
            EndpointError::Unavailable { cause }
        };
        let mut reply = http
            .post(format!("{service}{}", body.path()))
            .header(header::CONTENT_TYPE, "application/json")
            .body(json)
            .timeout(timeout)
            .send()
            .await
            .map_err(failed)?;
        let (status, retry_after) = (reply.status(), retry_after(reply.headers()));
        // One allocation, so that no copy of a token stays behind in memory.
        let mut bytes = Zeroizing::new(Vec::with_capacity(MAX_REPLY));
        while let Some(chunk) = reply.chunk().await.map_err(failed)? {
            if bytes.len() + chunk.len() > MAX_REPLY {
                return Err(EndpointError::Malformed(Malformed::TooLong));
            }
            bytes.extend_from_slice(&chunk);
        }
        if !status.is_success() {
            return Err(EndpointError::of_service(status.as_u16(), retry_after, &bytes));
        }
        Ok(bytes)
    }

    /// Judges what an endpoint issued.
    fn accept(
        &self,
        request: &AccessRequest,
        issued_by: Endpoint,
        url: String,
        jwt: Jwt,
    ) -> Result<SfuAccess, EndpointError> {
        let sfu: SfuUrl = url.parse().map_err(|_| EndpointError::Malformed(Malformed::SfuUrl))?;
        let Claims { sub, video } = claims(&jwt.0)?;
        self.policy.check_sfu(&sfu, &request.named_by)?;
        if sfu.as_str().starts_with("ws:") && !sfu.is_loopback() {
            tracing::warn!(%sfu, "the SFU is not reached over wss: others on the way can take our place in the call");
        }
        let video = video.unwrap_or_default();
        // LiveKit reads a missing `canPublish` as permission.
        let may_publish = video.can_publish.unwrap_or(true);
        if !may_publish && matches!(request.purpose, Purpose::Publish(_)) {
            return Err(EndpointError::SubscribeOnly);
        }
        Ok(SfuAccess {
            request: request.clone(),
            sfu,
            url,
            jwt,
            identity: ParticipantIdentity(sub),
            room: video.room,
            may_publish,
            issued_by,
            addresses: self.policy.addresses_for(&request.named_by),
        })
    }
}

/// An HTTP client for services and SFUs. It follows no redirects and uses no proxy of the environment: an OpenID token
/// goes to the announced service alone, and media could not pass an HTTP proxy either.
pub(crate) fn service_client(
    tls: &Arc<rustls::ClientConfig>,
    addresses: AddressRule,
) -> Result<reqwest::Client, reqwest::Error> {
    let builder = tls::http_client_builder(tls)
        .redirect(reqwest::redirect::Policy::none())
        .no_proxy()
        .connect_timeout(Duration::from_secs(5));
    match addresses {
        AddressRule::Any => builder.build(),
        AddressRule::PublicOnly => builder.dns_resolver(PublicResolver).build(),
    }
}

async fn openid_token(port: &dyn MatrixPort) -> Result<OpenIdToken, EndpointError> {
    match port.perform(MatrixRequest::OpenIdToken, OPENID_TIMEOUT).await {
        Ok(MatrixReply::OpenId(token)) => Ok(token),
        Ok(_) => Err(EndpointError::OpenId(crate::matrix::RequestError::Unsupported)),
        Err(crate::matrix::RequestError::LoggedOut) => Err(EndpointError::LoggedOut),
        Err(error) => Err(EndpointError::OpenId(error)),
    }
}

/// Others derive our identity from our membership; under another one they cannot tell who we are.
fn warn_of_other_identity(port: &dyn MatrixPort, request: &AccessRequest, access: &SfuAccess) {
    let device = port.device();
    let expected = match access.issued_by {
        Endpoint::Homeserver(_) => ParticipantIdentity::of_member(&device.user_id, &request.member_id),
        Endpoint::GetToken => {
            ParticipantIdentity::of_claimed_device(&device.user_id, &device.device_id, &request.member_id)
        }
        Endpoint::SfuGet => ParticipantIdentity::of_device(&device.user_id, &device.device_id),
    };
    if expected != access.identity {
        tracing::warn!(
            focus = %request.focus, issued_by = %access.issued_by, got = %access.identity, %expected,
            "the issuer gave us another identity than MSC4195 derives; other members may not see our media"
        );
    }
}

/// `Retry-After` in seconds. A date, which no known service sends, reads as none.
fn retry_after(headers: &header::HeaderMap) -> Option<Duration> {
    let text = headers.get(header::RETRY_AFTER)?.to_str().ok()?.trim();
    text.parse().ok().map(Duration::from_secs)
}

fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

/// The error and its causes, outermost first.
fn sources<'a>(error: &'a (dyn StdError + 'static)) -> impl Iterator<Item = &'a (dyn StdError + 'static)> {
    std::iter::successors(Some(error), |&error| error.source())
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Resolves names to public addresses only. It runs at the moment of connecting, so a name cannot be judged by one
/// address and reached at another.
struct PublicResolver;

/// A name has no public address.
#[derive(Debug, thiserror::Error)]
#[error("the name has no public address")]
struct PrivateName;

impl Resolve for PublicResolver {
    fn resolve(&self, name: Name) -> Resolving {
        Box::pin(async move {
            let found = tokio::net::lookup_host((name.as_str(), 0)).await?;
            let public: Vec<SocketAddr> =
                found.filter(|address| AddressRule::PublicOnly.permits(address.ip())).collect();
            if public.is_empty() {
                return Err(PrivateName.into());
            }
            Ok(Box::new(public.into_iter()) as Addrs)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn name_of_this_machine_resolves_to_nothing_public() {
        let Err(error) = PublicResolver.resolve("localhost".parse().unwrap()).await else { panic!() };
        assert!(error.is::<PrivateName>());
    }
}
