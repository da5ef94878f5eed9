//! What streams are: ours as we describe them, and the tracks that the other side's descriptions amount to.

use std::collections::BTreeMap;

use crate::{
    media::TrackSource,
    transport::{
        RemoteTrack, TrackSid,
        mesh::{StreamMetadata, Streams, TrackMetadata},
        rtc::{local::LocalTrack, sections::SectionView},
    },
};

/// Streams of the other side that are looked at.
pub(super) const MOST_STREAMS: usize = 64;

const USERMEDIA: &str = "m.usermedia";
const SCREENSHARE: &str = "m.screenshare";

/// Describes the stream of a local track.
pub(super) fn of_local(local: &LocalTrack) -> StreamMetadata {
    let (spec, muted) = (&local.spec, local.muted());
    let shared = matches!(spec.source, TrackSource::ScreenShare | TrackSource::ScreenShareAudio);
    let (width, height) = spec.dimensions();
    StreamMetadata {
        purpose: if shared { SCREENSHARE } else { USERMEDIA }.to_owned(),
        audio_muted: muted || !spec.codec.is_audio(),
        video_muted: muted || spec.codec.is_audio(),
        track: Some(TrackMetadata { source: spec.source, name: spec.name.clone(), width, height }),
    }
}

/// A remote track, and the track half of its msid, under which it arrives.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Described {
    pub(super) track: RemoteTrack,
    pub(super) id: String,
}

/// The tracks of the other side: in every section in which it sends, unless it describes its streams (`None`: it never
/// did) and not this one. One that it puts into a stream with others of the same kind gets the track's id in its name.
pub(super) fn tracks(sections: &[SectionView], streams: Option<&Streams>) -> BTreeMap<TrackSid, Described> {
    let mut tracks = BTreeMap::new();
    for section in sections.iter().filter(|section| section.sends) {
        let Some((stream, id)) = &section.msid else { continue };
        let metadata = streams.and_then(|streams| streams.get(stream));
        if metadata.is_none() && streams.is_some() {
            continue;
        }
        // A track without a stream has `-` there (RFC 8830 §2).
        let stream = if stream == "-" { id } else { stream };
        let mut sid = TrackSid(format!("{stream}:{}", if section.audio { "audio" } else { "video" }));
        if tracks.contains_key(&sid) {
            sid.0 = format!("{}:{id}", sid.0);
        }
        let mut track = remote_track(sid.clone(), section.audio, metadata);
        track.codec = section.codec;
        tracks.insert(sid, Described { track, id: id.clone() });
    }
    tracks
}

fn remote_track(sid: TrackSid, audio: bool, metadata: Option<&StreamMetadata>) -> RemoteTrack {
    let described = metadata.and_then(|metadata| metadata.track.as_ref());
    let shared = metadata.is_some_and(|metadata| metadata.purpose == SCREENSHARE);
    let by_purpose = match (shared, audio) {
        (false, true) => TrackSource::Microphone,
        (false, false) => TrackSource::Camera,
        (true, true) => TrackSource::ScreenShareAudio,
        (true, false) => TrackSource::ScreenShare,
    };
    let mut track = RemoteTrack::new(sid, described.map_or(by_purpose, |track| track.source));
    if let Some(described) = described {
        track.name.clone_from(&described.name);
        track.dimensions = (described.width, described.height);
    }
    track.muted = metadata.is_some_and(|m| if audio { m.audio_muted } else { m.video_muted });
    track
}

/// How many tracks of audio and of video the other side has described without sending them in a section.
pub(super) fn missing(sections: &[SectionView], streams: Option<&Streams>) -> [usize; 2] {
    let mut missing = [0, 0];
    for (stream, metadata) in streams.into_iter().flatten() {
        let sent = |section: &SectionView| {
            section.sends && section.msid.as_ref().is_some_and(|(of, _)| of == stream)
        };
        if sections.iter().any(sent) {
            continue;
        }
        let (audio, video) = match metadata.track.as_ref().map(|track| (track.source, track.width)) {
            Some((TrackSource::Microphone | TrackSource::ScreenShareAudio, _)) => (1, 0),
            Some((TrackSource::Camera | TrackSource::ScreenShare, _)) => (0, 1),
            Some((_, width)) if width > 0 => (0, 1),
            // It may be either, or both.
            _ => (1, 1),
        };
        missing[0] += audio;
        missing[1] += video;
    }
    missing
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::media::Codec;

    fn section(audio: bool, stream: &str, id: &str) -> SectionView {
        let msid = Some((stream.to_owned(), id.to_owned()));
        let codec = Some(if audio { Codec::Opus } else { Codec::Vp9 });
        SectionView { mid: id.to_owned(), audio, sends: true, receives: false, usable: true, codec, msid }
    }

    fn described(source: TrackSource) -> StreamMetadata {
        let track = TrackMetadata { source, name: "n".into(), width: 0, height: 0 };
        StreamMetadata {
            purpose: USERMEDIA.into(),
            video_muted: true,
            track: Some(track),
            ..Default::default()
        }
    }

    #[test]
    fn foreign_stream_with_audio_and_video_is_two_tracks() {
        let sections = [section(true, "s", "a"), section(false, "s", "v"), section(false, "-", "lone")];
        let tracks = tracks(&sections, None);
        let sources: Vec<_> = tracks.iter().map(|(sid, d)| (sid.0.as_str(), d.track.source)).collect();
        assert_eq!(
            sources,
            [
                ("lone:video", TrackSource::Camera),
                ("s:audio", TrackSource::Microphone),
                ("s:video", TrackSource::Camera),
            ]
        );
        let codecs: Vec<_> = tracks.values().map(|described| described.track.codec).collect();
        assert_eq!(codecs, [Some(Codec::Vp9), Some(Codec::Opus), Some(Codec::Vp9)]);
    }

    #[test]
    fn metadata_says_what_a_track_is() {
        let mut streams = Streams::from([("s".to_owned(), described(TrackSource::ScreenShare))]);
        let found = tracks(&[section(false, "s", "v"), section(true, "other", "a")], Some(&streams));
        assert_eq!(found.len(), 1, "a stream that is not described is not taken");
        let track = &found[&TrackSid("s:video".into())].track;
        assert_eq!((track.source, track.name.as_str(), track.muted), (TrackSource::ScreenShare, "n", true));
        assert!(tracks(&[section(false, "other", "v")], Some(&Streams::new())).is_empty());
        streams.get_mut("s").unwrap().track = None;
        streams.get_mut("s").unwrap().purpose = SCREENSHARE.into();
        assert_eq!(
            tracks(&[section(false, "s", "v")], Some(&streams))[&TrackSid("s:video".into())].track.source,
            TrackSource::ScreenShare
        );
    }

    #[test]
    fn tracks_of_one_kind_in_one_stream_have_different_names() {
        assert_eq!(tracks(&[section(false, "s", "v"), section(false, "s", "w")], None).len(), 2);
    }

    #[test]
    fn missing_tracks_are_counted_by_kind() {
        let streams = Streams::from([
            ("a".to_owned(), described(TrackSource::Microphone)),
            ("b".to_owned(), described(TrackSource::Camera)),
            ("c".to_owned(), StreamMetadata::default()),
        ]);
        assert_eq!(missing(&[], Some(&streams)), [2, 2]);
        assert_eq!(missing(&[section(true, "a", "x"), section(true, "c", "y")], Some(&streams)), [0, 1]);
    }
}
