//! OpenID verification: asking a user's homeserver, found by Matrix server discovery, whom a token belongs
//! to.
//!
//! The server's name is chosen by whoever calls us, so everything here is bounded in time and size, and every
//! address is checked at the moment of connecting ([`addresses`]). Exactly one userinfo request is made per
//! lookup; it is never redirected.
#![allow(clippy::disallowed_methods, reason = "this is the shell: it owns the clock and the tasks")]

mod addresses;
mod client_api;
mod connect;
mod destination;
mod federation;
mod resolver;
mod server_name;
mod userinfo;
mod well_known;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use axum::body::Body;
use bytes::Bytes;
use hyper::{
    Request, Response, StatusCode, Uri,
    body::Incoming,
    header::{ACCEPT, CACHE_CONTROL, HOST, LOCATION, USER_AGENT},
    http::uri::PathAndQuery,
};
use url::{Url, form_urlencoded};

use self::{
    addresses::Egress,
    connect::{ConnectError, Connections, GuardedClient, Route},
    userinfo::{UserinfoError, verified_user},
    well_known::{Delegation, DelegationCache, MAX_DOCUMENT, delegation, lifetime},
};
pub(crate) use self::{
    client_api::ClientAnswer,
    connect::{PROBE_AFTER, UNACKNOWLEDGED},
    federation::FederationRequest,
    userinfo::VerifiedUser,
};
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use self::{
    client_api::properties::client_document, server_name::properties::server_name,
    userinfo::properties::userinfo_answer, well_known::properties::server_document,
};
pub use self::{
    resolver::{Resolve, ResolveError, SrvRecord, SystemResolver},
    server_name::{Host, InvalidServerName, ServerName},
};
use crate::{
    config::{FullAccess, Settings, TlsPolicy},
    metrics::Metrics,
    secret::Secret,
};

/// The largest userinfo answer we read; a real one is under a kilobyte.
const MAX_USERINFO: usize = 64 * 1024;
/// The share of the lookup's time that `.well-known` may take: a hanging web server must not make a working
/// homeserver unreachable.
const WELL_KNOWN_TIME: Duration = Duration::from_secs(10);
/// Redirects followed on `.well-known` and for delayed events, and only there.
const MAX_REDIRECTS: usize = 10;

/// Before the one retry of a failed connect.
const CONNECT_PAUSE: Duration = Duration::from_millis(300);

const AGENT: &str = concat!("antiphon-jwt-service/", env!("CARGO_PKG_VERSION"));

/// Verifies OpenID tokens.
pub(crate) struct Verifier {
    rules: Rules,
    lanes: HashMap<Lane, Clients>,
    overrides: BTreeMap<String, Url>,
    tokens: BTreeMap<String, Secret>,
    delegations: Mutex<DelegationCache>,
    budget: Duration,
    metrics: Metrics,
}

impl Verifier {
    pub(crate) fn new(
        settings: &Settings,
        resolver: Arc<dyn Resolve>,
        metrics: Metrics,
    ) -> Result<Self, rustls::Error> {
        let connections = Connections::new(resolver, settings.limits.connect)?;
        let rules = Rules::new(settings);
        let lanes = rules.lanes().into_iter().map(|lane| (lane, Clients::new(&connections, lane))).collect();
        let overrides = settings.cs_api_url_overrides.iter();
        let mut overrides: BTreeMap<_, _> =
            overrides.map(|(name, url)| (name.to_ascii_lowercase(), url.clone())).collect();
        if let Some(own) = &settings.homeserver {
            overrides.entry(own.name.as_str().to_ascii_lowercase()).or_insert_with(|| own.url.clone());
        }
        let tokens = settings.delayed_event_tokens.iter();
        let tokens = tokens.map(|(name, token)| (name.to_ascii_lowercase(), token.clone())).collect();
        let budget = settings.limits.lookup;
        Ok(Self { rules, lanes, overrides, tokens, delegations: Mutex::default(), budget, metrics })
    }

    /// The user to whom `server_name` has issued `token`.
    pub(crate) async fn verify(
        &self,
        server_name: &str,
        token: &Secret,
    ) -> Result<VerifiedUser, LookupError> {
        let name: ServerName = server_name.parse()?;
        tokio::time::timeout(self.budget, self.look_up(&name, token))
            .await
            .map_err(|_| LookupError::TimedOut)?
    }

    async fn look_up(&self, name: &ServerName, token: &Secret) -> Result<VerifiedUser, LookupError> {
        let lane = self.rules.lane(name);
        let clients = self.lanes.get(&lane).ok_or(LookupError::Ours)?;
        let (target, remembered) = self.delegated(name, clients).await?;
        let answer = match clients.userinfo(&target, token).await {
            Err(LookupError::Connect(_)) => {
                // The server may have moved since we looked, or is just being restarted. Ask again, once.
                if remembered {
                    self.cache().forget(&cache_key(name));
                }
                tokio::time::sleep(CONNECT_PAUSE).await;
                let (target, _) = self.delegated(name, clients).await?;
                clients.userinfo(&target, token).await
            }
            // Mostly a connection that we had kept and the server had given up. No answer was on its way.
            Err(LookupError::Closed(_)) => clients.userinfo(&target, token).await,
            answer => answer,
        }?;
        Ok(verified_user(&answer, name.as_str())?)
    }

    /// The name under which `name` is served, and whether that was remembered from before.
    async fn delegated(
        &self,
        name: &ServerName,
        clients: &Clients,
    ) -> Result<(ServerName, bool), LookupError> {
        if name.port().is_some() || matches!(name.host(), Host::Ip(_)) {
            return Ok((name.clone(), false));
        }
        let key = cache_key(name);
        let known = self.cache().lookup(&key, Instant::now());
        let remembered = known.is_some();
        let delegation = match known {
            Some(delegation) => {
                self.metrics.discovery("hit");
                delegation
            }
            None => {
                let fetched = tokio::time::timeout(WELL_KNOWN_TIME, clients.well_known(name)).await;
                let soon = lifetime(&Delegation::None, false, None);
                let (outcome, (delegation, lifetime)) = match fetched {
                    Ok(Ok(found)) => ("fetched", found),
                    Ok(Err(_)) | Err(_) => match self.cache().stale(&key) {
                        Some(before) => ("stale", (before, soon)),
                        None => ("failed", (Delegation::None, soon)),
                    },
                };
                self.metrics.discovery(outcome);
                self.cache().remember(key, delegation.clone(), Instant::now(), lifetime);
                delegation
            }
        };
        match delegation {
            Delegation::To(target) => Ok((target, remembered)),
            Delegation::None => Ok((name.clone(), remembered)),
            Delegation::Invalid => Err(LookupError::BadDelegation),
        }
    }

    fn cache(&self) -> MutexGuard<'_, DelegationCache> {
        // Nothing between lock and unlock can leave the map half-changed.
        self.delegations.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn cache_key(name: &ServerName) -> String {
    name.as_str().to_ascii_lowercase()
}

/// Where lookups of one kind of server may go, and whether certificates are checked there. Connections are
/// pooled per lane, so one made under a lenient rule is never used under a strict one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Lane {
    egress: Egress,
    verify: bool,
}

/// Which lane a server name takes. The name in the request decides, also for what it delegates to.
struct Rules {
    tls: TlsPolicy,
    loopback_listed: bool,
    named: BTreeSet<String>,
}

impl Rules {
    fn new(settings: &Settings) -> Self {
        let mut named: BTreeSet<String> =
            settings.private_homeservers.iter().map(|n| n.to_ascii_lowercase()).collect();
        named.extend(settings.cs_api_url_overrides.keys().map(|n| n.to_ascii_lowercase()));
        named.extend(settings.homeserver.iter().map(|own| own.name.as_str().to_ascii_lowercase()));
        if let FullAccess::Only(names) = &settings.full_access {
            named.extend(names.iter().map(|n| n.to_ascii_lowercase()));
        }
        Self {
            tls: settings.insecure_skip_verify_tls,
            loopback_listed: settings.full_access == FullAccess::Loopback,
            named,
        }
    }

    fn lanes(&self) -> Vec<Lane> {
        let verified = |egress| Lane { egress, verify: true };
        let unverified = |egress| Lane { egress, verify: false };
        match self.tls {
            TlsPolicy::SkipAll => vec![unverified(Egress::Any)],
            TlsPolicy::SkipLoopback => {
                vec![unverified(Egress::Loopback), verified(Egress::Any), verified(Egress::Public)]
            }
            TlsPolicy::Verify => {
                vec![verified(Egress::Loopback), verified(Egress::Any), verified(Egress::Public)]
            }
        }
    }

    /// For a URL that the operator has written: anywhere, and the certificate is checked unless none is.
    fn operators_lane(&self) -> Lane {
        Lane { egress: Egress::Any, verify: self.tls != TlsPolicy::SkipAll }
    }

    fn lane(&self, name: &ServerName) -> Lane {
        if self.tls == TlsPolicy::SkipAll {
            Lane { egress: Egress::Any, verify: false }
        } else if self.tls == TlsPolicy::SkipLoopback && name.is_loopback() {
            Lane { egress: Egress::Loopback, verify: false }
        } else if self.named.contains(&name.as_str().to_ascii_lowercase()) {
            Lane { egress: Egress::Any, verify: true }
        } else if self.loopback_listed && name.is_loopback() {
            Lane { egress: Egress::Loopback, verify: true }
        } else {
            Lane { egress: Egress::Public, verify: true }
        }
    }
}

/// The HTTP clients of one lane.
struct Clients {
    web: GuardedClient,
    federation: GuardedClient,
}

impl Clients {
    fn new(connections: &Connections, lane: Lane) -> Self {
        let client = |route| connections.client(route, lane.egress, lane.verify);
        Self { web: client(Route::Web), federation: client(Route::Federation) }
    }

    async fn userinfo(&self, target: &ServerName, token: &Secret) -> Result<Bytes, LookupError> {
        let token: String = form_urlencoded::byte_serialize(token.expose().as_bytes()).collect();
        let path = format!("/_matrix/federation/v1/openid/userinfo?access_token={token}");
        let uri = https(target.as_str(), &path)?;
        let answer = request(&self.federation, uri, target.as_str()).await?;
        if !answer.status().is_success() {
            return Err(LookupError::Status(answer.status()));
        }
        body(answer, MAX_USERINFO).await
    }

    /// What `name` delegates to, and for how long that may be remembered. An error is "we could not find
    /// out".
    async fn well_known(&self, name: &ServerName) -> Result<(Delegation, Duration), LookupError> {
        let (found, cache_control) = match self.document(name, "server", MAX_DOCUMENT).await? {
            Some((document, cache_control)) => (delegation(&document), cache_control),
            None => (Delegation::None, None),
        };
        let lifetime = lifetime(&found, true, cache_control.as_deref());
        Ok((found, lifetime))
    }

    /// `/.well-known/matrix/<which>` of `name` with its `Cache-Control`; `None` if there is none.
    async fn document(
        &self,
        name: &ServerName,
        which: &str,
        limit: usize,
    ) -> Result<Option<(Bytes, Option<String>)>, LookupError> {
        let mut url = Url::parse(&format!("https://{name}/.well-known/matrix/{which}"))
            .map_err(|_| LookupError::BadDelegation)?;
        for _ in 0..=MAX_REDIRECTS {
            let host = url.host_str().ok_or(LookupError::BadDelegation)?;
            let authority = url.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"));
            let path = url.query().map_or_else(|| url.path().to_owned(), |q| format!("{}?{q}", url.path()));
            let answer = request(&self.web, https(&authority, &path)?, &authority).await?;
            if answer.status().is_redirection() {
                let next = answer.headers().get(LOCATION).and_then(|l| url.join(l.to_str().ok()?).ok());
                match next.filter(|next| next.scheme() == "https") {
                    Some(next) => url = next,
                    None => break,
                }
                continue;
            }
            match answer.status() {
                StatusCode::OK => {}
                // A server in trouble has not said that there is no document.
                status if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS => {
                    return Err(LookupError::WellKnown(status));
                }
                _ => break,
            }
            let cache_control =
                answer.headers().get(CACHE_CONTROL).and_then(|v| v.to_str().ok()).map(str::to_owned);
            return Ok(Some((body(answer, limit).await?, cache_control)));
        }
        Ok(None)
    }
}

fn https(authority: &str, path: &str) -> Result<Uri, LookupError> {
    let path = PathAndQuery::try_from(path).map_err(|_| LookupError::Ours)?;
    Uri::builder()
        .scheme("https")
        .authority(authority)
        .path_and_query(path)
        .build()
        .map_err(|_| LookupError::Ours)
}

async fn request(client: &GuardedClient, uri: Uri, host: &str) -> Result<Response<Incoming>, LookupError> {
    let request = Request::get(uri)
        .header(HOST, host)
        .header(USER_AGENT, AGENT)
        .header(ACCEPT, "application/json")
        .body(Body::empty())
        .map_err(|_| LookupError::Ours)?;
    client.request(request).await.map_err(classify)
}

/// Sorts a failed request: no connection, a connection that the other side had closed, or anything else.
fn classify(error: hyper_util::client::legacy::Error) -> LookupError {
    if error.is_connect() {
        let refused = std::error::Error::source(&error)
            .and_then(|e| e.downcast_ref())
            .is_some_and(|e| matches!(e, ConnectError::NotPermitted));
        return if refused { LookupError::NotPermitted } else { LookupError::Connect(error) };
    }
    if is_closed(&error) { LookupError::Closed(error) } else { LookupError::Http(error.into()) }
}

/// Whether the connection had ended, in whichever way, before the other side answered.
fn is_closed(error: &(dyn std::error::Error + 'static)) -> bool {
    std::iter::successors(error.source(), |error| error.source()).any(|error| {
        let by_message = error
            .downcast_ref::<hyper::Error>()
            .is_some_and(|e| e.is_incomplete_message() || e.is_closed() || e.is_canceled());
        let by_the_system = error.downcast_ref::<std::io::Error>().is_some_and(|e| {
            use std::io::ErrorKind::{
                BrokenPipe, ConnectionAborted, ConnectionReset, HostUnreachable, NetworkUnreachable,
                TimedOut, UnexpectedEof,
            };
            // The last three come late: nothing that we sent was acknowledged.
            matches!(
                e.kind(),
                BrokenPipe
                    | ConnectionAborted
                    | ConnectionReset
                    | UnexpectedEof
                    | HostUnreachable
                    | NetworkUnreachable
                    | TimedOut
            )
        });
        by_message || by_the_system
    })
}

async fn body(answer: Response<Incoming>, limit: usize) -> Result<Bytes, LookupError> {
    axum::body::to_bytes(Body::new(answer.into_body()), limit).await.map_err(|e| LookupError::Http(e.into()))
}

/// Why a token was not accepted. For the log: the caller learns none of it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LookupError {
    #[error(transparent)]
    InvalidServerName(#[from] InvalidServerName),
    #[error("the server's .well-known delegates to something that is no server name")]
    BadDelegation,
    #[error("{}", ConnectError::NotPermitted)]
    NotPermitted,
    #[error("no connection to the homeserver")]
    Connect(#[source] hyper_util::client::legacy::Error),
    #[error("the homeserver closed the connection without an answer")]
    Closed(#[source] hyper_util::client::legacy::Error),
    #[error("the homeserver's answer could not be read")]
    Http(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("the homeserver does not know the token (HTTP {0})")]
    Status(StatusCode),
    #[error("the server does not say whether it has a .well-known (HTTP {0})")]
    WellKnown(StatusCode),
    #[error(transparent)]
    Userinfo(#[from] UserinfoError),
    #[error("the homeserver did not answer in time")]
    TimedOut,
    #[error("the server's .well-known names no client-server API")]
    NoClientApi,
    #[error("the homeserver's redirects have no end")]
    TooManyRedirects,
    #[error("our side: the request could not be made")]
    Ours,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(change: impl FnOnce(&mut Settings)) -> Rules {
        let mut settings = Settings::new("ws://localhost", "key", "secret");
        change(&mut settings);
        Rules::new(&settings)
    }

    fn lane(rules: &Rules, name: &str) -> (Egress, bool) {
        let lane = rules.lane(&name.parse().unwrap());
        assert!(rules.lanes().contains(&lane), "{lane:?} has clients");
        (lane.egress, lane.verify)
    }

    #[test]
    fn strangers_take_us_to_public_addresses_only() {
        let rules = rules(|s| s.full_access = FullAccess::All);
        assert_eq!(lane(&rules, "hs.org"), (Egress::Public, true));
        assert_eq!(lane(&rules, "127.0.0.1:8448"), (Egress::Public, true), "the wildcard names nobody");
    }

    #[test]
    fn servers_the_operator_has_named_may_be_anywhere() {
        let rules = rules(|s| {
            s.full_access = FullAccess::Only(["Hs.org".to_owned()].into());
            s.private_homeservers = ["10.0.0.1".to_owned()].into();
            s.cs_api_url_overrides =
                [("127.0.0.1:8448".to_owned(), "http://127.0.0.1:8008".parse().unwrap())].into();
        });
        for named in ["hs.ORG", "10.0.0.1", "127.0.0.1:8448"] {
            assert_eq!(lane(&rules, named), (Egress::Any, true), "{named}");
        }
        assert_eq!(lane(&rules, "hs.org:8448"), (Egress::Public, true));
    }

    #[test]
    fn skipping_tls_everywhere_opens_everything() {
        let rules = rules(|s| s.insecure_skip_verify_tls = TlsPolicy::SkipAll);
        assert_eq!(lane(&rules, "127.0.0.1:1"), (Egress::Any, false));
    }

    #[test]
    fn the_development_leniency_stays_on_this_machine() {
        let rules = rules(|s| {
            s.full_access = FullAccess::Loopback;
            s.insecure_skip_verify_tls = TlsPolicy::SkipLoopback;
        });
        assert_eq!(lane(&rules, "localhost:8448"), (Egress::Loopback, false));
        assert_eq!(lane(&rules, "hs.org"), (Egress::Public, true));
        assert_eq!(lane(&rules, "10.0.0.1"), (Egress::Public, true));
    }
}

#[cfg(test)]
mod trouble_is_soon_forgotten;
