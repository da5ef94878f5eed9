//! What the application wants of a connection. Its handle writes it at once; the session brings the SFU in line with
//! it whenever it can. Nothing queues up: the latest wish replaces the one before.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::Notify;

use super::local::LocalTrack;
use crate::transport::{LocalTrackId, Subscription, TrackSid, TransportError};

/// More local tracks than any member publishes.
const MOST_LOCAL_TRACKS: usize = 64;
/// More remote tracks than any call has.
pub(super) const MOST_REMOTE_TRACKS: usize = 4096;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Desired {
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
    /// Adds a local track.
    ///
    /// # Errors
    /// The connection is closed, the id is taken, or there are too many tracks.
    pub(super) fn publish(&self, track: Arc<LocalTrack>) -> Result<(), TransportError> {
        let mut state = self.state();
        if state.closed {
            return Err(TransportError::Closed);
        }
        if state.tracks.contains_key(&track.id) {
            return Err(TransportError::TrackRefused("a track with this id is published already".to_owned()));
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
    pub(super) fn unpublish(&self, track: &Arc<LocalTrack>) {
        let mut state = self.state();
        if state.tracks.get(&track.id).is_some_and(|present| Arc::ptr_eq(present, track)) {
            state.tracks.remove(&track.id);
        }
        drop(state);
        track.detach();
        self.changed.notify_one();
    }

    /// The local track under this id.
    pub(super) fn track(&self, id: LocalTrackId) -> Option<Arc<LocalTrack>> {
        self.state().tracks.get(&id).cloned()
    }

    /// All local tracks, by id.
    pub(super) fn tracks(&self) -> BTreeMap<LocalTrackId, Arc<LocalTrack>> {
        self.state().tracks.clone()
    }

    pub(super) fn subscribe(&self, sid: &TrackSid, subscription: Subscription) {
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
    pub(super) fn subscriptions(
        &self,
        exists: impl Fn(&TrackSid) -> bool,
    ) -> HashMap<TrackSid, Subscription> {
        let mut state = self.state();
        state.subscriptions.retain(|sid, _| exists(sid));
        state.subscriptions.clone()
    }

    /// Tells the session to look again, for changes that are kept elsewhere (mute).
    pub(super) fn touch(&self) {
        self.changed.notify_one();
    }

    /// Asks for data channels.
    pub(super) fn want_data(&self) {
        if !std::mem::replace(&mut self.state().data, true) {
            self.changed.notify_one();
        }
    }

    pub(super) fn wants_data(&self) -> bool {
        self.state().data
    }

    /// Asks the session to leave.
    pub(super) fn close(&self) {
        self.state().closed = true;
        self.changed.notify_one();
    }

    pub(super) fn is_closed(&self) -> bool {
        self.state().closed
    }

    /// Resolves after something changed.
    pub(super) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Fails every track: the connection has ended.
    pub(super) fn end(&self) {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::media::TrackSpec;

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
