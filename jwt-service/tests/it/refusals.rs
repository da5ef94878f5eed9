//! Every refusal of the token endpoints: exact status and error code, and whether the homeserver was asked.

use antiphon_jwt_service::FullAccess;
use axum::http::Method;
use serde_json::{Value, json};

use crate::support::{Client, FakeSfu, Homeserver, Names, get_token, settings, sfu_get};

const USERS: &[(&str, &str)] = &[("good", "alice")];

/// Sends `body` with each change applied in turn, and expects the same refusal and number of lookups for all.
async fn refused(path: &str, body: &Value, changes: &[(&str, Value)], expected: (u16, &str), lookups: usize) {
    for (pointer, value) in changes {
        let homeserver = Homeserver::with_users(USERS).await;
        let client = Client::new(settings());
        let mut body = body.clone();
        // The server is known only now.
        let name = homeserver.name();
        body["openid_token"]["matrix_server_name"] = json!(name);
        if body["member"].is_object() {
            body["member"]["claimed_user_id"] = json!(format!("@alice:{name}"));
        }
        let (parent, member) = pointer.rsplit_once('/').unwrap();
        body.pointer_mut(parent).unwrap()[member] = value.clone();
        let reply = client.post(path, &body).await;
        assert_eq!(reply.refusal(), (expected.0, expected.1.to_owned()), "{pointer} = {value}: {reply:?}");
        assert_eq!(homeserver.lookups(), lookups, "{pointer} = {value}");
        assert_eq!(homeserver.connections(), lookups, "{pointer} = {value}");
        assert_eq!(client.sfu.rooms(), [] as [String; 0], "{pointer} = {value}");
    }
}

#[tokio::test]
async fn incomplete_requests_are_bad_json_and_ask_nobody() {
    let absent = |pointers: &[&'static str]| -> Vec<(&'static str, Value)> {
        pointers.iter().flat_map(|p| [(*p, json!("")), (*p, json!(null))]).collect()
    };
    let changes = absent(&[
        "/room_id",
        "/slot_id",
        "/member/id",
        "/member/claimed_user_id",
        "/member/claimed_device_id",
        "/openid_token/access_token",
        "/openid_token/matrix_server_name",
    ]);
    refused("/get_token", &get_token("x", "good", "alice"), &changes, (400, "M_BAD_JSON"), 0).await;
    let whole = [("/member", json!(null)), ("/openid_token", json!({})), ("/openid_token", json!(null))];
    refused("/get_token", &get_token("x", "good", "alice"), &whole, (400, "M_BAD_JSON"), 0).await;
    let changes = absent(&["/room", "/openid_token/access_token", "/openid_token/matrix_server_name"]);
    refused("/sfu/get", &sfu_get("x", "good"), &changes, (400, "M_BAD_JSON"), 0).await;
}

#[tokio::test]
async fn half_of_the_delay_parameters_is_bad_json_and_asks_nobody() {
    let changes = [("/delay_id", json!("d")), ("/delay_timeout", json!(8000))];
    refused("/get_token", &get_token("x", "good", "alice"), &changes, (400, "M_BAD_JSON"), 0).await;
    refused("/sfu/get", &sfu_get("x", "good"), &changes, (400, "M_BAD_JSON"), 0).await;
    let mut with_id = get_token("x", "good", "alice");
    with_id["delay_id"] = json!("d");
    let changes = [("/delay_timeout", json!(0)), ("/delay_timeout", json!(-1))];
    refused("/get_token", &with_id, &changes, (400, "M_BAD_JSON"), 0).await;
}

#[tokio::test]
async fn complete_delay_parameters_are_bad_json_after_the_lookup_so_that_clients_retry_without() {
    for path in ["/get_token", "/sfu/get"] {
        let mut body =
            if path == "/sfu/get" { sfu_get("x", "good") } else { get_token("x", "good", "alice") };
        body["delay_timeout"] = json!(8000);
        refused(path, &body, &[("/delay_id", json!("d"))], (400, "M_BAD_JSON"), 1).await;
        body["delay_id"] = json!("d");
        let bad_token = [("/openid_token/access_token", json!("bad"))];
        refused(path, &body, &bad_token, (401, "M_UNAUTHORIZED"), 1).await;
    }
}

#[tokio::test]
async fn wrong_types_and_unknown_members_are_not_json() {
    let changes = [
        ("/room_id", json!(1)),
        ("/slot_id", json!([])),
        ("/member", json!("m")),
        ("/member/id", json!(1)),
        ("/openid_token", json!([])),
        ("/openid_token/access_token", json!(1)),
        ("/openid_token/expires_in", json!("3600")),
        ("/openid_token/expires_in", json!(1.5)),
        ("/delay_timeout", json!("8000")),
        ("/room", json!("!legacy:hs")),
        ("/unknown", json!(null)),
    ];
    refused("/get_token", &get_token("x", "good", "alice"), &changes, (400, "M_NOT_JSON"), 0).await;
    let changes = [("/room_id", json!("x")), ("/device_id", json!(1)), ("/member", json!({}))];
    refused("/sfu/get", &sfu_get("x", "good"), &changes, (400, "M_NOT_JSON"), 0).await;
}

#[tokio::test]
async fn bodies_that_are_no_json_are_not_json() {
    let client = Client::new(settings());
    for path in ["/get_token", "/sfu/get"] {
        for body in ["", " ", "{", "[]", "\"text\"", "room=x", "{\"room\":\"x\""] {
            assert_eq!(
                client.post(path, body).await.refusal(),
                (400, "M_NOT_JSON".into()),
                "{path} {body:?}"
            );
        }
        for body in ["null", "{}"] {
            assert_eq!(
                client.post(path, body).await.refusal(),
                (400, "M_BAD_JSON".into()),
                "{path} {body:?}"
            );
        }
    }
}

#[tokio::test]
async fn the_content_type_does_not_matter_and_trailing_bytes_are_ignored() {
    let homeserver = Homeserver::with_users(USERS).await;
    let client = Client::new(settings());
    let body = format!("{} trailing", get_token(&homeserver.name(), "good", "alice"));
    client.send(Method::POST, "/get_token", body).await.claims();
}

#[tokio::test]
async fn a_claim_to_be_somebody_else_is_unauthorized_with_the_same_words() {
    let homeserver = Homeserver::with_users(USERS).await;
    let client = Client::new(settings());
    let name = homeserver.name();
    let claim = client.post("/get_token", get_token(&name, "good", "bob")).await;
    let token = client.post("/get_token", get_token(&name, "bad", "alice")).await;
    assert_eq!(claim.refusal(), (401, "M_UNAUTHORIZED".into()));
    assert_eq!(token.refusal(), claim.refusal());
    assert_eq!(claim.json()["error"], token.json()["error"]);
    assert_eq!(homeserver.lookups(), 2);
    assert_eq!(client.sfu.rooms(), [] as [String; 0]);
}

#[tokio::test]
async fn a_device_that_could_be_read_as_another_users_is_refused() {
    let changes = [("/device_id", json!("8448:DEVICE"))];
    refused("/sfu/get", &sfu_get("x", "good"), &changes, (400, "M_BAD_JSON"), 0).await;
}

#[tokio::test]
async fn a_failing_sfu_means_no_token_for_full_access_and_nothing_for_others() {
    let homeserver = Homeserver::with_users(USERS).await;
    let body = get_token(&homeserver.name(), "good", "alice");
    let client = Client::with(settings(), FakeSfu::broken(), Names::default());
    let reply = client.post("/get_token", &body).await;
    assert_eq!(reply.refusal(), (500, "M_UNKNOWN".into()));
    let mut restricted = settings();
    restricted.full_access = FullAccess::Only([].into());
    Client::with(restricted, FakeSfu::broken(), Names::default()).post("/get_token", &body).await.claims();
}

#[tokio::test]
async fn delegation_is_not_offered_here() {
    let client = Client::new(settings());
    for (method, body) in [(Method::POST, "{}"), (Method::POST, ""), (Method::GET, ""), (Method::PUT, "x")] {
        let reply = client.send(method, "/delegate_delayed_leave", body).await;
        assert_eq!(reply.refusal(), (404, "M_UNRECOGNIZED".into()));
    }
}

#[tokio::test]
async fn other_paths_do_not_exist() {
    let client = Client::new(settings());
    for path in ["/", "/get_token/", "/sfu", "/sfu/get/", "/sfu/get/x", "/healthz/", "//get_token"] {
        assert_eq!(client.post(path, "{}").await.status, 404, "{path}");
    }
}

#[tokio::test]
async fn the_health_check_answers_without_a_body() {
    let client = Client::new(settings());
    for (method, status) in
        [(Method::GET, 200), (Method::HEAD, 200), (Method::POST, 405), (Method::OPTIONS, 405)]
    {
        let reply = client.send(method.clone(), "/healthz", "").await;
        assert_eq!((reply.status, reply.text.as_str()), (status, ""), "{method}");
        assert!(!reply.headers.contains_key("access-control-allow-origin"));
    }
}
