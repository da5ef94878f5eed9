//! Which simulcast layer a subscriber gets, and which layers a publisher need send at all (dynacast).

use std::time::{Duration, Instant};

use livekit_protocol::{self as proto, VideoLayer, VideoQuality};

/// A lower wish of all subscribers together is passed on to the publisher only after this long.
pub(crate) const LOWER_AFTER: Duration = Duration::from_secs(5);
/// A new track is assumed to be wanted in full for this long.
pub(crate) const ASSUME_HIGH_FOR: Duration = Duration::from_secs(10);
/// A tile need not be matched to the last pixel.
const SIZE_TOLERANCE: f64 = 0.9;

/// What one subscriber wants of a video track.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Quality {
    Off,
    Low,
    Medium,
    High,
}

impl Quality {
    pub(crate) fn from_wire(quality: i32) -> Self {
        match VideoQuality::try_from(quality) {
            Ok(VideoQuality::Low) => Self::Low,
            Ok(VideoQuality::Medium) => Self::Medium,
            Ok(VideoQuality::Off) => Self::Off,
            Ok(VideoQuality::High) | Err(_) => Self::High,
        }
    }

    /// The quality that shows a tile of `width` × `height` pixels without waste: the lowest layer that is as large,
    /// else the largest. `declared` are the publisher's layers, `source` its full size; either may be unknown.
    pub(crate) fn for_size(width: u32, height: u32, source: (u32, u32), declared: &[VideoLayer]) -> Self {
        let mut layers: Vec<(u32, Self)> = declared
            .iter()
            .filter(|layer| layer.height > 0)
            .map(|layer| (layer.height, Self::from_wire(layer.quality)))
            .collect();
        let mut wanted = height;
        if layers.is_empty() {
            // Portrait sources are measured by their shorter side.
            let portrait = source.0 > 0 && source.0 < source.1;
            let full = if portrait { source.0 } else { source.1 };
            wanted = if portrait { width } else { height };
            layers =
                vec![(180, Self::Low), (360, Self::Medium), (if full == 0 { 720 } else { full }, Self::High)];
        }
        layers.sort_unstable();
        let wanted = f64::from(wanted) * SIZE_TOLERANCE;
        for (index, (height, quality)) in layers.iter().enumerate() {
            let repeated = layers.get(index + 1).is_some_and(|(next, _)| next == height);
            if !repeated && f64::from(*height) >= wanted {
                return *quality;
            }
        }
        layers.last().map_or(Self::High, |(_, quality)| *quality)
    }

    /// Index of the highest layer to forward of a track with `layers` layers, whose qualities are `declared`.
    pub(crate) fn layer(self, declared: &[VideoLayer], layers: usize) -> u8 {
        let top = layers.clamp(1, 3) as u8 - 1;
        let mut has = [false; 3];
        for layer in declared {
            if let Some(slot) = usize::try_from(layer.quality).ok().and_then(|quality| has.get_mut(quality)) {
                *slot = true;
            }
        }
        let index = match (self, has) {
            (Self::Off | Self::Low, _) => 0,
            (Self::High, _) => top,
            // Low and high only: a wish for medium gets the higher of the two.
            (Self::Medium, [true, false, true]) => 1,
            (Self::Medium, [false, true, _]) => 0,
            (Self::Medium, _) => 1,
        };
        index.min(top)
    }
}

/// What a publisher has been told about one of its video tracks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Dynacast {
    sent: Option<Quality>,
    lower_at: Option<Instant>,
    assume_high_until: Instant,
}

impl Dynacast {
    pub(crate) fn new(now: Instant) -> Self {
        Self { sent: None, lower_at: None, assume_high_until: now + ASSUME_HIGH_FOR }
    }

    /// Takes the highest wish of all subscribers (`None` without subscribers); gives what the publisher must be told.
    pub(crate) fn update(&mut self, now: Instant, wanted: Option<Quality>) -> Option<Quality> {
        let wanted = match wanted {
            None if now < self.assume_high_until => return None,
            None => Quality::Off,
            Some(quality) => quality,
        };
        let current = self.sent.unwrap_or(Quality::High);
        if wanted >= current {
            self.lower_at = None;
            if wanted > current || self.sent.is_none() {
                self.sent = Some(wanted);
                return Some(wanted);
            }
            return None;
        }
        let lower_at = *self.lower_at.get_or_insert(now + LOWER_AFTER);
        if now < lower_at {
            return None;
        }
        self.lower_at = None;
        self.sent = Some(wanted);
        Some(wanted)
    }
}

/// The message that tells a publisher which layers somebody wants.
#[allow(deprecated, reason = "older clients read the deprecated list")]
pub(crate) fn quality_update(track_sid: &str, mime: &str, max: Quality) -> proto::SubscribedQualityUpdate {
    let qualities: Vec<_> = [
        (VideoQuality::Low, Quality::Low),
        (VideoQuality::Medium, Quality::Medium),
        (VideoQuality::High, Quality::High),
    ]
    .into_iter()
    .map(|(wire, quality)| proto::SubscribedQuality { quality: wire.into(), enabled: quality <= max })
    .collect();
    let codec = mime.rsplit('/').next().unwrap_or_default().to_ascii_lowercase();
    proto::SubscribedQualityUpdate {
        track_sid: track_sid.to_owned(),
        subscribed_qualities: qualities.clone(),
        subscribed_codecs: vec![proto::SubscribedCodec { codec, qualities }],
    }
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "a test needs one instant to count from")]
mod tests {
    use super::*;

    fn layer(quality: VideoQuality, height: u32) -> VideoLayer {
        VideoLayer { quality: quality.into(), width: height * 16 / 9, height, ..VideoLayer::default() }
    }

    #[test]
    fn a_tile_gets_the_lowest_layer_that_fills_it() {
        let declared =
            [layer(VideoQuality::Low, 180), layer(VideoQuality::Medium, 360), layer(VideoQuality::High, 720)];
        let quality = |height| Quality::for_size(height * 16 / 9, height, (1280, 720), &declared);
        assert_eq!(quality(68), Quality::Low);
        assert_eq!(quality(200), Quality::Low);
        assert_eq!(quality(201), Quality::Medium);
        assert_eq!(quality(448), Quality::High);
        assert_eq!(quality(2000), Quality::High);
    }

    #[test]
    fn a_portrait_source_without_declared_layers_is_measured_by_its_width() {
        assert_eq!(Quality::for_size(150, 300, (720, 1280), &[]), Quality::Low);
        assert_eq!(Quality::for_size(300, 150, (1280, 720), &[]), Quality::Low);
        assert_eq!(Quality::for_size(300, 600, (720, 1280), &[]), Quality::Medium);
    }

    #[test]
    fn a_quality_names_a_layer_by_what_is_declared() {
        let [l, m, h] = [VideoQuality::Low, VideoQuality::Medium, VideoQuality::High].map(|q| layer(q, 1));
        assert_eq!(Quality::High.layer(&[l.clone(), m.clone(), h.clone()], 3), 2);
        assert_eq!(Quality::Medium.layer(&[l.clone(), m.clone(), h.clone()], 3), 1);
        assert_eq!(Quality::Medium.layer(&[l.clone(), h.clone()], 2), 1);
        assert_eq!(Quality::Medium.layer(&[m, h.clone()], 2), 0);
        assert_eq!(Quality::Low.layer(&[l], 1), 0);
        assert_eq!(Quality::High.layer(&[h], 1), 0);
        assert_eq!(Quality::High.layer(&[], 0), 0);
    }

    #[test]
    fn a_wish_rises_at_once_and_falls_after_five_seconds() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut dynacast = Dynacast::new(start);
        assert_eq!(dynacast.update(at(0), None), None);
        assert_eq!(dynacast.update(at(1), Some(Quality::Low)), None);
        assert_eq!(dynacast.update(at(6), Some(Quality::Low)), Some(Quality::Low));
        assert_eq!(dynacast.update(at(7), Some(Quality::High)), Some(Quality::High));
        assert_eq!(dynacast.update(at(8), Some(Quality::Medium)), None);
        assert_eq!(dynacast.update(at(9), Some(Quality::High)), None);
        assert_eq!(dynacast.update(at(20), None), None);
        assert_eq!(dynacast.update(at(25), None), Some(Quality::Off));
    }
}
