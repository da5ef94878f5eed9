//! No persistence: what is stored is gone with the process.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;

use super::{Store, StoreError};
use crate::delegation::{JobKey, StoredJob};

/// A store in this process's memory, for tests and for services without a state directory: a restart forgets
/// every job, so that the homeservers send the leaves of participants who are still in their calls.
#[derive(Default)]
pub struct MemoryStore(Mutex<BTreeMap<JobKey, StoredJob>>);

impl MemoryStore {
    /// An empty store.
    pub fn new() -> Self {
        Self::default()
    }

    fn jobs(&self) -> MutexGuard<'_, BTreeMap<JobKey, StoredJob>> {
        // Each change is one call of the map: there is no half-made one to be seen after a panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl Store for MemoryStore {
    async fn put(&self, job: &StoredJob) -> Result<(), StoreError> {
        self.jobs().insert(job.params.key.clone(), job.clone());
        Ok(())
    }

    async fn remove(&self, key: &JobKey) -> Result<(), StoreError> {
        self.jobs().remove(key);
        Ok(())
    }

    async fn load(&self) -> Result<Vec<StoredJob>, StoreError> {
        Ok(self.jobs().values().cloned().collect())
    }

    async fn lease(&self, _: &JobKey, _: &str, _: Duration) -> Result<bool, StoreError> {
        Ok(true)
    }

    async fn release(&self, _: &JobKey, _: &str) -> Result<(), StoreError> {
        Ok(())
    }

    async fn check(&self) -> Result<(), StoreError> {
        Ok(())
    }

    fn kind(&self) -> &'static str {
        "memory"
    }
}

impl fmt::Debug for MemoryStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryStore").field("jobs", &self.jobs().len()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::{super::wire::tests::job, *};

    #[tokio::test]
    async fn the_last_job_of_a_key_is_kept_until_it_is_removed() {
        let store = MemoryStore::new();
        store.put(&job("a", "1")).await.unwrap();
        store.put(&job("a", "2")).await.unwrap();
        store.put(&job("b", "3")).await.unwrap();
        assert_eq!(store.load().await.unwrap(), [job("a", "2"), job("b", "3")]);
        store.remove(&job("a", "2").params.key).await.unwrap();
        store.remove(&job("a", "2").params.key).await.unwrap();
        assert_eq!(store.load().await.unwrap(), [job("b", "3")]);
        assert_eq!(format!("{store:?}"), "MemoryStore { jobs: 1 }");
    }
}
