//! What can go wrong with a peer, and whose fault it is.

use std::fmt;
use std::time::Duration;

/// Why a peer could not be started or did not do what it was asked.
#[derive(thiserror::Error)]
#[non_exhaustive]
pub enum PeerError {
    /// The program is not installed.
    #[error("{what} is missing on this machine; install it with: {install}")]
    Missing {
        /// What is missing.
        what: &'static str,
        /// The line that installs it.
        install: String,
    },
    /// The machine refused something a launcher needs: a port, a temporary file, a process.
    #[error("this machine did not let {peer} be started: {source}")]
    Machine {
        /// The peer that was to be started.
        peer: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
    /// The program ended before it was ready.
    #[error("{peer} ended by itself ({status}); the end of its log:\n{log}")]
    Ended {
        /// The peer.
        peer: &'static str,
        /// Its exit status.
        status: String,
        /// The last lines of its log.
        log: String,
    },
    /// The program did not become ready, or did not answer, in time.
    #[error("{peer}: {what} did not happen within {limit:?}; the end of its log:\n{log}")]
    Deadline {
        /// The peer.
        peer: &'static str,
        /// What was awaited.
        what: String,
        /// How long it was awaited.
        limit: Duration,
        /// The last lines of its log.
        log: String,
    },
    /// The program answered, but refused or failed.
    #[error("{peer} could not do {what}: {why}; the end of its log:\n{log}")]
    Refused {
        /// The peer.
        peer: &'static str,
        /// The request or command.
        what: String,
        /// Its answer.
        why: String,
        /// The last lines of its log.
        log: String,
    },
}

impl PeerError {
    pub(crate) fn machine(peer: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Machine { peer, source }
    }
}

impl fmt::Debug for PeerError {
    /// As the sentence: a test fails by `unwrap`, and the lines of a log must then be readable.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
