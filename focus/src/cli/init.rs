//! `focus init`: a first configuration.

use std::io::Write as _;
use std::path::PathBuf;

use anyhow::Context as _;
use clap::Args;
use rand::Rng as _;
use zeroize::Zeroizing;

/// Letters and digits: they need no quoting anywhere.
const ALPHABET: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789";

#[derive(Debug, Args)]
pub(super) struct InitArgs {
    /// Writes to this file, which must not exist and which only you will be able to read, instead of to the
    /// terminal.
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
}

impl InitArgs {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let secret = random(48);
        let text = Zeroizing::new(configuration(&format!("API{}", &*random(12)), &secret));
        let Some(path) = self.output else {
            return std::io::stdout().write_all(text.as_bytes()).context("the terminal cannot be written to");
        };
        let mut options = std::fs::OpenOptions::new();
        options.write(true).create_new(true);
        #[cfg(unix)]
        {
            use std::os::unix::fs::OpenOptionsExt as _;
            options.mode(0o600);
        }
        options
            .open(&path)
            .and_then(|mut file| file.write_all(text.as_bytes()))
            .with_context(|| format!("{} cannot be written", path.display()))
    }
}

fn random(length: usize) -> Zeroizing<String> {
    let mut rng = rand::rng();
    Zeroizing::new((0..length).map(|_| char::from(ALPHABET[rng.random_range(0..ALPHABET.len())])).collect())
}

fn configuration(key: &str, secret: &str) -> String {
    format!(
        r#"# The configuration of `focus serve --config FILE`. Unknown keys are errors.
# Check it with `focus check-config --config FILE`.

# Where clients reach the SFU: your reverse proxy, which passes everything below /livekit/ on to http.bind.
public_url = "wss://rtc.example.org/livekit/sfu"

[http]
# Signalling, admin API and authorisation service, without TLS: keep it on loopback, behind the proxy.
bind = "127.0.0.1:7880"

[media]
# Media come here directly, past the proxy: open this UDP port in the firewall.
bind = "0.0.0.0:7882"
# The addresses at which clients reach that port: this machine's public ones.
advertise = ["203.0.113.1"]

[keys]
# API key = secret, at least 32 characters. Whoever has the secret can join every call's SFU room, but cannot
# decrypt it.
{key} = "{secret}"

[rooms]
# Rooms are made by the authorisation service, for users of the homeservers below.
auto_create = false
# Seconds that a room waits for its first participant, and that it outlives its last one.
empty_timeout_seconds = 300
departure_timeout_seconds = 20
# 0 = no limit.
max_participants = 0

[jwt]
# The authorisation service in this process. Clients reach it at /livekit/jwt, next to /livekit/sfu.
enabled = true
# public_url = "https://rtc.example.org/livekit/jwt"
# The homeservers whose users may start calls here: yours. Users of others can join calls that are running.
full_access_homeservers = ["example.org"]
# Clients delegate their delayed leave to the service. Here it is kept, so that a restart forgets none of them.
# state_dir = "/var/lib/focus"
"#
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, Overrides};

    #[test]
    fn what_init_writes_is_what_serve_reads() {
        let config = Config::from_toml(&configuration("APIkey", &random(48)), &Overrides::default()).unwrap();
        assert_eq!(config.jwt_url().unwrap().as_str(), "https://rtc.example.org/livekit/jwt");
        assert!(!config.auto_create);
    }

    #[test]
    fn two_secrets_are_not_the_same() {
        assert_eq!(random(48).len(), 48);
        assert_ne!(*random(48), *random(48));
    }
}
