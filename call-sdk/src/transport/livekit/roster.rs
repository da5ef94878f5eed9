//! The participants in the SFU room and their tracks, by the SFU's updates.

use std::collections::{BTreeMap, HashMap};

use livekit_protocol as proto;

use crate::{
    identity::ParticipantIdentity,
    media::TrackSource,
    transport::{RemoteTrack, Speaker, TrackSid, TransportEvent, rtc::engine::codec_of_mime},
};

/// More participants than any call has; a hostile SFU must not fill memory.
const MOST_PARTICIPANTS: usize = 10_000;
/// More tracks than any participant publishes.
const MOST_TRACKS: usize = 64;

/// Characters of a track's name that are kept.
const LONGEST_NAME: usize = 256;

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
    let source = match info.source() {
        proto::TrackSource::Camera => TrackSource::Camera,
        proto::TrackSource::Microphone => TrackSource::Microphone,
        proto::TrackSource::ScreenShare => TrackSource::ScreenShare,
        proto::TrackSource::ScreenShareAudio => TrackSource::ScreenShareAudio,
        proto::TrackSource::Unknown => TrackSource::Unknown,
    };
    let codec = codec_of_mime(&info.mime_type);
    let announced_encrypted = info.encryption() != proto::encryption::Type::None;
    let mut track = RemoteTrack::new(TrackSid(info.sid), source);
    track.codec = codec;
    track.announced_encrypted = announced_encrypted;
    track.muted = info.muted;
    track.dimensions = (info.width, info.height);
    track.name = info.name.chars().take(LONGEST_NAME).collect();
    Some(track)
}

/// The participants other than us.
#[derive(Debug, Default)]
pub(super) struct Roster {
    /// Our identity; none before the first join.
    own: Option<ParticipantIdentity>,
    own_sid: String,
    others: BTreeMap<ParticipantIdentity, Known>,
    /// Loudness of the active speakers, by participant sid.
    speaking: HashMap<String, f32>,
}

#[derive(Debug)]
struct Known {
    sid: String,
    version: u32,
    tracks: BTreeMap<TrackSid, RemoteTrack>,
}

impl Roster {
    /// Takes the whole room, as the join response lists it; participants that are missing have left.
    pub(super) fn snapshot(
        &mut self,
        own: ParticipantIdentity,
        own_sid: String,
        others: Vec<ParticipantView>,
    ) -> Vec<TransportEvent> {
        self.own = Some(own);
        self.own_sid = own_sid;
        self.speaking.clear();
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
        if known.sid != view.sid {
            self.speaking.remove(&known.sid);
        }
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

    /// The participant with this sid.
    pub(super) fn identity(&self, sid: &str) -> Option<&ParticipantIdentity> {
        if self.own_sid == sid {
            return self.own.as_ref();
        }
        self.others.iter().find(|(_, known)| known.sid == sid).map(|(identity, _)| identity)
    }

    /// All remote tracks.
    pub(super) fn tracks(&self) -> impl Iterator<Item = &TrackSid> {
        self.others.values().flat_map(|known| known.tracks.keys())
    }

    pub(super) fn has_track(&self, sid: &TrackSid) -> bool {
        self.others.values().any(|known| known.tracks.contains_key(sid))
    }

    /// Takes changes of speakers; returns all active ones, loudest first, if any of them is known.
    pub(super) fn speakers(&mut self, changes: &[proto::SpeakerInfo]) -> Option<Vec<Speaker>> {
        let mut changed = false;
        for change in changes {
            if change.active && self.identity(&change.sid).is_some() {
                self.speaking.insert(change.sid.clone(), change.level.clamp(0.0, 1.0));
                changed = true;
            } else {
                changed |= self.speaking.remove(&change.sid).is_some();
            }
        }
        changed.then(|| {
            let mut speakers: Vec<_> = self
                .speaking
                .iter()
                .filter_map(|(sid, level)| {
                    Some(Speaker { identity: self.identity(sid)?.clone(), level: *level })
                })
                .collect();
            speakers.sort_by(|a, b| b.level.total_cmp(&a.level).then_with(|| a.identity.cmp(&b.identity)));
            speakers
        })
    }

    fn remove(&mut self, identity: &ParticipantIdentity) -> Vec<TransportEvent> {
        let Some(known) = self.others.remove(identity) else { return Vec::new() };
        self.speaking.remove(&known.sid);
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
    use crate::media::Codec;

    fn id(name: &str) -> ParticipantIdentity {
        ParticipantIdentity(name.to_owned())
    }

    fn track(sid: &str, muted: bool) -> RemoteTrack {
        let mut track = RemoteTrack::new(TrackSid(sid.to_owned()), TrackSource::Camera);
        track.codec = Some(Codec::Vp8);
        track.announced_encrypted = true;
        track.muted = muted;
        track
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
        roster.snapshot(id("me"), "PA_0".to_owned(), others)
    }

    #[test]
    fn participant_changes_become_events() {
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
    fn rejoin_with_same_identity_replaces_session() {
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
    fn snapshot_reports_missing_participants_as_left() {
        let mut roster = Roster::default();
        joined(
            &mut roster,
            vec![view("bob", "PA_1", 9, &[track("TR_1", false)]), view("eve", "PA_2", 1, &[])],
        );
        let events = joined(&mut roster, vec![view("bob", "PA_1", 2, &[track("TR_1", false)])]);
        assert_eq!(events, [TransportEvent::ParticipantLeft { identity: id("eve") }]);
    }

    #[test]
    fn own_participant_is_ignored() {
        let mut roster = Roster::default();
        assert_eq!(joined(&mut roster, vec![view("me", "PA_0", 1, &[track("TR_9", false)])]), []);
    }

    #[test]
    fn speakers_are_sorted_and_known() {
        let mut roster = Roster::default();
        joined(&mut roster, vec![view("bob", "PA_1", 1, &[]), view("eve", "PA_2", 1, &[])]);
        let speaks = |sid: &str, level, active| proto::SpeakerInfo { sid: sid.to_owned(), level, active };
        let names = |speakers: Option<Vec<Speaker>>| {
            speakers.map(|list| list.into_iter().map(|s| s.identity.0).collect::<Vec<_>>())
        };
        let loud = roster.speakers(&[
            speaks("PA_1", 0.2, true),
            speaks("PA_2", 7.0, true),
            speaks("PA_0", f32::NAN, true),
            speaks("PA_9", 1.0, true),
        ]);
        assert_eq!(
            names(loud).map(|mut list| {
                list.sort();
                list
            }),
            Some(vec!["bob".into(), "eve".into(), "me".into()])
        );
        assert_eq!(
            names(roster.speakers(&[speaks("PA_0", 0.0, false)])),
            Some(vec!["eve".into(), "bob".into()])
        );
        assert_eq!(roster.speakers(&[speaks("PA_9", 1.0, true)]), None, "unknown participant");
        roster.update(ParticipantView { gone: true, ..view("eve", "PA_2", 2, &[]) });
        assert_eq!(names(roster.speakers(&[speaks("PA_1", 0.5, true)])), Some(vec!["bob".into()]));
    }

    proptest! {
        /// The events alone tell exactly the present participants and tracks.
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
