//! A store that cannot be read at the start is read as soon as it can be.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime},
};

use antiphon_jwt_service::{
    DelegationConfig, ParticipantIdentity, RoomAlias, Service,
    delegation::{DelayId, JobKey, JobParams, StoredJob},
    store::{MemoryStore, Store, StoreError},
};
use async_trait::async_trait;
use axum::http::Method;
use tokio::{sync::Notify, time::timeout};

use crate::support::{Client, DEADLINE, FakeSfu, settings};

/// A store that takes everything, and shows nothing until it is whole.
#[derive(Debug, Default)]
struct Unreadable {
    jobs: MemoryStore,
    whole: AtomicBool,
    reads: AtomicUsize,
    read: Notify,
}

impl Unreadable {
    /// Waits until somebody has tried to read it `count` times.
    async fn read(&self, count: usize) {
        let wait = async {
            while self.reads.load(Ordering::Relaxed) < count {
                self.read.notified().await;
            }
        };
        timeout(DEADLINE, wait).await.expect("read in time");
    }
}

#[async_trait]
impl Store for Unreadable {
    async fn put(&self, job: &StoredJob) -> Result<(), StoreError> {
        self.jobs.put(job).await
    }

    async fn remove(&self, key: &JobKey) -> Result<(), StoreError> {
        self.jobs.remove(key).await
    }

    async fn load(&self) -> Result<Vec<StoredJob>, StoreError> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        self.read.notify_one();
        if self.whole.load(Ordering::Relaxed) {
            self.jobs.load().await
        } else {
            Err(StoreError { kind: "test", doing: "read all jobs", source: "not yet".into() })
        }
    }

    async fn lease(&self, key: &JobKey, replica: &str, ttl: Duration) -> Result<bool, StoreError> {
        self.jobs.lease(key, replica, ttl).await
    }

    async fn release(&self, key: &JobKey, replica: &str) -> Result<(), StoreError> {
        self.jobs.release(key, replica).await
    }

    async fn check(&self) -> Result<(), StoreError> {
        Ok(())
    }

    fn kind(&self) -> &'static str {
        "test"
    }
}

/// A job whose event has an hour left.
pub(crate) fn job() -> StoredJob {
    StoredJob {
        params: JobParams {
            key: JobKey {
                room: RoomAlias::of_slot("!room:hs", "m.call#ROOM"),
                identity: ParticipantIdentity::of_member("@a:hs.test", "DEVICE", "member-1"),
            },
            server: "hs.test".parse().unwrap(),
            delay_id: DelayId::new("syd_1".to_owned()).unwrap(),
            delay_timeout: Duration::from_hours(1),
        },
        restarted_at: SystemTime::now(),
        connected: None,
    }
}

#[tokio::test(start_paused = true)]
async fn it_is_not_ready_before_its_store_could_be_read() {
    let store = Arc::new(Unreadable::default());
    store.put(&job()).await.unwrap();
    let config = DelegationConfig::new("test");
    let service =
        Service::with_store(settings(), Arc::new(FakeSfu::default()), store.clone(), config).unwrap();
    let client = Client::of(service.clone());
    let ready = async || {
        let reply = client.send(Method::GET, "/readyz", "").await;
        (reply.status, reply.json()["restore"].as_str().unwrap().to_owned())
    };
    service.restore().await;
    for reads in 1..=3 {
        store.read(reads).await;
        assert_eq!(ready().await, (503, "running".into()));
    }
    assert_eq!(service.delegation_stats().unwrap().waiting, 0);

    store.whole.store(true, Ordering::Relaxed);
    let wait = async {
        while ready().await.0 != 200 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(DEADLINE, wait).await.expect("ready in time");
    assert_eq!(service.delegation_stats().unwrap().waiting, 1, "and then it has what was there");
    let reads = store.reads.load(Ordering::Relaxed);
    // Time stands still, so this is all of it.
    tokio::time::sleep(Duration::from_secs(30)).await;
    assert_eq!(store.reads.load(Ordering::Relaxed), reads, "once is enough");
}
