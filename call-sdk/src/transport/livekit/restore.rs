//! What follows the loss of a connection: it is resumed, or another one is opened.

use std::{sync::PoisonError, time::Duration};

use livekit_protocol::{self as proto, ReconnectReason};
use tokio::time::Instant;

use super::{
    ending::{End, describe, needs_new_token, refused_resumption},
    link::{Link, ResumeError},
    session::Session,
};
use crate::transport::{DisconnectReason, Subscription, TransportError, TransportEvent, rtc::pace::Backoff};

/// Attempts to resume a connection before it is opened afresh.
const RESUMPTIONS: usize = 3;
/// A connection that is lost again sooner than this continues the waits of the restoration before.
const STABLE: Duration = Duration::from_secs(20);

/// A restoration that is under way.
pub(super) struct Restoring {
    since: Instant,
    pub(super) backoff: Backoff,
}

impl Session {
    /// Connects again, as often as is sensible.
    pub(super) async fn restore(&mut self, cause: String) -> Result<(Link, proto::JoinResponse), End> {
        tracing::info!(cause, "the SFU connection is lost; connecting again");
        let mut restoring = self.restoring().await?;
        let mut cause = cause;
        while let Some(wait) = restoring.backoff.next_wait(rand::random()) {
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
                    self.restoring = Some(restoring);
                    return Ok(joined);
                }
                Err(error) => match needs_new_token(&error) {
                    Some(reason) => return Err(End::Gone(reason)),
                    None => cause = describe(&error),
                },
            }
        }
        Err(End::Gone(DisconnectReason::Unreachable { after: restoring.since.elapsed(), cause }))
    }

    /// The restoration under way; a new one is reported.
    async fn restoring(&mut self) -> Result<Restoring, End> {
        match self.restoring.take() {
            Some(restoring) => Ok(restoring),
            None => {
                self.emit(TransportEvent::Reconnecting).await?;
                let recent = self.restored.take().filter(|(at, _)| at.elapsed() < STABLE);
                let backoff = recent.map(|(_, backoff)| backoff).unwrap_or_default();
                Ok(Restoring { since: Instant::now(), backoff })
            }
        }
    }

    /// Tries to go on with a connection that was interrupted.
    pub(super) async fn resume(
        &mut self,
        link: &mut Link,
        reason: ReconnectReason,
        cause: String,
    ) -> Result<(), End> {
        if link.publications.is_undecided() {
            return Err(End::Lost(cause));
        }
        tracing::info!(cause, "the SFU connection was interrupted; resuming it");
        let mut restoring = self.restoring().await?;
        let mut cause = cause;
        for _ in 0..RESUMPTIONS {
            let Some(wait) = restoring.backoff.next_wait(rand::random()) else { break };
            self.meanwhile(tokio::time::sleep(wait)).await?;
            let state = self.sync_state(link);
            let options = self.options.clone();
            match self.meanwhile(link.resume(&options, reason, state)).await? {
                Ok(()) => {
                    self.restoring = Some(restoring);
                    self.resubscribe = true;
                    return Ok(());
                }
                Err(ResumeError::Media(error)) => {
                    cause = describe(&error);
                    break;
                }
                Err(ResumeError::Signal(error)) => match refused_resumption(&error) {
                    None => cause = describe(&error),
                    Some(End::Lost(refusal)) => {
                        cause = refusal;
                        break;
                    }
                    Some(end) => return Err(end),
                },
            }
        }
        self.restoring = Some(restoring);
        Err(End::Lost(cause))
    }

    /// What an SFU is told that resumes a connection.
    fn sync_state(&self, link: &Link) -> proto::SyncState {
        let default = self.default_subscription();
        let told = |differs: &dyn Fn(&Subscription) -> bool| {
            let tracks = link.told.iter().filter(|(_, told)| differs(told));
            tracks.map(|(sid, _)| sid.0.clone()).collect::<Vec<_>>()
        };
        let published = link.asked.values().filter_map(|asked| {
            let track = Some(asked.info.clone()?);
            Some(proto::TrackPublishedResponse { cid: asked.local.cid.clone(), track })
        });
        proto::SyncState {
            offer: link.exchange.offer.clone(),
            answer: link.exchange.answer.clone(),
            subscription: Some(proto::UpdateSubscription {
                track_sids: told(&|told| told.enabled != default.enabled),
                subscribe: !default.enabled,
                ..Default::default()
            }),
            publish_tracks: published.collect(),
            track_sids_disabled: told(&|told| told.paused),
            datachannel_receive_states: self
                .shared
                .sequences
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .states(),
            ..Default::default()
        }
    }

    /// Waits for `work`, unless we leave.
    async fn meanwhile<T>(&mut self, work: impl Future<Output = T>) -> Result<T, End> {
        tokio::pin!(work);
        loop {
            tokio::select! {
                done = &mut work => return Ok(done),
                () = self.shared.desired.changed() => {
                    if self.shared.desired.is_closed() {
                        return Err(End::Left);
                    }
                }
                () = self.shared.events.abandoned() => return Err(End::Left),
            }
        }
    }
}
