//! The engine's callbacks.

use std::sync::{Arc, PoisonError, atomic::Ordering};

use async_trait::async_trait;
use tokio::sync::mpsc;
use webrtc::{
    data_channel::DataChannel,
    media_stream::track_remote::TrackRemote,
    peer_connection::{
        PeerConnectionEventHandler, RTCIceConnectionState, RTCIceGatheringState, RTCPeerConnectionIceEvent,
        RTCPeerConnectionState,
    },
};

use super::{Channel, IncomingTrack, PeerEvent, Shared, note};

/// Puts what the engine reports into the event queue, with a tag that tells connections apart.
pub(super) struct Handler<T> {
    pub(super) tag: T,
    pub(super) events: mpsc::Sender<(T, PeerEvent)>,
    pub(super) shared: Arc<Shared>,
}

impl<T: Copy + Send + Sync> Handler<T> {
    fn report(&self, event: PeerEvent) {
        if let Err(mpsc::error::TrySendError::Full(_)) = self.events.try_send((self.tag, event)) {
            self.shared.overflowed.store(true, Ordering::Relaxed);
        }
    }
}

#[async_trait]
impl<T: Copy + Send + Sync + 'static> PeerConnectionEventHandler for Handler<T> {
    async fn on_ice_candidate(&self, event: RTCPeerConnectionIceEvent) {
        let Ok(mut candidate) = event.candidate.to_json() else { return };
        candidate.sdp_mid = Some("0".to_owned());
        candidate.sdp_mline_index = Some(0);
        note(
            &mut self.shared.local_candidates.lock().unwrap_or_else(PoisonError::into_inner),
            &candidate.candidate,
        );
        if let Ok(json) = serde_json::to_string(&candidate) {
            self.report(PeerEvent::Candidate(json));
        }
    }

    async fn on_ice_connection_state_change(&self, state: RTCIceConnectionState) {
        if state == RTCIceConnectionState::Connected {
            self.report(PeerEvent::IceConnected);
        }
    }

    async fn on_ice_gathering_state_change(&self, state: RTCIceGatheringState) {
        if state == RTCIceGatheringState::Complete {
            self.report(PeerEvent::Gathered);
        }
    }

    async fn on_connection_state_change(&self, state: RTCPeerConnectionState) {
        tracing::debug!(%state, "peer connection");
        match state {
            RTCPeerConnectionState::Connected => self.report(PeerEvent::Up),
            RTCPeerConnectionState::Disconnected => self.report(PeerEvent::Interrupted),
            RTCPeerConnectionState::Failed => self.report(PeerEvent::Failed),
            _ => {}
        }
    }

    async fn on_track(&self, track: Arc<dyn TrackRemote>) {
        self.report(PeerEvent::Track(IncomingTrack::new(track)));
    }

    async fn on_data_channel(&self, channel: Arc<dyn DataChannel>) {
        self.report(PeerEvent::Channel(Channel::new(channel)));
    }
}
