//! Connections to foci: one to our own, one to each that another member publishes to.

use std::{fmt, sync::Arc, time::Duration};

use async_trait::async_trait;
use tokio::sync::mpsc;

use crate::{
    foci::{DelayedLeave, FocusError, TokenClient},
    matrix::MatrixPort,
    member::LiveKitFocus,
    transport::{
        MediaTransport, TransportError, TransportEvent,
        livekit::{Bind, ConnectOptions, LiveKitTransport},
    },
};

const RETRY_BASE: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(30);

/// A connected transport and what it tells.
pub type Connected = (Arc<dyn MediaTransport>, mpsc::Receiver<TransportEvent>);

/// How a call gets into the SFU room of a focus: the seam that tests and other transports use.
#[async_trait]
pub trait Connector: Send + Sync + fmt::Debug {
    /// Gets access to the call's room at `focus` for the device behind `port`, and connects.
    async fn connect(&self, focus: &LiveKitFocus, port: &dyn MatrixPort) -> Result<Connected, ConnectError>;

    /// Asks the authorisation service of `focus`, to which there is a connection, to keep a delayed leave of the
    /// device behind `port`. Whoever cannot says [`FocusError::NoDelegation`], as this does.
    async fn delegate_leave(
        &self,
        focus: &LiveKitFocus,
        port: &dyn MatrixPort,
        leave: &DelayedLeave,
    ) -> Result<(), FocusError> {
        let _ = (focus, port, leave);
        Err(FocusError::NoDelegation)
    }
}

/// Why a focus could not be connected to.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// No token.
    #[error(transparent)]
    Focus(#[from] FocusError),
    /// No connection.
    #[error(transparent)]
    Transport(#[from] TransportError),
}

/// Connects to LiveKit SFUs with a token of the focus's authorisation service.
#[derive(Clone, Debug)]
pub struct LiveKitConnector {
    tokens: TokenClient,
    bind: Bind,
}

impl LiveKitConnector {
    /// A connector that sends media from these local addresses.
    ///
    /// # Errors
    /// [`FocusError::Http`] if the TLS stack cannot start.
    pub fn new(bind: Bind) -> Result<Self, FocusError> {
        Ok(Self { tokens: TokenClient::new()?, bind })
    }
}

#[async_trait]
impl Connector for LiveKitConnector {
    async fn connect(&self, focus: &LiveKitFocus, port: &dyn MatrixPort) -> Result<Connected, ConnectError> {
        let access = self.tokens.sfu_get(focus, port).await?;
        let mut options = ConnectOptions::new(access.url, access.jwt);
        options.bind = self.bind.clone();
        let (transport, events) = LiveKitTransport::connect(options).await?;
        Ok((transport, events))
    }

    async fn delegate_leave(
        &self,
        focus: &LiveKitFocus,
        port: &dyn MatrixPort,
        leave: &DelayedLeave,
    ) -> Result<(), FocusError> {
        self.tokens.delegate_leave(focus, port, leave).await
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
