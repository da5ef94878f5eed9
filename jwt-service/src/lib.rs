//! Admits Matrix users to the rooms of a LiveKit SFU (MSC4195): a drop-in for lk-jwt-service.
//!
//! A client presents an OpenID token of its homeserver. The service asks that homeserver whose it is, derives
//! the SFU's room and identity names, makes the room exist if the homeserver has full access, and signs a
//! LiveKit token.
//!
//! What it refuses to do: follow a stranger's server name to private addresses, follow redirects with a token
//! in hand, wait without limit, or write tokens and Matrix IDs to its log. What it cannot do with OpenID tokens:
//! check room membership. Any user of any homeserver gets a token for any room they can name; the media are
//! protected by their end-to-end encryption alone.
//!
//! With [`Settings::homeserver`] it also answers what the newest MSC4195 asks of a homeserver: there users show
//! their access token, and must be in the room.
//!
//! The binary `jwt-service` is configured with environment variables ([`Config::from_env`]). As a library,
//! mount [`Service::router`] wherever you like:
//!
//! ```
//! use std::sync::Arc;
//! use antiphon_jwt_service::{FullAccess, Service, Settings, TwirpSfu};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let runtime = tokio::runtime::Runtime::new()?; let _in = runtime.enter();
//! let mut settings = Settings::new("wss://sfu.example.com", "api-key", "api-secret");
//! settings.full_access = FullAccess::Only(["example.com".to_owned()].into());
//! let sfu = TwirpSfu::new(&settings.livekit_url, &settings.key, &settings.secret)?;
//! let service = Service::new(settings, Arc::new(sfu))?;
//! let app: axum::Router = axum::Router::new().nest("/livekit/jwt", service.router());
//! # let _ = app;
//! # Ok(())
//! # }
//! ```

mod config;
pub mod delegation;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzzing;
mod homeserver_side;
mod http;
mod identity;
mod limits;
mod metrics;
mod openid;
mod roots;
mod secret;
mod serve;
mod sfu;
pub mod store;
mod token;

use std::{fmt, sync::Arc, time::Duration};

use axum::Router;
use tokio::sync::{Semaphore, SemaphorePermit};

pub use self::{
    config::{
        Bind, Config, ConfigError, FullAccess, Limits, LogFormat, LogLevel, Network, Rate, RestrictedUsers,
        SETTINGS, Setting, Settings, Sources, TlsFiles, TlsPolicy, TrustedProxies, Warning,
    },
    delegation::{DelegationConfig, Leave},
    homeserver_side::{BadSigningKey, HomeserverSide, SigningKey},
    identity::{LEGACY_SLOT, ParticipantIdentity, RoomAlias},
    openid::{Host, InvalidServerName, Resolve, ResolveError, ServerName, SrvRecord, SystemResolver},
    secret::Secret,
    serve::{Bounds, Certificate, CertificateError, Listener, listen, serve, serve_with},
    sfu::{DEPARTURE_TIMEOUT, EMPTY_TIMEOUT, Sfu, SfuError, SfuParticipant, SfuRoom, TwirpSfu},
    token::{TokenError, TokenSigner},
};
use self::{
    delegation::{Delegation, Input, JobKey},
    homeserver_side::Homeserver,
    http::{Replays, error::Refusal, limits::Limiter, readyz::Readiness},
    metrics::{CountedSfu, CountedStore, Metrics},
    openid::Verifier,
    store::Store,
};

/// Between two attempts to read a store that was out of order at the start.
const RESTORE_AGAIN: Duration = Duration::from_secs(1);

/// The authorisation service. Cloning it gives another handle to the same one.
#[derive(Clone)]
pub struct Service(Arc<Inner>);

/// What the endpoints share.
pub(crate) struct Inner {
    settings: Settings,
    signer: TokenSigner,
    sfu: Arc<dyn Sfu>,
    verifier: Arc<Verifier>,
    places: Semaphore,
    delegation: Option<Delegation>,
    homeserver: Option<Homeserver>,
    replays: Replays,
    limiter: Limiter,
    metrics: Metrics,
    readiness: Readiness,
}

impl Service {
    /// A service with these settings, which makes rooms on `sfu` and looks names up with the system's name
    /// servers.
    ///
    /// # Errors
    /// [`ServiceError`] if the settings cannot work, or this machine offers no TLS or name resolution.
    pub fn new(settings: Settings, sfu: Arc<dyn Sfu>) -> Result<Self, ServiceError> {
        let resolver = SystemResolver::new().map_err(ServiceError::Resolver)?;
        Self::with_resolver(settings, sfu, Arc::new(resolver))
    }

    /// The same with another way to look names up.
    ///
    /// # Errors
    /// [`ServiceError`] if the settings cannot work, or this machine offers no TLS.
    pub fn with_resolver(
        settings: Settings,
        sfu: Arc<dyn Sfu>,
        resolver: Arc<dyn Resolve>,
    ) -> Result<Self, ServiceError> {
        Self::make(settings, sfu, resolver, None)
    }

    /// A service that also takes delayed leaves over, and keeps them in `store`. It looks names up with the
    /// system's name servers. Await [`Self::restore`] before you serve [`Self::router`].
    ///
    /// # Errors
    /// [`ServiceError`] if the settings cannot work, or this machine offers no TLS or name resolution.
    ///
    /// # Panics
    /// Outside a tokio runtime, because jobs need one.
    pub fn with_store(
        settings: Settings,
        sfu: Arc<dyn Sfu>,
        store: Arc<dyn Store>,
        config: DelegationConfig,
    ) -> Result<Self, ServiceError> {
        let resolver = SystemResolver::new().map_err(ServiceError::Resolver)?;
        Self::with_store_and_resolver(settings, sfu, store, config, Arc::new(resolver))
    }

    /// The same with another way to look names up.
    ///
    /// # Errors
    /// [`ServiceError`] if the settings cannot work, or this machine offers no TLS.
    ///
    /// # Panics
    /// Outside a tokio runtime, because jobs need one.
    pub fn with_store_and_resolver(
        settings: Settings,
        sfu: Arc<dyn Sfu>,
        store: Arc<dyn Store>,
        config: DelegationConfig,
        resolver: Arc<dyn Resolve>,
    ) -> Result<Self, ServiceError> {
        Self::make(settings, sfu, resolver, Some((store, config)))
    }

    fn make(
        settings: Settings,
        sfu: Arc<dyn Sfu>,
        resolver: Arc<dyn Resolve>,
        delegation: Option<(Arc<dyn Store>, DelegationConfig)>,
    ) -> Result<Self, ServiceError> {
        let signer = TokenSigner::new(&settings.key, settings.secret.clone())?;
        let metrics = Metrics::new().map_err(|e| ServiceError::Metrics(e.into()))?;
        let sfu: Arc<dyn Sfu> = Arc::new(CountedSfu { sfu, metrics: metrics.clone() });
        let verifier =
            Verifier::new(&settings, resolver, metrics.clone()).map_err(|e| ServiceError::Tls(e.into()))?;
        let verifier = Arc::new(verifier);
        let places = Semaphore::new(settings.limits.in_flight.min(Semaphore::MAX_PERMITS));
        let limiter = Limiter::new(&settings.limits, metrics.clone());
        let delegation = delegation.map(|(store, config)| {
            let store: Arc<dyn Store> = Arc::new(CountedStore { store, metrics: metrics.clone() });
            (store, config)
        });
        let store = delegation.as_ref().map(|(store, _)| store.clone());
        let readiness = Readiness::new(sfu.clone(), store, metrics.clone());
        let delegation =
            delegation.map(|(store, config)| Delegation::start(config, sfu.clone(), store, verifier.clone()));
        let homeserver = settings.homeserver.clone().map(|side| Homeserver::new(side, verifier.clone()));
        let replays = Replays::default();
        Ok(Self(Arc::new(Inner {
            settings,
            signer,
            sfu,
            verifier,
            places,
            delegation,
            homeserver,
            replays,
            limiter,
            metrics,
            readiness,
        })))
    }

    /// Takes the delayed leaves up that are in the store. To be awaited once, before requests and webhooks
    /// come in: right after a start the first webhook may already be about one of them.
    pub async fn restore(&self) {
        let restored = match &self.0.delegation {
            Some(delegation) => delegation.restore().await,
            None => true,
        };
        if restored {
            self.0.readiness.restored();
            return;
        }
        // The store is out of order. Requests are served all the same, and the leaves follow when it is back.
        let service = Arc::downgrade(&self.0);
        #[expect(
            clippy::disallowed_methods,
            reason = "a handle may be awaited by a program that must go on"
        )]
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(RESTORE_AGAIN).await;
                let Some(service) = service.upgrade() else { return };
                if let Some(delegation) = &service.delegation
                    && delegation.restore_late().await
                {
                    return service.readiness.restored();
                }
            }
        });
    }

    /// Takes no more delayed leaves, finishes those that are being sent, within `grace`, and leaves all others
    /// in the store to the next process.
    pub async fn shutdown(&self, grace: Duration) {
        self.0.readiness.stopping();
        if let Some(delegation) = &self.0.delegation {
            delegation.shutdown(grace).await;
        }
    }

    /// Tells that a participant's connection to the SFU is up: what an SFU in this process says in place of a
    /// webhook. `sid` is the connection's id, which [`Sfu::participant`] gives too.
    pub fn participant_joined(&self, room: &str, identity: &str, sid: &str) {
        self.participant(room, identity, Input::Joined { sid: Some(sid.to_owned()) });
    }

    /// Tells that a participant's connection to the SFU, of which [`Self::participant_joined`] told or which
    /// never came up, has ended.
    pub fn participant_left(&self, room: &str, identity: &str, sid: &str, why: Leave) {
        self.participant(room, identity, Input::Left { sid: Some(sid.to_owned()), why });
    }

    fn participant(&self, room: &str, identity: &str, input: Input) {
        if let Some(delegation) = &self.0.delegation {
            let key = JobKey {
                room: RoomAlias::from_sfu(room.to_owned()),
                identity: ParticipantIdentity::from_sfu(identity.to_owned()),
            };
            // Refused only after `shutdown`: the next process will look at the SFU itself.
            delegation.event(&key, input);
        }
    }

    /// How many delayed leaves there are and were; `None` if this service takes none.
    pub fn delegation_stats(&self) -> Option<delegation::Stats> {
        self.0.delegation.as_ref().map(Delegation::stats)
    }

    /// The endpoints, without a path prefix: `/get_token`, `/sfu/get`, `/delegate_delayed_leave`, `/healthz`,
    /// `/readyz`, and with a store `/sfu_webhook`. With [`Settings::homeserver`] also those of the newest
    /// MSC4195, at their full paths below `/_matrix`.
    ///
    /// The limit per address needs to know addresses: a server that is not [`serve`] adds them with
    /// `into_make_service_with_connect_info::<SocketAddr>()`.
    pub fn router(&self) -> Router {
        http::router(self.0.clone())
    }

    /// What operators' tools ask, not for the public: `/metrics` in Prometheus' format, `/healthz`, `/readyz`.
    pub fn operators_router(&self) -> Router {
        http::operators_router(self.0.clone())
    }

    /// Answers `/readyz` with 503 from now on, so that balancers send no more requests: to be called when the
    /// signal to stop comes, before [`Self::shutdown`].
    pub fn stopping(&self) {
        self.0.readiness.stopping();
    }
}

impl fmt::Debug for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Service").field("settings", &self.0.settings).finish_non_exhaustive()
    }
}

impl Inner {
    /// A place among the requests in flight, held until it is dropped.
    fn place(&self) -> Result<SemaphorePermit<'_>, Refusal> {
        self.places.try_acquire().map_err(|_| {
            tracing::warn!(in_flight = self.settings.limits.in_flight, "full: request refused");
            self.metrics.limited(limits::Limit::InFlight.as_str());
            Refusal::TooBusy
        })
    }
}

/// Why a service cannot be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServiceError {
    /// Key or secret is unusable.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// The TLS library cannot be set up.
    #[error("our side: TLS cannot be set up on this machine")]
    Tls(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The metrics cannot be set up.
    #[error("our side: the metrics cannot be set up")]
    Metrics(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// No name resolution.
    #[error("our machine: the name servers cannot be used; check /etc/resolv.conf")]
    Resolver(#[source] ResolveError),
}
