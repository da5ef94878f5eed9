//! A call in a Matrix room: join, publish, listen, leave.
//!
//! ```no_run
//! use antiphon_call_sdk::call::{Call, CallEvent, CallOptions};
//! # async fn example(room: matrix_sdk::Room) -> Result<(), Box<dyn std::error::Error>> {
//! let (call, mut events) = Call::join(&room, CallOptions::default()).await?;
//! while let Some(event) = events.next().await {
//!     match event {
//!         CallEvent::Frame { member, track, frame } => {
//!             println!("{} sent {} bytes of {:?}", member.user_id, frame.payload.len(), track.source);
//!         }
//!         CallEvent::MemberLeft(member) => println!("{} left", member.user_id),
//!         _ => {}
//!     }
//! }
//! call.leave().await;
//! # Ok(())
//! # }
//! ```
#![allow(clippy::disallowed_methods, reason = "this is the shell: it owns the clock and the tasks")]

use std::{sync::Arc, time::Duration};

use matrix_sdk::Room;
use tokio::sync::{mpsc, oneshot, watch};

use crate::{
    foci::{self, FocusError},
    frame_crypto::FrameEncryptor,
    key::KeyIndex,
    matrix::{MatrixError, MatrixPort, MemberDevice, RoomFacts, TrustPolicy, sdk::SdkRoom},
    media::{EncodedFrame, TrackSpec},
    media_keys::rollout::RolloutConfig,
    member::{LiveKitFocus, Member, ParticipantIdentity, Slot},
    membership::{
        own::{OwnConfig, Status},
        wire::OwnDescription,
    },
    transport::{LocalTrackId, RemoteTrack, TrackSid, TransportError, livekit::Bind},
};

mod connections;
mod outgoing;
mod remote;
mod shell;
mod stats;

pub use connections::{ConnectError, Connected, Connector, LiveKitConnector};
pub use outgoing::{LocalTrack, WriteError};
pub use stats::{CallStats, TrackStats};

use outgoing::Outgoing;
use shell::{Command, Shell};

/// Control events that may wait for the application; one that lets more pile up has stopped reading.
const EVENT_QUEUE: usize = 4096;
/// Frames that may wait for the application; later ones are dropped, as a late frame is worth nothing.
const FRAME_QUEUE: usize = 1024;
/// How long joining may take after the SFU let us in: the membership of a homeserver that answers slowly.
const JOIN_TIMEOUT: Duration = Duration::from_secs(30);
/// How long leaving may take; the delayed leave does the rest if the homeserver is away.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(5);

/// Whether the call's media is encrypted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EncryptionPolicy {
    /// Encrypted if and only if the room is. The default.
    #[default]
    AsTheRoom,
    /// Refuse to join a call in a room that is not encrypted.
    Required,
}

/// How to join. `CallOptions::default()` is what Element Call does in its compatibility mode, with stricter trust.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct CallOptions {
    /// Which call of the room.
    pub slot: Slot,
    /// `m.call.intent`, for instance `audio` or `video`.
    pub intent: Option<String>,
    /// Whether an unencrypted call is acceptable.
    pub encryption: EncryptionPolicy,
    /// Which devices get our key and may send us theirs.
    pub trust: TrustPolicy,
    /// The focus to publish to, instead of the homeserver's first.
    pub focus: Option<LiveKitFocus>,
    /// Whether the focus's authorisation service is asked to keep our delayed leave (MSC4195), so that the others see
    /// within a moment when this process dies. Where that is not possible we keep it ourselves. The default is no.
    pub delegate_leave: bool,
    /// Timing of our own membership.
    pub membership: OwnConfig,
    /// Timing of our own media key.
    pub keys: RolloutConfig,
}

impl Default for CallOptions {
    fn default() -> Self {
        Self {
            slot: Slot::room_call(),
            intent: None,
            encryption: EncryptionPolicy::default(),
            trust: TrustPolicy::default(),
            focus: None,
            delegate_leave: false,
            membership: OwnConfig::default(),
            keys: RolloutConfig::default(),
        }
    }
}

/// What happens in a call.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum CallEvent {
    /// A member joined, or was there when we came. Our own device is not announced.
    MemberJoined(Member),
    /// A member left or its membership expired.
    MemberLeft(Member),
    /// A member publishes a track, or changed it (mute).
    TrackUpdated {
        /// Who.
        member: Member,
        /// The track, by the SFU's word.
        track: RemoteTrack,
    },
    /// A member's track ended.
    TrackEnded {
        /// Who.
        member: Member,
        /// Which.
        sid: TrackSid,
    },
    /// A frame that was opened with the key of this very member (in an encrypted call).
    Frame {
        /// Whose key opened it.
        member: Member,
        /// The track that it came on.
        track: RemoteTrack,
        /// The frame as its sender's encoder wrote it.
        frame: EncodedFrame,
    },
    /// A frame was dropped because it did not open. Reported once per track and reason; [`Call::stats`] counts all.
    Undecryptable {
        /// Who is said to have sent it.
        member: Member,
        /// On which track.
        sid: TrackSid,
        /// Why.
        reason: crate::frame_crypto::OpenError,
    },
    /// A member's media key came and is installed.
    KeyReceived {
        /// Whose.
        member: Member,
        /// At which index.
        index: KeyIndex,
    },
    /// A key message was refused.
    KeyRejected {
        /// Its sender, by the homeserver's word.
        sender: matrix_sdk::ruma::OwnedUserId,
        /// Why, in words.
        reason: String,
    },
    /// From now on our frames are sealed with the key at this index.
    OwnKeyInUse(KeyIndex),
    /// Our key did not reach these devices; it is tried again.
    KeyDeliveryFailed(Vec<MemberDevice>),
    /// Somebody cannot decode one of our video tracks and asks for a key frame.
    KeyFrameRequested(LocalTrackId),
    /// A focus is lost and being reconnected to.
    Reconnecting(LiveKitFocus),
    /// A focus is connected (again).
    Connected(LiveKitFocus),
    /// A focus of other members cannot be used; it is tried again while they are there.
    FocusFailed {
        /// Which.
        focus: LiveKitFocus,
        /// Why, in words.
        reason: String,
    },
    /// The homeserver schedules no delayed leave for us: if this process dies, we stay listed for hours.
    DelayedLeaveUnavailable {
        /// Why, in words.
        reason: String,
    },
    /// The focus's authorisation service keeps our delayed leave from now on.
    LeaveDelegated,
    /// It does not: if this process dies, the others see it after [`OwnConfig::leave_delay`].
    DelegationFailed {
        /// Why, in words.
        reason: String,
    },
    /// True while the homeserver has probably removed us for want of restarts.
    ProbablyLeft(bool),
    /// The call is over for us; the last event.
    Ended {
        /// Why, in words.
        reason: String,
    },
}

/// The events of a call, in order; frames are dropped if the application does not keep up.
#[derive(Debug)]
pub struct CallEvents {
    control: mpsc::Receiver<CallEvent>,
    frames: mpsc::Receiver<CallEvent>,
}

impl CallEvents {
    /// The next event; `None` after the call ended.
    pub async fn next(&mut self) -> Option<CallEvent> {
        tokio::select! {
            biased;
            event = self.control.recv() => event,
            Some(frame) = self.frames.recv() => Some(frame),
        }
    }
}

/// A joined call. Dropping it leaves; [`Call::leave`] leaves and waits until that is done.
#[derive(Debug)]
pub struct Call {
    commands: mpsc::Sender<Command>,
    outgoing: Arc<Outgoing>,
    stats: Arc<stats::Counters>,
    members: watch::Receiver<Vec<Member>>,
    status: watch::Receiver<Status>,
    identity: ParticipantIdentity,
    focus: LiveKitFocus,
    encrypted: bool,
}

impl Call {
    /// Joins the call of a room with a logged-in, syncing client.
    ///
    /// Finds the focus, gets a token, connects, publishes our membership with its delayed leave, and shares our
    /// media key with the members. Returns once the membership is published.
    ///
    /// # Errors
    /// [`CallError`]; nothing stays behind in the room.
    pub async fn join(room: &Room, options: CallOptions) -> Result<(Self, CallEvents), CallError> {
        let port = Arc::new(SdkRoom::new(room.clone(), options.trust)?);
        Self::join_through(port, Arc::new(LiveKitConnector::new(Bind::Auto)?), options).await
    }

    /// [`Call::join`] through another port to Matrix or another way to connect to an SFU.
    ///
    /// # Errors
    /// As [`Call::join`].
    pub async fn join_through(
        port: Arc<dyn MatrixPort>,
        connector: Arc<dyn Connector>,
        options: CallOptions,
    ) -> Result<(Self, CallEvents), CallError> {
        let started = tokio::time::Instant::now().into_std();
        let facts: RoomFacts = port.room_facts().await?;
        if options.encryption == EncryptionPolicy::Required && !facts.encrypted {
            return Err(CallError::RoomNotEncrypted);
        }
        // Listening starts before the first look at the room, so that no key message falls between.
        let updates = port.updates().await;
        let focus = foci::choose(options.focus.clone(), port.as_ref()).await?;
        let (transport, media) = connector.connect(&focus, port.as_ref()).await?;

        let description = OwnDescription {
            user_id: port.user_id().to_owned(),
            device_id: port.device_id().to_owned(),
            slot: options.slot.clone(),
            focus: focus.clone(),
            room_id: port.room_id().to_owned(),
            intent: options.intent.clone(),
        };
        let identity = ParticipantIdentity::of_state_member(port.user_id(), port.device_id());
        let (control_tx, control) = mpsc::channel(EVENT_QUEUE);
        let (frames_tx, frames) = mpsc::channel(FRAME_QUEUE);
        let (commands, commands_rx) = mpsc::channel(64);
        let (members_tx, members) = watch::channel(Vec::new());
        let (status_tx, mut status) = watch::channel(Status::Connecting);
        let outgoing = Arc::new(Outgoing::new(transport.clone()));
        let counters = Arc::new(stats::Counters::new(started));

        let mut shell = Shell::new(shell::Parts {
            port,
            connector,
            options,
            facts: facts.clone(),
            focus: focus.clone(),
            outgoing: outgoing.clone(),
            stats: counters.clone(),
            control: control_tx,
            frames: frames_tx,
            members: members_tx,
            status: status_tx,
        });
        shell.adopt(focus.clone(), transport, media);
        tokio::spawn(shell.run(description, updates, commands_rx));

        let settled = status.wait_for(|s| *s != Status::Connecting);
        // `None`: too slow. A shell that is gone has not joined.
        let joined = tokio::time::timeout(JOIN_TIMEOUT, settled)
            .await
            .map_or(None, |s| Some(s.is_ok_and(|s| *s == Status::Connected)));
        let call = Self {
            commands,
            outgoing,
            stats: counters,
            members,
            status,
            identity,
            focus,
            encrypted: facts.encrypted,
        };
        match joined {
            Some(true) => {}
            Some(false) => return Err(call.failed_to_join(control).await),
            None => {
                call.leave().await;
                return Err(CallError::JoinTimeout(JOIN_TIMEOUT));
            }
        }
        Ok((call, CallEvents { control, frames }))
    }

    /// Announces a track and returns the handle that its frames are written to.
    ///
    /// # Errors
    /// [`CallError::Transport`] if the SFU refuses it; [`CallError::Codec`] if an encrypted call cannot carry its
    /// codec.
    pub async fn publish(&self, spec: TrackSpec) -> Result<LocalTrack, CallError> {
        let encryptor = if self.encrypted {
            Some(FrameEncryptor::new(spec.codec, self.outgoing.ring.clone())?)
        } else {
            None
        };
        let codec = spec.codec;
        let id = self.outgoing.transport.publish(spec, self.encrypted).await?;
        Ok(LocalTrack::new(id, codec, encryptor, self.outgoing.clone()))
    }

    /// The other members, oldest first, as of the last sync.
    #[must_use]
    pub fn members(&self) -> Vec<Member> {
        self.members.borrow().clone()
    }

    /// Follows the list of the other members.
    #[must_use]
    pub fn watch_members(&self) -> watch::Receiver<Vec<Member>> {
        self.members.clone()
    }

    /// Follows whether our own membership is published.
    #[must_use]
    pub fn watch_status(&self) -> watch::Receiver<Status> {
        self.status.clone()
    }

    /// Under which identity the SFU and the other members know us.
    #[must_use]
    pub fn identity(&self) -> &ParticipantIdentity {
        &self.identity
    }

    /// The focus that we publish to.
    #[must_use]
    pub fn focus(&self) -> &LiveKitFocus {
        &self.focus
    }

    /// Whether media in this call is encrypted; decided by the room.
    #[must_use]
    pub fn is_encrypted(&self) -> bool {
        self.encrypted
    }

    /// What came in so far, per member and track.
    #[must_use]
    pub fn stats(&self) -> CallStats {
        self.stats.snapshot()
    }

    /// The index of the key that our frames are sealed with now.
    #[must_use]
    pub fn own_key_index(&self) -> Option<KeyIndex> {
        self.outgoing.current()
    }

    /// Changes `m.call.intent`, for instance when the camera goes on.
    pub async fn set_intent(&self, intent: Option<String>) {
        // A call that has ended has no intent.
        let _ = self.commands.send(Command::SetIntent(intent)).await;
    }

    /// Leaves: ends the tracks, says goodbye to every SFU and takes our membership back. Bounded by 5 s; if the
    /// homeserver is away, the delayed leave removes us later.
    pub async fn leave(self) {
        let (done_tx, done) = oneshot::channel();
        if self.commands.send(Command::Leave(done_tx)).await.is_ok() {
            // Err: the shell ended first, which is what we wait for.
            let _ = done.await;
        }
    }

    async fn failed_to_join(self, mut control: mpsc::Receiver<CallEvent>) -> CallError {
        drop(self);
        let mut reason = "the homeserver did not accept our membership".to_owned();
        while let Some(event) = control.recv().await {
            if let CallEvent::Ended { reason: why } = event {
                reason = why;
            }
        }
        CallError::Membership(reason)
    }
}

/// Why a call could not be joined, or a track not published.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CallError {
    /// The policy demands encryption and the room has none.
    #[error("the room is not encrypted and EncryptionPolicy::Required was asked for")]
    RoomNotEncrypted,
    /// The homeserver failed.
    #[error(transparent)]
    Matrix(#[from] MatrixError),
    /// No focus, or no token for it.
    #[error(transparent)]
    Focus(#[from] FocusError),
    /// The SFU failed.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// The codec cannot be encrypted.
    #[error(transparent)]
    Codec(#[from] crate::frame_crypto::UnsupportedCodec),
    /// Our membership was not accepted.
    #[error("could not publish our call membership: {0}")]
    Membership(String),
    /// The homeserver took too long.
    #[error("the homeserver did not accept our call membership within {0:?}")]
    JoinTimeout(Duration),
}

impl From<ConnectError> for CallError {
    fn from(error: ConnectError) -> Self {
        match error {
            ConnectError::Focus(error) => Self::Focus(error),
            ConnectError::Transport(error) => Self::Transport(error),
        }
    }
}
