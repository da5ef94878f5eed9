//! The control plane's logic: rooms, participants, tracks and who gets what.
//!
//! [`Rooms`] does no I/O. It is given what happened and the time ([`Now`]), and is then drained of [`Output`]s:
//! messages to clients, commands to the media plane, connections to close. Outputs are in the order in which they
//! must be carried out; that order is what keeps a participant update ahead of the offer that carries its track.

mod data;
mod ids;
mod participant;
mod quality;
mod registry;
mod speakers;
mod state;
mod track;

use std::time::{Duration, Instant};

use livekit_protocol::{ClientInfo, Codec, DisconnectReason, signal_response};

pub use data::{DataError, MAX_MESSAGE, Patched, Sender, patch};
pub use ids::{Identity, ParticipantSid, RoomName, SessionId, TrackSid};
pub use registry::{AdminError, ParticipantChange, RoomOptions, Rooms};
pub use state::Room;
pub(crate) use state::{leave, protocol_served};

use crate::plane::Command;
use crate::token::Claims;

/// Version of the server as clients see it. They refuse to join below 1.8.0 and parse it as SemVer, so it follows
/// the LiveKit release whose protocol is spoken, not this crate.
pub const SERVER_VERSION: &str = "1.13.5";
/// Signalling protocol that is spoken.
pub const PROTOCOL: i32 = 17;
/// Oldest client protocol that is served.
pub const MIN_PROTOCOL: i32 = 9;
/// Longest identity and room name, in bytes.
pub const MAX_NAME: usize = 256;
/// Longest metadata, in bytes.
pub const MAX_METADATA: usize = 512 * 1024;
/// Largest sum of all attributes' keys and values, in bytes.
pub const MAX_ATTRIBUTES: usize = 64 * 1024;

/// The time, twice: one clock to measure with, one to tell clients.
#[derive(Clone, Copy, Debug)]
pub struct Now {
    /// The clock that never jumps.
    pub instant: Instant,
    /// Since the Unix epoch.
    pub unix: Duration,
}

impl Now {
    fn unix_ms(self) -> i64 {
        i64::try_from(self.unix.as_millis()).unwrap_or(i64::MAX)
    }

    fn unix_s(self) -> i64 {
        i64::try_from(self.unix.as_secs()).unwrap_or(i64::MAX)
    }

    fn unix_us(self) -> i64 {
        i64::try_from(self.unix.as_micros()).unwrap_or(i64::MAX)
    }
}

/// What all rooms have in common.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Settings {
    /// Whether joining a room that does not exist makes it, whatever the token says.
    pub auto_create: bool,
    /// A room that nobody has entered ends after this time.
    pub empty_timeout: Duration,
    /// A room ends this long after the last participant left.
    pub departure_timeout: Duration,
    /// Most participants in a room that was created without a limit; 0 = no limit.
    pub max_participants: u32,
    /// Whether clients may ask for simulated failures: a help to tests of clients, not for deployment.
    pub simulate: bool,
    /// Codecs that may be published, as MIME types: video first, as clients take the first as their fallback.
    pub codecs: Vec<String>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            auto_create: false,
            empty_timeout: Duration::from_secs(300),
            departure_timeout: Duration::from_secs(20),
            max_participants: 0,
            simulate: false,
            codecs: vec!["video/VP8".into(), "audio/opus".into()],
        }
    }
}

impl Settings {
    fn wire_codecs(&self) -> Vec<Codec> {
        self.codecs.iter().map(|mime| Codec { mime: mime.clone(), ..Codec::default() }).collect()
    }
}

/// A wish to join: the token has been verified, the query parsed.
#[derive(Clone, Debug)]
pub struct Join {
    /// What the token says, already merged with the attributes of the query.
    pub claims: Claims,
    /// What the client says about itself.
    pub client: ClientInfo,
    /// Subscribe to every track without being asked.
    pub auto_subscribe: bool,
    /// The client reports the size of its tiles.
    pub adaptive_stream: bool,
}

/// Why nobody joined. Clients read the texts: livekit-client looks for that of [`NoRoom`](Self::NoRoom).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum JoinError {
    /// No identity, no room, or one of them is too long.
    #[error("the access token must name an identity and a room of 1 to {MAX_NAME} bytes")]
    BadName,
    /// The room does not exist and this token may not create it.
    #[error("requested room does not exist")]
    NoRoom,
    /// The room has as many participants as it may have.
    #[error("the room is full")]
    RoomFull,
    /// Metadata or attributes are larger than allowed.
    #[error("metadata or attributes in the access token are too large")]
    TooLarge,
    /// The server is shutting down.
    #[error("the server is shutting down")]
    ShuttingDown,
}

/// What the shell has to do, in this order.
#[derive(Debug)]
#[non_exhaustive]
pub enum Output {
    /// Sends a message on a session's signalling connection.
    Send {
        /// To whom.
        session: SessionId,
        /// The message.
        message: Box<signal_response::Message>,
    },
    /// Closes a session's signalling connection once what was sent before is out. Nothing follows for it.
    Close {
        /// Whose.
        session: SessionId,
    },
    /// Passes a command to the media plane.
    Plane(Command),
    /// Tells whoever watches who is there: what LiveKit tells with webhooks.
    Presence(Presence),
}

/// A participant came, or went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Presence {
    /// The room.
    pub room: RoomName,
    /// Who.
    pub identity: Identity,
    /// This stay: another connection of the same identity has another one.
    pub sid: ParticipantSid,
    /// `None`: its media connection is up. Otherwise why it is gone, be it before it was up.
    pub gone: Option<DisconnectReason>,
}
