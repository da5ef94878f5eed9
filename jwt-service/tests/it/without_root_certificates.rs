//! A container without root certificates is a fine place for a service whose SFU is on plain HTTP.

use crate::child::Program;

#[tokio::test]
async fn the_service_starts_and_says_what_it_lacks() {
    let mut service = Program::alone();
    let nothing = service.path("no-such-directory");
    service.set("SSL_CERT_FILE", "/dev/null").set("SSL_CERT_DIR", nothing).start().await;
    let log = service.log().tail();
    assert_eq!(log.matches("SSL_CERT_FILE").count(), 1, "{log}");
}
