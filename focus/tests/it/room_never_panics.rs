//! Random inputs to the rooms: nothing panics, and what clients rely on holds.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use antiphon_focus::plane::{Channel, Event, PeerId, TrackKey};
use antiphon_focus::room::SessionId;
use livekit_protocol::{self as proto, signal_request::Message as Up, signal_response::Message as Down};
use proptest::prelude::*;

use crate::support::claims;
use crate::support::machine::Machine;

#[derive(Clone, Debug)]
enum Act {
    Join(u8),
    Up(u8, Box<Up>),
    /// A message about the track that was published `n`th.
    About(u8, u8, u8),
    Bytes(u8, Vec<u8>),
    Close(u8),
    Pass(u16),
    Event(u8, u8),
    Remove(u8),
}

fn act() -> impl Strategy<Value = Act> {
    let who = 0..4u8;
    let sections =
        prop::collection::vec((any::<bool>(), 0..4u8, any::<bool>(), 0..4u8), 0..4).prop_map(|list| {
            let line = |(sends, mid, video, id): &(bool, u8, bool, u8)| {
                let kind = if *video { "video" } else { "audio" };
                format!("{}{mid} {kind} {id}", if *sends { "" } else { "-" })
            };
            list.iter().map(line).collect::<Vec<_>>().join("\n")
        });
    let offer = (any::<u32>(), sections)
        .prop_map(|(id, sdp)| Up::Offer(proto::SessionDescription { id, sdp, ..Default::default() }));
    let track = (0..4u8, 0..3i32, -1..6i32).prop_map(|(cid, r#type, source)| {
        Up::AddTrack(proto::AddTrackRequest { cid: cid.to_string(), r#type, source, ..Default::default() })
    });
    let answer = (0..3u32).prop_map(|id| Up::Answer(proto::SessionDescription { id, ..Default::default() }));
    let other = prop_oneof![
        Just(Up::Ping(1)),
        Just(Up::Leave(proto::LeaveRequest::default())),
        Just(Up::SyncState(proto::SyncState::default())),
        any::<bool>().prop_map(|all_participants| Up::SubscriptionPermission(
            proto::SubscriptionPermission { all_participants, track_permissions: vec![] }
        )),
    ];
    prop_oneof![
        3 => who.clone().prop_map(Act::Join),
        4 => (who.clone(), offer).prop_map(|(who, up)| Act::Up(who, Box::new(up))),
        4 => (who.clone(), track).prop_map(|(who, up)| Act::Up(who, Box::new(up))),
        4 => (who.clone(), answer).prop_map(|(who, up)| Act::Up(who, Box::new(up))),
        1 => (who.clone(), other).prop_map(|(who, up)| Act::Up(who, Box::new(up))),
        3 => (who.clone(), any::<u8>(), any::<u8>()).prop_map(|(who, track, what)| Act::About(who, track, what)),
        1 => (who.clone(), prop::collection::vec(any::<u8>(), 0..40)).prop_map(|(who, bytes)| Act::Bytes(who, bytes)),
        1 => who.clone().prop_map(Act::Close),
        1 => (0..20_000u16).prop_map(Act::Pass),
        1 => (any::<u8>(), any::<u8>()).prop_map(|(what, number)| Act::Event(what, number)),
        1 => who.prop_map(Act::Remove),
    ]
}

#[derive(Default)]
struct World {
    sessions: HashMap<u8, SessionId>,
    sids: Vec<String>,
}

impl World {
    fn act(&mut self, machine: &mut Machine, act: Act) {
        match act {
            Act::Join(who) => {
                let joined = machine.try_join(claims(&who.to_string(), |_| {}), |_| {});
                self.sessions.insert(who, joined.unwrap());
            }
            Act::Up(who, message) => {
                if let Some(session) = self.sessions.get(&who) {
                    machine.up(*session, *message);
                }
            }
            Act::About(who, track, what) => {
                let Some(session) = self.sessions.get(&who).copied() else { return };
                let Some(sid) = self.sids.get(usize::from(track) % self.sids.len().max(1)).cloned() else {
                    return;
                };
                let subscription = proto::UpdateSubscription {
                    track_sids: vec![sid.clone()],
                    subscribe: what.is_multiple_of(2),
                    ..Default::default()
                };
                machine.up(
                    session,
                    match what % 4 {
                        0 | 1 => Up::Subscription(subscription),
                        2 => Up::Mute(proto::MuteTrackRequest { sid, muted: what > 100 }),
                        _ => Up::TrackSetting(proto::UpdateTrackSettings {
                            track_sids: vec![sid],
                            disabled: what > 200,
                            quality: i32::from(what) - 100,
                            width: u32::from(what),
                            ..Default::default()
                        }),
                    },
                );
            }
            Act::Bytes(who, bytes) => {
                if let Some(session) = self.sessions.get(&who)
                    && let Ok(proto::SignalRequest { message: Some(message) }) =
                        prost::Message::decode(bytes.as_slice())
                {
                    machine.up(*session, message);
                }
            }
            Act::Close(who) => {
                if let Some(session) = self.sessions.remove(&who) {
                    machine.rooms.signal_closed(machine.now, session);
                    machine.settle();
                    // The shell closes nothing that is closed already.
                    machine.closed.push(session);
                }
            }
            Act::Pass(millis) => machine.pass(Duration::from_millis(u64::from(millis))),
            Act::Event(what, number) => {
                let (peer, track) = (PeerId(number.into()), TrackKey(number.into()));
                machine.event(match what % 6 {
                    0 => Event::Connected { peer },
                    1 => Event::Failed { peer, reason: "random".into() },
                    2 => Event::Data { peer, channel: Channel::Reliable, payload: vec![what, number].into() },
                    3 => Event::AudioLevel { track, level: what, active_share: f32::from(what) / 100.0 },
                    4 => Event::Offer { peer, sdp: String::new(), mids: vec![("0".into(), track)] },
                    _ => Event::Answered { peer, sdp: String::new(), sections: vec![] },
                });
            }
            Act::Remove(who) => {
                // Gone already is as good.
                let _ = machine.rooms.remove_participant(machine.now, "room", &who.to_string());
                machine.settle();
            }
        }
    }
}

/// What one client has been told.
#[derive(Default)]
struct Told {
    started: bool,
    versions: HashMap<String, u32>,
    tracks: HashSet<String>,
}

impl Told {
    fn hear(&mut self, message: &Down) {
        match message {
            Down::Join(join) => {
                assert!(!self.started, "a second JoinResponse");
                for info in join.participant.iter().chain(&join.other_participants) {
                    self.learn(info);
                }
            }
            Down::Update(update) => update.participants.iter().for_each(|info| self.learn(info)),
            Down::Offer(offer) => {
                for sid in offer.mid_to_track_id.values() {
                    assert!(self.tracks.contains(sid), "{sid} is offered before it is announced");
                }
            }
            _ => {}
        }
        self.started = true;
    }

    fn learn(&mut self, info: &proto::ParticipantInfo) {
        let version = self.versions.entry(info.sid.clone()).or_default();
        assert!(info.version > *version, "{} went from version {version} to {}", info.sid, info.version);
        *version = info.version;
        self.tracks.extend(info.tracks.iter().map(|track| track.sid.clone()));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn whatever_clients_and_plane_do_the_rooms_stay_consistent(acts in prop::collection::vec(act(), 0..60)) {
        let mut machine = Machine::new(|_| {});
        let mut world = World::default();
        let mut told: HashMap<SessionId, Told> = HashMap::new();
        for act in acts {
            world.act(&mut machine, act);
            for (session, messages) in std::mem::take(&mut machine.sent) {
                let told = told.entry(session).or_default();
                for message in &messages {
                    assert!(told.started || matches!(message, Down::Join(_)), "{message:?} before the JoinResponse");
                    told.hear(message);
                    if let Down::TrackPublished(published) = message {
                        world.sids.push(published.track.as_ref().unwrap().sid.clone());
                    }
                }
            }
            let stats = machine.rooms.stats();
            prop_assert!(stats.participants <= 4 && stats.tracks <= 16);
        }
        machine.rooms.shut_down(machine.now);
        machine.settle();
        prop_assert_eq!(machine.rooms.stats().participants, 0);
    }
}
