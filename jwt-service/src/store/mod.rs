//! Where jobs survive a restart of the service.

mod file;
mod memory;
mod redis;
mod wire;

use std::{fmt, path::PathBuf, sync::Arc, time::Duration};

use async_trait::async_trait;

pub use self::{
    file::FileStore,
    memory::MemoryStore,
    redis::{InvalidRedisUrl, RedisStore, RedisUrl},
};
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use self::{file::properties::job_log, wire::properties::stored_job};
use crate::delegation::{JobKey, StoredJob};

/// Which store a service uses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum StoreConfig {
    /// None that outlives the process.
    #[default]
    Memory,
    /// Files in this directory, which no other process may use.
    File(PathBuf),
    /// A Redis server, which other replicas and lk-jwt-service may use too.
    Redis {
        /// Where it is.
        url: RedisUrl,
        /// What its keys begin with: [`RedisStore::DEFAULT_PREFIX`] is what lk-jwt-service uses.
        prefix: String,
    },
}

/// Opens a store. A Redis server is not asked for anything yet: it may come up later; [`Store::check`] tells.
///
/// # Errors
/// [`StoreError`] if the state directory cannot be used.
pub async fn open(config: &StoreConfig) -> Result<Arc<dyn Store>, StoreError> {
    Ok(match config {
        StoreConfig::Memory => Arc::new(MemoryStore::new()),
        StoreConfig::File(directory) => Arc::new(FileStore::open(directory).await?),
        StoreConfig::Redis { url, prefix } => Arc::new(RedisStore::new(url.clone(), prefix)),
    })
}

/// What takes the messages of [`Store::listen`].
pub type Heard = dyn Fn(&[u8]) + Send + Sync;

/// A place for jobs. Calls for one key come in order, never two at once; a failed call is repeated by the caller.
#[async_trait]
pub trait Store: Send + Sync + fmt::Debug {
    /// Writes a job over what was there for its key; durable when this returns.
    async fn put(&self, job: &StoredJob) -> Result<(), StoreError>;

    /// Forgets the job of a key; a key that is not there is fine.
    async fn remove(&self, key: &JobKey) -> Result<(), StoreError>;

    /// Every job that is readable. Entries that are not are purged after they were logged.
    async fn load(&self) -> Result<Vec<StoredJob>, StoreError>;

    /// Makes `replica` the one that acts on a job until `ttl` passes, unless another one is. Stores of a single
    /// process always say yes.
    async fn lease(&self, key: &JobKey, replica: &str, ttl: Duration) -> Result<bool, StoreError>;

    /// Gives a lease up, if `replica` holds it.
    async fn release(&self, key: &JobKey, replica: &str) -> Result<(), StoreError>;

    /// Says something to the other processes that share this store. Nothing is kept: whoever does not listen now
    /// misses it. Stores of a single process have nobody to talk to.
    async fn tell(&self, message: &[u8]) -> Result<(), StoreError> {
        let _ = message;
        Ok(())
    }

    /// Hands every message of processes that share this store to `heard`, this one's included, until that breaks
    /// off. `Ok` means that this store cannot do it; those of a single process just never hear anything.
    async fn listen(&self, heard: &Heard) -> Result<(), StoreError> {
        let _ = heard;
        std::future::pending().await
    }

    /// Whether the store answers right now.
    async fn check(&self) -> Result<(), StoreError>;

    /// For logs and readiness: `memory`, `file` or `redis`.
    fn kind(&self) -> &'static str;
}

/// A store did not do what was asked; nothing is known about whether it did.
#[derive(Debug, thiserror::Error)]
#[error("the {kind} store failed to {doing}; jobs are kept in memory until it is back")]
pub struct StoreError {
    /// Which kind of store.
    pub kind: &'static str,
    /// What it was asked to do.
    pub doing: &'static str,
    /// What it said.
    #[source]
    pub source: Box<dyn std::error::Error + Send + Sync>,
}
