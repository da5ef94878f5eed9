//! The program's command line.
//!
//! Exit status: 0 done, 1 failed, 2 wrong usage.

mod init;
mod serve;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use tracing_subscriber::EnvFilter;
use url::Url;

use crate::config::{Config, ConfigError, Overrides};
use crate::token::Secret;

/// What a reader should know first.
const ABOUT: &str =
    "An SFU for MatrixRTC calls: speaks LiveKit's protocol, forwards encrypted media, holds no key.";

/// What `--help` teaches.
const TEACH: &str = "\
Try it on this machine:
  focus serve --dev                      ws://localhost:7880, API key devkey, secret `secret`

Run it for a homeserver:
  focus init > focus.toml                a commented configuration with a fresh key and secret
  $EDITOR focus.toml                     say under which address this machine is reached
  focus check-config --config focus.toml
  focus serve --config focus.toml        prints what to add to the homeserver's configuration

Clients need TCP 443 (a reverse proxy in front of http.bind) and the UDP port of media.bind.
Settings come from the file, then from the environment (FOCUS_…), then from flags; the last wins.
What is logged is chosen with FOCUS_LOG, for instance FOCUS_LOG=antiphon_focus=debug.";

#[derive(Debug, Parser)]
#[command(name = "focus", version, about = ABOUT, after_help = TEACH)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Runs the SFU and the authorisation service.
    Serve(ServeArgs),
    /// Writes a commented configuration with a fresh API key and secret.
    Init(init::InitArgs),
    /// Reads the configuration as `serve` would, says what is wrong with it, and what it means if nothing is.
    CheckConfig(Settings),
}

#[derive(Debug, Args)]
struct ServeArgs {
    #[command(flatten)]
    settings: Settings,
    /// Only check the configuration, as `focus check-config` does.
    #[arg(long)]
    check_config: bool,
}

#[derive(Debug, Args)]
struct Settings {
    /// The configuration file.
    #[arg(long, short, value_name = "FILE", env = "FOCUS_CONFIG", conflicts_with = "dev")]
    config: Option<PathBuf>,
    /// Development: loopback only, HTTP 7880, UDP 7882, key `devkey`, secret `secret`, rooms made on join, homeservers
    /// on loopback accepted whatever their certificate. Never for a deployment.
    #[arg(long)]
    dev: bool,
    /// Where HTTP and WebSockets are served [default: 127.0.0.1:7880].
    #[arg(long, value_name = "ADDRESS", env = "FOCUS_HTTP_BIND")]
    http_bind: Option<SocketAddr>,
    /// Where media are received [default: 0.0.0.0:7882].
    #[arg(long, value_name = "ADDRESS", env = "FOCUS_UDP_BIND")]
    udp_bind: Option<SocketAddr>,
    /// An address that clients send media to, as ADDRESS:PORT (port 0: the bound one). May be repeated.
    #[arg(long, value_name = "ADDRESS", env = "FOCUS_ADVERTISE", value_delimiter = ',')]
    advertise: Vec<SocketAddr>,
    /// Where clients reach the SFU, for instance wss://rtc.example.org/livekit/sfu.
    #[arg(long, value_name = "URL", env = "FOCUS_PUBLIC_URL")]
    public_url: Option<Url>,
    /// The API key, in place of those in the file.
    #[arg(long, value_name = "KEY", env = "FOCUS_KEY")]
    key: Option<String>,
    /// The API secret. From the environment only: other users can read a command line.
    #[arg(skip)]
    secret: Option<Secret>,
    /// Homeservers whose users may create rooms, separated by commas; `*` for all.
    #[arg(long, value_name = "NAMES", env = "FOCUS_FULL_ACCESS_HOMESERVERS", value_delimiter = ',')]
    full_access_homeservers: Option<Vec<String>>,
    /// Where delegated leaves are kept, so that a restart forgets none [default: in memory].
    #[arg(long, value_name = "DIRECTORY", env = "FOCUS_STATE_DIR")]
    state_dir: Option<PathBuf>,
}

impl Settings {
    fn load(&self) -> Result<Config, ConfigError> {
        let overrides = Overrides {
            http_bind: self.http_bind,
            public_url: self.public_url.clone(),
            udp_bind: self.udp_bind,
            advertised: self.advertise.clone(),
            key: self.key.clone(),
            secret: self.secret.clone(),
            full_access: self.full_access_homeservers.clone(),
            state_dir: self.state_dir.clone(),
        };
        if self.dev { Config::dev_with(&overrides) } else { Config::load(self.config.as_deref(), &overrides) }
    }
}

/// Runs the program with the arguments and the environment of this process.
pub fn main() -> ExitCode {
    // Two TLS libraries are in the program, as dependencies want different ones: one is chosen for all. An error
    // means that one is chosen already.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let mut cli = Cli::parse();
    if let Command::Serve(ServeArgs { settings, .. }) | Command::CheckConfig(settings) = &mut cli.command {
        settings.secret = std::env::var("FOCUS_SECRET").ok().filter(|s| !s.is_empty()).map(Secret::new);
    }
    let done = match cli.command {
        Command::Init(args) => args.run(),
        Command::Serve(args) if !args.check_config => {
            log();
            args.settings.load().map_err(anyhow::Error::from).and_then(serve::run)
        }
        Command::Serve(ServeArgs { settings, .. }) | Command::CheckConfig(settings) => {
            settings.load().map_err(anyhow::Error::from).map(|config| print!("{}", serve::describe(&config)))
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("focus: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn log() {
    let filter = EnvFilter::try_from_env("FOCUS_LOG").unwrap_or_else(|_| EnvFilter::new("info,str0m=warn"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent_and_its_help_teaches() {
        Cli::command().debug_assert();
        let help = Cli::command().render_long_help().to_string();
        for word in ["focus init", "focus serve --dev", "check-config", "UDP", "FOCUS_LOG"] {
            assert!(help.contains(word), "{word} is missing in {help}");
        }
    }

    #[test]
    fn a_file_and_development_exclude_each_other() {
        assert!(Cli::try_parse_from(["focus", "serve", "--dev", "--config", "x"]).is_err());
        let cli = Cli::try_parse_from(["focus", "serve", "--dev", "--http-bind", "127.0.0.1:0"]).unwrap();
        let Command::Serve(args) = cli.command else { panic!("not serve") };
        assert_eq!(args.settings.load().unwrap().http_bind.port(), 0);
    }
}
