//! The launched Synapse has what MatrixRTC needs switched on.

use antiphon_testkit::peers::{Peer, Synapse, SynapseOptions, require};
use serde_json::Value;

#[tokio::test(flavor = "multi_thread")]
async fn transports_delayed_and_sticky_events_are_on() {
    require!(Peer::Synapse);
    let homeserver =
        Synapse::start(SynapseOptions::with_rtc_service("http://localhost:7880/jwt")).await.unwrap();
    let alice = homeserver.register("alice", "pw").await.unwrap();
    assert_eq!(alice.user_id, format!("@alice:{}", homeserver.server_name()));

    let http = reqwest::Client::new();
    let ask = async |path: &str| -> Value {
        let answer = http.get(homeserver.url() + path).bearer_auth(&alice.access_token).send().await.unwrap();
        serde_json::from_str(&answer.error_for_status().unwrap().text().await.unwrap()).unwrap()
    };
    let features = ask("/_matrix/client/versions").await["unstable_features"].take();
    for feature in ["org.matrix.msc4140", "org.matrix.msc4143", "org.matrix.msc4354"] {
        assert_eq!(features[feature], true, "{feature}: {features}");
    }
    let transports = ask("/_matrix/client/unstable/org.matrix.msc4143/rtc/transports").await;
    assert_eq!(transports["rtc_transports"][0]["livekit_service_url"], "http://localhost:7880/jwt");
    assert!(homeserver.register("alice", "pw").await.is_err(), "the name is taken");
}

#[tokio::test(flavor = "multi_thread")]
async fn its_federation_listener_is_reached_with_its_own_certificate_only() {
    require!(Peer::Synapse);
    let homeserver = Synapse::start(SynapseOptions::default()).await.unwrap();
    let url = format!("https://{}/_matrix/federation/v1/version", homeserver.server_name());
    let certificate = reqwest::Certificate::from_pem(homeserver.authority_pem().as_bytes()).unwrap();
    let trusting = reqwest::Client::builder().tls_certs_only([certificate]).build().unwrap();
    assert!(trusting.get(&url).send().await.unwrap().status().is_success());
    assert!(reqwest::get(&url).await.is_err(), "nobody else vouches for it");
}
