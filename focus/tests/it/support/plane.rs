//! A scripted media plane: no packets, but answers and offers as a real one gives them.

use std::collections::{BTreeMap, BTreeSet};

use antiphon_focus::plane::{Command, Event, MediaKind, OfferedSection, PeerId, PeerRole, TrackKey};

/// Turns commands into events. Its "SDP" of an offer lists the sections, one a line: `mid kind id`, and a `-` in
/// front of those that do not send.
#[derive(Debug, Default)]
pub(crate) struct ScriptedPlane {
    subscribers: BTreeMap<PeerId, BTreeSet<TrackKey>>,
    /// Subscribers whose answer is awaited, and whether there is more to offer since.
    offering: BTreeMap<PeerId, bool>,
    pub(crate) commands: Vec<String>,
}

impl ScriptedPlane {
    pub(crate) fn handle(&mut self, command: Command) -> Vec<Event> {
        self.commands.push(format!("{command:?}"));
        match command {
            Command::AddPeer { peer, role: PeerRole::Subscriber } => {
                self.subscribers.insert(peer, BTreeSet::new());
                self.offer(peer)
            }
            Command::RemovePeer { peer } => {
                self.subscribers.remove(&peer);
                self.offering.remove(&peer);
                vec![]
            }
            Command::ApplyOffer { peer, sdp } if sdp == "garbage" => {
                vec![Event::Rejected { peer, reason: "not SDP".into() }]
            }
            Command::ApplyOffer { peer, sdp } => {
                let sections = sdp.lines().map(section).collect();
                vec![Event::Answered { peer, sdp: "answer".into(), sections }]
            }
            Command::ApplyAnswer { peer, .. } => {
                let more = self.offering.remove(&peer).unwrap_or(false);
                let mut events = vec![Event::Connected { peer }];
                if more {
                    events.extend(self.offer(peer));
                }
                events
            }
            Command::Subscribe { peer, track, .. } => {
                self.subscribers.entry(peer).or_default().insert(track);
                self.offer(peer)
            }
            Command::Unsubscribe { peer, track } => {
                self.subscribers.entry(peer).or_default().remove(&track);
                self.offer(peer)
            }
            Command::Unpublish { track } => {
                let peers: Vec<_> = self.subscribers.keys().copied().collect();
                peers
                    .into_iter()
                    .filter(|peer| self.subscribers.get_mut(peer).is_some_and(|tracks| tracks.remove(&track)))
                    .collect::<Vec<_>>()
                    .into_iter()
                    .flat_map(|peer| self.offer(peer))
                    .collect()
            }
            _ => vec![],
        }
    }

    fn offer(&mut self, peer: PeerId) -> Vec<Event> {
        if let Some(more) = self.offering.get_mut(&peer) {
            *more = true;
            return vec![];
        }
        self.offering.insert(peer, false);
        let mids = self.subscribers[&peer].iter().map(|track| (track.0.to_string(), *track)).collect();
        vec![Event::Offer { peer, sdp: "offer".into(), mids }]
    }
}

fn section(line: &str) -> OfferedSection {
    let (sends, line) = match line.strip_prefix('-') {
        Some(line) => (false, line),
        None => (true, line),
    };
    let mut words = line.split(' ');
    let mut word = || words.next().unwrap_or_default().to_owned();
    let mid = word();
    let video = word() == "video";
    OfferedSection {
        mid,
        kind: if video { MediaKind::Video } else { MediaKind::Audio },
        sends,
        track_id: Some(word()).filter(|id| !id.is_empty()),
        mimes: vec![if video { "video/VP8" } else { "audio/opus" }.into()],
        rids: if video { vec!["f".into(), "h".into(), "q".into()] } else { vec![] },
    }
}
