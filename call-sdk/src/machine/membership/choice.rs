//! Which call of a room to join.

use std::cmp::Reverse;

use super::{
    roster::Roster,
    slots::{SlotStatus, statuses},
};
use crate::{matrix::RoomView, member::Slot, time::Now};

/// The slot for a call of voice and video: an open slot, else the one that most users are in, else `m.call#ROOM`.
///
/// `m.call#ROOM` comes first among equals: deployed clients know no other.
#[must_use]
pub(crate) fn choose_slot(now: Now, view: &RoomView) -> Slot {
    let room_call = Slot::room_call();
    let open = statuses(view)
        .into_iter()
        .filter(|(slot, status)| slot.application == room_call.application && *status == SlotStatus::Open)
        .map(|(slot, _)| slot)
        .min_by(|a, b| preference(a).cmp(&preference(b)));
    if let Some(open) = open {
        return open;
    }
    let mut roster = Roster::new(room_call.clone());
    roster.update(now, view);
    let slots = roster.users_per_slot().into_iter();
    let busiest = slots.max_by(|(a, a_users), (b, b_users)| {
        a_users.cmp(b_users).then_with(|| Reverse(preference(a)).cmp(&Reverse(preference(b))))
    });
    busiest.map_or(room_call, |(slot, _)| slot)
}

/// Lower comes first: `ROOM`, then `room` of the merged MSC, then the others by name.
fn preference(slot: &Slot) -> (u8, &Slot) {
    let rank = match slot.id.as_str() {
        "ROOM" => 0,
        "room" => 1,
        _ => 2,
    };
    (rank, slot)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::{
        machine::membership::testing::{
            ALICE, BOB, CAROL, at, in_slot, slot_event, state_content, state_event, view, with,
        },
        matrix::{MemberEvent, SlotEvent},
        time::UnixMillis,
    };

    fn opened() -> Value {
        json!({"status": "open", "application": {"type": "m.call"}})
    }

    fn chosen(slots: Vec<SlotEvent>, members: Vec<MemberEvent>) -> String {
        choose_slot(at(2_000), &RoomView { slots, ..view(members) }).slot_id()
    }

    #[test]
    fn open_slot_is_chosen_first() {
        let lower = || slot_event("m.call#room", opened());
        assert_eq!(chosen(vec![lower()], vec![in_slot(ALICE, 1_000, "m.call#ROOM", "x")]), "m.call#room");
        assert_eq!(chosen(vec![lower(), slot_event("m.call#ROOM", opened())], vec![]), "m.call#ROOM");
        assert_eq!(chosen(vec![slot_event("m.call#a", opened()), lower()], vec![]), "m.call#room");
        let unusable = [
            slot_event("m.call#room", json!({"status": "closed"})),
            slot_event("m.other#x", json!({"status": "open", "application": {"type": "m.other"}})),
        ];
        assert_eq!(chosen(unusable.into(), vec![]), "m.call#ROOM");
    }

    #[test]
    fn slot_of_most_users_is_chosen_next() {
        let members = vec![
            in_slot(ALICE, 1_000, "m.call#room", "x"),
            in_slot(BOB, 1_000, "m.call#room", "x"),
            in_slot(CAROL, 1_000, "m.call#ROOM", "x"),
        ];
        assert_eq!(chosen(vec![], members), "m.call#room");
        let state = state_event(ALICE, 1_000, state_content("DEVICE"));
        assert_eq!(
            chosen(vec![], vec![state, in_slot(BOB, 1_000, "m.call#room", "x")]),
            "m.call#ROOM",
            "ROOM among equals"
        );
        assert_eq!(chosen(vec![], vec![in_slot(ALICE, 1_000, "m.other#x", "x")]), "m.call#ROOM");
        assert_eq!(chosen(vec![], vec![]), "m.call#ROOM");
    }

    #[test]
    fn many_devices_of_one_user_do_not_choose_the_slot() {
        let flood = (0..50).map(|n| {
            let content = with(state_content(&format!("D{n}")), "call_id", json!("evil"));
            state_event(CAROL, 1_000, content)
        });
        let members = flood
            .chain([in_slot(ALICE, 1_000, "m.call#room", "x"), in_slot(BOB, 1_000, "m.call#room", "x")])
            .collect();
        assert_eq!(chosen(vec![], members), "m.call#room");
    }

    #[test]
    fn expired_members_do_not_choose_the_slot() {
        let old = MemberEvent {
            sticky_until: Some(UnixMillis(1_999)),
            ..in_slot(ALICE, 1_000, "m.call#room", "x")
        };
        assert_eq!(chosen(vec![], vec![old]), "m.call#ROOM");
    }
}
