//! Alive and ready are two questions.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};

use antiphon_jwt_service::{
    DelegationConfig, ParticipantIdentity, RoomAlias, Service, Sfu, SfuError, SfuRoom,
    delegation::{DelayId, JobKey, JobParams, StoredJob},
    store::{MemoryStore, Store, StoreError},
};
use async_trait::async_trait;
use axum::http::Method;

use crate::support::{Client, DEADLINE, FakeSfu, settings};

async fn ready(client: &Client) -> (u16, serde_json::Value) {
    let reply = client.send(Method::GET, "/readyz", "").await;
    assert_eq!(client.send(Method::GET, "/healthz", "").await.status, 200);
    (reply.status, reply.json())
}

#[tokio::test]
async fn a_service_without_a_store_is_ready_when_its_sfu_is() {
    let (status, body) = ready(&Client::new(settings())).await;
    assert_eq!((status, &body["sfu"], &body["store"]), (200, &"ok".into(), &"none".into()));
    let down = Client::of(Service::new(settings(), Arc::new(Down)).unwrap());
    let (status, body) = ready(&down).await;
    assert_eq!((status, &body["ready"], &body["sfu"]), (503, &false.into(), &"down".into()));
}

#[tokio::test]
async fn it_is_ready_between_restoring_and_stopping() {
    let store = Arc::new(MemoryStore::new());
    let config = DelegationConfig::new("test");
    let service = Service::with_store(settings(), Arc::new(FakeSfu::default()), store, config).unwrap();
    let client = Client::of(service.clone());
    assert_eq!(ready(&client).await.1["restore"], "running");
    service.restore().await;
    assert_eq!(ready(&client).await.0, 200);
    service.stopping();
    let (status, body) = ready(&client).await;
    assert_eq!((status, &body["stopping"]), (503, &true.into()));
}

#[tokio::test]
async fn a_store_that_does_not_answer_is_told() {
    let config = DelegationConfig::new("test");
    let service =
        Service::with_store(settings(), Arc::new(FakeSfu::default()), Arc::new(Down), config).unwrap();
    service.restore().await;
    let (status, body) = ready(&Client::of(service)).await;
    assert_eq!((status, &body["store"], &body["sfu"]), (503, &"down".into(), &"ok".into()));
}

#[tokio::test]
async fn a_store_that_comes_up_late_gives_its_jobs_all_the_same() {
    let store = Arc::new(Late::default());
    let user = "@a:hs.org";
    let params = JobParams {
        key: JobKey {
            room: RoomAlias::of_slot("!r:hs.org", "s"),
            identity: ParticipantIdentity::of_membership(user, "m"),
        },
        server: "hs.org".parse().unwrap(),
        delay_id: DelayId::new("syd_1".to_owned()).unwrap(),
        delay_timeout: Duration::from_hours(1),
    };
    let job = StoredJob { params, restarted_at: SystemTime::now(), connected: Some(false) };
    store.shelf.put(&job).await.unwrap();
    let config = DelegationConfig::new("test");
    let service =
        Service::with_store(settings(), Arc::new(FakeSfu::default()), store.clone(), config).unwrap();
    let client = Client::of(service.clone());
    service.restore().await;
    let (status, body) = ready(&client).await;
    assert_eq!((status, &body["restore"]), (503, &"running".into()));
    assert_eq!(service.delegation_stats().unwrap().waiting, 0);
    store.up.store(true, Ordering::Relaxed);
    let restored = async {
        while ready(&client).await.1["restore"] != "ok" {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(DEADLINE, restored).await.expect("the store is read again");
    assert_eq!(service.delegation_stats().unwrap().waiting, 1);
}

/// A store that cannot be read until it is up.
#[derive(Debug, Default)]
struct Late {
    shelf: MemoryStore,
    up: AtomicBool,
}

#[async_trait]
impl Store for Late {
    async fn put(&self, job: &StoredJob) -> Result<(), StoreError> {
        self.shelf.put(job).await
    }

    async fn remove(&self, key: &JobKey) -> Result<(), StoreError> {
        self.shelf.remove(key).await
    }

    async fn load(&self) -> Result<Vec<StoredJob>, StoreError> {
        if self.up.load(Ordering::Relaxed) { self.shelf.load().await } else { down() }
    }

    async fn lease(&self, key: &JobKey, replica: &str, ttl: Duration) -> Result<bool, StoreError> {
        self.shelf.lease(key, replica, ttl).await
    }

    async fn release(&self, key: &JobKey, replica: &str) -> Result<(), StoreError> {
        self.shelf.release(key, replica).await
    }

    async fn check(&self) -> Result<(), StoreError> {
        self.shelf.check().await
    }

    fn kind(&self) -> &'static str {
        "test"
    }
}

/// An SFU and a store that cannot be reached.
#[derive(Debug)]
struct Down;

#[async_trait]
impl Sfu for Down {
    async fn create_room(&self, _: &str) -> Result<SfuRoom, SfuError> {
        Err(SfuError::NotARoom)
    }

    async fn check(&self) -> Result<(), SfuError> {
        Err(SfuError::TimedOut(Duration::from_secs(1)))
    }
}

fn down<T>() -> Result<T, StoreError> {
    Err(StoreError { kind: "test", doing: "work", source: "it is down".into() })
}

#[async_trait]
impl Store for Down {
    async fn put(&self, _: &StoredJob) -> Result<(), StoreError> {
        down()
    }

    async fn remove(&self, _: &JobKey) -> Result<(), StoreError> {
        down()
    }

    async fn load(&self) -> Result<Vec<StoredJob>, StoreError> {
        down()
    }

    async fn lease(&self, _: &JobKey, _: &str, _: Duration) -> Result<bool, StoreError> {
        down()
    }

    async fn release(&self, _: &JobKey, _: &str) -> Result<(), StoreError> {
        down()
    }

    async fn check(&self) -> Result<(), StoreError> {
        down()
    }

    fn kind(&self) -> &'static str {
        "test"
    }
}
