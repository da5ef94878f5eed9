//! A web server in trouble has not said that there is no `.well-known`: it is asked again after a minute, one that has
//! said so after ten.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use rustls::{
    ServerConfig,
    pki_types::{PrivateKeyDer, pem::PemObject as _},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
};
use tokio_rustls::TlsAcceptor;

use super::{Delegation, Resolve, ResolveError, SrvRecord, Verifier};
use crate::{
    config::{Settings, TlsPolicy},
    metrics::Metrics,
    secret::Secret,
};

/// All names, at any port.
struct Everything(SocketAddr);

#[async_trait]
impl Resolve for Everything {
    async fn addresses(&self, _: &str, _: u16) -> Result<Vec<SocketAddr>, ResolveError> {
        Ok(vec![self.0])
    }

    async fn services(&self, _: &str) -> Result<Vec<SrvRecord>, ResolveError> {
        Err(ResolveError::NotFound)
    }
}

/// A server that answers every request with `status`.
async fn answering(status: &'static str) -> SocketAddr {
    let made = rcgen::generate_simple_self_signed(["hs.test".to_owned()]).unwrap();
    let key = PrivateKeyDer::from_pem_slice(made.signing_key.serialize_pem().as_bytes()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let tls = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key)
        .unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(tls));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let Ok(mut stream) = acceptor.accept(stream).await else { continue };
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(stream.read_u8().await.unwrap());
            }
            let answer = format!("HTTP/1.1 {status} X\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
            stream.write_all(answer.as_bytes()).await.unwrap();
            // The client has gone already: it has its answer.
            let _ = stream.shutdown().await;
        }
    });
    address
}

#[tokio::test]
async fn a_document_is_asked_for_again_a_minute_after_trouble() {
    const MINUTE: Duration = Duration::from_mins(1);
    for (status, remembered) in [("500", MINUTE), ("503", MINUTE), ("429", MINUTE), ("404", 10 * MINUTE)] {
        let mut settings = Settings::new("ws://localhost", "key", "secret");
        settings.insecure_skip_verify_tls = TlsPolicy::SkipAll;
        let resolver = Arc::new(Everything(answering(status).await));
        let verifier = Verifier::new(&settings, resolver, Metrics::new().unwrap()).unwrap();
        let before = Instant::now();
        verifier.verify("hs.test", &Secret::new("token")).await.unwrap_err();
        let after = Instant::now();
        let known = |at| verifier.cache().lookup("hs.test", at).is_some();
        assert!(known(before + remembered - Duration::from_millis(1)), "{status}");
        assert!(!known(after + remembered), "{status}");
    }
}

#[tokio::test]
async fn in_trouble_a_server_is_where_it_was_before() {
    let mut settings = Settings::new("ws://localhost", "key", "secret");
    settings.insecure_skip_verify_tls = TlsPolicy::SkipAll;
    let resolver = Arc::new(Everything(answering("500").await));
    let verifier = Verifier::new(&settings, resolver, Metrics::new().unwrap()).unwrap();
    let before = Delegation::To("m.hs.test:8449".parse().unwrap());
    let long_ago = Instant::now().checked_sub(Duration::from_secs(2)).unwrap();
    verifier.cache().remember("hs.test".to_owned(), before.clone(), long_ago, Duration::from_secs(1));
    assert_eq!(verifier.cache().lookup("hs.test", Instant::now()), None, "it is over");
    verifier.verify("hs.test", &Secret::new("token")).await.unwrap_err();
    assert_eq!(verifier.cache().lookup("hs.test", Instant::now()), Some(before));
}
