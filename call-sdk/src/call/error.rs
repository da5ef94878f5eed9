//! Why a call could not be joined, or did not do what it was asked.

use std::time::Duration;

use crate::{
    frame_crypto::UnsupportedCodec,
    machine::{CallReport, EndReason},
    matrix::{MatrixError, OwnTrust},
};

/// Why a call could not be joined, or did not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CallError {
    /// The Matrix client failed.
    #[error(transparent)]
    Matrix(#[from] MatrixError),
    /// The session cannot give the room.
    #[cfg(feature = "matrix-sdk")]
    #[error(transparent)]
    Session(#[from] crate::session::SessionError),
    /// Members with the cross-signed policy would neither hear us nor be heard.
    #[error(
        "this device is not cross-signed, so members would refuse its keys: sign it with the recovery key \
         (Session::log_in_or_restore) or verify it from another session of this account; CallOptions::allow_untrusted \
         joins all the same ({0:?})"
    )]
    OwnDeviceNotTrusted(OwnTrust),
    /// The call ended before we were in it.
    #[error("the call could not be joined: {reason}")]
    Ended {
        /// Why.
        #[source]
        reason: EndReason,
        /// What happened until then, for a bug report.
        report: Option<Box<CallReport>>,
    },
    /// Joining took too long.
    #[error("the call could not be joined within {after:?}: {cause}")]
    Timeout {
        /// How long it was tried.
        after: Duration,
        /// The last trouble.
        cause: String,
        /// What happened until then, for a bug report.
        report: Option<Box<CallReport>>,
    },
    /// The codec cannot be encrypted.
    #[error(transparent)]
    Codec(#[from] UnsupportedCodec),
    /// The SFU refuses the track.
    #[error("the SFU refused the track: {0}")]
    TrackRefused(String),
    /// A data message of more bytes than SFUs forward.
    #[error("a data message of {0} bytes is too large; send at most 15,000 bytes")]
    DataTooLarge(usize),
    /// The TLS configuration is unusable.
    #[error(transparent)]
    Tls(#[from] crate::tls::TlsError),
    /// The call is over.
    #[error("the call is over")]
    Over,
}

impl CallError {
    /// What happened until joining failed, made for pasting into a bug report.
    #[must_use]
    pub fn report(&self) -> Option<&CallReport> {
        match self {
            Self::Ended { report, .. } | Self::Timeout { report, .. } => report.as_deref(),
            _ => None,
        }
    }
}
