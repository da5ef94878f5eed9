//! What the application wants of a connection. Its handle writes it at once; the task behind it brings the connection in
//! line with it whenever it can. Nothing queues up: the latest wish replaces the one before.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::Notify;

use super::{
    local::{LocalTrack, MOST_LAYERS},
    remote::MOST_REMOTE_TRACKS,
};
use crate::{
    media::TrackSpec,
    transport::{LocalTrackId, Subscription, TrackSid, TransportError},
};

/// More local tracks than any member publishes.
const MOST_LOCAL_TRACKS: usize = 64;

/// See the module.
#[derive(Debug, Default)]
pub(in crate::transport) struct Desired {
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    tracks: BTreeMap<LocalTrackId, Arc<LocalTrack>>,
    subscriptions: HashMap<TrackSid, Subscription>,
    /// Data was sent: the channels must be up.
    data: bool,
    closed: bool,
}

impl Desired {
    /// Adds a local track and waits until it is live. Dropping the future takes the track back.
    ///
    /// # Errors
    /// As [`Self::publish`], or why the track did not become live.
    pub(in crate::transport) async fn publication(
        &self,
        track: LocalTrackId,
        spec: TrackSpec,
        encrypted: bool,
    ) -> Result<Arc<LocalTrack>, TransportError> {
        let (local, answer) = LocalTrack::new(track, spec, encrypted);
        self.publish(Arc::clone(&local))?;
        let publication = Publication { desired: self, local: Some(local) };
        answer.await.unwrap_or(Err(TransportError::Closed))?;
        publication.keep().ok_or(TransportError::Closed)
    }

    /// Adds a local track.
    ///
    /// # Errors
    /// The connection is closed, the id is taken, or there are too many tracks, or layers of this one.
    pub(in crate::transport) fn publish(&self, track: Arc<LocalTrack>) -> Result<(), TransportError> {
        let mut state = self.state();
        if state.closed {
            return Err(TransportError::Closed);
        }
        if state.tracks.contains_key(&track.id) {
            return Err(TransportError::TrackRefused("a track with this id is published already".to_owned()));
        }
        if track.spec.layers.len() > MOST_LAYERS {
            let layers = track.spec.layers.len();
            return Err(TransportError::TrackRefused(format!(
                "{layers} simulcast layers; at most {MOST_LAYERS} are carried"
            )));
        }
        if state.tracks.len() >= MOST_LOCAL_TRACKS {
            return Err(TransportError::TrackRefused(format!("more than {MOST_LOCAL_TRACKS} local tracks")));
        }
        state.tracks.insert(track.id, track);
        drop(state);
        self.changed.notify_one();
        Ok(())
    }

    /// Takes a local track back; a later one under the same id stays.
    pub(in crate::transport) fn unpublish(&self, track: &Arc<LocalTrack>) {
        let mut state = self.state();
        if state.tracks.get(&track.id).is_some_and(|present| Arc::ptr_eq(present, track)) {
            state.tracks.remove(&track.id);
        }
        drop(state);
        track.detach();
        self.changed.notify_one();
    }

    /// Takes the local track under this id back. A publisher that still waits for it is told.
    pub(in crate::transport) fn take_back(&self, id: LocalTrackId) {
        if let Some(track) = self.track(id) {
            self.unpublish(&track);
            track.answer(Err(TransportError::TrackRefused("unpublished before it was live".to_owned())));
        }
    }

    /// Mutes a local track or not. Frames of a muted track are dropped here, from before anybody is told.
    pub(in crate::transport) fn set_muted(&self, id: LocalTrackId, muted: bool) {
        if let Some(track) = self.track(id) {
            track.set_muted(muted);
            self.changed.notify_one();
        }
    }

    /// The local track under this id.
    pub(in crate::transport) fn track(&self, id: LocalTrackId) -> Option<Arc<LocalTrack>> {
        self.state().tracks.get(&id).cloned()
    }

    /// All local tracks, by id.
    pub(in crate::transport) fn tracks(&self) -> BTreeMap<LocalTrackId, Arc<LocalTrack>> {
        self.state().tracks.clone()
    }

    pub(in crate::transport) fn subscribe(&self, sid: &TrackSid, subscription: Subscription) {
        let mut state = self.state();
        if state.closed
            || (state.subscriptions.len() >= MOST_REMOTE_TRACKS && !state.subscriptions.contains_key(sid))
        {
            return;
        }
        state.subscriptions.insert(sid.clone(), subscription);
        drop(state);
        self.changed.notify_one();
    }

    /// The wanted subscriptions, without those to tracks that `exists` denies.
    pub(in crate::transport) fn subscriptions(
        &self,
        exists: impl Fn(&TrackSid) -> bool,
    ) -> HashMap<TrackSid, Subscription> {
        let mut state = self.state();
        state.subscriptions.retain(|sid, _| exists(sid));
        state.subscriptions.clone()
    }

    /// Asks for data channels.
    pub(in crate::transport) fn want_data(&self) {
        if !std::mem::replace(&mut self.state().data, true) {
            self.changed.notify_one();
        }
    }

    pub(in crate::transport) fn wants_data(&self) -> bool {
        self.state().data
    }

    /// Asks the session to leave.
    pub(in crate::transport) fn close(&self) {
        self.state().closed = true;
        self.changed.notify_one();
    }

    pub(in crate::transport) fn is_closed(&self) -> bool {
        self.state().closed
    }

    /// Resolves after something changed.
    pub(in crate::transport) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Fails every track: the connection has ended.
    pub(in crate::transport) fn end(&self) {
        let tracks = {
            let mut state = self.state();
            state.closed = true;
            state.subscriptions.clear();
            std::mem::take(&mut state.tracks)
        };
        for track in tracks.into_values() {
            track.detach();
            track.answer(Err(TransportError::Closed));
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A publication that is under way: dropping it takes the track back.
struct Publication<'a> {
    desired: &'a Desired,
    local: Option<Arc<LocalTrack>>,
}

impl Publication<'_> {
    fn keep(mut self) -> Option<Arc<LocalTrack>> {
        self.local.take()
    }
}

impl Drop for Publication<'_> {
    fn drop(&mut self) {
        if let Some(local) = self.local.take() {
            self.desired.unpublish(&local);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn track(id: u64) -> Arc<LocalTrack> {
        LocalTrack::new(LocalTrackId(id), TrackSpec::microphone(), true).0
    }

    #[test]
    fn id_in_use_is_refused() {
        let desired = Desired::default();
        desired.publish(track(1)).unwrap();
        assert!(matches!(desired.publish(track(1)), Err(TransportError::TrackRefused(_))));
    }

    #[test]
    fn unpublish_spares_a_later_track_with_the_same_id() {
        let desired = Desired::default();
        let (first, second) = (track(1), track(1));
        desired.publish(Arc::clone(&first)).unwrap();
        desired.unpublish(&first);
        desired.publish(Arc::clone(&second)).unwrap();
        desired.unpublish(&first);
        assert!(desired.track(LocalTrackId(1)).is_some_and(|present| Arc::ptr_eq(&present, &second)));
    }

    #[test]
    fn too_many_tracks_are_refused() {
        let desired = Desired::default();
        for id in 0..MOST_LOCAL_TRACKS as u64 {
            desired.publish(track(id)).unwrap();
        }
        assert!(matches!(desired.publish(track(9999)), Err(TransportError::TrackRefused(_))));
    }

    #[test]
    fn subscriptions_are_bounded_and_pruned() {
        let desired = Desired::default();
        for index in 0..=MOST_REMOTE_TRACKS {
            desired.subscribe(&TrackSid(format!("TR_{index}")), Subscription::default());
        }
        assert_eq!(desired.subscriptions(|_| true).len(), MOST_REMOTE_TRACKS);
        assert_eq!(desired.subscriptions(|sid| sid.0 == "TR_7").len(), 1);
        assert_eq!(desired.subscriptions(|_| true).len(), 1);
    }

    #[tokio::test]
    async fn end_answers_waiting_publications() {
        let desired = Desired::default();
        let (track, answer) = LocalTrack::new(LocalTrackId(1), TrackSpec::microphone(), true);
        desired.publish(track).unwrap();
        desired.end();
        assert!(matches!(answer.await, Ok(Err(TransportError::Closed))));
    }
}
