//! Brings a connection in line with what the application wants.

use std::{collections::HashSet, sync::Arc};

use livekit_protocol::{self as proto, signal_request as request};
use tokio::time::Instant;

use super::{
    ending::{End, lost},
    link::{Asked, Link, Progress, description},
    peers::Side,
    requests,
    session::Session,
};
use crate::transport::{
    LocalTrackId, Subscription, TransportError, TransportEvent,
    rtc::{
        bitrate,
        local::{self, LocalTrack},
    },
};

impl Session {
    /// Brings the connection in line with what the application wants, and what follows from what just happened.
    pub(super) async fn settle(&mut self, link: &mut Link) -> Result<(), End> {
        if self.shared.desired.is_closed() {
            return Err(End::Left);
        }
        self.prune(link);
        if link.resuming && link.complete() {
            link.resumed();
        }
        if !link.resuming {
            self.settle_tracks(link).await?;
            self.settle_subscriptions(link);
        }
        if self.shared.desired.wants_data() && !link.offered {
            link.publications.require_offer();
        }
        if let Some(id) = link.publications.next_offer(Instant::now().into_std()) {
            let sdp = link.peers.publisher.offer().await.map_err(lost)?;
            let offer = description("offer", sdp, id);
            if link.peers.is_single() {
                link.exchange.offer = Some(offer.clone());
            }
            link.send(request::Message::Offer(offer));
            link.offered = true;
        }
        if *link.progress(Side::Publisher) == Progress::Up {
            for (track, asked) in &link.asked {
                if link.publications.is_live(*track) {
                    asked.local.answer(Ok(()));
                }
            }
        }
        if !link.resuming
            && link.complete()
            && let Some(restoring) = self.restoring.take()
        {
            self.restored = Some((Instant::now(), restoring.backoff));
            self.emit(TransportEvent::Reconnected).await?;
        }
        Ok(())
    }

    /// Asks for new local tracks, ends those that were taken back, and tells who is muted.
    async fn settle_tracks(&mut self, link: &mut Link) -> Result<(), End> {
        let wanted = self.shared.desired.tracks();
        let is_wanted =
            |asked: &Asked| wanted.get(&asked.local.id).is_some_and(|local| Arc::ptr_eq(local, &asked.local));
        let unwanted: Vec<_> =
            link.asked.iter().filter(|(_, asked)| !is_wanted(asked)).map(|(track, _)| *track).collect();
        for track in unwanted {
            link.end_track(track).await.map_err(lost)?;
        }
        // In the order of their ids, which is the order in which others see them.
        for (track, local) in wanted {
            if !link.asked.contains_key(&track) {
                self.ask(link, local);
            }
        }
        let mut mutes = Vec::new();
        for (track, sid) in link.publications.granted() {
            if let Some(asked) = link.asked.get_mut(&track) {
                let muted = asked.local.muted();
                if asked.told_muted != muted {
                    asked.told_muted = muted;
                    mutes.push(proto::MuteTrackRequest { sid: sid.to_owned(), muted });
                }
            }
        }
        for mute in mutes {
            link.send(request::Message::Mute(mute));
        }
        Ok(())
    }

    /// Tells the SFU which remote tracks to send, and how.
    fn settle_subscriptions(&mut self, link: &mut Link) {
        if !std::mem::take(&mut self.resubscribe) {
            return;
        }
        let default = self.default_subscription();
        let present: HashSet<_> = self.roster.tracks().collect();
        for (sid, wanted) in self.shared.desired.subscriptions(|_| true) {
            let told = link.told.get(&sid).unwrap_or(&default);
            if *told == wanted || !present.contains(&sid) {
                continue;
            }
            let enabled_changes = told.enabled != wanted.enabled;
            let settings_change = Subscription { enabled: wanted.enabled, ..told.clone() } != wanted;
            if enabled_changes {
                link.send(request::Message::Subscription(requests::update_subscription(
                    &sid,
                    wanted.enabled,
                )));
            }
            if wanted.enabled && (settings_change || enabled_changes) {
                link.send(request::Message::TrackSetting(requests::track_settings(&sid, &wanted)));
            }
            link.told.insert(sid, wanted);
        }
    }

    pub(super) fn default_subscription(&self) -> Subscription {
        Subscription { enabled: self.options.auto_subscribe, ..Subscription::default() }
    }

    /// Forgets what is kept for tracks that are gone.
    fn prune(&mut self, link: &mut Link) {
        if std::mem::take(&mut self.prune) {
            let present: HashSet<_> = self.roster.tracks().collect();
            link.told.retain(|sid, _| present.contains(sid));
            self.shared.remote.retain(|sid| present.contains(sid));
            self.shared.desired.subscriptions(|sid| present.contains(sid));
        }
    }

    /// Asks the SFU for a track.
    fn ask(&self, link: &mut Link, local: Arc<LocalTrack>) {
        let muted = local.muted();
        link.publications.ask(Instant::now().into_std(), local.id, local.cid.clone());
        link.send(request::Message::AddTrack(requests::add_track(&local, muted)));
        link.asked.insert(local.id, Asked { local, told_muted: muted, info: None, outgoing: None });
    }

    /// The SFU has a name for a track: it goes into the next offer.
    pub(super) async fn granted(
        &self,
        link: &mut Link,
        track: LocalTrackId,
        info: proto::TrackInfo,
    ) -> Result<(), End> {
        let Some(asked) = link.asked.get_mut(&track) else { return Ok(()) };
        let spec = &asked.local.spec;
        let publisher = &link.peers.publisher;
        let outgoing = publisher
            .add_track(spec.codec, &asked.local.cid, spec.layers.len().max(1), spec.dimensions())
            .await
            .map_err(lost)?;
        let events = Arc::clone(&self.shared.events);
        link.tasks.spawn(local::watch_reports(outgoing.clone(), track, events, |stream| stream));
        asked.outgoing = Some(outgoing);
        asked.info = Some(info);
        Ok(())
    }

    /// A track is negotiated: its frames go out from now on.
    pub(super) async fn attach(&self, link: &mut Link, track: LocalTrackId) -> Result<(), End> {
        let Some(asked) = link.asked.get(&track) else { return Ok(()) };
        let Some(outgoing) = asked.outgoing.clone() else { return Ok(()) };
        if let Err(error) = outgoing.negotiated().await {
            return self.give_up(link, track, error).await;
        }
        let local = Arc::clone(&asked.local);
        let frames = local.attach();
        let events = Arc::clone(&self.shared.events);
        link.tasks.spawn(local::write(local, frames, outgoing, events, local::every_layer));
        Ok(())
    }

    /// The SFU will not carry a track.
    pub(super) async fn give_up(
        &self,
        link: &mut Link,
        track: LocalTrackId,
        error: TransportError,
    ) -> Result<(), End> {
        let local = link.asked.get(&track).map(|asked| Arc::clone(&asked.local));
        link.end_track(track).await.map_err(lost)?;
        let Some(local) = local else { return Ok(()) };
        self.shared.desired.unpublish(&local);
        let reason = error.to_string();
        if !local.answer(Err(error)) {
            tracing::warn!(?track, reason, "a local track ended");
            self.emit(TransportEvent::LocalTrackEnded { track, reason }).await?;
        }
        Ok(())
    }

    /// Tells the application how much its video tracks should send, if that changed.
    pub(super) async fn estimate(&self, link: &mut Link) -> Result<(), End> {
        let Some(uplink) = link.peers.publisher.uplink() else { return Ok(()) };
        let tracks: Vec<_> = link
            .asked
            .values()
            .filter(|asked| !asked.told_muted && link.publications.is_live(asked.local.id))
            .map(|asked| bitrate::Share {
                track: asked.local.id,
                audio: asked.local.spec.codec.is_audio(),
                most: asked.local.spec.layers.iter().map(|layer| layer.bitrate).fold(0, u64::saturating_add),
            })
            .collect();
        for (track, bits_per_second) in bitrate::split(uplink, &tracks) {
            if bitrate::is_news(link.targets.get(&track).copied(), bits_per_second) {
                link.targets.insert(track, bits_per_second);
                self.emit(TransportEvent::TargetBitrate { track, bits_per_second }).await?;
            }
        }
        Ok(())
    }
}
