//! What a test does when a peer is missing: it says so where nobody can miss it, and fails where it must not be.

use std::io::Write;
use std::path::PathBuf;

use super::{PeerError, folder, namespace};

/// Something a test needs and a machine may lack.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Peer {
    /// The homeserver Synapse, in a Python environment of its own.
    Synapse,
    /// The LiveKit server.
    LiveKit,
    /// The npm packages: node 24, playwright-core, livekit-client, Element Call, matrix-js-sdk.
    Npm,
    /// Chromium.
    Chromium,
    /// Firefox ESR.
    Firefox,
    /// Redis.
    Redis,
    /// The TURN server coturn.
    Coturn,
    /// The reverse proxy nginx.
    Nginx,
    /// The reverse proxy Caddy.
    Caddy,
    /// The program that checks systemd's units.
    SystemdAnalyze,
    /// The bot of `examples/embed`, which is outside the workspace. Its path is in `ANTIPHON_EMBED_BOT`.
    EmbedBot,
    /// A network namespace with nothing but `lo`.
    LoopbackOnly,
}

impl Peer {
    /// Where the peer's program is, or for [`Peer::LoopbackOnly`] the file the answer came from.
    ///
    /// # Errors
    /// [`PeerError::Missing`], with the line that installs it.
    pub fn find(self) -> Result<PathBuf, PeerError> {
        let below = |path: &str| Some(folder().join(path)).filter(|path| path.is_file());
        let verify = || "./testkit/verify.sh --setup".to_owned();
        let apt = |package: &str| format!("apt-get install --yes --no-install-recommends {package}");
        let (found, what, install) = match self {
            Self::Synapse => (below("synapse/bin/python"), "Synapse", verify()),
            Self::LiveKit => (below("bin/server"), "the LiveKit server", verify()),
            Self::Npm => (
                below("npm/node_modules/.bin/node"),
                "the set of npm packages (node, playwright-core, livekit-client, Element Call, matrix-js-sdk)",
                verify(),
            ),
            Self::Chromium => (on_path("chromium"), "Chromium", apt("chromium")),
            Self::Firefox => (on_path("firefox-esr"), "Firefox ESR", apt("firefox-esr")),
            Self::Redis => (on_path("redis-server"), "Redis", apt("redis-server")),
            Self::Coturn => (on_path("turnserver"), "coturn", apt("coturn")),
            Self::Nginx => (on_path("nginx"), "nginx", apt("nginx-light")),
            Self::Caddy => (on_path("caddy"), "Caddy", apt("caddy")),
            Self::SystemdAnalyze => (on_path("systemd-analyze"), "systemd-analyze", apt("systemd")),
            Self::EmbedBot => (
                std::env::var_os("ANTIPHON_EMBED_BOT").map(PathBuf::from).filter(|path| path.is_file()),
                "the bot of examples/embed",
                "./testkit/verify.sh, which builds it; or build it and name its path in ANTIPHON_EMBED_BOT"
                    .to_owned(),
            ),
            Self::LoopbackOnly => (
                namespace::only_loopback().then(|| PathBuf::from("/proc/self/net/dev")),
                "a network namespace with nothing but loopback",
                "nothing to install: run ./testkit/verify.sh as root, with iproute2 on the machine"
                    .to_owned(),
            ),
        };
        found.ok_or(PeerError::Missing { what, install })
    }
}

/// Returns from the calling test, loudly, unless every named [`Peer`] is there; with `CI=true` in the environment
/// it panics instead, which fails the test.
#[macro_export]
macro_rules! require {
    ($($peer:expr),+ $(,)?) => {{
        // A function knows the name of the test it is written in; a thread knows it only under some harnesses.
        fn here() {}
        if !$crate::peers::skip::present(::core::any::type_name_of_val(&here), &[$($peer),+]) {
            return;
        }
    }};
}

/// Whether all `peers` are there; if not, prints a line that names the test, what is missing and how to install it.
/// Use [`require!`](crate::require), which names the test itself.
///
/// # Panics
/// When something is missing and the environment has `CI=true`.
pub fn present(test: &str, peers: &[Peer]) -> bool {
    let missing: Vec<_> = peers.iter().filter_map(|peer| peer.find().err()).collect();
    if missing.is_empty() {
        return true;
    }
    let line = skipped(test, &missing);
    assert!(
        !must_be_there(std::env::var("CI").ok().as_deref()),
        "with CI=true nothing may be skipped\n{line}"
    );
    // The harness captures print! and eprint!, but not the stream itself: this line is seen when the test passes.
    // Nothing can be done about a standard error that is closed.
    let _ = std::io::stderr().write_all(format!("{line}\n").as_bytes());
    false
}

fn skipped(test: &str, missing: &[PeerError]) -> String {
    let test = test.trim_end_matches("::here").replace("::{{closure}}", "");
    let reasons: Vec<_> = missing
        .iter()
        .map(|error| match error {
            PeerError::Missing { what, install } => format!("{what} is missing; install with: {install}"),
            other => other.to_string(),
        })
        .collect();
    format!("SKIPPED {test}: {}", reasons.join("; "))
}

fn must_be_there(ci: Option<&str>) -> bool {
    matches!(ci, Some("true" | "1"))
}

fn on_path(program: &str) -> Option<PathBuf> {
    // Servers are often where only root's path leads.
    std::env::split_paths(&std::env::var_os("PATH")?)
        .chain([PathBuf::from("/usr/sbin")])
        .map(|folder| folder.join(program))
        .find(|file| file.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_skip_names_the_test_what_is_missing_and_the_remedy() {
        let error = PeerError::Missing { what: "Chromium", install: "apt-get install chromium".into() };
        assert_eq!(
            skipped("it::calls::both_decode::{{closure}}::here", &[error]),
            "SKIPPED it::calls::both_decode: Chromium is missing; install with: apt-get install chromium"
        );
    }

    #[test]
    fn only_ci_makes_a_missing_peer_a_failure() {
        assert!(must_be_there(Some("true")));
        assert!(!must_be_there(Some("false")));
        assert!(!must_be_there(None));
    }

    #[test]
    fn a_program_that_is_nowhere_is_not_found() {
        assert_eq!(on_path("antiphon-no-such-program"), None);
        assert!(on_path("sh").is_some());
    }
}
