//! A container without root certificates is a fine place for a service whose SFU is on plain HTTP.

use crate::child::Program;

#[tokio::test]
async fn the_service_starts_and_says_what_it_lacks() {
    let mut service = Program::new();
    let nothing = service.path("no-such-directory");
    service
        .set("SSL_CERT_FILE", "/dev/null")
        .set("SSL_CERT_DIR", nothing)
        .set("LIVEKIT_URL", "ws://127.0.0.1:9")
        .set("LIVEKIT_KEY", "devkey")
        .set("LIVEKIT_SECRET", "devsecret")
        .set("LIVEKIT_FULL_ACCESS_HOMESERVERS", "hs.org")
        .start()
        .await;
    let log = service.log().tail();
    assert_eq!(log.matches("SSL_CERT_FILE").count(), 1, "{log}");
}
