//! What a homeserver and other members say: one call machine takes in any of it, and believes no key that did not come
//! Olm-encrypted from the member's own device.
#![no_main]

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use antiphon_call_sdk::{
    CallEvent, Device, MembershipForm, Now, UnixMillis,
    machine::{CallMachine, Input, MachineConfig, Output, Sealing},
    matrix::{MatrixUpdate, MemberEvent, OlmSender, RoomEvent, RoomView, SlotEvent, ToDeviceEvent},
};
use libfuzzer_sys::fuzz_target;
use rand::{SeedableRng as _, rngs::StdRng};
use ruma_common::{OwnedUserId, UserId};
use serde_json::Value;

const USERS: [&str; 3] = ["@us:own.example", "@alice:example.org", "@bob:other.example:8448"];
const DEVICES: [&str; 3] = ["US", "A", "B"];
/// Longest series of outputs after one input.
const OUTPUTS: usize = 10_000;

fuzz_target!(|data: &[u8]| {
    let mut now = Now { instant: Instant::now(), unix: UnixMillis(1_790_000_000_000) };
    let device = Device::new(user(0), DEVICES[0]);
    let room = "!room:example.org".try_into().expect("a room id");
    let mut config = MachineConfig::new(device, room);
    config.observe = data.first().is_some_and(|first| first & 1 == 1);
    let sealing = Arc::<Sealing>::default();
    let mut machine = CallMachine::new(now, config, sealing, Box::new(StdRng::seed_from_u64(1)));
    let mut view = RoomView {
        joined: USERS.iter().map(|user| (*user).try_into().expect("a user id")).collect(),
        encrypted: true,
        version: "11".to_owned(),
        ..RoomView::default()
    };
    feed(&mut machine, now, Input::Start, false);
    for (number, part) in data.split(|byte| *byte == 0xff).enumerate().take(64) {
        let [kind, who, text @ ..] = part else { continue };
        let Ok(content) = serde_json::from_slice::<Value>(text) else { continue };
        let (who, flags) = (usize::from(*who & 0xf) % USERS.len(), *who >> 4);
        now = now.plus(Duration::from_millis(u64::from(flags) * 700));
        let event_id = format!("$e{number}").try_into().expect("an event id");
        let trusted = flags & 1 == 1;
        match kind % 5 {
            0 | 1 => {
                let sticky = kind % 5 == 1;
                view.members.push(MemberEvent {
                    form: if sticky { MembershipForm::Sticky } else { MembershipForm::State },
                    sender: user(who),
                    sender_device: sticky.then(|| DEVICES[who].into()),
                    encrypted: sticky,
                    state_key: (!sticky).then(|| format!("_{}_{}_m.call", USERS[who], DEVICES[who])),
                    event_id: Some(event_id),
                    origin_server_ts: now.unix,
                    content,
                    sticky_until: sticky.then(|| now.unix.plus(Duration::from_secs(3600))),
                    sticky_rank: now.unix,
                    redacted_by: (flags & 2 == 2).then(|| user(0)),
                });
            }
            2 => view.slots.push(SlotEvent { slot_id: "m.call#ROOM".to_owned(), content }),
            3 => {
                let olm =
                    trusted.then(|| OlmSender { device_id: Some(DEVICES[who].into()), cross_signed: true });
                let event_type = "io.element.call.encryption_keys".to_owned();
                let event = ToDeviceEvent { event_type, content, sender: user(who), olm };
                feed(&mut machine, now, Input::Update(MatrixUpdate::ToDevice(event)), !trusted);
                continue;
            }
            _ => {
                let event = RoomEvent {
                    event_id,
                    event_type: "m.reaction".to_owned(),
                    sender: user(who),
                    origin_server_ts: now.unix,
                    content,
                    sticky_until: None,
                    redacts: None,
                    may_mention_room: false,
                };
                feed(&mut machine, now, Input::Update(MatrixUpdate::Event(event)), true);
                continue;
            }
        }
        feed(&mut machine, now, Input::Update(MatrixUpdate::RoomChanged), false);
        feed(&mut machine, now, Input::Room(Ok(Arc::new(view.clone()))), false);
        assert!(machine.members().len() <= view.members.len(), "more members than memberships");
    }
    let report = machine.report(now).to_json();
    assert!(USERS.iter().all(|user| !report.contains(user)), "{report}");
});

/// Drains the machine. `distrusted`: no key may become usable by this input.
fn feed(machine: &mut CallMachine, now: Now, input: Input, distrusted: bool) {
    machine.handle(now, input);
    for _ in 0..OUTPUTS {
        match machine.poll(now) {
            Output::WaitUntil(_) => return,
            Output::Event(CallEvent::KeyReceived { .. }) if distrusted => {
                panic!("an untrusted key was taken")
            }
            _ => {}
        }
    }
    panic!("the machine never waits");
}

fn user(number: usize) -> OwnedUserId {
    UserId::parse(USERS[number]).expect("a user id")
}
