//! Launchers of the programs that nobody in this project wrote and that the tests meet: Synapse, a LiveKit
//! server, Chromium with `livekit-client` or Element Call, Chromium or Firefox with a plain `RTCPeerConnection`,
//! matrix-js-sdk.
//!
//! Each runs on loopback only, in a temporary folder of its own, on ports that were free, and is ended by its
//! process id when its value is dropped. A start that fails returns the end of the program's log.
//!
//! The programs lie below `target/peers` (or the folder that the environment variable `ANTIPHON_PEERS` names),
//! where `testkit/verify.sh` puts them. A test names what it needs in its first line:
//!
//! ```no_run
//! use antiphon_testkit::peers::{Peer, Synapse, SynapseOptions, require};
//!
//! # async fn test() {
//! require!(Peer::Synapse);
//! let homeserver = Synapse::start(SynapseOptions::default()).await.unwrap();
//! # }
//! ```
//!
//! Browsers and SFUs gather and bind UDP on every interface they see, so whatever starts them requires
//! [`Peer::LoopbackOnly`] too: a network namespace that has nothing but `lo`.

pub mod browser;
pub mod driver;
pub mod error;
pub mod jssdk;
pub mod livekit;
pub mod namespace;
pub mod ports;
pub mod process;
pub mod skip;
pub mod synapse;

pub use self::browser::{
    Browser, ElementCallJoin, ElementCallPage, ElementCallStats, EncryptionErrors, FrameKey, LiveKitJoin,
    LiveKitPage, LiveKitStats, MeshJoin, MeshMessage, MeshPage, MeshParty, MeshStats, RtpIn, RtpOut,
};
pub use self::error::PeerError;
pub use self::jssdk::{JsSdk, JsSdkKey, JsSdkMember, JsSdkState};
pub use self::livekit::{LiveKitOptions, LiveKitServer};
pub use self::skip::Peer;
pub use self::synapse::{Session, Synapse, SynapseOptions};
pub use crate::require;

use std::path::{Path, PathBuf};

/// Where the peers lie: `$ANTIPHON_PEERS`, else `target/peers` of the workspace.
pub fn folder() -> PathBuf {
    std::env::var_os("ANTIPHON_PEERS").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join("target").join("peers"),
        PathBuf::from,
    )
}

/// The folder with the node and HTML files of this crate.
pub(crate) fn web() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("web")
}
