//! One connection to the SFU, from join to loss.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use livekit_protocol::{self as proto, signal_request as request};
use livekit_signaling::{SignalClient, SignalError, SignalEvents};
use tokio::{sync::mpsc, task::JoinSet, time::Instant};

use super::{
    Shared,
    channels::OwnChannels,
    connect::{ConnectOptions, open_signalling},
    net,
    peers::{PeerEvents, Peers, Side},
    publications::Publications,
};
use crate::transport::{
    ConnectStage, LocalTrackId, Subscription, TrackSid, TransportError,
    rtc::{IceServer, engine::OutgoingTrack, local::LocalTrack},
};

/// How long a peer connection may take from its description to the first flow of media.
pub(super) const MEDIA_TIMEOUT: Duration = Duration::from_secs(15);
/// After so long without media, the application is told.
pub(super) const MEDIA_BLOCKED: Duration = Duration::from_secs(10);
/// How long the end of the signalling and of the media may take.
const CLOSE_TIMEOUT: Duration = Duration::from_millis(1500);
/// How long an attempt to resume may take.
const RESUME_TIMEOUT: Duration = Duration::from_secs(10);
/// Sections of either kind that the first offer of v1 has room for.
const SECTIONS: usize = 3;
/// The number of the offer that travels with the request to join.
const FIRST_OFFER: u32 = 1;
/// Messages that may wait for the signalling socket; an SFU that does not read loses us.
const OUTBOX: usize = 512;

/// See the module.
pub(super) struct Link {
    signal: Arc<SignalClient>,
    outbox: mpsc::Sender<Posted>,
    /// A message found the outbox full.
    pub(super) clogged: bool,
    pub(super) signal_events: SignalEvents,
    pub(super) peers: Peers,
    pub(super) peer_events: PeerEvents,
    pub(super) publications: Publications,
    /// The local tracks that the SFU was asked for.
    pub(super) asked: HashMap<LocalTrackId, Asked>,
    /// Whether the publisher was ever offered: it waits until something is to be sent.
    pub(super) offered: bool,
    /// The data channels, until they are served.
    pub(super) channels: Option<OwnChannels>,
    /// Channels that the SFU opened.
    pub(super) their_channels: usize,
    /// Names the last reliable data packet that the SFU got before an interruption.
    pub(super) data_resumed: mpsc::Sender<u32>,
    data_resumptions: Option<mpsc::Receiver<u32>>,
    /// What the application was told to send, in bits per second.
    pub(super) targets: HashMap<LocalTrackId, u64>,
    /// Whether blocked media were reported.
    pub(super) blocked: bool,
    /// What the SFU was told about remote tracks, where it differs from the default.
    pub(super) told: HashMap<TrackSid, Subscription>,
    /// Which track comes under which MediaStreamTrack id, by the last offer.
    pub(super) expected: HashMap<String, TrackSid>,
    /// Sections that the SFU asked for.
    pub(super) sections: usize,
    /// The steps of connecting that are reported.
    pub(super) stages: HashSet<ConnectStage>,
    /// Readers and writers of tracks, and the writer of the signalling.
    pub(super) tasks: JoinSet<()>,
    publisher: Progress,
    subscriber: Progress,
    pub(super) exchange: Exchange,
    /// From a resumption until media flow again; the signalling client holds most requests back meanwhile.
    pub(super) resuming: bool,
}

/// The last descriptions of the peer connection that receives: an SFU that resumes us on another node asks for them.
#[derive(Default)]
pub(super) struct Exchange {
    pub(super) offer: Option<proto::SessionDescription>,
    pub(super) answer: Option<proto::SessionDescription>,
}

/// An open signalling connection.
type Signalling = (SignalClient, proto::JoinResponse, SignalEvents);

/// What came of an attempt with signalling v1.
enum Opened {
    Link(Box<(Link, proto::JoinResponse)>),
    /// The server has only v0.
    V0(Box<Signalling>),
}

/// Why an attempt to resume failed.
pub(super) enum ResumeError {
    Signal(SignalError),
    Media(TransportError),
}

/// A local track on this connection.
pub(super) struct Asked {
    pub(super) local: Arc<LocalTrack>,
    pub(super) told_muted: bool,
    /// The SFU's description, once it granted the track.
    pub(super) info: Option<proto::TrackInfo>,
    /// Set once the SFU granted the track.
    pub(super) outgoing: Option<OutgoingTrack>,
}

/// How far a peer connection is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Progress {
    Unused,
    Connecting { since: Instant },
    Up,
}

impl Progress {
    fn connecting() -> Self {
        Self::Connecting { since: Instant::now() }
    }

    /// Whether it connects for at least this long.
    pub(super) fn is_late(self, now: Instant, after: Duration) -> bool {
        matches!(self, Self::Connecting { since } if now >= since + after)
    }
}

impl Link {
    /// Joins with `token` and opens the peer connections.
    pub(super) async fn open(
        options: &ConnectOptions,
        token: &str,
    ) -> Result<(Self, proto::JoinResponse), TransportError> {
        if options.single_peer_connection {
            let (peers, peer_events) = Peers::one(options).await?;
            match Self::open_v1(options, token, peers, peer_events).await? {
                Opened::Link(opened) => return Ok(*opened),
                Opened::V0(signalling) => return Self::open_v0(options, *signalling).await,
            }
        }
        Self::open_v0(options, open_signalling(options, token, None).await?).await
    }

    /// Signalling v1: our first offer travels with the request to join.
    async fn open_v1(
        options: &ConnectOptions,
        token: &str,
        peers: Peers,
        peer_events: PeerEvents,
    ) -> Result<Opened, TransportError> {
        let offering = async {
            let channels = OwnChannels::open(&peers.publisher).await?;
            for _ in 0..SECTIONS {
                peers.publisher.add_receiving_section(true).await?;
                peers.publisher.add_receiving_section(false).await?;
            }
            Ok((channels, peers.publisher.create_offer().await?))
        };
        let joining = async {
            let (channels, offer) = offering.await?;
            let description = description("offer", offer.sdp().to_owned(), FIRST_OFFER);
            let joined = open_signalling(options, token, Some(description.clone())).await?;
            Ok::<_, TransportError>((channels, offer, description, joined))
        };
        let (channels, offer, description, (signal, join, signal_events)) = match joining.await {
            Ok(joined) => joined,
            Err(error) => {
                peers.close().await;
                return Err(error);
            }
        };
        if !signal.is_single_pc_mode_active() {
            peers.close().await;
            return Ok(Opened::V0(Box::new((signal, join, signal_events))));
        }
        let applying = async {
            peers.set_ice_servers(options, &ice_servers(options, &join.ice_servers)).await?;
            peers.publisher.apply_offer(offer).await
        };
        if let Err(error) = applying.await {
            leave(&signal).await;
            peers.close().await;
            return Err(error);
        }
        let mut link = Self::new(signal, signal_events, peers, peer_events, channels);
        link.publications.offered_on_joining(Instant::now().into_std());
        link.offered = true;
        link.exchange.offer = Some(description);
        link.expect_media(Side::Publisher);
        Ok(Opened::Link(Box::new((link, join))))
    }

    /// Signalling v0: two peer connections.
    async fn open_v0(
        options: &ConnectOptions,
        (signal, join, signal_events): Signalling,
    ) -> Result<(Self, proto::JoinResponse), TransportError> {
        let opening = async {
            let (peers, peer_events) = Peers::two(options, ice_servers(options, &join.ice_servers)).await?;
            let channels = OwnChannels::open(&peers.publisher).await?;
            Ok::<_, TransportError>((peers, peer_events, channels))
        };
        let (peers, peer_events, channels) = match opening.await {
            Ok(opened) => opened,
            Err(error) => {
                leave(&signal).await;
                return Err(error);
            }
        };
        let mut link = Self::new(signal, signal_events, peers, peer_events, channels);
        if join.subscriber_primary {
            link.expect_media(Side::Subscriber);
        }
        if join.fast_publish {
            link.publications.require_offer();
        }
        Ok((link, join))
    }

    fn new(
        signal: SignalClient,
        signal_events: SignalEvents,
        peers: Peers,
        peer_events: PeerEvents,
        channels: OwnChannels,
    ) -> Self {
        let (data_resumed, data_resumptions) = mpsc::channel(1);
        let signal = Arc::new(signal);
        let mut tasks = JoinSet::new();
        let (outbox, messages) = mpsc::channel(OUTBOX);
        tasks.spawn(post(Arc::clone(&signal), messages));
        Self {
            signal,
            outbox,
            clogged: false,
            signal_events,
            peers,
            peer_events,
            publications: Publications::default(),
            asked: HashMap::new(),
            offered: false,
            channels: Some(channels),
            their_channels: 0,
            data_resumed,
            data_resumptions: Some(data_resumptions),
            targets: HashMap::new(),
            blocked: false,
            told: HashMap::new(),
            expected: HashMap::new(),
            sections: 0,
            stages: HashSet::new(),
            tasks,
            publisher: Progress::Unused,
            subscriber: Progress::Unused,
            exchange: Exchange::default(),
            resuming: false,
        }
    }

    /// Sends a message to the SFU, without waiting for the socket.
    pub(super) fn send(&mut self, message: request::Message) {
        if self.outbox.try_send(Posted::Message(Box::new(message))).is_err() {
            self.clogged = true;
        }
    }

    /// The newest token: the SFU refreshes it, so that an old one does not end a long call.
    pub(super) fn token(&self) -> String {
        self.signal.token()
    }

    pub(super) fn progress(&mut self, side: Side) -> &mut Progress {
        match side {
            Side::Publisher => &mut self.publisher,
            Side::Subscriber => &mut self.subscriber,
        }
    }

    /// Expects media on `side` from now on, if it is not up or awaited yet.
    pub(super) fn expect_media(&mut self, side: Side) {
        let progress = self.progress(side);
        if *progress == Progress::Unused {
            *progress = Progress::connecting();
        }
    }

    /// The earliest time at which something is overdue.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let media = [self.publisher, self.subscriber].into_iter().filter_map(|progress| match progress {
            Progress::Connecting { since } => {
                Some(since + if self.blocked { MEDIA_TIMEOUT } else { MEDIA_BLOCKED })
            }
            _ => None,
        });
        media.chain(self.publications.deadline().map(Instant::from_std)).min()
    }

    /// Whether everything that should flow flows.
    pub(super) fn complete(&self) -> bool {
        let flowing = |progress| !matches!(progress, Progress::Connecting { .. });
        self.publications.settled() && flowing(self.publisher) && flowing(self.subscriber)
    }

    /// Reopens the signalling of this session after an interruption, and restarts ICE.
    pub(super) async fn resume(
        &mut self,
        options: &ConnectOptions,
        reason: proto::ReconnectReason,
        state: proto::SyncState,
    ) -> Result<(), ResumeError> {
        let reopening = async {
            self.signal.close().await;
            // What the old connection said last must not be taken for news of the new one.
            while self.signal_events.try_recv().is_ok() {}
            net::with(options.dial(), self.signal.restart(reason)).await
        };
        let response = tokio::time::timeout(RESUME_TIMEOUT, reopening)
            .await
            .map_err(|_| ResumeError::Signal(SignalError::Timeout("no answer to the resumption".to_owned())))?
            .map_err(ResumeError::Signal)?;
        self.resuming = true;
        self.send(request::Message::SyncState(state));
        // There is room: it holds one, and only resumptions put something in.
        let _ = self.data_resumed.try_send(response.last_message_seq);
        let restarting = async {
            self.peers.set_ice_servers(options, &ice_servers(options, &response.ice_servers)).await?;
            if self.offered {
                self.peers.publisher.restart_ice().await?;
            }
            Ok(())
        };
        restarting.await.map_err(ResumeError::Media)?;
        if self.offered {
            self.publications.require_offer();
            self.publisher = Progress::connecting();
        }
        // In v0 the SFU offers new credentials for the subscriber.
        if self.subscriber != Progress::Unused {
            self.subscriber = Progress::connecting();
        }
        Ok(())
    }

    /// Media flow again after a resumption: requests that were held back go out.
    pub(super) fn resumed(&mut self) {
        self.resuming = false;
        if self.outbox.try_send(Posted::Resumed).is_err() {
            self.clogged = true;
        }
    }

    /// Takes a track off the connection; the next offer tells the SFU.
    pub(super) async fn end_track(&mut self, track: LocalTrackId) -> Result<(), TransportError> {
        self.publications.remove(track);
        self.targets.remove(&track);
        match self.asked.remove(&track).and_then(|asked| asked.outgoing) {
            Some(outgoing) => self.peers.publisher.remove_track(&outgoing).await,
            None => Ok(()),
        }
    }

    /// Serves our data channels from now on.
    pub(super) fn serve_channels(&mut self, shared: &Arc<Shared>) {
        if let (Some(channels), Some(resumed)) = (self.channels.take(), self.data_resumptions.take()) {
            self.tasks.spawn(channels.serve(Arc::clone(shared), resumed));
        }
    }

    /// Ends it; politely if the SFU still listens.
    pub(super) async fn close(mut self, politely: bool) {
        for asked in self.asked.values() {
            asked.local.detach();
        }
        let signal = async {
            if politely {
                leave(&self.signal).await;
            } else {
                self.signal.close().await;
            }
        };
        let closing = async {
            tokio::join!(signal, self.peers.close());
        };
        if tokio::time::timeout(CLOSE_TIMEOUT, closing).await.is_err() {
            tracing::debug!("a connection did not close in time");
        }
        self.tasks.shutdown().await;
    }
}

/// What the outbox holds.
enum Posted {
    Message(Box<request::Message>),
    /// A resumption is complete: what was held back is released.
    Resumed,
}

/// Sends the messages of the outbox, in a task of its own, as the socket may be stuck.
async fn post(signal: Arc<SignalClient>, mut messages: mpsc::Receiver<Posted>) {
    while let Some(posted) = messages.recv().await {
        match posted {
            Posted::Message(message) => signal.send(*message).await,
            Posted::Resumed => signal.set_reconnected().await,
        }
    }
}

/// The ICE servers of the application and of the SFU.
fn ice_servers(options: &ConnectOptions, theirs: &[proto::IceServer]) -> Vec<IceServer> {
    options.ice_servers.iter().cloned().chain(theirs.iter().cloned().map(IceServer::from)).collect()
}

pub(super) fn description(kind: &str, sdp: String, id: u32) -> proto::SessionDescription {
    proto::SessionDescription { r#type: kind.to_owned(), sdp, id, ..Default::default() }
}

/// Says goodbye and closes the signalling.
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
