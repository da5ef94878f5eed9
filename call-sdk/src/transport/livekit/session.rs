//! The task that keeps one member connected: it owns the signalling and the engine, and restores both.

use std::{
    collections::HashMap,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use livekit_protocol::{self as proto, signal_request as request, signal_response as response};
use livekit_signaling::{SignalClient, SignalEvent, SignalEvents};
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinSet,
    time::Instant,
};
use webrtc::media_stream::track_remote::TrackRemote;

use super::{
    Shared,
    connect::{ConnectOptions, IceServer, open_signalling},
    engine::{Engine, EngineEvent, SendingTrack, Side},
    incoming, outgoing,
    outgoing::LocalTrack,
    pace::Backoff,
    publications::{ANSWER_TO_ADD_TRACK, Publications},
    roster::{ParticipantView, Roster},
    sections::incoming_tracks,
};
use crate::{
    media::{Codec, TrackSource, TrackSpec},
    member::ParticipantIdentity,
    transport::{LocalTrackId, TrackSid, TransportError, TransportEvent},
};

/// How long a peer connection may take from its description to the first flow of media.
const MEDIA_TIMEOUT: Duration = Duration::from_secs(15);
/// How long the polite end of the signalling may take.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);
/// Remote tracks that are read at the same time on one connection; more than any call has.
const MOST_READERS: usize = 4096;

/// What the transport's handle asks of its session.
pub(super) enum Command {
    Publish {
        spec: TrackSpec,
        encrypted: bool,
        reply: oneshot::Sender<Result<LocalTrackId, TransportError>>,
    },
    Unpublish {
        track: LocalTrackId,
        done: oneshot::Sender<()>,
    },
    /// Tell the SFU whether the track is muted, as it is now.
    TellMuted {
        track: LocalTrackId,
        done: oneshot::Sender<()>,
    },
    Close {
        done: oneshot::Sender<()>,
    },
}

/// Why a connection is over.
enum End {
    /// We want to leave; whoever asked is told afterwards.
    Left(Option<oneshot::Sender<()>>),
    /// It broke; another one may work.
    Lost(String),
    /// The SFU does not want us.
    Refused(String),
}

/// One connection to the SFU, from join to loss.
pub(super) struct Link {
    signal: SignalClient,
    signal_events: SignalEvents,
    engine: Engine,
    engine_events: mpsc::Receiver<EngineEvent>,
    publications: Publications,
    sending: HashMap<LocalTrackId, SendingTrack>,
    /// Which track comes under which MediaStreamTrack id, by the last offer.
    expected: HashMap<String, TrackSid>,
    readers: JoinSet<()>,
    publisher: Progress,
    subscriber: Progress,
}

/// How far a peer connection is.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Progress {
    Unused,
    Connecting { deadline: Instant },
    Up,
}

impl Link {
    /// Joins with `token` and opens the peer connections.
    pub(super) async fn open(
        options: &ConnectOptions,
        token: &str,
    ) -> Result<(Self, proto::JoinResponse), TransportError> {
        let (signal, join, signal_events) = open_signalling(options, token).await?;
        let servers = join.ice_servers.iter().cloned().map(IceServer::from);
        let servers = options.ice_servers.iter().cloned().chain(servers).collect();
        let (engine, engine_events) = match Engine::open(&options.local_addresses(), servers).await {
            Ok(engine) => engine,
            Err(error) => {
                leave(&signal).await;
                return Err(error);
            }
        };
        let subscriber = if join.subscriber_primary {
            Progress::Connecting { deadline: Instant::now() + MEDIA_TIMEOUT }
        } else {
            Progress::Unused
        };
        let link = Self {
            signal,
            signal_events,
            engine,
            engine_events,
            publications: Publications::default(),
            sending: HashMap::new(),
            expected: HashMap::new(),
            readers: JoinSet::new(),
            publisher: Progress::Unused,
            subscriber,
        };
        Ok((link, join))
    }

    async fn send(&self, message: request::Message) {
        self.signal.send(message).await;
    }

    fn progress(&mut self, side: Side) -> &mut Progress {
        match side {
            Side::Publisher => &mut self.publisher,
            Side::Subscriber => &mut self.subscriber,
        }
    }

    /// When something is overdue at the latest.
    fn deadline(&self) -> Option<Instant> {
        let media = [self.publisher, self.subscriber].into_iter().filter_map(|progress| match progress {
            Progress::Connecting { deadline } => Some(deadline),
            _ => None,
        });
        media.chain(self.publications.deadline().map(Instant::from_std)).min()
    }

    /// Whether everything that should flow flows.
    fn complete(&self) -> bool {
        let flowing = |progress| !matches!(progress, Progress::Connecting { .. });
        self.publications.settled() && flowing(self.publisher) && flowing(self.subscriber)
    }

    /// Ends it; politely if the SFU still listens.
    async fn close(mut self, politely: bool) {
        if politely {
            leave(&self.signal).await;
        } else if tokio::time::timeout(CLOSE_TIMEOUT, self.signal.close()).await.is_err() {
            tracing::debug!("the signalling connection did not close in time");
        }
        self.engine.close().await;
        self.readers.shutdown().await;
    }
}

async fn leave(signal: &SignalClient) {
    let message = request::Message::Leave(proto::LeaveRequest {
        reason: proto::DisconnectReason::ClientInitiated.into(),
        action: proto::leave_request::Action::Disconnect.into(),
        ..Default::default()
    });
    let goodbye = async {
        signal.send(message).await;
        signal.close().await;
    };
    if tokio::time::timeout(CLOSE_TIMEOUT, goodbye).await.is_err() {
        tracing::debug!("the signalling connection did not close in time");
    }
}

/// A track that the application publishes, whatever becomes of the connection.
struct Published {
    local: Arc<LocalTrack>,
    spec: TrackSpec,
    encrypted: bool,
    /// Our name for it in signalling and SDP.
    cid: String,
    /// What the SFU was told last.
    told_muted: bool,
    /// Who waits for it to be live for the first time.
    reply: Option<oneshot::Sender<Result<LocalTrackId, TransportError>>>,
}

/// See the module.
pub(super) struct Session {
    options: ConnectOptions,
    shared: Arc<Shared>,
    inbox: mpsc::Receiver<Command>,
    /// The newest token: the SFU refreshes it, so that an old one does not end a long call.
    token: String,
    roster: Roster,
    published: HashMap<LocalTrackId, Published>,
    next_track: u64,
    /// Set from the loss of a connection until everything is as it was.
    restoring: Option<Backoff>,
}

impl Session {
    pub(super) fn new(options: ConnectOptions, shared: Arc<Shared>, inbox: mpsc::Receiver<Command>) -> Self {
        Self {
            token: options.token.clone(),
            options,
            shared,
            inbox,
            roster: Roster::default(),
            published: HashMap::new(),
            next_track: 1,
            restoring: None,
        }
    }

    /// Runs until the connection ends for good.
    pub(super) async fn run(mut self, link: Link, join: proto::JoinResponse) {
        let mut next = Ok((link, join));
        let (reason, done) = loop {
            let (mut link, join) = match next {
                Ok(link) => link,
                Err(End::Left(done)) => break ("left".to_owned(), done),
                Err(End::Lost(reason) | End::Refused(reason)) => break (reason, None),
            };
            let end = self.drive(&mut link, join).await;
            for published in self.published.values() {
                published.local.detach();
            }
            self.shared.incoming.clear();
            self.token = link.signal.token();
            link.close(matches!(end, End::Left(_))).await;
            next = match end {
                End::Lost(reason) => self.restore(reason).await,
                end => Err(end),
            };
        };
        tracing::debug!(reason, "the SFU connection is over");
        self.shared.closed.store(true, Ordering::Relaxed);
        self.inbox.close();
        for published in std::mem::take(&mut self.published).into_values() {
            if let Some(reply) = published.reply {
                answer(reply, Err(TransportError::Closed));
            }
        }
        self.shared.events.last(TransportEvent::Disconnected { reason });
        if let Some(done) = done {
            answer(done, ());
        }
    }

    /// Connects again, as often as is sensible.
    async fn restore(&mut self, reason: String) -> Result<(Link, proto::JoinResponse), End> {
        tracing::info!(reason, "the SFU connection is lost; connecting again");
        let mut backoff = match self.restoring.take() {
            Some(backoff) => backoff,
            None => {
                self.emit(TransportEvent::Reconnecting).await?;
                Backoff::default()
            }
        };
        let mut reason = reason;
        while let Some(wait) = backoff.next_wait(rand::random()) {
            self.meanwhile(tokio::time::sleep(wait)).await?;
            let (options, token) = (self.options.clone(), self.token.clone());
            let mut opening = tokio::spawn(async move { Link::open(&options, &token).await });
            let opened = match self.meanwhile(&mut opening).await {
                Ok(opened) => opened.unwrap_or_else(|panic| Err(TransportError::Signal(Box::new(panic)))),
                Err(end) => {
                    // Half a join would leave a ghost in the room for a minute.
                    tokio::spawn(async move {
                        if let Ok(Ok((link, _))) = opening.await {
                            link.close(true).await;
                        }
                    });
                    return Err(end);
                }
            };
            match opened {
                Ok(joined) => {
                    self.restoring = Some(backoff);
                    return Ok(joined);
                }
                Err(
                    error @ (TransportError::Unauthorised { .. } | TransportError::RoomCreationRestricted),
                ) => return Err(End::Refused(error.to_string())),
                Err(error) => reason = describe(&error),
            }
        }
        Err(End::Refused(format!("the SFU could not be reached again: {reason}")))
    }

    /// Waits for `work` while commands are served that need no connection.
    async fn meanwhile<T>(&mut self, work: impl Future<Output = T>) -> Result<T, End> {
        tokio::pin!(work);
        loop {
            tokio::select! {
                done = &mut work => return Ok(done),
                command = self.inbox.recv() => self.obey(None, command).await?,
                () = self.shared.events.abandoned() => return Err(End::Left(None)),
            }
        }
    }

    /// Serves one connection until it ends.
    async fn drive(&mut self, link: &mut Link, join: proto::JoinResponse) -> End {
        if let Err(end) = self.joined(link, join).await {
            return end;
        }
        loop {
            let deadline = link.deadline();
            let step = tokio::select! {
                command = self.inbox.recv() => self.obey(Some(link), command).await,
                event = link.signal_events.recv() => match event {
                    Some(SignalEvent::Message(message)) => self.hear(link, *message).await,
                    Some(SignalEvent::Close(reason)) => Err(End::Lost(format!("signalling closed: {reason}"))),
                    None => Err(End::Lost("signalling closed".to_owned())),
                },
                event = link.engine_events.recv() => match event {
                    Some(event) => self.observe(link, event).await,
                    None => Err(End::Lost("the media engine stopped".to_owned())),
                },
                () = at(deadline) => self.overdue(link).await,
                () = self.shared.events.abandoned() => Err(End::Left(None)),
            };
            let step = match step {
                Ok(()) if link.engine.overflowed() => {
                    Err(End::Lost("the media engine's events were lost".to_owned()))
                }
                Ok(()) => self.settle(link).await,
                Err(end) => Err(end),
            };
            if let Err(end) = step {
                return end;
            }
        }
    }

    async fn joined(&mut self, link: &mut Link, join: proto::JoinResponse) -> Result<(), End> {
        self.shared.incoming.expect_injected(join.sif_trailer.into());
        let own = join.participant.unwrap_or_default().identity;
        let others = join.other_participants.into_iter().map(ParticipantView::from).collect();
        let events = self.roster.snapshot(ParticipantIdentity(own), others);
        self.emit_all(events).await?;
        let mut tracks: Vec<_> = self.published.keys().copied().collect();
        // In the order of publication, which is the order in which others see them.
        tracks.sort_by_key(|track| track.0);
        for track in tracks {
            self.ask(link, track).await;
        }
        Ok(())
    }

    /// A command of the application.
    async fn obey(&mut self, link: Option<&mut Link>, command: Option<Command>) -> Result<(), End> {
        match command {
            None => return Err(End::Left(None)),
            Some(Command::Close { done }) => return Err(End::Left(Some(done))),
            Some(Command::Publish { spec, encrypted, reply }) => {
                if !matches!(spec.codec, Codec::Opus | Codec::Vp8) {
                    answer(reply, Err(TransportError::UnsupportedCodec(spec.codec)));
                    return Ok(());
                }
                let track = LocalTrackId(self.next_track);
                self.next_track += 1;
                let local = Arc::new(LocalTrack::new(track, spec.codec));
                self.shared.add(Arc::clone(&local));
                let published = Published {
                    local,
                    spec,
                    encrypted,
                    cid: format!("{:032x}", rand::random::<u128>()),
                    told_muted: false,
                    reply: Some(reply),
                };
                self.published.insert(track, published);
                if let Some(link) = link {
                    self.ask(link, track).await;
                }
            }
            Some(Command::Unpublish { track, done }) => {
                self.shared.remove(track);
                if let Some(published) = self.published.remove(&track) {
                    published.local.detach();
                    if let Some(reply) = published.reply {
                        answer(reply, Err(TransportError::UnknownTrack));
                    }
                }
                let result = match link {
                    Some(link) => end_track(link, track).await,
                    None => Ok(()),
                };
                answer(done, ());
                result?;
            }
            Some(Command::TellMuted { track, done }) => {
                if let Some(link) = link {
                    self.tell_muted(link, track).await;
                }
                answer(done, ());
            }
        }
        Ok(())
    }

    /// A message of the SFU.
    async fn hear(&mut self, link: &mut Link, message: response::Message) -> Result<(), End> {
        match message {
            response::Message::Offer(offer) => {
                link.expected = incoming_tracks(&offer.sdp, &offer.mid_to_track_id);
                let sdp = link.engine.answer_offer(&offer.sdp).await.map_err(lost)?;
                let answer = proto::SessionDescription {
                    r#type: "answer".to_owned(),
                    sdp,
                    id: offer.id,
                    ..Default::default()
                };
                link.send(request::Message::Answer(answer)).await;
                if link.subscriber == Progress::Unused {
                    link.subscriber = Progress::Connecting { deadline: Instant::now() + MEDIA_TIMEOUT };
                }
            }
            response::Message::Answer(answer) => {
                if !link.publications.expects_answer(answer.id) {
                    tracing::debug!(id = answer.id, "an answer to no present offer");
                    return Ok(());
                }
                link.engine.take_answer(answer.sdp).await.map_err(lost)?;
                if link.publisher == Progress::Unused {
                    link.publisher = Progress::Connecting { deadline: Instant::now() + MEDIA_TIMEOUT };
                }
                for track in link.publications.answered() {
                    self.attach(link, track).await?;
                }
            }
            response::Message::Trickle(trickle) => {
                let side = match trickle.target() {
                    proto::SignalTarget::Publisher => Side::Publisher,
                    proto::SignalTarget::Subscriber => Side::Subscriber,
                };
                link.engine.add_candidate(side, &trickle.candidate_init).await;
            }
            response::Message::Update(update) => {
                for info in update.participants {
                    let events = self.roster.update(info.into());
                    self.emit_all(events).await?;
                }
            }
            response::Message::TrackPublished(published) => {
                let sid = published.track.unwrap_or_default().sid;
                if let Some(track) = link.publications.grant(&published.cid, sid) {
                    self.granted(link, track).await?;
                }
            }
            response::Message::RequestResponse(refusal) => {
                use proto::request_response::{Reason, Request};
                let reason = refusal.reason();
                if let Some(Request::AddTrack(asked)) = &refusal.request
                    && !matches!(reason, Reason::Ok | Reason::Queued)
                    && let Some(track) = link.publications.refuse(&asked.cid)
                {
                    let text = format!("{} {}", reason.as_str_name(), refusal.message);
                    self.give_up(track, TransportError::TrackRefused(text.trim().to_owned()));
                }
            }
            response::Message::TrackUnpublished(ended) => {
                if let Some(track) = link.publications.track_of(&ended.track_sid) {
                    tracing::warn!(?track, "the SFU ended a local track");
                    self.give_up(track, TransportError::TrackRefused("the SFU ended it".to_owned()));
                    end_track(link, track).await?;
                }
            }
            response::Message::Leave(leave) => return Err(left_by(&leave)),
            response::Message::SubscriptionResponse(refused) => {
                tracing::warn!(sid = refused.track_sid, error = ?refused.err(), "a track cannot be received");
            }
            // Pings and tokens are the signalling client's business; the rest concerns what this transport
            // does not do.
            _ => {}
        }
        Ok(())
    }

    /// An event of the engine.
    async fn observe(&mut self, link: &mut Link, event: EngineEvent) -> Result<(), End> {
        match event {
            EngineEvent::Candidate(side, candidate_init) => {
                let target = side.target().into();
                let trickle = proto::TrickleRequest { candidate_init, target, r#final: false };
                link.send(request::Message::Trickle(trickle)).await;
            }
            EngineEvent::Up(side) => *link.progress(side) = Progress::Up,
            EngineEvent::Failed(side) => return Err(End::Lost(format!("{side:?} connection failed"))),
            EngineEvent::Track(remote) => self.start_reading(link, remote).await,
        }
        Ok(())
    }

    async fn start_reading(&mut self, link: &mut Link, remote: Arc<dyn TrackRemote>) {
        let id = remote.track_id().await;
        let Some(sid) = link.expected.get(&id).cloned() else {
            tracing::warn!(id, "a track that no offer announced");
            return;
        };
        while link.readers.try_join_next().is_some() {}
        if link.readers.len() >= MOST_READERS {
            tracing::warn!(?sid, "too many tracks; this one is not read");
            return;
        }
        let (incoming, events) = (Arc::clone(&self.shared.incoming), Arc::clone(&self.shared.events));
        link.readers.spawn(incoming::read(remote, sid, incoming, events));
    }

    async fn overdue(&mut self, link: &mut Link) -> Result<(), End> {
        let now = Instant::now();
        for track in link.publications.take_unanswered(now.into_std()) {
            self.give_up(track, TransportError::Timeout(ANSWER_TO_ADD_TRACK, "publishing a track"));
        }
        if link.publications.negotiation_overdue(now.into_std()) {
            return Err(End::Lost("the SFU did not answer an offer".to_owned()));
        }
        for side in [Side::Publisher, Side::Subscriber] {
            if matches!(link.progress(side), Progress::Connecting { deadline } if *deadline <= now) {
                return Err(End::Lost(format!("{side:?} connection did not come up")));
            }
        }
        Ok(())
    }

    /// What follows from whatever just happened: offers, answers to the application, the end of a restoration.
    async fn settle(&mut self, link: &mut Link) -> Result<(), End> {
        if let Some(id) = link.publications.next_offer(Instant::now().into_std()) {
            let sdp = link.engine.offer().await.map_err(lost)?;
            let offer =
                proto::SessionDescription { r#type: "offer".to_owned(), sdp, id, ..Default::default() };
            link.send(request::Message::Offer(offer)).await;
        }
        if link.publisher == Progress::Up {
            let live = self.published.iter_mut().filter(|(track, _)| link.publications.is_live(**track));
            for (track, published) in live {
                if let Some(reply) = published.reply.take() {
                    answer(reply, Ok(*track));
                }
            }
        }
        if self.restoring.is_some() && link.complete() {
            self.restoring = None;
            self.emit(TransportEvent::Reconnected).await?;
        }
        Ok(())
    }

    /// Asks the SFU for a track.
    async fn ask(&mut self, link: &mut Link, track: LocalTrackId) {
        let Some(published) = self.published.get_mut(&track) else { return };
        published.told_muted = published.local.muted();
        let request = add_track_request(published);
        link.publications.ask(Instant::now().into_std(), track, published.cid.clone());
        link.send(request::Message::AddTrack(request)).await;
    }

    async fn granted(&mut self, link: &mut Link, track: LocalTrackId) -> Result<(), End> {
        let Some(published) = self.published.get(&track) else {
            // Unpublished while the SFU thought about it.
            return end_track(link, track).await;
        };
        let sending = link.engine.add_track(published.spec.codec, &published.cid).await.map_err(lost)?;
        let events = Arc::clone(&self.shared.events);
        link.readers.spawn(outgoing::watch_key_frame_requests(sending.clone(), track, events));
        link.sending.insert(track, sending);
        self.tell_muted(link, track).await;
        Ok(())
    }

    /// A track is negotiated: its frames go out from now on.
    async fn attach(&mut self, link: &Link, track: LocalTrackId) -> Result<(), End> {
        if let (Some(published), Some(sending)) = (self.published.get(&track), link.sending.get(&track)) {
            let payload_type = sending.payload_type().await.map_err(lost)?;
            published.local.attach(sending.clone(), payload_type);
        }
        Ok(())
    }

    async fn tell_muted(&mut self, link: &Link, track: LocalTrackId) {
        let Some(published) = self.published.get_mut(&track) else { return };
        let muted = published.local.muted();
        if let Some(sid) = link.publications.sid(track)
            && published.told_muted != muted
        {
            published.told_muted = muted;
            let mute = proto::MuteTrackRequest { sid: sid.to_owned(), muted };
            link.send(request::Message::Mute(mute)).await;
        }
    }

    /// The SFU will not carry a track.
    fn give_up(&mut self, track: LocalTrackId, error: TransportError) {
        self.shared.remove(track);
        if let Some(published) = self.published.remove(&track) {
            published.local.detach();
            match published.reply {
                Some(reply) => answer(reply, Err(error)),
                None => tracing::warn!(?track, %error, "a published track is gone"),
            }
        }
    }

    async fn emit_all(&self, events: Vec<TransportEvent>) -> Result<(), End> {
        for event in events {
            self.emit(event).await?;
        }
        Ok(())
    }

    async fn emit(&self, event: TransportEvent) -> Result<(), End> {
        self.shared.incoming.note(&event);
        if self.shared.events.control(event).await { Ok(()) } else { Err(End::Left(None)) }
    }
}

/// Takes a track off the connection.
async fn end_track(link: &mut Link, track: LocalTrackId) -> Result<(), End> {
    link.publications.remove(track);
    if let Some(sending) = link.sending.remove(&track) {
        link.engine.remove_track(&sending).await.map_err(lost)?;
    }
    Ok(())
}

fn add_track_request(published: &Published) -> proto::AddTrackRequest {
    let Published { spec, encrypted, cid, told_muted, .. } = published;
    let (width, height) = spec.dimensions;
    let encryption = if *encrypted { proto::encryption::Type::Gcm } else { proto::encryption::Type::None };
    let mut request = proto::AddTrackRequest {
        cid: cid.clone(),
        name: spec.name.clone(),
        r#type: proto::TrackType::Audio.into(),
        muted: *told_muted,
        source: match spec.source {
            TrackSource::Camera => proto::TrackSource::Camera,
            TrackSource::Microphone => proto::TrackSource::Microphone,
            TrackSource::ScreenShare => proto::TrackSource::ScreenShare,
            TrackSource::ScreenShareAudio => proto::TrackSource::ScreenShareAudio,
            TrackSource::Unknown => proto::TrackSource::Unknown,
        }
        .into(),
        // Redundancy would pack several sealed frames into one packet.
        disable_red: *encrypted,
        encryption: encryption.into(),
        ..Default::default()
    };
    if !spec.codec.is_audio() {
        let layers = vec![proto::VideoLayer {
            quality: proto::VideoQuality::High.into(),
            width,
            height,
            ..Default::default()
        }];
        request.r#type = proto::TrackType::Video.into();
        (request.width, request.height) = (width, height);
        request.layers = layers.clone();
        request.simulcast_codecs = vec![proto::SimulcastCodec {
            codec: "vp8".to_owned(),
            cid: cid.clone(),
            layers,
            ..Default::default()
        }];
    }
    request
}

/// What the SFU's Leave asks of us.
fn left_by(leave: &proto::LeaveRequest) -> End {
    let reason = format!("the SFU ended the connection: {}", leave.reason().as_str_name());
    match leave.action() {
        proto::leave_request::Action::Disconnect if !leave.can_reconnect => End::Refused(reason),
        _ => End::Lost(reason),
    }
}

fn lost(error: TransportError) -> End {
    End::Lost(describe(&error))
}

/// The error with what caused it.
fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

/// Answers whoever asked, if they still wait.
fn answer<T>(reply: oneshot::Sender<T>, value: T) {
    drop(reply.send(value));
}

async fn at(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use proto::leave_request::Action;

    use super::*;

    #[test]
    fn a_single_video_layer_is_announced_high_and_encrypted_tracks_say_so() {
        let published = Published {
            local: Arc::new(LocalTrack::new(LocalTrackId(1), Codec::Vp8)),
            spec: TrackSpec::camera(640, 360),
            encrypted: true,
            cid: "c".into(),
            told_muted: true,
            reply: None,
        };
        let request = add_track_request(&published);
        assert_eq!(request.layers.len(), 1);
        assert_eq!(request.layers[0].quality(), proto::VideoQuality::High);
        assert_eq!(request.encryption(), proto::encryption::Type::Gcm);
        assert!(request.disable_red && request.muted);
        assert_eq!(request.simulcast_codecs[0].cid, "c");
        let audio = Published { spec: TrackSpec::microphone(), encrypted: false, ..published };
        let request = add_track_request(&audio);
        assert!(request.layers.is_empty() && request.simulcast_codecs.is_empty() && !request.disable_red);
        assert_eq!(request.source(), proto::TrackSource::Microphone);
    }

    #[test]
    fn only_a_final_leave_is_final() {
        let leave = |action: Action, can_reconnect| {
            left_by(&proto::LeaveRequest { action: action.into(), can_reconnect, ..Default::default() })
        };
        assert!(matches!(leave(Action::Disconnect, false), End::Refused(_)));
        assert!(matches!(leave(Action::Disconnect, true), End::Lost(_)), "the form before protocol 13");
        assert!(matches!(leave(Action::Reconnect, false), End::Lost(_)));
        assert!(matches!(leave(Action::Resume, false), End::Lost(_)));
    }
}
