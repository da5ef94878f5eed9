//! TLS for everything that a call connects to: the homeserver, authorisation services and SFU signalling.
//!
//! One configuration serves all three. Its cryptography is chosen inside (AWS-LC), so a program needs no process-wide
//! rustls provider. Certificates are checked against the system's roots and those of [`TlsOptions::extra_roots`]; there
//! is no way to switch the check off.
//!
//! ```no_run
//! use antiphon_call_sdk::tls::{self, ExtraRoots, TlsOptions};
//! # fn example() -> Result<(), tls::TlsError> {
//! let mut options = TlsOptions::default();
//! options.extra_roots.push(ExtraRoots::File("/etc/company/ca.pem".into()));
//! let config = tls::client_config(&options)?;
//! // For `matrix_sdk::Client::builder().http_client(http)`.
//! let http = tls::http_client(&config)?;
//! # let _ = http;
//! # Ok(())
//! # }
//! ```

use std::{path::PathBuf, sync::Arc, time::Duration};

use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, pem, pem::PemObject as _},
};

/// Which certificate authorities are trusted.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct TlsOptions {
    /// Whether those of the system are: the platform's store, or `SSL_CERT_FILE` and `SSL_CERT_DIR` if one is set. The
    /// default is yes.
    pub system_roots: bool,
    /// Further ones, for deployments with a certificate authority of their own.
    pub extra_roots: Vec<ExtraRoots>,
}

impl Default for TlsOptions {
    fn default() -> Self {
        Self { system_roots: true, extra_roots: Vec::new() }
    }
}

/// Certificates of certificate authorities, in PEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExtraRoots {
    /// A file.
    File(PathBuf),
    /// The text itself.
    Pem(Vec<u8>),
}

/// The TLS configuration of `options`, for WebSockets and other plain TLS connections (no ALPN).
///
/// Reads files; call it once and share the result.
///
/// # Errors
/// [`TlsError`] if a certificate cannot be read, or if no authority is left to trust.
pub fn client_config(options: &TlsOptions) -> Result<Arc<ClientConfig>, TlsError> {
    let mut roots = RootCertStore::empty();
    if options.system_roots {
        let found = rustls_native_certs::load_native_certs();
        for error in &found.errors {
            tracing::warn!(%error, "a root certificate of the system cannot be read");
        }
        // System stores may hold certificates of forms that rustls does not take.
        roots.add_parsable_certificates(found.certs);
    }
    for extra in &options.extra_roots {
        add(&mut roots, extra)?;
    }
    if roots.is_empty() {
        return Err(TlsError::NoRoots);
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(TlsError::Config)?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(Arc::new(config))
}

fn add(roots: &mut RootCertStore, extra: &ExtraRoots) -> Result<(), TlsError> {
    let (name, text) = match extra {
        ExtraRoots::File(path) => {
            let name = path.display().to_string();
            match std::fs::read(path) {
                Ok(text) => (name, text),
                Err(source) => return Err(TlsError::File { name, source }),
            }
        }
        ExtraRoots::Pem(text) => ("the given PEM text".to_owned(), text.clone()),
    };
    let mut found = false;
    for certificate in CertificateDer::pem_slice_iter(&text) {
        let certificate = certificate.map_err(|source| TlsError::Pem { name: name.clone(), source })?;
        roots.add(certificate).map_err(|source| TlsError::Certificate { name: name.clone(), source })?;
        found = true;
    }
    if found { Ok(()) } else { Err(TlsError::NoCertificate { name }) }
}

/// An HTTP client over `config`, for `matrix_sdk::ClientBuilder::http_client`. It speaks HTTP/1.1 and HTTP/2, follows
/// redirects, and obeys the proxy variables of the environment.
///
/// # Errors
/// [`TlsError::Http`] if the client cannot be built.
pub fn http_client(config: &Arc<ClientConfig>) -> Result<reqwest::Client, TlsError> {
    http_client_builder(config).connect_timeout(Duration::from_secs(10)).build().map_err(TlsError::Http)
}

/// The part that all HTTP clients have in common.
pub(crate) fn http_client_builder(config: &Arc<ClientConfig>) -> reqwest::ClientBuilder {
    let mut config = ClientConfig::clone(config);
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    reqwest::Client::builder()
        .tls_backend_preconfigured(config)
        .user_agent(concat!("antiphon-call-sdk/", env!("CARGO_PKG_VERSION")))
}

/// Why there is no TLS.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// A file of [`TlsOptions::extra_roots`] cannot be read.
    #[error("the certificates in {name} cannot be read")]
    File {
        /// Its path.
        name: String,
        /// What the operating system says.
        #[source]
        source: std::io::Error,
    },
    /// It is not PEM.
    #[error("{name} is not valid PEM")]
    Pem {
        /// Its path.
        name: String,
        /// What is wrong.
        #[source]
        source: pem::Error,
    },
    /// It holds a certificate that cannot be one of an authority.
    #[error("{name} holds an unusable certificate")]
    Certificate {
        /// Its path.
        name: String,
        /// What is wrong.
        #[source]
        source: rustls::Error,
    },
    /// It holds no certificate.
    #[error("{name} holds no certificate; it must have the PEM text of a certificate authority")]
    NoCertificate {
        /// Its path.
        name: String,
    },
    /// Nobody would be trusted.
    #[error(
        "no root certificates found on this machine; install its ca-certificates package, set SSL_CERT_FILE, or pass \
         TlsOptions::extra_roots"
    )]
    NoRoots,
    /// rustls refused the configuration.
    #[error("TLS cannot be set up")]
    Config(#[source] rustls::Error),
    /// The HTTP client cannot be built.
    #[error("the HTTP client cannot be set up")]
    Http(#[source] reqwest::Error),
}

#[cfg(test)]
pub(crate) mod testing {
    use super::*;

    /// A new certificate authority, and a server on `localhost` with a certificate of it.
    pub(crate) fn authority() -> (ExtraRoots, Arc<rustls::ServerConfig>) {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut ca = rcgen::CertificateParams::new(Vec::new()).unwrap();
        ca.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let roots = ExtraRoots::Pem(ca.self_signed(&key).unwrap().pem().into_bytes());
        let issuer = rcgen::Issuer::new(ca, key);
        let key = rcgen::KeyPair::generate().unwrap();
        let leaf = rcgen::CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        let leaf = leaf.signed_by(&key, &issuer).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let server = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![leaf.der().clone()], key.serialize_der().try_into().unwrap())
            .unwrap();
        (roots, Arc::new(server))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn only(extra: ExtraRoots) -> Result<Arc<ClientConfig>, TlsError> {
        client_config(&TlsOptions { system_roots: false, extra_roots: vec![extra] })
    }

    #[test]
    fn unusable_roots_are_named() {
        let missing = only(ExtraRoots::File("/nonexistent/ca.pem".into())).unwrap_err();
        assert!(missing.to_string().contains("/nonexistent/ca.pem"), "{missing}");
        assert!(matches!(only(ExtraRoots::Pem(b"hello".to_vec())), Err(TlsError::NoCertificate { .. })));
        let pem = |body: &str| {
            format!("-----BEGIN CERTIFICATE-----\n{body}\n-----END CERTIFICATE-----\n").into_bytes()
        };
        assert!(matches!(only(ExtraRoots::Pem(pem("!"))), Err(TlsError::Pem { .. })));
        assert!(matches!(only(ExtraRoots::Pem(pem("AAAA"))), Err(TlsError::Certificate { .. })));
    }

    #[test]
    fn nobody_trusted_is_an_error() {
        let options = TlsOptions { system_roots: false, extra_roots: Vec::new() };
        assert!(matches!(client_config(&options), Err(TlsError::NoRoots)));
    }

    #[test]
    fn file_with_authorities_is_read() {
        let ca = rcgen::generate_simple_self_signed(["ca.example".to_owned()]).unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), ca.cert.pem()).unwrap();
        let config = only(ExtraRoots::File(file.path().into())).unwrap();
        assert!(config.alpn_protocols.is_empty());
        http_client(&config).unwrap();
    }
}
