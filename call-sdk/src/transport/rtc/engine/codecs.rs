//! The codecs that are negotiated, with the payload types that browsers use.

use rtc::rtp_transceiver::rtp_sender::{RTCPFeedback, RTCRtpCodec, RTCRtpCodecParameters, RtpCodecKind};

use crate::media::Codec;

/// Every codec, in the order of preference.
pub(super) const ALL_CODECS: [Codec; 6] =
    [Codec::Opus, Codec::Vp8, Codec::H264, Codec::Vp9, Codec::Av1, Codec::H265];

/// The forms of a video codec: payload type, payload type of its retransmissions, `fmtp`. The first is published.
type Forms = &'static [(u8, u8, &'static str)];

/// H.264 is received in every profile that browsers and LiveKit name, as frames are not decoded here.
const H264: Forms = &[
    (102, 103, "level-asymmetry-allowed=1;packetization-mode=1;profile-level-id=42e01f"),
    (125, 107, "level-asymmetry-allowed=1;packetization-mode=1;profile-level-id=42001f"),
    (104, 105, "level-asymmetry-allowed=1;packetization-mode=0;profile-level-id=42e01f"),
    (106, 108, "level-asymmetry-allowed=1;packetization-mode=0;profile-level-id=42001f"),
    (112, 113, "level-asymmetry-allowed=1;packetization-mode=1;profile-level-id=4d001f"),
    (114, 115, "level-asymmetry-allowed=1;packetization-mode=1;profile-level-id=64001f"),
];

fn forms(codec: Codec) -> Forms {
    match codec {
        Codec::Opus => &[],
        Codec::Vp8 => &[(96, 97, "")],
        Codec::Vp9 => &[(98, 99, "profile-id=0")],
        Codec::H264 => H264,
        Codec::H265 => &[(116, 117, "level-id=180;profile-id=1;tier-flag=0;tx-mode=SRST")],
        Codec::Av1 => &[(45, 46, "level-idx=5;profile=0;tier=0")],
    }
}

/// A codec in all its forms, each followed by what repairs it.
pub(super) fn parameters(codec: Codec) -> Vec<RTCRtpCodecParameters> {
    let feedback =
        |typ: &str, parameter: &str| RTCPFeedback { typ: typ.to_owned(), parameter: parameter.to_owned() };
    if codec.is_audio() {
        return vec![RTCRtpCodecParameters {
            rtp_codec: RTCRtpCodec {
                mime_type: mime(codec).to_owned(),
                clock_rate: codec.clock_rate(),
                channels: 2,
                sdp_fmtp_line: "minptime=10;useinbandfec=1".to_owned(),
                rtcp_feedback: vec![feedback("nack", "")],
            },
            payload_type: 111,
        }];
    }
    forms(codec)
        .iter()
        .flat_map(|(payload_type, repair, fmtp)| {
            let codec = RTCRtpCodec {
                mime_type: mime(codec).to_owned(),
                clock_rate: codec.clock_rate(),
                channels: 0,
                sdp_fmtp_line: (*fmtp).to_owned(),
                rtcp_feedback: vec![
                    feedback("transport-cc", ""),
                    feedback("ccm", "fir"),
                    feedback("nack", ""),
                    feedback("nack", "pli"),
                ],
            };
            let repair_codec = RTCRtpCodec {
                mime_type: "video/rtx".to_owned(),
                sdp_fmtp_line: format!("apt={payload_type}"),
                rtcp_feedback: Vec::new(),
                ..codec.clone()
            };
            [
                RTCRtpCodecParameters { rtp_codec: codec, payload_type: *payload_type },
                RTCRtpCodecParameters { rtp_codec: repair_codec, payload_type: *repair },
            ]
        })
        .collect()
}

pub(super) fn mime(codec: Codec) -> &'static str {
    match codec {
        Codec::Opus => "audio/opus",
        Codec::Vp8 => "video/VP8",
        Codec::Vp9 => "video/VP9",
        Codec::H264 => "video/H264",
        Codec::H265 => "video/H265",
        Codec::Av1 => "video/AV1",
    }
}

pub(super) fn kind(codec: Codec) -> RtpCodecKind {
    if codec.is_audio() { RtpCodecKind::Audio } else { RtpCodecKind::Video }
}

/// The codec that a MIME type such as `video/VP8` names.
pub(in crate::transport) fn codec_of_mime(mime_type: &str) -> Option<Codec> {
    // Opus with redundancy arrives as plain Opus, as RED is never negotiated here.
    if mime_type.eq_ignore_ascii_case("audio/red") {
        return Some(Codec::Opus);
    }
    ALL_CODECS.into_iter().find(|codec| mime_type.eq_ignore_ascii_case(mime(*codec)))
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn payload_types_are_unique_and_dynamic() {
        let types: Vec<_> = ALL_CODECS.into_iter().flat_map(parameters).map(|p| p.payload_type).collect();
        assert_eq!(types.iter().collect::<HashSet<_>>().len(), types.len());
        // RFC 5761 §4: 64 to 95 would be taken for RTCP.
        assert!(types.iter().all(|pt| (96..=127).contains(pt) || (35..=63).contains(pt)));
    }

    #[test]
    fn mime_types_are_read_in_any_case() {
        for codec in ALL_CODECS {
            assert_eq!(codec_of_mime(&mime(codec).to_lowercase()), Some(codec));
        }
        assert_eq!(codec_of_mime("audio/red"), Some(Codec::Opus));
        assert_eq!(codec_of_mime("video/rtx"), None);
    }
}
