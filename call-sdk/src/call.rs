//! A call in a Matrix room: join, publish, listen, leave.
#![allow(clippy::disallowed_methods, reason = "this is the shell: it owns the clock and the tasks")]

use std::{
    fmt,
    sync::{Arc, OnceLock},
    time::Duration,
};

use rand::{SeedableRng as _, rngs::StdRng};
use tokio::sync::{mpsc, oneshot, watch};
use zeroize::Zeroizing;

mod connector;
mod data;
mod error;
mod incoming;
#[cfg(feature = "webrtc")]
mod livekit;
mod options;
mod outgoing;
#[cfg(feature = "opus")]
mod pcm;
mod queue;
mod shell;
#[cfg(feature = "webrtc")]
mod turn;

pub use connector::{Connected, Connector, PeerOpened};
pub use error::CallError;
#[cfg(feature = "webrtc")]
pub use livekit::{LiveKitConnector, LiveKitOptions};
pub use options::CallOptions;
pub use outgoing::{LocalTrack, WriteError};
#[cfg(feature = "opus")]
pub use pcm::{PcmTrack, PcmWriteError};

use queue::EventReceiver;
use shell::{Command, Shell};

use crate::{
    machine::{
        Attention, CallEvent, CallMachine, CallReport, CallStatus, EndReason, IncomingTrack, Invite, Sealing,
        TrackCounters, TrackStats,
    },
    matrix::{MatrixPort, OwnTrust, TrustPolicy},
    media::TrackSpec,
    member::{Member, MemberKey},
    transport::{Reliability, Subscription, TrackSid, UserData},
};

/// The events of a call, in the order in which they happened. An application that is slow loses frames, never other
/// events.
#[derive(Debug)]
pub struct CallEvents {
    queue: EventReceiver,
}

impl CallEvents {
    /// The next event; `None` after [`CallEvent::Ended`].
    pub async fn next(&mut self) -> Option<CallEvent> {
        self.queue.next().await
    }
}

/// A remote track and what it has received so far.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct TrackSummary {
    /// Member and track.
    pub from: Arc<IncomingTrack>,
    /// What it has received.
    pub stats: TrackStats,
}

/// A call. Dropping it leaves; [`Call::leave`] leaves and waits until that is done.
pub struct Call {
    commands: mpsc::Sender<Command>,
    sealing: Arc<Sealing>,
    members: watch::Receiver<Arc<Vec<Member>>>,
    tracks: watch::Receiver<shell::Tracks>,
    status: watch::Receiver<CallStatus>,
    /// The report of a call that is over.
    last_report: Arc<OnceLock<CallReport>>,
}

impl Call {
    /// Joins the call of a room with a logged-in, syncing client.
    ///
    /// Finds a focus, gets a token, connects, publishes our membership with its delayed leave, and shares our media key
    /// with the members. Returns once the membership is published and the focus is connected.
    ///
    /// # Errors
    /// [`CallError`] with the cause and the remedy; nothing stays behind in the room.
    #[cfg(all(feature = "matrix-sdk", feature = "webrtc"))]
    pub async fn join(
        room: &matrix_sdk::Room,
        options: CallOptions,
    ) -> Result<(Self, CallEvents), CallError> {
        let (port, connector) = outside(room, &options)?;
        Self::join_through(port, connector, options).await
    }

    /// Watches the call of a room without joining it: members come and go as events, media does not.
    ///
    /// # Errors
    /// [`CallError`] if the room cannot be read.
    #[cfg(all(feature = "matrix-sdk", feature = "webrtc"))]
    pub async fn observe(
        room: &matrix_sdk::Room,
        options: CallOptions,
    ) -> Result<(Self, CallEvents), CallError> {
        let (port, connector) = outside(room, &options)?;
        Self::start(port, connector, options, true).await
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
        Self::start(port, connector, options, false).await
    }

    async fn start(
        port: Arc<dyn MatrixPort>,
        connector: Arc<dyn Connector>,
        options: CallOptions,
        observe: bool,
    ) -> Result<(Self, CallEvents), CallError> {
        let begin = shell::now();
        // Listening starts before the first look at the room, so that no key message falls between.
        let updates = port.updates().await;
        let trusted = if observe { OwnTrust::CrossSigned } else { port.own_trust().await? };
        if trusted != OwnTrust::CrossSigned
            && port.trust() == TrustPolicy::CrossSigned
            && !options.allow_untrusted
        {
            return Err(CallError::OwnDeviceNotTrusted(trusted));
        }
        let sealing = Arc::new(Sealing::default());
        if let Some(password) = &options.password {
            derive_password(&sealing, password.clone()).await?;
        }
        let config = options.machine_config(port.as_ref(), observe);
        let (events, queue) = queue::queue(options.frame_queue);
        let (commands, commands_rx) = mpsc::channel(64);
        let (members_tx, members) = watch::channel(Arc::default());
        let (tracks_tx, tracks) = watch::channel(Arc::default());
        let (status_tx, status) = watch::channel(CallStatus::Joining);
        let machine = CallMachine::new(begin, config, Arc::clone(&sealing), Box::new(StdRng::from_os_rng()));
        if trusted != OwnTrust::CrossSigned {
            // The queue is empty, so there is room.
            let _ = events.control(CallEvent::OwnDeviceNotTrusted(trusted));
        }
        let last_report = Arc::<OnceLock<CallReport>>::default();
        let shell = Shell::new(shell::Parts {
            port,
            connector,
            machine,
            sealing: Arc::clone(&sealing),
            events,
            members: members_tx,
            tracks: tracks_tx,
            status: status_tx,
            begin: begin.instant,
            last_report: Arc::clone(&last_report),
        });
        tokio::spawn(shell.run(updates, commands_rx));
        let call = Self { commands, sealing, members, tracks, status, last_report };
        call.joined(CallEvents { queue }, options.join_timeout).await
    }

    /// Waits until we are in the call, keeping what happens meanwhile.
    async fn joined(
        mut self,
        events: CallEvents,
        timeout: Duration,
    ) -> Result<(Self, CallEvents), CallError> {
        let settled = self.status.wait_for(|status| *status != CallStatus::Joining);
        match tokio::time::timeout(timeout, settled).await.map(|status| status.map(|status| *status)) {
            Ok(Ok(CallStatus::Joined | CallStatus::Reconnecting)) => Ok((self, events)),
            Ok(_) => {
                let reason = last_word(events).await;
                Err(CallError::Ended { reason, report: self.last_report.get().cloned().map(Box::new) })
            }
            Err(_) => {
                let last_report = Arc::clone(&self.last_report);
                self.leave().await;
                let report = last_report.get().cloned().map(Box::new);
                Err(CallError::Timeout { after: timeout, cause: first_trouble(events).await, report })
            }
        }
    }

    /// Announces a track and returns the handle that its frames are written to. Dropping the future, or the handle,
    /// ends the track.
    ///
    /// # Errors
    /// [`CallError::Codec`] if an encrypted call cannot carry its codec, [`CallError::TrackRefused`] if the SFU refuses
    /// it, [`CallError::Over`].
    pub async fn publish(&self, spec: TrackSpec) -> Result<LocalTrack, CallError> {
        if self.is_encrypted() {
            crate::frame_crypto::FrameEncryptor::new(spec.codec, self.sealing.ring().clone())?;
        }
        let published = self.ask(|reply| Command::Publish { spec, reply }).await?;
        published.map_err(CallError::TrackRefused)
    }

    /// The other members.
    #[must_use]
    pub fn members(&self) -> Arc<Vec<Member>> {
        self.members.borrow().clone()
    }

    /// Follows the other members.
    #[must_use]
    pub fn watch_members(&self) -> watch::Receiver<Arc<Vec<Member>>> {
        self.members.clone()
    }

    /// Follows whether we are in the call.
    #[must_use]
    pub fn watch_status(&self) -> watch::Receiver<CallStatus> {
        self.status.clone()
    }

    /// Whether media in this call is encrypted; decided by the room.
    #[must_use]
    pub fn is_encrypted(&self) -> bool {
        self.sealing.is_encrypted()
    }

    /// The index of the key that our frames are sealed with now.
    #[must_use]
    pub fn own_key_index(&self) -> Option<crate::key::KeyIndex> {
        self.sealing.current()
    }

    /// What each remote track has received so far.
    #[must_use]
    pub fn tracks(&self) -> Vec<TrackSummary> {
        let tracks = self.tracks.borrow();
        let summary = |(from, counters): &(Arc<IncomingTrack>, Arc<TrackCounters>)| TrackSummary {
            from: Arc::clone(from),
            stats: counters.read(),
        };
        tracks.iter().map(summary).collect()
    }

    /// An account of the call, made for pasting into a bug report: it names no user, device, room or key. It does
    /// contain the server names of the members.
    ///
    /// # Errors
    /// [`CallError::Over`].
    pub async fn report(&self) -> Result<CallReport, CallError> {
        match self.ask(Command::Report).await {
            Err(CallError::Over) => self.last_report.get().cloned().ok_or(CallError::Over),
            asked => asked,
        }
    }

    /// Changes our intent, for instance when the camera goes on.
    ///
    /// # Errors
    /// [`CallError::Over`].
    pub async fn set_intent(&self, intent: Option<String>) -> Result<(), CallError> {
        self.tell(Command::SetIntent(intent)).await
    }

    /// Chooses which part of a member's track to receive: layer, pause, nothing.
    ///
    /// # Errors
    /// [`CallError::Over`].
    pub async fn subscribe(
        &self,
        member: &Member,
        sid: &TrackSid,
        subscription: Subscription,
    ) -> Result<(), CallError> {
        self.tell(Command::Subscribe { member: member.key(), sid: sid.clone(), subscription }).await
    }

    /// Asks for a key frame of a member's video track, for instance when its decoder starts.
    ///
    /// # Errors
    /// [`CallError::Over`].
    pub async fn request_key_frame(&self, member: &Member, sid: &TrackSid) -> Result<(), CallError> {
        self.tell(Command::RequestKeyFrame { member: member.key(), sid: sid.clone() }).await
    }

    /// Sends a data message to some members, or to everybody if `to` is empty. Sealed in an encrypted call.
    ///
    /// # Errors
    /// [`CallError::DataTooLarge`], [`CallError::Over`].
    pub async fn send_data(
        &self,
        reliability: Reliability,
        to: &[Member],
        message: UserData,
    ) -> Result<(), CallError> {
        if message.payload.len() > data::MAX_DATA {
            return Err(CallError::DataTooLarge(message.payload.len()));
        }
        let to: Vec<MemberKey> = to.iter().map(Member::key).collect();
        self.tell(Command::SendData { reliability, to, message }).await
    }

    /// Replaces our media key, for instance when the application removes somebody by its own rules.
    ///
    /// # Errors
    /// [`CallError::Over`].
    pub async fn rotate_key(&self) -> Result<(), CallError> {
        self.tell(Command::RotateKey).await
    }

    /// The intent that all other members who state one agree on.
    #[must_use]
    pub fn common_intent(&self) -> Option<String> {
        crate::member::common_intent(&self.members.borrow()).map(str::to_owned)
    }

    /// Invites everybody in the room (MSC4075). [`CallOptions::invite`] does it when we start a call.
    ///
    /// # Errors
    /// [`CallError::Over`].
    pub async fn invite(&self, attention: Attention) -> Result<(), CallError> {
        self.tell(Command::Invite(attention)).await
    }

    /// Declines an invitation for all devices of this user.
    ///
    /// # Errors
    /// [`CallError::Over`].
    pub async fn decline(&self, invite: &Invite) -> Result<(), CallError> {
        self.tell(Command::Decline(invite.event_id.clone())).await
    }

    /// Shows an emoji to the others for a moment. Known names are those of Element Call, for instance `thumbsup`.
    ///
    /// # Errors
    /// [`CallError::Over`].
    pub async fn react(&self, emoji: impl Into<String>, name: impl Into<String>) -> Result<(), CallError> {
        self.tell(Command::React { emoji: emoji.into(), name: name.into() }).await
    }

    /// Raises or lowers our hand.
    ///
    /// # Errors
    /// [`CallError::Over`].
    pub async fn raise_hand(&self, raised: bool) -> Result<(), CallError> {
        self.tell(Command::RaiseHand(raised)).await
    }

    /// Leaves: ends the tracks, disconnects from every SFU and removes our membership. Bounded by 5 s, and
    /// 2 s more to tell members of a mesh; if the homeserver is away, the delayed leave removes us later.
    pub async fn leave(self) {
        // An error means that the call ended first.
        let _ = self.ask(Command::Leave).await;
    }

    async fn tell(&self, command: Command) -> Result<(), CallError> {
        self.commands.send(command).await.map_err(|_| CallError::Over)
    }

    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, CallError> {
        let (reply, answer) = oneshot::channel();
        self.tell(command(reply)).await?;
        answer.await.map_err(|_| CallError::Over)
    }
}

impl fmt::Debug for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Call").field("status", &*self.status.borrow()).finish_non_exhaustive()
    }
}

#[cfg(all(feature = "matrix-sdk", feature = "webrtc"))]
impl crate::session::Session {
    /// [`Call::join`] in a room that the session's user has joined.
    ///
    /// # Errors
    /// As [`Call::join`], and [`CallError::Session`] if the user is not in the room.
    pub async fn join_call(
        &self,
        room_id: &ruma_common::RoomId,
        options: CallOptions,
    ) -> Result<(Call, CallEvents), CallError> {
        let (port, connector) = self.outside(room_id, &options)?;
        Call::start(port, connector, options, false).await
    }

    /// [`Call::observe`] in a room that the session's user has joined.
    ///
    /// # Errors
    /// As [`Call::observe`], and [`CallError::Session`] if the user is not in the room.
    pub async fn observe_call(
        &self,
        room_id: &ruma_common::RoomId,
        options: CallOptions,
    ) -> Result<(Call, CallEvents), CallError> {
        let (port, connector) = self.outside(room_id, &options)?;
        Call::start(port, connector, options, true).await
    }

    fn outside(&self, room_id: &ruma_common::RoomId, options: &CallOptions) -> Result<Outside, CallError> {
        let port = self.room(room_id, options.trust)?;
        let connector = LiveKitConnector::new(options.livekit())?;
        Ok((Arc::new(port), Arc::new(connector)))
    }
}

/// A room, and the SFUs behind its call.
#[cfg(all(feature = "matrix-sdk", feature = "webrtc"))]
type Outside = (Arc<dyn MatrixPort>, Arc<dyn Connector>);

/// The room and the SFUs behind a call with these options.
#[cfg(all(feature = "matrix-sdk", feature = "webrtc"))]
fn outside(room: &matrix_sdk::Room, options: &CallOptions) -> Result<Outside, CallError> {
    let port = crate::matrix::sdk::SdkRoom::new(room.clone(), options.trust)?;
    let connector = LiveKitConnector::new(options.livekit())?;
    Ok((Arc::new(port), Arc::new(connector)))
}

/// Why the call ended.
async fn last_word(mut events: CallEvents) -> EndReason {
    let mut reason = EndReason::Internal("the call's task stopped".to_owned());
    while let Some(event) = events.next().await {
        if let CallEvent::Ended(why) = event {
            reason = why;
        }
    }
    reason
}

/// The last thing that went wrong before joining was given up.
async fn first_trouble(mut events: CallEvents) -> String {
    let mut trouble = "no answer".to_owned();
    while let Some(event) = events.next().await {
        match event {
            CallEvent::FocusFailed { failure, .. } => trouble = failure.to_string(),
            CallEvent::MembershipTrouble { error, .. } => trouble = error.to_string(),
            _ => {}
        }
    }
    trouble
}

async fn derive_password(sealing: &Arc<Sealing>, password: Zeroizing<String>) -> Result<(), CallError> {
    let sealing = Arc::clone(sealing);
    tokio::task::spawn_blocking(move || sealing.switch_to_password(&password))
        .await
        .map_err(|error| internal(&error))?
        .map_err(|error| internal(&error))
}

fn internal(error: &dyn std::error::Error) -> CallError {
    CallError::Ended { reason: EndReason::Internal(error.to_string()), report: None }
}

#[cfg(test)]
mod tests;
