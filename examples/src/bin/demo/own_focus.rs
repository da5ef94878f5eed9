//! The focus in this process: it can be stopped during the call, and started again on the same addresses.

use antiphon_focus::{Config, Focus, FocusHandle};
use anyhow::{Context as _, Result};

/// A focus with its authorisation service, on loopback.
pub(crate) struct OwnFocus {
    /// With the ports that the system chose for the first start.
    config: Config,
    running: Option<FocusHandle>,
}

impl OwnFocus {
    /// Starts the focus; returns the URL of its authorisation service as well.
    pub(crate) async fn start() -> Result<(Self, String)> {
        let mut config = Config::dev_ephemeral();
        let running = Focus::start(config.clone()).await?;
        config.http_bind = running.http_addr();
        config.udp_bind = running.udp_addr().context("the focus receives no media")?;
        let service_url = running.jwt_url().context("the focus runs no authorisation service")?.to_owned();
        Ok((Self { config, running: Some(running) }, service_url))
    }

    pub(crate) async fn stop(&mut self) {
        if let Some(running) = self.running.take() {
            running.shutdown().await;
        }
    }

    /// Starts a focus on the addresses and with the keys of the one that was stopped.
    pub(crate) async fn start_again(&mut self) -> Result<()> {
        self.running =
            Some(Focus::start(self.config.clone()).await.context("the focus does not start again")?);
        Ok(())
    }
}
