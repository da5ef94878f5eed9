//! The rooms on virtual time: what each client is told, and in which order.

use std::time::Duration;

use antiphon_focus::plane::{Command, Event, TrackKey};
use antiphon_focus::room::{JoinError, RoomOptions, SessionId};
use livekit_protocol::{
    self as proto, AddTrackRequest, DisconnectReason, SessionDescription, TrackSource, VideoQuality,
    participant_info::State, request_response::Reason, signal_request::Message as Up,
    signal_response::Message as Down,
};

use crate::support::machine::Machine;
use crate::support::{ROOM, claims};

fn add_track(cid: &str, video: bool) -> Up {
    let layer = |quality: VideoQuality, height| proto::VideoLayer {
        quality: quality.into(),
        width: height * 16 / 9,
        height,
        ..Default::default()
    };
    Up::AddTrack(AddTrackRequest {
        cid: cid.into(),
        r#type: video.into(),
        source: if video { TrackSource::Camera } else { TrackSource::Microphone }.into(),
        width: if video { 1280 } else { 0 },
        height: if video { 720 } else { 0 },
        encryption: proto::encryption::Type::Gcm.into(),
        layers: if video {
            vec![
                layer(VideoQuality::Low, 180),
                layer(VideoQuality::Medium, 360),
                layer(VideoQuality::High, 720),
            ]
        } else {
            vec![]
        },
        simulcast_codecs: if video {
            vec![proto::SimulcastCodec { codec: "vp8".into(), cid: cid.into(), ..Default::default() }]
        } else {
            vec![]
        },
        ..Default::default()
    })
}

fn offer(id: u32, sections: &str) -> Up {
    Up::Offer(SessionDescription { r#type: "offer".into(), sdp: sections.into(), id, ..Default::default() })
}

/// Alice with microphone and camera, Bob who watches; both active. Gives the sids of both tracks too.
fn call() -> (Machine, SessionId, SessionId, String, String) {
    let mut machine = Machine::new(|_| {});
    let alice = machine.join_active("alice");
    machine.up(alice, add_track("mic", false));
    machine.up(alice, add_track("cam", true));
    machine.up(alice, offer(3, "1 audio mic\n2 video cam"));
    let sids: Vec<_> = machine.take(alice).into_iter().filter_map(published).collect();
    let bob = machine.join_active("bob");
    let [mic, cam] = sids.try_into().unwrap();
    (machine, alice, bob, mic, cam)
}

fn published(message: Down) -> Option<String> {
    match message {
        Down::TrackPublished(published) => published.track.map(|track| track.sid),
        _ => None,
    }
}

fn find<T>(messages: &[Down], wanted: impl FnMut(&Down) -> Option<T>) -> T {
    messages.iter().find_map(wanted).unwrap_or_else(|| panic!("not among {messages:#?}"))
}

fn updates(messages: &[Down]) -> Vec<proto::ParticipantInfo> {
    let participants = messages.iter().filter_map(|message| match message {
        Down::Update(update) => Some(update.participants.clone()),
        _ => None,
    });
    participants.flatten().collect()
}

fn track_key(machine: &Machine, sid: &str) -> TrackKey {
    let command = machine
        .plane
        .commands
        .iter()
        .find(|command| command.starts_with("Subscribe") && command.contains(sid))
        .unwrap();
    let number = command.split("TrackKey(").nth(1).unwrap().split(')').next().unwrap();
    TrackKey(number.parse().unwrap())
}

#[test]
fn the_first_message_is_a_complete_join_response() {
    let mut machine = Machine::new(|_| {});
    let alice = machine.join("alice");
    let sent = machine.take(alice);
    let Down::Join(join) = &sent[0] else { panic!("{sent:?}") };
    let room = join.room.as_ref().unwrap();
    let me = join.participant.as_ref().unwrap();
    assert!(room.sid.starts_with("RM_") && room.name == ROOM && room.creation_time_ms > 0);
    assert!(me.sid.starts_with("PA_") && me.identity == "alice" && me.state() == State::Joined);
    assert!(me.permission.as_ref().unwrap().can_publish);
    assert_eq!(me.client_protocol, 2);
    let server = join.server_info.as_ref().unwrap();
    assert_eq!((server.version.as_str(), server.protocol), ("1.13.5", 17));
    assert_eq!((join.ping_interval, join.ping_timeout), (5, 15));
    assert!(join.subscriber_primary && join.fast_publish && join.sif_trailer.len() == 24);
    assert_eq!(join.enabled_publish_codecs[0].mime, "video/VP8");
    assert!(matches!(&sent[1], Down::RefreshToken(token) if crate::support::keys()
        .verify(token, machine.now.unix)
        .is_ok_and(|claims| claims.identity() == "alice" && claims.video.room == ROOM)));
    let Down::Offer(offer) = &sent[2] else { panic!("{sent:?}") };
    assert!(offer.id > 0 && offer.mid_to_track_id.is_empty());
}

#[test]
fn others_see_a_participant_come_become_active_and_go() {
    let mut machine = Machine::new(|_| {});
    let alice = machine.join_active("alice");
    machine.take(alice);
    let bob = machine.join_active("bob");
    machine.up(bob, Up::Leave(proto::LeaveRequest::default()));
    let seen = updates(&machine.take(alice));
    let states: Vec<_> = seen.iter().map(|bob| (bob.state(), bob.version)).collect();
    assert_eq!(states, [(State::Joined, 1), (State::Active, 2), (State::Disconnected, 3)]);
    assert_eq!(seen[2].disconnect_reason(), DisconnectReason::ClientInitiated);
    assert!(machine.closed.contains(&bob));
    let Some(Down::Leave(_)) = machine.take(bob).pop() else { panic!("the goodbye was not answered") };
}

#[test]
fn a_track_is_announced_at_once_matched_by_its_id_and_told_to_others_before_the_offer_that_carries_it() {
    let mut machine = Machine::new(|_| {});
    let alice = machine.join_active("alice");
    let bob = machine.join_active("bob");
    machine.take(alice);
    machine.take(bob);
    machine.up(alice, add_track("cam", true));
    let sid = published(machine.take(alice).remove(0)).unwrap();
    assert!(sid.starts_with("TR_VC"));
    assert!(machine.take(bob).is_empty(), "a track without media is nobody's business");

    machine.up(alice, offer(7, "0 video cam"));
    let to_alice = machine.take(alice);
    let Down::Answer(answer) = &to_alice[0] else { panic!("{to_alice:?}") };
    assert!(answer.id == 7 && answer.mid_to_track_id.is_empty());
    let to_bob = machine.take(bob);
    let Down::Update(update) = &to_bob[0] else { panic!("{to_bob:?}") };
    let track = &update.participants[0].tracks[0];
    assert_eq!((track.sid.as_str(), track.mid.as_str(), track.mime_type.as_str()), (&*sid, "0", "video/VP8"));
    assert_eq!(track.encryption(), proto::encryption::Type::Gcm);
    assert_eq!(
        track.codecs[0].layers.iter().map(|layer| layer.rid.as_str()).collect::<Vec<_>>(),
        ["q", "h", "f"]
    );
    let Down::Offer(offer) = &to_bob[1] else { panic!("{to_bob:?}") };
    assert_eq!(offer.mid_to_track_id.values().collect::<Vec<_>>(), [&sid]);
    let subscribe = machine.plane.commands.iter().find(|command| command.starts_with("Subscribe")).unwrap();
    let alice_sid = &update.participants[0].sid;
    assert!(
        subscribe.contains(&format!("stream_id: \"{alice_sid}|{sid}\", track_id: \"{sid}\"")),
        "{subscribe}"
    );
    find(&to_alice, |message| {
        matches!(message, Down::TrackSubscribed(told) if told.track_sid == sid).then_some(())
    });
}

#[test]
fn a_late_joiner_finds_the_tracks_in_its_join_response_and_in_its_offer() {
    let (mut machine, _, bob, mic, cam) = call();
    let sent = machine.take(bob);
    let Down::Join(join) = &sent[0] else { panic!("{sent:?}") };
    assert_eq!(join.other_participants[0].tracks.len(), 2);
    let carried = sent.iter().rev().find_map(|message| match message {
        Down::Offer(offer) => Some(offer.mid_to_track_id.values().cloned().collect::<Vec<_>>()),
        _ => None,
    });
    let carried = carried.unwrap();
    assert!(carried.contains(&mic) && carried.contains(&cam));
}

#[test]
fn a_section_may_come_before_its_announcement() {
    let mut machine = Machine::new(|_| {});
    let alice = machine.join_active("alice");
    machine.up(alice, offer(1, "0 audio {renamed}"));
    assert!(updates(&machine.take(alice)).last().is_some_and(|me| me.tracks.is_empty()));
    machine.up(alice, add_track("mic", false));
    let me = updates(&machine.take(alice)).pop().unwrap();
    assert_eq!(me.tracks[0].codecs[0].sdp_cid, "{renamed}");
}

#[test]
fn a_section_that_stops_sending_ends_its_track_and_frees_its_id_for_the_next() {
    let (mut machine, alice, bob, mic, cam) = call();
    machine.up(alice, add_track("cam", true));
    let waits = find(&machine.take(alice), |message| match message {
        Down::RequestResponse(response) => Some(response.reason()),
        _ => None,
    });
    assert_eq!(waits, Reason::Queued);
    machine.take(bob);
    machine.up(alice, offer(4, "1 audio mic\n-2 video cam"));
    let left: Vec<_> = updates(&machine.take(bob))[0].tracks.iter().map(|track| track.sid.clone()).collect();
    assert_eq!(left, [mic]);
    let to_alice = machine.take(alice);
    let again = to_alice.into_iter().find_map(published).expect("the queued track was not announced");
    assert_ne!(again, cam);
    machine.up(alice, offer(5, "1 audio mic\n2 video cam"));
    assert_eq!(updates(&machine.take(bob)).pop().unwrap().tracks.len(), 2);
}

#[test]
fn a_mute_is_told_and_stops_forwarding() {
    let (mut machine, alice, bob, mic, _) = call();
    machine.take(bob);
    machine.plane.commands.clear();
    machine.up(alice, Up::Mute(proto::MuteTrackRequest { sid: mic.clone(), muted: true }));
    assert!(updates(&machine.take(bob))[0].tracks[0].muted);
    assert!(
        machine.plane.commands.iter().any(|c| c.starts_with("SetForwarding") && c.contains("paused: true"))
    );
    machine.up(alice, Up::Mute(proto::MuteTrackRequest { sid: mic.clone(), muted: false }));
    assert!(
        machine.plane.commands.iter().any(|c| c.starts_with("SetForwarding") && c.contains("paused: false"))
    );
    machine.take(bob);
    machine.up(bob, Up::Mute(proto::MuteTrackRequest { sid: mic, muted: true }));
    let reason = find(&machine.take(bob), |message| match message {
        Down::RequestResponse(response) => Some(response.reason()),
        _ => None,
    });
    assert_eq!(reason, Reason::NotFound, "nobody mutes another's track");
}

#[test]
fn the_size_of_a_tile_chooses_the_layer_and_the_publisher_learns_what_nobody_wants() {
    let (mut machine, alice, bob, _, cam) = call();
    let enabled = |machine: &mut Machine| {
        machine.take(alice).into_iter().rev().find_map(|message| match message {
            Down::SubscribedQualityUpdate(update) => {
                assert_eq!(update.subscribed_codecs[0].codec, "vp8");
                let qualities = &update.subscribed_codecs[0].qualities;
                Some(qualities.iter().filter(|quality| quality.enabled).count())
            }
            _ => None,
        })
    };
    assert_eq!(enabled(&mut machine), Some(3));
    machine.plane.commands.clear();
    let settings = |width, height, disabled| {
        Up::TrackSetting(proto::UpdateTrackSettings {
            track_sids: vec![cam.clone()],
            width,
            height,
            disabled,
            ..Default::default()
        })
    };
    machine.up(bob, settings(120, 68, false));
    assert!(machine.plane.commands[0].contains("max_layer: 0"), "{:?}", machine.plane.commands);
    assert_eq!(enabled(&mut machine), None, "lowered at once");
    machine.pass(Duration::from_secs(6));
    assert_eq!(enabled(&mut machine), Some(1));
    machine.up(bob, settings(1280, 720, false));
    assert_eq!(enabled(&mut machine), Some(3), "not raised at once");
    machine.up(bob, settings(0, 0, true));
    assert!(machine.plane.commands.last().unwrap().contains("paused: true"));
    machine.pass(Duration::from_secs(6));
    assert_eq!(enabled(&mut machine), Some(0));
}

#[test]
fn who_does_not_subscribe_by_itself_subscribes_by_asking() {
    let (mut machine, _, _, mic, _) = call();
    let carol = machine.try_join(claims("carol", |_| {}), |join| join.auto_subscribe = false).unwrap();
    machine.plane.commands.clear();
    let ask = |sid: &str, subscribe| {
        Up::Subscription(proto::UpdateSubscription {
            track_sids: vec![sid.to_owned()],
            subscribe,
            ..Default::default()
        })
    };
    machine.up(carol, ask(&mic, true));
    assert!(machine.plane.commands.iter().any(|command| command.starts_with("Subscribe")));
    machine.up(carol, ask(&mic, false));
    assert!(machine.plane.commands.iter().any(|command| command.starts_with("Unsubscribe")));
    machine.answer(carol);
    machine.up(carol, ask("TR_nothing", true));
    machine.take(carol);
    for _ in 0..7 {
        machine.pass(Duration::from_secs(10));
        machine.answer(carol);
    }
    let err = find(&machine.take(carol), |message| match message {
        Down::SubscriptionResponse(response) => Some(response.err()),
        _ => None,
    });
    assert_eq!(err, proto::SubscriptionError::SeTrackNotfound);
}

#[test]
fn a_publisher_decides_who_may_subscribe() {
    let (mut machine, alice, bob, mic, cam) = call();
    machine.take(bob);
    let rule = proto::TrackPermission {
        participant_identity: "bob".into(),
        track_sids: vec![mic.clone()],
        ..Default::default()
    };
    let permission = |all_participants, rules: &[proto::TrackPermission]| {
        Up::SubscriptionPermission(proto::SubscriptionPermission {
            all_participants,
            track_permissions: rules.to_vec(),
        })
    };
    machine.up(alice, permission(false, &[rule]));
    let told = |machine: &mut Machine| {
        machine.take(bob).into_iter().find_map(|message| match message {
            Down::SubscriptionPermissionUpdate(update) => Some((update.track_sid, update.allowed)),
            _ => None,
        })
    };
    assert_eq!(told(&mut machine), Some((cam.clone(), false)));
    assert!(machine.plane.commands.last().unwrap().starts_with("Unsubscribe"));
    machine.up(alice, permission(true, &[]));
    assert_eq!(told(&mut machine), Some((cam, true)));
    assert!(machine.plane.commands.iter().rev().any(|command| command.starts_with("Subscribe")));
}

#[test]
fn what_a_token_does_not_allow_is_refused_with_a_reason() {
    let mut machine = Machine::new(|_| {});
    let limited = claims("alice", |claims| {
        claims.video.can_publish_sources = vec!["microphone".into()];
        claims.video.can_update_own_metadata = None;
    });
    let alice = machine.try_join(limited, |_| {}).unwrap();
    machine.take(alice);
    let mut reason = |message: Up| {
        machine.up(alice, message);
        find(&machine.take(alice), |message| match message {
            Down::RequestResponse(response) => Some(response.reason()),
            _ => None,
        })
    };
    assert_eq!(reason(add_track("cam", true)), Reason::NotAllowed);
    let metadata = proto::UpdateParticipantMetadata { request_id: 5, ..Default::default() };
    assert_eq!(reason(Up::UpdateMetadata(metadata)), Reason::NotAllowed);
    let data_track = proto::PublishDataTrackRequest::default();
    assert_eq!(reason(Up::PublishDataTrackRequest(data_track)), Reason::NotAllowed);
    let data = AddTrackRequest { cid: "x".into(), r#type: 2, source: 2, ..Default::default() };
    assert_eq!(reason(Up::AddTrack(data)), Reason::UnsupportedType);
    machine.up(alice, add_track("mic", false));
    assert!(published(machine.take(alice).remove(0)).is_some());
}

#[test]
fn attributes_are_merged_told_and_put_into_the_token() {
    let mut machine = Machine::new(|_| {});
    let alice = machine.join("alice");
    let bob = machine.join("bob");
    machine.take(bob);
    let set = |pairs: &[(&str, &str)]| {
        let attributes = pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        Up::UpdateMetadata(proto::UpdateParticipantMetadata {
            attributes,
            request_id: 9,
            ..Default::default()
        })
    };
    machine.up(alice, set(&[("hand", "raised"), ("mood", "good")]));
    machine.up(alice, set(&[("mood", "")]));
    let seen = updates(&machine.take(bob)).pop().unwrap();
    assert_eq!(seen.attributes.len(), 1);
    assert_eq!(seen.attributes["hand"], "raised");
    let sent = machine.take(alice);
    let answers = sent.iter().filter(|message| {
        matches!(message, Down::RequestResponse(response) if response.request_id == 9 && response.reason() == Reason::Ok)
    });
    assert_eq!(answers.count(), 2);
    let token = sent.iter().rev().find_map(|message| match message {
        Down::RefreshToken(token) => Some(token.clone()),
        _ => None,
    });
    let claims = crate::support::keys().verify(&token.unwrap(), machine.now.unix).unwrap();
    assert_eq!(claims.attributes["hand"], "raised");
}

#[test]
fn data_goes_to_the_active_others_with_the_true_sender_and_in_sequence() {
    use bytes::Bytes;
    use prost::Message as _;

    let mut machine = Machine::new(|_| {});
    let alice = machine.join_active("alice");
    let _bob = machine.join_active("bob");
    let _not_active = machine.join("carol");
    let sid = updates(&machine.take(alice)).remove(0).sid;
    // The publisher's peer is made just before the subscriber's.
    let peer = machine.plane.commands.iter().find_map(|command| {
        command
            .contains("Publisher")
            .then(|| command.split("PeerId(").nth(1)?.split(')').next()?.parse().ok())?
    });
    let peer = antiphon_focus::plane::PeerId(peer.unwrap());
    let mut send = |packet: proto::DataPacket| {
        machine.data.clear();
        let payload = Bytes::from(packet.encode_to_vec());
        machine.event(Event::Data { peer, channel: antiphon_focus::plane::Channel::Reliable, payload });
        std::mem::take(&mut machine.data)
    };
    let packet = |sequence, to: &[&str]| proto::DataPacket {
        sequence,
        participant_identity: "mallory".into(),
        destination_identities: to.iter().map(|to| (*to).to_owned()).collect(),
        ..Default::default()
    };
    let sent = send(packet(1, &[]));
    let [Command::SendData { payload, .. }] = sent.as_slice() else { panic!("{sent:?}") };
    let read = proto::DataPacket::decode(payload.clone()).unwrap();
    assert_eq!((read.participant_identity, read.participant_sid), ("alice".to_owned(), sid));
    assert_eq!(send(packet(1, &[])).len(), 0, "a sequence number passes once");
    assert_eq!(send(packet(2, &["bob", "carol"])).len(), 1, "whoever is not active cannot receive");
    assert_eq!(send(packet(3, &["nobody"])).len(), 0);
}

#[test]
fn speakers_are_told_to_themselves_and_to_their_listeners() {
    let (mut machine, alice, bob, mic, _) = call();
    let carol = machine.try_join(claims("carol", |_| {}), |join| join.auto_subscribe = false).unwrap();
    let track = track_key(&machine, &mic);
    for session in [alice, bob, carol] {
        machine.take(session);
    }
    let speaking = |machine: &mut Machine, session| {
        machine.take(session).into_iter().find_map(|message| match message {
            Down::SpeakersChanged(changed) => Some(changed.speakers[0].clone()),
            _ => None,
        })
    };
    machine.event(Event::AudioLevel { track, level: 10, active_share: 1.0 });
    machine.pass(Duration::from_millis(400));
    assert!(speaking(&mut machine, alice).is_some_and(|speaker| speaker.active && speaker.level > 0.0));
    assert!(speaking(&mut machine, bob).is_some_and(|speaker| speaker.active));
    assert_eq!(speaking(&mut machine, carol), None);
    machine.up(alice, Up::Mute(proto::MuteTrackRequest { sid: mic, muted: true }));
    machine.pass(Duration::from_millis(400));
    assert!(speaking(&mut machine, bob).is_some_and(|speaker| !speaker.active));
}

#[test]
fn a_second_join_of_an_identity_replaces_the_first() {
    let mut machine = Machine::new(|_| {});
    let old = machine.join_active("alice");
    let bob = machine.join_active("bob");
    machine.take(bob);
    let new = machine.join_active("alice");
    let Some(Down::Leave(leave)) = machine.take(old).pop() else { panic!("no goodbye") };
    assert_eq!(leave.reason(), DisconnectReason::DuplicateIdentity);
    assert!(machine.closed.contains(&old) && !machine.closed.contains(&new));
    let seen = updates(&machine.take(bob));
    assert!(
        seen.iter().all(|alice| alice.state() != State::Disconnected),
        "newer clients replace by identity"
    );
    assert_eq!(machine.rooms.stats().participants, 2);
}

#[test]
fn who_does_not_connect_in_a_minute_is_sent_away() {
    let mut machine = Machine::new(|_| {});
    let alice = machine.join("alice");
    machine.pass(Duration::from_secs(59));
    assert!(machine.closed.is_empty());
    machine.pass(Duration::from_secs(2));
    let Some(Down::Leave(leave)) = machine.take(alice).pop() else { panic!("no goodbye") };
    assert_eq!(leave.reason(), DisconnectReason::JoinFailure);
}

#[test]
fn who_leaves_an_offer_unanswered_is_told_to_join_anew() {
    let (mut machine, alice, bob, _, _) = call();
    machine.answer(bob);
    machine.answer(bob);
    machine.up(alice, add_track("screen", true));
    machine.up(alice, offer(9, "1 audio mic\n2 video cam\n3 video screen"));
    machine.pass(Duration::from_secs(16));
    let Some(Down::Leave(leave)) = machine.take(bob).pop() else { panic!("no goodbye") };
    assert_eq!(leave.reason(), DisconnectReason::StateMismatch);
    assert_eq!(leave.action(), proto::leave_request::Action::Reconnect);
}

#[test]
fn a_session_description_that_cannot_be_used_is_counted_and_its_client_joins_anew() {
    let mut machine = Machine::new(|_| {});
    let alice = machine.join_active("alice");
    machine.up(alice, offer(1, "garbage"));
    assert_eq!(machine.counters.rejected_sdp.value(), 1);
    let Some(Down::Leave(leave)) = machine.take(alice).pop() else { panic!("no goodbye") };
    assert_eq!(leave.action(), proto::leave_request::Action::Reconnect);
}

#[test]
fn tokens_are_refreshed_every_five_minutes() {
    let mut machine = Machine::new(|_| {});
    let alice = machine.join_active("alice");
    machine.take(alice);
    machine.pass(Duration::from_secs(301));
    let tokens = machine.take(alice).into_iter().filter(|message| matches!(message, Down::RefreshToken(_)));
    assert_eq!(tokens.count(), 1);
}

#[test]
fn rooms_end_when_nobody_came_and_when_everybody_has_gone() {
    let mut machine = Machine::new(|_| {});
    machine.rooms.create_room(machine.now, "waiting", RoomOptions::default()).unwrap();
    let alice = machine.join_active("alice");
    machine.pass(Duration::from_secs(301));
    assert_eq!(machine.rooms.stats().rooms, 1, "the room that nobody entered is over");
    machine.rooms.signal_closed(machine.now, alice);
    machine.settle();
    machine.pass(Duration::from_secs(19));
    assert_eq!(machine.rooms.stats().rooms, 1);
    machine.pass(Duration::from_secs(2));
    assert_eq!(machine.rooms.stats().rooms, 0);
}

#[test]
fn a_room_must_exist_or_the_token_must_allow_to_create_it() {
    let mut machine = Machine::new(|settings| settings.auto_create = false);
    assert_eq!(machine.try_join(claims("alice", |_| {}), |_| {}), Err(JoinError::NoRoom));
    let creator = claims("alice", |claims| claims.video.room_create = true);
    assert!(machine.try_join(creator, |_| {}).is_ok());
    assert!(machine.try_join(claims("bob", |_| {}), |_| {}).is_ok());
}

#[test]
fn a_room_can_be_full_but_not_for_who_is_in_it() {
    let mut machine = Machine::new(|settings| settings.max_participants = 1);
    machine.join("alice");
    assert_eq!(machine.try_join(claims("bob", |_| {}), |_| {}), Err(JoinError::RoomFull));
    machine.join("alice");
    assert_eq!(machine.rooms.stats().participants, 1);
}

#[test]
fn a_hidden_participant_sees_and_is_not_seen() {
    let mut machine = Machine::new(|_| {});
    let alice = machine.join_active("alice");
    machine.take(alice);
    let spy = machine.try_join(claims("spy", |claims| claims.video.hidden = true), |_| {}).unwrap();
    machine.answer(spy);
    assert!(updates(&machine.take(alice)).is_empty());
    let Down::Join(join) = machine.take(spy).remove(0) else { panic!("no join") };
    assert_eq!(join.other_participants.len(), 1);
}

#[test]
fn who_may_not_subscribe_has_one_connection_and_no_tracks() {
    let (mut machine, _, _, _, _) = call();
    machine.plane.commands.clear();
    let dumb = claims("dumb", |claims| claims.video.can_subscribe = Some(false));
    let session = machine.try_join(dumb, |_| {}).unwrap();
    let Down::Join(join) = machine.take(session).remove(0) else { panic!("no join") };
    assert!(!join.subscriber_primary);
    assert_eq!(machine.plane.commands.len(), 1, "{:?}", machine.plane.commands);
}

#[test]
fn comings_and_goings_are_told_once_the_media_connection_is_up() {
    let mut machine = Machine::new(|_| {});
    let told = |machine: &mut Machine| -> Vec<_> {
        let told = std::mem::take(&mut machine.presence);
        told.into_iter().map(|told| (told.identity.to_string(), told.sid, told.gone)).collect()
    };
    let alice = machine.join("alice");
    assert_eq!(told(&mut machine), [], "a client that only signals may never come");
    machine.answer(alice);
    let came = told(&mut machine);
    let [(identity, first, None)] = &came[..] else { panic!("{came:?}") };
    assert_eq!(identity, "alice");

    let again = machine.join_active("alice");
    let replaced = told(&mut machine);
    let [(_, ended, Some(DisconnectReason::DuplicateIdentity)), (_, second, None)] = &replaced[..] else {
        panic!("{replaced:?}")
    };
    assert!(ended == first && second != first, "the sids tell the two connections apart");

    machine.rooms.signal_closed(machine.now, again);
    let bob = machine.join("bob");
    machine.rooms.signal_closed(machine.now, bob);
    machine.settle();
    let gone: Vec<_> = told(&mut machine).into_iter().map(|(identity, _, gone)| (identity, gone)).collect();
    let closed = Some(DisconnectReason::SignalClose);
    assert_eq!(gone, [("alice".to_owned(), closed), ("bob".to_owned(), closed)], "even one that never came");

    machine.join_active("carol");
    machine.rooms.shut_down(machine.now);
    machine.settle();
    assert_eq!(told(&mut machine).len(), 1, "a server that stops takes nobody out of the call");
}
