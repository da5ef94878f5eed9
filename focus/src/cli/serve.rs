//! `focus serve`, and what it says at its start.

use std::fmt::Write as _;

use anyhow::Context as _;

use crate::config::{Config, FullAccess};
use crate::serve::{Focus, FocusHandle, homeserver_snippets};

/// Serves until the process is asked to end.
pub(super) fn run(config: Config) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Runtime::new().context("the system has no room for threads")?;
    runtime.block_on(async {
        let dev = config.dev;
        let focus = Focus::start(config).await?;
        print!("{}", greeting(&focus, dev));
        asked_to_end().await?;
        tracing::info!("says goodbye to everybody and stops");
        focus.shutdown().await;
        Ok(())
    })
}

/// What a configuration means, for `check-config`.
pub(super) fn describe(config: &Config) -> String {
    let mut text = "The configuration is good.\n".to_owned();
    // Writing to a string does not fail.
    let _ = writeln!(text, "  HTTP     {}", config.http_bind);
    let _ = writeln!(text, "  media    UDP {}", config.udp_bind);
    for address in &config.advertised {
        let port = if address.port() == 0 { config.udp_bind.port() } else { address.port() };
        let _ = writeln!(text, "           clients send to {}:{port}", address.ip());
    }
    if let Some(url) = &config.public_url {
        let _ = writeln!(text, "  SFU      {url}");
    }
    for (key, _) in config.keys.iter() {
        let _ = writeln!(text, "  API key  {key}");
    }
    match &config.jwt {
        None => text.push_str("  tokens   from an authorisation service elsewhere\n"),
        Some(jwt) => {
            if let Some(url) = config.jwt_url() {
                let _ = writeln!(text, "  tokens   {url}");
            }
            let who = match &jwt.full_access {
                FullAccess::All => "everybody may start calls".to_owned(),
                FullAccess::Loopback => "users of homeservers on loopback may start calls".to_owned(),
                FullAccess::Only(names) if names.is_empty() => {
                    "nobody may start calls: set jwt.full_access_homeservers".to_owned()
                }
                FullAccess::Only(names) => format!("users of {} may start calls", names.join(", ")),
            };
            let _ = writeln!(text, "           {who}");
            let leaves = match &jwt.state_dir {
                Some(directory) => format!("kept in {}", directory.display()),
                None => "kept in memory: a restart forgets them; set jwt.state_dir".to_owned(),
            };
            let _ = writeln!(text, "           delegated leaves are {leaves}");
        }
    }
    text
}

fn greeting(focus: &FocusHandle, dev: bool) -> String {
    let mut text = String::new();
    let _ = writeln!(text, "focus {} is ready", env!("CARGO_PKG_VERSION"));
    let _ = writeln!(text, "  SFU      {}", focus.ws_url());
    let _ = writeln!(text, "  HTTP     {}", focus.http_addr());
    if let Some(udp) = focus.udp_addr() {
        let _ = writeln!(text, "  media    UDP {udp}");
    }
    if dev {
        text.push_str(
            "  DEVELOPMENT: API key devkey, secret `secret`; anybody on this machine may make rooms\n",
        );
    }
    if let Some(url) = focus.jwt_url() {
        let _ = writeln!(text, "  tokens   {url}\n\nTell the homeserver:\n\n{}", homeserver_snippets(url));
    }
    text
}

async fn asked_to_end() -> anyhow::Result<()> {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        let mut terminate = signal(SignalKind::terminate()).context("SIGTERM cannot be caught")?;
        tokio::select! {
            caught = tokio::signal::ctrl_c() => caught.context("ctrl-c cannot be caught")?,
            _ = terminate.recv() => {}
        }
    }
    #[cfg(not(unix))]
    tokio::signal::ctrl_c().await.context("ctrl-c cannot be caught")?;
    Ok(())
}
