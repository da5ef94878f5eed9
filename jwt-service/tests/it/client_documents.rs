//! `.well-known/matrix/client` says where a delegated leave is kept alive, if it is answered as a document is.

use std::sync::Arc;

use antiphon_jwt_service::{DelegationConfig, Service, store::MemoryStore};
use axum::{http::StatusCode, response::IntoResponse as _};
use serde_json::json;

use crate::support::{Client, FakeSfu, Homeserver, get_token, settings, userinfo};

#[tokio::test]
async fn a_document_of_another_status_than_200_is_not_read() {
    for (status, expected) in [
        (StatusCode::OK, 200),
        (StatusCode::CREATED, 400),
        (StatusCode::FORBIDDEN, 400),
        (StatusCode::NOT_FOUND, 400),
        (StatusCode::BAD_GATEWAY, 400),
    ] {
        let homeserver = Homeserver::start(move |seen| {
            if seen.path == "/.well-known/matrix/client" {
                let document = json!({"m.homeserver": {"base_url": format!("https://{}", seen.host)}});
                (status, document.to_string()).into_response()
            } else {
                userinfo(seen, &[("good", "alice")])
            }
        })
        .await;
        let (sfu, store) = (Arc::new(FakeSfu::default()), Arc::new(MemoryStore::new()));
        let service = Service::with_store(settings(), sfu, store, DelegationConfig::new("test")).unwrap();
        let mut body = get_token(&homeserver.name(), "good", "alice");
        body["delay_id"] = json!("syd_1");
        body["delay_timeout"] = json!(8000);
        let reply = Client::of(service).post("/get_token", body).await;
        assert_eq!(reply.status, expected, "{status}: {}", reply.text);
    }
}
