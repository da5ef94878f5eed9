//! The sections of a connection: those in which our tracks are sent, and those in which the other side may send.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::task::AbortHandle;

use super::layers::Layers;
use crate::{
    media::Codec,
    transport::{
        LocalTrackId, TransportError,
        rtc::{
            engine::{OutgoingTrack, Peer},
            local::LocalTrack,
            sections::SectionView,
        },
    },
};

/// Media sections that a description may have. A connection that has used up as many starts anew.
pub(super) const MOST_SECTIONS: usize = 128;

/// A section in which we can send.
pub(super) struct Sending {
    pub(super) outgoing: OutgoingTrack,
    pub(super) mid: Option<String>,
    pub(super) track: Option<Sent>,
}

/// A track that has a section.
pub(super) struct Sent {
    pub(super) local: Arc<LocalTrack>,
    /// Both sides have it in their descriptions.
    pub(super) negotiated: bool,
    /// Its writer and its watcher, while they run.
    pub(super) tasks: Vec<AbortHandle>,
    pub(super) layers: Arc<Mutex<Layers>>,
    /// What the application was told to send, in bits per second.
    pub(super) target: Option<u64>,
    /// Which layers the application was told to encode.
    pub(super) in_use: Vec<bool>,
}

/// A section that we offered, in which the other side may send.
#[derive(Debug)]
pub(super) struct Receiving {
    pub(super) mid: String,
    pub(super) audio: bool,
    pub(super) used: bool,
    /// The other side had a track to send and did not take this section for it.
    pub(super) refused: bool,
}

/// What an offer is needed for.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Wish {
    /// Local tracks without a section.
    pub(super) unsent: Vec<LocalTrackId>,
    /// Sections whose local track ended.
    pub(super) ended: usize,
    /// Tracks of audio and of video that the other side has and can't send.
    pub(super) missing: [usize; 2],
    /// Sections that the other side did not take.
    pub(super) refused: usize,
}

impl Wish {
    pub(super) fn is_empty(&self) -> bool {
        self.unsent.is_empty() && self.ended == 0 && self.missing == [0, 0]
    }
}

impl Sending {
    /// A new section for `local`, or for a later track of this codec. `mutual`: the other side is about to offer it.
    pub(super) async fn open(
        peer: &Peer,
        codec: Codec,
        local: Option<Arc<LocalTrack>>,
        share: u64,
        mutual: bool,
    ) -> Result<Self, TransportError> {
        let nobody = format!("{:032x}", rand::random::<u128>());
        let stream = local.as_ref().map_or(&*nobody, |local| &*local.cid);
        let dimensions = local.as_ref().map_or((0, 0), |local| local.spec.dimensions());
        let outgoing = peer.add_sending_section(codec, stream, dimensions, mutual).await?;
        Ok(Self { outgoing, mid: None, track: local.map(|local| Sent::new(local, share)) })
    }

    /// Whether a track of this codec can be put into it.
    pub(super) fn is_free_for(&self, codec: Codec) -> bool {
        self.track.is_none() && self.outgoing.codec() == codec
    }

    /// The stream that is sent in it.
    pub(super) fn stream(&self) -> Option<&str> {
        self.track.as_ref().map(|track| &*track.local.cid)
    }

    /// Ends the track in it.
    pub(super) fn clear(&mut self) {
        if let Some(track) = self.track.take() {
            track.local.detach();
            track.stop();
        }
    }
}

impl Sent {
    pub(super) fn new(local: Arc<LocalTrack>, share: u64) -> Self {
        let rates: Vec<_> = local.spec.layers.iter().map(|layer| layer.bitrate).collect();
        Self {
            in_use: vec![true; rates.len()],
            layers: Arc::new(Mutex::new(Layers::new(rates, share))),
            local,
            negotiated: false,
            tasks: Vec::new(),
            target: None,
        }
    }

    pub(super) fn layers(&self) -> MutexGuard<'_, Layers> {
        self.layers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stop(&self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

/// What a description says about the section of this id.
pub(super) fn view<'a>(views: &'a [SectionView], mid: Option<&str>) -> Option<&'a SectionView> {
    views.iter().find(|view| Some(&*view.mid) == mid)
}
