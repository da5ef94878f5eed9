//! The task that owns a mesh connection.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{Arc, PoisonError},
    time::Duration,
};

use tokio::{
    sync::mpsc,
    task::{AbortHandle, JoinSet},
    time::Instant,
};

use super::{
    MeshOptions, Shared,
    candidates::{Admission, Gathered, Policy},
    channels::{self, Channels, MOST_CHANNELS, Theirs},
    metadata::{self, Described, MOST_STREAMS},
    sections::{MOST_SECTIONS, Receiving, Sending, Sent, Wish, view},
};
use crate::{
    identity::ParticipantIdentity,
    media::Codec,
    transport::{
        ConnectStage, DataPacket, TrackSid, TransportError, TransportEvent,
        mesh::{Candidate, Negotiate, Negotiated, Sdp, Streams},
        rtc::{
            bitrate,
            engine::{EVENTS, IncomingTrack, Peer, PeerEvent},
            local::{self, LocalTrack, Selected},
            remote,
            sections::{self, SectionView},
        },
    },
};

/// How long a description waits for candidates.
const GATHERING: Duration = Duration::from_millis(200);
/// After so long without media, the application is told.
const MEDIA_BLOCKED: Duration = Duration::from_secs(10);
/// How often the estimate of the uplink is looked at.
const ESTIMATES: Duration = Duration::from_secs(1);
/// What an uplink carries until its estimate says otherwise, in bits per second.
const FIRST_ESTIMATE: u64 = 1_000_000;
/// How long video is paused until the application learns that the uplink is short.
const SHORT: Duration = Duration::from_secs(5);
/// Candidate pairs in a report of blocked media.
const MOST_PAIRS: usize = 16;
/// The largest description that is read, in bytes.
const LARGEST_SDP: usize = 512 * 1024;
/// Offers in a row that are asked for without an offer bringing what was missing.
const MOST_TRIES: u8 = 4;

/// See the module.
pub(super) struct Session {
    policy: Policy,
    identity: ParticipantIdentity,
    shared: Arc<Shared>,
    peer: Peer,
    peer_events: mpsc::Receiver<((), PeerEvent)>,
    commands: mpsc::Receiver<Negotiate>,
    /// Packets to send, until the channels are served.
    outbound: Option<mpsc::Receiver<DataPacket>>,
    their_channels: Theirs,
    role: Option<Role>,
    /// In which our tracks are sent.
    sending: Vec<Sending>,
    /// In which the other side may send, as the caller.
    receiving: Vec<Receiving>,
    /// The ids of all sections of the other side's offers.
    known: HashSet<String>,
    /// The other side's latest description and streams; `None`: it never described any.
    their_sections: Vec<SectionView>,
    their_streams: Option<Streams>,
    /// The remote tracks that the application knows.
    tracks: BTreeMap<TrackSid, Described>,
    /// The remote tracks that the engine has, by the track half of their msid.
    incoming: HashMap<String, Incoming>,
    gathered: Gathered,
    /// The user name fragment of the other side's latest offer: a new one restarts ICE.
    their_credentials: Option<String>,
    their_candidates: Admission,
    /// The id of the first section of our latest description.
    first_mid: Option<String>,
    /// A description that waits for candidates.
    description: Option<Description>,
    /// Our streams as the other side knows them, from the first description on.
    told: Option<Streams>,
    /// What the latest [`Negotiated::Needed`] was for, and how many there were in a row.
    wished: Wish,
    tries: u8,
    /// An offer of ours has no answer yet.
    unanswered: bool,
    progress: Progress,
    stages: HashSet<ConnectStage>,
    blocked: bool,
    short: bool,
    failed: bool,
    tasks: JoinSet<()>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    /// It alone offers.
    Caller,
    Callee,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    /// Descriptions are not exchanged yet.
    New,
    Connecting {
        since: Instant,
    },
    Up,
    Interrupted,
}

struct Description {
    kind: Role,
    sdp: String,
    deadline: Instant,
}

/// A remote track and its reader.
struct Incoming {
    track: IncomingTrack,
    /// What it is read for.
    sid: Option<TrackSid>,
    reader: AbortHandle,
}

/// The application has closed the connection, or nobody reads its events.
struct Left;

impl From<Left> for Stop {
    fn from(_: Left) -> Self {
        Self::Left
    }
}

/// Why a step ended early.
enum Stop {
    Left,
    /// A new connection is needed.
    Failed(String),
}

impl From<TransportError> for Stop {
    fn from(error: TransportError) -> Self {
        let mut text = error.to_string();
        let mut source = std::error::Error::source(&error);
        while let Some(cause) = source {
            text = format!("{text}: {cause}");
            source = cause.source();
        }
        Self::Failed(text)
    }
}

impl Session {
    pub(super) async fn open(
        options: MeshOptions,
        identity: ParticipantIdentity,
        shared: Arc<Shared>,
        commands: mpsc::Receiver<Negotiate>,
        outbound: mpsc::Receiver<DataPacket>,
    ) -> Result<Self, TransportError> {
        let (events, peer_events) = mpsc::channel(EVENTS);
        let peer = Peer::open(&options.network(), options.ice_servers.clone(), (), events).await?;
        Ok(Self {
            policy: Policy { relay_only: options.relay_only, host: options.host_candidates },
            identity,
            shared,
            peer,
            peer_events,
            commands,
            outbound: Some(outbound),
            their_channels: Theirs::default(),
            role: None,
            sending: Vec::new(),
            receiving: Vec::new(),
            known: HashSet::new(),
            their_sections: Vec::new(),
            their_streams: None,
            tracks: BTreeMap::new(),
            incoming: HashMap::new(),
            gathered: Gathered::default(),
            their_credentials: None,
            their_candidates: Admission::new(options.addresses),
            first_mid: None,
            description: None,
            told: None,
            wished: Wish::default(),
            tries: 0,
            unanswered: false,
            progress: Progress::New,
            stages: HashSet::new(),
            blocked: false,
            short: false,
            failed: false,
            tasks: JoinSet::new(),
        })
    }

    /// Runs until the connection is closed.
    pub(super) async fn run(mut self) {
        let mut estimates = tokio::time::interval(ESTIMATES);
        estimates.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        while !self.shared.desired.is_closed() {
            let deadline = self.deadline();
            let step = tokio::select! {
                command = self.commands.recv() => match command {
                    Some(command) => self.obey(command).await,
                    None => Err(Stop::Left),
                },
                event = self.peer_events.recv() => match event {
                    Some(((), event)) => self.observe(event).await,
                    None => Err(Stop::Failed("the media engine stopped".to_owned())),
                },
                () = self.shared.desired.changed() => {
                    self.tries = 0;
                    self.settle().await
                }
                () = at(deadline) => self.overdue().await,
                _ = estimates.tick() => self.estimate().await,
                () = self.shared.events.abandoned() => Err(Stop::Left),
            };
            let step = match step {
                Ok(()) if self.peer.overflowed() => {
                    Err(Stop::Failed("the media engine's events were lost".to_owned()))
                }
                step => step,
            };
            match step {
                Ok(()) => {}
                Err(Stop::Left) => break,
                Err(Stop::Failed(cause)) => {
                    if self.fail(cause).await.is_err() {
                        break;
                    }
                }
            }
        }
        for sending in &mut self.sending {
            sending.clear();
        }
        self.peer.close().await;
        self.tasks.shutdown().await;
        self.shared.end();
    }

    /// Reports that a new connection is needed, once; signalling closes this one.
    async fn fail(&mut self, cause: String) -> Result<(), Left> {
        if std::mem::replace(&mut self.failed, true) {
            return Ok(());
        }
        tracing::info!(cause, "a mesh connection failed");
        self.description = None;
        self.tell(Negotiated::Failed(cause)).await
    }

    async fn emit(&self, event: TransportEvent) -> Result<(), Left> {
        if self.shared.events.send(event).await { Ok(()) } else { Err(Left) }
    }

    async fn tell(&self, negotiated: Negotiated) -> Result<(), Left> {
        self.emit(TransportEvent::Negotiated(negotiated)).await
    }

    async fn obey(&mut self, command: Negotiate) -> Result<(), Stop> {
        if self.failed {
            return Ok(());
        }
        tracing::debug!(?command, "mesh negotiation");
        match command {
            Negotiate::Offer { restart_ice } => self.offer(restart_ice).await,
            Negotiate::Answer { sdp, streams } => self.answer(sdp, streams).await,
            Negotiate::TakeAnswer { sdp, streams } => self.take_answer(sdp, streams).await,
            Negotiate::Candidates(candidates) => {
                for candidate in candidates {
                    let value = candidate.candidate.trim_start_matches("candidate:");
                    if (value.is_empty() || self.their_candidates.admits(value))
                        && let Ok(json) = serde_json::to_string(&candidate)
                    {
                        self.peer.add_candidate(&json).await;
                    }
                }
                Ok(())
            }
            Negotiate::Streams(streams) => {
                self.tries = 0;
                self.take_streams(streams);
                self.update_tracks().await?;
                self.settle().await
            }
        }
    }

    /// This side is `role` for good.
    fn play(&mut self, role: Role) -> Result<bool, Stop> {
        let first = self.role.is_none();
        if *self.role.get_or_insert(role) == role {
            Ok(first)
        } else {
            Err(Stop::Failed("the roles of a connection don't change".to_owned()))
        }
    }

    async fn offer(&mut self, restart_ice: bool) -> Result<(), Stop> {
        let first = self.play(Role::Caller)?;
        let mut wanted = [0; 2];
        if first {
            let channels = Channels::open(&self.peer).await?;
            if let Some(queue) = self.outbound.take() {
                let (shared, identity) = (Arc::clone(&self.shared), self.identity.clone());
                self.tasks.spawn(channels.serve(shared, identity, queue));
            }
            wanted = [1, 1];
        } else if restart_ice {
            self.restart_gathering();
            self.peer.restart_ice().await?;
        }
        self.drop_ended();
        for local in self.unsent() {
            let free = self.sending.iter_mut().find(|sending| sending.is_free_for(local.spec.codec));
            if let Some(sending) = free {
                sending.track = Some(Sent::new(local, FIRST_ESTIMATE));
            } else {
                let codec = local.spec.codec;
                let sending = Sending::open(&self.peer, codec, Some(local), FIRST_ESTIMATE, false).await?;
                self.sending.push(sending);
            }
        }
        for sending in &self.sending {
            sending.outgoing.assign(sending.stream(), false).await?;
        }
        let missing = metadata::missing(&self.their_sections, self.their_streams.as_ref());
        for (kind, audio) in [true, false].into_iter().enumerate() {
            let free = |section: &&Receiving| section.audio == audio && !section.used && !section.refused;
            let free = self.receiving.iter().filter(free).count();
            wanted[kind] = missing[kind].saturating_sub(free).max(wanted[kind]);
            for _ in 0..wanted[kind] {
                self.peer.add_receiving_section(audio).await?;
            }
        }
        let sdp = self.peer.offer().await?;
        let views = sections::views(&sdp);
        check_sections(&views)?;
        for view in views.iter().filter(|view| view.receives && !view.sends) {
            if !self.receiving.iter().any(|section| section.mid == view.mid) {
                let (mid, audio) = (view.mid.clone(), view.audio);
                self.receiving.push(Receiving { mid, audio, used: false, refused: false });
            }
        }
        self.find_mids().await?;
        self.unanswered = true;
        self.describe(Role::Caller, sdp).await
    }

    async fn answer(&mut self, sdp: Sdp, streams: Streams) -> Result<(), Stop> {
        self.play(Role::Callee)?;
        let Sdp(offer) = check_size(sdp)?;
        self.their_candidates.reset();
        let offer = self.their_candidates.description(&offer);
        let views = sections::views(&offer);
        check_sections(&views)?;
        let new = views.iter().filter(|view| !self.known.contains(&view.mid)).count();
        if self.known.len() + new > MOST_SECTIONS {
            return Err(Stop::Failed(format!("more than {MOST_SECTIONS} sections")));
        }
        let credentials = sections::ice_ufrag(&offer).map(str::to_owned);
        if self.their_credentials.is_some() && self.their_credentials != credentials {
            self.restart_gathering();
        }
        self.their_credentials = credentials;
        self.drop_ended();
        let mut unsent = self.unsent();
        // Sections that are known and free come first.
        for sending in self.sending.iter_mut().filter(|sending| sending.track.is_none()) {
            let usable = view(&views, sending.mid.as_deref()).is_some_and(|view| view.receives);
            let fitting = unsent.iter().position(|local| sending.is_free_for(local.spec.codec));
            if let Some(index) = fitting.filter(|_| usable) {
                sending.track = Some(Sent::new(unsent.remove(index), FIRST_ESTIMATE));
            }
        }
        // Every new one in which we may send gets a sender, perhaps for a track to come: the engine can't add it later.
        // It would fail at a section with a sender and without a codec.
        let is_new = |view: &&SectionView| view.receives && view.usable && !self.known.contains(&view.mid);
        for view in views.iter().filter(is_new) {
            let fitting = unsent.iter().position(|local| local.spec.codec.is_audio() == view.audio);
            let local = fitting.map(|index| unsent.remove(index));
            let usual = if view.audio { Codec::Opus } else { Codec::Vp8 };
            let codec = local.as_ref().map_or(usual, |local| local.spec.codec);
            self.sending.push(Sending::open(&self.peer, codec, local, FIRST_ESTIMATE, true).await?);
        }
        let known = &self.known;
        self.peer.take_mutual_offer(&offer, |mid| known.contains(mid)).await?;
        self.known.extend(views.iter().map(|view| view.mid.clone()));
        self.find_mids().await?;
        for sending in &mut self.sending {
            let Some(view) = view(&views, sending.mid.as_deref()) else { continue };
            if !view.receives {
                // The track waits for another section.
                sending.clear();
            }
            sending.outgoing.assign(sending.stream(), view.sends).await?;
            if let Some(track) = &mut sending.track {
                track.negotiated = true;
            }
        }
        let answer = self.peer.answer(&offer).await?;
        self.connecting();
        self.their_sections = views;
        self.take_streams(streams);
        self.update_tracks().await?;
        self.describe(Role::Callee, answer).await
    }

    async fn take_answer(&mut self, sdp: Sdp, streams: Streams) -> Result<(), Stop> {
        if self.role != Some(Role::Caller) || !self.unanswered {
            tracing::debug!("an answer without an offer");
            return Ok(());
        }
        let Sdp(answer) = check_size(sdp)?;
        self.their_candidates.reset();
        let answer = self.their_candidates.description(&answer);
        self.peer.take_answer(&answer).await?;
        self.unanswered = false;
        self.connecting();
        self.their_sections = sections::views(&answer);
        self.take_streams(streams);
        let missing = metadata::missing(&self.their_sections, self.their_streams.as_ref());
        for section in &mut self.receiving {
            let taken = view(&self.their_sections, Some(&section.mid)).is_some_and(|view| view.sends);
            section.refused = !taken && (section.refused || missing[usize::from(!section.audio)] > 0);
            section.used = taken;
        }
        let mut refused = Vec::new();
        for sending in &mut self.sending {
            let received =
                view(&self.their_sections, sending.mid.as_deref()).is_some_and(|view| view.receives);
            if let Some(track) = &mut sending.track {
                track.negotiated = true;
                if !received {
                    refused.push(Arc::clone(&track.local));
                }
            }
        }
        for local in refused {
            self.give_up(&local, TransportError::TrackRefused("the member does not take it".to_owned()))
                .await?;
        }
        self.update_tracks().await?;
        self.settle().await
    }

    /// Keeps a description of ours until candidates are found.
    async fn describe(&mut self, kind: Role, sdp: String) -> Result<(), Stop> {
        self.first_mid = sections::first_mid(&sdp).map(str::to_owned);
        self.description = Some(Description { kind, sdp, deadline: Instant::now() + GATHERING });
        if self.gathered.complete { self.send_description().await } else { Ok(()) }
    }

    async fn send_description(&mut self) -> Result<(), Stop> {
        let Some(Description { kind, sdp, .. }) = self.description.take() else { return Ok(()) };
        self.gathered.told = self.gathered.found.len();
        let sdp = Sdp(sections::with_candidates(&sdp, &self.gathered.found, self.gathered.complete));
        let streams = self.our_streams();
        self.told = Some(streams.clone());
        self.tell(match kind {
            Role::Caller => Negotiated::Offer { sdp, streams },
            Role::Callee => Negotiated::Answer { sdp, streams },
        })
        .await?;
        self.tell_candidates().await?;
        self.settle().await
    }

    /// Tells the candidates that were found since the description.
    async fn tell_candidates(&mut self) -> Result<(), Stop> {
        if self.description.is_some() || self.told.is_none() {
            return Ok(());
        }
        let news = self.gathered.news();
        if !news.is_empty() {
            let candidate = |candidate| Candidate { candidate, mid: self.first_mid.clone(), index: Some(0) };
            self.tell(Negotiated::Candidates(news.into_iter().map(candidate).collect())).await?;
        }
        if self.gathered.complete && !std::mem::replace(&mut self.gathered.told_end, true) {
            self.tell(Negotiated::CandidatesEnd).await?;
        }
        Ok(())
    }

    /// Candidates are told anew. Those that are known stay: the engine keeps its sockets.
    fn restart_gathering(&mut self) {
        let found = std::mem::take(&mut self.gathered.found);
        self.gathered = Gathered { found, ..Gathered::default() };
        self.their_candidates.reset();
    }

    async fn find_mids(&mut self) -> Result<(), Stop> {
        for sending in self.sending.iter_mut().filter(|sending| sending.mid.is_none()) {
            sending.mid = sending.outgoing.mid().await?;
        }
        Ok(())
    }

    fn connecting(&mut self) {
        if self.progress == Progress::New {
            self.progress = Progress::Connecting { since: Instant::now() };
        }
    }

    fn take_streams(&mut self, streams: Streams) {
        if self.their_streams.is_some() || !streams.is_empty() {
            self.their_streams = Some(streams.into_iter().take(MOST_STREAMS).collect());
        }
    }

    /// The local tracks that have no section.
    fn unsent(&self) -> Vec<Arc<LocalTrack>> {
        let sent = |local: &Arc<LocalTrack>| {
            let of = |sending: &Sending| sending.track.as_ref().map(|track| Arc::clone(&track.local));
            self.sending.iter().filter_map(of).any(|sent| Arc::ptr_eq(&sent, local))
        };
        self.shared.desired.tracks().into_values().filter(|local| !sent(local)).collect()
    }

    /// Whether the application has taken a track back.
    fn is_over(&self, local: &Arc<LocalTrack>) -> bool {
        !self.shared.desired.track(local.id).is_some_and(|present| Arc::ptr_eq(&present, local))
    }

    /// Frees the sections of tracks that ended.
    fn drop_ended(&mut self) {
        for index in 0..self.sending.len() {
            let over = |session: &Self| {
                let track = session.sending.get(index).and_then(|sending| sending.track.as_ref());
                track.is_some_and(|track| session.is_over(&track.local))
            };
            if over(self)
                && let Some(sending) = self.sending.get_mut(index)
            {
                sending.clear();
            }
        }
    }

    fn our_streams(&self) -> Streams {
        let tracks = self.shared.desired.tracks();
        tracks.values().map(|local| (local.cid.clone(), metadata::of_local(local))).collect()
    }

    fn wish(&self) -> Wish {
        let is_over = |sending: &&Sending| {
            sending.track.as_ref().is_some_and(|track| track.negotiated && self.is_over(&track.local))
        };
        Wish {
            unsent: self.unsent().iter().map(|local| local.id).collect(),
            ended: self.sending.iter().filter(is_over).count(),
            // The callee can't offer, and has said all that it has.
            missing: if self.role == Some(Role::Caller) {
                metadata::missing(&self.their_sections, self.their_streams.as_ref())
            } else {
                [0, 0]
            },
            refused: self.receiving.iter().filter(|section| section.refused).count(),
        }
    }

    /// Brings the connection in line with what the application wants.
    async fn settle(&mut self) -> Result<(), Stop> {
        if self.failed {
            return Ok(());
        }
        self.attach_tracks().await?;
        if self.told.is_none() || self.description.is_some() {
            return Ok(());
        }
        let streams = self.our_streams();
        if !self.unanswered {
            let wish = self.wish();
            if wish.is_empty() {
                self.tries = 0;
                self.wished = wish;
            } else if wish != self.wished && self.tries < MOST_TRIES {
                self.tries += 1;
                self.wished = wish;
                self.told = Some(streams.clone());
                self.tell(Negotiated::Needed { streams }).await?;
                return Ok(());
            }
        }
        let known = |told: &Streams| streams.keys().eq(told.keys());
        if self.told.as_ref().is_some_and(|told| known(told) && *told != streams) {
            self.told = Some(streams.clone());
            self.tell(Negotiated::Streams(streams)).await?;
        }
        Ok(())
    }

    /// Lets the frames of negotiated tracks out, once media can flow.
    async fn attach_tracks(&mut self) -> Result<(), Stop> {
        if !matches!(self.progress, Progress::Up | Progress::Interrupted) {
            return Ok(());
        }
        let mut refused = Vec::new();
        for sending in &mut self.sending {
            let Some(track) =
                sending.track.as_mut().filter(|track| track.negotiated && track.tasks.is_empty())
            else {
                continue;
            };
            let outgoing = sending.outgoing.clone();
            if let Err(error) = outgoing.negotiated().await {
                refused.push((Arc::clone(&track.local), error));
                continue;
            }
            let local = Arc::clone(&track.local);
            let events = || Arc::clone(&self.shared.events);
            let layers = Arc::clone(&track.layers);
            let current = move |_| layers.lock().unwrap_or_else(PoisonError::into_inner).current();
            let watching = local::watch_reports(outgoing.clone(), local.id, events(), current);
            let (layers, audio) = (Arc::clone(&track.layers), local.spec.codec.is_audio());
            let select = move |now, frame: &crate::transport::WireFrame| {
                if audio {
                    return Selected::Send(0);
                }
                let mut layers = layers.lock().unwrap_or_else(PoisonError::into_inner);
                layers.select(now, frame.layer, frame.key_frame)
            };
            let frames = local.attach();
            let writing = local::write(Arc::clone(&local), frames, outgoing, events(), select);
            track.tasks = vec![self.tasks.spawn(watching), self.tasks.spawn(writing)];
            local.answer(Ok(()));
        }
        for (local, error) in refused {
            self.give_up(&local, error).await?;
        }
        Ok(())
    }

    /// The other side does not take a track.
    async fn give_up(&mut self, local: &Arc<LocalTrack>, error: TransportError) -> Result<(), Left> {
        self.shared.desired.unpublish(local);
        self.drop_ended();
        let reason = error.to_string();
        if !local.answer(Err(error)) {
            tracing::warn!(track = ?local.id, reason, "a local track ended");
            self.emit(TransportEvent::LocalTrackEnded { track: local.id, reason }).await?;
        }
        Ok(())
    }

    /// Reports what changed about the other side's tracks, and reads them under their names.
    async fn update_tracks(&mut self) -> Result<(), Stop> {
        let present = metadata::tracks(&self.their_sections, self.their_streams.as_ref());
        let before = std::mem::replace(&mut self.tracks, present);
        for sid in before.keys().filter(|sid| !self.tracks.contains_key(sid)) {
            self.shared.remote.attach(sid, None);
            let (identity, sid) = (self.identity.clone(), sid.clone());
            self.emit(TransportEvent::TrackEnded { identity, sid }).await?;
        }
        self.shared.remote.retain(|sid| self.tracks.contains_key(sid));
        for (sid, described) in &self.tracks {
            if before.get(sid).is_none_or(|before| before.track != described.track) {
                let (identity, track) = (self.identity.clone(), described.track.clone());
                self.emit(TransportEvent::TrackUpdated { identity, track }).await?;
            }
        }
        let ids: Vec<_> = self.incoming.keys().cloned().collect();
        for id in ids {
            if let Some(Incoming { track, sid, reader }) = self.incoming.remove(&id) {
                if self.sid_of(&id) == sid {
                    self.incoming.insert(id, Incoming { track, sid, reader });
                } else {
                    reader.abort();
                    self.read(id, track);
                }
            }
        }
        Ok(())
    }

    fn sid_of(&self, id: &str) -> Option<TrackSid> {
        self.tracks.iter().find(|(_, described)| described.id == id).map(|(sid, _)| sid.clone())
    }

    /// Reads a track that arrives under this id. One that has no name yet is read too, so that its queue stays short.
    fn read(&mut self, id: String, track: IncomingTrack) {
        while self.tasks.try_join_next().is_some() {}
        let sid = self.sid_of(&id);
        let shared = sid.as_ref().and_then(|sid| self.shared.remote.track(sid)).unwrap_or_default();
        let reader = self.tasks.spawn(remote::read(track.clone(), shared));
        self.incoming.insert(id, Incoming { track, sid, reader });
    }

    /// An event of the engine.
    async fn observe(&mut self, event: PeerEvent) -> Result<(), Stop> {
        match event {
            PeerEvent::Candidate(json) => {
                let candidate = serde_json::from_str::<Candidate>(&json).ok();
                if let Some(told) = candidate.and_then(|found| self.policy.reveal(&found.candidate)) {
                    self.gathered.add(told);
                    self.tell_candidates().await?;
                }
            }
            PeerEvent::Gathered => {
                self.gathered.complete = true;
                self.send_description().await?;
                self.tell_candidates().await?;
            }
            PeerEvent::IceConnected => self.reached(ConnectStage::IceConnected).await?,
            PeerEvent::Up => {
                self.reached(ConnectStage::MediaUp).await?;
                if self.progress != Progress::Up {
                    self.progress = Progress::Up;
                    self.tell(Negotiated::Up).await?;
                }
                self.settle().await?;
            }
            PeerEvent::Interrupted | PeerEvent::Failed => {
                if self.progress == Progress::Up {
                    self.progress = Progress::Interrupted;
                    self.tell(Negotiated::Interrupted).await?;
                }
            }
            PeerEvent::Track(track) => {
                let id = track.id().await;
                if self.incoming.len() < MOST_SECTIONS && !self.incoming.contains_key(&id) {
                    self.read(id, track);
                }
            }
            PeerEvent::Channel(channel) => self.opened(channel).await,
        }
        Ok(())
    }

    /// The other side opened a data channel.
    async fn opened(&mut self, channel: crate::transport::rtc::engine::Channel) {
        self.their_channels.count += 1;
        if self.their_channels.count > MOST_CHANNELS {
            tracing::warn!("the member opened too many data channels");
            return;
        }
        let (shared, identity) = (Arc::clone(&self.shared), self.identity.clone());
        self.tasks.spawn(channels::read_theirs(channel.clone(), shared, identity));
        if let Some((reliable, lossy)) = self.their_channels.add(channel).await
            && let Some(queue) = self.outbound.take()
        {
            let identity = self.identity.clone();
            self.tasks.spawn(async move { channels::write(&reliable, &lossy, &identity, queue).await });
        }
    }

    /// Reports a step of connecting, the first time.
    async fn reached(&mut self, stage: ConnectStage) -> Result<(), Left> {
        if self.stages.insert(stage) { self.emit(TransportEvent::Stage(stage)).await } else { Ok(()) }
    }

    /// The earliest time at which something is overdue.
    fn deadline(&self) -> Option<Instant> {
        let blocked = match self.progress {
            Progress::Connecting { since } if !self.blocked => Some(since + MEDIA_BLOCKED),
            _ => None,
        };
        self.description.as_ref().map(|description| description.deadline).into_iter().chain(blocked).min()
    }

    async fn overdue(&mut self) -> Result<(), Stop> {
        let now = Instant::now();
        if self.description.as_ref().is_some_and(|description| now >= description.deadline) {
            self.send_description().await?;
        }
        if let Progress::Connecting { since } = self.progress
            && now >= since + MEDIA_BLOCKED
            && !std::mem::replace(&mut self.blocked, true)
        {
            let tried = self.peer.pairs(MOST_PAIRS);
            tracing::warn!(?tried, "descriptions are exchanged, but no media after 10 s");
            self.emit(TransportEvent::MediaBlocked { tried }).await?;
        }
        Ok(())
    }

    /// Shares the uplink among our tracks.
    async fn estimate(&mut self) -> Result<(), Stop> {
        if self.progress != Progress::Up {
            return Ok(());
        }
        let now = Instant::now().into_std();
        let uplink = self.peer.uplink();
        let mut shares = Vec::new();
        for sent in self.sending.iter().filter_map(|sending| sending.track.as_ref()) {
            let spec = &sent.local.spec;
            if !sent.tasks.is_empty() && !sent.local.muted() {
                shares.push(bitrate::Share {
                    track: sent.local.id,
                    audio: spec.codec.is_audio(),
                    // One layer is sent. A quarter more than it uses has to be there before it is.
                    most: most(&sent.local) / 4 * 5,
                });
            }
        }
        let mut news = Vec::new();
        let (mut needed, mut paused_since) = (0, None);
        for (track, share) in bitrate::split(uplink.unwrap_or(FIRST_ESTIMATE), &shares) {
            let of_track = |sent: &&mut Sent| sent.local.id == track;
            let tracks = self.sending.iter_mut().filter_map(|sending| sending.track.as_mut());
            let Some(sent) = tracks.into_iter().find(of_track) else { continue };
            let target = share.min(most(&sent.local));
            if uplink.is_some() && bitrate::is_news(sent.target, target) {
                sent.target = Some(target);
                news.push(TransportEvent::TargetBitrate { track, bits_per_second: target });
            }
            let (in_use, paused) = {
                let mut layers = sent.layers();
                if uplink.is_some() {
                    layers.set_share(now, share);
                }
                (layers.in_use(), layers.paused())
            };
            if let Some((since, least)) = paused {
                needed += least;
                paused_since =
                    Some(paused_since.map_or(since, |before: std::time::Instant| before.min(since)));
            }
            if in_use != sent.in_use && in_use.len() > 1 {
                sent.in_use.clone_from(&in_use);
                news.push(TransportEvent::LayersWanted { track, layers: in_use });
            }
        }
        let short = paused_since.is_some_and(|since| now.saturating_duration_since(since) >= SHORT);
        if short != self.short && (short || paused_since.is_none()) {
            self.short = short;
            news.push(if short {
                let audio = shares.iter().filter(|share| share.audio).count() as u64 * bitrate::AUDIO;
                let bits_per_second = uplink.unwrap_or(FIRST_ESTIMATE);
                TransportEvent::UplinkShort { bits_per_second, needed: needed + audio }
            } else {
                TransportEvent::UplinkEnough
            });
        }
        for event in news {
            self.emit(event).await?;
        }
        Ok(())
    }
}

/// The most that one layer of a track uses, in bits per second.
fn most(local: &LocalTrack) -> u64 {
    local.spec.layers.iter().map(|layer| layer.bitrate).max().unwrap_or(0)
}

fn check_size(sdp: Sdp) -> Result<Sdp, Stop> {
    if sdp.0.len() > LARGEST_SDP {
        return Err(Stop::Failed(format!("a description of {} bytes is too large", sdp.0.len())));
    }
    Ok(sdp)
}

fn check_sections(views: &[SectionView]) -> Result<(), Stop> {
    if views.len() > MOST_SECTIONS {
        return Err(Stop::Failed(format!("{} sections are too many", views.len())));
    }
    Ok(())
}

async fn at(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}
