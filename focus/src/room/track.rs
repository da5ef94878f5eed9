//! Tracks: what a client announces, how the announcement finds its media section, and what others are told.

use std::time::Instant;

use livekit_protocol::{
    AddTrackRequest, AudioTrackFeature, SimulcastCodecInfo, TimedVersion, TrackInfo, TrackSource, TrackType,
    VideoLayer, video_layer,
};

use super::Now;
use super::ids::SessionId;
use super::quality::Dynacast;
use crate::plane::{MediaKind, OfferedSection, TrackKey};

/// An announcement whose media section has not come yet.
#[derive(Clone, Debug)]
pub(crate) struct Pending {
    pub(crate) cid: String,
    pub(crate) kind: MediaKind,
    pub(crate) info: TrackInfo,
}

/// A published track.
#[derive(Debug)]
pub(crate) struct Track {
    pub(crate) key: TrackKey,
    pub(crate) owner: SessionId,
    pub(crate) cid: String,
    pub(crate) kind: MediaKind,
    pub(crate) info: TrackInfo,
    /// Layers that can be switched between; 1 if it is not simulcast.
    pub(crate) layers: usize,
    pub(crate) dynacast: Dynacast,
}

impl Pending {
    /// What a request announces; `None` if it is neither sound nor picture.
    #[allow(deprecated, reason = "clients still read the deprecated copies")]
    pub(crate) fn new(now: Now, sid: String, request: AddTrackRequest) -> Option<Self> {
        let kind = media_kind(request.r#type)?;
        let mut codecs: Vec<SimulcastCodecInfo> = request
            .simulcast_codecs
            .iter()
            .map(|codec| {
                let name = codec.codec.trim_start_matches("video/").trim_start_matches("audio/");
                let svc = matches!(name.to_ascii_lowercase().as_str(), "vp9" | "av1");
                let mode = match video_layer::Mode::try_from(codec.video_layer_mode) {
                    Ok(video_layer::Mode::Unused) | Err(_) if svc => {
                        video_layer::Mode::MultipleSpatialLayersPerStream
                    }
                    Ok(video_layer::Mode::Unused) | Err(_) => video_layer::Mode::OneSpatialLayerPerStream,
                    Ok(mode) => mode,
                };
                SimulcastCodecInfo {
                    mime_type: if name.is_empty() { String::new() } else { mime(kind, name) },
                    cid: codec.cid.clone(),
                    layers: if codec.layers.is_empty() {
                        request.layers.clone()
                    } else {
                        codec.layers.clone()
                    },
                    video_layer_mode: mode.into(),
                    ..SimulcastCodecInfo::default()
                }
            })
            .collect();
        if codecs.is_empty() {
            codecs.push(SimulcastCodecInfo {
                cid: request.cid.clone(),
                layers: request.layers.clone(),
                video_layer_mode: video_layer::Mode::OneSpatialLayerPerStream.into(),
                ..SimulcastCodecInfo::default()
            });
        }
        let svc = i32::from(video_layer::Mode::MultipleSpatialLayersPerStream);
        let stream = if request.stream.is_empty() {
            match TrackSource::try_from(request.source) {
                Ok(TrackSource::Camera | TrackSource::Microphone) => "camera",
                Ok(TrackSource::ScreenShare | TrackSource::ScreenShareAudio) => "screen",
                _ => "unknown",
            }
            .to_owned()
        } else {
            request.stream
        };
        let mut features = request.audio_features;
        for (set, feature) in
            [(request.stereo, AudioTrackFeature::TfStereo), (request.disable_dtx, AudioTrackFeature::TfNoDtx)]
        {
            if set && kind == MediaKind::Audio && !features.contains(&i32::from(feature)) {
                features.push(feature.into());
            }
        }
        let info = TrackInfo {
            sid,
            r#type: request.r#type,
            name: request.name,
            muted: request.muted,
            width: request.width,
            height: request.height,
            simulcast: kind == MediaKind::Video
                && request.layers.len() > 1
                && codecs[0].video_layer_mode != svc,
            disable_dtx: request.disable_dtx,
            source: request.source,
            layers: request.layers,
            codecs,
            stereo: request.stereo,
            disable_red: request.disable_red,
            encryption: request.encryption,
            stream,
            version: Some(TimedVersion { unix_micro: now.unix_us(), ticks: 0 }),
            audio_features: features,
            backup_codec_policy: request.backup_codec_policy,
            packet_trailer_features: request.packet_trailer_features,
            ..TrackInfo::default()
        };
        Some(Self { cid: request.cid, kind, info })
    }

    /// Binds the announcement to its media section; gives the rids of its layers too, low to high.
    #[allow(deprecated, reason = "clients still read the deprecated copies")]
    pub(crate) fn publish(
        mut self,
        now: Instant,
        key: TrackKey,
        owner: SessionId,
        section: &OfferedSection,
    ) -> (Track, Vec<String>) {
        let rids = low_to_high(&section.rids);
        let asked = self.info.codecs.first().map(|codec| codec.mime_type.clone()).unwrap_or_default();
        let mime = section
            .mimes
            .iter()
            .find(|mime| mime.eq_ignore_ascii_case(&asked))
            .or_else(|| section.mimes.first())
            .cloned()
            .unwrap_or(asked);
        self.info.mime_type.clone_from(&mime);
        self.info.mid.clone_from(&section.mid);
        if let Some(codec) = self.info.codecs.first_mut() {
            codec.mime_type = mime;
            codec.mid.clone_from(&section.mid);
            if let Some(id) = section.track_id.as_ref().filter(|id| **id != codec.cid) {
                codec.sdp_cid.clone_from(id);
            }
            name_layers(&mut codec.layers, &rids);
        }
        name_layers(&mut self.info.layers, &rids);
        let track = Track {
            key,
            owner,
            cid: self.cid,
            kind: self.kind,
            info: self.info,
            layers: rids.len().max(1),
            dynacast: Dynacast::new(now),
        };
        (track, rids)
    }
}

impl Track {
    #[allow(deprecated, reason = "that is where clients declare their layers")]
    pub(crate) fn declared(&self) -> &[VideoLayer] {
        &self.info.layers
    }

    pub(crate) fn has_cid(&self, cid: &str) -> bool {
        self.cid == cid || self.info.codecs.iter().any(|codec| codec.cid == cid)
    }
}

/// Which announcement a new media section belongs to: by the announced id, by an announced codec's id, else the
/// first of the same kind, because Firefox and native clients change the id once a transceiver exists.
pub(crate) fn match_section(pending: &[Pending], section: &OfferedSection) -> Option<usize> {
    let of_kind = |candidate: &Pending| candidate.kind == section.kind;
    let id = section.track_id.as_deref();
    pending
        .iter()
        .position(|p| of_kind(p) && Some(p.cid.as_str()) == id)
        .or_else(|| {
            pending
                .iter()
                .position(|p| of_kind(p) && p.info.codecs.iter().any(|c| Some(c.cid.as_str()) == id))
        })
        .or_else(|| pending.iter().position(of_kind))
}

/// `TR_`, then the kind and the source, as the reference writes it; clients test `TR_` only.
pub(crate) fn sid_prefix(request: &AddTrackRequest) -> String {
    let kind = if request.r#type == i32::from(TrackType::Video) { 'V' } else { 'A' };
    let source = match TrackSource::try_from(request.source) {
        Ok(TrackSource::Camera) => "C",
        Ok(TrackSource::Microphone) => "M",
        Ok(TrackSource::ScreenShare) => "S",
        Ok(TrackSource::ScreenShareAudio) => "s",
        _ => "",
    };
    format!("TR_{kind}{source}")
}

pub(crate) fn media_kind(wire: i32) -> Option<MediaKind> {
    match TrackType::try_from(wire) {
        Ok(TrackType::Audio) => Some(MediaKind::Audio),
        Ok(TrackType::Video) => Some(MediaKind::Video),
        Ok(TrackType::Data) | Err(_) => None,
    }
}

fn mime(kind: MediaKind, codec: &str) -> String {
    match kind {
        MediaKind::Audio => format!("audio/{codec}"),
        MediaKind::Video => format!("video/{codec}"),
    }
}

/// Senders name layers `q`, `h`, `f` or `2`, `1`, `0`, low to high; other names keep the offer's order.
fn low_to_high(rids: &[String]) -> Vec<String> {
    let rank = |rid: &str| match rid {
        "q" | "2" => Some(0),
        "h" | "1" => Some(1),
        "f" | "0" => Some(2),
        _ => None,
    };
    let mut sorted = rids.to_vec();
    if rids.iter().all(|rid| rank(rid).is_some()) {
        sorted.sort_by_key(|rid| rank(rid));
    }
    sorted
}

fn name_layers(layers: &mut [VideoLayer], rids: &[String]) {
    if rids.is_empty() {
        return;
    }
    layers.sort_by_key(|layer| layer.quality);
    for (index, (layer, rid)) in layers.iter_mut().zip(rids).enumerate() {
        layer.rid.clone_from(rid);
        layer.spatial_layer = i32::try_from(index).unwrap_or(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn section(id: &str, kind: MediaKind) -> OfferedSection {
        OfferedSection {
            mid: "1".into(),
            kind,
            sends: true,
            track_id: Some(id.into()),
            mimes: vec!["video/VP8".into()],
            rids: vec![],
        }
    }

    fn pending(cid: &str, kind: TrackType) -> Pending {
        let now = Now { instant: instant(), unix: std::time::Duration::ZERO };
        let request = AddTrackRequest { cid: cid.into(), r#type: kind.into(), ..AddTrackRequest::default() };
        Pending::new(now, "TR_x".into(), request).unwrap()
    }

    #[allow(clippy::disallowed_methods, reason = "a test needs one instant to count from")]
    fn instant() -> Instant {
        Instant::now()
    }

    #[test]
    fn a_section_finds_its_announcement_by_id_else_by_kind() {
        let pending = [
            pending("mic", TrackType::Audio),
            pending("cam", TrackType::Video),
            pending("screen", TrackType::Video),
        ];
        assert_eq!(match_section(&pending, &section("screen", MediaKind::Video)), Some(2));
        assert_eq!(match_section(&pending, &section("{firefox}", MediaKind::Video)), Some(1));
        assert_eq!(match_section(&pending[..1], &section("cam", MediaKind::Video)), None);
    }

    #[test]
    fn layers_are_ordered_low_to_high_whatever_their_names() {
        let order =
            |rids: &[&str]| low_to_high(&rids.iter().map(|rid| (*rid).to_owned()).collect::<Vec<_>>());
        assert_eq!(order(&["f", "h", "q"]), ["q", "h", "f"]);
        assert_eq!(order(&["0", "1", "2"]), ["2", "1", "0"]);
        assert_eq!(order(&["big", "small"]), ["big", "small"]);
    }

    #[test]
    fn the_mime_type_is_written_as_the_section_writes_it() {
        let mut request = AddTrackRequest { cid: "cam".into(), r#type: 1, ..AddTrackRequest::default() };
        request.simulcast_codecs.push(livekit_protocol::SimulcastCodec {
            codec: "vp8".into(),
            cid: "cam".into(),
            ..livekit_protocol::SimulcastCodec::default()
        });
        let now = Now { instant: instant(), unix: std::time::Duration::ZERO };
        let pending = Pending::new(now, "TR_x".into(), request).unwrap();
        let (track, _) =
            pending.publish(now.instant, TrackKey(1), SessionId(1), &section("cam", MediaKind::Video));
        assert_eq!(track.info.mime_type, "video/VP8");
        assert_eq!(track.info.codecs[0].mime_type, "video/VP8");
        assert_eq!(track.info.mid, "1");
    }
}
