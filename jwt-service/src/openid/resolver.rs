//! Names to addresses: the port that the lookup asks, and its adapter to the system's name servers.

use std::{error::Error, net::SocketAddr};

use async_trait::async_trait;
use hickory_resolver::{
    Resolver, TokioResolver,
    config::{LookupIpStrategy, ResolverConfig},
    net::{NetError, runtime::TokioRuntimeProvider},
    proto::rr::{Name, RData},
};

/// How many answers the system resolver keeps, so that callers who invent names cannot grow it.
const CACHED_ANSWERS: u64 = 4096;

/// Looks names up. Give [`Service::with_resolver`](crate::Service::with_resolver) your own to pin names.
#[async_trait]
pub trait Resolve: Send + Sync {
    /// Where to connect for `port` of `host`, a DNS name.
    ///
    /// # Errors
    /// [`ResolveError::NotFound`] if the name or its address does not exist, [`ResolveError::Failed`]
    /// otherwise.
    async fn addresses(&self, host: &str, port: u16) -> Result<Vec<SocketAddr>, ResolveError>;

    /// The SRV records of `name`, such as `_matrix-fed._tcp.example.com`, in any order.
    ///
    /// # Errors
    /// As for [`addresses`](Self::addresses).
    async fn services(&self, name: &str) -> Result<Vec<SrvRecord>, ResolveError>;
}

/// One SRV record (RFC 2782).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SrvRecord {
    /// Lowest first.
    pub priority: u16,
    /// Share among records of one priority.
    pub weight: u16,
    /// Where to connect.
    pub port: u16,
    /// The DNS name to connect to, without a trailing dot. Empty means "no such service here".
    pub target: String,
}

/// Why a name could not be looked up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ResolveError {
    /// The name, or the kind of record asked for, does not exist.
    #[error("no such name")]
    NotFound,
    /// The name servers could not be asked, or failed.
    #[error("the name servers could not say")]
    Failed(#[source] Box<dyn Error + Send + Sync>),
}

/// The name servers of this machine (`/etc/resolv.conf`, `/etc/hosts`), with answers cached as long as they
/// allow.
pub struct SystemResolver(TokioResolver);

impl SystemResolver {
    /// Reads the system's configuration. If there is none, only `/etc/hosts`, `localhost` and IP literals
    /// resolve, and a warning is logged.
    ///
    /// # Errors
    /// [`ResolveError::Failed`] if no resolver can be made.
    pub fn new() -> Result<Self, ResolveError> {
        let mut builder = Resolver::builder_tokio().unwrap_or_else(|error| {
            tracing::warn!(%error, "no name servers found on this machine; only /etc/hosts resolves");
            Resolver::builder_with_config(ResolverConfig::default(), TokioRuntimeProvider::default())
        });
        let options = builder.options_mut();
        options.cache_size = CACHED_ANSWERS;
        options.ip_strategy = LookupIpStrategy::Ipv6AndIpv4;
        Ok(Self(builder.build().map_err(failed)?))
    }
}

#[async_trait]
impl Resolve for SystemResolver {
    async fn addresses(&self, host: &str, port: u16) -> Result<Vec<SocketAddr>, ResolveError> {
        Ok(self.0.lookup_ip(host).await.map_err(failed)?.iter().map(|ip| SocketAddr::new(ip, port)).collect())
    }

    async fn services(&self, name: &str) -> Result<Vec<SrvRecord>, ResolveError> {
        // Never below a search domain: the name is somebody else's, in full.
        let mut name = Name::from_utf8(name).map_err(|e| ResolveError::Failed(e.into()))?;
        name.set_fqdn(true);
        let answer = self.0.srv_lookup(name).await.map_err(failed)?;
        let records = answer.answers().iter().filter_map(|record| match &record.data {
            RData::SRV(srv) => Some(SrvRecord {
                priority: srv.priority,
                weight: srv.weight,
                port: srv.port,
                target: srv.target.to_ascii().trim_end_matches('.').to_owned(),
            }),
            _ => None,
        });
        let records: Vec<_> = records.collect();
        if records.is_empty() { Err(ResolveError::NotFound) } else { Ok(records) }
    }
}

fn failed(error: NetError) -> ResolveError {
    if error.is_no_records_found() { ResolveError::NotFound } else { ResolveError::Failed(error.into()) }
}
