//! The media sections of a session description: which track each carries, and the repairs that the engine needs.

use std::collections::HashMap;

use crate::{media::Codec, transport::TrackSid};

/// The most media sections that are looked at; more than any call needs.
const MOST_SECTIONS: usize = 2048;

/// Which remote track arrives under which MediaStreamTrack id.
///
/// LiveKit names it three ways: in the stream half of the msid (`PA_…|TR_…`), in its track half, or in the
/// offer's `mid_to_track_id`.
pub(in crate::transport) fn incoming_tracks(
    sdp: &str,
    by_mid: &HashMap<String, String>,
) -> HashMap<String, TrackSid> {
    sections(sdp)
        .filter(|section| section.is_media() && section.direction().is_some_and(Direction::sends))
        .filter_map(|section| {
            let (stream, track) = section.msid()?;
            let sid = stream
                .split_once('|')
                .map(|(_, half)| half)
                .filter(|half| half.starts_with("TR_"))
                .or_else(|| Some(track).filter(|track| track.starts_with("TR_")))
                .or_else(|| by_mid.get(section.value("mid")?).map(String::as_str))?;
            Some((track.to_owned(), TrackSid(sid.to_owned())))
        })
        .collect()
}

/// The offer as the engine can digest it.
///
/// A sending section without `a=ssrc` and `a=rid` makes the engine refuse the whole offer, one without a
/// direction attribute shifts the order of all that follow, and one that is new and `recvonly` gets no receiver,
/// so that a later track in it is never heard. The first and the third are made inactive (we send nothing on this
/// connection), the second explicit.
pub(in crate::transport) fn digestible_offer(sdp: &str) -> String {
    rewrite(sdp, |section| {
        if !section.is_media() {
            return None;
        }
        let direction = section.direction().unwrap_or(Direction::SendRecv);
        if direction == Direction::RecvOnly || direction.sends() && !section.is_named() {
            Some(Direction::Inactive)
        } else if section.direction().is_none() {
            Some(direction)
        } else {
            None
        }
    })
}

/// The answer as the engine can digest it: a section in which the other side sends, but does not name its stream, is
/// not received.
pub(in crate::transport) fn digestible_answer(sdp: &str) -> String {
    rewrite(sdp, |section| {
        let unnamed = section.is_media() && !section.is_named();
        match section.direction() {
            Some(Direction::SendRecv) if unnamed => Some(Direction::RecvOnly),
            Some(Direction::SendOnly) if unnamed => Some(Direction::Inactive),
            _ => None,
        }
    })
}

/// The values of the `a=candidate` lines.
pub(in crate::transport) fn candidates(sdp: &str) -> impl Iterator<Item = &str> {
    sdp.lines().filter_map(|line| line.trim_end().strip_prefix("a=candidate:"))
}

/// Our answer as the other side must see it: in no section does anybody send who the offer doesn't let, and we don't
/// say that we send where we have no stream.
///
/// The engine answers `recvonly` when a section goes quiet for the second time, which would tell an SFU that the
/// section is still in use, `sendonly` where it has nothing to send, and with all its codecs where none is known.
pub(in crate::transport) fn honest_answer(answer: &str, offer: &str) -> String {
    let offered: HashMap<&str, Direction> = sections(offer)
        .filter(|section| section.is_media())
        .filter_map(|section| {
            let direction = section.direction().unwrap_or(Direction::SendRecv);
            let possible = if section.has_known_codec() { direction } else { Direction::Inactive };
            Some((section.value("mid")?, possible))
        })
        .collect();
    rewrite(answer, |section| {
        let (direction, offered) = (section.direction()?, offered.get(section.value("mid")?)?);
        let honest = Direction::of(
            direction.sends() && offered.receives() && section.is_named(),
            direction.receives() && offered.sends(),
        );
        (section.is_media() && honest != direction).then_some(honest)
    })
}

/// The offer of a member as the engine can digest it, which may also let us send.
///
/// As in [`digestible_offer`], a section in which the other side sends without naming its stream is not received, and a
/// missing direction is written out. A section that is known and quiet is described as `recvonly`: the engine stops an
/// inactive one for good. A new one has to be inactive instead, to get a receiver for a later track.
pub(in crate::transport) fn digestible_mutual_offer(sdp: &str, known: impl Fn(&str) -> bool) -> String {
    rewrite(sdp, |section| {
        if !section.is_media() {
            return None;
        }
        let direction = section.direction().unwrap_or(Direction::SendRecv);
        let sends = direction.sends() && section.is_named();
        let quiet = if section.value("mid").is_some_and(&known) || direction.receives() {
            Direction::RecvOnly
        } else {
            Direction::Inactive
        };
        let digestible = if sends { direction } else { quiet };
        (section.direction() != Some(digestible)).then_some(digestible)
    })
}

/// What a description says about one media section.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::transport) struct SectionView {
    pub(in crate::transport) mid: String,
    pub(in crate::transport) audio: bool,
    /// Whether the describing side sends a named stream in it.
    pub(in crate::transport) sends: bool,
    /// Whether the describing side receives in it.
    pub(in crate::transport) receives: bool,
    /// Whether it names a codec that we know.
    pub(in crate::transport) usable: bool,
    /// The first codec that we know: what the describing side sends in it.
    pub(in crate::transport) codec: Option<Codec>,
    /// The stream and track halves of the msid.
    pub(in crate::transport) msid: Option<(String, String)>,
}

/// The media sections of a description that have an id.
pub(in crate::transport) fn views(sdp: &str) -> Vec<SectionView> {
    let view = |section: Section<'_>| {
        let direction = section.direction().unwrap_or(Direction::SendRecv);
        Some(SectionView {
            mid: section.value("mid")?.to_owned(),
            audio: section.0.starts_with("m=audio"),
            sends: direction.sends() && section.is_named(),
            receives: direction.receives(),
            usable: section.has_known_codec(),
            codec: section.codecs().flatten().next(),
            msid: section.msid().map(|(stream, track)| (stream.to_owned(), track.to_owned())),
        })
    };
    sections(sdp).filter(|section| section.is_media()).filter_map(view).collect()
}

/// The id of the first section, whose candidates are those of all others.
pub(in crate::transport) fn first_mid(sdp: &str) -> Option<&str> {
    sections(sdp).next()?.value("mid")
}

/// The user name fragment of the sender's ICE credentials.
pub(in crate::transport) fn ice_ufrag(sdp: &str) -> Option<&str> {
    sdp.lines().find_map(|line| line.trim_end().strip_prefix("a=ice-ufrag:"))
}

/// The description with these candidates (lines without `a=`) in its first section and no others.
pub(in crate::transport) fn with_candidates(sdp: &str, candidates: &[String], complete: bool) -> String {
    let is_candidate =
        |line: &str| line.starts_with("a=candidate:") || line.starts_with("a=end-of-candidates");
    let mut out = String::with_capacity(sdp.len() + 128 * candidates.len());
    let mut media = 0;
    let add = |out: &mut String| {
        for candidate in candidates {
            out.push_str(&format!("a={candidate}\r\n"));
        }
        if complete {
            out.push_str("a=end-of-candidates\r\n");
        }
    };
    for line in sdp.lines().map(str::trim_end).filter(|line| !is_candidate(line)) {
        media += u32::from(line.starts_with("m="));
        if media == 2 && line.starts_with("m=") {
            add(&mut out);
        }
        out.push_str(line);
        out.push_str("\r\n");
    }
    if media == 1 {
        add(&mut out);
    }
    out
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Direction {
    SendRecv,
    SendOnly,
    RecvOnly,
    Inactive,
}

impl Direction {
    const ALL: [Self; 4] = [Self::SendRecv, Self::SendOnly, Self::RecvOnly, Self::Inactive];

    fn sends(self) -> bool {
        matches!(self, Self::SendRecv | Self::SendOnly)
    }

    fn receives(self) -> bool {
        matches!(self, Self::SendRecv | Self::RecvOnly)
    }

    fn of(sends: bool, receives: bool) -> Self {
        match (sends, receives) {
            (true, true) => Self::SendRecv,
            (true, false) => Self::SendOnly,
            (false, true) => Self::RecvOnly,
            (false, false) => Self::Inactive,
        }
    }

    fn attribute(self) -> &'static str {
        match self {
            Self::SendRecv => "a=sendrecv",
            Self::SendOnly => "a=sendonly",
            Self::RecvOnly => "a=recvonly",
            Self::Inactive => "a=inactive",
        }
    }

    fn of_line(line: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|direction| direction.attribute() == line)
    }
}

/// The lines from one `m=` up to the next.
#[derive(Clone, Copy, Debug)]
struct Section<'a>(&'a str);

impl<'a> Section<'a> {
    fn lines(self) -> impl Iterator<Item = &'a str> {
        self.0.lines().map(str::trim_end)
    }

    fn is_media(self) -> bool {
        self.0.starts_with("m=audio") || self.0.starts_with("m=video")
    }

    fn direction(self) -> Option<Direction> {
        self.lines().find_map(Direction::of_line)
    }

    /// Whether it names the stream that is sent in it.
    fn is_named(self) -> bool {
        self.value("ssrc").is_some() || self.value("rid").is_some()
    }

    /// Whether it names a codec that we know, or none at all.
    fn has_known_codec(self) -> bool {
        let mut codecs = self.codecs().peekable();
        codecs.peek().is_none() || codecs.any(|codec| codec.is_some())
    }

    /// Its codecs in order of preference; `None` for those that we don't know.
    fn codecs(self) -> impl Iterator<Item = Option<Codec>> {
        const KNOWN: [(&str, Codec); 6] = [
            ("opus", Codec::Opus),
            ("VP8", Codec::Vp8),
            ("VP9", Codec::Vp9),
            ("H264", Codec::H264),
            ("H265", Codec::H265),
            ("AV1", Codec::Av1),
        ];
        let names = self.lines().filter_map(|line| line.strip_prefix("a=rtpmap:")?.split([' ', '/']).nth(1));
        names.map(|name| {
            KNOWN.iter().find(|(known, _)| name.eq_ignore_ascii_case(known)).map(|(_, codec)| *codec)
        })
    }

    fn value(self, attribute: &str) -> Option<&'a str> {
        self.lines().find_map(|line| line.strip_prefix("a=")?.strip_prefix(attribute)?.strip_prefix(':'))
    }

    /// The stream and track halves, from `a=msid` or from the older `a=ssrc:… msid:`.
    fn msid(self) -> Option<(&'a str, &'a str)> {
        let of_ssrc = || {
            self.lines()
                .filter(|line| line.starts_with("a=ssrc:"))
                .find_map(|line| line.split_once(" msid:").map(|(_, msid)| msid))
        };
        self.value("msid").or_else(of_ssrc)?.split_once(' ')
    }
}

fn sections(sdp: &str) -> impl Iterator<Item = Section<'_>> {
    let mut rest = after_session_part(sdp);
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let end = rest.get(1..).and_then(|tail| tail.find("\nm=")).map_or(rest.len(), |at| at + 2);
        let (section, tail) = rest.split_at(end);
        rest = tail;
        Some(Section(section))
    })
    .take(MOST_SECTIONS)
}

fn after_session_part(sdp: &str) -> &str {
    if sdp.starts_with("m=") { sdp } else { sdp.find("\nm=").and_then(|at| sdp.get(at + 1..)).unwrap_or("") }
}

/// The description with the direction of each section replaced where `wanted` says so.
fn rewrite(sdp: &str, wanted: impl Fn(Section<'_>) -> Option<Direction>) -> String {
    let head = sdp.len() - after_session_part(sdp).len();
    let mut out = String::with_capacity(sdp.len() + 64);
    out.push_str(sdp.get(..head).unwrap_or_default());
    let mut copied = head;
    for section in sections(sdp) {
        copied += section.0.len();
        let Some(direction) = wanted(section) else {
            out.push_str(section.0);
            continue;
        };
        for line in section.lines().filter(|line| Direction::of_line(line).is_none()) {
            out.push_str(line);
            out.push_str("\r\n");
        }
        out.push_str(direction.attribute());
        out.push_str("\r\n");
    }
    out.push_str(sdp.get(copied..).unwrap_or_default());
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const OFFER: &str = "v=0\r\no=- 1 1 IN IP4 0.0.0.0\r\ns=-\r\nt=0 0\r\na=group:BUNDLE 0 1 2 3 4\r\n\
        m=application 9 UDP/DTLS/SCTP webrtc-datachannel\r\na=mid:0\r\na=sendrecv\r\n\
        m=audio 9 UDP/TLS/RTP/SAVPF 111\r\na=mid:1\r\na=ssrc:1 cname:x\r\na=msid:PA_a|TR_mic TR_mic\r\na=sendrecv\r\n\
        m=video 9 UDP/TLS/RTP/SAVPF 96\r\na=mid:2\r\na=recvonly\r\n\
        m=video 9 UDP/TLS/RTP/SAVPF 96\r\na=mid:3\r\na=ssrc:2 cname:x\r\na=msid:PA_a|camera cam-7\r\na=sendonly\r\n\
        m=audio 9 UDP/TLS/RTP/SAVPF 111\r\na=mid:4\r\na=msid:PA_b|TR_late TR_late\r\n";

    #[test]
    fn tracks_are_named_by_stream_then_track_then_mid() {
        let by_mid = HashMap::from([("3".to_owned(), "TR_cam".to_owned())]);
        let tracks = incoming_tracks(OFFER, &by_mid);
        assert_eq!(
            tracks,
            HashMap::from([
                ("TR_mic".to_owned(), TrackSid("TR_mic".to_owned())),
                ("cam-7".to_owned(), TrackSid("TR_cam".to_owned())),
            ])
        );
    }

    #[test]
    fn the_older_msid_form_is_read_too() {
        let sdp = "v=0\r\nm=audio 9 X 111\r\na=mid:0\r\na=ssrc:5 msid:PA_a|TR_m TR_m\r\na=sendonly\r\n";
        assert_eq!(incoming_tracks(sdp, &HashMap::new()).len(), 1);
    }

    #[test]
    fn unnamed_sending_section_becomes_inactive() {
        let repaired = digestible_offer(OFFER);
        assert!(repaired.ends_with("a=mid:4\r\na=msid:PA_b|TR_late TR_late\r\na=inactive\r\n"));
        let rest = repaired.replace("TR_late TR_late\r\na=inactive\r\n", "TR_late TR_late\r\n");
        assert_eq!(rest, OFFER.replace("a=recvonly", "a=inactive"));
    }

    #[test]
    fn missing_direction_is_written_out() {
        let sdp = "v=0\r\nm=audio 9 X 111\r\na=mid:0\r\na=ssrc:5 cname:x\r\n";
        assert_eq!(digestible_offer(sdp), format!("{sdp}a=sendrecv\r\n"));
    }

    #[test]
    fn unnamed_sending_section_of_an_answer_is_not_received() {
        let answer = "v=0\r\nm=audio 9 X 111\r\na=mid:0\r\na=recvonly\r\nm=video 9 X 96\r\na=mid:1\r\na=sendonly\r\n\
            m=audio 9 X 111\r\na=mid:2\r\na=ssrc:5 cname:x\r\na=sendonly\r\n";
        let expected = answer.replace("a=mid:1\r\na=sendonly", "a=mid:1\r\na=inactive");
        assert_eq!(digestible_answer(answer), expected);
    }

    #[test]
    fn candidates_are_found_anywhere() {
        let sdp = "v=0\r\na=candidate:1 1 udp 5 10.0.0.1 7 typ host\r\nm=audio 9 X 1\r\na=candidate:2\r\n";
        assert_eq!(candidates(sdp).collect::<Vec<_>>(), ["1 1 udp 5 10.0.0.1 7 typ host", "2"]);
    }

    #[test]
    fn quiet_sections_are_answered_inactive() {
        let answer = "v=0\r\nm=application 9 X y\r\na=mid:0\r\na=sendrecv\r\nm=audio 9 X 111\r\na=mid:1\r\na=recvonly\r\n\
            m=video 9 X 96\r\na=mid:2\r\na=recvonly\r\n";
        let honest = honest_answer(answer, OFFER);
        assert!(honest.ends_with("m=video 9 X 96\r\na=mid:2\r\na=inactive\r\n"));
        assert!(honest.contains("a=mid:1\r\na=recvonly\r\n") && honest.contains("a=mid:0\r\na=sendrecv\r\n"));
    }

    #[test]
    fn answer_sends_only_where_it_may_and_has_a_stream() {
        let section =
            |mid, direction, rest| format!("m=video 9 X 96\r\na=mid:{mid}\r\n{rest}a={direction}\r\n");
        let ssrc = "a=ssrc:5 cname:x\r\n";
        let answer = [
            "v=0\r\n".into(),
            section(0, "sendonly", ssrc),
            section(1, "sendonly", ""),
            section(2, "sendrecv", ssrc),
        ]
        .concat();
        let offer = [
            "v=0\r\n".into(),
            section(0, "recvonly", ""),
            section(1, "recvonly", ""),
            section(2, "sendonly", ssrc),
        ]
        .concat();
        let directions: Vec<_> =
            sections(&honest_answer(&answer, &offer)).map(|s| s.direction().unwrap()).collect();
        assert_eq!(directions, [Direction::SendOnly, Direction::Inactive, Direction::RecvOnly]);
    }

    #[test]
    fn quiet_sections_of_members_are_not_stopped() {
        let digested = digestible_mutual_offer(OFFER, |mid| mid == "3");
        assert!(digested.contains("a=mid:2\r\na=recvonly\r\n"), "we may send in it");
        assert!(digested.ends_with("TR_late TR_late\r\na=recvonly\r\n"), "{digested}");
        let quiet = OFFER.replace("a=sendonly", "a=inactive");
        assert!(digestible_mutual_offer(&quiet, |mid| mid == "3").contains("cam-7\r\na=recvonly\r\n"));
        assert!(digestible_mutual_offer(&quiet, |_| false).contains("cam-7\r\na=inactive\r\n"));
    }

    #[test]
    fn sections_are_viewed() {
        let views = views(OFFER);
        assert_eq!(
            views.iter().map(|v| (v.audio, v.sends, v.receives)).collect::<Vec<_>>(),
            [(true, true, true), (false, false, true), (false, true, false), (true, false, true),]
        );
        assert_eq!(views[2].msid, Some(("PA_a|camera".into(), "cam-7".into())));
        assert_eq!(first_mid(OFFER), Some("0"));
    }

    #[test]
    fn first_known_codec_is_the_one_that_is_sent() {
        let codec = |names: &[&str]| {
            let mut sdp = "v=0\r\nm=video 9 UDP/TLS/RTP/SAVPF 1 2 3\r\na=mid:0\r\n".to_owned();
            for (number, name) in names.iter().enumerate() {
                sdp.push_str(&format!("a=rtpmap:{number} {name}/90000\r\n"));
            }
            let view = views(&sdp).remove(0);
            (view.codec, view.usable)
        };
        assert_eq!(codec(&["rtx", "vp9", "VP8"]), (Some(Codec::Vp9), true));
        assert_eq!(codec(&["rtx", "ulpfec"]), (None, false));
        assert_eq!(codec(&[]), (None, true));
    }

    #[test]
    fn candidates_are_replaced_in_the_first_section() {
        let sdp = "v=0\r\nm=audio 9 X 1\r\na=candidate:1\r\na=mid:0\r\nm=audio 9 X 1\r\na=candidate:2\r\n";
        let expected =
            "v=0\r\nm=audio 9 X 1\r\na=mid:0\r\na=candidate:7\r\na=end-of-candidates\r\nm=audio 9 X 1\r\n";
        assert_eq!(with_candidates(sdp, &["candidate:7".into()], true), expected);
        assert_eq!(
            with_candidates("v=0\r\nm=audio 9 X 1\r\n", &[], true),
            "v=0\r\nm=audio 9 X 1\r\na=end-of-candidates\r\n"
        );
    }

    proptest! {
        #[test]
        fn any_text_is_survived(lines in prop::collection::vec(
            prop_oneof![
                Just("m=audio 9 X 1".to_owned()), Just("m=video".to_owned()), Just("a=sendrecv".to_owned()),
                Just("a=msid:PA|TR_x TR_x".to_owned()), Just("a=mid:1".to_owned()), ".{0,12}",
            ], 0..40)) {
            let sdp = lines.join("\r\n");
            incoming_tracks(&sdp, &HashMap::new());
            views(&sdp);
            with_candidates(&digestible_mutual_offer(&sdp, |_| false), &[], true);
            let repaired = digestible_offer(&sdp);
            prop_assert_eq!(digestible_offer(&repaired), repaired.clone());
            let honest = honest_answer(&repaired, &sdp);
            prop_assert_eq!(sections(&honest).count(), sections(&sdp).count());
        }
    }
}
