//! The task that keeps one member connected: it serves one connection after the other.

use std::{
    sync::{Arc, PoisonError},
    time::Duration,
};

use livekit_protocol::{self as proto, ReconnectReason, signal_request as request};
use livekit_signaling::SignalEvent;
use tokio::time::Instant;

use super::{
    Shared, channels,
    connect::ConnectOptions,
    ending::End,
    link::{Link, MEDIA_BLOCKED, MEDIA_TIMEOUT, Progress},
    peers::Side,
    publications::ANSWER_TO_ADD_TRACK,
    restore::Restoring,
    roster::{ParticipantView, Roster},
};
use crate::{
    identity::ParticipantIdentity,
    transport::{
        ConnectStage, DisconnectReason, TransportError, TransportEvent,
        rtc::{
            engine::{IncomingTrack, PeerEvent},
            pace::Backoff,
            remote,
        },
    },
};

/// Remote tracks that are read at the same time on one connection; more than any call has.
const MOST_READERS: usize = 4096;
/// Data channels that an SFU opens at most: reliable, lossy, data tracks, and a reserve.
const MOST_CHANNELS: usize = 8;
/// How often the estimate of the uplink is looked at.
const ESTIMATES: Duration = Duration::from_secs(1);
/// Candidate pairs in a report of blocked media.
const MOST_PAIRS: usize = 16;

/// See the module.
pub(super) struct Session {
    pub(super) options: ConnectOptions,
    pub(super) shared: Arc<Shared>,
    pub(super) token: String,
    pub(super) roster: Roster,
    /// Set from the loss of a connection until everything is as it was.
    pub(super) restoring: Option<Restoring>,
    /// The last restoration, and when it was complete.
    pub(super) restored: Option<(Instant, Backoff)>,
    /// Some remote track ended: what is kept for it can go.
    pub(super) prune: bool,
    /// Subscriptions or remote tracks changed since the SFU was told.
    pub(super) resubscribe: bool,
}

impl Session {
    pub(super) fn new(options: ConnectOptions, shared: Arc<Shared>) -> Self {
        Self {
            token: options.token.clone(),
            options,
            shared,
            roster: Roster::default(),
            restoring: None,
            restored: None,
            prune: false,
            resubscribe: true,
        }
    }

    /// Runs until the connection ends for good.
    pub(super) async fn run(mut self, link: Link, join: proto::JoinResponse) {
        let mut next = Ok((link, join));
        let reason = loop {
            let (mut link, join) = match next {
                Ok(link) => link,
                Err(End::Left) => break DisconnectReason::Closed,
                Err(End::Gone(reason)) => break reason,
                Err(End::Lost(cause) | End::Interrupted { cause, .. }) => {
                    break DisconnectReason::Internal(cause);
                }
            };
            let end = self.serve(&mut link, join).await;
            self.token = link.token();
            link.close(end == End::Left).await;
            next = match end {
                End::Lost(cause) | End::Interrupted { cause, .. } => self.restore(cause).await,
                end => Err(end),
            };
        };
        tracing::debug!(%reason, "the SFU connection is over");
        self.shared.end(reason);
    }

    /// Serves one connection, across interruptions, until it ends.
    async fn serve(&mut self, link: &mut Link, join: proto::JoinResponse) -> End {
        if let Err(end) = self.joined(link, join).await {
            return end;
        }
        loop {
            let end = match self.drive(link).await {
                End::Interrupted { reason, cause } => self.resume(link, reason, cause).await,
                end => Err(end),
            };
            if let Err(end) = end {
                return end;
            }
        }
    }

    /// Serves one connection until it is interrupted or ends.
    async fn drive(&mut self, link: &mut Link) -> End {
        let mut estimates = tokio::time::interval(ESTIMATES);
        estimates.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut step = Ok(());
        loop {
            step = match step {
                Ok(()) if link.peers.overflowed() => {
                    Err(End::Lost("the media engine's events were lost".to_owned()))
                }
                Ok(()) if link.clogged => Err(End::Lost("the SFU does not read our messages".to_owned())),
                Ok(()) => self.settle(link).await,
                Err(end) => Err(end),
            };
            if let Err(end) = step {
                return end;
            }
            let deadline = link.deadline();
            step = tokio::select! {
                () = self.shared.desired.changed() => {
                    self.resubscribe = true;
                    Ok(())
                }
                event = link.signal_events.recv() => match event {
                    Some(SignalEvent::Message(message)) => self.hear(link, *message).await,
                    Some(SignalEvent::Close(cause)) => Err(End::Interrupted {
                        reason: ReconnectReason::RrSignalDisconnected,
                        cause: format!("signalling closed: {cause}"),
                    }),
                    None => Err(End::Lost("signalling closed".to_owned())),
                },
                event = link.peer_events.recv() => match event {
                    Some((side, event)) => self.observe(link, side, event).await,
                    None => Err(End::Lost("the media engine stopped".to_owned())),
                },
                () = at(deadline) => self.overdue(link).await,
                _ = estimates.tick() => self.estimate(link).await,
                () = self.shared.events.abandoned() => Err(End::Left),
            };
        }
    }

    async fn joined(&mut self, link: &mut Link, join: proto::JoinResponse) -> Result<(), End> {
        self.reached(link, ConnectStage::Signalled).await?;
        self.resubscribe = true;
        self.shared.remote.set_trailer(join.sif_trailer.into());
        self.shared.sequences.lock().unwrap_or_else(PoisonError::into_inner).clear();
        link.serve_channels(&self.shared);
        let own = join.participant.unwrap_or_default();
        let others = join.other_participants.into_iter().map(ParticipantView::from).collect();
        let events = self.roster.snapshot(ParticipantIdentity(own.identity), own.sid, others);
        self.emit_all(events).await
    }

    /// An event of a peer connection.
    async fn observe(&mut self, link: &mut Link, side: Side, event: PeerEvent) -> Result<(), End> {
        match event {
            PeerEvent::Candidate(candidate_init) => {
                let target = side.target().into();
                let trickle = proto::TrickleRequest { candidate_init, target, r#final: false };
                link.send(request::Message::Trickle(trickle));
            }
            PeerEvent::IceConnected => self.reached(link, ConnectStage::IceConnected).await?,
            PeerEvent::Up => {
                *link.progress(side) = Progress::Up;
                self.reached(link, ConnectStage::MediaUp).await?;
            }
            PeerEvent::Gathered | PeerEvent::Interrupted => {}
            PeerEvent::Failed => {
                let reason = match side {
                    Side::Publisher => ReconnectReason::RrPublisherFailed,
                    Side::Subscriber => ReconnectReason::RrSubscriberFailed,
                };
                return Err(End::Interrupted { reason, cause: format!("{side:?} connection failed") });
            }
            PeerEvent::Track(track) => self.start_reading(link, track).await,
            PeerEvent::Channel(channel) if link.their_channels < MOST_CHANNELS => {
                link.their_channels += 1;
                link.tasks.spawn(channels::read_theirs(channel, Arc::clone(&self.shared)));
            }
            PeerEvent::Channel(_) => tracing::warn!("the SFU opened too many data channels"),
        }
        Ok(())
    }

    /// Reports a step of connecting, the first time.
    async fn reached(&self, link: &mut Link, stage: ConnectStage) -> Result<(), End> {
        if link.stages.insert(stage) { self.emit(TransportEvent::Stage(stage)).await } else { Ok(()) }
    }

    async fn start_reading(&mut self, link: &mut Link, track: IncomingTrack) {
        let id = track.id().await;
        let Some(sid) = link.expected.get(&id).cloned() else {
            tracing::warn!(id, "a track that no offer announced");
            return;
        };
        while link.tasks.try_join_next().is_some() {}
        match self.shared.remote.track(&sid) {
            Some(shared) if link.tasks.len() < MOST_READERS => {
                link.tasks.spawn(remote::read(track, shared));
            }
            _ => tracing::warn!(?sid, "too many tracks; this one is not read"),
        }
    }

    async fn overdue(&mut self, link: &mut Link) -> Result<(), End> {
        let now = Instant::now();
        for track in link.publications.take_unanswered(now.into_std()) {
            let error = TransportError::Timeout(ANSWER_TO_ADD_TRACK, "publishing a track");
            self.give_up(link, track, error).await?;
        }
        if link.publications.negotiation_overdue(now.into_std()) {
            return Err(End::Lost("the SFU did not answer an offer".to_owned()));
        }
        for side in [Side::Publisher, Side::Subscriber] {
            if link.progress(side).is_late(now, MEDIA_TIMEOUT) {
                return Err(End::Lost(format!("{side:?} connection did not come up")));
            }
            if link.progress(side).is_late(now, MEDIA_BLOCKED) && !std::mem::replace(&mut link.blocked, true)
            {
                let tried = link.peers.pairs(MOST_PAIRS);
                tracing::warn!(?tried, "signalling is up, but no media after 10 s");
                // Media that comes up after all is told again.
                link.stages.remove(&ConnectStage::MediaUp);
                self.emit(TransportEvent::MediaBlocked { tried }).await?;
            }
        }
        Ok(())
    }

    pub(super) async fn emit_all(&mut self, events: Vec<TransportEvent>) -> Result<(), End> {
        for event in events {
            self.prune |= matches!(event, TransportEvent::TrackEnded { .. });
            self.resubscribe |= matches!(event, TransportEvent::TrackUpdated { .. });
            self.emit(event).await?;
        }
        Ok(())
    }

    pub(super) async fn emit(&self, event: TransportEvent) -> Result<(), End> {
        if self.shared.events.send(event).await { Ok(()) } else { Err(End::Left) }
    }
}

async fn at(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}
