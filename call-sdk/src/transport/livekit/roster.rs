//! Who is in the SFU room and what they publish, by the SFU's updates.

use std::collections::BTreeMap;

use livekit_protocol as proto;

use crate::{
    media::{Codec, TrackSource},
    member::ParticipantIdentity,
    transport::{RemoteTrack, TrackSid, TransportEvent},
};

/// More participants than any call has; a hostile SFU must not fill memory.
const MOST_PARTICIPANTS: usize = 10_000;
/// More tracks than any participant publishes.
const MOST_TRACKS: usize = 64;

/// What an update says about one participant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ParticipantView {
    pub(super) sid: String,
    pub(super) identity: ParticipantIdentity,
    /// Grows with every change of this sid.
    pub(super) version: u32,
    pub(super) gone: bool,
    pub(super) tracks: Vec<RemoteTrack>,
}

impl From<proto::ParticipantInfo> for ParticipantView {
    fn from(info: proto::ParticipantInfo) -> Self {
        let gone = info.state() == proto::participant_info::State::Disconnected;
        Self {
            sid: info.sid,
            identity: ParticipantIdentity(info.identity),
            version: info.version,
            gone,
            tracks: info.tracks.into_iter().filter_map(remote_track).take(MOST_TRACKS).collect(),
        }
    }
}

fn remote_track(info: proto::TrackInfo) -> Option<RemoteTrack> {
    if info.r#type() == proto::TrackType::Data || info.sid.is_empty() {
        return None;
    }
    Some(RemoteTrack {
        source: match info.source() {
            proto::TrackSource::Camera => TrackSource::Camera,
            proto::TrackSource::Microphone => TrackSource::Microphone,
            proto::TrackSource::ScreenShare => TrackSource::ScreenShare,
            proto::TrackSource::ScreenShareAudio => TrackSource::ScreenShareAudio,
            proto::TrackSource::Unknown => TrackSource::Unknown,
        },
        codec: codec_of_mime(&info.mime_type),
        announced_encrypted: info.encryption() != proto::encryption::Type::None,
        muted: info.muted,
        sid: TrackSid(info.sid),
    })
}

/// The codec that a MIME type such as `video/VP8` names.
pub(super) fn codec_of_mime(mime: &str) -> Option<Codec> {
    const NAMES: [(&str, Codec); 7] = [
        ("audio/opus", Codec::Opus),
        // Opus with redundancy; it arrives as plain Opus, as RED is never negotiated here.
        ("audio/red", Codec::Opus),
        ("video/vp8", Codec::Vp8),
        ("video/vp9", Codec::Vp9),
        ("video/h264", Codec::H264),
        ("video/h265", Codec::H265),
        ("video/av1", Codec::Av1),
    ];
    NAMES.iter().find(|(name, _)| mime.eq_ignore_ascii_case(name)).map(|(_, codec)| *codec)
}

/// The participants other than us.
#[derive(Debug, Default)]
pub(super) struct Roster {
    /// Our identity; none before the first join.
    own: Option<ParticipantIdentity>,
    others: BTreeMap<ParticipantIdentity, Known>,
}

#[derive(Debug)]
struct Known {
    sid: String,
    version: u32,
    tracks: BTreeMap<TrackSid, RemoteTrack>,
}

impl Roster {
    /// Takes the whole room, as a join answers it; who is not in it has left.
    pub(super) fn snapshot(
        &mut self,
        own: ParticipantIdentity,
        others: Vec<ParticipantView>,
    ) -> Vec<TransportEvent> {
        self.own = Some(own);
        let missing: Vec<_> = self
            .others
            .keys()
            .filter(|identity| !others.iter().any(|view| view.identity == **identity && !view.gone))
            .cloned()
            .collect();
        let mut events: Vec<_> = missing.into_iter().flat_map(|identity| self.remove(&identity)).collect();
        for known in self.others.values_mut() {
            // Versions count from the start again if the SFU lost its memory.
            known.version = 0;
        }
        events.extend(others.into_iter().flat_map(|view| self.update(view)));
        events
    }

    /// Takes one participant's new state.
    pub(super) fn update(&mut self, view: ParticipantView) -> Vec<TransportEvent> {
        if self.own.as_ref() == Some(&view.identity) || view.identity.0.is_empty() {
            return Vec::new();
        }
        let full = self.others.len() >= MOST_PARTICIPANTS;
        let known = self.others.get_mut(&view.identity);
        if view.gone {
            // The end of an older session of somebody who is back under a new sid says nothing.
            return match known {
                Some(known) if known.sid == view.sid => self.remove(&view.identity),
                _ => Vec::new(),
            };
        }
        let mut events = Vec::new();
        let known = match known {
            Some(known) => {
                if known.sid == view.sid && view.version < known.version {
                    return Vec::new();
                }
                known
            }
            None if full => return Vec::new(),
            None => {
                events.push(TransportEvent::ParticipantJoined { identity: view.identity.clone() });
                self.others.entry(view.identity.clone()).or_insert_with(|| Known {
                    sid: String::new(),
                    version: 0,
                    tracks: BTreeMap::new(),
                })
            }
        };
        known.sid = view.sid;
        known.version = view.version;
        let identity = &view.identity;
        known.tracks.retain(|sid, _| {
            let stays = view.tracks.iter().any(|track| track.sid == *sid);
            if !stays {
                events.push(TransportEvent::TrackEnded { identity: identity.clone(), sid: sid.clone() });
            }
            stays
        });
        for track in view.tracks {
            if known.tracks.get(&track.sid) != Some(&track) {
                known.tracks.insert(track.sid.clone(), track.clone());
                events.push(TransportEvent::TrackUpdated { identity: identity.clone(), track });
            }
        }
        events
    }

    fn remove(&mut self, identity: &ParticipantIdentity) -> Vec<TransportEvent> {
        let Some(known) = self.others.remove(identity) else { return Vec::new() };
        let ended = known
            .tracks
            .into_keys()
            .map(|sid| TransportEvent::TrackEnded { identity: identity.clone(), sid });
        ended.chain([TransportEvent::ParticipantLeft { identity: identity.clone() }]).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    use super::*;

    fn id(name: &str) -> ParticipantIdentity {
        ParticipantIdentity(name.to_owned())
    }

    fn track(sid: &str, muted: bool) -> RemoteTrack {
        RemoteTrack {
            sid: TrackSid(sid.to_owned()),
            source: TrackSource::Camera,
            codec: Some(Codec::Vp8),
            announced_encrypted: true,
            muted,
        }
    }

    fn view(identity: &str, sid: &str, version: u32, tracks: &[RemoteTrack]) -> ParticipantView {
        ParticipantView {
            sid: sid.to_owned(),
            identity: id(identity),
            version,
            gone: false,
            tracks: tracks.to_vec(),
        }
    }

    fn joined(roster: &mut Roster, others: Vec<ParticipantView>) -> Vec<TransportEvent> {
        roster.snapshot(id("me"), others)
    }

    #[test]
    fn join_publish_mute_end_leave() {
        let mut roster = Roster::default();
        assert_eq!(
            joined(&mut roster, vec![view("bob", "PA_1", 3, &[])]),
            [TransportEvent::ParticipantJoined { identity: id("bob") }]
        );
        let published = roster.update(view("bob", "PA_1", 4, &[track("TR_1", false)]));
        assert_eq!(
            published,
            [TransportEvent::TrackUpdated { identity: id("bob"), track: track("TR_1", false) }]
        );
        assert_eq!(roster.update(view("bob", "PA_1", 4, &[track("TR_1", false)])), [], "nothing new");
        assert_eq!(roster.update(view("bob", "PA_1", 5, &[track("TR_1", true)])).len(), 1);
        assert_eq!(roster.update(view("bob", "PA_1", 4, &[])), [], "an older version");
        let ended = roster.update(view("bob", "PA_1", 6, &[]));
        assert_eq!(ended, [TransportEvent::TrackEnded { identity: id("bob"), sid: TrackSid("TR_1".into()) }]);
        let gone = ParticipantView { gone: true, ..view("bob", "PA_1", 7, &[]) };
        assert_eq!(roster.update(gone), [TransportEvent::ParticipantLeft { identity: id("bob") }]);
    }

    #[test]
    fn a_rejoin_under_the_same_identity_replaces_the_session() {
        let mut roster = Roster::default();
        joined(&mut roster, vec![view("bob", "PA_1", 9, &[track("TR_1", false)])]);
        let events = roster.update(view("bob", "PA_2", 1, &[]));
        assert_eq!(
            events,
            [TransportEvent::TrackEnded { identity: id("bob"), sid: TrackSid("TR_1".into()) }]
        );
        let late = ParticipantView { gone: true, ..view("bob", "PA_1", 10, &[]) };
        assert_eq!(roster.update(late), [], "the old session's end");
    }

    #[test]
    fn a_snapshot_tells_who_left_meanwhile() {
        let mut roster = Roster::default();
        joined(
            &mut roster,
            vec![view("bob", "PA_1", 9, &[track("TR_1", false)]), view("eve", "PA_2", 1, &[])],
        );
        let events = joined(&mut roster, vec![view("bob", "PA_1", 2, &[track("TR_1", false)])]);
        assert_eq!(events, [TransportEvent::ParticipantLeft { identity: id("eve") }]);
    }

    #[test]
    fn we_are_not_among_the_others() {
        let mut roster = Roster::default();
        assert_eq!(joined(&mut roster, vec![view("me", "PA_0", 1, &[track("TR_9", false)])]), []);
    }

    proptest! {
        /// Whoever follows the events knows exactly the present participants and tracks.
        #[test]
        fn events_and_state_agree(updates in prop::collection::vec(
            (0_u8..3, 0_u8..3, 0_u32..6, any::<bool>(), prop::collection::vec((0_u8..4, any::<bool>()), 0..4), any::<bool>()), 0..60)) {
            let mut roster = Roster::default();
            joined(&mut roster, vec![]);
            let mut present = BTreeSet::new();
            let mut tracks = BTreeSet::new();
            for (who, session, version, gone, list, snapshot) in updates {
                let list: Vec<_> = list.iter().map(|(n, m)| track(&format!("TR_{who}{n}"), *m)).collect();
                let view = ParticipantView { gone, ..view(&format!("u{who}"), &format!("PA_{session}"), version, &list) };
                let events = if snapshot { joined(&mut roster, vec![view]) } else { roster.update(view) };
                for event in events {
                    match event {
                        TransportEvent::ParticipantJoined { identity } => prop_assert!(present.insert(identity)),
                        TransportEvent::ParticipantLeft { identity } => {
                            prop_assert!(!tracks.iter().any(|(owner, _)| *owner == identity));
                            prop_assert!(present.remove(&identity));
                        }
                        TransportEvent::TrackUpdated { identity, track } => {
                            prop_assert!(present.contains(&identity));
                            tracks.insert((identity, track.sid));
                        }
                        TransportEvent::TrackEnded { identity, sid } => prop_assert!(tracks.remove(&(identity, sid))),
                        other => prop_assert!(false, "{:?}", other),
                    }
                }
                prop_assert_eq!(&present, &roster.others.keys().cloned().collect());
            }
        }
    }
}
