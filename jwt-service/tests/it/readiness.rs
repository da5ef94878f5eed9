//! Alive and ready are two questions.

use std::{sync::Arc, time::Duration};

use antiphon_jwt_service::{
    DelegationConfig, Service, Sfu, SfuError, SfuRoom,
    delegation::{JobKey, StoredJob},
    store::{MemoryStore, Store, StoreError},
};
use async_trait::async_trait;
use axum::http::Method;

use crate::support::{Client, FakeSfu, settings};

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
