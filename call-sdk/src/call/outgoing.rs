//! Frames on their way out: sealed once with our key, then sent on every connection that carries the track.

use std::{
    fmt,
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicBool, AtomicU8, Ordering},
    },
    time::Duration,
};

use tokio::sync::Notify;

use crate::{
    frame_crypto::{FrameEncryptor, SealError, UnsupportedCodec},
    key::KeyIndex,
    machine::Sealing,
    media::{EncodedFrame, FramePool, TrackSpec},
    transport::{ConnectionId, LocalTrackId, Outlet, WireFrame, rtc::is_key_frame},
};

/// Stands for an audio level that nobody told.
const NO_LEVEL: u8 = u8::MAX;
/// The audio level of silence.
const SILENCE: u8 = 127;

/// What the call's task and the application's handle share of a local track.
pub(super) struct Outgoing {
    pub(super) id: LocalTrackId,
    pub(super) spec: TrackSpec,
    sealing: Arc<Sealing>,
    layers: Vec<Mutex<Layer>>,
    outlets: RwLock<Vec<(ConnectionId, Arc<dyn Outlet>)>>,
    muted: AtomicBool,
    /// In −dBov; [`NO_LEVEL`] if unknown.
    audio_level: AtomicU8,
    /// The application dropped its handle.
    dropped: AtomicBool,
    changed: Arc<Notify>,
}

/// One encoding: its own IVs.
struct Layer {
    encryptor: Result<FrameEncryptor, UnsupportedCodec>,
    pool: FramePool,
}

impl Outgoing {
    /// `changed` wakes the call's task when the application mutes or drops the track.
    pub(super) fn new(
        id: LocalTrackId,
        spec: TrackSpec,
        sealing: Arc<Sealing>,
        changed: Arc<Notify>,
    ) -> Self {
        let layer = || {
            let encryptor = FrameEncryptor::new(spec.codec, sealing.ring().clone());
            Mutex::new(Layer { encryptor, pool: FramePool::default() })
        };
        let layers = (0..spec.layers.len().max(1)).map(|_| layer()).collect();
        let muted = AtomicBool::new(spec.muted);
        Self {
            id,
            spec,
            sealing,
            layers,
            outlets: RwLock::default(),
            muted,
            audio_level: AtomicU8::new(NO_LEVEL),
            dropped: AtomicBool::new(false),
            changed,
        }
    }

    pub(super) fn add_outlet(&self, connection: ConnectionId, outlet: Arc<dyn Outlet>) {
        self.outlets.write().unwrap_or_else(PoisonError::into_inner).push((connection, outlet));
    }

    pub(super) fn remove_outlet(&self, connection: ConnectionId) {
        self.outlets.write().unwrap_or_else(PoisonError::into_inner).retain(|(of, _)| *of != connection);
    }

    pub(super) fn is_dropped(&self) -> bool {
        self.dropped.load(Ordering::Acquire)
    }

    pub(super) fn is_muted(&self) -> bool {
        self.muted.load(Ordering::Acquire)
    }

    fn write(&self, layer: u8, frame: &EncodedFrame) -> Result<(), WriteError> {
        if self.is_muted() {
            return Ok(());
        }
        let place = self.layers.get(usize::from(layer)).ok_or(WriteError::NoSuchLayer(layer))?;
        let payload = if self.sealing.is_encrypted() {
            let index = self.sealing.current().ok_or(SealError::MissingKey(KeyIndex(0)))?;
            // A poisoned lock only means that another writer panicked; the encryptor's state is whole.
            let mut place = place.lock().unwrap_or_else(PoisonError::into_inner);
            let Layer { encryptor, pool } = &mut *place;
            let encryptor = encryptor.as_mut().map_err(|unsupported| *unsupported)?;
            pool.fill(|buffer| encryptor.seal(index, &frame.payload, buffer))?.0
        } else {
            frame.payload.clone()
        };
        let wire = WireFrame {
            payload,
            rtp_timestamp: rtp_timestamp(frame.timestamp, self.spec.codec.clock_rate()),
            layer,
            key_frame: is_key_frame(self.spec.codec, &frame.payload),
            audio_level: Some(self.audio_level.load(Ordering::Relaxed)).filter(|level| *level != NO_LEVEL),
        };
        for (_, outlet) in self.outlets.read().unwrap_or_else(PoisonError::into_inner).iter() {
            outlet.send(&wire);
        }
        Ok(())
    }
}

/// A published track. Dropping it ends the track for everybody.
pub struct LocalTrack {
    shared: Arc<Outgoing>,
}

impl LocalTrack {
    pub(super) fn new(shared: Arc<Outgoing>) -> Self {
        Self { shared }
    }

    /// The name that events use.
    #[must_use]
    pub fn id(&self) -> LocalTrackId {
        self.shared.id
    }

    /// The description that it was published with.
    #[must_use]
    pub fn spec(&self) -> &TrackSpec {
        &self.shared.spec
    }

    /// Seals (in an encrypted call) and sends one frame of an audio track, or of the lowest layer of a video track.
    /// Never waits; while no connection carries the track, or it is muted, the frame is dropped.
    ///
    /// # Errors
    /// [`WriteError::Seal`] with [`SealError::MissingKey`] for the moment before our first key exists: drop the frame
    /// and go on. Nothing is ever sent unsealed in an encrypted call.
    pub fn write(&self, frame: &EncodedFrame) -> Result<(), WriteError> {
        self.shared.write(0, frame)
    }

    /// The same for one simulcast layer, lowest first.
    ///
    /// # Errors
    /// As [`LocalTrack::write`], and [`WriteError::NoSuchLayer`].
    pub fn write_layer(&self, layer: u8, frame: &EncodedFrame) -> Result<(), WriteError> {
        self.shared.write(layer, frame)
    }

    /// Tells everybody whether this track is muted. Frames of a muted track are dropped here.
    pub fn set_muted(&self, muted: bool) {
        self.shared.muted.store(muted, Ordering::Release);
        self.shared.changed.notify_one();
    }

    /// Tells how loud the frames are that follow: from 0 (loudest) to 127 (silence), in −dBov (RFC 6464). SFUs find out
    /// who speaks by it, as they cannot hear encrypted sound. `None`, as in the beginning: not known.
    ///
    /// The SFU can read it. [`PcmTrack`](crate::PcmTrack) does this by itself.
    pub fn set_audio_level(&self, level: Option<u8>) {
        let level = level.map_or(NO_LEVEL, |level| level.min(SILENCE));
        self.shared.audio_level.store(level, Ordering::Relaxed);
    }

    /// Frames dropped by the connections that carry this track now. Frames written while no connection carries it are
    /// not counted.
    #[must_use]
    pub fn dropped_frames(&self) -> u64 {
        let outlets = self.shared.outlets.read().unwrap_or_else(PoisonError::into_inner);
        outlets.iter().map(|(_, outlet)| outlet.dropped()).sum()
    }
}

impl Drop for LocalTrack {
    fn drop(&mut self) {
        self.shared.dropped.store(true, Ordering::Release);
        self.shared.changed.notify_one();
    }
}

impl fmt::Debug for LocalTrack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LocalTrack")
            .field("id", &self.shared.id)
            .field("codec", &self.shared.spec.codec)
            .finish_non_exhaustive()
    }
}

/// Why a frame was not sent.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WriteError {
    /// It could not be sealed.
    #[error(transparent)]
    Seal(#[from] SealError),
    /// The call is encrypted and its codec cannot be: publish the track with another codec.
    #[error(transparent)]
    Codec(#[from] UnsupportedCodec),
    /// The track was published with fewer layers.
    #[error("the track was not published with a layer {0}")]
    NoSuchLayer(u8),
}

impl WriteError {
    /// Whether the frame came in the moment before our first key existed: drop it and go on.
    #[must_use]
    pub fn is_before_our_key(&self) -> bool {
        matches!(self, Self::Seal(SealError::MissingKey(_)))
    }
}

/// Media time in a codec's clock, modulo 2^32 as RTP counts (RFC 3550 §5.1).
fn rtp_timestamp(time: Duration, clock_rate: u32) -> u32 {
    let ticks = time.as_nanos() * u128::from(clock_rate) / 1_000_000_000;
    u32::try_from(ticks & u128::from(u32::MAX)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;

    use super::*;
    use crate::key::MediaKey;

    #[derive(Debug, Default)]
    struct Wire {
        frames: Mutex<Vec<WireFrame>>,
        dropped: AtomicU64,
    }

    impl Outlet for Wire {
        fn send(&self, frame: &WireFrame) {
            self.frames.lock().unwrap().push(frame.clone());
        }

        fn dropped(&self) -> u64 {
            self.dropped.load(Ordering::Relaxed)
        }
    }

    fn frame() -> EncodedFrame {
        EncodedFrame { payload: vec![0x78; 50].into(), timestamp: Duration::from_millis(20) }
    }

    fn track(sealing: &Arc<Sealing>) -> (LocalTrack, Arc<Outgoing>) {
        let shared = Arc::new(Outgoing::new(
            LocalTrackId(1),
            TrackSpec::microphone(),
            sealing.clone(),
            Arc::default(),
        ));
        (LocalTrack::new(shared.clone()), shared)
    }

    #[test]
    fn media_time_wraps_as_rtp_does() {
        assert_eq!(rtp_timestamp(Duration::from_millis(20), 48_000), 960);
        let wrap = Duration::from_nanos((u64::from(u32::MAX) + 1) * 1_000_000_000 / 90_000 + 1);
        assert_eq!(rtp_timestamp(wrap, 90_000), 0);
    }

    #[test]
    fn frame_is_sealed_once_for_all_outlets() {
        let sealing = Arc::new(Sealing::default());
        sealing.enable();
        let (track, shared) = track(&sealing);
        let wires = [Arc::new(Wire::default()), Arc::new(Wire::default())];
        for (route, wire) in (0..).zip(&wires) {
            shared.add_outlet(ConnectionId { route, generation: 0 }, wire.clone());
        }
        assert!(matches!(track.write(&frame()), Err(WriteError::Seal(SealError::MissingKey(_)))));
        sealing.switch_to(KeyIndex(3), &MediaKey::new(vec![7; 16]).unwrap()).unwrap();
        track.set_audio_level(Some(200));
        track.write(&frame()).unwrap();
        let [first, second] = wires.map(|wire| wire.frames.lock().unwrap().clone());
        assert_eq!(first, second);
        assert_eq!(first.len(), 1, "nothing was sent before the first key");
        assert_eq!(first[0].audio_level, Some(127), "no level is lower");
        assert_eq!(first[0].payload.len(), 50 + crate::frame_crypto::OVERHEAD);
    }

    #[test]
    fn encryption_enabled_during_a_call_seals_from_the_next_frame() {
        let sealing = Arc::new(Sealing::default());
        let (track, shared) = track(&sealing);
        let wire = Arc::new(Wire::default());
        shared.add_outlet(ConnectionId { route: 0, generation: 0 }, wire.clone());
        track.write(&frame()).unwrap();
        sealing.enable();
        assert!(track.write(&frame()).is_err());
        let frames = wire.frames.lock().unwrap();
        assert_eq!((frames.len(), &frames[0].payload[..]), (1, &[0x78; 50][..]));
    }

    #[test]
    fn dropped_handle_is_seen_by_the_call() {
        let (track, shared) = track(&Arc::default());
        assert!(!shared.is_dropped());
        drop(track);
        assert!(shared.is_dropped());
    }
}
