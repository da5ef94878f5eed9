//! TLS to servers that must show a certificate: one set of root certificates for homeservers and the SFU.

use std::sync::{Arc, OnceLock};

use rustls::{ClientConfig, RootCertStore, crypto::CryptoProvider};

/// Checks certificates against the system's roots, or those in `SSL_CERT_FILE` and `SSL_CERT_DIR`. A machine without
/// any is no reason not to start: an SFU on plain HTTP, or in this process, needs none.
pub(crate) fn checking_certificates() -> Result<ClientConfig, rustls::Error> {
    Ok(ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()?
        .with_root_certificates(system())
        .with_no_client_auth())
}

/// Named explicitly: with two providers in one program rustls has no default to fall back on.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

/// Read once for the process.
fn system() -> Arc<RootCertStore> {
    static SYSTEM: OnceLock<Arc<RootCertStore>> = OnceLock::new();
    let read = || {
        let mut roots = RootCertStore::empty();
        let found = rustls_native_certs::load_native_certs();
        let (added, ignored) = roots.add_parsable_certificates(found.certs);
        if added == 0 {
            tracing::warn!(
                ignored,
                "no root certificates found on this machine: every certificate of a homeserver or an SFU will be \
                 refused; install the package `ca-certificates`, or point SSL_CERT_FILE at a bundle"
            );
        }
        Arc::new(roots)
    };
    SYSTEM.get_or_init(read).clone()
}
