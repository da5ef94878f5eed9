//! Any sequence of views gives a sound list of members.

use proptest::prelude::*;
use ruma_common::UserId;
use serde_json::json;

use super::*;
use crate::{
    machine::membership::testing::{ALICE, BOB, CAROL, redacted, with},
    member::MemberKey,
};

const PEOPLE: [&str; 3] = [ALICE, BOB, CAROL];

/// One member event of few people, devices and times, so that they collide.
fn any_event() -> impl Strategy<Value = MemberEvent> {
    let facts = (0_usize..3, 0_usize..3, any::<bool>(), 0_u64..10_000, 0_u64..8_000, 0_usize..5);
    facts.prop_map(|(who, device, is_sticky, sent, lasts, kind)| {
        let (who, device) = (PEOPLE[who], format!("D{device}"));
        if is_sticky {
            let content = match kind {
                0 => json!({"msc4354_sticky_key": device}),
                _ => sticky_content(who, &device, &device),
            };
            let until = UnixMillis(sent + lasts);
            let event = MemberEvent {
                sticky_until: Some(until),
                sticky_rank: until,
                encrypted: kind != 4,
                ..sticky_event(who, sent, content)
            };
            if kind == 3 { redacted(&event, BOB) } else { event }
        } else {
            let selection = ["", "oldest_membership", "multi_sfu", "unknown", "multi_sfu"][kind];
            let active = json!({"type": "livekit", "focus_selection": selection});
            let content = with(with(state_content(&device), "expires", json!(lasts)), "focus_active", active);
            state_event(who, sent, if kind == 0 { json!({}) } else { content })
        }
    })
}

proptest! {
    /// Whatever events come and whichever way the clock goes, the list is sorted, has every device once, only joined
    /// users and nothing expired; and applying the changes in order yields the list.
    #[test]
    fn list_is_always_sound(
        steps in prop::collection::vec(
            (prop::collection::vec(any_event(), 0..8), 0_u64..20_000, 0_usize..4, any::<bool>()), 1..6,
        )
    ) {
        let mut roster = Roster::new(Slot::room_call());
        let mut replayed: BTreeMap<MemberKey, Member> = BTreeMap::new();
        for (events, now, joined, encrypted) in steps {
            let joined: BTreeSet<_> = PEOPLE[..joined].iter().map(|user| UserId::parse(*user).unwrap()).collect();
            let view = RoomView { joined: joined.clone(), encrypted, ..view(events) };
            let change = roster.update(at(now), &view);
            for member in &change.left {
                prop_assert!(replayed.remove(&member.key()).is_some());
            }
            for member in &change.joined {
                prop_assert!(replayed.insert(member.key(), member.clone()).is_none());
            }
            for member in change.rejoined.iter().chain(&change.updated) {
                prop_assert!(replayed.insert(member.key(), member.clone()).is_some());
            }
            let listed: BTreeMap<_, _> = roster.members().iter().map(|m| (m.key(), m.clone())).collect();
            prop_assert_eq!(&replayed, &listed);
            prop_assert_eq!(listed.len(), roster.members().len());

            let members = roster.members();
            prop_assert!(members.is_sorted_by_key(|member| member.created));
            let devices: BTreeSet<_> = members.iter().map(|member| (&member.user_id, &member.device_id)).collect();
            prop_assert_eq!(devices.len(), members.len());
            prop_assert!(members.iter().all(|member| joined.contains(&member.user_id)));
            prop_assert!(members.iter().all(|m| m.expires_at.is_none_or(|at| at > UnixMillis(now))));
            prop_assert!(roster.next_expiry().is_none_or(|at| at > UnixMillis(now)));
            prop_assert!(roster.tick(at(now)).is_empty(), "ticking at the same time changes nothing");
        }
    }
}
