//! Session descriptions as text (RFC 8866): what the focus reads from a client's, and what it mends.
//!
//! The media engine negotiates; this module bounds what reaches it, reads the few attributes that the control
//! plane needs, and adapts the text at the edges. Nothing here fails on an unknown attribute.

use thiserror::Error;

/// Largest description accepted, in bytes.
pub const MAX_BYTES: usize = 1 << 20;
/// Most media sections accepted.
pub const MAX_SECTIONS: usize = 256;
/// Most simulcast layers accepted in one section.
pub const MAX_RIDS: usize = 4;
/// Longest mid that the media engine keeps as it is.
const MAX_MID: usize = 16;
/// Most codecs read from one section.
const MAX_CODECS: usize = 128;

/// Why a description is refused. The peer that wrote it is at fault.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum SdpError {
    /// Longer than [`MAX_BYTES`].
    #[error("the session description has {0} bytes, more than the {MAX_BYTES} allowed")]
    TooLong(usize),
    /// More than [`MAX_SECTIONS`].
    #[error("the session description has more than {MAX_SECTIONS} media sections")]
    TooManySections,
    /// No media section at all.
    #[error("the session description has no media section")]
    Empty,
    /// A section without `a=mid`, which BUNDLE needs.
    #[error("media section {0} has no a=mid")]
    NoMid(usize),
    /// A mid that is not 1 to 16 letters, digits or underscores.
    #[error("media section {0} has a mid that is not 1 to {MAX_MID} letters, digits or underscores")]
    BadMid(usize),
    /// Two sections of one mid.
    #[error("two media sections have the mid {0}")]
    RepeatedMid(String),
    /// More simulcast layers than [`MAX_RIDS`].
    #[error("media section {0} has more than {MAX_RIDS} simulcast layers")]
    TooManyRids(usize),
}

/// What a section carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Media {
    /// `m=audio`.
    Audio,
    /// `m=video`.
    Video,
    /// `m=application`: data channels.
    Application,
    /// Anything else.
    Other,
}

/// Which way media flows, as its writer sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Both ways; also what no attribute means (RFC 8866 §6.7).
    SendRecv,
    /// The writer sends.
    SendOnly,
    /// The writer receives.
    RecvOnly,
    /// Nobody sends.
    Inactive,
}

impl Direction {
    /// Whether the writer sends.
    pub fn sends(self) -> bool {
        matches!(self, Self::SendRecv | Self::SendOnly)
    }
}

/// One media section.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    /// `a=mid`.
    pub mid: String,
    /// Its kind.
    pub media: Media,
    /// Port 0 outside a bundle: the section is off.
    pub rejected: bool,
    /// Its direction.
    pub direction: Direction,
    /// Second token of `a=msid`, else its only one; from `a=ssrc` if there is no `a=msid`.
    pub track_id: Option<String>,
    /// MIME types in the order of the `m=` line, without `rtx`, `red`, `ulpfec` and the like.
    pub mimes: Vec<String>,
    /// Simulcast layers that the writer sends, in its order.
    pub rids: Vec<String>,
    /// Whether `a=ssrc` announces its streams.
    pub announces_ssrcs: bool,
}

/// Reads the sections of a description within the bounds of this module.
pub fn sections(text: &str) -> Result<Vec<Section>, SdpError> {
    if text.len() > MAX_BYTES {
        return Err(SdpError::TooLong(text.len()));
    }
    let split = Split::of(text);
    if split.sections.is_empty() {
        return Err(SdpError::Empty);
    }
    if split.sections.len() > MAX_SECTIONS {
        return Err(SdpError::TooManySections);
    }
    let bundled: Vec<&str> = split
        .session
        .iter()
        .find_map(|line| line.strip_prefix("a=group:BUNDLE"))
        .map(|mids| mids.split_whitespace().collect())
        .unwrap_or_default();
    let mut sections: Vec<Section> = Vec::with_capacity(split.sections.len());
    for (index, lines) in split.sections.iter().enumerate() {
        let section = read(index, lines, &bundled)?;
        if sections.iter().any(|other| other.mid == section.mid) {
            return Err(SdpError::RepeatedMid(section.mid));
        }
        sections.push(section);
    }
    Ok(sections)
}

/// A publisher's offer as the engine should see it: it may send, we never do, and its candidates are left out
/// (an ICE-lite peer sends no checks, RFC 8445 §2.5).
pub fn publisher_offer(text: &str) -> String {
    rewrite(text, |media, lines| {
        let mut has_direction = false;
        lines.retain(|line| !is_candidate(line));
        if !matches!(media, Media::Audio | Media::Video) {
            return;
        }
        for line in lines.iter_mut() {
            match line.as_str() {
                "a=sendrecv" => *line = "a=sendonly".to_owned(),
                "a=recvonly" => *line = "a=inactive".to_owned(),
                "a=sendonly" | "a=inactive" => {}
                _ => continue,
            }
            has_direction = true;
        }
        if !has_direction {
            lines.push("a=sendonly".to_owned());
        }
    })
}

/// A subscriber's answer as the engine should see it: without candidates.
pub fn subscriber_answer(text: &str) -> String {
    rewrite(text, |_, lines| lines.retain(|line| !is_candidate(line)))
}

/// The engine's answer to a publisher as the client should see it: no stream of ours is announced (we send
/// none), and a section without a common codec is rejected (RFC 3264 §6) and leaves the bundle.
pub fn publisher_answer(text: &str) -> String {
    let mut rejected = vec![];
    let answer = rewrite(text, |media, lines| {
        if !matches!(media, Media::Audio | Media::Video) {
            return;
        }
        let ours = ["a=msid:", "a=ssrc:", "a=ssrc-group:"];
        lines.retain(|line| !ours.iter().any(|name| line.starts_with(name)));
        if lines.iter().any(|line| line.starts_with("a=rtpmap:")) {
            return;
        }
        if let Some(first) = lines.first_mut() {
            let mut words: Vec<&str> = first.split(' ').collect();
            if let Some(port) = words.get_mut(1) {
                *port = "0";
            }
            *first = words.join(" ");
        }
        rejected.extend(value(lines, "a=mid:").map(str::to_owned));
    });
    if rejected.is_empty() {
        return answer;
    }
    let mut out = String::with_capacity(answer.len());
    for line in answer.lines() {
        match line.strip_prefix("a=group:BUNDLE") {
            Some(mids) => {
                out.push_str("a=group:BUNDLE");
                for mid in mids.split_whitespace().filter(|mid| !rejected.iter().any(|r| r == mid)) {
                    out.push(' ');
                    out.push_str(mid);
                }
            }
            None => out.push_str(line),
        }
        out.push_str("\r\n");
    }
    out
}

fn is_candidate(line: &str) -> bool {
    line.starts_with("a=candidate:") || line.starts_with("a=end-of-candidates")
}

/// The lines of a description: those of the session, and those of each section with its `m=` line first.
struct Split<'a> {
    session: Vec<&'a str>,
    sections: Vec<Vec<&'a str>>,
}

impl<'a> Split<'a> {
    fn of(text: &'a str) -> Self {
        let mut split = Self { session: vec![], sections: vec![] };
        for line in text.lines() {
            if line.starts_with("m=") {
                split.sections.push(vec![line]);
            } else if let Some(section) = split.sections.last_mut() {
                section.push(line);
            } else {
                split.session.push(line);
            }
        }
        split
    }
}

/// Rewrites each section's lines; the session's lines stay, except candidates, which belong to sections.
fn rewrite(text: &str, mut change: impl FnMut(Media, &mut Vec<String>)) -> String {
    let split = Split::of(text);
    let mut out = String::with_capacity(text.len() + 64);
    let mut push = |line: &str| {
        out.push_str(line);
        out.push_str("\r\n");
    };
    split.session.iter().for_each(|line| push(line));
    for lines in &split.sections {
        let mut lines: Vec<String> = lines.iter().map(|line| (*line).to_owned()).collect();
        let media = lines.first().map_or(Media::Other, |line| media(line));
        change(media, &mut lines);
        lines.iter().for_each(|line| push(line));
    }
    out
}

fn media(line: &str) -> Media {
    match line.strip_prefix("m=").and_then(|rest| rest.split(' ').next()) {
        Some("audio") => Media::Audio,
        Some("video") => Media::Video,
        Some("application") => Media::Application,
        _ => Media::Other,
    }
}

fn value<'a>(lines: &'a [impl AsRef<str>], name: &str) -> Option<&'a str> {
    lines.iter().find_map(|line| line.as_ref().strip_prefix(name)).map(str::trim)
}

fn read(index: usize, lines: &[&str], bundled: &[&str]) -> Result<Section, SdpError> {
    let first = lines.first().copied().unwrap_or_default();
    let media = media(first);
    let mid = value(lines, "a=mid:").ok_or(SdpError::NoMid(index))?;
    let is_token = |c: u8| c.is_ascii_alphanumeric() || c == b'_';
    if mid.is_empty() || mid.len() > MAX_MID || !mid.bytes().all(is_token) {
        return Err(SdpError::BadMid(index));
    }
    let mut words = first.split_whitespace().skip(1);
    let port = words.next().unwrap_or("0");
    let payload_types: Vec<&str> = words.skip(1).take(MAX_CODECS).collect();
    let direction = lines
        .iter()
        .find_map(|line| match *line {
            "a=sendrecv" => Some(Direction::SendRecv),
            "a=sendonly" => Some(Direction::SendOnly),
            "a=recvonly" => Some(Direction::RecvOnly),
            "a=inactive" => Some(Direction::Inactive),
            _ => None,
        })
        .unwrap_or(Direction::SendRecv);
    let rids = rids(lines);
    if rids.len() > MAX_RIDS {
        return Err(SdpError::TooManyRids(index));
    }
    Ok(Section {
        mid: mid.to_owned(),
        media,
        rejected: port == "0" && !bundled.contains(&mid),
        direction,
        track_id: track_id(lines),
        mimes: mimes(media, lines, &payload_types),
        rids,
        announces_ssrcs: lines.iter().any(|line| line.starts_with("a=ssrc:")),
    })
}

fn track_id(lines: &[&str]) -> Option<String> {
    let msid = value(lines, "a=msid:").or_else(|| {
        let attributes = lines.iter().filter_map(|line| line.strip_prefix("a=ssrc:"));
        attributes.filter_map(|rest| rest.split_once(' ')).find_map(|(_, attr)| attr.strip_prefix("msid:"))
    })?;
    let mut tokens = msid.split_whitespace();
    let first = tokens.next()?;
    Some(tokens.next().unwrap_or(first).to_owned())
}

fn mimes(media: Media, lines: &[&str], payload_types: &[&str]) -> Vec<String> {
    let kind = match media {
        Media::Audio => "audio",
        Media::Video => "video",
        Media::Application | Media::Other => return vec![],
    };
    let maps: Vec<(&str, &str)> = lines
        .iter()
        .filter_map(|line| line.strip_prefix("a=rtpmap:")?.split_once(' '))
        .take(2 * MAX_CODECS)
        .collect();
    let helpers = ["rtx", "red", "ulpfec", "flexfec-03", "telephone-event", "CN"];
    let mut mimes: Vec<String> = vec![];
    for payload_type in payload_types {
        let Some((_, encoding)) = maps.iter().find(|(pt, _)| pt == payload_type) else { continue };
        let name = encoding.split('/').next().unwrap_or_default();
        let mime = format!("{kind}/{name}");
        if !helpers.iter().any(|helper| helper.eq_ignore_ascii_case(name)) && !mimes.contains(&mime) {
            mimes.push(mime);
        }
    }
    mimes
}

/// The layers that the writer sends: in the order of `a=simulcast`, else of its `a=rid` lines. Paused layers
/// (`~`, RFC 8853 §5.1) count: they may be resumed without an offer.
fn rids(lines: &[&str]) -> Vec<String> {
    let simulcast = lines.iter().filter_map(|line| line.strip_prefix("a=simulcast:")).find_map(|value| {
        let mut words = value.split_whitespace();
        words.find(|word| *word == "send")?;
        words.next()
    });
    match simulcast {
        Some(list) => list
            .split(';')
            .filter_map(|alternatives| alternatives.split(',').next())
            .map(|rid| rid.trim_start_matches('~').to_owned())
            .filter(|rid| !rid.is_empty())
            .collect(),
        None => lines
            .iter()
            .filter_map(|line| line.strip_prefix("a=rid:")?.split_once(' '))
            .filter(|(_, rest)| rest.split_whitespace().next() == Some("send"))
            .map(|(rid, _)| rid.to_owned())
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const OFFER: &str = "v=0\r\no=- 1 2 IN IP4 127.0.0.1\r\ns=-\r\nt=0 0\r\na=group:BUNDLE 0 1 2\r\n\
        m=application 9 UDP/DTLS/SCTP webrtc-datachannel\r\na=mid:0\r\na=candidate:1 1 udp 1 x.local 9 typ host\r\n\
        m=audio 9 UDP/TLS/RTP/SAVPF 111 63 9\r\na=rtpmap:111 opus/48000/2\r\na=rtpmap:63 red/48000/2\r\n\
        a=rtpmap:9 G722/8000\r\na=mid:1\r\na=msid:stream track-a\r\na=sendrecv\r\na=ssrc:1 cname:x\r\n\
        m=video 9 UDP/TLS/RTP/SAVPF 102 96 97\r\na=rtpmap:96 VP8/90000\r\na=rtpmap:97 rtx/90000\r\n\
        a=rtpmap:102 H264/90000\r\na=mid:2\r\na=ssrc:7 msid:s track-v\r\na=rid:f send\r\na=rid:q send\r\n\
        a=rid:h send\r\na=simulcast:send q;~h;f,x\r\n";

    #[test]
    fn reads_what_chromium_writes() {
        let sections = sections(OFFER).unwrap();
        assert_eq!(sections.iter().map(|s| s.mid.as_str()).collect::<Vec<_>>(), ["0", "1", "2"]);
        assert_eq!(sections[0].media, Media::Application);
        assert!(sections[0].mimes.is_empty());
        assert_eq!(sections[1].track_id.as_deref(), Some("track-a"));
        assert_eq!(sections[1].mimes, ["audio/opus", "audio/G722"]);
        assert!(sections[1].direction.sends() && sections[1].announces_ssrcs && !sections[1].rejected);
        assert_eq!(sections[2].track_id.as_deref(), Some("track-v"));
        assert_eq!(sections[2].mimes, ["video/H264", "video/VP8"]);
        assert_eq!(sections[2].rids, ["q", "h", "f"]);
        assert_eq!(sections[2].direction, Direction::SendRecv);
    }

    #[test]
    fn an_offer_for_the_engine_only_sends_and_has_no_candidates() {
        let offer = publisher_offer(OFFER);
        assert!(!offer.contains("candidate"));
        let sections = sections(&offer).unwrap();
        assert!(sections[1..].iter().all(|s| s.direction == Direction::SendOnly));
        assert_eq!(offer.matches("a=sendonly").count(), 2);
        assert!(publisher_offer("m=video 9 X 1\r\na=recvonly\r\n").contains("a=inactive"));
    }

    #[test]
    fn a_section_without_a_codec_is_rejected_and_leaves_the_bundle() {
        let answer = "v=0\r\na=group:BUNDLE 0 1 2\r\nm=application 9 UDP/DTLS/SCTP webrtc-datachannel\r\n\
            a=mid:0\r\nm=video 9 UDP/TLS/RTP/SAVPF 0\r\na=mid:1\r\na=msid:- x\r\n\
            m=audio 9 UDP/TLS/RTP/SAVPF 111\r\na=rtpmap:111 opus/48000/2\r\na=mid:2\r\na=ssrc:1 cname:x\r\n";
        let answer = publisher_answer(answer);
        assert!(answer.contains("a=group:BUNDLE 0 2\r\n"));
        assert!(answer.contains("m=video 0 UDP/TLS/RTP/SAVPF 0\r\n"));
        assert!(!answer.contains("msid") && !answer.contains("ssrc"));
        let sections = sections(&answer).unwrap();
        assert!(sections[1].rejected && !sections[2].rejected);
    }

    #[test]
    fn bad_descriptions_are_refused() {
        assert_eq!(sections("v=0\r\n"), Err(SdpError::Empty));
        assert_eq!(sections("m=audio 9 X 1\r\n"), Err(SdpError::NoMid(0)));
        assert_eq!(sections("m=audio 9 X 1\r\na=mid:a-b\r\n"), Err(SdpError::BadMid(0)));
        assert_eq!(
            sections("m=audio 9 X 1\r\na=mid:a\r\nm=audio 9 X 1\r\na=mid:a\r\n"),
            Err(SdpError::RepeatedMid("a".to_owned()))
        );
        let many: String = (0..=MAX_SECTIONS).map(|i| format!("m=audio 9 X 1\r\na=mid:{i}\r\n")).collect();
        assert_eq!(sections(&many), Err(SdpError::TooManySections));
        let long = " ".repeat(MAX_BYTES + 1);
        assert_eq!(sections(&long), Err(SdpError::TooLong(MAX_BYTES + 1)));
        let layers = "m=video 9 X 1\r\na=mid:a\r\na=simulcast:send a;b;c;d;e\r\n";
        assert_eq!(sections(layers), Err(SdpError::TooManyRids(0)));
    }

    fn lines() -> impl Strategy<Value = String> {
        let known = prop_oneof![
            Just("m=audio 9 UDP/TLS/RTP/SAVPF 111".to_owned()),
            Just("m=video".to_owned()),
            Just("m=".to_owned()),
            Just("a=recvonly".to_owned()),
            Just("a=msid:".to_owned()),
            Just("a=group:BUNDLE".to_owned()),
            "a=mid:[0-9a-z]{0,3}",
            "a=rtpmap:[0-9]{0,3}( [a-z/0-9]{0,9})?",
            "a=(rid|simulcast):[a-z~;, ]{0,20}",
            "a=ssrc:[0-9]{0,3}( msid:[a-z ]{0,5})?",
            any::<String>(),
        ];
        proptest::collection::vec(known, 0..40).prop_map(|lines| lines.join("\r\n"))
    }

    proptest! {
        #[test]
        fn never_panics(text in lines()) {
            let _ = sections(&text);
            let _ = publisher_offer(&text);
            let _ = subscriber_answer(&text);
            let _ = publisher_answer(&text);
        }

        #[test]
        fn adapting_twice_changes_nothing_more(text in lines()) {
            let offer = publisher_offer(&text);
            prop_assert_eq!(publisher_offer(&offer), offer);
            let answer = publisher_answer(&text);
            prop_assert_eq!(publisher_answer(&answer), answer);
        }

        #[test]
        fn adapting_keeps_the_sections(text in lines()) {
            if let (Ok(before), Ok(after)) = (sections(&text), sections(&publisher_offer(&text))) {
                let names = |s: &[Section]| s.iter().map(|s| (s.mid.clone(), s.mimes.clone())).collect::<Vec<_>>();
                prop_assert_eq!(names(&before), names(&after));
                let is_media = |s: &&Section| matches!(s.media, Media::Audio | Media::Video);
                prop_assert!(after.iter().filter(is_media).all(|s| s.direction != Direction::RecvOnly));
            }
        }
    }
}
