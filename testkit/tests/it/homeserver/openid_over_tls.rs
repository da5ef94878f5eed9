use antiphon_testkit::homeserver::{DevHomeserver, Options};
use matrix_sdk::ruma::api::client::account::request_openid_token;
use serde_json::json;

use super::support::{call, client, homeserver};

#[tokio::test]
async fn an_openid_token_is_verified_over_https_and_http_on_one_port() {
    let homeserver = homeserver().await;
    let alice = client(&homeserver, "alice").await;
    let user = alice.user_id().unwrap().to_owned();
    let token = alice.send(request_openid_token::v3::Request::new(user.clone())).await.unwrap();
    assert_eq!(token.matrix_server_name, homeserver.server_name());

    let certificate = reqwest::Certificate::from_pem(homeserver.certificate_pem().as_bytes()).unwrap();
    let http = reqwest::Client::builder().tls_certs_only([certificate]).build().unwrap();
    for base in [format!("https://{}", homeserver.server_name()), homeserver.url().to_owned()] {
        let userinfo = |token: &str| {
            http.get(format!("{base}/_matrix/federation/v1/openid/userinfo?access_token={token}"))
        };
        assert_eq!(call(userinfo(&token.access_token)).await, (200, json!({"sub": user})));
        let (status, body) = call(userinfo("forged")).await;
        assert_eq!((status, body["errcode"].clone()), (401, json!("M_UNKNOWN_TOKEN")));
    }
}

#[tokio::test]
async fn the_transports_of_the_server_are_listed_and_can_be_replaced() {
    let first = json!({"type": "livekit", "livekit_service_url": "http://localhost:7880/livekit/jwt"});
    let options = Options { rtc_transports: vec![first.clone()], ..Options::default() };
    let homeserver = DevHomeserver::start(options).await.unwrap();
    let alice = client(&homeserver, "alice").await;
    let found = async || {
        let transports = alice.fetch_rtc_transports().await.unwrap();
        transports.iter().map(|transport| transport.transport_type().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(found().await, ["livekit"]);
    homeserver.set_rtc_transports(vec![json!({"type": "full_mesh"}), first]);
    assert_eq!(found().await, ["full_mesh", "livekit"]);

    let url = format!("{}/_matrix/client/unstable/org.matrix.msc4143/rtc/transports", homeserver.url());
    let (status, body) = call(reqwest::Client::new().get(url)).await;
    assert_eq!((status, body["errcode"].clone()), (401, json!("M_MISSING_TOKEN")));
}
