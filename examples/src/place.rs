//! Where an example goes: the options that all of them have.

use std::path::PathBuf;

use antiphon_call_sdk::{CallOptions, Session, SessionOptions, TrustPolicy};
use anyhow::Result;
use matrix_sdk::ruma::OwnedRoomOrAliasId;

use crate::InCall;

/// Which user an example is, and in which room.
#[derive(Clone, Debug, clap::Args)]
pub struct Place {
    /// The homeserver: its server name (example.org) or its URL.
    #[arg(long, env = "MATRIX_HOMESERVER")]
    pub homeserver: String,
    /// User name (bot) or full user id (@bot:example.org).
    #[arg(long, env = "MATRIX_USER")]
    pub user: String,
    /// Password; better in the environment than on the command line.
    #[arg(long, env = "MATRIX_PASSWORD", hide_env_values = true)]
    pub password: String,
    /// Room id or alias; the room is joined if we are invited or it is public.
    #[arg(long)]
    pub room: OwnedRoomOrAliasId,
    /// Folder that keeps the device, its keys and its access token, so that a second start is the same device. Only
    /// one program at a time can use it. Default: a folder per user below ~/.local/state/antiphon.
    #[arg(long, value_name = "DIR")]
    pub state: Option<PathBuf>,
    /// Recovery key of the account. Needed once, if the account is used in other clients already: it lets this device
    /// be cross-signed, without which others refuse its media keys.
    #[arg(long, env = "MATRIX_RECOVERY_KEY", hide_env_values = true)]
    pub recovery_key: Option<String>,
    /// Join even if this device is not cross-signed: only clients that trust any device will hear us.
    #[arg(long)]
    pub allow_unsigned: bool,
    /// Exchange media keys with devices that their owners have not cross-signed. Element Call on its own (not inside
    /// Element) needs this. A homeserver that adds a device to a member's account can then listen.
    #[arg(long)]
    pub trust_any_device: bool,
}

impl Place {
    /// Logs in (or restores the device of an earlier start), enters the room and joins its call.
    ///
    /// # Errors
    /// The cause, and what to do about it, if the homeserver or the focus does not let us in.
    pub async fn join_call(&self, options: CallOptions) -> Result<InCall> {
        let homeserver = self.homeserver.parse()?;
        let state = self.state.clone().unwrap_or_else(|| self.default_state());
        let mut login = SessionOptions::new(homeserver, self.user.as_str(), self.password.as_str(), state);
        login.recovery_key = self.recovery_key.as_deref().map(Into::into);
        login.allow_unsigned_device = self.allow_unsigned;
        let session = Session::log_in_or_restore(login).await?;
        let room = session.enter_room(&self.room).await?;
        let trust = if self.trust_any_device { TrustPolicy::AnyDevice } else { TrustPolicy::CrossSigned };
        let options = options.with_trust(trust).with_allow_untrusted(self.allow_unsigned);
        let (call, events) = session.join_call(room.room_id(), options).await?;
        Ok(InCall::new(session, call, events))
    }

    fn default_state(&self) -> PathBuf {
        let home = || Some(PathBuf::from(std::env::var_os("HOME")?).join(".local/state"));
        let states = std::env::var_os("XDG_STATE_HOME").map(PathBuf::from).or_else(home).unwrap_or_default();
        let name: String = format!("{}@{}", self.user.trim_start_matches('@'), self.homeserver)
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() || "@.-_".contains(c) { c } else { '_' })
            .collect();
        states.join("antiphon").join(name)
    }
}
