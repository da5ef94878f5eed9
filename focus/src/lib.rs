//! A MatrixRTC focus: an SFU that speaks LiveKit's protocol, with the authorisation service in front of it.
//!
//! The control plane ([`room`], and the private modules `signal` and `admin`) and the media plane ([`plane`]) talk
//! by messages only: commands down, events up. The control plane never sees a packet; the plane never sees JSON or
//! protobuf. Encrypted payloads pass untouched: this crate has no key and no code that could use one.
//!
//! What it refuses to do: signalling v1 (answered 404, clients fall back), resuming a session (clients join anew),
//! data tracks, backup codecs, recording, and decrypting.
//!
//! The binary `focus` is all that an operator runs. To embed it:
//!
//! ```no_run
//! use antiphon_focus::{Config, Focus};
//!
//! # async fn run() -> Result<(), antiphon_focus::StartError> {
//! let focus = Focus::start(Config::dev_ephemeral()).await?;
//! println!("LiveKit clients connect to {}", focus.ws_url());
//! focus.shutdown().await;
//! # Ok(())
//! # }
//! ```

mod admin;
pub mod cli;
pub mod config;
pub mod observe;
pub mod plane;
mod presence;
pub mod room;
pub mod sdp;
mod serve;
mod signal;
pub mod token;

pub use config::{Config, ConfigError};
pub use serve::{Focus, FocusHandle, StartError};
