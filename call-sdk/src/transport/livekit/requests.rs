//! What we ask of the SFU, as messages.

use livekit_protocol as proto;

use crate::{
    media::{Codec, TrackSource, TrackSpec},
    transport::{Subscription, TrackSid, rtc::local::LocalTrack},
};

/// Asks for a track.
pub(super) fn add_track(track: &LocalTrack, muted: bool) -> proto::AddTrackRequest {
    let LocalTrack { spec, encrypted, cid, .. } = track;
    let (width, height) = spec.dimensions();
    let encryption = if *encrypted { proto::encryption::Type::Gcm } else { proto::encryption::Type::None };
    let mut request = proto::AddTrackRequest {
        cid: cid.clone(),
        name: spec.name.clone(),
        r#type: proto::TrackType::Audio.into(),
        muted,
        source: match spec.source {
            TrackSource::Camera => proto::TrackSource::Camera,
            TrackSource::Microphone => proto::TrackSource::Microphone,
            TrackSource::ScreenShare => proto::TrackSource::ScreenShare,
            TrackSource::ScreenShareAudio => proto::TrackSource::ScreenShareAudio,
            TrackSource::Unknown => proto::TrackSource::Unknown,
        }
        .into(),
        // Redundancy would pack several sealed frames into one packet.
        disable_red: *encrypted,
        encryption: encryption.into(),
        ..Default::default()
    };
    if spec.codec.is_audio() {
        if spec.stereo {
            request.audio_features = vec![proto::AudioTrackFeature::TfStereo.into()];
        }
        return request;
    }
    let layers = video_layers(spec);
    request.r#type = proto::TrackType::Video.into();
    (request.width, request.height) = (width, height);
    request.layers = layers.clone();
    request.simulcast_codecs = vec![proto::SimulcastCodec {
        codec: codec_name(spec.codec).to_owned(),
        cid: cid.clone(),
        layers,
        ..Default::default()
    }];
    request
}

fn video_layers(spec: &TrackSpec) -> Vec<proto::VideoLayer> {
    let qualities = qualities(spec.layers.len());
    spec.layers
        .iter()
        .zip(qualities)
        .map(|(layer, quality)| proto::VideoLayer {
            quality: (*quality).into(),
            width: layer.width,
            height: layer.height,
            bitrate: u32::try_from(layer.bitrate).unwrap_or(u32::MAX),
            ..Default::default()
        })
        .collect()
}

/// The qualities that so many layers have, lowest first: a single layer is declared high.
pub(super) fn qualities(layers: usize) -> &'static [proto::VideoQuality] {
    use proto::VideoQuality::{High, Low, Medium};
    match layers {
        0 => &[],
        1 => &[High],
        2 => &[Low, Medium],
        _ => &[Low, Medium, High],
    }
}

/// A codec's name in `simulcast_codecs`.
fn codec_name(codec: Codec) -> &'static str {
    match codec {
        Codec::Opus => "opus",
        Codec::Vp8 => "vp8",
        Codec::Vp9 => "vp9",
        Codec::H264 => "h264",
        Codec::H265 => "h265",
        Codec::Av1 => "av1",
    }
}

/// Begins or ends the subscription to a track.
pub(super) fn update_subscription(sid: &TrackSid, subscribe: bool) -> proto::UpdateSubscription {
    proto::UpdateSubscription { track_sids: vec![sid.0.clone()], subscribe, ..Default::default() }
}

/// Says which part of a track to send.
pub(super) fn track_settings(sid: &TrackSid, subscription: &Subscription) -> proto::UpdateTrackSettings {
    let (width, height) = subscription.dimensions.unwrap_or((0, 0));
    proto::UpdateTrackSettings {
        track_sids: vec![sid.0.clone()],
        disabled: subscription.paused,
        quality: proto::VideoQuality::High.into(),
        width,
        height,
        fps: subscription.fps.unwrap_or(0),
        // LiveKit sorts by descending priority; a camera has 1 and a screen 255 by default.
        priority: subscription.priority.min(255),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{media::VideoLayer, transport::LocalTrackId};

    fn request(spec: TrackSpec, encrypted: bool) -> proto::AddTrackRequest {
        add_track(&LocalTrack::new(LocalTrackId(1), spec, encrypted).0, true)
    }

    #[test]
    fn single_video_layer_is_announced_high() {
        let request = request(TrackSpec::camera(640, 360), true);
        assert_eq!(request.layers.len(), 1);
        assert_eq!(request.layers[0].quality(), proto::VideoQuality::High);
        assert_eq!((request.width, request.height), (640, 360));
        assert_eq!(request.simulcast_codecs[0].cid, request.cid);
    }

    #[test]
    fn encrypted_track_says_so_and_disables_red() {
        let sealed = request(TrackSpec::microphone(), true);
        assert_eq!(sealed.encryption(), proto::encryption::Type::Gcm);
        assert!(sealed.disable_red && sealed.muted);
        let plain = request(TrackSpec::microphone(), false);
        assert_eq!(plain.encryption(), proto::encryption::Type::None);
        assert!(!plain.disable_red && plain.layers.is_empty() && plain.simulcast_codecs.is_empty());
        assert_eq!(plain.source(), proto::TrackSource::Microphone);
    }

    #[test]
    fn stereo_audio_is_announced() {
        let request = request(TrackSpec::screen_share_audio(), false);
        assert_eq!(request.audio_features, [i32::from(proto::AudioTrackFeature::TfStereo)]);
    }

    #[test]
    fn layers_ascend_in_quality() {
        let layer = |height| VideoLayer { width: height * 16 / 9, height, bitrate: 1000, fps: 30.0 };
        let spec = TrackSpec::camera(1, 1).with_layers(vec![layer(180), layer(360), layer(720)]);
        let request = request(spec, false);
        let of = |layer: &proto::VideoLayer| (layer.quality(), layer.height);
        assert_eq!(
            request.layers.iter().map(of).collect::<Vec<_>>(),
            [
                (proto::VideoQuality::Low, 180),
                (proto::VideoQuality::Medium, 360),
                (proto::VideoQuality::High, 720)
            ]
        );
    }

    #[test]
    fn settings_carry_the_wanted_size() {
        let sid = TrackSid("TR_a".into());
        let subscription = Subscription {
            dimensions: Some((640, 360)),
            fps: Some(15),
            priority: 9999,
            ..Default::default()
        };
        let settings = track_settings(&sid, &subscription);
        assert_eq!((settings.width, settings.height, settings.fps), (640, 360, 15));
        assert_eq!(settings.priority, 255);
        assert!(!settings.disabled);
        assert!(track_settings(&sid, &Subscription { paused: true, ..subscription }).disabled);
    }
}
