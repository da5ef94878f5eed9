//! A replica that is shut down tells the others, and they take its jobs without waiting for their next look into the
//! shared store.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use antiphon_jwt_service::{
    DelegationConfig, Service,
    delegation::{JobKey, StoredJob},
    store::{Heard, MemoryStore, Store, StoreError},
};
use async_trait::async_trait;
use tokio::{
    sync::broadcast,
    time::{Instant, sleep, timeout},
};

use crate::{
    restoring_late::job,
    support::{DEADLINE, FakeSfu, settings},
};

/// What replicas share, in this process: Redis does not keep to a test's time. Its leases do not run out.
#[derive(Debug)]
struct Shared {
    jobs: MemoryStore,
    leases: Mutex<HashMap<JobKey, String>>,
    said: broadcast::Sender<Vec<u8>>,
}

#[async_trait]
impl Store for Shared {
    async fn put(&self, job: &StoredJob) -> Result<(), StoreError> {
        self.jobs.put(job).await
    }

    async fn remove(&self, key: &JobKey) -> Result<(), StoreError> {
        self.jobs.remove(key).await
    }

    async fn load(&self) -> Result<Vec<StoredJob>, StoreError> {
        self.jobs.load().await
    }

    async fn lease(&self, key: &JobKey, replica: &str, _: Duration) -> Result<bool, StoreError> {
        let mut leases = self.leases.lock().unwrap();
        Ok(leases.entry(key.clone()).or_insert_with(|| replica.to_owned()) == replica)
    }

    async fn release(&self, key: &JobKey, replica: &str) -> Result<(), StoreError> {
        let mut leases = self.leases.lock().unwrap();
        if leases.get(key).is_some_and(|holder| holder == replica) {
            leases.remove(key);
        }
        Ok(())
    }

    async fn tell(&self, message: &[u8]) -> Result<(), StoreError> {
        // An error means that nobody listens.
        let _ = self.said.send(message.to_vec());
        Ok(())
    }

    async fn listen(&self, heard: &Heard) -> Result<(), StoreError> {
        let mut said = self.said.subscribe();
        while let Ok(message) = said.recv().await {
            heard(&message);
        }
        Ok(())
    }

    async fn check(&self) -> Result<(), StoreError> {
        Ok(())
    }

    fn kind(&self) -> &'static str {
        // The kind that others share.
        "redis"
    }
}

#[tokio::test(start_paused = true)]
async fn the_jobs_of_a_replica_that_stops_are_taken_over_at_once() {
    let store = Arc::new(Shared {
        jobs: MemoryStore::new(),
        leases: Mutex::default(),
        said: broadcast::channel(16).0,
    });
    store.put(&job()).await.unwrap();
    let replica = async |name: &str| {
        let (sfu, config) = (Arc::new(FakeSfu::default()), DelegationConfig::new(name));
        let service = Service::with_store(settings(), sfu, store.clone(), config).unwrap();
        service.restore().await;
        service
    };
    let (one, two) = (replica("one").await, replica("two").await);
    let waiting = |service: &Service| service.delegation_stats().unwrap().waiting;
    let until = async |what: &str, ready: &dyn Fn() -> bool| {
        let wait = async {
            while !ready() {
                sleep(Duration::from_millis(1)).await;
            }
        };
        timeout(DEADLINE, wait).await.expect(what);
    };
    until("both listen", &|| store.said.receiver_count() == 2).await;
    assert_eq!((waiting(&one), waiting(&two)), (1, 0), "the first has it");

    let stopped = Instant::now();
    one.shutdown(Duration::from_secs(1)).await;
    until("the other takes it", &|| waiting(&two) == 1).await;
    // This is the test's own time. The look that comes by itself would be due after most of a second.
    assert!(stopped.elapsed() < Duration::from_millis(100), "{:?}", stopped.elapsed());
}
