//! Connections to foci: one to our own, one to each that another member publishes to.

use std::{fmt, sync::Arc, time::Duration};

use async_trait::async_trait;
use tokio::sync::mpsc;

use crate::{
    foci::SfuAccess,
    transport::{
        MediaTransport, TransportError, TransportEvent,
        livekit::{Bind, ConnectOptions, LiveKitTransport},
    },
};

const RETRY_BASE: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(30);

/// A connected transport and what it tells.
pub type Connected = (Arc<dyn MediaTransport>, mpsc::Receiver<TransportEvent>);

/// How a call connects to an SFU: the seam that tests and other transports use.
#[async_trait]
pub trait Connector: Send + Sync + fmt::Debug {
    /// Connects with the access that an authorisation service gave.
    async fn connect(&self, access: SfuAccess) -> Result<Connected, TransportError>;
}

/// Connects to LiveKit SFUs.
#[derive(Clone, Debug)]
pub struct LiveKitConnector {
    /// On which local addresses media travels.
    pub bind: Bind,
}

impl Default for LiveKitConnector {
    fn default() -> Self {
        Self { bind: Bind::Auto }
    }
}

#[async_trait]
impl Connector for LiveKitConnector {
    async fn connect(&self, access: SfuAccess) -> Result<Connected, TransportError> {
        let mut options = ConnectOptions::new(access.url, access.jwt);
        options.bind = self.bind.clone();
        let (transport, events) = LiveKitTransport::connect(options).await?;
        Ok((transport, events))
    }
}

/// Where the connection to one focus stands.
#[derive(Debug)]
pub(super) enum Connection {
    /// A token is being fetched or the SFU dialled.
    Connecting { failures: u32 },
    /// Media flows.
    Up { transport: Arc<dyn MediaTransport> },
    /// It failed; tried again at this time.
    Waiting { failures: u32, until: std::time::Instant },
}

/// How long to wait after the n-th failure in a row (n from 1).
pub(super) fn retry_delay(failures: u32) -> Duration {
    RETRY_BASE.saturating_mul(1u32.checked_shl(failures.saturating_sub(1)).unwrap_or(u32::MAX)).min(RETRY_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retries_back_off_and_stay_bounded() {
        let waits: Vec<_> = [1, 2, 3, 6, 40].map(|n| retry_delay(n).as_secs()).into();
        assert_eq!(waits, [1, 2, 4, 30, 30]);
    }
}
