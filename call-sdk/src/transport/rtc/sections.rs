//! The media sections of a session description: which track each carries, and two repairs that the engine needs.

use std::collections::HashMap;

use crate::transport::TrackSid;

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
        let named = section.value("ssrc").is_some() || section.value("rid").is_some();
        if direction == Direction::RecvOnly || direction.sends() && !named {
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
        let named = section.value("ssrc").is_some() || section.value("rid").is_some();
        match section.direction() {
            Some(Direction::SendRecv) if section.is_media() && !named => Some(Direction::RecvOnly),
            Some(Direction::SendOnly) if section.is_media() && !named => Some(Direction::Inactive),
            _ => None,
        }
    })
}

/// The values of the `a=candidate` lines.
pub(in crate::transport) fn candidates(sdp: &str) -> impl Iterator<Item = &str> {
    sdp.lines().filter_map(|line| line.trim_end().strip_prefix("a=candidate:"))
}

/// Our answer as the SFU must see it: `inactive` wherever the offer does not send.
///
/// The engine answers `recvonly` when a section goes quiet for the second time, which would tell the SFU that
/// the section is still in use.
pub(in crate::transport) fn honest_answer(answer: &str, offer: &str) -> String {
    let quiet: Vec<&str> = sections(offer)
        .filter(|section| section.is_media() && !section.direction().is_some_and(Direction::sends))
        .filter_map(|section| section.value("mid"))
        .collect();
    rewrite(answer, |section| {
        let receives =
            section.direction().is_some_and(|d| matches!(d, Direction::RecvOnly | Direction::SendRecv));
        (section.is_media() && receives && section.value("mid").is_some_and(|mid| quiet.contains(&mid)))
            .then_some(Direction::Inactive)
    })
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

    proptest! {
        #[test]
        fn any_text_is_survived(lines in prop::collection::vec(
            prop_oneof![
                Just("m=audio 9 X 1".to_owned()), Just("m=video".to_owned()), Just("a=sendrecv".to_owned()),
                Just("a=msid:PA|TR_x TR_x".to_owned()), Just("a=mid:1".to_owned()), ".{0,12}",
            ], 0..40)) {
            let sdp = lines.join("\r\n");
            incoming_tracks(&sdp, &HashMap::new());
            let repaired = digestible_offer(&sdp);
            prop_assert_eq!(digestible_offer(&repaired), repaired.clone());
            let honest = honest_answer(&repaired, &sdp);
            prop_assert_eq!(sections(&honest).count(), sections(&sdp).count());
        }
    }
}
