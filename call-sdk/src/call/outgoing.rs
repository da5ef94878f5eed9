//! Frames on their way out: sealed with our key, or not sent.

use std::{
    fmt,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU16, Ordering},
    },
};

use bytes::Bytes;

use crate::{
    frame_crypto::{FrameEncryptor, KeyRing, SealError},
    key::KeyIndex,
    media::{Codec, EncodedFrame},
    transport::{LocalTrackId, MediaTransport, TransportError, WireFrame},
};

const NO_KEY: u16 = u16::MAX;

/// What every local track of a call shares: where frames go and which of our keys seals them.
#[derive(Debug)]
pub(super) struct Outgoing {
    pub(super) transport: Arc<dyn MediaTransport>,
    pub(super) ring: KeyRing,
    current: AtomicU16,
}

impl Outgoing {
    pub(super) fn new(transport: Arc<dyn MediaTransport>) -> Self {
        Self { transport, ring: KeyRing::new(), current: AtomicU16::new(NO_KEY) }
    }

    pub(super) fn current(&self) -> Option<KeyIndex> {
        u8::try_from(self.current.load(Ordering::Acquire)).ok().map(KeyIndex)
    }

    pub(super) fn switch_to(&self, index: KeyIndex) {
        self.current.store(u16::from(index.0), Ordering::Release);
    }
}

/// A published track. Dropping it does not end it; [`LocalTrack::unpublish`] does.
pub struct LocalTrack {
    id: LocalTrackId,
    codec: Codec,
    encryptor: Option<Mutex<FrameEncryptor>>,
    outgoing: Arc<Outgoing>,
}

impl LocalTrack {
    pub(super) fn new(
        id: LocalTrackId,
        codec: Codec,
        encryptor: Option<FrameEncryptor>,
        outgoing: Arc<Outgoing>,
    ) -> Self {
        Self { id, codec, encryptor: encryptor.map(Mutex::new), outgoing }
    }

    /// The name that [`super::CallEvent::KeyFrameRequested`] uses.
    #[must_use]
    pub fn id(&self) -> LocalTrackId {
        self.id
    }

    /// Seals (in an encrypted call) and sends one frame.
    ///
    /// # Errors
    /// [`WriteError::Seal`] with [`SealError::MissingKey`] for the moment before our first key exists: drop the
    /// frame and go on. Nothing is ever sent unsealed in an encrypted call.
    pub async fn write(&self, frame: EncodedFrame) -> Result<(), WriteError> {
        let payload = match &self.encryptor {
            None => frame.payload,
            Some(encryptor) => {
                let index = self.outgoing.current().ok_or(SealError::MissingKey(KeyIndex(0)))?;
                let mut sealed = Vec::with_capacity(frame.payload.len() + crate::frame_crypto::OVERHEAD);
                // A poisoned lock only means that another writer panicked; the encryptor's state is whole.
                let mut encryptor = encryptor.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                encryptor.seal(index, &frame.payload, &mut sealed)?;
                Bytes::from(sealed)
            }
        };
        let rtp_timestamp = rtp_timestamp(frame.timestamp, self.codec.clock_rate());
        self.outgoing.transport.send(self.id, WireFrame { payload, rtp_timestamp }).await?;
        Ok(())
    }

    /// Tells everybody whether this track is muted. The application stops writing frames by itself.
    pub async fn set_muted(&self, muted: bool) {
        self.outgoing.transport.set_muted(self.id, muted).await;
    }

    /// Ends the track for everybody.
    pub async fn unpublish(self) {
        self.outgoing.transport.unpublish(self.id).await;
    }
}

impl fmt::Debug for LocalTrack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LocalTrack").field("id", &self.id).field("codec", &self.codec).finish_non_exhaustive()
    }
}

/// Why a frame was not sent.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WriteError {
    /// It could not be sealed.
    #[error(transparent)]
    Seal(#[from] SealError),
    /// It could not be carried.
    #[error(transparent)]
    Transport(#[from] TransportError),
}

/// Media time in a codec's clock, modulo 2^32 as RTP counts (RFC 3550 §5.1).
fn rtp_timestamp(time: std::time::Duration, clock_rate: u32) -> u32 {
    let ticks = time.as_nanos() * u128::from(clock_rate) / 1_000_000_000;
    u32::try_from(ticks & u128::from(u32::MAX)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn media_time_wraps_as_rtp_does() {
        assert_eq!(rtp_timestamp(Duration::from_millis(20), 48_000), 960);
        let wrap = Duration::from_nanos((u64::from(u32::MAX) + 1) * 1_000_000_000 / 90_000 + 1);
        assert_eq!(rtp_timestamp(wrap, 90_000), 0);
    }
}
