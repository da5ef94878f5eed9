//! Admits Matrix users to the rooms of a LiveKit SFU (MSC4195): a drop-in for lk-jwt-service.
//!
//! A client presents an OpenID token of its homeserver. The service asks that homeserver whose it is, derives
//! the SFU's room and identity names, makes the room exist if the homeserver has full access, and signs a
//! LiveKit token.
//!
//! What it refuses to do: follow a stranger's server name to private addresses, follow redirects with a token
//! in hand, wait without limit, store anything, or write tokens and Matrix IDs to its log. What it cannot do:
//! check room membership. Any user of any homeserver gets a token for any room they can name; the media are
//! protected by their end-to-end encryption alone.
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
mod http;
mod identity;
mod openid;
mod secret;
mod serve;
mod sfu;
mod token;

use std::{fmt, sync::Arc};

use axum::Router;
use tokio::sync::{Semaphore, SemaphorePermit};

pub use self::{
    config::{Bind, Config, ConfigError, FullAccess, Limits, LogLevel, Settings, TlsPolicy, Warning},
    identity::{LEGACY_SLOT, ParticipantIdentity, RoomAlias},
    openid::{Host, InvalidServerName, Resolve, ResolveError, ServerName, SrvRecord, SystemResolver},
    secret::Secret,
    serve::{listen, serve},
    sfu::{DEPARTURE_TIMEOUT, EMPTY_TIMEOUT, Sfu, SfuError, SfuRoom, TwirpSfu},
    token::{TokenError, TokenSigner},
};
use self::{http::error::Refusal, openid::Verifier};

/// The authorisation service. Cloning it gives another handle to the same one.
#[derive(Clone)]
pub struct Service(Arc<Inner>);

/// What the endpoints share.
pub(crate) struct Inner {
    settings: Settings,
    signer: TokenSigner,
    sfu: Arc<dyn Sfu>,
    verifier: Verifier,
    places: Semaphore,
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
        let signer = TokenSigner::new(&settings.key, settings.secret.clone())?;
        let verifier = Verifier::new(&settings, resolver).map_err(|e| ServiceError::Tls(e.into()))?;
        let places = Semaphore::new(settings.limits.in_flight.min(Semaphore::MAX_PERMITS));
        Ok(Self(Arc::new(Inner { settings, signer, sfu, verifier, places })))
    }

    /// The endpoints, without a path prefix: `/get_token`, `/sfu/get`, `/delegate_delayed_leave`, `/healthz`.
    pub fn router(&self) -> Router {
        http::router(self.0.clone())
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
    /// No name resolution.
    #[error("our machine: the name servers cannot be used; check /etc/resolv.conf")]
    Resolver(#[source] ResolveError),
}
