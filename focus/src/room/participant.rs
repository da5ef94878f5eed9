//! One participant: who it is, what it may do, what it publishes and what it gets.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::time::Instant;

use livekit_protocol::{
    self as proto, AddTrackRequest, ClientInfo, ParticipantInfo, ParticipantPermission, TrackSource,
    participant_info::{Kind, State},
};

use super::ids::{Identity, ParticipantSid, SessionId};
use super::quality::Quality;
use super::track::{Pending, Track};
use super::{Join, MAX_ATTRIBUTES, MAX_METADATA, Now};
use crate::plane::{OfferedSection, PeerId, TrackKey};
use crate::token::{Claims, VideoGrant};

/// One stay of one participant in a room.
#[derive(Debug)]
pub(crate) struct Participant {
    pub(crate) session: SessionId,
    pub(crate) sid: ParticipantSid,
    pub(crate) identity: Identity,
    pub(crate) name: String,
    pub(crate) metadata: String,
    pub(crate) attributes: HashMap<String, String>,
    pub(crate) kind: Kind,
    pub(crate) permission: ParticipantPermission,
    pub(crate) claims: Claims,
    pub(crate) client: ClientInfo,
    pub(crate) auto_subscribe: bool,
    pub(crate) adaptive_stream: bool,
    pub(crate) state: State,
    pub(crate) version: u32,
    pub(crate) joined: Now,
    pub(crate) refresh_at: Instant,

    pub(crate) publisher: PeerId,
    /// Made when the participant may subscribe.
    pub(crate) subscriber: Option<PeerId>,
    /// Ids of offers that the plane has not answered yet, oldest first.
    pub(crate) offers: VecDeque<u32>,
    pub(crate) sub_offer_id: u32,
    /// When our last offer was sent; `None` once it is answered.
    pub(crate) sub_offer_at: Option<Instant>,
    /// The media sections of its last answered offer.
    pub(crate) sections: Vec<OfferedSection>,

    pub(crate) pending: Vec<Pending>,
    pub(crate) queued: Vec<AddTrackRequest>,
    /// Its published tracks, oldest first.
    pub(crate) tracks: Vec<TrackKey>,
    /// Who may subscribe to its tracks; `None` = everybody.
    pub(crate) rules: Option<Vec<proto::TrackPermission>>,

    pub(crate) subscriptions: BTreeMap<TrackKey, Subscription>,
    /// Tracks asked for or refused by sid, against the default.
    pub(crate) wishes: HashMap<String, bool>,
    /// Tracks asked for that do not exist, and when to say so.
    pub(crate) missing: BTreeMap<String, Instant>,
    /// Tracks that the publisher does not let it have, as it was told.
    pub(crate) denied: HashSet<TrackKey>,
    pub(crate) settings: HashMap<TrackKey, TrackSettings>,

    /// Highest sequence number of a reliable data packet from it.
    pub(crate) last_sequence: u32,
}

/// A track on its way to a participant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Subscription {
    /// What the plane was last told: paused, and the highest layer.
    pub(crate) forwarding: Option<(bool, u8)>,
    /// The publisher has been told.
    pub(crate) announced: bool,
}

/// What a participant wants of a track it subscribes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TrackSettings {
    pub(crate) disabled: bool,
    pub(crate) quality: Quality,
}

impl Participant {
    pub(crate) fn new(
        now: Now,
        session: SessionId,
        sid: ParticipantSid,
        join: Join,
        peers: (PeerId, Option<PeerId>),
        offer_id: u32,
    ) -> Self {
        let Join { claims, client, auto_subscribe, adaptive_stream, .. } = join;
        Self {
            session,
            sid,
            identity: claims.identity().into(),
            name: claims.name.clone(),
            metadata: claims.metadata.clone(),
            attributes: claims.attributes.clone(),
            kind: kind(&claims.kind),
            permission: permission(&claims.video),
            claims,
            client,
            auto_subscribe,
            adaptive_stream,
            state: State::Joined,
            version: 1,
            joined: now,
            refresh_at: now.instant,
            publisher: peers.0,
            subscriber: peers.1,
            offers: VecDeque::new(),
            sub_offer_id: offer_id,
            sub_offer_at: None,
            sections: Vec::new(),
            pending: Vec::new(),
            queued: Vec::new(),
            tracks: Vec::new(),
            rules: None,
            subscriptions: BTreeMap::new(),
            wishes: HashMap::new(),
            missing: BTreeMap::new(),
            denied: HashSet::new(),
            settings: HashMap::new(),
            last_sequence: 0,
        }
    }

    /// The peer whose connection makes the participant active, and that data goes down on.
    pub(crate) fn primary(&self) -> PeerId {
        self.subscriber.unwrap_or(self.publisher)
    }

    pub(crate) fn hidden(&self) -> bool {
        self.permission.hidden
    }

    /// Notes a change that others can see.
    pub(crate) fn touch(&mut self) {
        self.version = self.version.saturating_add(1);
    }

    pub(crate) fn info(&self, tracks: &BTreeMap<TrackKey, Track>) -> ParticipantInfo {
        ParticipantInfo {
            sid: self.sid.to_string(),
            identity: self.identity.to_string(),
            state: self.state.into(),
            tracks: self.tracks.iter().filter_map(|key| tracks.get(key)).map(|t| t.info.clone()).collect(),
            metadata: self.metadata.clone(),
            joined_at: self.joined.unix_s(),
            joined_at_ms: self.joined.unix_ms(),
            name: self.name.clone(),
            version: self.version,
            permission: Some(self.permission.clone()),
            is_publisher: !self.tracks.is_empty(),
            kind: self.kind.into(),
            attributes: self.attributes.clone(),
            client_protocol: self.client.client_protocol,
            capabilities: self.client.capabilities.clone(),
            ..ParticipantInfo::default()
        }
    }

    pub(crate) fn may_publish(&self, source: i32) -> bool {
        let sources = &self.permission.can_publish_sources;
        self.permission.can_publish && (sources.is_empty() || sources.contains(&source))
    }

    /// Whether it wants a track, before anybody's permission is asked.
    pub(crate) fn wants(&self, track_sid: &str) -> bool {
        self.wishes.get(track_sid).copied().unwrap_or(self.auto_subscribe)
    }

    /// Whether its rules let `subscriber` have a track.
    pub(crate) fn allows(&self, subscriber: &Self, track_sid: &str) -> bool {
        let Some(rules) = &self.rules else { return true };
        rules.iter().any(|rule| {
            let named = if rule.participant_identity.is_empty() {
                rule.participant_sid == subscriber.sid.as_str()
            } else {
                rule.participant_identity == subscriber.identity.as_str()
            };
            named && (rule.all_tracks || rule.track_sids.iter().any(|sid| sid == track_sid))
        })
    }

    /// What it wants of a track until it says more: little, if it will say more.
    pub(crate) fn settings(&self, key: TrackKey) -> TrackSettings {
        self.settings.get(&key).copied().unwrap_or(TrackSettings {
            disabled: false,
            quality: if self.adaptive_stream { Quality::Low } else { Quality::High },
        })
    }

    /// Changes name, metadata and attributes; an empty attribute is deleted. `false` and no change if they would
    /// exceed the limits.
    pub(crate) fn describe(
        &mut self,
        name: &str,
        metadata: &str,
        attributes: &HashMap<String, String>,
    ) -> bool {
        let mut merged = self.attributes.clone();
        for (key, value) in attributes {
            if value.is_empty() {
                merged.remove(key);
            } else {
                merged.insert(key.clone(), value.clone());
            }
        }
        if name.len() > super::MAX_NAME || metadata.len() > MAX_METADATA || size(&merged) > MAX_ATTRIBUTES {
            return false;
        }
        self.attributes = merged;
        if !name.is_empty() {
            name.clone_into(&mut self.name);
        }
        if !metadata.is_empty() {
            metadata.clone_into(&mut self.metadata);
        }
        true
    }

    /// The claims of a refreshed token: what the participant is now.
    pub(crate) fn refreshed(&self, now: Now) -> Claims {
        let sources = self.permission.can_publish_sources.iter().filter_map(|source| source_name(*source));
        let life = crate::token::REFRESH_MIN_LIFE.as_secs();
        let now = now.unix.as_secs();
        Claims {
            sub: self.identity.to_string(),
            exp: Some(self.claims.exp.unwrap_or(0).max(now + life)),
            nbf: Some(now),
            iat: None,
            name: self.name.clone(),
            metadata: self.metadata.clone(),
            attributes: self.attributes.clone(),
            video: VideoGrant {
                can_publish: Some(self.permission.can_publish),
                can_subscribe: Some(self.permission.can_subscribe),
                can_publish_data: Some(self.permission.can_publish_data),
                can_publish_sources: sources.map(str::to_owned).collect(),
                can_update_own_metadata: Some(self.permission.can_update_metadata),
                hidden: self.permission.hidden,
                ..self.claims.video.clone()
            },
            ..self.claims.clone()
        }
    }
}

pub(crate) fn size(attributes: &HashMap<String, String>) -> usize {
    attributes.iter().map(|(key, value)| key.len() + value.len()).sum()
}

#[allow(deprecated, reason = "older clients read recorder and agent")]
fn permission(grant: &VideoGrant) -> ParticipantPermission {
    let can_publish = grant.can_publish.unwrap_or(true);
    ParticipantPermission {
        can_subscribe: grant.can_subscribe.unwrap_or(true),
        can_publish,
        can_publish_data: grant.can_publish_data.unwrap_or(can_publish),
        can_publish_sources: grant.can_publish_sources.iter().filter_map(|name| source(name)).collect(),
        hidden: grant.hidden,
        recorder: grant.recorder,
        can_update_metadata: grant.can_update_own_metadata.unwrap_or(false),
        agent: grant.agent,
        ..ParticipantPermission::default()
    }
}

fn kind(name: &str) -> Kind {
    Kind::from_str_name(&name.to_ascii_uppercase()).unwrap_or(Kind::Standard)
}

fn source(name: &str) -> Option<i32> {
    TrackSource::from_str_name(&name.to_ascii_uppercase()).map(i32::from)
}

fn source_name(source: i32) -> Option<&'static str> {
    match TrackSource::try_from(source).ok()? {
        TrackSource::Camera => Some("camera"),
        TrackSource::Microphone => Some("microphone"),
        TrackSource::ScreenShare => Some("screen_share"),
        TrackSource::ScreenShareAudio => Some("screen_share_audio"),
        TrackSource::Unknown => None,
    }
}
