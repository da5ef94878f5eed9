//! How the estimate of the uplink is shared among local tracks.

use crate::transport::LocalTrackId;

/// What an audio track needs, in bits per second, overhead included.
pub(in crate::transport) const AUDIO: u64 = 50_000;
/// No video track is told less than this, in bits per second.
const LEAST: u64 = 50_000;

/// A local track that shares the uplink.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::transport) struct Share {
    pub(in crate::transport) track: LocalTrackId,
    pub(in crate::transport) audio: bool,
    /// The most that the track can use, in bits per second.
    pub(in crate::transport) most: u64,
}

/// How much each video track should send when the uplink carries `uplink` bits per second: audio comes first, and
/// video shares the rest in proportion to what it can use.
pub(in crate::transport) fn split(uplink: u64, tracks: &[Share]) -> Vec<(LocalTrackId, u64)> {
    let audio = tracks.iter().filter(|track| track.audio).count() as u64 * AUDIO;
    let rest = uplink.saturating_sub(audio);
    let wanted: u128 = tracks.iter().filter(|track| !track.audio).map(|track| u128::from(track.most)).sum();
    tracks
        .iter()
        .filter(|track| !track.audio)
        .map(|track| {
            let part = u128::from(rest) * u128::from(track.most) / wanted.max(1);
            let part = u64::try_from(part).unwrap_or(u64::MAX);
            (track.track, part.min(track.most).max(LEAST))
        })
        .collect()
}

/// Whether a new target differs enough from the one that was told to be told.
pub(in crate::transport) fn is_news(told: Option<u64>, target: u64) -> bool {
    told.is_none_or(|told| told.abs_diff(target) * 20 >= told)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn share(id: u64, audio: bool, most: u64) -> Share {
        Share { track: LocalTrackId(id), audio, most }
    }

    #[test]
    fn audio_comes_first_and_video_shares_in_proportion() {
        let tracks = [share(1, true, 0), share(2, false, 3_000_000), share(3, false, 1_000_000)];
        assert_eq!(split(2_050_000, &tracks), [(LocalTrackId(2), 1_500_000), (LocalTrackId(3), 500_000)]);
    }

    #[test]
    fn nobody_gets_more_than_it_can_use_or_less_than_the_least() {
        let tracks = [share(2, false, 1_000_000)];
        assert_eq!(split(u64::MAX, &tracks), [(LocalTrackId(2), 1_000_000)]);
        assert_eq!(split(0, &tracks), [(LocalTrackId(2), LEAST)]);
        assert_eq!(split(0, &[share(1, false, 0)]), [(LocalTrackId(1), LEAST)]);
    }

    #[test]
    fn small_changes_are_not_news() {
        assert!(is_news(None, 1));
        assert!(!is_news(Some(1_000_000), 1_040_000));
        assert!(is_news(Some(1_000_000), 1_050_000));
        assert!(is_news(Some(1_000_000), 900_000));
    }
}
